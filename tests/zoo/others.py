"""What others offer, watching the same run as our guards: a plain watchdog, trainproof 0.22.0 and losslint 0.4.1.

    others = Others()
    others.watch(trainer)  # built, not yet training
    trainer.train()
    others.alarms()  # {"watchdog": [{"step": 12, "what": "loss spike", "said": ...}], "trainproof": [], ...}

Each is used at its documented defaults and given all that its documentation asks for:

- watchdog: reads each logged step, and the raw loss of each micro-batch for NaN and Inf.
- trainproof: `TrainproofCallback()`, which judges the log every 25 steps from 10 logged losses on; `trainproof epoch`
  on the whole log when the run ends; its objective checks. The callback makes those (`objective_check=True`) on 32
  batches that it reads from the loader before training; its README warns that this can change the order of batches,
  and it refuses streams. Here the same functions hear the first 32 micro-batches as they go by: the run is left
  alone, and streams are judged too. Left out: its wall-clock rule, which on a busy machine would judge the machine.
- losslint: lints the log at each logged step, as `losslint watch` does where a step takes its 5 s or longer.
"""

import io
import json
import math
import statistics
import tempfile
from collections import deque
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from losslint.checks import run_all_checks
from losslint.parsing import load_run
from trainproof.epoch import check_epoch
from trainproof.integrations import hf
from trainproof.objective import TargetCoverage, check_ignore_index, check_label_alignment
from trainproof.preflight import check_preflight
from transformers import Trainer, TrainerCallback

OBJECTIVE_BATCHES = 32  # `TrainproofCallback(objective_batches=32)`
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


class Others:
    """One for each run. `errors`: where a tool crashed. `printed`: what a tool would have written to the terminal."""

    def __init__(self):
        self.errors: list[dict] = []
        self.printed: list[dict] = []
        self._alarms: dict[str, dict[str, dict]] = {"watchdog": {}, "trainproof": {}, "losslint": {}}
        self._ears: _Ears | None = None

    def watch(self, trainer: Trainer, documents=None, tokenizer=None, loss_shifts: bool | None = None) -> None:
        """Once, on every rank; rank 0 reports.

        For trainproof: `documents`, texts of the training data, and `tokenizer` make its preflight; `loss_shifts` is
        what its documentation wants from a user whose loss is not the model's (None: it looks at the model).
        """
        if not trainer.is_world_process_zero():
            return
        if documents is not None:
            with self.quietly("trainproof"):
                records = [{"text": text} for text in documents]
                self.hear_trainproof(0, check_preflight(records, tokenizer=tokenizer)["findings"])
        self._ears = _Ears(self, trainer, loss_shifts)
        trainer.add_callback(self._ears)

    def alarms(self) -> dict[str, list[dict]]:
        """After the run, also one that broke: each kind once, at the first step that knew (0: before training)."""
        if self._ears is not None:
            self._ears.judge_end()
        return {tool: sorted(found.values(), key=lambda alarm: alarm["step"]) for tool, found in self._alarms.items()}

    def hear(self, tool: str, step: int, what: str, said: str) -> None:
        self._alarms[tool].setdefault(what, {"step": step, "what": what, "said": said})

    def hear_trainproof(self, step: int, findings: list[dict]) -> None:
        for finding in findings:
            if finding["level"] in ("WARN", "FAIL"):
                self.hear("trainproof", step, finding["id"], f"{finding['message']} {finding['evidence']}")

    @contextmanager
    def quietly(self, tool: str):
        """A tool that prints or breaks is written down and disturbs nobody."""
        printed = io.StringIO()
        with redirect_stdout(printed), redirect_stderr(printed):
            try:
                yield
            except Exception as error:
                record = {"tool": tool, "error": f"{type(error).__name__}: {error}"}
                if record not in self.errors:
                    self.errors.append(record)
        if printed.getvalue():
            self.printed.append({"tool": tool, "text": printed.getvalue()})


