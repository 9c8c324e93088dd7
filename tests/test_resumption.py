"""A resumption that is refused or killed leaves a whole run, and what is shown of hostile runs harms none."""
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import KILONB

from kilonb.batch import execution
from kilonb.cli.main import main
from kilonb.core.errors import KiloError
from kilonb.core.hashing import hash_file, hash_folder
from kilonb.reports.offline_html import notebook_html
from kilonb.reports.report import write_report
from kilonb.reports.run_page import write_page
from kilonb.runs import folders
from kilonb.runs.folders import open_run, prepare_run
from kilonb.runs.notebooks import read_notebook
from kilonb.runs.records import list_runs
from kilonb.runs.resuming import check_same_parameters
from kilonb.runs.status import read_status

PARAMETERS = ('steps: int = 10\ncontext: int = 1\nsettings: "kilonb.training.loop.LoopConfig" = {}\n'
              'run_dir: str = ""\nresume: bool = False')


def write_notebook(path: Path, parameters: str, *cells: str, **more) -> Path:
    made = [{"cell_type": "code", "metadata": {"tags": [] if i else ["parameters"]}, "source": source, "outputs": [],
             "execution_count": None, "id": f"c{i}"} for i, source in enumerate((parameters, *cells))]
    path.write_text(json.dumps({"cells": made, "metadata": more, "nbformat": 4, "nbformat_minor": 5}))
    return path


def state_of(folder: Path) -> dict[str, tuple]:
    """Everything below a folder: name -> (digest, time of change)."""
    return {str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
                                            path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))}


def finished_run(folder: Path, experiment: str = "tiny", **parameters) -> Path:
    """A finished run with a checkpoint, as a training leaves it."""
    run = open_run(experiment, folder, {"steps": 10, "context": 1, **parameters})
    (run.checkpoints / "final.pt").write_bytes(b"weights")
    run.finish({"psnr_db": 30.0})
    return folder


def in_child(action) -> int:
    """Calls a function in a child process; returns how that ended (9: it ended itself in the middle)."""
    child = os.fork()
    if not child:
        try: action()
        except BaseException: os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# Refused


@pytest.fixture
def resumed(tmp_path):
    """A notebook whose `context` may change, and a finished run of it."""
    notebook = write_notebook(tmp_path / "tiny.ipynb", PARAMETERS, "fixed = session.fixed_parameters('context')")
    return notebook, finished_run(tmp_path / "run", **{"loop.learning_rate": 0.5})


@pytest.mark.parametrize("values, name", [
    (["steps=300"], "steps"), (["steps=9", "context=2"], "steps"), (["loop.learning_rate=0.25"], "loop.learning_rate"),
    (["loop.warmup_steps=1"], "loop.warmup_steps")])
