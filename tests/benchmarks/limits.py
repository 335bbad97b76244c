"""Benchmarks of memory: the report of a long run and one huge document, which must stay small however large the input
is; and what `recipe plan` says of a training step against what it takes."""

from pathlib import Path

from recipe.data.docstrings import default_cache_dir
from tests.benchmarks import measure_limits
from tests.benchmarks.measure import run_fresh
from tests.benchmarks.measure_throughput import MODELS
from tests.benchmarks.results import Result

STEPS, MEGABYTES = (4_000, 400_000), 50


def report(folder: Path) -> Result:
    rows = []
    for num_steps in STEPS:
        found = run_fresh(measure_limits.report, num_steps=num_steps)
        sizes = {"steps": num_steps, "steps.jsonl, MB": found["file"], "report.html, MB": found["page"]}
        rows.append(sizes | {"seconds": found["seconds"], **memory_of(found)})
    measured = (
        "`recipe report` of runs with so many steps, once each in a fresh process; the file is in the page cache."
    )
    return Result("the report of a long run", measured, rows)


def document(folder: Path) -> Result:
    rows = []
    for kind in ("parquet", "jsonl", "txt"):
        found = run_fresh(measure_limits.document, kind=kind, megabytes=MEGABYTES)
        rows.append({"file": kind, "tokens": found["tokens"], "seconds": found["seconds"], **memory_of(found)})
    measured = (
        f"One document of {MEGABYTES} MB among 40 short ones, tokenizer/llama-32k: one pass of the stream, once each "
        "in a fresh process that builds no model."
    )
    return Result(f"one document of {MEGABYTES} MB", measured, rows)


def plan(folder: Path) -> Result:
    rows = []
    for name in MODELS:
        found = run_fresh(measure_limits.plan, environment={"RECIPE_CACHE": str(default_cache_dir())}, name=name)
        off = found["planned"] / found["measured"] - 1
        rows.append(
            {"model": name, "plan, MB": found["planned"], "measured, MB": found["measured"], "off": f"{off:+.0%}"}
        )
    measured = (
        "Two steps of new models without guards and evaluation, each in a fresh process: the plan's peak, and how far "
        "the process's own peak is over what it held before the model was made."
    )
    return Result("the memory of a training step as `recipe plan` has it", measured, rows)


def memory_of(found: dict) -> dict:
    return {"peak, MiB": found["peak"], "of these before, MiB": found["before"]}


BENCHMARKS = {"report": report, "document": document, "plan": plan}
