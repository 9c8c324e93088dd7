"""Readers of what runs leave behind: status, results, scalars, checkpoints, archives, sweeps, notebooks, options."""

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kilonb.batch.states import describe_state, read_progress, read_watched
from kilonb.batch.sweeps import combinations, read_sweep_file
from kilonb.core.errors import KiloError
from kilonb.core.files import write_json
from kilonb.reports.headline import headline_html, headline_picture
from kilonb.runs.archive import archive_runs
from kilonb.runs.cohorts import read_cohort
from kilonb.runs.comparison import compare_runs, explain_difference
from kilonb.runs.folders import open_run
from kilonb.runs.gate_files import declared_gates, gate_files, gates_by_condition
from kilonb.runs.gates import Gate, check_gates, read_gates
from kilonb.runs.notebooks import find_notebook, read_notebook, split_assignment, typed_values
from kilonb.runs.records import list_runs, read_run
from kilonb.runs.scalars import read_scalars
from kilonb.runs.verdicts import gate_overview, overview_rows
from tests.fuzz.engine import Reader

NUMBERS = {"psnr_db": 31.25, "lpips": 0.1, "ms": 12.5, "scene": "brickyard"}


def _finished_run(outputs: Path, name: str = "one") -> Path:
    """A finished run's folder with all of its files."""
    with open_run(
        "toy", outputs / "toy" / name, {"steps": 20, "rate": 1e-3, "settings": {"toy.width": 3}}, seed=1
    ) as run:
        run.metrics.parent.mkdir(parents=True, exist_ok=True)
        run.metrics.write_text("step,elapsed_s,loss\n20,0.5,0.25\n40,1.0,0.125\n")
        run.finish(NUMBERS, [Gate("psnr_db", at_least=30)], baselines={"psnr_db": 10.0})
    write_json(
        run.folder / "progress.json",
        {
            "heading": "Training",
            "cell": 3,
            "cells": 9,
            "line": "step 20/40",
            "changed": "2026-01-31T00:00:00+00:00",
            "elapsed_s": 3.5,
            "stage": {"name": "train", "step": 20, "of": 40},
        },
    )
    return run.folder


def _file_of_run(name: str) -> dict[str, Callable]:
    """seeds and prepare for one JSON file of a finished run that stands beside another run."""

    def seeds(folder: Path) -> list[bytes]:
        return [(_finished_run(folder) / name).read_bytes()]

    def prepare(folder: Path) -> Path:
        _finished_run(folder, "two")
        return _finished_run(folder) / name

    return {"seeds": seeds, "prepare": prepare}


def _read_everywhere(path: Path) -> Any:
    """Every listing with the run among its runs; then the run itself. The listings must not fail, whatever it holds."""
    outputs = path.parents[2]
    try:
        records = list_runs(outputs)
        compare_runs(records), explain_difference(*records[:2])
        overview_rows(gate_overview(outputs))
    except KiloError as error:
        raise RuntimeError(f"a listing fails: {error}") from error
    if len(records) != 2:
        raise RuntimeError(f"{len(records)} runs are listed, not 2")
    return read_run(path.parent)


def _wrong_record(record: Any) -> str:
    if not math.isfinite(record.elapsed_s) or record.elapsed_s < 0:
        return f"elapsed_s {record.elapsed_s}"
    for name in ("experiment", "status", "started", "error"):
        if not isinstance(getattr(record, name), str):
            return f"{name} is a {type(getattr(record, name)).__name__}"
    for name in ("results", "parameters", "environment", "baselines", "tables"):
        if not isinstance(getattr(record, name), dict):
            return f"{name} is a {type(getattr(record, name)).__name__}"
    for line in record.report.lines:
        if line.verdict == "green" and not (isinstance(line.value, (int, float)) and math.isfinite(line.value)):
            return "green without a number"
    return ""


def _pictured_run(folder: Path) -> Path:
    """A finished run with two figures, one of which is its headline."""
    run = _finished_run(folder)
    (run / "figures").mkdir(exist_ok=True)
    for name in ("predictions", "curves"): Image.new("RGB", (12, 8), "teal").save(run / "figures" / f"{name}.png")
    return run


def _read_headline(path: Path) -> Any:
    folder = path.parent.parent if path.parent.name == "figures" else path.parent
    return folder, headline_picture(folder), headline_html(read_run(folder))[0]


