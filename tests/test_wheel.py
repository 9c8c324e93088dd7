"""The wheel: what it holds, and that every command works from it in a folder without a checkout; editable installs."""
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest
from helpers import KILONB

ROOT = Path(__file__).resolve().parent.parent
FILES = ("setup.py", "settings.ini", "README.md", "MANIFEST.in", "LICENSE")
NOTEBOOKS = ("experiments", "benchmarks", "explore", "sweeps", "figures")


def copy_sources(target: Path) -> Path:
    """What a wheel is built from, as a copy: setuptools writes beside its sources."""
    target.mkdir(parents=True, exist_ok=True)
    for name in FILES: shutil.copy(ROOT / name, target)
    ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("kilonb", "data_manifests", *(f"nbs/{kind}" for kind in NOTEBOOKS)):
        shutil.copytree(ROOT / name, target / name, ignore=ignored)
    return target


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path: return copy_sources(tmp_path_factory.mktemp("source") / "kilonb")


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    """The wheel, unpacked."""
    built = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation",
                    "--wheel-dir", str(built), str(source)], check=True, capture_output=True, text=True)
    (archive,) = built.glob("*.whl")
    shutil.unpack_archive(archive, built / "site", "zip")
    return built / "site"


@pytest.fixture(scope="module")
def away(tmp_path_factory) -> Path:
    """The current folder of the commands below: no checkout is in it or above it."""
    return tmp_path_factory.mktemp("away")


def environment(wheel: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KILONB_")}
    return {**kept, "PYTHONPATH": str(wheel), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **more}


def kilonb(wheel: Path, away: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess:
    return subprocess.run([*KILONB, *arguments], cwd=away, capture_output=True, text=True, timeout=300,
                          env=environment(wheel, **more))


def names_below(folder: Path, *patterns: str) -> set[str]:
    return {path.relative_to(folder).as_posix() for pattern in patterns for path in folder.glob(pattern)
            if path.is_file() and path.name[0] not in "._"}


# --- what is in it

def test_the_wheel_holds_every_notebook_that_is_run_with_gates_sweeps_and_manifests(wheel):
    wanted = names_below(ROOT, "nbs/experiments/*", "nbs/benchmarks/*", "nbs/explore/*", "nbs/sweeps/*",
                         "data_manifests/*")
    assert len(wanted) > 60 and {"nbs/experiments/single_view_overfit.ipynb", "nbs/experiments/gates.yaml",
                                 "nbs/experiments/notes.yaml", "nbs/sweeps/one_view.yaml",
                                 "data_manifests/lego_400.sha256"} <= wanted
    inside = names_below(wheel / "kilonb" / "bundled", "**/*")
    notebooks = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("nbs/e*/*.ipynb"))
    assert wanted <= inside and all(f"../{name.removeprefix('nbs/')})" in notebooks for name in inside - wanted), (
        "beside them only pictures that they show")
    for name in inside: assert (wheel / "kilonb" / "bundled" / name).read_bytes() == (ROOT / name).read_bytes(), name


def test_the_wheel_holds_modules_assets_and_the_mark_of_types_and_nothing_else(wheel):
    inside = names_below(wheel / "kilonb", "*", "[a-z]*/*", "*/assets/*") | {
        path.relative_to(wheel / "kilonb").as_posix() for path in wheel.glob("kilonb/**/__init__.py")}
    wanted = names_below(ROOT / "kilonb", "*.py", "*/*.py", "*/assets/*", "py.typed") | {
        path.relative_to(ROOT / "kilonb").as_posix() for path in ROOT.glob("kilonb/**/__init__.py")}
    assert inside == wanted and {"py.typed", "reports/assets/report.js"} <= inside
    tops = {path.name for path in wheel.iterdir()}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"kilonb"}


def test_every_asset_can_be_read_from_the_wheel(wheel):
    assets = sorted(names_below(ROOT, "kilonb/*/assets/*"))
    code = ("import kilonb, sys\nfrom kilonb.core.html import read_asset\nassert "
            "kilonb.__file__.startswith(sys.argv[1])\n"
            "print(*(len(read_asset(*name.split('/')[1:4:2])) for name in sys.argv[2:]))")
    done = subprocess.run([sys.executable, "-c", code, str(wheel), *assets], cwd=wheel, capture_output=True, text=True,
                          env=environment(wheel))
    assert done.returncode == 0, done.stderr
    assert list(map(int, done.stdout.split())) == [len((ROOT / name).read_text(encoding="utf-8")) for name in assets]


def test_a_source_archive_holds_what_a_wheel_is_made_from(source, tmp_path):
    subprocess.run([sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path)], cwd=source,
                   check=True, capture_output=True, text=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed: inside = {name.partition("/")[2] for name in packed.getnames()}
    wanted = names_below(source, "nbs/[!f]*/*", "data_manifests/*", "kilonb/*/*.py", "kilonb/*/assets/*")
    assert wanted <= inside and {"settings.ini", "setup.py", "README.md", "kilonb/py.typed"} <= inside


