"""Multi-camera recordings: four layouts are written and read back; each fault of the files ends in one sentence."""
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from scipy.spatial.transform import Rotation

from helpers import real_data
from kilonb.core.errors import KiloError
from kilonb.core.files import write_json
from kilonb.data.manifests import load_manifests
from kilonb.data.registry import find_reader
from kilonb.data.video import write_video
from kilonb.geometry.cameras import DistortedPinholeCamera, orbit_cameras
from kilonb.geometry.colmap import MODELS, ColmapModel, read_colmap, write_colmap
from kilonb.scenes.anipose import read_anipose
from kilonb.scenes.dannce import read_mat_calibration
from kilonb.scenes.multiview import Calibration, check_recording, keypoint_errors, read_recording

WIDTH, HEIGHT, FRAMES = 64, 48, 6
NAMES = ("Camera1", "Camera2", "Camera3")
POINTS = np.random.default_rng(0).uniform(-0.1, 0.1, (2, 3, 3))


def calibrations(distortion=(-0.1, 0.02, 0.001, -0.002)):
    """Three cameras around the origin, lengths in metres."""
    found = {}
    for name, camera in zip(NAMES, orbit_cameras(3, 1.0, 20.0, width=WIDTH, height=HEIGHT)):
        K, pose = camera.K.double().numpy(), camera.world_to_camera.double().numpy()
        K[:2, 2] -= 0.5
        found[name] = Calibration(K, pose[:3, :3], pose[:3, 3], distortion, WIDTH, HEIGHT)
    return found


def picture(number: int, frame: int) -> np.ndarray:
    return np.full((HEIGHT, WIDTH, 3), (60 * number, 30 * frame, 90), np.uint8)


def write_dannce(folder, frames=(FRAMES,) * 3, **changes):
    """cameras.json, videos and masks; lengths in millimetres."""
    entries = []
    for number, (name, one) in enumerate(calibrations().items(), 1):
        write_video(folder / "videos" / f"{name}_500.mp4", (picture(number, k) for k in range(frames[number - 1])), 25)
        entries.append({"camera": name, "video": f"videos/{name}_500.mp4", "width": WIDTH, "height": HEIGHT, "K": one.K,
                        "R": one.R, "t": 1000 * one.t, "dist_k1k2p1p2": one.distortion} | changes.get(name, {}))
        (folder / "masks").mkdir(exist_ok=True)
        for frame in (0, 4): Image.new("L", (WIDTH, HEIGHT), 255).save(folder / "masks" / f"{name}_{frame:04}.png")
    write_json(folder / "cameras.json", {"cameras": entries} | changes.get("json", {}))
    return folder


def write_mats(folder):
    """The same cameras as MATLAB files with their videos and labels."""
    for place in ("calibration_raw", "labels_raw"): (folder / place).mkdir(parents=True, exist_ok=True)
    for number, (name, one) in enumerate(calibrations().items(), 1):
        write_video(folder / "videos" / name / "500.mp4", (picture(number, k) for k in range(FRAMES)), 25)
        K = one.K.copy()
        K[:2, 2] += 1
        savemat(folder / "calibration_raw" / f"hires_cam{number}_params.mat",
                {"K": K.T, "r": one.R.T, "t": 1000 * one.t, "RDistort": one.distortion[:2],
                 "TDistort": one.distortion[2:]})
        pixels = one.project(POINTS.reshape(-1, 3))[0].reshape(2, -1) + 1
        savemat(folder / "labels_raw" / f"hires_cam{number}_data.mat",
                {"data_2d": pixels, "data_3d": 1000 * POINTS.reshape(2, -1), "data_frame": np.uint16([502, 900])})
    return folder


def write_par(folder):
    folder.mkdir(exist_ok=True)
    rows = []
    for number, (name, one) in enumerate(calibrations(()).items()):
        values = [*one.K.ravel(), *one.R.ravel(), *one.t]
        rows.append(f"{name}.png " + " ".join(f"{value:.17g}" for value in values))
        Image.fromarray(picture(number + 1, 5)).save(folder / f"{name}.png")
    (folder / "x_par.txt").write_text("\n".join(["3", *rows, ""]))
    return folder


