"use strict";
// Draws every figure of the report. The document element says how it went: data-figures (drawn), data-drawn-ms,
// data-faults.
const BASE = {
  font: { family: "system-ui, sans-serif", size: 12, color: "#222222" },
  paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
  legend: { orientation: "h", x: 0, y: 1, xanchor: "left", yanchor: "bottom" },
  margin: { l: 58, r: 12, t: 46, b: 46 },
  hoverlabel: { namelength: -1 },
};
const AXIS = { gridcolor: "#e6e6e6", zeroline: false, automargin: false, ticks: "outside", tickcolor: "#bbbbbb", ticklen: 4 };
const SCREEN = { facetWidth: 280, facetHeight: 250, gap: 0.2 };
const PAPER = { width: 680, height: 280, facetWidth: 220, facetHeight: 200, gap: 0.3 };

function layoutOf(figure, width, size) {
  const layout = { ...BASE, height: size.height, ...figure.layout, width: width, margin: { ...BASE.margin, ...figure.layout.margin } };
  for (const key of Object.keys(layout)) {
    if (/^[xy]axis\d*$/.test(key)) layout[key] = { ...AXIS, ...layout[key] };
  }
  const count = figure.facets.length;
  if (!count) return layout;
  let columns = Math.min(count, Math.max(1, Math.floor(width / size.facetWidth)));
  if (count === 4 && columns === 3) columns = 2;
  const rows = Math.ceil(count / columns);
  layout.grid = { rows: rows, columns: columns, pattern: "independent", xgap: size.gap, ygap: 0.34 };
  const top = figure.data.some((trace) => trace.showlegend !== false) ? 70 : 30;
  layout.height = rows * size.facetHeight + 10 + top;
  layout.margin = { ...layout.margin, t: top };
  layout.legend = { ...layout.legend, y: 1 + 30 / (layout.height - top - 46) };
  layout.annotations = figure.facets.map((text, index) => {
    const number = index ? String(index + 1) : "";
    return { text: "<b>" + text + "</b>", showarrow: false, xref: "x" + number + " domain", yref: "y" + number + " domain",
             x: 0, y: 1, xanchor: "left", yanchor: "bottom", yshift: 2 };
  });
  return layout;
}

const figures = JSON.parse(document.getElementById("figures").textContent);
const places = figures.map((_, index) => document.getElementById("figure-" + index));
const root = document.documentElement;
let faults = 0;
window.addEventListener("error", () => { root.dataset.faults = String(++faults); });

function draw(size) {
  return Promise.all(figures.map((figure, index) => Plotly.react(
    places[index], figure.data, layoutOf(figure, size.width || places[index].clientWidth, size),
    { displayModeBar: false, doubleClickDelay: 400 })));
}

root.dataset.faults = "0";
draw(SCREEN).then(() => {
  root.dataset.figures = String(places.filter((place) => place.querySelector(".trace, .heatmaplayer image")).length);
  root.dataset.drawnMs = String(Math.round(performance.now()));
}, (error) => { root.dataset.faults = String(++faults); console.error(error); });

let waiting = 0, drawnWidth = window.innerWidth;
window.addEventListener("resize", () => {
  if (window.innerWidth === drawnWidth) return;
  drawnWidth = window.innerWidth;
  clearTimeout(waiting);
  waiting = setTimeout(() => draw(SCREEN), 150);
});
// On paper nothing opens: the pairs that fell are all shown there.
let opened = [];
window.addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details.fallen:not([open])")];
  opened.forEach((part) => { part.open = true; });
  draw(PAPER);
});
window.addEventListener("afterprint", () => { opened.forEach((part) => { part.open = false; }); draw(SCREEN); });
