"""The world model and the agent of Pin Pad as a user meets them: experiments by command, kills, resumption, files."""
import contextlib
import json
import os
import signal
import subprocess
import time

import numpy as np
import psutil
import pytest
import torch
from helpers import KILONB, run_here

from kilonb.core.errors import KiloError
from kilonb.dream.actor_critic import ActorCritic, ActorCriticConfig
from kilonb.dream.agent import AgentTraining, load_agent, train_agent
from kilonb.dream.collection import play_episodes
from kilonb.dream.readout import imagination_scores
from kilonb.dream.replay import Replay, replay_files
from kilonb.dream.training import WorldModelTraining
from kilonb.dream.world_model import WorldModel, WorldModelConfig, load_world_model
from kilonb.training.guards import TrainingStopped

TINY = WorldModelConfig("tiny", precision="float32", free_nats=0.0)
SMALL = ["-p", "size=tiny", "-p", "batch=4", "-p", "device=cpu", "-p", "precision=float32"]


def agent_config(steps=8, **changes):
    world = WorldModelTraining(steps=steps, batch=4, sequence=6, rewarded=.25, log_every_steps=2, model=TINY)
    return AgentTraining(**{**dict(world=world, policy=ActorCriticConfig(units=16, horizon=4), environments=4,
                                   length=60, prefill=1200, pretrain=2, train_ratio=2.0, starts=16, early_step=4),
                            **changes})


def trained(folder, config, resume=False, after=None):
    torch.manual_seed(0)
    model = WorldModel(TINY)
    agent = ActorCritic(model.rssm.outputs, 5, config.policy)
    original = Replay.sample
    calls = []

    def sample(self, *args, **options):
        calls.append(1)
        if after is not None and len(calls) > after: raise KeyboardInterrupt
        return original(self, *args, **options)
    Replay.sample = sample
    try: result = train_agent(model, agent, "three", config, folder, resume, quiet=True)
    except KeyboardInterrupt: result = None
    finally: Replay.sample = original
    return model, agent, result


def test_an_agent_that_was_stopped_and_resumed_is_the_one_that_was_not(tmp_path):
    config = agent_config()
    whole = trained(tmp_path / "whole", config)
    assert trained(tmp_path / "parts", config, after=6)[2] is None
    parts = trained(tmp_path / "parts", config, resume=True)
    assert parts[2].resumed_from == 5, "one sample centres the pictures, five are of steps"
    for one, two in zip(whole[:2], parts[:2]):
        assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    names = [[path.name for path in replay_files(tmp_path / run / "replay")] for run in ("whole", "parts")]
    assert names[0] == names[1]


def test_training_changes_every_weight_of_model_actor_and_critic(tmp_path, monkeypatch):
    torch.manual_seed(0)
    fresh = WorldModel(TINY)
    policy = ActorCritic(fresh.rssm.outputs, 5, ActorCriticConfig(units=16, horizon=4))
    with monkeypatch.context() as patch:        # heads that start at 0 pass no gradient on at the first steps
        patch.setattr(torch.nn.init, "zeros_", lambda weight: torch.nn.init.normal_(weight, std=.1))
        model, agent, result = trained(tmp_path, agent_config(steps=12))
    for before, after in ((fresh, model), (policy, agent)):
        same = [name for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True)
                if torch.equal(a, b)]
        assert not same
    assert result.records[-1]["environment_steps"] > result.records[0]["environment_steps"]


