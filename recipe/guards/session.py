"""The guards on one training of one Trainer: sets them up, carries each step to the main process, keeps their state.

A step's tensors are copied to the host while the next step runs. A worker thread reads them, hashes and counts the
tokens, gathers on the main process what the ranks have kept, and has the guards judge it; the training's own thread
takes the verdicts when the next step ends, and reports them. So nothing is ever left out because the machine is slow,
and the training waits only where the worker takes longer than a step.

Every rank takes part in every exchange, also one on which the guards have failed: an exchange is never inside code
that may raise. What the main process decides (to stop, a guard that is off) is sent with the next step's exchange, and
at saves, evaluations and the end at once, so that all ranks act at the same step.
"""

import functools
import logging
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Trainer

from recipe.guards.batches import shape_of
from recipe.guards.checkpoint import part_of_ranks, read_session, restore, warn_damaged, write_session
from recipe.guards.guard import CannotJudge, Finding, Guard
from recipe.guards.ngrams import TRAINED_BEFORE
from recipe.guards.ranks import Ranks
from recipe.guards.records import StepRecord
from recipe.guards.reporter import Reporter
from recipe.guards.run import Run
from recipe.guards.runner import Runner
from recipe.guards.sandbox import PinnedBatch
from recipe.guards.step import Evaluation, largest_rate, plain_losses
from recipe.guards.taps import LocalStep, PendingStep, Taps
from recipe.guards.trackers import Trackers
from recipe.guards.worker import Exchanged, Worker, decided, exchange, take_news, why

logger = logging.getLogger("recipe.guards")

# Step before which the probes that explain symptoms run once more: adapters and gates begin at zero. Chosen, not
# measured: Adam has moved a weight of zero 20 times by then.
PROBE_AGAIN = 20
# Steps between the probes of guards that probe at saves too. Chosen: such a probe costs the forward pass of some
# thousand tokens, a hundredth of that many steps of the demo.
PROBE_EVERY = 64
SECOND_PASS = "a second pass over the data has begun"


class PreflightDone(Exception):
    """Ends a training that was begun only to have its probes run."""


@dataclass(frozen=True)
class Options:
    """Of the callback. `only_check`: stop after the probes, and let a fault of the guards be raised.
    `documents_of`: of a micro-batch, counted from 0."""

    guards: tuple[type[Guard], ...]
    trajectory: str
    facts: dict
    only_check: bool
    documents_of: Callable[[int], list[str]] | None = None


def survives(method: Callable) -> Callable:
    """A fault of the guards does not end a training, see `Session.attempt`."""

    @functools.wraps(method)
    def call(self: "Session", *arguments):
        return self.attempt(method, self, *arguments)

    return call


