"""Token ids of the micro-batches, copied to the host without waiting."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

IGNORE_INDEX = -100
# Unscored tokens between scored ones: fewer are no prompt, such as the first token of a document. Chosen, not
# measured.
SHORTEST_PROMPT = 4

VALID, SCORED, LABEL_IS_TOKEN, LABEL_IS_NEXT, STARTS = 1, 2, 4, 8, 16


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


class PendingTokens(NamedTuple):
    ids: AsyncCopy
    flags: AsyncCopy

    def read(self) -> SeenTokens:
        return SeenTokens(self.ids.read().numpy(), self.flags.read().numpy())


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


def send_tokens(inputs, pad_token_id: int | None) -> PendingTokens | None:
    """Start the copy of one micro-batch to the host. None where it holds no `input_ids`."""
    if (ids := input_ids_of(inputs)) is None:
        return None
    flags = flags_of(ids, inputs.get("labels"), inputs.get("attention_mask"), inputs.get("position_ids"), pad_token_id)
    return PendingTokens(AsyncCopy(ids.detach().clone() if not ids.is_cuda else ids), AsyncCopy(flags))


def flags_of(ids, labels, attention_mask, position_ids, pad_token_id: int | None) -> torch.Tensor:
    """uint8 `[rows, positions]`, see `SeenTokens`. Without labels every token is scored. Without a 2-D mask, padding
    are the padding tokens at a row's end; the first of them is text where it is scored, since it may be an EOS."""
    flags = torch.zeros(ids.shape, dtype=torch.uint8, device=ids.device)
    has_labels = isinstance(labels, torch.Tensor) and labels.shape == ids.shape
    is_scored = labels != IGNORE_INDEX if has_labels else torch.ones_like(ids, dtype=torch.bool)
    if isinstance(attention_mask, torch.Tensor) and attention_mask.shape == ids.shape:
        is_valid = attention_mask != 0
    elif pad_token_id is not None:
        is_pad = (ids == pad_token_id).flip(1).cumprod(dim=1).flip(1).bool()
        is_first = is_pad & ~torch.nn.functional.pad(is_pad, (1, 0))[:, :-1]
        is_valid = ~is_pad | (is_first & is_scored)
    else:
        is_valid = torch.ones_like(is_scored)
    flags += VALID * is_valid
    if has_labels:
        flags += LABEL_IS_TOKEN * (labels == ids)
        flags[:, :-1] += LABEL_IS_NEXT * (labels[:, :-1] == ids[:, 1:])
    if isinstance(position_ids, torch.Tensor) and position_ids.shape == ids.shape:
        flags += STARTS * (position_ids == 0)
    flags[:, 1:] += SCORED * is_scored[:, 1:]
    return flags
