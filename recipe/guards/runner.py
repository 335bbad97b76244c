"""Calls the guards of one training and keeps their state. An exception inside a guard disables this guard alone."""

import logging
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Container, Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from recipe.guards import sandbox
from recipe.guards.batches import SeenTokens
from recipe.guards.guard import (
    SEVERITIES,
    CannotJudge,
    Clear,
    Finding,
    Guard,
    NotApplicable,
    Skip,
    Verdict,
    checked,
    say,
    shorten,
)
from recipe.guards.objective import Objective
from recipe.guards.reporter import Reporter
from recipe.guards.run import Run
from recipe.guards.step import Evaluation, Step
from recipe.guards.taps import LocalStep
from recipe.plain_json import dumps

logger = logging.getLogger("recipe.guards")

GUARDS, TORCH, NUMPY = (Path(module.__file__).parent for module in (sandbox, torch, np))
REPLAYED = {TORCH / "nn/modules", TORCH / "autograd", TORCH / "_tensor.py"}  # a model, and what runs backward
PROBE_FAILED = "model or loss cannot be run in the way of this probe (the log at level DEBUG says why)"


def severity_first(verdict: Verdict) -> int:
    """So that a consequence can name its cause."""
    return -SEVERITIES.index(verdict.severity) if isinstance(verdict, Finding) else 1


