"""Control of a training run: the alpha target and band, phases and their conditions, averages, and the order of
experiments."""
import pytest
import torch
from torch import nn

from kilonb.distill.alpha import (
    AlphaBand,
    AlphaBandConfig,
    OpacityTarget,
    OpacityTargetConfig,
    alpha_terms,
    check_alpha_settings,
)
from kilonb.distill.losses import Term
from kilonb.distill.phases import Condition, Phase, PhasePlan, apply_phases
from kilonb.distill.student import DistillConfig, distill, make_student
from kilonb.distill.rays import RayBatch, RayPool
from kilonb.imaging.targets import targets_from_teacher
from kilonb.fields.kilonerf import KiloNeRFConfig
from kilonb.fields.occupancy import occupancy_from_gaussians
from kilonb.fields.rendering import RayRender
from kilonb.geometry.cameras import Rays, orbit_cameras
from kilonb.core.errors import KiloError
from kilonb.runs.gates import Gate
from kilonb.distill.policy import POLICY, adopt_direction_frequencies, spike_share
from kilonb.runs.promotion import Stage, read_policy, require_unlocked
from kilonb.runs.folders import open_run
from kilonb.runs.status import mark_run
from kilonb.splats.gaussians import gaussians_from_points
from kilonb.training.averaging import load_weights
from kilonb.training.checkpoints import final_path, latest_path, read_checkpoint
from kilonb.training.guards import TrainingStopped
from kilonb.training.loop import LoopConfig, train
from kilonb.runs.scalars import read_scalars

SHAPE = KiloNeRFConfig(cell_size=0.6, hidden=16, position_frequencies=3, direction_frequencies=1, density_bias=1.0)


@pytest.fixture(scope="module")
def scene():
    """(views, grid) of a ball."""
    shell = nn.functional.normalize(torch.randn(600, 3, generator=torch.Generator().manual_seed(0)), dim=-1) * 0.6
    ball = gaussians_from_points(shell, (shell * 4).sin() / 2 + 0.5, sh_degree=0, opacity=0.95, scale=0.8)
    grid = occupancy_from_gaussians(ball.means, ball.quats, ball.scales, ball.opacities, 16)
    return targets_from_teacher(
        ball, [(f"view_{i}", c) for i, c in enumerate(orbit_cameras(2, 3.0, 30, width=24, height=24))]
    ), grid


class Interrupting(RayPool):
    """A pool that is interrupted by Ctrl-C at its n-th batch; never without n."""

    left = None

    def draw(self, *arguments):
        if self.left is not None:
            self.left -= 1
            if self.left < 0: raise KeyboardInterrupt
        return super().draw(*arguments)


class Projector(Term):
    """A term with parameters of its own, as features have: a linear map of colour and alpha, with a small gradient in
    the student."""

    name = "features"

    def __init__(self):
        self.layer = nn.Linear(4, 3)
        with torch.no_grad(): self.layer.weight.fill_(0.1), self.layer.bias.zero_()

    def parameter_groups(self, learning_rate):
        return [{"params": list(self.layer.parameters()), "lr": learning_rate / 2, "name": "projector"}]

    def __call__(self, step, student, batch, render, generator):
        noise = 0.01 * torch.randn(len(batch.alpha), 3, generator=generator)
        predicted = self.layer(torch.cat([render.rgb_premultiplied, render.alpha[:, None]], -1))
        error = (predicted - batch.rgb_premultiplied - noise).square().mean()
        return {"loss": 0.1 * error, "features_error": error.detach(), "features_weight_effective": 0.1}

    def state_dict(self): return {name: value.clone() for name, value in self.layer.state_dict().items()}
    def load_state_dict(self, state): self.layer.load_state_dict(state)


BAND = AlphaBandConfig(minimum=0.95, halo=0.001, patience=3, decay=0.5)
COLOUR = Phase("colour", {"opacity": 1.0, "alpha_band": 0.0, "features": 0.0}, share=0.25)
ALONE = Phase("alone", {"opacity": 1.0, "alpha_band": 1.0, "features": 1.0}, share=0.25, frozen=["student"],
              needs=["features"])
