"""Steps whose loss or gradients are not finite are not applied: weights, moments and schedule stay as they are.

The decision is made on the device, as `GradScaler` makes it: fused optimizers of torch read it from `found_inf`.
Others have their gradients removed, for which the host has to wait. The host learns of it before the next optimizer
step, when the flag has long arrived, and then puts the schedule back.

A state is known to be good when the next step from it was finite. Until then no older checkpoint is deleted for it.
"""

import logging

import torch
from transformers import TrainerCallback

from recipe.guards.batches import AsyncCopy
from recipe.internals import takes_found_inf

logger = logging.getLogger(__name__)


class SkipCallback(TrainerCallback):
    """To be called before the guards, which look at the learning rate. `total`: of this step's losses and its gradient
    norm, not finite if one of them is not; set by the trainer. `num_skipped`: steps of the whole run that were not
    applied; `last_applied`: the last one that was, as far as the host knows; `in_a_row`: those since then that were
    not; `is_hopeless`: they are MAX_IN_A_ROW, and the training stops without a checkpoint, since the next step from
    this state is not finite either. `is_save_due`: a checkpoint was left out for that reason, and is to be made up."""

    # Chosen: one row can spoil a step, or two at the border of two. After three, the weights or the data are at fault.
    MAX_IN_A_ROW = 3

    def __init__(self):
        self.total: torch.Tensor | None = None
        self.num_skipped = self.in_a_row = self.last_applied = 0
        self.is_hopeless = self.is_save_due = False
        self._pending: AsyncCopy | None = None
        self._step = 0  # the pending one
        self._schedule: tuple[dict, list] | None = None  # before the pending step

    def resume(self, step: int, num_skipped: int, last_applied: int) -> None:
        """From a checkpoint of `step`."""
        self.num_skipped, self.last_applied, self.in_a_row = num_skipped, last_applied, step - last_applied

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        self.settle(optimizer, lr_scheduler)
        self._step = state.global_step + 1
        if getattr(optimizer, "scaler", None) is not None:  # fp16: it does the same, and finds its scale by it
            self.last_applied = self._step
            return
        flag = (~self.total.isfinite()).float()
        if args.world_size > 1:  # gradients are the same on all ranks, losses are not
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        inner = optimizer.optimizer
        if takes_found_inf(inner):
            inner.found_inf = flag
        elif flag.item():
            inner.zero_grad(set_to_none=True)  # no optimizer touches a parameter without gradient
        self._pending = AsyncCopy(flag)
        self._schedule = lr_scheduler.state_dict(), [group["lr"] for group in optimizer.param_groups]

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if hasattr(optimizer.optimizer, "found_inf"):
            del optimizer.optimizer.found_inf

    def settle(self, optimizer, lr_scheduler) -> None:
        """Read whether the last step was applied, and put the schedule back if not. Before a checkpoint, too."""
        if self._pending is None:
            return
        was_skipped, self._pending = bool(self._pending.read()), None
        self.in_a_row = self.in_a_row + 1 if was_skipped else 0
        if not was_skipped:
            self.last_applied = self._step
        else:
            self.num_skipped += 1
            schedule, rates = self._schedule
            lr_scheduler.load_state_dict(schedule)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        self.is_hopeless |= self.in_a_row >= self.MAX_IN_A_ROW

    def on_step_end(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        if state.global_step >= state.max_steps:
            self.settle(optimizer, lr_scheduler)
        if self.is_hopeless and not control.should_training_stop:
            if state.is_world_process_zero:
                words = "step %d | stopping: %d steps in a row were not finite; none of them was applied"
                logger.error(words, state.global_step, self.MAX_IN_A_ROW)
            control.should_training_stop = True
        control.should_save |= self.is_save_due
