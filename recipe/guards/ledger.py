"""Fingerprints of every row that the model consumed: repetition, replay after a resume, overlap with the eval rows.

Windows. Every window of 64 tokens of every row gets a 64-bit hash. One in `every` of them is kept, chosen by the hash
itself, so that a copy is found at any alignment: a copied stretch of n >= 64 tokens has n - 63 windows and is seen
with probability 1 - (1 - 1/every)^(n - 63). Whole rows have digests, which is all there is for shorter rows.

Copies. A copy is a run of kept windows of one row that all lie the same distance behind where their text came first.
Its tokens times the nats per token must exceed ln(pairs of positions compared) + 10, else chance explains it.
Repetitive text is no copy: its matches change their distance from window to window (`find_stretches`), and what a row
repeats of itself is not counted (`novelty`).

Memory: docs/guards.md has it in bytes. 16M tokens keep 1M windows. The table is full at 4.2M (67M tokens), and `every`
doubles each time: at 1 billion tokens it is 256, and a copied row of 1,024 tokens is seen with probability 0.98. Eval
rows: every window (fewer from 4M on). Different windows with the same hash: 1e-4 pairs in the first billion tokens.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from recipe.guards.copies import (
    COUNTS,
    MAX_NATS,
    WINDOW,
    cut_into_documents,
    find_stretches,
    least_tokens,
    mark_shared,
    novelty,
    without_shared,
)
from recipe.guards.hashtable import SampledTable

PLACE = ("step", "rank", "micro_step", "row")  # where a row was consumed; `row`: in the micro-batch
# One window in so many is kept. Chosen, not measured: it keeps 1M windows of 16M tokens.
EVERY = 16
# Kept windows and rows, after which fewer are kept. Chosen to bound memory.
MAX_WINDOWS, MAX_ROWS = 4 << 20, 4 << 20
# Rows judged together: a duplicated document of 10,000 tokens, which is natural, must stay a small share, here 8 %.
RECENT_ROWS, RECENT_TOKENS = 512, 1 << 17
# Before repetition is judged. Chosen, not measured: a share of less would be that of a document or two.
MIN_ROWS, MIN_TOKENS = 64, 16384
# Share of copied tokens, 0.8 to 7 % in natural corpora (`repetition.py`).
INFO_SHARE = 0.10
# Of a declared pass: in a new uniform order at most a tenth of the first documents lie within a tenth of a pass of
# their last use, fewer later.
NEAR = 0.1
# Rows after a resume, and the copied share of their tokens. Chosen, not measured: a replay copies all of them.
REPLAY_ROWS, REPLAY_SHARE = 16, 0.5
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_MIX = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # splitmix64


class Hashed(NamedTuple):
    """Rows laid end to end. Of each row: `start`, `length`, `digest`. Of each window, in order: the `row` it is in,
    `at` which token it starts, and its `key`."""

    start: np.ndarray
    length: np.ndarray
    digest: np.ndarray
    row: np.ndarray
    at: np.ndarray
    key: np.ndarray

    @property
    def stop(self) -> np.ndarray:
        return self.start + self.length


def _mix(values: np.ndarray) -> np.ndarray:
    for factor, shift in zip(_MIX, (30, 27), strict=True):
        values = (values ^ (values >> np.uint64(shift))) * factor
    return values ^ (values >> np.uint64(31))


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
    tokens = np.concatenate(rows).astype(np.uint64) + np.uint64(1)
    sums = np.zeros(total + 1, np.uint64)
    np.cumsum(_mix(tokens) * powers[:total], out=sums[1:])
    digest = _mix((sums[end] - sums[start]) * inverses[start] + length.astype(np.uint64))
    counts = np.maximum(length - WINDOW + 1, 0)
    row = np.repeat(np.arange(len(rows)), counts)
    at = np.arange(len(row)) + (start - (np.cumsum(counts) - counts))[row]
    keys = _mix((sums[WINDOW:] - sums[:-WINDOW]) * inverses[: max(total - WINDOW + 1, 0)])
    return Hashed(start, length, digest.view(np.int64), row, at, keys.view(np.int64)[at])


class _RowTable:
    """Where each row was consumed. `position`: its first token's number in the run, rising; `place`: PLACE and the
    number of its micro-batch, counted from the start."""

    def __init__(self, position: np.ndarray, place: np.ndarray):
        self.size, self._position, self._place = len(position), position, place

    def has_room(self, count: int) -> bool:
        return self.size + count <= len(self._position)

    def append(self, position: np.ndarray, place: np.ndarray) -> None:
        size = self.size + len(position)
        if not self.has_room(len(position)):
            room = max(1024, size + size // 2)
            self._position, self._place = np.resize(self._position, room), np.resize(self._place, (room, 5))
        self._position[self.size : size], self._place[self.size : size] = position, place
        self.size = size

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return self._position[: self.size], self._place[: self.size]

    @property
    def num_bytes(self) -> int:
        return self._position.nbytes + self._place.nbytes

    def find(self, position: np.ndarray) -> np.ndarray:
        """The number of the row that holds each position."""
        return np.maximum(np.searchsorted(self.arrays[0], position, side="right") - 1, 0)

    def places(self, position: np.ndarray) -> np.ndarray:
        return self._place[self.find(position)]

    def starts(self, position: np.ndarray) -> np.ndarray:
        return self._position[self.find(position)]


def _matches(tables: dict, hashed: Hashed, windows: str, digests: str) -> Iterator[tuple[int, int, int, int]]:
    """What the tables have of these rows: row, its first token and number of tokens, and its position there."""
    table = tables[windows]
    kept = slice(None) if table.every == 1 else table.keeps(hashed.key)
    found = table.find(hashed.key[kept])
    for index, at, span, _, earlier in find_stretches(hashed.row[kept], hashed.at[kept], found, found >= 0).T:
        yield index, at - hashed.start[index], span, earlier
    whole = tables[digests].find(hashed.digest)
    yield from ((index, 0, hashed.length[index], whole[index]) for index in (whole >= 0).nonzero()[0])


class Ledger:
    """Fingerprints of what was consumed. Fed on the main process, once a step, with the rows of all ranks.

    `max_windows`, `max_rows`: entries kept of each kind. Every number, array and table is state.
    """

    def __init__(self, max_windows: int = MAX_WINDOWS, max_rows: int = MAX_ROWS):
        self.tables = {"windows": SampledTable(max_windows, EVERY), "digests": SampledTable(max_rows)}
        self.tables |= {"eval_windows": SampledTable(max_windows), "eval_digests": SampledTable(max_rows)}
        self.tables["tails"] = SampledTable(max_rows)  # the last window of each row and document
        self.rows = _RowTable(np.zeros(0, np.int64), np.zeros((0, 5), np.int32))
        self.tokens = self.micro_steps = self.passes = self._pass_start = self._near = 0
        self.resumed_at, self._was_repeating = -1, 0
        self.replay_rows = self._replay_tokens = self._replay_copied = 0
        # Of the newest rows: position (number of the first token in the run), tokens. Of the copies among them:
        # position, tokens, tokens of surprise, distance, whether it is the whole row, position of the earlier text,
        # and what it is (`copies.mark_shared`).
        self._recent, self._copies = np.zeros((0, 2), np.int64), np.zeros((0, 7), np.int64)
        # Of each eval row: start, length, surprise that more than half of it was copied with (tokens), step of a copy.
        # Of each eval token: the surprise that it was copied with.
        self.eval_rows, self._eval_hits = np.zeros((0, 4), np.int64), np.zeros(0, np.int32)

    @property
    def num_bytes(self) -> int:
        """Of the tables and arrays, which are what grows with the run."""
        arrays = sum(value.nbytes for value in vars(self).values() if isinstance(value, np.ndarray))
        return arrays + self.rows.num_bytes + sum(table.num_bytes for table in self.tables.values())

    def observe_train(
        self, rows: Sequence[np.ndarray], places: Sequence[Sequence[int]], eos_ids: tuple[int, ...] = ()
    ) -> int:
        """`rows`: token ids without padding, 1-D, in reading order, all of one step; `places`: PLACE of each;
        `eos_ids`: what ends a document. Returns how many of the tokens are copies, shared text included."""
        assert len(rows) == len(places), "one place for each row"
        where = np.array([place for row, place in zip(rows, places, strict=True) if len(row)], np.int64)
        rows = [row for row in rows if len(row)]
        if not rows:
            return 0
        hashed = hash_rows(rows)
        position = self.tokens + hashed.start
        kept = self.tables["windows"].keeps(hashed.key)
        row, at = hashed.row[kept], hashed.at[kept] + self.tokens
        num_windows = np.bincount(row, minlength=len(rows))
        digested = self.tables["digests"].keeps(hashed.digest)
        judged = digested | (num_windows > 0)
        if not self.rows.has_room(judged.sum()):
            self._drop_rows()
        micro_steps, micro_step = np.unique(where[:, 0] << 32 | where[:, 2], return_inverse=True)
        self.rows.append(position[judged], np.column_stack([where, self.micro_steps + micro_step])[judged])
        self.micro_steps += len(micro_steps)

        earlier = self._first_seen("windows", hashed.key[kept], at)
        earlier_row = position.copy()
        earlier_row[digested] = self._first_seen("digests", hashed.digest[digested], position[digested])
        is_whole, matched = earlier_row < position, earlier < position[row]
        units = cut_into_documents(np.concatenate(rows), hashed.start, eos_ids)
        are_new = self._are_new(hashed, units)
        copied = 0
        if is_whole.any() or matched.any():
            stretches = find_stretches(row, at, earlier, matched & ~is_whole[row])
            kinds = self._kinds(stretches, hashed, units, are_new)
            copied = self._add_copies(rows, hashed, earlier_row, num_windows, stretches, kinds)
        self.tokens += int(hashed.length.sum())
        self._recent = np.concatenate([self._recent, np.column_stack([position, hashed.length])[judged]])
        self._forget()
        if self.resumed_at >= 0:
            self._follow_resume()
        if len(self.eval_rows):
            self._match_eval(rows, hashed, int(where[0, 0]))
        return copied

    def _are_new(self, hashed: Hashed, units) -> tuple[np.ndarray, np.ndarray]:
        """Whether each row, and each of `units`, ends with a window that is known to be new."""
        start, stop = np.append(hashed.start, units[0]), np.append(hashed.stop, units[1])
        is_new, long = np.zeros(len(start), bool), np.flatnonzero(stop - start >= WINDOW)
        keys = hashed.key[np.searchsorted(hashed.at, stop[long] - WINDOW)]
        kept = self.tables["tails"].keeps(keys)
        end = self.tokens + stop[long[kept]]
        is_new[long[kept]] = self._first_seen("tails", keys[kept], end) == end
        return is_new[: len(hashed.start)], is_new[len(hashed.start) :]

    def _kinds(self, stretches, hashed: Hashed, units, are_new) -> np.ndarray:
        row, at, *others = stretches
        at, begin = at - self.tokens, self.rows.starts(others[-1])
        is_same_place, every = at - hashed.start[row] == others[-1] - begin, self.tables["windows"].every
        return mark_shared(np.stack([row, at, *others]), hashed, units, are_new, is_same_place, every)

    def _first_seen(self, name: str, keys: np.ndarray, position: np.ndarray) -> np.ndarray:
        """The position of each key's first occurrence in this pass: its own if it is new."""
        table = self.tables[name]
        unique, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        every, found = table.every, table.add(unique, position[first], self._pass_start)
        if table.every > every:
            self._drop_rows()
        return found[inverse]

    def _drop_rows(self) -> None:
        """Forget where rows were consumed that nothing points into any more. Those of this step are still needed."""
        position, _ = self.rows.arrays
        known = [self.tables[name].positions for name in ("windows", "digests")]
        known += [self._recent[:, 0], self._copies[:, 5], position[position >= self.tokens]]
        used = np.unique(self.rows.find(np.concatenate(known)))
        self.rows = _RowTable(*(array[used] for array in self.rows.arrays))

    def _add_copies(self, rows, hashed: Hashed, earlier_row, num_windows, stretches: np.ndarray, kinds) -> int:
        """Rows that came before as a whole, and stretches of other rows. Returns their tokens."""
        position, length = self.tokens + hashed.start, hashed.length
        whole = (earlier_row < position).nonzero()[0]
        apart = (position - earlier_row)[whole]
        of_rows = [whole, length[whole], length[whole], apart, np.ones_like(whole), earlier_row[whole]]
        of_rows.append(np.full_like(whole, COUNTS))
        row, at, span, windows, earlier = stretches
        tokens = length[row] * windows // np.maximum(num_windows[row], 1)
        of_stretches = [row, tokens, span, at - earlier, np.zeros_like(row), earlier, kinds]
        row, tokens, span, *others = np.hstack([of_rows, of_stretches])
        shares = {index: novelty(rows[index]) for index in set(row.tolist())}
        surprise = span * np.array([shares[index] for index in row.tolist()])
        copies = np.column_stack([position[row], tokens, surprise, *others]).astype(np.int64)
        self._copies = np.concatenate([self._copies, copies[copies[:, 3] < self._near] if self.passes else copies])
        return int(tokens.sum())

    def micro_steps_apart(self, copies: np.ndarray) -> np.ndarray:
        """Between each copy and the earlier row."""
        return self.rows.places(copies[:, 0])[:, 4] - self.rows.places(copies[:, 5])[:, 4]

    def _forget(self) -> None:
        """Keep the newest RECENT_ROWS rows, more where they are short."""
        tokens_after, rows_after = np.cumsum(self._recent[::-1, 1])[::-1], np.arange(len(self._recent), 0, -1)
        self._recent = self._recent[(rows_after <= RECENT_ROWS) | (tokens_after <= RECENT_TOKENS)]
        if len(self._copies):
            self._copies = self._copies[self._copies[:, 0] >= self._recent[0, 0]]

    def recent(self, nats_per_token: float, since: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """The recent rows from position `since` on (position, tokens), and the copies in them that are no shared text
        and that chance does not explain (see `_copies`)."""
        rows = self._recent[self._recent[:, 0] >= since]
        copies = without_shared(self._copies, since)
        pairs = self.tokens * int(rows[:, 1].sum())
        return rows, copies[copies[:, 2] > least_tokens(pairs, nats_per_token)]

    def begin_pass(self, tokens_in_pass: int | None = None) -> None:
        """From here on only copies nearer than NEAR of a pass count (of `tokens_in_pass`, else of the tokens of the
        pass that ended), because lanes and workers do not end a pass together."""
        if self.tokens == self._pass_start:
            return
        self._near = int(NEAR * (tokens_in_pass or self.tokens - self._pass_start))
        self._pass_start, self.passes = self.tokens, self.passes + 1
        self._copies = self._copies[self._copies[:, 3] < self._near]

    # --- after a resume

    def mark_resume(self) -> None:
        """Training goes on from a checkpoint: if the next rows are copies, it is a replay."""
        _, tokens, copied = self._count_recent()
        self._was_repeating = int(copied / max(tokens, 1) >= INFO_SHARE)
        self.resumed_at = self.tokens
        self.replay_rows = self._replay_tokens = self._replay_copied = 0

    def _follow_resume(self) -> None:
        counts = self._count_recent(self.resumed_at)
        if self.replay_rows < MIN_ROWS:
            self.replay_rows, self._replay_tokens, self._replay_copied = counts
        elif counts[2] < INFO_SHARE * counts[1]:
            self.resumed_at = -1

    def _count_recent(self, since: int = 0) -> tuple[int, int, int]:
        """Rows, tokens, and copied tokens."""
        rows, copies = self.recent(MAX_NATS, since)
        return len(rows), int(rows[:, 1].sum()), int(copies[:, 1].sum())

    @property
    def replay_since(self) -> int | None:
        """The position of the resume, if the rows after it were copies and the copying still goes on."""
        is_replay = self.replay_rows >= REPLAY_ROWS and self._replay_copied >= REPLAY_SHARE * self._replay_tokens
        return self.resumed_at if self.resumed_at >= 0 and is_replay and not self._was_repeating else None

    # --- eval rows

    @property
    def eval_tokens(self) -> int:
        return len(self._eval_hits)

    def observe_eval(self, rows: Sequence[np.ndarray]) -> None:
        """Rows of the evaluation set, in any portions. Rows that are known already have no effect."""
        rows = [row for row in rows if len(row)]
        if not rows:
            return
        windows, known = self.tables["eval_windows"], self.tables["eval_digests"]
        digests = hash_rows(rows).digest
        is_new = known.keeps(digests) & (known.find(digests) < 0)
        new = {digest: row for digest, row, is_new in zip(digests.tolist(), rows, is_new, strict=True) if is_new}
        if not new:
            return
        rows = list(new.values())
        hashed = hash_rows(rows)
        start, zeros = self.eval_tokens + hashed.start, np.zeros_like(hashed.start)
        known.add(hashed.digest, start)
        kept = windows.keeps(hashed.key).nonzero()[0]
        unique, first = np.unique(hashed.key[kept], return_index=True)
        windows.add(unique, self.eval_tokens + hashed.at[kept[first]])
        self.eval_rows = np.concatenate([self.eval_rows, np.column_stack([start, hashed.length, zeros, zeros])])
        self._eval_hits = np.append(self._eval_hits, np.zeros(hashed.length.sum(), np.int32))
        self._match_train(rows, hashed, len(self.eval_rows) - len(rows))

    def _match_train(self, rows, hashed: Hashed, first_row: int) -> None:
        """New eval rows against the train rows before them, of which only the kept windows are known: a copy goes on
        beyond them by `every` tokens on either side in the mean, so that much is added, up to half a window."""
        more = min(self.tables["windows"].every, WINDOW // 2)
        for index, start, span, earlier in _matches(self.tables, hashed, "windows", "digests"):
            step, surprise = int(self.rows.places(earlier)[0]), int(span * novelty(rows[index]))
            self._hit(first_row + index, max(start - more, 0), start + span + more, surprise, step)

    def _match_eval(self, rows, hashed: Hashed, step: int) -> None:
        """Train rows against all windows of the eval rows, at any alignment, and whole."""
        for index, _, span, at in _matches(self.tables, hashed, "eval_windows", "eval_digests"):
            eval_row = int(np.searchsorted(self.eval_rows[:, 0], at, side="right")) - 1
            start = at - self.eval_rows[eval_row, 0]
            self._hit(eval_row, start, start + span, int(span * novelty(rows[index])), step)

    def _hit(self, eval_row: int, start: int, stop: int, surprise: int, step: int) -> None:
        """Tokens `start` to `stop` of an eval row were in training."""
        first, length = self.eval_rows[eval_row, :2]
        hits = self._eval_hits[first : first + length]
        np.maximum(hits[start:stop], surprise, out=hits[start:stop])
        middle = (length - 1) // 2  # more than half of the tokens have at least this
        self.eval_rows[eval_row, 2:] = np.partition(hits, middle)[middle], step

    # --- state

    def state(self) -> dict[str, np.ndarray]:
        """Arrays for `np.savez`, as large as what is kept."""
        self._drop_rows()  # else it would depend on when that was done last
        state = {name: np.asarray(value) for name, value in vars(self).items() if isinstance(value, (int, np.ndarray))}
        for name, table in self.tables.items():
            state[f"{name}.keys"], state[f"{name}.positions"] = table.entries()
            state[f"{name}.sampling"] = np.array([table.limit, table.every])
        state["rows.position"], state["rows.place"] = (array.copy() for array in self.rows.arrays)
        return state

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> "Ledger":
        ledger = cls()
        for name, value in list(vars(ledger).items()):
            if isinstance(value, (int, np.ndarray)):
                setattr(ledger, name, int(state[name]) if isinstance(value, int) else np.array(state[name]))
        for name in ledger.tables:
            ledger.tables[name] = SampledTable(*map(int, state[f"{name}.sampling"]))
            ledger.tables[name].add(state[f"{name}.keys"], state[f"{name}.positions"])
        ledger.rows = _RowTable(state["rows.position"], state["rows.place"])
        return ledger
