"use strict";
// The page of imaging.moving_clouds: points moved to the time of a slider by the vertex shader, and a free camera.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const canvas = $("canvas"),
  status = $("status");
const clamp = (x, low, high) => Math.min(high, Math.max(low, x));
const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer;
const restored = (part) =>
  Float32Array.from(new Uint16Array(bytes(part.data)), (n) => part.low + part.step * n);

// ---- WebGL

const VERTEX = `
attribute vec3 point, v0, v1, v2, colour;
attribute float time, radius;
uniform mat4 view;
uniform vec4 lens;                   // focal length / half width, the same for the height, near, far
uniform float now, span, size, pixels, top, low, high;
uniform int channel;
varying vec3 shade;

vec3 hue(float h) { return clamp(abs(fract(h + vec3(0.0, 2.0 / 3.0, 1.0 / 3.0)) * 6.0 - 3.0) - 1.0, 0.0, 1.0); }
vec3 ramp(float x) {
  x = clamp(x, 0.0, 1.0);
  vec3 a = vec3(0.27, 0.0, 0.33), b = vec3(0.13, 0.57, 0.55), c = vec3(0.99, 0.91, 0.14);
  return x < 0.5 ? mix(a, b, 2.0 * x) : mix(b, c, 2.0 * x - 1.0);
}
void main() {
  float d1 = now - time, d2 = (now * now - time * time) / 2.0, d3 = (now * now * now - time * time * time) / 3.0;
  vec3 p = point + v0 * d1 + v1 * d2 + v2 * d3;
  vec3 v = v0 + v1 * now + v2 * now * now;
  vec4 c = view * vec4(p, 1.0);      // x right, y up, z towards the viewer
  float z = -c.z;
  if (z < lens.z || abs(d1) > span) { gl_Position = vec4(2.0, 2.0, 2.0, 1.0); gl_PointSize = 0.0; return; }
  float deep = (z * (lens.w + lens.z) - 2.0 * lens.w * lens.z) / (lens.w - lens.z);
  gl_Position = vec4(lens.x * c.x, lens.y * c.y, deep, z);
  gl_PointSize = clamp(2.0 * size * radius * lens.x * pixels / z, 1.5, 40.0);
  if (channel == 0) shade = colour;
  else if (channel == 1) {
    float s = clamp(length(v.xy) / top, 0.0, 1.0);
    shade = mix(vec3(0.62), 0.95 * hue(atan(v.y, v.x) / 6.2831853), s);
  } else if (channel == 2) shade = ramp(abs(d1) / max(high - low, 0.001));
  else shade = ramp((p.z + 1.0) / 6.0);
}`;
const FRAGMENT = `
precision mediump float;
varying vec3 shade;
void main() {
  vec2 d = gl_PointCoord - 0.5;
  if (dot(d, d) > 0.25) discard;
  gl_FragColor = vec4(shade, 1.0);
}`;

function compile(gl) {
  const program = gl.createProgram();
  for (const [kind, source] of [
    [gl.VERTEX_SHADER, VERTEX],
    [gl.FRAGMENT_SHADER, FRAGMENT],
  ]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, source);
    gl.compileShader(shader);
    if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS)) throw new Error(gl.getShaderInfoLog(shader));
    gl.attachShader(program, shader);
  }
  gl.linkProgram(program);
  if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(program));
  gl.useProgram(program);
  return program;
}

function upload(gl, program) {
  const attributes = { point: [restored(data.points), 3], time: [restored(data.times), 1] };
  attributes.radius = [restored(data.radii), 1];
  attributes.colour = [new Uint8Array(bytes(data.colours)), 3];
  data.velocities.forEach((part, j) => (attributes[`v${j}`] = [restored(part), 3]));
  for (const [name, [array, width]] of Object.entries(attributes)) {
    const place = gl.getAttribLocation(program, name);
    if (place < 0) continue;
    gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
    gl.bufferData(gl.ARRAY_BUFFER, array, gl.STATIC_DRAW);
    gl.enableVertexAttribArray(place);
    const whole = array instanceof Uint8Array;
    gl.vertexAttribPointer(place, width, whole ? gl.UNSIGNED_BYTE : gl.FLOAT, whole, 0, 0);
  }
  gl.enable(gl.DEPTH_TEST);
}

// ---- the camera: an orbit around a target

const [first, last, step] = data.span;
const state = { pose: null, home: null, now: first, playing: null, frames: 0, asked: false };
const chosen = () => structuredClone(data.views[$("view").value]);
function directions(pose) {
  const [front, side, up] = pose.basis,
    [a, e] = [pose.azimuth, pose.elevation];
  const out = front.map((x, i) => Math.cos(a) * x + Math.sin(a) * side[i]);
  const right = side.map((x, i) => Math.cos(a) * x - Math.sin(a) * front[i]);
  const back = out.map((x, i) => Math.cos(e) * x + Math.sin(e) * up[i]);
  const above = up.map((x, i) => Math.cos(e) * x - Math.sin(e) * out[i]);
  return { out, right, back, above, up };
}
const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
function viewMatrix(pose) {
  const { right, back, above } = directions(pose);
  const eye = pose.target.map((x, i) => x + pose.radius * back[i]);
  const rows = [right, above, back];
  return [0, 1, 2]
    .flatMap((column) => [...rows.map((row) => row[column]), 0])
    .concat([...rows.map((row) => -dot(row, eye)), 1]);
}
const shift = (pose, direction, amount) =>
  (pose.target = pose.target.map((x, i) => x + amount * direction[i]));

// ---- drawing

let gl = null,
  program = null;
