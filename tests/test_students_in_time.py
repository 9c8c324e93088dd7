"""Schedules that follow a time limit, frames in rounds, and thin surfaces."""

import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from kilonb.core.errors import KiloError
from kilonb.core.testing import with_threads
from kilonb.distill.losses import DistortionConfig
from kilonb.distill.rays import RayPool
from kilonb.distill.student import DistillConfig, distill, load_student, make_student, save_student
from kilonb.fields.kilonerf import KiloNeRFConfig
from kilonb.fields.marching import RayWalk, march
from kilonb.fields.occupancy import OccupancyGrid
from kilonb.fields.rendering import render_image, render_rays
from kilonb.geometry.cameras import orbit_cameras
from kilonb.imaging.targets import ViewTarget
from kilonb.training.averaging import load_weights
from kilonb.training.checkpoints import latest_path, read_checkpoint
from kilonb.training.loop import LoopConfig, train
from kilonb.training.schedules import StepPlan, planned_factor

BOX = torch.tensor([[-1.0, -1, -1], [1, 1, 1]])
CONFIG = LoopConfig(100_000, 0.1, warmup_steps=50, log_every_steps=1, minimum_learning_rate_ratio=0.01)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still except where a step advances it: [seconds]."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def run_limited(clock, folder=None, resume=False, config=CONFIG, interrupt_at=None):
    """A loop of steps of 2 ms; returns (result, positions of its steps)."""
    model, seen = nn.Linear(2, 1), []
    plan = StepPlan(config.steps, config.time_limit_s)

    def step(number, generator):
        if number == interrupt_at: raise KeyboardInterrupt
        clock[0] += 0.002
        seen.append(plan.position)
        return {"loss": model(torch.ones(2)).square().sum()}

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return train(step, optimizer, config, model=model, folder=folder, resume=resume, quiet=True, plan=plan), seen


def test_a_run_that_ends_by_its_limit_has_passed_its_whole_schedule(clock):
    result, seen = run_limited(clock, config=replace(CONFIG, time_limit_s=1.5))
    rates = [record["learning_rate"] for record in result.records]
    assert result.steps < 5000 and seen == sorted(seen) and seen[-1] > 0.9 * CONFIG.steps
    assert rates[-1] < 1.05 * 0.01 * 0.1, "the end rate"
    assert max(rates) > 0.09 and rates[0] <= 0.002, "the warm-up counts real steps, for a quarter of the run at most"
    assert result.records[-1]["schedule_progress"] > 0.97


def test_a_limited_run_averages_its_weights_over_the_same_share_of_its_time(clock, tmp_path):
    """It has far fewer steps than planned: the average began after 60,000 of 100,000 steps, which it never did."""
    config = replace(CONFIG, time_limit_s=1.5, swa_from=0.6)
    result, seen = run_limited(clock, tmp_path, config=config)
    late = sum(position + 1 > 60_000 for position in map(int, seen))
    assert result.steps < 5000 and result.averaged.taken["weight"] == late > 0.3 * result.steps
    assert load_weights(latest_path(tmp_path), nn.Linear(2, 1)).startswith(f"averaged weights (SWA of the last {late} ")


def test_the_last_rate_is_the_end_rate_within_five_percent_on_an_even_clock():
    schedule, plan, elapsed = CONFIG.schedule(), StepPlan(100_000, 60.0), 0.0
    plan.begin(0, 0.0)
    while elapsed < 60.0:
        factor = planned_factor(schedule, plan, CONFIG.warmup_steps)
        elapsed += 0.05
        plan.advance(plan.step + 1, elapsed)
    assert 0.01 <= factor < 1.05 * 0.01 and 1190 < plan.step < 1210


def test_without_a_limit_the_position_is_the_step(clock):
    result, seen = run_limited(clock, config=replace(CONFIG, steps=60, warmup_steps=5))
    assert seen == list(range(60)) and "schedule_progress" not in result.records[0]


