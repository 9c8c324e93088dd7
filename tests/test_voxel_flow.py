"""Voxel flow on real recordings, against official labels and tracked cuboids; and what its input may look like."""
import numpy as np
import pytest
import torch
from helpers import real_data

from kilonb.flux4d.flow_samples import load_flow_samples
from kilonb.flux4d.voxel_flow import VoxelFlowConfig, estimate_flow, estimate_pair_flow
from kilonb.metrics.flow import score_flow
from kilonb.scenes.pandaset import load_pandaset
from kilonb.scenes.tracks import box_flow, build_tracks


def crossing(time_s, seed):
    """(points [N, 3], rows of the car) of a road with a car of 4 m that drives 9 m/s along y, and a pole."""
    draw = np.random.default_rng(seed)
    road = np.c_[draw.uniform(-15, 15, (4000, 2)), draw.normal(0, .01, 4000)]
    shell = draw.uniform(-.5, .5, (1500, 3))
    face = draw.integers(0, 4, 1500)
    shell[np.arange(1500), face // 2] = face % 2 - .5
    car = shell * [1.8, 4, 1.4] + [0, -3 + 9 * time_s, .9]
    pole = np.c_[draw.normal(6, .03, (200, 2)), draw.uniform(.1, 3, 200)]
    points = np.r_[car, pole, road]
    return torch.from_numpy(points), torch.arange(len(points)) < len(car)


def test_official_labels_of_argoverse2_are_met_without_labels():
    (sample,) = load_flow_samples("argoverse2", real_data("av2_flow_7fab2350"))
    scores = score_flow(sample.estimate(estimate_pair_flow), sample.truth)
    assert scores["dynamic_normalised_car"] <= .60
    assert scores["dynamic_normalised_ped"] <= .70
    assert scores["static_epe_bg_m"] <= .01


def test_moving_things_of_pandaset_are_found_and_the_background_rests():
    sequence = load_pandaset(real_data("pandaset/002"))
    sweeps = {number: sequence.at(number).sweep() for number in (44, 46, 48)}
    start = sweeps[46].points.mean(0)
    found = estimate_flow([sweep.points - start for sweep in sweeps.values()],
                          [sweep.times_s - sequence.start_s for sweep in sweeps.values()], 1,
                          sensors=[sweep.sensors for sweep in sweeps.values()])
    sweep, camera = sweeps[46], sequence.at(46).cameras["front_camera"]
    labels = box_flow(build_tracks(sequence, [45, 46, 47]), sweep.points, sweep.sensors, 46, 47)
    pixels, depth = camera.project(sweep.points.float())
    size = torch.tensor([camera.width, camera.height])
    seen = (depth > .1) & (depth <= 80) & (pixels >= 0).all(-1) & (pixels < size).all(-1) & labels.known
    true = labels.displacement * (.1 / labels.interval_s.nan_to_num(nan=.1))[:, None]
    error, moved = (.1 * found.velocities - true).norm(dim=1), true.norm(dim=1)
    dynamic = seen & (moved >= .05)
    assert dynamic.sum() > 5000
    assert error[dynamic].mean() <= .5 * moved[dynamic].mean()
    assert error[seen & (labels.objects < 0)].mean() <= .05


def test_times_since_1970_and_float32_points_give_the_same_flow():
    (first, car), (second, _) = crossing(0.0, 1), crossing(.1, 2)
    config = VoxelFlowConfig(range_m=16.0)
    flow = estimate_flow([first, second], [0.0, .1], 0, config).velocities
    late = estimate_flow([first, second], [1.6e9, 1.6e9 + .1], 0, config).velocities
    single = estimate_flow([first.float(), second.float()], [0.0, .1], 0, config).velocities
    assert single.dtype == torch.float32 and flow.dtype == torch.float64
    assert (flow[car].mean(0) - torch.tensor([0.0, 9, 0])).norm() < .6
    assert (late - flow)[car].mean(0).norm() < .1 and (single - flow)[car].mean(0).norm() < .1


def test_each_lidar_is_matched_at_its_own_time():
    # the second LiDAR measures the first frame .05 s later and the second frame at once: its car moves half as far
    frames = [(crossing(0.0, 1), crossing(.05, 2)), (crossing(.1, 3), crossing(.1, 4))]
    times = [(0.0, .05), (.1, .1)]
    points = [torch.cat([a[0], b[0]]) for a, b in frames]
    when = [torch.cat([torch.full((len(cloud),), t).double() for (cloud, _), t in zip(frame, row)])
            for frame, row in zip(frames, times)]
    sensors = [torch.cat([torch.full((len(cloud),), k) for k, (cloud, _) in enumerate(frame)]) for frame in frames]
    found = estimate_flow(points, when, 0, VoxelFlowConfig(range_m=16.0), sensors=sensors)
    car = torch.cat([rows for _, rows in frames[0]])
    assert (found.velocities[car].mean(0) - torch.tensor([0.0, 9, 0])).norm() < 1.0


def test_a_scene_at_rest_has_no_flow():
    first, second = crossing(0.0, 1)[0], crossing(0.0, 2)[0]
    found = estimate_flow([first, second], [0.0, .1], 0, VoxelFlowConfig(range_m=16.0))
    assert not found.moving.any() and found.velocities.abs().max() == 0
    assert found.grid.at(first).abs().max() == 0


@pytest.mark.parametrize("time_s", [.2, .1])
def test_flow_in_metres_is_velocity_times_the_interval(time_s):
    (first, car), (second, _) = crossing(0.0, 5), crossing(time_s, 6)
    flow = estimate_pair_flow(first, second, time_s, VoxelFlowConfig(range_m=16.0))
    assert abs(flow[car, 1].mean() - 9 * time_s) < .06