def write_toml(folder):
    tables = [f'[cam_{number}]\nname = "{number}"\nsize = [{WIDTH}, {HEIGHT}]\nmatrix = {one.K.tolist()}\n'
              f"distortions = {[*one.distortion, 0.0]}\nrotation = {Rotation.from_matrix(one.R).as_rotvec().tolist()}\n"
              f"translation = {(1000 * one.t).tolist()}\n" for number, one in enumerate(calibrations().values(), 1)]
    for number in (1, 2, 3):
        write_video(folder / f"run-cam{number}.mp4", (picture(number, k) for k in range(FRAMES)), 25)
    (folder / "calibration.toml").write_text("\n".join([*tables, "[metadata]\n"]))
    return folder


def write_project(folder):
    cameras = {f"{name}.png": one.camera() for name, one in calibrations().items()}
    model = ColmapModel(cameras, np.zeros((0, 3)), np.zeros((0, 3), np.uint8), np.zeros(0))
    write_colmap(folder / "sparse" / "0", model)
    (folder / "images").mkdir()
    for number, name in enumerate(cameras, 1): Image.fromarray(picture(number, 5)).save(folder / "images" / name)
    return folder


@pytest.mark.parametrize("layout, write", [("dannce", write_dannce), ("dannce", write_mats), ("middlebury", write_par),
                                           ("anipose", write_toml), ("colmap", write_project)])
def test_what_was_written_in_a_layout_is_read_with_the_same_geometry_and_pictures(tmp_path, layout, write):
    recording = read_recording(write(tmp_path / "session"))
    check_recording(recording)
    assert recording.layout == layout and len(recording.names) == 3
    expected = calibrations(() if layout == "middlebury" else calibrations()["Camera1"].distortion)
    for number, (name, one) in enumerate(zip(recording.names, expected.values()), 1):
        found, _ = recording.calibrations[name].project(POINTS.reshape(-1, 3))
        np.testing.assert_allclose(found, one.project(POINTS.reshape(-1, 3))[0], atol=1e-4)       # COLMAP's: float32
        shown = recording.picture(name, recording.frames - 1)
        assert np.abs(shown.mean((0, 1)) - picture(number, 5)[0, 0]).max() < 3                    # H.264


def test_labels_reproject_exactly_and_count_from_the_videos_first_frame(tmp_path):
    recording = read_recording(write_mats(tmp_path / "session"))
    assert max(errors.max() for errors in keypoint_errors(recording).values()) < 1e-9
    assert recording.keypoints.frames.tolist() == [2, 400]
    np.testing.assert_allclose(recording.keypoints.points, POINTS)


def test_matlab_and_json_give_one_camera(tmp_path):
    """K counted from one in the one, from zero in the other; transposed in the one."""
    mats, json_ = read_recording(write_mats(tmp_path / "a")), read_recording(write_dannce(tmp_path / "b"))
    for name in NAMES:
        for part in ("K", "R", "t", "distortion"):
            np.testing.assert_allclose(getattr(mats.calibrations[name], part), getattr(json_.calibrations[name], part))


def test_frames_are_read_in_one_pass_and_masks_where_there_are_some(tmp_path):
    recording = read_recording(write_dannce(tmp_path / "session", json={"masks": "true"}))
    shown = [int(one[..., 1].mean().round()) for one in recording.pictures("Camera2", [0, 2, 5])]
    assert np.abs(np.array(shown) - [0, 60, 150]).max() < 3
    assert recording.mask("Camera2", 4).all() and recording.mask_source == "true"
    with pytest.raises(KiloError, match="no mask of camera Camera2 at frame 1"): recording.mask("Camera2", 1)
    with pytest.raises(KiloError, match="it holds 6"): recording.picture("Camera2", 6)


def cut_video(folder):
    path = folder / "videos" / "Camera2_500.mp4"
    path.write_bytes(path.read_bytes()[:-40])


def one_camera(folder):
    content = json.loads((folder / "cameras.json").read_text())
    write_json(folder / "cameras.json", content | {"cameras": content["cameras"][:1]})


def other_mask(folder): Image.new("L", (WIDTH, HEIGHT + 2)).save(folder / "masks" / "Camera3_0004.png")


def copy_mask(name):
    """A fault that adds a mask file of that name."""
    return lambda folder: shutil.copy(folder / "masks" / "Camera1_0004.png", folder / "masks" / name)


