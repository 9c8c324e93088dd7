"""Data manifests are strict, verification finds every kind of damage, and synthetic datasets are generated once and
whole."""
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kilonb.core.errors import KiloError
from kilonb.core.hashing import hash_file, hash_folder
from kilonb.data.generation import fingerprint, make
from kilonb.data.manifests import Fetch, FileRecord, Maker, Manifest, load_manifests, manifests_folder, read_records
from kilonb.data.references import resolve_data, weights_folder
from kilonb.data.registry import MAKERS, READERS, find_maker, find_reader
from kilonb.data.verification import verify

PAGES = manifests_folder()
REAL = sorted(name for name,
              manifest in load_manifests().items() if not manifest.synthetic and manifest.kind != "weights")

MAKER = '''
import time
from pathlib import Path

def write(folder, count=3, seed=0, pause_s=0.0):
    Path(folder).mkdir()
    for i in range(count):
        time.sleep(pause_s)
        (Path(folder) / f"{i}.txt").write_text(f"{seed} {i}")
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A synthetic dataset of a maker that is registered for the length of a test."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "toy_maker.py").write_text(MAKER)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    monkeypatch.delitem(sys.modules, "toy_maker", raising=False)
    monkeypatch.setitem(MAKERS, "toy", "toy_maker:write")
    return {"toy": Manifest("toy", "Text files", "blender", "ours", "Apache-2.0", "flat",
                            maker=Maker("toy", {"count": 2}))}


def data_root() -> Path:
    if not os.environ.get("KILONB_DATA"): pytest.skip("KILONB_DATA is unset: no real data here")
    return Path(os.environ["KILONB_DATA"])


def test_every_manifest_has_source_licence_layout_and_checksums():
    manifests = load_manifests()
    assert {"brickyard", "lego_400", "playbot", "lpips"} <= set(manifests)
    for name, manifest in manifests.items():
        assert manifest.source and manifest.licence and manifest.layout, name
        assert manifest.synthetic or manifest.files, f"{name} has no checksums"
    assert manifests["lego_400"].stand_in == "brickyard" and len(manifests["lego_400"].files) == 303


@pytest.mark.parametrize("name", REAL)
def test_real_data_agrees_with_its_manifest(name):
    report = verify(name, data_root())
    assert report.ok and set(report.extra) <= {"DATASET_TERMS.md"}, report.summary()      # its owner's, beside the data
    assert report.bytes == load_manifests()[name].total_bytes


def test_the_manifest_of_lego_agrees_with_the_dataset_s_own_list():
    listing = json.loads((data_root() / "lego_400" / "MANIFEST.json").read_text())
    assert read_records(listing["files"]) == load_manifests()["lego_400"].files


def test_one_changed_pixel_in_three_hundred_images_is_found(tmp_path):
    shutil.copytree(data_root() / "lego_400", tmp_path / "lego_400", copy_function=shutil.copyfile)
    tmp_path.joinpath("lego_400").chmod(0o755)
    for folder in ("train", "test"): tmp_path.joinpath("lego_400", folder).chmod(0o755)
    before = hash_folder(tmp_path / "lego_400")
    victim = tmp_path / "lego_400" / "train" / "r_57.png"
    content = bytearray(victim.read_bytes())
    content[-40] ^= 1
    victim.write_bytes(content)
    report = verify("lego_400", tmp_path)
    assert not report.ok and report.wrong_sha256 == ("train/r_57.png",) and not report.missing and not report.wrong_size
    assert hash_folder(tmp_path / "lego_400") != before


def test_replaced_data_with_a_replaced_list_of_checksums_is_detected(tmp_path):
    """The chain manifest -> MANIFEST.json -> bytes: data that is replaced together with its list fails at the list."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.bin").write_bytes(b"genuine")

    def listing() -> None:
        (folder / "MANIFEST.json").write_text(
            json.dumps({"files": {"a.bin": {"bytes": 7, "sha256": hash_file(folder / "a.bin")}}})
        )

    listing()
    pin = FileRecord((folder / "MANIFEST.json").stat().st_size, hash_file(folder / "MANIFEST.json"))
    manifest = Manifest("data", "t", "opv2v", "s", "l", "y", checksums="MANIFEST.json", files={"MANIFEST.json": pin},
                        fetch=Fetch("by hand", "copy"))
    assert verify(manifest, tmp_path).ok
    (folder / "a.bin").write_bytes(b"forgery")
    assert verify(manifest, tmp_path).wrong_sha256 == ("a.bin",)
    listing()
    with pytest.raises(KiloError, match="pins by its sha256"): verify(manifest, tmp_path)


def test_every_registered_function_exists_and_every_manifest_names_one():
    for name in MAKERS: assert callable(find_maker(name)), name
    for name in READERS: assert callable(find_reader(name)), name
    for manifest in load_manifests().values():
        assert manifest.loader in ("", *READERS) and (not manifest.maker or manifest.maker.name in MAKERS)


@pytest.mark.parametrize("mistake, expected", [
    ("licens: MIT\n", "did you mean 'licence'"),
    ("loader: blendr\n", "did you mean 'blender'"),
    ("loader: kilonb.scenes.blender:load_blender\n", "given as module:function, which a manifest may not hold"),
    ("maker: {name: bricyard}\n", "did you mean 'brickyard'"),
    ("maker: {name: 'os:system'}\n", "given as module:function, which a manifest may not hold"),
    ("maker: {function: brickyard}\n", "Unknown key of brickyard.yaml.maker 'function'"),
    ("files: {a: {bytes: 1, sha: x}}\n", "did you mean 'sha256'"),
    ("fetch: {how: by hand, instructions: x}\n", "either a maker"),
    ("stand_in: brickyrad\n", "did you mean 'brickyard'"),
    ("entry: ../../elsewhere\n", "not a path inside"),
    ("checksums: nowhere.sha256\n", "not beside it"),
    ("title: [\n", "not YAML"),
    ("kind: ply\n", "must be synthetic and of kind blender"),
])
def test_a_mistake_in_a_manifest_is_one_sentence(tmp_path, mistake, expected):
    shutil.copy(PAGES / "lego_400.yaml", tmp_path), shutil.copy(PAGES / "lego_400.sha256", tmp_path)
    page = (PAGES / "brickyard.yaml").read_text()
    lines = [line for line in page.splitlines(True) if not line.startswith(mistake.partition(":")[0] + ":")]
    if mistake.startswith("maker:"): lines = [line for line in lines if not line.startswith(" ")]
    (tmp_path / "brickyard.yaml").write_text("".join(lines) + mistake)
    with pytest.raises(KiloError, match=expected) as caught: load_manifests(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_of_manifests_is_named(tmp_path):
    with pytest.raises(KiloError, match="no folder of data manifests"): load_manifests(tmp_path / "nowhere")


def test_a_synthetic_dataset_is_generated_once_and_then_reused(toy, tmp_path, capsys):
    first = resolve_data("toy", tmp_path / "cache", manifests=toy)
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == ["making", "made"]
    stamp = first.path.stat().st_mtime_ns
    assert resolve_data("toy", tmp_path / "cache", manifests=toy) == first and first.path.stat().st_mtime_ns == stamp
    assert capsys.readouterr().out == "" and verify(toy["toy"], first.path).ok
    assert first.path.name == f"toy-{fingerprint(toy['toy'].maker)}" and [
        path.name for path in (tmp_path / "cache").iterdir()
    ] == [first.path.name]


def test_other_parameters_or_other_code_are_other_data(toy, tmp_path):
    """A scene generated by older code must not be found under the new name."""
    one = fingerprint(toy["toy"].maker)
    assert fingerprint(Maker("toy", {"count": 3})) != one
    with open(tmp_path / "code" / "toy_maker.py", "a") as file: file.write("\n# a change\n")
    assert fingerprint(toy["toy"].maker) != one


def test_a_changed_comment_in_the_maker_does_not_change_the_data(toy, tmp_path):
    """A run is resumed only on data of the same digest, so that code which makes the same bytes has the same digest."""
    before = resolve_data("toy", tmp_path / "cache", manifests=toy)
    with open(tmp_path / "code" / "toy_maker.py", "a") as file: file.write("\n# a comment\n")
    after = resolve_data("toy", tmp_path / "cache", manifests=toy)
    assert after.path != before.path and after.sha256 == before.sha256


def test_the_same_parameters_make_the_same_bytes(toy, tmp_path):
    assert hash_folder(make("toy", tmp_path / "one", manifests=toy)) == hash_folder(
        make("toy", tmp_path / "two", manifests=toy)
    )
    assert hash_folder(make("toy", tmp_path / "three", manifests=toy, seed=1)) != hash_folder(tmp_path / "one")


@pytest.mark.incident(15)
def test_a_killed_maker_leaves_nothing_that_is_read_later(toy, tmp_path):
    """Incident 15: a killed writer leaves no partial dataset under its final name."""
    code = ("import sys; sys.path.insert(0, sys.argv[1])\nfrom kilonb.data.generation import MAKERS, make\n"
            "from kilonb.data.manifests import Maker, Manifest\nMAKERS['toy'] = 'toy_maker:write'\n"
            "toy = {'toy': Manifest('toy', 't', 'blender', 's', 'l', 'y', maker=Maker('toy', {'count': 2}))}\n"
            "make('toy', sys.argv[2], manifests=toy, count=100, pause_s=0.1)")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "code"), str(tmp_path / "out" / "toy")])
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("out/.*/whole/1.txt")) and time.monotonic() < deadline: time.sleep(0.02)
    assert list(tmp_path.glob("out/.*/whole/1.txt"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "toy").exists()
    make("toy", tmp_path / "out" / "toy", manifests=toy)
    assert verify(toy["toy"], tmp_path / "out" / "toy").ok


def _make_in_process(code: str, folder: str, results) -> None:
    sys.path.insert(0, code)
    MAKERS["toy"] = "toy_maker:write"
    toy = {"toy": Manifest("toy", "t", "blender", "s", "l", "y", maker=Maker("toy", {"count": 4, "pause_s": 0.05}))}
    results.put(hash_folder(make("toy", folder, manifests=toy)))


def test_two_processes_that_generate_the_same_dataset_both_finish(toy, tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_make_in_process,
                                 args=(str(tmp_path / "code"), str(tmp_path / "out" / "toy"), results))
                 for _ in range(2)]
    for process in processes: process.start()
    digests = {results.get(timeout=60) for _ in processes}
    for process in processes: process.join(30)
    assert len(digests) == 1 and [path.name for path in (tmp_path / "out").iterdir()] == ["toy"]


def test_a_folder_that_cannot_be_written_is_named(toy, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(KiloError, match="Cannot make toy"): make("toy", tmp_path / "file" / "toy", manifests=toy)


def test_brickyard_has_the_layout_that_the_reader_of_lego_reads(tmp_path):
    """One reader for real and synthetic data: the stand-in of lego is read by the reader that lego's manifest names."""
    manifests = load_manifests()
    folder = make("brickyard", tmp_path / "bricks", width=24, height=16, train=2, test=1)
    assert verify("brickyard", folder).ok
    reference = resolve_data(f"blender:{folder}")
    scene = find_reader(manifests["lego_400"].loader)(reference.path, "train")
    assert len(scene) == 2 and reference.kind == manifests["lego_400"].kind == "blender"
    with pytest.raises(KiloError, match="did you mean 'width'"): make("brickyard", tmp_path / "more", widht=24)


def test_named_real_data_is_found_under_the_root(tmp_path):
    root = data_root()
    lego = resolve_data("lego_400", tmp_path, root)
    assert (lego.kind, lego.path, lego.name) == ("blender", (root / "lego_400").resolve(), "lego_400")
    assert lego.sha256 == resolve_data(f"blender:{root / 'lego_400'}").sha256
    playbot = resolve_data("playbot", tmp_path, root)
    assert (
        playbot.path.is_file() and playbot.sha256 == load_manifests()["playbot"].files["playbot_lod3_inria.ply"].sha256
    )


@pytest.mark.parametrize("text, expected", [
    ("brickyrad", "did you mean 'brickyard'"), ("blendr:/x", "did you mean 'blender'"), ("", "Unknown dataset"),
    ("blender:/no/such/folder", "is not there"), ("blender:", "is not there"), ("lego_400", "stand-in is 'brickyard'"),
    ("ply", "write ply:PATH"), (f"ply:{PAGES}", "is a folder"), (str(PAGES), "give its kind too"),
])
def test_data_that_cannot_be_resolved_is_one_sentence(tmp_path, text, expected):
    with pytest.raises(KiloError, match=expected) as caught: resolve_data(text, tmp_path)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_weights_that_are_cut_short_do_not_count_as_installed(tmp_path):
    page = load_manifests()["lpips"]
    (tmp_path / "lpips").mkdir()
    for path, record in page.files.items():
        with open(tmp_path / "lpips" / path, "wb") as file: file.truncate(record.bytes)
    assert weights_folder("lpips", tmp_path) == tmp_path / "lpips"
    with open(tmp_path / "lpips" / "vgg16.ckpt", "r+b") as file: file.truncate(1000)
    assert weights_folder("lpips", tmp_path) != tmp_path / "lpips"
    report = verify("lpips", tmp_path)
    assert report.wrong_size == ("vgg16.ckpt",) and report.wrong_sha256 == ("alexnet.ckpt",)
