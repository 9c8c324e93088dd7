"""The command line: the message, exit code and line of JSON of every outcome."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import KILONB

from kilonb.cli.main import main
from kilonb.runs.records import read_run
from kilonb.runs.status import read_status

PARAMETERS = ('steps: int = 3        # how many\nrate: float = 1e-3\nsize: tuple[int, int] = (4, 4)\n'
              'data: str = "brickyard"\nrun_dir: str = ""\nresume: bool = False')
OPEN = """from kilonb.runs.folders import open_run
run = open_run("tiny", run_dir, {"steps": steps, "rate": rate, "size": size}, resume=resume)"""
FINISH = """from kilonb.runs.gates import Gate
print("rate is", rate)
run.finish({"sum": sum(range(steps)), "rate": rate, "size": repr(size), "blank": 0},
           [Gate("sum", at_least=6, baseline_result="blank")])"""


@pytest.fixture(autouse=True)
def no_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("KILONB_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.delenv("KILONB_DATA", raising=False)


def write_notebook(folder: Path, *sources: str, name: str = "tiny", tags: tuple[str, ...] = ("parameters",)) -> str:
    cells = [{"cell_type": "markdown", "metadata": {}, "source": "# Tiny", "id": "title"}]
    for i, source in enumerate(sources):
        cells.append({"cell_type": "code", "metadata": {"tags": [*tags] if i == 0 else []}, "source": source,
                      "id": f"c{i}", "outputs": [], "execution_count": None})
    path = folder / f"{name}.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return str(path)


def call(capfd, *arguments) -> tuple[int, str, str]:
    capfd.readouterr()
    code = main([str(argument) for argument in arguments])
    return code, *capfd.readouterr()


def one_sentence(code: int, out: str, errors: str) -> str:
    assert code == 2 and out == "" and errors.startswith("kilonb: ") and errors.count("\n") == 1, (code, out, errors)
    return errors


def test_help_imports_nothing_heavy():
    code = ("import sys\nfrom kilonb.cli.main import main\ntry: main(sys.argv[1:])\nexcept " "SystemExit: pass\n"
            "heavy = {'torch', 'numpy', 'papermill', 'nbconvert', 'nbformat', 'matplotlib', "
            "'pandas', 'rich', 'typer'} & set(sys.modules)\n" "print('heavy:', sorted(heavy))")
    for arguments in (["--help"], ["run", "--help"], ["bench", "--help"], ["data", "--help"], ["data", "get", "--help"],
                      ["show", "--help"], ["sweep", "--help"], ["watch", "--help"], ["report", "--help"],
                      ["runs", "--help"], ["runs", "archive", "--help"], ["--version"]):
        out = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True,
                             check=True).stdout
        assert out.endswith("heavy: []\n") and ("usage: kilonb" in out or out.startswith("kilonb 0.")), out


def test_a_run_with_typed_values(capfd, tmp_path):
    notebook = write_notebook(tmp_path, PARAMETERS, OPEN, FINISH)
    code, out, errors = call(capfd, "run", notebook, "-p", "steps=4", "-p", "rate=1e-2", "-p", "size=1,2", "--out",
                             tmp_path / "run")
    assert code == 0 and errors == "", errors
    record = read_run(tmp_path / "run")
    assert (
        record.results["sum"] == 6
        and record.results["rate"] == 1e-2
        and record.results["size"] == "(1, 2)"
        and record.ok
    )
    assert record.environment["command"].startswith("kilonb run") and record.environment["packages"]["papermill"]
    assert out.startswith(f"tiny -> {tmp_path / 'run'}\n── Tiny\n")
    assert "rate is 0.01" in out and "trivial baseline" in out and "✔ green" in out and "\033" not in out
    for name in ("notebook.ipynb", "index.html"):
        assert str(tmp_path / "run" / name) in out and (tmp_path / "run" / name).is_file()
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.startswith(".") or path.suffix == ".part"]


def test_json_is_the_last_line_and_a_red_gate_is_no_failure(capfd, tmp_path):
    code, out, _ = call(capfd, "run", write_notebook(tmp_path, PARAMETERS, OPEN, FINISH), "--json")
    last = json.loads(out.splitlines()[-1])
    assert code == 0 and set(last) == {"run", "ok", "verdict", "note", "results", "gates"} and last["ok"] is False
    assert last["results"]["sum"] == 3 and last["gates"]["sum"] == {"at_least": 6.0, "at_most": None, "notes": None,
                                                                    "published": None, "source": "",
                                                                    "baseline_result": "blank", "value": 3,
                                                                    "baseline": 0, "verdict": "red"}
    assert Path(last["run"]).parent == (tmp_path / "outputs" / "tiny").resolve()


@pytest.mark.parametrize("arguments, message",
                         [(["-p", "stepps=4"], "Unknown parameter of tiny 'stepps': did you mean 'steps'?"),
                          (["-p", "steps=4.5"], "Parameter 'steps' must be int: got '4.5'"),
                          (["-p", "steps"], "name=value"),
                          (["-p", "run_dir=x"], "'run_dir' is set by the option --out"), (["--outt", "x"], "--outt"),
                          (["--resume"], "No unfinished run")])
def test_bad_arguments_are_one_sentence_and_start_nothing(capfd, tmp_path, arguments, message):
    notebook = write_notebook(tmp_path, PARAMETERS, OPEN, FINISH)
    assert message in one_sentence(*call(capfd, "run", notebook, *arguments))
    assert not (tmp_path / "outputs").exists()


def test_a_missing_experiment_names_the_nearest(capfd, tmp_path):
    assert "Unknown experiment 'no_such_thing'" in one_sentence(*call(capfd, "run", "no_such_thing"))
    assert "Unknown benchmark 'no_such_thing'" in one_sentence(*call(capfd, "bench", "no_such_thing"))
    assert "There is no notebook" in one_sentence(*call(capfd, "run", tmp_path / "absent.ipynb"))


@pytest.mark.parametrize("cells, tags, message", [(("steps = 3",), (), "has 0 cells tagged 'parameters'"),
                                               (("steps = 3 * epochs",), ("parameters",), "plain value")])
def test_a_notebook_without_one_parameters_cell_is_refused(capfd, tmp_path, cells, tags, message):
    assert message in one_sentence(*call(capfd, "run", write_notebook(tmp_path, *cells, tags=tags)))


def test_a_run_folder_in_use_or_unwritable_is_one_sentence(capfd, tmp_path):
    notebook = write_notebook(tmp_path, PARAMETERS, OPEN, FINISH)
    (tmp_path / "full").mkdir(); (tmp_path / "full" / "thesis.txt").write_text("two years")
    assert "exists and is not empty" in one_sentence(*call(capfd, "run", notebook, "--out", tmp_path / "full"))
    assert "Cannot write the run folder" in one_sentence(*call(capfd, "run", notebook, "--out",
                                                               tmp_path / "full" / "thesis.txt" / "run"))
    assert "Nothing to resume" in one_sentence(*call(capfd, "run", notebook, "--out", tmp_path / "new",
                                                     "--resume")) or not (tmp_path / "new").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("source, message",
                         [("from kilonb.core.errors import KiloError\nclass NoFrame(KiloError): pass\nraise "
                           "NoFrame('There is no frame 7.')", "kilonb: There is no frame 7."),
                          ("numbers = [1, 2]\nnumbers[5]",
                           "kilonb: IndexError in cell [4] under 'Tiny': list index out of range")])
def test_a_failing_notebook_is_kept_and_its_error_is_printed(capfd, tmp_path, source, message):
    code, out, errors = call(capfd, "run", write_notebook(tmp_path, PARAMETERS, OPEN, source, FINISH), "--out",
                             tmp_path / "run", "--json")
    assert code == 1 and errors.splitlines()[0] == message and "Traceback" not in errors + out
    last, record = json.loads(out.splitlines()[-1]), read_run(tmp_path / "run")
    assert last == {"run": str(tmp_path / "run"), "ok": False, "results": {}, "gates": {},
                    "error": message.removeprefix("kilonb: ")}
    assert record.status == "failed" and record.error == last["error"] and record.results == {}
    assert (
        'output_type": "error' in (tmp_path / "run" / "notebook.ipynb").read_text()
        and (tmp_path / "run" / "index.html").is_file()
    )


def test_a_notebook_that_records_no_results_has_not_finished(capfd, tmp_path):
    code, _, errors = call(capfd, "run", write_notebook(tmp_path, PARAMETERS, OPEN), "--out", tmp_path / "run")
    assert code == 1 and "recorded no results" in errors and read_run(tmp_path / "run").status == "failed"


def test_a_killed_kernel_is_one_sentence(capfd, tmp_path):
    notebook = write_notebook(tmp_path, PARAMETERS, OPEN, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
                              FINISH)
    code, out, errors = call(capfd, "run", notebook, "--out", tmp_path / "run", "--json")
    assert (
        code == 1
        and errors.splitlines()[0]
        == "kilonb: The notebook's kernel was killed under 'Tiny': most often because memory ran out."
    ), errors
    assert (
        json.loads(out.splitlines()[-1])["ok"] is False
        and read_run(tmp_path / "run").status == "failed"
        and (tmp_path / "run" / "notebook.ipynb").is_file()
    )


TRAINING = """import time
saved = run.checkpoints / "last.json"
step = int(saved.read_text()) if resume else 0
try:
    print("training from", step, flush=True)
    while step < 1 or not resume: time.sleep(0.02)
