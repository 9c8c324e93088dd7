"""Photographs without masks: the synthetic ones, a teacher fitted to them with exposures, a student in a box."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from kilonb.core.errors import KiloError
from kilonb.distill.boxes import crop_gaussians, outline_results, parse_box, true_outline
from kilonb.geometry.colmap import read_colmap
from kilonb.imaging.photographs import held_out_report
from kilonb.scenes.brickyard_photographs import write_brickyard_photographs
from kilonb.scenes.photographs import open_views, points_of_scene
from kilonb.splats.fit import fit_gaussians
from kilonb.splats.fit_config import FitConfig
from kilonb.splats.formats import read_gaussians
from kilonb.splats.rasterizer import render_gaussians
from tests.helpers import run_here

BOX = torch.tensor([[-1.3, -.8, .112], [1.3, .8, 1.6]])
SMALL = FitConfig(steps=100, initial_count=1500, maximum_count=2500, grow_until=.1, sh_degree=1)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Twelve photographs of 64x48 pixels with COLMAP text."""
    folder = tmp_path_factory.mktemp("photographs") / "project"
    return write_brickyard_photographs(folder, width=64, height=48, views=12, points=900, count=4_000)


@pytest.fixture(scope="module")
def fitted(project):
    """(the fit, training views, held-out views) of the photographs."""
    train, test = (open_views("colmap", project, split) for split in ("train", "test"))
    points = points_of_scene("colmap", project)
    return fit_gaussians(train, SMALL, held_out=test, points=points, quiet=True), train, test


def test_the_synthetic_photographs_have_distortion_exposures_points_and_a_truth_that_no_reader_takes_for_masks(project):
    model, evs = read_colmap(project), json.loads((project / "truth" / "exposure_ev.json").read_text())
    assert len(model.cameras) == 12 and all(camera.distortion[0] == -.1 for camera in model.cameras.values())
    assert max(map(abs, evs.values())) <= .3 and np.std(list(evs.values())) > .05
    assert 300 < len(model.points) <= 900 and not (project / "masks").exists()
    views = open_views("colmap", project, "train")
    assert len(views) == 10 and not any(view.masked for view in views)
    assert views[0].rgba_straight().shape == (48, 64, 4)
    for name in model.cameras: assert Image.open(project / "images" / name).format == "JPEG"


def test_the_points_of_the_object_project_into_its_true_outline(project):
    view = open_views("colmap", project, "test")[0]
    points = torch.from_numpy(points_of_scene("colmap", project)[0])
    inside = points[((points > BOX[0]) & (points < BOX[1])).all(-1)]
    pixels, depth = view.camera.project(inside)
    shown = view.camera.contains(pixels) & (depth > 0)
    column, row = pixels[shown].long().unbind(-1)
    outline = true_outline(project, view)
    assert shown.sum() > 50 and outline[row, column].float().mean() > .9 and outline.float().mean() < .6


def test_a_fit_without_masks_is_far_above_the_mean_colour_and_finds_the_exposures(project, fitted):
    fit, _, test = fitted
    scores = held_out_report(fit.gaussians, test).results
    assert scores["test_psnr_srgb_gain_db"] > scores["test_psnr_mean_colour_db"] + 2
    assert scores["test_psnr_srgb_gain_db"] >= scores["test_psnr_srgb_db"] - 1e-6
    truth = json.loads((project / "truth" / "exposure_ev.json").read_text())
    known = torch.tensor([truth[f"{name.rpartition('/')[2]}.jpg"] for name in fit.exposure_ev])
    found = torch.tensor(list(fit.exposure_ev.values()))
    assert abs(found.mean()) < 1e-5 and torch.corrcoef(torch.stack([known, found]))[0, 1] > .8
    assert (found - (known - known.mean())).square().mean() < .5 * known.var()


def test_nothing_stays_in_front_of_a_camera(fitted):
    fit, train, _ = fitted
    eyes = torch.stack([view.camera.position for view in train])
    distance = torch.cdist(fit.gaussians.means, eyes).amin(-1)
    assert (distance < .5).float().mean() < .01
    assert (fit.gaussians.means.norm(dim=-1) > 10).any(), "and the sky is far away"


