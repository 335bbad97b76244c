"""A run directory -> report.html, one self-contained page.

Reads the run's files only, and makes do with what is there: the run that died is the one whose report is wanted.
"""

import json
from collections import Counter
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from recipe.chart import STYLE as CHART_STYLE
from recipe.chart import Chart, compact, smooth
from recipe.errors import UserError
from recipe.guards.finding import FINDINGS
from recipe.guards.records import parse_object, read_and_count_lines

RUN_FILES = ("run.json", "steps.jsonl", "evals.jsonl", "findings.jsonl", "samples.jsonl")
SEVERITIES = {"error": "error", "warning": "warning", "info": "note"}  # most severe first, with their nouns
TRAIN_LOSS_STEPS = 20  # the train loss shown is the mean of so many last steps: one alone is noise
ENDINGS = {  # a run that fails otherwise writes no result
    0: "The run finished.",
    3: "A guard stopped the run (exit code 3).",
    130: "The run was interrupted and saved a checkpoint (exit code 130).",
    143: "The run was terminated and saved a checkpoint (exit code 143).",
}
STYLE = """*{box-sizing:border-box}
body{margin:0 auto;padding:32px 24px 64px;max-width:1140px;background:var(--bg);color:var(--fg);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:17px;font-weight:600;color:var(--muted);margin:0;overflow-wrap:anywhere}
.verdict{font-size:clamp(26px,4vw,40px);line-height:1.15;font-weight:700;margin:2px 0 6px}
h2{font-size:20px;margin:40px 0 10px}h3{font-size:15px;margin:0 0 2px}p{margin:4px 0}
.muted,small{color:var(--muted);font-size:13px}.error{color:var(--error)}.warning{color:var(--warning)}
.info{color:var(--info)}.good{color:var(--good)}
.notice{border-left:4px solid var(--warning);background:var(--card);padding:8px 14px;margin:16px 0}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:10px;margin:22px 0}
.figure{background:var(--card);border-radius:8px;padding:10px 14px}
.figure b{display:block;font-size:25px;line-height:1.3;font-variant-numeric:tabular-nums}
.small{display:grid;gap:22px;margin-top:24px;grid-template-columns:repeat(auto-fit,minmax(300px,1fr))}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:13px;color:var(--muted);margin:4px 0 8px}
.legend i{display:inline-block;width:20px;height:0;border-top:3px solid;margin-right:6px;vertical-align:middle}
.scroll{overflow-x:auto}.scroll>svg{min-width:760px}table{border-collapse:collapse;width:100%;font-size:14px}
th{text-align:left;color:var(--muted);font-weight:600;font-size:13px}
th,td{padding:8px 12px 8px 0;border-bottom:1px solid var(--grid);vertical-align:top}
td{overflow-wrap:anywhere}td b,td.num{white-space:nowrap;font-variant-numeric:tabular-nums}
ol{margin:0;padding-left:18px}code,pre{font-family:ui-monospace,"DejaVu Sans Mono",monospace;font-size:13px}
pre{background:var(--card);border-radius:8px;padding:12px 14px;margin:6px 0 2px;white-space:pre-wrap;
overflow-wrap:anywhere}summary{cursor:pointer;font-weight:600;margin:8px 0}
"""


@dataclass(frozen=True)
class Run:
    """What a run directory holds; `gaps` says in words what it lacks."""

    name: str
    info: dict  # run.json
    steps: list[dict]
    evals: list[dict]
    findings: list[dict]
    samples: list[dict]
    gaps: list[str]

    def part(self, key: str) -> dict:
        """A section of run.json, empty where it is missing."""
        return self.info.get(key) or {}


