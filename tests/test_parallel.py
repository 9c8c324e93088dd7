"""Data parallel runs: the same samples, rates and losses at every number of processes, and all ranks end when one
ends."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

from ranks import QUIET, free_port

from kilonb.distill.alpha import AlphaBandConfig, alpha_terms
from kilonb.distill.diagnostics import GradientRatios
from kilonb.distill.data import DistillationData
from kilonb.imaging.orbit import axis_vector, cameras_around
from kilonb.distill.losses import ResponseLossConfig
from kilonb.distill.multiview import TeachingConfig, teach
from kilonb.distill.points import PointsConfig
from kilonb.distill.student import DistillConfig
from kilonb.core.errors import KiloError
from kilonb.batch.execution import RunFailed
from kilonb.batch.launch import launch
from kilonb.runs.records import list_runs, read_run
from kilonb.runs.status import FINISHED, read_status
from kilonb.splats.gaussians import gaussians_from_points
from kilonb.training.checkpoints import final_path, latest_path, read_checkpoint
from kilonb.training.guards import TrainingStopped
from kilonb.training.loop import LoopConfig, train
from kilonb.training.parallel import (ALONE, DistributedSteps, World, agree, average_gradients, epoch_indices,
                                      first_goes_ahead, gather_rows, join, share, share_weight, world_from_environment)
from kilonb.runs.scalars import read_scalars

# ---- a small problem

def toy(world, folder=None, resume=False, batch=10, stop_at=None, how=None, seed=None, **settings):
    """Train a small network on `batch` points a step; on the last rank something happens in step `stop_at`. Returns
    records and weights, or an error's text."""
    torch.manual_seed(world.rank if seed is None else seed)                # all ranks start with the weights of rank 0
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    unused = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([*model.parameters(), unused], lr=1e-2)
    config = LoopConfig(**{"steps": 40, "warmup_steps": 5, "gradient_clip": 0.5, "ema_decay": 0.9, "log_every_steps": 7,
                           **settings})

    def step_function(step, generator):
        if step == stop_at and world.rank == world.size - 1: how(step)
        points = torch.rand(batch, 2, generator=generator, dtype=torch.float64)[share(batch, world)]
        # from the global generator
        noise = 0.1 * torch.randn(batch, 1, dtype=torch.float64)[share(batch, world)]
        return {"loss": (model(points) - (3 * points[:, :1]).sin() - noise).square().mean(),
                "share": share_weight(batch, world), "rank": float(world.rank)}

    try:
        result = train(step_function, optimizer, config, model=model, folder=folder, resume=resume, quiet=True,
                       world=world)
    except KeyboardInterrupt: return "KeyboardInterrupt"
    return {"records": result.records, "weights": [p.detach() for p in model.parameters()],
            "average": result.averaged.average, "from": result.resumed_from, "steps": result.steps}


def press_ctrl_c(step): os.kill(os.getpid(), signal.SIGINT)
def divide_by_zero(step): raise ZeroDivisionError("in a step")
def stop_by_guard(step): raise TrainingStopped(f"the alpha collapsed at step {step}.")
def die(step): os._exit(9)
def hang(step): time.sleep(4)
def interrupt_inside(step): raise KeyboardInterrupt


def column(answer, name): return torch.tensor([record[name] for record in answer["records"]], dtype=torch.float64)


def assert_same_run(one, other, tolerance=1e-4):
    """Same steps and rates exactly, losses and weights to a relative tolerance."""
    assert [r["step"] for r in one["records"]] == [r["step"] for r in other["records"]]
    assert [r["learning_rate"] for r in one["records"]] == [r["learning_rate"] for r in other["records"]]
    torch.testing.assert_close(column(one, "loss"), column(other, "loss"), rtol=tolerance, atol=0)
    for a, b in zip(one["weights"], other["weights"]): torch.testing.assert_close(a, b, rtol=tolerance, atol=1e-7)


@pytest.fixture(scope="module")
def alone(ranks): return ranks.run(toy, 1)[0]


