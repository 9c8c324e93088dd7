"""Clauses of Flux4D, Pose Splatter and Pin Pad that the audit of issue 16 found open, across modules."""
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers import run_here
from kilonb.core.errors import KiloError
from kilonb.flux4d.clip_data import ClipOptions, load_clip
from kilonb.flux4d.clips import build_clip_index, clips_of, missing_parts, write_clip_index
from kilonb.flux4d.evaluation import describe_flow, describe_models, nearest_input, score_clips, score_views
from kilonb.flux4d.examples import ClipExamples, ExampleOptions, split_clips
from kilonb.flux4d.lift import LiftOptions
from kilonb.pose.doctor import DoctorOptions, examine
from kilonb.pose.embedding import EmbeddingConfig, embedding_scores
from kilonb.runs.gate_files import declared_gates, settings_gap
from kilonb.runs.folders import open_run
from kilonb.runs.gates import GREEN, RED, check_gates
from kilonb.runs.verdicts import source_run_gap
from kilonb.scenes.boxtown import make_pandaset
from kilonb.scenes.critter import CritterConfig, write_critter
from kilonb.scenes.multiview import read_recording


@pytest.fixture(scope="module")
def town(tmp_path_factory):
    """Two sequences, of which the paper tests on 001 and trains on 002."""
    root = tmp_path_factory.mktemp("clauses") / "town"
    make_pandaset(root, sequences=2, frames=16, width=96, height=54, channels=8, steps=180, samples=1, seed=5,
                  cameras=["front_camera"], cars=80, vehicles=1)
    return root


@pytest.fixture(scope="module")
def scored(town):
    """(results, rows) of the lift of both sequences."""
    options = ExampleOptions(reading=ClipOptions(width=96), lifting=LiftOptions(max_gaussians=1500, sky=1000))
    examples = ClipExamples(town, clips_of(town).clips, town.parent / "cache", "town", options=options)
    return score_clips({"lift": lambda example: example.gaussians}, examples)


def test_scores_of_many_clips_tell_interpolation_from_future(scored):
    results, rows = scored
    means = [results[f"lift_{role}_psnr_full_db"] for role in ("interp", "future")]
    assert means[0] != means[1]
    frames = (5 * means[0] + 5 * means[1]) / 10
    assert results["lift_psnr_full_db"] == pytest.approx(frames, abs=1e-6)
    assert {"lift_interp_depth_rmse_m", "lift_future_ssim_full"} <= results.keys() and len(rows) == 2
    assert "future dB" in describe_models(results, ["lift"])


def test_frames_without_a_score_are_summed_over_clips_and_not_averaged(scored):
    results, rows = scored
    assert not [name for name in results if name.endswith("_skipped_skipped")]
    for name in ("interp_psnr_dynamic_db_skipped", "future_psnr_dynamic_db_skipped"):
        assert results.get(f"lift_{name}", 0) == sum(row.get(name, 0) for row in rows)


def test_the_table_of_flow_has_zero_flow_above_every_model(scored):
    results, _ = scored
    lines = describe_flow(results, ["lift"]).splitlines()
    assert [name for name in ("EPE m", "Acc5", "Acc10", "angle rad", "FD m", "3-way m", "CAR") if name in lines[0]] == [
        "EPE m", "Acc5", "Acc10", "angle rad", "FD m", "3-way m", "CAR"]
    assert lines[2].startswith("zero flow") and lines[3].startswith("lift")
    assert lines[2].split()[2:] == lines[3].split()[1:], "the lift is at rest"


def test_a_training_follows_the_splits_of_a_clip_index(town, tmp_path):
    write_clip_index(tmp_path / "clips.json", build_clip_index({"001": 16, "002": 16}))
    training, testing = split_clips(town, 0, tmp_path / "clips.json")
    assert {clip.sequence for clip in training} == {"002"} and [clip.sequence for clip in testing] == ["001"]
    assert sorted({len(clip.frames) for clip in training}) == [11, 16]
    write_clip_index(tmp_path / "test.json", build_clip_index({"001": 16}, split="test"))
    with pytest.raises(KiloError, match="no clip of the split train"): split_clips(town, 0, tmp_path / "test.json")
    write_clip_index(tmp_path / "long.json", build_clip_index({"002": 40}))
    with pytest.raises(KiloError, match="needs 002/lidar/16"): split_clips(town, 0, tmp_path / "long.json")


@pytest.mark.parametrize("part, file", [("lidar", "lidar/07.pkl.gz"), ("picture", "camera/front_camera/07.jpg"),
                                        ("cuboids", "annotations/cuboids/07.pkl.gz")])
def test_a_missing_part_of_a_recording_turns_the_experiments_of_clips_red_by_its_name(town, tmp_path, part, file):
    shutil.copytree(town, tmp_path / "town")
    assert missing_parts(tmp_path / "town") == []
    (tmp_path / "town" / "002" / file).unlink()
    lost = missing_parts(tmp_path / "town")
    assert [name.split(".")[0] for name in lost] == [f"002/{file}".split(".")[0]]
    for experiment in ("flux4d_lift", "flux4d_overfit", "flux4d_train", "flux4d_ablation", "flow_check"):
        results = {"files_missing": len(lost)}
        report = check_gates(results, declared_gates(experiment, {}, None, results))
        assert next(line for line in report.lines if line.gate.result == "files_missing").verdict == RED, experiment


