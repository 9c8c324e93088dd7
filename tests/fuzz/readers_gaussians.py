"""Readers of gaussians in the formats of other programs: text PLY, SuperSplat's compressed PLY, .splat and .spz."""

import gzip
from pathlib import Path
from typing import Any

from kilonb.imaging.picture_folders import read_folder_picture
from kilonb.splats.formats import read_gaussians, write_compressed_ply, write_ply, write_splat, write_spz
from kilonb.splats.gaussians import Gaussians
from kilonb.splats.ply_tables import read_ply_tables
from tests.fuzz import validators as v
from tests.fuzz.engine import Reader
from tests.fuzz.readers_data import _gaussians, picture, saved


def _read(path: Path) -> Any: return read_gaussians(path, say=lambda note: None)


def _read_dropping(path: Path) -> Any: return read_gaussians(path, drop_bad=True, activated=True, say=lambda note: None)


def _text_ply(path: Path) -> None:
    write_ply(path, _gaussians(3, 1))
    table = read_ply_tables(path).tables["vertex"]
    head = ["ply", "format ascii 1.0", "element face 1", "property list uchar int i", "element vertex 3",
            *(f"property float {name}" for name in table.dtype.names), "end_header", "3 0 1 2"]
    rows = [" ".join(repr(value) for value in row) for row in table.tolist()]
    path.write_bytes("\n".join([*head, *rows, ""]).encode())


def _activated_ply(path: Path) -> None:
    raw = _gaussians(3, 4)
    write_ply(path, Gaussians(raw.means, raw.quats, raw.scales, raw.opacities, raw.sh))


def _with_lists(path: Path) -> None:
    write_ply(path, _gaussians(3, 4))
    head = b"binary_little_endian 1.0\nelement face 2\nproperty list uchar int i\nproperty uchar j\n"
    data = path.read_bytes().replace(b"binary_little_endian 1.0\n", head)
    start = data.index(b"end_header\n") + 11
    path.write_bytes(data[:start] + b"\2" + bytes(9) + b"\1" + bytes(5) + data[start:])


def _unzipped_spz(path: Path) -> Any:
    """The content is mutated, then gzipped, so that mutations reach what is behind the compression."""
    packed = path.with_name("packed.spz")
    packed.write_bytes(gzip.compress(path.read_bytes(), 1, mtime=0))
    return _read(packed)


def _spz_content(path: Path, version: int, terms: int) -> None:
    write_spz(path, _gaussians(4, terms), version)
    path.write_bytes(gzip.decompress(path.read_bytes()))


SPLATS = saved(lambda path: write_splat(path, _gaussians(4, 1)), suffix=".splat")
COMPRESSED = saved(*(lambda path, k=k: write_compressed_ply(path, _gaussians(5, k)) for k in (1, 16)))
READERS: list[Reader] = [
    Reader("ply_text", "text", saved(_text_ply), _read, v.wrong_gaussians, suffix=".ply"),
    Reader("ply_lists", "ply", saved(_with_lists), _read, v.wrong_gaussians, suffix=".ply"),
    Reader("ply_dropping", "ply", saved(_activated_ply), _read_dropping, v.wrong_gaussians,
           suffix=".ply"),
    Reader("ply_compressed", "ply", COMPRESSED, _read, v.wrong_gaussians, suffix=".ply"),
    Reader("splat", "bytes", SPLATS, _read, v.wrong_gaussians, suffix=".splat"),
    Reader("spz", "bytes", saved(lambda path: write_spz(path, _gaussians(4, 4))), _read, v.wrong_gaussians,
           suffix=".spz"),
    Reader("spz_content", "bytes",
           saved(*(lambda path, v=version, k=terms: _spz_content(path, v, k) for version, terms in ((2, 1), (3, 16)))),
           _unzipped_spz, v.wrong_gaussians),
    Reader("folder_picture", "png", saved(picture("RGBA", "PNG"), picture("P", "PNG"), picture("L", "PNG")),
           read_folder_picture, lambda found: v.wrong_numbers(found.rgb_premultiplied, "colours"), suffix=".png"),
]
