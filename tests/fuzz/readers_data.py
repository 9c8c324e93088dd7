"""Readers of data: pictures, tables, point clouds, calibrations, driving datasets, frames, tiles, recordings,
models."""
import gzip
import io
import json
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from kilonb.core.files import write_json
from kilonb.data.feather import read_feather, write_feather
from kilonb.data.matlab import read_mat
from kilonb.data.pictures import read_picture
from kilonb.data.point_files import read_points
from kilonb.data.tables import read_table, write_table
from kilonb.data.video import read_video, write_video
from kilonb.geometry.boxes import upright_boxes
from kilonb.geometry.cameras import orbit_cameras
from kilonb.geometry.colmap import ColmapModel, read_colmap, write_colmap
from kilonb.geometry.transforms import rigid
from kilonb.imaging.frames import FrameFolder, RenderedFrame, read_frame, read_frames, write_frame, write_frames
from kilonb.imaging.pictures import read_comparisons, save_comparison
from kilonb.panoramas.tiles import Tile, read_panorama_tile, write_panorama_tile
from kilonb.scenes import argoverse2, opv2v, pandaset, v2xsim
from kilonb.scenes.anipose import read_anipose
from kilonb.scenes.blender import load_blender, write_blender
from kilonb.scenes.dannce import read_mat_calibration
from kilonb.scenes.middlebury import read_par
from kilonb.scenes.multiview import read_recording
from kilonb.scenes.photographs import open_views
from kilonb.scenes.posed_images import read_rgba
from kilonb.scenes.surround import read_rgb, read_z_depth
from kilonb.splats.gaussians import Gaussians
from kilonb.splats.ply import read_ply, write_ply
from tests.fuzz import validators as v
from tests.fuzz.engine import Reader

Make = Callable[[Path], None]


def layout(make: Make, place: str) -> dict[str, Callable]:
    """`seeds` and `prepare` of a reader whose input is the file `place` of a folder that `make` writes."""
    def seeds(folder: Path) -> list[bytes]:
        home = Path(tempfile.mkdtemp(dir=folder))
        make(home)
        return [(home / place).read_bytes()]

    def prepare(folder: Path) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        make(folder)
        return folder / place
    return {"seeds": seeds, "prepare": prepare}


def saved(*writers: Callable[[Path], Any], suffix: str = ".bin") -> Callable[[Path], list[bytes]]:
    """Seeds: the files that `writers` write."""
    def seeds(folder: Path) -> list[bytes]:
        found = []
        for k, write in enumerate(writers):
            write(folder / f"seed{k}{suffix}")
            found.append((folder / f"seed{k}{suffix}").read_bytes())
        return found
    return seeds


def up(path: Path, levels: int) -> Path:
    """The folder that many levels above a file."""
    return path.parents[levels - 1]


GENERATOR = np.random.default_rng(0)
PIXELS = GENERATOR.integers(0, 256, (12, 16, 4), dtype=np.uint8)
POSE = [[1.0, 0, 0, 0.5], [0, 0, 1, -2.0], [0, -1, 0, 1.5], [0, 0, 0, 1]]


def picture(mode: str, kind: str, **options: Any) -> Callable[[Path], None]:
    """Writes a small picture."""
    return lambda path: Image.fromarray(PIXELS).convert(mode).save(path, format=kind, **options)


# Pictures, depth, video


def _depth_png(path: Path) -> None:
    Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 40).save(path, format="PNG")


def _depth_npz(path: Path) -> None:
    np.savez_compressed(path.with_suffix(".npz"), depth=PIXELS[..., 0].astype(np.float32) / 3)
    path.with_suffix(".npz").rename(path)


def _depth_npy(path: Path) -> None:
    with path.open("wb") as file: np.save(file, PIXELS[..., 0].astype(np.float32) / 3)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _deep_png(path: Path) -> None:
    """An RGBA PNG of 16 bits, 6 x 5 pixels, without row filters."""
    rows = b"".join(b"\0" + bytes((37 * i + j) % 256 for j in range(6 * 8)) for i in range(5))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", 6, 5, 16, 6, 0, 0, 0))
                     + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b""))


