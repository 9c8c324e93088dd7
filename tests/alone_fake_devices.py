"""Forward passes on torch's fake tensors (`FakeTensorMode`), which have a device and a shape and no values: torch's own
rule for operations between devices, a second opinion beside that of `training.simulated_device`.

The device is the added one (torch's PrivateUse1), because a torch without CUDA cannot index a fake tensor on CUDA.
Left out are passes whose shapes follow from values, which fake tensors do not have; tests/alone_devices.py runs them
with values: KiloNeRF and the sparse U-Net of flux4d (samples or voxels are grouped), the tile lists of the portable
rasteriser, the canonical headings of the cooperative model (`roll_each`), and the VTA (torch has no fake GRU cell)."""
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_leaves

from kilonb.metrics.images import gaussian_window
from kilonb.training.simulated_device import simulated_device

Move = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def fake_device():
    """A block of fake tensors; gives the device, and a function from a tensor to a fake one of its shape there."""
    replaced = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
    gaussian_window.cache_clear()                        # a tensor that is kept is of one mode
    try:
        with simulated_device() as device, mode, torch.no_grad():
            yield SimpleNamespace(device=device, move=lambda tensor: mode.from_tensor(tensor).to(device).detach())
    finally:
        gaussian_window.cache_clear()
        torch.__future__.set_overwrite_module_params_on_conversion(replaced)


def field(kind: str) -> Callable[[Move], object]:
    import test_fields
    from kilonb.distill.student import make_student
    from kilonb.fields.occupancy import OccupancyGrid

    box = torch.tensor([[-1.0, -1, -1], [1, 1, 1]])
    student = make_student(OccupancyGrid(box, torch.ones(8, 8, 8, dtype=torch.bool)), test_fields.CONFIGS[kind], 0.1)
    points, directions = torch.rand(64, 3), torch.nn.functional.normalize(torch.randn(64, 3), dim=-1)
    return lambda move: student._apply(move).field(move(points), move(directions))


def mlp() -> Callable[[Move], object]: return field("mlp")


def hash_grid() -> Callable[[Move], object]: return field("hashgrid")


def projection() -> Callable[[Move], object]:
    from kilonb.splats.harmonics import evaluate_sh
    from kilonb.splats.projection import project_gaussians

    means, quats, scales = torch.randn(50, 3) + torch.tensor([0, 0, 5.0]), torch.randn(50, 4), torch.rand(50, 3)
    given = (means, quats, scales, torch.rand(50), torch.eye(4)[None],
             torch.tensor([[[50.0, 0, 16], [0, 50, 16], [0, 0, 1]]]))
    return lambda move: (tuple(project_gaussians(*map(move, given), 32, 32)),
                         evaluate_sh(move(torch.rand(50, 9, 3)), move(means), 2))


def losses() -> Callable[[Move], object]:
    from kilonb.metrics.images import structural_similarity
    from kilonb.splats.photometric import photometric_loss

    one, other = torch.rand(16, 16, 3), torch.rand(16, 16, 3)
    return lambda move: (photometric_loss(move(one), move(other)), structural_similarity(move(one), move(other)))


def cooperative_backbone() -> Callable[[Move], object]:
    import test_coop
    from kilonb.coop.training import make_batch, make_model

    model, batch = make_model(test_coop.CAMERA, test_coop.config()), make_batch([test_coop.sample(1)])
    views, present = batch["rgb_srgb"][batch["present"]], batch["present"]
    return lambda move: model._apply(move).backbone(move(views), move(present))


def pose_stack() -> Callable[[Move], object]:
    from kilonb.pose.model import PoseConfig, VolumeStack, occupancy

    stack = VolumeStack(PoseConfig(stages=2, widths=(8, 16), bottleneck=16), (16, 16, 16))
    return lambda move: occupancy(stack._apply(move)(move(torch.rand(4, 16, 16, 16))))


def world_model() -> Callable[[Move], object]:
    from kilonb.dream.world_model import WorldModel, WorldModelConfig

    model = WorldModel(WorldModelConfig("tiny", precision="float32"))
    given = (torch.rand(1, 2, 64, 64, 3), torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.bool))

    def run(move: Move) -> object:
        state = model._apply(move).observe(*map(move, given))
        return model.decode(state), model.predict(state), state.features

    return run


PASSES = (mlp, hash_grid, projection, losses, cooperative_backbone, pose_stack, world_model)


@pytest.mark.parametrize("make", PASSES, ids=lambda make: make.__name__)
def test_a_forward_pass_on_fake_tensors_stays_on_its_device(make):
    run = make()
    with fake_device() as fake: found = [one for one in tree_leaves(run(fake.move)) if isinstance(one, torch.Tensor)]
    assert found and {str(one.device) for one in found} == {str(fake.device)}


def test_fake_tensors_of_two_devices_are_refused():
    """The guard of this file."""
    with fake_device() as fake, pytest.raises(RuntimeError, match="device"):
        fake.move(torch.ones(3)) + torch.arange(3)
