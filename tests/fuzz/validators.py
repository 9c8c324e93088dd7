"""What is a silent wrong load, said for each type of value: `wrong_TYPE(value)` is empty for a sane one.

Written from what a user would call wrong, and without the readers' own checks: a number that is NaN or infinite or over
1e30, a focal length or size that is not above 0, a pose that is no rotation and translation, an unknown or missing
name.
"""
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

LARGEST = 1.0001e30


def wrong_number(value: Any, what: str = "a number") -> str:
    """Plain numbers only: no bool, no text; finite, at most 1e30."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        return f"{what} is {value!r:.60}"
    return "" if math.isfinite(value) and abs(value) <= LARGEST else f"{what} is {value!r:.60}"


def wrong_numbers(values: Any, what: str, shape: tuple = (), nan: bool = False, infinite: bool = False) -> str:
    """An array or tensor: finite unless allowed, at most 1e30; shape: None for any length, () for any shape."""
    array = values.detach().cpu().double().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if array.dtype.kind not in "iufb": return f"{what} holds {array.dtype}"
    if shape and (array.ndim != len(shape) or any(b not in (None, a) for a, b in zip(array.shape, shape))):
        return f"{what} has the shape {array.shape}, not {shape}"
    array = array.astype(float)
    if not nan and np.isnan(array).any(): return f"{what} holds NaN"
    if not infinite and np.isinf(array).any(): return f"{what} holds infinity"
    return f"{what} holds a number over 1e30" if (np.abs(array[np.isfinite(array)]) > LARGEST).any() else ""


def first(*wrongs: str) -> str:
    """The first that is not empty."""
    return next((one for one in wrongs if one), "")


def wrong_pose(pose: Any, what: str = "the pose") -> str:
    """[..., 4, 4]: finite, a rotation, no mirror, last row 0 0 0 1."""
    if wrong := wrong_numbers(pose, what): return wrong
    matrix = pose.detach().cpu().double().numpy() if isinstance(pose, torch.Tensor) else np.asarray(pose, float)
    if matrix.shape[-2:] != (4, 4): return f"{what} has the shape {matrix.shape}"
    turn = matrix[..., :3, :3]
    if np.abs(turn @ np.swapaxes(turn, -1, -2) - np.eye(3)).max(initial=0) > 2e-3: return f"{what} is no rotation"
    if (np.linalg.det(turn) < 0).any(): return f"{what} mirrors space"
    return f"{what} ends in another row" if np.abs(matrix[..., 3, :] - [0, 0, 0, 1]).max(initial=0) > 2e-3 else ""


def wrong_camera(camera: Any) -> str:
    """A camera of `geometry.cameras`."""
    for side in ("width", "height"):
        value = getattr(camera, side)
        if type(value) is not int or not 0 < value < 2**31: return f"{side} is {value!r:.60}"
    for name in ("fx", "fy", "cx", "cy"):
        if hasattr(camera, name) and (wrong := wrong_number(float(getattr(camera, name)), name)): return wrong
        if name[0] == "f" and hasattr(camera, name) and not getattr(camera, name) > 0:
            return f"{name} is {getattr(camera, name)}"
    return first(wrong_numbers(getattr(camera, "distortion", ()), "distortion") if hasattr(camera, "distortion")
                 else "", wrong_pose(camera.camera_to_world))


def wrong_boxes(boxes: Any) -> str:
    """Boxes: finite poses, sizes above 0, one label and identity each."""
    if not len(boxes): return ""
    if len(boxes.labels) != len(boxes) or len(boxes.identities) != len(boxes): return "labels or identities are missing"
    return first(wrong_numbers(boxes.sizes, "sizes"), "" if (boxes.sizes > 0).all() else "a size that is not above 0",
                 wrong_pose(boxes.box_to_world, "a box"))


def wrong_gaussians(gaussians: Any) -> str:
    """Gaussians: finite, scales of a size, a rotation each, spherical harmonics of degree 0 to 3."""
    tensors = gaussians.parameters()
    for name, tensor in tensors.items():
        if wrong := wrong_numbers(tensor, name): return wrong
        if len(tensor) != len(gaussians): return f"{name} has {len(tensor)} rows of {len(gaussians)}"
    if not torch.isfinite(gaussians.log_scales.double().exp()).all(): return "an infinite scale"
    if len(gaussians) and (gaussians.quats.double().norm(dim=1) < 1e-13).any(): return "a zero quaternion"
    return "" if "sh" not in tensors or tensors["sh"].shape[1] in (1, 4, 9, 16) else "sh of another degree"


def wrong_times(times: Any) -> str:
    """Time stamps: finite and increasing."""
    array = np.asarray(times, float)
    return first(wrong_numbers(array, "times", (None,)), "" if (np.diff(array) > 0).all() else "times do not increase")


def wrong_sweep(sweep: Any) -> str:
    """Any named tuple of point tensors of one length."""
    parts = {name: part for name, part in sweep._asdict().items() if isinstance(part, torch.Tensor)}
    if len({len(part) for part in parts.values()}) > 1: return "parts of different lengths"
    return first(*(wrong_numbers(part, name) for name, part in parts.items()))


def wrong_picture(picture: Any) -> str:
    """Pixels: [H, W] or [H, W, 3 or 4], uint8 or 0..1."""
    array = picture.numpy() if isinstance(picture, torch.Tensor) else np.asarray(picture)
    if array.ndim not in (2, 3) or not array.size or (array.ndim == 3 and array.shape[2] not in (2, 3, 4)):
        return f"a picture of shape {array.shape}"
    if max(array.shape) > 8192: return f"a picture of shape {array.shape}"
    if array.dtype.kind == "f" and not ((array >= 0) & (array <= 1.0001)).all(): return "a pixel outside 0 to 1"
    return ""


def wrong_depth(depth: Any) -> str:
    """[H, W] metres, 0 unknown, infinite: no surface; NaN is kept by the reader."""
    return first(wrong_numbers(depth, "depth", (None, None), nan=True, infinite=True),
                 "a negative depth" if (depth < 0).any() else "")


def wrong_frame(frame: Any) -> str:
    """A rendered frame: premultiplied colours, alpha in 0..1, depth of at least 0."""
    size = tuple(frame.alpha.shape)
    if len(size) != 2 or not all(size): return f"alpha has the shape {size}"
    wrong = first(wrong_numbers(frame.alpha, "alpha"), wrong_numbers(frame.rgb_premultiplied, "colours", (*size, 3)))
    if wrong: return wrong
    if not ((frame.alpha >= -.02) & (frame.alpha <= 1.02)).all(): return "alpha outside 0 to 1"
    if frame.expected_depth is not None and (wrong := wrong_numbers(frame.expected_depth, "depth", size)): return wrong
    if frame.expected_depth is not None and (frame.expected_depth < 0).any(): return "a negative depth"
    numbers = [("seconds", frame.seconds),
               *([("samples", frame.samples_per_ray)] if frame.samples_per_ray is not None else [])]
    return first(
        *(wrong_number(value, name) or ("" if value >= 0 else f"{name} is {value}") for name, value in numbers),
        "" if isinstance(frame.name, str) and isinstance(frame.identity, str) else "a name that is no text",
    )


def wrong_tile(tile: Any) -> str:
    """A panorama tile, or None where the file was refused."""
    if tile is None: return ""
    size = tile.coverage.shape
    if len(size) != 2 or tile.rgb.shape != (*size, 3) or tile.rgb.dtype != np.uint8:
        return f"rgb of shape {tile.rgb.shape}"
    if tile.classes.shape != size or tile.classes.max(initial=0) > 5: return "classes"
    if (tile.range_m < 0).any(): return "a negative range"
    return first(wrong_numbers(tile.range_m, "range_m", size), wrong_pose(tile.camera_to_world))


def wrong_episode(episode: Any) -> str:
    """An episode of Pin Pad: arrays of one length, pictures of bytes, finite rewards, actions of at least 0."""
    count = len(episode.actions)
    if episode.images.dtype != np.uint8 or episode.images.ndim != 4 or len(episode.images) != count: return "images"
    for name in ("rewards", "is_first", "is_last", "is_terminal", "positions", "sequences"):
        if len(getattr(episode, name)) != count: return f"{name} has another length"
    if (episode.actions < 0).any(): return "a negative action"
    return first(wrong_numbers(episode.rewards, "rewards"), wrong_numbers(episode.positions, "positions", (None, 2)),
                 *("" if len(one) == count and one.dtype == bool else f"event {name}" for name,
                   one in episode.events.items()))


def wrong_tensors(tensors: Mapping[str, Any]) -> str:
    """Tensors by name, such as a state dict."""
    return first(*(wrong_numbers(tensor, name) for name, tensor in tensors.items()))


def wrong_module(module: torch.nn.Module) -> str:
    """A model: finite weights, finite settings."""
    config = vars(module.config) if hasattr(module, "config") else {}
    return first(wrong_tensors(module.state_dict()), *(wrong_number(value, name) for name, value in config.items()
                                                       if isinstance(value, float)))


def wrong_table(table: Mapping[str, np.ndarray]) -> str:
    """Columns of one length whose entries are numbers, bools or texts."""
    if len({len(column) for column in table.values()}) > 1: return "columns of different lengths"
    for name, column in table.items():
        if not isinstance(name, str) or column.ndim != 1: return f"the column {name!r:.40} has the shape {column.shape}"
    return ""


def wrong_calibration(one: Any) -> str:
    """A calibration whose camera was made."""
    return wrong_camera(one.camera())


def wrong_recording(recording: Any) -> str:
    """A multi-camera recording: usable cameras, a unit above 0, keypoints that are finite or NaN."""
    for camera in recording.cameras.values():
        if wrong := wrong_camera(camera): return wrong
    if wrong := wrong_number(recording.unit_m, "unit_m"): return wrong
    if not recording.unit_m > 0: return f"unit_m is {recording.unit_m}"
    if recording.fps is not None and not 0 < recording.fps < 1e6: return f"fps is {recording.fps}"
    points = recording.keypoints
    return "" if points is None else wrong_numbers(points.points, "keypoints", nan=True)


def wrong_surround(frame: Any) -> str:
    """A surround frame: cameras, the vehicle's pose, boxes, paths that stay in their folder."""
    if not frame.cameras: return "no camera"
    return first(*(wrong_camera(camera) for camera in frame.cameras.values()), wrong_pose(frame.vehicle_to_world),
                 wrong_boxes(frame.boxes))


def wrong_names(names: Any) -> str:
    """Texts that name files in one folder."""
    bad = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    return f"the name {bad[0]!r:.60}" if bad else ""
