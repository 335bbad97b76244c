"""Follows the parameters over the steps and hands what it measured to the checks of `updates.py`, a step late."""

import torch

from recipe.guards.batches import OnItsWay
from recipe.guards.finding import Finding
from recipe.guards.thresholds import FROZEN_STEPS, LOST_STEPS, MOVING_RATE
from recipe.guards.updates import (
    LOW_PRECISION,
    Parameters,
    check_frozen,
    check_lost_updates,
    count_moved,
    have_moved,
    largest_gradients,
    sample_gradients,
    sample_parameters,
)

OF_THE_RATES_SIZE = ("adam", "lion", "adafactor", "lamb")
Judgment = tuple[str, Finding | None]
Measured = tuple[str, OnItsWay, list[float]]


class ParameterWatch:
    """One training. `parameters`: of the model as the optimizer got it. Frozen parameters are looked for in the first
    steps that have a rate, lost updates over and over in windows of `LOST_STEPS`."""

    def __init__(self, parameters: Parameters, optimizer_name: str):
        self.parameters = parameters
        self.training = [(name, p) for name, p in parameters if p.requires_grad]
        # How far a step should move a weight is known for optimizers whose steps are of the size of their rate.
        is_known = any(name in optimizer_name.lower() for name in OF_THE_RATES_SIZE)
        self.in_low_precision = [(n, p) for n, p in self.training if p.dtype in LOW_PRECISION and is_known]
        self._rates: list[float] = []
        self._largest = self._moved = None
        self._before: dict[str, torch.Tensor] | None = None
        self._window: tuple[dict, dict] | None = None  # weights and gradients at its start
        self._window_rates: list[float] = []
        self._measured: list[Measured] = []

    def before_step(self, rate: float) -> None:
        if len(self._rates) < FROZEN_STEPS and rate > MOVING_RATE and self.training:
            self._before = sample_parameters(self.training)
            largest = largest_gradients(self.training)
            self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)
        if self.in_low_precision:
            if self._window is None:
                self._window = sample_parameters(self.in_low_precision), sample_gradients(self.in_low_precision)
            self._window_rates.append(rate)

    def after_step(self, rate: float) -> None:
        if self._before is not None:
            moved = have_moved(self._before, self.training)
            self._moved = moved if self._moved is None else self._moved | moved
            self._before = None
            self._rates.append(rate)
            if len(self._rates) == FROZEN_STEPS:
                measured = torch.stack([self._largest, self._moved.to(self._largest)])
                self._measured.append(("frozen_parameters", OnItsWay(measured), self._rates))
        if len(self._window_rates) == LOST_STEPS:
            counts = count_moved(*self._window, self.in_low_precision, sum(self._window_rates))
            self._measured.append(("lost_updates", OnItsWay(counts), self._window_rates))
            self._window, self._window_rates = None, []

    def take(self) -> list[Measured]:
        """What this step measured."""
        measured, self._measured = self._measured, []
        return measured

    def judge(self, measured: list[Measured], step: int, tokens_seen: int) -> list[Judgment]:
        """What `take` gave at that step."""
        return [
            (guard, self._judge(guard, values.read(), rates, step, tokens_seen)) for guard, values, rates in measured
        ]

    def _judge(self, guard: str, values: torch.Tensor, rates: list[float], *where: int) -> Finding | None:
        if guard == "lost_updates":
            return check_lost_updates(*where, *values.tolist(), max(rates))
        largest, moved = values.tolist()
        return check_frozen(*where, self.training, largest, [bool(value) for value in moved], rates)
