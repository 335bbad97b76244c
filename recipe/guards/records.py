"""The files of a run directory that guards write: one JSON object a line, rank 0 only, flushed at each line.

What is read again may be damaged, or of another version: `fits` and `unfit` say whether it is what was written.
"""

import json
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Literal, NotRequired, TypedDict, Union, get_args, get_origin, get_type_hints

from recipe.guards.finding import FINDING_IDS, Finding


class StepRecord(TypedDict):
    """One optimizer step. `loss` in nats per token, `grad_norm` before clipping (None where it is not clipped),
    `learning_rate` used. `floor` and `ceiling`: n-gram and unigram loss of the same tokens, while there is an
    envelope."""

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
        file.write(json.dumps(record) + "\n")


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
        kept = [record for record in read_lines(path) if fits(record.get("step"), int) and record["step"] <= step]
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        partial.replace(path)


def read_steps(path: Path, until: int) -> list[StepRecord]:
    """The unbroken row of steps that ends with `until`. What lies before a damaged record is left out: over the gap,
    the usual fall of a loss would look like a jump."""
    steps = []
    for record in reversed(read_lines(path)):
        if record.get("step") == until - len(steps) and fits(record, StepRecord):
            steps.append(record)
    return steps[::-1]


def as_finding(record: dict) -> Finding | None:
    """None where it is none that this version knows."""
    if not fits(record, Finding) or record["id"] not in FINDING_IDS:
        return None
    values = {name: record[name] for name in _hints_of(Finding)}
    return Finding(**{**values, "likely_causes": tuple(record["likely_causes"])})


# --- what was read is what was written


def unfit(record: dict, hints: dict) -> list[str]:
    """The names whose values are missing in `record` or of another type than `hints` say."""
    return [name for name, hint in hints.items() if name not in record or not fits(record[name], hint)]


def fits(value, hint) -> bool:
    """Is `value`, as parsed from JSON, of the type `hint`? A list may stand for a tuple, an object for a dataclass or
    a TypedDict, a whole number for a float; a bool is no number."""
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if kind is Literal:
        return value in parts
    if kind is float:
        return type(value) in (float, int)
    if kind is dict and parts:
        return type(value) is dict and all(fits(each, parts[1]) for each in value.values())
    if kind is list or parts[1:] == (...,):
        return type(value) is list and all(fits(each, parts[0]) for each in value)
    if kind is tuple:
        return type(value) is list and len(value) == len(parts) and all(map(fits, value, parts))
    if hints := _hints_of(kind):
        optional = getattr(kind, "__optional_keys__", ())
        return type(value) is dict and all(n in optional and n not in value for n in unfit(value, hints))
    return type(value) is kind


@cache
def _hints_of(kind: type) -> dict:
    return get_type_hints(kind)
