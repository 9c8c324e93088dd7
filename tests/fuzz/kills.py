"""Kills commands at random moments, checks that nothing half-written is read as whole, repeats them until they are
done, and compares with a run that was never killed: `python -m tests.fuzz.kills --count 100 --seed 0`.

Six kinds: `training` (`kilonb run` of a small notebook), `teacher` (a fit of gaussians with checkpoints), `data` (a
maker of a synthetic dataset), `archive` and `restore` (`kilonb runs`), `sweep` (`kilonb sweep` with one worker). The
moment is uniform between the start of the command and the time that the unbroken one took, and in every second round
of the kinds between its first written file and its end. SIGKILL goes to every
process of the command: its descendants, and all processes that carry the trial's mark in their environment, since the
kernel of a notebook sits in a session of its own.
"""
import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from kilonb.core.compiling import COMPILING
from kilonb.core.processes import sweep_leftovers

CHECKOUT = Path(__file__).resolve().parents[2]
PYTHON = [sys.executable, "-c"]
KILONB = [*PYTHON, "import sys; from kilonb.cli.main import main; sys.exit(main())"]
MARK = "KILONB_KILL_TRIAL"

CELLS = ['rate: float = 0.01\nsteps: int = 150\nseed: int = 0\ndata: str = ""\nrun_dir: str = ""\nresume: bool = False',
         "from kilonb.runs.folders import open_run\nrun = open_run('toy', run_dir, {}, seed=seed, resume=resume)",
         """import time, torch
from kilonb.training.checkpoints import seed_everything
from kilonb.training.loop import LoopConfig, train
seed_everything(seed)
model = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
def step_function(step, generator):
    time.sleep(0.01)
    x = torch.rand(64, 3, generator=generator) + 0.1 * torch.rand(1)
    return {"loss": (model(x)[:, 0] - x.prod(-1)).square().mean()}
config = LoopConfig(steps, rate, 5, log_every_steps=5, seed=seed, checkpoint_every_seconds=0.1)
result = train(step_function, torch.optim.Adam(model.parameters()), config, model=model, folder=run.folder,
               resume=run.resumed, quiet=True)""",
         "run.finish({'loss': result.records[-1]['loss'],\n"
         "            'weights': sum(float(p.double().sum()) for p in model.parameters())})"]
SHORT_CELLS = [CELLS[0].replace("150", "20"), *CELLS[1:]]

TEACHER = """import sys
from pathlib import Path
from kilonb.core.compiling import announce_compiling
from kilonb.scenes.blender import load_blender
from kilonb.splats.fit import fit_gaussians
from kilonb.splats.fit_config import FitConfig
from kilonb.training.checkpoints import seed_everything
seed_everything(0)
announce_compiling()
config = FitConfig(steps=40, initial_count=150, maximum_count=300, sh_degree=0, grow_every_steps=10,
                   evaluate_every_steps=20)
fit_gaussians(load_blender(Path(sys.argv[1]), "train"), config, Path(sys.argv[2]), resume=True, quiet=True,
              checkpoint_every_seconds=0.15)"""
DATA = """import sys
from kilonb.data.generation import make
make("brickyard", sys.argv[1], width=24, height=16, train=4, test=2)"""


class Kind:
    """One kind of command, in the folder of a trial. `setup` is what all trials of the kind share."""

    def __init__(self, setup: Path): self.setup = setup

    def prepare_setup(self) -> None:
        """Make what the trials share."""

    def prepare(self, folder: Path) -> None:
        """Make what one trial needs."""

    def command(self, folder: Path) -> list[str]:
        """The command, the same after a kill unless it has to be told to go on."""
        raise NotImplementedError

    def phase(self, folder: Path) -> str:
        """How far the command has come, in a word."""
        return ""

    def has_begun(self, folder: Path) -> bool:
        """Whether the command has written something."""
        raise NotImplementedError

    def faults(self, folder: Path) -> list[str]:
        """What is read as whole although it is not; empty where all is well."""
        return []

    def lost(self, folder: Path) -> list[str]:
        """What existed before the command, or was finished by it, and is gone."""
        return []

    def is_done(self, folder: Path) -> bool:
        """Whether the command has nothing left to do."""
        raise NotImplementedError

    def outcome(self, folder: Path) -> Any:
        """The result, equal for a broken and an unbroken run."""
        raise NotImplementedError


