"""Every clause of KiloGS and of the panoramas is reached by a parameter or setting of a command and by a function."""
import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kilonb.batch.arguments import typed_arguments
from kilonb.coop.dataset import Sample, dataset_statistics
from kilonb.coop.evaluation import score_sample
from kilonb.coop.model import ModelConfig
from kilonb.coop.training import CoopConfig, make_model, train_coop
from kilonb.core.configs import apply_settings
from kilonb.core.errors import KiloError
from kilonb.distill.alpha import AlphaBandConfig
from kilonb.distill.features import FeatureConfig, TeacherAdapter, feature_terms, teacher_features
from kilonb.distill.losses import ResponseLossConfig, response_loss
from kilonb.distill.multiview import TeachingConfig
from kilonb.distill.phases import Phase, PhasePlan, apply_phases
from kilonb.distill.rays import RayBatch, RayPool
from kilonb.distill.space import occupancy_of_gaussians
from kilonb.distill.student import DistillConfig, distill, make_student
from kilonb.distill.terms import ExtraTermsConfig, extra_terms
from kilonb.fields.encodings import fourier_encode, fourier_width
from kilonb.fields.kilonerf import KiloNeRFConfig
from kilonb.fields.rendering import RayRender
from kilonb.geometry.cameras import Rays, orbit_cameras
from kilonb.imaging.targets import targets_from_teacher
from kilonb.panoramas.checks import CHECKS, FrameMeasurements, judge_check
from kilonb.panoramas.tiles import PanoramaOptions
from kilonb.runs.notebooks import find_notebook, read_notebook, read_parameters
from kilonb.runs.settings import configure, settings_rows
from kilonb.scenes.brickyard import write_brickyard
from kilonb.scenes.photographs import open_views
from kilonb.splats.fit import fit_gaussians
from kilonb.splats.fit_config import FitConfig, MCMCStrategy, named_strategy
from kilonb.splats.gaussians import gaussians_from_points
from kilonb.splats.lookup import GaussianLookup
from kilonb.training.loop import LoopConfig
from kilonb.training.stop_rules import StopRule
from tests.helpers import run_here

# experiment: parameters and dotted settings by which its clauses are reached
OPTIONS = {
    "teacher":
        "data ply drop_bad activated up masks strategy sh_degree reset_opacity_steps maximum_count lpips_every "
        "fit.strategy.grow_gradient fit.background views.hold_out",
    "single_view_overfit":
        "teacher frame split occupancy direction_frequencies density_bias kilo_nerf.refeed_position kilo_nerf.blend "
        "kilo_nerf.density_scale distill.loop.swa_from distill.fixed_batch",
    "multi_view_response":
        "teacher targets kind views policy teaching.network teaching.continuity teaching.space teaching.coarse_cells "
        "teaching.phases teaching.rays.loss.colour teaching.rays.loss.background teaching.rays.loss.colour_blend "
        "teaching.rays.loss.depth_weight teaching.rays.loss.depth_alpha teaching.rays.residual_share "
        "teaching.rays.march_start teaching.rays.direction.rate teaching.rays.direction.start "
        "teaching.rays.direction.warmup teaching.rays.loop.ema_decay teaching.rays.loop.gradient_clip "
        "teaching.rays.loop.minimum_learning_rate_ratio teaching.rays.loop.schedule_steps "
        "teaching.rays.loop.stop_when teaching.rays.loop.keep_every_steps teaching.rays.loop.keep_from "
        "teaching.rays.loop.keep_until teaching.rays.loop.deterministic teaching.rays.loop.tensorboard_time "
        "teaching.rays.loop.tensorboard_graph teaching.rays.loop.extend extra_terms.opacity_schedule "
        "extra_terms.opacity_target.warmup extra_terms.alpha_guard extra_terms.alpha_band.cap "
        "extra_terms.alpha_band.decay extra_terms.alpha_band.patience extra_terms.alpha_band.rise "
        "extra_terms.alpha_band.fall extra_terms.gradient_ratios_every extra_terms.transmittance_every",
    "single_view_features":
        "channels freeze mask_fraction feature.adapter feature.hidden feature.learning_rate_ratio feature.schedule "
        "feature.cosine_start feature.l2_start feature.cka_every",
    "multi_view_features":
        "joint_cosine joint_wait projector_alone steps targets",
    "dir_l_sweep":
        "frequencies improvement spikes_allowed test_loss_allowed_db",
    "students":
        "cells time_limit_s",
    "compare_checkpoints":
        "run steps weights views split",
    "render_and_rank":
        "student frames start stop step resolution chunk_rays dtype png background worst gallery_views error_gain "
        "rank_by weights lpips_every",
    "score_frames":
        "pictures reference checkpoint weights recomposite method background",
    "panorama_checks":
        "samples split frames width height projection surface previews points panorama.elevation_deg",
    "coop_train":
        "train_split held_out_split most_vehicles coop.steps_per_epoch coop.loss.mask_pos_weight sample.range_m "
        "sample.fewest coop.loss.pose panorama.width",
    "coop_evaluate":
        "run split index pose weights most_drawn",
}

