"""Readers of manifests, lists of checksums, source distributions, pages of package indices and archived runs."""
import hashlib
import json
import shutil
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

from kilonb.core.tarballs import open_tarball, tar_members
from kilonb.data import manifests as data_manifests
from kilonb.data.downloads import _links_in_page, take_members
from kilonb.data.manifests import FileRecord, Manifest, load_manifest, manifests_folder
from kilonb.data.verification import Verification, verify_folder
from kilonb.runs.archive import Archive, read_archive, restore_run
from kilonb.runs.records import read_run
from tests.fuzz.engine import Reader
from tests.fuzz.readers_runs import archive_seeds

WEIGHTS = b"weights" * 40


def _leaves(path: str) -> bool:
    """Whether a path leads out of the folder that it is relative to."""
    return Path(path).is_absolute() or ".." in Path(path).parts or "\0" in path


def wrong_manifest(manifest: Any) -> str:
    """What is wrong with a manifest: a path that leaves its folder, a size or checksum that is none, an address."""
    if not isinstance(manifest, Manifest): return f"a {type(manifest).__name__}"
    if any(map(_leaves, (*manifest.files, manifest.folder, manifest.entry))): return "a path leads out of the folder"
    wrong = wrong_records(manifest.files)
    fetch = manifest.fetch
    if fetch and not all(url.startswith(("http://", "https://")) for url in (*filter(None, [fetch.base_url]),
                                                                             *fetch.urls.values())):
        return "an address is not one of http"
    if fetch and fetch.how == "sdist" and any(one in fetch.package + fetch.version for one in " \n@;/\\"):
        return "a package's name or version holds more than that"
    return wrong


def wrong_records(records: dict[str, FileRecord]) -> str:
    """What is wrong with file records."""
    for path, record in records.items():
        if _leaves(path): return f"the path {path!r} leads out of the folder"
        if type(record.bytes) is not int or record.bytes < 0: return f"{record.bytes!r} bytes"
        if len(record.sha256) != 64: return f"the sha256 {record.sha256!r}"
    return ""


def wrong_archive(archive: Any) -> str:
    """What is wrong with an archive: a place that is none of a run, a size that is none, text that cannot be shown."""
    if not isinstance(archive, Archive): return f"a {type(archive).__name__}"
    if archive.name.split("/")[0] in ("data", "archive", "..", "", "."): return f"the place {archive.name!r}"
    if any(map(_leaves, archive.files)): return "a path leads out of the run"
    texts = (archive.name, archive.experiment, archive.status, archive.started, archive.packed, archive.data)
    if not all(isinstance(text, str) and text.isprintable() for text in texts): return "text that cannot be shown"
    return "" if archive.bytes >= 0 else f"{archive.bytes} bytes"


def _manifest_seeds(_: Path) -> list[bytes]:
    names = ("av2_flow", "brickyard", "lpips", "pandaset_002", "boxtown_clip")
    return [(manifests_folder() / f"{name}.yaml").read_bytes() for name in names]


def _read_manifest(path: Path) -> Manifest:
    """The manifest under the name that it gives, which its file must have."""
    with tempfile.TemporaryDirectory() as folder:
        text = path.read_bytes()
        first = text.partition(b"\n")[0].partition(b":")[2].strip().decode("ascii", "replace")
        name = first if first.isidentifier() else "brickyard"
        target = Path(folder) / f"{name[:80]}.yaml"
        shutil.copy(path, target)
        for listed in manifests_folder().glob("*.sha256"): shutil.copy(listed, folder)
        return load_manifest(target)


def _list_seeds(_: Path) -> list[bytes]:
    lines = (manifests_folder() / "lego_400.sha256").read_bytes().splitlines(keepends=True)
    return [b"".join(lines[:4]), b"".join(lines[4:6])]


def _folder_seeds(_: Path) -> list[bytes]:
    record = {"bytes": len(WEIGHTS), "sha256": hashlib.sha256(WEIGHTS).hexdigest()}
    return [json.dumps({"name": "toy", "files": files}).encode()
            for files in ({"w.bin": record, "a/b": record}, {"a": {"b": record}}, [{"path": "w.bin", **record}])]


def _prepare_folder(folder: Path) -> Path:
    (folder / "a").mkdir(parents=True)
    for name in ("w.bin", "a/b"): (folder / name).write_bytes(WEIGHTS)
    return folder / "MANIFEST.json"


