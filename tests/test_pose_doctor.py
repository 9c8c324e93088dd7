"""The calibration doctor names faults of recordings, and nothing else."""
from dataclasses import replace

import pytest
from helpers import real_data

from kilonb.pose.doctor import DoctorOptions, examine
from kilonb.pose.doctor_figures import examination_figures
from kilonb.pose.faults import inject_fault
from kilonb.scenes.critter import CritterConfig, write_critter
from kilonb.scenes.multiview import read_recording

OPTIONS = DoctorOptions(hull_frames=2, edge_frames=10)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor") / "clean"
    write_critter(folder, CritterConfig(frames=80, cameras=4, width=256, height=192, seed=8))
    return folder


def test_a_clean_recording_has_no_fault(clean):
    examination = examine(read_recording(clean), OPTIONS)
    assert not examination.faults, examination.sentence()
    assert {"time", "bleeding", "consistency", "units", "view"} <= {one.check for one in examination.with_verdict("ok")}


@pytest.mark.parametrize("fault, cameras, amount", [
    ("mirrored_video", ["Camera2"], None), ("swapped_cameras", ["Camera1", "Camera4"], None), ("units", [], None),
    ("time_offset", ["Camera3"], 2), ("unequal_lengths", ["Camera2"], None), ("out_of_view", ["Camera1"], None),
    ("empty_masks", ["Camera4"], None), ("bleeding_masks", [], None), ("handedness", [], None),
    ("inverted_pose", ["Camera3"], None), ("picture_size", [], None), ("distortion", [], -.35)])
def test_an_injected_fault_is_named_with_its_cameras_and_nothing_else_is(clean, tmp_path, fault, cameras, amount):
    injected = inject_fault(clean, tmp_path / "copy", fault, cameras, amount)
    examination = examine(read_recording(tmp_path / "copy"), OPTIONS)
    assert examination.found(fault, injected.cameras), f"{examination.sentence()}\n{examination}"
    assert len(examination.faults) == 1, examination.sentence()


def test_two_faults_at_once_are_both_named(clean, tmp_path):
    inject_fault(clean, tmp_path / "one", "mirrored_video", ["Camera2"])
    inject_fault(tmp_path / "one", tmp_path / "two", "inverted_pose", ["Camera4"])
    examination = examine(read_recording(tmp_path / "two"), OPTIONS)
    assert examination.found("mirrored_video", ["Camera2"]) and examination.found("inverted_pose", ["Camera4"])


def test_one_camera_alone_is_a_fault_and_the_other_checks_do_not_run(clean):
    recording = read_recording(clean)
    alone = replace(recording, calibrations={"Camera1": recording.calibrations["Camera1"]})
    examination = examine(alone, OPTIONS)
    assert examination.found("one_camera", ["Camera1"]) and "two or more" in examination.faults[0].sentence
    assert {"consistency", "time", "bleeding"} <= {one.check for one in examination.with_verdict("not_run")}


def test_a_truncated_video_is_named_and_the_silhouettes_are_examined_all_the_same(clean, tmp_path):
    inject_fault(clean, tmp_path / "copy", "swapped_cameras", ["Camera1", "Camera3"])
    video = tmp_path / "copy" / "videos" / "Camera2.mp4"
    video.write_bytes(video.read_bytes()[:3000])
    examination = examine(read_recording(tmp_path / "copy"), OPTIONS)
    assert examination.found("unreadable_video", ["Camera2"])
    assert examination.found("swapped_cameras", ["Camera1", "Camera3"])


def test_every_finding_has_a_sentence_and_the_examination_its_pictures(clean, tmp_path):
    inject_fault(clean, tmp_path / "copy", "empty_masks", ["Camera3"])
    examination = examine(read_recording(tmp_path / "copy"), OPTIONS)
    assert all(one.sentence.endswith(".") for one in examination.findings)
    figures = examination_figures(examination)
    assert "fault_empty_masks_0" in figures and len(figures) >= 8


@pytest.mark.slow
def test_the_mouse_has_no_fault_but_rough_masks():
    examination = examine(read_recording(real_data("mouse_dannce_cylinder_5cam")), DoctorOptions(subtracted_frames=0))
    assert not examination.faults, examination.sentence()
    assert any(one.fault == "short_masks" for one in examination.warnings)
