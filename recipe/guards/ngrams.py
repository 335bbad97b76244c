"""N-gram models of the run's own tokens: a floor and a ceiling for the loss of a healthy model.

Ceiling: the loss of the tokens' frequencies alone. Floor: the loss of n-gram models of orders 1 to 5, the best of them
in each call. All are prequential (a token is scored, then learned), so nothing is scored on what it was learned from.
Interpolation is Witten and Bell's: P_k(w | c) = (n(cw) + t(c) P_{k-1}(w)) / (n(c) + t(c)), P_0 = 1 / vocabulary, where
n(c) counts how often c was followed and t(c) by how many different tokens. A row begins with a mark of its own.

Best of the orders, not the 5-gram: where the source is of low order, a 5-gram trusts what it saw once and stays
above what a model reaches. Smallest (model - floor) in windows of 10 steps, healthy Llamas of 0.3M to 0.7M parameters,
300 or 400 steps of 1,024 or 2,048 tokens, learning rates 1e-3 to 1e-2, in brackets against the 5-gram alone:

    demo (3.1M parameters, 800 steps)  0.90 (0.89)     random tokens                   -0.01 (-0.75)
    English, 4k vocabulary             0.83 (0.62)     Markov of order 1, 30 states     0.01 (-0.44)
    Python code, 4k vocabulary         1.98 (1.93)     Markov of order 1, 300 states    0.16 (-0.40)
    English, bytes, to 307k tokens     0.41 (0.41)     five sentences in random order   0.00 (0.00)

The floor is never above ln V, the loss of a guess that needs no counts: of random tokens of a large vocabulary the
unigram says 0.4 more, since it has seen few of them, and a model that has learned nothing was under it (zoo).

A healthy model can go below the floor where it shares statistics between tokens and counts cannot: bigrams of rank 3,
-0.13 with 300 tokens, -0.51 with 2,000. Such synthetic data trips the guard. So would a model of bytes or characters
in time, since it sees further than 5 of them: judging ends after 1,000 tokens for each entry of the vocabulary.

Cost on one core of a Xeon: 0.8 to 2.4 us a token, at 0.1M tokens seen as at 10M. Grams a token at 1M and 10M tokens:
2.1 and 1.4 (4k vocabulary), 3.0 and 2.4 (32k), so 2^24 of them last for 6.7M tokens of the latter.
"""

import itertools
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from recipe.guards.batches import SCORED, SeenTokens
from recipe.guards.hashtable import HashTable

ORDERS = 5  # of n-grams, of which the best is the floor; measured for 5, see the table above
# Beyond them a model may know more than counts. Bytes have been measured so far, to 1,200 tokens for each.
TOKENS_PER_TYPE = 1000
# Where it also stops: grams (28 bytes each, 448 MiB in all) and tokens (40 MB in a checkpoint). Chosen, not
# measured, to bound memory.
MAX_GRAMS, MAX_TOKENS = 1 << 24, 20_000_000
# Steps whose mean says what context is worth, for the verdict. Chosen, not measured: noise of single batches is gone.
RECENT = 50
# A new model starts at ln(vocabulary), one that copies with tied embeddings at 0.94 of it (7.85 of 8.32, 6M
# parameters), GPT-2 on web text at 0.3 of it. Chosen between these.
UNTRAINED_SHARE = 0.75

# Tokens counted of one step. Chosen: 20 ms on the thread beside the training, and every step of the zoo's and of the
# demo's runs is counted whole.
STEP_TOKENS = 1 << 13
# One row in so many at least is counted for a floor of all tokens, from the drops between doublings of the tokens
# counted, 8,192 and more, of which there are two. The larger drop, times what is missing, is taken off. Measured on
# 0.3M to 0.6M tokens of English (32k vocabulary), Python (bytes) and a Markov source of order 1, one row in 2 to 8: 10
# steps' mean is at most 0.23 above the floor of all tokens (healthy models: 0.41 and more above that), and 0.1 to 2.2
# below it as a rule.
MAX_EVERY, FIRST_DOUBLING, MIN_DROPS = 8, 13, 2

SLICE = 1 << 14  # tokens learned at once: longer ones leave the cache, shorter ones pay numpy's overhead
ONE_TYPE = 1 << 32  # `followed` holds n(c) in its low half and t(c) in its high half


@dataclass(frozen=True)
class NgramLoss:
    """Mean nats a token over the `tokens` scored in one call; `floor` is the mean of the order with the lowest, and at
    most that of a uniform guess, which needs no counts."""

    tokens: int
    unigram: float
    bigram: float
    floor: float


