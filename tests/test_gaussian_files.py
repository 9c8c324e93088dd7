"""Files of gaussians from many programs: read rightly, or refused in one true sentence."""

import gzip
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from kilonb.core.errors import KiloError
from kilonb.data.registry import find_reader
from kilonb.distill.data import distillation_data_from_ply
from kilonb.imaging.orbit import guess_up, up_vector
from kilonb.imaging.sources import open_source
from kilonb.scenes.brickyard import build_brickyard
from kilonb.splats.compressed_ply import morton_order
from kilonb.splats.formats import read_gaussians, write_compressed_ply, write_gaussians, write_splat, write_spz
from kilonb.splats.gaussians import Gaussians
from kilonb.splats.ply import read_ply, write_ply
from kilonb.splats.ply_tables import read_ply_tables
from kilonb.splats.rasterizer import rasterize
from tests.helpers import real_data, run_here


def some_gaussians(count: int = 40, terms: int = 1, seed: int = 0) -> Gaussians:
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw)
    return Gaussians(normal(count, 3), normal(count, 4), normal(count, 3) / 4 - 2, normal(count),
                     torch.cat([normal(count, 1, 3).clamp(-1.7, 1.7), normal(count, terms - 1, 3) / 5], 1))


def columns_of(gaussians: Gaussians) -> dict[str, np.ndarray]:
    """The properties of the original layout by name."""
    parts = {name: tensor.numpy() for name, tensor in gaussians.parameters().items()}
    higher = parts["sh"][:, 1:].transpose(0, 2, 1).reshape(len(gaussians), -1)
    groups = {("x", "y", "z"): parts["means"], ("f_dc_0", "f_dc_1", "f_dc_2"): parts["sh"][:, 0],
              tuple(f"f_rest_{i}" for i in range(higher.shape[1])): higher,
              ("opacity",): parts["logit_opacities"][:, None], ("scale_0", "scale_1", "scale_2"): parts["log_scales"],
              ("rot_0", "rot_1", "rot_2", "rot_3"): parts["quats"]}
    return {name: group[:, i].copy() for names, group in groups.items() for i, name in enumerate(names)}


def put(path: Path, columns: dict[str, np.ndarray], *, order: str = "<", ending: str = "\n", before: str = "",
        after: str = "", front: bytes = b"", behind: bytes = b"", kinds: dict[str, str] | None = None) -> Path:
    """Write a PLY by hand; before, after: header lines of other elements; front, behind: their bytes."""
    words = {"<": "binary_little_endian", ">": "binary_big_endian", "": "ascii"}
    types = {"f4": "float", "f8": "double", "u1": "uchar", "i4": "int"}
    kinds = {name: (kinds or {}).get(name, "f4") for name in columns}
    count = len(next(iter(columns.values())))
    head = ["ply", f"format {words[order]} 1.0", "comment written by hand", "obj_info none", *before.split("|"),
            f"element vertex {count}", *(f"property {types[kinds[name]]} {name}" for name in columns),
            *after.split("|"), "end_header"]
    table = np.zeros(count, [(name, (order or "<") + kind) for name, kind in kinds.items()])
    for name, values in columns.items(): table[name] = values
    text = "".join(" ".join(f"{value!r}" for value in row) + "\n" for row in table.tolist()).encode()
    header = ending.join(line for line in head if line) + ending
    path.write_bytes(header.encode() + front + (table.tobytes() if order else text) + behind)
    return path


def refusal(path: Path, **options) -> str:
    with pytest.raises(KiloError) as caught: read_gaussians(path, **options)
    text = str(caught.value)
    assert len(text) <= 400 and text.endswith(".")
    return text


@pytest.mark.parametrize("order", ["<", ">", ""])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("terms", [1, 4, 9, 16])
def test_every_byte_order_line_ending_and_degree_of_a_ply_gives_the_same_gaussians(order, ending, terms, tmp_path):
    before = some_gaussians(7, terms)
    columns = columns_of(before)
    mixed = {name: columns[name] for name in sorted(columns)}
    path = put(tmp_path / "a.ply", mixed, order=order, ending=ending, kinds={"x": "f8", "opacity": "f8"})
    after = read_gaussians(path, say=lambda note: None)
    for name, tensor in before.parameters().items(): assert torch.equal(tensor, getattr(after, name)), name


