"""One small example of every kind of page that the package writes or serves, and what a key does on it."""
import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from kilonb.core.files import write_json
from kilonb.core.serving import PageServer
from kilonb.imaging.pictures import save_comparison
from kilonb.runs.folders import open_run
from kilonb.runs.gates import Gate
from kilonb.runs.status import mark_run

ROOT = Path(__file__).resolve().parent.parent
LONG = "a/very/long/name/of/a/recording/that/does_not_fit_into_the_width_of_a_telephone/2026-11-28_12-00-00"
KINDS = ("kilonerf", "one network for the whole scene")


@dataclass(frozen=True)
class Kind:
    """A kind of page.

    make: folder -> the page's path, or a started server of it. source: the module that calls `html_page` for it.
    ready: a script that is true once the page has drawn. dark: it has a dark form. picture: what must be on the first
    screen. focus, key, shown: a key pressed on an element changes the value of a script.
    """

    make: Callable[[Path], Path | PageServer]
    source: str
    ready: str = "true"
    dark: bool = False
    picture: str = ""
    focus: str = ""
    key: str = "ArrowRight"
    shown: str = ""


def quiet(line: str) -> None: pass


def scene(angle: float = 0.0) -> Image.Image:
    picture = Image.new("RGB", (200, 150), "white")
    ImageDraw.Draw(picture).ellipse((60 + angle, 30, 140, 120), fill="orange", outline="navy", width=3)
    return picture


# --- runs and reports

def executed_notebook(path: Path) -> None:
    """A run's notebook with text, a formula, a wide table, a long line, an error and a picture."""
    table = "<table><tr>" + "".join(f"<th>column {i}</th>" for i in range(30)) + "</tr><tr>" + "<td>1.25</td>" * 30
    outputs = [{"output_type": "stream", "name": "stdout", "text": "step 10: " + "x" * 200 + "\n"},
               {"output_type": "stream", "name": "stderr", "text": "a warning\n"},
               {"output_type": "display_data", "metadata": {}, "data": {"text/html": f"{table}</tr></table>"}},
               {"output_type": "error", "ename": "E", "evalue": "v", "traceback": ["\x1b[31mE\x1b[0m: v" + "y" * 200]}]
    cells = [{"cell_type": "markdown", "metadata": {}, "id": "a",
              "source": f"# Title\n$$\\sum_i w_i = 1 - e^{{-x}}$$\n`{LONG}`\n\n| a | b |\n|---|---|\n| 1 | 2 |"},
             {"cell_type": "code", "metadata": {}, "id": "b", "execution_count": 1, "outputs": outputs,
              "source": "# a comment\nvalues = {'name': 1.5, 'other': [" + ", ".join(map(str, range(60))) + "]}"}]
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))


def finished_run(folder: Path, number: int = 0, **parameters):
    """A finished run with three scored views, a figure, curves and an executed notebook."""
    given = {"data": "brickyard", "steps": 4000, "note": LONG} | parameters
    run = open_run("students", folder, given, {"kind": "blender", "name": "brickyard", "sha256": "ab" * 32}, number)
    steps = np.arange(10, 2001, 10)
    rows = zip(steps.tolist(), (0.2 * np.exp(-steps / (300 + 100 * number)) + 0.001).tolist())
    run.metrics.write_text("step,elapsed_s,loss,train_psnr_db\n"
                           + "".join(f"{step},{step / 50},{loss!r},{30 - 20 * loss!r}\n" for step, loss in rows))
    for view, score in enumerate((21.0, 35.5, 28.0)):
        pictures = {"target": scene(), "student": scene(8), "error x 5": Image.new("RGB", (200, 150), "gray")}
        save_comparison(run.folder, f"test/r_{view}", pictures, score + number, "psnr_db")
    run.save_figure(scene(4).resize((900, 200)), "predictions")
    executed_notebook(run.folder / "notebook.ipynb")
    (run.folder / "log.txt").write_text("training\n" + "z" * 300 + "\n")
    gates = [Gate("psnr_db", at_least=27.5, notes=13.06, published=33.4, source="KiloNeRF, lego"),
             Gate("train_s", at_most=70.0), Gate("lpips", at_most=0.2)]
    run.finish({"psnr_db": 26.0 + number, "train_s": 40.0 + number, "frames_per_s": 12.5,
                "one_result_with_a_rather_long_name_db": 1.0}, gates)
    return run


