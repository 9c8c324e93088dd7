"""Checks KiloNB on a machine with a GPU, in one command of a few minutes, and writes one result file.

    python tools/gpu_check.py --out gpu_check.json                   # on a bare machine with torch and a GPU
    python tools/gpu_check.py --out gpu_check.json --minutes 8       # less time: later parts are left out
    python tools/gpu_check.py --out gpu_check.json --dry-run         # the same plan, tiny, on the CPU

Each part is a process of its own with a time limit; a part that fails or takes too long does not end the others. The
file is written after every part: `parts` holds the status, seconds and last lines of each, and what it measured; of an
experiment these are the numbers of its results. The student whose frames are measured is the one that the part
multi_view_response has trained, of lego where KILONB_DATA has it, else of the stand-in. Without a GPU the command ends
with one sentence and status 2.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kilonb.core.documents import read_object
from kilonb.core.errors import KiloError
from kilonb.core.files import write_json
from kilonb.runs.environment import checkout_root, describe_environment

MARK = "GPU_CHECK "
KILONB = (sys.executable, "-c", "import sys; from kilonb.cli.main import main; sys.exit(main())")


class Part(NamedTuple):
    """One part of the plan. command: its process. limit_s: after which it is stopped. run: folder of an experiment."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    run: Path | None = None


def _snippet(name: str, limit_s: float, device: str, tiny: bool, folder: Path) -> Part:
    """A measurement of this file."""
    return Part(name, (sys.executable, str(Path(__file__).resolve()), "--measure", name, "--device", device,
                       "--folder", str(folder), *(["--tiny"] if tiny else [])), limit_s)


def _experiment(name: str, limit_s: float, device: str, parameters: Sequence[str], folder: Path) -> Part:
    """An experiment of the checkout. parameters: of the form name=value."""
    given = [*parameters, f"device={device}"]
    command = (*KILONB, "run", name, "--out", str(folder / name), *(word for one in given for word in ("-p", one)))
    return Part(name, command, limit_s, folder / name)


def _lego() -> list[str]:
    """The parameter that names lego, where KILONB_DATA holds it; without it the stand-in is used."""
    root = os.environ.get("KILONB_DATA")
    return [f"data=blender:{root}/lego_400"] if root and Path(root, "lego_400").is_dir() else []


TINY = {
    "single_view_overfit": "steps=6 rays=256 resolution=64 occupancy_resolution=48 march_step_m=0.03 cell_size_m=0.3 "
                           "hidden=16",
    "teacher": "steps=4 resolution=64 initial_count=1000 maximum_count=3000 test_views=2 curve_views=1 orbit_views=2 "
               "orbit_width=64 lpips_every=0",
    "multi_view_response": "steps=6 points_steps=4 rays=256 cells=6 views=4 test_views=2 resolution=64 lpips_every=100 "
                           "teaching.march_steps=60 teaching.voxels=32 policy=off",
    "coop_overfit": "data=boxtown_opv2v frames=2 steps=2 batch_size=1 width=128 height=32 most_vehicles=2",
    "pinpad_world_model": "data=pinpad_small steps=2 size=tiny batch=2 sequence=4 test_episodes=1 context=4 horizon=3",
    "flux4d_overfit": "steps=2 width=96 max_gaussians=500 views=1 refine_steps=2",
    "pose_train": "data=critter_small steps=2 every=4 downsample=1 resolution=32 refine_steps=1 score_every=2 "
                  "precision=float32 pose_training.model.widths=[8,16] pose_training.model.bottleneck=16",
}
SMALL = {
    "single_view_overfit": "steps=1500",
    "teacher": "steps=1500 test_views=8 lpips_every=0",
    "multi_view_response": "steps=2000 points_steps=400 test_views=8 lpips_every=1000 teacher_steps=1500 "
                           "teacher_count=30000 policy=off",
    "coop_overfit": "data=boxtown_opv2v frames=4 steps=200",
    "pinpad_world_model": "data=pinpad_small steps=500 size=small batch=24 test_episodes=4",
    "flux4d_overfit": "steps=100 width=240 max_gaussians=40000 refine_steps=50",
    "pose_train": "data=critter_small steps=300 score_every=6",
}
PICTURES = ("single_view_overfit", "teacher", "multi_view_response")      # experiments on pictures of an object


def make_plan(device: str, tiny: bool, folder: Path) -> list[Part]:
    """The parts in the order of their worth, so that those that no time is left for are the least of them."""
    measure = lambda name, limit_s: _snippet(name, limit_s, device, tiny, folder)
    pictures, parameters = [] if tiny else _lego(), TINY if tiny else SMALL
    run = lambda name, limit_s: _experiment(
        name, limit_s, device, [*parameters[name].split(), *(pictures if name in PICTURES else [])], folder)
    tests = (sys.executable, "-m", "pytest", "tests", "-q", "-m", "gpu", "--no-header",
             *(["--collect-only"] if tiny else []))
    plan = [measure("kernels", 60), measure("rasterizer", 60), run("single_view_overfit", 90),
            run("multi_view_response", 180), measure("student_frames", 60), run("teacher", 90), measure("steps", 45),
            Part("gpu_tests", tests, 90), run("pinpad_world_model", 90), run("coop_overfit", 150),
            run("flux4d_overfit", 120), run("pose_train", 90)]
    return [part._replace(limit_s=2 * part.limit_s) for part in plan] if tiny else plan      # a CPU with other work


