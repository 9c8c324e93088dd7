"""The rasteriser against its plain-torch reference and gsplat's; PLY files, threads, errors."""
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numba import njit

from kilonb.geometry.cameras import orbit_cameras
from kilonb.core.errors import KiloError
from kilonb.core.work_queue import parallel_for, queued_jobs
from kilonb.splats.benchmark import benchmark_scene, viewing_camera
from kilonb.splats.gaussians import Gaussians
from kilonb.splats.harmonics import evaluate_sh, sh_basis
from kilonb.splats.ply import read_ply, write_ply
from kilonb.splats.projection import covariances, project_gaussians
from kilonb.splats.rasterizer import rasterize, render_gaussians
from kilonb.splats.reference import rasterize_reference

REAL = os.environ.get("KILONB_DATA")
PLAYBOT = Path(REAL or ".") / "splats" / "playbot_lod3_inria.ply"
needs_playbot = pytest.mark.skipif(not REAL or not PLAYBOT.is_file(),
                                   reason="set KILONB_DATA to the folder that holds splats/playbot_lod3_inria.ply")
WIDTH, HEIGHT = 61, 45
NAMES = ("means", "quats", "scales", "opacities", "colors", "viewmats")


def random_scene(seed: int, count: int = 70, cameras: int = 2, channels: int | None = None,
                 sh_degree: int | None = None, per_camera: bool = False) -> dict:
    """Gaussians in front of, behind and beside the cameras, at the picture's border, far larger than the picture,
    needles, and almost opaque ones."""
    g = torch.Generator().manual_seed(seed)
    def normal(*shape): return torch.randn(*shape, generator=g)
    def uniform(*shape): return torch.rand(*shape, generator=g)
    means = normal(count, 3) * torch.tensor([2.0, 1.5, 2.5])
    scales = torch.exp(normal(count, 3) * 0.8 - 1.5)
    scales[:4] = 3.0 + 4.0 * uniform(4, 3)
    scales[4:8] = torch.tensor([1.0, 0.02, 0.02]) * (0.5 + uniform(4, 1))
    opacities = uniform(count)
    opacities[8:16] = 0.9995
    opacities[16:20] = 0.003
    lead = (cameras, count) if per_camera else (count,)
    colors = normal(*lead, (sh_degree + 1) ** 2, 3) * 0.4 if sh_degree is not None else uniform(*lead, channels)
    views = torch.stack([camera.world_to_camera for camera in orbit_cameras(cameras, radius=3.0, elevation_deg=10.0)])
    K = torch.tensor([[70.0, 0, 29], [0, 66, 24], [0, 0, 1]])
    return dict(means=means, quats=normal(count, 4), scales=scales, opacities=opacities, colors=colors, viewmats=views,
                Ks=K.repeat(cameras, 1, 1))


def undecided(scene: dict, antialiased: bool) -> torch.Tensor:
    """Pixels [C, H, W] at which a threshold (1/255, 1e-4) is met to within rounding of float32, so that both results
    are correct."""
    scene = {name: tensor.double() for name, tensor in scene.items()}
    projected = project_gaussians(*(scene[name] for name in NAMES[:4]), scene["viewmats"], scene["Ks"], WIDTH, HEIGHT,
                                  antialiased=antialiased)
    x, y = torch.arange(WIDTH) + 0.5, torch.arange(HEIGHT) + 0.5
    close = []
    for camera in range(len(scene["viewmats"])):
        order = projected.depths[camera].argsort()
        order = order[(projected.radii[camera, order] > 0).all(1)]
        dx, dy = (
            projected.means2d[camera, order, 0, None, None] - x[None, None],
            projected.means2d[camera, order, 1, None, None] - y[None, :, None],
        )
        a, b, c = (projected.conics[camera, order, k, None, None] for k in range(3))
        opacity = (scene["opacities"] * projected.compensations[camera])[order, None, None]
        alpha = (opacity * torch.exp(-0.5 * (a * dx * dx + c * dy * dy) - b * dx * dy)).clamp(max=0.999)
        passed = torch.cumprod(1 - alpha * (alpha >= 1 / 255), 0)
        close.append(((alpha * 255 - 1).abs() < 1e-4).any(0) | ((passed / 1e-4 - 1).abs() < 1e-3).any(0))
    return torch.stack(close)


