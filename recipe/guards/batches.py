"""What the model was given, as the guards see it: token ids and a few flags on the host, a step late.

Nothing here waits for the device: tensors that live there are copied to pinned memory while the step goes on, and read
when the next one ends.
"""

from dataclasses import asdict, dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch

from recipe.guards.probes.targets import IGNORE_INDEX
from recipe.guards.thresholds import FILLED_TOKENS, SHORTEST_PROMPT
from recipe.guards.vitals import TokenCounts

COUNTED = tuple(field.name for field in fields(TokenCounts) if field.name != "embedding_rows")

VALID, SCORED, LABEL_IS_TOKEN, LABEL_IS_NEXT, STARTS = 1, 2, 4, 8, 16


class OnItsWay:
    """A tensor on its way from the device to the host; `read` waits only if it has not arrived."""

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
    """The rows of one micro-batch. `ids` int64 `[rows, positions]`; `flags` uint8 of the same shape, the sum of what
    holds: VALID (not padding), SCORED (its label is not masked, and a token is before it), LABEL_IS_TOKEN,
    LABEL_IS_NEXT (the label here is the token here, or the next), STARTS (`position_ids` are 0: a document begins)."""

    ids: np.ndarray
    flags: np.ndarray

    def rows(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids and flags of each stretch of text, without padding; documents that are kept apart are rows of their own
        where a padding-free batch holds them in one."""
        pieces = []
        for ids, flags in zip(self.ids, self.flags, strict=True):
            valid = (flags & VALID).astype(bool)
            ids, flags = (ids, flags) if valid.all() else (ids[valid], flags[valid])
            cuts = np.flatnonzero(flags[1:] & STARTS) + 1 if len(self.ids) == 1 else []
            pieces += zip(np.split(ids, cuts), np.split(flags, cuts), strict=True)
        return [(ids, flags) for ids, flags in pieces if len(ids)]


class TokensOnTheirWay(NamedTuple):
    ids: OnItsWay
    flags: OnItsWay

    def read(self) -> SeenTokens:
        return SeenTokens(self.ids.read().numpy(), self.flags.read().numpy())


def scored_part(ids: np.ndarray, flags: np.ndarray) -> np.ndarray:
    """The tokens of a row that the loss scores: what a prompt says is not learned. A few that are not, such as the
    first token of a document, are no prompt."""
    scored = flags & SCORED != 0
    if scored[1:].all():
        return ids
    places = np.flatnonzero(scored)
    if len(places) and places[0] <= SHORTEST_PROMPT:
        scored[: places[0]] = True
    for gap in np.flatnonzero(np.diff(places) <= SHORTEST_PROMPT):
        scored[places[gap] : places[gap + 1]] = True
    return ids[scored]


def send_tokens(inputs: dict, pad_token_id: int | None) -> TokensOnTheirWay | None:
    """Start the copy of one micro-batch to the host. None where it holds no 2-D `input_ids`."""
    ids = inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        return None
    flags = flags_of(ids, inputs.get("labels"), inputs.get("attention_mask"), inputs.get("position_ids"), pad_token_id)
    return TokensOnTheirWay(OnItsWay(ids.detach().clone() if not ids.is_cuda else ids), OnItsWay(flags))


def flags_of(ids, labels, attention_mask, position_ids, pad_token_id: int | None) -> torch.Tensor:
    """uint8 `[rows, positions]`, see `SeenTokens`. Without labels every token is scored; without a 2-D mask, padding
    is the padding token where it is masked out of the loss, from some place up to the row's end."""
    flags = torch.zeros(ids.shape, dtype=torch.uint8, device=ids.device)
    has_labels = isinstance(labels, torch.Tensor) and labels.shape == ids.shape
    is_scored = labels != IGNORE_INDEX if has_labels else torch.ones_like(ids, dtype=torch.bool)
    if isinstance(attention_mask, torch.Tensor) and attention_mask.shape == ids.shape:
        is_valid = attention_mask != 0
    elif pad_token_id is not None:
        is_pad = (ids == pad_token_id) & ~is_scored
        is_valid = ~(is_pad.flip(1).cumprod(dim=1).flip(1).bool())
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


class TokenCounter:
    """Counts over a run; `counts` has them as the checks want them."""

    def __init__(
        self,
        eos_token_ids: tuple[int, ...],
        embedding_rows: int,
        bos_token_id: int | None = None,
        start: dict | None = None,
    ):
        self.eos_token_ids, self.bos_token_id = eos_token_ids, bos_token_id
        self.counts = TokenCounts(
            **(start or dict.fromkeys(COUNTED, 0)),
            embedding_rows=embedding_rows,
        )

    def add(self, seen: SeenTokens) -> None:
        counts, valid, scored = self.counts, seen.flags & VALID != 0, seen.flags & SCORED != 0
        is_eos = np.zeros_like(valid)
        for token_id in self.eos_token_ids:  # one or two; np.isin takes ten times as long
            is_eos |= (seen.ids == token_id) & valid
        bos_texts, double_bos = self._count_bos((seen.ids == self.bos_token_id) & valid)
        self.counts = replace(
            counts,
            tokens=counts.tokens + int(valid.sum()),
            targets=counts.targets + int(scored.sum()),
            eos_inputs=counts.eos_inputs + int(is_eos[:, 1:].sum()),
            eos_targets=counts.eos_targets + int((is_eos & scored).sum()),
            padding_targets=counts.padding_targets + int((scored & ~valid).sum()),
            rows=counts.rows + len(seen.ids),
            filled_rows=counts.filled_rows + self._count_filled(seen, scored),
            min_id=min(counts.min_id, int(seen.ids.min())),
            max_id=max(counts.max_id, int(seen.ids.max())),
            bos_texts=counts.bos_texts + bos_texts,
            double_bos=counts.double_bos + double_bos,
        )

    @staticmethod
    def _count_filled(seen: SeenTokens, scored: np.ndarray) -> int:
        if seen.ids.shape[1] < FILLED_TOKENS:
            return 0
        is_filled = (seen.ids[:, 0] == seen.ids[:, -1]) & scored[:, 1:].all(axis=1)
        return sum(bool((seen.ids[row] == seen.ids[row, 0]).all()) for row in np.flatnonzero(is_filled))

    @staticmethod
    def _count_bos(is_bos: np.ndarray) -> tuple[int, int]:
        """Texts that begin with BOS, in mid-row too, and those that begin with exactly two. The last two positions of
        a row do not tell."""
        begins = is_bos[:, :-2].copy()
        begins[:, 1:] &= ~is_bos[:, :-3]
        return int(begins.sum()), int((begins & is_bos[:, 1:-1] & ~is_bos[:, 2:]).sum())

    def state(self) -> dict:
        return {name: value for name, value in asdict(self.counts).items() if name != "embedding_rows"}
