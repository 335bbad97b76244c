"""Benchmarks of what the guards cost. Each is a function from `Options` to a `Result`."""

import os
import statistics
from dataclasses import dataclass

from tests.benchmarks import measure_guards
from tests.benchmarks.guard_rate import RATE, TOKENS
from tests.benchmarks.measure import run_fresh
from tests.benchmarks.results import Result

# On the CPU: in fp32, uncompiled, and of the twelve micro-batches of a step one.
BIG = {"source": "docstrings", "eval_skip": 5000, "eval_documents": 20, "bf16": "false", "torch_compile": "false"}
BIG |= {"gradient_accumulation_steps": 1}


@dataclass(frozen=True)
class Options:
    steps: int = 440
    block: int = 20
    with_180m: bool = True


def steps(options: Options) -> Result:
    """Step time with and without, in one run."""
    found = run_fresh(measure_guards.steps, config="cpu_demo", count=options.steps, block=options.block, warm=40)
    median, ratios = statistics.median(found["ratios"]), sorted(found["ratios"])
    rows = [{"what": "a step without the guards", "ms": 1000 * found["off"], "share of a step": None}]
    rows += [
        {"what": name, "ms": 1000 * seconds, "share of a step": f"{seconds / found['off']:.2%}"}
        for name, seconds in sorted(found["parts"].items(), key=lambda part: -part[1])
    ]
    low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
    note = (
        f"Step with the guards / step without, medians of neighbouring blocks: {median:.4f} (middle 80 % of "
        f"{len(ratios)} pairs: {low:.4f} to {high:.4f}). What is beside the training is not in its "
        f"thread's time; the probes before step 1 are, spread over the run. Findings in this run: "
        f"{', '.join(found['findings']) or 'none'}."
    )
    measured = (
        f"The demo's model and stream (3M parameters, 2,048 tokens a step), {options.steps} steps in one run, guards "
        f"on and off in turn for {options.block} steps each."
    )
    return Result("the guards' share of a step", measured, rows, note)


def preflight(options: Options) -> Result:
    """Seconds and memory of the probes before step 1."""
    runs = {"demo, 3M": ("cpu_demo", {})}
    if options.with_180m:
        runs["180M"] = ("llama_180m", BIG)
    rows, notes = [], []
    for name, (config, keys) in runs.items():
        found = run_fresh(measure_guards.probes, config=config, **keys)
        stock = run_fresh(measure_guards.training, config=config, **keys)
        row = {"model": name, "tokens a micro-batch": found["tokens"], "all guards, s": found["all"]}
        slowest = sorted(found["seconds"].items(), key=lambda part: -part[1])[:6]
        row |= {"slowest": ", ".join(f"{guard} {value:.2f} s" for guard, value in slowest)}
        row |= {"a training step, s": stock["step"]}
        row |= {"peak MB, probes": found["megabytes"][1], "peak MB, 2 steps without": stock["megabytes"][1]}
        rows.append(row)
        notes.append(f"{name}, not judged: {', '.join(sorted(found['unjudged']))}.")
    measured = (
        "All probes on the first micro-batch, and two training steps without the guards, each in its own process."
    )
    return Result("the probes before step 1", measured, rows, " ".join(notes))


def rate(options: Options) -> Result:
    """The cost of a rank as ranks are added, at 0.5M tokens/s for each."""
    rows = []
    for world_size in (1, 8, 64):
        found = run_fresh(measure_guards.rate, world_size=world_size)
        least, median = ({name: found[name][at] for name in ("training", "read", "observe")} for at in (0, 1))
        rows.append(
            {
                "ranks": world_size,
                "tokens/s, all ranks": f"{world_size * RATE / 1e6:g}M",
                "training's thread, ms a step": 1000 * median["training"],
                "least": 1000 * least["training"],
                "us a token": 1e6 * median["training"] / TOKENS,
                "beside, every rank, ms": 1000 * median["read"],
                "beside, main process too, ms": 1000 * median["observe"],
                "share of a core, main process": f"{sum(median.values()) / (TOKENS / RATE):.0%}",
                "bytes a rank sends": int(found["bytes"]),
                "windows kept a step": int(found["kept"]),
            }
        )
    measured = (
        f"Steps of 12 micro-batches of 4 x 1,024 tokens on each rank ({TOKENS:,}), of which 0.5M tokens/s make one "
        f"every {1000 * TOKENS / RATE:.0f} ms; no model runs. One rank's work is real, the messages of the others are "
        "what the same code makes of other rows. Processor time, medians of 16 steps, all guards. "
        f"Load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs."
    )
    note = (
        "In `training's thread` is all that the callback does between the first micro-batch and the end of a step, "
        "for a model of 24 layers; the least of the 16 steps beside it. Not in it: hooks in the forward and backward "
        "pass, which the guards use on some micro-batches. With these the guards call "
        f"{run_fresh(measure_guards.operations):.0f} operations of torch in a step (mean of 24, counted in a training "
        "of a tiny model), which a GPU's host starts without waiting for them. On the main process each rank adds a "
        "message; the ledger and the n-gram model are given no more in a step for any number of ranks. The network "
        "between ranks is not in these figures."
    )
    return Result("the guards at a GPU's rate of tokens", measured, rows, note)


BENCHMARKS = {"steps": steps, "preflight": preflight, "rate": rate}