def test_a_build_without_notebooks_is_refused(source, tmp_path):
    for name in FILES: shutil.copy(source / name, tmp_path)
    shutil.copytree(source / "kilonb", tmp_path / "kilonb")
    built = subprocess.run([sys.executable, "setup.py", "--quiet", "build", "--build-base", "made"], cwd=tmp_path,
                           capture_output=True, text=True)
    assert built.returncode and "A wheel needs nbs/experiments/*.ipynb" in built.stderr


# --- that it works

def test_no_checkout_is_found_from_the_wheel(wheel, away):
    code = ("import kilonb\nfrom kilonb.runs.environment import checkout_root, code_version, describe_environment\n"
            "from kilonb.runs.folders import outputs_root\nfrom kilonb.data.manifests import data_folder\n"
            "print(checkout_root(), outputs_root(), data_folder(), code_version(describe_environment()), sep='\\n')")
    def call(**more):
        return subprocess.run([sys.executable, "-c", code], cwd=away, capture_output=True, text=True, check=True,
                              env=environment(wheel, **more)).stdout.splitlines()
    here = away / "kilonb_outputs"
    assert call()[:3] == ["None", str(here), str(here / "data")]
    assert call(KILONB_OUTPUTS="there")[1:3] == [str(away / "there"), str(away / "there" / "data")]
    import kilonb as package

    assert call()[3].startswith(f"installed package {package.__version__}, files ")


def test_the_wheel_lists_experiments_benchmarks_datasets_gates_and_sweeps(wheel, away):
    (away / "tiny.yaml").write_text("experiment: pinpad_policies\nseeds: 2\n")
    for arguments, wanted in ((("run", "--help"), "single_view_overfit"), (("bench", "--help"), "rasterize"),
                              (("data", "list"), "brickyard"), (("gates",), "psnr_srgb_white_db"),
                              (("sweep", "tiny.yaml", "--plan"), "fresh"),
                              (("run", "single_view_overfit", "--help"), "occupancy_resolution")):
        done = kilonb(wheel, away, *arguments)
        assert done.returncode == 0 and done.stderr == "" and wanted in done.stdout, (arguments, done.stderr)
    assert not (away / "kilonb_outputs").exists(), "a list makes no folder"


def test_the_wheel_runs_an_experiment_and_makes_data_and_says_once_where_to(wheel, away):
    said = f"kilonb: runs and data are written to {away / 'kilonb_outputs'}; KILONB_OUTPUTS names another folder.\n"
    made = kilonb(wheel, away, "data", "make", "pinpad_small")
    assert made.returncode == 0 and made.stderr == said and f"{away}/kilonb_outputs/data/pinpad_small" in made.stdout
    done = kilonb(wheel, away, "run", "pinpad_policies", "-p", 'layouts=["three"]', "-p", "episodes=1", "--json")
    last = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and said not in done.stderr, done.stderr
    folder = Path(last["run"])
    assert folder.parent == away / "kilonb_outputs" / "pinpad_policies" and (folder / "index.html").is_file()
    recorded = json.loads((folder / "environment.json").read_text())
    assert recorded["commit"] is None and recorded["source"].startswith("installed package ")
    assert str(wheel) in json.loads((folder / "notebook.ipynb").read_text())["metadata"]["papermill"]["input_path"]
    for arguments, wanted in ((("show", "pinpad_policies"), "installed package "), (("report",), "report.html"),
                              (("page", "pinpad_policies"), "index.html"), (("runs", "list"), "pinpad_policies/"),
                              (("gates", "pinpad_policies"), "scripted_return_three")):
        answer = kilonb(wheel, away, *arguments)
        assert answer.returncode == 0 and answer.stderr == "" and wanted in answer.stdout, (arguments, answer.stderr)


def test_scripts_and_notebooks_write_where_kilonb_outputs_says(tmp_path, monkeypatch):
    """It was read by the commands only: a script's runs landed in the checkout."""
    from kilonb.runs.folders import open_run
    from kilonb.runs.records import list_runs

    monkeypatch.setenv("KILONB_OUTPUTS", str(tmp_path / "there"))
    open_run("demo").finish({"sum": 3})
    (folder,) = (tmp_path / "there" / "demo").iterdir()
    assert [record.folder for record in list_runs()] == [folder]


# --- installed for editing

@pytest.fixture(scope="module")
def editable(source, tmp_path_factory) -> Path:
    """An environment in which the copy, a folder named kilonb as a clone is, is installed for editing."""
    place = tmp_path_factory.mktemp("editable")
    venv.create(place, with_pip=False, symlinks=True)
    (site,) = place.glob("lib/python3*/site-packages")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
                    "--no-build-isolation", "--target", str(site), "--editable", str(source)], check=True,
                   capture_output=True, text=True)
    return place / "bin" / "python"


def test_python_started_above_a_clone_named_kilonb_imports_the_package(editable, source, tmp_path):
    """It found the clone itself, a folder without __init__.py, as a package without contents."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for folder in (source.parent, source, tmp_path):
        code = "import kilonb; print(kilonb.__version__, kilonb.__file__)"
        done = subprocess.run([editable, "-c", code], cwd=folder, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[1] == str(source / "kilonb" / "__init__.py")


def test_an_editable_install_copies_no_notebooks(editable, source):
    assert not (source / "kilonb" / "bundled").exists() and not list(editable.parents[1].rglob("bundled"))
