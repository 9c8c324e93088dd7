"""What every kind of field owes to those who render, train, save and compare it."""
from dataclasses import FrozenInstanceError, asdict, fields

import pytest
import torch
from torch.nn.functional import normalize

from kilonb.fields.hashgrid import HashGridConfig, HashGridField
from kilonb.fields.kilonerf import KiloNeRF, KiloNeRFConfig, cells_of
from kilonb.fields.mlp import MLPConfig, MLPField
from kilonb.fields.occupancy import OccupancyGrid
from kilonb.fields.rendering import render_image, render_rays
from kilonb.geometry.cameras import orbit_cameras
from kilonb.core.configs import build_config
from kilonb.core.errors import KiloError

BOX = torch.tensor([[-0.6, -0.4, -0.4], [0.6, 0.4, 0.5]])
GRID = OccupancyGrid(BOX, torch.ones(6, 4, 4, dtype=torch.bool))
CONFIGS = {
    "kilonerf": KiloNeRFConfig(
        cell_size=0.4, position_frequencies=3, direction_frequencies=2, hidden=16, density_bias=1.0
    ),
    "mlp": MLPConfig(position_frequencies=3, direction_frequencies=2, hidden=16, layers=2, density_bias=1.0),
    "hashgrid": HashGridConfig(
        levels=4, log2_table=8, base_resolution=4, finest_resolution=32, hidden=16, features=8, density_bias=1.0
    ),
}
OVER_A_BOX = {"mlp": MLPField, "hashgrid": HashGridField}
KINDS = pytest.mark.parametrize("kind", CONFIGS)


def make(kind: str, seed: int = 0):
    """A small field over BOX, with weights that are no longer those of a beginner."""
    generator, config = torch.Generator().manual_seed(seed), CONFIGS[kind]
    if kind == "kilonerf": made = KiloNeRF(cells_of(GRID, config.cell_size), config, generator)
    else: made = OVER_A_BOX[kind](BOX, config, generator)
    with torch.no_grad():
        for parameter in made.parameters(): parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return made


