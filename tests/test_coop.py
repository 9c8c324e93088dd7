"""The cooperative model: what rolls, what learns, what is resumed, and that the number of processes changes nothing."""

import math
import signal
from dataclasses import replace

import pytest
import torch

from kilonb.coop import training
from kilonb.coop.checkpoints import upgrade_checkpoint
from kilonb.coop.dataset import Sample, collate, column_rotations, roll_sample
from kilonb.coop.evaluation import evaluate_cooperative, fit_constant_predictor
from kilonb.coop.losses import LossBatch, LossConfig, coop_loss
from kilonb.coop.model import CoopModel, ModelConfig, canonical_heading, se2_to_rigid
from kilonb.coop.pose_graph import SE2, PoseGraphEdges, solve_pose_graph
from kilonb.coop.relative_pose import (
    PairTargets,
    column_matching_loss,
    list_pairs,
    measurement_errors,
    measurement_nll,
    pair_targets,
    wrap_difference,
)
from kilonb.coop.training import (
    CoopConfig,
    make_batch,
    make_model,
    make_optimizer,
    mirror_sample,
    predict,
    predict_batch,
    make_step,
    train_coop,
)
from kilonb.core.errors import KiloError
from kilonb.geometry.transforms import quat_to_rotmat, rigid_inverse, rotmat_to_quat
from kilonb.metrics.pose import pose_errors
from kilonb.panoramas.tiles import PanoramaOptions
from kilonb.runs.scalars import read_scalars
from kilonb.training.checkpoints import latest_path, read_checkpoint
from kilonb.training.parallel import ALONE, DistributedSteps, World

CAMERA = PanoramaOptions(128, 32).camera()
SMALL = ModelConfig(widths=(8, 16, 16, 32), blocks=1, column_width=32, pair_blocks=1)
RAYS = CAMERA.directions(CAMERA.pixel_centres()).reshape(32, 128, 3)


def sample(number: int, vehicles: int = 3) -> Sample:
    """Vehicles, white pillars to one another, in a round yard of 20 m radius, whose wall changes its colour with the
    azimuth: poses can be seen in it."""
    generator = torch.Generator().manual_seed(number)
    places = 16 * torch.rand(vehicles, 2, generator=generator) - 8
    poses = se2_to_rigid(SE2(6 * torch.rand(vehicles, generator=generator), places), torch.zeros(vehicles, 2),
                        torch.zeros(vehicles))
    world = torch.einsum("vij,hwj->vhwi", poses[:, :3, :3], RAYS)
    flat = world[..., [0, 2]].norm(dim=-1)
    way = world[..., [0, 2]] / flat[..., None]
    along = (way * places[:, None, None]).sum(-1)
    wall = -along + (along.square() - (places.square().sum(-1)[:, None, None] - 400)).sqrt()
    ground = 1.5 / world[..., 1].clamp(min=1e-3) * flat
    flat_range = torch.minimum(wall, ground)
    at = places[:, None, None] + flat_range[..., None] * way
    azimuth = torch.atan2(at[..., 0], at[..., 1])
    rgb = (
        0.5
        + 0.3
        * torch.stack([(azimuth * k + number).sin() for k in (1, 2, 5)], 1)
        * torch.where(wall < ground, 1.0, 0.5)[:, None]
    )
    for a in range(vehicles):
        for b in set(range(vehicles)) - {a}:
            apart = places[b] - places[a]
            beside, ahead = (way[a] * apart.flip(0) * torch.tensor([1.0, -1])).sum(-1), (way[a] * apart).sum(-1)
            pillar = (
                (beside.abs() < 0.8)
                & (ahead > 0)
                & (ahead < flat_range[a])
                & (world[a, ..., 1].abs() * ahead < 1.5 * (1 - world[a, ..., 1] ** 2).sqrt())
            )
            flat_range[a] = torch.where(pillar, ahead, flat_range[a])
            rgb[a] = torch.where(pillar, 1 - b / 8, rgb[a])
    mask = (RAYS[..., 1] > -.5).float().expand(vehicles, -1, -1).clone()
    mask[:, :, : 4 + number % 8] = 0
    pose_to_main = rigid_inverse(poses[:1]) @ poses
    return Sample(f"yard/{number}", tuple("abcd"[:vehicles]), rgb, flat_range / flat * mask, mask, mask, mask.long(),
                  pose_to_main)


