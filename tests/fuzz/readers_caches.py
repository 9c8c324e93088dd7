"""Readers of what an earlier command kept: caches of clips, hulls, renders and usable frames, weights and the state of
trainings, labels of sessions, requests to ranks, and curves.

A cache that is damaged is made again: its reader gives None, never wrong content. A damaged file of weights is refused.
"""
import io
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kilonb.batch.launch import read_request
from kilonb.coop.dataset import _known_frames, _UsableFrame
from kilonb.core.files import write_json
from kilonb.data.video import read_video_frames, video_info, write_video
from kilonb.flux4d.examples import _kept_velocities
from kilonb.flux4d.network import ReconstructionConfig, ReconstructionNetwork
from kilonb.flux4d.training import start_from_checkpoint
from kilonb.geometry.cameras import orbit_cameras
from kilonb.imaging.sources import open_source
from kilonb.imaging.targets import _kept_render
from kilonb.pose.images import ImageFile
from kilonb.pose.prepare import Hulls, _load_hulls, _save_hulls
from kilonb.pose.model import PoseModel
from kilonb.pose.trained_runs import recording_of_run
from kilonb.pose.training import MODEL_FILE, save_pose
from kilonb.runs.scalars import read_curves
from kilonb.scenes.dannce import read_labels
from kilonb.scenes.multiview import read_mask
from kilonb.scenes.opv2v import load_opv2v
from kilonb.training.averaging import load_weights
from kilonb.training.checkpoints import write_checkpoint
from kilonb.training.loop import LoopConfig, latest_path, train
from tests.fuzz import validators as v
from tests.fuzz.engine import Reader
from tests.fuzz.readers_data import _opv2v, layout, picture, saved, up
from tests.fuzz.readers_methods import FIELDS, GRID, SMALL_POSE, _prepared, _student

CAMERA = orbit_cameras(1, 3.0, width=16, height=12)[0]
DRAW = np.random.default_rng(0)

# Caches


def _coop_frames(path: Path) -> None:
    write_json(path, {"known": [[0, 0, torch.eye(4).tolist()]], "problems": [["train/town/7/000069", "no camera"]]})


def _read_coop_frames(path: Path) -> Any:
    folder = path.parent / "opv2v"
    if not folder.is_dir(): _opv2v(folder)
    scene = load_opv2v(folder)
    known = _known_frames(path, scene, scene.instants())
    return known, scene.problems


def _wrong_frames(found: Any) -> str:
    known, problems = found
    return v.first(
        *("" if isinstance(one, _UsableFrame) and one.number == one.instant == 0 else f"{one!r:.60}"
          for one in known or ()),
        *(v.wrong_pose(np.array(one.vehicle_to_world)) for one in known or ()),
        *("" if isinstance(one.frame, str) and isinstance(one.message, str) else "a problem" for one in problems))


def _velocities(path: Path) -> None:
    write_checkpoint(path, {"velocities": [torch.randn(5, 3, generator=torch.Generator().manual_seed(0)),
                                           torch.zeros(4, 3)]})


def _render(path: Path) -> None:
    draw = lambda *shape: DRAW.random(shape, np.float32)
    np.savez(buffer := io.BytesIO(), rgb_premultiplied=draw(12, 16, 3), alpha=draw(12, 16), expected_depth=draw(12, 16))
    path.write_bytes(buffer.getvalue())


def _wrong_render(found: Any) -> str:
    if found is None: return ""
    shapes = ((12, 16, 3), (12, 16), (12, 16))
    return v.first(*(v.wrong_numbers(one, "a render", shape) for one, shape in zip(found, shapes)),
                   "" if all(one.dtype == torch.float32 for one in found) else "a type")


def _hulls(path: Path) -> None:
    draw = lambda count: torch.from_numpy(DRAW.normal(size=(count, 3)).astype(np.float32))
    skipped = [{"frame": 5, "kind": "empty", "reason": "no silhouette"}]
    _save_hulls(path, Hulls([0, 2], [draw(4), draw(3)], [draw(5), draw(6)], .01, skipped), "one")


def _wrong_hulls(hulls: Any) -> str:
    if hulls is None: return ""
    if not all(type(row) is int and 0 <= row < 3 for row in hulls.rows): return f"rows {hulls.rows!r:.60}"
    if len({len(hulls.rows), len(hulls.points), len(hulls.touched)}) != 1: return "lengths"
    if not all(isinstance(one["reason"], str) and type(one["frame"]) is int for one in hulls.skipped): return "skipped"
    return v.first(*(v.wrong_numbers(one, "a hull", (None, 3)) for one in (*hulls.points, *hulls.touched)),
                   v.wrong_number(hulls.voxel_m, "voxel_m"), "" if hulls.voxel_m > 0 else "voxel_m")


