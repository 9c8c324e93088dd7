// The slider of a run's page: the position of its range input is the edge between two pictures.
"use strict";

for (const slider of document.querySelectorAll(".slider")) {
  const edge = slider.querySelector("input");
  // The thumb is 2.25rem wide and its centre is the edge: at 0 it stands half a thumb from the border.
  const showEdge = () => {
    const half = 1.125 * parseFloat(getComputedStyle(document.documentElement).fontSize);
    const width = edge.clientWidth;
    const at = half + (edge.value / 100) * Math.max(0, width - 2 * half);
    const share = edge.value === "0" ? 0 : edge.value === "100" ? 100 : (100 * at) / Math.max(1, width);
    slider.style.setProperty("--at", `${share}%`);
  };
  edge.addEventListener("input", showEdge);
  window.addEventListener("resize", showEdge);
  showEdge();
}
