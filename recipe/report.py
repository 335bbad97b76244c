"""A run directory -> report.html, one self-contained page, and the model card of `final/`.

Reads the run's files only, and makes do with what is there: the run that died is the one whose report is wanted.
"""

import json
from collections import Counter
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path

import numpy as np

from recipe import chart
from recipe.chart import Chart, smooth
from recipe.errors import UserError

RUN_FILES = ("run.json", "steps.jsonl", "evals.jsonl", "findings.jsonl", "samples.jsonl")
SEVERITIES = ("error", "warning", "info")
TRAIN_LOSS_STEPS = 20  # the train loss shown is the mean of so many last steps: one alone is noise
ENDINGS = {
    0: "The run finished.",
    1: "The run stopped on an unexpected error (exit code 1).",
    2: "The configuration was refused (exit code 2).",
    3: "A guard stopped the run (exit code 3).",
    4: "Data or disk failed (exit code 4).",
    130: "The run was interrupted and saved a checkpoint (exit code 130).",
    143: "The run was terminated and saved a checkpoint (exit code 143).",
}
MEANINGS = {
    "missing_label_shift": "Each position is scored on the token it can already see, so the model learns to copy.",
    "double_label_shift": "Labels are shifted twice: the model learns the token after the next.",
    "wrong_loss_target": "The loss is not computed on the next token.",
    "non_causal_attention": "A position's logits depend on later tokens.",
    "cross_document_attention": "A document's logits depend on its neighbour in the block.",
    "row_leak": "One row of the batch changes another's logits.",
    "accumulation_mismatch": "Accumulated micro-batches do not give the gradient of the whole batch.",
    "init_loss_off": "The first loss is not that of an untrained model.",
    "loss_below_envelope": "The loss is lower than an honest model can reach on this data so early.",
    "loss_above_envelope": "The model has not learned even the token frequencies or the use of context.",
    "loss_off_reference": "The loss has left the band of the reference run.",
    "loss_spike": "The loss jumped far above its recent level.",
    "loss_not_finite": "The loss is NaN or infinite.",
    "grad_norm_off": "The gradient norm is far from its usual level.",
    "repeated_data": "The model was given blocks that it had already seen.",
    "train_eval_overlap": "Text of the hold-out is in the training data.",
    "source_exhausted": "The source ended and a further pass over it began.",
    "resume_replay": "After resuming, data came round again.",
    "resume_jump": "After resuming, the loss did not go on where it had stopped.",
    "learning_rate_off": "The learning rate is not what the schedule says.",
    "frozen_parameters": "Parameters that should train do not move.",
    "lost_updates": "Updates are too small for the precision of the weights and are rounded away.",
    "untied_weights": "Embedding and head should share their weights and do not.",
    "token_budget_off": "The tokens counted are not the tokens planned.",
    "token_out_of_range": "Token ids lie outside the model's vocabulary.",
    "eos_never_target": "The end of a document is never a target, so the model cannot learn to stop.",
    "eval_not_repeatable": "Two evaluations of one model differ.",
    "eval_train_mismatch": "Eval and train loss of the same data differ.",
    "rank_divergence": "The weights differ between ranks.",
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
ol{margin:0;padding-left:18px}
code,pre{font-family:ui-monospace,"DejaVu Sans Mono",monospace;font-size:13px}
pre{background:var(--card);border-radius:8px;padding:12px 14px;margin:6px 0 2px;white-space:pre-wrap;
overflow-wrap:anywhere}summary{cursor:pointer;font-weight:600;margin:8px 0}details td:first-child{width:34%}
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
        section = self.info.get(key)
        return section if isinstance(section, dict) else {}


def load_run(run_dir: Path) -> Run:
    """Reads a run directory as far as it goes; UserError where there is no run."""
    if not any((run_dir / name).is_file() for name in RUN_FILES):
        what = "holds no run" if run_dir.is_dir() else "does not exist"
        raise UserError(f"{run_dir} {what}: expected a run directory with {RUN_FILES[0]} or {RUN_FILES[1]} in it.")
    gaps = []
    info = _read_lines(run_dir / "run.json", gaps, is_whole_file=True)
    steps, evals, findings, samples = (_read_lines(run_dir / name, gaps) for name in RUN_FILES[1:])
    # A resumed run writes the steps since its checkpoint again; the later record is the one that counts.
    steps, evals = ({record["step"]: record for record in _placed(records)} for records in (steps, evals))
    return Run(
        name=run_dir.resolve().name,
        info=info[0] if info else {},
        steps=[steps[step] for step in sorted(steps)],
        evals=[evals[step] for step in sorted(evals)],
        findings=sorted(findings, key=_severity_first),
        samples=samples,
        gaps=gaps,
    )


def write_report(run_dir: Path) -> Path:
    """Writes `report.html` into the run directory and returns its path. UserError where there is no run."""
    run = load_run(run_dir)
    sections = (_headline, _figures, _charts, _findings, _guards, _samples, _environment)
    body = "\n".join(section(run) for section in sections)
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(run.name)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{chart.STYLE}{STYLE}</style></head>"
        f"<body>\n{body}\n</body></html>\n"
    )
    # A sample may hold half a surrogate pair, which UTF-8 cannot say.
    (run_dir / "report.html").write_text(page, encoding="utf-8", errors="replace")
    return run_dir / "report.html"


