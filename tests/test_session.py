"""An experiment's session: parameters, device, data, run folder, ranks and settings in one call."""
import json

import pytest
import torch

from kilonb.core.errors import KiloError
from kilonb.runs.folders import prepare_run
from kilonb.runs.notebooks import code_cells, list_notebooks, read_notebook
from kilonb.runs.records import read_run
from kilonb.runs.settings import import_configs, settings_prefix
from kilonb.training import session as sessions
from kilonb.training.loop import LoopConfig
from kilonb.training.parallel import ProcessGroup, World, run_ranks
from kilonb.training.session import Session, choose_device, open_session

EXPERIMENTS = {name: read_notebook(path) for name, path in list_notebooks("experiments").items()}
CELLS = """steps: int = 30
seed: int = 3
settings: "kilonb.training.loop.LoopConfig" = {}
run_dir: str = ""
resume: bool = False
steps = 40
"""


def opened(tmp_path, cells=CELLS, **more):
    """The session of a notebook whose cells are executed one after the other in one namespace."""
    namespace = {"open_session": open_session, "outputs": str(tmp_path), "more": more}
    for cell in (cells, 'session = open_session("line", outputs=outputs, **more)'):
        exec(compile(cell, "cell", "exec"), namespace)
    return namespace["session"]


def test_the_parameters_are_the_annotated_variables_with_their_last_values(tmp_path):
    session = opened(tmp_path)
    assert session.parameters == {"steps": 40, "seed": 3, "run_dir": "", "resume": False} and session.seed == 3
    assert read_run(session.folder).parameters == session.parameters


def test_a_script_passes_a_dictionary(tmp_path):
    session = open_session("line", {"steps": 3, "settings": {"loop.steps": 7}}, outputs=str(tmp_path))
    assert session.configure(LoopConfig(3, warmup_steps=0)).steps == 7


def test_settings_are_checked_before_a_folder_is_taken(tmp_path):
    for settings, message in (({"loop.stps": 1}, "did you mean 'loop.steps'"), ({"loop.steps": "1"}, "must be int"),
                              ({"teaching.cells": 1}, "Unknown setting")):
        with pytest.raises(KiloError, match=message): opened(tmp_path, CELLS + f"settings = {settings}")
    assert not list(tmp_path.iterdir())


def test_a_setting_that_the_notebook_never_applies_fails_the_run(tmp_path):
    session = open_session("line", {"settings": {"loop.steps": 7}}, outputs=str(tmp_path))
    with pytest.raises(KiloError, match=r"'loop\.steps' was not used"): session.finish({"loss": 1.0})
    assert not (session.folder / "results.json").exists()


def test_the_check_and_the_kind_of_data_refuse_before_a_folder_is_taken(tmp_path, monkeypatch):
    class Reference:
        kind = "blender"

    monkeypatch.setattr(sessions, "resolve_data", lambda name: Reference())
    def locked(reference): raise KiloError(f"{reference.kind}: the stage before has not passed.")
    with pytest.raises(KiloError, match="expected opv2v or ply"):
        open_session("line", {"data": "brickyard"}, kinds=["opv2v", "ply"], outputs=str(tmp_path))
    with pytest.raises(KiloError, match="blender: the stage before"):
        open_session("line", {"data": "brickyard"}, check=locked, outputs=str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_prepared_folder_is_opened_and_an_interrupted_run_is_resumed(tmp_path):
    folder = prepare_run("line", tmp_path / "7")
    session = open_session("line", {"run_dir": str(folder), "steps": 3})
    assert session.folder == folder and not session.resumed
    session.run.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    again = open_session("line", {"run_dir": str(folder), "resume": True, "steps": 3})
    assert again.resumed and again.run.elapsed_before_s > 0


def test_what_a_resumed_run_must_share_leaves_out_what_cannot_change_a_number():
    session = Session("line", {"steps": 3, "curve_every": 5, "device": "cpu", "run_dir": "x", "resume": True},
                      {"loop.gradient_clip": 1.0, "loop.time_limit_s": 60.0}, None, torch.device("cpu"), World(),
                      ProcessGroup(World()), "x")
    assert session.fixed_parameters("curve_every") == {"steps": 3, "loop.gradient_clip": 1.0}


def test_auto_takes_cuda_only_where_it_is_there_and_supported(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto").type == "cuda" and choose_device("auto", ["cpu"]).type == "cpu"
    with pytest.raises(KiloError, match="computes on cpu only"): choose_device("cuda", ["cpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == "cpu"
    with pytest.raises(KiloError, match="no CUDA device"): choose_device("cuda")


def test_all_ranks_get_the_folder_of_rank_0_and_only_rank_0_goes_on(tmp_path, monkeypatch):
    def experiment(world):
        monkeypatch.setattr(sessions, "world_from_environment", lambda **_: world)
        monkeypatch.setattr(sessions, "join", lambda world: ProcessGroup(world))
        session = open_session("line", {"steps": 3}, outputs=str(tmp_path))
        try: outcome = session.finish({"loss": 0.5})
        except SystemExit: return str(session.folder), None, session.run is None
        return str(session.folder), outcome.results["ranks"], session.run is None

    first, second = run_ranks(experiment, 2)
    assert first[0] == second[0] and first[1:] == (2, False) and second[1:] == (None, True)


def test_an_error_of_rank_0_ends_all_ranks(tmp_path, monkeypatch):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("mine")

    def experiment(world):
        monkeypatch.setattr(sessions, "world_from_environment", lambda **_: world)
        monkeypatch.setattr(sessions, "join", lambda world: ProcessGroup(world))
        open_session("line", {"run_dir": str(tmp_path / "used")})

    for answer in run_ranks(experiment, 2): assert "exists and is not empty" in answer


@pytest.mark.parametrize("name", [name for name, notebook in EXPERIMENTS.items() if notebook.configs])
def test_an_experiment_configures_every_class_that_it_declares(name):
    """One `session.configure` for each class; a setting of a class without one fails the run at its end."""
    code = "\n".join(code_cells(EXPERIMENTS[name]))
    calls = code.count("session.configure(") + code.count("open_session_data(")         # it configures the views
    assert calls >= len(import_configs(EXPERIMENTS[name].configs))


@pytest.mark.parametrize("name", [name for name, notebook in EXPERIMENTS.items() if notebook.distributed])
def test_a_distributed_experiment_lets_only_rank_0_write(name):
    cells = "\n".join(code_cells(EXPERIMENTS[name]))
    assert "session.leave_group()" in cells or "meeting.leave()" in cells


def test_the_prefix_of_a_config_class_is_its_name():
    assert settings_prefix("kilonb.distill.multiview.TeachingConfig") == "teaching"


def test_config_json_has_every_field_as_used(tmp_path):
    session = opened(tmp_path, CELLS + 'settings = {"loop.gradient_clip": 0.5}')
    session.configure(LoopConfig(40, warmup_steps=0))
    kept = json.loads((session.folder / "config.json").read_text())["loop"]
    assert kept["steps"] == 40 and kept["gradient_clip"] == 0.5 and kept["seed"] == 0
