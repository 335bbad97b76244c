"""Draws README's pictures of the demo, healthy and without the label shift: the losses, and the report of each run.

python -m tests.picture                     trains the demo twice, then draws docs/demo_loss.svg and docs/report_*.png
python -m tests.picture HEALTHY UNSHIFTED   draws them from two run directories
"""

import sys
import tempfile
from html import escape
from pathlib import Path
from unittest import mock

import numpy as np
from transformers import LlamaForCausalLM
from transformers.trainer_callback import DefaultFlowCallback

from recipe.__main__ import run
from recipe.chart import Chart, compact, smooth
from recipe.guards.records import read_lines
from recipe.report import write_report
from tests.browser import EXECUTABLE, MISSING, headless
from tests.test_demo import DEMO, unshifted

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "demo_loss.svg"
WIDTH, HEIGHT = 960, 440
BELOW_WINDOW = 10  # steps of the mean that the guard compares with the n-gram model
SHOWN_STEPS = 240  # of the run without the label shift, which would stay flat from there on
REPORT_WIDTH, REPORT_SCALE = 1180, 0.75  # pixels of the page, and of the picture for each of them

# Colours as in the report, on a background of its own: readable on light and dark pages.
STYLE = """
:root { --bg: #fff; --fg: #1b2130; --muted: #5d6678; --grid: #e4e7ec; --healthy: #18794e; --unshifted: #c1121f;
  --floor: #7c3aed; --error: #c1121f; --warning: #a65f00; --info: #0b7285 }
@media (prefers-color-scheme: dark) {
  :root { --bg: #11141b; --fg: #e6e9f0; --muted: #9aa4b5; --grid: #2a3040; --healthy: #56d39a; --unshifted: #ff7b7b;
    --floor: #b79cff; --error: #ff7b7b; --warning: #f0b04f; --info: #56c8dc }
}
text { font: 13px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; paint-order: stroke; stroke: var(--bg);
  stroke-width: 4px }
path { fill: none; stroke-linecap: round; stroke-linejoin: round }
.bg { fill: var(--bg) } .grid { stroke: var(--grid) } .tick { fill: var(--muted); font-size: 12px }
.healthy { stroke: var(--healthy); stroke-width: 2.4 } text.healthy { fill: var(--healthy) }
.unshifted { stroke: var(--unshifted); stroke-width: 2.4 } text.unshifted { fill: var(--unshifted) }
.floor { stroke: var(--floor); stroke-width: 1.6; stroke-dasharray: 6 5 } text.floor { fill: var(--floor) }
text.curve { stroke: var(--bg); stroke-width: 4px; stroke-dasharray: none; font-weight: 600 }
.error { color: var(--error) } .warning { color: var(--warning) } .info { color: var(--info) }
path.marker { stroke: currentColor; stroke-width: 1.4; stroke-dasharray: 3 3 }
text.marker { fill: currentColor; font: 600 11px ui-monospace, "DejaVu Sans Mono", monospace }
"""


def train_both(folder: Path) -> tuple[Path, Path]:
    """Run directories of the shipped demo, as it is and with the label shift removed from outside."""
    healthy, broken = folder / "demo", folder / "demo_labels_not_shifted"
    assert run(["train", DEMO, "--output_dir", str(healthy)]) == 0
    on_step_end = DefaultFlowCallback.on_step_end

    def end_early(self, args, state, control, **kwargs):
        control = on_step_end(self, args, state, control, **kwargs)
        control.should_training_stop |= state.global_step >= SHOWN_STEPS
        return control

    no_shift = mock.patch.object(LlamaForCausalLM, "loss_function", unshifted)
    with no_shift, mock.patch.object(DefaultFlowCallback, "on_step_end", end_early):
        assert run(["train", DEMO, "--output_dir", str(broken)]) == 0
    return healthy, broken


def take_screenshots(runs: dict[str, Path], folder: Path) -> None:
    """`report_NAME.png` of each run's report, its upper part. Needs a Chromium."""
    with tempfile.TemporaryDirectory() as profile, headless(Path(profile)) as browser:
        for name, run_dir in runs.items():
            page = browser.open(write_report(run_dir).resolve().as_uri(), REPORT_WIDTH)
            page.screenshot(folder / f"report_{name}.png", until=".to-end", scale=REPORT_SCALE)
            page.close()


def column(steps: list[dict], key: str) -> np.ndarray:
    return np.array([np.nan if record.get(key) is None else record[key] for record in steps], dtype=np.float64)


