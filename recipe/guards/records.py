"""The files of a run directory that guards write: one JSON object a line, rank 0 only, flushed at each line."""

import json
from pathlib import Path
from typing import NotRequired, TypedDict


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
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def keep_until(path: Path, step: int) -> None:
    """Drop records after `step`, which a resumed run will write again."""
    if path.exists():
        kept = [record for record in read_lines(path) if record["step"] <= step]
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        partial.replace(path)