def test_a_resumed_run_goes_on_from_its_position(clock, tmp_path):
    limited = replace(CONFIG, time_limit_s=2.0)
    longer = replace(CONFIG, time_limit_s=60.0)
    with pytest.raises(KeyboardInterrupt): run_limited(clock, tmp_path, config=longer, interrupt_at=8)
    kept = read_checkpoint(latest_path(tmp_path))
    assert kept["step"] == 8 < kept["position"] < 100_000
    result, seen = run_limited(clock, tmp_path, resume=True, config=limited)
    assert seen[0] >= kept["position"] and result.records[-1]["learning_rate"] < 0.005


def test_a_plan_of_another_length_is_refused():
    model = nn.Linear(1, 1)
    with pytest.raises(KiloError, match="make it from the loop's config"):
        train(lambda *_: {}, torch.optim.SGD(model.parameters(), lr=0.1), LoopConfig(20, warmup_steps=0), model=model,
              quiet=True, plan=StepPlan(30))


def ball(cells=0.5):
    """(student of a ball of radius .6 m, cameras)."""
    grid = OccupancyGrid(BOX, torch.ones(20, 20, 20, dtype=torch.bool))
    grid.occupied.copy_(grid.centres().norm(dim=-1) < 0.75)
    shape = KiloNeRFConfig(cells, 4, 1, hidden=16, density_bias=2.0)
    return make_student(grid, shape, 0.05), orbit_cameras(4, 3.0, 25, width=24, height=24)


def disc(camera, name):
    """A red ball of radius .6 m as a target."""
    rays = camera.rays()
    nearest = (rays.origins - (rays.origins * rays.directions).sum(-1, keepdim=True) * rays.directions).norm(dim=-1)
    alpha = (nearest < 0.6).float().reshape(camera.height, camera.width)
    return ViewTarget(name, camera, alpha[..., None] * torch.tensor([0.8, 0.2, 0.1]), alpha, None, "image")


def test_a_frame_in_rounds_is_the_frame_at_once_for_any_number_of_threads():
    student, cameras = ball()
    with torch.no_grad():
        student.field.networks.add_(torch.randn(student.field.networks.shape,
                                                generator=torch.Generator().manual_seed(0)) * 0.1)
        whole = render_rays(student.field, cameras[0].rays(), student.grid, student.step, behind=True)
        frames = []
        for count in (1, 2):
            with with_threads(count):
                frames.append(render_image(student.field, cameras[0], student.grid, student.step))
    torch.testing.assert_close(frames[0].alpha.flatten(), whole.alpha, atol=2e-5, rtol=1e-4)
    for a, b in zip(frames[0][:3], frames[1][:3]): torch.testing.assert_close(a, b)


def test_a_walk_in_rounds_meets_the_samples_of_the_march():
    student, cameras = ball()
    samples, walk = march(cameras[0].rays(), student.grid, 0.05), RayWalk(cameras[0].rays(), student.grid, 0.05)
    alive, total = torch.arange(576).numpy(), torch.zeros(576, dtype=torch.int64)
    while len(alive):
        total[alive] += torch.from_numpy(walk.next(alive, 3)[1])
        alive = alive[walk.begin[alive] >= 0]
    assert torch.equal(total, samples.offsets.diff())


def test_a_distortion_loss_and_a_stop_reach_training_and_file(tmp_path):
    student, cameras = ball()
    pool = RayPool([disc(camera, f"v{i}") for i, camera in enumerate(cameras)], student.grid, student.step)
    config = DistillConfig(rays=128, stop=1e-2, distortion=DistortionConfig(1e-3, 0.2, 0.4),
                           loop=LoopConfig(20, warmup_steps=2, log_every_steps=1))
    records = distill(student, pool, config, quiet=True).records
    assert ["distortion_steps" in record for record in records] == [False] * 4 + [False] + [True] * 15
    save_student(student, tmp_path / "student.pt", "raw")
    assert load_student(tmp_path / "student.pt")[0].stop == 1e-2