def test_a_resumed_fit_of_photographs_has_the_same_exposures_and_gaussians(project, tmp_path):
    train, points = open_views("colmap", project, "train"), points_of_scene("colmap", project)
    config = FitConfig(**{**vars(SMALL), "steps": 24, "grow_every_steps": 8, "grow_until": .7})
    whole = fit_gaussians(train, config, tmp_path / "whole", points=points, quiet=True)
    first = fit_gaussians(train, config, tmp_path / "parts", points=points, quiet=True, time_limit_s=1e-3)
    rest = fit_gaussians(train, config, tmp_path / "parts", points=points, quiet=True, resume=True)
    assert not first.finished and 0 < rest.resumed_from < 24 and rest.finished
    assert rest.exposure_ev == whole.exposure_ev and torch.equal(rest.gaussians.means, whole.gaussians.means)
    assert json.loads((tmp_path / "whole" / "exposure_ev.json").read_text()) == whole.exposure_ev


def test_a_fit_that_asks_for_silhouettes_or_points_that_are_not_there_is_refused(project):
    train = open_views("colmap", project, "train")
    for initial, words in (("hull", "no masks"), ("points", "no points")):
        with pytest.raises(KiloError, match=words): fit_gaussians(train, FitConfig(initial=initial), quiet=True)


def test_the_true_object_is_its_own_student_without_a_gap(project, fitted):
    fit, _, test = fitted

    class Cropped:
        def render(self, camera): return render_gaussians(crop_gaussians(fit.gaussians, BOX), camera)

    results = outline_results(Cropped(), fit.gaussians, BOX, list(test), project)
    assert results["outline_gap_db"] == 0 and results["true_outline_views"] == len(test) == results["outline_views"]


def test_one_command_fits_a_teacher_and_teaches_a_student_of_the_box(project, tmp_path):
    done = run_here("run", "multi_view_response", "--data", f"colmap:{project}", "--out", tmp_path / "run", "-p",
                    "box=-1.3,-0.8,0.112,1.3,0.8,1.6", "-p", "teacher_steps=40", "-p", "teacher_count=2000", "-p",
                    "points_steps=10", "-p", "steps=15", "-p", "rays=256", "-p", "cells=4", "-p",
                    "teaching.march_steps=40", "-p", "teaching.voxels=32", "-p", "teaching.points.bank=10000", "-p",
                    "policy=off", "-p", "targets=both", "-p", "views.hold_out=6",
                    "-p", "lpips_every=100", "-p", "test_views=2")
    assert done.returncode in (0, 1), done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    results = results.get("results", results)
    assert results["outline_views"] == 2 and results["teacher_psnr_srgb_gain_db"] > results[
        "teacher_psnr_mean_colour_db"]
    gap = results["outline_teacher_psnr_db"] - results["outline_test_psnr_db"]
    assert abs(results["outline_gap_db"] - gap) < 1e-6 and "box=" in done.stdout
    assert 0 < len(crop_gaussians(read_gaussians(tmp_path / "run" / "teacher" / "teacher.ply"), BOX)) <= 2000


@pytest.mark.parametrize(("box", "words"), [("1 1 1 0 0 0", "below"), ("5 5 5 6 6 6", "none of the")])
def test_a_box_that_holds_nothing_is_refused_in_one_sentence(project, tmp_path, box, words):
    done = run_here("run", "multi_view_response", "--data", f"colmap:{project}", "--out", tmp_path / "run", "-p",
                    f"box={box}", "-p", "policy=off")
    said = [line for line in done.stderr.splitlines() if line.startswith("kilonb: ")]
    assert done.returncode == 1 and "Traceback" not in done.stderr and len(said) == 1
    assert words in said[0] and len(said[0]) < 450


@pytest.mark.parametrize("box", ["0 0 1", "0 0 0 1 1 inf", "a b c d e f", "0 0 0 1 1 1 1", [0, 0, 0, 1, 1, None]])
def test_a_box_is_six_finite_numbers(box):
    with pytest.raises(KiloError, match="six numbers"): parse_box(box)
