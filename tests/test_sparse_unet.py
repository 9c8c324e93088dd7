"""The voxels, sparse convolutions and the U-Net of Flux4D."""
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers import real_data
from torch.nn.functional import conv3d, conv_transpose3d, leaky_relu

from kilonb.core.errors import KiloError
from kilonb.flux4d import sparse_conv
from kilonb.flux4d.sparse_conv import convolve, voxel_levels
from kilonb.flux4d.unet import GaussianNetwork, SparseUNet, SparseUNetConfig, calibrate_norms
from kilonb.flux4d.unet_benchmark import recorded_points, street_points
from kilonb.flux4d.voxels import pool, voxel_grid

SMALL = SparseUNetConfig(channels=(32, 40, 48), hidden=32)
POINTS = 1500
BACKENDS = ("gather", "compiled", "spconv")


@pytest.fixture(scope="module")
def points() -> torch.Tensor: return street_points(POINTS)


@pytest.fixture(scope="module")
def inputs() -> torch.Tensor: return torch.randn(POINTS, 15, generator=torch.Generator().manual_seed(1))


def network(config: SparseUNetConfig = SMALL, head_scale: float = 0.1, dtype=torch.float32) -> GaussianNetwork:
    torch.manual_seed(0)
    return GaussianNetwork(replace(config, head_scale=head_scale)).to(dtype)


