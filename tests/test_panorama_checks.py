"""Checks of panorama data: what is wrong is named, counted and turns a check red; what is right stays green; pages open
without a network."""
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import without_kernel
from PIL import Image

from kilonb.batch.execution import run_notebook
from kilonb.core.errors import KiloError
from kilonb.geometry.cameras import camera_from_angle
from kilonb.geometry.transforms import carla_pose_to_matrix, transform_points
from kilonb.imaging.clouds import PointCloud, subsample_clouds, write_cloud_page
from kilonb.panoramas.checks import (
    CHECKS,
    Check,
    FrameMeasurements,
    check_frame,
    checks_for,
    draw_frames,
    judge_check,
    measure_panorama,
    overlap_differences,
    run_checks,
    stitch_frame,
    worst_verdict,
)
from kilonb.panoramas.previews import (
    panorama_cloud,
    poses_to_first,
    write_panorama,
    write_panorama_page,
    write_previews,
)
from kilonb.panoramas.stitch import Stitcher
from kilonb.panoramas.tiles import PanoramaOptions
from kilonb.panoramas.truth import compare_with_truth
from kilonb.runs.notebooks import read_notebook
from kilonb.scenes.boxtown import TownConfig, build_town, write_opv2v
from kilonb.scenes.boxtown_truth import true_panorama
from kilonb.scenes.opv2v import load_opv2v
from kilonb.scenes.raycast import SpinningLidar
from kilonb.scenes.surround import SurroundFrame, SurroundScene

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
browser_only = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt install chromium")
OPTIONS = PanoramaOptions(width=504, height=126)
OPV2V = checks_for("opv2v", OPTIONS)


@pytest.fixture(scope="module")
def town(tmp_path_factory) -> Path:
    """Two vehicles at one instant, with depth and LiDAR."""
    folder = tmp_path_factory.mktemp("checks") / "opv2v"
    built = build_town(TownConfig(connected=2, cars=8, people=8, duration_s=2), seed=0)
    write_opv2v(folder, built, 2, 1, 280, 210,
                lidar=SpinningLidar(tuple(np.linspace(-25, 5, 24).tolist()), 400, 0.0, far_m=120.0), samples=2)
    return folder


@pytest.fixture
def copy(town, tmp_path) -> Path:
    """A town of our own to break."""
    return Path(shutil.copytree(town, tmp_path / "opv2v"))


@pytest.fixture(scope="module")
def stitched(town):
    scene = load_opv2v(town)
    return [stitch_frame(frame, OPTIONS) for frame in scene.frames_at(scene.instants()[0]).values()]


def check(folder: Path, **more):
    return run_checks(load_opv2v(folder), OPTIONS, samples=4, checks=OPV2V, data="the town", **more)


def file(folder: Path, vehicle: str, ending: str) -> Path: return next(folder.glob(f"train/*/{vehicle}/*{ending}"))


def rewrite(folder: Path, vehicle: str, change) -> None:
    path = file(folder, vehicle, ".yaml")
    record = yaml.safe_load(path.read_text())
    change(record)
    path.write_text(yaml.safe_dump(record))


def turn(folder: Path, camera: str, degrees: float) -> None:
    """Give a camera of every vehicle another yaw, in `cords` and in `extrinsic`, which agree as before."""
    def change(record):
        record[camera]["cords"][4] += degrees
        record[camera]["extrinsic"] = (torch.linalg.inv(carla_pose_to_matrix(*record[camera]["cords"]))
                                       @ carla_pose_to_matrix(*record["lidar_pose"])).tolist()
    for path in folder.glob("train/*/*/"): rewrite(folder, path.name, change)


def reds(report) -> set[str]: return {line.check.measure for line in report.lines if line.verdict == "red"}


# ------------------------------------------------------------------------------------------------------------ verdicts

def test_data_that_is_right_is_green_and_nearly_everything_was_run(town):
    report = check(town)
    assert report.verdict == "green" and report.ok and not report.problems, report.table()
    assert {line.check.measure for line in report.lines if line.verdict == "not run"} == {
        "seam_flat_ratio", "upright_tilt_deg"}, "with depth neither applies"
    assert report.value("coverage_share") == pytest.approx(.858, abs=.005)
    assert "green" in report.sentence() and json.dumps(report.to_dict())


