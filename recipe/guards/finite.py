"""Losses and gradients that are not finite, and batches of which nothing is scored."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from recipe.guards.gradients import local
from recipe.guards.guard import PROBE, Finding, Guard, NotApplicable, Skip, Verdict
from recipe.guards.run import Parameters
from recipe.guards.updates import shorten

NOT_FINITE, UNSCORED = "loss_not_finite", "nothing_scored"
RATE_TOO_HIGH = "learning rate too high"
PLAIN_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def not_finite(losses: Sequence[float], grad_norm: float | None) -> list[int]:
    """Micro-batches of a step: those whose loss is not finite; all of them where only the gradients are not."""
    bad = [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
    return bad or ([] if grad_norm is None or math.isfinite(grad_norm) else list(range(len(losses))))


class LossNotFinite(Guard):
    """The loss is NaN, infinite or exactly 0.0, a gradient is not finite, or nothing is scored.

    When: at every step.
    Measured (loss_not_finite): the loss of each micro-batch of every rank, before Trainer's log shows NaN as 0.0. The
        norm of all gradients before clipping. And the gradient of one small parameter: not finite in a micro-batch and
        finite at the step means that it was dropped. Whether that parameter's step was finite says whether the weights
        are lost. Before step 1: weights that are not finite. The recipe's own trainer does not apply such a step: a
        warning then, which names the documents.
    Measured (nothing_scored): a step without a scored label whose loss is NaN or 0.0, or a micro-batch without one
        whose loss is NaN. Or over 50 % of the last 64 rows have no scored label, while others have one; from 10 % on
        it is information.
    Try (loss_not_finite): where the weights are lost, the last checkpoint with a lower learning rate, or fp32; else
        the batch of this step. Exactly 0.0: the labels.
    Try (nothing_scored): counting the labels of each row that are not -100; looking for prompts as long as the row,
        and for a packer that gives out empty rows.
    Cannot see: gradients under fp16 loss scaling, whose scaler skips steps that are not finite; rows without labels of
        an objective of its own.
    """

    ids = {
        NOT_FINITE: "The loss is NaN or infinite.",
        UNSCORED: "A step, or many of its rows, have no label that is scored.",
    }
    taps = ("gradients",)
    explained_by = ("learning_rate_off", "grad_norm_off", "wrong_gradient", "lost_updates", "accumulation_mismatch")
    # Rows judged together, and the shares of them without a scored label. Chosen, not measured: prompts that leave no
    # room for an answer are a few per cent of a data set, and a packer or filter that fails takes most rows.
    ROWS, WARN_SHARE, INFO_SHARE = 64, 0.5, 0.1

    def setup(self, run) -> None:
        self.world_size, self.is_scaled = run.world_size, run.is_loss_scaled
        self.is_skipped = getattr(run.trainer, "skips", None) is not None
        if run.has_tokens:  # it judges without them, too
            self.taps = (*self.taps, "tokens")
        self.from_weights: Finding | None = None  # before step 1
        self.state = {"unscored": []}  # of the last rows: whether nothing of it is scored

    def inspect(self, run) -> Iterator[Verdict]:
        if names := not_finite_weights(run.named_parameters):
            self.from_weights = self.judge_weights(names)
            yield self.from_weights
        if not run.has_tokens:
            yield Skip(UNSCORED, NotApplicable("micro-batches without input_ids"))

    def observe(self, step) -> Iterator[Verdict]:
        norm = None if self.is_scaled else step.record["grad_norm"]  # the scaler skips steps that are not finite
        scored = step.scored if step.run.is_next_token else None  # other losses score no labels
        gradients = step.gradients if not self.is_scaled else []
        is_kept = math.isfinite(gradients[0].now) if gradients else None
        if scored is not None:
            yield self.judge_scored(step.losses, scored, norm) or self.clear(UNSCORED, "batches")
            yield self._observe_rows(step) or self.clear(UNSCORED)
        finding = self.judge(step.losses, norm, scored, self.world_size, is_kept, not step.run.is_next_token)
        if finding is not None and self.is_skipped and not_finite(step.losses, norm):
            finding = self.not_applied(finding, step.documents)
        if finding is not None:
            finding = self.from_weights or self.from_the_start(finding, step)
        for gradient in gradients:
            finding = finding or self.judge_dropped(gradient.total, gradient.before, gradient.now)
        yield finding or self.clear(NOT_FINITE)

    def _observe_rows(self, step) -> Finding | None:
        rows = (step.labels.scored == 0).tolist() if step.num_labels[0] else []
        self.state["unscored"] = [*self.state["unscored"], *rows][-max(self.ROWS, len(rows)) :]
        return self.judge_rows(self.state["unscored"])

    @classmethod
    def judge(
        cls,
        losses: list[float],
        grad_norm: float | None,
        scored: list[int] | None = None,
        world_size: int = 1,
        is_kept: bool | None = None,
        may_be_zero: bool = False,
    ) -> Finding | None:
        """`losses`: of each micro-batch, rank after rank. `scored`: targets of each; of one without any see
        `judge_scored`. `grad_norm`: None where it is not measured, or scaled. `is_kept`: whether a parameter's
        gradient was finite at the step, after whatever drops or replaces it; None where it is not known.
        `may_be_zero`: the loss is no cross entropy with the labels."""
        counts = scored if scored is not None else [1] * len(losses)
        wrong = [not math.isfinite(loss) or (loss == 0.0 and not may_be_zero) for loss in losses]
        bad = [i for i in range(len(losses)) if counts[i] and wrong[i]]
        if not bad and (grad_norm is None or math.isfinite(grad_norm)):
            return None
        evidence = {"losses": losses, "bad_micro_batches": bad, "grad_norm": grad_norm, "finite_at_step": is_kept}
        found, is_zero = f"gradient norm {grad_norm}", False
        if bad:
            first = next((i for i in bad if losses[i] != 0.0), bad[0])
            found, is_zero = f"loss {losses[first]}", losses[first] == 0.0
            found += f" in micro-batch {first + 1} of {len(losses)}" if len(losses) > 1 else ""
            if world_size > 1:
                evidence["rank"], evidence["micro_step"] = divmod(first, len(losses) // world_size)
                found += f" (rank {evidence['rank']})"
        causes = (RATE_TOO_HIGH, "overflow in fp16 or bf16", "a broken kernel")
        if is_zero:
            causes = ("every label masked (-100)", "an empty batch")
        action = _advice(grad_norm, is_kept) if not is_zero else "look at the labels of this batch"
        return cls.finding("error", found, "finite, above 0", causes, action, evidence, NOT_FINITE)

    @classmethod
    def judge_weights(cls, names: list[str]) -> Finding:
        found = f"weights are not finite before step 1 ({len(names)} parameters: {shorten(names[0])})"
        causes = ("weights made or loaded wrong (a broken checkpoint, memory that was never filled)",)
        action = "load or initialise these weights again; no learning rate is to blame, no step was made"
        return cls.finding(
            "error", found, "finite", causes, action, {"names": names[:20]}, NOT_FINITE, PROBE, "weights"
        )

    @classmethod
    def from_the_start(cls, finding: Finding, step) -> Finding:
        """The loss of the first step was computed before any update."""
        if step.number != step.run.step + 1 or finding.likely_causes[0] != RATE_TOO_HIGH:
            return finding
        causes = ("weights or batch of the first step (no update was made yet)", *finding.likely_causes[1:])
        return replace(finding, likely_causes=causes)

    @classmethod
    def not_applied(cls, finding: Finding, documents: list[str]) -> Finding:
        more = f" and {len(documents) - 3} more" if len(documents) > 3 else ""
        named = ", ".join(documents[:3]) + more
        return replace(
            finding,
            severity="warning",
            found=f"{finding.found}; step not applied" + (f"; documents {named}" if named else ""),
            action="weights, moments and schedule are as before the step; look at the documents that evidence names",
            evidence={**finding.evidence, "documents": documents},
        )

    @classmethod
    def judge_dropped(cls, total: float, before: float, now: float) -> Finding | None:
        """`total`: norm of the gradient that the micro-batches of a step gave one parameter; `before` and `now`: of
        its gradient before clipping and at the step."""
        if math.isfinite(total) or not (math.isfinite(before) and math.isfinite(now)):
            return None
        found = "gradient dropped (it is not finite)"
        causes = ("a hidden loss that is not finite",)
        action = "look at the batches of this step; the loss that is logged is not theirs"
        return cls.finding("error", found, "finite", causes, action, {"at_step": before}, NOT_FINITE)

    @classmethod
    def judge_scored(cls, losses: list[float], scored: list[int], grad_norm: float | None) -> Finding | None:
        """A step without targets, or a micro-batch without them that makes the step's loss NaN. One with a loss of its
        own has an objective that needs no labels; a part of 0.0 does no harm."""
        empty = [i for i, n in enumerate(scored) if not n and (losses[i] == 0.0 or not math.isfinite(losses[i]))]
        is_whole = len(empty) == len(scored)
        if not empty or (not is_whole and all(losses[i] == 0.0 for i in empty)):
            return None
        found = "nothing was scored in this step"
        if not is_whole:
            found = f"nothing was scored in {len(empty)} of {len(scored)} micro-batches"
        found += f" (loss {losses[empty[-1]]})"
        action = "look at the labels of this batch and at what makes it"
        if grad_norm is not None and math.isfinite(grad_norm):
            action = f"the weights are intact; {action}"
        evidence = {"losses": losses, "scored": scored, "grad_norm": grad_norm}
        causes = ("every label masked (-100)", "prompts that fill the rows", "rows that a packer left empty")
        return cls.finding("warning", found, "targets", causes, action, evidence, UNSCORED, "batches", "batches")

    @classmethod
    def judge_rows(cls, unscored: list[bool]) -> Finding | None:
        """`unscored`: of the last rows of steps in which something is scored, oldest first."""
        share = sum(unscored) / max(len(unscored), 1)
        if len(unscored) < cls.ROWS or share < cls.INFO_SHARE:
            return None
        return cls.finding(
            "warning" if share > cls.WARN_SHARE else "info",
            found=f"nothing is scored in {sum(unscored)} of the last {len(unscored)} rows",
            expected=f"under {cls.INFO_SHARE:.0%}",
            causes=("prompts that fill the rows", "rows that a packer left empty", "a template that masks too much"),
            action="count the labels of each row that are not -100; the weights are intact, these rows teach nothing",
            evidence={"share": share, "rows": len(unscored)},
            id=UNSCORED,
            cause="rows",
        )


def not_finite_weights(parameters: Parameters) -> list[str]:
    """Names; one number of each parameter is read, once for all of them."""
    kept = [(name, local(p.detach())) for name, p in parameters if p.dtype in PLAIN_DTYPES and not p.is_meta]
    kept = [(name, part) for name, part in kept if part.numel()]
    if not kept:
        return []
    device = kept[0][1].device
    norms = [torch.linalg.vector_norm(part, math.inf, dtype=torch.float32).to(device) for _, part in kept]
    is_finite = torch.stack(norms).isfinite().tolist()
    return [name for (name, _), good in zip(kept, is_finite, strict=True) if not good]


def _advice(grad_norm: float | None, is_kept: bool | None) -> str:
    """As far as the evidence goes: weights are lost only by a step with a gradient that is not finite."""
    is_finite = is_kept if is_kept is not None or grad_norm is None else math.isfinite(grad_norm)
    if is_finite is None:
        return "look at the batch of this step; the weights are lost only if the next losses are not finite either"
    if is_finite:
        return "the weights are intact: the step was taken with finite gradients; look at the batch of this step"
    return "the weights are lost: go back to the last checkpoint with a lower learning rate or in fp32"
