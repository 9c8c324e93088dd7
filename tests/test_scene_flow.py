"""Scene flow: Argoverse 2 files are read as they are written and refused when they are damaged; scores agree with the
official labels, and always show zero flow, ego motion and the number of points that move."""
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers import real_data, without_kernel

from kilonb.batch.execution import run_notebook
from kilonb.core.errors import KiloError
from kilonb.core.testing import expect_error
from kilonb.data.feather import read_feather, write_feather
from kilonb.data.manifests import load_manifests
from kilonb.data.registry import find_maker, find_reader
from kilonb.flux4d.flow_samples import load_flow_samples
from kilonb.metrics.flow import (
    FLOW_CLASSES,
    FlowTruth,
    ego_motion_flow,
    is_dynamic,
    join_truths,
    perfect_flow,
    score_flow,
    zero_flow,
)
from kilonb.runs.notebooks import read_notebook
from kilonb.scenes.argoverse2 import (
    flow_truth,
    labels_from_boxes,
    load_argoverse2,
    load_flow_pair,
    pair_box_flow,
    read_argoverse2_sweep,
)
from kilonb.scenes.boxtown_argoverse2 import make_argoverse2
from kilonb.scenes.ground import ground_mask


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory) -> Path:
    """A small pair of the procedural town."""
    folder = tmp_path_factory.mktemp("av2") / "pair"
    make_argoverse2(folder, channels=24, steps=450, seed=3)
    return folder


@pytest.fixture(scope="module")
def official():
    """The Argoverse 2 pair with its official labels."""
    return load_flow_pair(load_argoverse2(real_data("av2_flow_7fab2350")))


@pytest.fixture
def damaged(synthetic, tmp_path) -> Path:
    """A copy of the synthetic pair, to be damaged."""
    return Path(shutil.copytree(synthetic, tmp_path / "pair"))


def crowd(moving: int = 50, count: int = 1000) -> FlowTruth:
    """`moving` points of one car that moves by .8 m, the rest background; the vehicle moves by 1 m."""
    objects = torch.where(torch.arange(count) < moving, 0, -1)
    ego = torch.tensor([-1.0, 0, 0]).expand(count, 3)
    flow = ego + torch.tensor([.8, 0, 0]) * (objects >= 0)[:, None]
    return FlowTruth(flow, ego, torch.where(objects >= 0, 1, 0), torch.ones(count).bool(), objects)


def test_the_official_pair_has_its_known_numbers_of_points(official):
    truth = flow_truth(official)
    assert len(truth) == 99_229 and int(official.labels.dynamic.sum()) == 2_037
    counts = score_flow(zero_flow(truth), truth)
    assert (counts["flow_points"], counts["flow_points_dynamic"], counts["flow_objects"]) == (78_506, 1_819, 6)
    assert counts["flow_points_dynamic_car"] + counts["flow_points_dynamic_ped"] == 1_819
    assert torch.equal(is_dynamic(truth), official.labels.dynamic), "by the rule of .05 m"


def test_zero_flow_and_ego_motion_score_what_they_must_on_the_official_labels(official):
    truth = flow_truth(official)
    scores = score_flow(ego_motion_flow(truth), truth)
    zero = {"static_epe_car_m": .076, "static_epe_ped_m": .070, "static_epe_bg_m": .141, "dynamic_normalised_car": 1.08,
            "dynamic_normalised_ped": 1.44}
    for name, value in zero.items(): assert scores[f"{name}_zero_flow"] == pytest.approx(value, abs=.005), name
    assert scores["dynamic_normalised_car"] == scores["dynamic_normalised_ped"] == pytest.approx(1, abs=1e-12)
    assert scores["static_epe_car_m"] == pytest.approx(.006, abs=5e-4) and scores["static_epe_bg_m"] < 1e-6
    assert scores["flow_epe_fd_m"] == pytest.approx(.674, abs=5e-4)
    assert scores["flow_epe_fs_m"] == pytest.approx(.0062, abs=5e-5)
    assert scores["flow_epe_three_way_m"] == pytest.approx(.227, abs=5e-4)
    assert scores["dynamic_normalised_veh"] is None, "no such thing moves: no number, not a perfect one"


