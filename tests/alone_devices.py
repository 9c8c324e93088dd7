"""Every system takes training steps on a device that is not the CPU, with the CPU's numbers, and with no tensor made
without a device and no read on the host in a step. The device is the simulated one: it needs no GPU, and says nothing
about CUDA's own kernels."""
import json
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from kilonb.training import loop
from kilonb.training.simulated_device import simulated_device
from kilonb.training.strict_devices import strict_devices

# Functions whose calls are no faults, with the reason.
ALLOWED = {
    "_finite_gradients",                                   # one number per step decides whether the step is taken
    "to_device", "sample", "make_batch", "training_columns",   # a batch of host data, and its random numbers
    "spanning_tree_poses",                                 # Prim's algorithm over a few vehicles runs on the host
    "composite_tiles",                                     # plain-torch rasteriser: how many gaussians each tile has
    "choose_voxels",                                       # the number of gaussians decides the shapes that follow
    "gaussians_of", "move_gaussians", "draw_animals", "_target",     # a frame's pose, cameras and pictures
    "render_at",                                           # counts gaussians behind the camera
    "group_by_network",                                    # the plain-torch networks are arranged by the host
    "draw_by_weight", "sample_features",                   # how many samples of features are drawn
    "to_padded", "_lattice",                               # the longest ray decides the size of the padded tables
}


@cache
def scratch() -> Path:
    return Path(tempfile.mkdtemp())


@contextmanager
def strict_steps(faults: list):
    """Every step of `training.loop` but the first is watched; what it finds is appended to `faults`."""
    original = loop._take_step

    def step(run, function):
        if run.state.step == 0: return original(run, function)
        with strict_devices(run.generator.device, allowed=ALLOWED, raises=False) as mode: original(run, function)
        faults.extend(mode.faults)

    loop._take_step = step
    try: yield
    finally: loop._take_step = original


def cooperative(device) -> float:
    import test_coop
    from kilonb.coop.training import make_model, predict, train_coop

    config = test_coop.config(steps=2, mirror=True, roll_views=True)
    model = make_model(test_coop.CAMERA, config).to(device)
    samples = [test_coop.sample(number, 2 + number % 2) for number in range(3)]
    result = train_coop(model, samples, test_coop.CAMERA, config, quiet=True)
    assert predict(model, samples[:2]).pose_to_main.device.type == "cpu"      # scored beside samples of the CPU
    return result.records[-1]["loss"]


def brickyard() -> Path:
    from kilonb.scenes.brickyard import write_brickyard

    folder = scratch() / "brickyard"
    if not folder.exists(): write_brickyard(folder, width=32, height=32, train=4, test=2, count=4000)
    return folder


def teacher(device, strategy: str = "default") -> float:
    from kilonb.scenes.blender import load_blender
    from kilonb.splats.fit import fit_gaussians
    from kilonb.splats.fit_config import FitConfig, MCMCStrategy

    config = FitConfig(steps=6, maximum_count=300, means_rate=4e-4, grow_every_steps=2, initial_count=150,
                       evaluate_every_steps=3)
    if strategy == "mcmc": config = replace(config, strategy=MCMCStrategy())
    result = fit_gaussians(load_blender(brickyard(), "train"), config, quiet=True, device=device)
    return result.records[-1]["loss"]


def mcmc(device) -> float: return teacher(device, "mcmc")


@cache
def clip():
    from kilonb.flux4d.clips import clips_of
    from kilonb.flux4d.examples import ClipExamples, ExampleOptions
    from kilonb.flux4d.lift import LiftOptions
    from kilonb.scenes.boxtown import make_pandaset

    town = scratch() / "town"
    make_pandaset(town, sequences=1, frames=16, width=64, height=40, channels=16, steps=360, samples=1, seed=5,
                  cameras=["front_camera"], cars=120, vehicles=2)
    options = ExampleOptions(lifting=LiftOptions(max_gaussians=200, sky=60), teacher=True)
    make = lambda device: ClipExamples(town, clips_of(town).clips[:1], scratch() / "cache", "town", options=options,
                                       device=device)
    make("cpu")[0]
    return make


def flux4d_network(device) -> float:
    from kilonb.flux4d.network import ReconstructionConfig
    from kilonb.flux4d.training import ReconstructionTraining, make_reconstruction, train_reconstruction

    examples = [clip()(device)[0]]
    config = ReconstructionTraining(steps=2, teacher=.1, log_every_steps=1, views=1, gradient_views=1,
                                    model=ReconstructionConfig(channels=(16, 16), blocks=1, hidden=16, refinements=1))
    model = make_reconstruction(examples, config, device)
    return train_reconstruction(model, examples, config, quiet=True).records[-1]["loss"]