# module: functions by which a script does the same
FUNCTIONS = {
    "splats.formats": "read_gaussians", "splats.fit": "fit_gaussians", "splats.rasterizer": "render_gaussians",
    "distill.features": "teacher_features TeacherAdapter linear_cka feature_terms", "distill.student": "distill",
    "distill.multiview": "teach teach_for_seconds", "distill.preflight": "preflight_teacher",
    "distill.alpha": "alpha_terms", "distill.phases": "apply_phases", "distill.terms": "extra_terms",
    "distill.policy": "adopt_direction_frequencies stage_check", "distill.conditions": "condition_results",
    "distill.diagnostics": "transmittance_report GradientRatios", "distill.checkpoint_scores": "compare_checkpoints",
    "imaging.rendering": "render_frames", "imaging.scoring": "evaluate_frames",
    "imaging.agreement": "disagreements check_agreement", "imaging.gallery": "contact_sheet write_gallery triptych",
    "imaging.summaries": "summarise_methods", "imaging.picture_folders": "score_pictures",
    "training.extending": "requested_extension", "training.determinism": "use_deterministic_algorithms",
    "scenes.rig": "load_rig", "scenes.opv2v": "load_opv2v", "panoramas.stitch": "stitch",
    "panoramas.checks": "run_checks", "panoramas.previews": "write_previews write_panorama_page",
    "imaging.clouds": "write_cloud_page", "coop.training": "train_coop", "coop.evaluation": "evaluate_cooperative",
    "coop.trained": "load_trained_coop write_prediction", "coop.dataset": "dataset_statistics",
}


@pytest.mark.parametrize("experiment", OPTIONS)
def test_every_clause_has_its_option_in_the_command(experiment):
    notebook = read_notebook(find_notebook(experiment, "experiments"))
    known = {*notebook.parameters, *(row[0] for row in settings_rows(notebook.configs))}
    assert set(OPTIONS[experiment].split()) <= known


def test_every_clause_has_a_function():
    for module, names in FUNCTIONS.items():
        loaded = importlib.import_module(f"kilonb.{module}")
        assert set(names.split()) <= set(loaded.__all__), module


def test_the_settings_of_mcmc_are_given_together_on_the_command_line():
    notebook = read_notebook(find_notebook("teacher", "experiments"))
    values = typed_arguments(notebook, ["strategy=mcmc", 'fit.strategy={"noise_rate": 500.0}'], None, {})
    config = configure(FitConfig(strategy=named_strategy("mcmc")), values["settings"])
    assert config.strategy == MCMCStrategy(noise_rate=500.0)


