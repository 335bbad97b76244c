"""What the guards know, in the trackers of `report_to`: their numbers beside those of Trainer, findings as text and,
where the tracker has them (wandb, trackio), as alerts.

All goes through the callbacks that Trainer made for `report_to`, so that any tracker gets it. A tracker that raises is
left alone from then on, with one line in the log.
"""

import contextlib
import copy
import io
import logging
import statistics
import sys
import weakref
from collections.abc import Callable, Sequence

from tqdm.contrib import DummyTqdmFile
from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)

from recipe.guards.guard import Finding
from recipe.guards.records import StepRecord
from recipe.guards.trajectory import Reference

logger = logging.getLogger("recipe.guards")
TAKE_TEXT = (TensorBoardCallback, TrackioCallback, WandbCallback)  # some others drop it or raise
ALERT_MODULES = {WandbCallback: "wandb", TrackioCallback: "trackio"}  # both have `alert` and `AlertLevel`
ALERT_LEVELS = {"warning": "WARN", "error": "ERROR"}
_off: weakref.WeakSet[TrainerCallback] = weakref.WeakSet()  # those that have raised


def trackers_of(trainer: Trainer) -> list[TrainerCallback]:
    kinds = tuple(INTEGRATION_TO_CALLBACK.values())
    return [each for each in trainer.callback_handler.callbacks if isinstance(each, kinds)]


class Trackers:
    """Of one training, on the main process; elsewhere, and without trackers, it does nothing."""

    def __init__(self, trainer: Trainer, is_main: bool, num_sent: int):
        """`num_sent`: findings that were sent before a resume."""
        self.trainer = trainer
        self.active = trackers_of(trainer) if is_main else []
        self._last_step, self.num_sent = trainer.state.global_step, num_sent

    def send_steps(self, history: Sequence[StepRecord], reference: Reference | None) -> None:
        """The steps since the last call, as Trainer sends the mean of their losses. `history`: oldest first."""
        records = [record for record in history if record["step"] > self._last_step] if self.active else []
        if records:
            self._last_step = records[-1]["step"]
            self._log(numbers_of(records, reference), self._last_step)

    def send_findings(self, findings: Sequence[Finding]) -> None:
        """Those that have not been sent. `findings`: all of the run."""
        news, self.num_sent = findings[self.num_sent :], len(findings)
        for finding in news if self.active else ():
            alarms = sum(each.severity in ALERT_LEVELS for each in findings[: findings.index(finding) + 1])
            self._log({"finding": describe(finding), "findings": alarms}, finding.step)
            if finding.severity in ALERT_LEVELS:
                self._each(_alert, finding)

    def _log(self, values: dict, step: int) -> None:
        state = copy.copy(self.trainer.state)
        state.global_step = step
        known = (self.trainer.args, state, self.trainer.control)
        numbers = {name: value for name, value in values.items() if not isinstance(value, str)}

        def send(tracker: TrainerCallback) -> None:
            logs = values if isinstance(tracker, TAKE_TEXT) else numbers
            tracker.on_log(*known, logs=dict(logs), model=self.trainer.model)

        self._each(send)

    def _each(self, send: Callable, *arguments) -> None:
        for tracker in [tracker for tracker in self.active if tracker not in _off]:
            try:
                send(tracker, *arguments)
            except Exception as error:
                _leave_alone(tracker, error)


def numbers_of(records: Sequence[StepRecord], reference: Reference | None) -> dict[str, float]:
    """Means over the steps, and what the reference expects at the last one."""
    values = {"tokens_per_second": statistics.fmean(record["tokens_per_second"] for record in records)}
    floors = [record["floor"] for record in records if "floor" in record]
    if floors:
        values["ngram_floor"] = statistics.fmean(floors)
    expected = reference.at(records[-1]["tokens_seen"]) if reference is not None else None
    if expected is not None:
        values |= {"expected_loss": expected.loss, "expected_loss_low": expected.low}
        values["expected_loss_high"] = expected.high
    return values


def describe(finding: Finding) -> str:
    """One paragraph in plain text."""
    parts = [f"{finding.severity}: {finding.id} at step {finding.step}: found {finding.found}"]
    parts += [f"expected {finding.expected}"]
    parts += [f"likely: {finding.likely_causes[0]}"] if finding.likely_causes else []
    return "; ".join([*parts, *([f"to do: {finding.action}"] if finding.action else [])])


def contain(trainer: Trainer) -> None:
    """From here on an exception of a tracker does not end the training: its callback does nothing any more, with one
    line in the log. What a tracker prints goes to stderr."""
    for tracker in trackers_of(trainer):
        for name in [name for name in vars(TrainerCallback) if name.startswith("on_")]:
            if getattr(type(tracker), name) is not getattr(TrainerCallback, name):
                setattr(tracker, name, _contained(getattr(tracker, name), tracker))


def _contained(event: Callable, tracker: TrainerCallback) -> Callable:
    def call(*arguments, **keywords):
        if tracker in _off:
            return None
        try:
            with contextlib.redirect_stdout(DummyTqdmFile(sys.stderr)):  # above a progress bar
                return event(*arguments, **keywords)
        except Exception as error:
            _leave_alone(tracker, error)
            return None

    return call


def _leave_alone(tracker: TrainerCallback, error: Exception) -> None:
    _off.add(tracker)
    name = type(tracker).__name__.removesuffix("Callback")
    what = " ".join(f"{type(error).__name__}: {error}".split())
    logger.warning("%s gets nothing any more, the training goes on: %.90s", name, what)


def _alert(tracker: TrainerCallback, finding: Finding) -> None:
    module = next((sys.modules.get(name) for kind, name in ALERT_MODULES.items() if isinstance(tracker, kind)), None)
    if module is not None:
        level = getattr(module.AlertLevel, ALERT_LEVELS[finding.severity])
        with contextlib.redirect_stdout(io.StringIO()):  # trackio prints it too; the log has the line already
            module.alert(title=f"{finding.severity}: {finding.id}", text=describe(finding), level=level)
