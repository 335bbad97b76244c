"""Exact tests of what the loss is computed on. They run the trainer's own loss on a real micro-batch and know no model
class."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from recipe.guards.finding import Finding

IGNORE_INDEX = -100
MIN_POSITIONS = 8  # fewer clear positions than this in a row decide nothing
# A row is judged by the shift at which most of its targets lie. By chance a target equals another token of the row in
# two or three of a hundred positions (measured over forty model classes), so half is far from both sides.
MAJORITY = 0.5
# Targets at none of the shifts 0, 1, 2: a few may be chance or special handling, a tenth is not.
MAX_ELSEWHERE = 0.1


class CannotJudge(Exception):
    """A probe has nothing to go by; its message is the reason shown to the user."""


@dataclass(frozen=True)
class LossTargets:
    """`targets` `[rows, positions]` int64: the token that each position is really scored on, IGNORE_INDEX where it is
    not scored. `weights` `[rows, positions]` float32: how much it counts in the loss."""

    targets: torch.Tensor
    weights: torch.Tensor


def recover_loss_targets(model: torch.nn.Module, compute_loss: Callable[[], torch.Tensor]) -> LossTargets:
    """Find the targets from the loss's gradient at the logits.

    For cross entropy that gradient is `w (p - onehot(y))`: its only negative entry is the target y, an all-zero row is
    masked, and `-grad_y / (1 - p_y)` is the weight w. `compute_loss` runs `model` eagerly. Nothing is left behind: no
    gradient reaches a parameter, and the random generators are put back. Raises `CannotJudge` where there are no
    logits to look at.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise CannotJudge(f"{type(model).__name__} names no output embeddings")
    seen: list[torch.Tensor] = []
    hook = head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    devices = [parameter.device for parameter in head.parameters() if parameter.device.type == "cuda"][:1]
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            loss = compute_loss()
            if len(seen) != 1 or not seen[0].requires_grad:
                raise CannotJudge(f"the head ran {len(seen)} times in one loss: its logits cannot be told apart")
            (gradient,) = torch.autograd.grad(loss, seen[0], allow_unused=True)
    finally:
        hook.remove()
    if gradient is None:
        raise CannotJudge("the loss does not depend on the head's output (a fused loss?)")
    return targets_from_gradient(seen[0].detach(), gradient)


def targets_from_gradient(logits: torch.Tensor, gradient: torch.Tensor) -> LossTargets:
    """`logits`, `gradient`: `[rows, positions, vocab_size]`, any float type. Row by row, to keep the memory to one
    row's."""
    targets, weights = [], []
    for row_logits, row_gradient in zip(logits, gradient, strict=True):
        lowest, target = row_gradient.float().min(dim=-1)
        probability = row_logits.float().log_softmax(dim=-1).gather(-1, target.unsqueeze(-1)).squeeze(-1).exp()
        targets.append(torch.where(lowest < 0, target, IGNORE_INDEX))
        weights.append(torch.where(lowest < 0, -lowest / (1 - probability).clamp_min(1e-6), 0.0))
    return LossTargets(torch.stack(targets), torch.stack(weights))


def check_loss_targets(
    input_ids: torch.Tensor, targets: torch.Tensor, step: int = 0, tokens_seen: int = 0
) -> Finding | None:
    """Hold the recovered targets against the next token of the input.

    Both `[rows, positions]`. Looks only at positions where the tokens at i, i+1 and i+2 differ, so that a shift is
    told without doubt. Returns the first faulty row's finding: `missing_label_shift` (scored on token i),
    `double_label_shift` (i+2) or `wrong_loss_target` (none of these, a tenth of the positions or more). Raises
    `CannotJudge` with too few clear positions.
    """
    if input_ids.shape != targets.shape:
        raise CannotJudge(f"logits for {tuple(targets.shape)} positions, input_ids {tuple(input_ids.shape)}")
    first, second, third, found = input_ids[:, :-2], input_ids[:, 1:-1], input_ids[:, 2:], targets[:, :-2]
    clear = (found != IGNORE_INDEX) & (first != second) & (second != third) & (first != third)
    counts = clear.sum(dim=1)
    if (counts >= MIN_POSITIONS).sum() == 0:
        raise CannotJudge(
            f"at most {int(counts.max())} scored positions with three different tokens "
            f"in a row; {MIN_POSITIONS} are needed"
        )
    hits = torch.stack(
        [((found == ids) & clear).sum(dim=1) for ids in (first, second, third)], dim=1
    )  # [rows, shift 0 1 2]
    elsewhere = counts - hits.sum(dim=1)
    for row in (counts >= MIN_POSITIONS).nonzero().flatten().tolist():
        finding = _judge_row(hits[row].tolist(), int(elsewhere[row]), int(counts[row]), row, step, tokens_seen)
        if finding is not None:
            return finding
    return None


def _judge_row(hits: list[int], elsewhere: int, count: int, row: int, step: int, tokens_seen: int) -> Finding | None:
    evidence = {
        "row": row,
        "positions": count,
        "shift_0": hits[0],
        "shift_1": hits[1],
        "shift_2": hits[2],
        "elsewhere": elsewhere,
    }
    where = {"step": step, "tokens_seen": tokens_seen, "severity": "error", "evidence": evidence}
    if hits[0] > MAJORITY * count:
        return Finding(
            "missing_label_shift",
            found=f"loss target = token i ({hits[0]} of {count} positions)",
            expected="token i+1",
            likely_causes=(
                "labels passed unshifted to a model that does not shift",
                "a loss function of your own without the shift",
            ),
            action="shift once: labels = input_ids for a model that shifts, else compare "
            "logits[:, :-1] with labels[:, 1:]",
            **where,
        )
    if hits[2] > MAJORITY * count:
        return Finding(
            "double_label_shift",
            found=f"loss target = token i+2 ({hits[2]} of {count} positions)",
            expected="token i+1",
            likely_causes=(
                "labels shifted by the collator and again by the model",
                "labels already shifted in the dataset",
            ),
            action="pass labels = input_ids, unshifted: Hugging Face models shift them inside the loss",
            **where,
        )
    if elsewhere > MAX_ELSEWHERE * count:
        return Finding(
            "wrong_loss_target",
            found=f"loss target is neither token i, i+1 nor i+2 ({elsewhere} of {count} positions)",
            expected="token i+1",
            likely_causes=(
                "labels of another row or document",
                "labels remapped or shuffled",
                "logits cut or reordered before the loss",
            ),
            action="print one row of input_ids beside its labels as the loss function receives them",
            **where,
        )
    return None
