"""Token ids of the micro-batches, copied to the host without waiting."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

IGNORE_INDEX = -100
# Unscored tokens between scored ones: fewer are no prompt, such as the first token of a document. Chosen, not
# measured.
SHORTEST_PROMPT = 4
# Of one token at a row's beginning, that are padding and no text. Chosen, not measured.
SHORTEST_PADDING = 8

VALID, SCORED, LABEL_IS_TOKEN, LABEL_IS_NEXT, STARTS = map(np.uint8, (1, 2, 4, 8, 16))
OWN, FOLLOWING = SCORED | LABEL_IS_TOKEN, SCORED | LABEL_IS_NEXT


class AsyncCopy:
    """A copy of a tensor from the device to the host; `read` waits only if it has not arrived."""

    def __init__(self, tensor: torch.Tensor):
        self._copied = None
        if not tensor.is_cuda:
            self._tensor = tensor
            return
        self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def read(self) -> torch.Tensor:
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensor


@dataclass
class SeenTokens:
    """The rows of one micro-batch. `ids` int64 `[rows, positions]`; `flags` uint8 of the same shape, a sum of VALID
    (not padding), SCORED (its label is not masked, and a token is before it), LABEL_IS_TOKEN, LABEL_IS_NEXT (the label
    here is the token here, or the next) and STARTS (`position_ids` are 0: a document begins)."""

    ids: np.ndarray
    flags: np.ndarray

    @cached_property
    def valid(self) -> np.ndarray:
        return self.flags & VALID != 0

    @cached_property
    def scored(self) -> np.ndarray:
        return self.flags & SCORED != 0

    @cached_property
    def num_scored(self) -> int:
        return int(self.scored.sum())

    @cached_property
    def pieces(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids and flags of each stretch of text, without padding. Documents of a padding-free batch, which holds them
        in one row, are pieces of their own."""
        pieces = []
        for ids, flags, valid in zip(self.ids, self.flags, self.valid, strict=True):
            ids, flags = (ids, flags) if valid.all() else (ids[valid], flags[valid])
            cuts = np.flatnonzero(flags[1:] & STARTS) + 1 if len(self.ids) == 1 else []
            pieces += zip(np.split(ids, cuts), np.split(flags, cuts), strict=True)
        return [(ids, flags) for ids, flags in pieces if len(ids)]


class LabelCounts(NamedTuple):
    """Of each row of a step's micro-batches, int64 `[rows]`, for the main process, where the tokens do not come.
    `rank`, `micro_step`, `row`: where it is. `positions`: of it. `scored`: its targets; those among them whose label
    is the token itself, `own`, or the next, `following`. `first_own`: 1 where its first label is its first token.
    `hidden`: of most targets are neither, those that stand behind one and the same token, such as a mask's; else 0."""

    rank: np.ndarray
    micro_step: np.ndarray
    row: np.ndarray
    positions: np.ndarray
    scored: np.ndarray
    own: np.ndarray
    following: np.ndarray
    first_own: np.ndarray
    hidden: np.ndarray

    @classmethod
    def of(cls, tokens: Sequence[SeenTokens], rank: int = 0) -> "LabelCounts":
        """Of one rank's micro-batches."""
        parts = [np.zeros((len(cls._fields), 0), np.int64)]
        for micro_step, seen in enumerate(tokens):
            own, following = ((seen.flags & kind == kind).sum(axis=1) for kind in (OWN, FOLLOWING))
            first_own = (seen.flags[:, :1] & LABEL_IS_TOKEN != 0).sum(axis=1)
            count, positions = seen.ids.shape
            place = np.stack(np.broadcast_arrays(rank, micro_step, np.arange(count), positions))
            scored, hidden = seen.scored.sum(axis=1), np.zeros(count, np.int64)
            for row in np.flatnonzero(2 * (own + following) < scored):
                is_other = seen.scored[row] & (seen.flags[row] & (LABEL_IS_TOKEN | LABEL_IS_NEXT) == 0)
                hidden[row] = np.unique(seen.ids[row, is_other], return_counts=True)[1].max()
            parts.append(np.vstack([place, scored, own, following, first_own, hidden]))
        return cls(*np.hstack(parts))

    @classmethod
    def join(cls, parts: Sequence["LabelCounts"]) -> "LabelCounts":
        """Of several ranks."""
        return cls(*np.hstack([np.stack(part) for part in parts])) if len(parts) > 1 else parts[0]

    def by_micro_batch(self) -> dict[tuple[int, int], int]:
        """Scored targets by rank and micro-step, in this order."""
        places, number = np.unique(self.rank << 32 | self.micro_step, return_inverse=True)
        totals = np.bincount(number, self.scored, len(places)).astype(np.int64)
        ranks, micro_steps = (places >> 32).tolist(), (places & 0xFFFFFFFF).tolist()
        return dict(zip(zip(ranks, micro_steps, strict=True), totals.tolist(), strict=True))


# What of a micro-batch goes to the host, where it has the shape of `input_ids`.
SENT = ("input_ids", "labels", "attention_mask", "position_ids")


