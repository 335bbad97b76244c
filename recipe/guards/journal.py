"""What the guards have to say: onsets and recoveries, in the log and in `findings.jsonl`, once each."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from recipe.guards.diagnosis import CURVES, explain
from recipe.guards.finding import CannotJudge, Finding, NotApplicable
from recipe.guards.records import as_finding, read_lines
from recipe.guards.thresholds import PATIENCE

logger = logging.getLogger("recipe.guards")

ALARMS = ("warning", "error")
LOG_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

Result = Finding | CannotJudge | None


class Journal:
    """`judged_steps`: id -> how often it was judged. `cannot_judge`, `not_applicable`: id -> reason. `on_alarm` is
    called with each warning and error that is not disabled."""

    def __init__(self, disabled: frozenset[str], on_alarm: Callable[[Finding], None]):
        self.disabled, self.on_alarm = disabled, on_alarm
        self.findings: list[Finding] = []
        self.judged_steps: Counter[str] = Counter()
        self.cannot_judge: dict[str, str] = {}
        self.not_applicable: dict[str, str] = {}
        self.active: dict[str, Finding] = {}
        self.to_explain: list[Finding] = []
        self.untold: list[Finding] = []  # found on another rank than 0, to be told there
        self.is_main, self.file = False, Path("findings.jsonl")
        self._silent: Counter[str] = Counter()
        self._by_probe: set[str] = set()  # active findings that only a probe can take back

    def open(self, file: Path, is_main: bool, until: int) -> None:
        """A training begins. A resumed run keeps what was found up to its step: a verdict is about the whole run."""
        self.file, self.is_main = file, is_main
        for kept in (self.judged_steps, self.cannot_judge, self.not_applicable):
            kept.clear()
        self.active, self.to_explain, self.untold, self._silent, self._by_probe = {}, [], [], Counter(), set()
        found = [finding for finding in map(as_finding, read_lines(file)) if finding is not None]
        self.findings[:] = [finding for finding in found if finding.step <= until]

    def judge(self, guard: str, finding: Finding | None, step: int) -> None:
        """What a guard that judges every step makes of this one: said at an onset, and once when it is over."""
        self.judged_steps[guard] += 1
        self.not_applicable.pop(guard, None)  # to its probe, and it judges in passing
        if finding is None:
            self._is_silent(guard, step)
            return
        self._silent[guard] = 0
        if self._is_onset(finding, self.active.get(guard)):
            self.active[guard] = finding
            waits = finding.id in CURVES and finding.severity in ALARMS
            self.to_explain.append(finding) if waits else self._say(explain(finding, self.findings))

    def conclude(self, guard: str, result: Result) -> None:
        """What a probe found: said at an onset, and taken back where a later look finds nothing."""
        if isinstance(result, CannotJudge):
            self.give_up([guard], result)
            return
        self.judged_steps[guard] += 1
        if result is None:
            self._take_back(guard, "the probe finds nothing now")
        elif self._is_onset(result, self.active.get(guard)):
            self._by_probe.add(guard)
            self.report(result)

    def report(self, finding: Finding) -> None:
        self.active[finding.id] = finding
        self._silent[finding.id] = 0
        self._say(explain(finding, self.findings))

    def explain_waiting(self, results: dict[str, Result], evidence: dict) -> None:
        """Curve findings are said when the probes have been asked again: `results`, and `evidence` to go with it."""
        waiting, self.to_explain = self.to_explain, []
        for result in results.values():
            if isinstance(result, Finding) and result.id not in self.active:
                self._by_probe.add(result.id)
                self.report(result)
        clear = [guard for guard, result in results.items() if result is None]
        for finding in waiting:
            finding.evidence.update(evidence)
            self._say(explain(finding, self.findings, clear))

    def give_up(self, guards: Iterable[str], reason: str | CannotJudge) -> None:
        """Note why guards cannot judge; say it once, unless there is nothing for them in this run."""
        if isinstance(reason, NotApplicable):
            self.not_applicable |= dict.fromkeys(guards, str(reason))
            return
        news = [guard for guard in guards if self.cannot_judge.get(guard) != str(reason)]
        self.cannot_judge |= dict.fromkeys(news, str(reason))
        if self.is_main and news:
            logger.info("cannot judge %s: %s", ", ".join(news), reason)

    def _say(self, finding: Finding) -> None:
        if finding.id in self.disabled:
            return
        self.findings.append(finding)
        if self.is_main:
            logger.log(LOG_LEVELS[finding.severity], finding.log_line())
            with self.file.open("a", encoding="utf-8") as file:
                file.write(finding.to_json() + "\n")
        else:
            self.untold.append(finding)
        if finding.severity in ALARMS:
            self.on_alarm(finding)

    def _is_silent(self, guard: str, step: int) -> None:
        """A guard that looks in passing sees less than the probe of the same id, and does not take its word back."""
        if guard in self.active and guard not in self._by_probe:
            self._silent[guard] += 1
            if self._silent[guard] >= PATIENCE:
                self._take_back(guard, f"step {step - PATIENCE + 1}")

    def _take_back(self, guard: str, when: str) -> None:
        onset = self.active.pop(guard, None)
        self._by_probe.discard(guard)
        if onset is not None and self.is_main and guard not in self.disabled:
            logger.info("%s | %s | recovered, since step %d", guard, when, onset.step)

    @staticmethod
    def _is_onset(finding: Finding, active: Finding | None) -> bool:
        """Not active so far, or not as bad: what began as information may become an alarm."""
        return active is None or LOG_LEVELS[finding.severity] > LOG_LEVELS[active.severity]