def write_notebook(folder: Path, cells: Sequence[str]) -> Path:
    """A notebook of code cells, the first tagged as parameters."""
    entries = [{"cell_type": "code", "metadata": {"tags": ["parameters"] if i == 0 else []}, "source": source,
                "id": f"c{i}", "outputs": [], "execution_count": None} for i, source in enumerate(cells)]
    path = folder / "toy.ipynb"
    path.write_text(json.dumps({"cells": entries, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return path


def digest_of(value: Any) -> Any:
    """A value with every tensor and array by its type, shape and bytes; times and seconds are left out."""
    if hasattr(value, "detach"): value = value.detach().cpu().numpy()
    if hasattr(value, "tobytes"):
        return [str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, dict):
        return {str(key): digest_of(one) for key, one in sorted(value.items(), key=lambda item: str(item[0]))
                if not str(key).endswith(("_s", "seconds", "_mb", "per_second"))}
    if isinstance(value, (list, tuple)): return [digest_of(one) for one in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def checkpoint_digest(folder: Path) -> Any:
    """The newest checkpoint of a run by its tensors; None where there is none."""
    from kilonb.training.checkpoints import final_path, latest_path, read_checkpoint

    path = next((path for path in (final_path(folder), latest_path(folder)) if path.exists()), None)
    return None if path is None else digest_of(read_checkpoint(path))


def scalar_table(folder: Path) -> Any:
    """The scalars of a run without those that are times."""
    from kilonb.runs.scalars import read_scalars

    return digest_of({name: column for name, column in read_scalars(folder).items() if "second" not in name})


def listing_faults(outputs: Path) -> list[str]:
    """Runs and archives under `outputs` that cannot be read, files of runs that are no JSON, damaged checkpoints."""
    from kilonb.core.errors import KiloError
    from kilonb.runs.archive import list_archives
    from kilonb.runs.records import list_runs

    found = [f"{record.name}: {record.error}" for record in list_runs(outputs, sweeps=True)
             if record.status == "unreadable"]
    found += [f"{archive.path.name}: {archive.error}" for archive in list_archives(outputs) if archive.error]
    for path in outputs.rglob("*"):
        if any(part.startswith(".") for part in path.relative_to(outputs).parts) or not path.is_file(): continue
        try:
            if path.suffix == ".json": json.loads(path.read_text(encoding="utf-8"))
            if path.suffix == ".pt": checkpoint_digest(path.parent.parent)
        except (ValueError, KiloError) as error: found.append(f"{path.relative_to(outputs)}: {error}")
    return found


def status_word(folder: Path) -> str:
    """The status that a run or sweep wrote last."""
    try: return json.loads((folder / "status.json").read_text())["status"]
    except (OSError, ValueError, KeyError): return "not begun"


class Training(Kind):
    """`kilonb run` of a notebook with checkpoints every tenth of a second."""

    def prepare_setup(self) -> None: write_notebook(self.setup, CELLS)

    def command(self, folder: Path) -> list[str]:
        again = ["--resume"] if (folder / "outputs/toy/one/status.json").exists() else []
        return [*KILONB, "run", str(self.setup / "toy.ipynb"), "--out", str(folder / "outputs/toy/one"), *again]

    def has_begun(self, folder: Path) -> bool: return (folder / "outputs/toy/one/metrics.csv").exists()

    def phase(self, folder: Path) -> str:
        run = folder / "outputs/toy/one"
        return status_word(run) + (", checkpoint" if (run / "checkpoints/latest.pt").exists() else "")

    def faults(self, folder: Path) -> list[str]: return listing_faults(folder / "outputs")

    def is_done(self, folder: Path) -> bool: return status_word(folder / "outputs/toy/one") == "finished"

    def outcome(self, folder: Path) -> Any:
        run = folder / "outputs/toy/one"
        results = json.loads((run / "results.json").read_text())["results"]
        return [digest_of(results), checkpoint_digest(run), scalar_table(run)]


class Teacher(Kind):
    """A fit of gaussians to pictures, resumed from its checkpoint or, before the first one, begun again."""

    def prepare_setup(self) -> None:
        subprocess.run([*PYTHON, DATA, str(self.setup / "data")], check=True, cwd=CHECKOUT, capture_output=True)

    def command(self, folder: Path) -> list[str]:
        return [*PYTHON, TEACHER, str(self.setup / "data"), str(folder / "fit")]

    def has_begun(self, folder: Path) -> bool: return (folder / "fit").exists()

    def phase(self, folder: Path) -> str:
        if (folder / "fit/evaluations.json").exists(): return "written"
        if (folder / "fit/checkpoints/latest.pt").exists(): return "checkpoint"
        return "before the first checkpoint" if (folder / "fit").exists() else "not begun"

    def faults(self, folder: Path) -> list[str]: return _fit_faults(folder / "fit")

    def is_done(self, folder: Path) -> bool: return (folder / "fit/evaluations.json").exists()

    def outcome(self, folder: Path) -> Any:
        fit = folder / "fit"
        teacher = hashlib.sha256((fit / "teacher.ply").read_bytes()).hexdigest()
        scores = digest_of(json.loads((fit / "evaluations.json").read_text()))
        return [teacher, scores, checkpoint_digest(fit), scalar_table(fit)]


def _fit_faults(fit: Path) -> list[str]:
    from kilonb.core.errors import KiloError
    from kilonb.splats.ply import read_ply

    try:
        checkpoint_digest(fit)
        if (fit / "teacher.ply").exists(): read_ply(fit / "teacher.ply")
        if (fit / "evaluations.json").exists(): json.loads((fit / "evaluations.json").read_text())
    except (KiloError, ValueError) as error: return [str(error)]
    return []


class Data(Kind):
    """A maker that writes a synthetic dataset."""

    def command(self, folder: Path) -> list[str]: return [*PYTHON, DATA, str(folder / "data/bricks")]

    def has_begun(self, folder: Path) -> bool: return (folder / "data").exists()

    def phase(self, folder: Path) -> str:
        if (folder / "data/bricks").exists(): return "written"
        return "writing" if (folder / "data").exists() else "not begun"

    def faults(self, folder: Path) -> list[str]:
        from kilonb.data.verification import verify_folder

        if not (folder / "data/bricks").exists(): return []
        report = verify_folder(folder / "data/bricks")
        return ["a dataset without its MANIFEST.json"] if report is None else [] if report.ok else [report.summary()]

    def is_done(self, folder: Path) -> bool: return (folder / "data/bricks").exists()

    def outcome(self, folder: Path) -> Any:
        from kilonb.core.hashing import hash_folder

        left = [path.name for path in (folder / "data").iterdir()]
        return [hash_folder(folder / "data/bricks"), left]


def folder_digest(folder: Path) -> Any:
    """Every file, link and folder below `folder`: path -> mode and content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink(): found[name] = ["link", os.readlink(path)]
        elif path.is_dir(): found[name] = ["folder"]
        else: found[name] = [oct(path.stat().st_mode), hashlib.sha256(path.read_bytes()).hexdigest()]
    return found


class Archive(Kind):
    """`kilonb runs archive` of a finished run of 24 MB."""

    def prepare_setup(self) -> None:
        from kilonb.runs.folders import open_run

        run = open_run("toy", self.setup / "outputs/toy/one", {"seed": 0}, {}, seed=0)
        data = random.Random(0).randbytes(8_000_000)
        for name in ("first", "second"): (run.checkpoints / f"{name}.bin").write_bytes(data)
        (run.folder / "notes.txt").write_text("notes " * 1_300_000)
        (run.folder / "empty").mkdir()
        run.finish({"psnr_db": 31.0})

    def prepare(self, folder: Path) -> None: shutil.copytree(self.setup / "outputs", folder / "outputs", symlinks=True)

    def command(self, folder: Path) -> list[str]: return [*KILONB, "runs", "archive", "toy/one", "--yes"]

    def has_begun(self, folder: Path) -> bool: return any((folder / "outputs/archive").glob("*"))

    def phase(self, folder: Path) -> str:
        here, packed = (folder / "outputs/toy/one").exists(), list((folder / "outputs").glob("archive/*.tar.gz"))
        return ("run" if here else "") + (" and archive" if here and packed else "archive" if packed else "")

    def faults(self, folder: Path) -> list[str]:
        found, run = listing_faults(folder / "outputs"), folder / "outputs/toy/one"
        if run.exists() and folder_digest(run) != folder_digest(self.setup / "outputs/toy/one"):
            found.append("a part of the run is left in its place")
        return found

    def lost(self, folder: Path) -> list[str]: return [] if self.phase(folder) else ["neither the run nor its archive"]

    def is_done(self, folder: Path) -> bool: return self.phase(folder) == "archive"

    def outcome(self, folder: Path) -> Any:
        (path,) = (folder / "outputs/archive").glob("*.tar.gz")
        with tarfile.open(path) as tar:
            first, *others = tar.getmembers()
            manifest = json.loads(tar.extractfile(first).read())
            members = [[one.name, one.size, one.mode, int(one.mtime),
                        hashlib.sha256(tar.extractfile(one).read()).hexdigest()] for one in others]
        sweep_leftovers(path.parent)        # as the next command does: the killed one may have been removing the run
        left = [one.name for one in (folder / "outputs/toy").iterdir()] + [one.name for one in path.parent.iterdir()]
        return [{key: value for key, value in manifest.items() if key != "packed"}, members, left]


class Restore(Archive):
    """`kilonb runs restore` of the archive of that run."""

    def prepare_setup(self) -> None:
        from kilonb.runs.archive import archive_runs
        from kilonb.runs.records import read_run

        super().prepare_setup()
        shutil.copytree(self.setup / "outputs/toy/one", self.setup / "whole")
        archive_runs([read_run(self.setup / "outputs/toy/one")])

    def command(self, folder: Path) -> list[str]:
        return [*KILONB, "runs", "restore", str(folder / "outputs/archive/toy-one.tar.gz")]

    def has_begun(self, folder: Path) -> bool: return any((folder / "outputs/toy").glob("*"))

    def faults(self, folder: Path) -> list[str]:
        found, run = listing_faults(folder / "outputs"), folder / "outputs/toy/one"
        if run.exists() and folder_digest(run) != folder_digest(self.setup / "whole"):
            found.append("a part of the run was restored")
        return found

    def lost(self, folder: Path) -> list[str]: return [] if "archive" in self.phase(folder) else ["the archive"]

    def is_done(self, folder: Path) -> bool: return (folder / "outputs/toy/one").exists()

    def outcome(self, folder: Path) -> Any:
        return [folder_digest(folder / "outputs/toy/one"), [one.name for one in (folder / "outputs/toy").iterdir()]]


class Sweep(Kind):
    """`kilonb sweep` of two runs of a notebook, one after the other."""

    def prepare_setup(self) -> None:
        write_notebook(self.setup, SHORT_CELLS)
        (self.setup / "study.yaml").write_text("experiment: toy.ipynb\ngrid: {rate: [0.01, 0.02]}\n")

    def command(self, folder: Path) -> list[str]:
        return [*KILONB, "sweep", str(self.setup / "study.yaml"), "--workers", "1"]

    def has_begun(self, folder: Path) -> bool: return any((folder / "outputs/sweeps/study").glob("[0-9]*"))

    def phase(self, folder: Path) -> str:
        runs = sorted((folder / "outputs/sweeps/study").glob("[0-9]*/status.json"))
        return ", ".join([status_word(folder / "outputs/sweeps/study"), *(status_word(run.parent) for run in runs)])

    def faults(self, folder: Path) -> list[str]: return listing_faults(folder / "outputs")

    def is_done(self, folder: Path) -> bool: return status_word(folder / "outputs/sweeps/study") == "finished"

    def outcome(self, folder: Path) -> Any:
        found = {}
        for path in sorted((folder / "outputs/sweeps/study").glob("*/results.json")):
            results = json.loads(path.read_text())["results"]
            number = path.parent.name.partition("-")[0]       # the rest is a digest of parameters and code
            found[number] = [digest_of(results), checkpoint_digest(path.parent), scalar_table(path.parent)]
        return found


KINDS: dict[str, type[Kind]] = {"training": Training, "teacher": Teacher, "data": Data, "archive": Archive,
                                "restore": Restore, "sweep": Sweep}
FOREVER_S = 180.0


def start(kind: Kind, folder: Path, mark: str) -> subprocess.Popen:
    """The command of a kind as a process of a session of its own."""
    environment = {**os.environ, MARK: mark, "KILONB_OUTPUTS": str(folder / "outputs"), "OMP_NUM_THREADS": "1"}
    environment.pop("KILONB_DATA", None)
    with open(folder / "log.txt", "ab") as log:
        return subprocess.Popen(kind.command(folder), cwd=CHECKOUT, env=environment, stdin=subprocess.DEVNULL,
                                stdout=log, stderr=log, start_new_session=True)


def marked_processes(mark: str) -> list[psutil.Process]:
    """The processes that carry the trial's mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark: found.append(process)
        except psutil.Error: continue
    return found


def kill_tree(process: subprocess.Popen, mark: str) -> int:
    """SIGKILL to every process of a trial, until there is none; returns how many."""
    killed = 0
    try: family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess: family = []
    while family:
        for one in family:
            try:
                one.send_signal(signal.SIGKILL)
                killed += 1
            except psutil.Error: continue
        if process.poll() is None: process.wait(30)
        psutil.wait_procs(family, 10)
        family = marked_processes(mark)
    return killed


def wait_until_begun(kind: Kind, folder: Path, process: subprocess.Popen) -> None:
    """Return when the command has written something, or has ended."""
    while process.poll() is None and not kind.has_begun(folder): time.sleep(0.005)


def run_to_end(kind: Kind, folder: Path, mark: str) -> tuple[int, str]:
    """(exit status, last line of the log) of the command, left alone."""
    process = start(kind, folder, mark)
    try: code = process.wait(FOREVER_S)
    except subprocess.TimeoutExpired:
        kill_tree(process, mark)
        return 124, f"no end after {FOREVER_S:g} s"
    return code, _last_line(folder)


def _last_line(folder: Path) -> str:
    lines = (folder / "log.txt").read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""


class Reference:
    """A kind with its shared files, the outcome of the unbroken command and the seconds that it took."""

    def __init__(self, name: str, folder: Path):
        self.kind = KINDS[name](folder / "setup")
        self.kind.setup.mkdir(parents=True)
        self.kind.prepare_setup()
        self._run_unbroken(name, folder / "unbroken")
        if COMPILING in (folder / "unbroken/log.txt").read_text(): self._run_unbroken(name, folder / "compiled")

    def _run_unbroken(self, name: str, unbroken: Path) -> None:
        """Run the command to its end, and keep its times and its outcome."""
        unbroken.mkdir()
        self.kind.prepare(unbroken)
        started = time.monotonic()
        process = start(self.kind, unbroken, uuid.uuid4().hex)
        wait_until_begun(self.kind, unbroken, process)
        self.begun_s = time.monotonic() - started
        code = process.wait(FOREVER_S)
        self.seconds = time.monotonic() - started
        if code: raise RuntimeError(f"The unbroken command of {name} ended with {code}: {_last_line(unbroken)}")
        self.outcome = self.kind.outcome(unbroken)


def one_trial(name: str, reference: Reference, folder: Path, chance: random.Random,
              begun: bool = False) -> dict[str, Any]:
    """Kills one command once, repeats it to its end and compares; the record of the trial.

    begun: the moment is drawn after the first written file.
    """
    kind, mark = reference.kind, uuid.uuid4().hex
    folder.mkdir(parents=True)
    kind.prepare(folder)
    process, started = start(kind, folder, mark), time.monotonic()
    if begun: wait_until_begun(kind, folder, process)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(chance.uniform(0.0, reference.seconds - begun * reference.begun_s))
    moment = time.monotonic() - started
    ended = process.poll() is not None
    killed = kill_tree(process, mark)
    phase, faults, lost = kind.phase(folder), kind.faults(folder), kind.lost(folder)
    attempts, code, last = 0, 0, ""
    while not kind.is_done(folder) and attempts < 3:
        attempts += 1
        code, last = run_to_end(kind, folder, mark)
        kill_tree(process, mark)
        faults += kind.faults(folder)
        lost += kind.lost(folder)
    differs = not kind.is_done(folder) or _differs(kind, folder, reference.outcome)
    return {"kind": name, "moment_s": round(moment, 3), "unbroken_s": round(reference.seconds, 3), "begun": begun,
            "phase": phase,
            "ended": ended, "processes": killed, "resumed": attempts, "lost": lost, "half_read": faults,
            "differs": bool(differs), "message": last if code or differs else ""}


def _differs(kind: Kind, folder: Path, expected: Any) -> bool:
    """Whether the outcome of a repeated command is another; both are then kept in differs.json."""
    found = kind.outcome(folder)
    if found != expected: (folder / "differs.json").write_text(json.dumps([expected, found], indent=1, default=str))
    return found != expected


def kill_trials(kinds: Sequence[str], count: int, seed: int, folder: str | os.PathLike,
                first: int = 0) -> list[dict[str, Any]]:
    """Records of the trials `first` .. `count` - 1 of the `kinds` in turn.

    folder: for their files. Every record holds kind, moment_s, phase, resumed (how often the command was repeated),
    lost and half_read (sentences; empty where all is well), differs, message. The same seed draws the same shares of
    the unbroken time.
    """
    return list(iterate_trials(kinds, count, seed, folder, first))


def iterate_trials(kinds: Sequence[str], count: int, seed: int, folder: str | os.PathLike, first: int = 0):
    """The records of the trials `first` .. `count` - 1, one by one; a trial without a fault leaves no files."""
    references: dict[str, Reference] = {}
    root = Path(tempfile.mkdtemp(prefix="kills-", dir=folder))
    for number in range(first, count):
        name = kinds[number % len(kinds)]
        if name not in references: references[name] = Reference(name, root / name)
        trial = root / f"{number:05d}-{name}"
        record = one_trial(name, references[name], trial, random.Random(f"{seed} {number}"),
                           begun=number // len(kinds) % 2 == 1)
        if not (record["lost"] or record["half_read"] or record["differs"]): shutil.rmtree(trial)
        yield {"number": number, "seed": seed, **record}
    if not any(root.glob("[0-9]*-*")): shutil.rmtree(root)


def summary(records: Sequence[dict[str, Any]]) -> str:
    """The counts of the trials in one sentence."""
    count = lambda key: sum(bool(record[key]) for record in records)
    by_kind = ", ".join(f"{name} {sum(record['kind'] == name for record in records)}" for name in KINDS)
    return (f"{len(records)} kills ({by_kind}): {count('lost')} lost something, {count('half_read')} left something "
            f"half-written that is read as whole, {count('differs')} ended in other numbers than the unbroken run.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS], default=[*KINDS])
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="for the files of the trials")
    parser.add_argument("--log", default="", help="one JSON line a trial is appended; trials in it are not repeated")
    options = parser.parse_args()
    path = Path(options.log) if options.log else None
    lines = path.read_text().splitlines() if path and path.exists() else []
    records = [record for record in map(json.loads, lines) if record["seed"] == options.seed]
    for record in iterate_trials(options.kinds, options.count, options.seed, options.folder, first=len(records)):
        records.append(record)
        print(json.dumps(record), flush=True)
        if path:
            with open(path, "a") as file: file.write(json.dumps(record) + "\n")
    print(summary(records))
    return int(any(record["lost"] or record["half_read"] or record["differs"] for record in records))


if __name__ == "__main__": sys.exit(main())
