"""What can be asked of a `RegressionCallback`."""

from collections import Counter

from transformers import TrainerCallback

from recipe.guards.guard import Finding
from recipe.guards.records import StepRecord
from recipe.guards.reporter import Reporter
from recipe.guards.session import Session
from recipe.guards.trajectory import Reference


class Answers(TrainerCallback):
    """Before, while and after it watches a training."""

    reporter: Reporter
    session: Session | None  # of the training that goes on, or the last one
    _why_off: str | None  # from the beginning
    _history: list[StepRecord]
    _facts: dict

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
        return self.session.failure if self.session else self._why_off

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
