"""Flux4D across its modules: clips, lift, network, refinement, training and experiments on a small generated town."""
import gzip
import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers import run_here
from kilonb.core.errors import KiloError
from kilonb.data.tables import read_table, write_table
from kilonb.flux4d.clip_data import ClipOptions, depth_target, load_clip
from kilonb.flux4d.clips import Clip, clips_of
from kilonb.flux4d.evaluation import picture_scores, score_motion, score_views
from kilonb.flux4d.examples import ClipExamples, ExampleOptions
from kilonb.flux4d.lift import LiftOptions, cached_lift, lift, lift_path
from kilonb.flux4d.losses import ClipLossConfig, frame_loss
from kilonb.flux4d.motion import load_moving
from kilonb.flux4d.network import ReconstructionConfig, apply_update, gaussian_gradient
from kilonb.flux4d.render import render_at
from kilonb.flux4d.scene_fit import SceneFitConfig
from kilonb.flux4d.training import (ReconstructionTraining, clip_loss, gradient_loss, make_reconstruction,
                                    reconstruct_clip, start_from_checkpoint, train_reconstruction,
                                    teacher_error)
from kilonb.flux4d.unet import GaussianUpdate
from kilonb.metrics.images import masked_psnr_db, psnr_srgb_db
from kilonb.runs.settings import configure
from kilonb.scenes.boxtown import make_pandaset
from kilonb.training.checkpoints import read_checkpoint
from kilonb.training.loop import latest_path

SMALL = LiftOptions(max_gaussians=3000, sky=4000)
TINY = ReconstructionConfig(channels=(16, 16), blocks=1, hidden=16, refinements=1)


@pytest.fixture(scope="module")
def town(tmp_path_factory):
    """Two sequences of one procedural town, 16 small frames each."""
    root = tmp_path_factory.mktemp("flux4d") / "town"
    make_pandaset(root, sequences=2, frames=16, width=128, height=72, channels=16, steps=360, samples=1, seed=5,
                  cameras=["front_camera"], cars=120, vehicles=2)
    return root


@pytest.fixture(scope="module")
def data(town): return load_clip(town, clips_of(town)[0], ClipOptions(width=128))


@pytest.fixture(scope="module")
def examples(town):
    return ClipExamples(town, clips_of(town).clips, town.parent / "cache", "town",
                        options=ExampleOptions(lifting=SMALL, teacher=True))


@pytest.fixture
def copy(town, tmp_path):
    """A copy of the first sequence that a test may damage."""
    shutil.copytree(town / "001", tmp_path / "001")
    return tmp_path / "001"


def test_the_frames_of_a_clip_share_one_frame_that_is_fixed_to_the_ground(data):
    static = [frame.points[(frame.points[:, 2].abs() < 2)] for frame in (data.frames[0], data.frames[10])]
    spread = torch.cdist(static[1][::40], static[0]).amin(1).median()
    assert spread < .5                                # walls of both sweeps coincide
    assert data.frames[0].camera.position[0].abs() < 3 and data.frames[10].camera.position[0] > 1


@pytest.mark.incident(15)
def test_a_killed_writer_leaves_no_half_file_that_is_read_later(data, tmp_path, monkeypatch):
    path = lift_path(tmp_path, data.clip, "town", data.options, SMALL)
    with monkeypatch.context() as patch:
        def killed(content, target, *args, **kwargs):
            target.write(b"half") if hasattr(target, "write") else Path(target).write_bytes(b"half")
            raise KeyboardInterrupt
        patch.setattr(torch, "save", killed)
        with pytest.raises(KeyboardInterrupt): cached_lift(tmp_path, data, "town", SMALL)
    assert not path.exists()                          # nothing under the final name
    (tmp_path / f"{path.name}.part").write_bytes(b"half of another")
    whole = cached_lift(tmp_path, data, "town", SMALL)
    assert torch.equal(load_moving(path).means, whole.means) and path.suffix == ".pt"
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".npz")]


@pytest.mark.incident(16)
def test_a_masked_score_averages_over_pixels_and_channels(data):
    frame = data.frames[3]
    noisy = (frame.rgb + .1).clamp(0, 1)
    full = torch.ones_like(frame.mask)
    assert masked_psnr_db(noisy, frame.rgb, full) == pytest.approx(psnr_srgb_db(noisy, frame.rgb), abs=1e-9)
    assert picture_scores(noisy, replace(frame, mask=full))["psnr_dynamic_db"] == pytest.approx(
        picture_scores(noisy, frame)["psnr_full_db"])


