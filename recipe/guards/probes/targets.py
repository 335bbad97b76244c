"""Exact tests of what the loss is computed on. They run the trainer's own loss on a real micro-batch and know no model
class."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from recipe.guards.finding import CannotJudge, Finding
from recipe.guards.thresholds import (
    FOLLOWED,
    MAJORITY,
    MAX_ELSEWHERE,
    MAX_FUSED_POSITIONS,
    MAX_REMAINDER,
    MAX_UNSCORED,
    MIN_POSITIONS,
    NEGATIVE_SHARE,
    SHARES_ERROR,
    SURE,
)

IGNORE_INDEX = -100


@dataclass(frozen=True)
class LossTargets:
    """All `[rows, positions]`. `targets` int64: the token that each position is really scored on, IGNORE_INDEX where
    it is not scored or was not looked at. `weights` float32: how much it counts in the loss. `losses` float32: its
    cross entropy, nats. `is_silent` bool: the loss does not depend on its logits at all. `are_shares`: the logits of
    each position are probabilities."""

    targets: torch.Tensor
    weights: torch.Tensor
    losses: torch.Tensor
    is_silent: torch.Tensor
    are_shares: bool = False


# --- recovering


def head_of(model: torch.nn.Module) -> torch.nn.Module:
    """The module that makes the logits. Raises `CannotJudge` where the model names none."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise CannotJudge(f"{type(model).__name__} names no output embeddings")
    return head


def backbone_of(model: torch.nn.Module) -> torch.nn.Module:
    """The module whose output the head is given; `model` itself where they are not apart."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT
    return getattr(inner, "base_model", inner)


def recover_loss_targets(model: torch.nn.Module, compute_loss: Callable[[], torch.Tensor]) -> LossTargets:
    """Find the targets from the loss's gradient at the logits.

    For cross entropy that gradient is `w (p - onehot(y))`: its only negative entry is the target y, an all-zero row is
    masked, and `-grad_y / (1 - p_y)` is the weight w. Where a fused loss makes no logits, the gradient at the last
    hidden state is used (`targets_from_hidden`). `compute_loss` runs `model` eagerly. Nothing is left behind: no
    gradient reaches a parameter, and the random generators are put back. Raises `CannotJudge` where neither is there.
    """
    head = head_of(model)
    devices = [parameter.device for parameter in head.parameters() if parameter.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices=devices), torch.enable_grad(), hear_head(model) as heard:
        loss = compute_loss()
        seen = only_one(heard)
        (gradient,) = torch.autograd.grad(loss, seen, allow_unused=True)
    if gradient is None:
        raise CannotJudge("the loss does not depend on the head's output")
    if heard["logits"]:
        found = targets_from_gradient(seen.detach(), gradient)
        return replace(found, are_shares=_are_shares(seen.detach()[0]))
    return targets_from_hidden(seen.detach(), gradient, head)


def _are_shares(logits: torch.Tensor) -> bool:
    """Whether they are at least 0 and add up to 1 at each position, which logits do by no chance."""
    sums = logits.float().sum(dim=-1)
    return bool((logits >= 0).all()) and bool(((sums - 1).abs() < SHARES_ERROR).all())


@contextmanager
def hear_head(model: torch.nn.Module) -> Iterator[dict[str, list[torch.Tensor]]]:
    """What head and backbone give out while this is open: `{"logits": [...], "hidden": [...]}`."""
    heard: dict[str, list[torch.Tensor]] = {"logits": [], "hidden": []}
    backbone = backbone_of(model)
    hooks = [head_of(model).register_forward_hook(lambda module, inputs, output: heard["logits"].append(output))]
    if backbone is not model:
        hooks.append(backbone.register_forward_hook(lambda module, inputs, output: heard["hidden"].append(output[0])))
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def only_one(heard: dict[str, list[torch.Tensor]]) -> torch.Tensor:
    """The logits of the one time that the head ran, else the hidden states of the one time that the backbone ran."""
    seen = heard["logits"] or heard["hidden"]
    if len(seen) != 1 or seen[0].dim() != 3 or not seen[0].requires_grad:
        raise CannotJudge(f"the head ran {len(heard['logits'])} times in one loss: its logits cannot be told apart")
    return seen[0]


def targets_from_gradient(logits: torch.Tensor, gradient: torch.Tensor) -> LossTargets:
    """`logits`, `gradient`: `[rows, positions, vocab_size]`, any float type. Row by row, to keep the memory to one
    row's."""
    rows = [target_of_logits(*row) for row in zip(logits, gradient, strict=True)]
    return LossTargets(*(torch.stack(parts) for parts in zip(*rows, strict=True)))