@pytest.mark.incident(12)
def test_an_agent_skips_steps_that_are_not_finite_and_stops_past_a_limit(tmp_path, monkeypatch):
    """A NaN reward in a batch, and a NaN return in imagination, which must stay neither in weights nor in the range."""
    from kilonb.dream import agent as module
    whole, imagine, calls = Replay.sample, module.imagine_rollout, []

    def sample(self, *args):
        batch = whole(self, *args)
        calls.append(1)
        if len(calls) in bad: batch["rewards"][0, 0] = torch.nan
        return batch

    def rollout(*args):
        own = imagine(*args)
        if len(calls) == 7: own.rewards.fill_(torch.nan)
        return own
    monkeypatch.setattr(Replay, "sample", sample), monkeypatch.setattr(module, "imagine_rollout", rollout)
    bad = {4}
    model, agent, result = trained(tmp_path / "few", agent_config(steps=12))
    assert result.records[-1].get("loss") and max(row.get("skipped_steps", 0) for row in result.records) == 2
    for own in (model, agent): assert all(value.isfinite().all() for value in own.state_dict().values())
    calls, bad = calls[:0], set(range(2, 100))
    with pytest.raises(TrainingStopped, match="not finite and were skipped"):
        trained(tmp_path / "many", agent_config(steps=40))


def test_an_early_checkpoint_is_there_before_the_end(tmp_path):
    trained(tmp_path, agent_config(), after=7)
    assert (tmp_path / "agent_early.pt").exists() and (tmp_path / "world_model_early.pt").exists()
    assert not (tmp_path / "agent.pt").exists()
    load_world_model(tmp_path / "world_model_early.pt")
    with pytest.raises(KiloError): load_agent(tmp_path)


def test_action_repeat_holds_an_action_and_counts_every_environment_step(tmp_path):
    config = agent_config(action_repeat=3)
    _, _, result = trained(tmp_path, config)
    assert result.records[0]["environment_steps"] >= 1200
    with pytest.raises(KiloError, match="action_repeat is 7"):
        trained(tmp_path / "seven", agent_config(action_repeat=7))


def test_prefill_and_pretraining_are_as_long_as_asked(tmp_path):
    _, _, result = trained(tmp_path, agent_config(steps=6, pretrain=6))
    assert result.records[-1]["environment_steps"] == 1200 and "actor" not in result.records[-1]
    with pytest.raises(KiloError, match="prefill is 10"): trained(tmp_path / "short", agent_config(prefill=10))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_compiled_or_half_precision_model_predicts_what_the_plain_one_does(precision):
    torch.manual_seed(0)
    model = WorldModel(WorldModelConfig("tiny", precision=precision))
    plain = WorldModel(TINY)
    plain.load_state_dict(model.state_dict())
    images = torch.randint(0, 256, (2, 3, 64, 64, 3), dtype=torch.uint8)
    actions, first = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.bool)
    one, two = (own.encoder(images) for own in (model, plain))
    with model.autocast(): one = model.encoder(images)
    assert torch.allclose(one.float(), two, atol=.03)
    states = model.observe(images, actions, first)
    assert states.logs.dtype == torch.float32 and model.decode(states).dtype == torch.float32


def test_a_model_that_repeats_the_last_frame_scores_as_the_baseline_beside_it():
    class Repeat:
        def observe(self, images, actions, is_first):
            self.last = images[:, -1].float() / 255
            return self

        def at(self, index): return self

        def imagine(self, state, actions):
            self.images = self.last[:, None].expand(-1, actions.shape[1], -1, -1, -1)
            return self
    from kilonb.dream.episodes import collect
    scores, curves = imagination_scores(Repeat(), collect("three", "scripted", 2, 200, seed=0, noise=.2))
    for name in ("psnr_db", "position_right", "sequence_right_all"): assert scores[name] == scores["repeat_" + name]
    assert 0 < scores["predictable"] < 1 and scores["windows"] == 12 and len(curves["psnr_db"]) == 15


def test_an_episode_shorter_than_a_window_or_a_sequence_is_named(tmp_path):
    from kilonb.dream.episodes import collect
    with pytest.raises(KiloError, match="has 21 frames; expected at least 31"):
        imagination_scores(None, collect("three", "uniform", 1, 20, seed=0))
    replay = Replay(tmp_path)
    replay.add(collect("three", "uniform", 1, 20, seed=0)[0])
    with pytest.raises(KiloError, match="fewer than a sequence of 64"): replay.sample(2, 64, np.random.default_rng(0))


