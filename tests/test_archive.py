"""Archives of runs are complete and restored exactly, an interrupted call leaves no half-written state, and nothing is
written outside the run's folder; comparison of two runs."""
import errno
import gzip
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
from dataclasses import replace

import psutil
import pytest

from kilonb.runs import archive
from kilonb.runs.archive import MANIFEST, archive_path, archive_runs, list_archives, read_archive, restore_run
from kilonb.runs.selection import choose_runs, run_rows
from kilonb.runs.comparison import compare_rows, environment_differences, explain_difference
from kilonb.core.errors import KiloError
from kilonb.core.files import write_json
from kilonb.runs.gates import Gate
from kilonb.runs.folders import open_run
from kilonb.runs.records import list_runs, read_run
from kilonb.runs.status import ABANDONED, FINISHED, mark_run, read_status


def make_run(outputs, name="a", experiment="toy", status=FINISHED, started="2026-01-31T12:00:00+00:00",
             data="brickyard", **parameters):
    known = {"kind": "blender", "name": data, "sha256": "0a" * 32}
    run = open_run(experiment, outputs / experiment / name, {"data": data, "seed": 0, **parameters}, known, seed=0)
    (run.checkpoints / "step_10.pt").write_bytes(os.urandom(50_000))
    (run.folder / "rays" / ".hidden").mkdir(parents=True)
    (run.folder / "rays" / ".hidden" / "ünïcode name.txt").write_text("kept")
    (run.folder / "empty").mkdir()
    run.finish({"psnr_db": 31.0}, [Gate("psnr_db", at_least=30.0)])
    mark_run(run.folder, status, "it failed" if status == "failed" else "", started=started)
    return read_run(run.folder)


def everything(folder):
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in sorted(folder.rglob("*"))}


