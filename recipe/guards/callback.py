"""RegressionCallback: translates the events of any Trainer, and acts on what the guards find.

    trainer.add_callback(RegressionCallback())

It knows no guard by name. A step's numbers leave the device without waiting and are judged when the next step ends, on
the main process; what other ranks record is gathered there over the host's network.
"""

import atexit
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakSet

from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

from recipe.console import BesideBars
from recipe.guards.answers import Answers
from recipe.guards.attach import Wrapping, find_trainer
from recipe.guards.guard import CannotJudge, Finding, Guard, NotApplicable, shorten
from recipe.guards.ranks import Ranks
from recipe.guards.records import StepRecord, append_evaluation, prepare_files, read_steps
from recipe.guards.reporter import Reporter
from recipe.guards.run import plain_rate
from recipe.guards.session import Options, Session
from recipe.guards.trajectory import load_reference
from recipe.guards.worker import HISTORY, why

logger = logging.getLogger("recipe.guards")
FILES = ("steps.jsonl", "evals.jsonl", "findings.jsonl")
FOLDER = "_recipe"  # of the files, in a Trainer's `output_dir`: `push_to_hub` uploads no `_*`


class RegressionCallback(Answers):
    """Watches the training of a causal language model by any `transformers.Trainer`; needs nothing else of the recipe.

    Args:
        trainer: the Trainer it is added to. May be left out: it is then found when the training begins.
        trajectory: `auto`, `none` or the path of a reference.
        on_regression: `warn`, or `stop` (save a checkpoint and end the training at the first warning or error).
        disabled_guards: finding ids that stay silent.
        facts: what the trainer cannot tell about the run and a reference may ask for, such as
            `{"source": "docstrings"}`.

    Writes `steps.jsonl`, `evals.jsonl`, `findings.jsonl`, `run.json` and `report.html` into `output_dir/_recipe`, and
    its state into each checkpoint. Trackers of `report_to` get its numbers and findings.

    After training, on the main process: `findings`, `judged` (ids that had enough to judge), `judged_steps` (id -> on
    how many steps), `cannot_judge` and `not_applicable` (id -> reason), `stopped_by`, and `failure`: why the guards
    were not in force to the end, None if they were.
    """

    guards: tuple[type[Guard], ...] = ()  # set by `recipe.guards`

    def __init__(
        self,
        trainer: Trainer | None = None,
        trajectory: str = "auto",
        on_regression: str = "warn",
        disabled_guards: Iterable[str] = (),
        facts: dict | None = None,
    ):
        _check_options(self.guards, trainer, trajectory, on_regression, disabled_guards)
        self.trajectory, self.on_regression, self.disabled = trajectory, on_regression, frozenset(disabled_guards)
        self.only_check = self.is_saved_by_trainer = False
        self.reporter = Reporter(self.guards, self.disabled, self._act)
        self.documents_of: Callable[[int], list[str]] | None = None  # of a micro-batch, from 0
        self.stopped_by: Finding | None = None
        self.session: Session | None = None  # of the training that goes on, or the last one
        self._facts, self._given_trainer = dict(facts or {}), trainer
        self._history: list[StepRecord] = []
        self._trainer: Trainer | None = None
        self._checkpoint: Path | None = None
        self._why_off: str | None = None  # from the beginning
        self._wrapping, self._lines = Wrapping(), BesideBars(logger)
        self.seconds, self._begun = 0.0, 0.0  # of the training that has ended

    def begin_pass(self, tokens_in_pass: int | None, source: str, message: str) -> None:
        """A declared further pass over a source: repetition of earlier passes is no fault, and n-gram counts no longer
        tell what a model may know. Any rank may notice it first; `message` is logged once for each `source`."""
        if self.session is not None:
            self.session.announce_pass(source, tokens_in_pass, message)

    # --- Trainer's events

    def on_train_begin(self, args, state, control, **kwargs):
        self._control = control
        try:
            self._begin(args, state)
        except Exception as error:
            if self.only_check and not isinstance(error, CannotJudge):
                raise
            self._wrapping.undo()
            self._trainer = self.session = None
            self._why_off = _switch_off(self.reporter, error, state.is_world_process_zero)

    def _begin(self, args, state) -> None:
        """Raises `CannotJudge` where there is nothing to watch."""
        if self in _unfinished:
            self._end_unfinished()
        self._release()
        self.session = self._why_off = None
        self.reporter.findings.clear()
        self.reporter.is_main = state.is_world_process_zero
        self._begun, self.seconds = time.perf_counter(), 0.0
        self._lines.attach()
        found, checkpoint = find_trainer(self)
        self._trainer = self._given_trainer or found
        reason = _why_not(self._trainer, found, self)
        if reason is None and _first_callback(self._trainer) is not self:
            self.reporter.is_main = False  # two would write every line of the files twice
            raise CannotJudge("another RegressionCallback watches this Trainer")
        if reason is not None:
            self.open_files(args, state)
            raise reason.without_trace()  # which is not held by this frame
        given = Options(self.guards, self.trajectory, self._facts, self.only_check, self.documents_of)
        known = (self.reporter, Ranks(args.world_size, self.is_main), self._folder(args))
        self.session = Session(self._trainer, given, *known)
        self.session.attempt(self.open_files, args, state)  # where it fails, other ranks wait for this one
        self.session.trackers.num_sent = len(self.findings)  # of the run before a resume
        self.session.history = self._history
        self.session.tokens_seen = self._history[-1]["tokens_seen"] if self._history else 0
        self._checkpoint = _checkpoint_of(args, state, checkpoint)
        self._wrapping.watch(self.session, self._checkpoint, self._on_error)
        self._process, self._was_interrupted = os.getpid(), False
        if args.world_size == 1 and not self.is_saved_by_trainer and not args.auto_find_batch_size:
            _unfinished.add(self)
        _write_own_files(self, lambda own_run: own_run.describe(self, self._trainer, self._checkpoint))

    def on_epoch_begin(self, args, state, control, **kwargs):
        """A further epoch is a declared pass where epochs are what was asked for, or are known to be (sized data).
        An iterable that ends and starts again until `max_steps` is not."""
        is_sized = self._trainer is not None and not isinstance(self._trainer.train_dataset, IterableDataset)
        if self.session is not None and self.session.run is not None and (is_sized or args.max_steps <= 0):
            self._flush(control)
            while self.session.passes < int(state.epoch + 1e-6) + 1:
                self.session.begin_pass(None)

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        if self._is_watching:
            self.session.before_step(_rates(optimizer), _scheduled_rates(lr_scheduler))

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self._is_watching:
            self.session.after_step()

    def on_step_end(self, args, state, control, **kwargs):
        if self.session is not None:
            if self._was_interrupted:  # and goes on
                self._was_interrupted, self.seconds = False, 0.0
                _unfinished.add(self)
                self._lines.attach()
            self._flush(control, is_final=False)
            self.session.end_step(state.global_step)
            if self.session.stop_asked and args.world_size == 1:
                _stop(control)

    def on_save(self, args, state, control, **kwargs):
        if not self.is_saved_by_trainer:  # else it calls the two itself
            self.begin_save(control)
            with _disk_errors_logged():
                self.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        control.should_save = False  # a stop that arrived just now: it is saved

    def begin_save(self, control) -> None:  # on every rank, before `save`
        if self.session is not None:
            self.session.local.was_saved = True
            self._flush(control)  # a run killed after this checkpoint must find its last step's record

    def save(self, checkpoint: Path) -> None:
        if self.session is not None and self._is_set_up:
            self.session.save(checkpoint)
            self.session.last_end = time.perf_counter()

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if self.session is not None:
            self.session.local.was_saved = True
            self._flush(control)
            if metrics and self._is_set_up:
                self.session.judge_evaluation(metrics, state.global_step)
            self.session.last_end = time.perf_counter()
        if self.is_main and metrics:
            append_evaluation(self.output_dir / "evals.jsonl", state.global_step, self.tokens_seen, metrics)
            if self.seconds:  # the training has ended, and its report is written
                _write_own_files(self, lambda own_run: own_run.write_report(self.output_dir))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "train_runtime" in (logs or {}):  # Trainer's last log, on every rank; then it closes the trackers
            self._judge_last(control)
        if self.session is not None and {"loss", "train_runtime"} & set(logs or {}):
            self.session.attempt(self.session.trackers.send_steps, self.history, self.reference)

    def on_predict(self, args, state, control, **kwargs):
        if self._is_watching:
            self.session.attempt(self.session.taps.take_evaluation)  # a prediction's rows are no evaluation's

    def on_train_end(self, args, state, control, **kwargs):
        self._conclude()
        self._end()

    def _conclude(self, interrupted_by: str | None = None) -> None:
        """Judges the last step, and writes what there is to say."""
        _unfinished.discard(self)
        self._judge_last(self._control)
        self.seconds = time.perf_counter() - self._begun
        _write_own_files(self, lambda own_run: own_run.conclude(self, interrupted_by))

    def _end(self) -> None:
        self._release()
        self._lines.detach()

    def _on_error(self, error: BaseException) -> None:
        """In a micro-batch: most trainings end by it, without `on_train_end`. One that goes on is watched on."""
        if self in _unfinished:
            self._was_interrupted = True
            with _errors_logged():
                self._conclude(type(error).__name__)
            self._lines.detach()

    def _end_unfinished(self) -> None:
        """A training that an exception has ended between two micro-batches."""
        with _errors_logged():
            self._conclude(_name_of_error(self._trainer))
            self._end()

    def _judge_last(self, control) -> None:
        """The last step, and what has waited for the probes."""
        if self.session is not None:
            self._flush(control)
            self.session.explain_waiting()
            if self.session.failure is not None:  # since the last exchange
                self._give_up(self.session.failure)

    @property
    def _is_watching(self) -> bool:
        return self.session is not None and self._trainer is not None and self.session.is_watching

    @property
    def _is_set_up(self) -> bool:
        """The same on every rank, also where the guards of one have failed since the last exchange."""
        return self._trainer is not None and self.session.taps is not None

    def _flush(self, control, is_final: bool = True) -> None:
        if self._trainer is None:
            return
        self.stopped_by = self.session.flush(is_final) or self.stopped_by
        if self.session.is_over:
            self._give_up(self.session.failure)
            self._release()
        if self.session.is_stopping:
            _stop(control)

    def _act(self, finding: Finding) -> None:
        """On a warning or an error. On several ranks the training ends a step later, when all have been told."""
        if self.on_regression == "stop" and self.stopped_by is None:
            self.stopped_by = self.session.stopped_by = finding
            self.session.stop_asked = True
            if self._trainer is not None and self._trainer.args.world_size == 1:
                _stop(self._trainer.control)

    def _give_up(self, reason: str | CannotJudge) -> None:
        self.reporter.give_up([name for guard in self.guards for name in guard.ids], reason)

    def _release(self) -> None:
        self._wrapping.undo()
        if self.session is not None:
            self.session.close()
        self._trainer = None

    # --- files

    def _folder(self, args) -> Path:
        return Path(args.output_dir) if self.is_saved_by_trainer else Path(args.output_dir) / FOLDER

    def open_files(self, args, state) -> None:
        """A new run starts new files; a resumed one keeps what was written up to its step, and its history with it."""
        self.output_dir, is_main = self._folder(args), state.is_world_process_zero
        until = state.global_step or -1
        self._history = read_steps(self.output_dir / "steps.jsonl", until, HISTORY)
        self.reporter.begin(self.output_dir / "findings.jsonl", is_main, until)
        if is_main:
            prepare_files(self.output_dir, FILES, until)


