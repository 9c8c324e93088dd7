"""Blender scenes: inputs that the reader refuses, files after an interrupted writer, and properties of the
brickyard."""
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kilonb.geometry.cameras import PinholeCamera, orbit_cameras
from kilonb.core.errors import KiloError
from kilonb.scenes.blender import load_blender, scene_hash, write_blender
from kilonb.scenes.brickyard import (
    build_brickyard,
    hemisphere_cameras,
    rising_orbit_cameras,
    render_straight_rgba,
    write_brickyard,
)
from kilonb.scenes.posed_images import downscale, read_rgba
from kilonb.splats.ply import read_ply

REAL = os.environ.get("KILONB_DATA")
needs_lego = pytest.mark.skipif(not REAL or not (Path(REAL) / "lego_400").is_dir(),
                                reason="set KILONB_DATA to the folder that holds lego_400")


def premultiplied(rgba: torch.Tensor) -> torch.Tensor:
    return torch.cat([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], -1)


@pytest.fixture(scope="module")
def brickyard(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "brickyard"
    write_brickyard(folder, width=60, height=44, train=4, test=2, count=6_000)
    return folder


@pytest.fixture
def copy(brickyard, tmp_path) -> Path:
    """A copy of the dataset that a test may damage."""
    import shutil

    return Path(shutil.copytree(brickyard, tmp_path / "copy"))


def edit(folder: Path, change) -> None:
    path = folder / "transforms_train.json"
    transforms = json.loads(path.read_text())
    change(transforms)
    path.write_text(json.dumps(transforms))


def cut(path: Path, share: float) -> None: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def repaint(path: Path, mode: str, size: tuple[int, int] | None = None) -> None:
    picture = Image.open(path).convert(mode)
    (picture.resize(size) if size else picture).save(path, format="PNG")


def pose(change):
    def apply(transforms): change(transforms["frames"][2]["transform_matrix"])
    return apply


BROKEN = {
    "no folder": (lambda f: [p.unlink() for p in f.rglob("*") if p.is_file()], ["transforms_train.json", "missing"]),
    "JSON cut": (lambda f: cut(f / "transforms_train.json", 0.6), ["transforms_train.json", "JSON"]),
    "JSON is a list": (lambda f: (f / "transforms_train.json").write_text("[]"), ["frames"]),
    "no frames": (lambda f: edit(f, lambda t: t["frames"].clear()), ["no frames"]),
    "no camera": (lambda f: edit(f, lambda t: t.pop("camera_angle_x")), ["camera_angle_x", "fl_x"]),
    "angle is text": (lambda f: edit(f, lambda t: t.update(camera_angle_x="wide")), ["camera_angle_x", "'wide'"]),
    "angle is NaN": (lambda f: edit(f, lambda t: t.update(camera_angle_x=math.nan)), ["NaN"]),
    "angle in degrees": (lambda f: edit(f, lambda t: t.update(camera_angle_x=39.6)), ["degrees"]),
    "focal length is zero": (lambda f: edit(f, lambda t: t.update(fl_x=0)), ["fl_x"]),
    "size disagrees": (lambda f: edit(f, lambda t: t.update(fl_x=50.0, w=800)), ["'w'", "60x44"]),
    "no pose": (lambda f: edit(f, lambda t: t["frames"][2].pop("transform_matrix")), ["frame 2", "transform_matrix"]),
    "no path": (lambda f: edit(f, lambda t: t["frames"][2].pop("file_path")), ["frame 2", "file_path"]),
    "pose 2x4": (lambda f: edit(f, pose(lambda m: m.__delitem__(slice(2, None)))), ["frame 2", "4x4"]),
    "pose ragged": (lambda f: edit(f, pose(lambda m: m[1].pop())), ["frame 2", "4x4"]),
    "pose is text": (lambda f: edit(f, pose(lambda m: m[1].__setitem__(0, "x"))), ["frame 2", "4x4"]),
    "pose NaN": (lambda f: edit(f, pose(lambda m: m[1].__setitem__(3, math.nan))), ["NaN"]),
    "pose scaled": (lambda f: edit(f, pose(lambda m: m[0].__setitem__(0, 2.0))), ["frame 2", "not rigid"]),
    "pose mirrored": (
        lambda f: edit(f, pose(lambda m: [row.__setitem__(0, -row[0]) for row in m])),
        ["frame 2", "mirrors"],
    ),
    "last row": (lambda f: edit(f, pose(lambda m: m[3].__setitem__(3, 2.0))), ["frame 2", "last row"]),
    "picture missing": (lambda f: (f / "train/r_1.png").unlink(), ["r_1.png", "missing"]),
    "picture cut": (lambda f: cut(f / "train/r_1.png", 0.7), ["r_1.png", "truncated"]),
    "picture cut in its header": (lambda f: cut(f / "train/r_1.png", 0.005), ["r_1.png"]),
    "picture empty": (lambda f: (f / "train/r_1.png").write_bytes(b""), ["r_1.png"]),
    "picture is text": (lambda f: (f / "train/r_1.png").write_text("not a picture"), ["r_1.png"]),
    "no alpha": (lambda f: repaint(f / "train/r_1.png", "RGB"), ["r_1.png", "no alpha", "RGBA"]),
    "sizes differ": (lambda f: repaint(f / "train/r_1.png", "RGBA", (30, 22)), ["r_1.png", "30x22", "60x44"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_bad_input_is_refused_with_one_sentence_that_names_it(copy, name):
    """A KiloError of one line that names the file or key at fault, before any picture is decoded."""
    breaking, words = BROKEN[name]
    breaking(copy)
    with pytest.raises(KiloError) as refusal: load_blender(copy, "train")
    sentence = str(refusal.value)
    assert "\n" not in sentence and all(word in sentence for word in words), sentence


def test_damage_inside_a_picture_is_found_when_it_is_decoded(copy):
    """A flipped byte in the middle leaves header and end whole; decoding must not return half a picture."""
    path = copy / "train/r_1.png"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    scene = load_blender(copy, "train")
    with pytest.raises(KiloError, match=r"r_1\.png is truncated or damaged"): scene[1].rgba_straight()


@pytest.mark.parametrize("index", [-1, 4, 100])
def test_an_index_out_of_range_is_refused_with_the_number_of_frames(brickyard, index):
    with pytest.raises(KiloError, match=rf"Frame {index} is not there.*4 frames, 0 to 3"):
        load_blender(brickyard, "train")[index]


@pytest.mark.incident(7)
def test_a_subset_holds_exactly_the_requested_frames(brickyard):
    """Incident 7: 36 frames were averaged in place of one."""
    scene = load_blender(brickyard, "train").subset([2])
    assert len(scene) == 1 and [frame.name for frame in scene] == ["train/r_2"]


def test_a_missing_split_names_those_that_are_there(brickyard):
    with pytest.raises(KiloError, match="test, train"): load_blender(brickyard, "val")


@pytest.mark.parametrize("ending", ["", ".png"])
def test_paths_are_taken_with_and_without_their_ending(copy, ending):
    edit(copy, lambda t: [f.update(file_path=f["file_path"] + ending) for f in t["frames"]])
    assert [frame.name for frame in load_blender(copy, "train")] == [f"train/r_{i}" for i in range(4)]


def test_poses_survive_the_round_trip_to_the_bit_and_focal_lengths_to_rounding(tmp_path):
    cameras = orbit_cameras(3, 4.0, 20.0, width=50, height=30, field_of_view_deg=35.0)
    picture = torch.rand(30, 50, 4)
    write_blender(tmp_path, "train", cameras, [picture] * 3)
    for frame, camera in zip(load_blender(tmp_path), cameras):
        assert torch.equal(frame.camera.camera_to_world, camera.camera_to_world)
        assert abs(frame.camera.fx - camera.fx) < 1e-9 * camera.fx
    stored = json.loads((tmp_path / "transforms_train.json").read_text())["frames"][0]["transform_matrix"]
    looking = -torch.tensor(stored)[:3, 2]
    assert torch.allclose(looking,
                          cameras[0].camera_to_world[:3, 2]), "on disk the camera looks along minus z, OpenGL's way"


def test_off_centre_intrinsics_scale_with_the_resolution(tmp_path):
    """A point must fall on the same place of the picture at any resolution; a principal point that is not scaled would
    shift it by pixels."""
    camera = PinholeCamera(orbit_cameras(1, 4.0, 20.0)[0].camera_to_world, 90.0, 95.0, 27.0, 13.5, 60, 30)
    write_blender(tmp_path, "train", [camera], [torch.rand(30, 60, 4)])
    point = torch.tensor([[.2, -.1, .3]])
    full, half = load_blender(tmp_path)[0], load_blender(tmp_path, resolution=(30, 15))[0]
    assert torch.allclose(half.camera.project(point)[0] * 2, full.camera.project(point)[0], atol=1e-3)
    assert half.rgba_straight().shape == (15, 30, 4)


@pytest.mark.incident(2)
def test_the_alpha_on_disk_is_straight(brickyard):
    """Incident 2: straight and premultiplied were mixed. Composited with its alpha, a stored picture is the render;
    composited as premultiplied, it is not."""
    frame, teacher = load_blender(brickyard, "test")[0], read_ply(brickyard / "teacher.ply")
    truth = premultiplied(render_straight_rgba(teacher, frame.camera))
    stored = frame.rgba_straight()
    assert (premultiplied(stored) - truth).abs().max() < 1.6 / 255
    assert (stored - truth)[..., :3].abs().max() > .1
    pixels = np.asarray(Image.open(frame.image_path))
    assert (pixels[pixels[..., 3] == 0] == 0).all(), "RGB is black where alpha is 0, as in NeRF-synthetic"


def test_downscaling_mixes_no_background_into_colours():
    """Averaging straight colours would halve the red of a half-covered pixel."""
    picture = torch.zeros(8, 8, 4)
    picture[:, :3] = torch.tensor([1.0, 0, 0, 1])
    small = downscale(picture, 4, 4)
    assert torch.equal(small[:, 1], torch.tensor([1.0, 0, 0, .5]).expand(4, 4)) and (small[:, 2:] == 0).all()


def test_the_hash_covers_every_byte_that_is_read(copy):
    before = scene_hash(copy, "train")
    assert scene_hash(copy, "train") == before != scene_hash(copy, "test")
    repaint(copy / "train/r_3.png", "RGBA", (61, 44))
    changed = scene_hash(copy, "train")
    edit(copy, lambda t: t["frames"].reverse())
    assert len({before, changed, scene_hash(copy, "train")}) == 3


def test_a_writer_that_fails_leaves_no_transforms_file(tmp_path):
    """The transforms file is written last; a reader never sees a split whose pictures are not all there."""
    cameras = orbit_cameras(3, 4.0, width=8, height=8)
    write_blender(tmp_path, "train", cameras, [torch.rand(8, 8, 4)] * 3)
    with pytest.raises(KiloError, match="3 cameras but 2 images"):
        write_blender(tmp_path, "train", cameras, [torch.rand(8, 8, 4)] * 2)
    assert not (tmp_path / "transforms_train.json").exists() and not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("picture", [torch.rand(8, 9, 4), torch.rand(8, 8, 3), torch.full((8, 8, 4), math.nan)],
                         ids=["size", "channels", "NaN"])
def test_a_wrong_picture_is_not_written(tmp_path, picture):
    with pytest.raises(KiloError): write_blender(tmp_path, "train", orbit_cameras(1, 4.0, width=8, height=8), [picture])
    assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("*.json"))


# Brickyard


def test_the_brickyard_is_the_same_in_another_process(brickyard):
    """Same seed, same bits, in another process, too: a result on the stand-in can be compared between machines."""
    code = (
        "from kilonb.scenes.brickyard import build_brickyard as b; import hashlib; "
        "print(hashlib.sha256(b''.join(t.numpy().tobytes() for t in b(count=6_000).parameters().values())).hexdigest())"
    )
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    stored = read_ply(brickyard / "teacher.ply")
    assert hashlib.sha256(b"".join(t.numpy().tobytes() for t in stored.parameters().values())).hexdigest() == elsewhere


def test_another_seed_gives_another_brickyard():
    one, other = build_brickyard(0, 5_000), build_brickyard(1, 5_000)
    assert len(one) != len(other) or not torch.equal(one.sh, other.sh)


@pytest.mark.parametrize("count", [4_000, 20_000, 40_000])
def test_the_count_is_the_requested_one(count):
    teacher = build_brickyard(count=count)
    assert abs(len(teacher) / count - 1) < .1
    assert (teacher.means.abs() < torch.tensor([1.2, .7, .8])).all() and teacher.means[:, 2].min() > -.6


@pytest.mark.parametrize("count", [10, 1_000_000])
def test_an_impossible_count_is_refused(count):
    with pytest.raises(KiloError, match="4,000 to 60,000"): build_brickyard(count=count)


def test_the_brickyard_is_solid_and_its_background_empty():
    """A student is trained on the alpha of its teacher, which must be 0 beside the object and 1 on it."""
    teacher = build_brickyard()
    for camera in rising_orbit_cameras(3, 200, 200):
        alpha = render_straight_rgba(teacher, camera)[..., 3]
        shape = (alpha > .5).float()[None, None]
        grown = torch.nn.functional.max_pool2d(shape, 13, 1, 6)[0, 0] > 0
        core = -torch.nn.functional.max_pool2d(-shape, 7, 1, 3)[0, 0] > 0
        assert (alpha[~grown] == 0).all() and .15 < core.float().mean() < .6
        assert alpha[core].mean() > .995 and alpha[core].quantile(.01) > .95


def test_the_brickyard_has_many_saturated_colours():
    """Seen from around, each of the main colours covers some of the picture: a mix-up of channels or bricks would
    show."""
    teacher = build_brickyard()
    pictures = torch.cat([render_straight_rgba(teacher, camera).reshape(-1, 4)
                          for camera in rising_orbit_cameras(4, 120, 120)])
    rgb = pictures[pictures[:, 3] > .9][:, :3]
    hue = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}
    saturated = (rgb.amax(-1) - rgb.amin(-1)) > .3
    for name, corner in hue.items():
        near = ((rgb / rgb.amax(-1, keepdim=True).clamp(min=1e-3) - torch.tensor(corner)).abs().amax(-1)
                < .5) & saturated
        assert near.float().mean() > .01, f"{name} covers {near.float().mean():.2%}"


def test_the_whole_scene_is_in_every_image():
    """As on lego: every image contains the whole object, else a visual hull of the silhouettes would be cut."""
    means = build_brickyard(count=6_000).means
    for camera in hemisphere_cameras(40, 400, 400) + rising_orbit_cameras(10, 400, 400):
        pixels, depth = camera.project(means)
        assert (depth > 0).all() and pixels.min() > 2 and pixels.max() < 398
        assert camera.position[2] > 0 and abs(camera.position.norm() - 4.03) < 1e-4
    poses = torch.stack([c.position for c in hemisphere_cameras(24, 8, 8) + rising_orbit_cameras(8, 8, 8)])
    assert torch.pdist(poses).min() > .1, "no test camera is at the position of a training camera"


@pytest.mark.incident(15)
def test_a_killed_writer_leaves_nothing_that_is_read(tmp_path):
    """Incident 15: a half-written cache was read later. SIGKILL while pictures are being written: no folder of that
    name, and a second attempt succeeds."""
    target = tmp_path / "brickyard"
    arguments = f"{str(target)!r}, width=60, height=60, train=2000, test=1, count=5000"
    code = f"from kilonb.scenes.brickyard import write_brickyard; write_brickyard({arguments})"
    writer = subprocess.Popen([sys.executable, "-c", code])
    try:
        for _ in range(1200):
            if list(tmp_path.rglob("*.png")): break
            assert writer.poll() is None, "the writer ended before it wrote a picture"
            time.sleep(.05)
        writer.send_signal(signal.SIGKILL)
    finally: writer.wait(30) if writer.returncode is None else None
    assert list(tmp_path.rglob("*.png")) and not target.exists()
    write_brickyard(target, width=60, height=60, train=1, test=1, count=5_000)
    assert len(load_blender(target, "train")) == 1


def test_a_failing_writer_cleans_up(tmp_path, monkeypatch):
    def fail(*_): raise RuntimeError("disk full")
    monkeypatch.setattr("kilonb.scenes.brickyard.write_ply", fail)
    with pytest.raises(RuntimeError): write_brickyard(tmp_path / "b", width=16, height=16, train=1, test=1, count=5_000)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_left_alone(brickyard, tmp_path):
    for taken in (brickyard, brickyard / "transforms_train.json"):
        with pytest.raises(KiloError, match="exists and is not empty"): write_brickyard(taken, train=1, test=1)
    (tmp_path / "empty").mkdir()
    write_brickyard(tmp_path / "empty", width=16, height=16, train=1, test=1, count=5_000)
    assert len(load_blender(tmp_path / "empty", "test")) == 1


# Real data


@needs_lego
def test_lego_is_read_with_its_published_camera():
    """100 + 200 views of 400x400; the focal length is 400 / (2 tan(.3455556)); every camera is 4.03 from the origin and
    looks at it."""
    root = Path(REAL) / "lego_400"
    scene = load_blender(root, "train")
    assert (len(scene), len(load_blender(root, "test"))) == (100, 200)
    for frame in scene:
        camera = frame.camera
        assert (camera.width, camera.height) == (400, 400) and abs(camera.fx - 555.5555) < 1e-3
        assert abs(camera.position.norm() - 4.0311) < 1e-3
        pixels, depth = camera.project(torch.zeros(1, 3))
        assert depth > 4 and (pixels - 200).abs().max() < .1
    rgba = scene[0].rgba_straight()
    assert rgba.shape == (400, 400, 4) and .2 < rgba[..., 3].mean() < .3
    assert (rgba[rgba[..., 3] == 0]
            == 0).float().mean() > .99, "straight alpha, black where alpha is 0 except for a few rounded pixels"


@needs_lego
def test_lego_s_validation_split_names_its_missing_picture():
    with pytest.raises(KiloError, match=r"val/r_0\.png is missing"): load_blender(Path(REAL) / "lego_400", "val")


@needs_lego
def test_lego_downscaled_is_the_mean_of_its_pixels():
    root = Path(REAL) / "lego_400"
    full, small = (
        premultiplied(load_blender(root, "test")[7].rgba_straight()),
        premultiplied(load_blender(root, "test", resolution=100)[7].rgba_straight()),
    )
    assert torch.allclose(full.reshape(100, 4, 100, 4, 4).mean((1, 3)), small, atol=1e-5)


def test_a_palette_picture_with_transparency_is_read(tmp_path):
    """Image optimisers write palettes with transparency, which is read as alpha."""
    picture = Image.new("RGBA", (6, 6), (255, 0, 0, 255))
    picture.putpixel((0, 0), (0, 0, 0, 0))
    picture.quantize(4).save(tmp_path / "palette.png")
    rgba = read_rgba(tmp_path / "palette.png")
    assert rgba[0, 0, 3] == 0 and rgba[3, 3].tolist() == [1, 0, 0, 1]
