"""Reports what the guards find: onsets and recoveries, in the log and in `findings.jsonl`, once each."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from recipe.guards.guard import (
    PROBE,
    SEVERITIES,
    CannotJudge,
    Clear,
    Finding,
    Guard,
    NotApplicable,
    Skip,
    Verdict,
    shorten,
)
from recipe.guards.records import append_text, as_finding, read_lines

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
    `Finding.slot` -> what is still true. `on_alarm` is called with each warning and error that is not disabled."""

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
        known = self.open.get(finding.slot)
        if known is not None:
            known.checks[finding.check] = 0
            if SEVERITIES.index(finding.severity) <= SEVERITIES.index(known.finding.severity):
                return
        self.open[finding.slot] = Open(finding, {**(known.checks if known else {}), finding.check: 0})
        if self.guard_of[finding.id].is_symptom and finding.severity in ALARMS:
            self.waiting.append(finding)
        else:
            self.report(self.explain(finding))

    def _clear(self, clear: Clear, step: int) -> None:
        """A probe that finds nothing takes back what it found. A check of the steps does so after PATIENCE of them,
        and only what it found itself: it sees less than a probe."""
        found_by = [o for o in self.open.values() if o.finding.id == clear.id and clear.check in o.checks]
        for known in found_by:
            known.checks[clear.check] += 1
            if clear.check != PROBE and known.checks[clear.check] < PATIENCE:
                continue
            del known.checks[clear.check]
            if not known.checks:
                del self.open[known.finding.slot]
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
            append_text(self.file, finding.to_json() + "\n")
        else:
            self.unreported.append(finding)
        if finding.severity in ALARMS:
            self.on_alarm(finding)

    def report_others(self, findings_by_rank: list[list[Finding]]) -> None:
        """What other ranks found. What several of them found is reported once."""
        for rank, findings in enumerate(findings_by_rank[1:], 1):
            for finding in findings:
                if finding.slot not in self.open:
                    where = {"found": f"{finding.found} (rank {rank})", "evidence": {**finding.evidence, "rank": rank}}
                    finding = replace(finding, **where)
                    # Under a name of its own: the checks of this rank cannot take it back.
                    self.open[finding.slot] = Open(finding, {f"{finding.check} on rank {rank}": 0})
                    self.report(self.explain(finding))

    def give_up(self, ids: Iterable[str], reason: str | CannotJudge) -> None:
        """Note why ids cannot be judged, and log it once, unless there is nothing to judge in this run."""
        if isinstance(reason, NotApplicable):
            self.not_applicable |= dict.fromkeys(ids, str(reason))
            return
        news = [name for name in ids if self.cannot_judge.get(name) != str(reason)]
        self.cannot_judge |= dict.fromkeys(news, str(reason))
        if self.is_main and news:
            names = ", ".join(news) if len(news) <= 3 else f"{len(news)} ids"
            logger.info("%s", shorten(f"cannot judge {names}: {reason}"))

    def log_start(self, is_off: bool = False) -> None:
        """How many ids are watched, on the main process, once the first micro-batch has been seen."""
        if not self.is_main or is_off:
            return
        ids = set(self.guard_of) - self.disabled
        counts = {
            "watching": len(ids - set(self.not_applicable) - set(self.cannot_judge)),
            "not applicable": len(ids & set(self.not_applicable)),
            "cannot judge": len(ids & set(self.cannot_judge)),
            "disabled": len(self.disabled),
        }
        logger.info("recipe guards: %s", ", ".join(f"{count} {words}" for words, count in counts.items() if count))

    def save(self) -> dict:
        known = {slot: {"finding": asdict(each.finding), "checks": each.checks} for slot, each in self.open.items()}
        return {"open": known, "judged_steps": dict(self.judged_steps)}

    def load(self, state: dict) -> None:
        for each in state["open"].values():
            finding = as_finding(each["finding"])
            guard = self.guard_of.get(finding.id) if finding is not None else None
            if guard is not None and finding.id not in guard.of_one_resume:
                checks = {str(check): int(count) for check, count in each["checks"].items()}
                self.open[finding.slot] = Open(finding, checks)
        self.judged_steps.update({name: int(count) for name, count in state["judged_steps"].items()})
