"""Pages that `make readme` generates beside README.md: nbs/results/README.md, all kept results by system with picture,
command and gates; nbs/README.md, the notebooks by package with the sentence that says what each provides;
data_manifests/README.md, the datasets; and the table of headline results in README.md.
"""
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from kilonb.core.documents import read_json, read_object, read_yaml
from kilonb.core.errors import KiloError, shorten
from kilonb.core.text import count_noun, format_duration, markdown_table
from kilonb.data.manifests import Manifest, load_manifests
from kilonb.reports.html_parts import with_unit
from kilonb.reports.overview import REPRODUCED, last_held, result_basis
from kilonb.runs.gates import GREEN, RED, GateLine, GateReport
from kilonb.runs.note_figures import notes_table, read_notes
from kilonb.runs.notebooks import list_notebooks, read_notebook
from kilonb.runs.records import RunRecord, data_label, list_runs
from kilonb.runs.verdicts import judged_report

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
RESULTS = NBS / "results"
NOTE = "<!-- made by `make readme`: edit tools/results_page.py, not this page -->\n"
HEADLINE_COLUMNS = ("result", "ours", "bound", "notes, published", "trivial baseline", "verdict", "last held")
OTHER = "What they run on"
KINDS = {"experiments": "kilonb run {}", "benchmarks": "kilonb bench {}", "explore": "open in `make lab`"}


def read_systems(path: Path = ROOT / "tools" / "headlines.yaml") -> dict[str, dict[str, Any]]:
    """System -> {about, notebooks, headlines}. Raises KiloError where the file says something else."""
    values = read_yaml(path)
    for name, one in values.items():
        if set(one) != {"about", "notebooks", "headlines"}:
            raise KiloError(f"{path.name}: {name} has {shorten(sorted(one))}; expected about, notebooks and headlines.")
        for headline in one["headlines"]:
            if set(headline) != {"what", "kept", "result"}:
                raise KiloError(f"{path.name}: a headline of {name} is {shorten(headline)}; expected what, kept and "
                                "result.")
    return values


def system_of(experiment: str, systems: Mapping[str, Mapping[str, Any]]) -> str:
    """The system that a notebook belongs to."""
    return next((name for name, one in systems.items() if experiment in one["notebooks"]), OTHER)


@cache
def kept_results() -> dict[str, tuple[RunRecord, GateReport]]:
    """`experiment/data` -> kept result and its gates, judged by those of today."""
    found = {f"{one.experiment}/{one.folder.name}": (one, judged_report(one, ROOT)) for one in list_runs(RESULTS)}
    return dict(sorted(found.items()))


def reproduced() -> dict[str, Any]:
    """`experiment/data` -> what the newest repetition found."""
    path = RESULTS / REPRODUCED
    return read_object(path) if path.is_file() else {}


def verdict_words(line: GateLine, report: GateReport) -> str:
    """`green`, `red` in bold, and whether the run decides."""
    words = f"**{line.verdict}**" if line.verdict == RED else line.verdict
    return f"{words}, does not decide" if report.note else words


def headline_row(headline: Mapping[str, str], link: str) -> list[str]:
    """The row of one headline result. link: the page of all results, seen from the table; "": no link. Raises
    KiloError where no such result is kept."""
    record, report = kept_results().get(headline["kept"], (None, None))
    line = next((one for one in report.lines if one.gate.result == headline["result"]), None) if report else None
    if line is None:
        raise KiloError(f"headlines.yaml names {headline['kept']}: {headline['result']}, which is not kept.")
    name, basis = line.gate.result, result_basis(line.gate.result, record.results)
    _, _, bound, notes, published, baseline, _ = line.cells()
    others = "; ".join(filter(None, (f"notes {notes}" if notes else "", published)))
    what = f"[{headline['what']}]({link}#{anchor(headline['kept'])})" if link else headline["what"]
    if basis: what += f" ({basis})"
    return [what, with_unit(name, line.value), bound, others, baseline, verdict_words(line, report),
            last_held(record, reproduced())]


