"""The report of a sweep of 24 runs, in a real browser without a network. Needs Chromium (Debian: apt install
chromium)."""
import json
import math
import random
import re
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from kilonb.core.errors import KiloError
from kilonb.core.files import write_json
from kilonb.core.html import hashed_script_policy
from kilonb.runs.gates import Gate
from kilonb.imaging.pictures import read_comparisons, save_comparison, worst
from kilonb.reports.charts import downsample, pareto_front
from kilonb.reports.report import find_target, report_html, write_report
from kilonb.runs.folders import open_run
from kilonb.runs.status import mark_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
browser_only = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt install chromium")
HOSTILE = ("</script><script>document.title = 'stolen'</script><img src=x onerror=\"document.title='stolen'\">' "
           "\u2028\u2029 &amp;")
GATES = [Gate("test_psnr_srgb_white_db", at_least=29.0, notes=13.06, published=33.4, source="KiloNeRF, lego",
              baseline_result="test_psnr_blank_white_db"), Gate("train_s", at_most=70.0)]


def leave_pictures(folder: Path, quality: float, dice: np.random.Generator) -> None:
    """Three pictures of noise, which does not compress."""
    target = dice.random((120, 120, 3))
    for view in range(3):
        student = np.clip(np.roll(target, view, 1) + 0.02 * dice.normal(size=target.shape), 0, 1)
        images = {"target": target, "student": student, "error x 5": np.abs(student - target) * 5}
        save_comparison(folder, f"test/r_{view}", images, quality - view, "psnr_srgb_white_db")


def make_run(outputs: Path, name: str, number: int, values: dict, dice: np.random.Generator) -> None:
    data = {"kind": "blender", "name": "brickyard", "sha256": "ab" * 32}
    run = open_run("students", outputs / name, values | {"steps": 4000, "note": HOSTILE}, data, values["seed"])
    (run.folder / "notebook.ipynb").write_text('{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}')
    steps = np.arange(10, 4001, 10)
    loss = 0.2 * np.exp(-steps / (300 + 100 * number)) + 0.004 * dice.random(len(steps))
    rows = "".join(f"{s},{s / 50},{a!r},{b!r}\n" for s, a,
                   b in zip(steps.tolist(), loss.tolist(), (30 - 20 * loss).tolist()))
    run.metrics.write_text("step,elapsed_s,loss,train_psnr_db\n" + rows)
    if number in (4, 19): return mark_run(run.folder, "failed", f"ValueError: run {number} {HOSTILE}")
    quality = 28 + values["learning_rate"] * 100 + (values["kind"] == "kilonerf") + 0.2 * dice.normal()
    leave_pictures(run.folder, quality, dice)
    run.finish({"test_psnr_srgb_white_db": quality, "test_psnr_blank_white_db": 9.2,
                "train_s": 40 + number + dice.random(), "frames_per_s": 5 + 10 * dice.random(), "note": HOSTILE}, GATES)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    """24 runs of a sweep: two failed, one has a results.json that was cut short."""
    root, dice, plan = tmp_path_factory.mktemp("outputs"), np.random.default_rng(0), []
    folder = root / "sweeps" / "students_lr"
    for number, (rate, kind, seed) in enumerate(product((0.001, 0.003, 0.01, 0.03), ("kilonerf", HOSTILE), (0, 1, 2))):
        values = {"learning_rate": rate, "kind": kind, "seed": seed}
        plan.append({"name": f"{number:03d}-1f3a9c2b", "parameters": values, "varied": values})
        make_run(folder, plan[-1]["name"], number, values, dice)
    (folder / plan[7]["name"] / "results.json").write_text('{"experiment": "students", "resul')
    write_json(folder / "sweep.json",
               {"sweep": "students_lr", "experiment": "students", "varied": ["learning_rate", "kind", "seed"],
                "runs": plan})
    write_json(folder / "status.json", {"kind": "sweep", "status": "finished", "elapsed_s": 812.0, "runs": []})
    return root


@pytest.fixture(scope="module")
def report(outputs) -> Path: return write_report(outputs / "sweeps" / "students_lr")


def test_the_report_of_24_runs_is_small_and_names_damaged_files(report):
    text = report.read_text(encoding="utf-8")
    assert report.stat().st_size <= 5_000_000
    assert "21 of 24 runs finished, 2 failed, 1 unreadable." in text
    assert text.count('class="failed" data-run') == 3 and "ValueError: run 4 " in text and "ValueError: run 19 " in text
    assert "007-1f3a9c2b/results.json is not JSON" in text, "the damaged file is named"
    for shown in ("≥ 29", "13.06", "33.4 (KiloNeRF, lego)", ">9.2<"):
        assert shown in text, "the columns beside the measured number"
    assert 'href="000-1f3a9c2b/notebook.ipynb"' in text


