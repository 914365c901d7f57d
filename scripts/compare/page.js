"use strict";
// Curves and grids from the numbers in #data. Text of runs only ever becomes text nodes.

const RUNS = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const shown = RUNS.map(() => true);
const BEST = "best of each run";
const OF_ROWS = { "r=t": "rows with r = t", "r<t": "rows with r < t" };

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "circle", "line", "text", "clipPath", "rect"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const paint = (i) => `c${i % 8}${i >= 8 ? " dashed" : ""}`;
const round = (x) => Math.abs(x) >= 1e5 || (x && Math.abs(x) < 1e-3)
  ? x.toExponential(3) : String(+x.toPrecision(5));
const short = (x) => Math.abs(x) >= 1e9 ? `${+(x / 1e9).toPrecision(3)}G`
  : Math.abs(x) >= 1e6 ? `${+(x / 1e6).toPrecision(3)}M`
  : Math.abs(x) >= 1e4 ? `${+(x / 1e3).toPrecision(3)}k`
  : x && Math.abs(x) < 1e-3 ? x.toExponential(0) : String(+x.toPrecision(3));

// Which numbers ------------------------------------------------------------------------------

function allNames(of) {
  return [...new Set(RUNS.flatMap((run) => Object.keys(of(run))))];
}

function curve(run, name) {  // [[step, value], ...]
  const values = run.curves[name] || [];
  return run.steps.map((step, k) => [step, values[k]]).filter((p) => p[1] != null);
}

function score(run, name) {
  const found = run.scores[name];
  return found ? found.steps.map((step, k) => [step, found.values[k]]).filter((p) => p[1] != null)
    : [];
}

function bestScore(metric, higher) {  // of each run the setting (weights, steps, guidance) that got best
  const sign = higher ? -1 : 1;
  const low = (points) => Math.min(...points.map((p) => sign * p[1]));
  return (run) => Object.keys(run.scores).filter((name) => name.split("/")[0] === metric)
    .map((name) => score(run, name)).filter((points) => points.length)
    .sort((a, b) => low(a) - low(b))[0] || [];
}

function smoothed(points, keep) {
  let mean = null;
  return points.map(([x, y]) => [x, mean = mean == null ? y : keep * mean + (1 - keep) * y]);
}

function chartList() {
  const names = allNames((run) => run.curves);
  const losses = names.filter((name) => name.startsWith("raw_loss") && /\/r[=<]t$/.test(name));
  const charts = losses.map((name) => {
    const [loss, rows] = name.split("/");
    return { title: loss.replaceAll("_", " "), note: OF_ROWS[rows], names: [name], of: curve,
      loss: true };
  });
  const byMetric = new Map();
  for (const name of allNames((run) => run.scores)) {
    const metric = name.split("/")[0];
    byMetric.set(metric, [...(byMetric.get(metric) || []), name]);
  }
  for (const [metric, variants] of byMetric) {
    const higher = RUNS.some((run) => run.scores[variants[0]]?.higher);
    const count = (name) => RUNS.filter((run) => run.scores[name]).length;
    variants.sort((a, b) => count(b) - count(a));  // first what most runs have
    const best = bestScore(metric, higher);
    if (variants.length > 1) {  // the first is shown at the start
      variants.splice(count(variants[0]) === RUNS.length ? variants.length : 0, 0, BEST);
    }
    charts.push({ title: metric, note: higher ? "higher is better" : "lower is better",
      names: variants, of: (run, name) => (name === BEST ? best(run) : score(run, name)), higher,
      score: true });
  }
  const others = names.filter((name) => !losses.includes(name));
  if (others.length) {
    const first = ["v_loss", "loss"].find((name) => others.includes(name));
    others.sort((a, b) => (b === first) - (a === first) || (a < b ? -1 : 1));
    charts.push({ title: "", note: "any other number", names: others, of: curve });
  }
  return charts;
}

// Drawing ------------------------------------------------------------------------------------

function ticks(low, high, log, count) {
  if (log) {
    const all = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++) {
      for (const m of [1, 2, 5]) all.push(m * 10 ** e);
    }
    const inside = all.filter((x) => x >= low && x <= high);
    if (inside.length > 8) return inside.filter((x) => /^1(0*|e.*)$|^0?\.0*1$/.test(String(x)));
    if (inside.length > 2) return inside;
  }
  const rough = (high - low) / count, unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * [1, 2, 5, 10].find((m) => m * unit >= rough);
  const found = [];
  for (let x = Math.ceil(low / step) * step; x <= high + step * 1e-9; x += step) found.push(x);
  return found;
}

function series(chart) {  // of the runs that are shown
  const images = $("axis").value === "images", keep = +$("smooth").value;
  return RUNS.flatMap((run, i) => {
    if (!shown[i]) return [];
    let points = chart.of(run, chart.name);
    if (!chart.score) points = smoothed(points, keep);
    if (images) points = points.map(([x, y]) => [x * (run.batch || 1), y]);
    return points.length ? [{ i, points }] : [];
  });
}

