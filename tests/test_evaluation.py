"""Rendering frames, scoring them against references, alpha and image differences, summaries, galleries."""
import html
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import run_here

from kilonb.distill.diagnostics import gradient_norms, GradientRatios, transmittance_report
from kilonb.imaging.differences import folder_differences, frame_difference
from kilonb.imaging.silhouettes import alpha_report
from kilonb.imaging.agreement import check_agreement, disagreements
from kilonb.imaging.scoring import evaluate_frames, target_picture
from kilonb.imaging.summaries import summarise_runs
from kilonb.imaging.frames import (
    camera_digest,
    choose_frames,
    named_cameras,
    read_frame,
    read_frames,
    recomposite,
    recomposite_folder,
    RenderedFrame,
    write_frame,
)
from kilonb.imaging.rendering import PowerMeter, render_frames
from kilonb.imaging.sources import open_source, source_of_gaussians
from kilonb.imaging.gallery import contact_sheet, GalleryItem, ranked, triptych, write_gallery
from kilonb.distill.losses import ResponseLossConfig
from kilonb.distill.student import DistillConfig, Distillation, distill, make_student, save_student
from kilonb.distill.rays import RayPool
from kilonb.imaging.targets import targets_from_images, targets_from_teacher
from kilonb.fields.kilonerf import KiloNeRFConfig
from kilonb.fields.occupancy import occupancy_from_gaussians
from kilonb.geometry.cameras import orbit_cameras
from kilonb.core.errors import KiloError
from kilonb.runs.records import read_run
from kilonb.metrics.images import blank_baseline_db, psnr_srgb_db
from kilonb.scenes.blender import load_blender
from kilonb.scenes.brickyard import write_brickyard
from kilonb.splats.gaussians import gaussians_from_points
from kilonb.splats.ply import write_ply
from kilonb.training.checkpoints import write_checkpoint
from kilonb.training.loop import LoopConfig

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SHAPE = KiloNeRFConfig(cell_size=0.4, position_frequencies=4, hidden=16, density_bias=2.0)
SIZE = 40


@pytest.fixture(scope="module")
def ball():
    shell = torch.nn.functional.normalize(torch.randn(1200, 3, generator=torch.Generator().manual_seed(0)),
                                          dim=-1) * 0.6
    return gaussians_from_points(shell, (shell * 4).sin() / 2 + 0.5, sh_degree=0, opacity=0.9, scale=0.8)


@pytest.fixture(scope="module")
def cameras():
    return [(f"test/r_{i}", camera) for i, camera in enumerate(orbit_cameras(5, 3.0, 30, width=SIZE, height=SIZE))]


@pytest.fixture(scope="module")
def photos(ball, cameras):
    """What a camera saw: the teacher's pictures, a tenth too dark."""
    return [replace(target, rgb_premultiplied=target.rgb_premultiplied * 0.9, source="image")
            for target in targets_from_teacher(ball, cameras)]


@pytest.fixture(scope="module")
def grid(ball): return occupancy_from_gaussians(ball.means, ball.quats, ball.scales, ball.opacities, 32)


@pytest.fixture(scope="module")
def student(grid): return make_student(grid, SHAPE, step=0.05)


@pytest.fixture(scope="module")
def frames(student, cameras, tmp_path_factory):
    """A folder with all five frames of the student."""
    return render_frames(student.frame_source("averaged"), cameras, tmp_path_factory.mktemp("frames"),
                         quiet=True).frames


def sentence(error: pytest.ExceptionInfo) -> str:
    """The message of an error: one line that ends with a full stop."""
    text = str(error.value)
    assert "\n" not in text and text.endswith((".", "!")) and len(text) < 400, text
    return text


# ---- frames on disk

def test_an_interrupted_render_goes_on_and_ends_as_the_unbroken_one(student, cameras, frames, tmp_path):
    calls, source = [], student.frame_source("averaged")

    def interrupted(camera, chunk_rays):
        calls.append(camera)
        if len(calls) == 3: raise KeyboardInterrupt
        return source.render(camera, chunk_rays)

    with pytest.raises(KeyboardInterrupt):
        render_frames(replace(source, render=interrupted), cameras, tmp_path, quiet=True)
    assert len(read_frames(tmp_path).missing()) == 3 and not (tmp_path / "render_stats.json").exists()
    (tmp_path / ".test_r_2.npz.0123abcd.part").write_bytes(b"what a killed writer leaves")
    (tmp_path / "test_r_1.npz").write_bytes((tmp_path / "test_r_1.npz").read_bytes()[:-300])
    calls.clear()
    done = render_frames(replace(source, render=lambda *a: calls.append(a) or source.render(*a)), cameras, tmp_path,
                         quiet=True)
    assert done.kept == 1 and len(calls) == 4, (
        "the whole frame is kept, the damaged one and the three missing ones are made"
    )
    for name in frames.names:
        one, two = done.frames.read(name), frames.read(name)
        assert torch.equal(one.rgb_premultiplied, two.rgb_premultiplied) and torch.equal(
            one.expected_depth, two.expected_depth
        )
        assert one.identity == two.identity


