"""Surround data: conversion of axes, damaged files by frame and number, cooperative samples in one world frame."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from scipy.spatial.transform import Rotation

from kilonb.coop.dataset import (
    CooperativeDataset,
    SampleOptions,
    choose_groups,
    collate,
    column_rotations,
    dataset_statistics,
    roll_randomly,
    roll_sample,
)
from kilonb.panoramas.stitch import Panorama
from kilonb.panoramas.tiles import (
    FAR,
    HIDDEN,
    OWN_BODY,
    SCENE,
    PanoramaOptions,
    constant_mask_iou,
    read_panorama_tile,
    rig_coverage,
)
from kilonb.geometry.boxes import Boxes, convex_hull, outline, upright_boxes
from kilonb.geometry.cameras import camera_from_angle
from kilonb.geometry.panoramas import CylindricalCamera, EquirectangularCamera
from kilonb.geometry.transforms import (carla_pose_to_matrix, check_rigid, forward_to_opencv, left_to_right_handed,
                                        mirror_y, opencv_to_forward, rigid_inverse, transform_points)
from kilonb.core.errors import KiloError
from kilonb.data.manifests import load_manifests
from kilonb.data.registry import find_reader
from kilonb.data.references import resolve_data
from kilonb.core.pickles import list_globals
from kilonb.data.tables import read_table, write_table
from kilonb.scenes.opv2v import CAMERAS, check_extrinsic, load_opv2v, read_pcd, read_record
from kilonb.scenes.pandaset import load_pandaset, load_surround_frames
from kilonb.scenes.surround import image_size, load_surround, panorama_pose, read_z_depth
from kilonb.scenes.v2xsim import MOUNTS_M, load_v2xsim

REAL = os.environ.get("KILONB_DATA")


def real(name: str) -> Path:
    """The folder of a real data set; the test is skipped, with the reason, where it is not there."""
    if not REAL: pytest.skip("KILONB_DATA is not set: it names the folder of the real data")
    if not (Path(REAL) / name).is_dir(): pytest.skip(f"KILONB_DATA has no {name}")
    return Path(REAL) / name


def random_poses(count: int, seed: int = 0) -> list[list[float]]:
    spread = torch.tensor([300.0, 300, 5, 20, 180, 20], dtype=torch.float64)
    return ((torch.rand(count, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1)
            * spread).tolist()


def as_pose(transform: torch.Tensor) -> list[float]:
    """[x, y, z, roll, yaw, pitch] of an upright pose in CARLA's axes."""
    return [*transform[:3, 3].tolist(), 0.0, math.degrees(math.atan2(transform[1, 0], transform[0, 0])), 0.0]


# ---------------------------------------------------------------------------------------------------------------- axes

@pytest.mark.parametrize("pose", random_poses(20))
def test_carla_poses_are_the_rotations_that_an_independent_library_makes(pose):
    roll, yaw, pitch = pose[3:]
    expected = Rotation.from_euler("ZYX", [yaw, -pitch, -roll], degrees=True).as_matrix()
    torch.testing.assert_close(carla_pose_to_matrix(*pose)[:3, :3], torch.from_numpy(expected))


@pytest.mark.parametrize("pose", random_poses(20, 1))
def test_right_handed_poses_are_rigid_and_what_is_right_in_carla_is_right_in_the_picture(pose):
    left = carla_pose_to_matrix(*pose)
    right = left_to_right_handed(left)
    check_rigid(right, "pose", 1e-9), check_rigid(forward_to_opencv(right), "camera", 1e-9)
    assert torch.linalg.det(right[:3, :3]) > 0
    points = torch.rand(50, 3, generator=torch.Generator().manual_seed(2),
                        dtype=torch.float64) * torch.tensor([30.0, 20, 10]) + torch.tensor([1.0, -10, -5])
    seen = camera_from_angle(forward_to_opencv(right), 800, 600,
                             math.radians(100)).project(mirror_y(transform_points(left, points)))[0]
    assert torch.equal(seen[:, 0] > 400, points[:, 1] > 0), "y to the right in CARLA is u to the right"
    assert torch.equal(seen[:, 1] < 300, points[:, 2] > 0), "z up in CARLA is v upwards"


def test_conversion_to_right_handed_axes_keeps_relative_motion():
    a, b = (carla_pose_to_matrix(*pose) for pose in random_poses(2, 3))
    between = rigid_inverse(left_to_right_handed(a)) @ left_to_right_handed(b)
    torch.testing.assert_close(between, left_to_right_handed(rigid_inverse(a) @ b), atol=1e-9, rtol=0)
    torch.testing.assert_close(opencv_to_forward(forward_to_opencv(between)), between)


# --------------------------------------------------------------------------------------------------------------- boxes

def test_a_box_holds_the_same_points_wherever_the_world_is_moved():
    boxes = upright_boxes(torch.tensor([[3.0, 1, 1], [3, 1, 1]]), torch.tensor([[4.0, 2, 2], [1, 1, 1]]),
                          torch.tensor([.4, 0]))
    points = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0)).double() * 2 + torch.tensor([3.0, 1, 1])
    move = left_to_right_handed(carla_pose_to_matrix(*random_poses(1, 4)[0]))
    assert torch.equal(boxes.contains(points), boxes.moved(move).contains(transform_points(move, points), 1e-9))
    owners = boxes.owner(points)
    assert (owners[boxes.contains(points)[1]] == 1).all(), "the smaller of two boxes owns a point of both"
    assert torch.equal(owners == -1, ~boxes.contains(points).any(0))


