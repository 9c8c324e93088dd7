"""Copies the results of finished runs to nbs/results/<experiment>/<data>/, with one small picture, without checkpoints,
paths and host name.

README.md and nbs/results/README.md are made from these. `picture.jpg` is the run's headline picture (`--figure NAME`:
another of its figures). `--pictures RUN ...` adds the picture to results that are kept already: the run's results must
be the kept ones, number for number. `python tools/keep.py RUN ... --picture NAME` also copies figures/NAME.png of the
last run to nbs/figures. A kept result holds its parameters, the command that repeats it,
commit, hardware and date. Beside a run on the same data, a run with other settings is kept under its tag (`kilonb runs
tag`). A run of a tree with uncommitted changes is refused, since no commit holds what was run.
"""
import argparse
import io
import json
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from kilonb.batch.arguments import data_root
from kilonb.core.documents import read_object
from kilonb.core.errors import KiloError
from kilonb.core.files import atomic_write, write_json
from kilonb.reports.headline import headline_picture
from kilonb.runs.folders import outputs_root
from kilonb.runs.notebooks import list_notebooks, read_notebook
from kilonb.runs.records import RunRecord, data_label, find_run, read_run
from kilonb.runs.settings import flat_parameters
from kilonb.runs.status import FINISHED
from kilonb.runs.verdicts import judged_report

NOTEBOOKS = Path(__file__).resolve().parent.parent / "nbs"
LARGEST_PICTURE = 150_000
# Data whose terms do not say that pictures of them may be published: their runs are kept without a picture.
NOT_SHOWN = {"opv2v:": "the terms of OPV2V allow academic research only", "v2xsim:": "no licence of V2X-Sim is known",
             "middlebury:": "the data have no licence"}
PICTURE, PICTURE_BYTES, PICTURE_WIDTH = "picture.jpg", 60_000, 640
OF_THE_FOLDER = ("run_dir", "resume")
UNKNOWN = "unknown"


def portable_environment(record: RunRecord) -> dict[str, Any]:
    """Commit, versions, hardware, seed, and names and hashes of the data, without paths and host name."""
    data = [{"kind": item.get("kind", ""), "name": item.get("name", ""), "path": Path(item.get("path", "")).name,
             "sha256": item.get("sha256", "")} for item in record.environment.get("data", [])]
    same = ("commit", "dirty", "python", "packages", "hardware", "seed")
    return {**{key: record.environment[key] for key in same if key in record.environment}, "data": data}


def portable_value(value: Any, roots: Mapping[str, Path | None]) -> Any:
    """A parameter without this machine's folders: a path under a root is relative to it, with the prefix of the root;
    of another absolute path only the name is left."""
    if isinstance(value, (list, tuple)): return [portable_value(one, roots) for one in value]
    if not isinstance(value, str): return value
    kind, colon, path = value.rpartition(":")
    if not path.startswith("/"): return value
    for prefix, root in roots.items():
        if root is not None and Path(path).is_relative_to(root):
            return f"{kind}{colon}{prefix}{Path(path).relative_to(root)}"
    return f"{kind}{colon}{Path(path).name}"