def edit(name, **changes):
    """A fault that changes fields of one camera in cameras.json."""
    def change(folder):
        content = json.loads((folder / "cameras.json").read_text())
        for entry in content["cameras"]: entry.update(changes if entry["camera"] == name else {})
        write_json(folder / "cameras.json", content)
    return change


FAULTS = {"cut video": (cut_video, r"Camera2_500\.mp4.*cut short"),
          "no video": (lambda folder: (folder / "videos" / "Camera1_500.mp4").unlink(), r"no video .*Camera1_500\.mp4"),
          "other mask": (other_mask, r"Camera3_0004\.png has 64 x 50 pixels.*64 x 48"),
          "late mask": (copy_mask("Camera1_6.png"), "mask of frame 6, but .* 6 frames"),
          "mask of an unknown camera": (copy_mask("Camera9_4.png"), "Camera9"),
          "one camera": (one_camera, "1 calibrated camera"),
          "mirrored": (edit("Camera2", R=np.diag([1.0, 1, -1]).tolist()), "Camera2.*mirrors space"),
          "no rotation": (edit("Camera2", R=(2 * np.eye(3)).tolist()), "Camera2.*not rigid"),
          "not finite": (edit("Camera2", t=[0, 0, "nan"]), "Camera2.*not finite"),
          "focal length": (edit("Camera2", K=[[-5, 0, 1], [0, 5, 1], [0, 0, 1]]), "Camera2.*focal lengths -5"),
          "transposed": (edit("Camera3", K=[[50, 0, 0], [0, 50, 0], [32, 24, 1]]), "Camera3.*transpose"),
          "other size": (edit("Camera3", width=2 * WIDTH), "64 x 48 pixels, but camera Camera3 .* 128 x 48"),
          "missing key": (edit("Camera1", K=None), "K of Camera Camera1"),
          "coefficients": (edit("Camera1", dist_k1k2p1p2=[0.1]), "4, 5 or 8 numbers"),
          "outside": (edit("Camera1", video="../elsewhere.mp4"), "expected a path in"),
          "no text": (lambda folder: (folder / "cameras.json").write_text('{"cameras": [{'), "not JSON"),
          "twice": (edit("Camera2", camera="Camera1"), "a name of its own")}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_in_one_sentence(tmp_path, fault):
    folder = write_dannce(tmp_path / "session")
    change, expected = FAULTS[fault]
    change(folder)
    with pytest.raises(KiloError, match=expected) as raised: check_recording(read_recording(folder))
    assert "\n" not in str(raised.value)


def test_a_video_that_is_longer_is_returned_by_the_reader_and_named_by_the_check(tmp_path):
    recording = read_recording(write_dannce(tmp_path / "session", (FRAMES, FRAMES + 41, FRAMES)))
    assert recording.frames == FRAMES and recording.frame_counts["Camera2"] == FRAMES + 41
    with pytest.raises(KiloError, match=r"Camera2 .* has 47 frames and the others 6"): check_recording(recording)


def test_a_left_handed_camera_is_returned_so_that_it_can_be_examined(tmp_path):
    recording = read_recording(write_dannce(tmp_path / "session", Camera2={"R": np.diag([1.0, 1, -1])}))
    assert np.linalg.det(recording.calibrations["Camera2"].R) < 0
    assert np.isfinite(recording.calibrations["Camera2"].project(np.array([[0, 0, -0.5]]))[0]).all()


def test_unknown_layouts_are_refused(tmp_path):
    with pytest.raises(KiloError, match="no calibration of a known layout"): read_recording(tmp_path)
    with pytest.raises(KiloError, match="no folder"): read_recording(tmp_path / "absent")
    with pytest.raises(KiloError, match="did you mean 'dannce'"): read_recording(tmp_path, "danse")
    write_par(write_dannce(tmp_path / "both"))
    with pytest.raises(KiloError, match="dannce and middlebury"): read_recording(tmp_path / "both")
    with pytest.raises(KiloError, match="positive"): read_recording(tmp_path / "both", "dannce", math.nan)


def test_lengths_are_converted_to_metres_by_the_unit_that_is_given(tmp_path):
    folder = write_toml(tmp_path / "session")
    for unit_m in (0.001, 0.01):
        found = read_recording(folder, unit_m=unit_m)
        np.testing.assert_allclose(found.calibrations["1"].t, 1000 * unit_m * calibrations()["Camera1"].t)
        assert found.unit_m == unit_m
    text = (folder / "calibration.toml").read_text()
    (folder / "calibration.toml").write_text(text.replace('name = "2"', 'name = "2"\nfisheye = true'))
    with pytest.raises(KiloError, match="fisheye"): read_anipose(folder)


