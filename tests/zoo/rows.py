"""Documents -> the rows of a dataset, and what makes a batch of them."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from transformers import DataCollatorWithFlattening, default_data_collator

from tests.zoo.models import PAD, eos_of
from tests.zoo.setting import Setting
from tests.zoo.texts import token_documents

IGNORED = -100
EVAL_ROWS = 24

Rows = list[dict[str, torch.Tensor]]


def make_rows(setting: Setting, is_eval: bool = False) -> Rows:
    """`input_ids`, `labels` (unshifted) and what the kind of rows needs more, int64 `[block]` each."""
    count = EVAL_ROWS if is_eval else setting.num_rows
    documents = token_documents(setting, is_eval)
    if setting.rows in ("packed", "documents"):
        blocks = _blocks(documents, count, setting)
        make = _packed if setting.rows == "packed" else _isolated
        return [make(block, eos_of(setting.vocabulary)) for block in blocks]
    pieces = _pieces(documents, setting, count)
    if setting.rows == "flattened":
        return [{"input_ids": piece.tolist()} for piece in pieces]
    return [_padded(piece, setting) for piece in pieces]


def _blocks(documents: Iterator[np.ndarray], count: int, setting: Setting) -> torch.Tensor:
    eos, parts, size = eos_of(setting.vocabulary), [], 0
    while size < count * setting.block:
        document = next(documents, None)
        if document is None:
            raise ValueError(f"{setting.text} is too short for {count} rows of {setting.block}; raise passes")
        parts += [document, [eos]]
        size += len(document) + 1
    ids = np.concatenate(parts)[: count * setting.block].reshape(count, setting.block)
    return torch.from_numpy(ids.astype(np.int64))


def _pieces(documents: Iterator[np.ndarray], setting: Setting, count: int) -> Iterator[np.ndarray]:
    """`count` pieces of uneven length, at most a block with its EOS."""
    generator = np.random.default_rng(setting.seed)
    for document in documents:
        while len(document) >= 24:
            length = min(len(document), int(generator.integers(setting.block // 3, setting.block)))
            yield np.append(document[:length], eos_of(setting.vocabulary)).astype(np.int64)
            document, count = document[length:], count - 1
            if not count:
                return
    raise ValueError(f"{setting.text} is too short: {count} rows are missing; raise passes")


def _packed(ids: torch.Tensor, eos: int) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "labels": ids.clone()}


def _isolated(ids: torch.Tensor, eos: int) -> dict[str, torch.Tensor]:
    """As the recipe's collator has it: positions start again after each EOS."""
    place = torch.arange(len(ids))
    starts = torch.zeros_like(place)
    starts[1:] = torch.where(ids[:-1] == eos, place[1:], 0)
    return {"input_ids": ids, "labels": ids.clone(), "position_ids": place - starts.cummax(0).values}


def _padded(ids: np.ndarray, setting: Setting) -> dict[str, torch.Tensor]:
    padding = setting.block - len(ids)
    input_ids = torch.from_numpy(np.pad(ids, (0, padding), constant_values=PAD))
    mask = (torch.arange(setting.block) < len(ids)).long()
    labels = torch.where(mask.bool(), input_ids, IGNORED)
    row = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
    if setting.rows == "prompts":
        labels[: prompt_lengths(row)] = IGNORED
    return row


def prompt_lengths(rows: dict[str, torch.Tensor]):
    """Of a row of the kind `prompts`, or a batch of them: the first third of its text."""
    return (rows["attention_mask"].sum(-1) // 3).tolist()


def make_collator(setting: Setting):
    return DataCollatorWithFlattening() if setting.rows == "flattened" else default_data_collator


class RowStream(IterableDataset):
    """The rows once, in order, dealt to workers; accelerate deals them to ranks."""

    def __init__(self, rows: Rows):
        self.rows = rows

    def __iter__(self):
        worker = get_worker_info()
        return iter(self.rows[worker.id :: worker.num_workers] if worker else self.rows)
