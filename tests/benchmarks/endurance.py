"""`python -m tests.benchmarks.endurance [--steps 100000]`: a long run of tiny steps, with the guards on.

Memory, open files, threads and processor time per step must stay as they are. The fingerprints of the guards grow with
the rows, up to a bound (docs/guards.md), and are counted beside the memory. Writes its section of RESULTS.md.
"""

import argparse
import itertools
import json
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from recipe.__main__ import run
from recipe.guards.repetition import Repetition
from recipe.trainer import PretrainTrainer
from tests.benchmarks.fault_disk import at_steps
from tests.benchmarks.fault_run import without_samples, write_setting
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
    fingerprints: float  # mebibytes of them
    files: int
    threads: int


def take_sample(trainer: PretrainTrainer) -> Sample:
    process, step = psutil.Process(), trainer.state.global_step + 1
    memory = process.memory_info().rss / 2**20, bytes_of_fingerprints(trainer) / 2**20
    return Sample(step, time.monotonic(), time.process_time(), *memory, process.num_fds(), process.num_threads())


def bytes_of_fingerprints(trainer: PretrainTrainer) -> int:
    runner = trainer.guards.session.runner  # None before the first step
    guards = [guard for guard in runner.guards if isinstance(guard, Repetition)] if runner is not None else []
    return sum(guard.ledger.num_bytes for guard in guards)


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
    with tempfile.TemporaryDirectory(prefix="recipe-endurance-") as name:
        folder = Path(name)
        os.environ["RECIPE_CACHE"] = str(folder / "cache")
        (folder / "setting").mkdir()
        words = ["train", str(write_long_setting(folder / "setting", steps)), "--output_dir", str(folder / "run")]
        without_samples()
        with at_steps(dict.fromkeys(places, lambda trainer: samples.append(take_sample(trainer)))):
            code = run(words)
        assert code == 0
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
            "of these fingerprints": last.fingerprints,
            "open files": last.files,
            "threads": last.threads,
        }
        for first, last in pairs
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.endurance", description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help="other numbers are printed and not written")
    steps = parser.parse_args().steps
    if steps < 2 * PARTS:
        parser.error(f"--steps: {2 * PARTS} or more, since the run is measured in {PARTS} parts")
    samples, findings = measure(steps)
    measured = (
        f"{steps:,} steps of {ROWS} rows of {BLOCK} tokens with the guards on, saved and evaluated {PARTS} times, in "
        f"one process. The model has one layer of width {MODEL['hidden_size']}, so a step is what Trainer, the stream "
        "and the guards cost. Resident memory, open files and threads at the end of each tenth of the run; processor "
        "time of this process."
    )
    first, middle, last = samples[0], samples[PARTS // 2], samples[-1]
    grown = [last.mebibytes - middle.mebibytes, last.fingerprints - middle.fingerprints]
    late, of_these = (1024 * each / (last.step - middle.step) for each in grown)
    note = (
        f"Findings: {', '.join(findings) or 'none'}. At the first step: {first.mebibytes:.0f} MiB. In the second half "
        f"memory grew by {late:.2f} KiB a step, {of_these:.2f} of them fingerprints of rows, which have a bound "
        "(docs/guards.md)."
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