def test_the_outline_of_a_box_that_reaches_behind_the_camera_is_cut_there_and_nowhere_else():
    camera = camera_from_angle(torch.eye(4), 100, 100, math.radians(90))
    pose = torch.eye(4, dtype=torch.float64)[None]
    pose[0, 1, 3] = 2
    along = Boxes(pose, torch.tensor([[1.0, 1, 40]], dtype=torch.float64))
    hull = outline(along, camera, near_m=.1)[0]
    assert hull.isfinite().all() and hull[:, 1].min() > 50, (
        "it lies below the camera, before and behind it: nothing of it is above the horizon"
    )
    assert len(convex_hull(torch.tensor([[0.0, 0], [2, 0], [1, 0], [2, 2], [0, 2], [1, 1]]))) == 4


# -------------------------------------------------------------------------------------------------------------- tables

def test_a_written_table_uses_the_globals_of_pandasets_files(tmp_path):
    folder = real("pandaset") / "002"
    for part in ("lidar", "annotations/cuboids", "annotations/semseg"):
        path = folder / part / "40.pkl.gz"
        table = read_table(path)
        write_table(tmp_path / "copy.pkl.gz", table)
        back = read_table(tmp_path / "copy.pkl.gz")
        assert list_globals((tmp_path / "copy.pkl.gz").read_bytes()) == list_globals(path.read_bytes()) and list(
            back
        ) == list(table)
        for name, values in table.items():
            assert back[name].dtype == values.dtype and all(a == b or (a != a and b != b) for a,
                                                            b in zip(back[name].tolist(), values.tolist()))


def test_a_table_with_other_globals_is_not_opened(tmp_path):
    import pickle
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps({"x": os.system}))
    with pytest.raises(KiloError, match="is not allowed"): read_table(tmp_path / "bad.pkl")


# ------------------------------------------------------------------------------- a small world in the layout of OPV2V

MOUNTS = {"camera0": [2.5, 0, 1, 0, 0, 0], "camera1": [0, .3, 1.8, 0, 100, 0], "camera2": [0, -.3, 1.8, 0, -100, 0],
          "camera3": [-2, 0, 1.5, 0, 180, 0]}
CLOUD = torch.tensor([[12.0, 3, 1], [12, 3, 2], [6, -5, .5]], dtype=torch.float64)          # CARLA's world


def block(x: float, y: float, length: float, width: float, height: float) -> Boxes:
    return upright_boxes(torch.tensor([[x, y, height / 2]]), torch.tensor([[length, width, height]]), torch.zeros(1))


def cast(origin, directions, boxes) -> tuple[torch.Tensor, torch.Tensor]:
    """(range [N], grey [N]) of rays that meet the road z = 0 or a box; infinite and white for the sky."""
    ranges = (-origin[2] / directions[:, 2]).where(directions[:, 2] < 0, torch.tensor(torch.inf).double())
    at = origin + directions * ranges.nan_to_num(posinf=0)[:, None]
    grey = torch.where(ranges.isinf(), 1.0, .3 + .2 * ((at[:, 0] / 3).floor() + (at[:, 1] / 3).floor()).remainder(2))
    for box in boxes:
        local, way = transform_points(rigid_inverse(box.box_to_world[0]),
                                      origin[None])[0], directions @ box.box_to_world[0, :3, :3]
        way = torch.where(way.abs() < 1e-9, 1e-9, way)
        a, b = (-box.sizes[0] / 2 - local) / way, (box.sizes[0] / 2 - local) / way
        enter, leave = torch.minimum(a, b).amax(-1), torch.maximum(a, b).amin(-1)
        hit = (enter < leave) & (enter > 0) & (enter < ranges)
        ranges, grey = torch.where(hit, enter, ranges), torch.where(hit, .7, grey)
    return ranges, grey


def write_pcd(path: Path, points: torch.Tensor) -> None:
    colours = np.full(len(points), 51 << 16, np.uint32).view(np.float32)
    head = ("VERSION 0.7\nFIELDS x y z rgb\nSIZE 4 4 4 4\nTYPE F F F F\nCOUNT 1 1 1 1\n"
            f"WIDTH {len(points)}\nHEIGHT 1\nPOINTS {len(points)}\nDATA ascii\n")
    path.write_text(head
                    + "\n".join(f"{x:.9g} {y:.9g} {z:.9g} {c:.10g}" for (x, y, z), c in zip(points.tolist(), colours))
                    + "\n")


def write_vehicle(folder: Path, key: str, egos: dict, frame: str, solids: list[Boxes], width: int = 64,
                  height: int = 48, depth: str = "png") -> None:
    """One vehicle's frame in the real layout: yaml, pcd, four pictures and depth beside."""
    (folder / key).mkdir(parents=True, exist_ok=True)
    ego, focal = egos[key], .5 * width / math.tan(math.radians(50))
    world, lidar = carla_pose_to_matrix(*ego), carla_pose_to_matrix(*ego) @ carla_pose_to_matrix(-.5, 0, 1.9, 0, 0, 0)
    listed = {int(other): {"location": pose[:3], "angle": pose[3:], "center": [0, 0, .75], "extent": [2.3, 1, .75],
                           "speed": 36.0} for other, pose in egos.items() if other != key}
    record = {"true_ego_pos": ego, "predicted_ego_pos": ego, "lidar_pose": as_pose(lidar), "ego_speed": 18.0,
              "vehicles": listed}
    v, u = torch.meshgrid(torch.arange(height) + .5, torch.arange(width) + .5, indexing="ij")
    local = torch.nn.functional.normalize(torch.stack([(u - width / 2) / focal, (v - height / 2) / focal,
                                                       torch.ones_like(u)], -1).double(), dim=-1)
    for name, mount in MOUNTS.items():
        pose = world @ carla_pose_to_matrix(*mount)
        record[name] = {"cords": as_pose(pose), "intrinsic": [[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]],
                        "extrinsic": (torch.linalg.inv(pose) @ lidar).tolist()}
        camera = forward_to_opencv(left_to_right_handed(pose))
        ranges, grey = cast(camera[:3, 3], local.reshape(-1, 3) @ camera[:3, :3].mT, solids)
        z = (ranges * local.reshape(-1, 3)[:, 2]).reshape(height, width)
        Image.fromarray((grey.reshape(height, width, 1).expand(-1, -1, 3) * 255).round().byte().numpy()).save(
            folder / key / f"{frame}_{name}.png"
        )
        beside = folder / key / f"{frame}_depth{name[-1]}"
        if depth == "png":
            Image.fromarray(torch.where(z < 655, z * 100,
                                        65535).round().to(torch.int32).numpy().astype(np.uint16)).save(f"{beside}.png")
        if depth == "npy": np.save(f"{beside}.npy", z.float().numpy())
        if depth == "npz": np.savez(f"{beside}.npz", z_depth=z.float().numpy())
    (folder / key / f"{frame}.yaml").write_text(yaml.safe_dump(record))
    write_pcd(folder / key / f"{frame}.pcd", transform_points(torch.linalg.inv(lidar), CLOUD))


