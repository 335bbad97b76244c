"""Healthy runs of one config -> a reference with a band that comes from their measured noise."""

import json
import statistics
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from recipe.errors import UserError
from recipe.guards.records import read_columns
from recipe.guards.trajectory import optimizer_family
from recipe.rundir import write_json
from recipe.verdict import HEALTHY

WINDOW = 10
POINTS = 40
# Half the band is this many standard deviations, between seeds and steps, of a window's median, and at least the
# second number, in nats: a margin that was chosen, not measured, for other corpus versions and other machines.
DEVIATIONS = 6
MIN_HALF_WIDTH = 0.25
# The part of each run's configuration that the provenance stores; what must agree is in the facts of `load_run`.
ARGUMENTS = (
    "source",
    "block_size",
    "optim",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "train_tokens",
    "train_seed",
)


def record_reference(out: Path, run_dirs: list[Path]) -> Path:
    """Write the reference of `run_dirs` to `out`. Raises `UserError` unless the runs are finished, from a
    clean checkout, healthy, and of one config."""
    runs = [load_run(run_dir) for run_dir in run_dirs]
    first = runs[0]["facts"]
    for run_dir, run in zip(run_dirs, runs, strict=True):
        different = [name for name in first if run["facts"][name] != first[name]]
        if different:
            raise UserError(f"{run_dir}: another config than {run_dirs[0]}: {', '.join(different)} differ")
    curves = [run["steps"] for run in runs]
    write_json(
        out,
        {
            "name": out.stem,
            "description": f"Recorded from {len(runs)} healthy runs of {Path(runs[0]['config_path']).name}.",
            "provenance": {"runs": [run["provenance"] for run in runs], "date": datetime.now(UTC).date().isoformat()},
            "belongs_to": first,
            "window": WINDOW,
            "above": "warning",
            "points": [point_at(step, curves) for step in choose_steps(len(curves[0]["loss"]))],
        },
    )
    return out


def load_run(run_dir: Path) -> dict:
    """The run's facts and steps, or `UserError` with the reason why it cannot be a reference."""
    try:
        run = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{run_dir}: not a run directory ({error})") from error
    verdict = run.get("result", {}).get("verdict")
    steps, *_ = read_columns(run_dir / "steps.jsonl", ("tokens_seen", "loss"))
    if verdict != HEALTHY or not len(steps["loss"]) or run["finished"] is None:
        raise UserError(f"{run_dir}: a reference comes from finished, healthy runs; this one's verdict is {verdict}")
    if run["is_dirty"]:
        raise UserError(f"{run_dir}: the code was changed and not committed; commit and run again")
    arguments = run["arguments"]
    facts = {
        **{name: run["model"][name] for name in ("parameters", "vocab_size", "block_size")},
        "tokens_per_step": int(steps["tokens_seen"][0]),
        "train_tokens": int(steps["tokens_seen"][-1]),
        "learning_rate": arguments["learning_rate"],
        "optimizer": optimizer_family(arguments["optim"]),
        "source": arguments["source"],
        "is_new_model": arguments["model_config"] is not None,
    }
    provenance = {
        "commit": run["commit"],
        "versions": run["versions"],
        "device": run["device"],
        "corpus": run["source"]["content_hash"],
        **{name: arguments[name] for name in ("seed", "train_seed")},
        **{name: run["result"][name] for name in ("eval_loss", "train_seconds")},
        "arguments": {name: arguments[name] for name in ARGUMENTS},
    }
    return {"facts": facts, "steps": steps, "provenance": provenance, "config_path": run["config_path"]}


def choose_steps(num_steps: int) -> list[int]:
    """About 40 steps, evenly spaced in log(step), from one window on."""
    ratio = (num_steps / WINDOW) ** (1 / (POINTS - 1))
    return sorted({min(num_steps, round(WINDOW * ratio**i)) for i in range(POINTS)})


def point_at(step: int, curves: list[dict[str, np.ndarray]]) -> dict:
    """Median and band of a window of steps around `step` (1-based), over all runs."""
    start = max(0, min(step - 1 - WINDOW // 2, len(curves[0]["loss"]) - WINDOW))
    windows = [curve["loss"][start : start + WINDOW].tolist() for curve in curves]
    medians = [statistics.median(window) for window in windows]
    loss = statistics.fmean(medians)
    # A window's median scatters like its losses' deviation / sqrt(window) * 1.25; runs add their own spread.
    within = statistics.fmean(statistics.stdev(window) for window in windows) * 1.25 / WINDOW**0.5
    between = statistics.stdev(medians) if len(medians) > 1 else 0.0
    half = max(MIN_HALF_WIDTH, DEVIATIONS * (within**2 + between**2) ** 0.5)
    curve = {"loss": loss, "low": loss - half, "high": loss + half}
    rounded = {name: round(value, 4) for name, value in curve.items()}
    return {"step": step, "tokens": int(curves[0]["tokens_seen"][step - 1]), **rounded}
