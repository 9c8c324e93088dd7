"""Exports the library notebooks to modules and the index to README.md, and removes outputs and editor metadata from all
notebooks.

Needed after every edit of a notebook; a second run changes nothing.
"""
import json
import os
import re
import sys
import textwrap
from pathlib import Path

from execnb.nbio import read_nb, write_nb
from nbdev.clean import nbdev_clean
from nbdev.doclinks import nbglob
from nbdev.export import nb_export

import readme

ROOT = Path(__file__).resolve().parent.parent
LINE_LENGTH = 120


def clear_outputs(path: Path) -> bool:
    """Remove outputs and execution counts from a notebook; whether it had any.

    nbdev_clean --clear_all is not used, because it also removes papermill's tag `parameters`.
    """
    notebook = json.loads(path.read_text(encoding="utf-8"))
    noisy = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"
             and (cell["outputs"] or cell["execution_count"] is not None)]
    if not noisy: return False
    clean = read_nb(path)
    for cell in clean.cells:
        if cell.cell_type == "code": cell.outputs, cell.execution_count = [], None
    write_nb(clean, path)
    return True


def wrap_generated(path: Path) -> None:
    """Wrap the lines that nbdev writes itself, module docstring and `__all__`, before column 120."""
    text = path.read_text(encoding="utf-8")
    docstring = re.match(r'"""(.*)"""\n', text)
    if docstring and len(docstring[0]) > LINE_LENGTH:
        text = '"""' + textwrap.fill(docstring[1], LINE_LENGTH - 3,
                                     break_long_words=False) + '\n"""\n' + text[docstring.end():]
    names = re.search(r"^__all__ = \[([^\]]*)\]$", text, re.M)
    if names:
        line = "__all__ = [" + " ".join(names[1].split()) + "]"
        wrapped = textwrap.fill(line, LINE_LENGTH, subsequent_indent=" " * 11, break_long_words=False,
                                break_on_hyphens=False)
        text = text[:names.start()] + wrapped + text[names.end():]
    if text != path.read_text(encoding="utf-8"): path.write_text(text, encoding="utf-8")


def export(path: Path) -> bool:
    """Write the module of a notebook that has a `default_exp` directive; whether it has one.

    A module that stays the same keeps its time of modification: with another one numba and Python compile it again.
    """
    if "#| default_exp" not in path.read_text(encoding="utf-8"): return False
    folder = ROOT / "kilonb" / path.resolve().relative_to(ROOT / "nbs").parent
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "__init__.py").exists(): (folder / "__init__.py").touch()
    module = folder / f"{path.stem}.py"
    before = (module.read_bytes(), module.stat()) if module.exists() else None
    nb_export(str(path))
    wrap_generated(module)
    if before and module.read_bytes() == before[0]: os.utime(module, ns=(before[1].st_atime_ns, before[1].st_mtime_ns))
    return True


def main() -> int:
    os.chdir(ROOT)
    paths = [Path(path) for path in nbglob(as_path=True)]
    cleared = [path for path in paths if clear_outputs(path)]
    nbdev_clean.__wrapped__()
    exported = [path for path in paths if export(path)]
    print(f"{len(exported)} notebooks exported" + (f", outputs removed from {len(cleared)}" if cleared else ""))
    return readme.main()


if __name__ == "__main__": sys.exit(main())