def test_other_parameters_are_refused_before_a_kernel_starts(resumed, monkeypatch, capsys, values, name):
    notebook, folder = resumed
    monkeypatch.setattr(execution, "execute", lambda *_: pytest.fail("a kernel was started"))
    before = state_of(folder)
    assert main(["run", str(notebook), "--out", str(folder), "--resume", *(f"-p{value}" for value in values)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and f"{name} = " in lines[0] and len(lines[0]) <= 410
    assert state_of(folder) == before


def test_parameters_that_may_change_are_accepted(resumed):
    notebook, folder = resumed
    values = {"steps": 10, "context": 1, "loop.learning_rate": 0.5}
    check_same_parameters(folder, {**values, "device": "cuda", "loop.time_limit_s": 3.0, "newer": 1})
    check_same_parameters(folder, {**values, "context": 2}, execution.free_parameters(read_notebook(notebook)))
    with pytest.raises(KiloError, match="context = 1"): check_same_parameters(folder, {**values, "context": 2})
    for path in (folder / "results.json", folder / "checkpoints" / "final.pt"): path.unlink()
    check_same_parameters(folder, {**values, "steps": 20})


def test_a_refusal_that_is_killed_changes_nothing(resumed):
    notebook, folder = resumed
    before = state_of(folder)
    for delay in (0.3, 0.6):
        process = subprocess.Popen([*KILONB, "run", str(notebook), "--out", str(folder), "--resume", "-psteps=300"],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert state_of(folder) == before


@pytest.mark.parametrize("place", ["write_json", "atomic_folder", "unlink"])
def test_a_resumption_that_is_killed_while_it_begins_loses_nothing(tmp_path, monkeypatch, place):
    """0.1 moved `status.json` away first: a kill then made the run vanish from every list."""
    folder = finished_run(tmp_path / "tiny" / "run")
    results = (folder / "results.json").read_bytes()
    owner = Path if place == "unlink" else folders
    def killed_resumption():
        setattr(owner, place, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        prepare_run("tiny", folder, resume=True)
    assert in_child(killed_resumption) == -signal.SIGKILL
    assert [record.folder for record in list_runs(tmp_path)] == [folder]
    assert read_status(folder)["status"] == ("abandoned" if place == "unlink" else "finished")
    kept = folder / "earlier" / "1" / "results.json"
    assert not kept.exists() or kept.read_bytes() == results
    assert (folder / "results.json").read_bytes() == results or kept.exists()
    assert json.loads((folder / "parameters.json").read_text())["steps"] == 10
    prepare_run("tiny", folder, resume=True)
    assert any(path.read_bytes() == results for path in folder.glob("earlier/*/results.json"))
    assert not list(folder.glob(".*")) or all(path.name.startswith(".resuming-") for path in folder.glob(".*"))


def test_a_run_is_resumed_by_one_process_at_a_time(tmp_path):
    folder = finished_run(tmp_path / "run")
    before = state_of(folder)
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    def refused():
        with pytest.raises(KiloError, match="another process"): prepare_run("tiny", folder, resume=True)
    assert in_child(refused) == 0 and state_of(folder) == before
    os.close(handle)


# Imports


@pytest.mark.parametrize("path", ["kilonb_planted.Config", "os.path.Config", "kilonb.core.errors.os", "kilonb..x.Y"])
def test_settings_import_config_classes_of_kilonb_only(tmp_path, monkeypatch, capsys, path):
    (tmp_path / "kilonb_planted.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    notebook = write_notebook(tmp_path / "tiny.ipynb", f'settings: "{path}" = {{}}\nrun_dir: str = ""')
    prefix = path.rpartition(".")[2].lower()
    for arguments in (["-p", f"{prefix}.a=1", "--out", str(tmp_path / "run")], ["--help", "--all"]):
        assert main(["run", str(notebook), *arguments]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "executed").exists() and "kilonb_planted" not in sys.modules


# What is shown


def test_no_name_reaches_the_terminal_as_a_command(tmp_path, monkeypatch, capsys):
    finished_run(tmp_path / "tiny" / "a\x1b[2Jb\nc", data="blender:\x1b]0;title\x07x\ny")
    status = finished_run(tmp_path / "tiny" / "named") / "status.json"
    status.write_text(json.dumps({"status": "failed", "experiment": "a\x1b[31m", "error": "\x1b[2J"}))
    wrong = finished_run(tmp_path / "tiny" / "other") / "status.json"
    wrong.write_text(json.dumps({"status": "failed", "experiment": "tiny", "error": "\x1b[2J\nnext"}))
    monkeypatch.setenv("KILONB_OUTPUTS", str(tmp_path))
    for arguments in (["runs", "list"], ["show", "tiny/other"], ["runs", "compare", "tiny/other", "tiny/a"]):
        assert main(arguments) == 0
        shown = capsys.readouterr().out
        assert all(one.isprintable() for line in shown.split("\n") for one in line), arguments


def test_a_run_with_a_broken_status_is_listed(tmp_path):
    finished_run(tmp_path / "tiny" / "good")
    for name, target in (("broken", "nowhere"), ("loop", "status.json")):
        folder = finished_run(tmp_path / "tiny" / name)
        (folder / "status.json").unlink()
        (folder / "status.json").symlink_to(target)
    (tmp_path / "tiny" / "no run").mkdir()
    states = {record.folder.name: record.status for record in list_runs(tmp_path)}
    assert states == {"good": "finished", "broken": "unreadable", "loop": "unreadable"}


def test_pages_of_odd_runs_are_written(tmp_path):
    good = finished_run(tmp_path / "tiny" / "good")
    odd = finished_run(tmp_path / "tiny" / os.fsdecode(b"\xff\xfename"))
    results = {"psnr_db": 3.0, "nested": {"a": [1]}, "\ud800": 4, "<b>": "x"}
    (odd / "results.json").write_text(json.dumps({"results": results}))
    deep = finished_run(tmp_path / "tiny" / "deep")
    (deep / "results.json").write_text(json.dumps({"results": {"psnr_db": 2.0, "nested": 3}}))
    (deep / "notebook.ipynb").write_text("[" * 100_000)
    for folder in (good, odd, deep): assert write_page(folder).stat().st_size > 1000
    assert "nested more than" in (deep / "index.html").read_text()
    report = write_report(outputs=tmp_path)
    assert "good" in report.read_text()


def test_a_page_embeds_pictures_beside_the_notebook_only(tmp_path):
    run, private = tmp_path / "run", tmp_path / "private"
    for folder in (run, private): folder.mkdir()
    for path in (run / "own.png", private / "secret.png", private / "key.pem"): path.write_bytes(b"\x89PNG content")
    (run / "link.png").symlink_to(private / "secret.png")
    names = ["own.png", "../private/secret.png", "link.png", private / "secret.png", "../private/key.pem", "secret.png"]
    cells = [{"cell_type": "markdown", "metadata": {}, "id": f"m{i}", "source": f"![p]({name}) <img src='{name}'>"}
             for i, name in enumerate(names)]
    path = run / "notebook.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": {"papermill": {"input_path": str(private / "n.ipynb")}},
                                "nbformat": 4, "nbformat_minor": 5}))
    _, body = notebook_html(path)
    assert body.count("base64,") == 2 and "secret" not in body


# Data


def test_a_folder_with_broken_links_and_pipes_is_one_sentence(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / os.fsdecode(b"\xff.txt")).write_text("b")
    assert len(hash_folder(tmp_path)) == 64
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(KiloError, match="link"): hash_folder(tmp_path)
    (tmp_path / "link").unlink()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(KiloError, match="not a regular file"): hash_folder(tmp_path)
    with pytest.raises(KiloError, match="not a regular file"): hash_file("/dev/zero")
