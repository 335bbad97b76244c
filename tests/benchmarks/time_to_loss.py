"""`python -m tests.benchmarks.time_to_loss [--runs N] [--json]`: tokens and time to a given eval loss of the demo.

Two arms train the demo's model on the demo's rows, in one thread each: the recipe with its guards, and stock Trainer
with AdamW. Of each arm's sweep the run that needs the fewest tokens wins, and is repeated with more seeds. A run ends
when it has reached the loss, or has read as much as the best of its arm. What has run is kept in time_to_loss.json:
the command goes on where it was stopped. `--runs`: how many to make now.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

from recipe.data.docstrings import default_cache_dir
from tests.benchmarks.measure import run_fresh
from tests.benchmarks.races import BLOCK_SIZE, race
from tests.benchmarks.results import Result, commit, format_section, processor, write_section

RECORDS = Path(__file__).with_suffix(".json")
SEEDS = (42, 43, 44)
ARMS = {"ours": "the recipe, Muon, guards on", "stock": "stock Trainer, AdamW"}
COSINE = {"lr_scheduler_type": "cosine_with_min_lr"}
WSD = {"lr_scheduler_type": "warmup_stable_decay"}
WARM_UP = 61_440  # tokens
EMBEDDINGS = {"optim_args": "embedding_lr_ratio=3"}  # chosen by runs outside the sweep, see docs/model.md


def cosine(rate: float, rows: int, tokens: int, warm_up: int = WARM_UP, floor: float = 0.1) -> dict:
    """To `floor` of the rate at `tokens`."""
    return _schedule(rate, rows, tokens, warm_up) | COSINE | {"lr_scheduler_kwargs": {"min_lr_rate": floor}}


def wsd(rate: float, rows: int, tokens: int, warm_up: int = WARM_UP) -> dict:
    """Constant, then down to a tenth in the last 40 % of `tokens`."""
    steps = tokens // (rows * BLOCK_SIZE)
    decay = {"num_decay_steps": steps * 2 // 5, "decay_type": "linear", "min_lr_ratio": 0.1}
    return _schedule(rate, rows, tokens, warm_up) | WSD | {"lr_scheduler_kwargs": decay}


def _schedule(rate: float, rows: int, tokens: int, warm_up: int) -> dict:
    step = rows * BLOCK_SIZE
    steps = {"max_steps": tokens // step, "warmup_steps": warm_up // step}
    return {"learning_rate": rate, "per_device_train_batch_size": rows, **steps}


# At most 8 an arm and loss. AdamW's second is the demo as it was tuned for it.
SWEEP = {
    ("ours", 5.03): [
        cosine(6e-3, 8, 573_440),
        cosine(1.2e-2, 8, 573_440),
        cosine(6e-3, 4, 450_560),
        wsd(6e-3, 8, 450_560),
        cosine(8e-3, 8, 512_000, floor=0.0),
        wsd(8e-3, 8, 512_000),
        wsd(6e-3, 4, 512_000),
        wsd(6e-3, 4, 512_000) | EMBEDDINGS,
    ],
    ("stock", 5.03): [
        cosine(3e-3, 8, 1_638_400),
        cosine(3e-3, 8, 1_638_400, 2 * WARM_UP),
        cosine(3e-3, 4, 1_228_800, 2 * WARM_UP),
        wsd(3e-3, 4, 1_024_000, 2 * WARM_UP),
        cosine(3e-3, 8, 1_843_200, 2 * WARM_UP),
        cosine(5e-3, 8, 1_843_200, 2 * WARM_UP),
        cosine(2e-3, 8, 1_843_200, 2 * WARM_UP),
    ],
    ("ours", 4.6): [
        wsd(6e-3, 4, 983_040) | EMBEDDINGS,
        cosine(6e-3, 8, 983_040) | EMBEDDINGS,
        cosine(6e-3, 8, 1_075_200) | EMBEDDINGS,
    ],
    ("stock", 4.6): [cosine(3e-3, 8, 6_144_000, 2 * WARM_UP), cosine(3e-3, 8, 2_457_600, 2 * WARM_UP)],
}


def natural(word: str) -> int:
    if (number := int(word)) < 0:
        raise ValueError
    return number


# --- the runs and their records


def read_records() -> list[dict]:
    return json.loads(RECORDS.read_text()) if RECORDS.exists() else []


def find(records: list[dict], arm: str, target: float, settings: dict, seed: int) -> dict | None:
    wanted = (arm, target, settings, seed)
    return next(
        (each for each in records if wanted == tuple(each[k] for k in ("arm", "target", "settings", "seed"))), None
    )


def best_of(records: list[dict], arm: str, target: float, seed: int = SEEDS[0]) -> dict | None:
    """The run that needed the fewest tokens; of several the one with the lowest loss then."""
    done = [r for r in records if (r["arm"], r["target"], r["seed"]) == (arm, target, seed) and r["reached"]]
    return min(done, key=lambda record: (record["tokens"], record["evals"][-1][1]), default=None)


def next_run(records: list[dict]) -> dict | None:
    """For one loss after another: the sweeps with the first seed; then the winners with the others."""
    for target in dict.fromkeys(target for _, target in SWEEP):
        arms = [arm for arm, of in SWEEP if of == target]
        for arm in arms:
            for settings in SWEEP[arm, target]:
                if find(records, arm, target, settings, SEEDS[0]) is None:
                    best = best_of(records, arm, target)
                    limit = best["tokens"] if best else sys.maxsize
                    return {"arm": arm, "target": target, "settings": settings, "seed": SEEDS[0], "limit": limit}
        for seed in SEEDS[1:]:
            for arm in arms:
                best = best_of(records, arm, target)
                if best is not None and find(records, arm, target, best["settings"], seed) is None:
                    known = {"arm": arm, "target": target, "settings": best["settings"]}
                    return {**known, "seed": seed, "limit": sys.maxsize}
        if (run := _run_to_compare(records, target, arms)) is not None:
            return run
    return None


def _run_to_compare(records: list[dict], target: float, arms: list[str]) -> dict | None:
    """Of an arm whose winner has not run on this processor, where another's has: their seconds are compared."""
    best = {arm: best_of(records, arm, target) for arm in arms}
    known = ("arm", "target", "settings")
    here = {
        arm
        for arm, of in best.items()
        for each in records
        if of is not None and each["processor"] == processor() and all(each[k] == of[k] for k in known)
    }
    arm = next((arm for arm in arms if here and arm not in here and best[arm] is not None), None)
    return arm and {**{key: best[arm][key] for key in known}, "seed": SEEDS[0], "limit": sys.maxsize}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.time_to_loss", description=__doc__)
    parser.add_argument("--runs", type=natural, default=sys.maxsize, help="how many to make now; 0: only the table")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON, and write nothing else")
    arguments = parser.parse_args()
    for _ in range(arguments.runs):
        records = read_records()
        if (run := next_run(records)) is None:
            break
        print(f"running {run}", file=sys.stderr, flush=True)
        environment = {"OMP_NUM_THREADS": "1", "RECIPE_CACHE": str(default_cache_dir())}
        found = run_fresh(race, environment=environment, **run)
        known = {"commit": commit(), "processor": processor(), "torch": torch.__version__}
        RECORDS.write_text(json.dumps([*read_records(), {**run, **found, **known}], indent=1))
    records = read_records()
    if arguments.json:
        print(json.dumps(summary(records)))
        return
    section = format_section(NAME, make_result(records), "python -m tests.benchmarks.time_to_loss")
    print(section)
    if arguments.runs:  # else nothing was measured
        write_section(NAME, section)


