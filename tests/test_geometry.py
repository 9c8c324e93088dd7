"""Conventions of geometry: quaternion order, camera frames, handedness, pixel centres."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from kilonb.geometry.cameras import PinholeCamera, blender_to_opencv, camera_from_angle, focus, orbit_cameras
from kilonb.geometry.transforms import (
    carla_pose_to_matrix,
    check_rigid,
    left_to_right_handed,
    mirror_y,
    quat_multiply,
    quat_to_rotmat,
    rigid_inverse,
    rotmat_to_quat,
    transform_points,
)
from kilonb.core.errors import KiloError


def random_quats(count: int = 2000) -> torch.Tensor:
    return torch.randn(count, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.incident(25)
def test_incident_25_every_quaternion_gives_a_rotation_and_is_recovered():
    """R R^T = I, det R = 1, the round trip, and an independent implementation, for the wrong quaternion helper of
    incident 25."""
    quats = random_quats()
    rotmats = quat_to_rotmat(quats)
    torch.testing.assert_close(rotmats @ rotmats.mT, torch.eye(3, dtype=torch.float64).expand_as(rotmats))
    torch.testing.assert_close(torch.linalg.det(rotmats), torch.ones(len(quats), dtype=torch.float64))
    back = rotmat_to_quat(rotmats)
    unit = torch.nn.functional.normalize(quats, dim=-1)
    torch.testing.assert_close((back * unit).sum(-1).abs(), torch.ones(len(quats), dtype=torch.float64))
    np.testing.assert_allclose(rotmats.numpy(), Rotation.from_quat(quats.numpy(), scalar_first=True).as_matrix(),
                               atol=1e-12)


@pytest.mark.incident(25)
def test_incident_25_the_scalar_comes_first():
    """xyzw read as wxyz is also a rotation, so a known angle is checked: (cos 45, 0, 0, sin 45) turns x to y."""
    half = 0.5**0.5
    turned = quat_to_rotmat(torch.tensor([half, 0.0, 0.0, half])) @ torch.tensor([1.0, 0, 0])
    torch.testing.assert_close(turned, torch.tensor([0.0, 1, 0]))


@pytest.mark.incident(25)
@pytest.mark.parametrize("axis", range(3))
def test_incident_25_half_turns_do_not_divide_by_zero(axis):
    rotation = -torch.eye(3, dtype=torch.float64)
    rotation[axis, axis] = 1
    torch.testing.assert_close(quat_to_rotmat(rotmat_to_quat(rotation)), rotation)


def test_quaternion_products_compose_like_matrices():
    first, second = random_quats(), random_quats().flip(0)
    torch.testing.assert_close(quat_to_rotmat(quat_multiply(first, second)),
                               quat_to_rotmat(first) @ quat_to_rotmat(second))


def test_gradients_of_rotations_match_finite_differences():
    assert torch.autograd.gradcheck(quat_to_rotmat, (random_quats(5).requires_grad_(),))


def test_carla_has_y_to_the_right_and_the_converted_axes_have_it_to_the_left():
    """In CARLA (x forward, y right, z up) a yaw of 90 degrees turns forward to the right. The same pose in
    right-handed axes (x forward, y left, z up) has the opposite y, and forward turns to -y."""
    pose = carla_pose_to_matrix(10, 2, 1, 0, 90, 0)                      # 10 m ahead, 2 m to the right, 1 m up
    torch.testing.assert_close(pose[:3, 0], torch.tensor([0.0, 1, 0], dtype=torch.float64))
    converted = left_to_right_handed(pose)
    torch.testing.assert_close(converted[:3, 3], torch.tensor([10.0, -2, 1], dtype=torch.float64))
    torch.testing.assert_close(converted[:3, 0], torch.tensor([0.0, -1, 0], dtype=torch.float64))
    torch.testing.assert_close(converted[:3, 2], torch.tensor([0.0, 0, 1], dtype=torch.float64))


def test_poses_and_points_change_handedness_together():
    """Right-handed axes keep determinant 1 and cross(x, y) = z; a point transformed before or after conversion is the
    same one."""
    pose = carla_pose_to_matrix(3, -4, 5, 20, 70, -30)
    points = torch.tensor([[1.0, 2, 3], [-7, 0.5, 2]], dtype=torch.float64)
    torch.testing.assert_close(mirror_y(points), points * torch.tensor([1.0, -1, 1], dtype=torch.float64))
    torch.testing.assert_close(transform_points(left_to_right_handed(pose), mirror_y(points)),
                               mirror_y(transform_points(pose, points)))
    torch.testing.assert_close(left_to_right_handed(left_to_right_handed(pose)), pose)
    rotation = left_to_right_handed(pose)[:3, :3]
    torch.testing.assert_close(torch.linalg.cross(rotation[:, 0], rotation[:, 1]), rotation[:, 2])


def test_a_camera_and_a_rasteriser_agree_on_the_half_pixel():
    """A tiny gaussian drawn by the rasteriser lies where the camera projects its centre."""
    from kilonb.splats.gaussians import gaussians_from_points
    from kilonb.splats.rasterizer import render_gaussians

    camera = orbit_cameras(5, 3.0, 25, width=60, height=50)[2]
    point = torch.tensor([[0.21, -0.13, 0.17]])
    dot = gaussians_from_points(torch.cat([point, point + 50]), torch.ones(2, 3), sh_degree=0, opacity=0.9)
    dot.log_scales.fill_(-4.0)
    alpha = render_gaussians(dot, camera).alpha
    rows, columns = torch.meshgrid(torch.arange(50) + 0.5, torch.arange(60) + 0.5, indexing="ij")
    centre = torch.stack([(alpha * columns).sum(), (alpha * rows).sum()]) / alpha.sum()
    torch.testing.assert_close(centre, camera.project(point)[0][0], atol=0.02, rtol=0)


@pytest.mark.incident(18)
def test_points_behind_a_camera_have_no_pixel():
    """Incident 18: division by z <= 0 put them into the picture."""
    camera = orbit_cameras(1, 3.0)[0]
    pixels, depth = camera.project(torch.stack([2 * camera.position, camera.position, torch.zeros(3)]))
    assert pixels[:2].isnan().all() and (depth[:2] <= 1e-6).all() and pixels[2].isfinite().all()


def test_blender_poses_convert_to_the_same_optical_axis():
    """The Blender camera looks along its own -z with y up; flipping rows instead of columns would move the camera
    itself."""
    pose = orbit_cameras(1, 4.0)[0].camera_to_world
    gl = blender_to_opencv(pose)
    torch.testing.assert_close(-gl[:3, 2], pose[:3, 2])
    torch.testing.assert_close(gl[:3, 3], pose[:3, 3])
    torch.testing.assert_close(rigid_inverse(gl) @ gl, torch.eye(4), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("matrix", "words"),
                         [(torch.eye(3), "4x4"), (torch.diag(torch.tensor([2.0, 2, 2, 1])), "not rigid"),
                          (torch.diag(torch.tensor([1.0, 1, -1, 1])), "mirrors"),
                          (torch.full((4, 4), torch.nan), "not finite")])
def test_a_matrix_that_is_not_rigid_raises_an_error_with_its_name(matrix, words):
    with pytest.raises(KiloError, match=f"^the pose of frame 3.*{words}"): check_rigid(matrix, "the pose of frame 3")


def test_a_field_of_view_of_half_a_turn_or_more_is_an_error():
    with pytest.raises(KiloError, match="field of view"): camera_from_angle(torch.eye(4), 10, 10, 4.0)


def test_resizing_scales_pixels_and_keeps_the_field_of_view():
    camera: PinholeCamera = orbit_cameras(3, 4.0, width=100, height=80)[1]
    points = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) * 0.4
    torch.testing.assert_close(camera.resized(50, 40).project(points)[0] * 2, camera.project(points)[0], atol=1e-3,
                               rtol=0)


def test_the_focus_moves_with_the_cameras_and_its_ball_is_in_every_image():
    """A visual hull is carved inside this ball; a camera whose image did not contain the ball could not carve it."""
    target = torch.tensor([1.3, -.4, .7])
    cameras = orbit_cameras(7, 3.0, 35, target=target, width=90, height=60) + orbit_cameras(
        3, 5.0, -10, target=target, width=60, height=60
    )
    centre, radius = focus(cameras)
    torch.testing.assert_close(centre, target, atol=1e-5, rtol=0)
    ball = centre + 0.999 * radius * torch.nn.functional.normalize(
        torch.randn(2000, 3, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    for camera in cameras:
        pixels, depth = camera.project(ball)
        assert (depth > 0).all() and (pixels > 0).all() and (pixels < torch.tensor([camera.width, camera.height])).all()


def test_cameras_that_look_away_are_an_error_with_their_number():
    """Blender poses read as OpenCV's have the same axes, so the same nearest point, behind every camera."""
    cameras = orbit_cameras(6, 4.0)
    turned = replace(cameras[2], camera_to_world=blender_to_opencv(cameras[2].camera_to_world))
    with pytest.raises(KiloError, match="1 of 6 cameras look away"): focus([*cameras[:2], turned, *cameras[3:]])