def test_statistics_leave_out_the_first_frame_and_claim_no_power_on_a_cpu(frames):
    statistics = json.loads((frames.folder / "render_stats.json").read_text())
    assert (
        statistics["frames"] == 5
        and statistics["frames_timed"] == 4
        and statistics["frames_per_s"] == pytest.approx(1 / statistics["seconds_per_frame"])
    )
    assert (
        statistics["power_w"] is None
        and statistics["peak_memory_of"] == "process"
        and statistics["samples_per_ray"] > 0
    )
    assert statistics["weights"] == "averaged" and statistics["names"] == frames.names
    with PowerMeter(lambda: 250.0, 0.001) as meter: pass
    assert meter.mean_w == 250.0


@pytest.mark.parametrize("change", ["checkpoint", "weights", "size", "format", "camera"])
def test_a_folder_takes_only_frames_of_its_own_render(change, student, ball, cameras, frames):
    source, views, options = student.frame_source("averaged"), cameras, {}
    if change == "checkpoint": source = source_of_gaussians(ball)
    if change == "weights": source = student.frame_source("raw")
    if change == "size": options["resolution"] = SIZE // 2
    if change == "format": options["dtype"] = "float32"
    if change == "camera": views = [("test/r_0", cameras[2][1])]
    before = sorted((p.name, p.stat().st_mtime_ns) for p in frames.folder.iterdir())
    with pytest.raises(KiloError) as error: render_frames(source, views, frames.folder, quiet=True, **options)
    assert "choose another folder" in sentence(error)
    assert before == sorted((p.name, p.stat().st_mtime_ns) for p in frames.folder.iterdir()), "nothing is touched"


def test_ranges_add_up_in_the_order_of_the_dataset(student, cameras, tmp_path):
    for chosen in (choose_frames(5, 3), choose_frames(5, 0, 3, 2)):
        outcome = render_frames(student.frame_source(), cameras, tmp_path, chosen, quiet=True)
    assert outcome.names == ["test/r_0", "test/r_2"] and outcome.frames.names == [
        "test/r_0",
        "test/r_2",
        "test/r_3",
        "test/r_4",
    ]
    assert [entry["index"] for entry in outcome.frames.frames.values()] == [0, 2, 3, 4] and not outcome.frames.missing()


def test_any_resolution_and_chunks_change_no_picture(student, cameras, tmp_path):
    """Chunks bound the memory, not the result; another size keeps the field of view."""
    whole = render_frames(student.frame_source(), cameras, tmp_path / "a", [0], dtype="float32", quiet=True)
    parts = render_frames(student.frame_source(), cameras, tmp_path / "b", [0], dtype="float32", chunk_rays=77,
                          quiet=True)
    small = render_frames(student.frame_source(), cameras, tmp_path / "c", [0], resolution=(20, 30), quiet=True)
    torch.testing.assert_close(parts.frames.read("test/r_0").rgb_premultiplied,
                               whole.frames.read("test/r_0").rgb_premultiplied, atol=1e-5, rtol=0)
    assert small.frames.read("test/r_0").alpha.shape == (30, 20)
    assert camera_digest(named_cameras(cameras, resolution=SIZE)[0].camera) == camera_digest(cameras[0][1])


# ---- incident 2: conventions are explicit

@pytest.mark.incident(2)
def test_incident_2_straight_and_premultiplied_files_give_the_same_picture_and_say_what_they_are(frames, tmp_path):
    frame = frames.read("test/r_0")
    write_frame(tmp_path / "premultiplied.npz", frame, "float32")
    alpha = frame.alpha[..., None]
    straight = torch.where(alpha > 0, frame.rgb_premultiplied / alpha.clamp(min=1e-6), 0.0)
    np.savez(tmp_path / "straight.npz", rgb_straight=straight.numpy(), alpha=frame.alpha.numpy(),
             alpha_convention="straight", colour_space="srgb")
    for background in ("white", "black", "#204060", 0.5, (0.1, 0.9, 0.3)):
        pictures = [recomposite(tmp_path / f"{name}.npz", background) for name in ("premultiplied", "straight")]
        torch.testing.assert_close(*pictures, atol=1e-5, rtol=0)
    assert [read_frame(tmp_path / f"{name}.npz").stored for name in ("premultiplied", "straight")] == [
        "premultiplied",
        "straight",
    ]
    white, black = (recomposite(frame, b) for b in ("white", "black"))
    torch.testing.assert_close(white - black, (1 - alpha).expand(-1, -1, 3), atol=1e-5, rtol=0)


