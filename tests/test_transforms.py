"""Cameras and pictures as users have them: transforms.json in all its dialects, COLMAP, masks or none, far origins,
scenes in other units, and what is said where the data is of another kind."""
import json
import math
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kilonb.core.errors import KiloError
from kilonb.core.testing import expect_error
from kilonb.data.references import resolve_data
from kilonb.distill.data import find_teacher, open_distillation_data
from kilonb.distill.single_view import load_single_view
from kilonb.distill.space import check_scale
from kilonb.fields.occupancy import OccupancyGrid
from kilonb.geometry.cameras import DistortedPinholeCamera, PinholeCamera, orbit_cameras
from kilonb.geometry.colmap import ColmapModel, write_colmap
from kilonb.geometry.fisheye import FisheyeCamera
from kilonb.scenes.blender import load_blender, write_blender
from kilonb.scenes.photographs import open_views, points_of_scene
from kilonb.splats.fit_config import FitConfig
from tests.helpers import run_here

WIDTH, HEIGHT, FOCAL = 40, 30, 45.0


def ball(camera, radius: float = 0.8) -> torch.Tensor:
    """The picture of a ball at the origin, coloured by direction, straight alpha, as any camera takes it."""
    rays = camera.rays()
    nearest = -(rays.origins * rays.directions).sum(-1)
    miss = (rays.origins + nearest[:, None] * rays.directions).norm(dim=-1)
    hit = (miss < radius) & (nearest > 0)
    depth = nearest - (radius**2 - miss**2).clamp(min=0).sqrt()
    colour = (rays.at(depth) / radius + 1) / 2
    return torch.cat([colour * hit[:, None], hit[:, None].float()], -1).unflatten(0, (camera.height, camera.width))


def cameras(count: int = 6) -> list[PinholeCamera]:
    found = orbit_cameras(count, 4.0, 20.0, width=WIDTH, height=HEIGHT)
    return [PinholeCamera(c.camera_to_world, FOCAL, FOCAL, WIDTH / 2, HEIGHT / 2, WIDTH, HEIGHT) for c in found]


@pytest.fixture
def scene(tmp_path) -> Path:
    """Six views of a ball without a test split."""
    views = cameras()
    write_blender(tmp_path / "ball", "train", views, [ball(camera) for camera in views])
    return tmp_path / "ball"


def edit(folder: Path, change, name: str = "transforms_train.json", encoding: str = "utf-8") -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content), encoding=encoding)


def first(folder: Path) -> PinholeCamera: return load_blender(folder)[0].camera


def only(content: dict, **keys) -> None:
    """Removes all intrinsics of the file and sets those given."""
    for key in ("camera_angle_x", "fl_x", "fl_y", "cx", "cy", "w", "h"): content.pop(key, None)
    content.update(keys)


ANGLE = {"camera_angle_x": 2 * math.atan(WIDTH / 2 / FOCAL)}
INTRINSICS = [
    (ANGLE, {}, (45, 45, 20, 15)),
    ({"camera_angle_y": 2 * math.atan(HEIGHT / 2 / 30)}, {}, (30, 30, 20, 15)),
    (ANGLE | {"camera_angle_y": 2 * math.atan(HEIGHT / 2 / 30)}, {}, (45, 30, 20, 15)),
    (ANGLE | {"fl_x": 50}, {}, (50, 50, 20, 15)),
    (ANGLE, {"camera_angle_x": 2 * math.atan(WIDTH / 2 / 90)}, (90, 90, 20, 15)),
    ({}, {"fl_x": 50, "fl_y": 40, "cx": 19, "cy": 14, "w": 40, "h": 30}, (50, 40, 19, 14)),
    ({"fl_x": 90, "fl_y": 45}, {"fl_x": 50}, (50, 25, 20, 15)),
    ({"fl_x": 180, "fl_y": 176, "cx": 82, "cy": 60, "w": 160, "h": 120}, {}, (45, 44, 20.5, 15)),
    ({"fl_x": 181, "w": 161, "h": 121}, {}, (181 * 40 / 161, 181 * 30 / 121, 20, 15)),
    ({"fl_x": 180, "w": 160, "h": 120}, {"fl_x": 200}, (50, 50, 20, 15)),
    ({"camera_model": "OPENCV", "k1": 0, "k2": 0.0, "p1": 0, "fl_x": 45}, {}, (45, 45, 20, 15))]


