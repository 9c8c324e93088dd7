"""Stitching without depth: surfaces, filled holes, tilted edges, exposure and coverage by name, and what is refused."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from kilonb import stitch
from kilonb.core.errors import KiloError
from kilonb.panoramas.checks import CHECKS, measure_coverage, scanned_points, stitch_frame
from kilonb.panoramas.exposure import tone_curves
from kilonb.panoramas.surface_comparison import compare_surfaces, stitch_on, surface_results
from kilonb.panoramas.tiles import PanoramaOptions, make_tile
from kilonb.panoramas.truth import compare_frame
from kilonb.panoramas.uprights import upright_tilts
from kilonb.scenes.boxtown import TownConfig, build_town, write_opv2v
from kilonb.scenes.opv2v import load_opv2v
from kilonb.scenes.raycast import SpinningLidar

OPTIONS = PanoramaOptions(width=360, height=90)
STOPS = .5, -.5, .25, -.25
LIDAR = SpinningLidar(tuple(np.linspace(-25, 5, 32).tolist()), 400, 0.0, far_m=120.0)


@pytest.fixture(scope="module")
def frame(tmp_path_factory):
    root = tmp_path_factory.mktemp("town") / "data"
    town = build_town(TownConfig(connected=2, duration_s=2), seed=71)
    write_opv2v(root, town, 2, 1, 240, 180, lidar=LIDAR, samples=2)
    return stitch_frame(load_opv2v(root)[0], OPTIONS)


@pytest.fixture(scope="module")
def scores(frame): return {score.surface: score for score in compare_surfaces(frame)}


def test_the_default_without_depth_is_the_best_surface_on_a_town_that_chose_no_constant(scores):
    far, ground, bowl, lidar = (scores[name].psnr_covered_db for name in ("far", "ground", "bowl", "lidar"))
    assert lidar > bowl > ground > far and bowl > ground + 1 and bowl > far + 1
    assert surface_results(list(scores.values()))["surface_margin_db"] == pytest.approx(
        lidar - max(bowl, scores["stereo"].psnr_covered_db))


def test_no_covered_direction_stays_black(frame, scores):
    covered = frame.directions.float().mean().item()
    for name in ("lidar", "bowl", "ground", "stereo"):
        panorama = scores[name].panorama
        assert panorama.painted[frame.directions].float().mean() > .995 and scores[name].seen_share < covered
        black = (panorama.rgb_srgb.amax(-1) == 0) & frame.directions
        assert black.float().mean() < .005, name
    assert not (frame.panorama.filled & frame.panorama.coverage).any()


def test_flat_ground_tilts_upright_edges_more_than_the_bowl_and_the_far_field_not_at_all(frame, scores):
    assert scores["far"].tilt_p90_deg < .1 < scores["ground"].tilt_p90_deg
    assert scores["bowl"].tilt_p90_deg < scores["ground"].tilt_p90_deg
    cameras = [view.camera for view in frame.views]
    assert upright_tilts(scores["far"].panorama, cameras).nan_to_num(0).max() < .1


def test_half_a_stop_between_cameras_is_balanced_to_four_grey_levels(frame):
    views = [replace(view, rgb_srgb=_exposed(view.rgb_srgb, stops)) for view, stops in zip(frame.views, STOPS)]
    panorama = stitch_on(frame._replace(views=views), "lidar")
    assert panorama.exposure_step_before_levels > 8 > 4 >= panorama.exposure_step_levels
    assert panorama.gains.mean().item() == pytest.approx(1, abs=1e-5)


def test_parallax_does_not_decide_the_exposure(frame):
    """On the bowl two cameras show different things on one pixel; the gains of those that overlap come back anyway."""
    views = [replace(view, rgb_srgb=_exposed(view.rgb_srgb, stops)) for view, stops in zip(frame.views, STOPS)]
    left = stitch_on(frame._replace(views=views), "bowl").gains.log2() + torch.tensor(STOPS)
    assert left[1:].max() - left[1:].min() < .25, "the side and rear cameras overlap"


def _exposed(rgb, stops):
    linear = torch.where(rgb <= .04045, rgb / 12.92, ((rgb + .055) / 1.055) ** 2.4) * 2.0**stops
    bent = 1.055 * linear.clamp(min=1e-9) ** (1 / 2.4) - .055
    return torch.where(linear <= .0031308, 12.92 * linear, bent).clamp(0, 1)


def test_white_stays_white_and_tones_stay_in_order():
    for gain in (.4, .7, 1.5, 3.0):
        curve = tone_curves([gain])[0]
        assert curve[-1] == 1 and curve[0] == 0 and (np.diff(curve) >= 0).all()


def test_depth_tiles_hold_no_filled_pixel(frame):
    """Tiles of the cooperative data set: black where no camera sees the surface, as before holes were filled."""
    tile = make_tile(frame.frame, OPTIONS)
    assert (tile.rgb[~tile.coverage] == 0).all() and np.array_equal(tile.coverage, frame.panorama.coverage.numpy())
    assert np.array_equal(tile.rgb, frame.tile.rgb)


def test_coverage_is_reported_by_name(frame):
    values = measure_coverage(frame)[0]
    assert values["seen_share"] < values["painted_share"] == pytest.approx(values["coverage_share"], abs=.01)
    compared = compare_frame(frame).values
    assert compared["truth_share"] < .7 < compared["painted_share"]
    assert compared["psnr_covered_db"] < compared["psnr_srgb_db"]


def test_every_name_is_reachable_from_a_script(frame):
    views, target = frame.views, frame.panorama.camera
    cameras, pictures = [view.camera for view in views], [view.rgb_srgb for view in views]
    points, depths = scanned_points(frame.frame), [view.z_depth for view in views]
    found = {stitch(cameras, pictures, target, surface=name, points=points, height_m=1.5).surface
             for name in ("lidar", "stereo", "bowl", "ground", "far")}
    assert found == {"lidar", "stereo", "bowl", "ground", "far"}
    assert [stitch(cameras, pictures, target, *given, points=cloud).surface
            for given, cloud in (((depths,), points), ((), points), ((), None))] == ["depth", "lidar", "bowl"]


def test_what_cannot_be_stitched_is_refused_in_one_sentence(frame):
    views, target = frame.views, frame.panorama.camera
    cameras, pictures = [view.camera for view in views], [view.rgb_srgb for view in views]
    scaled = [replace(c, camera_to_world=c.camera_to_world * torch.tensor([2.0, 2, 2, 1])[:, None]) for c in cameras]
    calls = (({"surface": "bowls"}, "bowl"), ({"surface": "lidar"}, "LiDAR"), ({"surface": "depth"}, "depth"),
             ({"surface": "bowl", "height_m": -1.0}, "above the ground"),
             ({"surface": "lidar", "points": torch.zeros(4, 2)}, r"\[N, 3\]"))
    for options, words in calls:
        with pytest.raises(KiloError, match=words) as caught: stitch(cameras, pictures, target, **options)
        assert "\n" not in str(caught.value) and len(str(caught.value)) <= 400
    with pytest.raises(KiloError, match="divide by 255"): stitch(cameras, [255 * p for p in pictures], target)
    with pytest.raises(KiloError): stitch(scaled, pictures, target)


def test_the_new_checks_are_in_the_list_with_bounds():
    bounds = {check.measure: check.at_most for check in CHECKS}
    assert bounds["upright_tilt_deg"] > 0 and bounds["exposure_step_levels"] <= 8
    assert math.isfinite(bounds["upright_tilt_deg"])
