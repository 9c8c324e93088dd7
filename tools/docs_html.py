"""Markdown, code and links as HTML for `make docs`: GitHub's heading names, MathML formulas, public names as links."""
import ast
import html
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import mistune
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from kilonb.core.html import CONTENT_SECURITY_POLICY, hashed_script_policy, html_page
from kilonb.reports.formulas import replace_formulas, to_mathml
from kilonb.reports.offline_html import data_uri

ROOT = Path(__file__).resolve().parent.parent
ASSETS = Path(__file__).resolve().parent / "assets"
# The search field of a page leads to another page of the same site, from a disk or from a server.
_FORM = "form-action 'self' file: http: https:"
_PARSE = mistune.create_markdown(escape=False, plugins=["table", "strikethrough", "url"])


@dataclass(frozen=True)
class Definition:
    """A public name of a module. signature: as in the source. summary: first sentence of its docstring."""
    module: str
    name: str
    signature: str
    summary: str


@dataclass
class Site:
    """The pages that are written: path in the repository -> path of the page below the site's folder.

    names: public name -> its definitions. used: text files that a page links to and that get a page of their own.
    broken: links that lead nowhere, as sentences.
    """
    pages: dict[str, str] = field(default_factory=dict)
    names: dict[str, list[Definition]] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    broken: list[str] = field(default_factory=list)