def _points_ply(path: Path, ascii_form: bool = False) -> None:
    kind = "ascii" if ascii_form else "binary_little_endian"
    head = f"ply\nformat {kind} 1.0\nelement vertex 3\n" + "".join(f"property float {c}\n" for c in "xyz")
    head += "".join(f"property uchar {c}\n" for c in ("red", "green", "blue")) + "end_header\n"
    rows = [(.5 * i, 1.0, -2.0, 10 * i, 20, 255) for i in range(3)]
    table = b"".join(struct.pack("<3f3B", *row) for row in rows)
    path.write_bytes(head.encode() + ("\n".join(" ".join(map(str, row)) for row in rows).encode() + b"\n"
                                      if ascii_form else table))


def _wrong_points(found: Any) -> str:
    positions, colours = found
    if positions.shape != colours.shape or not np.isfinite(positions).all(): return f"positions {positions.shape}"
    return "" if ((colours >= 0) & (colours <= 1)).all() else "colours outside of 0..1"


def _video(path: Path) -> None:
    write_video(path, [np.full((32, 32, 3), 40 * k, np.uint8) for k in range(4)], 10)


PICTURES = [
    Reader(
        "picture",
        "png",
        saved(picture("RGB", "PNG"), picture("L", "JPEG"), picture("RGB", "WEBP"), picture("P", "GIF")),
        read_picture,
        v.wrong_picture,
    ),
    Reader(
        "picture_bytes",
        "bytes",
        saved(picture("RGB", "JPEG"), picture("RGBA", "TIFF"), picture("RGB", "BMP"), picture("RGB", "PPM")),
        read_picture,
        v.wrong_picture,
    ),
    Reader(
        "rgba", "png", saved(picture("RGBA", "PNG"), picture("LA", "PNG")), read_rgba, v.wrong_picture, suffix=".png"
    ),
    Reader("rgba_16_bits", "png", saved(_deep_png), read_rgba, v.wrong_picture, suffix=".png"),
    Reader("rgb", "png", saved(picture("RGB", "PNG"), picture("L", "PNG")), read_rgb, v.wrong_picture, suffix=".png"),
    Reader("points_ply", "bytes", saved(_points_ply), read_points, _wrong_points, suffix=".ply"),
    Reader("points_ply_ascii", "text", saved(partial(_points_ply, ascii_form=True)), read_points, _wrong_points,
           suffix=".ply"),
    Reader("z_depth_png", "png", saved(_depth_png), read_z_depth, v.wrong_depth, suffix=".png"),
    Reader("z_depth_npy", "npy", saved(_depth_npy), read_z_depth, v.wrong_depth, suffix=".npy"),
    Reader("z_depth_npz", "npz", saved(_depth_npz), read_z_depth, v.wrong_depth, suffix=".npz"),
    Reader("log_depth", "bytes", saved(picture("L", "JPEG")), v2xsim.read_log_depth, v.wrong_depth, suffix=".jpg"),
    Reader(
        "video",
        "bytes",
        saved(_video, suffix=".mp4"),
        lambda path: list(read_video(path)),
        lambda frames: next((wrong for one in frames if (wrong := v.wrong_picture(one.rgb))), ""),
        suffix=".mp4",
    ),
]

# Tables

KINDS = {"x": "f", "n": "iu", "moving": "b", "uuid": "U"}
COLUMNS = {"x": GENERATOR.normal(size=9), "n": np.arange(9), "moving": np.arange(9) % 2 == 0,
           "uuid": [f"car-{k}" for k in range(9)]}
CARS = {"uuid": ["a", "b", "c"], "label": ["Car", "Bus", "Pedestrian"], "yaw": [.1, -2., 3.],
        "stationary": [True, False, True], "camera_used": [-1, 2, 0],
        **{f"{part}.{axis}": [1., 2.5, 3.] for part in ("position", "dimensions") for axis in "xyz"},
        "attributes.object_motion": ["Moving", float("nan"), "Parked"], "cuboids.sensor_id": [0, 1, -1],
        "cuboids.sibling_id": ["-", "a", "-"]}
CLOUD = {**{axis: GENERATOR.normal(size=20) for axis in "xyz"}, "i": GENERATOR.uniform(0, 255, 20),
         "t": 1557539956.5 + np.arange(20) * 1e-4, "d": np.arange(20) % 2}


def _plain_table(path: Path, columns: dict) -> None:
    """Without gzip."""
    write_table(path, columns)
    path.write_bytes(gzip.decompress(path.read_bytes()))