def test_opacities_are_lowered_every_so_many_steps(tmp_path):
    write_brickyard(tmp_path, width=24, height=24, train=3, test=1, count=4000)
    views = open_views("blender", tmp_path, "train")
    config = FitConfig(steps=8, initial_count=200, maximum_count=300, grow_from=0.0, grow_until=1.0)
    plain, reset = (fit_gaussians(views, replace(config, strategy=named_strategy("default", reset_opacity_steps=every)),
                                  quiet=True).gaussians for every in (None, 8))
    assert reset.opacities.max() < 0.021 < 0.1 < plain.opacities.median()


def test_a_teacher_has_52_features_and_directions_are_raw_or_encoded():
    gaussians = gaussians_from_points(torch.rand(50, 3), torch.rand(50, 3), sh_degree=3)
    features = teacher_features(gaussians)
    assert features.shape == (50, 48 + 1 + 3)
    adapter, share = TeacherAdapter(features, gaussians.opacities, 20), gaussians.opacities / gaussians.opacities.sum()
    normal = adapter.normalised(features)
    varied = features.std(0) > 1e-3
    assert ((share[:, None] * normal).sum(0).abs() < 0.05).all() and (normal[:, ~varied] == 0).all()
    assert ((share[:, None] * normal.square()).sum(0)[varied] - 1).abs().max() < 0.1
    directions = torch.nn.functional.normalize(torch.randn(7, 3), dim=-1)
    for frequencies, width in ((0, 3), (2, 15), (4, 27), (6, 39)):
        assert fourier_width(3, frequencies) == width == fourier_encode(directions, frequencies).shape[-1]
        grid = occupancy_of_gaussians(gaussians, 8)
        shape = KiloNeRFConfig(cell_size=0.5, hidden=8, position_frequencies=2, direction_frequencies=frequencies)
        assert make_student(grid, shape, 0.1).field.layout.shapes["direction_layer"][0] == 8 + width
    assert torch.equal(fourier_encode(directions, 0), directions)


def test_the_95th_percentile_of_background_alpha_is_logged_and_ends_a_run():
    n = 200
    target = (torch.arange(n) >= 100).float()
    alpha = torch.where(target > 0, 1.0, torch.linspace(0, 1, n) * 2)
    rays = Rays(torch.zeros(n, 3), torch.zeros(n, 3))
    render = RayRender(torch.zeros(n, 3), alpha, torch.zeros(n), torch.zeros(0), None)
    generator = torch.Generator().manual_seed(0)
    values = response_loss(render, RayBatch(rays, torch.zeros(n, 3), target, torch.zeros(n)), ResponseLossConfig(),
                           generator)
    assert values["ray_alpha_background_p95"] == pytest.approx(alpha[:100].quantile(0.95).item())
    solid = response_loss(render, RayBatch(rays, torch.zeros(n, 3), torch.ones(n), torch.zeros(n)),
                          ResponseLossConfig(), generator)
    assert solid["ray_alpha_background_p95"] == 0, "there is no background"
    notebook = read_notebook(find_notebook("multi_view_response", "experiments"))
    rule = {"value": "ray_alpha_background_p95", "above": 0.5}
    values = typed_arguments(notebook, [f"teaching.rays.loop.stop_when={json.dumps([rule])}"], None, {})
    config = apply_settings(TeachingConfig(), {"rays.loop.stop_when":
                                               values["settings"]["teaching.rays.loop.stop_when"]}, "teaching")
    assert config.rays.loop.stop_when == (StopRule("ray_alpha_background_p95", above=0.5),)


def test_masks_and_coverage_of_the_samples_are_counted():
    mask = torch.zeros(2, 4, 8)
    mask[0, :2] = 1
    coverage = torch.ones(2, 4, 8)
    coverage[1, :, :2] = 0
    sample = Sample("town/0", ("a", "b"), torch.rand(2, 3, 4, 8), 5 * mask, coverage, mask, mask.long(),
                    torch.eye(4).repeat(2, 1, 1))
    numbers = dataset_statistics([sample])
    assert (numbers["samples"], numbers["vehicles_mean"], numbers["mask_mean"]) == (1, 2, 0.25)
    assert numbers["coverage_mean"] == 0.875 and numbers["coverage_min"] == 0.75


