"""Readers of the core: JSON and YAML documents, arrays, archives of arrays, pickles, values on the command line."""

import io
import math
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from kilonb.core.bounded import read_array, read_arrays
from kilonb.core.documents import read_json, read_yaml
from kilonb.core.pickles import ARRAYS, load_restricted, merge_permissions
from tests.fuzz.engine import Reader


def wrong_tree(value: Any) -> str:
    """What is wrong with plain values: a number that is not finite where JSON has none, a nesting over 64."""
    level, depth = [value], 0
    while level:
        if (depth := depth + 1) > 70:
            return "nested more than 64 deep"
        for one in level:
            if not isinstance(one, (dict, list, tuple, str, int, float, type(None))):
                return f"a {type(one).__name__}"
            if isinstance(one, float) and math.isnan(one):
                return "NaN"
        level = [
            inner
            for one in level
            if isinstance(one, (dict, list))
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
    return ""


def _wrong_array(array: Any) -> str:
    return "" if isinstance(array, np.ndarray) and not array.dtype.hasobject else f"a {type(array).__name__}"


def _wrong_arrays(arrays: dict) -> str:
    return next((wrong for one in arrays.values() if (wrong := _wrong_array(one))), "")


def _wrong_pickle(value: Any) -> str:
    """Only plain values and arrays of plain types come out of a pickle."""
    todo, plain = [value], (str, bytes, bytearray, int, float, complex, bool, type(None), slice, np.generic)
    while todo:
        one = todo.pop()
        if isinstance(one, np.ndarray):
            if one.dtype.hasobject:
                todo.extend(one.ravel().tolist())
        elif isinstance(one, dict):
            todo.extend(one.values())
        elif isinstance(one, (list, tuple, set, frozenset)):
            todo.extend(one)
        elif isinstance(one, np.dtype):
            pass
        elif not isinstance(one, plain):
            return f"a {type(one).__name__}"
    return ""


def _arrays(folder: Path) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [
        generator.normal(size=(4, 3)).astype(np.float32),
        np.arange(7),
        np.array(["a", "bc"]),
        np.zeros((2, 0), np.uint8),
    ]


def _npy_seeds(folder: Path) -> list[bytes]:
    seeds = []
    for array in _arrays(folder):
        np.save(buffer := io.BytesIO(), array)
        seeds.append(buffer.getvalue())
    return seeds


def _npz_seeds(folder: Path) -> list[bytes]:
    seeds = []
    for save in (np.savez, np.savez_compressed):
        save(buffer := io.BytesIO(), **{f"a{i}": array for i, array in enumerate(_arrays(folder))})
        seeds.append(buffer.getvalue())
    return seeds


def _pickle_seeds(folder: Path) -> list[bytes]:
    tree = {
        "kernel": np.arange(12.0).reshape(3, 4),
        "step": np.int64(7),
        "names": np.array(["a", None, 2.5], object),
        "tags": {"a", "b"},
        "order": OrderedDict(x=1),
        "swapped": np.arange(3, dtype=">i4"),
        "slice": slice(0, 3, 1),
    }
    return [pickle.dumps(tree, protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]


_OLD = merge_permissions(ARRAYS, {"__builtin__": ("set", "slice")})


def _read_pickle(path: Path) -> Any:
    """With the names that Python 2 gave the built-in types, which protocols 0 to 2 write."""
    return load_restricted(path, _OLD, {"__builtin__": "builtins"})


_DOCUMENT = (
    '{"name": "brickyard", "size": [400, 300], "views": [{"pose": [1.0, 0.0, -2.5e-3], "file": "r_0.png"}], '
    '"done": true, "note": null}'
)
_YAML = (
    "experiment: students\ngrid: {kind: [kilonerf, mlp], rate: [1.0e-3, 0.01]}\nseeds: 2\nshared: &s {a: 1}\n"
    "more: {<<: *s, b: [x, 'y']}\nwhen: 2026-01-31\n"
)

READERS = [
    Reader("json", "json", lambda folder: [_DOCUMENT.encode()], read_json, wrong_tree),
    Reader("yaml", "yaml", lambda folder: [_YAML.encode()], read_yaml),
    Reader("npy", "npy", _npy_seeds, read_array, _wrong_array),
    Reader("npz", "npz", _npz_seeds, read_arrays, _wrong_arrays),
    Reader("pickle", "pickle", _pickle_seeds, _read_pickle, _wrong_pickle),
]
