"""The orbit viewer: channels of views, poses, handling of requests, the widget, and its static form."""
import asyncio
import base64
import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kilonb.distill.student import make_student, save_student
from kilonb.distill.orbit import (
    Orbit,
    cells_of_view,
    newest_student,
    render_student,
    view_sheet,
    viewed_student,
    viewed_teacher,
)
from kilonb.imaging.channels import CHANNELS, RenderedView, ViewSettings, colourise
from kilonb.imaging.normals import normals_from_depth
from kilonb.imaging.orbit import OrbitPose, pose_around
from kilonb.imaging.orbit_widget import LatestRequest, OrbitWidget, RequestRenderer, drag_speed, encode_frame
from kilonb.imaging.viewer import render_gaussians_view, render_picture, viewed_gaussians
from kilonb.fields.hashgrid import HashGridConfig
from kilonb.fields.kilonerf import KiloNeRFConfig
from kilonb.fields.mlp import MLPConfig
from kilonb.fields.occupancy import occupancy_from_gaussians
from kilonb.fields.rendering import render_rays, trace_rays
from kilonb.core.errors import KiloError
from kilonb.splats.gaussians import gaussians_from_points

NOTEBOOK = Path(__file__).resolve().parents[1] / "nbs" / "explore" / "orbit.ipynb"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
CONFIGS = {"kilonerf": KiloNeRFConfig(cell_size=0.3, position_frequencies=3, hidden=16, density_bias=2.0),
           "mlp": MLPConfig(position_frequencies=3, hidden=16, layers=2, density_bias=2.0),
           "hashgrid": HashGridConfig(levels=4, log2_table=8, base_resolution=4, finest_resolution=32, hidden=16,
                                      features=8, density_bias=2.0)}


@pytest.fixture(scope="module")
def ball():
    shell = torch.nn.functional.normalize(torch.randn(2000, 3, generator=torch.Generator().manual_seed(0)),
                                          dim=-1) * 0.6
    return gaussians_from_points(shell, (shell * 4).sin() / 2 + 0.5, sh_degree=0, opacity=0.95, scale=0.9)