@pytest.mark.parametrize("measure, wrong", [("camera_offset_m", 8.5), ("neighbour_nearest_m", 0.5),
                                            ("neighbour_farthest_m", 301.0), ("mask_share", 0.95)])
def test_poses_too_far_or_too_near_and_masks_of_nearly_everything_turn_a_check_red(measure, wrong):
    right = {"camera_offset_m": 2.0, "neighbour_nearest_m": 12.0, "neighbour_farthest_m": 50.0, "mask_share": 0.6}
    check = next(check for check in CHECKS if check.measure == measure)
    for value, verdict in ((right[measure], "green"), (wrong, "red")):
        line = judge_check(check, "train", [FrameMeasurements("a", "train", {measure: value})])
        assert (line.verdict, line.value) == (verdict, value)


def test_inliers_are_ranges_within_three_per_cent():
    ranges, mask = torch.full((1, 4, 8), 10.0), torch.ones(1, 4, 8)
    sample = Sample("town/0", ("a",), torch.rand(1, 3, 4, 8), ranges, mask, mask, mask.long(), torch.eye(4)[None])
    rays = torch.nn.functional.normalize(torch.randn(4, 8, 3), dim=-1)
    predicted = ranges.clone()
    predicted[0, :1], predicted[0, 1:2] = 10.29, 10.31
    assert score_sample(sample, predicted, mask, sample.pose_to_main, rays)["range_inlier"] == 0.75


@pytest.mark.parametrize("experiment", ["coop_train", "coop_overfit"])
def test_the_statistics_of_the_samples_are_among_the_results_of_the_cooperative_experiments(experiment):
    source = find_notebook(experiment, "experiments").read_text(encoding="utf-8")
    assert "dataset_statistics(" in source and "**statistics" in source


def test_help_shows_comments_behind_and_above_a_parameter():
    source = ('# which of them:\n# one or all\nfirst: str = "all"\nsecond: int = 2      # a number\n\n# alone\n\n'
              'third: int = 3\n# above\nfourth: int = 4    # behind\n')
    texts = {name: parameter.help for name, parameter in read_parameters(source).items()}
    assert texts == {"first": "which of them: one or all", "second": "a number", "third": "", "fourth": "behind"}
    for name in ("targets", "data"):
        notebook = read_notebook(Path(find_notebook("multi_view_response", "experiments")))
        assert notebook.parameters[name].help, name


def test_a_student_with_terms_and_phases_is_extended_and_their_schedules_stay_at_their_end(tmp_path):
    shell = torch.nn.functional.normalize(torch.randn(600, 3, generator=torch.Generator().manual_seed(0)), dim=-1) * 0.6
    ball = gaussians_from_points(shell, (shell * 4).sin() / 2 + 0.5, sh_degree=0, opacity=0.9, scale=0.8)
    cameras = [(f"r_{i}", camera) for i, camera in enumerate(orbit_cameras(2, 3.0, 30, width=24, height=24))]
    grid = occupancy_of_gaussians(ball, 20)
    pool = RayPool(targets_from_teacher(ball, cameras), grid, 0.08)
    names = ["features", "alpha_band", "opacity"]
    phases = (Phase("first", dict.fromkeys(names, 0.5), share=0.25), Phase("rest", dict.fromkeys(names, 1.0)))
    extra = ExtraTermsConfig(alpha_guard=True, opacity_schedule=True, alpha_band=AlphaBandConfig(patience=2))

    def run(steps: int, extend: str = ""):
        student = make_student(grid, KiloNeRFConfig(cell_size=0.6, position_frequencies=3, hidden=16), 0.08)
        config = DistillConfig(rays=64, loop=LoopConfig(steps, 5e-3, warmup_steps=2, log_every_steps=1, extend=extend))
        terms = [*feature_terms(FeatureConfig(projector_alone=0.0, channels=4, minimum_density=0.0))(steps)(
            student, GaussianLookup(ball, 0.02)), *extra_terms(extra, config)(student, None)]
        plan = PhasePlan(phases, steps, [term.name for term in terms], check_every=2, report=lambda message: None)
        return distill(student, pool, config, tmp_path, terms=apply_phases(plan, terms, student), resume=bool(extend),
                       quiet=True)

    first, longer = run(12), run(24, "constant")
    assert (first.steps, longer.steps, longer.resumed_from) == (12, 24, 12)
    assert [r["phase_index"] for r in longer.records] == [0.0] * 3 + [1.0] * 21
    ends = {(r["opacity_target"], r["opacity_weight_effective"]) for r in longer.records[11:]}
    assert len(ends) == 1 and longer.records[3]["opacity_target"] == first.records[3]["opacity_target"]


