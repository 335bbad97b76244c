"""Line charts as inline SVG: round ticks, lines, points, a band, marked moments; light and dark."""

from dataclasses import dataclass, field
from html import escape

import numpy as np

MAX_POINTS = 1500  # of one line; a chart is about 1,000 pixels wide, so more cannot be seen
# Colours for both modes and the classes that charts use; a page may use the colours too.
STYLE = """:root{color-scheme:light dark;
--bg:#fff;--card:#f6f7f9;--fg:#1b2130;--muted:#5d6678;--grid:#e4e7ec;--loss:#2563eb;
--eval:#d9480f;--band:#0d9488;--unigram:#7c3aed;--error:#c1121f;--warning:#a65f00;--info:#0b7285;--good:#18794e}
@media(prefers-color-scheme:dark){:root{--bg:#11141b;--card:#1a1f29;--fg:#e6e9f0;--muted:#9aa4b5;--grid:#2a3040;
--loss:#6ea0ff;--eval:#ff9f5a;--band:#2dd4bf;--unigram:#b79cff;--error:#ff7b7b;--warning:#f0b04f;--info:#56c8dc;
--good:#56d39a}}
svg{width:100%;height:auto;display:block}svg path{fill:none;stroke-linecap:round;stroke-linejoin:round}
.grid{stroke:var(--grid)}.tick{fill:var(--muted);font-size:12px}.line{stroke:var(--loss);stroke-width:2.2}
.raw{stroke:var(--loss);stroke-width:1;opacity:.35}.eval{fill:var(--eval);stroke:var(--bg);stroke-width:1}
.unigram{stroke:var(--unigram);stroke-width:1.6;stroke-dasharray:7 5}.band{fill:var(--band);opacity:.17}
.reference{stroke:var(--band);stroke-width:1.4}.flag{fill:var(--error);opacity:.12}
.marker path{stroke:currentColor;stroke-width:1.3;stroke-dasharray:3 3}
.marker text{fill:currentColor;paint-order:stroke;stroke:var(--bg);stroke-width:4px;
font:600 11px ui-monospace,"DejaVu Sans Mono",monospace}
"""
LABEL_ROW = 15  # pixels, height of a row of marker labels
CHARACTER = 6.7  # pixels, width of a character in such a label


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


def build_x_axis(tokens: np.ndarray, start: float, end: float, is_log: bool) -> Axis:
    low, high = float(tokens.min()), float(tokens.max())
    if is_log:
        return Axis(low, high, start, end, is_log=True)
    return Axis(0.0, high if high > 0 else 1.0, start, end)


def build_y_axis(values: np.ndarray, start: float, end: float, from_zero: bool) -> Axis:
    """Covers the finite values. A few spikes beyond 5 x the 99th percentile do not flatten the rest: they leave it."""
    values = values[np.isfinite(values)]
    low, high = (values.min(), values.max()) if len(values) else (0.0, 1.0)
    usual = np.percentile(values, 99) if len(values) else 1.0
    if 0 < 5 * usual < high:
        high = 2 * usual
    low = min(low, 0.0) if from_zero else low
    margin = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
    return Axis(low if from_zero and low == 0 else low - margin, high + margin, start, end)