const uniform = (name) => gl.getUniformLocation(program, name);
function draw() {
  state.asked = false;
  const ratio = Math.min(2, devicePixelRatio || 1),
    wide = Math.max(1, Math.round(canvas.clientWidth * ratio)),
    high = Math.max(1, Math.round(canvas.clientHeight * ratio));
  if (canvas.width !== wide || canvas.height !== high) [canvas.width, canvas.height] = [wide, high];
  gl.viewport(0, 0, wide, high);
  gl.clearColor(0.93, 0.94, 0.95, 1);
  gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
  const focal = 1 / Math.tan(state.pose.angle / 2);
  gl.uniformMatrix4fv(uniform("view"), false, viewMatrix(state.pose));
  gl.uniform4f(uniform("lens"), focal, (focal * wide) / high, 0.1, 2000);
  const values = { now: state.now, span: +$("window").value, size: +$("size").value, pixels: wide / 2 };
  Object.assign(values, { top: data.top, low: first, high: last });
  for (const [name, value] of Object.entries(values)) gl.uniform1f(uniform(name), value);
  gl.uniform1i(uniform("channel"), +$("channel").value);
  gl.drawArrays(gl.POINTS, 0, data.count);
  state.frames += 1;
  Object.assign(document.body.dataset, { frames: state.frames, time: state.now.toFixed(3) });
}
function redraw() {
  if (state.asked) return;
  state.asked = true;
  requestAnimationFrame(draw);
}

// ---- time

function setTime(t) {
  state.now = clamp(t, first, last);
  $("time").value = state.now;
  $("now").textContent = `${state.now.toFixed(2)} s`;
  redraw();
}
function stop() {
  state.playing = null;
  $("play").textContent = "play";
}
function play() {
  if (state.playing !== null) return stop();
  state.playing = performance.now() - 1000 * (state.now >= last ? 0 : state.now - first);
  $("play").textContent = "pause";
  const tick = () => {
    if (state.playing === null) return;
    const t = first + (((performance.now() - state.playing) / 1000) % (last - first + step));
    setTime(t);
    requestAnimationFrame(tick);
  };
  tick();
}
function reset() {
  state.home = chosen();
  state.pose = chosen();
  redraw();
}

// ---- gestures

function turn(dx, dy) {
  state.pose.azimuth -= Math.PI * dx;
  state.pose.elevation = clamp(state.pose.elevation + Math.PI * dy, -1.55, 1.55);
}
function zoom(factor) {
  state.pose.radius = clamp(state.pose.radius * factor, state.home.radius / 50, state.home.radius * 20);
}
function pan(dx, dy) {
  const { right, above } = directions(state.pose),
    wide = 2 * state.pose.radius * Math.tan(state.pose.angle / 2);
  shift(state.pose, right, -dx * wide);
  shift(state.pose, above, dy * wide);
}
function connect() {
  let last_ = null;
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    last_ = [event.clientX, event.clientY];
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!last_) return;
    const dx = (event.clientX - last_[0]) / canvas.clientWidth,
      dy = (event.clientY - last_[1]) / canvas.clientWidth;
    last_ = [event.clientX, event.clientY];
    if (event.shiftKey || event.buttons & 2) pan(dx, dy);
    else turn(dx, dy);
    redraw();
  });
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => (last_ = null));
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  canvas.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      zoom(Math.exp(clamp(event.deltaY, -200, 200) / 600));
      redraw();
    },
    { passive: false },
  );
  canvas.addEventListener("dblclick", reset);
  canvas.addEventListener("keydown", press);
}
function press(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const { out, right, up } = directions(state.pose),
    far = 0.04 * state.pose.radius,
    key = event.key.toLowerCase();
  const ways = { w: [out, -far], s: [out, far], d: [right, far], a: [right, -far], e: [up, far], q: [up, -far] };
  const turns = { arrowleft: [-0.03, 0], arrowright: [0.03, 0], arrowup: [0, -0.03], arrowdown: [0, 0.03] };
  if (ways[key]) shift(state.pose, ...ways[key]);
  else if (turns[key]) turn(...turns[key]);
  else if ("+-=".includes(key)) zoom(key === "-" ? 1.08 : 1 / 1.08);
  else if (key === " ") play();
  else if (",.".includes(key)) {
    stop();
    setTime(first + step * (Math.round((state.now - first) / step) + (key === "." ? 1 : -1)));
  } else return;
  event.preventDefault();
  redraw();
}

// ---- the controls

function begin() {
  gl = canvas.getContext("webgl", { antialias: true, preserveDrawingBuffer: true });
  if (!gl) {
    status.textContent = "This page needs WebGL, which this browser does not offer: enable it or use another browser.";
    return;
  }
  program = compile(gl);
  upload(gl, program);
  for (const name of Object.keys(data.views)) $("view").add(new Option(name, name));
  Object.assign($("time"), { min: first, max: last, step: step / 10 });
  Object.assign($("window"), { min: step / 2, max: 2 * (last - first), step: step / 2 });
  $("window").value = 2 * (last - first);
  const within = () => ($("within").textContent = `${(+$("window").value).toFixed(2)} s`);
  within();
  $("time").addEventListener("input", () => {
    stop();
    setTime(+$("time").value);
  });
  $("window").addEventListener("input", () => {
    within();
    redraw();
  });
  for (const id of ["size", "channel"]) $(id).addEventListener("input", redraw);
  $("view").addEventListener("change", reset);
  $("play").addEventListener("click", play);
  connect();
  window.addEventListener("resize", redraw);
  reset();
  setTime(first);
}
begin();
