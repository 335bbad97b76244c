"""The whole pipeline of a run, built from its configuration."""

import math
import os
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
from transformers import PreTrainedTokenizerBase

from recipe.arguments import Config
from recipe.data.collator import DataCollatorForPackedRows
from recipe.data.files import FileFacts, is_remote
from recipe.data.hold_out import HoldOutFilter
from recipe.data.lanes import train_and_eval_splits
from recipe.data.loader import BatchLoader
from recipe.data.packing import hash_of_tokenizer, load_tokenizer
from recipe.data.source import Source, open_source
from recipe.data.stream import HeldOutRows, Part, RowStream
from recipe.errors import UserError
from recipe.redact import redact


@dataclass(frozen=True)
class Data:
    """The data pipeline of a run."""

    sources: tuple[Source, ...]
    tokenizer: PreTrainedTokenizerBase
    loader: BatchLoader
    collator: DataCollatorForPackedRows
    eval_rows: HeldOutRows
    identity: dict


def build_data(config: Config, flash_attention: bool = False) -> Data:
    """`flash_attention`: whether the model uses that kernel, see `DataCollatorForPackedRows`."""
    arguments, training = config.data, config.training
    tokenizer = load_tokenizer(config.model.tokenizer)
    train_parts, eval_parts = build_parts(config, tokenizer)
    eval_rows = HeldOutRows(eval_parts, tokenizer, arguments.block_size)
    stream = RowStream(
        train_parts,
        tokenizer,
        arguments.block_size,
        arguments.num_lanes,
        rank=training.process_index,
        world_size=training.world_size,
        hold_out_filter=HoldOutFilter(eval_rows.contents, tokenizer.eos_token_id),
    )
    collator = DataCollatorForPackedRows(tokenizer.eos_token_id, arguments.document_masking, flash_attention)
    loader = BatchLoader(stream, collator, training.per_device_train_batch_size, training.dataloader_num_workers)
    sources = tuple(part.source for part in train_parts)
    return Data(sources, tokenizer, loader, collator, eval_rows, identity_of(config, train_parts, tokenizer))


def build_parts(config: Config, tokenizer) -> tuple[list[Part], list[Part]]:
    """Train and eval parts, one of each for every source.

    Source k is shuffled with `train_seed + k`. Each source gives the mixture's share of `eval_documents` to the
    hold-out, rounded up, from its own `eval_skip`.
    """
    arguments, train_parts, eval_parts = config.data, [], []
    entries = arguments.sources
    total_weight = sum(entry.weight for entry in entries)
    for number, entry in enumerate(entries):
        source = open_source(entry.path, entry.text_column, arguments.on_bad_data)
        if source.tokenizer not in (None, hash_of_tokenizer(tokenizer)):
            raise UserError(
                f"source {entry.path!r} holds token ids of another tokenizer than {config.model.tokenizer}; name the "
                "one that made them, or write the cache again"
            )
        train, held_out = train_and_eval_splits(
            source,
            train_skip=entry.train_skip,
            train_seed=arguments.train_seed + number,
            eval_skip=entry.eval_skip,
            eval_seed=arguments.eval_seed + number,
            eval_documents=math.ceil(arguments.eval_documents * entry.weight / total_weight),
        )
        train_parts.append(Part(source, train, entry.weight))
        eval_parts.append(Part(source, held_out))
    _check_apart([part.source for part in train_parts])
    return train_parts, eval_parts


def _check_apart(sources: list[Source]) -> None:
    """A file in two sources would silently be read twice, and be hold-out in one and training data in the other."""
    owner: dict[str, Source] = {}
    for source in sources:
        for file in source.files:
            path = file.path if is_remote(file.path) else os.path.realpath(file.path.removeprefix("file://"))
            if path in owner:
                both = f"in {owner[path].name!r} and in {source.name!r}" if owner[path] is not source else "there"
                raise UserError(f"source {source.name!r}: {path} is named twice, {both}; name it once")
            owner[path] = source


def identity_of(config: Config, parts: list[Part], tokenizer: PreTrainedTokenizerBase) -> dict:
    """Everything that the canonical order depends on: if any of it differs, a position in the stream is meaningless.

    A file is identified by name, size and content, not by its folder; `modified` is for people.
    """
    identity: dict = {name: getattr(config.data, name) for name in ("train_seed", "block_size", "num_lanes")}
    identity["tokenizer"] = hash_of_tokenizer(tokenizer)
    for number, part in enumerate(parts):
        first, stop = part.split.hold_out
        identity[f"source {number}"] = {
            "train_skip": part.split.start,
            "eval_skip": first,
            "eval_documents": stop - first,
            "weight": part.weight,
            "text_column": part.source.text_column,
            "fingerprint": part.source.fingerprint,
            "files": dict(zip(_short_names(part.source), map(_version_of, part.source.files), strict=True)),
        }
    return identity


def _short_names(source: Source) -> list[str]:
    """The files' paths without the folders that all of them are in."""
    paths = [redact(file.path).split("/") for file in source.files]
    folders = [path[:-1] for path in paths]
    common = sum(1 for _ in takewhile(lambda names: len(set(names)) == 1, zip(*folders, strict=False)))
    return ["/".join(path[common:]) for path in paths]


def _version_of(file: FileFacts) -> dict:
    return {"bytes": file.num_bytes, "content": file.content, "modified": file.modified}


def unigram_entropy(rows: HeldOutRows) -> float:
    """Entropy of the eval tokens' own frequencies, nats: the loss of a model that ignores context."""
    counts = np.bincount(np.concatenate([row.input_ids for row in rows.rows]))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
