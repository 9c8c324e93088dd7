"""The compiled rasteriser over many calls, over threads, and over growing scenes."""

import gc

import psutil
import pytest
import torch

from kilonb.splats.benchmark import benchmark_scene, measure_growth
from kilonb.splats.rasterizer import rasterize

COUNT, SIZE, CALLS = 300, 48, 200


def arguments() -> tuple[dict, dict]:
    """(the parts of a scene that take gradients, the other arguments of `rasterize`)."""
    gaussians, camera = benchmark_scene(COUNT, SIZE, SIZE, sh_degree=1)
    parts = {"means": gaussians.means, "quats": gaussians.quats, "scales": gaussians.scales,
             "opacities": gaussians.opacities, "colors": gaussians.sh}
    return parts, {"viewmats": camera.world_to_camera[None], "Ks": camera.K[None], "width": SIZE, "height": SIZE,
                   "sh_degree": 1}


def picture_and_gradients(parts: dict, rest: dict) -> list[torch.Tensor]:
    leaves = {name: part.clone().requires_grad_() for name, part in parts.items()}
    picture, alpha, _ = rasterize(**leaves, **rest)
    (picture.square().sum() + alpha.sum()).backward()
    return [picture.detach(), alpha.detach(), *(leaf.grad for leaf in leaves.values())]


@pytest.fixture
def threads():
    """Sets the number of threads; the former number afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_repeated_pictures_and_gradients_leave_no_memory_behind(threads):
    scene, process = arguments(), psutil.Process()
    threads(1)                                    # small pictures on two threads wait for each other on a busy machine
    for _ in range(30): picture_and_gradients(*scene)
    gc.collect()
    before = process.memory_info().rss
    for _ in range(CALLS): picture_and_gradients(*scene)
    gc.collect()
    grown = (process.memory_info().rss - before) / CALLS
    assert grown < 12_000, f"{grown / 1000:.0f} kB for each picture of {SIZE} x {SIZE} pixels (28 kB of colour)"


def test_one_thread_and_two_give_the_same_and_each_repeats_itself_to_the_bit(threads):
    scene, found = arguments(), {}
    for count in (1, 2):
        threads(count)
        found[count] = picture_and_gradients(*scene)
        for _ in range(3):
            for first, again in zip(found[count], picture_and_gradients(*scene)): assert torch.equal(first, again)
    for one, two in zip(found[1], found[2]):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5 * float(one.abs().max()))


def test_growth_is_measured_scene_by_scene():
    found = measure_growth([benchmark_scene(count, 48, 48) for count in (50, 400)], repeats=1)
    assert found["gaussians"] == [50, 400] and found["pixels"] == [48 * 48] * 2
    assert 0 < found["pairs"][0] < found["pairs"][1] and 0 < found["peak_mb"][0] < found["peak_mb"][1]
    assert len(found["forward_s"]) == len(found["forward_backward_s"]) == 2
    assert min(found["forward_s"] + found["forward_backward_s"]) > 0
