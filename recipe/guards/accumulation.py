"""Accumulated micro-batches, against the gradient of the whole batch."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from transformers import Trainer

from recipe.guards.batches import IGNORE_INDEX
from recipe.guards.evaluation import name_factor
from recipe.guards.gradients import GradientNorms
from recipe.guards.guard import PROBE, CannotJudge, Finding, Guard, NotApplicable, Verdict
from recipe.guards.recording import record, recover_loss_targets
from recipe.guards.sandbox import first_positions, scaled_loss_of
from recipe.guards.updates import shorten

# One label in so many stays in the second micro-batch of the probe. Derived: a mean of means then weighs the tokens of
# the two 0.56 and 4.5 times, which is the 40 % below.
KEPT = 8
# Weights are compared by their median over a row's positions. bf16 keeps 8 bits, so one weight is good to 2 %; the
# faults looked for are off by 40 % and more.
MAX_WEIGHT_ERROR = 0.05
# Positions of one micro-batch that weigh differently by more: a loss weighted on purpose. Chosen, not measured.
WEIGHTED_LOSS = 1.2
# Cosine between a position's gradients in the whole batch and in its micro-batch, and the share of the positions of a
# row with it. Derived: equal but for rounding where only the weight differs; terms that are divided differently turn
# it. Below the first share of the largest gradient's energy a position is not scored. Chosen, not measured.
ALIGNED, MOST_ALIGNED, SMALL_GRADIENT = 0.999, 0.9, 1e-6
# Of a position's weight in the gradient. Derived: it is exact in fp32, and known to 0.4 % in bf16.
MAX_COUNT_ERROR = 0.01

ACTION = "divide the sum of the losses by num_items_in_batch (scored tokens of the whole step) and nothing else"
Place = tuple[int, int]  # rank, micro-step


class AccumulationMismatch(Guard):
    """Accumulated micro-batches do not give the gradient of the whole batch.

    When: before step 1 where a step has several micro-batches or ranks; then at every step.
    Measured: before step 1, what a scored position weighs in the gradient: two rows, the second with an eighth of its
        labels, through the trainer's own `training_step`, whole and as two micro-batches, to 0.05 (information where
        only means are averaged and this run's rows are scored alike). Of a loss that is no cross entropy alone, such
        as one mixed with a divergence, two rows of the batch as they are: how much of the gradient at the logits each
        has in its micro-batch, where it points as in the whole at nine positions of ten (means of means: information).
        During training, weights: all of a step are 1 together and equal in its micro-batches, to 0.05; three steps off
        in a row are a warning. Count: where the loss is divided by `num_items_in_batch`, this is the number of scored
        tokens (after 10 steps in which it was, another is no choice); information below 2 %, and below 50 % for labels
        counted before the shift, as stock Trainer does for models without a `loss_type`. Sum, on one rank: the
        gradient of a small parameter and of a matrix at the step is the sum of what its micro-batches gave, to 1 %
        (half precision 20 %); 2 of 20 steps off are a warning, or information where it is filtered or scaled (by 500
        and more of a mean cross entropy: a warning).
    Try: dividing the sum of the losses by `num_items_in_batch`, the scored tokens of the whole step, and by nothing
        else; `zero_grad` once, after each optimizer step.
    Cannot see: before step 1, a `training_step` replaced on the trainer itself, tensors that cannot be divided into
        rows (`cu_seq_lens`), rows of few labels. During training, compiled models, fp16 loss scaling, losses that
        weigh positions by more than a factor of 1.2, optimizers that step within backward.
    """

    ids = {"accumulation_mismatch": "Accumulated micro-batches do not give the gradient of the whole batch."}
    taps = ("tokens", "head", "gradients")
    # Counts that differ by less give weights that differ by less than bf16 gradients can tell (0.4 %) x 10.
    UNEVEN = 0.05
    # In a row, before the weights of micro-batches are reported. Chosen, not measured.
    WEIGHT_STEPS = 3
    # Of the larger of two gradients: the sum of what micro-batches gave, and what the step is taken with. Equal bit
    # for bit in fp32; half precision (True) adds with 0.4 % a micro-batch. Faults leave out a micro-batch or add a
    # step.
    MAX_SUM_ERROR = {False: 0.01, True: 0.2}
    # Steps at fault before it is reported, of the last ones: a training step may drop one bad batch on purpose.
    # Chosen, not measured.
    SUM_STEPS, SUM_WINDOW = 2, 20
    # Times that a gradient is larger or smaller than what backward gave. Chosen: fp16 loss scales are 2^10 and more,
    # and gradients that far down are near Adam's epsilon; factors of the user's own are not that large.
    FAR_SCALED = 500.0
    # Of the count, off the scored tokens. Rows of 64 counted without the shift are 1.6 % off, which no training
    # notices and a comparison of losses may. Above it the losses of two runs no longer compare. Chosen.
    MAX_COUNT_OFF = 0.02
    # The same where labels are counted before the shift, which stock Trainer does for models without a `loss_type`
    # (GPT-2 among them): nothing that a user did, and one factor on all losses. Rows of three tokens. Chosen.
    MAX_UNSHIFTED_OFF = 0.5
    # Steps whose count was right, after which a wrong one is no choice of the user's. Chosen, not measured.
    AGREED_STEPS = 10
    # Labels of a step, and the share of them that are the tokens themselves, before its count is compared. Chosen, not
    # measured: of 64 a share of 0.9 is known to 0.04.
    MIN_LABELS, MIN_OWN_LABELS = 64, 0.9

    def setup(self, run) -> None:
        self.run, self.is_averaged = run, run.args.average_tokens_across_devices
        self.is_shifted = isinstance(run.inputs, Mapping) and "shift_labels" in run.inputs
        self.state = {"uneven_steps": 0, "off_sums": {}, "right_counts": 0, "has_head": False}

    def probe(self, batch) -> Iterator[Verdict]:
        if batch.run.args.gradient_accumulation_steps * batch.run.world_size == 1:
            return  # nothing is accumulated; the steps' counts are judged all the same
        try:
            yield self._judge_batch(batch) or self.clear(check=PROBE)
        except CannotJudge as reason:
            if batch.run.is_next_token:
                raise
            raise NotApplicable(f"the objective is {batch.run.objective.words}") from reason

    def _judge_batch(self, batch) -> Finding | None:
        if batch.run.own_step is not None:
            raise CannotJudge("training_step was replaced on the trainer itself, so it cannot be run without a step")

        def scaled_loss(*given) -> torch.Tensor:
            return scaled_loss_of(batch.twin, batch.model, *given)

        judge = self.judge_model if batch.run.is_next_token else judge_gradients
        return judge(batch.model, first_positions(batch.inputs), scaled_loss)

    def observe(self, step) -> Iterator[Verdict]:
        weights = {(rank, micro): mean_weight(rows["weights"]) for rank, micro, rows in step.head}
        if not self.run.is_loss_scaled and self.run.is_next_token:
            yield from self._observe_weights(step, weights)
        if self.run.is_next_token:
            yield from self._observe_count(step, list(weights.values()))
        if not self.run.is_loss_scaled and self.run.world_size == 1:  # several ranks have averaged the gradient
            yield from self._observe_sum(step, is_mean=is_mean_loss(step, weights))

    def _observe_weights(self, step, weights: dict[Place, float | None]) -> Iterator[Verdict]:
        counts = step.targets
        if not counts or counts.keys() != weights.keys() or None in weights.values() or not all(counts.values()):
            return
        args, ranks = self.run.args, self.run.world_size
        num_positions = 0 if args.label_smoothing_factor else int((step.labels.positions - 1).sum())
        known = (args.gradient_accumulation_steps, ranks, self.is_averaged, num_positions)
        finding = self.judge_weights(counts, weights, *known)
        self.state["uneven_steps"] = self.state["uneven_steps"] + 1 if finding else 0
        is_off = self.state["uneven_steps"] >= self.WEIGHT_STEPS
        yield finding if finding and is_off else self.clear(check="weights")

    def _observe_count(self, step, weights: list[float | None]) -> Iterator[Verdict]:
        """Only for labels that the loss shifts: others do not say which of them are scored."""
        self.state["has_head"] |= bool(weights)
        is_sampled = bool(weights) or not self.state["has_head"]
        if step.num_items is None or self.is_shifted or not is_sampled or None in weights:
            return
        counted = self.is_averaged | (step.labels.rank == 0)
        scored, scored_own = (int(each[counted].sum()) for each in (step.labels.scored, step.labels.own))
        if scored < self.MIN_LABELS or scored_own < self.MIN_OWN_LABELS * scored:
            return
        unshifted = scored + int(step.labels.first_own[counted].sum())
        ranks = self.run.world_size if self.is_averaged else 1
        weight = statistics.fmean(weights) / ranks if weights and not self.run.is_loss_scaled else None
        is_choice = has_own_count(self.run.trainer) and self.state["right_counts"] < self.AGREED_STEPS
        num_items = float(np.ravel(step.num_items)[0])  # one for each device of a DataParallel
        self.state["right_counts"] += num_items == scored
        yield self.judge_count(num_items, scored, unshifted, weight, is_choice) or self.clear(check="items")

    def _observe_sum(self, step, is_mean: bool) -> Iterator[Verdict]:
        for norms in step.gradients:
            finding = self.judge_sum(norms, len(step.losses), is_mean)
            off = [*self.state["off_sums"].get(norms.name, [])[1 - self.SUM_WINDOW :], finding is not None]
            self.state["off_sums"][norms.name] = off
            yield finding if finding and sum(off) >= self.SUM_STEPS else self.clear(check="sum")

    @classmethod
    def judge_model(cls, model, inputs: dict, scaled_loss: Callable[..., torch.Tensor]) -> Finding | None:
        """Weighs each scored position of an uneven batch of two rows, whole and as two micro-batches.

        `scaled_loss(inputs, num_items_in_batch, num_micro_batches)`: the loss as it is sent to backward for one
        micro-batch of a step of that many. Raises `CannotJudge` where the batch cannot be divided.
        """
        batch, is_even = two_rows(inputs)
        labels = batch["labels"] = uneven_labels(batch["labels"])
        num_items = (labels[:, 1:] != IGNORE_INDEX).sum()

        def weights(rows: slice, num_micro_batches: int) -> torch.Tensor:
            part = cut(batch, rows)
            return recover_loss_targets(model, lambda: scaled_loss(part, num_items, num_micro_batches)).weights

        whole, parts = weights(slice(0, 2), 1), [weights(slice(row, row + 1), 2) for row in (0, 1)]
        return cls.judge_parts(whole, torch.cat(parts), is_even)

    @classmethod
    def judge_parts(cls, whole: torch.Tensor, parts: torch.Tensor, is_even: bool = False) -> Finding | None:
        """The weights of a step's positions in one batch and in micro-batches of one row, both `[2, positions]`, 0
        where nothing is scored. `is_even`: the run's own rows are scored alike."""
        scored = (whole > 0) & (parts > 0)
        if not scored.any(dim=1).all() or not (whole.isfinite().all() and parts.isfinite().all()):
            raise CannotJudge("no weights of scored positions in one of the micro-batches")
        rows = zip(parts, whole, scored, strict=True)
        ratios = [float((part[keep] / all_[keep]).median()) for part, all_, keep in rows]
        if all(abs(ratio - 1) <= MAX_WEIGHT_ERROR for ratio in ratios):
            return None
        counts = scored.sum(dim=1).tolist()
        cause, is_mean = _cause(ratios, counts)
        found = f"tokens weigh {ratios[0]:.2f} and {ratios[1]:.2f} (in micro-batches of {counts[0]} and {counts[1]})"
        causes = tuple(dict.fromkeys((cause, "the loss ignores num_items_in_batch", "a custom compute_loss")))
        severity, evidence = "info" if is_mean and is_even else "warning", {"ratios": ratios, "scored": counts}
        return cls.finding(severity, found, "1.00 and 1.00", causes, ACTION, evidence, check=PROBE)

    @classmethod
    def judge_weights(
        cls,
        counts: dict[Place, int],
        weights: dict[Place, float],
        steps: int,
        ranks: int,
        is_averaged: bool = True,
        num_positions: int = 0,
    ) -> Finding | None:
        """`counts`: scored positions of each micro-batch of one step; `weights`: what one of them weighs in the
        gradient of its rank. `num_positions`: all of the step, masked or not; 0 where they do not matter.

        Gradients are averaged over ranks, so a position should weigh ranks / (scored positions of the step).
        """
        total = sum(counts.values())
        factor = sum(weights[place] * counts[place] for place in counts) / ranks
        wrong = {number for k in (steps, ranks, steps * ranks) for number in (k, 1 / k)}
        wrong |= {total / num_positions} if num_positions else set()  # divided by masked positions too
        places = [place for place in counts if is_averaged or place[0] == 0]
        sizes, shares = [counts[place] for place in places], [weights[place] for place in places]
        is_uneven, spread = max(sizes) > (1 + 2 * cls.UNEVEN) * min(sizes), max(shares) / min(shares)
        if any(abs(r - 1) > 2 * cls.UNEVEN and abs(factor / r - 1) < cls.UNEVEN for r in wrong):
            found, expected = f"micro-batches weigh {factor:.3g} together (in a step)", "1"
            causes = ("not divided by their number (or twice, or by masked positions too)",)
        elif is_uneven and spread > 1 + cls.UNEVEN:
            found, expected = (
                f"a token weighs {spread:.2f} times as much (as in another micro-batch)",
                f"1 of {total:,}",
            )
            causes = ("micro-batch means are averaged (of different numbers of scored tokens)",)
        else:
            return None
        evidence = {"scored": list(counts.values()), "weights": list(weights.values()), "factor": factor}
        return cls.finding("warning", found, expected, causes, ACTION, evidence, check="weights")

    @classmethod
    def judge_count(
        cls, num_items: float, scored: int, unshifted: int, weight: float | None = None, is_choice: bool = False
    ) -> Finding | None:
        """`num_items`: as `training_step` receives it. `scored`: tokens with a label and a token before them;
        `unshifted`: all labels. `weight`: of a scored position in the gradient, times the ranks over which it is
        averaged; None where it was not sampled. `is_choice`: the count is the user's own, and was seldom right before.
        """
        if num_items <= 0 or scored <= 0 or num_items == scored:
            return None
        if weight is not None and not is_divided_by(num_items, scored, weight):
            return None
        off, is_unshifted = abs(num_items / scored - 1), num_items == unshifted
        is_harmless = off < cls.MAX_COUNT_OFF or (is_unshifted and off < cls.MAX_UNSHIFTED_OFF)
        found = f"num_items_in_batch {num_items:,.0f}: loss {scored / num_items:.3f} of the mean per token"
        causes = ("another count (of other rows than the step's)", "padding or prompts are counted")
        action = "count labels[..., 1:] != -100 over all micro-batches of the step"
        if is_unshifted:
            causes = ("labels counted unshifted (by Trainer, as the model has no loss_type)",)
        if is_harmless:
            action = "multiply the losses by this number before you compare them with another implementation's"
        severity = "info" if is_harmless or is_choice or weight is None else "warning"
        evidence = {"num_items": num_items, "scored": scored, "unshifted": unshifted, "weight": weight}
        return cls.finding(severity, found, f"{scored:,} scored tokens", causes, action, evidence, check="items")

    @classmethod
    def judge_sum(cls, norms: GradientNorms, num_micro_batches: int, is_mean: bool = False) -> Finding | None:
        """Information where it may be on purpose: one micro-batch's gradient, changed into something else than nothing
        or its sum with the last step's (a filter); or all of it scaled. `is_mean`: backward was given the mean cross
        entropy, so that no loss scale is undone."""
        total, error, before = norms.total, norms.error, norms.before
        largest = max(total, before)
        limit = cls.MAX_SUM_ERROR[norms.is_low] * largest
        if not math.isfinite(largest + error) or error <= limit:  # other guards name what is not finite
            return None
        is_scaled = before > 0 and abs(error - abs(before - total)) <= limit
        is_far = is_mean and cls.FAR_SCALED * min(total, before) < largest
        is_filtered = num_micro_batches == 1 and before > 0 and norms.rest > limit
        cause = "zero_grad is missing (gradients of the step before are in)" if before else "the gradient was dropped"
        if num_micro_batches > 1:
            cause = "zero_grad within the step (or an optimizer step)"
        where = f"its {num_micro_batches} micro-batches"
        found = f"gradient {error / largest:.0%} off {where} ({shorten(norms.name)})"
        causes = (cause, "gradients are changed or dropped after backward")
        action = "zero the gradients once, after each optimizer step, and step once in a window"
        if is_scaled and is_far:
            factor = before / total if total else math.inf
            found = f"gradient {factor:.3g} times its parts ({where}; {shorten(norms.name)})"
            causes = ("scaled after backward (such as unscaled twice)", "they are set to almost nothing")
            action = "leave unscaling to accelerate: look for what divides the gradients before the step"
        evidence = {"sum": total, "difference": error, "at_step": before, "micro_batches": num_micro_batches}
        severity = "info" if (is_scaled or is_filtered) and not (is_scaled and is_far) else "warning"
        return cls.finding(severity, found, "the same", causes, action, evidence, check="sum")


