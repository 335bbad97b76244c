// Makes the charts of a report, or of a comparison of runs, interactive: values under the pointer, zoom, steps or tokens, log or linear axes. It
// moves what the server has drawn, and adds text of the run by `textContent` only.

const NAMES = { raw: "this step", line: "smoothed", floor: "n-gram baseline", reference: "reference" };
const LABEL_TOP = 6, LABEL_ROW = 15, CHARACTER = 6.7, TOP = 12; // as in recipe/chart.py
const NEAR = 6; // pixels from the cursor to what its box names
const STORED = `charts ${location.pathname}`;

function make(tag, attributes, words) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (words !== undefined) element.textContent = words;
  return element;
}

function drawAxes(chart, x, y) {
  const yTicks = y.ticks(), xTicks = x.ticks(), parts = [];
  for (const tick of yTicks) {
    const at = y.pixel(tick), words = y.label(tick, yTicks);
    parts.push(make("path", { class: "grid", d: `M${x.start} ${at}H${x.end}` }));
    parts.push(make("text", { class: "tick", x: x.start - 7, y: at + 4, "text-anchor": "end" }, words));
    parts.push(make("text", { class: "tick far", x: x.end - 4, y: at - 4, "text-anchor": "end" }, words));
  }
  for (const tick of xTicks) {
    const at = x.pixel(tick);
    parts.push(make("path", { class: "grid", d: `M${at} ${y.end}V${y.start + 4}` }));
    const words = x.label(tick, xTicks);
    parts.push(make("text", { class: "tick", x: at, y: y.start + 18, "text-anchor": "middle" }, words));
  }
  const title = (view.unit === "tokens" ? "tokens seen" : "step") + (x.isLog ? ", log scale" : "");
  parts.push(make("text", { class: "tick", x: x.end, y: y.start + 34, "text-anchor": "end" }, title));
  chart.svg.querySelector(".axes").replaceChildren(...parts);
}

const isInRange = (value) => !view.range || (view.range[0] <= value && value <= view.range[1]);

/** Rows of labels, as `placed_markers`: the first row in which a label overlaps no other. Returns their number. */
function placeLabels(chart, x) {
  const ends = [];
  for (const marker of chart.markers) {
    const value = toUnit(marker.seen, runs[0]);
    marker.isShown = isInRange(value);
    if (!marker.isShown || !marker.label) continue;
    const at = x.pixel(value), width = marker.words.length * CHARACTER + 8;
    const isLeft = at + width > chart.width, [start, end] = isLeft ? [at - width, at] : [at, at + width];
    let row = ends.findIndex((used) => used < start);
    if (row < 0) row = ends.length;
    ends[row] = end;
    marker.top = LABEL_TOP + LABEL_ROW * row;
    const place = { x: isLeft ? at - 4 : at + 4, y: marker.top + 8, "text-anchor": isLeft ? "end" : "start" };
    for (const [name, value] of Object.entries(place)) marker.label.querySelector("text").setAttribute(name, value);
  }
  return ends.length;
}

const placeOf = (dot) => toUnit(Number(dot.dataset.tokens), runOf(dot.className.baseVal));

function drawMarks(chart, x, y) {
  for (const marker of chart.markers) {
    for (const part of [marker.line, marker.label]) if (part) part.style.display = marker.isShown ? "" : "none";
    if (!marker.isShown) continue; // and its label has no place
    const d = `M${x.pixel(toUnit(marker.seen, runs[0]))} ${marker.label ? marker.top : y.end}V${y.start}`;
    for (const each of marker.line.querySelectorAll("path")) each.setAttribute("d", d);
  }
  for (const dot of chart.dots) {
    const value = Number(dot.dataset.value), seen = placeOf(dot);
    const isShown = isInRange(seen) && (!view.range || (y.low <= value && value <= y.high));
    dot.style.display = isShown ? "" : "none";
    dot.setAttribute("cx", x.pixel(seen));
    dot.setAttribute("cy", y.pixel(value));
  }
}

