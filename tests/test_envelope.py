"""The n-gram model against a dictionary, its limits and state, and its guard on hand-written curves."""

import io
import json
import math
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipe.guards import ngrams as module
from recipe.guards.batches import SCORED, VALID, SeenTokens
from recipe.guards.envelope import LossBelowEnvelope
from recipe.guards.guard import CannotJudge
from recipe.guards.ngrams import (
    MAX_EVERY,
    ORDERS,
    STEP_TOKENS,
    NgramLoss,
    NgramModel,
    NgramTap,
    choose_rows,
    starts_untrained,
)
from tests.gpu.tokens import load_ids

NAN = float("nan")


class DictionaryModel:
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


@settings(max_examples=100)
@given(corpora(), st.integers(1, 40))
def test_every_token_is_scored_by_exactly_what_lies_before_it(corpus, slice_tokens):
    vocab_size, calls = corpus
    fast, slow = NgramModel(vocab_size), DictionaryModel(vocab_size)
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
    fast, slow = NgramModel(200), DictionaryModel(200)
    for part in as_calls(rows, [1, 2, 30, 1, 46]):
        loss, (count, nats) = fast.observe(part, everything(part)), slow.observe(part, everything(part))
        assert loss.tokens == count
        assert (loss.unigram, loss.bigram, loss.floor) == pytest.approx(
            (nats[0] / count, nats[1] / count, min(min(nats) / count, math.log(200))), rel=1e-11
        )


def test_repetition_inside_one_call_is_credited():
    row = np.tile(np.arange(8), 64)
    loss = NgramModel(4096).observe([row], everything([row]))
    assert loss.floor < 0.2 and loss.unigram > 2


def test_contexts_do_not_cross_rows_and_first_tokens_are_not_scored():
    alone, together = NgramModel(10), NgramModel(10)
    rows = [np.array([1, 2]), np.array([3]), np.array([4, 5])]
    first = alone.observe(rows, everything(rows))
    assert first.tokens == 2 and alone.tokens_seen == 5
    crossed = together.observe([np.concatenate(rows)], [np.ones(5, bool)])
    assert crossed.tokens == 4


def test_what_is_not_scored_is_learned():
    rows = [np.tile(np.arange(5), 20)]
    silent, judged = NgramModel(50), NgramModel(50)
    assert silent.observe(rows, [np.zeros(100, bool)]) is None
    judged.observe(rows, everything(rows))
    assert silent.observe(rows, everything(rows)) == judged.observe(rows, everything(rows))


@pytest.mark.parametrize("rows", [[], [np.array([], int)], [np.array([3])]])
def test_nothing_to_score(rows):
    assert NgramModel(10).observe(rows, everything(rows)) is None


def test_continues_from_its_state_bit_for_bit():
    calls = as_calls(random_rows(2), [7, 3, 20, 10])
    model = NgramModel(20, max_entries=1 << 20, max_tokens=10_000)
    for part in calls[:2]:
        model.observe(part, everything(part))
    file = io.BytesIO()
    np.savez(file, **model.state())
    file.seek(0)
    restored = NgramModel.from_state(np.load(file))
    for part in calls[2:]:
        assert restored.observe(part, everything(part)) == model.observe(part, everything(part))
    assert restored.tokens_seen == model.tokens_seen and restored.max_tokens == 10_000
    again = NgramModel.from_state(restored.state())  # a state of a restored one
    assert again.observe(calls[0], everything(calls[0])) == restored.observe(calls[0], everything(calls[0]))


def test_the_state_has_the_size_of_what_was_learned():
    model, rows = NgramModel(4096), [np.arange(1000)]
    assert sum(array.nbytes for array in model.state().values()) < 200
    model.observe(rows, everything(rows))
    assert sum(array.nbytes for array in model.state().values()) < 2 * 1000 + 200


def test_a_full_table_stops_it_and_frees_its_memory():
    model, rows = NgramModel(4096, max_entries=6000), [np.arange(1000)]
    assert model.observe(rows, everything(rows)) is not None
    assert model.observe(rows, everything(rows)) is None
    assert "6,000" in model.stopped and len(model._grams.keys) == 1
    assert model.observe(rows, everything(rows)) is None


def test_max_tokens_stop_it_after_the_call_that_reaches_them():
    model, rows = NgramModel(4096, max_tokens=1500), [np.arange(1000)]
    assert model.observe(rows, everything(rows)) and model.stopped is None
    assert model.observe(rows, everything(rows)) and "1,500" in model.stopped
    assert model.observe(rows, everything(rows)) is None


def test_a_small_vocabulary_is_judged_for_a_short_time():
    """A model of bytes sees further than five of them, and passes the floor in time."""
    assert NgramModel(256).max_tokens == 256_000 and NgramModel(4096).max_tokens == 4_096_000
    assert NgramModel(32_000).max_tokens == 20_000_000


def test_the_first_reason_to_stop_stays_and_is_kept_in_the_state():
    model = NgramModel(4096)
    model.observe([np.arange(100)], [np.ones(100, bool)])
    model.stop("pass 2 begins")
    model.stop("again")
    restored = NgramModel.from_state(model.state())
    assert restored.stopped == model.stopped == "pass 2 begins" and restored.tokens_seen == 100


