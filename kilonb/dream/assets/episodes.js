"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const get = id => document.getElementById(id);
  const [line, strips, slider] = [get("line"), get("strips"), get("frame")];
  const pictures = new Map();
  const LEFT = 92, CURVE = 60, ROW = 17, FOOT = 16;
  let episode = data.episodes[0], frame = 0, timer = 0;

  // The decoded picture of a data URI; draws again when it is there.
  const picture = uri => {
    if (!pictures.has(uri)) {
      const image = new Image();
      image.onload = draw;
      image.src = uri;
      pictures.set(uri, image);
    }
    const image = pictures.get(uri);
    return image.complete && image.naturalWidth ? image : null;
  };

  const start = () => {
    const frames = Object.keys(episode.strips).map(Number).filter(t => t <= frame);
    return frames.length ? Math.max(...frames) : null;
  };

  const drawFrame = () => {
    const image = picture(episode.blocks[Math.floor(frame / data.block)]);
    if (!image) return;
    get("image").getContext("2d").drawImage(image, 64 * (frame % data.block), 0, 64, 64, 0, 0, 64, 64);
    document.body.dataset.frame = frame;
  };

  const drawCurve = (context, scale, values, colour) => {
    context.strokeStyle = colour;
    context.beginPath();
    values.forEach((value, t) => context.lineTo(LEFT + (t + .5) * scale, CURVE - 4 - (CURVE - 8) * value));
    context.stroke();
  };

  const drawLine = () => {
    const marks = Object.entries(episode.marks), top = episode.probability ? CURVE : 2;
    const room = line.parentElement.clientWidth, below = window.matchMedia("(max-width: 640px)").matches;
    line.width = Math.max(300, below ? room : room - 290);
    line.height = top + ROW * marks.length + FOOT;
    const context = line.getContext("2d"), scale = (line.width - LEFT - 4) / episode.frames;
    context.font = "12px system-ui, sans-serif";
    context.textBaseline = "top";
    context.fillStyle = "#ffec9f";
    context.fillRect(LEFT + frame * scale, 0, Math.max(2, scale), line.height - FOOT);
    if (episode.probability) {
      context.fillStyle = "#5c6470";
      context.fillText("P(boundary)", 2, 4);
      drawCurve(context, scale, episode.prior, "#c8c8c8");
      drawCurve(context, scale, episode.probability, data.colours.fired);
      drawCurve(context, scale, episode.probability.map(() => episode.threshold), "#e6aaaa");
    }
    marks.forEach(([name, times], row) => {
      context.fillStyle = "#1d2129";
      context.fillText(name.replace("_", " "), 2, top + row * ROW + 1);
      context.fillStyle = data.colours[name] ?? "#000";
      for (const t of times) context.fillRect(LEFT + t * scale, top + row * ROW + 1, Math.max(1.5, scale - 1), ROW - 4);
    });
    context.fillStyle = "#5c6470";
    context.fillText("0", LEFT, line.height - FOOT + 2);
    context.textAlign = "right";
    context.fillText(episode.frames - 1, line.width - 4, line.height - FOOT + 2);
  };

  const drawStrips = () => {
    const from = start(), entries = from === null ? [] : episode.strips[from];
    const entry = entries.find(one => one.name === get("sequence").value) ?? entries[0];
    if (!entry) { get("from").textContent = "No strips for this frame."; strips.width = strips.height = 1; return; }
    const names = entry.actions.map(action => data.actions[action]).join(" ");
    const rows = entry.imagined ? [entry.imagined, entry.rules] : [entry.rules];
    get("from").textContent = `After frame ${from}, actions: ${names}. `
      + (entry.imagined ? "Above: imagined. Below: by the rules." : "By the rules.");
    const images = rows.map(picture);
    if (images.some(image => !image)) return;
    strips.width = images[0].naturalWidth;
    strips.height = 64 * rows.length + 4 * (rows.length - 1);
    images.forEach((image, row) => strips.getContext("2d").drawImage(image, 0, 68 * row));
    document.body.dataset.strip = `${from} ${entry.name}`;
  };

  function draw() {
    slider.value = frame;
    get("number").textContent = `${frame}`;
    const events = Object.entries(episode.marks).filter(([, times]) => times.includes(frame)).map(([name]) => name);
    const boundary = episode.probability ? `, boundary probability ${episode.probability[frame]}` : "";
    get("note").textContent = `Action ${data.actions[episode.actions[frame]]}, reward ${episode.rewards[frame]}`
      + `${boundary}${events.length ? ": " : ""}${events.join(", ").replaceAll("_", " ")}`;
    drawFrame();
    drawLine();
    drawStrips();
  }

  const go = to => { frame = Math.min(Math.max(0, Math.round(to)), episode.frames - 1); draw(); };
  const stop = () => { clearInterval(timer); timer = 0; get("play").textContent = "play"; };
  const play = () => {
    if (timer) return stop();
    if (frame === episode.frames - 1) go(0);
    get("play").textContent = "pause";
    timer = setInterval(() => frame < episode.frames - 1 ? go(frame + 1) : stop(), 120);
  };
  const choose = index => {
    episode = data.episodes[index];
    slider.max = episode.frames - 1;
    const names = [...new Set(Object.values(episode.strips).flat().map(entry => entry.name))];
    get("sequence").replaceChildren(...names.map(name => new Option(name, name)));
    go(0);
  };

  get("episode").replaceChildren(...data.episodes.map((one, i) => new Option(one.name, i)));
  get("episode").onchange = () => { stop(); choose(+get("episode").value); };
  get("sequence").onchange = draw;
  get("play").onclick = play;
  slider.oninput = () => go(+slider.value);
  line.onclick = event => {
    const box = line.getBoundingClientRect(), x = (event.clientX - box.left) * line.width / box.width;
    go(Math.floor((x - LEFT) / (line.width - LEFT - 4) * episode.frames));
  };
  window.onresize = draw;
  document.addEventListener("keydown", event => {
    if (["SELECT", "BUTTON"].includes(event.target.tagName)) return;
    if (event.key === "." || event.key === ",") go(frame + (event.key === "." ? 1 : -1));
    else if (event.key === " ") { event.preventDefault(); play(); }
  });
  choose(0);
})();