def test_a_lens_is_honoured_by_the_camera_and_by_the_projection_alike():
    one = replace(calibrations()["Camera1"], distortion=(-0.3, 0.1, 0.002, 0.001, 0.02))
    bent, straight = one.camera(), replace(one, distortion=()).camera()
    pixels, _ = one.project(POINTS[0])
    np.testing.assert_allclose(bent.project(torch.from_numpy(POINTS[0]).float())[0].numpy() - 0.5, pixels, atol=1e-3)
    assert np.abs(straight.project(torch.from_numpy(POINTS[0]).float())[0].numpy() - 0.5 - pixels).max() > 0.02


def colmap_model():
    random = np.random.default_rng(0)
    cameras = {f"{k} ä.png": one for k, one in enumerate(orbit_cameras(4, 2.0))}
    lenses = (0.1, 0.2, 0.0, 0.01), (0.1, 0.2, 0.0, 0.01, 0.3), (0.1, 0, 0, 0, 0.3, 0.01, 0, 0.02)
    for k, lens in enumerate(lenses, 1):
        values = vars(cameras[f"{k} ä.png"])
        cameras[f"{k} ä.png"] = DistortedPinholeCamera(**values, distortion=lens)
    return ColmapModel(cameras, random.normal(size=(9, 3)), random.integers(0, 256, (9, 3), dtype=np.uint8),
                       random.random(9))


def test_a_colmap_model_is_the_same_as_text_and_binary_and_after_another_round(tmp_path):
    model = colmap_model()
    first = {binary: read_colmap(write_colmap(tmp_path / f"{binary}", model, binary)) for binary in (True, False)}
    again = read_colmap(write_colmap(tmp_path / "again", first[True], False))
    for name, camera in model.cameras.items():
        torch.testing.assert_close(first[True].cameras[name].camera_to_world, camera.camera_to_world)
        for other in (first[False], again):
            found, expected = other.cameras[name], first[True].cameras[name]
            assert (found.fx, found.fy, found.cx, found.cy) == (camera.fx, camera.fy, camera.cx, camera.cy)
            torch.testing.assert_close(found.camera_to_world, expected.camera_to_world, rtol=0, atol=1e-6)
    lens = [tuple(getattr(one, "distortion", ())) for one in first[True].cameras.values()]
    assert lens[:2] == [(), (0.1, 0.2, 0.0, 0.01)] and lens[2][:5] == (0.1, 0.2, 0.0, 0.01, 0.3) and len(lens[3]) == 8
    for other in (*first.values(), again):
        assert np.array_equal(other.points, model.points) and np.array_equal(other.errors, model.errors)
        assert np.array_equal(other.colours, model.colours)


@pytest.mark.parametrize("name", ["cameras.bin", "images.bin", "points3D.bin"])
def test_a_binary_model_cut_at_any_byte_is_named(tmp_path, name):
    folder = write_colmap(tmp_path / "model", colmap_model())
    whole = (folder / name).read_bytes()
    for length in range(0, len(whole), 3):
        (folder / name).write_bytes(whole[:length])
        with pytest.raises(KiloError, match=name): read_colmap(folder)