def gradients(model: GaussianNetwork, grid, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs and the gradient of every parameter and of the inputs."""
    inputs = inputs.detach().clone().requires_grad_()
    update = model(grid, inputs)
    weights = torch.randn(len(inputs), update.deltas.shape[1], generator=torch.Generator().manual_seed(2))
    ((update.deltas * weights).sum() + update.velocities.square().sum()).backward()
    return {"deltas": update.deltas.detach(), "inputs": inputs.grad} | {
        name: parameter.grad for name, parameter in model.named_parameters()}


# ---- voxels

def test_voxels_do_not_depend_on_the_order_of_the_points(points, inputs):
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(3))
    one, other = voxel_grid(points), voxel_grid(points[order])
    assert torch.equal(one.coordinates, other.coordinates) and torch.equal(one.counts, other.counts)
    assert torch.equal(one.point_to_voxel[order], other.point_to_voxel)
    torch.testing.assert_close(pool(one, inputs), pool(other, inputs[order]))


def test_every_point_lies_in_its_voxel_and_the_mean_is_that_of_its_points(points):
    voxels = voxel_grid(points.double())
    means = pool(voxels, points.double())
    inside = voxels.point_to_voxel >= 0
    assert torch.equal(inside, (points[:, :2].abs() < 60).all(1) & (points[:, 2].abs() < 6))
    low = voxels.coordinates.flip(1)[voxels.point_to_voxel, :3] * 0.3 - torch.tensor([60, 60, 6])
    assert ((points[inside] - low[inside] > -1e-4) & (points[inside] - low[inside] < 0.3 + 1e-4)).all()
    for row in (0, len(voxels.counts) // 2):
        torch.testing.assert_close(means[row], points[voxels.point_to_voxel == row].double().mean(0))


def test_most_points_of_a_real_clip_are_inside_the_voxel_range():
    cloud = recorded_points(real_data("pandaset") / "002", frames=2)
    assert 0.85 < voxel_grid(cloud).inside_share < 0.99


# ---- equality

def dense_unet(model: SparseUNet, volume: torch.Tensor) -> torch.Tensor:
    """The network without normalisation, on a full grid [1, C, Z, Y, X], by torch's dense convolutions."""
    def apply(block, x, function, **options):
        weight = block.conv.weight.permute(0, 4, 1, 2, 3)
        x = function(x, weight if function is conv3d else weight.transpose(0, 1), **options)
        return leaky_relu(x + block.norm.bias[:, None, None, None], block.slope)
    skips = []
    for level, blocks in enumerate(model.encoder):
        if level: volume = apply(model.down[level - 1], volume, conv3d, stride=2)
        for block in blocks: volume = apply(block, volume, conv3d, padding=1)
        skips.append(volume)
    for level in reversed(range(len(model.up))):
        volume = torch.cat([apply(model.up[level], volume, conv_transpose3d, stride=2), skips[level]], 1)
        for block in model.decoder[level]: volume = apply(block, volume, conv3d, padding=1)
    return volume


@pytest.mark.parametrize("backend", BACKENDS)
def test_on_a_full_grid_the_network_is_a_dense_unet(backend):
    centres = torch.cartesian_prod(*[torch.arange(8.0) + 0.5] * 3)
    grid = voxel_grid(centres, bounds=((0, 8),) * 3, voxel_size=1.0)
    torch.manual_seed(0)
    model = SparseUNet(SparseUNetConfig(inputs=5, channels=(8, 12, 16), norm="none", backend=backend))
    for block in model.modules():
        if hasattr(block, "bias"): torch.nn.init.normal_(block.bias)
    features = torch.randn(512, 5)
    z, y, x = grid.coordinates[:, 1:].long().unbind(1)
    volume = torch.zeros(8, 8, 8, 5).index_put((z, y, x), features).permute(3, 0, 1, 2)[None]
    with torch.no_grad():
        expected = dense_unet(model.double(), volume.double())[0][:, z, y, x].T
        found = model.float()(grid, features)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_outputs_and_gradients_of_all_backends_are_those_of_float64(points, inputs):
    # with a slope near one, the sign of an activation near zero, which rounding may change, hardly matters
    grid, config = voxel_grid(points), replace(SMALL, norm="layer", slope=0.999)
    exact = gradients(network(replace(config, backend="gather"), dtype=torch.float64), grid, inputs.double())
    for backend in BACKENDS:
        found = gradients(network(replace(config, backend=backend)), grid, inputs)
        assert found.keys() == exact.keys()
        for name, values in found.items():
            assert (values - exact[name]).norm() < 1e-5 * exact[name].norm(), (backend, name)


def test_weights_move_between_backends_and_give_the_same_running_averages(points, inputs):
    grid, states = voxel_grid(points), []
    for backend in BACKENDS:
        model = network(replace(SMALL, backend=backend))
        for _ in range(2): model(grid, inputs)
        states.append(model.state_dict())
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        for name, values in state.items(): torch.testing.assert_close(values, states[0][name], atol=1e-4, rtol=1e-4)


def test_the_number_of_threads_changes_no_bit(points, inputs):
    grid, before = voxel_grid(points), torch.get_num_threads()
    results = []
    config = replace(SMALL, norm="none")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(gradients(network(config), grid, inputs))
    torch.set_num_threads(before)
    for name, values in results[0].items():
        if ".conv." in name or name == "deltas": assert torch.equal(values, results[1][name]), name


def test_clouds_of_a_batch_do_not_meet(points, inputs):
    model = network(replace(SMALL, norm="layer"))
    both = voxel_grid(points.repeat(2, 1), torch.arange(2).repeat_interleave(len(points)))
    other = inputs.flip(0)
    with torch.no_grad():
        together = model(both, torch.cat([inputs, other])).deltas
        alone = torch.cat([model(voxel_grid(points), values).deltas for values in (inputs, other)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


# ---- training

@pytest.mark.incident(24)
@pytest.mark.parametrize("config", [SparseUNetConfig(), SparseUNetConfig(norm="layer"), SparseUNetConfig(norm="none"),
                                    SparseUNetConfig(inputs=29, velocities=0, backend="gather")])
def test_incident_24_every_parameter_of_the_sparse_unet_gets_a_gradient(points, config):
    torch.manual_seed(0)
    model, inputs = GaussianNetwork(config), torch.randn(len(points), config.inputs)
    update = model(voxel_grid(points), inputs)
    assert update.deltas.abs().max() < 0.2 and update.velocities.shape == (len(points), config.velocities, 3)
    (update.deltas.square().sum() + update.velocities.square().sum()).backward()
    dead = {name for name, parameter in model.named_parameters()
            if parameter.grad is None or not parameter.grad.abs().max() > 0}
    assert dead == set()


@pytest.mark.incident(24)
def test_incident_24_the_decoder_reads_its_skip_connections(points, inputs):
    model, grid = network(), voxel_grid(points)
    outputs = []
    for scale in (1.0, 0.0):
        handle = model.unet.up[0].register_forward_hook(lambda module, args, out, scale=scale: out * scale)
        with torch.no_grad(): outputs.append(model.features(grid, inputs))
        handle.remove()
    assert (outputs[0] - outputs[1]).abs().mean() > 0.05, "the coarse levels matter"
    assert outputs[1].std() > 0.05, "and so do the finest encoder features alone"


def test_after_fitting_one_clip_eval_gives_what_training_gave(points, inputs):
    model, grid = network(), voxel_grid(points)
    target = torch.sin(points[:, :1])
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    def loss(): return (model(grid, inputs).deltas[:, :1] - target).square().mean()
    first = loss().item()
    for _ in range(40):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
    last = loss().item()
    with torch.no_grad():
        evaluated = [(model.eval(), loss().item())[1]]
        calibrate_norms(model, [(grid, inputs)])
        evaluated.append(loss().item())
    assert last < 0.5 * first and not model.training
    assert abs(evaluated[0] - last) < 0.15 * first and abs(evaluated[1] - last) < 0.02 * first


def test_kernel_maps_are_built_once_per_clip(points, inputs, monkeypatch):
    built, original = [], sparse_conv.submanifold_map
    monkeypatch.setattr(sparse_conv, "submanifold_map", lambda *given: built.append(1) or original(*given))
    grid, model = voxel_grid(points), network()
    for _ in range(3): model(grid, inputs).deltas.sum().backward()
    network(replace(SMALL, inputs=29, velocities=0))(grid, torch.randn(len(points), 29))
    assert len(built) == 3


def test_points_outside_the_range_are_predicted_from_their_own_inputs(points, inputs):
    model, moved = network().eval(), points.clone()
    moved[0], moved[1] = torch.tensor([500.0, 0, 0]), torch.tensor([0, 0, 90.0])
    with torch.no_grad():
        alone = model.heads(voxel_grid(moved), torch.zeros(len(voxel_grid(moved)), 32), inputs).deltas
        found = model(voxel_grid(moved), inputs).deltas
    torch.testing.assert_close(found[:2], alone[:2])
    assert (found[2:] - alone[2:]).abs().mean() > 1e-3


def test_autocast_in_bfloat16_is_close_and_trains(points, inputs):
    model, grid = network(replace(SMALL, channels=(16, 16), blocks=1)), voxel_grid(points)
    exact = gradients(model, grid, inputs)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16): half = gradients(model, grid, inputs)
    assert (half["deltas"] - exact["deltas"]).norm() < 0.1 * exact["deltas"].norm()
    assert all(torch.isfinite(values).all() for values in half.values())


# ---- bad input

def test_a_missing_spconv_is_named_and_not_needed(points, monkeypatch):
    code = ("import sys, torch; from kilonb.flux4d.unet import *; from kilonb.flux4d.voxels import voxel_grid; "
            "GaussianNetwork(SparseUNetConfig(channels=(8, 8)))(voxel_grid(torch.eye(3) * 50), torch.zeros(3, 15)); "
            "sys.exit('spconv' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    monkeypatch.setattr(sparse_conv, "find_spec", lambda name: None)
    with pytest.raises(KiloError, match="pip install spconv-cu118"):
        network(replace(SMALL, backend="spconv"))(voxel_grid(points), torch.zeros(len(points), 15))


def test_unusable_backends_and_inputs_are_refused(points):
    near = voxel_levels(voxel_grid(points), 1)[0].near
    features, weight = torch.zeros(near.inputs, 3, dtype=torch.float64), torch.zeros(4, 3, 3, 3, 3)
    with pytest.raises(KiloError, match="float32 on a CPU"): convolve(features, weight, near, "compiled")
    with pytest.raises(KiloError, match="expected one of"): convolve(features, weight, near, "cudnn")
    with pytest.raises(KiloError, match=r"takes \[N, 15\]"): network()(voxel_grid(points), torch.zeros(POINTS, 14))
    with pytest.raises(KiloError, match="a row for each point"): pool(voxel_grid(points), torch.zeros(3, 4))
    lone = voxel_grid(torch.zeros(2, 3))
    with pytest.raises(KiloError, match="at least two voxels"): network()(lone, torch.zeros(2, 15))
    assert torch.isfinite(network().eval()(lone, torch.zeros(2, 15)).deltas).all()
    with pytest.raises(KiloError, match="not finite"): voxel_grid(points.index_fill(0, torch.tensor([5]), math.nan))