def compare(scene: dict, seed: int = 0, sh_degree: int | None = None, backgrounds: torch.Tensor | None = None,
            **options) -> None:
    """Colours and alphas within 1e-4, every gradient within 1e-3 of the float64 reference's, over the pixels that are
    not at a threshold."""
    decided = ~undecided(scene, options.get("rasterize_mode") == "antialiased")[..., None]
    assert decided.float().mean() > 0.9, "too few pixels to compare"
    results = []
    for draw, dtype in ((rasterize, torch.float32), (rasterize_reference, torch.float64)):
        leaves = {name: tensor.to(dtype).requires_grad_(name != "Ks") for name, tensor in scene.items()}
        behind = None if backgrounds is None else backgrounds.to(dtype).requires_grad_()
        reference_options = {name: value for name, value in options.items() if name != "packed" or draw is rasterize}
        colors, alphas, _ = draw(**leaves, width=WIDTH, height=HEIGHT, sh_degree=sh_degree, backgrounds=behind,
                                 **reference_options)
        rng = torch.Generator().manual_seed(seed)
        weights = (
            torch.randn(colors.shape, generator=rng).to(dtype) * decided,
            torch.randn(alphas.shape, generator=rng).to(dtype) * decided,
        )
        wanted = [leaves[name] for name in NAMES] + ([behind] if behind is not None else [])
        grads = torch.autograd.grad((colors * weights[0]).sum() + (alphas * weights[1]).sum(), wanted,
                                    allow_unused=True)
        results.append((colors.detach(), alphas.detach(), grads))
    (colors, alphas, grads), (reference_colors, reference_alphas, reference_grads) = results
    scale = reference_colors.abs().amax((0, 1, 2)).clamp(min=1.0)
    assert (((colors - reference_colors).abs() / scale) * decided).max() < 1e-4
    assert ((alphas - reference_alphas).abs() * decided).max() < 1e-4
    for name, mine, theirs in zip((*NAMES, "backgrounds"), grads, reference_grads):
        if theirs is None or theirs.abs().max() == 0: assert mine is None or mine.abs().max() == 0, name
        else:
            assert (mine
                    - theirs).norm() < 1e-3 * theirs.norm(), f"{name}: {(mine - theirs).norm() / theirs.norm():.1e}"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rasterize_mode", ["classic", "antialiased"])
def test_colours_and_gradients_are_those_of_the_reference(seed, rasterize_mode):
    compare(random_scene(seed, sh_degree=3), seed, sh_degree=3, backgrounds=torch.rand(2, 3),
            rasterize_mode=rasterize_mode)


@pytest.mark.parametrize("render_mode", ["RGB", "D", "ED", "RGB+D", "RGB+ED"])
@pytest.mark.parametrize("packed", [True, False])
def test_every_mode_is_that_of_the_reference(render_mode, packed):
    compare(random_scene(11, channels=3), 11, backgrounds=torch.rand(2, 3), render_mode=render_mode, packed=packed)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 17])
def test_any_number_of_channels_is_that_of_the_reference(channels):
    compare(random_scene(5, channels=channels), 5, backgrounds=torch.rand(2, channels), render_mode="RGB+D")


@pytest.mark.parametrize("sh_degree", [None, 0, 1, 2])
def test_colours_of_each_camera_are_those_of_the_reference(sh_degree):
    """[C, N, D] and [C, N, K, 3]; three cameras and three channels, so that no axis can be taken for another."""
    compare(random_scene(7, count=40, cameras=3, channels=3, sh_degree=sh_degree, per_camera=True), 7,
            sh_degree=sh_degree)


def test_planes_and_clips_are_those_of_the_reference():
    compare(random_scene(3, channels=3), 3, near_plane=1.5, far_plane=4.5, eps2d=0.1, radius_clip=6.0)


def test_a_lower_degree_ignores_the_higher_coefficients():
    scene = random_scene(2, sh_degree=3)
    cut = scene | {"colors": scene["colors"][:, :4]}
    assert torch.equal(rasterize(**scene, width=WIDTH, height=HEIGHT, sh_degree=1)[0],
                       rasterize(**cut, width=WIDTH, height=HEIGHT, sh_degree=1)[0])


