"""`kilonb view`: what is shown of a run, live in a browser tab and as one HTML file."""
import contextlib
import json
import os
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from helpers import KILONB
from jupyter_driver import needs_chromium, open_browser
from pages import moving_run

from kilonb.core.errors import KiloError
from kilonb.data.references import DataReference
from kilonb.distill import orbit_pairs
from kilonb.distill.orbit import teacher_of_student
from kilonb.distill.student import make_student, save_student
from kilonb.fields.mlp import MLPConfig
from kilonb.fields.occupancy import occupancy_from_gaussians
from kilonb.imaging.channels import ViewSettings
from kilonb.pose.explorer import ReconstructedFrames
from kilonb.pose.toy_recordings import carved_gaussians, write_toy_recording
from kilonb.runs.folders import open_run
from kilonb.runs.records import find_run
from kilonb.scenes.brickyard import write_brickyard
from kilonb.scenes.photographs import open_views
from kilonb.sharing import view as view_module
from kilonb.sharing.orbit_pages import SphereConfig
from kilonb.sharing.picture_grids import write_grid_page
from kilonb.sharing.view import newest_viewable, open_view, serve_view, view_run, write_view
from kilonb.sharing.views import View, view_animal, view_pair
from kilonb.splats.formats import read_gaussians

SMALL = SphereConfig(azimuths=8, width=48)


def quiet(line: str) -> None: pass


