"""Loggers: chosen by command, environment or script; none is told a value twice, none ends a run."""
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import KILONB
from ranks import Ranks

from kilonb.cli.main import main
from kilonb.core.errors import KiloError
from kilonb.runs.records import read_run
from kilonb.training.loggers import Logger, loggers_of, read_scalar_table, start_loggers
from kilonb.training.scalars import ScalarLog
from kilonb.training.session import open_session

TRAIN = """import time, torch
from kilonb.training.loop import LoopConfig, train
from kilonb.training.session import open_session
session = open_session("line")
model = torch.nn.Linear(3, 1)
def loss(step, generator):
    time.sleep(pause_s)
    return {"loss": model(torch.rand(3, generator=generator)).square().sum()}
config = LoopConfig(steps, warmup_steps=0, log_every_steps=2, checkpoint_every_seconds=None, checkpoint_every_steps=10)
optimizer = torch.optim.Adam(model.parameters(), 0.01)
train(loss, optimizer, config, model=model, folder=session.folder, resume=session.resumed, quiet=True)
from PIL import Image
session.run.save_figure(Image.new("RGB", (16, 12), "teal"), "view")
session.finish({"weight": float(model.weight.detach().square().sum())}, [])"""


@pytest.fixture
def notebook(tmp_path, monkeypatch) -> str:
    monkeypatch.setenv("KILONB_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.delenv("KILONB_LOGGERS", raising=False)
    parameters = ('steps: int = 20\npause_s: float = 0.0\nseed: int = 0\nrun_dir: str = ""\nresume: bool = False\n'
                  'device: str = "cpu"')
    cells = [{"cell_type": "code", "metadata": {"tags": tags}, "source": text, "id": f"c{i}", "outputs": [],
              "execution_count": None} for i, (text, tags) in enumerate(((parameters, ["parameters"]), (TRAIN, [])))]
    path = tmp_path / "line.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return str(path)


def logged(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Name -> [(step, value)] in a run's metrics.csv."""
    head, *lines = (folder / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(head.split(","), line.split(","))) for line in lines]
    return {name: [(int(row["step"]), float(row[name])) for row in rows] for name in rows[0] if name != "step"}


def event_files(folder: Path) -> list[Path]: return list(folder.glob("events.out.tfevents.*"))


def test_the_command_chooses_loggers_and_each_has_what_metrics_csv_has(notebook, tmp_path, capfd):
    run = tmp_path / "run"
    assert main(["run", notebook, "--out", str(run), "--logger", "csv", "--logger", "tensorboard"]) == 0
    assert read_scalar_table(run / "scalars.csv") == logged(run)
    assert event_files(run) and event_files(run / "tensorboard"), "scalars, and pictures beside them"


def test_an_unknown_logger_is_one_sentence_before_anything_is_written(notebook, tmp_path, capfd):
    assert main(["run", notebook, "--out", str(tmp_path / "run"), "--logger", "cvs"]) == 2
    errors = capfd.readouterr().err
    assert errors.count("\n") == 1 and "csv" in errors and not (tmp_path / "run").exists()


@pytest.mark.skipif(importlib.util.find_spec("trackio") is not None, reason="trackio is installed")
def test_a_missing_package_is_one_sentence_with_the_command_that_installs_it(notebook, tmp_path, capfd):
    assert main(["run", notebook, "--out", str(tmp_path / "run"), "--logger", "trackio"]) == 2
    errors = capfd.readouterr().err
    assert errors.count("\n") == 1 and "pip install trackio" in errors and not (tmp_path / "run").exists()


def test_a_killed_run_that_is_resumed_has_each_step_once(notebook, tmp_path, monkeypatch, capfd):
    run = tmp_path / "run"
    process = subprocess.Popen([*KILONB, "run", notebook, "--out", str(run), "--logger", "csv", "-p", "steps=60", "-p",
                                "pause_s=0.05"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)
    deadline = time.monotonic() + 90

    def steps() -> list[int]:
        """The steps in the logger's table."""
        path = run / "scalars.csv"
        return [step for step, _ in read_scalar_table(path).get("loss", [])] if path.exists() else []
    while not any(step >= 14 for step in steps()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    kernel = json.loads((run / "status.json").read_text())["process"]["pid"]
    for pid in (process.pid, kernel):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    before = steps()
    while Path(f"/proc/{kernel}").exists() and time.monotonic() < deadline: time.sleep(0.05)
    monkeypatch.setenv("KILONB_LOGGERS", "csv")
    assert main(["run", notebook, "--out", str(run), "--resume", "-p", "pause_s=0.0"]) == 0
    assert before[-1] >= 14 and steps() == list(range(2, 61, 2))
    assert read_scalar_table(run / "scalars.csv")["loss"] == logged(run)["loss"], "the same values to the last bit"


class Broken(Logger):
    """Fails with every value."""

    def start(self, folder, parameters): print("started with", parameters["seed"])
    def scalar(self, name, value, step): raise OSError("disk full")


def test_a_logger_that_fails_is_reported_once_and_the_run_goes_on(notebook, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("KILONB_LOGGERS", "test_loggers:Broken,csv")
    assert main(["run", notebook, "--out", str(tmp_path / "run")]) == 0
    out, errors = capfd.readouterr()
    assert "started with 0" in out and errors.count("The logger test_loggers:Broken failed in scalar") == 1
    assert "disk full" in errors and read_run(tmp_path / "run").status == "finished"
    assert read_scalar_table(tmp_path / "run" / "scalars.csv") == logged(tmp_path / "run")
    assert not event_files(tmp_path / "run"), "naming loggers replaces the default"


class Kept(Logger):
    """Keeps what it gets."""

    def __init__(self): self.got = []
    def start(self, folder, parameters): self.got.append(("start", parameters))
    def scalar(self, name, value, step): self.got.append((name, value, step))
    def picture(self, name, image, step): self.got.append((name, image.shape, step))
    def finish(self, results): self.got.append(("finish", results["psnr_db"]))


def test_a_script_gives_a_logger_as_an_object(tmp_path):
    from PIL import Image

    session = open_session("line", {"seed": 3}, outputs=str(tmp_path), devices=["cpu"], loggers=[kept := Kept()])
    with ScalarLog(session.folder / "rays") as log: log.log(5, {"loss": 0.5}, elapsed_s=1.0)
    session.run.save_figure(Image.new("RGB", (8, 4)), "view")
    session.finish({"psnr_db": 30.0}, [])
    assert kept.got == [("start", {"seed": 3}), ("rays/elapsed_s", 1.0, 5), ("rays/loss", 0.5, 5),
                        ("view", (4, 8, 3), 5), ("finish", 30.0)]
    assert loggers_of(session.folder)[0].loggers == {}, "the run is closed"


def log_on_a_rank(world, folder: str) -> tuple[bool, bool]:
    """(whether this rank is the first, whether loggers are open on it) after opening a session on a joined rank."""
    from kilonb.training import session as module

    module.world_from_environment, module.join = lambda **_: world, module.ProcessGroup
    session = open_session("line", {"seed": 1}, outputs=folder, devices=["cpu"], loggers=["csv"])
    return session.first, bool(loggers_of(session.folder)[0].loggers)


def test_only_the_first_of_several_ranks_logs(tmp_path):
    ranks = Ranks(2)
    try: assert ranks.run(log_on_a_rank, 2, str(tmp_path)) == [(True, True), (False, False)]
    finally: ranks.close()


def test_a_reader_finds_whole_rows_while_the_table_grows(tmp_path):
    """Every write is whole lines: a reader at any moment gets a prefix of the values."""
    writer = ("import sys\nfrom pathlib import Path\nfrom kilonb.training.loggers import CSVLogger\n"
              "log = CSVLogger()\nlog.start(Path(sys.argv[1]), {})\n"
              "for step in range(4000): log.scalars({'loss': step / 3, 'psnr_db': step / 7}, step)\n")
    process = subprocess.Popen([sys.executable, "-c", writer, str(tmp_path)])
    readings = 0
    while process.poll() is None:
        if not (tmp_path / "scalars.csv").exists(): continue
        try: rows = read_scalar_table(tmp_path / "scalars.csv").get("loss", [])
        except KiloError: continue                       # the header is not there yet
        readings += 1
        assert rows == [(step, step / 3) for step in range(len(rows))]
    assert process.returncode == 0 and readings
    assert len(read_scalar_table(tmp_path / "scalars.csv")["psnr_db"]) == 4000


TRACKIO = """import socket, sys
from pathlib import Path
connect = socket.socket.connect
def refuse(self, address):
    if self.family != socket.AF_UNIX: print("NETWORK", address, file=sys.stderr); raise OSError("no network")
    return connect(self, address)
socket.socket.connect = socket.socket.connect_ex = refuse
def no_names(*given, **named): print("NETWORK", given, file=sys.stderr); raise OSError("no network")
socket.getaddrinfo = no_names
import numpy as np
from kilonb.training.loggers import finish_loggers, make_loggers, send_scalars, start_loggers
folder = Path(sys.argv[1]) / "line" / "first"
for steps in ((10, 20), (20, 30)):
    run = start_loggers(folder, {"seed": 3, "rate": 0.1}, make_loggers(["trackio"]))
    for step in steps: send_scalars(run, {"loss": 1 / step}, step)
    run.call("trackio", "picture", "view", np.full((8, 8, 3), 90, np.uint8), steps[-1])
    finish_loggers(folder, {"psnr_db": 31.25})
from trackio.sqlite_storage import SQLiteStorage
rows = SQLiteStorage.get_logs("line", "first")
config = SQLiteStorage.get_run_config("line", "first")
print([(row["step"], row["loss"]) for row in rows if "loss" in row], config["seed"], config["rate"],
      sum("view" in row for row in rows))
"""


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio_keeps_a_run_on_this_machine_without_any_connection(tmp_path):
    given = {"TRACKIO_DIR": str(tmp_path / "store"), "TRACKIO_SPACE_ID": "somebody/elsewhere"}
    done = subprocess.run([sys.executable, "-c", TRACKIO, str(tmp_path)], capture_output=True, text=True,
                          env={**os.environ, **given})
    assert done.returncode == 0 and "NETWORK" not in done.stderr, done.stderr
    assert done.stdout.splitlines() == ["[(10, 0.1), (20, 0.05), (30, 0.03333333333333333)] 3 0.1 2"]


def test_loggers_of_a_folder_without_a_run_are_none(tmp_path):
    start_loggers(tmp_path / "run", {}, {})
    assert loggers_of(tmp_path / "runaway")[0].loggers == {}
