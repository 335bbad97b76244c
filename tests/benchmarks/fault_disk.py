"""10 disks that fail in mid-run: no file can grow beyond a limit, or the output directory is deleted.

The limit (RLIMIT_FSIZE) stands for a full disk: writes fail in the middle of a file, as with a disk of that size. A
disk that recovers costs the checkpoints that fell into that time and nothing else. One that stays full ends the run at
its last file with exit code 4; the run is then resumed on a disk with room.
"""

import contextlib
import hashlib
import json
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from recipe.trainer import PretrainTrainer
from tests.benchmarks.fault_runs import STEPS, Ran, judge, prepare, publish, quiet_and_short, train

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


def disk_faults(names: tuple[str, ...] = tuple(DISKS)) -> list[dict]:
    """Runs the scripts; a dict of figures for each. `damaged`: older checkpoints that changed."""
    with tempfile.TemporaryDirectory(prefix="recipe-faults-") as folder, quiet_and_short(Path(folder)):
        words = prepare(Path(folder))
        whole = train([*words, "--output_dir", f"{folder}/whole"])
        return [_script(Path(folder), words, whole, name) for name in names]


def _script(folder: Path, words: list[str], whole: Ran, name: str) -> dict:
    limit, begin, end = DISKS[name]
    run_dir, older = folder / f"run-{list(DISKS).index(name)}", {}

    def break_disk() -> None:
        older.update(contents_of(run_dir))
        if limit is None:
            shutil.rmtree(run_dir)
        else:
            set_limit(limit)

    actions = {begin: break_disk, **({} if end is None else {end: lambda: set_limit(None)})}
    words = [*words, "--output_dir", str(run_dir)]
    try:
        with at_steps(actions):
            ran = [train(words)]
    finally:
        set_limit(None)
    is_deleted, repeated = limit is None, 0
    now = contents_of(run_dir)
    damaged = 0 if is_deleted else sum(now.get(file) != content for file, content in older.items())
    if ran[0].code == 4:
        ran.append(train([*words, "--resume_from_checkpoint", "latest"]))
        repeated = len(ran[0].steps) + len(ran[1].steps) - STEPS  # of the steps after its last checkpoint
        del ran[0].steps[len(ran[0].steps) - repeated :]
    exit_file = run_dir / "exit.json"
    is_told = not exit_file.exists() or json.loads(exit_file.read_text())["code"] == ran[-1].code
    result = judge(name, whole, folder / "whole", ran, run_dir, expected=0 if end or has_room(limit) else 4)
    survived = result["survived"] and is_told and not damaged
    return {**result, "steps_again": repeated, "damaged": damaged, "survived": survived}


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
def at_steps(actions: dict[int, Callable[[], None]]) -> Iterator[None]:
    """Calls each action before the first micro-batch of its step."""
    training_step = PretrainTrainer.training_step

    def step(trainer, *arguments, **more):
        now = trainer.state.global_step + 1
        if now in actions:
            actions.pop(now)()
        return training_step(trainer, *arguments, **more)

    PretrainTrainer.training_step = step
    try:
        yield
    finally:
        PretrainTrainer.training_step = training_step


MEASURED = """A run of 12 steps with a checkpoint every four. From some step on no file can grow beyond a limit, for a
while or for good, or the output directory is deleted. Where the limit stays the run ends with exit code 4, and is
resumed without it. `survived`: the expected exit code, at most three lines of error, no traceback, no older checkpoint
changed (`damaged`: files of them). Rows and weights are compared with the run that nothing disturbed."""

if __name__ == "__main__":
    publish("fault_disk", "a disk that fails in mid-run", MEASURED, disk_faults())
