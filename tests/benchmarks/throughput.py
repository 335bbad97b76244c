"""`python -m tests.benchmarks.throughput [--only MODEL] [--json]`: tokens/s of a training step, beside stock Trainer.

Each arm is a process of its own and trains the same new model on the same rows for a few steps; arms alternate. The
sections of these models on this processor in RESULTS.md are written again. `--quick`: few steps, nothing compiled,
prints only.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

from recipe.data.docstrings import default_cache_dir
from recipe.internals import has_fast_bf16_cpu
from recipe.model import why_not_compile
from tests.benchmarks import measure_throughput as measure
from tests.benchmarks.measure import run_fresh
from tests.benchmarks.measure_throughput import MODELS
from tests.benchmarks.results import Result, format_section, processor, write_section

# Of each model: steps in a process, of which the first are not counted, and processes of each arm.
STEPS = {"demo": (40, 10, 2), "13.8M": (8, 2, 2), "180M": (4, 1, 1)}
WHOLE = {"demo": 573_440}  # tokens of the whole training, where compiling takes a share of it


class Arm(NamedTuple):
    name: str
    run: Callable[..., dict]
    keys: dict


def arms_of(model: str, is_quick: bool) -> Iterator[Arm]:
    """The recipe as it is; stock Trainer as it comes, and with each switch and pair of them that this machine has; a
    bare loop. What is compiled is left out of the 180M: it takes minutes."""
    is_compiled = why_not_compile() is None and model != "180M" and not is_quick
    yield Arm("recipe", measure.recipe, {"has_guards": True, "switches": {}})
    yield Arm("recipe without guards", measure.recipe, {"has_guards": False, "switches": {}})
    if has_fast_bf16_cpu():  # the one that the recipe did not choose
        yield recipe_with({"bf16": "false"})
    if is_compiled:  # as the recipe compiles a long run on a CPU (`plan.compiling_pays_on_cpu`)
        yield recipe_with({"bf16": "true" if has_fast_bf16_cpu() else "false", "torch_compile": "true"})
    if is_compiled and model != "demo":  # with stock Trainer's optimizer
        yield recipe_with({"torch_compile": "true", "optim": "adamw_torch_fused", "optim_args": ""})
    yield Arm("stock Trainer", measure.stock, {"switches": {}})
    bf16 = {"bf16": True} if has_fast_bf16_cpu() else {}
    compiled = {"torch_compile": True} if is_compiled else {}
    tried = [switches for switches in (bf16, compiled, bf16 | compiled) if switches]
    for switches in [each for number, each in enumerate(tried) if each not in tried[:number]]:
        yield Arm(f"stock Trainer, {', '.join(switches)}", measure.stock, {"switches": switches})
    if model == "demo" or not bf16:
        bf16 = {}
    yield Arm(f"bare loop, {', '.join(bf16 | compiled) or 'eager'}", measure.bare, {"switches": bf16 | compiled})


def recipe_with(switches: dict) -> Arm:
    name = ", ".join(["recipe without guards", *(f"{key} {value}" for key, value in switches.items() if value)])
    return Arm(name, measure.recipe, {"has_guards": False, "switches": switches})


def measure_model(model: str, steps: int, warm: int, rounds: int, is_quick: bool = False) -> dict[str, list[dict]]:
    """By arm, what each of its processes gave."""
    environment, found = {"RECIPE_CACHE": str(default_cache_dir())}, {}
    for number in range(rounds):
        for arm in arms_of(model, is_quick):
            print(f"{model}, round {number + 1}: {arm.name}", file=sys.stderr, flush=True)
            values = run_fresh(arm.run, environment=environment, model=model, steps=steps, warm=warm, **arm.keys)
            found.setdefault(arm.name, []).append(values)
    return found


def rows_of(model: str, found: dict[str, list[dict]]) -> list[dict]:
    rows, accumulation, block = MODELS[model][2]
    tokens = rows * accumulation * block
    rate = max(rate for runs in found.values() for run in runs for rate in run["rates"].values())
    best_stock = max(speed(runs, tokens) for name, runs in found.items() if name.startswith("stock"))
    return [
        {
            "model": model,
            "arm": name,
            "tokens/s": speed(runs, tokens),
            "of the best stock": f"{speed(runs, tokens) / best_stock:.2f}",
            "of the matrix rate": f"{6 * runs[0]['parameters'] * speed(runs, tokens) / rate:.0%}",
            "peak MB": max(run["peak_mb"] for run in runs),
            "to the end of step 1, s": statistics.median(run["first"] for run in runs),
        }
        for name, runs in found.items()
    ]


def speed(runs: list[dict], tokens: int) -> float:
    return tokens / statistics.median(second for run in runs for second in run["seconds"])


def note_of(model: str, found: dict[str, list[dict]]) -> str:
    kinds, runs = found["recipe"][0]["rates"], [run for each in found.values() for run in each]
    rates = {kind: max(run["rates"][kind] for run in runs) for kind in kinds}
    shown = ", ".join(f"{kind} {rate / 1e9:,.0f} GFLOP/s" for kind, rate in rates.items())
    parts = {}
    for run in found["recipe"]:
        for name, value in run["parts"].items():
            parts.setdefault(name, []).append(value)
    costs = sorted(((statistics.median(each), name) for name, each in parts.items()), reverse=True)
    costs = ", ".join(f"{name} {1000 * value:.2g}" for value, name in costs if value >= 5e-5)
    return f"{model}: matrix products {shown}. Guards, ms a step: {costs}.{whole_training(model, found)}"


def whole_training(model: str, found: dict[str, list[dict]]) -> str:
    """Seconds of the model's whole training at these speeds, the first step with its compiling counted."""
    if model not in WHOLE:
        return ""
    rows, accumulation, block = MODELS[model][2]
    tokens = rows * accumulation * block
    first = {name: statistics.median(run["first"] for run in runs) for name, runs in found.items()}
    seconds = {name: first[name] + (WHOLE[model] - tokens) / speed(runs, tokens) for name, runs in found.items()}
    shown = ", ".join(f"{name} {value:.0f}" for name, value in sorted(seconds.items(), key=lambda each: each[1]))
    return f" Seconds of {WHOLE[model]:,} tokens, compiling for training counted: {shown}."