@pytest.mark.incident(2)
def test_incident_2_straight_colours_under_a_premultiplied_name_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", rgb_premultiplied=np.full((8, 8, 3), 0.9, np.float32),
             alpha=np.full((8, 8), 0.3, np.float32), alpha_convention="premultiplied", colour_space="srgb")
    with pytest.raises(KiloError) as error: read_frame(tmp_path / "x.npz")
    assert "straight, not premultiplied" in sentence(error)


def test_recomposited_folder_is_the_named_frames_on_the_named_background(frames, tmp_path):
    paths = recomposite_folder(frames, tmp_path, "black", ["test/r_1"])
    assert [path.name for path in paths] == ["test_r_1_black.png"] and len(list(tmp_path.iterdir())) == 1


# ---- incident 6: whose weights

@pytest.fixture(scope="module")
def trained_run(grid, photos, tmp_path_factory):
    """The folder of a short run that kept an average, and its student."""
    folder, pupil = tmp_path_factory.mktemp("run"), make_student(grid, SHAPE, step=0.05)
    loop = LoopConfig(steps=12, learning_rate=1e-2, warmup_steps=2, ema_decay=0.9, log_every_steps=4)
    distill(pupil, RayPool(photos[:2], grid, pupil.step), DistillConfig(rays=128, loop=loop), folder, quiet=True)
    save_student(pupil, folder / "student.pt", "averaged")
    return folder, pupil


@pytest.mark.incident(6)
def test_incident_6_the_averaged_weights_are_rendered_by_default_and_the_source_says_so(trained_run, cameras):
    folder, pupil = trained_run
    latest = folder / "checkpoints" / "latest.pt"
    sources = {"run": open_source(folder), "saved": open_source(folder / "student.pt"),
               "checkpoint": open_source(latest)}
    camera, expected = cameras[0][1], pupil.render(cameras[0][1])
    for source in sources.values():
        assert source.weights == "averaged" and "averaged weights" in str(source)
        assert torch.equal(source.render(camera, None).rgb_premultiplied, expected.rgb_premultiplied)
    raw = open_source(latest, weights="raw")
    assert raw.weights == "raw" and not torch.equal(raw.render(camera, None).rgb_premultiplied,
                                                    expected.rgb_premultiplied)


@pytest.mark.incident(6)
def test_incident_6_frames_of_raw_weights_are_not_scored_as_averaged_ones(trained_run, photos, tmp_path):
    folder, _ = trained_run
    raw = render_frames(open_source(folder / "checkpoints" / "latest.pt", "raw"), photos, tmp_path, [0],
                        quiet=True).frames
    assert (
        disagreements(raw, weights=None) == []
        and len(found := disagreements(raw)) == 1
        and "raw weights, averaged ones were meant" in found[0]
    )
    with pytest.raises(KiloError, match="raw weights"):
        evaluate_frames(tmp_path, photos[:1], weights="averaged", quiet=True)
    assert evaluate_frames(tmp_path, photos[:1], quiet=True).weights == "raw"


def test_a_checkpoint_of_another_config_is_refused(trained_run, grid, tmp_path):
    latest = trained_run[0] / "checkpoints" / "latest.pt"
    with pytest.raises(KiloError) as error:
        open_source(latest, like=make_student(grid, replace(SHAPE, hidden=8), step=0.05))
    assert "of another config" in sentence(error)
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(latest, tmp_path / "checkpoints" / "latest.pt")
    with pytest.raises(KiloError) as error: open_source(tmp_path)
    assert "not the shape" in sentence(error)
    assert open_source(tmp_path, like=make_student(grid, SHAPE, step=0.05)).weights == "averaged"


# ---- files of 0.1

def test_a_student_of_0_1_opens_and_renders_as_before(grid, cameras, tmp_path):
    """The file that 0.1 wrote: the same keys, and layer names that must be found for ever."""
    student = make_student(grid, SHAPE, step=0.05)
    state = {"box": grid.box, "occupied": grid.occupied, "least_density": student.least_density,
             "field.networks": student.field.networks.detach(), "field.cells.lower": student.field.cells.lower,
             "field.cells.network": student.field.cells.network}
    config = {"cell_size": 0.4, "position_frequencies": 4, "direction_frequencies": 4, "hidden": 16,
              "refeed_position": False, "density_scale": 25.0, "density_bias": 2.0}
    write_checkpoint(tmp_path / "student.pt", {"kind": "student", "field": "kilonerf", "config": config, "step_m": 0.05,
                                               "weights": "averaged", "state": state})
    opened = open_source(tmp_path)
    assert (opened.kind, opened.weights, opened.model.step) == ("student", "averaged", 0.05)
    now, then = opened.render(cameras[0][1], None), student.render(cameras[0][1])
    assert torch.equal(now.rgb_premultiplied, then.rgb_premultiplied) and torch.equal(now.alpha, then.alpha)