# Trainings whose end is to be recorded: of one process, since several might wait for each other, and not of those that
# Trainer starts again when memory runs out.
_unfinished: WeakSet[RegressionCallback] = WeakSet()


@atexit.register
def _end_the_rest() -> None:
    for callback in list(_unfinished):
        if callback._process == os.getpid():  # else it is this one's parent that trains
            callback._end_unfinished()


def _name_of_error(trainer: Trainer) -> str:
    """Of the exception that ended the process or a notebook's cell, if it came out of this trainer."""
    error = getattr(sys, "last_value", None)
    frames = traceback.walk_tb(error.__traceback__ if error is not None else None)
    is_its = any(trainer is not None and frame.f_locals.get("self") is trainer for frame, _ in frames)
    return type(error).__name__ if is_its else "an exception"


@contextmanager
def _errors_logged() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # beside one of the user's own
        logger.error("the guards failed at the end of a training", exc_info=error)


def _switch_off(reporter: Reporter, error: Exception, is_main: bool) -> str:
    """From the beginning. Returns why."""
    reason = str(error) if isinstance(error, CannotJudge) else why(error)
    reasons = reporter.not_applicable if isinstance(error, NotApplicable) else reporter.cannot_judge
    reasons |= dict.fromkeys(reporter.guard_of, reason)
    if is_main:
        logger.warning("%s", shorten(f"the guards are off, the training goes on without them: {reason}"))
    return reason


