"""An empty set has no score: means over views, masks, events, points, pairs; and no perfect one."""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kilonb.coop.evaluation import aggregate_scores
from kilonb.dream.readout import _curves, _summary
from kilonb.flux4d.evaluation import mean_of_rows
from kilonb.imaging.inspection import score_gaussians
from kilonb.imaging.scoring import Evaluation
from kilonb.metrics.events import EventEpisode, score_events
from kilonb.metrics.flow import mean_or_none, median_or_none
from kilonb.metrics.images import (evaluate_image, evaluation_table, masked_psnr_db, masked_ssim, mean_over_views,
                                   mean_scores, self_check, views_left_out)
from kilonb.metrics.masks import intersection_over_union
from kilonb.metrics.points import chamfer_m, within_factor_share
from kilonb.metrics.pose import auc_at, direction_error_deg
from kilonb.metrics.probes import r_squared
from kilonb.pose.scores import SCORES, animal_scores
from kilonb.runs.gates import Gate, NOT_RUN, check_gates
from kilonb.splats.gaussians import Gaussians, gaussians_from_points

EMPTY = torch.zeros(16, 16, 3), torch.zeros(16, 16)


def full(level: float) -> tuple[torch.Tensor, torch.Tensor]: return torch.full((16, 16, 3), level), torch.ones(16, 16)


def test_the_mean_over_views_leaves_out_and_counts_what_has_no_number():
    assert mean_over_views([20.0, math.inf, 40.0]) == (30.0, 1) and mean_over_views([30.0]) == (30.0, 0)
    assert mean_over_views([]) == (None, 0) and mean_over_views([None, math.nan, math.inf]) == (None, 3)
    assert mean_over_views(iter([1, 2.0])) == (1.5, 0)
    assert mean_over_views([20.0, -math.inf])[0] == -math.inf, "a fault is not hidden"


def test_an_empty_view_drawn_empty_changes_no_mean_and_is_named():
    seen = evaluate_image(*full(.5), *full(.6))
    empty, hazy = evaluate_image(*EMPTY, *EMPTY), evaluate_image(EMPTY[0], EMPTY[1] + .1, *EMPTY)
    assert empty["psnr_srgb_foreground_db"] is None and empty["psnr_srgb_white_db"] == math.inf
    assert mean_scores({"a": seen, "b": empty}) == mean_scores({"a": seen})
    assert views_left_out({"a": seen, "b": empty, "c": hazy}) == ["b"]
    with_haze = mean_scores({"a": seen, "b": empty, "c": hazy})
    assert with_haze["psnr_srgb_white_db"] == pytest.approx((seen["psnr_srgb_white_db"] + 20) / 2)
    assert set(mean_scores({"b": empty}).values()) == {None} and mean_scores({}) == {}
    assert "1 of 2 views left out" in evaluation_table({"a": seen, "b": empty}) and self_check(*EMPTY)


def test_an_evaluation_counts_the_views_left_out_and_its_gates_are_not_green_without_one():
    seen, empty = evaluate_image(*full(.5), *full(.6)), evaluate_image(*EMPTY, *EMPTY)
    evaluation = Evaluation("model", "", "raw", {"a": seen, "b": empty}, [])
    results = evaluation.results()
    assert results["test_views"] == 2 and results["test_views_left_out"] == 1
    assert math.isfinite(results["test_psnr_srgb_white_db"]) and results["test_worst_view"] == "a"
    nothing = Evaluation("model", "", "raw", {"b": empty}, []).results()
    report = check_gates(nothing, [Gate("test_psnr_srgb_white_db", at_least=30.0)])
    assert nothing["test_psnr_srgb_white_db"] is None and report.lines[0].verdict == NOT_RUN
    assert json.loads(json.dumps(results, allow_nan=False, default=str))


def test_a_view_without_object_or_background_has_no_mean_alpha():
    ball = gaussians_from_points(torch.zeros(1, 3), torch.full((1, 3), .5), sh_degree=0, opacity=.01, scale=.01)
    assert isinstance(ball, Gaussians)
    from kilonb.geometry.cameras import orbit_cameras
    camera = orbit_cameras(1, 3.0, 0, width=16, height=16)[0]
    views = [SimpleNamespace(name=name, camera=camera, rgba_straight=lambda alpha=alpha: torch.full((16, 16, 4), alpha))
             for name, alpha in (("empty", 0.0), ("full", 1.0))]
    scores = score_gaussians(ball, views)
    assert scores.object_alpha[0] is None and scores.background_alpha[1] is None
    assert mean_over_views(scores.object_alpha)[1] == 1 == mean_over_views(scores.background_alpha)[1]


