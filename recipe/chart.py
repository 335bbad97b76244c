"""Line charts: ticks, lines, points, bands and markers, in pixels; the template writes them as SVG.

`scene` has the same in data coordinates, which the script of the page draws again where the reader zooms."""

import math
from dataclasses import dataclass, field

import numpy as np

MAX_POINTS = 1500  # of one line; more are not visible in a chart of about 1,000 pixels
MAX_ROWS = 10_000  # steps of which a page holds all values, to zoom into: about half a megabyte
# Pixels: the margins of the plot; of marker labels, the top of the first row, its height, the width of a character.
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 40
LABEL_TOP, LABEL_ROW, CHARACTER = 6, 15, 6.7


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
    """Maps values in [low, high] to pixels in [start, end]; `start > end` inverts the axis, as y needs."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def place(self, values) -> np.ndarray:
        values = np.asarray(values, dtype=np.float64)
        low, high = self.low, self.high
        if self.is_log:  # 0 tokens, before the first step, are at the left edge
            values, low, high = np.log(np.maximum(values, low)), np.log(low), np.log(high)
        return self.start + (values - low) / (high - low) * (self.end - self.start)

    def pixel(self, value: float) -> float:
        """The pixel of one value; beyond the axis, that of its nearer end."""
        return round(float(np.clip(self.place(value), *sorted((self.start, self.end)))), 1)

    def ticks(self) -> list[float]:
        count = max(4, int(abs(self.end - self.start) / 65))
        return log_ticks(self.low, self.high) if self.is_log else linear_ticks(self.low, self.high, count)


def build_y_axis(values: np.ndarray, start: float, end: float, from_zero: bool) -> Axis:
    """Covers the finite values. A few spikes beyond 5 x the 99th percentile do not flatten the rest."""
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
    keep = sorted(_extremes((x - x[0]) / ((x[-1] - x[0]) or 1.0), y, limit // 2))
    return x[keep], y[keep]


def choose_rows(columns: list[np.ndarray], limit: int = MAX_ROWS) -> np.ndarray:
    """Indices of at most about `limit` steps, sorted: the first and the last, and the lowest and the highest of each
    column in equal stretches of the run and, for log axes, of the logarithm of its steps. No spike is lost."""
    n = len(columns[0])
    if n <= limit:
        return np.arange(n)
    keep = {0, n - 1}
    for position in (np.arange(n) / n, np.log1p(np.arange(n)) / np.log1p(n)):
        for column in columns:
            keep |= _extremes(position, column, limit // (4 * len(columns)))
    return np.array(sorted(keep))


def _extremes(position: np.ndarray, y: np.ndarray, num_buckets: int) -> set[int]:
    """Indices of the lowest and the highest of each bucket of `position`, which is sorted and in [0, 1]; of the first
    where all are NaN."""
    bucket, keep = np.minimum(position * num_buckets, num_buckets - 1).astype(int), set()
    for part in np.split(np.arange(len(y)), np.flatnonzero(np.diff(bucket)) + 1):
        finite = part[np.isfinite(y[part])]
        keep |= {finite[y[finite].argmin()], finite[y[finite].argmax()]} if len(finite) else {part[0]}
    return keep


def thin(x: np.ndarray, y: np.ndarray, limit: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `limit` points of a smooth line, which has no spikes to keep: half evenly, half evenly on a log axis."""
    if len(x) <= limit:
        return x, y
    even, log = np.linspace(0, len(x) - 1, limit // 2), np.geomspace(1, len(x), limit // 2) - 1
    keep = np.union1d(even.astype(int), log.astype(int))
    return x[keep], y[keep]


def plain(values: np.ndarray) -> list[float | int | None]:
    """Values for JSON: 5 significant digits, whole numbers in full, None for what is not finite."""
    is_whole = values == np.round(values)
    return [
        None if not math.isfinite(value) else int(value) if whole else float(f"{value:.5g}")
        for value, whole in zip(values.tolist(), is_whole.tolist(), strict=True)
    ]


def smooth(y: np.ndarray, is_log: bool) -> np.ndarray:
    """Centred mean that skips NaN: over +-4 % of the step's number on a log axis, +-1 % of the run on a linear one,
    so that its width on the page is about constant."""
    n, index = len(y), np.arange(len(y))
    half = (index * 0.04).astype(int) if is_log else np.full(n, n // 100)
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, n)
    is_finite = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(is_finite, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(is_finite)])
    total, count = sums[high] - sums[low], counts[high] - counts[low]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def path(x: np.ndarray, y: np.ndarray) -> str:
    """SVG path data; the line breaks at NaN, and a single point is the round cap of a line of length 0."""
    is_drawn = np.isfinite(y)
    is_start = is_drawn & ~np.append(False, is_drawn[:-1])
    points = zip(x[is_drawn], y[is_drawn], is_start[is_drawn], strict=True)
    return "".join(f"M{px:.1f} {py:.1f}h0" if start else f"L{px:.1f} {py:.1f}" for px, py, start in points)


