"""Distillation from all views: space, points, rays; the experiments that are built on them; bad input."""
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import run_here
import torch

from kilonb.imaging.scoring import evaluate_frames
from kilonb.distill.data import (
    check_teacher,
    distillation_data_from_ply,
    distillation_data_from_views,
    open_distillation_data,
)
from kilonb.distill.multiview import (TeachingConfig, field_config, space_of_scene, steps_in, teach,
                                       with_frequencies)
from kilonb.distill.points import PointsConfig, visible_space
from kilonb.distill.seams import Continuity, seam_error, wall_distance
from kilonb.distill.space import occupancy_of_gaussians
from kilonb.distill.student import DistillConfig, load_student, save_student
from kilonb.imaging.targets import targets_from_images
from kilonb.geometry.cameras import orbit_cameras
from kilonb.core.errors import KiloError
from kilonb.runs.records import read_run
from kilonb.runs.scalars import read_scalars
from kilonb.scenes.blender import load_blender
from kilonb.scenes.brickyard import write_brickyard
from kilonb.splats.gaussians import Gaussians
from kilonb.splats.lookup import GaussianLookup
from kilonb.splats.ply import write_ply
from kilonb.training.checkpoints import latest_path
from kilonb.training.loop import LoopConfig

TINY = ["-p", "cells=6", "-p", "teaching.march_steps=60", "-p", "teaching.voxels=48", "-p", "rays=512", "-p",
        "points_steps=20", "-p", "test_views=2", "-p", "resolution=48"]
LOOP = LoopConfig(steps=60, learning_rate=5e-3, warmup_steps=5, ema_decay=0.95, log_every_steps=10)
TEACHING = TeachingConfig(cells=8, march_steps=80, voxels=64,
                          points=PointsConfig(bank=60_000, points=8192, loop=replace(LOOP, steps=60, ema_decay=None)),
                          rays=DistillConfig(rays=1024, first_refresh=20, refresh_weight=0.005, loop=LOOP))


