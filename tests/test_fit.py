"""Fitting gaussians: held-out quality, empty background, and the same numbers after an interruption."""
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import StopAt, run_here

from kilonb.core.errors import KiloError
from kilonb.metrics.perceptual import lpips_available
from kilonb.scenes.blender import BlenderScene, load_blender
from kilonb.scenes.brickyard import write_brickyard
from kilonb.splats.densification import GaussianModel, change_set, grow_and_prune, relocate_and_grow
from kilonb.splats.fit import GaussianFit, fit_gaussians, held_out_scores, photometric_loss, render_with_meta
from kilonb.splats.fit_config import (
    DefaultStrategy,
    FitConfig,
    MCMCStrategy,
    config_for_views,
    flat_settings,
    named_strategy,
)
from kilonb.splats.gaussians import Gaussians
from kilonb.splats.initialization import ViewSet, initial_gaussians, scene_extent
from kilonb.splats.mcmc import draw_sources, exploration_noise, share_with_copies
from kilonb.splats.ply import read_ply
from kilonb.training.guards import TrainingStopped

CONFIG = FitConfig(steps=300, initial_count=2000, maximum_count=4000, means_rate=4e-4, grow_every_steps=50)
SHORT = replace(CONFIG, steps=60, grow_every_steps=15, initial_count=1200, maximum_count=2500, evaluate_every_steps=30)
SAMPLED = replace(SHORT, strategy=MCMCStrategy())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("fit") / "brickyard"
    write_brickyard(target, width=64, height=64, train=12, test=3, count=8_000)
    return target


@pytest.fixture(scope="module")
def scene(folder) -> BlenderScene: return load_blender(folder, "train")


@pytest.fixture(scope="module")
def held_out(folder) -> BlenderScene: return load_blender(folder, "test")


@pytest.fixture(scope="module")
def unbroken(scene):
    return fit_gaussians(scene, SHORT, quiet=True)


@pytest.fixture(scope="module")
def sampled(scene, held_out):
    """A short fit with MCMCStrategy."""
    return fit_gaussians(scene, replace(SAMPLED, steps=120), quiet=True, held_out=held_out)


def floater(gaussians: Gaussians) -> Gaussians:
    """A hazy red ball in the air beside the vehicle, where every silhouette is empty for some view."""
    return Gaussians(
        torch.tensor([[0, -0.2, 0.98]]),
        torch.tensor([[1.0, 0, 0, 0]]),
        torch.full((1, 3), -2.3),
        torch.tensor([0.5]),
        torch.nn.functional.pad(torch.tensor([[[1.7, -1.7, -1.7]]]), (0, 0, 0, gaussians.sh.shape[1] - 1)),
    )


@pytest.mark.incident(1)
def test_a_short_fit_learns_and_its_background_is_empty(scene, held_out, tmp_path):
    """Held-out views far above the all-white baseline (incident 1: both are printed), alpha of the background close to
    zero, and the files hold the returned values."""
    result = fit_gaussians(scene, CONFIG, tmp_path / "run", held_out=held_out, quiet=True)
    final = result.evaluations[-1]
    assert final["step"] == 300 and final["psnr_srgb_white_db"] > final["psnr_blank_white_db"] + 15, final
    assert final["psnr_srgb_white_db"] > 25 and final["background_alpha"] < .005, final
    assert result.evaluations[0]["psnr_srgb_white_db"] < final["psnr_srgb_white_db"]
    assert len(result.gaussians) <= CONFIG.maximum_count and len({record["count"] for record in result.records}) > 2, (
        "the set never changed"
    )
    stored = read_ply(tmp_path / "run/teacher.ply")
    assert all(torch.equal(a, b) for a, b in zip(stored.parameters().values(), result.gaussians.parameters().values()))
    assert (tmp_path / "run/evaluations.json").is_file() and (tmp_path / "run/metrics.csv").is_file()