class PendingTokens(NamedTuple):
    """A micro-batch on its way to the host. `copy`: of its tensors `names`, laid on each other. `pad_token_id`: what
    is padding where there is no mask."""

    copy: AsyncCopy
    names: list[str]
    pad_token_id: int | None

    def read(self) -> SeenTokens:
        tensors = dict(zip(self.names, self.copy.read().numpy(), strict=True))
        ids = tensors["input_ids"].astype(np.int64, copy=False)
        mask, places = (tensors.get(name) for name in SENT[2:])
        mask, starts = mask if mask is None else mask != 0, places if places is None else places == 0
        return SeenTokens(ids, flags_of(ids, tensors.get("labels"), mask, starts, self.pad_token_id))


def scored_part(ids: np.ndarray, flags: np.ndarray) -> np.ndarray:
    """The tokens of a piece that the loss scores: a prompt is not learned. Gaps of up to SHORTEST_PROMPT tokens, such
    as the first token of a document, are no prompt."""
    scored = flags & SCORED != 0
    if scored[1:].all():
        return ids
    places = np.flatnonzero(scored)
    if len(places) and places[0] <= SHORTEST_PROMPT:
        scored[: places[0]] = True
    for gap in np.flatnonzero(np.diff(places) <= SHORTEST_PROMPT):
        scored[places[gap] : places[gap + 1]] = True
    return ids[scored]


def input_ids_of(inputs) -> torch.Tensor | None:
    """The micro-batch's `input_ids`; None where it holds no 2-D tensor of that name (a list, a dataclass, pixels)."""
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    return ids if isinstance(ids, torch.Tensor) and ids.dim() == 2 else None


def shape_of(inputs) -> tuple[int, ...]:
    """Rows and positions of a micro-batch, 0 where it holds no `input_ids`."""
    return tuple(ids.shape) if (ids := input_ids_of(inputs)) is not None else (0, 0)


def send_tokens(inputs, pad_token_id: int | None) -> PendingTokens | None:
    """Start the copy of one micro-batch to the host, in one piece. None where it holds no `input_ids`. Nothing is
    computed here token by token: the training waits for this."""
    if (ids := input_ids_of(inputs)) is None:
        return None
    shape, device, names, tensors = ids.shape, ids.device, [], []
    for name in SENT:
        each = inputs.get(name)
        if isinstance(each, torch.Tensor) and each.shape == shape and each.device == device:
            names.append(name)
            tensors.append(each)
    copy = torch.stack(tensors)  # others may change them in place before they are read
    return PendingTokens(AsyncCopy(copy.detach() if copy.requires_grad else copy), names, pad_token_id)


def flags_of(ids, labels, mask, starts, pad_token_id: int | None) -> np.ndarray:
    """uint8 `[rows, positions]`, see `SeenTokens`. Without labels every token is scored. Without a mask, padding are
    the padding tokens at a row's end; the first of them is text where it is scored, since it may be an EOS."""
    flags = np.zeros(ids.shape, np.uint8)
    is_scored = labels != IGNORE_INDEX if labels is not None else np.ones(ids.shape, bool)
    flags[:, 1:] = SCORED * is_scored[:, 1:]
    if mask is not None:
        flags |= mask
    elif pad_token_id is None or not (ids[:, -1] == pad_token_id).any():
        flags |= VALID
    else:
        is_pad = np.logical_and.accumulate((ids == pad_token_id)[:, ::-1], axis=1)[:, ::-1]
        is_first = is_pad.copy()
        is_first[:, 1:] &= ~is_pad[:, :-1]
        flags |= VALID * (~is_pad | (is_first & is_scored))
    if labels is not None:
        flags |= LABEL_IS_TOKEN * (labels == ids)
        flags[:, :-1] |= LABEL_IS_NEXT * (labels[:, :-1] == ids[:, 1:])
    if starts is not None:
        flags |= STARTS * starts
    return flags


def leading_padding(inputs: Mapping, pad_token_id: int | None) -> torch.Tensor:
    """bool `[rows, positions]`: padding before the rows' texts. It has attention mask 0, or is a run of the padding
    token that is not scored; where none is known, of any token, in runs of different lengths before text all of which
    is scored."""
    ids, labels, mask = (inputs.get(name) for name in SENT[:3])
    is_padding = torch.zeros_like(ids, dtype=torch.bool)
    if isinstance(mask, torch.Tensor) and mask.shape == ids.shape:
        is_padding |= (mask == 0).cumprod(dim=1).bool()
    if not isinstance(labels, torch.Tensor) or labels.shape != ids.shape:
        return is_padding
    is_run, is_scored = (ids == ids[:, :1]).cumprod(dim=1).bool(), labels != IGNORE_INDEX
    count = is_run.sum(dim=1)
    may_be = (count < ids.shape[1]) & ~(is_run & is_scored).any(dim=1)
    found = may_be & (count >= SHORTEST_PADDING)
    if pad_token_id is not None:
        found &= ids[:, 0] == pad_token_id
    else:
        found &= (is_run | is_scored).all(dim=1)
    tokens = ids[found, 0].unique()
    if len(tokens) != 1 or (pad_token_id is None and len(count[found].unique()) == 1):
        return is_padding
    return is_padding | (is_run & (may_be & (ids[:, 0] == tokens)).unsqueeze(1))  # of other rows a shorter one too