def _wrong_headline(value: Any) -> str:
    folder, picture, shown = value
    if picture is not None and picture.parent != folder / "figures": return f"a headline outside the run: {picture}"
    return "" if shown.startswith("<div") and "<script" not in shown else "no headline"


def _read_gates(path: Path) -> Any:
    gates = read_gates(path)
    return gates, check_gates({"psnr_db": 31.0}, gates)


def _read_gate_file(path: Path) -> Any:
    root, gates = path.parents[2], []
    for name in gate_files(root):
        for own in gates_by_condition(name, root).values(): gates += own
        declared = declared_gates(name, {"steps": 20}, {"kind": "blender", "name": "lego"}, NUMBERS, root)
        check_gates(NUMBERS, declared)
    return [gate for gate in gates if not gate.at_least_result and not gate.at_most_result], None


def _gate_file(folder: Path) -> Path:
    path = folder / "nbs" / "experiments" / "gates.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _wrong_gates(value: Any) -> str:
    for gate in value[0]:
        bounds = [one for one in (gate.at_least, gate.at_most) if one is not None]
        if not bounds or not all(math.isfinite(one) for one in bounds):
            return f"bounds {bounds}"
        if not isinstance(gate.result, str) or not gate.result:
            return "a gate without a result"
    return ""


def _read_scalars(path: Path) -> Any:
    return read_scalars(path.parent)


def _wrong_scalars(value: dict) -> str:
    if any(step < 0 for step in value["step"]):
        return "a negative step"
    return "" if all(one.dtype.kind in "fi" for one in value.values()) else "a column of no numbers"


def _resume_scalars(path: Path) -> Any:
    from kilonb.training.scalars import ScalarLog

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "metrics.csv").write_bytes(path.read_bytes())
        with ScalarLog(folder, resume_step=20) as log:
            log.log(40, {"loss": 0.5})
        return read_scalars(folder)


def _wrong_resumed(value: dict) -> str:
    return _wrong_scalars(value) or (
        "" if max(value["step"]) == 40 and list(value["step"]).count(40) == 1 else "steps after the checkpoint stay"
    )


def _read_watched(path: Path) -> Any:
    state = read_watched(path)
    return state, describe_state(state)


def _wrong_watched(value: Any) -> str:
    state = value[0]
    for name in ("elapsed_s", "eta_s"):
        number = state.get(name)
        if number is not None and not (isinstance(number, (int, float)) and math.isfinite(number)):
            return f"{name} {number}"
    return ""


def _sweep_status(folder: Path) -> list[bytes]:
    run = {
        "name": "0",
        "status": "running",
        "varied": {"seed": 1},
        "results": {"psnr_db": 1.0},
        "gates": "1/1",
        "ok": None,
        "attempt": 1,
        "elapsed_s": 3.0,
        "progress": {"heading": "x", "cell": 1, "cells": 2, "line": "step 1/2", "elapsed_s": 1.0},
    }
    status = {
        "kind": "sweep",
        "status": "running",
        "sweep": "study",
        "experiment": "toy",
        "started": "2026-01-31T00:00:00+00:00",
        "elapsed_s": 3.0,
        "eta_s": 9.0,
        "workers": 2,
        "counts": {"running": 1},
        "runs": [run, {**run, "name": "1"}],
        "process": {"pid": 1, "host": "x"},
    }
    return [json.dumps(status).encode(), *_file_of_run("status.json")["seeds"](folder)]


def _sweep_files(folder: Path) -> list[bytes]:
    return [
        b"experiment: toy\nname: study\nparameters: {steps: 20}\ngrid: {rate: [1.0e-3, 0.01], kind: [a, b]}\n"
        b"seeds: 2\nretries: 1\n"
        b"resources: {cores: 1, gpus: 0, memory_gb: 2.0}\n"
        b"slurm: {queue: main, account: lab, walltime: '01:00:00', jobs: 4, setup: [module load x]}\n",
        b"experiment: toy\nruns:\n- {kind: a, rate: 0.1}\n- {kind: b}\nseeds: [3, 4]\n",
    ]


def _read_sweep(path: Path) -> Any:
    file = read_sweep_file(path)
    return file, combinations(file)


