"""Lanes -> one endless canonical order of rows, the same for any number of ranks and workers, resumable in O(1).

Row g of the run comes from lane `g % num_lanes`, and from the source that `source_of_row(g)` names; rank
`g % world_size` trains on it; one worker of that rank reads it. So a row does not depend on the process that reads it.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, islice, takewhile

import torch

from recipe.data.formats import Content
from recipe.data.hold_out import HoldOutFilter
from recipe.data.lanes import Split, deal_chunks, read_lane, start_of_lane
from recipe.data.packing import Row, pack, tokenize
from recipe.data.source import LOGGED, Source
from recipe.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """One source of a mixture, what may be read of it, and its share of the rows."""

    source: Source
    split: Split
    weight: float = 1.0


def source_of_row(number: int, weights: Sequence[float]) -> int:
    """The source of row `number`, of a mixture with these weights.

    The Weyl sequence of the golden ratio: in any n consecutive rows, each source has its share to within about log n
    rows, and no state is needed to continue from any row.
    """
    place = (number * 0x9E3779B97F4A7C15) % 2**64 / 2**64
    bounds = list(accumulate(weights))
    return next(i for i, bound in enumerate(bounds) if place * bounds[-1] < bound or i == len(bounds) - 1)


class RowStream(torch.utils.data.IterableDataset):
    """The rows that one rank trains on, in canonical order, endlessly; in a DataLoader worker, that worker's share of
    them.

    Yields `Row`s. `position` is `{"rows": rows of the whole run returned so far, "rows_by_source": [how many from
    each source], "is_exhausted": [whether the end of its first pass has been announced], "lanes": [[LaneState of each
    lane] of each source]}`. Use a DataLoader with `batch_size=None`: it takes one row from each worker in turn, which
    restores the order. Raises `UserError` where ranks times workers do not divide the lanes.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        tokenizer,
        block_size: int,
        num_lanes: int,
        rank: int = 0,
        world_size: int = 1,
        hold_out_filter: HoldOutFilter | None = None,
    ):
        self.parts = list(parts)
        self.weights = [part.weight for part in parts]
        self.tokenizer = tokenizer
        self.block_size = block_size
        self.num_lanes = num_lanes
        self.rank = rank
        self.world_size = world_size
        self.hold_out_filter = hold_out_filter
        self.lanes = [deal_chunks(part.source, part.split, num_lanes) for part in parts]
        self.position = self.start()

    def start(self) -> dict:
        """The position before the first row."""
        lanes = [[start_of_lane() for _ in range(self.num_lanes)] for _ in self.parts]
        count = len(self.parts)
        return {"rows": 0, "rows_by_source": [0] * count, "is_exhausted": [False] * count, "lanes": lanes}

    def __iter__(self) -> Iterator[Row]:
        info = torch.utils.data.get_worker_info()
        return self.share_of_worker(info.id, info.num_workers) if info else self.share_of_worker(0, 1)

    def share_of_worker(self, worker: int, num_workers: int) -> Iterator[Row]:
        """Every `num_workers`th of this rank's rows."""
        check_division(self.num_lanes, self.world_size, num_workers)
        open_lanes: dict[tuple[int, int], Iterator[Row]] = {}
        number = self.position["rows"] + self.rank + self.world_size * worker
        while True:
            source, lane = source_of_row(number, self.weights), number % self.num_lanes
            if (source, lane) not in open_lanes:
                open_lanes[source, lane] = self._rows_of(source, lane)
            yield replace(next(open_lanes[source, lane]), source=source, lane=lane, number=number)
            number += self.world_size * num_workers

    def _rows_of(self, source: int, lane: int) -> Iterator[Row]:
        part, state = self.parts[source], self.position["lanes"][source][lane]
        documents = read_lane(part.source, self.lanes[source][lane], part.split, lane, state, self.hold_out_filter)
        return pack(tokenize(documents, self.tokenizer, part.source.name), self.block_size, skip_tokens=state["token"])


def check_division(num_lanes: int, world_size: int, num_workers: int) -> None:
    """Raise `UserError` unless every lane can belong to one worker of one rank."""
    readers = world_size * max(1, num_workers)
    if num_lanes % readers:
        fits = [n for n in range(1, num_lanes // world_size + 1) if num_lanes % (world_size * n) == 0]
        fixes = [f"--dataloader_num_workers {fits[-1]}"] if fits else []
        fixes += [f"--num_lanes {readers}"] if readers.bit_count() == 1 else []
        raise UserError(
            f"{world_size} ranks x {num_workers} workers = {readers} readers cannot share {num_lanes} lanes evenly; "
            + (f"{' or '.join(fixes)} would do" if fixes else "start a power of two of processes")
        )


class HeldOutRows(torch.utils.data.Dataset):
    """The eval rows: every whole block in the first pass over each source's hold-out. The same rows at every
    evaluation, on any number of ranks.

    Held in memory: 4 bytes a token, 4 MB for a thousand web pages. Items are `Row`s; `contents` are the documents.
    """

    def __init__(self, parts: Sequence[Part], tokenizer, block_size: int):
        self.rows: list[Row] = []
        self.contents: list[Content] = []
        for number, part in enumerate(parts):
            (chunks,) = deal_chunks(part.source, part.split, num_lanes=1)
            lane = read_lane(part.source, chunks, part.split, 0, start_of_lane())
            documents = list(takewhile(lambda document: document.state["pass"] == 0, lane))
            for reason in islice(chain.from_iterable(document.skipped for document in documents), LOGGED):
                logger.warning("left out of the hold-out, as on_bad_data says: %s", reason)
            tokens = tokenize(documents, tokenizer, part.source.name)
            self.contents += [document.content for document in documents]
            self.rows += [replace(row, source=number) for row in pack(tokens, block_size)]
        if not self.rows:
            raise UserError(
                f"the {len(self.contents)} held-out documents do not fill one block of {block_size} tokens; "
                "--eval_skip auto --eval_documents auto would do"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]
