"""Copies the results of finished runs to nbs/results/<experiment>/<data>/, without pictures, checkpoints, paths and
host name.

README.md makes its table of results from these. `python tools/keep.py RUN ... --picture NAME` also copies
figures/NAME.png of the last run to nbs/figures.
"""
import argparse
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from kilonb.core.errors import KiloError
from kilonb.core.files import write_json
from kilonb.runs.records import RunRecord, data_label, find_run, read_run
from kilonb.runs.status import FINISHED

NOTEBOOKS = Path(__file__).resolve().parent.parent / "nbs"
LARGEST_PICTURE = 150_000


def portable_environment(record: RunRecord) -> dict[str, Any]:
    """Commit, versions, hardware, seed, and names and hashes of the data, without paths and host name."""
    data = [{"kind": item.get("kind", ""), "name": item.get("name", ""), "path": Path(item.get("path", "")).name,
             "sha256": item.get("sha256", "")} for item in record.environment.get("data", [])]
    same = ("commit", "dirty", "python", "packages", "hardware", "seed")
    return {**{key: record.environment[key] for key in same if key in record.environment}, "data": data}


def keep(record: RunRecord, root: Path = NOTEBOOKS / "results") -> Path:
    """Write results, environment and status of a run under `root`; returns the folder. Raises KiloError where it did
    not finish."""
    if record.status != FINISHED: raise KiloError(f"{record.name} is {record.status}: only a finished run can be kept.")
    folder = root / record.experiment / (re.sub(r"\W+", "-", data_label(record)) or "made-here")
    folder.mkdir(parents=True, exist_ok=True)
    written = {"experiment": record.experiment, "run": record.folder.name, "ok": record.ok, "results": record.results,
               "gates": record.report.to_dict(), "baselines": record.baselines}
    write_json(folder / "results.json", written)
    write_json(folder / "environment.json", portable_environment(record))
    write_json(folder / "status.json",
               {"experiment": record.experiment, "status": FINISHED, "started": record.started,
                "elapsed_s": record.elapsed_s})
    return folder


def keep_picture(record: RunRecord, name: str) -> Path:
    """Copy one figure of the run. Raises KiloError where there is none or it is too large to commit."""
    source = record.folder / "figures" / f"{name}.png"
    if not source.is_file(): raise KiloError(f"{record.name} has no figure '{name}'.")
    if source.stat().st_size > LARGEST_PICTURE:
        raise KiloError(f"{source.name} has {source.stat().st_size} bytes; at most {LARGEST_PICTURE} are committed.")
    (NOTEBOOKS / "figures").mkdir(exist_ok=True)
    return Path(shutil.copyfile(source, NOTEBOOKS / "figures" / source.name))


def main() -> int:
    parser = argparse.ArgumentParser(description="Copy the results of finished runs to nbs/results, for README.md.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's name or folder, as for `kilonb show`")
    parser.add_argument("--picture", metavar="NAME", help="copy this figure of the last run to nbs/figures")
    options = parser.parse_args()
    try:
        records = [read_run(find_run(name)) for name in options.runs]
        for record in records: print(keep(record))
        if options.picture: print(keep_picture(records[-1], options.picture))
    except KiloError as error:
        print(f"keep: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__": sys.exit(main())
