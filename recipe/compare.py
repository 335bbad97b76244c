"""`compare`: what differs between runs, in one page, a summary, and JSON. Reads the runs and changes nothing in them.

The first run is the baseline. Each other one is held to it: settings, the first step that differs in its raw floats,
and the end of the loss curve against its noise (`noise.py`).
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recipe.chart import Chart
from recipe.errors import UserError
from recipe.guards.records import number
from recipe.noise import END_SHARE, MIN_STEPS, EndDifference, compare_ends, compare_with_seeds, scatter_of_seeds
from recipe.plain_json import dumps
from recipe.redact import without_folders
from recipe.report import (
    RUN_FILES,
    SEVERITIES,
    SMALL_CHARTS,
    TRAIN_LOSS_STEPS,
    Run,
    curves_of,
    key_figures,
    load_run,
    plural,
    render,
)
from recipe.report import write_page as write_html
from recipe.trained import say_what_is_in

MAX_RUNS = 8  # colours of the page
COMPARED = ("loss", "grad_norm", "learning_rate", "tokens_seen")  # fields of the steps, raw
# Settings that name a run or say where it writes: different in all runs.
NAMES = ("output_dir", "run_name", "hub_model_id", "hub_token", "resume_from_checkpoint", "project")
SEEDS = ("seed", "train_seed")
# What the canonical order of the training rows depends on, beside the source itself.
STREAM = ("train_seed", "block_size", "tokenizer", "train_skip", "eval_skip", "eval_documents", "num_lanes")
HOLD_OUT = ("block_size", "tokenizer", "eval_skip", "eval_documents")
WITHOUT_SEEDS = "no noise of seeds is in this, which is larger; to measure it, add a run with another --seed"
SHOWN = 8  # settings in the summary; the page has all


@dataclass(frozen=True)
class Comparison:
    """`names`: of the runs, distinct, without this machine's folders. `result`: JSON-able, see `compare_runs`."""

    names: list[str]
    runs: list[Run]
    result: dict


def compare_runs(paths: list[Path]) -> Comparison:
    """Returns `runs` (figures of each), `settings` (key -> value in each run, where they differ) and `against_first`
    (for each later run: where it parts, how its end differs, or why that cannot be said). Raises `UserError`."""
    folders = [find_run(path) for path in paths]
    if not 2 <= len(folders) <= MAX_RUNS:
        raise UserError(f"compare takes 2 to {MAX_RUNS} runs, got {len(folders)}")
    for place, folder in enumerate(folders):
        if folder in folders[:place]:
            raise UserError(f"{paths[place]}: the same run as {paths[folders.index(folder)]}; name each once")
    runs = [load_run(folder) for folder in folders]
    names = distinct_names(folders)
    ends = find_ends(runs)
    result = {
        "runs": [{"run": name, **describe(run)} for name, run in zip(names, runs, strict=True)],
        "settings": find_differences(runs),
        "against_first": [
            {"run": name, "first": names[0], "parting": find_parting(runs[0], run), **end}
            for name, run, end in zip(names[1:], runs[1:], ends, strict=True)
        ],
    }
    return Comparison(names, runs, result)


def find_run(path: Path) -> Path:
    """The run directory at `path`, or the one that a `final` or checkpoint at `path` is in."""
    if path.is_dir():
        for folder in (path.resolve(), path.resolve() / "_recipe", path.resolve().parent):
            if any((folder / name).is_file() for name in RUN_FILES[:2]):
                return folder
    found = say_what_is_in(path) if path.is_dir() else "is a file" if path.exists() else "no such folder"
    raise UserError(f"{path}: {found}; expected a run: a folder with {RUN_FILES[0]} and {RUN_FILES[1]}")


