"""The rotation-invariant embedding: invariance of the magnitudes, held-out probes, fitting on training frames only."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from kilonb.core.errors import KiloError
from kilonb.metrics.probes import angle_targets, cross_validated_r2
from kilonb.pose.embedding import EmbeddingConfig, embedding_scores, fit_embedding, load_embedding
from kilonb.pose.view_features import ViewFeatures, frame_coefficients
from kilonb.pose.view_sphere import ViewSphere, harmonic_magnitudes
from kilonb.splats.gaussians import Gaussians
from kilonb.splats.harmonics import rgb_to_sh0

SPHERE, FEATURES = ViewSphere(size=32), ViewFeatures(grid=8, colour=True)


def animal(stride: float = 0.6, heading: float = 0.0) -> Gaussians:
    """A body, a head, four legs at `stride` of a trot and a tail, facing `heading`."""
    places = torch.tensor([[0, 0, 0], [.045, 0, .012], [.028, .014, -.02], [.028, -.014, -.02], [-.028, .014, -.02],
                           [-.028, -.014, -.02], [-.055, 0, -.006]])
    places[2:6, 0] += .012 * stride * torch.tensor([1.0, -1, -1, 1])
    scales = torch.tensor([[.022, .011, .011], [.009, .007, .007], *[[.004, .004, .009]] * 4, [.016, .003, .003]])
    turn = torch.tensor([[math.cos(heading), -math.sin(heading), 0], [math.sin(heading), math.cos(heading), 0],
                         [0, 0, 1]])
    quats = torch.tensor([math.cos(heading / 2), 0, 0, math.sin(heading / 2)]).repeat(7, 1)
    colours = torch.tensor([[.5, .4, .3], [.6, .5, .4], *[[.8, .6, .5]] * 4, [.9, .6, .6]])
    return Gaussians(places @ turn.T, quats, scales.log(), torch.full((7,), 3.0), rgb_to_sh0(colours)[:, None])


def coefficients(sphere: ViewSphere = SPHERE, **pose: float) -> torch.Tensor:
    return frame_coefficients(animal(**pose), torch.zeros(3), sphere, FEATURES)


def magnitudes(sphere: ViewSphere = SPHERE, **pose: float) -> torch.Tensor:
    return harmonic_magnitudes(coefficients(sphere, **pose))


def change(a: torch.Tensor, b: torch.Tensor) -> float: return float((a - b).norm() / a.norm())


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_turning_by_steps_of_the_views_leaves_the_magnitudes_and_changes_the_coefficients(steps):
    heading = steps * math.pi / 4
    assert change(magnitudes(), magnitudes(heading=heading)) < 1e-4       # float32 drawing
    assert change(coefficients(), coefficients(heading=heading)) > .3


def test_between_the_steps_more_views_leave_less_of_the_heading():
    left = [change(magnitudes(sphere), magnitudes(sphere, heading=.3))
            for sphere in (SPHERE, replace(SPHERE, azimuths=32))]
    assert left[1] < .02 and left[1] < .2 * left[0]
    assert left[0] < change(coefficients(), coefficients(heading=.3))


def test_the_other_half_of_a_stride_the_mirror_image_differs():
    assert change(magnitudes(stride=.8), magnitudes(stride=-.8)) > .01


def test_moving_the_animal_and_its_centre_leaves_the_coefficients():
    place = torch.tensor([.2, -.1, .05])
    moved = animal()
    moved = Gaussians(moved.means + place, moved.quats, moved.log_scales, moved.logit_opacities, moved.sh)
    assert change(coefficients(), frame_coefficients(moved, place, SPHERE, FEATURES)) < 1e-3


@pytest.fixture(scope="module")
def walk() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, np.ndarray]:
    """(coefficients, magnitudes, headings, phase) of 96 frames in which the animal turns and trots."""
    frame = np.arange(96)
    heading, phase = .21 * frame + .8 * np.sin(frame / 7), .55 * frame + .3 * np.sin(frame / 11)
    rows = torch.stack([coefficients(stride=math.sin(p), heading=h) for h, p in zip(heading, phase)])
    return rows.flatten(1), harmonic_magnitudes(rows).flatten(1), torch.from_numpy(heading), phase


def test_the_heading_is_in_the_coefficients_and_not_in_the_embedding(walk):
    rows, values, heading, _ = walk
    plain, config = EmbeddingConfig(20, "none"), EmbeddingConfig(20)
    assert embedding_scores(rows, heading, config=plain, folds=4)["azimuth_r2"] > .7
    assert embedding_scores(values, heading, config=config, folds=4)["azimuth_r2"] < .05


def test_the_stride_is_in_the_embedding(walk):
    _, values, heading, phase = walk
    points = fit_embedding(values[:70], heading[:70], EmbeddingConfig(20)).embed(values).numpy()
    found = cross_validated_r2(points, np.sin(phase)[:, None], ["ridge"], folds=4)
    assert found["ridge"] > .8


@pytest.mark.parametrize("removal", ["none", "regression", "adversarial"])
def test_a_saved_embedding_gives_the_same_numbers_to_other_frames(walk, tmp_path, removal):
    _, values, heading, _ = walk
    fitted = fit_embedding(values[:70], heading[:70], EmbeddingConfig(10, removal))
    fitted.save(tmp_path / "embedding.pt")
    torch.load(tmp_path / "embedding.pt", weights_only=True)
    again = load_embedding(tmp_path / "embedding.pt")
    assert again.config == fitted.config
    assert torch.equal(again.embed(values[70:], heading[70:]), fitted.embed(values[70:], heading[70:]))


def test_frames_that_are_embedded_do_not_change_the_embedding(walk):
    _, values, heading, _ = walk
    fitted = fit_embedding(values[:70], heading[:70], EmbeddingConfig(10))
    together = fitted.embed(values)
    torch.testing.assert_close(fitted.embed(values[80:81]), together[80:81])


def test_a_damaged_file_is_refused(walk, tmp_path):
    _, values, heading, _ = walk
    path = tmp_path / "embedding.pt"
    fit_embedding(values[:70], heading[:70]).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(KiloError, match=r"embedding\.pt"): load_embedding(path)


def test_probes_find_what_is_there_and_reject_a_random_walk():
    rng, angle = np.random.default_rng(0), np.linspace(0, 15, 150)
    walk = rng.normal(size=(150, 5)).cumsum(0)
    planted = np.concatenate([angle_targets(angle), rng.normal(size=(150, 5))], 1)
    assert min(cross_validated_r2(planted, angle_targets(angle), folds=3).values()) > .4
    assert max(cross_validated_r2(walk, angle_targets(angle), folds=3).values()) < .1
