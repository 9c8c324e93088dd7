"""Readers of exports: the record of an export, and what a folder of a run holds that can be exported."""
from pathlib import Path
from typing import Any

from kilonb.core.files import dumps
from kilonb.sharing.export_folders import read_export, write_export_record
from tests.fuzz.engine import Reader


def _record(folder: Path) -> list[bytes]:
    (folder / "a.txt").write_text("a")
    write_export_record(folder, [{"file": "a.txt", "psnr_db": 41.5}], {"run": "line/one", "missing": {}})
    return [(folder / "export.json").read_bytes()]


def _read(path: Path) -> dict[str, Any]: return read_export(path.parent)


def _wrong(record: dict[str, Any]) -> str:
    dumps(record)
    outside = [entry["file"] for entry in record["files"] if ".." in Path(entry["file"]).parts]
    return f"files outside of the folder: {outside}" if outside else ""


READERS = [Reader("export_record", "json", _record, _read, _wrong, prepare=lambda folder: folder / "export.json")]