BOTH = Phase("both", {"opacity": 0.0, "alpha_band": 1.0, "features": 0.5},
             gates=[Condition("features_error", at_most=10.0, patience=2)], maximum_wait=0.2, if_blocked="stop",
             needs=["features"])


class Session:
    """A distillation with alpha terms, features and phases."""

    def __init__(self, scene, phases=(COLOUR, ALONE, BOTH), steps=40, band=BAND, features=True, **loop):
        views, grid = scene
        self.student, self.pool = make_student(grid, SHAPE, 0.05), Interrupting(views, grid, 0.05)
        self.projector, self.messages = Projector(), []
        own = [*alpha_terms(OpacityTargetConfig(), band, steps), *([self.projector] if features else [])]
        self.plan = PhasePlan(phases, steps, [term.name for term in own], check_every=4, report=self.messages.append)
        self.terms = apply_phases(self.plan, own, self.student)
        settings = {"learning_rate": 5e-3, "warmup_steps": 4, "swa_from": 0.6, "log_every_steps": 3} | loop
        self.config = DistillConfig(128, first_refresh=8, loop=LoopConfig(steps, **settings))

    def run(self, folder=None, resume=False, stop_at=None):
        self.pool.left = stop_at
        return distill(self.student, self.pool, self.config, folder, terms=self.terms, resume=resume, quiet=True)


def without_clock(records):
    return [{name: value for name, value in record.items() if name != "elapsed_s"} for record in records]


def contents(folder): return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def batch_of(student_alpha, target_alpha):
    """Rays of which only alpha matters."""
    wanted, alpha = torch.tensor(target_alpha), torch.tensor(student_alpha, requires_grad=True)
    nothing = torch.zeros(len(wanted), 3)
    unknown = torch.zeros_like(wanted)
    return RayBatch(Rays(nothing, nothing), nothing, wanted, unknown), RayRender(
        nothing, alpha, unknown, torch.zeros(0), None
    )


# ---- a run that is stopped and resumed

@pytest.mark.parametrize("stop_at", [9, 10, 19, 21, 33])
def test_a_resumed_run_with_phases_ends_in_the_same_bits(scene, tmp_path, stop_at):
    """Stopped just before and after phases change (steps 10 and 20), while the band's weight changes, and while SWA
    averages (from 24)."""
    whole = Session(scene)
    expected = whole.run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt): Session(scene).run(tmp_path / "parts", stop_at=stop_at)
    assert read_checkpoint(latest_path(tmp_path / "parts"))["step"] == stop_at
    parts = Session(scene)
    result = parts.run(tmp_path / "parts", resume=True)
    assert result.resumed_from == stop_at and without_clock(result.records) == without_clock(expected.records)
    for name, value in whole.student.state_dict().items():
        assert torch.equal(value, parts.student.state_dict()[name]), name
    for name, value in whole.projector.state_dict().items():
        assert torch.equal(value, parts.projector.state_dict()[name]), name
    assert parts.plan.starts == whole.plan.starts and len(whole.plan.starts) == 3
    assert parts.plan.history == whole.plan.history == ["Step 10: phase 'alone' begins.",
                                                        "Step 20: phase 'both' begins."]
    assert expected.records[-1]["alpha_band_weight_effective"] > 0                    # the band was active


@pytest.mark.incident(8)
def test_incident_8_a_distillation_is_fresh_or_resumed_never_appended(scene, tmp_path):
    with pytest.raises(KeyboardInterrupt): Session(scene).run(tmp_path / "run", stop_at=15)
    before = contents(tmp_path / "run")
    with pytest.raises(KiloError, match="already holds a run"): Session(scene).run(tmp_path / "run")
    assert contents(tmp_path / "run") == before
    Session(scene).run(tmp_path / "run", resume=True)
    assert list(read_scalars(tmp_path / "run")["step"]) == [*range(3, 40, 3), 40]


def test_another_plan_or_another_band_is_not_resumed(scene, tmp_path):
    with pytest.raises(KeyboardInterrupt): Session(scene).run(tmp_path / "run", stop_at=15)
    shorter = Phase("colour", COLOUR.weights, share=0.2)
    with pytest.raises(KiloError, match="resume with the same plan"):
        Session(scene, (shorter, ALONE, BOTH)).run(tmp_path / "run", resume=True)
    other = AlphaBandConfig(minimum=0.95, halo=0.001, patience=3, decay=0.5, cap=0.15)
    with pytest.raises(KiloError, match=r"alpha_band cap = 0\.12, this one has 0\.15"):
        Session(scene, band=other).run(tmp_path / "run", resume=True)