def _wrong_sweep(value: Any) -> str:
    file, runs = value
    if len(runs) > 100_000:
        return f"{len(runs)} runs"
    joined = " ".join(
        [str(file.slurm.queue), str(file.slurm.account), str(file.slurm.walltime), *file.slurm.directives]
    )
    return "a line break in a job script" if "\n" in joined else ""


def _sweep_plan(folder: Path) -> list[bytes]:
    plan = {
        "name": "study",
        "experiment": "toy",
        "varied": ["seed"],
        "commit": "x",
        "runs": [
            {"name": str(i), "varied": {"seed": i}, "digest": "ab", "parameters": {"seed": i, "steps": 20}}
            for i in range(2)
        ],
    }
    return [json.dumps(plan).encode()]


def _sweep_folder(folder: Path) -> Path:
    sweep = folder / "sweeps" / "study"
    for name in ("0", "1"):
        with open_run("toy", sweep / name, {"seed": int(name)}, seed=1) as run:
            run.finish(NUMBERS)
    write_json(sweep / "status.json", json.loads(_sweep_status(folder / "other")[0]))
    return sweep / "sweep.json"


def _read_cohort(path: Path) -> Any:
    cohort = read_cohort(path.parent)
    return [member for member in cohort.members], list(cohort.notes)


def _wrong_cohort(found: Any) -> str:
    members, notes = found
    if not all(isinstance(note, str) and "\n" not in note for note in notes):
        return "a note that is no line of text"
    return "" if all(isinstance(one.key, str) and isinstance(one.varied, dict) for one in members) else "a member"


def _wrong_progress(value: Any) -> str:
    """None, or texts and finite counts."""
    if value is None:
        return ""
    if not all(isinstance(value[name], str) for name in ("heading", "line", "changed")):
        return "a text"
    numbers = [value[name] for name in ("cell", "cells", "elapsed_s") if value[name] is not None]
    return "" if all(type(one) in (int, float) and math.isfinite(one) for one in numbers) else f"{numbers!r:.60}"


def _notebooks(folder: Path) -> list[bytes]:
    cells = [
        {"cell_type": "markdown", "metadata": {}, "id": "m", "source": ["# Title\n", "> A promise."]},
        {
            "cell_type": "code",
            "metadata": {"tags": ["parameters"]},
            "id": "p",
            "source": "steps: int = 3   # how many\nrate: float = 1e-3\nkind: str = 'a'\nrun_dir: str = ''",
            "outputs": [],
            "execution_count": None,
        },
        {
            "cell_type": "code",
            "metadata": {},
            "id": "c",
            "source": ["gates = [Gate('psnr_db', at_least=30)]\n", "x = steps"],
            "outputs": [],
            "execution_count": None,
        },
    ]
    return [json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}).encode()]


def _read_notebook(path: Path) -> Any:
    from kilonb.runs.notebooks import code_cells, count_cells

    notebook = read_notebook(path)
    return notebook, code_cells(notebook), count_cells(notebook), typed_values(notebook, {})


def _wrong_notebook(value: Any) -> str:
    notebook, cells, count, _ = value
    return (
        ""
        if isinstance(notebook.title, str) and all(isinstance(one, str) for one in cells) and count >= 0
        else "no texts"
    )


def _options(folder: Path) -> list[bytes]:
    return [b"steps=20", b"cell_size_m=0.05", b"alpha_weight=0.5", b"data=brickyard", b"resume=true", b"seed=3"]


def _read_option(path: Path) -> Any:
    name, text = split_assignment(path.read_bytes().decode("utf-8", "surrogateescape"))
    values = typed_values(read_notebook(find_notebook("single_view_overfit")), {}, {name: text})
    return values


def _wrong_option(value: Any) -> str:
    todo = [value]
    while todo:
        one = todo.pop()
        if isinstance(one, float) and not math.isfinite(one):
            return f"a number that is {one}"
        if isinstance(one, dict):
            todo.extend(one.values())
        if isinstance(one, (list, tuple)):
            todo.extend(one)
    return ""


def archive_seeds(folder: Path) -> list[bytes]:
    """A run, archived."""
    _finished_run(folder)
    return [archive.path.read_bytes() for archive in archive_runs(list_runs(folder))]


