"""Gates are data: one file that notebooks, `kilonb gates` and kept results read alike; a verdict says how much it rests
on; a short look decides nothing; runs are ordered by instant."""
import json
import math
import re
import subprocess
from pathlib import Path

import pytest

from kilonb.cli.main import main
from kilonb.core.errors import KiloError
from kilonb.distill.policy import GO_CONDITIONS, POLICY, RULES
from kilonb.panoramas.checks import RIG_COVERAGE
from kilonb.runs.folders import open_run
from kilonb.runs.gate_files import (declared_gates, default_parameters, gate_files, gates_by_condition, read_gate_file,
                                    rules_of, settings_gap)
from kilonb.runs.gates import GREEN, NO_GATES, NOT_JUDGED, NOT_RUN, PARTLY_RUN, RED, Gate, check_gates, verdict
from kilonb.runs.notebooks import code_cells, list_notebooks, read_notebook
from kilonb.runs.promotion import Stage, promotions, read_policy, require_unlocked
from kilonb.runs.records import list_runs, read_run
from kilonb.runs.selection import format_minute
from kilonb.runs.status import mark_run
from kilonb.runs.verdicts import gate_overview, judged_report, overview_dict
from tests.helpers import KILONB

ROOT = Path(__file__).parent.parent
NOTEBOOKS = {name: path for kind in ("experiments", "benchmarks") for name, path in list_notebooks(kind).items()}
NOTEBOOKS["orbit"] = list_notebooks("explore")["orbit"]
KEPT = sorted(path.parent for path in (ROOT / "nbs" / "results").glob("*/*/results.json"))


def leave(outputs, experiment, name, results, parameters=None, data="brickyard", kind="blender",
          started="2026-01-31T12:00:00+00:00", gates=(), status="finished"):
    run = open_run(experiment, outputs / experiment / name, parameters or {}, {"kind": kind, "name": data})
    if status == "finished": run.finish(results, gates)
    mark_run(run.folder, status, started=started)
    return run


# The files


@pytest.mark.parametrize("name", sorted(NOTEBOOKS))
def test_every_experiment_declares_its_gates_and_its_notebook_holds_none(name):
    assert rules_of(name) is not None and gates_by_condition(name)
    cells = "\n".join(code_cells(read_notebook(NOTEBOOKS[name])))
    assert not re.search(r"\bGate\(", cells) and re.search(r"session\.finish\(", cells)
    finished = re.findall(r"session\.finish\(\s*(?:\{.*?\}|\w+)\s*,\s*(\w+)(?=[,)])", cells, re.S)
    assert not finished, f"{name} passes {finished} beside its results: gates are declared in gates.yaml"


def test_gates_are_declared_for_nothing_that_does_not_exist():
    assert set(gate_files()) <= set(NOTEBOOKS)


@pytest.mark.parametrize("name", sorted(NOTEBOOKS))
def test_the_settings_of_an_experiment_are_those_of_its_notebook(name):
    """The defaults are at the experiment's own settings; a run with one step is not, where it counts steps."""
    defaults = default_parameters(name)
    assert settings_gap(name, defaults) == ""
    rules = rules_of(name).settings
    for parameter in rules.at_least if rules else ():
        if defaults[parameter] > 1: assert settings_gap(name, {**defaults, parameter: 1}).startswith(parameter)
        assert settings_gap(name, {**defaults, parameter: defaults[parameter] * 2}) == ""


@pytest.mark.parametrize("folder", KEPT, ids=lambda folder: "/".join(folder.parts[-2:]))
def test_the_gates_of_a_kept_result_are_those_of_the_file(folder):
    record = read_run(folder)
    if not (folder / "parameters.json").is_file(): pytest.skip("its parameters are not recorded")
    bounds = lambda report: {line.gate.result: (line.gate.at_least, line.gate.at_most, line.verdict)
                             for line in report.lines}
    assert bounds(judged_report(record)) == bounds(record.report)


def test_the_gates_that_the_parser_of_literals_dropped_are_listed():
    names = lambda name: {gate.result for own in gates_by_condition(name).values() for gate in own}
    assert {"pose_translation_median_m", "pose_rotation_median_deg"} <= names("coop_overfit")
    assert {"pose_translation_median_m", "pose_rotation_median_deg"} < names("coop_train")
    assert "coverage_share" in names("panorama_checks") and "scripted_over_attainable_eight" in names("pinpad_policies")