class NgramModel:
    """Scores and learns the run's tokens in reading order. On a part of the rows it learns less than the model, and
    its floor is too high: see `NgramTap`.

    `stopped` says why it no longer judges, or None: `max_tokens` (at most 1,000 times the vocabulary) were seen, the
    table of grams is full, or `stop` was called (a second pass over the data begins, say). Its memory is free then.
    """

    def __init__(self, vocab_size: int, max_entries: int = MAX_GRAMS, max_tokens: int = MAX_TOKENS):
        self.vocab_size, self.max_entries = vocab_size, max_entries
        self.max_tokens = min(max_tokens, TOKENS_PER_TYPE * vocab_size)
        self.tokens_seen = 0
        self.stopped: str | None = None
        self._token_types = 0
        self._grams = _new_table(max_entries)
        self._tokens, self._lengths = (
            array("H" if vocab_size <= 1 << 16 else "I"),
            array("i"),
        )  # of all rows, for `state`

    def observe(self, rows: Sequence[np.ndarray], scored: Sequence[np.ndarray]) -> NgramLoss | None:
        """Score, then learn, token by token. All tokens are learned, those that `scored` marks are averaged.

        rows: 1-D arrays of token ids, of any lengths; contexts do not cross them. scored: arrays of bool, of the same
        lengths: is token i a target of the loss? A row's first token never is. None: nothing was scored, or it
        stopped. How rows are divided into calls does not matter.
        """
        lengths = np.array([len(row) for row in rows if len(row)], np.int32)
        if self.stopped or not len(lengths):
            return None
        tokens, targets = np.concatenate(rows), np.concatenate(scored).astype(bool)
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            return self.stop("token ids outside of the vocabulary")
        targets[np.cumsum(lengths) - lengths] = False
        self._keep(tokens, lengths)
        losses = self._learn(tokens.astype(np.uint64), lengths, targets)
        if self.tokens_seen >= self.max_tokens:
            self.stop(ENOUGH.format(self.max_tokens))
        num_scored = int(targets.sum())
        if losses is None or not num_scored:
            return None
        means = losses / num_scored
        return NgramLoss(
            num_scored, float(means[0]), float(means[1]), min(float(means.min()), math.log(self.vocab_size))
        )

    def stop(self, reason: str) -> None:
        if self.stopped is None:
            self.stopped, self._grams = reason, _new_table(0)
            del self._tokens[:], self._lengths[:]

    def state(self) -> dict[str, np.ndarray]:
        """For np.savez: the tokens seen, from which `from_state` learns again. 2 or 4 bytes a token, a tenth of the
        counts; loading takes 1.3 to 1.6 s per million tokens."""
        return {
            "limits": np.array([self.vocab_size, self.max_entries, self.max_tokens]),
            "tokens_seen": np.array(self.tokens_seen),
            "stopped": np.array(self.stopped or ""),
            "tokens": np.array(self._tokens),
            "lengths": np.array(self._lengths),
        }

    @classmethod
    def from_state(cls, state) -> "NgramModel":
        model = cls(*state["limits"].tolist())
        tokens, lengths = state["tokens"], state["lengths"]
        if len(tokens):
            model._keep(tokens, lengths)
            model._learn(tokens.astype(np.uint64), lengths, np.zeros(len(tokens), bool))
        model.tokens_seen = int(state["tokens_seen"])
        if str(state["stopped"]):
            model.stop(str(state["stopped"]))
        return model

    def _keep(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        self._tokens.frombytes(tokens.astype(self._tokens.typecode).tobytes())
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())

    def _learn(self, tokens: np.ndarray, lengths: np.ndarray, targets: np.ndarray) -> np.ndarray | None:
        """Sum of the targets' nats under each order; None when the table is full."""
        losses = np.zeros(ORDERS)
        for part, last in _slices(lengths):
            if self._grams.size + ORDERS * (part.stop - part.start) > self.max_entries:
                return self.stop(f"the table of {self.max_entries:,} grams is full")
            losses += self._learn_slice(tokens[part], last, np.flatnonzero(targets[part]))
        return losses

    def _learn_slice(self, tokens: np.ndarray, last: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """`last`: places of the rows' last tokens, `targets`: places to score. Arrays of shape (orders, tokens) hold
        what was known of each place's gram just before it."""
        shape = (ORDERS, len(tokens))
        groups = _group(self._grams.find_or_add(_hash_grams(tokens, last)))
        seen = _count(self._grams.columns["seen"], groups, np.ones(ORDERS * len(tokens), np.int64)).reshape(shape)
        is_new = seen == 0
        gains = np.ones(shape, np.int64)
        gains[:-1, :-1] += is_new[1:, 1:] * np.int64(ONE_TYPE)  # the gram one longer, one further, is a new one
        gains[:, last] = 0  # nothing follows
        followed = _count(self._grams.columns["followed"], groups, gains.ravel()).reshape(shape)

        types = self._token_types + np.cumsum(is_new[0]) - is_new[0]
        contexts = np.vstack([self.tokens_seen + targets + types[targets] * ONE_TYPE, followed[:-1, targets - 1]])
        self._token_types += int(is_new[0].sum())
        self.tokens_seen += len(tokens)
        return _losses(seen[:, targets], contexts, self.vocab_size)


def _new_table(max_entries: int) -> HashTable:
    return HashTable(max_entries, seen=np.uint32, followed=np.int64)


def _slices(lengths: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Whole rows of about SLICE tokens together, and where in them rows end."""
    ends, first = np.cumsum(lengths, dtype=np.int64), 0
    while first < len(ends):
        begin = int(ends[first] - lengths[first])
        stop = max(first + 1, int(np.searchsorted(ends, begin + SLICE, side="right")))
        yield slice(begin, int(ends[stop - 1])), ends[first:stop] - begin - 1
        first = stop


def _losses(seen: np.ndarray, contexts: np.ndarray, vocab_size: int) -> np.ndarray:
    """Sum of the nats under each order: `seen` is n(cw), `contexts` holds n(c) and t(c), each (orders, targets)."""
    losses, probability = np.zeros(ORDERS), 1 / vocab_size
    for order in range(ORDERS):
        followed, types = contexts[order] & (ONE_TYPE - 1), contexts[order] >> 32
        mixed = (seen[order] + types * probability) / np.maximum(followed + types, 1)
        probability = np.where(followed > 0, mixed, probability)
        losses[order] = -np.log(probability).sum()
    return losses


def _hash_grams(tokens: np.ndarray, last: np.ndarray) -> np.ndarray:
    """64-bit hashes of the grams that end at each place, order by order. The gram of order k at a row's start is the
    token after k - 1 marks."""
    keys = np.empty((ORDERS, len(tokens)), np.uint64)
    spread = tokens * np.uint64(0xD6E8FEB86659FD93)
    shorter = np.empty_like(spread)
    for order in range(ORDERS):
        if order:
            shorter[1:] = keys[order - 1, :-1]
            shorter[0] = shorter[last[:-1] + 1] = order
        else:
            shorter[:] = ORDERS
        key = shorter * np.uint64(0x9E3779B97F4A7C15) + spread
        key ^= key >> np.uint64(32)
        key *= np.uint64(0x94D049BB133111EB)
        keys[order] = key ^ (key >> np.uint64(29))
    return keys.ravel().view(np.int64)


def _group(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places sorted by gram and then by place, the starts of the groups in them, and the groups' grams."""
    bits = len(ids).bit_length()
    packed = np.sort((ids << bits) | np.arange(len(ids)))  # sorts several times faster than a stable argsort
    sorted_ids = packed >> bits
    starts = np.flatnonzero(np.diff(sorted_ids, prepend=-1))
    return packed & ((1 << bits) - 1), starts, sorted_ids[starts]


def _count(column: np.ndarray, groups: tuple[np.ndarray, np.ndarray, np.ndarray], gains: np.ndarray) -> np.ndarray:
    """What `column` says of each place's gram just before that place; adds the places' gains to it."""
    places, starts, grams = groups
    sorted_gains = gains[places]
    after = np.cumsum(sorted_gains)
    before = after - sorted_gains
    known, base = column[grams].astype(np.int64), before[starts]
    counts = np.empty(len(gains), np.int64)
    counts[places] = before + np.repeat(known - base, np.diff(starts, append=len(places)))
    column[grams] = known + np.append(base[1:], after[-1]) - base
    return counts


def starts_untrained(first_loss: float, first: NgramLoss, vocab_size: int) -> bool:
    """Whether the model knew nothing before its first step, so that the floor may judge it: its loss is near that of
    a uniform guess, or above what the frequencies of the first tokens alone give. If not, it was trained before, or it
    sees its target (the probes tell)."""
    return first_loss >= min(UNTRAINED_SHARE * math.log(vocab_size), first.unigram)


ENOUGH = "{:,} tokens were seen, beyond which a model may know more than counts"
NO_VOCABULARY = "the model names no embedding, so the size of its vocabulary is not known"
TRAINED_BEFORE = "the model was trained before on tokens that were not counted"


class NgramRows(NamedTuple):
    """Of one rank and step: `tokens`, all that it had; the chosen pieces of text, and which tokens are scored."""

    tokens: int
    rows: list[np.ndarray]
    scored: list[np.ndarray]


def choose_every(tokens_per_step: int) -> int:
    return max(1, math.ceil(tokens_per_step / STEP_TOKENS))


def choose_rows(tokens: Sequence[SeenTokens], every: int, step: int, rank: int, world_size: int) -> NgramRows:
    """One piece of text in `every`, by its number among all ranks' and by the step: every place of a step has its
    turn."""
    pieces = [piece for seen in tokens for piece in seen.pieces]
    chosen = [piece for number, piece in enumerate(pieces) if (number * world_size + rank + step) % every == 0]
    total = sum(len(ids) for ids, _ in pieces)
    return NgramRows(total, [ids for ids, _ in chosen], [flags & SCORED != 0 for _, flags in chosen])


class NgramTap:
    """The n-gram model fed with the run's steps, on the main process. Of the last step: `loss`, None where nothing was
    scored or it has stopped; `num_rows` counted; `floor`, what it would be with all of the run's tokens counted, None
    where that is not known. `recent`: unigram and bigram loss of the last steps.

    A floor of a part of the rows is too high. It falls with each doubling of the tokens counted: the largest drop so
    far, times the doublings that are missing, is taken off it (see MAX_EVERY).
    """

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.model = NgramModel(vocab_size)
        if not vocab_size:
            self.model.stop(NO_VOCABULARY)
        self.loss: NgramLoss | None = None
        self.floor: float | None = None
        self.num_rows = self.total = 0  # total: tokens of the run, counted or not
        self.recent: list[list[float]] = []
        self._has_begun = False
        self._doublings: list[list[float]] = []  # of tokens counted: sum of the floors, tokens

    @property
    def stopped(self) -> str | None:
        """Why it no longer judges."""
        return self.model.stopped

    @property
    def bounds(self) -> dict[str, float]:
        """`floor` and `ceiling` of the last step's loss, those that are known."""
        known = {"floor": self.floor, "ceiling": self.loss and self.loss.unigram}
        return {name: value for name, value in known.items() if value is not None}

    def observe(self, parts: Sequence[NgramRows], loss: float) -> None:
        """`parts`: of the ranks. `loss`: the training loss of the step, in nats per token."""
        self.total += sum(part.tokens for part in parts)
        rows = [row for part in parts for row in part.rows]
        scored = [row for part in parts for row in part.scored]
        self.num_rows, self.floor = len(rows), None
        self.loss = found = self.model.observe(rows, scored) if rows else None
        if self.total >= self.model.max_tokens:
            self.model.stop(ENOUGH.format(self.model.max_tokens))
        if found is None:
            return
        if not self._has_begun and not starts_untrained(loss, found, self.vocab_size):
            self.model.stop("the first loss is not that of an untrained model, so a floor for those says nothing")
        self._has_begun = True
        self.recent = [*self.recent[1 - RECENT :], [found.unigram, found.bigram]]
        self.floor = self._floor_of_all(found)

    def _floor_of_all(self, found: NgramLoss) -> float | None:
        missing = math.log2(self.total / max(self.model.tokens_seen, 1))
        if missing <= 0:
            return found.floor
        number = self.model.tokens_seen.bit_length()
        self._doublings += [[0.0, 0] for _ in range(number + 1 - len(self._doublings))]
        self._doublings[number][0] += found.floor * found.tokens
        self._doublings[number][1] += found.tokens
        means = [total / tokens for total, tokens in self._doublings[FIRST_DOUBLING:-1] if tokens]
        drops = [before - after for before, after in itertools.pairwise(means)]
        if len(drops) < MIN_DROPS or missing > math.log2(MAX_EVERY) + 0.01:
            return None
        return found.floor - max(0.0, *drops) * missing

    def save(self) -> dict:
        own = {"has_begun": self._has_begun, "recent": self.recent, "total": self.total, "doublings": self._doublings}
        return own | self.model.state()

    def load(self, state: dict) -> None:
        model = NgramModel.from_state(state)
        if model.vocab_size != self.vocab_size and self.vocab_size:
            raise ValueError(f"counts of a vocabulary of {model.vocab_size:,}, not {self.vocab_size:,}")
        self.model, self._has_begun, self.recent = model, bool(state["has_begun"]), state["recent"]
        self.total, self._doublings = int(state["total"]), state["doublings"]
