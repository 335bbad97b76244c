"""The envelope against a dictionary, its limits and state, and its two guards on hand-written curves."""

import io
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipe.guards import envelope as module
from recipe.guards.envelope import (
    Envelope,
    EnvelopeLoss,
    check_above_envelope,
    check_below_envelope,
    starts_untrained,
)
from recipe.guards.thresholds import ORDERS

NAN = float("nan")


class DictionaryEnvelope:
    """The same model, token by token."""

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size
        self.grams, self.followed, self.types = Counter(), Counter(), Counter()

    def observe(self, rows, scored):
        losses, count = [0.0] * ORDERS, 0
        for row, targets in zip(rows, scored, strict=True):
            for place, token in enumerate(row):
                is_scored = place > 0 and targets[place]
                count += is_scored
                for order, nats in enumerate(self._step([None] * (ORDERS - 1) + list(row[:place]), token)):
                    losses[order] += nats if is_scored else 0.0
        return count, losses

    def _step(self, before, token):
        probability, nats = 1 / self.vocab_size, []
        for order in range(ORDERS):
            context = (order, *before[len(before) - order :])
            seen, followed, types = self.grams[context, token], self.followed[context], self.types[context]
            if followed:
                probability = (seen + types * probability) / (followed + types)
            nats.append(-math.log(probability))
            self.grams[context, token] += 1
            self.followed[context] += 1
            self.types[context] += seen == 0
        return nats


def everything(rows):
    return [np.ones(len(row), bool) for row in rows]


def random_rows(seed, count=40, vocab_size=20, longest=30):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, rng.integers(1, longest)) for _ in range(count)]


def as_calls(rows, sizes):
    starts = np.cumsum([0, *sizes])
    return [rows[start : start + size] for start, size in zip(starts, sizes, strict=False) if rows[start:]]


@st.composite
def corpora(draw):
    vocab_size = draw(st.integers(1, 6))
    row = st.lists(st.tuples(st.integers(0, vocab_size - 1), st.booleans()), max_size=25)
    calls = draw(st.lists(st.lists(row, max_size=6), min_size=1, max_size=5))
    return vocab_size, [
        ([np.array([t for t, _ in r], np.int64) for r in c], [np.array([s for _, s in r], bool) for r in c])
        for c in calls
    ]