def test_an_empty_dynamic_mask_gives_no_number_and_is_counted(data):
    still = replace(data, frames=tuple(replace(f, mask=torch.zeros_like(f.mask)) for f in data.frames))
    results, _ = score_views(lift(still, SMALL), still, "lift_", ["interp"])
    assert results["lift_interp_psnr_dynamic_db"] is None and results["lift_interp_psnr_dynamic_db_skipped"] == 5


@pytest.mark.incident(17)
def test_the_refinement_sees_a_gradient_that_is_not_zero(examples):
    example, config = examples[0], ReconstructionTraining(model=TINY)
    gradient = gaussian_gradient(example.gaussians, gradient_loss(example, config))
    seen = gradient.abs().amax(0)
    assert (seen[:3] > 0).all() and (seen[7:] > 0).all() and not gradient.requires_grad
    model = make_reconstruction([example], config)
    results = model(example.network, gradient_loss(example, config))
    assert results[1].means.requires_grad and not torch.equal(results[0].means, results[1].means)


@pytest.mark.incident(18)
def test_gaussians_behind_the_camera_are_counted_and_give_no_infinite_number(data):
    gaussians = lift(data, LiftOptions(max_gaussians=500, sky=0))
    behind = replace(gaussians, means=-gaussians.means - 1)
    both = replace(gaussians, means=torch.where(torch.arange(len(gaussians))[:, None] % 2 == 0, gaussians.means,
                                                behind.means).requires_grad_())
    render = render_at(both, data.frames[0].camera, 0.0, flow=True)
    (render.rgb.sum() + render.depth.sum() + render.velocity.sum()).backward()
    assert render.hidden >= len(gaussians) // 2 - 5 and torch.isfinite(both.means.grad).all()
    assert all(torch.isfinite(part).all() for part in (render.rgb, render.depth, render.velocity))


def test_every_parameter_of_both_networks_gets_a_gradient(examples):
    example, config = examples[0], ReconstructionTraining(model=replace(TINY, order=2), teacher=.1)
    model = make_reconstruction([example], config)
    clip_loss(model, example, [1, 9], config)["loss"].backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_velocities_are_of_the_world_not_of_the_vehicle(data):
    """A gaussian at rest stays on its pixel's ray although the vehicle drives."""
    gaussians = lift(data, LiftOptions(max_gaussians=200, sky=0))
    moved = apply_update(gaussians, GaussianUpdate(torch.zeros(len(gaussians), 14), torch.zeros(len(gaussians), 1, 3)))
    first, last = (render_at(moved, data.frames[k].camera, data.frames[k].camera_time_s, flow=True) for k in (0, 15))
    assert first.velocity.abs().max() == 0 and last.velocity.abs().max() == 0
    assert (first.rgb - last.rgb).abs().max() > .05   # the picture changes by the motion of the camera alone


def test_an_interrupted_training_ends_with_the_same_weights(examples, tmp_path):
    config = ReconstructionTraining(steps=6, views=1, model=replace(TINY, refinements=0), log_every_steps=2, teacher=.1)
    whole = make_reconstruction(examples, config)
    train_reconstruction(whole, examples, config, tmp_path / "whole", quiet=True)
    part = make_reconstruction(examples, config)

    class Stop(list):
        """The examples, and Ctrl-C at the fourth drawing."""
        def __init__(self): super().__init__(examples), setattr(self, "drawn", 0)

        def __getitem__(self, number):
            self.drawn += 1
            if self.drawn == 4: raise KeyboardInterrupt
            return super().__getitem__(number)

    with pytest.raises(KeyboardInterrupt): train_reconstruction(part, Stop(), config, tmp_path / "part", quiet=True)
    assert read_checkpoint(latest_path(tmp_path / "part"))["step"] == 3
    resumed = make_reconstruction(examples, config)
    result = train_reconstruction(resumed, examples, config, tmp_path / "part", resume=True, quiet=True)
    assert result.resumed_from == 3
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))


def test_a_training_that_a_time_limit_stopped_goes_on_with_another_limit(examples, tmp_path):
    config = ReconstructionTraining(steps=3, views=1, model=replace(TINY, refinements=0), log_every_steps=1,
                                    time_limit_s=1e-4)
    model = make_reconstruction(examples, config)
    assert train_reconstruction(model, examples, config, tmp_path, quiet=True).steps == 1
    longer = replace(config, time_limit_s=0.0, keep_every_steps=2)
    result = train_reconstruction(model, examples, longer, tmp_path, resume=True, quiet=True)
    assert (result.resumed_from, result.steps) == (1, 3)