def test_empty_masks_points_pairs_and_rows_have_no_score():
    nothing = torch.zeros(4, 4)
    assert intersection_over_union(nothing, nothing).isnan() and intersection_over_union(nothing + 1, nothing) == 0
    both = intersection_over_union(torch.stack([nothing, nothing + 1]), torch.stack([nothing, nothing + 1]))
    assert both.nanmean() == 1 and both.isnan().tolist() == [True, False]
    picture = torch.rand(16, 16, 3)
    no_pixel = torch.zeros(16, 16, dtype=torch.bool)
    assert masked_psnr_db(picture, picture, no_pixel) is None and masked_ssim(picture, picture, no_pixel) is None
    assert chamfer_m(torch.zeros(0, 3), torch.zeros(2, 3)) is None
    assert chamfer_m(torch.zeros(1, 3), torch.zeros(1, 3)) == 0
    assert within_factor_share(torch.zeros(0), torch.zeros(0), 1.03).isnan()
    assert auc_at(torch.zeros(0), 5.0) is None and auc_at(torch.tensor([0.0]), 5.0) == 1
    assert auc_at(torch.tensor([math.nan]), 5.0) == 0, "an error that is not a number is no success"
    assert direction_error_deg(torch.zeros(3), torch.ones(3)).isnan(), "no motion predicted is not the right direction"
    assert mean_or_none(torch.zeros(0)) is None is median_or_none(torch.zeros(0)) and mean_or_none(torch.ones(1)) == 1
    assert r_squared(np.zeros((0, 1)), np.zeros((0, 1))) is None is r_squared(np.ones((3, 1)), np.ones((3, 1)))


def test_without_events_or_predictions_no_precision_recall_or_f1():
    frames = np.zeros(20, bool)
    one = frames.copy()
    one[5] = True
    for predicted, true in ((frames, frames), (one, frames)):
        assert set(score_events([EventEpisode(predicted, true)], shifts=0).values.values()) == {None}
    silent = score_events([EventEpisode(frames, one)], shifts=0).values
    assert silent["precision"] is None and silent["recall"] == 0 and silent["f1"] is None


def test_scores_of_the_newer_systems_have_none_for_nothing():
    assert set(aggregate_scores([]).values()) == {None}
    alone = {"translation_m": [], "rotation_deg": [], "direction_deg": [], "mask_iou": [math.nan, .5],
             "range_abs_rel": None, "range_inlier": None, "chamfer_m": None, "chamfer_true_pose_m": None}
    scores = aggregate_scores([alone])
    assert scores["pose_translation_median_m"] is None and scores["mask_iou"] == .5 and scores["chamfer_m"] is None
    assert mean_of_rows([{"psnr_full_db": math.inf}, {"psnr_full_db": 20.0}]) == {"psnr_full_db": 20.0,
                                                                                  "psnr_full_db_skipped": 1}
    assert mean_of_rows([]) == {}
    rgb = torch.ones(32, 32, 3)
    assert set(animal_scores(rgb, rgb[..., 0] * 0, rgb, rgb[..., 0] * 0).values()) == {None}
    assert "iou" in SCORES


def test_imagined_steps_that_nothing_could_foresee_have_no_score():
    whole = {name: torch.zeros(2, 3) for name in ("known", "error", "position", "sequence", "repeat_error",
                                                  "repeat_position", "repeat_sequence")}
    summary = _summary(whole)
    assert summary["psnr_db"] is None is summary["position_right"], "not 99 dB and 0%"
    assert all(math.isnan(value) for value in _curves(whole)["psnr_db"])
    whole["known"] = torch.ones(2, 3)
    assert _summary(whole)["psnr_db"] == 99.0


def test_a_teacher_with_an_empty_test_view_has_finite_results():
    """The fit's own evaluations and the experiment's summary, on views of which one is empty."""
    from kilonb.geometry.cameras import orbit_cameras
    from kilonb.splats.fit import held_out_scores

    far = gaussians_from_points(torch.tensor([[0.0, 0.0, 0.0]]), torch.full((1, 3), .5), sh_degree=0, opacity=.9,
                                scale=.3)
    cameras = orbit_cameras(2, 3.0, 0, width=24, height=24)
    pictures = torch.zeros(2, 24, 24, 4)
    pictures[1, 8:16, 8:16] = torch.tensor([.2, .4, .6, 1.0])
    away = Gaussians(far.means + torch.tensor([0.0, 0.0, 50.0]), far.quats, far.log_scales, far.logit_opacities, far.sh)
    views = SimpleNamespace(cameras=cameras, device=torch.device("cpu"), premultiplied=lambda i: (
        pictures[i, ..., :3] * pictures[i, ..., 3:], pictures[i, ..., 3:]))
    scores = held_out_scores(away, views)
    assert math.isfinite(scores["psnr_srgb_white_db"]) and scores["background_alpha"] == 0
    only_empty = SimpleNamespace(cameras=cameras[:1], device=views.device, premultiplied=views.premultiplied)
    assert held_out_scores(away, only_empty)["psnr_srgb_white_db"] is None
