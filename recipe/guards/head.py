"""The model's head: which token each position is really scored on, read off the gradient at the logits."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional as F

from recipe.guards.batches import IGNORE_INDEX, AsyncCopy
from recipe.guards.guard import CannotJudge, contained

# Fewer clear positions than this in a row decide nothing. Derived: where 3 of a hundred hit by chance, independently,
# more than half of 8 do so once in 800,000 rows.
MIN_POSITIONS = 8
# Of the sum of a gradient's positive entries, in its lowest one. Derived: cross entropy has one negative entry, as
# large as all the positive ones together; what label smoothing leaves once a model is sure is shared among many.
NEGATIVE_SHARE = 0.5
# Of a micro-batch, where the targets cost four heads. Chosen, not measured: enough for hundreds of positions a row.
MAX_FUSED_POSITIONS = 1024
# Share of the gradient that the best target leaves unexplained: 1e-7 in fp32, 1e-3 in bf16. Logits scaled by 2 leave
# up to 0.1, and the targets are still right; by 3, 0.3.
MAX_REMAINDER = 0.15
# Sampled in each row of a micro-batch, and rows: 4 rows of 18, of which 16 can be judged, since a position needs the
# two tokens after it. Of shorter rows more, to as many positions. Chosen, not measured, to keep the sampling short.
POSITIONS, MAX_ROWS, MIN_WIDTH = 18, 4, 3
# Micro-batches. Without logits (a fused loss) a sample costs four heads of these positions. Chosen, not measured.
FUSED_EVERY = 8


@dataclass(frozen=True)
class LossTargets:
    """All `[rows, positions]`. `targets` int64: the token that each position is really scored on, IGNORE_INDEX where
    it is not scored or was not looked at. `weights` float32: how much it counts in the loss. `losses` float32: its
    cross entropy, nats. `is_silent` bool: the loss does not depend on its logits at all. `are_shares`: the logits of
    each position are probabilities. `sums`, `pulls` float32: the gradient's sum over the vocabulary, 0 for any loss of
    a softmax over it, and minus its lowest entry; None without logits."""

    targets: torch.Tensor
    weights: torch.Tensor
    losses: torch.Tensor
    is_silent: torch.Tensor
    are_shares: bool = False
    sums: torch.Tensor | None = None
    pulls: torch.Tensor | None = None


# --- recovering


def find_head(model: torch.nn.Module) -> torch.nn.Module | None:
    """The module that makes the logits, None where the model names none."""
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def head_of(model: torch.nn.Module) -> torch.nn.Module:
    """The module that makes the logits. Raises `CannotJudge` where the model names none."""
    head = find_head(model)
    if head is None:
        raise CannotJudge(f"{type(model).__name__} names no output embeddings")
    return head


def backbone_of(model: torch.nn.Module) -> torch.nn.Module:
    """The module whose output the head is given; `model` itself where they are not apart."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT
    return getattr(inner, "base_model", inner)


def targets_from_gradient(logits: torch.Tensor, gradient: torch.Tensor) -> LossTargets:
    """`logits`, `gradient`: `[rows, positions, vocab_size]`, any float type. Row by row, to keep the memory to one
    row's."""
    rows = [target_of_logits(*row) for row in zip(logits, gradient, strict=True)]
    sums, pulls = (torch.stack([reduce(row.float()) for row in gradient]) for reduce in (_sum, _pull))
    return LossTargets(*(torch.stack(parts) for parts in zip(*rows, strict=True)), sums=sums, pulls=pulls)


