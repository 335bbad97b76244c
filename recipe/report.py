"""A run directory -> report.html, one self-contained page. Values are computed here and shown by `templates/`.

Reads only the run's files, and works with missing ones: crashed runs are those that need a report most. The page is
whole without its script (`templates/*.js`), which adds values under the pointer, zoom and other axes.
"""

import json
from collections import Counter
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup

from recipe.chart import MAX_ROWS, Chart, choose_rows, compact, plain
from recipe.errors import UserError
from recipe.guards import MEANINGS
from recipe.guards.callback import FOLDER
from recipe.guards.records import iterate_lines, number, parse_object, read_columns
from recipe.redact import redact_all, without_folders
from recipe.verdict import HEALTHY

RUN_FILES = ("run.json", "steps.jsonl", "evals.jsonl", "findings.jsonl", "samples.jsonl")
STEP_FIELDS = ("step", "tokens_seen", "loss", "grad_norm", "learning_rate", "tokens_per_second", "floor")
SEVERITIES = ("error", "warning", "info")
TEMPLATES = Path(__file__).parent / "templates"
SCRIPTS = ("chart.js", "report.js")  # one module of the page
NEAR_FINDING = 50  # steps before and after a finding that the page holds, of a run too long to hold all
TRAIN_LOSS_STEPS = 20  # the train loss shown is the mean of this many last steps: a single one is noisy
SMALL_CHARTS = (  # title, field of the step records, unit
    ("Gradient norm", "grad_norm", "before clipping: "),
    ("Learning rate", "learning_rate", ""),
    ("Throughput", "tokens_per_second", "tokens/s: "),
)


@dataclass(frozen=True)
class Run:
    """The content of a run directory without paths of this machine; `gaps` describes in words what is missing."""

    name: str
    info: dict  # run.json
    steps: dict[str, np.ndarray]  # a column for each of STEP_FIELDS
    evals: list[dict]
    findings: list[dict]  # the most severe first
    samples: list[dict]  # the latest first
    gaps: list[str]

    @property
    def num_steps(self) -> int:
        return len(self.steps["step"])

    @property
    def last_step(self) -> dict:
        """Step and tokens seen of the last record."""
        return {key: int(self.steps[key][-1]) for key in ("step", "tokens_seen")} if self.num_steps else {}

    def part(self, key: str) -> dict:
        """A section of run.json, empty where it is missing."""
        return self.info.get(key) or {}


def folder_of(run_dir: Path) -> Path:
    """Where the run's files are: the guards in someone's own Trainer write into a folder of its `output_dir`."""
    return run_dir / FOLDER if not _holds_run(run_dir) and (run_dir / FOLDER).is_dir() else run_dir


def _holds_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in RUN_FILES)


def load_run(run_dir: Path) -> Run:
    """Reads what there is of a run directory; UserError where there is no run."""
    run_dir = folder_of(run_dir)
    if not _holds_run(run_dir):
        raise UserError(f"no run in {run_dir}: expected a directory with {RUN_FILES[0]} or {RUN_FILES[1]} in it")
    file, gaps = run_dir / RUN_FILES[0], []
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    info = redact_all(parse_object(text))  # an older version may have written credentials
    if info is None:
        gaps.append(f"{file.name} is missing or cannot be read")
    steps, num_records, num_lines = read_columns(run_dir / RUN_FILES[1], STEP_FIELDS)
    _note_gap(run_dir / RUN_FILES[1], num_records, num_lines, gaps)
    evals, findings, samples = (_read_records(run_dir / name, gaps) for name in RUN_FILES[2:])
    if info and not info.get("source"):  # someone's own Trainer: it may evaluate nothing, and draws no samples
        gaps = [gap for gap in gaps if not gap.endswith(("evals.jsonl is missing", "samples.jsonl is missing"))]
    # A damaged record is shown as far as it goes.
    findings = [{**each, "likely_causes": _list(each.get("likely_causes"))} for each in map(without_folders, findings)]
    findings.sort(key=_severity_first)
    samples.sort(key=lambda sample: -(number(sample.get("step")) or 0))
    name = run_dir.resolve().parent.name if run_dir.name == FOLDER else run_dir.resolve().name
    return Run(name, without_folders(info or {}), steps, _placed(evals), findings, samples, gaps)


