"""Sweeps: failed runs, killed workers, Ctrl-C, several hosts, bad files, dotted settings."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import KILONB

from kilonb.cli.main import main
from kilonb.runs.records import read_run

PARAMETERS = ('rate: float = 1.0\nsteps: int = 8\npause_s: float = 0.0\nseed: int = 0\ndata: str = ""\n'
              'run_dir: str = ""\nresume: bool = False')
OPEN = """from kilonb.runs.folders import open_run
import os, time
run = open_run("toy", run_dir, {}, seed=seed, resume=resume)
if rate < 0: raise ValueError(f"the rate {rate} is negative")"""
TRAIN = """last = run.checkpoints / "last.txt"
first = int(last.read_text()) if run.resumed and last.exists() else 0
for step in range(first, steps):
    time.sleep(pause_s)
    with open(run.folder / "trace.txt", "a") as trace: trace.write(f"{step} {os.getpid()}\\n")
    last.write_text(str(step + 1))
    print(f"training {step + 1}/{steps}   {(step + 1) / steps:.0%}  loss {1 / (step + 1):.4g}", flush=True)"""
FINISH = """from kilonb.runs.gates import Gate
run.finish({"sum": rate * sum(range(steps)) + seed}, [Gate("sum", at_least=0.0)])"""
LEARN = """import kilonb
import torch
from kilonb.training.loop import LoopConfig, train
torch.manual_seed(seed)
model = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
def step_function(step, generator):
    x = torch.rand(256, 3, generator=generator)
    return {"loss": (model(x)[:, 0] - x.prod(-1)).square().mean()}
