"""Properties that all kinds of fields share: interface, gradients, determinism, saving."""
from dataclasses import FrozenInstanceError, asdict, fields

import pytest
import torch
from torch.nn.functional import normalize

from kilonb.fields.hashgrid import HashGridConfig, HashGridField
from kilonb.fields.kilonerf import KiloNeRF, KiloNeRFConfig, cells_from_occupancy
from kilonb.fields.mlp import KEYS_0_1, MLPConfig, MLPField, upgrade_state
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
    """A small field over BOX with weights that differ from the initial ones."""
    generator, config = torch.Generator().manual_seed(seed), CONFIGS[kind]
    if kind == "kilonerf": made = KiloNeRF(cells_from_occupancy(GRID, config.cell_size), config, generator)
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
    """All kinds of fields are evaluated in the same way."""
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
def test_no_samples_give_empty_results(kind):
    """A batch of rays may have no samples at all."""
    field, none = make(kind), torch.zeros(0, 3)
    sigma, rgb = field(none, none)
    assert sigma.shape == (0,) and rgb.shape == (0, 3) and field.features(none).shape == (0, field.feature_width)
    (sigma.sum() + rgb.sum()).backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in field.parameters())


@KINDS
def test_density_does_not_depend_on_the_direction_and_colour_does(kind):
    field, (positions, directions) = make(kind), samples()
    with torch.no_grad():
        (sigma, rgb), (other_sigma, other_rgb) = field(positions, directions), field(positions, -directions)
    assert torch.equal(sigma, other_sigma) and (rgb - other_rgb).abs().max() > 1e-3


@KINDS
def test_density_outside_is_zero(kind):
    """Also for positions that are NaN or infinite; samples outside do not change those inside."""
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
    """A line that overwrote the output of a network with its input once left most of it untrained (see
    nbs/background.ipynb)."""
    field = make(kind)
    loss_of(field, *samples(20_000)).backward()
    for name, parameter in field.named_parameters():
        live = (parameter.grad != 0).double().mean().item()
        # an unlucky ReLU, an unlucky hash
        assert live > (0.97 if kind == "hashgrid" and name == "table"
                       else 0.99), f"{1 - live:.1%} of {name} has no gradient"


@KINDS
def test_a_loss_on_features_reaches_the_layers_before_them_only(kind):
    """Layers before the direction get a gradient; density head, direction layer and rgb head get none."""
    field, (positions, _) = make(kind), samples(2000)
    field.features(positions).square().sum().backward()
    if kind == "mlp":
        reached = {name.split(".")[0] for name,
                   p in field.named_parameters() if p.grad is not None and (p.grad != 0).any()}
    else:
        grad = field.networks.grad if kind == "kilonerf" else field.network.grad[None]
        reached = {name for name, (start, _, end) in field.layout.offsets.items() if (grad[:, start:end] != 0).any()}
    assert reached == {"kilonerf": {"position_layer_1", "position_layer_2", "feature_layer"},
                       "mlp": {"position_layers", "feature_layer"},
                       "hashgrid": {"position_layer", "feature_layer"}}[kind]
    assert kind != "hashgrid" or (field.table.grad != 0).any()


