"""Fixtures that several test modules share."""
import pytest
from ranks import Ranks

# The files that take longest, longest first: two processes that share the files end at nearly the same time only where
# the last ones are short.
LONGEST = ("kills", "explorers", "sweeps", "multiview", "clauses_245", "fuzz", "flux4d", "orbit", "fit",
           "panorama_checks", "coop", "pose_embedding", "stopping", "cli", "devices", "parallel", "docs",
           "pinpad_sweep", "pose_splatter", "pinpad_agent", "distill", "features", "photographs", "endurance",
           "every_page", "wheel", "packaging")


def pytest_collection_modifyitems(items):
    """Put the tests of the longest files first; the order within a file stays."""
    rank = {f"test_{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(scope="session")
def ranks():
    """Three processes that serve as the ranks of process groups."""
    pool = Ranks(3)
    yield pool
    pool.close()
