"""The whole pipeline of a run, built from its configuration."""

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
from transformers import PreTrainedTokenizerBase

from recipe.arguments import Config, DataArguments
from recipe.data.collator import DataCollatorForPackedRows
from recipe.data.files import FileFacts, is_remote
from recipe.data.fitting import Wish, fit
from recipe.data.formats import Content
from recipe.data.hold_out import HoldOutFilter
from recipe.data.lanes import train_and_eval_splits
from recipe.data.loader import BatchLoader
from recipe.data.packing import encode, hash_of_tokenizer, load_tokenizer
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
    train_parts, eval_parts, num_lanes = build_parts(arguments, tokenizer, config.model.tokenizer)
    eval_rows = HeldOutRows(eval_parts, tokenizer, arguments.block_size)
    stream = RowStream(
        train_parts,
        tokenizer,
        arguments.block_size,
        num_lanes,
        rank=training.process_index,
        world_size=training.world_size,
        hold_out_filter=HoldOutFilter(eval_rows.contents, tokenizer.eos_token_id),
    )
    collator = DataCollatorForPackedRows(tokenizer.eos_token_id, arguments.document_masking, flash_attention)
    num_workers = training.dataloader_num_workers
    if arguments.num_lanes == "auto":  # a small source has few lanes
        num_workers = min(num_workers, num_lanes // training.world_size or num_workers)
    loader = BatchLoader(stream, collator, training.per_device_train_batch_size, num_workers)
    sources = tuple(part.source for part in train_parts)
    identity = identity_of(config, train_parts, num_lanes, tokenizer)
    return Data(sources, tokenizer, loader, collator, eval_rows, identity)


def build_parts(arguments: DataArguments, tokenizer, tokenizer_name: str) -> tuple[list[Part], list[Part], int]:
    """Train and eval parts, one of each for every source, and the number of lanes that all of them can be dealt to.

    Source k is shuffled with `train_seed + k`. Each source gives the mixture's share of `eval_documents` to the
    hold-out, rounded up, from its own `eval_skip`. `tokenizer_name`: for messages.
    """
    train_parts, eval_parts, num_lanes = [], [], []
    entries = arguments.sources
    total_weight = sum(entry.weight for entry in entries)
    for number, entry in enumerate(entries):
        source = open_source(entry.path, entry.text_column, arguments.on_bad_data)
        if source.tokenizer not in (None, hash_of_tokenizer(tokenizer)):
            raise UserError(
                f"source {entry.path!r} holds token ids of another tokenizer than {tokenizer_name}; name the "
                "one that made them, or write the cache again"
            )
        share, documents = entry.weight / total_weight, arguments.eval_documents
        wish = Wish(
            entry.train_skip,
            entry.eval_skip,
            documents if documents == "auto" else math.ceil(documents * share),
            arguments.num_lanes,
            share,
            arguments.block_size,
            count_tokens=lambda content: len(encode([content], tokenizer)[0]) + (len(content) > 0),
        )
        fitted = fit(source, wish)
        train, held_out = train_and_eval_splits(
            fitted.source,
            train_skip=fitted.train_skip,
            train_seed=arguments.train_seed + number,
            eval_skip=fitted.eval_skip,
            eval_seed=arguments.eval_seed + number,
            eval_documents=fitted.eval_documents,
        )
        train_parts.append(Part(fitted.source, train, entry.weight))
        eval_parts.append(Part(fitted.source, held_out))
        num_lanes.append(fitted.num_lanes)
    _check_apart([part.source for part in train_parts])
    return train_parts, eval_parts, min(num_lanes)


def _check_apart(sources: list[Source]) -> None:
    """A file in two sources would silently be read twice, and be hold-out in one and training data in the other."""
    owner: dict[tuple[str, str], Source] = {}
    for source in sources:
        for file in source.files:
            path = file.path if is_remote(file.path) else os.path.realpath(file.path.removeprefix("file://"))
            key = path, file.content  # a token cache knows a URL without its query
            if key in owner:
                both = f"in {owner[key].name!r} and in {source.name!r}" if owner[key] is not source else "there"
                raise UserError(f"source {source.name!r}: {path} is named twice, {both}; name it once")
            owner[key] = source


def identity_of(config: Config, parts: list[Part], num_lanes: int, tokenizer: PreTrainedTokenizerBase) -> dict:
    """Everything that the canonical order depends on: if any of it differs, a position in the stream is meaningless.

    A file is identified by name, size and content, not by its folder; `modified` is for people.
    """
    identity: dict = {name: getattr(config.data, name) for name in ("train_seed", "block_size")}
    identity |= {"num_lanes": num_lanes, "tokenizer": hash_of_tokenizer(tokenizer)}
    for number, part in enumerate(parts):
        first, stop = part.split.hold_out
        identity[f"source {number}"] = {
            "train_skip": part.split.start,
            "eval_skip": first,
            "eval_documents": stop - first,
            "weight": part.weight,
            "text_column": part.source.text_column,
            "fingerprint": part.source.fingerprint,
            **({"pieces": _hash_of(part.source.contents)} if part.source.contents else {}),
            "files": dict(zip(_short_names(part.source), map(_version_of, part.source.files), strict=True)),
        }
    return identity


def _short_names(source: Source) -> list[str]:
    """The files' paths without the folders that all of them are in."""
    paths = [redact(file.path).split("/") for file in source.files]
    folders = [path[:-1] for path in paths]
    common = sum(1 for _ in takewhile(lambda names: len(set(names)) == 1, zip(*folders, strict=False)))
    return ["/".join(path[common:]) for path in paths]


def _hash_of(contents: Sequence[Content]) -> str:
    """Differs for token ids and their text, which are divided at other places."""
    lengths = [(type(content).__name__, len(content)) for content in contents]
    return hashlib.sha256(repr(lengths).encode()).hexdigest()[:16]


def _version_of(file: FileFacts) -> dict:
    return {"bytes": file.num_bytes, "content": file.content, "modified": file.modified}


def unigram_entropy(rows: HeldOutRows) -> float:
    """Entropy of the eval tokens' own frequencies, nats: the loss of a model that ignores context."""
    counts = np.bincount(np.concatenate([row.input_ids for row in rows.rows]))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
