"""The training loop across its modules: the same numbers after any interruption, complete files after a kill, equal
values in both logs."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from kilonb.core.errors import KiloError
from kilonb.training.averaging import load_weights
from kilonb.training.checkpoints import final_path, latest_path, read_checkpoint, seed_everything
from kilonb.training.guards import AlphaGuard, TrainingStopped
from kilonb.training.loop import LoopConfig, train
from kilonb.runs.scalars import read_scalars

PROBLEM = '''
import random, sys, time
import numpy as np, torch
from torch import nn
from kilonb.training.checkpoints import seed_everything
from kilonb.training.loop import LoopConfig, train

class Problem:
    """Draws from all four generators a step may use: the loop's own, torch's, numpy's, python's."""
    def __init__(self, optimizer="adam", seed=0):
        seed_everything(seed)
        torch.set_num_threads(1)
        self.model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Dropout(0.1), nn.BatchNorm1d(16), nn.Linear(16, 1))
        kinds = {"adam": lambda p: torch.optim.Adam(p, lr=1e-2),
                 "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9)}
        self.optimizer = kinds[optimizer](self.model.parameters())
    def __call__(self, step, generator):
        points = torch.rand(64, 2, generator=generator) * 2 - 1
        shift = random.random() * 0.1 + np.random.rand() * 0.1
        loss = (self.model(points) - (3 * points[:, :1]).sin() - shift).square().mean()
        return {"loss": loss, "shift": shift}
'''
exec(PROBLEM)


@pytest.fixture(autouse=True)
def threads_as_before():
    """The problem runs on one thread, as its matrices are small; other tests get theirs back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run_problem(folder=None, resume=False, stop_at=None, optimizer="adam", seed=0, **settings):
    """Train the problem; `stop_at`: Ctrl-C arrives while that step is computed. Returns (problem, result or None)."""
    problem = Problem(optimizer, seed)  # noqa: F821
    config = LoopConfig(**{"steps": 90, "warmup_steps": 10, "log_every_steps": 7, **settings})

    def step_function(step, generator):
        if step == stop_at: os.kill(os.getpid(), signal.SIGINT)
        return problem(step, generator)

    try:
        return problem, train(step_function, problem.optimizer, config, model=problem.model, folder=folder,
                              resume=resume, quiet=True)
    except KeyboardInterrupt: return problem, None


def without_clock(records):
    return [{name: value for name, value in record.items() if name != "elapsed_s"} for record in records]


def tensorboard_events(folder, name):
    import logging

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


@pytest.mark.parametrize("settings",
                         [{}, {"ema_decay": 0.95}, {"gradient_clip": 0.1, "ema_decay": 0.95},
                          {"optimizer": "sgd", "checkpoint_every_steps": 4}])
@pytest.mark.parametrize("stop_at", [0, 33, 88])
def test_a_resumed_run_ends_in_the_same_bits(tmp_path, settings, stop_at):
    whole, expected = run_problem(tmp_path / "whole", **settings)
    _, stopped = run_problem(tmp_path / "parts", stop_at=stop_at, **settings)
    assert stopped is None and read_checkpoint(latest_path(tmp_path / "parts"))["step"] == stop_at + 1
    parts, result = run_problem(tmp_path / "parts", resume=True, seed=77, **settings)
    for name, value in whole.model.state_dict().items(): assert torch.equal(value, parts.model.state_dict()[name]), name
    assert without_clock(result.records) == without_clock(expected.records) and result.best == expected.best
    if "ema_decay" in settings:
        for name, value in expected.averaged.average.items():
            assert torch.equal(value, result.averaged.average[name]), name
    first, second = read_scalars(tmp_path / "whole"), read_scalars(tmp_path / "parts")
    assert all((first[name] == second[name]).all() for name in first if name != "elapsed_s")


