// Dashboard: all runs of an outputs folder while they go on. Asks its own server for what has changed, or shows the
// frozen state that the page holds. Every text of a file is set as text.
"use strict";

const frozen = JSON.parse(document.getElementById("frozen").textContent);
const GOING = ["prepared", "running"];
const BAD = ["failed", "abandoned", "unreadable"];
const COLOURS = [
  "#0b5fa5", "#c0262d", "#1a7f37", "#9a6700", "#7a3fb0", "#0f7c83",
  "#b5327e", "#4a5568", "#3f51b5", "#a8480b", "#4d7c0f", "#8a3b3b",
];
const DASHES = [[], [7, 4], [2, 3]];
const ROWS = 20; // runs of an experiment before "show all"
const POINTS = 4000; // points of a curve before it is asked for again, thinned

const items = new Map(); // key -> run or sweep
const curves = {}; // key -> folder below -> {generation, rows, curves: name -> [x, y]}
const notices = [];
const view = {
  pinned: new Set(load("pinned", [])), names: null, axis: "step", log: false, smoothing: 0, filter: "",
  whole: new Set(), shut: new Set(), open: "", chosen: false,
};
let number = 0;
let boot = "";
let hardware = {};
let outputs = "";
let filtered = [];

function load(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(`kilonb.${name}`)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

function save(name, value) {
  try {
    localStorage.setItem(`kilonb.${name}`, JSON.stringify(value));
  } catch {
    return;
  }
}

// --- Elements

function el(name, properties = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "class") node.className = value;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key.includes("-") || key === "role" || key === "for") node.setAttribute(key, value);
    else node[key] = value;
  }
  node.append(...children);
  return node;
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// One child for each entry, made once and kept, so that focus and scroll positions stay.
function keyed(parent, entries, keyOf, make, update) {
  const known = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  let at = parent.firstElementChild;
  for (const entry of entries) {
    const key = keyOf(entry);
    let node = known.get(key);
    known.delete(key);
    if (!node) {
      node = make(entry);
      node.dataset.key = key;
    }
    if (node === at) at = at.nextElementSibling;
    else parent.insertBefore(node, at);
    update?.(node, entry);
  }
  for (const node of known.values()) node.remove();
}

// --- Texts

function duration(seconds) {
  if (!Number.isFinite(seconds)) return "";
  const whole = Math.max(0, Math.round(seconds));
  const pad = (value) => String(value).padStart(2, "0");
  const minutes = Math.floor(whole / 60);
  if (minutes < 60) return `${minutes}:${pad(whole % 60)}`;
  return `${Math.floor(minutes / 60)}:${pad(minutes % 60)}:${pad(whole % 60)}`;
}

function minute(moment) {
  const time = new Date(moment);
  if (Number.isNaN(time.getTime())) return "";
  const pad = (value) => String(value).padStart(2, "0");
  return `${time.getFullYear()}-${pad(time.getMonth() + 1)}-${pad(time.getDate())} ${pad(time.getHours())}:` +
    pad(time.getMinutes());
}

function format(value) {
  if (!Number.isFinite(value)) return "-";
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 1e5 || size < 1e-3) return value.toExponential(2).replace("e+", "e");
  return String(Number(value.toPrecision(4)));
}

const plural = (count, one, many = `${one}s`) => `${count} ${count === 1 ? one : many}`;
const runs = () => [...items.values()].filter((item) => item.kind === "run");
const sweeps = () => [...items.values()].filter((item) => item.kind === "sweep");
const going = (item) => GOING.includes(item.status);
const started = (item) => new Date(item.started).getTime() || 0;
const newestFirst = (a, b) => started(b) - started(a) || (a.key < b.key ? 1 : -1);

function spent(item) {
  if (!going(item)) return item.elapsed_s;
  if (frozen) return item.spent_s ?? undefined;
  return (Date.now() - started(item)) / 1000;
}

function statusText(item) {
  const host = item.host ? ` on ${item.host}` : "";
  if (item.status === "finished" && item.gates) return `${item.ok ? "✔" : "✘"} gates ${item.gates}`;
  return item.status + host;
}

function statusLook(item) {
  if (going(item)) return "going";
  if (BAD.includes(item.status) || item.ok === false) return "bad";
  return item.status === "finished" ? "good" : "warn";
}

// --- Colours: constant for a run, from its key