EGOS = {"7": [0.0, 0, 0, 0, 0, 0], "9": [18.0, 2, 0, 0, 170, 0], "12": [34.0, -2, 0, 0, -20, 0],
        "30": [90.0, 0, 0, 0, 0, 0]}


def solids_of(egos: dict, key: str, houses: list[Boxes]) -> list[Boxes]:
    bodies = {other: left_to_right_handed(carla_pose_to_matrix(*pose)) for other, pose in egos.items() if other != key}
    return houses + [upright_boxes(torch.tensor([[0, 0, .75]]), torch.tensor([[4.6, 2, 1.5]]),
                                   torch.zeros(1)).moved(body) for body in bodies.values()]


def write_town(folder: Path, egos: dict = EGOS, frames: tuple[str, ...] = ("000069",),
               houses: list[list[Boxes]] | None = None, **options) -> None:
    for number, frame in enumerate(frames):
        there = houses[number] if houses else [block(20, 12, 18, 6, 9), block(8, -11, 8, 6, 5),
                                               block(14, 4.2, 2, .6, 1.8)]
        for key in egos: write_vehicle(folder, key, egos, frame, solids_of(egos, key, there), **options)


@pytest.fixture(scope="module")
def town(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("surround") / "opv2v"
    write_town(folder / "train" / "town_a")
    write_town(folder / "test" / "town_b", {key: EGOS[key] for key in ("7", "9")}, houses=[[block(5, 9, 6, 6, 12)]])
    return folder


@pytest.fixture
def copy(town, tmp_path) -> Path:
    """A copy of a scenario that a test may damage."""
    return Path(shutil.copytree(town / "train" / "town_a", tmp_path / "town"))


# --------------------------------------------------------------------------------------------------------------- OPV2V

def test_a_dataset_a_split_and_a_scenario_open_by_the_same_call(town):
    assert len(load_opv2v(town)) == 6 and load_opv2v(town).splits == ("test",
                                                                      "train") and len(load_opv2v(town, "train")) == 4
    assert [entry.name for entry in load_opv2v(town / "test").entries] == [
        "test/town_b/7/000069",
        "test/town_b/9/000069",
    ]
    assert load_opv2v(town / "train" / "town_a").entries[0].name == "town_a/12/000069"
    with pytest.raises(KiloError, match="did you mean 'train'"): load_opv2v(town, "trian")
    with pytest.raises(KiloError, match="scenario"): load_opv2v(town).subset(scenarios=["town_c"])


def test_every_vehicle_of_an_instant_sees_the_same_points_in_one_right_handed_world(town):
    scene = load_opv2v(town, "train")
    frames = scene.frames_at(scene.instants()[0])
    for frame in frames.values(): torch.testing.assert_close(frame.lidar_points(), mirror_y(CLOUD), atol=1e-5, rtol=0)
    assert (
        scene.problems == []
        and frames["7"].speed_m_s == pytest.approx(5)
        and frames["7"].speeds_m_s.tolist() == pytest.approx([10] * 3)
    )


def test_depth_lidar_and_boxes_agree_in_every_camera(town):
    """Unprojected depth falls on the road or on boxes that the yaml lists; a mirrored axis or a wrong extrinsic moves
    it by metres."""
    scene = load_opv2v(town, "train")
    for frame in scene.frames_at(scene.instants()[0]).values():
        for view in frame.views():
            z = view.z_depth.reshape(-1)
            points = view.camera.unproject(view.camera.pixel_centres(), z)[(z > 0) & (z < 60)].double()
            houses = [block(20, 12, 18, 6, 9), block(8, -11, 8, 6, 5), block(14, 4.2, 2, .6, 1.8)]
            on = points[:, 2].abs() < .1
            for box in (*houses, frame.boxes): on |= box.contains(points, .05).any(0)
            assert on.float().mean() > .995


def test_cords_and_extrinsic_agree_and_the_opposite_direction_is_detected(town):
    scene = load_opv2v(town, "train")
    for frame in scene:
        assert {check.direction for check in frame.extrinsics.values()} == {"lidar to camera"} and set(
            frame.pose_sources.values()
        ) == {"cords"}
    record = read_record(scene.entries[0].path(".yaml"))
    camera, lidar = carla_pose_to_matrix(*record["camera1"]["cords"]), carla_pose_to_matrix(*record["lidar_pose"])
    extrinsic = torch.tensor(record["camera1"]["extrinsic"], dtype=torch.float64)
    assert check_extrinsic(camera, lidar, torch.linalg.inv(extrinsic)).direction == "camera to lidar"
    wrong = extrinsic.clone()
    wrong[0, 3] += .5
    assert check_extrinsic(camera, lidar, wrong).direction == "neither" and check_extrinsic(
        camera, lidar, wrong
    ).translation_m == pytest.approx(0.5)


@pytest.mark.parametrize("form", ["png", "npy", "npz"])
def test_depth_is_the_same_in_every_form(tmp_path, form):
    write_town(tmp_path / "a", {"7": EGOS["7"]}, depth=form)
    write_town(tmp_path / "b", {"7": EGOS["7"]}, depth="npy")
    ours, exact = (load_opv2v(tmp_path / name)[0].z_depths for name in "ab")
    for name in CAMERAS:
        near = exact[name] < 600
        assert torch.equal(ours[name].isinf(), exact[name] > 655) or form != "png"
        torch.testing.assert_close(ours[name][near], exact[name][near], atol=.00501 if form == "png" else 0, rtol=0)


def no_picture_but(folder: Path, *kept: str) -> None:
    for name in CAMERAS:
        if name not in kept: (folder / f"000069_{name}.png").unlink()


def other_depth(folder: Path, depth: np.ndarray) -> None:
    (folder / "000069_depth0.png").unlink()
    np.save(folder / "000069_depth0.npy", depth.astype(np.float32))


def cut(path: Path, size: int) -> None: path.write_bytes(path.read_bytes()[:size])


def edit_yaml(change):
    def damage(folder: Path) -> None:
        record = read_record(folder / "000069.yaml")
        change(record)
        (folder / "000069.yaml").write_text(yaml.safe_dump(record))
    return damage


DAMAGES = {
    "missing camera": (
        lambda f: (f / "000069_camera2.png").unlink(),
        "camera2 was left out: the image 000069_camera2.png is missing",
        3,
    ),
    "camera without entry": (edit_yaml(lambda r: r.pop("camera1")), "camera1 was left out: it has no entry", 3),
    "unreadable yaml": (lambda f: (f / "000069.yaml").write_text("camera0: {cords: [1, 2"), "is not YAML", 0),
    "no yaml": (lambda f: (f / "000069.yaml").unlink(), "000069.yaml is missing", 0),
    "a yaml that would run": (
        lambda f: (f / "000069.yaml").write_text("!!python/object/apply:os.system ['true']"),
        "an object of the type 'python/object/apply:os.system'",
        0,
    ),
    "vehicle without pose": (
        edit_yaml(lambda r: r.pop("true_ego_pos")),
        "the vehicle has no pose: 'true_ego_pos' is missing",
        0,
    ),
    "pose that is NaN": (
        edit_yaml(lambda r: r["true_ego_pos"].__setitem__(4, math.nan)),
        "the vehicle has no pose: 'true_ego_pos' holds a number that",
        0,
    ),
    "depth of another size": (lambda f: other_depth(f, np.ones((3, 4))), "the depth is 4x3, but the image 64x48", 4),
    "NaN depth": (lambda f: other_depth(f, np.full((48, 64), np.nan)), "the depth holds 3072 NaN", 4),
    "damaged depth": (
        lambda f: (f / "000069_depth0.png").write_bytes(b"no"),
        "camera0: the depth 000069_depth0.png is damaged",
        4,
    ),
    "damaged picture": (lambda f: cut(f / "000069_camera0.png", 60), "camera0", 3),
    "one camera only": (lambda f: no_picture_but(f, "camera0"), "only one camera, camera0, is left", 1),
    "no camera": (no_picture_but, "no camera of it can be used", 0),
    "listed vehicle without place": (
        edit_yaml(lambda r: r["vehicles"][9].pop("location")),
        "vehicle 9 was left out: 'location' is missing",
        4,
    ),
    "extrinsic apart from cords": (
        edit_yaml(lambda r: r["camera3"]["extrinsic"][1].__setitem__(3, 9.0)),
        "camera3: 'extrinsic' and 'cords' are",
        4,
    ),
    "LiDAR cut short": (lambda f: cut(f / "000069.pcd", -30), "is cut short", 4),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_listed_by_frame_and_the_other_frames_are_read(copy, damage):
    break_it, sentence, cameras_left = DAMAGES[damage]
    break_it(copy / "7")
    scene = load_opv2v(copy)
    read = {frame.entry.vehicle: (frame.views(), frame.lidar_points()) for frame in scene}
    assert any(problem.frame == "town/7/000069" and sentence in problem.message
               for problem in scene.problems), scene.problems
    assert all(problem.frame == "town/7/000069" for problem in scene.problems), "the other vehicles have no problem"
    assert {"9", "12",
            "30"} <= set(read) and all(len(read[key][0]) == 4 and read[key][1] is not None for key in ("9", "12", "30"))
    assert len(read["7"][0]) == cameras_left if cameras_left else "7" not in read
    before = len(scene.problems)
    for frame in scene: frame.views(), frame.lidar_points()
    assert len(scene.problems) == before, "a second reading adds no problem"


def test_nan_and_negative_depth_are_read_as_0_and_infinite_depth_is_kept(copy):
    z = np.full((48, 64), 7.0)
    z[0, :3] = np.nan, -3, np.inf
    other_depth(copy / "7", z)
    depth = next(frame for frame in load_opv2v(copy) if frame.entry.vehicle == "7").z_depths["camera0"]
    assert depth[0, :4].tolist() == [0, 0, math.inf, 7] and not depth.isnan().any()


def test_intensity_is_the_red_of_a_packed_colour(town):
    points, intensity = read_pcd(next((town / "train" / "town_a" / "7").glob("*.pcd")))
    assert len(points) == 3 and torch.allclose(intensity, torch.tensor(.2))


def test_the_real_rig_without_a_yaml_opens_with_the_same_reader():
    folder = real("opv2v_641_4cam")
    scene = load_opv2v(folder)
    frame = scene[0]
    views = {view.name: view for view in frame.views()}
    assert frame.name == "opv2v_641_4cam/641/000759" and list(views) == list(CAMERAS) and scene.problems == []
    assert all(tuple(view.rgb_srgb.shape) == (600, 800, 3) and abs(view.camera.fx - 335.64) < .01
               for view in views.values())
    ahead = {name: view.camera.camera_to_world[:3, 2] for name, view in views.items()}
    assert (
        ahead["camera0"][0] > 0.999
        and ahead["camera1"][1] < -0.9
        and ahead["camera2"][1] > 0.9
        and ahead["camera3"][0] < -0.999
    ), "camera1 looks towards -y"


def test_the_coverage_of_the_real_rig_follows_from_its_geometry():
    """86% of the directions of a 360 x 90 degree equirectangular panorama and 80% of the cylinder's; the
    crop that was used before this package (nbs/background.ipynb) covered 33%."""
    frame = load_opv2v(real("opv2v_641_4cam"))[0]
    views, pose = frame.views(), panorama_pose(frame)
    assert .85 <= rig_coverage(views, EquirectangularCamera(pose, 1008, 252)).float().mean() <= .865
    assert .79 <= rig_coverage(views, CylindricalCamera(pose, 1008, 252)).float().mean() <= .81


# ------------------------------------------------------------------------------------------------------------ PandaSet

@pytest.fixture(scope="module")
def sequence():
    return load_pandaset(real("pandaset") / "002")


def test_missing_frames_are_listed_and_frames_with_one_camera_are_named(sequence):
    assert sequence.length == 80 and [frame.index
                                      for frame in sequence] == list(range(40, 56)) and sequence.problems == []
    sides = ("front_left", "left", "back", "right", "front_right")
    expected = {"lidar": 64, "camera/front_camera": 64} | {f"camera/{side}_camera": 78 for side in sides}
    assert {part: len(numbers) for part, numbers in sequence.missing.items()} == expected
    scene = load_surround_frames(sequence.root)
    assert [frame.index for frame in scene] == [40, 48] and all(len(frame.cameras) == 6 for frame in scene)
    assert len(scene.problems) == 14 and scene.problems[0].message == "only front_camera has a picture"
    with pytest.raises(KiloError, match="no data of frame 3"): sequence.at(3)


@pytest.mark.incident(14)
def test_times_stay_float64_until_they_are_relative(sequence):
    """In float32 a sweep happens at one instant (incident 14)."""
    sweep = sequence.at(40).sweep()
    assert sweep.times_s.dtype == torch.float64 and sweep.times_s.float().max() == sweep.times_s.float().min()
    relative = sequence.relative_s(sweep.times_s)
    assert .1 < relative.max() - relative.min() < .2 and abs(relative.mean() - 4.0) < .15
    with pytest.raises(KiloError, match="float64"): sequence.relative_s(sweep.times_s.float())
    stamps = torch.tensor([frame.time_s for frame in sequence], dtype=torch.float64)
    torch.testing.assert_close(sequence.relative_s(stamps).diff(), torch.full((15,), .1), atol=1e-3, rtol=0)


def test_the_vehicle_drives_ahead_over_a_level_road(sequence):
    frames = list(sequence)
    moved = rigid_inverse(frames[0].vehicle_to_world) @ frames[-1].vehicle_to_world
    assert moved[0, 3] > 5 and moved[1, 3].abs() < .5, "x points forward"
    for frame in (frames[0], frames[-1]):
        points = transform_points(rigid_inverse(frame.vehicle_to_world), frame.lidar_points())[frame.semseg() == 7]
        road = points[points[:, :2].norm(dim=-1) < 10]
        plane = torch.linalg.lstsq(torch.cat([road[:, :2], torch.ones(len(road), 1)], 1), road[:, 2:]).solution[:, 0]
        assert plane[:2].norm() < 0.03 and abs(plane[2].item() + frame.origin_height_m) < 0.05, (
            "slope, and height of the origin above the plane"
        )


def test_cuboids_hold_the_points_of_their_cars_and_drive_forward(sequence):
    frame, later = sequence.at(40), sequence.at(50)
    cuboids, sweep = frame.cuboids(), frame.sweep()
    cars = cuboids.boxes.subset([i for i, label in enumerate(cuboids.boxes.labels) if label == "Car"])
    assert (cars.owner(sweep.points[frame.semseg() == 13], margin_m=.1) >= 0).float().mean() > .99
    then = dict(zip(later.cuboids().boxes.identities, later.cuboids().boxes.centres))
    moving = [(i, name) for i,
              name in enumerate(cuboids.boxes.identities) if name in then and cuboids.motion[i] == "Moving"]
    ways = [(cuboids.boxes.box_to_world[i, :3, 0], then[name] - cuboids.boxes.centres[i]) for i, name in moving]
    cosines = torch.stack([front @ way / way.norm() for front, way in ways if way.norm() > 3])
    assert len(cosines) > 20 and cosines.min() > .9, "x is the front of every moving thing"
    assert len(cuboids.of_sensor(0)) < len(cuboids), "sibling boxes of the other LiDAR are left out"


def information(labels: torch.Tensor, grey: torch.Tensor) -> float:
    """Mutual information (nats) of class and grey."""
    table = torch.zeros(44, 24).index_put_((labels.clamp(0, 43), (grey * 24).long().clamp(0, 23)),
                                           torch.ones(len(labels)), accumulate=True)
    table /= table.sum()
    chance = table.sum(1, keepdim=True) * table.sum(0, keepdim=True)
    return (table * (table / chance.clamp(min=1e-12)).clamp(min=1e-12).log()).sum().item()


def test_lidar_points_lie_on_the_pictures_of_all_six_cameras(sequence):
    """The mutual information of point classes and grey values is larger at the given pose than at poses that are
    rotated by two degrees."""
    frame = sequence.at(40)
    points, labels = frame.lidar_points().float(), frame.semseg()
    for view in frame.views():
        shared, grey = {}, view.rgb_srgb.mean(-1)
        for degrees in (0.0, -2.0, 2.0):
            turn = carla_pose_to_matrix(0, 0, 0, 0, 0, 0)
            turn[0, 0] = turn[2, 2] = math.cos(math.radians(degrees))
            turn[0, 2], turn[2, 0] = math.sin(math.radians(degrees)), -math.sin(math.radians(degrees))
            camera = replace(view.camera, camera_to_world=view.camera.camera_to_world @ turn.float())
            pixels, depth = camera.project(points)
            inside = (
                (depth > 1) & (pixels[:, 0] > 0) & (pixels[:, 0] < 1919) & (pixels[:, 1] > 0) & (pixels[:, 1] < 1079)
            )
            assert .1 < inside.float().mean() < .5
            at = pixels[inside].long()
            shared[degrees] = information(labels[inside], grey[at[:, 1], at[:, 0]])
        assert shared[0.0] > shared[-2.0] and shared[0.0] > shared[2.0], (view.name, shared)


# ------------------------------------------------------------------------------------------------------------- V2X-Sim

def disagreement(first, second, generator) -> torch.Tensor:
    """Relative difference of depth where a sample of the first view's points falls into the second's picture."""
    at = torch.randint(first.z_depth.numel(), (60_000,), generator=generator)
    z = first.z_depth.reshape(-1)[at]
    kept = (z > 3.5) & (z < 80)
    pixels, depth = second.camera.project(first.camera.unproject(first.camera.pixel_centres()[at[kept]], z[kept]))
    inside = (depth > 1) & second.camera.contains(pixels)
    there = second.z_depth[pixels[inside][:, 1].long(), pixels[inside][:, 0].long()]
    return ((there - depth[inside]) / depth[inside]).abs()


def test_neighbouring_cameras_of_the_carla_rig_agree_about_depth():
    """The mounting positions are estimates; with all cameras in one position the same pictures disagree at least 1.5
    times as much."""
    frame = load_v2xsim(real("v2xsim_carla_6cam"))[0]
    views = {view.name: view for view in frame.views()}
    middle = {name: replace(view,
                            camera=replace(view.camera,
                                           camera_to_world=torch.cat([view.camera.camera_to_world[:, :3],
                                                                      torch.eye(4)[:, 3:]], 1))) for name,
              view in views.items()}
    around = ["front", "front_left", "back_left", "back", "back_right", "front_right"]
    for rig, bound in ((views, .016), (middle, None)):
        generator, medians = torch.Generator().manual_seed(0), []
        for a, b in zip(around, around[1:] + around[:1]):
            both = disagreement(rig[a], rig[b], generator).median(), disagreement(rig[b], rig[a], generator).median()
            medians.append(min(both))
        if bound: placed = torch.stack(medians)
        else: assert (torch.stack(medians) > 1.5 * placed).sum() >= 5
    assert placed.max() < .016, placed
    front = views["front"]
    below = front.camera.unproject(front.camera.pixel_centres(), front.z_depth.reshape(-1)).reshape(900, 1600, 3)[
        620:880, 500:1100
    ]
    assert abs(below[..., 2].median().item()) < .05, "the road is at height 0"
    assert set(MOUNTS_M) == set(frame.cameras)


# ------------------------------------------------------------------------------------------------- kinds and manifests

@pytest.mark.parametrize("name, kind",
                         [("opv2v_641_4cam", "opv2v"), ("pandaset_002", "pandaset"), ("v2xsim_carla_6cam", "v2xsim")])
def test_real_data_is_found_by_name_and_opened_by_the_reader_that_its_page_names(name, kind, tmp_path):
    page = load_manifests()[name]
    root = real(page.folder or name)
    reference = resolve_data(name, tmp_path, root.parent)
    assert reference.kind == kind == page.kind and len(find_reader(page.loader)(reference.path)) > 0
    scene = load_surround(kind, reference.path)
    assert all(len(frame.cameras) >= 4 for frame in scene) and len(list(scene)) > 0


def test_an_unknown_kind_names_the_nearest(tmp_path):
    with pytest.raises(KiloError, match="did you mean 'opv2v'"): load_surround("opv2", tmp_path)
    with pytest.raises(KiloError, match="PandaSet sequence"): resolve_data(f"pandaset:{tmp_path / 'none'}")


# ------------------------------------------------------------------------------------------------- cooperative samples

SMALL = PanoramaOptions(width=128, height=32)


@pytest.fixture(scope="module")
def samples(town, tmp_path_factory) -> CooperativeDataset:
    return CooperativeDataset(load_opv2v(town, "train"), tmp_path_factory.mktemp("coop"), SMALL)


def test_vehicles_within_range_make_a_sample_with_the_main_one_first(samples):
    vehicles = {group.name.split("/")[2]: samples[i].vehicles for i, group in enumerate(samples.groups)}
    assert vehicles == {"7": ("7", "9", "12"), "9": ("9", "12", "7"), "12": ("12", "9", "7", "30"), "30": ("30", "12")}
    positions = torch.tensor([[float(i), 0, 0] for i in range(8)])
    groups, alone = choose_groups(["t"] * 8, [str(i) for i in range(8)], positions, SampleOptions())
    assert alone == 0 and all(len(group.numbers) == 4 for group in groups) and groups[0].numbers == (0, 1, 2, 3)
    assert choose_groups(["a", "b"], ["1", "2"], positions[:2], SampleOptions()) == ([], 2), (
        "a vehicle of another instant is not part of the sample"
    )


def test_poses_are_relative_to_the_main_vehicle_in_metres(samples):
    index = next(i for i, group in enumerate(samples.groups) if "/7/" in group.name)
    poses = samples[index].pose_to_main
    assert torch.equal(poses[0], torch.eye(4))
    # CARLA: 18 m ahead, 2 m to the right
    torch.testing.assert_close(poses[1, :3, 3], torch.tensor([2.0, 0, 18]), atol=1e-4, rtol=0)
    turn = math.degrees(math.acos(((poses[1, :3, :3].trace() - 1) / 2).item()))
    assert abs(turn - 170) < .01


def test_every_view_sees_the_same_world(samples):
    """Points of every vehicle's panorama, transformed by the poses, lie on the road or on the boxes of the
    town."""
    index = next(i for i, group in enumerate(samples.groups) if "/12/" in group.name)
    sample, camera = samples[index], samples.camera()
    main = torch.from_numpy(samples.tile(samples.groups[index].numbers[0]).camera_to_world)
    boxes = [block(20, 12, 18, 6, 9), block(8, -11, 8, 6, 5), block(14, 4.2, 2, .6, 1.8), *solids_of(EGOS, "", [])]
    for view in range(4):
        kept = sample.mask[view].reshape(-1) > 0
        local = camera.unproject(camera.pixel_centres()[kept], sample.range_m[view].reshape(-1)[kept])
        points = transform_points(main @ sample.pose_to_main[view].double(), local.double())
        # a pixel of these small pictures is 3 cm wide at 1 m
        on = points[:, 2].abs() < .1 + .03 * local.norm(dim=-1)
        for box in boxes: on |= box.contains(points, .5).any(0)
        assert kept.sum() > 300 and on.float().mean() > .97, (view, on.float().mean())


def test_a_sample_is_the_same_whenever_and_wherever_it_is_made(samples, town, tmp_path):
    fresh = CooperativeDataset(load_opv2v(town, "train"), tmp_path, SMALL)
    without = CooperativeDataset(load_opv2v(town, "train"), None, SMALL, memory=1)
    for dataset in (fresh, without):
        for index in (3, 0, 0):
            for name, value in dataset[index].tensors().items():
                assert torch.equal(value, samples[index].tensors()[name]), name
    sample = samples[0]
    assert all(value.dtype == torch.float32 for name, value in sample.tensors().items() if name != "classes")
    assert (
        (sample.range_m[sample.mask == 0] == 0).all()
        and torch.equal(sample.mask == 1, sample.classes == SCENE)
        and sample.range_m.isfinite().all()
    )


def test_the_mask_depends_on_the_scene(tmp_path):
    """Two instants of one rig among different houses: one fixed mask, as was used before this package, would be wrong
    in some frame."""
    egos = {key: EGOS[key] for key in ("7", "9")}
    write_town(tmp_path, egos, ("000069", "000071", "000073"),
               [[], [block(6, 5, 3, 3, 9)], [block(9, -5, 4, 3, 9), block(-9, 5, 6, 3, 4)]])
    dataset = CooperativeDataset(load_opv2v(tmp_path), None, SMALL)
    masks = torch.stack([sample.mask[0] for sample in dataset])
    classes = torch.stack([sample.classes for sample in dataset])
    assert len(dataset) == 6 and not torch.equal(masks[0], masks[1]) and constant_mask_iou(masks) < .98
    assert all((classes == kind).any()
               for kind in (SCENE, FAR, HIDDEN)) and not (classes == OWN_BODY).float().mean() > .1
    statistics = dataset_statistics(dataset, 4)
    assert statistics["constant_mask_iou"] < 1 and statistics == dataset_statistics(dataset, 4)


def test_rolling_pictures_and_rotating_poses_keeps_every_point(samples):
    index = next(i for i, group in enumerate(samples.groups) if "/12/" in group.name)
    sample, camera = samples[index], samples.camera()
    for columns in ([5, 0, -17, 127], [1, 1, 1, 1], [128, -128, 0, 256]):
        rolled = roll_sample(sample, columns)
        turn = rigid_inverse(column_rotations(columns, 128)[0]).float()
        for view, k in enumerate(columns):
            points = [transform_points(s.pose_to_main[view],
                                       camera.unproject(camera.pixel_centres(),
                                                        s.range_m[view].reshape(-1))).reshape(32, 128, 3)
                      for s in (sample, rolled)]
            torch.testing.assert_close(points[1], torch.roll(points[0], k, 1) @ turn[:3, :3].mT, atol=2e-3, rtol=0)
            for name in ("rgb_srgb", "mask", "classes", "coverage"):
                assert torch.equal(getattr(rolled, name)[view], torch.roll(getattr(sample, name)[view], k, -1))
        check_rigid(rolled.pose_to_main, "pose", 1e-5)
    assert not torch.allclose(roll_sample(sample, [5, 0, 0, 0]).pose_to_main[1],
                              sample.pose_to_main[1]), "turning the main vehicle turns the others' poses"
    one, two = (roll_randomly(sample, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one.rgb_srgb, two.rgb_srgb) and torch.equal(one.pose_to_main, two.pose_to_main)


def test_a_batch_marks_the_vehicles_that_are_present(samples):
    batch = collate([samples[i] for i in range(4)])
    counts = [len(samples[i].vehicles) for i in range(4)]
    assert batch["present"].sum(1).tolist() == counts and tuple(batch["rgb_srgb"].shape) == (4, 4, 3, 32, 128)
    torch.testing.assert_close(batch["pose_to_main"][~batch["present"]], torch.eye(4).expand(16 - sum(counts), 4, 4))
    with pytest.raises(KiloError, match="does not fit"): collate([samples[0]], 1)


def flat(views, camera) -> Panorama:
    """A replacement of the stitching: a wall 10 m away."""
    size = camera.height, camera.width
    everywhere, first = torch.ones(size, dtype=torch.bool), torch.zeros(size, dtype=torch.int16)
    return Panorama(camera, torch.full((*size, 3), .5), torch.full(size, 10.0), everywhere, first,
                    torch.ones(len(views)))


def test_the_cache_is_keyed_by_content_options_and_maker(copy, tmp_path):
    cache, made = tmp_path / "cache", []

    def counted(views, camera):
        made.append(1)
        return flat(views, camera)

    def sweep(options=SMALL, maker=counted):
        made.clear()
        dataset = CooperativeDataset(load_opv2v(copy), cache, options, stitch_with=maker)
        return len(list(dataset)) and len(made)
    assert sweep() == 4 and sweep() == 0, "made once"
    assert sweep(replace(SMALL, height_m=2.0)) == 4 and sweep() == 0
    Image.new("RGB", (64, 48), (1, 2, 3)).save(copy / "7" / "000069_camera0.png")
    assert sweep() == 1, "a changed picture is another tile"
    (copy / "9" / "000069.yaml").write_text((copy / "9" / "000069.yaml").read_text() + "# a note\n")
    assert sweep() == 4, "every tile of an instant depends on its yaml files"


KILLED = """
import os, signal, sys
import numpy as np
from kilonb.coop.dataset import CooperativeDataset
from kilonb.panoramas.tiles import PanoramaOptions
from kilonb.scenes.opv2v import load_opv2v
whole = np.savez
def half(file, **arrays):
    import io
    buffer = io.BytesIO(); whole(buffer, **arrays)
    file.write(buffer.getvalue()[:len(buffer.getvalue()) // 2]); file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
np.savez = half
CooperativeDataset(load_opv2v(sys.argv[1]), sys.argv[2], PanoramaOptions(width=128, height=32))[0]
"""


@pytest.mark.incident(15)
def test_a_killed_writer_leaves_no_partial_file_that_is_read_later(town, samples, tmp_path):
    """Incident 15: half an .npz file was read under its final name."""
    ran = subprocess.run([sys.executable, "-c", KILLED, str(town / "train"), str(tmp_path)], capture_output=True,
                         text=True, timeout=300)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    left = list((tmp_path / "panoramas").iterdir())
    assert len(left) == 1 and left[0].name.startswith(".") and left[0].suffix == ".part" and left[0].stat().st_size > 0
    assert not list(tmp_path.glob("panoramas/*.npz")), "no file under a final name"
    sample = CooperativeDataset(load_opv2v(town / "train"), tmp_path, SMALL)[0]
    assert all(torch.equal(value, samples[0].tensors()[name]) for name, value in sample.tensors().items())
    kept = next(tmp_path.glob("panoramas/*.npz"))
    kept.write_bytes(kept.read_bytes()[:500])
    assert read_panorama_tile(kept) is None
    again = CooperativeDataset(load_opv2v(town / "train"), tmp_path, SMALL)[0]
    assert torch.equal(again.range_m,
                       sample.range_m) and read_panorama_tile(kept) is not None, "an unreadable tile is made again"


def test_frames_that_cannot_be_used_are_left_out_and_counted(copy, tmp_path):
    edit_yaml(lambda r: r.pop("true_ego_pos"))(copy / "9")
    for name in CAMERAS[1:]: (copy / "30" / f"000069_{name}.png").unlink()
    # the second time from the kept list of poses
    for _ in range(2):
        dataset = CooperativeDataset(load_opv2v(copy), tmp_path / "cache", SMALL)
        assert {group.name.split("/")[1] for group in dataset.groups} == {"7", "12"} and len(dataset.problems) == 6
        assert sum("left out of the samples" in problem.message for problem in dataset.problems) == 1
    with pytest.raises(KiloError, match="no cooperative sample"):
        CooperativeDataset(load_opv2v(copy), None, SMALL, SampleOptions(range_m=3))
    with pytest.raises(KiloError, match="Sample 9"): dataset[9]


def test_what_the_layouts_do_not_hold_is_refused_in_one_sentence(tmp_path):
    for action, expected in ((lambda: load_opv2v(tmp_path), "no OPV2V frames"),
                         (lambda: load_pandaset(tmp_path), "no PandaSet sequence"),
                         (lambda: load_v2xsim(tmp_path), "MANIFEST.json"),
                         (lambda: image_size(tmp_path / "a.png"), "missing"),
                         (lambda: read_z_depth(tmp_path / "a.npy"), "missing"),
                         (lambda: PanoramaOptions(projection="mercator").camera(), "mercator")):
        with pytest.raises(KiloError, match=expected) as caught: action()
        assert "\n" not in str(caught.value)
    (tmp_path / "MANIFEST.json").write_text(json.dumps({"calibration": {}}))
    with pytest.raises(KiloError, match="calibration"): load_v2xsim(tmp_path)
