"""The dashboard: follows runs from their files, in Chromium too; a frozen page needs no server. Needs Chromium (Debian:
apt install chromium) for the tests that open it."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from helpers import KILONB
from PIL import Image

from kilonb.core.errors import KiloError
from kilonb.core.files import write_json
from kilonb.core.processes import this_process
from kilonb.reports.dashboard import Dashboard, open_dashboard, picture_reply, write_dashboard
from kilonb.runs.folders import open_run
from kilonb.runs.gates import Gate
from kilonb.runs.status import FAILED, mark_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt install chromium")
EVIL = "<img src=x onerror=document.title='gone'>"
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
# A run of its own process that trains for 400 steps, and waits at step 200 for the file `go`.
LIVE = """import sys, time
from pathlib import Path
import torch
from kilonb.runs.gates import Gate
from kilonb.training.loop import LoopConfig, train
from kilonb.training.session import open_session
outputs = Path(sys.argv[1])
session = open_session("line", {"steps": 400, "seed": 1, "run_dir": str(outputs / "line" / "live")}, devices=["cpu"])
model = torch.nn.Linear(3, 1)
def loss(step, generator):
    while step >= 200 and not (outputs / "go").exists(): time.sleep(0.05)
    time.sleep(0.01)
    return {"loss": model(torch.rand(3, generator=generator)).square().sum()}