def test_a_floater_beside_the_object_fades(scene):
    """A loss on the rendering multiplied by the mask has no gradient for gaussians beside the object; the loss on the
    composited image has one and removes them."""
    views = ViewSet(scene)
    begin = Gaussians.concatenate([initial_gaussians(views, SHORT), floater(initial_gaussians(views, SHORT))])
    model = GaussianModel(begin, SHORT, 4.8)
    masked, composited = 0.0, 0.0
    for index, camera in enumerate(views.cameras):
        colour, alpha = views.premultiplied(index)
        background = torch.tensor([.2, .9, .4])
        rendered, _, _ = render_with_meta(model.gaussians(), camera, background, 0)
        target = colour + (1 - alpha) * background
        solid = (alpha > 0).float()
        for name, loss in (("masked", ((rendered - target) * solid).abs().mean()),
                           ("composited", photometric_loss(rendered, target, 0.0))):
            gradient = torch.autograd.grad(loss, model["logit_opacities"], retain_graph=True)[0][-1].item()
            if name == "masked": masked += abs(gradient)
            else: composited += gradient
    assert composited > 10 * masked, "the gradient of its opacity comes from the background, hardly from the object"
    result = fit_gaussians(scene, replace(SHORT, steps=150, grow_until=0.1, grow_from=0.0, prune_opacity=0.0),
                         initial=begin, quiet=True)
    assert begin.opacities[-1] > .6 and result.gaussians.opacities[len(begin) - 1] < .1


def test_a_stopped_fit_with_noise_ends_in_the_same_numbers(scene, tmp_path):
    """Noise and the choice of copied gaussians follow from the seed and the step, so that a stop between, at or after
    relocations repeats or skips no draw."""
    whole = fit_gaussians(scene, SAMPLED, quiet=True)
    for stop in (7, 15, 22):
        folder = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt), StopAt(stop): fit_gaussians(scene, SAMPLED, folder, quiet=True)
        resumed = fit_gaussians(scene, SAMPLED, folder, resume=True, quiet=True)
        assert resumed.resumed_from == stop and len(resumed.gaussians) == len(whole.gaussians) == SAMPLED.maximum_count
        for name, tensor in whole.gaussians.parameters().items():
            assert torch.equal(tensor, resumed.gaussians.parameters()[name]), (stop, name)
    assert not torch.equal(whole.gaussians.means,
                           fit_gaussians(scene, replace(SAMPLED, strategy=MCMCStrategy(noise_rate=0.0)),
                                       quiet=True).gaussians.means), "there was no noise"


@pytest.mark.parametrize("stop", [3, 15, 22, 30, 59])
def test_a_stopped_fit_ends_in_the_same_numbers(scene, unbroken, tmp_path, stop):
    """Stopped before, at, between and after changes of the set: equal parameters to the bit, equal records except for
    times."""
    with pytest.raises(KeyboardInterrupt), StopAt(stop): fit_gaussians(scene, SHORT, tmp_path, quiet=True)
    resumed = fit_gaussians(scene, SHORT, tmp_path, resume=True, quiet=True)
    assert resumed.resumed_from == stop and resumed.finished
    for name, tensor in unbroken.gaussians.parameters().items():
        assert torch.equal(tensor, resumed.gaussians.parameters()[name]), name
    timeless = [[{k: v for k, v in record.items() if k != "elapsed_s"} for record in run.records]
                for run in (unbroken, resumed)]
    assert timeless[0] == timeless[1]


def test_a_fit_that_is_stopped_twice_keeps_its_evaluations(scene, held_out, tmp_path):
    for stop in (35, 10):
        with pytest.raises(KeyboardInterrupt), StopAt(stop):
            fit_gaussians(scene, SHORT, tmp_path, resume=tmp_path.joinpath("metrics.csv").exists(), quiet=True)
    resumed = fit_gaussians(scene, SHORT, tmp_path, resume=True, quiet=True, held_out=held_out)
    assert resumed.resumed_from == 45 and [e["step"] for e in resumed.evaluations] == [60]
    again = fit_gaussians(scene, SHORT, tmp_path, resume=True, quiet=True, held_out=held_out)
    assert again.resumed_from == 60 and again.evaluations == resumed.evaluations, (
        "resuming a finished fit runs no step"
    )
    assert all(torch.equal(a, b) for a,
               b in zip(again.gaussians.parameters().values(), resumed.gaussians.parameters().values()))


