"""README.md, the pages generated beside it, the pictures of kept results, and the pages of `make docs`."""
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

import kilonb
from kilonb.cli.main import build_parser
from kilonb.core.errors import KiloError
from kilonb.runs.notebooks import find_notebook

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import docs
import docs_check
import docs_html
import keep
import results_page

README = (ROOT / "README.md").read_text(encoding="utf-8")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt install chromium")
GALLERY = re.findall(r'<tr>.*?<img src="([^"]+)".*?\n\n(.*?)\n\n</td>', README.split("## Start")[0], re.DOTALL)


# --- README.md and the pages beside it

def test_the_gallery_shows_five_systems_each_with_a_small_picture_and_a_command_that_exists():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert len(GALLERY) == 5
    for picture, words in GALLERY:
        path = ROOT / picture
        assert path.stat().st_size <= 150_000 and Image.open(path).width >= 360
        (command,) = re.findall(r"`((?:kilonb|make) [^`]+)`$", words)
        program, *rest = shlex.split(command)
        if program == "make": assert rest == ["demo"] and "demo" in targets
        else: assert find_notebook(build_parser().parse_args(rest).name).is_file()


def test_the_readme_is_short_and_its_first_sentence_says_what_the_package_is_for():
    title, first, *_ = [line for line in README.splitlines() if line.strip() and not line.startswith("<!--")]
    assert title == "# KiloNB" and first.startswith("> Train and compare neural models") and len(first) < 300
    assert len(README.encode()) <= 26_000
    lines = README.splitlines()
    assert next(at for at, line in enumerate(lines) if line.startswith("make demo")) < 60


def test_every_red_gate_of_a_run_that_decides_is_a_headline():
    headlines = {(one["kept"], one["result"]) for system in results_page.read_systems().values()
                 for one in system["headlines"]}
    assert set(results_page.red_results()) <= headlines
    shown = README.split("## What it measures")[1].split("## What each system does")[0]
    assert shown.count("**red**") >= len(results_page.red_results()) > 0
    assert all(f"**{name}**" in shown for name in results_page.read_systems())


def test_every_kept_result_belongs_to_a_system_and_is_on_the_page_of_results():
    systems, page = results_page.read_systems(), (ROOT / "nbs" / "results" / "README.md").read_text()
    listed = [name for one in systems.values() for name in one["notebooks"]]
    assert len(listed) == len(set(listed))
    for name, (record, _) in results_page.kept_results().items():
        assert record.experiment in listed and f"\n### {name}\n" in page


def test_the_pages_beside_the_readme_are_what_they_are_made_from():
    for path, text in results_page.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"run make readme and commit {path.relative_to(ROOT)}"


def test_links_of_the_generated_pages_lead_to_files():
    for path in results_page.pages():
        text = path.read_text(encoding="utf-8")
        for link in re.findall(r'\]\((?![a-z]+:|#)([^)\s#]+)|src="([^"]+)"', text):
            assert (path.parent / (link[0] or link[1])).exists(), f"{path}: {link}"


def test_a_headline_that_is_not_kept_is_refused(tmp_path):
    with pytest.raises(KiloError, match="which is not kept"):
        results_page.headline_row({"what": "x", "kept": "teacher/nowhere", "result": "psnr_db"}, "")
    (tmp_path / "headlines.yaml").write_text("A: {about: x, notebooks: [], headlines: [{what: y}]}")
    with pytest.raises(KiloError, match="expected what, kept and result"):
        results_page.read_systems(tmp_path / "headlines.yaml")


# --- pictures of kept results

def test_a_kept_picture_is_small_and_a_result_without_one_says_why():
    page = (ROOT / "nbs" / "results" / "README.md").read_text(encoding="utf-8")
    for name in results_page.kept_results():
        folder, part = ROOT / "nbs" / "results" / name, page.split(f"\n### {name}\n")[1].split("\n### ")[0]
        kept = json.loads((folder / "kept.json").read_text())
        path = folder / "picture.jpg"
        assert path.is_file() == ("picture" in kept), name
        if not path.is_file():
            assert "No picture kept: " in part
            continue
        assert path.stat().st_size <= 60_000 and Image.open(path).width <= 640 and f'src="{name}/picture.jpg"' in part