def write_report(run_dir: Path) -> Path:
    """Writes `report.html` into the run directory and returns its path. UserError where there is no run."""
    folder = folder_of(run_dir)
    return write_page(make_report(folder), folder / "report.html")


def make_report(run_dir: Path, is_watched: bool = False) -> str:
    """The page of a run directory. UserError where there is no run. `is_watched`: without a result it goes on."""
    run = load_run(run_dir)
    is_running = is_watched and not run.part("result") and not run.info.get("failure")
    counts = Counter(finding.get("severity") for finding in run.findings)
    has_ended_badly = run.part("result").get("exit_code") not in (0, 130, 143) and not is_running
    has_failed = has_ended_badly or counts["error"]
    is_healthy = run.part("result").get("verdict") == HEALTHY
    charts = [_loss_chart(run), *(_small_chart(run, *chart) for chart in SMALL_CHARTS)] if run.num_steps else []
    values = {
        "run": run,
        "is_running": is_running,
        "counts": counts,
        "colour": "error" if has_failed else "warning" if counts["warning"] else "good" if is_healthy else "info",
        "figures": key_figures(run),
        "charts": charts,
        "curves": curves_of({0: run}, charts) if charts else None,
        "meanings": MEANINGS,
        "environment": _environment(run),
    }
    return render("report.html.j2", values)


def render(template: str, values: dict) -> str:
    """A template of `templates/`, filled with `values`, escaped, with the script of the charts."""
    script = "".join((TEMPLATES / name).read_text(encoding="utf-8") for name in SCRIPTS)
    return _environment_of_templates().get_template(template).render({"script": Markup(script)} | values)


