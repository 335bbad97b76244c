"""What is kept of the rows of a step: hashes, by which the ledger finds what comes twice.

Windows. Every window of 64 tokens of every row gets a 64-bit hash. One in `every` of them is kept, chosen by the hash
itself, so that a copy is found at any alignment: a copied stretch of n >= 64 tokens has n - 63 windows and is seen
with probability 1 - (1 - 1/every)^(n - 63). Whole rows have digests, which is all there is for shorter rows.

Ranks. Each hashes its own rows (`fingerprint`). What it keeps goes to the main process, and of all ranks together it
is no more than STEP_WINDOWS windows and STEP_ROWS rows a step: `Rates` grow with the tokens of a step. So the main
process does and stores the same for any number of ranks. A share of copied tokens stays what it is: copies are kept by
the same rule as the text that they are copies of.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from recipe.guards.copies import WINDOW, cut_into_documents, novelty
from recipe.guards.hashtable import is_kept

PLACE = ("step", "rank", "micro_step", "row")  # where a row was consumed; `row`: in the micro-batch
# One window in so many is kept. Chosen, not measured: it keeps 1M windows of 16M tokens.
EVERY = 16
# Of one step of all ranks, above which fewer are kept. Chosen: steps of up to 65,536 tokens are sampled as those of
# small runs.
STEP_WINDOWS, STEP_ROWS = 1 << 12, 1 << 12
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_MIX = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # splitmix64


class Hashed(NamedTuple):
    """Rows laid end to end. Of each row: `start`, `stop`, `digest`. `keys`: of the window that begins at each token,
    also of those that cross the end of a row."""

    start: np.ndarray
    stop: np.ndarray
    digest: np.ndarray
    keys: np.ndarray

    def windows(self, every: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the windows inside of rows that are kept, in order: row, first token and key."""
        at = is_kept(self.keys, every).nonzero()[0]
        row = np.searchsorted(self.start, at, side="right") - 1
        inside = at + WINDOW <= self.stop[row]
        row, at = row[inside], at[inside]
        return row, at, self.keys[at]

    def all_of_rows(self, every: int) -> tuple[np.ndarray, ...]:
        """Those windows, and of the rows: digest, start and length."""
        return *self.windows(every), self.digest, self.start, self.stop - self.start

    def tails(self, length: np.ndarray, stop: np.ndarray, every: int) -> tuple[np.ndarray, np.ndarray]:
        """Of stretches of rows: the number of each one's last window among those that are kept, or -1; their ends."""
        long = np.flatnonzero(length >= WINDOW)
        kept = long[is_kept(self.keys[stop[long] - WINDOW], every)] if len(long) else long
        number = np.full(len(length), -1)
        number[kept] = np.arange(len(kept))
        return number, stop[kept]


def _mix(values: np.ndarray) -> np.ndarray:
    """In place."""
    for factor, shift in zip(_MIX, (30, 27), strict=True):
        values ^= values >> np.uint64(shift)
        values *= factor
    values ^= values >> np.uint64(31)
    return values


@functools.lru_cache(maxsize=4)
def _powers(base: int, count: int) -> np.ndarray:
    factors = np.full(count, base, np.uint64)
    factors[:1] = 1
    return np.cumprod(factors)


def hash_rows(rows: Sequence[np.ndarray]) -> Hashed:
    """Polynomial hashes modulo 2^64 of mixed token ids, by prefix sums: one pass over the tokens for all windows."""
    length = np.array([len(row) for row in rows], np.int64)
    end = np.cumsum(length)
    start, total = end - length, int(end[-1])
    room = 1 << total.bit_length()
    powers, inverses = _powers(_BASE, room), _powers(pow(_BASE, -1, 1 << 64), room)
    tokens = _mix(np.concatenate(rows).astype(np.uint64) + np.uint64(1))
    tokens *= powers[:total]
    sums = np.zeros(total + 1, np.uint64)
    np.cumsum(tokens, out=sums[1:])
    digest = _mix((sums[end] - sums[start]) * inverses[start] + length.astype(np.uint64))
    keys = sums[WINDOW:] - sums[:-WINDOW]
    keys *= inverses[: len(keys)]
    return Hashed(start, end, digest.view(np.int64), _mix(keys).view(np.int64))


class Rates(NamedTuple):
    """One in so many is kept, chosen by hash. `rows`: of whole rows and of the ends of rows and documents."""

    windows: int = EVERY
    rows: int = 1

    @classmethod
    def of(cls, tokens_per_step: int, rows_per_step: int) -> "Rates":
        """Powers of two, the same on all ranks: the sizes are those of all ranks together."""
        windows = max(EVERY, power_above(tokens_per_step / STEP_WINDOWS))
        return cls(windows, power_above(rows_per_step / STEP_ROWS))


