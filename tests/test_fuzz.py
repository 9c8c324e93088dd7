"""Mutated inputs of every reader of outside data end in a sane value or in one KiloError of one sentence.

40 inputs a reader, always the same; `make endure` runs any number. A fault prints its reader and number, with which
`python -m tests.fuzz --show READER:NUMBER` writes the input to a file and shows the traceback.
"""

import os
from pathlib import Path

import pytest

from tests.fuzz.engine import FAULTS, Bench, Reader, Worker, all_readers, fuzz, make_input, wrong_message

INPUTS = 40
READERS = all_readers()


@pytest.fixture(scope="module")
def tallies(tmp_path_factory):
    """What 40 inputs of each reader came to."""
    return {one.reader: one for one in fuzz(list(READERS), INPUTS, seed=0, folder=tmp_path_factory.mktemp("fuzz"))}


@pytest.mark.parametrize("name", READERS)
def test_mutated_inputs_are_read_or_refused_in_one_sentence(tallies, name):
    tally = tallies[name]
    assert not tally.faults, "\n".join(f"{one['number']}: {one['ending']}: {one['detail']}" for one in tally.faults[:5])
    assert tally.inputs == INPUTS
    assert tally.refused or READERS[name].tolerant, "a reader that refuses nothing is not reached by the mutations"


def test_thirty_readers_or_more_are_fuzzed():
    assert len(READERS) >= 30


@pytest.mark.parametrize("name", READERS)
def test_the_unchanged_seeds_are_sane(tallies, name):
    assert tallies[name].unchanged and all(one == ["value", ""] for one in tallies[name].unchanged)


FAULTY = {
    "raises": lambda path: {}["x"],
    "long": lambda path: _kilo("x" * 999),
    "two": lambda path: _kilo("It is bad. Do it again now."),
    "wrong": lambda path: float("nan"),
    "slow": lambda path: [None for _ in range(10**9)] if path.read_bytes() else None,
    "large": lambda path: b"x" * 10**9,
    "dies": lambda path: os.abort(),
}


def _kilo(text):
    from kilonb.core.errors import KiloError

    error = KiloError("")
    error.args = (text,)  # past the exception's own cut
    raise error


def test_a_faulty_reader_is_found(tmp_path):
    """Each kind of fault that a reader in this process can have is told apart."""

    def ending(name, check=lambda value: ""):
        return Bench(Reader(name, "bytes", lambda folder: [b"x"], FAULTY[name], check), tmp_path).run(b"x")[0]

    assert [ending("raises"), ending("long"), ending("two")] == ["exception", "message", "message"]
    assert ending("wrong", lambda value: "NaN" if value != value else "") == "silent"
    assert {"exception", "message", "silent"} <= set(FAULTS)


def test_a_crash_costs_one_input(tmp_path, monkeypatch):
    """A worker that dies, allocates too much or computes too long: one fault, and the next inputs are run."""
    module = tmp_path / "readers_faulty.py"
    module.write_text(
        "import os\n"
        "from tests.fuzz.engine import Reader\n"
        "def read(path):\n"
        "    number = int(path.read_bytes()[:1] or b'0', 36) % 4\n"
        "    if path.read_bytes() == b'seed': return None\n"
        "    if number == 1: os.abort()\n"
        "    if number == 2: return len(b'x' * 10**9)\n"
        "def seeds(folder): return [b'seed']\n"
        "READERS = [Reader('faulty', 'digits', seeds, read)]\n"
    )
    starter = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import tests.fuzz.engine as e, tests.fuzz.mutations as m; "
        "e.MODULES = ('readers_faulty',); m.FAMILIES['digits'] = lambda data, rng, seeds: b'0123'[rng.randrange(4):]; "
        "import tests.fuzz.worker as w; w.all_readers = e.all_readers; w.main()"
    )
    monkeypatch.setattr(Worker, "command", ["-c", starter, str(tmp_path)])
    (tally,) = fuzz(["faulty"], 24, 0, tmp_path)
    kinds = {one["ending"] for one in tally.faults}
    assert tally.inputs == 24 and kinds == {"crash", "memory"} and tally.values


def test_inputs_are_the_same_again():
    reader = READERS["json"]
    seeds = reader.seeds(Path())
    assert [make_input(reader, seeds, 0, i) for i in range(9)] == [make_input(reader, seeds, 0, i) for i in range(9)]
    assert make_input(reader, seeds, 0, 1) != make_input(reader, seeds, 1, 1)


def test_one_sentence_is_told_from_two():
    assert not wrong_message("There is no file a.png: 'r. Big. Name' was given (see. There).")
    assert wrong_message("It is bad. Do it again now.") and wrong_message("a\nb") and wrong_message("x" * 401)


def _cases():
    """The inputs that ended in a traceback, a crash or a silent wrong load in 0.1, where they are here."""
    root = os.environ.get("KILONB_DATA")
    folder = Path(root).parent / "cases" / "fuzz" if root else Path("/nowhere")
    return sorted(one for one in folder.glob("*") if one.suffix in (".bin", ".gz")) if folder.is_dir() else []


SAME = {
    "archive": "archive_restore",
    "data_manifest": "dataset_page",
    "pandaset_json": "pandaset_poses",
    "pickle_table": "pickled_table",
    "png": "rgba",
    "sdist": "sdist_members",
}
CASES = {
    "forged_pointer.pkl.gz": "pickle_table",
    "forged_sweep.pkl.gz": "pickle_table",
    "pax_quadratic.tar.gz": "archive_manifest",
}


def test_inputs_that_failed_in_the_first_version_are_read_or_refused(tmp_path):
    files = _cases()
    if not files:
        pytest.skip("the failing inputs of 0.1 are not here")
    benches, wrong = {}, []
    for file in files:
        name = CASES.get(file.name) or file.name.split("-")[0]
        name = SAME.get(name, name)
        if name not in benches:
            benches[name] = Bench(READERS[name], tmp_path / name)
        ending, detail = benches[name].run(file.read_bytes())
        if ending in FAULTS:
            wrong.append(f"{file.name}: {ending}: {detail}")
    assert not wrong, "\n".join(wrong)
