"""Calls the guards, reports what they find, and keeps their state.

`Reporter`: onsets and recoveries, in the log and in `findings.jsonl`, once each. `Runner`: the guards of one training.
An exception inside a guard disables this guard alone.
"""

import contextlib
import logging
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from recipe.guards import sandbox
from recipe.guards.guard import PROBE, SEVERITIES, CannotJudge, Clear, Finding, Guard, NotApplicable, Skip, Verdict
from recipe.guards.records import as_finding, read_lines
from recipe.guards.run import Run
from recipe.guards.taps import Evaluation, LocalStep, Step

logger = logging.getLogger("recipe.guards")

ALARMS = ("warning", "error")
LOG_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
# A finding is over when the check that found it has found nothing so many times: a fault in some rows comes and goes.
# Chosen, not measured.
PATIENCE = 20
UNSEEN = "a leak that no probe can see (without gradient, outside of the model), or data that is known already"


@dataclass
class Open:
    """A finding that is still true. `checks`: those that found it -> how often each has found nothing since."""

    finding: Finding
    checks: dict[str, int]


class Reporter:
    """`judged_steps`: id -> on how many steps it was judged. `cannot_judge`, `not_applicable`: id -> reason. `open`:
    id -> what is still true. `on_alarm` is called with each warning and error that is not disabled."""

    def __init__(self, guards: Iterable[type[Guard]], disabled: frozenset[str], on_alarm: Callable[[Finding], None]):
        self.guard_of = {name: guard for guard in guards for name in guard.ids}
        self.disabled, self.on_alarm = disabled, on_alarm
        self.findings: list[Finding] = []
        self.judged_steps: Counter[str] = Counter()
        self.cannot_judge: dict[str, str] = {}
        self.not_applicable: dict[str, str] = {}
        self.open: dict[str, Open] = {}
        self.waiting: list[Finding] = []  # symptoms, until the probes have run again
        self.unreported: list[Finding] = []  # found on another rank than the main process
        self.is_main, self.file = False, Path("findings.jsonl")

    def begin(self, file: Path, is_main: bool, until: int) -> None:
        """A training begins. A resumed run keeps what was found up to its step: a verdict is about the whole run."""
        self.file, self.is_main = file, is_main
        for kept in (self.judged_steps, self.cannot_judge, self.not_applicable, self.open):
            kept.clear()
        self.waiting, self.unreported = [], []
        found = [finding for finding in map(as_finding, read_lines(file)) if finding is not None]
        self.findings[:] = [f for f in found if f.step <= until and f.id in self.guard_of]

    def take(self, verdicts: Iterable[Verdict], step: int, tokens_seen: int) -> None:
        """The verdicts of one step, or of one run of the probes."""
        judged = set()
        for verdict in verdicts:
            if isinstance(verdict, Skip):
                self.give_up([verdict.id], verdict.reason)
                continue
            judged.add(verdict.id)
            self.not_applicable.pop(verdict.id, None)  # to its probe, and it judges during training
            if isinstance(verdict, Clear):
                self._clear(verdict, step)
            else:
                self._found(replace(verdict, step=step, tokens_seen=tokens_seen))
        self.judged_steps.update(judged)

    def _found(self, finding: Finding) -> None:
        known = self.open.get(finding.id)
        if known is not None:
            known.checks[finding.check] = 0
            if SEVERITIES.index(finding.severity) <= SEVERITIES.index(known.finding.severity):
                return
        self.open[finding.id] = Open(finding, {**(known.checks if known else {}), finding.check: 0})
        if self.guard_of[finding.id].is_symptom and finding.severity in ALARMS:
            self.waiting.append(finding)
        else:
            self.report(self.explain(finding))

    def _clear(self, clear: Clear, step: int) -> None:
        """A probe that finds nothing takes back what it found. A check of the steps does so after PATIENCE of them,
        and only what it found itself: it sees less than a probe."""
        known = self.open.get(clear.id)
        if known is None or clear.check not in known.checks:
            return
        known.checks[clear.check] += 1
        if clear.check != PROBE and known.checks[clear.check] < PATIENCE:
            return
        del known.checks[clear.check]
        if not known.checks:
            del self.open[clear.id]
            if self.is_main and clear.id not in self.disabled:
                when = "the probe finds nothing now" if clear.check == PROBE else f"step {step - PATIENCE + 1}"
                logger.info("%s | %s | recovered, since step %d", clear.id, when, known.finding.step)

    def explain_waiting(self, cleared: Iterable[str], evidence: dict) -> None:
        """Symptoms are reported when the probes have run again. `cleared`: ids that these did not find."""
        waiting, self.waiting = self.waiting, []
        for finding in waiting:
            finding.evidence.update(evidence)
            self.report(self.explain(finding, cleared))

    def explain(self, finding: Finding, cleared: Iterable[str] = ()) -> Finding:
        """The finding with its causes among those found so far named first. What `cleared` rules out is not named."""
        known = {other.id: other for other in reversed(self.findings) if other.id != finding.id}
        causes = [known[name] for name in self.guard_of[finding.id].explained_by if name in known]
        cleared = [name for name in cleared if name not in known]
        evidence, likely, action = dict(finding.evidence), finding.likely_causes, finding.action
        if cleared:
            evidence["asked_again_and_clear"] = cleared
            words = [self.guard_of[name].rules_out.get(name) for name in cleared]
            likely = tuple(cause for cause in likely if not any(word and word in cause for word in words))
        if len(likely) < len(finding.likely_causes):
            likely = (*likely, UNSEEN)
            action = "labels and attention were tested again at this step and are clear; check data and loss instead"
        if causes:
            evidence["causes"] = [cause.id for cause in causes]
            action = f"fix {causes[0].id} first: {causes[0].action}"
        named = tuple(f"{cause.id} (step {cause.step}: {cause.found})" for cause in causes)
        return replace(finding, likely_causes=(*named, *likely), action=action, evidence=evidence)

    def report(self, finding: Finding) -> None:
        if finding.id in self.disabled:
            return
        self.findings.append(finding)
        if self.is_main:
            logger.log(LOG_LEVELS[finding.severity], finding.log_line())
            with self.file.open("a", encoding="utf-8") as file:
                file.write(finding.to_json() + "\n")
        else:
            self.unreported.append(finding)
        if finding.severity in ALARMS:
            self.on_alarm(finding)

    def report_others(self, findings_by_rank: list[list[Finding]]) -> None:
        """What other ranks found. What several of them found is reported once."""
        for rank, findings in enumerate(findings_by_rank[1:], 1):
            for finding in findings:
                if finding.id not in self.open:
                    where = {"found": f"{finding.found} (rank {rank})", "evidence": {**finding.evidence, "rank": rank}}
                    finding = replace(finding, **where)
                    # Under a name of its own: the checks of this rank cannot take it back.
                    self.open[finding.id] = Open(finding, {f"{finding.check} on rank {rank}": 0})
                    self.report(self.explain(finding))

    def give_up(self, ids: Iterable[str], reason: str | CannotJudge) -> None:
        """Note why ids cannot be judged, and log it once, unless there is nothing to judge in this run."""
        if isinstance(reason, NotApplicable):
            self.not_applicable |= dict.fromkeys(ids, str(reason))
            return
        news = [name for name in ids if self.cannot_judge.get(name) != str(reason)]
        self.cannot_judge |= dict.fromkeys(news, str(reason))
        if self.is_main and news:
            logger.info("cannot judge %s: %s", ", ".join(news), reason)

    def save(self) -> dict:
        known = {name: {"finding": asdict(each.finding), "checks": each.checks} for name, each in self.open.items()}
        return {"open": known, "judged_steps": dict(self.judged_steps)}

    def load(self, state: dict) -> None:
        for name, each in state["open"].items():
            finding = as_finding(each["finding"])
            if finding is not None and name in self.guard_of and name not in self.guard_of[name].of_one_resume:
                checks = {str(check): int(count) for check, count in each["checks"].items()}
                self.open[name] = Open(finding, checks)
        self.judged_steps.update({name: int(count) for name, count in state["judged_steps"].items()})


