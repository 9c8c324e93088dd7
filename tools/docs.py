"""Writes the documentation as a static site of plain HTML files that needs no server and loads nothing: `make docs`.

    python tools/docs.py                       # everything, into outputs/docs
    python tools/docs.py --only core/files     # the pages whose address begins with it, and those that list pages
    python tools/docs.py --check               # every link of what was built, and every page in Chromium at two widths

Pages: README.md, background, batch guide, results, every notebook, an index of all public names, gates, datasets, the
source of every module, search. An experiment whose finished run lies under outputs/ is shown as it was executed there,
another as its source; both with the kept results. No notebook is executed.

Why not Sphinx with myst-nb: it is fast enough (81 notebooks in 18 s here), but every page of its themes runs inline
scripts and loads files, while all pages of this package carry a content-security policy with hashes; and it would add
22 pinned packages that the tests need.
"""
import argparse
import html
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import docs_check
from docs_html import (
    ASSETS,
    Definition,
    Site,
    Writer,
    cells_html,
    code_html,
    definitions,
    page_html,
    plain_text,
    relative,
    source_page,
    table_html,
)

from kilonb.core.documents import read_json
from kilonb.core.errors import KiloError
from kilonb.core.files import atomic_write
from kilonb.core.text import count_noun, format_duration
from kilonb.data.manifests import load_manifests
from kilonb.reports.offline_html import data_uri, notebook_html
from kilonb.runs.folders import outputs_root
from kilonb.runs.gate_files import gate_files, gates_by_condition
from kilonb.runs.notebooks import read_notebook
from kilonb.runs.records import RunRecord, data_label, list_runs
from kilonb.runs.status import FINISHED
from kilonb.runs.verdicts import judged_report

ROOT = Path(__file__).resolve().parent.parent
RUNNABLE = {"experiments": "kilonb run {}", "benchmarks": "kilonb bench {}",
            "explore": "make lab, then explore/{}.ipynb"}
# Files of the repository with a page of their own, and folders whose links lead to the page that lists them.
DOCUMENTS = {"README.md": "index.html", "nbs/index.ipynb": "index.html", "nbs/background.ipynb": "background.html",
             "nbs/batch.ipynb": "batch.html", "CONTRIBUTING.md": "contributing.html", "CHANGELOG.md": "changelog.html",
             "nbs/results/README.md": "results.html", "nbs/README.md": "library.html",
             "data_manifests/README.md": "datasets.html"}
FOLDERS = {"nbs/results": "results.html", "nbs": "library.html", "data_manifests": "data.html",
           **{f"nbs/{kind}": "experiments.html" for kind in RUNNABLE}}


@dataclass
class Build:
    """What a page is written from. site: where links lead. kept: experiment -> kept results. runs: experiment -> the
    finished run that is shown. side: package -> (text, page) of its notebooks."""
    folder: Path
    site: Site = field(default_factory=Site)
    kept: dict[str, list[RunRecord]] = field(default_factory=dict)
    runs: dict[str, RunRecord] = field(default_factory=dict)
    side: dict[str, list[tuple[str, str]]] = field(default_factory=dict)


def cells_of(path: Path) -> list[dict[str, Any]]:
    """The cells of a notebook of this repository."""
    return read_json(path)["cells"]


def title_of(path: Path) -> str:
    """The first heading of a notebook or Markdown file, else its name."""
    text = plain if path.suffix == ".md" and (plain := path.read_text(encoding="utf-8")) else "\n".join(
        "".join(cell["source"]) for cell in (cells_of(path) if path.suffix == ".ipynb" else [])[:3])
    return next((line[2:].strip() for line in text.splitlines() if line.startswith("# ")), path.stem)


def shown_runs(records: Sequence[RunRecord]) -> dict[str, RunRecord]:
    """Experiment -> its newest finished run with an executed notebook; one that decides its gates comes before others.
    records: oldest first."""
    found: dict[str, tuple[bool, RunRecord]] = {}
    for record in records:
        if record.status != FINISHED or not (record.folder / "notebook.ipynb").is_file(): continue
        decides = not judged_report(record).note
        if decides or not found.get(record.experiment, (False,))[0]: found[record.experiment] = (decides, record)
    return {name: record for name, (_, record) in found.items()}


