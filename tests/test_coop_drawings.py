"""Trained cooperative models: opened again from a run, drawn under predicted and true poses, by script and command."""
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kilonb.coop.dataset import Sample, SampleOptions
from kilonb.coop.losses import LossBatch, LossConfig, coop_loss, mask_terms
from kilonb.coop.model import ModelConfig
from kilonb.coop.trained import (
    find_trained_coop,
    load_trained_coop,
    range_rmse_m,
    sample_folder,
    sample_indices,
    write_prediction,
)
from kilonb.coop.training import CoopConfig, EpochReport, make_batch, make_model, make_step, predict_batch, train_coop
from kilonb.core.errors import KiloError
from kilonb.core.files import write_json
from kilonb.panoramas.tiles import PanoramaOptions
from kilonb.scenes.boxtown import build_town, write_opv2v
from tests.helpers import run_here

PANORAMA = PanoramaOptions(128, 32, elevation_deg=18.0)
MODEL = ModelConfig(widths=(8, 16, 16, 32), blocks=1, column_width=32, pair_blocks=1)


def sample(number: int) -> Sample:
    generator = torch.Generator().manual_seed(number)
    poses = torch.eye(4).repeat(2, 1, 1)
    poses[1, [0, 2], 3] = torch.tensor([5.0 + number, 12.0])
    mask = (torch.rand(2, 32, 128, generator=generator) > .4).float()
    return Sample(f"town/{number}", ("641", "650"), torch.rand(2, 3, 32, 128, generator=generator),
                  (5 + 30 * torch.rand(2, 32, 128, generator=generator)) * mask, mask, mask, mask.long(), poses)


@pytest.fixture(scope="module")
def samples() -> list[Sample]: return [sample(n) for n in range(4)]


def config(**changes) -> CoopConfig:
    return CoopConfig(**{"steps": 3, "batch_size": 2, "log_every_steps": 1, "ema_decay": .5, "model": MODEL, **changes})


@pytest.fixture(scope="module")
def run(samples, tmp_path_factory) -> Path:
    """A run folder of three steps, as an experiment leaves it."""
    folder = tmp_path_factory.mktemp("coop") / "run"
    train_coop(make_model(PANORAMA.camera(), config()), samples, PANORAMA.camera(), config(), folder, quiet=True)
    write_json(folder / "config.json", {"coop": asdict(config()), "panorama": asdict(PANORAMA),
                                        "sample": asdict(SampleOptions())})
    return folder


def test_a_run_is_opened_again_with_the_weights_that_are_asked_for(run, samples):
    averaged, raw = load_trained_coop(run), load_trained_coop(run, "raw")
    assert (averaged.weights, raw.weights, raw.step, raw.config) == ("averaged", "raw", 3, config())
    assert not torch.equal(averaged.predict(samples[:1]).range_m, raw.predict(samples[:1]).range_m)
    with pytest.raises(KiloError, match="averaged or raw"): load_trained_coop(run, "best")


@pytest.mark.parametrize("damage", ["no settings", "other size", "no checkpoint", "empty file"])
def test_a_folder_that_is_no_whole_run_gives_one_sentence(run, tmp_path, damage):
    copy = tmp_path / "copy"
    (copy / "checkpoints").mkdir(parents=True)
    settings = json.loads((run / "config.json").read_text())
    if damage == "other size": settings["coop"]["model"]["column_width"] = 64
    if damage != "no settings": write_json(copy / "config.json", settings)
    if damage != "no checkpoint":
        for file in (run / "checkpoints").iterdir():
            (copy / "checkpoints" / file.name).write_bytes(b"" if damage == "empty file" else file.read_bytes())
    with pytest.raises(KiloError) as caught: load_trained_coop(copy)
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 400


