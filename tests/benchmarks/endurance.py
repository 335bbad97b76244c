"""`python -m tests.benchmarks.endurance [--steps 100000]`: a long run of tiny steps, with the guards on.

Memory, open files, threads and processor time per step must stay as they are. Writes its section of RESULTS.md.
"""

import argparse
import itertools
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from tests.benchmarks.fault_disk import at_steps
from tests.benchmarks.fault_run import without_samples, write_setting
from tests.benchmarks.fault_scripts import train
from tests.benchmarks.results import RESULTS, Result, format_section, write_section

STEPS, PARTS, ROWS, BLOCK = 100_000, 10, 2, 16
MODEL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@dataclass
class Sample:
    """At the beginning of a step. `processor`: seconds of this process."""

    step: int
    seconds: float
    processor: float
    mebibytes: float
    files: int
    threads: int


def take_sample(step: int) -> Sample:
    process = psutil.Process()
    memory, files = process.memory_info().rss / 2**20, process.num_fds()
    return Sample(step, time.monotonic(), time.process_time(), memory, files, process.num_threads())


def write_long_setting(folder: Path, steps: int) -> Path:
    """Text for somewhat more than one pass, so that its end is in it; a save and an evaluation in each part."""
    each = steps // PARTS
    path = write_setting(
        folder, max_steps=steps, save_steps=each, eval_steps=each, save_total_limit=2, block_size=BLOCK,
        per_device_train_batch_size=ROWS, logging_steps=100, lr_scheduler_type="constant",
    )  # fmt: skip
    words, texts, needed = random.Random(1), [], 0.9 * steps * ROWS * BLOCK
    while needed > 0 or len(texts) < 2000:
        texts.append(" ".join(f"w{words.randrange(997)}" for _ in range(words.randrange(10, 60))))
        needed -= len(texts[-1])
    pq.write_table(pa.table({"text": texts}), folder / "data/a.parquet", row_group_size=100)
    model = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(model | MODEL | {"num_key_value_heads": 2}))
    return path


def measure(steps: int) -> tuple[list[Sample], list[str]]:
    """A sample at the beginning of each part and of the last step, and the findings of the guards."""
    samples: list[Sample] = []
    places = [1, *(number * steps // PARTS + 1 for number in range(1, PARTS)), steps]

    def take(step: int) -> Callable[[], None]:
        return lambda: samples.append(take_sample(step))

    with tempfile.TemporaryDirectory(prefix="recipe-endurance-") as name:
        folder = Path(name)
        os.environ["RECIPE_CACHE"] = str(folder / "cache")
        (folder / "setting").mkdir()
        words = ["train", str(write_long_setting(folder / "setting", steps)), "--output_dir", str(folder / "run")]
        without_samples()
        with at_steps({step: take(step) for step in places}):
            ran = train(words)
        assert ran.code == 0, ran.errors
        lines = (folder / "run/findings.jsonl").read_text().splitlines()
    return samples, [f"{found['severity']} {found['id']}" for found in map(json.loads, lines)]


def rows_of(samples: list[Sample]) -> list[dict]:
    pairs = itertools.pairwise(samples)
    return [
        {
            "steps": f"{first.step:,} to {last.step - (last is not samples[-1]):,}",
            "ms of processor a step": 1000 * (last.processor - first.processor) / (last.step - first.step),
            "ms a step": 1000 * (last.seconds - first.seconds) / (last.step - first.step),
            "MiB at the end": last.mebibytes,
            "open files": last.files,
            "threads": last.threads,
        }
        for first, last in pairs
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.endurance", description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help="fewer: prints and writes nothing")
    steps = parser.parse_args().steps
    samples, findings = measure(steps)
    measured = (
        f"{steps:,} steps of {ROWS} rows of {BLOCK} tokens with the guards on, saved and evaluated {PARTS} times, in "
        f"one process. The model has one layer of width {MODEL['hidden_size']}, so a step is what Trainer, the stream "
        "and the guards cost. Resident memory, open files and threads at the end of each tenth of the run; processor "
        "time of this process."
    )
    growth = (samples[-1].mebibytes - samples[0].mebibytes) * 1024 / steps
    note = (
        f"Findings: {', '.join(findings) or 'none'}. At the first step: {samples[0].mebibytes:.0f} MiB; so memory "
        f"grew by {growth:.1f} KiB a step. The guards keep the fingerprints of all rows (docs/guards.md)."
    )
    result = Result("a long run of tiny steps", measured, rows_of(samples), note)
    section = format_section("endurance", result, "python -m tests.benchmarks.endurance")
    print(section)
    if steps == STEPS:
        write_section("endurance", section, RESULTS)
    sys.stdout.flush()
    os._exit(0)  # readers' threads may abort an interpreter that is shutting down


if __name__ == "__main__":
    main()