@pytest.fixture(scope="module")
def students(ball):
    grid = occupancy_from_gaussians(ball.means, ball.quats, ball.scales, ball.opacities, 40)
    return {kind: make_student(grid, config, step=0.01) for kind, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def student(students): return students["kilonerf"]


@pytest.fixture(scope="module")
def camera(ball): return pose_around(ball).camera(48, 40)


def normals_of(view): return normals_from_depth(view.expected_depth, view.alpha, view.camera)


def renderer_of(ball, student, settings, parts=None) -> RequestRenderer:
    return RequestRenderer([viewed_teacher(ball, student), viewed_student(student)], pose_around(ball), settings, parts)


def picture_of_teacher(ball, camera, settings, student=None):
    model = viewed_gaussians(ball) if student is None else viewed_teacher(ball, student)
    return render_picture(model, camera, settings, None if student is None else viewed_student(student))


def picture_of_student(student, camera, settings, ball):
    return render_picture(viewed_student(student), camera, settings, viewed_teacher(ball, student))


def plane(camera, facing, distance=3.0):
    """The view of an opaque plane `distance` in front of a camera; facing: [3] its normal in the camera's frame."""
    local = torch.stack([(camera.pixel_centres()[:, 0] - camera.cx) / camera.fx,
                         (camera.pixel_centres()[:, 1] - camera.cy) / camera.fy,
                         torch.ones(camera.width * camera.height)], -1)
    depth = (distance * facing[2] / (local @ facing)).reshape(camera.height, camera.width)
    return RenderedView(torch.ones(*depth.shape, 3), torch.ones_like(depth), depth, None, camera, 0.0)


# What the pictures show

@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("channel", CHANNELS)
def test_every_channel_of_every_kind_of_student_is_a_picture_of_the_size_asked_for(
    ball, students, camera, channel, kind
):
    settings = ViewSettings(56, 40, 24, channel)
    for view in (picture_of_student(students[kind], camera, settings, ball),
                 picture_of_teacher(ball, camera, settings, students[kind])):
        assert view.image.shape == (40, 56, 3) and view.image.dtype == np.uint8 and view.image.std() > 0
        numbers, bar = view.statistics, view.statistics["bar"]
        assert numbers["rays"] == 56 * 40 and numbers["milliseconds"] > 0
        assert (bar is not None) == (channel in ("alpha", "depth", "samples", "error"))
        if bar: assert bar["low"] < bar["high"] and bar["unit"] and len(bar["colours"]) == 9


def test_alpha_is_white_where_the_object_is_and_black_where_it_is_not(ball, camera):
    view = render_gaussians_view(ball, camera)
    image = picture_of_teacher(ball, camera, ViewSettings(48, 40, 24, "alpha")).image
    assert (image[view.alpha.numpy() == 0] == 0).all() and image[view.alpha.numpy() > 0.99].min() > 250


def test_the_background_fills_what_is_empty_and_nothing_else(ball, camera):
    empty = (render_gaussians_view(ball, camera).alpha == 0).numpy()
    for channel in ("rgb", "depth", "normals"):
        image = picture_of_teacher(ball, camera, ViewSettings(48, 40, 24, channel, background="#204060")).image
        assert (image[empty] == (0x20, 0x40, 0x60)).all() and (image[~empty] != (0x20, 0x40, 0x60)).any()


def test_a_colour_bar_covers_what_is_shown(ball, camera):
    view = render_gaussians_view(ball, camera)
    bar = colourise(view, ViewSettings(48, 40, 24, "depth")).statistics["bar"]
    solid = view.expected_depth[view.alpha >= 0.5]
    assert bar["low"] == pytest.approx(solid.min().item()) and bar["high"] == pytest.approx(solid.max().item())
    fixed = colourise(view, ViewSettings(48, 40, 24, "depth", depth_range=(1.0, 9.0))).statistics["bar"]
    assert (fixed["low"], fixed["high"]) == (1.0, 9.0)


@pytest.mark.parametrize("facing", [(0, 0, -1), (0.6, 0, -0.8), (-0.3, 0.5, -0.9), (0, -0.7, -0.7)])
def test_normals_of_a_plane_are_its_own(camera, facing):
    """The one surface whose normals are known everywhere; a flipped axis or a half-pixel shift of one of them shows."""
    facing = torch.nn.functional.normalize(torch.tensor(facing, dtype=torch.float32), dim=0)
    normals = normals_of(plane(camera, facing))
    torch.testing.assert_close(normals[2:-2, 2:-2], facing.expand(36, 44, 3), atol=0.02, rtol=0)


def test_normals_are_unit_and_face_the_camera_and_nothing_else_has_one(ball, student, camera):
    rays = camera.directions(camera.pixel_centres()) @ camera.camera_to_world[:3, :3]
    for view in (render_gaussians_view(ball, camera), render_student(student, camera)):
        normals = normals_of(view)
        length, some = normals.norm(dim=-1), (normals != 0).any(-1)
        assert some.sum() > 200 and ((length[some] - 1).abs() < 1e-5).all() and not some[view.alpha < 0.5].any()
        assert ((normals.reshape(-1, 3) * rays).sum(-1) <= 1e-6).all()


def test_cells_and_colours_correspond_one_to_one(student, camera):
    view, settings = render_student(student, camera), ViewSettings(48, 40, 24, "cells")
    cells = cells_of_view(view, student)
    image = colourise(view, settings, cells, student.field.cells.count).image
    corner = ((camera.unproject(camera.pixel_centres(), view.expected_depth.flatten()) - student.field.cells.lower)
              / 0.3).floor().long().reshape(40, 48, 3)
    seen = [number for number in cells.unique().tolist() if number >= 0]
    assert len(seen) > 6
    for number in seen:
        assert len(np.unique(image[cells.numpy() == number],
                             axis=0)) == 1 and len(corner[cells == number].unique(dim=0)) == 1
    assert len({tuple(image[cells.numpy() == number][0]) for number in seen}) == len(seen)
    assert (image[cells.numpy() < 0] == 255).all()


def test_the_colours_of_cells_do_not_change_with_the_view(ball, student):
    """Orbiting would flicker otherwise."""
    colours = {}
    for azimuth in range(0, 360, 45):
        view = render_student(student, replace(pose_around(ball), azimuth_deg=float(azimuth)).camera(40, 40))
        cells = cells_of_view(view, student)
        image = colourise(view, ViewSettings(40, 40, 24, "cells"), cells, student.field.cells.count).image
        cells = cells.numpy()
        for number in np.unique(cells[cells >= 0]):
            colours.setdefault(int(number), set()).add(tuple(image[cells == number][0].tolist()))
    assert len(colours) > 20 and all(len(found) == 1 for found in colours.values())


# How far rays go

@pytest.mark.parametrize("kind", CONFIGS)
def test_the_earlier_rays_end_the_fewer_samples_they_cost_and_the_lost_light_is_bounded(students, camera, kind):
    views = {stop: render_student(students[kind], camera, stop) for stop in (1e-4, 1e-2, 0.1, 0.3)}
    whole, earlier = views[1e-4], None
    for stop, view in views.items():
        assert earlier is None or (view.samples <= earlier.samples).all()
        assert (whole.alpha - view.alpha).abs().max() <= stop + 1e-5 and (
            whole.rgb_premultiplied - view.rgb_premultiplied
        ).abs().max() <= stop + 1e-5
        earlier = view
    assert views[0.3].samples.sum() < 0.7 * whole.samples.sum()


@pytest.mark.parametrize("kind", CONFIGS)
def test_asking_in_rounds_gives_what_asking_at_once_gives(students, camera, kind):
    student, rays = students[kind], camera.rays()
    with torch.no_grad(): once = render_rays(student.field, rays, student.grid, student.step, behind=True)
    for at_a_time in (1, 5, 12):
        rounds = trace_rays(student.field, rays, student.grid, student.step, at_a_time=at_a_time)
        for a, b in zip(rounds[:3], once[:3]): torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)
        assert (rounds.samples <= once.samples.offsets.diff()).all() and rounds.samples.sum() < len(once.weights)


