"""Line charts as inline SVG: round ticks, lines, points, a band, marked moments; light and dark."""

from dataclasses import dataclass, field
from html import escape

import numpy as np

MAX_POINTS = 1500  # of one line; a chart is about 1,000 pixels wide, so more cannot be seen
# Colours for both modes and the classes that charts use; a page may use the colours too.
STYLE = """:root{color-scheme:light dark;--bg:#fff;--card:#f6f7f9;--fg:#1b2130;--muted:#5d6678;--grid:#e4e7ec;
--loss:#2563eb;--eval:#d9480f;--band:#0d9488;--unigram:#7c3aed;--error:#c1121f;--warning:#a65f00;--info:#0b7285;
--good:#18794e}@media(prefers-color-scheme:dark){:root{--bg:#11141b;--card:#1a1f29;--fg:#e6e9f0;--muted:#9aa4b5;
--grid:#2a3040;--loss:#6ea0ff;--eval:#ff9f5a;--band:#2dd4bf;--unigram:#b79cff;--error:#ff7b7b;--warning:#f0b04f;
--info:#56c8dc;--good:#56d39a}}
svg{width:100%;height:auto;display:block}svg path{fill:none;stroke-linecap:round;stroke-linejoin:round}
.grid{stroke:var(--grid)}.tick{fill:var(--muted);font-size:12px}.line{stroke:var(--loss);stroke-width:2.2}
.raw{stroke:var(--loss);stroke-width:1;opacity:.35}.eval{fill:var(--eval);stroke:var(--bg);stroke-width:1}
.unigram{stroke:var(--unigram);stroke-width:1.6;stroke-dasharray:7 5}.reference{stroke:var(--band);stroke-width:1.4}
.band{fill:var(--band);opacity:.17}.flag{fill:var(--error);opacity:.12}
path.marker{stroke:currentColor;stroke-width:1.3;stroke-dasharray:3 3}
text.marker{fill:currentColor;paint-order:stroke;stroke:var(--bg);stroke-width:4px;
font:600 11px ui-monospace,"DejaVu Sans Mono",monospace}
"""
# Pixels: the margins round the plot, the height of a row of marker labels, the width of a character in one.
LEFT, RIGHT, TOP, BOTTOM, LABEL_ROW, CHARACTER = 52, 14, 12, 40, 15, 6.7