class Runner:
    """The active guards of one training on this rank. `failed`: guard -> exception and where, on any rank. `seconds`:
    guard -> time spent in it on this rank; `seconds_beside`: on the thread beside the training."""

    def __init__(self, guards: Iterable[type[Guard]], reporter: Reporter):
        self.reporter = reporter
        self.guards: list[Guard] = []
        self.failed: dict[str, str] = {}
        self.probed_at = -1  # step before which a probe ran last
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.seconds_beside: defaultdict[str, float] = defaultdict(float)
        self._called: dict[str, list[Guard]] = {}  # by hook; a training calls some of them hundreds of times a step
        for guard in [guard for guard in guards if not set(guard.ids) <= reporter.disabled]:
            try:
                self.guards.append(guard())
            except Exception as error:
                self.fail(guard.__name__, say(error), guard.ids)

    @property
    def taps(self) -> set[str]:
        return {tap for guard in self.guards for tap in guard.taps}

    # --- before step 1

    def setup(self, run: Run) -> None:
        for guard in list(self.guards):
            self._setup(guard, run)

    def _setup(self, guard: Guard, run: Run) -> None:
        try:
            if not run.has_tokens and guard.taps and set(guard.taps) <= {"tokens", "head", "ngrams"}:
                raise NotApplicable(f"a micro-batch without input_ids ({type(run.inputs).__name__})")
            with self._isolated(guard):
                guard.setup(run)
        except CannotJudge as reason:
            self.reporter.give_up(guard.ids, reason)
            self._remove(guard)

    def inspect(self, run: Run) -> None:
        self._take("inspect", run, run.step, run.tokens_seen)

    def probe(self, run: Run, inputs, num_items_in_batch, step: int, tokens_seen: int, is_first: bool) -> None:
        """Every probe, or those that explain symptoms, worst finding first."""
        self.probed_at = step
        guards = [g for g in self.guards if overrides(g, "probe") and (is_first or g.explains_symptoms)]
        verdicts = self._probe_all(guards, run, inputs, num_items_in_batch, is_first)
        self.reporter.take(verdicts, step, tokens_seen)
        self.reporter.explain_waiting([v.id for v in verdicts if isinstance(v, Clear)], self.evidence())

    def probe_at_save(self, run: Run, step: int, tokens_seen: int) -> None:
        """On the pinned rows, unless a probe has just run."""
        guards = [guard for guard in self.guards if guard.probes_at_saves]
        if guards and run.pinned.rows and self.probed_at != step:
            self.probed_at = step
            self.reporter.take(self._probe_all(guards, run, run.pinned.rows, None, False), step, tokens_seen)

    def _probe_all(self, guards: list[Guard], run: Run, inputs, num_items_in_batch, is_first: bool) -> list[Verdict]:
        verdicts: list[Verdict] = []
        try:
            with sandbox.opened(run, inputs, num_items_in_batch, is_first) as batch:
                if is_first:
                    self._find_objective(run, batch)
                for guard in [guard for guard in guards if guard in self.guards]:
                    verdicts += self._probe(guard, batch)
        except CannotJudge as reason:
            if is_first and not run.has_tokens:
                run.objective = Objective(f"not known ({reason})")
                self._leave_out_inapplicable(run)
            if is_first:
                self.reporter.give_up([name for guard in guards for name in guard.ids], reason)
        if not is_first:  # what cannot be asked again was judged before
            verdicts = [verdict for verdict in verdicts if not isinstance(verdict, Skip)]
        return sorted(verdicts, key=severity_first)

    def _find_objective(self, run: Run, batch) -> None:
        """Guards that need another one are not applicable. Unknown, it is taken for a next-token cross entropy."""
        with suppress(CannotJudge):  # the guard of the targets says so
            run.objective = batch.objective
        self._leave_out_inapplicable(run)

    def _leave_out_inapplicable(self, run: Run) -> None:
        if run.is_next_token:
            return
        reason = NotApplicable(f"the objective is {run.objective.words}")
        for guard in [guard for guard in self.guards if guard.needs_next_token]:
            self.reporter.give_up(guard.ids, reason)
            self._remove(guard)
            _close(guard)
        if run.is_main:
            logger.info("%s: guards of next-token losses are not applicable", reason)

    def evidence(self) -> dict:
        found: dict = {}
        for guard in list(self.guards):
            with self._isolated(guard):
                own = guard.evidence()
                dumps(own)
                found |= own
        return found

    def _probe(self, guard: Guard, batch) -> list[Verdict]:
        """It runs the user's own code: an exception there says nothing about the guard, which goes on."""
        begin, verdicts = time.perf_counter(), []
        try:
            for verdict in guard.probe(batch):
                verdicts.append(checked(verdict))
            return verdicts
        except CannotJudge as error:
            reason = error.without_trace()
        except Exception as error:
            logger.debug("the probe of %s failed", type(guard).__name__, exc_info=error)
            if is_own_fault(error, guard):
                self.fail(type(guard).__name__, say(error))
                return verdicts
            reason = NotApplicable(PROBE_FAILED)
        finally:
            self.seconds[type(guard).__name__] += time.perf_counter() - begin
        return verdicts + [Skip(name, reason) for name in guard.ids if name not in {v.id for v in verdicts}]

    # --- one step on this rank

    def _local_guards(self, run: Run, hook: str) -> list[Guard]:
        if hook not in self._called:
            guards = [guard for guard in self.guards if overrides(guard, hook)]
            self._called[hook] = [guard for guard in guards if run.is_main or guard.on_every_rank]
        return self._called[hook]

    def _remove(self, guard: Guard) -> None:
        self.guards.remove(guard)
        self._called.clear()

    def call(self, hook: str, run: Run, *given) -> None:
        """`before_micro_step`, `before_step` or `after_step`."""
        for guard in self._local_guards(run, hook):
            with self._isolated(guard):
                getattr(guard, hook)(*given)

    def after_micro_step(self, run: Run, loss, step: int, tokens_seen: int) -> None:
        for guard in self._local_guards(run, "after_micro_step"):
            if verdicts := self._collect(guard, guard.after_micro_step, run, loss):
                self.reporter.take(verdicts, step, tokens_seen)

    def measure(self, run: Run, local: LocalStep) -> dict:
        payloads = {}
        for guard in self._local_guards(run, "measure"):
            with self._isolated(guard):
                payloads[type(guard).__name__] = guard.measure(local)
        return payloads

    # --- on the thread beside the training: guard -> fault, for `fail` on the training's own thread

    def measure_tokens(self, step: int, tokens: list[SeenTokens], payloads: dict) -> dict[str, str]:
        """Adds to `payloads`, by guard."""
        faults: dict[str, str] = {}
        for guard in [guard for guard in list(self.guards) if overrides(guard, "measure_tokens")]:
            with self._isolated(guard, faults):
                payloads[type(guard).__name__] = guard.measure_tokens(step, tokens)
        return faults

    def observe(self, step: Step, off: Container[str], faults: dict[str, str]) -> list[Verdict]:
        """On the main process. `off`: guards that failed on some rank. Adds to `faults`."""
        verdicts: list[Verdict] = []
        guards = [guard for guard in list(self.guards) if type(guard).__name__ not in off]
        for guard in [guard for guard in guards if overrides(guard, "observe")]:
            verdicts += self._collect(guard, guard.observe, step, faults=faults)
        return verdicts

    # --- on the main process, between two steps

    def observe_eval(self, evaluation: Evaluation) -> None:
        self._take("observe_eval", evaluation, evaluation.step, evaluation.tokens_seen)

    def begin_pass(self, tokens_in_pass: int | None, faults: dict[str, str] | None = None) -> None:
        for guard in [guard for guard in list(self.guards) if overrides(guard, "begin_pass")]:
            with self._isolated(guard, faults):
                guard.begin_pass(tokens_in_pass)

    def _take(self, method: str, given, step: int, tokens_seen: int) -> None:
        verdicts: list[Verdict] = []
        for guard in [guard for guard in list(self.guards) if overrides(guard, method)]:
            verdicts += self._collect(guard, getattr(guard, method), given)
        self.reporter.take(verdicts, step, tokens_seen)

    def _collect(self, guard: Guard, method: Callable, *given, faults: dict | None = None) -> list[Verdict]:
        """What it yields, up to where it stops."""
        verdicts: list[Verdict] = []
        with self._isolated(guard, faults):
            try:
                for verdict in method(*given):
                    verdicts.append(checked(verdict))
            except CannotJudge as reason:
                verdicts += [Skip(name, reason.without_trace()) for name in guard.ids]
        return verdicts

    # --- isolation

    def _isolated(self, guard: Guard, faults: dict[str, str] | None = None) -> "_Isolation":
        return _Isolation(self, guard, faults)

    def fail(self, name: str, what: str, ids: Iterable[str] = ()) -> None:
        """Disable one guard, on this rank or because another rank's failed. `ids`: of one that could not be made."""
        if name in self.failed:
            return
        self.failed[name] = what
        for guard in [guard for guard in self.guards if type(guard).__name__ == name]:
            self._remove(guard)
            _close(guard)
            ids = guard.ids
        if ids and self.reporter.is_main:
            logger.error("%s", shorten(f"guard {say_ids(ids)} failed and is off: {what}"))
        self.reporter.cannot_judge |= dict.fromkeys(ids, f"the guard failed: {what}")

    def close(self) -> None:
        for guard in self.guards:
            _close(guard, logging.ERROR if self.reporter.is_main else logging.DEBUG)

    # --- state

    def save(self, run: Run) -> tuple[dict, dict[str, np.ndarray]]:
        """JSON-able numbers and arrays, by guard. Guards that compute on every rank are saved on every rank."""
        numbers: dict[str, dict] = {}
        arrays: dict[str, np.ndarray] = {}
        for guard in [guard for guard in self.guards if run.is_main or guard.on_every_rank]:
            with self._isolated(guard):
                name, state = type(guard).__name__, guard.save()
                own = {key: value for key, value in state.items() if not isinstance(value, np.ndarray)}
                dumps(own)
                numbers[name] = own
                arrays |= {f"{name}.{key}": state[key] for key in state.keys() - own.keys()}
        return numbers, arrays

    def load(self, run: Run, numbers: dict, arrays: dict[str, np.ndarray]) -> list[str]:
        """Returns what is wrong with states that could not be restored: their guards start fresh."""
        problems = []
        for guard in list(self.guards):
            name = type(guard).__name__
            if name not in numbers or not (run.is_main or guard.on_every_rank):
                continue
            own = {key.removeprefix(f"{name}."): value for key, value in arrays.items() if key.startswith(f"{name}.")}
            try:
                guard.load({**numbers[name], **own})
                guard.on_resume(run.step)
            except Exception as error:
                problems.append(f"{name} ({type(error).__name__}: {error})")
                _close(guard)
                self.guards[self.guards.index(guard)] = fresh = type(guard)()
                self._called.clear()
                self._setup(fresh, run)
        return problems


