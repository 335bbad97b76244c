"""Evaluations: they repeat, they compute the loss of training, and their loss is near it."""

import hashlib
import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
import torch

from recipe.guards.guard import PROBE, CannotJudge, Finding, Guard, NotApplicable, Skip, Verdict
from recipe.guards.sandbox import frozen, loss_of

# Relative, of two losses of one batch in fp32, whose mean is good to 1e-7. Dropout of 0.1 moves an untrained model's
# by 1e-5 only.
MAX_DIFFERENCE_FP32 = 2e-6
# A factor is a whole number up to this (ranks, micro-batches, rows), or its inverse, to this share. Chosen, not
# measured: a mean that is off by chance is seldom within 2 % of one.
LARGEST_FACTOR, FACTOR_TOLERANCE = 64, 0.02


class EvalNotRepeatable(Guard):
    """Two evaluations of one model differ: dropout is on, random numbers are drawn, or the rows are others.

    When: before step 1 (information where the run evaluates nothing) and at each evaluation.
    Measured: two rows, evaluated twice by the trainer's `prediction_step`, agree to 2e-5, in fp32 to 2e-6; so do the
        run's first rows at each evaluation, since an untrained model hides dropout. From the second evaluation of each
        eval set on: the same rows as at the first, in any order.
    Try: looking for layers with `training=True` in eval mode; a fixed number of rows from a fixed place, and an
        iterator that starts again each time.
    Cannot see: batches without labels; changes in how often a row comes.
    """

    ids = {"eval_not_repeatable": "Two evaluations of one model differ."}
    taps = ("evaluation",)
    # Relative, of a loss. Most forward passes repeat bit for bit; all of bf16's rounding against fp32 moved the mean
    # over 512 tokens by 1.6e-5 (6-layer Llama), dropout of 0.1 that over 4,096 by 5e-5 to 4e-4 (4-layer GPT-2).
    MAX_DIFFERENCE = 2e-5

    def setup(self, run) -> None:
        self.state = {"digests": {}}  # of the rows of each eval set, at its first evaluation

    def probe(self, batch) -> Iterator[Verdict]:
        _need_fixed_rows(batch.run)
        with frozen(batch.model, training=False), torch.no_grad():
            losses = [_eval_loss(batch) for _ in range(2)]  # each draws other random numbers
        yield _unless_evaluated(batch.run, self.judge(*losses, batch.run.is_exact)) or self.clear(check=PROBE)

    def observe_eval(self, evaluation) -> Iterator[Verdict]:
        _need_fixed_rows(evaluation.run)
        name, rows = _loss_name(evaluation), [row for rank in evaluation.ranks for row in rank["rows"]]
        if name is not None:
            digest = digest_of_rows(rows)
            is_same = self.state["digests"].setdefault(name, digest) == digest
            yield self.clear(check="rows") if is_same else self._other_rows(name, len(rows))
        if evaluation.repeated:
            with suppress(CannotJudge):  # a loss that is not finite is another guard's finding
                finding = self.judge(*evaluation.repeated, evaluation.run.is_exact, check="pinned")
                yield finding or self.clear(check="pinned")

    @classmethod
    def judge(cls, first: float, second: float, is_exact: bool = False, check: str = PROBE) -> Finding | None:
        """Two evaluations of one batch by one model, nats per token. `is_exact`: in fp32."""
        _need_finite(first, second)
        difference, limit = abs(first - second), MAX_DIFFERENCE_FP32 if is_exact else cls.MAX_DIFFERENCE
        if difference <= limit * max(abs(first), abs(second)):
            return None
        found = f"losses {first:.6f} and {second:.6f} (of the same rows)"
        causes = ("dropout or other random numbers", "the model changes itself")
        action = "look for layers with training=True, or a dropout rate passed to attention, in eval mode"
        evidence = {"first": first, "second": second, "difference": difference}
        expected = f"equal to {limit:.0e}"
        return cls.finding("warning", found, expected, causes, action, evidence, check=check)

    @classmethod
    def _other_rows(cls, name: str, count: int) -> Finding:
        found = f"{count:,} rows not in the first evaluation ({name})"
        causes = ("eval data goes on (a stream that is not restarted), or is shuffled", "other workers or ranks")
        action, evidence = "take a fixed number of rows from a fixed place, each time again", {"rows": count}
        return cls.finding("warning", found, "the same rows", causes, action, evidence, check="rows")


