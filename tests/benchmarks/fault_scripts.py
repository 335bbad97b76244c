"""A tiny run in this process, broken by a script, and what was lost: for fault_network.py and fault_disk.py."""

import contextlib
import hashlib
import io
import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from recipe import trainer
from recipe.__main__ import run
from recipe.console import configure_logging
from recipe.data import packing
from recipe.data.loader import BatchLoader
from recipe.trainer import SampleCallback
from tests.benchmarks.fault_run import write_setting

STEPS = 12
CHANGES = {
    "max_steps": STEPS, "save_steps": 4, "save_total_limit": 5, "eval_strategy": "no", "eval_steps": None,
    "gradient_accumulation_steps": 2,
}  # fmt: skip


@dataclass
class Ran:
    """How a run ended, what it printed as error and warning lines, and the rows of each step that it read."""

    code: int
    errors: list[str]
    warnings: list[str]
    steps: list[list[str]] = field(default_factory=list)


@dataclass
class Whole:
    """The run that nothing disturbs: the words of its command line without source and output, how it ended, and the
    requests that it made of the network."""

    folder: str
    words: list[str]
    ran: Ran
    num_requests: int = 0

    @property
    def run_dir(self) -> Path:
        return Path(self.folder) / "whole"

    @staticmethod
    def of_json(value: dict) -> "Whole":
        return Whole(**value | {"ran": Ran(**value["ran"])})


def prepare(folder: Path, **changes) -> list[str]:
    return ["train", str(write_setting(folder, **CHANGES | changes))]


def train(words: list[str]) -> Ran:
    """Runs the command in this process."""
    ran, stderr, caught = Ran(-1, [], []), io.StringIO(), Collector()
    log = logging.getLogger("recipe")
    before = log.level, log.propagate
    log.addHandler(caught)
    log.level, log.propagate = logging.WARNING, False
    try:
        with contextlib.redirect_stderr(stderr), rows_logged(ran.steps):
            ran.code = run(words)
    except Exception as error:
        ran.code, ran.errors = 1, [f"traceback: {error!r}"]
    finally:
        log.removeHandler(caught)
        log.level, log.propagate = before
    ran.errors += [line for line in stderr.getvalue().splitlines() if line.startswith("error: ")]
    ran.warnings = caught.lines
    return ran


class Collector(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record):
        if record.name != "recipe.guards":  # whose findings are no faults
            self.lines.append(record.getMessage())


@contextlib.contextmanager
def rows_logged(steps: list[list[str]]) -> Iterator[None]:
    """Adds the hashes of the rows of each step that is read."""
    read = BatchLoader._read_step

    def logged(loader, batches):
        found = read(loader, batches)
        rows = [row for batch in found for row in batch["input_ids"].numpy()]
        steps.append([hashlib.blake2b(row.tobytes(), digest_size=8).hexdigest() for row in rows])
        return found

    BatchLoader._read_step = logged
    try:
        yield
    finally:
        BatchLoader._read_step = read


@contextlib.contextmanager
def quiet_and_short(folder: Path) -> Iterator[None]:
    """Short samples, no chatter, caches in `folder`."""
    configure_logging(logging.ERROR)
    before = SampleCallback.__init__.__defaults__, trainer.words_of_sources
    limits = packing.FIRST_TOKENIZE_BYTES, packing.TOKENIZE_BYTES
    packing.FIRST_TOKENIZE_BYTES = packing.TOKENIZE_BYTES = 1  # no reading ahead: faults begin at all steps
    cache = os.environ.get("RECIPE_CACHE")
    SampleCallback.__init__.__defaults__ = (4,)
    trainer.words_of_sources = lambda *_: set()  # it would read the whole source
    os.environ["RECIPE_CACHE"] = str(folder / "cache")
    try:
        yield
    finally:
        SampleCallback.__init__.__defaults__, trainer.words_of_sources = before
        packing.FIRST_TOKENIZE_BYTES, packing.TOKENIZE_BYTES = limits
        os.environ.pop("RECIPE_CACHE")
        if cache is not None:
            os.environ["RECIPE_CACHE"] = cache


def judge(whole: Whole, ran: list[Ran], run_dir: Path, expected: int) -> dict:
    """What a broken run lost against the unbroken one. `ran`: its parts, the last of them resumed; `expected`: the
    exit code of the first part. `survived`: as expected, with at most three lines of error and no traceback."""
    wanted = Counter(row for step in whole.ran.steps for row in step)
    found = Counter(row for part in ran for step in part.steps for row in step)
    errors = [part.errors for part in ran]
    survived = ran[0].code == expected and ran[-1].code == 0 and max(map(len, errors)) <= 3
    survived &= not any("traceback" in line for lines in errors for line in lines)
    return {
        "survived": survived,
        "wrong_rows": ((wanted - found) + (found - wanted)).total(),
        "is_equal": weights_of(run_dir) == weights_of(whole.run_dir),
        "exit_code": ran[0].code,
        "errors": [line for lines in errors for line in lines],
        "warnings": sum(len(part.warnings) for part in ran),
    }


def weights_of(run_dir: Path) -> bytes | None:
    path = run_dir / "final/model.safetensors"
    return path.read_bytes() if path.is_file() else None