def _tar(entries: dict[str, bytes]) -> bytes:
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.PAX_FORMAT) as tar:
        for name, data in entries.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, BytesIO(data))
    return buffer.getvalue()


def _sdist_seeds(_: Path) -> list[bytes]:
    return [_tar({"toy-1.0/setup.py": b"raise SystemExit", "toy-1.0/w.bin": WEIGHTS}),
            _tar({"toy-1.0/" + "long" * 50: b"x", "toy-1.0/w.bin": WEIGHTS})]


def _take(path: Path) -> dict[str, bytes]:
    record = FileRecord(len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest())
    with tempfile.TemporaryDirectory() as folder:
        take_members(path, {"w": "w.bin"}, {"w": record}, Path(folder))
        return {one.name: one.read_bytes() for one in Path(folder).iterdir()}


def _page_seeds(_: Path) -> list[bytes]:
    files = [{"filename": "toy-1.0.tar.gz", "url": "https://example.org/toy-1.0.tar.gz", "hashes": {}}]
    return [json.dumps({"meta": {"api-version": "1.0"}, "name": "toy", "files": files}).encode()]


def _read_page(path: Path) -> list[str]: return _links_in_page(path.read_bytes().decode("utf-8", "replace"), True)


def _run_archive() -> bytes:
    status = json.dumps({"experiment": "toy", "status": "finished", "started": "2026-01-31T12:00:00+00:00"}).encode()
    files = {"status.json": status, "results.json": b'{"results": {"psnr_db": 31.0}}', "checkpoints/final.pt": WEIGHTS}
    manifest = {"format": 1, "place": "toy/one", "experiment": "toy", "status": "finished", "gates": "", "data": "toy",
                "started": "2026-01-31T12:00:00+00:00", "packed": "2026-02-01T12:00:00+00:00", "folders": ["empty"],
                "links": {"checkpoints/latest.pt": "final.pt"},
                "again": {"checkpoints/best.pt": "checkpoints/final.pt"},
                "files": {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                          for name, data in files.items()}}
    members = {f"run/{name}": data for name, data in files.items()}
    return _tar({"manifest.json": json.dumps(manifest).encode(), **members})


def _archive_seeds(folder: Path) -> list[bytes]: return [_run_archive(), *archive_seeds(folder)]


def _restore(path: Path) -> list[str]:
    """What lies where after a restoration; the scratch folder is removed."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        run = restore_run(path, root / "outputs")
        assert read_run(run).status, "a restored run has a status"
        return [one.relative_to(root).as_posix() for one in root.rglob("*") if not one.is_dir()]


def _wrong_places(paths: list[str]) -> str:
    wrong = next((one for one in paths if not one.startswith("outputs/") or one.startswith("outputs/data/")), None)
    return f"{wrong} was written" if wrong else ""


def _member_names(path: Path) -> list[str]:
    with open_tarball(path) as tar: return [member.name for member in tar_members(tar, 10**7, path.name)]


READERS = [
    Reader("dataset_page", "yaml", _manifest_seeds, _read_manifest, wrong_manifest, suffix=".yaml"),
    Reader("checksum_list", "text", _list_seeds, lambda path: data_manifests._read_lines(path), wrong_records),
    Reader("folder_manifest", "json", _folder_seeds, lambda path: verify_folder(path.parent),
           lambda one: "" if isinstance(one, Verification) else f"a {type(one).__name__}", _prepare_folder),
    Reader("sdist_members", "tar", _sdist_seeds, _take, lambda found: "" if found == {"w": WEIGHTS} else "other files",
           suffix=".tar.gz"),
    Reader("index_page", "json", _page_seeds, _read_page,
           lambda links: "" if all(isinstance(one, str) for one in links) else "a link that is no text"),
    Reader("archive_manifest", "tar", _archive_seeds, read_archive, wrong_archive, suffix=".tar.gz"),
    Reader("archive_restore", "tar", _archive_seeds, _restore, _wrong_places, suffix=".tar.gz"),
    Reader("tarball", "tar", lambda folder: [_run_archive(), *_sdist_seeds(folder)], _member_names,
           lambda names: "" if all(isinstance(one, str) for one in names) else "a name that is no text",
           suffix=".tar.gz"),
]
