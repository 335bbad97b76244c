"""Benchmarks of what the guards cost. Each is a function from `Options` to a `Result`."""

import statistics
from dataclasses import dataclass

from tests.benchmarks import measure_guards
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
        f"{len(ratios)} pairs: {low:.4f} to {high:.4f}). The end of a step holds the n-gram model and most of the "
        f"guards' time; their probes before step 1 are in it, spread over the run. Findings in this run: "
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


BENCHMARKS = {"steps": steps, "preflight": preflight}