NAME = "time-to-loss"


def summary(records: list[dict]) -> list[dict]:
    """Of each arm and loss: the winner's settings, and by seed the tokens, the seconds and the processor, whose
    seconds are compared with its own alone."""
    rows = []
    for arm, target in SWEEP:
        best = best_of(records, arm, target)
        if best is None:
            continue
        runs = [find(records, arm, target, best["settings"], seed) for seed in SEEDS]
        runs = [run for run in runs if run is not None]
        rows.append({"arm": arm, "target": target, "settings": best["settings"], "seeds": len(runs)})
        rows[-1]["tokens"] = [run["tokens"] for run in runs if run["reached"]]
        known = (arm, target, best["settings"])
        on_any = [r for r in records if (r["arm"], r["target"], r["settings"]) == known and r["reached"]]
        for name in ("seconds", "processor_seconds", "processor"):
            rows[-1][name] = [run[name] for run in on_any]
    return rows


def make_result(records: list[dict]) -> Result:
    rows = [
        {
            "eval loss": f"{row['target']:g}",
            "arm": ARMS[row["arm"]],
            "rate": f"{row['settings']['learning_rate']:g}",
            "rows a step": row["settings"]["per_device_train_batch_size"],
            "schedule": describe(row["settings"]),
            "seeds that reached it": f"{len(row['tokens'])} of {row['seeds']}",
            "tokens, median": int(statistics.median(row["tokens"])),
            "processor s, median": "; ".join(
                f"{seconds:,.0f} ({seeds} on {name.split(', ')[1]})"
                for name, (seconds, seeds) in seconds_by_processor(row).items()
            ),
        }
        for row in summary(records)
    ]
    ratios = []
    for target in dict.fromkeys(target for _, target in SWEEP):
        found = {row["arm"]: row for row in summary(records) if row["target"] == target}
        if len(found) == len(ARMS):
            ratios.append(compare(target, *(found[arm] for arm in ARMS)))
    measured = (
        "The demo's model and rows, one thread, eval loss on its whole hold-out every 51,200 tokens once the training "
        "loss is near; evaluation is not counted. The recipe in the precision that it chooses, stock Trainer in its "
        "own, fp32; `throughput` has how much faster bf16 is. Each arm at the best of its sweep, all of it in "
        "time_to_loss.json."
    )
    sweep = [
        f"{ARMS[r['arm']]}, {describe(r['settings'])}, rate {r['settings']['learning_rate']:g}, "
        f"{r['settings']['per_device_train_batch_size']} rows: "
        + (f"{r['tokens']:,} tokens" if r["reached"] else f"not reached ({r['evals'][-1][1]} after {r['tokens']:,})")
        for r in records
        if r["seed"] == SEEDS[0]
    ]
    note = " ".join([*ratios, "The sweep:\n"])
    return Result("until the demo is at a loss", measured, rows, "\n- ".join([note, *sweep]))