# ---- phases

def test_frozen_parameters_do_not_change_until_they_are_unfrozen(scene):
    weights = {}

    class Recording(Session):
        def run(self):
            student, after = self.student, self.terms[0].after_step

            def after_step(step):
                weights[step
                        + 1] = student.field.networks.detach().clone(), self.projector.layer.weight.detach().clone()
                after(step)

            self.terms[0].after_step = after_step
            return super().run()

    Recording(scene).run()
    moved = lambda which, first, last: not torch.equal(weights[first][which], weights[last][which])
    # the student: frozen in steps 10..20
    assert moved(0, 1, 10) and not moved(0, 10, 20) and moved(0, 20, 40)
    # the projector: off in steps 0..10
    assert not moved(1, 1, 10) and moved(1, 10, 20) and moved(1, 20, 40)


def test_phase_and_effective_weights_are_in_the_log(scene, tmp_path):
    Session(scene, log_every_steps=1).run(tmp_path / "run")
    log = read_scalars(tmp_path / "run")
    assert list(log["phase_index"]) == [0.0] * 10 + [1.0] * 10 + [2.0] * 20
    assert list(log["features_phase_weight"]) == [0.0] * 10 + [1.0] * 10 + [0.5] * 20
    assert list(log["features_weight_effective"][10:]) == [0.1] * 10 + [0.05] * 20
    torch.testing.assert_close(torch.tensor(log["features_term"][10:]),
                               torch.tensor(log["features_weight_effective"][10:] * log["features_error"][10:]))


@pytest.mark.parametrize("ending", ["stop", "go on"])
def test_a_condition_that_never_holds_stops_the_run_or_ends_the_wait(scene, tmp_path, ending):
    never = Phase("both", BOTH.weights, gates=[Condition("phase_colour_error", at_most=0.0)], maximum_wait=0.2,
                  if_blocked=ending, needs=["features"])
    session = Session(scene, (COLOUR, ALONE, never), checkpoint_every_steps=1)
    if ending == "stop":
        with pytest.raises(TrainingStopped,
                           match="at step 28: phase 'both' has waited 8 steps for phase_colour_error <= 0"):
            session.run(tmp_path / "run")
        assert read_checkpoint(latest_path(tmp_path / "run"))["step"] == 27
    else:
        records = session.run(tmp_path / "run").records
        assert (
            session.messages[-1]
            == "Step 28: phase 'both' begins, though it has waited 8 steps for phase_colour_error <= 0."
        )
        assert records[-1]["phase_index"] == 2 and max(record["phase_waiting_steps"] for record in records) > 0


def test_a_condition_must_hold_in_consecutive_checks():
    gate = Condition("loss", at_most=1.0, patience=3)
    plan = PhasePlan([Phase("a", {}, steps=2), Phase("b", {}, gates=[gate], maximum_wait=0.9, if_blocked="stop")], 100,
                     [], report=lambda message: None)
    for step, loss in enumerate([0.5, 0.5, 2.0, 0.5, 0.5], 1): plan.weights(step, {"step": step, "loss": loss})
    plan.weights(5, {"step": 5, "loss": 0.5})                                         # a record is judged once
    assert plan.index == 0
    plan.weights(6, {"step": 6, "loss": 0.5})
    assert plan.index == 1 and plan.began == 6


@pytest.mark.incident(9)
def test_incident_9_an_empty_list_of_gates_is_no_gates(scene):
    """Emptied on purpose, the list came back as the default and stopped a run that had no features."""
    open_phase = Phase("both", BOTH.weights, gates=[], needs=["features"])
    session = Session(scene, (COLOUR, ALONE, open_phase))
    assert (
        session.plan.phases[2].gates == []
        and session.run().records[-1]["phase_index"] == 2
        and session.plan.began == 20
    )
    with pytest.raises(KiloError, match=r"gates must be .*got NoneType"):
        Phase("both", BOTH.weights, gates=None)
    assert PhasePlan([], 100, ["opacity"]).weights(50) == {"opacity": 1.0}