def plan(folder: Path, outputs: Path) -> Build:
    """All pages, public names, kept results and runs that a build of the site shows."""
    build = Build(folder)
    pages = build.site.pages
    pages.update({source: page for source, page in DOCUMENTS.items() if (ROOT / source).is_file()})
    pages.update({source: page for source, page in FOLDERS.items() if (ROOT / source).is_dir()})
    for path in sorted((ROOT / "nbs").glob("*/*.ipynb")):
        page = path.relative_to(ROOT / "nbs").with_suffix(".html").as_posix()
        pages[path.relative_to(ROOT).as_posix()] = page
        pages.setdefault(f"nbs/{path.parent.name}", f"library.html#{path.parent.name}")
        build.side.setdefault(path.parent.name, []).append((path.stem, page))
    for path in sorted((ROOT / "kilonb").rglob("*.py")):
        source = path.relative_to(ROOT).as_posix()
        pages[source] = source_page(source)
        for one in definitions(path) if path.name != "__init__.py" else []:
            build.site.names.setdefault(one.name, []).append(one)
    for record in list_runs(ROOT / "nbs" / "results"): build.kept.setdefault(record.experiment, []).append(record)
    build.runs = shown_runs(list_runs(outputs)) if outputs.is_dir() else {}
    return build


# --- pages of single files

def document_page(build: Build, source: str, page: str) -> str:
    """README.md and the other texts of the repository."""
    path, writer = ROOT / source, Writer(build.site, source, page)
    body = (writer.markdown(path.read_text(encoding="utf-8")) if path.suffix == ".md"
            else "".join(cells_html(cells_of(path), writer, set())))
    return page_html(title_of(path), body, page)


def module_of(source: str) -> str:
    """`kilonb/core/files.py` of `nbs/core/files.ipynb`; "" where no module is exported."""
    module = f"kilonb/{source.removeprefix('nbs/').removesuffix('.ipynb')}.py"
    return module if (ROOT / module).is_file() else ""


def names_of(build: Build, module: str) -> list[Definition]:
    dotted = module.removesuffix(".py").replace("/", ".")
    return [one for found in build.site.names.values() for one in found if one.module == dotted]


def library_page(build: Build, source: str, page: str) -> str:
    """A notebook as it is committed, with the list of the names that its module provides."""
    module, package = module_of(source), page.split("/")[0]
    names = names_of(build, module)
    links = ", ".join(f'<a href="#{one.name}"><code>{one.name}</code></a>' for one in names)
    head = (f"<details><summary>{count_noun(len(names), 'public name')} of "
            f"<code>{module.removesuffix('.py').replace('/', '.')}</code></summary><p>{links}</p>"
            f'<p><a href="{relative(source_page(module), page)}">Source of the module</a></p></details>')
    first, *rest = cells_html(cells_of(ROOT / source), Writer(build.site, source, page), {one.name for one in names})
    body = "".join([first, head if names else "", *rest])
    return page_html(title_of(ROOT / source), body, page, build.side[package])


def kept_html(record: RunRecord) -> str:
    """A kept result: data, picture, gates, command, hardware and date."""
    report, kept = judged_report(record), read_json(record.folder / "kept.json")
    name = data_label(record) + (f" ({record.tag})" if record.tag else "")
    picture = record.folder / "picture.jpg"
    shown = (f'<figure><img alt="Picture of the run on {html.escape(name)}" src="{data_uri(picture)}"></figure>'
             if picture.is_file() else "<p>No picture was kept.</p>")
    rows = [[html.escape(cell) for cell in line.cells()[:-1]] + [_verdict(line.cells()[-1])] for line in report.lines]
    headings = ("result", "ours", "bound", "notes", "published", "trivial baseline", "verdict")
    hardware = record.environment.get("hardware", {})
    facts = (f"{record.started[:10]}, {format_duration(record.elapsed_s)} on {hardware.get('cores', '?')} cores of "
             f"{hardware.get('processor', 'an unknown processor')}, commit {str(record.environment.get('commit'))[:7]}")
    note = f"<p>Does not decide: {html.escape(report.note)}</p>" if report.note else ""
    return (f"<h3>{html.escape(name or 'made by the run itself')}</h3>{shown}"
            f"{table_html(headings, rows) if rows else ''}{note}{code_html(kept['command_line'], 'bash')}"
            f"<p>{html.escape(facts)}</p>")


def _verdict(text: str) -> str:
    look = "green" if text.startswith("green") else "red" if text.startswith("red") else ""
    return f'<span class="{look}">{html.escape(text)}</span>' if look else html.escape(text)