def _mat(path: Path, compressed: bool) -> None:
    from scipy.io import savemat

    savemat(path,
            {"K": [[50.0, 0, 0], [0, 50, 0], [8, 6, 1]], "r": np.eye(3), "t": [[0., 0, 1000]],
             "RDistort": [[.1, .01]], "TDistort": [[0., 0]]}, do_compression=compressed)


MAT_NAMES = {"K": True, "r": True, "t": True, "RDistort": False, "TDistort": False}
TABLES = [
    Reader(
        "feather",
        "feather",
        saved(*(lambda path, c=c: write_feather(path, COLUMNS, c) for c in (None, "lz4", "zstd"))),
        partial(read_feather, required=KINDS),
        v.wrong_table,
    ),
    Reader(
        "pickled_table",
        "pickle",
        saved(lambda p: _plain_table(p, CARS), lambda p: write_table(p, CLOUD)),
        read_table,
        v.wrong_table,
    ),
    Reader(
        "pandaset_cuboids",
        "pickle",
        saved(lambda p: _plain_table(p, CARS)),
        pandaset.read_cuboids,
        lambda cuboids: v.first(v.wrong_boxes(cuboids.boxes), v.wrong_numbers(cuboids.sensors, "sensors")),
    ),
    Reader(
        "pandaset_sweep", "pickle", saved(lambda p: _plain_table(p, CLOUD)), pandaset.read_lidar_sweep, v.wrong_sweep
    ),
    Reader(
        "mat",
        "bytes",
        saved(partial(_mat, compressed=True), partial(_mat, compressed=False)),
        partial(read_mat, names=MAT_NAMES),
        lambda found: next(
            (f"{name} holds {array.dtype}" for name, array in found.items() if array.dtype != float), ""
        ),
    ),
    Reader(
        "mat_calibration",
        "bytes",
        saved(partial(_mat, compressed=False)),
        lambda path: read_mat_calibration(path, 16, 12).camera(),
        v.wrong_camera,
    ),
]

# Scenes


def _blender(folder: Path) -> None:
    cameras = orbit_cameras(2, 3.0, 20.0, width=16, height=12)
    write_blender(folder, "train", cameras, [torch.from_numpy(PIXELS.astype(np.float32) / 255)] * 2)
    content = json.loads((folder / "transforms_train.json").read_text())
    content |= {"fl_x": 20.0, "fl_y": 21.0, "cx": 8.0, "cy": 6.0, "w": 16, "h": 12}
    write_json(folder / "transforms_train.json", content)


def _wrong_views(scene: Any) -> str:
    return v.first(*(v.wrong_camera(view.camera) or ("" if isinstance(view.name, str) else "name") for view in scene),
                   "" if len(scene) else "no view")


def _pandaset(folder: Path) -> None:
    times = [1557539956.5 + k / 10 for k in range(3)]
    poses = [{"position": {"x": float(k), "y": 2., "z": 3.}, "heading": {"w": .6, "x": 0., "y": 0., "z": .8}}
             for k in range(3)]
    for part in ("lidar", "camera/front_camera"):
        (folder / "001" / part).mkdir(parents=True)
        write_json(folder / "001" / part / "poses.json", poses)
        write_json(folder / "001" / part / "timestamps.json", times)
    write_json(folder / "001/camera/front_camera/intrinsics.json", {"fx": 20., "fy": 20., "cx": 8., "cy": 6.})
    for k in range(3):
        picture("RGB", "JPEG")(folder / f"001/camera/front_camera/{k:02d}.jpg")
        write_table(folder / f"001/lidar/{k:02d}.pkl.gz", CLOUD)
        for part in ("cuboids", "semseg"): (folder / "001/annotations" / part).mkdir(parents=True, exist_ok=True)
        write_table(folder / f"001/annotations/cuboids/{k:02d}.pkl.gz", CARS)
        write_table(folder / f"001/annotations/semseg/{k:02d}.pkl.gz", {"class": np.arange(20)})
    write_json(folder / "001/annotations/semseg/classes.json", {"1": "Smoke", "7": "Road", "13": "Car"})
    write_json(folder / "001/meta/gps.json", [{"lat": 37.7, "long": -122.4, "height": 3., "xvel": 0., "yvel": 9.}] * 3)
    write_json(folder / "001/meta/timestamps.json", times)


