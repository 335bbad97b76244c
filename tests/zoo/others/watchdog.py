"""A plain watchdog on the loss and the gradient norm: what a careful person would write in an afternoon."""

import math
import statistics
from collections import deque

from trainproof.integrations import hf

from tests.zoo.others.tool import Tool

# axolotl, LossWatchDogCallback: stops after `loss_watchdog_patience` losses (default 3) in a row over
# `loss_watchdog_threshold`, which has no default: "a good estimate is ~2 times the loss at the start of training".
PATIENCE, TIMES_FIRST_LOSS = 3, 2.0
# Ours: a loss that stays over that of a uniform guess is a constant that anyone would choose.
UNIFORM_AFTER, UNIFORM_MARGIN = 20, 1.0
# OLMo-core, StabilityMonitorCallback: `window_size` 128, `threshold_std` 6 over the mean, silent below a std of 1e-10.
# It waits for a full window. Runs of 60 to 150 steps would almost never be judged, so ours begins at 32.
WINDOW, THRESHOLD_STD, MIN_STD, MIN_WINDOW = 128, 6.0, 1e-10, 32


class Watchdog:
    """Judges log entries, oldest first; `num_classes` is the vocabulary."""

    def __init__(self, num_classes: int):
        self._uniform = math.log(num_classes)
        self._first_loss: float | None = None
        self._in_a_row = {"first": 0, "uniform": 0}
        self._windows = {name: deque(maxlen=WINDOW) for name in ("loss", "grad_norm")}

    def judge(self, entry: dict) -> list[tuple[str, str]]:
        """What is wrong with this step, in a word and in numbers."""
        values = {name: float(entry[name]) for name in ("loss", "grad_norm") if name in entry}
        found = [(f"{name} not finite", str(value)) for name, value in values.items() if not math.isfinite(value)]
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        for name, value in finite.items():
            if is_spike(value, self._windows[name]):
                found.append((f"{name} spike", f"{value:.3f}, mean {statistics.fmean(self._windows[name]):.3f}"))
            self._windows[name].append(value)
        return found + self._too_high(finite.get("loss"), entry["step"])

    def _too_high(self, loss: float | None, step: int) -> list[tuple[str, str]]:
        if loss is None:
            return []
        self._first_loss = self._first_loss or loss
        limits = {"first": TIMES_FIRST_LOSS * self._first_loss}
        if step > UNIFORM_AFTER:
            limits["uniform"] = self._uniform + UNIFORM_MARGIN
        for name, limit in limits.items():
            self._in_a_row[name] = self._in_a_row[name] + 1 if loss > limit else 0
        high = [limit for name, limit in limits.items() if self._in_a_row[name] >= PATIENCE]
        return [("loss too high", f"{loss:.3f}, limit {min(high):.3f}")] if high else []


def is_spike(value: float, window: deque) -> bool:
    if len(window) < MIN_WINDOW:
        return False
    std = statistics.pstdev(window)
    return std >= MIN_STD and value > statistics.fmean(window) + THRESHOLD_STD * std


class LossWatchdog(Tool):
    """Reads each logged step, and the raw loss of each micro-batch for NaN and Inf."""

    def __init__(self, trainer, hear):
        super().__init__(trainer, hear)
        self._dog = Watchdog(hf._infer_num_classes(trainer.model))

    def on_train_begin(self):
        for entry in self.trainer.state.log_history:  # of a resumed run: the state, which a checkpoint would hold
            self._dog.judge(entry)

    def on_backward(self, inputs, loss):
        # Trainer logs 0.0 or an average in place of a loss that is not finite (logging_nan_inf_filter).
        if not math.isfinite(loss):
            self.hear(self.step + 1, "loss not finite", str(loss.item()))

    def on_log(self):
        for what, said in self._dog.judge(self.trainer.state.log_history[-1]):
            self.hear(self.step, what, said)
