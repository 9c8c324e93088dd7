"""Files of an earlier version: compiled functions are removed, checkpoints resume or are refused in one sentence."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kilonb
from kilonb.core.errors import KiloError
from kilonb.fields.hashgrid import HashGridConfig, HashGridField
from kilonb.scenes.blender import load_blender
from kilonb.scenes.brickyard import write_brickyard
from kilonb.splats.fit import fit_gaussians
from kilonb.splats.fit_config import FitConfig
from kilonb.training.checkpoints import latest_path, read_checkpoint
from kilonb.training.loop import LoopConfig, train
from helpers import StopAt

VERSION = """
import sys
from pathlib import Path
package = Path(__file__).parent
sys.path.insert(0, {repository!r})
from kilonb.core.caches import remove_stale_functions
remove_stale_functions(package, {version!r})
"""
TAKES_A_TYPE = """
import numba
import numpy as np
from numba import njit
from {package}.{kind} import Pair
@njit(cache=True)
def total(pair): return pair.a + pair.b
def call(): return total(Pair(1, 2))
"""
PAIR = "from typing import NamedTuple\nclass Pair(NamedTuple):\n    a: int\n    b: int\n"


def call_in_new_process(folder):
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    command = "import package.part.kernels as kernels; print(kernels.call())"
    return subprocess.run([sys.executable, "-c", command], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("cleaned", [False, True])
def test_compiled_functions_of_a_version_with_other_modules_are_not_read(tmp_path, cleaned):
    part = tmp_path / "package" / "part"
    part.mkdir(parents=True)
    (part / "__init__.py").touch()
    repository = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    def install(version, kind):
        text = VERSION.format(repository=repository, version=version) if cleaned else ""
        (tmp_path / "package" / "__init__.py").write_text(text)
        (part / f"{kind}.py").write_text(PAIR)
        (part / "kernels.py").write_text(TAKES_A_TYPE.format(package="package.part", kind=kind))

    install("1", "pairs")
    assert call_in_new_process(tmp_path).stdout == "3\n"
    (part / "pairs.py").unlink()
    install("2", "couples")
    second = call_in_new_process(tmp_path)
    if cleaned: assert second.stdout == "3\n", second.stderr
    else: assert "ModuleNotFoundError" in second.stderr, "numba reads such an index without harm now: drop the removal"


def test_the_package_removes_compiled_functions_at_import():
    source = Path(kilonb.__file__).read_text(encoding="utf-8")
    assert source.index("remove_stale_functions(") > source.index("__version__ =")


def test_a_checkpoint_of_a_hash_grid_with_one_rate_for_all_is_refused_in_one_sentence(tmp_path):
    box = torch.tensor([[-1.0, -1, -1], [1, 1, 1]])
    field = HashGridField(box, HashGridConfig(levels=2, log2_table=6))
    def step(number, generator): return {"loss": field(torch.zeros(4, 3), torch.ones(4, 3))[0].square().sum()}
    config = LoopConfig(4, warmup_steps=0)
    train(step, torch.optim.Adam(field.parameters(), 1e-3), config, model=field, folder=tmp_path, quiet=True)
    assert latest_path(tmp_path).exists()
    with pytest.raises(KiloError, match="resume with the same model and optimiser") as error:
        train(step, torch.optim.Adam(field.parameter_groups(1e-3)), config, model=field, folder=tmp_path, resume=True,
              quiet=True)
    assert "\n" not in str(error.value) and len(str(error.value)) <= 400


def test_a_fit_of_gaussians_from_0_2_resumes_with_its_harmonics_joined(tmp_path):
    """Until 0.2 the constant of the harmonics and the others were two parameters of a checkpoint."""
    write_brickyard(tmp_path / "scene", width=48, height=48, train=6, test=1, count=4_000)
    scene, config = load_blender(tmp_path / "scene"), FitConfig(steps=30, initial_count=300, maximum_count=400)
    with pytest.raises(KeyboardInterrupt), StopAt(12): fit_gaussians(scene, config, tmp_path / "run", quiet=True)
    shutil.copytree(tmp_path / "run", tmp_path / "former")
    path = latest_path(tmp_path / "former")
    content = read_checkpoint(path)
    values = content["stateful"]["teacher"]["parameters"]
    harmonics = values.pop("sh")
    values |= {"sh0": harmonics[:, :1], "sh_rest": harmonics[:, 1:]}
    saved = content["optimizer"]
    last, moments = saved["param_groups"].pop(), saved["state"].pop(4)
    for number, name, part in ((4, "sh0", slice(0, 1)), (5, "sh_rest", slice(1, None))):
        group = {key: value for key, value in last.items() if key != "columns"}
        saved["param_groups"].append({**group, "name": name, "params": [number]})
        saved["state"][number] = {key: value[:, part] if key.startswith("exp_avg") else value
                                  for key, value in moments.items()}
    for group in saved["param_groups"]: group.pop("columns", None)
    torch.save(content, path)
    results = [fit_gaussians(scene, config, tmp_path / name, resume=True, quiet=True) for name in ("run", "former")]
    assert [result.resumed_from for result in results] == [12, 12]
    for name, tensor in results[0].gaussians.parameters().items():
        assert torch.equal(tensor, results[1].gaussians.parameters()[name]), name
