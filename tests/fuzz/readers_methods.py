"""Readers of what Flux4D, Pose Splatter, Pin Pad and the students keep: indices, prepared recordings, renders,
episodes, saved models."""
import io
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from kilonb.data.hdf5 import create_hdf5

from kilonb.core.configs import to_dict
from kilonb.core.files import write_json
from kilonb.distill.student import load_student, make_student, save_student
from kilonb.dream.actor_critic import ActorCritic, ActorCriticConfig
from kilonb.dream.agent import load_agent, save_agent
from kilonb.dream.episodes import collect, read_episode, read_recording_info, write_episode
from kilonb.dream.vta import VTA, VTAConfig, load_vta, save_vta
from kilonb.dream.world_model import SIZES, Size, WorldModel, WorldModelConfig, load_world_model, save_world_model
from kilonb.fields.hashgrid import HashGridConfig
from kilonb.fields.kilonerf import KiloNeRFConfig
from kilonb.fields.mlp import MLPConfig
from kilonb.fields.occupancy import OccupancyGrid
from kilonb.flux4d.clips import build_clip_index, read_clip_index, write_clip_index
from kilonb.flux4d.motion import MovingGaussians, load_moving, save_moving
from kilonb.geometry.cameras import orbit_cameras
from kilonb.pose.carve import VoxelGrid
from kilonb.pose.embedding import EmbeddingConfig, PoseEmbedding, load_embedding, read_truth
from kilonb.pose.model import PoseConfig, PoseModel
from kilonb.pose.prepared import read_prepared, write_prepared
from kilonb.pose.renders import read_gaussian_frames, read_pose_renders
from kilonb.pose.steps import StepLog, read_steps
from kilonb.pose.training import load_pose, save_pose
from kilonb.scenes.boxtown import TownConfig
from kilonb.scenes.boxtown_truth import load_town
from kilonb.splats.ply import write_ply
from tests.fuzz import validators as v
from tests.fuzz.engine import Reader
from tests.fuzz.readers_data import _gaussians, layout, saved, up

DRAW = np.random.default_rng(0)

# Flux4D


def _moving(path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=draw)
    save_moving(path, MovingGaussians(normal(5, 3), normal(5, 4), normal(5, 3), normal(5), normal(5, 3), normal(5),
                                      normal(5, 1, 3), torch.arange(5) > 3))


def _clips(path: Path) -> None: write_clip_index(path, build_clip_index({"001": 80, "003": 80}))


def _wrong_index(index: Any) -> str:
    for clip in index:
        numbers = [*clip.frames, *clip.inputs, *clip.interpolation, *clip.future]
        if not all(type(number) is int and 0 <= number < 10**7 for number in numbers): return f"numbers {numbers!r:.60}"
        if not all(isinstance(text, str) for text in (clip.name, clip.sequence, clip.setting, clip.split)):
            return "a text"
        if max(clip.inputs) >= len(clip.frames) or "/" in clip.sequence: return "a position or sequence"
    return ""


FLUX4D = [Reader("clip_index", "json", saved(_clips), read_clip_index, _wrong_index),
          Reader("moving_gaussians", "checkpoint", saved(_moving), load_moving, v.wrong_gaussians)]

# Pose Splatter

GRID = VoxelGrid(.2, 8)
CAMERAS = orbit_cameras(2, .6, 30, width=16, height=12)


def _prepared(folder: Path) -> Any:
    pixels = DRAW.integers(0, 256, (3, 2, 12, 16, 3), dtype=np.uint8)
    return write_prepared(folder / "a.zarr", name="test", names=("left", "right"), cameras=CAMERAS, frames=[0, 5, 10],
                          centres=torch.ones(3, 3), headings=torch.zeros(3), grid=GRID, mask_source="true", skipped=[],
                          fps=30., validation=True, world_to_prepared=torch.eye(4), images=zip(pixels, pixels[..., 0]),
                          extra={})


def _read_prepared(path: Path, levels: int) -> Any:
    prepared = read_prepared(up(path, levels))
    return prepared, [prepared.bytes_of(k) for k in range(len(prepared))]


def _wrong_prepared(found: Any) -> str:
    prepared, pictures = found
    if not all(isinstance(name, str) for name in (*prepared.names, prepared.name, prepared.mask_source)):
        return "a name"
    if prepared.fps is not None and not prepared.fps > 0: return f"fps is {prepared.fps}"
    return v.first(*(v.wrong_camera(camera) for camera in prepared.cameras),
                   v.wrong_numbers(prepared.centres, "centres", (None, 3)),
                   v.wrong_numbers(prepared.headings, "headings"), v.wrong_numbers(prepared.frames, "frames"),
                   v.wrong_pose(prepared.world_to_prepared), v.wrong_number(prepared.grid.side_m, "side_m"),
                   *("" if picture.dtype == np.uint8 and picture.shape == (2, 12, 16, 3) and mask.shape == (2, 12, 16)
                     else f"pictures {picture.shape} {picture.dtype}" for picture, mask in pictures))


