"""The experiment that fuzzes and kills for long: a small one runs, keeps what it finished, and goes on after a stop."""
import json
import subprocess

from helpers import KILONB

from tests.fuzz.endurance import append_line, fuzz_in_blocks, fuzz_results, kill_results, read_lines


def test_a_line_that_was_cut_short_is_not_read_and_not_continued(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_line(path, {"a": 1})
    with open(path, "a") as file: file.write('{"a": 2')
    assert read_lines(path) == [{"a": 1}]
    append_line(path, {"a": 3})
    assert read_lines(path) == [{"a": 1}, {"a": 3}]


def test_finished_blocks_are_not_run_again(tmp_path):
    done = []
    fuzz_in_blocks(tmp_path, tmp_path, 20, 0, lambda *row: done.append(row), ["json", "npy"])
    assert [row[:2] for row in done] == [("json", 10), ("npy", 10)]
    tallies = fuzz_in_blocks(tmp_path, tmp_path, 24, 0, lambda *row: done.append(row), ["json", "npy"])
    assert [row[:2] for row in done[2:]] == [("json", 12), ("npy", 12)]
    results = fuzz_results(tallies)
    assert results["inputs"] == 24 == results["inputs_read"] + results["inputs_refused"] and results["exceptions"] == 0


def test_a_fault_is_counted(tmp_path):
    fault = {"reader": "json", "seed": 0, "number": 3, "ending": "silent", "detail": "NaN"}
    append_line(tmp_path / "fuzz.jsonl", {"reader": "json", "seed": 0, "tally": {
        "reader": "json", "values": 9, "refused": 0, "slowest_s": 2.5, "most_bytes": 1e6, "faults": [fault]}})
    results = fuzz_results(fuzz_in_blocks(tmp_path, tmp_path, 10, 0, names=["json"]))
    assert results["silent_wrong_loads"] == 1 and results["inputs"] == 10 and results["slowest_input_s"] == 2.5
    record = {"lost": [], "half_read": ["a half"], "differs": False, "ended": False}
    assert kill_results([record])["kills_half_read"] == 1


def test_the_experiment_runs_and_continues(tmp_path):
    command = [*KILONB, "run", "endurance", "-p", "readers=['json', 'yaml']", "-p", "kills=0", "-p", "renders=0",
               "-p", "suites=[]", "-p", "inputs=20", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "run" / "results.json").read_text())
    assert written["ok"] and written["results"]["inputs"] == 20 and written["results"]["readers"] == 2
    assert len(written["tables"]["readers"]) == 2
    tallies = [row["tally"] for row in read_lines(tmp_path / "run" / "fuzz.jsonl")]
    assert sum(tally["values"] + tally["refused"] for tally in tallies) == 20