def test_a_run_that_is_stopped_many_times_ends_in_the_same_bits(tmp_path):
    whole, _ = run_problem(tmp_path / "whole", ema_decay=0.9)
    for stop_at in (3, 20, 21, 60): run_problem(tmp_path / "parts", resume=True, stop_at=stop_at, ema_decay=0.9)
    parts, result = run_problem(tmp_path / "parts", resume=True, ema_decay=0.9)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), parts.model.parameters()))
    assert result.finished and result.resumed_from == 61


def test_the_numbers_are_the_same_with_and_without_a_folder(tmp_path):
    """Saving and logging draw no random numbers and change no weights."""
    with_folder, _ = run_problem(tmp_path / "run", checkpoint_every_steps=3)
    without, _ = run_problem()
    assert all(torch.equal(a, b) for a, b in zip(with_folder.model.parameters(), without.model.parameters()))


def test_a_finished_run_resumes_to_itself(tmp_path):
    whole, expected = run_problem(tmp_path / "run")
    again, result = run_problem(tmp_path / "run", resume=True, seed=5)
    assert (
        result.steps == 90
        and result.resumed_from == 90
        and without_clock(result.records) == without_clock(expected.records)
    )
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters()))


def test_time_limit_stops_and_a_longer_one_goes_on(tmp_path):
    _, first = run_problem(tmp_path / "run", time_limit_s=1e-9)
    assert first.steps == 1 and not first.finished and not final_path(tmp_path / "run").exists()
    whole, _ = run_problem()
    parts, result = run_problem(tmp_path / "run", resume=True, time_limit_s=1e9)
    assert result.finished and all(torch.equal(a, b) for a,
                                   b in zip(whole.model.parameters(), parts.model.parameters()))


# ---- real processes, real signals

SCRIPT = PROBLEM + textwrap.dedent('''
    problem = Problem()
    config = LoopConfig(steps=400, warmup_steps=10, log_every_steps=10, ema_decay=0.95, gradient_clip=1.0,
                        checkpoint_every_steps=5)
    def step_function(step, generator):
        time.sleep(float(sys.argv[2]))
        return problem(step, generator)
    train(step_function, problem.optimizer, config, model=problem.model, folder=sys.argv[1], resume=True)
    print("done")
''')


def start(folder, delay):
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder), str(delay)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The final checkpoint of the script's run, executed in this process without a stop."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    run_problem(folder, steps=400, warmup_steps=10, log_every_steps=10, ema_decay=0.95, gradient_clip=1.0,
                checkpoint_every_steps=5)
    return read_checkpoint(final_path(folder))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_process_resumes_to_the_same_bits(tmp_path, unbroken, how):
    """After Ctrl-C and after kill -9 the files are complete, and the resumed run ends with the same bits."""
    process = start(tmp_path / "parts", 0.005)
    deadline = time.monotonic() + 60
    while not latest_path(tmp_path / "parts").exists() and time.monotonic() < deadline: time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(how)
    errors = process.communicate(timeout=60)[1]
    # Python's way to exit on an uncaught KeyboardInterrupt; a shell shows 130
    assert process.returncode == -how
    stopped = read_checkpoint(latest_path(tmp_path / "parts"))["step"]
    assert 0 < stopped < 400
    if how == signal.SIGINT:
        assert "KeyboardInterrupt" in errors
        assert read_scalars(tmp_path / "parts")["step"][-1] == stopped // 10 * 10
        assert not list((tmp_path / "parts").rglob("*.part"))
    process = start(tmp_path / "parts", 0)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and output.endswith("done\n"), errors
    lines = output.splitlines()                                # off a terminal, progress is whole lines
    assert "\r" not in output and lines[-2].startswith("training 400/400  100%  loss") and len(lines) < 20
    parts, whole = read_checkpoint(final_path(tmp_path / "parts")), unbroken
    for group in ("model", "averaged"):
        ours, theirs = (checkpoint[group]["average"] if group == "averaged" else checkpoint[group]
                        for checkpoint in (parts, whole))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert list(read_scalars(tmp_path / "parts")["step"]) == list(range(10, 401, 10))
    assert [step for step, _ in tensorboard_events(tmp_path / "parts", "loss")] == list(range(10, 401, 10))


