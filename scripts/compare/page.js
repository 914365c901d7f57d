"use strict";
// Curves by plotly, and grids, of what stands in #data. Text of runs only ever becomes text.

const { runs: RUNS, charts: CHARTS } = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const shown = RUNS.map(() => true);
const plain = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");  // to plotly
const style = (node, name) => getComputedStyle(node).getPropertyValue(name).trim();

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// Curves: a chart is {title, note, kind, higher, lines: {name: [{steps, values} by run]}} --------

function trace(chart, run, i, { steps, values }) {
  const keep = chart.kind === "score" ? 0 : +$("smooth").value;
  let mean = values[0];
  const y = values.map((value) => (mean = keep * mean + (1 - keep) * value));
  const best = chart.kind === "score" && (chart.higher ? Math.max : Math.min)(...y);
  const color = style(document.querySelectorAll(".run")[i], "--run");
  return {
    x: steps.map((step) => step * ($("axis").value === "images" ? run.batch : 1)), y,
    name: plain(run.name), mode: y.length < 40 ? "lines+markers" : "lines",
    line: { color, width: 1.8, dash: i < 8 ? "solid" : "dash" },
    marker: { size: y.map((v) => (v === best ? 10 : 5)),
      symbol: y.map((v) => (v === best ? "circle-open" : "circle")), line: { color, width: 1 } },
    hovertemplate: "%{y:.5g}",
  };
}

function draw(chart) {
  const lines = chart.lines[chart.select.value];
  const traces = RUNS.flatMap((run, i) =>
    (shown[i] && lines[i].steps.length ? [trace(chart, run, i, lines[i])] : []));
  const log = chart.kind === "loss" && $("log").checked && traces.every((t) => Math.min(...t.y) > 0);
  const soft = style(document.body, "--soft"), line = style(document.body, "--line");
  Plotly.react(chart.plot, traces, {
    height: 250, margin: { l: 48, r: 12, t: 8, b: 36 }, showlegend: false, hovermode: "x unified",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: soft, size: 11 },
    hoverlabel: { bgcolor: style(document.body, "--card"), bordercolor: line },
    xaxis: { rangemode: "tozero", showgrid: false, linecolor: line, zeroline: false,
      spikethickness: 1, spikecolor: soft },
    yaxis: { type: log ? "log" : "linear", gridcolor: line, zeroline: false, exponentformat: "e" },
  }, { responsive: true, displayModeBar: false });
}

function build(chart) {
  const names = Object.keys(chart.lines);
  chart.select = make("select", { "aria-label": "which" },
    ...names.map((name) => make("option", { value: name }, name)));
  chart.select.onchange = () => draw(chart);
  chart.select.hidden = names.length === 1 && chart.kind === "loss";
  chart.select.disabled = names.length === 1;
  chart.plot = make("div");
  $("charts").append(make("figure", {}, make("figcaption", {}, chart.title, chart.select,
    make("small", {}, chart.note)), chart.plot));
}

// Samples ----------------------------------------------------------------------------------------

const stepsOf = (run) => Object.keys(run.grids[$("kind").value] || {}).map(Number);

function showGrids(atEnd) {
  const slider = $("time"), kind = $("kind").value;
  const all = [...new Set(RUNS.flatMap((run, i) => (shown[i] ? stepsOf(run) : [])))];
  all.sort((a, b) => a - b);
  slider.max = Math.max(all.length - 1, 0);
  if (atEnd) slider.value = slider.max;
  const step = all[slider.value];
  $("when").textContent = all.length ? `step ${step.toLocaleString("en")}` : "";
  RUNS.forEach((run, i) => {
    const last = Math.max(...stepsOf(run).filter((s) => s <= step)), { figure, image, note } = grids[i];
    figure.hidden = !shown[i] || last < 0;
    if (figure.hidden) return;
    image.src = run.grids[kind][last];
    image.alt = `Samples of ${run.name} at step ${last}`;
    note.textContent = last === step ? "" : `last at step ${last.toLocaleString("en")}`;
  });
}

const grids = RUNS.map((run, i) => {
  const image = make("img"), note = make("small");
  const caption = make("figcaption", {}, make("span", {}, make("i"), run.name), note);
  const figure = make("figure", { class: `c${i % 8}` }, caption, image,
    ...run.notes.map((line) => make("p", { class: "note" }, line)));
  $("grids").append(figure);
  return { figure, image, note };
});

// What can be clicked ----------------------------------------------------------------------------

const kinds = [...new Set(RUNS.flatMap((run) => Object.keys(run.grids)))].sort();
$("kind").append(...kinds.map((kind) => make("option", { value: kind }, kind || "first setting")));
$("kinds").hidden = kinds.length < 2;
$("samples").hidden = !kinds.length;
$("kind").onchange = $("time").oninput = () => showGrids(false);
$("curves").hidden = !CHARTS.length;
if (RUNS.some((run) => !run.batch)) {  // images cannot be counted for all
  $("axis").value = "steps";
  $("axis").options[0].disabled = true;
}
const drawAll = () => CHARTS.forEach(draw);
$("axis").onchange = $("log").onchange = $("smooth").oninput = drawAll;
matchMedia("(prefers-color-scheme: dark)").onchange = drawAll;
document.querySelectorAll("#runs button").forEach((button, i) => button.onclick = () => {
  button.setAttribute("aria-pressed", shown[i] = !shown[i]);
  drawAll();
  showGrids(false);
});
for (const head of document.querySelectorAll(".sortable thead th")) {
  head.onclick = () => {
    const falling = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const { tBodies: [body], tHead } = head.closest("table");
    [...tHead.rows[0].cells].forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", falling < 0 ? "descending" : "ascending");
    const key = (row) => row.cells[head.cellIndex].querySelector("data")?.value
      ?? row.cells[head.cellIndex].textContent;
    const isText = (row) => Number.isNaN(Number(key(row)));
    body.append(...[...body.rows].sort((a, b) => isText(a) - isText(b) || falling * (isText(a)
      ? key(a).localeCompare(key(b), "en", { numeric: true }) : key(a) - key(b))));
  };
}
CHARTS.forEach(build);
drawAll();
showGrids(true);
