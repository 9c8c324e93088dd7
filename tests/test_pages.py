"""The page of a run escapes text, loads nothing from outside and names the error of a failed run."""
import json
from html.parser import HTMLParser

from kilonb.reports.run_page import write_page
from kilonb.runs.folders import open_run
from kilonb.runs.gates import Gate
from kilonb.runs.status import FAILED, mark_run


def test_a_page_escapes_text_and_loads_nothing(tmp_path):
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


def test_the_page_of_a_failed_run_contains_the_error(tmp_path):
    mark_run(open_run("demo", tmp_path / "run").folder, FAILED, "The scene has no frame <7>.")
    (tmp_path / "run" / "notebook.ipynb").write_text("{")
    text = write_page(tmp_path / "run").read_text()
    assert "no frame &lt;7&gt;" in text and "cannot be read as a notebook" in text
