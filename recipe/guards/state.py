"""What the guards keep in a checkpoint: `guards.json` (numbers) and `guards.npz` (counts, fingerprints, the pinned
batch). Written by rank 0; half a file is never left under its name."""

import json
import logging
from pathlib import Path
from typing import TypedDict, get_type_hints

import numpy as np

from recipe.guards.finding import Finding
from recipe.guards.records import fits, unfit

logger = logging.getLogger("recipe.guards")
NUMBERS, ARRAYS = "guards.json", "guards.npz"


class SavedNumbers(TypedDict):
    """`guards.json`. `watch` is checked where it is restored, see `Watch.restore`."""

    step: int
    pinned_loss: float | None
    optimizer_states: int
    optimizer_steps: int | None
    learning_rate_agrees: bool
    active: dict[str, Finding]
    judged_steps: dict[str, int]
    watch: dict


def write_state(checkpoint: Path, numbers: dict, arrays: dict[str, np.ndarray]) -> None:
    partial = checkpoint / f"{ARRAYS}.partial"
    with partial.open("wb") as file:
        np.savez(file, **arrays)
    partial.replace(checkpoint / ARRAYS)
    partial = checkpoint / f"{NUMBERS}.partial"
    partial.write_text(json.dumps(numbers), encoding="utf-8")
    partial.replace(checkpoint / NUMBERS)


def read_state(checkpoint: Path) -> tuple[SavedNumbers, dict[str, np.ndarray]] | None:
    """None where the checkpoint holds none (made without the guards), or a damaged one, which is said."""
    if not (checkpoint / NUMBERS).is_file():
        return None
    try:
        numbers = json.loads((checkpoint / NUMBERS).read_text(encoding="utf-8"))
        if not fits(numbers, dict):
            raise ValueError(f"{NUMBERS} holds no JSON object")
        if wrong := unfit(numbers, get_type_hints(SavedNumbers)):
            raise ValueError(f"missing, or of another type: {', '.join(wrong)}")
        with np.load(checkpoint / ARRAYS, allow_pickle=False) as file:
            return numbers, dict(file)
    except Exception as error:  # a damaged archive fails in many ways, and none may end a run
        say_damaged(checkpoint, error)
        return None


def say_damaged(checkpoint: Path, error: Exception) -> None:
    logger.warning(
        "%s: the guards' state is damaged (%s: %s); they begin anew", checkpoint, type(error).__name__, error
    )