def _checkpoints(folder: Path) -> list[bytes]:
    import torch

    from kilonb.training.checkpoints import random_state, write_checkpoint

    model = torch.nn.Linear(4, 4)
    write_checkpoint(
        folder / "a.pt",
        {
            "step": 4,
            "elapsed_s": 1.5,
            "pending": {},
            "best": {},
            "settings": {"rate": 0.1},
            "optimizer": {},
            "stateful": {},
            "guards": [],
            "random": random_state(),
            "model": model.state_dict(),
        },
    )
    return [(folder / "a.pt").read_bytes()]


def _read_checkpoint(path: Path) -> Any:
    from kilonb.training.checkpoints import check_training_state, read_checkpoint

    content = read_checkpoint(path)
    check_training_state(content, path)
    return content


def _wrong_checkpoint(value: Any) -> str:
    import torch

    todo = [value]
    while todo:
        one = todo.pop()
        if isinstance(one, dict):
            todo.extend(one.values())
        elif isinstance(one, (list, tuple, set)):
            todo.extend(one)
        elif isinstance(one, torch.Tensor):
            one.sum()
        elif not isinstance(one, (str, int, float, bool, type(None), np.generic, torch.dtype, torch.Size)):
            return f"a {type(one).__name__}"
    return ""


READERS = [
    *[
        Reader(
            "run_json" if name == "status" else f"run_{name}",
            "json",
            read=_read_everywhere,
            check=_wrong_record,
            **_file_of_run(f"{name}.json"),
        )
        for name in ("status", "results", "environment", "parameters")
    ],
    Reader(
        "progress_json",
        "json",
        read=lambda path: read_progress(path.parent),
        check=_wrong_progress,
        **_file_of_run("progress.json"),
    ),
    Reader("headline_text", "text", lambda folder: [b"predictions.png", b"none.png"], _read_headline, _wrong_headline,
           prepare=lambda folder: _pictured_run(folder) / "headline.txt", tolerant=True),
    Reader("headline_png", "png", lambda folder: [(_pictured_run(folder) / "figures" / "predictions.png").read_bytes()],
           _read_headline, _wrong_headline, tolerant=True,
           prepare=lambda folder: _pictured_run(folder) / "figures" / "predictions.png"),
    Reader(
        "gates_yaml",
        "yaml",
        lambda folder: [b"- result: psnr_db\n  at_least: 45\n- {result: ms, at_most: 80, notes: 90.5}\n"],
        _read_gates,
        _wrong_gates,
    ),
    Reader(
        "declared_gates_yaml",
        "yaml",
        lambda folder: [b"line:\n  settings: {at_least: [steps]}\n  gates:\n    - when: {kind: blender, data: 'le*'}\n"
                        b"      gates: [{result: '{each}_db', at_least: 3, each: [psnr]}]\n"
                        b"    - {result: ms, at_most_result: lpips, factor: 2.0, unless: {results: {a: {not: 1}}}}\n"],
        _read_gate_file,
        _wrong_gates,
        prepare=_gate_file,
    ),
    Reader(
        "metrics_csv",
        "csv",
        lambda folder: [b"step,elapsed_s,loss,psnr\n20,0.5,0.25,\n40,1.0,0.125,31.5\n"],
        _read_scalars,
        _wrong_scalars,
        prepare=lambda folder: folder / "metrics.csv",
    ),
    Reader(
        "metrics_resume",
        "csv",
        lambda folder: [b"step,elapsed_s,loss\n20,0.5,0.25\n40,1.0,0.125\n60,1.5,0.1\n"],
        _resume_scalars,
        _wrong_resumed,
    ),
    Reader(
        "watch_json",
        "json",
        _sweep_status,
        _read_watched,
        _wrong_watched,
        prepare=lambda folder: folder / "study" / "status.json",
    ),
    Reader("sweep_yaml", "yaml", _sweep_files, _read_sweep, _wrong_sweep),
    Reader("sweep_json", "json", _sweep_plan, _read_cohort, _wrong_cohort, prepare=_sweep_folder, tolerant=True),
    Reader("notebook_json", "json", _notebooks, _read_notebook, _wrong_notebook, suffix=".ipynb"),
    Reader("param_text", "text", _options, _read_option, _wrong_option),
    Reader("checkpoint", "checkpoint", _checkpoints, _read_checkpoint, _wrong_checkpoint, suffix=".pt"),
]
