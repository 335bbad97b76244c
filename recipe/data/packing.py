"""Documents -> token ids with EOS between them -> fixed blocks. Nothing is dropped, padded or doubled."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

# Text handed to the tokenizer at once: little at first, so that the first row comes soon, then enough to keep its
# threads busy. Which documents share a call changes no token.
FIRST_TOKENIZE_BYTES, TOKENIZE_BYTES = 1 << 12, 1 << 18


class LaneState(TypedDict("LaneState", {"pass": int})):
    """Where a lane stands: the first token that it has not given out yet. JSON-able, read by people.

    `pass`: times it went through its documents; `chunk`, `document`: places in this pass's order; `token`: place in
    the document.
    """

    chunk: int
    document: int
    token: int


@dataclass(frozen=True)
class Document:
    """One text, its index in the source, and the lane's state when it is next to be read."""

    index: int
    text: str
    state: LaneState


@dataclass(frozen=True)
class Row:
    """One block of a lane.

    `input_ids`: int32 `[block_size]`. `documents`: indices of the documents it has tokens of. `state`: the lane's
    state after it. `lane` and `number` (its place in the canonical order) are set by the stream.
    """

    input_ids: np.ndarray
    documents: tuple[int, ...]
    state: LaneState
    lane: int = 0
    number: int = 0


def tokenize(documents: Iterable[Document], tokenizer) -> Iterator[tuple[Document, np.ndarray]]:
    """Each document with its token ids, int32, EOS at the end. Documents without any token give nothing, not even
    EOS."""
    for batch in _batches(documents):
        for document, ids in zip(batch, _encode([document.text for document in batch], tokenizer), strict=True):
            if ids:
                yield document, np.array([*ids, tokenizer.eos_token_id], dtype=np.int32)


def _encode(texts: list[str], tokenizer) -> list[list[int]]:
    # verbose=False: a document longer than model_max_length is what packing is for, not worth a warning.
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, size, limit = [], 0, FIRST_TOKENIZE_BYTES
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= limit:
            yield batch
            batch, size, limit = [], 0, min(2 * limit, TOKENIZE_BYTES)
    if batch:
        yield batch


def pack(documents: Iterable[tuple[Document, np.ndarray]], block_size: int, skip_tokens: int = 0) -> Iterator[Row]:
    """Cut the running text of one lane into blocks.

    A document goes on in the next block where it does not fit, so every token is in exactly one block. `skip_tokens`:
    tokens of the first document that an earlier run has given out. Tokens after the last whole block wait for more
    documents.

    With block_size 4, documents [5 6 2] and [7 8 9 2] (2 = EOS) and more to come:
    [5 6 2 7] with state {document 1, token 1}, then [8 9 2 ...].
    """
    block, filled, held = np.empty(block_size, dtype=np.int32), 0, []
    for document, ids in documents:
        start, skip_tokens = skip_tokens, 0
        while start < len(ids):
            taken = ids[start : start + block_size - filled]
            block[filled : filled + len(taken)] = taken
            start, filled = start + len(taken), filled + len(taken)
            held.append(document.index)
            if filled == block_size:
                yield Row(block, tuple(held), _state_after(document, start, len(ids)))
                block, filled, held = np.empty(block_size, dtype=np.int32), 0, []


def _state_after(document: Document, token: int, length: int) -> LaneState:
    if token < length:
        return {**document.state, "token": token}
    return {**document.state, "document": document.state["document"] + 1, "token": 0}
