"""After the training of an animal: scores, renders, gaussians, figures, pages, resources and the explorer."""
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import h5py
import pytest
import torch

from kilonb.core.errors import KiloError
from kilonb.data.video import read_video, video_info
from kilonb.metrics.masks import intersection_over_union
from kilonb.pose.analysis import analysis_page, write_analysis_page
from kilonb.pose.explorer import FREE, PoseExplorer
from kilonb.pose.renders import (
    read_gaussian_frames,
    read_pose_renders,
    write_gaussian_frames,
    write_pose_renders,
    write_turntable,
)
from kilonb.pose.resources import ResourceMeter, run_resources
from kilonb.pose.score_figures import body_errors, prediction_sheet
from kilonb.pose.scores import (
    SCORES,
    CarvingVariant,
    animal_scores,
    carving_variants,
    draw_carving,
    over_white,
    score_recording,
    summarise_scores,
)
from kilonb.pose.toy_recordings import carved_gaussians, write_toy_recording
from kilonb.runs.gates import RED, Gate, verdict

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>'


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Three frames of five cameras; the third camera's mask is empty in the second frame; names are hostile."""
    return write_toy_recording(tmp_path_factory.mktemp("pose") / "toy.zarr", 3, hidden=[(1, 2)], name=HOSTILE, width=96,
                               height=72, resolution=32, names=["a", HOSTILE, "c$x", "d", "e"])


@pytest.fixture(scope="module")
def rows(prepared):
    return score_recording(carved_gaussians, prepared, range(3), variants=[CarvingVariant(prepared.grid, 0)])


def test_l1_is_the_sum_of_differences_over_pixels_and_channels_divided_by_the_mask():
    mask = torch.zeros(20, 30)
    mask[4:18, 3:19] = 1
    target, drawn = over_white(torch.full((20, 30, 3), .25), mask), torch.ones(20, 30, 3)
    drawn[0, 0] = 0                                             # one wrong pixel outside the mask counts as well
    scores = animal_scores(drawn, torch.zeros(20, 30), target, mask)
    area = 14 * 16
    assert scores["iou"] == 0 and math.isclose(scores["l1"], (area * 3 * .75 + 3) / area, rel_tol=1e-6)
    assert math.isclose(scores["psnr_foreground_db"], -20 * math.log10(.75), rel_tol=1e-6), "the crop is the mask"
    assert math.isclose(scores["psnr_mask_db"], -20 * math.log10(.75), rel_tol=1e-6)
    assert scores["psnr_full_db"] > scores["psnr_foreground_db"]


def test_a_perfect_prediction_scores_one_and_zero_and_no_infinite_value_reaches_a_gate(prepared):
    rgb, masks = prepared.pictures(0)
    target = over_white(rgb[3], masks[3])
    scores = animal_scores(target, masks[3], target, masks[3])
    assert scores["iou"] == 1 and scores["l1"] == 0 and math.isclose(scores["ssim_foreground"], 1, abs_tol=1e-6)
    assert all(value is None or math.isfinite(value) for value in scores.values())
    assert scores["psnr_foreground_db"] is None and verdict(Gate("x", at_least=1.0), None) != "green"
    assert verdict(Gate("x", at_least=1.0), math.nan) == RED


def test_gaussians_that_are_not_finite_are_refused_not_scored(prepared):
    def broken(recording, i, inputs):
        cloud = carved_gaussians(recording, i, inputs)
        return replace(cloud, sh=cloud.sh * math.nan)
    with pytest.raises(KiloError, match="NaN or infinite"): score_recording(broken, prepared, [0])


def test_a_predictor_without_gaussians_scores_as_an_empty_picture(prepared):
    nothing = lambda recording, i, inputs: carved_gaussians(recording, i, inputs).subset(torch.zeros(0).long())
    rows = score_recording(nothing, prepared, [0], variants=[CarvingVariant(prepared.grid, 0)])
    for row in rows: assert [row[name] for name in SCORES] == [row[f"empty_{name}"] for name in SCORES]


