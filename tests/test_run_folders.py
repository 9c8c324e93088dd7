"""Runs survive what happens around them: a lost terminal, damaged neighbours, dead and foreign processes, refusals."""
import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import KILONB

from kilonb.cli.main import main
from kilonb.core.errors import KiloError
from kilonb.core.files import atomic_folder, atomic_write, write_json
from kilonb.core.processes import owner_name, process_state, this_process
from kilonb.runs.cohorts import read_cohort
from kilonb.runs.files import ENTRIES
from kilonb.runs.folders import open_run, prepare_run
from kilonb.runs.records import find_run, list_runs, read_run
from kilonb.runs.selection import run_rows
from kilonb.runs.status import RUNNING, mark_run, read_status
from kilonb.runs.verdicts import gate_overview

TRAINING = """import torch
from torch import nn
from kilonb.training.loop import LoopConfig, train
from kilonb.training.session import open_session
session = open_session('tiny', data=())
model = nn.Linear(2, 1)
(session.folder / 'early.txt').write_text('made before the training')
config = LoopConfig(steps=steps, warmup_steps=1, log_every_steps=5, checkpoint_every_steps=5)
outcome = train(lambda step, generator: {'loss': model(torch.ones(3, 2)).square().mean()},
                torch.optim.Adam(model.parameters()), config, model=model, folder=session.folder,
                resume=session.resumed, quiet=True)
session.finish({'loss': outcome.records[-1]['loss']})"""


