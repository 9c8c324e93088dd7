"""Preparation of a multi-camera recording: resumed after a kill, refused where damaged, skipped frames, headings."""
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from kilonb.core.errors import KiloError
from kilonb.data.video import write_video
from kilonb.pose.hulls import masked_views
from kilonb.pose.images import ImageFile
from kilonb.pose.prepare import PrepareConfig, prepare, prepared_of, track_errors
from kilonb.pose.prepared import read_prepared
from kilonb.pose.resampling import PictureResampler
from kilonb.pose.steps import read_steps
from kilonb.scenes.critter import CritterConfig, write_critter
from kilonb.scenes.multiview import read_recording

CONFIG = PrepareConfig(every=2, downsample=1, resolution=48, coarse=32)


@pytest.fixture(scope="module")
def critter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pose") / "critter"
    write_critter(folder, CritterConfig(frames=24, cameras=4, width=128, height=96))
    return folder


@pytest.fixture(scope="module")
def prepared(critter):
    return prepare(read_recording(critter), critter.parent / "whole", CONFIG, "a", quiet=True)


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are not encoded, which takes most of the time of a small preparation; `prepared` has them."""
    monkeypatch.setattr("kilonb.pose.prepare.write_figure", lambda figure, path: path)


def test_what_is_read_is_the_resampled_recording(critter, prepared):
    recording = read_recording(critter)
    assert len(prepared) == 12 and prepared.frames.tolist() == list(range(0, 24, 2))
    figures = sorted(path.name for path in (prepared.path.parent / "figures").iterdir())
    assert figures == ["crop.png", "masks.png", "track.png", "up.png"]
    for c, name in enumerate(prepared.names):
        resampler = PictureResampler(recording.cameras[name])
        for i, picture in zip((0, 9), recording.pictures(name, [0, 18])):
            rgb, masks = prepared.bytes_of(i)
            assert (rgb[c] == resampler.picture(picture)).all()
            assert (masks[c] == resampler.mask(recording.mask(name, 2 * i))).all()
    point = torch.tensor([[.01, -.02, .03]])
    moved = point.double() @ prepared.world_to_prepared[:3, :3].T
    for camera, name in zip(prepared.cameras, prepared.names):
        expected = recording.cameras[name].project(point)[0]
        assert torch.allclose(camera.project(moved.float())[0], expected, atol=1e-2)


def test_headings_point_forwards_and_centres_are_near_the_truth(critter, prepared):
    with np.load(critter / "truth.npz") as truth:
        errors = track_errors(prepared, *(torch.from_numpy(truth[name][prepared.frames])
                                          for name in ("centre", "heading")))
    assert errors.flipped_share == 0
    assert errors.heading_mean_deg < 5
    assert errors.centre_mean_m < .01


def killed_after(critter, home, written):
    """Start a preparation and kill it as soon as `written` of its images are there."""
    script = f"""
from dataclasses import replace
import time
import kilonb.pose.images as images
write, done = images.ImageFile.write, []
def slow(self, *arguments):
    write(self, *arguments)
    done.append(0)
    print("written", flush=True)
    if len(done) >= {written}: time.sleep(60)
images.ImageFile.write = slow
from kilonb.pose.prepare import PrepareConfig, prepare
from kilonb.scenes.multiview import read_recording
prepare(read_recording({str(critter)!r}), {str(home)!r},
        PrepareConfig(every=2, downsample=1, resolution=48, coarse=32, workers=1), "a", quiet=True)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    for _ in range(written): assert process.stdout.readline() == "written\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_a_preparation_killed_in_the_middle_continues_there(critter, prepared, undrawn):
    home = critter.parent / "killed"
    killed_after(critter, home, 20)
    assert not (home / "recording.zarr").exists()
    with pytest.raises(KiloError, match="interrupted preparation continues"): read_prepared(home / "recording.zarr")
    again = prepare(read_recording(critter), home, CONFIG, "a", quiet=True)
    (images,) = [step for step in read_steps(home / "steps.jsonl") if step["step"] == "images"]
    assert images["written"] == 4 * 12 - 20
    assert torch.equal(again.centres, prepared.centres) and torch.equal(again.headings, prepared.headings)
    assert (again.bytes_of(10)[0] == prepared.bytes_of(10)[0]).all()
    assert not (home / "images.h5").exists()


def test_images_of_other_data_are_not_continued(critter, tmp_path):
    with ImageFile(tmp_path / "images.h5", "a", range(3), ["left"], 16, 16) as images:
        images.write(0, 0, np.ones((16, 16, 3)), np.ones((16, 16)))
    with ImageFile(tmp_path / "images.h5", "b", range(3), ["left"], 16, 16) as images:
        assert not images.written.any()
        with pytest.raises(KiloError, match="not written for left"): images.masks(0)


