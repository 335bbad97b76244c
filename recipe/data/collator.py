"""Rows -> one micro-batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from recipe.data.packing import Row


@dataclass(frozen=True)
class DataCollatorForPackedRows:
    """Stacks rows; has no state, so train and eval can share it.

    `labels` are the `input_ids` themselves, unshifted: the model shifts them once. There is no attention mask, since
    rows have no padding and a 2-D mask of ones silently turns document masking off. With `document_masking`,
    `position_ids` restart at 0 after each EOS, from which the model derives the document boundaries.

    Rows [5 6 2 7] and [8 9 2 5] with EOS = 2 give
        input_ids    [[5, 6, 2, 7], [8, 9, 2, 5]]     labels the same
        position_ids [[0, 1, 2, 0], [0, 1, 2, 0]]     with document_masking only
        cu_seq_lens_q = cu_seq_lens_k = [0, 3, 4, 7, 8], max_length_q = max_length_k = 4     with flash_attention too
    Shapes `[rows, block_size]`, int64; `cu_seq_lens_*` int32 `[documents + 1]`, over the concatenated rows.
    """

    eos_token_id: int
    document_masking: bool = False
    flash_attention: bool = False

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor | int]:
        input_ids = torch.from_numpy(np.stack([row.input_ids for row in rows]).astype(np.int64))
        batch = {"input_ids": input_ids, "labels": input_ids.clone()}
        if self.document_masking:
            batch["position_ids"] = restarting_positions(input_ids, self.eos_token_id)
        if self.document_masking and self.flash_attention:
            batch |= flash_arguments(batch["position_ids"])
        return batch


def flash_arguments(position_ids: torch.Tensor) -> dict[str, torch.Tensor | int]:
    """The arguments of flash attention's varlen kernel that keep documents separate.

    transformers 5.23 derives them from `position_ids` only in batches of one row; with more rows it silently attends
    over whole rows. The longest document is given as the row's length, an upper bound: a different number in each
    batch would make `torch.compile` recompile.
    """
    total = torch.tensor([position_ids.numel()])
    lengths = torch.cat([(position_ids.flatten() == 0).nonzero().flatten(), total]).to(torch.int32)
    longest = position_ids.shape[1]
    return {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": longest, "max_length_k": longest}


def restarting_positions(input_ids: torch.Tensor, eos_token_id: int) -> torch.Tensor:
    """Position of each token in its document, counted from the row's start or the last EOS before it. Shapes `[rows,
    block_size]`."""
    place = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    after_eos = torch.zeros_like(input_ids)
    after_eos[:, 1:] = torch.where(input_ids[:, :-1] == eos_token_id, place[:, 1:], 0)
    return place - after_eos.cummax(dim=1).values
