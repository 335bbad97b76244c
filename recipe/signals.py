"""Signals that end a training after the current step, with a checkpoint."""

import logging
import signal

import torch
from torch import distributed
from transformers import TrainerCallback

from recipe.errors import SAME_SECONDS, handle_endings

logger = logging.getLogger(__name__)


class SignalCallback(TrainerCallback):
    """A signal to any rank ends the training on all of them after the same step, with one checkpoint; a second one,
    SAME_SECONDS later or more, ends its process at once. `agreed`: the number of the signal that did, the same on
    every rank; None if none did.

    On several ranks each says at the end of a step what it has received, over the host's network, and reads what the
    others said at the end of the next step, so that none of them waits.
    """

    def __init__(self):
        self.received: int | None = None
        self.agreed: int | None = None
        self._group = self._sent = self._largest = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._group = distributed.new_group(backend="gloo") if args.world_size > 1 else None
        self._before = handle_endings(self._handle)

    def on_step_end(self, args, state, control, **kwargs):
        if self._group is None:
            self.agreed = self.received
        else:
            self._read()
            self._largest = torch.tensor(self.received or 0)
            self._sent = distributed.all_reduce(self._largest, distributed.ReduceOp.MAX, self._group, async_op=True)
        if self.agreed is not None:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._group is not None:
            if self._sent is not None:
                self._sent.wait()  # what comes in the last step is too late to stop anything
            distributed.destroy_process_group(self._group)

    def _read(self) -> None:
        if self._sent is not None:
            self._sent.wait()
            self.agreed = int(self._largest) or None

    def _handle(self, number, frame):
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = number
        name = signal.Signals(number).name
        words = "%s: saving a checkpoint after this step; repeat it after %.0f s to end immediately"
        logger.warning(words, name, SAME_SECONDS)
