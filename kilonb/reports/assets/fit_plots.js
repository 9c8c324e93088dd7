// anywidget module: an element without content, as wide as the explorer. It watches for plotly figures that appear and
// for its own width, and sends `resize` events until every figure is as wide as its container.

const PLOTS = ".js-plotly-plot";

const fits = (plot) =>
  !plot._fullLayout || !plot.clientWidth || Math.abs(plot._fullLayout.width - plot.clientWidth) < 2;

const addsPlot = (change) =>
  [...change.addedNodes].some((node) => node.classList && node.classList.contains("plot-container"));

function render({ el }) {
  let root = null;
  let width = 0;
  let tries = 0;
  let timer = null;

  function resizeUntilFitting() {
    timer = null;
    tries += 1;
    if (tries > 100 || (root && [...root.querySelectorAll(PLOTS)].every(fits))) return;
    window.dispatchEvent(new Event("resize"));
    timer = setTimeout(resizeUntilFitting, 200);
  }

  function fit() {
    tries = 0;
    timer ??= setTimeout(resizeUntilFitting, 30);
  }

  const added = new MutationObserver((changes) => {
    if (changes.some(addsPlot)) fit();
  });
  const resized = new ResizeObserver(() => {
    if (!root) {
      root = el.closest(".kilonb-explorer");
      if (root) added.observe(root, { childList: true, subtree: true });
    }
    if (el.clientWidth === width) return;
    width = el.clientWidth;
    fit();
  });
  el.style.width = "100%";
  resized.observe(el);
  return () => {
    clearTimeout(timer);
    resized.disconnect();
    added.disconnect();
  };
}

export default { render };