def experiment_page(build: Build, source: str, page: str) -> str:
    """An experiment: question, command, kept results, and its notebook: executed where a run is here, else source."""
    path, (kind, name) = ROOT / source, page.removesuffix(".html").split("/")
    writer, record = Writer(build.site, source, page), build.runs.get(name)
    kept = "".join(map(kept_html, build.kept.get(name, [])))
    head = (f'<h1>{html.escape(title_of(path))}</h1>{writer.markdown(read_notebook(path).summary)}'
            f"{code_html(RUNNABLE[kind].format(name), 'bash')}" + (f"<h2>Kept results</h2>{kept}" if kept else ""))
    try: executed = writer.links(notebook_html(record.folder / "notebook.ipynb")[1]) if record else ""
    except KiloError: executed = ""
    if record and executed:
        data = data_label(record) or "its own data"
        when = f"{record.started[:10]}, in {format_duration(record.elapsed_s)}, on {data}"
        body = (f"{head}<h2>As it was run</h2><p>{html.escape(when)}.</p>"
                f'<div class="executed" tabindex="0">{executed}</div>')
    else:
        cells = "".join(cells_html(cells_of(path), writer, set()))
        body = f"{head}<h2>Notebook</h2><p>No finished run of it lies under outputs/: this is its source.</p>{cells}"
    return page_html(title_of(path), body, page, build.side[kind], executed=bool(executed))


def text_page(build: Build, source: str, page: str) -> str:
    """The source of a module or another text file that a page links to."""
    language = {".py": "python", ".yaml": "yaml", ".json": "json", ".md": "markdown", ".js": "javascript"}
    text = (ROOT / source).read_text(encoding="utf-8")
    notebook = f"nbs/{source.removeprefix('kilonb/').removesuffix('.py')}.ipynb"
    known = build.site.pages.get(notebook) if source.startswith("kilonb/") else None
    made = f'<p>Exported from <a href="{relative(known, page)}">{notebook}</a>.</p>' if known else ""
    return page_html(source, f"<h1>{html.escape(source)}</h1>{made}"
                     f"{code_html(text, language.get(Path(source).suffix, 'text'))}", page)


# --- pages that list others

def api_entry(build: Build, one: Definition, page: str) -> str:
    """Signature, first sentence, and links to notebook and module."""
    module = one.module.replace(".", "/") + ".py"
    notebook = build.site.pages.get(f"nbs/{one.module.removeprefix('kilonb.').replace('.', '/')}.ipynb", "")
    links = f'<a href="{relative(source_page(module), page)}">{one.module}</a>'
    if notebook: links = f'<a href="{relative(f"{notebook}#{one.name}", page)}">notebook</a>, module {links}'
    return (f'<dt id="{one.module.removeprefix("kilonb.")}.{one.name}"><code>{html.escape(one.signature)}</code></dt>'
            f"<dd>{html.escape(one.summary)} ({links})</dd>")


def api_pages(build: Build) -> Iterator[tuple[str, str]]:
    """A page for each package, and one with all names in the order of the alphabet."""
    everything = sorted(chain.from_iterable(build.site.names.values()), key=lambda one: (one.name.lower(), one.module))
    packages: dict[str, dict[str, list[Definition]]] = {}
    for one in everything: packages.setdefault(one.module.split(".")[1], {}).setdefault(one.module, []).append(one)
    side = [(package, f"api/{package}.html") for package in sorted(packages)]
    for package, page in side:
        parts = [f'<h2 id="{module}"><code>{module}</code></h2><dl>'
                 f"{''.join(api_entry(build, one, page) for one in found)}</dl>"
                 for module, found in sorted(packages[package].items())]
        body = f"<h1>kilonb.{package}</h1>{''.join(parts)}"
        yield page, page_html(f"kilonb.{package}: public names", body, page, side)
    letters: dict[str, list[str]] = {}
    for one in everything:
        link = f"api/{one.module.split('.')[1]}.html#{one.module.removeprefix('kilonb.')}.{one.name}"
        text = f'<li><a href="{link}"><code>{one.name}</code></a> {one.module.removeprefix("kilonb.")}</li>'
        letters.setdefault(one.name[0].upper(), []).append(text)
    jump = "".join(f'<a href="#letter-{letter}">{letter}</a> ' for letter in letters)
    body = "".join(f'<h2 id="letter-{letter}">{letter}</h2><ul>{"".join(found)}</ul>'
                   for letter, found in letters.items())
    intro = f"<h1>Public names</h1><p>{len(everything):,} names of {len(packages)} packages.</p>"
    yield "api.html", page_html("Public names", f'{intro}<p class="letters">{jump}</p>{body}', "api.html", side)