@pytest.mark.parametrize("size", [2, 3])
def test_rates_samples_and_losses_do_not_depend_on_the_world(ranks, alone, size):
    """Batches of 10 do not divide by 3; in double precision the difference is rounding."""
    for answer in ranks.run(toy, size): assert_same_run(alone, answer, 1e-9)


def test_all_ranks_hold_the_same_weights_to_the_bit(ranks):
    first, *others = ranks.run(toy, 3)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first["weights"], other["weights"]))
        assert all(torch.equal(first["average"][name], other["average"][name]) for name in first["average"])
        assert [{k: v for k, v in r.items() if k != "elapsed_s"} for r in first["records"]] == [
            {k: v for k, v in r.items() if k != "elapsed_s"} for r in other["records"]]


def test_one_process_needs_no_process_group():
    torch.manual_seed(0)
    one = toy(ALONE, seed=0)
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(one["weights"], toy(World(timeout_s=1), seed=0)["weights"]))


def test_records_are_means_over_the_shares(ranks):
    """3 ranks share 10 samples as 4, 3 and 3: the mean of a rank's number is (0 * 4 + 1 * 3 + 2 * 3) / 10."""
    for answer in ranks.run(toy, 3): assert all(record["rank"] == pytest.approx(0.9) for record in answer["records"])


def test_only_the_first_rank_writes(ranks, tmp_path, alone):
    ranks.run(toy, 2, tmp_path / "run")
    assert (
        list(read_scalars(tmp_path / "run")["step"]) == [r["step"] for r in alone["records"]]
        and final_path(tmp_path / "run").is_file()
    )
    assert len(list((tmp_path / "run").glob("events.out.tfevents.*"))) == 1


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2), (3, 2), (2, 3)])
def test_a_run_can_be_resumed_with_another_number_of_ranks(ranks, tmp_path, alone, sizes):
    """The run is stopped in step 17, between two records."""
    stopped = ranks.run(toy, sizes[0], tmp_path / "run", False, 10, 17, press_ctrl_c)
    assert stopped == ["KeyboardInterrupt"] * sizes[0] and read_checkpoint(latest_path(tmp_path / "run"))["step"] == 18
    for answer in ranks.run(toy, sizes[1], tmp_path / "run", True):
        assert answer["from"] == 18
        assert_same_run(alone, answer, 1e-9)


def test_a_resumed_run_of_two_ends_in_the_same_bits(ranks, tmp_path):
    whole = ranks.run(toy, 2)[0]
    ranks.run(toy, 2, tmp_path / "run", False, 10, 25, press_ctrl_c)
    parts = ranks.run(toy, 2, tmp_path / "run", True)[1]
    assert all(torch.equal(a, b) for a, b in zip(whole["weights"], parts["weights"])) and column(whole, "loss").equal(
        column(parts, "loss")
    )


@pytest.mark.parametrize(("how", "first", "last"),
                         [(divide_by_zero, "KiloError: Rank 1 failed, and all stopped with it: "
                           "ZeroDivisionError: in a step", "ZeroDivisionError: in a step"),
                          (stop_by_guard, "TrainingStopped: Rank 1: the alpha collapsed at step 12.",
                           "TrainingStopped: the alpha collapsed at step 12."),
                          (interrupt_inside, "KeyboardInterrupt", "KeyboardInterrupt")])
def test_an_interrupt_or_error_of_one_rank_ends_all_at_the_same_step(ranks, tmp_path, how, first, last):
    answers = ranks.run(toy, 2, tmp_path / "run", False, 10, 12, how)
    assert answers[0] == first and last in answers[1]
    assert list(read_scalars(tmp_path / "run")["step"]) == [7]              # the steps before are logged, nothing after


def test_the_time_limit_of_one_rank_is_that_of_all(ranks):
    """All ranks stop after the same step, although their clocks differ."""
    answers = ranks.run(limited, 2)
    assert answers[0] == answers[1] < 400


def limited(world): return toy(world, steps=400, time_limit_s=1e9 if world.first else 0.05)["steps"]


