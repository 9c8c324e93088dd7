"""The fuzzer: mutated inputs for each reader, run in a process of its own, and what each of them came to.

An input has one of two right endings: a value that its check accepts, or one KiloError of one sentence of at most 400
characters. Everything else is a fault: another exception, a crash, over 2 s of processor time, over 500 MB of memory, a
value that no user would call right.
"""

import importlib
import json
import os
import random
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODULES = tuple(f"tests.fuzz.{one.stem}" for one in sorted(Path(__file__).parent.glob("readers_*.py")))
MOST_SECONDS, MOST_BYTES, MOST_CHARACTERS = 2.0, 500e6, 400
STALLED_S = 60.0
FAULTS = ("exception", "crash", "hang", "memory", "silent", "message")


@dataclass(frozen=True)
class Reader:
    """A reader of outside data.

    name: unique. kind: the family of mutations (`tests.fuzz.mutations.FAMILIES`). seeds(folder) -> small valid inputs;
    `folder` is scratch. read(path) -> value: reads the file at `path` and changes nothing. check(value) -> what is
    wrong with it, in words; empty: a sane value. prepare(folder) -> the file in a larger layout (a dataset's folder)
    that each input replaces; None: a file of its own, `input` + suffix. tolerant: shows what it can read of a damaged
    file, or makes again what a cache holds, and refuses nothing.
    """

    name: str
    kind: str
    seeds: Callable[[Path], Sequence[bytes]]
    read: Callable[[Path], Any]
    check: Callable[[Any], str] = lambda value: ""
    prepare: Callable[[Path], Path] | None = None
    suffix: str = ""
    tolerant: bool = False


@dataclass
class Tally:
    """What the inputs of one reader came to: numbers of values, of refusals, and the faults with their inputs.

    unchanged: [ending, detail] of each of its seeds, which are valid inputs.
    """

    reader: str
    values: int = 0
    refused: int = 0
    slowest_s: float = 0.0
    most_bytes: float = 0.0
    faults: list[dict] = field(default_factory=list)
    unchanged: list[list[str]] = field(default_factory=list)

    @property
    def inputs(self) -> int:
        """How many inputs were run."""
        return self.values + self.refused + len(self.faults)


def all_readers() -> dict[str, Reader]:
    """Every reader by its name."""
    found = {}
    for module in MODULES:
        for reader in importlib.import_module(module).READERS:
            assert reader.name not in found, f"two readers are called {reader.name}"
            found[reader.name] = reader
    return found


def wrong_message(text: str) -> str:
    """Why a message is not one sentence of at most 400 characters; empty: it is."""
    if len(text) > MOST_CHARACTERS:
        return f"{len(text)} characters"
    if "\n" in text:
        return "a line break"
    outside = re.sub(r"'[^']*'|\"[^\"]*\"|\([^()]*\)", "", text)
    return "two sentences" if re.search(r"[a-z)][.!] +[A-Z][a-z]+ ", outside) else ""


def make_input(reader: Reader, seeds: Sequence[bytes], seed: int, number: int) -> bytes:
    """Input `number` of a reader: one of its seeds, mutated; the same for the same numbers."""
    from tests.fuzz.mutations import mutate

    rng = random.Random(f"{seed}/{reader.name}/{number}")
    return mutate(reader.kind, rng.choice(seeds), rng, seeds)


class Bench:
    """A reader ready to run in this process: its seeds made, its layout prepared in a scratch folder."""

    def __init__(self, reader: Reader, folder: Path) -> None:
        (folder / "seeds").mkdir(parents=True, exist_ok=True)
        self.reader = reader
        self.seeds = [bytes(one) for one in reader.seeds(folder / "seeds")]
        self.path = reader.prepare(folder / "layout") if reader.prepare else folder / f"input{reader.suffix}"
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def put(self, data: bytes) -> None:
        """Write an input where the reader finds it."""
        self.path.unlink(missing_ok=True)
        self.path.write_bytes(data)

    def run(self, data: bytes) -> tuple[str, str]:
        """(ending, detail) of one input: value, refused, exception, silent or message."""
        from kilonb.core.errors import KiloError

        self.put(data)
        try:
            value = self.reader.read(self.path)
        except KiloError as error:
            wrong = wrong_message(str(error))
            return ("message", f"{wrong}: {error}") if wrong else ("refused", str(error))
        except Exception as error:
            return "exception", _where(error)
        try:
            wrong = self.reader.check(value)
        except Exception as error:
            return "silent", f"the value cannot be checked: {_where(error)}"
        return ("silent", wrong) if wrong else ("value", "")


