"""The first hour: set-up and runs are never silent, a page begins with a picture, advice is right, and a bound on time
judges only the kind of machine that it was set on."""
import io
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import KILONB, real_data
from PIL import Image, ImageDraw

from kilonb.batch import execution
from kilonb.batch.execution import run_notebook
from kilonb.core.errors import KiloError
from kilonb.data.downloads import get, how_to_get
from kilonb.data.manifests import load_manifests
from kilonb.imaging.pictures import save_comparison
from kilonb.reports.run_page import headline_picture, write_page
from kilonb.runs.folders import open_run
from kilonb.runs.gate_files import gate_files
from kilonb.runs.gates import NOT_JUDGED, Gate, lower_is_better
from kilonb.runs.notebooks import read_notebook
from kilonb.runs.records import find_run, read_run
from kilonb.scenes.opv2v import load_opv2v
from kilonb.scenes.v2xsim import load_v2xsim
from kilonb.training import progress

ROOT = Path(__file__).resolve().parents[1]


def kilonb(*arguments: str, outputs: Path, **environment: str) -> subprocess.CompletedProcess:
    given = {name: value for name, value in os.environ.items() if name != "KILONB_DATA"}
    return subprocess.run([*KILONB, *arguments], capture_output=True, text=True,
                          env={**given, "KILONB_OUTPUTS": str(outputs), **environment})


def write_notebook(path: Path, *sources: str) -> Path:
    cells = [{"cell_type": "markdown" if source[0] == "#" else "code", "id": f"c{i}", "source": source,
              "metadata": {"tags": ["parameters"] if "run_dir: str" in source else []}}
             | ({} if source[0] == "#" else {"outputs": [], "execution_count": None})
             for i, source in enumerate(sources)]
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return path


def test_the_setup_says_something_while_pip_is_silent_and_ends_with_its_errors(tmp_path):
    for name in ("Makefile", "constraints.txt", "settings.ini", "setup.py"): shutil.copy(ROOT / name, tmp_path)
    fake = tmp_path / "fake-python"
    fake.write_text('#!/bin/sh\ncase "$*" in\n  *venv*) mkdir -p .venv/bin && cp fake-python .venv/bin/python;;\n'
                    '  *wheel*) echo "Collecting wheel"; sleep 1;;\n'
                    '  *pip*) echo "Collecting torch"; sleep 1; echo "Installing collected packages: torch"; sleep 1;\n'
                    '    echo "ERROR: the disk is full"; exit 1;;\nesac\n')
    fake.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("M")}
    done = subprocess.run(["make", "PYTHON=./fake-python", "demo"], cwd=tmp_path, capture_output=True, text=True,
                          env={**environment, "BEAT": "0.2"})
    assert done.returncode and done.stdout.startswith("setting up .venv") and "then the demo: about" in done.stdout
    assert "  finding and downloading: 1 packages, " in done.stdout and "  installing: " in done.stdout
    assert "ERROR: the disk is full" in done.stdout and "output of pip is in .venv/install.log" in done.stdout
    assert not (tmp_path / ".venv" / ".complete").exists()


def test_the_remaining_time_does_not_count_the_first_step_which_compiles(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    log = io.StringIO()
    shown = progress.Progress(1001, stream=log)
    for step in range(1, 102):
        clock[0] += 30.0 if step == 1 else 0.1
        shown.update(step)
    last = log.getvalue().splitlines()[-1]
    assert "10.0 steps/s" in last and "1:30 left" in last, last
    spaced = [line for line in log.getvalue().splitlines() if "steps/s" in line]
    assert len(spaced) <= 3, "at most a line every 5 s"


def test_a_notebook_that_prints_nothing_is_reported_but_not_in_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(execution, "_SILENT_S", 0.6)
    path = write_notebook(tmp_path / "quiet.ipynb", "# Quiet", 'run_dir: str = ""', "## Scoring",
                          "import time\ntime.sleep(2.5)\nprint('scored')")
    shown = io.StringIO()
    record = run_notebook(read_notebook(path), run_dir=tmp_path / "run", stream=shown)
    lines = [line for line in shown.getvalue().splitlines() if line.startswith("  cell 4 of 4 (Scoring): 0:0")]
    assert lines and len(lines) <= 5 and "scored" in shown.getvalue(), shown.getvalue()
    assert "cell 4 of 4" not in (record.folder / "log.txt").read_text()


def test_a_run_ends_with_its_page_and_the_next_command(tmp_path):
    path = write_notebook(tmp_path / "tiny.ipynb", "# Tiny", 'run_dir: str = ""', "print(1)")
    done = kilonb("run", str(path), "--out", str(tmp_path / "run"), outputs=tmp_path / "outputs")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and f"open     {tmp_path / 'run' / 'index.html'}" in lines, done.stdout + done.stderr
    assert lines[-1].startswith("next     ") and " report " in lines[-1]


@pytest.mark.parametrize("data,words", [
    ("blender:/nowhere", "is not there"), ("brickyrad", "brickyard"),
    ("critter", "is of kind dannce; expected blender"), ("lego_400", "KILONB_DATA is not set"),
    ("mouse_dannce", "prints its source and the steps")])
def test_wrong_data_is_one_sentence_before_a_kernel_starts_and_leaves_no_folder(data, words, tmp_path):
    done = kilonb("run", "single_view_overfit", "--data", data, outputs=tmp_path / "outputs")
    assert done.returncode and not done.stdout and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "outputs" / "single_view_overfit").exists()