@pytest.mark.parametrize(("file", "frame", "expected"), INTRINSICS)
def test_every_intrinsic_key_is_honoured_and_a_frame_s_own_value_wins(scene, file, frame, expected):
    def change(content):
        only(content, **file)
        for entry in content["frames"]: entry.update(frame)
    edit(scene, change)
    camera = first(scene)
    assert (camera.fx, camera.fy, camera.cx, camera.cy) == pytest.approx(expected, rel=1e-12)


REFUSED = [({}, "neither"), (ANGLE | {"w": 80}, "'w' is 80"), (ANGLE | {"w": 80, "h": 80}, "40x30"),
           ({"fl_x": 45, "cx": 128, "cy": 100}, "outside of pictures"), ({"fl_x": 45, "cx": -3}, "outside of pictures"),
           (ANGLE | {"camera_model": "EQUIRECTANGULAR"}, "EQUIRECTANGULAR"),
           (ANGLE | {"camera_model": 3}, "camera model"),
           (ANGLE | {"is_fisheye": "yes"}, "is_fisheye"), (ANGLE | {"k4": 0.1}, "'k4'"), (ANGLE | {"k1": "x"}, "'k1'"),
           (ANGLE | {"is_fisheye": True, "p1": 0.1}, "'p1'"), ({"camera_angle_y": 39.6}, "degrees"),
           ({"fl_y": -4}, "'fl_y'")]


@pytest.mark.parametrize(("keys", "word"), REFUSED)
def test_intrinsics_that_cannot_be_right_are_refused_by_name(scene, keys, word):
    edit(scene, lambda content: only(content, **keys))
    message = expect_error(load_blender, scene)
    assert word in message and len(message) <= 400 and "\n" not in message


def test_a_frame_s_own_wrong_value_is_refused_with_the_frame(scene):
    edit(scene, lambda content: content["frames"][2].update(fl_x="wide"))
    assert "frame 2" in expect_error(load_blender, scene)


LENSES = [({"k1": -0.2, "k2": 0.05, "p1": 0.002, "p2": -0.001}, DistortedPinholeCamera,
           (-0.2, 0.05, 0.002, -0.001, 0.0)),
          ({"is_fisheye": True, "k1": 0.05, "k2": -0.01}, FisheyeCamera, (0.05, -0.01, 0.0, 0.0)),
          ({"camera_model": "OPENCV_FISHEYE", "k1": -0.05, "k4": 0.01}, FisheyeCamera, (-0.05, 0.0, 0.0, 0.01))]


@pytest.mark.parametrize(("keys", "kind", "coefficients"), LENSES)
def test_distorted_pictures_become_the_pictures_of_a_pinhole(tmp_path, keys, kind, coefficients):
    """The ball as the distorted camera takes it, undistorted, is the ball as the pinhole takes it, but for the rim."""
    flat = [PinholeCamera(c.camera_to_world, FOCAL, FOCAL, 60, 45, 120, 90) for c in cameras(3)]
    write_blender(tmp_path, "train", flat, [ball(kind(*vars(c).values(), coefficients), 2.2) for c in flat])
    edit(tmp_path, lambda content: content.update(keys))
    with pytest.warns(UserWarning, match="undistorted"): frame = load_blender(tmp_path)[1]
    assert isinstance(frame.source_camera, kind) and isinstance(frame.camera, PinholeCamera)
    found, wanted = frame.rgba_straight(), ball(flat[1], 2.2)
    inside = (found[..., 3] == 1) & (wanted[..., 3] == 1)
    assert ((found[..., 3] > .5) == (wanted[..., 3] > .5)).float().mean() > .985
    assert (found - wanted)[inside].abs().max() < .03
    as_taken = ball(kind(*vars(flat[1]).values(), coefficients), 2.2)
    assert ((as_taken[..., 3] > .5) == (wanted[..., 3] > .5)).float().mean() < .97, "the lens matters here"


