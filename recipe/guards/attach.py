"""How the callback reaches the Trainer.

Callbacks are given no trainer. `RegressionCallback(trainer=...)` takes one; without it, `find_trainer` takes it from
the call stack of `on_train_begin`: the `self` of the first calling frame that is a Trainer holding this callback.
`Wrapping` then wraps three methods of that instance: `training_step` and `prediction_step` (every micro-batch) and
`accelerator.clip_grad_norm_` (the norm before clipping).
"""

import logging
import sys
from collections.abc import Callable

from transformers import Trainer, TrainerCallback

logger = logging.getLogger("recipe.guards")


def find_trainer(callback: TrainerCallback) -> tuple[Trainer | None, str | None]:
    """The Trainer that is training now, and the checkpoint that it resumes from (None: it starts fresh)."""
    frame, trainer, checkpoint = sys._getframe(1), None, None
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, Trainer) and callback in candidate.callback_handler.callbacks:
            named = frame.f_locals.get("resume_from_checkpoint")
            trainer, checkpoint = trainer or candidate, named if isinstance(named, str) else checkpoint
        frame = frame.f_back
    return trainer, checkpoint


class Wrapping:
    """Methods of instances that have been replaced; `undo` puts back what was there."""

    def __init__(self):
        self._replaced: list[tuple[object, str, object]] = []

    def replace(self, owner: object, name: str, make: Callable[[Callable], Callable]) -> None:
        own = vars(owner).get(name)  # None: the class's
        self._replaced.append((owner, name, own))
        setattr(owner, name, make(getattr(owner, name)))

    def original(self, owner: object, name: str) -> object | None:
        """What the instance itself held under `name`, None where the class's method is used."""
        return next((own for held, held_name, own in self._replaced if held is owner and held_name == name), None)

    def undo(self) -> None:
        for owner, name, own in reversed(self._replaced):
            if own is None:
                delattr(owner, name)
            else:
                setattr(owner, name, own)
        self._replaced.clear()


def make_visible() -> None:
    """In a script that has not configured logging, print the guards' lines to stderr in the documented form."""
    if logging.getLogger().handlers or logger.handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s | %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
