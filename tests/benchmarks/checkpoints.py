"""Seconds per GB to commit a checkpoint and to verify it."""

import os
import statistics
import time
from pathlib import Path

from recipe import checkpoints
from recipe.checkpoints import commit, problems_of
from tests.benchmarks.results import Result

GIGABYTES, REPEATS = 1.0, 5
# Shares of the bytes of a checkpoint under AdamW: weights, and two moments.
SHARES = {"model.safetensors": 1 / 3, "optimizer.pt": 2 / 3}
SMALL = ("trainer_state.json", "scheduler.pt", "stream_state.json")


def verify(folder: Path) -> Result:
    seconds: dict[str, list[float]] = {"commit": [], "verify": [], "verify without reading": []}
    block = os.urandom(1 << 20)
    for step in range(1, REPEATS + 1):
        staged = checkpoints.staging_of(folder, step)
        staged.mkdir(parents=True)
        for name, share in SHARES.items():
            with (staged / name).open("wb") as file:
                for _ in range(int(share * GIGABYTES * 1e9) >> 20):
                    file.write(block)
        for name in SMALL:
            (staged / name).write_text("{}")
        target = timed(seconds["commit"], commit, staged, [{"part": "a", "began_from": None, "step": 0}], {})
        assert timed(seconds["verify"], problems_of, target, True) == []
        assert timed(seconds["verify without reading"], problems_of, target) == []
        for path in target.iterdir():
            path.unlink()
    rows = [
        {"what": what, "seconds per GB": statistics.median(each), "least": min(each), "most": max(each)}
        for what, each in seconds.items()
    ]
    measured = (
        f"Files of {GIGABYTES:g} GB in all, in two large ones, just written, so in the page cache; {REPEATS} times."
    )
    note = "Commit reads and hashes every file, syncs it, and renames the folder; verify reads and hashes every file."
    return Result("seconds per GB of a checkpoint", measured, rows, note)


def timed(seconds: list[float], action, *arguments):
    begin = time.perf_counter()
    result = action(*arguments)
    seconds.append((time.perf_counter() - begin) / GIGABYTES)
    return result


BENCHMARKS = {"verify": verify}
