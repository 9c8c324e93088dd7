"""The drop-in for gsplat on a CPU: signatures, results against the references, and programs written for gsplat."""
import inspect
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch

from kilonb.core.errors import KiloError
from kilonb.geometry.cameras import orbit_cameras
from kilonb.splats.gsplat_compat import gsplat_on_cpu, install, replaced_functions, uninstall
from kilonb.splats.gsplat_functions import (
    fully_fused_projection,
    proj,
    quat_scale_to_covar_preci,
    rasterization,
    spherical_harmonics,
)
from kilonb.splats.gsplat_strategy import GsplatDefaultStrategy, GsplatMCMCStrategy
from kilonb.splats.gsplat_tiles import isect_offset_encode, isect_tiles, rasterize_to_pixels
from kilonb.splats.projection import covariances, project_covariances
from kilonb.splats.reference import rasterize_reference

NAMES = ("means", "quats", "scales", "opacities", "colors", "viewmats", "Ks")


def scene(count=40, cameras=2, batch=(), seed=0, dtype=torch.float32):
    """Gaussians and cameras with batch dimensions, by gsplat's names."""
    draw = torch.Generator().manual_seed(seed)
    def random(*shape): return torch.randn(*batch, *shape, generator=draw, dtype=torch.float64)
    rig = orbit_cameras(cameras, radius=3.0, width=40, height=30)
    views, Ks = (torch.stack([getattr(c, name) for c in rig]).double() for name in ("world_to_camera", "K"))
    return {name: value.to(dtype).contiguous() for name, value in dict(
        means=random(count, 3) * 0.4, quats=random(count, 4), scales=(random(count, 3) * 0.4 - 2).exp(),
        opacities=random(count).sigmoid(), colors=random(count, 3).sigmoid(),
        viewmats=views.expand(*batch, cameras, 4, 4), Ks=Ks.expand(*batch, cameras, 3, 3)).items()}


def draw(tensors, **options): return rasterization(**tensors, width=40, height=30, **options)


@pytest.fixture
def package():
    """The installed gsplat, with nothing replaced."""
    uninstall()
    warnings.simplefilter("ignore")
    return pytest.importorskip("gsplat")


def test_signatures_are_those_of_the_installed_gsplat(package):
    import gsplat.cuda._torch_impl
    import gsplat.cuda._wrapper
    import gsplat.relocation
    homes = (package, gsplat.cuda._wrapper, gsplat.relocation, gsplat.cuda._torch_impl)
    for name, ours in replaced_functions().items():
        theirs = next(getattr(home, name) for home in homes if hasattr(home, name))
        def plain(function):
            return [(p.name, getattr(p.default, "name", p.default))
                    for p in inspect.signature(function).parameters.values()]
        assert plain(ours) == plain(theirs), name


def test_strategies_have_the_fields_and_state_of_gsplat(package):
    from dataclasses import fields
    for ours, theirs in ((GsplatDefaultStrategy, package.DefaultStrategy), (GsplatMCMCStrategy, package.MCMCStrategy)):
        assert [(f.name, f.default) for f in fields(ours)] == [(f.name, f.default) for f in fields(theirs)]
        assert ours().initialize_state().keys() == theirs().initialize_state().keys()
        for method in ("step_pre_backward", "step_post_backward", "check_sanity", "initialize_state"):
            if method not in vars(ours): continue
            assert list(inspect.signature(getattr(ours, method)).parameters) == list(
                inspect.signature(getattr(theirs, method)).parameters)


def test_installing_replaces_and_uninstalling_restores(package):
    original = package.rasterization
    with gsplat_on_cpu() as kind:
        assert kind == install() == "package" and package.rasterization is not original
        assert inspect.signature(package.rasterization) == inspect.signature(original)
        assert draw(scene())[0].shape == (2, 30, 40, 3)
    assert package.rasterization is original
    with gsplat_on_cpu(package=False):
        import gsplat
        assert gsplat is not package and gsplat.__version__ == "1.5.3"
    assert sys.modules["gsplat"] is package


@pytest.mark.parametrize("camera_model", ["pinhole", "ortho", "fisheye"])
@pytest.mark.parametrize("options", [dict(render_mode="RGB+ED"), dict(rasterize_mode="antialiased", tile_size=8)])
def test_pictures_and_gradients_are_those_of_float64_autograd(camera_model, options):
    mine = {name: value.requires_grad_() for name, value in scene(seed=3).items()}
    exact = {name: value.requires_grad_() for name, value in scene(seed=3, dtype=torch.float64).items()}
    if camera_model == "ortho":
        for one in (mine, exact): one["Ks"] = one["Ks"].detach() * torch.tensor([[0.4], [0.4], [1]])
    for one in (mine, exact): one["Ks"] = one["Ks"].detach()
    back = torch.rand(2, 3)
    picture, alpha, _ = draw(mine, camera_model=camera_model, backgrounds=back, **options)
    reference = {name: value for name, value in options.items() if name != "tile_size"}
    theirs, their_alpha, _ = rasterize_reference(**exact, width=40, height=30, camera_model=camera_model,
                                                 backgrounds=back.double(), **reference)
    assert (picture - theirs).abs().mean() < 1e-5 and (alpha - their_alpha).abs().mean() < 1e-5
    weight = torch.randn(picture.shape, generator=torch.Generator().manual_seed(1))
    (picture * weight).sum().backward()
    (theirs * weight).sum().backward()
    for name in NAMES[:6]:
        assert (mine[name].grad - exact[name].grad).norm() < 2e-3 * exact[name].grad.norm(), name


