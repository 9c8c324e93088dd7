"""Every benchmark notebook runs at small size, and its results are those that its gates ask for."""

import io
import json
from contextlib import redirect_stdout

import matplotlib
import pytest

from kilonb.runs.notebooks import list_notebooks

TINY = {
    "carve": {"resolution": 20, "cameras": 3, "repeats": 1},
    "networks": {"networks": 20, "samples": 40, "repeats": 1},
    "pinpad": {"sizes": [1, 8], "steps": 50, "repeats": 1},
    "rasterize": {"count": 300, "width": 48, "height": 48, "repeats": 1},
    "sparse_conv": {"largest": 1600, "channels": 16, "repeats": 1},
    "sparse_unet": {"largest": 1600, "repeats": 1},
    "stitch": {"width": 128, "repeats": 1},
    "student_frame": {"steps": 5, "widths": "16,32", "reference_width": 16, "repeats": 1},
    "sweep_overhead": None,                        # starts processes: tests/test_sweeps.py
    "teacher_step": {"resolution": 32, "counts": "300,600", "repeats": 1, "views": 2},
}


def test_every_benchmark_is_listed_here():
    assert set(TINY) == set(list_notebooks("benchmarks"))


@pytest.mark.parametrize("name", [name for name, tiny in TINY.items() if tiny is not None])
def test_a_benchmark_runs_at_small_size_and_reports_what_its_gates_judge(name, tmp_path, monkeypatch):
    monkeypatch.setattr(matplotlib, "rcParams", {**matplotlib.rcParams, "figure.max_open_warning": 0})
    notebook = json.loads(list_notebooks("benchmarks")[name].read_text())
    namespace, printed = {"__name__": "__main__"}, io.StringIO()
    with redirect_stdout(printed):
        for cell in notebook["cells"]:
            if cell["cell_type"] != "code": continue
            exec(compile("".join(cell["source"]), name, "exec"), namespace)
            if "parameters" in cell["metadata"].get("tags", []):
                unknown = set(TINY[name]) - set(namespace["__annotations__"])
                assert not unknown, f"no parameters of {name}: {unknown}"
                namespace.update(TINY[name], run_dir=str(tmp_path / name))
    written = json.loads((tmp_path / name / "results.json").read_text())
    assert written["results"] and written["gates"], "a benchmark without gates judges nothing"
    for gate, entry in written["gates"].items():
        assert entry["value"] is not None, f"{gate} was not measured"