def test_a_checkpoint_starts_a_model_without_its_optimiser(examples, tmp_path):
    config = ReconstructionTraining(steps=2, views=1, model=TINY, keep_every_steps=2)
    model = make_reconstruction([examples[0]], config)
    train_reconstruction(model, [examples[0]], config, tmp_path, quiet=True)
    other = make_reconstruction([examples[0]], replace(config, model=replace(TINY, seed=3)))
    start_from_checkpoint(other, tmp_path / "checkpoints" / "step_000002.pt")
    assert torch.equal(reconstruct_clip(model, examples[0], config).means,
                       reconstruct_clip(other, examples[0], config).means)


def test_zero_flow_and_class_counts_stand_beside_every_flow_score(examples):
    scores = score_motion(examples[0].gaussians, examples[0].data, "lift_")
    assert scores["lift_flow_epe_fd_m"] == scores["lift_flow_epe_fd_m_zero_flow"] > .05
    assert scores["lift_flow_points_car"] > 0 and scores["lift_flow_points_bg"] > scores["lift_flow_points_car"]


def test_the_voxel_flow_lowers_the_error_of_zero_flow_on_a_sparse_lidar(examples):
    example = examples[0]
    moved = replace(example.gaussians, velocities=example.teacher[:, None])
    zero, flow = (score_motion(g, example.data)["flow_epe_fd_m"] for g in (example.gaussians, moved))
    assert flow < .85 * zero, (flow, zero)


@pytest.mark.parametrize("part, word", [("lidar/05.pkl.gz", "lidar of frame 05 is missing"),
                                        ("camera/front_camera/05.jpg", "front_camera of frame 05 is missing")])
def test_a_missing_file_is_named_with_its_clip_and_frame(copy, part, word):
    (copy / part).unlink()
    clip = Clip("001_a", "001", tuple(range(16)), (0, 2, 4, 6, 8, 10), (1, 3, 5, 7, 9))
    with pytest.raises(KiloError, match=word) as caught: load_clip(copy, clip)
    assert "001_a" in str(caught.value)


def test_a_malicious_pickle_in_place_of_a_sweep_is_refused(copy, tmp_path):
    class Attack:
        def __reduce__(self): return (open, (str(tmp_path / "owned"), "w"))
    (copy / "lidar" / "04.pkl.gz").write_bytes(gzip.compress(pickle.dumps(Attack())))
    clip = Clip("001_a", "001", tuple(range(11)), (0, 2, 4, 6, 8, 10), (1, 3, 5, 7, 9))
    with pytest.raises(KiloError, match="001_a"): load_clip(copy, clip)
    assert not (tmp_path / "owned").exists()


def test_time_stamps_that_do_not_increase_are_refused(copy):
    path = copy / "camera" / "front_camera" / "timestamps.json"
    times = json.loads(path.read_text())
    times[6] = times[5]
    path.write_text(json.dumps(times))
    clip = Clip("001_a", "001", tuple(range(16)), (0, 2, 4, 6, 8, 10))
    with pytest.raises(KiloError, match=r"(?i)front_camera.*(increas|after)"): load_clip(copy, clip)


def test_a_clip_of_another_sequence_is_refused(copy):
    clip = Clip("002_a", "002", tuple(range(16)), (0, 2, 4, 6, 8, 10))
    with pytest.raises(KiloError, match="002"): load_clip(copy, clip)


def test_losses_agree_with_float64(data):
    frame = data.frames[2]
    target = depth_target(frame)
    gaussians = lift(data, SMALL)
    render = render_at(gaussians, frame.camera, frame.camera_time_s)
    single = frame_loss(render, frame.rgb, target, ClipLossConfig())["loss"]
    double = frame_loss(render._replace(rgb=render.rgb.double(), depth=render.depth.double()), frame.rgb.double(),
                        target, ClipLossConfig())["loss"]
    assert single.item() == pytest.approx(double.item(), rel=1e-4)


def _run(experiment, folder, *parameters):
    done = run_here("run", experiment, "--out", folder, *(part for p in parameters for part in ("-p", p)))
    assert done.returncode in (0, 2, 3), done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads((folder / "results.json").read_text())["results"]


