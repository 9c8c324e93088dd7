"""What is taken out of a run: the files are read back by others, nothing is half-written, and every option arrives."""
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import KILONB, run_here
from jupyter_driver import needs_chromium, open_browser
from PIL import Image

import kilonb
from kilonb.core.configs import to_dict
from kilonb.core.errors import KiloError
from kilonb.core.files import write_json
from kilonb.data.point_files import read_points
from kilonb.data.video import video_info
from kilonb.distill.student import make_student, save_student
from kilonb.dream.episodes import collect
from kilonb.dream.world_model import WorldModel, WorldModelConfig, save_world_model
from kilonb.fields.mlp import MLPConfig
from kilonb.fields.occupancy import occupancy_from_gaussians
from kilonb.pose.model import PoseConfig
from kilonb.pose.prepare import PrepareConfig
from kilonb.pose.refine import RefineConfig
from kilonb.pose.toy_recordings import write_toy_recording
from kilonb.pose.training import MODEL_FILE, PoseTraining, make_pose_model, save_pose
from kilonb.runs.folders import open_run
from kilonb.sharing.export import ExportOptions, holdings_of, make_export
from kilonb.sharing.export_folders import check_export, read_export
from kilonb.sharing.exported_videos import episode_with_imagination
from kilonb.sharing.meshes import read_mesh
from kilonb.sharing.student_gaussians import StudentFit
from kilonb.splats.formats import read_gaussians
from kilonb.splats.gaussians import gaussians_from_points
from kilonb.splats.ply import write_ply
from kilonb.training.loop import LoopConfig, train

SMALL = ExportOptions(resolution=16, mesh_views=8, mesh_width=40, turn_frames=4, width=64, scene_up="z",
                      fit=StudentFit(views=8, width=48, count=400, steps=20))
NPM_CACHE = Path(os.environ.get("TMPDIR", "/tmp")) / f"kilonb-npm-{os.getuid()}"
SPLAT_TRANSFORM = "@playcanvas/splat-transform@2.7.1"


def quiet(*arguments, **options):
    return make_export(*arguments, **({"options": SMALL, "say": lambda line: None} | options))


@pytest.fixture(scope="module")
def ball():
    generator = torch.Generator().manual_seed(0)
    shell = torch.nn.functional.normalize(torch.randn(1500, 3, generator=generator), dim=-1) * 0.6
    return gaussians_from_points(shell, (shell * 4).sin() / 2 + 0.5, sh_degree=1, opacity=0.99, scale=1.0)


@pytest.fixture(scope="module")
def student(ball):
    grid = occupancy_from_gaussians(ball.means, ball.quats, ball.scales, ball.opacities, 24)
    return make_student(grid, MLPConfig(hidden=16, layers=2, density_bias=5.0, density_scale=20.0), step=0.05)


@pytest.fixture
def run(tmp_path, ball):
    """A finished run with a teacher and a figure."""
    run = open_run("students", tmp_path / "students" / "one", {"steps": 1})
    write_ply(run.folder / "teacher.ply", ball)
    run.save_figure(Image.new("RGB", (40, 30), "red"), "loss")
    run.finish({"loss": 0.1})
    return run.folder


@pytest.fixture
def pair(run, student):
    """The same run with a student."""
    save_student(student, run / "student.pt", "raw")
    return run


# --- the whole command