def write_notebook(path: Path, parameters: str, *cells: str) -> Path:
    made = [{"cell_type": "code", "metadata": {"tags": [] if i else ["parameters"]}, "source": source, "outputs": [],
             "execution_count": None, "id": f"c{i}"} for i, source in enumerate((parameters, *cells))]
    path.write_text(json.dumps({"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return path


def state_of(folder: Path) -> dict[str, tuple[str, str]]:
    """Everything in a folder: its name -> (digest or target of a link, time of change)."""
    return {str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), str(path.stat().st_mtime_ns))
            for path in sorted(folder.rglob("*")) if path.is_file()} | {
                str(path.relative_to(folder)): ("folder", "") for path in folder.rglob("*") if path.is_dir()}


def kilonb(*arguments, **named):
    return subprocess.run([*KILONB, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False,
                          **{"errors": "replace", **named})


def one_sentence(result) -> str:
    """The sentence with which a command refused its input."""
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2 and len(lines) == 1, (result.returncode, result.stderr[-2000:])
    assert lines[0].startswith("kilonb: ") and len(lines[0]) <= 410
    return lines[0]


def finished_run(folder: Path, value: float = 1.0) -> Path:
    open_run(folder.parent.name, folder, {"steps": 3}).finish({"psnr_db": value})
    return folder


# Refused requests


def test_a_resumption_that_the_notebook_refuses_changes_nothing(tmp_path):
    """`--resume -p steps=20` on a finished run of 10 steps moved its results aside and marked it failed."""
    parameters = "steps: int = 10\nrun_dir: str = ''\nresume: bool = False"
    notebook = write_notebook(tmp_path / "tiny.ipynb", parameters, TRAINING)
    assert kilonb("run", notebook, "--out", tmp_path / "run").returncode == 0
    before = state_of(tmp_path / "run")
    request = ["run", str(notebook), "--out", str(tmp_path / "run"), "--resume", "-p"]
    assert "steps = 10" in one_sentence(kilonb(*request, "steps=20"))
    assert state_of(tmp_path / "run") == before
    assert main([*request, "steps=many"]) == 2 == main([*request, "rate=1"])
    assert state_of(tmp_path / "run") == before
    assert read_run(tmp_path / "run").status == "finished"
    latest, final = (tmp_path / "run" / "checkpoints" / f"{name}.pt" for name in ("latest", "final"))
    assert os.path.samefile(latest, final), "one file with two names"


def test_every_other_refusal_of_a_folder_changes_nothing(tmp_path):
    data = {"kind": "blender", "path": "/data/lego", "sha256": "aa"}
    open_run("demo", tmp_path / "run", {"steps": 3}, data).finish({"psnr_db": 1.0})
    going = open_run("demo", tmp_path / "going")
    away = open_run("demo", tmp_path / "away")
    mark_run(away.folder, RUNNING, process={**this_process(), "host": "node7"})
    before = {name: state_of(tmp_path / name) for name in ("run", "going", "away")}
    requests = [
        lambda: open_run("demo", tmp_path / "run"),
        lambda: open_run("other", tmp_path / "run", resume=True),
        lambda: open_run("demo", tmp_path / "run", data={**data, "sha256": "bb"}, resume=True),
        lambda: open_run("demo", tmp_path / "nowhere", resume=True),
        lambda: open_run("demo", going.folder, resume=True),
        lambda: prepare_run("demo", away.folder, resume=True),
    ]
    for request in requests:
        with pytest.raises(KiloError): request()
        assert {name: state_of(tmp_path / name) for name in before} == before
    assert not (tmp_path / "nowhere").exists()


def test_a_script_that_is_refused_by_its_checkpoint_leaves_the_run_as_it_was(tmp_path):
    program = {"steps": 10, "run_dir": str(tmp_path / "run"), "resume": False}
    source = TRAINING.replace("open_session('tiny', data=())", "open_session('tiny', parameters, data=())")
    exec(source, {"parameters": program, "steps": 10})
    before = state_of(tmp_path / "run")
    with pytest.raises(KiloError, match="steps = 10"):
        exec(source, {"parameters": {**program, "resume": True}, "steps": 20})
    assert state_of(tmp_path / "run") == before


# Damaged runs


@pytest.mark.parametrize("name, content", [
    ("status.json", b"[" * 100_000), ("status.json", b'{"status": false, "experiment": 3}'),
    ("status.json", b"\xff\xfe{"), ("status.json", b'{"status": "finished", "elapsed_s": NaN}'),
    ("status.json", b'{"status": "running", "process": 3}'), ("results.json", b'{"results": [1]}'),
    ("status.json", b'{"status": "finished", "started": {"a": 1}}'), ("results.json", b'{"tables": {"frames": [1]}}'),
    ("results.json", b'{"results": {"psnr_db": 1' + b"0" * 5000 + b"}}"),
    ("results.json", b'{"results": {"psnr_db": 1' + b"0" * 400 + b"}}"),
    ("results.json", b'{"gates": {"psnr_db": {"at_least": "nan"}}}'), ("environment.json", b'{"data": {"name": 3}}'),
    ("environment.json", b'{"packages": [1], "hardware": "none"}'), ("parameters.json", b"[1, 2]"),
    ("parameters.json", b'{"a":' * 2000), ("status.json", "pipe"), ("results.json", "folder"),
    ("environment.json", "dangling")])
def test_one_damaged_run_is_unreadable_and_hides_no_other(tmp_path, name, content):
    good, bad = finished_run(tmp_path / "demo" / "good"), finished_run(tmp_path / "demo" / "bad")
    (bad / name).unlink()
    if content == "pipe": os.mkfifo(bad / name)
    elif content == "folder": (bad / name).mkdir()
    elif content == "dangling": (bad / name).symlink_to(tmp_path / "nothing")
    else: (bad / name).write_bytes(content)
    records = {record.folder.name: record for record in list_runs(tmp_path)}
    assert records["good"].status == "finished" and records["bad"].status == "unreadable"
    assert name in records["bad"].error and "\n" not in records["bad"].error and len(records["bad"].error) <= 400
    assert sorted(member.record.status for member in read_cohort(tmp_path).members) == ["finished", "unreadable"]
    assert any(name in error for error in gate_overview(tmp_path).unreadable)
    assert [row[1] for row in run_rows(list(records.values()))[1]].count("unreadable") == 1
    with pytest.raises(KiloError, match=name): read_run(bad)
    with pytest.raises(KiloError): open_run("demo", bad, resume=True) if name != "results.json" else read_run(bad)
    assert find_run("demo", tmp_path) in (good, bad)


def test_what_a_run_writes_is_what_the_reader_admits(tmp_path):
    folder = finished_run(tmp_path / "demo" / "a")
    for part in ("status", "results", "environment", "parameters"):
        written = json.loads((folder / f"{part}.json").read_text())
        for entry, (fits, _) in ENTRIES[part].items():
            assert entry not in written or fits(written[entry]), (part, entry)


def test_runs_are_ordered_by_instant_and_not_by_text(tmp_path):
    for name, started in (("older", "2026-11-01T23:00:00+09:00"), ("newer", "2026-11-01T15:00:00+00:00")):
        mark_run(finished_run(tmp_path / "demo" / name), "failed", started=started)
    assert [record.folder.name for record in list_runs(tmp_path)] == ["older", "newer"]
    assert find_run("demo", tmp_path).name == "newer"


# Liveness


def test_a_zombie_is_dead_and_its_run_abandoned(tmp_path):
    code = (f"from kilonb.runs.folders import open_run\nopen_run('demo', {str(tmp_path / 'run')!r})\n"
            "print(1, flush=True)\ninput()")
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
    assert read_status(tmp_path / "run")["status"] == RUNNING
    child.kill()
    while process_state(read_status(tmp_path / "run")["process"]) == "alive": time.sleep(0.02)
    assert Path(f"/proc/{child.pid}").exists() or sys.platform != "linux"
    assert read_status(tmp_path / "run")["status"] == "abandoned"
    child.communicate()


@pytest.mark.parametrize("shift", [-7200.0, -30.0, 0.0, 30.0, 7200.0])
def test_a_clock_that_was_set_kills_no_run(tmp_path, shift):
    run = open_run("demo", tmp_path / "run")
    me = this_process()
    for process in ({**me, "created": me["created"] + shift},
                    {name: me[name] for name in ("pid", "host")} | {"created": me["created"] + shift}):
        mark_run(run.folder, RUNNING, process=process)
        assert read_status(run.folder)["status"] == RUNNING
    mark_run(run.folder, RUNNING, process={**me, "ticks": me["ticks"] + 1})
    assert read_status(run.folder)["status"] == "abandoned"


def test_a_run_of_another_host_is_taken_over_only_when_asked(tmp_path):
    notebook = write_notebook(tmp_path / "demo.ipynb", "run_dir: str = ''\nresume: bool = False",
                              "from kilonb.runs.folders import open_run\nopen_run('demo', run_dir).finish({'sum': 1})")
    folder = finished_run(tmp_path / "outputs" / "demo" / "away")
    mark_run(folder, RUNNING, process={"pid": 1, "created": 1.0, "host": "node7"})
    before, environment = state_of(folder), {**os.environ, "KILONB_OUTPUTS": str(tmp_path / "outputs")}
    [record] = list_runs(tmp_path / "outputs")
    assert (record.status, record.elsewhere) == (RUNNING, "node7") and run_rows([record])[1][0][1] == "running on node7"
    said = one_sentence(kilonb("run", notebook, "--resume", "--out", folder, env=environment))
    assert "node7" in said and "--take-over" in said and read_status(folder)["changed"] in said
    assert state_of(folder) == before
    assert kilonb("run", notebook, "--resume", "--take-over", "--out", folder, env=environment).returncode == 0
    assert read_run(folder).results["sum"] == 1


def test_a_container_with_the_same_name_is_another_host(tmp_path):
    me = this_process()
    assert process_state({**me, "namespace": me["namespace"] + 1}) == "unknown"
    assert process_state({**me, "boot": "another", "machine": "another"}) == "unknown"
    assert process_state({**me, "host": platform.node() + "x"}) == "unknown"


# Lost streams


ECHO = ("text: str = 'hello'\nrun_dir: str = ''",
        "from kilonb.runs.folders import open_run\nimport sys\nrun = open_run('echo', run_dir)",
        "for i in range(3000): print(text, i)\nprint('problem', file=sys.stderr)", "run.finish({'lines': 3000})")


@pytest.mark.parametrize("redirection", ["| head -1", "> /dev/full 2>&-", "<&- >&- 2>&-"])
def test_a_run_that_loses_its_streams_goes_on(tmp_path, redirection):
    notebook = write_notebook(tmp_path / "echo.ipynb", *ECHO)
    script = (f"{sys.executable} -c 'import sys; from kilonb.cli.main import main; sys.exit(main())' run {notebook} "
              f"--out {tmp_path / 'run'} {redirection}; echo code ${{PIPESTATUS[0]}}")
    ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert "code 0" in ended.stdout and "Traceback" not in ended.stderr, ended.stderr
    record = read_run(tmp_path / "run")
    assert record.status == "finished" and (tmp_path / "run" / "log.txt").read_text().count("hello") == 3000


@pytest.mark.parametrize("redirection, code", [("| head -1", "141"), ("> /dev/full 2>&-", "1"), ("<&- >&- 2>&-", "0")])
def test_a_list_that_loses_its_streams_ends_without_a_traceback(tmp_path, redirection, code):
    for i in range(3): finished_run(tmp_path / "demo" / f"{i:03}")
    script = (f"{sys.executable} -c 'import sys; from kilonb.cli.main import main; sys.exit(main())' runs --json "
              f"{redirection.replace('head -1', 'true')}; echo code ${{PIPESTATUS[0]}} >> {tmp_path / 'code'}")
    ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False,
                           env={**os.environ, "KILONB_OUTPUTS": str(tmp_path)})
    assert "Traceback" not in ended.stderr and "Exception" not in ended.stderr
    assert (tmp_path / "code").read_text().strip() == f"code {code}"


# Leftovers


def test_leftovers_of_dead_processes_are_swept_and_others_stay(tmp_path):
    code = f"""import os
from pathlib import Path
from kilonb.core.files import atomic_folder, atomic_write
from kilonb.runs.folders import open_run
run = open_run('demo', {str(tmp_path / 'demo' / 'run')!r})
write, folder = atomic_write(run.checkpoints / 'latest.pt'), atomic_folder({str(tmp_path / 'demo' / 'data')!r})
write.__enter__().write_text('half')
folder.__enter__().mkdir()
os._exit(9)"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    folder = tmp_path / "demo" / "run"
    left = [path for path in tmp_path.rglob(".*.part")]
    assert len(left) == 2
    other = folder / f".x.o00000000{owner_name()[9:]}.1f.part"
    other.write_text("of another host")
    with atomic_write(folder / "checkpoints" / "mine.pt") as partial:
        partial.write_text("going on")
        open_run("demo", folder, resume=True)
        assert partial.exists() and other.exists() and not any(path.exists() for path in left)
    with contextlib.suppress(ValueError), atomic_folder(tmp_path / "demo" / "data") as whole:
        whole.mkdir()
        raise ValueError
    other.unlink()
    assert not [path for path in tmp_path.rglob(".*") if path.name.endswith(".part")]


def test_a_run_keeps_one_copy_of_its_last_checkpoint_where_links_work_and_two_where_not(tmp_path, monkeypatch):
    from kilonb.training.checkpoints import final_path, keep_final, latest_path, read_checkpoint, write_checkpoint

    write_checkpoint(latest_path(tmp_path / "linked"), {"step": 3})
    keep_final(tmp_path / "linked")
    keep_final(tmp_path / "linked")
    assert os.path.samefile(latest_path(tmp_path / "linked"), final_path(tmp_path / "linked"))
    shutil.copytree(tmp_path / "linked", tmp_path / "copied")
    assert read_checkpoint(final_path(tmp_path / "copied"))["step"] == 3

    def no_links(*_): raise OSError("no links here")

    monkeypatch.setattr(os, "link", no_links)
    write_checkpoint(latest_path(tmp_path / "plain"), {"step": 4})
    keep_final(tmp_path / "plain")
    assert read_checkpoint(final_path(tmp_path / "plain"))["step"] == 4
    assert open_run("demo", tmp_path / "run").folder.is_dir()


# Hostile surroundings


@pytest.mark.parametrize("arguments", [
    ("run", b"\xff.ipynb"), ("run", b"\xff"), ("run", "~nosuchuser/a.ipynb"), ("run", "x" * 300),
    ("runs", "list", b"\xff"), ("watch", "x" * 300),
    ("show", "x" * 300), ("show", "~nosuchuser/run"), ("show", b"\xff"), ("gates", "x" * 300),
    ("page", "~nosuchuser/a"),
    ("report", "x" * 300), ("report", b"\xff"), ("sweep", "x" * 300), ("sweep", "~nosuchuser/a.yaml"),
    ("sweep", b"\xff.yaml"), ("runs", "restore", "x" * 300), ("runs", "archive", "x" * 300),
    ("runs", "compare", "~nosuchuser/a", "b"), ("run", "NOTEBOOK", "--out", "~nosuchuser/a"),
    ("run", "NOTEBOOK", "--out", "x" * 300), ("run", "NOTEBOOK", "--out", "LOOP"), ("run", "NOTEBOOK", "--out", "FILE"),
    ("run", "NOTEBOOK", "--out", "FILE/run"), ("run", "NOTEBOOK", "--resume", "--out", "DANGLING"),
    ("run", "NOTEBOOK", "--take-over"), ("run", "FOLDER.ipynb"), ("run", "NOTEBOOK", "-p", "steps=" + "1" * 5000),
    ("run", "NOTEBOOK", "-p", "-" * 5000), ("run", "NOTEBOOK", "--processes", "1" * 5000)])
def test_hostile_arguments_are_one_sentence(tmp_path, arguments, capfd):
    notebook = write_notebook(tmp_path / "echo.ipynb", "steps: int = 1\nrun_dir: str = ''\nresume: bool = False")
    (tmp_path / "LOOP").symlink_to(tmp_path / "LOOP")
    (tmp_path / "DANGLING").symlink_to(tmp_path / "nothing")
    (tmp_path / "FILE").write_text("a file")
    (tmp_path / "FOLDER.ipynb").mkdir()
    places = {name: str(tmp_path / name) for name in ("LOOP", "DANGLING", "FILE", "FILE/run", "FOLDER.ipynb")}
    places["NOTEBOOK"] = str(notebook)
    given = [os.fsdecode(word) if isinstance(word, bytes) else places.get(word, word) for word in arguments]
    assert main(given) == 2
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("kilonb: ") and len(said[0]) <= 410, said


def read_only_command() -> list[str]:
    """The beginning of a command that obeys the permissions of folders, also where root runs the tests."""
    if os.geteuid(): return []
    if not shutil.which("setpriv"): pytest.skip("root needs setpriv to obey the permissions of folders")
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    if subprocess.run([*drop, "true"], capture_output=True, check=False).returncode:
        pytest.skip("the privileges of root cannot be dropped here")
    return drop


def test_a_package_that_cannot_be_written_still_compiles_and_runs(tmp_path):
    """numba raised at import where it found no folder for its cache; a long TMPDIR left a traceback and a run that was
    'abandoned'."""
    source = Path(sys.modules["kilonb"].__file__).parent
    shutil.copytree(source, tmp_path / "site" / "kilonb", ignore=shutil.ignore_patterns("__pycache__"))
    home, deep = tmp_path / "home", tmp_path / "/".join(["scratch_project_of_the_group"] * 4)
    home.mkdir()
    deep.mkdir(parents=True)
    closed = [home, *(path for path in (tmp_path / "site").rglob("*") if path.is_dir())]
    for folder in closed: folder.chmod(0o555)
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(deep), "LANG": "C", "HOME": str(home),
                   "PYTHONPATH": str(tmp_path / "site"), "PYTHONDONTWRITEBYTECODE": "1"}
    code = "import sys, kilonb.metrics.events; from kilonb.cli.main import main; sys.exit(main())"
    notebook = write_notebook(tmp_path / "echo.ipynb", *ECHO)
    try:
        ended = subprocess.run([*read_only_command(), sys.executable, "-c", code, "run", str(notebook), "--out",
                                str(tmp_path / "run")], text=True, capture_output=True, timeout=120, check=False,
                               env=environment, cwd=tmp_path)
    finally:
        for folder in closed: folder.chmod(0o755)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert read_run(tmp_path / "run").status == "finished" and list(deep.glob("kilonb-numba-*"))


def test_text_that_is_not_utf8_is_written_and_read_back(tmp_path):
    write_json(tmp_path / "status.json", {"status": "finished", "command": os.fsdecode(b"kilonb run \xff")})
    assert os.fsencode(read_status(tmp_path)["command"]) == b"kilonb run \xff"
