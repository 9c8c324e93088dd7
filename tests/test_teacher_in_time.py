"""The teacher in time: stages of a fit that follow its progress, runs with a time limit, and runs of older versions."""
from dataclasses import replace

import pytest
import torch
from helpers import StopAt

import kilonb.splats.fit as fit_module
from kilonb.core.errors import KiloError
from kilonb.metrics.images import structural_similarity
from kilonb.scenes.blender import BlenderScene, load_blender
from kilonb.scenes.brickyard import write_brickyard
from kilonb.splats.densification import GaussianModel, record_gradients
from kilonb.splats.fit import GaussianFit, fit_gaussians, render_with_meta
from kilonb.splats.fit_config import DefaultStrategy, FitConfig, MCMCStrategy, continued_config, flat_settings
from kilonb.splats.initialization import ViewSet, halved_views, initial_gaussians, scene_extent
from kilonb.splats.photometric import photometric_loss
from kilonb.training.schedules import StepPlan

FORMER = FitConfig(steps=24, initial_count=300, maximum_count=500, sh_degree=1, grow_every_steps=4, coarse_until=0.0,
                   square_from=1.0)
STAGES = replace(FORMER, coarse_until=0.4, square_from=0.8, prune_contribution=2.0)


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> BlenderScene:
    folder = tmp_path_factory.mktemp("time") / "brickyard"
    write_brickyard(folder, width=48, height=48, train=6, test=1, count=4000)
    return load_blender(folder, "train")


@pytest.fixture
def small_pictures(monkeypatch): monkeypatch.setattr(fit_module, "SMALLEST", 12)


def fit_at(scene: BlenderScene, config: FitConfig, position: float) -> tuple[GaussianFit, dict]:
    """A fit whose schedules stand at `position`, as after a part of its time, and the values of its step 0."""
    views, plan = ViewSet(scene), StepPlan(config.steps, 60.0)
    plan.begin(0, 0.0, position)
    model = GaussianModel(initial_gaussians(views, config), replace(config, background="white", exposure="none"),
                          scene_extent(views.cameras))
    fit = GaussianFit(model, views, None, plan)
    return fit, fit(0, torch.Generator().manual_seed(0))


def test_every_schedule_follows_the_position_of_the_plan(scene, small_pictures):
    """Step 0 of a limited run that has used most of its time: resolution, rates, harmonics and loss are those of the
    end, not those of the step's number."""
    begin, early = fit_at(scene, STAGES, 0)
    end, late = fit_at(scene, STAGES, 20)
    assert [fit.meta["width"] for fit in (begin, end)] == [24, 48]
    assert late["means_rate"] < early["means_rate"] and begin.degree(begin.position(0)) == 0 < end.degree(
        end.position(0)) == 1
    colour, alpha = end.views.premultiplied(fit_module.view_order(0, 6, STAGES.seed))
    rendered = render_with_meta(end.model.gaussians(), end.views.cameras[fit_module.view_order(0, 6, STAGES.seed)],
                                torch.ones(3), 1)[0]
    torch.testing.assert_close(late["loss"], (rendered - colour - 1 + alpha).square().mean())


def test_gaussians_that_no_view_shows_are_dropped_once_where_the_growth_ends(scene, monkeypatch):
    """Also in a run whose position skips steps, since its time is nearly over."""
    calls, drop = [], fit_module.prune_unseen

    def counted(model, cameras, step):
        before, dropped = len(model), drop(model, cameras, step)
        calls.append((step, before, dropped))
        return dropped

    monkeypatch.setattr(fit_module, "prune_unseen", counted)
    config = replace(FORMER, prune_contribution=2.0)
    fit_gaussians(scene, config, quiet=True)
    [(step, before, dropped)] = calls
    assert step == 15 and 0 < dropped < before, "the first step after 0.6 of 24"
    calls.clear()
    fit, _ = fit_at(scene, config, 0)
    for number, position in enumerate((11.0, 13.5, 17.2, 23.0)):
        fit.plan.before, fit.plan.position = fit.plan.position, position
        fit(number, torch.Generator().manual_seed(number))["loss"].backward()
        fit.after_step(number, [])
    assert [step for step, *_ in calls] == [18]


def test_small_pictures_are_not_halved(scene):
    assert GaussianFit(fit_at(scene, STAGES, 0)[0].model, ViewSet(scene), None).coarse is None
    half = halved_views(ViewSet(scene))
    assert half.rgba.shape == (6, 24, 24, 4) and half.cameras[0].width == 24


