"""Commands that are killed at a random moment: nothing half-written is read as whole, and what they are repeated to is
what they would have made. `python -m tests.fuzz.kills` does it any number of times."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.fuzz.kills import KINDS, kill_trials, summary


def check(kinds: list[str], count: int, folder: Path, first: int = 0) -> None:
    records = kill_trials(kinds, count, 1, folder, first)
    assert len(records) == count - first and {record["kind"] for record in records} == {*kinds}
    for record in records: assert not (record["lost"] or record["half_read"] or record["differs"]), record
    print(summary(records))


def test_a_killed_maker_archive_and_restoration_are_repeated_to_the_same_bytes(tmp_path):
    check(["data", "archive", "restore"], 6, tmp_path)


def test_a_killed_fit_goes_on_to_the_same_gaussians(tmp_path):
    """The moment is drawn after the first written file: most of the time before it is that of imports."""
    check(["teacher"], 2, tmp_path, first=1)


@pytest.mark.parametrize("kind", ["training", "sweep"])
def test_a_killed_command_with_a_kernel_goes_on_to_the_same_numbers(kind, tmp_path): check([kind], 1, tmp_path)


def test_every_kind_is_among_these(): assert {*KINDS} == {"data", "archive", "restore", "teacher", "training", "sweep"}
