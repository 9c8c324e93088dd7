"""Readers of surround data: numpy values in yaml, .pcd in its three layouts, point files, nuScenes' tables, a rig's
YAML."""
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from kilonb.core.documents import parse_yaml, read_bytes
from kilonb.core.files import write_json
from kilonb.core.yaml_arrays import NUMPY_TAGS
from kilonb.scenes.nuscenes import load_nuscenes
from kilonb.scenes.opv2v import read_pcd
from kilonb.scenes.pcd import read_point_file
from kilonb.scenes.rig import load_rig
from tests.fuzz import validators as v
from tests.fuzz.engine import Reader
from tests.fuzz.readers_data import layout, saved

CLOUD = np.random.default_rng(0).normal(size=(6, 5)).astype("<f4")
CLOUD[:, 3:] = np.abs(CLOUD[:, 3:])                                      # intensity and ring
RECORD = {"speed": np.float64(3.5), "pose": np.eye(4), "count": np.int32(3), "name": np.str_("a"), "on": np.bool_(True)}


def _plain(value: Any) -> str:
    """Only plain values, of bounded number."""
    if isinstance(value, dict): return v.first(*map(_plain, value.values()))
    if isinstance(value, list): return v.first(*map(_plain, value))
    return "" if value is None or isinstance(value, (str, bytes, int, float, bool)) or "date" in str(type(value)) else (
        f"a {type(value).__name__}")


def _pcd(kind: str, fields: str = "x y z intensity ring") -> Callable[[Path], None]:
    """Writes a .pcd."""
    head = (f"VERSION .7\nFIELDS {fields}\nSIZE 4 4 4 4 4\nTYPE F F F F F\nCOUNT 1 1 1 1 1\nWIDTH 6\nHEIGHT 1\n"
            f"POINTS 6\nDATA {kind}\n").encode()
    raw = CLOUD.T.tobytes()
    packed = b"".join(bytes([len(part) - 1]) + part for k in range(0, len(raw), 32) for part in [raw[k:k + 32]])
    body = CLOUD.tobytes() if kind == "binary" else np.array([len(packed), len(raw)], "<u4").tobytes() + packed
    return lambda path: path.write_bytes(head + body)


def _wrong_cloud(found: Any) -> str:
    return v.first(v.wrong_numbers(found[0], "points", (None, 3)), v.wrong_numbers(found[1], "intensity", (None,)))


def _nuscenes(folder: Path) -> None:
    still, tokens = {"translation": [1.0, 2, 0], "rotation": [1.0, 0, 0, 0]}, ("CAM_FRONT", "CAM_BACK", "LIDAR_TOP")
    data = [{"token": name, "sample_token": "k", "ego_pose_token": "e", "is_key_frame": True,
             "calibrated_sensor_token": name, "filename": f"samples/{name}.{'jpg' if 'CAM' in name else 'bin'}"}
            for name in tokens]
    camera, box = [[20, 0, 8], [0, 20, 6], [0, 0, 1]], {"size": [2, 4, 1.5], "instance_token": "i", **still}
    tables = {"scene": [{"token": "s", "name": "scene-1"}],
              "sample": [{"token": "k", "timestamp": 1, "scene_token": "s"}],
              "sensor": [{"token": n, "channel": n, "modality": "camera" if "CAM" in n else "lidar"} for n in tokens],
              "calibrated_sensor": [{"token": n, "sensor_token": n, "camera_intrinsic": camera, **still}
                                    for n in tokens],
              "ego_pose": [{"token": "e", **still}], "sample_data": data,
              "sample_annotation": [{"token": "a", "sample_token": "k", **box}],
              "instance": [{"token": "i", "category_token": "c"}], "category": [{"token": "c", "name": "car"}]}
    for name, rows in tables.items(): write_json(folder / "v1.0" / f"{name}.json", rows)
    (folder / "samples").mkdir()
    for name in tokens[:2]: Image.new("RGB", (16, 12)).save(folder / f"samples/{name}.jpg")
    CLOUD[:, :4].tofile(folder / "samples/LIDAR_TOP.bin")


def _rig(folder: Path) -> None:
    cameras = {name: {"pictures": f"{name}_*.png", "fov_deg": 90, "position": [x, 0, 1.5], "yaw_deg": yaw}
               for name, x, yaw in (("front", 1.0, 0), ("back", -1.0, 180))}
    cameras["front"] |= {"distortion": {"k1": -.1}, "quaternion_wxyz": [.5, -.5, .5, -.5]}
    for name in cameras:
        for k in range(2): Image.new("RGB", (16, 12)).save(folder / f"{name}_{k}.png")
    CLOUD[:, :4].tofile(folder / "cloud_0.bin")
    content = {"axes": "opencv", "origin_height_m": 0.2, "cameras": cameras, "vehicle_poses": [np.eye(4).tolist()] * 2,
               "lidar": {"points": "cloud_*.bin", "columns": 4}}
    (folder / "rig.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def _wrong_scene(scene: Any) -> str:
    return v.first(*(v.wrong_surround(frame) for frame in scene), "" if len(scene) else "no frame")


def _read_scene(load: Callable, levels: int, path: Path) -> Any:
    """The scene, with its pictures and points read once."""
    scene = load(path if not levels else path.parents[levels - 1])
    for frame in scene: frame.views(), frame.lidar_points()
    return scene


READERS: list[Reader] = [
    Reader("yaml_numpy", "yaml", saved(lambda path: path.write_text(yaml.dump(RECORD))),
           lambda path: parse_yaml(read_bytes(path), path.name, builders=NUMPY_TAGS), _plain),
    *(Reader(f"pcd_{kind}", "bytes", saved(_pcd(kind)), read_pcd, _wrong_cloud, suffix=".pcd")
      for kind in ("binary", "binary_compressed")),
    Reader("points_bin", "bytes", saved(lambda path: path.write_bytes(CLOUD.tobytes()), suffix=".pcd.bin"),
           read_point_file, lambda found: v.wrong_numbers(found, "points", (None, 3)), suffix=".pcd.bin"),
    *(Reader(f"nuscenes_{name}", "json", read=partial(_read_scene, load_nuscenes, 2), check=_wrong_scene,
             **layout(_nuscenes, f"v1.0/{name}.json"))
      for name in ("scene", "sample", "sample_data", "calibrated_sensor", "ego_pose", "sensor", "sample_annotation")),
    Reader("rig_yaml", "yaml", read=partial(_read_scene, load_rig, 0), check=_wrong_scene, **layout(_rig, "rig.yaml")),
]