def repacked(source, target, change):
    """An archive with changed members. change: function of the list of (TarInfo, bytes)."""
    with tarfile.open(source) as tar: members = [(member, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(target, "w:gz") as tar:
        for member, data in change(members):
            member.size = len(data) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(data) if member.isreg() else None)
    return target


def with_manifest(**changes):
    def change(members):
        manifest = json.loads(members[0][1]) | changes
        return [(members[0][0], json.dumps(manifest).encode()), *members[1:]]
    return change


def test_an_archived_run_is_restored_byte_for_byte(tmp_path):
    record = make_run(tmp_path)
    before = everything(record.folder)
    (kept,) = archive_runs([record])
    assert (
        kept.path == tmp_path / "archive" / "toy-a.tar.gz" and not record.folder.exists() and list_runs(tmp_path) == []
    )
    assert kept.status == FINISHED and kept.gates == "1/1" and kept.data == "brickyard"
    assert set(kept.files) == {name for name, held in before.items() if held is not None}
    assert (
        restore_run(kept.path) == record.folder and everything(record.folder) == before and read_run(record.folder).ok
    )
    assert not list(record.folder.parent.glob(".*"))


def test_an_archive_can_be_restored_elsewhere(tmp_path):
    (kept,) = archive_runs([make_run(tmp_path / "here")], tmp_path / "kept")
    assert (
        kept.path.parent == tmp_path / "kept"
        and restore_run(kept.path, tmp_path / "there") == tmp_path / "there" / "toy" / "a"
    )


def test_runs_of_two_sweeps_do_not_share_an_archive(tmp_path):
    records = []
    for sweep in ("night", "day"):
        run = open_run("toy", tmp_path / "sweeps" / sweep / "001-1f3a")
        run.finish({"psnr_db": 1.0})
        records.append(read_run(run.folder))
    archived = archive_runs(records)
    assert [kept.path.name for kept in archived] == ["night-001-1f3a.tar.gz", "day-001-1f3a.tar.gz"]
    assert restore_run(archived[0].path, tmp_path) == records[0].folder


@pytest.mark.parametrize("status", ["running", "prepared"])
def test_a_running_run_is_not_archived_and_neither_are_the_others(tmp_path, status):
    over, going = make_run(tmp_path, "over"), open_run("toy", tmp_path / "toy" / "going")
    mark_run(going.folder, status)
    for delete in (False, True):
        with pytest.raises(KiloError, match=f"toy/going is {status}: only runs that have ended"):
            archive_runs([over, read_run(going.folder)], delete=delete)
    assert over.folder.exists() and going.folder.exists() and not (tmp_path / "archive").exists()


def test_a_run_that_was_resumed_after_it_was_listed_is_not_archived(tmp_path):
    record = make_run(tmp_path, status="interrupted")
    mark_run(record.folder, "running",
             process={"pid": os.getpid(), "created": psutil.Process().create_time(), "host": platform.node()})
    with pytest.raises(KiloError, match="is running"): archive_runs([record])
    assert record.folder.exists()


def test_a_run_that_is_resumed_while_it_is_packed_stays(tmp_path, monkeypatch):
    record = make_run(tmp_path, status="interrupted")
    pack = archive._pack
    def resumed_meanwhile(*arguments):
        pack(*arguments)
        mark_run(record.folder, "running")
    monkeypatch.setattr(archive, "_pack", resumed_meanwhile)
    with pytest.raises(KiloError, match="is running"): archive_runs([record])
    assert record.folder.exists()


def test_a_run_of_a_running_sweep_is_not_archived(tmp_path):
    run = open_run("toy", tmp_path / "sweeps" / "night" / "001")
    run.finish({"psnr_db": 1.0})
    process = read_status(run.folder)["process"]
    write_json(tmp_path / "sweeps" / "night" / "sweep.json", {})
    write_json(tmp_path / "sweeps" / "night" / "status.json",
               {"kind": "sweep", "status": "running", "process": process})
    with pytest.raises(KiloError, match="belongs to a sweep that is running"): archive_runs([read_run(run.folder)])
    write_json(tmp_path / "sweeps" / "night" / "status.json",
               {"kind": "sweep", "status": "finished", "process": process})
    assert len(archive_runs([read_run(run.folder)])) == 1


def test_a_damaged_run_is_named_and_left(tmp_path):
    record = make_run(tmp_path)
    (record.folder / "status.json").write_text('{"status": "fini')
    (damaged,) = choose_runs(tmp_path)
    assert damaged.status == "unreadable"
    for requested in (damaged, record):
        with pytest.raises(KiloError, match=r"status\.json is not JSON"): archive_runs([requested])
    assert record.folder.exists()


def test_a_missing_folder_is_named(tmp_path):
    record = make_run(tmp_path)
    archive_runs([record])
    with pytest.raises(KiloError, match="no run in"): archive_runs([record])
    with pytest.raises(KiloError, match="There is no archive"): restore_run(tmp_path / "nowhere.tar.gz", tmp_path)
    assert list_archives(tmp_path / "nowhere") == [] and choose_runs(tmp_path / "nowhere") == []


@pytest.mark.parametrize("place", ["tarfile.copyfileobj", "os.fsync", "os.replace"])
def test_a_full_disk_leaves_the_run_untouched_and_nothing_half_written(tmp_path, monkeypatch, place):
    record = make_run(tmp_path)
    before = everything(record.folder)
    def full(*_, **__): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    module, name = place.split(".")
    monkeypatch.setattr({"tarfile": tarfile, "os": archive.os}[module], name, full)
    with pytest.raises(KiloError, match=r"toy/a was not archived to .* and was left in place: No space left on device"):
        archive_runs([record])
    monkeypatch.undo()
    assert everything(record.folder) == before and list(tmp_path.rglob("*.tar.gz*")) == []


def test_a_real_limit_on_the_size_of_files_leaves_the_run_untouched(tmp_path):
    record = make_run(tmp_path)
    before = everything(record.folder)
    code = f"""
import resource, signal
from kilonb.runs.archive import archive_runs
from kilonb.runs.records import read_run
from kilonb.core.errors import KiloError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try: archive_runs([read_run({str(record.folder)!r})])
except KiloError as error: print(error)
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert "was not archived" in printed and "File too large" in printed
    assert everything(record.folder) == before and list(tmp_path.rglob("*.tar.gz*")) == []


def test_a_target_that_cannot_be_written_is_named(tmp_path):
    record = make_run(tmp_path)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(KiloError, match="was not archived to"): archive_runs([record], tmp_path / "file")
    assert record.folder.exists()


def test_a_run_that_changes_while_it_is_packed_is_kept(tmp_path, monkeypatch):
    record = make_run(tmp_path)
    describe = archive._make_manifest
    def then_change(given):
        described = describe(given)
        (record.folder / "checkpoints" / "step_10.pt").write_bytes(b"another")
        return described
    monkeypatch.setattr(archive, "_make_manifest", then_change)
    with pytest.raises(KiloError, match="toy/a changed while it was packed"): archive_runs([record])
    assert record.folder.exists() and list(tmp_path.rglob("*.tar.gz*")) == []


def test_a_call_killed_between_packing_and_removing_is_finished_by_repeating_it(tmp_path, monkeypatch):
    record = make_run(tmp_path)
    monkeypatch.setattr(archive, "_remove", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): archive_runs([record])
    monkeypatch.undo()
    stamp = archive_path(record).stat().st_mtime_ns
    assert record.folder.exists()
    (kept,) = archive_runs([record])
    assert kept.path.stat().st_mtime_ns == stamp and not record.folder.exists()


def test_after_a_kill_while_removing_no_partial_run_is_listed_and_the_rest_is_removed(tmp_path, monkeypatch):
    record, second = make_run(tmp_path), make_run(tmp_path, "b")
    monkeypatch.setattr(archive.shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): archive_runs([record])
    monkeypatch.undo()
    assert [run.folder.name for run in list_runs(tmp_path, sweeps=True)] == ["b"]
    archive_runs([second])
    assert list((tmp_path / "toy").iterdir()) == []


def test_a_process_killed_while_packing_leaves_no_archive(tmp_path):
    record = make_run(tmp_path)
    code = f"""
import os, signal, tarfile
from kilonb.runs.archive import archive_runs
from kilonb.runs.records import read_run
tarfile.copyfileobj = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
archive_runs([read_run({str(record.folder)!r})])
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert list_archives(tmp_path) == [] and len(archive_runs([record])) == 1


def test_an_archive_is_not_replaced_by_another_run_of_the_same_name(tmp_path):
    (kept,) = archive_runs([make_run(tmp_path)])
    before = kept.path.read_bytes()
    again = make_run(tmp_path)
    with pytest.raises(KiloError, match="exists and holds another run"): archive_runs([again])
    assert again.folder.exists() and kept.path.read_bytes() == before
    with pytest.raises(KiloError, match="exists: move it away"): restore_run(kept.path)


def test_what_cannot_be_restored_is_not_packed(tmp_path):
    record = make_run(tmp_path)
    (tmp_path / "big").mkdir()
    (record.folder / "data").symlink_to(tmp_path / "big")
    with pytest.raises(KiloError, match="neither a regular file nor a folder"): archive_runs([record])
    (record.folder / "data").unlink()
    os.mkfifo(record.folder / "pipe")
    with pytest.raises(KiloError, match="pipe"): archive_runs([record])
    (record.folder / "pipe").unlink()
    (record.folder / "latest.pt").symlink_to("checkpoints/step_10.pt")
    held = (record.folder / "latest.pt").read_bytes()
    (kept,) = archive_runs([record])
    assert (restore_run(kept.path) / "latest.pt").read_bytes() == held


def test_an_abandoned_run_stays_abandoned_on_another_machine(tmp_path):
    record = make_run(tmp_path)
    mark_run(record.folder, "running", process={"pid": 2**22 + 1, "created": 1.0, "host": platform.node()})
    (kept,) = archive_runs([read_run(record.folder)])
    assert kept.status == ABANDONED and read_run(restore_run(kept.path)).status == ABANDONED


def test_a_run_given_twice_is_archived_once(tmp_path):
    record = make_run(tmp_path)
    assert len(archive_runs([record, read_run(record.folder)])) == 1 and not record.folder.exists()


def test_runs_of_one_name_have_columns_of_their_own(tmp_path):
    records = [make_run(tmp_path, "a", "toy"), make_run(tmp_path, "a", "second_toy", steps=1)]
    assert compare_rows(records)[0] == ["", "toy/a", "second_toy/a"]


def test_deleting_packs_nothing(tmp_path):
    record = make_run(tmp_path, status="failed")
    assert archive_runs([record],
                        delete=True) == [] and not record.folder.exists() and not (tmp_path / "archive").exists()


def extra(name, data=b"x", kind=tarfile.REGTYPE, link=""):
    def change(members):
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, link
        return [*members, (member, data)]
    return change


def more_bytes(members):
    return [(member, data + b"more" if member.name.endswith(".pt") else data) for member, data in members]


def linked(members):
    return extra("run/results.json", b"", tarfile.LNKTYPE,
                 "run/status.json")([m for m in members if m[0].name != "run/results.json"])


def other_bytes(members):
    return [(member, data[:-1] + b"?" if member.name.endswith("step_10.pt") else data) for member, data in members]


@pytest.mark.parametrize("change, expected",
                         [(other_bytes, "differs from its manifest"), (lambda members: members[:-1], "lacks"),
                          (lambda members: [*members, members[-1]], "which its manifest does not list"),
                          (lambda members: members[1:], "its first member must be"),
                          (more_bytes, "differs from its manifest"),
                          (extra("run/extra.py"), "which its manifest does not list"),
                          (extra("../../escaped.txt"), "leads out"), (extra("run/../../escaped.txt"), "leads out"),
                          (extra("/tmp/escaped.txt"), "leads out"),
                          (extra("run/link", b"", tarfile.SYMTYPE, "/etc/passwd"), "which its manifest does not list"),
                          (extra("run/status.json", b"", tarfile.SYMTYPE, "/etc/passwd"),
                           "which its manifest does not list"), (linked, "which its manifest does not list"),
                          (with_manifest(place="../escaped"), "leads out"),
                          (with_manifest(place="/tmp/escaped"), "leads out"), (with_manifest(place=""), "leads out"),
                          (with_manifest(folders=["../../escaped"]), "leads out"),
                          (with_manifest(files={"../escaped": {"sha256": "0", "bytes": 1}}), "leads out"),
                          (with_manifest(files=[]), "is not an archive of a run"),
                          (with_manifest(format=2), "is not an archive of a run"),
                          (with_manifest(place=3), "is not an archive of a run")], ids=range(20))
def test_a_changed_archive_is_refused_and_writes_nothing(tmp_path, change, expected):
    (kept,) = archive_runs([make_run(tmp_path / "here")])
    bad = repacked(kept.path, tmp_path / "bad.tar.gz", change)
    before = everything(tmp_path)
    with pytest.raises(KiloError, match=expected): restore_run(bad, tmp_path / "there" / "outputs")
    after = everything(tmp_path)
    assert {path for path in after if after[path] is not None} == {path for path in before if before[path] is not None}
    assert not os.path.exists("/tmp/escaped.txt")


@pytest.mark.parametrize("spoil",
                         [lambda data: data[:len(data) // 2], lambda data: b"", lambda data: b"not a tar file",
                          lambda data: data[:20], lambda data: gzip.compress(b"not a tar"),
                          lambda data: data[:100] + bytes([data[100] ^ 255]) + data[101:]], ids=range(6))
def test_a_damaged_archive_is_named_and_the_others_are_listed(tmp_path, spoil):
    first, second = archive_runs([make_run(tmp_path), make_run(tmp_path, "b")])
    first.path.write_bytes(spoil(first.path.read_bytes()))
    with pytest.raises(KiloError, match=r"toy-a\.tar\.gz"): restore_run(first.path, tmp_path / "there")
    listed = {kept.path.name: kept.status for kept in list_archives(tmp_path)}
    assert listed["toy-b.tar.gz"] == FINISHED and set(listed) == {"toy-a.tar.gz",
                                                                  "toy-b.tar.gz"} and second.path.exists()
    assert not (tmp_path / "there" / "toy" / "a").exists()


def test_a_disk_that_is_too_small_is_detected_before_anything_is_unpacked(tmp_path, monkeypatch):
    (kept,) = archive_runs([make_run(tmp_path / "here")])
    monkeypatch.setattr(archive.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(KiloError, match=r"has 1\.0 kB left"): restore_run(kept.path, tmp_path / "there")
    assert not list((tmp_path / "there").rglob("*.json"))


def test_the_manifest_is_the_first_member(tmp_path):
    (kept,) = archive_runs([make_run(tmp_path)])
    with tarfile.open(kept.path) as tar: names = tar.getnames()
    assert names[0] == MANIFEST and all(name.startswith("run/") for name in names[1:])
    assert read_archive(kept.path).bytes == sum(entry["bytes"] for entry in kept.files.values())


def test_runs_are_chosen_by_all_conditions_given(tmp_path):
    for i, (status,
            data) in enumerate(((FINISHED, "brickyard"), ("failed", "brickyard"), (FINISHED, "brickyard"),
                                (FINISHED, "lego")), 1):
        make_run(tmp_path, f"run{i}", started=f"2026-01-0{i}T00:00:00+00:00", status=status, data=data)
    make_run(tmp_path, "other", "second_toy")
    names = lambda **conditions: [record.folder.name for record in choose_runs(tmp_path, **conditions)]
    assert (
        names(experiments=["toy"]) == ["run1", "run2", "run3", "run4"]
        and names(status="failed") == ["run2"]
        and names(data="lego") == ["run4"]
    )
    assert names(experiments=["toy"], keep_newest=1) == ["run1", "run2"]
    assert names(experiments=["toy"], status=FINISHED, data="brickyard", keep_newest=1) == ["run1"]
    assert names(keep_newest=0) == names() and names(older_than_days=1e6) == [] and len(names(older_than_days=1)) == 5
    for wrong in ({"status": "done"}, {"experiments": ["tpy"]}, {"keep_newest": -1}, {"older_than_days": -0.1}):
        with pytest.raises(KiloError): choose_runs(tmp_path, **wrong)


def test_runs_of_sweeps_are_chosen_on_request_and_the_sweep_itself_is_not_a_run(tmp_path):
    open_run("toy", tmp_path / "sweeps" / "night" / "001").finish({})
    write_json(tmp_path / "sweeps" / "night" / "status.json",
               {"kind": "sweep", "status": "finished", "experiment": "toy"})
    assert choose_runs(tmp_path) == [] and [record.name
                                            for record in choose_runs(tmp_path, sweeps=True)] == ["sweeps/night/001"]


def test_rows_are_as_wide_as_their_headings(tmp_path):
    records = [make_run(tmp_path, "a", learning_rate=0.1), make_run(tmp_path, "b", learning_rate=0.2)]
    for headings, rows in (run_rows(records), compare_rows(records), archive.archive_rows(archive_runs(records))):
        assert rows and all(len(row) == len(headings) and all(isinstance(cell, str) for cell in row) for row in rows)


def changed(record, **environment): return replace(record, environment={**record.environment, **environment})


@pytest.fixture
def clean(tmp_path):
    """A run at a commit without changes, whatever the state of the checkout that the test runs in."""
    return changed(make_run(tmp_path), commit="a" * 40, dirty=False, changes=None)


def test_the_table_of_environments_holds_what_differs_one_package_a_line(clean):
    other = changed(clean, packages={**clean.environment["packages"], "numpy": "1.0"},
                    hardware={**clean.environment["hardware"], "torch_threads": 64}, seed=7)
    headings, rows = environment_differences([clean, other, clean])
    assert headings == ["", "toy/a (1)", "toy/a (2)", "toy/a (3)"] and [row[0] for row in rows] == [
        "seed",
        "packages.numpy",
        "hardware.torch_threads",
    ]
    assert environment_differences([clean]) == (["", "a"], []) and rows[1][2] == "1.0"


def test_data_with_the_same_hash_is_the_same_in_any_folder(clean):
    moved = changed(clean, data=[{**clean.environment["data"][0], "path": "/elsewhere"}])
    moved = replace(moved, parameters={**clean.parameters, "data": "blender:/elsewhere"})
    assert environment_differences([clean, moved])[1] == [] and explain_difference(clean, moved)[0].startswith(
        "Nothing that was recorded differs"
    )


def test_reasons_come_in_the_order_of_their_relevance(clean):
    environment = clean.environment
    other = replace(clean, parameters={**clean.parameters, "steps": 9},
                    environment={**environment, "data": [{"name": "lego", "sha256": "0b" * 32}], "commit": "b" * 40,
                                 "seed": 1, "packages": {**environment["packages"], "torch": "1.0"},
                                 "hardware": {**environment["hardware"], "processor": "another", "torch_threads": 64}})
    sentences = explain_difference(clean, other)
    subjects = [sentence.split()[1 if sentence.startswith("The") else 0] for sentence in sentences]
    assert subjects == ["data", "code", "Parameters", "seeds", "Packages", "machines", "number"]


@pytest.mark.parametrize("ours, theirs, expected",
                         [({"dirty": True}, {}, "it was not recorded which"),
                          ({"dirty": True, "changes": "1" * 64}, {"dirty": True, "changes": "2" * 64}, "which differ"),
                          ({"dirty": True, "changes": "1" * 64}, {"dirty": True, "changes": "1" * 64},
                           "Nothing that was recorded differs"), ({"commit": None}, {}, "recorded no commit"),
                          ({"data": []}, {"data": []}, "Neither run recorded its data"),
                          ({"data": [{"name": "x"}]}, {"data": [{"name": "x"}]}, "without a hash it is unknown"),
                          ({"threads": {"OMP_NUM_THREADS": "1"}}, {}, "Thread settings")])
def test_what_was_not_recorded_is_not_assumed_to_be_equal(clean, ours, theirs, expected):
    sentences = explain_difference(changed(clean, **ours), changed(clean, **theirs))
    assert any(expected in sentence for sentence in sentences), sentences


def test_a_run_without_a_recorded_environment_is_named(clean):
    assert "recorded no environment" in explain_difference(clean, replace(clean, environment={}))[0]
