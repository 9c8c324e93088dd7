"""House rules that a reader of a change may overlook: notebooks, floors, imports, sizes."""
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "kilonb"
FLOORS = {
    "lab": 1, "training": 1, "geometry": 1,
    "splats": 2, "fields": 2, "metrics": 2,
    "scenes": 3,
    "distill": 4, "flux4d": 4, "coop": 4, "pose": 4, "dream": 4,
}
FOR_EVERYBODY = {"kilonb.lab.errors", "kilonb.lab.files"}


def tracked() -> list[Path]:
    """Files that git holds; in an unpacked archive, all but the environment's and the outputs'."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0: return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    aside = {".venv", "outputs", "__pycache__", ".ruff_cache", "build", "dist"}
    return [path for path in ROOT.rglob("*") if path.is_file() and not aside & set(path.relative_to(ROOT).parts)]


FILES = tracked()
NOTEBOOKS = sorted(path for path in FILES if path.suffix == ".ipynb")
LIBRARY = [path for path in NOTEBOOKS if path.relative_to(ROOT).parts[1:2] and path.relative_to(ROOT).parts[1] in FLOORS]
RUNNABLE = [path for path in NOTEBOOKS if path.parent.name in ("experiments", "benchmarks", "explore")]
MODULES = sorted(path for path in FILES if path.suffix == ".py" and path.is_relative_to(PACKAGE))


def name_of(path: Path) -> str: return path.relative_to(ROOT).as_posix()


def cells(path: Path) -> list[dict]: return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell: dict) -> str: return "".join(cell["source"])


def test_the_lists_are_not_empty():
    """Every check below walks over these; an empty list would pass them all."""
    assert len(LIBRARY) > 10 and len(MODULES) > 10 and len(FILES) > 30


@pytest.mark.parametrize("path", RUNNABLE, ids=name_of)
def test_a_notebook_that_is_run_has_exactly_one_parameters_cell(path):
    """Without the tag papermill's values are ignored and the run silently keeps its defaults; with two, one set wins unseen."""
    tagged = [cell for cell in cells(path) if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1 and tagged[0]["cell_type"] == "code"
    assigned = ast.parse(source(tagged[0])).body
    assert assigned and all(isinstance(line, ast.AnnAssign) and line.value is not None for line in assigned), "flat, typed, each with a default"
    if path.parent.name == "experiments": assert {"run_dir", "data", "seed", "resume"} <= {line.target.id for line in assigned}


@pytest.mark.parametrize("path", RUNNABLE, ids=name_of)
def test_a_notebook_that_is_run_exports_nothing(path):
    assert not any(re.search(r"^#\| *(export|default_exp)", source(cell), re.M) for cell in cells(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_committed_notebook_carries_no_execution_noise(path):
    for number, cell in enumerate(cells(path)):
        if cell["cell_type"] == "code": assert not cell["outputs"] and cell["execution_count"] is None, f"cell {number} carries outputs: run make export"
        assert set(cell["metadata"]) <= {"tags"}, f"cell {number} carries {set(cell['metadata'])}"


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_a_library_notebook_lies_at_its_module_s_path(path):
    where = re.findall(r"^#\| *default_exp +(\S+)", "\n".join(source(cell) for cell in cells(path)), re.M)
    assert where == [".".join(path.relative_to(ROOT / "nbs").with_suffix("").parts)]
    assert (PACKAGE / Path(*where[0].split(".")).with_suffix(".py")).is_file()


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_a_library_notebook_opens_with_a_title_and_a_promise(path):
    assert re.match(r"# \S.*\n+> \S", source(cells(path)[0]))


def test_every_module_has_its_notebook():
    """A module without one was written by hand, or its notebook was deleted."""
    written = [path.relative_to(PACKAGE).with_suffix(".ipynb") for path in MODULES if path.name not in ("__init__.py", "_modidx.py")]
    assert not [path.as_posix() for path in written if not (ROOT / "nbs" / path).is_file()]


def imports(path: Path) -> list[tuple[str, list[str]]]:
    """(absolute module, names) of each import statement in a file, at any depth."""
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import): found += [(alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            found.append((".".join([*base, *([node.module] if node.module else [])]), [alias.name for alias in node.names]))
    return found


def rooms_of(module: str, names: list[str]) -> set[str]:
    """The rooms that an import reaches: `kilonb.lab.runs`, `from kilonb import lab` and `from kilonb.lab import errors` alike."""
    if module != "kilonb" and not module.startswith("kilonb."): return set()
    if module == "kilonb": return {name for name in names if name in FLOORS}
    full = {f"{module}.{name}" for name in names} if module.count(".") == 1 and names else {module}
    return {name.split(".")[1] for name in full if name not in FOR_EVERYBODY and module not in FOR_EVERYBODY}


@pytest.mark.parametrize("path", [path for path in MODULES if path.parent != PACKAGE], ids=name_of)
def test_a_room_imports_only_from_lower_floors(path):
    room = path.relative_to(PACKAGE).parts[0]
    assert room in FLOORS, f"the room {room} has no floor"
    for module, names in imports(path):
        for other in rooms_of(module, names):
            assert other == room or FLOORS.get(other, 99) < FLOORS[room], f"{name_of(path)} imports {module}, a room that is not below {room}"


def test_the_check_of_floors_sees_every_way_to_import():
    assert rooms_of("kilonb.distill.losses", ["x"]) == rooms_of("kilonb.distill", ["losses"]) == rooms_of("kilonb", ["distill"]) == {"distill"}
    for free in (("kilonb.lab.errors", ["KiloError"]), ("kilonb.lab", ["errors"]), ("kilonbx.lab", ["a"]), ("torch", [])): assert not rooms_of(*free)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_the_package_reads_like_a_hand_written_one(path):
    """No notebook machinery at run time and no star imports."""
    for module, names in imports(path):
        assert module.split(".")[0] not in ("nbdev", "fastcore", "execnb"), f"imports {module}"
        assert "*" not in names, f"import * from {module}"


def test_lab_imports_no_torch():
    """`kilonb --help` answers at once."""
    modules = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES if path.parent.name == "lab" and path.name != "__init__.py")
    code = f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\nprint(*sorted({{'torch', 'numba'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.split(), f"importing lab imports {done.stdout}"


def test_no_large_files():
    """Data, weights and outputs do not belong into git; a figure is below 150 kB."""
    limits = {"_modidx.py": 1_000_000, ".png": 150_000, ".jpg": 150_000, ".jpeg": 150_000, ".gif": 150_000, ".svg": 150_000, ".webp": 150_000}
    def limit(path: Path) -> int: return limits.get(path.name, limits.get(path.suffix.lower(), 400_000))
    large = [f"{name_of(path)}: {path.stat().st_size} bytes" for path in FILES if path.stat().st_size > limit(path)]
    assert not large


def test_outputs_stay_out_of_git():
    assert not [name for path in FILES if (name := name_of(path)).startswith("outputs/") and name != "outputs/README.md"]


def test_every_data_manifest_loads():
    from kilonb.lab.manifests import load_manifests

    assert {path.stem for path in FILES if path.suffix == ".yaml" and path.parent.name == "data_manifests"} <= set(load_manifests())


def test_gates_of_every_experiment_can_be_listed_before_it_is_run(capfd, monkeypatch, tmp_path):
    """Bounds for several kinds of data in one cell must not break the list: those of the default are shown."""
    from kilonb.lab.cli import main

    monkeypatch.setenv("KILONB_OUTPUTS", str(tmp_path))
    assert main(["gates"]) == 0
    printed = capfd.readouterr().out
    assert all(name in printed for name in ("single_view_overfit", "teacher", "rasterize")) and "not run" in printed