def headline_tables(link: str = "results/README.md") -> str:
    """The headline results of every system, one row each, as Markdown; the first of each kept result links to it."""
    parts = []
    for name, one in read_systems().items():
        kept = [headline["kept"] for headline in one["headlines"]]
        rows = [headline_row(headline, "" if headline["kept"] in kept[:at] else link)
                for at, headline in enumerate(one["headlines"])]
        parts.append(f"**{name}**: {one['about']}\n\n{markdown_table(HEADLINE_COLUMNS, rows)}")
    return "\n\n".join(parts)


def red_results() -> list[tuple[str, str]]:
    """(kept, result) of every gate that is red although its run decides."""
    return [(name, line.gate.result) for name, (_, report) in kept_results().items() if not report.note
            for line in report.lines if line.verdict == RED]


def counts() -> str:
    """How many results, pictures, gates, green and red gates there are today."""
    lines = [line for _, report in kept_results().values() for line in report.lines]
    green, red = (sum(line.verdict == word for line in lines) for word in (GREEN, RED))
    rest = f", {len(lines) - green - red} not judged here" if green + red < len(lines) else ""
    pictures = sum((record.folder / "picture.jpg").is_file() for record, _ in kept_results().values())
    return (f"{len(kept_results())} kept results, {pictures} of them with a picture, with {len(lines)} gates: "
            f"{green} green, {red} red{rest}")


def anchor(name: str) -> str:
    """The name that GitHub gives the heading `experiment/data`."""
    return re.sub(r"[^\w\- ]", "", name.lower())


def credit(label: str, manifests: Mapping[str, Manifest]) -> str:
    """Whose data a picture shows, where it is not ours: title and licence of the dataset."""
    name = label.rpartition(":")[2]
    found = next((one for one in manifests.values()
                  if name and (name.startswith(one.name) or one.name.startswith(name))), None)
    if found is None or found.synthetic or ":" not in label: return ""
    return f" Data: {found.title} ({found.licence})."


def kept_part(name: str, record: RunRecord, report: GateReport) -> str:
    """One kept result: heading, question, picture, command, machine, gates folded."""
    kept, hardware = read_object(record.folder / "kept.json"), record.environment.get("hardware", {})
    kind, path = next((kind, found) for kind in KINDS if (found := list_notebooks(kind, ROOT).get(record.experiment)))
    asks = read_notebook(path).summary if path else ""
    picture = f"{name}/picture.jpg"
    shown = (f'<img src="{picture}" width="480" alt="{record.experiment} on {data_label(record) or "its own data"}">'
             if (RESULTS / picture).is_file() else f"*No picture kept{_why(kept)}.*")
    facts = (f"{record.started[:10]}, {format_duration(record.elapsed_s)} on {hardware.get('cores', '?')} cores of "
             f"{hardware.get('processor', 'an unknown processor')}; last held {last_held(record, reproduced())}.")
    rows = [[named(line, record), *line.cells()[1:-1], verdict_words(line, report)] for line in report.lines]
    table = markdown_table(("result", "ours", "bound", "notes", "published", "trivial baseline", "verdict"), rows)
    note = f"\n\nDoes not decide: {report.note}" if report.note else ""
    command = kept["command_line"] if kept["command_line"] != "unknown" else "# not recorded: the run is older"
    more = " (reconstructed)" if kept.get("reconstructed") else ""
    first = report.lines[0] if report.lines else None
    number = f" `{first.gate.result}` {with_unit(first.gate.result, first.value)}." if first else ""
    source = f"([notebook](../{kind}/{path.name}))"
    text = [f"### {name}", f"{asks} {source}{number}{credit(data_label(record), load_manifests())}", shown,
            f"```sh\n{command}\n```", f"{facts}{more}{note}",
            f"<details><summary>{count_noun(len(rows), 'gate')}</summary>", table, "</details>"]
    return "\n\n".join(text)


def named(line: GateLine, record: RunRecord) -> str:
    """The name of a gated result, and what it rests on."""
    basis = result_basis(line.gate.result, record.results)
    return f"`{line.gate.result}`" + (f" ({basis})" if basis else "")


def _why(kept: Mapping[str, Any]) -> str:
    return f": {kept.get('no_picture', 'the folder of the run is gone')}"


