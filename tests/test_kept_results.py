"""Kept results say what they are of; repeating one compares by tolerances; the README judges by today's gates."""
import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest

import kilonb
from kilonb.core.documents import read_yaml
from kilonb.core.errors import KiloError
from kilonb.core.hashing import cached_hash, hash_folder
from kilonb.data.references import resolve_data
from kilonb.reports.overview import last_held, results_table
from kilonb.runs.gate_files import gate_files, gates_by_condition, rules_of
from kilonb.runs.note_figures import read_notes
from kilonb.runs.records import RunRecord, list_runs, read_run
from kilonb.runs.status import FINISHED
from kilonb.runs.verdicts import judged_report

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import keep as keeping
import reproduce as again

KEPT = sorted(path.parent for path in (ROOT / "nbs" / "results").glob("*/*/results.json"))


@pytest.mark.parametrize("folder", KEPT, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_kept_result_holds_parameters_command_commit_hardware_and_date(folder):
    record = read_run(folder)
    assert re.fullmatch("[0-9a-f]{40}", record.environment["commit"]) and record.environment["dirty"] is False
    assert record.environment["hardware"]["processor"] and record.environment["hardware"]["cores"] >= 1
    assert re.match(r"20\d\d-\d\d-\d\dT", record.started) and record.elapsed_s > 0 and record.parameters
    kept = json.loads((folder / "kept.json").read_text())
    command = kept["command_line"]
    assert re.match(r"kilonb (run|bench) ", command) or (command == "unknown" and kept["reconstructed"])
    if kept["reconstructed"]:
        assert kept["source"] and set(kept["unknown"]) <= set(record.parameters)
        assert command != "unknown" or kept["unknown"]
    texts = "".join(path.read_text() for path in folder.glob("*.json"))
    assert '"/' not in texts and "'/" not in texts and ":/" not in texts.replace("://", ""), "a path of one machine"


def test_there_are_kept_results():
    assert len(KEPT) >= 40


def test_a_kept_result_can_be_judged_by_the_gates_of_today():
    for folder in KEPT:
        record = read_run(folder)
        if rules_of(record.experiment) is not None: assert judged_report(record).lines, record.name


@pytest.fixture
def finished(tmp_path):
    run = kilonb.open_run("single_view_overfit", tmp_path / "runs" / "one",
                          {"data": f"blender:{tmp_path}/lego", "steps": 3000, "rays": 4096, "teaching.cells": 8},
                          seed=0, data={"kind": "blender", "path": str(tmp_path / "lego"), "name": "",
                                        "sha256": "ab" * 32})
    run.finish({"psnr_srgb_white_db": 46.0, "train_s": 100.0}, [kilonb.Gate("psnr_srgb_white_db", at_least=47.0)])
    record = kilonb.read_run(run.folder)
    return dataclasses.replace(record, environment=record.environment | {"dirty": False, "commit": "ab" * 20})


def test_a_run_of_a_changed_tree_is_not_kept(finished, tmp_path):
    for dirty, commit in ((True, "ab" * 20), (None, "ab" * 20), (False, None)):
        changed = dataclasses.replace(finished, environment=finished.environment | {"dirty": dirty, "commit": commit})
        with pytest.raises(KiloError, match="uncommitted changes"): keeping.keep(changed, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_keeping_writes_portable_parameters_and_judges_by_the_gates_of_today(finished, tmp_path):
    folder = keeping.keep(finished, tmp_path / "kept")
    parameters = json.loads((folder / "parameters.json").read_text())
    assert parameters["data"] == "blender:lego" and parameters["teaching.cells"] == 8
    command = json.loads((folder / "kept.json").read_text())["command_line"]
    assert command.startswith("kilonb run single_view_overfit --data blender:lego") and "teaching.cells=8" in command
    written = json.loads((folder / "results.json").read_text())
    assert written["gates"]["psnr_srgb_white_db"]["at_least"] == 45.0, "gates.yaml, not the gate that the run had"
    assert "≥ 45" in results_table(tmp_path / "kept")


def record_of(results, started="2026-01-31T12:00:00+00:00", **parameters) -> RunRecord:
    return RunRecord(Path("kept/pinpad_policies/made-here"), "pinpad_policies", FINISHED, started, results=results,
                     parameters=parameters, environment={"commit": "0123456789"})


def test_repeated_numbers_are_compared_by_their_tolerances():
    kept = record_of({"psnr_db": 30.0, "train_s": 10.0, "mask_iou": .9, "count": 1000, "frames_per_s": 9.0})
    assert again.differences(kept, record_of({"psnr_db": 30.2, "train_s": 99.0, "mask_iou": .905, "count": 1010})) == {}
    assert again.differences(kept, record_of({"psnr_db": 31.0, "mask_iou": .95, "count": float("nan")})) == {
        "psnr_db": [30.0, 31.0], "mask_iou": [.9, .95], "count": [1000.0, None]}
    timed = record_of({"psnr_db": 30.0}, time_limit_s=30.0)
    assert again.differences(timed, record_of({"psnr_db": 30.8})) == {}, "a fixed time does not fix the steps"


def test_a_changed_verdict_does_not_hold(finished):
    worse = dataclasses.replace(finished, results={"psnr_srgb_white_db": 44.9, "train_s": 100.0})
    close = dataclasses.replace(finished, results={"psnr_srgb_white_db": 45.8, "train_s": 900.0})
    assert again.outcome(finished, worse)["held"] is False and again.outcome(finished, close)["held"] is True
    assert again.outcome(finished, worse)["differences"] == {"psnr_srgb_white_db": [46.0, 44.9]}


def test_the_page_says_when_a_result_last_held():
    record = record_of({})
    entry = {"date": "2026-03-01T00:00:00+00:00", "commit": "fedcba987654", "held": True}
    assert last_held(record, {"pinpad_policies/made-here": entry}) == "2026-03-01 fedcba9"
    assert last_held(record, {"pinpad_policies/made-here": entry | {"held": False}}).startswith("not held 2026-03-01")


def test_what_is_not_on_this_machine_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.delenv("KILONB_DATA", raising=False)
    by_name = {one.name: one for one in again.kept_results()}
    with pytest.raises(KiloError, match=r"data .* are not here"):
        again.local_arguments(by_name["single_view_overfit/blender-lego_400"])
    with pytest.raises(KiloError, match="needs the earlier run outputs/nowhere"):
        again.local_value("run", "outputs/nowhere/x")
    assert again.local_arguments(by_name["pinpad_policies/made-here"])[:2] == ["run", "pinpad_policies"]
    with pytest.raises(KiloError, match="has no parameter colour"):
        again.local_arguments(again.Kept("a", record_of({}, colour="red"), {}))


def test_every_kept_result_is_listed_with_its_command():
    listed = again.listing(again.kept_results(), {})
    for folder in KEPT: assert f"{folder.parent.name}/{folder.name}" in listed
    assert "kilonb run pinpad_policies" in listed and "last held" in listed


# --- figures of the notes

def test_a_figure_of_the_notes_stands_only_beside_its_own_data_colour_space_and_definition():
    figures = read_notes(ROOT / "nbs" / "experiments" / "notes.yaml")
    by_value = {one.value: one for one in figures.values() if one.results}
    for experiment in gate_files():
        for words, gates in gates_by_condition(experiment).items():
            for gate in gates:
                if gate.notes is None: continue
                figure = by_value[gate.notes]
                assert gate.result in figure.results, f"{experiment}: {gate.result}"
                assert figure.data in words and f"unless data {figure.data}" not in words, f"{experiment}: {words}"
    assert by_value[19.18].colour_space == "linear" and by_value[19.18].results == ["psnr_linear_white_db"]
    assert by_value[13.06].step == 50_000 and by_value[.297].results == ["test_lpips_vgg"]


def test_gates_refer_to_the_notes_by_name():
    def notes(value):
        if isinstance(value, list): return [one for item in value for one in notes(item)]
        if not isinstance(value, dict): return []
        own = [value["notes"]] if "notes" in value else []
        return own + [one for item in value.values() for one in notes(item)]
    found = notes(read_yaml(ROOT / "nbs" / "experiments" / "gates.yaml"))
    assert found and all(isinstance(one, str) for one in found)


# --- hashes follow links

def test_a_change_behind_a_linked_folder_changes_the_hash_of_the_data(tmp_path):
    scene, elsewhere = tmp_path / "scene", tmp_path / "elsewhere"
    for folder in (scene, elsewhere): folder.mkdir()
    (scene / "transforms_train.json").write_text("{}")
    (elsewhere / "r_0.png").write_bytes(b"one")
    (scene / "train").symlink_to(elsewhere)
    (elsewhere / "deep").symlink_to(tmp_path / "further")
    (tmp_path / "further").mkdir()
    (tmp_path / "further" / "r_1.png").write_bytes(b"two")
    (elsewhere / "back").symlink_to(scene)
    hashes = [resolve_data(f"blender:{scene}").sha256]
    for path in (elsewhere / "r_0.png", tmp_path / "further" / "r_1.png"):
        path.write_bytes(b"new " + path.read_bytes())
        hashes.append(resolve_data(f"blender:{scene}").sha256)
    assert len(set(hashes)) == 3 and hashes[-1] == hash_folder(scene) == cached_hash(scene, tmp_path / "c", 0)
    (elsewhere / "r_0.png").write_bytes(b"newer!")
    assert cached_hash(scene, tmp_path / "c", 0) not in hashes


def test_links_in_circles_end_and_broken_links_are_named(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "f").write_bytes(b"x")
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert len(hash_folder(tmp_path)) == 64
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(KiloError, match="gone"): hash_folder(tmp_path)
    (tmp_path / "gone").unlink()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(KiloError, match="loop"): hash_folder(tmp_path)


# --- order by instant

def test_the_newest_run_is_the_one_that_began_last_in_any_time_zone(tmp_path):
    times = {"a": "2026-11-29T03:57:00+09:00", "b": "2026-11-28T18:58:00+00:00", "c": "2026-10-25T02:30:00+02:00",
             "d": "2026-10-25T02:15:00+01:00"}
    for name, started in times.items():
        run = kilonb.open_run("toy", tmp_path / "toy" / name)
        run.finish({"psnr_db": 1.0})
        path = run.folder / "status.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"started": started}))
    assert [record.folder.name for record in list_runs(tmp_path)] == ["c", "d", "a", "b"]
    assert kilonb.runs.records.newest_finished(tmp_path)[0].folder.name == "b"