def test_a_resumed_fit_with_other_settings_is_refused(scene, tmp_path):
    with pytest.raises(KeyboardInterrupt), StopAt(5): fit_gaussians(scene, SHORT, tmp_path, quiet=True)
    with pytest.raises(KiloError, match="grow_gradient"):
        fit_gaussians(scene, replace(SHORT, strategy=DefaultStrategy(grow_gradient=1e-3)), tmp_path, resume=True,
                      quiet=True)
    with pytest.raises(KiloError, match="already holds a run"): fit_gaussians(scene, SHORT, tmp_path, quiet=True)


def test_another_seed_is_another_fit(scene, unbroken):
    other = fit_gaussians(scene, replace(SHORT, seed=1), quiet=True)
    assert [r["loss"] for r in other.records] != [r["loss"] for r in unbroken.records]


@pytest.mark.incident(17, 24)
@pytest.mark.parametrize("config", [SHORT, SAMPLED], ids=lambda config: config.strategy.name)
def test_every_parameter_is_trained(scene, config):
    """Incident 24: a parameter without gradient looks converged. After the warm-up every group has one, harmonics
    included."""
    views = ViewSet(scene)
    model = GaussianModel(initial_gaussians(views, config), config, scene_extent(views.cameras))
    fit = GaussianFit(model, views, None)
    fit(SHORT.steps - 1, torch.Generator().manual_seed(0))["loss"].backward()
    for group in model.optimizer.param_groups:
        gradient = group["params"][0].grad
        assert torch.isfinite(gradient).all() and (gradient != 0).float().mean() > .2, group["name"]
    assert (fit.meta["means2d"].grad != 0).any(), (
        "densification would wait for a gradient that never comes (incident 17)"
    )


def test_changing_the_set_never_mixes_rows(scene):
    """After a change each kept row has the value and the optimiser moments that it had before."""
    views = ViewSet(scene)
    model = GaussianModel(initial_gaussians(views, SHORT), SHORT, 4.8)
    fit = GaussianFit(model, views, None)
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        model.optimizer.zero_grad()
        fit(step, generator)["loss"].backward()
        model.optimizer.step()
    keep = torch.randperm(len(model), generator=generator)[:700].sort().values
    rows = {g["name"]: g["params"][0].detach()[keep].clone() for g in model.optimizer.param_groups}
    kept = {g["name"]: model.optimizer.state[g["params"][0]]["exp_avg"][keep].clone()
            for g in model.optimizer.param_groups}
    change_set(model, keep, {g["name"]: g["params"][0].detach()[:5] for g in model.optimizer.param_groups})
    for group in model.optimizer.param_groups:
        parameter, name = group["params"][0], group["name"]
        moments = model.optimizer.state[parameter]
        assert len(parameter) == 705 and torch.equal(parameter.detach()[:700],
                                                     rows[name]) and torch.equal(moments["exp_avg"][:700], kept[name])
        assert (moments["exp_avg"][700:] == 0).all() and (moments["exp_avg_sq"][700:]
                                                          == 0).all() and moments["step"] == 3
    assert len(model.optimizer.state) == 5, "moments of replaced parameters are removed"


@pytest.mark.parametrize("spare", [0, 1, 250])
def test_the_count_stays_below_its_maximum(scene, spare):
    """The limit holds however many gaussians qualify for growth."""
    config = replace(SHORT, maximum_count=SHORT.initial_count + spare,
                     strategy=DefaultStrategy(grow_gradient=0.0, split_size=0.0005))
    model = GaussianModel(initial_gaussians(ViewSet(scene), config), config, 4.8)
    model.gradient_sum, model.visible_count = torch.rand(len(model)) + 1, torch.ones(len(model))
    change = grow_and_prune(model, 15)
    assert (
        len(model) <= config.maximum_count
        and change["cloned"] + change["split"] == spare
        and change["count"] == len(model)
    )