function extent(values, log, share) {  // of all values, or of all but the highest
  const sorted = [...values].sort((a, b) => a - b);
  let low = sorted[0], high = sorted[Math.ceil(share * sorted.length) - 1];
  if (low === high) [low, high] = log ? [low / 1.5, high * 1.5] : [low - 0.5, high + 0.5];
  const rim = log ? (high / low) ** 0.06 : (high - low) * 0.06;
  return log ? [low / rim, high * rim] : [low >= 0 ? Math.max(0, low - rim) : low - rim, high + rim];
}

function draw(chart) {
  const all = series(chart), svg = chart.svg;
  svg.replaceChildren();
  chart.tip.hidden = true;
  chart.empty.hidden = all.length > 0;
  svg.style.display = all.length ? "" : "none";
  if (!all.length) return;
  const width = svg.clientWidth || 400, height = svg.clientHeight || 240;
  const box = { left: 46, right: width - 10, top: 12, bottom: height - 24 };
  const ys = all.flatMap((s) => s.points.map((p) => p[1]));
  const xs = all.flatMap((s) => s.points.map((p) => p[0]));
  const log = chart.loss && $("log").checked && Math.min(...ys) > 0;
  const [low, high] = extent(ys, log, chart.score ? 1 : 0.98);
  const last = Math.max(...xs) || 1;
  const f = log ? Math.log : (x) => x;
  const X = (x) => box.left + (box.right - box.left) * x / last;
  const Y = (y) => box.bottom - (box.bottom - box.top) * (f(y) - f(low)) / (f(high) - f(low));
  for (const y of ticks(low, high, log, 5)) {
    svg.append(make("line", { class: "gridline", x1: box.left, x2: box.right, y1: Y(y), y2: Y(y) }),
      make("text", { x: box.left - 6, y: Y(y) + 4, "text-anchor": "end" }, short(y)));
  }
  for (const x of ticks(0, last, false, width / 110)) {
    svg.append(make("text", { x: X(x), y: height - 6, "text-anchor": "middle" }, short(x)));
  }
  svg.append(make("clipPath", { id: chart.clip },
    make("rect", { x: box.left - 2, y: 0, width: box.right - box.left + 4, height: box.bottom + 2 })));
  for (const { i, points } of all) {
    const group = make("g", { class: paint(i) });
    const d = points.map(([x, y], k) => `${k ? "L" : "M"}${X(x).toFixed(1)} ${Y(y).toFixed(1)}`);
    group.append(make("path", { class: "curve", d: d.join(""), "clip-path": `url(#${chart.clip})` }));
    if (points.length < 40) {
      for (const [x, y] of points) {
        if (y <= high) group.append(make("circle", { class: "dot", cx: X(x), cy: Y(y), r: 2.6 }));
      }
    }
    if (chart.score) {
      const best = points.reduce((a, b) => ((chart.higher ? b[1] > a[1] : b[1] < a[1]) ? b : a));
      group.append(make("circle", { class: "best", cx: X(best[0]), cy: Y(best[1]), r: 4.5 }));
    }
    svg.append(group);
  }
  const cross = make("line", { class: "cross", y1: box.top, y2: box.bottom, visibility: "hidden" });
  svg.append(cross);
  svg.onpointermove = (event) => point(chart, all, event, X, cross);
  svg.onpointerleave = () => { chart.tip.hidden = true; cross.setAttribute("visibility", "hidden"); };
}

function point(chart, all, event, X, cross) {
  const x = event.clientX - chart.svg.getBoundingClientRect().left;
  const nearest = all.map(({ i, points }) =>
    ({ i, p: points.reduce((a, b) => (Math.abs(X(b[0]) - x) < Math.abs(X(a[0]) - x) ? b : a)) }));
  const at = nearest.reduce((a, b) => (Math.abs(X(b.p[0]) - x) < Math.abs(X(a.p[0]) - x) ? b : a));
  cross.setAttribute("visibility", "visible");
  for (const end of ["x1", "x2"]) cross.setAttribute(end, X(at.p[0]));
  nearest.sort((a, b) => b.p[1] - a.p[1]);
  const rows = nearest.map(({ i, p }) => make("div", { class: paint(i) },
    make("span", {}, make("i"), RUNS[i].name), make("b", {}, round(p[1]))));
  chart.tip.replaceChildren(
    make("small", {}, `${at.p[0].toLocaleString("en")} ${$("axis").selectedOptions[0].text}`), ...rows);
  chart.tip.hidden = false;
  const room = chart.figure.clientWidth, wide = chart.tip.offsetWidth;
  const left = X(at.p[0]) + 28 + wide > room ? X(at.p[0]) - wide - 4 : X(at.p[0]) + 28;
  chart.tip.style.left = `${Math.max(4, left)}px`;
  chart.tip.style.top = "3.2rem";
}

