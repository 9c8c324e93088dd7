"""Hostile files, requests and users against what serves, exports and logs runs."""
import errno
import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
import webbrowser
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kilonb.cli import completion
from kilonb.core import serving
from kilonb.core.errors import KiloError
from kilonb.core.processes import this_process
from kilonb.core.serving import MOST_CONNECTIONS, PageServer, text_reply
from kilonb.reports import live_runs
from kilonb.reports.dashboard import Dashboard, dashboard_pages, log_since, write_dashboard
from kilonb.reports.live_curves import CurveTail
from kilonb.reports.live_runs import LiveRuns
from kilonb.runs.gate_files import gate_files
from kilonb.runs.gates import NO_GATES, NOT_JUDGED, RED, Gate, check_gates, fits_machine
from kilonb.runs.scalars import read_columns
from kilonb.runs.verdicts import ExperimentStatus, GateOverview
from kilonb.sharing.export import export_run
from kilonb.sharing.export_folders import check_export, export_folder, read_export, write_export_record
from kilonb.splats.formats import write_gaussians
from kilonb.splats.gaussians import gaussians_from_points
from kilonb.training.loggers import CSVLogger, Logger, finish_loggers, make_loggers, register_logger, start_loggers
from kilonb.training.scalars import ScalarLog

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import docs_html

MARKUP = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"


def make_run(folder: Path, status: str = "finished", **more) -> Path:
    folder.mkdir(parents=True)
    values = {"experiment": folder.parent.name, "status": status, "started": "2026-11-28T10:00:00+00:00",
              "elapsed_s": 3.0, "process": this_process(), **more}
    (folder / "status.json").write_text(json.dumps(values))
    return folder