def test_mcmc_learns_within_its_budget(sampled):
    """The given number of gaussians is reached and never exceeded, and the scene is learned with an empty
    background."""
    final, counts = sampled.evaluations[-1], [record["count"] for record in sampled.records]
    assert final["psnr_srgb_white_db"] > final["psnr_blank_white_db"] + 12 and final["background_alpha"] < .01, final
    assert (
        counts == sorted(counts)
        and counts[0] < 1300 < counts[-1]
        and len(sampled.gaussians) == SAMPLED.maximum_count >= max(counts)
    )
    assert [set(e) >= {"step", "train_s", "count"} for e in sampled.evaluations] == [True] * 4
    assert all(one["train_s"] < other["train_s"] for one, other in zip(sampled.evaluations, sampled.evaluations[1:]))


def with_dead(gaussians: Gaussians, share: float) -> tuple[Gaussians, torch.Tensor]:
    """(the gaussians with a random share of them made transparent, a mask of these)."""
    dead = torch.rand(len(gaussians), generator=torch.Generator().manual_seed(0)) < share
    logits = torch.where(dead, torch.full_like(gaussians.logit_opacities, -9.0), gaussians.logit_opacities)
    return Gaussians(gaussians.means, gaussians.quats, gaussians.log_scales, logits, gaussians.sh), dead


@pytest.mark.parametrize("growth", [0.0, 0.2])
def test_relocation_reuses_transparent_gaussians_and_keeps_the_picture(scene, sampled, growth):
    """A fifth of the set is relocated with little change of the picture. Plain copies of the same gaussians are the
    control."""
    views = ViewSet(scene)
    faded, dead = with_dead(sampled.gaussians, .2)
    config = replace(SAMPLED, initial_count=1, maximum_count=10_000,
                     strategy=MCMCStrategy(growth=growth, scatter=0.0))
    model = GaussianModel(faded, config, 4.8)
    change = relocate_and_grow(model, 15, torch.Generator().manual_seed(0))
    alive = faded.opacities > config.prune_opacity
    assert change["relocated"] == int((~alive).sum()) >= int(dead.sum()) > 0
    assert (
        change["count"] == len(model) and len(faded) * (1 + growth) <= len(model) <= len(faded) * (1 + growth) + 1
    )
    assert (model.gaussians().opacities
            <= config.prune_opacity).float().mean() < .01 < (~alive).float().mean(), "transparent ones remain"
    sources = draw_sources(torch.where(alive, faded.opacities, 0), len(model) - int(alive.sum()),
                           torch.Generator().manual_seed(0))
    plain = Gaussians.concatenate([faded.subset(alive), faded.subset(sources)])

    def distance_db(gaussians: Gaussians) -> float:
        """PSNR of its views against the views before, dB."""
        with torch.no_grad():
            pictures = [[render_with_meta(g, camera, torch.ones(3), 3)[0] for camera in views.cameras[:4]]
                        for g in (faded, gaussians)]
        return -10 * (torch.stack(pictures[0]) - torch.stack(pictures[1])).square().mean().log10().item()

    assert distance_db(model.gaussians()) > distance_db(plain) + 6 and distance_db(model.gaussians()) > 30


