"""Every kind of page that the package writes or serves, in Chromium at 1440 and 390 pixels: nothing is reported on the
console, loaded from elsewhere or cut off; everything is reached by Tab, reacts to a key and has the contrast and the
names of WCAG 2.1 AA. Needs Chromium (Debian: apt install chromium)."""
import ast
import json
import re
import time
from pathlib import Path

import page_checks
import pages
import pytest
from jupyter_driver import NOISE, needs_chromium, open_browser
from pages import EXPLORERS, PAGES, ROOT, WIDGETS

from kilonb.core.html import html_page

SIZES = {1440: 900, 390: 844}
# What plotly, which draws the 3-d clouds, makes Chromium remark about its own canvas.
PLOTLY = "Multiple readback operations using getImageData"


# --- the table is whole

@pytest.fixture(scope="module")
def modules() -> dict[str, str]:
    """Dotted name -> source of each module of the package and of tools."""
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text(encoding="utf-8")
            for path in [*ROOT.glob("kilonb/**/*.py"), *ROOT.glob("tools/*.py")]}


def calls(source: str, name: str) -> bool:
    """A module calls a function of this name, with or without a module before it."""
    return name in source and any(isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == name
                                  for node in ast.walk(ast.parse(source)))


def test_every_module_that_makes_a_page_has_an_example(modules):
    callers = {name for name, source in modules.items() if calls(source, "html_page")}
    assert len(callers) >= 12 and callers == {kind.source for kind in PAGES.values()}, (
        "add an example of the new page to PAGES in tests/pages.py")


def test_no_page_is_written_without_the_function_that_sets_its_policy(modules):
    assert [name for name, source in modules.items() if "<!doctype html" in source.lower()] == ["kilonb.core.html"]


def test_every_module_that_makes_a_widget_is_named(modules):
    assert {name for name, source in modules.items() if "anywidget.AnyWidget" in source} == set(WIDGETS)
    assert {name for name, source in modules.items() if "import ipywidgets" in source} == set(EXPLORERS)
    shown = {*PAGES, *(path.stem for path in ROOT.glob("nbs/explore/*.ipynb"))}
    assert {*WIDGETS.values(), *EXPLORERS.values()} <= shown


# --- each page