def experiments_page(build: Build) -> str:
    """Experiments, benchmarks and explorers with their question, command and kept results."""
    parts = []
    for kind, command in RUNNABLE.items():
        rows = [[f'<a href="{page}">{name}</a>', f"<code>{html.escape(command.format(name))}</code>",
                 Writer(build.site, f"nbs/{kind}/{name}.ipynb", "experiments.html").markdown(
                     read_notebook(ROOT / "nbs" / kind / f"{name}.ipynb").summary),
                 str(len(build.kept.get(name, [])) or ""), "yes" if name in build.runs else ""]
                for name, page in build.side.get(kind, [])]
        parts.append(f'<h2 id="{kind}">{kind.capitalize()}</h2>'
                     + table_html(("notebook", "command", "question", "kept results", "executed here"), rows))
    return page_html("Experiments", "<h1>Experiments</h1>" + "".join(parts), "experiments.html")


def gates_page(build: Build) -> str:
    """All gates by experiment and the conditions under which they apply."""
    parts = []
    for name in sorted(gate_files(ROOT)):
        page = next((build.site.pages.get(f"nbs/{kind}/{name}.ipynb") for kind in RUNNABLE
                     if f"nbs/{kind}/{name}.ipynb" in build.site.pages), "")
        rows = [[f"<code>{html.escape(gate.result)}</code>", html.escape(gate.bound), html.escape(words),
                 "" if gate.notes is None else f"{gate.notes:g}", "" if gate.published is None else
                 html.escape(f"{gate.published:g} ({gate.source})")]
                for words, gates in gates_by_condition(name, ROOT).items() for gate in gates]
        title = f'<a href="{page}">{name}</a>' if page else name
        headings = ("result", "bound", "where", "notes", "published")
        parts.append(f'<h2 id="{name}">{title}</h2>{table_html(headings, rows)}')
    intro = "<h1>Gates</h1><p>What a run has to reach; set before the runs, in <code>gates.yaml</code>.</p>"
    return page_html("Gates", intro + "".join(parts), "gates.html")


def data_page(build: Build) -> str:
    """Every dataset: what it is, licence, source, layout, size, stand-in."""
    parts = []
    for one in load_manifests().values():
        size = f"{one.total_bytes / 1e6:.0f} MB" if one.total_bytes else "unknown"
        if one.synthetic: size = "made on first use"
        facts = {"kind": one.kind, "size": size, "licence": one.licence, "source": one.source, "layout": one.layout,
                 "stand-in": one.stand_in, "note": one.note}
        rows = [[name, html.escape(str(value))] for name, value in facts.items() if value]
        parts.append(f'<h2 id="{one.name}"><code>{one.name}</code></h2><p>{html.escape(one.title)}</p>'
                     + table_html(("", ""), rows))
    return page_html("Datasets", "<h1>Datasets</h1>" + "".join(parts), "data.html")


def search_page(build: Build) -> str:
    """Pages with their text, and public names with their sentence, in one file with the script that searches them."""
    entries = []
    for source, page in build.site.pages.items():
        path = ROOT / source
        if not path.is_file() or path.suffix not in (".ipynb", ".md") or source == "nbs/index.ipynb": continue
        cells = cells_of(path) if path.suffix == ".ipynb" else [{"cell_type": "markdown",
                                                                 "source": path.read_text(encoding="utf-8")}]
        entries.append({"t": f"{title_of(path)} ({page.removesuffix('.html')})", "u": page, "x": plain_text(cells)})
    for one in chain.from_iterable(build.site.names.values()):
        notebook = build.site.pages.get(f"nbs/{one.module.removeprefix('kilonb.').replace('.', '/')}.ipynb")
        page = f"{notebook}#{one.name}" if notebook else source_page(one.module.replace(".", "/") + ".py")
        entries.append({"t": one.name, "u": page, "x": f"{one.module}: {one.summary}"})
    body = ('<h1>Search</h1><p><input id="words" type="search" aria-label="Words to search"></p>'
            '<p id="said" role="status"></p><ul id="found"></ul>')
    script = (ASSETS / "docs_search.js").read_text(encoding="utf-8")
    return page_html("Search", body, "search.html", scripts=[script], data={"pages": entries})


# --- building

MAKERS: dict[str, Callable[[Build, str, str], str]] = {"document": document_page, "library": library_page,
                                                      "experiment": experiment_page, "text": text_page}