class _Ears(TrainerCallback):
    """Hears the log through callbacks, the micro-batches through `training_step`.

    It wraps that method from `on_step_begin` to `on_step_end`. Our guards wrap it in `on_train_begin`, look at what
    was there before and put it back in `on_train_end`; so neither sees the other, whichever was added first.
    """

    def __init__(self, others: Others, trainer: Trainer, loss_shifts: bool | None):
        self._others, self._trainer = others, trainer
        num_classes = hf._infer_num_classes(trainer.model)
        self._watchdog = Watchdog(num_classes)
        self._trainproof = hf.TrainproofCallback()
        self._objective = Objective(trainer, num_classes, loss_shifts)
        self._own_step = self._training_step = None

    def on_train_begin(self, args, state, control, **kwargs):
        for entry in state.log_history:  # of a resumed run: the watchdog's state, which a checkpoint would hold
            self._watchdog.judge(entry)

    def on_step_begin(self, args, state, control, **kwargs):
        if self._training_step is None:
            self._own_step = vars(self._trainer).get("training_step")
            self._training_step = self._trainer.training_step
            self._trainer.training_step = self._listen

    def on_step_end(self, args, state, control, **kwargs):
        del self._trainer.training_step
        if self._own_step is not None:
            self._trainer.training_step = self._own_step
        self._own_step = self._training_step = None

    def _listen(self, model, inputs, *rest, **named):
        with self._others.quietly("trainproof"):
            self._others.hear_trainproof(*self._objective.hear(inputs))
        loss = self._training_step(model, inputs, *rest, **named)
        # Trainer logs 0.0 or an average in place of a loss that is not finite (logging_nan_inf_filter).
        if not math.isfinite(loss):
            self._others.hear("watchdog", self._trainer.state.global_step + 1, "loss not finite", str(loss.item()))
        return loss

    def on_log(self, args, state, control, **kwargs):
        for what, said in self._watchdog.judge(state.log_history[-1]):
            self._others.hear("watchdog", state.global_step, what, said)
        with self._others.quietly("trainproof"):
            self._trainproof.on_log(args, state, control)
            if self._trainproof.last_checked_step == state.global_step:
                self._judge_log()
        with self._others.quietly("losslint"), log_file(state.log_history) as path:
            for finding in run_all_checks(load_run(path)):
                if finding.severity in ("warning", "error"):
                    self._others.hear("losslint", state.global_step, finding.check, finding.message)

    def judge_end(self) -> None:
        with self._others.quietly("trainproof"):
            self._others.hear_trainproof(*self._objective.judge_coverage())
            if self._trainer.state.log_history:
                self._judge_log()

    def _judge_log(self) -> None:
        state = self._trainer.state
        with log_file(state.log_history) as path:
            self._others.hear_trainproof(state.global_step, check_epoch(path, fmt="hf")["findings"])


class Objective:
    """trainproof's checks of ignore index, label shift and target coverage, fed with micro-batches as they pass."""

    def __init__(self, trainer: Trainer, num_classes: int, loss_shifts: bool | None):
        self._trainer, self._num_classes = trainer, num_classes
        self._ignore_index = hf._infer_ignore_index(trainer.model)
        self._loss_shifts = hf._loss_shifts_labels(trainer.model) if loss_shifts is None else loss_shifts
        self._coverage: TargetCoverage | None = TargetCoverage(num_classes, self._ignore_index)
        self._num_batches = 0

    def hear(self, inputs: dict) -> tuple[int, list[dict]]:
        """The step that could know, and findings."""
        findings, input_ids, labels = [], inputs.get("input_ids"), inputs.get("labels")
        if self._num_batches == 0:
            findings = check_ignore_index(self._num_classes, self._ignore_index)
            if input_ids is not None and labels is not None:
                findings += check_label_alignment(input_ids, labels, self._ignore_index, self._loss_shifts)
        self._num_batches += 1
        if labels is not None and self._coverage is not None:
            self._coverage.observe(labels)
        return self.judge_coverage() if self._num_batches == OBJECTIVE_BATCHES else (self._step, findings)

    def judge_coverage(self) -> tuple[int, list[dict]]:
        """Known before training where the callback could have read the loader: data with a length."""
        coverage, self._coverage = self._coverage, None
        step = 0 if hasattr(self._trainer.train_dataset, "__len__") else self._step
        return step, coverage.result() if coverage is not None and coverage.n_targets else []

    @property
    def _step(self) -> int:
        return self._trainer.state.global_step


@contextmanager
def log_file(history: list[dict]):
    """The part of trainer_state.json that the tools read."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trainer_state.json"
        path.write_text(json.dumps({"log_history": history}))
        yield path