SIZES = {
    "demo": "8 x 256 tokens",
    "13.8M": "8 x 512 tokens",
    "180M": "4 x 1,024 tokens in 4 micro-batches",
}


def make_result(model: str, found: dict[str, list[dict]]) -> Result:
    measured = (
        f"Training steps of new models on the demo's source, {SIZES[model]} each. Speed is of the median step; the "
        "matrix rate is the fastest of this run, in any precision, against 6 FLOPs a parameter and token. Stock "
        "Trainer and the bare loop have their rows in memory; the recipe reads and tokenizes them. Without guards: "
        "without their callback, progress and samples too."
    )
    return Result("tokens/s of training steps", measured, rows_of(model, found), note_of(model, found))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.throughput", description=__doc__)
    parser.add_argument("--only", choices=MODELS, action="append", help="may be repeated; default: all")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON, and write nothing")
    arguments = parser.parse_args()
    names = arguments.only or (["demo"] if arguments.quick else list(MODELS))
    found = {name: measure_model(name, *((3, 1, 1, True) if arguments.quick else STEPS[name])) for name in names}
    if arguments.json:
        print(json.dumps(found))
        return
    for name, of_arms in found.items():
        title = f"throughput of {name} on {processor()}"
        section = format_section(
            title, make_result(name, of_arms), f"python -m tests.benchmarks.throughput --only {name}"
        )
        print(section)
        if not arguments.quick:
            write_section(title, section)


if __name__ == "__main__":
    main()