def _wrong_sequence(sequence: Any) -> str:
    return v.first(*(v.wrong_surround(frame) for frame in sequence if frame.cameras),
                   *(v.wrong_pose(frame.vehicle_to_world) for frame in sequence),
                   v.wrong_times([frame.time_s for frame in sequence]), "" if len(sequence) else "no frame")


def _pandaset_reader(name: str, place: str, read: Callable, check: Callable, kind: str = "json") -> Reader:
    return Reader(f"pandaset_{name}", kind, read=read, check=check, **layout(_pandaset, f"001/{place}"))


RECORD = {"true_ego_pos": [1., 2., .1, 0., 30., 0.], "ego_speed": 12.5, "lidar_pose": [1., 2., 1.9, 0., 30., 0.],
          "camera0": {"cords": [3., 2.5, 1., 0., 30., 0.], "intrinsic": [[20., 0., 8.], [0., 20., 6.], [0., 0., 1.]]},
          "vehicles": {101: {"location": [9., 2., 0.], "angle": [0., 10., 0.], "extent": [2., 1., .8],
                             "center": [0., 0., .7], "speed": 1e-05}}}
PCD = ("# .PCD v0.7\nVERSION 0.7\nFIELDS x y z rgb\nSIZE 4 4 4 4\nTYPE F F F F\nCOUNT 1 1 1 1\nWIDTH 3\nHEIGHT 1\n"
       "VIEWPOINT 0 0 0 1 0 0 0\nPOINTS 3\nDATA ascii\n1 2 3 4.2e-38\n-1 2.5 0 2.3418e-38\n0 0 1e-3 1e-40\n")


def _opv2v(folder: Path) -> None:
    home = folder / "train/town/7"
    home.mkdir(parents=True)
    (home / "000069.yaml").write_text(yaml.safe_dump(RECORD))
    (home / "000069.pcd").write_text(PCD)
    picture("RGB", "PNG")(home / "000069_camera0.png")


def _opv2v_sample(folder: Path) -> None:
    rig = {"fx": 20, "fy": 20, "cx": 8, "cy": 6, "camera0_front": {"xyz": [2., 0, 1.6], "yaw": 0.},
           "lidar": {"xyz": [0., 0, 1.9]}}
    write_json(folder / "MANIFEST.json", {"name": "sample", "calibration": rig})
    picture("RGB", "PNG")(folder / "000069_camera0.png")


def _wrong_opv2v(frames: list) -> str:
    return v.first(*(v.wrong_surround(frame) for frame in frames),
                   *(v.wrong_numbers(frame.speeds_m_s, "speeds", nan=True) for frame in frames),
                   *(v.wrong_pose(frame.lidar_to_world) for frame in frames if frame.lidar_to_world is not None))


def _v2xsim(folder: Path) -> None:
    angles = {name: 70.0 for name in v2xsim.MOUNTS_M}
    write_json(folder / "MANIFEST.json",
               {"calibration": {"fov_deg": angles, "yaw_deg_left_positive": dict.fromkeys(angles, 10.)}})
    (folder / "rgb").mkdir()
    for name in ("front", "back-left"): picture("RGB", "JPEG")(folder / "rgb" / f"{name}.jpg")


def _argoverse2(folder: Path) -> None:
    boxes = upright_boxes(torch.tensor([[5.0, 0, 1]]), torch.tensor([[4.0, 2, 2]]), torch.zeros(1),
                          ("REGULAR_VEHICLE",), ("a",))
    recorded = []
    for k in range(2):
        points = torch.from_numpy(GENERATOR.normal(size=(30, 3)).astype(np.float32))
        sweep = argoverse2.Argoverse2Sweep(10**17 + 10**8 * k, points, torch.rand(30), torch.arange(30),
                                           torch.zeros(30).double())
        pose = rigid(torch.eye(3).double(), torch.tensor([1.0 * k, 0, 0]).double())
        recorded.append(argoverse2.RecordedSweep(sweep, pose, boxes))
    mount = torch.eye(4, dtype=torch.float64)
    sensors = {"up_lidar": argoverse2.Argoverse2Sensor(mount),
               "ring_front_center": argoverse2.Argoverse2Sensor(mount, (20., 20., 8., 6.), (0., 0., 0.), (16, 12))}
    argoverse2.write_argoverse2(folder / "log", recorded, torch.zeros(30, dtype=torch.bool), sensors)


