"""The notebooks of nbs/explore: used in JupyterLab, and executed as runs, where a picture replaces the widget."""
import base64
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from jupyter_driver import Notebook, needs_chromium, open_browser, open_lab
from page_checks import WIDGET_CUT_OFF

from kilonb.core.errors import KiloError
from kilonb.batch.execution import run_notebook
from kilonb.reports.run_browser import RunBrowser
from kilonb.core.files import write_json
from kilonb.runs.gates import Gate
from kilonb.runs.notebooks import list_notebooks, read_notebook
from kilonb.reports.run_page import write_page
from kilonb.reports.sweep_explorer import SweepExplorer
from kilonb.reports.sweep_table import list_sweeps, read_sweep_table
from kilonb.runs.folders import open_run
from kilonb.runs.records import read_run

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = list_notebooks("explore", ROOT)
ODD = "<b onclick=alert(1)>odd $x$"


def write_toy_run(outputs: Path, name: str, rate: float) -> Path:
    """A run with a noisy curve, a picture and a gate."""
    import matplotlib.pyplot as plt

    run = open_run("toy", outputs / "toy" / name, {"learning_rate": rate, "width": 32})
    losses = np.exp(-rate * np.arange(500)) + 0.2 * np.random.default_rng(3).random(500)
    (run.folder / "rays").mkdir()
    (run.folder / "rays" / "metrics.csv").write_text("step,elapsed_s,loss\n"
                                                     + "".join(f"{k},{k * 0.01},{value}\n" for k,
                                                               value in enumerate(losses)))
    figure, ax = plt.subplots(figsize=(3, 2))
    ax.plot(losses)
    run.save_figure(figure, "loss")
    plt.close(figure)
    run.finish({"psnr_db": 30 + 100 * rate}, [Gate("psnr_db", at_least=31.0)])
    return run.folder


def write_toy_sweep(folder: Path) -> Path:
    """24 runs: the largest learning rate fails, one run waits, the results of one are damaged."""
    plan, status = [], []
    grid = [(rate, network, seed) for seed in (0, 1, 2) for network in ("mlp", "hash")
            for rate in (1e-3, 3e-3, 1e-2, 3e-1)]
    for k, (rate, network, seed) in enumerate(grid):
        name, varied = f"{k:03d}-{k * 7919:08x}", {"learning_rate": rate, "network": network, "seed": seed}
        plan.append({"name": name, "parameters": varied, "varied": varied})
        ended = "waiting" if k == 20 else "failed" if rate > 0.1 else "finished"
        status.append({"name": name, "varied": varied, "status": ended, "elapsed_s": 5.0 + k, "error": ""})
        if k == 20: continue
        run = open_run("toy", folder / name, varied, seed=seed)
        if rate > 0.1: run.__exit__(KiloError, KiloError("The loss is <nan>: lower the learning rate."), None)
        else:
            run.finish({"psnr_db": 24 - 6 * (math.log10(rate) + 2.4) ** 2 + 2 * (network == "hash") + 0.3 * seed},
                       [Gate("psnr_db", at_least=20.0)])
    (folder / plan[1]["name"] / "results.json").write_text("{")
    write_json(folder / "sweep.json",
               {"sweep": folder.name, "experiment": "toy", "varied": ["learning_rate", "network", "seed"],
                "runs": plan})
    write_json(folder / "status.json",
               {"kind": "sweep", "sweep": folder.name, "experiment": "toy", "status": "interrupted", "runs": status})
    return folder


