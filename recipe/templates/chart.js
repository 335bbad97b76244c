// The geometry of the charts, as in recipe/chart.py, which draws them first; a test compares the two. `report.js`
// follows in the same module.
const data = JSON.parse(document.getElementById("curves").textContent);
const MAX_POINTS = 1500;

// Of each run its `tokens` and `steps`, a row for each step of the page. Another layer than that of the first has its
// run in its class: "line run1".
const runs = Object.values(data.runs), several = runs.length > 1;
const runOf = (css) => data.runs[/run(\d+)/.exec(css)?.[1]] ?? runs[0];
const kindOf = (css) => css.split(" ")[0];

// What the reader chose. `range`: in `unit`, null for all; `at`: the row under the cursor, null for none.
const view = { unit: "tokens", x: data.charts[0].log ? "log" : "linear", y: "linear", range: null, at: null };
let isChosen = false; // until an x scale is chosen, each chart keeps its own

// Numbers.

const text = (value, digits = 5) =>
  value && Math.abs(value) < 0.001
    ? value.toExponential(digits - 1).replace(/\.?0+e/, "e")
    : value.toLocaleString("en-US", { maximumSignificantDigits: Math.max(digits, String(Math.trunc(value)).length) });

function compact(value, digits = 4) {
  for (const [size, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
    if (Math.abs(value) >= size) return Number((value / size).toPrecision(digits)) + unit;
  if (value && Math.abs(value) < 0.01) {
    const [mantissa, exponent] = value.toExponential(2).split("e");
    return `${Number(mantissa)}e${Number(exponent)}`;
  }
  return String(Number(value.toPrecision(digits)));
}

/** Index of the first element of a sorted array that is not below `value`. */
function search(sorted, value) {
  let low = 0, high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle + 1; else high = middle;
  }
  return low;
}

/** `ys` at `x`, between two points of `xs`, null beside a gap; beyond them as on a line through 0. */
function interpolate(xs, ys, x) {
  const i = search(xs, x), near = Math.min(i, xs.length - 1);
  if (ys[near] === null || (xs[near] !== x && ys[Math.max(i - 1, 0)] === null)) return null;
  if (i === 0 || i === xs.length) return xs[near] ? ys[near] * x / xs[near] : ys[near];
  return ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1] || 1);
}

const toUnit = (seen, run) => (view.unit === "tokens" ? seen : interpolate(run.tokens, run.steps, seen));
/** The run that the cursor follows: the one that goes furthest. */
const lead = () => runs.reduce((best, run) => (run[view.unit].at(-1) > best[view.unit].at(-1) ? run : best));

// Axes.

function linearTicks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= rough * 0.999);
  const ticks = [];
  for (let k = Math.ceil(low / size - 1e-9); k <= Math.floor(high / size + 1e-9); k++) ticks.push(k * size);
  return ticks.map((tick) => Number(tick.toPrecision(12)) + 0);
}

function logTicks(low, high) {
  const ticks = [], factors = Math.log10(high / low) > 4 ? [1] : [1, 2, 5];
  for (let decade = Math.floor(Math.log10(low)); decade <= Math.ceil(Math.log10(high)); decade++)
    for (const factor of factors) ticks.push(Number(`${factor}e${decade}`));
  return ticks.filter((tick) => low * 0.999 <= tick && tick <= high * 1.001);
}

class Axis {
  constructor(low, high, [start, end], isLog) {
    Object.assign(this, { low, high: high > low ? high : low + 1, start, end, isLog });
    this.scale = isLog ? (value) => Math.log(Math.max(value, 1e-9)) : (value) => value;
    this.first = this.scale(this.low);
    this.perUnit = (end - start) / (this.scale(this.high) - this.first);
  }
  place(value) { return this.start + (this.scale(value) - this.first) * this.perUnit; }
  value(pixel) {
    const scaled = this.first + (pixel - this.start) / this.perUnit;
    return this.isLog ? Math.exp(scaled) : scaled;
  }
  clip(pixel) {
    return Math.min(Math.max(pixel, Math.min(this.start, this.end)), Math.max(this.start, this.end));
  }
  pixel(value) { return Number(this.clip(this.place(value)).toFixed(1)); }
  ticks() {
    const ticks = this.isLog ? logTicks(this.low, this.high) : [];
    if (ticks.length > 2) return ticks;
    return linearTicks(this.low, this.high, Math.max(4, Math.trunc(Math.abs(this.end - this.start) / 65)));
  }
  /** Ticks that are close together need more digits than four to differ. */
  label(tick, ticks) {
    const gap = Math.abs(ticks[1] - ticks[0]) || 1;
    return compact(tick, Math.max(4, Math.ceil(Math.log10(Math.abs(tick) / gap || 1)) + 1));
  }
}

