"""Every listening socket of every kind of run: none beyond loopback, and on loopback none without a secret."""
import json
import os
import socket
import ssl
import stat
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from helpers import KILONB

from kilonb.batch.clusters import open_cluster, scheduler_security
from kilonb.batch.sweeps import Slurm, SweepFile, SweepPlan
from kilonb.core.errors import KiloError

PARAMETERS = 'seed: int = 0\npause_s: float = 0.0\nrun_dir: str = ""\nresume: bool = False'
ALONE = ('from kilonb.runs.folders import open_run\nimport time\nrun = open_run("toy", run_dir, {}, seed=seed, '
         'resume=resume)\ntime.sleep(pause_s)\nrun.finish({"sum": seed})')
TOGETHER = """import time
from kilonb.training.parallel import gather_values
from kilonb.training.session import open_session
session = open_session("toy", timeout_s=60)
values = gather_values((session.world.rank, {1: None}), session.world)
time.sleep(pause_s)
session.leave_group()
session.finish({"sum": sum(rank for rank, _ in values)})"""
QUIET = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}


def notebook(folder: Path, source: str) -> Path:
    cell = lambda i, source, tags: {"cell_type": "code", "metadata": {"tags": tags}, "source": source, "id": f"c{i}",
                                    "outputs": [], "execution_count": None}
    cells = [cell(0, PARAMETERS, ["parameters", "distributed"]), cell(1, source, [])]
    (folder / "toy.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return folder / "toy.ipynb"


def family(process: psutil.Process) -> list[psutil.Process]:
    try: return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess: return []


def sockets_of(process: psutil.Process) -> dict:
    """(kind, address) -> command, of every socket of a process that listens: TCP, and UDP or raw that is bound."""
    found = {}
    try:
        command = " ".join(process.cmdline())
        for each in process.net_connections("inet"):
            listens = each.status == psutil.CONN_LISTEN or (each.type != socket.SOCK_STREAM and not each.raddr)
            if listens and each.laddr: found["tcp" if each.type == socket.SOCK_STREAM else "udp", each.laddr] = command
        for each in process.net_connections("unix"):
            if each.laddr and each.laddr.startswith("/"): found["unix", each.laddr] = command
    except psutil.Error: pass
    return found


def server_certificate(address) -> bytes | None:
    """What a TLS server at the address presents, and only after which it refuses a stranger; None without TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(tuple(address), timeout=5) as plain:
        try:
            with context.wrap_socket(plain) as secure:
                shown = secure.getpeercert(binary_form=True)
                try: answer = secure.recv(1)
                except (ssl.SSLError, ConnectionError): answer = b""
        except (OSError, ssl.SSLError): return None
    assert not answer, "a stranger without a certificate is answered"
    return shown


def watched(command: list, environment: dict, extra=lambda: ()) -> tuple[dict, dict, subprocess.CompletedProcess]:
    """Every socket seen while a command runs, what the TLS servers among them presented, and how the command ended.

    extra: further processes that belong to it.
    """
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={**os.environ, **QUIET, **environment}, start_new_session=True)
    seen, presented, deadline = {}, {}, time.monotonic() + 120
    while started.poll() is None:
        assert time.monotonic() < deadline, seen
        for process in [each for root in (started.pid, *extra()) if psutil.pid_exists(root)
                        for each in family(psutil.Process(root))]:
            for key, what in sockets_of(process).items():
                if key in seen: continue
                seen[key] = what
                if key[0] == "unix": presented[key] = os.stat(Path(key[1]).parent).st_mode & 0o777 \
                    if Path(key[1]).parent.exists() else None
                elif key[0] == "tcp" and "ipykernel" not in what:
                    try: presented[key] = server_certificate(key[1])
                    except OSError: presented[key] = "gone"
        time.sleep(0.3)
    output = started.communicate()[0]
    return seen, presented, subprocess.CompletedProcess(command, started.returncode, output)


def check_sockets(seen: dict, presented: dict, certificate=None, beyond: bool = False, of_kernel: int = 1) -> list:
    """Fails on a socket that is not known. Returns the addresses with TLS.

    certificate: what TLS servers must present. beyond: they may listen beyond loopback. of_kernel: on how many
    addresses a kernel may listen: ipykernel's pipe for forked processes, in which each message begins with a secret of
    16 random bytes; in a rank also gloo's, where each connection has to prove the secret of the ranks' store.
    """
    kernels, secure = {}, []
    for (kind, address), command in seen.items():
        if kind == "unix":
            assert presented[kind, address] in (0o700, None), (address, command)
            continue
        assert kind == "tcp" and (beyond or address.ip.startswith("127.")), (kind, address, command)
        if "ipykernel" in command:
            assert address.ip.startswith("127."), (address, command)
            kernels.setdefault(command, []).append(address)
            continue
        assert certificate and presented[kind, address] in (certificate, "gone"), (address, command)
        secure.append(address)
    assert all(len(addresses) <= of_kernel for addresses in kernels.values()), kernels
    return secure


def test_a_plain_run_listens_in_a_private_folder_only(tmp_path):
    command = [*KILONB, "run", str(notebook(tmp_path, ALONE)), "-p", "pause_s=0.5", "--out", str(tmp_path / "run")]
    seen, presented, done = watched(command, {})
    assert done.returncode == 0, done.stdout
    assert any(kind == "unix" for kind, _ in seen), "the kernel's sockets were seen"
    check_sockets(seen, presented)


def test_several_processes_listen_on_loopback_and_open_no_store(tmp_path):
    command = [*KILONB, "run", str(notebook(tmp_path, TOGETHER)), "-p", "pause_s=0.5", "--out", str(tmp_path / "run"),
               "--processes", "2"]
    seen, presented, done = watched(command, {})
    assert done.returncode == 0 and json.loads((tmp_path / "run/results.json").read_text())["results"]["sum"] == 1
    assert not check_sockets(seen, presented, of_kernel=2)
    assert sum(kind == "tcp" for kind, _ in seen) > 2, "the connections of the ranks were seen"


def certificate_of(sweep: Path) -> bytes:
    return ssl.PEM_cert_to_DER_cert((sweep / ".keys/certificate.pem").read_text())


class Keys:
    """The certificate of a sweep, copied while it runs, and the modes of its files."""

    def __init__(self, sweep: Path): self.sweep, self.certificate, self.modes = sweep, None, set()

    def __call__(self):
        try:
            self.certificate = certificate_of(self.sweep)
            self.modes.add(tuple(stat.S_IMODE(os.stat(self.sweep / ".keys" / name).st_mode)
                                 for name in (".", "certificate.pem", "key.pem")))
        except (OSError, ValueError): pass
        return ()


def write_sweep(folder: Path, text: str) -> Path:
    notebook(folder, ALONE)
    (folder / "study.yaml").write_text("experiment: toy.ipynb\nparameters: {pause_s: 0.3}\n" + text)
    return folder / "study.yaml"


def test_a_sweep_speaks_tls_with_a_certificate_of_its_own(tmp_path):
    file, keys = write_sweep(tmp_path, "seeds: 2\n"), Keys(tmp_path / "outputs/sweeps/study")
    seen, presented, done = watched([*KILONB, "sweep", str(file), "--workers", "2"],
                                    {"KILONB_OUTPUTS": str(tmp_path / "outputs")}, keys)
    assert done.returncode == 0, done.stdout
    assert keys.modes == {(0o700, 0o600, 0o600)} and not (keys.sweep / ".keys").exists()
    secure = check_sockets(seen, presented, keys.certificate)
    assert len(secure) == 5, "scheduler, two nannies and two workers, and no web server"


def test_a_sweep_under_slurm_speaks_tls_and_has_no_dashboard(tmp_path):
    """SLURM is replaced by an sbatch that starts the job's script on this machine."""
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "sbatch").write_text('#!/bin/sh\ncp "$1" "$JOBS/job.sh"\nsetsid sh "$JOBS/job.sh" >"$JOBS/job.log" '
                                     '2>&1 </dev/null &\necho $! >"$JOBS/pid"\necho "Submitted batch job 7"\n')
    (commands / "scancel").write_text('#!/bin/sh\nkill -- "-$(cat "$JOBS/pid")" 2>/dev/null\nexit 0\n')
    for command in commands.iterdir(): command.chmod(0o755)
    file = write_sweep(tmp_path, "seeds: 2\nslurm: {jobs: 1, memory_gb: 2, queue: short}\n")
    keys = Keys(tmp_path / "outputs/sweeps/study")

    def job():
        keys()
        return [int((tmp_path / "pid").read_text())] if (tmp_path / "pid").exists() else []

    environment = {"KILONB_OUTPUTS": str(tmp_path / "outputs"), "JOBS": str(tmp_path),
                   "PATH": f"{commands}:{os.environ['PATH']}"}
    seen, presented, done = watched([*KILONB, "sweep", str(file), "--slurm"], environment, job)
    assert done.returncode == 0, done.stdout
    secure = check_sockets(seen, presented, keys.certificate, beyond=True)
    assert len({address.port for address in secure}) == 3, "scheduler, nanny and worker, and no web server"
    key = keys.sweep / ".keys/key.pem"
    assert str(key) in (tmp_path / "job.sh").read_text() and not key.parent.exists()