@pytest.mark.parametrize("packed", [True, False])
def test_a_batch_gives_pictures_and_gradients_of_its_scenes(packed):
    whole = {name: value.clone().requires_grad_() for name, value in scene(batch=(2, 2)).items()}
    picture, _, meta = draw(whole, packed=packed, absgrad=True)
    meta["means2d"].retain_grad()
    picture.square().sum().backward()
    assert picture.shape == (2, 2, 2, 30, 40, 3) and meta["means2d"].absgrad.shape == meta["means2d"].shape
    parts = []
    for i in range(4):
        one = {name: value.detach().flatten(0, 1)[i].clone().requires_grad_() for name, value in whole.items()}
        alone, _, own = draw(one, packed=packed, absgrad=True)
        own["means2d"].retain_grad()
        alone.square().sum().backward()
        torch.testing.assert_close(picture.flatten(0, 1)[i], alone)
        for name in NAMES[:6]: torch.testing.assert_close(whole[name].grad.flatten(0, 1)[i], one[name].grad)
        parts.append((own["means2d"].grad, own["means2d"].absgrad))
    for found, k in ((meta["means2d"].grad, 0), (meta["means2d"].absgrad, 1)):
        torch.testing.assert_close(found.reshape(-1, 2), torch.cat([part[k].reshape(-1, 2) for part in parts]))


@pytest.mark.parametrize("batch", [(), (3,)])
def test_sparse_gradients_hold_the_dense_ones(batch):
    found = []
    for sparse in (False, True):
        tensors = {name: value.clone().requires_grad_() for name, value in scene(batch=batch).items()}
        picture, _, _ = draw(tensors, sparse_grad=sparse)
        picture.square().sum().backward()
        found.append(tensors)
    for name in ("means", "quats", "scales"):
        assert found[1][name].grad.is_sparse
        torch.testing.assert_close(found[1][name].grad.to_dense(), found[0][name].grad)
    torch.optim.SparseAdam([found[1]["means"]]).step()


def test_a_sparse_optimiser_leaves_unseen_gaussians_alone():
    tensors = scene()
    tensors["means"][:10, 2] = 1e4
    tensors["means"].requires_grad_()
    before = tensors["means"].detach().clone()
    draw(tensors, sparse_grad=True)[0].sum().backward()
    torch.optim.SparseAdam([tensors["means"]], lr=0.1).step()
    changed = (tensors["means"].detach() != before).any(-1)
    assert not changed[:10].any() and changed[10:].any()


@pytest.mark.parametrize("camera_model", ["pinhole", "ortho", "fisheye"])
def test_projection_is_differentiated_as_float64_autograd_does(camera_model):
    tensors = scene(count=6, dtype=torch.float64, batch=(2,))
    leaves = [tensors[name].requires_grad_() for name in ("means", "quats", "scales", "viewmats")]
    def outputs(means, quats, scales, viewmats):
        return fully_fused_projection(means, None, quats, scales, viewmats, tensors["Ks"], 40, 30,
                                      calc_compensations=True, camera_model=camera_model)[1:]
    assert torch.autograd.gradcheck(outputs, leaves)
    inside = tensors["means"].detach()[:, None] + torch.tensor([0, 0, 3.0])
    spread = covariances(tensors["quats"], tensors["scales"]).detach()[:, None]
    assert torch.autograd.gradcheck(lambda m, c: proj(m, c, tensors["Ks"][:, :1], 40, 30, camera_model),
                                    (inside.requires_grad_(), spread.requires_grad_()))


