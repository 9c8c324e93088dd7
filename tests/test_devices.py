"""The tests of devices, in processes of their own: torch accepts an added device only before the first backward pass
of a process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("name", ["alone_devices.py", "alone_fake_devices.py"])
def test_the_tests_of_a_file_pass_in_a_process_of_its_own(name):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", str(HERE / name)], cwd=HERE.parent,
                          env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
