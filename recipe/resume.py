"""What a checkpoint restores, against what the configuration asks for."""

import json
import logging
from pathlib import Path

from recipe.checkpoints import STREAM_STATE
from recipe.errors import UserError

logger = logging.getLogger(__name__)


def load_position(checkpoint: Path, identity: dict, settings: dict, start: dict, on_changed_stream: str) -> dict:
    """The position to resume from: the one saved in a checkpoint, or `start` for `on_changed_stream` "restart".

    Raises `UserError` with the differences where it belongs to another stream and `on_changed_stream` is "refuse", or
    where settings differ that the checkpoint restores.
    """
    saved = json.loads((checkpoint / STREAM_STATE).read_text(encoding="utf-8"))
    if differences := _differences(saved["settings"], settings):
        raise UserError(
            f"{checkpoint} restores these settings, so other values would be ignored:{differences}\n  restore the old "
            f"values, or start a new run from its weights: --model_name_or_path {checkpoint}"
        )
    position, differences = saved["position"], _differences(saved["identity"], identity)
    touched = [line for line in differences.splitlines() if ".modified:" in line]
    if touched and len(touched) == differences.count("\n"):  # copied, or touched
        logger.warning("files have another date than in %s; size and what was hashed are the same", checkpoint)
        return position
    if not differences:
        return position
    if on_changed_stream == "refuse":
        raise UserError(
            f"{checkpoint} was made on another stream, so its position is not valid here:{differences}\n  undo the "
            "change; or add --on_changed_stream continue (keep the position) or restart (from the new stream's start)"
        )
    logger.warning("%s was made on another stream:%s\n  %s", checkpoint, differences, CHANGED[on_changed_stream])
    if on_changed_stream == "restart":
        return start
    shapes = [[len(lanes) for lanes in where["lanes"]] for where in (position, start)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"{checkpoint} has {shapes[0]} lanes by source, the config {shapes[1]}: no position can be kept; use "
            "--on_changed_stream restart"
        )
    return position


CHANGED = {
    "continue": "continuing at its position anyway: documents may be missed or read twice",
    "restart": "reading the new stream from its start",
}


def _differences(saved: dict, wanted: dict, inside: str = "") -> str:
    """A line for each value that differs, named by the keys that lead to it."""
    lines = ""
    for name in dict.fromkeys([*saved, *wanted]):
        before, after = saved.get(name), wanted.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += _differences(before, after, f"{inside}{name}.")
        elif before != after:
            lines += f"\n  {inside}{name}: checkpoint {_shown(before)}, config {_shown(after)}"
    return lines


def _shown(value) -> str:
    return "none" if value is None else json.dumps(value) if isinstance(value, (dict, list)) else str(value)