@pytest.fixture(scope="module")
def samples() -> list[Sample]: return [sample(n, 2 + n % 2) for n in range(8)]


def config(**changes) -> CoopConfig:
    return CoopConfig(**{"steps": 6, "batch_size": 2, "log_every_steps": 1, "ema_decay": .9, "model": SMALL, **changes})


# ---- rolling

@pytest.mark.parametrize("pose", ["pairwise", "pooled"])
@pytest.mark.parametrize("columns", [(1, 0, 0), (0, 5, 0), (8, 8, 8), (127, 17, 30)])
def test_rolling_a_view_rolls_its_outputs_and_rotates_its_pose_only(samples, pose, columns):
    model = make_model(CAMERA, config(model=replace(SMALL, pose=pose)))
    part = samples[1]
    with torch.no_grad(): before, after = predict(model, [part]), predict(model, [roll_sample(part, columns)])
    for view, k in enumerate(columns):
        for name in ("range_m", "mask_logits", "confidence"):
            torch.testing.assert_close(getattr(after, name)[0, view], getattr(before, name)[0, view].roll(k, -1),
                                       atol=1e-5, rtol=1e-4)
    turns = column_rotations(columns, 128).float()
    expected = rigid_inverse(turns[:1]) @ before.pose_to_main[0] @ turns
    torch.testing.assert_close(after.pose_to_main[0], expected, atol=1e-3, rtol=1e-4)


def test_the_backbone_is_equivariant_for_multiples_of_sixteen_columns(samples):
    model, batch = make_model(CAMERA, config()), make_batch(samples[:2])
    views, present = batch["rgb_srgb"][batch["present"]], batch["present"]
    with torch.no_grad():
        straight, shifted = model.backbone(views, present), model.backbone(views.roll(48, -1), present)
    for name, columns, along in (("log_unit_range", 48, -1), ("mask_logits", 48, -1), ("columns", 6, 1)):
        torch.testing.assert_close(getattr(shifted, name), getattr(straight, name).roll(columns, along), atol=1e-4,
                                   rtol=1e-3)
    with torch.no_grad(): between = model.backbone(views.roll(3, -1), present)
    assert (between.log_unit_range - straight.log_unit_range.roll(3, -1)).abs().max() > 1e-3, (
        "strides break equivariance here: otherwise the test compares nothing"
    )


def test_the_canonical_heading_does_not_depend_on_where_the_panorama_was_cut(samples):
    views = samples[0].rgb_srgb
    for k in (1, 13, 40): assert torch.equal(canonical_heading(views.roll(k, -1)), (canonical_heading(views) + k) % 128)


