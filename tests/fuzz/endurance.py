"""Fuzzing and kills in parts that survive a stop: a finished part is one line of a file in the run's folder."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.fuzz.engine import FAULTS, Tally, Worker, all_readers, fuzz

BLOCK = 250


def read_lines(path: Path) -> list[dict]:
    """The whole lines of a file of one JSON object a line; a last line that was cut short does not count."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def append_line(path: Path, row: dict) -> None:
    """Add one line; a part that an earlier writer left behind is removed first."""
    whole = path.read_bytes() if path.is_file() else b""
    end = whole.rfind(b"\n") + 1
    with open(path, "r+b" if whole else "wb") as file:
        file.truncate(end)
        file.seek(end)
        file.write(json.dumps(row).encode() + b"\n")


def print_block(name: str, done: int, faults: int) -> None:
    """One line after a block of inputs."""
    print(f"{name}: {done} inputs, {faults} faults")


def fuzz_in_blocks(
    folder: Path,
    scratch: Path,
    inputs: int,
    seed: int,
    report: Callable[[str, int, int], None] = print_block,
    names: Sequence[str] = (),
) -> dict[str, Tally]:
    """What `inputs` inputs, shared equally by the readers (rounded up), came to; those in `fuzz.jsonl` are kept.

    folder: holds fuzz.jsonl. scratch: for the readers. report(reader, inputs so far, faults so far) after each block.
    """
    names, path = list(names) or list(all_readers()), folder / "fuzz.jsonl"
    each = -(-inputs // len(names))
    totals = {name: Tally(name) for name in names}
    for row in read_lines(path):
        if row["seed"] == seed and row["reader"] in totals:
            _add(totals[row["reader"]], Tally(**row["tally"]))
    worker = Worker(scratch)
    try:
        for name in names:
            while (first := totals[name].inputs) < each:
                (tally,) = fuzz([name], min(BLOCK, each - first), seed, scratch, first, worker=worker)
                append_line(path, {"reader": name, "seed": seed, "tally": vars(tally)})
                _add(totals[name], tally)
                report(name, totals[name].inputs, len(totals[name].faults))
    finally:
        worker.stop()
    return totals


def _add(total: Tally, part: Tally) -> None:
    total.values += part.values
    total.refused += part.refused
    total.slowest_s = max(total.slowest_s, part.slowest_s)
    total.most_bytes = max(total.most_bytes, part.most_bytes)
    total.faults += part.faults


def fuzz_results(tallies: dict[str, Tally]) -> dict[str, float]:
    """Counts over all readers, as results of a run."""
    faults = [one for tally in tallies.values() for one in tally.faults]
    kinds = {
        "exception": "exceptions",
        "crash": "crashes",
        "hang": "over_2_s",
        "memory": "over_500_mb",
        "silent": "silent_wrong_loads",
        "message": "wrong_messages",
    }
    assert set(kinds) == set(FAULTS)
    return {
        "readers": len(tallies),
        "inputs": sum(one.inputs for one in tallies.values()),
        "inputs_read": sum(one.values for one in tallies.values()),
        "inputs_refused": sum(one.refused for one in tallies.values()),
        **{word: sum(one["ending"] == kind for one in faults) for kind, word in kinds.items()},
        "slowest_input_s": max((one.slowest_s for one in tallies.values()), default=0.0),
        "largest_input_mb": max((one.most_bytes for one in tallies.values()), default=0.0) / 1e6,
    }


def fuzz_rows(tallies: dict[str, Tally]) -> list[list[str]]:
    """One row a reader: inputs, values, refusals, faults, slowest, largest."""
    return [
        [
            name,
            str(one.inputs),
            str(one.values),
            str(one.refused),
            str(len(one.faults)),
            f"{one.slowest_s:.2f}",
            f"{one.most_bytes / 1e6:.0f}",
        ]
        for name, one in tallies.items()
    ]


def kills_in_turn(folder: Path, scratch: Path, count: int, seed: int) -> list[dict]:
    """The records of `count` kills, every kind of command in turn; those in `folder`/kills.jsonl are kept."""
    from tests.fuzz.kills import KINDS, iterate_trials

    path = folder / "kills.jsonl"
    records = [row for row in read_lines(path) if row["seed"] == seed][:count]
    for record in iterate_trials([*KINDS], count, seed, scratch, first=len(records)):
        append_line(path, record)
        records.append(record)
        moment = f"{record['moment_s']:.1f} of {record['unbroken_s']:.1f} s"
        print(f"kill {len(records)}/{count}: {record['kind']} after {moment}")
    return records


def kill_results(records: Sequence[dict]) -> dict[str, float]:
    """Counts over all kills, as results of a run."""
    if not records:
        return {}
    counts = {
        word: sum(bool(record[key]) for record in records)
        for word, key in (
            ("kills_with_loss", "lost"),
            ("kills_half_read", "half_read"),
            ("kills_that_differ", "differs"),
        )
    }
    return {
        "kills": len(records),
        **counts,
        "kills_of_running_commands": sum(not record["ended"] for record in records),
    }


def moment_figure(records: Sequence[dict]) -> Any:
    """When each kill came, by kind of command, as a share of the unbroken command's time."""
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys(record["kind"] for record in records))
    fig, ax = plt.subplots(figsize=(5.5, 2.4), layout="tight")
    for record in records:
        wrong = record["lost"] or record["half_read"] or record["differs"]
        ax.plot(
            min(1.2, record["moment_s"] / record["unbroken_s"]),
            kinds.index(record["kind"]),
            "x" if wrong else ".",
            color="tab:red" if wrong else "tab:blue",
            alpha=0.7,
        )
    ax.set_yticks(range(len(kinds)), kinds)
    ax.set_xlabel("moment of the kill / time of the unbroken command")
    return fig