# ---- damaged and foreign checkpoints

def test_a_damaged_checkpoint_is_one_sentence(tmp_path):
    run_problem(tmp_path / "run", stop_at=30)
    path = latest_path(tmp_path / "run")
    whole = path.read_bytes()
    damaged = [whole[:size] for size in (0, 1, 100, len(whole) // 2, len(whole) - 1)]
    for place in range(500, len(whole), len(whole) // 12):
        damaged.append(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
    refused = []
    for data in damaged:
        path.write_bytes(data)
        try: read_checkpoint(path)
        except KiloError as error:
            refused.append(len(data))
            assert "\n" not in str(error) and str(path) in str(error)
    # every cut; a byte in the zip's padding may turn
    assert len(refused) >= 15 and len([size for size in refused if size < len(whole)]) == 5
    path.write_bytes(whole[: len(whole) // 2])
    before = (tmp_path / "run" / "metrics.csv").read_bytes()
    with pytest.raises(KiloError, match="cut off, damaged"): run_problem(tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == before     # a refused resume leaves the logs alone


def test_a_flipped_byte_in_a_weight_is_detected(tmp_path):
    run_problem(tmp_path / "run", stop_at=30)
    path = latest_path(tmp_path / "run")
    whole = bytearray(path.read_bytes())
    weight = read_checkpoint(path)["model"]["0.weight"].numpy().tobytes()
    whole[bytes(whole).index(weight) + 5] ^= 0x40
    path.write_bytes(whole)
    with pytest.raises(KiloError, match="damaged"): read_checkpoint(path)


@pytest.mark.parametrize("key, change",
                         [("steps", {"steps": 91}), ("ema_decay", {"ema_decay": 0.5}), ("seed", {"seed": 1})])
def test_another_configuration_is_refused_by_its_first_difference(tmp_path, key, change):
    run_problem(tmp_path / "run", stop_at=30)
    problem = Problem()  # noqa: F821
    config = LoopConfig(**{"steps": 90, "warmup_steps": 10, "log_every_steps": 7, **change})
    with pytest.raises(KiloError, match=f"a run with {key} = "):
        train(problem, problem.optimizer, config, model=problem.model, folder=tmp_path / "run", resume=True, quiet=True)


def test_another_model_is_refused(tmp_path):
    run_problem(tmp_path / "run", stop_at=30)
    problem, other = Problem(), nn.Linear(2, 1)  # noqa: F821
    config = LoopConfig(steps=90, warmup_steps=10, log_every_steps=7)
    with pytest.raises(KiloError, match="does not fit this run"):
        train(problem, torch.optim.Adam(other.parameters(), lr=1e-2), config, model=other, folder=tmp_path / "run",
              resume=True, quiet=True)


# ---- incidents (nbs/background.ipynb)

@pytest.mark.incident(1)
def test_incident_1_alpha_collapse_stops_with_the_blank_score(tmp_path):
    problem = Problem()  # noqa: F821

    def fog(step, generator): return {**problem(step, generator), "ray_alpha_foreground": max(0.0, 0.5 - step / 40)}

    guard = AlphaGuard(minimum=0.1, patience=3, warmup_steps=20, blank_db=9.37)
    with pytest.raises(TrainingStopped, match=r"ray alpha collapsed.*background only.*9\.4 dB") as stopped:
        train(fog, problem.optimizer, LoopConfig(steps=500, log_every_steps=10), guards=[guard],
              folder=tmp_path / "run", quiet=True)
    assert isinstance(stopped.value, KiloError) and read_scalars(tmp_path / "run")["step"][-1] == 50


@pytest.mark.incident(1)
def test_incident_1_a_healthy_alpha_is_left_alone():
    problem = Problem()  # noqa: F821

    def rising(step, generator): return {**problem(step, generator), "ray_alpha_foreground": min(0.9, step / 100)}

    result = train(rising, problem.optimizer, LoopConfig(steps=200, log_every_steps=10),
                   guards=[AlphaGuard(warmup_steps=20)], quiet=True)
    assert result.finished


def test_the_alpha_guard_keeps_its_count_over_a_resume(tmp_path):
    def session(resume, stop_at=None):
        problem = Problem()  # noqa: F821

        def fog(step, generator):
            if step == stop_at: os.kill(os.getpid(), signal.SIGINT)
            return {**problem(step, generator), "ray_alpha_foreground": 0.0}

        train(fog, problem.optimizer, LoopConfig(steps=500, log_every_steps=10),
              guards=[AlphaGuard(patience=6, warmup_steps=0)], folder=tmp_path / "run", resume=resume, quiet=True)

    with pytest.raises(KeyboardInterrupt): session(False, stop_at=34)
    with pytest.raises(TrainingStopped, match="at step 60"): session(True)


@pytest.mark.parametrize("what", ["loss", "gradient", "weight"])
def test_a_checkpoint_never_holds_values_that_are_not_finite(tmp_path, what):
    """A NaN loss, a NaN gradient with a finite loss, a weight set to NaN from outside: the last good checkpoint
    stays."""
    problem = Problem()  # noqa: F821

    def step_function(step, generator):
        values = problem(step, generator)
        if step >= 25 and what == "loss": values["loss"] = values["loss"] * math.nan
        if step >= 25 and what == "gradient":
            values["loss"] = values["loss"] + (problem.model[0].weight * 0).sum().sqrt()
        if step >= 25 and what == "weight": problem.model[4].bias.data.fill_(math.nan)
        return values

    with pytest.raises(TrainingStopped, match=r"at step \d+.*good checkpoint is kept"):
        train(step_function, problem.optimizer, LoopConfig(steps=300, checkpoint_every_steps=4, log_every_steps=50),
              model=problem.model, folder=tmp_path / "run", quiet=True)
    kept = read_checkpoint(latest_path(tmp_path / "run"))
    assert kept["step"] == 24 and all(torch.isfinite(value).all() for value in kept["model"].values())


@pytest.mark.incident(3)
def test_incident_3_every_logged_step_is_in_both_logs(tmp_path):
    _, result = run_problem(tmp_path / "run", steps=203, log_every_steps=10)
    steps = [*range(10, 201, 10), 203]
    scalars = read_scalars(tmp_path / "run")
    assert [record["step"] for record in result.records] == list(scalars["step"]) == steps
    for name in set(scalars) - {"step"}:
        events = tensorboard_events(tmp_path / "run", name)
        assert [step for step, _ in events] == steps
        # TensorBoard keeps float32
        assert all(abs(value - exact) <= 1e-6 * abs(exact) for (_, value), exact in zip(events, scalars[name]))


@pytest.mark.incident(4)
def test_incident_4_the_schedule_follows_the_run():
    for steps in (200, 20_000):
        schedule = LoopConfig(steps=steps).schedule()
        assert schedule.factor(steps - 1) == pytest.approx(0.01) and schedule.factor(steps // 2) > 0.4
    with pytest.raises(KiloError, match="6000 steps long and the run 20000"):
        LoopConfig(steps=20_000, schedule_steps=6_000)
    assert LoopConfig(steps=20_000, schedule_steps=6_000, allow_schedule_mismatch=True).schedule().steps == 6_000


@pytest.mark.incident(4)
def test_incident_4_the_logged_rate_is_the_schedules(tmp_path):
    _, result = run_problem(steps=100, log_every_steps=1)
    schedule = LoopConfig(steps=100, warmup_steps=10).schedule()
    assert [record["learning_rate"] for record in result.records] == [pytest.approx(1e-2 * schedule.factor(step))
                                                                      for step in range(100)]


@pytest.mark.incident(6)
def test_incident_6_averaged_weights_are_the_default_and_named(tmp_path):
    problem, result = run_problem(tmp_path / "run", ema_decay=0.95)
    reader = Problem(seed=3).model  # noqa: F821
    assert load_weights(final_path(tmp_path / "run"), reader) == "averaged weights of step 90"
    assert all(torch.equal(parameter, result.averaged.average[name]) for name, parameter in reader.named_parameters())
    assert not torch.equal(reader[0].weight, problem.model[0].weight)
    assert load_weights(final_path(tmp_path / "run"), reader, weights="raw") == "raw weights of step 90"
    assert torch.equal(reader[0].weight, problem.model[0].weight)


@pytest.mark.incident(8)
def test_incident_8_a_run_is_fresh_or_resumed_never_appended(tmp_path):
    run_problem(tmp_path / "run", stop_at=30)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(KiloError, match="already holds a run"): run_problem(tmp_path / "run")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


@pytest.mark.incident(8)
def test_incident_8_rows_after_the_checkpoint_are_dropped(tmp_path):
    """Killed long after its last checkpoint, a run has logged steps that it will compute again."""
    _, _ = run_problem(tmp_path / "run", stop_at=30, log_every_steps=1)
    with (tmp_path / "run" / "metrics.csv").open("a") as file:
        file.write("32,1.0,0.5,0.1,0.01\n33,1.0,0.5,0.1,0.01\n34,1.0,0.")
    run_problem(tmp_path / "run", resume=True, log_every_steps=1)
    assert list(read_scalars(tmp_path / "run")["step"]) == list(range(1, 91))


def test_resuming_before_the_first_checkpoint_starts_from_the_beginning(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").write_text("step,elapsed_s,loss\n20,0.1,9.0\n")
    _, result = run_problem(tmp_path / "run", resume=True)
    assert result.resumed_from is None and read_scalars(tmp_path / "run")["step"][0] == 7 and len(result.records) == 13


# ---- densification: parameters that are replaced under the loop

class Cloud(nn.Module):
    """Points on a line that are split while they learn, as gaussians are; its state says how many there are."""

    def __init__(self):
        super().__init__()
        self.means = nn.Parameter(torch.zeros(2))
        self.optimizer = torch.optim.Adam([{"params": [self.means], "lr": 0.05, "name": "means"}], lr=1.0)

    def replace(self, means):
        old, group = self.means, self.optimizer.param_groups[0]
        self.means = nn.Parameter(means)
        state = self.optimizer.state.pop(old, None)
        if state:
            self.optimizer.state[self.means] = {key: value if value.ndim == 0 else torch.zeros_like(means) for key,
                                                value in state.items()}
        group["params"] = [self.means]

    def split(self, step, records):
        if step % 20 == 19 and len(self.means) < 16: self.replace(torch.cat([self.means.data, self.means.data + 0.01]))

    def __call__(self, step, generator):
        target = torch.linspace(-1, 1, len(self.means)) + 0.01 * torch.randn(len(self.means), generator=generator)
        return {"loss": (self.means - target).square().mean(), "points": float(len(self.means))}


class Size:
    """The stateful part of a cloud: restored first, it gives the parameter the size of the saved weights."""

    def __init__(self, cloud): self.cloud = cloud
    def state_dict(self): return {"count": len(self.cloud.means)}
    def load_state_dict(self, state): self.cloud.replace(torch.zeros(state["count"]))


def test_replaced_parameters_are_trained_averaged_and_resumed(tmp_path):
    def session(folder, resume=False, stop_at=None):
        cloud = Cloud()

        def step_function(step, generator):
            if step == stop_at: os.kill(os.getpid(), signal.SIGINT)
            return cloud(step, generator)

        config = LoopConfig(steps=240, warmup_steps=5, learning_rate=1.0, ema_decay=0.9, gradient_clip=1.0,
                            log_every_steps=10)
        options = {"stateful": {"size": Size(cloud)}, "after_step": cloud.split, "resume": resume, "quiet": True}
        result = train(step_function, cloud.optimizer, config, model=cloud, folder=folder, **options)
        return cloud, result

    whole, expected = session(tmp_path / "whole")
    # the new parameters learned
    assert len(whole.means) == 16 and (whole.means - torch.linspace(-1, 1, 16)).abs().max() < 0.1
    with pytest.raises(KeyboardInterrupt): session(tmp_path / "parts", stop_at=50)
    parts, result = session(tmp_path / "parts", resume=True)
    assert torch.equal(whole.means, parts.means) and torch.equal(expected.averaged.average["means"],
                                                                 result.averaged.average["means"])
    assert without_clock(expected.records) == without_clock(result.records)


# ---- errors, interrupts, threads

def test_an_error_in_a_step_closes_the_logs_and_is_raised(tmp_path):
    problem = Problem()  # noqa: F821

    def failing(step, generator):
        if step == 25: raise ZeroDivisionError
        return problem(step, generator)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError):
        train(failing, problem.optimizer, LoopConfig(steps=300), folder=tmp_path / "run", quiet=True)
    assert (
        list(read_scalars(tmp_path / "run")["step"]) == [20]
        and tensorboard_events(tmp_path / "run", "loss")[0][0] == 20
    )
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_interrupt_raised_inside_a_step_is_saved_as_before_that_step(tmp_path):
    """Some front ends raise KeyboardInterrupt themselves instead of sending a signal."""
    problem = Problem()  # noqa: F821
    config = LoopConfig(steps=90, warmup_steps=10, log_every_steps=7)

    def raising(step, generator):
        values = problem(step, generator)
        if step == 40: raise KeyboardInterrupt
        return values

    with pytest.raises(KeyboardInterrupt):
        train(raising, problem.optimizer, config, model=problem.model, folder=tmp_path / "run", quiet=True)
    assert read_checkpoint(latest_path(tmp_path / "run"))["step"] == 40


def test_training_runs_in_a_worker_thread():
    """A dashboard may train in a worker thread, where no signal handler can be set."""
    results = []
    thread = threading.Thread(target=lambda: results.append(run_problem()[1]))
    thread.start(); thread.join()
    assert results[0].finished


def test_what_a_checkpoint_cannot_hold_is_named(tmp_path):
    class Strange:
        def state_dict(self): return {"where": Path("x")}

    problem = Problem()  # noqa: F821
    with pytest.raises(KiloError, match=r"stateful.*strange.*where.*PosixPath"):
        train(problem, problem.optimizer, LoopConfig(steps=200), folder=tmp_path / "run",
              stateful={"strange": Strange()}, quiet=True)
    assert not list((tmp_path / "run" / "checkpoints").glob("*")) or not latest_path(tmp_path / "run").exists()


def test_nothing_heavy_is_imported_before_it_is_needed():
    heavy = ["tensorboard", "matplotlib", "rich", "pandas", "torchmetrics", "IPython", "fastcore", "nbdev"]
    code = (
        f"import sys, json, kilonb.training.loop; print(json.dumps([name for name in {heavy} if name in sys.modules]))"
    )
    assert json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                                     check=True).stdout) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_run_on_a_gpu_resumes_with_the_same_generator(tmp_path):
    def session(folder, resume=False, stop_at=None):
        seed_everything(0)
        model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1)).cuda()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

        def step_function(step, generator):
            if step == stop_at: os.kill(os.getpid(), signal.SIGINT)
            points = torch.rand(256, 2, generator=generator, device="cuda") + 0.01 * torch.randn(256, 2, device="cuda")
            return {"loss": (model(points) - points[:, :1].sin()).square().mean()}

        train(step_function, optimizer, LoopConfig(steps=200, ema_decay=0.9), model=model, folder=folder, resume=resume,
              quiet=True)
        return model

    whole = session(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt): session(tmp_path / "parts", stop_at=90)
    parts = session(tmp_path / "parts", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters()))