def test_views_that_are_absent_change_nothing(samples):
    model = make_model(CAMERA, config())
    with torch.no_grad(): alone, padded = predict(model, samples[:1]), predict(model, samples[:2])
    torch.testing.assert_close(padded.range_m[0, :2], alone.range_m[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(padded.pose_to_main[0, :2], alone.pose_to_main[0], atol=1e-3, rtol=1e-3)


def test_a_single_vehicle_is_predicted_and_refused_by_the_pose_loss():
    model, lone = make_model(CAMERA, config()), [sample(3, 1)]
    with torch.no_grad(): alone = predict(model, lone)
    assert torch.isfinite(alone.range_m).all() and torch.equal(alone.pose_to_main[0, 0], torch.eye(4))
    batch = make_batch(lone)
    with pytest.raises(KiloError, match="lone"): coop_loss(model, alone, LossBatch(batch, CAMERA), LossConfig())


# ---- incident 24: everything learns

@pytest.mark.incident(24)
@pytest.mark.parametrize("pose", ["pairwise", "pooled"])
def test_every_parameter_gets_a_gradient(samples, pose):
    settings = config(model=replace(SMALL, pose=pose))
    model, batch = make_model(CAMERA, settings), make_batch(samples[:4])
    coop_loss(model, predict_batch(model, batch), LossBatch(batch, CAMERA), settings.loss,
              torch.Generator().manual_seed(0))["loss"].backward()
    dead = {name for name,
            parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.abs().max() > 0}
    columns = {f"backbone.column_{layer}.{name}" for layer in ("reduce", "proj", "norm") for name in ("weight", "bias")}
    assert dead == (columns if pose == "pooled" else set()), "column features are used by the pairwise head only"
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)


def test_training_learns_ranges_masks_and_relative_poses(samples):
    settings = config(steps=120, batch_size=4, learning_rate=5e-3, colour_jitter=0.0, ema_decay=None)
    model = make_model(CAMERA, settings)
    before = evaluate_cooperative(lambda part: predict(model, part), samples, CAMERA,
                                  fit_constant_predictor(samples))[0]
    records = train_coop(model, samples, CAMERA, settings, quiet=True).records
    after = evaluate_cooperative(lambda part: predict(model, part), samples, CAMERA, fit_constant_predictor(samples))[0]
    assert after["range_abs_rel"] < .6 * before["range_abs_rel"] and after["mask_iou"] > .9 > before["mask_iou"]
    assert records[-1]["column_matching_accuracy"] > 0.9 and records[-1]["heading_accuracy"] > 0.9, (
        "by chance: .035 and .19"
    )
    assert after["pose_translation_median_m"] < .3 * after["pose_translation_median_m_trivial"]
    assert after["pose_rotation_median_deg"] < .1 * after["pose_rotation_median_deg_trivial"]


# ---- incident 20: the number of processes changes nothing

def trained(world: World, count: int = 7) -> tuple[list[dict], list[list[int]]]:
    part = [sample(n, 2) for n in range(count)]
    settings = config(steps=5, batch_size=3)
    records = train_coop(make_model(CAMERA, settings), part, CAMERA, settings, world=world, quiet=True).records
    steps = DistributedSteps(count, settings.batch_size, settings.seed, world)
    return records, [steps.batch_of(number).tolist() for number in range(settings.steps)]


@pytest.mark.incident(20)
def test_worlds_of_one_two_and_three_take_the_same_steps_at_the_same_rates_on_the_same_samples(ranks):
    records, batches = trained(ALONE)
    assert DistributedSteps(7, 3).steps_per_epoch == DistributedSteps(7, 3, world=World(0, 3)).steps_per_epoch == 2
    for size in (2, 3):
        answers = ranks.run(trained, size)
        assert all(isinstance(answer, tuple) for answer in answers), answers
        for number, whole in enumerate(batches):
            assert sorted(i for _, own in answers for i in own[number]) == sorted(whole)
        theirs = answers[0][0]
        assert [r["step"] for r in theirs] == [r["step"] for r in records]
        assert [r["learning_rate"] for r in theirs] == [r["learning_rate"] for r in records]
        assert abs(theirs[0]["mask_term"] - records[0]["mask_term"]) < .02 * records[0]["mask_term"]


# ---- resuming

def test_a_run_that_was_interrupted_goes_on_to_the_same_weights_to_the_last_bit(samples, tmp_path):
    settings = config(steps=6, colour_jitter=.2, roll_views=True)
    straight, halves = make_model(CAMERA, settings), make_model(CAMERA, settings)
    train_coop(straight, samples, CAMERA, settings, tmp_path / "straight", quiet=True)
    def stop(step, records):
        if step == 3: signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train_coop(halves, samples, CAMERA, settings, tmp_path / "halves", after_step=stop, quiet=True)
    assert read_checkpoint(latest_path(tmp_path / "halves"))["step"] == 4
    halves = make_model(CAMERA, replace(settings, seed=0))
    result = train_coop(halves, samples, CAMERA, settings, tmp_path / "halves", resume=True, quiet=True)
    assert result.resumed_from == 4
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), halves.parameters()))
    assert torch.equal(torch.as_tensor(read_scalars(tmp_path / "straight")["loss"]),
                       torch.as_tensor(read_scalars(tmp_path / "halves")["loss"]))
    with pytest.raises(KiloError):
        train_coop(halves, samples, CAMERA, replace(settings, batch_size=3), tmp_path / "halves", resume=True,
                   quiet=True)


# ---- checkpoints of 0.1

