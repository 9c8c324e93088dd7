"""Inputs as other programs and people write them: each is read with the right value, or refused in one true sentence
that names the cause and a way out."""
import gzip
import io
import json
import math
import struct
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kilonb.batch.sweeps import plan_sweep
from kilonb.core.documents import parse_json, parse_yaml
from kilonb.core.errors import KiloError
from kilonb.core.testing import expect_error
from kilonb.data.references import rig_digest
from kilonb.geometry.cameras import PinholeCamera
from kilonb.geometry.colmap import ColmapModel, write_colmap
from kilonb.geometry.transforms import look_at
from kilonb.scenes.pandaset import load_surround_frames
from kilonb.scenes.pcd import pcd_positions, read_pcd_fields
from kilonb.scenes.photographs import open_views, points_of_scene
from kilonb.splats.formats import read_gaussians
from kilonb.splats.gaussians import Gaussians
from kilonb.splats.ply import write_ply
from kilonb.splats.spz import write_spz

WIDTH, HEIGHT = 24, 16


def poses(count: int = 6) -> list[np.ndarray]:
    """Matrices of cameras around the origin, in the axes of a transforms file (OpenGL's)."""
    eyes = [torch.tensor([4 * math.cos(i), 4 * math.sin(i), 1.5], dtype=torch.float64) for i in range(count)]
    zero, up = torch.zeros(3, dtype=torch.float64), torch.tensor([0.0, 0, 1], dtype=torch.float64)
    return [look_at(eye, zero, up).numpy() * [1, -1, -1, 1] for eye in eyes]


def picture(width: int = WIDTH, height: int = HEIGHT, alpha: int = 255) -> Image.Image:
    pixels = np.zeros((height, width, 4), np.uint8)
    pixels[4:-4, 4:-4] = [200, 100, 50, alpha]
    return Image.fromarray(pixels)


def scene(folder: Path, *, ending: str = ".png", save=None, edit=None, name: str = "transforms.json", **keys) -> Path:
    """A folder of six posed pictures. save: writes a picture to a path. edit: changes the values of the file."""
    (folder / "train").mkdir(parents=True)
    frames = []
    for i, pose in enumerate(poses()):
        path = folder / "train" / f"r_{i}{ending}"
        save(picture(), path) if save else picture().save(path)
        frames.append({"file_path": f"train/r_{i}{ending}", "transform_matrix": pose.tolist()})
    values = {"camera_angle_x": 0.7, "frames": frames, **keys}
    if edit: edit(values, folder)
    (folder / name).write_text(json.dumps(values))
    return folder


def matrices(change):
    """An edit of `scene` that replaces each matrix by `change(matrix)`."""
    def edit(values, folder):
        for entry in values["frames"]: entry["transform_matrix"] = change(np.array(entry["transform_matrix"]))
    return edit


def renamed(new):
    """An edit of `scene` that replaces each file path by `new(path, folder)`."""
    def edit(values, folder):
        for entry in values["frames"]: entry["file_path"] = new(entry["file_path"], folder)
    return edit


def accented(values, folder):
    """Names with an accent: decomposed on disk, composed in the file."""
    for entry in values["frames"]:
        new = entry["file_path"].replace("r_", "bäume ")
        (folder / entry["file_path"]).rename(folder / unicodedata.normalize("NFD", new))
        entry["file_path"] = unicodedata.normalize("NFC", new)


FOCAL = .5 * WIDTH / math.tan(.35)
READ = {
    "a matrix as twelve numbers": {"edit": matrices(lambda m: m[:3].ravel().tolist())},
    "a matrix as sixteen numbers": {"edit": matrices(lambda m: m.ravel().tolist())},
    "a matrix of two digits": {"edit": matrices(lambda m: m.round(2).tolist())},
    "paths of another machine": {"edit": renamed(lambda path, _: f"/home/somebody/scene/{path}")},
    "paths of Windows": {"edit": renamed(lambda path, _: "C:\\data\\scene\\" + path.replace("/", "\\"))},
    "absolute paths": {"edit": renamed(lambda path, folder: str(folder / path))},
    "paths with ..": {"edit": renamed(lambda path, folder: f"../{folder.name}/{path}")},
    "names with accents": {"edit": accented},
    "a palette": {"save": lambda image, path: image.convert("RGB").convert("P").save(path)},
    "CMYK": {"ending": ".jpg", "save": lambda image, path: image.convert("RGB").convert("CMYK").save(path)},
    "grey with alpha": {"save": lambda image, path: image.convert("LA").save(path)},
    "a focal length in pixels only": {"camera_angle_x": 0.1, "fl_x": FOCAL},
    "a null model": {"camera_model": None},
}