def test_incident_a_crop_of_33_percent_and_a_constant_mask_are_red():
    crop = FrameMeasurements("a", "train", {"coverage_share": .33}, mask=torch.ones(4, 4))
    lines = {c.measure: judge_check(c, "train", [crop, replace(crop, name="b")]) for c in OPV2V}
    assert lines["coverage_share"].verdict == "red" and "a, b" in lines["coverage_share"].sentence
    assert lines["mask_constant_iou"].verdict == "red" and lines["mask_constant_iou"].value == 1
    other = replace(crop, name="b", mask=torch.tensor([[1.0, 1, 0, 0]]).repeat(4, 1))
    assert judge_check(lines["mask_constant_iou"].check, "train", [crop, other]).verdict == "green"


def test_the_worst_verdict_counts_and_not_run_is_not_green():
    assert (
        worst_verdict(["green", "red", "not run"]) == "red"
        and worst_verdict(["green", "not run"]) == "green so far"
        and worst_verdict(["not run"]) == "not run"
    )
    line = judge_check(Check("x_m", "a length", at_most=1.0), "",
                 [FrameMeasurements("a", "", missing={"x_m": "there is no ruler"})])
    assert line.verdict == "not run" and line.value is None and "there is no ruler" in line.sentence
    for wrong in (lambda: Check("x", "x"), lambda: Check("x", "x", 1, 2, over="worst"),
                  lambda: Check("x", "x", 1, over="mean")):
        with pytest.raises(KiloError): wrong()


def test_one_bad_frame_changes_the_worst_and_not_the_median():
    frames = [FrameMeasurements(name, "", {"x_share": value}) for name, value in (("a", .9), ("b", .9), ("c", .1))]
    median, worst = (judge_check(Check("x_share", "x", at_least=.5, over=over), "", frames)
                     for over in ("median", "worst"))
    assert (median.verdict, worst.verdict) == ("green", "red") and "Outside: c." in worst.sentence


# ------------------------------------------------------------------------------------------------------------ wrong
# rigs

def test_a_camera_turned_by_three_degrees_turns_red_through_its_neighbour(copy):
    turn(copy, "camera1", 3)
    report = check(copy)
    assert "overlap_worst_pair_share" in reds(report) and report.verdict == "red" and not report.problems


def test_a_camera_without_neighbours_is_found_by_the_lidar(copy):
    """OPV2V's front camera shares no surface with another one: only the reprojection of LiDAR points sees it turned."""
    turn(copy, "camera0", 3)
    assert "lidar_worst_camera_share" in reds(check(copy))


def test_seams_turn_red_where_pictures_belong_to_other_cameras(copy):
    for vehicle in copy.glob("train/*/*/"):
        for kind in ("camera", "depth"):
            a, b = (next(vehicle.glob(f"*_{kind}{k}.png")) for k in (1, 2))
            held = a.read_bytes()
            if kind == "camera": a.write_bytes(b.read_bytes()), b.write_bytes(held)
    report = check(copy)
    assert "seam_ratio" in reds(report), report.table()


def test_incident_range_written_as_z_depth_turns_red(copy):
    """The other way round from the notes, who took z-depth for range: the LiDAR does not agree."""
    width, height, focal = 280, 210, 335.639852470912 / 800 * 280
    v, u = np.mgrid[:height, :width] + .5
    stretch = np.sqrt(1 + ((u - width / 2) / focal) ** 2 + ((v - height / 2) / focal) ** 2)
    for path in copy.glob("train/*/*/*_depth*.png"):
        depth = np.asarray(Image.open(path)).astype(np.float64)
        Image.fromarray(np.where(depth == 65535, 65535,
                                 np.clip(depth * stretch, 0, 65534)).astype(np.uint16)).save(path)
    assert {"lidar_difference_share", "overlap_difference_share"} <= reds(check(copy))


# ------------------------------------------------------------------------------------------------------------- bad
# input

def small_depth(folder: Path) -> None:
    path = file(folder, "201", "_depth0.png")
    Image.fromarray(np.asarray(Image.open(path))[::2, ::2]).save(path)


def nan_depth(folder: Path) -> None:
    path = file(folder, "201", "_depth0.png")
    depth = np.asarray(Image.open(path)).astype(np.float32) / 100
    depth[:5] = np.nan
    path.unlink()
    np.save(path.with_suffix(".npy"), depth)


def without_cameras(*numbers: int):
    return lambda folder: [file(folder, "201", f"_camera{k}.png").unlink() for k in numbers]


def cut_short(ending: str):
    return lambda folder: file(folder, "201", ending).write_bytes(file(folder, "201", ending).read_bytes()[:5000])