@cache
def _environment_of_templates() -> jinja2.Environment:
    """Compiled once for a process, of which a test suite trains hundreds of runs."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,  # `show` makes a dash of what was not recorded, at any depth
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    to_json = partial(json.dumps, ensure_ascii=False)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    environment.filters |= {"show": show, "plural": plural, "compact": compact, "json": to_json}
    return environment


def write_page(text: str, file: Path) -> Path:
    """A sample may hold half a surrogate pair, which UTF-8 cannot encode."""
    file.write_text(text, encoding="utf-8", errors="replace")
    return file


def _read_records(file: Path, gaps: list[str]) -> list[dict]:
    """The records of a file; adds what is missing to `gaps`."""
    lines = list(iterate_lines(file))
    records = [record for record in lines if record is not None]
    _note_gap(file, len(records), len(lines), gaps)
    return records


def _note_gap(file: Path, num_records: int, num_lines: int, gaps: list[str]) -> None:
    if not file.is_file():
        gaps.append(f"{file.name} is missing")
    elif not num_lines and file.name != "findings.jsonl":  # created at the start, may stay empty
        gaps.append(f"{file.name} is empty")
    elif num_records < num_lines:
        gaps.append(f"{file.name}: {num_lines - num_records} of {num_lines} records cannot be read")


def _placed(records: list[dict]) -> list[dict]:
    return [r for r in records if number(r.get("step")) is not None and number(r.get("tokens_seen")) is not None]


def _list(value) -> list:
    return value if isinstance(value, list) else []


def _severity_first(finding: dict) -> tuple:
    severity = finding.get("severity")
    return (*SEVERITIES, severity).index(severity), number(finding.get("step")) or 0


def _column(records: list[dict], key: str) -> np.ndarray:
    """One field of all records as float64, NaN where it is missing, null or not finite."""
    values = (number(record.get(key)) for record in records)
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def show(value, digits: int | None = None, unit: str = "") -> str:
    """A number with thousands separators; text, NaN and infinity unchanged; a dash for what was not recorded."""
    if value is None or isinstance(value, jinja2.Undefined):
        return "–"
    if number(value) is None:
        return str(value)
    text = f"{value:,}" if digits is None else f"{value:,.{digits}f}"
    # Only the perplexity of a broken model is longer than a card is wide.
    return f"{text if digits is None or len(text) <= 11 else f'{value:.3g}'}{unit}"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def key_figures(run: Run) -> dict[str, tuple[str, str, str]]:
    """The numbers a reader looks for first: key -> (label, value, note), with a dash for what was not recorded."""
    model, device = run.part("model"), run.part("device")
    last_eval, last_step = run.evals[-1] if run.evals else {}, run.last_step
    counted = {"tokens_seen": last_step.get("tokens_seen"), "steps": last_step.get("step"), **run.part("result")}
    tail, speeds = run.steps["loss"][-TRAIN_LOSS_STEPS:], run.steps["tokens_per_second"]
    train_loss = float(tail.mean()) if len(tail) else None  # NaN if one of them is: a mean of the others would hide it
    speed = float(np.nanmedian(speeds)) if np.isfinite(speeds).any() else None
    of_tail = f"nats/token, mean of the last {plural(len(tail), 'step')}" if run.num_steps else "no step recorded"
    at_step = f"at step {show(last_eval['step'])}" if last_eval else "no evaluation recorded"
    entropy, seconds = counted.get("unigram_entropy"), counted.get("train_seconds")
    accuracy = last_eval.get("eval_next_token_accuracy")
    # The time is since the resume; tokens and steps are those of the whole run.
    time = "Training time, last session" if run.info.get("resumed_from") is not None else "Training time"
    flops = f"{show(model['flops_per_token'])} FLOPs per token" if model.get("flops_per_token") else ""
    return {
        "train_loss": ("Train loss", show(train_loss, 3), of_tail),
        "eval_loss": ("Eval loss", show(last_eval.get("eval_loss"), 3), f"nats/token, {at_step}"),
        "perplexity": ("Perplexity", show(last_eval.get("eval_perplexity"), 2), at_step),
        "bits_per_byte": ("Bits per byte", show(last_eval.get("eval_bits_per_byte"), 3), at_step),
        "accuracy": ("Next-token accuracy", show(accuracy and 100 * accuracy, 1, " %"), at_step),
        "unigram_entropy": (
            "Unigram entropy",
            show(entropy, 3),
            "nats/token, of a model that only knows token frequencies",
        ),
        "tokens_seen": ("Tokens seen", show(counted["tokens_seen"]), f"in {show(counted['steps'])} steps"),
        "minutes": (time, show(seconds and seconds / 60, 1, " min"), "wall clock, evaluations included"),
        "tokens_per_second": ("Tokens per second", show(speed, 0), f"median, on {device.get('name') or 'unknown'}"),
        "parameters": ("Parameters", show(model.get("parameters")), flops),
    }


def _environment(run: Run) -> dict[str, dict]:
    """The parts of run.json without the result, by title."""
    about = ("started", "finished", "resumed_from", "config_path", "commit", "is_dirty")
    return {
        "Run": {key: run.info.get(key) for key in about},
        "Reference": {key: value for key, value in run.part("trajectory").items() if key != "points"},
        **{key.capitalize(): run.part(key) for key in ("device", "model", "source", "versions", "arguments")},
    }


def _extremes(run: Run, key: str) -> str:
    """What a curve may hide, in words: its last and highest value, and where it is not a number."""
    values, steps = run.steps[key], run.steps["step"]
    is_finite = np.isfinite(values)
    if not is_finite.any():
        return "never recorded"
    last, highest = values[is_finite][-1], np.nanargmax(values)
    words = f"last {compact(last)}, highest {compact(values[highest])} at step {show(int(steps[highest]))}"
    if not is_finite.all():
        first = show(int(steps[is_finite.argmin()]))
        words += f"; not finite in {plural(np.sum(~is_finite), 'step')}, the first of them step {first}"
    return words


def _small_chart(run: Run, title: str, key: str, unit: str) -> Chart:
    tokens, values = run.steps["tokens_seen"], run.steps[key]
    chart = Chart(title, 350, 200, tokens, from_zero=True, note=unit + _extremes(run, key))
    chart.lines.append(("raw", tokens, values))
    if key == "learning_rate":  # a schedule has no noise
        chart.lines.append(("line", tokens, values))
    else:
        chart.add_smoothed("line", tokens, values)
    return chart


def curves_of(runs: dict[int, Run], charts: list[Chart]) -> dict:
    """What the page's script draws of runs, by their places: every step, or of a long run the extremes and the steps
    near findings."""
    rows = {place: _rows_of(run, min(MAX_ROWS, 2 * MAX_ROWS // len(runs))) for place, run in runs.items()}
    return {
        "runs": {
            place: {
                "steps": plain(run.steps["step"][rows[place]]),
                "tokens": plain(run.steps["tokens_seen"][rows[place]]),
            }
            for place, run in runs.items()
        },
        "num_steps": sum(run.num_steps for run in runs.values()),
        "num_rows": sum(map(len, rows.values())),
        "charts": [chart.scene(rows) for chart in charts],
    }


def _rows_of(run: Run, limit: int) -> np.ndarray:
    columns = [run.steps[key] for key in ("loss", *(key for _, key, _ in SMALL_CHARTS))]
    rows, steps = set(choose_rows(columns, limit)), run.steps["step"]
    for finding in run.findings[:20]:  # the most severe
        at = np.searchsorted(steps, number(finding.get("step")) or 0)
        rows.update(range(max(0, at - NEAR_FINDING), min(len(steps), at + NEAR_FINDING + 1)))
    return np.array(sorted(rows))


def _loss_chart(run: Run) -> Chart:
    tokens, loss = run.steps["tokens_seen"], run.steps["loss"]
    chart = Chart("Loss against tokens seen", 1092, 460, tokens, is_log_x=bool(0 < 20 * tokens[0] < tokens[-1]))
    chart.note = f"nats per token: {_extremes(run, 'loss')}"
    _add_reference(chart, run.part("trajectory"), run.steps["step"])
    entropy = number(run.part("result").get("unigram_entropy"))
    if entropy is not None:
        chart.lines.append(("unigram", np.array([0, tokens[-1]]), np.array([entropy, entropy])))
        chart.legend.append(
            ("unigram", f"unigram entropy {entropy:.2f}: the loss of a model that only knows token frequencies")
        )
    _add_envelope(chart, run.steps)
    chart.lines.append(("raw", tokens, loss))
    chart.add_smoothed("line", tokens, loss)
    chart.legend.append(("loss", "train loss: each step thin, smoothed thick"))
    for record in run.evals:
        if number(record.get("eval_loss")) is not None:
            text = f"eval loss {record['eval_loss']:.4f} at step {show(record['step'])}"
            chart.dots.append(("eval", record["tokens_seen"], record["eval_loss"], text))
    chart.legend += [("eval", "eval loss")] if chart.dots else []
    chart.markers += _finding_markers(run)
    return chart


def _add_envelope(chart: Chart, steps: dict[str, np.ndarray]) -> None:
    """The n-gram model's loss on the run's own tokens, where the guards used it."""
    judged = np.isfinite(steps["floor"])
    if judged.any():
        tokens, floors = steps["tokens_seen"][judged], steps["floor"][judged]
        chart.add_smoothed("floor", tokens, floors)
        chart.legend.append(("floor", "n-gram baseline on the same tokens; no correct model is below it so early"))


def _add_reference(chart: Chart, trajectory: dict, steps: np.ndarray) -> None:
    """Band, curve and red flags of the reference, where the run has one."""
    points = trajectory.get("points")
    if not points:
        return
    tokens, low, loss, high = (_column(points, key) for key in ("tokens", "low", "loss", "high"))
    chart.bands.append(("band", tokens, low, high))
    chart.lines.append(("reference", tokens, loss))
    chart.legend.append(("band", f"reference {trajectory.get('name')}: curve and band"))
    for flag in trajectory.get("red_flags") or []:
        chart.boxes.append(("flag", np.interp(flag["before_step"], steps, chart.tokens), flag["loss_below"]))
        text = f"red flag: loss below {flag['loss_below']:g} before step {show(flag['before_step'])}"
        chart.legend.append(("error", text))


def _finding_markers(run: Run) -> list[tuple[str, float, str, str, str]]:
    """A line at each finding, which links to its row; only the first of an id is labelled, with its count."""
    counts, markers = Counter(str(finding.get("id")) for finding in run.findings), []
    numbered = enumerate(run.findings, start=1)
    for order, finding in sorted(numbered, key=lambda pair: number(pair[1].get("tokens_seen")) or 0):
        name = str(finding.get("id"))
        count = counts.pop(name, 0)
        label = f"{name} x{count}" if count > 1 else name if count else ""
        text = f"{name} at step {show(finding.get('step'))}: {finding.get('found')}"
        at = number(finding.get("tokens_seen")) or 0
        markers.append((str(finding.get("severity")), at, label, text, f"finding-{order}"))
    return markers