def test_a_stopped_fit_with_stages_ends_in_the_same_numbers(scene, small_pictures, tmp_path):
    whole = fit_gaussians(scene, STAGES, quiet=True)
    for stop in (7, 21):
        folder = tmp_path / str(stop)
        # pictures are requested once when they are halved and once in every step
        with pytest.raises(KeyboardInterrupt), StopAt(6 + stop): fit_gaussians(scene, STAGES, folder, quiet=True)
        resumed = fit_gaussians(scene, STAGES, folder, resume=True, quiet=True)
        assert resumed.resumed_from == stop and resumed.finished
        for name, tensor in whole.gaussians.parameters().items():
            assert torch.equal(tensor, resumed.gaussians.parameters()[name]), (stop, name)


def test_a_run_of_an_older_version_is_continued_as_it_began(scene, small_pictures, tmp_path):
    """Its checkpoint has none of the later settings: it is continued without stages, although the config has them, and
    ends in the numbers of an unbroken former run."""
    whole = fit_gaussians(scene, FORMER, quiet=True)
    with pytest.raises(KeyboardInterrupt), StopAt(14): fit_gaussians(scene, FORMER, tmp_path, quiet=True)
    resumed = fit_gaussians(scene, STAGES, tmp_path, resume=True, quiet=True)
    assert resumed.resumed_from == 14
    assert all(torch.equal(tensor, resumed.gaussians.parameters()[name])
               for name, tensor in whole.gaussians.parameters().items())


@pytest.mark.parametrize("strategy", [DefaultStrategy(), MCMCStrategy()], ids=lambda strategy: strategy.name)
def test_settings_without_later_ones_are_those_of_an_older_version(strategy):
    former = replace(FORMER, strategy=strategy)
    assert not {"coarse_until", "square_from", "absolute"} & set(flat_settings(former))
    staged = replace(former, square_from=0.5)
    assert continued_config(staged, flat_settings(former)) == former
    assert continued_config(staged, flat_settings(staged)) == staged


def test_another_stage_is_another_run(scene, small_pictures, tmp_path):
    with pytest.raises(KeyboardInterrupt), StopAt(6 + 5): fit_gaussians(scene, STAGES, tmp_path, quiet=True)
    with pytest.raises(KiloError, match="square_from"):
        fit_gaussians(scene, replace(STAGES, square_from=0.5), tmp_path, resume=True, quiet=True)


def test_a_time_limit_ends_a_fit_early_with_its_schedules_done(scene, tmp_path):
    """Far more steps than fit into the time: the run stops early, and the saved position is ahead of its steps."""
    fit_gaussians(scene, replace(FORMER, steps=4), quiet=True)                 # compiled now
    config = replace(FORMER, steps=1_000_000)
    result = fit_gaussians(scene, config, tmp_path, quiet=True, time_limit_s=1.0)
    assert not result.finished and 0 < result.steps < 100_000
    resumed = fit_gaussians(scene, config, tmp_path, quiet=True, time_limit_s=1.0, resume=True)
    assert resumed.steps <= result.steps + 1, "no time is left"


def test_absolute_gradients_exceed_plain_ones_and_drive_growth(scene):
    """Opposite gradients of two pixels cancel in the plain statistic and not in the absolute one."""
    views, sums = ViewSet(scene), []
    for strategy in (DefaultStrategy(), DefaultStrategy(absolute=True)):
        config = replace(FORMER, strategy=strategy)
        fit, values = fit_at(scene, config, 0)
        values["loss"].backward()
        record_gradients(fit.model, fit.meta)
        sums.append(fit.model.gradient_sum)
    assert (sums[1] >= 0.999 * sums[0] - 1e-9).all() and sums[1].sum() > 1.2 * sums[0].sum() and len(views) == 6


def test_the_compiled_loss_matches_the_metric_on_pictures(scene):
    """On views: 1 - loss at weight 1 is the reported SSIM, and a step along the negative gradient lowers the loss."""
    views = ViewSet(scene)
    (one, _), (other, _) = views.premultiplied(0), views.premultiplied(1)
    assert abs(1 - photometric_loss(one, other, 1.0) - structural_similarity(one, other)) < 1e-5
    moved = one.clone().requires_grad_()
    loss = photometric_loss(moved, other, 0.5, 0.2)
    gradient = torch.autograd.grad(loss, moved)[0]
    assert photometric_loss(one - 1e-3 * gradient / gradient.abs().max(), other, 0.5, 0.2) < loss


def test_the_loss_does_not_grow_memory():
    """Repeated calls keep one set of maps."""
    resource = pytest.importorskip("resource")
    picture, target = torch.rand(120, 130, 3, requires_grad=True), torch.rand(120, 130, 3)
    def run(times: int) -> int:
        for _ in range(times): torch.autograd.grad(photometric_loss(picture, target), picture)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    before = run(30)
    assert run(200) - before < 4000, "kilobytes"
