"""Pruned spaces of students: fewer samples at a stated loss, files with and without octants."""

from dataclasses import replace

import pytest
import torch

from kilonb.core.errors import KiloError
from kilonb.distill.multiview import scene_teaching
from kilonb.distill.quick import train_quick_student
from kilonb.distill.rays import RayPool
from kilonb.distill.student import DistillConfig, load_student, make_student, prune_student, save_student
from kilonb.fields.kilonerf import KiloNeRFConfig
from kilonb.fields.marching import march
from kilonb.fields.occupancy import OccupancyGrid
from kilonb.fields.pruning import PruningConfig
from kilonb.fields.rendering import render_image
from kilonb.geometry.cameras import orbit_cameras
from kilonb.imaging.targets import targets_from_teacher
from kilonb.scenes.brickyard import write_brickyard
from kilonb.scenes.photographs import open_views
from kilonb.training.checkpoints import read_checkpoint, write_checkpoint

BOX = torch.tensor([[-1.0, -1, -1], [1, 1, 1]])


def psnr(image, target):
    on_white = [one.rgb_premultiplied + 1 - one.alpha[..., None] for one in (image, target)]
    return -10 * (on_white[0] - on_white[1]).square().mean().log10().item()


def samples_per_hit_ray(image): return (image.samples.sum() / (image.samples > 0).sum()).item()


def shell():
    """A student of a ball, in a space of which half the octants are occupied."""
    grid = OccupancyGrid(BOX, torch.ones(20, 20, 20, dtype=torch.bool))
    grid.occupied.copy_(grid.centres().norm(dim=-1) < 0.75)
    student = make_student(grid, KiloNeRFConfig(0.5, 4, 1, hidden=16, density_bias=1.0), 0.05)
    octants = torch.randint(1, 256, (20, 20, 20), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    student.grid = replace(grid, octants=octants * grid.occupied)
    return student.requires_grad_(False), orbit_cameras(4, 3.0, 25, width=24, height=24)[1]


# the settings of `multi_view_response`, which hardly thin a space of soft surfaces as here, and coarser ones
@pytest.mark.parametrize("config, share", [(scene_teaching(100, 1024, 5e-3, 0).rays, 1.0),
                                           (DistillConfig(pruning=PruningConfig(0.005, 0.01)), 0.95)],
                         ids=["default", "coarser"])
def test_a_pruned_brickyard_loses_at_most_a_tenth_of_a_decibel_and_takes_fewer_samples(tmp_path, config, share):
    teacher = write_brickyard(tmp_path / "yard", width=64, height=64, train=20, test=3, count=4000)
    train_quick_student(tmp_path / "student.pt", tmp_path / "yard", 64, teacher, 150, quiet=True)
    student = load_student(tmp_path / "student.pt")[0].requires_grad_(False)
    views, held_out = ([(view.name, view.camera) for view in open_views("blender", tmp_path / "yard", split, 64)]
                       for split in ("train", "test"))
    targets = targets_from_teacher(teacher, held_out)
    before = [student.render(target.camera) for target in targets]
    pool = RayPool(targets_from_teacher(teacher, views), student.grid, student.step)
    prune_student(student, pool, config)
    after = [student.render(target.camera) for target in targets]
    scores = [sum(map(psnr, images, targets)) / len(targets) for images in (before, after)]
    counts = [sum(map(samples_per_hit_ray, images)) / len(targets) for images in (before, after)]
    assert scores[1] > scores[0] - 0.1 and counts[1] < share * counts[0]


def test_a_space_in_octants_is_kept_in_the_file(tmp_path):
    student, camera = shell()
    save_student(student, tmp_path / "student.pt", "raw")
    again = load_student(tmp_path / "student.pt")[0]
    assert torch.equal(again.octants, student.octants) and again.grid.octants is not None
    assert torch.equal(again.render(camera).rgb_premultiplied, student.render(camera).rgb_premultiplied)


def test_a_file_without_octants_opens_with_whole_voxels_and_renders_the_same(tmp_path):
    student, camera = shell()
    student.grid = replace(student.grid, octants=None)
    save_student(student, tmp_path / "student.pt", "raw")
    content = read_checkpoint(tmp_path / "student.pt")
    content["state"] = {name: value for name, value in content["state"].items() if name != "octants"}
    write_checkpoint(tmp_path / "old.pt", content)
    old = load_student(tmp_path / "old.pt")[0]
    assert old.grid.octants is None
    assert torch.equal(old.render(camera).rgb_premultiplied, student.render(camera).rgb_premultiplied)


def test_octants_of_another_shape_are_refused(tmp_path):
    student, _ = shell()
    save_student(student, tmp_path / "student.pt", "raw")
    content = read_checkpoint(tmp_path / "student.pt")
    content["state"] = content["state"] | {"octants": torch.zeros(2, 2, 2, dtype=torch.uint8)}
    write_checkpoint(tmp_path / "wrong.pt", content)
    with pytest.raises(KiloError, match="octants of shape"): load_student(tmp_path / "wrong.pt")


def test_octants_leave_out_samples_and_all_octants_leave_out_none():
    student, camera = shell()
    grid = student.grid
    whole = replace(grid, octants=None)
    images = [render_image(student.field, camera, one, student.step)
              for one in (grid, whole, replace(grid, octants=torch.full_like(grid.octants, 255)))]
    counts = [len(march(camera.rays(), one, student.step).distance) for one in (grid, whole)]
    assert 0.4 < counts[0] / counts[1] < 0.6, "half of the octants are occupied"
    torch.testing.assert_close(images[2].rgb_premultiplied, images[1].rgb_premultiplied, atol=2e-5, rtol=1e-4)


def test_without_a_weight_nothing_is_pruned():
    student, _ = shell()
    before = student.octants.clone(), student.occupied.clone()
    prune_student(student, None, DistillConfig())
    assert torch.equal(student.octants, before[0]) and torch.equal(student.occupied, before[1])