def _sum(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.sum(dim=-1)


def _pull(gradient: torch.Tensor) -> torch.Tensor:
    return -gradient.amin(dim=-1)


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
    targets, weights = torch.where(is_scored, target, IGNORE_INDEX), torch.where(is_scored, weights, 0.0)
    return targets, weights, losses, size == 0


def targets_from_hidden(hidden: torch.Tensor, gradient: torch.Tensor, head: torch.nn.Module) -> LossTargets:
    """Targets where a fused loss makes no logits: `hidden`, `gradient` `[rows, positions, hidden_size]`.

    With the head's weight W the gradient at the hidden state is `w (sum_v p_v W_v - W_y)`: the target is the y in
    whose direction it points. Exact for a plain linear head; logits that are scaled or capped on the way leave a
    remainder, and positions where it is large are left out. Costs as much as four heads, so it looks at the first
    positions of each row that have a gradient.
    """
    count = max(4 * MIN_POSITIONS, MAX_FUSED_POSITIONS // hidden.shape[0])
    is_silent = torch.linalg.vector_norm(gradient.float(), torch.inf, dim=-1) == 0
    places = is_silent.byte().sort(dim=1, stable=True).indices[:, :count]
    rows = zip(hidden, gradient, places, strict=True)
    targets, weights, losses = zip(*(target_of_hidden(h[at], g[at], head) for h, g, at in rows), strict=True)

    def spread(parts: tuple[torch.Tensor, ...], value: float) -> torch.Tensor:
        whole = torch.full_like(is_silent, value, dtype=parts[0].dtype)
        return whole.scatter(1, places, torch.stack(parts))

    return LossTargets(spread(targets, IGNORE_INDEX), spread(weights, 0), spread(losses, 0), is_silent)


def target_of_hidden(hidden: torch.Tensor, gradient: torch.Tensor, head: torch.nn.Module) -> tuple[torch.Tensor, ...]:
    """Targets, weights and losses (`LossTargets`) of `[positions, hidden_size]`."""
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
    return torch.where(is_scored, target, IGNORE_INDEX), torch.where(is_scored, weights, 0.0), losses


def count_hits(input_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`[rows, 5]` int64: scored positions whose tokens at i, i+1 and i+2 differ, and of these the ones scored on token
    i, i+1, i+2 and elsewhere."""
    first, second, third, targets = input_ids[:, :-2], input_ids[:, 1:-1], input_ids[:, 2:], targets[:, :-2]
    clear = (targets != IGNORE_INDEX) & (first != second) & (second != third) & (first != third)
    hits = [((targets == ids) & clear).sum(dim=1) for ids in (first, second, third)]
    count = clear.sum(dim=1)
    return torch.stack([count, *hits, count - sum(hits)], dim=1)


# --- sampled during training


class SampledRows(NamedTuple):
    """A few positions of one micro-batch. `values`: `[rows, 9]`, being copied to the host, one row for each
    sampled row of the batch: hits (5, see `count_hits`), lowest, mean and highest weight of the scored positions (0
    where there is none), and their mean cross entropy in nats."""

    first_row: int
    first_position: int
    values: AsyncCopy

    def read(self) -> dict:
        rows = self.values.read().tolist()
        return {
            "first_row": self.first_row,
            "first_position": self.first_position,
            "hits": [[int(number) for number in row[:5]] for row in rows],
            "weights": [row[5:8] for row in rows],
            "losses": [row[8] for row in rows],
        }


class HeadTap:
    """Samples the targets of a few positions in the real forward and backward passes.

    Hooks at the head (or, where a fused loss makes no logits, at the backbone) read its output and the gradient there
    and change neither: weights with and without are bit-identical, in fp32 and bf16 (tested). The sampled place moves
    on with each micro-batch, so that in time every row and position is sampled.
    """

    def __init__(self, model: torch.nn.Module):
        self.head = head_of(model)
        self.failure: str | None = None
        self._ids: torch.Tensor | None = None  # of the micro-batch that is being trained on; None: do not sample
        self._sampled: SampledRows | None = None
        self._turn, self._logits_seen = 0, False
        self._hooks = [self.head.register_forward_hook(self._on_logits)]
        backbone = backbone_of(model)
        if backbone is not model:
            self._hooks.append(backbone.register_forward_hook(self._on_hidden))

    def begin(self, input_ids: torch.Tensor | None) -> None:
        self._ids = input_ids
        self._turn += 1

    def take(self) -> SampledRows | None:
        sampled, self._sampled, self._ids = self._sampled, None, None
        return sampled

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def save(self) -> dict:
        return {"turn": self._turn, "logits_seen": self._logits_seen}

    def load(self, state: dict) -> None:
        self._turn, self._logits_seen = int(state["turn"]), bool(state["logits_seen"])

    @contained
    def _on_hidden(self, module, inputs, output) -> None:
        is_turn = self._turn % FUSED_EVERY == 1
        if self._ids is not None and is_turn and not self._logits_seen:  # a head that is called makes the logits
            self._follow(output[0], is_hidden=True)

    @contained
    def _on_logits(self, module, inputs, output) -> None:
        if self._ids is not None:
            self._logits_seen = True
            self._follow(output, is_hidden=False)

    def _follow(self, output: torch.Tensor, is_hidden: bool) -> None:
        ids = self._ids
        if not output.requires_grad or output.shape[:2] != ids.shape or ids.shape[1] < MIN_WIDTH:
            return
        values = output.detach()
        output.register_hook(lambda gradient: self._on_gradient(ids, values, gradient, is_hidden))

    @contained
    def _on_gradient(self, ids: torch.Tensor, values: torch.Tensor, gradient: torch.Tensor, is_hidden: bool) -> None:
        if is_hidden and self._logits_seen:
            return
        num_rows, block_size = ids.shape
        width = min(block_size, POSITIONS)
        count = min(num_rows, MAX_ROWS * POSITIONS // width)
        row = self._turn * count % (num_rows - count + 1) if num_rows > count else 0
        # Golden-section steps: successive turns lie far apart and miss no place.
        position = int(self._turn * 0.6180339887 % 1 * (block_size - width + 1))
        place = (slice(row, row + count), slice(position, position + width))
        ids, values, gradient = ids.to(values.device, non_blocking=True)[place], values[place], gradient[place]
        if is_hidden:
            found = targets_from_hidden(values, gradient, self.head)
        else:
            found = LossTargets(*target_of_logits(values, gradient))
        self._sampled = SampledRows(row, position, AsyncCopy(_pack(ids, found)))


def _pack(ids: torch.Tensor, found: LossTargets) -> torch.Tensor:
    """`SampledRows.values`, still on the device."""
    scored = found.targets != IGNORE_INDEX
    number = scored.sum(dim=1).clamp_min(1)
    columns = [
        torch.where(scored, found.weights, torch.inf).amin(dim=1),
        torch.where(scored, found.weights, 0.0).sum(dim=1) / number,
        torch.where(scored, found.weights, 0.0).amax(dim=1),
        torch.where(scored, found.losses, 0.0).sum(dim=1) / number,
    ]
    return torch.cat([count_hits(ids, found.targets).float(), torch.stack(columns, dim=1).float()], dim=1)
