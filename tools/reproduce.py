"""Lists the kept results of nbs/results with the command of each, its duration and when it last held, and runs those of
under 15 minutes again, one after another.

    python tools/reproduce.py --list                 # nothing is run
    python tools/reproduce.py [NAME ...]             # all, or those whose experiment/data begin with a NAME
    python tools/reproduce.py --most-minutes 60

Runs lie in outputs/reproduce/; what is finished there at this commit is not run again, and an interrupted run is
resumed.
What came out is compared with the kept numbers by TOLERANCES and written to nbs/results/reproduced.json, from which
README.md says when a result last held; of a tree with uncommitted changes nothing is written. Results whose data or
earlier run are not on this machine are skipped, and said.
"""
import argparse
import datetime
import math
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keep

from kilonb.batch.arguments import data_root
from kilonb.core.documents import read_object
from kilonb.core.errors import KiloError
from kilonb.core.files import write_json
from kilonb.core.text import format_duration, format_value, text_table
from kilonb.data.manifests import load_manifests
from kilonb.data.verification import locate
from kilonb.reports.overview import REPRODUCED, last_held
from kilonb.runs.environment import checkout_root, describe_environment
from kilonb.runs.folders import outputs_root
from kilonb.runs.notebooks import read_notebook
from kilonb.runs.records import RunRecord, list_runs, read_run
from kilonb.runs.status import FINISHED, has_status
from kilonb.runs.verdicts import judged_report

RESULTS = keep.NOTEBOOKS / "results"
MOST_MINUTES = 15.0
# What is measured of the machine differs from run to run and is not compared.
OF_THE_MACHINE = re.compile(r"(_s|_ms|_mb|_w|per_s|per_second|_speedup|speedup_.*|parallel_efficiency|_seconds)$")
# How far a number may lie from the kept one, by the end of its name: (absolute, relative). Trainings on several threads
# add floating-point numbers in another order each time and end a little elsewhere; what trains for a fixed time takes
# more or fewer steps on another machine.
TOLERANCES = ((r"_db$", .3, 0.0), (r"(iou|ssim\w*|_share|_auc\w*|f1\w*|precision\w*|recall\w*|_r2\w*)$", .01, 0.0),
              (r"", 0.0, .02))
FIXED_TIME = 3.0                                        # times the tolerance where the run trains for a fixed time


class Kept(NamedTuple):
    """A kept result. name: experiment/data. kept: its kept.json. minutes: how long the run took."""
    name: str
    record: RunRecord
    kept: dict[str, Any]

    @property
    def minutes(self) -> float: return self.record.elapsed_s / 60


def kept_results(root: Path = RESULTS) -> list[Kept]:
    """All kept results, by name. Raises KiloError where a file of one is missing or damaged."""
    found = [Kept(f"{record.experiment}/{record.folder.name}", record, read_object(record.folder / "kept.json"))
             for record in list_runs(root)]
    return sorted(found, key=lambda one: one.name)


def tolerance(name: str, kept: float, parameters: Mapping[str, Any]) -> float:
    """How far a result may lie from the kept value."""
    absolute, relative = next((a, r) for pattern, a, r in TOLERANCES if re.search(pattern, name))
    fixed_time = any("time_limit" in key and value for key, value in parameters.items())
    return (absolute + relative * abs(kept)) * (FIXED_TIME if fixed_time else 1.0)


