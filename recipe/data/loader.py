"""The loader that Trainer reads: rows from all workers, made into micro-batches here, where the stream's position is
kept."""

import copy
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader

from recipe.data.collator import DataCollatorForPackedRows
from recipe.data.packing import Row
from recipe.data.stream import RowStream, check_division, source_of_row

PREFETCHED_ROWS = 64  # by each worker: it tokenizes some dozens of rows at once, and must not wait for the others then


class BatchLoader:
    """Endless micro-batches of `batch_size` rows for one rank; the only owner of the position in the stream.

    Not to be prepared by accelerate: the stream has done the sharding. Iterating again goes on where the last row was
    consumed; it never starts over. `position` is what a checkpoint stores; on several ranks each knows its own lanes,
    see `merge_positions`. Raises `UserError` where ranks times workers do not divide the lanes.
    """

    def __init__(self, stream: RowStream, collator: DataCollatorForPackedRows, batch_size: int, num_workers: int = 0):
        check_division(stream.num_lanes, stream.world_size, num_workers)
        self.dataset = stream
        self.collator = collator
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.position = stream.start()

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (self.collator(rows) for rows in self.batches())

    def batches(self) -> Iterator[list[Row]]:
        """The same rows, not yet collated."""
        self.dataset.position = copy.deepcopy(self.position)
        # The lanes' order owes nothing to torch's generator; a generator of its own keeps DataLoader from drawing on
        # the run's.
        rows = DataLoader(
            self.dataset,
            batch_size=None,
            num_workers=self.num_workers,
            prefetch_factor=PREFETCHED_ROWS if self.num_workers else None,
            generator=torch.Generator(),
            collate_fn=_as_is,
        )
        batch = []
        for row in rows:
            batch.append(row)
            if len(batch) == self.batch_size:
                self._advance(batch)
                yield batch
                batch = []

    def _advance(self, batch: list[Row]) -> None:
        for row in batch:
            self.position["lanes"][row.source][row.lane] = row.state
        first = self.position["rows"]
        self.position["rows"] += len(batch) * self.dataset.world_size
        for number in range(first, self.position["rows"]):
            self.position["rows_by_source"][source_of_row(number, self.dataset.weights)] += 1

    def passes(self, source: int) -> int:
        """Complete passes of this rank's fastest lane: above 0, some document has been read twice."""
        return max(lane["pass"] for lane in self.position["lanes"][source])


def _as_is(row):
    return row


def merge_positions(positions: list[dict], world_size: int) -> dict:
    """One position from those of all ranks: each lane's state from the rank that reads it."""
    rows = {position["rows"] for position in positions}
    assert len(rows) == 1, f"ranks stand at different rows: {sorted(rows)}"
    num_lanes, num_sources = len(positions[0]["lanes"][0]), len(positions[0]["lanes"])
    lanes = [
        [positions[lane % world_size]["lanes"][source][lane] for lane in range(num_lanes)]
        for source in range(num_sources)
    ]
    return {**positions[0], "lanes": lanes}