def _read_lines(file: Path, gaps: list[str], is_whole_file: bool = False) -> list[dict]:
    """JSON objects of a file, one a line or one in all; what cannot be read is noted in `gaps`."""
    if not file.is_file():
        gaps.append(f"{file.name} is missing")
        return []
    text = file.read_text(encoding="utf-8", errors="replace")
    lines = [text] if is_whole_file else text.split("\n")
    lines = [line for line in lines if line.strip()]
    records = [record for record in map(_parse, lines) if record is not None]
    if not lines and file.name != "findings.jsonl":  # which a run makes at its start, and may have no use for
        gaps.append(f"{file.name} is empty")
    elif len(records) < len(lines):
        gaps.append(f"{file.name}: {len(lines) - len(records)} of {len(lines)} records cannot be read")
    return records


def _parse(line: str) -> dict | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _placed(records: list[dict]) -> list[dict]:
    return [r for r in records if _number(r.get("step")) is not None and _number(r.get("tokens_seen")) is not None]


def _severity_first(finding: dict) -> tuple:
    severity = finding.get("severity")
    rank = SEVERITIES.index(severity) if severity in SEVERITIES else len(SEVERITIES)
    return rank, _number(finding.get("step")) or 0


def _number(value) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and np.isfinite(value) else None


def _column(records: list[dict], key: str) -> np.ndarray:
    """One field of all records as float64, NaN where it is missing, null or not finite."""
    values = (_number(record.get(key)) for record in records)
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _show(value, digits: int | None = None, unit: str = "") -> str:
    """A number with thousands separators; text, NaN and infinity as they are; a dash for None."""
    if value is None:
        return "–"
    if _number(value) is None:
        return str(value)
    if digits is not None and abs(value) >= 1e12:  # the perplexity of a broken model
        return f"{value:.3g}{unit}"
    return f"{value:,.{digits}f}{unit}" if digits is not None else f"{value:,}{unit}"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def key_figures(run: Run) -> dict[str, tuple[str, str, str]]:
    """The numbers a reader looks for first: key -> (label, value, note), with a dash for what was not recorded."""
    result, model, device = run.part("result"), run.part("model"), run.part("device")
    last_eval = run.evals[-1] if run.evals else {}
    last_step = run.steps[-1] if run.steps else {}
    tail = _column(run.steps[-TRAIN_LOSS_STEPS:], "loss")
    train_loss = float(tail.mean()) if len(tail) else None  # NaN if one is: a mean of the others would hide it
    entropy, accuracy = result.get("unigram_entropy"), last_eval.get("eval_next_token_accuracy")
    at_step = f"at step {_show(last_eval['step'])}" if last_eval else "no evaluation recorded"
    speeds = _column(run.steps, "tokens_per_second")
    speed = float(np.nanmedian(speeds)) if np.isfinite(speeds).any() else None
    tokens = result.get("tokens_seen", last_step.get("tokens_seen"))
    steps = result.get("steps", last_step.get("step"))
    seconds = result.get("train_seconds")
    flops = f"{_show(model.get('flops_per_token'))} FLOPs per token"
    of_tail = f"nats/token, mean of the last {_plural(len(tail), 'step')}" if run.steps else "no step recorded"
    return {
        "train_loss": ("Train loss", _show(train_loss, 3), of_tail),
        "eval_loss": ("Eval loss", _show(last_eval.get("eval_loss"), 3), f"nats/token, {at_step}"),
        "perplexity": ("Perplexity", _show(last_eval.get("eval_perplexity"), 2), at_step),
        "bits_per_byte": ("Bits per byte", _show(last_eval.get("eval_bits_per_byte"), 3), at_step),
        "accuracy": ("Next-token accuracy", _show(accuracy and 100 * accuracy, 1, " %"), at_step),
        "unigram_entropy": ("Unigram entropy", _show(entropy, 3), _against_entropy(last_eval, entropy)),
        "tokens_seen": ("Tokens seen", _show(tokens), f"in {_show(steps)} steps"),
        "minutes": ("Training time", _show(seconds and seconds / 60, 1, " min"), "wall clock, evaluations included"),
        "tokens_per_second": ("Tokens per second", _show(speed, 0), f"median, on {device.get('name') or 'unknown'}"),
        "parameters": ("Parameters", _show(model.get("parameters")), flops),
    }