def test_the_labels_themselves_have_no_error(official):
    truth = flow_truth(official)
    scores = score_flow(perfect_flow(truth), truth)
    for name in ("flow_epe_m", "flow_epe_three_way_m", "dynamic_normalised_car", "flow_epe_object_m"):
        assert scores[name] == 0, name
    assert scores["flow_acc5_absolute"] == scores["flow_acc5_av2"] == 1 and scores["flow_angle_av2_rad"] < 1e-6


def test_the_rule_of_moving_boxes_reproduces_the_official_labels(official):
    """All but 11 of 99,229 points, which lie inside a box and carry the flow of the background; none is evaluated."""
    made = labels_from_boxes(official.points0, official.boxes0, official.boxes1, official.ego_motion,
                             official.labels.ground)
    apart = (made.flow - official.labels.flow).norm(dim=-1) > 1e-3
    assert int(apart.sum()) <= 11 and not (apart & official.evaluated).any()
    assert int((made.classes != official.labels.classes).sum()) <= 2 and made.valid.all()
    truth = flow_truth(official)
    assert score_flow(pair_box_flow(official), truth)["dynamic_normalised_car"] < 1e-4


def test_the_ego_motion_file_agrees_with_the_poses_and_the_background_with_it(official):
    log = load_argoverse2(real_data("av2_flow_7fab2350"))
    assert len(log.calibration()) == 11 and len(log[0].boxes) == len(log[1].boxes) == 81
    assert official.dt_s == pytest.approx(.100196, abs=1e-9)
    apart = (official.labels.flow - official.ego_flow)[official.labels.classes == 0].norm(dim=-1)
    assert apart.max() < 3e-5, "float32 at 200 m from the vehicle has steps of 1.5e-5 m"


def test_ground_from_points_alone_agrees_with_the_map(official):
    near, ground = (official.points0[:, :2].abs() <= 50).all(-1), official.labels.ground
    found = ground_mask(official.points0)
    assert (found & ground & near).sum() > .95 * (ground & near).sum()
    assert (found & ~ground & near).sum() < .02 * (~ground & near).sum()
    assert not (found & near & official.labels.dynamic & ~ground).any(), "nothing that moves is taken for ground"


@pytest.mark.incident(19)
def test_incident_19_a_mean_over_all_points_stands_beside_zero_flow_and_the_share_that_moves():
    """Ego motion has a mean error of 4 cm over all points and misses everything that moves: the results contain what
    shows it, whatever prediction is scored."""
    truth = crowd()
    scores = score_flow(ego_motion_flow(truth), truth)
    assert scores["flow_epe_m"] == pytest.approx(.04) and scores["flow_acc5_absolute"] == pytest.approx(.95)
    assert scores["flow_epe_fd_m"] == pytest.approx(.8) == scores["flow_epe_object_m"]
    assert scores["dynamic_normalised_car"] == pytest.approx(1)
    assert scores["flow_dynamic_share"] == pytest.approx(.05) and scores["flow_points_dynamic"] == 50
    kinds, baselines = ("flow_epe", "flow_acc", "flow_angle", "dynamic_", "static_"), ("_zero_flow", "_ego_motion")
    for name in [name for name in scores if name.startswith(kinds) and not name.endswith(baselines)]:
        assert f"{name}_zero_flow" in scores and f"{name}_ego_motion" in scores, name


