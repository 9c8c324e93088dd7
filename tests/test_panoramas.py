"""Panoramas: cameras that look all around, and one picture stitched from many."""
import os
from dataclasses import replace
from math import cos, radians, sin, tan
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from kilonb.core.errors import KiloError
from kilonb.geometry.cameras import DistortedPinholeCamera, PinholeCamera, Rig, camera_from_angle, visibility
from kilonb.geometry.panoramas import CylindricalCamera, EquirectangularCamera, range_of_depth, roll_columns
from kilonb.geometry.transforms import look_at
from kilonb.metrics.images import psnr_srgb_db
from kilonb.panoramas.stitch import (
    Stitcher,
    far_field_reference,
    ground_range,
    range_disagreement,
    seam_statistics,
    stitch,
)
from kilonb.panoramas.warp import flat_depths, panorama_grid, source_cameras, warp_layers, warp_reference

UP = torch.tensor([0, 0, 1.0], dtype=torch.float64)
# OPV2V's rig: x forward, y left, z up; yaw to the right
MOUNTS = (2.5, 0, 1.0, 0), (0, -.3, 1.8, 100), (0, .3, 1.8, -100), (-2.0, 0, 1.5, 180)
BOXES = torch.tensor([[[-60, -9, -1], [60, -8, 9]], [[-60, 10, -1], [60, 11, 7]], [[-61, -60, -1], [-60, 60, 12]],
                      [[60, -60, -1], [61, 60, 12]], [[-60, -60, -1], [60, 60, 0]], [[7, -4.15, 0], [7.3, -3.85, 6]],
                      [[-8, 3, 0], [-3, 5, 2.2]]], dtype=torch.float64)


def mounted(x, y, z, yaw_deg):
    eye = torch.tensor([x, y, z], dtype=torch.float64)
    return look_at(eye, eye + torch.tensor([cos(radians(yaw_deg)), -sin(radians(yaw_deg)), 0], dtype=torch.float64), UP)


def rig(width, height): return [camera_from_angle(mounted(*mount), width, height, radians(100)) for mount in MOUNTS]


def centre(width, height, kind=EquirectangularCamera): return kind(mounted(0, 0, 1.9, 0), width, height)


def ray_cast(origins, directions):
    """(sRGB, range) of boxes with waves painted on them under a sky that depends on the direction."""
    hits = (BOXES[:, :, None] - origins) / torch.where(directions == 0, 1e-12, directions)
    near, far = hits.amin(1).amax(-1), hits.amax(1).amin(-1)
    ranges, box = torch.where((near < far) & (near > 0), near, torch.inf).min(0)
    points = origins + directions * torch.where(ranges.isfinite(), ranges, 1.0)[:, None]
    waves = torch.tensor([[1.6, .7, 1.1], [.9, 1.4, 1.7], [1.2, 1.9, .8]], dtype=torch.float64)
    paint = 0.5 + 0.2 * torch.sin(points @ waves + box[:, None] * torch.tensor([1.0, 2, 3]))
    return torch.where(ranges.isfinite()[:, None], paint, sky(directions)).float(), ranges


def sky(directions): return 0.5 + 0.3 * torch.sin(3 * directions + torch.tensor([0.0, 1, 2]))


def photograph(camera):
    rays = camera.rays()
    colour, ranges = ray_cast(*rays)
    depth = ranges * (rays.directions @ camera.camera_to_world[:3, 2])
    return colour.reshape(camera.height, camera.width, 3), depth.reshape(camera.height, camera.width)


@pytest.fixture(scope="module")
def street():
    """(cameras, pictures, z-depths, panorama camera, its true picture, its true range)."""
    cameras, target = rig(320, 240), centre(432, 108)
    pictures, depths = map(list, zip(*map(photograph, cameras)))
    truth = ray_cast(*target.resized(864, 216).rays())[0].reshape(108, 2, 432, 2, 3).mean((1, 3))
    return cameras, pictures, depths, target, truth, ray_cast(*target.rays())[1].reshape(108, 432)


def random_pose(seed):
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))[0]
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3], pose[:3, 3] = rotation * torch.linalg.det(rotation), torch.tensor([120.0, -35, 3])
    return pose


LENSES = {"none": (0.0, 0, 0, 0), "barrel": (-.3, .09, 1e-3, -5e-4), "five": (-.162, .011, -3e-4, -8e-5, .0067),
          "rational": (.2, .1, 1e-4, 2e-4, .01, .35, .12, .02)}