function draw(chart) {
  const x = xAxis(chart), lines = linesOf(chart), top = TOP + LABEL_ROW * placeLabels(chart, x);
  const drawn = lines.map((line) => visible(runOf(line.css), xsOf(line), line.y, x));
  const bands = chart.bands.map((band) => [band.low, band.high].map((ys) => visible(runs[0], band.x, ys, x)));
  // Zoomed in, the curve fills the chart, and what is far from it is left out.
  const fitted = drawn.filter((_, i) => ["raw", "line"].includes(kindOf(lines[i].css)));
  const shown = (view.range ? fitted : [...drawn, ...bands.flat()]).flatMap(([, ys]) => ys).filter((value) => value !== null);
  for (const dot of chart.dots) if (isInRange(placeOf(dot))) shown.push(Number(dot.dataset.value));
  const y = yAxis(chart, Float64Array.from(shown).sort(), [chart.y[0], top]);
  const shapes = bands.map(([[xs, low], [, high]]) =>
    `${path([...xs, ...xs.toReversed()], [...low, ...high.toReversed()], y)}Z`);
  for (const box of chart.boxes)
    shapes.push(`M${x.start} ${y.place(box.below).toFixed(1)}H${x.place(toUnit(box.until, runs[0])).toFixed(1)}V${y.start}H${x.start}Z`);
  shapes.push(...drawn.map(([xs, ys]) => path(xs, ys, y)));
  chart.paths.forEach((element, i) => element.setAttribute("d", shapes[i]));
  chart.clip.setAttribute("y", y.end);
  chart.clip.setAttribute("height", y.start - y.end);
  Object.assign(chart, { xAxis: x, yAxis: y });
  drawAxes(chart, x, y);
  drawMarks(chart, x, y);
  drawCursor(chart);
}

function drawAll() {
  data.charts.forEach(draw);
  hideTips();
  try { sessionStorage.setItem(STORED, JSON.stringify({ ...view, at: null, isChosen })); } catch { /* it is off */ }
}

// The cursor and its values.

/** Where the cursor is on the x axis. */
const here = () => lead()[view.unit][view.at];
const nowhere = () => view.at === null || !isInRange(here());

function nearest(list, value) {
  const i = Math.min(search(list, value), list.length - 1);
  return i && value - list[i - 1] < list[i] - value ? i - 1 : i;
}

/** The row of a run at the cursor, null beyond its ends. */
function rowOf(run) {
  const list = run[view.unit];
  if (run === lead()) return view.at;
  return here() < list[0] || here() > list.at(-1) ? null : nearest(list, here());
}

function drawCursor(chart) {
  chart.cursor.style.display = nowhere() ? "none" : "";
  if (nowhere()) return;
  const at = chart.xAxis.pixel(here()), [line, ...dots] = chart.cursor.children;
  line.setAttribute("d", `M${at} ${chart.yAxis.end}V${chart.yAxis.start}`);
  chart.raws.forEach((raw, i) => {
    const run = runOf(raw.css), row = rowOf(run), value = row === null ? null : raw.y[row];
    dots[i].style.display = value === null ? "none" : "";
    if (value === null) return;
    dots[i].setAttribute("cx", chart.xAxis.pixel(run[view.unit][row]));
    dots[i].setAttribute("cy", chart.yAxis.pixel(value));
  });
}

/** [name, value] of each line of a run at the cursor. */
function valuesOf(chart, run) {
  const row = rowOf(run), values = [];
  if (row === null) return values;
  for (const line of linesOf(chart).filter((each) => runOf(each.css) === run)) {
    const kind = kindOf(line.css), xs = xsOf(line), seen = run.tokens[row];
    const value = kind === "raw" ? line.y[row] : interpolate(xs, line.y, seen);
    const isThere = kind === "raw" || (value !== null && xs[0] <= seen && seen <= xs.at(-1));
    if (isThere && NAMES[kind]) values.push([NAMES[kind], value === null ? "not finite" : text(value)]);
  }
  return chart.rescaled.length ? values.toReversed() : values.slice(0, 1); // a schedule is its own mean
}

