"""The animal's model: gradients, a run from the command line, resumption, continuation, bad input."""
from dataclasses import replace

import pytest
import torch
from helpers import run_here

from kilonb.core.errors import KiloError
from kilonb.pose.carve import carve
from kilonb.pose.model import PoseConfig, PoseModel, draw_animals
from kilonb.pose.prepare import PrepareConfig, prepared_of
from kilonb.pose.refine import RefineConfig, animal_predictor
from kilonb.pose.scores import CarvingVariant, score_recording, summarise_scores
from kilonb.pose.toy_recordings import write_toy_recording
from kilonb.pose.training import PoseTraining, load_pose, make_pose_model, make_pose_step
from kilonb.runs.records import read_run
from kilonb.scenes.critter import CritterConfig, write_critter

SMALL = PoseConfig(stages=3, widths=(8, 16), bottleneck=16, min_gaussians=64)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return write_toy_recording(tmp_path_factory.mktemp("toy") / "toy.zarr", 6)


@pytest.mark.incident(24)
@pytest.mark.parametrize("residual", ["true", "published"])
def test_every_parameter_of_the_animal_model_gets_a_gradient_but_in_the_published_stack(prepared, residual):
    """The published stack overwrites its first stages' outputs by their inputs: they learn nothing."""
    model = make_pose_model(prepared, PoseTraining(model=replace(SMALL, residual=residual)))
    rgb, masks = prepared.pictures(0)
    gaussians = model(carve(rgb, masks, prepared.cameras, prepared.grid, prepared.centres[0], prepared.headings[0]))
    drawn, alpha = draw_animals(gaussians, prepared.cameras)
    ((drawn - rgb).abs().sum() + (alpha - masks).abs().sum()).backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
    if residual == "true": assert not idle
    else: assert {name.split(".")[2] for name in idle} == {"0", "1"}, "stages 0 and 1 learn nothing"


def test_a_frame_without_an_animal_in_the_inputs_gives_gaussians_that_are_finite(prepared):
    model = make_pose_model(prepared, PoseTraining(model=SMALL))
    rgb, masks = prepared.pictures(0)
    volume = carve(rgb, torch.zeros_like(masks), prepared.cameras, prepared.grid, prepared.centres[0])
    gaussians = model(volume)
    assert len(gaussians) == SMALL.min_gaussians and all(t.isfinite().all() for t in gaussians.parameters().values())
    assert not volume.occupied(1).any()


def test_the_number_of_gaussians_stays_between_its_limits(prepared):
    rgb, masks = prepared.pictures(0)
    volume = carve(rgb, masks, prepared.cameras, prepared.grid, prepared.centres[0], prepared.headings[0])
    counts = [len(PoseModel(replace(SMALL, min_gaussians=low, max_gaussians=high), prepared.grid)(volume))
              for low, high in ((1, 50), (5000, 6000))]
    assert counts == [50, 5000]


def test_two_cameras_are_enough_and_one_is_refused(prepared):
    model = make_pose_model(prepared, PoseTraining(model=SMALL))
    assert len(animal_predictor(model, RefineConfig(steps=2))(prepared, 0, [0, 2])) >= SMALL.min_gaussians
    with pytest.raises(KiloError, match="needs at least 2"): animal_predictor(model)(prepared, 0, [1])


def test_data_parallel_training_draws_other_frames_on_each_rank(prepared, monkeypatch):
    from kilonb.training.parallel import World

    seen = []

    class Store:
        def __init__(self, prepared): pass

        def __getitem__(self, i):
            seen.append(i)
            raise KeyError

    monkeypatch.setattr("kilonb.pose.training.FrameStore", Store)
    config = PoseTraining(model=SMALL)
    for rank in (0, 1):
        step = make_pose_step(make_pose_model(prepared, config), prepared, [0, 1, 2, 3], config, World(rank, 2))
        for number in (0, 1):
            with pytest.raises(KeyError): step(number, torch.Generator())
    assert sorted(seen) == [0, 1, 2, 3]


OPTIONS = {"every": 1, "downsample": 1.0, "resolution": 32, "steps": 6, "refine_steps": 2, "score_every": 2,
           "precision": "float32", "pose_training.model.widths": "[8,16]", "pose_training.model.bottleneck": 16,
           "prepare.coarse": 32}


def run(folder, *more, **options):
    parameters = [part for name, value in {**OPTIONS, **options}.items() for part in ("-p", f"{name}={value}")]
    return run_here("run", "pose_train", "--data", f"dannce:{folder / 'critter'}", *more, *parameters,
                    environment={"KILONB_OUTPUTS": str(folder / "outputs")})


@pytest.mark.incident(23)
def test_the_scores_of_a_run_are_those_of_its_saved_model(tmp_path):
    """Scores are computed from drawn pictures: scoring the saved model again gives the numbers of results.json."""
    write_critter(tmp_path / "critter", CritterConfig(frames=9, cameras=4, width=128, height=96))
    first = run(tmp_path, "--out", str(tmp_path / "first"))
    assert first.returncode in (0, 1) and "Traceback" not in first.stdout + first.stderr, first.stdout + first.stderr
    record = read_run(tmp_path / "first")
    assert record.status == "finished", record
    results = record.results
    prepared = prepared_of(tmp_path / "critter",
                           PrepareConfig(every=1, downsample=1.0, resolution=32, margin=.03, coarse=32,
                                         validation=False), tmp_path / "outputs/data/pose")
    model = load_pose(tmp_path / "first")
    rows = score_recording(animal_predictor(model), prepared, list(prepared.split("test"))[::2],
                           variants=[CarvingVariant(prepared.grid, 0)])
    again = summarise_scores(rows)
    assert all(again[name] == pytest.approx(results[name], abs=1e-6) for name in ("heldout_iou", "heldout_l1"))
    more = run(tmp_path, "--out", str(tmp_path / "more"), continue_run=tmp_path / "first")
    assert more.returncode in (0, 1) and "Traceback" not in more.stdout + more.stderr, more.stdout + more.stderr
    other = run(tmp_path, "--out", str(tmp_path / "other"), continue_run=tmp_path / "first", residual="published")
    assert other.returncode == 1 and "give the same settings" in other.stdout + other.stderr
