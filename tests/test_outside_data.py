"""Readers of outside data: a number that cannot be right is refused by its name, a size before memory is taken, and
tables of pandas 1.1 to 3 are read without pandas."""
import json
import pickle
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from kilonb.core.errors import KiloError
from kilonb.core.testing import expect_error
from kilonb.data.matlab import read_mat
from kilonb.data.pictures import read_picture
from kilonb.data.tables import read_table
from kilonb.geometry.cameras import check_camera, orbit_cameras
from kilonb.geometry.transforms import check_rigid
from kilonb.splats.gaussians import Gaussians
from kilonb.training.saved_models import restore_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.fuzz import readers_data, readers_methods
from tests.fuzz.engine import Bench, wrong_message

READERS = {one.name: one for one in [*readers_data.READERS, *readers_methods.READERS]}


def changed(data: bytes, *keys, value: str) -> bytes:
    """A JSON text whose entry at `keys` is the literal `value`."""
    content = json.loads(data)
    place = content
    for key in keys[:-1]: place = place[key]
    place[keys[-1]] = "@@"
    return json.dumps(content).replace('"@@"', value).encode()


def refusal(tmp_path: Path, reader: str, data: bytes) -> str:
    """The message with which a reader refuses an input, which is one sentence."""
    bench = Bench(READERS[reader], tmp_path / reader)
    bench.put(data)
    message = expect_error(READERS[reader].read, bench.path)
    assert not wrong_message(message), message
    return message


NOT_RIGHT = [("transforms", ("fl_x",), "1e999", "fl_x"), ("transforms", ("cx",), "true", "cx"),
             ("transforms", ("fl_y",), "-3", "fl_y"),
             ("transforms", ("frames", 0, "transform_matrix", 0, 0), "1e300", "transform_matrix"),
             ("transforms", ("frames", 1, "transform_matrix", 3, 3), "2", "last row"),
             ("pandaset_intrinsics", ("fx",), "0", "fx"), ("pandaset_intrinsics", ("cy",), '"6"', "cy"),
             ("pandaset_poses", (1, "heading", "w"), "9", "heading"),
             ("pandaset_poses", (2, "position", "x"), "1e31", "frame 2"),
             ("pandaset_times", (0,), "1e999", "timestamps.json"), ("pandaset_gps", (1, "lat"), "true", "gps.json"),
             ("v2xsim_manifest", ("calibration", "fov_deg", "front"), "true", "fov_deg"),
             ("v2xsim_manifest", ("calibration", "yaw_deg_left_positive", "back"), "1e999", "yaw_deg_left_positive"),
             ("opv2v_manifest", ("calibration", "camera0_front", "yaw"), '"x"', "yaw"),
             ("dannce_json", ("unit_m",), "true", "unit_m"), ("dannce_json", ("cameras", 0, "K", 0, 0), "1e999", "K "),
             ("frames_json", ("width",), "-8", "width"),
             ("frames_json", ("frames", 0, "file"), '"../x.npz"', "frames.json"),
             ("gaussian_frames", ("frames", 0, "centre_m", 1), "1e999", "centre_m"),
             ("prepared_attributes", ("attributes", "fps"), "1e999", "fps"),
             ("prepared_attributes", ("attributes", "cameras", "left", "fx"), "0", "fx"),
             ("prepared_attributes", ("attributes", "world_to_prepared", 3, 0), "5", "world_to_prepared"),
             ("episodes_json", ("scripted_noise",), "1e999", "scripted_noise"),
             ("clip_index", ("clips", 0, "frames", 10), "1000000000000", "frames")]


@pytest.mark.parametrize(("reader", "keys", "value", "word"), NOT_RIGHT)
def test_a_number_that_cannot_be_right_is_refused_by_its_name(tmp_path, reader, keys, value, word):
    seed = Bench(READERS[reader], tmp_path / "seed").seeds[0]
    assert word in refusal(tmp_path, reader, changed(seed, *keys, value=value))


def test_a_pose_beyond_the_range_of_numbers_is_no_rotation():
    pose = torch.eye(4, dtype=torch.float64)
    pose[0, 0], pose[0, 1], pose[1, 0] = 1e200, -1e200, 1e200
    assert "over" in expect_error(check_rigid, pose, "the pose")
    camera = orbit_cameras(1, 2.0, width=16, height=12)[0]
    for name, value in (("fx", 0.0), ("fy", float("nan")), ("cx", 1e31), ("width", 0), ("height", True)):
        assert name in expect_error(check_camera, type(camera)(**vars(camera) | {name: value}), "the camera")


def test_a_scale_that_overflows_and_a_quaternion_without_length_are_refused():
    parts = (
        torch.zeros(2, 3),
        torch.tensor([[1.0, 0, 0, 0]] * 2),
        torch.zeros(2, 3),
        torch.zeros(2),
        torch.zeros(2, 1, 3),
    )
    Gaussians(*parts).validate()
    parts[2][1, 0] = 100
    assert "scale" in expect_error(Gaussians(*parts).validate)
    parts[2][1, 0], parts[1][0] = 0, torch.tensor([1e-20, 0, 0, 0])
    assert "quaternion" in expect_error(Gaussians(*parts).validate)


