"""Rules of the repository: notebooks, package layers, imports, sizes."""
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import measures

PACKAGE = ROOT / "kilonb"
LAYERS = {
    "core": 0,
    "data": 1, "runs": 1, "geometry": 1,
    "metrics": 2, "training": 2,
    "fields": 3, "splats": 3,
    "scenes": 4,
    "imaging": 5,
    "panoramas": 6,
    "distill": 7, "coop": 7, "flux4d": 7, "pose": 7, "dream": 7,
    "reports": 8, "sharing": 8,
    "batch": 9,
    "cli": 10,
}
# Ratchets: today's numbers of `python tools/measures.py`. Lower a maximum, or raise a minimum, when the numbers allow.
AT_MOST = {"cell_lines_median": 10, "cell_lines_p90": 21, "cell_lines_max": 40, "names_defined_twice": 0,
           "lines_over_120": 0}
AT_LEAST = {"one_definition_share": 0.92, "demonstrated_share": 0.95}
LARGEST_PACKAGE_SHARE = 0.14
EXPERIMENT_LINES, EXPERIMENT_PARAMETERS = 100, 25
WITHOUT_TORCH = ("core", "data", "runs", "reports", "batch", "cli")


def tracked() -> list[Path]:
    """Files that git holds; in an unpacked archive, all but the environment's and the outputs'."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    aside = {".venv", "outputs", "__pycache__", ".ruff_cache", "build", "dist"}
    return [path for path in ROOT.rglob("*") if path.is_file() and not aside & set(path.relative_to(ROOT).parts)]


FILES = tracked()
NOTEBOOKS = sorted(path for path in FILES if path.suffix == ".ipynb")
LIBRARY = [path for path in NOTEBOOKS if path.relative_to(ROOT).parts[1:2]
           and path.relative_to(ROOT).parts[1] in LAYERS]
RUNNABLE = [path for path in NOTEBOOKS if path.parent.name in ("experiments", "benchmarks", "explore")]
MODULES = sorted(path for path in FILES if path.suffix == ".py" and path.is_relative_to(PACKAGE))


def name_of(path: Path) -> str: return path.relative_to(ROOT).as_posix()


def cells(path: Path) -> list[dict]: return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell: dict) -> str: return "".join(cell["source"])


def test_the_lists_are_not_empty():
    """Every check below is parametrised by these lists; an empty list would pass."""
    assert len(LIBRARY) > 10 and len(MODULES) > 10 and len(FILES) > 30


@pytest.mark.parametrize("path", RUNNABLE, ids=name_of)
def test_a_notebook_that_is_run_has_exactly_one_parameters_cell(path):
    """Without the tag papermill's values are ignored and the run silently keeps its defaults; with two, one of
    them has no effect."""
    tagged = [cell for cell in cells(path) if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1 and tagged[0]["cell_type"] == "code"
    assigned = ast.parse(source(tagged[0])).body
    assert assigned and all(isinstance(line, ast.AnnAssign) and line.value is not None
                            for line in assigned), "flat, typed, each with a default"
    if path.parent.name == "experiments":
        assert {"run_dir", "data", "device", "seed", "resume"} <= {line.target.id for line in assigned}


@pytest.mark.parametrize("path", RUNNABLE, ids=name_of)
def test_a_notebook_that_is_run_exports_nothing(path):
    assert not any(re.search(r"^#\| *(export|default_exp)", source(cell), re.M) for cell in cells(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_committed_notebook_carries_no_execution_noise(path):
    for number, cell in enumerate(cells(path)):
        if cell["cell_type"] == "code":
            assert not cell["outputs"] and cell["execution_count"] is None, (
                f"cell {number} carries outputs: run make export"
            )
        assert set(cell["metadata"]) <= {"tags"}, f"cell {number} carries {set(cell['metadata'])}"


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_a_library_notebook_lies_at_its_module_s_path(path):
    where = re.findall(r"^#\| *default_exp +(\S+)", "\n".join(source(cell) for cell in cells(path)), re.M)
    assert where == [".".join(path.relative_to(ROOT / "nbs").with_suffix("").parts)]
    assert (PACKAGE / Path(*where[0].split(".")).with_suffix(".py")).is_file()


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_a_library_notebook_begins_with_a_title_and_a_one_sentence_description(path):
    assert re.match(r"# \S.*\n+> \S", source(cells(path)[0]))


def test_every_module_has_its_notebook():
    """A module without one was written by hand, or its notebook was deleted."""
    written = [path.relative_to(PACKAGE).with_suffix(".ipynb") for path in MODULES if path.name != "__init__.py"]
    assert not [path.as_posix() for path in written if not (ROOT / "nbs" / path).is_file()]


def imports(path: Path) -> list[tuple[str, list[str]]]:
    """(absolute module, names) of each import statement in a file, at any depth."""
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import): found += [(alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            found.append((".".join([*base, *([node.module] if node.module else [])]),
                          [alias.name for alias in node.names]))
    return found


def packages_of(module: str, names: list[str]) -> set[str]:
    """The packages that an import reaches: `kilonb.runs.gates`, `from kilonb import runs` and `from kilonb.runs import
    gates` alike."""
    if module == "kilonb": return {name for name in names if name in LAYERS}
    return {module.split(".")[1]} if module.startswith("kilonb.") else set()


@pytest.mark.parametrize("path", [path for path in MODULES if path.parent != PACKAGE], ids=name_of)
def test_a_package_imports_only_from_lower_layers(path):
    package = path.relative_to(PACKAGE).parts[0]
    assert package in LAYERS, f"the package {package} has no layer"
    for module, names in imports(path):
        for other in packages_of(module, names):
            assert other == package or LAYERS.get(other, 99) < LAYERS[package], (
                f"{name_of(path)} imports {module}, which is not in a lower layer"
            )


def test_the_check_of_layers_finds_every_form_of_import():
    assert (
        packages_of("kilonb.distill.losses", ["x"])
        == packages_of("kilonb.distill", ["losses"])
        == packages_of("kilonb", ["distill"])
        == {"distill"}
    )
    for other in (("kilonbx.core", ["a"]), ("torch", [])): assert not packages_of(*other)


def edges() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports, at any depth in the file."""
    known = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in MODULES
             if path.name != "__init__.py"}
    found = {}
    for name, path in known.items():
        reached = {module for module, _ in imports(path)} | {f"{module}.{one}" for module,
                                                             names in imports(path) for one in names}
        found[name] = (reached & set(known)) - {name}
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The circles in a graph of imports, each found once by a walk in depth."""
    found, done, way = [], set(), []

    def walk(name: str) -> None:
        if name in way: found.append([*way[way.index(name):], name])
        if name in done or name in way: return
        way.append(name)
        for other in sorted(graph[name]): walk(other)
        done.add(way.pop())
    for name in sorted(graph): walk(name)
    return found


def test_no_circle_of_imports_between_modules():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == [["a", "b", "c", "a"]]
    assert not circles(edges())


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_import_no_notebook_tools_and_no_star(path):
    """No notebook machinery at run time and no star imports."""
    for module, names in imports(path):
        assert module.split(".")[0] not in ("nbdev", "fastcore", "execnb"), f"imports {module}"
        assert "*" not in names, f"import * from {module}"


FOR_KERNELS = {"kilonb.core.simd", "kilonb.core.work_queue"}       # imported by modules with compiled functions only


def test_what_a_command_needs_at_once_imports_no_torch():
    """`kilonb --help` must not wait for torch, which takes seconds to import."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES
               if path.parent.name in WITHOUT_TORCH and path.name != "__init__.py"}
    assert modules >= FOR_KERNELS
    modules = sorted(modules - FOR_KERNELS)
    code = (f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
            "print(*sorted({'torch', 'numba'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.split(), f"importing {', '.join(WITHOUT_TORCH)} imports {done.stdout}"


def test_no_large_files():
    """Data, weights and outputs stay out of git; a figure has less than 150 kB."""
    limits = {".png": 150_000, ".jpg": 150_000, ".jpeg": 150_000, ".gif": 150_000, ".svg": 150_000, ".webp": 150_000}
    def limit(path: Path) -> int: return limits.get(path.name, limits.get(path.suffix.lower(), 400_000))
    large = [f"{name_of(path)}: {path.stat().st_size} bytes" for path in FILES if path.stat().st_size > limit(path)]
    assert not large


def test_outputs_stay_out_of_git():
    assert not [name for path in FILES if (name := name_of(path)).startswith("outputs/")
                and name != "outputs/README.md"]


def test_every_data_manifest_loads():
    from kilonb.data.manifests import load_manifests

    assert {path.stem for path in FILES if path.suffix == ".yaml"
            and path.parent.name == "data_manifests"} <= set(load_manifests())


def test_gates_of_every_experiment_can_be_listed_before_it_is_run(capfd, monkeypatch, tmp_path):
    """Bounds for several kinds of data in one cell must not break the list: those of the default are shown."""
    from kilonb.cli.main import main

    monkeypatch.setenv("KILONB_OUTPUTS", str(tmp_path))
    assert main(["gates"]) == 0
    printed = capfd.readouterr().out
    assert all(name in printed for name in ("single_view_overfit", "teacher", "rasterize")) and "not run" in printed


def test_the_library_is_written_within_its_limits():
    """Cell lengths, definitions per cell, demonstrations, names and line lengths; tools/measures.py prints what misses
    them."""
    found = measures.measures(measures.library())
    missed = {name: value for name,
              value in found.items() if value > AT_MOST.get(name, value) or value < AT_LEAST.get(name, value)}
    assert not missed, f"{missed}: python tools/measures.py lists the cells and names"
    assert set(AT_MOST) | set(AT_LEAST) == set(found)


def test_no_package_is_too_large():
    largest = max((share, name) for name, share in measures.package_shares().items())
    assert largest[0] <= LARGEST_PACKAGE_SHARE, f"{largest[1]} holds {largest[0]:.1%} of all exported lines"


def test_the_measures_find_what_they_count():
    long_cell = measures.Cell("core/x", "code", "#| export\ndef area(r):\n" + "    r += 1\n" * 50, True)
    demo, other = (
        measures.Cell("core/x", "code", "area(2)", False),
        measures.Cell("core/y", "code", "#| export\ndef area(): ...", True),
    )
    found = measures.measures([[long_cell, demo], [other]])
    assert found["cell_lines_max"] == 51 and found["demonstrated_share"] == 0.5 and found["names_defined_twice"] == 1


@pytest.mark.parametrize("path", [path for path in MODULES if path.name != "__init__.py"], ids=name_of)
def test_a_module_says_what_it_provides(path):
    """Its docstring is the promise line of its notebook."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert len(docstring.split()) >= 4 and docstring.rstrip().endswith("."), f"{name_of(path)}: '{docstring}'"


@pytest.mark.parametrize("path", [path for path in RUNNABLE if path.parent.name == "experiments"], ids=name_of)
def test_an_experiment_is_short_and_defines_nothing(path):
    code = [source(cell) for cell in cells(path) if cell["cell_type"] == "code"]
    lines = [line for one in code for line in one.splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(lines) <= EXPERIMENT_LINES, f"{len(lines)} lines of code: move some into the library"
    parameters = next(source(cell) for cell in cells(path) if "parameters" in cell["metadata"].get("tags", []))
    assert len(ast.parse(parameters).body) <= EXPERIMENT_PARAMETERS, "the rest is reached by dotted names"
    defined = [node.name for one in code for node in ast.walk(ast.parse(re.sub(r"^%.*$", "", one, flags=re.M)))
               if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert not defined, f"{', '.join(defined)} belongs into the library"


def test_every_incident_of_the_background_page_has_its_tests():
    """Incidents of systems that are not built yet are the only ones without; the test that the page names exists."""
    page = source(next(cell for cell in cells(ROOT / "nbs" / "background.ipynb") if "| # | system |" in source(cell)))
    listed = {int(row[1]): row[2] for row in re.finditer(r"^\| (\d+) \|.*\|([^|]*)\|$", page, re.M)}
    assert sorted(listed) == list(range(1, 26))
    tests = {path.name: path.read_text(encoding="utf-8") for path in FILES if path.parent.name == "tests"}
    marks = re.findall(r"@pytest\.mark\.incident\(([\d, ]+)\)", "".join(tests.values()))
    assert {number for number, text in listed.items() if text.strip()} == \
        {int(number) for numbers in marks for number in numbers.split(",")}
    for text in listed.values():
        for file, name in re.findall(r"`(test_\w+\.py)`: `(\w+)`", text): assert f"def {name}(" in tests[file], name