class _Isolation:
    """An exception inside disables the guard; time is counted. Hooks of a guard keep theirs in `failure`. `faults`: on
    the thread beside the training, which notes the exception there and leaves the guard as it is."""

    def __init__(self, runner: Runner, guard: Guard, faults: dict[str, str] | None):
        self.runner, self.guard, self.faults = runner, guard, faults

    def __enter__(self):
        self._begin = time.perf_counter()

    def __exit__(self, kind, error, trace) -> bool:
        name, seconds = type(self.guard).__name__, time.perf_counter() - self._begin
        (self.runner.seconds if self.faults is None else self.runner.seconds_beside)[name] += seconds
        if isinstance(error, CannotJudge) or (error is not None and not isinstance(error, Exception)):
            return False
        if (fault := self.guard.failure if error is None else say(error)) is None:
            return False
        if self.faults is None:
            self.runner.fail(name, fault)
        else:
            self.faults.setdefault(name, fault)
        return True


def say_ids(ids: Iterable[str]) -> str:
    first, *others = ids
    return f"{first} (and {len(others)} ids more)" if len(others) > 1 else "/".join([first, *others])


def is_own_fault(error: Exception, guard: Guard) -> bool:
    """Whether a guard's own code raised it, or a function of torch or numpy called there. Else it was the model, the
    loss, their backward pass or the trainer, which a probe runs in its own way, or the device's memory."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    callers = [None, *(frame.f_code.co_filename for frame in frames)]
    for frame, caller in reversed([*zip(frames, callers, strict=False)]):
        file = Path(frame.f_code.co_filename)
        if file.parent == GUARDS or caller == __file__ or frame.f_locals.get("self") is guard:
            return not isinstance(error, torch.OutOfMemoryError)
        if {file, file.parent} & REPLAYED or not {TORCH, NUMPY} & {*file.parents}:
            return False
    return True


def _close(guard: Guard, level: int = logging.DEBUG) -> None:
    """Also where it failed before it had anything to close. `level`: to say at that it cannot be closed."""
    try:
        guard.close()
    except Exception as error:
        logger.log(level, "%s", shorten(f"guard {say_ids(guard.ids)} failed at the end: {say(error)}"))


def overrides(guard: Guard, method: str) -> bool:
    return getattr(type(guard), method) is not getattr(Guard, method)