def run_page(folder: Path) -> Path:
    from kilonb.reports.run_page import write_page

    return write_page(finished_run(folder / "students" / "a").folder)


def figure_page(folder: Path) -> Path:
    """A run without views: a wide sheet."""
    from kilonb.reports.run_page import write_page

    run = open_run("flux4d_overfit", folder / "flux4d_overfit" / LONG.rpartition("/")[2], {"data": LONG})
    run.save_figure(Image.new("RGB", (1200, 260), "orange"), "predictions")
    run.save_figure(Image.new("RGB", (300, 200), "teal"), "training")
    run.finish({"accuracy": 0.9}, [Gate("accuracy", at_least=0.95)])
    return write_page(run.folder)


def failed_page(folder: Path) -> Path:
    from kilonb.reports.run_page import write_page

    run = open_run("students", folder / "students" / "bad", {"data": LONG})
    mark_run(run.folder, "failed", f"The scene {LONG} has no frame 7: expected 0 to 5.")
    return write_page(run.folder)


def write_outputs(folder: Path) -> Path:
    """A sweep of 12 runs of which one failed, a finished run and a failed one."""
    outputs, plan = folder / "outputs", []
    if outputs.exists(): return outputs
    for number in range(12):
        rate, kind = (0.001, 0.003, 0.01)[number % 3], KINDS[number // 3 % 2]
        varied = {"learning_rate": rate, "kind": kind, "seed": number // 6}
        plan.append({"name": f"{number:03d}-1f3a9c2b", "parameters": varied, "varied": varied})
        run = finished_run(outputs / "sweeps" / "rates" / plan[-1]["name"], number % 5, **varied)
        if number == 4: mark_run(run.folder, "failed", f"ValueError: {LONG} is not finite")
    rows = [{"name": one["name"], "varied": one["varied"], "error": "", "status": "failed" if at == 4 else "finished"}
            for at, one in enumerate(plan)]
    rows[11]["status"], rows[10]["status"] = "running", "waiting"
    sweep = {"sweep": "rates", "experiment": "students", "varied": ["learning_rate", "kind", "seed"], "runs": plan}
    write_json(outputs / "sweeps" / "rates" / "sweep.json", sweep)
    write_json(outputs / "sweeps" / "rates" / "status.json",
               {"kind": "sweep", "sweep": "rates", "experiment": "students", "status": "finished", "elapsed_s": 812.0,
                "runs": rows})
    finished_run(outputs / "students" / "done")
    mark_run(open_run("other", outputs / "other" / "bad", {"steps": 40}, seed=1).folder, "failed", f"No {LONG}.")
    return outputs


def report(name: str) -> Callable[[Path], Path]:
    """The report of a run, a sweep or everything below the outputs folder."""
    def make(folder: Path) -> Path:
        from kilonb.reports.report import write_report

        outputs = write_outputs(folder.parent)
        return write_report(outputs / name, folder / "report.html", outputs)
    return make


def live_dashboard(folder: Path) -> PageServer:
    from kilonb.reports.dashboard import open_dashboard

    outputs = write_outputs(folder.parent)
    run = open_run("students", outputs / "students" / "going", {"steps": 400})
    run.metrics.write_text("step,elapsed_s,loss\n10,0.5,1.0\n20,1.0,0.5\n")
    (run.folder / "log.txt").write_text("training 20/400\n" + "z" * 300 + "\n")
    return open_dashboard(outputs)


def frozen_dashboard(folder: Path) -> Path:
    from kilonb.reports.dashboard import write_dashboard

    return write_dashboard(folder / "board.html", write_outputs(folder.parent))


def leading_page(folder: Path) -> Path:
    """The page through which a browser is sent to an address with a secret; it leaves at once."""
    from kilonb.core.html import html_page
    from kilonb.core.serving import _leading_page

    target = folder / "target.html"
    target.write_text(html_page("reached", "<h1>reached</h1>"))
    return _leading_page(target.as_uri()).rename(folder / "leading.html")


# --- pictures, clouds, panoramas, clips, animals, episodes

def gallery(folder: Path) -> Path:
    from kilonb.imaging.gallery import GalleryItem, write_gallery

    draw = torch.Generator().manual_seed(0)
    pictures = [torch.rand(24, 24, 3, generator=draw) for _ in range(4)]
    items = [GalleryItem(LONG if at == 0 else f"test/r_{at}", one, one * 0.9, {"psnr_srgb_white_db": 20.0 + at})
             for at, one in enumerate(pictures)]
    return write_gallery(folder / "gallery.html", items, f"Worst views of {LONG}", "Four views.", "psnr_srgb_white_db")


def cloud(folder: Path) -> Path:
    from kilonb.imaging.clouds import PointCloud, write_cloud_page

    draw = torch.Generator().manual_seed(0)
    colours = torch.randint(0, 255, (400, 3), dtype=torch.uint8, generator=draw)
    clouds = [PointCloud(name, torch.rand(400, 3, generator=draw) * 20, colours)
              for name in ("vehicle 641", "vehicle 650 with a long name")]
    poses = torch.eye(4).repeat(2, 1, 1)
    return write_cloud_page(folder / "cloud.html", clouds, {"true": poses, "predicted": poses}, f"Points of {LONG}")


@functools.cache
def boxtown(folder: Path) -> Path:
    """A run with the previews of two stitched vehicles."""
    from kilonb.panoramas.checks import PanoramaOptions, stitch_frame
    from kilonb.panoramas.previews import write_previews
    from kilonb.scenes.boxtown import TownConfig, build_town, write_opv2v
    from kilonb.scenes.opv2v import load_opv2v

    target = folder / "panorama_checks" / "a"
    run = open_run("panorama_checks", target, {"data": "boxtown"})
    write_opv2v(folder / "town", build_town(TownConfig(connected=2, cars=4, people=2, duration_s=1), seed=0), 2, 1, 96,
                72, samples=1)
    scene_ = load_opv2v(folder / "town")
    options = PanoramaOptions(width=252, height=63)
    frames = [stitch_frame(one, options) for one in scene_.frames_at(scene_.instants()[0]).values()]
    write_previews(target / "previews" / "train_0", frames, f"Panorama of {LONG}", most=500)
    run.finish({})
    return target


def panorama(folder: Path) -> Path: return boxtown(folder.parent) / "previews" / "train_0" / "panorama.html"


def panorama_list(folder: Path) -> PageServer:
    from kilonb.sharing.view import view_run

    return view_run(boxtown(folder.parent), outputs=folder, say=quiet)


def moving_run(folder: Path) -> Path:
    from kilonb.flux4d.motion import MovingGaussians, save_moving

    draw, count = torch.Generator().manual_seed(0), 600
    points = torch.rand(count, 3, generator=draw) * torch.tensor([40.0, 16.0, 1.5]) + torch.tensor([2.0, -8.0, 0.0])
    velocities = torch.zeros(count, 1, 3)
    velocities[400:, 0, 0] = 10.0
    moving = MovingGaussians(points, torch.tensor([1.0, 0, 0, 0]).repeat(count, 1), torch.full((count, 3), 0.3).log(),
                             torch.full((count,), 3.0), torch.randn(count, 3, generator=draw),
                             torch.rand(count, generator=draw), velocities, torch.zeros(count).bool())
    run = open_run("flux4d_overfit", folder / "flux4d_overfit" / "a")
    save_moving(run.folder / "refined_gaussians.pt", moving)
    run.finish({})
    return run.folder


def clip_file(folder: Path) -> Path:
    from kilonb.sharing.view import write_view

    return write_view(moving_run(folder), folder / "clip.html", outputs=folder, say=quiet)


def clip_live(folder: Path) -> PageServer:
    from kilonb.sharing.view import view_run

    return view_run(moving_run(folder), outputs=folder, say=quiet)


def gaussians_file(folder: Path) -> Path:
    from kilonb.scenes.brickyard import build_brickyard
    from kilonb.splats.ply import write_ply

    write_ply(folder / f"{'teacher_' * 6}.ply", build_brickyard(seed=0, count=4000))
    return next(folder.glob("*.ply"))


def orbit_live(folder: Path) -> PageServer:
    """A student beside its teacher, as `kilonb view` serves them, small."""
    from kilonb.data.references import DataReference
    from kilonb.distill import orbit_pairs
    from kilonb.imaging.channels import ViewSettings
    from kilonb.scenes.brickyard import write_brickyard
    from kilonb.sharing.view import serve_view
    from kilonb.sharing.views import view_pair

    write_brickyard(folder / "yard", width=48, height=48, train=6, test=1, count=4000)
    reference = DataReference("blender", folder / "yard", "", "12ab")
    preview = orbit_pairs.distill_preview
    orbit_pairs.distill_preview = lambda *given: preview(*given[:2], 5, views=4, width=24, quiet=True)
    try: pair = orbit_pairs.open_pair(reference, outputs=folder / "outputs", say=quiet)
    finally: orbit_pairs.distill_preview = preview
    return serve_view(view_pair(pair, ViewSettings(96, 96, 48)))


def orbit_file(folder: Path) -> Path:
    from kilonb.sharing.orbit_pages import SphereConfig
    from kilonb.sharing.view import write_view

    return write_view(gaussians_file(folder), folder / "orbit.html", SphereConfig(azimuths=8, width=48), 1.0, folder,
                      quiet)


@functools.cache
def animal_view(folder: Path):
    """Two frames of a toy animal, in turn with the picture of each camera left out."""
    from kilonb.pose.explorer import ReconstructedFrames
    from kilonb.pose.toy_recordings import carved_gaussians, write_toy_recording
    from kilonb.sharing.views import view_animal

    return view_animal(ReconstructedFrames(write_toy_recording(folder / "toy.zarr", 2), carved_gaussians, range(2)))


def animal_live(folder: Path) -> PageServer:
    from kilonb.sharing.view import serve_view

    return serve_view(animal_view(folder.parent))


def animal_file(folder: Path) -> Path:
    from kilonb.sharing.picture_grids import write_grid_page

    view = animal_view(folder.parent)
    return write_grid_page(folder / "animal.html", view.grids, view.title, view.note, say=None)


def analysis(folder: Path) -> Path:
    from kilonb.pose.analysis import write_analysis_page
    from kilonb.pose.scores import score_recording
    from kilonb.pose.toy_recordings import carved_gaussians, write_toy_recording

    prepared = write_toy_recording(folder / "toy.zarr", 1)
    rows = {"model, 4 cameras": score_recording(carved_gaussians, prepared, range(1), 4)}
    return write_analysis_page(folder / "analysis.html", f"Evaluation of {LONG}", rows,
                               {"Error by place on the body": scene()}, {"predict_s": 0.02}, "derived")


def episodes(folder: Path) -> Path:
    from kilonb.dream.boundaries import BoundaryRecord
    from kilonb.dream.episodes import collect
    from kilonb.dream.explorer import EpisodeExplorer, Imaginer, write_episode_page
    from kilonb.dream.imagination import LastFrameModel

    played = collect("four", "scripted", 2, 80, seed=1, noise=0.2)
    ends = np.arange(len(played[0]))
    half, few, more = np.full(len(ends), 0.5), ends % 30 == 29, ends % 10 == 9
    records = [BoundaryRecord(half, more, few, half) for _ in played]
    explorer = EpisodeExplorer(played, "four", records, Imaginer(LastFrameModel(0.05)), names=[LONG, "two"])
    return write_episode_page(folder / "episodes.html", explorer, f"Pin Pad: {LONG}", every=20)


# --- the pages of `make docs`

EXECUTED = "experiments/single_view_overfit.html"


def docs_page(name: str) -> Callable[[Path], Path]:
    """A page of a small site: the start, one notebook of the library, one experiment as it was run."""
    def make(folder: Path) -> Path:
        sys.path.insert(0, str(ROOT / "tools"))
        import docs

        site = folder.parent / "site"
        if not site.exists():
            run = open_run("single_view_overfit", folder / "single_view_overfit" / "a", {"data": "brickyard"})
            executed_notebook(run.folder / "notebook.ipynb")
            run.finish({"psnr_srgb_white_db": 46.0})
            docs.build_site(site, folder, ["index.html", "core/files.html", EXECUTED], workers=1)
        return site / name
    return make


_GRID = "document.querySelector('.grid')?.dataset.drawn >= 1"
_ORBIT = "+document.querySelector('.kilonb-orbit')?.dataset.full >= 1"
_AT = "getComputedStyle(document.querySelector('.slider')).getPropertyValue('--at')"
PAGES = {
    "run": Kind(run_page, "kilonb.reports.run_page", picture=".headline .stage", focus=".slider input", shown=_AT),
    "run, figure": Kind(figure_page, "kilonb.reports.run_page", picture=".headline .picture"),
    "run, failed": Kind(failed_page, "kilonb.reports.run_page"),
    "report of a run": Kind(report("students/done"), "kilonb.reports.report", focus=".swipe",
                            shown="document.querySelector('.stage').style.cssText"),
    "report of a sweep": Kind(report("sweeps/rates"), "kilonb.reports.report", focus="table.runs th.n button",
                              key="Enter", shown="document.querySelector('table.runs').textContent"),
    "report of everything": Kind(report(""), "kilonb.reports.report"),
    "dashboard, live": Kind(live_dashboard, "kilonb.reports.dashboard",
                            "document.querySelector('.card') && document.querySelector('.chart canvas')",
                            focus="#filter", key="z", shown="document.querySelectorAll('.run').length"),
    "dashboard, frozen": Kind(frozen_dashboard, "kilonb.reports.dashboard", "document.querySelector('.chart canvas')",
                              focus="#filter", key="z", shown="document.querySelectorAll('.run').length"),
    "leading page": Kind(leading_page, "kilonb.core.serving", "document.title === 'reached'"),
    "gallery": Kind(gallery, "kilonb.imaging.gallery", "document.querySelector('.card')", focus=".trio", key="Enter",
                    shown="document.querySelector('#large').open"),
    "cloud": Kind(cloud, "kilonb.imaging.plot_pages", "document.querySelector('#plot .main-svg')"),
    "panorama": Kind(panorama, "kilonb.imaging.plot_pages", "document.querySelector('#plot .main-svg')"),
    "panoramas, live": Kind(panorama_list, "kilonb.sharing.view"),
    "clip, file": Kind(clip_file, "kilonb.imaging.moving_clouds", "document.getElementById('now').textContent.length",
                       focus="#canvas", key=".", shown="document.getElementById('time').value"),
    "clip, live": Kind(clip_live, "kilonb.sharing.orbit_pages", _ORBIT, focus=".kilonb-orbit canvas", key=".",
                       shown="document.querySelector('.kilonb-orbit').dataset.time"),
    "orbit, live": Kind(orbit_live, "kilonb.sharing.orbit_pages", _ORBIT, focus=".kilonb-orbit canvas",
                        shown="document.querySelector('.kilonb-orbit').dataset.full"),
    "orbit, file": Kind(orbit_file, "kilonb.sharing.picture_grids", _GRID, focus=".grid canvas",
                        shown="document.querySelector('.grid').dataset.shown"),
    "animal, live": Kind(animal_live, "kilonb.sharing.orbit_pages", f"{_ORBIT} && {_GRID}", focus=".grid select",
                         key="ArrowDown", shown="document.querySelector('.grid').dataset.shown"),
    "animal, file": Kind(animal_file, "kilonb.sharing.picture_grids", _GRID, focus=".grid select", key="ArrowDown",
                         shown="document.querySelector('.grid').dataset.shown"),
    "pose analysis": Kind(analysis, "kilonb.pose.analysis"),
    "episodes": Kind(episodes, "kilonb.dream.explorer", "document.body.dataset.frame === '0'", focus="body", key=".",
                     shown="document.body.dataset.frame"),
    "docs, start": Kind(docs_page("index.html"), "tools.docs_html", dark=True),
    "docs, notebook": Kind(docs_page("core/files.html"), "tools.docs_html", dark=True),
    "docs, experiment": Kind(docs_page(EXECUTED), "tools.docs_html", dark=True),
    "docs, search": Kind(docs_page("search.html"), "tools.docs_html", dark=True),
}
# Widgets: those of anywidget are shown by the pages named; those of ipywidgets are opened in JupyterLab.
WIDGETS = {"kilonb.imaging.orbit_widget": "orbit, live", "kilonb.reports.widgets": "run_browser"}
EXPLORERS = {"kilonb.reports.run_browser": "run_browser", "kilonb.reports.sweep_explorer": "sweep_explorer",
             "kilonb.pose.explorer": "pose", "kilonb.dream.explorer": "dream", "kilonb.reports.widgets": "run_browser"}
