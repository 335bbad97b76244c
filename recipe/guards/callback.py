"""RegressionCallback: translates the events of any Trainer, and acts on what the guards find.

    trainer.add_callback(RegressionCallback())

It knows no guard by name. A step's numbers leave the device without waiting and are judged when the next step ends, on
the main process; what other ranks record is gathered there over the host's network.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

from recipe.guards.attach import Wrapping, find_trainer, make_visible
from recipe.guards.checkpoint import restore_findings
from recipe.guards.guard import CannotJudge, Finding, Guard, NotApplicable
from recipe.guards.ranks import Ranks
from recipe.guards.records import StepRecord, append_line, prepare_files, read_steps
from recipe.guards.reporter import Reporter
from recipe.guards.run import plain_rate
from recipe.guards.session import HISTORY, Options, Session
from recipe.guards.trajectory import Reference, load_reference

logger = logging.getLogger("recipe.guards")
FILES = ("steps.jsonl", "evals.jsonl", "findings.jsonl")


class RegressionCallback(TrainerCallback):
    """Watches the training of a causal language model by any `transformers.Trainer`; needs nothing else of the recipe.

    Args:
        trainer: the Trainer it is added to. May be left out: it is then found when the training begins.
        trajectory: `auto`, `none` or the path of a reference.
        on_regression: `warn`, or `stop` (save a checkpoint and end the training at the first warning or error).
        disabled_guards: finding ids that stay silent.
        facts: what the trainer cannot tell about the run and a reference may ask for, such as
            `{"source": "docstrings"}`.

    Writes `steps.jsonl`, `evals.jsonl` and `findings.jsonl` into `output_dir`, and its state into each checkpoint.

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
        known = [name for guard in self.guards for name in guard.ids]
        if unknown := sorted(set(disabled_guards) - set(known)):
            raise ValueError(f"disabled_guards: no guard is called {', '.join(unknown)}; known: {', '.join(known)}")
        if on_regression not in ("warn", "stop"):
            raise ValueError(f"on_regression is warn or stop, not {on_regression!r}")
        if trajectory not in ("auto", "none"):
            load_reference(trajectory)  # a bad file is refused now
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
        self._wrapping = Wrapping()

    # --- what can be asked of it

    @property
    def findings(self) -> list[Finding]:
        return self.reporter.findings

    @property
    def judged_steps(self) -> Counter[str]:
        return self.reporter.judged_steps

    @property
    def judged(self) -> set[str]:
        return {name for name, count in self.judged_steps.items() if count}

    @property
    def cannot_judge(self) -> dict[str, str]:
        return self.reporter.cannot_judge

    @property
    def not_applicable(self) -> dict[str, str]:
        return self.reporter.not_applicable

    @property
    def is_main(self) -> bool:
        return self.reporter.is_main

    @property
    def failure(self) -> str | None:
        return self.session.failure if self.session else None

    @property
    def tokens_seen(self) -> int:
        return self.session.tokens_seen if self.session else self._history[-1]["tokens_seen"] if self._history else 0

    @property
    def history(self) -> list[StepRecord]:
        return self.session.history if self.session else self._history

    @property
    def facts(self) -> dict:
        return self.session.run.facts if self.session and self.session.run else self._facts

    @property
    def reference(self) -> Reference | None:
        return self.session.run.reference if self.session and self.session.run else None

    def begin_pass(self, tokens_in_pass: int | None, source: str, message: str) -> None:
        """A declared further pass over a source: repetition of earlier passes is no fault, and n-gram counts no longer
        tell what a model may know. Any rank may notice it first; `message` is logged once for each `source`."""
        if self.session is not None:
            self.session.announce_pass(source, tokens_in_pass, message)

    # --- Trainer's events

    def on_train_begin(self, args, state, control, **kwargs):
        make_visible()
        self._release()  # of a training that ended with an exception
        self.session = None
        found, checkpoint = find_trainer(self)
        self._trainer = self._given_trainer or found
        if self._trainer is not None and _first_callback(self._trainer) is not self:
            self._give_up("another RegressionCallback watches this Trainer")
            self._trainer, self.reporter.is_main = None, False  # two would write every line of the files twice
            return
        self.open_files(args, state)
        if self._trainer is not None and self._trainer.is_deepspeed_enabled:
            self._give_up(NotApplicable("DeepSpeed keeps weights, gradients and loss scaling in an engine of its own"))
            self._trainer = None
            return
        if self._trainer is None:
            self._give_up("no Trainer among the callers of on_train_begin; pass RegressionCallback(trainer=trainer)")
            return
        given = Options(self.guards, self.trajectory, self._facts, self.only_check, self.documents_of)
        ranks = Ranks(args.world_size, self.is_main)
        self.session = Session(self._trainer, given, self.reporter, ranks, self.output_dir)
        self.session.history = self._history
        self.session.tokens_seen = self._history[-1]["tokens_seen"] if self._history else 0
        default = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self._checkpoint = Path(checkpoint or default) if state.global_step else None
        self._wrapping.watch(self.session, self._checkpoint)

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
            groups = optimizer.param_groups
            rates = [(plain_rate(group["lr"]), plain_rate(group.get("initial_lr"))) for group in groups]
            self.session.before_step(rates, _scheduled_rates(lr_scheduler))

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self._is_watching:
            self.session.after_step()

    def on_step_end(self, args, state, control, **kwargs):
        if self.session is not None:
            self._flush(control)
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
            values = {name: value for name, value in metrics.items() if name.startswith("eval_")}
            record = {"step": state.global_step, "tokens_seen": self.tokens_seen, **values}
            append_line(self.output_dir / "evals.jsonl", record)

    def on_predict(self, args, state, control, **kwargs):
        if self._is_watching:
            self.session.attempt(self.session.taps.take_evaluation)  # a prediction's rows are no evaluation's

    def on_train_end(self, args, state, control, **kwargs):
        if self.session is not None:
            self._flush(control)
            self.session.explain_waiting()
            if self.session.failure is not None:  # since the last exchange
                self._give_up(self.session.failure)
            if self.is_main and not self.is_saved_by_trainer:  # the recipe's own run says it with its results
                _log_verdict(self)
        self._release()

    @property
    def _is_watching(self) -> bool:
        return self.session is not None and self._trainer is not None and self.session.is_watching

    @property
    def _is_set_up(self) -> bool:
        """The same on every rank, also where the guards of one have failed since the last exchange."""
        return self._trainer is not None and self.session.taps is not None

    def _flush(self, control) -> None:
        if self._trainer is None:
            return
        self.stopped_by = self.session.flush(self.stopped_by)
        if self.session.is_over:
            self._give_up(self.session.failure)
            self._release()
        if self.session.stop_asked:
            _stop(control)

    def _act(self, finding: Finding) -> None:
        """On a warning or an error. On several ranks the training ends a step later, when all have been told."""
        if self.on_regression == "stop" and self.stopped_by is None:
            self.stopped_by = finding
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

    def load(self, checkpoint: Path) -> None:
        """What was found before a checkpoint with which a training has nothing left to do. After `open_files`."""
        if self.is_main:
            restore_findings(self.reporter, checkpoint)

    def open_files(self, args, state) -> None:
        """A new run starts new files; a resumed one keeps what was written up to its step, and its history with it."""
        self.output_dir, is_main = Path(args.output_dir), state.is_world_process_zero
        until = state.global_step or -1
        self._history = read_steps(self.output_dir / "steps.jsonl", until, HISTORY)
        self.reporter.begin(self.output_dir / "findings.jsonl", is_main, until)
        if is_main:
            prepare_files(self.output_dir, FILES, until)


def _first_callback(trainer: Trainer) -> RegressionCallback:
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, RegressionCallback))


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
        logger.warning("a checkpoint has no state of the guards, training goes on: %s", error)


def _log_verdict(guards: RegressionCallback) -> None:
    from recipe.results import verdict  # which imports this module

    try:
        logger.info("verdict: %s", verdict(guards, None).text)
    except Exception as error:  # at the end of a training that has nothing to do with it
        logger.debug("no verdict", exc_info=error)


def _stop(control) -> None:
    control.should_save = True
    control.should_training_stop = True
