"""What a score and a verdict rest on: self-checks, numbers of views, bounds that are parameters, times of readers."""
import datetime
import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import run_here

from kilonb.core.errors import KiloError
from kilonb.core.hashing import cached_hash
from kilonb.imaging.orbit import axis_vector, cameras_around
from kilonb.imaging.scoring import evaluate_frames
from kilonb.reports.html_parts import minute_of
from kilonb.reports.overview import result_basis
from kilonb.runs.folders import fresh_name, open_run
from kilonb.runs.gate_files import declared_gates
from kilonb.runs.gates import GREEN, NOT_RUN, RED, check_gates
from kilonb.runs.records import read_run
from kilonb.runs.status import mark_run
from kilonb.runs.verdicts import gate_overview
from kilonb.scenes.brickyard import build_brickyard
from kilonb.splats.formats import read_gaussians
from kilonb.splats.ply import write_ply

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import keep as keeping


@pytest.fixture(scope="module")
def yard():
    return build_brickyard(seed=0, count=4000)


@pytest.fixture(scope="module")
def cameras(yard):
    return [(f"view_{i}", camera) for i, camera in enumerate(cameras_around(yard, 3, 24, axis_vector("z")))]


@pytest.fixture
def zone(monkeypatch):
    """A function that sets the time zone of this process."""
    def choose(name: str) -> None:
        monkeypatch.setenv("TZ", name)
        time.tzset()
    yield choose
    monkeypatch.undo()
    time.tzset()


# Self-checks


def test_a_teacher_against_itself_says_so_although_its_infinite_mean_is_no_number(yard, cameras):
    same = {"lpips_vgg": lambda one, two: (one - two).abs().mean().item()}
    evaluation = evaluate_frames(yard, cameras, teacher=yard, lpips=same, quiet=True)
    assert all(one["psnr_vs_teacher_db"] == math.inf and one["ssim_vs_teacher"] == pytest.approx(1, abs=1e-6)
               and one["lpips_vgg_vs_teacher"] == 0 for one in evaluation.scores.values())
    results = evaluation.results()
    assert results["test_psnr_vs_teacher_db"] is None and results["test_self_check"] == 1.0
    assert results["test_views_equal_to_teacher"] == results["test_views"] == 3
    assert "self-check: the targets of 3 of 3 views" in evaluation.table() and "3 views equal" in evaluation.table()
    assert json.dumps(results, allow_nan=False)


def test_another_model_equals_its_teacher_in_no_view(yard, cameras):
    results = evaluate_frames(build_brickyard(seed=1, count=4000), cameras, teacher=yard, quiet=True).results()
    assert results["test_views_equal_to_teacher"] == 0 and results["test_psnr_vs_teacher_db"] < 60


def test_a_mean_over_some_of_the_test_views_says_of_how_many(yard, cameras):
    evaluation = evaluate_frames(yard, cameras, teacher=yard, quiet=True)
    results = evaluation.results("test", in_data=200)
    assert result_basis("test_psnr_vs_teacher_db", results) == "over 3 of 200 views"
    assert result_basis("test_psnr_vs_teacher_db", evaluation.results()) == "over 3 views"


# Files of gaussians


def judged(results: dict) -> dict[str, str]:
    gates = declared_gates("convert_gaussians", {"views": 8}, {"kind": "blender", "name": "brickyard"}, results)
    return {line.gate.result: line.verdict for line in check_gates(results, gates).lines}


def test_an_uncompressed_file_has_to_be_exact_or_within_45_db():
    assert judged({"count": 9, "ply_psnr_db": None, "ply_exact_views": 8}) == {"ply_exact_views": GREEN, "count": GREEN}
    assert judged({"count": 9, "ply_psnr_db": None, "ply_exact_views": 7})["ply_exact_views"] == RED
    assert judged({"count": 9, "ply_psnr_db": 44.9, "ply_exact_views": 7}) == {"ply_psnr_db": RED, "count": GREEN}
    assert judged({"count": 9, "ply_psnr_db": 45.1, "ply_exact_views": 0})["ply_psnr_db"] == GREEN


@pytest.mark.parametrize("name", ["compressed_ply_psnr_db", "spz_psnr_db", "splat_psnr_without_harmonics_db"])
def test_a_quantised_file_has_to_be_within_38_db(name):
    assert judged({"count": 9, name: 37.9})[name] == RED and judged({"count": 9, name: 38.1})[name] == GREEN


def test_a_splat_file_is_compared_with_gaussians_without_view_dependence(yard, tmp_path):
    generator = torch.Generator().manual_seed(0)
    shiny = yard.sh.clone()
    shiny[:, 1:] += .2 * torch.randn(shiny[:, 1:].shape, generator=generator)
    write_ply(tmp_path / "shiny.ply", type(yard)(yard.means, yard.quats, yard.log_scales, yard.logit_opacities, shiny))
    done = run_here("run", "convert_gaussians", "--data", f"ply:{tmp_path}/shiny.ply", "--out", tmp_path / "run", "-p",
                    "views=2", "-p", "width=48", "-p", "formats=ply,splat")
    assert done.returncode == 0, done.stderr[-900:]
    results = json.loads((tmp_path / "run" / "results.json").read_text())["results"]
    assert results["ply_psnr_db"] is None and results["ply_exact_views"] == 2
    assert results["splat_psnr_db"] < results["splat_psnr_without_harmonics_db"] - 5
    assert read_gaussians(tmp_path / "run" / "shiny.splat").sh.shape[1] == 1


