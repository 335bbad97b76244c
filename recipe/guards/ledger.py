"""Fingerprints of every row that the model consumed: repetition, replay after a resume, overlap with the eval rows.

Windows. Every window of 64 tokens of every row gets a 64-bit hash. One in `every` of them is kept, chosen by the hash
itself, so that a copy is found at any alignment: a copied stretch of n tokens, n >= 64, has n - 63 windows and is seen
with probability 1 - (1 - 1/every)^(n - 63). `every` is 16 and doubles whenever the table is full. A digest of each
whole row is kept besides, which is what there is for rows shorter than a window.

Copies. A copy is a run of kept windows of one row that all lie the same distance behind where their text came first.
Its tokens times `nats_per_token` must exceed ln(pairs of positions compared) + 10, else chance explains it. Repetitive
text is no copy: its matches change their distance from window to window (`_stretches`), and what a row repeats of
itself is not counted (`_novelty`).

Memory. 32 bytes a kept window at most (16 in a checkpoint), 28 a row and 32 a digest (28 and 16). Tokens -> `every`,
kept windows, table: 16M -> 16, 1M, 64 MiB; 67M -> 16, 4.2M, 128 MiB; 1 billion -> 256, 3.9M, 128 MiB, and no more from
then on. There a copied row of 1,024 tokens has 3.8 kept windows and is seen with probability 0.98; rows of 64 are left
to their digests. Eval rows: every window (sampled in the same way from 4M on), 32 to 64 bytes each.

False matches. Of N tokens N^2 / (2 every 2^64) pairs of different windows are expected to have one hash: 1e-4 in the
first billion. A finding needs thousands of tokens of such matches.

Not seen: paraphrases; copies of under 64 tokens inside longer rows; what `begin_pass` names.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from recipe.guards.finding import Finding
from recipe.guards.thresholds import (
    ALIGNED_ROWS,
    ALIGNED_SHARE,
    ALIGNED_SPREAD,
    CHANCE_NATS,
    FEW_MICRO_STEPS,
    INFO_SHARE,
    LEDGER_EVERY,
    LEDGER_MAX_ROWS,
    LEDGER_MAX_WINDOWS,
    LEDGER_MIN_ROWS,
    LEDGER_MIN_TOKENS,
    LEDGER_WINDOW,
    MAX_NATS,
    NEAR,
    OVERLAP_ERROR,
    OVERLAP_ROWS,
    OVERLAP_WARN,
    RECENT_ROWS,
    RECENT_TOKENS,
    REPLAY_ROWS,
    REPLAY_SHARE,
    WARN_SHARE,
    WARN_SHARE_NEAR,
    WHOLE_NATS,
    WHOLE_SHARE,
)

_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_MIX = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # splitmix64


class Place(NamedTuple):
    """Where a row was consumed. `micro_step` may count within the step or from the start; `row` in the micro-batch."""

    step: int
    rank: int
    micro_step: int
    row: int


class _Hashed(NamedTuple):
    """Rows laid end to end. Of each row: `start`, `length`, `digest`. Of each window, in order: the `row` it is in,
    `at` which token it starts, and its `key`."""

    start: np.ndarray
    length: np.ndarray
    digest: np.ndarray
    row: np.ndarray
    at: np.ndarray
    key: np.ndarray


class _Stretches(NamedTuple):
    """Copied stretches: row, place of the first window, tokens from there to the last window's end, kept windows in
    it, and the place where the first window's text came earlier."""

    row: np.ndarray
    at: np.ndarray
    span: np.ndarray
    windows: np.ndarray
    earlier: np.ndarray


def _mix(values: np.ndarray) -> np.ndarray:
    for factor, shift in zip(_MIX, (30, 27), strict=True):
        values = (values ^ (values >> np.uint64(shift))) * factor
    return values ^ (values >> np.uint64(31))


def _powers(base: int, count: int) -> np.ndarray:
    factors = np.full(count, base, np.uint64)
    factors[:1] = 1
    return np.cumprod(factors)