function hash(text) {
  let value = 2166136261;
  for (const letter of text) value = Math.imul(value ^ letter.codePointAt(0), 16777619) >>> 0;
  return value;
}
const colourOf = (key) => COLOURS[hash(key) % COLOURS.length];
const dashOf = (key) => DASHES[Math.floor(hash(key) / 4096) % DASHES.length];

function swatch(key) {
  const image = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  image.setAttribute("class", "swatch");
  image.setAttribute("viewBox", "0 0 22 8");
  image.setAttribute("aria-hidden", "true");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
  line.setAttribute("d", "M0 4H22");
  line.setAttribute("stroke", colourOf(key));
  line.setAttribute("stroke-width", "3");
  line.setAttribute("stroke-dasharray", dashOf(key).join(" "));
  image.append(line);
  return image;
}

// --- The parts of the page

const main = document.getElementById("main");
const linkState = document.getElementById("link");

function part(id, title, ...children) {
  const node = el("section", { id }, el("h2", { id: `${id}-title` }, title), ...children);
  node.setAttribute("aria-labelledby", `${id}-title`);
  main.append(node);
  return node;
}

const machine = el("div", { class: "meters" });
const noticeList = el("ul", { class: "notices", role: "log", "aria-label": "Runs that ended just now" });
const cards = el("div", { class: "cards" });
const nothing = el("p", { class: "empty" }, "Nothing runs now. ", el("code", {}, "kilonb run EXPERIMENT"),
  " starts a run, and it appears here.");
const chips = el("div", { class: "chips", role: "group", "aria-label": "Scalars" });
const legend = el("ul", { class: "legend" });
const charts = el("div", { class: "charts" });
const noCurves = el("p", { class: "empty" }, frozen ? "The curves of these runs are not in this file."
  : "No scalars yet. Runs that go on are drawn here; pin others in the list.");
const queue = el("div", { class: "queue" });
const noSweeps = el("p", { class: "empty" }, "No sweeps. ", el("code", {}, "kilonb sweep FILE"), " starts one.");
const groups = el("div", { class: "groups" });
const shown = el("output", { class: "soft" });
const chooser = el("select", { id: "which", onchange: () => openDetails(chooser.value, false) });
const log = el("pre", { class: "log", tabIndex: 0, "aria-label": "End of the log" });
const pictures = el("div", { class: "pictures" });
const verdict = el("p", { class: "verdict" });
const filterBox = el("input", { type: "search", id: "filter", placeholder: "words of name, status, data",
  oninput: () => { view.filter = filterBox.value; drawRuns(); } });

part("machine", frozen ? "Machine at that time" : "This machine", machine);
part("now", "Running", noticeList, cards, nothing);
part("curves", "Curves", toolbar(), chips, legend, charts, noCurves);
part("details", "Log and pictures", el("div", { class: "tools" }, el("label", { for: "which" }, "Run "), chooser),
  verdict, pictures, log);
part("queue", "Sweeps", queue, noSweeps);
part("runs", "All runs", el("div", { class: "tools" }, el("label", { for: "filter" }, "Filter "), filterBox, shown),
  groups);

function toolbar() {
  const axis = el("select", { id: "axis", onchange: () => { view.axis = axis.value; dropCurves(); } },
    new Option("step", "step"), new Option("training seconds", "elapsed_s"));
  const log10 = el("input", { type: "checkbox", id: "log10",
    onchange: () => { view.log = log10.checked; drawCharts(); } });
  const value = el("output", {}, "0");
  const smoothing = el("input", { type: "range", id: "smoothing", min: 0, max: 0.99, step: 0.01, value: 0,
    oninput: () => { view.smoothing = Number(smoothing.value); setText(value, smoothing.value); drawCharts(); } });
  return el("div", { class: "tools" }, el("span", {}, el("label", { for: "axis" }, "x axis "), axis),
    el("span", {}, log10, el("label", { for: "log10" }, " logarithmic y")),
    el("span", {}, el("label", { for: "smoothing" }, "smoothing "), smoothing, " ", value));
}

// --- Machine

function meter(label, text, share) {
  return { label, text, share: Number.isFinite(share) ? Math.min(1, Math.max(0, share)) : 0 };
}