DAMAGE = {
    "a missing camera": (without_cameras(1), "camera1 was left out: the image 000060_camera1.png is missing", True),
    "one camera only": (without_cameras(1, 2, 3), "only one camera, camera0, is left", True),
    "no camera at all": (without_cameras(0, 1, 2, 3), "no camera of it can be used", False),
    "an unreadable yaml": (
        lambda folder: file(folder, "201", ".yaml").write_text("camera0: [1, 2"),
        "000060.yaml is not YAML",
        False,
    ),
    "a vehicle without pose": (
        lambda folder: rewrite(folder, "201", lambda record: record.pop("true_ego_pos")),
        "the vehicle has no pose",
        False,
    ),
    "depth of another size": (small_depth, "the depth is 140x105, but the image 280x210", True),
    "NaN depth": (nan_depth, "the depth holds 1400 NaN", True),
    "a picture cut short": (cut_short("_camera2.png"), "camera2.png", True),
    "LiDAR cut short": (cut_short(".pcd"), "is cut short", True),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_by_frame_and_counted_and_the_check_goes_on(copy, name):
    damage, sentence, usable = DAMAGE[name]
    damage(copy)
    report = check(copy)
    frame = next(frame for frame in report.frames if "/201/" in frame.name)
    assert any(sentence in problem for problem in frame.problems), frame.problems
    assert bool(frame.values) == usable
    assert report.value("problems_share") == .5 and "problems_share" in reds(report), "one of two frames"
    other = next(frame for frame in report.frames if "/202/" in frame.name)
    assert not other.problems and "coverage_share" in other.values, "the other frame was checked all the same"


def test_a_missing_camera_leaves_a_hole_in_the_horizon(copy):
    without_cameras(1)(copy)
    assert {"horizon_share", "problems_share"} <= reds(check(copy))


def test_if_no_frame_can_be_opened_all_other_checks_are_not_run(copy):
    for path in copy.glob("train/*/*/*.yaml"): path.write_text("[")
    report = check(copy)
    assert (
        reds(report) == {"problems_share"} and report.count("not run") == len(OPV2V) - 1 and len(report.problems) == 2
    )


def test_without_depth_and_lidar_their_checks_are_not_run_with_a_reason(copy):
    for path in [*copy.glob("train/*/*/*_depth*.png"), *copy.glob("train/*/*/*.pcd")]: path.unlink()
    report = check(copy)
    lines = {line.check.measure: line for line in report.lines}
    for name in ("overlap_difference_share", "mask_share", "range_median_m", "own_body_share", "depth_difference_share",
                 "seam_ratio"):
        assert lines[name].verdict == "not run" and "there is no depth" in lines[name].sentence
    assert (
        lines["lidar_difference_share"].verdict == "not run" and "no LiDAR" in lines["lidar_difference_share"].sentence
    )
    assert (
        lines["seam_flat_ratio"].value is not None
        and lines["coverage_share"].verdict == "green"
        and not report.problems
    )


def test_frames_are_drawn_by_the_seed_and_broken_ones_are_not_replaced(copy):
    file(copy, "202", ".yaml").write_text("[")
    scene = load_opv2v(copy)
    assert draw_frames(scene, 1, 5) == draw_frames(scene, 1,
                                                   5) and {draw_frames(scene, 1, seed)[0][1]
                                                           for seed in range(8)} == {0, 1}
    seed = next(seed for seed in range(8) if scene.entries[draw_frames(scene, 1, seed)[0][1]].vehicle == "202")
    report = run_checks(scene, OPTIONS, 1, seed)
    assert len(report.frames) == 1 and report.value("problems_share") == 1
    with pytest.raises(KiloError, match="at least 1"): draw_frames(scene, 0)


def test_any_rig_can_be_checked_and_a_frame_without_pictures_is_a_problem(tmp_path):
    pose = torch.tensor([[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 1.5], [0, 0, 0, 1]])
    cameras = {"only": camera_from_angle(pose, 64, 48, math.radians(90))}
    Image.new("RGB", (64, 48), (90, 120, 60)).save(tmp_path / "only.png")
    problems, body = [], torch.eye(4, dtype=torch.float64)
    frames = [SurroundFrame(name, cameras, body, {"only": tmp_path / f}, problems=problems) for name,
              f in (("a", "only.png"), ("b", "gone.png"))]
    scene = SurroundScene(tmp_path, frames, problems)
    report = run_checks(scene, PanoramaOptions(), 5)
    assert [bool(frame.values) for frame in report.frames] == [True, False] and {
        "problems_share",
        "horizon_share",
    } <= reds(report)
    assert "no picture of it can be read" in report.problems[-1]


# ------------------------------------------------------------------------------------------------------------- the
# truth

def test_a_depth_aware_panorama_is_close_to_the_ray_cast_truth(stitched):
    made = stitched[0]
    truth = true_panorama(made.frame, made.panorama.camera)
    own = torch.from_numpy(made.tile.classes == 3)
    far = Stitcher([view.camera for view in made.views], made.panorama.camera)([view.rgb_srgb for view in made.views])
    near, flat = (compare_with_truth(panorama, truth, own) for panorama in (made.panorama, far))
    assert (
        near["psnr_srgb_db"] > 25
        and near["psnr_srgb_db"] > flat["psnr_srgb_db"] + 6
        and near["range_abs_rel_median"] < 0.01
    )
    assert flat["range_abs_rel_median"] is None and flat["covered_share"] == pytest.approx(.858, abs=.005)


def test_a_scenario_not_made_by_boxtown_has_no_truth(copy):
    next(copy.glob("train/*/data_protocol.yaml")).write_text("world: {}")
    scene = load_opv2v(copy)
    with pytest.raises(KiloError, match="not made by boxtown"): true_panorama(scene[0], OPTIONS.camera())


def test_every_check_is_measured_by_something(stitched):
    measures = measure_panorama(stitched[0])
    beside = {"exposure_step_before_levels"}                              # a figure without a bound
    assert {*measures.values, *measures.missing} - beside == {c.measure for c in CHECKS if c.over != "split"}
    assert {pair.first for pair in overlap_differences(stitched[0].panorama, stitched[0].names)} == {
        "camera1",
        "camera2",
    }
    assert check_frame(load_opv2v(stitched[0].frame.entry.folder.parents[2]), "train", 0, OPTIONS)[0].problems == ()


# ------------------------------------------------------------------------------------------------------------- previews

def test_pictures_and_arrays_are_written_whole(stitched, tmp_path):
    made = stitched[0]
    paths = write_panorama(tmp_path, made.panorama, made.tile.classes)
    assert sorted(path.name for path in paths) == ["panorama.png", "panorama_mask.npy", "panorama_range_m.npy",
                                                   "panorama_rgb.npy", "panorama_source.npy"]
    assert np.array_equal(np.load(tmp_path / "panorama_range_m.npy"), made.panorama.range_m.numpy())
    assert Image.open(tmp_path / "panorama.png").size == (504, 4 * (126 + 14)) and not list(tmp_path.glob(".*"))


def test_clouds_of_two_vehicles_lie_on_each_other_under_their_true_poses(stitched):
    clouds, poses = [panorama_cloud(made, "v") for made in stitched], poses_to_first(stitched)
    points = [transform_points(pose.float(), cloud.points) for pose, cloud in zip(poses, clouds)]
    ground = [p[(p[:, 1] > 1.2)][:, 1].median().item() for p in points]
    assert ground[0] == pytest.approx(ground[1], abs=.05) and ground[0] == pytest.approx(1.525, abs=.05)
    few = subsample_clouds(clouds, 1000)
    assert sum(len(c.points) for c in few) <= 1000 and min(len(c.points) for c in few) > 100
    with pytest.raises(KiloError, match="at least 1"): subsample_clouds(clouds, 0)
    with pytest.raises(KiloError, match="N, 3"): PointCloud("v", torch.zeros(3, 3), torch.zeros(2, 3))


def test_invalid_poses_leave_no_page(stitched, tmp_path):
    clouds = [panorama_cloud(made, "v") for made in stitched]
    for poses in ({}, {"true": torch.eye(4)[None]}, {"true": torch.full((2, 4, 4), math.nan)}):
        with pytest.raises(KiloError): write_cloud_page(tmp_path / "cloud.html", clouds, poses, "none")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    options = ["--no-sandbox", "--disable-dev-shm-usage", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


def opened(chromium, path: Path):
    """A page of an offline browser after it drew, its errors, and what it asked for besides itself."""
    context = chromium.new_context(viewport={"width": 1200, "height": 900})
    context.set_offline(True)
    page, errors, asked = context.new_page(), [], []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request",
            lambda request: None if request.url.startswith(("data:", "blob:")) else asked.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-drawn=yes]", timeout=120_000)
    assert asked == [path.as_uri()]
    return page, errors


HOSTILE = "<img src=x onerror=alert(1)></script><b>SIZE</b>"


@browser_only
def test_the_panorama_page_zooms_together_and_shows_range_and_angles_offline(chromium, stitched, tmp_path):
    made = stitched[0]
    path = write_panorama_page(tmp_path / "panorama.html", made.panorama, [HOSTILE, *made.names[1:]], HOSTILE,
                               made.tile.classes)
    page, errors = opened(chromium, path)
    assert (
        page.title() == HOSTILE and page.locator("h1").text_content() == HOSTILE and page.locator("h1 b").count() == 0
    )
    assert f"This file is {path.stat().st_size / 1e6:.1f} MB" in page.content()
    axis = "const l = plot._fullLayout, b = plot.getBoundingClientRect(), x = l['xaxis' + n], y = l['yaxis' + n];"
    at = "([n, c, r]) => { " + axis + " return [b.left + x._offset + x.d2p(c), b.top + y._offset + y.d2p(r)]; }"
    row, column = next((r, c) for r in range(70, 90) for c in range(252, 260) if made.panorama.range_m[r, c] > 0)
    azimuth, elevation = made.panorama.camera.angles(torch.tensor([[column + .5, row + .5]]))
    for n in ("", "2"):
        page.mouse.move(*page.evaluate(at, [n, column, row]))
        told = page.locator("#tip").text_content()
        assert (
            f"{made.panorama.range_m[row, column]:.2f} m" in told
            and f"{math.degrees(azimuth):.1f}°" in told
            and f"{math.degrees(elevation):.1f}°" in told
        )
    a, b = (page.evaluate(at, ["", *place]) for place in ((100, 30), (200, 60)))
    page.mouse.move(*a), page.mouse.down(), page.mouse.move(*b, steps=5), page.mouse.up()
    page.wait_for_function("plot._fullLayout.xaxis.range[1] < 260")
    ranges = page.evaluate("['', '2', '3'].map(n => [...plot._fullLayout['xaxis' + n].range, "
                           "...plot._fullLayout['yaxis' + n].range])")
    assert ranges[0] == ranges[1] == ranges[2] and ranges[0][0] > 60
    assert not errors
    page.context.close()


@browser_only
def test_the_cloud_page_switches_poses_and_colours_offline(chromium, stitched, tmp_path):
    clouds, true = [panorama_cloud(made, HOSTILE) for made in stitched], poses_to_first(stitched)
    moved = true.clone()
    moved[1, 0, 3] += 2
    path = write_cloud_page(tmp_path / "cloud.html", clouds, {"true": true, "predicted": moved}, HOSTILE, most=2000)
    page, errors = opened(chromium, path)
    assert (
        "of " + f"{sum(len(c.points) for c in clouds):,} points" in page.locator("p").first.text_content()
        and page.locator("h1 b").count() == 0
    )
    first = page.evaluate("plot.data[1].y[0]")
    page.select_option("#poses", "predicted")
    page.wait_for_selector("body[data-poses=predicted]")
    assert page.evaluate("plot.data[1].y[0]") == pytest.approx(first - 2, abs=1e-3), (
        "x of OpenCV is to the right, y of the page to the left"
    )
    assert page.evaluate("Array.isArray(plot.data[0].marker.color)")
    page.select_option("#colours", "cloud")
    page.wait_for_selector("body[data-colours=cloud]")
    assert page.evaluate("plot.data[0].marker.color !== plot.data[1].marker.color")
    assert not errors
    page.context.close()


def test_the_preview_summary_lists_files_and_the_reason_for_missing_points(copy, tmp_path):
    for path in [*copy.glob("train/*/*/*_depth*.png"), *copy.glob("train/*/*/*.pcd")]: path.unlink()
    summary = write_previews(tmp_path / "a", [stitch_frame(load_opv2v(copy)[0], OPTIONS)], "flat", check(copy))
    assert (
        "no points" in summary["note"]
        and not (tmp_path / "a" / "cloud.html").exists()
        and (tmp_path / "a" / "views" / "camera3.png").is_file()
    )
    written = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert written["files"] == {name: (tmp_path / "a" / name).stat().st_size
                                for name in written["files"]} and written["checks"]["data"] == "the town"


def test_the_experiment_runs_on_a_folder_and_leaves_pages_and_gates(town, tmp_path):
    notebook = read_notebook(Path(__file__).parents[1] / "nbs" / "experiments" / "panorama_checks.ipynb")
    parameters = {"data": f"opv2v:{town}", "width": 504, "height": 126, "samples": 1, "timing_repeats": 1,
                  "truth_frames": 1, "points": 2000}
    with without_kernel(): record = run_notebook(notebook, parameters, run_dir=tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (
        record
        and results["gates"]["coverage_share"]["verdict"] == "green"
        and results["results"]["data_verdict"].startswith("green so far (")    # one sample: no constant mask
    )
    truth, cost = {"truth_psnr_srgb_db", "truth_range_abs_rel_median"}, {"stitch_far_field_ms", "stitch_depth_aware_ms"}
    assert truth | cost | {"overlap_difference_share", "checks_red"} <= set(results["gates"])
    assert list((tmp_path / "run").glob("previews/*/cloud.html")) and list(
        (tmp_path / "run").glob("figures/panorama_*.png")
    )