def _where(error: BaseException) -> str:
    """An exception and the innermost line of the package that raised it."""
    trace, place = error.__traceback__, ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "kilonb" in file:
            place = f"{Path(file).parent.name}/{Path(file).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(error).__name__} in {place}: {str(error)[:200]}"


class Worker:
    """A process that runs inputs (tests.fuzz.worker); started again after a crash or a hang."""

    command = ("-m", "tests.fuzz.worker")

    def __init__(self, folder: Path) -> None:
        self.folder, self.process, self.log = folder, None, folder / "worker.log"

    def send(self, reader: str, seed: int, first: int, last: int) -> None:
        """Ask for the inputs first .. last - 1 of a reader."""
        if self.process is None or self.process.poll() is not None:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "0", "MPLBACKEND": "Agg"}
            self.process = subprocess.Popen(
                [sys.executable, *self.command, str(self.folder)],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.log.open("wb"),
                env=environment,
            )
            self.buffer = b""
        self.process.stdin.write(json.dumps([reader, seed, first, last]).encode() + b"\n")
        self.process.stdin.flush()

    def lines(self) -> Iterator[dict | None]:
        """What the worker reports, one at a time; None where it died or said nothing for a minute."""
        while True:
            while b"\n" in self.buffer:
                line, self.buffer = self.buffer.split(b"\n", 1)
                yield json.loads(line)
            if not select.select([self.process.stdout], [], [], STALLED_S)[0]:
                self.stop()
                yield None
                return
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            if not data:
                yield None
                return
            self.buffer += data

    def stop(self) -> int:
        """End the process, if it has not ended by itself; its exit code."""
        if self.process is None:
            return 0
        try:
            return self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
        return self.process.wait()


def fuzz(
    names: Sequence[str],
    inputs: int,
    seed: int,
    folder: Path,
    first: int = 0,
    report: Callable[[Tally], None] = lambda tally: None,
    worker: "Worker | None" = None,
) -> list[Tally]:
    """Run inputs `first` .. `first` + `inputs` - 1 of each reader; `report` is called after each reader.

    worker: one that is used again and stays; None: one for this call.
    """
    given, tallies = worker, []
    worker = given or Worker(folder)
    try:
        for name in names:
            tallies.append(tally := Tally(name))
            _fuzz_one(worker, tally, seed, first, first + inputs)
            report(tally)
    finally:
        if given is None: worker.stop()
    return tallies


def _fuzz_one(worker: Worker, tally: Tally, seed: int, first: int, last: int) -> None:
    """The inputs of one reader; one that ends the worker is a fault, and the rest goes on in a new one."""
    at = first
    while at < last:
        worker.send(tally.reader, seed, at, last)
        ready, began = False, time.monotonic()
        for line in worker.lines():
            if line is None:
                code, stalled = worker.stop(), time.monotonic() - began >= STALLED_S
                if not ready:
                    raise RuntimeError(f"the worker did not start {tally.reader}: {worker.log.read_text()[-2000:]}")
                tally.faults.append(
                    {
                        "reader": tally.reader,
                        "seed": seed,
                        "number": at,
                        "ending": "hang" if stalled else "crash",
                        "detail": f"exit code {code}",
                    }
                )
                at += 1
                break
            began = time.monotonic()
            if "done" in line:
                at = last
            elif "ready" in line:
                ready, tally.unchanged = True, line["unchanged"]
            else:
                at = line["number"] + 1
                _count(tally, line, seed)
            if at == last and "done" in line:
                break


def _count(tally: Tally, line: dict, seed: int) -> None:
    """Add one ending to a tally."""
    tally.slowest_s = max(tally.slowest_s, line["cpu_s"])
    tally.most_bytes = max(tally.most_bytes, line["bytes"])
    ending = line["ending"]
    if ending in ("value", "refused") and line["cpu_s"] > MOST_SECONDS:
        ending = "hang"
    if ending in ("value", "refused") and line["bytes"] > MOST_BYTES:
        ending = "memory"
    if ending == "value":
        tally.values += 1
    elif ending == "refused":
        tally.refused += 1
    else:
        tally.faults.append(
            {
                "reader": tally.reader,
                "seed": seed,
                "number": line["number"],
                "ending": ending,
                "detail": line["detail"],
                "cpu_s": line["cpu_s"],
                "bytes": line["bytes"],
            }
        )