@pytest.mark.incident(9)
def test_incident_9_without_features_their_phases_are_left_out_with_a_message(scene):
    session = Session(scene, features=False)
    assert session.messages == ["Phase 'alone' is left out: this run has no features.",
                            "Phase 'both' is left out: this run has no features."]
    assert session.run().finished and [phase.name for phase in session.plan.phases] == ["colour"]
    assert all(parameter.requires_grad for parameter in session.student.parameters())
    first = PhasePlan([ALONE,
                       Phase("rest", {"opacity": 1.0, "alpha_band": 1.0, "features": 1.0}, gates=BOTH.gates,
                             maximum_wait=0.1, if_blocked="stop")], 100, ["opacity", "alpha_band"],
                      report=lambda message: None)
    assert first.phase.name == "rest" and not first.phase.gates and len(first.history) == 2


@pytest.mark.parametrize("phases, message",
                         [([Phase("a", {"x": 1.0}, steps=100), Phase("b", {"x": 1.0})],
                           "steps = 100: 'a' 100 steps; nothing is left for 'b'"),
                          ([Phase("a", {"x": 1.0}, share=0.9),
                            Phase("b", {"x": 1.0}, gates=[Condition("v", at_most=1.0)], maximum_wait=0.1,
                                  if_blocked="stop")], "waiting for 'b' up to 10"),
                          ([Phase("a", {}, share=0.5), Phase("b", {"x": 1.0})], "no weight for x"),
                          ([Phase("a", {"x": 1.0, "y": 1.0})], "Unknown term in the weights of phase 'a' 'y'"),
                          ([Phase("a", {"x": 1.0}), Phase("b", {"x": 1.0})], "'a' has no length"),
                          ([Phase("a", {"x": 1.0}, share=0.1), Phase("a", {"x": 1.0})], "same name")])
def test_an_impossible_plan_is_refused_before_the_first_step(phases, message):
    with pytest.raises(KiloError) as error: PhasePlan(phases, 100, ["x"])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_freezing_everything_is_refused(scene):
    session = Session(scene)
    terms = [OpacityTarget(OpacityTargetConfig(), 40)]
    plan = lambda name: PhasePlan([Phase("a", {"opacity": 1.0}, frozen=[name])], 40, ["opacity"])
    with pytest.raises(KiloError, match="nothing would be trained"):
        apply_phases(plan("student"), terms, session.student)
    with pytest.raises(KiloError, match=r"Unknown name in frozen.*'studnt'"):
        apply_phases(plan("studnt"), terms, session.student)
    with pytest.raises(KiloError, match="made for the terms"): apply_phases(PhasePlan([], 40, ["features"]), terms)


def test_a_condition_on_an_unlogged_value_suggests_the_nearest_name(scene):
    wrong = Phase("both", BOTH.weights, gates=[Condition("feature_error", at_most=1.0)], maximum_wait=0.1,
                  if_blocked="stop", needs=["features"])
    with pytest.raises(KiloError, match="'feature_error': did you mean 'features_error'"):
        Session(scene, (COLOUR, ALONE, wrong)).run()


# ---- the alpha band

CALM = AlphaBandConfig(patience=5, decay=0.5)


def band_weights(alphas, config=CALM, band=None):
    """The band's weight at each step, where the object rays have these alphas."""
    band, weights = band or AlphaBand(config, 10_000), []
    for step, alpha in enumerate(alphas):
        weights.append(band(step, None, *batch_of([alpha, 0.0], [1.0, 0.0]),
                            None)["alpha_band_weight_effective"].item())
        band.after_step(step)
    return weights


def test_the_band_waits_for_misses_in_a_row():
    assert max(band_weights([0.2, 0.2, 0.2, 0.2, 1.0, 1.0] * 20,
                            AlphaBandConfig(minimum=0.5, patience=5, decay=0.0))) == 0
    weights = band_weights([0.2] * 20)
    assert weights[:5] == [0.0] * 5 and weights[5] == pytest.approx(0.002)


