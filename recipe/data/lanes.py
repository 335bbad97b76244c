"""Documents of one source -> lanes: skip, hold-out, shuffle, endless passes.

Each source's chunks are dealt to a fixed number of lanes. A lane reads its own chunks endlessly, in a new order
in each pass; its state is four numbers.
"""

import hashlib
import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from recipe.data.formats import BadDocument, Chunk
from recipe.data.hold_out import HoldOutFilter
from recipe.data.packing import Document, LaneState
from recipe.data.source import Source, counted, cut_chunks
from recipe.errors import UserError


@dataclass(frozen=True)
class Split:
    """Which documents a stream may read: those from `start` on, before `stop` if given, outside `hold_out` if given;
    and its seed."""

    seed: int
    start: int = 0
    stop: int | None = None
    hold_out: tuple[int, int] | None = None

    def ranges_in(self, chunk: Chunk) -> list[range]:
        """The chunk's documents that may be read: at most two ranges, before and after the hold-out."""
        first = max(self.start, chunk.first_document)
        stop = min(chunk.stop_document, chunk.stop_document if self.stop is None else self.stop)
        out_first, out_stop = self.hold_out or (stop, stop)
        ranges = range(first, min(stop, out_first)), range(max(first, out_stop), stop)
        return [documents for documents in ranges if documents]

    def admits_any(self, chunk: Chunk) -> bool:
        return bool(self.ranges_in(chunk))

    def documents_of(self, chunk: Chunk) -> list[int]:
        return [index for documents in self.ranges_in(chunk) for index in documents]


def train_and_eval_splits(
    source: Source, *, train_skip: int, train_seed: int, eval_skip: int, eval_seed: int, eval_documents: int
) -> tuple[Split, Split]:
    """The two splits of a run. Different offsets alone do not separate them: train skips the hold-out, wherever it
    starts.

    Raises `UserError` where the source is too short for them.
    """
    stop = eval_skip + eval_documents
    if stop > source.num_documents:
        raise UserError(
            f"eval_skip {eval_skip:,} + eval_documents {eval_documents:,} reaches past the end of the source "
            f"{source.name!r}, which has {counted(source.num_documents, 'document')}; --eval_skip auto "
            "--eval_documents auto would do"
        )
    train = Split(train_seed, start=train_skip, hold_out=(eval_skip, stop))
    if not any(train.admits_any(chunk) for chunk in source.chunks):
        raise UserError(
            f"train_skip {train_skip:,} and the hold-out {eval_skip:,} to {stop - 1:,} leave no document to train on; "
            f"the source {source.name!r} has {counted(source.num_documents, 'document')}; --train_skip 0 "
            "--eval_skip auto --eval_documents auto would do"
        )
    return train, Split(eval_seed, start=eval_skip, stop=stop)


def shuffled(items: list, *key) -> list:
    """`items` in an order that depends only on `key`, not on the process or any library's generator."""
    prefix = "/".join(map(str, key)).encode()
    digests = [hashlib.blake2b(b"%s/%d" % (prefix, i), digest_size=8).digest() for i in range(len(items))]
    return [items[i] for i in sorted(range(len(items)), key=digests.__getitem__)]


def pieces_of(source: Source, split: Split, num_lanes: int) -> list[Chunk]:
    """The chunks that can be dealt to so many lanes, if there are as many."""
    chunks = [chunk for chunk in source.chunks if split.admits_any(chunk)]
    if source.can_be_cut and chunks:  # pieces of other formats are already small
        chunks = [chunk for chunk in cut_chunks(chunks, at_least=4 * num_lanes) if split.admits_any(chunk)]
    return chunks


def deal_chunks(source: Source, split: Split, num_lanes: int) -> list[list[Chunk]]:
    """Chunks of the split for each lane, so that lanes hold nearly equal bytes and wrap at nearly the same time.

    Raises `UserError` where there are fewer chunks than lanes.
    """
    chunks = pieces_of(source, split, num_lanes)
    if len(chunks) < num_lanes:
        raise UserError(
            f"source {source.name!r} can be read in {len(chunks)} pieces, too few for {num_lanes} lanes; "
            "--num_lanes auto would do"
        )
    lanes = [(0, lane) for lane in range(num_lanes)]
    dealt: list[list[Chunk]] = [[] for _ in range(num_lanes)]
    for chunk in sorted(shuffled(chunks, split.seed, "deal"), key=lambda chunk: -chunk.num_bytes):
        size, lane = heapq.heappop(lanes)
        dealt[lane].append(chunk)
        heapq.heappush(lanes, (size + chunk.num_bytes, lane))
    return dealt


def read_lane(
    source: Source,
    chunks: list[Chunk],
    split: Split,
    lane: int,
    state: LaneState,
    hold_out_filter: HoldOutFilter | None = None,
) -> Iterator[Document]:
    """The lane's documents from `state` on, endlessly: chunks shuffled in each pass, documents shuffled in each chunk.

    Documents that equal a held-out one are skipped, and those that cannot be read, which are counted in the state and
    named in the next one.
    Raises `UserError` after a whole pass without text, which would otherwise never end.
    """
    state, bad, skipped = dict(state), state.get("bad", 0), []
    while True:
        is_whole_pass, has_text = state["chunk"] == state["document"] == 0, False
        order = shuffled(chunks, split.seed, lane, state["pass"])
        for position in range(state["chunk"], len(order)):
            chunk = order[position]
            contents = source.read_chunk(chunk)
            indices = shuffled(split.documents_of(chunk), split.seed, lane, state["pass"], chunk.first_document)
            for place in range(state["document"], len(indices)):
                here = {"pass": state["pass"], "chunk": position, "document": place, "token": 0}
                content = contents[indices[place] - chunk.first_document]
                if isinstance(content, BadDocument):
                    bad += 1
                    skipped.append(content.reason)
                    continue
                if bad:
                    here["bad"] = bad
                if hold_out_filter is None or not hold_out_filter.holds(content):
                    has_text = has_text or len(content) > 0
                    yield Document(indices[place], content, here, tuple(skipped))
                    skipped.clear()
            state["document"] = 0
        if is_whole_pass and not has_text:
            count = sum(len(split.documents_of(chunk)) for chunk in chunks)
            raise UserError(
                f"source {source.name!r}: lane {lane} cannot continue, none of its {count} documents has text"
                + (" that differs from the held-out ones" if hold_out_filter else "")
            )
        state = {"pass": state["pass"] + 1, "chunk": 0, "document": 0}


def start_of_lane() -> LaneState:
    return {"pass": 0, "chunk": 0, "document": 0, "token": 0}