@pytest.fixture
def finished(tmp_path):
    run = kilonb.open_run("single_view_overfit", tmp_path / "runs" / "one", {"data": "brickyard"}, seed=0)
    run.save_figure(Image.linear_gradient("L").resize((1500, 600)).convert("RGB"), "views")
    run.finish({"psnr_srgb_white_db": 46.0})
    path = run.folder / "environment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dirty": False, "commit": "ab" * 20}))
    return kilonb.read_run(run.folder)


def test_keeping_a_run_keeps_its_headline_picture_small(finished, tmp_path):
    folder = keep.keep(finished, tmp_path / "kept")
    picture = Image.open(folder / "picture.jpg")
    assert picture.width == 640 and (folder / "picture.jpg").stat().st_size <= 60_000
    assert json.loads((folder / "kept.json").read_text())["picture"] == "views.png"
    with pytest.raises(KiloError, match="has no figure 'other'"): keep.figure_of(finished, "other")


def test_the_picture_of_another_run_is_not_added_to_a_kept_result(finished, tmp_path):
    folder = keep.keep(finished, tmp_path / "kept")
    (folder / "picture.jpg").unlink()
    assert keep.add_picture(finished, tmp_path / "kept").is_file()
    written = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps(written | {"results": {"psnr_srgb_white_db": 46.1}}))
    with pytest.raises(KiloError, match="is not that of"): keep.add_picture(finished, tmp_path / "kept")


