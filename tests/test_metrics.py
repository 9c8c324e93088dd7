"""Metrics compared with other implementations and numpy, and regressions of past incidents."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kilonb.core.errors import KiloError
from kilonb.metrics.images import (
    blank_baseline_db,
    check_premultiplied,
    evaluate_image,
    evaluation_table,
    foreground_psnr_db,
    linear_to_srgb,
    over_background,
    psnr_linear_db,
    psnr_srgb_db,
    self_check,
    srgb_to_linear,
    ssim,
    straight_to_premultiplied,
    structural_similarity,
)
from kilonb.metrics.perceptual import FILES, MISSING, find_weights, load_network, lpips_available, lpips_metrics

DATA = os.environ.get("KILONB_DATA")
needs_lego = pytest.mark.skipif(not DATA or not (Path(DATA) / "lego_400").is_dir(),
                                reason="KILONB_DATA names no folder with lego_400")
needs_lpips = pytest.mark.skipif(not lpips_available(),
                                 reason="the LPIPS weights are not installed: kilonb data get lpips")


def pair(height=37, width=53, seed=0, noise=0.1, dtype=torch.float32):
    """A smooth picture and a noisy copy, `[H, W, 3]` in 0..1."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 5, 7, generator=generator, dtype=torch.float64)
    target = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)[0].permute(1, 2, 0)
    prediction = (target + noise * torch.randn(target.shape, generator=generator, dtype=torch.float64)).clamp(0, 1)
    return prediction.to(dtype), target.to(dtype)


def lego(index=0, split="train"):
    from PIL import Image

    return torch.from_numpy(np.asarray(Image.open(Path(DATA) / "lego_400" / split
                                                  / f"r_{index}.png")).astype(np.float32) / 255)


# ---- other implementations

@pytest.mark.parametrize("noise", [0.003, 0.1, 0.5])
def test_psnr_and_ssim_agree_with_torchmetrics(noise):
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    prediction, target = pair(noise=noise, dtype=torch.float64)
    theirs = peak_signal_noise_ratio(prediction, target, data_range=(0.0, 1.0)).item()
    assert abs(psnr_srgb_db(prediction, target) - theirs) < 1e-4                     # torchmetrics computes in float32
    batch = [image.permute(2, 0, 1)[None] for image in (prediction, target)]
    options = {"data_range": 1.0, "sigma": 1.5, "kernel_size": 11, "k1": 0.01, "k2": 0.03, "return_full_image": True}
    # torchmetrics reflects the border, `ssim` leaves it out
    theirs = structural_similarity_index_measure(*batch, **options)[1][..., 5:-5, 5:-5].mean().item()
    assert abs(ssim(prediction, target) - theirs) < 1e-5


def test_ssim_agrees_with_convolution_in_numpy():
    """Separable float64 windows by numpy alone; pytorch_msssim's window is stored in float32, hence 1e-6."""
    from numpy.lib.stride_tricks import sliding_window_view

    prediction, target = (image.double().numpy() for image in pair())
    tap = np.exp(-((np.arange(11) - 5.0) ** 2) / 4.5)
    window = np.outer(tap, tap) / tap.sum() ** 2

    def mean(image): return (sliding_window_view(image, (11, 11), (0, 1)) * window).sum((-1, -2))

    mx, my = mean(prediction), mean(target)
    vx, vy, vxy = mean(prediction**2) - mx**2, mean(target**2) - my**2, mean(prediction * target) - mx * my
    theirs = ((2 * mx * my + 1e-4) * (2 * vxy + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))).mean()
    assert abs(ssim(*map(torch.from_numpy, (prediction, target))) - theirs) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ssim_and_its_gradient_are_those_of_pytorch_msssim(dtype):
    """Reported scores came from pytorch_msssim before. On one machine they are equal to the last bit; another
    processor may add the planes of a convolution in another order, hence a few units in float32's last place."""
    peer = pytest.importorskip("pytorch_msssim")
    prediction, target = pair(67, 83, dtype=dtype)
    planes = [image.movedim(-1, 0)[None].contiguous() for image in (prediction.requires_grad_(), target)]
    values = [structural_similarity(prediction, target),
              peer.ssim(*planes, data_range=1.0, size_average=False, win_size=11, win_sigma=1.5)[0]]
    gradients = [torch.autograd.grad(value, prediction)[0] for value in values]
    torch.testing.assert_close(values[0], values[1], atol=5e-7, rtol=0)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-7, rtol=1e-3)