def test_a_rank_that_dies_ends_the_others_with_one_sentence(ranks):
    began = time.monotonic()
    answers = ranks.run(toy, 3, None, False, 10, 5, die)
    assert answers[2] is None and time.monotonic() - began < 30
    for answer in answers[:2]:
        assert (
            "lost the connection to the other ranks at" in answer
            and answer.startswith("LostRank: Rank")
            and "\n" not in answer
        )


def test_a_rank_that_hangs_ends_the_others_within_the_timeout(ranks):
    answers = ranks.run(toy, 2, None, False, 10, 5, hang, timeout_s=1.5)
    assert "did not answer within 1.5 s" in answers[0] and "Rank 1 lost the connection" in answers[1]


def test_a_rank_that_does_not_join_is_one_sentence():
    with pytest.raises(KiloError, match=r"Rank 0 waited 0\.5 s at 127.*not all 2 ranks connected"):
        join(World(0, 2, port=free_port(), timeout_s=0.5))


def test_a_folder_that_the_first_rank_cannot_use_ends_all(ranks, tmp_path):
    """A folder that holds a run is refused on rank 0; the other ranks raise the same error."""
    ranks.run(toy, 1, tmp_path / "run")
    answers = ranks.run(toy, 2, tmp_path / "run")
    assert (
        "already holds a run" in answers[0]
        and answers[1].startswith("KiloError: Rank 0 failed, and all stopped with it:")
        and "already holds" in answers[1]
    )


def drifting(world, folder):
    """Rank 1 changes a weight that the other ranks do not change."""
    model = nn.Linear(2, 1)

    def after(step, records):
        if step == 3 and world.rank == 1: model.bias.data += 1e-6

    step_function = lambda step, generator: {"loss": model(torch.rand(4, 2, generator=generator)).square().mean()}
    train(step_function, torch.optim.SGD(model.parameters(), lr=0.1),
          LoopConfig(steps=8, warmup_steps=0, checkpoint_every_steps=3), model=model, folder=folder, after_step=after,
          quiet=True, world=world)


def test_diverging_weights_name_the_rank_and_the_step(ranks, tmp_path):
    """The difference is found at the next checkpoint, which is not written."""
    assert all("Rank 1 has other weights than rank 0 (after step 6)" in answer
               for answer in ranks.run(drifting, 2, tmp_path / "run"))
    assert read_checkpoint(latest_path(tmp_path / "run"))["step"] == 3


class Cloud(nn.Module):
    """Points that are split during training."""

    def __init__(self):
        super().__init__()
        self.means = nn.Parameter(torch.zeros(2))
        self.optimizer = torch.optim.Adam([self.means], lr=0.05)

    def split(self, step, records):
        if step % 10 != 9 or len(self.means) >= 16: return
        means = nn.Parameter(torch.cat([self.means.data, self.means.data + 0.01]))
        state = self.optimizer.state.pop(self.means)
        self.optimizer.state[means] = {key: value if value.ndim == 0 else torch.zeros_like(means) for key,
                                       value in state.items()}
        self.means = self.optimizer.param_groups[0]["params"][0] = means


def splitting(world, wrong=False):
    cloud = Cloud()

    def step_function(step, generator):
        target = torch.linspace(-1, 1, len(cloud.means)) + 0.1 * torch.randn(6, len(cloud.means), generator=generator)
        return {"loss": (cloud.means - target[share(6, world)]).square().mean(), "share": share_weight(6, world)}

    def after(step, records):
        if not (wrong and world.rank): cloud.split(step, records)

    train(step_function, cloud.optimizer, LoopConfig(steps=50, learning_rate=0.05, warmup_steps=0, ema_decay=0.9),
          model=cloud, after_step=after, quiet=True, world=world)
    return cloud.means.detach()


def test_parameters_that_are_replaced_are_equal_on_all_ranks(ranks):
    one, *_ = ranks.run(splitting, 1)
    two = ranks.run(splitting, 2)
    assert len(one) == 16 and torch.equal(*two)
    torch.testing.assert_close(one, two[0], rtol=1e-4, atol=1e-5)
    assert all("other shapes than rank 0" in answer for answer in ranks.run(splitting, 2, True))