def test_an_empty_view_is_an_image_of_one_colour_in_every_channel(ball, student):
    away = OrbitPose(radius=3.0, target=(50.0, 0.0, 0.0)).camera(32, 24)
    for channel in CHANNELS:
        settings = ViewSettings(32, 24, 16, channel)
        for view in (picture_of_student(student, away, settings, ball),
                     picture_of_teacher(ball, away, settings, student)):
            assert view.image.shape == (24, 32, 3) and len(np.unique(view.image.reshape(-1, 3), axis=0)) == 1


# Poses and settings

def test_a_pose_sees_its_target_in_the_middle_from_its_distance_with_up_upwards():
    for azimuth, elevation in ((0.0, 0.0), (77.0, 60.0), (200.0, -89.0)):
        pose = OrbitPose(azimuth, elevation, 2.5, (1.0, -2.0, 0.5), (0.0, 1.0, 0.0))
        camera = pose.camera(40, 30)
        pixel, depth = camera.project(torch.tensor([pose.target, (1.0, -1.9, 0.5)]))
        torch.testing.assert_close(pixel[0], torch.tensor([20.0, 15.0]), atol=1e-3, rtol=0)
        assert depth[0].item() == pytest.approx(2.5, abs=1e-4) and pixel[1, 1] < pixel[0, 1]


@pytest.mark.parametrize("wrong",
                         [dict(width=0), dict(channel="heat"), dict(stop=1.5), dict(drag_width=999),
                          dict(background="nowhere"), dict(depth_range=(2.0, 2.0))])