def test_relocated_gaussians_start_with_zero_moments(scene):
    """Moments of the row's previous gaussian would move the relocated one and its original far away; all other rows
    keep their moments."""
    views = ViewSet(scene)
    faded, _ = with_dead(initial_gaussians(views, SAMPLED), .01)
    model = GaussianModel(faded, replace(SAMPLED, strategy=MCMCStrategy(growth=0.0)), 4.8)
    fit = GaussianFit(model, views, None)
    fit(0, torch.Generator().manual_seed(0))["loss"].backward()
    model.optimizer.step()
    before = model.optimizer.state[model["logit_opacities"]]["exp_avg"].clone()
    values = model["logit_opacities"].detach().clone()
    kept = (values.sigmoid() > SAMPLED.prune_opacity).nonzero()[:, 0]
    relocate_and_grow(model, 15, torch.Generator().manual_seed(0))
    after, now = model.optimizer.state[model["logit_opacities"]]["exp_avg"], model["logit_opacities"].detach()
    shared = now[:len(kept)] != values[kept]
    assert (
        0 < shared.sum() <= len(values) - len(kept)
        and (after[len(kept) :] == 0).all()
        and (after[: len(kept)][shared] == 0).all()
    )
    assert torch.equal(after[:len(kept)][~shared], before[kept][~shared]) and (before[kept] != 0).float().mean() > .5


def test_relocation_keeps_the_integral_along_a_line_of_sight():
    """Equation 9, numerically: the composite of all copies, integrated along a line through the centre, is that of the
    gaussian that they replace."""
    logits, sources = (
        torch.logit(torch.tensor([0.05, 0.5, 0.95, 0.999], dtype=torch.float64)),
        torch.tensor([0, 1, 1, 2, 2, 2, 2, 2, 3]),
    )
    shared, scales, drawn = share_with_copies(logits, torch.zeros(4, 3, dtype=torch.float64), sources)
    x = torch.linspace(-15, 15, 60_001, dtype=torch.float64)
    for k in range(4):
        copies = 1 + int((sources == k).sum())
        through = (1 - shared[k].sigmoid() * torch.exp(-.5 * (x / scales[k, 0].exp()) ** 2)) ** copies
        one = 1 - logits[k].sigmoid() * torch.exp(-.5 * x ** 2)
        torch.testing.assert_close(torch.trapezoid(1 - through, x), torch.trapezoid(1 - one, x), rtol=1e-5, atol=0)
        torch.testing.assert_close(through.min(), one.min(), rtol=1e-5, atol=1e-7)
    assert drawn.all() and (scales <= 0).all()


def test_noise_moves_transparent_gaussians_more_than_opaque_ones():
    """The noise of MCMC must not blur the picture."""
    quats, scales = torch.tensor([[1.0, 0, 0, 0]]).expand(3000, 4), torch.tensor([.2, .1, .01]).expand(3000, 3)
    opacities = torch.tensor([.002, .05, .5]).repeat_interleave(1000)
    noise = exploration_noise(quats, scales, opacities, 3.0, torch.Generator().manual_seed(0))
    length = noise.square().mean(0).sqrt()
    faint, weak, solid = noise.norm(dim=-1).reshape(3, 1000).mean(1).tolist()
    assert faint > 20 * weak > 0 and solid == 0 and length[0] > 3 * length[1] > 100 * length[2]


@pytest.mark.parametrize(("settings", "words"),
                         [(dict(name="mcmc", reset_opacity_steps=300), "MCMCStrategy 'reset_opacity_steps'"),
                          (dict(name="mcmc", grow_gradient=1e-3), "MCMCStrategy 'grow_gradient'"),
                          (dict(name="default", noise_rate=10.0), "DefaultStrategy 'noise_rate'"),
                          (dict(name="annealing"), "Unknown densification strategy 'annealing': known: default, mcmc"),
                          (dict(name="mcmc", scatter=-1.0), "scatter is -1.0")])
def test_settings_of_another_strategy_are_refused(settings, words):
    with pytest.raises(KiloError, match=words): named_strategy(**settings)