def write_moving_run(outputs: Path) -> Path:
    """A folder with moving gaussians as a flux4d run keeps them: ground, and a car that drives ahead at 10 m/s."""
    import torch

    from kilonb.flux4d.motion import MovingGaussians, save_moving

    folder = outputs.parent / "clip"
    if folder.exists(): return folder
    draw = torch.Generator().manual_seed(0)
    ground = torch.rand(1500, 3, generator=draw) * torch.tensor([40.0, 16.0, 0.0]) + torch.tensor([2.0, -8.0, 0.0])
    car = torch.rand(600, 3, generator=draw) * torch.tensor([4.0, 1.8, 1.5]) + torch.tensor([10.0, -1.0, 0.2])
    times, count = torch.rand(2100, generator=draw), 2100
    velocities = torch.zeros(count, 1, 3)
    velocities[1500:, 0, 0] = 10.0
    colours = torch.cat([torch.full((1500, 3), 0.0), torch.tensor([[3.0, -2.0, -2.0]]).repeat(600, 1)])
    moving = MovingGaussians(torch.cat([ground, car]) + velocities[:, 0] * times[:, None],
                             torch.tensor([1.0, 0, 0, 0]).repeat(count, 1), torch.full((count, 3), 0.2).log(),
                             torch.full((count,), 3.0), colours, times, velocities, torch.zeros(count).bool())
    still = MovingGaussians(**(moving.parameters() | {"velocities": torch.zeros(count, 1, 3)}))
    for name, gaussians in (("static", still), ("refined", moving)):
        save_moving(folder / f"{name}_gaussians.pt", gaussians)
    return folder


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("explored") / "outputs"
    for name, rate in (("slow", 0.004), (ODD, 0.012), ("quick", 0.05)): write_toy_run(folder, name, rate)
    (write_toy_run(folder, "damaged", 0.1) / "results.json").write_text("{")
    write_toy_sweep(folder / "sweeps" / "toy_sweep")
    return folder


def small(name: str, outputs: Path) -> dict:
    """Parameters that make a notebook small; one that is not named here runs as it is."""
    if name in ("run_browser", "sweep_explorer", "dashboard"): return {"outputs": str(outputs)}
    if name == "flux4d":
        return {"run": str(write_moving_run(outputs)), "width": 128, "height": 72, "drag_width": 64, "page_points": 500}
    if name == "pose": return {"outputs": str(outputs)}
    if name != "orbit": return {}
    from kilonb.scenes.brickyard import build_brickyard
    from kilonb.splats.ply import write_ply

    teacher = outputs.parent / "teacher.ply"
    if not teacher.exists(): write_ply(teacher, build_brickyard(seed=0, count=4000))
    return {"data": f"ply:{teacher}", "outputs": str(outputs), "width": 96, "drag_width": 48, "quick_steps": 20,
            "pictures": 2}


@pytest.fixture(scope="module")
def browser():
    """The module's one browser: playwright allows one at a time in a thread."""
    with open_browser() as chromium: yield chromium