def load_run(run_dir: Path) -> Run:
    """Reads a run directory as far as it goes; UserError where there is no run."""
    if not any((run_dir / name).is_file() for name in RUN_FILES):
        raise UserError(f"no run in {run_dir}: expected a directory with {RUN_FILES[0]} or {RUN_FILES[1]} in it")
    file, gaps = run_dir / RUN_FILES[0], []
    info = parse_object(file.read_text(encoding="utf-8", errors="replace")) if file.is_file() else None
    if info is None:
        gaps.append(f"{file.name} is missing or cannot be read")
    steps, evals, findings, samples = (_read_records(run_dir / name, gaps) for name in RUN_FILES[1:])
    findings.sort(key=_severity_first)
    return Run(run_dir.resolve().name, info or {}, _placed(steps), _placed(evals), findings, samples, gaps)


def write_report(run_dir: Path) -> Path:
    """Writes `report.html` into the run directory and returns its path. UserError where there is no run."""
    run = load_run(run_dir)
    sections = (_headline, _figures, _charts, _findings, _guards, _samples, _environment)
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(run.name)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{CHART_STYLE}{STYLE}</style></head><body>{''.join(part(run) for part in sections)}</body></html>\n"
    )
    # A sample may hold half a surrogate pair, which UTF-8 cannot say.
    (run_dir / "report.html").write_text(page, encoding="utf-8", errors="replace")
    return run_dir / "report.html"


def _read_records(file: Path, gaps: list[str]) -> list[dict]:
    """The records of a file; what it lacks is noted in `gaps`."""
    records, num_lines = read_and_count_lines(file)
    if not file.is_file():
        gaps.append(f"{file.name} is missing")
    elif not num_lines and file.name != "findings.jsonl":  # which a run makes at its start, and may have no use for
        gaps.append(f"{file.name} is empty")
    elif len(records) < num_lines:
        gaps.append(f"{file.name}: {num_lines - len(records)} of {num_lines} records cannot be read")
    return records


def _placed(records: list[dict]) -> list[dict]:
    return [r for r in records if _number(r.get("step")) is not None and _number(r.get("tokens_seen")) is not None]


def _severity_first(finding: dict) -> tuple:
    severity = finding.get("severity")
    return (*SEVERITIES, severity).index(severity), _number(finding.get("step")) or 0


def _number(value) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and np.isfinite(value) else None


def _column(records: list[dict], key: str) -> np.ndarray:
    """One field of all records as float64, NaN where it is missing, null or not finite."""
    values = (_number(record.get(key)) for record in records)
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def show(value, digits: int | None = None, unit: str = "") -> str:
    """A number with thousands separators; text, NaN and infinity as they are; a dash for None."""
    if value is None:
        return "–"
    if _number(value) is None:
        return str(value)
    # So large is only the perplexity of a broken model.
    style = "," if digits is None else ".3g" if abs(value) >= 1e12 else f",.{digits}f"
    return f"{value:{style}}{unit}"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def key_figures(run: Run) -> dict[str, tuple[str, str, str]]:
    """The numbers a reader looks for first: key -> (label, value, note), with a dash for what was not recorded."""
    model, device = run.part("model"), run.part("device")
    last_eval, last_step = (records[-1] if records else {} for records in (run.evals, run.steps))
    counted = {"tokens_seen": last_step.get("tokens_seen"), "steps": last_step.get("step"), **run.part("result")}
    tail, speeds = _column(run.steps[-TRAIN_LOSS_STEPS:], "loss"), _column(run.steps, "tokens_per_second")
    train_loss = float(tail.mean()) if len(tail) else None  # NaN if one is: a mean of the others would hide it
    speed = float(np.nanmedian(speeds)) if np.isfinite(speeds).any() else None
    of_tail = f"nats/token, mean of the last {plural(len(tail), 'step')}" if run.steps else "no step recorded"
    at_step = f"at step {show(last_eval['step'])}" if last_eval else "no evaluation recorded"
    entropy, seconds = counted.get("unigram_entropy"), counted.get("train_seconds")
    accuracy = last_eval.get("eval_next_token_accuracy")
    # Its clock started when it was resumed; its tokens and steps are those of the whole run.
    time = "Training time, last session" if run.info.get("resumed_from") is not None else "Training time"
    flops = f"{show(model.get('flops_per_token'))} FLOPs per token"
    return {
        "train_loss": ("Train loss", show(train_loss, 3), of_tail),
        "eval_loss": ("Eval loss", show(last_eval.get("eval_loss"), 3), f"nats/token, {at_step}"),
        "perplexity": ("Perplexity", show(last_eval.get("eval_perplexity"), 2), at_step),
        "bits_per_byte": ("Bits per byte", show(last_eval.get("eval_bits_per_byte"), 3), at_step),
        "accuracy": ("Next-token accuracy", show(accuracy and 100 * accuracy, 1, " %"), at_step),
        "unigram_entropy": ("Unigram entropy", show(entropy, 3), "nats/token, by token frequencies alone"),
        "tokens_seen": ("Tokens seen", show(counted["tokens_seen"]), f"in {show(counted['steps'])} steps"),
        "minutes": (time, show(seconds and seconds / 60, 1, " min"), "wall clock, evaluations included"),
        "tokens_per_second": ("Tokens per second", show(speed, 0), f"median, on {device.get('name') or 'unknown'}"),
        "parameters": ("Parameters", show(model.get("parameters")), flops),
    }