def test_held_out_cameras_are_never_given_to_the_predictor_and_each_is_held_out_once(prepared):
    asked = []
    def spy(recording, i, inputs):
        asked.append((i, tuple(inputs)))
        return carved_gaussians(recording, i, inputs)
    rows = score_recording(spy, prepared, [2], variants=[CarvingVariant(prepared.grid, 0)])
    assert len(asked) == 5 == len(rows)
    for row, (_, inputs) in zip(rows, asked):
        assert row["held_out"] and prepared.names.index(row["camera"]) not in inputs and len(inputs) == 4
    assert {row["camera"] for row in rows} == set(prepared.names)


def test_carving_beside_the_model_is_the_best_of_the_ways_to_carve(prepared):
    ways = carving_variants(prepared.grid, 48)
    rows = score_recording(carved_gaussians, prepared, [0], variants=ways)
    means = [torch.stack([intersection_over_union(draw_carving(prepared, 0, [c for c in range(5) if c != k], [k], [way])
                                                  [0][1][0], prepared.pictures(0)[1][k]) for k in range(5)]).mean()
             for way in ways]
    reported = sum(row["carving_iou"] for row in rows) / 5
    assert math.isclose(reported, max(float(value) for value in means), rel_tol=1e-5)
    assert rows[0]["carving"] == str(ways[max(range(len(ways)), key=lambda n: means[n])])


def test_views_with_an_empty_mask_have_no_score_and_are_counted(rows):
    results = summarise_scores(rows)
    assert results["heldout_views"] == 15 and results["heldout_views_without_mask"] == 1
    known = [row["iou"] for row in rows if row["iou"] is not None]
    assert len(known) == 14 and math.isclose(results["heldout_iou"], sum(known) / 14)


