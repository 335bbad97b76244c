"""The loss against the reference of its config."""

import math
import statistics
from collections.abc import Iterator, Sequence

from recipe.guards.guard import CannotJudge, Finding, Guard, NotApplicable, Verdict
from recipe.guards.trajectory import Reference


class LossOffReference(Guard):
    """The loss has left the band of the reference run that belongs to this config.

    When: from step 10 (`cpu_demo`) or 5 (`original_180m`) on, in the range of the reference.
    Measured: at every step, the median raw loss of the reference's window against its band at the tokens seen, and its
        red flags (below 3.0 before step 1000 of the original run). Below is a warning: too good to be true. Above is a
        warning for measured references, information for the original project's table, which was an expectation.
    Try: the probes' findings first, then repeated data. Above the band: learning rate and schedule.
    Cannot see: runs without a reference of their own (`python -m recipe trajectory record`), by parameters (to 2 %),
        optimizer, learning rate (to 1 %), vocabulary, block and source.
    """

    ids = {"loss_off_reference": "The loss has left the band of the reference run."}
    is_symptom = judges_curve = True
    explained_by = (
        *("missing_label_shift", "non_causal_attention", "row_leak", "cross_document_attention", "wrong_loss_target"),
        *("resume_replay", "repeated_data", "train_eval_overlap", "double_label_shift", "reference_mismatch"),
        *("accumulation_mismatch", "wrong_gradient", "eval_train_mismatch", "frozen_parameters", "lost_updates"),
        *("optimizer_off", "learning_rate_off", "untied_weights", "rank_divergence"),
    )

    def setup(self, run) -> None:
        if run.reference is None:
            kind = CannotJudge if run.is_reference_named else NotApplicable
            raise kind(run.no_reference)
        self.reference = run.reference

    def observe(self, step) -> Iterator[Verdict]:
        if len(step.history) >= self.reference.window and self.reference.can_judge(step.tokens_seen):
            tokens, losses = step.columns(self.reference.window, "tokens_seen", "loss")
            yield self.judge(self.reference, step.number, tokens, losses) or self.clear()

    @classmethod
    def judge(cls, reference: Reference, step: int, tokens: Sequence[int], losses: Sequence[float]) -> Finding | None:
        """`tokens`, `losses`: of the last steps, oldest first. Silent until the window is full, outside of the
        reference's range, and while losses are not finite, which is another guard's finding."""
        recent, window = losses[-reference.window :], reference.window
        if len(recent) < window or not all(map(math.isfinite, recent)):
            return None
        loss = statistics.median(recent)
        middle = tokens[-1 - (window - 1) // 2]  # where the median belongs on a falling curve
        band = reference.at(middle)
        evidence = {"reference": reference.name, "window": window, "median_loss": loss, "tokens": middle}
        evidence |= {"low": band.low, "high": band.high} if band is not None else {}
        flags = [flag for flag in reference.red_flags if step < flag["before_step"] and loss < flag["loss_below"]]
        if not flags and (band is None or band.low <= loss <= band.high):
            return None
        expected = f"{band.low:.2f} to {band.high:.2f}" if band is not None else ""
        if flags:
            expected = f"{flags[0]['loss_below']} or more (before step {flags[0]['before_step']})"
        if flags or loss < band.low:
            severity, found = "warning", f"loss {loss:.2f}, too good to be true"
            causes = ("labels not shifted", "attention not causal", "repeated data", "easier data")
            action = "do not trust this run; read the probes' findings first"
        else:
            severity, found = reference.above, f"loss {loss:.2f}, above its reference"
            causes = ("another learning rate (or schedule)", "labels shifted twice", "harder data")
            action = "compare run.json with the reference's provenance"
        return cls.finding(severity, found, expected, causes, action, evidence)