def _headline(run: Run) -> str:
    result, counts = run.part("result"), Counter(finding.get("severity") for finding in run.findings)
    has_failed = result.get("exit_code") not in (0, 130, 143) or counts["error"]
    colour = "error" if has_failed else "warning" if counts["warning"] else "good"
    verdict = str(result.get("verdict") or "Unfinished")
    found = ", ".join(plural(counts[severity], noun) for severity, noun in SEVERITIES.items()) + "."
    when = ", ".join(f"{key} {run.info[key]}" for key in ("started", "finished") if run.info.get(key))
    gaps = f'<p class="notice">This report lacks: {escape("; ".join(run.gaps))}.</p>' if run.gaps else ""
    return (
        f'<h1>{escape(run.name)}</h1><p class="verdict {colour}">{escape(verdict[:1].upper() + verdict[1:])}</p>'
        f'<p>{escape(_ending(run))} {found} <span class="muted">{escape(when)}</span></p>{gaps}'
    )


def _ending(run: Run) -> str:
    exit_code = run.part("result").get("exit_code")
    if exit_code is not None:
        return ENDINGS.get(exit_code, f"The run ended with exit code {exit_code}.")
    last = f"step {show(run.steps[-1]['step'])}" if run.steps else "before its first step"
    if run.info.get("failure"):
        return f"The run failed: {run.info['failure']}. Last heard of: {last}."
    return f"The run recorded no result: it is still going, or it died. Last heard of: {last}."


def _figures(run: Run) -> str:
    tiles = "".join(
        f'<div class="figure" data-key="{key}"><span class="muted">{label}</span><b>{escape(value)}</b>'
        f"<small>{escape(note)}</small></div>"
        for key, (label, value, note) in key_figures(run).items()
    )
    kernels = run.part("device").get("kernels") or "not recorded"
    return f'<div class="figures">{tiles}</div><p class="muted">Kernels: {escape(str(kernels))}</p>'


def _charts(run: Run) -> str:
    if not run.steps:
        return '<h2>Curves</h2><p class="muted">No step was recorded, so there is nothing to draw.</p>'
    small = "".join(
        f"<div><h3>{title}</h3><small>{unit}{_extremes(run, key)}</small>{_small_chart(run, title, key)}</div>"
        for title, key, unit in (
            ("Gradient norm", "grad_norm", "before clipping: "),
            ("Learning rate", "learning_rate", ""),
            ("Throughput", "tokens_per_second", "tokens/s: "),
        )
    )
    return f'<h2>Loss</h2>{_loss_chart(run)}<div class="small">{small}</div>'


def _extremes(run: Run, key: str) -> str:
    """In words what a curve may hide: its last and highest value, and where it is not a number."""
    values = _column(run.steps, key)
    is_finite = np.isfinite(values)
    if not is_finite.any():
        return "never recorded"
    last, highest = values[is_finite][-1], np.nanargmax(values)
    words = f"last {compact(last)}, highest {compact(values[highest])} at step {show(run.steps[highest]['step'])}"
    if not is_finite.all():
        first = show(run.steps[is_finite.argmin()]["step"])
        words += f"; not finite in {plural(np.sum(~is_finite), 'step')}, the first of them step {first}"
    return words