@KINDS
def test_a_field_agrees_with_its_reference_in_float64(kind):
    """Values and gradients to float32 rounding; rounding also decides whether units very close to zero are active."""
    field, (positions, directions) = make(kind), samples()
    ours = torch.autograd.grad(loss_of(field, positions, directions), list(field.parameters()))
    with torch.no_grad(): values, few = field(positions, directions), field.features(positions[:50])
    reference = field.double()
    exact = torch.autograd.grad(loss_of(reference, positions.double(), directions.double()),
                                list(reference.parameters()))
    with torch.no_grad():
        for one, two in zip(values, reference(positions.double(), directions.double())):
            torch.testing.assert_close(one.double(), two, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(few.double(), reference.features(positions[:50].double()), atol=1e-4, rtol=1e-4)
    for one, two in zip(ours, exact): assert (one - two).norm() < 2e-3 * two.norm()


@KINDS
def test_gradients_of_the_reference_are_those_of_finite_differences(kind):
    field, (positions, directions) = make(kind).double(), samples(4)
    parameters, inputs = list(field.parameters()), (positions.double(), directions.double())
    # thousands of parameters: derivatives along a few directions instead
    if kind == "kilonerf":
        towards = torch.randn(3, *parameters[0].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        start = parameters[0].detach().clone()
        def along(t):
            moved = torch.func.functional_call(field, {"networks": start + (t[:, None, None] * towards).sum(0)}, inputs)
            return torch.cat([moved[0], moved[1].flatten()])
        assert torch.autograd.gradcheck(along, torch.zeros(3, dtype=torch.float64, requires_grad=True), atol=1e-4)
    else: assert torch.autograd.gradcheck(lambda *_: field(*inputs), parameters, fast_mode=True)


@KINDS
def test_a_saved_field_renders_the_same(kind):
    """The state dict holds all that an image depends on; the config is made of plain numbers."""
    field, other = make(kind, 0), make(kind, 1)
    first, different = (render_image(f, camera(), GRID, 0.05).rgb_premultiplied for f in (field, other))
    other.load_state_dict(field.state_dict())
    assert not torch.equal(first, different) and torch.equal(
        first, render_image(other, camera(), GRID, 0.05).rgb_premultiplied
    )
    assert build_config(type(field.config), asdict(field.config)) == field.config
    assert all(isinstance(getattr(field.config, f.name), (int, float, bool, str)) for f in fields(field.config))


def keys_of_0_1(state: dict, prefix: str = "") -> dict:
    """The state dict with the layer names of version 0.1."""
    old = {prefix + new: prefix + old for old, new in KEYS_0_1.items()}
    return {next((old[new] + key[len(new):] for new in old if key.startswith(new)), key): value
            for key, value in state.items()}


def test_a_field_with_the_keys_of_0_1_loads():
    field, other = make("mlp", 0), make("mlp", 1)
    state = keys_of_0_1(field.state_dict())
    assert list(state) == ["box", "trunk.0.weight", "trunk.0.bias", "trunk.1.weight", "trunk.1.bias", "density.weight",
                           "density.bias", "feature.weight", "feature.bias", "view.weight", "view.bias",
                           "colour.weight", "colour.bias"]
    other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(field.parameters(), other.parameters()))
    assert "trunk.0.weight" in state                                # the given dict is not changed
    assert list(upgrade_state(state)) == list(field.state_dict())
    present = field.state_dict()
    assert list(upgrade_state(dict(present))) == list(present)


@KINDS
def test_a_student_file_with_the_keys_of_0_1_loads(kind, tmp_path):
    """The files of 0.1: `field.trunk.0.weight` and so on, beside the occupancy grid."""
    from kilonb.distill.student import Student, load_student, save_student
    from kilonb.training.checkpoints import read_checkpoint, write_checkpoint

    path, student = tmp_path / "student.pt", Student(make(kind), GRID, 0.05)
    save_student(student, path, "averaged")
    content = read_checkpoint(path)
    content["state"] = keys_of_0_1(content["state"], "field.")
    assert ("field.trunk.0.weight" in content["state"]) == (kind == "mlp")
    write_checkpoint(path, {name: value for name, value in content.items() if name != "format"})
    again, weights = load_student(path)
    assert weights == "averaged"
    assert torch.equal(again.render(camera()).rgb_premultiplied, student.render(camera()).rgb_premultiplied)


@pytest.mark.parametrize("weights", ["raw", "averaged"])
def test_a_checkpoint_with_the_keys_of_0_1_loads(weights):
    """Model and moving average of the training loop's checkpoint."""
    from kilonb.training.averaging import EMA, load_weights

    field, other = make("mlp", 0), make("mlp", 1)
    average = EMA(field, 0.9).state_dict()
    average["average"] = keys_of_0_1({name: value + 1 for name, value in average["average"].items()})
    content = {"step": 7, "model": keys_of_0_1(field.state_dict()), "averaged": average}
    load_weights(content, other, weights)
    shift = 1 if weights == "averaged" else 0
    assert all(torch.equal(a + shift, b) for a, b in zip(field.parameters(), other.parameters()))


@KINDS
def test_training_is_the_same_twice_to_the_last_bit(kind):
    """Rays, field, compositing and their gradients: a repeated or resumed run does not differ."""
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
def test_making_a_field_does_not_change_the_global_random_state(kind):
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
def test_an_invalid_config_is_an_error_in_one_sentence(config, wrong):
    with pytest.raises(KiloError) as refused: config(**wrong)
    message = str(refused.value)
    assert message.endswith(".") and "\n" not in message and message.count(". ") == 0


@pytest.mark.parametrize("kind", OVER_A_BOX)
def test_a_box_without_volume_is_an_error(kind):
    for box in (BOX.flip(0), BOX[:1], BOX * torch.tensor([1.0, 0, 1]), BOX * torch.nan):
        with pytest.raises(KiloError, match=r"box is .* expected a lower corner"): OVER_A_BOX[kind](box, CONFIGS[kind])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@KINDS
def test_a_gpu_computes_the_same_field(kind):
    field, (positions, directions) = make(kind), samples()
    ours = torch.autograd.grad(loss_of(field, positions, directions), list(field.parameters()))
    field = field.cuda()
    theirs = torch.autograd.grad(loss_of(field, positions.cuda(), directions.cuda()), list(field.parameters()))
    for one, two in zip(ours, theirs): assert (one - two.cpu()).norm() < 5e-3 * one.norm()