/** A row of each run, with its step where that is not the step of the cursor. */
function compareAt(chart) {
  const rows = [], first = lead();
  for (const run of runs) {
    const values = Object.fromEntries(valuesOf(chart, run)), { [NAMES.raw]: raw, [NAMES.line]: mean } = values;
    if (raw === undefined) continue;
    const row = rowOf(run), isSame = run.steps[row] === first.steps[view.at] && run.tokens[row] === first.tokens[view.at];
    const name = isSame ? run.name : `${run.name}, ${placeName(run, row)}`;
    rows.push([name, mean === undefined ? raw : `${raw} (${NAMES.line} ${mean})`, `var(--${run.colour})`]);
  }
  return rows;
}

/** What is marked near the cursor: findings and evaluations. */
function marksAt(chart) {
  const at = chart.xAxis.pixel(here());
  const isNear = (value) => isInRange(value) && Math.abs(chart.xAxis.pixel(value) - at) <= NEAR;
  const dots = chart.dots.filter((dot) => isNear(placeOf(dot))).map((dot) => dot.dataset.words);
  const markers = chart.markers.filter((marker) => isNear(toUnit(marker.seen, runs[0])));
  return [...dots, ...markers.map((marker) => marker.about)].slice(0, 5);
}

const placeName = (run, row) => `step ${text(run.steps[row])}, ${text(run.tokens[row])} tokens`;

const hideTips = () => data.charts.forEach((chart) => { chart.tip.hidden = true; });

function showTip(chart, height) {
  const title = document.createElement("b");
  title.textContent = placeName(lead(), view.at);
  const rows = (several ? compareAt(chart) : valuesOf(chart, runs[0])).map(([name, value, colour]) => {
    const row = document.createElement("div");
    row.append(...[name, value].map((each) => Object.assign(document.createElement("span"), { textContent: each })));
    if (colour) row.firstChild.style.color = colour;
    return row;
  });
  const marks = marksAt(chart).map((words) => Object.assign(document.createElement("p"), { textContent: words }));
  hideTips();
  chart.tip.replaceChildren(title, ...rows, ...marks);
  chart.tip.hidden = false;
  // Beside the cursor, inside the part of the chart that is on the screen.
  const box = chart.svg.getBoundingClientRect(), frame = (chart.box.closest(".scroll") ?? chart.box).getBoundingClientRect();
  const at = chart.xAxis.pixel(here()) * box.width / chart.width, { offsetWidth, offsetHeight } = chart.tip;
  const [first, last] = [frame.left - box.left, Math.min(frame.right, innerWidth) - box.left - offsetWidth];
  const left = at + 14 <= last ? at + 14 : at - 14 - offsetWidth;
  chart.tip.style.left = `${Math.max(first, Math.min(left, last))}px`;
  chart.tip.style.top = `${Math.max(0, Math.min(height - offsetHeight / 2, box.height - offsetHeight))}px`;
}

function moveTo(row, chart, height = 0) {
  view.at = Math.max(0, Math.min(row, lead().steps.length - 1));
  data.charts.forEach(drawCursor);
  showTip(chart, height);
}

function leave() {
  view.at = null;
  data.charts.forEach(drawCursor);
  hideTips();
}

const pointOf = (chart, event) => {
  const box = chart.svg.getBoundingClientRect();
  return { pixel: chart.xAxis.clip((event.clientX - box.left) * chart.width / box.width), height: event.clientY - box.top };
};

const nearestRow = (value) => nearest(lead()[view.unit], value);

// Zoom.

