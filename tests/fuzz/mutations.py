"""Mutations of files: bytes, text, JSON and YAML trees, arrays, pickles, pictures, point clouds, archives, tables.

Every family changes the structure that its readers look at (a number becomes NaN, a shape a terabyte, a key
disappears), and sometimes only bytes. `mutate` is deterministic: all its choices come from the generator it is given.
"""

import copy
import gzip
import io
import json
import pickletools
import random
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any

NUMBERS = (
    "nan",
    "NaN",
    "inf",
    "-inf",
    "Infinity",
    "1e999",
    "-1",
    "0",
    "-0.0",
    "1e30",
    "1e308",
    "-1e308",
    "2147483648",
    "4294967296",
    "9223372036854775808",
    "1" * 30,
    "1" * 5000,
    "0x7f",
    "1e-320",
    "1.5",
    "true",
    "null",
    '"1"',
    "''",
    "[]",
    "{}",
    "1_000",
    "١",
    "--1",
    "+",
    "1:30:00",
    "2001-99-99",
)
TEXTS = (
    "",
    "\0",
    "../../etc/passwd",
    "/etc/passwd",
    "a\nb",
    "\x1b[2J",
    "<script>alert(1)</script>",
    "%s%n",
    "{0}",
    "x" * 5000,
    "\ud800".encode("utf-8", "surrogatepass").decode("utf-8", "replace"),
    "ü",
    "\u202e",
    "nan",
    "~nosuchuser/x",
    "con",
    "os:system",
    "kilonb.core.files:write_json",
    "-rf",
    "a b",
    "'",
    '"',
    "$HOME",
    "*",
    "#",
    "None",
)
INTS = (
    0,
    1,
    2,
    127,
    128,
    255,
    256,
    32767,
    65535,
    65536,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**40,
    2**62,
    2**63 - 1,
    2**64 - 1,
)
FLOATS = (
    float("nan"),
    float("inf"),
    float("-inf"),
    0.0,
    -0.0,
    -1.0,
    1e30,
    1e38,
    1e300,
    -1e300,
    5e-324,
    1e-30,
    1.0,
    0.5,
)
VALUES: tuple = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2**31,
    2**63,
    10**30,
    10**400,
    0.0,
    -1.5,
    float("nan"),
    float("inf"),
    float("-inf"),
    1e300,
    "",
    "nan",
    "x",
    "1",
    "x" * 3000,
    "../x",
    "\0",
    [],
    {},
    [1],
    [[]],
    {"a": 1},
    [None],
    [float("nan")] * 3,
)