function meters() {
  const found = [];
  const now = hardware;
  if (now.cpu_percent !== undefined) {
    const load1 = now.load === undefined ? "" : `, load ${format(now.load)}`;
    found.push(meter("processor", `${Math.round(now.cpu_percent)}% of ${plural(now.cores, "core")}${load1}`,
      now.cpu_percent / 100));
  }
  if (now.memory_total_gb) {
    found.push(meter("memory", `${format(now.memory_used_gb)} of ${format(now.memory_total_gb)} GB`,
      now.memory_used_gb / now.memory_total_gb));
  }
  if (now.disk_total_gb) {
    found.push(meter("disk", `${format(now.disk_free_gb)} GB free of ${format(now.disk_total_gb)} GB`,
      1 - now.disk_free_gb / now.disk_total_gb));
  }
  (now.gpus ?? []).forEach((card, i) => {
    const used = card.used_percent === null ? "" : `${card.used_percent}%, `;
    const heat = card.temperature_c === null ? "" : `, ${card.temperature_c} °C`;
    found.push(meter(`GPU ${i}`, `${used}${format(card.memory_used_mb / 1000)} of ` +
      `${format(card.memory_total_mb / 1000)} GB${heat}, ${card.name}`,
    card.used_percent === null ? card.memory_used_mb / card.memory_total_mb : card.used_percent / 100));
  });
  return found;
}

function drawMachine() {
  const make = () => el("div", { class: "meter" }, el("b"), el("span", { class: "track" }, el("i")),
    el("span", { class: "soft" }));
  keyed(machine, meters(), (one) => one.label, make, (node, one) => {
    const [name, track, text] = node.children;
    setText(name, one.label);
    track.firstChild.style.width = `${100 * one.share}%`;
    track.classList.toggle("full", one.share > 0.9);
    setText(text, one.text);
  });
}

// --- Runs that go on

function makeCard(item) {
  return el("article", { class: "card" },
    el("div", { class: "head" }, swatch(item.key), el("h3", {}, runLink(item)), pinButton(item)),
    el("progress", { max: 1 }), el("p", { class: "where" }), el("p", { class: "values" }), el("p", { class: "line" }),
    el("div", { class: "thumb" }));
}

function updateCard(node, item) {
  const [head, bar, where, values, line, thumb] = node.children;
  const [done, total] = item.total ? [item.step, item.total] : [item.cell, item.cells];
  const share = total ? Math.min(1, done / total) : 0;
  bar.value = share;
  bar.setAttribute("aria-label", `${item.key}: ${Math.round(100 * share)}%`);
  const at = item.total ? `${item.stage || "step"} ${item.step}/${item.total}`
    : item.cells ? `cell ${item.cell} of ${item.cells}` : item.status === "prepared" ? "starting" : "no progress yet";
  const left = Number.isFinite(item.eta_s) && item.step < item.total ? `${duration(item.eta_s)} left` : "";
  const time = duration(spent(item));
  setText(where, [`${Math.round(100 * share)}%`, at, left, time && `${time} so far`, item.host && `on ${item.host}`]
    .filter(Boolean).join(" · "));
  setText(values, [item.heading, ...Object.entries(item.values ?? {}).map(([name, value]) => `${name} ${value}`)]
    .filter(Boolean).join(" · "));
  setText(line, item.total ? "" : item.line || "");
  drawPin(head.lastChild, item);
  drawThumb(thumb, item);
}

function drawThumb(thumb, item) {
  const wanted = item.picture ? item.picture.join("?") : "";
  if (thumb.dataset.shown === wanted) return;
  thumb.dataset.shown = wanted;
  thumb.replaceChildren();
  const source = item.picture && pictureSource(item.key, ...item.picture);
  if (source) thumb.append(el("img", { src: source, alt: `newest picture: ${item.picture[0]}`, loading: "lazy" }));
}

function pictureSource(key, name, version) {
  if (frozen) return (frozen.pictures[key] ?? []).find(([one]) => one === name)?.[1] ?? "";
  return `picture?${new URLSearchParams({ run: key, name, version })}`;
}

function drawNow() {
  const found = runs().filter(going).sort(newestFirst);
  nothing.hidden = found.length > 0;
  keyed(cards, found, (item) => item.key, makeCard, updateCard);
  keyed(noticeList, notices, (one) => one.id, (one) => el("li", { class: one.look }, one.text));
  noticeList.hidden = notices.length === 0;
}

function notice(item) {
  const why = item.error || (item.status === "abandoned" ? "its process has ended without recording how" : "");
  notices.unshift({ id: `${item.key}@${number}`, look: statusLook(item),
    text: `${item.key}: ${statusText(item)}${why ? `: ${why}` : ""}` });
  notices.length = Math.min(notices.length, 4);
}

// --- Links, pins

