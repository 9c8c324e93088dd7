"""Checks a built site: every address resolves to a file and a name in it, and Chromium opens every page from the disk
without an error, at 1440 and at 390 pixels, in light and in dark."""
import posixpath
import re
import shutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

from kilonb.core.errors import KiloError
from kilonb.core.text import count_noun

WIDTHS = (1440, 390)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class _Page(HTMLParser):
    """The ids, the addresses of links and the addresses that are loaded of one page."""

    def __init__(self, text: str):
        super().__init__()
        self.ids, self.links, self.loaded = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if given.get("id"): self.ids.add(given["id"])
        if tag == "a" and given.get("name"): self.ids.add(given["name"])
        if tag in ("a", "area") and given.get("href"): self.links.append(given["href"])
        if tag == "form" and given.get("action"): self.links.append(given["action"])
        if tag == "link" and given.get("href"): self.loaded.append(given["href"])
        if given.get("src"): self.loaded.append(given["src"])


def pages_of(folder: Path) -> dict[str, _Page]:
    """Address below the folder -> page."""
    return {path.relative_to(folder).as_posix(): _Page(path.read_text(encoding="utf-8"))
            for path in sorted(folder.rglob("*.html"))}


def _broken_on(page: str, found: _Page, pages: dict[str, _Page], folder: Path) -> Iterator[str]:
    for address in found.loaded:
        if not re.match(r"(data|blob):", address): yield f"{page} loads {address[:80]}"
    for address in found.links:
        if re.match(r"(https?|mailto|data):", address): continue
        path, _, part = address.partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page), unquote(path))) if path else page
        if target not in pages and not (folder / target).is_file(): yield f"{page} links to {address}, which is no file"
        elif part and unquote(part) not in pages.get(target, found).ids:
            yield f"{page} links to {address}, and that page has no such name"


def broken_links(folder: Path) -> list[str]:
    """The addresses of the built pages that lead nowhere, and what they load from outside, as sentences. Addresses of
    other hosts are not asked."""
    if not (folder / "index.html").is_file():
        raise KiloError(f"{folder} holds no built pages: run make docs first.")
    pages = pages_of(folder)
    return [sentence for page, found in pages.items() for sentence in _broken_on(page, found, pages, folder)]


# The visible part of the page is wider than the window, or text is cut off where nothing scrolls.
_OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
# Contrast of every text with the nearest opaque background, by WCAG 2.1; smallest ratio and where it is.
_CONTRAST = """() => {
  const channel = (v) => ((v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const numbers = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = (c) => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
  let worst = [21, ""];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const seen = new Set();
  while (walker.nextNode()) {
    const box = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || seen.has(box) || !box.checkVisibility()) continue;
    if (box.closest("svg, .executed")) continue;
    seen.add(box);
    const ink = numbers(getComputedStyle(box).color);
    let behind = box, back = [255, 255, 255];
    for (; behind; behind = behind.parentElement) {
      const found = numbers(getComputedStyle(behind).backgroundColor);
      if (found.length === 3 || found[3] > 0.99) { back = found; break; }
    }
    const [a, b] = [light(ink), light(back)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < worst[0]) worst = [ratio, box.outerHTML.slice(0, 80)];
  }
  return worst;
}"""


def in_browser(folder: Path, names: list[str]) -> Iterator[str]:
    """What is wrong with the pages in Chromium: console errors, requests, width, contrast below 4.5, as sentences."""
    from playwright.sync_api import sync_playwright

    if CHROMIUM is None: raise KiloError("There is no Chromium here: apt install chromium.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        wrong: list[str] = []
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: wrong.append(f"asked for {asked.url[:80]}")
                if not re.match(r"(file|data|blob):", asked.url) else None)
        for at, name in enumerate(names):
            for width, scheme in zip(WIDTHS, ("light", "dark") if at % 2 else ("dark", "light")):
                page.set_viewport_size({"width": width, "height": 900})
                page.emulate_media(color_scheme=scheme)
                page.goto((folder / name).resolve().as_uri())
                wide = page.evaluate(_OVERFLOW)
                ratio, where = page.evaluate(_CONTRAST)
                if wide > 0: wrong.append(f"{wide} pixels wider than the window")
                if ratio < 4.5: wrong.append(f"contrast {ratio:.2f} in {where}")
                yield from (f"{name} at {width} pixels, {scheme}: {one}" for one in wrong)
                wrong.clear()
        browser.close()


def main(folder: Path) -> int:
    """Check every page; print what is wrong. Returns the exit status."""
    found = broken_links(folder)
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.html"))]
    found += list(in_browser(folder, names))
    for sentence in found: print(f"docs: {sentence}", file=sys.stderr)
    print(f"{count_noun(len(names), 'page')}: {count_noun(len(found), 'fault')}")
    return 1 if found else 0
