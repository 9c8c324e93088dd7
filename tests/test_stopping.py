"""Ctrl-C, a second one, SIGTERM and SIGHUP stop a run, a run of several processes and a sweep, and nothing is lost."""
import contextlib
import json
import os
import platform
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from helpers import KILONB

from kilonb.runs.records import read_run

PARAMETERS = 'steps: int = 8\npause_s: float = 0.0\nseed: int = 0\nrun_dir: str = ""\nresume: bool = False'
TRAIN = """import time, torch
from kilonb.training.loop import LoopConfig, train
from kilonb.training.parallel import share, share_weight
from kilonb.training.session import open_session
session = open_session("toy", timeout_s=60)
torch.manual_seed(seed)
world, model = session.world, torch.nn.Linear(1, 1)
def step(number, generator):
    if world.first: (session.folder / "trace.txt").open("a").write(f"{number}\\n")
    time.sleep(pause_s)
    x = torch.rand(8, 1, generator=generator)[share(8, world)]
    return {"loss": (model(x) - 3 * x).square().mean(), "share": share_weight(8, world)}
result = train(step, torch.optim.Adam(model.parameters(), lr=0.1), LoopConfig(steps, 0.1, warmup_steps=0, seed=seed),
               model=model, folder=session.folder, resume=session.resumed, world=world)
session.leave_group()"""
FINISH = 'session.finish({"sum": sum(float(p.detach().double().sum()) for p in model.parameters())})'
PLAIN = """import time
from kilonb.runs.folders import open_run
run = open_run("toy", run_dir, {}, seed=seed, resume=resume)
last = run.checkpoints / "last.txt"
for step in range(int(last.read_text()) if last.exists() else 0, steps):
    with open(run.folder / "trace.txt", "a") as trace: trace.write(f"{step}\\n")
    time.sleep(pause_s)
    last.write_text(str(step + 1))"""
PLAIN_FINISH = 'run.finish({"sum": steps * 10 + seed})'
QUIET = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="process groups of Linux")