def test_no_picture_is_kept_of_data_whose_terms_do_not_allow_it(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(keep, "data_label", lambda record: "opv2v:somewhere")
    folder = keep.keep(finished, tmp_path / "kept")
    assert not (folder / "picture.jpg").exists()
    assert "academic" in json.loads((folder / "kept.json").read_text())["no_picture"]


# --- make docs

PAGES = ["index.html", "core/files.html", "experiments/single_view_overfit.html"]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Three pages and those that list others; one experiment has a run with an output."""
    outputs = tmp_path_factory.mktemp("outputs")
    run = kilonb.open_run("single_view_overfit", outputs / "single_view_overfit" / "one", {"data": "brickyard"})
    run.finish({"psnr_srgb_white_db": 46.0})
    cells = [{"cell_type": "markdown", "metadata": {}, "id": "a", "source": "# T\n[rays](../core/files.ipynb) $x^2$"},
             {"cell_type": "code", "metadata": {}, "id": "b", "execution_count": 1, "source": "print(6 * 7)",
              "outputs": [{"output_type": "stream", "name": "stdout", "text": "forty-two <b>"}]}]
    notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (run.folder / "notebook.ipynb").write_text(json.dumps(notebook))
    folder = tmp_path_factory.mktemp("site") / "docs"
    assert docs.build_site(folder, outputs, PAGES, workers=1) == []
    return folder


def test_an_experiment_is_shown_as_it_was_run_with_its_kept_results(site):
    page = (site / PAGES[2]).read_text(encoding="utf-8")
    assert "forty-two &lt;b&gt;" in page and 'href="../core/files.html"' in page and "As it was run" in page
    kept = json.loads((ROOT / "nbs/results/single_view_overfit/brickyard/results.json").read_text())["results"]
    assert f"{kept['psnr_srgb_white_db']:.2f}" in page and "Kept results" in page


def test_names_are_linked_to_the_cells_that_define_them(site):
    page, index = (site / PAGES[1]).read_text(encoding="utf-8"), (site / "api.html").read_text(encoding="utf-8")
    assert '<span id="atomic_write"></span>' in page and "10 public names" in page
    assert 'href="api/core.html#core.files.atomic_write"' in index
    entry = (site / "api" / "core.html").read_text(encoding="utf-8").split('id="core.files.atomic_write"')[1]
    assert entry.startswith("><code>atomic_write(path: str | os.PathLike) -> Iterator[Path]".replace("->", "-&gt;"))
    assert 'href="../core/files.html#atomic_write"' in entry.split("</dd>")[0]
    assert 'href="../source/kilonb/core/files.py.html"' in entry.split("</dd>")[0]


def test_links_between_the_built_pages_lead_to_a_name_that_is_there(site):
    known = docs_check.pages_of(site)
    wrong = [one for one in docs_check.broken_links(site) if "which is no file" not in one or any(
        f"links to {page}" in one for page in known)]
    assert wrong == []


def test_links_and_names_in_markdown_become_links_to_pages():
    site = docs_html.Site({"nbs/core/files.ipynb": "core/files.html", "nbs/scenes/rig.ipynb": "scenes/rig.html"},
                          {"atomic_write": [docs_html.Definition("kilonb.core.files", "atomic_write", "", "")]})
    writer = docs_html.Writer(site, "nbs/scenes/rig.ipynb", "scenes/rig.html")
    shown = writer.markdown("# A b\n[x](../core/files.ipynb#part) `kilonb.core.files` `atomic_write` `nothing` $a_1$")
    assert '<h1 id="a-b">' in shown and 'href="../core/files.html#part"' in shown and "<math" in shown
    assert shown.count('href="../core/files.html"') == 1 and 'href="../core/files.html#atomic_write"' in shown
    assert "<code>nothing</code>" in shown and '"><code>nothing' not in shown and site.broken == []
    writer.markdown("[y](nowhere.ipynb) ![z](none.png)")
    assert [one.split(" ")[2] for one in site.broken] == ["to", "none.png,"] and "nowhere.ipynb" in site.broken[0]


def test_the_checker_finds_what_leads_nowhere(tmp_path):
    (tmp_path / "index.html").write_text(
        '<p id="here"><a href="#here">a</a><a href="#gone">b</a><a href="no.html">c</a>'
        '<a href="https://example.org">d</a><img src="https://example.org/x.png">')
    found = docs_check.broken_links(tmp_path)
    assert len(found) == 3 and "loads https" in found[0] and "no such name" in found[1] and "no file" in found[2]
    with pytest.raises(KiloError, match="run make docs first"): docs_check.broken_links(tmp_path / "empty")


def test_a_folder_with_other_files_is_not_emptied(tmp_path, monkeypatch, capsys):
    (tmp_path / "thesis.tex").write_text("x")
    monkeypatch.setattr(sys, "argv", ["docs.py", "--out", str(tmp_path)])
    assert docs.main() == 2 and (tmp_path / "thesis.tex").is_file()
    assert "holds other files" in capsys.readouterr().err


@needs_chromium
def test_pages_open_from_the_disk_without_errors_and_the_search_finds_a_function(site):
    from playwright.sync_api import sync_playwright

    assert list(docs_check.in_browser(site, [*PAGES, "search.html", "api.html"])) == []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.goto((site / "index.html").as_uri())
        top = page.evaluate("[...document.querySelectorAll('pre')].find((one) => one.textContent.includes('make demo'))"
                            ".getBoundingClientRect().top")
        assert top < 2 * 900, "the first command stands within two screens"
        page.get_by_label("Search").fill("atomic_write")
        page.keyboard.press("Enter")
        page.wait_for_url("**/search.html?q=atomic_write")
        assert page.locator("#found a").first.get_attribute("href") == "core/files.html#atomic_write"
        browser.close()


@pytest.mark.slow
def test_the_whole_site_has_no_broken_link(tmp_path):
    assert docs.build_site(tmp_path / "docs", tmp_path) == []
    assert docs_check.broken_links(tmp_path / "docs") == []