@pytest.mark.parametrize("pose", ["predicted", "true"])
def test_pictures_arrays_page_and_summary_of_a_sample(run, samples, tmp_path, pose):
    trained = load_trained_coop(run)
    prediction = trained.predict(samples[1:2])
    summary = write_prediction(tmp_path / "one", samples[1], prediction, trained.camera, pose)
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {"points.html", "points.ply", "summary.json", *(f"{vehicle}{end}" for vehicle in ("641", "650")
                                                      for end in (".png", "_range_m.npy", "_mask.npy"))}
    ranges = np.load(tmp_path / "one" / "650_range_m.npy")
    known = (samples[1].mask[1] > .5).numpy()
    rmse = float(np.sqrt(((ranges - samples[1].range_m[1].numpy())[known] ** 2).mean()))
    second = summary["vehicles"][1]
    assert second["range_rmse_m"] == pytest.approx(rmse, rel=1e-4) and second["translation_m"] > 0
    assert json.loads((tmp_path / "one" / "summary.json").read_text()) == summary and summary["pose"] == pose
    assert summary["range_rmse_m"] == pytest.approx(range_rmse_m([summary]))
    with pytest.raises(KiloError, match="predicted or true"):
        write_prediction(tmp_path / "two", samples[1], prediction, trained.camera, "given")
    assert not (tmp_path / "two").exists()


def test_true_poses_take_the_error_of_the_poses_out_of_the_cloud(run, samples, tmp_path):
    trained = load_trained_coop(run)
    prediction = trained.predict(samples[:1])
    exact = prediction._replace(range_m=samples[0].range_m[None], mask_logits=100 * (samples[0].mask[None] - .5))
    true, own = (write_prediction(tmp_path / pose, samples[0], exact, trained.camera, pose)["chamfer_m"]
                 for pose in ("true", "predicted"))
    assert true < 1e-3 < own


def test_a_sample_is_chosen_by_its_number():
    assert sample_indices("2,-1,2", 5) == [2, 4] and sample_indices("all", 2) == [0, 1]
    for wrong in ("5", "-6", "x", ",", "1.5", "99999999999"):
        with pytest.raises(KiloError, match="numbers of samples"): sample_indices(wrong, 5)
    assert sample_folder("run", 1, "../a b").name == "1_.._a_b"


def test_a_run_is_found_by_folder_and_a_missing_one_is_said(run, tmp_path):
    assert find_trained_coop(str(run)) == run
    for name in ("", "nowhere"):
        with pytest.raises(KiloError): find_trained_coop(name, tmp_path)


def test_masks_and_valid_share_are_logged_and_the_weight_of_the_mask_matters(samples):
    model = make_model(PANORAMA.camera(), config())
    batch = make_batch(samples[:2])
    prediction, wrapped = predict_batch(model, batch), LossBatch(batch, PANORAMA.camera())
    plain, heavy = (mask_terms(prediction, wrapped, weight) for weight in (1.0, 4.0))
    assert plain["mask_mean_true"] == pytest.approx(batch["mask"].mean().item()) and heavy["mask"] > plain["mask"]
    losses = [coop_loss(model, prediction, wrapped, LossConfig(mask_pos_weight=weight),
                        torch.Generator().manual_seed(0)) for weight in (1.0, 4.0)]
    assert losses[0]["loss"] < losses[1]["loss"] and 0 < losses[0]["valid_share"] <= 1
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(KiloError): LossConfig(mask_pos_weight=wrong)
    values = make_step(model, samples, PANORAMA.camera(), config())(5, torch.Generator().manual_seed(0))
    assert values["epoch"] == 2.0 and {"mask_mean_predicted", "mask_mean_true", "valid_share"} <= set(values)


def test_every_epoch_prints_its_number_its_steps_and_the_learning_rate(samples, capsys):
    train_coop(make_model(PANORAMA.camera(), config()), samples, PANORAMA.camera(), config(steps=4), None)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert [line.split(":")[0] for line in lines] == ["epoch 1 of 2", "epoch 2 of 2"]
    assert all("2 steps per epoch" in line and "learning rate" in line for line in lines)
    assert EpochReport(replace(config(), steps=7100), 10).every == 8                     # about a hundred lines at most


@pytest.mark.slow
def test_a_run_is_evaluated_and_drawn_by_the_command(run, tmp_path):
    write_opv2v(tmp_path / "town", build_town(), 2, 2, 80, 60, samples=1)
    done = run_here("run", "coop_evaluate", "--data", f"opv2v:{tmp_path / 'town'}", "-p", f"run={run}", "-p",
                    "split=train", "-p", "index=0,-1", "-p", "pose=true", "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout.strip().splitlines()[-1])["results"]
    assert results["samples"] == 2 and results["range_rmse_m"] > 0 and results["pose"] == "true"
    assert len(list((tmp_path / "out" / "predictions").glob("*/summary.json"))) == 2