def test_covariances_take_the_place_of_rotations_and_scales():
    tensors = scene()
    covars, precis = quat_scale_to_covar_preci(tensors["quats"], tensors["scales"])
    torch.testing.assert_close(covars @ precis, torch.eye(3).expand_as(covars), atol=1e-3, rtol=0)
    plain = draw(tensors)[0]
    other = draw(tensors | dict(quats=None, scales=None), covars=covars)[0]
    torch.testing.assert_close(other, plain, atol=2e-4, rtol=0)
    exact = project_covariances(tensors["means"], covars, None, tensors["viewmats"], tensors["Ks"], 40, 30)
    packed = fully_fused_projection(tensors["means"], quat_scale_to_covar_preci(tensors["quats"], tensors["scales"],
                                                                               triu=True)[0], None, None,
                                    tensors["viewmats"], tensors["Ks"], 40, 30, packed=True)
    assert (packed[0] == 0).all() and torch.equal(packed[3], exact.radii[packed[1], packed[2]])
    torch.testing.assert_close(packed[4], exact.means2d[packed[1], packed[2]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("channels", "tile_size"), [(1, 16), (7, 4), (40, 16)])
def test_steps_one_by_one_give_the_whole_picture(channels, tile_size):
    tensors = scene(batch=(2,))
    tensors["colors"] = torch.rand(2, 40, channels)
    whole = draw(tensors, packed=False, channel_chunk=8, segmented=True)[0]
    radii, means2d, depths, conics, _ = fully_fused_projection(
        tensors["means"], None, tensors["quats"], tensors["scales"], tensors["viewmats"], tensors["Ks"], 40, 30)
    grid = (-(-40 // tile_size), -(-30 // tile_size))
    _, ids, members = isect_tiles(means2d, radii, depths, tile_size, *grid)
    offsets = isect_offset_encode(ids, 4, *grid).view(2, 2, *grid[::-1])
    steps, _ = rasterize_to_pixels(means2d, conics, tensors["colors"][:, None].expand(2, 2, 40, channels),
                                   tensors["opacities"][:, None].expand(2, 2, 40), 40, 30, tile_size, offsets, members)
    assert (steps - whole).abs().mean() < 1e-5 and (steps - whole).abs().max() < 0.01


def test_harmonics_of_degree_four_have_the_values_of_gsplat(package):
    from gsplat.cuda._torch_impl import _spherical_harmonics
    dirs, coeffs = torch.randn(3, 50, 3), torch.randn(3, 50, 25, 3)
    for degree in range(5):
        torch.testing.assert_close(spherical_harmonics(degree, dirs, coeffs),
                                   _spherical_harmonics(degree, dirs, coeffs), rtol=1e-4, atol=1e-4)


PROGRAM = """
    import sys
    {hide}
    import torch
    torch.set_num_threads(1)
    from kilonb.splats.gsplat_compat import install
    assert install() == "{kind}"
    from gsplat import DefaultStrategy, MCMCStrategy, rasterization
    from gsplat.rendering import rasterization as same
    from gsplat.optimizers import SelectiveAdam
    assert same is rasterization
    view, K = torch.eye(4)[None].clone(), torch.tensor([[[30.0, 0, 16], [0, 30, 16], [0, 0, 1]]])
    view[0, 2, 3] = 3
    for strategy, extra in ((DefaultStrategy(refine_start_iter=3, refine_every=10, grow_grad2d=1e-5), {{}}),
                            (MCMCStrategy(refine_start_iter=3, refine_every=10, cap_max=66), dict(lr=1e-6))):
        torch.manual_seed(0)
        params = torch.nn.ParameterDict(dict(means=torch.randn(60, 3) * .5, scales=torch.rand(60, 3) - 3.,
            quats=torch.randn(60, 4), opacities=torch.zeros(60), colors=torch.rand(60, 3)))
        optimizers = {{name: torch.optim.Adam([value], lr=.02) for name, value in params.items()}}
        strategy.check_sanity(params, optimizers)
        state, losses = strategy.initialize_state(), []
        for step in range(30):
            picture, _, info = rasterization(params["means"], params["quats"], params["scales"].exp(),
                params["opacities"].sigmoid(), params["colors"], view, K, 32, 32, packed=False)
            strategy.step_pre_backward(params, optimizers, state, step, info)
            loss = (picture - .5).square().mean()
            loss.backward()
            for optimizer in optimizers.values(): optimizer.step(); optimizer.zero_grad()
            strategy.step_post_backward(params, optimizers, state, step, info, **extra)
            losses.append(float(loss))
        assert losses[-1] < .8 * losses[0] and len(params["means"]) != 60, (losses, len(params["means"]))
    print("trained")
"""


def test_both_strategies_train_without_the_package():
    program = textwrap.dedent(PROGRAM.format(kind="stand-in", hide="sys.modules['gsplat'] = None"))
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False)
    assert ended.stdout.strip().endswith("trained"), ended.stderr[-2000:]


def test_both_strategies_train_with_the_package(package, capsys):
    threads = torch.get_num_threads()
    try: exec(textwrap.dedent(PROGRAM.format(kind="package", hide="")), {})
    finally:
        torch.set_num_threads(threads)
        uninstall()
    assert capsys.readouterr().out.strip().endswith("trained")


@pytest.mark.parametrize("changes", [
    dict(quats=torch.ones(3, 4)), dict(viewmats=torch.eye(4)), dict(Ks=torch.eye(3)), dict(colors=torch.ones(40)),
    dict(sh_degree=5), dict(with_ut=True), dict(with_eval3d=True), dict(distributed=True), dict(camera_model="ftheta"),
    dict(camera_model="toy"), dict(tile_size=0), dict(radial_coeffs=torch.ones(2, 6)), dict(covars=torch.ones(40, 6)),
    dict(render_mode="depth"), dict(backgrounds=torch.ones(3)), dict(quats=None),
])
def test_bad_input_ends_in_one_sentence(changes):
    with pytest.raises(KiloError) as error: rasterization(**scene() | dict(width=40, height=30) | changes)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)