def _wrong_log(log: Any) -> str:
    return v.first(*(v.first(v.wrong_pose(frame.ego_to_city), v.wrong_boxes(frame.boxes), v.wrong_sweep(frame.sweep()))
                     for frame in log), "" if len(log) else "no sweep")


def _wrong_flow(pair: Any) -> str:
    return v.first(v.wrong_pose(pair.ego_motion), v.wrong_numbers(pair.labels.flow, "flow"),
                   v.wrong_number(pair.dt_s, "dt_s"), "" if pair.dt_s > 0 else "no time between the sweeps")


def _wrong_sensors(sensors: dict) -> str:
    for name, one in sensors.items():
        if wrong := v.first(v.wrong_pose(one.sensor_to_ego, name), v.wrong_numbers(one.intrinsics, "intrinsics")):
            return wrong
        if one.size and (min(one.size) < 1 or not min(one.intrinsics[:2]) > 0): return f"{name} has {one.size}"
    return ""


def _argoverse2_reader(name: str, place: str, read: Callable, check: Callable, kind: str = "feather") -> Reader:
    return Reader(f"argoverse2_{name}", kind, read=read, check=check, **layout(_argoverse2, f"log/{place}"))


def _log(path: Path, levels: int = 1) -> Any: return argoverse2.load_argoverse2(up(path, levels))


def _nerfstudio(folder: Path) -> None:
    """One transforms.json with everything a frame may say of its camera."""
    _blender(folder)
    content = json.loads((folder / "transforms_train.json").read_text())
    (folder / "transforms_train.json").unlink()
    content |= {"camera_model": "OPENCV", "k1": -.05, "k2": .01, "p1": .001, "aabb_scale": 4}
    for index, frame in enumerate(content["frames"]): frame |= {"k1": -.1, "time": .1 * index, "colmap_im_id": index}
    (folder / "transforms.json").write_text(json.dumps(content))


SCENES = [
    Reader(
        "transforms",
        "json",
        read=lambda path: load_blender(path.parent),
        check=_wrong_views,
        **layout(_blender, "transforms_train.json"),
    ),
    Reader(
        "nerfstudio",
        "json",
        read=lambda path: open_views("nerfstudio", path.parent),
        check=_wrong_views,
        **layout(_nerfstudio, "transforms.json"),
    ),
    _pandaset_reader("poses", "lidar/poses.json", lambda path: pandaset.load_pandaset(up(path, 2)), _wrong_sequence),
    _pandaset_reader(
        "times",
        "camera/front_camera/timestamps.json",
        lambda path: pandaset.load_pandaset(up(path, 3)),
        _wrong_sequence,
    ),
    _pandaset_reader(
        "intrinsics",
        "camera/front_camera/intrinsics.json",
        lambda path: pandaset.load_pandaset(up(path, 3)),
        _wrong_sequence,
    ),
    _pandaset_reader(
        "gps",
        "meta/gps.json",
        lambda path: pandaset.read_gps(path.parent),
        lambda gps: v.first(*(v.wrong_numbers(one, "gps") for one in gps)),
    ),
    _pandaset_reader(
        "classes",
        "annotations/semseg/classes.json",
        pandaset.read_semantic_classes,
        lambda names: (
            ""
            if all(isinstance(n, int) and 0 <= n < 10**4 and isinstance(name, str) for n, name in names.items())
            else f"{names!r:.60}"
        ),
    ),
    _pandaset_reader(
        "semseg",
        "annotations/semseg/01.pkl.gz",
        lambda path: pandaset.load_pandaset(up(path, 3)).at(1).semseg(),
        lambda classes: v.first(
            v.wrong_numbers(classes, "classes", (20,)), "" if (classes >= 0).all() else "a negative class"
        ),
        "pickle",
    ),
    Reader(
        "opv2v_yaml",
        "yaml",
        read=lambda path: [opv2v.load_opv2v(up(path, 4))[0]],
        check=_wrong_opv2v,
        **layout(_opv2v, "train/town/7/000069.yaml"),
    ),
    Reader(
        "opv2v_pcd",
        "pcd",
        read=opv2v.read_pcd,
        check=lambda found: v.first(
            v.wrong_numbers(found[0], "points", (None, 3)),
            v.wrong_numbers(found[1], "intensity", (None,)),
            "" if len(found[0]) == len(found[1]) else "two lengths",
        ),
        **layout(_opv2v, "train/town/7/000069.pcd"),
    ),
    Reader(
        "opv2v_manifest",
        "json",
        read=lambda path: [opv2v.load_opv2v(path.parent)[0]],
        check=_wrong_opv2v,
        **layout(_opv2v_sample, "MANIFEST.json"),
    ),
    Reader(
        "v2xsim_manifest",
        "json",
        read=lambda path: v2xsim.load_v2xsim(path.parent)[0],
        check=v.wrong_surround,
        **layout(_v2xsim, "MANIFEST.json"),
    ),
    _argoverse2_reader("sweep", f"sensors/lidar/{10**17}.feather", argoverse2.read_argoverse2_sweep, v.wrong_sweep),
    _argoverse2_reader("poses", "city_SE3_egovehicle.feather", _log, _wrong_log),
    _argoverse2_reader("cuboids", "annotations.feather", _log, _wrong_log),
    _argoverse2_reader(
        "mounts",
        "calibration/egovehicle_SE3_sensor.feather",
        lambda path: argoverse2.read_argoverse2_calibration(path.parent),
        _wrong_sensors,
    ),
    _argoverse2_reader(
        "lenses",
        "calibration/intrinsics.feather",
        lambda path: argoverse2.read_argoverse2_calibration(path.parent),
        _wrong_sensors,
    ),
    _argoverse2_reader(
        "labels", "flow_labels.feather", lambda path: argoverse2.load_flow_pair(_log(path)), _wrong_flow
    ),
    _argoverse2_reader("motion", "ego_motion.npz", lambda path: argoverse2.read_ego_motion(path), v.wrong_pose, "npz"),
]