# ---- gradients and rows

def uneven(world, count):
    """The gradient of a mean over `count` samples, in double precision."""
    generator = torch.Generator().manual_seed(3)
    weights = nn.Parameter(torch.randn(4, generator=generator, dtype=torch.float64))
    half, none = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)), nn.Parameter(torch.zeros(2))
    inputs = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    mine = share(count, world)
    loss = (inputs[mine] @ weights).sin().mean()
    if world.rank == world.size - 1:
        loss = loss + half.sum() / share_weight(count, world)                           # a gradient on one rank only
    loss.backward()
    average_gradients([weights, half, none], world, share_weight(count, world))
    return weights.grad, half.grad.float(), none.grad


@pytest.mark.parametrize("count", [3, 7, 10, 32])
def test_an_uneven_batch_has_the_gradient_of_the_whole(ranks, count):
    expected = uneven(ALONE, count)
    for size in (2, 3):
        for weights, half, none in ranks.run(uneven, size, count):
            torch.testing.assert_close(weights, expected[0], rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(half, expected[1], rtol=1e-2, atol=0)
            assert none is None


def of_whole_batch(world):
    weights = nn.Parameter(torch.randn(4, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    inputs = torch.randn(11, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[share(11, world)]
    single, several = gather_rows([inputs @ weights, inputs * weights], 11, world)
    (single.quantile(0.7) + several[several > 0.3].mean()).backward()
    average_gradients([weights], world)
    return weights.grad


def test_a_loss_that_is_no_mean_has_the_gradient_of_the_whole(ranks):
    for size, expected in product((2, 3), [of_whole_batch(ALONE)]):
        for gradient in ranks.run(of_whole_batch, size):
            torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)


def wrong_shares(world): average_gradients([nn.Parameter(torch.ones(1))], world, 0.9)
def different_ways(world): agree(world, f"place {world.rank}")


def ahead(world):
    with first_goes_ahead(world):
        if world.first: raise KiloError("the teacher has no gaussians.")


def test_misuse_of_the_process_group_is_one_sentence(ranks):
    assert all("shares sum to 1.8; expected 1" in answer for answer in ranks.run(wrong_shares, 2))
    assert all("out of step" in answer for answer in ranks.run(different_ways, 2))
    answers = ranks.run(ahead, 2)
    assert answers == ["KiloError: the teacher has no gaussians.",
                       "KiloError: Rank 0 failed, and all stopped with it: the teacher has no gaussians."]
    with pytest.raises(KiloError, match="batch of 2 cannot be shared by 3"): share(2, World(0, 3))
    with pytest.raises(KiloError, match="call join"): agree(World(0, 2), "nowhere")
    with pytest.raises(KiloError, match="MASTER_PORT is not set"):
        world_from_environment({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here"})


# ---- epochs

@pytest.mark.incident(20)
@pytest.mark.parametrize(("count", "batch", "steps"),
                         [(23, 7, None), (40, 8, None), (5, 8, 3), (100, 5, 13), (6, 6, None)])
def test_incident_20_an_epoch_has_the_same_steps_and_batches_at_every_world_size(count, batch, steps):
    whole = {epoch: epoch_indices(count, epoch, 1, batch, ALONE, steps) for epoch in range(3)}
    assert whole[0][0].tolist() != whole[1][0].tolist()
    for size in (1, 2, 3, 4, 5):
        parts = [DistributedSteps(count, batch, 1, World(rank, size), steps) for rank in range(size)]
        assert {len(part) for part in parts} == {steps or count // batch} and sum(
            part.weight for part in parts
        ) == pytest.approx(1)
        # at any position, without the ones before
        for epoch, inside in product(range(3), range(len(parts[0]))):
            step = epoch * len(parts[0]) + inside
            dealt = torch.full((batch,), -1)
            for rank, part in enumerate(parts): dealt[rank::size] = part.batch_of(step)
            assert part.position(step) == (epoch, inside) and dealt.equal(whole[epoch][inside])


def test_an_epoch_has_every_sample_once():
    seen = torch.cat(epoch_indices(23, 2, 0, 7)).bincount(minlength=23)
    assert seen.max() == 1 and seen.sum() == 21
    seen = torch.cat(epoch_indices(5, 0, 0, 8, steps_per_epoch=4)).bincount(minlength=5)
    assert seen.max() - seen.min() == 1 and seen.sum() == 32
    with pytest.raises(KiloError, match="less than a batch of 8"): DistributedSteps(5, 8)


def epochs(world):
    """A run in epochs, whose schedule counts optimiser steps."""
    model, data = nn.Linear(1, 1), torch.linspace(0, 1, 20)[:, None]
    nn.init.constant_(model.weight, 0.0), nn.init.constant_(model.bias, 0.0)
    batches = DistributedSteps(20, 6, 5, world)

    def step_function(step, generator):
        x = data[batches.batch_of(step)]
        return {"loss": (model(x) - 2 * x).square().mean(), "share": batches.weight,
                "epoch": float(batches.position(step)[0])}

    config = LoopConfig(steps=4 * len(batches), learning_rate=0.1, warmup_steps=2, log_every_steps=1)
    return {"records": train(step_function, torch.optim.SGD(model.parameters(), lr=0.1), config, quiet=True,
                             world=world).records, "weights": [p.detach() for p in model.parameters()]}


@pytest.mark.incident(20)
def test_incident_20_the_schedule_is_the_same_at_world_sizes_1_2_and_3(ranks):
    one = ranks.run(epochs, 1)[0]
    assert [r["epoch"] for r in one["records"]] == [0.0] * 3 + [1.0] * 3 + [2.0] * 3 + [3.0] * 3
    for size in (2, 3): assert_same_run(one, ranks.run(epochs, size)[size - 1])


# ---- distillation

def lesson():
    generator = torch.Generator().manual_seed(0)
    shell = nn.functional.normalize(torch.randn(1500, 3, generator=generator), dim=-1) * 0.6
    ball = gaussians_from_points(shell, (shell * 4).sin() / 2 + 0.5, sh_degree=0, opacity=0.9, scale=1.0)
    return DistillationData(ball, [],
                  [(f"view_{i}", camera)
                   for i, camera in enumerate(cameras_around(ball, 6, 40, axis_vector("z")))], [], [],
                  0.0, "built")


STUDENT = TeachingConfig(
    cells=4,
    march_steps=60,
    voxels=32,
    targets="teacher",
    network={"position_frequencies": 4, "direction_frequencies": 2, "hidden": 16},
    points=PointsConfig(
        bank=20_000, points=1001, loop=LoopConfig(steps=15, learning_rate=1e-2, warmup_steps=3, log_every_steps=5)
    ),
    rays=DistillConfig(
        rays=301,
        first_refresh=8,
        refresh_weight=0.01,
        loss=ResponseLossConfig(depth_weight=0.05),
        loop=LoopConfig(
            steps=30, learning_rate=5e-3, warmup_steps=5, ema_decay=0.9, gradient_clip=1.0, log_every_steps=5
        ),
    ),
)


def student(world, folder=None, resume=False, time_limit_s=None, ratios=False):
    """Space, points and rays, with every term that ranks can share."""
    terms = lambda student, teacher: alpha_terms(None, AlphaBandConfig(patience=4, decay=0.5),
                                                 30) + ([GradientRatios(ResponseLossConfig())] if ratios else [])
    config = replace(STUDENT, rays=replace(STUDENT.rays, loop=replace(STUDENT.rays.loop, time_limit_s=time_limit_s)))
    taught = teach(lesson(), config, folder, terms=terms, resume=resume, quiet=True, world=world)
    return {"records": taught.rays.records, "points": taught.points.records,
            "weights": [p.detach() for p in taught.student.parameters()], "occupied": taught.student.occupied,
            "from": taught.rays.resumed_from}


def test_a_student_of_two_ranks_is_the_student_of_one(ranks, tmp_path):
    """Covers a number of rays that does not divide, refreshed occupancy at steps 8 and 16, quantiles over the batch,
    seam and depth terms, gradient clipping and averaging."""
    [one], two = ranks.run(student, 1), ranks.run(student, 2)
    assert isinstance(two[0], dict), two[0]
    for answer in two:
        assert_same_run({**one, "weights": []}, {**answer, "weights": []})
        for name in ("colour_loss", "depth_loss", "continuity_term", "alpha_band_halo_quantile", "samples_per_ray",
                     "ray_alpha_foreground", "gradient_norm"):
            torch.testing.assert_close(column(one, name), column(answer, name), rtol=2e-3, atol=1e-6, msg=lambda text,
                                       name=name: f"{name}: {text}")
        losses = [torch.tensor([record["loss"] for record in records]) for records in (one["points"], answer["points"])]
        torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
    assert all(torch.equal(a, b) for a,
               b in zip(two[0]["weights"], two[1]["weights"])) and torch.equal(two[0]["occupied"], two[1]["occupied"])
    assert (one["occupied"] ^ two[0]["occupied"]).float().mean() < 1e-3


def test_a_student_begun_by_two_ranks_is_finished_by_one(ranks, tmp_path):
    """The checkpoint holds the statistics of the occupied space, which each rank collects from its own rays."""
    ranks.run(student, 2, tmp_path / "run", False, 1e-6)
    kept = read_checkpoint(latest_path(tmp_path / "run"))
    assert kept["step"] == 1
    [whole], [parts] = ranks.run(student, 1), ranks.run(student, 1, tmp_path / "run", True)
    assert parts["from"] == 1
    assert_same_run({**whole, "weights": []}, {**parts, "weights": []})


def test_a_term_that_cannot_be_split_over_ranks_is_refused(ranks):
    for answer in ranks.run(student, 2, None, False, None, True):
        assert "The term 'gradients' needs the samples of all rays, which 2 ranks do not hold together" in answer


# ---- notebooks

CELLS = ["""steps: int = 30
how: str = ""
run_dir: str = ""
resume: bool = False""", """import os, signal, sys, time, torch
from torch import nn
from kilonb.core.errors import KiloError
from kilonb.training.loop import LoopConfig, train
from kilonb.training.parallel import share, share_weight
from kilonb.training.session import open_session
session = open_session("line", timeout_s=60)
world, model = session.world, nn.Linear(1, 1)
def step(number, generator):
    if number == 10 and world.rank == world.size - 1:
        if how == "die": os.kill(os.getpid(), signal.SIGKILL)
        if how == "fail": raise ValueError("no such luck")
    x = torch.rand(9, 1, generator=generator)[share(9, world)]
    return {"loss": (model(x) - 3 * x).square().mean(), "share": share_weight(9, world)}
optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
if how == "early" and world.rank: raise KiloError("rank 1 has no data.")
config = LoopConfig(steps, 0.1, warmup_steps=0, checkpoint_every_steps=5)
result = train(step, optimizer, config, model=model, folder=session.folder, resume=session.resumed, world=world)
session.leave_group()""", """session.finish({"loss": result.records[-1]["loss"]})"""]


@pytest.fixture
def experiment(tmp_path) -> Path:
    cell = lambda i, source: {"cell_type": "code", "id": f"cell-{i}",
                              "metadata": {"tags": ["parameters", "distributed"]} if i == 0 else {}, "source": source,
                              "execution_count": None, "outputs": []}
    content = {"cells": [cell(i, source) for i, source in enumerate(CELLS)], "metadata": {}, "nbformat": 4,
               "nbformat_minor": 5}
    (tmp_path / "line.ipynb").write_text(json.dumps(content))
    return tmp_path / "line.ipynb"


@pytest.mark.slow
def test_torchrun_runs_one_notebook_on_all_ranks(experiment, tmp_path):
    """The command of the documentation. Rank 0 is the run; notebook and log of rank 1 are inside it, and rank 1 is not
    listed."""
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, **QUIET, "KILONB_OUTPUTS": str(tmp_path / "outputs")}
    done = subprocess.run([*torchrun, "-m", "kilonb.batch.launch", str(experiment), "-p", "steps=24"], env=environment,
                          capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    [record] = list_runs(tmp_path / "outputs")
    assert (
        record.status == FINISHED
        and record.results["ranks"] == 2
        and record.parameters["steps"] == 24
        and str(record.folder) in done.stdout
    )
    other = record.folder / "ranks" / "1"
    assert (
        read_status(other)["status"] == FINISHED
        and (other / "notebook.ipynb").is_file()
        and (other / "log.txt").is_file()
    )
    assert not (other / "results.json").exists() and not (other / "metrics.csv").exists()
    assert "training 24/24" in done.stdout and done.stdout.count("training 24/24") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("how", "sentence"), [
    ("fail", r"Rank 1 failed.*ValueError.*no such luck"), ("early", r"Rank 1 failed: rank 1 has no data\."),
    ("die", r"Rank 1 failed: The notebook's kernel was killed"),
])
def test_a_rank_that_fails_gives_one_sentence_and_a_failed_run(experiment, tmp_path, monkeypatch, how, sentence):
    for name, value in QUIET.items(): monkeypatch.setenv(name, value)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(RunFailed, match=sentence) as failed:
        launch(str(experiment), {"steps": 24, "how": how}, 2, outputs=tmp_path / "outputs")
    record = read_run(failed.value.folder)
    assert (
        record.status == "failed"
        and str(failed.value) == record.error
        and "\n" not in record.error
        and not record.results
    )
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    if how == "fail":                                                       # and continues, on one rank or several
        resumed = launch(str(experiment), {"steps": 24}, 2, run_dir=record.folder, resume=True)
        assert (
            resumed.status == FINISHED
            and read_checkpoint(final_path(resumed.folder))["step"] == 24
            and math.isfinite(resumed.results["loss"])
        )


@pytest.mark.slow
def test_a_folder_in_use_is_refused_and_stays_as_it_is(experiment, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("mine")
    with pytest.raises(KiloError, match="exists and is not empty"):
        launch(str(experiment), {"steps": 24}, 2, run_dir=tmp_path / "used")
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["thesis.txt"]


REFUSED = """import os, time
from kilonb.core.errors import KiloError
from kilonb.runs.folders import open_run
run = open_run("toy", run_dir, {}, resume=resume)
(run.folder / "state.txt").write_text(str(os.getpid()))
if os.environ.get("REFUSE") and "ranks" not in run_dir:
    time.sleep(2.0)
    raise KiloError("It is refused.")
run.finish({"sum": 1})"""


def test_a_refused_resumption_leaves_the_folders_of_all_ranks_as_they_were(tmp_path, monkeypatch):
    """Rank 1 has gone on in the meantime."""
    cell = lambda i, source: {"cell_type": "code", "id": f"c{i}", "source": source, "execution_count": None,
                              "metadata": {"tags": ["parameters", "distributed"]} if i == 0 else {}, "outputs": []}
    cells = [cell(0, 'run_dir: str = ""\nresume: bool = False'), cell(1, REFUSED)]
    content = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (tmp_path / "toy.ipynb").write_text(json.dumps(content))
    def state():
        return {str(path): path.read_bytes() if path.is_file() else None for path in (tmp_path / "run").rglob("*")}
    for name, value in QUIET.items(): monkeypatch.setenv(name, value)
    launch(str(tmp_path / "toy.ipynb"), {}, 2, run_dir=tmp_path / "run")
    before = state()
    monkeypatch.setenv("REFUSE", "1")
    with pytest.raises(KiloError, match=r"It is refused\."):
        launch(str(tmp_path / "toy.ipynb"), {}, 2, run_dir=tmp_path / "run", resume=True)
    assert state() == before


def test_a_notebook_that_is_not_tagged_as_distributed_is_refused(tmp_path):
    with pytest.raises(KiloError, match="cannot be shared by several ranks"): launch("teacher", {}, 2, outputs=tmp_path)
    assert not list(tmp_path.iterdir())