_build: Build


def _start(build: Build) -> None:
    global _build
    _build = build


def write(build: Build, page: str, text: str) -> None:
    path = build.folder / page
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial: partial.write_text(text, encoding="utf-8", errors="replace")


def _make(job: tuple[str, str, str]) -> tuple[set[str], list[str]]:
    """Write one page; returns the text files it links to and its broken links."""
    kind, source, page = job
    _build.site.used, _build.site.broken = set(), []
    write(_build, page, MAKERS[kind](_build, source, page))
    return _build.site.used, _build.site.broken


def jobs_of(build: Build) -> list[tuple[str, str, str]]:
    """(kind, source, page) of every page that is made from one file; the slow ones first."""
    found = []
    for source, page in build.site.pages.items():
        if "#" in page or not (ROOT / source).is_file() or source == "nbs/index.ipynb": continue
        kind = ("document" if source in DOCUMENTS else "text" if page.startswith("source/")
                else "experiment" if page.split("/")[0] in RUNNABLE else "library")
        found.append((kind, source, page))
    return sorted(found, key=lambda job: job[0] != "experiment")


def _told(made: Iterable[Any], count: int, every_s: float = 5.0) -> Iterator[Any]:
    """The results of jobs as they come, with a line on standard error every few seconds on how many there are."""
    said = time.monotonic()
    for number, one in enumerate(made, 1):
        if time.monotonic() - said >= every_s:
            said = time.monotonic()
            print(f"docs: {number} of {count} pages", file=sys.stderr, flush=True)
        yield one


def build_site(folder: Path, outputs: Path, only: Sequence[str] = (), workers: int = 2) -> list[str]:
    """Write the site. only: beginnings of the addresses of the pages to write, besides those that list pages. Returns
    the links that lead nowhere, as sentences."""
    print("docs: reading all notebooks and modules", file=sys.stderr, flush=True)
    build = plan(folder, outputs)
    jobs = [job for job in jobs_of(build) if not only or job[2].startswith(tuple(only))]
    _start(build)
    if workers == 1: made = list(map(_make, jobs))
    else:
        with multiprocessing.get_context("spawn").Pool(workers, _start, [build]) as pool:
            made = list(_told(pool.imap_unordered(_make, jobs, chunksize=1 if len(jobs) < 50 else 4), len(jobs)))
    done = {job[1] for job in jobs}
    used, broken = set().union(*(one for one, _ in made)), list(chain.from_iterable(found for _, found in made))
    for source in sorted(used - done): broken += _make(("text", source, source_page(source)))[1]
    listing = {"experiments.html": experiments_page, "gates.html": gates_page, "data.html": data_page,
               "search.html": search_page}
    print("docs: lists, search and names", file=sys.stderr, flush=True)
    for page, make in listing.items(): write(build, page, make(build))
    for page, text in api_pages(build): write(build, page, text)
    return broken


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the documentation as a static site, or check it.")
    parser.add_argument("--out", type=Path, help="folder of the site (default: outputs/docs)")
    parser.add_argument("--outputs", type=Path, help="folder with the runs that are shown (default: outputs)")
    parser.add_argument("--only", nargs="+", default=(), metavar="PAGE",
                        help="write pages whose address begins with it")
    parser.add_argument("--check", action="store_true", help="check what was built; write nothing")
    options = parser.parse_args()
    outputs = options.outputs or outputs_root()
    folder, started = options.out or outputs / "docs", time.monotonic()
    try:
        if options.check: return docs_check.main(folder)
        if not options.only and folder.is_dir():
            if not (folder / "search.html").is_file() and any(folder.iterdir()):
                raise KiloError(f"{folder} holds other files than these pages: name another folder by --out.")
            shutil.rmtree(folder)
        broken = build_site(folder, outputs, options.only)
        if not options.only: print("docs: following every link", file=sys.stderr, flush=True)
        if not options.only: broken += docs_check.broken_links(folder)
    except KiloError as error:
        print(f"docs: {error}", file=sys.stderr)
        return 2
    for sentence in broken: print(f"docs: {sentence}", file=sys.stderr)
    pages = sum(1 for _ in folder.rglob("*.html"))
    print(f"{count_noun(pages, 'page')} in {format_duration(time.monotonic() - started)}, "
          f"{count_noun(len(broken), 'broken link')}: {os.path.relpath(folder / 'index.html')}")
    return 1 if broken else 0


if __name__ == "__main__": sys.exit(main())