TO_0_1 = {
    "backbone.": "trunk.", "relative_pose_head.": "sighter.", ".self_attention.": ".within.",
    ".cross_attention.": ".between.", ".norm1.": ".norm.", ".qkv.": ".mix.", ".norm2.": ".feed.0.",
    ".mlp.2.": ".feed.3.", ".mlp.0.": ".feed.1.", ".q_proj.": ".ask.", ".kv_proj.": ".offer.", ".proj.": ".out.",
    ".down_": ".to_", ".res_": ".deep_", ".conv1.": ".first.", ".conv2.": ".second.", ".up_": ".rise_",
    ".reduce.": ".narrow.", ".fuse.": ".join.", "row_embedding": "row", "view_embedding": "mark",
    "log_range_prior": "row_log", ".coarse_head.": ".rough.", ".fine_head.": ".head.", ".edge_head.": ".edges.",
    ".column_reduce.": ".narrow.", ".column_proj.": ".stand.", ".column_norm.": ".level.", "trunk.norm.": "trunk.calm.",
}
POSE_HEAD_TO_0_1 = {
    "heading_proj": "compass", "heading_log_scale": "sharp", "q_proj": "here", "k_proj": "there", "unary": "alone",
    "window_encoder": "look", "window_proj": "said", "mlp": "answer", "norm": "calm",
}


def name_in_0_1(key: str) -> str:
    """The name that version 0.1 gave to a parameter, written down independently of the package's map."""
    head, _, rest = key.partition(".")
    layer, dot, deeper = rest.partition(".")
    if head == "relative_pose_head" and layer in POSE_HEAD_TO_0_1:
        return f"sighter.{POSE_HEAD_TO_0_1[layer]}{dot}{deeper}"
    for new, old in TO_0_1.items(): key = key.replace(new, old)
    return key.replace("sighter.within.", "sighter.around.")


@pytest.mark.parametrize("pose", ["pairwise", "pooled"])
def test_weights_in_the_layout_of_0_1_give_the_same_prediction(samples, pose):
    settings = config(model=replace(SMALL, pose=pose))
    model, other = make_model(CAMERA, settings), make_model(CAMERA, replace(settings, seed=1))
    weights = {name_in_0_1(key): value for key, value in model.state_dict().items()}
    assert {"trunk.within.0.mix.weight", "trunk.rise_8.join.conv.weight", "trunk.row"} < set(weights)
    assert not any(key.startswith(("backbone", "relative_pose_head")) for key in weights)
    other.load_state_dict(weights)
    with torch.no_grad(): expected, loaded = predict(model, samples[:2]), predict(other, samples[:2])
    for name in ("range_m", "mask_logits", "pose_to_main", "quats", "scale"):
        assert torch.equal(getattr(loaded, name), getattr(expected, name)), name


def test_a_training_checkpoint_of_0_1_fits_the_model_and_its_optimizer(samples, tmp_path):
    settings = config(steps=2)
    model = make_model(CAMERA, settings)
    train_coop(model, samples, CAMERA, settings, tmp_path, quiet=True)
    content = read_checkpoint(latest_path(tmp_path))
    def old(state): return {name_in_0_1(key): value for key, value in state.items()}
    averaged = {**content["averaged"], "average": old(content["averaged"]["average"])}
    upgraded = upgrade_checkpoint({**content, "model": old(content["model"]), "averaged": averaged})
    assert list(upgraded["model"]) == list(content["model"])
    assert list(upgraded["averaged"]["average"]) == list(content["averaged"]["average"])
    optimizer = make_optimizer(model, settings)
    optimizer.load_state_dict(upgraded["optimizer"])
    for parameter, state in optimizer.state.items(): assert state["exp_avg"].shape == parameter.shape


def test_quaternions_are_wxyz(samples):
    with torch.no_grad(): prediction = predict(make_model(CAMERA, config()), samples[:2])
    torch.testing.assert_close(quat_to_rotmat(prediction.quats), prediction.pose_to_main[..., :3, :3], atol=1e-5,
                               rtol=0)
    assert torch.equal(prediction.quats[:, 0], torch.tensor([1.0, 0, 0, 0]).expand(2, 4))


# ---- incident 21: one pipeline

