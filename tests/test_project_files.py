"""Files about the project that tools read: versions, citation, changelog, workflow, types; what an import brings."""
import os
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

import kilonb

ROOT = Path(__file__).resolve().parent.parent
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
# Imported by what needs them, never by the package itself or by a list.
HEAVY = ("spconv", "gsplat", "tensorboard", "dask", "distributed", "h5py", "zarr", "jupyterlab", "plotly", "torch",
         "numba", "matplotlib", "sklearn", "pyarrow", "av", "gymnasium", "IPython", "papermill", "argcomplete",
         "tornado", "trackio")


def settings() -> dict[str, str]:
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def imported(code: str, names: tuple[str, ...], *arguments: str) -> list[str]:
    """Which of the packages a process has imported after `code`, whatever it printed and however it ended."""
    program = (f"import sys, contextlib, io\nsys.argv = ['kilonb', *{list(arguments)!r}]\n"
               "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
               + "".join(f"    {line}\n" for line in code.splitlines())
               + f"print(*sorted(set({names!r}) & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


# --- versions

def test_versions_agree():
    newest = re.search(r"^## \[([\d.]+)\] - (\d{4}-\d\d-\d\d)$", CHANGELOG, re.MULTILINE)
    assert settings()["version"] == kilonb.__version__ == CITATION["version"] == newest[1]
    assert CITATION["date-released"] == newest[2]


def test_the_changelog_lists_versions_from_the_newest_with_known_headings():
    versions = re.findall(r"^## \[([\d.]+)\] - \d{4}-\d\d-\d\d$", CHANGELOG, re.MULTILINE)
    released = re.sub(r"^## \[Unreleased\]$", "", CHANGELOG, count=1, flags=re.MULTILINE)
    assert len(versions) >= 2 and len(re.findall(r"^## ", released, re.MULTILINE)) == len(versions)
    assert versions == sorted(versions, key=lambda text: tuple(map(int, text.split("."))), reverse=True)
    kinds = set(re.findall(r"^### (.*)$", CHANGELOG, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_citation_names_the_authors_licence_and_address_of_the_settings():
    assert CITATION["cff-version"] == "1.2.0" and CITATION["type"] == "software" and CITATION["message"]
    assert CITATION["authors"] == [{"name": settings()["author"]}] and CITATION["license"] == "Apache-2.0"
    assert CITATION["repository-code"] == settings()["git_url"] and CITATION["title"] == settings()["title"]
    assert "doi" not in CITATION and "identifiers" not in CITATION


def test_the_package_says_that_it_has_types():
    assert (ROOT / "kilonb" / "py.typed").is_file()


# --- workflow

def test_the_workflow_runs_the_checks_of_every_merge_and_nothing_else():
    (job,) = WORKFLOW["jobs"].values()
    runs = [step["run"] for step in job["steps"] if "run" in step]
    assert runs[-1] == ".ci/run" and os.access(ROOT / ".ci" / "run", os.X_OK) and job["timeout-minutes"] <= 90
    assert set(job["strategy"]["matrix"]["python"]) >= {settings()["min_python"], "3.13"}
    assert set(WORKFLOW[True]) == {"push", "pull_request"}                # YAML 1.1 reads the key `on` as true


def test_the_workflow_may_only_read_and_its_actions_are_pinned():
    assert WORKFLOW["permissions"] == {"contents": "read"}
    (job,) = WORKFLOW["jobs"].values()
    assert "permissions" not in job
    uses = [step["uses"] for step in job["steps"] if "uses" in step]
    assert uses and all(re.fullmatch(r"actions/(checkout|setup-python)@v\d+", one) for one in uses)
    checkout = next(step for step in job["steps"] if step.get("uses", "").startswith("actions/checkout"))
    assert checkout["with"]["persist-credentials"] is False


# --- imports

def test_importing_every_module_imports_no_optional_backend():
    """spconv needs CUDA's libraries and gsplat compiles at import: only the backends of their names import them."""
    code = ("import importlib, pkgutil, kilonb\n"
            "for found in pkgutil.walk_packages(kilonb.__path__, 'kilonb.'): importlib.import_module(found.name)")
    assert imported(code, ("spconv", "cumm", "gsplat", "tensorboard", "jupyterlab", "trackio")) == []


@pytest.mark.parametrize("arguments", ["", "--help", "run --help", "run single_view_overfit --help", "bench --help",
                                       "data list", "sweep --help", "completion --help"])
def test_a_list_or_a_help_imports_nothing_heavy(arguments):
    code = "import kilonb" if not arguments else "from kilonb.cli.main import main\nmain()"
    assert imported(code, HEAVY, *arguments.split()) == []


def test_the_experiments_are_listed_without_numpy():
    """numpy takes a third of the time of `kilonb run --help`."""
    for arguments in (["--help"], ["run", "--help"], ["run", "single_view_overfit", "--help"]):
        assert imported("from kilonb.cli.main import main\nmain()", ("numpy", "yaml", "rich"), *arguments) == []
