"""Options of a distillation: losses, schedules, samples and spaces; each from a config, and by `kilonb run`."""
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kilonb.core.configs import apply_settings, parse_value
from kilonb.core.errors import KiloError
from kilonb.distill.ablations import ABLATIONS
from kilonb.distill.conditions import condition_results
from kilonb.distill.data import chosen_views, open_distillation_data
from kilonb.distill.diagnostics import GradientRatios, TransmittanceLog
from kilonb.distill.direction import DirectionConfig, direction_slice
from kilonb.distill.features import FeatureConfig, feature_terms, feature_weights
from kilonb.distill.figures import measurement_figures
from kilonb.distill.losses import COLOUR_LOSSES, ResponseLossConfig, colour_error
from kilonb.distill.multiview import TeachingConfig, choose_targets, space_of_scene, teach
from kilonb.distill.points import PointsConfig
from kilonb.distill.policy import adopt_direction_frequencies
from kilonb.distill.preflight import preflight_teacher
from kilonb.distill.rays import RayPool
from kilonb.distill.single_view import load_single_view
from kilonb.distill.space import occupancy_of_gaussians
from kilonb.distill.student import DistillConfig, Student, distill, load_student, make_student, save_student
from kilonb.distill.terms import ExtraTermsConfig, extra_terms, terms_by_steps
from kilonb.fields.kilonerf import KiloNeRFConfig
from kilonb.geometry.cameras import orbit_cameras
from kilonb.imaging.targets import targets_from_images, targets_from_teacher
from kilonb.scenes.brickyard import write_brickyard
from kilonb.splats.gaussians import Gaussians, gaussians_from_points
from kilonb.splats.lookup import GaussianLookup
from kilonb.training.loop import LoopConfig
from tests.helpers import run_here

LOOP = LoopConfig(steps=12, learning_rate=5e-3, warmup_steps=2, ema_decay=0.9, log_every_steps=1,
                  checkpoint_every_seconds=None)


@pytest.fixture(scope="module")
def ball() -> Gaussians:
    generator = torch.Generator().manual_seed(0)
    shell = torch.nn.functional.normalize(torch.randn(900, 3, generator=generator), dim=-1) * 0.6
    return gaussians_from_points(shell, (shell * 4).sin() / 2 + 0.5, sh_degree=0, opacity=0.9, scale=0.8)


@pytest.fixture(scope="module")
def pool(ball) -> RayPool:
    cameras = [(f"train/r_{i}", camera) for i, camera in enumerate(orbit_cameras(3, 3.0, 30, width=32, height=32))]
    return RayPool(targets_from_teacher(ball, cameras), occupancy_of_gaussians(ball, 24), 0.05)