@pytest.mark.incident(21)
def test_training_validation_and_use_give_the_same_prediction(samples, monkeypatch):
    settings = config(colour_jitter=0.0)
    model, seen = make_model(CAMERA, settings), []
    original = training.predict_batch
    def watched(model, batch):
        seen.append(original(model, batch))
        return seen[-1]
    monkeypatch.setattr(training, "predict_batch", watched)
    make_step(model.train(), samples, CAMERA, settings)(0, torch.Generator().manual_seed(0))
    chosen = [samples[int(i)] for i in DistributedSteps(len(samples), settings.batch_size, settings.seed).batch_of(0)]
    with torch.no_grad(): used = predict(model.eval(), chosen)
    evaluate_cooperative(lambda part: predict(model, part), chosen, CAMERA, fit_constant_predictor(samples),
                         batch_size=2)
    assert len(seen) == 3, "a pipeline of its own was used"
    for other in seen:
        for name in ("range_m", "mask_logits", "confidence", "pose_to_main", "quats", "scale"):
            assert torch.equal(getattr(other, name), getattr(used, name)), name


# ---- incident 22: units

@pytest.mark.incident(22)
def test_every_logged_value_is_a_term_or_has_a_unit_in_its_name(samples):
    values = make_step(make_model(CAMERA, config()), samples, CAMERA, config())(0, torch.Generator().manual_seed(0))
    ratios = {"range_abs_rel", "mask_iou", "pose_found", "column_matching_accuracy", "heading_accuracy",
              "mask_mean_predicted", "mask_mean_true", "valid_share", "epoch"}
    units = ("_m", "_deg", "_percent", "_term")
    assert [name for name in values if name != "loss" and not name.endswith(units) and name not in ratios] == []
    beside = {"pose_term": "pose_translation_m", "log_range_term": "range_error_m", "points_term": "points_error_m",
              "scale_term": "scale_error_percent", "bearings_term": "bearing_error_deg",
              "distances_term": "distance_error_m", "relative_yaw_term": "relative_yaw_error_deg"}
    for term, metric in beside.items():
        assert term in values and metric in values


def test_a_pose_that_is_three_quarters_of_a_metre_off_is_logged_as_such():
    true = torch.eye(4).repeat(2, 1, 1)
    off = true.clone()
    off[0, 0, 3], off[1] = .75, column_rotations([-4], 64)[0].float()
    metres, degrees = pose_errors(off, true)
    assert metres.tolist() == [.75, 0] and abs(degrees[1].item() - 22.5) < 1e-4


def test_a_quaternion_and_its_negative_are_the_same_pose(samples):
    settings = config(model=replace(SMALL, pose="pooled"))
    model, batch = make_model(CAMERA, settings), make_batch(samples[:2])
    seen = predict_batch(model, batch)
    terms = [coop_loss(model, seen._replace(quats=sign * seen.quats), LossBatch(batch, CAMERA),
                       LossConfig())["pose_term"] for sign in (1, -1)]
    torch.testing.assert_close(*terms)


# ---- pair measurements and poses

def test_the_true_entry_has_the_least_loss_and_true_measurements_have_no_error():
    poses = se2_to_rigid(SE2(torch.tensor([.4, -2.9]), torch.tensor([[3.0, 4], [-5, 6]])), torch.zeros(2, 2),
                        torch.zeros(2))
    true = pair_targets(poses, 32)
    torch.testing.assert_close(true.log_range.exp(), poses[:, [0, 2], 3].norm(dim=1))
    torch.testing.assert_close(wrap_difference(true.first_bearing - true.second_bearing + 16 - true.relative_yaw, 32),
                               torch.zeros(2), atol=1e-4, rtol=0)
    right, wrong = torch.zeros(2, 2, 32, 32)
    for p in range(2):
        for i in (-1, 0):
            for j in (-1, 0):
                right[p, int(true.first_bearing[p] + .5 + i) % 32, int(true.second_bearing[p] + .5 + j) % 32] = 30
        wrong[p, int(true.first_bearing[p]) - 10, int(true.second_bearing[p])] = 30
    assert (column_matching_loss(right, true) < 2).all() and (column_matching_loss(wrong, true) > 20).all()
    assert measurement_errors(PairTargets(*(x + 32 * (k != 2) for k, x in enumerate(true))), true,
                              32).abs().max() < 1e-4
    errors = torch.tensor([[.1, -.1, .1, .1]])
    log_sigmas = torch.linspace(-6, 2, 801)[:, None].expand(-1, 4)
    best = log_sigmas[measurement_nll(errors, log_sigmas).argmin(), 0].exp()
    assert abs(best - .1) < .005, "the best sigma is the size of the error"