def test_bad_settings_are_named_in_one_sentence(wrong):
    with pytest.raises(KiloError) as error: ViewSettings(**wrong)
    assert (
        "\n" not in str(error.value)
        and len(str(error.value)) < 200
        and str(next(iter(wrong.values()))).split(",")[0].strip("()") in str(error.value)
    )


@pytest.mark.parametrize("wrong",
                         [dict(radius=0.0), dict(elevation_deg=120.0), dict(target=(0.0, float("nan"), 0.0)),
                          dict(field_of_view_deg=1.0)])
def test_bad_poses_are_named_in_one_sentence(wrong):
    with pytest.raises(KiloError, match=r"expected|not a finite"): OrbitPose(**wrong)


@pytest.mark.parametrize("channel", ["cells", "error", "samples"])
def test_a_channel_without_what_it_needs_says_what(ball, camera, channel):
    with pytest.raises(KiloError, match=f"'{channel}' needs"):
        colourise(render_gaussians_view(ball, camera), ViewSettings(48, 40, 24, channel))


# Requests

def run(storm): return asyncio.run(storm())


def test_of_many_poses_only_the_newest_is_rendered_and_none_is_queued():
    async def storm():
        drawn = []
        latest = LatestRequest(lambda request: iter([request]), drawn.append, None)
        for burst in range(5):
            for i in range(50): latest.submit((burst, i))
            await latest._task
        return drawn, latest
    drawn, latest = run(storm)
    assert drawn == [(burst, 49) for burst in range(5)] and latest.superseded == 5 * 49 and latest.pending is None


def test_a_new_drag_ends_a_full_picture_between_two_bands(ball, student):
    renderer = renderer_of(ball, student, ViewSettings(64, 512, 16))

    async def storm():
        drawn, bands = [], [0]
        def answer(request):
            for part in renderer.render(request):
                bands[0] += part is None
                yield part
        latest = LatestRequest(answer, lambda frame: drawn.append(frame[0]["number"]), None)
        latest.submit({"number": 1, "full": True})
        while bands[0] < 3: await asyncio.sleep(0)
        latest.submit({"number": 2, "full": False})
        await latest._task
        return drawn, bands[0], latest.interrupted
    drawn, bands, abandoned = run(storm)
    assert drawn == [2] and abandoned == 1 and bands < 9


def test_a_failure_is_reported_and_the_next_request_is_answered():
    def answer(request):
        if request == "bad": raise KiloError("That was wrong.")
        if request == "worse": raise ZeroDivisionError("zero")
        yield request
    failures, drawn = [], []
    latest = LatestRequest(answer, drawn.append, lambda request, reason: failures.append(reason))
    for request in ("bad", "worse", "good"): latest.submit(request)
    assert failures == ["That was wrong.", "ZeroDivisionError: zero"] and drawn == ["good"]


def test_images_are_small_while_dragging_and_full_after_the_release(ball, student):
    renderer = renderer_of(ball, student, ViewSettings(120, 90, 40))
    for full, size in ((False, (40, 30)), (True, (120, 90))):
        message, buffers = [*renderer.render({"full": full, "number": 7, "view": "a",
                                          "settings": {"difference": True}})][-1]
        assert [Image.open(io.BytesIO(packed)).size for packed in buffers] == [size] * 3 and (
            message["number"],
            message["view"],
        ) == (7, "a")
        assert [about["type"] for about in message["pictures"]] == ["image/png" if full else "image/jpeg"] * 3
        json.dumps(message)


@pytest.mark.parametrize("request_",
                         [{"pose": {"radius": -1}}, {"pose": {"radius": "far"}}, {"pose": 3}, {"pose": {"nowhere": 1}},
                          {"pose": {"target": [1]}}, {"settings": {"channel": "<b>"}}, {"settings": {"stop": "low"}},
                          {"settings": {"drag_width": 10**9}}, {"settings": {"drag_width": 3.5}}, {"settings": 7}])