def test_nothing_that_a_run_wrote_becomes_markup(report):
    """Two script elements: the data, and the script that the content-security policy allows by its hash."""
    text = report.read_text(encoding="utf-8")
    assert len(re.findall(r"<script\b", text)) == text.count("</script>") == 2 and "<img src=x" not in text
    data = re.search(r'<script type="application/json" id="colouring">(.*?)</script>', text, re.DOTALL)[1]
    assert not set("<\u2028\u2029") & set(data) and HOSTILE in json.loads(data)["colours"]["kind"]
    script = re.search(r"<script>(.*)</script></body>", text, re.DOTALL)[1]
    policy = hashed_script_policy(script)
    assert f'content="{policy}"' in text and "unsafe-eval" not in text
    assert "'unsafe-inline'" not in policy.split("script-src")[1]
    assert not re.search(r"""\b(?:src|href)\s*=\s*["']?(?:https?:)?//""", text)


@pytest.mark.parametrize("limit", [1_500_000, 600_000])
def test_a_report_keeps_to_its_size_limit_and_names_what_it_left_out(outputs, limit):
    text = report_html(outputs / "sweeps" / "students_lr", outputs / "report.html", worst=40, maximum_bytes=limit)
    assert len(text.encode()) <= limit
    notes = re.search(r'role="note">(.*?)</div>', text)[1]
    assert "left out" in notes.lower() or "smaller" in notes


def test_a_limit_below_the_text_is_refused_and_leaves_no_file(outputs, tmp_path):
    with pytest.raises(KiloError, match="does not fit into 20000 bytes"):
        write_report(outputs / "sweeps" / "students_lr", tmp_path / "r.html", maximum_bytes=20_000)
    assert not list(tmp_path.iterdir())


def test_seeds_are_aggregated_with_their_spread(outputs, report):
    """Computed from the files: one condition with three seeds."""
    folders = [outputs / "sweeps" / "students_lr" / f"{i:03d}-1f3a9c2b" for i in (0, 1, 2)]
    values = [json.loads((folder / "results.json").read_text())["results"]["test_psnr_srgb_white_db"]
              for folder in folders]
    section = report.read_text(encoding="utf-8").split(">Conditions</h2>")[1].split("</section>")[0]
    assert f">{np.mean(values):.2f}<" in section and f" ± {np.std(values, ddof=1):.2f}<" in section


def test_a_damaged_plan_picture_or_curve_leaves_out_only_its_own_part(outputs, tmp_path):
    copy = tmp_path / "sweeps" / "students_lr"
    shutil.copytree(outputs / "sweeps" / "students_lr", copy)
    (copy / "sweep.json").write_text("{")
    (copy / "001-1f3a9c2b" / "metrics.csv").write_text("step,elapsed_s,loss\n1,0.1,abc\n")
    (copy / "002-1f3a9c2b" / "pictures" / "pictures.json").write_text("[1")
    one = read_comparisons(copy / "003-1f3a9c2b")
    for path in one[2].images.values(): path.write_bytes(b"no picture")
    (copy / "status.json").write_text("\x00")
    text = report_html(copy, copy / "report.html")
    for named in ("sweep.json", "001-1f3a9c2b/metrics.csv", "002-1f3a9c2b/pictures/pictures.json",
                  one[2].images["target"].name):
        assert named in text, named
    assert "21 of 24 runs finished" in text and text.count('class="comparison"') == 5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "words", None, True, 1e300, -0.0])
def test_odd_results_do_not_stop_a_report(tmp_path, value):
    for i, result in enumerate((value, 30.0, 31.0)):
        run = open_run("odd", tmp_path / "odd" / str(i), {"x": value if i else [1, {"a": HOSTILE}], "seed": i})
        run.finish({"psnr_db": result, "train_s": 1.0, "frames_per_s": result}, [Gate("psnr_db", at_least=20.0)])
        run.metrics.write_text(f"step,elapsed_s,loss\n1,0.1,{result if isinstance(result, float) else 'nan'}\n")
    for target in (tmp_path / "odd", tmp_path / "odd" / "0", tmp_path):
        assert "<script>document" not in report_html(target, tmp_path / "r.html")