IMAGES = (("one", [0, 5], ["left", "right"], 6, 8))


def _image_file(path: Path) -> None:
    with ImageFile(path, *IMAGES) as images:
        for i, camera in ((i, camera) for i in range(2) for camera in range(2)):
            images.write(i, camera, np.full((6, 8, 3), 9, np.uint8), np.full((6, 8), 200, np.uint8))


def _read_images(path: Path) -> Any:
    with ImageFile(path, *IMAGES) as images:
        return images.resumed, images.written, images.masks(0) if images.written[0].all() else None


def _wrong_images(found: Any) -> str:
    _, written, masks = found
    fits = masks is None or (masks.shape == (2, 6, 8) and masks.dtype == np.uint8)
    return "" if fits and written.shape == (2, 2) else "shapes"


CACHES = [
    Reader("coop_frames", "json", saved(_coop_frames), _read_coop_frames, _wrong_frames, tolerant=True),
    Reader("flow_velocities", "checkpoint", saved(_velocities), partial(_kept_velocities, counts=[5, 4]),
           lambda kept: v.first(*(v.wrong_numbers(one, "velocities", (n, 3)) for one, n in zip(kept or (), (5, 4)))),
           tolerant=True),
    Reader("kept_render", "npz", saved(_render), partial(_kept_render, camera=CAMERA), _wrong_render,
           tolerant=True),
    Reader("hulls", "npz", saved(_hulls), partial(_load_hulls, identity="one", frames=3), _wrong_hulls,
           tolerant=True),
    Reader("image_file", "h5", saved(_image_file), _read_images, _wrong_images, tolerant=True),
]

# Weights and states of trainings


def _network() -> torch.nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return torch.nn.Linear(3, 2)


def _train(folder: Path, resume: bool, **settings: Any) -> torch.nn.Module:
    """Three steps, or the last of them; `second.pt` is the checkpoint after the second."""
    network = _network()

    def keep(step: int, records: list) -> None:
        if step == 2 and not resume: shutil.copy(latest_path(folder), folder / "second.pt")
    train(lambda step, generator: {"loss": network(torch.ones(1, 3)).square().sum()},
          torch.optim.Adam(network.parameters(), .01),
          LoopConfig(steps=3, warmup_steps=1, log_every_steps=1, checkpoint_every_steps=1, **settings), model=network,
          folder=folder, after_step=keep, resume=resume, quiet=True)
    return network


def _trained(path: Path, **settings: Any) -> None:
    folder = path.parent / "training"
    shutil.rmtree(folder, ignore_errors=True)
    _train(folder, False, **settings)
    path.write_bytes(latest_path(folder).read_bytes())


def _training(folder: Path) -> None:
    _train(folder, False, ema_decay=.9)
    (folder / "second.pt").rename(latest_path(folder))


def _resume(path: Path) -> Any:
    """Continue a copy: the state is loaded, and one step is made."""
    copy = path.parents[2] / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(path.parents[1], copy)
    return _train(copy, True, ema_decay=.9)


def _weights(path: Path) -> Any:
    network = _network()
    return network, load_weights(path, network)


SMALL_FLUX = ReconstructionConfig(channels=(4, 4), blocks=1, hidden=4)


def _flux_weights(path: Path) -> None:
    write_checkpoint(path, {"step": 3, "model": ReconstructionNetwork(SMALL_FLUX).state_dict()})


def _start(path: Path) -> Any:
    network = ReconstructionNetwork(SMALL_FLUX)
    start_from_checkpoint(network, path)
    return network


def _pose_run(folder: Path) -> None:
    prepared = _prepared(folder / "prepared")
    (folder / "run").mkdir(parents=True, exist_ok=True)
    save_pose(folder / "run" / MODEL_FILE, PoseModel(SMALL_POSE, GRID), {"prepared": str(prepared.path)})


TRAININGS = [
    Reader("weights", "checkpoint", saved(_trained, partial(_trained, ema_decay=.9), partial(_trained, swa_from=.25)),
           _weights, lambda found: v.wrong_module(found[0]), suffix=".pt"),
    Reader("training_state", "checkpoint", read=_resume, check=v.wrong_module,
           **layout(_training, "checkpoints/latest.pt")),
    Reader("flux4d_weights", "checkpoint", saved(_flux_weights), _start, v.wrong_module, suffix=".pt"),
    Reader("frame_source", "checkpoint", saved(*(partial(_student, config=one) for one in FIELDS[:1])), open_source,
           lambda source: "" if isinstance(source.name, str) else "a name", suffix=".pt"),
    Reader("trained_run", "checkpoint", read=lambda path: recording_of_run(path.parent),
           check=lambda found: v.first(*map(v.wrong_camera, found.cameras)), **layout(_pose_run, f"run/{MODEL_FILE}")),
]

