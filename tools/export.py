"""Exports the library notebooks to modules and the index to README.md, and removes outputs and editor metadata from all
notebooks.

Needed after every edit of a notebook; a second run changes nothing.
"""
import json
import os
import sys
from pathlib import Path

from execnb.nbio import read_nb, write_nb
from nbdev.clean import nbdev_clean
from nbdev.doclinks import nbglob
from nbdev.export import nb_export

import readme

ROOT = Path(__file__).resolve().parent.parent


def clear_outputs(path: Path) -> bool:
    """Take outputs and execution counts out of a notebook, if it has any. nbdev_clean's own --clear_all would take
    papermill's `parameters` tag as well."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    noisy = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"
             and (cell["outputs"] or cell["execution_count"] is not None)]
    if not noisy: return False
    clean = read_nb(path)
    for cell in clean.cells:
        if cell.cell_type == "code": cell.outputs, cell.execution_count = [], None
    write_nb(clean, path)
    return True


def export(path: Path) -> bool:
    """Write the module of a library notebook, one that names a `default_exp`; whether it is one."""
    if "#| default_exp" not in path.read_text(encoding="utf-8"): return False
    folder = ROOT / "kilonb" / path.resolve().relative_to(ROOT / "nbs").parent
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "__init__.py").exists(): (folder / "__init__.py").touch()
    nb_export(str(path))
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