def test_every_bound_on_a_time_or_a_speed_names_its_kind_of_machine():
    def flat(entries):
        for entry in entries: yield from flat(entry.gates) if entry.gates else [entry]
    timed = [(name, entry) for name, rules in gate_files(ROOT).items() for entry in flat(rules.gates)
             if entry.result.endswith(("_s", "_ms")) and "{each}" not in entry.result]
    assert len(timed) > 25
    for name, entry in timed:
        assert entry.machine and (lower_is_better(entry.result) or entry.at_least), (name, entry.result)


def test_a_slow_run_on_another_kind_of_machine_is_not_red_and_says_why(tmp_path):
    gates = [Gate("psnr_db", at_least=30.0), Gate("train_s", at_most=10.0, machine="3 cores, Imaginary 9000")]
    run = open_run("demo", tmp_path / "outputs" / "demo" / "a")
    run.finish({"psnr_db": 31.0, "train_s": 99.0}, gates)
    record = read_run(run.folder)
    assert record.ok and record.report.lines[1].verdict == NOT_JUDGED
    assert "not judged here, set on 3 cores, Imaginary 9000" in record.report.sentence()
    shown = kilonb("show", str(run.folder), outputs=tmp_path / "outputs").stdout
    assert "– not judged here: set on 3 cores, Imaginary 9000" in shown and "The gate is green; train_s" in shown
    page = write_page(run.folder).read_text()
    assert 'class="verdict-not-judged"' in page and 'class="status good"' in page


def test_a_sweep_is_one_row_of_the_list_and_its_runs_are_found_by_name(tmp_path):
    outputs = tmp_path / "outputs"
    for name in ("001-aa", "002-bb"):
        open_run("demo", outputs / "sweeps" / "rates" / name).finish({"psnr_db": 31.0}, [Gate("psnr_db", at_least=30)])
    listed = kilonb("runs", "list", outputs=outputs).stdout
    assert "sweeps/rates" in listed and "2 finished" in listed and "001-aa" not in listed and "--sweeps" in listed
    assert "001-aa" in kilonb("runs", "list", "--sweeps", outputs=outputs).stdout
    assert "sweeps/rates/002-bb" in kilonb("show", "rates", outputs=outputs).stdout
    assert find_run("rates/002-bb", outputs).name == "002-bb" == find_run("002", outputs).name
    with pytest.raises(KiloError, match="is a sweep: name one of its runs"): find_run("rates", outputs)


def test_every_real_dataset_has_checksums_and_says_how_it_is_obtained(tmp_path):
    real = {name: one for name, one in load_manifests().items() if not one.synthetic}
    assert len(real) >= 9
    for name, one in real.items():
        assert one.files and one.total_bytes and one.checksums != "MANIFEST.json", name
        text = how_to_get(one)
        assert one.source in text and f"kilonb data verify {name}" in text and "is above" not in text
    by_hand = sorted(name for name, one in real.items() if one.fetch.how == "by hand")
    assert by_hand == ["mouse_dannce", "playbot"]
    done = kilonb("data", "get", "mouse_dannce", outputs=tmp_path)
    assert done.returncode == 1 and "https://github.com/spoonsso/dannce" in done.stdout and not done.stderr
    with pytest.raises(KiloError, match="prints its source and the steps"): get("playbot", tmp_path)


