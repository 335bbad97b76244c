"""What the guards keep in a checkpoint: `guards.json` (numbers) and `guards.npz` (counts, fingerprints, the pinned
batch). Written by rank 0; half a file is never left under its name."""

import json
import logging
import zipfile
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


def read_state(checkpoint: Path) -> tuple[dict, dict[str, np.ndarray]] | None:
    """None where the checkpoint holds none (made without the guards), or a damaged one, which is said."""
    if not (checkpoint / NUMBERS).is_file():
        return None
    try:
        numbers = json.loads((checkpoint / NUMBERS).read_text(encoding="utf-8"))
        with np.load(checkpoint / ARRAYS, allow_pickle=False) as file:
            return numbers, dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("%s: the guards' state is damaged (%s); they begin anew", checkpoint, error)
        return None
