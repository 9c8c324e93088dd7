"""Surround data of other people: yaml, point clouds, missing parts, nuScenes and rigs described in one YAML."""
import gzip
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import kilonb
from kilonb.core.errors import KiloError
from kilonb.core.files import write_json
from kilonb.data.tables import write_table
from kilonb.geometry.cameras import blender_to_opencv, camera_from_angle
from kilonb.geometry.rig_checks import check_rig
from kilonb.geometry.transforms import forward_to_opencv, opencv_to_forward, rigid, rigid_inverse, rotmat_to_quat
from kilonb.panoramas.checks import run_checks
from kilonb.panoramas.tiles import PanoramaOptions
from kilonb.scenes.nuscenes import load_nuscenes
from kilonb.scenes.opv2v import load_opv2v
from kilonb.scenes.pandaset import CAMERAS, load_surround_frames
from kilonb.scenes.rig import load_rig, write_rig
from tests.helpers import real_data, run_here

TINY = PanoramaOptions(width=64, height=16)
MOUNTS = {"0": [2.5, 0, 1, 0, 0, 0], "1": [0, .3, 1.8, 0, 100, 0], "2": [0, -.3, 1.8, 0, -100, 0],
          "3": [-2, 0, 1.5, 0, 180, 0]}
CLOUD = np.random.default_rng(0).uniform(-20, 20, (50, 3)).astype(np.float32)


def refusal(function, *arguments, **options) -> str:
    with pytest.raises(KiloError) as caught: function(*arguments, **options)
    return str(caught.value)


# OPV2V


def frame_record(key: str = "camera", lidar=(0.0, 0, 1.9, 0, 0, 0)) -> dict:
    record = {"true_ego_pos": [0.0] * 6, "lidar_pose": list(lidar), "ego_speed": 36.0, "vehicles": {
        9: {"angle": [0, 0, 0], "location": [20, 4, 0], "center": [0, 0, .7], "extent": [2.3, 1, .7], "speed": 36.0}}}
    for number, pose in MOUNTS.items():
        record[f"{key}{number}"] = {"cords": pose, "intrinsic": [[30.0, 0, 40], [0, 30, 30], [0, 0, 1]]}
    return record


def pcd(layout: str, fields: str = "x y z intensity") -> bytes:
    names = fields.split()
    columns = [*CLOUD.T, np.full(50, .5, np.float32), np.zeros(50, np.float32)][:len(names)]
    head = (f"VERSION .7\nFIELDS {fields}\nSIZE {' '.join('4' * len(names))}\nTYPE {' '.join('F' * len(names))}\n"
            f"COUNT {' '.join('1' * len(names))}\nWIDTH 50\nHEIGHT 1\nPOINTS 50\nDATA {layout}\n").encode()
    if layout == "ascii": return head + "\n".join(" ".join(f"{x:.9g}" for x in row) for row in zip(*columns)).encode()
    if layout == "binary": return head + np.stack(columns, -1).astype("<f4").tobytes()
    raw = b"".join(column.astype("<f4").tobytes() for column in columns)
    packed = b"".join(bytes([len(part) - 1]) + part for k in range(0, len(raw), 32) for part in [raw[k:k + 32]])
    return head + np.array([len(packed), len(raw)], "<u4").tobytes() + packed


def write_vehicle(folder: Path, record: dict, cloud: bytes | None = None, dump=yaml.safe_dump, frame: str = "000069",
                  picture: str = "{frame}_camera{number}.png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{frame}.yaml").write_text(dump(record))
    if cloud is not None: (folder / f"{frame}.pcd").write_bytes(cloud)
    for number in MOUNTS:
        path, kind = folder / picture.format(frame=frame, number=number), {}
        if path.suffix.isupper(): kind = {"format": {"PNG": "PNG", "JPEG": "JPEG"}[path.suffix[1:]]}
        Image.new("RGB", (80, 60), (90, 120, 30)).save(path, **kind)