function runLink(item) {
  if (frozen) return el("span", {}, item.key);
  const address = `page/${item.key.split("/").map(encodeURIComponent).join("/")}`;
  return el("a", { href: address, target: "_blank", rel: "noopener", title: "the page of this run" }, item.key);
}

function pinButton(item) {
  return el("button", { type: "button", class: "pin", onclick: () => togglePin(item.key) }, "pin");
}

function drawPin(button, item) {
  const pressed = view.pinned.has(item.key);
  button.setAttribute("aria-pressed", String(pressed));
  setText(button, pressed ? "pinned" : "pin");
  button.setAttribute("aria-label", `${pressed ? "unpin" : "pin"} ${item.key}`);
}

function togglePin(key) {
  if (!view.pinned.delete(key)) view.pinned.add(key);
  save("pinned", [...view.pinned]);
  drawRuns();
  drawNow();
  drawCharts();
  askCurves();
}

// --- Curves

// Runs that are drawn: those that go on and those that are pinned; where there are none, the newest one with curves.
function drawn() {
  const all = runs().sort(newestFirst);
  const found = all.filter((item) => going(item) || view.pinned.has(item.key)).slice(0, 24);
  return found.length ? found : all.filter((item) => item.curves).slice(0, 1);
}

function dropCurves() {
  for (const key of Object.keys(curves)) delete curves[key];
  askCurves();
}

function take(key, below, reply) {
  curves[key] ??= {};
  const known = curves[key][below];
  if (!known || reply.fresh) {
    curves[key][below] = reply;
    return;
  }
  for (const [name, [x, y]] of Object.entries(reply.curves)) {
    const curve = (known.curves[name] ??= [[], []]);
    curve[0].push(...x);
    curve[1].push(...y);
    if (curve[0].length > POINTS) reply.generation = 0;
  }
  known.generation = reply.generation;
  known.rows = reply.rows;
}

async function askCurves() {
  if (frozen) {
    for (const [key, files] of Object.entries(frozen.axes[view.axis] ?? {})) curves[key] = files;
    drawCharts();
    return;
  }
  const axis = view.axis;
  const ask = {};
  for (const item of drawn()) {
    ask[item.key] = {};
    for (const [below, file] of Object.entries(curves[item.key] ?? {})) {
      ask[item.key][below] = [file.generation, file.rows];
    }
  }
  const reply = await question(`curves?${new URLSearchParams({ axis, ask: JSON.stringify(ask) })}`);
  if (axis !== view.axis) return;
  for (const [key, files] of Object.entries(reply)) {
    for (const [below, file] of Object.entries(files)) take(key, below, file);
  }
  drawCharts();
}

function curveNames(list) {
  const counts = new Map();
  for (const item of list) {
    for (const [below, file] of Object.entries(curves[item.key] ?? {})) {
      for (const name of Object.keys(file.curves)) {
        const full = below ? `${below}/${name}` : name;
        counts.set(full, (counts.get(full) ?? 0) + 1);
      }
    }
  }
  return [...counts.keys()].sort((a, b) => counts.get(b) - counts.get(a));
}

function curveOf(key, full) {
  const cut = full.lastIndexOf("/");
  const file = curves[key]?.[cut < 0 ? "" : full.slice(0, cut)];
  return file?.curves[full.slice(cut + 1)];
}

function chosenNames(names) {
  if (view.names) return names.filter((name) => view.names.has(name));
  const plain = names.filter((name) => !/(^|\/)(learning_rate|gradient_norm)$/.test(name));
  return (plain.length ? plain : names).slice(0, 4);
}

function toggleName(name, names) {
  view.names ??= new Set(chosenNames(names));
  if (!view.names.delete(name)) view.names.add(name);
  drawCharts();
}

function drawCharts() {
  const list = drawn();
  const names = curveNames(list);
  const chosen = chosenNames(names);
  noCurves.hidden = names.length > 0;
  keyed(chips, names, (name) => name,
    (name) => el("button", { type: "button", onclick: () => toggleName(name, curveNames(drawn())) }, name),
    (node, name) => node.setAttribute("aria-pressed", String(chosen.includes(name))));
  keyed(legend, names.length ? list : [], (item) => item.key, (item) => el("li", {}, swatch(item.key), item.key));
  keyed(charts, chosen, (name) => name, makeChart, (node, name) => drawChart(node, name, list));
}

// --- One chart

