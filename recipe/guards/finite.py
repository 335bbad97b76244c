"""Losses and gradients that are not finite."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from recipe.guards.guard import Finding, Guard, Verdict

SHOWN = 3


def not_finite(losses: Sequence[float], grad_norm: float | None) -> list[int]:
    """Micro-batches of a step: those whose loss is not finite; all of them where only the gradients are not."""
    bad = [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
    return bad or ([] if grad_norm is None or math.isfinite(grad_norm) else list(range(len(losses))))


class LossNotFinite(Guard):
    """The loss is NaN, infinite or exactly 0.0, or a gradient is not finite.

    When: at every step.
    Measured: the loss of each micro-batch of every rank, before Trainer's log shows NaN as 0.0; a micro-batch without
        a scored token may have a loss of 0.0. The norm of all gradients before clipping. And the gradient of one small
        parameter: not finite in a micro-batch and finite at the step means that it was dropped. The recipe's own
        trainer does not apply such a step: a warning then, which names the documents.
    Try: the last checkpoint with a lower learning rate, or fp32. Exactly 0.0: every label is masked.
    Cannot see: gradients under fp16 loss scaling, whose scaler skips steps that are not finite.
    """

    ids = {"loss_not_finite": "The loss is NaN or infinite."}
    taps = ("gradients",)
    explained_by = ("learning_rate_off", "grad_norm_off", "wrong_gradient", "lost_updates", "accumulation_mismatch")

    def setup(self, run) -> None:
        self.world_size, self.is_scaled = run.world_size, run.is_loss_scaled
        self.is_skipped = getattr(run.trainer, "skips", None) is not None
        if run.has_tokens:  # it judges without them, too
            self.taps = (*self.taps, "tokens")

    def observe(self, step) -> Iterator[Verdict]:
        norm = None if self.is_scaled else step.record["grad_norm"]  # the scaler skips steps that are not finite
        finding = self.judge(step.losses, norm, step.scored, self.world_size)
        if finding is not None and self.is_skipped and not_finite(step.losses, norm):
            finding = self.not_applied(finding, step.documents)
        for gradient in step.gradients if not self.is_scaled else []:
            finding = finding or self.judge_dropped(gradient.total, gradient.before, gradient.now)
        yield finding or self.clear()

    @classmethod
    def judge(
        cls, losses: list[float], grad_norm: float | None, scored: list[int] | None = None, world_size: int = 1
    ) -> Finding | None:
        """`losses`: of each micro-batch, rank after rank. `scored`: targets of each; one without any has a loss of 0.
        `grad_norm`: None where it is not measured, or scaled."""
        counts = scored if scored is not None else [1] * len(losses)
        bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss) or (loss == 0.0 and counts[i] > 0)]
        if not bad and (grad_norm is None or math.isfinite(grad_norm)):
            return None
        evidence = {"losses": losses, "bad_micro_batches": bad, "grad_norm": grad_norm}
        found, is_zero = f"gradient norm {grad_norm}", False
        if bad:
            first = next((i for i in bad if losses[i] != 0.0), bad[0])
            found, is_zero = f"loss {losses[first]}", losses[first] == 0.0
            found += f" in micro-batch {first + 1} of {len(losses)}" if len(losses) > 1 else ""
            if world_size > 1:
                evidence["rank"], evidence["micro_step"] = divmod(first, len(losses) // world_size)
                found += f" (rank {evidence['rank']})"
        causes = ("learning rate too high", "overflow in fp16 or bf16", "a broken kernel", "every label masked (-100)")
        action = "the weights are lost: go back to the last checkpoint with a lower learning rate or in fp32"
        if is_zero:
            causes, action = ("every label masked (-100)", "an empty batch"), "look at the labels of this batch"
        return cls.finding("error", found, "finite, above 0", causes, action, evidence)

    @classmethod
    def not_applied(cls, finding: Finding, documents: list[str]) -> Finding:
        more = f" and {len(documents) - SHOWN} more" if len(documents) > SHOWN else ""
        named = ", ".join(documents[:SHOWN]) + more
        return replace(
            finding,
            severity="warning",
            found=f"{finding.found}, step not applied" + (f"; documents {named}" if named else ""),
            action="weights, moments and schedule are as before the step; look at the documents that evidence names",
            evidence={**finding.evidence, "documents": documents},
        )

    @classmethod
    def judge_dropped(cls, total: float, before: float, now: float) -> Finding | None:
        """`total`: norm of the gradient that the micro-batches of a step gave one parameter; `before` and `now`: of
        its gradient before clipping and at the step."""
        if math.isfinite(total) or not (math.isfinite(before) and math.isfinite(now)):
            return None
        found = "a gradient that is not finite was dropped"
        causes = ("a hidden loss that is not finite",)
        action = "look at the batches of this step; the loss that is logged is not theirs"
        return cls.finding("error", found, "finite", causes, action, {"at_step": before})