def test_a_run_an_experiment_several_runs_and_all_runs_have_reports(outputs, tmp_path):
    sweep = outputs / "sweeps" / "students_lr"
    run = write_report(sweep / "000-1f3a9c2b", tmp_path / "run.html").read_text(encoding="utf-8")
    assert "Run of students" in run and run.count('class="comparison"') == 3 and ">loss</text>" in run
    several = write_report([sweep / "000-1f3a9c2b", sweep / "013-1f3a9c2b"],
                           tmp_path / "two.html").read_text(encoding="utf-8")
    assert "2 of 2 runs finished" in several
    open_run("toy", outputs / "toy" / "a", {}).finish({"psnr_db": 10.0}, [Gate("psnr_db", at_least=20.0, notes=19.2)])
    everything = write_report(outputs=outputs).read_text(encoding="utf-8")
    assert (
        "0 of 1 experiments and data are green; not green: toy" in everything
        and "students_lr" in everything
        and 'href="sweeps/students_lr/report.html"' in everything
    )
    assert (
        find_target("students_lr", outputs) == sweep.resolve()
        and find_target("toy", outputs) == (outputs / "toy").resolve()
    )
    with pytest.raises(KiloError, match="There are no runs in"): write_report(tmp_path)
    with pytest.raises(KiloError, match="did you mean 'train_s'"):
        write_report(sweep, tmp_path / "x.html", time="train_ss")


def test_the_pareto_front_is_what_brute_force_finds():
    dice = random.Random(1)
    for _ in range(300):
        directions = [dice.choice((-1, 1)) for _ in range(dice.choice((1, 2, 3)))]
        points = [[dice.choice((math.nan, math.inf, dice.randint(0, 4), dice.random())) for _ in directions]
                  for _ in range(dice.randint(0, 20))]
        signed = [[d * v for d, v in zip(directions, point)] for point in points]
        real = [i for i, point in enumerate(signed) if not any(map(math.isnan, point))]
        beats = lambda a, b: all(x >= y for x, y in zip(a, b)) and a != b
        assert pareto_front(points,
                            directions) == [i for i in real if not any(beats(signed[j], signed[i]) for j in real)]


def test_downsampling_a_curve_keeps_its_spikes():
    values = np.random.default_rng(2).normal(size=20_000)
    values[[77, 12_345]] = (50.0, -60.0)
    x, y = downsample(np.arange(20_000), values, 100)
    assert (
        len(x) <= 202
        and y.max() == 50.0
        and y.min() == -60.0
        and set(x) >= {77, 12_345}
        and np.array_equal(values[x.astype(int)], y)
    )


def test_the_worst_pictures_come_first_and_a_missing_score_is_the_worst(tmp_path):
    picture = np.zeros((8, 8, 3))
    for name, score in (("a", 30.0), ("b", 20.0), ("c", math.nan)):
        save_comparison(tmp_path, name, {"target": picture, "student": picture}, score, "psnr_db")
    assert [one.name for one in worst(read_comparisons(tmp_path), 2)] == ["c", "b"]


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


def opened(chromium, path: Path, width: int = 1280, height: int = 900, **options):
    """(page of an offline browser, its console messages, the URLs that it requested)."""
    context = chromium.new_context(viewport={"width": width, "height": height}, **options)
    context.set_offline(True)
    page, messages, requested = context.new_page(), [], []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.route("**/*", lambda route: (requested.append(route.request.url), route.continue_()))
    page.goto(path.as_uri())
    page.wait_for_load_state("load")
    return page, messages, requested


@browser_only
def test_a_report_opens_offline_without_errors_or_requests(chromium, report):
    page, messages, requested = opened(chromium, report)
    page.wait_for_timeout(300)
    assert requested == [report.as_uri()] and not messages
    assert page.title() == "students_lr", "no run's script has run"
    assert page.evaluate("[...document.images].every(image => image.complete && "
                         "image.naturalWidth >= 50)") and page.locator(".comparison").count() == 6
    assert page.locator("svg.chart").count() >= 8
    page.context.close()


