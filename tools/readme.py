"""nbs/index.ipynb -> README.md: the front page is written once, as a notebook.

Cells marked `#| echo: false` are run and give their output; `#| eval: false` are shown and not run; `#| hide` are run
and leave nothing. The notebook's relative links and pictures start at nbs/, the page's at the root.
"""
import argparse
import contextlib
import logging
import os
import posixpath
import re
import sys
from pathlib import Path

import nbformat
from execnb.shell import CaptureShell

from kilonb.core.files import atomic_write
from kilonb.runs.notebooks import without_address_grammar

with without_address_grammar():
    from nbconvert.exporters import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
INDEX, README = ROOT / "nbs" / "index.ipynb", ROOT / "README.md"
NOTE = "<!-- made from nbs/index.ipynb by `make readme`: edit there -->\n"
_DIRECTIVE = re.compile(r"^#\| *(\w+)(?:: *(\w+))? *$\n?", re.MULTILINE)
_FENCED = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)\s]+)")


def directives(source: str) -> dict[str, str]:
    """The `#| name: value` lines of a cell; one without a value is "true"."""
    return {name: value or "true" for name, value in _DIRECTIVE.findall(source)}


def run_cells(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Give the code cells their outputs. Raises the exception of the first that fails."""
    shell = CaptureShell(mpl_format="png")
    with contextlib.chdir(folder):
        for cell in notebook.cells:
            if cell.cell_type != "code" or directives(cell.source).get("eval") == "false": continue
            cell.outputs = [nbformat.from_dict(output) for output in shell.run(cell.source)]
            if shell.exc: raise shell.exc


def arrange(notebook: nbformat.NotebookNode) -> None:
    """Do what the directives say and take them out."""
    kept = []
    for cell in notebook.cells:
        told = directives(cell.source) if cell.cell_type == "code" else {}
        if "hide" in told: continue
        if told.get("echo") == "false": cell.metadata["transient"] = {"remove_source": True}
        if cell.cell_type == "code": cell.source = _DIRECTIVE.sub("", cell.source)
        kept.append(cell)
    notebook.cells = kept


def relocate(markdown: str, folder: str) -> str:
    """Relative links and pictures as seen from the parent of `folder`; code blocks are left alone."""
    parts = _FENCED.split(markdown)
    moved = [part if part.startswith("```")
             else _LINK.sub(lambda found: posixpath.normpath(posixpath.join(folder, found[1])), part) for part in parts]
    return "".join(moved)


def readme_text(path: Path = INDEX) -> str:
    """The page, made anew."""
    notebook = nbformat.read(path, as_version=4)
    run_cells(notebook, path.parent)
    notebook = nbformat.reads(nbformat.writes(notebook), as_version=4)
    notebook.metadata["language_info"] = {"name": "python"}
    arrange(notebook)
    exporter = MarkdownExporter()
    exporter.log = logging.getLogger("readme")
    text, _ = exporter.from_notebook_node(notebook)
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE))
    return NOTE + relocate(text.strip() + "\n", path.parent.name)


def main() -> int:
    parser = argparse.ArgumentParser(description="Make README.md from nbs/index.ipynb.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the two are not in step")
    options = parser.parse_args()
    os.environ.setdefault("MPLBACKEND", "Agg")
    text = readme_text()
    same = README.is_file() and README.read_text(encoding="utf-8") == text
    if options.check:
        if not same:
            print("README.md is not in step with nbs/index.ipynb: run make readme and commit it.", file=sys.stderr)
        return 0 if same else 1
    if not same:
        with atomic_write(README) as partial: partial.write_text(text, encoding="utf-8")
    print("README.md " + ("is as it was" if same else "written"))
    return 0


if __name__ == "__main__": sys.exit(main())