CAMERAS = {"pinhole": PinholeCamera(random_pose(0), 335.6, 340.1, 400, 290, 800, 600),
           **{f"lens {name}": DistortedPinholeCamera(random_pose(1), 930, 929, 970, 500, 1920, 1080, lens) for name,
              lens in LENSES.items()}, "equirectangular": EquirectangularCamera(random_pose(2), 1008, 252),
           "full sphere": EquirectangularCamera(random_pose(3), 512, 256, 360, -90, 90),
           "narrow": EquirectangularCamera(random_pose(4), 300, 200, 140, -20, 65),
           "cylinder": CylindricalCamera(random_pose(5), 1008, 252, 360, -45, 45)}


@pytest.mark.parametrize("name", CAMERAS)
def test_every_camera_finds_its_pixels_again(name):
    """Through points and through rays, near and far, to a ten-thousandth of a pixel."""
    camera = CAMERAS[name]
    pixels = camera.pixel_centres()[:: max(camera.width * camera.height // 3000, 1)]
    for distance in (0.3, 12.0, 900.0):
        points = camera.unproject(pixels, torch.full((len(pixels),), distance, dtype=torch.float64))
        again, measured = camera.project(points)
        assert_close(again, pixels, atol=1e-4, rtol=0)
        assert_close(measured, torch.full_like(measured, distance), atol=1e-9, rtol=1e-9)
        rays = camera.rays(pixels)
        assert_close(rays.directions.norm(dim=-1), torch.ones(len(pixels), dtype=torch.float64))
        assert_close(camera.project(rays.at(torch.full((len(pixels),), distance)))[0], pixels, atol=1e-4, rtol=0)
    assert camera.contains(pixels).all() and not camera.contains(pixels + torch.tensor([0, camera.height])).any()
    half = camera.resized(camera.width // 2, camera.height // 2)
    assert_close(half.project(points)[0], pixels / 2, atol=1e-4, rtol=0)


def test_panoramas_measure_along_the_ray_and_pinholes_along_the_axis():
    point = torch.tensor([[3.0, 0, 4]], dtype=torch.float64)
    at_home = torch.eye(4, dtype=torch.float64)
    assert PinholeCamera(at_home, 100, 100, 50, 50, 100, 100).project(point)[1].item() == 4
    assert (
        EquirectangularCamera(at_home, 100, 50).project(point)[1].item()
        == CylindricalCamera(at_home, 100, 50).project(point)[1].item()
        == 5
    )


def test_incident_z_depth_on_a_unit_ray():
    """The notes multiplied z-depth on a unit ray: 1.56 times too short at +-50 degrees. Range of depth puts a wall
    where it is."""
    camera = camera_from_angle(torch.eye(4, dtype=torch.float64), 801, 601, radians(100))
    wall = torch.full((601, 801), 10.0)
    misread = camera.rays().at(wall.flatten())[:, 2].reshape(601, 801)
    put = camera.rays().at(range_of_depth(camera, wall).flatten())[:, 2]
    assert (
        10 / misread[300, 0] == pytest.approx(1 / cos(radians(50)), abs=2e-3) and round(1 / cos(radians(50)), 2) == 1.56
    )
    assert_close(put, torch.full_like(put, 10))
    panorama = stitch([camera], [torch.zeros(601, 801, 3)],
                      EquirectangularCamera(torch.eye(4, dtype=torch.float64), 720, 180), [wall])
    azimuth, elevation = panorama.camera.angles(panorama.camera.pixel_centres())
    true = (10 / (azimuth.cos() * elevation.cos())).reshape(180, 720)
    assert ((panorama.range_m - true).abs()
            / true)[panorama.depth_known].max() < .01 and panorama.depth_known.float().mean() > .2


@pytest.mark.incident(18)
def test_incident_18_points_behind_are_counted_and_have_no_pixel():
    camera = CAMERAS["lens five"]
    axis, eye = camera.camera_to_world[:3, 2], camera.position
    seen = visibility(camera, torch.stack([eye + axis, eye - axis, eye, eye + 1e-3 * axis]))
    assert seen.inside.tolist() == [True, False, False,
                                    True] and seen.without_pixel == 2 and seen.pixels[1:3].isnan().all()


def test_beyond_the_reach_of_a_lens_nothing_comes_back_into_the_picture():
    """The polynomial turns around: a point 70 degrees aside would be drawn well inside the image."""
    camera = DistortedPinholeCamera(torch.eye(4, dtype=torch.float64), 930, 930, 970, 500, 1920, 1080, (-.3, 0.0, 0, 0))
    aside = torch.tensor([[tan(radians(60)), 0, 1]], dtype=torch.float64)
    assert 0 < camera.lens.distort(aside[:, :2])[0, 0] * 930 + 970 < 1920
    assert camera.project(aside)[0].isnan().all() and visibility(camera, aside).without_pixel == 1


@pytest.mark.parametrize("kind", (EquirectangularCamera, CylindricalCamera))
def test_a_closed_panorama_has_no_border_behind(kind):
    camera = kind(torch.eye(4, dtype=torch.float64), 360, 90)
    azimuth = torch.linspace(-7, 7, 2001, dtype=torch.float64)
    pixels, _ = camera.project(torch.stack([azimuth.sin(), torch.zeros_like(azimuth), azimuth.cos()], -1))
    assert camera.contains(pixels).all() and pixels[:, 0].max() < 360
    steps = pixels[:, 0].diff().remainder(360)
    assert_close(steps, torch.full_like(steps, 14 / 2000 * 180 / torch.pi), atol=1e-9, rtol=0)
    assert camera.project(torch.zeros(1, 3, dtype=torch.float64))[0].isnan().all()


def test_cylinder_and_equirectangular_agree_at_the_horizon_only():
    flat, drum = (kind(torch.eye(4, dtype=torch.float64), 1008, 252)
                  for kind in (EquirectangularCamera, CylindricalCamera))
    points = torch.tensor([[1, 0, 2], [1, -1, 2]], dtype=torch.float64)
    (a, b), (c, d) = flat.project(points)[0], drum.project(points)[0]
    assert_close(a, c); assert d[1] > b[1] + 2
    assert drum.project(torch.tensor([[0, -1.0, 0]], dtype=torch.float64))[0].isnan().all()
    with pytest.raises(KiloError, match="within \\+-89"): CylindricalCamera(torch.eye(4), 100, 50, 360, -45, 90)


@pytest.mark.parametrize("columns", (1, 100, -31))
def test_rolling_a_stitched_panorama_is_turning_its_camera(street, columns):
    cameras, pictures, depths, target, *_ = street
    panorama = stitch(cameras, pictures, target, depths, balance=False)
    turned, rgb, ranges, source = roll_columns(target, columns, panorama.rgb_srgb, panorama.range_m, panorama.source)
    again = stitch(cameras, pictures, turned, depths, balance=False)
    assert (again.source == source).float().mean() > .999                # rounding may decide a tie otherwise
    same = (again.source == source) & ((again.range_m - ranges).abs() < 1e-3)
    assert same.float().mean() > .995 and (again.rgb_srgb - rgb)[same].abs().mean() < 1e-4


@pytest.mark.parametrize("kind, low, high", ((EquirectangularCamera, .85, .865), (CylindricalCamera, .79, .81)))
def test_how_much_opv2v_s_rig_covers(kind, low, high):
    panorama = stitch(rig(800, 600), torch.zeros(4, 600, 800, 3), centre(1008, 252, kind), surface="far")
    covered = panorama.coverage.float().mean().item()
    assert low <= covered <= high


def test_cropping_every_picture_to_4_to_1_leaves_a_third():
    """The notes took this third for the share of positive labels."""
    cropped = [replace(camera, height=200, cy=100.0) for camera in rig(800, 600)]
    assert stitch(cropped, torch.zeros(4, 200, 800, 3), centre(1008, 252),
                  surface="far").coverage.float().mean().item() == pytest.approx(1 / 3, abs=.01)


def test_a_world_at_infinity_is_stitched_exactly():
    """Whatever the cameras' places; what is left is interpolation between pixels. Range stays unknown."""
    cameras, target = rig(800, 600), centre(504, 126)
    pictures = [sky(camera.rays().directions).float().reshape(600, 800, 3) for camera in cameras]
    panorama = stitch(cameras, pictures, target, balance=False, samples=1, surface="far")
    error = (panorama.rgb_srgb - sky(target.rays().directions).reshape(126, 504, 3).float()).abs()[panorama.coverage]
    # within half a pixel of a border the colour is held
    assert error.quantile(.9) < 1e-5 and error.max() < 2e-3
    assert not panorama.depth_known.any() and panorama.layers_m is None


def test_depth_takes_the_parallax_away(street):
    cameras, pictures, depths, target, truth, true_range = street
    def quality(panorama):
        return psnr_srgb_db(panorama.rgb_srgb[panorama.coverage][None], truth[panorama.coverage][None])
    aware, far = stitch(cameras, pictures, target, depths), stitch(cameras, pictures, target, surface="far")
    assert quality(aware) >= 28 and quality(aware) > quality(far) + 10
    known = aware.depth_known & true_range.isfinite()
    error = ((aware.range_m - true_range).abs() / true_range)[known]
    assert error.median() <= .01 and (error > .05).float().mean() < .02 and known.float().mean() > .4
    assert range_disagreement(aware).median <= .03
    assert seam_statistics(aware).ratio < 2 < seam_statistics(far).ratio


def test_boxtown_s_panorama_against_the_truth():
    """A vehicle of boxtown, its panorama ray-cast from the same centre; the vehicle itself, which only the centre sees,
    is left out."""
    from kilonb.geometry.transforms import forward_to_opencv
    from kilonb.scenes.boxtown import build_town, opv2v_cameras
    from kilonb.scenes.raycast import render

    town = build_town(seed=0)
    vehicle = town.connected[0]
    pose = town.actor(vehicle).pose(2.0).matrix()
    cameras = list(opv2v_cameras(pose, 400, 300).values())
    seen = [render(town.world, camera, 2.0, 4) for camera in cameras]
    above = pose.copy()
    above[:3, 3] += 1.9 * above[:3, 2]
    target = EquirectangularCamera(forward_to_opencv(torch.from_numpy(above)), 1008, 252)
    # a pixel of the panorama is the mean of many of a picture
    truth = render(town.world, target, 2.0, 16)
    aware = stitch(cameras, [torch.from_numpy(s.rgb_srgb) for s in seen], target,
                   [torch.from_numpy(s.z_depth_m) for s in seen])
    shown = aware.coverage & torch.from_numpy(truth.instance != vehicle)
    assert shown.float().mean() > .6 and psnr_srgb_db(aware.rgb_srgb[shown][None],
                                                      torch.from_numpy(truth.rgb_srgb)[shown][None]) >= 28
    true_range = torch.from_numpy(truth.range_m)
    known = aware.depth_known & true_range.isfinite() & shown
    assert ((aware.range_m - true_range).abs()
            / true_range)[known].median() <= .01 and range_disagreement(aware).median <= .01


def test_an_assumed_ground_moves_colours_but_is_no_range(street):
    cameras, pictures, _, target, truth, _ = street
    ground = stitch(cameras, pictures, target, assumed_range_m=ground_range(target, 1.9))
    road = slice(72, 90)                                                   # rows that look at the road
    def error(panorama): return (panorama.rgb_srgb - truth).abs()[road][panorama.coverage[road]].mean()
    far = stitch(cameras, pictures, target, surface="far")
    assert error(ground) < 0.5 * error(far) and not ground.depth_known.any()


def test_no_range_is_an_average(street):
    """Every range that comes out is the distance of one point that went in; none hangs between a post and the wall
    behind it."""
    cameras, pictures, depths, target, *_ = street
    panorama = stitch(cameras, pictures, target, depths)
    points = [camera.unproject(camera.pixel_centres(), depth.double().flatten())[depth.isfinite().flatten()] for camera,
              depth in zip(cameras, depths)]
    went_in = (torch.cat(points) - target.position).norm(dim=-1).sort().values
    came_out = panorama.range_m[panorama.depth_known].double()
    at = torch.searchsorted(went_in, came_out).clamp(1, len(went_in) - 1)
    assert torch.minimum((went_in[at] - came_out).abs(), (went_in[at - 1] - came_out).abs()).max() < 1e-4 * 80


def test_a_post_does_not_smear():
    """A post at 5 m before a wall at 12 m, seen from beside: ranges are the post's or the wall's, and no red pixel lies
    off the post."""
    camera, target = camera_from_angle(mounted(0, .6, 1.9, 0), 400, 300, radians(100)), centre(504, 126)
    directions = camera.rays().directions
    across = directions[:, 1] / directions[:, 0]
    post = ((.6 + 5 * across).abs() < .15).reshape(300, 400)
    depth = torch.where(post, 5.0, 12.0)
    picture = torch.where(post[..., None], torch.tensor([1.0, 0, 0]), torch.tensor([0, 0, 1.0]))
    panorama = stitch([camera], [picture], target, [depth], balance=False)
    forward = target.rays().directions[:, 0].reshape(126, 504)
    deep = panorama.range_m * forward
    known = panorama.depth_known
    assert (((deep - 5).abs() < .1) | ((deep - 12).abs() < .25))[known].all() and ((deep - 5).abs() < .1).any()
    aside = (target.rays().directions[:, 1] / target.rays().directions[:, 0]).reshape(126, 504)
    on_post = ((5 * aside).abs() < .15 + 5 * 2 * torch.pi / 504) & (forward > 0)
    assert (panorama.rgb_srgb[..., 0] > .6)[~on_post].sum() == 0 and (panorama.rgb_srgb[..., 0] > .6).sum() > 50
    # what the post hides from the camera stays unknown
    assert (~panorama.coverage & (forward > .9) & ~on_post).any()


def test_blending_touches_colour_only(street):
    cameras, pictures, depths, target, *_ = street
    labels = [torch.full((240, 320), 7 * number) for number in range(4)]
    hard, soft = (Stitcher(cameras, target, feather_deg=feather)(pictures, depths, labels) for feather in (0, 8))
    assert (
        torch.equal(hard.range_m, soft.range_m)
        and torch.equal(hard.source, soft.source)
        and torch.equal(hard.labels, soft.labels)
    )
    assert not torch.equal(hard.rgb_srgb, soft.rgb_srgb) and set(soft.labels.unique().tolist()) <= {-1, 0, 7, 14, 21}


def test_the_same_panorama_whatever_the_threads(street):
    cameras, pictures, depths, target, *_ = street
    stitcher, before = Stitcher(cameras, target), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3): torch.set_num_threads(threads); found.append(stitcher(pictures, depths))
    finally: torch.set_num_threads(before)
    for other in found[1:]:
        for name in ("rgb_srgb", "range_m", "source", "layers_m", "gains"):
            assert torch.equal(getattr(found[0], name), getattr(other, name)), name


def test_the_kernels_agree_with_their_reference_implementations(street):
    cameras, pictures, _, target, *_ = street
    quick, (rgb, source) = (
        stitch(cameras, pictures, target, balance=False, surface="far"),
        far_field_reference(cameras, pictures, target),
    )
    same = quick.source == source
    assert same.float().mean() > .999 and (quick.rgb_srgb - rgb)[same].abs().quantile(.999) < 1e-4
    small, little = rig(24, 18)[2], target.resized(48, 12)
    depth = photograph(small)[1]
    mesh = warp_reference(small, little, depth)
    drawn = torch.from_numpy(warp_layers(source_cameras([small], little), panorama_grid(little),
                                         flat_depths([small], [depth])))[0]
    inside = mesh.isfinite()
    assert ((drawn - mesh).abs() < 1e-3)[inside].float().mean() > .95 and (drawn <= mesh + 1e-3)[inside].all()


def test_cameras_of_different_sizes_and_cameras_without_depth(street):
    cameras, pictures, depths, target, *_ = street
    small = cameras[1].resized(160, 120)
    picture, depth = photograph(small)
    mixed = stitch([cameras[0], small, *cameras[2:]], [pictures[0], picture, *pictures[2:]], target,
                   [depths[0], depth, *depths[2:]])
    whole = stitch(cameras, pictures, target, depths)
    assert (mixed.coverage == whole.coverage).float().mean() > .98
    without = stitch(cameras, pictures, target, [None, *depths[1:]])
    painted = without.source == 0
    assert painted.any() and (without.range_m[painted] == 0).float().mean() > .9 and (without.layers_m[0] == 0).all()


def test_holes_in_depth_are_holes_or_far_field_by_choice(street):
    """NaN, 0 and infinite depth mean the same; none of them reaches the result as a number."""
    cameras, pictures, depths, target, *_ = street
    unknown = []
    for value in (torch.nan, 0.0, torch.inf, -1.0):
        holed = [depth.clone() for depth in depths]
        for depth in holed: depth[100:140] = value
        unknown.append(stitch(cameras, pictures, target, holed))
    for other in unknown[1:]:
        assert torch.equal(unknown[0].range_m, other.range_m) and torch.equal(unknown[0].rgb_srgb, other.rgb_srgb)
    assert unknown[0].range_m.isfinite().all() and unknown[0].rgb_srgb.isfinite().all()
    none, sky_only, some, every = (stitch(cameras, pictures, target, depths, fill=fill)
                                   for fill in ("none", "sky", "unknown", "all"))
    assert torch.equal(none.coverage,
                       none.depth_known) and all(torch.equal(none.range_m, other.range_m)
                                                 for other in (sky_only, some, every))
    assert none.coverage.sum() < sky_only.coverage.sum() < some.coverage.sum() < every.coverage.sum()


def test_no_house_is_painted_over_with_sky(street):
    """Between two pictures that touch, one camera looks past the corner of a house: far pixels count only where the ray
    was looked through."""
    cameras, pictures, depths, target, _, true_range = street
    def wrong(fill):
        panorama = stitch(cameras, pictures, target, depths, fill=fill)
        return (true_range.isfinite() & panorama.coverage & ~panorama.depth_known).sum()
    assert wrong("sky") < .5 * wrong("unknown")


def test_one_camera_too_bright_is_evened_out(street):
    cameras, pictures, depths, target, *_ = street
    dimmed = [picture * (.8 if number == 2 else 1) for number, picture in enumerate(pictures)]
    balanced, raw = (Stitcher(cameras, target, feather_deg=0)(dimmed, depths, balance=balance)
                     for balance in (True, False))
    assert balanced.gains.argmax() == 2 and seam_statistics(balanced).jump < .7 * seam_statistics(raw).jump


def test_bad_input_is_one_sentence(street):
    cameras, pictures, depths, target, *_ = street
    stitcher = Stitcher(cameras, target)
    short, bytes_, narrow = (
        [p[:-1] for p in pictures],
        [(p * 255).byte() for p in pictures],
        [d[:, :-2] for d in depths],
    )
    for call, words in ((lambda: stitcher(pictures[:3]), "4 cameras but 3 pictures"),
                        (lambda: stitcher(short), r"picture of camera 0 is \(239, 320, 3\)"),
                        (lambda: stitcher(pictures, depths[:3]), "4 cameras but 3 depth maps"),
                        (lambda: stitcher(bytes_), "torch.uint8"),
                        (lambda: stitcher(pictures, narrow), r"depth map of camera 0 is \(240, 318\)"),
                        (lambda: stitcher(pictures, labels=[torch.zeros(2, 2)] * 4), "label map of camera 0"),
                        (lambda: Stitcher([], target), "no camera"),
                        (lambda: Stitcher(cameras, cameras[0]), "PinholeCamera; expected an Equirectangular"),
                        (lambda: Stitcher([target], target), "Camera 0 is a EquirectangularCamera"),
                        (lambda: range_disagreement(stitcher(pictures)), "without depth"),
                        (lambda: Rig(("front", "front"), tuple(cameras[:2])), "two cameras named front"),
                        (lambda: roll_columns(CylindricalCamera(torch.eye(4), 10, 5, 180), 1), "180 degrees")):
        with pytest.raises(KiloError, match=words) as caught: call()
        assert "\n" not in str(caught.value)


def test_one_camera_alone_and_depth_that_is_all_unknown(street):
    cameras, pictures, _, target, *_ = street
    alone = stitch(cameras[:1], pictures[:1], target, [torch.full((240, 320), torch.nan)])
    assert (
        0.1 < alone.coverage.float().mean() < 0.4
        and not alone.depth_known.any()
        and alone.gains.tolist() == pytest.approx([1.0])
    )
    assert np.isnan(range_disagreement(alone).median)


@pytest.mark.skipif(not os.environ.get("KILONB_DATA"), reason="KILONB_DATA is not set: no real pictures")
def test_real_cameras_with_depth_agree_within_3_percent():
    """V2X-Sim's six cameras: with the reader's rig the ranges of neighbours agree, and depth makes the seams harder to
    see."""
    from kilonb.scenes.surround import load_surround, panorama_pose

    frame = load_surround("v2xsim", Path(os.environ["KILONB_DATA"]) / "v2xsim_carla_6cam")[0]
    views = frame.views()
    target = EquirectangularCamera(panorama_pose(frame, dtype=torch.float64), 1008, 252)
    cameras, pictures = [view.camera for view in views], [view.rgb_srgb for view in views]
    aware, far = (stitch(cameras, pictures, target, depths, surface=surface, feather_deg=0)
                  for surface, depths in (("depth", [view.z_depth for view in views]), ("far", None)))
    found = range_disagreement(aware)
    assert found.pixels > 3000 and found.median <= .03
    assert seam_statistics(aware).ratio < seam_statistics(far).ratio