@browser_only
def test_tables_sort_filter_and_choose(chromium, report):
    page, messages, _ = opened(chromium, report)
    table = page.locator("table.runs")
    values = lambda: page.eval_on_selector_all("table.runs tbody tr:not(.below)",
                                               "rows => rows.map(row => row.cells[5].dataset.v)")
    head = table.get_by_role("button", name="test_psnr_srgb_white_db")
    head.click()
    down = [float(v) for v in values() if v]
    assert len(down) == 21 and down == sorted(down, reverse=True) and values()[-3:] == ["", "", ""], (
        "rows without a number come last"
    )
    head.click()
    assert [float(v) for v in values() if v] == sorted(down)
    below = page.eval_on_selector_all("tr.below", "rows => rows.every(row => "
                                      "row.previousElementSibling.classList.contains('failed'))")
    assert below, "the sentence of a run stays below its row"
    page.locator(".filter").fill("run 19")
    assert (
        page.locator("table.runs tbody tr:visible").count() == 2
        and page.locator(".shown").inner_text() == "1 of 24 runs"
    )
    page.locator(".filter").fill("")
    page.locator('table.runs tr[data-run="003-1f3a9c2b"] td').nth(2).click()
    assert page.locator(".lines .mark.chosen").count() == 2 and "1 chosen" in page.locator("#clear").inner_text()
    page.keyboard.press("Escape")
    assert page.locator(".chosen").count() == 0
    before = page.locator('.dots .mark[data-run="003-1f3a9c2b"]').first.evaluate("mark => mark.style.color")
    page.locator("#colour-by").select_option("kind")
    assert (
        page.locator('.dots .mark[data-run="003-1f3a9c2b"]').first.evaluate("mark => mark.style.color") != before
        and not messages
    )
    page.context.close()


@browser_only
def test_two_pictures_are_swiped_and_blinked(chromium, report):
    page, messages, _ = opened(chromium, report)
    card = page.locator(".comparison").first
    clip = lambda: card.locator("img.left").evaluate("image => getComputedStyle(image).clipPath")
    shown = lambda: card.locator("img.left").evaluate("image => getComputedStyle(image).visibility")
    middle = clip()
    card.locator(".swipe").focus()
    for _ in range(10): page.keyboard.press("ArrowLeft")
    assert clip() != middle and "60%" in clip(), "the keyboard moves the edge"
    box = card.locator(".stage").bounding_box()
    page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + box["height"] / 2)
    assert int(card.locator(".swipe").input_value()) in range(88, 92), "so does the pointer"
    card.locator(".blink").click()
    states = set()
    for _ in range(100):
        states.add((shown(), clip()))
        if len(states) > 1: break
        page.wait_for_timeout(60)
    assert states == {("visible", "none"), ("hidden", "none")}, "one picture, then the other"
    page.keyboard.press("b")
    assert card.locator(".blink").get_attribute("aria-pressed") == "false"
    card.locator(".choose-right").select_option(label="error x 5")
    assert (
        card.locator("img.right").get_attribute("alt") == "error x 5"
        and card.locator("img.left").get_attribute("alt") == "target"
    )
    rival = card.locator(".choose-left option").all_inner_texts()
    assert any("best run" in word for word in rival) and not messages
    page.context.close()


@browser_only
@pytest.mark.parametrize("kind", ["sweep", "run", "all"])
def test_a_phone_scrolls_in_one_direction(chromium, outputs, report, tmp_path, kind):
    path = {"sweep": report,
            "run": write_report(outputs / "sweeps" / "students_lr" / "000-1f3a9c2b", tmp_path / "run.html"),
            "all": write_report(outputs, tmp_path / "all.html")}[kind]
    page, messages, requested = opened(chromium, path, 360, 800, has_touch=True, is_mobile=True, device_scale_factor=2)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360 and page.evaluate("visualViewport.scale") == 1
    assert page.evaluate("[...document.querySelectorAll('.wide')].some(box => box.scrollWidth > "
                         "box.clientWidth)"), "wide tables scroll in their own box"
    assert (
        float(page.evaluate("getComputedStyle(document.body).fontSize").removesuffix("px")) >= 15
        and not messages
        and requested == [path.as_uri()]
    )
    page.context.close()


@browser_only
def test_an_injected_script_is_not_run(chromium, report, tmp_path):
    """Also without escaping: the content-security policy allows one script, by its hash."""
    injected = tmp_path / "injected.html"
    added = '<script>document.title="stolen"</script><img src="x" onerror="document.title=\'stolen\'">'
    injected.write_text(report.read_text(encoding="utf-8").replace("<main>", f"<main>{added}", 1), encoding="utf-8")
    page, messages, requested = opened(chromium, injected)
    page.wait_for_timeout(200)
    assert (
        page.title() == "students_lr"
        and requested == [injected.as_uri()]
        and any("Content Security Policy" in line for line in messages)
    )
    page.context.close()
