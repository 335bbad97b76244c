"""One optimizer step as it is heard, and its numbers on their way to the host."""

import math
import time
from dataclasses import dataclass, field

import torch

from recipe.guards.batches import OnItsWay, TokensOnTheirWay
from recipe.guards.listener import HeardRows, as_one, as_plain
from recipe.guards.optimization import MeasuredStep

Rates = list[tuple[float | None, float | None]]


@dataclass
class StepInProgress:
    """What is heard between two optimizer steps on this rank. `learning_rates`: `(lr, initial_lr)` of each group;
    `scheduled_rates`: what the scheduler says they are. `gradients`: of `GradientWatch.take`, for each parameter that
    is followed. `clipped_norm`: of all gradients after clipping, where it was measured."""

    losses: list[torch.Tensor] = field(default_factory=list)
    tokens: list[TokensOnTheirWay] = field(default_factory=list)
    heard: list[tuple[HeardRows, OnItsWay]] = field(default_factory=list)
    grad_norm: torch.Tensor | float | None = None
    learning_rates: Rates = field(default_factory=lambda: [(0.0, None)])
    scheduled_rates: list[float | None] = field(default_factory=list)
    gradients: list[torch.Tensor | None] = field(default_factory=list)
    clipped_norm: torch.Tensor | None = None
    was_saved: bool = False  # or evaluated, since the step before
    num_tokens: int = 0

    @property
    def learning_rate(self) -> float:
        return self.learning_rates[0][0] or 0.0

    def add_heard(self, heard: list[HeardRows]) -> None:
        self.heard += [(rows, OnItsWay(as_one(rows))) for rows in heard]

    def values(self) -> OnItsWay:
        """The loss, the gradient norm before and after clipping (NaN where it is not known), the loss of each
        micro-batch, then the six norms of each of `gradients`."""
        losses = [loss.float().reshape(()) for loss in self.losses]
        total = losses[0]
        for loss in losses[1:]:  # in the order and precision in which Trainer adds them
            total = total + loss
        norms = [math.nan if norm is None else norm for norm in (self.grad_norm, self.clipped_norm)]
        norms = [torch.as_tensor(norm, dtype=torch.float32, device=total.device).reshape(()) for norm in norms]
        gradients = [gradient.to(total.device) for gradient in self.gradients if gradient is not None]
        return OnItsWay(torch.cat([torch.stack([total, *norms, *losses]), *gradients]))


@dataclass
class PendingStep:
    """A step whose numbers are on their way to the host. `record`: what the host knew of it at once."""

    record: dict
    heard_of: StepInProgress
    values: OnItsWay
    checksums: OnItsWay | None
    measured: MeasuredStep

    def read(self) -> dict:
        """What this rank has to tell of the step."""
        loss, norm, clipped_norm, *values = self.values.read().tolist()
        count = len(self.heard_of.losses)
        norms = iter(values[count:])
        gradients = [None if each is None else [next(norms) for _ in each] for each in self.heard_of.gradients]
        return {
            "loss": loss,
            "grad_norm": norm if self.heard_of.grad_norm is not None else None,
            "clipped_norm": clipped_norm if self.heard_of.clipped_norm is not None else None,
            "gradients": gradients,
            "losses": values[:count],
            "seen": [tokens.read() for tokens in self.heard_of.tokens],
            "heard": [as_plain(heard, values.read()) for heard, values in self.heard_of.heard],
            "checksums": self.checksums.read().tolist() if self.checksums is not None else None,
        }


class StepClock:
    """Seconds from step to step, without what lies between them: evaluations and savings."""

    def __init__(self):
        self._last = time.perf_counter()

    def restart(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        before, self._last = self._last, time.perf_counter()
        return self._last - before