@pytest.mark.parametrize("name,load", [("opv2v_641_4cam", load_opv2v), ("v2xsim_carla_6cam", load_v2xsim)])
def test_a_downloaded_set_is_read_with_the_calibration_in_its_manifest(name, load, tmp_path):
    """The pictures hold no calibration, so the download writes one beside them: the same cameras as in our copy."""
    from kilonb.data.downloads import _write_calibration

    source, manifest = real_data(name), load_manifests()[name]
    folder = tmp_path / name
    for path in manifest.files:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).symlink_to(source / path)
    _write_calibration(manifest, folder)
    ours, theirs = ({view.name: view.camera for view in load(path)[0].views()} for path in (source, folder))
    assert list(ours) == list(theirs) and len(ours) >= 4
    for camera in ours: assert torch.equal(ours[camera].camera_to_world, theirs[camera].camera_to_world)
    assert all(ours[name].fx == theirs[name].fx for name in ours)


@pytest.fixture(scope="module")
def browser():
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None: pytest.skip("there is no Chromium here")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as player:
        opened = player.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


def pair_page(folder: Path) -> Path:
    """The page of a run with three scored views and a curve."""
    run = open_run("demo", folder)
    for number, score in enumerate((21.0, 35.5, 28.0)):
        pictures = {"target": Image.new("RGB", (200, 150), "white"), "student": Image.new("RGB", (200, 150), "gray")}
        ImageDraw.Draw(pictures["target"]).ellipse((60, 30, 140, 120), fill="orange")
        save_comparison(run.folder, f"test/r_{number}", pictures, score, "psnr_db")
    run.save_figure(Image.new("RGB", (300, 200), "teal"), "curves")
    run.finish({"psnr_db": 28.0, "train_s": 3.5}, [Gate("psnr_db", at_least=25.0)])
    return write_page(folder)


def figure_page(folder: Path) -> Path:
    """The page of a run with a wide sheet and a training curve."""
    run = open_run("demo", folder)
    run.save_figure(Image.new("RGB", (300, 200), "teal"), "training")
    run.save_figure(Image.new("RGB", (1200, 260), "orange"), "predictions")
    run.finish({"accuracy": 0.9}, [Gate("accuracy", at_least=0.5)])
    assert headline_picture(folder).name == "predictions.png"
    return write_page(folder)


@pytest.mark.parametrize("width,height", [(1440, 900), (390, 844)])
@pytest.mark.parametrize("make", [pair_page, figure_page])
def test_the_picture_of_a_run_is_on_the_first_screen_of_its_page(make, width, height, browser, tmp_path):
    page = browser.new_page(viewport={"width": width, "height": height})
    errors, asked = [], []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    path = make(tmp_path / "run")
    page.goto(path.as_uri())
    box = page.locator(".headline .stage, .headline .picture").first.bounding_box()
    seen = min(height, box["y"] + box["height"]) - box["y"]
    assert box["y"] < height and seen >= box["height"] / 2 and box["height"] > 80, box
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing is cut off at the right"
    assert not errors and [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
    page.close()


def test_the_slider_between_two_pictures_moves_by_keys_and_by_dragging(browser, tmp_path):
    page = browser.new_page(viewport={"width": 900, "height": 800})
    page.goto(pair_page(tmp_path / "run").as_uri())
    edge = page.locator(".slider input[type=range]")
    script = "getComputedStyle(document.querySelector('.slider')).getPropertyValue('--at')"
    at = lambda: float(page.evaluate(script)[:-1])
    assert "test/r_2" in page.locator(".slider figcaption").inner_text(), "the view with the median score"
    assert abs(at() - 50) < 1 and edge.get_attribute("aria-label")
    edge.focus()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid", "the focus is visible"
    for _ in range(20): page.keyboard.press("ArrowRight")
    assert edge.input_value() == "70" and 60 < at() < 75
    page.keyboard.press("Home")
    assert at() == 0.0
    box = edge.bounding_box()
    page.mouse.click(box["x"] + 0.8 * box["width"], box["y"] + 20)
    assert 70 < at() < 90
    page.close()