class EvalTrainMismatch(Guard):
    """Eval and train loss of the same rows and weights differ, or the reported loss is not the mean of its batches.

    When: before step 1 (information where the run evaluates nothing) and at each evaluation.
    Measured: before step 1, two rows by the code of evaluation and of training, both in eval mode, to 1 %. At each
        evaluation, the reported loss lies among those of its batches, to 5 %, and is no whole multiple or fraction of
        their mean.
    Try: computing the eval loss of one batch by hand: the mean cross entropy over its scored tokens.
    Cannot see: a mean of batch means instead of tokens, which passes; losses whose name is not `eval_..._loss`.
    """

    ids = {"eval_train_mismatch": "Eval and train loss of the same data differ."}
    taps = ("evaluation",)
    explained_by = ("missing_label_shift", "double_label_shift", "wrong_loss_target", "accumulation_mismatch")
    # Relative: an evaluation in bf16 of a model in fp32 rounds far less, the faults looked for are factors.
    MAX_DIFFERENCE = 0.01
    # Relative: mean of batch means instead of tokens, last batch not full: a few percent (transformers #39241).
    MAX_FROM_MEAN = 0.05

    def probe(self, batch) -> Iterator[Verdict]:
        _need_fixed_rows(batch.run)
        rows = batch.short_inputs
        # The trainer's own count: for GPT2LMHeadModel and some others it counts the first label too.
        train_loss = loss_of(batch.twin, batch.model, rows, batch.count_items(rows))
        with frozen(batch.model, training=False), torch.no_grad():
            losses = _eval_loss(batch), float(train_loss().mean())
        yield _unless_evaluated(batch.run, self.judge(*losses)) or self.clear(check=PROBE)

    def observe_eval(self, evaluation) -> Iterator[Verdict]:
        losses, counts = ([each for rank in evaluation.ranks for each in rank[name]] for name in ("losses", "counts"))
        if (name := _loss_name(evaluation)) is not None:
            with suppress(CannotJudge):
                yield self.judge_mean(losses, counts, evaluation.metrics[name]) or self.clear(check="mean")

    @classmethod
    def judge(cls, evaluated: float, trained: float) -> Finding | None:
        """Losses of the same rows and weights, nats per token."""
        _need_finite(evaluated, trained)
        if abs(evaluated - trained) <= cls.MAX_DIFFERENCE * abs(trained):
            return None
        return cls._mismatch(evaluated, trained, "the training loss of the same rows", PROBE)

    @classmethod
    def judge_mean(cls, losses: Sequence[float], counts: Sequence[int], reported: float) -> Finding | None:
        """`losses`, `counts`: nats per token and scored tokens of each batch. Any mean of them passes, a factor does
        not."""
        pairs = [(loss, count) for loss, count in zip(losses, counts, strict=True) if count]
        if not pairs:
            raise CannotJudge("no batch with scored tokens was seen")
        losses = [loss for loss, _ in pairs]
        _need_finite(reported, *losses)
        mean = sum(loss * count for loss, count in pairs) / sum(count for _, count in pairs)
        is_a_mean = min(losses) * (1 - cls.MAX_FROM_MEAN) <= reported <= max(losses) * (1 + cls.MAX_FROM_MEAN)
        is_plain_mean = abs(reported - statistics.fmean(losses)) <= cls.MAX_FROM_MEAN * reported
        if is_a_mean and (is_plain_mean or not name_factor(reported, mean)):
            return None
        return cls._mismatch(reported, mean, f"the mean over its {len(pairs)} batches", "mean")

    @classmethod
    def _mismatch(cls, value: float, wanted: float, what: str, check: str) -> Finding:
        factor = name_factor(value, wanted)
        found, wanted_text = f"eval loss {value:.4f}", f"{wanted:.4f} ({what})"
        if factor:
            found, wanted_text = f"{found} ({factor} of {what})", f"{wanted:.4f}"
        causes = ("another loss: labels, shift, masking or reduction differ", "weights changed in between")
        if factor:
            causes = ("off by a factor: the number of processes, micro-batches or rows", *causes)
        action = "compute the eval loss of one batch by hand: the mean cross entropy over its scored tokens"
        evidence = {"eval_loss": value, "expected": wanted}
        return cls.finding("warning", found, wanted_text, causes, action, evidence, check=check)