# Sessions, videos, masks


def _labels(path: Path) -> None:
    from scipy.io import savemat

    savemat(path, {"data_2d": DRAW.normal(size=(3, 4)), "data_3d": DRAW.normal(size=(3, 6)),
                   "data_frame": [[1.0], [5], [9]]})


def _wrong_labels(found: Any) -> str:
    return v.first(v.wrong_numbers(found.points, "points", (None, None, 3), nan=True),
                   v.wrong_numbers(found.pixels["a"], "pixels", (None, None, 2), nan=True),
                   v.wrong_numbers(found.frames, "frames", (len(found.points),)))


def _movie(path: Path, kind: str) -> None:
    import av

    with av.open(str(path), "w", format={"avi": "avi", "mkv": "matroska", "mov": "mov"}[kind]) as container:
        stream = container.add_stream("mjpeg" if kind == "avi" else "mpeg4", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuvj420p" if kind == "avi" else "yuv420p"
        for k in range(4):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 60 * k, np.uint8), "rgb24")
            for packet in stream.encode(frame): container.mux(packet)
        for packet in stream.encode(): container.mux(packet)


def _wrong_frames_of_video(frames: Any) -> str:
    return v.first(*(v.wrong_picture(one.rgb) for one in frames[0]),
                   v.wrong_times([one.time_s for one in frames[0]]) if len(frames[0]) > 1 else "",
                   "" if 0 < frames[1].fps < 1e6 else f"fps is {frames[1].fps}")


SESSIONS = [
    Reader("dannce_labels", "bytes", saved(_labels, suffix=".mat"), lambda path: read_labels({"a": path}),
           _wrong_labels, suffix=".mat"),
    Reader("mask", "png", saved(picture("L", "PNG"), picture("RGB", "PNG")), read_mask,
           lambda mask: "" if mask.dtype == bool and mask.ndim == 2 and mask.size else "a mask", suffix=".png"),
    Reader("video_frames", "bytes", saved(*(partial(_movie, kind=one) for one in ("avi", "mkv", "mov")),
                                          lambda path: write_video(path.with_suffix(".mp4"), [
                                              np.full((16, 16, 3), 50 * k, np.uint8) for k in range(3)], 25)
                                          and path.write_bytes(path.with_suffix(".mp4").read_bytes())),
           lambda path: (list(read_video_frames(path, [0, 2])), video_info(path)), _wrong_frames_of_video,
           suffix=".mp4"),
]

# Requests, curves


def _request(path: Path) -> None:
    write_json(path, {"notebook": "nbs/experiments/a.ipynb", "values": {"steps": 3, "rate": .1}, "run_dir": "outputs/x",
                      "resume": False, "outputs": "", "command": "kilonb run a", "answer": ""})


def _wrong_request(request: Any) -> str:
    texts = (request.notebook, request.run_dir, request.outputs, request.command, request.answer)
    return "" if all(isinstance(one, str) for one in texts) and isinstance(request.values, dict) and type(
        request.resume) is bool else "a type"


def _curves(folder: Path) -> None:
    for part in ("run", "run/below"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / "metrics.csv").write_text("step,elapsed_s,loss\n20,0.5,0.25\n40,1.0,0.125\n")


def _read_curves(path: Path) -> Any:
    notes: list[str] = []
    return read_curves(up(path, 2), notes), notes


def _wrong_curves(found: Any) -> str:
    curves, notes = found
    if len(curves) + len(notes) != 2: return f"{len(curves)} tables and {len(notes)} notes of 2 files"
    return v.first(*("" if len(steps) == len(values) else f"{name} has two lengths" for table in curves.values()
                     for name, (steps, values) in table.items()),
                   *(v.wrong_numbers(steps, "steps") for table in curves.values() for steps, _ in table.values()))


OTHERS = [
    Reader("request", "json", saved(_request), lambda path: read_request(["--request", str(path)]), _wrong_request),
    Reader("curves", "csv", read=_read_curves, check=_wrong_curves, **layout(_curves, "run/below/metrics.csv"),
           tolerant=True),
]

READERS: list[Reader] = [*CACHES, *TRAININGS, *SESSIONS, *OTHERS]