def test_gaussians_that_cannot_be_drawn_change_no_other_value():
    """Behind the camera, NaN, infinitely large, without extent: no NaN in the picture or in another gaussian's
    gradient."""
    scene = random_scene(1, channels=3)
    good, _, _ = rasterize(**{name: tensor[20:] if len(tensor) == 70 else tensor for name, tensor in scene.items()},
                           width=WIDTH, height=HEIGHT)
    bad = {name: tensor.clone() for name, tensor in scene.items()}
    bad["means"][:5] = float("nan")
    bad["quats"][5:10] = float("nan")
    bad["scales"][10:15] = float("inf")
    bad["opacities"][15:20] = float("nan")
    leaves = {name: tensor.requires_grad_(name in NAMES[:5]) for name, tensor in bad.items()}
    colors, alphas, _ = rasterize(**leaves, width=WIDTH, height=HEIGHT)
    assert torch.equal(colors, good) and alphas.isfinite().all()
    colors.sum().backward()
    assert all(leaves[name].grad[20:].isfinite().all() for name in NAMES[:5])


def test_a_gaussian_of_unlimited_size_fills_the_picture():
    scene = {name: tensor[:1] for name, tensor in random_scene(1, channels=3).items()}
    scene |= dict(means=torch.zeros(1, 3), scales=torch.full((1, 3), 1e12), opacities=torch.tensor([0.5]))
    colors, alphas, meta = rasterize(**scene, width=WIDTH, height=HEIGHT)
    assert (
        torch.allclose(alphas, torch.tensor(0.5))
        and torch.allclose(colors, scene["colors"] * 0.5)
        and (meta["radii"] > 10 * WIDTH).all()
    )


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_bits_from_run_to_run_and_on_any_number_of_threads(threads):
    ball, camera = benchmark_scene(3000, 120, 90)
    def run():
        leaves = Gaussians(**{name: tensor.clone().requires_grad_() for name, tensor in ball.parameters().items()})
        picture = render_gaussians(leaves, camera)
        (picture.rgb_premultiplied.square().sum() + picture.expected_depth.sum()).backward()
        return [picture.rgb_premultiplied.detach(), picture.expected_depth.detach(),
                *(tensor.grad for tensor in leaves.parameters().values())]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    expected = run()
    try:
        torch.set_num_threads(threads)
        for _ in range(3): assert all(torch.equal(one, other) for one, other in zip(run(), expected))
    finally: torch.set_num_threads(before)


def test_several_callers_at_once_do_not_disturb_each_other():
    balls = [benchmark_scene(800, 80, 60, seed=seed) for seed in range(4)]
    alone = [render_gaussians(*ball).rgb_premultiplied for ball in balls]
    together = [None] * len(balls)
    def draw(k): together[k] = [render_gaussians(*balls[k]).rgb_premultiplied for _ in range(5)]
    callers = [threading.Thread(target=draw, args=(k,)) for k in range(len(balls))]
    for caller in callers: caller.start()
    for caller in callers: caller.join()
    assert all(torch.equal(picture, expected) for pictures, expected in zip(together, alone) for picture in pictures)


@njit(nogil=True)
def mark(counter, marks):
    for job in queued_jobs(counter, len(marks)): marks[job] += 1


