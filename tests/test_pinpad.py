"""Pin Pad: rules against a plain reference, drawing, vectors, policies, recorded episodes and their command line."""
import subprocess
import warnings
from collections import deque

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from helpers import KILONB, run_here

from kilonb.core.errors import KiloError
from kilonb.data.references import resolve_data
from kilonb.dream import pinpad_rules as rules
from kilonb.dream.episodes import (
    COUNTS,
    collect,
    make_pinpad,
    open_episode,
    read_episode,
    read_recordings,
    write_episode,
)
from kilonb.dream.pinpad import PINPAD_IDS, PinPad, PinPadVector
from kilonb.dream.pinpad_rules import EVENTS, LAYOUTS, PAD_COLOURS
from kilonb.dream.policies import (
    Scripted,
    Sticky,
    attainable_return,
    measure_returns,
    optimal_return,
    standard_error,
    steps_to_reward,
    uniform,
)
from kilonb.runs.records import read_run

MOVES = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))


class Reference:
    """The published rules in plain Python. The cell after a respawn is given, since generators differ.

    target: the sequence that is rewarded; None: 1..n.
    """

    def __init__(self, layout, position, target=None):
        rows = LAYOUTS[layout]
        self.pads = max(int(char) for row in rows for char in row if char != ".")
        self.cells = {(x + 1, y + 1): char for y, row in enumerate(rows) for x, char in enumerate(row)}
        self.target = tuple(map(str, range(1, self.pads + 1))) if target is None else target
        self.sequence, self.player, self.countdown = deque(maxlen=self.pads), position, 0

    def step(self, action, spawn=None):
        if self.countdown:
            self.countdown -= 1
            if self.countdown == 0: self.player, _ = spawn, self.sequence.clear()
        x, y = (a + b for a, b in zip(self.player, MOVES[action]))
        tile = self.cells.get((x, y), "#")
        if tile != "#": self.player = x, y
        if tile not in "#." and (not self.sequence or self.sequence[-1] != tile): self.sequence.append(tile)
        rewarded = tuple(self.sequence) == self.target and not self.countdown
        if rewarded: self.countdown = 10
        return 10.0 if rewarded else 0.0

    def image(self):
        """[64, 64, 3] uint8, drawn cell by cell."""
        grid = np.full((16, 16, 3), 192, np.uint8)
        current = self.cells[self.player]
        for cell, char in self.cells.items():
            grid[cell] = (223, 255, 223) if self.countdown else 255
            if char != ".":
                colour = PAD_COLOURS[int(char) - 1].astype(float)
                grid[cell] = colour if char == current else (10 * colour + 90 * 255) / 100
        grid[self.player] = 0
        for i, char in enumerate(self.sequence): grid[2 * i + 1, 14] = PAD_COLOURS[int(char) - 1]
        return grid.repeat(4, 0).repeat(4, 1).transpose(1, 0, 2)


def spawn_of(env, action):
    """The cell on which the respawn of this step put the player: where the generator says, before the move."""
    state = env._state.copy()
    rules._random_cell(state, env._spawns)
    return int(state[rules.X]), int(state[rules.Y])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_rewards_events_and_images_are_those_of_the_published_rules(layout):
    """Half scripted and half random steps, so that rewards and respawns occur in every layout."""
    env, vector, rng = PinPad(layout, length=10_000), PinPadVector(layout, 1, length=10_000), np.random.default_rng(3)
    image, info = env.reset(seed=1)
    assert (vector.reset(seed=1)[0] == image).all()
    reference, scripted, count, pad = Reference(layout, info["position"]), Scripted(layout, .1), 0, info["pad"]
    for _ in range(1500):
        action = int(scripted(vector.states, rng)[0])
        spawn = spawn_of(env, action) if info["countdown"] == 1 else None
        before = tuple(reference.sequence)
        wanted = reference.step(action, spawn)
        image, reward, terminated, _, info = env.step(action)
        vector.step(np.array([action]))
        assert reward == wanted and not terminated and info["position"] == reference.player
        assert info["sequence"] == tuple(map(int, reference.sequence)) and info["countdown"] == reference.countdown
        assert (image == reference.image()).all() and (image == vector.images[0]).all()
        assert info["respawn"] == (spawn is not None) and info["reward"] == (wanted > 0)
        changed = tuple(reference.sequence) != (() if spawn else before)
        assert info["pad_change"] == changed and info["pad_entry"] == (info["pad"] not in (0, pad))
        pad, count = info["pad"], count + (wanted > 0)
    assert count >= 5, "a scripted policy with 10% random actions earns rewards"