def _seconds(function: Any, device: str, repeats: int = 10) -> float:
    """Median seconds of a call, after one that is not counted."""
    import torch

    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[repeats // 2]


def _networks(count: int, tiny: bool) -> tuple[Any, ...]:
    """(layout, parameters, network, local, directions) of KiloNeRF networks, on the CPU."""
    import torch

    from kilonb.fields.kernels import NetworkLayout

    draw, cells = torch.Generator().manual_seed(0), 8 if tiny else 1000
    layout = NetworkLayout(4, 2, 16, False) if tiny else NetworkLayout(10, 4, 32, False)
    return (layout, 0.2 * torch.randn(cells, layout.size, generator=draw),
            torch.randint(cells, (count,), generator=draw), 2 * torch.rand(count, 3, generator=draw) - 1,
            torch.nn.functional.normalize(torch.randn(count, 3, generator=draw), dim=-1))


def measure_kernels(device: str, tiny: bool, folder: Path) -> dict[str, float]:
    """The fused network kernels of both devices against each other: differences, and samples per second."""
    import torch

    from kilonb.fields.kernels import run_networks
    from kilonb.fields.triton_networks import run_networks_triton, triton_ready

    layout, networks, *inputs = _networks(256 if tiny else 400_000, tiny)
    here = run_networks(networks, layout, *inputs)
    found = {"triton": float(triton_ready(networks.to(device))), "samples": float(len(here))}
    moved = [tensor.to(device) for tensor in (networks, *inputs)]
    run = run_networks_triton if found["triton"] else run_networks if device == "cpu" else None
    if run is None: return found
    leaf = moved[0].requires_grad_()
    out = run(leaf, layout, *moved[1:])
    own = networks.clone().requires_grad_()
    theirs = torch.autograd.grad(run_networks(own, layout, *inputs).square().sum(), own)[0]
    ours = torch.autograd.grad(out.square().sum(), leaf)[0].cpu()
    found["largest_difference"] = (out.detach().cpu() - here).abs().max().item()
    found["gradient_difference"] = ((ours - theirs).norm() / theirs.norm()).item()
    with torch.no_grad(): found["samples_per_s"] = len(here) / _seconds(lambda: run(leaf, layout, *moved[1:]), device)
    return found


def measure_rasterizer(device: str, tiny: bool, folder: Path) -> dict[str, float]:
    """A picture of the benchmark's ball on the device, by gsplat where it runs, against the CPU's."""
    from kilonb.splats.benchmark import benchmark_scene
    from kilonb.splats.rasterizer import render_gaussians

    ball, camera = benchmark_scene(500 if tiny else 30_000, 48 if tiny else 400, 48 if tiny else 400)
    moved, view = ball.to(device), camera.to(device)
    here, there = render_gaussians(ball, camera), render_gaussians(moved, view)
    difference = (there.rgb_premultiplied.cpu() - here.rgb_premultiplied).abs()
    repeats = 2 if tiny else 10
    return {"mean_difference": difference.mean().item(), "largest_difference": difference.max().item(),
            "cpu_ms": 1e3 * _seconds(lambda: render_gaussians(ball, camera), "cpu", repeats),
            "device_ms": 1e3 * _seconds(lambda: render_gaussians(moved, view), device, repeats)}


def measure_student_frames(device: str, tiny: bool, folder: Path) -> dict[str, float]:
    """Frames per second and PSNR of the student that the part multi_view_response has trained, at 800x800."""
    import torch

    from kilonb.data.references import resolve_data
    from kilonb.distill.checkpoint_scores import targets_of_run
    from kilonb.imaging.sources import open_source
    from kilonb.metrics.images import over_background, psnr_srgb_db
    from kilonb.runs.records import read_run
    from kilonb.splats.formats import read_gaussians
    from kilonb.splats.rasterizer import render_gaussians

    run, size = folder / "multi_view_response", 32 if tiny else 800
    if not (run / "student.pt").is_file():
        raise KiloError("There is no trained student: run the part multi_view_response before student_frames.")
    source, fitted = open_source(run / "student.pt", device=device), run / "teacher" / "teacher.ply"
    own = resolve_data(read_run(run).parameters["data"]).path / "teacher.ply"
    teacher = read_gaussians(fitted if fitted.is_file() else own).to(device)
    cameras = [target.camera.resized(size, size).to(device) for target in targets_of_run(run, 3)]
    white = lambda image: over_background(image.rgb_premultiplied, image.alpha).clamp(0, 1).cpu()
    with torch.no_grad():
        scores = [psnr_srgb_db(white(source.render(camera, None)), white(render_gaussians(teacher, camera)))
                  for camera in cameras]
        times = [_seconds(lambda camera=camera: source.render(camera, None), device, 2 if tiny else 5)
                 for camera in cameras]
    return {"pixels": float(size), "frames_per_s": len(times) / sum(times),
            "psnr_vs_teacher_db": sum(scores) / len(scores)}


def measure_steps(device: str, tiny: bool, folder: Path) -> dict[str, float]:
    """Optimiser steps per second of a small world model."""
    import torch

    from kilonb.dream.episodes import collect
    from kilonb.dream.replay import Replay
    from kilonb.dream.training import WorldModelTraining, train_world_model
    from kilonb.dream.world_model import WorldModel, WorldModelConfig

    replay = Replay(tempfile.mkdtemp())
    for episode in collect("three", "scripted", 2, length=60, seed=0, noise=.2): replay.add(episode)
    config = WorldModelTraining(steps=2 if tiny else 60, batch=2 if tiny else 16, sequence=6, log_every_steps=1,
                                model=WorldModelConfig("tiny", precision="float32"))
    torch.manual_seed(0)
    result = train_world_model(WorldModel(config.model).to(device), replay, config, quiet=True)
    return {"steps_per_s": result.steps / result.seconds, "loss": result.records[-1]["loss"]}


MEASURES = {"kernels": measure_kernels, "rasterizer": measure_rasterizer, "student_frames": measure_student_frames,
            "steps": measure_steps}


def _measured(part: Part, text: str) -> dict[str, Any]:
    """What a part measured: the marked line of its output, or the numbers of its run's results."""
    lines = [json.loads(line[len(MARK):]) for line in text.splitlines() if line.startswith(MARK)]
    if lines: return lines[-1]
    file = part.run / "results.json" if part.run else None
    if file is None or not file.is_file(): return {}
    results = read_object(file).get("results") or {}
    return {name: value for name, value in results.items() if isinstance(value, (int, float))}


def run_part(part: Part, seconds: float) -> dict[str, Any]:
    """Status, seconds, last lines and measurements of a part, in at most `seconds`."""
    began, environment = time.perf_counter(), {**os.environ, "PYTHONUNBUFFERED": "1"}
    try:
        done = subprocess.run(part.command, cwd=checkout_root() or ".", env=environment, capture_output=True, text=True,
                              errors="replace", timeout=min(seconds, part.limit_s))
        status, text = ("ok" if done.returncode == 0 else f"failed ({done.returncode})"), done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        texts = [one.decode(errors="replace") if isinstance(one, bytes) else one or ""
                 for one in (error.stdout, error.stderr)]
        status, text = f"stopped after {min(seconds, part.limit_s):.0f} s", "".join(texts)
    except OSError as error: status, text = "not started", str(error)
    return {"status": status, "seconds": round(time.perf_counter() - began, 1), "measured": _measured(part, text),
            "end": text.strip().splitlines()[-12:]}


def run_plan(plan: Sequence[Part], out: Path, minutes: float, device: str) -> dict[str, Any]:
    """Run the parts and write the result after each. Parts that no time is left for are named as left out."""
    began, found = time.perf_counter(), {"device": device, "environment": describe_environment(), "parts": {}}
    for part in plan:
        left = 60 * minutes - (time.perf_counter() - began)
        found["parts"][part.name] = run_part(part, left) if left > 5 else {"status": "left out: no time"}
        found["seconds"] = round(time.perf_counter() - began, 1)
        write_json(out, found)
        print(f"{part.name:20} {found['parts'][part.name]['status']}", flush=True)
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check KiloNB on a machine with a GPU.")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"), help="the result file")
    parser.add_argument("--minutes", type=float, default=8.0, help="of all parts together")
    parser.add_argument("--only", default="", help="names of parts, separated by commas")
    parser.add_argument("--dry-run", action="store_true", help="the same plan, tiny, on the CPU")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 ... or cpu")
    parser.add_argument("--measure", choices=list(MEASURES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=Path("."), help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Run the plan; 0 where every part is ok, 1 where one is not, 2 without a GPU."""
    import torch

    given = _arguments()
    if given.measure:
        try: print(MARK + json.dumps(MEASURES[given.measure](given.device, given.tiny, given.folder)))
        except KiloError as error:
            print(error, file=sys.stderr)
            return 1
        return 0
    device = "cpu" if given.dry_run else given.device
    if device != "cpu" and not torch.cuda.is_available():
        print("torch finds no CUDA device on this machine: run this where there is one, or with --dry-run.",
              file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan(device, given.dry_run or device == "cpu", Path(folder))
        only = set(given.only.split(",")) - {""}
        unknown = sorted(only - {part.name for part in plan})
        if unknown:
            print(f"There is no part {unknown[0]}: expected {', '.join(part.name for part in plan)}.", file=sys.stderr)
            return 2
        found = run_plan([part for part in plan if not only or part.name in only], given.out, given.minutes, device)
    return 0 if all(part["status"] == "ok" for part in found["parts"].values()) else 1


if __name__ == "__main__": sys.exit(main())