def test_half_written_or_damaged_renders_are_refused(prepared, tmp_path):
    renders = write_pose_renders(tmp_path / "renders.h5", carved_gaussians, prepared, [0, 2])
    assert renders.shape == (2, 5, 72, 96) and not renders.given.diagonal().any()
    whole = renders.path.read_bytes()
    for length in (0, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.h5").write_bytes(whole[:length])
        with pytest.raises(KiloError, match="cut short"): read_pose_renders(tmp_path / "cut.h5")
    (tmp_path / "open.h5").write_bytes(whole)
    with h5py.File(tmp_path / "open.h5", "r+") as file: del file.attrs["complete"]
    with pytest.raises(KiloError, match="complete"): read_pose_renders(tmp_path / "open.h5")
    def stopped(recording, i, inputs):
        if i == 2: raise KeyboardInterrupt
        return carved_gaussians(recording, i, inputs)
    with pytest.raises(KeyboardInterrupt): write_pose_renders(tmp_path / "renders.h5", stopped, prepared, [0, 2])
    assert renders.path.read_bytes() == whole and not list(tmp_path.glob(".*")), "the earlier file stays as it was"


def test_gaussians_come_back_from_ply_files_bit_for_bit_and_a_partial_folder_is_refused(prepared, tmp_path):
    clouds = write_gaussian_frames(tmp_path / "gaussians", carved_gaussians, prepared, [0, 2], [0, 1, 3])
    for row, i in enumerate((0, 2)):
        original = carved_gaussians(prepared, i, [0, 1, 3]).parameters()
        assert all(torch.equal(value, original[name]) for name, value in clouds.gaussians(row).parameters().items())
    assert torch.allclose(clouds.centres, prepared.centres[[0, 2]])
    assert torch.allclose(clouds.headings, prepared.headings[[0, 2]]) and clouds.frames == [0, 10]
    (clouds.folder / clouds.files[1]).unlink()
    with pytest.raises(KiloError, match="copied in part"): read_gaussian_frames(clouds.folder)
    index = json.loads((clouds.folder / "index.json").read_text())
    index["frames"][1]["file"] = "../outside.ply"
    (clouds.folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(KiloError, match="copied in part"): read_gaussian_frames(clouds.folder)


def test_a_turntable_shows_the_animal_from_all_round_and_a_sequence_has_a_picture_per_frame(prepared, tmp_path):
    path = write_turntable(tmp_path / "turn.mp4", carved_gaussians, prepared, [0], 6, width=96, height=72)
    assert video_info(path).frames == 6
    for frame in read_video(path): assert .03 < (frame.rgb < 240).any(-1).mean() < .6
    moving = write_turntable(tmp_path / "sequence.mp4", carved_gaussians, prepared, [0, 2], width=96, height=72)
    assert video_info(moving).frames == 2


def test_errors_appear_at_the_part_of_the_body_that_is_drawn_wrongly(prepared, tmp_path):
    def without_rear(recording, i, inputs):
        cloud, heading = carved_gaussians(recording, i, inputs), recording.headings[i]
        ahead = torch.stack([heading.cos(), heading.sin(), torch.tensor(0.0)])
        return cloud.subset((cloud.means - recording.centres[i]) @ ahead > -.015)
    renders = write_pose_renders(tmp_path / "rear.h5", without_rear, prepared, [0, 2])
    complete = write_pose_renders(tmp_path / "whole.h5", carved_gaussians, prepared, [0, 2])
    whole, thirds = body_errors(prepared, complete).thirds(), body_errors(prepared, renders).thirds()
    assert thirds["rear"] > 2 * whole["rear"] and thirds["front"] < 1.2 * whole["front"]
    assert len(prediction_sheet(prepared, renders, 0, CarvingVariant(prepared.grid, 0)).axes) == 21


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.handlers = [], []

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


def test_a_page_escapes_hostile_names_runs_nothing_and_loads_nothing(prepared, rows, tmp_path):
    page = write_analysis_page(tmp_path / "page.html", HOSTILE, {HOSTILE: rows}, {}, {HOSTILE: 1.0}, HOSTILE)
    text, tags = page.read_text(encoding="utf-8"), _Tags()
    tags.feed(text)
    assert "script" not in tags.found and not tags.handlers and "img" not in tags.found
    assert text.count("&lt;script&gt;") >= 4 and "script-src 'none'" in text
    assert not re.search(r'(?:src|href)="(?!data:)', text) and "not ground truth" in text
    assert "not ground truth" not in analysis_page("t", {"m": rows}, mask_source="true")


def test_resources_that_cannot_be_measured_are_none_not_zero(tmp_path):
    (tmp_path / "file").write_bytes(bytes(1_000_000))
    with ResourceMeter("cpu") as meter, meter.part("draw"): pass
    used = run_resources(meter, tmp_path)
    assert used["disk_mb"] == 1 and used["draw_s"] >= 0 and used["peak_memory_mb"] > 50
    assert all(used[name] is None for name in used if name.startswith("gpu_"))


def test_the_explorer_has_a_static_picture_and_keeps_its_state_after_a_refused_change(prepared):
    explorer = PoseExplorer(prepared, carved_gaussians, [0, 2])
    bundle = explorer._repr_mimebundle_()
    assert bundle["image/png"].startswith("iVBORw0K") and "(held out)" in explorer.summary
    explorer.show(camera=HOSTILE, layer="difference", frame=1)
    kept = explorer.shown
    for wrong in (dict(camera=FREE), dict(frame=2), dict(layer="x"), dict(other=1), dict(elevation_deg=math.nan)):
        with pytest.raises(KiloError): explorer.show(**wrong)
        assert explorer.shown == kept
    assert "<script" not in explorer.controls["note"].value
    explorer.controls["camera"].value = FREE
    assert explorer.shown.layer == "model" and explorer.controls["azimuth_deg"].disabled is False