@settings(max_examples=100, deadline=None)
@given(corpora(), st.integers(1, 40))
def test_every_token_is_scored_by_exactly_what_lies_before_it(corpus, slice_tokens):
    vocab_size, calls = corpus
    fast, slow = Envelope(vocab_size), DictionaryEnvelope(vocab_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SLICE", slice_tokens)
        for rows, scored in calls:
            loss, (count, nats) = fast.observe(rows, scored), slow.observe(rows, scored)
            if not count:
                assert loss is None
                continue
            means = np.array(nats) / count
            # Float summation: sums of at most 150 terms, each good to 1e-15.
            found = (loss.tokens, loss.unigram, loss.bigram, loss.floor)
            floor = min(means.min(), math.log(vocab_size))
            assert found == pytest.approx((count, means[0], means[1], floor), rel=1e-11, abs=1e-11)


def test_it_is_exact_while_the_table_grows():
    """80 rows of up to 300 tokens: the table is doubled several times, within and between calls."""
    rows = random_rows(1, count=80, vocab_size=200, longest=300)
    fast, slow = Envelope(200), DictionaryEnvelope(200)
    for part in as_calls(rows, [1, 2, 30, 1, 46]):
        loss, (count, nats) = fast.observe(part, everything(part)), slow.observe(part, everything(part))
        assert loss.tokens == count
        assert (loss.unigram, loss.bigram, loss.floor) == pytest.approx(
            (nats[0] / count, nats[1] / count, min(min(nats) / count, math.log(200))), rel=1e-11
        )


def test_repetition_inside_one_call_is_credited():
    row = np.tile(np.arange(8), 64)
    loss = Envelope(4096).observe([row], everything([row]))
    assert loss.floor < 0.2 and loss.unigram > 2


def test_contexts_do_not_cross_rows_and_first_tokens_are_not_scored():
    alone, together = Envelope(10), Envelope(10)
    rows = [np.array([1, 2]), np.array([3]), np.array([4, 5])]
    first = alone.observe(rows, everything(rows))
    assert first.tokens == 2 and alone.tokens_seen == 5
    crossed = together.observe([np.concatenate(rows)], [np.ones(5, bool)])
    assert crossed.tokens == 4


def test_what_is_not_scored_is_learned():
    rows = [np.tile(np.arange(5), 20)]
    silent, judged = Envelope(50), Envelope(50)
    assert silent.observe(rows, [np.zeros(100, bool)]) is None
    judged.observe(rows, everything(rows))
    assert silent.observe(rows, everything(rows)) == judged.observe(rows, everything(rows))


@pytest.mark.parametrize("rows", [[], [np.array([], int)], [np.array([3])]])
def test_nothing_to_score(rows):
    assert Envelope(10).observe(rows, everything(rows)) is None


def test_continues_from_its_state_bit_for_bit():
    calls = as_calls(random_rows(2), [7, 3, 20, 10])
    envelope = Envelope(20, max_entries=1 << 20, max_tokens=10_000)
    for part in calls[:2]:
        envelope.observe(part, everything(part))
    file = io.BytesIO()
    np.savez(file, **envelope.state())
    file.seek(0)
    restored = Envelope.from_state(np.load(file))
    for part in calls[2:]:
        assert restored.observe(part, everything(part)) == envelope.observe(part, everything(part))
    assert restored.tokens_seen == envelope.tokens_seen and restored.max_tokens == 10_000
    again = Envelope.from_state(restored.state())  # a state of a restored one
    assert again.observe(calls[0], everything(calls[0])) == restored.observe(calls[0], everything(calls[0]))


def test_the_state_has_the_size_of_what_was_learned():
    envelope, rows = Envelope(4096), [np.arange(1000)]
    assert sum(array.nbytes for array in envelope.state().values()) < 200
    envelope.observe(rows, everything(rows))
    assert sum(array.nbytes for array in envelope.state().values()) < 2 * 1000 + 200


def test_a_full_table_stops_it_and_frees_its_memory():
    envelope, rows = Envelope(4096, max_entries=6000), [np.arange(1000)]
    assert envelope.observe(rows, everything(rows)) is not None
    assert envelope.observe(rows, everything(rows)) is None
    assert "6,000" in envelope.stopped and len(envelope._grams.keys) == 1
    assert envelope.observe(rows, everything(rows)) is None


def test_max_tokens_stop_it_after_the_call_that_reaches_them():
    envelope, rows = Envelope(4096, max_tokens=1500), [np.arange(1000)]
    assert envelope.observe(rows, everything(rows)) and envelope.stopped is None
    assert envelope.observe(rows, everything(rows)) and "1,500" in envelope.stopped
    assert envelope.observe(rows, everything(rows)) is None


def test_a_small_vocabulary_is_judged_for_a_short_time():
    """A model of bytes sees further than five of them, and passes the floor in time."""
    assert Envelope(256).max_tokens == 256_000 and Envelope(4096).max_tokens == 4_096_000
    assert Envelope(32_000).max_tokens == 20_000_000


def test_the_first_reason_to_stop_stays_and_is_kept_in_the_state():
    envelope = Envelope(4096)
    envelope.observe([np.arange(100)], [np.ones(100, bool)])
    envelope.stop("pass 2 begins")
    envelope.stop("again")
    restored = Envelope.from_state(envelope.state())
    assert restored.stopped == envelope.stopped == "pass 2 begins" and restored.tokens_seen == 100


@pytest.mark.parametrize("token", [-100, 10])
def test_it_does_not_judge_tokens_outside_of_the_vocabulary(token):
    envelope = Envelope(10)
    assert envelope.observe([np.array([1, token])], [np.ones(2, bool)]) is None
    assert "vocabulary" in envelope.stopped


def test_on_random_tokens_the_floor_stays_at_what_a_model_can_reach():
    """A 5-gram alone would lie 0.6 above ln V here, a unigram of a large vocabulary 0.4, and a healthy model under
    them."""
    rows = list(np.random.default_rng(3).integers(0, 300, (200, 128)))
    loss = Envelope(300).observe(rows, everything(rows))
    assert loss.floor == math.log(300) < loss.unigram


# --- the guards


def below(losses, floors, **kwargs):
    steps = list(range(1, len(losses) + 1))
    return check_below_envelope(steps, [2048 * step for step in steps], losses, floors, **kwargs)


def test_below_fires_when_a_full_window_is_under_the_floor():
    finding = below([4.0] * 5 + [1.25] * 10, [4.56] * 15)
    assert finding.id == "loss_below_envelope" and finding.severity == "warning" and finding.step == 15
    assert "1.25" in finding.found and "4.56" in finding.expected and "not shifted" in finding.likely_causes[0]
    assert finding.evidence["mean_floor"] == pytest.approx(4.56) and finding.tokens_seen == 15 * 2048


def test_below_waits_for_its_window_and_for_finite_values():
    assert below([1.0] * 9, [4.0] * 9) is None
    assert below([], []) is None
    assert below([1.0] * 9 + [NAN], [4.0] * 10) is None
    assert below([1.0] * 10, [4.0] * 9 + [NAN]) is None


def test_below_is_silent_within_its_margin_and_for_a_short_dip():
    assert below([3.75] * 10, [4.0] * 10) is None
    assert below([3.65] * 10, [4.0] * 10) is not None
    assert below([5.0] * 9 + [1.0], [4.0] * 10) is None
    assert below([0.0] * 10, [0.1] * 10) is None  # one sentence for ever: both know it


# DESIGN's figures of a 6M model: step-wise curves between its four points.
POINTS = (82_000, 164_000, 573_000, 819_000)


@pytest.mark.parametrize(("losses", "fires"), [((6.78, 6.59, 5.45, 5.39), False), ((4.02, 1.25, 0.02, 0.01), True)])
def test_below_tells_the_healthy_run_from_the_one_without_label_shift(losses, fires):
    tokens = np.arange(82_000, 819_000, 2048)
    curve, floors = (list(np.interp(tokens, POINTS, values)) for values in (losses, (5.06, 4.56, 3.86, 3.59)))
    found = [below(curve[:end], floors[:end]) is not None for end in range(10, len(curve))]
    assert all(found) if fires else not any(found)


def above(losses, unigram=6.6, bigram=4.6, learning_rate=3e-3):
    steps = list(range(1, len(losses) + 1))
    parallel = ([2048 * step for step in steps], losses, [unigram] * len(losses), [bigram] * len(losses))
    return check_above_envelope(steps, *parallel, len(losses), learning_rate * len(losses))


def test_above_fires_on_a_model_that_stays_at_the_unigram():
    finding = above([6.62] * 400)
    assert finding.id == "loss_above_envelope" and finding.severity == "warning" and finding.step == 400
    assert "6.62" in finding.found and "6.60" in finding.expected and "4.60" in finding.expected
    assert finding.evidence["learning_rate_sum"] == pytest.approx(1.2)


def test_above_is_silent_where_context_does_not_help():
    assert above([5.71] * 400, unigram=5.71, bigram=6.2) is None
    assert above([5.71] * 400, unigram=5.71, bigram=5.5) is None


def test_above_is_silent_on_the_healthy_plateau_and_while_learning_rates_were_too_small_to_learn():
    assert above([6.7] * 150) is None
    assert above([10.3] * 1000, learning_rate=1e-5) is None


def test_above_is_silent_while_the_loss_falls_and_once_it_is_under():
    assert above(list(np.linspace(10.0, 6.7, 400))) is None
    assert above([5.5] * 400) is None


def test_above_waits_for_finite_values():
    assert above([6.62] * 399 + [NAN]) is None


@pytest.mark.parametrize(
    ("first_loss", "unigram", "vocab_size", "untrained"),
    [
        (8.36, 6.9, 4096, True),
        (7.85, 6.9, 4096, True),  # copies, with tied embeddings
        (16.0, 7.5, 50304, True),  # an unscaled head
        (3.3, 7.5, 50257, False),  # GPT-2
        (5.72, 5.9, 300, True),  # random tokens
    ],
)
def test_starts_untrained(first_loss, unigram, vocab_size, untrained):
    assert starts_untrained(first_loss, EnvelopeLoss(2048, unigram, 6.0, 5.5), vocab_size) is untrained
