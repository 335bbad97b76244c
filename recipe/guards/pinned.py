"""One batch whose loss is stored in each checkpoint and computed again after a resume."""

import numpy as np
import torch
from transformers import Trainer

from recipe.guards import preflight
from recipe.guards.finding import CannotJudge, Finding
from recipe.guards.ranks import Ranks
from recipe.guards.updates import check_resume, count_optimizer_states, count_optimizer_steps

PREFIX = "pinned."


class PinnedBatch:
    """The first rows of the run's first batch. Every rank takes part, since a `compute_loss` may gather."""

    def __init__(self, trainer: Trainer, model: torch.nn.Module, ranks: Ranks):
        self.trainer, self.model, self.ranks = trainer, model, ranks
        self._rows: dict[str, torch.Tensor] = {}

    def pin(self, inputs: dict) -> None:
        self._rows = {} if self._is_sharded else preflight.pin(inputs)

    @property
    def _is_sharded(self) -> bool:
        return self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled

    def check(self, saved: tuple[dict, dict] | None, step: int, tokens_seen: int) -> Finding | None:
        """After a resume, before the next step: `saved` are rank 0's numbers and arrays. Raises `CannotJudge`."""
        names = ("pinned_loss", "optimizer_states", "optimizer_steps")
        told = self.ranks.share(saved and (_rows_of(saved[1]), *(saved[0][name] for name in names)))
        if self._is_sharded:
            raise CannotJudge("the weights are sharded over ranks")
        if told is None:
            raise CannotJudge("the checkpoint holds no state of the guards")
        self._rows, before, states, steps = told
        dtype, optimizer = preflight.precision_of(self.trainer, self.model), self.trainer.optimizer
        now = (count_optimizer_states(optimizer), steps, count_optimizer_steps(optimizer))
        return check_resume(step, tokens_seen, before, self.loss(), dtype, states, *now)

    def loss(self) -> float | None:
        return next(iter(self.losses(1)), None)

    def losses(self, times: int) -> list[float]:
        """In eval mode, of the present weights; none where no rows could be pinned."""
        if not self._rows:
            return []
        try:
            return preflight.losses_in_eval_mode(self.trainer, self.model, self._rows, times)
        except Exception as error:  # a probe never ends a run
            raise CannotJudge(f"the pinned batch failed with {type(error).__name__}: {error}") from error

    def state(self) -> tuple[dict, dict[str, np.ndarray]]:
        """For the checkpoint, see `check`."""
        try:
            loss = self.loss()
        except CannotJudge:
            loss = None
        optimizer = self.trainer.optimizer
        numbers = {"pinned_loss": loss, "optimizer_states": count_optimizer_states(optimizer)}
        numbers["optimizer_steps"] = count_optimizer_steps(optimizer)
        return numbers, {
            PREFIX + name: value.numpy() for name, value in self._rows.items() if value.dtype != torch.bfloat16
        }


def _rows_of(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """What is no number was not pinned; without it the loss cannot be computed, which `loss` says."""
    numbers = {n: a for n, a in arrays.items() if n.startswith(PREFIX) and a.dtype.kind in "biuf"}
    return {name.removeprefix(PREFIX): torch.from_numpy(array) for name, array in numbers.items()}