def test_frames_of_gaussians_from_0_1_are_continued(ball, cameras, tmp_path):
    """0.1 wrote the kind "teacher" into the manifest; the frames are the same."""
    render_frames(source_of_gaussians(ball), cameras, tmp_path, [0], quiet=True)
    manifest = json.loads((tmp_path / "frames.json").read_text())
    manifest["source"]["kind"] = "teacher"
    (tmp_path / "frames.json").write_text(json.dumps(manifest))
    again = render_frames(source_of_gaussians(ball), cameras, tmp_path, [0, 1], quiet=True)
    assert again.kept == 1 and disagreements(again.frames, weights="averaged") == []


def test_opening_a_student_does_not_need_the_package_distill_to_be_imported(student, tmp_path):
    save_student(student, tmp_path / "student.pt", "raw")
    code = f"import kilonb, sys; s = kilonb.open_source({str(tmp_path / 'student.pt')!r}); print(s.kind, s.weights)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["student", "raw"]


# ---- incident 7: which frames

@pytest.mark.incident(7)
def test_incident_7_exactly_the_given_views_are_scored_and_listed(frames, photos, capsys):
    """36 frames were averaged where one was meant."""
    one = evaluate_frames(frames, photos[3:4])
    assert (
        one.names == ["test/r_3"]
        and one.results()["test_views"] == 1
        and "1 frame: test/r_3" in capsys.readouterr().out
    )
    assert one.means() == one.scores["test/r_3"]
    all_views = evaluate_frames(frames, photos, quiet=True)
    assert all_views.means()["psnr_srgb_white_db"] == pytest.approx(
        sum(s["psnr_srgb_white_db"] for s in all_views.scores.values()) / 5
    )
    assert (
        "score by name" in disagreements(frames, names=["test/r_3"])[0]
        and "test/r_9" in disagreements(frames, names=[*frames.names, "test/r_9"])[0]
    )


@pytest.mark.parametrize("what", ["frames", "size", "camera", "checkpoint", "stale", "convention", "unfinished"])
def test_each_disagreement_is_one_sentence(what, frames, photos, ball, student, cameras, tmp_path):
    other = None
    if what == "frames": found = disagreements(frames, photos[:4])
    if what == "size":
        found = disagreements(frames, [replace(p, camera=p.camera.resized(80, 80), **doubled(p)) for p in photos])
    if what == "camera":
        found = disagreements(frames, [replace(p, camera=photos[i - 1].camera) for i, p in enumerate(photos)])
    if what == "checkpoint":
        other = render_frames(source_of_gaussians(ball), cameras, tmp_path, quiet=True).frames
        assert disagreements(frames, other) == []
        found = disagreements(frames, other, same_checkpoint=True)
    if what == "stale":
        save_student(student, tmp_path / "student.pt", "averaged")
        found = disagreements(frames, checkpoint=tmp_path / "student.pt")
    if what == "convention":
        found = disagreements(frames, replace(frames, folder=tmp_path, alpha_convention="straight"))
    if what == "unfinished":
        shutil.copytree(frames.folder, tmp_path / "x")
        (tmp_path / "x/test_r_2.npz").unlink()
        found = disagreements(read_frames(tmp_path / "x"), photos)
    assert len(found) == 1 and found[0].endswith(".") and "\n" not in found[0], found
    if what != "checkpoint":
        with pytest.raises(KiloError): check_agreement(frames, photos[:4])


def doubled(target) -> dict:
    """A target's pictures at twice the size."""
    grow = lambda picture: picture.repeat_interleave(2, 0).repeat_interleave(2, 1)
    return {"rgb_premultiplied": grow(target.rgb_premultiplied), "alpha": grow(target.alpha), "expected_depth": None}


# ---- incident 1 and the self-check

@pytest.mark.incident(1)
def test_incident_1_an_empty_student_scores_exactly_the_all_white_baseline(photos):
    def nothing(camera, chunk_rays):
        empty = torch.zeros(camera.height, camera.width)
        return SimpleNamespace(rgb_premultiplied=empty[..., None].expand(-1, -1, 3), alpha=empty, expected_depth=empty)
    source = replace(source_of_gaussians(gaussians_from_points(torch.rand(9, 3), torch.rand(9, 3))), render=nothing)
    evaluation = evaluate_frames(source, photos[:2], quiet=True)
    for name, scores in evaluation.scores.items():
        photo = next(p for p in photos if p.name == name)
        assert (
            scores["psnr_srgb_white_db"] == scores["psnr_blank_white_db"] == blank_baseline_db(target_picture(photo))
            and scores["leak_mean"] == 1
        )
    assert "psnr_blank_white_db" in evaluation.table() and "test_psnr_blank_white_db" in evaluation.results()


def test_the_self_check_comes_before_any_rendering(student, photos):
    calls, source = [], student.frame_source()
    bad = replace(photos[0], rgb_premultiplied=photos[0].rgb_premultiplied + 0.6)
    with pytest.raises(KiloError):
        evaluate_frames(replace(source, render=lambda *a: calls.append(a)), [bad], quiet=True)
    with pytest.raises(KiloError, match="Self-check: lpips_vgg"):
        evaluate_frames(replace(source, render=lambda *a: calls.append(a)), photos,
                        lpips={"lpips_vgg": lambda a, b: 0.4}, quiet=True)
    assert not calls