@dataclass
class Chart:
    """Layers in data coordinates, and what the template needs to draw them; a layer's `css` class sets its colour."""

    title: str
    width: int
    height: int
    tokens: np.ndarray  # seen at each step; the x axis goes from their lowest to their highest, or from 0
    is_log_x: bool = False
    from_zero: bool = False
    note: str = ""  # what the curve may hide, in words
    legend: list = field(default_factory=list)  # (colour, text)
    lines: list = field(default_factory=list)  # (css, x, y); css "raw": a point for each step of its run
    rescaled: list = field(default_factory=list)  # (css, x, y): replaces that of `lines` where x has the other scale
    dots: list = field(default_factory=list)  # (css, x, y, text on hover)
    bands: list = field(default_factory=list)  # (css, x, low, high)
    boxes: list = field(default_factory=list)  # (css, x up to which, y below which); they do not widen the axes
    markers: list = field(default_factory=list)  # (css, x, label, text on hover, id of the element it links to), by x

    def add_smoothed(self, css: str, xs: np.ndarray, ys: np.ndarray) -> None:
        self.lines.append((css, xs, smooth(ys, self.is_log_x)))
        self.rescaled.append((css, xs, smooth(ys, not self.is_log_x)))

    def x_axis(self) -> Axis:
        low, high = (self.tokens.min(), self.tokens.max()) if self.is_log_x else (0.0, self.tokens.max() or 1.0)
        return Axis(low, high, LEFT, self.width - RIGHT, self.is_log_x)

    def y_axis(self) -> Axis:
        num_rows = len({marker["top"] for marker in self.placed_markers() if marker["label"]})
        # A reference may be longer than this run: its later part must not widen the axis.
        values = [y[xs <= self.tokens.max()] for _, xs, *curves in self.lines + self.bands for y in curves]
        values.append([value for _, _, value, _ in self.dots])
        top = TOP + LABEL_ROW * num_rows
        return build_y_axis(np.concatenate(values), self.height - BOTTOM, top, self.from_zero)

    def shapes(self) -> list[tuple[str, str]]:
        """(css, path data) of the layers inside the plot, the lowest first."""
        x, y, shapes = self.x_axis(), self.y_axis(), []
        for css, xs, low, high in self.bands:
            shapes.append((css, path(x.place(np.append(xs, xs[::-1])), y.place(np.append(low, high[::-1]))) + "Z"))
        for css, until, below in self.boxes:
            shapes.append((css, f"M{x.start} {y.place(below):.1f}H{x.place(until):.1f}V{y.start}H{x.start}Z"))
        for css, xs, ys in self.lines:
            px, values = decimate(x.place(xs), ys)
            shapes.append((css, path(px, y.place(values))))
        return shapes

    def scene(self, rows: dict[int, np.ndarray]) -> dict:
        """The layers in data coordinates, for JSON; of lines with a point for every step ("raw") the `rows` of their
        run, without x. A line of another run than 0 has it in its css: "raw run1"."""
        x, y = self.x_axis(), self.y_axis()
        bands = [(css, *thin(xs, low), thin(xs, high)[1]) for css, xs, low, high in self.bands]
        return {
            "log": self.is_log_x,
            "zero": self.from_zero,
            "width": self.width,
            "x": [x.start, x.end],
            "y": [y.start, TOP],
            "yRange": [y.low, y.high],
            "bands": [{"x": plain(xs), "low": plain(low), "high": plain(high)} for _, xs, low, high in bands],
            "boxes": [{"until": float(until), "below": below} for _, until, below in self.boxes],
            "lines": [_describe(line, rows) for line in self.lines],
            "rescaled": [_describe(line, rows) for line in self.rescaled],
        }

    def placed_markers(self) -> list[dict]:
        """The markers in pixels. A label is right of its line, or left of it at the end of the page, in the first row
        where it overlaps no other; `top` is that of its row, None without a label."""
        axis, row_ends, placed = self.x_axis(), [], []
        for css, tokens, label, text, target in self.markers:
            x, width = axis.pixel(tokens), len(label) * CHARACTER + 8
            start, end = (x - width, x) if x + width > self.width else (x, x + width)
            marker = {"css": css, "x": x, "label": label, "text": text, "start": start, "end": end, "top": None}
            marker |= {"tokens": tokens, "target": target}
            if label:
                row = next((row for row, used in enumerate(row_ends) if used < start), len(row_ends))
                row_ends[row : row + 1] = [end]
                marker["top"] = LABEL_TOP + LABEL_ROW * row
            placed.append(marker)
        return placed


def _describe(line: tuple[str, np.ndarray, np.ndarray], rows: dict[int, np.ndarray]) -> dict:
    css, xs, ys = line
    kind, _, run = css.partition(" run")
    if kind == "raw":
        return {"css": css, "y": plain(ys[rows[int(run or 0)]])}
    xs, ys = thin(xs, ys)
    return {"css": css, "x": plain(xs), "y": plain(ys)}