def test_a_forked_child_draws_too():
    """A data loader forks; the child has none of its parent's threads. (Torch's own threads cannot be
    used there: loaders set their number to one, and so does this test.)"""
    ball, camera = benchmark_scene(500, 60, 40)
    expected, marks = render_gaussians(ball, camera).rgb_premultiplied, np.zeros(10_000, np.int64)
    parallel_for(mark, marks)
    child = os.fork()
    if child == 0:
        parallel_for(mark, marks)
        torch.set_num_threads(1)
        os._exit(0 if torch.equal(render_gaussians(ball, camera).rgb_premultiplied, expected) and (marks == 2).all()
                 else 1)
    deadline, ended = time.monotonic() + 60, (0, 0)
    while ended[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
        ended = os.waitpid(child, os.WNOHANG)
    if ended[0] == 0: os.kill(child, signal.SIGKILL); os.waitpid(child, 0)
    assert ended[0] == child and os.waitstatus_to_exitcode(ended[1]) == 0


def test_inputs_of_other_kinds_are_taken():
    """Float64 and strides: the result is float32 and the same."""
    scene = random_scene(4, channels=3)
    expected, _, _ = rasterize(**scene, width=WIDTH, height=HEIGHT)
    wide = {name: tensor.double() for name, tensor in scene.items()}
    assert torch.equal(rasterize(**wide, width=WIDTH, height=HEIGHT)[0], expected)
    strided = {name: torch.stack([tensor, tensor], -1)[..., 0] for name, tensor in scene.items()}
    assert torch.equal(rasterize(**strided, width=WIDTH, height=HEIGHT)[0], expected)


# -- compared with gsplat --

def test_projection_is_gsplat_s():
    """gsplat's own torch reference: means, depths, conics, compensations where both see a gaussian; its boxes are those
    of opacity one."""
    from gsplat.cuda._torch_impl import _fully_fused_projection
    scene = {name: tensor.double() for name, tensor in random_scene(9, count=400, channels=3).items()}
    scene["opacities"][:] = 1
    inputs = [scene[name] for name in NAMES[:4]]
    ours = project_gaussians(*inputs, scene["viewmats"], scene["Ks"], WIDTH, HEIGHT, antialiased=True)
    radii, *theirs = _fully_fused_projection(scene["means"], covariances(scene["quats"], scene["scales"]),
                                             scene["viewmats"], scene["Ks"], WIDTH, HEIGHT, calc_compensations=True)
    both = (ours.radii > 0).all(-1) & (radii > 0).all(-1)
    assert both.sum() > 100 and not ((ours.radii > 0).all(-1) & ~both).any()
    full = project_gaussians(*inputs, scene["viewmats"], scene["Ks"], WIDTH, HEIGHT).radii
    assert ((full - radii).abs() <= 1 + 0.001 * radii)[both].all(), "3.33 and sqrt(2 ln 255) differ in the fourth digit"
    for mine, other in zip(ours[1:], theirs): torch.testing.assert_close(mine[both], other[both])


@pytest.mark.parametrize("degree", range(4))
def test_harmonics_are_gsplat_s(degree):
    from gsplat.cuda._torch_impl import _spherical_harmonics
    directions, sh = torch.randn(50, 3, dtype=torch.float64), torch.randn(50, 16, 3, dtype=torch.float64)
    theirs = torch.clamp_min(_spherical_harmonics(degree, directions, sh) + 0.5, 0)
    torch.testing.assert_close(evaluate_sh(sh, directions, degree), theirs)
    assert sh_basis(torch.nn.functional.normalize(directions, dim=1), degree).shape == (50, (degree + 1) ** 2)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("absgrad", [True, False])
def test_the_strategy_of_gsplat_densifies_with_the_meta_of_rasterize(packed, absgrad):
    """The interface that densification needs: retain_grad and absgrad on means2d, radii, ids, sizes."""
    from gsplat.strategy import DefaultStrategy
    ball, camera = benchmark_scene(300, 60, 60, sh_degree=0)
    raw = torch.nn.ParameterDict(dict(means=ball.means, quats=ball.quats, scales=ball.log_scales,
                                      opacities=ball.logit_opacities, sh=ball.sh))
    optimizers = {name: torch.optim.Adam([tensor], 1e-2) for name, tensor in raw.items()}
    strategy = DefaultStrategy(refine_start_iter=1, refine_every=2, grow_grad2d=1e-7, absgrad=absgrad,
                               pause_refine_after_reset=0)
    state = strategy.initialize_state(scene_scale=1.0)
    view, K = camera.world_to_camera[None], camera.K[None]
    for step in range(1, 5):
        colors, _, meta = rasterize(raw["means"], raw["quats"], raw["scales"].exp(), raw["opacities"].sigmoid(),
                                    raw["sh"], view, K, 60, 60, sh_degree=0, packed=packed, absgrad=absgrad)
        strategy.step_pre_backward(raw, optimizers, state, step, meta)
        colors.square().sum().backward()
        strategy.step_post_backward(raw, optimizers, state, step, meta, packed=packed)
        for optimizer in optimizers.values(): optimizer.step(); optimizer.zero_grad()
    assert len(raw["means"]) > 300, "nothing was densified"


def test_cuda_tensors_are_handed_to_gsplat(monkeypatch):
    passed = {}
    def rasterization(*arguments, **options): passed.update(options, count=len(arguments)); return "gsplat's answer"
    monkeypatch.setitem(sys.modules, "gsplat", SimpleNamespace(rasterization=rasterization))
    monkeypatch.setattr("kilonb.splats.rasterizer._gsplat_runs", lambda: True)
    on_cuda = SimpleNamespace(is_cuda=True)
    assert rasterize(on_cuda, *[None] * 6, 10, 10, render_mode="RGB+ED", camera_model="fisheye",
                     with_ut=True) == "gsplat's answer"
    assert (
        passed["count"] == 9
        and passed["render_mode"] == "RGB+ED"
        and passed["camera_model"] == "fisheye"
        and passed["with_ut"]
        and passed["packed"]
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("render_mode", ["RGB", "RGB+ED"])
def test_cpu_and_gpu_draw_the_same(render_mode):
    scene = random_scene(6, sh_degree=3)
    decided = ~undecided(scene, False)[..., None]
    options = dict(width=WIDTH, height=HEIGHT, sh_degree=3, render_mode=render_mode, backgrounds=torch.rand(2, 3))
    ours, alphas, _ = rasterize(**scene, **options)
    theirs, their_alphas, _ = rasterize(**{name: tensor.cuda() for name, tensor in scene.items()},
                                        **options | {"backgrounds": options["backgrounds"].cuda()})
    assert ((ours - theirs.cpu()).abs() * decided).max() < 1e-3 and ((alphas - their_alphas.cpu()).abs()
                                                                     * decided).max() < 1e-3


# -- files --

@needs_playbot
def test_the_playbot_file_comes_back_byte_for_byte(tmp_path):
    write_ply(tmp_path / "again.ply", read_ply(PLAYBOT))
    assert (tmp_path / "again.ply").read_bytes() == PLAYBOT.read_bytes()


@needs_playbot
def test_the_playbot_is_upright_and_in_front_of_its_ground():
    """The head is orange and white above dark ground: up is -y, and with a mirrored axis it would be below."""
    robot = read_ply(PLAYBOT)
    picture = render_gaussians(robot, viewing_camera(robot, 200, 200, azimuth_deg=270.0, up=(0.0, -1.0, 0.0)),
                               background=torch.ones(3))
    covered = picture.alpha > 0.5
    assert 0.25 < covered.float().mean() < 0.8 and picture.expected_depth[covered].min() > 0.5
    rows = covered.float().mean(1)
    assert rows[130:170].mean() > 3 * rows[40:90].mean() > 0.1, (
        "the ground is wide and below, the robot narrow and above"
    )
    head = picture.rgb_premultiplied[40:90][covered[40:90]].mean(0)
    ground = picture.rgb_premultiplied[130:170][covered[130:170]].mean(0)
    assert head.mean() > 1.5 * ground.mean() and head[0] > head[2]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    ball, _ = benchmark_scene(20)
    write_ply(tmp_path / "ball.ply", ball)
    before = (tmp_path / "ball.ply").read_bytes()
    broken = Gaussians(ball.means * float("nan"), ball.quats, ball.log_scales, ball.logit_opacities, ball.sh)
    with pytest.raises(KiloError, match="value in means that is not finite"): write_ply(tmp_path / "ball.ply", broken)
    assert (tmp_path / "ball.ply").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("change", "sentence"), [
    (lambda data: data[:-1], "cut short"),
    (lambda data: data.replace(b"binary_little_endian", b"ascii"), "something else than a number"),
    (lambda data: data.replace(b"ply\n", b"plx\n", 1), "not a PLY"),
    (lambda data: data.replace(b"float rot_3", b"float rat_3"), "rot_3"),
    (lambda data: data.replace(b"element vertex 20", b"element vertex 21"), "21 rows"),
    (lambda data: data.replace(b"element vertex 20", b"element vertex -1"), "element NAME COUNT"),
    (lambda data: data.replace(b"property float y\n", b"property float x\n"), "twice"),
    (lambda data: data[:-4] + np.float32("inf").tobytes(), "not finite"),
    (lambda data: data[:-16] + bytes(16), "zero quaternion"),
])
def test_a_wrong_file_gives_one_sentence(tmp_path, change, sentence):
    ball, _ = benchmark_scene(20)
    write_ply(tmp_path / "ball.ply", ball)
    (tmp_path / "ball.ply").write_bytes(change((tmp_path / "ball.ply").read_bytes()))
    with pytest.raises(KiloError, match=sentence) as caught: read_ply(tmp_path / "ball.ply")
    assert "ball.ply" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_gives_one_sentence(tmp_path):
    with pytest.raises(KiloError, match="There is no PLY file"): read_ply(tmp_path / "none.ply")
    with pytest.raises(KiloError, match="There is no PLY file"): read_ply(tmp_path)