def _against_entropy(last_eval: dict, entropy: float | None) -> str:
    eval_loss = _number(last_eval.get("eval_loss"))
    if eval_loss is None or _number(entropy) is None:
        return "nats/token"
    side = "below" if eval_loss < entropy else "ABOVE"
    return f"nats/token; eval loss is {abs(entropy - eval_loss):.3f} {side} it"


def _headline(run: Run) -> str:
    result = run.part("result")
    counts = Counter(finding.get("severity") for finding in run.findings)
    verdict = str(result.get("verdict") or "Unfinished")
    colour = _verdict_colour(result, counts)
    nouns = {"error": "error", "warning": "warning", "info": "note"}
    found = ", ".join(_plural(counts[severity], noun) for severity, noun in nouns.items()) + "."
    when = ", ".join(f"{key} {run.info[key]}" for key in ("started", "finished") if run.info.get(key))
    gaps = f'<p class="notice">This report lacks: {escape("; ".join(run.gaps))}.</p>' if run.gaps else ""
    return (
        f'<h1>{escape(run.name)}</h1><p class="verdict {colour}">{escape(verdict[:1].upper() + verdict[1:])}</p>'
        f'<p>{escape(_ending(run))} {found} <span class="muted">{escape(when)}</span></p>{gaps}'
    )


def _verdict_colour(result: dict, counts: Counter) -> str:
    if result.get("exit_code") not in (0, 130, 143) or counts["error"]:
        return "error"
    return "warning" if counts["warning"] else "good"


def _ending(run: Run) -> str:
    exit_code = run.part("result").get("exit_code")
    if exit_code is not None:
        return ENDINGS.get(exit_code, f"The run ended with exit code {exit_code}.")
    last = f"step {_show(run.steps[-1]['step'])}" if run.steps else "before its first step"
    return f"The run recorded no result: it is still going, or it died. Last heard of: {last}."