def as_numpy(value):
    """The record with every number as a numpy scalar, and the intrinsics as arrays."""
    if isinstance(value, dict): return {k: np.array(v) if k == "intrinsic" else as_numpy(v) for k, v in value.items()}
    if isinstance(value, list): return [as_numpy(one) for one in value]
    return np.float64(value) if isinstance(value, float) else np.int32(value) if isinstance(value, int) else value


@pytest.mark.parametrize("module", ["numpy._core", "numpy.core"])
def test_numpy_numbers_and_arrays_in_a_yaml_are_numbers(tmp_path, module):
    dump = lambda record: yaml.dump(as_numpy(record)).replace("numpy._core", module)
    write_vehicle(tmp_path / "test" / "town" / "641", frame_record(), pcd("ascii"), dump)
    scene = load_opv2v(tmp_path)
    frame = scene[0]
    assert scene.problems == [] and len(frame.cameras) == 4 and frame.speed_m_s == pytest.approx(10)
    assert frame.cameras["camera1"].fx == 30 and frame.boxes.identities == ("9",)


def test_another_python_object_in_a_yaml_is_refused_by_its_name(tmp_path):
    write_vehicle(tmp_path / "641", frame_record())
    (tmp_path / "641" / "000069.yaml").write_text("a: !!python/object/apply:os.getcwd []\n")
    message = refusal(load_opv2v(tmp_path).__getitem__, 0)
    assert "os.getcwd" in message and "is not YAML" not in message


@pytest.mark.parametrize("layout", ["ascii", "binary", "binary_compressed"])
@pytest.mark.parametrize("fields", ["x y z", "x y z intensity", "x y z rgb intensity"])
def test_every_layout_of_a_pcd_gives_the_same_points(tmp_path, layout, fields):
    write_vehicle(tmp_path / "641", frame_record(), pcd(layout, fields))
    frame = load_opv2v(tmp_path)[0]
    expected = torch.from_numpy(CLOUD).double() * torch.tensor([1.0, -1, 1]) + torch.tensor([0, 0, 1.9])
    torch.testing.assert_close(frame.lidar_points(), expected, atol=1e-5, rtol=0)
    (tmp_path / "641" / "000069.pcd").write_bytes(pcd(layout, fields)[:-40])
    assert frame.lidar_points() is None and "000069.pcd" in frame.problems[0].message


@pytest.mark.parametrize("picture, key", [("{frame}_cam{number}.jpeg", "cam"), ("{frame}_camera{number}.PNG", "camera"),
                                          ("{frame}_cam{number}.JPEG", "camera")])
def test_other_names_of_pictures_and_keys_are_the_same_cameras(tmp_path, picture, key):
    write_vehicle(tmp_path / "641", frame_record(key), picture=picture)
    scene = load_opv2v(tmp_path)
    assert list(scene[0].images) == [f"{key}{number}" for number in MOUNTS] and scene.problems == []


def test_vehicles_as_a_list_missing_speeds_and_poses_as_matrices_are_read(tmp_path):
    record = frame_record(lidar=np.eye(4).tolist())
    vehicle = record["vehicles"][9]
    short = {key: vehicle[key] for key in ("angle", "location", "extent")}
    record["vehicles"] = [vehicle | {"id": 9, "speed": None}, short]
    del record["ego_speed"]
    record["true_ego_pos"] = np.eye(4).tolist()
    write_vehicle(tmp_path / "641", record, pcd("binary"))
    scene = load_opv2v(tmp_path)
    frame = scene[0]
    assert scene.problems == [] and frame.boxes.identities == ("9", "1") and math.isnan(frame.speed_m_s)
    assert len(frame.lidar_points()) == 50