@pytest.fixture(scope="module")
def brickyard(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("multiview") / "brickyard"
    write_brickyard(folder, width=64, height=64, train=12, test=3, count=4_000)
    return folder


@pytest.fixture(scope="module")
def data(brickyard, tmp_path_factory):
    return open_distillation_data("blender", brickyard, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def result(data):
    return teach(data, TEACHING, quiet=True)


def mean_db(student, data) -> dict[str, float]:
    return evaluate_frames(student, data.test_photos, teacher=data.teacher, quiet=True).means()


# ---- the three stages

def test_held_out_views_score_far_above_an_all_white_image(result, data):
    scores = mean_db(result.student, data)
    assert scores["psnr_srgb_white_db"] > scores["psnr_blank_white_db"] + 10 and scores["psnr_vs_teacher_db"] > 20, (
        scores
    )


def test_points_alone_reproduce_the_scene_and_rays_improve_it(result, data):
    short = replace(TEACHING,
                    rays=replace(TEACHING.rays, loop=replace(LOOP, steps=2, warmup_steps=1, learning_rate=1e-6)))
    points = mean_db(teach(data, short, quiet=True).student, data)
    assert (
        points["psnr_blank_white_db"] + 6
        < points["psnr_srgb_white_db"]
        < mean_db(result.student, data)["psnr_srgb_white_db"]
    )


def test_the_space_is_what_the_cameras_see_and_loses_no_alpha(data):
    grid, _, step = space_of_scene(data.teacher, [camera for _, camera in data.train], TEACHING)
    everything = occupancy_of_gaussians(data.teacher, 64, cameras=[camera for _, camera in data.train])
    volume = lambda g: g.occupied.sum() * g.voxel_size.prod()
    assert volume(grid) < volume(everything) and step == pytest.approx((grid.box[1] - grid.box[0]).max().item() / 80)
    assert teach(data, replace(TEACHING, rays=replace(TEACHING.rays, loop=replace(LOOP, steps=1, warmup_steps=0))),
                 quiet=True).lost_alpha < 0.01


def test_a_teacher_marched_as_a_field_is_the_teacher(data):
    """The stage of points relies on the lookup, so it must render what the rasteriser renders."""
    grid, teacher, step = space_of_scene(data.teacher, [camera for _, camera in data.train], TEACHING)
    from kilonb.fields.rendering import render_image
    from kilonb.metrics.images import over_background, psnr_srgb_db
    from kilonb.splats.rasterizer import render_gaussians

    for _, camera in data.test[:2]:
        marched, rasterised = render_image(teacher, camera, grid, step), render_gaussians(data.teacher, camera)
        white = [over_background(image.rgb_premultiplied, image.alpha, check=False).clamp(0, 1)
                 for image in (marched, rasterised)]
        assert psnr_srgb_db(*white) > 22


@pytest.mark.parametrize("stage", ["points", "rays"])
def test_an_interrupted_distillation_ends_in_the_same_bits(data, result, tmp_path, stage):
    """Stopped in the middle of a stage (here by its time limit), and resumed."""
    part = replace(TEACHING.points,
                   loop=replace(TEACHING.points.loop, time_limit_s=1e-3)) if stage == "points" else TEACHING.points
    rays = replace(TEACHING.rays, loop=replace(LOOP, time_limit_s=1e-3)) if stage == "rays" else TEACHING.rays
    if stage == "points":
        from kilonb.distill.points import distill_points
        from kilonb.distill.student import make_student

        grid, teacher, step = space_of_scene(data.teacher, [camera for _, camera in data.train], TEACHING)
        config = with_frequencies(TEACHING, grid, [camera for _, camera in data.train])
        fresh = make_student(grid, field_config(config, (grid.box[1] - grid.box[0]).max().item()), step, 0)
        distill_points(fresh, teacher, [camera for _, camera in data.train], part, tmp_path / "points", quiet=True)
    else: teach(data, replace(TEACHING, rays=rays), tmp_path, quiet=True)
    assert latest_path(tmp_path / "points" if stage == "points" else tmp_path).is_file()
    again = teach(data, TEACHING, tmp_path, resume=True, quiet=True)
    assert again.rays.steps == LOOP.steps
    for name, value in result.student.state_dict().items():
        assert torch.equal(value, again.student.state_dict()[name]), name


@pytest.mark.parametrize("kind, network", [("mlp", {"hidden": 32, "layers": 2}), ("hashgrid", {"levels": 6})])
def test_the_control_fields_are_trained_and_load_from_their_file(data, tmp_path, kind, network):
    one = teach(data, replace(TEACHING, kind=kind, network=network), quiet=True)
    scores = mean_db(one.student, data)
    assert scores["psnr_srgb_white_db"] > scores["psnr_blank_white_db"] + 5, scores
    save_student(one.student, tmp_path / "student.pt", one.weights)
    again, _ = load_student(tmp_path / "student.pt")
    assert again.field.kind == kind and torch.equal(again.render(data.test[0][1]).alpha,
                                                    one.student.render(data.test[0][1]).alpha)


def test_a_trial_predicts_how_many_steps_fit(data, result):
    """In ten times the time of a run about ten times its steps fit, within a factor of five for other load on the
    machine."""
    assert 1 / 5 < steps_in(10 * result.rays.seconds, data, TEACHING) / (10 * result.rays.steps) < 5


# ---- seams

def test_a_jump_at_the_walls_is_found(result, data):
    """A student in which every second network has another colour is discontinuous at the walls between them."""
    targets = targets_from_images(data.test_photos)
    before = seam_error(result.student, targets)
    assert 0.5 < before["seam_ratio"] < 2 and 0 < before["seam_share"] < 1
    cells = result.student.field.cells
    inside = cells.lower + cells.cell_size * (torch.rand(100, 3) * 0.8 + 0.1)
    assert (wall_distance(cells, inside) > 0.09).all()
    jump = lambda: Continuity(result.student, points=4000)(
        0, result.student, batch, None, torch.Generator().manual_seed(0)
    )["continuity_colour_jump"].item()
    from kilonb.distill.rays import RayPool

    batch = RayPool(targets, result.student.grid, result.student.step).sample(64, 0.7, torch.Generator().manual_seed(0))
    smooth = jump()
    original = result.student.field.networks.detach().clone()
    with torch.no_grad(): result.student.field.networks[::2, -3:] += 3.0
    try: assert jump() > 2 * smooth
    finally: result.student.field.networks.data.copy_(original)


def test_the_continuity_loss_reduces_the_jump_that_it_measures(data):
    ends = []
    for weight in (1e-6, 0.5):
        records = teach(data, replace(TEACHING, continuity=weight), quiet=True).rays.records
        ends.append(records[-1]["continuity_colour_jump"])
    assert ends[1] < 0.7 * ends[0], ends


# ---- bad input

def test_a_teacher_of_another_up_axis_is_an_error(data, brickyard, tmp_path):
    lying = Gaussians(**{**data.teacher.parameters(), "means": data.teacher.means[:, [2, 0, 1]]})
    write_ply(tmp_path / "lying.ply", lying)
    with pytest.raises(KiloError, match="does not belong to them; its up axis"):
        distillation_data_from_views(load_blender(brickyard, "train"), [], tmp_path / "lying.ply", tmp_path)
    assert check_teacher(data.teacher, targets_from_images(data.photos[:2])) > 25


def test_cameras_that_see_nothing_are_an_error(data):
    away = orbit_cameras(3, 3.0, 0, target=torch.tensor([40.0, 0, 0]), width=16, height=16)
    with pytest.raises(KiloError, match="None of the 3 cameras sees anything"):
        visible_space(GaussianLookup(data.teacher, 0.01), occupancy_of_gaussians(data.teacher, 32), away, 0.03)


def test_a_teacher_with_nan_is_an_error(data, tmp_path):
    means = torch.where(torch.arange(len(data.teacher))[:, None] == 7, torch.nan, data.teacher.means)
    broken = Gaussians(**{**data.teacher.parameters(), "means": means})
    with pytest.raises(KiloError): GaussianLookup(broken, 0.01)
    with pytest.raises(KiloError):
        write_ply(tmp_path / "nan.ply", broken)
        distillation_data_from_ply(tmp_path / "nan.ply")


def test_a_checkpoint_of_another_config_is_refused(data, result, tmp_path):
    """A run is not resumed with another field, and a student's file whose config was changed is not loaded."""
    teach(data, TEACHING, tmp_path / "run", quiet=True)
    with pytest.raises(KiloError) as refusal:
        teach(data, replace(TEACHING, network={"hidden": 16}), tmp_path / "run", resume=True, quiet=True)
    assert "\n" not in str(refusal.value)
    from kilonb.training.checkpoints import read_checkpoint, write_checkpoint

    save_student(result.student, tmp_path / "student.pt", "averaged")
    content = read_checkpoint(tmp_path / "student.pt")
    content["config"]["hidden"] = 16
    write_checkpoint(tmp_path / "other.pt", content)
    with pytest.raises(KiloError, match="does not fit its own settings"): load_student(tmp_path / "other.pt")


def test_an_interrupted_run_without_a_finest_wave_resumes_without_it_only(data, tmp_path):
    """As those of 0.2, whose KiloNeRF had the frequencies of its own default."""
    loop = replace(LOOP, steps=4, warmup_steps=1, ema_decay=None, time_limit_s=1e-6)
    old = replace(TEACHING, finest_wave=0.0, points=None, rays=replace(TEACHING.rays, loop=loop))
    whole = lambda config: replace(config, rays=replace(config.rays, loop=replace(loop, time_limit_s=None)))
    assert teach(data, old, tmp_path, quiet=True).rays.steps < 4
    with pytest.raises(KiloError, match="position_frequencies"):
        teach(data, whole(replace(old, finest_wave=4.0)), tmp_path, resume=True, quiet=True)
    assert teach(data, whole(old), tmp_path, resume=True, quiet=True).rays.steps == 4


def test_views_of_different_sizes_are_an_error(brickyard, tmp_path):
    mixed = [*load_blender(brickyard, "train").subset(range(3)),
             *load_blender(brickyard, "train", 32).subset(range(3, 6))]
    from kilonb.splats.fit_config import FitConfig

    with pytest.raises(KiloError, match="size"):
        distillation_data_from_views(mixed, [], FitConfig(steps=5, initial_count=100), tmp_path)


# ---- the experiments

def run_cli(experiment, brickyard, folder, *arguments) -> subprocess.CompletedProcess:
    return run_here("run", experiment, "--data", f"blender:{brickyard}", *TINY, "--out", folder, "--json", *arguments)


EXPERIMENTS = {
    "multi_view_response": (
        ["-p", "steps=30", "-p", "lpips_every=9"],
        {"test_psnr_srgb_white_db", "test_psnr_vs_teacher_db", "test_gap_to_teacher_db", "seam_ratio", "total_s"},
    ),
    "dir_l_sweep": (
        ["-p", "steps=20", "-p", "frequencies=0,2"],
        {"adopted_frequencies", "L0_colour_loss", "L2_psnr_srgb_foreground_db", "verdict"},
    ),
    "ablations": (
        ["-p", "steps=20", "-p", "only=no points first,opacity target 0.18"],
        {"whole_test_psnr_db", "no_points_first_change_db", "opacity_target_018_change_db"},
    ),
    "multi_view_features": (
        ["-p", "time_limit_s=1", "-p", "policy=off"],
        {"feature_gain_db", "features_cka", "response_test_psnr_srgb_white_db", "promoted"},
    ),
    "students": (
        ["-p", "time_limit_s=0.5"],
        {"kilonerf_frames_per_s", "mlp_size_mb", "hashgrid_test_psnr_srgb_white_db"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_runs_small_and_leaves_its_numbers(brickyard, tmp_path, experiment):
    arguments, wanted = EXPERIMENTS[experiment]
    done = run_cli(experiment, brickyard, tmp_path / "run", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.strip().splitlines()[-1])["results"]
    assert wanted <= set(results), sorted(wanted - set(results))
    assert read_run(tmp_path / "run").status == "finished" and list((tmp_path / "run" / "figures").glob("*.png"))


@pytest.mark.slow
def test_multi_view_features_trains_the_projector_first_and_then_both(brickyard, tmp_path):
    """The warm-up phase, and the joint phase from the step in the results on: the student stands still until then."""
    done = run_cli("multi_view_features", brickyard, tmp_path / "run", "-p", "time_limit_s=1000", "-p", "policy=off",
                   "-p", "lpips_every=9", "-p", "teaching.rays.loop.steps=40", "-p",
                   "teaching.rays.loop.log_every_steps=1")
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.strip().splitlines()[-1])["results"]
    log, start = read_scalars(tmp_path / "run" / "features"), results["joint_phase_step"]
    assert 2 <= start <= 2 + 8 and isinstance(results["promoted"], bool) and results["steps"] == 40
    assert list(log["phase_index"]) == [0.0] * start + [1.0] * (40 - start)
    assert list(log["continuity_phase_weight"]) == list(log["phase_index"])
    assert set(log["features_phase_weight"]) == {1.0}
    response = read_scalars(tmp_path / "run" / "response")
    assert set(response["phase_index"]) == {0.0} and set(response["continuity_phase_weight"]) == {1.0}