def _figures(run: Run) -> str:
    tiles = (
        f'<div class="figure" data-key="{key}"><span class="muted">{label}</span><b>{escape(value)}</b>'
        f"<small>{escape(note)}</small></div>"
        for key, (label, value, note) in key_figures(run).items()
    )
    return f'<div class="figures">{"".join(tiles)}</div>'


def _charts(run: Run) -> str:
    if not run.steps:
        return '<h2>Curves</h2><p class="muted">No step was recorded, so there is nothing to draw.</p>'
    small = "".join(
        f"<div><h3>{title}</h3><small>{_extremes(run, key, unit)}</small>{_small_chart(run, title, key)}</div>"
        for title, key, unit in (
            ("Gradient norm", "grad_norm", "before clipping"),
            ("Learning rate", "learning_rate", ""),
            ("Throughput", "tokens_per_second", "tokens/s"),
        )
    )
    return f'<h2>Loss</h2>{_loss_chart(run)}<div class="small">{small}</div>'


def _extremes(run: Run, key: str, unit: str) -> str:
    """In words what a curve may hide: its last and highest value, and where it is not a number."""
    values = _column(run.steps, key)
    finite = np.flatnonzero(np.isfinite(values))
    if not len(finite):
        return f"{unit} never recorded".strip()
    highest = finite[values[finite].argmax()]
    at = _show(run.steps[highest]["step"])
    words = f"{unit}: last {chart.compact(values[finite[-1]])}, highest {chart.compact(values[highest])} at step {at}"
    num_gaps = len(values) - len(finite)
    if num_gaps:
        first = _show(run.steps[np.flatnonzero(~np.isfinite(values))[0]]["step"])
        words += f"; not finite in {_plural(num_gaps, 'step')}, the first of them step {first}"
    return escape(words.removeprefix(": "))


def _small_chart(run: Run, title: str, key: str) -> str:
    tokens, values = _column(run.steps, "tokens_seen"), _column(run.steps, key)
    if not np.isfinite(values).any():
        return ""
    drawing = Chart(title, 350, 200, from_zero=True)
    is_noisy = key != "learning_rate"
    drawing.lines.append(("raw" if is_noisy else "line", tokens, values))
    if is_noisy:
        drawing.lines.append(("line", tokens, smooth(values, is_log=False)))
    return drawing.svg()


def _loss_chart(run: Run) -> str:
    tokens, loss = _column(run.steps, "tokens_seen"), _column(run.steps, "loss")
    is_log = 0 < 20 * tokens[0] < tokens[-1]
    drawing = Chart("Loss against tokens seen", 1092, 460, is_log_x=bool(is_log))
    legend = _draw_reference(drawing, run)
    drawing.lines += [("raw", tokens, loss), ("line", tokens, smooth(loss, drawing.is_log_x))]
    legend.append(("loss", "train loss: each step thin, smoothed thick"))
    scored = [record for record in run.evals if _number(record.get("eval_loss")) is not None]
    if scored:
        texts = [f"eval loss {record['eval_loss']:.4f} at step {_show(record['step'])}" for record in scored]
        drawing.points.append(("eval", _column(scored, "tokens_seen"), _column(scored, "eval_loss"), texts))
        legend.append(("eval", "eval loss"))
    entropy = _number(run.part("result").get("unigram_entropy"))
    if entropy is not None:
        drawing.levels.append(("unigram", entropy))
        legend.append(("unigram", f"unigram entropy {entropy:.2f}: the loss of token frequencies alone"))
    drawing.markers += _finding_markers(run)
    keys = "".join(f'<span><i style="color:var(--{colour})"></i>{escape(text)}</span>' for colour, text in legend)
    head = f'<small>{_extremes(run, "loss", "nats per token")}</small><div class="legend">{keys}</div>'
    return f'{head}<div class="scroll">{drawing.svg()}</div>'


