"""Fixtures that several test modules share."""
import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def ranks():
    """Three processes that serve as the ranks of process groups."""
    pool = Ranks(3)
    yield pool
    pool.close()