def distinct_names(folders: list[Path]) -> list[str]:
    """The last parts of each path, as many as are needed to tell all of them apart."""
    for count in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def describe(run: Run) -> dict:
    last_eval = run.evals[-1] if run.evals else {}
    counts = Counter(finding.get("severity") for finding in run.findings)
    tail = run.steps["loss"][-TRAIN_LOSS_STEPS:]
    return {
        "verdict": run.part("result").get("verdict") or "unfinished",
        "is_finished": run.info.get("finished") is not None,
        "steps": run.last_step.get("step", 0),
        "tokens_seen": run.last_step.get("tokens_seen", 0),
        "train_loss": float(tail.mean()) if len(tail) else None,
        **{name: number(last_eval.get(name)) for name in ("eval_loss", "eval_bits_per_byte")},
        "findings": {severity: counts[severity] for severity in SEVERITIES},
    }


# --- settings


def settings_of(run: Run) -> dict:
    """All that may explain a difference, by dotted name, without the folders of this machine."""
    values = {key: value for key, value in run.part("arguments").items() if key not in NAMES}
    parts = {name: run.part(name) for name in ("model", "source", "device", "versions")}
    parts["source"] = {key: parts["source"].get(key) for key in ("name", "documents", "content_hash")}
    values |= {f"{name}.{key}": value for name, part in parts.items() for key, value in part.items()}
    return without_folders(values | {key: run.info.get(key) for key in ("commit", "is_dirty")})


def find_differences(runs: list[Run]) -> dict[str, list]:
    found = [settings_of(run) for run in runs]
    names = dict.fromkeys(name for settings in found for name in settings)
    columns = {name: [settings.get(name) for settings in found] for name in names}
    return {name: values for name, values in columns.items() if any(value != values[0] for value in values)}


def are_same(runs: list[Run], names: tuple[str, ...]) -> bool:
    """Whether the runs read the same text under these settings."""
    known = [settings_of(run) for run in runs]
    return all(
        settings.get(name) == known[0].get(name) for settings in known for name in ("source.content_hash", *names)
    )


# --- where they part


def find_parting(first: Run, other: Run) -> dict:
    """Over the steps that both recorded: `common_steps`, and `differences`: for each field of COMPARED that differs
    anywhere, the first step where its raw floats differ, and the two values."""
    steps, rows, other_rows = np.intersect1d(first.steps["step"], other.steps["step"], return_indices=True)
    differences = {}
    for name in COMPARED:
        left, right = first.steps[name][rows], other.steps[name][other_rows]
        differ = (left != right) & ~(np.isnan(left) & np.isnan(right))
        if differ.any():
            at = int(differ.argmax())
            differences[name] = {"step": int(steps[at]), "values": [float(left[at]), float(right[at])]}
    return {"common_steps": len(steps), "differences": differences}


# --- the end


def find_ends(runs: list[Run]) -> list[dict]:
    """For each run but the first: `end`, of `EndDifference`, or None and `not_judged`, why."""
    groups = group_by_settings(runs)
    by_eval = are_same(runs, HOLD_OUT) and all(run.evals for run in runs)
    values = [_end_value(run, by_eval) for run in runs]
    is_known = all(value is not None and np.isfinite(value) for value in values)
    ends_of = {key: [value for value, each in zip(values, groups, strict=True) if each == key] for key in groups}
    scatter = scatter_of_seeds(list(ends_of.values())) if is_known else None
    found = []
    for run, key, value in list(zip(runs, groups, values, strict=True))[1:]:
        reason, end = why_not_comparable(runs[0], run), None
        if reason is None and key == groups[0]:
            gap = "" if not is_known else f"; their gap of {value - values[0]:+.4f} nats comes from the seeds"
            reason = f"they differ in nothing but their seeds{gap}"
        elif reason is None and scatter is not None:
            end = compare_with_seeds(
                ends_of[groups[0]], ends_of[key], scatter, "eval loss" if by_eval else "train loss"
            )
        elif reason is None:
            curves = [{name: each.steps[name] for name in ("tokens_seen", "loss")} for each in (runs[0], run)]
            end = compare_ends(*curves, same_batches=are_same([runs[0], run], STREAM))
            few = f"fewer than {MIN_STEPS} steps in the last {END_SHARE:.0%} of the common tokens"
            reason = None if end else f"{few}, or a loss that is not finite"
        found.append({"end": _as_dict(end), "not_judged": reason})
    return found