function setRange(low, high) {
  const [first, last] = wholeRange(isLogX(data.charts[0]));
  const range = [Math.max(low, first), Math.min(high, last)];
  if (search(lead()[view.unit], range[1]) - search(lead()[view.unit], range[0]) < 3) return; // nothing to see
  view.range = range[0] <= first * (1 + 1e-9) && range[1] >= last * (1 - 1e-9) ? null : range;
  drawAll();
}

/** Around the cursor, if it is in sight, or by `shift`, a share of what is in sight. */
function zoom(factor, shift) {
  const { xAxis: x } = data.charts[0], width = x.end - x.start;
  const [first, last] = wholeRange(x.isLog).map((value) => x.place(value));
  const fixed = nowhere() ? x.start + width / 2 : x.pixel(here());
  const wanted = shift ? x.start + shift * width : fixed - (fixed - x.start) * factor;
  const low = Math.max(first, Math.min(wanted, last - factor * width));
  setRange(...[low, low + factor * width].map((pixel) => x.value(pixel)));
}

const ACTIONS = {
  in: () => zoom(0.5, 0), out: () => zoom(2, 0), earlier: () => zoom(1, -0.5), later: () => zoom(1, 0.5),
  all: () => { view.range = null; drawAll(); },
};

/** The part of the charts around a finding, under the cursor. */
function zoomTo(seen) {
  const [chart] = data.charts;
  view.range = null;
  draw(chart);
  const x = chart.xAxis, value = toUnit(seen, runs[0]), at = x.pixel(value), reach = 0.12 * (x.end - x.start);
  setRange(x.value(at - reach), x.value(at + reach));
  moveTo(nearestRow(value), chart);
  chart.cursor.scrollIntoView({ block: "nearest", inline: "center" });
}

// Events.

const KEYS = {
  ArrowLeft: () => -1, ArrowRight: () => 1, PageUp: () => -inSight() / 10, PageDown: () => inSight() / 10,
  Home: () => -Infinity, End: () => Infinity,
};
const KEY_ACTIONS = { "+": "in", "=": "in", "-": "out", 0: "all", Escape: "all" };
const rowsInSight = () => {
  const list = lead()[view.unit];
  return view.range ? view.range.map((value) => search(list, value)) : [0, list.length];
};
const inSight = () => Math.ceil(rowsInSight()[1] - rowsInSight()[0]);

function onKey(chart, event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (KEY_ACTIONS[event.key]) ACTIONS[KEY_ACTIONS[event.key]]();
  else if (KEYS[event.key]) {
    const [first, end] = rowsInSight(), from = view.at ?? (event.key === "ArrowLeft" ? end : first - 1);
    moveTo(Math.max(first, Math.min(from + Math.round(KEYS[event.key]()), end - 1)), chart);
    document.querySelector("[aria-live]").textContent = [...chart.tip.children].map((each) => each.innerText).join("; ");
  } else return;
  event.preventDefault();
}

function listen(chart) {
  let start = null; // where a drag began, in pixels of the chart
  const { svg, selection } = chart;
  const stop = () => { start = null; selection.style.display = "none"; };
  const isDragged = (pixel) => start !== null && Math.abs(pixel - start) > 4;
  svg.addEventListener("pointerdown", (event) => {
    const { pixel, height } = pointOf(chart, event);
    if (event.pointerType !== "touch" && event.button === 0) start = pixel; // a finger scrolls
    moveTo(nearestRow(chart.xAxis.value(pixel)), chart, height);
  });
  svg.addEventListener("pointermove", (event) => {
    const { pixel, height } = pointOf(chart, event);
    moveTo(nearestRow(chart.xAxis.value(pixel)), chart, height);
    if (!isDragged(pixel)) return;
    svg.setPointerCapture(event.pointerId);
    const { start: bottom, end: top } = chart.yAxis;
    const place = { x: Math.min(start, pixel), width: Math.abs(pixel - start), y: top, height: bottom - top };
    for (const [name, value] of Object.entries(place)) selection.setAttribute(name, value);
    selection.style.display = "";
  });
  svg.addEventListener("pointerup", (event) => {
    const { pixel } = pointOf(chart, event), ends = [start, pixel].sort((a, b) => a - b);
    if (isDragged(pixel)) setRange(...ends.map((end) => chart.xAxis.value(end)));
    stop();
  });
  svg.addEventListener("pointercancel", stop);
  svg.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") leave(); });
  svg.addEventListener("blur", leave);
  svg.addEventListener("dblclick", ACTIONS.all);
  svg.addEventListener("dragstart", (event) => event.preventDefault());
  svg.addEventListener("keydown", (event) => onKey(chart, event));
}