def test_the_command_writes_everything_that_a_run_has_and_names_what_it_has_not(pair, tmp_path):
    command = [*KILONB, "export", str(pair), "--to", str(tmp_path / "out"), "--fit-steps", "15", "--json"]
    small = {"resolution": 16, "mesh_views": 8, "mesh_width": 40, "turn_frames": 4, "width": 64, "scene_up": "z",
             "fit.views": 6, "fit.width": 40, "fit.count": 300}
    for name, value in small.items(): command += ["-p", f"{name}={value}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reply = json.loads(done.stdout)
    assert set(reply["missing"]) == {"points", "timelapse"} and reply["ok"]
    assert {row["part"] for row in reply["files"]} == {"gaussians", "mesh", "turntable", "figures"}
    record = read_export(tmp_path / "out")
    assert record["command"].startswith("kilonb export") and record["run"] == "students/one"
    assert check_export(tmp_path / "out") == [] and record["unit"] == "metres"
    [fitted] = [row for row in record["files"] if row["file"] == "gaussians/student.ply"]
    assert fitted["student_steps"] == 15 and fitted["student_psnr_db"] > fitted["student_psnr_blank_db"]
    assert (tmp_path / "out" / "turntable" / "teacher_and_student_turntable.gif").is_file()
    assert str(tmp_path) not in json.dumps(record["files"]), "no paths of this machine in the rows"


def test_a_request_that_cannot_be_met_changes_nothing(run, tmp_path):
    target = tmp_path / "out"
    quiet(run, target, ["gaussians"], ["spz"])
    before = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    for arguments, options in (((run, target), {}), ((run, target, ["points"]), {"force": True}),
                               ((run, target, ["mash"]), {"force": True}),
                               ((run, target, (), ["mp5"]), {"force": True}),
                               ((tmp_path / "none", target), {"force": True})):
        with pytest.raises(KiloError): quiet(*arguments, **options)
        assert {path: path.read_bytes() for path in target.rglob("*") if path.is_file()} == before
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("mine")
    with pytest.raises(KiloError, match="no earlier export"): quiet(run, tmp_path / "thesis", force=True)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "mine"
    quiet(run, target, ["figures"], force=True)
    assert [row["file"] for row in read_export(target)["files"]] == ["figures/loss.png", "figures/CAPTIONS.md"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_links_that_lead_out_of_a_run_are_not_followed(run, tmp_path, ball):
    write_ply(tmp_path / "elsewhere" / "secret.ply", ball)
    (run / "linked.ply").symlink_to(tmp_path / "elsewhere" / "secret.ply")
    (run / "linked").symlink_to(tmp_path / "elsewhere")
    (run / "figures" / "hosts.png").symlink_to("/etc/hosts")
    assert [one.name for one in holdings_of(run).models] == ["teacher"]
    assert [row["file"] for row in quiet(run, tmp_path / "out", ["figures"]).rows] == ["figures/loss.png"]


def test_a_second_export_does_not_take_the_first_for_a_model(run):
    first = quiet(run, "", ["gaussians"], ["ply"])
    assert first.folder == run / "export"
    assert [one.name for one in holdings_of(run).models] == ["teacher"]


# --- other readers

def transformer() -> Path:
    """The entry of splat-transform, installed once into a cache; skipped without Node, npm or a registry."""
    if not shutil.which("node") or not shutil.which("npm"): pytest.skip("Node and npm are not here")
    entry = NPM_CACHE / "node_modules" / "@playcanvas" / "splat-transform" / "bin" / "cli.mjs"
    if not entry.is_file():
        NPM_CACHE.mkdir(exist_ok=True)
        try: done = subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix",
                                    str(NPM_CACHE), SPLAT_TRANSFORM], capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired: pytest.skip("npm found no registry within two minutes")
        if done.returncode or not entry.is_file(): pytest.skip(f"npm could not install {SPLAT_TRANSFORM}: no registry?")
    return entry


@pytest.mark.parametrize("kind", ["ply", "splat", "spz", "compressed-ply"])
def test_splat_transform_reads_the_same_gaussians(run, tmp_path, kind):
    entry = transformer()
    result = quiet(run, tmp_path / "out", ["gaussians"], [kind])
    [path] = [path for path in result.paths if path.name.startswith("teacher.")]
    done = subprocess.run(["node", str(entry), "-q", "-w", str(path), str(tmp_path / "read.ply")], capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    theirs, ours = read_gaussians(tmp_path / "read.ply", say=lambda note: None), read_gaussians(path)
    assert len(theirs) == len(ours) == 1500
    mine = ours.means[torch.cdist(theirs.means, ours.means).argmin(1)]
    assert (theirs.means - mine).abs().max() < 1e-3
    assert (theirs.opacities.sort().values - ours.opacities.sort().values).abs().max() < 0.02
    assert (theirs.sh[:, 0].mean(0) - ours.sh[:, 0].mean(0)).abs().max() < 0.02


@needs_chromium
def test_chromium_plays_the_turntable(pair, tmp_path):
    result = quiet(pair, tmp_path / "out", ["turntable"])
    [video] = [path for path in result.paths if path.name == "teacher_and_student_turntable.mp4"]
    info = video_info(video)
    assert (info.codec, info.pixel_format, info.frames) == ("h264", "yuv420p", 4)
    page_file = tmp_path / "page.html"
    page_file.write_text(f"<video src='{video.as_uri()}' muted></video>")
    with open_browser() as browser:
        page = browser.new_page()
        page.goto(page_file.as_uri())
        size = page.evaluate("""() => new Promise((done, failed) => {
            const video = document.querySelector("video");
            const ready = () => done([video.videoWidth, video.videoHeight]);
            if (video.readyState >= 3) ready();
            video.addEventListener("canplay", ready);
            video.addEventListener("error", () => failed(new Error(video.error.message)));
            setTimeout(() => failed(new Error("no canplay within 20 s")), 20000); })""")
    assert size == [info.width, info.height]
    with Image.open(video.with_suffix(".gif")) as image:
        assert image.n_frames == 4 and len(image.convert("RGB").getcolors(1 << 20)) <= 256


def test_up_turns_gaussians_meshes_and_their_record(run, tmp_path):
    plain = quiet(run / "teacher.ply", tmp_path / "a", ["gaussians", "mesh"], ["ply", "glb"]).folder
    turned = quiet(run / "teacher.ply", tmp_path / "b", ["gaussians", "mesh"], ["ply", "glb"],
                   options=ExportOptions(**{**vars(SMALL), "up": "y"})).folder
    own, other = (read_gaussians(folder / "gaussians" / "teacher.ply").means for folder in (plain, turned))
    torch.testing.assert_close(other, torch.stack([own[:, 0], own[:, 2], -own[:, 1]], 1), atol=1e-5, rtol=0)
    first, second = (read_mesh(folder / "mesh" / "teacher.glb").vertices for folder in (plain, turned))
    assert np.allclose(np.sort(first, 0), np.sort(second, 0), atol=1e-5), "glTF has y upwards in any case"
    assert all("y is up" in row["frame"] for row in read_export(turned)["files"])


# --- every system

def test_moving_gaussians_become_a_numbered_series_points_and_a_clip(tmp_path, ball):
    from kilonb.flux4d.motion import MovingGaussians, save_moving

    count = len(ball)
    points = ball.means * torch.tensor([20.0, 8, 2]) + torch.tensor([25.0, 0, 1])
    moving = MovingGaussians(points, ball.quats, ball.log_scales + 2, ball.logit_opacities, torch.randn(count, 3),
                             torch.rand(count) * 0.3, torch.tensor([5.0, 0, 0]).expand(count, 1, 3),
                             torch.arange(count) < 10)
    save_moving(tmp_path / "refined_gaussians.pt", moving)
    result = quiet(tmp_path / "refined_gaussians.pt", tmp_path / "out", ["gaussians", "points", "timelapse"],
                   ["ply", "gif"], options=ExportOptions(**{**vars(SMALL), "time": "0,0.4"}))
    names = {path.relative_to(tmp_path / "out").as_posix() for path in result.paths}
    assert {"gaussians/refined_0000.ply", "gaussians/refined_0001.ply", "points/refined_0000.ply",
            "timelapse/refined_over_time.gif"} < names and result.ok
    early, late = (read_points(tmp_path / "out" / "points" / f"refined_000{k}.ply")[0] for k in (0, 1))
    assert len(early) == count - 10 and np.allclose((late - early).mean(0), [2, 0, 0], atol=1e-3)
    with pytest.raises(KiloError, match="no mesh"): quiet(tmp_path / "refined_gaussians.pt", tmp_path / "m",
                                                                     ["mesh"])


def test_an_animal_becomes_gaussians_a_closed_hull_and_a_film(tmp_path):
    prepared = write_toy_recording(tmp_path / "toy.zarr", 6)
    model = make_pose_model(prepared, PoseTraining(model=PoseConfig(stages=1, widths=(8,), bottleneck=8, fold=1,
                                                                    min_gaussians=32)))
    run = tmp_path / "pose_train" / "one"
    save_pose(run / MODEL_FILE, model, {"data": "toy", "prepared": str(prepared.path)})
    write_json(run / "status.json", {"status": "finished", "experiment": "pose_train", "elapsed_s": 1.0,
                                     "started": "2026-11-28T10:00:00"})
    write_json(run / "config.json", {"prepare": to_dict(PrepareConfig()), "refine": to_dict(RefineConfig(steps=0))})
    result = quiet(run, tmp_path / "out", ["gaussians", "mesh", "timelapse"], ["ply", "mp4"])
    [mesh] = [path for path in result.paths if path.parent.name == "mesh"]
    shape = read_mesh(mesh).to_trimesh()
    assert shape.is_watertight and shape.volume > 0 and result.ok
    frames = [int(prepared.frames[i]) for i in prepared.split("test")]
    [film] = [path for path in result.paths if path.suffix == ".mp4"]
    assert video_info(film).frames == len(frames)
    with pytest.raises(KiloError, match="known are"): quiet(run, tmp_path / "no", ["gaussians"],
                                                            options=ExportOptions(frame="99999"))


def test_an_episode_is_shown_beside_what_the_model_imagines(tmp_path):
    torch.manual_seed(0)
    save_world_model(tmp_path / "world_model.pt", WorldModel(WorldModelConfig("tiny")))
    [episode] = collect("four", "scripted", 1, 40, seed=1, noise=0.2)
    frames = [*episode_with_imagination(tmp_path, episode, horizon=4, most=9, scale=1)]
    assert len(frames) == 8 and frames[0].shape == (86, 132, 3)
    assert (frames[5][22:, :64] == episode.images[6]).all(), "the recorded frame is the one that is imagined"


def test_kept_checkpoints_of_a_training_become_a_time_lapse(tmp_path, student):
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, 0.01)
    def step(number, generator): return {"loss": sum(parameter.square().sum() for parameter in parameters) * 1e-6}
    loop = LoopConfig(4, 0.01, warmup_steps=0, keep_every_steps=2, checkpoint_every_seconds=1e9)
    train(step, optimizer, loop, model=student, folder=tmp_path, quiet=True)
    save_student(student, tmp_path / "student.pt", "raw")
    held = holdings_of(tmp_path)
    result = quiet(tmp_path, tmp_path / "out", ["timelapse"], ["mp4"])
    assert [row["file"] for row in result.rows] == ["timelapse/student_training.mp4"] and len(held.models) == 1
    assert result.rows[0]["frames"] == len(list((tmp_path / "checkpoints").glob("step_*.pt"))) >= 2


# --- three ways

def test_script_and_notebook_write_the_same_files(tmp_path, ball):
    write_ply(tmp_path / "scene.ply", ball)
    paths = kilonb.export_run(tmp_path / "scene.ply", tmp_path / "out", ["gaussians"], ["spz"], scene_up="z")
    done = run_here("run", "export_run", "--data", f"ply:{tmp_path / 'scene.ply'}", "--out", tmp_path / "run",
                    "-p", "what=gaussians", "-p", "formats=spz", "-p", "export.scene_up=z")
    assert done.returncode in (0, 1), done.stderr
    assert (tmp_path / "run" / "export" / "gaussians" / "scene.spz").read_bytes() == paths[0].read_bytes()
    results = json.loads((tmp_path / "run" / "results.json").read_text())["results"]
    assert results["spz_psnr_db"] > 38 and results["files"] == 1
    with pytest.raises(KiloError, match="option of export_run"): kilonb.export_run(tmp_path / "scene.ply", tim="1")
