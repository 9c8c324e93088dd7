"""Packaging: public names, requirements, make, assets, README.md, files made from notebooks, kept results of runs."""
import ast
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import kilonb
from kilonb.scenes.boxtown import make_pandaset
from kilonb.core.errors import KiloError

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tool(name: str):
    """A script of tools/ as a module."""
    sys.path.insert(0, str(ROOT / "tools"))
    try: return importlib.import_module(name)
    finally: sys.path.remove(str(ROOT / "tools"))


def settings() -> dict[str, str]:
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def requirements(*keys: str) -> list[Requirement]:
    listed = [Requirement(text) for key in keys for text in settings()[key].split()]
    return [requirement for requirement in listed if requirement.marker is None or requirement.marker.evaluate()]


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.!]+", line) for line in lines)
    return dict(line.split("==") for line in lines)


# --- public names

@pytest.mark.parametrize("name", kilonb.__all__)
def test_every_public_name_resolves(name):
    value = getattr(kilonb, name)
    assert name in dir(kilonb) and getattr(value, "__module__", "kilonb").startswith("kilonb")


def test_packages_and_modules_are_imported_on_first_use():
    code = ("import kilonb, sys\nassert 'kilonb.splats.rasterizer' not in sys.modules\n"
            "assert kilonb.splats.rasterizer.rasterize is kilonb.rasterize and 'rasterizer' in dir(kilonb.splats)\n"
            "assert not hasattr(kilonb.splats, 'nothing') and not hasattr(kilonb, 'nothing')\n"
            "from kilonb import Gaussians\nassert Gaussians is kilonb.splats.gaussians.Gaussians")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_kilonb_takes_under_100_ms_and_imports_nothing_heavy():
    """Modules are imported when they are used. The least of five times, because the machine may be busy."""
    code = ("import time\nstart = time.perf_counter()\nimport kilonb\ntook = time.perf_counter() - start\nimport sys\n"
            "print(took, *sorted({'torch', 'numpy', 'numba', 'yaml'} & set(sys.modules)))")
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
            for _ in range(5)]
    assert all(run[1:] == [] for run in runs) and min(float(run[0]) for run in runs) < 0.1


def test_the_version_is_written_once():
    assert kilonb.__version__ == settings()["version"] == importlib.metadata.version("kilonb")


# --- installing

def test_every_requirement_and_what_it_brings_is_pinned():
    """With an unpinned package two fresh clones could differ. CUDA's own packages come with torch's CUDA build and are
    pinned by it."""
    pinned, todo, seen = pins(), [*requirements("requirements", "dev_requirements"), Requirement("setuptools")], set()
    while todo:
        requirement = todo.pop()
        if (key := (canonicalize_name(requirement.name), frozenset(requirement.extras))) in seen: continue
        seen.add(key)
        if re.match(r"nvidia-|cuda-|triton$", key[0]): continue
        assert key[0] in pinned, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(pinned[key[0]], prereleases=True)
        for text in importlib.metadata.requires(key[0]) or []:
            brought = Requirement(text)
            if brought.marker is None or any(brought.marker.evaluate({"extra": extra}) for extra in ("", *key[1])):
                todo.append(brought)
    assert pinned["torch"] == "2.13.0" and "spconv" not in pinned
    if sys.version_info[:2] == (3, 11):
        assert set(pinned) - {name for name, _ in seen} <= {"wheel"}, "constraints.txt pins an unneeded package"


