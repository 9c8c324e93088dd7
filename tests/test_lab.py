"""What the lab promises across its modules: strict settings, honest run folders, gates that mean what they say, pages
that load nothing."""
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Literal

import pytest

from kilonb.core.configs import build_config, parse_value, to_dict
from kilonb.core.errors import KiloError
from kilonb.runs.gates import GREEN, NOT_RUN, RED, Gate, check_gates
from kilonb.runs.notebooks import read_parameters
from kilonb.runs.folders import (
    FAILED,
    FINISHED,
    list_runs,
    mark_run,
    newest_finished,
    open_run,
    read_run,
    read_status,
    write_figure,
)


@dataclass(frozen=True)
class Schedule:
    learning_rate: float = 1e-3
    warmup_steps: int = 100


@dataclass(frozen=True)
class Training:
    steps: int = 1000
    loss: Literal["l2", "charbonnier"] = "l2"
    promotion_gates: list[str] = field(default_factory=lambda: ["psnr"])
    frames: list[int] | None = None
    schedule: Schedule = field(default_factory=Schedule)

    def validate(self):
        if self.schedule.warmup_steps > self.steps: raise ValueError("the warm-up is longer than the run.")


def test_an_unknown_key_is_refused_and_the_nearest_is_named():
    """Incident 5: a mistyped key was ignored and its default came back."""
    with pytest.raises(KiloError, match="'lerning_rate': did you mean 'learning_rate'"):
        build_config(Training, {"schedule": {"lerning_rate": 1.0}})
    with pytest.raises(KiloError, match="'step': did you mean 'steps'"): build_config(Training, {"step": 3})


@pytest.mark.parametrize("values",
                         [{"steps": True}, {"steps": 1.0}, {"steps": "10"}, {"loss": "l1"}, {"frames": [1, "2"]},
                          {"frames": 3}, {"schedule": 3}, {"schedule": {"learning_rate": "1e-3"}}, {"steps": None}])
def test_a_value_of_another_type_is_refused(values):
    with pytest.raises(KiloError, match=r"must be"): build_config(Training, values)


def test_contradictory_settings_are_one_error():
    """Incident 10: one setting silently clamped another."""
    with pytest.raises(KiloError, match="Training: the warm-up is longer than the run"):
        build_config(Training, {"steps": 10})


def test_an_empty_list_stays_empty():
    """Incident 9: a default revived by an empty list."""
    config = build_config(Training, {"promotion_gates": [], "frames": []})
    assert config.promotion_gates == [] and config.frames == []
    assert build_config(Training, to_dict(config)) == config
    report = check_gates({"psnr_db": 3.0}, [])
    assert report.lines == () and report.to_dict() == {} and report.ok


@pytest.mark.parametrize("text, hint, value",
                         [("1e-3", float, 1e-3), ("1e4", int, 10_000), ("true", bool, True), ("true", str, "true"),
                          ("[1, 2]", list[int], [1, 2]), ("[]", list[int], []), ("none", int | None, None),
                          ("0", str | None, "0"), ("l2", Literal["l2", "l1"], "l2"), ("1,2", tuple[int, int], (1, 2)),
                          ("-3", 1, -3), ("0.5", 1.0, 0.5)])
def test_text_is_read_as_the_type_of_its_parameter(text, hint, value):
    read = parse_value(text, hint)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize("text, hint",
                         [("1.5", int), ("x", float), ("2", bool), ("[1, 2.5]", list[int]), ("none", int),
                          ("l3", Literal["l2", "l1"]), ("1,2,3", tuple[int, int])])
def test_text_that_does_not_spell_the_type_is_refused(text, hint):
    with pytest.raises(KiloError, match="must be"): parse_value(text, hint, "size")


def test_a_parameters_cell_is_read_and_never_run(tmp_path):
    with pytest.raises(KiloError, match="must be a plain value"):
        read_parameters(f"steps = open({str(tmp_path / 'x')!r}, 'w').write('a')")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("value, verdict",
                         [(45.0, GREEN), (44.9, RED), (math.nan, RED), (math.inf, GREEN), (None, NOT_RUN), ("nan", RED),
                          ("45", RED), (True, RED)])
