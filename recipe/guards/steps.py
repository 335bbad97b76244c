"""One optimizer step as it is heard, and its numbers on their way to the host."""

import math
import time
from dataclasses import dataclass, field

import torch

from recipe.guards.batches import OnItsWay, TokensOnTheirWay
from recipe.guards.listener import HeardRows, as_one, as_plain
from recipe.guards.parameters import Measured

Rates = list[tuple[float | None, float | None]]


@dataclass
class StepInProgress:
    """What is heard between two optimizer steps on this rank. `learning_rates`: `(lr, initial_lr)` of each group;
    `scheduled_rates`: what the scheduler says they are. `gradient`: of `GradientWatch.take`."""

    losses: list[torch.Tensor] = field(default_factory=list)
    tokens: list[TokensOnTheirWay] = field(default_factory=list)
    heard: list[tuple[HeardRows, OnItsWay]] = field(default_factory=list)
    grad_norm: torch.Tensor | float | None = None
    learning_rates: Rates = field(default_factory=lambda: [(0.0, None)])
    scheduled_rates: list[float | None] = field(default_factory=list)
    gradient: torch.Tensor | None = None
    was_saved: bool = False  # or evaluated, since the step before
    num_tokens: int = 0

    @property
    def learning_rate(self) -> float:
        return self.learning_rates[0][0] or 0.0

    def add_heard(self, heard: list[HeardRows]) -> None:
        self.heard += [(rows, OnItsWay(as_one(rows))) for rows in heard]

    def values(self) -> OnItsWay:
        """The loss, the gradient norm (NaN where it is not known), the six norms of `gradient`, then the loss of each
        micro-batch."""
        losses = [loss.float().reshape(()) for loss in self.losses]
        total = losses[0]
        for loss in losses[1:]:  # in the order and precision in which Trainer adds them
            total = total + loss
        norm = self.grad_norm if self.grad_norm is not None else math.nan
        norm = torch.as_tensor(norm, dtype=torch.float32, device=total.device).reshape(())
        gradient = self.gradient if self.gradient is not None else torch.zeros(6, device=total.device)
        return OnItsWay(torch.cat([torch.stack([total, norm]), gradient.to(total.device), torch.stack(losses)]))


@dataclass
class PendingStep:
    """A step whose numbers are on their way to the host. `record`: what the host knew of it at once."""

    record: dict
    heard_of: StepInProgress
    values: OnItsWay
    checksums: OnItsWay | None
    measured: list[Measured]

    def read(self) -> dict:
        """What this rank has to tell of the step."""
        loss, norm, *values = self.values.read().tolist()
        return {
            "loss": loss,
            "grad_norm": norm if self.heard_of.grad_norm is not None else None,
            "gradient": values[:6] if self.heard_of.gradient is not None else None,
            "losses": values[6:],
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