def test_requirements_are_what_the_package_imports():
    """Every imported package is a requirement of its own, and every requirement is imported or a fixed choice."""
    sources = [path for path in (ROOT / "kilonb").rglob("*.py")]
    trees = [node for path in sources for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    modules = {alias.name for node in trees if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in trees if isinstance(node, ast.ImportFrom) and not node.level}
    optional = {requirement.name for requirement in requirements("trackio_requirements")}
    optional |= {"triton"}                         # comes with torch's CUDA build
    outside = {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names) - {"kilonb"} - optional
    owners = importlib.metadata.packages_distributions()
    required = {canonicalize_name(requirement.name) for requirement in requirements("requirements")}
    imported = {canonicalize_name(owners[module][0]) for module in outside}
    assert imported - {"llvmlite"} <= required, "only llvmlite may be imported as a dependency of another (numba)"
    fixed = {"jupyterlab", "ipykernel", "ipywidgets", "anywidget", "matplotlib", "spconv-cu118", "tensorboard"}
    assert required - imported <= fixed


def make(folder: Path, *arguments: str, python: str = "./fake-python") -> subprocess.CompletedProcess:
    environment = {name: value for name,
                   value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(["make", f"PYTHON={python}", *arguments], cwd=folder, capture_output=True, text=True,
                          env=environment)


@pytest.fixture
def checkout(tmp_path):
    """A folder that `make` takes for a checkout, with an interpreter that writes its arguments to `calls` and fails
    where a file `broken` exists."""
    for name in ("Makefile", "constraints.txt", "settings.ini", "setup.py"): shutil.copy(ROOT / name, tmp_path)
    fake = tmp_path / "fake-python"
    fake.write_text(
        '#!/bin/sh\necho "$*" >>calls\ncase "$*" in\n  *version_info*) [ ! -e old ];;\n'
        '  *python_version*) echo 3.9.2;;\n'
        '  *venv*) mkdir -p .venv/bin && cp fake-python .venv/bin/python;;\n'
        '  *pip*) echo "Collecting a"; [ ! -e broken ];;\nesac\n'
    )
    fake.chmod(0o755)
    return tmp_path


def calls(folder: Path) -> list[str]:
    """Which of `-m venv` and `-m pip install` the interpreter was called with since the last time."""
    lines = (folder / "calls").read_text().splitlines()
    (folder / "calls").unlink()
    return ["venv" if "-m venv" in line else "pip" for line in lines if "-m venv" in line or "-m pip install" in line]


def test_an_incomplete_environment_is_completed_by_the_next_make(checkout):
    (checkout / "broken").touch()
    failed = make(checkout, ".venv/.complete")
    assert (
        failed.returncode
        and not (checkout / ".venv/.complete").exists()
        and "install.log" in failed.stdout
        and calls(checkout) == ["venv", "pip"]
    )
    (checkout / "broken").unlink()
    assert make(checkout, ".venv/.complete").returncode == 0 and calls(checkout) == ["venv", "pip", "pip"]


def test_an_environment_is_brought_up_to_date_only_when_a_pin_changed(checkout):
    assert make(checkout, ".venv/.complete").returncode == 0 and calls(checkout) == ["venv", "pip", "pip"]
    assert make(checkout, ".venv/.complete").returncode == 0 and not (checkout / "calls").exists()
    later = (checkout / ".venv/.complete").stat().st_mtime + 10
    os.utime(checkout / "constraints.txt", (later, later))
    assert make(checkout, ".venv/.complete").returncode == 0 and calls(checkout) == ["pip", "pip"]


def test_an_old_or_missing_python_is_one_sentence(checkout):
    (checkout / "old").touch()
    done = make(checkout, "demo")
    assert done.returncode and not (checkout / ".venv").exists()
    assert (done.stdout == "KiloNB needs Python 3.11 or newer, and ./fake-python is 3.9.2: install one, or name "
            "one by make PYTHON=...\n")
    absent = make(checkout, "demo", python="no-such-python")
    assert absent.returncode and absent.stdout.count("\n") == 1
    assert absent.stdout.startswith("KiloNB needs Python 3.11 or newer, and there is no 'no-such-python'")


def test_make_without_a_target_prints_the_targets(checkout):
    printed = make(checkout)
    assert printed.returncode == 0 and not (checkout / ".venv").exists()
    for target in ("demo", "test", "lab", "export", "readme", "bench", "lint-js", "clean"):
        assert f"make {target} " in printed.stdout


def test_the_javascript_check_is_skipped_without_node(monkeypatch, capsys):
    lint = tool("lint_assets")
    monkeypatch.setattr(lint.shutil, "which", lambda name: None)
    assert lint.main() == 0 and capsys.readouterr().out == "JavaScript is not checked: Node.js is not installed.\n"


# --- files made from notebooks

def test_the_readme_is_what_its_notebook_produces():
    assert tool("readme").readme_text() == README, "run make readme and commit README.md"


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "nbs" / "index.ipynb"],
                         ids=lambda path: path.name)