def test_an_invalid_request_is_refused(ball, student, request_):
    renderer = renderer_of(ball, student, ViewSettings(40, 40, 24))
    with pytest.raises(KiloError): [*renderer.render(request_)]


def test_an_exact_image_is_encoded_without_loss():
    image = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_frame(image, True)[1]))), image)


def test_the_benchmark_runs_the_code_of_a_drag(ball, student):
    renderer = renderer_of(ball, student, ViewSettings(60, 60, 30))
    speed = drag_speed(renderer, 3)
    assert speed["pictures_per_s"] == pytest.approx(1000 / speed["picture_ms"],
                                                    rel=3) and speed["teacher_ms"] > 0 and speed["student_ms"] > 0
    assert drag_speed(renderer_of(ball, student, renderer.settings, ["student"]), 2)["teacher_ms"] == 0
    with pytest.raises(KiloError, match="at least 1"): drag_speed(renderer, 0)


# The widget

@pytest.fixture
def orbit(ball, student):
    made = Orbit(ball, student, settings=ViewSettings(96, 80, 40), title="a </script><b>title</b>")
    yield made
    made.close()


def test_the_output_carries_a_picture_beside_the_widget(orbit):
    bundle = orbit._repr_mimebundle_()
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    assert data[WIDGET_VIEW]["model_id"] == orbit.model_id and "JupyterLab" in data["text/plain"]
    picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
    assert picture.format == "PNG" and picture.width > picture.height > 100


def test_the_page_writes_no_html(orbit):
    """The title is a trait that the page sets as text; its script writes no HTML at all."""
    forbidden = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "http://", "https://",
                 "import(")
    assert not any(word in str(orbit._esm) for word in forbidden)
    assert "http" not in str(orbit._css)


def test_the_page_has_the_attributes_that_browser_tests_use(orbit):
    script = str(orbit._esm)
    assert all(hook in script
               for hook in ("kilonb-orbit", "dataset.frames", '"rays while dragging"', '"early termination"',
                            '"field of view"', '"channel"'))


def test_what_is_set_from_python_is_checked_and_shown(orbit):
    orbit.channel, orbit.stop, orbit.drag_width = "depth", 0.1, 32
    sent = []
    orbit.send = lambda message, buffers=None: sent.append((message, buffers))
    orbit._handle_custom_msg({"kind": "render", "number": 1, "view": "a", "full": False}, [])
    (message, buffers), = sent
    assert message["width"] == 32 and all(about["bar"]["unit"] == "m"
                                          for about in message["pictures"]) and len(buffers) == 2
    for name, value in (("channel", "heat"), ("stop", 0.0), ("drag_width", 97)):
        with pytest.raises(KiloError): setattr(orbit, name, value)
    orbit.pose = replace(orbit.pose, azimuth_deg=10.0)
    assert orbit.home["azimuth_deg"] == 10.0 and orbit.get_state()["home"]["azimuth_deg"] == 10.0


def test_the_pose_follows_the_page(orbit):
    orbit.send = lambda *_: None
    orbit._handle_custom_msg({"kind": "render", "number": 1, "full": False,
                              "pose": {"azimuth_deg": 99.0, "target": [0.1, 0.2, 0.3]}}, [])
    assert orbit.pose.azimuth_deg == 99.0 and orbit.pose.target == (0.1, 0.2, 0.3)


def test_a_closed_widget_releases_its_models_and_refuses_calls(ball, student):
    orbit = Orbit(ball, student, settings=ViewSettings(40, 40, 24))
    orbit.close()
    assert orbit._renderer is None
    with pytest.raises(KiloError, match="closed"): orbit.benchmark()
    orbit._handle_custom_msg({"kind": "render", "number": 1}, [])