def test_elements_before_and_after_the_gaussians_are_passed_over(tmp_path):
    before = some_gaussians(5)
    faces = struct.pack("<B3iB4i", 3, 0, 1, 2, 4, 0, 1, 2, 3)
    path = put(tmp_path / "a.ply", columns_of(before), before="element face 2|property list uchar int vertex_indices",
               front=faces, behind=bytes(16 * 4 + 3),
               after="element extrinsic 16|property float extrinsic|element version 3|property uchar version")
    assert torch.equal(read_ply(path).means, before.means)
    cut = path.read_bytes()[:-70]
    path.write_bytes(cut)
    assert "cut short" in refusal(path)


def test_bytes_behind_the_last_element_are_said(tmp_path):
    notes = []
    path = put(tmp_path / "a.ply", columns_of(some_gaussians(5)), behind=b"\n")
    assert len(read_gaussians(path, say=notes.append)) == 5 and "1 byte behind" in notes[0]


def test_infinite_logits_are_opacities_of_one_and_zero(tmp_path):
    columns, notes = columns_of(some_gaussians(6)), []
    columns["opacity"][:3] = np.inf, -np.inf, 1e38
    found = read_gaussians(put(tmp_path / "a.ply", columns), say=notes.append)
    assert found.opacities[0] == found.opacities[2] == 1 and found.opacities[1] < 1e-12 and "3 opacities" in notes[0]


@pytest.mark.parametrize("name", ["x", "opacity", "scale_1", "rot_0", "f_dc_2"])
def test_rows_that_are_no_numbers_are_refused_with_their_number_and_dropped_where_asked(name, tmp_path):
    columns, notes = columns_of(some_gaussians(9)), []
    columns[name][[2, 5]] = np.nan
    path = put(tmp_path / "a.ply", columns)
    assert "2 of 9" in (text := refusal(path)) and "-p drop_bad=true" in text and "number 2" in text
    assert len(read_gaussians(path, drop_bad=True, say=notes.append)) == 7
    assert "2 of 9 gaussians were left out" in notes[0]
    columns[name][:] = np.nan
    assert "none of its 9" in refusal(put(path, columns), drop_bad=True)


def test_activated_values_are_never_read_in_silence(tmp_path):
    columns, notes = columns_of(some_gaussians(9)), []
    columns |= {"opacity": np.linspace(0, 1, 9), **{f"scale_{i}": np.full(9, 0.02) for i in range(3)}}
    path = put(tmp_path / "a.ply", columns)
    read_gaussians(path, say=notes.append)
    assert "activated values" in notes[0]
    found = read_gaussians(path, activated=True, say=notes.append)
    assert torch.allclose(found.opacities, torch.linspace(0, 1, 9), atol=1e-6)
    assert torch.allclose(found.scales, torch.tensor(0.02)) and not any("activated" in note for note in notes[1:])


def test_the_filter_of_mip_splatting_is_applied_and_other_properties_are_named(tmp_path):
    before, notes = some_gaussians(9), []
    columns = columns_of(before) | {"filter_3D": np.full(9, 0.1), "time": np.zeros(9), "segment": np.zeros(9)}
    found = read_gaussians(put(tmp_path / "a.ply", columns), say=notes.append)
    wider = (before.scales**2 + 0.01).sqrt()
    assert torch.allclose(found.scales, wider, rtol=1e-4)
    assert torch.allclose(found.opacities, before.opacities * (before.scales / wider).prod(1), rtol=1e-4)
    assert any("filter_3D" in note for note in notes)
    assert any("time, segment" in note and "at rest" in note for note in notes)


