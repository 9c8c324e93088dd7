"""A sweep over conditions of world models of Pin Pad: one crashes while it runs, one is killed; the rest is done."""
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers import KILONB

from kilonb.batch.sweeps import combinations, read_sweep_file
from kilonb.core.errors import KiloError
from kilonb.reports.report import write_report
from kilonb.runs.notebooks import find_notebook, read_notebook
from kilonb.runs.records import read_run

SWEEPS = Path(__file__).resolve().parent.parent / "nbs" / "sweeps"
CONDITIONS = ("rssm", "free", "forced", "rated")
PARAMETERS = ('condition: str = "rssm"\nsequence: int = 12\nsteps: int = 6\npause_s: float = 0.0\nseed: int = 0\n'
              'device: str = "cpu"\nrun_dir: str = ""\nresume: bool = False')
# every condition trains a tiny world model on recorded episodes; a run that is killed goes on from its checkpoint
TRAIN = """import os
import time

import numpy as np
import torch

from kilonb.dream.episodes import collect
from kilonb.dream.replay import Replay
from kilonb.dream.world_model import WorldModel, WorldModelConfig, world_model_loss
from kilonb.runs.gates import Gate
from kilonb.training.loop import LoopConfig, train
from kilonb.training.session import open_session

session = open_session("toy")
replay = Replay(session.folder / "episodes")
if not session.resumed:
    for episode in collect("three", "scripted", 2, 40, seed=seed, noise=.2): replay.add(episode)
torch.manual_seed(seed)
model = WorldModel(WorldModelConfig("tiny", precision="float32"))

def step_function(step, generator):
    time.sleep(pause_s)
    with open(session.folder / "trace.txt", "a") as trace: trace.write(f"{step} {os.getpid()}\\n")
    loss, terms, _ = world_model_loss(model, replay.sample(2, sequence, np.random.default_rng(step)))
    return {"loss": loss, **terms}

result = train(step_function, torch.optim.Adam(model.parameters()),
               LoopConfig(steps, 1e-3, 1, log_every_steps=2, checkpoint_every_steps=4, seed=seed), model=model,
               folder=session.folder, resume=session.resumed, settings=session.fixed_parameters())
session.finish({"loss": result.records[-1]["loss"], "steps": result.steps, "resumed_from": result.resumed_from or 0},
               [Gate("loss", at_most=1e6)])"""
LONG = 40


@pytest.fixture(autouse=True)
def no_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("KILONB_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("KILONB_DATA", raising=False)


@pytest.fixture
def sweep_file(tmp_path) -> Path:
    cells = [{"cell_type": "code", "metadata": {"tags": ["parameters"] if i == 0 else []}, "source": source,
              "id": f"c{i}", "outputs": [], "execution_count": None} for i, source in enumerate((PARAMETERS, TRAIN))]
    (tmp_path / "toy.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4,
                                                    "nbformat_minor": 5}))
    (tmp_path / "conditions.yaml").write_text(
        "experiment: toy.ipynb\nretries: 0\nruns:\n"
        f"- {{condition: rated, steps: {LONG}, pause_s: 0.1}}\n- {{condition: forced, sequence: 5000}}\n"
        "- {condition: rssm}\n- {condition: free}\n")
    return tmp_path / "conditions.yaml"


def status_of(folder: Path) -> dict:
    try: return json.loads((folder / "status.json").read_text())
    except FileNotFoundError: return {"runs": []}


def runs_by_condition(folder: Path) -> dict[str, dict]:
    return {run["varied"]["condition"]: run for run in status_of(folder)["runs"]}


def kill_during_training(folder: Path, condition: str, process: subprocess.Popen) -> str:
    """Send SIGKILL to the run of a condition once it has taken ten steps; returns the name of its folder."""
    deadline = time.monotonic() + 120
    while True:
        run = runs_by_condition(folder).get(condition)
        trace = folder / run["name"] / "trace.txt" if run else None
        if trace and trace.exists() and trace.read_text().count("\n") >= 10: break
        assert time.monotonic() < deadline and process.poll() is None, status_of(folder)
        time.sleep(.05)
    token = next(path for path in (folder / ".attempts").iterdir() if path.name.startswith(run["name"]))
    os.kill(json.loads(token.read_text())["pid"], signal.SIGKILL)
    return run["name"]


@pytest.mark.incident(12)
def test_a_crashed_and_a_killed_condition_cost_themselves_only_and_the_killed_one_goes_on(sweep_file, tmp_path):
    folder, command = tmp_path / "outputs/sweeps/conditions", [*KILONB, "sweep", str(sweep_file), "--workers", "2"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             start_new_session=True)
    killed = kill_during_training(folder, "rated", first)
    out, _ = first.communicate(timeout=120)
    assert first.returncode == 1 and "Traceback" not in out, out
    runs = runs_by_condition(folder)
    assert {name: run["status"] for name, run in runs.items()} == {"rated": "failed", "forced": "failed",
                                                                  "rssm": "finished", "free": "finished"}
    assert "fewer than a sequence of 5000" in runs["forced"]["error"]
    assert status_of(folder)["counts"]["finished"] == 2 and status_of(folder)["counts"]["failed"] == 2
    before = {name: (folder / runs[name]["name"] / "results.json").stat().st_mtime_ns for name in ("rssm", "free")}
    report = write_report(folder).read_text(encoding="utf-8")
    assert "fewer than a sequence of 5000" in report and all(f">{name}<" in report or name in report
                                                             for name in CONDITIONS)

    second = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert second.returncode == 1 and "Traceback" not in second.stdout + second.stderr, second.stdout + second.stderr
    runs, counts = runs_by_condition(folder), status_of(folder)["counts"]
    assert runs["forced"]["status"] == "failed" and counts["failed"] == 1, "a bad setting stays one"
    assert (counts["finished"], counts["skipped"]) == (1, 2) and runs["rated"]["status"] == "finished", counts
    assert {name: (folder / runs[name]["name"] / "results.json").stat().st_mtime_ns for name in before} == before
    results = read_run(folder / killed).results
    steps = [tuple(map(int, line.split())) for line in (folder / killed / "trace.txt").read_text().splitlines()]
    assert runs["rated"]["name"] == killed and results["steps"] == LONG and results["resumed_from"] >= 8
    assert {step for step, _ in steps} == set(range(LONG)) and len({pid for _, pid in steps}) == 2
    assert len(steps) - LONG <= 6, "only the steps since the last checkpoint were repeated"
    report = write_report(folder).read_text(encoding="utf-8")
    assert "fewer than a sequence of 5000" in report and str(results["loss"])[:4] in report


def test_the_sweep_of_the_repository_has_four_conditions_and_three_seeds():
    file = read_sweep_file(SWEEPS / "pinpad_vta.yaml")
    planned = combinations(file)
    assert len(planned) == 12 and {run["condition"] for run in planned} == set(CONDITIONS)
    assert {run["seed"] for run in planned} == {0, 1, 2} and file.parameters["data"] == "pinpad_three"
    try: notebook = read_notebook(find_notebook(file.experiment))
    except KiloError: pytest.skip(f"there is no experiment {file.experiment} here")
    assert {"condition", "seed", "data", "run_dir", "resume"} <= set(notebook.parameters)