/** Takes the text out of an element's title, so that the browser does not show it beside ours. */
function takeTitle(element) {
  const title = element.querySelector("title"), words = title.textContent;
  title.remove();
  return words;
}

function prepare(chart, box) {
  const svg = box.querySelector("svg"), all = (selector) => [...svg.querySelectorAll(selector)];
  const lines = all("a.marker:not(:has(text))"), labels = all("a.marker:has(text)");
  const markers = lines.map((line) => ({ line, seen: Number(line.dataset.tokens), about: takeTitle(line) }));
  for (const label of labels) {
    const about = takeTitle(label), of = (marker) => !marker.label && marker.line.getAttribute("href") === label.getAttribute("href");
    Object.assign(markers.find(of), { label, about, words: label.textContent.trim() });
  }
  const dots = all("circle");
  for (const dot of dots) dot.dataset.words = takeTitle(dot);
  const cursor = make("g", { class: "cursor" }), selection = make("rect", { class: "selection" });
  const raws = chart.lines.filter((line) => kindOf(line.css) === "raw");
  cursor.append(make("path", { class: "cursor" }));
  for (const { css } of raws) cursor.append(make("circle", { class: css.replace("raw", "cursor"), r: 4 }));
  cursor.style.display = selection.style.display = "none";
  svg.append(selection, cursor);
  svg.tabIndex = 0;
  const tip = Object.assign(document.createElement("div"), { className: "tip", hidden: true });
  box.append(tip);
  Object.assign(chart, { box, svg, markers, dots, cursor, selection, tip, raws });
  Object.assign(chart, { paths: all(".plot path"), clip: svg.querySelector("clipPath rect") });
  listen(chart);
}

function openFinding() {
  const details = document.getElementById(location.hash.slice(1))?.querySelector("details");
  if (details) details.open = true;
}

/** What is in sight stays so, by the run that the cursor follows. */
function changeUnit(unit) {
  const run = lead();
  view.range &&= view.range.map((value) => interpolate(run[view.unit], run[unit], value));
  view.at = null;
}

function setUp() {
  document.querySelectorAll(".chart").forEach((box, i) => prepare(data.charts[i], box));
  let stored = null;
  try { stored = JSON.parse(sessionStorage.getItem(STORED)); } catch { /* it is off */ }
  if (stored) ({ isChosen, ...stored } = stored);
  Object.assign(view, stored);
  for (const tools of document.querySelectorAll(".tools")) tools.hidden = false;
  for (const input of document.querySelectorAll(".tools input")) {
    input.checked = view[input.name] === input.value;
    input.addEventListener("change", () => {
      if (input.name === "unit") changeUnit(input.value);
      view[input.name] = input.value;
      isChosen ||= input.name === "x";
      drawAll();
    });
  }
  for (const button of document.querySelectorAll(".tools button"))
    button.addEventListener("click", ACTIONS[button.dataset.do]);
  for (const link of document.querySelectorAll("td a[data-tokens]"))
    link.addEventListener("click", () => zoomTo(Number(link.dataset.tokens) || 0));
  addEventListener("hashchange", openFinding);
  openFinding();
  drawAll();
}
setUp();
