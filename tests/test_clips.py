"""PandaSet for Flux4D: tables of every form, tracks and their flow, the clip index, and its commands."""
import gzip
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import real_data

from kilonb.cli.main import main
from kilonb.core.errors import KiloError
from kilonb.data.tables import read_table, write_table
from kilonb.flux4d.clips import (
    SETTINGS,
    TEST_LOGS,
    ClipIndex,
    build_clip_index,
    clips_of,
    missing_clip_files,
    read_clip_index,
    write_clip_index,
)
from kilonb.scenes import boxtown
from kilonb.scenes.boxtown import TownConfig, build_town, scene_flow, write_pandaset
from kilonb.scenes.pandaset import load_pandaset, load_surround_frames, read_poses, read_times
from kilonb.scenes.tracks import box_flow, build_tracks, dynamic_mask

TOWN = TownConfig(streets_x=2, streets_y=2, pitch_x=60, pitch_y=60, connected=2, cars=16, people=8, duration_s=3)
SEED = 11


@pytest.fixture(scope="module")
def town(): return build_town(TOWN, SEED)


@pytest.fixture(scope="module")
def drive(town, tmp_path_factory) -> Path:
    """A drive of 16 frames through a town: one evaluation clip."""
    root = tmp_path_factory.mktemp("drive")
    write_pandaset(root, town, frames=16, width=96, height=54, channels=16, steps=400, samples=1)
    return root


@pytest.fixture
def copy(drive, tmp_path) -> Path: return Path(shutil.copytree(drive, tmp_path / "drive"))


@pytest.fixture(scope="module")
def real_sequence(): return load_pandaset(real_data("pandaset"))


@pytest.fixture(scope="module")
def real_tracks(real_sequence): return build_tracks(real_sequence)


