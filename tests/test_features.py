"""The teacher as a field, and feature distillation: properties that hold across modules."""
import math
import signal

import pytest
import torch

from kilonb.distill.features import (
    FeatureConfig,
    FeatureTerm,
    TeacherAdapter,
    linear_cka,
    random_axes,
    teacher_features,
)
from kilonb.distill.space import occupancy_of_gaussians
from kilonb.distill.student import DistillConfig, distill, make_student
from kilonb.distill.rays import RayPool
from kilonb.imaging.targets import targets_from_teacher
from kilonb.fields.kilonerf import KiloNeRFConfig
from kilonb.fields.voxels import bake_gaussians
from kilonb.geometry.cameras import orbit_cameras
from kilonb.core.testing import expect_error
from kilonb.scenes.brickyard import build_brickyard
from kilonb.splats.gaussians import Gaussians, gaussians_from_points
from kilonb.splats.lookup import GaussianLookup, all_pairs
from kilonb.splats.ply import read_ply, write_ply
from kilonb.training.loop import LoopConfig

SHAPE = KiloNeRFConfig(cell_size=0.4, position_frequencies=4, hidden=16)
STEP = 0.03


def ball(count: int = 400, sh_degree: int = 1, seed: int = 0) -> Gaussians:
    """Gaussians of every shape, size, rotation and opacity in a ball of radius one."""
    draw = torch.Generator().manual_seed(seed)
    means = torch.nn.functional.normalize(torch.randn(count, 3, generator=draw), dim=-1) * torch.rand(
        count, 1, generator=draw
    ) ** (1 / 3)
    gaussians = gaussians_from_points(means, torch.rand(count, 3, generator=draw), sh_degree, opacity=0.5)
    gaussians.quats = torch.randn(count, 4, generator=draw)
    gaussians.log_scales = torch.rand(count, 3, generator=draw) * 3 - 5
    gaussians.logit_opacities = torch.randn(count, generator=draw) * 3
    gaussians.sh = gaussians.sh + 0.1 * torch.randn(gaussians.sh.shape, generator=draw)
    return gaussians


def settings(**changed) -> DistillConfig:
    loop = {"steps": 24, "learning_rate": 5e-3, "warmup_steps": 4, "log_every_steps": 2, "checkpoint_every_steps": 10,
            "checkpoint_every_seconds": None}
    return DistillConfig(rays=128, loop=LoopConfig(**loop | changed))


@pytest.fixture(scope="module")
def scene():
    """(lookup, space, pool of rays) of a small brickyard."""
    teacher = build_brickyard(count=4_000)
    space = occupancy_of_gaussians(teacher, 32)
    cameras = [(f"view {n}", camera) for n, camera in enumerate(orbit_cameras(2, 4.0, 30.0, width=32, height=32))]
    return (
        GaussianLookup(teacher, minimum_scale=STEP / 2),
        space,
        RayPool(targets_from_teacher(teacher, cameras), space, STEP),
    )


class Interrupting:
    """A pool of rays that raises SIGINT in draw number `at`."""

    def __init__(self, pool: RayPool, at: int): self.pool, self.views, self.left = pool, pool.views, at

    def sample(self, *arguments):
        self.left -= 1
        if self.left == 0: signal.raise_signal(signal.SIGINT)
        return self.pool.sample(*arguments)


# ---- the lookup

@pytest.mark.parametrize("resolution", [1, 7, 64])
@pytest.mark.parametrize("profile", ["gaussian", "splat"])
def test_no_gaussian_is_lost_in_the_cells(resolution, profile):
    gaussians, draw = ball(), torch.Generator().manual_seed(1)
    points = torch.cat([torch.rand(200, 3, generator=draw) * 3 - 1.5,
                        gaussians.means[:200] + 0.03 * torch.randn(200, 3, generator=draw)])
    density, distance = all_pairs(gaussians, points, profile=profile)
    reach = (2 * (255 * gaussians.opacities.double().clamp(min=1 / 255)).log()).clamp(max=9).sqrt()
    inside = ~((distance - reach).abs() < 1e-3).any(1)
    lookup = GaussianLookup(gaussians, resolution=resolution, profile=profile)
    torch.testing.assert_close(lookup.density(points)[inside].double(), density.sum(1)[inside], rtol=1e-3, atol=1e-5)
    assert inside.float().mean() > 0.9 and (density.sum(1) > 0).float().mean() > 0.2


