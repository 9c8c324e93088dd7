"""Variational temporal abstraction: training resumes exactly, precision does not make NaN, nothing leaks."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from kilonb.core.errors import KiloError
from kilonb.dream.components import fit_components
from kilonb.dream.concrete import binary_log_density, gumbel_noise, logistic_noise, sample_binary, sampled_kl
from kilonb.dream.episodes import collect
from kilonb.dream.vta import (CONDITIONS, VTA, VTAConfig, _abstractions, boundary_record, load_vta, save_vta, segment,
                              vta_loss)
from kilonb.dream.vta_training import VTATraining, make_vta, train_vta
from kilonb.training.guards import SkipGuard, TrainingStopped
from kilonb.training.loop import LoopConfig, train

DRAWS = 1_000_000


@pytest.fixture(scope="module")
def episodes(): return collect("three", "scripted", 3, length=60, seed=0, noise=.2)


@pytest.fixture(scope="module")
def tiny():
    return VTATraining(steps=8, batch=3, sequence=12, log_every_steps=1, fit_frames=60, explore=.25, place=.25,
                       model=VTAConfig(components=16, units=16, belief=8, hidden=8, abstraction=4, state=2,
                                       **CONDITIONS["rated"]))


def _batch(episodes, count=2, length=20):
    return {name: torch.from_numpy(np.stack([getattr(own, name)[:length] for own in episodes[:count]]))
            for name in ("images", "actions", "rewards", "is_first", "is_terminal")}


@pytest.mark.incident(12)
def test_half_precision_noise_fails_in_the_naive_form_and_not_in_ours():
    torch.manual_seed(0)
    naive = torch.rand(DRAWS).half().clamp(min=1e-8)
    assert not (-torch.log(-torch.log(naive))).isfinite().all(), "1e-8 is 0 in float16, so the bound does nothing"
    pair = -torch.log(-torch.log(torch.zeros(2, dtype=torch.float16)))
    assert torch.softmax(pair, -1).isnan().all(), "two infinite logits make NaN probabilities"
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        logits = torch.linspace(-40, 40, DRAWS).to(dtype)
        sample = sample_binary(logits, .43)
        for values in (sample.hard, sample.relaxed, sampled_kl(sample.relaxed, logits, -logits, .43),
                       binary_log_density(sample.relaxed, logits, 2.0), logistic_noise(logits.shape),
                       gumbel_noise(logits.shape)):
            assert values.dtype == torch.float32 and values.isfinite().all()


@pytest.mark.incident(12)
def test_a_reset_leaves_no_nan_of_the_episode_before():
    assert (0 * torch.tensor(torch.nan)).isnan(), "a mask that multiplies keeps it"
    model = VTA(VTAConfig(components=4, units=8, belief=4, hidden=4, abstraction=2))
    proposed, read = torch.randn(1, 6, 2), torch.ones(1, 6)
    proposed[:, 2] = torch.nan
    first = torch.zeros(1, 6, dtype=torch.bool)
    broken = _abstractions(model, proposed, read, first)
    assert all(part[:, 5].isnan().any() for part in broken[:1]), "without a reset the belief stays NaN"
    first[:, 3] = True
    assert all(part[:, 3:].isfinite().all() for part in _abstractions(model, proposed, read, first))


@pytest.mark.incident(12)
def test_gradients_that_are_not_finite_are_skipped_counted_and_stop_the_run_past_a_limit():
    def run(bad, limit):
        weight = torch.nn.Parameter(torch.ones(2))
        model = torch.nn.ParameterList([weight])

        def step(number, generator): return {"loss": weight.square().sum() * (torch.nan if number in bad else 1.0)}
        result = train(step, torch.optim.SGD([weight], .1), LoopConfig(6, .1, 0, log_every_steps=1), model=model,
                       guards=[SkipGuard(limit)], quiet=True)
        return weight, result
    weight, result = run({1, 3}, 2)
    assert weight.isfinite().all() and result.records[3]["skipped_steps"] == 2 and "loss" in result.records[-1]
    with pytest.raises(TrainingStopped, match="3 steps were not finite"): run({1, 3, 4}, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_under_autocast_are_finite_float32(episodes, tiny, dtype):
    model = make_vta(episodes, tiny)
    with torch.autocast("cpu", dtype=dtype): loss, _, found = vta_loss(model, _batch(episodes))
    assert loss.dtype == found.prior_logits.dtype == found.boundaries.relaxed.dtype == torch.float32
    loss.backward()
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", sorted(CONDITIONS))
@pytest.mark.parametrize("estimator", ["local", "straight_through"])
def test_every_parameter_gets_a_gradient(episodes, tiny, name, estimator):
    torch.manual_seed(0)
    config = replace(tiny.model, start_rate=.4, estimator=estimator, **CONDITIONS[name])
    model = make_vta(episodes, replace(tiny, model=config))
    for head in (model.reward, model.goes_on): torch.nn.init.normal_(head.out.weight)
    loss, _, _ = vta_loss(model, _batch(episodes))
    loss.backward()
    dead = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not dead


def test_a_batch_element_does_not_influence_another(episodes, tiny):
    model = make_vta(episodes, tiny)
    batch = _batch(episodes)
    frames = model.encoder(batch["images"])
    changed = frames.clone()
    changed[1] = torch.randn_like(changed[1])
    with torch.no_grad():
        one, two = (segment(model, x, batch["actions"], batch["is_first"]) for x in (frames, changed))
    assert torch.allclose(one.states.features[0], two.states.features[0], atol=1e-6)
    assert not torch.allclose(one.states.features[1], two.states.features[1])


def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(episodes, tiny, tmp_path):
    whole = make_vta(episodes, tiny)
    records = train_vta(whole, episodes, tiny, tmp_path / "whole", quiet=True).records
    halved = make_vta(episodes, tiny)
    calls = iter(range(100))

    class Stop:
        def check(self, record, interval):
            if next(calls) == 4: raise KeyboardInterrupt
    from kilonb.dream.vta_training import EncodedEpisodes, make_vta_step
    data = EncodedEpisodes(halved, episodes, tiny.sequence)
    inner = make_vta_step(halved, data, tiny)

    def step(number, generator):
        if number == 5 and not (tmp_path / "resumed").exists():
            (tmp_path / "resumed").touch()
            raise KeyboardInterrupt
        return inner(number, generator)
    optimizer = torch.optim.Adam(halved.parameters(), tiny.learning_rate, amsgrad=True)
    settings = {"training": repr(replace(tiny, time_limit_s=0.0))}
    with pytest.raises(KeyboardInterrupt):
        train(step, optimizer, tiny.loop(), model=halved, folder=tmp_path / "half", quiet=True, settings=settings,
              guards=[SkipGuard(tiny.skip_limit)])
    fresh = make_vta(episodes, tiny)
    again = train_vta(fresh, episodes, tiny, tmp_path / "half", resume=True, quiet=True)
    assert again.resumed_from == 5 and len(again.records) == len(records) == 8
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), fresh.state_dict().values()))


def test_forced_boundaries_are_flagged_and_the_probability_is_that_before_forcing(episodes):
    model = VTA(VTAConfig(components=16, units=16, **{**CONDITIONS["forced"], "max_segment": 7}))
    fit_components(model.components, torch.from_numpy(episodes[0].images))
    record = boundary_record(model, episodes[0])
    assert record.fired.sum() >= 8 and (record.fired == record.forced).all() and record.probability.max() < .5
    free = VTA(replace(model.config, force_scale=0.0))
    free.load_state_dict(model.state_dict())
    other = boundary_record(free, episodes[0])
    assert other.fired.sum() == 1 and np.allclose(other.probability, record.probability, atol=1e-6)


def test_episodes_shorter_than_a_sequence_are_named(episodes, tiny):
    with pytest.raises(KiloError, match="No episode has 99 frames"):
        train_vta(make_vta(episodes, tiny), episodes, replace(tiny, sequence=99), quiet=True)


def test_a_state_of_places_trains_imagines_and_reloads(episodes, tiny, tmp_path):
    config = replace(tiny, model=replace(tiny.model, state_kind="place", decoder=16))
    model = make_vta(episodes, config)
    for head in (model.reward, model.goes_on): torch.nn.init.normal_(head.out.weight)
    loss, _, found = vta_loss(model, _batch(episodes))
    loss.backward()
    dead = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert set(dead) <= {"state_posterior.score.2.bias"}, "only the softmax over places does not depend on it"
    assert (found.states.state.sum(-1) - 1).abs().max() < 1e-5 and found.states.state.shape[-1] == 256
    train_vta(model, episodes, config, quiet=True)
    again = load_vta(save_vta(tmp_path / "vta.pt", model))
    records = [boundary_record(own, episodes[0]) for own in (model, again)]
    assert np.array_equal(records[0].probability, records[1].probability)
    start = again.observe(*(_batch(episodes)[name] for name in ("images", "actions", "is_first"))).at((slice(None), -1))
    imagined = again.imagine(start, torch.ones(2, 5, dtype=torch.int64), sample=True)
    assert set(imagined.states.state.unique().tolist()) == {0, 1} and imagined.images.isfinite().all()


def test_probabilities_near_one_keep_their_rank(episodes, tiny):
    model = make_vta(episodes, tiny)
    torch.nn.init.constant_(model.boundary_posterior.out.bias, 25.0)
    probability = boundary_record(model, episodes[0]).probability
    assert probability.dtype == np.float64 and probability.min() > 1 - 1e-9
    assert len(np.unique(probability)) > len(np.unique(probability.astype(np.float32)))
