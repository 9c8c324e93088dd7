"""Options of every training: kept checkpoints, extension, held-out scores, early stop, determinism, logs, tags."""
import io
import json
import math
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from kilonb.batch.execution import RunMonitor
from kilonb.cli.main import main
from kilonb.core.configs import apply_settings, parse_value
from kilonb.core.errors import KiloError
from kilonb.distill.checkpoint_scores import compare_checkpoints, kept_checkpoints
from kilonb.distill.rays import RayPool
from kilonb.distill.space import occupancy_of_gaussians
from kilonb.distill.student import DistillConfig, distill, make_student, save_student
from kilonb.fields.kilonerf import KiloNeRFConfig
from kilonb.geometry.cameras import orbit_cameras
from kilonb.imaging.targets import targets_from_teacher
from kilonb.runs.folders import open_run
from kilonb.runs.records import find_run, read_run
from kilonb.runs.scalars import read_scalars
from kilonb.runs.selection import run_rows
from kilonb.runs.status import tag_run
from kilonb.splats.fit import fit_gaussians
from kilonb.splats.fit_config import FitConfig
from kilonb.splats.gaussians import gaussians_from_points
from kilonb.training.averaging import load_weights
from kilonb.training.checkpoints import final_path, latest_path, numbered_path, numbered_steps, read_checkpoint
from kilonb.training.determinism import deterministic_algorithms
from kilonb.training.loop import LoopConfig, train
from kilonb.training.stop_rules import StopRule
from tests.test_resumption import state_of, write_notebook

LOOP = LoopConfig(steps=40, learning_rate=1e-2, warmup_steps=4, log_every_steps=5, checkpoint_every_seconds=None)