def test_views_of_one_split_may_differ_in_size_where_the_file_says_so(tmp_path):
    small, large = (PinholeCamera(c.camera_to_world, s * FOCAL, s * FOCAL, s * 20, s * 15, s * 40, s * 30)
                    for c, s in zip(cameras(2), (1, 2)))
    write_blender(tmp_path, "train", [small], [ball(small)])
    write_blender(tmp_path, "more", [large], [ball(large)])
    extra = json.loads((tmp_path / "transforms_more.json").read_text())["frames"]
    edit(tmp_path, lambda content: content["frames"].extend(extra))
    assert "same size" in expect_error(load_blender, tmp_path)
    edit(tmp_path, lambda content: content["frames"][1].update(fl_x=90, w=80, h=60))
    one, two = load_blender(tmp_path)
    assert (one.camera.width, two.camera.width, two.camera.fx) == (40, 80, 90)


@pytest.mark.parametrize("write", [r".\train\r_{}.png", r"train\r_{}", "./train/../train/r_{}.png", "train/R_{}.PNG",
                                   "{root}/train/r_{}.png"])
def test_a_picture_is_found_however_its_path_is_written(scene, write):
    edit(scene, lambda content: [entry.update(file_path=write.format(i, root=scene))
                                 for i, entry in enumerate(content["frames"])], encoding="utf-8-sig")
    assert load_blender(scene)[3].rgba_straight()[..., 3].max() == 1


@pytest.mark.parametrize("ending", ["PNG", "webp", "tif", "TIFF"])
def test_a_picture_of_another_ending_is_found_without_it(scene, ending):
    for path in (scene / "train").iterdir():
        with Image.open(path) as picture: picture.save(path.with_suffix("." + ending), lossless=True)
        path.unlink()
    assert load_blender(scene)[0].image_path.name == f"r_0.{ending}"
    assert load_blender(scene)[0].name == "train/r_0"


def test_a_missing_picture_names_its_neighbour(scene):
    (scene / "train/r_1.png").rename(scene / "train/r_1.gif")
    assert "r_1.gif is there" in expect_error(load_blender, scene)


def test_matrices_of_three_rows_and_bytes_behind_the_end_of_a_png_are_read(scene):
    edit(scene, lambda content: [entry["transform_matrix"].pop() for entry in content["frames"]])
    with open(scene / "train/r_0.png", "ab") as file: file.write(bytes(3000))
    assert torch.equal(first(scene).camera_to_world, cameras()[0].camera_to_world)
    whole = (scene / "train/r_1.png").read_bytes()
    (scene / "train/r_1.png").write_bytes(whole[:-12])
    assert "truncated" in expect_error(load_blender, scene)