function build(chart) {
  chart.name = chart.names[0];
  chart.clip = `clip${$("charts").childElementCount}`;
  chart.svg = make("svg", { role: "img", "aria-label": `${chart.title} ${chart.note}` });
  chart.tip = make("div", { class: "tip", hidden: "" });
  chart.empty = make("div", { class: "empty", hidden: "" }, "no such number in the runs shown");
  const caption = make("figcaption", {}, chart.title);
  if (chart.names.length > 1) {
    const select = make("select", { "aria-label": "which" }, ...chart.names.map((name) =>
      make("option", { value: name }, chart.score ? name.slice(name.indexOf("/") + 1) : name)));
    select.onchange = () => { chart.name = select.value; draw(chart); };
    caption.append(select);
  } else if (chart.score) {
    caption.append(make("small", {}, chart.name.slice(chart.name.indexOf("/") + 1)));
  }
  caption.append(make("small", {}, chart.note));
  chart.figure = make("figure", {}, caption, chart.svg, chart.empty, chart.tip);
  $("charts").append(chart.figure);
}

// Samples ------------------------------------------------------------------------------------

function times() {  // steps at which some run that is shown has a grid of the kind
  const kind = $("kind").value;
  return [...new Set(RUNS.flatMap((run, i) =>
    shown[i] ? Object.keys(run.grids[kind] || {}).map(Number) : []))].sort((a, b) => a - b);
}

function showGrids(atEnd) {
  const all = times(), slider = $("time"), kind = $("kind").value;
  slider.max = Math.max(all.length - 1, 0);
  if (atEnd) slider.value = slider.max;
  const step = all[slider.value];
  $("when").textContent = all.length ? `step ${step.toLocaleString("en")}` : "";
  RUNS.forEach((run, i) => {
    const steps = Object.keys(run.grids[kind] || {}).map(Number).filter((s) => s <= step);
    const last = Math.max(...steps), { figure, image, note } = grids[i];
    figure.hidden = !shown[i] || !steps.length;
    if (figure.hidden) return;
    if (image.dataset.of !== `${kind} ${last}`) image.src = run.grids[kind][last];
    image.dataset.of = `${kind} ${last}`;
    image.alt = `Samples of ${run.name} at step ${last}`;
    note.textContent = last === step ? "" : `last at step ${last.toLocaleString("en")}`;
  });
}

const grids = RUNS.map((run, i) => {
  const image = make("img"), note = make("small");
  const caption = make("figcaption", {}, make("span", {}, make("i"), run.name), note);
  const figure = make("figure", { class: paint(i) }, caption, image);
  for (const line of run.notes) figure.append(make("p", { class: "note" }, line));
  $("grids").append(figure);
  return { figure, image, note };
});

// What can be clicked ------------------------------------------------------------------------

const kinds = allNames((run) => run.grids).sort();
$("kind").append(...kinds.map((kind) => make("option", { value: kind }, kind || "first setting")));
$("kinds").hidden = kinds.length < 2;
$("samples").hidden = !kinds.length;
$("kind").onchange = () => showGrids(false);
$("time").oninput = () => showGrids(false);

const charts = chartList();
charts.forEach(build);
const drawAll = () => charts.forEach(draw);
$("curves").hidden = !charts.length;
if (RUNS.some((run) => !run.batch)) {  // images cannot be counted for all
  $("axis").value = "steps";
  $("axis").options[0].disabled = true;
}
for (const id of ["axis", "log"]) $(id).onchange = drawAll;
$("smooth").oninput = drawAll;
for (const button of document.querySelectorAll("#runs button")) {
  button.onclick = () => {
    const i = +button.dataset.run;
    button.setAttribute("aria-pressed", shown[i] = !shown[i]);
    drawAll();
    showGrids(false);
  };
}
for (const table of document.querySelectorAll(".sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, k) => head.onclick = () => {
    const falling = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", falling < 0 ? "descending" : "ascending");
    const key = (row) => row.cells[k].querySelector("data")?.value ?? row.cells[k].textContent;
    const rows = [...table.tBodies[0].rows].sort((a, b) =>
      falling * String(key(a)).localeCompare(String(key(b)), "en", { numeric: true })
      || 0);
    const number = (row) => Number(row.cells[k].querySelector("data")?.value);
    if (rows.some((row) => !Number.isNaN(number(row)))) {
      rows.sort((a, b) => Number.isNaN(number(a)) - Number.isNaN(number(b))
        || falling * (number(a) - number(b)) || 0);
    }
    table.tBodies[0].append(...rows);
  });
}
if (RUNS.length === 1) $("differ").textContent = "Options that are not the default's";
addEventListener("resize", drawAll);
matchMedia("(prefers-color-scheme: dark)").addEventListener?.("change", drawAll);
drawAll();
showGrids(true);