config = LoopConfig(40, rate, 5, log_every_steps=5, seed=seed)
result = train(step_function, torch.optim.Adam(model.parameters()), config, model=model, folder=run.folder, quiet=True)
run.finish({"loss": result.records[-1]["loss"], "weights": sum(float(p.double().sum()) for p in model.parameters())})"""


@pytest.fixture(autouse=True)
def no_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("KILONB_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.delenv("KILONB_DATA", raising=False)


def write_notebook(folder: Path, *sources: str) -> None:
    cells = [{"cell_type": "code", "metadata": {"tags": ["parameters"] if i == 0 else []}, "source": source,
              "id": f"c{i}", "outputs": [], "execution_count": None} for i, source in enumerate(sources)]
    (folder / "toy.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))


def write_sweep(folder: Path, text: str) -> Path:
    (folder / "study.yaml").write_text("experiment: toy.ipynb\n" + text)
    return folder / "study.yaml"


def status_of(folder: Path) -> dict:
    try: return json.loads((folder / "outputs/sweeps/study/status.json").read_text())
    except FileNotFoundError:
        return {"status": "not begun", "runs": [], "counts": {"finished": 0, "failed": 0, "running": 0}}


def wait_for(folder: Path, condition, process: subprocess.Popen, seconds: float = 240.0) -> dict:
    deadline = time.monotonic() + seconds
    while not condition(status := status_of(folder)):
        assert time.monotonic() < deadline and process.poll() is None, (status, process.poll())
        time.sleep(0.1)
    return status


def trace(folder: Path) -> list[tuple[int, int]]:
    return [tuple(map(int, line.split())) for line in (folder / "trace.txt").read_text().splitlines()]


@pytest.mark.incident(12)
def test_a_failing_run_a_killed_worker_and_ctrl_c_leave_the_sweep_resumable(tmp_path):
    """12 runs: 10 finish, the 2 of the impossible condition fail and are named, none runs twice, each has its own
    folder. Those of the rates 2 and 5 last long enough to be killed and interrupted between two steps."""
    write_notebook(tmp_path, PARAMETERS, OPEN, TRAIN, FINISH)
    runs = ", ".join(f"{{rate: {rate}, pause_s: {0.25 if rate in (2, 5) else 0}}}" for rate in (1, 2, 3, -1, 5, 6))
    file = write_sweep(tmp_path, f"runs: [{runs}]\nseeds: 2\n")
    sweep = tmp_path / "outputs/sweeps/study"
    command = [*KILONB, "sweep", str(file), "--workers", "2"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    def in_the_middle(status, rate=2):
        return [run["name"] for run in status["runs"] if run["varied"]["rate"] == rate and run["status"] == "running"
                and ((run["progress"] or {}).get("stage") or {}).get("step", 0) in (1, 2, 3)]
    victim = in_the_middle(wait_for(tmp_path, in_the_middle, first))[0]
    token = next(path for path in (sweep / ".attempts").iterdir() if path.name.startswith(victim))
    os.kill(json.loads(token.read_text())["pid"], signal.SIGKILL)
    wait_for(tmp_path,
             lambda status: any(run["name"] == victim and run["status"] == "finished" for run in status["runs"]), first)
    status = wait_for(tmp_path, lambda status: in_the_middle(status, 5), first)
    assert next(run["attempt"] for run in status["runs"] if run["name"] == victim) == 2
    os.killpg(first.pid, signal.SIGINT)
    out, errors = first.communicate(timeout=120)
    assert first.returncode == 130 and "Traceback" not in out + errors, out + errors
    status = status_of(tmp_path)
    assert status["status"] == "interrupted" and status["counts"]["waiting"] > 0
    done = {run["name"]: (sweep / run["name"] / "results.json").stat().st_mtime_ns for run in status["runs"]
            if run["status"] == "finished"}
    begun = [run["name"] for run in status["runs"] if run["status"] == "interrupted"]
    assert all(read_run(sweep / name).status == "interrupted" for name in begun)

    second = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert second.returncode == 1 and "Traceback" not in second.stdout + second.stderr, second.stdout + second.stderr
    status = status_of(tmp_path)
    counts = status["counts"]
    assert counts["finished"] + counts["skipped"] == 10 and counts["skipped"] == len(done) and counts["failed"] == 2, (
        counts
    )
    assert all(run["varied"]["rate"] == -1 and "the rate -1.0 is negative" in run["error"] for run in status["runs"]
               if run["status"] == "failed")
    assert {name: (sweep / name / "results.json").stat().st_mtime_ns
            for name in done} == done, "finished runs are not changed"
    folders = [path for path in sweep.iterdir() if path.is_dir() and not path.name.startswith(".")
               and path.name != "slurm"]
    assert len(folders) == 12, "one folder for each run"
    for run in status["runs"]:
        if run["status"] == "failed": continue
        steps, record = trace(sweep / run["name"]), read_run(sweep / run["name"])
        assert record.parameters["rate"] == run["varied"]["rate"] and record.parameters["seed"] == run["varied"]["seed"]
        assert record.results["sum"] == run["varied"]["rate"] * 28 + run["varied"]["seed"]
        repeated = len(steps) - 8
        assert sorted({step for step, _ in steps}) == list(range(8)) and repeated <= (
            1 if run["name"] == victim or run["name"] in begun else 0
        )
        assert len({pid for _, pid in steps}) <= (2 if run["name"] == victim or run["name"] in begun
                                                  else 1), "no run was executed twice"
    assert "rate -1" in second.stdout or "-1" in second.stdout, "the failed condition is named"


@pytest.fixture
def cluster(tmp_path):
    """A scheduler and two workers as separate processes, on two loopback addresses."""
    environment = {**os.environ, "DASK_DISTRIBUTED__WORKER__DAEMON": "False"}
    starter = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0",
               "--no-dashboard"]
    processes = [subprocess.Popen([*starter, "--scheduler-file", str(tmp_path / "scheduler.json")],
                                  stderr=subprocess.DEVNULL, env=environment)]
    deadline = time.monotonic() + 60
    file = tmp_path / "scheduler.json"
    while not (file.exists() and file.read_text().rstrip().endswith("}")):       # dask makes it first, then fills it
        assert time.monotonic() < deadline and processes[0].poll() is None
        time.sleep(0.1)
    address = json.loads(file.read_text())["address"]
    for host in ("127.0.0.1", "127.0.0.2"):
        worker = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--host", host, "--nthreads", "1",
                  "--no-dashboard", "--memory-limit", "0"]
        processes.append(subprocess.Popen([*worker, "--local-directory", str(tmp_path / "scratch")],
                                          stderr=subprocess.DEVNULL, env=environment))
    yield address
    for process in processes: process.terminate()
    for process in processes:
        try: process.wait(20)
        except subprocess.TimeoutExpired: process.kill()


def test_two_hosts_and_one_machine_give_the_same_bits(tmp_path, cluster, monkeypatch):
    write_notebook(tmp_path, PARAMETERS, OPEN, LEARN)
    file = write_sweep(tmp_path, "grid: {rate: [0.01, 0.02, 0.05]}\n")
    monkeypatch.setenv("KILONB_OUTPUTS", str(tmp_path / "there"))
    assert main(["sweep", str(file), "--scheduler", cluster]) == 0
    status = json.loads((tmp_path / "there/sweeps/study/status.json").read_text())
    assert {run["worker"].split(":")[1] for run in status["runs"]} == {"//127.0.0.1", "//127.0.0.2"}, (
        "both hosts executed runs"
    )
    monkeypatch.setenv("KILONB_OUTPUTS", str(tmp_path / "here"))
    assert main(["sweep", str(file), "--workers", "1"]) == 0
    def numbers(place):
        found = {}
        for path in sorted((tmp_path / place / "sweeps/study").glob("0*")):
            record = read_run(path)
            found[path.name] = (record.results["loss"], record.results["weights"],
                                (path / "metrics.csv").read_text().count("\n"))
        return found
    assert len(numbers("here")) == 3 and numbers("here") == numbers("there")


def test_a_sweep_runs_through_slurm(tmp_path, monkeypatch):
    """SLURM is replaced by an sbatch that starts the job's script on this machine."""
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "sbatch").write_text(
        '#!/bin/sh\ncp "$1" "$JOBS/job.sh"\nsetsid sh "$JOBS/job.sh" >"$JOBS/job.log" 2>&1 </dev/null &\n'
        'echo $! >"$JOBS/pid"\necho "Submitted batch job 7"\n'
    )
    (commands / "scancel").write_text('#!/bin/sh\nkill -- "-$(cat "$JOBS/pid")" 2>/dev/null\nexit 0\n')
    for command in commands.iterdir(): command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("JOBS", str(tmp_path))
    write_notebook(tmp_path, PARAMETERS, OPEN, FINISH)
    slurm = "slurm: {jobs: 1, walltime: '00:10:00', queue: short, memory_gb: 2, setup: [export FROM_SETUP=1]}"
    file = write_sweep(tmp_path, f"seeds: 2\nresources: {{cores: 1}}\n{slurm}\n")
    assert main(["sweep", str(file), "--slurm"]) == 0
    script = (tmp_path / "job.sh").read_text()
    assert "#SBATCH -t 00:10:00" in script and "#SBATCH -p short" in script and "export FROM_SETUP=1" in script
    status = status_of(tmp_path)
    assert status["counts"]["finished"] == 2 and [run["results"]["sum"] for run in status["runs"]] == [28, 29]


