"""What several test modules share: the command line as a subprocess and in this process, the root of the real data."""
import ast
import io
import os
import signal
import subprocess
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest

KILONB = [sys.executable, "-c", "import sys; from kilonb.cli.main import main; sys.exit(main())"]


def real_data(name: str) -> Path:
    """The folder or file `name` of the real data; the test is skipped where KILONB_DATA is unset or lacks it."""
    root = os.environ.get("KILONB_DATA")
    if not root: pytest.skip("KILONB_DATA is unset: it names the folder of the real data")
    path = Path(root) / name
    if not path.exists(): pytest.skip(f"KILONB_DATA has no {name}")
    return path


class _Printed(io.TextIOBase):
    """Standard output of a notebook that is executed here, for its monitor."""

    def __init__(self, monitor): self.monitor = monitor

    def write(self, text): return self.monitor.write(text) or len(text)


def _execute_cell(source: str, namespace: dict) -> None:
    """Run a cell; the value of its last expression, if it ends with one, is formatted as a notebook shows it."""
    from IPython.core.formatters import DisplayFormatter

    body = ast.parse(source)
    last = body.body.pop() if body.body and isinstance(body.body[-1], ast.Expr) else None
    exec(compile(body, "<cell>", "exec"), namespace)
    value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), namespace) if last else None
    if value is not None: DisplayFormatter().format(value)


def _execute_here(notebook, output, values, monitor) -> None:
    """`kilonb.batch.execution.execute` with the cells run in this process instead of in a kernel."""
    import nbformat
    from IPython.core.formatters import DisplayFormatter

    from kilonb.core.errors import KiloError

    cells = nbformat.read(notebook.path, 4).cells
    show = lambda *shown, **_: [DisplayFormatter().format(one) for one in shown]
    namespace = {"__name__": "__main__", "display": show}
    for number, cell in enumerate(cells, 1):
        monitor.before_cell(cell, None, number)
        if cell.cell_type != "code": continue
        try:
            with redirect_stdout(_Printed(monitor)): _execute_cell(cell.source, namespace)
        except KiloError as error:
            monitor.error = {"kilonb": True, "cause": getattr(error, "cause", "")}
            raise
        if "parameters" in cell.metadata.get("tags", []): namespace.update(values)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), output)


@contextmanager
def without_kernel():
    """Inside the block notebooks are executed in this process; figures that are left open are closed at its end."""
    import matplotlib.pyplot

    with patch("kilonb.batch.execution.execute", _execute_here), matplotlib.rc_context(): yield
    matplotlib.pyplot.close("all")


def run_here(*arguments, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """A command of KiloNB without the start of a process and of a kernel, which take longer than a small experiment.

    The parameters, the run folder, the gates and the page are those of the command `kilonb`; an error in a cell that is
    no KiloError is raised. For tests of an experiment; those of the command line, of signals and of kernels start one.
    """
    from kilonb.cli.main import main

    command, printed, errors = [*map(str, arguments)], io.StringIO(), io.StringIO()
    with (without_kernel(), patch.dict(os.environ, environment or {}), redirect_stdout(printed),
          redirect_stderr(errors)):
        code = main(command)
    return subprocess.CompletedProcess(command, code, printed.getvalue(), errors.getvalue())


class StopAt:
    """Ctrl-C in the step of a gaussian fit that requests the n-th picture."""

    def __init__(self, at: int): self.left = at

    def __enter__(self):
        from kilonb.splats.initialization import ViewSet

        self.views, self.original = ViewSet, ViewSet.premultiplied
        def premultiplied(views, index):
            self.left -= 1
            if self.left == 0: os.kill(os.getpid(), signal.SIGINT)
            return self.original(views, index)
        ViewSet.premultiplied = premultiplied

    def __exit__(self, *_): self.views.premultiplied = self.original