def results_page() -> str:
    """nbs/results/README.md."""
    systems = read_systems()
    parts = [f"{NOTE}# Kept results", f"{counts()}. Each holds its parameters, command, commit, hardware and date, and "
             "is judged by the gates of today. *Notes*: what the lab diaries reached on the same data, in the same "
             "colour space and by the same definition. A run that *does not decide* is not at the experiment's own "
             "settings. `make reproduce` runs those of under 15 minutes again. [Back to README](../../README.md)."]
    for system, one in systems.items():
        parts.append(f"## {system}\n\n{one['about'].capitalize()}.")
        parts += [kept_part(name, record, report) for name, (record, report) in kept_results().items()
                  if system_of(record.experiment, systems) == system]
    notes = notes_table(read_notes(NBS / "experiments" / "notes.yaml"))
    parts.append("## Figures of the notes\n\nEach once, with what it was measured on "
                 f"([background](../background.ipynb)).\n\n{notes}")
    return "\n\n".join(parts) + "\n"


# --- the notebooks by package

def promise(path: Path) -> str:
    """The sentence in the quotation below a notebook's title; of an experiment, its question."""
    cells = read_json(path)["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells[:3] if cell["cell_type"] == "markdown")
    return next((line[1:].strip() for line in text.splitlines() if line.startswith(">")), "")


def layers(source: str) -> dict[str, str]:
    """Package -> what it contains, from the table of packages in nbs/background.ipynb."""
    return {name: words.strip() for name, words in re.findall(r"^\| \d+ \| `(\w+)` \| (.*?) \|$", source, re.MULTILINE)}


def notebooks_of(folder: Path) -> Iterator[list[str]]:
    for path in sorted(folder.glob("*.ipynb")): yield [f"[{path.stem}]({folder.name}/{path.name})", promise(path)]


def notebooks_page(contents: Mapping[str, str] | None = None) -> str:
    """nbs/README.md. contents: package -> what it contains."""
    folders = sorted({path.parent for path in NBS.glob("*/*.ipynb")})
    first = [NBS / kind for kind in KINDS if (NBS / kind) in folders]
    library = [folder for folder in folders if folder not in first]
    count = sum(1 for folder in folders for _ in folder.glob("*.ipynb"))
    links = ", ".join(f"[{folder.name}](#{folder.name})" for folder in [*first, *library])
    parts = [f"{NOTE}# Notebooks", f"{count} notebooks, committed without outputs: what they produce is in "
             "[kept results](results/README.md), and `make docs` writes all of them as pages, those that were run with "
             f"their outputs. Start with [background](background.ipynb) or [many runs](batch.ipynb).\n\n{links}"]
    for folder in [*first, *library]:
        words = (contents or {}).get(folder.name, "")
        parts.append(f"## {folder.name}\n\n" + (f"{words[:1].upper()}{words[1:]}.\n\n" if words else "")
                     + markdown_table(("notebook", "what it provides" if folder in library else "what it asks"),
                                      list(notebooks_of(folder))))
    return "\n\n".join(parts) + "\n"


def datasets_page() -> str:
    """data_manifests/README.md."""
    def size(one: Manifest) -> str:
        return "made here" if one.synthetic else f"{one.total_bytes / 1e6:.0f} MB" if one.total_bytes else "not known"
    rows = [[f"[{one.name}]({one.name}.yaml)", one.title, one.kind, size(one), one.licence,
             f"`{one.stand_in}`" if one.stand_in else ""] for one in load_manifests(ROOT / "data_manifests").values()]
    return (f"{NOTE}# Datasets\n\nNo data are in this repository; their owners' terms apply. `kilonb data get NAME` "
            "downloads one or prints instructions, `kilonb data verify NAME` compares it with its checksums; those "
            "made here are written on first use. `KILONB_DATA` names a folder with datasets that are there already.\n\n"
            + markdown_table(("name", "what", "kind", "size", "licence", "stand-in"), rows) + "\n")


def pages() -> dict[Path, str]:
    """Path -> text of the pages that are generated beside README.md."""
    table = "".join("".join(cell["source"]) + "\n" for cell in read_json(NBS / "background.ipynb")["cells"])
    return {RESULTS / "README.md": results_page(), NBS / "README.md": notebooks_page(layers(table)),
            ROOT / "data_manifests" / "README.md": datasets_page()}