class _Hasher:
    """Polynomial hashes modulo 2^64 of mixed token ids, by prefix sums: one pass over the tokens for all windows."""

    def __init__(self):
        self._powers = self._inverses = np.empty(0, np.uint64)

    def __call__(self, rows: Sequence[np.ndarray]) -> _Hashed:
        length = np.array([len(row) for row in rows], np.int64)
        end = np.cumsum(length)
        start, total = end - length, int(end[-1])
        if total >= len(self._powers):
            self._powers = _powers(_BASE, 2 * total)
            self._inverses = _powers(pow(_BASE, -1, 1 << 64), 2 * total)
        sums = np.zeros(total + 1, np.uint64)
        tokens = np.concatenate(rows).astype(np.uint64) + np.uint64(1)
        np.cumsum(_mix(tokens) * self._powers[:total], out=sums[1:])
        digest = _mix((sums[end] - sums[start]) * self._inverses[start] + length.astype(np.uint64))
        counts = np.maximum(length - LEDGER_WINDOW + 1, 0)
        row = np.repeat(np.arange(len(rows)), counts)
        at = np.arange(len(row)) + (start - (np.cumsum(counts) - counts))[row]
        keys = _mix(
            (sums[LEDGER_WINDOW:] - sums[:-LEDGER_WINDOW]) * self._inverses[: max(total - LEDGER_WINDOW + 1, 0)]
        )
        return _Hashed(start, length, digest, row, at, keys[at])


class _Table:
    """Key -> value for at most `limit` keys whose value modulo `every` is 0. Open addressing, linear probing: a key is
    never behind a free slot (0). The last slots take what runs over."""

    CHUNK, OVERFLOW = np.arange(8), 1 << 10

    def __init__(self, limit: int, every: int = 1):
        self.limit, self.every = limit, every
        self._allocate(1 << 12)

    def _allocate(self, slots: int) -> None:
        self.size, self._slots = 0, slots
        self._shift = np.uint64(64 - slots.bit_length() + 1)
        self._keys = np.zeros(slots + self.OVERFLOW, np.uint64)
        self._values = np.zeros(slots + self.OVERFLOW, np.int64)

    def keeps(self, keys: np.ndarray) -> np.ndarray:
        return keys & np.uint64(self.every - 1) == 0

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The value of each key, or -1."""
        values, slot = np.full(len(keys), -1, np.int64), (keys >> self._shift).astype(np.int64)
        left = self._keys[slot].nonzero()[0]  # most that are absent are seen to be at once
        slot = slot[left]
        while len(left):
            there = self._keys[slot[:, None] + self.CHUNK]
            hit = there == keys[left, None]
            found, goes_on = hit.any(1), there.all(1)
            values[left[found]] = self._values[slot[found] + hit[found].argmax(1)]
            goes_on &= ~found
            left, slot = left[goes_on], slot[goes_on] + len(self.CHUNK)
        return values

    def put(self, keys: np.ndarray, values: np.ndarray) -> bool:
        """Set the values of different keys. True if the table was thinned."""
        thinned = self.size + len(keys) > self.limit
        while self.size + len(keys) > self.limit:
            self.every *= 2
            kept = self.keeps(keys)
            keys, values = keys[kept], values[kept]
            self._rebuild(self._slots)
        while 2 * (self.size + len(keys)) > self._slots:
            self._rebuild(4 * self._slots if 2 * self._slots <= self.limit else 2 * self._slots)
        self._write(keys, values)
        return thinned

    def _rebuild(self, slots: int) -> None:
        keys, values = self.entries()
        kept = self.keeps(keys)
        self._allocate(slots)
        self._write(keys[kept], values[kept])

    def _write(self, keys: np.ndarray, values: np.ndarray) -> None:
        slot = (keys >> self._shift).astype(np.int64)
        while len(keys):
            free = self._keys[slot] == 0
            self._keys[slot[free]] = keys[free]  # of several that want one slot the last gets it
            done = self._keys[slot] == keys
            self._values[slot[done]] = values[done]
            self.size += int((free & done).sum())
            keys, values, slot = keys[~done], values[~done], slot[~done] + 1

    def entries(self) -> tuple[np.ndarray, np.ndarray]:
        used = self._keys.nonzero()[0]
        order = used[np.argsort(self._keys[used])]
        return self._keys[order], self._values[order]


def _stretches(row: np.ndarray, at: np.ndarray, earlier: np.ndarray, matched: np.ndarray) -> _Stretches:
    """Runs of neighbouring windows that lie the same distance behind where their text came earlier.

    Windows that overlap and come from different places say that their text is everywhere. Rows where that happens more
    than once in 64 tokens are repetitive by nature and give nothing: periods, tables, a handful of sentences in any
    order. In a copied document it happens where a third copy is cut in another place than the second.
    """
    if not matched.any():
        return _Stretches(*np.zeros((5, 0), np.int64))
    behind, follows = at - earlier, np.zeros(len(at), bool)
    both = matched[1:] & matched[:-1] & (row[1:] == row[:-1])
    follows[1:] = both & (behind[1:] == behind[:-1])
    first = (matched & ~follows).nonzero()[0]
    last = (matched & ~np.append(follows[1:], False)).nonzero()[0]
    span = at[last] - at[first] + LEDGER_WINDOW
    breaks = (both & ~follows[1:] & (at[1:] - at[:-1] < LEDGER_WINDOW)).nonzero()[0]
    num_rows = int(row[-1]) + 1
    covered = np.zeros(num_rows, np.int64)
    matched_at, matched_row = at[matched], row[matched]
    starts = np.append(True, matched_row[1:] != matched_row[:-1]).nonzero()[0]
    ends = np.append(starts[1:], len(matched_row)) - 1
    covered[matched_row[starts]] = matched_at[ends] - matched_at[starts] + LEDGER_WINDOW
    kept = (np.bincount(row[breaks], minlength=num_rows) * LEDGER_WINDOW <= covered)[row[first]]
    first, last = first[kept], last[kept]
    return _Stretches(row[first], at[first], span[kept], last - first + 1, earlier[first])


def _novelty(row: np.ndarray) -> float:
    """Share of a row's token pairs that are different: what it repeats of itself tells nothing of where it is from."""
    pairs = row[:-1].astype(np.int64) << 32 | row[1:].astype(np.int64)
    return len(np.unique(pairs)) / max(len(pairs), 1)


