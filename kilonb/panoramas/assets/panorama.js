"use strict";
// Colour, range and class pictures of one panorama, zoomed together; the pointer shows the values of a pixel.
const data = JSON.parse(document.getElementById("data").textContent);
const plot = document.getElementById("plot"),
  tip = document.getElementById("tip");
const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer;
const { width, height } = data,
  ranges = new Uint16Array(bytes(data.range_cm));
const mask = new Uint8Array(bytes(data.mask)),
  source = new Int8Array(bytes(data.source));
const known = ranges.some((value) => value > 0);
const logRange = (value) => (value ? Math.log10(value / 100) : null);
const rows = Array.from({ length: height }, (_, y) =>
  Array.from(ranges.subarray(y * width, (y + 1) * width), logRange),
);
const marks = [2, 5, 10, 20, 50, 100],
  panels = ["", "2", "3"];
const narrow = document.body.clientWidth < 640; // the bar below instead of beside the pictures
const beside = narrow ? 50 : 150;
const empty = (n) => ({ type: "scatter", x: [], y: [], xaxis: "x" + n, yaxis: "y" + n, showlegend: false });
const heatmap = {
  type: "heatmap",
  z: rows,
  xaxis: "x2",
  yaxis: "y2",
  hoverinfo: "skip",
  colorscale: "Jet",
  reversescale: true,
  zmin: Math.log10(2),
  zmax: 2,
  showscale: known,
  colorbar: {
    title: { text: "range, m" },
    tickvals: marks.map(Math.log10),
    ticktext: marks.map(String),
    ...(narrow
      ? { orientation: "h", len: 1, thickness: 12, y: -0.12, yanchor: "top" }
      : { len: 0.33, y: 0.5 }),
  },
};
const picture = (url, n) => ({
  source: url,
  xref: "x" + n,
  yref: "y" + n,
  x: -0.5,
  y: -0.5,
  sizex: width,
  sizey: height,
  sizing: "stretch",
  layer: "below",
});

const xs = [],
  ys = [];
for (let degrees = -180; degrees <= 180; degrees += narrow ? 90 : 30) xs.push(degrees);
const steps = narrow ? 2 : 4;
for (let k = 0; k <= steps; k++) ys.push(Math.round((k * (height - 1)) / steps));
const plain = { showgrid: false, zeroline: false };
const xAxis = {
  ...plain,
  range: [-0.5, width - 0.5],
  tickvals: xs.map((d) => (d / data.azimuth_range_deg + 0.5) * width - 0.5),
  ticktext: xs.map((d) => d + "\u00b0"),
};
const yAxis = {
  ...plain,
  range: [height - 0.5, -0.5],
  tickvals: ys,
  constrain: "domain",
  ticktext: ys.map((y) => (Math.round(data.elevation_deg[y]) || 0) + "\u00b0"),
};
const layout = {
  height: Math.max(420, Math.min(1000, (3.2 * (document.body.clientWidth - beside) * height) / width + 140)),
  margin: narrow ? { l: 38, r: 6, t: 25, b: 110 } : { l: 50, r: 20, t: 25, b: 30 },
  dragmode: "zoom",
  hovermode: false,
  plot_bgcolor: "#000",
  annotations: [],
  images: [picture(data.rgb, ""), picture(data.mask_picture, "3")],
};
panels.forEach((n, k) => {
  const low = [0.69, 0.35, 0.01][k],
    anchor = n || "";
  layout["xaxis" + n] = {
    ...xAxis,
    anchor: "y" + anchor,
    ...(k ? { matches: "x" } : {}),
    showticklabels: k === 2,
  };
  layout["yaxis" + n] = {
    ...yAxis,
    anchor: "x" + anchor,
    domain: [low, low + 0.29],
    ...(k ? { matches: "y" } : { scaleanchor: "x" }),
  };
  layout.annotations.push({
    text: ["RGB", known ? "range" : "range (there is no depth)", "mask"][k],
    x: 0,
    y: low + 0.29,
    xref: "paper",
    yref: "paper",
    xanchor: "left",
    yanchor: "bottom",
    showarrow: false,
  });
});

const describe = (x, y) => {
  const at = y * width + x,
    range = ranges[at],
    degrees = ((x + 0.5) / width - 0.5) * data.azimuth_range_deg;
  const camera = source[at] < 0 ? "none" : data.cameras[source[at]];
  return (
    `range     ${range ? (range / 100).toFixed(2) + " m" : "not known"}\nazimuth   ${degrees.toFixed(1)}\u00b0` +
    `\nelevation ${data.elevation_deg[y].toFixed(1)}\u00b0\nmask      ${data.classes[mask[at]]}\ncamera    ${camera}`
  );
};
const pixelUnder = (event) => {
  const box = plot.getBoundingClientRect();
  for (const n of panels) {
    const axisX = plot._fullLayout["xaxis" + n],
      axisY = plot._fullLayout["yaxis" + n];
    const left = event.clientX - box.left - axisX._offset,
      top = event.clientY - box.top - axisY._offset;
    if (left < 0 || top < 0 || left > axisX._length || top > axisY._length) continue;
    const x = Math.round(axisX.p2d(left)),
      y = Math.round(axisY.p2d(top));
    if (x >= 0 && x < width && y >= 0 && y < height) return describe(x, y);
  }
  return "";
};
// Keys: arrows move by a tenth of what is shown, + and - zoom, 0 shows all.
const keys = { ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, -0.1], ArrowDown: [0, 0.1] };
const shownAfter = (key) => {
  if (key === "0") return { "xaxis.range": [-0.5, width - 0.5], "yaxis.range": [height - 0.5, -0.5] };
  const scale = { "+": 0.8, "=": 0.8, "-": 1.25 }[key] ?? 1,
    move = keys[key] ?? [0, 0];
  const range = (axis, share) => {
    const [low, high] = axis.range,
      middle = (low + high) / 2 + share * Math.abs(high - low);
    return [middle - ((high - low) / 2) * scale, middle + ((high - low) / 2) * scale];
  };
  const { xaxis, yaxis } = plot._fullLayout;
  return { "xaxis.range": range(xaxis, move[0]), "yaxis.range": range(yaxis, move[1]) };
};
const traces = [empty(""), heatmap, empty("3")];
// Without the button that would upload the pictures.
const config = { responsive: true, scrollZoom: true, displaylogo: false, modeBarButtonsToRemove: ["sendChartToCloud"] };
Plotly.newPlot(plot, traces, layout, config).then(() => {
  plot.addEventListener("mousemove", (event) => {
    tip.textContent = pixelUnder(event);
    tip.style.display = tip.textContent ? "block" : "none";
    tip.style.left = Math.min(event.clientX + 14, innerWidth - 230) + "px";
    tip.style.top = Math.min(event.clientY + 14, innerHeight - 110) + "px";
  });
  plot.addEventListener("mouseleave", () => {
    tip.style.display = "none";
  });
  plot.tabIndex = 0;
  plot.setAttribute("role", "application");
  plot.setAttribute("aria-label", "panorama: arrow keys to move, + and - to zoom, 0 for all");
  plot.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in keys || "+-=0".includes(event.key))) return;
    event.preventDefault();
    Plotly.relayout(plot, shownAfter(event.key));
  });
  document.body.dataset.drawn = "yes";
});