def test_a_cooperative_run_is_extended(tmp_path, monkeypatch):
    options = PanoramaOptions(128, 32)
    model = ModelConfig(widths=(8, 16, 16, 32), blocks=1, column_width=32, pair_blocks=1, pose="pooled")
    mask, poses = torch.ones(2, 32, 128), torch.eye(4).repeat(2, 1, 1)
    poses[1, 2, 3] = 12.0
    sample = Sample("town/0", ("a", "b"), torch.rand(2, 3, 32, 128), 5 * mask, mask, mask, mask.long(), poses)
    for steps in (2, 3):
        config = CoopConfig(steps=steps, batch_size=1, log_every_steps=1, warmup=0.0, model=model)
        network = make_model(options.camera(), config)
        if steps == 3:
            with pytest.raises(KiloError, match="extend"):
                train_coop(network, [sample], options.camera(), config, tmp_path, resume=True, quiet=True)
            with pytest.raises(KiloError, match=r"settings\.config"):
                monkeypatch.setenv("KILONB_EXTEND", "constant")
                train_coop(network, [sample], options.camera(), replace(config, mirror=True), tmp_path, resume=True,
                           quiet=True)
        result = train_coop(network, [sample], options.camera(), config, tmp_path, resume=steps == 3, quiet=True)
    assert result.steps == 3 and result.resumed_from == 2


def results_of(experiment: str, folder: Path, *arguments: str) -> dict:
    """Results of `kilonb run`. arguments: name=value of parameters."""
    options = [part for argument in arguments for part in ("-p", argument)]
    done = run_here("run", experiment, "--out", folder, "--json", *options)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])["results"]


@pytest.mark.slow
def test_kept_checkpoints_are_compared_by_the_command(tmp_path):
    results = results_of("compare_checkpoints", tmp_path / "run", "views=2")
    assert results["checkpoints"] == 4 and results["views"] == 2 and results["weights"] == "averaged"
    assert results["best_gap_db"] == pytest.approx(results["best_white_db"] - results["best_foreground_db"])


@pytest.mark.slow
def test_features_of_a_single_view_are_distilled_by_the_command(tmp_path):
    write_brickyard(tmp_path / "yard", width=40, height=40, train=2, test=1, count=4000)
    results = results_of("single_view_features", tmp_path / "run", f"data=blender:{tmp_path / 'yard'}", "policy=off",
                         "time_limit_s=1", "cells=5", "march_steps=40", "voxels=32", "rays=256", "points_steps=10",
                         "resolution=0")
    assert results["psnr_srgb_white_db"] - results["response_psnr_srgb_white_db"] == pytest.approx(
        results["feature_gain_db"])
    assert 0 <= results["features_cka"] <= 1 and 0 < results["mask_share"] <= 1
