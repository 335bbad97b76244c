"""The loader that Trainer reads: rows from all workers, made into micro-batches here, where the stream's position is
kept."""

import copy
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader

from recipe.data.collator import DataCollatorForPackedRows
from recipe.data.stream import RowStream


class BatchLoader:
    """Endless micro-batches of `batch_size` rows for one rank; the only owner of the position in the stream.

    Not to be prepared by accelerate: the stream has done the sharding. Iterating again goes on where the last row was
    consumed; it never starts over. `position` is what a checkpoint stores; on several ranks each knows its own lanes,
    see `merge_positions`.
    """

    def __init__(self, stream: RowStream, collator: DataCollatorForPackedRows, batch_size: int, num_workers: int = 0):
        self.dataset = stream
        self.collator = collator
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.position = copy.deepcopy(stream.position)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self.dataset.position = copy.deepcopy(self.position)
        # The lanes' order owes nothing to torch's generator; a generator of its own keeps DataLoader from drawing on
        # the run's.
        rows = DataLoader(
            self.dataset, batch_size=None, num_workers=self.num_workers, generator=torch.Generator(), collate_fn=_as_is
        )
        batch = []
        for row in rows:
            batch.append(row)
            if len(batch) == self.batch_size:
                self._advance(batch)
                yield self.collator(batch)
                batch = []

    def _advance(self, batch: list) -> None:
        for row in batch:
            self.position["lanes"][row.lane] = row.state
        self.position["rows"] += len(batch) * self.dataset.world_size

    @property
    def passes(self) -> int:
        """Complete passes of this rank's fastest lane: above 0, some document has been read twice."""
        return max(lane["pass"] for lane in self.position["lanes"])


def _as_is(row):
    return row


def merge_positions(positions: list[dict], world_size: int) -> dict:
    """One position from those of all ranks: each lane's state from the rank that reads it."""
    rows = {position["rows"] for position in positions}
    assert len(rows) == 1, f"ranks stand at different rows: {sorted(rows)}"
    num_lanes = len(positions[0]["lanes"])
    return {"rows": rows.pop(), "lanes": [positions[lane % world_size]["lanes"][lane] for lane in range(num_lanes)]}
