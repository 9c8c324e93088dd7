"""Events and boundaries: statistics that can say something, thresholds, undefined scores, peers on real episodes."""
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from kilonb.core.errors import KiloError
from kilonb.dream.boundaries import (BoundaryRecord, BoundaryScoring, choose_threshold, frame_deltas,
                                     pixel_events, score_boundaries, semantic_events)
from kilonb.dream.boundary_figures import boundary_grid, boundary_timeline, f1_bars
from kilonb.dream.change_points import cell_features, fit_change_points, fit_deltas
from kilonb.dream.episodes import collect
from kilonb.metrics.events import (EventEpisode, chance_counts, event_counts, false_positive_rate, match_events,
                                   paired_difference, periodic_scores, permutation_p, score_events, valid_frames)


@pytest.fixture(scope="module")
def episodes():
    return collect("three", "scripted", 16, 200, seed=0, noise=.2)


def low_rate_record(episode, seed: int) -> BoundaryRecord:
    """A posterior that ranks most events first and never exceeds .5."""
    rng, events = np.random.default_rng(seed), semantic_events(episode)
    probability = .25 * (events & (rng.random(len(events)) < .95)) + .15 * rng.random(len(events))
    return BoundaryRecord(probability, probability > .5, np.zeros(len(events), bool), probability)


@pytest.fixture(scope="module")
def records(episodes):
    return [low_rate_record(own, seed) for seed, own in enumerate(episodes)]


def evaluate(records, episodes, **settings):
    """Scores of the second half, thresholds from the first."""
    half = len(episodes) // 2
    return score_boundaries(records[half:], episodes[half:], (records[:half], episodes[:half]),
                            BoundaryScoring(**settings)).results()


@pytest.mark.incident(13)
def test_incident_13_a_p_value_is_not_bounded_by_too_few_shifts():
    """With 50 permutations a perfect detector has p = .0196, which is also what chance gives once in 51 times."""
    rng = np.random.default_rng(0)
    perfect = [EventEpisode(own, own) for own in (rng.random(300) < .05 for _ in range(20))]
    matched = sum(event_counts(own, 2)[0] for own in perfect)
    assert round(permutation_p(matched, chance_counts(perfect, count=50)), 4) == .0196
    scores = score_events(perfect)
    assert scores.shifts >= 999 and scores.p_circular == pytest.approx(.001) and scores.p_circular <= .005
    with pytest.raises(KiloError, match="shifts is 50; expected 999 or more"): score_events(perfect, shifts=50)
    with pytest.raises(KiloError, match="shifts is 50"): BoundaryScoring(shifts=50).validate()


@pytest.mark.incident(13)
def test_incident_13_an_argmax_hides_a_low_rate_posterior_and_the_threshold_is_reported(episodes, records):
    results = evaluate(records, episodes)
    assert results["half_boundary_ratio"] == 0 and results["half_f1_semantic"] is None, "undefined, not 0 or 1"
    assert "half (semantic and pixel): no boundary in any episode" in results["undefined"]
    assert results["threshold_rule"] == "rate" and 0 < results["threshold"] < .5
    valid = [valid_frames(own.is_first) for own in episodes]
    chosen = choose_threshold("rate", records, episodes)
    fired, events = (np.concatenate([a[use] for a, use in zip(own, valid)]).mean() for own in
                     ([r.above(chosen) for r in records], [semantic_events(e) for e in episodes]))
    assert fired == pytest.approx(events, abs=1.5 / sum(use.sum() for use in valid)), "it fires at the true rate"
    assert results["f1_semantic"] > .8 and results["p_circular"] <= .005
    assert results["f1_semantic_low"] > results["periodic_f1_semantic_high"]


def test_the_circular_test_keeps_its_level_on_bursts_and_independent_positions_do_not():
    settings = dict(trials=400, shifts=99, episodes=12, length=300)
    circular = false_positive_rate(**settings)
    assert .015 < circular < .075, f"{circular:.1%} of 400 at 5%: two standard errors are 2.2%"
    assert .015 < false_positive_rate(**settings, statistic="near") < .075
    assert false_positive_rate(**settings, statistic="near", positions="independent") > .09


def test_matching_is_one_to_one_so_a_burst_around_one_event_counts_once():
    predicted, true = np.zeros((2, 60), bool)
    predicted[28:33], true[30] = True, True
    counts = dict(zip(("matched", "predicted", "true", "near"), event_counts(EventEpisode(predicted, true), 2)))
    assert counts == {"matched": 1, "predicted": 5, "true": 1, "near": 5}
    assert match_events(predicted, true, 2).shape == (1, 2)


def test_frames_that_are_not_valid_change_no_score():
    rng = np.random.default_rng(1)
    data = [EventEpisode(rng.random(90) < .1, rng.random(90) < .1) for _ in range(6)]
    padded = [EventEpisode(*(np.pad(a, (7, 0)) for a in (own.predicted, own.true)), np.arange(97) >= 7)
              for own in data]
    assert score_events(data).results() == score_events(padded).results()


