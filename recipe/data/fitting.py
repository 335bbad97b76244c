"""The default hold-out and number of lanes of a source, and the division of sources with few documents.

A source that can be dealt to the lanes and has whole documents to hold out stays as it is. Any other is read into
memory. Its hold-out is cut from the end of its text, and long documents are divided by position, so that lanes are
balanced: each piece is a document from then on.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from recipe.data.files import is_remote
from recipe.data.formats import BadDocument, Chunk, Content, TokenIds
from recipe.data.hold_out import HoldOutFilter, digest_of
from recipe.data.lanes import Split, pieces_of
from recipe.data.source import Source, counted
from recipe.errors import DataError, UserError

HOLD_OUT_START, HOLD_OUT_DOCUMENTS = 100_000, 1000
DOCSTRINGS_HOLD_OUT = 5000, 100  # the demo's reference was recorded with it
LAST_SHARE = 0.01
# Whole documents are held out, unless a source with fewer documents than this would lose more than twice what is
# wanted: 1 % of its text, or one block.
FEW_DOCUMENTS, TOO_MUCH = 1000, 2
# A source with fewer documents for each lane, and fewer bytes, is read to see whether every lane has text.
FEW_IN_A_LANE, READ_BYTES = 64, 1 << 26
NUM_LANES = 32
LANE_BLOCKS, LANE_PIECES = 16, 2  # text of a lane, at least; pieces that a document is divided into for it
WHOLE = 0.9  # a document of which more than this share is wanted is taken as a whole
LONG_TOKEN, LONG_WORD = 64, 100  # characters
AUTO = "auto"
AS_IT_FITS = "--eval_skip auto --eval_documents auto would do"


@dataclass(frozen=True)
class Wish:
    """What the config says about one source. `share`: its share of the rows. `count_tokens`: of one document."""

    train_skip: int
    eval_skip: int | str
    eval_documents: int | str
    num_lanes: int | str
    share: float
    block_size: int
    count_tokens: Callable[[Content], int]

    def count(self, content: Content) -> int:
        """Its tokens, or a lower bound, enough to compare with a block: 20 MB in one text take minutes."""
        return self.count_tokens(_slice(content, 0, LONG_TOKEN * self.block_size)) if len(content) else 0

    @property
    def is_auto(self) -> bool:
        return self.eval_skip == self.eval_documents == AUTO


@dataclass(frozen=True)
class Fitted:
    """A source with the hold-out `[eval_skip, eval_skip + eval_documents)`; `num_lanes` is what it can be dealt to."""

    source: Source
    train_skip: int
    eval_skip: int
    eval_documents: int
    num_lanes: int


def fit(source: Source, wish: Wish) -> Fitted:
    """Raises `UserError` for a source with too little text, or whose text is all the same."""
    if source.num_bytes <= LONG_TOKEN * 2 * wish.block_size:
        _check_amount(source, [content for chunk in source.chunks for content in source.read_chunk(chunk)], wish)
    num_lanes = NUM_LANES if wish.num_lanes == AUTO else int(wish.num_lanes)
    first, stop = hold_out_of(source, wish) or (0, 0)
    split = Split(0, start=wish.train_skip, hold_out=(first, stop))
    is_impossible = stop > source.num_documents or not any(map(split.admits_any, source.chunks))  # is reported later
    if stop and (is_impossible or _can_be_dealt(source, split, num_lanes)):
        return Fitted(source, wish.train_skip, first, stop - first, num_lanes)
    return _fit_small(source, wish, (first, stop))


def _can_be_dealt(source: Source, split: Split, num_lanes: int) -> bool:
    """Whether there are as many pieces as lanes, each with text to train on: documents may be empty, skipped since
    they cannot be read, or copies of held-out ones. Lanes of many documents, and of remote ones, are taken to have
    text; a failing read is reported by the training."""
    pieces = pieces_of(source, split, num_lanes)
    if len(pieces) < num_lanes:
        return False
    is_large = source.num_documents >= FEW_IN_A_LANE * num_lanes or source.num_bytes > READ_BYTES
    if is_large or any(is_remote(chunk.path) for chunk in source.chunks):
        return True
    try:
        contents = [content for chunk in source.chunks for content in source.read_chunk(chunk)]
    except DataError:
        return True
    copies = HoldOutFilter(contents[slice(*split.hold_out)])
    has_text = [len(content) > 0 and not copies.holds(content) for content in contents]
    return all(any(has_text[index] for index in split.documents_of(piece)) for piece in pieces)


# --- the hold-out


def hold_out_of(source: Source, wish: Wish) -> tuple[int, int] | None:
    """First document of the hold-out and the one after it; None where no whole documents suit."""
    skip, documents = wish.eval_skip, wish.eval_documents
    if source.name == "docstrings" and wish.is_auto:
        skip, documents = DOCSTRINGS_HOLD_OUT[0], math.ceil(DOCSTRINGS_HOLD_OUT[1] * wish.share)
    usual = math.ceil(HOLD_OUT_DOCUMENTS * wish.share) if documents == AUTO else documents
    if skip == AUTO:
        skip = HOLD_OUT_START
        if wish.is_auto and source.num_documents < skip + usual:
            return _last_documents(source, wish)
        skip = skip if source.num_documents >= skip + usual else max(0, source.num_documents - usual)
    if documents == AUTO:
        usual = max(1, min(usual, source.num_documents - skip))
    return skip, skip + usual


def _last_documents(source: Source, wish: Wish) -> tuple[int, int] | None:
    """The documents from 100,000 on, or the last 1 %; at least one block of tokens."""
    num_documents = source.num_documents
    wanted = max(num_documents - HOLD_OUT_START, 0) or math.ceil(LAST_SHARE * num_documents)
    tokens = size = count = 0
    for chunk in reversed(source.chunks):
        for content in reversed(source.read_chunk(chunk)):
            count += 1
            size += len(content)
            tokens += wish.count(content) if tokens <= TOO_MUCH * wish.block_size else 0
            is_large = size > TOO_MUCH * LAST_SHARE * source.num_bytes and tokens > TOO_MUCH * wish.block_size
            if num_documents < FEW_DOCUMENTS and is_large:
                return None
            if count >= wanted and tokens >= wish.block_size:
                return num_documents - count, num_documents
    return None


# --- small sources


def _fit_small(source: Source, wish: Wish, hold_out: tuple[int, int]) -> Fitted:
    contents = [content for chunk in source.chunks for content in source.read_chunk(chunk)]
    paths = [chunk.path for chunk in source.chunks for _ in range(chunk.num_documents)]
    num_documents = len(contents)
    if not any(map(len, contents)):
        raise UserError(f"source {source.name!r}: no text in {counted(num_documents, 'document')}")
    divided: list[Content] = []
    if not hold_out[1]:
        whole = contents
        contents, first = _cut_end(contents, wish)
        if len(contents) > num_documents:
            divided = whole[first - 1 : first]
            paths.insert(first, paths[first - 1])
        hold_out = first, len(contents)
    held = contents[slice(*hold_out)]
    tokens = sum(map(wish.count, held))
    if tokens < wish.block_size:
        raise UserError(
            f"source {source.name!r}: {counted(len(held), 'held-out document')} with {counted(tokens, 'token')}, less "
            f"than one block of {wish.block_size}; {AS_IT_FITS}"
        )
    copies = HoldOutFilter([*held, *divided])
    is_bad = [isinstance(content, BadDocument) for content in contents]  # to be counted, though others are held out
    train: list[Content] = [
        "" if copies.holds(content) and not bad else content for content, bad in zip(contents, is_bad, strict=True)
    ]
    train[: wish.train_skip] = [""] * min(wish.train_skip, len(train))
    train[slice(*hold_out)] = [""] * len(held)
    counted_length = sum(min(len(content), LONG_TOKEN * wish.block_size) for content in held)
    num_lanes, limit = _lanes_of(source, train, counted_length / tokens, wish)
    parts = [_divide(content, limit) for content in train]
    parts[slice(*hold_out)] = [[content] for content in held]
    starts = [0, *accumulate(map(len, parts))]
    pieces = [(path, part) for path, each in zip(paths, parts, strict=True) for part in each]
    chunks = [Chunk(path, 0, 1, _num_bytes(part), number) for number, (path, part) in enumerate(pieces)]
    small = replace(
        source,
        chunks=tuple(chunks),
        can_be_cut=False,
        contents=tuple(part for _, part in pieces),
        num_divided=num_documents,
    )
    first, stop = (starts[place] for place in hold_out)
    return Fitted(small, starts[min(wish.train_skip, len(parts))], first, stop - first, num_lanes)


def _check_amount(source: Source, contents: Sequence[Content], wish: Wish) -> None:
    """Raise `UserError` unless the text is enough for a block of the hold-out and one of training. What is repeated
    counts once: training skips copies of held-out documents."""
    tokens = sum(map(wish.count, {digest_of(content): content for content in contents}.values()))
    if 0 < tokens < 2 * wish.block_size:
        fits = 1 << max(0, (tokens // 3).bit_length() - 1)
        offsets = "" if wish.is_auto else " --eval_skip auto --eval_documents auto"
        raise UserError(
            f"source {source.name!r} has {tokens:,} tokens of different text, too few for a hold-out and training in "
            f"blocks of {wish.block_size}; "
            + (f"--block_size {fits}{offsets} would do" if fits >= 8 else "it needs more text")
        )


def _cut_end(contents: list[Content], wish: Wish) -> tuple[list[Content], int]:
    """The documents, the one in which the hold-out begins cut in two, and the first of the hold-out: the last 1 % of
    the text, or one block."""
    size, wanted, tokens = 0, LAST_SHARE * sum(map(len, contents)), 0
    for number in reversed(range(len(contents))):
        content = contents[number]
        end = _slice(content, max(0, len(content) - LONG_TOKEN * wish.block_size), None)
        count = wish.count(end)
        missing = max(0, wish.block_size - tokens)
        length = max(wanted - size, 1.05 * len(end) * missing / max(1, count))
        while length < WHOLE * len(content):
            cut = _word_end(content, len(content) - math.ceil(length))
            if wish.count(_slice(content, cut, None)) >= missing:
                halves = [_slice(content, 0, cut), _slice(content, cut, None)]
                return [*contents[:number], *halves, *contents[number + 1 :]], number + 1
            length *= 1.1
        size, tokens = size + len(content), tokens + count
        if size >= wanted and tokens >= wish.block_size:
            return contents, number
    return contents, 0


def _lanes_of(source: Source, train: Sequence[Content], token_length: float, wish: Wish) -> tuple[int, int]:
    """The number of lanes, and the greatest length of a document with which they are balanced."""
    total = sum(map(len, train))
    if not total:
        raise UserError(
            f"source {source.name!r}: no text to train on: every document from train_skip on is held out, empty or "
            "the same as a held-out one" + ("; --train_skip 0 would do" if wish.train_skip else "")
        )
    num_lanes = NUM_LANES if wish.num_lanes == AUTO else int(wish.num_lanes)
    while (
        wish.num_lanes == AUTO and num_lanes > 1 and total < num_lanes * LANE_BLOCKS * wish.block_size * token_length
    ):
        num_lanes //= 2
    limit = math.ceil(total / (LANE_PIECES * num_lanes)) if num_lanes > 1 else total
    if sum(len(_divide(text, limit)) for text in train if len(text)) < num_lanes:
        raise UserError(f"source {source.name!r} has too little text for {num_lanes} lanes; --num_lanes auto would do")
    return num_lanes, limit


def _divide(content: Content, limit: int) -> list[Content]:
    """Parts of nearly equal length, at most `limit` and a word."""
    count = max(1, math.ceil(len(content) / limit))
    cuts = [0, *(_word_end(content, len(content) * part // count) for part in range(1, count)), len(content)]
    parts = [_slice(content, start, stop) for start, stop in pairwise(cuts) if stop > start]
    return parts or [content]


def _word_end(content: Content, place: int) -> int:
    """The last end of a word before `place`; `place` itself where there is none near it, or in token ids."""
    if isinstance(content, TokenIds):
        return place
    return max(place, 1) if (end := content.rfind(" ", max(1, place - LONG_WORD), place)) < 0 else end


def _slice(content: Content, start: int, stop: int | None) -> Content:
    return TokenIds(content.ids[start:stop]) if isinstance(content, TokenIds) else content[start:stop]


def _num_bytes(content: Content) -> int:
    return len(content.encode()) if isinstance(content, str) else 4 * len(content)