def flux4d_fit(device) -> float:
    from kilonb.flux4d.scene_fit import SceneFitConfig, fit_scene

    example = clip()(device)[0]
    return fit_scene(example.gaussians, example.data, SceneFitConfig(steps=2), quiet=True)[1].records[-1]["loss"]


def pose(device) -> float:
    from kilonb.pose.model import PoseConfig
    from kilonb.pose.toy_recordings import write_toy_recording
    from kilonb.pose.training import PoseTraining, make_pose_model, train_pose

    prepared = write_toy_recording(Path(tempfile.mkdtemp()) / "toy.zarr", 4)
    config = PoseTraining(steps=2, model=PoseConfig(stages=3, widths=(8, 16), bottleneck=16, min_gaussians=64))
    model = make_pose_model(prepared, config, device)
    return train_pose(model, prepared, config, quiet=True).training.records[-1]["loss"]


def world_model(device) -> float:
    from kilonb.dream.episodes import collect
    from kilonb.dream.replay import Replay
    from kilonb.dream.training import WorldModelTraining, train_world_model
    from kilonb.dream.world_model import WorldModel, WorldModelConfig

    replay = Replay(Path(tempfile.mkdtemp()))
    for episode in collect("three", "scripted", 2, length=40, seed=0, noise=.2): replay.add(episode)
    config = WorldModelTraining(steps=2, batch=2, sequence=4, log_every_steps=1,
                                model=WorldModelConfig("tiny", precision="float32"))
    torch.manual_seed(0)
    return train_world_model(WorldModel(config.model).to(device), replay, config, quiet=True).records[-1]["loss"]


def agent(device) -> float:
    import test_pinpad_agent as pinpad
    from kilonb.dream.agent import train_agent

    torch.manual_seed(0)
    config = pinpad.agent_config(steps=2)
    model = pinpad.WorldModel(pinpad.TINY).to(device)
    actor = pinpad.ActorCritic(model.rssm.outputs, 5, config.policy).to(device)
    result = train_agent(model, actor, "three", config, Path(tempfile.mkdtemp()), False, quiet=True)
    return result.records[-1]["loss"]


def abstraction(device) -> float:
    from kilonb.dream.episodes import collect
    from kilonb.dream.vta import CONDITIONS, VTAConfig
    from kilonb.dream.vta_training import VTATraining, make_vta, train_vta

    episodes = collect("three", "scripted", 2, length=40, seed=0, noise=.2)
    sizes = dict(components=16, units=16, belief=8, hidden=8, abstraction=4, state=2)
    config = VTATraining(steps=2, batch=2, sequence=8, log_every_steps=1, fit_frames=40, explore=.25, place=.25,
                         model=VTAConfig(**sizes, **CONDITIONS["rated"]))
    return train_vta(make_vta(episodes, config, device), episodes, config, quiet=True).records[-1]["loss"]


def student(device, kind: str = "kilonerf", terms=None) -> float:
    import test_fields
    from kilonb.distill.rays import RayPool
    from kilonb.distill.space import occupancy_of_gaussians
    from kilonb.distill.student import DistillConfig, distill, make_student
    from kilonb.fields.kilonerf import KiloNeRFConfig
    from kilonb.imaging.targets import targets_from_teacher
    from kilonb.scenes.blender import load_blender
    from kilonb.splats.ply import read_ply
    from kilonb.training.loop import LoopConfig

    gaussians = read_ply(brickyard() / "teacher.ply").to(device)
    frames = list(load_blender(brickyard(), "train"))[:2]
    targets = targets_from_teacher(gaussians, [(frame.name, frame.camera.to(device)) for frame in frames])
    grid = occupancy_of_gaussians(gaussians, 20)
    shapes = test_fields.CONFIGS | {"kilonerf": KiloNeRFConfig(cell_size=0.4, position_frequencies=3, hidden=16)}
    made = make_student(grid, shapes[kind], 0.05)
    config = DistillConfig(rays=48, loop=LoopConfig(steps=3, learning_rate=5e-3, warmup_steps=1, log_every_steps=1))
    terms = terms(made, gaussians) if terms else ()
    result = distill(made, RayPool(targets, grid, 0.05), config, terms=terms, quiet=True)
    assert made.render(targets[0].camera).alpha.device.type == torch.device(device).type
    return result.records[-1]["loss"]