class Opened:
    """A page in a context of its own, and what it reported and asked for."""

    def __init__(self, browser, address: str, width: int, scheme: str = "light"):
        self.errors, self.asked, self.address = [], [], address
        calm = "reduce" if width == 390 else "no-preference"
        self.context = browser.new_context(viewport={"width": width, "height": SIZES[width]}, color_scheme=scheme,
                                           reduced_motion=calm)
        self.page = self.context.new_page()
        self.page.on("console", lambda one: self.errors.append(one.text) if one.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(address)

    def wait(self, script: str, seconds: float = 60) -> None:
        """Wait until a script is true; playwright's own way needs `eval`, which the pages' policy forbids."""
        deadline = time.monotonic() + seconds
        while not self.holds(script):
            assert time.monotonic() < deadline, f"never true: {script}; {self.errors}"
            time.sleep(0.03)

    def holds(self, script: str) -> bool:
        """A script is true; false while the page leads to another."""
        from playwright.sync_api import Error

        try: return bool(self.page.evaluate(script))
        except Error as error:
            if "context was destroyed" not in str(error): raise
            return False

    def reported(self) -> list[str]:
        """Console messages that are ours, and requests that leave the page's own file or server."""
        base = self.address if self.address.startswith("http") else "file:"
        away = [url for url in self.asked if not url.startswith((base, base.replace("http", "ws"), "data:", "blob:"))]
        return away + [one for one in self.errors if not any(re.search(noise, one) for noise in (*NOISE, PLOTLY))]


@pytest.fixture(scope="module")
def browser():
    with open_browser() as chromium: yield chromium


@pytest.fixture(scope="module")
def axe() -> str: return page_checks.axe_source()


@pytest.fixture(scope="module")
def addresses(tmp_path_factory):
    """A function that makes the example of a kind once; servers are stopped at the end."""
    home, made = tmp_path_factory.mktemp("pages"), {}

    def address(name: str) -> str:
        if name not in made:
            folder = home / re.sub(r"\W+", "_", name)
            folder.mkdir()
            made[name] = PAGES[name].make(folder)
        return made[name].as_uri() if isinstance(made[name], Path) else made[name].address
    yield address
    for one in made.values():
        if not isinstance(one, Path): one.stop()
    pages.animal_view.cache_clear()
    pages.boxtown.cache_clear()


def faults(tab: Opened, axe: str) -> list[str]:
    """What is cut off, what axe finds, and animations where the reader wants none."""
    tab.page.evaluate(axe)
    moving = "matchMedia('(prefers-reduced-motion: reduce)').matches ? document.getAnimations().length : 0"
    uploads = ["a button uploads the figure"] * tab.page.locator(page_checks.UPLOADS).count()
    return (uploads + tab.page.evaluate(page_checks.CUT_OFF) + tab.page.evaluate(page_checks.AXE)
            + ["moves although motion is reduced"] * (tab.page.evaluate(moving) > 0))


@needs_chromium
@pytest.mark.parametrize("width", SIZES)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_whole_silent_and_works_by_keyboard(name, width, addresses, browser, axe):
    kind = PAGES[name]
    tab = Opened(browser, addresses(name), width)
    tab.wait(kind.ready)
    found = faults(tab, axe)
    if kind.picture:
        box = tab.page.locator(kind.picture).first.bounding_box()
        if box["y"] + box["height"] / 2 > SIZES[width]: found.append(f"the picture is below the first screen: {box}")
    found += page_checks.focus_faults(tab.page, 50 if width == 1440 else 12)
    if kind.shown:
        before = tab.page.evaluate(f"String({kind.shown})")
        tab.page.locator(kind.focus).first.focus()
        tab.page.keyboard.press(kind.key)
        tab.wait(f"String({kind.shown}) !== {json.dumps(before)}")
    found += tab.reported()
    tab.context.close()
    assert not found, "\n".join(found)


@needs_chromium
@pytest.mark.parametrize("name", [name for name, kind in PAGES.items() if kind.dark])
def test_a_page_with_a_dark_form_has_contrast_in_it(name, addresses, browser, axe):
    tab = Opened(browser, addresses(name), 390, "dark")
    tab.wait(PAGES[name].ready)
    back = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", back))) < 80, "the background is dark"
    assert not faults(tab, axe) + tab.reported()
    tab.context.close()


# --- the checks find what they are for

BAD = """<h1>t</h1><p style="color:#aaa">grey</p><input type="range"><img src="data:,"><button></button>
<div id="wide" style="width:1800px">w</div>
<div style="overflow:hidden;white-space:nowrap;width:60px">a long text here</div>
<div style="overflow-x:auto;width:60px"><span style="white-space:nowrap">another long text</span></div>
<a href="#wide" style="outline:none">link</a><div role="button" tabindex="0" onfocus="this.blur()">x</div>
<svg viewBox="0 0 100 20" width="50"><text x="80" y="10" font-size="10">cut by the figure</text></svg>"""


@needs_chromium
def test_the_checks_find_a_page_that_is_wrong_in_every_way(browser, axe, tmp_path):
    path = tmp_path / "bad.html"
    spinning = "#wide { animation: spin 9s infinite } @keyframes spin { to { rotate: 9deg } }"
    path.write_text(html_page("bad", BAD, [spinning],
                              ["console.error('broken'); fetch('http://127.0.0.1:9/x').catch(() => 0)"]))
    tab = Opened(browser, path.as_uri(), 390)
    found = "\n".join(faults(tab, axe) + page_checks.focus_faults(tab.page) + tab.reported())
    tab.context.close()
    for word in ("the page is 18", "beyond the edge", "cut off: <div style=\"overflow:hidden", "without a cue",
                 "text cut off by its figure", "text of 5.0 pixels", "color-contrast", "label:", "image-alt",
                 "button-name", "moves although", "no focus ring: <a", "broken", "http://127.0.0.1:9/x"):
        assert word in found, f"{word}\n{found}"