def test_a_road_side_unit_has_the_pose_of_its_lidar(tmp_path):
    record = frame_record(lidar=(5.0, 6, 4, 0, 90, 0))
    del record["true_ego_pos"], record["ego_speed"]
    write_vehicle(tmp_path / "town" / "-1", record, pcd("binary"))
    frame = load_opv2v(tmp_path)[0]
    assert frame.vehicle_to_world[:3, 3].tolist() == [5, -6, 4] and frame.origin_height_m == 4
    shutil.move(tmp_path / "town" / "-1", tmp_path / "town" / "641")
    assert "no pose" in refusal(load_opv2v(tmp_path).__getitem__, 0)


def test_a_lidar_or_frame_that_the_neighbours_have_is_missing_by_name(tmp_path):
    for vehicle in ("641", "650", "659"):
        for frame in ("000069", "000071", "000073"):
            write_vehicle(tmp_path / "test" / "town" / vehicle, frame_record(), pcd("ascii"), frame=frame)
    for path in (tmp_path / "test" / "town" / "650").glob("000071*"): path.unlink()
    (tmp_path / "test" / "town" / "641" / "000073.pcd").unlink()
    for path in (tmp_path / "test" / "town" / "659").glob("*.pcd"): path.unlink()
    report = run_checks(load_opv2v(tmp_path), TINY, samples=9)
    found = " ".join(report.problems)
    assert report.verdict == "red" and "650/000071: 000071.yaml is missing" in found
    assert "641/000073: the LiDAR file 000073.pcd is missing" in found and found.count("659/") == 3
    assert len(report.problems) == 5, report.problems


# PandaSet


