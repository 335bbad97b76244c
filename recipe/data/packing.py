"""Documents -> token ids with EOS between them -> fixed blocks. Nothing is dropped, padded or doubled."""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple, NotRequired, TypedDict

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from recipe.data.formats import Content
from recipe.errors import DataError, UserError
from recipe.hub import why_not_loaded, why_unreachable
from recipe.internals import cache_no_texts

# Text handed to the tokenizer at once: little at first, so that the first row comes soon, then enough to keep its
# threads busy. How documents are grouped does not change any token.
FIRST_TOKENIZE_BYTES, TOKENIZE_BYTES = 1 << 12, 1 << 18
# A tokenizer takes about 100 bytes of memory for each character of a text. Longer texts are tokenized in parts of this
# many characters, cut between two words where the characters beside the cut show that it changes no token.
PART_CHARS, BESIDE_CUT, CUTS_TRIED = 1 << 20, 200, 50
BETWEEN_WORDS = re.compile(r"(?<=\w) (?=\w)|(?<=\S)(?=\n)")


class LaneState(TypedDict("LaneState", {"pass": int})):
    """The position of a lane in one source: the first token that it has not returned yet. JSON-able and readable.

    `pass`: completed passes over its documents; `chunk`, `document`: positions in this pass's order; `token`: position
    in the document. `bad`: documents skipped so far since they cannot be read, where there were any.
    """

    chunk: int
    document: int
    token: int
    bad: NotRequired[int]


@dataclass(frozen=True)
class Document:
    """One text (or its token ids), its index in its source, and the lane's state before it is read. `skipped`: why
    each of the documents directly before it cannot be read."""

    index: int
    content: Content
    state: LaneState
    skipped: tuple[str, ...] = ()


class Piece(NamedTuple):
    """The tokens in a row that come from one document."""

    document: int  # index in the source
    pass_number: int  # from 0
    first_token: int  # position in the document
    num_tokens: int


@dataclass(frozen=True)
class Row:
    """One block of a lane.

    `input_ids`: int32 `[block_size]`. `pieces`: its parts in order, from the source number `source`.
    `state`: the lane's state in that source after it. `source`, `lane` and `number` (its position in the
    canonical order) are set by the stream. `skipped`: of the documents that begin in it.
    """

    input_ids: np.ndarray
    pieces: tuple[Piece, ...]
    state: LaneState
    source: int = 0
    lane: int = 0
    number: int = 0
    skipped: tuple[str, ...] = ()

    @property
    def documents(self) -> list[int]:
        return [piece.document for piece in self.pieces]


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        if not os.path.isdir(name):
            why_unreachable()
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        fix = "name a folder that holds one; --tokenizer tokenizer/llama-32k would do for a new model"
        raise UserError(f"tokenizer {name!r}: {why_not_loaded(name, error)}; {fix}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {name!r} has no eos_token, which separates documents; set one and save it again")
    return tokenizer


def tokenize(documents: Iterable[Document], tokenizer, source_name: str = "") -> Iterator[tuple[Document, np.ndarray]]:
    """Each document with its token ids, int32, EOS at the end. Documents without tokens are skipped; a
    document that ends with EOS gets no second one.

    Raises `DataError` for a token id that the tokenizer does not have.
    """
    eos, vocab_size, skipped = np.int32(tokenizer.eos_token_id), len(tokenizer), ()
    for batch in _batches(documents):
        for document, ids in zip(batch, encode([document.content for document in batch], tokenizer), strict=True):
            skipped += document.skipped
            if not len(ids):
                continue
            if not 0 <= ids.min() <= ids.max() < vocab_size:
                raise DataError(
                    f"source {source_name!r}: document {document.index} has token ids from {ids.min()} to "
                    f"{ids.max()}, but the tokenizer has {vocab_size}; name the tokenizer that made them"
                )
            named = document if document.skipped == skipped else replace(document, skipped=skipped)
            yield named, ids if ids[-1] == eos else np.append(ids, eos)
            skipped = ()