def test_the_weight_of_the_band_changes_slowly_and_stays_below_its_cap():
    generator = torch.Generator().manual_seed(0)
    trace = [0.2] * 120 + torch.rand(300, generator=generator).tolist() + [1.0] * 200
    weights = torch.tensor(band_weights(trace), dtype=torch.float64)
    change = weights.diff()
    assert change.max() <= 0.002 + 1e-12 and change.min() >= -0.001 - 1e-12 and weights.max() <= 0.12 + 1e-12
    assert weights[119] == pytest.approx(0.12) and weights[-1] == 0 and (change < -1e-4).any()


def test_the_band_includes_background_rays():
    band = AlphaBand(AlphaBandConfig(patience=2, decay=0.0), 100)
    for step in range(5):
        values = band(step, None, *batch_of([1.0, 0.3], [1.0, 0.0]), None)
        band.after_step(step)
    assert (
        values["alpha_band_weight_effective"] > 0
        and values["alpha_band_halo_quantile"] == pytest.approx(0.3)
        and values["alpha_band_leak_quantile"] == 0
    )


def test_a_batch_without_object_rays_does_not_change_the_state_of_the_band():
    band = AlphaBand(AlphaBandConfig(patience=2), 100)
    before = {name: value.clone() for name, value in band.state.items()}
    values = band(0, None, *batch_of([0.5], [0.0]), None)
    band.after_step(0)
    assert band.state == before and torch.isfinite(values["loss"])


def test_the_state_of_the_band_is_restored_from_a_checkpoint():
    trace = [0.2] * 30 + [1.0] * 30
    whole, first, second = band_weights(trace), AlphaBand(CALM, 10_000), AlphaBand(CALM, 10_000)
    begun = band_weights(trace[:25], band=first)
    second.load_state_dict(first.state_dict())
    assert begun + band_weights(trace[25:], band=second) == whole


@pytest.mark.incident(10)
def test_incident_10_contradictions_are_refused_with_both_settings():
    refusals = {
        lambda: check_alpha_settings(OpacityTargetConfig(end=0.95), AlphaBandConfig(minimum=0.5, maximum=0.9)): (
            "end = 0.95",
            "maximum = 0.9",
        ),
        lambda: check_alpha_settings(OpacityTargetConfig(weight=0.35), AlphaBandConfig()): (
            "weight = 0.35",
            "cap = 0.12",
        ),
        lambda: check_alpha_settings(OpacityTargetConfig(start=0.05, end=0.05, side="both"), None, 0.1): (
            "end = 0.05",
            "alpha_floor = 0.1",
        ),
        lambda: alpha_terms(OpacityTargetConfig(end=0.5, side="both"), AlphaBandConfig(minimum=0.9), 1000): (
            "end = 0.5",
            "minimum = 0.9",
        ),
        lambda: AlphaBandConfig(minimum=0.9, maximum=0.5): ("minimum = 0.9", "maximum = 0.5"),
        lambda: AlphaBandConfig(weight=0.2, cap=0.12): ("weight = 0.2", "cap = 0.12"),
        lambda: OpacityTargetConfig(warmup=0.8, ramp=0.3): ("warmup = 0.8", "ramp = 0.3"),
        lambda: AlphaBand(AlphaBandConfig(patience=500), 400): ("patience = 500", "steps = 400"),
        lambda: LoopConfig(ema_decay=0.99, swa_from=0.5): ("ema_decay = 0.99", "swa_from = 0.5"),
    }
    for refusal, names in refusals.items():
        with pytest.raises(KiloError) as error: refusal()
        assert all(name in str(error.value) for name in names) and "\n" not in str(error.value), error.value


@pytest.mark.incident(10)
def test_incident_10_the_logged_weight_is_the_one_in_effect(scene, tmp_path):
    """In every logged step the term's part of the loss is its logged weight times its logged penalty."""
    views, grid = scene
    student = make_student(grid, SHAPE, 0.05)
    loop = LoopConfig(30, 5e-3, warmup_steps=4, log_every_steps=1)
    distill(student, RayPool(views, grid, 0.05), DistillConfig(128, loop=loop), tmp_path,
            terms=alpha_terms(OpacityTargetConfig(), BAND, 30), quiet=True)
    log = {name: torch.tensor(values) for name, values in read_scalars(tmp_path).items()}
    assert len(log["step"]) == 30 and log["alpha_band_weight_effective"].max() > 0
    torch.testing.assert_close(log["alpha_band_term"], log["alpha_band_weight_effective"] * log["alpha_band_penalty"],
                               rtol=1e-4, atol=1e-9)
    gap = (log["opacity_target"] - log["opacity_measured"]).clamp(min=0)
    torch.testing.assert_close(log["opacity_term"], log["opacity_weight_effective"] * gap.square(), rtol=1e-3,
                               atol=1e-8)