config = LoopConfig(400, warmup_steps=0, log_every_steps=10)
train(loss, torch.optim.Adam(model.parameters(), 0.01), config, model=model, folder=session.folder, quiet=True)
session.finish({"loss": 0.0025}, [Gate("loss", at_most=0.01)])
"""


def write_runs(outputs: Path) -> None:
    """A finished run with a picture, a failed one whose error looks like HTML, a sweep with a queue."""
    with open_run("line", outputs / "line" / "done", {"steps": 40}, seed=1) as run:
        run.metrics.write_text("step,elapsed_s,loss\n10,0.5,1.0\n20,1.0,0.5\n")
        run.save_figure(Image.new("RGB", (60, 40), "teal"), "view")
        (run.folder / "log.txt").write_text(f"\x1b[1mtraining 20/40\x1b[0m\n{EVIL}\n")
        run.finish({"psnr_db": 31.0}, [Gate("psnr_db", at_least=30.0)])
    run = open_run("other", outputs / "other" / "bad", {"steps": 40}, seed=1)
    mark_run(run.folder, FAILED, EVIL)
    rows = [{"name": f"rates_{i}", "status": status, "error": EVIL if status == "failed" else "",
             "varied": {"rate": i}} for i, status in enumerate(("finished", "failed", "running", "waiting", "waiting"))]
    (outputs / "sweeps" / "rates").mkdir(parents=True)
    write_json(outputs / "sweeps" / "rates" / "status.json",
               {"kind": "sweep", "sweep": "rates", "experiment": "line", "status": "running", "runs": rows,
                "process": this_process(), "eta_s": 60.0})


@pytest.fixture
def outputs(tmp_path) -> Path:
    write_runs(tmp_path / "outputs")
    return tmp_path / "outputs"


def ask(server, path: str) -> dict:
    with DIRECT.open(server.address + path) as reply: return json.loads(reply.read())


# --- what the server answers

def test_only_what_changed_is_sent(outputs):
    board = Dashboard(outputs)
    first = board.state()
    assert {item["key"] for item in first["items"]} == {"line/done", "other/bad", "sweeps/rates"}
    assert board.state(first["number"])["items"] == []
    with open_run("line", outputs / "line" / "second", seed=1) as run:
        assert [item["key"] for item in board.state(first["number"])["items"]] == ["line/second"]
        run.finish({})
    shutil.rmtree(outputs / "other")
    later = board.state(first["number"])
    assert later["gone"] == ["other/bad"] and later["items"][0]["status"] == "finished"


def test_the_status_files_of_ended_runs_are_read_once(outputs, monkeypatch):
    import kilonb.reports.live_runs as module

    read = []
    reading = module.read_status
    monkeypatch.setattr(module, "read_status", lambda folder: read.append(str(folder)) or reading(folder))
    board = Dashboard(outputs)
    for _ in range(5): board.state()
    assert len([name for name in read if name.endswith("done")]) == 1
    assert len([name for name in read if name.endswith("rates")]) == 5, "a sweep that goes on may die at any time"


def test_a_run_whose_process_is_gone_is_abandoned_without_a_change_of_its_files(outputs):
    code = ("import sys, time\nfrom kilonb.runs.folders import open_run\n"
            "open_run('line', sys.argv[1], seed=1)\nprint('open', flush=True)\ntime.sleep(600)")
    process = subprocess.Popen([sys.executable, "-c", code, str(outputs / "line" / "dies")], stdout=subprocess.PIPE)
    board = Dashboard(outputs, ["dies"])
    try:
        assert process.stdout.readline() == b"open\n" and board.state()["items"][0]["status"] == "running"
    finally:
        process.kill()
        process.wait()
    assert board.state()["items"][0]["status"] == "abandoned"


def test_only_pictures_of_shown_runs_are_served(outputs, tmp_path):
    board = Dashboard(outputs, ["line"])
    board.state()
    (tmp_path / "secret.png").write_bytes(b"secret")
    (outputs / "line" / "done" / "figures" / "link.png").symlink_to(tmp_path / "secret.png")
    assert picture_reply(board, {"run": "line/done", "name": "figures/view.png"}).status == 200
    for name in ("figures/link.png", "../done/figures/view.png", "/etc/passwd", "status.json", "figures/none.png"):
        assert picture_reply(board, {"run": "line/done", "name": name}).status == 404, name
    for key in ("other/bad", "../outputs/line/done", ""):
        with pytest.raises(KiloError): board.folder(key)


def test_damaged_files_are_items_with_a_reason_and_the_rest_is_shown(outputs):
    for name, content in (("status.json", b"{"), ("metrics.csv", b"\x00\xff"), ("progress.json", b"[]")):
        folder = outputs / "damaged" / name.partition(".")[0]
        shutil.copytree(outputs / "line" / "done", folder)
        (folder / name).write_bytes(content)
    server = open_dashboard(outputs)
    try:
        items = {item["key"]: item for item in ask(server, "state?since=0")["items"]}
        assert items["damaged/status"]["status"] == "unreadable" and "status.json" in items["damaged/status"]["error"]
        assert len(items) == 6 and items["line/done"]["gates"] == "1/1"
        asked = urllib.request.quote(json.dumps({key: {} for key in items}))
        assert ask(server, f"curves?ask={asked}")["line/done"][""]["rows"] == 2
    finally: server.stop()


def test_the_command_serves_until_ctrl_c_and_writes_one_file(outputs, tmp_path):
    environment = {**os.environ, "KILONB_OUTPUTS": str(outputs)}
    process = subprocess.Popen([*KILONB, "dashboard", "--no-browser"], stdout=subprocess.PIPE, text=True,
                               env=environment)
    address = re.search(r"http://127\.0\.0\.1:\d+/[\w-]+/", process.stdout.readline())[0]
    with DIRECT.open(address) as reply: assert b"<main" in reply.read()
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    done = subprocess.run([*KILONB, "dashboard", "line", "--html", str(tmp_path / "board.html")], capture_output=True,
                          text=True, env=environment)
    text = (tmp_path / "board.html").read_text()
    assert done.returncode == 0 and "line/done" in text and "other/bad" not in text


# --- in a browser

@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


def opened(chromium, address: str, width: int = 1440) -> tuple:
    """(page, console messages, addresses asked for)."""
    page, messages, requests = chromium.new_page(viewport={"width": width, "height": 900}), [], []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.set_default_timeout(60_000)
    page.goto(address)
    return page, messages, requests


def step_shown(page) -> int:
    """The step of the live run's card, 0 without one."""
    text = " ".join(page.locator(".card .where").all_inner_texts())
    return int((re.search(r"training (\d+)/400", text) or [0, 0])[1])