def test_checkpoints_of_version_0_1_have_the_same_settings():
    """0.1 stored the settings of both strategies side by side; its fits can be resumed only if the stored form is
    kept."""
    common = dict(steps=2000, initial="hull", initial_count=12_000, maximum_count=60_000, sh_degree=3,
                  background="random", ssim_weight=0.2, means_rate=8e-4, colour_rate=2e-2, opacity_rate=0.1,
                  scale_rate=4e-2, rotation_rate=2e-2, means_rate_end=0.03, rate_end=0.1, grow_every_steps=100,
                  grow_from=0.1, grow_until=0.6, prune_opacity=0.005, evaluate_every_steps=None, seed=0)
    default = dict(grow_gradient=2e-4, split_size=0.01, prune_size=0.1, reset_opacity_steps=None)
    mcmc = dict(growth=None, scatter=0.5, noise_rate=1500.0, opacity_weight=0.001, scale_weight=0.02)
    masked = lambda config: config_for_views(config, masked=True)
    assert flat_settings(masked(FitConfig())) == common | default | mcmc | {"strategy": "default"}
    grown = flat_settings(masked(FitConfig(strategy=MCMCStrategy(growth=0.1))))
    assert grown == common | default | mcmc | {"strategy": "mcmc", "growth": 0.1}


@pytest.mark.incident(1)
def test_the_blank_score_is_that_of_a_white_picture(held_out):
    """Incident 1: a score of 6 to 9 dB was that of an empty picture."""
    views = ViewSet(held_out)
    nothing = Gaussians(torch.zeros(1, 3), torch.tensor([[1.0, 0, 0, 0]]), torch.full((1, 3), -5.0),
                        torch.tensor([-20.0]), torch.zeros(1, 1, 3))
    scores = held_out_scores(nothing, views)
    assert abs(scores["psnr_srgb_white_db"]
               - scores["psnr_blank_white_db"]) < 1e-5 and 5 < scores["psnr_blank_white_db"] < 12


def test_pictures_and_poses_that_do_not_belong_together_are_refused(scene):
    """Poses of one scene with the masks of another have no visual hull in common, so there is no place to start."""
    views = ViewSet(scene)
    views.rgba = torch.zeros_like(views.rgba)
    with pytest.raises(KiloError, match="no common volume"): initial_gaussians(views, SHORT)
    with pytest.raises(KiloError, match="no view"): ViewSet([])


class Shot:
    """One view that is not from a file."""

    def __init__(self, camera, rgba, name="made"): self.camera, self.rgba, self.name = camera, rgba, name

    def rgba_straight(self) -> torch.Tensor: return self.rgba


def test_pictures_of_different_sizes_or_with_nan_are_refused(scene, folder):
    small = load_blender(folder, "train", 32)
    with pytest.raises(KiloError, match="camera of 32x32 pixels, but the first view's camera has 64x64"):
        ViewSet([scene[0], small[1]])
    with pytest.raises(KiloError, match=r"shape \[64, 64, 3\]"):
        ViewSet([scene[0], Shot(scene[1].camera, scene[1].rgba_straight()[..., :3])])
    with pytest.raises(KiloError, match="'made' holds NaN"):
        ViewSet([scene[0], Shot(scene[1].camera, torch.full((64, 64, 4), torch.nan))])


@pytest.mark.parametrize("initial", ["hull", "box"])
def test_cameras_that_see_nothing_are_refused(scene, initial):
    """A fit to empty pictures, or to poses that look elsewhere, would run to its end and be blank."""
    config = replace(SHORT, initial=initial)
    empty = [Shot(frame.camera, torch.zeros(64, 64, 4)) for frame in scene]
    words = "no common volume" if initial == "hull" else "No view shows the object"
    with pytest.raises(KiloError, match=words): fit_gaussians(empty, config, quiet=True)
    begin = initial_gaussians(ViewSet(scene), config)
    begin.means = begin.means + 20
    words = "12 of 12 views show the object but see none of the 1200 gaussians"
    with pytest.raises(KiloError, match=words): fit_gaussians(scene, config, initial=begin, quiet=True)
    flip = torch.diag(torch.tensor([1.0, -1, -1, 1]))
    turned = [Shot(replace(frame.camera, camera_to_world=frame.camera.camera_to_world @ flip), frame.rgba_straight())
              for frame in scene]
    with pytest.raises(KiloError, match="12 of 12 cameras look away"): fit_gaussians(turned, config, quiet=True)


