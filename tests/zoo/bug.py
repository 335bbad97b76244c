"""A seeded bug: a function that changes a `Run` from outside, and what is known of it."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from tests.zoo.run import Run
from tests.zoo.setting import Setting

AREAS = (
    *("labels and loss", "attention and positions", "data", "optimizer and schedule", "precision", "accumulation"),
    *("tokens", "checkpoint and resume", "ranks", "evaluation"),
)


@dataclass(frozen=True)
class Bug:
    """`names`: the finding ids that name its cause, the best first. `mechanism`: bugs that differ only in a number or
    in where they sit share one. `source`: a public report of it, or where it was seen. `onset`: the last healthy step.
    """

    name: str
    apply: Callable[[Run], None]
    names: tuple[str, ...]
    area: str
    mechanism: str
    source: str
    setting: Setting
    onset: int = 0

    @property
    def what(self) -> str:
        return (self.apply.__doc__ or "").strip().split("\n")[0]

    def __reduce__(self):
        """Travels to other processes by name: what the decorator was given is no longer a module's attribute."""
        return _find, (self.apply.__module__, self.name)


def _find(module: str, name: str) -> Bug:
    return getattr(importlib.import_module(module), name)


def bug(names: str, area: str, mechanism: str, source: str, setting: Setting, onset: int = 0):
    """Makes the decorated function a `Bug`; its docstring's first line is shown, its name is the bug's."""
    assert area in AREAS, area

    def make(apply: Callable[[Run], None]) -> Bug:
        return Bug(apply.__name__, apply, tuple(names.split()), area, mechanism, source, setting, onset)

    return make