def decimate(x: np.ndarray, y: np.ndarray, limit: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `limit` points of a line: the lowest and the highest of each of limit / 2 equal stretches of x.

    Every spike stays visible, NaN (a gap) only where a whole stretch is NaN. `x` is sorted; give it in pixels, so
    that a log axis is cut evenly too.
    """
    if len(x) <= limit:
        return x, y
    num_buckets = limit // 2
    span = (x[-1] - x[0]) or 1.0
    bucket = np.minimum((x - x[0]) / span * num_buckets, num_buckets - 1).astype(int)
    keep = []
    for part in np.split(np.arange(len(x)), np.flatnonzero(np.diff(bucket)) + 1):
        finite = part[np.isfinite(y[part])]
        keep += {finite[y[finite].argmin()], finite[y[finite].argmax()]} if len(finite) else {part[0]}
    keep = np.sort(keep)
    return x[keep], y[keep]


def smooth(y: np.ndarray, is_log: bool) -> np.ndarray:
    """Centred mean that skips NaN: over +-4 % of the step's number on a log axis, +-1 % of the run on a linear one.

    Either is about the same width on the page all along the line; at the ends there is less on one side.
    """
    n = len(y)
    index = np.arange(n)
    half = (index * 0.04).astype(int) if is_log else np.full(n, n // 100)
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, n)
    is_finite = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(is_finite, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(is_finite)])
    total, count = sums[high] - sums[low], counts[high] - counts[low]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def path(x: np.ndarray, y: np.ndarray) -> str:
    """SVG path data; the line breaks at NaN, and a lone point stays visible as the round cap of a line of length 0."""
    parts, is_open = [], False
    for px, py in zip(x, y, strict=True):
        if np.isfinite(py):
            parts.append(f"{'L' if is_open else 'M'}{px:.1f} {py:.1f}" + ("" if is_open else "h0"))
        is_open = bool(np.isfinite(py))
    return "".join(parts)


@dataclass
class Chart:
    """Collects layers in data coordinates, then draws them with `svg()`; each layer's `css` class sets its colour."""

    title: str
    width: int
    height: int
    is_log_x: bool = False
    from_zero: bool = False
    lines: list = field(default_factory=list)  # (css, x, y)
    points: list = field(default_factory=list)  # (css, x, y, text on hover)
    levels: list = field(default_factory=list)  # (css, y)
    references: list = field(default_factory=list)  # (css, x, y), lines that do not widen the axes
    bands: list = field(default_factory=list)  # (css, x, low, high)
    boxes: list = field(default_factory=list)  # (css, x up to which, y below which, text on hover)
    markers: list = field(default_factory=list)  # (css, x, label, text on hover), by x

    def svg(self) -> str:
        rows, num_rows = self._label_rows()
        top, left, right, bottom = 12 + LABEL_ROW * num_rows, 52, self.width - 14, self.height - 40
        x, y = self._x_axis(left, right), self._y_axis(bottom, top)
        # Two charts of one page must not share the id of their clip path.
        box = f'x="{left}" y="{top}" width="{right - left}" height="{bottom - top}"'
        clip = f"clip-{''.join(c for c in self.title.lower() if c.isalnum())}"
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(self.title)}">'
            f'<clipPath id="{clip}"><rect {box}/></clipPath>'
            f'{self._grid(x, y)}<g clip-path="url(#{clip})">{self._areas(x, y)}{self._curves(x, y)}</g>'
            f"{self._dots(x, y)}{self._marks(x, rows, top, bottom)}</svg>"
        )

    def _x_axis(self, left: float, right: float) -> Axis:
        return build_x_axis(np.concatenate([line[1] for line in self.lines]), left, right, self.is_log_x)

    def _y_axis(self, bottom: float, top: float) -> Axis:
        x = self._x_axis(0, 1)
        values = [line[2] for line in self.lines] + [point[2] for point in self.points]
        values += [[level] for _, level in self.levels]
        for _, xs, low, high in self.bands:
            is_inside = (xs >= x.low) & (xs <= x.high)
            values += [low[is_inside], high[is_inside]]
        return build_y_axis(np.concatenate(values), bottom, top, self.from_zero)

    def _grid(self, x: Axis, y: Axis) -> str:
        parts = []
        for tick in y.ticks():
            py = float(y.place(tick))
            text = f'<text class="tick" x="{x.start - 7}" y="{py + 4:.1f}" text-anchor="end">{compact(tick)}</text>'
            parts.append(f'<path class="grid" d="M{x.start} {py:.1f}H{x.end}"/>{text}')
        for tick in x.ticks():
            px = float(x.place(tick))
            text = f'<text class="tick" x="{px:.1f}" y="{y.start + 18}" text-anchor="middle">{compact(tick)}</text>'
            parts.append(f'<path class="grid" d="M{px:.1f} {y.end}V{y.start + 4}"/>{text}')
        scale = "tokens seen, log scale" if x.is_log else "tokens seen"
        parts.append(f'<text class="tick" x="{x.end}" y="{y.start + 34}" text-anchor="end">{scale}</text>')
        return "".join(parts)

    def _areas(self, x: Axis, y: Axis) -> str:
        parts = []
        for css, xs, low, high in self.bands:
            outline = np.concatenate([x.place(xs), x.place(xs)[::-1]]), y.place(np.concatenate([low, high[::-1]]))
            points = " ".join(f"{px:.1f},{py:.1f}" for px, py in zip(*outline, strict=True))
            parts.append(f'<polygon class="{css}" points="{points}"/>')
        for css, until, below, text in self.boxes:
            width, py = float(x.place(until)) - x.start, float(y.place(below))
            parts.append(
                f'<rect class="{css}" x="{x.start}" y="{py:.1f}" width="{max(width, 0):.1f}" '
                f'height="{max(y.start - py, 0):.1f}"><title>{escape(text)}</title></rect>'
            )
        return "".join(parts)

    def _curves(self, x: Axis, y: Axis) -> str:
        parts = [f'<path class="{css}" d="M{x.start} {float(y.place(v)):.1f}H{x.end}"/>' for css, v in self.levels]
        for css, xs, ys in self.references + self.lines:
            px, values = decimate(x.place(xs), ys)
            parts.append(f'<path class="{css}" d="{path(px, y.place(values))}"/>')
        return "".join(parts)

    def _dots(self, x: Axis, y: Axis) -> str:
        parts = []
        for css, xs, ys, texts in self.points:
            for px, py, text in zip(x.place(xs), y.place(ys), texts, strict=True):
                if y.end <= py <= y.start and x.start <= px <= x.end:
                    title = f"<title>{escape(text)}</title>"
                    parts.append(f'<circle class="{css}" cx="{px:.1f}" cy="{py:.1f}" r="3.5">{title}</circle>')
        return "".join(parts)

    def _label_rows(self) -> tuple[list[int], int]:
        """For each marker the row its label stands in, so that labels do not overlap, and how many rows that takes."""
        x, ends, rows = self._x_axis(52, self.width - 14), [], []
        for _, value, label, _ in self.markers:
            start, end = self._label_span(float(x.place(value)), label)
            row = next((row for row, used in enumerate(ends) if used < start), len(ends)) if label else 0
            ends += [0.0] * (row + 1 - len(ends))
            ends[row] = max(ends[row], end) if label else ends[row]
            rows.append(row)
        return rows, len(ends)

    def _label_span(self, px: float, label: str) -> tuple[float, float]:
        """Pixels a label takes beside its marker: to the right of it, or to the left where the page would end."""
        width = len(label) * CHARACTER + 8
        return (px - width, px) if px + width > self.width else (px, px + width)

    def _marks(self, x: Axis, rows: list[int], top: float, bottom: float) -> str:
        lines, labels = [], []
        for (css, value, label, text), row in zip(self.markers, rows, strict=True):
            px = float(np.clip(x.place(value), x.start, x.end))
            is_left = self._label_span(px, label)[0] < px
            y = 6 + LABEL_ROW * row
            title = f"<title>{escape(text)}</title>"
            lines.append(f'<g class="marker {css}">{title}<path d="M{px:.1f} {y if label else top}V{bottom}"/></g>')
            anchor = f'x="{px + (-4 if is_left else 4):.1f}" y="{y + 8}" text-anchor="{"end" if is_left else "start"}"'
            labels.append(f'<g class="marker {css}">{title}<text {anchor}>{escape(label)}</text></g>' if label else "")
        return "".join(lines + labels)  # labels last: they are read over the lines of later markers