@pytest.mark.parametrize("what", READ)
def test_a_scene_written_in_another_way_has_the_same_cameras(tmp_path, what):
    plain = open_views("nerfstudio", scene(tmp_path / "plain"))
    other = open_views("nerfstudio", scene(tmp_path / "other", **READ[what]))
    assert len(plain) == len(other) == 5
    tolerance = 0.01 if "digits" in what else 1e-5
    for a, b in zip(plain, other):
        assert (a.camera.camera_to_world - b.camera.camera_to_world).abs().max() < tolerance
        assert (a.camera.K - b.camera.K).abs().max() < 1e-3
        rotation = b.camera.camera_to_world[:3, :3]
        assert (rotation @ rotation.mT - torch.eye(3)).abs().max() < 1e-5
        assert b.rgba_straight().shape == (HEIGHT, WIDTH, 4)


def exif(image, path):
    turned = Image.Exif()
    turned[0x0112] = 6
    image.convert("RGB").save(path, exif=turned)


REFUSED = {
    "OpenCV's axes": ({"edit": matrices(lambda m: (m * [1, -1, -1, 1]).tolist())}, "negate the second and third"),
    "a mirrored matrix": ({"edit": matrices(lambda m: (m * [-1, 1, 1, 1]).tolist())}, "mirrors space"),
    "a scaled rotation": ({"edit": matrices(lambda m: (m * [2, 2, 2, 1]).tolist())}, "remove scale"),
    "degrees": ({"camera_angle_x": 50}, "convert degrees to radians"),
    "a focal length of 0": ({"fl_x": 0}, "positive number"),
    "a focal length as text": ({"fl_x": "20"}, "positive number"),
    "cx and cy exchanged": ({"cx": HEIGHT / 2, "cy": WIDTH / 2}, "exchange 'cx' and 'cy'"),
    "cx and cy as shares": ({"cx": .5, "cy": .5}, "not as a share"),
    "w and h exchanged": ({"w": HEIGHT, "h": WIDTH}, "exchange 'w' and 'h'"),
    "w without h": ({"w": 2 * WIDTH}, "give 'w' and 'h'"),
    "a turned JPEG": ({"ending": ".jpg", "save": exif, "w": HEIGHT, "h": WIDTH}, "EXIF"),
    "floating-point TIFF": ({"ending": ".tif", "save": lambda image, path: Image.fromarray(
        np.full((HEIGHT, WIDTH), .5, np.float32)).save(path)}, "8 or 16 bits"),
    "an OpenEXR picture": ({"ending": ".exr", "save": lambda image, path: path.write_bytes(b"v/1\x01" + bytes(90))},
                           "convert it to PNG"),
    "a page for a picture": ({"save": lambda image, path: path.write_bytes(b"<!DOCTYPE html>")}, "HTML"),
    "an empty picture": ({"save": lambda image, path: path.write_bytes(b"")}, "is empty"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_scene_that_cannot_be_right_is_refused_with_the_cause(tmp_path, what):
    keys, words = REFUSED[what]
    with pytest.raises(KiloError) as caught:
        for view in open_views("nerfstudio", scene(tmp_path / "scene", **keys)): view.rgba_straight()
    message = str(caught.value)
    assert words in message and len(message.replace(str(tmp_path), "")) <= 400 and message.endswith(".")


def premultiplied(image, path):
    pixels = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    pixels[2:-2, 2:-2] = [110, 55, 20, 128]
    Image.fromarray(pixels).save(path)


SAID = {
    "all cameras at one place": ({"edit": matrices(lambda m: poses()[0].tolist())}, "at one place"),
    "pictures named twice": ({"edit": renamed(lambda path, _: "train/r_0.png")}, "another frame names too"),
    "premultiplied colours": ({"save": premultiplied}, "multiplied with alpha"),
    "an EXIF orientation": ({"ending": ".jpg", "save": exif}, "EXIF orientation of 5 of 5"),
    "a focal length of 1.2 pixels": ({"fl_x": 1.2}, "check its unit"),
    "photographs in OpenCV's axes": ({"ending": ".jpg", "save": lambda image, path: image.convert("RGB").save(path),
                                      "edit": matrices(lambda m: (m * [1, -1, -1, 1]).tolist())}, "look away"),
}


@pytest.mark.parametrize("what", SAID)
def test_what_is_probably_wrong_is_said_in_a_note(tmp_path, what):
    keys, words = SAID[what]
    assert any(words in note for note in open_views("nerfstudio", scene(tmp_path / "scene", **keys)).notes)
    assert not any(words in note for note in open_views("nerfstudio", scene(tmp_path / "plain")).notes)


def test_test_pictures_that_are_training_pictures_are_said(tmp_path):
    root = scene(tmp_path / "scene", name="transforms_train.json")
    (root / "transforms_test.json").write_text((root / "transforms_train.json").read_text())
    assert any("6 of the 6 test pictures" in note for note in open_views("blender", root, "test").notes)


@pytest.mark.parametrize(("data", "words"), [
    ('{"a": 1, "a": 2}', "'a' stands twice"), ("// made by me\n{}", "a comment"), ('{"a": [1, 2,]}', "a comma"),
    ('{"a": 1,}', "a comma"), ("", "is empty"), (gzip.compress(b"{}", mtime=0), "gunzip"),
    ("{'a': 1}", "double quotes"),
    ('{"a": NaN}', "NaN"), ("{}{}", "Extra data"), ('{"ä": 1}'.encode("latin-1"), "save it as UTF-8")])
def test_json_that_is_none_is_refused_with_its_fault(data, words):
    assert words in expect_error(parse_json, data, "a.json")


def test_json_and_yaml_of_windows_are_read():
    assert parse_json('{"ä": [1]}'.encode("utf-16"), "a.json") == {"ä": [1]}
    assert parse_yaml("ä: 1\r\n".encode("utf-16"), "a.yaml") == {"ä": 1}
    assert parse_yaml("\ufeffä: 1\r\n".encode(), "a.yaml") == {"ä": 1}


def colmap(folder: Path, *, images: str = "images", binary: bool = True, scale: int = 1) -> Path:
    """A COLMAP project of six pictures that are `scale` times smaller than their cameras say."""
    cameras = {f"my pic {i}.png": PinholeCamera(torch.from_numpy(pose * [1, -1, -1, 1]).float(), 20.0 * scale,
                                              20.0 * scale, 12.0 * scale, 8.0 * scale, WIDTH * scale, HEIGHT * scale)
               for i, pose in enumerate(poses())}
    model = ColmapModel(cameras, np.zeros((1, 3)), np.zeros((1, 3), np.uint8), np.zeros(1))
    (folder / images).mkdir(parents=True)
    for name in cameras: picture().convert("RGB").save(folder / images / name)
    write_colmap(folder / "sparse" / "0", model, binary)
    return folder


@pytest.mark.parametrize("binary", [True, False])
def test_a_colmap_model_without_points_is_read(tmp_path, binary):
    root = colmap(tmp_path / "a", binary=binary)
    next((root / "sparse" / "0").glob("points3D.*")).unlink()
    views = open_views("colmap", root)
    assert len(views) == 5 and points_of_scene("colmap", root) is None and "the model has no points" in views.notes


def test_a_colmap_model_is_found_from_its_own_folder_and_named_where_it_is_deeper(tmp_path):
    root = colmap(tmp_path / "dense")
    assert len(open_views("colmap", root / "sparse" / "0")) == 5
    assert str(root) in expect_error(open_views, "colmap", tmp_path)


@pytest.mark.parametrize("images", ["images", "images_2", "images_4"])
def test_smaller_pictures_of_a_colmap_project_scale_its_cameras(tmp_path, images):
    scale = int(images[-1]) if images[-1].isdigit() else 2
    camera = open_views("colmap", colmap(tmp_path / "a", images=images, scale=scale))[0].camera
    assert (camera.width, camera.height, camera.fx, camera.cx) == (WIDTH, HEIGHT, 20, 12)


def test_a_resolution_is_taken_from_the_smaller_pictures_that_have_it(tmp_path):
    root = colmap(tmp_path / "a")
    (root / "images_2").mkdir()
    for path in (root / "images").iterdir(): Image.new("RGB", (12, 8), (9, 9, 9)).save(root / "images_2" / path.name)
    small, whole = (open_views("colmap", root, resolution=size) for size in (6, 20))
    assert small[0].image_path.parent.name == "images_2" and whole[0].image_path.parent.name == "images"
    assert small[0].camera.fx == 5 and small[0].camera.width == 6
    assert "the pictures are those of images_2" in small.notes


def test_pictures_with_another_ending_than_their_names_are_found(tmp_path):
    root = colmap(tmp_path / "a")
    for path in list((root / "images").iterdir()):
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
    assert open_views("colmap", root)[0].image_path.suffix == ".jpg"


def test_a_colmap_text_with_a_byte_order_mark_and_windows_lines_is_read(tmp_path):
    root = colmap(tmp_path / "a", binary=False)
    for path in (root / "sparse" / "0").iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert len(open_views("colmap", root)) == 5


@pytest.fixture(scope="module")
def gaussians() -> Gaussians:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(*shape, generator=generator) for shape in ((9, 3), (9, 4), (9, 3), (9,), (9, 4, 3))]
    return Gaussians(*values)


def test_a_ply_with_a_long_comment_is_read(tmp_path, gaussians):
    write_ply(tmp_path / "a.ply", gaussians)
    data = (tmp_path / "a.ply").read_bytes().replace(b"element", b"comment " + b"x" * 1_000_000 + b"\nelement", 1)
    (tmp_path / "b.ply").write_bytes(data)
    assert torch.equal(read_gaussians(tmp_path / "b.ply").means, gaussians.means)


def test_an_unpacked_spz_is_read(tmp_path, gaussians):
    write_spz(tmp_path / "a.spz", gaussians)
    (tmp_path / "b.spz").write_bytes(gzip.decompress((tmp_path / "a.spz").read_bytes()))
    assert torch.equal(read_gaussians(tmp_path / "a.spz").means, read_gaussians(tmp_path / "b.spz").means)


def zipped(name: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file: file.writestr(name, b"ply\n")
    return stream.getvalue()


ASCII = b"ply\nformat ascii 1.0\nelement vertex 9\nproperty float x\nproperty float y\nproperty float z\nend_header\n"
BOMB = gzip.compress(struct.pack("<4sIIBBBB", b"NGSP", 3, 1, 0, 12, 0, 0) + bytes(1 << 22), mtime=0)


@pytest.mark.parametrize(("data", "words"), [
    (gzip.compress(b"ply\nformat", mtime=0), "but a PLY: unpack it"),
    (gzip.compress(b"tar", mtime=0), "unpack it first"),
    (zipped("scene.ply"), "a zip archive: unpack it"), (zipped("archive/data.pkl"), "PyTorch"),
    (zipped("a.npy"), "NumPy"),
    (b"\x80\x04\x95" + bytes(50), "pickle"),
    (b"\xfd7zXZ\0" + bytes(50), "compressed: unpack"), (ASCII + b"1 2", "fewer are there"),
    (BOMB, "fetch it again"), (gzip.compress(b"NGSP" + bytes(99), mtime=0)[:-9], "not a whole gzip file|version 0"),
    (b"<html>", "HTML"), (b'{"error": 1}', "JSON"), (b"", "is empty")])
def test_what_is_no_file_of_gaussians_is_named(tmp_path, data, words):
    (tmp_path / "a.ply").write_bytes(data)
    with pytest.raises(KiloError, match=words) as caught: read_gaussians(tmp_path / "a.ply")
    assert len(str(caught.value).replace(str(tmp_path), "")) <= 400


PARAMETERS = ("run_dir: str = ''\nresume: bool = False\nseed: int = 0\ntext: str = 'x'\nrate: float = 1.0\n"
              "maybe: float | None = None\nrates: list[float] = [1.0]\nnested: list[list[int]] = [[1]]\n"
              "count: int = 3\nflag: bool = False\nmaybe_flag: bool | None = None\n")


def plan(folder: Path, text: str | bytes):
    cell = {"cell_type": "code", "id": "a", "metadata": {"tags": ["parameters"]}, "source": PARAMETERS, "outputs": [],
            "execution_count": None}
    content = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (folder / "echo.ipynb").write_text(json.dumps(content))
    (folder / "sweep.yaml").write_bytes(text if isinstance(text, bytes) else f"experiment: echo.ipynb\n{text}".encode())
    return [run.varied for run in plan_sweep(folder / "sweep.yaml", outputs=folder / "out").runs]


@pytest.mark.parametrize(("text", "values"), [
    ("grid: {rate: [1e-4, 2E3]}", [{"rate": 1e-4}, {"rate": 2e3}]),
    ("grid: {maybe: [1e-4, null]}", [{"maybe": 1e-4}, {"maybe": None}]),
    ("grid: {rates: [[1e-4, 2e-4]]}", [{"rates": [1e-4, 2e-4]}]),
    ("grid: {nested: [[[1e3], [2]]]}", [{"nested": [[1000], [2]]}]),
    ("grid: {flag: ['true', 'off']}", [{"flag": True}, {"flag": False}]),
    ("grid: {maybe_flag: ['no', null]}", [{"maybe_flag": False}, {"maybe_flag": None}]),
    ("grid: {text: [12:30, 1e-4]}", [{"text": "12:30"}, {"text": "1e-4"}]), ("seeds: '2'", [{"seed": 0}, {"seed": 1}]),
    ("experiment: echo.ipynb\nseeds: 2\n".encode("utf-16"), [{"seed": 0}, {"seed": 1}])])
def test_values_of_a_sweep_are_those_that_were_meant(tmp_path, text, values):
    assert plan(tmp_path, text) == values


@pytest.mark.parametrize(("text", "words"), [
    ("grid: {count: [010]}", "octal"), ("grid: {text: [010]}", "octal"), ("grid: {text: [yes]}", "in quotes"),
    ("grid: {text: [2026-11-28]}", "in quotes"), ("grid: {flag: [1]}", "must be bool"),
    ("grid: {rate: [1:30]}", "float"),
    ("grid: {rate: [1.0], rate: [2.0]}", "stands twice"), ("runs: [{rate: 1.0, rate: 2.0}]", "stands twice"),
    ("grid: {rate: [1e-4, 0.0001]}", "are the same"), ("grid:\n\trate: [1.0]", "YAML in line 3")])
def test_values_of_a_sweep_that_yaml_changes_are_refused(tmp_path, text, words):
    assert words in expect_error(plan, tmp_path, text)


def pcd(points: np.ndarray, announced: str = "POINTS 5", fields: str = "FIELDS x y z") -> bytes:
    head = f"VERSION .7\n{fields}\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\nWIDTH 5\nHEIGHT 1\n{announced}\nDATA ascii\n"
    return head.encode() + "\n".join(" ".join(map(str, row)) for row in points).encode() + b"\n"


@pytest.mark.parametrize("keys", [{}, {"announced": "# none"}, {"fields": "FIELDS X Y Z"}, {"fields": "COLUMNS x y z"}])
def test_a_pcd_with_rays_without_a_return_keeps_the_others(tmp_path, keys):
    points = np.arange(15.0).reshape(5, 3)
    points[2] = np.nan
    (tmp_path / "a.pcd").write_bytes(pcd(points, **keys))
    assert pcd_positions(read_pcd_fields(tmp_path / "a.pcd")).tolist() == points[[0, 1, 3, 4]].tolist()


@pytest.mark.parametrize(("change", "words"), [
    (lambda p: pcd(p, "POINTS 3"), "more numbers"), (lambda p: pcd(p, "POINTS 7"), "cut short"),
    (lambda p: pcd(p * np.nan), "no point"), (lambda p: pcd(np.where(p == 4, np.inf, p)), "not finite"),
    (lambda p: pcd(p, fields="FIELDS a b c"), "x, y and z are needed")])
def test_a_pcd_that_does_not_fit_is_refused(tmp_path, change, words):
    (tmp_path / "a.pcd").write_bytes(change(np.arange(15.0).reshape(5, 3)))
    assert words in expect_error(read_pcd_fields, tmp_path / "a.pcd")


def pandaset(folder: Path, cameras: tuple[str, ...], ending: str) -> Path:
    turned = {"position": dict.fromkeys("xyz", 0), "heading": {"w": 1, "x": 0, "y": 0, "z": 0}}
    for part in ("lidar", *(f"camera/{name}" for name in cameras)):
        (folder / part).mkdir(parents=True)
        (folder / part / "poses.json").write_text(json.dumps([turned]))
        (folder / part / "timestamps.json").write_text("[1.0]")
        if part == "lidar": continue
        (folder / part / "intrinsics.json").write_text('{"fx": 9, "fy": 9, "cx": 4, "cy": 3}')
        Image.new("RGB", (8, 6)).save(folder / part / "00.png")
        (folder / part / "00.png").rename(folder / part / f"00{ending}")
    return folder


def test_pandaset_pictures_of_any_ending_are_read_and_a_single_camera_is_refused(tmp_path):
    both = ("front_camera", "left_camera")
    for ending in (".jpg", ".JPG", ".png"):
        frame, = load_surround_frames(pandaset(tmp_path / ending[1:] / "001", both, ending))
        assert sorted(frame.images) == sorted(both)
    assert "two cameras" in expect_error(load_surround_frames, pandaset(tmp_path / "one" / "001", both[:1], ".jpg"))


def test_the_digest_of_a_rig_changes_with_its_pictures(tmp_path):
    (tmp_path / "rig.yaml").write_text("cameras: {a: {pictures: 'a_*.png'}, b: {pictures: [b.png]}}\n")
    found = [rig_digest(tmp_path / "rig.yaml")]
    for name in ("a_0.png", "b.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes(bytes(len(found)))
        found.append(rig_digest(tmp_path / "rig.yaml"))
    assert len(set(found[:4])) == 4 and found[3] == found[4]