function makeChart(name) {
  const canvas = el("canvas", { tabIndex: 0, role: "img" });
  const node = el("figure", { class: "chart" }, el("figcaption", {}, name), canvas,
    el("p", { class: "readout soft" }));
  const move = (x) => {
    node.cursor = x === null ? null : Math.min(1, Math.max(0, x));
    drawChart(node, name, drawn());
  };
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    move((event.clientX - box.left - MARGIN.left) / (box.width - MARGIN.left - MARGIN.right));
  });
  canvas.addEventListener("pointerleave", () => move(null));
  canvas.addEventListener("blur", () => move(null));
  canvas.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -0.02, ArrowRight: 0.02, Home: -2, End: 2 }[event.key];
    if (by === undefined && event.key !== "Escape") return;
    event.preventDefault();
    move(by === undefined ? null : (node.cursor ?? 1) + by);
  });
  return node;
}

const MARGIN = { left: 52, right: 10, top: 8, bottom: 24 };

function smoothed(values) {
  if (!view.smoothing) return values;
  let mean = 0;
  let rest = 1;
  return values.map((value) => {
    if (value === null) return null;
    mean = view.smoothing * mean + (1 - view.smoothing) * value;
    rest *= view.smoothing;
    return mean / (1 - rest);
  });
}

const scaled = (value) => (view.log ? (value > 0 ? Math.log10(value) : null) : value);

function ticks(low, high, count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((one) => one >= raw * 0.999) ?? raw;
  const found = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-9; value += step) found.push(value);
  return found;
}

function extent(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) {
    if (value === null || !Number.isFinite(value)) continue;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (low > high) return null;
  if (low === high) return [low - (Math.abs(low) || 1) * 0.05, high + (Math.abs(high) || 1) * 0.05];
  return [low, high];
}

function drawChart(node, name, list) {
  const lines = [];
  for (const item of list) {
    const curve = curveOf(item.key, name);
    if (!curve) continue;
    const [raw, y] = [curve[1], smoothed(curve[1])].map((values) => values.map(scaledOrNull));
    lines.push({ key: item.key, x: curve[0], raw, y });
  }
  const [, canvas, readout] = node.children;
  const box = [canvas.clientWidth || 320, canvas.clientHeight || 190];
  const ratio = devicePixelRatio || 1;
  canvas.width = box[0] * ratio;
  canvas.height = box[1] * ratio;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const across = extent(lines.flatMap((line) => line.x));
  const up = extent(lines.flatMap((line) => line.y));
  canvas.setAttribute("aria-label", chartLabel(name, lines));
  if (!across || !up) {
    setText(readout, view.log ? "no values above 0" : "no values yet");
    return;
  }
  const pad = (up[1] - up[0]) * 0.05;
  const plot = frameOf(box, across, [up[0] - pad, up[1] + pad]);
  drawAxes(pen, plot);
  for (const line of lines) {
    if (view.smoothing) stroke(pen, plot, line.x, line.raw, colourOf(line.key), [], 0.25);
    stroke(pen, plot, line.x, line.y, colourOf(line.key), dashOf(line.key), 1);
  }
  setText(readout, readoutOf(pen, plot, lines, node.cursor));
}

const scaledOrNull = (value) => (value === null ? null : scaled(value));
const unscaled = (value) => (view.log ? 10 ** value : value);

function frameOf([width, height], across, up) {
  const inside = [width - MARGIN.left - MARGIN.right, height - MARGIN.top - MARGIN.bottom];
  return {
    width, height, across, up,
    toX: (value) => MARGIN.left + (inside[0] * (value - across[0])) / (across[1] - across[0]),
    toY: (value) => MARGIN.top + inside[1] * (1 - (value - up[0]) / (up[1] - up[0])),
  };
}

function drawAxes(pen, plot) {
  pen.font = "11px system-ui, sans-serif";
  pen.lineWidth = 1;
  pen.strokeStyle = "#e3e7ec";
  pen.fillStyle = "#545c68";
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  for (const value of ticks(...plot.up, 4)) {
    const y = plot.toY(value);
    pen.beginPath();
    pen.moveTo(MARGIN.left, y);
    pen.lineTo(plot.width - MARGIN.right, y);
    pen.stroke();
    pen.fillText(format(unscaled(Math.abs(value) < 1e-12 ? 0 : value)), MARGIN.left - 6, y);
  }
  pen.textAlign = "center";
  pen.textBaseline = "top";
  for (const value of ticks(...plot.across, Math.max(2, Math.floor(plot.width / 110)))) {
    const x = Math.min(plot.toX(value), plot.width - 22);
    pen.fillText(format(value), x, plot.height - MARGIN.bottom + 7);
  }
}