# Recordings


def _colmap(folder: Path, binary: bool) -> None:
    cameras = {f"view {k}.png": camera for k, camera in enumerate(orbit_cameras(2, 3.0, width=16, height=12))}
    points = GENERATOR.normal(size=(5, 3))
    write_colmap(folder / "sparse", ColmapModel(cameras, points, np.full((5, 3), 99, np.uint8), np.full(5, .5)), binary)


def _wrong_model(model: Any) -> str:
    return v.first(*(v.wrong_camera(camera) for camera in model.cameras.values()),
                   v.wrong_numbers(model.points, "points"), v.wrong_numbers(model.errors, "errors"))


def _colmap_reader(part: str, binary: bool) -> Reader:
    ending = "bin" if binary else "txt"
    return Reader(f"colmap_{part}_{ending}", "bytes" if binary else "text", read=lambda path: read_colmap(path.parent),
                  check=_wrong_model, **layout(partial(_colmap, binary=binary), f"sparse/{part}.{ending}"))


def _dannce(folder: Path) -> None:
    entries = [{"camera": f"Camera{k}", "width": 16, "height": 12, "K": [[20., 0, 8], [0, 20, 6], [0, 0, 1]],
                "R": [[1., 0, 0], [0, 1, 0], [0, 0, 1]], "t": [0., 0, 1000 + k], "dist_k1k2p1p2": [.1, 0., 0., 0.]}
               for k in (1, 2)]
    write_json(folder / "cameras.json", {"cameras": entries, "unit_m": .001, "masks": "derived"})


def _anipose(folder: Path) -> None:
    (folder / "calibration.toml").write_text("".join(
        f'[cam_{k}]\nname = "{name}"\nsize = [16, 12]\nmatrix = [[20.0, 0.0, 8.0], [0.0, 20.0, 6.0], [0.0, 0.0, 1.0]]\n'
        f"distortions = [0.1, 0.0, 0.0, 0.0, 0.0]\nrotation = [0.1, 0.2, {k}.0]\ntranslation = [1.0, 2.0, 900.0]\n\n"
        for k, name in enumerate("AB")) + "[metadata]\nadjusted = true\n")


def _par(path: Path) -> None:
    path.write_text("2\n" + "".join(f"dino{k}.png 20 0 8 0 20 6 0 0 1 1 0 0 0 1 0 0 0 1 0 0 {k}.5\n" for k in (1, 2)))


RECORDINGS = [
    *(_colmap_reader(part, binary) for binary in (False, True) for part in ("cameras", "images", "points3D")),
    Reader("dannce_json", "json", read=lambda path: read_recording(path.parent, "dannce"), check=v.wrong_recording,
           **layout(_dannce, "cameras.json")),
    Reader("anipose_toml", "text", read=lambda path: read_anipose(path.parent), check=v.wrong_recording,
           **layout(_anipose, "calibration.toml")),
    Reader("middlebury_par", "text", saved(_par), read_par,
           lambda views: "" if all(part.dtype == float for view in views.values() for part in view) else "numbers"),
]
_CHECKED = ("dannce_json", "anipose_toml")