def compact(value: float) -> str:
    """A number for an axis: 1500 -> 1.5k, 24_000_000 -> 24M, 0.0003 -> 3e-4."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:,.4g}{unit}"
    if value and abs(value) < 0.01:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def linear_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten in [low, high], about `count` of them."""
    rough = (high - low) / count
    power = 10.0 ** np.floor(np.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9)
    return [float(f"{k * step:.12g}") + 0.0 for k in np.arange(first, last + 1)]  # + 0.0: no "-0"


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in [low, high], with 2 and 5 between them where there is room."""
    decades = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    factors = (1,) if np.log10(high / low) > 4 else (1, 2, 5)
    ticks = [float(f * 10.0**d) for d in decades for f in factors]
    return [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]


@dataclass(frozen=True)
class Axis:
    """Maps values in [low, high] to pixels in [start, end]; `start > end` turns the axis round, as y needs."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def place(self, values) -> np.ndarray:
        values = np.asarray(values, dtype=np.float64)
        low, high = self.low, self.high
        if self.is_log:  # 0 tokens, before the first step, belongs at the left edge
            values, low, high = np.log(np.maximum(values, low)), np.log(low), np.log(high)
        return self.start + (values - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        count = max(4, int(abs(self.end - self.start) / 65))
        return log_ticks(self.low, self.high) if self.is_log else linear_ticks(self.low, self.high, count)


def build_y_axis(values: np.ndarray, start: float, end: float, from_zero: bool) -> Axis:
    """Covers the finite values. A few spikes beyond 5 x the 99th percentile do not flatten the rest: they leave it."""
    values = values[np.isfinite(values)]
    low, high, usual = np.percentile(values, [0, 100, 99]) if len(values) else (0.0, 1.0, 1.0)
    if 0 < 5 * usual < high:
        high = 2 * usual
    low = min(low, 0.0) if from_zero else low
    margin = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
    return Axis(low if from_zero and low == 0 else low - margin, high + margin, start, end)


def decimate(x: np.ndarray, y: np.ndarray, limit: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `limit` points of a line: the lowest and the highest of each of limit / 2 equal stretches of `x`, which
    is sorted and in pixels. Every spike stays visible, NaN (a gap) only where a whole stretch is NaN."""
    if len(x) <= limit:
        return x, y
    num_buckets = limit // 2
    bucket = np.minimum((x - x[0]) / ((x[-1] - x[0]) or 1.0) * num_buckets, num_buckets - 1).astype(int)
    keep = []
    for part in np.split(np.arange(len(x)), np.flatnonzero(np.diff(bucket)) + 1):
        finite = part[np.isfinite(y[part])]
        keep += {finite[y[finite].argmin()], finite[y[finite].argmax()]} if len(finite) else {part[0]}
    keep = np.sort(keep)
    return x[keep], y[keep]


def smooth(y: np.ndarray, is_log: bool) -> np.ndarray:
    """Centred mean that skips NaN: over +-4 % of the step's number on a log axis, +-1 % of the run on a linear one,
    so that it is about equally wide on the page all along the line."""
    n, index = len(y), np.arange(len(y))
    half = (index * 0.04).astype(int) if is_log else np.full(n, n // 100)
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, n)
    is_finite = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(is_finite, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(is_finite)])
    total, count = sums[high] - sums[low], counts[high] - counts[low]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def path(x: np.ndarray, y: np.ndarray) -> str:
    """SVG path data; the line breaks at NaN, and a lone point stays visible as the round cap of a line of length 0."""
    is_drawn = np.isfinite(y)
    is_start = is_drawn & ~np.append(False, is_drawn[:-1])
    points = zip(x[is_drawn], y[is_drawn], is_start[is_drawn], strict=True)
    return "".join(f"M{px:.1f} {py:.1f}h0" if start else f"L{px:.1f} {py:.1f}" for px, py, start in points)


@dataclass
class Chart:
    """Collects layers in data coordinates, then draws them with `svg()`; each layer's `css` class sets its colour."""

    title: str
    width: int
    height: int
    tokens: np.ndarray  # seen at each step; the x axis goes from their lowest to their highest, or from 0
    is_log_x: bool = False
    from_zero: bool = False
    lines: list = field(default_factory=list)  # (css, x, y)
    dots: list = field(default_factory=list)  # (css, x, y, text on hover)
    bands: list = field(default_factory=list)  # (css, x, low, high)
    boxes: list = field(default_factory=list)  # (css, x up to which, y below which); they do not widen the axes
    markers: list = field(default_factory=list)  # (css, x, label, text on hover), by x

    def svg(self) -> str:
        x, rows = self.x_axis(), self.label_rows()
        y = self._y_axis(self.height - BOTTOM, TOP + LABEL_ROW * (max(rows, default=-1) + 1))
        # Two charts of one page must not share the id of their clip path.
        clip = f"clip-{''.join(c for c in self.title.lower() if c.isalnum())}"
        box = f'x="{x.start}" y="{y.end}" width="{x.end - x.start}" height="{y.start - y.end}"'
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(self.title)}">'
            f'<clipPath id="{clip}"><rect {box}/></clipPath>{_grid(x, y)}'
            f'<g clip-path="url(#{clip})">{self._shapes(x, y)}</g>{self._dots(x, y)}{self._marks(x, y, rows)}</svg>'
        )

    def x_axis(self) -> Axis:
        low, high = (self.tokens.min(), self.tokens.max()) if self.is_log_x else (0.0, self.tokens.max() or 1.0)
        return Axis(low, high, LEFT, self.width - RIGHT, self.is_log_x)

    def _y_axis(self, bottom: float, top: float) -> Axis:
        # A reference may go on long after this run: what lies there must not widen the axis.
        values = [y[xs <= self.tokens.max()] for _, xs, *curves in self.lines + self.bands for y in curves]
        values.append([value for _, _, value, _ in self.dots])
        return build_y_axis(np.concatenate(values), bottom, top, self.from_zero)

    def _shapes(self, x: Axis, y: Axis) -> str:
        """What lies within the plot, the lowest first."""
        shapes = []
        for css, xs, low, high in self.bands:
            shapes.append((css, path(x.place(np.append(xs, xs[::-1])), y.place(np.append(low, high[::-1]))) + "Z"))
        for css, until, below in self.boxes:
            shapes.append((css, f"M{x.start} {y.place(below):.1f}H{x.place(until):.1f}V{y.start}H{x.start}Z"))
        for css, xs, ys in self.lines:
            px, values = decimate(x.place(xs), ys)
            shapes.append((css, path(px, y.place(values))))
        return "".join(f'<path class="{css}" d="{data}"/>' for css, data in shapes)

    def _dots(self, x: Axis, y: Axis) -> str:
        parts = []
        for css, at, value, text in self.dots:
            px, py = x.place(at), np.clip(y.place(value), y.end, y.start)
            title = f"<title>{escape(text)}</title>"
            parts.append(f'<circle class="{css}" cx="{px:.1f}" cy="{py:.1f}" r="3.5">{title}</circle>')
        return "".join(parts)

    def label_rows(self) -> list[int]:
        """For each marker the row in which its label stands, so that labels do not overlap; 0 where it has none."""
        x, ends, rows = self.x_axis(), [], []
        for _, value, label, _ in self.markers:
            start, end = self.label_span(x.place(value), label)
            row = next((row for row, used in enumerate(ends) if used < start), len(ends)) if label else 0
            if label:
                ends[row : row + 1] = [end]
            rows.append(row)
        return rows

    def label_span(self, px: float, label: str) -> tuple[float, float]:
        """Pixels a label takes beside its marker: to the right of it, or to the left where the page would end."""
        width = len(label) * CHARACTER + 8
        return (px - width, px) if px + width > self.width else (px, px + width)

    def _marks(self, x: Axis, y: Axis, rows: list[int]) -> str:
        lines, labels = [], []
        for (css, value, label, text), row in zip(self.markers, rows, strict=True):
            px, top = np.clip(x.place(value), x.start, x.end), 6 + LABEL_ROW * row
            title = f"<title>{escape(text)}</title>"
            stroke = f"M{px:.1f} {top if label else y.end}V{y.start}"
            lines.append(f'<path class="marker {css}" d="{stroke}">{title}</path>')
            offset, anchor = (-4, "end") if self.label_span(px, label)[0] < px else (4, "start")
            at = f'x="{px + offset:.1f}" y="{top + 8}" text-anchor="{anchor}"'
            labels.append(f'<text class="marker {css}" {at}>{title}{escape(label)}</text>' if label else "")
        return "".join(lines + labels)  # labels last: they are read over the lines of later markers


def _grid(x: Axis, y: Axis) -> str:
    xs, ys = x.ticks(), y.ticks()
    lines = [f"M{x.start} {py:.1f}H{x.end}" for py in y.place(ys)]
    lines += [f"M{px:.1f} {y.end}V{y.start + 4}" for px in x.place(xs)]
    words = [(x.start - 7, py + 4, "end", compact(tick)) for tick, py in zip(ys, y.place(ys), strict=True)]
    words += [(px, y.start + 18, "middle", compact(tick)) for tick, px in zip(xs, x.place(xs), strict=True)]
    words.append((x.end, y.start + 34, "end", "tokens seen, log scale" if x.is_log else "tokens seen"))
    texts = (f'<text class="tick" x="{px:.1f}" y="{py:.1f}" text-anchor="{at}">{w}</text>' for px, py, at, w in words)
    return f'<path class="grid" d="{"".join(lines)}"/>{"".join(texts)}'
