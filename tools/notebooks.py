"""Tests the library notebooks by nbdev, two at a time, each with its seconds; exits with 1 where one fails.

Each runs in a process of its own, so that none depends on what another left there: a process that has a second device
starts threads of autograd, and none of its forks can train. What is slow to import is imported once, before the forks:
the modules of KiloNB and the libraries that they import late.
Two things make this faster than `nbdev_test` alone. A cell with numba kernels that stands word for word in the exported
module is imported from there, since the kernels of a cell and those of its module are compiled apart. And figures are
drawn at the resolution of a screen. `nbdev_test --path nbs/<package>/<name>.ipynb` runs one notebook with neither.
"""
import ast
import importlib
import multiprocessing
import os
import pkgutil
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from multiprocessing import connection
from pathlib import Path

import execnb.shell
from nbdev import test as nbdev
from nbdev.process import NBProcessor

import kilonb

ROOT = Path(__file__).resolve().parent.parent
# experiments and benchmarks are run by pytest, at small size; the last two in a process of their own (see Makefile)
LEFT_OUT = {"experiments", "benchmarks", "explore", "results"}
ALONE = {"triton_networks", "simulated_device"}
WORKERS = 2
FEW = 4             # notebooks that import for themselves: importing everything takes as long as they do
# the first optimiser of a process imports torch._dynamo, as does the first comparison of tensors a part of it
SLOW_IMPORTS = ("torch._dynamo", "papermill", "nbconvert", "distributed", "matplotlib.pyplot", "plotly.graph_objects",
                "tensorboard.summary", "IPython.lib.lexers", "scipy.stats", "sklearn.cluster", "zarr", "h5py", "av",
                "trimesh", "gymnasium")


def library_notebooks() -> list[Path]:
    """The notebooks that `make test` runs here: first and last path, second and last but one, and so on, since two
    notebooks of one package at a time would compile the same kernels twice."""
    found = [path for path in (ROOT / "nbs").rglob("*.ipynb")
             if not LEFT_OUT.intersection(path.relative_to(ROOT).parts) and path.stem not in ALONE
             and not any(part.startswith((".", "_")) for part in path.relative_to(ROOT).parts)]
    found.sort()
    return [found[i // 2] if i % 2 == 0 else found[-1 - i // 2] for i in range(len(found))]


def module_cells(module: str) -> dict[str, str]:
    """Id of a cell -> its code in an exported module; empty where there is no such module."""
    path = ROOT.joinpath("kilonb", *module.split(".")).with_suffix(".py")
    if not path.is_file(): return {}
    parts = re.split(r"^# %% .*#(\w+)\n", path.read_text(encoding="utf-8"), flags=re.M)[1:]
    return {name: code.strip() for name, code in zip(parts[::2], parts[1::2])}


def defined_names(code: str) -> list[str]:
    """The names that a cell binds; empty where it does anything else beside."""
    names: list[str] = []
    for node in ast.parse(code).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): names.append(node.name)
        elif isinstance(node, ast.Assign) and all(isinstance(target, ast.Name) for target in node.targets):
            names += [target.id for target in node.targets]
        else: return []
    return names


class KernelsFromModule(NBProcessor):
    """A notebook for the test: its cells with kernels import them from the module."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        module = next((cell.directives_["default_exp"][0] for cell in self.nb.cells
                       if cell.cell_type == "code" and "default_exp" in cell.directives_), "")
        exported = module_cells(module) if module else {}
        for cell in self.nb.cells:
            code = cell.source.strip() if cell.cell_type == "code" else ""
            if "njit" not in code or exported.get(cell.get("id", "")) != code: continue
            if names := defined_names(code): cell.source = f"from kilonb.{module} import {', '.join(names)}"


class Shell(execnb.shell.CaptureShell):
    """An IPython shell that draws each figure once, where it is shown, and not a second time before that."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, mpl_format="png", **kwargs)
        from matplotlib import pyplot               # not before `main` has chosen the backend
        pyplot.uninstall_repl_displayhook()


def run_notebook(path: Path) -> None:
    """Run the cells of a notebook; exits with 1 where one fails."""
    nbdev.NBProcessor = KernelsFromModule
    nbdev.CaptureShell = Shell
    with nbdev.working_directory(ROOT / "nbs"):
        passed, _ = nbdev.test_nb(path, skip_flags=nbdev.get_config().tst_flags.split(), force_flags=[], basepath=ROOT)
    sys.exit(int(not passed))


def import_first() -> None:
    """Import what notebooks import, and set numba's compiler up, neither of which starts a thread."""
    for name in SLOW_IMPORTS: importlib.import_module(name)
    for module in pkgutil.walk_packages(kilonb.__path__, "kilonb.", onerror=lambda name: None):
        with suppress(Exception): importlib.import_module(module.name)     # a notebook that needs it says what is wrong
    importlib.import_module("numba").njit(lambda: 0)()


def tested(paths: Iterable[Path]) -> Iterator[tuple[Path, bool, float]]:
    """(path, whether it passed, seconds) of each notebook, as they end."""
    waiting, running, fork = iter(paths), {}, multiprocessing.get_context("fork")
    while True:
        for path in islice(waiting, WORKERS - len(running)):
            process = fork.Process(target=run_notebook, args=(path,))
            process.start()
            running[process.sentinel] = process, path, time.perf_counter()
        if not running: return
        for ended in connection.wait(running):
            process, path, start = running.pop(ended)
            process.join()
            yield path, process.exitcode == 0, time.perf_counter() - start


def main() -> int | str:
    """Test the notebooks of nbs that are named on the command line, or all of the library; for `sys.exit`."""
    paths = [Path(name).resolve() for name in sys.argv[1:]] or library_notebooks()
    missing = [str(path) for path in paths if not path.is_file()]
    if missing: return f"There is no notebook {missing[0]}."
    failed, start = [], time.perf_counter()
    os.environ.update(IN_TEST="1", MPLBACKEND="Agg")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")                           # see kilonb/__init__.py
    if len(paths) > FEW: import_first()
    for path, passed, seconds in tested(paths):
        name = path.relative_to(ROOT / "nbs")
        print(f"{seconds:6.1f} s  {name}{'' if passed else '  FAILED'}", flush=True)
        if not passed: failed.append(str(name))
    print(f"{len(paths)} notebooks in {time.perf_counter() - start:.0f} s; "
          + (f"{len(failed)} failed: {', '.join(failed)}" if failed else "all passed"))
    return int(bool(failed))


if __name__ == "__main__":
    import notebooks                            # by this name, since a tested notebook is the __main__ of its process

    sys.exit(notebooks.main())