def _why_not(trainer: Trainer | None, found: Trainer | None, callback: TrainerCallback) -> CannotJudge | None:
    """`found`: the one that trains, where it is known."""
    if trainer is None:
        return CannotJudge("no Trainer among the callers of on_train_begin; pass RegressionCallback(trainer=trainer)")
    if found not in (None, trainer) or callback not in trainer.callback_handler.callbacks:
        return CannotJudge("RegressionCallback(trainer=...) was given another Trainer than the one that trains")
    if trainer.is_deepspeed_enabled:
        return NotApplicable("DeepSpeed keeps weights, gradients and loss scaling in an engine of its own")
    return None


def _checkpoint_of(args, state, named: str | None) -> Path | None:
    """Which the training goes on from; None where it begins."""
    return Path(named or f"{args.output_dir}/checkpoint-{state.global_step}") if state.global_step else None


def _check_options(guards, trainer, trajectory: str, on_regression: str, disabled_guards: Iterable[str]) -> None:
    if not isinstance(trainer, Trainer | None):
        raise TypeError(f"trainer is a transformers.Trainer, not {trainer!r}; it may be left out")
    if isinstance(disabled_guards, str):
        raise ValueError(f"disabled_guards is a list of ids, not a string; write [{disabled_guards!r}]")
    known = [name for guard in guards for name in guard.ids]
    if unknown := sorted(set(disabled_guards) - set(known)):
        raise ValueError(f"disabled_guards: no guard is called {', '.join(unknown)}; known: {', '.join(known)}")
    if on_regression not in ("warn", "stop"):
        raise ValueError(f"on_regression is warn or stop, not {on_regression!r}")
    if trajectory not in ("auto", "none"):
        load_reference(trajectory)  # a bad file is refused now