def test_lookup_and_baked_voxels_are_the_same_field():
    gaussians = ball(60)
    gaussians.log_scales = gaussians.log_scales.clamp(min=-3)
    field = bake_gaussians(gaussians.means, gaussians.quats, gaussians.scales, gaussians.opacities, torch.ones(60, 3),
                           resolution=96)
    thinnest = (field.box[1] - field.box[0]).max().item() / 96 / 2
    grid = field.occupancy()
    centres = grid.centres()[::9, ::9, ::9].reshape(-1, 3)
    visible = gaussians.subset(gaussians.opacities > 0.5)
    baked = bake_gaussians(visible.means, visible.quats, visible.scales, visible.opacities, torch.ones(len(visible), 3),
                           resolution=96, box=field.box)
    sigma = GaussianLookup(visible, minimum_scale=thinnest).density(centres)
    assert sigma.max() > 1
    torch.testing.assert_close(sigma, baked(centres, None)[0], rtol=2e-3, atol=1e-2 * sigma.max().item())


def test_compiled_and_plain_queries_agree():
    gaussians, draw = ball(sh_degree=2), torch.Generator().manual_seed(2)
    points = gaussians.means.repeat(5, 1) + 0.01 * torch.randn(5 * len(gaussians), 3, generator=draw)
    directions = torch.nn.functional.normalize(torch.randn(points.shape, generator=draw), dim=-1)
    table = torch.randn(len(gaussians), 11, generator=draw)
    lookup = GaussianLookup(gaussians)
    plain = lookup.on("cpu")
    answers, expected = lookup(points, directions), plain.density_and_colour(points, directions)
    for one, other in ((answers, expected), (lookup.features(points, table), plain.features(points, table))):
        for a, b in zip(one, other):
            assert torch.isclose(a, b, rtol=1e-3, atol=1e-4).float().mean() > 0.998      # rims of footprints aside
    assert (lookup.nearest(points)[0] == plain.nearest(points)[0]).float().mean() > 0.998
    assert len(lookup.density(points[:0])) == 0 and lookup.features(points[:0], table)[0].shape == (0, 11)


def test_the_number_of_threads_changes_no_bit(scene):
    lookup, _, pool = scene
    points, directions = pool.origins + 4 * pool.directions, pool.directions
    threads = torch.get_num_threads()
    answers = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            answers.append(lookup(points, directions))
    finally: torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*answers)) and (answers[0][0] > 0).any()


def test_a_splat_is_as_opaque_as_in_the_rasteriser():
    one = gaussians_from_points(torch.zeros(1, 3), torch.ones(1, 3), 0, opacity=0.9)
    one.log_scales = torch.full((1, 3), math.log(0.2))
    aside, along = torch.tensor([0.0, 0.1, 0.2, 0.4]), torch.linspace(-0.7, 0.7, 2801)
    points = torch.stack(torch.broadcast_tensors(aside[:, None], along, torch.zeros(1, 1)), -1).reshape(-1, 3)
    alpha = -torch.expm1(-GaussianLookup(one, profile="splat").density(points).reshape(4, -1).sum(1)
                         * (along[1] - along[0]))
    torch.testing.assert_close(alpha, 0.9 * torch.exp(-0.5 * (aside / 0.2) ** 2), atol=0.01, rtol=0)


# ---- features

def test_features_of_a_ply_are_those_of_its_gaussians(tmp_path):
    gaussians = ball(sh_degree=3)
    write_ply(tmp_path / "teacher.ply", gaussians)
    torch.testing.assert_close(teacher_features(read_ply(tmp_path / "teacher.ply"), sh_degree=3),
                               teacher_features(gaussians), rtol=1e-5, atol=1e-5)


def test_cka_measures_the_shared_part_only():
    draw = torch.Generator().manual_seed(0)
    x, noise = torch.randn(8_000, 16, generator=draw), torch.randn(8_000, 16, generator=draw)
    assert abs(linear_cka(x, x) - 1) < 1e-9
    assert abs(linear_cka(x, 0.01 * x @ random_axes(16, 16, draw).float() - 5) - 1) < 1e-5
    assert abs(linear_cka(x, x @ random_axes(16, 40, draw).float()) - 1) < 1e-5
    assert linear_cka(x, noise) < 0.01 < 0.3 < linear_cka(x, x + noise) < 0.9


def test_every_adapter_is_reproducible_and_restored_from_its_state():
    gaussians = ball(sh_degree=3)
    features = teacher_features(gaussians)
    for kind in ("pca", "orthogonal", "linear"):
        make = lambda seed, kind=kind: TeacherAdapter(features, gaussians.opacities, 20, kind,
                                                      torch.Generator().manual_seed(seed))
        one, same, other = make(0), make(0), make(1)
        assert torch.equal(one(features), same(features)) and one.trainable == (kind == "linear")
        other.load_state_dict(one.state_dict())
        assert torch.equal(one(features), other(features))