@needs_chromium
def test_a_run_moves_ends_and_the_server_goes(outputs, chromium):
    server = open_dashboard(outputs)
    page, messages, requests = opened(chromium, server.address)
    page.wait_for_selector("#groups, .run")
    assert page.locator("#now .empty").is_visible(), "nothing runs yet"
    process = subprocess.Popen([sys.executable, "-c", LIVE, str(outputs)])
    page.wait_for_selector(".card progress")
    first = step_shown(page)
    page.wait_for_function("() => /training (2[0-9]0)\\/400/.test(document.querySelector('.card .where')?.textContent)")
    assert step_shown(page) > first and "left" in page.locator(".card .where").inner_text()
    page.wait_for_function("() => /at 2[0-9]0/.test(document.querySelector('.chart .readout')?.textContent)")
    (outputs / "go").touch()
    page.wait_for_function("() => document.querySelector('.notices').textContent.includes('gates 1/1')")
    assert process.wait(60) == 0 and page.locator("#now .empty").is_visible()
    assert not messages and {address.split("/")[2] for address in requests} == {f"127.0.0.1:{server.port}"}
    server.stop()
    page.wait_for_function("() => document.getElementById('link').textContent.includes('connection lost, retrying')")
    page.close()


@needs_chromium
@pytest.mark.parametrize("width", [1440, 390])
def test_the_page_filters_pins_works_by_keyboard_and_sets_text_as_text(outputs, chromium, width):
    server = open_dashboard(outputs)
    page, messages, _ = opened(chromium, server.address, width)
    page.wait_for_selector(".run .why:has-text('onerror')")
    assert EVIL in page.locator("#queue").inner_text() and page.locator("img[src=x]").count() == 0
    assert page.locator("#queue .counts").get_attribute("aria-label") == "1 finished, 1 failed, 1 running, 2 waiting"
    page.keyboard.press("/")
    page.keyboard.type("other failed")
    assert page.locator(".run").count() == 1 and "1 of 2 runs" in page.locator("#runs output").inner_text()
    page.locator("#filter").fill("")
    page.locator("button[aria-label='log and pictures of line/done']").press("Enter")
    page.wait_for_function("() => document.querySelector('.log').textContent.startsWith('training 20/40\\n<img')")
    page.wait_for_selector(".pictures img")
    page.locator("button[aria-label='pin other/bad']").focus()
    page.keyboard.press("Enter")
    assert page.locator("button[aria-label='unpin other/bad']").first.get_attribute("aria-pressed") == "true"
    outline = "() => getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(outline) == "solid", "the focus is visible"
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing is cut off at the side"
    assert not messages and page.title() != "gone"
    page.close()
    server.stop()


CONTRAST = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => rgb.slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const poor = [];
  for (const node of document.querySelectorAll("body *")) {
    const text = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!text || !node.checkVisibility() || ["SCRIPT", "STYLE", "OPTION"].includes(node.tagName)) continue;
    const [a, b] = [light(parse(getComputedStyle(node).color)), light(behind(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) poor.push(`${node.tagName}.${node.className} ${ratio.toFixed(2)} ${node.textContent}`);
  }
  return poor;
}"""


@needs_chromium
def test_a_frozen_page_is_whole_offline_and_its_texts_have_contrast(outputs, tmp_path, chromium):
    path = write_dashboard(tmp_path / "board.html", outputs)
    page, messages, requests = opened(chromium, path.as_uri(), 390)
    page.wait_for_selector(".chart canvas")
    page.locator("#which").select_option("line/done")
    assert page.locator(".pictures img").first.evaluate("image => image.decode().then(() => image.naturalWidth)") == 60
    assert "as it was, not live" in page.locator("#link").inner_text()
    assert page.evaluate(CONTRAST) == [] and page.evaluate("document.documentElement.scrollWidth") <= 390
    assert not messages and all(address.startswith(("file:", "data:")) for address in requests)
    page.close()