@pytest.mark.incident(19)
def test_incident_19_the_flow_experiment_shows_baselines_and_counts(synthetic, tmp_path):
    notebook = read_notebook(Path(__file__).parent.parent / "nbs" / "experiments" / "flow_check.ipynb")
    run = tmp_path / "run"
    values = {"data": f"argoverse2:{synthetic}", "settings": {"voxel_flow.range_m": 50.0, "voxel_flow.steps": 30}}
    with without_kernel(): run_notebook(notebook, values, run_dir=run)
    results = json.loads((run / "results.json").read_text())["results"]
    assert results["flow_epe_m_perfect"] == 0 and results["dynamic_normalised_car_ego_motion"] == pytest.approx(1)
    assert results["dynamic_normalised_car_box_rigid"] < 1e-3 and results["flow_points_dynamic"] > 50
    assert results["flow_epe_fd_m_zero_flow"] > .3 and results["pair_s"] > 0
    assert {"classes.png", "flow_0.png"} <= {path.name for path in (run / "figures").iterdir()}


def test_an_empty_set_has_no_score_and_a_prediction_that_is_not_finite_is_refused_or_counted():
    truth = crowd()
    empty = score_flow(perfect_flow(truth), replace(truth, evaluated=torch.zeros(1000).bool()))
    assert all(empty[name] is None for name in empty if name.startswith(("flow_epe", "dynamic_", "static_")))
    still = score_flow(perfect_flow(truth), replace(truth, evaluated=truth.objects < 0))
    assert still["flow_epe_three_way_m"] is None and still["dynamic_normalised_car"] is None
    predicted = truth.flow.clone()
    predicted[:30] = torch.nan
    assert "30 of 1000" in expect_error(score_flow, predicted, truth)
    assert score_flow(predicted, truth, skip_non_finite=True)["flow_skipped_non_finite"] == 30


def test_scores_do_not_depend_on_the_order_of_points_or_the_axes():
    truth = crowd()
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(1000, 3, generator=draw) * .1
    order = torch.randperm(1000, generator=draw)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=draw))[0]
    turned = FlowTruth(truth.flow[order] @ turn, truth.ego_flow[order] @ turn, truth.classes[order],
                       truth.evaluated[order], truth.objects[order])
    first, second = score_flow(truth.flow + noise, truth), score_flow((truth.flow + noise)[order] @ turn, turned)
    for name, value in first.items():
        assert second[name] == (value if value is None else pytest.approx(value, abs=1e-5)), name


def test_pairs_that_are_scored_as_one_weigh_every_point_the_same():
    small, large = crowd(40, 100), crowd(80, 400)
    joined = join_truths([small, large])
    scores = score_flow(torch.cat([small.ego_flow, large.flow]), joined)
    assert scores["flow_epe_fd_m"] == pytest.approx(.8 * 40 / 120) and scores["flow_epe_object_m"] == pytest.approx(.4)
    assert scores["flow_objects"] == 2


def test_the_synthetic_pair_is_read_as_it_was_written_and_has_exact_labels(synthetic):
    pair = load_flow_pair(find_reader("argoverse2")(synthetic))
    assert len(pair.labels) == len(pair.points0) and pair.dt_s == pytest.approx(.1)
    truth = flow_truth(pair)
    scores = score_flow(pair_box_flow(pair), truth)
    assert scores["flow_points_dynamic"] > 50 and scores["dynamic_normalised_car"] < 1e-3
    again = labels_from_boxes(pair.points0, pair.boxes0, pair.boxes1, pair.ego_motion, pair.labels.ground)
    assert (again.flow - pair.labels.flow).abs().max() < 1e-4 and torch.equal(again.classes, pair.labels.classes)
    assert {FLOW_CLASSES[i] for i in truth.classes.unique()} >= {"BG", "CAR"}


def test_the_manifests_name_the_reader_and_the_stand_in():
    manifests = load_manifests()
    real, stand_in = manifests["av2_flow"], manifests["av2_flow_synthetic"]
    assert real.loader == stand_in.loader == "argoverse2" and real.stand_in == "av2_flow_synthetic"
    assert find_maker(stand_in.maker.name) is make_argoverse2 and find_reader(real.loader) is load_argoverse2