function stroke(pen, plot, x, y, colour, dash, alpha) {
  pen.save();
  pen.globalAlpha = alpha;
  pen.strokeStyle = colour;
  pen.fillStyle = colour;
  pen.lineWidth = 1.8;
  pen.setLineDash(dash);
  pen.beginPath();
  let open = false;
  y.forEach((value, i) => {
    if (value === null) open = false;
    else if (open) pen.lineTo(plot.toX(x[i]), plot.toY(value));
    else {
      pen.moveTo(plot.toX(x[i]), plot.toY(value));
      open = true;
    }
  });
  pen.stroke();
  pen.setLineDash([]);
  const last = y.findLastIndex((value) => value !== null);
  if (last >= 0) {
    pen.beginPath();
    pen.arc(plot.toX(x[last]), plot.toY(y[last]), 2.6, 0, 7);
    pen.fill();
  }
  pen.restore();
}

function nearest(line, at) {
  let best = -1;
  line.y.forEach((value, i) => {
    if (value !== null && (best < 0 || Math.abs(line.x[i] - at) < Math.abs(line.x[best] - at))) best = i;
  });
  return best;
}

const shortName = (key) => key.split("/").at(-1);

function readoutOf(pen, plot, lines, cursor) {
  const at = cursor === null || cursor === undefined ? plot.across[1]
    : plot.across[0] + cursor * (plot.across[1] - plot.across[0]);
  if (cursor !== null && cursor !== undefined) {
    pen.strokeStyle = "#545c68";
    pen.beginPath();
    pen.moveTo(plot.toX(at), MARGIN.top);
    pen.lineTo(plot.toX(at), plot.height - MARGIN.bottom);
    pen.stroke();
  }
  const texts = lines.map((line) => [line, nearest(line, at)]).filter(([, i]) => i >= 0)
    .map(([line, i]) => `${lines.length > 1 ? `${shortName(line.key)} ` : ""}${format(unscaled(line.y[i]))} at ` +
      format(line.x[i]));
  const more = texts.length > 4 ? ` and ${texts.length - 4} more` : "";
  return texts.slice(0, 4).join(" · ") + more;
}

function chartLabel(name, lines) {
  const texts = lines.slice(0, 4).map((line) => {
    const last = line.y.findLast((value) => value !== null);
    return last === undefined ? `${line.key} no values` : `${line.key} last ${format(unscaled(last))}`;
  });
  return `${name}: ${texts.join(", ") || "no values"}. Arrow keys move the cursor.`;
}

// --- Log and pictures of one run

let logSize = 0;

function openDetails(key, scroll = true) {
  view.open = key;
  view.chosen = true;
  logSize = 0;
  log.textContent = "";
  pictures.replaceChildren();
  drawDetails();
  askDetails().catch(() => undefined);
  if (scroll) {
    chooser.focus({ preventScroll: true });
    document.getElementById("details").scrollIntoView({ block: "start" });
  }
}

function drawDetails() {
  const all = runs().sort(newestFirst);
  if (!view.chosen || !items.has(view.open)) {
    const next = (all.find(going) ?? all[0])?.key ?? "";
    if (next !== view.open) {
      view.open = next;
      logSize = 0;
      log.textContent = "";
      pictures.replaceChildren();
    }
  }
  document.getElementById("details").hidden = !view.open;
  const listed = all.filter((item, i) => going(item) || view.pinned.has(item.key) || item.key === view.open || i < 15);
  keyed(chooser, listed, (item) => item.key, (item) => new Option(item.key, item.key));
  chooser.value = view.open;
  const item = items.get(view.open);
  setText(verdict, item ? [item.status, item.verdict, item.error].filter(Boolean).join(": ") : "");
}

async function askDetails() {
  const key = view.open;
  if (!key) return;
  if (frozen) {
    setText(log, frozen.logs[key] || "No log of this run is in this file.");
    drawPictures(key, (frozen.pictures[key] ?? []).map(([name]) => [name, ""]));
    return;
  }
  const reply = await question(`log?${new URLSearchParams({ run: key, since: logSize })}`);
  const found = await question(`pictures?${new URLSearchParams({ run: key })}`);
  if (key !== view.open) return;
  drawPictures(key, found);
  const atEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 8;
  if (reply.fresh || !logSize) setText(log, reply.text || "This run has no log: it was not started by kilonb run.");
  else if (reply.text) log.textContent = (log.textContent + reply.text).slice(-60000);
  logSize = reply.size;
  if (atEnd) log.scrollTop = log.scrollHeight;
}