def _cameras_first(reader: Reader) -> Reader:
    """The reader with its cameras made, as every user of a recording does: a calibration is unchecked until then."""
    def read(path: Path) -> Any:
        recording = reader.read(path)
        assert recording.cameras
        return recording
    return Reader(**vars(reader) | {"read": read})


RECORDINGS = [_cameras_first(one) if one.name in _CHECKED else one for one in RECORDINGS]

# Gaussians, frames, tiles


def _gaussians(count: int = 5, terms: int = 4) -> Gaussians:
    draw = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=draw)
    return Gaussians(normal(count, 3), normal(count, 4), normal(count, 3) - 3, normal(count), normal(count, terms, 3))


FRAME = RenderedFrame("test/r_0", torch.rand(6, 8, 3, generator=torch.Generator().manual_seed(1)) * .5,
                      torch.full((6, 8), .6), torch.full((6, 8), 2.5), identity="0" * 16, seconds=.25,
                      samples_per_ray=12.5)


def _straight(path: Path) -> None:
    np.savez(buffer := io.BytesIO(), rgb_straight=FRAME.rgb_premultiplied.numpy(), alpha=FRAME.alpha.numpy(),
             alpha_convention="straight", colour_space="srgb")
    path.write_bytes(buffer.getvalue())


def _frames(folder: Path) -> None:
    source = {"kind": "gaussians", "name": "a.ply", "sha256": "0" * 64, "weights": "raw"}
    entries = {f"test/r_{k}": {"index": k, "file": f"test_r_{k}.npz", "camera": "0" * 16} for k in range(3)}
    write_frames(FrameFolder(folder, source, 8, 6, "float16", "premultiplied", "srgb", entries))


def _wrong_folder(frames: FrameFolder) -> str:
    if wrong := v.wrong_names(entry["file"] for entry in frames.frames.values()): return wrong
    if not all(type(side) is int and 0 < side < 2**31 for side in (frames.width, frames.height)): return "a size"
    texts = [*frames.frames, *frames.source.values(), *(entry["camera"] for entry in frames.frames.values())]
    if not all(isinstance(text, str) for text in texts): return "a name that is no text"
    return "" if isinstance(frames.cameras, str) and frames.missing() == list(frames.frames) else "missing frames"


def _comparisons(folder: Path) -> None:
    for k in range(2):
        save_comparison(folder, f"view {k}", {"target": PIXELS[..., :3], "student": PIXELS[..., 1:]}, 20. + k, "psnr")


def _wrong_comparisons(found: list) -> str:
    return v.first(*("" if isinstance(one.score, float)
                     and v.wrong_names(path.name for path in one.images.values()) == "" else f"{one!r:.80}"
                     for one in found))


def _tile(path: Path) -> None:
    write_panorama_tile(path, Tile(PIXELS[..., :3], np.full((12, 16), 3.5, np.float32), PIXELS[..., 0] % 6,
                                   np.ones((12, 16), bool), np.array(POSE)))


IMAGES = [Reader("ply", "ply", saved(*(lambda path, k=k: write_ply(path, _gaussians(3, k)) for k in (1, 4, 16))),
                 read_ply, v.wrong_gaussians),
          Reader("frame_npz", "npz",
                 saved(lambda path: write_frame(path, FRAME), lambda path: write_frame(path, FRAME, "float32"),
                       _straight), read_frame, v.wrong_frame, suffix=".npz"),
          Reader("frames_json", "json", read=lambda path: read_frames(path.parent), check=_wrong_folder,
                 **layout(_frames, "frames.json")),
          Reader("comparisons", "json", read=lambda path: read_comparisons(up(path, 2)), check=_wrong_comparisons,
                 **layout(_comparisons, "pictures/pictures.json")),
          Reader("tile_npz", "npz", saved(_tile, suffix=".npz"), read_panorama_tile, v.wrong_tile, suffix=".npz",
                 tolerant=True)]

READERS: list[Reader] = [*PICTURES, *TABLES, *SCENES, *RECORDINGS, *IMAGES]
