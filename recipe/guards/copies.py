"""Which copied stretches of text mean that rows come again: not those that chance explains, and not shared text.

Shared text: a system prompt in every row, several answers to one prompt, templates. Such a stretch begins where its
text began earlier (at the same place of its row, or at the start of a document), and its row or document ends in
another way than any before. Or it is one of a few texts that occur again and again, in rows that hold new text too:
then also in rows that hold nothing else, where a header was cut.
"""

import math

import numpy as np

# Tokens of a window. Chosen, not measured: near the 50 tokens of Lee et al. 2022.
WINDOW = 64
# Recent rows that hold the same copied text beside new text, from which on it is shared. Chosen, not measured: a
# stream that has begun again gives each text once, workers that read the same as often as there are of them.
POPULAR = 5
# An n-gram model that has learned nothing yet says ln V for any text, so no more than this is believed: the shortest
# copy that counts has then 18 tokens at a million tokens seen. Chosen, not measured.
MAX_NATS = 2.0
# Derived: a copy counts when chance would give it less than e^-10 times among all pairs of positions.
CHANCE_NATS = 10
COUNTS, SHARED, BESIDE_NEW = 0, 1, 2  # what a copied stretch is


def find_stretches(row, at, earlier, matched) -> np.ndarray:
    """Runs of neighbouring windows that lie the same distance behind where their text came earlier, `[5, runs]`: row,
    place of the first window, tokens to the last one's end, kept windows, place of the first one's text earlier.

    Windows that overlap and come from different places say that their text is everywhere. Rows where that happens more
    than once in 64 tokens are repetitive by nature and give nothing: periods, tables, a handful of sentences in any
    order. In a copied document it happens where a third copy is cut in another place than the second.
    """
    if not matched.any():
        return np.zeros((5, 0), np.int64)
    behind, follows = at - earlier, np.zeros(len(at), bool)
    both = matched[1:] & matched[:-1] & (row[1:] == row[:-1])
    follows[1:] = both & (behind[1:] == behind[:-1])
    first = (matched & ~follows).nonzero()[0]
    last = (matched & ~np.append(follows[1:], False)).nonzero()[0]
    breaks = (both & ~follows[1:] & (at[1:] - at[:-1] < WINDOW)).nonzero()[0]
    matched_at, matched_row = at[matched], row[matched]
    starts = np.append(True, matched_row[1:] != matched_row[:-1]).nonzero()[0]
    ends = np.append(starts[1:], len(matched_row)) - 1
    covered = np.zeros(int(row[-1]) + 1, np.int64)
    covered[matched_row[starts]] = matched_at[ends] - matched_at[starts] + WINDOW
    kept = (np.bincount(row[breaks], minlength=len(covered)) * WINDOW <= covered)[row[first]]
    first, last = first[kept], last[kept]
    return np.stack([row[first], at[first], at[last] - at[first] + WINDOW, last - first + 1, earlier[first]])


def novelty(row: np.ndarray) -> float:
    """Share of a row's token pairs that are different: what it repeats of itself tells nothing of where it is from."""
    pairs = row[:-1].astype(np.int64) << 32 | row[1:].astype(np.int64)
    pairs.sort()
    return (np.count_nonzero(pairs[1:] != pairs[:-1]) + 1) / len(pairs) if len(pairs) else 0.0


def least_tokens(pairs: int, nats_per_token: float) -> float:
    """Tokens that a copy must have more of, so that chance does not explain it among so many pairs of positions."""
    nats = min(nats_per_token, MAX_NATS)
    return (math.log(max(pairs, 1)) + CHANCE_NATS) / nats if nats > 0 else math.inf


def cut_into_documents(tokens: np.ndarray, row_starts: np.ndarray, eos_ids: tuple[int, ...]):
    """Starts and ends of the documents in rows laid end to end: after each EOS and at each row's start one begins."""
    after = np.flatnonzero(np.isin(tokens, eos_ids)) + 1 if eos_ids else row_starts
    starts = np.union1d(row_starts, after[after < len(tokens)])
    return starts, np.append(starts[1:], len(tokens))


def mark_shared(stretches, rows, units, are_new, is_same_place, every: int) -> np.ndarray:
    """What each of `stretches` is (see `find_stretches`).

    `rows`, `units`: starts and ends of rows and of their documents. `are_new`: of both, whether their last window is
    known to be new. `is_same_place`: the text began at the same place of its row earlier. `every`: one window in
    so many is kept, so that the ends of stretches are known to about that many tokens.
    """
    (row, at, span, *_), (row_is_new, unit_is_new) = stretches, are_new
    unit = np.searchsorted(units[0], at, side="right") - 1
    begins_document = (units[0][unit] > rows[0][row]) & (at - units[0][unit] <= 4 * every)
    is_cut = units[1][unit] == rows[1][row]  # by the row's end, so that its end says nothing
    ends_differently = np.where(is_cut, units[1][unit] - at - span >= 2 * WINDOW, unit_is_new[unit])
    covered = np.bincount(row, span + every, minlength=len(rows[0]))
    has_new_text = (rows[1] - rows[0] - covered >= every)[row]
    is_shared = (is_same_place & row_is_new[row]) | (begins_document & ends_differently)
    return np.where(is_shared, SHARED, np.where(has_new_text, BESIDE_NEW, COUNTS))


def without_shared(copies: np.ndarray, since: int) -> np.ndarray:
    """`copies`: tokens of surprise in the third column; the text's earlier position and what it is in the last ones.
    Whole rows stay, which the fifth column tells."""
    start, kind = copies[:, -2], copies[:, -1]
    stop = start + np.maximum(copies[:, 2], 1)
    starts, stops = np.sort(start[kind != COUNTS]), np.sort(stop[kind != COUNTS])
    beside_new = [  # so many copies beside new text hold the earlier text's first token, its middle, its last token
        np.searchsorted(starts, place, side="right") - np.searchsorted(stops, place, side="right")
        for place in (start, (start + stop) // 2, stop - 1)
    ]
    is_popular = (np.min(beside_new, axis=0) >= POPULAR) & (copies[:, 4] == 0)
    return copies[(copies[:, 0] >= since) & (kind != SHARED) & ~is_popular]
