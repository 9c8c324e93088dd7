"""Configs are checked where they are built, and files' numbers are read by the types of the fields."""
import dataclasses
import importlib
import json
import math
import pkgutil
import re
import types
import typing
from functools import cache
from typing import Any, Literal, Union

import pytest

import kilonb
from kilonb.batch.sweeps import plan_sweep
from kilonb.core.configs import build_config, parse_value
from kilonb.core.errors import KiloError
from kilonb.runs.notebooks import list_notebooks, read_notebook

NAMED = re.compile(r"(Config|Options|Settings|Training|Strategy|Scoring|SweepFile|WarmupCosine|ViewSphere)$")
REQUIRED = {"experiment": "students", "weights": {"colour": 1.0}}
# classes whose defaults alone are refused
BASES = {"Condition": {"value": "alpha", "at_least": .5}, "StopRule": {"value": "x", "below": 1.0}}


def members(hint: Any) -> tuple:
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def nested(hint: Any) -> list[type]:
    """The dataclasses in an annotation, at any depth."""
    if dataclasses.is_dataclass(hint): return [hint]
    return [found for part in typing.get_args(hint) if isinstance(part, (type, types.GenericAlias, types.UnionType))
            for found in nested(part)]


@cache
def config_classes() -> tuple[type, ...]:
    """Every config class of the package: by its name, by the experiments that take its settings, and as a part of one
    of these."""
    found = {}
    for module in pkgutil.walk_packages(kilonb.__path__, "kilonb."):
        for name, one in vars(importlib.import_module(module.name)).items():
            if (isinstance(one, type) and one.__module__ == module.name and dataclasses.is_dataclass(one)
                    and one.__dataclass_params__.frozen and NAMED.search(name) and not name.startswith("_")):
                found[one] = None
    for path in list_notebooks().values():
        for config in read_notebook(path).configs:
            module, _, name = config.rpartition(".")
            found[getattr(importlib.import_module(module), name)] = None
    waiting = list(found)
    while waiting:
        for hint in typing.get_type_hints(waiting.pop()).values():
            for part in nested(hint):
                if part not in found:
                    found[part] = None
                    waiting.append(part)
    return tuple(found)


def base_of(config: type) -> Any:
    """An instance with its defaults; what has none gets the simplest value of its type."""
    values = dict(BASES.get(config.__name__, {}))
    for field in dataclasses.fields(config):
        if field.name not in values and field.default is field.default_factory is dataclasses.MISSING:
            hint = members(typing.get_type_hints(config)[field.name])[0]
            plain = {int: 3, float: 1.0, bool: True, str: "x"}.get(hint)
            values[field.name] = REQUIRED.get(field.name, plain if plain is not None else base_of(hint)
                                              if dataclasses.is_dataclass(hint) else 1.0)
    return config(**values)


def wrong_values(hint: Any) -> list[Any]:
    """Values that an annotation does not allow."""
    kinds, wrong = members(hint), [object()]
    origins = {typing.get_origin(kind) or kind for kind in kinds}
    if Any in kinds: return []
    if Literal in origins: wrong += ["no such choice", 7.5]
    if str not in kinds and Literal not in origins: wrong += ["text"]
    if {int, float} & set(kinds): wrong += [True, "1e-3", math.nan] + ([] if list in origins else [[1]])
    if int in kinds and float not in kinds: wrong += [2.5]
    if bool in kinds: wrong += [1, "yes", None] if type(None) not in kinds else [1, "yes"]
    if {list, tuple, dict} & origins and not {int, float} & set(kinds): wrong += [3]
    if any(dataclasses.is_dataclass(kind) for kind in kinds): wrong += [3, {"no such field": 1}]
    return wrong


def test_there_are_config_classes_in_every_package_that_has_some():
    packages = {one.__module__.split(".")[1] for one in config_classes()}
    assert {"training", "distill", "fields", "splats", "coop", "flux4d", "pose", "dream", "panoramas", "scenes",
            "batch", "imaging"} <= packages and len(config_classes()) >= 50


@pytest.mark.parametrize("config", config_classes(), ids=lambda one: f"{one.__module__[7:]}.{one.__name__}")
def test_a_wrong_literal_type_or_nan_is_refused_for_each_field(config):
    assert getattr(config, "is_checked", False), f"{config.__name__} lacks the decorator kilonb.core.configs.checked"
    base, hints = base_of(config), typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        if not field.init: continue
        for wrong in wrong_values(hints[field.name]):
            with pytest.raises(KiloError) as error: dataclasses.replace(base, **{field.name: wrong})
            message = str(error.value)
            assert field.name in message and len(message) <= 400 and "\n" not in message, message