def _first_callback(trainer: Trainer) -> RegressionCallback:
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, RegressionCallback))


def _rates(optimizer) -> list[tuple[float | None, float | None]]:
    """Of each parameter group: its learning rate, and the one that it began with."""
    return [(plain_rate(group["lr"]), plain_rate(group.get("initial_lr"))) for group in optimizer.param_groups]


def _scheduled_rates(scheduler) -> list[float | None]:
    """What the scheduler says the rate of each parameter group is; empty where it does not say."""
    try:
        return [plain_rate(rate) for rate in scheduler.get_last_lr()]
    except (AttributeError, NotImplementedError):
        return []


@contextmanager
def _disk_errors_logged() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        logger.warning("a checkpoint has no state of the guards, training goes on: %s", str(error))


def _write_own_files(guards: RegressionCallback, write: Callable) -> None:
    """Unless it is the recipe's own run, which does it with its results. `write` is given `recipe.own_run`."""
    if guards.is_main and not guards.is_saved_by_trainer:
        from recipe import own_run  # which imports this module

        try:
            write(own_run)
        except Exception as error:  # in a training that has nothing to do with it
            logger.warning("run.json or the report cannot be written: %s", str(error))


def _stop(control) -> None:
    control.should_save = True
    control.should_training_stop = True