def test_flux4d_overfit_runs_from_the_command_line(town, tmp_path):
    results = _run("flux4d_overfit", tmp_path / "run", f"data=pandaset:{town}", "steps=2", "refine_steps=3",
                   "max_gaussians=3000", "width=128", "reconstruction_training.model.channels=[16,16]",
                   "example.lifting.sky=4000")
    assert results["refined_interp_psnr_full_db"] > 8 and results["network_flow_points"] > 0
    assert {"static_gaussians.pt", "network_gaussians.pt", "refined_gaussians.pt", "time_lapse.mp4"} <= {
        path.name for path in (tmp_path / "run").iterdir()}


def test_flux4d_train_holds_out_whole_sequences_and_looks_at_a_snippet(town, tmp_path):
    results = _run("flux4d_train", tmp_path / "run", f"data=pandaset:{town}", "held_out=1", "steps=2", "views=1",
                   "least_dynamic=0", "max_gaussians=3000", "width=128", f"snippet=pandaset:{town / '001'}",
                   "finetune_s=1", "reconstruction_training.model.channels=[16,16]", "keep_every_steps=2",
                   "example.lifting.sky=4000")
    assert results["training_clips"] == 1 and results["clips"] == 1
    assert results["zero_shot_interp_psnr_full_db"] > 8 and results["finetuned_interp_psnr_full_db"] > 8
    assert (tmp_path / "run" / "checkpoints" / "step_000002.pt").is_file()


def _refused(experiment, folder, *parameters):
    """The last sentence of a run that must fail."""
    done = run_here("run", experiment, "--out", folder, *(part for p in parameters for part in ("-p", p)))
    assert done.returncode == 1, done.stdout[-2000:]
    return (done.stdout + done.stderr).partition("kilonb: ")[2].splitlines()[0]


def test_a_parameter_out_of_range_ends_in_one_sentence(town, tmp_path):
    sentence = _refused("flux4d_overfit", tmp_path / "run", f"data=pandaset:{town}", "refine_start=typo")
    assert "refine_start" in sentence and "Error" not in sentence
    for make, word in ((lambda: ExampleOptions(start="typo"), "start must be one of"),
                       (lambda: SceneFitConfig(steps=-2), "steps"),
                       (lambda: ReconstructionTraining(loss=ClipLossConfig(depth=-1.0)), "depth is -1")):
        with pytest.raises(KiloError, match=word): configure(make(), {})


def test_clips_without_labels_are_trained_on_and_have_no_scores_of_motion(town, tmp_path):
    shutil.copytree(town, tmp_path / "town", ignore=shutil.ignore_patterns("annotations"))
    results = _run("flux4d_train", tmp_path / "run", f"data=pandaset:{tmp_path / 'town'}", "held_out=1", "steps=2",
                   "views=1", "max_gaussians=2000", "width=128", "keep_every_steps=0", "time_limit_s=0.001",
                   "reconstruction_training.model.channels=[16,16]")
    assert results["clips"] == 1 and results["network_psnr_full_db"] > 8 and results["network_psnr_dynamic_db"] is None
    assert not [name for name in results if "flow" in name]


def test_a_picture_of_another_size_than_its_intrinsics_is_refused(copy):
    from PIL import Image
    path = copy / "camera" / "front_camera" / "04.jpg"
    Image.open(path).resize((64, 36)).save(path)
    with pytest.raises(KiloError, match="frame 04 has 64 x 36"): load_clip(copy, clips_of(copy)[0])


@pytest.mark.parametrize("rows, word", [(0, "frame 04 holds no point"), (9, "holds 1 points that are not finite")])
def test_an_empty_sweep_and_points_that_are_not_finite_are_refused(copy, rows, word):
    path = copy / "lidar" / "04.pkl.gz"
    table = {name: values[:rows].copy() for name, values in read_table(path).items()}
    table["x"][:1] = float("nan")
    write_table(path, table)
    with pytest.raises(KiloError, match=word): load_clip(copy, clips_of(copy)[0])


def test_a_sequence_without_a_whole_clip_names_the_missing_frame(copy):
    (copy / "lidar" / "05.pkl.gz").unlink()
    with pytest.raises(KiloError, match="lidar of frame 05 of 001 is missing"): clips_of(copy)


def test_the_teacher_counts_the_velocity_at_the_time_of_measurement(examples):
    example = examples[0]
    gaussians, teacher = example.gaussians, example.teacher
    motion = torch.stack([teacher - gaussians.times_s[:, None], torch.ones_like(teacher)], 1)     # v0 + v1 t = teacher
    assert teacher_error(replace(gaussians, velocities=motion), example) < 1e-5