def within(seconds: float, function: Callable):
    """What a function returns; an error where it waits for something that never comes."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert found, "it hangs, or failed"
    return found[0]


# --- the server

@pytest.fixture
def server():
    server = PageServer({"": lambda query: text_reply("index"), "files/": lambda query: text_reply(query["path"])})
    yield server.start()
    server.stop()


def answer(server: PageServer, request: str) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as line:
        line.sendall(request.encode("latin-1").replace(b"\n", b"\r\n"))
        return b"".join(iter(lambda: line.recv(65536), b""))


@pytest.mark.parametrize("head,status", [
    ("GET /SECRET/ HTTP/1.1\nHost: 127.0.0.1", 200), ("GET /SECRET/ HTTP/1.0", 403),
    ("GET /SECRET/ HTTP/1.1\nHost: 127.0.0.1\nHost: evil.example", 400),
    ("GET http://evil.example/SECRET/ HTTP/1.1\nHost: 127.0.0.1", 404),
    ("GET /SECRET/files/..%2f..%2fetc%2fpasswd HTTP/1.1\nHost: 127.0.0.1", 404),
    ("GET /SECRET/files/a%00b HTTP/1.1\nHost: 127.0.0.1", 404), ("GET /\xff\xfe/ HTTP/1.1\nHost: 127.0.0.1", 404),
    ("POST /SECRET/ HTTP/1.1\nHost: 127.0.0.1\nContent-Length: 99999999", 400),
    ("TRACE /SECRET/ HTTP/1.1\nHost: 127.0.0.1", 405),
    ("GET /wrong/ HTTP/1.1\nHost: 127.0.0.1\nUpgrade: websocket", 404)])
def test_a_forged_request_gets_a_refusal_without_the_secret(server, head, status):
    got = answer(server, f"{head.replace('SECRET', server.secret)}\nConnection: close\n\n")
    assert got.startswith(f"HTTP/1.1 {status} ".encode()) and server.secret.encode() not in got


def test_many_open_connections_do_not_use_up_the_files_of_the_process(server):
    lines = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(MOST_CONNECTIONS + 30)]
    for line in lines: line.settimeout(5)
    assert all(line.recv(1) == b"" for line in lines[MOST_CONNECTIONS:]), "further ones are closed at once"
    for line in lines: line.close()
    for _ in range(50):
        try: got = answer(server, f"GET /{server.secret}/ HTTP/1.1\nHost: localhost\nConnection: close\n\n")
        except OSError: got = b""
        if got: break
        time.sleep(0.1)
    assert got.startswith(b"HTTP/1.1 200")


def test_a_process_without_free_files_waits_and_does_not_fill_its_log(caplog):
    class Loop:
        def default_exception_handler(self, context): raise context["exception"]

    serving._wait_when_full(Loop(), {"exception": OSError(errno.EMFILE, "Too many open files")})
    assert not caplog.records
    with pytest.raises(ZeroDivisionError): serving._wait_when_full(Loop(), {"exception": ZeroDivisionError()})


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the arguments of a process are its owner's")
def test_the_secret_is_in_no_argument_of_the_browser_and_its_page_is_the_owners(server, monkeypatch):
    opened = []
    def note(address: str) -> None:
        page = Path(address.removeprefix("file://"))
        opened.append((address, page, stat.S_IMODE(page.stat().st_mode), page.read_text()))
    monkeypatch.setattr(webbrowser, "open", note)
    serving._open_through_page(server.address, 0.0)
    [(address, page, mode, text)] = opened
    assert server.secret not in address and mode == 0o600 and not page.exists()
    assert f'url={server.address}"' in text


# --- the dashboard

def test_a_log_that_is_a_link_or_a_pipe_is_not_shown(tmp_path):
    (tmp_path / "private.txt").write_text("the private key\n")
    linked = make_run(tmp_path / "outputs" / "exp" / "linked", log=1)
    (linked / "log.txt").symlink_to(tmp_path / "private.txt")
    piped = make_run(tmp_path / "outputs" / "exp" / "piped")
    os.mkfifo(piped / "log.txt")
    assert within(10, lambda: log_since(linked)["text"] + log_since(piped)["text"]) == ""
    page = within(30, lambda: write_dashboard(tmp_path / "page.html", tmp_path / "outputs"))
    assert "the private key" not in page.read_text()


def test_a_running_run_whose_scalars_are_a_pipe_does_not_stop_the_dashboard(tmp_path):
    run = make_run(tmp_path / "exp" / "one", "running")
    (run / "parameters.json").write_text('{"steps": 100}')
    os.mkfifo(run / "metrics.csv")
    board = Dashboard(tmp_path)
    assert [item["status"] for item in within(10, board.state)["items"]] == ["running"]
    assert within(10, lambda: board.rows({"exp/one": {}}))["exp/one"]


def test_a_run_that_is_deleted_while_it_is_read_is_left_out_and_read_again(tmp_path, monkeypatch):
    make_run(tmp_path / "exp" / "one"), make_run(tmp_path / "exp" / "two")
    read, lost = live_runs.read_item, []
    def losing(outputs, key):
        if key == "exp/one" and not lost: raise FileNotFoundError(lost.append(key))
        return read(outputs, key)
    monkeypatch.setattr(live_runs, "read_item", losing)
    runs = LiveRuns(tmp_path)
    runs.update()
    assert list(runs.items) == ["exp/two"] and lost
    runs.update()
    assert set(runs.items) == {"exp/one", "exp/two"}


def test_scalars_that_are_written_anew_in_the_same_place_are_read_from_the_beginning(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,elapsed_s\n1,1.0\n")
    tail = CurveTail(path)
    tail.update()
    path.write_text("step,elapsed_s,loss\n1,1.0,5.0\n2,2.0,4.0\n")
    tail.update()
    assert tail.steps == [1, 2] and tail.values == {"loss": [5.0, 4.0]}


def test_markup_in_every_text_of_a_run_stays_text(tmp_path):
    run = make_run(tmp_path / "outputs" / "exp" / "one", "failed", tag=MARKUP, error=MARKUP)
    (run / "log.txt").write_text(MARKUP)
    (run / "parameters.json").write_text(json.dumps({MARKUP: MARKUP}))
    (run / "metrics.csv").write_text(f'step,elapsed_s,"{MARKUP}",__proto__\n1,1,1,1\n')
    (run / "results.json").write_text(json.dumps({"results": {MARKUP: 1.0}, "tables": {MARKUP: [{MARKUP: MARKUP}]}}))
    frozen = write_dashboard(tmp_path / "page.html", tmp_path / "outputs").read_text()
    board = Dashboard(tmp_path / "outputs")
    board.state()
    page = dashboard_pages(board)["page/"]({"path": "exp/one"}).body.decode()
    for text in (frozen, page): assert "<img src=x" not in text and "<script>alert" not in text and "img src=x" in text


def test_a_gate_of_another_machine_is_not_counted_as_missed(tmp_path):
    run = make_run(tmp_path / "exp" / "one")
    gates = {"psnr_db": {"at_least": 1.0}, "train_s": {"at_most": 1.0, "machine": "2 cores, no GPU"}}
    (run / "results.json").write_text(json.dumps({"results": {"psnr_db": 2.0, "train_s": 9.0}, "gates": gates}))
    (run / "environment.json").write_text('{"hardware": {"cores": 3, "graphics_cards": []}}')
    [item] = Dashboard(tmp_path).state()["items"]
    assert item["gates"] == "1/1" and item["ok"] is True


# --- gates by machine

def test_a_gate_names_a_machine_on_which_results_are_kept():
    """A bound that names a machine that nobody has would never be judged."""
    def flat(entries):
        for entry in entries: yield from flat(entry.gates) if entry.gates else [entry]
    kept = [json.loads(path.read_text()).get("hardware") for path in ROOT.glob("nbs/results/*/*/environment.json")]
    machines = {entry.machine for rules in gate_files(ROOT).values() for entry in flat(rules.gates) if entry.machine}
    assert machines and len(kept) > 20
    for machine in machines: assert any(hardware and fits_machine(machine, hardware) for hardware in kept), machine


@pytest.mark.parametrize("hardware", [None, {}, {"cores": "2"}, {"cores": "many"}, {"cores": None}, {"cores": 2.5}])
def test_a_run_without_a_number_of_cores_is_judged(hardware):
    gate = Gate("train_s", at_most=1.0, machine="2 cores, no GPU")
    assert check_gates({"train_s": 9.0}, [gate], hardware=hardware).verdict == RED
    other = {"cores": 3, "graphics_cards": []}
    assert check_gates({"train_s": 9.0}, [gate], hardware=other).verdict == NOT_JUDGED


def test_an_overview_without_a_judged_gate_is_not_called_green_or_without_gates():
    gate = Gate("train_s", at_most=1.0, machine="3 cores")
    report = check_gates({"train_s": 9.0}, [gate], hardware={"cores": 2})
    overview = GateOverview((ExperimentStatus("demo", "", None, report),))
    assert overview.verdict == NOT_JUDGED == report.verdict and overview.sentence().startswith("Not judged: of 1 gates")
    assert GateOverview(()).verdict == NO_GATES


# --- exports

@pytest.fixture
def ply(tmp_path):
    torch.manual_seed(0)
    write_gaussians(tmp_path / "ball.ply", gaussians_from_points(torch.rand(40, 3), torch.rand(40, 3), 0, 0.9))
    return tmp_path / "ball.ply"


def export_text(to: Path, force: bool = True) -> None:
    with export_folder(to, force) as folder:
        (folder / "a.txt").write_text("a")
        (folder / "beside.txt").write_text("b")
        write_export_record(folder, [{"file": "a.txt"}], {})


def test_a_folder_with_an_export_json_of_another_program_is_not_replaced(tmp_path):
    for content in ("{}", "[]", "{", '{"format": 1}', '{"format": 1, "files": []}'):
        (tmp_path / "project").mkdir(exist_ok=True)
        (tmp_path / "project" / "export.json").write_text(content)
        (tmp_path / "project" / "thesis.tex").write_text("mine")
        with pytest.raises(KiloError): export_text(tmp_path / "project")
        assert (tmp_path / "project" / "thesis.tex").read_text() == "mine"


def test_what_was_added_to_an_export_is_not_replaced_and_all_of_an_export_is_checked(tmp_path):
    export_text(tmp_path / "out")
    export_text(tmp_path / "out")
    assert [row["file"] for row in read_export(tmp_path / "out")["files"]] == ["a.txt", "beside.txt"]
    (tmp_path / "out" / "deep").mkdir()
    (tmp_path / "out" / "deep" / "notes.txt").write_text("mine")
    with pytest.raises(KiloError, match=r"a file that no export wrote, such as 'deep/notes.txt'"):
        export_text(tmp_path / "out")
    assert (tmp_path / "out" / "deep" / "notes.txt").read_text() == "mine"
    (tmp_path / "out" / "beside.txt").write_text("cut")
    assert check_export(tmp_path / "out") == ["beside.txt"]


def test_an_export_does_not_replace_what_it_reads(ply, tmp_path):
    export_text(tmp_path / "out")
    os.remove(tmp_path / "out" / "a.txt")
    os.rename(ply, tmp_path / "out" / "a.txt")
    os.rename(tmp_path / "out" / "a.txt", tmp_path / "out" / "ball.ply")
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    record["files"].append({"file": "ball.ply", "sha256": ""})
    (tmp_path / "out" / "export.json").write_text(json.dumps(record))
    with pytest.raises(KiloError, match=r"in which 'ball.ply' lies that it reads"):
        export_run(tmp_path / "out" / "ball.ply", tmp_path / "out", ["gaussians"], ["splat"], force=True)
    assert (tmp_path / "out" / "ball.ply").is_file()


def test_an_export_that_is_killed_leaves_the_earlier_one_and_the_next_one_clears_up(tmp_path):
    export_text(tmp_path / "out")
    code = ("import sys, time\nfrom kilonb.sharing.export_folders import export_folder\n"
            "with export_folder(sys.argv[1], True) as folder:\n    (folder / 'half').touch()\n"
            "    print('go', flush=True)\n    time.sleep(60)\n")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE)
    process.stdout.readline()
    process.kill()
    process.wait()
    assert check_export(tmp_path / "out") == [] and len(list(tmp_path.iterdir())) == 2
    export_text(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_place_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(KiloError, match=r"cannot be made: .*: give another folder as --to."):
        export_text(tmp_path / "file" / "below")


@pytest.mark.parametrize("device", ["nothing", "cuda:99", "", "cpu\n"])
def test_a_device_that_is_not_here_is_one_sentence(ply, tmp_path, device):
    with pytest.raises(KiloError, match="device is"): export_run(ply, tmp_path / "out", ["gaussians"], device=device)
    assert not (tmp_path / "out").exists()


def test_figures_with_names_of_any_bytes_are_exported(tmp_path):
    run = make_run(tmp_path / "exp" / "one")
    (run / "figures").mkdir()
    for name in (b"\xff.png", b"a|b`\n<script>.png", b"-rf.png"):
        Path(os.fsdecode(os.fsencode(run / "figures") + b"/" + name)).write_bytes(b"picture")
    export_run(run, tmp_path / "out", ["figures"])
    names = [row["file"] for row in read_export(tmp_path / "out")["files"]]
    assert len(names) == 4 and all(name.isprintable() for name in names) and check_export(tmp_path / "out") == []


# --- loggers

class Ending(Logger):
    def scalars(self, values, step): raise SystemExit(3)


class Unmade:
    def __init__(self): raise ValueError("line one\nline two")


class WrongSteps(Logger):
    def last_steps(self): return {"loss": "many"}


class NoSteps(Logger):
    def last_steps(self): return 5


@pytest.mark.parametrize("kind", [Ending, WrongSteps, NoSteps])
def test_a_logger_cannot_end_a_run(kind, tmp_path, capsys):
    start_loggers(tmp_path, {}, {"hostile": kind(), "csv": CSVLogger()})
    with ScalarLog(tmp_path) as log:
        for step in (1, 2): log.log(step, {"loss": 1.0})
    finish_loggers(tmp_path)
    said = capsys.readouterr().err
    assert "hostile" in said and said.count("\n") == 1
    assert read_columns(tmp_path / "metrics.csv")["loss"][1].tolist() == [1.0, 1.0]


def test_a_logger_that_cannot_be_made_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "failing_logger.py").write_text("1 / 0\n")
    (tmp_path / "broken_logger.py").write_text("def (:\n")
    register_logger("unmade", Unmade)
    for name in ("unmade", "failing_logger:Any", "broken_logger:Any", "os:name", "os:nothing"):
        with pytest.raises(KiloError) as caught: make_loggers([name])
        assert "\n" not in str(caught.value)


def test_names_with_line_ends_do_not_damage_the_scalars_of_a_run(tmp_path):
    names = ("a,b", "=1+1", "line\nend", "carriage\rreturn", "unicode\u2028end", 'quote"', "a/b")
    with ScalarLog(tmp_path) as log: log.log(1, dict.fromkeys(names, 1.0))
    with ScalarLog(tmp_path, resume_step=1) as log: log.log(2, dict.fromkeys(names, float("inf")))
    table = read_columns(tmp_path / "metrics.csv")
    assert len(table) == 2 + len(names) and all(len(values) == 2 for _, values in table.values())


# --- completion

def test_names_with_line_ends_or_escape_sequences_are_not_completed(tmp_path, monkeypatch):
    monkeypatch.setenv("KILONB_OUTPUTS", str(tmp_path))
    for name in ("plain", "two\nlines", "red\x1b[31m", "$(touch hacked)"): make_run(tmp_path / "exp" / name)
    names = completion._quiet(completion.complete_run)(prefix="exp/")
    assert sorted(names) == ["exp/$(touch hacked)", "exp/plain"]


# --- the documentation

@pytest.mark.parametrize("link", ["/etc/hostname", "../../../etc/hostname", "../" * 30 + "etc/hostname", ".git/config",
                                  "%2e%2e/%2e%2e/etc/hostname", "/", ".."])
def test_the_pages_of_the_documentation_hold_no_file_from_outside_of_the_repository(link):
    site = docs_html.Site()
    writer = docs_html.Writer(site, "README.md", "index.html")
    for html in (writer.links(f'<a href="{link}">x</a>'), writer.markdown(f"![x]({link})")):
        assert "data:" not in html and not site.used and "source/" not in html
    assert len(site.broken) == 2