def severity_first(verdict: Verdict) -> int:
    """So that a consequence can name its cause."""
    return -SEVERITIES.index(verdict.severity) if isinstance(verdict, Finding) else 1


class Runner:
    """The active guards of one training on this rank. `failed`: guard -> exception and where, on any rank. `seconds`:
    guard -> time spent in it on this rank."""

    def __init__(self, guards: Iterable[type[Guard]], reporter: Reporter):
        self.reporter = reporter
        self.guards = [guard() for guard in guards if not set(guard.ids) <= reporter.disabled]
        self.failed: dict[str, str] = {}
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @property
    def taps(self) -> set[str]:
        return {tap for guard in self.guards for tap in guard.taps}

    # --- before step 1

    def setup(self, run: Run) -> None:
        for guard in list(self.guards):
            try:
                if not run.has_tokens and guard.taps and set(guard.taps) <= {"tokens", "head", "ngrams"}:
                    raise NotApplicable(f"a micro-batch without input_ids ({type(run.inputs).__name__})")
                with self._isolated(guard):
                    guard.setup(run)
            except CannotJudge as reason:
                self.reporter.give_up(guard.ids, reason)
                self.guards.remove(guard)

    def inspect(self, run: Run) -> None:
        self._take("inspect", run, run.step, run.tokens_seen)

    def probe(self, run: Run, inputs, num_items_in_batch, step: int, tokens_seen: int, is_first: bool) -> None:
        """Every probe, or those that explain symptoms, worst finding first."""
        guards = [g for g in self.guards if _overrides(g, "probe") and (is_first or g.explains_symptoms)]
        verdicts: list[Verdict] = []
        try:
            with sandbox.opened(run, inputs, num_items_in_batch, is_first) as batch:
                for guard in guards:
                    verdicts += self._probe(guard, batch)
        except CannotJudge as reason:
            verdicts = [Skip(name, reason) for guard in guards for name in guard.ids]
        if not is_first:  # what cannot be asked again was judged before
            verdicts = [verdict for verdict in verdicts if not isinstance(verdict, Skip)]
        self.reporter.take(sorted(verdicts, key=severity_first), step, tokens_seen)
        self.reporter.explain_waiting([v.id for v in verdicts if isinstance(v, Clear)], self.evidence())

    def evidence(self) -> dict:
        return {name: value for guard in self.guards for name, value in guard.evidence().items()}

    def _probe(self, guard: Guard, batch) -> list[Verdict]:
        """It runs the user's own code: an exception there says nothing about the guard, which goes on."""
        begin = time.perf_counter()
        try:
            return list(guard.probe(batch))
        except CannotJudge as reason:
            return [Skip(name, reason) for name in guard.ids]
        except Exception as error:
            logger.debug("the probe of %s failed", type(guard).__name__, exc_info=error)
            reason = CannotJudge(f"the probe failed with {type(error).__name__}: {error}")
            return [Skip(name, reason) for name in guard.ids]
        finally:
            self.seconds[type(guard).__name__] += time.perf_counter() - begin

    # --- one step on this rank

    def _local_guards(self, run: Run, hook: str) -> list[Guard]:
        return [g for g in self.guards if _overrides(g, hook) and (run.is_main or g.on_every_rank)]

    def before_micro_step(self, run: Run) -> None:
        for guard in self._local_guards(run, "before_micro_step"):
            with self._isolated(guard):
                guard.before_micro_step(run)

    def after_micro_step(self, run: Run, loss, step: int, tokens_seen: int) -> None:
        for guard in self._local_guards(run, "after_micro_step"):
            self.reporter.take(self._collect(guard, guard.after_micro_step, run, loss), step, tokens_seen)

    def before_step(self, run: Run, local: LocalStep) -> None:
        for guard in self._local_guards(run, "before_step"):
            with self._isolated(guard):
                guard.before_step(local)

    def after_step(self, run: Run, local: LocalStep) -> None:
        for guard in self._local_guards(run, "after_step"):
            with self._isolated(guard):
                guard.after_step(local)

    def measure(self, run: Run, local: LocalStep) -> dict:
        payloads = {}
        for guard in self._local_guards(run, "measure"):
            with self._isolated(guard):
                payloads[type(guard).__name__] = guard.measure(local)
        return payloads

    # --- on the main process

    def observe(self, step: Step) -> None:
        self._take("observe", step, step.number, step.tokens_seen)

    def observe_eval(self, evaluation: Evaluation) -> None:
        self._take("observe_eval", evaluation, evaluation.step, evaluation.tokens_seen)

    def begin_pass(self, tokens_in_pass: int | None) -> None:
        for guard in list(self.guards):
            with self._isolated(guard):
                guard.begin_pass(tokens_in_pass)

    def _take(self, method: str, given, step: int, tokens_seen: int) -> None:
        verdicts: list[Verdict] = []
        for guard in [guard for guard in self.guards if _overrides(guard, method)]:
            verdicts += self._collect(guard, getattr(guard, method), given)
        self.reporter.take(verdicts, step, tokens_seen)

    def _collect(self, guard: Guard, method: Callable, *given) -> list[Verdict]:
        """What it yields, up to where it stops."""
        verdicts: list[Verdict] = []
        with self._isolated(guard):
            try:
                for verdict in method(*given):
                    verdicts.append(verdict)
            except CannotJudge as reason:
                verdicts += [Skip(name, reason) for name in guard.ids]
        return verdicts

    # --- isolation

    def _isolated(self, guard: Guard) -> "_Isolation":
        return _Isolation(self, guard)

    def fail(self, name: str, what: str) -> None:
        """Disable one guard, on this rank or because another rank's failed."""
        if name in self.failed:
            return
        self.failed[name] = what
        for guard in [guard for guard in self.guards if type(guard).__name__ == name]:
            self.guards.remove(guard)
            _close(guard)
            if self.reporter.is_main:
                logger.error("guard %s failed and is off, the others go on: %s", "/".join(guard.ids), what)
            self.reporter.cannot_judge |= dict.fromkeys(guard.ids, f"the guard failed: {what}")

    def close(self) -> None:
        for guard in self.guards:
            _close(guard)

    # --- state

    def save(self, run: Run) -> tuple[dict, dict[str, np.ndarray]]:
        """JSON-able numbers and arrays, by guard. Guards that compute on every rank are saved on every rank."""
        numbers: dict[str, dict] = {}
        arrays: dict[str, np.ndarray] = {}
        for guard in [guard for guard in self.guards if run.is_main or guard.on_every_rank]:
            with self._isolated(guard):
                name = type(guard).__name__
                numbers[name] = {}
                for key, value in guard.save().items():
                    if isinstance(value, np.ndarray):
                        arrays[f"{name}.{key}"] = value
                    else:
                        numbers[name][key] = value
        return numbers, arrays

    def load(self, run: Run, numbers: dict, arrays: dict[str, np.ndarray]) -> list[str]:
        """Returns what is wrong with states that could not be restored: their guards start fresh."""
        problems = []
        for number, guard in enumerate(self.guards):
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
                self.guards[number] = fresh = type(guard)()
                fresh.setup(run)
        return problems


class _Isolation:
    """An exception inside disables the guard; time is counted. Hooks of a guard keep theirs in `failure`."""

    def __init__(self, runner: Runner, guard: Guard):
        self.runner, self.guard = runner, guard

    def __enter__(self):
        self._begin = time.perf_counter()

    def __exit__(self, kind, error, trace) -> bool:
        name = type(self.guard).__name__
        self.runner.seconds[name] += time.perf_counter() - self._begin
        error = error or self.guard.failure
        if error is None or isinstance(error, CannotJudge) or not isinstance(error, Exception):
            return False
        frame = traceback.extract_tb(error.__traceback__)[-1]
        self.runner.fail(name, f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})")
        return True


def _close(guard: Guard) -> None:
    """Also where it failed before it had anything to close."""
    with contextlib.suppress(Exception):
        guard.close()


def _overrides(guard: Guard, method: str) -> bool:
    return getattr(type(guard), method) is not getattr(Guard, method)