def target_of_logits(logits: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Targets, weights, losses and silence (`LossTargets`) of `[..., vocab_size]`."""
    logits, gradient = logits.float(), gradient.float()
    lowest, target = gradient.min(dim=-1)
    losses = logits.logsumexp(dim=-1) - logits.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    weights = -lowest / (1 - (-losses).exp()).clamp_min(1e-6)
    # Cross entropy has one negative entry, as large as all the positive ones together. With label smoothing it
    # vanishes once the model is sure of the target, and the lowest of the many that remain means nothing.
    size = torch.linalg.vector_norm(gradient, 1, dim=-1)
    positive = (size + gradient.sum(dim=-1)) / 2
    is_scored = (lowest < 0) & (-lowest > NEGATIVE_SHARE * positive)
    return torch.where(is_scored, target, IGNORE_INDEX), torch.where(is_scored, weights, 0.0), losses, size == 0


def targets_from_hidden(hidden: torch.Tensor, gradient: torch.Tensor, head: torch.nn.Module) -> LossTargets:
    """Targets where a fused loss makes no logits: `hidden`, `gradient` `[rows, positions, hidden_size]`.

    With the head's weight W the gradient at the hidden state is `w (sum_v p_v W_v - W_y)`: the target is the y in
    whose direction it points. Exact for a plain linear head; logits that are scaled or capped on the way leave a
    remainder, and positions where it is large are left out. Costs as much as four heads, so it looks at the first
    positions of each row only.
    """
    count = max(4 * MIN_POSITIONS, MAX_FUSED_POSITIONS // hidden.shape[0])
    rows = [_target_of_hidden(h[:count], g[:count], head) for h, g in zip(hidden, gradient, strict=True)]
    targets, *others = (torch.stack(parts) for parts in zip(*rows, strict=True))
    rest = (0, hidden.shape[1] - targets.shape[1])
    return LossTargets(F.pad(targets, rest, value=IGNORE_INDEX), *(F.pad(part, rest) for part in others))


def _target_of_hidden(hidden: torch.Tensor, gradient: torch.Tensor, head: torch.nn.Module) -> tuple[torch.Tensor, ...]:
    weight, bias = head.weight.detach().float(), getattr(head, "bias", None)
    hidden, gradient = hidden.float(), gradient.float()
    log_p = F.linear(hidden, weight, None if bias is None else bias.detach().float()).log_softmax(dim=-1)
    mean = log_p.exp() @ weight  # sum_v p_v W_v
    # For each y with d = mean - W_y: g.d and d.d, without building d
    along = (gradient * mean).sum(-1, keepdim=True) - gradient @ weight.T
    length = ((mean**2).sum(-1, keepdim=True) - 2 * mean @ weight.T + (weight**2).sum(-1)).clamp_min(1e-12)
    score, target = torch.where(along > 0, along**2 / length, 0.0).max(dim=-1)
    size = (gradient**2).sum(-1)
    chosen = target.unsqueeze(-1)
    weights = (along.gather(-1, chosen) / length.gather(-1, chosen)).squeeze(-1)
    is_scored = (size > 0) & (score >= (1 - MAX_REMAINDER) * size)
    losses = -log_p.gather(-1, chosen).squeeze(-1)
    return torch.where(is_scored, target, IGNORE_INDEX), torch.where(is_scored, weights, 0.0), losses, size == 0


# --- judging


def count_hits(input_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`[rows, 5]` int64: positions that can be told apart, and of these the ones scored on token i, i+1, i+2 and
    elsewhere.

    A position counts where it is scored and the tokens at i, i+1 and i+2 differ.
    """
    first, second, third, targets = input_ids[:, :-2], input_ids[:, 1:-1], input_ids[:, 2:], targets[:, :-2]
    clear = (targets != IGNORE_INDEX) & (first != second) & (second != third) & (first != third)
    hits = [((targets == ids) & clear).sum(dim=1) for ids in (first, second, third)]
    count = clear.sum(dim=1)
    return torch.stack([count, *hits, count - sum(hits)], dim=1)


def check_loss_targets(
    input_ids: torch.Tensor,
    targets: torch.Tensor,
    labels: torch.Tensor | None = None,
    step: int = 0,
    tokens_seen: int = 0,
) -> Finding | None:
    """Hold the recovered targets against the next token of the input. All `[rows, positions]`.

    Returns the first faulty row's finding: `missing_label_shift` (scored on token i), `double_label_shift` (i+2) or
    `wrong_loss_target` (none of these, a tenth of the positions or more). Where the targets are the `labels` of the
    next position and those differ from the tokens in less than half of the places, that may be on purpose (token
    dropout): information. Raises `CannotJudge` with too few clear positions.
    """
    if input_ids.shape != targets.shape:
        raise CannotJudge(f"logits for {tuple(targets.shape)} positions, input_ids {tuple(input_ids.shape)}")
    counts = count_hits(input_ids, targets).tolist()
    judged = [number for number, row in enumerate(counts) if row[0] >= MIN_POSITIONS]
    if not judged:
        raise CannotJudge(
            f"at most {max(row[0] for row in counts)} scored positions with three different tokens "
            f"in a row; {MIN_POSITIONS} are needed"
        )
    found = [judge_row(*counts[number], number, step, tokens_seen) for number in judged]
    faulty = [finding for finding in found if finding is not None]
    if not faulty:
        return None
    finding = in_rows(faulty[0], len(faulty), len(judged))
    elsewhere = [counts[number][4] / counts[number][0] for number in judged]
    if finding.id == "wrong_loss_target" and max(elsewhere) < MAJORITY and _follow(targets, labels):
        return replace(
            finding,
            severity="info",
            likely_causes=("tokens are replaced on purpose (token dropout, denoising)", "noise in the labels"),
            action="nothing, if it is on purpose; else print one row of input_ids beside its labels",
        )
    return finding


def check_all_scored(
    found: LossTargets, labels: torch.Tensor, step: int = 0, tokens_seen: int = 0, is_own_loss: bool = False
) -> Finding | None:
    """Hold the positions that the loss does not depend on against the `labels` `[rows, positions]`: those whose next
    label is a token are meant to be scored. Positions that are sure of their target (softmax rounds to 1) are silent
    too, so raises `CannotJudge` where the model is. `is_own_loss`: the trainer's loss is the user's own, which may
    leave positions out on purpose: information."""
    scored = found.targets != IGNORE_INDEX
    if labels.shape != scored.shape or not scored.any() or float(found.losses[scored].mean()) < SURE:
        raise CannotJudge("no position's loss is large enough to tell silence from certainty")
    meant = labels[:, 1:] != IGNORE_INDEX
    silent = int((found.is_silent[:, :-1] & meant).sum())
    count = int(meant.sum())
    if silent <= MAX_UNSCORED * count:
        return None
    return Finding(
        "wrong_loss_target",
        "info" if is_own_loss else "warning",
        step,
        tokens_seen,
        found=f"{silent} of {count} positions with a label are not scored",
        expected="all of them",
        likely_causes=("a mask inside the loss that is wrong", "logits or labels cut before the loss"),
        action="if it is on purpose, set their labels to -100; else count what your loss function averages over",
        evidence={"unscored": silent, "positions": count},
    )


def check_logits(found: LossTargets, vocab_size: int, step: int = 0, tokens_seen: int = 0) -> Finding | None:
    """Cross entropy takes softmax itself. Of probabilities it cannot get under that of a 1 among zeros."""
    if not found.are_shares:
        return None
    lowest = math.log(1 + (vocab_size - 1) / math.e)
    return Finding(
        "loss_above_envelope",
        "error",
        step,
        tokens_seen,
        found=f"the model's logits are probabilities: the loss cannot fall below {lowest:.2f}",
        expected="logits, of which the loss takes softmax itself",
        likely_causes=("softmax in the model's head, and once more in the loss",),
        action="return what the head gives, without softmax",
        evidence={"lowest": lowest},
    )


def check_last_position(
    input_ids: torch.Tensor, found: LossTargets, labels: torch.Tensor, step: int = 0, tokens_seen: int = 0
) -> Finding | None:
    """A row's last position has no next token in it. With labels that are the tokens themselves nothing says what it
    should be scored on. All `[rows, positions]`."""
    if labels.shape != input_ids.shape or found.targets.shape != input_ids.shape:
        raise CannotJudge("labels or logits of another shape than input_ids")
    own = (labels == input_ids).float().mean() > MAJORITY
    scored = found.targets[:, -1] != IGNORE_INDEX
    if not own or int(scored.sum()) <= MAJORITY * len(scored):
        return None
    return Finding(
        "wrong_loss_target",
        "warning",
        step,
        tokens_seen,
        found=f"the last position of {int(scored.sum())} of {len(scored)} rows is scored, and has no next token",
        expected="no target there",
        likely_causes=("labels are rolled over the batch: a row's last target is the first token of the next",),
        action="shift within each row, and leave its last position out",
        evidence={"rows": int(scored.sum()), "of": len(scored), "targets": found.targets[:, -1].tolist()},
    )


def in_rows(finding: Finding, num_faulty: int, num_judged: int) -> Finding:
    """Says how many rows it is about, where it is not about all of them."""
    if num_faulty == num_judged:
        return finding
    where = f"{finding.found}, in {num_faulty} of {num_judged} rows (row {finding.evidence['row']})"
    return replace(finding, found=where)


def _follow(targets: torch.Tensor, labels: torch.Tensor | None) -> bool:
    """Whether the targets are the labels of the next position nearly everywhere."""
    if labels is None or labels.shape != targets.shape:
        return False
    scored = targets[:, :-1] != IGNORE_INDEX
    return bool(((targets[:, :-1] == labels[:, 1:]) & scored).sum() >= FOLLOWED * scored.sum())


def judge_row(
    count: int,
    shift_0: int,
    shift_1: int,
    shift_2: int,
    elsewhere: int,
    row: int,
    step: int,
    tokens_seen: int,
    max_elsewhere: float = MAX_ELSEWHERE,
) -> Finding | None:
    """The finding for one row's counts (`count_hits`), None below `MIN_POSITIONS`."""
    if count < MIN_POSITIONS:
        return None
    evidence = {
        "row": row,
        "positions": count,
        "shift_0": shift_0,
        "shift_1": shift_1,
        "shift_2": shift_2,
        "elsewhere": elsewhere,
    }
    where = {"step": step, "tokens_seen": tokens_seen, "severity": "error", "evidence": evidence}
    if shift_0 > MAJORITY * count:
        return Finding(
            "missing_label_shift",
            found=f"loss target = token i ({shift_0} of {count} positions)",
            expected="token i+1",
            likely_causes=(
                "labels passed unshifted to a model that does not shift",
                "a loss function of your own without the shift",
            ),
            action="shift once: labels = input_ids for a model that shifts, else compare "
            "logits[:, :-1] with labels[:, 1:]",
            **where,
        )
    if shift_2 > MAJORITY * count:
        return Finding(
            "double_label_shift",
            found=f"loss target = token i+2 ({shift_2} of {count} positions)",
            expected="token i+1",
            likely_causes=(
                "labels shifted by the collator and again by the model",
                "labels already shifted in the dataset",
            ),
            action="pass labels = input_ids, unshifted: Hugging Face models shift them inside the loss",
            **where,
        )
    if elsewhere > max_elsewhere * count:
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
