"""The procedural animal: files, truth, and masks by background subtraction."""
from dataclasses import replace

import numpy as np
import pytest
from helpers import real_data

from kilonb.core.errors import KiloError
from kilonb.scenes.critter import CritterConfig, critter_cameras, write_critter
from kilonb.scenes.critter_body import pose_critter
from kilonb.scenes.critter_motion import wander
from kilonb.imaging.foreground import masks_of
from kilonb.scenes.multiview import check_recording, read_recording

SMALL = CritterConfig(frames=40, fps=8, cameras=3, width=192, height=144)


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    folder = tmp_path_factory.mktemp("critter") / "recording"
    write_critter(folder, SMALL)
    return read_recording(folder)


def overlap(a, b): return (a & b).sum() / max(1, (a | b).sum())


def test_a_written_recording_is_consistent_and_has_a_true_mask_of_every_frame(recording):
    check_recording(recording)
    assert recording.frames == SMALL.frames and recording.mask_source == "true"
    for name in recording.names:
        assert sorted(recording.mask_files[name]) == list(range(SMALL.frames))
        mask = recording.mask(name, 20)
        assert .005 < mask.mean() < .2 and not (mask[0].any() or mask[-1].any())


@pytest.mark.parametrize("k1", [0.0, -.2])
def test_joints_inside_the_body_project_onto_the_masks_through_the_calibration_files(tmp_path, k1):
    config = CritterConfig(frames=2, fps=1, cameras=3, width=512, height=384, k1=k1, seed=2)
    write_critter(tmp_path / "recording", config)
    recording = read_recording(tmp_path / "recording")
    truth, states = np.load(tmp_path / "recording" / "truth.npz"), wander(2, 1, 2)
    for frame in range(2):
        body, joints = pose_critter(states.at(frame))
        assert np.allclose(truth["points"][frame], joints)
        for name in recording.names:
            u, v = np.rint(recording.calibrations[name].project(joints)[0]).astype(int).T
            # the tip of the tail tapers to less than a pixel
            thick = np.array([joint != "tail_tip" for joint in truth["joints"]]) & body.inside(joints)
            assert recording.mask(name, frame)[v, u][thick].all() and thick.sum() > 12
    if k1: assert recording.calibrations["Camera1"].distortion[0] == k1


def test_the_same_configuration_gives_the_same_files_and_another_seed_other_ones(tmp_path):
    config = CritterConfig(frames=3, cameras=2, width=64, height=48)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)): write_critter(tmp_path / name, replace(config, seed=seed))
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*") if path.suffix != ".npz")
    assert len(files) == 1 + 2 + 6
    assert all((tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes() for path in files)
    assert (tmp_path / "a/videos/Camera1.mp4").read_bytes() != (tmp_path / "c/videos/Camera1.mp4").read_bytes()
    truths = [np.load(tmp_path / name / "truth.npz") for name in "abc"]
    assert np.array_equal(truths[0]["points"], truths[1]["points"])
    assert not np.array_equal(truths[0]["heading"], truths[2]["heading"])


def test_the_animal_is_wholly_in_view_of_every_camera_for_several_seeds():
    for seed in range(4):
        states = wander(120, 25, seed)
        for camera in critter_cameras(CritterConfig(seed=seed)).values():
            for frame in range(0, 120, 10):
                pixels, depth = camera.project(camera.position.new_tensor(pose_critter(states.at(frame))[1]))
                inside = camera.contains(pixels)
                assert bool((inside & (depth > 0)).all()), (seed, frame)


def test_background_subtraction_finds_the_animal_and_says_what_it_is(recording):
    given, found = masks_of(recording), masks_of(recording, subtract=True)
    assert (given.kind, found.kind) == ("true", "background subtraction")
    for name in recording.names:
        frames = range(0, SMALL.frames, 6)
        pairs = list(zip(given.masks(name, frames), found.masks(name, frames)))
        assert np.mean([overlap(a.mask, b.mask) for a, b in pairs]) > .85, name
        assert not any(one.problem for pair in pairs for one in pair)


def test_a_refused_folder_keeps_its_content_and_nothing_is_left_behind(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(KiloError, match="not empty"): write_critter(tmp_path / "full", SMALL)
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "notes.txt"]


def test_the_real_recordings_partial_masks_are_used_for_their_frames_only():
    mouse = read_recording(real_data("mouse_dannce_cylinder_5cam"))
    source = masks_of(mouse, frames=sorted(mouse.mask_files["CameraR"])[:3])
    assert source.kind == "derived"
    first = next(source.masks("CameraR", [min(mouse.mask_files["CameraR"])]))
    assert first.mask.shape == (1048, 1328) and not first.problem