@pytest.mark.parametrize("wrong", ["teacher", "student"])
def test_teacher_and_student_are_not_mistaken_for_each_other(ball, student, wrong):
    with pytest.raises(KiloError, match=f"^{wrong} is of type"):
        Orbit(*((student, student) if wrong == "teacher" else (ball, ball)))


# On paper

@pytest.fixture(scope="module")
def finished(tmp_path_factory, student, ball):
    """The notebook, run by the command line on a tiny teacher with a student beside it."""
    from kilonb.splats.ply import write_ply

    folder = tmp_path_factory.mktemp("orbit")
    write_ply(folder / "ball.ply", ball)
    save_student(student, folder / "student.pt", "raw")
    shutil.copy(NOTEBOOK, folder / "orbit.ipynb")
    values = {"data": f"ply:{folder / 'ball.ply'}", "student": folder / "student.pt", "width": 64, "drag_width": 32,
              "pictures": 3}
    start = [sys.executable, "-c", "import sys; from kilonb.cli.main import main; sys.exit(main())"]
    given = [part for name, value in values.items() for part in ("-p", f"{name}={value}")]
    command = [*start, "run", str(folder / "orbit.ipynb"), *given, "--out", str(folder / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (folder / "run" / "results.json").is_file(), done.stdout[-2000:] + done.stderr[-2000:]
    return folder / "run"


def widgets(folder):
    """The outputs of an executed notebook that hold a widget."""
    cells = json.loads((folder / "notebook.ipynb").read_text())["cells"]
    return [output["data"] for cell in cells for output in cell.get("outputs", [])
            if WIDGET_VIEW in output.get("data", {})]


def test_the_executed_notebook_shows_a_picture_where_the_widget_would_be(finished):
    data, = widgets(finished)
    assert Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).width > 400


def test_the_run_page_shows_it_too_and_loads_nothing(finished):
    page, (data,) = (finished / "index.html").read_text(), widgets(finished)
    assert "".join(data["image/png"].split()) in page.replace("\n",
                                                              "") and "widget-view" not in page and "unpkg" not in page


def test_the_run_has_its_speed_as_a_gate(finished):
    results = json.loads((finished / "results.json").read_text())
    assert (
        results["gates"]["drag_pictures_per_s"]["at_least"] == 8
        and results["results"]["drag_student_alone_pictures_per_s"] > 0
    )
    assert (
        results["tables"]["early_termination"][0]["samples_per_ray"]
        >= results["tables"]["early_termination"][-1]["samples_per_ray"]
    )


def test_the_sheet_has_all_there_is_to_see(ball, student, camera):
    sheet = np.asarray(view_sheet(ball, student, camera, ViewSettings(48, 40, 24), size=100))
    height, width = sheet.shape[0] // 2, sheet.shape[1] // 4
    for i in range(8):
        panel = sheet[i // 4 * height:(i // 4 + 1) * height, i % 4 * width:(i % 4 + 1) * width]
        assert panel[30:].std() > 5, f"panel {i} is empty"


def test_without_runs_there_is_no_newest_student(tmp_path): assert newest_student("00", tmp_path) is None


# Any model

def test_the_widget_turns_models_that_are_no_students(ball, tmp_path):
    """A PLY and gaussians in memory, without a difference to students: no cells, and errors against the first."""
    from kilonb.splats.ply import write_ply

    write_ply(tmp_path / "ball.ply", ball)
    widget = OrbitWidget({"file": tmp_path / "ball.ply", "half": ball.subset(torch.arange(1000))}, pose_around(ball),
                         settings=ViewSettings(48, 40, 24), difference=True)
    sent = []
    widget.send = lambda message, buffers=None: sent.append(message)
    widget._handle_custom_msg({"kind": "render", "number": 1, "settings": {"channel": "error", "difference": True}}, [])
    assert [part["name"] for part in sent[0]["pictures"]] == ["file", "half", "difference"]
    assert widget.channels == ["rgb", "alpha", "depth", "normals", "samples", "error"]
    assert sent[0]["samples_per_ray"] is None
    widget.close()