def _as_dict(end: EndDifference | None) -> dict | None:
    return None if end is None else {**vars(end), "is_more_than_noise": end.is_more_than_noise}


def _end_value(run: Run, by_eval: bool) -> float | None:
    figures = describe(run)
    return figures["eval_loss"] if by_eval else figures["train_loss"]


def group_by_settings(runs: list[Run]) -> list[str]:
    """A key of each run, the same for those that differ in nothing but their seeds."""
    keys = []
    for run in runs:
        settings = {name: value for name, value in settings_of(run).items() if name not in SEEDS}
        keys.append(dumps([settings, run.last_step], sort_keys=True))
    return keys


def why_not_comparable(first: Run, other: Run) -> str | None:
    if None in (each.part("source").get("content_hash") for each in (first, other)):
        return "the text that one of them was trained on is not recorded"
    if not are_same([first, other], ()):
        return "they were trained on different text"
    known = [settings_of(run) for run in (first, other)]
    if any(known[0].get(name) != known[1].get(name) for name in ("tokenizer", "model.vocab_size")):
        return "losses per token of different tokenizers cannot be compared; bits per byte can"
    return None


# --- in words


def format_comparison(comparison: Comparison, page: Path) -> str:
    """The summary: a line for each run, the settings that differ, and what is said of each pair."""
    result, lines = comparison.result, []
    width = max(map(len, comparison.names))
    for figures in result["runs"]:
        ended = "" if figures["is_finished"] else ", not finished"
        losses = f"train loss {_show(figures['train_loss'])} | eval loss {_show(figures['eval_loss'])}"
        losses += f" | bits per byte {_show(figures['eval_bits_per_byte'])}"
        counts = f"{figures['steps']:,} steps, {figures['tokens_seen']:,} tokens{ended}"
        lines.append(f"{figures['run']:<{width}}  {counts} | {losses} | {figures['verdict']}")
    settings = list(result["settings"].items())
    lines += [f"{name}: {' | '.join(map(_short, values))}" for name, values in settings[:SHOWN]]
    if len(settings) > SHOWN:
        lines.append(f"and {len(settings) - SHOWN} more settings that differ: on the page")
    lines += say_all(comparison)
    return "\n".join([*lines, f"page: {page}"])


def say_all(comparison: Comparison) -> list[str]:
    """The sentences about each run and the first, and what the noise leaves out."""
    found = comparison.result["against_first"]
    sentences = [sentence for against in found for sentence in say(against)]
    if any(against["end"] and not against["end"]["of_seeds"] for against in found):
        sentences.append(WITHOUT_SEEDS)
    return sentences


def say(against: dict) -> list[str]:
    """The sentences about one run and the first."""
    pair = f"{against['run']} against {against['first']}"
    return [f"{pair}: {say_parting(against['parting'])}", f"{pair}: {say_end(against)}"]


def say_parting(parting: dict) -> str:
    common, differences = plural(parting["common_steps"], "common step"), parting["differences"]
    if not parting["common_steps"]:
        return "no step was recorded by both"
    if not differences:
        return f"the same in all {common}, bit for bit"
    words = [
        f"{name} at step {found['step']:,} ({found['values'][0]:.9g} | {found['values'][1]:.9g})"
        for name, found in sorted(differences.items(), key=lambda item: item[1]["step"])
    ]
    return f"first difference in {'; '.join(words)}; {common}"


def say_end(against: dict) -> str:
    end = against["end"]
    if end is None:
        return f"the ends are not compared: {against['not_judged']}"
    if end["difference"] == end["noise"] == 0:
        return "the ends are the same"
    words = "higher" if end["difference"] > 0 else "lower"
    judged = "more than the noise" if end["is_more_than_noise"] else "within the noise"
    ends = f"its end is {abs(end['difference']):.4f} nats {words} ({end['what']})"
    return f"{ends}, {judged} of ±{end['noise']:.4f} (95 %), measured by {end['measured_by']}"