@pytest.mark.incident(11)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_incident_11_a_scripted_policy_earns_reward_and_the_old_rule_gives_none(layout):
    """The environment of the notes compared the sequence with an empty list: the same steps earn nothing there."""
    returns = measure_returns(layout, Scripted(layout), 4, 500)
    assert (returns > 0).all()
    episode = collect(layout, "scripted", 1, 300, seed=5)[0]
    ours, old = (Reference(layout, tuple(map(int, episode.positions[0])), target) for target in (None, []))
    first = int(np.flatnonzero(episode.events["reward"])[0])
    earned = [(ours.step(action), old.step(action)) for action in episode.actions[1:first + 1].tolist()]
    assert earned[-1] == (10.0, 0.0) and sum(new for new, _ in earned) == 10.0
    assert all(lost == 0 for _, lost in earned) and "".join(old.sequence) == "".join(ours.sequence)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_scripted_policy_reaches_the_computed_return(layout):
    """The expectation is computed from the shortest paths, not from episodes; the standard error is that of the mean
    over 20 episodes, and the bound by knowing the cell after a respawn holds for the mean."""
    returns = measure_returns(layout, Scripted(layout), 20, 2000, seed=1)
    expected, bound = attainable_return(layout, 2000), optimal_return(layout, 2000)
    assert abs(returns.mean() - expected) < max(4 * standard_error(returns), .01 * expected)
    assert .95 * bound < returns.mean() and expected < bound


def test_the_optimum_of_three_is_the_one_of_its_mean_path():
    assert abs(optimal_return("three", 2000) - 590.7) < .1
    assert measure_returns("three", uniform, 20, 2000).mean() < 30 > measure_returns("three", Sticky(), 20, 2000).mean()


def searched_steps(layout, start):
    """Steps to the first reward by breadth-first search over (cell, sequence) with the plain rules."""
    reference, level, seen, steps = Reference(layout, start), {(start, ())}, set(), 0
    while level:
        steps, following = steps + 1, set()
        for player, sequence in level:
            for action in range(5):
                reference.player, reference.sequence, reference.countdown = player, deque(sequence, reference.pads), 0
                if reference.step(action): return steps
                following.add((reference.player, tuple(reference.sequence)))
        seen |= level
        level = following - seen
    return float("inf")


@pytest.mark.parametrize("layout, starts", [
    ("three", [(1, 1), (14, 12), (7, 6), (12, 3), (2, 10), (8, 12), (5, 1)]), ("four", [(14, 12), (7, 6)])])
def test_shortest_paths_are_those_of_a_breadth_first_search_over_the_plain_rules(layout, starts):
    for start in starts: assert searched_steps(layout, start) == steps_to_reward(layout)[(*start, 0)], start