def failure(action, *arguments) -> str:
    with pytest.raises(KiloError) as caught: action(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def command(capfd, *arguments) -> tuple[int, str, str]:
    capfd.readouterr()
    return main([str(argument) for argument in arguments]), *capfd.readouterr()


def edit_json(path: Path, change) -> None:
    values = json.loads(path.read_text())
    changed = change(values)
    path.write_text(json.dumps(values if changed is None else changed))


# ------------------------------------------------------------------------------------------------------------- readers

def test_uncompressed_tables_are_read_like_compressed_ones(copy):
    before = load_pandaset(copy)
    for path in copy.rglob("*.pkl.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    after = load_pandaset(copy)
    assert after.missing == before.missing == {} and after.problems == [] and len(after) == 16
    frame = after.at(7)
    assert frame.file("lidar").name == "07.pkl" and len(frame.cuboids()) > 0
    assert len(frame.semseg()) == len(frame.sweep().points) == len(frame.lidar_points())
    assert build_tracks(after, [7], points=True).boxes_in(7).boxes.sizes.shape[0] > 0


def test_of_two_tables_that_differ_the_compressed_one_is_used_and_the_difference_is_named(copy):
    lidar = copy / "001" / "lidar"
    (lidar / "03.pkl").write_bytes(gzip.decompress((lidar / "04.pkl.gz").read_bytes()))
    (lidar / "05.pkl").write_bytes(gzip.decompress((lidar / "05.pkl.gz").read_bytes()))
    sequence = load_pandaset(copy)
    assert [(problem.frame, problem.message) for problem in sequence.problems] == [
        ("001/03", "lidar: 03.pkl.gz and 03.pkl differ; 03.pkl.gz is used")]
    points = torch.from_numpy(read_table(lidar / "03.pkl.gz")["x"])
    assert torch.equal(sequence.at(3).sweep().points[:, 0], points)


def test_a_malicious_pickle_is_refused_under_either_name(copy):
    class Evil:
        def __reduce__(self): return (Path.touch, (copy / "executed",))
    lidar = copy / "001" / "lidar"
    (lidar / "03.pkl.gz").unlink()
    (lidar / "03.pkl").write_bytes(pickle.dumps(Evil()))
    assert "not allowed" in failure(load_pandaset(copy).at(3).sweep) and not (copy / "executed").exists()


def test_classes_that_do_not_fit_the_sweep_and_a_truncated_sweep_name_their_files(copy):
    frame = load_pandaset(copy).at(2)
    assert frame.semseg().max() <= 42 and load_pandaset(copy).semantic_classes()[13] == "Car"
    write_table(frame.file("annotations/semseg"), {"class": np.full(5, 13)})
    message = failure(frame.semseg)
    assert "semseg/02.pkl.gz' has 5 rows" in message and "lidar/02.pkl.gz" in message
    path = frame.file("lidar")
    path.write_bytes(path.read_bytes()[:999])
    assert "lidar/02.pkl.gz" in failure(frame.sweep)


@pytest.mark.parametrize("part", ["lidar", "camera/front_camera", "meta"])
def test_time_stamps_that_do_not_increase_are_refused_with_file_and_frame(copy, part):
    path = copy / "001" / part / "timestamps.json"
    edit_json(path, lambda times: [*times[:9], times[8], *times[10:]])
    message = failure((lambda p: load_pandaset(p).gps()) if part == "meta" else load_pandaset, copy)
    assert f"{part}/timestamps.json: the time of frame 9" in message and "frame 8" in message


def test_a_camera_without_a_pose_is_refused_with_file_and_frame(copy):
    folder = copy / "001" / "camera" / "front_camera"
    edit_json(folder / "poses.json", lambda poses: [*poses[:4], None, *poses[5:]])
    assert "front_camera/poses.json: frame 4 has no pose" in failure(load_pandaset, copy)
    (folder / "poses.json").unlink()
    assert "front_camera/poses.json is missing" in failure(load_pandaset, copy)


def test_numbers_that_no_camera_or_clock_has_are_refused(tmp_path):
    path = tmp_path / "list.json"
    for text in ("[1e400, 2e400]", f"[1, {10 ** 400}]", "[" * 50_000, '{"a": 1}', "[1, null]"):
        path.write_text(text)
        failure(read_times, path)
    for position in ('{"x": 1e400, "y": 0, "z": 0}', f'{{"x": 1, "y": 0, "z": {10 ** 400}}}'):
        path.write_text(f'[{{"position": {position}, "heading": {{"w": 1, "x": 0, "y": 0, "z": 0}}}}]')
        assert "frame 0" in failure(read_poses, path)


def test_gaps_of_a_recording_are_problems_of_its_frames(copy):
    (copy / "001" / "lidar" / "07.pkl.gz").unlink()
    (copy / "001" / "camera" / "left_camera" / "03.jpg").unlink()
    assert load_pandaset(copy).gaps() == {"lidar": (7,), "camera/left_camera": (3,)}
    problems = {(problem.frame, problem.message) for problem in load_surround_frames(copy).problems}
    assert problems == {("001/07", "lidar is missing"), ("001/03", "camera/left_camera is missing")}


def test_the_real_sequence_has_gps_and_forty_two_classes_that_fit_its_sweeps(real_sequence):
    names, frame = real_sequence.semantic_classes(), real_sequence.at(40)
    classes = frame.semseg()
    assert len(names) == 42 and names[13] == "Car" and set(classes.unique().tolist()) - {0} <= set(names)
    boxes = [box for box, label in zip(frame.boxes.box_to_world, frame.boxes.labels) if label == "Car"]
    assert len(boxes) > 10
    gps = real_sequence.gps()
    speeds = gps.velocity_m_s.norm(dim=-1)[40:56]
    driven = torch.stack([f.vehicle_to_world[:3, 3] for f in real_sequence]).diff(dim=0).norm(dim=-1) / .1
    assert len(gps.times_s) == 80 and abs(speeds[:-1] - driven).median() < .5


# -------------------------------------------------------------------------------------------------------------- tracks

@pytest.mark.incident(14)
def test_incident_14_velocities_need_times_that_are_float64_until_they_are_relative(drive, town):
    """In float32 all annotations of a second have one time, and every finite difference divides by zero."""
    tracks = build_tracks(load_pandaset(drive))
    seconds = torch.cat([track.times_s for track in tracks])
    assert seconds.dtype == torch.float64 and len(seconds.float().unique()) == 1 and len(seconds.unique()) > 100
    moving = [track for track in tracks if len(track) > 5 and track.velocities.norm(dim=-1).median() > 3]
    assert len(moving) > 3
    truth = {round(town.state(number, 1.0).speed, 1) for number in town.world.by_instance}
    for track in moving:
        assert track.velocities.isfinite().all() and track.velocities.norm(dim=-1).max() < max(truth) + 1
        times = track.times_s[track.chain(0)]
        assert (times.diff() > .05).all() and (times.float().diff() == 0).all()


def exact_flow(town, sequence, number, interval):
    """(flow of boxtown [N, 3], which points lie on an actor) for the sweep of a frame that was recorded with seed
    `SEED`."""
    frame, pose = sequence.at(number), town.actor(201).pose
    scans = [boxtown.spin_lidar(town.world, lambda t, m=mount: pose(t).matrix() @ m,
                                boxtown._town_time(frame.time_s) + delay, lidar, seed=10 * SEED + d, without=201)
             for d, (mount, lidar, delay) in enumerate(boxtown.pandaset_lidars(16, 400))]
    points, times = (np.concatenate([getattr(scan, name) for scan in scans]) for name in ("points", "time"))
    instance = np.concatenate([scan.instance for scan in scans])
    assert np.allclose(points - points[0], (frame.sweep().points - frame.sweep().points[0]).numpy(), atol=1e-6)
    return scene_flow(town, points, instance, times, times + interval), instance > 0


def test_box_flow_is_the_exact_flow_of_the_town(drive, town):
    sequence = load_pandaset(drive)
    tracks, errors, sizes, held = build_tracks(sequence), [], [], []
    for number in (2, 8, 13):
        sweep = sequence.at(number).sweep()
        flow = box_flow(tracks, sweep.points, sweep.sensors, number, number + 1)
        true, on_actor = exact_flow(town, sequence, number, np.nan_to_num(flow.interval_s.numpy(), nan=.1))
        moving = np.linalg.norm(true, axis=-1) >= .05
        usable = flow.known.numpy()
        held.append(flow.objects.numpy()[moving] >= 0)
        assert (flow.displacement.numpy()[~on_actor & (flow.objects.numpy() < 0)] == 0).all()
        errors.append(np.linalg.norm(flow.displacement.numpy() - true, axis=-1)[moving & usable])
        sizes.append(np.linalg.norm(true, axis=-1)[moving & usable])
    errors, sizes = np.concatenate(errors), np.concatenate(sizes)
    assert len(errors) > 50 and errors.mean() < .05 * sizes.mean(), (errors.mean(), sizes.mean())
    assert np.concatenate(held).mean() > .85, "the ends of an object are swept .03 s before and after its centre"


def test_siblings_are_one_object_with_one_box_per_sensor_and_frame(drive, real_tracks):
    for tracks in (build_tracks(load_pandaset(drive)), real_tracks):
        names = [name for track in tracks for name in set(track.boxes.identities)]
        assert len(names) == len(set(names)), "a uuid is part of one track"
        assert any(len(set(track.boxes.identities)) == 2 for track in tracks)
        for track in tracks:
            rows = list(zip(track.frames.tolist(), track.sensors.tolist()))
            assert len(rows) == len(set(rows)), f"{track.identity} has two boxes for one sensor and frame"


def test_an_interpolated_pose_is_the_annotation_at_its_time_and_between_them_between(real_tracks):
    track = max(real_tracks, key=lambda t: t.velocities.norm(dim=-1).median() * (len(t) > 20))
    chain = track.chain(0)
    for k in chain[5:9].tolist():
        state = track.state_at(track.times_s[k].item())
        torch.testing.assert_close(state.box_to_world, track.boxes.box_to_world[k], atol=1e-5, rtol=0)
    a, b = chain[5], chain[6]
    middle = track.state_at(((track.times_s[a] + track.times_s[b]) / 2).item())
    torch.testing.assert_close(middle.box_to_world[:3, 3], (track.boxes.centres[a] + track.boxes.centres[b]) / 2,
                               atol=1e-4, rtol=0)


def test_the_flow_of_the_real_snippet_has_its_known_figures(real_sequence, real_tracks):
    """Counted once on frames 40 to 54: 31-32 moving boxes, 23-25 in the picture; 65,000-71,500 points in view,
    7,312-11,736 dynamic (14.9%); zero-flow EPE .752 m over dynamic points (median .812, p90 .949), .112 m over all in
    view; one car holds 60% of the moving points, two 85%; 11-16% of the pixels. Occlusion is not tested."""
    in_view, dynamic, flows, everything, moving, owners, shares = [], [], [], [], [], [], []
    for number in range(40, 55):
        frame = real_sequence.at(number)
        sweep, camera = frame.sweep(), frame.cameras["front_camera"]
        pixels, depth = camera.project(sweep.points.float())
        view = (depth > 0) & camera.contains(pixels)
        flow = box_flow(real_tracks, sweep.points, sweep.sensors, number, number + 1)
        size = flow.displacement.norm(dim=-1)
        moves = view & (size >= .05)
        in_view.append(int(view.sum())), dynamic.append(int(moves.sum()))
        flows.append(size[moves]), everything.append(size[view]), owners.append(flow.objects[moves])
        moving.append(len(real_tracks.boxes_in(number).moving()))
        time = frame.camera_times_s["front_camera"]
        shares.append(dynamic_mask(real_tracks, camera.resized(240, 135), time).float().mean().item())
    flows, counts = torch.cat(flows), torch.cat(owners).bincount().sort(descending=True).values
    print(f"moving {min(moving)}-{max(moving)}; in view {min(in_view)}-{max(in_view)}, dynamic "
          f"{min(dynamic)}-{max(dynamic)} ({sum(dynamic) / sum(in_view):.4f}); EPE {flows.mean():.4f}, median "
          f"{flows.median():.4f}, p90 {flows.quantile(.9):.4f}, all {torch.cat(everything).mean():.4f}; pixels "
          f"{min(shares):.3f}-{max(shares):.3f}")
    assert min(moving) >= 30 and max(moving) <= 32
    assert (min(dynamic), max(dynamic)) == (7312, 11736) and min(in_view) > 65_000 and max(in_view) < 71_500
    assert abs(flows.mean() - .752) < .002 and abs(flows.quantile(.9) - .949) < .001
    assert abs(sum(dynamic) / sum(in_view) - .149) < .002 and abs(torch.cat(everything).mean() - .112) < .002
    assert abs(counts[0] / counts.sum() - .60) < .01 and abs(counts[:2].sum() / counts.sum() - .85) < .01
    assert min(shares) > .11 and max(shares) < .165


# --------------------------------------------------------------------------------------------------------------- clips

def test_103_sequences_of_80_frames_give_the_counts_of_the_earlier_study():
    names = [*TEST_LOGS, *[name for k in range(1, 120) if (name := f"{k:03d}") not in TEST_LOGS][:93]]
    lengths = dict.fromkeys(names, 80)
    assert [len(build_clip_index(lengths, setting)) for setting in SETTINGS] == [1116, 558, 40]
    assert len(build_clip_index(lengths)) == 1714 and len(build_clip_index(lengths, tiny=True)) == 22


def test_the_real_data_hold_exactly_one_evaluation_clip(real_sequence):
    index = clips_of(real_sequence.root)
    assert [clip.frames for clip in index] == [tuple(range(40, 56))]
    assert index[0].numbers(index[0].inputs) == (40, 42, 44, 46, 48, 50) and index[0].sequence == "002"
    assert missing_clip_files(index, real_sequence.root) == {} == missing_clip_files(index, real_sequence.root.parent)


def test_an_index_survives_its_file_and_a_failed_write_leaves_the_old_one(tmp_path):
    index = build_clip_index({"001": 80, "002": 80}, tiny=True)
    write_clip_index(tmp_path / "tiny.json", index)
    assert read_clip_index(tmp_path / "tiny.json") == index and len(index) == 22
    failure(write_clip_index, tmp_path / "tiny.json", ClipIndex(index.header, (index[0], index[0])))
    assert read_clip_index(tmp_path / "tiny.json") == index and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("change, message", [
    (lambda v: v["header"].update(version=2), "version 2"),
    (lambda v: v["header"].update(settting="all"), "did you mean 'setting'"),
    (lambda v: v["clips"][1].update(target=[1]), "'target'"),
    (lambda v: v["clips"][0].update(sequence=["001", "002"]), "mixes the sequences 001 and 002"),
    (lambda v: v["clips"][0].update(frames=["001/00", "002/01"]), "mixes the sequences 001 and 002"),
    (lambda v: v["clips"][0].update(sequence="042"), "one sequence"),
    (lambda v: v["clips"][0]["frames"].sort(reverse=True), "must increase"),
    (lambda v: v["clips"][0]["frames"].__setitem__(1, 0), "listed twice"),
    (lambda v: v["clips"][0].update(future=[16]), "out of range"),
    (lambda v: v["clips"][0]["frames"].__setitem__(1, 1.5), "must be"),
    (lambda v: v["clips"].append(v["clips"][0]), "two clips have the name"),
    (lambda v: v.pop("header"), "not a clip index")])
def test_a_damaged_index_is_refused_in_one_sentence(tmp_path, change, message):
    write_clip_index(tmp_path / "clips.json", build_clip_index({"001": 80}, "evaluation"))
    edit_json(tmp_path / "clips.json", lambda values: change(values) and None)
    assert message in failure(read_clip_index, tmp_path / "clips.json")


# ------------------------------------------------------------------------------------------------------------ commands

def test_the_command_builds_an_index_inspects_it_and_names_what_is_missing(copy, tmp_path, capfd):
    file = tmp_path / "clips.json"
    code, out, errors = command(capfd, "data", "clips", f"pandaset:{copy}", "-o", file)
    assert code == 0 and errors == "" and "001_evaluation_00-15" in out, errors
    assert command(capfd, "data", "clips", file, "--data", copy)[0] == 0
    assert command(capfd, "data", "verify", file, "--data", copy)[0] == 0
    (copy / "001" / "lidar" / "07.pkl.gz").unlink()
    (copy / "001" / "camera" / "front_camera" / "09.jpg").unlink()
    for verb in ("clips", "verify"):
        code, out, _ = command(capfd, "data", verb, file, "--data", copy)
        assert code == 1 and "001/lidar/07.pkl.gz" in out and "001/camera/front_camera/09.jpg" in out, out
    code, out, errors = command(capfd, "data", "clips", copy)
    assert code == 2 and "No clip" in errors and errors.count("\n") == 1


@pytest.mark.parametrize("arguments, message", [
    (("clips", "no_such_drive"), "Unknown dataset"), (("clips", "brickyard"), "kind blender"),
    (("clips", "gone.json"), "there is no such file"), (("clips", "pandaset:/no/drive"), "is not there"),
    (("verify", "gone.json"), "there is no such file")])
def test_bad_input_of_the_commands_is_one_sentence(capfd, arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, errors = command(capfd, "data", *arguments)
    assert code == 2 and out == "" and message in errors and errors.count("\n") == 1, errors


def test_verify_names_a_sweep_that_is_missing_between_others_without_any_list(copy, capfd):
    code, out, _ = command(capfd, "data", "verify", copy)
    assert code == 0 and "no gap" in out
    (copy / "001" / "lidar" / "07.pkl.gz").unlink()
    (copy / "001" / "annotations" / "semseg" / "04.pkl.gz").unlink()
    code, out, _ = command(capfd, "data", "verify", copy)
    assert code == 1 and "001/lidar/07.pkl.gz" in out and "001/annotations/semseg/04.pkl.gz" in out
    (copy / "001" / "camera" / "left_camera" / "poses.json").unlink()
    code, out, _ = command(capfd, "data", "verify", copy)
    assert code == 1 and "left_camera/poses.json is missing" in out
    (copy / "001" / "lidar" / "poses.json").unlink()
    code, out, _ = command(capfd, "data", "verify", copy)
    assert code == 1 and "001/lidar/poses.json" in out


def test_verify_names_what_the_list_of_a_folder_has_and_the_folder_has_not(copy, capfd):
    files = {f"001/lidar/{k:02d}.pkl.gz": {"bytes": 1, "sha256": "0" * 64} for k in range(14, 22)}
    (copy / "MANIFEST.json").write_text(json.dumps({"files": files}))
    code, out, _ = command(capfd, "data", "verify", copy)
    assert code == 1 and "001/lidar/21.pkl.gz" in out and "of the wrong size" in out
