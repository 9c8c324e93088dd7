"""Readers of the dashboard: whatever a run's files hold, it shows an item, rows or a log, and never fails."""
import math
import shutil
from pathlib import Path
from typing import Any

from kilonb.core.errors import KiloError
from kilonb.core.files import dumps, write_json
from kilonb.reports.dashboard import log_since
from kilonb.reports.hardware import parse_gpus
from kilonb.reports.live_curves import CurveTail, rows_since
from kilonb.reports.live_runs import run_item, scalars_stage, sweep_item
from kilonb.runs.folders import open_run
from kilonb.runs.status import read_status
from kilonb.training.loggers import read_scalar_table
from tests.fuzz.engine import Reader


def _run(folder: Path) -> Path:
    """A running run's folder."""
    shutil.rmtree(folder / "outputs", ignore_errors=True)
    run = open_run("toy", folder / "outputs" / "toy" / "one", {"steps": 40}, seed=1)
    run.metrics.write_text("step,elapsed_s,loss\n10,0.5,0.25\n20,1.0,0.125\n")
    write_json(run.folder / "progress.json",
               {"heading": "Training", "cell": 3, "cells": 9, "line": "x", "elapsed_s": 2.0,
                "stage": {"description": "training", "step": 10, "total": 40, "values": {"loss": 0.5}, "eta_s": 9.0}})
    return run.folder


def _file(name: str) -> dict[str, Any]:
    return {"seeds": lambda folder: [(_run(folder / "seed") / name).read_bytes()],
            "prepare": lambda folder: _run(folder) / name}


def _item(path: Path) -> dict[str, Any]: return run_item(path.parent, "toy/one")


def _wrong_item(item: dict[str, Any]) -> str:
    if len(dumps(item)) > 20_000: return "an item is long"
    texts = [value for value in item.values() if isinstance(value, str)]
    return "a text is not printable" if not all(text.isprintable() for text in texts) else ""


def _curves(path: Path) -> dict[str, Any]:
    tail = CurveTail(path)
    tail.update()
    return {**rows_since(tail, 0, 0), **scalars_stage(path.parent)}


def _wrong_curves(reply: dict[str, Any]) -> str:
    dumps(reply)
    uneven = [name for name, (x, y) in reply["curves"].items() if len(x) != len(y) or len(x) > 1002]
    return f"curves of unequal or great length: {uneven}" if uneven else ""


def _sweep(path: Path) -> dict[str, Any]: return sweep_item(read_status(path.parent) or {}, "sweeps/study")


def _sweep_seed(folder: Path) -> list[bytes]:
    rows = [{"name": "a", "status": "failed", "error": "out of memory", "varied": {"rate": 0.1}, "attempt": 1},
            {"name": "b", "status": "running", "progress": {"stage": {"step": 1, "total": 4, "eta_s": 3.0}}}]
    return [dumps({"kind": "sweep", "status": "interrupted", "counts": {"failed": 1}, "runs": rows}).encode()]


def _study(folder: Path) -> Path:
    (folder / "study").mkdir(parents=True, exist_ok=True)
    return folder / "study" / "status.json"


def _table(path: Path) -> dict[str, Any]: return read_scalar_table(path)


def _wrong_table(table: dict[str, Any]) -> str:
    return "a step below 0" if any(step < 0 for rows in table.values() for step, _ in rows) else ""


def _cards(path: Path) -> list[dict[str, Any]]:
    try: return parse_gpus(path.read_bytes().decode())
    except UnicodeDecodeError as error: raise KiloError(f"{path.name} is not text: byte {error.start}.") from None


def _wrong_cards(cards: list[dict[str, Any]]) -> str:
    numbers = [value for card in cards for name, value in card.items() if name != "name" and value is not None]
    if not all(math.isfinite(value) for value in numbers): return "a number that is not finite"
    return "" if all(card["name"].isprintable() for card in cards) and isinstance(cards, list) else "an odd name"


def _wrong_log(reply: dict[str, Any]) -> str:
    text = reply["text"]
    if len(text) > 32_768 or not isinstance(reply["size"], int): return "a long text, or no size"
    return "" if all(letter.isprintable() or letter in "\n\t" for letter in text) else "control characters"


READERS = [
    *[Reader(f"dashboard_{name}", "json", read=_item, check=_wrong_item, tolerant=True, **_file(f"{name}.json"))
      for name in ("status", "progress", "parameters")],
    Reader("dashboard_curves", "csv", read=_curves, check=_wrong_curves, tolerant=True, **_file("metrics.csv")),
    Reader("dashboard_log", "text", lambda folder: [b"\x1b[1mtraining\x1b[0m 3/9\r\n"],
           lambda path: log_since(path.parent), _wrong_log, prepare=lambda folder: folder
           / "log.txt", tolerant=True),
    Reader("dashboard_sweep", "json", _sweep_seed, _sweep, _wrong_item, prepare=_study),
    Reader("scalars_csv", "csv", lambda folder: [b"step,name,value,time\n1,loss,0.5,1.5\n2,loss,0.25,2.5\n"], _table,
           _wrong_table),
    Reader("gpu_csv", "csv", lambda folder: [b"NVIDIA H200, 37, 2048, 143771, 41\n"], _cards, _wrong_cards,
           tolerant=True),
]