class Session:
    """`history`: a record a step, oldest first. `failure`: why the guards are off, None while they are in force; a
    rank that fails takes part in the exchanges until the others know of it (`is_over`). `run`, `runner`, `taps`: None
    before the first micro-batch. `last_end`: of a step or of what is no training time. `stop_asked`: by this rank or
    one that told it so; `is_stopping`, `stopped_by`: all ranks know of it, by which finding."""

    def __init__(self, trainer: Trainer, options: Options, reporter: Reporter, ranks: Ranks, output_dir: Path):
        self.trainer, self.options, self.reporter, self.ranks = trainer, options, reporter, ranks
        self.output_dir, self.is_main = output_dir, reporter.is_main
        self.history: list[StepRecord] = []
        self.tokens_seen, self.passes, self.learning_rate_sum, self.eval_losses = 0, 1, 0.0, {}
        self.failure: str | None = None
        self.is_begun = self.is_over = self.stop_asked = self.is_stopping = False
        self.stopped_by: Finding | None = None
        self.trackers = Trackers(trainer, self.is_main, len(reporter.findings))
        self.run: Run | None = None
        self.runner: Runner | None = None
        self.taps: Taps | None = None
        self.local = LocalStep(step=trainer.state.global_step)
        self._announced: set[str] = set()  # sources whose second pass has begun
        self.passes_to_send: list[tuple[str, int | None, str]] = []  # noticed on this rank, not sent yet
        self._is_due = self._is_closed = False  # due: a step has ended and is not judged yet
        self._worker = Worker()
        self.last_end = time.perf_counter()

    @property
    def is_watching(self) -> bool:
        return self.failure is None and self.taps is not None and not self._is_closed

    def attempt(self, action: Callable, *arguments):
        """A fault of the guards does not end a training: they switch themselves off and log the error."""
        if self.failure is not None:
            return None
        try:
            return action(*arguments)
        except Exception as error:
            if self.options.only_check or isinstance(error, PreflightDone):
                raise
            logger.error("the guards failed and are off; the training goes on without them", exc_info=error)
            self.failure = why(error)
            error.__traceback__ = None  # of a fault that the worker found: its step holds it, see `without_trace`
            return None

    # --- before the first step

    def begin(self, inputs, num_items_in_batch, own_step, checkpoint: Path | None) -> None:
        """Sets the guards up, restores them, and runs the probes. `own_step`: see `Run`."""
        self.is_begun = True
        saved = read_session(checkpoint) if checkpoint is not None and self.is_main else None
        names = {guard.__name__ for guard in self.options.guards if guard.on_every_rank}
        shared, micro_batch = self.ranks.broadcast((saved and part_of_ranks(saved, names), shape_of(inputs)))
        self._prepare(inputs, num_items_in_batch, own_step, saved or shared, checkpoint, micro_batch)
        unreported, self.reporter.unreported = self.reporter.unreported, []
        ranks = self.ranks.gather((unreported, self.failure))
        if self.is_main:
            self.reporter.report_others([findings for findings, _ in ranks])
        self.failure = self.ranks.broadcast(next((failure for _, failure in ranks if failure), None))
        self.is_over = self.failure is not None
        if self.options.only_check:
            raise PreflightDone
        self.reporter.log_start(is_off=self.is_over)

    @survives
    def _prepare(self, inputs, num_items_in_batch, own_step, saved, checkpoint: Path | None, micro_batch) -> None:
        trainer, tokens_seen = self.trainer, self.history[-1]["tokens_seen"] if self.history else None
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        run = Run(trainer, model, inputs, self.options.facts, tokens_seen, micro_batch)
        run.own_step, run.pinned = own_step, PinnedBatch(run)
        run.find_reference(self.options.trajectory)
        self.tokens_seen, self.run = run.tokens_seen, run
        self.runner = Runner(self.options.guards, self.reporter)
        self.runner.setup(run)
        self.taps = Taps(run, self.runner.taps)
        if run.step and saved is not None:
            problems, run.is_restored = restore(self, saved)
            if problems and self.is_main:
                warn_damaged(checkpoint, "; ".join(problems))
            if not run.is_restored:
                self.taps.close()
                self.taps = Taps(run, self.runner.taps)
        if not run.is_restored:
            run.pinned.pin(inputs)
            if run.step and self.taps.ngrams is not None:
                self.taps.ngrams.model.stop(TRAINED_BEFORE)
        self.runner.inspect(run)
        self._probe(inputs, num_items_in_batch, is_first=True)

    def _probe(self, inputs, num_items_in_batch, is_first: bool) -> None:
        self._worker.wait()  # it is with the guards
        self.runner.probe(self.run, inputs, num_items_in_batch, self.local.step, self.tokens_seen, is_first)

    # --- micro-batches

    @survives
    def before_micro_step(self, inputs, num_items_in_batch):
        """Returns what `after_micro_step` is to be given."""
        self.local.num_items = num_items_in_batch
        if self.runner.probed_at != self.local.step and (self.reporter.waiting or self.local.step == PROBE_AGAIN):
            self._probe(inputs, num_items_in_batch, is_first=False)
        elif self.local.step % PROBE_EVERY == 0:
            self._worker.wait()
            self.runner.probe_at_save(self.run, self.local.step, self.tokens_seen)
        self.runner.call("before_micro_step", self.run, self.run)
        return self.taps.begin_micro_step(self.local, inputs)

    @survives
    def after_micro_step(self, loss: torch.Tensor, inputs, tokens) -> None:
        self.local.losses.append(loss.detach())
        self.taps.end_micro_step(self.local, inputs, tokens)
        self.runner.after_micro_step(self.run, loss, self.local.step, self.tokens_seen)

    # --- steps

    @survives
    def before_step(self, learning_rates: list, scheduled_rates: list) -> None:
        self.local.learning_rates, self.local.scheduled_rates = learning_rates, scheduled_rates
        self.taps.before_step(self.local)
        self.runner.call("before_step", self.run, self.local)

    @survives
    def after_step(self) -> None:
        self.taps.after_step(self.local)
        self.runner.call("after_step", self.run, self.local)

    def end_step(self, step: int) -> None:
        if self._is_closed:
            return
        self._is_due = True
        pending = self._send(step) if self.local.losses and self.is_watching else None
        self._worker.submit(exchange, self, pending, take_news(self), decided(self))
        self.local = self.local.next(step, self.trainer.args.gradient_accumulation_steps)

    @survives
    def _send(self, step: int) -> PendingStep:
        """The step's numbers, whose copy to the host has begun; they are read at the end of the next step."""
        num_tokens = self.local.num_tokens * self.run.world_size
        self.tokens_seen += num_tokens
        before, self.last_end = self.last_end, time.perf_counter()
        record = {"step": step, "tokens_seen": self.tokens_seen, "learning_rate": self.local.learning_rate}
        record["tokens_per_second"] = num_tokens / (self.last_end - before)
        return PendingStep(record, self.local, self.runner.measure(self.run, self.local))

    def flush(self, is_final: bool = True) -> Finding | None:
        """Take the step before from the worker; the main process judges it. Afterwards every rank has the same
        `is_stopping`, `stopped_by` (returned) and `is_over`. `is_final`: all ranks know what was decided now."""
        if not self._is_due:
            return self.stopped_by
        self._is_due = False
        found: Exchanged = self._worker.result()
        self.attempt(_raise, found.fault)
        self._fail(found.faults)
        if self.is_main:
            self._report(found)
            self.stop_asked |= any(payload["stop"] for payload in found.ranks)
            self.failure = next((p["failure"] for p in found.ranks if p["failure"]), self.failure)
        answer = self.ranks.broadcast(decided(self)) if is_final or self.ranks.world_size == 1 else found.answer
        self.is_stopping, stopped_by, failed, failure = answer
        self.stopped_by = stopped_by or self.stopped_by
        self.is_over, self.failure = failure is not None, failure or self.failure
        self._fail(failed)
        self.trackers.send_findings(self.reporter.findings)
        return self.stopped_by

    def _fail(self, faults: dict[str, str]) -> None:
        for name in faults if self.runner is not None else ():
            self.runner.fail(name, faults[name])

    @survives
    def _report(self, found: Exchanged) -> None:
        self.reporter.report_others([payload["findings"] for payload in found.ranks])
        for message in found.messages:
            logger.info("%s", message)
        for rank, payload in enumerate(found.ranks[1:], 1):
            self._fail({name: f"rank {rank}: {what}" for name, what in payload["failed"].items()})
        if (step := found.step) is not None:
            self.history = step.history
            self.learning_rate_sum += largest_rate(step.learning_rates)
            self.reporter.take(found.verdicts, step.number, step.tokens_seen)

    def announce_pass(self, source: str, tokens_in_pass: int | None, message: str) -> None:
        """On other ranks than the main process: to be sent there with the step."""
        if not self.is_main:
            self.passes_to_send.append((source, tokens_in_pass, message))
            return
        self._worker.wait()
        if self.note_pass(source, tokens_in_pass):
            logger.info("%s", message)

    def note_pass(self, source: str, tokens_in_pass: int | None, faults: dict | None = None) -> bool:
        """Whether it is new. `faults`: see `Runner`; on the worker's thread."""
        if is_new := source not in self._announced:
            self._announced.add(source)
            self.begin_pass(tokens_in_pass, faults)
        return is_new

    def begin_pass(self, tokens_in_pass: int | None, faults: dict | None = None) -> None:
        """While no step is with the worker, or on its thread."""
        self.passes += 1
        if self.is_watching:
            self.runner.begin_pass(tokens_in_pass, faults)
            if self.taps.ngrams is not None:
                self.taps.ngrams.model.stop(SECOND_PASS)

    # --- evaluations

    def judge_evaluation(self, metrics: dict, step: int) -> None:
        ranks = self.ranks.gather((self._take_evaluation(), self._repeat()))
        if self.is_main and all(rows is not None for rows, _ in ranks):
            self._observe_eval(metrics, step, [rows for rows, _ in ranks], ranks[0][1] or [])

    @survives
    def explain_waiting(self) -> None:
        """At the end of a training: what has waited for the probes is reported without them."""
        if self.runner is not None:
            self.reporter.explain_waiting((), self.runner.evidence())
            self.trackers.send_findings(self.reporter.findings)

    @survives
    def _take_evaluation(self) -> dict | None:
        return self.taps.take_evaluation()

    @survives
    def _repeat(self) -> list[float]:
        try:
            return self.run.pinned.losses(2)
        except CannotJudge:  # said where it is pinned
            return []

    @survives
    def _observe_eval(self, metrics: dict, step: int, rows: list[dict], repeated: list[float]) -> None:
        self.eval_losses |= plain_losses(metrics, rows)
        known = (step, self.tokens_seen, metrics, rows, self.history, self.passes, repeated)
        self.runner.observe_eval(Evaluation(self.run, *known))

    # --- state

    def save(self, checkpoint: Path) -> None:
        """On every rank, after `flush`. Raises `OSError` where the disk fails: that costs the state, no more."""
        state = self.attempt(state_of, self)
        if state is not None and checkpoint.is_dir():
            write_session(checkpoint, *state)

    def close(self) -> None:
        self._is_closed = True
        is_busy = self._worker.close(is_waiting=self.ranks.world_size == 1)
        for part in filter(None, (self.runner, self.taps)):
            part.close()
        if not is_busy:
            self.ranks.close()
        _let_go(self)


def _let_go(session: Session) -> None:
    """Of the trainer, which holds the guards as its callback: in a cycle, model and data loader would stay until
    garbage is collected, twice even, for torch brings tensors back once."""
    weak = session.trainer if isinstance(session.trainer, weakref.ProxyType) else weakref.proxy(session.trainer)
    for holder in filter(None, (session, session.run, session.trackers)):
        holder.trainer = weak


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


def state_of(session: Session) -> tuple[dict, dict, dict] | None:
    """Numbers, arrays, and the states of taps. None beside the main process; some guards compute on every rank what is
    saved."""
    session.runner.probe_at_save(session.run, session.local.step, session.tokens_seen)
    numbers, arrays = session.runner.save(session.run)
    if not session.is_main:
        return None
    own = {name: getattr(session, name) for name in ("passes", "learning_rate_sum")}
    own |= {"step": session.local.step, "reporter": session.reporter.save(), "guards": numbers}
    return own, arrays, {**session.taps.save(), "pinned": session.run.pinned.save()}
