// The page of imaging.gallery: sorts cards by a metric, enlarges one, alternates its target and prediction.
const cards = document.getElementById("cards"),
  metric = document.getElementById("metric"),
  order = document.getElementById("order");
const large = document.getElementById("large"),
  picture = document.getElementById("picture"),
  caption = document.getElementById("caption");
const lower = JSON.parse(document.getElementById("lower").textContent);
let shown = null,
  face = "target",
  timer = 0;
const value = (card) => {
  const text = JSON.parse(card.dataset.scores)[metric.value],
    x = { inf: Infinity, "-inf": -Infinity }[text] ?? parseFloat(text);
  return Number.isNaN(x) ? null : x;
};
function sort() {
  const sign = (lower.includes(metric.value) ? -1 : 1) * (order.value === "worst" ? 1 : -1);
  const sorted = [...cards.children].sort((a, b) => {
    const x = value(a),
      y = value(b);
    return x === null || y === null ? (x === null) - (y === null) : x === y ? 0 : sign * (x < y ? -1 : 1);
  });
  for (const card of sorted) {
    card.querySelector("b").textContent = JSON.parse(card.dataset.captions)[metric.value] ?? "not measured";
    cards.append(card);
  }
}
function show(next) {
  face = next;
  picture.src = shown.querySelector(`img[data-face=${face}]`).src;
  picture.alt = face;
  caption.textContent = `${shown.dataset.name} · ${face} · ${shown.querySelector("b").textContent}`;
  for (const button of large.querySelectorAll("[data-show]"))
    button.setAttribute("aria-pressed", String(button.dataset.show === face && !timer));
}
function still() {
  clearInterval(timer);
  timer = 0;
  document.getElementById("blink").setAttribute("aria-pressed", "false");
}
function blink() {
  if (timer) {
    still();
    show(face);
    return;
  }
  timer = setInterval(() => show(face === "target" ? "prediction" : "target"), 400);
  document.getElementById("blink").setAttribute("aria-pressed", "true");
  show("target");
}
function open(card) {
  still();
  shown = card;
  show("target");
  if (!large.open) large.showModal();
}
function step(by) {
  const all = [...cards.children];
  open(all[(all.indexOf(shown) + by + all.length) % all.length]);
}
cards.addEventListener("click", (event) => {
  const trio = event.target.closest(".trio");
  if (trio) open(trio.closest(".card"));
});
for (const button of large.querySelectorAll("[data-show]"))
  button.addEventListener("click", () => {
    still();
    show(button.dataset.show);
  });
document.getElementById("blink").addEventListener("click", blink);
document.getElementById("previous").addEventListener("click", () => step(-1));
document.getElementById("next").addEventListener("click", () => step(1));
document.getElementById("close").addEventListener("click", () => large.close());
picture.addEventListener("click", () => {
  still();
  show(face === "target" ? "prediction" : "target");
});
large.addEventListener("close", still);
large.addEventListener("click", (event) => {
  if (event.target === large) large.close();
});
large.addEventListener("keydown", (event) => {
  const action = { ArrowLeft: () => step(-1), ArrowRight: () => step(1), b: blink }[event.key];
  if (action) {
    event.preventDefault();
    action();
  }
});
for (const select of [metric, order]) select.addEventListener("change", sort);
sort();
