"""Scripts of a disk that fails in mid-run: no file can grow beyond a limit, or the output directory is deleted.

The limit (RLIMIT_FSIZE) stands for a full disk: writes fail in the middle of a file, as with a disk of that size. A
disk that recovers costs the checkpoints that fell into that time and nothing else. One that stays full ends the run at
its last file with exit code 4; the run is then resumed on a disk with room.
"""

import contextlib
import hashlib
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from recipe.trainer import PretrainTrainer
from tests.benchmarks.fault_scripts import STEPS, Whole, judge, prepare, quiet_and_short, train

# Bytes that a file may have, the step before which that begins, and the one before which it ends (None: never).
# 60 kB is in the middle of the weights, 150 kB in the middle of the optimizer's state.
WEIGHTS_BYTES = 120_000
DISKS = {
    "full at once, for one save": (0, 4, 6),
    "full, for two saves": (0, 3, 9),
    "no room for the weights, for one save": (4096, 7, 10),
    "half of the weights, for one save": (60_000, 7, 10),
    "half of the optimizer, for one save": (150_000, 7, 10),
    "full from step 6 on": (0, 6, None),
    "no room for the weights from step 6 on": (4096, 6, None),
    "half of the weights from step 6 on": (60_000, 6, None),
    "half of the optimizer from step 10 on": (150_000, 10, None),
    "output directory deleted before step 6": (None, 6, None),
}


def begin_disk(folder: Path) -> Whole:
    words = prepare(folder, eval_strategy="steps", eval_steps=2)  # each failure meets evaluations
    with quiet_and_short(folder):
        return Whole(str(folder), words, train([*words, "--output_dir", str(folder / "whole")]))


def run_disk_script(whole: Whole, number: int, run_dir: Path) -> dict:
    """The figures of one of DISKS. `damaged`: files of older checkpoints that changed."""
    name = [*DISKS][number % len(DISKS)]
    limit, begin, end = DISKS[name]
    older: dict[Path, str] = {}

    def break_disk(_) -> None:
        older.update(contents_of(run_dir))
        if limit is None:
            shutil.rmtree(run_dir)
        else:
            set_limit(limit)

    actions = {begin: break_disk, **({} if end is None else {end: lambda _: set_limit(None)})}
    words = [*whole.words, "--output_dir", str(run_dir)]
    with quiet_and_short(run_dir.parent):
        try:
            with at_steps(actions):
                ran = [train(words)]
        finally:
            set_limit(None)
        repeated, now = 0, contents_of(run_dir)
        if ran[0].code == 4:
            ran.append(train([*words, "--resume_from_checkpoint", "latest"]))
            repeated = len(ran[0].steps) + len(ran[1].steps) - STEPS  # of the steps after its last checkpoint
            del ran[0].steps[len(ran[0].steps) - repeated :]
    figures = judge(whole, ran, run_dir, expected=0 if end or has_room(limit) else 4)
    damaged = 0 if limit is None else sum(now.get(file) != content for file, content in older.items())
    figures["survived"] &= code_in(run_dir) in (None, ran[-1].code) and not damaged
    return figures | {"what": name, "steps_lost": repeated, "damage_accepted": damaged > 0}


def code_in(run_dir: Path) -> int | None:
    path = run_dir / "exit.json"
    return json.loads(path.read_text())["code"] if path.exists() else None


def has_room(limit: int | None) -> bool:
    """Whether the final model fits: then the run ends well, without the checkpoints that do not."""
    return limit is None or limit > WEIGHTS_BYTES


def contents_of(run_dir: Path) -> dict[Path, str]:
    """The files of the whole checkpoints, by hash."""
    files = [file for folder in run_dir.glob("checkpoint-*") for file in folder.rglob("*") if file.is_file()]
    return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def set_limit(num_bytes: int | None) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if num_bytes is None else num_bytes, hard))


@contextlib.contextmanager
def at_steps(actions: dict[int, Callable[[PretrainTrainer], None]]) -> Iterator[None]:
    """Calls each action before the first micro-batch of its step, with the trainer."""
    training_step = PretrainTrainer.training_step

    def step(trainer, *arguments, **more):
        now = trainer.state.global_step + 1
        if now in actions:
            actions.pop(now)(trainer)
        return training_step(trainer, *arguments, **more)

    PretrainTrainer.training_step = step
    try:
        yield
    finally:
        PretrainTrainer.training_step = training_step