def samples(count: int = 3000, seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions inside BOX and unit directions."""
    generator = torch.Generator().manual_seed(seed)
    return BOX[0] + torch.rand(count, 3, generator=generator) * (BOX[1] - BOX[0]), normalize(
        torch.randn(count, 3, generator=generator), dim=-1
    )


def camera(size: int = 20):
    return orbit_cameras(1, 2.0, 20.0, torch.zeros(3), torch.tensor([0.0, 0, 1]), size, size, 38.0)[0]


def loss_of(field, positions, directions):
    sigma, rgb = field(positions, directions)
    return sigma.square().mean() / 100 + rgb.square().mean()


@KINDS
def test_one_interface(kind):
    """Code that takes a field need not know its kind."""
    field, (positions, directions) = make(kind), samples()
    sigma, rgb = field(positions, directions)
    assert field.kind == kind and field.config == CONFIGS[kind]
    assert sigma.shape == (3000,) and rgb.shape == (3000, 3) and sigma.dtype == rgb.dtype == torch.float32
    assert (sigma > 0).all() and rgb.min() >= -0.0011 and rgb.max() <= 1.0011
    features = field.features(positions[:40])
    assert features.shape == (40, field.feature_width) and torch.equal(
        features, field.features(positions[:40], directions[:40])
    )
    with pytest.raises(FrozenInstanceError): field.config.hidden = 3


@KINDS
def test_no_samples_are_no_special_case(kind):
    """A batch of rays may miss everything."""
    field, none = make(kind), torch.zeros(0, 3)
    sigma, rgb = field(none, none)
    assert sigma.shape == (0,) and rgb.shape == (0, 3) and field.features(none).shape == (0, field.feature_width)
    (sigma.sum() + rgb.sum()).backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in field.parameters())


@KINDS
def test_geometry_looks_the_same_from_all_sides_and_colour_does_not(kind):
    field, (positions, directions) = make(kind), samples()
    with torch.no_grad():
        (sigma, rgb), (other_sigma, other_rgb) = field(positions, directions), field(positions, -directions)
    assert torch.equal(sigma, other_sigma) and (rgb - other_rgb).abs().max() > 1e-3


@KINDS
def test_outside_there_is_nothing(kind):
    """Nor where a position is not a number; and samples outside change nothing for those inside."""
    field, (positions, directions) = make(kind), samples(200)
    strange = torch.tensor([[9.0, 0, 0], [0, -9, 0], [0, 0, 1e20], [torch.nan, 0, 0], [0, torch.inf, 0]])
    with torch.no_grad():
        sigma, rgb = field(torch.cat([strange, positions]), torch.cat([directions[:5], directions]))
        features = field.features(torch.cat([strange[:3], positions[:10]]))
        torch.testing.assert_close(sigma[5:], field(positions, directions)[0])
        assert (sigma[:5] == 0).all() and torch.isfinite(rgb).all()
        assert (features[:3] == 0).all() and (features[3:] != 0).any()


@KINDS
def test_every_parameter_gets_a_gradient(kind):
    """In the notes, a line that overwrote a network's output with its input left most of it idle for a week."""
    field = make(kind)
    loss_of(field, *samples(20_000)).backward()
    for name, parameter in field.named_parameters():
        live = (parameter.grad != 0).double().mean().item()
        # an unlucky ReLU, an unlucky hash
        assert live > (0.97 if kind == "hashgrid" and name == "table" else 0.99), f"{1 - live:.1%} of {name} is idle"


@KINDS
def test_features_teach_the_geometry_and_nothing_behind_it(kind):
    """A loss on features moves what lies before the direction, and leaves density's and colour's last layers alone."""
    field, (positions, _) = make(kind), samples(2000)
    field.features(positions).square().sum().backward()
    if kind == "mlp":
        reached = {name.split(".")[0] for name,
                   p in field.named_parameters() if p.grad is not None and (p.grad != 0).any()}
    else:
        grad = field.networks.grad if kind == "kilonerf" else field.network.grad[None]
        reached = {name for name, (start, _, end) in field.layout.offsets.items() if (grad[:, start:end] != 0).any()}
    assert reached == {"kilonerf": {"first", "second", "feature"}, "mlp": {"trunk", "feature"},
                       "hashgrid": {"first", "feature"}}[kind]
    assert kind != "hashgrid" or (field.table.grad != 0).any()


@KINDS
def test_a_field_agrees_with_its_twin_in_double_precision(kind):
    """Values to float32's rounding; gradients too, but for units so close to zero that rounding decides whether they
    are on."""
    field, (positions, directions) = make(kind), samples()
    ours = torch.autograd.grad(loss_of(field, positions, directions), list(field.parameters()))
    with torch.no_grad(): values, few = field(positions, directions), field.features(positions[:50])
    twin = field.double()
    exact = torch.autograd.grad(loss_of(twin, positions.double(), directions.double()), list(twin.parameters()))
    with torch.no_grad():
        for one, two in zip(values, twin(positions.double(), directions.double())):
            torch.testing.assert_close(one.double(), two, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(few.double(), twin.features(positions[:50].double()), atol=1e-4, rtol=1e-4)
    for one, two in zip(ours, exact): assert (one - two).norm() < 2e-3 * two.norm()


@KINDS
def test_a_twin_s_gradients_are_those_of_differences(kind):
    field, (positions, directions) = make(kind).double(), samples(4)
    parameters, inputs = list(field.parameters()), (positions.double(), directions.double())
    # thousands of numbers: the sum of all slopes along a few directions instead
    if kind == "kilonerf":
        towards = torch.randn(3, *parameters[0].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        start = parameters[0].detach().clone()
        def along(t):
            moved = torch.func.functional_call(field, {"networks": start + (t[:, None, None] * towards).sum(0)}, inputs)
            return torch.cat([moved[0], moved[1].flatten()])
        assert torch.autograd.gradcheck(along, torch.zeros(3, dtype=torch.float64, requires_grad=True), atol=1e-4)
    else: assert torch.autograd.gradcheck(lambda *_: field(*inputs), parameters, fast_mode=True)


@KINDS
def test_a_saved_field_looks_the_same(kind):
    """The state holds all that the picture depends on; the config survives as plain numbers."""
    field, other = make(kind, 0), make(kind, 1)
    first, different = (render_image(f, camera(), GRID, 0.05).rgb_premultiplied for f in (field, other))
    other.load_state_dict(field.state_dict())
    assert not torch.equal(first, different) and torch.equal(
        first, render_image(other, camera(), GRID, 0.05).rgb_premultiplied
    )
    assert build_config(type(field.config), asdict(field.config)) == field.config
    assert all(isinstance(getattr(field.config, f.name), (int, float, bool, str)) for f in fields(field.config))


@KINDS
def test_training_is_the_same_twice_to_the_last_bit(kind):
    """Rays, field, compositing and their gradients: a run that is repeated or resumed must not differ."""
    def trained():
        field, rays = make(kind), camera().rays()
        optimizer = torch.optim.Adam(field.parameters(), lr=1e-2, fused=True)
        for _ in range(4):
            seen = render_rays(field, rays, GRID, 0.05)
            optimizer.zero_grad(); (seen.rgb_premultiplied - 0.3).square().mean().backward(); optimizer.step()
        return [p.detach().clone() for p in field.parameters()]

    first, second = trained(), trained()
    assert all(torch.equal(a, b) for a, b in zip(first, second)) and not torch.equal(
        first[0], next(make(kind).parameters())
    )


@KINDS
def test_making_a_field_leaves_everybody_s_random_numbers_alone(kind):
    before = torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(make(kind, 3).parameters(), make(kind, 3).parameters()))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("config", "wrong"),
                         [(KiloNeRFConfig, {"cell_size": 0.0}), (KiloNeRFConfig, {"hidden": 0}),
                          (MLPConfig, {"layers": 0}), (MLPConfig, {"direction_frequencies": -1}),
                          (HashGridConfig, {"levels": 0}), (HashGridConfig, {"log2_table": 60}),
                          (HashGridConfig, {"base_resolution": 64, "finest_resolution": 32}),
                          (HashGridConfig, {"features": 0}), (HashGridConfig, {"density_scale": 0.0})],
                         ids=lambda value: value.__name__ if isinstance(value, type) else "-".join(value))
def test_a_bad_shape_is_refused_in_one_sentence(config, wrong):
    with pytest.raises(KiloError) as refused: config(**wrong)
    message = str(refused.value)
    assert message.endswith(".") and "\n" not in message and message.count(". ") == 0


@pytest.mark.parametrize("kind", OVER_A_BOX)
def test_a_box_without_inside_is_refused(kind):
    for box in (BOX.flip(0), BOX[:1], BOX * torch.tensor([1.0, 0, 1]), BOX * torch.nan):
        with pytest.raises(KiloError, match=r"box is .* expected a lower corner"): OVER_A_BOX[kind](box, CONFIGS[kind])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@KINDS
def test_a_gpu_sees_the_same_field(kind):
    field, (positions, directions) = make(kind), samples()
    ours = torch.autograd.grad(loss_of(field, positions, directions), list(field.parameters()))
    field = field.cuda()
    theirs = torch.autograd.grad(loss_of(field, positions.cuda(), directions.cuda()), list(field.parameters()))
    for one, two in zip(ours, theirs): assert (one - two.cpu()).norm() < 5e-3 * one.norm()