def test_sizes_in_headers_are_refused_by_their_number(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[16:24] = (2**30).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(data)
    assert "8192" in expect_error(read_picture, tmp_path / "a.png")
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 4), }\n"
    npy = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header
    assert "17592186044416" in refusal(tmp_path, "z_depth_npy", npy)
    pcd = readers_data.PCD.replace("POINTS 3", "POINTS 99999999999")
    assert "99999999999" in refusal(tmp_path, "opv2v_pcd", pcd.encode())
    ply = Bench(READERS["ply"], tmp_path / "ply").seeds[0]
    assert "999999999999" in refusal(tmp_path, "ply", ply.replace(b"vertex 3", b"vertex 999999999999"))
    bomb = zlib.compress(bytes(200_000_000), 1)
    (tmp_path / "a.mat").write_bytes(b"MATLAB".ljust(124) + b"\0\1IM" + struct.pack("<II", 15, len(bomb)) + bomb)
    assert "160000000" in expect_error(read_mat, tmp_path / "a.mat", {"a": True})


def test_a_picture_that_would_start_another_program_is_not_opened(tmp_path):
    (tmp_path / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert "not a picture" in expect_error(read_picture, tmp_path / "a.png")


def test_a_saved_model_is_built_only_where_its_shapes_fit():
    state = nn.Linear(3, 2).state_dict()
    assert "shape" in expect_error(restore_model, lambda: nn.Linear(2**24, 2**24), state, "a.pt")
    state["bias"] = torch.full((2,), torch.nan)
    assert "bias" in expect_error(restore_model, lambda: nn.Linear(3, 2), state, "a.pt")


def test_a_recording_in_the_old_form_of_zarr_is_refused_without_its_codecs(tmp_path):
    (tmp_path / "a.zarr/images").mkdir(parents=True)
    (tmp_path / "a.zarr/.zgroup").write_text('{"zarr_format": 2}')
    from kilonb.pose.prepared import read_prepared

    assert "no Zarr group" in expect_error(read_prepared, tmp_path / "a.zarr")


def _write_program(path: Path, *parts: bytes) -> Path:
    path.write_bytes(b"".join(parts))
    return path


def _global(module: str, name: str) -> bytes: return f"c{module}\n{name}\n".encode()


def _text(value: str) -> bytes: return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def _bytes(value: bytes) -> bytes: return b"B" + struct.pack("<I", len(value)) + value


def _arrow(texts: list[str], offsets: list[int] | None = None) -> bytes:
    """The pickle program of an Arrow array of texts, as pyarrow writes it."""
    places = np.cumsum([0, *(len(text.encode()) for text in texts)]) if offsets is None else np.array(offsets)
    kind = _global("pyarrow.lib", "type_for_alias") + b"(" + _text("large_string") + b"tR"
    buffers = b"".join(_global("pyarrow.lib", "py_buffer") + b"(" + _bytes(part) + b"tR"
                       for part in (places.astype("<i8").tobytes(), "".join(texts).encode()))
    array = (_global("pyarrow.lib", "_restore_array") + b"((" + kind + b"K" + bytes([len(texts)]) + b"K\0K\0](N"
             + buffers + b"e]NttR")
    return _global("pandas.arrays", "ArrowStringArray") + b")\x81}(" + _text("_pa_array") + array + b"ub"


def _pandas_3(path: Path, labels: bytes) -> Path:
    """A data frame with one column of text, as pandas 3 pickles it with pyarrow."""
    block = (_global("pandas._libs.internals", "_unpickle_block") + b"(" + labels + _global("builtins", "slice")
             + b"(K\0K\1K\1tRK\2tR")
    index = (_global("pandas.core.indexes.base", "_new_Index") + b"(" + _global("pandas", "Index") + b"}("
             + _text("data") + _arrow(["label"]) + _text("name") + b"NutR")
    rows = (_global("pandas.core.indexes.base", "_new_Index") + b"(" + _global("pandas", "RangeIndex") + b"}("
            + _text("start") + b"K\0" + _text("stop") + b"K\2" + _text("step") + b"K\1utR")
    manager = _global("pandas.core.internals.managers", "BlockManager") + b"((" + block + b"t](" + index + rows + b"etR"
    return _write_program(path, b"\x80\x04", _global("pandas", "DataFrame"), b")\x81}(", _text("_mgr"), manager, b"ub.")


def test_texts_that_pandas_3_stores_by_pyarrow_are_rebuilt_from_their_bytes(tmp_path):
    table = read_table(_pandas_3(tmp_path / "a.pkl", _arrow(["Car", "Fußgänger"])), ("label",))
    assert table["label"].tolist() == ["Car", "Fußgänger"]


@pytest.mark.parametrize("offsets", [[0, 3, 99], [0, 5, 3], [-8, 0, 3], [0]])
def test_offsets_of_texts_that_leave_their_buffer_are_refused(tmp_path, offsets):
    message = expect_error(read_table, _pandas_3(tmp_path / "a.pkl", _arrow(["Car", "Bus"], offsets)))
    assert not wrong_message(message)


def test_nothing_else_of_pyarrow_or_pandas_is_looked_up(tmp_path):
    for module, name in (("pyarrow.lib", "foreign_buffer"), ("pandas", "read_pickle"),
                         ("pandas.arrays", "IntervalArray")):
        path = _write_program(tmp_path / "a.pkl", b"\x80\x04", _global(module, name), b".")
        assert f"{module}" in expect_error(read_table, path)


def test_a_pickle_of_something_else_is_no_table(tmp_path):
    for value in ([1], {"a": 1}, np.arange(3), None, "x" * 1000):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(value))
        assert "table" in expect_error(read_table, tmp_path / "a.pkl")
    with pytest.raises(KiloError): read_table(tmp_path / "gone.pkl")