def numbers(results: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The results that are compared: numbers that are not of the machine."""
    for name, value in results.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if number and not OF_THE_MACHINE.search(name): yield name, float(value)


def differences(kept: RunRecord, now: RunRecord) -> dict[str, list[float | None]]:
    """Result -> [kept, now] for those that lie further apart than `tolerance`, or are missing now."""
    found = {}
    for name, value in numbers(kept.results):
        again = now.results.get(name)
        known = isinstance(again, (int, float)) and math.isfinite(again)
        if not known or abs(again - value) > tolerance(name, value, kept.parameters) + 1e-12:
            found[name] = [value, again if known else None]
    return found


def verdicts(record: RunRecord) -> dict[str, str]:
    """Gated result -> verdict by the gates of today, without those of the machine."""
    return {line.gate.result: line.verdict for line in judged_report(record, keep.NOTEBOOKS.parent).lines
            if not OF_THE_MACHINE.search(line.gate.result)}


def outcome(kept: RunRecord, now: RunRecord) -> dict[str, Any]:
    """The entry of reproduced.json. held: no gated result differs by more than its tolerance, no verdict changed."""
    differ, before, after = differences(kept, now), verdicts(kept), verdicts(now)
    changed = {name: [verdict, after.get(name)] for name, verdict in before.items() if after.get(name) != verdict}
    environment = describe_environment()
    return {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": environment["commit"], "dirty": environment["dirty"],
            "hardware": environment["hardware"]["processor"], "elapsed_s": round(now.elapsed_s, 1),
            "held": not changed and not set(differ) & set(before), "compared": sum(1 for _ in numbers(kept.results)),
            "differences": differ, "verdicts_changed": changed}


def local_value(name: str, value: Any) -> Any:
    """A kept parameter on this machine: data under KILONB_DATA, what other runs left under outputs/. Raises KiloError
    where that is not here."""
    if not isinstance(value, str) or not value: return value
    kind, colon, path = value.rpartition(":")
    if path.startswith("outputs/"):
        found = outputs_root() / path.removeprefix("outputs/")
        if not found.exists(): raise KiloError(f"it needs the earlier run {path}, which is not here")
        return f"{kind}{colon}{found}"
    if name not in ("data", "snippet") and not colon: return value
    manifest = load_manifests().get(value)
    if manifest is not None:
        if manifest.synthetic or locate(manifest, data_root()) is not None: return value
        raise KiloError(f"its data {value} are not here: KILONB_DATA names the folder of the real data")
    if colon and kind.isidentifier():
        found = data_root() and data_root() / path
        if not found or not found.exists():
            raise KiloError(f"its data {value} are not here: KILONB_DATA names the folder of the real data")
        return f"{kind}:{found}"
    return value


def local_arguments(kept: Kept) -> list[str]:
    """The command that repeats a kept result here, as arguments after the name of the program. Raises KiloError where
    it cannot be repeated."""
    command, path = keep.notebook_of(kept.record.experiment)
    if path is None: raise KiloError(f"there is no notebook {kept.record.experiment} any more")
    known = {name: one.default for name, one in read_notebook(path).parameters.items()}
    gone = [name for name in kept.record.parameters if "." not in name and name not in known]
    if gone: raise KiloError(f"its notebook has no parameter {', '.join(gone)} any more: run it anew and keep that run")
    given = {name: local_value(name, value) for name, value in kept.record.parameters.items()
             if "." in name or known[name] != value}
    data = given.pop("data", None)
    return [*command.removeprefix("kilonb ").split(), *(["--data", data] if data else []),
            *(part for name, value in given.items() for part in ("-p", f"{name}={keep.value_text(value)}"))]


def repeat(kept: Kept, arguments: Sequence[str]) -> RunRecord:
    """The run in outputs/reproduce that repeats a kept result: finished at this commit already, resumed, or new."""
    folder, here = outputs_root() / "reproduce" / kept.name, describe_environment()
    if has_status(folder):
        record = read_run(folder)
        same = all(record.environment.get(name) == here.get(name) for name in ("commit", "changes"))
        if same and record.status == FINISHED: return record
        if record.status == FINISHED or not same:
            folder = folder.with_name(f"{folder.name}-{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S}")
    arguments = [arguments[0], arguments[1], "--resume", "--out", str(folder)] if has_status(folder) else [
        *arguments, "--out", str(folder)]
    program = "import sys; from kilonb.cli.main import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=checkout_root(), stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        reason = next((line for line in lines if line.startswith("kilonb: ")), lines[-1]).removeprefix("kilonb: ")
        raise KiloError(f"the command failed: {reason}")
    return read_run(folder)


def listing(results: Sequence[Kept], reproduced: Mapping[str, Any]) -> str:
    """The table of kept results: name, duration, when it last held, command."""
    rows = [[one.name, format_duration(one.record.elapsed_s), last_held(one.record, reproduced),
             f"{one.kept.get('command_line', 'unknown')}{' (reconstructed)' if one.kept.get('reconstructed') else ''}"]
            for one in results]
    return text_table(("result", "took", "last held", "command"), rows)


def reproduce(results: Sequence[Kept], file: Path) -> int:
    """Repeat each result, print a line for it and write `file` after each. Returns the number that did not hold."""
    failed = 0
    for one in results:
        try:
            entry = outcome(one.record, repeat(one, local_arguments(one)))
        except KiloError as error:
            print(f"skipped    {one.name}: {error}", flush=True)
            continue
        failed += not entry["held"]
        shown = ", ".join(f"{name} {format_value(old)} -> {format_value(new) or 'missing'}"
                          for name, (old, new) in list(entry["differences"].items())[:4])
        print(f"{'held' if entry['held'] else 'NOT HELD':10} {one.name} ({format_duration(entry['elapsed_s'])})"
              + (f": {len(entry['differences'])} of {entry['compared']} numbers differ: {shown}" if shown else "")
              + (" (not written: the tree has uncommitted changes)" if entry["dirty"] else ""), flush=True)
        if not entry["dirty"]: write_json(file, (read_object(file) if file.is_file() else {}) | {one.name: entry})
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the kept results again and say which still hold.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only results whose experiment/data begins with it")
    parser.add_argument("--list", action="store_true", help="print the results and their commands; run nothing")
    parser.add_argument("--most-minutes", type=float, default=MOST_MINUTES, metavar="M",
                        help=f"leave out what took longer (default: {MOST_MINUTES:g})")
    options = parser.parse_args()
    try:
        chosen = [one for one in kept_results() if not options.names or one.name.startswith(tuple(options.names))]
        if not chosen: raise KiloError(f"No kept result begins with {' or '.join(options.names)}.")
        file = RESULTS / REPRODUCED
        print(listing(chosen, read_object(file) if file.is_file() else {}), flush=True)
        if options.list: return 0
        short = [one for one in chosen if one.minutes < options.most_minutes]
        print(f"\n{len(short)} of {len(chosen)} took less than {options.most_minutes:g} minutes and are run again, "
              f"{format_duration(sum(one.record.elapsed_s for one in short))} in all\n", flush=True)
        return 1 if reproduce(short, file) else 0
    except KiloError as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__": sys.exit(main())