def _prepared_reader(name: str, place: str, kind: str = "json") -> Reader:
    return Reader(f"prepared_{name}", kind, read=partial(_read_prepared, levels=1 + place.count("/")),
                  check=_wrong_prepared, **layout(_prepared, f"a.zarr/{place}"))


def _renders(path: Path) -> None:
    """A file as `write_pose_renders` writes it, without drawing."""

    with create_hdf5(path) as file:
        file.attrs["format"], file.attrs["recording"], file.attrs["names"] = 1, "test", '["left", "right"]'
        file.attrs["cameras"], file.attrs["frames"], file.attrs["indices"] = "[]", np.array([0, 5, 10]), np.arange(3)
        file.attrs["mask_source"] = "true"
        packing = {"dtype": "uint8", "compression": "gzip", "compression_opts": 3, "shuffle": True, "fletcher32": True}
        rgb = file.create_dataset("rgb", (3, 2, 12, 16, 3), chunks=(1, 1, 12, 16, 3), **packing)
        alpha = file.create_dataset("alpha", (3, 2, 12, 16), chunks=(1, 1, 12, 16), **packing)
        file["given"] = np.array([[False, True], [True, False]])
        rgb[:], alpha[:] = DRAW.integers(0, 256, rgb.shape), DRAW.integers(0, 256, alpha.shape)
        file.attrs["complete"] = True


def _read_renders(path: Path) -> Any:
    renders = read_pose_renders(path)
    return renders, [renders.pictures(row) for row in range(min(3, len(renders)))]


def _wrong_renders(found: Any) -> str:
    renders, pictures = found
    if renders.given.dtype != bool or renders.given.shape != (len(renders.names),) * 2:
        return f"given is {renders.given!r:.60}"
    if not all(isinstance(name, str) for name in (*renders.names, renders.recording, renders.mask_source)):
        return "a name"
    return v.first(v.wrong_numbers(renders.frames, "frames", renders.shape[:1]),
                   v.wrong_numbers(renders.indices, "indices"),
                   *(v.wrong_picture(one) for pair in pictures for one in pair[0]))


def _gaussian_frames(folder: Path) -> None:
    for k in range(2): write_ply(folder / f"frame_{k:06d}.ply", _gaussians(3))
    write_json(folder / "index.json",
               {"recording": "test", "unit": "metres", "up": "z", "cameras": ["left"],
                "frames": [{"frame": k, "file": f"frame_{k:06d}.ply", "gaussians": 3, "centre_m": [0.5, 1.5, 2.5],
                            "heading_rad": 0.25} for k in range(2)]})


def _wrong_gaussian_frames(found: Any) -> str:
    return v.first(v.wrong_names(found.files), v.wrong_numbers(found.centres, "centres", (len(found), 3)),
                   v.wrong_numbers(found.headings, "headings", (len(found),)),
                   *("" if type(number) is int and number >= 0 else f"frame {number!r:.40}" for number in found.frames))


def _steps(path: Path) -> None:
    log = StepLog(path, quiet=True)
    for name in ("check", "images"):
        with log.step(name) as kept: kept["frames"] = 12


def _truth(path: Path) -> None:
    np.savez(buffer := io.BytesIO(), phase=np.linspace(0, 6, 12), speed=np.ones(12, np.float32))
    path.write_bytes(buffer.getvalue())


def _embedding(path: Path) -> None:
    draw = lambda *shape: torch.from_numpy(DRAW.normal(size=shape))
    PoseEmbedding(EmbeddingConfig(), draw(6), draw(6, 3), draw(2), draw(2, 3), draw(3, 2)).save(path)


SMALL_POSE = PoseConfig(stages=1, channels=6, widths=(4,), bottleneck=4, head=4, min_gaussians=8, max_gaussians=64)
POSE = [
    _prepared_reader("attributes", "zarr.json"),
    _prepared_reader("images", "images/zarr.json"),
    _prepared_reader("frames", "frames/zarr.json"),
    _prepared_reader("chunk", "images/c/1/0/0/0/0", "bytes"),
    _prepared_reader("centres", "centres/c/0/0", "bytes"),
    Reader("pose_renders", "h5", saved(_renders), _read_renders, _wrong_renders),
    Reader(
        "gaussian_frames",
        "json",
        read=lambda path: read_gaussian_frames(path.parent),
        check=_wrong_gaussian_frames,
        **layout(_gaussian_frames, "index.json"),
    ),
    Reader(
        "step_log",
        "text",
        saved(_steps),
        read_steps,
        lambda steps: (
            "" if all(isinstance(step, dict) and isinstance(step["step"], str) for step in steps) else "a step"
        ),
        tolerant=True,
    ),
    Reader(
        "truth_npz",
        "npz",
        prepare=lambda folder: folder / "truth.npz",
        seeds=saved(_truth),
        read=lambda path: read_truth(path.parent, np.array([0, 3, 11])),
        check=lambda found: v.first(*(v.wrong_numbers(one, name, (3,)) for name, one in found.items())),
    ),
    Reader(
        "pose_embedding",
        "checkpoint",
        saved(_embedding),
        load_embedding,
        lambda found: v.first(
            *(
                v.wrong_numbers(getattr(found, name), name)
                for name in ("mean", "projection", "term_mean", "weights", "rotation")
            ),
            v.wrong_number(found.config.strength, "strength"),
        ),
    ),
    Reader(
        "pose_model",
        "checkpoint",
        saved(lambda path: save_pose(path, PoseModel(SMALL_POSE, GRID))),
        load_pose,
        v.wrong_module,
    ),
]