def test_a_count_beyond_the_file_takes_no_memory(tmp_path):
    folder = write_colmap(tmp_path / "model", colmap_model())
    for name in ("cameras.bin", "images.bin", "points3D.bin"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes((2**62).to_bytes(8, "little") + whole[8:])
        with pytest.raises(KiloError, match="cut short"): read_colmap(folder)
        (folder / name).write_bytes(whole)


@pytest.mark.parametrize("model, values, lens", [
    ("SIMPLE_PINHOLE", (50, 31, 23), ()), ("PINHOLE", (50, 51, 31, 23), ()),
    ("SIMPLE_RADIAL", (50, 31, 23, .1), (.1, 0, 0, 0)), ("RADIAL", (50, 31, 23, .1, .2), (.1, .2, 0, 0)),
    ("OPENCV", (50, 51, 31, 23, .1, .2, .3, .4), (.1, .2, .3, .4)),
    ("FULL_OPENCV", (50, 51, 31, 23, .1, .2, .3, .4, .5, .6, .7, .8), (.1, .2, .3, .4, .5, .6, .7, .8))])
def test_every_pinhole_model_of_colmap_is_read(tmp_path, model, values, lens):
    (tmp_path / "cameras.txt").write_text(f"1 {model} 64 48 {' '.join(map(str, values))}\n")
    (tmp_path / "images.txt").write_text("1 1 0 0 0 0 0 2 1 a.png\n\n")
    (tmp_path / "points3D.txt").write_text("# none\n")
    camera = read_colmap(tmp_path).cameras["a.png"]
    assert (camera.fx, camera.cx, camera.cy) == (50, 31, 23) and getattr(camera, "distortion", ()) == lens
    assert MODELS[model].parameters == len(values)
    for wide in ("THIN_PRISM_FISHEYE", "FOV"):
        (tmp_path / "cameras.txt").write_text(f"1 {wide} 64 48 {' '.join(map(str, values))}\n")
        with pytest.raises(KiloError, match=f"{wide}.* is not supported"): read_colmap(tmp_path)


def test_the_real_mouse_s_labels_reproject_without_error_into_all_five_cameras():
    folder = real_data("mouse_dannce_cylinder_5cam")
    recording = find_reader(load_manifests()["mouse_dannce"].loader)(folder)
    check_recording(recording)
    assert recording.frames == 2758 and recording.fps == pytest.approx(120) and recording.mask_source == "derived"
    errors = keypoint_errors(recording)
    assert len(errors) == 5 and all(np.isfinite(one).sum() == 399 for one in errors.values())
    assert max(np.nanmax(one) for one in errors.values()) < 5e-5, "0.0000 px"
    assert all(len(files) == 22 for files in recording.mask_files.values())
    for name, one in recording.calibrations.items():
        number = {"R": 1, "L": 2, "E": 3, "U": 4, "S": 5}[name[-1]]
        raw = read_mat_calibration(folder / "calibration_raw" / f"cam{number}_params.mat", 1328, 1048)
        for part in ("K", "R", "t", "distortion"): np.testing.assert_allclose(getattr(raw, part), getattr(one, part))


def test_the_real_mouse_is_in_front_of_all_cameras_where_its_masks_are():
    """The rays through the masks' centres meet within 5 mm of one point: a mirrored or swapped camera would not."""
    recording = read_recording(real_data("mouse_dannce_cylinder_5cam"))
    origins, directions = [], []
    for name, camera in recording.cameras.items():
        rows, columns = np.nonzero(recording.mask(name, 1095))
        centre = torch.tensor([[columns.mean() + 0.5, rows.mean() + 0.5]], dtype=torch.float32)
        origins.append(camera.position.numpy())
        directions.append(camera.directions(centre)[0].numpy())
        assert np.abs(recording.picture(name, 1095)[rows, columns].mean() - recording.picture(name, 1095).mean()) > 10
    normals = [np.eye(3) - np.outer(one, one) for one in np.array(directions, float)]
    point = np.linalg.solve(sum(normals), sum(normal @ origin for normal, origin in zip(normals, origins)))
    distances = [np.linalg.norm(normal @ (point - origin)) for normal, origin in zip(normals, origins)]
    assert max(distances) < 0.005


def test_the_real_dino_s_silhouettes_lie_in_its_published_bounding_box():
    """The box of the set's README, which the reader does not use; silhouettes are 3 pixels too wide by the recipe."""
    recording = find_reader(load_manifests()["middlebury_dino"].loader)(real_data("middlebury_dinoSparseRing"))
    check_recording(recording)
    low, high = np.array([-0.061897, -0.018874, -0.057845]), np.array([0.010897, 0.068227, 0.015495])
    corners = np.stack(np.meshgrid(*zip(low, high)), -1).reshape(-1, 3)
    assert len(recording.names) == 16 and len(recording.mask_files) == 15
    for name in recording.mask_files:
        pixels, _ = recording.calibrations[name].project(corners)
        rows, columns = np.nonzero(recording.mask(name, 0))
        found = np.stack([columns, rows], -1)
        outside = ((found < pixels.min(0) - 4) | (found > pixels.max(0) + 4)).any(1).mean()
        assert outside < 0.002 and len(found) > 20_000
