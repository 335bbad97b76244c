"""The files that the guards write in the run directory, a JSON object a line."""

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import NotRequired, TypedDict

from recipe.guards.guard import SEVERITIES, Finding
from recipe.plain_json import dumps


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
        texts = (finding.found, finding.expected, finding.cause, *finding.likely_causes)
        is_whole &= all(isinstance(text, str) for text in texts)
        is_whole &= type(finding.step) is int and type(finding.tokens_seen) is int
        return Finding(**{**vars(finding), "likely_causes": tuple(finding.likely_causes)}) if is_whole else None
    except TypeError:
        return None