@pytest.mark.parametrize("text, message",
                         [("grid: {rat: [1]}", "Unknown parameter of toy 'rat': did you mean 'rate'?"),
                          ("grid: {rate: []}", "The grid of 'rate' is empty"), ("grid: {}", "Nothing varies"),
                          ("seed: 1", "did you mean 'seeds'?"),
                          ("grid: {rate: [1, 1.0]}", "Runs 1 and 2 of the sweep are the same"),
                          ("grid: {rate: [fast]}", "Parameter 'rate'"), ("grid: [", "is not YAML"),
                          ("grid: {data: ['opvv:x']}", "Unknown kind of data 'opvv'"),
                          ("grid: {slurm.jobs: [1]}", "Unknown parameter of toy 'slurm.jobs'"),
                          ("seeds: 1\nresources: {cores: 4000}", "needs 4000 cores")])
def test_a_bad_sweep_file_is_one_sentence_and_starts_nothing(capfd, tmp_path, text, message):
    write_notebook(tmp_path, PARAMETERS, OPEN, FINISH)
    code = main(["sweep", str(write_sweep(tmp_path, text))])
    errors = capfd.readouterr().err
    assert code == 2 and message in errors and errors.count("\n") == 1, errors
    assert not [path for path in (tmp_path / "outputs").rglob("status.json")]


def test_a_missing_file_cluster_or_scheduler_is_named(capfd, tmp_path):
    write_notebook(tmp_path, PARAMETERS, OPEN, FINISH)
    file = write_sweep(tmp_path, "seeds: 1")
    for arguments, message in (([str(tmp_path / "none.yaml")], "Cannot read the sweep file"),
                            ([str(file), "--slurm"], "The command sbatch was not found"),
                            ([str(file), "--scheduler", "tcp://127.0.0.1:9"], "No scheduler answers at"),
                            ([str(file), "--scheduler", "nonsense://x"], "No scheduler answers at")):
        capfd.readouterr()
        code = main(["sweep", *arguments])
        errors = capfd.readouterr().err
        assert code == 2 and message in errors and errors.count("\n") == 1, errors
    (tmp_path / "toy.ipynb").unlink()
    assert main(["sweep", str(file)]) == 2 and "There is no notebook" in capfd.readouterr().err


