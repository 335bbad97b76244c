"""All bugs and healthy runs, by part.

`development` was used to choose thresholds; `held_out` is only ever scored: it was written when they were frozen.
"""

import importlib
import pkgutil
from types import ModuleType

from tests.zoo import development, held_out, held_out_2, held_out_3, held_out_4, held_out_5
from tests.zoo.bug import AREAS, Bug
from tests.zoo.setting import Setting

PARTS = {
    "development": development,
    "held_out": held_out,
    "held_out_2": held_out_2,
    "held_out_3": held_out_3,
    "held_out_4": held_out_4,
    "held_out_5": held_out_5,
}


def bugs_of(part: str) -> list[Bug]:
    return [value for module in _modules(part) for value in vars(module).values() if isinstance(value, Bug)]


def healthy_of(part: str) -> dict[str, Setting]:
    """Each module may have a table `HEALTHY`."""
    return {name: setting for module in _modules(part) for name, setting in getattr(module, "HEALTHY", {}).items()}


def _modules(part: str) -> list[ModuleType]:
    package = PARTS[part]
    names = sorted(info.name for info in pkgutil.iter_modules(package.__path__))
    return [importlib.import_module(f"{package.__name__}.{name}") for name in names]


def tenth() -> dict[str, tuple[list[Bug], dict[str, Setting]]]:
    """By part: every tenth bug of each area, its first among them, and every tenth healthy run. Of `-m slow`."""
    bugs = [bug for part in PARTS for bug in bugs_of(part)]
    chosen = {bug.name for area in AREAS for bug in [bug for bug in bugs if bug.area == area][::10]}
    runs = [name for part in PARTS for name in healthy_of(part)][::10]
    return _parts_of(chosen | set(runs))


# What the tests run: five bugs with their twins and one healthy run. Each kind of run is among them, and runs on two
# ranks, with accumulation, and resumed. `tenth` has a bug of each area.
SAMPLE = {
    "original_no_shift",
    "stuck_iterator",
    "micro_batch_means_averaged",
    "ranks_read_the_same",
    "recipe_saves_half_the_lanes",
    "SFTTrainer on prompts",
}


def sample() -> dict[str, tuple[list[Bug], dict[str, Setting]]]:
    """By part: the bugs and healthy runs of SAMPLE."""
    return _parts_of(SAMPLE)


def _parts_of(names: set[str]) -> dict[str, tuple[list[Bug], dict[str, Setting]]]:
    return {
        part: (
            [bug for bug in bugs_of(part) if bug.name in names],
            {name: setting for name, setting in healthy_of(part).items() if name in names},
        )
        for part in PARTS
    }