def seconds_by_processor(row: dict) -> dict[str, tuple[float, int]]:
    """Of a row of `summary`: median of the processor time, and seeds."""
    found: dict[str, list[float]] = {}
    for name, seconds in zip(row["processor"], row["processor_seconds"], strict=True):
        found.setdefault(name, []).append(seconds)
    return {name: (statistics.median(each), len(each)) for name, each in found.items()}


def compare(target: float, ours: dict, stock: dict) -> str:
    tokens = statistics.median(ours["tokens"]) / statistics.median(stock["tokens"])
    own, other = seconds_by_processor(ours), seconds_by_processor(stock)
    times = [f"{own[name][0] / other[name][0]:.2f} on {name.split(', ')[1]}" for name in own if name in other]
    time = f" and of the processor time {', '.join(times)}" if times else ""
    return f"To {target:g} the recipe needs {tokens:.2f} of the tokens{time}."


def describe(settings: dict) -> str:
    """The schedule, its length in tokens, its warm-up and its end."""
    step = settings["per_device_train_batch_size"] * BLOCK_SIZE
    name = "WSD" if "stable" in settings["lr_scheduler_type"] else "cosine"
    end = " to 0" if settings["lr_scheduler_kwargs"].get("min_lr_rate") == 0 else ""
    ratio = settings.get("optim_args", "").removeprefix("embedding_lr_ratio=")
    embeddings = f", embeddings at {ratio} times the rate" if ratio else ""
    steps = {name: settings[f"{name}_steps"] * step for name in ("max", "warmup")}
    return f"{name}{end} over {steps['max']:,}, warm-up {steps['warmup']:,}{embeddings}"


if __name__ == "__main__":
    main()
