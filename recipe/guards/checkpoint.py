"""The guards' state in a checkpoint: `guards.json` (numbers) and `guards.npz` (counts, fingerprints, pinned rows).

What is read may be damaged or of another version. It is restored in one `try`; what cannot be restored starts fresh,
with one warning.
"""

import json
import logging
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from recipe.guards.guard import shorten
from recipe.plain_json import dumps

logger = logging.getLogger("recipe.guards")
NUMBERS, ARRAYS = "guards.json", "guards.npz"


class Saved(NamedTuple):
    """`numbers`: of the session, `reporter`, `guards` and `taps` (by name). `arrays`: `OWNER.NAME`."""

    numbers: dict
    arrays: dict[str, np.ndarray]


def write_session(checkpoint: Path, numbers: dict, arrays: dict[str, np.ndarray], taps: dict[str, dict]) -> None:
    """Half a file is never left under its name. `taps`: their states, numbers and arrays mixed."""
    plain: dict[str, dict] = {}
    for name, state in taps.items():
        plain[name] = {key: value for key, value in state.items() if not isinstance(value, np.ndarray)}
        kept = {key: value for key, value in state.items() if isinstance(value, np.ndarray)}
        arrays = arrays | {f"{name}.{key}": value for key, value in kept.items()}
    partial = checkpoint / f"{ARRAYS}.partial"
    with partial.open("wb") as file:
        np.savez(file, **arrays)
    partial.replace(checkpoint / ARRAYS)
    partial, shapes = checkpoint / f"{NUMBERS}.partial", {name: np.shape(array) for name, array in arrays.items()}
    partial.write_text(dumps(_keep_not_finite({**numbers, "taps": plain, "shapes": shapes})), encoding="utf-8")
    partial.replace(checkpoint / NUMBERS)


def _keep_not_finite(value):
    """A copy in which a float that JSON lacks is `{"float": "nan"}`: as null, no guard would know it for a number."""
    if isinstance(value, dict):
        return {key: _keep_not_finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_keep_not_finite(each) for each in value]
    return {"float": str(float(value))} if isinstance(value, float) and not math.isfinite(value) else value


def _restore_not_finite(read: dict):
    return float(read["float"]) if read.keys() == {"float"} and isinstance(read["float"], str) else read


def read_session(checkpoint: Path) -> Saved | None:
    """None where the checkpoint holds none (made without the guards), or a damaged one, which is logged."""
    if not (checkpoint / NUMBERS).is_file():
        if (checkpoint / ARRAYS).exists():
            warn_damaged(checkpoint, f"{NUMBERS} is missing")
        return None
    try:
        text = (checkpoint / NUMBERS).read_text(encoding="utf-8")
        numbers = json.loads(text, object_hook=_restore_not_finite)
        if not isinstance(numbers, dict):
            raise ValueError(f"{NUMBERS} holds no JSON object")
        with np.load(checkpoint / ARRAYS, allow_pickle=False) as file:
            arrays = dict(file)
        shapes = numbers.get("shapes", {})
        cut = [name for name, array in arrays.items() if shapes.get(name, None) != list(array.shape)]
        for name in cut:  # its owner then misses it, and starts fresh
            del arrays[name]
        return Saved(numbers, arrays)
    except Exception as error:  # a damaged archive fails in many ways, and none may end a run
        warn_damaged(checkpoint, f"{type(error).__name__}: {error}")
        return None


def part_of_ranks(saved: Saved, guards: set[str]) -> Saved:
    """What other ranks need of the main process's state: the guards that compute on every rank, the place that the
    head is sampled at, and the pinned rows."""
    numbers = dict(saved.numbers)
    for name, wanted in (("guards", guards), ("taps", {"head"})):
        if isinstance(states := numbers.get(name), dict):  # else it is damaged, which is found where it is restored
            numbers[name] = {key: state for key, state in states.items() if key in wanted}
    owners = {*guards, "pinned"}
    return Saved(numbers, {name: array for name, array in saved.arrays.items() if name.split(".")[0] in owners})


def tap_state(saved: Saved, name: str) -> dict:
    own = {key: array for key, array in saved.arrays.items() if key.startswith(f"{name}.")}
    return {**saved.numbers["taps"].get(name, {}), **{key.removeprefix(f"{name}."): own[key] for key in own}}


def restore(session, saved: Saved) -> tuple[list[str], bool]:
    """Into a `session.Session` that is set up. What is wrong; and whether what the guards share could be restored:
    without it their own states are of no use."""
    numbers, run = saved.numbers, session.run
    try:
        session.taps.load({name: tap_state(saved, name) for name in numbers["taps"]})
        run.pinned.load(tap_state(saved, "pinned"))
        session.passes = int(numbers["passes"])
        session.learning_rate_sum = float(numbers["learning_rate_sum"])
        session.reporter.load(numbers["reporter"])
        return session.runner.load(run, numbers["guards"], saved.arrays), True
    except Exception as error:
        return [f"{type(error).__name__}: {error}"], False


def restore_findings(reporter, checkpoint: Path) -> None:
    """Without a session."""
    if (saved := read_session(checkpoint)) is not None:
        try:
            reporter.load(saved.numbers["reporter"])
        except Exception as error:
            warn_damaged(checkpoint, f"{type(error).__name__}: {error}")


def warn_damaged(checkpoint: Path, problem: str) -> None:
    line = f"{checkpoint.name}: the guards' state cannot be restored, they start fresh: {problem}"
    logger.warning("%s", shorten(line))
