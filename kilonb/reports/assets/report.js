// Reports: tables that sort and filter, runs chosen in tables and charts at once, colours, picture comparisons.
// Every element that stands for a run carries its key in `data-run`. The page is complete without this script.
"use strict";

const all = (query, root = document) => [...root.querySelectorAll(query)];

// --- Runs: key -> all elements that stand for it

const marks = new Map();
for (const mark of all("[data-run]")) {
  const key = mark.dataset.run;
  if (!marks.has(key)) marks.set(key, []);
  marks.get(key).push(mark);
}
const marksOf = (key) => marks.get(key) ?? [];

// --- Choosing runs

const chosen = new Set();
const clearButton = document.getElementById("clear");

function showChosen() {
  document.body.classList.toggle("choosing", chosen.size > 0);
  for (const [key, group] of marks) {
    for (const mark of group) mark.classList.toggle("chosen", chosen.has(key));
  }
  if (!clearButton) return;
  clearButton.hidden = chosen.size === 0;
  clearButton.textContent = `${chosen.size} chosen: show all`;
}

function toggleRun(key) {
  if (!chosen.delete(key)) chosen.add(key);
  showChosen();
}

function clearChosen() {
  chosen.clear();
  showChosen();
}

document.addEventListener("click", (event) => {
  const mark = event.target.closest("[data-run]");
  if (!mark || event.target.closest("a, button, input, select")) return;
  if (getSelection().isCollapsed) toggleRun(mark.dataset.run);
});

document.addEventListener("keydown", (event) => {
  const key = event.target.tagName === "TR" ? event.target.dataset.run : undefined;
  if (key !== undefined && [" ", "Enter"].includes(event.key)) {
    event.preventDefault();
    toggleRun(key);
  }
  if (event.key === "Escape" && chosen.size) clearChosen();
});

clearButton?.addEventListener("click", clearChosen);

for (const kind of ["mouseover", "mouseout"]) {
  document.addEventListener(kind, (event) => {
    const mark = event.target.closest("[data-run]");
    if (!mark) return;
    for (const other of marksOf(mark.dataset.run)) other.classList.toggle("near", kind === "mouseover");
  });
}

// --- Tables: a row may have a second row, class "below", with the run's error message

const bodyRows = (table) => all("tbody > tr:not(.below)", table);

function rowBelow(row) {
  return row.nextElementSibling?.classList.contains("below") ? row.nextElementSibling : null;
}

// The value to sort a row by: data-v of the cell where it has one (empty: missing), else the cell's text.
function sortValue(row, column) {
  const cell = row.cells[column];
  if (cell.dataset.v === undefined) return cell.textContent.trim() || null;
  return cell.dataset.v === "" ? null : Number(cell.dataset.v);
}

// Missing values come last in both directions; numbers come before texts.
function compareValues(a, b, sign) {
  if (a === null || b === null) return (a === null) - (b === null);
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
  return sign * (typeof a === "number" ? a - b || 0 : a.localeCompare(b, "en", { numeric: true }));
}

function sortBy(head) {
  const table = head.closest("table");
  const before = head.getAttribute("aria-sort");
  const descending = before ? before === "ascending" : head.classList.contains("n");
  for (const other of all("th", table)) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const rows = bodyRows(table).map((row) => [row, sortValue(row, head.cellIndex), rowBelow(row)]);
  rows.sort((a, b) => compareValues(a[1], b[1], descending ? -1 : 1));
  table.tBodies[0].append(...rows.flatMap(([row, , below]) => (below ? [row, below] : [row])));
}

for (const button of all("th button")) button.addEventListener("click", () => sortBy(button.closest("th")));

function filterTable(field) {
  const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
  const section = field.closest("section");
  const rows = bodyRows(section.querySelector("table"));
  for (const row of rows) {
    const below = rowBelow(row);
    const text = `${row.textContent} ${below?.textContent ?? ""}`.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
    if (below) below.hidden = row.hidden;
    for (const mark of marksOf(row.dataset.run)) mark.classList.toggle("off", row.hidden);
  }
  const shown = rows.filter((row) => !row.hidden).length;
  section.querySelector(".shown").textContent = `${shown} of ${rows.length} runs`;
}

for (const field of all(".filter")) field.addEventListener("input", () => filterTable(field));

// --- Colours: {runs: key -> parameter -> text, colours: parameter -> text -> colour}

const colouring = JSON.parse(document.getElementById("colouring")?.textContent ?? "null");
const colourBy = document.getElementById("colour-by");

function legendEntry([text, colour]) {
  const entry = document.createElement("span");
  const dot = document.createElement("i");
  dot.style.color = colour;
  entry.append(dot, text);
  return entry;
}

function colourMarks() {
  const parameter = colourBy.value;
  const palette = colouring.colours[parameter];
  for (const [key, values] of Object.entries(colouring.runs)) {
    for (const mark of marksOf(key)) {
      if (mark.tagName !== "TR") mark.style.color = palette[values[parameter]];
    }
  }
  document.getElementById("legend").replaceChildren(...Object.entries(palette).map(legendEntry));
}

if (colouring && colourBy) {
  colourBy.addEventListener("change", colourMarks);
  colourMarks();
}

// --- Two pictures on one spot: a movable edge between them, or blinking

function wireComparison(card) {
  const stage = card.querySelector(".stage");
  const images = all("img", stage);
  const swipe = card.querySelector(".swipe");
  const blink = card.querySelector(".blink");
  const left = card.querySelector(".choose-left");
  const right = card.querySelector(".choose-right");
  let timer = 0;

  function showEdge() {
    stage.style.setProperty("--at", `${swipe.value}%`);
  }

  function showChoice() {
    images.forEach((image, i) => {
      image.classList.toggle("left", i === Number(left.value) && left.value !== right.value);
      image.classList.toggle("right", i === Number(right.value));
    });
  }

  function toggleBlinking() {
    clearInterval(timer);
    timer = timer ? 0 : setInterval(() => stage.classList.toggle("second"), 500);
    stage.classList.toggle("blinking", timer !== 0);
    stage.classList.remove("second");
    blink.setAttribute("aria-pressed", String(timer !== 0));
  }

  function moveEdge(event) {
    const box = stage.getBoundingClientRect();
    swipe.value = (100 * (event.clientX - box.left)) / box.width;
    showEdge();
  }

  for (const select of [left, right]) select.addEventListener("change", showChoice);
  swipe.addEventListener("input", showEdge);
  blink.addEventListener("click", toggleBlinking);
  stage.addEventListener("pointerdown", (event) => {
    stage.setPointerCapture(event.pointerId);
    moveEdge(event);
  });
  stage.addEventListener("pointermove", (event) => {
    if (event.buttons || event.pointerType === "mouse") moveEdge(event);
  });
  card.addEventListener("keydown", (event) => {
    if (event.key === "b" && event.target.tagName !== "SELECT") toggleBlinking();
  });
  showChoice();
  showEdge();
}

for (const card of all(".comparison")) wireComparison(card);