function drawPictures(key, found) {
  keyed(pictures, found, ([name, version]) => `${key}?${name}?${version}`, ([name, version]) =>
    el("figure", {}, el("img", { src: pictureSource(key, name, version), alt: name, loading: "lazy" }),
      el("figcaption", {}, name)));
}

// --- Sweeps

const ORDER = ["finished", "skipped", "failed", "interrupted", "running", "waiting"];

function makeSweep(item) {
  return el("article", { class: "sweep" }, el("h3", {}, item.name, " ", el("span", { class: "state" })),
    el("div", { class: "counts", role: "img" }), el("p", { class: "soft" }), el("p", { class: "trouble" }),
    el("div", { class: "lists" }));
}

function updateSweep(node, item) {
  const [head, bar, text, trouble, lists] = node.children;
  const total = Object.values(item.counts).reduce((a, b) => a + b, 0);
  const state = head.lastChild;
  setText(state, item.status);
  state.className = `state ${statusLook(item)}`;
  const counts = ORDER.filter((name) => item.counts[name]);
  const words = counts.map((name) => `${item.counts[name]} ${name}`).join(", ");
  bar.setAttribute("aria-label", words || "no runs");
  keyed(bar, counts, (name) => name, (name) => el("i", { class: `part ${name}` }),
    (one, name) => { one.style.width = `${(100 * item.counts[name]) / total}%`; });
  const left = going(item) && Number.isFinite(item.eta_s) ? `about ${duration(item.eta_s)} left` : "";
  setText(text, [item.experiment, words, `of ${plural(total, "run")}`, left,
    item.workers ? plural(item.workers, "worker") : ""].filter(Boolean).join(" · "));
  setText(trouble, item.trouble || (item.status === "abandoned"
    ? "Its process has ended without recording how: the same command resumes it." : ""));
  keyed(lists, ["running", "failed", "interrupted", "waiting", "finished"].filter((name) => item.queue[name]),
    (name) => name, (name) => makeQueue(name), (one, name) => updateQueue(one, item, name));
}

function makeQueue(name) {
  return el("details", { open: name !== "waiting" && name !== "finished" }, el("summary", {}), el("ul", {}));
}

function updateQueue(node, item, name) {
  const [head, list] = node.children;
  const rows = name === "finished" ? [...item.queue[name]].reverse() : item.queue[name];
  const more = item.counts[name] - rows.length;
  setText(head, `${item.counts[name]} ${name}${more > 0 ? `, ${rows.length} of them here` : ""}`);
  keyed(list, rows, (row) => row.name, () => el("li", {}), (one, row) => {
    const share = row.total ? `${Math.round((100 * row.step) / row.total)}%` : "";
    const left = going(item) && row.total && Number.isFinite(row.eta_s) ? `${duration(row.eta_s)} left` : "";
    setText(one, [row.name, row.varied, name === "running" ? share : "", name === "running" ? left : "",
      row.gates && `gates ${row.gates}`, row.attempt > 1 ? `attempt ${row.attempt}` : "", row.error]
      .filter(Boolean).join(" · "));
  });
}

function drawQueue() {
  const all = sweeps().sort((a, b) => going(b) - going(a) || newestFirst(a, b));
  noSweeps.hidden = all.length > 0;
  keyed(queue, all.slice(0, Math.max(6, all.filter(going).length)), (item) => item.key, makeSweep, updateSweep);
}

// --- All runs, by experiment

function makeGroup(group) {
  const node = el("details", { open: true }, el("summary", {}), el("ul", { class: "rows" }),
    el("button", { type: "button", class: "more", onclick: () => { view.whole.add(group.name); drawRuns(); } }));
  node.addEventListener("toggle", () => (node.open ? view.shut.delete(group.name) : view.shut.add(group.name)));
  return node;
}

function makeRow(item) {
  const button = el("button", { type: "button", onclick: () => openDetails(item.key) }, "log");
  button.setAttribute("aria-label", `log and pictures of ${item.key}`);
  const name = el("span", { class: "name" }, swatch(item.key), " ", runLink(item), el("em", {}));
  const span = (kind) => el("span", { class: kind });
  return el("li", { class: "run" }, pinButton(item), name, span("state"), span("soft when"), span("soft took"),
    span("soft data"), button, span("why"));
}