def test_a_start_from_broken_gaussians_is_refused(scene):
    begin = initial_gaussians(ViewSet(scene), SHORT)
    with pytest.raises(KiloError, match="degree 3, but sh_degree is 1"):
        fit_gaussians(scene, replace(SHORT, sh_degree=1), initial=begin, quiet=True)
    begin.sh[7, 2, 1] = torch.nan
    with pytest.raises(KiloError,
                       match="1 of 1200 gaussians have a value in sh that is not finite, the first is number 7"):
        fit_gaussians(scene, SHORT, initial=begin, quiet=True)


@pytest.mark.incident(1)
def test_an_object_that_fades_stops_the_fit_with_one_error(scene):
    """Incident 1: a model that rendered background only was trained for hours. Here the fit stops with an
    error."""
    faint = initial_gaussians(ViewSet(scene), SHORT)
    faint.logit_opacities = torch.full_like(faint.logit_opacities, -12.0)
    stuck = replace(SHORT, steps=400, opacity_rate=1e-9)
    for strategy in (DefaultStrategy(), MCMCStrategy()):
        with pytest.raises(TrainingStopped, match="every gaussian"):
            fit_gaussians(scene, replace(stuck, strategy=strategy), initial=faint, quiet=True)
    with pytest.raises(TrainingStopped, match="alpha collapsed"):
        fit_gaussians(scene, replace(stuck, grow_until=0.1), initial=faint, quiet=True)


def test_a_fit_that_starts_in_a_box_learns(scene, held_out):
    """Without silhouettes the initial gaussians are random in a box."""
    result = fit_gaussians(scene, replace(SHORT, initial="box", initial_count=2500, maximum_count=4000, steps=150),
                         held_out=held_out, quiet=True)
    assert result.evaluations[-1]["psnr_srgb_white_db"] > result.evaluations[-1]["psnr_blank_white_db"] + 6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_fit_runs_on_a_gpu(scene, held_out):
    result = fit_gaussians(scene, CONFIG, held_out=held_out, device="cuda", quiet=True)
    assert result.gaussians.device.type == "cuda" and result.evaluations[-1]["psnr_srgb_white_db"] > 25


@pytest.mark.slow
def test_the_experiment_fits_inspects_and_inspects_again_what_it_wrote(tmp_path):
    """One command fits a model and writes its gates; the same command inspects the PLY that it wrote."""
    def run(out: str, *arguments: str) -> dict:
        done = run_here("run", "teacher", "--out", tmp_path / out, "--json", *arguments)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return json.loads(done.stdout.strip().splitlines()[-1])

    small = ("-p", "orbit_views=3", "-p", "orbit_width=100")
    fitted = run("fitted", "-p", "steps=150", "-p", "resolution=64", "-p", "initial_count=2000", "-p",
                 "maximum_count=4000", "-p", "strategy=mcmc", "-p", "test_views=0", "-p", "lpips_every=3", *small)
    results = fitted["results"]
    assert (
        results["test_psnr_srgb_white_db"] > results["psnr_blank_white_db"] + 12
        and results["steps"] == 150
        and results["fit_s"] > 0
    )
    assert results["views"] == 8 and results["test_psnr_srgb_white_db"] == results["psnr_srgb_white_db"]
    assert results["lpips_views"] == (3 if lpips_available()
                                      else 0) and ("test_lpips_vgg" in results) == lpips_available()
    assert fitted["gates"]["background_alpha_mean"]["verdict"] == "green"
    tables = json.loads((tmp_path / "fitted/results.json").read_text())["tables"]
    assert len(tables["views"]) == 8 and all({"train_s", "count", "psnr_srgb_white_db"} <= set(row)
                                             for row in tables["evaluations"])
    for picture in ("fit", "worst_view", "around", "gaussians"):
        assert (tmp_path / f"fitted/figures/{picture}.png").stat().st_size < 150_000
    looked = run("looked", "-p", f"ply={tmp_path / 'fitted/teacher.ply'}", "-p", "up=-y", *small)
    assert looked["results"]["count"] == fitted["results"]["count"] and "psnr_srgb_white_db" not in looked["results"]