def _bytes(data: bytes, rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    if not data:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(40)))
    at, length = rng.randrange(len(data)), min(len(data), 1 << rng.randrange(9))
    kind = rng.randrange(11)
    if kind == 0:
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + bytes([rng.choice((0, 255, 0x80, 0x7F, rng.randrange(256)))]) + data[at + 1 :]
    if kind == 2:
        return data[:at]
    if kind == 3:
        return data[:at] + data[at + length :]
    if kind == 4:
        return data[:at] + data[at : at + length] * rng.choice((2, 3, 50)) + data[at + length :]
    if kind == 5:
        return data[:at] + bytes(rng.randrange(256) for _ in range(length)) + data[at:]
    if kind == 6:
        return data[:at] + bytes(rng.randrange(256) for _ in range(length)) + data[at + length :]
    if kind == 7:
        width = rng.choice((1, 2, 4, 8))
        number = rng.choice(INTS) % (1 << 8 * width)
        return data[:at] + number.to_bytes(width, rng.choice(("little", "big"))) + data[at + width :]
    if kind == 8:
        code = rng.choice(("<f", "<d", ">f"))
        number = rng.choice(FLOATS)
        with_width = struct.pack(code, number if abs(number) < 3e38 or number != number or "d" in code else 3e38)
        return data[:at] + with_width + data[at + len(with_width) :]
    if kind == 9:
        other = rng.choice(seeds) or b"\0"
        start = rng.randrange(len(other))
        return data[:at] + other[start : start + rng.randrange(1, 200)] + data[at:]
    return data[len(data) // 2 :] + data[: len(data) // 2] if rng.random() < 0.3 else data + data[:at]


_NUMBER = re.compile(r"-?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?")
_WORD = re.compile(r"[A-Za-z_][A-Za-z_0-9./-]*")


def _replace(text: str, pattern: re.Pattern, new: str, rng: random.Random) -> str:
    found = list(pattern.finditer(text[:200_000]))
    if not found:
        return text + new
    one = rng.choice(found)
    return text[: one.start()] + new + text[one.end() :]


def _text(data: bytes, rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    text = data.decode("utf-8", "replace")
    lines = text.split("\n")
    at, kind = rng.randrange(len(lines)), rng.randrange(12)
    if kind <= 3:
        text = _replace(text, _NUMBER, rng.choice(NUMBERS), rng)
    elif kind == 4:
        text = _replace(text, _WORD, rng.choice(TEXTS), rng)
    elif kind == 5:
        text = "\n".join(lines[:at] + lines[at + 1 :])
    elif kind == 6:
        times = min(rng.choice((2, 2, 3000)), 1 + 4_000_000 // (1 + len(lines[at])))
        text = "\n".join(lines[:at] + [lines[at]] * times + lines[at + 1 :])
    elif kind == 7:
        text = "\n".join([*lines[:at], rng.choice(lines), *lines[at:]])
    elif kind == 8:
        depth, pair = rng.choice((10, 70, 3000, 100_000)), rng.choice(("[]", "{}", "()", '{"a":'))
        text = "\n".join([*lines[:at], pair[0] * depth if len(pair) == 2 else pair * min(depth, 3000), *lines[at:]])
    elif kind == 9:
        text = "\n".join(
            [*lines[:at], lines[at] + rng.choice((": &a [*a]", ",", ":", "\t", " " * 3000, "\r")), *lines[at + 1 :]]
        )
    elif kind == 10:
        return _bytes(data, rng, seeds)
    else:
        text = text[: rng.randrange(len(text) + 1)]
    return text.encode("utf-8", "surrogatepass")


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in nested lists and dicts; large ones are sampled."""
    found, todo = [], [tree]
    while todo and len(found) < 20_000:
        one = todo.pop()
        for key in (list(one) if isinstance(one, dict) else range(len(one))) if isinstance(one, (dict, list)) else ():
            found.append((one, key))
            if isinstance(one[key], (dict, list)):
                todo.append(one[key])
    return found


def _change_tree(tree: Any, rng: random.Random) -> Any:
    """One value of a tree replaced, removed, repeated, renamed or exchanged with another."""
    places = _places(tree)
    if not places:
        return rng.choice(VALUES)
    container, key = rng.choice(places)
    kind = rng.randrange(10) if len(places) < 5_000 else rng.randrange(6)  # a large tree does not grow
    if kind <= 4:
        container[key] = _near(container[key], rng)
    elif kind == 5:
        del container[key]
    elif kind == 6 and isinstance(container, list):
        room = 50_000 // (1 + len(_places([container[key]])))
        container.extend([container[key]] * min(rng.choice((1, 2, 1000)), room))
    elif kind == 6:
        container[rng.choice(TEXTS)] = container[key]
    elif kind == 7:
        other, place = rng.choice(places)
        container[key] = copy.deepcopy(other[place])
    elif kind == 8 and isinstance(container[key], list):
        container[key] = container[key][: rng.randrange(len(container[key]) + 1)]
    elif kind == 8:
        container[key] = [container[key]]
    else:
        container[key] = _nested(rng.choice((70, 900)))
    return tree


def _near(value: Any, rng: random.Random) -> Any:
    """Another value in place of this one: half of the time of the same type."""
    if rng.random() < 0.5:
        return rng.choice(VALUES)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((*INTS, -1, -value, value + 1, value * 1000))
    if isinstance(value, float):
        return rng.choice((*FLOATS, -value, value * 1e6))
    return rng.choice(TEXTS) if isinstance(value, str) else rng.choice(VALUES)


def _nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def _tree(load: Callable[[str], Any], dump: Callable[[Any], str]) -> Callable:
    def change(data: bytes, rng: random.Random, seeds: Sequence[bytes]) -> bytes:
        if rng.random() < 0.3:
            return _text(data, rng, seeds)
        try:
            tree = load(data.decode())
        except Exception:
            return _text(data, rng, seeds)
        for _ in range(rng.choice((1, 1, 2, 4))):
            tree = _change_tree(tree, rng)
        try:
            return dump(tree).encode("utf-8", "surrogatepass")
        except (ValueError, RecursionError):
            return _text(data, rng, seeds)

    return change


def _load_yaml(text: str) -> Any:
    """By PyYAML's Python parser: libyaml's overflows the stack for what is nested deep."""
    import yaml

    return yaml.safe_load(text)


def _dump_yaml(value: Any) -> str:
    import yaml

    return yaml.safe_dump(value, allow_unicode=True)


def _change_array(array: Any, rng: random.Random) -> Any:
    """An array with another value, type or shape."""
    import numpy as np

    kind = rng.randrange(8)
    if kind <= 3 and array.size and array.dtype.kind in "fiu":
        array = array.copy()
        with np.errstate(all="ignore"):
            new = rng.choice(FLOATS) if array.dtype.kind == "f" else rng.choice((0, 1, -1, 2**31 - 1, 255))
            array.flat[rng.randrange(array.size)] = np.array(new).astype(array.dtype)
        return array
    if kind == 4:
        with np.errstate(all="ignore"):
            try:
                return array.astype(rng.choice(("<f4", "<f8", "|u1", "<i8", "<U3", "?", "<c16", "<f2")))
            except (ValueError, TypeError):
                return array
    if kind == 5:
        return array[..., None] if rng.random() < 0.5 else array.reshape(-1)
    if kind == 6 and array.ndim:
        return array[: rng.randrange(array.shape[0] + 1)]
    return np.concatenate([array, array]) if array.ndim else np.zeros((0,), array.dtype)


def _save_array(array: Any, rng: random.Random) -> bytes:
    """A .npy file; sometimes with a forged header."""
    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, array)
    data = buffer.getvalue()
    if rng.random() < 0.2:
        old = re.search(rb"'shape': (\([^)]*\))", data[:200])
        if old:
            new = rng.choice((b"(4611686018427387904,)", b"(-1,)", b"(1e9,)", b"(1048576,1048576)", b"()", b"(True,)"))
            header = data[10 : data.index(b"\n") + 1].replace(old[1], new).rstrip() + b"\n"
            data = data[:8] + struct.pack("<H", len(header)) + header + data[data.index(b"\n") + 1 :]
    return data.replace(b"'<f4'", b"'|O'  ", 1) if rng.random() < 0.05 else data


def _npy(data: bytes, rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    import numpy as np

    if rng.random() < 0.3:
        return _bytes(data, rng, seeds)
    try:
        return _save_array(_change_array(np.load(io.BytesIO(data), allow_pickle=False), rng), rng)
    except Exception:
        return _bytes(data, rng, seeds)


def _npz(data: bytes, rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    import numpy as np

    if rng.random() < 0.25:
        return _zip(data, rng, seeds)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as packed:
            arrays = {name: packed[name] for name in packed.files}
    except Exception:
        return _bytes(data, rng, seeds)
    name = rng.choice(sorted(arrays))
    kind = rng.randrange(8)
    if kind == 0:
        del arrays[name]
    elif kind == 1:
        arrays[rng.choice(TEXTS[3:]).replace("/", "_")[:50] or "x"] = arrays.pop(name)
    elif kind == 2:
        arrays[name] = arrays[rng.choice(sorted(arrays))]
    else:
        arrays[name] = _change_array(arrays[name], rng)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, array in arrays.items():
            archive.writestr(f"{key}.npy", _save_array(array, rng))
    return buffer.getvalue()


def _zip(data: bytes, rng: random.Random, seeds: Sequence[bytes], inner: Callable = _bytes) -> bytes:
    """A zip archive with a changed member, a renamed, missing or doubled one, or changed bytes."""
    if rng.random() < 0.35:
        return _bytes(data, rng, seeds)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(one.filename, archive.read(one), one.compress_type) for one in archive.infolist()]
    except Exception:
        return _bytes(data, rng, seeds)
    at, kind = rng.randrange(len(members)), rng.randrange(6)
    name, content, method = members[at]
    if kind <= 2:
        members[at] = name, inner(content, rng, [content]), method
    elif kind == 3:
        members[at] = rng.choice(TEXTS[2:10]).replace("\0", "0"), content, method
    elif kind == 4:
        del members[at]
    else:
        members.append((name, b"\0" * rng.choice((0, 10, 10**7)), zipfile.ZIP_DEFLATED))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content, method in members:
            archive.writestr(zipfile.ZipInfo(name), content, method)
    packed = buffer.getvalue()
    if rng.random() < 0.15 and (place := packed.rfind(b"PK\1\2")) >= 0:
        packed = packed[: place + 24] + struct.pack("<I", rng.choice(INTS) % 2**32) + packed[place + 28 :]
    return packed


def _checkpoint(data: bytes, rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """torch's archives: a pickle beside the storages of tensors."""
    return _zip(
        data,
        rng,
        seeds,
        lambda content, rng, seeds: (_pickle if content[:1] == b"\x80" else _bytes)(content, rng, seeds),
    )


_GLOBALS = (
    (b"os", b"system"),
    (b"builtins", b"eval"),
    (b"numpy", b"dtype"),
    (b"numpy", b"ndarray"),
    (b"builtins", b"bytearray"),
    (b"numpy._core.multiarray", b"scalar"),
    (b"numpy._core.numeric", b"_frombuffer"),
    (b"collections", b"OrderedDict"),
    (b"_codecs", b"encode"),
    (b"builtins", b"set"),
    (b"numpy._core.multiarray", b"_reconstruct"),
    (b"copyreg", b"_reconstructor"),
)
_SNIPPETS = (
    b"N",
    b"0",
    b"(",
    b"t",
    b"R",
    b"b",
    b"]",
    b"}",
    b")",
    b"\x8f",
    b"2",
    b"\x94",
    b"h\0",
    b"a",
    b"e",
    b"s",
    b"u",
    b"\x90",
    b"\x81",
    b"\x92",
    b"Q",
    b"\x82\x01",
    b"\x97",
    b"\x98",
    b"j\0\0\0\x7f",
    b"r\0\0\0\x7f",
    b"K\x3f",
    b"J\xff\xff\xff\xff",
    b"o",
    b"1",
    b"\x91",
    b"\x96\0\0\0\0\1\0\0\0",
    b"\x8e\0\0\0\0\0\1\0\0",
    b"\x8a\xff",
    b"\x93",
    b"I01\n",
    b"L99999999999999999999L\n",
    b"F nan\n",
)


def _pickle(data: bytes, rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """A pickle with an instruction removed, doubled, exchanged, inserted, or with another argument or global."""
    if rng.random() < 0.2:
        return _bytes(data, rng, seeds)
    try:
        starts = [place for _, _, place in pickletools.genops(data)]
    except Exception:
        return _bytes(data, rng, seeds)
    parts = [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)])]
    at, kind = rng.randrange(len(parts)), rng.randrange(8)
    if kind == 0:
        del parts[at]
    elif kind == 1:
        parts.insert(at, parts[at])
    elif kind == 2:
        other = rng.randrange(len(parts))
        parts[at], parts[other] = parts[other], parts[at]
    elif kind == 3:
        parts.insert(at, rng.choice(_SNIPPETS))
    elif kind == 4:
        parts[at] = rng.choice(_SNIPPETS)
    elif kind == 5:
        module, name = rng.choice(_GLOBALS)
        parts[at] = b"c" + module + b"\n" + name + b"\n"
    elif kind == 6:
        parts[at] = parts[at][:1] + _bytes(parts[at][1:], rng, seeds)
    else:
        parts.insert(at, rng.choice(parts))
    return b"".join(parts)


def _png(data: bytes, rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """A PNG with changed chunks whose checksums are right."""
    if rng.random() < 0.3 or data[:8] != b"\x89PNG\r\n\x1a\n":
        return _bytes(data, rng, seeds)
    chunks, at = [], 8
    while at + 12 <= len(data):
        length = struct.unpack(">I", data[at : at + 4])[0]
        chunks.append([data[at + 4 : at + 8], data[at + 8 : at + 8 + length]])
        at += 12 + length
    which, kind = rng.randrange(len(chunks)), rng.randrange(7)
    if kind <= 1:
        header = bytearray(chunks[0][1])
        place = rng.choice((0, 4))
        header[place : place + 4] = struct.pack(">I", rng.choice(INTS) % 2**32)
        chunks[0][1] = bytes(header)
    elif kind == 2:
        chunks[0][1] = chunks[0][1][:8] + bytes(rng.choice((0, 1, 2, 3, 4, 6, 8, 16, 255)) for _ in range(5))
    elif kind == 3:
        del chunks[which]
    elif kind == 4:
        chunks.insert(which, list(rng.choice(chunks)))
    elif kind == 5:
        chunks[which][1] = _bytes(chunks[which][1], rng, seeds)
    else:
        chunks.insert(
            1,
            [
                rng.choice((b"tRNS", b"gAMA", b"iCCP", b"zTXt", b"eXIf", b"acTL", b"PLTE")),
                rng.choice((b"", b"\0" * 6, b"a\0\0" + zlib.compress(b"\0" * 10**7))),
            ],
        )
    packed = b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )
    return data[:8] + packed


def _header(end: bytes) -> Callable:
    """Files of a text header that ends with `end`, and numbers after it."""

    def change(data: bytes, rng: random.Random, seeds: Sequence[bytes]) -> bytes:
        place = data.find(end)
        if place < 0:
            return _text(data, rng, seeds)
        place += len(end)
        if rng.random() < 0.6:
            return _text(data[:place], rng, seeds) + data[place:]
        body = data[place:]
        if rng.random() < 0.6 and len(body) >= 4:
            at = 4 * rng.randrange(len(body) // 4)
            number = rng.choice(FLOATS)
            body = (
                body[:at]
                + struct.pack("<f", number if abs(number) < 3e38 or number != number else 3e38)
                + body[at + 4 :]
            )
            return data[:place] + body
        return data[:place] + _bytes(body, rng, seeds)

    return change


def _tar(data: bytes, rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """A tar archive, gzipped or not, with a changed, renamed, linked, missing or doubled member."""
    packed = data[:2] == b"\x1f\x8b"
    if rng.random() < 0.3:
        return _bytes(data, rng, seeds)
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            members = [(one, archive.extractfile(one).read() if one.isfile() else b"") for one in archive.getmembers()]
    except Exception:
        return _bytes(data, rng, seeds)
    at, kind = rng.randrange(len(members)), rng.randrange(8)
    member, content = members[at]
    if kind == 0:
        del members[at]
    elif kind == 1:
        members.append(members[at])
    elif kind == 2:
        member.name = rng.choice(TEXTS[2:]).replace("\0", "0")
    elif kind == 3:
        member.type, member.linkname = (
            rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE)),
            rng.choice(("/etc/passwd", "../x", "x")),
        )
    elif kind == 4:
        member.type = rng.choice((tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, b"Z"))
    elif kind == 5 and content[:1] in b"{[":
        members[at] = member, FAMILIES["json"](content, rng, [content])
    else:
        members[at] = member, _bytes(content, rng, [content])
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for member, content in members:
            member.size = len(content) if member.isfile() else 0
            archive.addfile(member, io.BytesIO(content))
    data = buffer.getvalue()
    if rng.random() < 0.15:
        data = _bytes(data, rng, seeds)
    return gzip.compress(data, 1, mtime=0) if packed else data


def _feather(data: bytes, rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """An Arrow file with a column changed, of another type, renamed or missing."""
    import numpy as np
    import pyarrow as pa
    from pyarrow import ipc

    if rng.random() < 0.35:
        return _bytes(data, rng, seeds)
    try:
        table = ipc.open_file(io.BytesIO(data)).read_all()
    except Exception:
        return _bytes(data, rng, seeds)
    columns = {name: table[name] for name in table.column_names}
    name, kind = rng.choice(sorted(columns)), rng.randrange(6)
    if kind == 0:
        del columns[name]
    elif kind == 1:
        columns[rng.choice(TEXTS[3:10])] = columns.pop(name)
    else:
        try:
            values = np.asarray(columns[name].to_pylist())
            values = _change_array(values, rng) if kind > 2 else np.asarray([rng.choice(VALUES[:9])] * table.num_rows)
            columns[name] = pa.array(values.tolist()[: table.num_rows] + [None] * (table.num_rows - len(values)))
        except Exception:
            return _bytes(data, rng, seeds)
    buffer = io.BytesIO()
    try:
        made = pa.table(columns)
        with ipc.new_file(buffer, made.schema) as file:
            file.write_table(made)
    except Exception:
        return _bytes(data, rng, seeds)
    return buffer.getvalue()


def _hdf5(data: bytes, rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """An HDF5 file with a dataset or an attribute changed, of another type or shape, renamed or missing."""
    import h5py
    import numpy as np

    if rng.random() < 0.4:
        return _bytes(data, rng, seeds)
    buffer = io.BytesIO(data)
    try:
        with h5py.File(buffer, "r+") as file:
            names: list[str] = []
            file.visit(names.append)
            attributes, name, kind = sorted(file.attrs), rng.choice(names) if names else "", rng.randrange(6)
            if kind == 0 and attributes:
                del file.attrs[rng.choice(attributes)]
            elif kind <= 2 and attributes:
                new = rng.choice(("", "x", 0, -1, float("nan"), "{" * 500, np.zeros(3), 10**12, "[1,2]"))
                file.attrs[rng.choice(attributes)] = new
            elif name and kind == 3:
                del file[name]
            elif name and isinstance(file[name], h5py.Dataset):
                values = file[name][()]
                del file[name]
                if rng.random() < 0.1:
                    file.create_dataset(name, shape=(10**7, 10**7), dtype="f4", chunks=(10, 10))
                else:
                    file[name] = _change_array(np.asarray(values), rng)
    except Exception:
        return _bytes(data, rng, seeds)
    return buffer.getvalue()


FAMILIES: dict[str, Callable[[bytes, random.Random, Sequence[bytes]], bytes]] = {
    "bytes": _bytes,
    "text": _text,
    "csv": _text,
    "json": _tree(json.loads, json.dumps),
    "yaml": _tree(_load_yaml, _dump_yaml),
    "npy": _npy,
    "npz": _npz,
    "zip": _zip,
    "checkpoint": _checkpoint,
    "pickle": _pickle,
    "png": _png,
    "ply": _header(b"end_header\n"),
    "pcd": _header(b"DATA ascii\n"),
    "tar": _tar,
    "feather": _feather,
    "hdf5": _hdf5,
    "h5": _hdf5,
}


def mutate(kind: str, data: bytes, rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """`data` after one to four mutations of its family; what is gzipped is mostly changed inside."""
    if data[:2] == b"\x1f\x8b" and kind != "tar" and rng.random() < 0.75:
        inner = [gzip.decompress(one) if one[:2] == b"\x1f\x8b" else one for one in seeds]
        return gzip.compress(mutate(kind, gzip.decompress(data), rng, inner), 1, mtime=0)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        try:
            data = FAMILIES[kind](data, rng, seeds)
        except Exception:
            data = _bytes(data, rng, seeds)  # what an earlier mutation made cannot be taken apart again
    return data
