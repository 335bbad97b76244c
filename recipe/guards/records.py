"""The files that the guards write: lines of JSON in the run directory, and their state in checkpoints.

What is read again may be damaged or of another version. It is restored in one `try`; what cannot be restored starts
fresh, with one warning.
"""

import json
import logging
import math
from dataclasses import fields
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np

from recipe.guards.guard import SEVERITIES, Finding
from recipe.plain_json import dumps

logger = logging.getLogger("recipe.guards")
NUMBERS, ARRAYS = "guards.json", "guards.npz"


class StepRecord(TypedDict):
    """One optimizer step. `loss` in nats per token (null in the file where it is not finite), `grad_norm` before
    clipping (None where it is not clipped), `learning_rate` used. `floor` and `ceiling`: n-gram and unigram loss of
    the same tokens, while there is an envelope."""

    step: int
    tokens_seen: int
    loss: float
    grad_norm: float | None
    learning_rate: float
    tokens_per_second: float
    floor: NotRequired[float]
    ceiling: NotRequired[float]


def append_line(path: Path, record: dict) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(dumps(record) + "\n")


def read_lines(path: Path) -> list[dict]:
    """Every whole record; a half-written line, of a run that was killed, is left out. No file, no records."""
    return read_and_count_lines(path)[0]


def read_and_count_lines(path: Path) -> tuple[list[dict], int]:
    """As `read_lines`, with the number of lines that are not blank: more than the records where some are broken."""
    if not path.is_file():
        return [], 0
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]
    return [record for record in map(parse_object, lines) if record is not None], len(lines)


def parse_object(text: str) -> dict | None:
    """The JSON object in `text`, None where it holds none or half of one."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def keep_until(path: Path, step: int) -> None:
    """Drop records after `step`, which a resumed run will write again, and those that name no step."""
    if path.exists():
        kept = [record for record in read_lines(path) if type(record.get("step")) is int and record["step"] <= step]
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(dumps(record) + "\n" for record in kept), encoding="utf-8")
        partial.replace(path)


def read_steps(path: Path, until: int) -> list[StepRecord]:
    """The unbroken row of steps that ends with `until`. What lies before a damaged record is left out: over the gap,
    the usual fall of a loss would look like a jump."""
    steps = []
    for record in reversed(read_lines(path)):
        if record.get("loss", 0.0) is None:  # it was not finite, which JSON cannot hold
            record["loss"] = math.nan
        if record.get("step") == until - len(steps) and _is_step(record):
            steps.append(record)
    return steps[::-1]


def _is_step(record: dict) -> bool:
    optional = ("floor", "ceiling", "grad_norm")
    numbers = [record.get(name) for name in StepRecord.__required_keys__ if name != "grad_norm"]
    numbers += [record[name] for name in optional if record.get(name) is not None]
    return "grad_norm" in record and all(type(number) in (int, float) for number in numbers)


def as_finding(record: dict) -> Finding | None:
    """None where it is none that this version can show."""
    names = {field.name for field in fields(Finding)}
    try:
        finding = Finding(**{name: value for name, value in record.items() if name in names})
        is_whole = finding.severity in SEVERITIES and isinstance(finding.evidence, dict)
        is_whole &= all(isinstance(text, str) for text in (finding.found, finding.expected, *finding.likely_causes))
        is_whole &= type(finding.step) is int and type(finding.tokens_seen) is int
        return Finding(**{**vars(finding), "likely_causes": tuple(finding.likely_causes)}) if is_whole else None
    except TypeError:
        return None


# --- the state in a checkpoint


def write_state(checkpoint: Path, numbers: dict, arrays: dict[str, np.ndarray]) -> None:
    """`guards.json` and `guards.npz`. Half a file is never left under its name."""
    partial = checkpoint / f"{ARRAYS}.partial"
    with partial.open("wb") as file:
        np.savez(file, **arrays)
    partial.replace(checkpoint / ARRAYS)
    partial = checkpoint / f"{NUMBERS}.partial"
    partial.write_text(dumps(numbers), encoding="utf-8")
    partial.replace(checkpoint / NUMBERS)


def read_state(checkpoint: Path) -> tuple[dict, dict[str, np.ndarray]] | None:
    """None where the checkpoint holds none (made without the guards), or a damaged one, which is logged."""
    if not (checkpoint / NUMBERS).is_file():
        return None
    try:
        numbers = json.loads((checkpoint / NUMBERS).read_text(encoding="utf-8"))
        if not isinstance(numbers, dict):
            raise ValueError(f"{NUMBERS} holds no JSON object")
        with np.load(checkpoint / ARRAYS, allow_pickle=False) as file:
            return numbers, dict(file)
    except Exception as error:  # a damaged archive fails in many ways, and none may end a run
        warn_damaged(checkpoint, f"{type(error).__name__}: {error}")
        return None


def warn_damaged(checkpoint: Path, problem: str) -> None:
    logger.warning("%s: the guards' state cannot be restored, they start fresh: %s", checkpoint, problem)