# Pin Pad

SIZES["fuzz"] = Size((2,), (2,), 4, False, 4, 4, 2, 2, 4, 1)       # small files; a test may add one to the table
SMALL_VTA = VTAConfig(belief=4, abstraction=2, hidden=4, state=2, units=4, components=0, channels=(2, 2, 2),
                      heads=False)


def _episode(path: Path) -> None:
    episode, = collect("three", "uniform", 1, 6)
    write_episode(path, episode)


def _episodes(folder: Path) -> None:
    entries = [{"split": split, "policy": "uniform", "seed": k, "file": f"{split}/uniform-{k:03}.episode"}
               for k, split in enumerate(("train", "test"))]
    write_json(folder / "episodes.json", {"format": 1, "layout": "three", "pads": 3, "length": 6, "scripted_noise": .2,
                                          "episodes": entries})


def _wrong_episodes(info: dict) -> str:
    if not 0 <= info["scripted_noise"] <= 1 or type(info["length"]) not in (int, float) or info["length"] < 1:
        return "numbers"
    texts = [entry[name] for entry in info["episodes"] for name in ("split", "policy", "file")]
    return "" if all(isinstance(text, str) and ".." not in Path(text).parts for text in texts) else "a text"


def _agent(folder: Path) -> None:
    model = WorldModel(WorldModelConfig("fuzz"))
    save_agent(folder, model, ActorCritic(model.rssm.outputs, 5, ActorCriticConfig(units=4, layers=1)))


PINPAD = [
    Reader("episode", "bytes", saved(_episode), read_episode, v.wrong_episode),
    Reader(
        "episodes_json",
        "json",
        read=lambda path: read_recording_info(path.parent),
        check=_wrong_episodes,
        **layout(_episodes, "episodes.json"),
    ),
    Reader(
        "world_model",
        "checkpoint",
        saved(lambda path: save_world_model(path, WorldModel(WorldModelConfig("fuzz")))),
        load_world_model,
        v.wrong_module,
    ),
    Reader("vta", "checkpoint", saved(lambda path: save_vta(path, VTA(SMALL_VTA))), load_vta, v.wrong_module),
    Reader(
        "agent",
        "checkpoint",
        read=lambda path: load_agent(path.parent)[1],
        check=v.wrong_module,
        **layout(_agent, "agent.pt"),
    ),
]

# Students, and the town of a scenario

SPACE = OccupancyGrid(torch.tensor([[-1.0, -1, -1], [1, 1, 1]]), torch.ones(2, 2, 2, dtype=torch.bool))
FIELDS = (KiloNeRFConfig(cell_size=1.0, position_frequencies=2, direction_frequencies=1, hidden=4),
          MLPConfig(position_frequencies=2, direction_frequencies=1, hidden=4, layers=2), HashGridConfig(levels=2))


def _student(path: Path, config: Any) -> None: save_student(make_student(SPACE, config, .1), path, "raw")


def _wrong_student(found: Any) -> str:
    student, weights = found
    if weights not in ("raw", "averaged"): return f"weights {weights!r:.40}"
    return v.first(v.wrong_number(student.step, "step"), "" if student.step > 0 else "step", v.wrong_module(student),
                   *(v.wrong_number(value, name) for name,
                     value in vars(student.field.config).items() if type(value) is float))


def _town(folder: Path) -> None:
    town = TownConfig(streets_x=2, streets_y=2, connected=2, cars=2, people=2, duration_s=2)
    (folder / "data_protocol.yaml").write_text(yaml.safe_dump({"town": to_dict(town), "seed": 3,
                                                               "world": {"fixed_delta_seconds": .05}}))


OTHERS = [
    Reader("student", "checkpoint", saved(*(partial(_student, config=config) for config in FIELDS[:2])), load_student,
           _wrong_student),
    Reader("town", "yaml", read=lambda path: load_town.__wrapped__(path.parent), check=lambda found: v.first(
        v.wrong_number(found[1], "seconds"), "" if found[1] > 0 else "no time",
        *(v.wrong_number(value, name) for name, value in vars(found[0].config).items() if isinstance(value, float))),
        **layout(_town, "data_protocol.yaml")),
]

READERS: list[Reader] = [*FLUX4D, *POSE, *PINPAD, *OTHERS]