def build_chart(healthy: Path, broken: Path) -> Chart:
    """Both losses, the n-gram floor on the same tokens, and a marker for each warning and error of the broken run."""
    runs = {"healthy": read_lines(healthy / "steps.jsonl"), "unshifted": read_lines(broken / "steps.jsonl")}
    del runs["unshifted"][SHOWN_STEPS:]
    tokens = column(runs["healthy"], "tokens_seen")
    chart = Chart("Loss of the demo", WIDTH, HEIGHT, tokens, is_log_x=True, from_zero=True)
    floor = column(runs["healthy"], "floor")
    floor = np.convolve(floor[np.isfinite(floor)], np.full(BELOW_WINDOW, 1 / BELOW_WINDOW), mode="valid")
    chart.lines.append(("floor", tokens[BELOW_WINDOW - 1 :][: len(floor)], floor))
    for css, steps in runs.items():
        chart.lines.append((css, column(steps, "tokens_seen"), smooth(column(steps, "loss"), is_log=True)))
    seen = {}
    for finding in read_lines(broken / "findings.jsonl"):
        if finding["severity"] != "info":
            seen.setdefault(finding["id"], finding)
    for name, first in seen.items():
        label = f"{name}, step {first['step']}"
        chart.markers.append((first["severity"], first["tokens_seen"], label, first["found"], ""))
    return chart


def label_curve(css: str, xs: np.ndarray, ys: np.ndarray) -> tuple[float, float, str]:
    """Where the name of a curve ends, in pixels, and the name: above the end of the healthy one, below that of the
    n-gram model, beside the fall of the unshifted one."""
    last, near_end = xs[-1], xs > xs[-1] - 230
    if css == "unshifted":
        fall = np.argmax(ys > ys[-1] - 60)  # y grows downwards
        return xs[fall] - 14, ys[fall], "without label shift: the model copies its input"
    if css == "healthy":
        return last - 4, ys[near_end].min() - 10, "healthy"
    return last - 4, ys[near_end].max() + 20, "n-gram model on the same tokens"


def draw(chart: Chart) -> str:
    x, y = chart.x_axis(), chart.y_axis()
    parts = [f'<rect class="bg" width="{WIDTH}" height="{HEIGHT}"/>']
    for tick in range(9):  # nats
        at = y.pixel(tick)
        parts.append(f'<path class="grid" d="M{x.start} {at}H{x.end}"/>')
        parts.append(f'<text class="tick" x="{x.start - 7}" y="{at + 4}" text-anchor="end">{tick}</text>')
    for tick in x.ticks():
        at = x.pixel(tick)
        parts.append(f'<path class="grid" d="M{at} {y.end}V{y.start + 4}"/>')
        parts.append(f'<text class="tick" x="{at}" y="{y.start + 18}" text-anchor="middle">{compact(tick)}</text>')
    words = f"tokens seen, log scale; one step is {chart.tokens[0]:,.0f} tokens"
    parts.append(f'<text class="tick" x="{x.end}" y="{y.start + 34}" text-anchor="end">{words}</text>')
    parts.append(f'<text class="tick" x="{x.start + 6}" y="{y.start - 8}">training loss, nats per token</text>')
    parts += [f'<path class="{css}" d="{data}"/>' for css, data in chart.shapes()]
    markers = chart.placed_markers()
    for marker in markers:
        parts.append(f'<path class="marker {marker["css"]}" d="M{marker["x"]} {marker["top"]}V{y.start}"/>')
    for marker in markers:
        dx, anchor = (-4, "end") if marker["start"] < marker["x"] else (4, "start")
        parts.append(
            f'<text class="marker {marker["css"]}" x="{marker["x"] + dx}" y="{marker["top"] + 8}" '
            f'text-anchor="{anchor}">{escape(marker["label"])}</text>'
        )
    for css, xs, ys in chart.lines:
        right, bottom, words = label_curve(css, x.place(xs), y.place(ys))
        parts.append(f'<text class="curve {css}" x="{right:.0f}" y="{bottom:.0f}" text-anchor="end">{words}</text>')
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    title = "<title>Loss of the demo, healthy and without the label shift; findings are marked</title>"
    body = "\n".join([title, f"<style>{STYLE}</style>", *parts])
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box} role="img">\n{body}\n</svg>\n'


def main(arguments: list[str]) -> None:
    healthy, broken = map(Path, arguments) if arguments else train_both(ROOT / "runs" / "picture")
    OUT.write_text(draw(build_chart(healthy, broken)), encoding="utf-8")
    if EXECUTABLE is None:
        sys.exit(f"the pictures of the reports are as they were: {MISSING}")
    take_screenshots({"healthy": healthy, "broken": broken}, OUT.parent)
    print(*sorted(OUT.parent.glob("report_*.png")), OUT, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