const isLogX = (chart) => (isChosen ? view.x === "log" : chart.log);
const firstOf = (run) => run[view.unit][0];
const wholeRange = (isLog) => [isLog ? Math.max(Math.min(...runs.map(firstOf)), 1) : 0, lead()[view.unit].at(-1) || 1];

function xAxis(chart) {
  const isLog = isLogX(chart), [low, high] = view.range ?? wholeRange(isLog);
  return new Axis(low, high, chart.x, isLog);
}

/** As `build_y_axis`: a few spikes beyond 5 x the 99th percentile do not flatten the rest. */
function yAxis(chart, values, pixels) {
  if (view.y === "log") {
    const positive = values.filter((value) => value > 0);
    const low = positive.length ? positive[0] : 1, high = positive.at(-1) ?? 10, margin = (high / low) ** 0.04;
    return new Axis(low / Math.max(margin, 1.05), high * Math.max(margin, 1.05), pixels, true);
  }
  if (!view.range) return new Axis(...chart.yRange, pixels, false);
  const place = 0.99 * (values.length - 1), under = Math.trunc(place);
  const usual = values.length ? values[under] + (values[Math.ceil(place)] - values[under]) * (place - under) : 1;
  let low = values[0] ?? 0, high = values.at(-1) ?? 1;
  if (0 < 5 * usual && 5 * usual < high) high = 2 * usual;
  if (chart.zero) low = Math.min(low, 0);
  const margin = (high - low) * 0.04 || Math.abs(high) * 0.1 || 1;
  return new Axis(chart.zero && low === 0 ? low : low - margin, high + margin, pixels, false);
}

// Lines.

/** The part of a line in the range, with one point beyond each end, at most MAX_POINTS of them with all extremes. */
function visible(run, xs, ys, axis) {
  const seen = xs === run.tokens ? run[view.unit] : xs.map((value) => toUnit(value, run));
  const from = view.range ? Math.max(search(seen, view.range[0]) - 1, 0) : 0;
  const to = view.range ? search(seen, view.range[1]) + 1 : seen.length;
  return decimate(seen.slice(from, to).map((value) => axis.place(value)), ys.slice(from, to));
}

function decimate(xs, ys) {
  if (xs.length <= MAX_POINTS) return [xs, ys];
  const buckets = MAX_POINTS / 2, width = xs.at(-1) - xs[0] || 1, keep = [];
  const bucketOf = (i) => Math.min(Math.trunc((xs[i] - xs[0]) / width * buckets), buckets - 1);
  for (let i = 0; i < xs.length;) {
    const bucket = bucketOf(i), first = i;
    let low = -1, high = -1;
    for (; i < xs.length && bucketOf(i) === bucket; i++) {
      if (ys[i] === null) continue;
      if (low < 0 || ys[i] < ys[low]) low = i;
      if (high < 0 || ys[i] > ys[high]) high = i;
    }
    keep.push(...(low < 0 ? [first] : low === high ? [low] : [Math.min(low, high), Math.max(low, high)]));
  }
  return [keep.map((i) => xs[i]), keep.map((i) => ys[i])];
}

function path(xs, ys, axis) {
  let isDrawn = false, words = "";
  for (let i = 0; i < xs.length; i++) {
    if (ys[i] !== null) {
      const point = `${xs[i].toFixed(1)} ${axis.place(ys[i]).toFixed(1)}`;
      words += isDrawn ? `L${point}` : `M${point}h0`;
    }
    isDrawn = ys[i] !== null;
  }
  return words;
}

/** The smoothed lines are those of the x scale; zoomed in, those that are the mean of fewer steps there. */
function linesOf(chart) {
  const run = lead(), first = view.range && interpolate(run[view.unit], run.steps, view.range[0]);
  const isEarly = view.range && first < run.steps.at(-1) / 4;
  const isOther = (view.range ? isEarly : isLogX(chart)) !== chart.log;
  return chart.lines.map((line) => (isOther && chart.rescaled.find((each) => each.css === line.css)) || line);
}

const xsOf = (line) => line.x ?? runOf(line.css).tokens;
