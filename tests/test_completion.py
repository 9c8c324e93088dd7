"""Completion of `kilonb` in a shell: what is offered, that nothing is executed or printed, and a real bash."""
import os
import shutil
import subprocess
import sys

import pytest
from helpers import KILONB

SEPARATOR = "\n"


@pytest.fixture
def outputs(tmp_path):
    """A folder of runs: two of one experiment, and a sweep."""
    for name in ("line/20260101-a", "line/20260102-b", "sweeps/study/001-c"):
        (tmp_path / "outputs" / name).mkdir(parents=True)
        (tmp_path / "outputs" / name / "status.json").write_text("{}")
    return tmp_path / "outputs"


def ask(line: str, outputs, cwd, shell: str = "bash") -> tuple[list[str], str, int]:
    """(completions, what was printed, exit code) for the line up to its end, as the script of a shell asks."""
    answer = cwd / "answer"
    done = subprocess.run(KILONB, cwd=cwd, capture_output=True, text=True, timeout=60, env={
        **os.environ, "KILONB_OUTPUTS": str(outputs), "_ARGCOMPLETE": "1", "_ARGCOMPLETE_SHELL": shell,
        "_ARGCOMPLETE_IFS": SEPARATOR, "_ARGCOMPLETE_COMP_WORDBREAKS": " \t\n\"'><=;|&(:", "COMP_LINE": line,
        "COMP_POINT": str(len(line)), "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)})
    found = [text.strip() for text in answer.read_text().split(SEPARATOR)] if answer.exists() else []
    return list(filter(None, found)), done.stdout + done.stderr, done.returncode


@pytest.mark.parametrize("line, wanted, unwanted", [
    ("kilonb ", ["run", "sweep", "show", "data", "completion"], ["--version"]),
    ("kilonb run single_view", ["single_view_overfit", "single_view_features"], ["teacher"]),
    ("kilonb bench ", ["rasterize", "pinpad"], ["teacher"]),
    ("kilonb run teacher --d", ["--data", "--deterministic"], ["--json"]),
    ("kilonb run single_view_overfit -p st", ["steps="], ["seed="]),
    ("kilonb run single_view_overfit -p ", ["steps=", "seed="], ["run_dir=", "resume=", "settings="]),
    ("kilonb run single_view_overfit -p data=brick", ["brickyard"], ["steps="]),
    ("kilonb run students --data brickyard", ["brickyard", "brickyard_photographs"], ["blender:"]),
    ("kilonb sweep one", ["one_view"], ["pinpad_vta"]),
    ("kilonb data get l", ["lego_400", "lpips"], []),
    ("kilonb show l", ["line", "line/20260101-a", "line/20260102-b"], []),
    ("kilonb show line/202601", ["line/20260101-a", "line/20260102-b"], ["line"]),
    ("kilonb watch s", ["study", "sweeps/study/001-c"], []),
    ("kilonb report ", ["line", "study"], []),
    ("kilonb completion ", ["bash", "zsh", "fish"], []),
    ("kilonb runs ", ["list", "archive"], []),
    ("kilonb run no_such_experiment -p ", [], ["steps="]),
])
def test_names_are_completed(line, wanted, unwanted, outputs, tmp_path):
    found, printed, code = ask(line, outputs, tmp_path)
    assert set(wanted) <= set(found) and not set(unwanted) & set(found), found
    assert printed == "" and code == 0


def test_the_values_of_a_literal_are_completed(outputs, tmp_path):
    """In zsh, which does not split words at =, the whole word is offered."""
    (tmp_path / "tiny.ipynb").write_text(
        '{"cells": [{"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": '
        '"kind: Literal[\\"mlp\\", \\"grid\\"] = \\"mlp\\""}], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}')
    assert ask("kilonb run ./tiny.ipynb -p kind=", outputs, tmp_path)[0] == ["mlp", "grid"]
    assert ask("kilonb run ./tiny.ipynb -p kind=g", outputs, tmp_path)[0] == ["grid"]


def test_completing_executes_nothing(outputs, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    for line in ("kilonb run pinpad_policies --out here ", "kilonb data make pinpad_small ", "kilonb runs tidy ",
                 f"kilonb runs archive {outputs} --yes --delete "):
        _, printed, code = ask(line, outputs, tmp_path)
        assert printed == "" and code == 0
    assert [path for path in sorted(tmp_path.rglob("*")) if path.name != "answer"] == before


def test_completing_imports_nothing_heavy(outputs, tmp_path):
    """Each press of the tab key waits for it: a fifth of a second on a quiet machine, of which torch would take two."""
    for line in ("kilonb run single_view_overfit -p st", "kilonb show l", "kilonb run x --data b"):
        command = [sys.executable, "-X", "importtime", *KILONB[1:]]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={
            **os.environ, "KILONB_OUTPUTS": str(outputs), "_ARGCOMPLETE": "1", "COMP_LINE": line,
            "COMP_POINT": str(len(line)), "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "answer")})
        modules = {text.rpartition("|")[2].strip() for text in done.stderr.splitlines()}
        assert "argcomplete" in modules and not {"torch", "numpy", "numba", "papermill", "yaml"} & modules


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_printed_alone(shell, tmp_path):
    done = subprocess.run([*KILONB, "completion", shell], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and "kilonb" in done.stdout and "_ARGCOMPLETE" in done.stdout
    if shell != "fish" and shutil.which(shell):
        checked = subprocess.run([shell, "-n"], input=done.stdout, capture_output=True, text=True)
        assert checked.returncode == 0 and checked.stderr == ""


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_a_tab_in_a_real_bash_completes_the_line(outputs, tmp_path):
    pexpect = pytest.importorskip("pexpect", reason="pexpect is not installed")
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "kilonb"
    program.write_text(f"#!{sys.executable}\n# PYTHON_ARGCOMPLETE_OK\nimport sys\nfrom kilonb.cli.main import main\n"
                       "sys.exit(main())\n")
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PS1": "ready$ ", "TERM": "dumb",
                   "KILONB_OUTPUTS": str(outputs), "HISTFILE": "/dev/null"}
    shell = pexpect.spawn("bash", ["--norc", "--noprofile", "-i"], env=environment, cwd=str(tmp_path), timeout=60,
                          encoding="utf-8")
    try:
        shell.expect_exact("ready$ ")
        shell.sendline('bind "set enable-bracketed-paste off"; eval "$(kilonb completion bash)"; complete -p kilonb')
        shell.expect("complete .*_python_argcomplete kilonb")
        shell.expect_exact("ready$ ")
        shell.send("kilonb run single_view_ov\t")
        shell.expect_exact("kilonb run single_view_overfit ")
        shell.send("-p foregr\t")
        shell.expect_exact("-p foreground=")
        shell.sendcontrol("u")
        shell.send("kilonb show line/20260102\t")
        shell.expect_exact("kilonb show line/20260102-b ")
    finally: shell.close(force=True)
