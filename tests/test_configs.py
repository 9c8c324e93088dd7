"""Strict configs: unknown keys, wrong types and contradictory values are errors; text and dotted settings have the type
of their field."""
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from kilonb.core.configs import (Setting, apply_settings, build_config, list_settings, parse_value, setting_type,
                                 to_dict)
from kilonb.core.errors import KiloError


@dataclass(frozen=True)
class Schedule:
    learning_rate: float = 1e-3
    warmup_steps: int = 100


@dataclass(frozen=True)
class Training:
    steps: int = 1000
    loss: Literal["l2", "charbonnier"] = "l2"
    promotion_gates: list[str] = field(default_factory=lambda: ["psnr"])
    frames: list[int] | None = None
    schedule: Schedule = field(default_factory=Schedule)

    def validate(self):
        if self.schedule.warmup_steps > self.steps: raise ValueError("the warm-up is longer than the run.")


@pytest.mark.incident(5)
def test_an_unknown_key_is_refused_and_the_nearest_is_named():
    """Incident 5: a mistyped key was ignored and its default came back."""
    with pytest.raises(KiloError, match="'lerning_rate': did you mean 'learning_rate'"):
        build_config(Training, {"schedule": {"lerning_rate": 1.0}})
    with pytest.raises(KiloError, match="'step': did you mean 'steps'"): build_config(Training, {"step": 3})


@pytest.mark.parametrize("values",
                         [{"steps": True}, {"steps": 1.0}, {"steps": "10"}, {"loss": "l1"}, {"frames": [1, "2"]},
                          {"frames": 3}, {"schedule": 3}, {"schedule": {"learning_rate": "1e-3"}}, {"steps": None}])
def test_a_value_of_another_type_is_refused(values):
    with pytest.raises(KiloError, match=r"must be"): build_config(Training, values)


@pytest.mark.incident(10)
def test_contradictory_settings_are_one_error():
    """Incident 10: one setting silently clamped another."""
    with pytest.raises(KiloError, match="Training: the warm-up is longer than the run"):
        build_config(Training, {"steps": 10})


@pytest.mark.incident(9)
def test_an_empty_list_stays_empty():
    """Incident 9: an empty list was replaced by the default."""
    config = build_config(Training, {"promotion_gates": [], "frames": []})
    assert config.promotion_gates == [] and config.frames == []
    assert build_config(Training, to_dict(config)) == config


@pytest.mark.parametrize("text, hint, value",
                         [("1e-3", float, 1e-3), ("1e4", int, 10_000), ("true", bool, True), ("true", str, "true"),
                          ("[1, 2]", list[int], [1, 2]), ("[]", list[int], []), ("none", int | None, None),
                          ("0", str | None, "0"), ("l2", Literal["l2", "l1"], "l2"), ("1,2", tuple[int, int], (1, 2)),
                          ("-3", 1, -3), ("0.5", 1.0, 0.5)])
def test_text_is_read_as_the_type_of_its_parameter(text, hint, value):
    read = parse_value(text, hint)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize("text, hint",
                         [("1.5", int), ("x", float), ("2", bool), ("[1, 2.5]", list[int]), ("none", int),
                          ("l3", Literal["l2", "l1"]), ("1,2,3", tuple[int, int])])
def test_text_that_is_not_of_the_type_is_refused(text, hint):
    with pytest.raises(KiloError, match="must be"): parse_value(text, hint, "size")


@dataclass(frozen=True)
class Points:
    steps: int = 800
    share: float = 0.5

    def validate(self):
        if self.steps < 0: raise KiloError(f"steps must be at least 0: got {self.steps}.")


@dataclass(frozen=True)
class Teaching:
    views: int
    points: Points | None = Points()
    extra: Points | None = None
    training: Training = field(default_factory=lambda: Training(steps=500))
    sizes: tuple[int, int] = (4, 4)
    anything: Any = None


def test_settings_are_the_leaves_of_a_config_under_dotted_names():
    names = [one.name for one in list_settings(Teaching)]
    assert names == ["views", "points.steps", "points.share", "extra", "training.steps", "training.loss",
                     "training.promotion_gates", "training.frames", "training.schedule.learning_rate",
                     "training.schedule.warmup_steps", "sizes", "anything"]
    defaults = {one.name: one.default for one in list_settings(Teaching)}
    assert defaults["training.steps"] == 500, "the default of the nested instance, not that of its class"
    assert {one.name: one.default for one in list_settings(Teaching(3, Points(7)))}["points.steps"] == 7
    assert Setting("points.share", float, 0.5) in list_settings(Teaching)


@pytest.mark.parametrize("name, hint", [("points.steps", int), ("training.schedule.learning_rate", float),
                                        ("sizes", tuple[int, int]), ("points", Points | None), ("training", Training)])
def test_the_type_of_a_setting_is_that_of_its_field(name, hint):
    assert setting_type(Teaching, name) == hint


@pytest.mark.parametrize("name", ["view", "points.step", "training.schedul.learning_rate", "views.x", "extra.steps", "",
                                  "points.", ".points"])
def test_an_unknown_setting_is_refused(name):
    with pytest.raises(KiloError, match=f"Unknown setting of Teaching '{name}'"): setting_type(Teaching, name)
    with pytest.raises(KiloError, match=f"Unknown setting of Teaching '{name}'"):
        apply_settings(Teaching(3), {name: 1})


def test_the_nearest_setting_is_named():
    with pytest.raises(KiloError, match=r"did you mean 'training\.schedule\.learning_rate'"):
        apply_settings(Teaching(3), {"training.schedule.lerning_rate": 1.0})


def test_applied_settings_change_their_fields_and_no_others():
    before = Teaching(3)
    after = apply_settings(before, {"points.steps": 9, "training.schedule.learning_rate": 1, "sizes": [2, 3]})
    assert (after.points, after.training.schedule.learning_rate, after.sizes) == (Points(9), 1.0, (2, 3))
    assert type(after.training.schedule.learning_rate) is float and after.training.steps == 500
    assert before == Teaching(3) and apply_settings(before, {}) == before
    assert apply_settings(before, {"points": None}).points is None


@pytest.mark.parametrize("settings, message",
                         [({"points.steps": 1.5}, r"Teaching.points.steps must be int: got float 1.5"),
                          ({"points.steps": -1}, r"Teaching.points: steps must be at least 0"),
                          ({"training.steps": 50}, r"Teaching.training: the warm-up is longer than the run"),
                          ({"training.schedule.warmup_steps": 501}, r"Teaching.training: the warm-up is longer"),
                          ({"points": None, "points.steps": 3}, r"Teaching.points is given as a whole and by")])
def test_settings_are_checked_at_every_level(settings, message):
    with pytest.raises(KiloError, match=message): apply_settings(Teaching(3), settings)