@pytest.mark.parametrize("name", PINPAD_IDS)
def test_gymnasium_s_checker_accepts_every_environment(name):
    """With warnings as errors, so that a doubtful space or a missing seed is one too."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make(name, length=40, render_mode="rgb_array").unwrapped)


def test_gymnasium_finds_the_environments_by_their_module():
    code = ("import gymnasium; e = gymnasium.make('kilonb.dream.pinpad:kilonb/PinPad-six-v0'); "
            "print(e.reset(seed=0)[0].shape, e.unwrapped.layout)")
    done = subprocess.run([KILONB[0], "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(64, 64, 3) six"


@pytest.mark.parametrize("layout", ["three", "eight"])
def test_a_vector_is_its_single_environments_frame_by_frame_with_restarts(layout):
    count, length, rng = 5, 90, np.random.default_rng(0)
    vector, singles = PinPadVector(layout, count, length), [PinPad(layout, length) for _ in range(count)]
    images, scripted = vector.reset(seed=7).copy(), Scripted(layout, .3)
    infos = [env.reset(seed=7 + i) for i, env in enumerate(singles)]
    assert all((images[i] == image).all() for i, (image, _) in enumerate(infos))
    last, firsts = np.zeros(count, bool), 0
    for _ in range(1000):
        actions = scripted(vector.states, rng)
        if last.all(): results = [(*env.reset(), 0.0) for env in singles]
        else: results = [(o[0], o[4], o[1]) for o in (env.step(int(a)) for env, a in zip(singles, actions))]
        images, rewards, last, info = vector.step(actions)
        firsts += int(info["is_first"].sum())
        for i, (image, own, reward) in enumerate(results):
            assert (images[i] == image).all() and rewards[i] == reward
            assert tuple(info["position"][i]) == own["position"] and info["countdown"][i] == own["countdown"]
            for name in (*EVENTS, "is_first", "is_last", "pad"): assert info[name][i] == own[name], name
    assert firsts == count * (1000 // (length + 1))


def test_observations_are_kept_and_seeds_repeat():
    env = PinPad("four")
    first, _ = env.reset(seed=3)
    kept = first.copy()
    for action in (1, 2, 3, 4): env.step(action)
    assert (first == kept).all(), "a returned image does not change later"
    assert (env.reset(seed=3)[0] == kept).all()
    others = {env.reset()[1]["position"] for _ in range(30)}
    assert len(others) > 10, "without a seed the generator goes on"


@pytest.mark.parametrize("call, said", [
    (lambda: PinPad("tree"), "three"), (lambda: gymnasium.make(PINPAD_IDS[0], length=0), "length"),
    (lambda: PinPadVector("three", 0), "count"), (lambda: PinPad("three").step(0), "reset"),
    (lambda: collect("three", "optimal", 1), "scripted"), (lambda: Scripted("three", 2), "noise"),
])
def test_bad_input_is_one_sentence_that_names_it(call, said):
    with pytest.raises(KiloError, match=said) as caught: call()
    assert "\n" not in str(caught.value)


def test_unknown_actions_are_named_and_change_nothing():
    env = PinPad("three")
    info = env.reset(seed=0)[1]
    for action in (5, -1, 2.5, "left", None):
        with pytest.raises(KiloError, match="0 to 4"): env.step(action)
    assert env.step(0)[4]["position"] == info["position"]


def test_an_episode_survives_the_disk_and_a_damaged_file_is_refused(tmp_path):
    episode = collect("eight", "scripted", 1, 120, seed=4, noise=.2)[0]
    path = tmp_path / "a.episode"
    write_episode(path, episode)
    back, lazy = read_episode(path), open_episode(path)
    for name in ("images", "actions", "rewards", "is_first", "is_last", "positions", "sequences"):
        assert (getattr(back, name) == getattr(episode, name)).all()
    assert all((back.events[name] == episode.events[name]).all() for name in EVENTS)
    for first, count in ((0, 1), (17, 30), (120, 1), (5, 0)):
        assert (lazy.frames(first, count) == episode.images[first:first + count]).all()
    whole = path.read_bytes()
    for cut in range(0, len(whole), len(whole) // 37):
        path.write_bytes(whole[:cut])
        with pytest.raises(KiloError, match="cannot be read"): read_episode(path)
    rng = np.random.default_rng(0)
    for at in rng.integers(16, len(whole), 40):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.integers(8)]) + whole[at + 1:])
        try: changed = read_episode(path)
        except KiloError: continue
        assert (changed.images == episode.images).all() and (changed.actions == episode.actions).all()


def test_recordings_have_the_counts_of_their_datasets_and_different_seeds(tmp_path):
    make_pinpad(tmp_path / "r", "three", length=30, share=.1)
    for split, place in (("train", 0), ("test", 1)):
        for policy, counts in COUNTS.items():
            found = read_recordings(tmp_path / "r", split, policy)
            assert len(found) == max(1, round(.1 * counts[place])) and {len(one) for one in found} == {31}
    starts = [one.images for split in ("train", "test") for one in read_recordings(tmp_path / "r", split)]
    assert len({image.tobytes() for image in starts}) == len(starts), "no two episodes are the same"
    (tmp_path / "r/test/uniform-000.episode").write_bytes(b"KILOEP01")
    with pytest.raises(KiloError, match=r"uniform-000"): read_recordings(tmp_path / "r", "test")


def test_the_datasets_of_pin_pad_on_the_command_line():
    """The small dataset is made once, verified, listed, and resolved by its name and by kind and path."""
    done = subprocess.run([*KILONB, "data", "make", "pinpad_small"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    verified = subprocess.run([*KILONB, "data", "verify", "pinpad_small"], capture_output=True, text=True)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    reference = resolve_data("pinpad_small")
    assert reference.kind == "episodes" and len(read_recordings(reference.path, "test")) == 9
    assert resolve_data(f"episodes:{reference.path}").sha256 == reference.sha256
    listed = subprocess.run([*KILONB, "data", "list"], capture_output=True, text=True, check=True).stdout
    assert all(f"pinpad_{layout}" in listed for layout in LAYOUTS)


def test_the_experiment_reports_optimum_and_policies(tmp_path):
    """One layout and few, short episodes."""
    done = run_here("run", "pinpad_policies", "--out", tmp_path / "run", "-p", 'layouts=["three"]', "-p", "episodes=4",
                    "-p", "length=400")
    assert done.returncode == 0, done.stderr
    results = read_run(tmp_path / "run").results
    assert results["scripted_return_three"] > 90 > results["uniform_return_three"]
    assert results["optimal_return_three"] == pytest.approx(118.1, abs=.1)
