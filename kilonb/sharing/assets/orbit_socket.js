/* global render, WebSocket */
// Gives assets/orbit.js of kilonb.imaging the `model` that it expects (anywidget's interface) over a web socket of
// kilonb.core.serving. Stands behind orbit.js in one function, which defines `render`.

// A message of the server: 4 bytes, the length of a JSON text; the text; the pictures, whose lengths it holds.
function unpack(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const { message, sizes } = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  let start = 4 + length;
  const pictures = sizes.map((size) => {
    start += size;
    return new Uint8Array(buffer, start - size, size);
  });
  return [message, pictures];
}

class SocketModel {
  constructor(state, address, notice) {
    Object.assign(this, { state, address, notice, handlers: {}, last: null, socket: null });
    this.connect();
  }
  get(name) {
    return this.state[name];
  }
  set(name, value) {
    if (this.state[name] === value) return;
    this.state[name] = value;
    this.emit(`change:${name}`);
  }
  save_changes() {}
  on(name, handler) {
    (this.handlers[name] ??= new Set()).add(handler);
  }
  off(name, handler) {
    this.handlers[name]?.delete(handler);
  }
  emit(name, ...values) {
    for (const handler of this.handlers[name] ?? []) handler(...values);
  }
  send(message) {
    this.last = message;
    if (this.socket?.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(message));
  }
  // Only the newest request is kept: it is sent when the connection is there again.
  connect() {
    this.socket = new WebSocket(this.address);
    this.socket.binaryType = "arraybuffer";
    this.socket.addEventListener("open", () => {
      this.notice("");
      if (this.last) this.send(this.last);
    });
    this.socket.addEventListener("message", (event) => this.emit("msg:custom", ...unpack(event.data)));
    this.socket.addEventListener("close", () => {
      this.notice("No connection: the server has ended, or is busy. Start `kilonb view` again, or wait.");
      setTimeout(() => this.connect(), 3000);
    });
  }
}

const orbitState = JSON.parse(document.getElementById("orbit-state").textContent);
const connection = document.getElementById("connection");
const orbitAddress = new URL("orbit", window.location.href.replace(/^http/, "ws")).href;
const orbitModel = new SocketModel(orbitState, orbitAddress, (text) => {
  connection.textContent = text;
  connection.hidden = !text;
});
render({ model: orbitModel, el: document.getElementById("orbit") });