def write_pandaset(folder: Path, frames: int = 3, ending: str = ".pkl.gz") -> None:
    turn = {"position": {"x": 0.0, "y": 0.0, "z": 0.3}, "heading": {"w": 1.0, "x": 0.0, "y": 0.0, "z": 0.0}}
    upright = turn | {"heading": {"w": .5 ** .5, "x": -.5 ** .5, "y": 0.0, "z": 0.0}}         # looks along y, z is up
    times = [1000.0 + .1 * k for k in range(frames)]
    for part in ("lidar", *(f"camera/{name}" for name in CAMERAS)):
        (folder / part).mkdir(parents=True)
        (folder / part / "poses.json").write_text(json.dumps([turn if part == "lidar" else upright] * frames))
        (folder / part / "timestamps.json").write_text(json.dumps(times))
        if part != "lidar": (folder / part / "intrinsics.json").write_text('{"fx": 30, "fy": 30, "cx": 32, "cy": 24}')
    box = {"uuid": ["a"], "label": ["Car"], "yaw": [0.0], "stationary": [True], "position.x": [10.0],
           "position.y": [6.0], "position.z": [1.0], "dimensions.x": [2.0],
           "dimensions.y": [5.0], "dimensions.z": [2.0]}
    points = {axis: CLOUD[:, k].astype(float) for k, axis in enumerate("xyz")}
    points |= {"i": np.zeros(50), "t": np.full(50, 1000.0)}
    classes = {"class": np.zeros(50, int)}
    for part, table in (("lidar", points), ("annotations/cuboids", box), ("annotations/semseg", classes)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for k in range(frames):
            write_table(folder / "table", table)
            data = (folder / "table").read_bytes()
            (folder / part / f"{k:02d}{ending}").write_bytes(data if ending.endswith("gz") else gzip.decompress(data))
    for name in CAMERAS:
        for k in range(frames): Image.new("RGB", (64, 48)).save(folder / "camera" / name / f"{k:02d}.jpg")


def unlink(*patterns: str):
    def act(folder: Path) -> None:
        for pattern in patterns:
            for path in list(folder.glob(pattern)): path.unlink()
    return act


MISSING = {
    "a sweep": (unlink("001/lidar/01.*"), "001/01: lidar is missing"),
    "all sweeps": (unlink("001/lidar/*.pkl.gz"), "001/00: lidar is missing: no frame has a file"),
    "a picture": (unlink("001/camera/left_camera/01.jpg"), "001/01: camera/left_camera is missing"),
    "a camera's pictures": (unlink("001/camera/left_camera/*.jpg"), "camera/left_camera is missing: no frame"),
    "a camera": (lambda f: shutil.rmtree(f / "001/camera/left_camera"), "camera/left_camera is missing: there is no"),
    "labels of a frame": (unlink("001/annotations/semseg/01.*"), "001/01: annotations/semseg is missing"),
    "cuboids": (lambda f: shutil.rmtree(f / "001/annotations/cuboids"), "annotations/cuboids is missing: there is no"),
    "a whole frame": (unlink("001/*/01.*", "001/*/*/01.*"), "001/00: frame 01 has no file"),
    "the last frame": (unlink("001/*/02.*", "001/*/*/02.*"), "001/00: frame 02 has no file"),
    "a sequence's poses": (unlink("002/lidar/poses.json"), "002"),
    "a pose": (lambda f: (f / "002/camera/left_camera/poses.json").write_text("[]"), "002"),
}


@pytest.fixture(scope="module")
def drives(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("drives")
    write_pandaset(root / "001")
    shutil.copytree(root / "001", root / "002")
    return root


def test_whole_sequences_have_no_problem_and_the_verdict_says_what_it_rests_on(drives):
    scene = load_surround_frames(drives)
    report = run_checks(scene, TINY, samples=6)
    line = next(line for line in report.lines if line.check.measure == "problems_share")
    assert scene.problems == [] and line.verdict == "green" and report.lost == {}
    assert report.verdict != "green" and report.words in report.sentence()
    assert re.search(r" of \d+ checks", report.words)


@pytest.mark.parametrize("what", MISSING)
def test_a_missing_part_turns_the_check_red_by_name(drives, tmp_path, what):
    act, words = MISSING[what]
    shutil.copytree(drives, tmp_path / "drives")
    act(tmp_path / "drives")
    report = run_checks(load_surround_frames(tmp_path / "drives"), TINY, samples=6)
    line = next(line for line in report.lines if line.check.measure == "problems_share")
    assert line.verdict == "red" and report.verdict == "red"
    assert words in " ".join([*report.problems, *report.lost, line.sentence]), (report.problems, report.lost)


def test_uncompressed_tables_are_read(tmp_path):
    write_pandaset(tmp_path / "001", 2, ".pkl")
    scene = load_surround_frames(tmp_path)
    assert scene.problems == [] and len(scene[0].lidar_points()) == 50 and len(scene[0].boxes) == 1


def test_checks_of_a_chosen_frame_measure_that_frame(drives):
    report = run_checks(load_surround_frames(drives), TINY, frames=[4, 0])
    assert [frame.name for frame in report.frames] == ["002/01", "001/00"]
    assert "6" in refusal(run_checks, load_surround_frames(drives), TINY, frames=[6])


# nuScenes


def write_nuscenes(root: Path, suffix: str = "") -> None:
    def numbers(pose): return {"translation": pose[:3, 3].tolist(), "rotation": rotmat_to_quat(pose[:3, :3]).tolist()}
    turn, around = torch.eye(3).double(), torch.diag(torch.tensor([-1.0, -1, 1])).double()
    camera = [[40.0, 0, 32], [0, 40, 24], [0, 0, 1]]
    mounts = {"CAM_FRONT": forward_to_opencv(rigid(turn, torch.tensor([1.5, 0, 1.5]).double())),
              "CAM_BACK": forward_to_opencv(rigid(around, torch.tensor([-1.0, 0, 1.5]).double())),
              "LIDAR_TOP": rigid(turn, torch.tensor([1.0, 0, 1.8]).double())}
    data = [{"token": f"{name}{k}", "sample_token": f"k{k}", "ego_pose_token": f"e{k}", "is_key_frame": True,
             "calibrated_sensor_token": name, "filename": f"samples/{name}/{k}.{'jpg' if 'CAM' in name else 'pcd.bin'}"}
            for name in mounts for k in range(3)]
    tables = {"scene": [{"token": "s", "name": "scene-0061"}], "sample_data": data,
              "sample": [{"token": f"k{k}", "timestamp": 10**15 - k, "scene_token": "s"} for k in range(3)],
              "sensor": [{"token": n, "channel": n + suffix, "modality": "camera" if "CAM" in n else "lidar"}
                         for n in mounts],
              "calibrated_sensor": [{"token": n, "sensor_token": n, **numbers(pose),
                                     "camera_intrinsic": camera if "CAM" in n else []} for n, pose in mounts.items()],
              "ego_pose": [{"token": f"e{k}", **numbers(rigid(turn, torch.tensor([float(k), 0, 0]).double()))}
                           for k in range(3)]}
    for name, rows in tables.items(): write_json(root / "v1.0-mini" / f"{name}.json", rows)
    for row in data:
        (root / row["filename"]).parent.mkdir(parents=True, exist_ok=True)
        if row["filename"].endswith("jpg"): Image.new("RGB", (64, 48)).save(root / row["filename"])
        else: np.array([[9.0, 0, -1.8, .5, 3]], np.float32).tofile(root / row["filename"])


def test_nuscenes_keyframes_are_in_order_of_time_with_lidar_in_the_world(tmp_path):
    write_nuscenes(tmp_path)
    scene = kilonb.load_surround("nuscenes", tmp_path)
    assert [frame.vehicle_to_world[0, 3].item() for frame in scene] == [2, 1, 0] and scene.problems == []
    assert scene[2].lidar_points()[0].tolist() == pytest.approx([10, 0, 0], abs=1e-6)
    assert list(scene[0].images) == ["CAM_FRONT", "CAM_BACK"]


def test_a_file_that_the_tables_name_turns_the_check_red(tmp_path):
    write_nuscenes(tmp_path)
    (tmp_path / "samples/CAM_BACK/1.jpg").unlink()
    (tmp_path / "samples/LIDAR_TOP/2.pcd.bin").unlink()
    report = run_checks(load_nuscenes(tmp_path), TINY, samples=3)
    assert report.verdict == "red" and "CAM_BACK" in str(report.problems) and "LIDAR_TOP" in str(report.problems)


def test_v2x_sim_in_its_own_layout_is_read_or_named(tmp_path):
    write_nuscenes(tmp_path, "_id_2")
    assert [frame.name for frame in kilonb.load_v2xsim(tmp_path)] == [f"scene-0061/2/0{k}" for k in range(3)]
    (tmp_path / "v1.0-mini" / "sample.json").write_text("[]")
    assert "v1.0-mini" in refusal(kilonb.load_v2xsim, tmp_path)
    (tmp_path / "empty").mkdir()
    assert "sample_data.json" in refusal(kilonb.load_v2xsim, tmp_path / "empty")


# Rigs


def yawed(degrees: float) -> torch.Tensor:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]]).double()
    return forward_to_opencv(rigid(turn, turn @ torch.tensor([1.5, 0, 1.6]).double()))