def test_a_stranger_cannot_use_the_scheduler_of_a_sweep(tmp_path):
    from distributed import Client, Security

    from kilonb.batch.private import make_certificate

    plan = SweepPlan("study", tmp_path / "study", None, SweepFile("line", seeds=1), "", "", ())
    other = make_certificate(tmp_path / "other")
    with open_cluster(plan, workers=1) as client:
        assert client.submit(sum, [1, 2]).result(30) == 3
        address = client.scheduler.address
        strangers = {"plain": (address.replace("tls://", "tcp://"), Security(require_encryption=False)),
                     "forged": (address, Security(require_encryption=True, tls_ca_file=str(other.certificate),
                                                  tls_client_cert=str(other.certificate),
                                                  tls_client_key=str(other.key)))}
        for place, security in strangers.values():
            with pytest.raises(OSError), Client(place, timeout=2, security=security, set_as_default=False): pass


def test_a_stranger_among_the_ranks_is_refused(tmp_path, monkeypatch):
    """A process that connects as a rank and does not know the secret in the store ends the others with a sentence."""
    from kilonb.training import parallel

    honest = parallel._proof

    def forged(secret, rank): return honest(b"a guess" if os.environ.get("STRANGER") else secret, rank)

    real = parallel._run_rank

    def start(function, world, results):
        if world.rank == 1: os.environ["STRANGER"] = "1"
        real(function, world, results)

    monkeypatch.setattr(parallel, "_proof", forged)
    monkeypatch.setattr(parallel, "_run_rank", start)
    answers = parallel.run_ranks(lambda world: "joined", 2, timeout_s=10.0)
    assert "joined" not in answers and all("ranks connected" in answer for answer in answers), answers


