"use strict";
// Point clouds in one 3-d plot: a switch for the set of poses, another for the colours.
const data = JSON.parse(document.getElementById("data").textContent);
const plot = document.getElementById("plot");
const poses = document.getElementById("poses"),
  colours = document.getElementById("colours");
const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer;
const clouds = data.clouds.map((cloud) => ({
  ...cloud,
  points: new Int16Array(bytes(cloud.points)),
  rgb: new Uint8Array(bytes(cloud.colours)),
}));
for (const name of Object.keys(data.poses)) poses.add(new Option(name + " poses", name));

// Centimetres in a cloud's OpenCV frame to metres in the plot's axes: ahead, left, up.
const transformed = (cloud, pose) => {
  const n = cloud.points.length / 3,
    x = new Float32Array(n),
    y = new Float32Array(n),
    z = new Float32Array(n);
  for (let i = 0; i < n; i++) {
    const p = [cloud.points[3 * i] / 100, cloud.points[3 * i + 1] / 100, cloud.points[3 * i + 2] / 100];
    const q = pose.slice(0, 3).map((row) => row[0] * p[0] + row[1] * p[1] + row[2] * p[2] + row[3]);
    x[i] = q[2];
    y[i] = -q[0];
    z[i] = -q[1];
  }
  return { x, y, z };
};
const pointColours = (cloud, k) =>
  colours.value === "cloud"
    ? data.palette[k % data.palette.length]
    : Array.from(
        { length: cloud.rgb.length / 3 },
        (_, i) => `rgb(${cloud.rgb[3 * i]},${cloud.rgb[3 * i + 1]},${cloud.rgb[3 * i + 2]})`,
      );
const traces = () => {
  const chosen = data.poses[poses.value];
  const points = clouds.map((cloud, k) => ({
    type: "scatter3d",
    mode: "markers",
    name: cloud.name,
    ...transformed(cloud, chosen[k]),
    marker: { size: 1.6, color: pointColours(cloud, k), line: { width: 0 } },
    hovertemplate: "%{x:.2f}, %{y:.2f}, %{z:.2f} m<extra></extra>",
  }));
  const origin = (row) => chosen.map((pose) => (row === 0 ? pose[2][3] : -pose[row - 1][3]));
  return [
    ...points,
    {
      type: "scatter3d",
      mode: "markers+text",
      name: data.origins,
      x: origin(0),
      y: origin(1),
      z: origin(2),
      text: clouds.map((cloud) => cloud.name),
      marker: { size: 5, symbol: "diamond", color: "#c0262d" },
      hoverinfo: "text",
    },
  ];
};
const narrow = document.body.clientWidth < 640; // the legend above the points instead of beside them
const layout = {
  height: Math.max(480, innerHeight - 160),
  margin: { l: 0, r: 0, t: 0, b: 0 },
  uirevision: "kept",
  scene: {
    aspectmode: "data",
    xaxis: { title: { text: "ahead, m" } },
    yaxis: { title: { text: "left, m" } },
    zaxis: { title: { text: "up, m" } },
    camera: { eye: { x: -0.6, y: 0, z: 0.6 } },
  },
  legend: { itemsizing: "constant", ...(narrow ? { orientation: "h", x: 0, y: 1, yanchor: "bottom" } : {}) },
};
// Without the button that would upload the points.
const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["sendChartToCloud"] };
const draw = () =>
  Plotly.react(plot, traces(), layout, config).then(() => {
    document.body.dataset.poses = poses.value;
    document.body.dataset.colours = colours.value;
    document.body.dataset.drawn = "yes";
  });
poses.addEventListener("change", draw);
colours.addEventListener("change", draw);
draw();
