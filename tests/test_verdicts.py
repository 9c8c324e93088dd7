"""Gates over all runs: the newest finished run of each experiment and dataset counts; promotions follow from the
numbers; published figures have a source and apply to their own data only."""
import json

import pytest

from kilonb.core.errors import KiloError
from kilonb.core.files import write_json
from kilonb.distill.policy import POLICY, RULES
from kilonb.runs.gates import GREEN, NOT_RUN, RED, Gate
from kilonb.runs.gate_files import declared_gates, gate_files, gates_by_condition
from kilonb.runs.notebooks import list_notebooks
from kilonb.runs.promotion import promotion_dict, promotions, read_policy
from kilonb.runs.folders import open_run
from kilonb.runs.status import mark_run
from kilonb.runs.verdicts import NO_GATES, gate_overview, overview_dict

GATES = (Gate("psnr_db", at_least=30.0, notes=13.06, published=33.4, source="KiloNeRF", baseline_result="blank_db"),)
NOTEBOOKS = {**list_notebooks("experiments"), **list_notebooks("benchmarks")}


def leave(outputs, experiment, name, results, gates=(), started="2026-01-31T12:00:00", data="brickyard",
          status="finished", parameters=None, **more):
    run = open_run(experiment, outputs / experiment / name, parameters or {}, {"kind": data, "name": data})
    if status == "finished": run.finish(results, gates, **more)
    mark_run(run.folder, status, "it failed" if status == "failed" else "", started=started)
    return run


def overview(outputs, *experiments):
    """Without the gates that this checkout's notebooks hold."""
    return gate_overview(outputs, experiments, root=outputs / "no checkout")


def allowed(outputs): return promotions(POLICY, RULES, outputs)


def test_the_newest_finished_run_counts_and_a_later_failure_is_mentioned(tmp_path):
    leave(tmp_path, "toy", "new", {"psnr_db": 31.0, "blank_db": 9.4}, GATES, "2026-02-01T00:00:00")
    leave(tmp_path, "toy", "old", {"psnr_db": 12.0}, GATES, "2026-01-01T00:00:00")
    leave(tmp_path, "toy", "failed", {}, started="2026-03-01T00:00:00", status="failed")
    (status,) = overview(tmp_path).statuses
    assert (
        status.run.folder.name == "new"
        and status.state == GREEN
        and status.note == "toy/failed is failed: it failed."
    )
    (line,) = status.report.lines
    assert (line.gate.notes, line.gate.published, line.gate.source, line.baseline) == (13.06, 33.4, "KiloNeRF", 9.4)


@pytest.mark.parametrize("results, gates, state",
                         [({"psnr_db": 31.0}, GATES, GREEN), ({"psnr_db": 29.0}, GATES, RED), ({}, GATES, NOT_RUN),
                          ({}, (), NO_GATES), ({"psnr_db": float("nan")}, GATES, RED),
                          ({"b": 2}, (*GATES, Gate("b", at_most=1)), RED)])
def test_the_state_of_an_experiment_is_that_of_its_worst_gate(tmp_path, results, gates, state):
    leave(tmp_path, "toy", "a", results, gates)
    found = overview(tmp_path)
    assert (
        found.statuses[0].state == state
        and found.ok == (state in (GREEN, NO_GATES))
        and json.loads(json.dumps(overview_dict(found)))["ok"] == found.ok
    )


def test_each_dataset_has_its_own_status(tmp_path):
    leave(tmp_path, "toy", "a", {"psnr_db": 31.0}, GATES)
    leave(tmp_path, "toy", "b", {"psnr_db": 29.0}, GATES, data="lego")
    assert [(one.data, one.state) for one in overview(tmp_path).statuses] == [
        ("brickyard", GREEN),
        ("lego", RED),
    ]


def test_a_run_of_a_sweep_does_not_count_for_its_experiment(tmp_path):
    leave(tmp_path, "single_view_overfit", "a", {"psnr_srgb_white_db": 50.0}, started="2026-01-01T00:00:00")
    leave(tmp_path / "sweeps", "night", "001", {"psnr_srgb_white_db": 5.0})
    write_json(tmp_path / "sweeps" / "night" / "status.json",
               {"kind": "sweep", "status": "finished", "experiment": "single_view_overfit"})
    assert [one.title for one in overview(tmp_path).statuses] == ["single_view_overfit · brickyard · a"]
    (found,) = allowed(tmp_path)
    assert found.next == ["multi_view_response"]


def test_a_damaged_run_is_named_and_the_others_are_judged(tmp_path):
    leave(tmp_path, "toy", "a", {"psnr_db": 31.0}, GATES)
    broken = leave(tmp_path, "toy", "b", {"psnr_db": 31.0}, GATES)
    (broken.folder / "results.json").write_text("{")
    found = overview(tmp_path)
    assert (
        found.statuses[0].state == GREEN
        and "b/results.json is not JSON" in found.unreadable[0]
        and "is not JSON" in found.text()
    )