def test_four_vehicles_are_placed_although_one_pair_matched_the_wrong_car():
    generator = torch.Generator().manual_seed(3)
    places = torch.tensor([[0.0, 0], [12, 20], [-15, 30], [6, 45]], dtype=torch.float64)[None]
    turns = 6 * torch.rand(1, 4, generator=generator, dtype=torch.float64)
    turns[:, 0] = 0
    pairs = list_pairs(torch.ones(1, 4, dtype=torch.bool))
    a, b = pairs.slots.T
    d = places[0, b] - places[0, a]
    azimuth = torch.atan2(d[:, 0], d[:, 1])
    bearings = torch.stack([azimuth - turns[0, a], azimuth + math.pi - turns[0, b]], -1)
    bearings[4] += torch.tensor([.5, -.7])
    certainty = torch.tensor([.9, .9, .9, .9, .3, .9], dtype=torch.float64)
    sigma = torch.tensor([.005, .005, .03, .01], dtype=torch.float64).repeat(6, 1)
    found = solve_pose_graph(PoseGraphEdges(pairs, bearings, d.norm(dim=1).log(), turns[0, b] - turns[0, a], sigma,
                                            certainty), 1, 4, 40)
    assert (found.position - places).norm(dim=-1).max() < .3
    assert wrap_difference(found.yaw - turns, 2 * math.pi).abs().max() < math.radians(1)


def test_a_mirrored_sample_is_consistent(samples):
    part, other = samples[1], mirror_sample(samples[1])
    assert torch.equal(mirror_sample(other).rgb_srgb, part.rgb_srgb) and torch.equal(
        mirror_sample(other).pose_to_main, part.pose_to_main
    )
    true, back = (pair_targets(one.pose_to_main[1:], 32) for one in (part, other))
    torch.testing.assert_close(wrap_difference(true.first_bearing + back.first_bearing, 32), torch.zeros(2), atol=1e-4,
                               rtol=0)
    torch.testing.assert_close(wrap_difference(true.relative_yaw + back.relative_yaw, 32), torch.zeros(2), atol=1e-4,
                               rtol=0)
    torch.testing.assert_close(true.log_range, back.log_range)


# ---- evaluation and bad input

def test_the_truth_scores_perfectly_and_the_constant_predictor_does_not(samples):
    def truth(part):
        batch = collate(part)
        seen = predict(make_model(CAMERA, config()), part)
        return seen._replace(range_m=batch["range_m"].clamp(min=.1), mask_logits=batch["mask"] - .5,
                             pose_to_main=batch["pose_to_main"])
    results, rows = evaluate_cooperative(truth, samples, CAMERA, fit_constant_predictor(samples))
    assert (
        results["pose_translation_median_m"] == 0
        and results["mask_iou"] == 1
        and results["range_abs_rel"] < 1e-6
        and results["chamfer_m"] < 0.05
    )
    assert (
        results["pose_translation_median_m_trivial"] > 1
        and results["mask_iou_trivial"] < 0.99
        and results["range_abs_rel_trivial"] > 0.02
    )
    assert len(rows) == results["samples"] == 8 and results["pairs"] == sum(len(s.vehicles) - 1 for s in samples)


def test_invalid_settings_raise_kilo_errors():
    for make in (lambda: ModelConfig(pose="magic"), lambda: ModelConfig(widths=(8, 16, 16, 30)),
                 lambda: ModelConfig(precision="float8"), lambda: LossConfig(mask=-1.0),
                 lambda: LossConfig(exclude=1.0), lambda: CoopModel(PanoramaOptions(120, 32).camera()),
                 lambda: evaluate_cooperative(lambda part: None, [], CAMERA, None)):
        with pytest.raises(KiloError): make()


def test_se2_poses_survive_the_conversion_to_matrices_and_quaternions():
    pose = SE2(torch.tensor([.4, -2.9]), torch.tensor([[3.0, 4], [-5, 6]]))
    whole = se2_to_rigid(pose, torch.zeros(2, 2), torch.zeros(2))
    torch.testing.assert_close(torch.atan2(whole[:, 0, 2], whole[:, 2, 2]), pose.yaw)
    torch.testing.assert_close(whole[:, [0, 2], 3], pose.position)
    quats = rotmat_to_quat(whole[:, :3, :3])
    torch.testing.assert_close(quats.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(2 * torch.atan2(quats[:, 2], quats[:, 0]), pose.yaw)