def _draw_reference(drawing: Chart, run: Run) -> list[tuple[str, str]]:
    """Band, curve and red flags of the reference, where the run has one; returns its entries of the legend."""
    trajectory = run.part("trajectory")
    points = trajectory.get("points") or []
    if not points:
        return []
    tokens, low, loss, high = (_column(points, key) for key in ("tokens", "low", "loss", "high"))
    drawing.bands.append(("band", tokens, low, high))
    drawing.references.append(("reference", tokens, loss))
    legend = [("band", f"reference {trajectory.get('name')}: curve and band")]
    for flag in trajectory.get("red_flags") or []:
        until = np.interp(flag["before_step"], _column(points, "step"), tokens)
        text = f"red flag: loss below {flag['loss_below']:g} before step {_show(flag['before_step'])}"
        drawing.boxes.append(("flag", until, flag["loss_below"], text))
        legend.append(("error", text))
    return legend


def _finding_markers(run: Run) -> list[tuple[str, float, str, str]]:
    """A line at each finding; only the first of an id is labelled, with how often it came."""
    counts = Counter(finding.get("id") for finding in run.findings)
    labelled, markers = set(), []
    for finding in sorted(run.findings, key=lambda finding: _number(finding.get("step")) or 0):
        name = str(finding.get("id"))
        label = "" if name in labelled else name + (f" x{counts[name]}" if counts[name] > 1 else "")
        labelled.add(name)
        text = f"{name} at step {_show(finding.get('step'))}: {finding.get('found')}"
        severity = finding.get("severity") if finding.get("severity") in SEVERITIES else "info"
        markers.append((severity, _number(finding.get("tokens_seen")) or 0, label, text))
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
    shown = {key: escape(_show(finding.get(key))) for key in fields}
    causes = "".join(f"<li>{escape(str(cause))}</li>" for cause in finding.get("likely_causes") or [])
    causes = f"<p><small>Likely causes, the first most likely:</small></p><ol>{causes}</ol>" if causes else ""
    evidence = escape(json.dumps(finding.get("evidence") or {}, ensure_ascii=False))
    return (
        f'<tr class="finding"><td class="{shown["severity"]}"><b>{shown["severity"]}</b></td>'
        f'<td class="num">{shown["step"]}<br><small>{shown["tokens_seen"]} tokens</small></td>'
        f"<td><code>{shown['id']}</code><br>{MEANINGS.get(finding.get('id'), '')}</td>"
        f"<td>Found {shown['found']}.<br>Expected {shown['expected']}."
        f"<details><summary>Evidence</summary><code>{evidence}</code></details></td>"
        f"<td>{escape(str(finding.get('action') or ''))}{causes}</td></tr>"
    )


def _guards(run: Run) -> str:
    guards = run.part("result").get("guards") or {}
    if not guards:
        return '<h2>Guards</h2><p class="muted">Which guards could judge was not recorded.</p>'
    judged = ", ".join(f"<code>{escape(name)}</code>" for name in guards.get("judged") or []) or "none"
    disabled = ", ".join(f"<code>{escape(name)}</code>" for name in guards.get("disabled") or []) or "none"
    silent = "".join(
        f"<li><code>{escape(name)}</code>: {escape(str(reason))}</li>"
        for name, reason in (guards.get("cannot_judge") or {}).items()
    )
    return (
        f"<h2>Guards</h2><p><b>Judged:</b> {judged}.</p><p><b>Could not judge:</b> {'' if silent else 'none.'}</p>"
        f"<ul>{silent}</ul><p><b>Disabled:</b> {disabled}.</p>"
    )


def _samples(run: Run) -> str:
    if not run.samples:
        return '<h2>Samples</h2><p class="muted">None recorded.</p>'
    ordered = sorted(run.samples, key=lambda sample: -(_number(sample.get("step")) or 0))
    groups = [list(group) for _, group in groupby(ordered, key=lambda sample: sample.get("step"))]
    parts = [f"<h2>Samples</h2><p>{_sample_head(groups[0][0])}, the latest.</p>{_sample_texts(groups[0])}"]
    for group in groups[1:]:
        parts.append(f"<details><summary>{_sample_head(group[0])}</summary>{_sample_texts(group)}</details>")
    return "".join(parts)