function updateRow(node, item) {
  const [pin, name, state, when, took, data, , why] = node.children;
  drawPin(pin, item);
  setText(name.lastChild, item.tag ? ` ${item.tag}` : "");
  setText(state, statusText(item));
  state.className = `state ${statusLook(item)}`;
  setText(when, minute(item.started));
  setText(took, duration(spent(item)));
  setText(data, item.data || "");
  setText(why, item.error || (item.status === "abandoned" ? "its process has ended without recording how" : ""));
}

function fits(item, words) {
  const parts = [item.key, item.experiment, item.tag, item.status, item.data, item.error, statusText(item)];
  const text = parts.join(" ").toLowerCase();
  return words.every((word) => text.includes(word));
}

function drawRuns() {
  const words = view.filter.toLowerCase().split(/\s+/).filter(Boolean);
  const all = runs();
  const found = all.filter((item) => fits(item, words)).sort(
    (a, b) => view.pinned.has(b.key) - view.pinned.has(a.key) || newestFirst(a, b));
  const by = new Map();
  for (const item of found) {
    if (!by.has(item.experiment)) by.set(item.experiment, { name: item.experiment, list: [] });
    by.get(item.experiment).list.push(item);
  }
  const only = filtered.length ? `, only ${filtered.join(", ")}` : "";
  setText(shown, all.length ? `${found.length} of ${plural(all.length, "run")}${only}` : `no runs yet${only}`);
  keyed(groups, [...by.values()], (group) => group.name, makeGroup, (node, group) => {
    const [head, list, more] = node.children;
    const open = group.list.filter(going).length;
    const bad = group.list.filter((item) => BAD.includes(item.status)).length;
    setText(head, [group.name, plural(group.list.length, "run"), open && `${open} running`, bad && `${bad} failed`]
      .filter(Boolean).join(" · "));
    const part20 = view.whole.has(group.name) ? group.list : group.list.slice(0, ROWS);
    keyed(list, part20, (item) => item.key, makeRow, updateRow);
    more.hidden = part20.length === group.list.length;
    setText(more, `show all ${group.list.length}`);
  });
}

// --- Asking the server

async function question(address) {
  const reply = await fetch(address, { cache: "no-store" });
  if (!reply.ok) throw new Error(`${reply.status}`);
  return reply.json();
}

function takeState(state) {
  for (const item of state.items) {
    const before = items.get(item.key);
    items.set(item.key, item);
    if (before && item.kind === "run" && going(before) && !going(item)) notice(item);
  }
  for (const key of state.gone) items.delete(key);
  ({ number, boot, hardware, outputs } = state);
  filtered = state.names;
}

function counted() {
  const all = runs();
  const open = all.filter(going).length;
  const waiting = sweeps().filter(going).reduce((sum, item) => sum + (item.counts.waiting ?? 0), 0);
  return [`${open} running`, waiting && `${waiting} waiting`, plural(all.length, "run")].filter(Boolean).join(", ");
}

function drawState() {
  setText(document.getElementById("where"), outputs);
  document.title = `${counted()} · KiloNB`;
  drawMachine();
  drawNow();
  drawDetails();
  drawQueue();
  drawRuns();
}

function showLink(lost, text) {
  linkState.className = lost ? "lost" : "live";
  setText(linkState, text);
}

async function poll() {
  let wait = document.hidden ? 5000 : 1000;
  try {
    const state = await question(`state?since=${number}`);
    if (boot && boot !== state.boot) {
      items.clear();
      number = 0;
      boot = state.boot;
      dropCurves();
    } else {
      takeState(state);
      showLink(false, `live: ${counted()}`);
      drawState();
      await askCurves();
      await askDetails();
    }
  } catch (error) {
    const known = /^\d+$/.test(error.message);
    showLink(true, `connection lost, retrying${known ? ` (the server answers ${error.message})` : ""}`);
    wait = 3000;
  }
  setTimeout(poll, wait);
}

document.addEventListener("keydown", (event) => {
  if (event.key === "/" && !["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName)) {
    event.preventDefault();
    filterBox.focus();
  }
});
new ResizeObserver(() => drawCharts()).observe(charts);

if (frozen) {
  takeState(frozen);
  showLink(false, `as it was, not live: ${counted()}`);
  linkState.className = "";
  drawState();
  askCurves();
  askDetails();
} else {
  showLink(false, "connecting");
  poll();
}