def features(device) -> float:
    from kilonb.distill.features import FeatureConfig, feature_terms
    from kilonb.splats.lookup import GaussianLookup

    make = lambda made, gaussians: feature_terms(FeatureConfig())(4)(made, GaussianLookup(gaussians, minimum_scale=.02))
    return student(device, terms=make)


def scene(device) -> float:
    """All stages: a coarse student, points, rays with scored views."""
    from kilonb.distill.data import DistillationData
    from kilonb.distill.multiview import TeachingConfig, teach
    from kilonb.distill.points import PointsConfig
    from kilonb.distill.student import DistillConfig
    from kilonb.scenes.blender import load_blender
    from kilonb.splats.ply import read_ply
    from kilonb.training.loop import LoopConfig

    views = [(frame.name, frame.camera) for frame in load_blender(brickyard(), "train")]
    data = DistillationData(read_ply(brickyard() / "teacher.ply"), [], views[:3], views[3:], [], 0.0, "built")
    loop = LoopConfig(steps=3, learning_rate=5e-3, warmup_steps=1, log_every_steps=1, evaluate_every_steps=3)
    config = TeachingConfig(cells=3, march_steps=24, voxels=20, coarse_cells=2, coarse_steps=2, targets="teacher",
                            network={"position_frequencies": 3, "hidden": 16},
                            points=PointsConfig(bank=300, points=60, loop=LoopConfig(2, warmup_steps=0)),
                            rays=DistillConfig(48, evaluate_views=1, loop=loop))
    result = teach(data, config, quiet=True, device=device)
    assert result.rays.records[-1]["test_psnr_vs_teacher_db"] > 0
    return result.rays.records[-1]["loss"]


def mlp(device) -> float: return student(device, "mlp")


def hash_grid(device) -> float: return student(device, "hashgrid")


SYSTEMS = (cooperative, teacher, mcmc, flux4d_network, flux4d_fit, pose, world_model, agent, abstraction, student, mlp,
           hash_grid, features, scene)


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.__name__)
def test_a_training_step_is_on_one_device_and_reads_nothing_on_the_host(system):
    faults = []
    with simulated_device() as device, strict_steps(faults): loss = system(device)
    assert loss == loss and abs(loss) < 1e6
    own = [fault for fault in faults if f"{Path('kilonb')}/" in fault.file]
    assert not own, "\n".join(sorted({str(fault) for fault in own}))


@pytest.mark.parametrize("system", (world_model, flux4d_fit, mlp), ids=lambda system: system.__name__)
def test_another_device_computes_what_the_cpu_does(system):
    with simulated_device() as device: there = system(device)
    here = system("cpu")
    assert abs(there - here) < 1e-3 * abs(here)


def test_the_strict_mode_finds_a_fault_in_a_step():
    """The guard of this file: a step with each kind of fault is not passed."""
    faults = []
    parameter = None

    def step(number, generator):
        chosen = torch.arange(3)
        value = float(parameter.sum())
        factor = parameter.cpu().sum().item() * chosen.sum().to(parameter.device)
        return {"loss": parameter.square().sum() * value + factor}

    with simulated_device() as device, strict_steps(faults):
        parameter = torch.nn.Parameter(torch.ones(3, device=device))
        loop.train(step, torch.optim.Adam([parameter]), loop.LoopConfig(2, warmup_steps=0), quiet=True)
    assert {fault.kind for fault in faults} == {"factory", "scalar", "download"}
    assert {fault.function for fault in faults} == {"step"}


def test_every_experiment_has_a_device():
    folder = Path(__file__).resolve().parent.parent / "nbs" / "experiments"
    without = [path.stem for path in sorted(folder.glob("*.ipynb")) if "device: str" not in path.read_text("utf-8")]
    assert not without


def test_the_gpu_check_says_that_there_is_no_gpu_and_measures_on_the_cpu(tmp_path):
    tool, out = Path(__file__).resolve().parent.parent / "tools" / "gpu_check.py", tmp_path / "result.json"
    if not torch.cuda.is_available():
        refused = subprocess.run([sys.executable, tool, "--out", out], capture_output=True, text=True)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and not out.exists()
    dry = subprocess.run([sys.executable, tool, "--out", out, "--dry-run", "--only", "kernels,steps,rasterizer"],
                         capture_output=True, text=True)
    assert dry.returncode == 0, dry.stdout + dry.stderr
    parts = json.loads(out.read_text())["parts"]
    assert set(parts) == {"kernels", "steps", "rasterizer"} and parts["steps"]["measured"]["steps_per_s"] > 0
    assert parts["kernels"]["measured"]["gradient_difference"] < 1e-3
