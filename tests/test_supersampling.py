"""Several rays per pixel in the images of a student: files, settings, frames, and every kind of field."""
from dataclasses import replace

import pytest
import torch

from kilonb.core.errors import KiloError
from kilonb.core.testing import expect_error
from kilonb.distill.frame_benchmark import time_student_frames
from kilonb.distill.orbit import render_student
from kilonb.distill.rays import RayPool
from kilonb.distill.student import (DistillConfig, DrawingConfig, distill, load_student, make_student, save_student,
                                    with_options)
from kilonb.fields.hashgrid import HashGridConfig
from kilonb.fields.kilonerf import KiloNeRFConfig
from kilonb.fields.mlp import MLPConfig
from kilonb.fields.occupancy import OccupancyGrid
from kilonb.geometry.cameras import orbit_cameras
from kilonb.imaging.rendering import render_frames
from kilonb.imaging.targets import ViewTarget
from kilonb.training.loop import LoopConfig

BOX = torch.tensor([[-1.0, -1, -1], [1, 1, 1]])
CONFIGS = {"kilonerf": KiloNeRFConfig(0.5, 4, density_bias=2.0), "mlp": MLPConfig(4, 2, 16, 2, density_bias=2.0),
           "hashgrid": HashGridConfig(levels=4, log2_table=10, finest_resolution=32, density_bias=2.0)}
CAMERA = orbit_cameras(3, 3.0, 20, width=30, height=22)[0]


def student_of(name: str = "kilonerf", **options):
    grid = OccupancyGrid(BOX, torch.ones(20, 20, 20, dtype=torch.bool))
    grid.occupied[grid.centres().norm(dim=-1) > 0.8] = False
    student = make_student(grid, CONFIGS[name], 0.04)
    for option, value in options.items(): setattr(student, option, value)
    return student


@pytest.mark.parametrize("name", CONFIGS)
def test_a_pixel_is_the_mean_of_its_block_of_rays(name):
    student, size = student_of(name), 3
    fine = student.render(CAMERA.resized(size * CAMERA.width, size * CAMERA.height))
    image = student.render(CAMERA, supersampling=size)
    mean = lambda value: torch.nn.functional.avg_pool2d(value.movedim(-1, 0)[None], size)[0].movedim(0, -1)
    torch.testing.assert_close(image.rgb_premultiplied, mean(fine.rgb_premultiplied))
    torch.testing.assert_close(image.alpha, mean(fine.alpha[..., None])[..., 0])
    summed = mean((fine.alpha * fine.expected_depth)[..., None])[..., 0]
    torch.testing.assert_close(image.alpha * image.expected_depth, summed, atol=1e-5, rtol=1e-4)
    assert image.samples.shape == image.alpha.shape and image.samples.sum() == fine.samples.sum()
    edge = (image.alpha > 0.05) & (image.alpha < 0.95)
    assert edge.sum() > 3 * ((student.render(CAMERA).alpha - 0.5).abs() < 0.45).sum(), "edges are between 0 and 1"


def test_a_student_keeps_its_number_in_its_file_and_older_files_have_one_ray(tmp_path):
    path = tmp_path / "student.pt"
    save_student(student_of(supersampling=2), path, "raw")
    again, _ = load_student(path)
    assert again.supersampling == 2
    assert torch.equal(again.render(CAMERA).alpha, student_of().render(CAMERA, supersampling=2).alpha)
    content = torch.load(path, weights_only=True)
    del content["supersampling"]
    torch.save(content, path)
    assert load_student(path)[0].supersampling == 1
    for wrong in (0, 9, 1.5, "2", True):
        torch.save(content | {"supersampling": wrong}, path)
        assert "supersampling in" in (message := expect_error(load_student, path)) and "from 1 to 8" in message


def test_the_config_of_a_training_decides_and_refuses_what_is_out_of_range():
    grid, student = student_of().grid, student_of()
    alpha = (student.render(CAMERA).alpha > 0.5).float()
    target = ViewTarget("front", CAMERA, alpha[..., None].expand(-1, -1, 3) * 0.5, alpha, None, "image")
    config = DistillConfig(rays=64, supersampling=2, loop=LoopConfig(2, warmup_steps=1))
    distill(student, RayPool([target], grid, 0.04), config, quiet=True)
    assert student.supersampling == 2 and student.render(CAMERA).alpha.shape == (22, 30)
    for wrong in (0, 9):
        assert "from 1 to 8" in expect_error(replace, config, supersampling=wrong)
    with pytest.raises(KiloError, match="from 0 to 8"): DrawingConfig(supersampling=9)
    assert "from 1 to 8" in expect_error(student.render, CAMERA, supersampling=100)


def test_frames_of_several_rays_have_a_folder_of_their_own(tmp_path):
    student, views = student_of(supersampling=2), [("front", CAMERA)]
    own, one = student.frame_source(), with_options(student.frame_source(), DrawingConfig(supersampling=1))
    assert own.kind == "student, 4 rays per pixel" and one.kind == "student"
    assert with_options(own, DrawingConfig(supersampling=2)).kind == own.kind
    both = with_options(own, DrawingConfig(deferred=True, supersampling=3))
    assert both.kind == "student, one colour per ray, 9 rays per pixel"
    frames = render_frames(own, views, tmp_path / "frames", dtype="float32", quiet=True, chunk_rays=100).frames
    torch.testing.assert_close(frames.read("front").alpha, student.render(CAMERA).alpha)
    assert "holds frames of the kind 'student, 4 rays per pixel', not 'student'" in expect_error(
        render_frames, one, views, tmp_path / "frames", dtype="float32", quiet=True)


def test_an_orbit_and_the_benchmark_have_one_ray_per_pixel():
    student, one = student_of(supersampling=3), student_of().render(CAMERA, 0.01).samples
    torch.testing.assert_close(render_student(student, CAMERA).samples, one)
    numbers = time_student_frames(student, CAMERA, [20], [], 1)
    assert numbers["samples_20"] == float(student_of().render(CAMERA.resized(20, 20)).samples.sum())