def power_above(number: float) -> int:
    """The least power of two that is at least `number`."""
    return 1 << max(0, math.ceil(number) - 1).bit_length()


class Fingerprints(NamedTuple):
    """What is kept of the rows of one rank in one step. Positions count the rank's tokens of the step from 0.

    Of rows: `start`, `length`, `digest`, whether the digest is kept, `novelty` (see `copies.novelty`), `place`
    `[rows, 4]`. Of documents: `document_start`, `document_stop`. Of kept windows: `row`, `at`, `key`. Of kept tails
    (last windows of rows and documents): `tail_key`, `tail_stop`; `row_tail`, `document_tail`: which is whose, or -1.
    """

    tokens: int
    start: np.ndarray
    length: np.ndarray
    digest: np.ndarray
    digested: np.ndarray
    novelty: np.ndarray
    place: np.ndarray
    document_start: np.ndarray
    document_stop: np.ndarray
    row: np.ndarray
    at: np.ndarray
    key: np.ndarray
    tail_key: np.ndarray
    tail_stop: np.ndarray
    row_tail: np.ndarray
    document_tail: np.ndarray

    def thinned(self, windows: int, rows: int) -> "Fingerprints":
        """What tables keep that keep one in so many."""
        digested, kept = self.digested & is_kept(self.digest, rows), is_kept(self.key, windows)
        judged = digested.copy()
        judged[self.row[kept]] = True
        if judged.all() and kept.all() and digested.all():
            return self
        names = ("start", "length", "digest", "novelty", "place", "row_tail")
        of_rows = {name: getattr(self, name)[judged] for name in names}
        row = (np.cumsum(judged) - 1)[self.row[kept]]
        return self._replace(**of_rows, digested=digested[judged], row=row, at=self.at[kept], key=self.key[kept])


SHIFTED = ("start", "document_start", "document_stop", "at", "tail_stop")  # by the tokens of the ranks before
INDICES = {"row": "start", "row_tail": "tail_key", "document_tail": "tail_key"}  # numbers of entries of those


def fingerprint(
    rows: Sequence[np.ndarray],
    places: Sequence[Sequence[int]],
    eos_ids: tuple[int, ...] = (),
    rates: Rates = Rates(),  # noqa: B008 (immutable)
) -> Fingerprints | None:
    """`rows`: token ids without padding, 1-D, in reading order, all of one step of one rank; `places`: PLACE of each;
    `eos_ids`: what ends a document. None where there are no tokens."""
    assert len(rows) == len(places), "one place for each row"
    place = np.array([place for row, place in zip(rows, places, strict=True) if len(row)], np.int64)
    rows = [row for row in rows if len(row)]
    if not rows:
        return None
    hashed = hash_rows(rows)
    length, (row, at, key) = hashed.stop - hashed.start, hashed.windows(rates.windows)
    digested = is_kept(hashed.digest, rates.rows)
    judged = digested.copy()
    judged[row] = True
    documents = np.stack(cut_into_documents(np.concatenate(rows), hashed.start, eos_ids))
    used = np.zeros(documents.shape[1], bool)
    used[np.searchsorted(documents[0], at, side="right") - 1] = True
    row_tail, tail_row = hashed.tails(length, hashed.stop, rates.rows)
    unit_tail, tail_unit = hashed.tails(documents[1] - documents[0], documents[1], rates.rows)
    unit_tail[unit_tail >= 0] += len(tail_row)
    stops = np.append(tail_row, tail_unit)
    chosen = judged.nonzero()[0]
    return Fingerprints(
        int(length.sum()),
        hashed.start[judged],
        length[judged],
        hashed.digest[judged],
        digested[judged],
        np.array([novelty(rows[index]) for index in chosen]),
        place[judged],
        *documents[:, used],
        (np.cumsum(judged) - 1)[row],
        at,
        key,
        hashed.keys[stops - WINDOW] if len(stops) else stops,
        stops,
        row_tail[judged],
        unit_tail[used],
    )


def join(parts: Sequence[Fingerprints]) -> Fingerprints:
    """Of several ranks, one after another."""
    columns = {}
    tokens = np.cumsum([0, *(part.tokens for part in parts)])
    for name in Fingerprints._fields[1:]:
        columns[name] = [getattr(part, name) for part in parts]
        if name in SHIFTED:
            columns[name] = [column + before for column, before in zip(columns[name], tokens, strict=False)]
        elif name in INDICES:
            sizes = np.cumsum([0, *(len(getattr(part, INDICES[name])) for part in parts)])
            columns[name] = [np.where(c >= 0, c + before, -1) for c, before in zip(columns[name], sizes, strict=False)]
    return Fingerprints(int(tokens[-1]), *(np.concatenate(column) for column in columns.values()))