def test_a_perfect_detector_scores_one_and_its_difference_to_a_periodic_one_is_certain(episodes):
    data = [EventEpisode(semantic_events(own), semantic_events(own), valid_frames(own.is_first)) for own in episodes]
    scores, periodic = score_events(data), periodic_scores(data)
    assert scores.values["precision"] == scores.values["recall"] == scores.values["f1"] == 1
    difference = paired_difference(scores, periodic)
    assert difference["low"] > .3 and difference["share_not_above"] == 0
    assert .9 < periodic.values["lift"] < 1.1


def test_events_come_from_the_environment_and_pixel_events_are_strictly_above_the_percentile(episodes):
    found = pixel_events(episodes)
    deltas = np.concatenate([frame_deltas(own.images)[1:] for own in episodes])
    assert found.threshold == np.percentile(deltas, 90) and found.count == (deltas > found.threshold).sum()
    assert found.count_or_equal > found.count, "frame differences of Pin Pad take few values"
    blank = [replace(own, images=np.zeros_like(own.images)) for own in episodes]
    assert all((semantic_events(a) == semantic_events(b)).all() for a, b in zip(episodes, blank))
    assert pixel_events(blank).count == 0


def test_no_boundary_all_boundaries_and_one_episode_are_said_in_words(episodes, records):
    never = [replace(own, probability=0 * own.probability) for own in records]
    results = evaluate(never, episodes)
    assert results["f1_semantic"] is results["precision_semantic"] is results["p_circular"] is results["lift"] is None
    assert results["undefined"].startswith("model (semantic and pixel), ")
    assert "no boundary in any episode" in results["undefined"]
    assert results["periodic_f1_semantic"] is None and results["forced_share"] is None
    always = [replace(own, probability=.6 + 0 * own.probability, fired=own.fired | True) for own in records]
    results = evaluate(always, episodes, rule="half")
    assert results["boundary_ratio"] == 1 and results["lift"] == 1 and results["p_circular"] == 1
    assert "every valid frame is a boundary" in results["undefined"]
    one = score_boundaries(records[8:9], episodes[8:9], (records[:8], episodes[:8]))
    assert one.results()["f1_semantic"] > .5 and one.results()["f1_semantic_low"] is None
    assert "one episode: no confidence interval" in one.results()["undefined"]
    assert "undefined" not in one.table().splitlines()[2] and f1_bars(one) is not None


def test_results_are_flat_and_can_be_written_as_json(episodes, records):
    results = evaluate(records, episodes)
    assert json.loads(json.dumps(results)) == results
    assert not [name for name, value in results.items() if isinstance(value, float) and math.isnan(value)]
    expected = ("precision_semantic", "recall_semantic", "f1_semantic", "f1_semantic_low", "f1_semantic_high",
                "p_circular", "lift", "lift_low", "lift_high", "auc", "average_precision", "f1_pixel",
                "p_circular_pixel", "forced_share", "boundary_ratio", "periodic_f1_semantic_low",
                "forced_length_f1_semantic_high", "f1_semantic_over_periodic_low", "threshold", "episodes_scored")
    assert not [name for name in expected if name not in results]


def test_change_points_are_a_peer_whose_settings_come_from_other_episodes(episodes):
    true, valid = [semantic_events(own) for own in episodes], [valid_frames(own.is_first) for own in episodes]
    features, deltas = [cell_features(own.images) for own in episodes], [frame_deltas(own.images) for own in episodes]
    detector, simple = fit_change_points(features[:6], true[:6], valid[:6]), fit_deltas(deltas[:6], true[:6], valid[:6])
    others = {"change_point": [detector(own) for own in features[8:]], "delta": [simple(own) for own in deltas[8:]]}
    records = [low_rate_record(own, seed) for seed, own in enumerate(episodes)]
    scores = score_boundaries(records[8:], episodes[8:], (records[:8], episodes[:8]), others=others)
    results = scores.results()
    assert results["change_point_f1_semantic"] > results["periodic_f1_semantic_high"]
    assert results["delta_f1_semantic"] > .8 and {"change_point", "delta"} <= set(scores.detectors)


def test_forced_boundaries_are_not_scored_as_the_posteriors_own(episodes, records):
    forced = [replace(own, fired=np.arange(len(own)) % 30 == 0, forced=np.arange(len(own)) % 30 == 0)
              for own in records]
    ours, plain = evaluate(forced, episodes), evaluate(records, episodes)
    assert ours["forced_share"] == 1 and ours["f1_semantic"] == plain["f1_semantic"]


def test_bad_input_is_one_sentence_that_names_it(episodes, records):
    chosen = (records[:8], episodes[:8])
    for arguments, message in (((records[:3], episodes[8:], chosen), "3 records and 8 episodes"),
                               ((records[8:], episodes[8:], (records, episodes)), "scored and used to choose"),
                               (([], [], chosen), "0 records and 0 episodes"),
                               (([records[8]], [episodes[8][:100]], chosen), "Record 0 has 201 frames")):
        with pytest.raises(KiloError, match=message): score_boundaries(*arguments)
    with pytest.raises(KiloError, match="No boundary fired"): boundary_grid(episodes[0], records[0].above(.9))
    with pytest.raises(KiloError, match="expected equal"): boundary_timeline(records[0], episodes[0][:50])
    quiet = [replace(own, events={name: 0 * marks for name, marks in own.events.items()}) for own in episodes[:8]]
    with pytest.raises(KiloError, match="have no event"): choose_threshold("rate", records[:8], quiet)