def test_other_plys_are_called_what_they_are(tmp_path):
    columns, flat = columns_of(some_gaussians(4)), np.zeros(4)
    points = {name: flat for name in ("x", "y", "z", "red", "green", "blue")}
    colours = {"red": "u1", "green": "u1", "blue": "u1"}
    assert "a point cloud, not gaussians" in refusal(put(tmp_path / "a.ply", points, kinds=colours))
    faces = "element face 0|property list uchar int i"
    assert "a mesh, not gaussians" in refusal(put(tmp_path / "a.ply", points, after=faces))
    without = {name: column for name, column in columns.items() if not name.startswith("rot")}
    assert "rot_0, rot_1, rot_2, rot_3" in refusal(put(tmp_path / "a.ply", without))
    assert "2D gaussians" in refusal(put(tmp_path / "a.ply", {n: c for n, c in columns.items() if n != "scale_2"}))
    shaded = {n: c for n, c in columns.items() if not n.startswith("f_dc")} | points
    assert "red, green, blue are not read" in refusal(put(tmp_path / "a.ply", shaded))
    assert "holds no gaussians" in refusal(put(tmp_path / "a.ply", {n: c[:0] for n, c in columns.items()}))


def test_a_ply_sent_as_text_is_refused_and_not_read_as_noise(tmp_path):
    columns = columns_of(some_gaussians(400))
    path = put(tmp_path / "a.ply", columns, ending="\r\n")
    head, body = path.read_bytes().split(b"end_header\r\n", 1)
    path.write_bytes(head + b"end_header\r\n" + body.replace(b"\n", b"\r\n"))
    assert b"\n" in body and "text mode" in refusal(path)


@pytest.mark.parametrize("terms", [1, 16])
def test_written_formats_come_back_within_their_quantisation_whatever_their_name(terms, tmp_path):
    before = some_gaussians(300, terms)
    writers = {"spz": write_spz, "splat": write_splat, "packed": write_compressed_ply, "ply": write_ply}
    for name, write in writers.items():
        write(tmp_path / f"{name}.bin", before)
        after, like = read_gaussians(tmp_path / f"{name}.bin"), before
        if name == "packed": like = before.subset(torch.from_numpy(morton_order(before.means.double().numpy())))
        assert (after.means - like.means).abs().max() <= {"spz": 2**-13, "packed": 0.005}.get(name, 0)
        assert (after.opacities - like.opacities).abs().max() <= 0.5 / 255 + 1e-6
        assert (after.log_scales - like.log_scales).abs().max() <= {"spz": 1 / 32}.get(name, 0.01) + 1e-6
        units = [torch.nn.functional.normalize(one.quats, dim=1) for one in (after, like)]
        assert (units[0] * units[1]).sum(1).abs().min() > 0.9998
        assert (after.sh[:, 0] - like.sh[:, 0]).abs().max() <= 0.0132
        assert after.sh_degree == (0 if name == "splat" else like.sh_degree)
        if terms > 1 and name != "splat":
            assert (after.sh[:, 1:] - like.sh[:, 1:].clamp(-1, 0.99)).abs().max() <= 1 / 16 + 0.11 * (name == "packed")