def portable_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters of a run but its folder, flat; paths are relative to KILONB_DATA, or to outputs/ with that
    prefix."""
    roots = {"": data_root(), "outputs/": outputs_root()}
    return {name: portable_value(value, roots) for name, value in flat_parameters(parameters).items()
            if name not in OF_THE_FOLDER}


def notebook_of(experiment: str) -> tuple[str, Path | None]:
    """("kilonb run NAME", path of the notebook), with `bench` for benchmarks and the path for explorers."""
    kinds = {"experiments": "run {}", "benchmarks": "bench {}", "explore": "run nbs/explore/{}.ipynb"}
    for kind, command in kinds.items():
        path = list_notebooks(kind, NOTEBOOKS.parent).get(experiment)
        if path is not None: return "kilonb " + command.format(experiment), path
    return f"kilonb run {experiment}", None


def value_text(value: Any) -> str:
    """A value as `-p name=` takes it."""
    if value is None: return "none"
    if isinstance(value, bool): return str(value).lower()
    return value if isinstance(value, str) else json.dumps(value)


def command_line(experiment: str, parameters: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> str:
    """The command that repeats a run: every parameter that is not the notebook's default.

    defaults: of the notebook that was run; None: of the notebook in this checkout.
    """
    command, path = notebook_of(experiment)
    if defaults is None:
        defaults = {name: one.default for name, one in read_notebook(path).parameters.items()} if path else {}
    given = {name: value for name, value in parameters.items() if name not in defaults or defaults[name] != value}
    parts = [f"--data {shlex.quote(given.pop('data'))}"] if given.get("data") else []
    return " ".join([command, *parts, *(f"-p {shlex.quote(f'{name}={value_text(value)}')}"
                                        for name, value in given.items())])


def check_tree(record: RunRecord) -> None:
    """Raises KiloError unless the run's code is that of a commit."""
    if record.environment.get("dirty") is False and record.environment.get("commit"): return
    raise KiloError(f"{record.name} is of a tree with uncommitted changes (or of no known commit), so nothing says "
                    "what was run: commit, run it again in a clean clone, and keep that run.")


def figure_of(record: RunRecord, name: str = "") -> Path | None:
    """The figure of a run with this name, or the picture that stands for it; None where it has none. Raises KiloError
    where it has no figure of that name."""
    if not name: return headline_picture(record.folder)
    found = next(iter(sorted((record.folder / "figures").glob(f"{name}.*"))), None)
    if found is None: raise KiloError(f"{record.name} has no figure '{name}'.")
    return found


def small_jpeg(path: Path) -> bytes:
    """A picture as JPEG of at most 640 pixels width and 60 kB. Raises KiloError where it cannot be read or made so
    small."""
    try:
        with Image.open(path) as opened: rgba = opened.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise KiloError(f"{path.name} cannot be read as a picture: name another figure by --figure.") from None
    image = Image.new("RGB", rgba.size, "white")
    image.paste(rgba, mask=rgba.getchannel("A"))
    if image.width > PICTURE_WIDTH:
        height = max(1, round(image.height * PICTURE_WIDTH / image.width))
        image = image.resize((PICTURE_WIDTH, height), Image.Resampling.LANCZOS)
    for quality in (90, 85, 80, 70, 60, 50, 40):
        written = io.BytesIO()
        image.save(written, "JPEG", quality=quality, optimize=True, progressive=True)
        if len(written.getvalue()) <= PICTURE_BYTES: return written.getvalue()
    raise KiloError(f"{path.name} has {len(written.getvalue())} bytes as JPEG of 640 pixels width; at most "
                    f"{PICTURE_BYTES} are kept: name a simpler figure by --figure.")


def picture_of(record: RunRecord, name: str = "") -> tuple[str, bytes, str]:
    """(figure, picture.jpg, ""), or ("", b"", why there is none). Raises KiloError for a figure that was named."""
    for kind, why in NOT_SHOWN.items():
        if data_label(record).startswith(kind): return "", b"", why
    figure = figure_of(record, name)
    if figure is None: return "", b"", "the run has none"
    try: return figure.name, small_jpeg(figure), ""
    except KiloError:
        if name: raise
        return "", b"", f"{figure.name} of the run cannot be kept"


def keep_small_picture(record: RunRecord, folder: Path, name: str = "") -> Path | None:
    """Write `picture.jpg` of a run beside its kept result, and the figure's name to its kept.json; None, with the
    reason in kept.json, where there is no picture: one that lay there is removed, since it is of another run."""
    (figure, content, why), path = picture_of(record, name), folder / PICTURE
    kept = read_object(folder / "kept.json")
    for key in ("picture", "no_picture"): kept.pop(key, None)
    if figure:
        with atomic_write(path) as partial: partial.write_bytes(content)
    else: path.unlink(missing_ok=True)
    write_json(folder / "kept.json", kept | ({"picture": figure} if figure else {"no_picture": why}))
    return path if figure else None