def first_sentence(text: str) -> str:
    """Up to the first full stop that ends a sentence; a docstring's line breaks are spaces."""
    flat = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[.?])\s+(?=[A-Z`])", flat)[0]


def _signature(node: ast.AST, source: str) -> str:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        returned = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        return f"{node.name}({ast.unparse(node.args)}){returned}"
    if isinstance(node, ast.ClassDef):
        starts = [one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"]
        fields = [ast.unparse(one) for one in node.body if isinstance(one, ast.AnnAssign)]
        if starts: return f"class {node.name}({ast.unparse(starts[0].args).removeprefix('self').lstrip(', ')})"
        return f"class {node.name}({', '.join(fields or map(ast.unparse, node.bases))})"
    text = " ".join((ast.get_source_segment(source, node) or "").split())
    return text if len(text) <= 120 else f"{text[:119]}…"


def definitions(path: Path) -> list[Definition]:
    """The names of a module's `__all__` that it defines, in their order in the file."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    module = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    public, found = set(), {}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(
            node, ast.AnnAssign) else []
        for target in targets:
            for one in target.elts if isinstance(target, ast.Tuple) else [target]:
                if not isinstance(one, ast.Name): continue
                if one.id == "__all__": public = set(ast.literal_eval(node.value))
                else: found.setdefault(one.id, Definition(module, one.id, _signature(node, source), ""))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            summary = first_sentence(ast.get_docstring(node) or "")
            found.setdefault(node.name, Definition(module, node.name, _signature(node, source), summary))
    return [one for name, one in found.items() if name in public]


def relative(target: str, page: str) -> str:
    """The address of the page `target` (maybe with #part) seen from `page`."""
    path, hash_, part = target.partition("#")
    return quote(posixpath.relpath(path, posixpath.dirname(page) or ".")) + hash_ + part


@cache
def _formatter() -> HtmlFormatter: return HtmlFormatter(nowrap=True)


def code_html(source: str, language: str = "python", kind: str = "") -> str:
    """Highlighted code; an unknown language is shown as it is."""
    try: shown = highlight(source, get_lexer_by_name(language), _formatter())
    except ClassNotFound: shown = html.escape(source)
    return f'<pre{f" class={kind}" if kind else ""}>{shown.rstrip()}</pre>'


def heading_id(text: str) -> str:
    """The name that GitHub gives a heading."""
    plain = html.unescape(re.sub(r"<[^>]+>", "", text)).lower()
    return re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")


class Writer:
    """Markdown of one source file as HTML of one page.

    site: what links can lead to. source: path of the file in the repository. page: path of the page.
    """

    def __init__(self, site: Site, source: str, page: str):
        self.site, self.source, self.page, self.seen = site, source, page, {}

    def markdown(self, text: str) -> str:
        """HTML of Markdown: formulas as MathML, headings with names, links to pages of the site, pictures embedded."""
        formulas: list[str] = []

        def set_aside(formula: str, display: bool) -> str:
            shown = to_mathml(formula, display)
            look = "math" if display else "formula" if len(formula) > 40 else ""
            formulas.append(f'<span class="{look}">{shown}</span>' if look else shown)
            return f"\ue000{len(formulas) - 1}\ue001"
        found = str(_PARSE(replace_formulas(text, set_aside)))
        found = re.sub(r'<pre><code(?: class="language-(\w+)")?>(.*?)</code></pre>',
                       lambda m: code_html(html.unescape(m[2]), m[1] or "text"), found, flags=re.DOTALL)
        found = re.sub(r"<h([1-6])>(.*?)</h\1>", self._heading, found, flags=re.DOTALL)
        found = self.links(found)
        found = re.sub(r'(<img\b[^>]*?\ssrc=)"([^"]*)"', self._picture, found)
        found = _linked_names(found, self)
        found = found.replace("<table", '<div class="wide" tabindex="0"><table').replace("</table>", "</table></div>")
        return re.sub("\ue000(\\d+)\ue001", lambda m: formulas[int(m[1])], found)

    def links(self, text: str) -> str:
        """HTML whose links to files of the repository lead to the pages of the site."""
        return re.sub(r'(<a\b[^>]*?\shref=)"([^"]*)"', self._link, text)

    def _heading(self, found: re.Match) -> str:
        name = heading_id(found[2]) or "part"
        count = self.seen[name] = self.seen.get(name, -1) + 1
        return f'<h{found[1]} id="{html.escape(name + (f"-{count}" if count else ""))}">{found[2]}</h{found[1]}>'

    def path_of(self, link: str) -> str:
        """A relative link of the source as a path in the repository, "" for the repository itself."""
        return posixpath.normpath(posixpath.join(posixpath.dirname(self.source), unquote(html.unescape(link))))

    def _link(self, found: re.Match) -> str:
        link, hash_, part = found[2].partition("#")
        if not link or re.match(r"[a-z]+:", link): return found[0]
        target = self.path_of(link)
        page = self.site.pages.get(target) or self.site.pages.get(posixpath.join(target, "README.md"))
        if page is None and _is_published(target) and _is_text(target):
            self.site.used.add(target)
            page = source_page(target)
        if page is None:
            self.site.broken.append(f"{self.source} links to {found[2]}, which has no page")
            return found[0]
        return f'{found[1]}"{relative(page + hash_ + part, self.page)}"'

    def _picture(self, found: re.Match) -> str:
        if found[2].startswith("data:"): return found[0]
        path = ROOT / self.path_of(found[2])
        if not _is_published(self.path_of(found[2])):
            self.site.broken.append(f"{self.source} shows {found[2]}, which is no file")
            return found[0]
        return f'{found[1]}"{data_uri(path)}"'


def _is_published(path: str) -> bool:
    """Whether a path is one of the repository: the links of an executed notebook may lead anywhere on this machine."""
    inside = not path.startswith(("/", "../")) and path.partition("/")[0] not in (".git", "outputs", "..")
    return inside and (ROOT / path).is_file() and (ROOT / path).resolve().is_relative_to(ROOT)


def _is_text(path: str) -> bool:
    try: return "\0" not in (ROOT / path).read_text(encoding="utf-8")[:2000]
    except (OSError, UnicodeDecodeError): return False


def source_page(path: str) -> str:
    """The page that shows the file `path` of the repository."""
    return f"source/{path}.html"


_SKIPPED = re.compile(r"<pre.*?</pre>|<a\b.*?</a>|<h\d.*?</h\d>", re.DOTALL)
_INLINE = re.compile(r"<code>([A-Za-z_][\w.]*)(\(\))?</code>")


def _linked_names(text: str, writer: Writer) -> str:
    """HTML with a link around each public name or module in backticks outside code blocks, links and headings."""
    pieces, end = [], 0
    for part in _SKIPPED.finditer(text):
        pieces += [_INLINE.sub(lambda m: _name_link(m, writer), text[end:part.start()]), part[0]]
        end = part.end()
    return "".join([*pieces, _INLINE.sub(lambda m: _name_link(m, writer), text[end:])])


def _name_link(found: re.Match, writer: Writer) -> str:
    target = page_of_name(found[1], writer.site)
    own = target.partition("#")[0] == writer.page and "#" not in target
    return f'<a href="{relative(target, writer.page)}">{found[0]}</a>' if target and not own else found[0]


def page_of_name(name: str, site: Site) -> str:
    """The page (with #name) of a module or public name: `kilonb.core.files`, `core.files`, `kilonb.open_run`,
    `atomic_write`; "" where it is none or not the only one."""
    parts = name.removeprefix("kilonb.").split(".")
    for cut in (len(parts), len(parts) - 1):
        page = site.pages.get(f"nbs/{'/'.join(parts[:cut])}.ipynb") if cut >= 2 else None
        if page and cut == len(parts): return page
        if page and any(one.module.endswith(".".join(parts[:cut])) for one in site.names.get(parts[-1], [])):
            return f"{page}#{parts[-1]}"
    distinct = len(parts[-1]) > 4 and re.search(r"_|[a-z][A-Z]", parts[-1])
    known = site.names.get(parts[-1], []) if len(parts) == 1 and (distinct or name.startswith("kilonb.")) else []
    page = site.pages.get(f"nbs/{known[0].module.removeprefix('kilonb.').replace('.', '/')}.ipynb") if len(
        known) == 1 else None
    return f"{page}#{parts[-1]}" if page else ""


_LINKS = (("KiloNB", "index.html"), ("Results", "results.html"), ("Experiments", "experiments.html"),
          ("Library", "library.html"), ("API", "api.html"), ("Gates", "gates.html"), ("Data", "data.html"),
          ("Background", "background.html"), ("Many runs", "batch.html"))


def _side(entries: Sequence[tuple[str, str]], page: str) -> str:
    """The list of the pages of the same package: (text, page); "" for none."""
    if not entries: return ""
    items = "".join(f'<li><a href="{relative(target, page)}"{" aria-current=page" if target == page else ""}>'
                    f"{html.escape(text)}</a></li>" for text, target in entries)
    return ('<nav class="side" aria-label="Pages of this package"><details open><summary>This package</summary>'
            f"<ul>{items}</ul></details></nav>")


def page_html(
    title: str,
    body: str,
    page: str,
    side: Sequence[tuple[str, str]] = (),
    scripts: Sequence[str] = (),
    data: Mapping[str, Any] | None = None,
    executed: bool = False,
) -> str:
    """A page of the site: header with links and search field, list of its package, body, next and previous page.

    executed: the body holds outputs of a run, whose scripts are allowed as on the page of a run.
    """
    links = "".join(f'<a href="{relative(target, page)}">{html.escape(text)}</a>' for text, target in _LINKS)
    form = "" if scripts else (f'<form action="{relative("search.html", page)}" role="search"><input name="q" '
                               'aria-label="Search" placeholder="Search"></form>')
    targets = [target for _, target in side]
    here = targets.index(page) if page in targets else -1
    steps = [(f"{word}: {side[at][0]}", side[at][1]) for word, at in (("Previous", here - 1), ("Next", here + 1))
             if here >= 0 and 0 <= at < len(side)]
    footer = "".join(f'<a href="{relative(target, page)}">{html.escape(text)}</a>' for text, target in steps)
    whole = (f'<a class="skip" href="#main">To the text</a><header>{links}{form}</header>'
             f'<div class="layout{"" if side else " alone"}"><main id="main">{body}'
             f"<footer>{footer}</footer></main>{_side(side, page)}</div>")
    policy = CONTENT_SECURITY_POLICY if executed else hashed_script_policy(*scripts)
    return html_page(title, whole, [(ASSETS / "docs.css").read_text(encoding="utf-8")], scripts, data,
                     policy.replace("form-action 'none'", _FORM))


def table_html(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls by itself. rows: cells as HTML."""
    head = "".join(f"<th>{html.escape(one)}</th>" for one in headings)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide" tabindex="0"><table><tr>{head}</tr>{lines}</table></div>'


_EXPORT = re.compile(r"^#\| *(?:export|exporti)\b")
_DIRECTIVE = re.compile(r"^#\|.*\n?", re.MULTILINE)
_DEFINED = re.compile(r"^(?:async def|def|class) (\w+)|^(\w+)(?:, \w+)*(?::[^=\n]+)? = ", re.MULTILINE)


def cells_html(cells: Sequence[Mapping[str, Any]], writer: Writer, names: set[str]) -> Iterator[str]:
    """The cells of a notebook without outputs. names: the public names that get an anchor at their definition."""
    left = set(names)
    for cell in cells:
        source = "".join(cell.get("source", []))
        if cell.get("cell_type") == "markdown": yield writer.markdown(source)
        if cell.get("cell_type") != "code" or source.startswith("#| hide"): continue
        shown = _DIRECTIVE.sub("", source).strip()
        if not shown: continue
        defined = [name for pair in _DEFINED.findall(source) for name in pair if name in left] if _EXPORT.match(
            source) else []
        left.difference_update(defined)
        anchors = "".join(f'<span id="{name}"></span>' for name in dict.fromkeys(defined))
        yield anchors + code_html(shown, "python", "" if _EXPORT.match(source) else "demo")
    yield "".join(f'<span id="{name}"></span>' for name in sorted(left))


def plain_text(cells: Sequence[Mapping[str, Any]]) -> str:
    """The Markdown of a notebook as plain text, for the search."""
    text = "\n".join("".join(cell["source"]) for cell in cells if cell.get("cell_type") == "markdown")
    return " ".join(re.sub(r"\]\([^)]*\)|[`*#>\[\]|]|\$[^$\n]*\$|-{3,}", " ", text).split())