@pytest.fixture(scope="module")
def yard(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("yard")
    write_brickyard(folder, width=40, height=40, train=6, test=2, count=4000)
    return folder


def fresh(ball, **shape) -> Student:
    return make_student(occupancy_of_gaussians(ball, 24),
                        KiloNeRFConfig(**{"cell_size": 0.5, "position_frequencies": 3, "hidden": 16,
                                          "density_bias": 2.0, **shape}), 0.05)


def trained(ball, pool, terms=(), shape=None, **changes):
    student = fresh(ball, **(shape or {}))
    config = replace(DistillConfig(rays=128, first_refresh=5, loop=LOOP), **changes)
    result = distill(student, pool, config, terms=terms, quiet=True)
    return student, result.records


def weights(student) -> torch.Tensor: return student.field.networks.detach()


# ---- the defaults change nothing

def test_options_that_are_written_out_with_their_defaults_give_the_same_weights_to_the_last_bit(ball, pool):
    plain, _ = trained(ball, pool)
    written, _ = trained(ball, pool, residual_share=0.0, march_start=1.0, march_ramp=0.1, direction=DirectionConfig(),
                         loss=ResponseLossConfig(colour="l2", colour_blend=0.9), shape={"blend": 0.0})
    measured, _ = trained(ball, pool, terms=[GradientRatios(ResponseLossConfig(), 3), TransmittanceLog(4)])
    assert torch.equal(weights(plain), weights(written)) and torch.equal(weights(plain), weights(measured))


@pytest.mark.parametrize("option", [
    {"residual_share": 0.5}, {"march_start": 4.0}, {"direction": DirectionConfig(rate=0.1)},
    {"direction": DirectionConfig(start=0.5)}, {"loss": ResponseLossConfig(colour="blend")},
    {"shape": {"blend": 0.2}}, {"shape": {"refeed_position": True}}, {"shape": {"density_bias": 0.5}},
    {"fixed_batch": True}], ids=str)
def test_every_option_matters(ball, pool, option):
    plain, other = trained(ball, pool)[0], trained(ball, pool, **option)[0]
    assert weights(plain).shape != weights(other).shape or not torch.equal(weights(plain), weights(other))


# ---- losses

def test_a_blend_of_colours_is_the_weighted_sum_and_not_charbonnier():
    predicted, target = torch.rand(50, 3), torch.rand(50, 3)
    l2, robust, blend = (colour_error(predicted, target, kind, 0.01, 0.3) for kind in COLOUR_LOSSES)
    torch.testing.assert_close(blend, 0.7 * l2 + 0.3 * robust)
    assert blend != robust
    for wrong in ({"colour": "blent"}, {"colour": "blend", "colour_blend": 1.1}, {"colour_blend": math.nan}):
        with pytest.raises(KiloError): ResponseLossConfig(**wrong)
    with pytest.raises(KiloError, match="did you mean 'charbonnier'"):
        colour_error(predicted, target, "charbonier", 0.01)


def test_masks_and_the_alpha_penalty_are_in_the_log_of_every_run(ball, pool):
    for record in trained(ball, pool)[1]:
        assert 0 < record["mask_mean_true"] < 1 and 0 <= record["mask_mean_predicted"] <= 1
        assert record["alpha_penalty"] >= 0


def test_the_gradient_of_every_term_and_of_the_direction_branch_is_logged(ball, pool):
    extra = ExtraTermsConfig(alpha_guard=True, opacity_schedule=True, gradient_ratios_every=4,
                             alpha_band=replace(ExtraTermsConfig().alpha_band, patience=2, weight=0.1))
    student, config = fresh(ball), DistillConfig(rays=128, loop=LOOP, loss=ResponseLossConfig(depth_weight=0.1))
    settings = FeatureConfig(projector_alone=0.0, channels=4, minimum_density=0.0)
    features = feature_terms(settings)(12)(student, GaussianLookup(ball, 0.02))
    records = distill(student, pool, config, terms=[*features, *extra_terms(extra, config)(student, None)],
                      quiet=True).records
    names = {"alpha", "depth", "features", "alpha_band", "opacity", "direction"}
    assert {f"gradients_ratio_{name}" for name in names} <= set(records[4])
    assert records[4]["gradients_norm_features"] > 0 and records[4]["gradients_norm_direction"] > 0
    assert "gradients_norm_colour" not in records[1]


def test_gradients_of_a_frozen_student_are_not_measured_and_do_not_end_the_run(ball, pool):
    student = fresh(ball)
    term = GradientRatios(ResponseLossConfig(), 1)
    student.requires_grad_(False)
    assert term(0, student, None, None, None) == {} == term.measure(0, {"total": torch.zeros(())}, student)


def test_the_transmittance_of_the_rays_is_kept_on_the_way_and_drawn(ball, pool):
    records = trained(ball, pool, terms=[TransmittanceLog(4)])[1]
    rows = [r for r in records if "light_object_0" in r]
    assert [r["step"] for r in rows] == [1, 5, 9]
    assert all(abs(sum(r[f"light_object_{i}"] for i in range(8)) - 1) < 1e-4 for r in rows)
    assert list(measurement_figures({"a": records, "b": [{"step": 1, "loss": 0.1}]})) == ["transmittance_a"]


def test_cosine_and_squared_error_have_schedules_of_their_own():
    config = FeatureConfig(schedule="separate", cosine_weight=0.5, cosine_start=0.2, cosine_ramp=0.2, l2_weight=2.0,
                           l2_start=0.0, l2_ramp=0.5)
    assert feature_weights(config, 0.1) == (0.0, pytest.approx(0.4)) and feature_weights(config, 1.0) == (0.5, 2.0)
    assert feature_weights(FeatureConfig(), 0.2) == (0.01, 0.0)                             # the fade is unchanged
    for wrong in ({"l2_start": 0.1}, {"schedule": "separate", "fade_end": 0.9}, {"schedule": "both"},
                  {"schedule": "separate", "l2_ramp": -0.1}):
        with pytest.raises(KiloError): FeatureConfig(**wrong)


# ---- the direction branch, samples, cells

def test_the_direction_branch_starts_late_and_is_zero_until_then(ball, pool):
    student, _ = trained(ball, pool, direction=DirectionConfig(start=1.0))
    columns = direction_slice(student.field)
    assert (weights(student)[:, columns] == 0).all()
    late, _ = trained(ball, pool, direction=DirectionConfig(start=0.5, rate=0.5))
    assert (weights(late)[:, columns] != 0).any()


def test_the_direction_branch_of_a_resumed_run_is_that_of_an_uninterrupted_one(ball, pool, tmp_path):
    config = DistillConfig(rays=128, first_refresh=5, loop=replace(LOOP, checkpoint_every_steps=1), residual_share=0.5,
                           direction=DirectionConfig(0.5, 0.3, 0.2), march_start=3.0)
    whole, halves = fresh(ball), fresh(ball)
    distill(whole, pool, config, tmp_path / "whole", quiet=True)

    class Stop(TransmittanceLog):
        def after_step(self, step):
            if step == 6 and self.every == 1: raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(halves, pool, config, tmp_path / "halves", terms=[Stop(1)], quiet=True)
    distill(halves, pool, config, tmp_path / "halves", terms=[Stop(2)], resume=True, quiet=True)
    assert torch.equal(weights(whole), weights(halves))


def test_a_ramp_of_the_samples_begins_with_fewer(ball, pool):
    plain = trained(ball, pool, first_refresh=0)[1]
    ramped = trained(ball, pool, first_refresh=0, march_start=4.0, march_ramp=0.5)[1]
    assert ramped[0]["samples_per_ray"] < 0.4 * plain[0]["samples_per_ray"]
    assert ramped[-1]["samples_per_ray"] == pytest.approx(plain[-1]["samples_per_ray"], rel=0.2)


def test_blended_cells_are_saved_and_rendered_as_they_were_trained(ball, pool, tmp_path):
    student, _ = trained(ball, pool, shape={"blend": 0.1})
    save_student(student, tmp_path / "student.pt", "averaged")
    again, _ = load_student(tmp_path / "student.pt")
    camera = orbit_cameras(1, 3.0, 30, width=16, height=16)[0]
    assert again.field.config.blend == 0.1 and torch.equal(again.render(camera).alpha, student.render(camera).alpha)


def test_a_student_of_an_older_file_without_the_option_has_no_blending(ball, tmp_path):
    student = fresh(ball)
    save_student(student, tmp_path / "student.pt", "raw")
    content = torch.load(tmp_path / "student.pt", weights_only=True)
    assert content is not None and load_student(tmp_path / "student.pt")[0].field.config.blend == 0.0


# ---- views, targets, spaces

def test_views_are_chosen_by_name_or_number_and_an_unknown_name_is_refused_with_the_nearest(yard, tmp_path):
    data = open_distillation_data("blender", yard, tmp_path, views="r_3, train/r_1")
    assert [name for name, _ in data.train] == ["train/r_3", "train/r_1"]
    assert len(open_distillation_data("blender", yard, tmp_path, views="3").train) == 3
    with pytest.raises(KiloError, match=r"did you mean '(train/)?r_3'"):
        open_distillation_data("blender", yard, tmp_path, views="r_3,r_33")
    assert parse_value("r_3,r_7", int | str) == "r_3,r_7" and parse_value("4", int | str) == 4
    with pytest.raises(KiloError): chosen_views(data.train, " , ")


def test_the_space_may_be_bounded_by_gaussians_masks_or_both(yard, tmp_path):
    data = open_distillation_data("blender", yard, tmp_path)
    cameras, masks = [camera for _, camera in data.train], targets_from_images(data.photos)
    config = TeachingConfig(cells=4, march_steps=40, voxels=32)
    grids = {kind: space_of_scene(data.teacher, cameras, replace(config, space=kind), masks=masks)[0]
             for kind in ("gaussians", "masks", "both")}
    assert not (grids["both"].occupied & ~grids["gaussians"].occupied).any() and grids["masks"].occupied.any()
    opaque = [replace(target, alpha=torch.ones_like(target.alpha)) for target in masks]
    with pytest.raises(KiloError, match="no masks"):
        space_of_scene(data.teacher, cameras, replace(config, space="both"), masks=opaque)
    fractions = {kind: load_single_view(yard, voxels=32, space=kind).grid.fraction for kind in ("masks", "both")}
    assert fractions["both"] < fractions["masks"]
    with pytest.raises(KiloError, match="did you mean 'both'"): load_single_view(yard, space="bot")


def test_targets_are_chosen_and_photographs_that_are_not_there_are_refused(yard, tmp_path):
    photos = open_distillation_data("blender", yard, tmp_path, views=2)
    renders = open_distillation_data("ply", yard / "teacher.ply", tmp_path, views=2, test_views=1, width=32)
    assert [choose_targets(word, photos) for word in ("auto", "teacher", "both")] == ["images", "teacher", "both"]
    assert choose_targets("auto", renders) == "teacher"
    for data, word in ((renders, "images"), (photos, "photos")):
        with pytest.raises(KiloError): choose_targets(word, data)


def test_a_coarse_student_may_come_first(yard, tmp_path):
    data = open_distillation_data("blender", yard, tmp_path, views=3)
    config = TeachingConfig(cells=5, march_steps=40, voxels=32, coarse_cells=2, coarse_steps=6,
                            points=PointsConfig(bank=4000, points=1000, loop=replace(LOOP, steps=6, ema_decay=None)),
                            rays=DistillConfig(rays=128, loop=replace(LOOP, steps=6)))
    result = teach(data, config, tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / "coarse" / "metrics.csv").is_file() and result.rays.steps == 6
    for wrong in ({"coarse_cells": 5}, {"coarse_cells": 2, "kind": "mlp"}, {"coarse_cells": -1}):
        with pytest.raises(KiloError): replace(config, **wrong)


# ---- results

def test_promotion_conditions_are_among_the_results(ball, pool):
    extra = ExtraTermsConfig(opacity_schedule=True)
    config = DistillConfig(rays=128, loop=LOOP)
    records = distill(fresh(ball), pool, config, terms=extra_terms(extra, config)(None, None), quiet=True).records
    found = condition_results(records)
    assert {"colour_loss_end", "colour_loss_slope", "alpha_spike_share", "alpha_penalty_p90", "alpha_penalty_p99",
            "opacity_weight_monotone"} <= set(found)
    assert found["opacity_weight_monotone"] == 1.0 and found["alpha_penalty_p90"] <= found["alpha_penalty_p99"]
    assert "mask_share" not in found and all(math.isfinite(value) for value in found.values())


def test_a_lower_training_loss_is_vetoed_by_worse_test_views():
    def of(loss, test): return {"colour_loss": loss, "psnr_srgb_foreground_db": 25.0, "alpha_spike_share": 0.0,
                                "psnr_srgb_white_db": test}
    vetoed = adopt_direction_frequencies({2: of(0.01, 31.0), 4: of(0.0099, 31.0), 6: of(0.00881, 29.7)})
    assert vetoed.adopted == 2 and "vetoed, 1.30 dB worse" in vetoed.sentence
    assert adopt_direction_frequencies({2: of(0.01, 31.0), 6: of(0.00881, 30.85)}).adopted == 6
    with pytest.raises(KiloError, match="no number 'psnr_srgb_white_db'"):
        adopt_direction_frequencies({2: of(0.01, 31.0), 6: of(0.005, math.inf)})


def test_a_teacher_with_a_fault_fails_its_preflight(ball):
    assert preflight_teacher(ball).ok
    nan = ball.means.clone()
    nan[3] = math.nan
    for parts, word in (({"means": nan}, "not finite"), ({"log_scales": ball.log_scales + 6}, "largest gaussian"),
                        ({"logit_opacities": ball.logit_opacities - 20}, "Only 0 of 900")):
        found = preflight_teacher(Gaussians(**{**ball.parameters(), **parts}))
        assert any(word in problem for problem in found.problems), found.problems
        with pytest.raises(KiloError, match="preflight"): found.check()


def test_an_entry_of_the_network_is_set_by_its_name_and_the_others_stay():
    config = TeachingConfig(network={"direction_frequencies": 2})
    changed = apply_settings(config, {"network.refeed_position": True, "rays.direction.start": 0.2})
    assert changed.network == {"direction_frequencies": 2, "refeed_position": True}
    assert changed.rays.direction.start == 0.2
    with pytest.raises(KiloError, match="did you mean 'refeed_position'"):
        apply_settings(config, {"network.refeed_positon": True})


def test_terms_are_made_for_the_number_of_steps_and_ablations_name_the_new_options():
    extra = ExtraTermsConfig(opacity_schedule=True, transmittance_every=5)
    terms = terms_by_steps(extra, TeachingConfig())(77)(None, None)
    assert [term.name for term in terms] == extra.names == ["opacity", "light"] and terms[0].steps == 77
    assert {"blended colour", "late direction", "resampled by error", "blended cells"} <= set(ABLATIONS)


# ---- by command

@pytest.mark.slow
def test_the_options_are_reached_by_the_command(yard, tmp_path):
    settings = ["steps=8", "rays=128", "march_step_m=0.004", "occupancy=both", "occupancy_resolution=64",
                "kilo_nerf.refeed_position=true", "kilo_nerf.blend=0.1", "distill.loss.colour=blend",
                "distill.residual_share=0.3", "distill.direction.start=0.3", "distill.march_start=2",
                "distill.loop.log_every_steps=1", "extra_terms.opacity_schedule=true",
                "extra_terms.gradient_ratios_every=2", "extra_terms.transmittance_every=2"]
    done = run_here("run", "single_view_overfit", "--data", f"blender:{yard}", "--out", tmp_path / "run", "--json",
                    *(part for setting in settings for part in ("-p", setting)))
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout.strip().splitlines()[-1])["results"]
    assert {"colour_loss_end", "alpha_penalty_p99", "opacity_weight_monotone"} <= set(results)
    figures = {path.stem for path in (tmp_path / "run" / "figures").glob("*.png")}
    assert {"gradients_student", "transmittance_student"} <= figures