def train_line(folder: Path | None = None, resume: bool = False, evaluate=None, **changes):
    """A small network trained on a curve; returns (model, result)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def step(number, generator):
        x = torch.rand(32, 1, generator=generator) * 4
        return {"loss": (model(x) - x.sin()).square().mean(), "alpha_p95": torch.tensor(number / 100)}
    return model, train(step, optimizer, replace(LOOP, **changes), model=model, folder=folder, resume=resume,
                        evaluate=evaluate and (lambda: evaluate(model)), quiet=True)


def weights(model: nn.Module) -> torch.Tensor: return torch.cat([p.detach().flatten() for p in model.parameters()])


# ---- each field of the loop matters, and is set by its dotted name


@pytest.mark.parametrize("name, text", [
    ("minimum_learning_rate_ratio", "0.9"), ("gradient_clip", "1e-3"), ("swa_from", "0.5"), ("ema_decay", "0.5"),
    ("warmup_steps", "20"), ("seed", "5")])
def test_a_setting_of_the_loop_changes_the_training(name, text):
    config = apply_settings(LOOP, {name: parse_value(text, LoopConfig.__annotations__[name])}, "loop")
    plain, other = train_line(), train_line(**asdict(config) | {"stop_when": ()})
    averaged = other[1].averaged
    if averaged is None: assert not torch.equal(weights(plain[0]), weights(other[0]))
    else: assert any(not torch.equal(averaged.average[key], value) for key, value in other[0].named_parameters())


def test_the_log_interval_is_that_of_the_records():
    assert [record["step"] for record in train_line(log_every_steps=16)[1].records] == [16, 32, 40]


# ---- numbered checkpoints


def test_checkpoints_are_kept_in_a_window_and_at_most_so_many(tmp_path):
    train_line(tmp_path / "window", keep_every_steps=5, keep_from=10, keep_until=30)
    assert numbered_steps(tmp_path / "window") == [10, 15, 20, 25, 30]
    train_line(tmp_path / "last", keep_every_steps=5, keep_last=2)
    assert numbered_steps(tmp_path / "last") == [35, 40]
    assert read_checkpoint(numbered_path(tmp_path / "last", 35))["step"] == 35
    assert os.path.samefile(numbered_path(tmp_path / "last", 40), final_path(tmp_path / "last"))


def test_the_best_checkpoint_outlives_newer_ones(tmp_path):
    scores = iter([20.0, 30.0, 25.0, 24.0, 23.0, 22.0, 21.0, 20.0])
    train_line(tmp_path, keep_every_steps=5, keep_last=2, keep_best=True, evaluate_every_steps=5,
               evaluate=lambda _: {"test_psnr_srgb_white_db": next(scores)})
    assert numbered_steps(tmp_path) == [10, 35, 40]


def test_keeping_changes_no_number_and_may_change_on_resumption(tmp_path):
    plain = train_line()[0]
    kept = train_line(tmp_path, keep_every_steps=7, time_limit_s=1e-9)[0]
    assert read_checkpoint(latest_path(tmp_path))["step"] < 40
    kept, result = train_line(tmp_path, resume=True, keep_every_steps=8)
    assert result.finished and torch.equal(weights(plain), weights(kept)) and 40 in numbered_steps(tmp_path)


def test_weights_of_a_numbered_checkpoint_are_averaged_unless_raw_ones_are_asked_for(tmp_path):
    model, _ = train_line(tmp_path, ema_decay=0.9, keep_every_steps=20)
    path = numbered_path(tmp_path, 20)
    assert load_weights(path, model).startswith("averaged weights of step 20")
    averaged = weights(model)
    assert load_weights(path, model, "raw").startswith("raw") and not torch.equal(averaged, weights(model))


@pytest.mark.parametrize("changes", [{"keep_every_steps": 0}, {"keep_last": 0}, {"keep_from": -1}, {"keep_from": 9,
                                     "keep_until": 3}, {"keep_every_steps": 5, "keep_from": -3}])
def test_a_rule_that_keeps_nothing_is_refused(changes):
    with pytest.raises(KiloError, match="keep_"): replace(LOOP, **changes)


# ---- extension


def test_a_finished_run_is_extended_at_its_minimum_rate(tmp_path):
    train_line(tmp_path, ema_decay=0.9)
    final = final_path(tmp_path).read_bytes()
    model, result = train_line(tmp_path, resume=True, ema_decay=0.9, steps=60, extend="constant")
    rates = [record["learning_rate"] for record in result.records]
    assert result.steps == 60 and result.resumed_from == 40 and rates[7] == rates[-1] == min(rates)
    assert numbered_path(tmp_path, 40).read_bytes() == final and read_checkpoint(final_path(tmp_path))["step"] == 60
    again, resumed = train_line(tmp_path, resume=True, ema_decay=0.9, steps=60)
    assert resumed.extensions == result.extensions and torch.equal(weights(model), weights(again))
    assert list(read_scalars(tmp_path)["step"]) == list(range(5, 61, 5))


def test_an_extension_that_is_interrupted_is_resumed_to_the_same_numbers(tmp_path):
    for name in ("whole", "parts"): train_line(tmp_path / name)
    whole, _ = train_line(tmp_path / "whole", resume=True, steps=80, extend="rewarm")
    elapsed = read_checkpoint(latest_path(tmp_path / "parts"))["elapsed_s"]
    _, part = train_line(tmp_path / "parts", resume=True, steps=80, extend="rewarm", time_limit_s=elapsed + 1e-6)
    assert 40 < part.steps < 80 and not part.finished
    assert not final_path(tmp_path / "parts").exists(), "the first part is step_40.pt now"
    resumed, result = train_line(tmp_path / "parts", resume=True, steps=80)
    assert result.finished and torch.equal(weights(whole), weights(resumed))
    assert max(record["learning_rate"] for record in result.records[8:]) > 5 * result.records[7]["learning_rate"]


@pytest.mark.parametrize("changes, words", [
    ({"steps": 60}, "steps = 40"), ({"steps": 60, "extend": "constant", "seed": 1}, "seed"),
    ({"steps": 30, "extend": "constant"}, "cannot be extended to 30"),
    ({"steps": 60, "extend": "rewarm", "gradient_clip": 1.0}, "gradient_clip")])
def test_a_refused_extension_changes_nothing(tmp_path, changes, words):
    train_line(tmp_path)
    before = state_of(tmp_path)
    with pytest.raises(KiloError, match=words): train_line(tmp_path, resume=True, **changes)
    assert state_of(tmp_path) == before


def test_only_a_run_that_did_all_its_steps_is_extended(tmp_path):
    train_line(tmp_path / "cut", time_limit_s=1e-9)
    with pytest.raises(KiloError, match="done all its steps"):
        train_line(tmp_path / "cut", resume=True, steps=60, extend="constant")
    rule = (StopRule("alpha_p95", records=1, above=0.1),)
    train_line(tmp_path / "early", stop_when=rule)
    with pytest.raises(KiloError, match="done all its steps"):
        train_line(tmp_path / "early", resume=True, steps=60, extend="constant", stop_when=rule)


# ---- early stop


def test_a_rule_ends_the_run_and_says_why_and_a_resumed_one_stays_ended(tmp_path):
    rule = (StopRule("alpha_p95", records=2, above=0.15),)
    _, result = train_line(tmp_path, stop_when=rule)
    assert result.finished and result.steps == 25 and "alpha_p95" in result.stopped and "above 0.15" in result.stopped
    assert "its schedule has not reached its end" in result.stopped
    assert read_checkpoint(final_path(tmp_path))["step"] == 25
    assert train_line(tmp_path, resume=True, stop_when=rule)[1].steps == 25
    with pytest.raises(KiloError, match="stop_when"): train_line(tmp_path, resume=True)


def test_a_run_that_is_interrupted_stops_at_the_same_step(tmp_path):
    rule = (StopRule("loss", "slope", records=3, above=-30.0),)
    whole = train_line(stop_when=rule)[1]
    result = train_line(tmp_path, stop_when=rule, time_limit_s=1e-9)[1]
    assert result.steps < whole.steps
    assert train_line(tmp_path, resume=True, stop_when=rule)[1].steps == whole.steps < 40


def test_rules_are_read_from_the_command_line_and_wrong_ones_refused():
    text = '[{"value": "loss", "measure": "slope", "above": -0.001}]'
    rules = parse_value(text, tuple[StopRule, ...])
    assert apply_settings(LOOP, {"stop_when": rules}, "loop").stop_when == (StopRule("loss", "slope", above=-0.001),)
    for wrong in ({"measure": "median"}, {"records": 0}, {}, {"above": math.nan}):
        with pytest.raises(KiloError): StopRule("loss", **wrong)


# ---- scores on the way


def test_held_out_scores_are_logged_and_change_no_step(tmp_path):
    def noisy(model):
        torch.rand(100)
        return {"test_psnr_db": float(weights(model).sum()), "none": None}
    plain = train_line(ema_decay=0.5)[0]
    scored, result = train_line(tmp_path, evaluate=noisy, evaluate_every_steps=12, ema_decay=0.5)
    assert torch.equal(weights(plain), weights(scored))
    column = read_scalars(tmp_path)["test_psnr_db"]
    assert [int(step) for step, value in zip(read_scalars(tmp_path)["step"], column) if not math.isnan(value)] == [
        15, 25, 40]
    average = torch.cat([value.flatten() for value in result.averaged.average.values()])
    assert abs(result.records[-1]["test_psnr_db"] - float(average.sum())) < 1e-4, "of averaged weights"
    with pytest.raises(KiloError, match="nothing to score"): train_line(evaluate_every_steps=5)


# ---- students and teachers


@pytest.fixture(scope="module")
def ball():
    torch.manual_seed(0)
    shell = nn.functional.normalize(torch.randn(600, 3), dim=-1) * 0.6
    return gaussians_from_points(shell, (shell * 4).sin() / 2 + 0.5, sh_degree=0, opacity=0.9, scale=0.8)


@pytest.fixture(scope="module")
def views(ball):
    return targets_from_teacher(ball, [(f"r_{i}", camera) for i, camera in
                                       enumerate(orbit_cameras(3, 3.0, 30, width=24, height=24))])


def taught(ball, views, folder=None, **changes):
    grid = occupancy_of_gaussians(ball, 20)
    shape = KiloNeRFConfig(cell_size=0.6, position_frequencies=3, hidden=16, density_bias=2.0)
    student = make_student(grid, shape, 0.08)
    loop = replace(LOOP, steps=12, warmup_steps=2, log_every_steps=3, ema_decay=0.9, **changes)
    config = DistillConfig(rays=64, first_refresh=5, loop=loop)
    result = distill(student, RayPool(views[:2], grid, 0.08), config, folder, held_out=views[2:], quiet=True)
    return student, result


def test_a_student_is_scored_on_the_way_without_another_result(ball, views):
    plain, (scored, result) = taught(ball, views)[0], taught(ball, views, evaluate_every_steps=6)
    assert torch.equal(weights(plain), weights(scored))
    found = {record["step"]: record["test_psnr_vs_teacher_db"] for record in result.records
             if "test_psnr_vs_teacher_db" in record}
    assert list(found) == [6, 12] and all(map(math.isfinite, found.values()))


def test_kept_checkpoints_of_a_student_are_compared(ball, views, tmp_path):
    student, _ = taught(ball, views, tmp_path, keep_every_steps=4)
    with pytest.raises(KiloError, match=r"student\.pt"): compare_checkpoints(tmp_path, views)
    save_student(student, tmp_path / "student.pt", "averaged")
    compared = compare_checkpoints(tmp_path, views)
    first, second, last = compared.rows
    assert [row["step"] for row in compared.rows] == [4, 8, 12] == list(kept_checkpoints(tmp_path))
    assert first["white_delta_db"] is None
    assert second["white_delta_db"] == pytest.approx(second["white_db"] - first["white_db"])
    assert last["gap_db"] == pytest.approx(last["white_db"] - last["foreground_db"])
    assert {row["weights"] for row in compared.rows} == {"averaged"} and compared.blank_db < 40
    assert compared.best["white_db"] == max(row["white_db"] for row in compared.rows)
    with pytest.raises(KiloError, match="no checkpoint of step 5"): compare_checkpoints(tmp_path, views, steps=[5])
    with pytest.raises(KiloError, match="no views"): compare_checkpoints(tmp_path, [])


class Photograph:
    """A target as a view to fit gaussians to."""

    masked = True

    def __init__(self, target): self.target, self.name, self.camera = target, target.name, target.camera

    def rgba_straight(self):
        alpha = self.target.alpha[..., None]
        return torch.cat([(self.target.rgb_premultiplied / alpha.clamp(min=1e-3)).clamp(0, 1), alpha], -1)


def test_strict_determinism_repeats_a_student_and_a_teacher_to_the_bit(ball, views):
    pair = [taught(ball, views, deterministic=True)[0].state_dict() for _ in range(2)]
    assert all(torch.equal(pair[0][name], pair[1][name]) for name in pair[0])
    assert not torch.are_deterministic_algorithms_enabled()
    scene = [Photograph(view) for view in views]
    config = FitConfig(steps=6, initial_count=600, maximum_count=700, grow_every_steps=3, sh_degree=0)
    with deterministic_algorithms(seed=0):
        one, two = (fit_gaussians(scene, config, initial=ball, quiet=True).gaussians for _ in range(2))
    for name, value in vars(one).items():
        if isinstance(value, torch.Tensor): assert torch.equal(value, getattr(two, name)), name


# ---- the logs


def test_both_logs_have_the_same_rows_and_the_time_axis_has_no_pause(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = {"tensorboard_time": "elapsed", "tensorboard_graph": True}
    train_line(tmp_path, time_limit_s=1e-9, **more)
    train_line(tmp_path, resume=True, **more)
    events, scalars = EventAccumulator(str(tmp_path)).Reload(), read_scalars(tmp_path)
    for name in ("loss", "learning_rate", "elapsed_s"):
        assert [event.step for event in events.Scalars(name)] == list(scalars["step"])
    moments = [event.wall_time for event in events.Scalars("loss")]
    elapsed = scalars["elapsed_s"] - scalars["elapsed_s"][0]
    assert [moment - moments[0] for moment in moments] == pytest.approx(list(elapsed), abs=1e-5)
    assert sum(node.op == "Linear" for node in events.Graph().node) == 2


# ---- tags


def test_a_tag_names_a_run_in_lists_and_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setenv("KILONB_OUTPUTS", str(tmp_path))
    for name in ("a", "b"): open_run("line", tmp_path / "line" / name).finish({"loss": 1.0})
    assert main(["runs", "tag", "line/a", "baseline"]) == 0
    assert find_run("baseline", tmp_path) == tmp_path / "line" / "a"
    headings, rows = run_rows([read_run(tmp_path / "line" / name) for name in ("a", "b")])
    assert [row[headings.index("tag")] for row in rows] == ["baseline", ""]
    for wrong in ("two words", "../x", "x" * 61, "-x"):
        with pytest.raises(KiloError, match="tag"): tag_run(tmp_path / "line" / "b", wrong)
    assert main(["runs", "tag", "line/nowhere", "x"]) == 2


# ---- the command

CELLS = ("""import torch
from torch import nn
from kilonb.training.determinism import deterministic_algorithms
from kilonb.training.loop import LoopConfig, train
from kilonb.training.session import open_session
session = open_session("line", devices=["cpu"])
config = session.configure(LoopConfig(steps, warmup_steps=0, log_every_steps=5))
torch.manual_seed(seed)
line = nn.Linear(1, 1)
def step(number, generator): return {"loss": (line(torch.rand(8, 1, generator=generator)) - 1).square().mean()}
result = train(step, torch.optim.Adam(line.parameters(), lr=1e-2), config, model=line, folder=session.folder,
               settings=session.fixed_parameters(), resume=session.resumed)""",
         """session.finish({"loss": result.records[-1]["loss"], "steps": result.steps, "stopped": result.stopped,
                "deterministic": torch.are_deterministic_algorithms_enabled()}, [])""")


@pytest.fixture
def notebook(tmp_path) -> str:
    parameters = ('steps: int = 20\nseed: int = 0\nsettings: "kilonb.training.loop.LoopConfig" = {}\n'
                  'run_dir: str = ""\nresume: bool = False')
    return str(write_notebook(tmp_path / "line.ipynb", parameters, *CELLS))


def test_a_run_is_tagged_kept_deterministic_and_extended_by_the_command(notebook, tmp_path, capsys):
    folder = tmp_path / "run"
    run = ["run", notebook, "--out", str(folder)]
    assert main([*run, "--tag", "first", "--deterministic", "-p", "loop.keep_every_steps=10"]) == 0
    first = read_run(folder)
    assert first.tag == "first" and first.results["deterministic"] and numbered_steps(folder) == [10, 20]
    assert first.environment["hardware"]["deterministic"] is True
    before = state_of(folder)
    for wrong in (["--resume", "-psteps=40"], ["--resume", "--extend", "-psteps=40", "-pseed=1"], ["--extend"],
                  ["--resume", "--extend", "-psteps=10"], ["--resume", "--extend"]):
        assert main([*run, *wrong]) == 2, wrong
        assert len(capsys.readouterr().err.strip().splitlines()) == 1 and state_of(folder) == before, wrong
    assert main([*run, "--resume", "--extend", "-psteps=40"]) == 0
    longer = read_run(folder)
    assert longer.results["steps"] == 40 and longer.tag == "first" and numbered_steps(folder) == [10, 20, 30, 40]
    assert longer.parameters["extensions"] == [{"from": 20, "to": 40, "schedule": "constant"}]
    assert json.loads((folder / "earlier" / "1" / "parameters.json").read_text())["steps"] == 20
    assert read_scalars(folder)["learning_rate"][-1] == read_scalars(folder)["learning_rate"][3]


def test_a_rule_on_the_command_line_ends_a_run_early(notebook, tmp_path):
    rule = '[{"value": "loss", "records": 1, "above": 0.0, "after": 10}]'
    assert main(["run", notebook, "--out", str(tmp_path / "run"), "-p", f"loop.stop_when={rule}"]) == 0
    results = read_run(tmp_path / "run").results
    assert results["steps"] == 10 and "stopped at step 10 of 20" in results["stopped"]


# ---- what is shown


def test_progress_is_drawn_in_place_on_a_terminal_and_line_by_line_elsewhere():
    class Terminal(io.StringIO):
        def isatty(self): return True

    lines = [f"training {step:>3}/200  {step / 200:4.0%}  loss 0.1  9.0 steps/s  0:09 left\n"
             for step in (50, 100, 200)]
    for stream in (Terminal(), io.StringIO()):
        monitor = RunMonitor(stream, io.StringIO())
        for text in ("begins\n", *lines, "ends\n"): monitor.write(text)
        shown = stream.getvalue()
        assert shown.startswith("begins\n") and shown.endswith("ends\n")
        if stream.isatty(): assert shown.count("\r") >= 3 and shown.count("\n") == 3
        else: assert shown == "begins\n" + "".join(lines) + "ends\n"
