"""What the guards keep in a checkpoint: `guards.json` (numbers) and `guards.npz` (counts, fingerprints, the pinned
batch). Written by rank 0; half a file is never left under its name."""

import json
import logging
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

logger = logging.getLogger("recipe.guards")
NUMBERS, ARRAYS = "guards.json", "guards.npz"


def write_state(checkpoint: Path, numbers: dict, arrays: dict[str, np.ndarray]) -> None:
    partial = checkpoint / f"{ARRAYS}.partial"
    with partial.open("wb") as file:
        np.savez(file, **arrays)
    partial.replace(checkpoint / ARRAYS)
    partial = checkpoint / f"{NUMBERS}.partial"
    partial.write_text(json.dumps(numbers), encoding="utf-8")
    partial.replace(checkpoint / NUMBERS)


def read_state(checkpoint: Path, keys: Iterable[str]) -> tuple[dict, dict[str, np.ndarray]] | None:
    """None where the checkpoint holds none (made without the guards), or a damaged one, which is said. `keys`: what
    the numbers must have."""
    if not (checkpoint / NUMBERS).is_file():
        return None
    try:
        numbers = json.loads((checkpoint / NUMBERS).read_text(encoding="utf-8"))
        if missing := sorted(set(keys) - set(numbers)):
            raise ValueError(f"it has no {', '.join(missing)}")
        with np.load(checkpoint / ARRAYS, allow_pickle=False) as file:
            return numbers, dict(file)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        say_damaged(checkpoint, error)
        return None


def say_damaged(checkpoint: Path, error: Exception) -> None:
    logger.warning(
        "%s: the guards' state is damaged (%s: %s); they begin anew", checkpoint, type(error).__name__, error
    )
