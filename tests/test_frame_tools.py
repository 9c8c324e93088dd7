"""Pictures against pictures, frames and photographs: scored, compared and tabulated by command and script."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from kilonb.core.errors import KiloError
from kilonb.geometry.cameras import orbit_cameras
from kilonb.imaging.differences import folder_differences
from kilonb.imaging.frames import choose_frames, read_frames, recomposite, recomposite_folder
from kilonb.imaging.picture_folders import (match_pictures, read_folder_picture, recomposite_pictures, score_pictures)
from kilonb.imaging.rendering import reduce_frames, render_frames
from kilonb.imaging.sources import source_of_gaussians
from kilonb.imaging.summaries import summarise_methods
from kilonb.metrics.images import psnr_linear_db, psnr_srgb_db, ssim
from kilonb.runs.records import read_run
from kilonb.scenes.brickyard import build_brickyard, write_brickyard
from tests.helpers import run_here


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """Frames of a scene and of half its gaussians, with PNGs, and these over white."""
    folder, yard = tmp_path_factory.mktemp("rendered"), build_brickyard(count=4_000)
    cameras = [(f"test/r_{i}", camera) for i, camera in enumerate(orbit_cameras(3, 3.0, 30, width=48, height=48))]
    whole = render_frames(source_of_gaussians(yard), cameras, folder / "whole", quiet=True, png=True).frames
    half = source_of_gaussians(yard.subset(torch.arange(0, len(yard), 2)))
    thin = render_frames(half, cameras, folder / "thin", quiet=True, png=True).frames
    for frames in (whole, thin): recomposite_folder(frames, folder / f"{frames.folder.name}_white", "white")
    return folder


def run(*arguments, tmp_path, ok=True):
    done = run_here(*arguments, environment={"KILONB_OUTPUTS": str(tmp_path / "outputs")})
    assert (done.returncode == 0) == ok, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


def test_scores_of_pngs_are_those_of_their_pixels(rendered):
    found = score_pictures(rendered / "thin_white", rendered / "whole_white")
    for name, scores in found.scores.items():
        pair = [torch.from_numpy(np.asarray(Image.open(path), np.float32) / 255) for path in
                (rendered / "thin_white" / f"{name}.png", rendered / "whole_white" / f"{name}.png")]
        assert scores["psnr_srgb_white_db"] == pytest.approx(psnr_srgb_db(*pair), abs=1e-6)
        assert scores["psnr_linear_white_db"] == pytest.approx(psnr_linear_db(*pair), abs=1e-6)
        assert scores["ssim_white"] == pytest.approx(ssim(*pair), abs=1e-6)
        assert scores["psnr_blank_white_db"] == pytest.approx(psnr_srgb_db(torch.ones(48, 48, 3), pair[1]), abs=1e-6)
    assert "no alpha" in " ".join(found.notes) and found.results()["test_views"] == 3


@pytest.mark.parametrize("sides", [("thin", "whole_white"), ("thin_white", "whole")])
def test_the_product_s_own_frames_and_pngs_are_compared_whatever_their_form(rendered, sides):
    wanted = folder_differences(rendered / "thin", rendered / "whole")
    found = folder_differences(*(rendered / side for side in sides))
    assert len(found) == 3
    for ours, theirs in zip(wanted.values(), found.values()): assert abs(ours["psnr_db"] - theirs["psnr_db"]) < 0.2


def test_missing_and_unequal_pictures_are_named_and_never_resized(rendered, tmp_path):
    for name in ("r_0", "r_1", "extra"): Image.new("RGB", (48, 48)).save(tmp_path / f"{name}.png")
    with pytest.raises(KiloError, match="r_2"): match_pictures(["r_0", "r_1"], ["r_0", "r_2"])
    whole = {f"r_{i}": None for i in range(3)}
    assert len(match_pictures([path.stem for path in tmp_path.iterdir()], whole, common=True).pairs) == 2
    (tmp_path / "small").mkdir()
    for i in range(3): Image.new("RGB", (24, 48)).save(tmp_path / "small" / f"test_r_{i}.png")
    with pytest.raises(KiloError, match="24x48 and its reference 48x48"):
        score_pictures(tmp_path / "small", rendered / "whole_white")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_pictures_of_every_8_bit_mode_are_read_with_the_alpha_that_they_have(mode, tmp_path):
    Image.new("RGBA", (8, 6), (250, 250, 250, 255)).convert("RGB" if mode == "1" else mode[:4]).convert(mode).save(
        tmp_path / "a.PNG")
    picture = read_folder_picture(tmp_path / "a.PNG")
    assert picture.over(torch.zeros(3)).shape == (6, 8, 3) and picture.over(torch.zeros(3)).min() > 0.9
    if mode in ("RGBA", "LA"): assert picture.alpha.eq(1).all()
    if mode in ("RGB", "L", "1"): assert picture.alpha is None


def test_another_background_needs_alpha(rendered, tmp_path):
    paths = recomposite_pictures(rendered / "thin", tmp_path, "#7fb3d5")
    frame = recomposite(read_frames(rendered / "thin").read("test/r_0"), "#7fb3d5")
    assert (read_folder_picture(paths[0]).rgb_premultiplied - frame).abs().max() <= 0.5 / 255 + 1e-4
    with pytest.raises(KiloError, match="no alpha"): recomposite_pictures(rendered / "thin_white", tmp_path, "black")


def test_named_frames_and_a_range_hold_together():
    assert choose_frames(10, 3, 8, explicit=[0, 7, 4, 9]) == [7, 4]
    assert choose_frames(10, 3, explicit=[0, 7, 4, 9], max_frames=1) == [7]
    with pytest.raises(KiloError, match="leave nothing of 2"): choose_frames(10, 5, explicit=[0, 1])


def test_larger_frames_are_scored_after_an_area_average(rendered, tmp_path):
    cameras = [(f"test/r_{i}", camera) for i, camera in enumerate(orbit_cameras(3, 3.0, 30, width=48, height=48))]
    large = render_frames(source_of_gaussians(build_brickyard(count=4_000)), cameras, tmp_path / "large", resolution=96,
                          quiet=True).frames
    small = reduce_frames(large, cameras, tmp_path / "small")
    block = large.read("test/r_0").rgb_premultiplied[:2, :2].mean((0, 1))
    assert torch.allclose(small.read("test/r_0").rgb_premultiplied[0, 0], block, atol=1e-3)
    assert min(row["psnr_db"] for row in folder_differences(small, rendered / "whole").values()) > 20


def test_score_frames_and_the_table_of_methods_by_their_commands(rendered, tmp_path):
    printed = run("run", "score_frames", "-p", f"pictures={rendered / 'thin'}", "-p", f"reference={rendered / 'whole'}",
                  "-p", "method=half", "-p", "recomposite=black", "-p", "lpips_every=0", tmp_path=tmp_path)
    [folder] = (tmp_path / "outputs/score_frames").iterdir()
    record = read_run(folder)
    wanted = score_pictures(rendered / "thin", rendered / "whole").results()
    for name in ("psnr_srgb_white_db", "psnr_linear_white_db", "ssim_white", "psnr_blank_white_db"):
        assert record.results[f"test_{name}"] == pytest.approx(wanted[f"test_{name}"])
    assert record.results["disagreements"] == 0 and "consistent" in printed
    assert (folder / "figures/worst_view.png").is_file()
    assert len(list((folder / "recomposited").glob("*_black.png"))) == 3
    table = run("runs", "summary", "--json", "--write", tmp_path / "all.csv", tmp_path=tmp_path)
    rows = json.loads(table.splitlines()[-1])
    assert [row["method"] for row in rows] == ["half"] and (tmp_path / "all.csv").is_file()
    with open(tmp_path / "all.csv", encoding="utf-8") as file: assert next(csv.DictReader(file))["method"] == "half"
    assert len(summarise_methods(tmp_path / "outputs").rows) == 1


@pytest.mark.slow
def test_a_teacher_against_itself_and_above_the_photographs_resolution_by_command(tmp_path):
    write_brickyard(tmp_path / "yard", width=48, height=48, train=1, test=3, count=4_000)
    common = ["--data", f"blender:{tmp_path / 'yard'}", "-p", f"student={tmp_path / 'yard' / 'teacher.ply'}", "-p",
              "dtype=float32", "-p", "lpips_every=5", "-p", "frames=0,2", "-p", "start=1"]
    run("run", "render_and_rank", *common, "--out", tmp_path / "same", tmp_path=tmp_path)
    itself = json.loads((tmp_path / "same/evaluation.json").read_text())["scores"]
    assert list(itself) == ["test/r_2"] and read_run(tmp_path / "same").results["test_ssim_vs_teacher"] > 0.999999
    printed = run("run", "render_and_rank", *common, "-p", "resolution=96", "--out", tmp_path / "large",
                  tmp_path=tmp_path)
    assert "scored after an area average to 48" in printed and "96x96" in printed
    assert read_run(tmp_path / "large").results["render_width"] == 96