def write_yaml(folder: Path, poses: dict, **more) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    cameras = {}
    for name, pose in poses.items():
        for k in range(2): Image.new("RGB", (64, 48), (90, 120, 30)).save(folder / f"{name}_{k}.jpg")
        cameras[name] = {"pictures": f"{name}_*.jpg", "fov_deg": 100, "pose": pose.tolist()}
    (folder / "rig.yaml").write_text(yaml.safe_dump({"cameras": cameras} | more))
    return folder / "rig.yaml"


RIG = {f"cam{k}": yawed(angle) for k, angle in enumerate((0, 72, 144, 216, 288))}


@pytest.mark.parametrize("axes, convert", [("opencv", lambda pose: pose), ("opengl", blender_to_opencv),
                                           ("flu", opencv_to_forward)])
def test_a_rig_in_named_axes_gives_the_same_cameras(tmp_path, axes, convert):
    frame = load_rig(write_yaml(tmp_path, {name: convert(pose) for name, pose in RIG.items()}, axes=axes))[1]
    assert frame.name == "rig/1" and list(frame.images) == list(RIG)
    for name, pose in RIG.items(): torch.testing.assert_close(frame.cameras[name].camera_to_world, pose.float())


@pytest.mark.parametrize("words, convert", [
    ("forward, y left", opencv_to_forward), ("OpenGL", blender_to_opencv), ("world-to-camera", rigid_inverse),
    ("scaled by 2", lambda pose: pose @ torch.diag(torch.tensor([2.0, 2, 2, 1])).double())])
