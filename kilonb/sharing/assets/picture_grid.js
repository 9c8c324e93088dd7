// Pictures along axes (azimuth, elevation, time, a choice): one or more grids on a page, from sharing.picture_grids.
// Each picture is in the page itself or comes from `address` + its number. All text is set as text, never as HTML.
(() => {
  const KEPT = 96; // decoded pictures that are kept
  const make = (tag, more = {}, ...inner) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(more))
      if (name in node) node[name] = value;
      else node.setAttribute(name, value);
    node.append(...inner);
    return node;
  };
  const clamp = (x, low, high) => Math.min(high, Math.max(low, x));

  class Grid {
    constructor(data, root) {
      Object.assign(this, data, { root, kept: new Map(), busy: false, timer: 0, drawn: 0 });
      this.at = this.axes.map((axis) => axis.start);
      this.exact = [...this.at]; // fractions of a step during a drag
      this.turning = this.axes.findIndex((axis) => axis.kind === "turn");
      this.tilting = this.axes.findIndex((axis) => axis.kind === "tilt");
      this.playing = this.axes.findIndex((axis) => axis.kind === "time");
      this.build();
      this.update();
    }

    // ---- where we are

    number() {
      return this.at.reduce((number, k, i) => number * this.axes[i].labels.length + k, 0);
    }
    set(i, exact) {
      const count = this.axes[i].labels.length;
      const wraps = this.axes[i].kind === "turn";
      this.exact[i] = wraps ? ((exact % count) + count) % count : clamp(exact, 0, count - 1);
      this.at[i] = Math.round(this.exact[i]) % count;
    }
    step(i, count) {
      if (i < 0) return;
      this.set(i, this.at[i] + count);
      this.update();
    }
    reset() {
      this.axes.forEach((axis, i) => this.set(i, axis.start));
      this.update();
    }

    // ---- pictures: one request at a time, the newest position next

    load(number) {
      let found = this.kept.get(number);
      if (!found) {
        const image = new Image();
        image.src = this.pictures ? `data:${this.mime};base64,${this.pictures[number]}` : `${this.address}${number}`;
        found = image.decode().then(() => image);
        this.kept.set(number, found);
        found.catch(() => this.kept.delete(number));
        if (this.kept.size > KEPT) this.kept.delete(this.kept.keys().next().value);
      }
      return found;
    }
    async update() {
      this.describe();
      if (this.busy) return;
      this.busy = true;
      let shown = -1;
      while (shown !== this.number()) {
        shown = this.number();
        const first = shown * this.panels.length;
        const images = await Promise.allSettled(this.panels.map((_, k) => this.load(first + k)));
        images.forEach(({ status, value }, k) => {
          const canvas = this.canvases[k];
          const context = canvas.getContext("2d");
          context.clearRect(0, 0, canvas.width, canvas.height);
          if (status === "fulfilled") context.drawImage(value, 0, 0, canvas.width, canvas.height);
          else context.fillText("no picture", 12, 24);
        });
        this.root.dataset.shown = shown;
        this.root.dataset.drawn = this.drawn += 1;
      }
      this.busy = false;
    }
    describe() {
      const parts = this.axes.map((axis, i) => `${axis.name} ${axis.labels[this.at[i]]}`);
      this.status.textContent = parts.join(" · ");
      this.canvases.forEach((canvas, k) =>
        canvas.setAttribute("aria-label", `${this.panels[k]}: ${parts.join(", ")}; ${this.how}`),
      );
      this.inputs.forEach((input, i) => {
        input.value = this.at[i];
        if (input.type === "range") input.setAttribute("aria-valuetext", this.axes[i].labels[this.at[i]]);
      });
    }

    // ---- elements

    build() {
      const turns = this.turning >= 0;
      this.how = turns ? "drag or arrow keys to turn" : "arrow keys to step";
      this.canvases = this.panels.map(() =>
        make("canvas", { width: this.size[0], height: this.size[1], tabIndex: 0, role: "img" }),
      );
      this.cue = make("span", { className: "cue", textContent: "↔ drag to turn", hidden: !turns });
      const figures = this.canvases.map((canvas, k) =>
        make("figure", {}, make("figcaption", { textContent: this.panels[k] }), canvas, ...(k ? [] : [this.cue])),
      );
      this.status = make("p", { className: "status" });
      const hint = turns
        ? "drag the picture, or use the arrow keys or the sliders, to turn · double-click or Home: back to the start"
        : "arrow keys or the controls: another picture · Home: back to the start";
      this.inputs = this.axes.map((axis, i) => this.control(axis, i));
      const labels = this.inputs.map((input, i) =>
        make("label", {}, make("span", { textContent: this.axes[i].name }), input),
      );
      const play = make("button", { type: "button", textContent: "play" });
      play.addEventListener("click", () => this.play());
      this.button = play;
      this.root.append(
        ...(this.name ? [make("h2", { textContent: this.name })] : []),
        make("div", { className: "pictures" }, ...figures),
        this.status,
        make("div", { className: "controls" }, ...(this.playing >= 0 ? [play] : []), ...labels),
        make("p", { className: "hint", textContent: hint + (this.playing >= 0 ? " · space: play" : "") }),
      );
      this.root.classList.toggle("turns", turns);
      for (const canvas of this.canvases) this.listen(canvas);
    }
    control(axis, i) {
      const more = { "aria-label": axis.name, autocomplete: "off" };
      const input =
        axis.kind === "choice"
          ? make("select", more, ...axis.labels.map((text, k) => make("option", { value: k, textContent: text })))
          : make("input", { ...more, type: "range", min: 0, max: axis.labels.length - 1, step: 1 });
      input.addEventListener("input", () => {
        this.used();
        this.set(i, +input.value);
        this.update();
      });
      return input;
    }
    used() {
      this.cue.hidden = true;
      if (this.timer) this.play();
    }

    // ---- gestures and keys: a drag across the picture's width is half a turn

    listen(canvas) {
      let last = null;
      canvas.addEventListener("pointerdown", (event) => {
        if (this.turning < 0) return;
        this.cue.hidden = true;
        canvas.focus({ preventScroll: true });
        canvas.setPointerCapture(event.pointerId);
        last = [event.clientX, event.clientY];
      });
      canvas.addEventListener("pointermove", (event) => {
        if (!last) return;
        const share = [event.clientX - last[0], event.clientY - last[1]].map((d) => d / (canvas.clientWidth || 1));
        last = [event.clientX, event.clientY];
        this.set(this.turning, this.exact[this.turning] - (180 * share[0]) / this.axes[this.turning].step);
        if (this.tilting >= 0)
          this.set(this.tilting, this.exact[this.tilting] + (180 * share[1]) / this.axes[this.tilting].step);
        this.update();
      });
      for (const name of ["pointerup", "pointercancel", "lostpointercapture"])
        canvas.addEventListener(name, () => {
          last = null;
        });
      canvas.addEventListener("dblclick", () => this.reset());
      canvas.addEventListener("keydown", (event) => this.key(event));
    }
    key(event) {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const across = this.turning >= 0 ? this.turning : 0;
      const along = this.tilting >= 0 ? this.tilting : this.axes.length > 1 && this.turning < 0 ? 1 : -1;
      const keys = { ArrowLeft: [across, -1], ArrowRight: [across, 1], ArrowUp: [along, -1], ArrowDown: [along, 1] };
      if (keys[event.key]) {
        this.cue.hidden = true;
        this.step(...keys[event.key]);
      } else if (event.key === "Home") this.reset();
      else if (event.key === " " && this.playing >= 0) this.play();
      else return;
      event.preventDefault();
    }
    play() {
      clearInterval(this.timer);
      this.timer = this.timer ? 0 : setInterval(() => this.next(), this.axes[this.playing].pause_ms);
      this.button.textContent = this.timer ? "pause" : "play";
    }
    next() {
      if (!this.busy) this.step(this.playing, this.at[this.playing] + 1 < this.axes[this.playing].labels.length
        ? 1 : -this.at[this.playing]);
    }
  }

  const data = JSON.parse(document.getElementById("grids-data").textContent);
  const home = document.getElementById("grids");
  for (const grid of data) {
    const root = make("section", { className: "grid", "aria-label": grid.name || grid.panels.join(" and ") });
    home.append(root);
    new Grid(grid, root);
  }
})();