def add_picture(record: RunRecord, root: Path = NOTEBOOKS / "results", name: str = "") -> Path | None:
    """Write the picture of a run whose result is kept already. Raises KiloError where the kept result is of another
    run."""
    folder = kept_folder(record, root)
    kept = read_object(folder / "results.json") if (folder / "results.json").is_file() else {}
    if kept.get("run") != record.folder.name or kept.get("results") != json.loads(json.dumps(record.results)):
        raise KiloError(f"The result kept in {folder.relative_to(root)} is not that of {record.name}: keep the run.")
    return keep_small_picture(record, folder, name)


def kept_folder(record: RunRecord, root: Path) -> Path:
    """Where the result of a run is kept."""
    name = re.sub(r"\W+", "-", data_label(record)) or "made-here"
    return root / record.experiment / (f"{name}-{record.tag}" if record.tag else name)


def keep(record: RunRecord, root: Path = NOTEBOOKS / "results", figure: str = "") -> Path:
    """Write results, parameters, environment, status, command and one small picture of a run under `root`; returns the
    folder. Raises KiloError where it did not finish, or where its tree had uncommitted changes."""
    if record.status != FINISHED: raise KiloError(f"{record.name} is {record.status}: only a finished run can be kept.")
    check_tree(record)
    folder = kept_folder(record, root)
    folder.mkdir(parents=True, exist_ok=True)
    report, parameters = judged_report(record, NOTEBOOKS.parent), portable_parameters(record.parameters)
    written = {"experiment": record.experiment, "run": record.folder.name, "ok": report.ok, "results": record.results,
               "gates": report.to_dict(), "baselines": record.baselines}
    write_json(folder / "results.json", written)
    write_json(folder / "parameters.json", parameters)
    write_json(folder / "environment.json", portable_environment(record))
    said = re.sub(r"'/[^']*/([^'/]*)'", r"'\1'", report.note)            # without folders of this machine
    note = {"note": said} if said else {}                              # why the run does not decide
    write_json(folder / "kept.json", {"command_line": command_line(record.experiment, parameters),
                                      "reconstructed": False, "source": "the run's own folder", **note})
    write_json(folder / "status.json",
               {"experiment": record.experiment, "status": FINISHED, "started": record.started,
                "elapsed_s": record.elapsed_s, **({"tag": record.tag} if record.tag else {})})
    keep_small_picture(record, folder, figure)
    return folder


def judge_again(folder: Path) -> bool:
    """Judge a kept result by the gates of today; whether its results.json changed by that."""
    written = read_object(folder / "results.json")
    report = judged_report(read_run(folder), NOTEBOOKS.parent)
    today = written | {"ok": report.ok, "gates": report.to_dict()}
    if today != written: write_json(folder / "results.json", today)
    return today != written


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
    parser.add_argument("runs", nargs="*", metavar="RUN", help="a run's name or folder, as for `kilonb show`")
    parser.add_argument("--judge-again", action="store_true", help="judge every kept result by the gates of today")
    parser.add_argument("--picture", metavar="NAME", help="copy this figure of the last run to nbs/figures")
    parser.add_argument("--figure", default="", metavar="NAME",
                        help="keep this figure as picture.jpg, not the one that stands for the run")
    parser.add_argument("--pictures", action="store_true", help="only write the pictures of results that are kept")
    options = parser.parse_args()
    if not options.runs and not options.judge_again: parser.error("name a run, or give --judge-again")
    try:
        for folder in sorted(path.parent for path in (NOTEBOOKS / "results").glob("*/*/results.json")):
            if options.judge_again and judge_again(folder): print(f"{folder.relative_to(NOTEBOOKS)}: judged again")
        records = [read_run(find_run(name)) for name in options.runs]
        for record in records:
            print(add_picture(record, name=options.figure) or f"{record.name}: no picture" if options.pictures
                  else keep(record, figure=options.figure))
        if options.picture and records: print(keep_picture(records[-1], options.picture))
    except KiloError as error:
        print(f"keep: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__": sys.exit(main())