@pytest.fixture(scope="module")
def opened(tmp_path_factory, outputs, browser):
    """A function that opens a notebook with its parameters in the module's one JupyterLab."""
    with open_lab(tmp_path_factory.mktemp("jupyter"), {"KILONB_OUTPUTS": str(outputs)}) as lab:
        def open_notebook(name: str) -> Notebook:
            notebook = json.loads(NOTEBOOKS[name].read_text(encoding="utf-8"))
            tagged = next(i for i,
                          cell in enumerate(notebook["cells"]) if "parameters" in cell["metadata"].get("tags", []))
            own = {"run_dir": str(lab.root / "run")} if name == "orbit" else {}
            given = "\n".join(f"{key} = {value!r}" for key, value in {**small(name, outputs), **own}.items())
            cell = {"cell_type": "code", "id": "injected", "metadata": {}, "source": given, "outputs": [],
                    "execution_count": None}
            notebook["cells"].insert(tagged + 1, cell)
            (lab.root / f"{name}.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
            return Notebook(browser, lab, f"{name}.ipynb")
        yield open_notebook


# The summed steps of the last visible curve; the paths of all lines; whether every figure is as wide as its container.
ROUGHNESS = """() => {
  const plot = document.querySelector('.kilonb-explorer .js-plotly-plot');
  if (!plot || !plot._fullData || !plot._fullData.length) return null;
  const roughness = y => y.reduce((sum, value, i) => sum + (i ? Math.abs(value - y[i - 1]) : 0), 0);
  const visible = plot._fullData.filter(trace => trace.visible === true);
  return visible.map(trace => roughness(Array.from(trace.y))).at(-1);
}"""
DRAWN = """() => [...document.querySelectorAll('.kilonb-explorer .scatterlayer path.js-line')]
  .map(path => path.getAttribute('d')).join()"""
FITTED = """() => {
  const plots = [...document.querySelectorAll('.kilonb-explorer .js-plotly-plot')];
  const fits = plot => Math.abs(plot._fullLayout.width - plot.clientWidth) < 2;
  return plots.length && plots.every(plot => plot._fullLayout && plot.clientWidth > 300 && fits(plot));
}"""


def react_runs(notebook: Notebook, outputs: Path) -> None:
    page = notebook.page
    notebook.wait_until("() => document.querySelectorAll('.kilonb-explorer .scatterlayer path.js-line').length >= 3")
    notebook.wait_until(FITTED)
    rough, drawn = page.evaluate(ROUGHNESS), page.evaluate(DRAWN)
    notebook.move_slider(".kilonb-smoothing", 60)
    notebook.wait_until(f"rough => ({ROUGHNESS})() < 0.5 * rough", rough)
    assert page.evaluate(DRAWN) != drawn, "the smoothed curve is drawn"
    table = page.locator(".kilonb-table")
    assert ODD in table.inner_text() and table.locator("b[onclick]").count() == 0, "a run's name is text"
    assert "toy/damaged" in page.locator(".kilonb-explorer").inner_text(), "the damaged run is named"
    assert (
        page.locator(".kilonb-runs option").count() >= 3
        and page.locator(".kilonb-runs option", has_text="toy/late").count() == 0
    )
    notebook.wait_until("() => [...document.querySelectorAll('.kilonb-shown img')].filter(image => "
                        "image.naturalWidth > 50).length === 3")
    write_toy_run(outputs, "late", 0.02)
    page.locator(".kilonb-refresh").click()
    notebook.wait_until("() => [...document.querySelectorAll('.kilonb-runs option')].some(option => "
                        "option.textContent.includes('toy/late'))")
    page.locator(".kilonb-filter input").fill("quick")
    notebook.wait_until("() => ![...document.querySelectorAll('.kilonb-runs option')].some(option => "
                        "option.textContent.includes('toy/late'))")     # narrowed; chosen runs stay in the list
    page.locator(".kilonb-runs select").select_option(label="✔ toy/quick")
    notebook.wait_until("() => document.querySelectorAll('.kilonb-table th').length === 2")


def react_sweeps(notebook: Notebook, outputs: Path) -> None:
    page = notebook.page
    rows = "() => document.querySelectorAll('.kilonb-table tbody tr').length"
    page.wait_for_selector(".kilonb-explorer .parcoords .axis-brush")
    notebook.wait_until(FITTED)
    everything, columns = page.evaluate(rows), page.locator(".kilonb-explorer .parcoords .y-axis").count()
    assert everything == 23 and columns >= 4, "24 runs except the damaged one"
    notebook.move_slider(".kilonb-fraction", 15, "ArrowLeft")
    notebook.wait_until(f"() => ({rows})() > 0 && ({rows})() <= 6")
    dimensions = "document.querySelector('.kilonb-explorer .js-plotly-plot')._fullData[0].dimensions"
    assert page.evaluate(f"() => {dimensions}.filter(d => "
                         "d.constraintrange).map(d => d.label)") == ["psnr_db"], "the figure shows the slider's brush"
    page.locator(".kilonb-clear").click()
    notebook.wait_until(f"all => ({rows})() === all", everything)
    box = page.locator(".kilonb-explorer .parcoords .axis-brush").first.bounding_box()
    middle = box["x"] + box["width"] / 2
    page.mouse.move(middle, box["y"] + 0.95 * box["height"])
    page.mouse.down()
    page.mouse.move(middle, box["y"] + 0.5 * box["height"], steps=5)
    page.mouse.up()
    notebook.wait_until(f"all => ({rows})() > 0 && ({rows})() < all", everything)
    failures = page.locator(".kilonb-failures")
    assert "lower the learning rate" in failures.inner_text() and "is left out" in failures.inner_text()
    assert failures.locator("nan").count() == 0, "an error message is text"


def react_orbit(notebook: Notebook, outputs: Path) -> None:
    page = notebook.page
    frames = "() => +(document.querySelector('.kilonb-orbit')?.dataset.frames ?? 0)"
    pixels = "() => document.querySelector('.kilonb-orbit .student canvas').toDataURL()"
    notebook.wait_until(f"() => ({frames})() > 0")
    before, first = page.evaluate(frames), page.evaluate(pixels)
    notebook.move_slider('[aria-label="field of view"]', 5)
    notebook.wait_until(f"before => ({frames})() > before", before)
    notebook.wait_until(f"first => ({pixels})() !== first", first)


def react_clip(notebook: Notebook, outputs: Path) -> None:
    """The slider moves what moves; keys move the camera; play returns to the beginning and advances."""
    page = notebook.page
    root = "document.querySelector('.kilonb-orbit')"
    full = f"() => +({root}?.dataset.full ?? 0)"
    pixels = f"() => ['static', 'refined'].map(name => {root}.querySelector(`.${{name}} canvas`).toDataURL())"
    notebook.wait_until(f"() => ({full})() > 0")
    shown, (still, moving) = page.evaluate(full), page.evaluate(pixels)
    notebook.move_slider('[aria-label="time"]', 12)
    notebook.wait_until(f"shown => ({full})() > shown && {root}.dataset.time > 1.0", shown)
    after = page.evaluate(pixels)
    assert after[0] == still and after[1] != moving, "only the moving gaussians change over time"
    shown = page.evaluate(full)
    page.locator(".kilonb-orbit .refined canvas").press("w")
    notebook.wait_until(f"shown => ({full})() > shown", shown)
    assert page.evaluate(pixels)[0] != still, "the camera moved"
    shown = page.evaluate(full)
    page.locator('.kilonb-orbit [aria-label="channel"]').select_option("velocity")
    notebook.wait_until(f"shown => ({full})() > shown", shown)
    assert "deg" in page.locator(".kilonb-orbit .refined .bar").inner_text()
    frames = page.evaluate(f"() => +{root}.dataset.frames")
    page.locator(".kilonb-orbit .refined canvas").press(" ")
    notebook.wait_until(f"frames => +{root}.dataset.frames > frames + 3", frames)
    assert page.locator('.kilonb-orbit [aria-label="play"]').inner_text() == "pause"
    page.locator('.kilonb-orbit [aria-label="play"]').click()
    notebook.wait_for_idle()


def react_pose(notebook: Notebook, outputs: Path) -> None:
    """The slider changes the picture; a free camera has its own."""
    page = notebook.page
    shown = "() => document.querySelector('.kilonb-pose img')?.src ?? ''"
    notebook.wait_until(f"() => ({shown})() !== ''")
    before = page.evaluate(shown)
    notebook.move_slider(".kilonb-frame", 1)
    notebook.wait_until(f"before => ({shown})() !== before", before)
    before = page.evaluate(shown)
    page.locator(".kilonb-pose .kilonb-camera select").select_option("free camera")
    notebook.wait_until(f"before => ({shown})() !== before", before)
    notebook.wait_until("() => document.querySelector('.kilonb-pose .kilonb-note').innerText.includes('free camera')")


def react_episodes(notebook: Notebook, outputs: Path) -> None:
    """The slider changes the frame; an action's button changes the strip."""
    page = notebook.page
    shown = "() => document.querySelector('.kilonb-episode img')?.src ?? ''"
    notebook.wait_until(f"() => ({shown})() !== ''")
    before = page.evaluate(shown)
    notebook.move_slider(".kilonb-frame", 2)
    notebook.wait_until(f"before => ({shown})() !== before", before)
    notebook.wait_until("() => document.querySelector('.kilonb-note').innerText.includes('frame 32')")
    before = page.evaluate(shown)
    page.locator(".kilonb-action-down").click()
    notebook.wait_until(f"before => ({shown})() !== before", before)


def react_dashboard(notebook: Notebook, outputs: Path) -> None:
    """The link opens a page with all runs, whose smoothing slider changes the curves' readout."""
    address = notebook.page.locator("a:has-text('Open the dashboard')").first.get_attribute("href")
    page = notebook.page.context.browser.new_page()
    page.goto(address)
    page.wait_for_selector(".chart canvas")
    page.locator("#filter").fill("toy/damaged unreadable")
    page.wait_for_selector("#runs .run:has-text('toy/damaged')")
    shown = "() => document.querySelector('.chart .readout').textContent"
    page.wait_for_function(f"() => /at \\d/.test(({shown})())")
    before = page.evaluate(shown)
    page.locator("#smoothing").fill("0.9")
    page.wait_for_function(f"before => ({shown})() !== before", arg=before)
    page.close()


REACTIONS = {"dashboard": react_dashboard, "run_browser": react_runs, "sweep_explorer": react_sweeps,
             "orbit": react_orbit, "flux4d": react_clip, "pose": react_pose, "dream": react_episodes}


@needs_chromium
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_an_explorer_opens_in_jupyterlab_runs_and_reacts_to_a_slider(name, opened, outputs):
    assert name in REACTIONS, (
        f"nbs/explore/{name}.ipynb has no entry in REACTIONS: add what must change when its slider moves"
    )
    notebook = opened(name)
    try:
        notebook.run_all()
        assert not notebook.error_outputs()
        REACTIONS[name](notebook, outputs)
        notebook.page.set_viewport_size({"width": 390, "height": 844})
        if name != "dashboard": notebook.wait_until(f"() => ({WIDGET_CUT_OFF})().length === 0")
        assert not notebook.error_outputs()
        assert not notebook.console_errors()
    finally: notebook.close()


def pictures(page: Path) -> list:
    """The pictures of the notebook's part of a page."""
    from PIL import Image

    inside = page.read_text(encoding="utf-8").split('<div class="notebook">', 1)[1]
    return [Image.open(io.BytesIO(base64.b64decode(data)))
            for data in re.findall(r'src="data:image/png;base64,([^"]+)"', inside)]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_page_of_an_explorer_has_a_picture_where_the_widget_would_be(name, outputs, tmp_path):
    record = run_notebook(read_notebook(NOTEBOOKS[name]), small(name, outputs), run_dir=tmp_path / "run")
    page = write_page(record.folder)
    shown = pictures(page)
    assert shown and shown[0].width >= 400 and len(shown[0].convert("RGB").getcolors(1 << 24)) > 20, (
        "a picture that is not empty"
    )
    assert "widget-view" not in page.read_text(encoding="utf-8") and record.status == "finished"


def execute_here(name: str, given: dict) -> dict:
    """The notebook's variables after its cells ran in this process with these parameters, as by hand and without a
    front end."""
    scope = {"__annotations__": {}, "__builtins__": __builtins__}
    for cell in json.loads(NOTEBOOKS[name].read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code": exec("".join(cell["source"]), scope)
        if "parameters" in cell["metadata"].get("tags", []): scope.update(given)
    return scope


@pytest.mark.parametrize("name, way",
                         [("run_browser", "kilonb run single_view_overfit"), ("sweep_explorer", "kilonb sweep FILE"),
                          ("flux4d", "kilonb run flux4d_overfit")])
def test_without_runs_a_notebook_names_the_command_that_makes_some(name, way, tmp_path, capsys):
    execute_here(name, {"outputs": str(tmp_path / "none"), "run_dir": str(tmp_path / "run")})
    record = read_run(tmp_path / "run")
    count = record.results["models" if name == "flux4d" else "runs"]
    assert record.status == "finished" and count == 0 and way in capsys.readouterr().out


@pytest.mark.parametrize("name", ["run_browser", "sweep_explorer", "dashboard"])
def test_an_explorer_opened_by_hand_records_no_run(name, outputs):
    """Without `run_dir` these notebooks write nothing into the folder that they show."""
    before = sorted(outputs.rglob("status.json"))
    execute_here(name, {"outputs": str(outputs)})
    assert before and sorted(outputs.rglob("status.json")) == before


def test_a_spike_of_one_step_in_a_long_run_is_still_drawn(tmp_path):
    run = open_run("toy", tmp_path / "toy" / "long")
    run.metrics.write_text("step,elapsed_s,loss\n"
                           + "".join(f"{k},{k},{1000.0 if k == 33_333 else 1.0}\n" for k in range(50_000)))
    run.finish({})
    drawn = RunBrowser(tmp_path).drawn()
    assert len(drawn[0].y) < 5000 and drawn[0].y.max() == 1000 and drawn[0].x[drawn[0].y.argmax()] == 33_333


def test_one_damaged_run_does_not_hide_the_others(outputs):
    browser, table = RunBrowser(outputs, "toy"), read_sweep_table(outputs / "sweeps" / "toy_sweep")
    assert len(browser.records) >= 3 and [sentence for sentence in browser.unreadable if "toy/damaged" in sentence]
    assert len(table.rows) == 23 and len(table.unreadable) == 1 and len(table.failed()) == 6
    assert list_sweeps(outputs) == [outputs / "sweeps" / "toy_sweep"]


def test_a_sweep_that_is_not_there_is_named(tmp_path):
    with pytest.raises(KiloError, match=r"No sweep in .*nowhere"): SweepExplorer(tmp_path / "nowhere")


def test_a_log_that_is_being_written_is_shown_as_far_as_it_goes(tmp_path):
    run = open_run("toy", tmp_path / "toy" / "going")
    run.metrics.write_text("step,elapsed_s,loss\n1,0.1,0.5\n2,0.2,0.4\n3,0.3")
    browser = RunBrowser(tmp_path)
    assert browser.chosen[0].status == "running" and browser.drawn()[0].y.tolist() == [0.5, 0.4]
    run.metrics.write_text("step,elapsed_s,loss\n1,0.1,0.5\n2,0.2,0.4\n3,0.3,0.25\n")
    assert browser.drawn()[0].y.tolist() == [0.5, 0.4, 0.25] and read_run(run.folder).status == "running"
    run.finish({})


@needs_chromium
def test_the_offline_page_of_a_clip_draws_what_moves_at_the_time_of_its_slider(outputs, browser):
    """The page is opened from a file, without a server, and may load nothing."""
    from kilonb.flux4d.explorer import find_moving, write_clip_page
    from kilonb.flux4d.motion import load_moving

    files = find_moving(str(write_moving_run(outputs)))
    errors, pictures_ = [], {}
    page = browser.new_page(viewport={"width": 700, "height": 600})
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(("file:", "data:")) else
            errors.append(request.url))
    for name, path in files.items():
        file = outputs.parent / f"{name}.html"
        written = write_clip_page(file, load_moving(path), f"<i>{name}", times=(0, 1, 0.1))
        assert written.stat().st_size < 5e6
        page.goto(written.as_uri())
        pictures_[name] = []
        for time, step in ((0.0, 0), (0.8, 8)):
            if step:
                page.locator("#canvas").focus()
                for _ in range(step): page.keyboard.press(".")
            page.wait_for_function(f"() => document.body.dataset.time === '{time:.3f}'")
            pictures_[name].append(page.evaluate("() => document.getElementById('canvas').toDataURL()"))
        assert page.locator("h1").inner_text() == f"<i>{name}", "a title is text"
    page.locator("#channel").select_option("1")
    page.locator("#play").click()
    page.wait_for_function("() => +document.body.dataset.frames > 10")
    colours = page.evaluate("() => document.getElementById('canvas').toDataURL()")
    page.close()
    assert pictures_["static"][0] == pictures_["static"][1] and pictures_["refined"][0] != pictures_["refined"][1]
    assert colours not in pictures_["refined"] and not [error for error in errors if "GL Driver" not in error]
