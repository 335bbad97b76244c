"""Documents -> one endless canonical order of rows, the same for any number of ranks and workers, resumable in O(1).

The source's chunks are dealt to a fixed number of lanes. A lane goes through its own chunks for ever, in a new order
in each pass, and packs its own blocks. Row g of the run comes from lane `g % num_lanes`; rank `g % world_size` trains
on it; one worker of that rank reads it. So which process reads a row changes nothing about the row.
"""

import hashlib
import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from recipe.data.packing import Document, LaneState, Row, pack, tokenize
from recipe.data.source import Chunk, Source, cut_chunks
from recipe.errors import UserError


@dataclass(frozen=True)
class Split:
    """Which documents a stream may read: those from `start` on, before `stop` if given, outside `hold_out` if given;
    and its seed."""

    seed: int
    start: int = 0
    stop: int | None = None
    hold_out: tuple[int, int] | None = None

    def admits(self, index: int) -> bool:
        if index < self.start or (self.stop is not None and index >= self.stop):
            return False
        return self.hold_out is None or not self.hold_out[0] <= index < self.hold_out[1]

    def documents_of(self, chunk: Chunk) -> list[int]:
        return [index for index in range(chunk.first_document, chunk.stop_document) if self.admits(index)]


def train_and_eval_splits(
    source: Source, *, train_skip: int, train_seed: int, eval_skip: int, eval_seed: int, eval_documents: int
) -> tuple[Split, Split]:
    """The two splits of a run. Different offsets alone do not keep them apart: train steps over the hold-out, wherever
    it starts.

    Raises `UserError` where the source is too short for them, with its length and an offset that would do.
    """
    stop = eval_skip + eval_documents
    if stop > source.num_documents:
        documents = min(eval_documents, max(1, source.num_documents // 20))
        raise UserError(
            f"eval_skip {eval_skip:,} + eval_documents {eval_documents:,} reaches "
            "past the end of the source, which has "
            f"{source.num_documents:,} documents; --eval_skip {source.num_documents - documents} "
            f"--eval_documents {documents} would do"
        )
    train = Split(train_seed, start=train_skip, hold_out=(eval_skip, stop))
    if not any(train.documents_of(chunk) for chunk in source.chunks):
        raise UserError(
            f"train_skip {train_skip:,} and the hold-out {eval_skip:,} to {stop - 1:,} leave no document to train on; "
            f"the source has {source.num_documents:,} documents"
        )
    return train, Split(eval_seed, start=eval_skip, stop=stop)


def shuffled(items: list, *key) -> list:
    """`items` in an order that depends on `key` alone: not on the process, and not on any library's generator."""
    prefix = "/".join(map(str, key)).encode()
    digests = [hashlib.blake2b(b"%s/%d" % (prefix, i), digest_size=8).digest() for i in range(len(items))]
    return [items[i] for i in sorted(range(len(items)), key=digests.__getitem__)]


def deal_chunks(source: Source, split: Split, num_lanes: int) -> list[list[Chunk]]:
    """Chunks of the split for each lane, so that lanes hold nearly equal bytes and wrap at nearly the same time.

    Raises `UserError` where there are fewer documents than lanes.
    """
    source = cut_chunks(source, at_least=4 * num_lanes)
    chunks = [chunk for chunk in source.chunks if split.documents_of(chunk)]
    if len(chunks) < num_lanes:
        fits = 1 << (len(chunks).bit_length() - 1)
        raise UserError(
            f"source {source.name!r} can be read in {len(chunks)} pieces, too few for "
            f"{num_lanes} lanes; --num_lanes {fits} would do"
        )
    lanes = [(0, lane) for lane in range(num_lanes)]
    dealt: list[list[Chunk]] = [[] for _ in range(num_lanes)]
    for chunk in sorted(shuffled(chunks, split.seed, "deal"), key=lambda chunk: -chunk.num_bytes):
        size, lane = heapq.heappop(lanes)
        dealt[lane].append(chunk)
        heapq.heappush(lanes, (size + chunk.num_bytes, lane))
    return dealt


def read_lane(source: Source, chunks: list[Chunk], split: Split, lane: int, state: LaneState) -> Iterator[Document]:
    """The lane's documents from `state` on, for ever: chunks shuffled in each pass, documents shuffled in each chunk.

    Raises `UserError` after a whole pass without text, which would otherwise go on for ever.
    """
    state = dict(state)
    while True:
        is_whole_pass, has_text = state["chunk"] == state["document"] == 0, False
        order = shuffled(chunks, split.seed, lane, state["pass"])
        for position in range(state["chunk"], len(order)):
            chunk = order[position]
            texts = source.read_chunk(chunk)
            indices = shuffled(split.documents_of(chunk), split.seed, lane, state["pass"], chunk.first_document)
            for place in range(state["document"], len(indices)):
                here = {"pass": state["pass"], "chunk": position, "document": place, "token": 0}
                text = texts[indices[place] - chunk.first_document]
                has_text = has_text or bool(text)
                yield Document(indices[place], text, here)
            state["document"] = 0
        if is_whole_pass and not has_text:
            count = sum(len(split.documents_of(chunk)) for chunk in chunks)
            raise UserError(
                f"source {source.name!r}: lane {lane} cannot go on, not one of its {count} documents holds text"
            )
        state = {"pass": state["pass"] + 1, "chunk": 0, "document": 0}


def start_of_lane() -> LaneState:
    return {"pass": 0, "chunk": 0, "document": 0, "token": 0}


class RowStream(torch.utils.data.IterableDataset):
    """The rows that one rank trains on, in canonical order, for ever; in a DataLoader worker, that worker's share of
    them.

    Yields `Row`s. `position` is `{"rows": rows of the whole run given out so far, "lanes": [LaneState of each lane]}`;
    `rows` must be a multiple of `world_size`. Use a DataLoader with `batch_size=None`: it takes one row from each
    worker in turn, which restores the order. Raises `UserError` where ranks times workers do not divide the lanes.
    """

    def __init__(
        self,
        source: Source,
        split: Split,
        tokenizer,
        block_size: int,
        num_lanes: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.source = source
        self.split = split
        self.tokenizer = tokenizer
        self.block_size = block_size
        self.num_lanes = num_lanes
        self.rank = rank
        self.world_size = world_size
        self.lanes = deal_chunks(source, split, num_lanes)
        self.position = {"rows": 0, "lanes": [start_of_lane() for _ in range(num_lanes)]}

    def __iter__(self) -> Iterator[Row]:
        info = torch.utils.data.get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        check_division(self.num_lanes, self.world_size, num_workers)
        open_lanes: dict[int, Iterator[Row]] = {}
        number = self.position["rows"] + self.rank + self.world_size * worker
        while True:
            lane = number % self.num_lanes
            if lane not in open_lanes:
                open_lanes[lane] = self._rows_of(lane)
            yield replace(next(open_lanes[lane]), lane=lane, number=number)
            number += self.world_size * num_workers

    def _rows_of(self, lane: int) -> Iterator[Row]:
        state = self.position["lanes"][lane]
        documents = read_lane(self.source, self.lanes[lane], self.split, lane, state)
        return pack(tokenize(documents, self.tokenizer), self.block_size, skip_tokens=state["token"])


def check_division(num_lanes: int, world_size: int, num_workers: int) -> None:
    """Raise `UserError` unless every lane can belong to one worker of one rank."""
    readers = world_size * max(1, num_workers)
    if num_lanes % readers:
        fits = [n for n in range(1, num_lanes // world_size + 1) if num_lanes % (world_size * n) == 0]
        raise UserError(
            f"{world_size} ranks x {num_workers} workers = {readers} readers cannot share {num_lanes} lanes evenly; "
            f"with {world_size} ranks, dataloader_num_workers can be {', '.join(map(str, fits)) or 'none'}, "
            f"or set num_lanes to a multiple of {readers}"
        )


class HeldOutRows(torch.utils.data.Dataset):
    """The eval rows: every whole block in the first pass of the eval stream. The same rows at every evaluation, on any
    number of ranks.

    Held in memory: 4 bytes a token, 4 MB for a thousand web pages. Items are `Row`s.
    """

    def __init__(self, source: Source, split: Split, tokenizer, block_size: int):
        self.rows: list[Row] = []
        for row in RowStream(source, split, tokenizer, block_size, num_lanes=1):
            if row.state["pass"] > 0:
                break  # it holds tokens of the second pass already
            self.rows.append(row)
        if not self.rows:
            raise UserError(
                f"the {split.stop - split.start} held-out documents do not fill one block of "
                f"{block_size} tokens; raise eval_documents"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]
