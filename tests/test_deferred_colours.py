"""Frames of a student with one colour per ray, and densities without colours, for every kind of field."""
from dataclasses import replace

import pytest
import torch

from kilonb.core.testing import expect_error
from kilonb.distill.student import DrawingConfig, make_student, with_options
from kilonb.fields.hashgrid import HashGridConfig
from kilonb.fields.kilonerf import KiloNeRFConfig
from kilonb.fields.mlp import MLPConfig
from kilonb.fields.occupancy import OccupancyGrid
from kilonb.fields.rendering import field_densities
from kilonb.geometry.cameras import orbit_cameras
from kilonb.imaging.rendering import render_frames
from kilonb.imaging.sources import source_of_gaussians
from kilonb.scenes.brickyard import build_brickyard

BOX = torch.tensor([[-1.0, -1, -1], [1, 1, 1]])
CONFIGS = {"kilonerf": KiloNeRFConfig(0.5, 4, density_bias=1.0), "mlp": MLPConfig(4, 2, 16, 2, density_bias=1.0),
           "hashgrid": HashGridConfig(levels=4, log2_table=10, finest_resolution=32, density_bias=1.0)}


def student_of(config, seed: int = 0):
    grid = OccupancyGrid(BOX, torch.ones(8, 8, 8, dtype=torch.bool))
    grid.occupied[grid.centres().norm(dim=-1) > 0.9] = False
    student = make_student(grid, config, 0.05, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in student.parameters(): parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return student


@pytest.fixture(scope="module", params=CONFIGS)
def student(request): return student_of(CONFIGS[request.param])


@pytest.mark.parametrize("outside", [False, True], ids=["inside", "partly outside"])
def test_densities_are_those_of_the_whole_evaluation(student, outside):
    positions = (torch.rand(3000, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1) * (1.5 if outside else 0.5)
    directions = torch.nn.functional.normalize(positions, dim=-1)
    with torch.no_grad(): whole = student.field(positions, directions)[0]
    torch.testing.assert_close(field_densities(student.field, positions), whole, atol=1e-4, rtol=1e-4)
    assert len(field_densities(student.field, positions[:0])) == 0


def test_a_frame_with_deferred_colours_has_the_same_alpha_and_depth(student):
    camera = orbit_cameras(3, 3.0, 20, width=40, height=40)[1]
    full, deferred = student.render(camera), student.render(camera, deferred=True)
    torch.testing.assert_close(deferred.alpha, full.alpha, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(deferred.expected_depth, full.expected_depth, atol=1e-3, rtol=1e-3)
    assert torch.equal(deferred.samples, full.samples)
    assert (deferred.rgb_premultiplied <= deferred.alpha[..., None] * 1.01 + 1e-4).all()
    empty = full.alpha < 1e-3
    assert empty.any() and not deferred.rgb_premultiplied[empty].any()


@pytest.mark.parametrize("name", CONFIGS)
def test_an_opaque_surface_has_the_same_colour_either_way(name):
    """Where the first sample stops a ray, its colour is the ray's."""
    student = student_of(replace(CONFIGS[name], density_bias=30.0))
    camera = orbit_cameras(3, 3.0, 20, width=40, height=40)[0]
    full, deferred = student.render(camera), student.render(camera, deferred=True)
    solid = full.alpha > 0.999
    assert solid.any()
    torch.testing.assert_close(deferred.rgb_premultiplied[solid], full.rgb_premultiplied[solid], atol=2e-2, rtol=1e-2)


def test_frames_of_one_colour_per_ray_have_a_folder_of_their_own(student, tmp_path):
    views = [(f"view_{i}", camera) for i, camera in enumerate(orbit_cameras(2, 3.0, 20, width=24, height=24))]
    source = with_options(student.frame_source(), DrawingConfig(deferred=True))
    outcome = render_frames(source, views, tmp_path / "frames", dtype="float32", quiet=True)
    wanted = student.render(views[1][1], deferred=True)
    torch.testing.assert_close(outcome.frames.read("view_1").rgb_premultiplied, wanted.rgb_premultiplied)
    assert render_frames(source, views, tmp_path / "frames", dtype="float32", quiet=True).kept == 2
    assert "holds frames of the kind 'student, one colour per ray', not 'student'" in expect_error(
        render_frames, student.frame_source(), views, tmp_path / "frames", dtype="float32", quiet=True)


def test_gaussians_have_no_deferred_colours():
    source = source_of_gaussians(build_brickyard(count=4_000))
    assert "options of students" in expect_error(with_options, source, DrawingConfig(deferred=True))