def test_the_doctor_names_a_mask_that_the_other_cameras_have(tmp_path):
    write_critter(tmp_path / "critter", CritterConfig(frames=24, cameras=3, width=128, height=96, seed=8))
    recording = read_recording(tmp_path / "critter")
    files = {frame: path for frame, path in recording.mask_files["Camera2"].items() if frame != 7}
    holed = replace(recording, mask_files=recording.mask_files | {"Camera2": files})
    options = DoctorOptions(hull_frames=2, edge_frames=6)
    found = examine(holed, options)
    assert found.found("missing_masks", ["Camera2"]) and "Camera2 at frame 7" in found.sentence() + str(
        [one.sentence for one in found.faults])
    assert not examine(recording, options).found("missing_masks")


def test_a_model_of_a_short_training_does_not_decide_for_its_evaluation(tmp_path):
    folders = {name: tmp_path / "pose_train" / name for name in ("short", "whole")}
    for name, steps in (("short", 20), ("whole", 9000)):
        with open_run("pose_train", folders[name], {"steps": steps}) as run: run.finish({"steps": steps})
    short, whole = (source_run_gap(str(folders[name])) for name in ("short", "whole"))
    assert "steps 20 of 4500" in short and whole == ""
    assert source_run_gap("") == source_run_gap(str(tmp_path / "nothing.pt")) == ""
    for experiment in ("pose_evaluate", "pinpad_boundaries", "pose_embedding"):
        assert settings_gap(experiment, {}, {"source_run_gap": short}) == short
        assert settings_gap(experiment, {}, {"source_run_gap": whole}) == ""


def test_an_angle_that_no_frame_shows_has_no_score():
    generator = torch.Generator().manual_seed(0)
    magnitudes, headings = torch.rand(60, 12, generator=generator), torch.rand(60, generator=generator)
    phase = torch.rand(60, generator=generator).numpy()
    config = EmbeddingConfig(components=4, removal="none")
    scores = embedding_scores(magnitudes, headings, phase, np.zeros(60, bool), config, 3)
    assert scores["phase_r2"] is None and scores["azimuth_r2"] is not None
    assert embedding_scores(magnitudes, torch.zeros(60), config=config, folds=3)["azimuth_r2"] is None


def test_a_return_of_nothing_is_not_ten_times_a_return_of_nothing():
    results = {"layout": "three", "agent_return": 0.0, "random_return": 0.0, "agent_return_over_random": None}
    gates = declared_gates("pinpad_agent", {}, [{"kind": "episodes", "name": "pinpad_three"}], results)
    report = check_gates(results, gates)
    assert len(report.lines) == 2 and report.verdict != GREEN, report


def test_an_unknown_role_of_frames_is_named(town):
    data = load_clip(town, clips_of(town)[0], ClipOptions(width=96))
    with pytest.raises(KiloError, match="interp"): score_views(nearest_input(data), data, "copy_", ["interpol"])


TOWN = ["max_gaussians=1500", "width=96"]
SMALL = {
    "flux4d_lift": ("town", [*TOWN, "clips=1", "sky=1000", "workers=1"], "interp_psnr_full_db"),
    "flux4d_ablation": ("town", [*TOWN, "steps=1", "views=1", "example.lifting.sky=1000",
                                 "reconstruction_training.model.channels=[16,16]"],
                        "voxel_flow_start_interp_psnr_full_db"),
    "pose_carve": ("animal", ["frames=1", "resolution=48", "timing_side_px=64"], "left_out_iou"),
    "pose_prepare": ("animal", ["downsample=1", "resolution=48", "every=4"], "kept_share"),
    "pose_doctor": ("animal", ["frames=12"], "checks_not_run"),
    "pose_evaluate": ("animal", ["steps=2", "counts=[2]", "exported=1", "turntable_steps=2"], "heldout_iou"),
    "pose_embedding": ("animal", ["steps=2", "downsample=1", "resolution=48", "size=16", "azimuths=8", "components=12",
                                  "folds=4"], "azimuth_r2"),
    "simple_colours_vta": ("", ["sequences=4", "test_sequences=2", "steps=2", "starts=1", "batch=2"], "f1"),
    "pinpad_boundaries": ("pinpad_small", ["trials=0"], "f1_semantic"),
    "pinpad_vta": ("pinpad_small", ["steps=2", "batch=2"], "f1_semantic")}


@pytest.fixture(scope="module")
def places(town, tmp_path_factory):
    """Name -> data reference."""
    animal = tmp_path_factory.mktemp("animal") / "critter"
    write_critter(animal, CritterConfig(frames=60, cameras=3, width=96, height=72, seed=8))
    return {"town": f"pandaset:{town}", "animal": f"dannce:{animal}", "pinpad_small": "pinpad_small"}


@pytest.mark.slow
@pytest.mark.parametrize("experiment", SMALL)
def test_an_experiment_runs_by_its_command_at_small_size(places, tmp_path, experiment):
    data, parameters, result = SMALL[experiment]
    given = [*parameters, *([f"data={places[data]}"] if data else [])]
    done = run_here("run", experiment, "--out", tmp_path / "run", *(part for one in given for part in ("-p", one)))
    assert done.returncode in (0, 2, 3), done.stdout[-2000:] + done.stderr[-2000:]
    written = json.loads((tmp_path / "run" / "results.json").read_text())
    assert result in written["results"] and written["note"], "a small run says that it does not decide"