# ---- SWA

def test_swa_is_the_mean_of_the_snapshots_also_over_a_resume(tmp_path):
    def session(folder, resume=False, stop_at=None, snapshots=None):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step_function(step, generator):
            if step == stop_at: raise KeyboardInterrupt
            return {"loss": (model(torch.randn(8, 3, generator=generator)) - 1).square().mean()}

        def keep(step, records):
            if snapshots is not None: snapshots.append(model.weight.detach().clone())

        config = LoopConfig(40, 0.1, warmup_steps=2, swa_from=0.75, log_every_steps=10)
        return model, train(step_function, optimizer, config, model=model, folder=folder, resume=resume,
                            after_step=keep, quiet=True)

    snapshots = []
    model, result = session(tmp_path / "whole", snapshots=snapshots)
    torch.testing.assert_close(result.averaged.average["weight"], torch.stack(snapshots[30:]).mean(0), rtol=0,
                               atol=1e-6)
    assert not torch.equal(result.averaged.average["weight"], model.weight) and result.averaged.taken["weight"] == 10
    for stop_at in (12, 35):
        with pytest.raises(KeyboardInterrupt): session(tmp_path / f"parts{stop_at}", stop_at=stop_at)
        _, again = session(tmp_path / f"parts{stop_at}", resume=True)
        assert torch.equal(again.averaged.average["weight"], result.averaged.average["weight"])
    reader = nn.Linear(3, 2)
    assert load_weights(final_path(tmp_path / "whole"),
                        reader) == "averaged weights (SWA of the last 10 steps) of step 40"
    assert torch.equal(reader.weight, result.averaged.average["weight"])
    assert load_weights(latest_path(tmp_path / "parts12"), reader).startswith("averaged")


def test_a_run_that_is_stopped_before_swa_begins_has_no_average(tmp_path):
    model = nn.Linear(2, 1)

    def step_function(step, generator):
        if step == 1: raise KeyboardInterrupt
        return {"loss": model(torch.ones(2)).square().sum()}

    with pytest.raises(KeyboardInterrupt):
        train(step_function, torch.optim.SGD(model.parameters(), lr=0.1),
              LoopConfig(40, 0.1, warmup_steps=0, swa_from=0.5), model=model, folder=tmp_path, quiet=True)
    assert load_weights(latest_path(tmp_path), model) == "raw weights of step 1 (its average begins after step 20)"
    with pytest.raises(KiloError, match="begins after step 20"):
        load_weights(latest_path(tmp_path), model, weights="averaged")


def test_the_student_gets_the_equal_average_but_not_of_its_space(scene, tmp_path):
    session = Session(scene, phases=())
    result = session.run(tmp_path)
    assert torch.equal(session.student.field.networks,
                       result.averaged.average["field.networks"]) and "occupied" not in result.averaged.average
    assert not torch.equal(session.student.field.networks,
                           read_checkpoint(final_path(tmp_path))["model"]["field.networks"])


# ---- the order of experiments

def leave_run(outputs, experiment, status="finished", **results):
    """A run of the experiment; runs of the same second are ordered by their names."""
    folder = outputs / experiment / f"{len(list(outputs.glob(f'{experiment}/*'))):03}"
    run = open_run(experiment, folder, data={"kind": "brickyard", "name": "brickyard"})
    run.finish(results)
    if status != "finished": mark_run(run.folder, status)