def test_ssim_has_a_gradient_that_points_to_the_target():
    prediction, target = pair(dtype=torch.float64)
    prediction.requires_grad_()
    value = structural_similarity(prediction, target)
    value.backward()
    assert structural_similarity(prediction.detach() + 0.5 * prediction.grad, target) > value


def test_transfer_functions_have_the_values_of_the_standard():
    """8-bit codes and their light, from the formula of IEC 61966-2-1 in plain Python."""
    for code, light in ((0, 0.0), (10, 0.003035269835488375), (128, 0.21586050011389926), (188, 0.5028864580325687),
                        (255, 1.0)):
        assert srgb_to_linear(torch.tensor(code / 255, dtype=torch.float64)).item() == pytest.approx(light, abs=1e-12)
        assert linear_to_srgb(torch.tensor(light, dtype=torch.float64)).item() * 255 == pytest.approx(code, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_metrics_do_not_change_their_arguments_and_take_either_float(dtype):
    prediction, target = pair(dtype=dtype)
    kept = prediction.clone(), target.clone()
    alpha = torch.ones(target.shape[:2], dtype=dtype)
    scores = evaluate_image(prediction, alpha, target, alpha)
    reference = evaluate_image(*(x.double() for x in (prediction, alpha, target, alpha)))
    assert all(abs(scores[name] - reference[name]) < 1e-4 for name in scores)
    assert torch.equal(prediction, kept[0]) and torch.equal(target, kept[1])


# ---- incidents

@pytest.mark.incident(1)
def test_incident_1_the_blank_score_is_reported_beside_every_score():
    prediction, target = pair()
    alpha = torch.ones(target.shape[:2])
    scores = evaluate_image(prediction, alpha, target, alpha)
    assert scores["psnr_blank_white_db"] == pytest.approx(-10 * math.log10(((1 - target.double()) ** 2).mean().item()))
    assert "psnr_blank_white_db" in evaluation_table({"r_0": scores})


@pytest.mark.incident(1)
def test_incident_1_an_empty_render_scores_the_blank_score():
    _, target = pair()
    alpha, nothing = torch.ones(target.shape[:2]), torch.zeros(target.shape[:2])
    scores = evaluate_image(torch.zeros_like(target), nothing, target, alpha)
    assert scores["psnr_srgb_white_db"] == pytest.approx(scores["psnr_blank_white_db"], abs=1e-9)


@pytest.mark.incident(1)
@needs_lego
def test_incident_1_legos_blank_score_is_about_nine_decibels():
    scores = [blank_baseline_db(over_background(*straight_to_premultiplied(lego(index))))
              for index in range(0, 100, 20)]
    assert min(scores) > 7.5 and max(scores) < 11.5 and scores[0] == pytest.approx(9.36, abs=0.01)


@pytest.mark.incident(2)
@needs_lego
@pytest.mark.parametrize("index", [0, 31, 77])
def test_incident_2_a_real_image_of_straight_alpha_is_recognised(index):
    rgba = lego(index)
    rgb, alpha = straight_to_premultiplied(rgba)
    check_premultiplied(rgb, alpha)
    with pytest.raises(KiloError, match="straight, not premultiplied"): over_background(rgba[..., :3], alpha)
    with pytest.raises(KiloError, match="straight"): evaluate_image(rgba[..., :3], alpha, rgb, alpha)


@pytest.mark.incident(2)
def test_incident_2_bright_gaussians_are_not_taken_for_straight_colour():
    """Spherical harmonics can give a highlight above 1; on white it is clipped to the same pixel as on a screen."""
    alpha = torch.linspace(0, 1, 64)[:, None].expand(64, 64)
    bright = alpha[..., None] * torch.tensor([1.3, 1.0, 0.4])
    scores = evaluate_image(bright, alpha, torch.minimum(bright, alpha[..., None]), alpha)
    assert scores["psnr_srgb_white_db"] > 120


@pytest.mark.incident(2)
def test_incident_2_the_spaces_are_named_and_differ():
    prediction, target = pair()
    assert psnr_linear_db(prediction,
                          target) == pytest.approx(psnr_srgb_db(srgb_to_linear(prediction.double()),
                                                                srgb_to_linear(target.double())))
    assert abs(psnr_linear_db(prediction, target) - psnr_srgb_db(prediction, target)) > 0.3


@pytest.mark.incident(2)
@pytest.mark.parametrize("spoil", ["nan", "range", "straight", "shape", "alpha"])
def test_incident_2_the_self_check_refuses_colours_of_the_wrong_kind(spoil):
    _, target = pair()
    alpha = torch.ones(target.shape[:2])
    assert self_check(target, alpha)["psnr_srgb_white_db"] == math.inf
    if spoil == "nan": target[3, 4, 1] = torch.nan
    if spoil == "range": target[3, 4, 1] = 1.5
    if spoil == "straight": alpha = alpha * 0.3
    if spoil == "shape": alpha = alpha[:-1]
    if spoil == "alpha": alpha[0, 0] = 1.5
    with pytest.raises(KiloError): self_check(target, alpha)


@pytest.mark.incident(16)
def test_incident_16_a_masked_psnr_divides_by_pixels_times_three():
    prediction, target = pair()
    mask = torch.zeros(target.shape[:2]); mask[5:20, 8:30] = 1
    inside = psnr_srgb_db(prediction[5:20, 8:30], target[5:20, 8:30])
    assert foreground_psnr_db(prediction, target, mask) == pytest.approx(inside, abs=1e-9)
    by_pixels = -10 * math.log10((mask[..., None].double() * (prediction.double() - target.double()) ** 2).sum().item()
                                 / mask.sum().item())
    assert inside - by_pixels == pytest.approx(4.771, abs=1e-3)


def test_the_mean_of_views_is_the_mean_of_their_decibels():
    table = evaluation_table({"a": {"psnr_srgb_white_db": 20.0}, "b": {"psnr_srgb_white_db": 40.0},
                              "c": {"psnr_srgb_white_db": math.nan}})
    assert table.splitlines()[-1].split() == ["mean", "30.00"]


# ---- perceptual

@needs_lpips
@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_heads_are_those_of_torchmetrics(net):
    """The copy of the lpips 0.1.4 heads in torchmetrics, bit for bit."""
    import torchmetrics.functional.image.lpips as peer

    theirs = torch.load(Path(peer.__file__).parent / "lpips_models" / f"{net}.pth", weights_only=True,
                        map_location="cpu")
    ours = load_network(net, find_weights()).heads
    assert all(torch.equal(head, theirs[f"lin{i}.model.1.weight"].reshape(-1)) for i, head in enumerate(ours))


@needs_lpips
@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_is_zero_symmetric_and_grows_with_damage(net):
    distance = lpips_metrics()[f"lpips_{net}"]
    _, target = pair(48, 48)
    values = [distance(pair(48, 48, noise=noise)[0], target) for noise in (0.0, 0.02, 0.08, 0.3)]
    assert values[0] == 0 and values[1] < values[2] < values[3] < 1.5
    noisy = pair(48, 48)[0]
    assert distance(noisy, target) == pytest.approx(distance(target, noisy), rel=1e-5)


@needs_lpips
def test_lpips_takes_part_in_the_evaluation_and_its_self_check():
    prediction, target = pair(40, 40)
    alpha = torch.ones(40, 40)
    assert self_check(target, alpha, lpips_metrics())["lpips_vgg"] == 0
    scores = evaluate_image(prediction, alpha, target, alpha, lpips_metrics())
    assert list(scores)[-2:] == ["lpips_alex", "lpips_vgg"] and scores["lpips_alex"] > 0.01


def test_without_lpips_an_evaluation_is_complete_and_names_the_command_that_fetches_it(tmp_path):
    prediction, target = pair()
    alpha = torch.ones(target.shape[:2])
    assert not lpips_available(tmp_path) and "kilonb data get lpips" in MISSING
    assert "lpips_alex" not in evaluate_image(prediction, alpha, target, alpha, lpips_metrics(tmp_path))


@needs_lpips
def test_one_flipped_bit_in_the_weights_is_refused(tmp_path):
    name = FILES["alex"][0]
    data = bytearray((find_weights() / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(KiloError, match="sha256 differs"): load_network("alex", tmp_path)


def test_nothing_heavy_is_imported_before_it_is_needed():
    heavy = ["torchmetrics", "pytorch_msssim", "matplotlib", "pooch", "torchvision", "fastcore", "nbdev"]
    code = ("import sys, json, kilonb.metrics.images, kilonb.metrics.perceptual; "
            f"print(json.dumps([name for name in {heavy} if name in sys.modules]))")
    assert json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                                     check=True).stdout) == []
