"""Two ways to compute one thing must agree: accumulated or whole, evaluated twice, evaluated or trained, compiled or
eager."""

import math
import statistics
from collections.abc import Callable, Sequence

import torch

from recipe.guards.finding import CannotJudge, Finding
from recipe.guards.probes.attention import undisturbed
from recipe.guards.probes.targets import IGNORE_INDEX, recover_loss_targets
from recipe.guards.thresholds import (
    COMPILED,
    EVALUATED,
    FACTOR_TOLERANCE,
    KEPT,
    LARGEST_FACTOR,
    REPEATED,
    REPEATED_FP32,
    REPORTED,
    SMALL,
    SUM_ROOM,
    WEIGHTS,
)


def probe_accumulation(
    model: torch.nn.Module,
    inputs: dict,
    scaled_loss: Callable[[dict, torch.Tensor, int], torch.Tensor],
    step: int = 0,
    tokens_seen: int = 0,
) -> Finding | None:
    """Weigh each scored position of an uneven batch of two rows, once whole and once as two micro-batches.

    `scaled_loss(inputs, num_items_in_batch, num_micro_batches)` returns the loss as it is sent to backward for one
    micro-batch of a step of that many. Raises `CannotJudge` where the batch cannot be divided.
    """
    batch, is_even = two_rows(inputs)
    labels = batch["labels"] = uneven_labels(batch["labels"])
    num_items = (labels[:, 1:] != IGNORE_INDEX).sum()

    def weights(rows: slice, num_micro_batches: int) -> torch.Tensor:
        part = {name: value[rows] if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        return recover_loss_targets(model, lambda: scaled_loss(dict(part), num_items, num_micro_batches)).weights

    whole, parts = weights(slice(0, 2), 1), [weights(slice(row, row + 1), 2) for row in (0, 1)]
    return check_accumulation(whole, torch.cat(parts), is_even, step, tokens_seen)


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


def uneven_labels(labels: torch.Tensor) -> torch.Tensor:
    """Labels `[2, positions]` with all of the first row and the first eighth of the second."""
    labels = labels.clone()
    scored = [(row[1:] != IGNORE_INDEX).nonzero().flatten() + 1 for row in labels]
    kept = len(scored[1]) // KEPT
    if kept == 0 or len(scored[0]) < 2 * kept:
        raise CannotJudge(f"{len(scored[0])} and {len(scored[1])} labels in two rows: too few to make them uneven")
    labels[1, scored[1][kept:]] = IGNORE_INDEX
    return labels


def check_accumulation(
    whole: torch.Tensor, parts: torch.Tensor, is_even: bool = False, step: int = 0, tokens_seen: int = 0
) -> Finding | None:
    """Hold the weights of a step's positions in micro-batches of one row against those in one batch. Both `[2,
    positions]`, 0 where nothing is scored. `is_even`: the run's own rows are scored alike."""
    scored = (whole > 0) & (parts > 0)
    if not scored.any(dim=1).all() or not (whole.isfinite().all() and parts.isfinite().all()):
        raise CannotJudge("no weights of scored positions in one of the micro-batches")
    ratios = [float((part[keep] / all_[keep]).median()) for part, all_, keep in zip(parts, whole, scored, strict=True)]
    if all(abs(ratio - 1) <= WEIGHTS for ratio in ratios):
        return None
    counts = scored.sum(dim=1).tolist()
    cause, is_mean = _accumulation_cause(ratios, counts)
    return Finding(
        "accumulation_mismatch",
        "info" if is_mean and is_even else "warning",
        step,
        tokens_seen,
        found=f"tokens weigh {ratios[0]:.2f} and {ratios[1]:.2f} times as much in micro-batches of {counts[0]} and "
        f"{counts[1]} scored tokens as in one batch" + (" (this run's rows are scored alike)" if is_even else ""),
        expected="1.00 and 1.00",
        likely_causes=tuple(dict.fromkeys((cause, "the loss ignores num_items_in_batch", "a custom compute_loss"))),
        action="divide the sum of the losses by num_items_in_batch (scored tokens of the whole step) and nothing else",
        evidence={"ratios": ratios, "scored": counts},
    )


def _accumulation_cause(ratios: list[float], counts: list[int]) -> tuple[str, bool]:
    """The likeliest cause, and whether it is a mean of means, which does no harm to micro-batches of one size."""
    means = [sum(counts) / (len(counts) * count) for count in counts]
    scale = statistics.fmean(ratio / mean for ratio, mean in zip(ratios, means, strict=True))
    if all(abs(ratio / (scale * mean) - 1) <= WEIGHTS for ratio, mean in zip(ratios, means, strict=True)):
        if abs(scale - 1) <= WEIGHTS:
            return "the mean of the micro-batches' means: tokens of short micro-batches count more", True
        if abs(scale - len(counts)) <= WEIGHTS * len(counts):
            return "the micro-batches' means are summed and not divided by their number", False
        return f"the micro-batches' means, times {scale:.2f}", False
    factor = name_factor(ratios[0])
    if factor and name_factor(ratios[1]) == factor:
        return f"the loss of each micro-batch is {factor}: divided or multiplied by their number once more", False
    return "the weight of a token depends on the micro-batch that it is in", False


def probe_eval(
    model: torch.nn.Module,
    inputs: dict,
    train_loss: Callable[[dict], torch.Tensor],
    eval_loss: Callable[[dict], torch.Tensor],
    step: int = 0,
    tokens_seen: int = 0,
    exact: bool = False,
) -> dict[str, Finding | CannotJudge | None]:
    """Evaluate a batch twice, and once by the way of training with the model in eval mode (`train_loss` must leave the
    mode alone). All three give a mean over tokens. `exact`: in fp32. Returns what each of the two ids found."""
    losses = []
    with undisturbed(model, training=False), torch.no_grad():
        for compute in (eval_loss, eval_loss, train_loss):  # one draw after another: dropout that is left on differs
            losses.append(float(compute(dict(inputs)).mean()))
    first, second, trained = losses
    return {
        "eval_not_repeatable": _result(check_repeated, first, second, step, tokens_seen, exact),
        "eval_train_mismatch": _result(check_eval_loss, (first + second) / 2, trained, step, tokens_seen),
    }


def _result(check: Callable, *numbers) -> Finding | CannotJudge | None:
    try:
        return check(*numbers)
    except CannotJudge as reason:
        return reason


def check_repeated(
    first: float, second: float, step: int = 0, tokens_seen: int = 0, exact: bool = False
) -> Finding | None:
    """Two evaluations of one batch by one model, nats per token. `exact`: in fp32."""
    _need_finite(first, second)
    difference, limit = abs(first - second), REPEATED_FP32 if exact else REPEATED
    if difference <= limit * max(abs(first), abs(second)):
        return None
    return Finding(
        "eval_not_repeatable",
        "warning",
        step,
        tokens_seen,
        found=f"two evaluations of the same rows give {first:.6f} and {second:.6f} nats",
        expected=f"equal to {limit:.0e} of the loss",
        likely_causes=(
            "dropout is on while evaluating",
            "the evaluation draws random numbers",
            "the model changes itself",
        ),
        action="look for layers with training=True, or a dropout rate passed to an attention function, in eval mode",
        evidence={"first": first, "second": second, "difference": difference},
    )


def check_eval_loss(evaluated: float, trained: float, step: int = 0, tokens_seen: int = 0) -> Finding | None:
    """The loss of the same rows and weights by the way of evaluation and of training, nats per token."""
    _need_finite(evaluated, trained)
    if abs(evaluated - trained) <= EVALUATED * abs(trained):
        return None
    numbers = {"eval_loss": evaluated, "train_loss": trained}
    return _mismatch(evaluated, trained, "the training loss of the same rows", numbers, step, tokens_seen)


def check_eval_mean(
    batch_losses: Sequence[float], batch_tokens: Sequence[int], reported: float, step: int = 0, tokens_seen: int = 0
) -> Finding | None:
    """The eval loss that was reported against those of its batches (parallel lists, nats per token and scored tokens).
    Any mean of them is let pass; a factor is not."""
    pairs = [(loss, count) for loss, count in zip(batch_losses, batch_tokens, strict=True) if count]
    if not pairs:
        raise CannotJudge("no batch with scored tokens was seen")
    losses = [loss for loss, _ in pairs]
    _need_finite(reported, *losses)
    mean = sum(loss * count for loss, count in pairs) / sum(count for _, count in pairs)
    is_a_mean = min(losses) * (1 - REPORTED) <= reported <= max(losses) * (1 + REPORTED)
    is_plain_mean = abs(reported - statistics.fmean(losses)) <= REPORTED * reported
    if is_a_mean and (is_plain_mean or not name_factor(_ratio(reported, mean))):
        return None
    numbers = {"reported": reported, "mean": mean, "batches": len(pairs)}
    return _mismatch(reported, mean, f"the mean over its {len(pairs)} batches", numbers, step, tokens_seen)


def _mismatch(value: float, wanted: float, what: str, numbers: dict, step: int, tokens_seen: int) -> Finding:
    factor = name_factor(_ratio(value, wanted))
    causes = ["another loss: labels, shift, masking or reduction differ between the two", "weights changed in between"]
    if factor:
        causes.insert(0, "multiplied or divided by the number of processes, of micro-batches or of rows")
    return Finding(
        "eval_train_mismatch",
        "warning",
        step,
        tokens_seen,
        found=f"eval loss {value:.4f}" + (f", {factor} of {what}" if factor else ""),
        expected=f"{wanted:.4f}, {what}",
        likely_causes=tuple(causes),
        action="compute the eval loss of one batch by hand: the mean cross entropy over its scored tokens",
        evidence=numbers | {"ratio": _ratio(value, wanted)},
    )


def _ratio(value: float, wanted: float) -> float:
    return value / wanted if wanted else math.inf


def name_factor(ratio: float) -> str:
    """`8 times` or `1/8` for a ratio within 2 % of a whole number or of its inverse, from 2 on; else empty."""
    for value, name in ((ratio, "{} times"), (1 / ratio if ratio > 0 else 0.0, "1/{}")):
        if (
            math.isfinite(value)
            and 2 <= round(value) <= LARGEST_FACTOR
            and abs(value / round(value) - 1) <= FACTOR_TOLERANCE
        ):
            return name.format(round(value))
    return ""


def _need_finite(*losses: float) -> None:
    if not all(math.isfinite(loss) for loss in losses):
        raise CannotJudge("a loss is not finite")


Gradients = dict[str, tuple[float, float]]


def check_compiled(
    eager: Gradients,
    compiled: Gradients,
    losses: tuple[float, float],
    dtype: torch.dtype = torch.float32,
    step: int = 0,
    tokens_seen: int = 0,
) -> Finding | None:
    """Hold loss and gradients of a compiled model against those of the eager one, on one micro-batch without dropout.

    Both map a parameter's name to norm and sum of its gradient; `losses` is (eager, compiled); `dtype` that of the
    matrix products.
    """
    _need_finite(*losses, *(number for pair in eager.values() for number in pair))
    loss_limit, norm_limit = COMPILED[dtype]
    if eager.keys() != compiled.keys():
        raise CannotJudge(f"{len(eager)} gradients in eager mode, {len(compiled)} compiled")
    floor = SMALL * math.hypot(*(norm for norm, _ in eager.values()))
    gaps = {name: _gap(eager[name], compiled[name], floor) for name in eager}
    off = sorted((name for name, gap in gaps.items() if not gap <= norm_limit), key=lambda name: -gaps[name])
    loss_gap = abs(losses[1] - losses[0]) / max(abs(losses[0]), 1e-12)
    if not off and loss_gap <= loss_limit:
        return None
    found = f"loss {losses[1]:.5f} compiled, {losses[0]:.5f} eager"
    if off:
        found += f"; {len(off)} of {len(gaps)} gradients differ, most {off[0]} by {gaps[off[0]]:.0%} of its norm"
    return Finding(
        "compiled_mismatch",
        "warning",
        step,
        tokens_seen,
        found=found,
        expected=f"loss equal to {loss_limit:.1%}, gradients to {norm_limit:.0%}",
        likely_causes=(
            "a fault of the compiler or of a fused kernel",
            "code that does something else when it is traced",
        ),
        action="train without torch_compile, or compile layer by layer, and compare the first losses",
        evidence={"loss_gap": loss_gap, "gradients_off": len(off), "largest_gap": max(gaps.values(), default=0.0)},
    )


def _gap(eager: tuple[float, float], compiled: tuple[float, float], floor: float) -> float:
    """Of norm and sum, relative to the norm. Rounding errors are independent, so their sum is about as large as their
    norm; three times that is allowed."""
    scale = max(eager[0], floor, 1e-30)
    gap = max(abs(compiled[0] - eager[0]), abs(compiled[1] - eager[1]) / SUM_ROOM) / scale
    return gap if math.isfinite(gap) else math.inf