def test_the_policy_unlocks_by_measured_numbers_only(tmp_path):
    states = lambda: [status.state for status in read_policy(POLICY, tmp_path).statuses]
    assert states() == ["open", "locked", "locked", "locked"]
    leave_run(tmp_path, "single_view_overfit", psnr_srgb_white_db=45.0, status="failed")
    leave_run(tmp_path, "single_view_overfit", psnr_srgb_white_db=float("nan"))
    assert states()[0] == "open" and read_policy(POLICY, tmp_path).of("single_view_overfit").missing().endswith(
        "is not a finite number"
    )
    leave_run(tmp_path, "single_view_overfit", psnr_srgb_white_db=45.0)
    leave_run(tmp_path, "multi_view_response", test_psnr_srgb_white_db=25.0, test_lpips_vgg=0.25)
    assert (
        states() == ["passed", "open", "locked", "locked"] and "0.06 too high" in read_policy(POLICY, tmp_path).table()
    )
    leave_run(tmp_path, "multi_view_response", test_psnr_srgb_white_db=25.0, test_lpips_vgg=0.15)
    assert states() == ["passed", "passed", "open", "locked"]
    assert [s.state for s in read_policy(POLICY, tmp_path, data="blender:lego_400").statuses] == [
        "open",
        "locked",
        "locked",
        "locked",
    ]


def test_the_policy_warns_or_refuses_by_its_mode(tmp_path, capsys):
    assert require_unlocked("multi_view_features", POLICY, tmp_path, "off") and not capsys.readouterr().out
    assert not require_unlocked("multi_view_features", POLICY,
                                tmp_path) and "single_view_overfit has no finished run" in capsys.readouterr().out
    with pytest.raises(KiloError, match=r"multi_view_features' is locked on any data in .*: single_view_overfit has no "
                                        r"finished run, and 2 more stages are not passed. Run single_view_overfit"):
        require_unlocked("multi_view_features", POLICY, tmp_path, "enforce")
    assert require_unlocked(POLICY[0].experiment, POLICY, tmp_path, "enforce")
    with pytest.raises(KiloError, match="did you mean 'multi_view_features'"):
        require_unlocked("multi_view_feature", POLICY, tmp_path)


@pytest.mark.incident(9)
def test_incident_9_a_stage_without_gates_is_passed_by_finishing(tmp_path):
    policy = [Stage("a", "one", gates=[]), Stage("b", "two", [Gate("x", at_least=1.0)], after=["one"])]
    assert not require_unlocked("two", policy, tmp_path)
    leave_run(tmp_path, "one")
    assert require_unlocked("two", policy, tmp_path, "enforce")


def direction(loss, psnr=30.0, spikes=0.0):
    return {"colour_loss": loss, "psnr_srgb_foreground_db": psnr, "alpha_spike_share": spikes,
            "psnr_srgb_white_db": 30.0}


@pytest.mark.parametrize("results, adopted", [
    # the smallest, not the best
    ({0: direction(0.0100), 2: direction(0.0094), 4: direction(0.0050)}, 2),
    # 4% is not enough, 5% is
    ({0: direction(0.0100), 2: direction(0.0096), 4: direction(0.0095), 6: direction(0.0050)}, 4),
    # foreground PSNR counts as well
    ({0: direction(0.0100), 2: direction(0.0100, psnr=31.6), 4: direction(0.0100, psnr=33.0)}, 2),
    # not with more spikes; a point is noise
    ({0: direction(0.0100), 2: direction(0.0050, spikes=0.03), 4: direction(0.0050, spikes=0.01)}, 4),
    # none: the base stays
    ({0: direction(0.0100), 2: direction(0.0099), 4: direction(0.0120)}, 0),
    # in any order, from any base
    ({6: direction(0.0050), 2: direction(0.0100)}, 6),
])
def test_direction_frequencies_are_adopted_by_the_rule(results, adopted):
    decision = adopt_direction_frequencies(results)
    assert (
        decision.adopted == adopted
        and f"L = {adopted}" in decision.sentence
        and [row["L"] for row in decision.table] == sorted(results)
    )


def test_the_rule_refuses_what_was_not_measured():
    with pytest.raises(KiloError, match="at least two"): adopt_direction_frequencies({0: direction(0.01)})
    with pytest.raises(KiloError, match="L = 2 hold no number 'colour_loss'"):
        adopt_direction_frequencies({0: direction(0.01), 2: direction(float("nan"))})
    assert spike_share([0.05] * 9 + [0.09] + [0.05] * 9) == pytest.approx(0.1)
