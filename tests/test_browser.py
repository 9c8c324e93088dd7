"""A run's page in a real browser, without a network. Needs Chromium (Debian: apt install chromium)."""
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kilonb.batch.execution import run_notebook
from kilonb.runs.notebooks import read_notebook
from kilonb.reports.run_page import write_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt install chromium")
CELLS = (("markdown", "# A page to look at\n\nLight that is left: $T = e^{-\\sigma\\delta}$."),
         ("parameters", 'run_dir: str = ""'),
         ("code", 'from kilonb.runs.folders import open_run\nrun = open_run("shown_page", run_dir)'),
         ("code", "import matplotlib.pyplot as plt\nfig, ax = plt.subplots(figsize=(3, "
          "2))\nax.plot([0, 1], [1, 0])\nrun.save_figure(fig, 'curve');"),
         ("code", "import plotly.graph_objects as go\ngo.Figure(go.Scatter(x=[0, 1], y=[2, 3]))"),
         ("code", "from kilonb.runs.gates import Gate\nrun.finish({'psnr_srgb_white_db': 41.25}, "
          "[Gate('psnr_srgb_white_db', at_least=40.0)])"))
COUNT = """<script>addEventListener("load", () => setTimeout(() => {
  const drawn = [...document.images].filter(image => image.complete && image.naturalWidth > 50).length;
  document.title = `images ${drawn} of ${document.images.length}`;
}, 500));</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shown_page")
    cells = [{"cell_type": "markdown" if kind == "markdown" else "code", "id": f"c{i}", "source": text,
              "metadata": {"tags": ["parameters"]} if kind == "parameters" else {},
              **({} if kind == "markdown" else {"outputs": [], "execution_count": None})} for i,
             (kind, text) in enumerate(CELLS)]
    path = folder / "shown_page.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return write_page(run_notebook(read_notebook(path), run_dir=folder / "run").folder)


def rendered(page: Path) -> str:
    """The document as HTML after its scripts ran; no host name resolves, so nothing can be loaded from outside."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
               "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={page.parent / 'profile'}",
               "--virtual-time-budget=5000", "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


def test_the_page_of_a_run_is_drawn_completely(page):
    """Pictures, plot and formula appear without a network."""
    counted = page.with_name("counted.html")
    counted.write_text(page.read_text(encoding="utf-8").replace("</body>", COUNT + "</body>"), encoding="utf-8")
    document = rendered(counted)
    drawn, images = map(int, re.search(r"<title>images (\d+) of (\d+)</title>", document).groups())
    assert drawn == images == 2, "the figure of the run and the output in the notebook"
    assert "A page to look at" in document and "41.2" in document and "✔ green" in document
    assert 'class="main-svg"' in document, "plotly drew its figure"
    assert "<math" in document and "\\sigma" not in re.sub(r"<annotation.*?</annotation>", "", document)
