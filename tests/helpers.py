"""What several test modules share: the command line as a subprocess, and the root of the real data."""
import os
import signal
import sys
from pathlib import Path

import pytest

KILONB = [sys.executable, "-c", "import sys; from kilonb.cli.main import main; sys.exit(main())"]


def real_data(name: str) -> Path:
    """The folder or file `name` of the real data; the test is skipped where KILONB_DATA is unset or lacks it."""
    root = os.environ.get("KILONB_DATA")
    if not root: pytest.skip("KILONB_DATA is unset: it names the folder of the real data")
    path = Path(root) / name
    if not path.exists(): pytest.skip(f"KILONB_DATA has no {name}")
    return path


class StopAt:
    """Ctrl-C in the step of a gaussian fit that requests the n-th picture."""

    def __init__(self, at: int): self.left = at

    def __enter__(self):
        from kilonb.splats.initialization import ViewSet

        self.views, self.original = ViewSet, ViewSet.premultiplied
        def premultiplied(views, index):
            self.left -= 1
            if self.left == 0: os.kill(os.getpid(), signal.SIGINT)
            return self.original(views, index)
        ViewSet.premultiplied = premultiplied

    def __exit__(self, *_): self.views.premultiplied = self.original