@pytest.fixture(scope="module")
def yard(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("view") / "yard"
    write_brickyard(folder, width=48, height=48, train=6, test=1, count=4000)
    return folder


def add_student(outputs: Path, yard: Path, experiment: str, name: str = "a", **parameters) -> Path:
    """A finished run of an experiment with an untrained student of the yard."""
    reference = DataReference("blender", yard, "", "12ab")
    run = open_run(experiment, outputs / experiment / name, {"data": f"blender:{yard}", **parameters}, reference)
    gaussians = read_gaussians(teacher_of_student(reference))
    grid = occupancy_from_gaussians(gaussians.means, gaussians.quats, gaussians.scales, gaussians.opacities, 32)
    student = make_student(grid, MLPConfig(hidden=16, layers=2, density_bias=2.0), step=0.05)
    save_student(student, run.folder / "student.pt", "raw")
    run.finish({})
    return run.folder / "student.pt"


@pytest.fixture(scope="module")
def outputs(yard) -> Path:
    folder = yard.parent / "outputs"
    add_student(folder, yard, "students")
    add_student(folder, yard, "single_view_overfit", frame=3, split="train")
    return folder


# Which model is shown

def test_without_a_name_the_newest_student_of_many_views_is_shown(outputs):
    said = []
    view = open_view("", outputs, said.append)
    assert "students/a" in said[0] and view.widget.models == ["teacher", "student"] and "students/a" in view.note


def test_a_one_view_student_is_shown_where_it_is_named_and_begins_at_its_view(outputs, yard):
    view = open_view("single_view_overfit", outputs, quiet)
    camera, widget = open_views("blender", yard, "train")[3].camera, view.widget
    assert widget.models == ["teacher", "one-view student"] and "one-view student" in view.title
    assert "fitted to one view, train 3" in view.note
    torch.testing.assert_close(widget.pose.camera(48, 48).camera_to_world, camera.camera_to_world, atol=1e-4, rtol=0)


def test_after_the_demo_alone_a_whole_preview_is_distilled_once(tmp_path, yard, monkeypatch):
    calls, distil = [], orbit_pairs.distill_preview
    monkeypatch.setattr(view_module, "STAND_IN", f"blender:{yard}")
    monkeypatch.setattr(orbit_pairs, "distill_preview",
                        lambda *given: calls.append(given) or distil(*given[:2], 10, views=6, width=32, quiet=True))
    add_student(tmp_path, yard, "single_view_overfit", frame=0, split="train")
    assert newest_viewable(tmp_path) is None
    first, again = open_view("", tmp_path, quiet), open_view("", tmp_path, quiet)
    assert len(calls) == 1 and first.note == again.note and "preview" in first.note and "not a result" in first.note
    assert first.widget.models == ["teacher", "student"]
    add_student(tmp_path, yard, "students")
    assert "students/a" in open_view("", tmp_path, quiet).note


@pytest.mark.parametrize("name,words", [("nothing", "No run 'nothing'"), ("opv2v:/nowhere", "opv2v:/nowhere"),
                                        ("brickyrad", "No run 'brickyrad'")])
def test_what_is_not_there_is_one_sentence(outputs, name, words):
    with pytest.raises(KiloError) as caught: open_view(name, outputs, quiet)
    assert words in str(caught.value) and str(caught.value).count("\n") == 0


def test_what_cannot_be_viewed_is_refused_with_what_can(tmp_path):
    open_run("line", tmp_path / "line" / "a").finish({"loss": 1.0})
    with pytest.raises(KiloError, match=r"line/a holds nothing that can be viewed: viewed are students and gaussians"):
        open_view("line", tmp_path, quiet)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(KiloError): open_view(tmp_path / "notes.txt", tmp_path, quiet)


# One file

@pytest.fixture(scope="module")
def page(outputs) -> Path:
    return write_view("students", outputs.parent / "orbit.html", SMALL, 1.0, outputs, quiet)


def test_one_file_holds_all_pictures_within_its_size_and_loads_nothing(page):
    text = page.read_text()
    grid, = json.loads(re.search(r'id="grids-data">(.*?)</script>', text, re.S)[1])
    assert grid["panels"] == ["teacher", "student"] and len(grid["pictures"]) == 5 * 8 * 2
    assert page.stat().st_size < 1e6 and "80 pictures of 48 x 48 pixels" in text and "<noscript>" in text
    assert "http" not in text.replace("http-equiv", "") and "connect-src" not in text


def test_a_file_that_would_be_too_large_is_refused_and_nothing_is_left(outputs, tmp_path):
    with pytest.raises(KiloError, match="fewer or narrower pictures"):
        write_view("students", tmp_path / "orbit.html", SphereConfig(azimuths=2, width=32), 0.061, outputs, quiet)
    assert not list(tmp_path.iterdir())


# In a browser

class Tab:
    """A page with what it complained about and what it asked for."""

    def __init__(self, browser, address: str, width: int = 1440, offline: bool = False):
        self.errors, self.requests = [], []
        context = browser.new_context(viewport={"width": width, "height": 900}, offline=offline)
        self.page = context.new_page()
        self.page.on("console", lambda one: self.errors.append(one.text) if one.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(address)

    def wait(self, script: str) -> None:
        """Wait until a script is true; playwright's own way needs `eval`, which the pages' policy forbids."""
        deadline = time.monotonic() + 60
        while not self.page.evaluate(script):
            assert time.monotonic() < deadline, f"never true: {script}; errors: {self.errors}"
            time.sleep(0.05)

    def fits(self) -> bool:
        return self.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")

    def data(self, selector: str, name: str) -> str:
        return self.page.eval_on_selector(selector, "(node, name) => node.dataset[name]", name)


@pytest.fixture(scope="module")
def browser():
    with open_browser() as chromium: yield chromium


@contextlib.contextmanager
def serving(view: View):
    server = serve_view(view)
    try: yield server
    finally: server.stop()


@pytest.fixture(scope="module")
def pair(outputs, yard):
    return orbit_pairs.open_pair(DataReference("blender", yard, "", "12ab"), outputs=outputs, say=quiet)


@needs_chromium
@pytest.mark.parametrize("width", [1440, 390])
def test_the_orbit_is_turned_in_a_plain_tab(browser, pair, width):
    with serving(view_pair(pair, ViewSettings(96, 96, 48))) as server:
        tab = Tab(browser, server.address, width)
        tab.wait("+document.querySelector('.kilonb-orbit').dataset.full >= 1")
        before = int(tab.data(".kilonb-orbit", "frames"))
        tab.page.focus("figure.student canvas")
        tab.page.keyboard.press("ArrowLeft")
        tab.wait(f"+document.querySelector('.kilonb-orbit').dataset.frames > {before}")
        tab.page.select_option("select[aria-label=channel]", "depth")
        tab.wait("document.querySelector('figure.student .bar').textContent.includes('m')")
        assert tab.errors == [] and tab.fits() and all(url.startswith((server.address, "blob:", "data:"))
                                                       for url in tab.requests)
        server.stop()
        tab.wait("!document.getElementById('connection').hidden")


@needs_chromium
@pytest.mark.parametrize("width", [1440, 390])
def test_one_file_is_turned_without_a_network(browser, page, width):
    tab = Tab(browser, page.as_uri(), width, offline=True)
    tab.wait("document.querySelector('.grid')?.dataset.drawn >= 1")
    assert tab.page.is_visible(".cue") and tab.fits()
    canvas, shown = tab.page.locator("canvas").first, tab.data(".grid", "shown")
    canvas.focus()
    tab.page.keyboard.press("ArrowRight")
    tab.wait(f"document.querySelector('.grid').dataset.shown !== '{shown}'")
    assert not tab.page.is_visible(".cue")
    turned, box = tab.data(".grid", "shown"), canvas.bounding_box()
    tab.page.mouse.move(box["x"] + 20, box["y"] + 40)
    tab.page.mouse.down()
    tab.page.mouse.move(box["x"] + 20 + box["width"] * 0.7, box["y"] + 40, steps=6)
    tab.page.mouse.up()
    tab.wait(f"document.querySelector('.grid').dataset.shown !== '{turned}'")
    tab.page.keyboard.press("Home")
    tab.wait(f"document.querySelector('.grid').dataset.shown === '{shown}'")
    assert tab.errors == [] and [url for url in tab.requests if not url.startswith("data:")] == [page.as_uri()]


@needs_chromium
def test_an_animal_is_turned_and_its_layers_are_asked_for(browser, tmp_path):
    prepared = write_toy_recording(tmp_path / "toy.zarr", 3)
    view = view_animal(ReconstructedFrames(prepared, carved_gaussians, range(3)))
    with serving(view) as server:
        tab = Tab(browser, server.address)
        tab.wait("document.querySelector('.grid')?.dataset.drawn >= 1")
        tab.wait("+document.querySelector('.kilonb-orbit').dataset.frames >= 1")
        tab.page.select_option("select[aria-label=camera]", index=2)
        tab.wait("document.querySelector('.grid').dataset.shown === '2'")
        assert tab.page.locator(".grid canvas").count() == 4 and tab.errors == []
    page = write_grid_page(tmp_path / "animal.html", view.grids, view.title, say=None)
    assert b"difference" in page.read_bytes()


@needs_chromium
def test_a_clip_is_played_live_and_from_one_file(browser, tmp_path):
    folder = moving_run(tmp_path)
    assert newest_viewable(tmp_path).folder == folder
    with serving(open_view("", tmp_path, quiet)) as server:
        tab = Tab(browser, server.address)
        tab.wait("+document.querySelector('.kilonb-orbit').dataset.full >= 1")
        tab.page.focus(".kilonb-orbit canvas")
        tab.page.keyboard.press(".")
        tab.wait("+document.querySelector('.kilonb-orbit').dataset.time > 0")
        assert tab.errors == []
    page = write_view(folder, tmp_path / "clip.html", outputs=tmp_path, say=quiet)
    tab = Tab(browser, page.as_uri(), offline=True)
    tab.wait("document.getElementById('now').textContent.length > 0")
    tab.page.focus("#canvas")
    tab.page.keyboard.press(".")
    tab.wait("+document.getElementById('time').value > +document.getElementById('time').min")
    assert tab.fits() and not [error for error in tab.errors if "GL" not in error and "GPU" not in error]


def test_panoramas_are_listed_and_nothing_else_of_the_run_is_served(tmp_path):
    run = open_run("panorama_checks", tmp_path / "panorama_checks" / "a", {"secret": "in parameters.json"})
    for name in ("one", "<two>"):
        (run.folder / "previews" / name).mkdir(parents=True)
        (run.folder / "previews" / name / "panorama.html").write_text(f"<p>{len(name)}</p>")
    run.finish({})
    with serving(open_view("panorama_checks", tmp_path, quiet)) as server:
        fetch = lambda path: urllib.request.urlopen(server.address + path, timeout=10).read().decode()
        index = fetch("")
        links = re.findall(r'href="(files/[^"]+)"', index)
        assert "&lt;two&gt;" in index and [fetch(link) for link in sorted(links)] == ["<p>5</p>", "<p>3</p>"]
        for path in ("files/../parameters.json", "files/%2e%2e/parameters.json", "files/one", "files/one/x.html"):
            with pytest.raises(urllib.error.HTTPError, match="404"): fetch(path)


# The command

def test_the_command_serves_until_it_is_stopped(pair):
    child = subprocess.Popen([*KILONB, "view", str(pair.ply), "--no-browser"], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
    lines = [child.stdout.readline()]
    while lines[-1] and not lines[-1].startswith("http://127.0.0.1:"): lines.append(child.stdout.readline())
    address = lines[-1].strip()
    assert b"orbit-state" in urllib.request.urlopen(address, timeout=20).read()
    port = int(address.split(":")[2].split("/")[0])
    with pytest.raises(KiloError, match="is not free"): view_run(pair.ply, port, say=quiet)
    os.kill(child.pid, signal.SIGINT)
    _, errors = child.communicate(timeout=30)
    assert child.returncode == 0 and "Traceback" not in errors and "Ctrl-C ends it" in errors


def test_the_command_refuses_another_ending_in_one_sentence(outputs, tmp_path):
    done = subprocess.run([*KILONB, "view", "students", "--html", str(tmp_path / "a.png")], capture_output=True,
                          text=True, timeout=120, env={**os.environ, "KILONB_OUTPUTS": str(outputs)})
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "ends in .html" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_public_names_are_those_of_the_package():
    import kilonb

    assert kilonb.view_run is view_run and kilonb.write_view is write_view and callable(find_run)
