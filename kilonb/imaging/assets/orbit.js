// The page of imaging.orbit_widget: gestures, one request at a time, and the frames shown.
// All text is set as text, never as HTML.

// ---- gestures: a drag across the picture's width is half a turn

const clamp = (x, low, high) => Math.min(high, Math.max(low, x));
const add = (a, b, s) => a.map((x, i) => x + s * b[i]);
const rad = (x) => (x * Math.PI) / 180;

function turn(pose, dx, dy) {
  // shares of the picture's width
  pose.azimuth_deg = (pose.azimuth_deg - 180 * dx) % 360;
  pose.elevation_deg = clamp(pose.elevation_deg + 180 * dy, -89, 89);
}
function zoom(pose, factor, home) {
  pose.radius = clamp(pose.radius * factor, home.radius / 50, home.radius * 20);
}
function pan(pose, [front, side, up], dx, dy) {
  const a = rad(pose.azimuth_deg),
    e = rad(pose.elevation_deg),
    wide = 2 * pose.radius * Math.tan(rad(pose.field_of_view_deg) / 2);
  const out = front.map((x, i) => Math.cos(a) * x + Math.sin(a) * side[i]);
  const right = side.map((x, i) => Math.cos(a) * x - Math.sin(a) * front[i]);
  const above = up.map((x, i) => Math.cos(e) * x - Math.sin(e) * out[i]);
  pose.target = add(add(pose.target, right, -dx * wide), above, dy * wide);
}

// Camera and target together: shares of the distance ahead (along the ground), to the right, up.
function walk(pose, [front, side, up], ahead, right, above) {
  const a = rad(pose.azimuth_deg);
  const out = front.map((x, i) => Math.cos(a) * x + Math.sin(a) * side[i]);
  const across = side.map((x, i) => Math.cos(a) * x - Math.sin(a) * front[i]);
  pose.target = add(
    add(add(pose.target, out, -ahead * pose.radius), across, right * pose.radius),
    up,
    above * pose.radius,
  );
}

function gestures(canvas, view, signal) {
  const fingers = new Map(),
    on = (name, f) => canvas.addEventListener(name, f, { signal, passive: false });
  const middle = () => {
    const p = [...fingers.values()];
    return [p.reduce((s, q) => s + q[0], 0) / p.length, p.reduce((s, q) => s + q[1], 0) / p.length];
  };
  const distance = () => {
    const [p, q] = [...fingers.values()];
    return Math.max(1, Math.hypot(p[0] - q[0], p[1] - q[1]));
  };
  on("pointerdown", (event) => {
    event.preventDefault();
    canvas.focus({ preventScroll: true });
    canvas.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, [event.clientX, event.clientY]);
    view.grab(true);
  });
  on("pointermove", (event) => {
    if (!fingers.has(event.pointerId)) return;
    const [x, y] = middle(),
      before = fingers.size > 1 ? distance() : 0,
      wide = canvas.clientWidth || 1;
    fingers.set(event.pointerId, [event.clientX, event.clientY]);
    const [u, v] = middle(),
      dx = (u - x) / wide,
      dy = (v - y) / wide,
      two = fingers.size > 1;
    if (two) zoom(view.pose, before / distance(), view.home);
    if (two || event.shiftKey || event.buttons & 2) pan(view.pose, view.basis(), dx, dy);
    else turn(view.pose, dx, dy);
    view.move();
  });
  const release = (event) => {
    if (fingers.delete(event.pointerId) && !fingers.size) view.grab(false);
  };
  for (const name of ["pointerup", "pointercancel", "lostpointercapture"]) on(name, release);
  on("contextmenu", (event) => event.preventDefault());
  on("wheel", (event) => {
    event.preventDefault();
    zoom(view.pose, Math.exp(clamp(event.deltaY, -200, 200) / 600), view.home);
    view.move();
  });
  on("dblclick", () => view.reset());
  on("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const keys = { ArrowLeft: [-0.03, 0], ArrowRight: [0.03, 0], ArrowUp: [0, -0.03], ArrowDown: [0, 0.03] };
    const ways = {
      w: [0.04, 0, 0],
      s: [-0.04, 0, 0],
      d: [0, 0.04, 0],
      a: [0, -0.04, 0],
      e: [0, 0, 0.04],
      q: [0, 0, -0.04],
    };
    const way = ways[event.key.toLowerCase()];
    if (keys[event.key]) turn(view.pose, ...keys[event.key]);
    else if (way) walk(view.pose, view.basis(), ...way);
    else if ("+-=".includes(event.key)) zoom(view.pose, event.key === "-" ? 1.08 : 1 / 1.08, view.home);
    else if (view.clock && event.key === " ") view.clock.play();
    else if (view.clock && ",.".includes(event.key)) view.clock.advance(event.key === "." ? 1 : -1);
    else return;
    event.preventDefault();
    event.stopPropagation();
    view.move();
  });
}

