"""Run gsplat's own tests against KiloNB on a CPU, and write a table of what passes.

    python tools/gsplat_tests.py PATH_OF_A_GSPLAT_CHECKOUT [--output FOLDER] [--threads 2] [--only test_basic.py]
        [--select EXPRESSION]

The checkout's test files are not edited. This file is also the pytest plugin of the run: it calls
`kilonb.splats.gsplat_compat.install`, gives the test modules `torch.device("cpu")` where they ask for "cuda:0", and
takes away the mark that skips them without CUDA. Files of what needs CUDA by nature are not run, and listed
with the reason; so are tests that need a package which is not installed.
Exit code 1 if a test fails. Nothing is downloaded.
"""
import argparse
import ast
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

CUDA_BY_NATURE = {
    "test_2dgs.py": "2DGS has CUDA kernels only",
    "test_ftheta.py": "f-theta cameras need the unscented transform, which has CUDA kernels only",
}
FILES = ("test_basic.py", "test_rasterization.py", "test_strategy.py", "test_compression.py", *CUDA_BY_NATURE)
OUTCOMES = ("passed", "failed", "needs CUDA", "needs a package")


def pytest_configure(config):
    """Install the drop-in before any test module is imported."""
    if not os.environ.get("KILONB_GSPLAT_RESULTS"): return
    from kilonb.splats.gsplat_compat import install
    install(package=True)


def pytest_collection_modifyitems(config, items):
    """Tests on the CPU in place of "cuda:0", none skipped for want of CUDA."""
    import torch

    for item in items:
        device = getattr(item.module, "device", None)
        if isinstance(device, torch.device) and device.type == "cuda": item.module.device = torch.device("cpu")
        item.own_markers = [mark for mark in item.own_markers
                            if not (mark.name == "skipif" and mark.kwargs.get("reason") == "No CUDA device")]


def pytest_runtest_logreport(report):
    """Append one line of JSON per test to the file named by KILONB_GSPLAT_RESULTS."""
    if report.when != "call" and not (report.when == "setup" and report.outcome != "passed"): return
    reason, outcome = "", report.outcome
    if outcome == "skipped":
        reason = report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else "skipped"
    elif outcome == "failed":
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = (crash.message if crash else str(report.longrepr)).splitlines()[0][:200]
        if reason.startswith(("ModuleNotFoundError", "ImportError")): outcome = "needs a package"
    line = {"test": report.nodeid.split("/")[-1], "outcome": outcome, "reason": reason,
            "seconds": round(report.duration, 2)}
    with open(os.environ["KILONB_GSPLAT_RESULTS"], "a", encoding="utf-8") as file: file.write(json.dumps(line) + "\n")


def without_running(path, results):
    """Write a line for each test function of a file that needs CUDA by nature; returns 0."""
    names = [node.name for node in ast.parse(path.read_text(encoding="utf-8")).body
             if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and node.name != "test_data"]
    with results.open("a", encoding="utf-8") as file:
        for name in names:
            line = {"test": f"{path.name}::{name}", "outcome": "needs CUDA", "reason": CUDA_BY_NATURE[path.name],
                    "seconds": 0}
            file.write(json.dumps(line) + "\n")
    return 0


def run_file(checkout, name, results, threads, select):
    """Run one test file in a process of its own; returns its exit code."""
    if name in CUDA_BY_NATURE: return without_running(checkout / "tests" / name, results)
    here = Path(__file__).resolve().parent
    paths = [str(checkout), str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": str(threads),
                                "KILONB_GSPLAT_RESULTS": str(results)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gsplat_tests", "-p", "no:cacheprovider", "--tb=short",
               "-c", os.devnull, "--rootdir", str(checkout), str(checkout / "tests" / name)]
    if select: command += ["-k", select]
    return subprocess.run(command, cwd=results.parent, env=environment, check=False).returncode


def commit_of(checkout):
    """The commit of a checkout, or "" where it is not a git work tree of its own."""
    if not (checkout / ".git").exists(): return ""
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def table(rows):
    """The counts by file, and the reasons, as markdown."""
    lines = ["| file | tests | " + " | ".join(OUTCOMES) + " | seconds |", "|---|---|" + "---|" * (len(OUTCOMES) + 1)]
    for name in dict.fromkeys(row["test"].split("::")[0] for row in rows):
        own = [row for row in rows if row["test"].startswith(name)]
        counts = Counter(row["outcome"] for row in own)
        cells = " | ".join(str(counts[outcome]) for outcome in OUTCOMES)
        lines.append(f"| {name} | {len(own)} | {cells} | {sum(row['seconds'] for row in own):.0f} |")
    reasons = Counter((row["test"].split("[")[0], row["outcome"], row["reason"]) for row in rows
                      if row["outcome"] != "passed")
    lines += [""] + [f"- {test} ({number}): {outcome}. {reason}" for (test, outcome, reason), number in reasons.items()]
    return "\n".join(lines) + "\n"


def main(arguments=None):
    """Run the tests, print and write the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="a checkout of gsplat 1.5.3")
    parser.add_argument("--output", type=Path, default=Path("gsplat_tests"), help="folder of the results")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--select", default="", help="pytest -k expression")
    parser.add_argument("--only", nargs="*", default=FILES, help="test files")
    options = parser.parse_args(arguments)
    missing = [name for name in options.only if not (options.checkout / "tests" / name).is_file()]
    if missing: parser.error(f"{options.checkout}/tests has no {missing[0]}: give the path of a gsplat checkout.")
    options.output.mkdir(parents=True, exist_ok=True)
    results = (options.output / "results.jsonl").resolve()
    results.write_text("", encoding="utf-8")
    began = time.time()
    codes = [run_file(options.checkout.resolve(), name, results, options.threads, options.select)
             for name in options.only]
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    head = (f"gsplat checkout {commit_of(options.checkout) or options.checkout.name}, "
            f"torch {importlib.metadata.version('torch')}, {platform.machine()}, {options.threads} threads, "
            f"{time.time() - began:.0f} s, at most {peak:.1f} GB\n\n")
    (options.output / "table.md").write_text(head + table(rows), encoding="utf-8")
    print("\n" + head + table(rows))
    failed = any(row["outcome"] in ("failed", "skipped") for row in rows)
    return 1 if failed or not rows or any(code not in (0, 1) for code in codes) else 0


if __name__ == "__main__": sys.exit(main())