def test_files_that_are_no_gaussians_are_named_with_a_way_out(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.sog", "w") as archive: archive.writestr("meta.json", "{}")
    contents = {"b.ply": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n",
                "c.ply": b"<!DOCTYPE html>",
                "d.spz": b"NGSP\4\0\0\0" + bytes(24), "e.ksplat": b"\0\1" + bytes(91), "f.json": b'{"version": 2}',
                "g.splat": bytes(33), "h.spz": gzip.compress(b"hello"), "i.ply": b"",
                "j.spz": gzip.compress(struct.pack("<4sIIBBBB", b"NGSP", 3, 10**9, 0, 12, 0, 0))}
    for name, content in contents.items(): (tmp_path / name).write_bytes(content)
    expected = {"a.sog": "SOG", "b.ply": "git lfs pull", "c.ply": "HTML", "d.spz": "version 4", "e.ksplat": "ksplat",
                "f.json": "SOG folder", "g.splat": "multiple of 32", "h.spz": "NGSP", "i.ply": "empty",
                "j.spz": "1000000000"}
    for name, words in expected.items(): assert words in refusal(tmp_path / name), name
    assert "is a folder" in refusal(tmp_path) and "b.ply" in refusal(tmp_path)


def test_everything_that_takes_gaussians_takes_every_format(tmp_path):
    yard = build_brickyard(count=4_000)
    for name in ("a.spz", "a.splat", "a.compressed.ply"):
        write_gaussians(tmp_path / name, yard)
        assert open_source(tmp_path / name).kind == "gaussians"
        assert len(find_reader("ply")(tmp_path / name)) == len(yard)
    data = distillation_data_from_ply(tmp_path / "a.spz", views=2, test_views=1, width=16)
    assert len(data.teacher) == len(yard) and [len(data.train), len(data.test)] == [2, 1]


def test_up_is_found_by_the_ground(tmp_path):
    yard = build_brickyard(count=4_000)
    assert guess_up(yard).axis == "z"
    said = []
    assert up_vector("auto", yard, said.append).tolist() == [0, 0, 1] and "up is z" in said[0]
    assert "no ground" in guess_up(some_gaussians(500)).reason


def test_up_of_a_real_scan_is_minus_y():
    assert guess_up(read_gaussians(real_data("splats") / "playbot_lod3_inria.ply")).axis == "-y"


def test_a_real_scan_survives_the_compressed_formats(tmp_path):
    robot = read_gaussians(real_data("splats") / "playbot_lod3_inria.ply")
    write_compressed_ply(tmp_path / "a.ply", robot)
    assert set(read_ply_tables(tmp_path / "a.ply", ("chunk", "sh")).tables) == {"chunk", "sh"}
    order = torch.from_numpy(morton_order(robot.means.double().numpy()))
    again = read_gaussians(tmp_path / "a.ply")
    assert (again.means - robot.means[order]).abs().median() < 1e-3 * robot.means.abs().max()


def scene():
    from kilonb.geometry.cameras import orbit_cameras

    g, cameras = some_gaussians(200, 4), orbit_cameras(2, 5.0, width=32, height=24)
    return [g.means, g.quats, g.scales, g.opacities, g.sh, torch.stack([c.world_to_camera for c in cameras]),
            torch.stack([c.K for c in cameras])]


def test_the_rasteriser_takes_leading_batch_dimensions():
    tensors = scene()
    one, alpha, _ = rasterize(*tensors, 32, 24, sh_degree=1)
    many, alphas, meta = rasterize(*(t.expand(2, 3, *t.shape) for t in tensors), 32, 24, sh_degree=1)
    assert many.shape == (2, 3, *one.shape) and alphas.shape == (2, 3, *alpha.shape) and meta["n_batches"] == 6
    assert torch.equal(many[1, 2], one) and len(meta["batch_ids"]) == len(meta["means2d"])
    with pytest.raises(KiloError, match="batch dimensions"):
        rasterize(tensors[0][None], *tensors[1:], 32, 24, sh_degree=1)


def test_the_rasteriser_takes_whole_sizes_of_any_type_and_refuses_others():
    tensors = scene()
    one = rasterize(*tensors, 32, 24, sh_degree=1)[0]
    for size in ((32.0, 24), (torch.tensor(32), np.int64(24)), (torch.tensor([32.0]), np.float32(24))):
        assert torch.equal(rasterize(*tensors, *size, sh_degree=1)[0], one)
    for wrong in (32.5, "32", float("nan"), True, None):
        with pytest.raises(KiloError, match="width"): rasterize(*tensors, wrong, 24, sh_degree=1)


@pytest.mark.slow
def test_the_option_that_drops_rows_reaches_the_command(tmp_path):
    columns = columns_of(some_gaussians(60))
    columns["x"][:5] = np.nan
    path = put(tmp_path / "a.ply", columns)
    done = run_here("run", "teacher", "--data", f"ply:{path}", "--out", tmp_path / "run", "-p", "orbit_views=1",
                    "-p", "orbit_width=32", "-p", "drop_bad=true")
    assert done.returncode == 0 and "5 of 60 gaussians were left out" in done.stdout, done.stdout + done.stderr
    assert len(read_ply(tmp_path / "run" / "teacher.ply")) == 55
