"""tools/notebooks.py: each notebook in a process of its own, and what becomes of one that dies."""
import importlib.util
import os
import sys
from pathlib import Path

TOOL = Path(__file__).resolve().parent.parent / "tools/notebooks.py"


def loaded_tool():
    spec = importlib.util.spec_from_file_location("tools_notebooks", TOOL)
    spec.loader.exec_module(tool := importlib.util.module_from_spec(spec))
    return tool


def test_a_notebook_whose_process_dies_has_failed_and_the_others_run(monkeypatch):
    tool, left = loaded_tool(), []

    def run(path):
        if path.stem == "dies": os._exit(9)
        left.append(path)
        sys.exit(int(path.stem == "fails" or len(left) > 1))    # 1 where another ran in this process

    monkeypatch.setattr(tool, "run_notebook", run)
    names = ["a", "dies", "b", "fails", "c"]
    passed = {path.stem: ok for path, ok, _ in tool.tested(map(Path, names))}
    assert passed == {name: name in "abc" for name in names}
