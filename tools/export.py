"""What is committed, made from the notebooks: modules, index, README.md; outputs and editors' traces removed from the notebooks.

Needed after every edit of a notebook; run twice it changes nothing the second time.
"""
import json
import os
import sys
from pathlib import Path

from execnb.nbio import read_nb, write_nb
from nbdev.clean import nbdev_clean
from nbdev.doclinks import nbdev_export, nbglob

import readme

ROOT = Path(__file__).resolve().parent.parent


def clear_outputs(path: Path) -> bool:
    """Take outputs and execution counts out of a notebook, if it has any. nbdev_clean's own --clear_all would take papermill's `parameters` tag as well."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    noisy = [cell for cell in notebook["cells"] if cell["cell_type"] == "code" and (cell["outputs"] or cell["execution_count"] is not None)]
    if not noisy: return False
    clean = read_nb(path)
    for cell in clean.cells:
        if cell.cell_type == "code": cell.outputs, cell.execution_count = [], None
    write_nb(clean, path)
    return True


def main() -> int:
    os.chdir(ROOT)
    paths = list(nbglob(as_path=True))
    cleared = [path for path in paths if clear_outputs(path)]
    nbdev_clean.__wrapped__()
    nbdev_export.__wrapped__()
    print(f"{len(paths)} notebooks exported" + (f", outputs taken out of {len(cleared)}" if cleared else ""))
    return readme.main()


if __name__ == "__main__": sys.exit(main())
