"""What is checked of an open page, as JavaScript that returns sentences; [] where nothing is wrong."""
from pathlib import Path

# Wider than the window; a text cut off by a box that does not scroll and shows no ellipsis; a box that scrolls sideways
# and shows nothing at its edge that says so (a shadow, a fade, or a hint beside it).
CUT_OFF = """() => {
  const wrong = [], name = (node) => node.outerHTML.slice(0, 110);
  const root = document.documentElement;
  if (root.scrollWidth > window.innerWidth) {
    wrong.push(`the page is ${root.scrollWidth} wide in a window of ${window.innerWidth}`);
    for (const node of document.body.querySelectorAll("*")) {
      let box = node.parentElement;
      for (; box && getComputedStyle(box).overflowX === "visible"; box = box.parentElement);
      const right = node.getBoundingClientRect().right;
      const free = !box || box === document.body;
      if (free && right > window.innerWidth + 1) wrong.push(`beyond the edge: ${name(node)}`);
    }
  }
  for (const node of document.body.querySelectorAll("*")) {
    if (node.closest("svg, math, .js-plotly-plot") || !node.checkVisibility() || node.clientWidth < 2) continue;
    const style = getComputedStyle(node);
    if (node.scrollWidth <= node.clientWidth + 1 || style.overflowX === "visible" || node.tagName === "INPUT") continue;
    if (["hidden", "clip"].includes(style.overflowX)) {
      const cue = style.textOverflow === "ellipsis" && node.title;
      if (node.innerText?.trim() && !cue) wrong.push(`cut off: ${name(node)}`);
      continue;
    }
    const shadow = (one) => /gradient/.test(one.backgroundImage + one.maskImage);
    const painted = shadow(style) || shadow(getComputedStyle(node, "::after"));
    const hint = node.parentElement.querySelector(":scope > .swipe");
    if (!painted && !hint?.checkVisibility()) wrong.push(`scrolls sideways without a cue: ${name(node)}`);
  }
  for (const text of document.querySelectorAll("svg text")) {
    if (!text.checkVisibility() || !text.textContent.trim() || !text.getClientRects().length) continue;
    let svg = text.ownerSVGElement;
    while (svg.ownerSVGElement) svg = svg.ownerSVGElement;
    const [inside, box] = [text.getBoundingClientRect(), svg.getBoundingClientRect()];
    const outside = inside.left < box.left - 2 || inside.right > box.right + 2;
    if (inside.width && getComputedStyle(svg).overflow !== "visible" && outside)
      wrong.push(`text cut off by its figure: ${text.textContent.slice(0, 60)}`);
    const scale = svg.viewBox.baseVal?.width ? box.width / svg.viewBox.baseVal.width : 1;
    const size = scale * parseFloat(getComputedStyle(text).fontSize);
    if (size < 8) wrong.push(`text of ${size.toFixed(1)} pixels in a figure: ${text.textContent.slice(0, 40)}`);
  }
  return [...new Set(wrong)].slice(0, 12);
}"""

