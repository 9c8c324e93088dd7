"""Run folders are fresh or resumed, record how they ended and read back exactly; gates judge measured numbers only."""
import json
import math
import os
import re
import subprocess
import sys

import pytest

from kilonb.core.errors import KiloError
from kilonb.runs.gates import GREEN, NOT_RUN, RED, Gate, check_gates
from kilonb.runs.notebooks import read_parameters
from kilonb.runs.folders import open_run
from kilonb.runs.records import list_runs, newest_finished, read_run
from kilonb.runs.figures import write_figure
from kilonb.runs.status import FAILED, FINISHED, read_status


@pytest.mark.incident(9)
def test_no_gates_are_no_gates():
    """Incident 9: an empty list was replaced by the default."""
    report = check_gates({"psnr_db": 3.0}, [])
    assert report.lines == () and report.to_dict() == {} and report.ok


def test_a_parameters_cell_is_read_and_never_run(tmp_path):
    with pytest.raises(KiloError, match="must be a plain value"):
        read_parameters(f"steps = open({str(tmp_path / 'x')!r}, 'w').write('a')")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("value, verdict",
                         [(45.0, GREEN), (44.9, RED), (math.nan, RED), (math.inf, RED), (None, NOT_RUN), ("nan", RED),
                          ("45", RED), (True, RED)])
def test_a_value_that_is_missing_or_not_a_number_passes_no_gate(value, verdict):
    assert check_gates({"psnr_db": value}, [Gate("psnr_db", at_least=45.0)]).lines[0].verdict == verdict


@pytest.mark.incident(1)
def test_a_gate_shows_the_trivial_baseline_beside_the_result():
    """Incident 1: 9 dB was the score of an all-white image, which was not reported beside it."""
    report = check_gates({"psnr_db": 9.6, "psnr_blank_db": 9.4},
                         [Gate("psnr_db", at_least=45.0, baseline_result="psnr_blank_db")])
    assert "9.4" in report.table() and "trivial baseline" in report.table() and "<td>9.4</td>" in report._repr_html_()


@pytest.mark.incident(8)
def test_a_run_folder_is_never_appended_to_by_accident(tmp_path):
    """Incident 8: stale logs mixed into a new run."""
    first = open_run("demo", tmp_path / "run")
    first.metrics.write_text("step,loss\n1,0.5\n")
    first.finish({"loss": 0.5})
    before = sorted(path.name for path in first.folder.iterdir())
    with pytest.raises(KiloError, match="exists and is not empty"): open_run("demo", tmp_path / "run")
    with pytest.raises(KiloError, match="holds a run of 'demo'"): open_run("other", tmp_path / "run", resume=True)
    assert sorted(path.name for path in first.folder.iterdir()) == before
    assert open_run("demo", outputs=tmp_path).folder != open_run("demo", outputs=tmp_path).folder


def test_a_folder_that_is_not_a_run_is_not_changed(tmp_path):
    (tmp_path / "thesis.txt").write_text("text")
    with pytest.raises(KiloError, match="not empty"): open_run("demo", tmp_path)
    with pytest.raises(KiloError, match="Nothing to resume"): open_run("demo", tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_resumed_run_continues_its_files_and_sets_its_results_aside(tmp_path):
    data = {"kind": "blender", "path": "/data/lego", "sha256": "aa"}
    first = open_run("demo", tmp_path / "run", data=data)
    first.metrics.write_text("step,loss\n1,0.5\n")
    before = first.finish({"loss": 0.5})
    second = open_run("demo", tmp_path / "run", data=data, resume=True)
    assert second.resumed and second.metrics.read_text().startswith("step")
    assert not (second.folder / "results.json").exists()
    assert json.loads((second.folder / "earlier/1/results.json").read_text())["results"]["loss"] == 0.5
    result = second.finish({"loss": 0.4})
    assert result.results["total_s"] >= before.results["total_s"], "the wall time of both parts"
    assert read_run(second.folder).results["loss"] == 0.4


def test_a_run_is_not_resumed_on_other_data(tmp_path):
    open_run("demo", tmp_path / "run", data={"kind": "blender", "path": "/data/lego", "sha256": "aa"}).finish({})
    with pytest.raises(KiloError, match="other data"):
        open_run("demo", tmp_path / "run", data={"kind": "blender", "path": "/data/lego", "sha256": "bb"}, resume=True)


def test_a_run_whose_process_is_gone_is_abandoned_and_can_be_resumed(tmp_path):
    code = (
        f"import os; from kilonb.runs.folders import open_run; open_run('demo', {str(tmp_path / 'run')!r}); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert read_status(tmp_path / "run")["status"] == "abandoned"
    assert open_run("demo", tmp_path / "run", resume=True).resumed


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(KiloError, match="Cannot write the run folder"): open_run("demo", tmp_path / "file" / "run")
    with pytest.raises(KiloError, match="is a file"): open_run("demo", tmp_path / "file")


def test_a_damaged_results_file_is_named_and_hides_no_other_run(tmp_path):
    good = open_run("demo", outputs=tmp_path); good.finish({"psnr_db": 40.0})
    bad = open_run("demo", outputs=tmp_path); bad.finish({"psnr_db": 41.0})
    text = (bad.folder / "results.json").read_text()
    for damaged in (text[: len(text) // 2], "[]", '{"results": {}, "gates": {"psnr_db": {"at_leest": 3}}}',
                    '{"gates": 3}'):
        (bad.folder / "results.json").write_text(damaged)
        with pytest.raises(KiloError, match=re.escape(str(bad.folder / "results.json"))): read_run(bad.folder)
    assert sorted(record.status for record in list_runs(tmp_path)) == [FINISHED, "unreadable"]
    assert [record.folder for record in newest_finished(tmp_path)] == [good.folder]


def test_a_failed_block_marks_its_run(tmp_path):
    with pytest.raises(ZeroDivisionError), open_run("demo", tmp_path / "a"): 1 / 0  # noqa: B018
    assert (read_run(tmp_path / "a").status, read_run(tmp_path / "a").error) == (
        FAILED,
        "ZeroDivisionError: division by zero",
    )
    with open_run("demo", tmp_path / "b"): pass
    assert read_run(tmp_path / "b").status == FAILED


def test_results_survive_the_file_exactly(tmp_path):
    run = open_run("demo", tmp_path / "run")
    results = {"psnr_db": math.inf, "loss": 0.1 + 0.2, "count": 3, "name": "lego"}
    written = run.finish(results, [Gate("psnr_db", at_least=45.0)],
                         tables={"frames": [{"frame": 0, "psnr_db": math.nan}]})
    record = read_run(run.folder)
    assert record.results == written.results and record.report == written.report and not record.ok
    assert math.isnan(record.tables["frames"][0]["psnr_db"])
    json.loads((run.folder / "results.json").read_text(),
               parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.incident(23)
def test_only_what_was_measured_is_recorded(tmp_path):
    """Incident 23: metrics estimated from the loss. Only the measured names and the two that the run itself measures
    are in the file."""
    run = open_run("demo", tmp_path / "run")
    run.finish({"loss": 0.5}, [Gate("psnr_db", at_least=45.0)])
    record = read_run(run.folder)
    assert set(record.results) == {"loss", "total_s",
                                   "peak_memory_mb"} and record.report.lines[0].verdict == NOT_RUN and not record.ok


def test_a_figure_is_under_150_kb(tmp_path):
    from PIL import Image

    noise = Image.frombytes("RGB", (400, 400), os.urandom(400 * 400 * 3))
    assert write_figure(noise, tmp_path / "noise.png").stat().st_size <= 150_000