def test_what_is_not_measured_or_not_a_number_reaches_nothing(value, verdict):
    assert check_gates({"psnr_db": value}, [Gate("psnr_db", at_least=45.0)]).lines[0].verdict == verdict


def test_a_gate_shows_the_trivial_baseline_beside_the_result():
    """Incident 1: 9 dB was the score of a blank image, and nobody knew."""
    report = check_gates({"psnr_db": 9.6, "psnr_blank_db": 9.4},
                         [Gate("psnr_db", at_least=45.0, baseline_result="psnr_blank_db")])
    assert "9.4" in report.table() and "trivial baseline" in report.table() and "<td>9.4</td>" in report._repr_html_()


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


def test_a_folder_that_is_not_a_run_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("two years")
    with pytest.raises(KiloError, match="not empty"): open_run("demo", tmp_path)
    with pytest.raises(KiloError, match="Nothing to resume"): open_run("demo", tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_resumed_run_continues_its_files_and_sets_its_results_aside(tmp_path):
    data = {"kind": "blender", "path": "/data/lego", "sha256": "aa"}
    first = open_run("demo", tmp_path / "run", data=data)
    first.metrics.write_text("step,loss\n1,0.5\n")
    first.finish({"loss": 0.5})
    second = open_run("demo", tmp_path / "run", data=data, resume=True)
    assert (
        second.resumed
        and second.metrics.read_text().startswith("step")
        and not (second.folder / "results.json").exists()
    )
    assert json.loads((second.folder / "earlier/1/results.json").read_text())["results"]["loss"] == 0.5
    result = second.finish({"loss": 0.4})
    assert result.results["total_s"] >= first.elapsed_s - 1 and read_run(second.folder).results["loss"] == 0.4


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


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
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
    assert record.results == written.results and record.ok and math.isnan(record.tables["frames"][0]["psnr_db"])
    json.loads((run.folder / "results.json").read_text(),
               parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


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


def test_a_page_escapes_text_and_loads_nothing(tmp_path):
    from html.parser import HTMLParser

    from kilonb.reports.pages import write_page

    class Loader(HTMLParser):
        def __init__(self):
            super().__init__()
            self.loaded, self.tags = [], set()

        def handle_starttag(self, tag, attributes):
            self.tags.add(tag)
            values = [value or "" for name,
                      value in attributes if name in ("src", "href", "data", "srcset", "poster", "xlink:href")
                      and tag != "a"]
            self.loaded += [value for value in values if not value.startswith(("data:", "#"))]

    run = open_run("demo", tmp_path / "run", parameters={"note": "<script>alert(1)</script>"})
    run.finish({"psnr_db": 46.0}, [Gate("psnr_db", at_least=45.0, source="<i>paper</i>")])
    remote = {
        "text/html": '<link rel="stylesheet" href="https://example.org/a.css"><script src="https://example.org/plot.js"></script>'
    }
    cells = [{"cell_type": "markdown", "metadata": {}, "id": "a",
              "source": "# T\n$x^2$ ![logo](https://example.org/logo.png) [link](https://example.org)"},
             {"cell_type": "code", "metadata": {}, "id": "b", "execution_count": 1, "source": "'<b>'",
              "outputs": [{"output_type": "stream", "name": "stdout", "text": "<img src=x onerror=alert(2)>"},
                          {"output_type": "display_data", "metadata": {}, "data": remote}]}]
    (run.folder
     / "notebook.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    text = write_page(run.folder).read_text()
    loader = Loader(); loader.feed(text)
    assert loader.loaded == [] and {"math", "meta", "a"} <= loader.tags
    assert (
        "&lt;script&gt;alert(1)" in text
        and "alert(1)</script>" not in text
        and "&lt;img src=x onerror" in text
        and "&lt;i&gt;paper" in text
    )
    assert "default-src 'none'" in text and "mathjax" not in text.lower() and 'name="viewport"' in text


def test_a_page_of_a_failed_run_tells_the_error(tmp_path):
    from kilonb.reports.pages import write_page

    mark_run(open_run("demo", tmp_path / "run").folder, FAILED, "The scene has no frame <7>.")
    (tmp_path / "run" / "notebook.ipynb").write_text("{")
    text = write_page(tmp_path / "run").read_text()
    assert "no frame &lt;7&gt;" in text and "cannot be read as a notebook" in text