def test_sixteen_bits_of_a_picture_are_kept(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (HEIGHT, WIDTH, 4), dtype=np.uint16)
    write_blender(tmp_path, "train", cameras(1), [torch.zeros(HEIGHT, WIDTH, 4)])
    rows = b"".join(b"\2" + (row.astype(">u2").view(np.uint8) - above.astype(">u2").view(np.uint8)).tobytes()
                    for row, above in zip(values, [0 * values[0], *values]))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 6, 0, 0, 0)), (b"IDAT", zlib.compress(rows)),
              (b"IEND", b"")]
    packed = [struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
              for kind, body in chunks]
    (tmp_path / "train/r_0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))
    assert np.abs(load_blender(tmp_path)[0].rgba_straight().numpy() - values / 65535).max() < 1e-6


def test_a_moving_scene_is_named_in_python_and_on_the_command_line(scene, capsys):
    edit(scene, lambda content: [entry.update(time=.1 * i) for i, entry in enumerate(content["frames"])])
    with pytest.warns(UserWarning, match="6 different values of 'time'"): load_blender(scene)
    views = open_views("blender", scene)
    assert "moving scene" in capsys.readouterr().out and any("moving scene" in note for note in views.notes)


def test_keys_that_change_nothing_are_read_in_silence_and_others_are_named(scene, recwarn):
    edit(scene, lambda content: content.update(aabb_scale=16, applied_transform=[[1, 0, 0, 0]] * 3, scale=1))
    edit(scene, lambda content: [entry.update(sharpness=3.0, colmap_im_id=4) for entry in content["frames"]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_blender(scene)
    edit(scene, lambda content: content["frames"][0].update(depth_file_path="d.png"))
    with pytest.warns(UserWarning, match="depth_file_path"): load_blender(scene)


# Splits


def test_training_views_are_held_out_where_there_is_no_test_split(scene, capsys):
    train, test = (open_views("blender", scene, split, hold_out=3) for split in ("train", "test"))
    assert [view.name for view in test] == ["train/r_0", "train/r_3"]
    assert not {view.name for view in train} & {view.name for view in test} and len(train) + len(test) == 6
    assert "held out" in capsys.readouterr().out


@pytest.mark.parametrize("frames", [[], "none of its pictures"])
def test_a_test_split_that_shows_nothing_is_replaced_by_the_rule(scene, frames):
    content = json.loads((scene / "transforms_train.json").read_text())
    if frames: frames = [{**entry, "file_path": f"./test/r_{i}"} for i, entry in enumerate(content["frames"])]
    (scene / "transforms_test.json").write_text(json.dumps(content | {"frames": frames}))
    assert len(open_views("blender", scene, "test")) == 1 and len(open_views("blender", scene)) == 5


def test_a_test_split_with_pictures_is_taken_as_it_is_and_a_gap_in_it_is_named(scene):
    views = cameras(3)
    write_blender(scene, "test", views, [ball(camera) for camera in views])
    assert [view.name for view in open_views("blender", scene, "test")] == [f"test/r_{i}" for i in range(3)]
    assert len(open_views("blender", scene)) == 6
    (scene / "test/r_1.png").unlink()
    assert "r_1.png" in expect_error(open_views, "blender", scene, "test")


@pytest.mark.parametrize("kind", ["blender", "nerfstudio"])
def test_one_transforms_json_is_split_by_the_rule_or_by_its_lists(scene, kind):
    (scene / "transforms_train.json").rename(scene / "transforms.json")
    assert [view.name for view in open_views(kind, scene, "test", hold_out=4)] == ["train/r_0", "train/r_4"]
    names = [f"./train/r_{i}" for i in range(6)]
    edit(scene, lambda content: content.update(train_filenames=names[:4], test_filenames=names[5:]), "transforms.json")
    assert [view.name for view in open_views(kind, scene, "test")] == ["train/r_5"]
    assert len(open_views(kind, scene)) == 4
    assert "kilonb.open_views" in expect_error(load_blender, scene)


def test_a_single_frame_is_a_training_view_and_no_rule_takes_all(tmp_path):
    write_blender(tmp_path, "train", cameras(1), [ball(cameras(1)[0])])
    assert (len(open_views("blender", tmp_path)), len(open_views("blender", tmp_path, "test"))) == (1, 0)
    assert "hold_out" in expect_error(lambda: open_views("blender", tmp_path, hold_out=1))


# Masks


def test_alpha_that_is_one_everywhere_is_no_mask(tmp_path):
    for split in ("train", "test"): write_blender(tmp_path, split, cameras(3), [torch.ones(HEIGHT, WIDTH, 4)] * 3)
    for call in (lambda: open_views("blender", tmp_path), lambda: load_single_view(tmp_path, voxels=16),
                 lambda: open_distillation_data("blender", tmp_path, tmp_path / "run")):
        message = expect_error(call)
        assert "no mask" in message and "masks=none" in message and len(message) <= 400
    views = open_views("blender", tmp_path, masks="none")
    assert not views[0].masked and (views[0].rgba_straight()[..., 3] == 1).all()
    assert not open_views("nerfstudio", tmp_path)[0].masked


def test_pictures_without_alpha_are_photographs_only_where_that_is_said(scene):
    for path in (scene / "train").iterdir():
        with Image.open(path) as picture: picture.convert("RGB").save(path)
    assert "masks=none" in expect_error(open_views, "blender", scene)
    assert not open_views("blender", scene, masks="none")[0].masked and not open_views("nerfstudio", scene)[0].masked


def test_a_mask_file_takes_the_place_of_alpha(scene):
    for index, path in enumerate(sorted((scene / "train").iterdir())):
        with Image.open(path) as picture:
            mask = np.asarray(picture)[..., 3] > 127
            Image.fromarray((mask * (255 if index else 1)).astype(np.uint8)).save(scene / f"mask_{index}.png")
            picture.convert("RGB").save(path)
    edit(scene, lambda content: [entry.update(mask_path=f"mask_{i}.png") for i, entry in enumerate(content["frames"])])
    views = open_views("blender", scene, hold_out=0)
    for view, camera in zip(views, cameras()):
        assert view.masked and torch.equal(view.rgba_straight()[..., 3] > .5, ball(camera)[..., 3] > .5)
    (scene / "mask_2.png").unlink()
    assert "mask_2.png" in expect_error(open_views, "blender", scene, hold_out=0)


def test_empty_training_views_are_left_out_by_name_and_empty_test_views_stay(tmp_path, capsys):
    views = cameras(6)
    write_blender(tmp_path, "train", views, [ball(camera) * (i not in (1, 4)) for i, camera in enumerate(views)])
    write_blender(tmp_path, "test", views[:2], [ball(views[0]), torch.zeros(HEIGHT, WIDTH, 4)])
    assert [view.name for view in open_views("blender", tmp_path)] == [f"train/r_{i}" for i in (0, 2, 3, 5)]
    assert "train/r_1, train/r_4" in capsys.readouterr().out and len(open_views("blender", tmp_path, "test")) == 2
    write_blender(tmp_path / "none", "train", views, [torch.zeros(HEIGHT, WIDTH, 4)] * 6)
    assert "show no object" in expect_error(open_views, "blender", tmp_path / "none")


# Origins and units


def moved(folder: Path, shift: list[float], factor: float = 1.0) -> None:
    def change(content):
        for entry in content["frames"]:
            for row, offset in zip(entry["transform_matrix"], shift): row[3] = factor * row[3] + offset
    edit(folder, change)


def test_poses_in_utm_are_moved_near_the_origin_before_they_lose_digits(scene, capsys):
    near = [view.camera for view in load_blender(scene)]
    moved(scene, [452_000.123, 4_611_000.456, 31.5])
    views = open_views("blender", scene, hold_out=0)
    assert "shifted" in capsys.readouterr().out
    offset = torch.from_numpy(np.array([452_000.123, 4_611_000.456, 31.5]) - views.world_shift).float()
    for view, camera in zip(views, near):
        assert (view.camera.position - camera.position - offset).abs().max() < 1e-4
    with pytest.warns(UserWarning, match="shifted"): again = load_blender(scene)
    assert np.array_equal(again.world_shift, views.world_shift)
    test = open_views("blender", scene, "test")
    assert np.array_equal(test.world_shift, views.world_shift), "both splits are in one frame"


def test_a_space_in_millimetres_or_hundredths_is_met_before_memory_is_taken(scene):
    moved(scene, [0, 0, 0], 1000)
    view = load_single_view(scene, voxels=24)
    message = expect_error(check_scale, view.grid, 0.01, 0.15)
    assert all(word in message for word in ("m wide", "march_step_m=0.01", "cell_size_m=0.15", "networks"))
    tiny = OccupancyGrid(view.grid.box * 1e-6, view.grid.occupied)
    assert "march_step_m" in expect_error(check_scale, tiny, 0.01, 0.15)
    check_scale(OccupancyGrid(view.grid.box * 1e-3, view.grid.occupied), 0.01, 0.15)


def test_the_command_says_it_in_one_sentence(scene, tmp_path):
    moved(scene, [0, 0, 0], 1000)
    done = run_here("run", "single_view_overfit", "--data", f"blender:{scene}", "--out", tmp_path / "run",
                    "-p", "steps=2", "-p", "rays=16", "-p", "occupancy_resolution=24")
    assert done.returncode == 1 and "m wide" in done.stderr and "networks" in done.stderr, done.stderr


# COLMAP


@pytest.fixture
def project(tmp_path) -> Path:
    """A COLMAP project of eight distorted photographs in a subfolder, with points and without masks."""
    folder, lens = tmp_path / "project", (-0.1, 0.0, 0.0, 0.0)
    views = {f"left/{i}.png": DistortedPinholeCamera(*vars(c).values(), lens) for i, c in enumerate(cameras(8))}
    points = torch.nn.functional.normalize(torch.randn(30, 3, generator=torch.Generator().manual_seed(0)), dim=-1) * 0.8
    model = ColmapModel(views, points.double().numpy(), np.full((30, 3), 51, np.uint8), np.full(30, -1.0))
    write_colmap(folder / "sparse" / "0", model, binary=False)
    (folder / "images/left").mkdir(parents=True)
    for name, camera in views.items():
        Image.fromarray((ball(camera)[..., :3] * 255).byte().numpy()).save(folder / "images" / name)
    return folder


def test_a_colmap_project_is_opened_as_photographs_with_points(project):
    train, test = (open_views("colmap", project, split, hold_out=4) for split in ("train", "test"))
    assert [view.name for view in test] == ["left/0", "left/4"] and len(train) == 6
    assert all(view.source_camera is not None and not view.masked for view in train)
    xyz, rgb = points_of_scene("colmap", project)
    assert xyz.shape == (30, 3) and np.allclose(rgb, 0.2)
    picture = train[0].rgba_straight()
    pixels = train[0].camera.project(torch.from_numpy(xyz))[0].long()
    lit = picture[pixels[:, 1].clamp(0, HEIGHT - 1), pixels[:, 0].clamp(0, WIDTH - 1), :3].sum(-1) > 0
    assert lit.float().mean() > .9, "points on the ball fall on its picture"


def test_masks_beside_a_colmap_project_are_used_where_they_are(project):
    for index in range(8):
        path = project / "masks" / "left" / (f"{index}.png.png" if index % 2 else f"{index}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(project / f"images/left/{index}.png") as picture:
            picture.convert("L").point(lambda value: 255 * (value > 0)).save(path)
    assert all(view.masked for view in open_views("colmap", project))
    assert not open_views("colmap", project, masks="none")[0].masked
    for index in range(4): next((project / "masks" / "left").glob(f"{index}.*")).unlink()
    assert sorted({view.masked for view in open_views("colmap", project, hold_out=0)}) == [False, True]
    assert "masks=none" in expect_error(lambda: open_views("colmap", project, masks="required", hold_out=0))


def test_missing_pictures_unknown_models_and_other_sizes_are_named(project):
    picture = project / "images/left/3.png"
    kept = picture.read_bytes()
    picture.unlink()
    assert "1 of the 8" in expect_error(open_views, "colmap", project) and "left/3.png" in expect_error(
        open_views, "colmap", project)
    Image.new("RGB", (50, 50)).save(picture)
    assert "another proportion" in expect_error(open_views, "colmap", project)
    picture.write_bytes(kept)
    text = (project / "sparse/0/cameras.txt").read_text()
    (project / "sparse/0/cameras.txt").write_text(text.replace(" OPENCV ", " THIN_PRISM_FISHEYE "))
    assert "THIN_PRISM_FISHEYE" in expect_error(open_views, "colmap", project)


def test_pictures_smaller_than_the_model_scale_its_cameras(project):
    for path in (project / "images/left").iterdir():
        with Image.open(path) as picture: picture.resize((20, 15)).save(path)
    assert open_views("colmap", project)[0].camera.fx == FOCAL / 2


def test_the_largest_of_several_models_is_read_and_said(project, capsys):
    part = {f"left/{i}.png": camera for i, camera in enumerate(cameras(2))}
    (project / "sparse/0").rename(project / "sparse/1")
    write_colmap(project / "sparse/0", ColmapModel(part, np.zeros((0, 3)), np.zeros((0, 3), np.uint8), np.zeros(0)))
    assert len(open_views("colmap", project, hold_out=0)) == 8 and "largest of 2 models" in capsys.readouterr().out


def test_a_project_in_utm_and_its_points_are_moved_together(project, tmp_path):
    near, far = points_of_scene("colmap", project)[0], np.array([452_000.0, 5_411_000.0, 30.0])
    views = {f"left/{i}.png": c for i, c in enumerate(cameras(8))}
    for name, camera in views.items():
        pose = camera.camera_to_world.double()
        left, _, right = torch.linalg.svd(pose[:3, :3])          # exactly a rotation: the origin is 5,000 km away
        pose[:3, :3], pose[:3, 3] = left @ right, pose[:3, 3] + torch.from_numpy(far)
        views[name] = PinholeCamera(pose, *list(vars(camera).values())[1:])
    (project / "sparse").rename(project / "old")
    write_colmap(project / "sparse/0", ColmapModel(views, near + far, np.zeros((30, 3), np.uint8), np.full(30, -1.0)))
    scene = open_views("colmap", project, hold_out=0)
    offset = far - scene.world_shift
    assert np.abs(points_of_scene("colmap", project)[0] - near - offset).max() < 1e-3
    assert (scene[2].camera.position - cameras(8)[2].position - torch.from_numpy(offset)).abs().max() < 1e-3


def test_a_teacher_is_fitted_to_a_nerfstudio_folder(scene, tmp_path):
    (scene / "transforms_train.json").rename(scene / "transforms.json")
    data = open_distillation_data("nerfstudio", scene, tmp_path / "run", hold_out=3,
                                  fit=FitConfig(steps=40, initial_count=300, maximum_count=400))
    assert (len(data.train), len(data.test)) == (4, 2) and data.fit_s > 0


# What is said of the wrong kind of data


def test_the_wrong_kind_of_data_is_said_to_be_the_wrong_kind(scene, project, tmp_path, monkeypatch):
    (tmp_path / "a.ply").write_bytes(b"ply\nformat ascii 1.0\n")
    cases = [(f"blender:{tmp_path}/a.ply", f"write ply:{tmp_path}/a.ply"), (f"ply:{scene}", f"write blender:{scene}"),
             (f"blender:{project}", f"write colmap:{project}"), (f"colmap:{scene}", f"write blender:{scene}"),
             (f"{tmp_path}/a.ply", f"write ply:{tmp_path}/a.ply"), (str(project), f"write colmap:{project}"),
             (f"blender:{scene}/transforms_train.json", f"write blender:{scene}"),
             (f"ply:{tmp_path}/no.ply", "is not there")]
    for text, words in cases:
        message = expect_error(resolve_data, text)
        assert words in message and len(message) <= 400, message
        assert words == "is not there" or "is not there" not in message
    assert resolve_data(f"nerfstudio:{scene}").kind == "nerfstudio"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_data("blender:~/ball").path == scene.resolve()
    assert "write ply:~/a.ply" in expect_error(resolve_data, "~/a.ply")
    assert find_teacher(scene, "~/a.ply") == tmp_path / "a.ply"


def test_a_git_lfs_pointer_is_named_wherever_it_stands(scene):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 12345\n"
    (scene / "a.ply").write_text(pointer)
    (scene / "train/r_2.png").write_text(pointer)
    for call in (lambda: resolve_data(f"ply:{scene}/a.ply"), lambda: load_blender(scene)):
        assert "Git-LFS pointer" in expect_error(call)
    (scene / "transforms_train.json").write_text(pointer)
    with pytest.raises(KiloError, match="Git-LFS pointer"): load_blender(scene)