def _sample_head(sample: dict) -> str:
    return f"Step {escape(_show(sample.get('step')))}, {escape(_show(sample.get('tokens_seen')))} tokens"


def _sample_texts(samples: list[dict]) -> str:
    parts = []
    for sample in samples:
        prompt, text = escape(str(sample.get("prompt") or "")), escape(str(sample.get("text") or ""))
        share = _number(sample.get("words_in_corpus"))
        known = "" if share is None else f"<small>{100 * share:.0f} % of its words are in the corpus</small>"
        parts.append(f"<pre><b>{prompt}</b>{text}</pre>{known}")
    return "".join(parts)


def _environment(run: Run) -> str:
    about = {key: run.info.get(key) for key in ("started", "finished", "config_path", "commit", "is_dirty")}
    tables = {"Run": about, "Reference": {k: v for k, v in run.part("trajectory").items() if k != "points"}}
    for title, key in (("Device", "device"), ("Model", "model"), ("Source", "source"), ("Versions", "versions")):
        tables[title] = run.part(key)
    tables["Resolved arguments"] = run.part("arguments")
    return "<h2>Environment and arguments</h2>" + "".join(_details(*item) for item in tables.items())


def _details(title: str, table: dict) -> str:
    if not table:
        return f'<p class="muted">{title}: not recorded.</p>'
    rows = "".join(
        f"<tr><td><code>{escape(str(key))}</code></td><td>{escape(_plain(value))}</td></tr>"
        for key, value in table.items()
    )
    return f"<details><summary>{title}</summary><table>{rows}</table></details>"


def _plain(value) -> str:
    """A setting as it would be written in a config: JSON, but text without quotes."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def write_model_card(run_dir: Path, model_dir: Path) -> Path:
    """Writes `README.md` for the trained model into `model_dir`, from the run's files only, and returns its path."""
    run = load_run(run_dir)
    model, source, arguments = run.part("model"), run.part("source"), run.part("arguments")
    start = arguments.get("model_name_or_path")
    card = f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- llama
- pretraining
---

# {run.name}

A base language model of {_show(model.get("parameters"))} parameters, block size {_show(model.get("block_size"))},
{_show(model.get("vocab_size"))} token ids, {f"trained on from `{start}`" if start else "trained from scratch"}.

Trained on {_show(run.part("result").get("tokens_seen"))} tokens of `{source.get("name") or "a source not recorded"}`:
{_show(source.get("documents"))} documents, {_show(source.get("bytes"))} bytes, content hash
`{source.get("content_hash") or "not recorded"}`.

## Figures

| | | |
|---|---|---|
{_markdown_rows(run)}

Evaluation is on documents of the same source that were held out of training.

Verdict of the run's guards: **{run.part("result").get("verdict") or "unfinished, no result recorded"}**

{_markdown_findings(run)}

## Limits

It continues text. It was not taught to follow instructions or to decline any, and what it writes may be false or
offensive. The run's `report.html` has its curves and findings.

## Resolved arguments

```json
{json.dumps(arguments, indent=1, ensure_ascii=False)}
```
"""
    model_dir.mkdir(parents=True, exist_ok=True)
    (model_dir / "README.md").write_text(card, encoding="utf-8", errors="replace")
    return model_dir / "README.md"


def _markdown_rows(run: Run) -> str:
    rows = (f"| {' | '.join(text.replace('|', '/') for text in figure)} |" for figure in key_figures(run).values())
    return "\n".join(rows)


def _markdown_findings(run: Run) -> str:
    lines = [f"- {f.get('severity')}: `{f.get('id')}` at step {_show(f.get('step'))}" for f in run.findings]
    return "\n".join(lines) or "No findings."