def test_a_damaged_result_is_named_and_its_run_is_repeated_in_a_new_folder(capfd, tmp_path):
    write_notebook(tmp_path, PARAMETERS, OPEN, FINISH)
    file = write_sweep(tmp_path, "seeds: 2")
    assert main(["sweep", str(file)]) == 0
    sweep = tmp_path / "outputs/sweeps/study"
    damaged, whole = (sweep / run["name"] for run in status_of(tmp_path)["runs"])
    (damaged / "results.json").write_text('{"results": {"sum"')
    before = (whole / "results.json").stat().st_mtime_ns
    assert main(["sweep", str(file)]) == 0
    counts, names = status_of(tmp_path)["counts"], [run["name"] for run in status_of(tmp_path)["runs"]]
    assert counts["skipped"] == 1 and counts["finished"] == 1 and names == [f"{damaged.name}-2", whole.name]
    assert (damaged / "results.json").read_text() == '{"results": {"sum"' and (
        whole / "results.json"
    ).stat().st_mtime_ns == before
    assert main(["sweep", str(file)]) == 0 and status_of(tmp_path)["counts"]["skipped"] == 2


def test_a_sweep_is_run_by_one_process_at_a_time(tmp_path):
    write_notebook(tmp_path, PARAMETERS, OPEN, TRAIN, FINISH)
    file = write_sweep(tmp_path, "parameters: {pause_s: 0.5}\nseeds: 1")
    first = subprocess.Popen([*KILONB, "sweep", str(file)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                             start_new_session=True)
    wait_for(tmp_path, lambda status: status["counts"]["running"] == 1, first)
    second = subprocess.run([*KILONB, "sweep", str(file)], capture_output=True, text=True)
    assert (
        second.returncode == 2 and "is being run by another process" in second.stderr and second.stderr.count("\n") == 1
    )
    assert first.wait(120) == 0 and status_of(tmp_path)["counts"]["finished"] == 1


def test_a_full_disk_fails_the_runs_and_is_named(tmp_path):
    """With a limit on the size of files the error is printed, and no run counts as finished."""
    write_notebook(tmp_path, PARAMETERS, OPEN,
                   "with open(run.folder / 'large.bin', 'wb') as file: file.write(bytes(300_000))", FINISH)
    file = write_sweep(tmp_path, "seeds: 2")
    done = subprocess.run(["bash", "-c", 'ulimit -f 100; exec "$@"', "-", *KILONB, "sweep", str(file)],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    assert "File too large" in done.stdout
    status = status_of(tmp_path)
    assert status["counts"]["failed"] == 2 and not list((tmp_path / "outputs").rglob("results.json"))


def test_dotted_settings_vary_are_typed_and_are_recorded(capfd, tmp_path):
    """A setting is part of a run's digest, of its parameters and of what the plan shows."""
    declared = 'settings: "kilonb.batch.sweeps.Slurm" = {}\nrun_dir: str = ""\nresume: bool = False\nseed: int = 0'
    write_notebook(tmp_path, declared, "from kilonb.batch.sweeps import Slurm\n"
                   "from kilonb.training.session import open_session\nsession = open_session('toy')\n"
                   "slurm = session.configure(Slurm())",
                   "session.finish({'product': slurm.jobs * slurm.memory_gb})")
    file = write_sweep(tmp_path, "grid: {slurm.jobs: [2, 3]}\nparameters: {slurm.memory_gb: 1e1}")
    assert main(["sweep", str(file), "--workers", "2"]) == 0
    runs = status_of(tmp_path)["runs"]
    assert [run["varied"] for run in runs] == [{"slurm.jobs": 2}, {"slurm.jobs": 3}]
    assert [run["results"]["product"] for run in runs] == [20.0, 30.0]
    record = read_run(tmp_path / "outputs" / "sweeps" / file.stem / runs[1]["name"])
    assert record.parameters["slurm.jobs"] == 3 and record.parameters["slurm.memory_gb"] == 10.0
    for text, message in (("grid: {slurm.job: [1]}", "did you mean 'slurm.jobs'"),
                          ("grid: {slurm.jobs: [two]}", "must be int"), ("grid: {settings: [{}]}", "by dotted names")):
        assert main(["sweep", str(write_sweep(tmp_path, text)), "--plan"]) == 2 and message in capfd.readouterr().err