@pytest.mark.parametrize("damage", ["missing chunk", "half a chunk", "no metadata", "no attributes"])
def test_a_damaged_recording_is_refused_in_one_sentence(prepared, tmp_path, damage):
    copy = tmp_path / "recording.zarr"
    shutil.copytree(prepared.path, copy)
    chunk = copy / "images" / "c" / "5" / "0" / "0" / "0" / "0"
    if damage == "missing chunk": chunk.unlink()
    if damage == "half a chunk": chunk.write_bytes(chunk.read_bytes()[:1000])
    if damage == "no metadata": (copy / "masks" / "zarr.json").unlink()
    if damage == "no attributes": (copy / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    with pytest.raises(KiloError, match="prepare the recording again") as refused:
        read_prepared(copy).pictures(5)
    assert "\n" not in str(refused.value)


def blanked(recording, tmp_path, empty):
    """The recording with empty masks for the cameras of each frame in `empty`: frame -> cameras."""
    black = tmp_path / "black.png"
    Image.fromarray(np.zeros((96, 128), np.uint8)).save(black)
    files = {name: {frame: black if name in empty.get(frame, ()) else path for frame, path in own.items()}
             for name, own in recording.mask_files.items()}
    return replace(recording, mask_files=files)


def test_frames_that_cannot_be_used_are_skipped_and_counted(critter, tmp_path, undrawn):
    recording = read_recording(critter)
    names = recording.names
    found = prepare(blanked(recording, tmp_path, {4: names, 8: names[:3], 12: names[:1]}), tmp_path / "some", CONFIG,
                    quiet=True)
    assert [(one["frame"], one["kind"]) for one in found.skipped] == [(4, "empty masks"), (8, "empty masks")]
    assert 12 in found.frames and len(found) == 10
    (hulls,) = [step for step in read_steps(tmp_path / "some" / "steps.jsonl") if step["step"] == "hulls"]
    assert hulls["kept"] == 10 and hulls["skipped, empty masks"] == 2
    with pytest.raises(KiloError, match="None of 12 frames can be used"):
        prepare(blanked(recording, tmp_path, dict.fromkeys(range(24), names)), tmp_path / "none", CONFIG, quiet=True)


def test_recordings_that_cannot_be_prepared_are_named(critter, tmp_path):
    recording = read_recording(critter)
    one = replace(recording, calibrations={name: recording.calibrations[name] for name in recording.names[:1]})
    with pytest.raises(KiloError, match="1 calibrated camera"): prepare(one, tmp_path / "one", CONFIG, quiet=True)
    first = recording.calibrations[recording.names[0]]
    mirrored = replace(first, R=np.diag([-1.0, 1, 1]) @ first.R)
    left = replace(recording, calibrations=recording.calibrations | {recording.names[0]: mirrored})
    with pytest.raises(KiloError, match=re.compile("left-handed|mirror")):
        prepare(left, tmp_path / "left", CONFIG, quiet=True)


def test_one_preparation_serves_all_that_ask_for_the_same(critter, tmp_path, undrawn):
    first = prepared_of(critter, CONFIG, tmp_path, quiet=True)
    written = (first.path / "zarr.json").stat().st_mtime_ns
    again = prepared_of(critter, replace(CONFIG, workers=1), tmp_path, quiet=True)
    assert again.path == first.path and (again.path / "zarr.json").stat().st_mtime_ns == written, "not prepared again"
    assert len(read_steps(first.path.parent / "steps.jsonl")) == 5


def test_cameras_with_pictures_of_different_sizes_are_named(critter, tmp_path):
    recording = read_recording(critter)
    first, *others = recording.names
    small = {frame: tmp_path / f"{frame}.png" for frame in recording.mask_files[first]}
    for path in small.values(): Image.new("L", (96, 64), 255).save(path)
    write_video(tmp_path / "small.mp4", np.zeros((24, 64, 96, 3), np.uint8), 25)
    other = replace(recording.calibrations[first], width=96, height=64)
    mixed = replace(recording, calibrations=recording.calibrations | {first: other},
                    sources=recording.sources | {first: tmp_path / "small.mp4"},
                    mask_files=recording.mask_files | {first: small})
    with pytest.raises(KiloError, match=rf"{first}: 96 x 64; {', '.join(others)}: 128 x 96"):
        prepare(mixed, tmp_path / "mixed", CONFIG, quiet=True)
    with pytest.raises(KiloError, match="different sizes"): masked_views(mixed, 0)
