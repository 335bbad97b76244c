"""Fingerprints of the rows that the model consumed: repetition, replay after a resume, overlap with the eval rows.

Copies. A copy is a run of kept windows of one row that all lie the same distance behind where their text came first.
Its tokens times the nats per token must exceed ln(pairs of positions compared) + 10, else chance explains it.
Repetitive text is no copy: its matches change their distance from window to window (`find_stretches`), and what a row
repeats of itself is not counted (`novelty`).

Memory: docs/guards.md has it in bytes. 16M tokens keep 1M windows. The table is full at 4.2M (67M tokens), and `every`
doubles each time: at 1 billion tokens it is 256, and a copied row of 1,024 tokens is seen with probability 0.98. Eval
rows: every window (fewer from 4M on). Different windows with the same hash: 1e-4 pairs in the first billion tokens.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from recipe.guards.copies import (
    COUNTS,
    MAX_NATS,
    WINDOW,
    find_stretches,
    least_tokens,
    mark_shared,
    novelty,
    without_shared,
)
from recipe.guards.fingerprints import Fingerprints, Hashed, Rates, hash_rows, join
from recipe.guards.hashtable import SampledTable

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


def find_copies(
    windows: SampledTable, digests: SampledTable, row, at, key, digest, start, length
) -> Iterator[tuple[int, int, int, int]]:
    """What the tables have of these rows: row, its first copied token, number of tokens, and their position there.
    `row`, `at`, `key`: of windows; `digest`, `start`, `length`: of the rows."""
    found = windows.find(key)
    for index, first, span, _, earlier in find_stretches(row, at, found, found >= 0).T:
        yield index, first, span, earlier
    whole = digests.find(digest)
    yield from ((index, start[index], length[index], whole[index]) for index in (whole >= 0).nonzero()[0])


def kinds_of(stretches, seen: Fingerprints, are_new, earlier_rows: _RowTable, tokens: int, every: int) -> np.ndarray:
    """See `copies.mark_shared`. `tokens`: before this step."""
    row, at, *others = stretches
    at, begin = at - tokens, earlier_rows.starts(others[-1])
    is_same_place = at - seen.start[row] == others[-1] - begin
    rows, documents = (seen.start, seen.start + seen.length), (seen.document_start, seen.document_stop)
    return mark_shared(np.stack([row, at, *others]), rows, documents, are_new, is_same_place, every)


class Ledger:
    """Fingerprints of what was consumed. Fed on the main process, once a step, with those of all ranks.

    `rates`: at which they are kept at first. `max_windows`, `max_rows`: entries kept of each kind. Every number, array
    and table is state.
    """

    def __init__(self, rates: Rates = Rates(), max_windows: int = MAX_WINDOWS, max_rows: int = MAX_ROWS):  # noqa: B008
        windows, rows = (max_windows, rates.windows), (max_rows, rates.rows)
        of_train = {"windows": windows, "digests": rows, "tails": rows}  # tails: last windows of rows and documents
        limits = of_train | {"eval_windows": (max_windows,), "eval_digests": (max_rows,)}
        self.tables = {name: SampledTable(*limit) for name, limit in limits.items()}
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

    def observe_train(self, parts: Sequence[Fingerprints | None]) -> int:
        """`parts`: of the ranks, in their order. Returns how many of the tokens are copies, shared text included."""
        parts = [part for part in parts if part is not None]
        if not parts:
            return 0
        seen = join(parts).thinned(self.tables["windows"].every, self.tables["digests"].every)
        position, at = self.tokens + seen.start, self.tokens + seen.at
        if not self.rows.has_room(len(position)):
            self._drop_rows()
        self.rows.append(position, np.column_stack([seen.place, self.micro_steps + seen.place[:, 2]]))

        earlier = self._first_seen("windows", seen.key, at)
        earlier_row = position.copy()
        whole = seen.digested
        earlier_row[whole] = self._first_seen("digests", seen.digest[whole], position[whole])
        are_new = self._are_new(seen)
        is_whole, matched = earlier_row < position, earlier < position[seen.row]
        copied = 0
        if is_whole.any() or matched.any():
            stretches = find_stretches(seen.row, at, earlier, matched & ~is_whole[seen.row])
            kinds = kinds_of(stretches, seen, are_new, self.rows, self.tokens, self.tables["windows"].every)
            copied = self._add_copies(seen, earlier_row, stretches, kinds)
        self.tokens += seen.tokens
        self.micro_steps += int(seen.place[:, 2].max(initial=-1)) + 1
        self._forget(np.column_stack([position, seen.length]))
        if self.resumed_at >= 0:
            self._follow_resume()
        if len(self.eval_rows):
            self._match_others(seen)
        return copied

    def _are_new(self, seen: Fingerprints) -> tuple[np.ndarray, np.ndarray]:
        """Whether each row, and each document, ends with a window that is known to be new."""
        kept = self.tables["tails"].keeps(seen.tail_key)
        end, is_new = self.tokens + seen.tail_stop[kept], np.zeros(len(kept) + 1, bool)  # the last: for -1
        is_new[:-1][kept] = self._first_seen("tails", seen.tail_key[kept], end) == end
        return is_new[seen.row_tail], is_new[seen.document_tail]

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

    def _add_copies(self, seen: Fingerprints, earlier_row, stretches: np.ndarray, kinds) -> int:
        """Rows that came before as a whole, and stretches of other rows. Returns their tokens."""
        position, length = self.tokens + seen.start, seen.length
        whole = (earlier_row < position).nonzero()[0]
        apart = (position - earlier_row)[whole]
        of_rows = [whole, length[whole], length[whole], apart, np.ones_like(whole), earlier_row[whole]]
        of_rows.append(np.full_like(whole, COUNTS))
        row, at, span, windows, earlier = stretches
        tokens = length[row] * windows // np.maximum(np.bincount(seen.row, minlength=len(length))[row], 1)
        of_stretches = [row, tokens, span, at - earlier, np.zeros_like(row), earlier, kinds]
        row, tokens, span, *others = np.hstack([of_rows, of_stretches])
        copies = np.column_stack([position[row], tokens, span * seen.novelty[row], *others]).astype(np.int64)
        self._copies = np.concatenate([self._copies, copies[copies[:, 3] < self._near] if self.passes else copies])
        return int(tokens.sum())

    def micro_steps_apart(self, copies: np.ndarray) -> np.ndarray:
        """Between each copy and the earlier row."""
        return self.rows.places(copies[:, 0])[:, 4] - self.rows.places(copies[:, 5])[:, 4]

    def _forget(self, newest: np.ndarray) -> None:
        """Keep the newest RECENT_ROWS rows, more where they are short, and all of the step's, `newest`."""
        self._recent = np.concatenate([self._recent, newest])
        tokens_after, rows_after = np.cumsum(self._recent[::-1, 1])[::-1], np.arange(len(self._recent), 0, -1)
        is_recent = (rows_after <= RECENT_ROWS) | (tokens_after <= RECENT_TOKENS)
        self._recent = self._recent[is_recent | (rows_after <= len(newest))]
        if len(self._copies) and len(self._recent):
            self._copies = self._copies[self._copies[:, 0] >= self._recent[0, 0]]

    def recent(self, nats_per_token: float, since: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """The recent rows from position `since` on (position, tokens), and the copies in them that are no shared text
        and that chance does not explain (see `_copies`)."""
        rows = self._recent[self._recent[:, 0] >= since]
        copies = without_shared(self._copies, since)
        pairs = self.tokens * int(rows[:, 1].sum())
        return rows, copies[copies[:, 2] > least_tokens(pairs, nats_per_token)]

    def begin_pass(self, tokens_in_pass: int | None = None) -> int:
        """From here on only copies nearer than NEAR of a pass count (of `tokens_in_pass`, else of the tokens of the
        pass that ended), because lanes and workers do not end a pass together. Returns those tokens."""
        if ended := self.tokens - self._pass_start:
            self._near = int(NEAR * (tokens_in_pass or ended))
            self._pass_start, self.passes = self.tokens, self.passes + 1
            self._copies = self._copies[self._copies[:, 3] < self._near]
        return ended

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
        _, at, keys = hashed.windows(windows.every)
        unique, first = np.unique(keys, return_index=True)
        windows.add(unique, self.eval_tokens + at[first])
        length = hashed.stop - hashed.start
        self.eval_rows = np.concatenate([self.eval_rows, np.column_stack([start, length, zeros, zeros])])
        self._eval_hits = np.append(self._eval_hits, np.zeros(length.sum(), np.int32))
        self._match_train(rows, hashed, len(self.eval_rows) - len(rows))

    def match_own(self, rows: Sequence[np.ndarray], step: int) -> None:
        """Train rows of the main process itself, of one step: all windows against the eval rows, and whole."""
        rows = [row for row in rows if len(row)]
        if not len(self.eval_rows) or not rows:
            return
        own = hash_rows(rows).all_of_rows(self.tables["eval_windows"].every)
        for index, _, span, at in find_copies(self.tables["eval_windows"], self.tables["eval_digests"], *own):
            self._hit(at, span, int(span * novelty(rows[index])), step)

    def _match_others(self, seen: Fingerprints) -> None:
        """Those of other ranks, of which only the kept windows are known."""
        is_other = seen.place[:, 1] > 0
        kept = self.tables["eval_windows"].keeps(seen.key) & is_other[seen.row]
        others = seen.row[kept], seen.at[kept], seen.key[kept], np.where(is_other, seen.digest, -1)
        others += seen.start, seen.length
        for index, _, span, at in find_copies(self.tables["eval_windows"], self.tables["eval_digests"], *others):
            self._hit(at, span, int(span * seen.novelty[index]), seen.place[index, 0], is_sampled=True)

    def _match_train(self, rows, hashed: Hashed, first_row: int) -> None:
        """New eval rows against the train rows before them, of which only the kept windows are known."""
        own, first = hashed.all_of_rows(self.tables["windows"].every), self.eval_rows[first_row, 0]
        for index, at, span, earlier in find_copies(self.tables["windows"], self.tables["digests"], *own):
            step = self.rows.places(earlier)[0]
            self._hit(first + at, span, int(span * novelty(rows[index])), step, is_sampled=True)

    def _hit(self, position: int, length: int, surprise: int, step: int, is_sampled: bool = False) -> None:
        """So many tokens of the eval rows, from `position` on, were in training. `is_sampled`: known by kept windows,
        beyond which a copy goes on by `every` tokens on either side in the mean; half a window at most is added."""
        eval_row = int(np.searchsorted(self.eval_rows[:, 0], position, side="right")) - 1
        start = position - self.eval_rows[eval_row, 0]
        beyond = min(self.tables["windows"].every, WINDOW // 2) if is_sampled else 0
        start, stop = max(start - beyond, 0), start + length + beyond
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
    def from_state(cls, state: dict[str, np.ndarray], rates: Rates = Rates()) -> "Ledger":  # noqa: B008
        """`rates`: of the run that goes on, whose steps may be of another size."""
        ledger = cls(rates)
        for name, value in list(vars(ledger).items()):
            if isinstance(value, (int, np.ndarray)):
                setattr(ledger, name, int(state[name]) if isinstance(value, int) else np.array(state[name]))
        for name, table in ledger.tables.items():
            limit, every = map(int, state[f"{name}.sampling"])
            ledger.tables[name] = table = SampledTable(limit, max(every, table.every))
            kept = table.keeps(state[f"{name}.keys"])
            table.add(state[f"{name}.keys"][kept], state[f"{name}.positions"][kept])
        ledger.rows = _RowTable(state["rows.position"], state["rows.place"])
        return ledger