def test_without_runs_every_experiment_is_not_run_and_shows_its_bounds(tmp_path):
    found = gate_overview(tmp_path)
    assert {one.experiment for one in found.statuses} == {*NOTEBOOKS, "orbit"} and all(
        one.state == NOT_RUN for one in found.statuses
    )
    with pytest.raises(KiloError, match="did you mean 'teacher'"): gate_overview(tmp_path, ["teecher"])
    assert {one.experiment for one in gate_overview(tmp_path, ["teacher"]).statuses} == {"teacher"}


def test_what_was_reached_on_one_dataset_unlocks_nothing_on_another(tmp_path):
    leave(tmp_path, "single_view_overfit", "a", {"psnr_srgb_white_db": 50.0})
    leave(tmp_path, "multi_view_response", "b", {"test_psnr_srgb_white_db": 31.0, "test_lpips_vgg": 0.1}, data="lego")
    brickyard, lego = allowed(tmp_path)
    assert brickyard.next == ["multi_view_response"] and lego.next == ["single_view_overfit"]
    assert [row[2] for row in lego.rows()] == ["open", "passed, out of order", "locked", "locked"]


def test_all_stages_passed_leaves_nothing_open(tmp_path):
    for stage in POLICY:
        leave(tmp_path, stage.experiment, "a",
              {"psnr_srgb_white_db": 50.0, "test_psnr_srgb_white_db": 31.0, "test_lpips_vgg": 0.1})
    (found,) = allowed(tmp_path)
    assert found.next == [] and "All stages are passed." in found.text() and json.dumps(promotion_dict(found))


def swept(*rows):
    names = ("L", "colour_loss", "psnr_srgb_foreground_db", "alpha_spike_share")
    return {"tables": {"sweep": [dict(zip(names, row)) | {"psnr_srgb_white_db": 30.0} for row in rows]}}


def test_direction_frequencies_are_adopted_from_the_numbers_not_from_what_was_written(tmp_path):
    leave(tmp_path, "dir_l_sweep", "a", {"adopted_frequencies": 6},
          **swept((0, 0.01, 30.0, 0.0), (2, 0.008, 30.5, 0.0), (6, 0.006, 31.0, 0.0)))
    leave(tmp_path, "multi_view_response", "a", {}, parameters={"direction_frequencies": 4})
    (found,) = allowed(tmp_path)
    decision = found.decisions["direction frequencies"]
    assert decision.adopted == 2 and "recorded L = 6" in decision.sentence
    assert "multi_view_response has L = 4" in found.text()


def test_the_rule_uses_the_settings_of_the_run(tmp_path):
    leave(tmp_path, "dir_l_sweep", "a", {}, parameters={"improvement": 0.5},
          **swept((0, 0.01, 30.0, 0.0), (2, 0.008, 30.5, 0.0)))
    assert allowed(tmp_path)[0].decisions["direction frequencies"].adopted == 0


@pytest.mark.parametrize("more",
                         [{}, swept(), swept((0, 0.01, 30.0, 0.0)),
                          swept((0, 0.01, 30.0, 0.0), (2, float("nan"), 30.0, 0.0)),
                          swept((0, 0.01, 30.0, 0.0), (2, None, 30.0, 0.0)),
                          swept(("0", 0.01, 30.0, 0.0), ("2", 0.01, 30.0, 0.0)),
                          {**swept((0, 0.01, 30.0, 0.0), (2, 0.01, 30.0, 0.0)), "parameters": {"improvement": "much"}}],
                         ids=range(7))
def test_a_sweep_without_usable_numbers_adopts_nothing_and_gives_the_reason(tmp_path, more):
    leave(tmp_path, "dir_l_sweep", "a", {"adopted_frequencies": 2}, **more)
    (found,) = allowed(tmp_path)
    decision = found.decisions["direction frequencies"]
    assert decision.adopted is None and len(decision.sentence) > 20 and "\n" not in decision.sentence


def test_every_published_figure_names_its_source():
    gates = [(name, gate) for name in gate_files() for own in gates_by_condition(name).values() for gate in own]
    assert [(name, gate.result) for name, gate in gates if (gate.published is not None) != bool(gate.source)] == []
    assert sum(gate.published is not None for _, gate in gates) >= 10


def test_figures_of_lego_are_not_compared_with_runs_on_the_stand_in():
    """Published figures of lego do not apply to another scene, nor to photographs of another object."""
    for name in gate_files():
        for data in ("brickyard", "brickyard_teacher", "horse"):
            for gate in declared_gates(name, {}, {"kind": "blender", "name": data}):
                assert "lego" not in gate.source and (gate.notes is None or "db" not in gate.result), (name, data)


def test_the_table_of_the_policy_shows_the_trivial_baseline_and_no_figure_of_one_scene(tmp_path):
    """A policy is applied to any data, and published figures stand only beside the scene that they were measured on."""
    leave(tmp_path, "single_view_overfit", "a", {"psnr_srgb_white_db": 50.0, "psnr_blank_white_db": 9.36})
    table = read_policy(POLICY, tmp_path).table()
    assert "trivial baseline" in table and "9.36" in table and "KiloNeRF" not in table
    assert all(gate.notes is gate.published is None for stage in POLICY for gate in stage.gates)