def test_a_teacher_is_perfect_against_itself_and_the_gap_is_the_students_own(frames, ball, photos, cameras, tmp_path):
    write_ply(tmp_path / "teacher.ply", ball)
    itself = evaluate_frames(tmp_path / "teacher.ply", cameras[:2], teacher=tmp_path / "teacher.ply", quiet=True)
    assert all(s["psnr_vs_teacher_db"] == math.inf
               for s in itself.scores.values()) and "psnr_srgb_white_db" not in itself.means()
    results = evaluate_frames(frames, photos[:2], teacher=ball, quiet=True).results()
    assert results["test_gap_to_teacher_db"] == pytest.approx(results["test_teacher_psnr_srgb_white_db"]
                                                              - results["test_psnr_srgb_white_db"])
    taught = evaluate_frames(frames, targets_from_teacher(ball, cameras[:2]), quiet=True)
    assert (
        taught.means()["psnr_vs_teacher_db"] == pytest.approx(results["test_psnr_vs_teacher_db"])
        and "psnr_srgb_white_db" not in taught.means()
    )


def test_lpips_is_taken_on_every_kth_view_and_the_results_say_on_how_many(frames, photos):
    asked = []
    def distance(one, two):
        asked.append(one)
        return (one - two).abs().mean().item()
    evaluation = evaluate_frames(frames, photos, lpips={"lpips_vgg": distance}, lpips_every=2, quiet=True)
    assert evaluation.lpips_views == ["test/r_0", "test/r_2",
                                      "test/r_4"] and evaluation.results()["test_lpips_views"] == 3
    assert len(asked) == 4, "three views, and the self-check once"
    values = [evaluation.scores[name]["lpips_vgg"] for name in evaluation.lpips_views]
    assert (
        evaluation.results()["test_lpips_vgg"] == pytest.approx(sum(values) / 3)
        and "LPIPS on 3 of 5 views" in evaluation.table()
    )


def test_a_black_background_shows_what_white_hides(photos):
    """White fog on white scores like nothing at all; on black it does not."""
    half = torch.full((SIZE, SIZE), 0.5)
    fog = lambda camera, _: SimpleNamespace(rgb_premultiplied=half[..., None].expand(-1, -1, 3), alpha=half,
                                            expected_depth=0 * half)
    source = replace(source_of_gaussians(gaussians_from_points(torch.rand(9, 3), torch.rand(9, 3))), render=fog)
    scores = evaluate_frames(source, photos[:1], background="black", quiet=True).scores["test/r_0"]
    assert scores["psnr_srgb_white_db"] == pytest.approx(scores["psnr_blank_white_db"],
                                                         abs=1e-4) and scores["psnr_srgb_black_db"] < 9
    assert scores["halo_mean"] == pytest.approx(0.5) and scores["haze_mean"] == pytest.approx(0.5)


# ---- bad input

def break_frame(path: Path, **changes) -> None:
    with np.load(path) as packed: content = {name: packed[name] for name in packed.files} | changes
    np.savez(path, **{name: value for name, value in content.items() if value is not None})


@pytest.mark.parametrize("damage, reported",
                         [("missing", "is missing"), ("cut", "cut off"), ("text", "not an .npz"),
                          ("size", "frames.json says"), ("foreign", "was not rendered from"), ("nan", "NaN"),
                          ("convention", "alpha convention"), ("unnamed", "has no 'alpha_convention'"),
                          ("linear", "colour space"), ("manifest", "damaged"), ("none", "frames.json")])