class _RowTable:
    """Where each row was consumed. `position`: its first token's number in the run, rising; `place`: a `Place` and the
    number of its micro-batch, counted from the start."""

    def __init__(self, position: np.ndarray | None = None, place: np.ndarray | None = None):
        self.size = 0
        self._position, self._place = np.zeros(0, np.int64), np.zeros((0, 5), np.int32)
        if position is not None:
            self.append(position, place)

    def append(self, position: np.ndarray, place: np.ndarray) -> None:
        size = self.size + len(position)
        if size > len(self._position):
            self._position = np.resize(self._position, max(1024, 2 * size))
            self._place = np.resize(self._place, (max(1024, 2 * size), 5))
        self._position[self.size : size], self._place[self.size : size] = position, place
        self.size = size

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return self._position[: self.size], self._place[: self.size]

    def find(self, position: np.ndarray) -> np.ndarray:
        """The number of the row that holds each position."""
        return np.maximum(np.searchsorted(self.arrays[0], position, side="right") - 1, 0)

    def places(self, position: np.ndarray) -> np.ndarray:
        return self._place[self.find(position)]


class Recent(NamedTuple):
    """The rows looked at lately: how many, their tokens, whether all have one length, and the copies among them: one
    line each of position, tokens, tokens of surprise, distance, whether it is the whole row, position of the earlier
    text. Positions count the run's tokens in reading order."""

    num_rows: int
    num_tokens: int
    is_packed: bool
    copies: np.ndarray


