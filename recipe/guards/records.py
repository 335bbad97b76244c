"""The files that the guards write in the run directory, a JSON object a line."""

import errno
import json
import logging
import math
import os
import sys
from array import array
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np

from recipe.guards.guard import SEVERITIES, Finding
from recipe.plain_json import dumps

logger = logging.getLogger("recipe.guards")
_waiting: dict[Path, list[str]] = {}  # lines that could not be written yet


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
    append_text(path, dumps(record) + "\n")


def append_evaluation(path: Path, step: int, tokens_seen: int, metrics: Mapping) -> None:
    values = {name: value for name, value in metrics.items() if name.startswith("eval_")}
    append_line(path, {"step": step, "tokens_seen": tokens_seen, **values})


def append_text(path: Path, line: str) -> None:
    """Lines that cannot be written wait for those that come later, so that a disk that was full for a while leaves no
    gap. Logged when it begins and when it is over."""
    lines = _waiting.setdefault(path, [])
    lines.append(line)
    try:
        _append("".join(lines).encode(), path)
    except OSError as error:
        if len(lines) == 1:
            logger.warning("%s cannot be written, its lines wait in memory: %s", path, str(error))
        return
    if len(_waiting.pop(path)) > 1:
        logger.warning("%s: %d lines that had waited are written", path, len(lines))


def _append(data: bytes, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)  # it may have been deleted
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            file.truncate(end)  # no half of a line
            raise


def read_lines(path: Path) -> list[dict]:
    """Every whole record; a half-written line, of a run that was killed, is left out. No file, no records."""
    return [record for record in iterate_lines(path) if record is not None]


def iterate_lines(path: Path) -> Iterator[dict | None]:
    """The records of a file one by one, None for a line that is broken. No file, no records."""
    if path.is_file():
        with path.open("rb") as lines:
            for line in lines:
                if line.strip():
                    yield parse_object(line.decode("utf-8", errors="replace"))


def read_columns(path: Path, names: Sequence[str]) -> tuple[dict[str, np.ndarray], int, int]:
    """One float64 array for each name (NaN where a number is missing, null or not finite) of the records that have a
    step and tokens seen; the number of records, and of lines. A file of any length takes 8 bytes for each number."""
    columns, num_records, num_lines = {name: array("d") for name in names}, 0, 0
    for record in iterate_lines(path):
        num_lines += 1
        num_records += record is not None
        if record is not None and None not in (number(record.get("step")), number(record.get("tokens_seen"))):
            for name, column in columns.items():
                value = number(record.get(name))
                column.append(math.nan if value is None else value)
    return {name: np.array(column) for name, column in columns.items()}, num_records, num_lines


def number(value) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and abs(value) <= sys.float_info.max else None


def parse_object(text: str) -> dict | None:
    """The JSON object in `text`, None where it holds none or half of one."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def prepare_files(folder: Path, names: Sequence[str], step: int) -> None:
    """As `keep_until` for each file. `findings.jsonl` exists afterwards: an empty one says that nothing was found."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            keep_until(folder / name, step)
        (folder / "findings.jsonl").touch()
    except OSError as error:
        logger.warning("the guards cannot prepare their files; the training goes on: %s", str(error))


def keep_until(path: Path, step: int) -> None:
    """Cut the file before the first record after `step`, which a resumed run will write again with all that follows,
    or the line that is broken off at its end."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        end = 0
        for line in file:
            found = (parse_object(line.decode("utf-8", errors="replace")) or {}).get("step")
            if not line.endswith(b"\n") or (type(found) is int and found > step):
                break
            end += len(line)
        file.truncate(end)


def read_steps(path: Path, until: int, limit: int | None = None) -> list[StepRecord]:
    """The unbroken row of steps that ends with `until`, of the last `limit`. What lies before a damaged record is left
    out: over the gap, the usual fall of a loss would look like a jump."""
    steps = []
    known = (record for record in iterate_lines(path) if record is not None and type(record.get("step")) is int)
    for record in reversed(deque((record for record in known if record["step"] <= until), limit)):
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
        texts = (finding.found, finding.expected, finding.cause, *finding.likely_causes)
        is_whole &= all(isinstance(text, str) for text in texts)
        is_whole &= type(finding.step) is int and type(finding.tokens_seen) is int
        return Finding(**{**vars(finding), "likely_causes": tuple(finding.likely_causes)}) if is_whole else None
    except TypeError:
        return None