@pytest.mark.parametrize("token", [-100, 10])
def test_it_does_not_judge_tokens_outside_of_the_vocabulary(token):
    model = NgramModel(10)
    assert model.observe([np.array([1, token])], [np.ones(2, bool)]) is None
    assert "vocabulary" in model.stopped


def test_on_random_tokens_the_floor_stays_at_what_a_model_can_reach():
    """A 5-gram alone would lie 0.6 above ln V here, a unigram of a large vocabulary 0.4, and a healthy model under
    them."""
    rows = list(np.random.default_rng(3).integers(0, 300, (200, 128)))
    loss = NgramModel(300).observe(rows, everything(rows))
    assert loss.floor == math.log(300) < loss.unigram


# --- a part of the rows


def english_steps(num_rows: int, rows_per_step: int, block: int = 64) -> list[SeenTokens]:
    ids = load_ids()[: num_rows * block].astype(np.int64).reshape(-1, block)
    ids = np.random.default_rng(0).permutation(ids)
    flags = np.full((rows_per_step, block), VALID | SCORED, np.uint8)
    return [SeenTokens(ids[at : at + rows_per_step], flags) for at in range(0, len(ids), rows_per_step)]


def test_every_row_has_its_turn_and_each_step_the_same_number_of_them():
    (seen,), chosen = english_steps(1200, 1200), []
    for step in range(4):
        parts = [choose_rows([seen], 4, step, rank, 2) for rank in range(2)]
        assert sum(len(part.rows) for part in parts) == 600
        assert parts[0].tokens == seen.ids.size
        chosen += [row.tobytes() for row in parts[0].rows]
    assert sorted(chosen) == sorted(row.tobytes() for row in seen.ids)


def test_the_floor_of_a_part_is_corrected_to_below_that_of_all(monkeypatch):
    monkeypatch.setattr(module, "FIRST_DOUBLING", 11)  # a small text
    taps = {every: NgramTap(32_000) for every in (1, 4)}
    floors = {every: [] for every in taps}
    for step, seen in enumerate(english_steps(2400, 40)):
        for every, tap in taps.items():
            tap.observe([choose_rows([seen], every, step, 0, 1)], 10.4)
            floors[every].append(tap.floor)
    assert taps[4].total == taps[1].total == 4 * taps[4].model.tokens_seen
    assert floors[4][0] is None and None not in floors[1]
    known = [(part, whole) for part, whole in zip(floors[4], floors[1], strict=True) if part is not None]
    assert len(known) >= 10 and np.mean([part - whole for part, whole in known]) < 0
    again = NgramTap(32_000)
    state = taps[4].save()
    arrays = {name: value for name, value in state.items() if isinstance(value, np.ndarray)}
    again.load(json.loads(json.dumps({name: state[name] for name in state.keys() - arrays.keys()})) | arrays)
    for tap in (again, taps[4]):
        tap.observe([choose_rows([seen], 4, 0, 0, 1)], 10.4)
    assert again.floor == taps[4].floor is not None


# --- the guard


def below(losses, floors):
    return LossBelowEnvelope.judge(losses, floors)


def test_below_fires_when_a_full_window_is_under_the_floor():
    finding = below([4.0] * 5 + [1.25] * 10, [4.56] * 15)
    assert finding.id == "loss_below_envelope" and finding.severity == "warning"
    assert "1.25" in finding.found and "4.56" in finding.expected and "not shifted" in finding.likely_causes[0]
    assert finding.evidence["mean_floor"] == pytest.approx(4.56)


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
    assert starts_untrained(first_loss, NgramLoss(2048, unigram, 6.0, 5.5), vocab_size) is untrained


@pytest.mark.parametrize("is_new", [True, False])
def test_a_model_that_was_trained_before_cannot_be_judged(is_new):
    with nullcontext() if is_new else pytest.raises(CannotJudge, match="trained before"):
        LossBelowEnvelope().setup(SimpleNamespace(is_new_model=is_new, step_size=(2048, 8)))


def test_steps_of_which_too_little_is_counted_cannot_be_judged():
    run = SimpleNamespace(is_new_model=True, step_size=(MAX_EVERY * STEP_TOKENS, 64))
    LossBelowEnvelope().setup(run)
    run.step_size = run.step_size[0] + 1, 64
    with pytest.raises(CannotJudge, match="65,536 tokens"):
        LossBelowEnvelope().setup(run)


def test_rows_of_which_few_tokens_are_scored_cannot_be_judged():
    """A class at the end of each row: its frequencies alone are below all n-grams of the text."""
    guard = LossBelowEnvelope()
    guard.state = {"losses": [], "floors": [], "is_noisy": False}

    def step(tokens):
        ngrams = SimpleNamespace(stopped=None, loss=NgramLoss(tokens, 5.0, 4.0, 3.0), floor=3.0, num_rows=4)
        return SimpleNamespace(ngrams=ngrams, record={"loss": 0.4}, num_labels=(0, 0, 0))

    with pytest.raises(CannotJudge, match="fewer than 8 tokens of a row are scored"):
        list(guard.observe(step(4)))
    for _ in range(LossBelowEnvelope.WINDOW):
        found = list(guard.observe(step(40)))
    assert found[0].id == "loss_below_envelope"