# Plotly's button that sends a figure to a server of its makers.
UPLOADS = ".modebar-btn[data-title^=Share]"
# Parts of the package's widgets that lie beyond the edge of their box, and are in no box that scrolls. ipywidgets gives
# every control a margin of 2 pixels, so that one of the whole width ends up to 4 pixels further right.
WIDGET_CUT_OFF = """() => {
  const wrong = [];
  for (const box of document.querySelectorAll(".kilonb-explorer, .kilonb-orbit, .kilonb-pose, .kilonb-episode")) {
    const edge = Math.min(box.getBoundingClientRect().right, window.innerWidth) + 4;
    const parts = "button, input, select, label, output, canvas, img, table, .js-plotly-plot, .noUi-target";
    for (const node of box.querySelectorAll(parts)) {
      let parent = node.parentElement;
      while (parent !== box && !/auto|scroll/.test(getComputedStyle(parent).overflowX)) parent = parent.parentElement;
      const at = node.getBoundingClientRect();
      if (parent === box && at.width && node.checkVisibility() && at.right > edge)
        wrong.push(`${Math.round(at.right - edge)} pixels beyond the edge: ${node.outerHTML.slice(0, 110)}`);
      const named = node.matches("button:not(.modebar-btn), .js-plotly-plot") && node.checkVisibility();
      if (named && (at.width < 40 || node.scrollWidth > node.clientWidth + 2))
        wrong.push(`too narrow: ${node.outerHTML.slice(0, 110)}`);
    }
  }
  if (document.querySelector(UPLOADS)) wrong.push("a button uploads the figure");
  return wrong.slice(0, 8);
}""".replace("UPLOADS", repr(UPLOADS))
# Pictures and canvases that hold no alternative text are found by axe; it has no rule for canvases that take the focus.
STOPS = """() => {
  const usual = "a[href], button, input, select, textarea, summary, [tabindex]", groups = new Set();
  const scrolls = (node) => node.scrollWidth > node.clientWidth + 1 && !node.closest(".js-plotly-plot")
    && /auto|scroll/.test(getComputedStyle(node).overflowX) && !node.querySelector(usual) && node.clientWidth > 1;
  return [...document.body.querySelectorAll("*")].filter((node) => {
    if (scrolls(node) && node.checkVisibility()) return true;
    if (!node.matches(usual) || node.disabled || node.tabIndex < 0) return false;
    if (!node.checkVisibility({ visibilityProperty: true })) return false;
    if (node.type === "hidden") return false;
    if (node.type !== "radio") return true;
    const first = !groups.has(node.name);
    groups.add(node.name);
    return first;
  }).map((node, at) => { node.dataset.stop = at; return at; }).length;
}"""
FOCUSED = """() => {
  let node = document.activeElement;
  if (!node || node === document.body) return null;
  const one = getComputedStyle(node);
  const ring = (one.outlineStyle !== "none" && parseFloat(one.outlineWidth) > 0) || one.boxShadow !== "none";
  const box = node.getBoundingClientRect();
  return { stop: node.dataset.stop ?? null, ring, html: node.outerHTML.slice(0, 110), top: box.top, bottom: box.bottom,
           group: node.type === "radio" };
}"""
# axe-core by the tags of WCAG 2.1 A and AA. Its rule for boxes that scroll expects a tabindex; Chromium lets every box
# that scrolls take the focus, which STOPS counts. What plotly draws is a picture with the colours of its data.
AXE = """async () => {
  const found = await axe.run({ exclude: [[".js-plotly-plot"]] }, { resultTypes: ["violations"],
    rules: { "scrollable-region-focusable": { enabled: false } },
    runOnly: { type: "tag", values: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"] } });
  return found.violations.flatMap((rule) => rule.nodes.slice(0, 3).map((node) =>
    `${rule.id}: ${node.html.slice(0, 110)} ${node.any.map((one) => one.message).join("; ").slice(0, 160)}`));
}"""


def axe_source() -> str:
    """axe-core, as axe-playwright-python bundles it."""
    import axe_playwright_python

    return (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")


def focus_faults(page, most: int = 60) -> list[str]:
    """Press Tab from the top: which elements are not reached, or have no visible frame while focused."""
    count, reached, wrong, lately = page.evaluate(STOPS), set(), [], 0
    page.evaluate("() => { const top = document.createElement('span'); top.tabIndex = -1; document.body.prepend(top);"
                  "top.focus({ preventScroll: true }); }")
    for _ in range(3 * most):
        page.keyboard.press("Tab")
        at = page.evaluate(FOCUSED)
        if at is None or len(reached) >= most: break
        lately = lately + 1 if at["stop"] in reached else 0
        if lately > 25: break
        reached.add(at["stop"])
        if not at["ring"]: wrong.append(f"no focus ring: {at['html']}")
    furthest = max((int(stop) for stop in reached if stop), default=-1)
    lost = [stop for stop in range(count if len(reached) < most else furthest) if str(stop) not in reached]
    for stop in lost[:5]:
        wrong.append("not reached by Tab: " + page.evaluate("stop => document.querySelector(`[data-stop='${stop}']`)"
                                                            ".outerHTML.slice(0, 110)", stop))
    return list(dict.fromkeys(wrong))
