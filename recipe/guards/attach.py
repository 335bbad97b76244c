"""How the callback reaches the Trainer.

Callbacks are given no trainer. `RegressionCallback(trainer=...)` takes one; without it, `find_trainer` takes it from
the call stack of `on_train_begin`: the `self` of the first calling frame that is a Trainer holding this callback.
`Wrapping` then wraps three methods of that instance: `training_step` and `prediction_step` (every micro-batch) and
`accelerator.clip_grad_norm_` (the norm before clipping).
"""

import sys
from collections.abc import Callable
from pathlib import Path

from transformers import Trainer, TrainerCallback

from recipe.guards.session import Session


def find_trainer(callback: TrainerCallback) -> tuple[Trainer | None, str | None]:
    """The Trainer that is training now, and the checkpoint that it resumes from (None: it starts fresh)."""
    frame, trainer, checkpoint = sys._getframe(1), None, None
    while frame is not None:
        # Before Python 3.13 a frame keeps what `f_locals` gave, its trainer and model too, also after `del`: a caller
        # of `train` is not asked.
        names = {"self"} if trainer is None else {"self", "resume_from_checkpoint"}
        candidate = frame.f_locals.get("self") if names <= {*frame.f_code.co_varnames} else None
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

    def watch(self, session: Session, checkpoint: Path | None, on_error: Callable[[BaseException], None]) -> None:
        """Wraps the three methods of the session's trainer. The first micro-batch sets the session up. A wrapper stays
        in place when other code has copied it, and then does nothing. `on_error`: is told of an exception in a
        micro-batch, and raises none."""
        trainer, own_step = session.trainer, vars(session.trainer).get("training_step")

        def wrap_training_step(training_step: Callable) -> Callable:
            def step(model, inputs, num_items_in_batch=None, *args, **kwargs):
                if not session.is_begun:  # also where the guards of this rank have failed: the others wait for it
                    session.begin(inputs, num_items_in_batch, own_step, checkpoint)
                if not session.is_watching:
                    return training_step(model, inputs, num_items_in_batch, *args, **kwargs)
                tokens = session.before_micro_step(inputs, num_items_in_batch)
                try:
                    loss = training_step(model, inputs, num_items_in_batch, *args, **kwargs)
                except BaseException as error:
                    session.attempt(session.taps.drop_micro_step)
                    on_error(error)
                    raise
                session.after_micro_step(loss, inputs, tokens)
                return loss

            return step

        def wrap_prediction_step(prediction_step: Callable) -> Callable:
            def step(model, inputs, *args, **kwargs):
                if not session.is_watching:
                    return prediction_step(model, inputs, *args, **kwargs)
                tokens = session.attempt(session.taps.begin_prediction, inputs)
                outputs = prediction_step(model, inputs, *args, **kwargs)
                session.attempt(session.taps.end_prediction, tokens, outputs)
                return outputs

            return step

        def wrap_clip(clip: Callable) -> Callable:
            def clip_grad_norm_(*args, **kwargs):
                if not session.is_watching:
                    return clip(*args, **kwargs)
                session.attempt(session.taps.before_clip)
                norm = clip(*args, **kwargs)
                session.attempt(session.taps.after_clip, session.local, norm)
                return norm

            return clip_grad_norm_

        self.replace(trainer, "training_step", wrap_training_step)
        self.replace(trainer, "prediction_step", wrap_prediction_step)
        self.replace(trainer.accelerator, "clip_grad_norm_", wrap_clip)

    def undo(self) -> None:
        for owner, name, own in reversed(self._replaced):
            if own is None:
                vars(owner).pop(name, None)  # other code may have taken it away
            else:
                setattr(owner, name, own)
        self._replaced.clear()