@pytest.mark.parametrize("name", ["flow_labels", "annotations", "city_SE3_egovehicle"])
def test_a_missing_or_truncated_table_is_one_sentence_with_its_name(damaged, name):
    path = damaged / f"{name}.feather"
    whole = path.read_bytes()
    faults = ((whole[: len(whole) // 2], "truncated"), (b"\0" * 40, "not a Feather"), (None, "There is no file"))
    for data, word in faults:
        if data is None: path.unlink()
        else: path.write_bytes(data)
        message = expect_error(lambda: load_flow_pair(load_argoverse2(damaged)))
        assert word in message and f"{name}.feather" in message and "\n" not in message


def rewrite(path: Path, change) -> None:
    """Rewrites a Feather file with `change` applied to its columns."""
    with pa.ipc.open_file(str(path)) as file: table = file.read_all()
    columns = {name: np.array(table[name].to_pylist()) for name in table.column_names}
    columns |= {f"{axis}": columns[axis].astype(np.float16) for axis in "xyz" if axis in columns}
    write_feather(path, change(columns))


def test_labels_of_another_sweep_missing_columns_and_times_that_do_not_increase_are_refused(damaged):
    def read(): return load_flow_pair(load_argoverse2(damaged))

    labels = damaged / "flow_labels.feather"
    whole = labels.read_bytes()
    rewrite(labels, lambda columns: {name: values[:-1] for name, values in columns.items()})
    assert "belong to another sweep" in expect_error(read)
    labels.write_bytes(whole)
    rewrite(labels, lambda columns: {name: values for name, values in columns.items() if name != "dynamic"})
    assert "no column 'dynamic'" in expect_error(read)
    labels.write_bytes(whole)
    poses = damaged / "city_SE3_egovehicle.feather"
    whole = poses.read_bytes()
    rewrite(poses, lambda columns: {name: values[::-1].copy() for name, values in columns.items()})
    assert "do not increase" in expect_error(read)
    poses.write_bytes(whole)
    rewrite(poses, lambda columns: columns | {"timestamp_ns": columns["timestamp_ns"] + 1})
    assert "no ego pose at" in expect_error(read)


def test_a_small_file_that_claims_many_rows_is_refused_before_it_is_unpacked(tmp_path):
    path = tmp_path / "1.feather"
    zeros = np.zeros(3_000_000, np.float16)
    columns = {name: zeros for name in "xyz"} | {name: zeros.astype(np.uint8) for name in ("intensity", "laser_number")}
    write_feather(path, columns | {"offset_ns": zeros.astype(np.int32)}, "zstd")
    assert path.stat().st_size < 100_000
    assert "3,000,000 rows" in expect_error(read_argoverse2_sweep, path)


def test_no_damaged_byte_gives_anything_but_a_table_or_a_sentence(tmp_path):
    path, draw = tmp_path / "t.feather", np.random.default_rng(0)
    write_feather(path, {"x": np.arange(200.0), "name": [f"n{i}" for i in range(200)]})
    whole = path.read_bytes()
    refused = 0
    for _ in range(400):
        data = bytearray(whole)
        for at in draw.integers(0, len(data), draw.integers(1, 4)): data[at] = draw.integers(256)
        path.write_bytes(bytes(data))
        try: read_feather(path, {"x": "f", "name": "U"})
        except KiloError: refused += 1
    assert 50 < refused < 400


def test_pandaset_s_boxes_label_a_pair_in_the_same_terms():
    """Sequence 002: 7% of the evaluated points of the spinning LiDAR move, on some thirty things."""
    samples = load_flow_samples("pandaset", real_data("pandaset"), most=2)
    truth = join_truths([sample.truth for sample in samples])
    scores = score_flow(zero_flow(truth), truth)
    assert scores["dynamic_normalised_car"] == pytest.approx(1) and .04 < scores["flow_dynamic_share"] < .12
    assert scores["flow_objects"] > 10 and scores["flow_epe_fd_m"] == scores["flow_epe_fd_m_ego_motion"] > .4
    for sample in samples:
        still = sample.truth.evaluated & (sample.truth.objects < 0)
        assert torch.cdist(sample.points0[still][::400], sample.points1[::4]).amin(-1).median() < .3