class Ledger:
    """Fingerprints of what was consumed. Fed in the main process, once a step, with the rows of all ranks.

    `max_windows`, `max_rows`: entries kept of each kind, see the module. Every number and array is state.
    """

    def __init__(self, max_windows: int = LEDGER_MAX_WINDOWS, max_rows: int = LEDGER_MAX_ROWS):
        self._hash = _Hasher()
        self.tables = {"windows": _Table(max_windows, LEDGER_EVERY), "digests": _Table(max_rows)}
        self.tables |= {"eval_windows": _Table(max_windows), "eval_digests": _Table(max_rows)}
        self.rows = _RowTable()
        self.tokens = self.micro_steps = self.passes = self.eval_tokens = self._pass_start = self._near = 0
        self._resumed_at, self._was_repeating = -1, 0
        self._replay_rows = self._replay_tokens = self._replay_copied = 0
        self._recent, self._copies = np.zeros((0, 2), np.int64), np.zeros((0, 6), np.int64)
        # Of each eval row: start, length, surprise that more than half of it was copied with (tokens), step of a copy.
        self.eval_rows = np.zeros((0, 4), np.int64)
        self._eval_hits: dict[int, np.ndarray] = {}

    def observe_train(self, rows: Sequence[np.ndarray], places: Sequence[Place]) -> None:
        """`rows`: token ids without padding, 1-D, in reading order, all of one step; `places`: one for each."""
        assert len(rows) == len(places), "one place for each row"
        where = np.array([place for row, place in zip(rows, places, strict=True) if len(row)], np.int64)
        rows = [row for row in rows if len(row)]
        if not rows:
            return
        hashed = self._hash(rows)
        position = self.tokens + hashed.start
        kept = self.tables["windows"].keeps(hashed.key)
        row, at = hashed.row[kept], hashed.at[kept] + self.tokens
        num_windows = np.bincount(row, minlength=len(rows))
        digested = self.tables["digests"].keeps(hashed.digest)
        judged = digested | (num_windows > 0)
        micro_steps, micro_step = np.unique(where[:, 0] << 32 | where[:, 2], return_inverse=True)
        self.rows.append(position[judged], np.column_stack([where, self.micro_steps + micro_step])[judged])
        self.micro_steps += len(micro_steps)

        earlier = self._first_seen("windows", hashed.key[kept], at)
        earlier_row = position.copy()
        earlier_row[digested] = self._first_seen("digests", hashed.digest[digested], position[digested])
        is_whole, matched = earlier_row < position, earlier < position[row]
        if is_whole.any() or matched.any():
            self._add_copies(rows, hashed, row, at, earlier, matched & ~is_whole[row], earlier_row, num_windows)
        self.tokens += int(hashed.length.sum())
        self._recent = np.concatenate([self._recent, np.column_stack([position, hashed.length])[judged]])
        self._forget()
        if self._resumed_at >= 0:
            self._follow_resume()
        if self.eval_tokens:
            self._match_eval(rows, hashed, int(where[0, 0]))

    def _first_seen(self, name: str, keys: np.ndarray, position: np.ndarray) -> np.ndarray:
        """The position of each key's first occurrence in this pass: its own if it is new."""
        table = self.tables[name]
        unique, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        found, own = table.find(unique), position[first]
        is_new = found < self._pass_start if self.passes else found < 0
        if table.put(unique[is_new], own[is_new]):
            self._drop_rows()
        return np.where(is_new, own, found)[inverse]

    def _drop_rows(self) -> None:
        """Forget where rows were consumed that no table points into any more."""
        used = [self.rows.find(self.tables[name].entries()[1]) for name in ("windows", "digests")]
        used = np.unique(np.concatenate([*used, self.rows.find(self._recent[:, 0])]))
        self.rows = _RowTable(*(array[used] for array in self.rows.arrays))

    def micro_steps_apart(self, copies: np.ndarray) -> np.ndarray:
        """Between each copy and the earlier row."""
        return self.rows.places(copies[:, 0])[:, 4] - self.rows.places(copies[:, 5])[:, 4]

    def _add_copies(self, rows, hashed, row, at, earlier, matched, earlier_row, num_windows) -> None:
        position = self.tokens + hashed.start
        whole, stretch = (earlier_row < position).nonzero()[0], _stretches(row, at, earlier, matched)
        novelty = np.zeros(len(rows))
        for index in {*whole, *stretch.row}:
            novelty[index] = _novelty(rows[index])
        length = hashed.length
        of_rows = position[whole], length[whole], length[whole] * novelty[whole], position[whole] - earlier_row[whole]
        tokens = length[stretch.row] * stretch.windows // np.maximum(num_windows[stretch.row], 1)
        surprise, distance = stretch.span * novelty[stretch.row], stretch.at - stretch.earlier
        of_stretches = position[stretch.row], tokens, surprise, distance
        copies = np.concatenate(
            [
                np.column_stack([*of_rows, np.ones_like(whole), earlier_row[whole]]),
                np.column_stack([*of_stretches, np.zeros_like(tokens), stretch.earlier]),
            ]
        ).astype(np.int64)
        self._copies = np.concatenate([self._copies, copies[copies[:, 3] < self._near] if self.passes else copies])

    def _forget(self) -> None:
        """Keep the newest RECENT_ROWS rows, more where they are short."""
        tokens_after = np.cumsum(self._recent[::-1, 1])[::-1]
        rows_after = np.arange(len(self._recent), 0, -1)
        self._recent = self._recent[(rows_after <= RECENT_ROWS) | (tokens_after <= RECENT_TOKENS)]
        if len(self._copies):
            self._copies = self._copies[self._copies[:, 0] >= self._recent[0, 0]]

    def recent(self, nats_per_token: float, since: int = 0) -> Recent:
        """The recent rows from position `since` on, and the copies in them that chance does not explain."""
        rows = self._recent[self._recent[:, 0] >= since]
        tokens = int(rows[:, 1].sum())
        copies = self._copies[self._copies[:, 0] >= since]
        copies = copies[copies[:, 2] > _least_tokens(self.tokens * tokens, nats_per_token)]
        return Recent(len(rows), tokens, len(rows) > 0 and bool((rows[:, 1] == rows[0, 1]).all()), copies)

    def _recent_share(self, since: int = 0) -> float:
        recent = self.recent(MAX_NATS, since)
        return recent.copies[:, 1].sum() / max(recent.num_tokens, 1)

    def begin_pass(self, tokens_in_pass: int | None = None) -> None:
        """A further pass over the data begins: text of earlier passes may come again. Call it at each pass.

        From here on only copies nearer than a tenth of a pass count (of `tokens_in_pass`, else of the tokens of the
        pass that ended), because lanes and workers do not end a pass together. So a stream that begins again within a
        declared pass after more than that is not seen, nor is one order used in every pass.
        """
        if self.tokens == self._pass_start:
            return
        self._near = int(NEAR * (tokens_in_pass or self.tokens - self._pass_start))
        self._pass_start, self.passes = self.tokens, self.passes + 1
        self._copies = self._copies[self._copies[:, 3] < self._near]

    def mark_resume(self, step: int) -> None:
        """Training goes on from a checkpoint of this step: if the next rows are copies, it is a replay."""
        self._was_repeating = int(self._recent_share() >= INFO_SHARE)
        self._resumed_at = self.tokens
        self._replay_rows = self._replay_tokens = self._replay_copied = 0

    @property
    def has_enough(self) -> bool:
        """To judge repetition by."""
        return self.rows.size >= LEDGER_MIN_ROWS and self.tokens >= LEDGER_MIN_TOKENS

    @property
    def can_see_replay(self) -> bool:
        """There was a resume, and enough rows since."""
        return self._replay_rows >= REPLAY_ROWS

    @property
    def replay_since(self) -> int | None:
        """The position of the resume, if the rows after it were copies and the copying still goes on."""
        is_replay = self._replay_rows >= REPLAY_ROWS and self._replay_copied >= REPLAY_SHARE * self._replay_tokens
        return self._resumed_at if self._resumed_at >= 0 and is_replay and not self._was_repeating else None

    def _follow_resume(self) -> None:
        recent = self.recent(MAX_NATS, self._resumed_at)
        if self._replay_rows < LEDGER_MIN_ROWS:
            self._replay_rows, self._replay_tokens = recent.num_rows, recent.num_tokens
            self._replay_copied = int(recent.copies[:, 1].sum())
        elif recent.copies[:, 1].sum() < INFO_SHARE * recent.num_tokens:
            self._resumed_at = -1

    def observe_eval(self, rows: Sequence[np.ndarray]) -> None:
        """Rows of the evaluation set, in any portions. Rows that are known already have no effect."""
        rows = [row for row in rows if len(row)]
        if not rows:
            return
        digests, known = self._hash(rows).digest, self.tables["eval_digests"]
        new = known.keeps(digests) & (known.find(digests) < 0)
        first = np.unique(digests, return_index=True)[1]
        chosen = np.sort(first[new[first]])
        if not len(chosen):
            return
        rows = [rows[index] for index in chosen]
        hashed = self._hash(rows)
        known.put(hashed.digest, len(self.eval_rows) + np.arange(len(rows)))
        windows = self.tables["eval_windows"]
        kept = windows.keeps(hashed.key).nonzero()[0]
        unique, first = np.unique(hashed.key[kept], return_index=True)
        is_new = windows.find(unique) < 0
        windows.put(unique[is_new], self.eval_tokens + hashed.at[kept[first]][is_new])
        start, zeros = self.eval_tokens + hashed.start, np.zeros_like(hashed.start)
        self.eval_rows = np.concatenate([self.eval_rows, np.column_stack([start, hashed.length, zeros, zeros])])
        self.eval_tokens += int(hashed.length.sum())
        self._match_train(rows, hashed, len(self.eval_rows) - len(rows))

    def _match_train(self, rows, hashed: _Hashed, first_row: int) -> None:
        """New eval rows against the train rows before them, of which only the kept windows are known.

        A copy goes on beyond its kept windows, `every` tokens on either side in the mean: that much is added, up to
        half a window.
        """
        stretch, more = self._matches("windows", hashed), min(self.tables["windows"].every, LEDGER_WINDOW // 2)
        for index, at, span, earlier in zip(stretch.row, stretch.at, stretch.span, stretch.earlier, strict=True):
            step, start = int(self.rows.places(earlier)[0]), at - hashed.start[index]
            surprise = span * _novelty(rows[index])
            self._hit(first_row + index, max(start - more, 0), start + span + more, surprise, step)
        earlier_rows = self.tables["digests"].find(hashed.digest)
        for index in (earlier_rows >= 0).nonzero()[0]:
            step, length = int(self.rows.places(earlier_rows[index])[0]), len(rows[index])
            self._hit(first_row + index, 0, length, length * _novelty(rows[index]), step)

    def _match_eval(self, rows, hashed: _Hashed, step: int) -> None:
        """Train rows against all windows of the eval rows, at any alignment, and whole."""
        stretch = self._matches("eval_windows", hashed)
        starts = self.eval_rows[:, 0]
        for index, span, at in zip(stretch.row, stretch.span, stretch.earlier, strict=True):
            eval_row = int(np.searchsorted(starts, at, side="right")) - 1
            start = at - starts[eval_row]
            self._hit(eval_row, start, start + span, span * _novelty(rows[index]), step)
        eval_rows = self.tables["eval_digests"].find(hashed.digest)
        for index in (eval_rows >= 0).nonzero()[0]:
            length = len(rows[index])
            self._hit(int(eval_rows[index]), 0, length, length * _novelty(rows[index]), step)

    def _matches(self, name: str, hashed: _Hashed) -> _Stretches:
        """Stretches of these rows that the table has."""
        table = self.tables[name]
        kept = table.keeps(hashed.key) if table.every > 1 else slice(None)
        row, at, earlier = hashed.row[kept], hashed.at[kept], table.find(hashed.key[kept])
        return _stretches(row, at, earlier, earlier >= 0)

    def _hit(self, eval_row: int, start: int, stop: int, surprise: float, step: int) -> None:
        """Tokens `start` to `stop` of an eval row were in training."""
        hits = self._eval_hits.setdefault(int(eval_row), np.zeros(self.eval_rows[eval_row, 1], np.int32))
        np.maximum(hits[start:stop], int(surprise), out=hits[start:stop])
        middle = (len(hits) - 1) // 2  # more than half of the tokens have at least this
        self.eval_rows[eval_row, 2:] = np.partition(hits, middle)[middle], step

    def state(self) -> dict[str, np.ndarray]:
        """Arrays for `np.savez`, as large as what was seen."""
        state = {name: np.asarray(value) for name, value in vars(self).items() if isinstance(value, (int, np.ndarray))}
        for name, table in self.tables.items():
            state[f"{name}.keys"], state[f"{name}.values"] = table.entries()
            state[f"{name}.sampling"] = np.array([table.limit, table.every])
        state["rows.position"], state["rows.place"] = (array.copy() for array in self.rows.arrays)
        state["hits.row"] = np.array(sorted(self._eval_hits), np.int64)
        state["hits.surprise"] = np.concatenate(
            [np.zeros(0, np.int32), *(self._eval_hits[row] for row in state["hits.row"])]
        )
        return state

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> "Ledger":
        ledger = cls()
        for name, value in list(vars(ledger).items()):
            if isinstance(value, int):
                setattr(ledger, name, int(state[name]))
            elif isinstance(value, np.ndarray):
                setattr(ledger, name, np.array(state[name]))
        for name in ledger.tables:
            limit, every = (int(number) for number in state[f"{name}.sampling"])
            ledger.tables[name] = _Table(limit, every)
            ledger.tables[name].put(state[f"{name}.keys"], state[f"{name}.values"])
        ledger.rows = _RowTable(state["rows.position"], state["rows.place"])
        stops = np.cumsum(ledger.eval_rows[state["hits.row"], 1])
        hits = np.split(state["hits.surprise"], stops[:-1])
        ledger._eval_hits = {int(row): part.copy() for row, part in zip(state["hits.row"], hits, strict=False)}
        return ledger


def _least_tokens(pairs: int, nats_per_token: float) -> float:
    """Tokens that a copy must have more of, so that chance does not explain it among so many pairs of positions."""
    nats = min(nats_per_token, MAX_NATS)
    return (math.log(max(pairs, 1)) + CHANCE_NATS) / nats if nats > 0 else math.inf


def check_repetition(
    ledger: Ledger, step: int, tokens_seen: int, nats_per_token: float, num_workers: int | None = None
) -> Finding | None:
    """The share of the recent tokens that are copies of what was consumed before in this pass.

    `nats_per_token`: what a token of this text tells, the mean loss of an n-gram model over all tokens so far (score,
    then learn), not of recent tokens, which copies make easy. `num_workers`: of the DataLoader, for the wording.
    Silent until LEDGER_MIN_ROWS rows with LEDGER_MIN_TOKENS tokens; after a resume REPLAY_ROWS rows are enough.
    """
    since = ledger.replay_since
    recent = ledger.recent(nats_per_token, since or 0)
    enough = recent.num_rows >= LEDGER_MIN_ROWS and recent.num_tokens >= LEDGER_MIN_TOKENS
    if not len(recent.copies) or (since is None and not enough):
        return None
    copied, is_whole = recent.copies[:, 1], recent.copies[:, 4] == 1
    is_near = is_whole & (ledger.micro_steps_apart(recent.copies) < FEW_MICRO_STEPS)
    share, whole, near = (copied[which].sum() / recent.num_tokens for which in (copied > 0, is_whole, is_near))
    warn = WARN_SHARE_NEAR if ledger.passes else WARN_SHARE
    is_aligned = near >= ALIGNED_SHARE and _is_spread(recent, is_near)
    is_aligned |= nats_per_token >= WHOLE_NATS and whole >= WHOLE_SHARE and _is_spread(recent, is_whole)
    is_aligned &= recent.is_packed and not ledger.passes
    least = warn if ledger.passes else INFO_SHARE
    if share < least and not is_aligned:
        return None
    cause, evidence = _origin(ledger, recent.copies, num_workers)
    others = (
        "the stream ended and began again",
        "DataLoader workers or ranks read the same data",
        "the corpus holds its documents more than once",
    )
    if since is not None:
        cause = "the data's position was not restored: after resuming, data came round again"
    then, now = evidence["first_consumed"], evidence["again"]
    return Finding(
        "repeated_data" if since is None else "resume_replay",
        "warning" if share >= warn or is_aligned or since is not None else "info",
        step,
        tokens_seen,
        found=f"{share:.0%} of the last {recent.num_tokens:,} tokens are copies, last of step {then['step']} rank "
        f"{then['rank']} micro-step {then['micro_step']} at step {now['step']} rank {now['rank']} micro-step "
        f"{now['micro_step']}",
        expected=f"under {least:.0%}" + (" from within a tenth of a pass" if ledger.passes else ""),
        likely_causes=(cause, *(other for other in others if not cause.startswith(other[:16]))),
        action="count the documents that the loader gives out: verify-data, or a set of their indices",
        evidence=evidence
        | {
            "share": float(share),
            "whole_row_share": float(whole),
            "near_whole_row_share": float(near),
            "recent_rows": recent.num_rows,
            "recent_tokens": recent.num_tokens,
            "nats_per_token": nats_per_token,
            "sampled_one_in": ledger.tables["windows"].every,
            "passes_declared": ledger.passes,
        },
    )


def _is_spread(recent: Recent, which: np.ndarray) -> bool:
    """Whether these copies are many, and over so much of the recent tokens that one long document is not enough."""
    starts = recent.copies[which, 0]
    return len(starts) >= ALIGNED_ROWS and bool(starts[-1] - starts[0] >= ALIGNED_SPREAD * recent.num_tokens)


def _origin(ledger: Ledger, copies: np.ndarray, num_workers: int | None) -> tuple[str, dict]:
    """Where most of the copied tokens come from, as a likely cause, and its numbers."""
    tokens, distance = copies[:, 1], copies[:, 3]
    now, then = ledger.rows.places(copies[:, 0]), ledger.rows.places(copies[:, 5])
    micro_steps, same_rank = ledger.micro_steps_apart(copies), now[:, 1] == then[:, 1]
    near = micro_steps < (num_workers or FEW_MICRO_STEPS)
    by_ranks = tokens[near & ~same_rank].sum() / tokens.sum()
    by_workers = tokens[near & same_rank & (micro_steps > 0)].sum() / tokens.sum()
    typical = float(np.median(distance))
    same_distance = tokens[abs(distance - typical) <= 0.01 * typical].sum() / tokens.sum()
    if by_ranks > 0.5:
        cause = "ranks read the same data"
    elif by_workers > 0.5:
        workers = f", {num_workers} of them" if num_workers else ""
        cause = (
            "the same rows are given again a few micro-batches later: the iterator is begun anew, or does not advance"
            if num_workers == 0
            else f"DataLoader workers each read the whole data{workers}"
        )
    elif same_distance > 0.9:
        cause = f"the stream ended after {typical:,.0f} tokens and began again in the same order"
    else:
        cause = f"the stream ended and began again in another order, about {typical:,.0f} tokens later, undeclared"
    return cause, {
        "first_consumed": {name: int(value) for name, value in zip(Place._fields, then[-1], strict=False)},
        "again": {name: int(value) for name, value in zip(Place._fields, now[-1], strict=False)},
        "typical_distance_tokens": typical,
        "share_at_this_distance": float(same_distance),
        "share_between_ranks": float(by_ranks),
        "share_between_near_micro_steps": float(by_workers),
    }


def check_overlap(ledger: Ledger, step: int, tokens_seen: int, nats_per_token: float) -> Finding | None:
    """Eval rows of which more than half was in training, before or after the first evaluation, at any alignment."""
    if not len(ledger.eval_rows):
        return None
    level = ledger.eval_rows[:, 2]
    covered = (level > _least_tokens(ledger.tokens * ledger.eval_tokens, nats_per_token)).nonzero()[0]
    share = len(covered) / len(level)
    if len(covered) < OVERLAP_ROWS or share < OVERLAP_WARN:
        return None
    return Finding(
        "train_eval_overlap",
        "error" if share >= OVERLAP_ERROR else "warning",
        step,
        tokens_seen,
        found=f"{len(covered)} of {len(level)} eval rows ({share:.1%}) were in the training data for more than half",
        expected=f"under {OVERLAP_WARN:.0%}",
        likely_causes=(
            "the train stream reads the held-out documents",
            "the data was split after it was shuffled or multiplied",
            "the corpus holds copies of its documents",
        ),
        action="do not trust the eval loss; take the held-out documents out of the training data",
        evidence={
            "eval_rows": len(level),
            "eval_rows_covered": len(covered),
            "share": share,
            "first_covered_eval_rows": covered[:10].tolist(),
            "steps_of_a_copy": ledger.eval_rows[covered[:10], 3].tolist(),
            "eval_tokens": ledger.eval_tokens,
            "nats_per_token": nats_per_token,
        },
    )