// ---- requests: `pending` is the newest one that was not sent; nothing is sent while a small picture is under way

const FULL_AFTER_MS = 180;
class Requests {
  constructor(model, view) {
    this.model = model;
    this.view = view;
    this.id = Math.random().toString(36).slice(2);
    this.number = 0;
    this.pending = null;
    this.active = null;
    this.timer = 0;
    this.times = [];
    this.frames = 0;
    this.dropped = 0;
  }
  requestSmall() {
    clearTimeout(this.timer);
    this.request(false);
    this.timer = setTimeout(() => this.request(true), FULL_AFTER_MS);
  }
  cancelFull() {
    clearTimeout(this.timer);
  }
  requestFullSoon() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.request(true), FULL_AFTER_MS);
  }
  request(full) {
    if (this.pending && !this.pending.full) this.dropped += 1;
    this.pending = {
      kind: "render",
      view: this.id,
      full,
      pose: structuredClone(this.view.pose),
      settings: this.view.settings(),
    };
    this.sendNext();
  }
  sendNext() {
    if (!this.pending || (this.active && !this.active.full)) return;
    this.active = { ...this.pending, number: ++this.number };
    this.pending = null;
    this.model.send(this.active);
  }
  async receive(message, buffers) {
    if (message.view !== this.id) return;
    if (message.number !== this.number) return;
    this.active = null;
    this.sendNext();
    if (message.kind === "error") this.view.setStatus(message.reason, true);
    if (message.kind !== "frame") return;
    const bitmaps = await Promise.all(
      message.pictures.map((p, i) => createImageBitmap(new Blob([buffers[i]], { type: p.type }))),
    );
    if (!this.view.alive) return;
    if (!message.full) this.count();
    this.frames += 1;
    this.view.show(message, bitmaps);
    this.view.clock?.next();
  }
  count() {
    const now = performance.now();
    this.times = [...this.times.filter((t) => now - t < 2000), now];
  }
  perSecond() {
    const t = this.times.filter((time) => performance.now() - time < 2000);
    return t.length > 2 ? (1000 * (t.length - 1)) / (t[t.length - 1] - t[0]) : 0;
  }
  stop() {
    clearTimeout(this.timer);
    this.pending = null;
  }
}

// ---- elements

const make = (tag, more = {}, ...inner) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(more))
    if (name in node && name !== "list") node[name] = value;
    else node.setAttribute(name, value);
  node.append(...inner);
  return node;
};
const thousands = (n) => Math.round(n).toLocaleString("en").replaceAll(",", " ");
const brief = (x) => Number(x.toPrecision(3)).toString();

function slider(label, low, high, step, text, changed) {
  const input = make("input", { type: "range", min: low, max: high, step, "aria-label": label }),
    output = make("output");
  const update = () => {
    output.textContent = text(+input.value);
    input.setAttribute("aria-valuetext", output.textContent);
  };
  input.addEventListener("input", () => {
    update();
    changed(+input.value);
  });
  return {
    node: make("label", {}, make("span", { textContent: label }), input, output),
    set(value) {
      input.value = value;
      update();
    },
  };
}

