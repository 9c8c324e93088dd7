"""Memory that stays behind after many rendered images with gradients: `python -m tests.fuzz.leak --count 10000`.

The first 2,500 images are not counted: CPython keeps up to 2,000 freed tuples of each length, which torch's autograd
functions fill at about one a call (1.2 MB in all), and nothing grows after that.
"""
import argparse
import gc

WARM_UP = 2_500


def _tiny_scene():
    """(rasterize's tensors, the leaves among them): forty gaussians with harmonics of degree 1, one camera."""
    import torch

    chance = torch.Generator().manual_seed(0)
    leaves = [torch.randn(40, 3, generator=chance) * 0.3, torch.randn(40, 4, generator=chance),
              torch.rand(40, 3, generator=chance) * 0.1 + 0.05, torch.rand(40, generator=chance),
              torch.randn(40, 4, 3, generator=chance)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    view, K = torch.eye(4)[None].clone(), torch.tensor([[[40.0, 0, 16], [0, 40, 16], [0, 0, 1]]])
    view[0, 2, 3] = 3.0
    return (*leaves, view, K), leaves


def render_with_gradients(count: int) -> None:
    """Renders the tiny scene `count` times, each time with all gradients."""
    from kilonb.splats.rasterizer import rasterize

    tensors, leaves = _tiny_scene()
    for _ in range(count):
        colours, alphas, _ = rasterize(*tensors, 32, 32, sh_degree=1, render_mode="RGB+ED")
        (colours.square().sum() + alphas.sum()).backward()
        for leaf in leaves: leaf.grad = None


def _resident_bytes() -> int:
    import psutil

    gc.collect()
    return psutil.Process().memory_info().rss


def renders_growth(count: int, warm_up: int = WARM_UP) -> int:
    """Bytes by which the process grows over `count` renders with gradients, after `warm_up` of them."""
    render_with_gradients(warm_up)
    before = _resident_bytes()
    render_with_gradients(count)
    return _resident_bytes() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--bytes", action="store_true", help="print the number of bytes only")
    options = parser.parse_args()
    growth = renders_growth(options.count)
    print(growth if options.bytes else f"{options.count} renders with gradients: {growth / 1e6:+.2f} MB")


if __name__ == "__main__": main()
