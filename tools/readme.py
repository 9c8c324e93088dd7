"""Writes README.md from nbs/index.ipynb, and the pages of results_page.py.

`#| echo: false` runs a cell and shows only its output; `#| eval: false` shows a cell without running it; `#| hide` runs
a cell and shows nothing. Relative links and pictures of the notebook start at nbs/, those of README.md at the root.
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
import results_page
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
_LINK = re.compile(r"""(?:(?<=\]\()|(?<=\ssrc="))(?![a-z]+:|#|/)([^)\s"]+)""")


def directives(source: str) -> dict[str, str]:
    """The `#| name: value` lines of a cell; one without a value is "true"."""
    return {name: value or "true" for name, value in _DIRECTIVE.findall(source)}


def run_cells(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Execute the code cells in `folder` and store their outputs. Raises the exception of the first cell that fails."""
    shell = CaptureShell(mpl_format="png")
    with contextlib.chdir(folder):
        for cell in notebook.cells:
            if cell.cell_type != "code" or directives(cell.source).get("eval") == "false": continue
            cell.outputs = [nbformat.from_dict(output) for output in shell.run(cell.source)]
            if shell.exc: raise shell.exc


def arrange(notebook: nbformat.NotebookNode) -> None:
    """Apply the directives of all cells (`hide`, `echo: false`) and remove them from the sources."""
    kept = []
    for cell in notebook.cells:
        given = directives(cell.source) if cell.cell_type == "code" else {}
        if "hide" in given: continue
        if given.get("echo") == "false": cell.metadata["transient"] = {"remove_source": True}
        if cell.cell_type == "code": cell.source = _DIRECTIVE.sub("", cell.source)
        kept.append(cell)
    notebook.cells = kept


def relocate(markdown: str, folder: str) -> str:
    """Markdown whose links are relative to `folder`, with links relative to its parent; code blocks are not changed."""
    parts = _FENCED.split(markdown)
    moved = [part if part.startswith("```")
             else _LINK.sub(lambda found: posixpath.normpath(posixpath.join(folder, found[1])), part) for part in parts]
    return "".join(moved)


def readme_text(path: Path = INDEX) -> str:
    """The text of README.md for the index notebook at `path`, which is executed."""
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
    parser.add_argument("--check", action="store_true",
                        help="write nothing; exit with 1 where one of the pages differs from what it is made from")
    options = parser.parse_args()
    os.environ.setdefault("MPLBACKEND", "Agg")
    failed = 0
    for path, text in {README: readme_text(), **results_page.pages()}.items():
        name, same = path.relative_to(ROOT), path.is_file() and path.read_text(encoding="utf-8") == text
        if options.check and not same:
            print(f"{name} differs from what it is made from: run make readme and commit it.", file=sys.stderr)
            failed = 1
        if options.check: continue
        if not same:
            with atomic_write(path) as partial: partial.write_text(text, encoding="utf-8")
        print(f"{name} " + ("is unchanged" if same else "written"))
    return failed


if __name__ == "__main__": sys.exit(main())