def notebook(folder: Path, *sources: str) -> Path:
    cell = lambda i, source, tags: {"cell_type": "code", "metadata": {"tags": tags}, "source": source, "id": f"c{i}",
                                    "outputs": [], "execution_count": None}
    cells = [cell(0, PARAMETERS, ["parameters", "distributed"]),
             *(cell(i, source, []) for i, source in enumerate(sources or (TRAIN, FINISH), 1))]
    folder.mkdir(exist_ok=True)
    (folder / "toy.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return folder / "toy.ipynb"


class Command:
    """A command of kilonb in a session of its own, with everything that it starts."""

    def __init__(self, *arguments: str, outputs: Path | None = None):
        self.environment = {**os.environ, **QUIET, **({"KILONB_OUTPUTS": str(outputs)} if outputs else {})}
        self.process = subprocess.Popen([*KILONB, *map(str, arguments)], stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, text=True, env=self.environment,
                                        start_new_session=True)
        self.family = {}

    def look(self) -> list[psutil.Process]:
        """All processes that it has started so far and that still run."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.family.update({each.pid: each for each in psutil.Process(self.process.pid).children(recursive=True)})
        return [each for each in self.family.values() if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]

    def wait_until(self, condition, seconds: float = 100.0):
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline, "it has not come so far"
            assert self.process.poll() is None, self.process.communicate()[0]
            self.look()
            time.sleep(0.05)
        return found

    def send(self, number: int, group: bool = False) -> float:
        """Send a signal to the process, or as a terminal does to its group; returns the time."""
        self.look()
        (os.killpg if group else os.kill)(self.process.pid, number)
        return time.monotonic()

    def end(self, seconds: float = 60.0) -> tuple[int, str]:
        """Wait for its end; the exit code and what it printed. Nothing that it started may remain."""
        output = self.process.communicate(timeout=seconds)[0]
        deadline = time.monotonic() + 5.0
        while self.look() and time.monotonic() < deadline: time.sleep(0.05)
        assert not self.look(), [each.cmdline() for each in self.look()]
        assert "Traceback" not in output, output
        return self.process.returncode, output


def patience(seconds: float) -> float:
    """Seconds allowed for what takes `seconds` on a quiet machine: more with the load."""
    return seconds * max(2.0, 2.0 * os.getloadavg()[0] / (os.cpu_count() or 1))


def steps_begun(folder: Path) -> int:
    """How many steps a run has begun, in all its parts."""
    try: return (folder / "trace.txt").read_text().count("\n")
    except OSError: return 0


@pytest.mark.slow
def test_signals_stop_a_run_after_its_step_and_it_continues_to_the_same_numbers(tmp_path):
    """A terminal sends SIGINT and SIGHUP to its whole process group, `kill` sends a signal to the process."""
    from kilonb.training.checkpoints import final_path, latest_path, read_checkpoint

    whole = Command("run", notebook(tmp_path), "--out", tmp_path / "whole")
    folder, done = tmp_path / "run", 0
    arguments = ["run", notebook(tmp_path), "-p", "pause_s=0.3", "--out", folder]
    for number, group in ((signal.SIGHUP, True), (signal.SIGINT, False)):
        command = Command(*arguments, *(["--resume"] if done else []))
        begun = steps_begun(folder)
        command.wait_until(lambda begun=begun: steps_begun(folder) >= begun + 1)
        sent = command.send(number, group)
        code, output = command.end()
        assert time.monotonic() - sent < patience(3.0), "a step takes 0.3 s"
        step = read_checkpoint(latest_path(folder))["step"]
        assert code == 128 + number and read_run(folder).status == "interrupted" and done < step < 8, output
        assert steps_begun(folder) == step, "the step was finished, and none was repeated"
        done = step
    assert Command("run", notebook(tmp_path), "--out", folder, "--resume", "-p", "pause_s=0.3").end()[0] == 0
    assert whole.end()[0] == 0 and read_checkpoint(final_path(folder))["step"] == 8
    assert read_run(folder).results["sum"] == read_run(tmp_path / "whole").results["sum"]


@pytest.mark.parametrize(("number", "group"), [(signal.SIGHUP, True)])
def test_a_signal_stops_a_run_in_the_middle_of_a_cell(tmp_path, number, group):
    command = Command("run", notebook(tmp_path, PLAIN, PLAIN_FINISH), "-p", "pause_s=0.3", "-p", "steps=1000", "--out",
                      tmp_path / "run")
    command.wait_until(lambda: steps_begun(tmp_path / "run") >= 2)
    command.send(number, group)
    code, output = command.end()
    assert code == 128 + number and read_run(tmp_path / "run").status == "interrupted", output
    assert int((tmp_path / "run/checkpoints/last.txt").read_text()) >= steps_begun(tmp_path / "run") - 1


def test_a_signal_while_a_run_starts_ends_it_at_once(tmp_path):
    command = Command("run", notebook(tmp_path, PLAIN), "-p", "pause_s=5", "--out", tmp_path / "run")
    command.wait_until(lambda: (tmp_path / "run/status.json").exists())
    time.sleep(0.4)
    command.send(signal.SIGTERM)
    code, output = command.end(30)
    assert code == 128 + signal.SIGTERM and read_run(tmp_path / "run").status == "interrupted", output


@pytest.mark.parametrize(("source", "shown"), [
    ("import time\nwhile True:\n    try: time.sleep(60)\n    except KeyboardInterrupt: pass", False),
    (PLAIN.partition("last =")[0] + "import importlib.resources\nexec(compile('time.sleep(60)', '/' + 'x' * 99, "
     "'exec'))", True)])
def test_a_signal_during_imports_ends_a_run_at_once(tmp_path, source, shown):
    """A cell that takes no notice of it before the run is opened is killed after 1 s; after that the interrupt's
    traceback is short, because IPython needs many seconds for one of torch's."""
    began = "import os\nfrom pathlib import Path\nPath(run_dir, 'began').touch()\n"
    command = Command("run", notebook(tmp_path, began + source), "--out", tmp_path / "run")
    command.wait_until(lambda: (tmp_path / "run/began").exists())
    if shown: command.wait_until(lambda: read_run(tmp_path / "run").status == "running")
    time.sleep(0.3)
    sent = command.send(signal.SIGINT, group=True)
    code, output = command.end(30)
    assert time.monotonic() - sent < patience(3.0)
    assert code == 130 and read_run(tmp_path / "run").status == "interrupted", output
    executed = (tmp_path / "run/notebook.ipynb").read_text()
    assert not shown or ("KeyboardInterrupt" in executed and "stack_data" not in executed
                         and "Traceback (most recent call last)" in executed)


@pytest.mark.slow
def test_a_run_goes_on_under_nohup(tmp_path):
    file = notebook(tmp_path, PLAIN, PLAIN_FINISH)
    started = subprocess.Popen(["nohup", *KILONB, "run", str(file), "-p", "pause_s=0.1", "--out",
                                str(tmp_path / "run")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env={**os.environ, **QUIET}, start_new_session=True)
    deadline = time.monotonic() + 100
    while not steps_begun(tmp_path / "run"):
        assert time.monotonic() < deadline and started.poll() is None
        time.sleep(0.05)
    os.killpg(started.pid, signal.SIGHUP)
    assert started.wait(100) == 0 and read_run(tmp_path / "run").status == "finished"


def test_a_run_goes_on_when_its_terminal_is_gone(tmp_path):
    """Standard output and error are a pipe without a reader from the first lines on."""
    file = notebook(tmp_path, PLAIN, 'import sys\nprint("seen by nobody", flush=True)\nprint("lost", file=sys.stderr)',
                    PLAIN_FINISH)
    reading, writing = os.pipe()
    started = subprocess.Popen([*KILONB, "run", str(file), "-p", "pause_s=0.02", "--out", str(tmp_path / "run")],
                               stdout=writing, stderr=writing, env={**os.environ, **QUIET}, start_new_session=True)
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    started.wait(100)
    assert read_run(tmp_path / "run").status == "finished"
    assert "seen by nobody" in (tmp_path / "run/log.txt").read_text()


@pytest.mark.parametrize(("number", "group"), [(signal.SIGINT, True)])
def test_a_signal_stops_all_ranks_of_a_run_after_their_step(tmp_path, number, group):
    from kilonb.training.checkpoints import latest_path, read_checkpoint

    command = Command("run", notebook(tmp_path), "-p", "pause_s=0.4", "--out", tmp_path / "run", "--processes", "2")
    command.wait_until(lambda: steps_begun(tmp_path / "run") >= 2)
    command.send(number, group)
    code, output = command.end()
    record = read_run(tmp_path / "run")
    step = read_checkpoint(latest_path(record.folder))["step"]
    assert code == 128 + number and record.status == "interrupted" and 2 <= step == steps_begun(record.folder), output


def test_a_second_signal_kills_the_ranks(tmp_path):
    deaf = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n" + PLAIN
    command = Command("run", notebook(tmp_path, deaf), "-p", "pause_s=30", "--out", tmp_path / "run", "--processes",
                      "2")
    command.wait_until(lambda: steps_begun(tmp_path / "run") and steps_begun(tmp_path / "run/ranks/1"))
    command.send(signal.SIGINT)
    time.sleep(0.5)
    assert command.process.poll() is None
    command.send(signal.SIGINT)
    code, output = command.end(25)
    assert code == 130 and read_run(tmp_path / "run").status == "interrupted", output


def test_ranks_stop_when_their_launcher_is_killed(tmp_path):
    command = Command("run", notebook(tmp_path, PLAIN), "-p", "pause_s=0.3", "-p", "steps=1000", "--out",
                      tmp_path / "run", "--processes", "2")
    command.wait_until(lambda: steps_begun(tmp_path / "run") and steps_begun(tmp_path / "run/ranks/1"))
    command.process.kill()
    command.process.communicate()
    deadline = time.monotonic() + 40
    while command.look() and time.monotonic() < deadline: time.sleep(0.1)
    assert not command.look() and read_run(tmp_path / "run").status == "interrupted"


def sweep_file(folder: Path, text: str) -> Path:
    notebook(folder, PLAIN, PLAIN_FINISH)
    (folder / "study.yaml").write_text("experiment: toy.ipynb\n" + text)
    return folder / "study.yaml"


def sweep_status(folder: Path) -> dict:
    try: return json.loads((folder / "outputs/sweeps/study/status.json").read_text())
    except OSError: return {"status": "", "runs": [], "counts": {"running": 0}}


def folders(folder: Path) -> list[Path]:
    return sorted((folder / "outputs/sweeps/study").glob("0*"))


@pytest.mark.parametrize("signals", [[(signal.SIGHUP, True)], pytest.param([(signal.SIGTERM, False)],
                                                                          marks=pytest.mark.slow)])
def test_a_signal_stops_a_sweep_and_its_runs_and_it_continues(tmp_path, signals):
    """Ctrl-C of a larger sweep is in test_sweeps."""
    file = sweep_file(tmp_path, "seeds: 3\nparameters: {pause_s: 0.25}\n")
    for number, group in signals:
        begun = sum(map(steps_begun, folders(tmp_path)))
        command = Command("sweep", file, "--workers", "2", outputs=tmp_path / "outputs")
        command.wait_until(lambda begun=begun: sum(map(steps_begun, folders(tmp_path))) >= begun + 4)
        command.send(number, group)
        code, output = command.end()
        status = sweep_status(tmp_path)
        assert code == 130 and status["status"] == "interrupted" and not status["trouble"], output
        assert status["counts"]["interrupted"] == 2 and status["counts"]["waiting"] == 1
        for path in folders(tmp_path): assert read_run(path).status == "interrupted" and steps_begun(path) < 8
        assert not (tmp_path / "outputs/sweeps/study/.keys").exists()
    assert Command("sweep", file, "--workers", "2", outputs=tmp_path / "outputs").end(90)[0] == 0
    runs = folders(tmp_path)
    assert [read_run(path).results["sum"] for path in runs] == [80, 81, 82]
    assert all(steps_begun(path) <= 8 + len(signals) for path in runs), "a broken step is repeated, and no other"


def test_a_second_signal_ends_a_sweep_at_once_and_keeps_the_last_checkpoint(tmp_path):
    """The runs are in a step that takes no notice of the first."""
    file = sweep_file(tmp_path, "seeds: 2\nparameters: {pause_s: 60.0}\n")
    notebook(tmp_path, "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n" + PLAIN, PLAIN_FINISH)
    command = Command("sweep", file, "--workers", "2", outputs=tmp_path / "outputs")
    command.wait_until(lambda: len(list((tmp_path / "outputs/sweeps/study").glob("0*/trace.txt"))) == 2)
    command.send(signal.SIGINT, group=True)
    time.sleep(1.0)
    assert command.process.poll() is None and not any(read_run(path).status == "interrupted"
                                                      for path in folders(tmp_path))
    command.send(signal.SIGINT, group=True)
    code, output = command.end(30)
    assert code == 130 and sweep_status(tmp_path)["status"] == "interrupted", output
    assert all(read_run(path).status == "interrupted" for path in folders(tmp_path))


def test_a_worker_that_is_killed_while_it_starts_does_not_end_the_sweep(tmp_path):
    file = sweep_file(tmp_path, "seeds: 2\nparameters: {pause_s: 0.01}\n")
    command = Command("sweep", file, "--workers", "2", outputs=tmp_path / "outputs")

    def workers() -> list[psutil.Process]:
        found = []
        for each in command.look():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if "spawn_main" in " ".join(each.cmdline()): found.append(each)
        return found

    killed = command.wait_until(workers)[0]
    with contextlib.suppress(psutil.Error): killed.kill()
    command.wait_until(lambda: [each for each in workers() if each != killed])
    later = next(each for each in workers() if each != killed)
    time.sleep(0.5)
    with contextlib.suppress(psutil.Error): later.kill()
    code, output = command.end(150)
    assert code == 0 and sweep_status(tmp_path)["counts"]["finished"] == 2, output


def test_a_failure_to_stop_a_worker_is_said(tmp_path):
    from kilonb.batch.scheduling import SweepRunner, _ask_workers
    from kilonb.batch.sweeps import plan_sweep

    class Client:
        def run(self, function, *arguments, **named):
            assert named.get("on_error") != "ignore" and named.get("wait", True)
            raise AssertionError("Combination not supported")

    runner = SweepRunner(plan_sweep(sweep_file(tmp_path, "seeds: 2\n"), tmp_path / "outputs"))
    _ask_workers(runner, Client())
    runner.asking.join()
    assert "Cannot stop the runs" in runner.trouble and "Combination not supported" in runner.trouble