class TrainEvalGap(Guard):
    """Train and eval loss are far apart in the first pass, in which nothing was memorized.

    When: at each evaluation that gives `eval_loss`, from step 20 on.
    Measured: against the losses of the last 20 steps: outside of them, 1.2 nats from their median and by a factor of
        1.5, or above ln V, which a uniform guess reaches. From 2.0 nats on a warning (code and web text differ by
        1.8), else information.
    Try: evaluating on rows of the training data: the two losses should agree.
    Cannot see: later passes; smaller leaks; several eval sets, which may be of other kinds of text.
    """

    ids = {"train_eval_gap": "Train and eval loss are far apart."}
    taps = ("evaluation",)
    is_symptom = True
    explained_by = (
        *("missing_label_shift", "non_causal_attention", "row_leak", "cross_document_attention", "wrong_loss_target"),
        *("resume_replay", "repeated_data", "train_eval_overlap", "eval_train_mismatch", "eval_not_repeatable"),
        *("loss_diverged", "loss_spike"),  # of the last 20 steps only some are from before
    )
    # Known faults start at 1.5 nats at the usual loss of 3 (eval divided by 2 steps of accumulation, torchtitan#1758;
    # no causal mask: 2.7, entrenar#310). Code and web text differ by 1.8, so up to 2 nats it is information. Ratio and
    # steps are chosen, not measured: the first of these faults has a ratio of 2.
    MIN_NATS, WARNING_NATS, MIN_RATIO, MIN_STEPS = 1.2, 2.0, 1.5, 20

    def setup(self, run) -> None:
        if run.max_steps < self.MIN_STEPS:
            raise NotApplicable(f"the run has {run.max_steps} steps, it needs {self.MIN_STEPS}")

    def inspect(self, run) -> Iterator[Verdict]:
        if not run.is_evaluated:  # by the Trainer; code may call `evaluate`, which is then judged
            yield Skip("train_eval_gap", NotApplicable("no evaluation during training"))

    def observe_eval(self, evaluation) -> Iterator[Verdict]:
        if "eval_loss" not in evaluation.metrics:
            raise CannotJudge("several eval sets, which may be of other kinds of text")
        losses = [record["loss"] for record in evaluation.history]
        is_first_pass, vocab_size = evaluation.passes == 1, evaluation.run.vocab_size
        yield self.judge(losses, evaluation.metrics["eval_loss"], is_first_pass, vocab_size) or self.clear()

    @classmethod
    def judge(cls, train_losses: list[float], eval_loss: float, is_first_pass: bool, vocab_size=0) -> Finding | None:
        """`train_losses`: of the last steps. Silent while the eval loss lies within them, which leaves out noisy
        batches and the slope of early training. An eval loss above that of a uniform guess needs no ratio."""
        recent = train_losses[-cls.MIN_STEPS :]
        if not is_first_pass or len(recent) < cls.MIN_STEPS or not all(map(math.isfinite, [*recent, eval_loss])):
            return None
        train_loss = statistics.median(recent)
        low, high = sorted((train_loss, eval_loss))
        is_far = high >= cls.MIN_RATIO * low or 0 < math.log(max(1, vocab_size)) < eval_loss
        if min(recent) <= eval_loss <= max(recent) or high - low < cls.MIN_NATS or not is_far:
            return None
        found = f"eval loss {eval_loss:.2f}, train loss {train_loss:.2f}"
        causes = ("hold-out in training data (or easier)", "eval divides by accumulation steps again")
        if eval_loss > train_loss:
            causes = ("target leakage in training (not in eval)", "training data repeats, so it is memorized")
            causes += ("eval sums over ranks or batches what it should average", "the eval text is of another kind")
        action = "evaluate on rows of the training data: the two losses should agree"
        evidence = {"train_loss": train_loss, "eval_loss": eval_loss}
        severity = "warning" if high - low >= cls.WARNING_NATS else "info"
        return cls.finding(severity, found, f"under {cls.MIN_NATS} nats apart", causes, action, evidence)


def digest_of_rows(rows: list[np.ndarray]) -> int:
    """The same for the same rows in any order; JSON-able. Rows that come twice count once: ranks are filled up with
    some of them when they do not divide evenly, and with others at the next evaluation."""
    hashes = {hashlib.blake2b(row.astype(np.int32).tobytes(), digest_size=7).digest() for row in rows}
    return sum(int.from_bytes(value, "little") for value in hashes) % (1 << 53)


def name_factor(value: float, wanted: float = 1.0) -> str:
    """`8 times` or `1/8` for a ratio within 2 % of a whole number or of its inverse, from 2 on; else empty."""
    for above, below, name in ((value, wanted, "{} times"), (wanted, value, "1/{}")):
        ratio = above / below if below > 0 else 0.0
        number = round(ratio) if math.isfinite(ratio) else 0
        if 2 <= number <= LARGEST_FACTOR and abs(ratio / number - 1) <= FACTOR_TOLERANCE:
            return name.format(number)
    return ""


def _unless_evaluated(run, finding: Finding | None) -> Finding | None:
    """Information where nothing is evaluated: a loss may draw random numbers on purpose."""
    return finding and (finding if run.is_evaluated else replace(finding, severity="info"))


def _need_fixed_rows(run) -> None:
    if run.objective is not None and run.objective.is_denoising:
        raise NotApplicable(f"the objective is {run.objective.words}, which are drawn at random")


def _need_finite(*losses: float) -> None:
    if not all(map(math.isfinite, losses)):
        raise CannotJudge("a loss is not finite")


def _loss_name(evaluation) -> str | None:
    """Of the loss that it reported; None where none of its batches was seen."""
    names = (name for name in evaluation.metrics if name.startswith("eval_") and name.endswith("_loss"))
    return next(names, None) if any(rank["losses"] for rank in evaluation.ranks) else None


def _eval_loss(batch) -> float:
    loss = batch.twin.prediction_step(batch.model, dict(batch.short_inputs), True)[0]
    if loss is None:
        raise CannotJudge("an evaluation of this batch gives no loss")
    return float(loss.mean())