def test_the_wrong_words_of_the_issue_are_refused_by_constructors():
    from kilonb.distill.alpha import OpacityTargetConfig
    from kilonb.distill.losses import ResponseLossConfig
    from kilonb.distill.multiview import TeachingConfig
    from kilonb.splats.fit_config import FitConfig

    for build, field in ((lambda: ResponseLossConfig(colour="mixed"), "colour"),
                         (lambda: ResponseLossConfig(background="chartreuse"), "background"),
                         (lambda: FitConfig(background="chartreuse"), "background"),
                         (lambda: OpacityTargetConfig(side="up"), "side"),
                         (lambda: TeachingConfig(targets="photos"), "targets"),
                         (lambda: TeachingConfig(kind="mlp", network={"hiden": 5}), "did you mean 'hidden'"),
                         (lambda: TeachingConfig(network={"layers": 2.5}), "layers"),
                         (lambda: TeachingConfig(network={"cell_size": 1.0}), "cell_size")):
        with pytest.raises(KiloError, match=field): build()


def test_a_nested_config_is_named_by_its_path():
    from kilonb.distill.multiview import TeachingConfig

    with pytest.raises(KiloError, match=r"TeachingConfig\.rays\.loss\.colour must be one of"):
        build_config(TeachingConfig, {"rays": {"loss": {"colour": "mixed"}}})
    with pytest.raises(KiloError, match=r"TeachingConfig\.rays"):
        build_config(TeachingConfig, {"rays": {"rays": -1}})


def echo(folder, parameters: str):
    cells = [{"cell_type": "markdown", "metadata": {}, "source": "# Echo\n> Prints its parameters.", "id": "a"},
             {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": parameters, "id": "b",
              "outputs": [], "execution_count": None}]
    (folder / "echo.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4,
                                                   "nbformat_minor": 5}))


PARAMETERS = '''maybe: float | None = None
numbers: list[float] = []
counts: list[int] = []
pair: tuple[float, float] = (0.0, 1.0)
steps: int = 3
word: str = ""
run_dir: str = ""
resume: bool = False'''


def planned(folder, text: str) -> list[dict]:
    echo(folder, PARAMETERS)
    (folder / "study.yaml").write_text("experiment: echo.ipynb\n" + text)
    return [run.parameters for run in plan_sweep(folder / "study.yaml", folder / "out").runs]


def test_exponents_without_a_point_are_numbers_in_sweeps(tmp_path):
    runs = planned(tmp_path, "parameters: {maybe: 1e-4, numbers: [1e-3, 2], counts: [1e3, 10_000], pair: [1e-2, 3],"
                             " word: 1e-3}\ngrid: {steps: [1e3, 2_000]}\nretries: 2")
    assert [run["steps"] for run in runs] == [1000, 2000]
    assert runs[0]["maybe"] == 1e-4 and runs[0]["numbers"] == [1e-3, 2.0] and runs[0]["counts"] == [1000, 10_000]
    assert list(runs[0]["pair"]) == [1e-2, 3.0] and runs[0]["word"] == "1e-3", "text stays text"
    assert planned(tmp_path, "grid: {maybe: [null, 5e-1]}")[1]["maybe"] == .5


@pytest.mark.parametrize("text", ["parameters: {maybe: 1e-4x}\nseeds: 1", "grid: {steps: [1.5e0]}",
                                  "grid: {numbers: [[1e-3, a]]}", "grid: {steps: [3]}\ngrid: {steps: [4]}"])
def test_what_is_no_number_is_refused_in_sweeps(tmp_path, text):
    with pytest.raises(KiloError): planned(tmp_path, text)


def test_exponents_without_a_point_are_numbers_on_the_command_line():
    assert parse_value("1e-4", float | None) == 1e-4 and parse_value("1e-4,1e-3", list[float]) == [1e-4, 1e-3]
    assert parse_value("[1e3, 2]", list[int]) == [1000, 2] and parse_value("10_000", int) == 10_000
    assert parse_value("1e3", int | None) == 1000 and parse_value("1e3,2", tuple[int, int]) == (1000, 2)
    for text, hint in (("1.5", int), ("1.5,2", list[int]), ("nan", float), ("[1e400]", list[float])):
        with pytest.raises(KiloError): parse_value(text, hint)
