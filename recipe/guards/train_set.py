"""What packed rows of a training set that can be indexed show: rows that overlap, a part of the set that is in it
twice, passes that draw the same rows. Only lists and `datasets.Dataset` are read: to read another kind may change what
it gives next."""

import logging
import sys
import time
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from recipe.guards.batches import IGNORE_INDEX, SHORTEST_PROMPT
from recipe.guards.copies import WINDOW
from recipe.guards.fingerprints import EVERY, hash_rows

logger = logging.getLogger("recipe.guards")

# How much of a set is read, and for how long. Chosen; 2M tokens in 2,048 tensors were read, hashed and judged in 0.1
# to 0.5 s of processor time.
MAX_TOKENS, MAX_ROWS, SECONDS = 1 << 21, 1 << 14, 1.0
# Tokens that two rows have to share to overlap, and pairs of rows that are looked at. Derived: 16 tokens agree by
# chance in less than one of 10^6 pairs where a token tells 1 nat; half of all pairs never do so at one distance.
LEAST_SHARED, PAIRS = 16, 64
# Of the windows in a copied part, those that are copies from the one distance: the rest are copies of text that is
# elsewhere too. Chosen, not measured.
DENSE = 0.8
# Of the tokens of a row that are in the row before too: as of recent tokens in general, see `repetition.Repetition`.
INFO_SHARE, WARN_SHARE = 0.10, 0.25
# A part that comes twice: share of what was read, rows, EOS. Chosen, not measured; a book or licence that comes twice
# is one document.
TWICE_SHARE, TWICE_ROWS, TWICE_DOCUMENTS = 0.04, 8, 4
# A pass that draws more of the set than this leaves out what does not fill a batch. Chosen, not measured.
MOST_OF_SET = 0.9


class Twice(NamedTuple):
    """`[start, stop)`: tokens of the rows laid end to end that repeat those `distance` before. `documents`: EOS in
    them."""

    start: int
    stop: int
    distance: int
    documents: int


def read_packed(dataset) -> np.ndarray | None:
    """The first rows, int64 `[rows, block]`; None where they are of different lengths, padded, partly unscored, no
    mappings with `input_ids`, or fewer than two."""
    if not is_plain(dataset):
        return None
    until, rows = time.monotonic() + SECONDS, []
    for number in range(min(len(dataset), MAX_ROWS)):
        ids = packed_ids(dataset[number])
        if ids is None or len(ids) < 2 * LEAST_SHARED or (rows and len(ids) != len(rows[0])):
            return None
        rows.append(ids)
        if len(rows) * len(ids) >= MAX_TOKENS or time.monotonic() > until:
            break
    return np.stack(rows) if len(rows) > 1 else None


def is_plain(dataset) -> bool:
    if isinstance(dataset, (list, tuple)):
        return True
    library = sys.modules.get("datasets")  # a dataset of it means that it is loaded
    return library is not None and type(dataset) is library.Dataset and dataset.format["type"] != "custom"


def packed_ids(row) -> np.ndarray | None:
    """None for a row that has no 1-D `input_ids`, or of which a part is masked or not scored."""
    if not isinstance(row, Mapping) or row.get("input_ids") is None:
        return None
    ids, mask, labels = (
        None if row.get(n) is None else np.asarray(row[n]) for n in ("input_ids", "attention_mask", "labels")
    )
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        return None
    if (mask is not None and not mask.all()) or (
        labels is not None and (labels == IGNORE_INDEX).sum() > SHORTEST_PROMPT
    ):
        return None
    return ids.astype(np.int64, copy=False)


def overlap(rows: np.ndarray) -> int:
    """Tokens at a row's beginning that are the end of the row before, the same number in most rows; else 0."""
    before = np.unique(np.linspace(0, len(rows) - 2, PAIRS).astype(int))
    shared = [shared_tokens(rows[number], rows[number + 1]) for number in before]
    counts = np.bincount(shared)
    counts[0] = 0
    most = int(counts.argmax())
    return most if counts[most] > len(before) / 2 else 0


def shared_tokens(first: np.ndarray, second: np.ndarray) -> int:
    """The tokens that end `first` and begin `second`, at least LEAST_SHARED; 0 where there are none, or text that
    repeats itself."""
    beginnings = np.lib.stride_tricks.sliding_window_view(first, LEAST_SHARED)
    places = np.flatnonzero((beginnings == second[:LEAST_SHARED]).all(axis=1))
    if len(places) != 1 or not places[0] or not np.array_equal(first[places[0] :], second[: len(first) - places[0]]):
        return 0
    return len(first) - int(places[0])


def find_twice(rows: np.ndarray, eos_ids: tuple[int, ...]) -> Twice | None:
    """The part of the rows, laid end to end, that repeats an earlier part in its order: that of the commonest distance
    between two places with the same text."""
    tokens = rows.ravel()
    _, at, key = hash_rows([tokens]).windows(EVERY)
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    distance = at - at[first][inverse]
    found, counts = np.unique(distance[distance > 0], return_counts=True)
    if not len(found):
        return None
    commonest = found[counts.argmax()]
    copied = at[distance == commonest]
    start, stop = int(copied[0]), int(copied[-1]) + WINDOW
    if len(copied) < DENSE * ((at >= start) & (at < stop)).sum() or commonest < stop - start:  # not dense, or periodic
        return None
    return Twice(start, stop, int(commonest), int(np.isin(tokens[start:stop], eos_ids).sum()))