def encode(contents: Sequence[Content], tokenizer) -> list[np.ndarray]:
    """Token ids of each text, int32, without special tokens; token ids are returned unchanged.

    Calls the tokenizers library directly: transformers would also compute unused offsets and masks, in twice the time.
    `split_special_tokens` is a setting that transformers passes on in each call.
    """
    if tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer
        backend.encode_special_tokens = tokenizer.split_special_tokens
        cache_no_texts(backend)
        backend.no_truncation()
        backend.no_padding()

    def encode_texts(texts: list[str]) -> list[list[int]]:
        if tokenizer.is_fast:
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    texts = [content for content in contents if isinstance(content, str)]
    short = iter(encode_texts([text for text in texts if len(text) <= PART_CHARS]))
    encoded = (next(short) if len(text) <= PART_CHARS else _encode_parts(text, encode_texts) for text in texts)
    # A list of Python's numbers takes nine times the memory, and each lane holds what is tokenized at once.
    ids = (next(encoded) if isinstance(content, str) else content.ids for content in contents)
    return [np.asarray(each, dtype=np.int32) for each in ids]


def _encode_parts(text: str, encode_texts: Callable[[list[str]], list[list[int]]]) -> np.ndarray:
    parts, start = [], 0
    while start < len(text):
        stop = _place_to_cut(text, start + PART_CHARS, encode_texts)
        parts.append(np.array(encode_texts([text[start:stop]])[0], dtype=np.int32))
        start = stop
    return np.concatenate(parts)


def _place_to_cut(text: str, start: int, encode_texts: Callable[[list[str]], list[list[int]]]) -> int:
    """The first place from `start` on that changes no token; `start` itself where there is none near."""
    for match in islice(BETWEEN_WORDS.finditer(text, start, start + PART_CHARS), CUTS_TRIED):
        left, right = (
            text[match.start() - BESIDE_CUT : match.start()],
            text[match.start() : match.start() + BESIDE_CUT],
        )
        whole, *halves = encode_texts([left + right, left, right])
        if whole == halves[0] + halves[1]:
            return match.start()
    return start


def hash_of_tokenizer(tokenizer) -> str:
    """A hash of the vocabulary, and of how a text full of special cases is tokenized."""
    probe = (
        "It's 1,234.5 x²  \tﬁne\r\n\n    if (a != b): Ünïcode ÉCOLE 你好 🤗 e\u0301 </s><s>[UNK] don't re-run://x_y "
    )
    facts = [sorted(tokenizer.get_vocab().items()), encode([probe], tokenizer)[0].tolist()]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents to tokenize together, of one pass each, so that a small source is not read ahead many times."""
    batch, size, limit = [], 0, FIRST_TOKENIZE_BYTES
    for document in documents:
        if batch and document.state["pass"] != batch[0].state["pass"]:
            yield batch
            batch, size = [], 0
        batch.append(document)
        size += len(document.content)
        if size >= limit:
            yield batch
            batch, size, limit = [], 0, min(2 * limit, TOKENIZE_BYTES)
    if batch:
        yield batch


def pack(documents: Iterable[tuple[Document, np.ndarray]], block_size: int, skip_tokens: int = 0) -> Iterator[Row]:
    """Cut the running text of one lane into blocks.

    A document that does not fit continues in the next block, so every token is in exactly one block. `skip_tokens`:
    tokens of the first document that an earlier run has already used. Tokens after the last whole block wait for more
    documents.

    With block_size 4, documents [5 6 2] and [7 8 9 2] (2 = EOS) and more to come:
    [5 6 2 7] with state {document 1, token 1}, then [8 9 2 ...].
    """
    block, filled, held, skipped = np.empty(block_size, dtype=np.int32), 0, [], ()
    for document, ids in documents:
        start, skip_tokens, skipped = skip_tokens, 0, skipped + document.skipped
        while start < len(ids):
            taken = ids[start : start + block_size - filled]
            block[filled : filled + len(taken)] = taken
            held.append(Piece(document.index, document.state["pass"], start, len(taken)))
            start, filled = start + len(taken), filled + len(taken)
            if filled == block_size:
                yield Row(block, tuple(held), _state_after(document, start, len(ids)), skipped=skipped)
                block, filled, held, skipped = np.empty(block_size, dtype=np.int32), 0, [], ()


def _state_after(document: Document, token: int, length: int) -> LaneState:
    if token < length:
        return {**document.state, "token": token}
    return {**document.state, "document": document.state["document"] + 1, "token": 0}