def test_poses_in_another_convention_are_refused_with_its_name(tmp_path, words, convert):
    poses = {name: convert(pose) for name, pose in RIG.items()}
    message = refusal(load_rig, write_yaml(tmp_path, poses))
    assert words in message and len(message) <= 400
    cameras = {name: camera_from_angle(pose.float(), 8, 6, 1.5) for name, pose in poses.items()}
    assert words in refusal(check_rig, cameras)


WRONG = {"fx of camera": {"fx": -3.0, "fy": 1.0, "cx": 1.0, "cy": 1.0, "fov_deg": None}, "yaw_deg": {"yaw": 3},
         "No picture of camera": {"pictures": "none_*.jpg"}, "pose of camera cam1": {"pose": [[math.nan] * 4] * 4},
         "distortion of camera cam1": {"distortion": {"k9": 1}}}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_entry_of_a_rig_is_named(tmp_path, words):
    path = write_yaml(tmp_path, RIG)
    content = yaml.safe_load(path.read_text())
    content["cameras"]["cam1"] |= WRONG[words]
    path.write_text(yaml.safe_dump(content))
    assert words in refusal(load_rig, path)


def test_a_picture_that_other_cameras_have_is_missing_by_name(tmp_path):
    path = write_yaml(tmp_path, RIG)
    (tmp_path / "cam2_1.jpg").unlink()
    scene = load_rig(path)
    assert [(p.frame, "cam2" in p.message) for p in scene.problems] == [("rig/1", True)]
    assert run_checks(scene, TINY).verdict == "red"


def test_a_distorted_rig_is_undistorted_when_decoded(tmp_path):
    path = write_yaml(tmp_path, RIG)
    ramp = np.tile(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (48, 1, 3))
    Image.fromarray(ramp).save(tmp_path / "cam0_0.jpg", quality=100)
    content = yaml.safe_load(path.read_text())
    plain = load_rig(path)[0].images["cam0"]
    content["cameras"]["cam0"]["distortion"] = {"k1": -.1}
    path.write_text(yaml.safe_dump(content))
    bent = load_rig(path)[0].images["cam0"]
    assert (bent[24, 32] - plain[24, 32]).abs().max() < .02 and (bent[24, 60] - plain[24, 60]).abs().max() > .03


def test_the_real_rig_as_a_yaml_is_the_rig_of_the_reader(tmp_path):
    known = load_opv2v(real_data("opv2v_641_4cam"))
    again = load_rig(write_rig(tmp_path / "rig.yaml", [known[0]]))[0]
    for name, camera in known[0].cameras.items():
        torch.testing.assert_close(again.cameras[name].camera_to_world, camera.camera_to_world, atol=1e-5, rtol=0)


def test_a_rig_is_checked_from_the_command_line(tmp_path):
    path = write_yaml(tmp_path / "rig", RIG)
    done = run_here("run", "panorama_checks", "--data", f"rig:{path}", "-p", "width=64", "-p", "height=16", "-p",
                    "timing=false", "-p", "previews=0", "-p", "frames=1",
                    environment={"KILONB_OUTPUTS": str(tmp_path / "out")})
    assert done.returncode == 0 and "rig/1" in done.stdout and "rig/0:" not in done.stdout, done.stdout + done.stderr
