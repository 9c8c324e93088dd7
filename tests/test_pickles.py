"""A pickle from elsewhere gives data or a KiloError; its code is never executed."""
import os
import pickle

import numpy as np
import pytest

from kilonb.core.errors import KiloError
from kilonb.data.references import weights_folder
from kilonb.core.pickles import ARRAYS, NUMPY_ARRAYS, PLAIN_OBJECTS, list_globals, load_restricted, merge_permissions


class Shell:
    def __init__(self, command): self.command = command

    def __reduce__(self): return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_malicious_pickle_does_not_run(tmp_path, protocol):
    mark, path = tmp_path / "mark", tmp_path / "weights.ckpt"
    path.write_bytes(pickle.dumps({"Conv_0": [np.zeros(3), Shell(f"touch {mark}")]}, protocol=protocol))
    with pytest.raises(KiloError, match=r"system'") as caught: load_restricted(path)
    assert not mark.exists() and "\n" not in str(caught.value)
    pickle.loads(path.read_bytes())
    assert mark.exists(), "the same bytes attack a plain pickle.loads"


def test_no_permission_allows_code():
    """Permissions allow classes and functions that hold numbers; nothing that opens, imports, evaluates or fetches
    attributes."""
    names = {f"{module}.{name}" for module,
             items in merge_permissions(ARRAYS, NUMPY_ARRAYS, PLAIN_OBJECTS).items() for name in items}
    dangerous = {"eval", "exec", "getattr", "setattr", "open", "load", "loads", "__import__", "import_module", "system",
                 "compile", "type", "object"}
    assert not {name for name in names if name.rpartition(".")[2] in dangerous}


def test_a_stored_permission_is_not_a_prefix(tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(np.random.default_rng(0)))
    with pytest.raises(KiloError, match=r"numpy\.random"): load_restricted(path)


def test_the_installed_weights_open_and_name_arrays_only():
    folder = weights_folder("lpips", os.environ.get("KILONB_DATA"))
    if folder is None: pytest.skip("the weights are not installed: kilonb data get lpips")
    for name in ("alexnet", "vgg16"):
        assert set(list_globals((folder / f"{name}.ckpt").read_bytes())) == {
            "numpy:dtype",
            "numpy:ndarray",
            "numpy.core.multiarray:_reconstruct",
        }
    tree = load_restricted(folder / "alexnet.ckpt")
    kernel = tree["AlexNet_0"]["Conv_0"]["kernel"]
    assert kernel.shape == (11, 11, 3, 64) and kernel.dtype == np.float32