def _small_chart(run: Run, title: str, key: str) -> str:
    tokens, values = _column(run.steps, "tokens_seen"), _column(run.steps, key)
    drawing = Chart(title, 350, 200, tokens, from_zero=True)
    curve = values if key == "learning_rate" else smooth(values, is_log=False)  # a schedule has no noise
    drawing.lines += [("raw", tokens, values), ("line", tokens, curve)]
    return drawing.svg()


def _loss_chart(run: Run) -> str:
    tokens, loss = _column(run.steps, "tokens_seen"), _column(run.steps, "loss")
    drawing = Chart("Loss against tokens seen", 1092, 460, tokens, is_log_x=bool(0 < 20 * tokens[0] < tokens[-1]))
    legend = _draw_reference(drawing, run.part("trajectory"))
    entropy = _number(run.part("result").get("unigram_entropy"))
    if entropy is not None:
        drawing.lines.append(("unigram", np.array([0, tokens[-1]]), np.array([entropy, entropy])))
        legend.append(("unigram", f"unigram entropy {entropy:.2f}: the loss of token frequencies alone"))
    drawing.lines += [("raw", tokens, loss), ("line", tokens, smooth(loss, drawing.is_log_x))]
    legend.append(("loss", "train loss: each step thin, smoothed thick"))
    for record in run.evals:
        if _number(record.get("eval_loss")) is not None:
            text = f"eval loss {record['eval_loss']:.4f} at step {show(record['step'])}"
            drawing.dots.append(("eval", record["tokens_seen"], record["eval_loss"], text))
    legend += [("eval", "eval loss")] if drawing.dots else []
    drawing.markers += _finding_markers(run)
    keys = "".join(f'<span><i style="color:var(--{colour})"></i>{escape(text)}</span>' for colour, text in legend)
    head = f'<small>nats per token: {_extremes(run, "loss")}</small><div class="legend">{keys}</div>'
    return f'{head}<div class="scroll">{drawing.svg()}</div>'


def _draw_reference(drawing: Chart, trajectory: dict) -> list[tuple[str, str]]:
    """Band, curve and red flags of the reference, where the run has one; returns its entries of the legend."""
    points = trajectory.get("points")
    if not points:
        return []
    steps, tokens, low, loss, high = (_column(points, key) for key in ("step", "tokens", "low", "loss", "high"))
    drawing.bands.append(("band", tokens, low, high))
    drawing.lines.append(("reference", tokens, loss))
    legend = [("band", f"reference {trajectory.get('name')}: curve and band")]
    for flag in trajectory.get("red_flags") or []:
        drawing.boxes.append(("flag", np.interp(flag["before_step"], steps, tokens), flag["loss_below"]))
        text = f"red flag: loss below {flag['loss_below']:g} before step {show(flag['before_step'])}"
        legend.append(("error", text))
    return legend


def _finding_markers(run: Run) -> list[tuple[str, float, str, str]]:
    """A line at each finding; only the first of an id is labelled, with how often it came."""
    counts, markers = Counter(str(finding.get("id")) for finding in run.findings), []
    for finding in sorted(run.findings, key=lambda finding: _number(finding.get("tokens_seen")) or 0):
        name = str(finding.get("id"))
        count = counts.pop(name, 0)
        label = f"{name} x{count}" if count > 1 else name if count else ""
        text = f"{name} at step {show(finding.get('step'))}: {finding.get('found')}"
        markers.append((escape(str(finding.get("severity"))), _number(finding.get("tokens_seen")) or 0, label, text))
    return markers