def test_gaussians_that_no_picture_shows_are_left_out_of_the_files(yard, tmp_path):
    inside = yard.subset(torch.arange(400))
    inside.logit_opacities = torch.full((400,), -8.0)                               # next to nothing of any picture
    parts = [torch.cat([getattr(yard, name), getattr(inside, name)])
             for name in ("means", "quats", "log_scales", "logit_opacities", "sh")]
    write_ply(tmp_path / "both.ply", type(yard)(*parts))
    command = ("run", "convert_gaussians", "--data", f"ply:{tmp_path}/both.ply", "-p", "views=2", "-p", "width=48",
               "-p", "formats=ply", "-p", "prune_views=12")
    done = run_here(*command, "--out", tmp_path / "run", "-p", "prune=0.05")
    assert done.returncode == 0, done.stderr[-900:]
    results = json.loads((tmp_path / "run" / "results.json").read_text())["results"]
    written = read_gaussians(tmp_path / "run" / "both.ply")
    assert len(written) == results["written"] and results["count"] == len(yard) + 400
    assert (written.logit_opacities > -7).all() and len(written) > 0.2 * len(yard), "400 are gone, what shows is not"
    assert results["ply_psnr_db"] > 30
    refused = run_here(*command, "--out", tmp_path / "none", "-p", "prune=1e6")
    assert refused.returncode == 1 and "smaller number" in refused.stderr


# Gates whose bounds are parameters


@pytest.mark.parametrize("inputs", [20_000, 20_001, 100_000])
def test_a_run_above_the_default_is_not_listed_beside_its_own_gate(tmp_path, inputs):
    results = {"inputs": inputs, "readers": 113, "kills": 200}
    run = open_run("endurance", tmp_path / "endurance" / "long", {"inputs": inputs, "kills": 200})
    run.finish(results, [])
    mark_run(run.folder, "finished")
    statuses = gate_overview(tmp_path, ["endurance"]).statuses
    listed = [line.gate.result for status in statuses for line in status.report.lines]
    assert len(listed) == len(set(listed)) and listed.count("inputs") == listed.count("kills") == 1
    (bound,) = [line for status in statuses for line in status.report.lines if line.gate.result == "inputs"]
    assert bound.gate.at_least == inputs and bound.verdict == GREEN


def test_a_gate_that_no_run_reached_stays_listed(tmp_path):
    run = open_run("endurance", tmp_path / "endurance" / "one", {"inputs": 100_000, "kills": 0})
    run.finish({"inputs": 100_000}, [])
    found = {line.gate.result: line.verdict for status in gate_overview(tmp_path, ["endurance"]).statuses
             for line in status.report.lines}
    assert found["inputs"] == NOT_RUN == found["kills"] and found["kills_with_loss"] == NOT_RUN


# Times


@pytest.mark.parametrize("name", ["Asia/Tokyo", "America/New_York", "UTC"])
def test_a_run_is_named_by_the_time_of_utc(zone, name):
    zone(name)
    before = datetime.datetime.now(datetime.UTC).replace(microsecond=0, tzinfo=None)
    named = datetime.datetime.strptime(fresh_name()[:15], "%Y%m%d-%H%M%S")
    assert datetime.timedelta(0) <= named - before < datetime.timedelta(minutes=5)


def test_pages_show_the_minute_of_the_reader_s_zone(zone):
    zone("Asia/Tokyo")
    assert minute_of("2026-11-28T23:30:00+00:00") == "2026-11-29 08:30"
    zone("America/New_York")
    assert minute_of("2026-11-28T23:30:00+00:00") == "2026-11-28 18:30"


# Links


@pytest.mark.parametrize("links", [{"loop": "loop"}, {"a": "b", "b": "a"}, {"in/deep": "../in/deep"}])
def test_a_link_that_leads_to_itself_is_named(tmp_path, links):
    (tmp_path / "data" / "in").mkdir(parents=True)
    (tmp_path / "data" / "in" / "file").write_text("1")
    for name, target in links.items(): (tmp_path / "data" / name).symlink_to(target)
    with pytest.raises(KiloError, match=f"{next(iter(links))}': .*remove the link"):
        cached_hash(tmp_path / "data", tmp_path / "cache")


# Kept results


def test_a_kept_result_is_judged_again_when_its_gates_change(tmp_path, monkeypatch):
    monkeypatch.setattr(keeping, "NOTEBOOKS", tmp_path / "nbs")
    folder = tmp_path / "nbs" / "results" / "line" / "toy"
    gates = tmp_path / "nbs" / "experiments" / "gates.yaml"
    gates.parent.mkdir(parents=True)
    gates.write_text("line: {gates: [{result: a_db, at_least: 30}]}\n")
    run = open_run("line", folder)
    run.finish({"a_db": 31.0, "b_db": 5.0}, declared_gates("line", {}, root=tmp_path))
    before = (folder / "results.json").read_bytes()
    assert not keeping.judge_again(folder) and read_run(folder).report.verdict == GREEN
    gates.write_text("line: {gates: [{result: a_db, at_least: 30}, {result: b_db, at_least: 6}]}\n")
    assert keeping.judge_again(folder) and read_run(folder).report.verdict == RED
    assert json.loads((folder / "results.json").read_bytes())["results"] == json.loads(before)["results"]
