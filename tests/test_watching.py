"""Watching: parsing of progress lines, views of runs of other processes, damaged files, TensorBoard."""
import io
import json
import os
import pty
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest

from kilonb.batch.tensorboard import choose_port, serve_tensorboard
from kilonb.core.errors import KiloError
from kilonb.core.files import write_json
from kilonb.runs.gates import Gate
from kilonb.runs.folders import open_run
from kilonb.runs.status import mark_run
from kilonb.batch.states import describe_changes, describe_state, parse_progress, read_watched, single_line
from kilonb.batch.watching import SweepDisplay, find_watched, watch
from kilonb.training.progress import Progress, progress_line
from kilonb.training.scalars import ScalarLog

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


class Terminal(io.StringIO):
    def isatty(self): return True


def sweep_run(name, status, **more):
    return {"name": name, "varied": {"learning_rate": 0.01}, "status": status, "ok": None, "gates": "", "attempt": 1,
            "elapsed_s": 3.0, "error": "", **more}


def sweep(*runs, status="running", **more):
    return {"kind": "sweep", "sweep": "night", "experiment": "toy", "status": status, "elapsed_s": 9.0, "eta_s": 60.0,
            "workers": 2, "runs": list(runs), **more}


def leave(folder, status):
    write_json(folder / "status.json", status)
    return folder


def test_every_progress_line_is_parsed_back():
    chance = random.Random(0)
    for _ in range(2000):
        total = chance.choice([1, 7, 300, 20_000])
        step, speed = chance.randint(0, total), chance.choice([0.0, 0.4, 56.1, 9000.0])
        description = chance.choice(["training", "fitting the teacher", "points, 2/3 done", "a_b (c)", "50%"])
        names = chance.sample(["loss", "lr", "psnr (dB)", "alpha 0.5", "colour_loss"], chance.randint(0, 4))
        values = {name: chance.choice([0.0, -1.5, 1e-9, 12345678.0, float("inf"), chance.gauss(0, 1)])
                  for name in names}
        read = parse_progress(progress_line(description, step, total, values, speed))
        assert (read["description"], read["step"], read["total"]) == (description, step, total)
        assert read["values"] == {name: float(f"{value:.4g}") for name, value in values.items()}
        assert read["eta_s"] == (None if not speed else round((total - step) / speed))


def test_a_nan_in_a_progress_line_is_parsed_as_nan():
    read = parse_progress(progress_line("training", 1, 2, {"loss": float("nan")}, 0))
    assert read["values"]["loss"] != read["values"]["loss"]


def test_the_log_of_a_training_loop_is_parsed_back():
    log = io.StringIO()
    progress = Progress(40, stream=log, every_s=0.0)
    for step in range(1, 41): progress.update(step, {"loss": 1 / step})
    assert [parse_progress(line)["step"] for line in log.getvalue().splitlines()] == list(range(1, 41))


@pytest.mark.parametrize("line",
                         ["loss 0.1", "training 5/10  60%", "training 5/10   50%  then more", "12/31 papers",
                          "── Training", "\x1b[2J", "training 5/0  0%"])
def test_other_lines_are_no_progress(line): assert parse_progress(line) is None


def test_escape_codes_and_markup_of_a_run_do_not_act_on_the_terminal():
    rude = "\x1b]0;owned\x07\x1b[2J[red]loss[/red] is\r\nnan\x1b[31m \u202egnp\x9b"
    assert single_line(rude) == "[red]loss[/red] is nan gnp"
    stage = {"description": rude, "step": 1, "total": 2, "values": {rude: 0.5}, "eta_s": None}
    progress = {"heading": rude, "cell": 1, "cells": 2, "line": rude, "stage": stage}
    runs = [sweep_run(f"001{rude}", "failed", error=rude),
            sweep_run("002", "running", varied={rude: rude}, progress=progress)]
    runs += [sweep_run("003", "waiting")]
    screen, log = Terminal(), io.StringIO()
    for stream in (screen, log):
        with SweepDisplay(stream) as display:
            display.update(sweep(*runs))
            display.update(sweep(runs[0], runs[1], sweep_run("003", "finished", results={rude: rude})))
    assert not CONTROL.search(log.getvalue()) and "[red]loss[/red] is nan" in log.getvalue()
    assert (
        "owned" not in screen.getvalue()
        and "\x1b[2J" not in screen.getvalue()
        and "[red]loss[/red]" in screen.getvalue()
    )