def _findings(run: Run) -> str:
    if not run.findings:
        reason = next((f" recorded: {gap}" for gap in run.gaps if gap.startswith("findings.jsonl")), "")
        return f"<h2>Findings</h2><p>None{escape(reason)}.</p>"
    head = "".join(f"<th>{name}</th>" for name in ("Severity", "Step", "Finding", "Found and expected", "What to do"))
    rows = "".join(map(_finding_row, run.findings))
    return f'<h2>Findings</h2><div class="scroll"><table><tr>{head}</tr>{rows}</table></div>'


def _finding_row(finding: dict) -> str:
    fields = ("id", "severity", "step", "tokens_seen", "found", "expected")
    shown = {key: escape(show(finding.get(key))) for key in fields}
    causes = "".join(f"<li>{escape(str(cause))}</li>" for cause in finding.get("likely_causes") or [])
    causes = f"<p><small>Likely causes, the first most likely:</small></p><ol>{causes}</ol>" if causes else ""
    evidence = escape(json.dumps(finding.get("evidence") or {}, ensure_ascii=False))
    return (
        f'<tr class="finding"><td class="{shown["severity"]}"><b>{shown["severity"]}</b></td>'
        f'<td class="num">{shown["step"]}<br><small>{shown["tokens_seen"]} tokens</small></td>'
        f"<td><code>{shown['id']}</code><br>{FINDINGS.get(finding.get('id'), '')}</td>"
        f"<td>Found {shown['found']}.<br>Expected {shown['expected']}."
        f"<details><summary>Evidence</summary><code>{evidence}</code></details></td>"
        f"<td>{escape(str(finding.get('action') or ''))}{causes}</td></tr>"
    )


def _guards(run: Run) -> str:
    guards = run.part("result").get("guards") or {}
    if not guards:
        return '<h2>Guards</h2><p class="muted">Which guards could judge was not recorded.</p>'
    reasons = (guards.get("cannot_judge") or {}).items()
    silent = "".join(f"<li><code>{escape(name)}</code>: {escape(str(reason))}</li>" for name, reason in reasons)
    return (
        f"<h2>Guards</h2><p><b>Judged:</b> {_codes(guards.get('judged'))}.</p>"
        f"<p><b>Could not judge:</b> {'' if silent else 'none.'}</p><ul>{silent}</ul>"
        f"<p><b>Disabled:</b> {_codes(guards.get('disabled'))}.</p>"
    )


def _codes(names: list[str] | None) -> str:
    return ", ".join(f"<code>{escape(name)}</code>" for name in names or []) or "none"


def _samples(run: Run) -> str:
    if not run.samples:
        return '<h2>Samples</h2><p class="muted">None recorded.</p>'
    samples = sorted(run.samples, key=lambda sample: -(_number(sample.get("step")) or 0))
    num_latest = sum(sample.get("step") == samples[0].get("step") for sample in samples)
    latest, earlier = ("".join(map(_sample, part)) for part in (samples[:num_latest], samples[num_latest:]))
    return f"<h2>Samples</h2>{latest}" + (
        f"<details><summary>Earlier ones</summary>{earlier}</details>" if earlier else ""
    )


def _sample(sample: dict) -> str:
    prompt, text, step = (escape(show(sample.get(key))) for key in ("prompt", "text", "step"))
    share = _number(sample.get("words_in_corpus"))
    known = "" if share is None else f"; {100 * share:.0f} % of its words are in the corpus"
    return f"<pre><b>{prompt}</b>{text}</pre><small>step {step}{known}</small>"


def _environment(run: Run) -> str:
    about = ("started", "finished", "resumed_from", "config_path", "commit", "is_dirty")
    tables = {
        "Run": {key: run.info.get(key) for key in about},
        "Reference": {key: value for key, value in run.part("trajectory").items() if key != "points"},
        **{key.capitalize(): run.part(key) for key in ("device", "model", "source", "versions", "arguments")},
    }
    texts = {title: json.dumps(table, indent=1, ensure_ascii=False) for title, table in tables.items()}
    rows = (f"<details><summary>{name}</summary><pre>{escape(text)}</pre></details>" for name, text in texts.items())
    return f"<h2>Environment and arguments</h2>{''.join(rows)}"