def test_a_broken_frame_is_reported_in_one_sentence(damage, reported, frames, photos, tmp_path):
    folder = shutil.copytree(frames.folder, tmp_path / "x")
    path = folder / "test_r_0.npz"
    half = np.full((SIZE // 2, SIZE // 2), 0.5, np.float32)
    if damage == "missing": path.unlink()
    if damage == "cut": path.write_bytes(path.read_bytes()[:-400])
    if damage == "text": path.write_text("not a picture")
    if damage == "size":
        break_frame(path, alpha=half, rgb_premultiplied=half[..., None].repeat(3, -1), expected_depth=half)
    if damage == "foreign": break_frame(path, identity="0" * 16)
    if damage == "nan": break_frame(path, alpha=np.full((SIZE, SIZE), np.nan, np.float32))
    if damage == "convention": break_frame(path, alpha_convention="associated")
    if damage == "unnamed": break_frame(path, alpha_convention=None)
    if damage == "linear": break_frame(path, colour_space="linear")
    if damage == "manifest": (folder / "frames.json").write_text('{"format": "kilonb frames 1", "frames": [')
    if damage == "none": (folder / "frames.json").unlink()
    with pytest.raises(KiloError) as error: evaluate_frames(read_frames(folder), photos[:1], quiet=True)
    assert reported in sentence(error)


def test_nan_in_a_render_is_named_and_not_written(grid, cameras, photos, tmp_path):
    broken = make_student(grid, SHAPE, step=0.05)
    with torch.no_grad(): broken.field.networks.fill_(torch.nan)
    with pytest.raises(KiloError) as error: render_frames(broken.frame_source(), cameras, tmp_path, quiet=True)
    assert "NaN" in sentence(error) and "test/r_0" in str(error.value) and not list(tmp_path.glob("*.npz"))
    with pytest.raises(KiloError) as error: evaluate_frames(broken, photos, quiet=True)
    assert "NaN" in sentence(error)


@pytest.mark.parametrize("asked",
                         ["no views", "no frames", "twice", "nothing to compare", "no such file", "not a checkpoint",
                          "no such frame", "bad colour"])
def test_an_impossible_request_is_reported_in_one_sentence(asked, frames, photos, cameras, student, tmp_path):
    (tmp_path / "x.pt").write_bytes(b"PK\x03\x04 no checkpoint")
    calls = {
        "no views": lambda: evaluate_frames(frames, []),
        "no frames": lambda: render_frames(student.frame_source(), cameras, tmp_path / "f", frames=[]),
        "twice": lambda: evaluate_frames(frames, [photos[0], photos[0]], quiet=True),
        "nothing to compare": lambda: evaluate_frames(frames, cameras, quiet=True),
        "no such file": lambda: open_source(tmp_path / "absent.pt"),
        "not a checkpoint": lambda: open_source(tmp_path / "x.pt"),
        "no such frame": lambda: choose_frames(5, explicit=[7]),
        "bad colour": lambda: recomposite(frames.read("test/r_0"), "#12"),
    }
    with pytest.raises(KiloError) as error: calls[asked]()
    sentence(error)
    assert not (tmp_path / "f").exists()


# ---- diagnostics

def test_halo_and_leak_separate_errors_outside_and_inside_the_silhouette(photos):
    alpha = photos[0].alpha
    grown = torch.nn.functional.max_pool2d((alpha > 0)[None].float(), 9, 1, 4)[0]
    fat, thin, fog = (alpha_report(a, alpha) for a in (grown, alpha * 0.6, alpha.clamp(min=0.2)))
    assert fat["halo_mean"] > 0.5 and fat["haze_mean"] == 0 and fat["leak_mean"] < 0.01
    assert thin["halo_mean"] == 0 and thin["leak_mean"] == pytest.approx(0.4, abs=0.01)
    assert (
        fog["halo_mean"] == pytest.approx(0.2)
        and fog["haze_mean"] == pytest.approx(0.2)
        and fog["alpha_background_p50"] == pytest.approx(0.2)
    )


def test_transmittance_counts_every_ray_once(student, photos):
    report = transmittance_report(student, photos[0].camera, photos[0].alpha)
    assert report.ends_object.sum() == (photos[0].alpha
                                        >= 0.99).sum() and report.ends_background.sum() == (photos[0].alpha == 0).sum()
    assert 0 <= report.thickness_m < 0.5 and set(report.numbers()) == {
        "surface_thickness_m",
        "object_rays_leaking",
        "background_rays_blocked",
    }


def test_gradient_norms_are_those_of_autograd_and_leave_the_graph_and_grad_alone(student, photos, grid):
    run = Distillation(student, RayPool(photos[:1], grid, student.step), DistillConfig(rays=64))
    loss = run.step(0, torch.Generator().manual_seed(0))["loss"]
    norms = gradient_norms({"whole": loss, "double": 2 * loss}, student.parameters())
    assert student.field.networks.grad is None and norms["gradient_ratio_double"] == pytest.approx(2)
    loss.backward()
    assert student.field.networks.grad.norm().item() == pytest.approx(norms["gradient_norm_whole"], rel=1e-4)
    student.zero_grad(set_to_none=True)


def test_logging_gradient_norms_does_not_change_the_training(grid, photos):
    weights, config = [], ResponseLossConfig()
    lesson = DistillConfig(rays=64, loop=LoopConfig(steps=6, warmup_steps=1, log_every_steps=2))
    for terms in ([], [GradientRatios(config, every=2)]):
        pupil = make_student(grid, SHAPE, step=0.05)
        records = distill(pupil, RayPool(photos[:1], grid, 0.05), lesson, terms=terms, quiet=True).records
        weights.append(pupil.field.networks.detach())
    assert torch.equal(*weights) and all(record["gradients_ratio_alpha"] > 0 for record in records)


def test_differences_of_folders_are_signed_and_sorted(frames, ball, cameras, tmp_path):
    other = render_frames(source_of_gaussians(ball), cameras[:4], tmp_path, quiet=True).frames
    with pytest.raises(KiloError, match="lacks 1 frame: test/r_4"): folder_differences(frames, other)
    rows = folder_differences(frames, other, names=other.names)
    assert [row["psnr_db"] for row in rows.values()] == sorted(row["psnr_db"] for row in rows.values()) and set(
        rows
    ) == set(other.names)
    one, two = torch.rand(2, 12, 12, 3)
    assert torch.equal(frame_difference(one, two).signed, -frame_difference(two, one).signed) and frame_difference(
        one, two
    ).psnr_db == psnr_srgb_db(one, two)


# ---- many runs

def test_a_summary_reads_what_runs_wrote_and_shows_the_unfinished(tmp_path):
    for i, status in enumerate(("finished", "failed")):
        folder = tmp_path / "toy" / str(i)
        folder.mkdir(parents=True)
        (folder
         / "status.json").write_text(json.dumps({"status": status, "experiment": "toy",
                                                 "started": f"2026-01-0{i + 1}T00:00:00"}))
        (folder
         / "results.json").write_text(json.dumps({"results": {"test_psnr_srgb_white_db": 30.5 + i,
                                                              "test_lpips_vgg": "nan"}, "gates": {}}))
    table = summarise_runs(tmp_path)
    assert table.rows[0][:4] == ["toy/0", "", "", 30.5] and table.rows[1][2:4] == ["failed", None]
    assert "30.5" in table.text() and "| toy/0 |" in table.markdown() and "<td" in table._repr_html_()
    assert table.csv().splitlines()[1].startswith("toy/0,,,30.5")


# ---- pictures

def toy_items(count: int = 4) -> list[GalleryItem]:
    generator, target = torch.Generator().manual_seed(0), torch.rand(32, 32, 3,
                                                                     generator=torch.Generator().manual_seed(1))
    students = [(target + 0.05 * (i + 1) * torch.randn(32, 32, 3, generator=generator)).clamp(0, 1)
                for i in range(count)]
    scores = [{"psnr_srgb_white_db": psnr_srgb_db(s, target), "lpips_vgg": 0.5 - 0.1 * i} for i,
              s in enumerate(students)]
    return [GalleryItem(f"test/r_{i}", target, s, score) for i, (s, score) in enumerate(zip(students, scores))]


def test_the_worst_views_come_first_and_the_score_is_on_the_triptych():
    items = toy_items()
    assert [e.name for e in ranked(items)] == ["test/r_3", "test/r_2", "test/r_1", "test/r_0"]
    assert [e.name for e in ranked(items, "lpips_vgg", 2)] == ["test/r_0", "test/r_1"], "a large LPIPS is bad"
    with_number, without = triptych(items[0]), triptych(replace(items[0], name="", scores={"lpips_vgg": math.nan}))
    assert with_number.size == without.size and with_number.tobytes() != without.tobytes()
    assert contact_sheet(items, 2, 64).size == (2 * (3 * 64 + 8) + 10, 2 * (64 + 30) + 10)


HOSTILE = '</script><img src=http://example.org/x onerror="window.hurt=1"><b>'
PROBE = """<script>
window.faults = [];
addEventListener("error", event => window.faults.push(`error ${event.message}`));
addEventListener("securitypolicyviolation", event => window.faults.push(`blocked ${event.blockedURI}`));
addEventListener("load", () => setTimeout(() => {
  const names = () => [...document.querySelectorAll(".card")].map(card => card.dataset.name).join(",");
  const drawn = [...document.images].filter(image => image.dataset.face && image.naturalWidth);
  const told = {worst: names(), drawn: drawn.length};
  const [metric, large, picture] = ["metric", "large", "picture"].map(name => document.getElementById(name));
  metric.value = "lpips_vgg"; metric.dispatchEvent(new Event("change"));
  told.lpips = names();
  document.querySelector(".trio").click();
  told.open = large.open; told.target = picture.alt;
  document.querySelector("[data-show=prediction]").click(); told.prediction = picture.alt;
  document.getElementById("next").click(); told.caption = document.getElementById("caption").textContent;
  document.getElementById("blink").click();
  const faces = new Set([picture.alt]);
  const watch = setInterval(() => faces.add(picture.alt), 50);
  setTimeout(() => {
    clearInterval(watch);
    told.blinked = [...faces].sort().join(",");
    document.getElementById("close").click(); told.closed = !large.open;
    const loaded = performance.getEntriesByType("resource").map(entry => entry.name);
    told.requests = loaded.filter(name => !name.startsWith("data:"));
    told.hurt = window.hurt === undefined; told.faults = window.faults;
    told.overflow = document.documentElement.scrollWidth > innerWidth;
    document.title = JSON.stringify(told);
  }, 1500);
}, 300));
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt install chromium")
def test_the_gallery_sorts_enlarges_and_blinks_in_a_browser_without_a_network(tmp_path):
    items = toy_items()
    page = write_gallery(tmp_path / "gallery.html",
                         [*items, replace(items[0], name=HOSTILE, scores={"lpips_vgg": 0.05})], f"toys {HOSTILE}",
                         HOSTILE)
    page.write_text(page.read_text(encoding="utf-8").replace("<title>", PROBE + "<title>", 1), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
               "--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=390,800", "--enable-logging=stderr",
               f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=6000", "--dump-dom", page.as_uri()]
    seen = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    told = json.loads(html.unescape(re.search(r"<title>(\{.*?\})</title>", seen.stdout).group(1)))
    order = ["test/r_3", "test/r_2", "test/r_1", "test/r_0"]
    assert told["worst"] == ",".join([*order, HOSTILE]), told
    assert told["lpips"].startswith("test/r_0,test/r_1,test/r_2,test/r_3") and told["drawn"] == 15
    assert told["open"] and told["target"] == "target" and told["prediction"] == "prediction"
    assert told["caption"].startswith("test/r_1 · target · lpips_vgg 0.4")
    assert told["blinked"] == "prediction,target" and told["closed"]
    assert told["hurt"] and told["faults"] == [] and told["requests"] == [] and not told["overflow"], told
    assert "CONSOLE" not in seen.stderr, [line for line in seen.stderr.splitlines() if "CONSOLE" in line]


# ---- the experiment, by its command

@pytest.mark.slow
def test_render_and_rank_by_its_command(tmp_path):
    """A given student and two views: frames, statistics, scores against photographs and teacher, sheet and gallery are
    in the run's folder."""
    teacher = write_brickyard(tmp_path / "yard", width=64, height=64, train=1, test=3, count=4_000)
    space = occupancy_from_gaussians(teacher.means, teacher.quats, teacher.scales, teacher.opacities, 32)
    save_student(make_student(space, replace(SHAPE, cell_size=0.5), step=0.05), tmp_path / "student.pt", "averaged")
    done = run_here("run", "render_and_rank", "--data", f"blender:{tmp_path / 'yard'}", "--out", tmp_path / "run", "-p",
                    f"student={tmp_path / 'student.pt'}", "-p", "frames=0,2", "-p", "lpips_every=2", "-p",
                    "background=black")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    record = read_run(tmp_path / "run")
    assert (
        record.results["test_views"] == 2
        and record.results["weights"] == "averaged"
        and "2 frames: test/r_0, test/r_2" in done.stdout
    )
    for name in ("psnr_srgb_white_db", "psnr_blank_white_db", "psnr_srgb_black_db", "psnr_vs_teacher_db", "ssim_white",
                 "halo_mean"):
        assert isinstance(record.results[f"test_{name}"], float), name
    baselines = {line.gate.result: line.baseline for line in record.report.lines}
    assert baselines["test_psnr_srgb_white_db"] == record.results["test_psnr_blank_white_db"]
    assert record.results["test_views_in_data"] == 3 and record.results["test_self_check"] == 1
    assert read_frames(tmp_path / "run/frames").names == ["test/r_0", "test/r_2"]
    for name in ("frames/render_stats.json", "evaluation.json", "gallery.html", "figures/worst.png",
                 "figures/worst_view.png"):
        assert (tmp_path / "run" / name).is_file(), name
    scene = load_blender(tmp_path / "yard", "test")
    again = evaluate_frames(tmp_path / "run/frames", targets_from_images([scene[0], scene[2]]), quiet=True)
    assert again.means()["psnr_srgb_white_db"] == pytest.approx(record.results["test_psnr_srgb_white_db"])
    done = run_here("run", "render_and_rank", "--data", f"blender:{tmp_path / 'yard'}", "--out", tmp_path / "one", "-p",
                    f"student={tmp_path / 'student.pt'}", "-p", "frames=0", "-p", "lpips_every=2", "-p",
                    "drawing.deferred=true", "-p", "drawing.supersampling=2")
    assert done.returncode == 0 and "one colour per ray, 4 rays per pixel" in done.stdout, done.stderr[-2000:]
    assert read_frames(tmp_path / "one/frames").source["kind"] == "student, one colour per ray, 4 rays per pixel"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_frames_rendered_on_a_gpu_are_those_of_the_cpu_with_the_gpu_memory(frames, student, cameras, tmp_path):
    save_student(student, tmp_path / "student.pt", "averaged")
    outcome = render_frames(open_source(tmp_path / "student.pt", device="cuda"), cameras, tmp_path / "frames", [0, 1],
                            quiet=True)
    assert outcome.statistics["peak_memory_of"] == "gpu" and outcome.statistics["peak_memory_mb"] > 0
    for name in outcome.names:
        assert psnr_srgb_db(recomposite(outcome.frames.read(name)), recomposite(frames.read(name))) > 45


def test_a_frame_without_depth_is_a_frame(tmp_path):
    write_frame(tmp_path / "x.npz", RenderedFrame("x", torch.zeros(4, 4, 3), torch.zeros(4, 4)))
    assert read_frame(tmp_path / "x.npz").expected_depth is None and recomposite(tmp_path / "x.npz").min() == 1
