"""Follows the parameters over the steps and hands what it measured to the checks of `updates.py`, a step late."""

from collections.abc import Iterable

import torch

from recipe.guards.batches import OnItsWay
from recipe.guards.facts import plain_rate
from recipe.guards.finding import Finding
from recipe.guards.thresholds import FROZEN_STEPS, LOST_STEPS, MOVING_RATE, STOPPED_STEPS
from recipe.guards.updates import (
    LOW_PRECISION,
    Parameters,
    check_frozen,
    check_lost_updates,
    check_small_updates,
    check_stopped,
    check_undone,
    count_kept,
    count_moved,
    count_small,
    have_moved,
    largest_gradients,
    sample_gradients,
    sample_parameters,
)

OF_THE_RATES_SIZE = ("adam", "lion", "adafactor", "lamb")
Judgment = tuple[str, Finding | None]
Measured = tuple[str, OnItsWay | list[str], list[float]]  # what, numbers or names, the steps' rates
STOPPED, UNDONE, SMALL = "stopped", "undone", "small"


class ParameterWatch:
    """One training. `parameters`: of the model as the optimizer got it. Parameters that do not move are looked for in
    the first steps that have a rate, those that get no gradient any more always, lost updates over and over in windows
    of `LOST_STEPS`."""

    def __init__(
        self, parameters: Parameters, optimizer_name: str, is_first_run: bool = True, groups: Iterable[dict] = ()
    ):
        self.parameters = parameters
        self.training = [(name, p) for name, p in parameters if p.requires_grad]
        # How far a step should move a weight is known for optimizers whose steps are of the size of their rate.
        is_known = any(name in optimizer_name.lower() for name in OF_THE_RATES_SIZE)
        self.in_full_precision = [(n, p) for n, p in self.training if p.dtype not in LOW_PRECISION]
        self.in_low_precision = [(n, p) for n, p in self.training if p.dtype in LOW_PRECISION and is_known]
        # Later the steps of Adam are smaller, as its averages are of older and larger gradients
        self._is_adam = is_first_run and "adam" in optimizer_name.lower()
        group_of = {id(parameter): group for group in groups for parameter in group["params"]}
        self._group_of = {name: group_of[id(p)] for name, p in parameters if id(p) in group_of}
        self._gradients: dict[str, torch.Tensor] = {}
        self._small: torch.Tensor | None = None  # [elements moved by far less than the rate, elements judged]
        self._rates: list[float] = []
        self._largest = self._moved = None
        self._before: dict[str, torch.Tensor] | None = None
        self._after: dict[str, torch.Tensor] | None = None  # the last step
        self._kept = None  # [elements that a step moved and that were not put back before the next, elements moved]
        self._steps_without: dict[str, int] = {}  # a gradient, of those that had one
        self._window: tuple[dict, dict] | None = None  # weights and gradients at its start
        self._window_rates: list[float] = []
        self._measured: list[Measured] = []

    def before_step(self, rate: float) -> None:
        self._count_steps_without()
        self._keep_moved()
        if len(self._rates) < FROZEN_STEPS and rate > MOVING_RATE and self.training:
            self._before = sample_parameters(self.training)
            judged = [(name, p) for name, p in self.in_full_precision if name in self._group_of]
            self._gradients = sample_gradients(judged) if self._is_adam else {}
            largest = largest_gradients(self.training)
            self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)
        if self.in_low_precision:
            if self._window is None:
                self._window = sample_parameters(self.in_low_precision), sample_gradients(self.in_low_precision)
            self._window_rates.append(rate)

    def after_step(self, rate: float) -> None:
        if self._before is not None:
            self._after = sample_parameters(self.training)
            if self._gradients:
                rates = {name: plain_rate(self._group_of[name]["lr"]) for name in self._gradients}
                small = count_small(self._before, self._after, self._gradients, rates)
                self._small = small if self._small is None else self._small + small
            self._rates.append(rate)
        if len(self._window_rates) == LOST_STEPS:
            counts = count_moved(*self._window, self.in_low_precision, sum(self._window_rates))
            self._measured.append(("lost_updates", OnItsWay(counts), self._window_rates))
            self._window, self._window_rates = None, []

    def _keep_moved(self) -> None:
        """What moved in the last step, and has not been put back since."""
        if self._after is None:
            return
        moved, kept = have_moved(self._before, self._after), count_kept(self._before, self._after, self.training)
        self._moved = moved if self._moved is None else self._moved | moved
        self._kept = kept if self._kept is None else self._kept + kept
        self._before = self._after = None
        if len(self._rates) == FROZEN_STEPS:
            measured = torch.stack([self._largest, self._moved.to(self._largest)])
            self._measured.append(("frozen_parameters", OnItsWay(measured), self._rates))
            self._measured.append((UNDONE, OnItsWay(self._kept), self._rates))
            if self._small is not None:
                self._measured.append((SMALL, OnItsWay(self._small), self._rates))

    def _count_steps_without(self) -> None:
        for name, parameter in self.training:
            if parameter.grad is not None:
                self._steps_without[name] = 0
            elif name in self._steps_without:
                self._steps_without[name] += 1
        stopped = [name for name, count in self._steps_without.items() if count == STOPPED_STEPS]
        if stopped:
            self._measured.append((STOPPED, stopped, []))

    def take(self) -> list[Measured]:
        """What this step measured."""
        measured, self._measured = self._measured, []
        return measured

    def judge(self, measured: list[Measured], step: int, tokens_seen: int) -> list[Judgment]:
        """What `take` gave at that step."""
        return [self._judge(kind, values, rates, step, tokens_seen) for kind, values, rates in measured]

    def _judge(self, kind: str, values, rates: list[float], *where: int) -> Judgment:
        if kind == STOPPED:
            return "frozen_parameters", check_stopped(*where, self.training, values)
        if kind == UNDONE:
            return "lost_updates", check_undone(*where, *values.read().tolist())
        if kind == SMALL:
            return "lost_updates", check_small_updates(*where, *values.read().tolist())
        return kind, self._judge_values(kind, values.read(), rates, *where)

    def _judge_values(self, guard: str, values: torch.Tensor, rates: list[float], *where: int) -> Finding | None:
        if guard == "lost_updates":
            return check_lost_updates(*where, *values.tolist(), max(rates))
        largest, moved = values.tolist()
        return check_frozen(*where, self.training, largest, [bool(value) for value in moved], rates)