def judge(shape: tuple[int, int], overlap: int, twice: Twice | None) -> dict | None:
    """A finding's texts and numbers. `shape`: of the rows that were read; `overlap` tokens of each are the end of the
    row before; a part of the set is in it `twice`."""
    (rows, block), evidence = shape, {"rows_read": shape[0], "block": shape[1]}
    if overlap >= INFO_SHARE * block:
        return {
            "severity": "warning" if overlap >= WARN_SHARE * block else "info",
            "found": f"rows overlap by {overlap} of {block} tokens",
            "expected": "no overlap",
            "causes": ("a stride shorter than a block", "on purpose: overlapping windows"),
            "action": "set the stride to the block's length, or count the tokens that are new",
            "evidence": evidence | {"share": overlap / block, "overlap_tokens": overlap},
        }
    tokens = twice.stop - twice.start if twice is not None else 0
    if tokens < max(TWICE_SHARE * rows * block, TWICE_ROWS * block) or twice.documents < TWICE_DOCUMENTS:
        return None
    first, last = twice.start // block, (twice.stop - 1) // block
    return {
        "severity": "warning",
        "found": f"rows {first:,} to {last:,} repeat earlier ones",
        "expected": "text once",
        "causes": ("a file is listed twice", "on purpose: a part that counts twice"),
        "action": "list each file once; for several passes set num_train_epochs",
        "evidence": evidence | {"share": tokens / (rows * block), "tokens": tokens} | twice._asdict(),
    }


def judge_order(pass_tokens: int, set_tokens: int, knows_passes: bool) -> dict:
    """The same, of a pass that has drawn a part of the rows as the one before had. `knows_passes`: of what draws."""
    share = pass_tokens / set_tokens
    return {
        "severity": "warning" if knows_passes else "info",
        "found": f"the same {share:.0%} of the rows in one order again",
        "expected": "other rows",
        "causes": ("set_epoch is not called", "a fixed order on purpose"),
        "action": "call set_epoch of the sampler or dataset at the beginning of each pass",
        "evidence": {"tokens_in_pass": int(pass_tokens), "tokens_in_set": int(set_tokens)},
    }


def knows_passes(samplers: list, dataset) -> bool:
    """Whether one of them is told, or counts, which pass it is in."""
    return any(hasattr(each, name) for each in (*samplers, dataset) for name in ("epoch", "set_epoch"))


class TrainSet:
    """What is known of a training set on the main process. `of_set`: digests of its first rows; `tokens`: of all, 0
    where they are not known; `share`: of them, that are in it twice. `knows_passes`: what draws from it has a number
    of the pass. Of passes: digests of their first rows, `before` and `now`; tokens of the one that ended."""

    STATE = ("before", "now", "pass_tokens")
    LENGTH = 64  # rows of a pass. Chosen, not measured

    def __init__(self, knows_passes: bool = False):
        self.of_set, self.before, self.now = np.zeros((3, 0), np.int64)
        self.tokens = self.pass_tokens = 0
        self.share, self.knows_passes = 0.0, knows_passes

    def read(self, dataset, eos_ids: tuple[int, ...]) -> dict | None:
        """What `judge` says of its first rows."""
        try:
            rows = read_packed(dataset)
        except Exception as error:  # the user's own rows
            logger.debug("the training set is not read: %s: %s", type(error).__name__, str(error))
            return None
        if rows is None:
            return None
        self.of_set, self.tokens = hash_rows(list(rows)).digest, len(dataset) * rows.shape[1]
        found = judge(rows.shape, overlap(rows), find_twice(rows, eos_ids))
        self.share = found["evidence"]["share"] if found else 0.0
        return found

    def state(self) -> dict[str, np.ndarray]:
        return {f"train_set.{name}": np.array(getattr(self, name)) for name in self.STATE}

    def load(self, state: dict[str, np.ndarray]) -> None:
        for name in self.STATE:
            setattr(self, name, np.array(state[f"train_set.{name}"]))

    def begin_pass(self, tokens: int) -> None:
        """`tokens`: of the pass that ended."""
        if not tokens:
            return
        self.before, self.now, self.pass_tokens = self.now, self.now[:0], tokens

    def observe(self, digests: np.ndarray) -> dict | None:
        """Of the next rows. What `judge_order` says, once, where a pass drew a part of the set as the pass before had,
        in no regular order."""
        if len(self.now) == self.LENGTH or not self.tokens:
            return None
        self.now = np.concatenate([self.now, digests])[: self.LENGTH]
        if len(self.now) < self.LENGTH or self.pass_tokens > MOST_OF_SET * self.tokens:
            return None
        is_same = np.array_equal(self.before, self.now) and not self.is_regular()
        return judge_order(self.pass_tokens, self.tokens, self.knows_passes) if is_same else None

    def is_regular(self) -> bool:
        """Whether the rows follow one another in the set at one distance, or it cannot be told."""
        order = np.argsort(self.of_set, kind="stable")
        place = np.searchsorted(self.of_set, self.now, sorter=order)
        row = order[np.minimum(place, len(order) - 1)]
        return bool((self.of_set[row] != self.now).any() or np.ptp(np.diff(row)) == 0)
