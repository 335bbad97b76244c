"""Rows -> one micro-batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from recipe.data.packing import Row


@dataclass(frozen=True)
class DataCollatorForPackedRows:
    """Stacks rows; keeps no state, so train and eval can share it.

    `labels` are the `input_ids` themselves, unshifted: the model shifts them, once. No attention mask is made, since
    rows have no padding and a 2-D mask of ones silently turns document masking off. With `document_masking`,
    `position_ids` start again at 0 after each EOS, from which the model derives that documents do not see each other.

    Rows [5 6 2 7] and [8 9 2 5] with EOS = 2 give
        input_ids    [[5, 6, 2, 7], [8, 9, 2, 5]]     labels the same
        position_ids [[0, 1, 2, 0], [0, 1, 2, 0]]     with document_masking only
    Shapes `[rows, block_size]`, int64.
    """

    eos_token_id: int
    document_masking: bool = False

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        input_ids = torch.from_numpy(np.stack([row.input_ids for row in rows]).astype(np.int64))
        batch = {"input_ids": input_ids, "labels": input_ids.clone()}
        if self.document_masking:
            batch["position_ids"] = restarting_positions(input_ids, self.eos_token_id)
        return batch


def restarting_positions(input_ids: torch.Tensor, eos_token_id: int) -> torch.Tensor:
    """Position of each token in its document, counted from the row's start or the last EOS before it. Shapes `[rows,
    block_size]`."""
    place = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    after_eos = torch.zeros_like(input_ids)
    after_eos[:, 1:] = torch.where(input_ids[:, :-1] == eos_token_id, place[:, 1:], 0)
    return place - after_eos.cummax(dim=1).values