def test_without_a_terminal_each_change_is_one_line_without_codes_even_where_colour_is_forced(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    log, waiting = io.StringIO(), sweep(sweep_run("001", "waiting"), sweep_run("002", "waiting"))
    half = sweep(sweep_run("001", "finished", gates="3/3", ok=True), sweep_run("002", "running"))
    done = sweep(sweep_run("001", "finished", gates="3/3", ok=True), sweep_run("002", "failed", error="no space left"),
                 status="finished")
    with SweepDisplay(log) as display:
        for status in (waiting, waiting, half, half | {"elapsed_s": 10.0}, done): display.update(status)
    lines = log.getvalue().splitlines()
    assert len(lines) == 5 and not CONTROL.search(log.getvalue())
    assert lines[1].startswith("[1/2] 001") and lines[1].endswith("finished, gates 3/3, 0:03")
    assert lines[3].endswith("002 (learning_rate 0.01) failed: no space left")


def test_a_second_attempt_is_a_change():
    first, second = sweep(sweep_run("001", "running")), sweep(sweep_run("001", "running", attempt=2))
    log = io.StringIO()
    with SweepDisplay(log) as display:
        for status in (first, second): display.update(status)
    assert log.getvalue().splitlines()[-1].endswith("001 (learning_rate 0.01) running, attempt 2")


def test_a_problem_of_the_sweep_is_printed_once():
    log, fine, troubled = (
        io.StringIO(),
        sweep(sweep_run("001", "running")),
        sweep(sweep_run("001", "running"), trouble="No worker is left."),
    )
    with SweepDisplay(log) as display:
        for status in (fine, troubled, troubled): display.update(status)
    assert log.getvalue().splitlines()[1:] == ["No worker is left."]


def test_json_is_one_line_for_each_change_and_elapsed_time_is_no_change(tmp_path):
    machine, waiting = io.StringIO(), sweep(sweep_run("001", "waiting"), eta_s=float("nan"))
    with SweepDisplay(machine, as_json=True) as display:
        for status in (waiting, waiting | {"elapsed_s": 10.0, "changed": "now"}, sweep(sweep_run("001", "running"))):
            display.update(status)
    assert [json.loads(line)["counts"]["running"] for line in machine.getvalue().splitlines()] == [0, 1]
    once = io.StringIO()
    assert watch(leave(tmp_path, waiting | {"status": "finished"}), once=True, as_json=True, stream=once) == 0
    assert json.loads(once.getvalue())["runs"][0]["name"] == "001"


@pytest.mark.parametrize("runs, status, code",
                         [(["finished", "skipped"], "finished", 0), (["finished", "failed"], "finished", 1),
                          (["finished", "waiting"], "interrupted", 1), (["finished", "interrupted"], "finished", 1),
                          (["finished"], "abandoned", 1)])
def test_the_exit_code_is_1_where_a_run_failed(tmp_path, runs, status, code):
    folder = leave(tmp_path, sweep(*(sweep_run(f"{i:03d}", state) for i, state in enumerate(runs)), status=status))
    assert watch(folder, stream=io.StringIO()) == code


def test_red_gates_are_no_failure_of_the_run(tmp_path):
    run = open_run("toy", tmp_path / "toy" / "a")
    run.finish({"psnr_db": 12.0}, [Gate("psnr_db", at_least=30.0)])
    log = io.StringIO()
    assert watch(run.folder, stream=log) == 0 and "0/1 gates green" in log.getvalue()


@pytest.mark.parametrize("text",
                         ["", "{", '{"kind": "sweep", "status": "runn', "[1, 2]", "{}", "null", '{"status": 3}',
                          '{"status": "running", "process": null}', '{"status": "running", "process": [1]}',
                          "\xff\xfe"])
def test_a_damaged_status_is_named_in_one_sentence(tmp_path, text):
    (tmp_path / "status.json").write_text(text, encoding="latin-1")
    with pytest.raises(KiloError, match=r"status\.json") as error: watch(tmp_path, stream=io.StringIO())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("status", [
    {"kind": "sweep", "status": "finished"}, {"kind": "sweep", "status": "finished", "runs": "none"},
    {"kind": "sweep", "status": "finished", "runs": [3, None, {}]},
    {"kind": "sweep", "status": "finished", "counts": [1], "workers": "two", "elapsed_s": "nan", "eta_s": "inf",
     "process": 3},
    {"kind": "sweep", "status": "running", "process": {"host": "elsewhere"}, "changed": "yesterday", "runs": [
        {"name": 3, "status": "running", "varied": [1],
         "progress": {"cell": "x", "cells": None, "stage": {"step": 9, "total": 3, "values": {"a": None, "b": "nan"}}}},
        {"name": "b", "status": "running", "progress": {"stage": {"step": "inf", "total": -1}}},
        {"name": "c", "status": "failed", "error": None}]}])
def test_a_status_of_another_version_is_shown_as_far_as_it_goes(tmp_path, status):
    log, screen = io.StringIO(), Terminal()
    for stream in (log, screen): watch(leave(tmp_path, status), once=True, stream=stream)
    assert log.getvalue().strip() and screen.getvalue().strip()


def test_where_there_is_nothing_to_watch_the_folder_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "nowhere" / "status.json"):
        with pytest.raises(KiloError, match="Nothing to watch in"): watch(path)
    with pytest.raises(KiloError, match="No run 'night'"): find_watched("night", tmp_path)
    assert find_watched("night",
                        leave(tmp_path / "sweeps" / "night", sweep()).parents[1]) == tmp_path / "sweeps" / "night"