def test_scores_of_an_agent_are_repeatable():
    torch.manual_seed(0)
    model = WorldModel(TINY)
    agent = ActorCritic(model.rssm.outputs, 5, ActorCriticConfig(units=16))
    torch.manual_seed(3); one = play_episodes(model, agent, "three", 3, 100, seed=5)
    torch.manual_seed(3); two = play_episodes(model, agent, "three", 3, 100, seed=5)
    assert (one == two).all()


def run(tmp_path, experiment, *options):
    return run_here("run", experiment, "--out", tmp_path / experiment, *options,
                    environment={"KILONB_OUTPUTS": str(tmp_path / "outputs")})


def test_the_world_model_experiment_runs_by_command(tmp_path):
    done = run(tmp_path, "pinpad_world_model", "--data", "pinpad_small", "-p", "steps=6", "-p", "sequence=6", "-p",
               "test_episodes=1", *SMALL)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "pinpad_world_model" / "results.json").read_text())["results"]
    assert results["worse_psnr_db"] > 5 and results["scripted_windows"] > 0
    assert load_world_model(tmp_path / "pinpad_world_model").config.size == "tiny"


def test_the_agent_experiment_survives_a_kill_and_goes_on(tmp_path):
    options = ["--data", "pinpad_small", "-p", "sequence=6", "-p", "prefill=2000", "-p", "pretrain=3", "-p",
               "episodes=2", "-p", "agent_training.length=100", "-p", "agent_training.environments=4", *SMALL]
    environment = {**os.environ, "KILONB_OUTPUTS": str(tmp_path / "outputs"), "OMP_NUM_THREADS": "1"}
    folder = tmp_path / "pinpad_agent"
    process = subprocess.Popen([*KILONB, "run", "pinpad_agent", "--out", str(folder), *options, "-p", "steps=60"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
                               start_new_session=True)
    deadline = time.monotonic() + 120
    while not (folder / "metrics.csv").exists() or not replay_files(folder / "replay"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(.2)
    kernel = json.loads((folder / "status.json").read_text())["process"]["pid"]    # of the notebook, in its own session
    for kill, number in ((os.killpg, process.pid), (os.kill, kernel)):
        with contextlib.suppress(ProcessLookupError): kill(number, signal.SIGKILL)
    process.wait()
    while psutil.pid_exists(kernel) and time.monotonic() < deadline: time.sleep(.05)
    assert Replay(folder / "replay").steps > 0, "every chunk that a killed run left can be read"
    done = run(tmp_path, "pinpad_agent", *options, "-p", "steps=60", "--resume")
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((folder / "results.json").read_text())["results"]
    assert results["steps"] == 60 and results["random_return"] >= 0 and "agent_return" in results
    load_agent(folder)


def test_a_float16_step_has_the_gradients_of_a_float32_one_without_scaling_of_the_loss():
    """The loss is a sum over pixels, so its gradients are far above the smallest number of float16."""
    from kilonb.dream.world_model import world_model_loss
    batch = {"images": torch.randint(0, 256, (16, 3, 64, 64, 3), dtype=torch.uint8), "rewards": torch.rand(16, 3),
             "actions": torch.zeros(16, 3, dtype=torch.long), "is_first": torch.zeros(16, 3, dtype=torch.bool),
             "is_terminal": torch.zeros(16, 3, dtype=torch.bool)}
    gradients = {}
    for precision in ("float32", "float16"):
        torch.manual_seed(0)
        model = WorldModel(WorldModelConfig("tiny", precision=precision, free_nats=0.0))
        model.rssm.sharpness = 0.0              # without sampled choices, which may differ
        world_model_loss(model, batch)[0].backward()
        gradients[precision] = [weight.grad for weight in model.parameters()]
    for one, two in zip(*gradients.values(), strict=True): assert (one - two).norm() <= .01 * one.norm()