function picture(name) {
  const canvas = make("canvas", {
    tabIndex: 0,
    "aria-label": `${name}: drag to orbit, wheel to zoom, shift-drag to pan, double-click to reset`,
  });
  canvas.setAttribute("role", "img");
  const text = make("span", { className: "timing" }),
    bar = make("div", { className: "bar", hidden: true });
  const figure = make(
    "figure",
    { className: `picture ${name}` },
    make("figcaption", {}, make("b", { textContent: name }), text),
    canvas,
    bar,
  );
  return {
    canvas,
    figure,
    draw(bitmap, about) {
      canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
      bitmap.close();
      canvas.dataset.drawn = String(1 + +(canvas.dataset.drawn ?? 0));
      text.textContent = about.milliseconds === null ? "" : `${about.milliseconds.toFixed(0)} ms`;
      bar.hidden = !about.bar;
      if (!about.bar) return;
      const strip = make("i");
      const colours = about.bar.colours.filter((c) => /^#[0-9a-f]{6}$/.test(c));
      strip.style.background = `linear-gradient(90deg, ${colours.join(",")})`;
      bar.replaceChildren(brief(about.bar.low), strip, `${brief(about.bar.high)} ${about.bar.unit}`);
    },
  };
}

// ---- the time slider: played in real time, one picture after the other; instants that come too fast are skipped

class Clock {
  constructor([first, last, step], get, set, ended) {
    Object.assign(this, { first, last, step, get, set, ended, began: null, timer: 0 });
    this.slider = slider("time", first, last, step, (t) => `${t.toFixed(2)} s`.replace(/^-(0\.00 )/, "$1"), (t) => {
      this.stop();
      set(t);
    });
    this.button = make("button", { type: "button", textContent: "play", "aria-label": "play" });
    this.button.addEventListener("click", () => this.play());
    this.node = make("div", { className: "clock" }, this.button, this.slider.node);
  }
  show() {
    this.slider.set(this.get());
  }
  rounded(t) {
    return clamp(this.first + this.step * Math.round((t - this.first) / this.step), this.first, this.last);
  }
  advance(count) {
    this.stop();
    this.set(+this.rounded(this.get() + count * this.step).toFixed(6));
  }
  play() {
    if (this.began !== null) return this.stop();
    const from = this.get() >= this.last - this.step / 2 ? this.first : this.get();
    this.began = performance.now() - 1000 * (from - this.first);
    this.button.textContent = "pause";
    this.set(from);
    this.next();
  }
  // Called after each picture: the instant that real time has reached, once it differs from the one shown.
  next() {
    clearTimeout(this.timer);
    if (this.began === null) return;
    const length = this.last - this.first + this.step;
    const t = this.rounded(this.first + (((performance.now() - this.began) / 1000) % length));
    if (Math.abs(t - this.get()) > this.step / 2) this.set(+t.toFixed(6));
    else this.timer = setTimeout(() => this.next(), 1000 * Math.min(this.step / 4, 0.1));
  }
  stop() {
    clearTimeout(this.timer);
    if (this.began !== null) this.ended();
    this.began = null;
    this.button.textContent = "play";
  }
  playing() {
    return this.began !== null;
  }
}

// ---- the widget

function render({ model, el }) {
  const stopper = new AbortController(),
    pictures = Object.fromEntries(
      [...model.get("models"), "difference"].map((name) => [name, picture(name)]),
    );
  const status = make("p", { className: "status" }),
    row = make("div", { className: "pictures" }, ...Object.values(pictures).map((p) => p.figure));
  const view = {
    alive: true,
    home: structuredClone(model.get("home")),
    pose: structuredClone(model.get("home")),
    basis: () => model.get("basis"),
  };
  const requests = new Requests(model, view),
    now = { dragging: false };
  const set = (name, value) => {
    model.set(name, value);
    model.save_changes();
  };
  const ratio = () => model.get("size")[1] / model.get("size")[0];
  view.settings = () =>
    Object.fromEntries(
      ["channel", "stop", "drag_width", "difference", "time_s"].map((name) => [name, model.get(name)]),
    );
  view.move = () => {
    if (now.dragging || view.clock?.playing()) {
      requests.cancelFull();
      requests.request(false);
    } else requests.requestSmall();
  };
  view.grab = (on) => {
    now.dragging = on;
    root.classList.toggle("dragging", on);
    if (on) requests.cancelFull();
    else requests.requestFullSoon();
  };
  view.reset = () => {
    view.pose = structuredClone((view.home = structuredClone(model.get("home"))));
    sync();
    requests.requestSmall();
  };
  view.setStatus = (text, bad = false) => {
    status.textContent = text;
    status.classList.toggle("bad", bad);
  };

  const channel = make(
    "select",
    { "aria-label": "channel" },
    ...model.get("channels").map((name) => make("option", { value: name, textContent: name })),
  );
  channel.addEventListener("change", () => set("channel", channel.value));
  const difference = make("input", { type: "checkbox", "aria-label": "show the difference" });
  difference.addEventListener("change", () => set("difference", difference.checked));
  const widest = Math.min(400, model.get("size")[0]),
    describeWidth = (w) => `${thousands(w * Math.round(w * ratio()))}  (${w} wide)`;
  const rays = slider("rays while dragging", Math.min(48, widest), widest, 1, describeWidth, (w) =>
    set("drag_width", w),
  );
  const stop = slider(
    "early termination",
    -4,
    -0.3,
    0.1,
    (e) => `below ${brief(100 * 10 ** e)} % light`,
    (e) => set("stop", +(10 ** e).toPrecision(3)),
  );
  const angle = slider(
    "field of view",
    10,
    100,
    1,
    (d) => `${d} degrees`,
    (d) => {
      view.pose.field_of_view_deg = d;
      requests.requestSmall();
    },
  );
  const home = make("button", { type: "button", textContent: "reset view" });
  home.addEventListener("click", () => view.reset());
  const controls = make(
    "div",
    { className: "controls" },
    make("label", {}, make("span", { textContent: "channel" }), channel),
    make("label", { className: "check" }, difference, "show the difference"),
    rays.node,
    stop.node,
    angle.node,
    home,
  );
  if (model.get("times").length)
    view.clock = new Clock(
      model.get("times"),
      () => model.get("time_s"),
      (t) => set("time_s", t),
      () => requests.requestFullSoon(),
    );
  const hint = make("p", {
    className: "hint",
    textContent:
      "drag or arrow keys: orbit · wheel, + or -: zoom · shift-drag: pan · two fingers: both · w s a d q e: move · " +
      "double-click: reset" +
      (view.clock ? " · space: play · , .: step in time" : ""),
  });
  const root = make("section", {
    className: "kilonb-orbit",
    "aria-label": model.get("title") || `orbit ${model.get("models").join(" and ")}`,
  });
  root.append(
    ...(model.get("title") ? [make("h3", { textContent: model.get("title") })] : []),
    row,
    ...(view.clock ? [view.clock.node] : []),
    status,
    controls,
    hint,
  );
  root.addEventListener("keydown", (event) => {
    if (!event.ctrlKey && !event.metaKey) event.stopPropagation();
  }); // JupyterLab would take the arrow keys
  root.dataset.frames = root.dataset.full = root.dataset.dropped = "0";
  el.append(root);

  function sync() {
    channel.value = model.get("channel");
    difference.checked = model.get("difference");
    pictures.difference.figure.hidden = !model.get("difference");
    rays.set(model.get("drag_width"));
    stop.set(Math.log10(model.get("stop")));
    angle.set(view.pose.field_of_view_deg);
    view.clock?.show();
    for (const { canvas } of Object.values(pictures)) {
      if (canvas.width !== model.get("size")[0] || canvas.height !== model.get("size")[1])
        [canvas.width, canvas.height] = model.get("size");
    }
  }
  view.show = (message, bitmaps) => {
    message.pictures.forEach((about, i) => pictures[about.name]?.draw(bitmaps[i], about));
    const { width, height, samples_per_ray: samples, full } = message,
      speed = requests.perSecond();
    const text = [
      full ? "full picture" : "dragging",
      `${width} × ${height}, ${thousands(width * height)} rays`,
    ];
    if (samples !== null) text.push(`${samples.toFixed(1)} samples per ray`);
    text.push(
      ...(view.clock ? [`${model.get("time_s").toFixed(2)} s`] : []),
      `${message.milliseconds.toFixed(0)} ms in all`,
      ...(full || !speed ? [] : [`${speed.toFixed(1)} pictures/s`]),
    );
    view.setStatus(text.join("  ·  "));
    Object.assign(root.dataset, {
      frames: requests.frames,
      full: +root.dataset.full + full,
      dropped: requests.dropped,
      width,
    });
    if (speed) root.dataset.perSecond = speed.toFixed(2);
  };
  const changed = () => {
    sync();
    view.move();
    root.dataset.time = model.get("time_s");
  };
  const listeners = {
    "msg:custom": (message, buffers) => requests.receive(message, buffers ?? []),
    "change:home": () => view.reset(),
    ...Object.fromEntries(
      ["channel", "stop", "drag_width", "difference", "time_s"].map((name) => [`change:${name}`, changed]),
    ),
  };
  for (const [event, f] of Object.entries(listeners)) model.on(event, f);
  for (const { canvas } of Object.values(pictures)) gestures(canvas, view, stopper.signal);
  sync();
  view.setStatus("waiting for the kernel");
  requests.requestSmall();
  return () => {
    view.alive = false;
    stopper.abort();
    view.clock?.stop();
    requests.stop();
    for (const [event, f] of Object.entries(listeners)) model.off(event, f);
  };
}
export default { render };
