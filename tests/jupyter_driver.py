"""Drives JupyterLab in headless Chromium: starts a server, opens a notebook, runs it, moves sliders, collects
errors."""
import contextlib
import ctypes
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt install chromium")
PATIENCE_S = 180.0
# Console messages of JupyterLab and Chromium on a machine without a network or a graphics card, whatever the notebook
# is. The last is anywidget's for a widget whose script (plotly's has 5 MB) took over two seconds to load on a busy
# machine; it starts all the same.
NOISE = (r"favicon\.ico", r"ERR_NAME_NOT_RESOLVED", r"ERR_INTERNET_DISCONNECTED", r"ResizeObserver loop",
         r"GL Driver Message", r"GroupMarkerNotSet", r"swiftshader", r"\[anywidget\] Failed to initialize model\.$")


def free_port() -> int:
    """A port of this machine that is not in use."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _end_with_parent() -> None:
    """In the server's process, before it starts: SIGTERM when the process of the tests ends (Linux: prctl with
    PR_SET_PDEATHSIG)."""
    with contextlib.suppress(OSError, AttributeError): ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _process_tree(root: int) -> list:
    """A process and all its descendants, [] where it has ended."""
    import psutil

    try: process = psutil.Process(root)
    except psutil.Error: return []
    return [process, *process.children(recursive=True)]


@dataclass
class Lab:
    """A JupyterLab server: `root` is the folder it shows, `address` where it answers."""

    root: Path
    port: int
    token: str
    process: subprocess.Popen = field(repr=False)
    log: Path = field(repr=False)

    @property
    def address(self) -> str: return f"http://127.0.0.1:{self.port}"

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.address}/api/status?token={self.token}", timeout=5) as reply:
                return reply.status == 200
        except OSError: return False

    def wait(self) -> "Lab":
        deadline = time.monotonic() + PATIENCE_S
        while not self.answers():
            if self.process.poll() is not None:
                raise RuntimeError(f"JupyterLab ended at once:\n{self.log.read_text(errors='replace')[-3000:]}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"JupyterLab did not answer:\n{self.log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.2)
        return self

    def close(self) -> None:
        """End the server and its kernels, which run in sessions of their own; what ignores SIGTERM is killed."""
        import psutil

        family = _process_tree(self.process.pid)
        with contextlib.suppress(OSError): os.killpg(self.process.pid, signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=10)
        for process in alive:
            with contextlib.suppress(psutil.Error): process.kill()
        psutil.wait_procs(alive, timeout=10)
        with contextlib.suppress(subprocess.TimeoutExpired): self.process.wait(10)


@contextlib.contextmanager
def open_lab(folder: Path, environment: dict[str, str] | None = None) -> Iterator[Lab]:
    """A server on `folder / "root"`; its settings, kernels and run-time files stay in `folder`. `environment` reaches
    the kernels."""
    root, port, token = folder / "root", free_port(), secrets.token_hex(16)
    kernel = folder / "share" / "kernels" / "python3"
    for path in (root, kernel): path.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    quiet = folder / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}))
    (kernel / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "python3", "language": "python"}))
    own = {"JUPYTER_PATH": "share", "JUPYTER_DATA_DIR": "data", "JUPYTER_CONFIG_DIR": "config",
           "JUPYTER_RUNTIME_DIR": "runtime", "JUPYTERLAB_SETTINGS_DIR": "settings",
           "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "IPYTHONDIR": "ipython"}
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYDEVD_DISABLE_FILE_VALIDATION": "1",
                   **(environment or {}), **{name: str(folder / path) for name, path in own.items()}}
    environment.pop("MPLBACKEND", None)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
               "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={root}",
               "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
               "--LabApp.extension_manager=readonly", "--ServerApp.terminals_enabled=False",
               "--LabApp.expose_app_in_browser=True"]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=root, env=environment, stdin=subprocess.DEVNULL, stdout=log,
                                   stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_end_with_parent)
    lab = Lab(root, port, token, process, folder / "server.log")
    try: yield lab.wait()
    finally: lab.close()


@contextlib.contextmanager
def open_browser() -> Iterator:
    """A headless Chromium that reaches this machine only, with WebGL in software."""
    from playwright.sync_api import sync_playwright

    options = ["--no-sandbox", "--disable-dev-shm-usage", "--enable-unsafe-swiftshader", "--use-gl=angle",
               "--use-angle=swiftshader", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options, timeout=PATIENCE_S * 1000)
        try: yield browser
        finally: browser.close()


class Notebook:
    """A notebook that is open in JupyterLab: running it, moving its sliders, reading its outputs and errors."""

    def __init__(self, browser, lab: Lab, name: str, width: int = 1500, height: int = 1000):
        self.lab, self.name, self.errors = lab, name, []
        self.page = browser.new_page(viewport={"width": width, "height": height})
        self.page.set_default_timeout(PATIENCE_S * 1000)
        self.page.on("console",
                     lambda message: self.errors.append(f"{message.text} ({message.location.get('url', '')})")
                     if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(f"{lab.address}/doc/tree/{name}?token={lab.token}&reset")
        self.page.wait_for_function("() => window.jupyterapp?.shell?.currentWidget?.sessionContext")
        self.page.evaluate("""async () => { const panel = window.jupyterapp.shell.currentWidget;
                           await Promise.all([panel.context.ready, panel.revealed, panel.sessionContext.ready]); }""")
        self.page.wait_for_selector(".jp-NotebookPanel .jp-CodeCell")
        self.wait_for_idle()

    def wait_for_idle(self) -> None:
        """Wait until the kernel has started and is idle."""
        self.page.wait_for_function("() => "
                                    "window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === "
                                    "'idle'")

    def run_all(self) -> None:
        """Run every cell and wait for the last; a cell that fails ends the run."""
        assert self.page.locator(".jp-CodeCell").count(), "the notebook has no code"
        self.page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
        self.wait_for_idle()

    def error_outputs(self) -> list[str]:
        """The tracebacks shown in the notebook."""
        kinds = ("stderr", "error")
        return self.page.locator(", ".join(f'.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.{kind}"]'
                                           for kind in kinds)).all_inner_texts()

    def console_errors(self) -> list[str]:
        """Errors of the browser's console, without those of `NOISE`."""
        return [text for text in self.errors if not any(re.search(noise, text, re.IGNORECASE) for noise in NOISE)]

    def move_slider(self, selector: str, steps: int = 1, key: str = "ArrowRight") -> None:
        """Focus the slider that `selector` finds, an ipywidget or an `<input type="range">`, and press a key `steps`
        times."""
        handle = self.page.locator(
            f'{selector} .noUi-handle, {selector} input[type="range"], input[type="range"]{selector}'
        ).first
        handle.scroll_into_view_if_needed()
        handle.focus()
        for _ in range(steps): self.page.keyboard.press(key)

    def wait_until(self, expression: str, argument=None) -> None:
        """Wait until a JavaScript function returns a true value."""
        self.page.wait_for_function(expression, arg=argument)

    def screenshot(self, path: Path) -> Path:
        self.page.screenshot(path=str(path))
        return path

    def close(self) -> None: self.page.close()