def _show(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _short(value) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


# --- the page


def write_page(comparison: Comparison, file: Path) -> Path:
    """One self-contained page. Raises `UserError` where it cannot be written, or would lie in a run."""
    folder = file.resolve().parent
    if any((folder / name).is_file() for name in RUN_FILES[:2]):
        raise UserError(f"--out {file}: lies in a run, and runs stay as they are; choose another folder")
    if not folder.is_dir() or file.is_dir():
        raise UserError(f"--out {file}: {'is a folder' if file.is_dir() else 'no such folder'}; name a file to write")
    names, runs = comparison.names, comparison.runs
    figures = [key_figures(run) for run in runs]
    with_steps = {place: run for place, run in enumerate(runs) if run.num_steps}
    charts = draw_charts(names, with_steps)
    rows = [(figures[0][key][0], [each[key][1] for each in figures]) for key in figures[0]]
    values = {
        "run": {"name": " | ".join(names)},
        "names": names,
        "verdicts": [each["verdict"] for each in comparison.result["runs"]],
        "sentences": say_all(comparison),
        "rows": rows,
        "settings": comparison.result["settings"],
        "charts": charts,
        "curves": _curves(names, with_steps, charts),
    }
    return write_html(render("compare.html.j2", values), file)


def draw_charts(names: list[str], runs: dict[int, Run]) -> list[Chart]:
    """The curves over each other. `runs`: those with steps, by their places among `names`."""
    if not runs:
        return []
    tokens = np.concatenate([run.steps["tokens_seen"] for run in runs.values()])
    is_log = bool(0 < 20 * tokens.min() < tokens.max())
    loss = Chart("Loss against tokens seen", 1092, 460, tokens, is_log_x=is_log, note="nats per token")
    for place, run in runs.items():
        _add_curve(loss, place, run, run.steps["loss"])
        loss.legend.append((f"run{place}", names[place]))
        for record in run.evals:
            if number(record.get("eval_loss")) is not None:
                text = f"{names[place]}: eval loss {record['eval_loss']:.4f} at step {record['step']:,}"
                loss.dots.append((f"eval run{place}", record["tokens_seen"], record["eval_loss"], text))
    charts = [loss]
    gaps = {place: _gap(runs[0], run) for place, run in runs.items() if place} if 0 in runs else {}
    if gaps := {place: gap for place, gap in gaps.items() if np.isfinite(gap).any()}:
        note = "nats per token, at the same tokens"
        chart = Chart(f"Loss minus that of {names[0]}", 1092, 260, tokens, is_log_x=is_log, note=note)
        for place, gap in gaps.items():
            _add_curve(chart, place, runs[place], gap)
        charts.append(chart)
    for title, key, unit in SMALL_CHARTS:
        chart = Chart(title, 350, 200, tokens, from_zero=True, note=unit.removesuffix(": "))
        for place, run in runs.items():
            _add_curve(chart, place, run, run.steps[key])
        charts.append(chart)
    return charts


def _add_curve(chart: Chart, place: int, run: Run, values: np.ndarray) -> None:
    chart.lines.append((f"raw run{place}", run.steps["tokens_seen"], values))
    chart.add_smoothed(f"line run{place}", run.steps["tokens_seen"], values)


def _gap(first: Run, other: Run) -> np.ndarray:
    """For each step of `other`, how far its loss is above that of `first` after as many tokens; NaN without such."""
    rows, other_rows = np.intersect1d(first.steps["tokens_seen"], other.steps["tokens_seen"], return_indices=True)[1:]
    gap = np.full(other.num_steps, np.nan)
    gap[other_rows] = other.steps["loss"][other_rows] - first.steps["loss"][rows]
    return gap


def _curves(names: list[str], runs: dict[int, Run], charts: list[Chart]) -> dict | None:
    """What the page's script draws, and how it names the runs."""
    if not charts:
        return None
    curves = curves_of(runs, charts)
    for place, run in curves["runs"].items():
        run |= {"name": names[place], "colour": f"run{place}"}
    return curves