def test_nothing_that_ranks_exchange_is_a_pickle(tmp_path, monkeypatch):
    import pickle

    from kilonb.training import parallel

    def refused(*_, **__): raise AssertionError("a pickle")

    for name in ("loads", "load", "Unpickler"): monkeypatch.setattr(pickle, name, refused)
    answers = []
    read, write = os.pipe()
    def exchange(world):
        values = parallel.gather_values({"a": (1, None, float("inf")), 2: "text"}, world)
        first = parallel.from_first([world.rank, "first"], world)
        assert values == [{"a": (1, None, float("inf")), 2: "text"}] * 2 and first == [0, "first"]
        os.write(write, b"x")
    try: parallel.run_ranks(exchange, 2)
    except AssertionError as error: answers.append(str(error))        # the answers of the forked copies are pickles
    os.close(write)
    assert os.read(read, 10) == b"xx"
    os.close(read)


@pytest.mark.parametrize("address", ["tcp://10.0.0.7:8786", "10.0.0.7:8786", "ws://10.0.0.7:8786", "tcp://[::]:8786",
                                     "tcp://127.0.0.1.example.org:1", "tls://10.0.0.7:8786"])
def test_a_scheduler_beyond_this_machine_needs_tls(address, tmp_path):
    with pytest.raises(KiloError, match="TLS"): scheduler_security(address)


def test_a_sweep_at_a_running_scheduler_uses_the_certificates_that_the_user_names(tmp_path):
    from kilonb.batch.private import make_certificate

    files = make_certificate(tmp_path / "keys")
    security = scheduler_security("tls://127.0.0.1:1", {"ca": files.certificate, "cert": files.certificate,
                                                        "key": files.key})
    assert security.require_encryption and security.tls_client_key == str(files.key)
    with pytest.raises(KiloError, match="--tls-key names no file"):
        scheduler_security("tls://h:1", {"ca": files.certificate, "cert": files.certificate, "key": tmp_path / "no"})


@pytest.mark.parametrize("values", [
    {"queue": "short\n#SBATCH --wrap=id"}, {"queue": "a b"}, {"queue": "-x"}, {"queue": "$(id)"}, {"account": "a;id"},
    {"walltime": "1:00\nid"}, {"walltime": "1:00 --wrap id"}, {"directives": ["--qos=x\nid"]}, {"directives": ["x"]},
    {"directives": ["--a\u2028id"]}, {"setup": ["module load x\nid"]}, {"jobs": 0}, {"jobs": 10**9},
    {"memory_gb": float("inf")}, {"interface": "ib0;id"}])
def test_what_could_end_its_line_of_a_job_script_is_refused(values):
    with pytest.raises(KiloError) as refused: Slurm(**values)
    assert f"slurm.{next(iter(values))}" in str(refused.value) and "\n" not in str(refused.value)


def test_the_token_of_jupyterlab_stays():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    assert "jupyter lab nbs" in makefile
    for word in ("token", "password", "--ip", "allow_origin", "0.0.0.0"): assert word not in makefile.lower()


def test_tensorboard_listens_on_loopback_and_answers_to_its_secret_address_only(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    from kilonb.batch.tensorboard import running_tensorboard

    with SummaryWriter(str(tmp_path / "run")) as writer: writer.add_scalar("loss", 1.0, 1)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with running_tensorboard(tmp_path) as (address, process):
        seen = {key: what for each in family(psutil.Process(process.pid)) for key, what in sockets_of(each).items()}
        base, _, secret = address.rstrip("/").rpartition("/")
        assert len(secret) >= 20 and not any(secret in command for command in seen.values())
        assert json.loads(direct.open(address + "data/runs", timeout=20).read()) == ["run"]
        for path in ("/", "/data/runs", "/data/logdir"):
            with pytest.raises(urllib.error.HTTPError): direct.open(base + path, timeout=20)
    assert seen and all(at.ip == "127.0.0.1" for kind, at in seen if kind != "unix"), seen