def test_a_finished_run_with_damaged_results_is_a_failure_that_names_the_file(tmp_path):
    run = open_run("toy", tmp_path / "toy" / "a")
    run.finish({"psnr_db": 12.0})
    (run.folder / "results.json").write_text('{"results": ')
    log = io.StringIO()
    assert watch(run.folder, stream=log) == 1 and "results.json is not JSON" in log.getvalue()


def test_damaged_progress_does_not_hide_how_the_run_stands(tmp_path):
    run = open_run("toy", tmp_path / "toy" / "a")
    (run.folder / "progress.json").write_text("{")
    assert read_watched(run.folder)["status"] == "running" and "progress.json" in read_watched(run.folder)["error"]
    (run.folder / "progress.json").unlink()
    assert read_watched(run.folder)["error"] == ""


def test_a_status_that_is_incomplete_for_a_moment_does_not_end_watching(tmp_path):
    folder = leave(tmp_path / "night", sweep(sweep_run("001", "running")))
    whole = (folder / "status.json").read_text()
    def disturb():
        (folder / "status.json").write_text(whole[: len(whole) // 2])
        time.sleep(0.15)
        leave(folder, sweep(sweep_run("001", "finished"), status="finished"))
    (folder / "status.json").write_text(whole.replace('"elapsed_s": 9.0', '"process": {"host": "elsewhere"}'))
    timer = threading.Timer(0.1, disturb)
    timer.start()
    log = io.StringIO()
    assert watch(folder, stream=log, every_s=0.02) == 0 and "night is finished" in log.getvalue()
    timer.join()


WRITER = """
import sys, time
from kilonb.core.files import write_json
from kilonb.runs.gates import Gate
from kilonb.runs.folders import open_run
run = open_run("toy", sys.argv[1])
for step in range(0, 101, 10):
    write_json(run.folder / "progress.json", {"heading": "Training", "cell": 2, "cells": 4, "line": "", "changed": "",
                                              "elapsed_s": 1.0,
               "stage": {"description": "training", "step": step, "total": 100, "values": {"loss": 0.5}, "eta_s": 1.0}})
    print(step, flush=True)
    if step == 50 and sys.argv[2] == "stay": time.sleep(60)
    time.sleep(0.02)
run.finish({"psnr_db": 31.0}, [Gate("psnr_db", at_least=30.0)])
"""


def writing(folder, manner):
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(folder), manner], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    return process


def test_a_run_of_another_process_is_followed_to_its_end(tmp_path):
    process, log = writing(tmp_path / "toy" / "a", "go"), io.StringIO()
    assert watch(tmp_path / "toy" / "a", stream=log, every_s=0.01) == 0
    lines = log.getvalue().splitlines()
    assert "Training, training" in lines[0] and lines[-1].startswith("toy/a has finished") and 2 <= len(lines) <= 13
    assert process.wait(20) == 0


def test_a_killed_writer_is_abandoned_with_its_process_named(tmp_path):
    process, log = writing(tmp_path / "toy" / "a", "stay"), io.StringIO()
    while process.stdout.readline().strip() != "50": pass
    threading.Timer(0.1, lambda: (process.kill(), process.wait())).start()
    assert watch(tmp_path / "toy" / "a", stream=log, every_s=0.02) == 1
    last = log.getvalue().splitlines()[-1]
    assert last.startswith("toy/a is abandoned") and str(process.pid) in last


def test_a_killed_sweep_is_abandoned_and_a_silent_one_on_another_host_gets_a_warning(tmp_path):
    gone = {"pid": 2**22 + 1, "created": 1.0, "host": os.uname().nodename}
    log = io.StringIO()
    assert watch(leave(tmp_path, sweep(sweep_run("001", "running"), process=gone)), stream=log) == 1
    assert log.getvalue().count("has ended without recording how") == 1
    silent = leave(tmp_path,
                   sweep(sweep_run("001", "running"), process=gone | {"host": "elsewhere"},
                         changed="2026-01-31T00:00:00+00:00"))
    assert any("Its status has not changed for" in line for line in describe_changes(None, read_watched(silent)))
    assert "is running" in describe_state(read_watched(silent))


def test_on_a_terminal_the_view_is_redrawn_and_the_cursor_comes_back(tmp_path):
    run = open_run("toy", tmp_path / "toy" / "a")
    threading.Timer(0.2, lambda: run.finish({"psnr_db": 31.0}, [Gate("psnr_db", at_least=30.0)])).start()
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal: assert watch(run.folder, stream=terminal, every_s=0.02) == 0
    seen = b""
    try:
        while part := os.read(ours, 65536): seen += part
    except OSError: pass
    os.close(ours)
    text = seen.decode()
    assert "finished" in text and "green" in text and text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_a_view_does_not_disturb_the_run(tmp_path):
    run = open_run("toy", tmp_path / "toy" / "a")
    before = {path: path.read_bytes() for path in run.folder.iterdir()}
    watch(run.folder, once=True, stream=io.StringIO())
    assert {path: path.read_bytes() for path in run.folder.iterdir()} == before
    mark_run(run.folder, "interrupted", "Ctrl-C")
    assert watch(run.folder, stream=io.StringIO()) == 1


def test_tensorboard_shows_the_runs_of_a_sweep_and_ends_with_ctrl_c(tmp_path):
    for name in ("001-a", "002-b"):
        with ScalarLog(tmp_path / "night" / name) as log: log.log(1, {"loss": 0.5})
    code = ("from kilonb.batch.tensorboard import serve_tensorboard\n"
            f"raise SystemExit(serve_tensorboard({str(tmp_path / 'night')!r}))")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        address = re.search(r"http://127\.0\.0\.1:\d+/\S*", process.stdout.readline())[0]
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        for _ in range(100):
            if len(runs := json.loads(direct.open(address + "data/runs", timeout=10).read())) == 2: break
            time.sleep(0.1)
        assert sorted(runs) == ["001-a", "002-b"]
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        with pytest.raises(OSError): direct.open(address, timeout=2)
    finally:
        if process.poll() is None: process.terminate()


def test_tensorboard_refuses_what_it_cannot_show(tmp_path):
    with pytest.raises(KiloError, match="no TensorBoard event files"): serve_tensorboard(tmp_path)
    with pytest.raises(KiloError, match="There is no folder"): serve_tensorboard(tmp_path / "nowhere")
    (tmp_path / "events.out.tfevents.0").write_bytes(b"")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(KiloError, match="cannot be used"): serve_tensorboard(tmp_path, port=taken.getsockname()[1])
    with pytest.raises(KiloError, match="1 to 65535"): choose_port(0)