except KeyboardInterrupt:
    saved.write_text("1")
    raise"""


def interrupt(process: subprocess.Popen, folder: Path, number: int) -> tuple[str, str]:
    """Wait until the notebook trains, send the signal, and return what the process printed."""
    deadline, seen = time.monotonic() + 60, ""
    while "training from" not in seen:
        assert time.monotonic() < deadline and process.poll() is None, seen
        seen += process.stdout.readline()
    process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    return seen + out, errors


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_lets_training_save_and_the_run_be_resumed(tmp_path, number, code):
    notebook = write_notebook(tmp_path, PARAMETERS, OPEN, TRAINING, FINISH)
    process = subprocess.Popen([*KILONB, "run", notebook, "--out", str(tmp_path / "run"), "-p", "steps=5", "--data",
                                "blender:/data/lego", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, start_new_session=True)
    out, errors = interrupt(process, tmp_path / "run", number)
    assert process.returncode == code and "Stopped: tiny was interrupted" in errors and "Traceback" not in errors, (
        errors
    )
    assert json.loads(out.splitlines()[-1])["run"] == str(tmp_path / "run")
    status = read_status(tmp_path / "run")
    assert (
        status["status"] == "interrupted"
        and (tmp_path / "run/checkpoints/last.json").read_text() == "1"
        and (tmp_path / "run/notebook.ipynb").is_file()
    )
    assert not (tmp_path / "run/results.json").exists()
    if number == signal.SIGTERM: return
    resumed = subprocess.run([*KILONB, "run", notebook, "--out", str(tmp_path / "run"), "--resume"],
                             capture_output=True, text=True, check=True)
    record = read_run(tmp_path / "run")
    assert "training from 1" in resumed.stdout and record.status == "finished"
    assert record.results["sum"] == 10 and record.parameters["data"] == "blender:/data/lego", (
        "a resumed run keeps the parameters it was started with"
    )


def test_the_kernel_ends_with_a_killed_command_line(tmp_path):
    pid = "import os, time\nprint('training from', os.getpid(), flush=True)\ntime.sleep(60)"
    notebook = write_notebook(tmp_path, PARAMETERS, OPEN, pid)
    process = subprocess.Popen([*KILONB, "run", notebook, "--out", str(tmp_path / "run")], stdout=subprocess.PIPE,
                               text=True)
    line = ""
    while "training from" not in line: line = process.stdout.readline()
    process.kill(); process.wait()
    kernel, deadline = int(line.split()[-1]), time.monotonic() + 20
    while Path(f"/proc/{kernel}").exists() and "State:\tZ" not in Path(f"/proc/{kernel}/status").read_text():
        if time.monotonic() > deadline:
            os.kill(kernel, signal.SIGKILL)
            pytest.fail("the kernel outlives its command line")
        time.sleep(0.2)


def test_runs_show_gates_and_page_read_the_run_folders(capfd, tmp_path):
    notebook = write_notebook(tmp_path, PARAMETERS, OPEN, FINISH)
    for steps in (3, 4):
        assert call(capfd, "run", notebook, "-p", f"steps={steps}", "--out",
                    tmp_path / "outputs" / "tiny" / f"run{steps}")[0] == 0
    code, out, _ = call(capfd, "runs")
    assert code == 0 and "tiny/run3" in out and "tiny/run4" in out and "0/1" in out and "1/1" in out
    code, out, _ = call(capfd, "show", "run4")
    assert code == 0 and "tiny/run4: finished" in out and "✔ green" in out and "steps" in out
    code, out, _ = call(capfd, "show", "run3", "run4")
    assert code == 0 and [line.split() for line in out.splitlines() if line.startswith("sum")] == [["sum", "3", "6"]]
    code, out, _ = call(capfd, "gates", "tiny")
    assert code == 0 and "run4" in out and "run3" not in out and "✔ green" in out
    os.unlink(tmp_path / "outputs/tiny/run3/index.html")
    assert call(capfd, "page", "run3")[0] == 0 and (tmp_path / "outputs/tiny/run3/index.html").is_file()
    assert "'run' begins the names of 2 runs" in one_sentence(*call(capfd, "show", "run"))
    assert "Unknown experiment 'tinny': did you mean 'tiny'?" in one_sentence(*call(capfd, "gates", "tinny"))
    (tmp_path / "outputs/tiny/run3/results.json").write_text("{")
    assert "results.json is not JSON" in one_sentence(*call(capfd, "show", "run3"))


def test_runs_are_compared_reported_archived_and_restored(capfd, tmp_path):
    notebook = write_notebook(tmp_path, PARAMETERS, OPEN, FINISH)
    for steps in (3, 4):
        assert call(capfd, "run", notebook, "-p", f"steps={steps}", "--out",
                    tmp_path / "outputs" / "tiny" / f"run{steps}")[0] == 0
    code, out, _ = call(capfd, "runs", "compare", "run3", "run4")
    assert code == 0 and [line.split() for line in out.splitlines()
                          if line.startswith("steps ")] == [["steps", "3", "4"]]
    code, out, _ = call(capfd, "report", "tiny")
    assert code == 0 and Path(out.strip()).is_file() and "run3" in Path(out.strip()).read_text()
    code, out, _ = call(capfd, "runs", "archive", "run3")
    assert code == 0 and "1 run would be archived: add --yes." in out and (tmp_path / "outputs/tiny/run3").is_dir(), (
        "nothing is touched without --yes"
    )
    assert call(capfd, "runs", "archive", "run3", "--yes")[0] == 0 and not (tmp_path / "outputs/tiny/run3").exists()
    assert "run3" not in call(capfd, "runs")[1] and "run3" in call(capfd, "runs", "archives")[1]
    name = next((tmp_path / "outputs/archive").glob("*.tar.gz")).name
    assert call(capfd, "runs", "restore", name)[0] == 0 and read_run(tmp_path / "outputs/tiny/run3").results["sum"] == 3
    for arguments, message in ((("archive",), "all runs are not archived at once"),
                            (("compare", "run3"), "at least two runs"), (("restore", "none.tar.gz"), "none.tar.gz"),
                            (("list", "--status", "finishd"), "did you mean 'finished'?")):
        assert message in one_sentence(*call(capfd, "runs", *arguments))


def test_unknown_data_is_one_sentence(capfd):
    assert "did you mean 'brickyard'" in one_sentence(*call(capfd, "data", "make", "brickyarrd"))
    assert call(capfd, "data", "list")[0] == 0


# ---- dotted settings

SETTINGS = ('steps: int = 3\nwait: bool = False\nsettings: "kilonb.batch.sweeps.Slurm" = {}\nrun_dir: str = ""\n'
            'resume: bool = False')
SESSION = """from kilonb.batch.sweeps import Slurm
from kilonb.training.session import open_session
session = open_session("tiny")
slurm = session.configure(Slurm(jobs=steps))
if wait and not resume: raise KeyboardInterrupt
session.finish({"jobs": slurm.jobs, "memory": slurm.memory_gb})"""


def test_a_dotted_setting_reaches_the_config_is_recorded_and_is_given_back_to_a_resumed_run(capfd, tmp_path):
    notebook = write_notebook(tmp_path, SETTINGS, SESSION)
    code, _, errors = call(capfd, "run", notebook, "-p", "steps=5", "-p", "wait=true", "-p", "slurm.memory_gb=1e2",
                           "--out", tmp_path / "run")
    assert code == 130, errors
    code, _, errors = call(capfd, "run", notebook, "--out", tmp_path / "run", "--resume")
    record = read_run(tmp_path / "run")
    assert code == 0 and record.results["jobs"] == 5 and record.results["memory"] == 100.0, errors
    assert record.parameters["slurm.memory_gb"] == 100.0 and record.parameters["steps"] == 5
    assert "settings" not in record.parameters, "settings are recorded under their dotted names"
    config = json.loads((tmp_path / "run" / "config.json").read_text())["slurm"]
    assert config["jobs"] == 5 and config["memory_gb"] == 100.0 and config["walltime"] == "04:00:00"
    code, out, _ = call(capfd, "show", tmp_path / "run")
    assert code == 0 and "slurm.memory_gb" in out


def test_a_dotted_setting_is_applied_after_the_parameters(capfd, tmp_path):
    notebook = write_notebook(tmp_path, SETTINGS, SESSION)
    code, _, errors = call(capfd, "run", notebook, "-p", "slurm.jobs=9", "-p", "steps=5", "--out", tmp_path / "run")
    assert code == 0 and read_run(tmp_path / "run").results["jobs"] == 9, errors


@pytest.mark.parametrize("assignment, message", [
    ("slurm.memory=1", "Unknown setting 'slurm.memory': did you mean 'slurm.memory_gb'?"),
    ("slrm.jobs=1", "Unknown setting 'slrm.jobs': did you mean 'slurm.jobs'?"),
    ("slurm.jobs=1.5", "Setting 'slurm.jobs' must be int: got '1.5'"), ("settings={}", "by dotted names"),
])
def test_a_wrong_dotted_setting_is_one_sentence_and_starts_nothing(capfd, tmp_path, assignment, message):
    notebook = write_notebook(tmp_path, SETTINGS, SESSION)
    assert message in one_sentence(*call(capfd, "run", notebook, "-p", assignment))
    assert not (tmp_path / "outputs").exists()


def test_a_notebook_without_settings_has_no_dotted_names(capfd, tmp_path):
    notebook = write_notebook(tmp_path, PARAMETERS, OPEN, FINISH)
    assert "Unknown parameter of tiny 'a.b'" in one_sentence(*call(capfd, "run", notebook, "-p", "a.b=1"))


def test_help_lists_parameters_and_with_all_the_dotted_settings(capfd, tmp_path):
    notebook = write_notebook(tmp_path, SETTINGS, SESSION)
    code, out, _ = call(capfd, "run", notebook, "--help")
    assert code == 0 and "steps" in out and "--all" in out and "slurm.jobs" not in out
    for arguments in (("--help", "--all"), ("--all", "--help")):
        code, out, _ = call(capfd, "run", notebook, *arguments)
        rows = [line.split() for line in out.splitlines()]
        assert code == 0 and ["slurm.jobs", "int", "4"] in rows and ["slurm.walltime", "str", "'04:00:00'"] in rows
    assert "--all belongs to --help" in one_sentence(*call(capfd, "run", notebook, "--all"))
