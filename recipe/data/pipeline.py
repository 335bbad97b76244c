"""The whole pipeline of a run, built from its configuration."""

import hashlib
from dataclasses import dataclass

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from recipe.arguments import Config
from recipe.data.collator import DataCollatorForPackedRows
from recipe.data.loader import BatchLoader
from recipe.data.source import Source, open_source
from recipe.data.stream import HeldOutRows, RowStream, train_and_eval_splits
from recipe.errors import UserError


@dataclass(frozen=True)
class Data:
    """Everything on the data's way to the model."""

    source: Source
    tokenizer: PreTrainedTokenizerBase
    loader: BatchLoader
    collator: DataCollatorForPackedRows
    eval_rows: HeldOutRows
    identity: dict


def build_data(config: Config) -> Data:
    arguments, training = config.data, config.training
    source = open_source(arguments.source, arguments.text_column)
    tokenizer = load_tokenizer(config.model.tokenizer)
    train_split, eval_split = train_and_eval_splits(
        source,
        train_skip=arguments.train_skip,
        train_seed=arguments.train_seed,
        eval_skip=arguments.eval_skip,
        eval_seed=arguments.eval_seed,
        eval_documents=arguments.eval_documents,
    )
    stream = RowStream(
        source,
        train_split,
        tokenizer,
        arguments.block_size,
        arguments.num_lanes,
        rank=training.process_index,
        world_size=training.world_size,
    )
    collator = DataCollatorForPackedRows(tokenizer.eos_token_id, arguments.document_masking)
    loader = BatchLoader(stream, collator, training.per_device_train_batch_size, training.dataloader_num_workers)
    eval_rows = HeldOutRows(source, eval_split, tokenizer, arguments.block_size)
    return Data(source, tokenizer, loader, collator, eval_rows, identity_of(config, source, tokenizer))


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"tokenizer {name!r}: cannot be loaded ({str(error).strip().splitlines()[0]})") from error


def identity_of(config: Config, source: Source, tokenizer: PreTrainedTokenizerBase) -> dict:
    """What the canonical order depends on: a position in the stream means nothing where any of it differs."""
    keys = ("block_size", "train_seed", "train_skip", "eval_skip", "eval_documents", "num_lanes")
    vocabulary = repr(sorted(tokenizer.get_vocab().items())).encode()
    return {
        "source": source.name,
        "source_fingerprint": source.fingerprint,
        "tokenizer": hashlib.sha256(vocabulary).hexdigest()[:16],
        **{key: getattr(config.data, key) for key in keys},
    }


def unigram_entropy(rows: HeldOutRows) -> float:
    """Entropy of the eval tokens' own frequencies, nats: the loss of a model that knows nothing of context."""
    counts = np.bincount(np.concatenate([row.input_ids for row in rows.rows]))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
