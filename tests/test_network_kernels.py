"""The compiled network kernels against float64 autograd: random shapes, both blockings, any number of threads."""

import psutil
import pytest
import torch
from torch.nn.functional import normalize

from kilonb.core.testing import with_threads
from kilonb.fields.blocking import VARIABLE
from kilonb.fields.hashgrid import HashGridConfig, HashGridField
from kilonb.fields.kernels import run_networks
from kilonb.fields.kilonerf import CellGrid, KiloNeRF, KiloNeRFConfig, PaddedNetworks
from kilonb.fields.network_benchmark import network_batch, network_calls

SHAPES = [(32, 7, 4, False), (32, 7, 4, True), (18, 2, 0, False), (1, 0, 0, False), (16, 1, 1, True),
          (40, 10, 2, False), (5, 3, 6, True)]


@pytest.fixture(params=["wide", "narrow"])
def blocking(request, monkeypatch):
    monkeypatch.setenv(VARIABLE, request.param)
    return request.param


def field_of(hidden: int, position: int, direction: int, refeed: bool, cells: int = 7) -> KiloNeRF:
    generator = torch.Generator().manual_seed(hidden)
    grid = CellGrid(torch.zeros(3), 1.0, torch.arange(cells).view(-1, 1, 1))
    field = KiloNeRF(grid, KiloNeRFConfig(1.0, position, direction, hidden, refeed), generator)
    with torch.no_grad(): field.networks.add_(torch.randn(field.networks.shape, generator=generator) * 0.2)
    return field


def samples_of(count: int, cells: int = 7) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(count)
    network = torch.randint(0, cells, (count,), generator=generator) // 2 * 2                # odd cells are empty
    local = torch.rand(count, 3, generator=generator) * 2 - 1
    return network, local, normalize(torch.randn(count, 3, generator=generator), dim=-1)


def gradients_of(field: KiloNeRF, samples: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    raw = run_networks(field.networks, field.layout, *samples)
    weight = torch.linspace(-1, 1, raw.numel()).view_as(raw)
    return raw.detach(), torch.autograd.grad((raw * weight).sum(), field.networks)[0]


def exact_gradients_of(field: KiloNeRF, samples: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    field, (network, local, directions) = field.double(), samples
    raw = PaddedNetworks.run_reference(field, network, local.double(), directions.double())
    weight = torch.linspace(-1, 1, raw.numel()).view_as(raw)
    gradient = torch.autograd.grad((raw * weight).sum(), field.networks)[0]
    field.float()
    return raw.detach(), gradient


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_autograd_in_float64(shape, blocking):
    field = field_of(*shape)
    for count in (1, 15, 17, 64, 65, 500):
        samples = samples_of(count)
        (raw, gradient), (exact, exact_gradient) = gradients_of(field, samples), exact_gradients_of(field, samples)
        torch.testing.assert_close(raw.double(), exact, atol=2e-4, rtol=1e-4)
        # a unit within rounding of zero may be on in one and off in the other: most networks agree closely
        error = (gradient - exact_gradient).norm(dim=1) / exact_gradient.norm(dim=1).clamp(min=1e-9)
        assert error.median() < 1e-3 and (gradient[1::2] == 0).all()


def test_no_samples_give_no_values_and_zero_gradients(blocking):
    raw, gradient = gradients_of(field_of(*SHAPES[0]), samples_of(0))
    assert raw.shape == (0, 4) and (gradient == 0).all()


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_both_blockings_and_all_numbers_of_threads_give_the_same_bits(shape, monkeypatch):
    field, samples, results = field_of(*shape), samples_of(700), []
    for name in ("wide", "narrow"):
        monkeypatch.setenv(VARIABLE, name)
        for count in (1, 2, 3):
            with with_threads(count): results.append(gradients_of(field, samples))
    for raw, gradient in results[1:]: assert torch.equal(raw, results[0][0]) and torch.equal(gradient, results[0][1])


def test_a_second_backward_pass_and_a_sample_without_gradient_are_right():
    field, samples = field_of(*SHAPES[0]), samples_of(300)
    raw = run_networks(field.networks, field.layout, *samples)
    kept = (torch.arange(300) % 3 > 0).float()[:, None]
    first, second = (torch.autograd.grad((raw * kept).sum(), field.networks, retain_graph=True)[0] for _ in range(2))
    alone = tuple(part[kept[:, 0] > 0] for part in samples)
    fewer = torch.autograd.grad(run_networks(field.networks, field.layout, *alone).sum(), field.networks)[0]
    assert torch.equal(first, second) and torch.equal(first, fewer)


def test_a_parameter_that_is_not_a_number_reaches_only_its_own_cell():
    field, samples = field_of(*SHAPES[0]), samples_of(400)
    before = run_networks(field.networks, field.layout, *samples).detach()
    with torch.no_grad(): field.networks[2] = torch.nan
    raw, gradient = gradients_of(field, samples)
    other = samples[0] != 2
    assert torch.equal(raw[other], before[other]) and raw[~other].isnan().all()
    assert gradient[[0, 1, 3, 4, 5, 6]].isfinite().all()


def test_repeated_passes_do_not_take_more_memory():
    calls = network_calls(network_batch(50, 100))
    for _ in range(3): calls["forward"](), calls["backward"]()
    before = psutil.Process().memory_info().rss
    for _ in range(60): calls["forward"](), calls["backward"]()
    assert psutil.Process().memory_info().rss - before < 20e6                        # one leak of a gradient: 66 MB


@pytest.mark.parametrize("config", [HashGridConfig(), HashGridConfig(levels=3, log2_table=8, hidden=20, features=33,
                                                                     direction_frequencies=1)])
def test_the_hash_grid_s_gradients_are_those_of_autograd_in_float64(config, blocking):
    box = torch.tensor([[-1.0, -1, -1], [1, 1, 1]])
    for count in (0, 1, 70):
        field = HashGridField(box, config, torch.Generator().manual_seed(3))
        with torch.no_grad(): field.table.mul_(5e3)
        _, local, directions = samples_of(count)
        ours = field._raw(local, directions)
        gradients = torch.autograd.grad(ours.square().sum(), (field.table, field.network))
        exact = field.double()
        expected = exact.run_reference(local.double(), directions.double())
        truth = torch.autograd.grad(expected.square().sum(), (exact.table, exact.network))
        torch.testing.assert_close(ours.double(), expected, atol=1e-3, rtol=1e-3)
        for one, other in zip(gradients, truth): assert (one - other).norm() <= 1e-2 * other.norm()