def test_links_and_pictures_exist(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"]
                         if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\((?![a-z]+:|#)([^)\s]+)\)", text)
    assert links or path.name == "CONTRIBUTING.md"
    for link in links: assert (path.parent / link.partition("#")[0]).exists(), link


def test_links_are_relative_to_the_new_folder():
    moved = tool("readme").relocate("![a](figures/a.png) [b](../B.md) [c](https://c.org/d) [e](#e)\n```\n[f](g)\n```\n",
                                    "nbs")
    assert moved == "![a](nbs/figures/a.png) [b](B.md) [c](https://c.org/d) [e](#e)\n```\n[f](g)\n```\n"


def test_clearing_a_notebook_keeps_its_parameters_tag(tmp_path):
    """Without the tag papermill's values would be ignored and each run silently keep its defaults."""
    from nbdev.clean import clean_nb
    from nbdev.config import get_config

    path = tmp_path / "tagged.ipynb"
    cell = {"cell_type": "code", "id": "a1b2c3d4", "metadata": {"tags": ["parameters"], "scrolled": True},
            "source": ["steps: int = 3"], "execution_count": 7,
            "outputs": [{"output_type": "stream", "name": "stdout", "text": ["x"]}]}
    path.write_text(json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    assert tool("export").clear_outputs(path) and not tool("export").clear_outputs(path)
    notebook = json.loads(path.read_text())
    clean_nb(notebook, allowed_cell_metadata_keys=get_config(path=ROOT).allowed_cell_metadata_keys.split())
    assert notebook["cells"] == [cell | {"execution_count": None, "outputs": [], "metadata": {"tags": ["parameters"]}}]


# --- commands and script of README.md

def commands() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`((?:kilonb|make|PIP_\w+=\S+ make) [a-z][^`]*)`", README)
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines()] + inline


def test_commands_in_the_readme_exist(tmp_path):
    from kilonb.cli.main import build_parser
    from kilonb.runs.notebooks import find_notebook, read_notebook, split_assignment, typed_values

    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"kilonb run single_view_overfit --data blender:PATH -p frame=0", "make demo",
            "make test"} <= set(commands())
    for command in commands():
        words = [word for word in shlex.split(command) if not word.startswith("PIP_")]
        if words[0] == "make": assert words[1] in targets, command
        if words[0] != "kilonb" or "NAME" in words or "--help" in words or len(words) == 2: continue
        options = build_parser().parse_args(words[1:])
        if words[1] not in ("run", "bench"): continue
        notebook = read_notebook(find_notebook(options.name, options.folder))
        typed_values(notebook, {}, dict(split_assignment(text) for text in options.assignments))


def test_the_script_in_the_readme_runs(tmp_path):
    """End to end on a tiny scene, with its settings made small: which data, how many steps, how many rays in each."""
    script, *_ = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    kilonb.write_brickyard(tmp_path / "tiny", width=48, height=48, train=6, test=1, count=4000)
    for setting, small in (('"brickyard"', repr(f"blender:{tmp_path / 'tiny'}")), ("steps=2000", "steps=60"),
                           ("rays=4096", "rays=512")):
        assert script.count(setting) == 1
        script = script.replace(setting, small)
    assert len([line for line in script.splitlines() if line]) <= 12, "at most twelve lines"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (scores,) = ast.literal_eval(done.stdout.splitlines()[-1]).values()
    assert (
        math.isfinite(scores["psnr_srgb_white_db"]) and scores["psnr_srgb_white_db"] > scores["psnr_blank_white_db"] + 3
    )
    kilonb.load_student(tmp_path / "student.pt")


def test_the_clip_script_in_the_readme_runs(tmp_path):
    """End to end on one small clip of a procedural town."""
    _, script, *_ = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    make_pandaset(tmp_path / "town", frames=16, width=128, height=72, channels=16, steps=360, samples=1,
                  cameras=["front_camera"])
    for setting, small in (('kilonb.resolve_data("boxtown_clip").path', repr(str(tmp_path / "town"))),
                           ("steps=300", "steps=10")):
        assert script.count(setting) == 1
        script = script.replace(setting, small)
    done = subprocess.run([sys.executable, "-c", f"import kilonb\n{script}"], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert ast.literal_eval(done.stdout.splitlines()[-1])["interp_psnr_full_db"] > 8
    kilonb.load_moving(tmp_path / "gaussians.pt")


# --- kept results of runs

@pytest.fixture
def finished(tmp_path):
    run = kilonb.open_run("tiny", tmp_path / "runs" / "tiny" / "one", {"data": f"blender:{tmp_path}/lego"}, seed=0,
                          data={"kind": "blender", "path": str(tmp_path / "lego"), "name": "", "sha256": "ab" * 32})
    run.figures.mkdir(exist_ok=True)
    (run.figures / "small.png").write_bytes(b"0" * 10)
    (run.figures / "large.png").write_bytes(b"0" * 150_001)
    run.finish({"psnr_srgb_white_db": 41.25}, [kilonb.Gate("psnr_srgb_white_db", at_least=40.0)])
    path = run.folder / "environment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dirty": False, "commit": "ab" * 20}))
    return kilonb.read_run(run.folder)


def test_a_kept_run_holds_no_path_and_is_read_like_a_run(finished, tmp_path):
    from kilonb.reports.overview import results_table

    folder = tool("keep").keep(finished, tmp_path / "kept")
    assert folder == tmp_path / "kept" / "tiny" / "blender-lego"
    for path in folder.iterdir():
        assert str(tmp_path) not in path.read_text() and not re.search(
            rf"\b{re.escape(platform.node())}\b", path.read_text()
        )
    assert results_table(tmp_path / "kept") == results_table(tmp_path / "runs")
    assert "41.2" in results_table(tmp_path / "kept")


def test_only_finished_runs_and_small_pictures_are_kept(finished, tmp_path, monkeypatch):
    keep = tool("keep")
    monkeypatch.setattr(keep, "NOTEBOOKS", tmp_path)
    with pytest.raises(KiloError, match="no figure 'none'"): keep.keep_picture(finished, "none")
    with pytest.raises(KiloError, match="150001 bytes"): keep.keep_picture(finished, "large")
    assert keep.keep_picture(finished, "small").read_bytes() == b"0" * 10
    kilonb.open_run("tiny", tmp_path / "runs" / "tiny" / "two")
    with pytest.raises(KiloError, match="only a finished run"):
        keep.keep(kilonb.read_run(tmp_path / "runs" / "tiny" / "two"), tmp_path / "kept")


def test_kept_runs_in_the_checkout_hold_no_path():
    for path in (ROOT / "nbs" / "results").glob("*/*/*.json"):
        assert not re.search(r'"/|"host"|"command"',
                             path.read_text(encoding="utf-8")), f"{path.name} holds a path or the name of a machine"


# --- names of version 0.1

@pytest.mark.parametrize("old, new", sorted(kilonb._RENAMED.items()))
def test_a_public_name_of_0_1_that_changed_fails_with_the_new_name(old, new):
    with pytest.raises(AttributeError, match=f"kilonb.{old} of 0.1 is now called kilonb.{new}"): getattr(kilonb, old)
    assert callable(getattr(kilonb, new)) and old not in dir(kilonb)


def test_the_animal_script_in_the_readme_runs(tmp_path):
    """As written: a small recording is made, prepared, trained on for a few steps and drawn."""
    *_, script, _ = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    script = f"import kilonb\n{script}\nassert len(gaussians) >= 1024"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "KILONB_OUTPUTS": str(tmp_path / "outputs")})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pose.pt").is_file()


def test_the_pin_pad_script_in_the_readme_runs(tmp_path):
    *_, script = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    script = f"import kilonb\n{script}\nassert replay.steps == 4 * 101 and kilonb.load_world_model('world_model.pt')"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "KILONB_OUTPUTS": str(tmp_path)}, timeout=120)
    assert done.returncode == 0, done.stderr