@pytest.mark.parametrize("adapter", ["pca", "linear"])
def test_a_resumed_run_with_features_is_the_unbroken_one_to_the_bit(scene, tmp_path, adapter):
    lookup, space, pool = scene
    config = FeatureConfig(channels=8, cosine_weight=0.1, l2_weight=0.1, adapter=adapter, cka_every=3,
                           projector_alone=0.2, freeze=0.8)

    def run(folder, rays, resume=False):
        student = make_student(space, SHAPE, STEP)
        term = FeatureTerm(lookup, student.field.feature_width, 24, config)
        return student, term, distill(student, rays, settings(), tmp_path / folder, terms=[term], resume=resume,
                                      quiet=True)

    unbroken, whole_term, whole = run("whole", pool)
    with pytest.raises(KeyboardInterrupt): run("broken", Interrupting(pool, at=11))
    resumed, term, rest = run("broken", pool, resume=True)
    assert rest.resumed_from == 11
    for name, value in unbroken.state_dict().items(): assert torch.equal(value, resumed.state_dict()[name]), name
    for part in ("projector", "adapter"):
        for name, value in whole_term.state_dict()[part].items():
            assert torch.equal(value, term.state_dict()[part][name]), name
    timeless = lambda result: [{name: value for name, value in record.items() if name != "elapsed_s"}
                               for record in result.records]
    assert timeless(whole) == timeless(rest)


def test_the_frozen_projector_is_constant_while_the_student_is_trained(scene):
    lookup, space, pool = scene
    student = make_student(space, SHAPE, STEP)
    term = FeatureTerm(lookup, student.field.feature_width, 24,
                       FeatureConfig(channels=8, freeze=0.5, cosine_weight=0.1, l2_weight=0.1))
    weights, after_step = [], term.after_step

    def recorded(step):
        after_step(step)
        weights.append((term.projector.layers.weight.detach().clone(), student.field.networks.detach().clone()))

    term.after_step = recorded
    distill(student, pool, settings(), terms=[term], quiet=True)
    assert not torch.equal(weights[10][0], weights[11][0])
    assert all(torch.equal(weights[11][0], projector) for projector, _ in weights[12:])
    assert not torch.equal(weights[12][1], weights[20][1])


def test_the_projector_has_its_own_learning_rate():
    term = FeatureTerm(GaussianLookup(ball()), 16, 100, FeatureConfig(learning_rate_ratio=0.25))
    groups = term.parameter_groups(4e-3)
    assert [group["lr"] for group in groups] == [1e-3] and [group["name"] for group in groups] == ["projector"]
    trainable = FeatureTerm(GaussianLookup(ball()), 16, 100, FeatureConfig(adapter="linear"))
    assert any(weight is trainable.adapter.projection for weight in trainable.parameter_groups(4e-3)[0]["params"])


def test_every_logged_step_has_the_term_s_values(scene):
    lookup, space, pool = scene
    term = FeatureTerm(lookup, SHAPE.hidden, 24, FeatureConfig(channels=8, cka_every=6))
    records = distill(make_student(space, SHAPE, STEP), pool, settings(log_every_steps=1), terms=[term],
                      quiet=True).records
    always = {f"features_{name}"
              for name in ("loss", "cosine_similarity", "l2", "kept", "cosine_weight", "l2_weight",
                           "projector_gradient_norm")}
    assert len(records) == 24 and all(always <= set(record) for record in records)
    assert [record["step"] for record in records if "features_cka" in record] == [1, 7, 13, 19]


# ---- bad input

def sentence(function, *arguments, **options) -> str:
    """The message of a refused call, which is one sentence."""
    text = expect_error(function, *arguments, **options)
    assert text.count("\n") == 0 and len(text) < 250 and text.endswith(".")
    return text


def test_bad_teachers_are_refused_in_one_sentence():
    assert "degree 1" in sentence(teacher_features, ball(sh_degree=1), sh_degree=3)
    broken = ball()
    broken.log_scales[5, 0] = math.nan
    for function in (teacher_features, GaussianLookup): assert "log_scales" in sentence(function, broken)
    wrong = ball()
    wrong.sh = wrong.sh[:, :3]
    for function in (teacher_features, GaussianLookup): assert "sh has 3 coefficients" in sentence(function, wrong)


def test_contradictory_settings_are_refused():
    assert ".5" in sentence(FeatureConfig, learning_rate_ratio=0.6)
    sentence(FeatureConfig, fade_start=0.5, fade_end=0.4)
    sentence(FeatureConfig, cosine_weight=0.0, l2_weight=0.0)
    sentence(TeacherAdapter, teacher_features(ball()), ball().opacities, channels=53)


def test_a_checkpoint_of_another_config_is_refused():
    lookup = GaussianLookup(ball())
    stored = FeatureTerm(lookup, 16, 100, FeatureConfig(channels=8)).state_dict()
    assert "channels" in sentence(FeatureTerm(lookup, 16, 100, FeatureConfig(channels=9)).load_state_dict, stored)
    assert "steps" in sentence(FeatureTerm(lookup, 16, 50, FeatureConfig(channels=8)).load_state_dict, stored)
    extended = FeatureTerm(lookup, 16, 200, FeatureConfig(channels=8))
    extended.load_state_dict(stored)
    assert extended.steps == 100, "the schedules of an extended run stay those of the first"