def test_the_coverage_of_a_known_rig_is_that_of_the_check():
    for (kind, projection), (low, high) in RIG_COVERAGE.items():
        gates = declared_gates("panorama_checks", {"projection": projection}, {"kind": kind, "name": "x"},
                               {"coverage_share": .857})
        (found,) = [gate for gate in gates if gate.result == "coverage_share"]
        assert (found.at_least, found.at_most) == (low, high)


def test_bounds_follow_the_data_the_parameters_and_the_results_of_a_run():
    bound = lambda name, result, *facts: {gate.result: gate.bound for gate in declared_gates(name, *facts)}.get(result)
    brickyard, lego = {"kind": "blender", "name": "brickyard"}, {"kind": "blender", "path": "/data/lego_400"}
    assert bound("single_view_overfit", "psnr_srgb_white_db", {}, brickyard) == "≥ 40"
    assert bound("single_view_overfit", "psnr_srgb_white_db", {}, lego) == "≥ 45"
    assert bound("endurance", "kills", {"kills": 500}) == "≥ 500" and bound("endurance", "kills", {"kills": 0}) is None
    assert bound("endurance", "sockets_tests_failed", {"suites": []}) is None
    assert bound("pinpad_policies", "scripted_return_four", {"layouts": ["three"]}) is None
    results = {"optimal_return_three": 590.6, "scripted_return_three": 560.0}
    report = check_gates(results, declared_gates("pinpad_policies", {"layouts": ["three"]}, None, results))
    assert report.lines[0].gate.bound == "≥ 561.1" and report.lines[0].verdict == RED


@pytest.mark.parametrize("text, message", [
    ("line: {gate: []}", "did you mean 'gates'"),
    ("line: {gates: [{result: a, at_most: 1, baseline: b}]}", "did you mean 'baseline_result'"),
    ("line: {gates: [{result: a, at_most: 1, when: {kinds: blender}}]}", "did you mean 'kind'"),
    ("line: {gates: [{result: a, at_most: 1, when: {parameters: {steps: {at_last: 3}}}}]}", "did you mean 'at_least'"),
    ("line: {gates: [{result: a}]}", "has no bound"),
    ("line: {gates: [{result: a, at_least: .inf}]}", "."),
    ("line: {gates: [{result: a, at_least: high}]}", "must be float"),
    ("line: {settings: {at_lest: [steps]}}", "did you mean 'at_least'"),
    ("line: {settings: [steps]}", "must map"),
    ("line: 3", "must map"), ("- line", "must map"), ("line: {gates: 3}", "must be a list"),
    ("line: {}\nline: {}", "stands twice"),
])
def test_a_mistake_in_the_file_is_one_sentence_with_the_nearest_name(tmp_path, text, message):
    path = tmp_path / "gates.yaml"
    path.write_text(text)
    with pytest.raises(KiloError) as caught: read_gate_file(path)
    assert message in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) <= 400


def test_a_parameter_that_the_notebook_does_not_have_is_named(tmp_path):
    folder = tmp_path / "nbs" / "experiments"
    folder.mkdir(parents=True)
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": "steps: int = 300"}
    (folder / "line.ipynb").write_text(json.dumps({"cells": [cell]}))
    for text in ("settings: {at_least: [stepps]}", "gates: [{result: a, at_least_parameter: stepps}]",
                 "gates: [{result: a, at_most: 1, unless: {parameters: {stepps: 1}}}]"):
        (folder / "gates.yaml").write_text(f"line:\n  {text}\n")
        with pytest.raises(KiloError, match="did you mean 'steps'"): declared_gates("line", {}, root=tmp_path)


# Verdicts


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, "inf", "nan", True, False, "45", [], {}, 10**400])
def test_what_is_no_finite_number_is_never_green(value):
    for gate in (Gate("a", at_least=-1e300), Gate("a", at_most=1e300), Gate("a", -1e300, 1e300)):
        assert verdict(gate, value) == RED