def judge_gradients(model, inputs: dict, scaled_loss: Callable[..., torch.Tensor]) -> Finding | None:
    """As `AccumulationMismatch.judge_model` for any loss of single positions, on two rows as they are."""
    batch, _ = two_rows(inputs)
    num_items = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()

    def gradient(rows: slice, num_micro_batches: int) -> torch.Tensor:
        part = cut(batch, rows)
        return record(model, lambda: scaled_loss(part, num_items, num_micro_batches)).only().gradient.float()

    whole, parts = gradient(slice(0, 2), 1), [gradient(slice(row, row + 1), 2) for row in (0, 1)]
    return AccumulationMismatch.judge_parts(*weigh(whole, torch.cat(parts)), is_even=True)


def is_mean_loss(step, weights: dict[Place, float | None]) -> bool:
    """Whether the step's positions weigh 1 together in the loss, as far as they were sampled."""
    if weights.keys() != step.targets.keys() or None in weights.values():
        return False
    return abs(sum(weights[place] * count for place, count in step.targets.items()) - 1) <= MAX_WEIGHT_ERROR


def cut(batch: dict, rows: slice) -> dict:
    return {name: value[rows] if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def two_rows(inputs: dict) -> tuple[dict, bool]:
    """Two rows of the batch, one row cut in two where there is but one, and whether its rows are scored alike, so that
    the way of averaging makes no difference to this run."""
    ids, labels = inputs.get("input_ids"), inputs.get("labels")
    if ids is None or labels is None or ids.shape != labels.shape:
        raise CannotJudge("the batch has no input_ids with labels of their shape")
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    odd = [name for name, value in tensors.items() if value.shape[:1] != ids.shape[:1] or value.ndim == 1]
    if odd:
        raise CannotJudge(f"{', '.join(odd)} cannot be divided into micro-batches")
    counts = (labels[:, 1:] != IGNORE_INDEX).sum(dim=1)
    is_even = bool((counts == counts[0]).all())
    if len(ids) > 1:
        return inputs | {name: value[:2] for name, value in tensors.items()}, is_even
    if any(value.shape != ids.shape for value in tensors.values()):
        raise CannotJudge("one row, with tensors that cannot be cut in two")
    half = ids.shape[1] // 2  # not doubled, which could take more memory than training does
    return inputs | {name: value[:, : 2 * half].reshape(2, half) for name, value in tensors.items()}, is_even


def weigh(whole: torch.Tensor, parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of the positions in one batch, 1, and in micro-batches, both `[rows, positions]`, 0 where there is no
    gradient. `whole`, `parts`: gradients at the logits, `[rows, positions, width]`. Raises `CannotJudge`."""
    size, along, own = (whole * whole).sum(-1), (whole * parts).sum(-1), (parts * parts).sum(-1)
    has = size > SMALL_GRADIENT * size.amax()
    is_parallel = has & (along > ALIGNED * (size * own).sqrt())
    if not has.any(dim=1).all() or (is_parallel.sum(dim=1) < MOST_ALIGNED * has.sum(dim=1)).any():
        raise CannotJudge("a position's gradient depends on the other rows of its micro-batch")
    return is_parallel.float(), torch.where(is_parallel, along / size.clamp_min(1e-30), 0.0)


def uneven_labels(labels: torch.Tensor) -> torch.Tensor:
    """Labels `[2, positions]` with all of the first row and the first eighth of the second."""
    labels = labels.clone()
    scored = [(row[1:] != IGNORE_INDEX).nonzero().flatten() + 1 for row in labels]
    kept = len(scored[1]) // KEPT
    if kept == 0 or len(scored[0]) < 2 * kept:
        raise CannotJudge(f"{len(scored[0])} and {len(scored[1])} labels in two rows: too few to make them uneven")
    labels[1, scored[1][kept:]] = IGNORE_INDEX
    return labels


def _cause(ratios: list[float], counts: list[int]) -> tuple[str, bool]:
    """The likeliest cause, and whether it is a mean of means, which does no harm to micro-batches of one size."""
    means = [sum(counts) / (len(counts) * count) for count in counts]
    scale = statistics.fmean(ratio / mean for ratio, mean in zip(ratios, means, strict=True))
    if all(abs(ratio / (scale * mean) - 1) <= MAX_WEIGHT_ERROR for ratio, mean in zip(ratios, means, strict=True)):
        if abs(scale - 1) <= MAX_WEIGHT_ERROR:
            return "a mean of micro-batch means: tokens of short micro-batches count more", True
        if abs(scale - len(counts)) <= MAX_WEIGHT_ERROR * len(counts):
            return "micro-batch means are summed (not divided by their number)", False
        return f"micro-batch means, times {scale:.2f}", False
    factor = name_factor(ratios[0])
    if factor and name_factor(ratios[1]) == factor:
        return f"each loss is {factor}: divided or multiplied by the number of micro-batches once more", False
    return "uneven micro-batches (a token weighs by the one it is in)", False


def mean_weight(weights: list[list[float]]) -> float | None:
    """Of the rows' `[lowest, mean, highest]`: None where nothing was scored, or positions weigh differently."""
    scored = [row for row in weights if row[2] > 0]
    if not scored or max(row[2] for row in scored) > WEIGHTED_LOSS * min(row[0] for row in scored):
        return None
    return statistics.fmean(row[1] for row in scored)


def is_divided_by(num_items: float, scored: int, weight: float) -> bool:
    """Does a position weigh 1 / `num_items`, rather than 1 / `scored`?"""
    off = abs(weight * num_items - 1)
    return off <= MAX_COUNT_ERROR and off < abs(weight * scored - 1)


def has_own_count(trainer: Trainer) -> bool:
    """Whether `num_items_in_batch` is counted by something else than stock Trainer."""
    counts = ("get_batch_samples", "_get_num_items_in_batch")
    return any(getattr(type(trainer), n, None) is not getattr(Trainer, n, None) or n in vars(trainer) for n in counts)
