"""The explorer of Pin Pad episodes: imagination against the rules, the widget's state, and the offline page."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from jupyter_driver import needs_chromium, open_browser

from kilonb.core.errors import KiloError
from kilonb.dream.boundaries import BoundaryRecord
from kilonb.dream.episodes import collect
from kilonb.dream.explorer import EpisodeExplorer, Imaginer, open_imaginer, timeline_picture, write_episode_page
from kilonb.dream.imagination import LastFrameModel, action_sequences, continue_by_rules, imagine_sequences
from kilonb.dream.pinpad_rules import ACTIONS
from kilonb.dream.world_model import WorldModel, WorldModelConfig, save_world_model


class State:
    """States of the stand-in: the filtered frames and how often each action led to them."""

    def __init__(self, images, counts): self.images, self.counts = images, counts

    def at(self, index): return State(self.images[index], self.counts[index])


class CountingModel:
    """A stand-in with the output of a VTA: its imagined frames show the number of the action, its state what it was
    given."""

    def observe(self, images, actions, is_first):
        assert images.dtype == torch.uint8 and is_first[:, 0].all() and not is_first[:, 1:].any()
        counts = torch.nn.functional.one_hot(actions, 5).cumsum(1)
        return SimpleNamespace(states=State(images.float() / 255, counts), boundaries=None)

    def imagine(self, state, actions):
        shade = (actions.float() / 4)[..., None, None, None].expand(-1, -1, 64, 64, 3)
        return SimpleNamespace(images=shade, rewards=state.counts.sum(-1)[:, None] + 0.0 * actions)


@pytest.fixture(scope="module")
def episodes(): return collect("four", "scripted", 2, 160, seed=1, noise=.2)


@pytest.fixture(scope="module")
def records(episodes):
    return [BoundaryRecord(np.where(one.events["pad_change"], .9, .1), one.events["pad_change"],
                           np.arange(len(one)) % 30 == 29, np.full(len(one), .2)) for one in episodes]


def test_imagination_starts_at_the_frame_and_follows_the_given_actions(episodes):
    """The state is filtered from the frames up to the chosen one and no later; each sequence has its own actions."""
    actions = np.array([[0, 1, 2], [4, 4, 4]])
    result = imagine_sequences(CountingModel(), episodes[0], 37, actions, context=20)
    assert (result.images[:, :, 0, 0, 0] == np.round(actions / 4 * 255)).all()
    assert (result.rewards == 20).all(), "20 frames were filtered"
    assert (imagine_sequences(CountingModel(), episodes[0], 5, actions, context=20).rewards == 6).all()
    last = imagine_sequences(LastFrameModel(), episodes[0], 37, actions).images
    assert (last == episodes[0].images[37]).all(), "the last filtered frame is the chosen one"


def test_the_rules_continue_a_recorded_frame_as_the_recording_goes_on(episodes):
    for episode in episodes:
        for frame in range(0, len(episode) - 1, 7):
            actions = action_sequences(episode, frame, 12)["recorded"]
            real, after = continue_by_rules(episode, frame, actions, "four"), slice(frame + 1, frame + 1 + len(actions))
            assert (real.images[real.known] == episode.images[after][real.known]).all()
            respawns = np.flatnonzero(episode.events["respawn"][after])
            assert real.known.sum() == (respawns[0] if len(respawns) else len(actions))


def test_a_world_model_of_a_run_imagines_the_same_frames_each_time(episodes, tmp_path):
    torch.manual_seed(0)
    save_world_model(tmp_path / "world_model.pt", WorldModel(WorldModelConfig("tiny")))
    imaginer, found = open_imaginer(tmp_path, episodes)
    assert found is None
    first, second = (imaginer.strips(episodes[0], 30, np.array([1, 2, 3]), "four")["imagined"] for _ in range(2))
    assert first.shape == (64, 192, 3) and (first == second).all()


def test_the_widget_shows_what_was_picked_and_refuses_what_is_not_there(episodes, records):
    explorer = EpisodeExplorer(episodes, "four", records, Imaginer(CountingModel()))
    explorer.show(frame=20)
    for name in ("down", "down", "left"): explorer.controls[f"action_{name}"].click()
    assert explorer.shown.actions == (1, 1, 4) and "frame 20" in explorer.summary
    shown = explorer.picture()
    assert (shown[-2 * 79 + 15:-79, 64:128] == round(255 / 4)).all(), "the second imagined frame is that of `down`"
    real = continue_by_rules(episodes[0], 20, [1, 1, 4], "four").images
    assert (shown[-64:, 128:192] == real[2]).all()
    for wrong in ({"frame": 161}, {"episode": 2}, {"actions": (7,)}, {"actions": ("up",)}, {"pace": 1}):
        with pytest.raises(KiloError): explorer.show(**wrong)
    assert explorer.shown.actions == (1, 1, 4) and explorer.shown.frame == 20
    explorer.show(frame=160, actions=())
    assert explorer.picture().shape[1] >= 64, "the last frame has no recorded actions"


def test_the_time_line_has_a_mark_for_each_event_and_boundary(episodes, records):
    """Counted as runs of the row's colour in one line of pixels, with eight pixels a frame."""
    episode, record = episodes[0], records[0]
    picture = timeline_picture(episode, record, 0, width=84 + 4 + 8 * len(episode), span=len(episode))
    for name, colour in (("reward", (0, 140, 60)), ("respawn", (180, 0, 160)), ("forced", (220, 120, 0))):
        wanted = record.forced if name == "forced" else episode.events[name]
        lines = (picture[:, 84:] == colour).all(-1)
        line = lines[lines.sum(1).argmax()].astype(int)
        assert (np.diff(line, prepend=0) == 1).sum() == wanted.sum(), name


@needs_chromium
def test_the_offline_page_steps_picks_and_loads_nothing(episodes, records, tmp_path):
    explorer = EpisodeExplorer(episodes, "four", records, Imaginer(LastFrameModel(.05)), names=["<b>one", "two"])
    written = write_episode_page(tmp_path / "page.html", explorer, "<i>Pin Pad", every=20)
    assert written.stat().st_size < 1.5e6
    errors = []
    with open_browser() as browser:
        page = browser.new_page(viewport={"width": 1100, "height": 800})
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith(("file:", "data:")) else
                errors.append(request.url))
        page.goto(written.as_uri())
        page.wait_for_function("() => document.body.dataset.frame === '0'")
        for _ in range(45): page.keyboard.press(".")
        page.wait_for_function("() => document.body.dataset.frame === '45' && document.body.dataset.strip === "
                               "'40 recorded'")
        pixels = page.evaluate("() => Array.from(document.getElementById('image').getContext('2d')"
                               ".getImageData(0, 0, 64, 64).data)")
        assert (np.array(pixels, np.uint8).reshape(64, 64, 4)[..., :3] == episodes[0].images[45]).all()
        assert page.locator("#sequence option").count() == 1 + len(ACTIONS)
        page.locator("#sequence").select_option("down")
        page.wait_for_function("() => document.body.dataset.strip === '40 down'")
        page.locator("#episode").select_option("1")
        page.wait_for_function("() => document.body.dataset.frame === '0'")
        page.locator("#play").click()
        page.wait_for_function("() => +document.body.dataset.frame > 2")
        assert page.locator("h1").inner_text() == "<i>Pin Pad" and page.locator("#episode b").count() == 0
        page.close()
    assert not errors