def test_a_bound_that_cannot_be_computed_is_not_run_and_never_green():
    gate = Gate("a", at_least_result="b", factor=2.0)
    for results in ({"a": 5.0}, {"a": 5.0, "b": math.inf}, {"a": 5.0, "b": "x"}, {"a": 5.0, "b": True}):
        assert check_gates(results, [gate]).verdict == NOT_RUN, results
    assert check_gates({"a": 5.0, "b": 2.5}, [gate]).verdict == GREEN


def test_a_verdict_says_how_much_it_rests_on():
    gates = [Gate(name, at_least=0.0) for name in "abc"]
    words = lambda results: check_gates(results, gates).words
    assert words({"a": 1, "b": 1, "c": 1}) == "green" and words({"a": 1}) == "green so far (1 of 3)"
    assert words({}) == "not run" and words({"a": 1, "b": -1}) == "red (1 of 3)"
    assert check_gates({}, []).words == NO_GATES
    partly = check_gates({"a": 1}, gates)
    assert not partly.ok and partly.verdict == PARTLY_RUN and partly.sentence().startswith("Green so far: 1 of 3")


def test_the_words_of_a_run_are_in_its_file_its_list_and_its_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KILONB_OUTPUTS", str(tmp_path))
    leave(tmp_path, "toy", "a", {"a": 1.0}, gates=[Gate("a", at_least=0.0), Gate("b", at_least=0.0)])
    assert json.loads((tmp_path / "toy" / "a" / "results.json").read_text())["verdict"] == "green so far (1 of 2)"
    assert main(["show", "toy/a"]) == 0 and "Green so far: 1 of 2" in capsys.readouterr().out
    assert main(["show", "toy/a", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)[0]
    assert shown["ok"] is False and shown["verdict"] == "green so far (1 of 2)"
    assert main(["gates", "toy", "--json"]) == 0 and json.loads(capsys.readouterr().out)["verdict"] == PARTLY_RUN


def test_the_exit_code_of_a_strict_look_tells_green_from_red_and_not_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KILONB_OUTPUTS", str(tmp_path))
    gates = [Gate("a", at_least=0.0), Gate("b", at_least=0.0)]
    for results, code in (({"a": 1.0, "b": 1.0}, 0), ({"a": 1.0}, 3), ({"a": -1.0}, 1)):
        leave(tmp_path, "toy", f"r{code}", results, gates=gates, started=f"2026-0{code + 1}-01T00:00:00+00:00")
        for other in tmp_path.glob("toy/r*"):
            if other.name != f"r{code}": mark_run(other, "failed", started="2026-01-01T00:00:00+00:00")
        assert main(["gates", "toy", "--strict"]) == code and main(["gates", "toy"]) == 0
    capsys.readouterr()


# Short looks


def test_a_newer_run_of_few_steps_does_not_turn_a_green_red(tmp_path):
    good = {"psnr_srgb_white_db": 50.0, "psnr_srgb_foreground_db": 45.0, "train_s": 100.0, "peak_memory_mb": 900.0}
    leave(tmp_path, "single_view_overfit", "whole", good, {"steps": 3000, "resolution": 0},
          started="2026-01-01T00:00:00+00:00")
    leave(tmp_path, "single_view_overfit", "look", {**good, "psnr_srgb_white_db": 12.0}, {"steps": 20, "resolution": 0},
          started="2026-02-01T00:00:00+00:00")
    found = gate_overview(tmp_path, ["single_view_overfit"])
    (judged,) = [one for one in found.statuses if one.run]
    assert judged.run.folder.name == "whole" and judged.state == GREEN
    assert "single_view_overfit/look" in judged.note and "steps 20 of 3000" in judged.note
    assert overview_dict(found)["verdicts"][-1]["passed_over"] or judged.note in found.text()
    (promotion,) = promotions(POLICY, RULES, tmp_path)
    assert promotion.next == ["multi_view_response"] and "look does not decide (steps 20 of 3000)" in promotion.text()


def test_a_newer_run_of_more_steps_decides(tmp_path):
    leave(tmp_path, "single_view_overfit", "a", {"psnr_srgb_white_db": 50.0}, {"steps": 3000},
          started="2026-01-01T00:00:00+00:00")
    leave(tmp_path, "single_view_overfit", "b", {"psnr_srgb_white_db": 20.0}, {"steps": 9000},
          started="2026-02-01T00:00:00+00:00")
    (judged,) = [one for one in gate_overview(tmp_path, ["single_view_overfit"]).statuses if one.run]
    assert judged.run.folder.name == "b" and judged.state == RED and not judged.note


def test_a_short_look_alone_leaves_an_experiment_not_run_and_says_why(tmp_path):
    leave(tmp_path, "single_view_overfit", "look", {"psnr_srgb_white_db": 50.0}, {"steps": 20})
    found = gate_overview(tmp_path, ["single_view_overfit"])
    assert {one.state for one in found.statuses} == {NOT_RUN} and "steps 20 of 3000" in found.text()
    (promotion,) = promotions(POLICY, RULES, tmp_path)
    assert promotion.next == ["single_view_overfit"] and "no run at its own settings" in promotion.text()


@pytest.mark.parametrize("parameters, results, gap", [
    ({"steps": 20}, {}, "steps 20 of 3000"), ({"resolution": 100}, {}, "resolution 100 of all"),
    ({"views": 4, "test_views": 2}, {}, "views 4 of all, test_views 2 of all"), ({"kind": "mlp"}, {}, "kind 'mlp'"),
    ({"teaching.rays.loop.steps": 20}, {"steps": 20}, "steps 20 of 3000"),
    ({"teaching.rays.loop.time_limit_s": 5.0}, {"steps": 200}, "steps 200 of 3000"),
    ({"teaching.rays.loop.time_limit_s": 5000.0}, {"steps": 3000}, ""), ({"seed": 7, "device": "cuda"}, {}, ""),
    ({"steps": 9000, "rays": 8192}, {}, ""), ({}, {}, ""),
])
def test_what_makes_a_run_a_short_look(parameters, results, gap):
    found = settings_gap("multi_view_response", parameters, results)
    assert found.startswith(gap) and bool(found) == bool(gap)


def test_the_gates_of_today_judge_an_old_run(tmp_path):
    """A run from before gates.yaml stays readable; its own gates are replaced by the declared ones."""
    run = leave(tmp_path, "simple_colours_vta", "old", {"f1": 0.5, "train_s": 10.0}, gates=[Gate("f1", at_least=0.1)])
    written = json.loads((run.folder / "results.json").read_text())
    for key in ("verdict", "note"): written.pop(key)
    written["gates"]["f1"] = {key: value for key, value in written["gates"]["f1"].items() if key in (
        "at_least", "at_most", "value", "verdict")}
    (run.folder / "results.json").write_text(json.dumps(written))
    record = read_run(run.folder)
    f1, seconds = [line.verdict for line in judged_report(record).lines]
    assert record.ok and f1 == RED and seconds in (GREEN, NOT_JUDGED)      # seconds are judged on one kind of machine


# Promotions


def test_a_promotion_says_on_which_data_and_in_which_folder_it_looked(tmp_path):
    with pytest.raises(KiloError) as caught:
        require_unlocked("multi_view_response", POLICY, tmp_path, "enforce", "blender:lego_400")
    sentence = str(caught.value)
    assert "on blender:lego_400 in" in sentence and str(tmp_path)[:40] in sentence and len(sentence) <= 400
    assert "Run single_view_overfit on blender:lego_400 first" in sentence


def test_a_stage_that_cannot_read_the_data_is_never_advised(tmp_path):
    """A single view is fitted to pictures: a file of gaussians has none."""
    assert require_unlocked("multi_view_response", POLICY, tmp_path, "enforce", "ply:bot.ply", "ply")
    report = read_policy(POLICY, tmp_path, "ply:bot.ply")
    assert [status.state for status in report.statuses] == ["not for this data", "open", "locked", "locked"]
    with pytest.raises(KiloError) as caught:
        require_unlocked("multi_view_features", POLICY, tmp_path, "enforce", "ply:bot.ply")
    assert "Run multi_view_response" in str(caught.value) and "Run single_view_overfit" not in str(caught.value)
    policy = [Stage("a", "nowhere"), Stage("b", "multi_view_response", after=["nowhere"])]
    with pytest.raises(KiloError, match="no notebook of it here"):
        require_unlocked("multi_view_response", policy, tmp_path, "enforce")


@pytest.mark.parametrize("stage", POLICY, ids=lambda stage: stage.experiment)
def test_the_kinds_of_a_stage_are_those_that_its_notebook_reads(stage):
    cells = "\n".join(code_cells(read_notebook(NOTEBOOKS[stage.experiment])))
    found = re.search(r"kinds=\[([^\]]*)\]", cells)
    if found is None: pytest.skip("the notebook does not name its kinds in a list")
    assert set(re.findall(r'"(\w+)"', found[1])) <= set(stage.kinds)


def test_a_condition_for_going_on_blocks_where_it_is_red_and_is_counted_where_it_is_not_measured(tmp_path):
    good = {"test_psnr_srgb_white_db": 31.0, "test_lpips_vgg": 0.1}
    leave(tmp_path, "single_view_overfit", "a", {"psnr_srgb_white_db": 50.0})
    leave(tmp_path, "multi_view_response", "a", {**good, "alpha_spike_share": 0.01},
          started="2026-01-01T00:00:00+00:00")
    (found,) = promotions(POLICY, RULES, tmp_path)
    assert found.next == ["single_view_features"] and f"1 of {len(GO_CONDITIONS)} green, 6 not measured" in found.text()
    leave(tmp_path, "multi_view_response", "b", {**good, "alpha_spike_share": 0.05},
          started="2026-02-01T00:00:00+00:00")
    (found,) = promotions(POLICY, RULES, tmp_path)
    assert found.next == ["multi_view_response"] and "alpha_spike_share is 0.03 too high" in found.text()


def test_the_slope_of_the_colour_loss_may_rise_by_its_noise_only():
    slope = next(gate for gate in GO_CONDITIONS if gate.result == "colour_loss_slope")
    judge = lambda value: check_gates({"colour_loss_slope": value, "colour_loss_slope_error": 1e-4}, [slope]).verdict
    assert judge(-1e-3) == GREEN == judge(1e-4) and judge(1e-3) == RED


# Order


@pytest.mark.parametrize("older, newer", [
    ("2026-11-29T03:57:01+09:00", "2026-11-28T18:58:00+00:00"),       # Tokyo, then London a minute later
    ("2026-10-25T02:59:00+02:00", "2026-10-25T02:01:00+01:00"),       # the hour that a clock shows twice
    ("2026-11-28T23:30:00-05:00", "2026-11-29T04:31:00Z"),
])
def test_the_newest_run_is_the_newest_by_instant(tmp_path, monkeypatch, capsys, older, newer):
    monkeypatch.setenv("KILONB_OUTPUTS", str(tmp_path))
    gates = [Gate("a", at_least=1.0)]
    leave(tmp_path, "toy", "z_older", {"a": 0.0}, started=older, gates=gates)
    leave(tmp_path, "toy", "a_newer", {"a": 1.0}, started=newer, gates=gates)
    assert [record.folder.name for record in list_runs(tmp_path)] == ["z_older", "a_newer"]
    (status,) = gate_overview(tmp_path, ["toy"]).statuses
    assert status.run.folder.name == "a_newer"
    assert main(["runs", "list"]) == 0
    shown = capsys.readouterr().out
    assert shown.index("z_older") < shown.index("a_newer") and format_minute(newer) in shown
    assert main(["show", "toy"]) == 0 and "a_newer" in capsys.readouterr().out


def test_kilonb_gates_lists_every_gate_of_every_experiment(tmp_path):
    """Through the command line, with no run at all."""
    done = subprocess.run([*KILONB, "gates", "--json"], capture_output=True, text=True, timeout=300,
                          env={**__import__("os").environ, "KILONB_OUTPUTS": str(tmp_path)})
    listed = json.loads(done.stdout)
    assert done.returncode == 0 and listed["verdict"] == NOT_RUN
    counted = sum(len(own) for name in gate_files() for own in gates_by_condition(name).values())
    assert listed["counts"] == {"green": 0, "red": 0, "not run": counted, "not judged": 0} and counted > 150
