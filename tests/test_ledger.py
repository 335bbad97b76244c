"""The ledger on streams made by hand: repetition of every kind is named, healthy and repetitive text is left alone."""

import collections
import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipe.guards.copies import WINDOW
from recipe.guards.fingerprints import EVERY, fingerprint, hash_rows
from recipe.guards.guard import Finding
from recipe.guards.hashtable import HashTable, SampledTable
from recipe.guards.ledger import MIN_ROWS, MIN_TOKENS, Ledger
from recipe.guards.repetition import Repetition

NATS = 4.0
VOCAB = 2000


def text(seed: int, tokens: int) -> np.ndarray:
    """Zipf-distributed words in sentences that end with 1: never twice the same for long, like English."""
    rng = np.random.default_rng(seed)
    ids = 2 + np.minimum(rng.zipf(1.3, tokens), VOCAB - 3)
    ids[rng.random(tokens) < 0.05] = 1
    return ids.astype(np.int32)


def documents(seed: int, count: int, tokens: int = 300) -> list[np.ndarray]:
    return [text(1000 * seed + number, tokens) for number in range(count)]


def blocks(stream: np.ndarray, size: int = 128) -> list[np.ndarray]:
    return [stream[start : start + size] for start in range(0, len(stream) - size + 1, size)]


def pack(order: list[np.ndarray], size: int = 128, shift: int = 0) -> list[np.ndarray]:
    return blocks(np.concatenate(order)[shift:], size)


def check_repetition(ledger: Ledger, step: int, nats: float = NATS, num_workers: int | None = None) -> Finding | None:
    finding = Repetition.judge_repetition(ledger, nats, num_workers)
    return finding and replace(finding, step=step)


def check_overlap(ledger: Ledger, nats: float = NATS) -> Finding | None:
    return Repetition.judge_overlap(ledger, nats)


def observe(ledger: Ledger, rows, places, eos_ids=()) -> int:
    if places:
        ledger.match_own(rows, places[0][0])
    return ledger.observe_train([fingerprint(rows, places, eos_ids)])


def feed(ledger: Ledger, rows, start: int = 1, rows_per_step: int = 8, nats: float = NATS, eos_ids=()):
    """Feed the rows on one rank, two rows in a micro-batch, and give back the findings of all steps."""
    findings = []
    for number in range(0, len(rows), rows_per_step):
        step = start + number // rows_per_step
        part = rows[number : number + rows_per_step]
        observe(ledger, part, [(step, 0, index // 2, index % 2) for index in range(len(part))], eos_ids)
        findings.append(check_repetition(ledger, step, nats))
    return [finding for finding in findings if finding is not None]


def same_state(one: Ledger, other: Ledger) -> bool:
    ours, theirs = one.state(), other.state()
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def reloaded(ledger: Ledger, path) -> Ledger:
    np.savez(path / "ledger.npz", **ledger.state())
    with np.load(path / "ledger.npz") as state:
        return Ledger.from_state(state)


# --- shared text is silent, and rows that hold it and come again are not

EOS = np.array([1], np.int32)


def filled(seed: int, tokens: int) -> np.ndarray:
    """Text without an EOS."""
    return np.where((ids := text(seed, tokens)) == 1, 2, ids)


def dialogs(count: int, prompt, shortest: int = 5, longest: int = 300) -> list[np.ndarray]:
    """`prompt` is given a number. Answers are as short as a few tokens."""
    sizes = np.random.default_rng(0).integers(shortest, longest, count)
    return [np.concatenate([prompt(i), filled(9000 + i, size), EOS]) for i, size in enumerate(sizes)]


def system_prompt(number: int) -> np.ndarray:
    return filled(77, 200)


def prompt_of_four(number: int) -> np.ndarray:
    return filled(number // 4, 150)


def prompt_of_four_far_apart(number: int) -> np.ndarray:
    return filled(number % 200, 150)


def system_turn(number: int) -> np.ndarray:
    return np.concatenate([filled(77, 150), EOS, filled(5000 + number, 60)])


def template(number: int) -> np.ndarray:
    fields = [filled(1000 * part + number, 20 + number % 30) for part in (2, 3)]
    return np.concatenate([fields[0], filled(78, 90), fields[1], filled(79, 80)])


PROMPTS = [system_prompt, prompt_of_four, prompt_of_four_far_apart, system_turn, template]


@pytest.mark.parametrize("size", [0, 1024])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_shared_text_is_no_repetition(prompt, size):
    """In rows of their own, and packed."""
    order = dialogs(800, prompt, shortest=60 if prompt in (template, system_turn) else 5)
    assert feed(Ledger(), pack(order, size) if size else order, eos_ids=(1,)) == []


@pytest.mark.parametrize("size", [512, 1024])
@pytest.mark.parametrize("prompt", [system_prompt, template])
def test_shared_text_that_is_packed_without_eos_is_no_repetition(prompt, size):
    """Where documents begin is not known: the text is told by how often it comes beside new text."""
    order = [document[:-1] for document in dialogs(800, prompt, shortest=60)]
    assert feed(Ledger(), pack(order, size)) == []


@pytest.mark.parametrize("size", [0, 512])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_rows_with_shared_text_that_come_again_are_found(prompt, size):
    order = dialogs(150, prompt, shortest=60)
    found = feed(Ledger(), pack(order * 3, size, shift=7) if size else order * 3, eos_ids=(1,))
    # packed, the prompts are still shared text, and the answers are what comes again
    assert found[-1].severity == "warning" and found[-1].evidence["share"] > (0.35 if size else 0.5)


def headed(number: int) -> np.ndarray:
    return np.concatenate([filled(77, 100), filled(5000 + number, 100 + number % 200), EOS])


def footed(number: int) -> np.ndarray:
    return np.concatenate([filled(5000 + number, 30 + number % 120), filled(77, 80), EOS])


@pytest.mark.parametrize("size", [128, 256])
@pytest.mark.parametrize("document", [headed, footed])
def test_a_header_or_footer_in_short_packed_rows_is_no_warning(document, size):
    """Rows that are drawn in another order. A header longer than the rows gives equal rows too, which count."""
    rows = pack([document(number) for number in range(300)], size)
    order = np.random.default_rng(0).permutation(len(rows))
    found = feed(Ledger(), [rows[place] for place in order], eos_ids=(1,))
    assert {finding.severity for finding in found} <= {"info"}


def test_a_tail_of_most_of_each_row_is_silent():
    rows = [np.concatenate([filled(5000 + number, 38), filled(77, 90)]) for number in range(400)]
    assert feed(Ledger(), rows) == []


def test_whole_rows_are_named_by_their_own_rule():
    rows = blocks(text(0, 60_000))
    again = [rows[number - 100] if number % 14 == 0 and number > 100 else row for number, row in enumerate(rows)]
    found = feed(Ledger(), again)[-1]
    assert found.severity == "warning" and found.evidence["share"] < 0.1
    assert found.found.startswith("whole rows again: ") and found.expected == "under 4%"


def test_rows_drawn_with_replacement_are_information():
    rows, ledger = blocks(text(0, 40_000)), Ledger()
    feed(ledger, rows * 2)
    finding = Repetition.judge_repetition(ledger, NATS, is_drawn_again=True)
    assert finding.severity == "info" and "replacement" in finding.likely_causes[0]


def test_rows_that_overlap_are_found():
    """The first half of each row is the second half of the last: the same text, at another place."""
    stream = filled(3, 100_000)
    rows = [stream[start : start + 512] for start in range(0, 99_000, 256)]
    assert feed(Ledger(), rows)[-1].severity == "warning"


def test_a_few_documents_among_new_ones_are_found():
    new = [np.concatenate([filled(20_000 + number, 200), EOS]) for number in range(300)]
    few = [np.concatenate([filled(number, 250), EOS]) for number in range(12)]
    order = [document for number, each in enumerate(new) for document in (each, few[number % 12])]
    assert any(finding.severity == "warning" for finding in feed(Ledger(), pack(order, 512), eos_ids=(1,)))


# --- silent


def test_a_stream_that_does_not_repeat_is_silent():
    assert feed(Ledger(), blocks(text(0, 100_000))) == []


def test_random_tokens_are_silent():
    rng = np.random.default_rng(0)
    assert feed(Ledger(), list(rng.integers(0, 50, (800, 128))), nats=np.log(50)) == []


def five_sentences(rng) -> np.ndarray:
    sentences = [np.arange(20) + 20 * number for number in range(5)]
    return np.concatenate([sentences[rng.integers(5)] for _ in range(8000)])


def few_words(rng) -> np.ndarray:
    return rng.choice([7, 8, 9], 160_000, p=[0.98, 0.01, 0.01])


def periodic(rng) -> np.ndarray:
    return np.tile(rng.integers(0, VOCAB, 37), 4000)


def markov(rng) -> np.ndarray:
    """From each of 50 tokens to the next, sometimes to any: 0.19 nats a token."""
    jumps = rng.random(160_000) < 0.03
    return np.cumsum(np.where(jumps, rng.integers(1, 50, 160_000), 1)) % 50


def prequential_losses(stream: list[int]) -> np.ndarray:
    """Mean loss so far of a trigram model that scores each token, then learns it: what the callback passes."""
    counts, total, losses = collections.Counter(), 0.0, []
    for context, token in zip(itertools.pairwise(stream), stream[2:], strict=False):
        total -= math.log((counts[context, token] + 1 / VOCAB) / (counts[context] + 1))
        counts[context, token] += 1
        counts[context] += 1
        losses.append(total / (len(losses) + 1))
    return np.array(losses)


@pytest.mark.parametrize("block_size", [64, 128, 512])
@pytest.mark.parametrize("source", [five_sentences, few_words, periodic, markov])
def test_repetitive_text_is_silent(source, block_size):
    """From the first steps on, when the caller's model has learned little."""
    stream, ledger = source(np.random.default_rng(1))[:100_000], Ledger()
    losses, rows = prequential_losses(stream.tolist()), blocks(stream, block_size)
    for step in range(len(rows) // 8):
        nats = losses[min((step + 1) * 8 * block_size, len(losses)) - 1]
        assert feed(ledger, rows[8 * step : 8 * step + 8], start=step, nats=nats) == []


@pytest.mark.parametrize("source", [five_sentences, few_words, markov])
def test_repetitive_text_in_long_rows_is_silent_whatever_the_caller_says(source):
    assert feed(Ledger(), blocks(source(np.random.default_rng(1)), 512), nats=np.log(VOCAB)) == []


def test_constant_rows_are_silent():
    assert feed(Ledger(), [np.full(128, 5)] * 300, nats=np.log(VOCAB)) == []


def test_boilerplate_is_silent():
    """A licence of 100 tokens at the head of every fourth document of 1,000 to 2,000."""
    rng, licence = random.Random(0), text(9, 100)
    order = []
    for number in range(200):
        order += [licence] * (number % 4 == 0) + [text(100 + number, rng.randint(1000, 2000))]
    assert feed(Ledger(), pack(order, 512)) == []


def test_one_document_twice_is_silent():
    one = text(5, 5_000)
    assert feed(Ledger(), pack([text(1, 60_000), one, text(2, 60_000), one, text(3, 60_000)])) == []


def test_one_long_document_twice_is_no_warning_even_where_it_is_aligned():
    """12,800 tokens twice, rows aligned: 10 % of the recent tokens, to be known."""
    one = text(5, 12_800)
    findings = feed(Ledger(), pack([text(1, 128_000), one, text(2, 64_000), one, text(3, 64_000)]))
    assert {finding.severity for finding in findings} <= {"info"}


def test_without_a_measure_of_the_text_it_is_silent():
    rows = blocks(text(0, 20_000))
    assert feed(Ledger(), rows * 2, nats=0.0) == [] and feed(Ledger(), rows * 2, nats=float("nan")) == []


def test_waits_for_enough_rows():
    findings = feed(Ledger(), blocks(text(0, 128 * 20)) * 10, rows_per_step=1)
    assert findings[0].step == MIN_TOKENS // 128
    findings = feed(Ledger(), blocks(text(0, 512 * 20), 512) * 10, rows_per_step=1)
    assert findings[0].step == MIN_ROWS


# --- fires


def test_the_stream_ended_and_began_again():
    """take(N) under an endless loader."""
    rows = blocks(text(0, 60_000))
    finding = feed(Ledger(), rows * 2)[-1]
    assert (finding.id, finding.severity) == ("repeated_data", "warning")
    period = 128 * len(rows)
    assert f"in the same order, after {period:,} tokens" in finding.likely_causes[0]
    assert finding.evidence["first_consumed"]["step"] < finding.evidence["again"]["step"]
    last = len(rows) - 1
    assert finding.evidence["first_consumed"] == {
        "step": 1 + last // 8,
        "rank": 0,
        "micro_step": last % 8 // 2,
        "row": last % 2,
    }


def test_a_shifted_pack_of_the_same_documents():
    docs = documents(1, 200)
    finding = feed(Ledger(), pack(docs, 256) + pack(docs, 256, shift=77))[-1]
    assert finding.evidence["near_whole_row_share"] == 0 and finding.severity == "warning"


def test_the_same_documents_in_another_order():
    docs = documents(2, 200)
    again = random.Random(0).sample(docs, len(docs))
    finding = feed(Ledger(), pack(docs, 256) + pack(again, 256))[-1]
    assert "in another order" in finding.likely_causes[0]


def test_workers_that_each_read_the_whole_data():
    """DataLoader with 4 workers over an unsharded IterableDataset: each micro-batch comes from the next worker."""
    rows = blocks(text(0, 80_000))
    pairs = [rows[start : start + 2] for start in range(0, len(rows) - 1, 2)]
    stream = [row for pair in pairs for _ in range(4) for row in pair]
    ledger = Ledger()
    feed(ledger, stream)
    finding = check_repetition(ledger, 9, num_workers=4)
    assert finding.likely_causes[0] == "each worker reads all the data: 4 DataLoader workers"
    assert finding.evidence["share"] == pytest.approx(0.75, abs=0.01)
    assert feed(Ledger(), stream)[-1].likely_causes[0].startswith("each worker reads all the data")


def on_ranks(ledger: Ledger, rows_of_rank, rows_per_step: int = 4):
    """All ranks' rows of a step at once, as the main process gathers them."""
    finding = None
    for step, start in enumerate(range(0, len(rows_of_rank[0]), rows_per_step)):
        rows, places = [], []
        for rank, of_rank in enumerate(rows_of_rank):
            for index, row in enumerate(of_rank[start : start + rows_per_step]):
                rows.append(row)
                places.append((step, rank, index // 2, index % 2))
        observe(ledger, rows, places)
        finding = check_repetition(ledger, step) or finding
    return finding


def test_ranks_that_read_the_same_data():
    rows = blocks(text(0, 40_000))
    finding = on_ranks(Ledger(), [rows, rows])
    assert finding.likely_causes[0] == "ranks read the same data" and finding.severity == "warning"
    first, again = finding.evidence["first_consumed"], finding.evidence["again"]
    assert first == again | {"rank": 0} and again["rank"] == 1


def test_ranks_that_read_different_data_are_silent():
    rows = blocks(text(0, 80_000))
    assert on_ranks(Ledger(), [rows[::2], rows[1::2]]) is None


def test_one_rank_of_eight_reads_anothers_rows():
    """12 % of the tokens only, but whole rows, exactly aligned."""
    rows = blocks(text(0, 320_000))
    ranks = [rows[rank::8] for rank in range(8)]
    finding = on_ranks(Ledger(), [*ranks[:7], ranks[3]])
    assert finding.severity == "warning" and finding.evidence["share"] < 0.25


def test_rows_shorter_than_a_window():
    rows = blocks(text(0, 30_000), 48)
    assert feed(Ledger(), rows) == []
    finding = feed(Ledger(), rows * 2, rows_per_step=32)[-1]
    assert "in the same order" in finding.likely_causes[0] and finding.evidence["share"] > 0.4


def test_rows_of_uneven_length_and_empty_rows():
    rng = np.random.default_rng(0)
    rows = [text(seed, int(length)) for seed, length in enumerate(rng.integers(0, 300, 400))]
    assert feed(Ledger(), rows) == []
    assert feed(Ledger(), rows * 2)[-1].severity == "warning"
    observe(Ledger(), [], [])


def test_recovers_when_new_data_comes():
    rows = blocks(text(0, 30_000))
    ledger = Ledger()
    assert feed(ledger, rows * 2)
    feed(ledger, blocks(text(1, 400_000)), start=1000)
    assert check_repetition(ledger, 2000) is None


# --- passes


def test_declared_passes_in_new_orders_are_silent():
    docs, ledger = documents(3, 300), Ledger()
    for number in range(4):
        order = random.Random(number).sample(docs, len(docs))
        if number:
            ledger.begin_pass(None)
        assert feed(ledger, pack(order), start=1000 * number) == []


def test_declared_once_and_going_on_for_ever_is_silent():
    """`source_exhausted` is raised when the first of 4 lanes wraps; the lanes go on with passes of their own."""

    def lane(number):
        docs = documents(10 + number, 60)
        for pass_number in itertools.count():
            yield from pack(random.Random(100 * number + pass_number).sample(docs, len(docs)))

    lanes, ledger = [lane(number) for number in range(4)], Ledger()
    rows = [next(lanes[index % 4]) for index in range(4 * 140 * 5)]
    assert feed(ledger, rows[: 4 * 140]) == []
    ledger.begin_pass(4 * 140 * 128)
    assert feed(ledger, rows[4 * 140 :], start=1000) == []


def test_an_undeclared_second_pass_is_found():
    docs = documents(3, 300)
    assert feed(Ledger(), pack(docs) + pack(random.Random(1).sample(docs, len(docs))))[-1].severity == "warning"


def test_workers_are_found_in_a_declared_pass():
    rows, ledger = blocks(text(0, 60_000)), Ledger()
    feed(ledger, rows)
    ledger.begin_pass(None)
    doubled = [row for pair in zip(rows[::2], rows[1::2], strict=False) for row in (*pair, *pair)]
    finding = feed(ledger, doubled, start=1000)[-1]
    assert (
        finding.likely_causes[0].startswith("each worker reads all the data")
        and finding.evidence["passes_declared"] == 1
    )


def test_a_pass_declared_at_the_start_is_no_pass():
    ledger = Ledger()
    ledger.begin_pass(None)
    rows = blocks(text(0, 30_000))
    assert ledger.passes == 0 and feed(ledger, rows * 2)


# --- resume


def test_resume_that_starts_at_the_first_document_again(tmp_path):
    rows, ledger = blocks(text(0, 100_000)), Ledger()
    assert feed(ledger, rows[:400]) == []
    ledger = reloaded(ledger, tmp_path)
    ledger.mark_resume()
    findings = feed(ledger, rows, start=51)
    assert findings[0].step <= 53, "16 rows are enough right after a resume"
    assert {finding.id for finding in findings if finding.step < 90} == {"resume_replay"}
    assert findings[0].evidence["first_consumed"]["step"] <= 3


def test_resume_that_replays_a_few_steps_recovers():
    rows, ledger = blocks(text(0, 400_000)), Ledger()
    feed(ledger, rows[:400])
    ledger.mark_resume()
    findings = feed(ledger, rows[360:1400], start=51)
    assert {finding.id for finding in findings} == {"resume_replay"} and findings[-1].step < 130
    assert ledger.replay_since is None


def test_a_good_resume_is_silent(tmp_path):
    rows, ledger = blocks(text(0, 100_000)), Ledger()
    feed(ledger, rows[:400])
    ledger = reloaded(ledger, tmp_path)
    ledger.mark_resume()
    assert feed(ledger, rows[400:], start=51) == []


def test_repetition_long_after_a_resume_is_no_replay():
    rows, ledger = blocks(text(0, 200_000)), Ledger()
    feed(ledger, rows[:400])
    ledger.mark_resume()
    assert {finding.id for finding in feed(ledger, rows[400:] + rows, start=51)} == {"repeated_data"}


def test_repetition_that_was_there_before_the_resume_is_no_replay():
    rows, ledger = blocks(text(0, 60_000)), Ledger()
    feed(ledger, rows + rows[:300])
    ledger.mark_resume()
    assert {finding.id for finding in feed(ledger, rows[300:], start=101)} == {"repeated_data"}


# --- eval overlap


def eval_and_train(share_of_eval: float, shift: int = 0):
    eval_stream = text(77, 200 * 128)
    copied = eval_stream[: int(share_of_eval * len(eval_stream))]
    train = np.concatenate([text(1, 50_000 + shift), copied, text(2, 50_000)])
    return blocks(eval_stream), blocks(train)


@pytest.mark.parametrize("eval_first", [True, False])
@pytest.mark.parametrize("shift", [0, 41])
def test_five_per_cent_of_the_eval_rows_in_train(eval_first, shift):
    eval_rows, train_rows = eval_and_train(0.05, shift)
    ledger = Ledger()
    if eval_first:
        ledger.observe_eval(eval_rows)
    feed(ledger, train_rows)
    if not eval_first:
        ledger.observe_eval(eval_rows)
    finding = check_overlap(ledger)
    assert finding.id == "train_eval_overlap" and finding.severity == "warning"
    covered = finding.evidence["first_covered_eval_rows"]
    assert len(covered) >= (9 if eval_first else 4) and max(covered) <= 10


def test_five_per_cent_of_the_train_rows_from_eval():
    eval_rows, ledger = blocks(text(77, 20 * 128)), Ledger()
    ledger.observe_eval(eval_rows)
    train, rng = blocks(text(0, 100_000)), random.Random(0)
    mixed = [eval_rows[rng.randrange(20)] if rng.random() < 0.05 else row for row in train]
    feed(ledger, mixed)
    finding = check_overlap(ledger)
    assert finding.severity == "error" and finding.evidence["share"] > 0.5


@pytest.mark.parametrize("eval_first", [True, False])
def test_short_eval_rows_in_train(eval_first):
    eval_rows, ledger = blocks(text(77, 40 * 50), 50), Ledger()
    observe = [
        lambda: ledger.observe_eval(eval_rows),
        lambda: feed(ledger, blocks(text(0, 9_000), 50) + eval_rows[:4]),
    ]
    for act in observe if eval_first else observe[::-1]:
        act()
    assert check_overlap(ledger).evidence["first_covered_eval_rows"] == [0, 1, 2, 3]


def test_disjoint_eval_is_silent_and_comes_again_without_effect():
    eval_rows, ledger = blocks(text(77, 200 * 128)), Ledger()
    train = blocks(text(0, 50_000))
    for part in (train[:200], train[200:]):
        feed(ledger, part)
        for start in range(0, 200, 16):
            ledger.observe_eval(eval_rows[start : start + 16])
        assert len(ledger.eval_rows) == 200 and ledger.eval_tokens == 200 * 128
    assert check_overlap(ledger) is None


def test_train_that_repeats_itself_is_no_overlap():
    ledger = Ledger()
    ledger.observe_eval(blocks(text(77, 50 * 128)))
    feed(ledger, blocks(text(0, 30_000)) * 3)
    assert check_overlap(ledger) is None


@pytest.mark.parametrize("source", [five_sentences, few_words, periodic, markov])
def test_repetitive_eval_is_no_overlap(source):
    ledger = Ledger()
    stream = source(np.random.default_rng(3))
    feed(ledger, blocks(stream[:60_000], 256))
    ledger.observe_eval(blocks(stream[60_000:80_000], 256))
    feed(ledger, blocks(stream[80_000:], 256))
    # The callers' measure after 60,000 tokens; these sources tell 0.06 to 0.2 nats a token.
    assert check_overlap(ledger, 0.25) is None


# --- state and bounds


def test_going_on_from_the_state_is_going_on(tmp_path):
    rows = blocks(text(0, 60_000))
    stream, eval_rows = rows + rows, blocks(text(77, 50 * 128)) + rows[:2]
    whole = Ledger(max_windows=2000, max_rows=300)
    first = Ledger(max_windows=2000, max_rows=300)
    for ledger in (whole, first):
        feed(ledger, stream[:600])
        ledger.observe_eval(eval_rows[:40])
    second = reloaded(first, tmp_path)
    assert same_state(first, second)
    for ledger in (whole, second):
        ledger.mark_resume()
    before, after = (feed(ledger, stream[600:], start=76) for ledger in (whole, second))
    assert before == after and before
    for ledger in (whole, second):
        ledger.observe_eval(eval_rows)
        ledger.begin_pass(None)
    assert same_state(whole, second)


def test_the_state_of_an_empty_ledger(tmp_path):
    assert same_state(Ledger(), reloaded(Ledger(), tmp_path))


def test_memory_is_bounded_and_repetition_still_seen():
    rows = blocks(text(0, 400_000), 256)
    ledger = Ledger(max_windows=4000, max_rows=500)
    assert feed(ledger, rows) == []
    windows, digests = ledger.tables["windows"], ledger.tables["digests"]
    assert 2000 < windows.size <= 4000 and windows.every > EVERY and digests.size <= 500
    assert ledger.rows.size <= windows.size + digests.size + 512
    assert ledger.num_bytes < 34 * (4000 + 2 * 500) + 42 * (4000 + 500 + 512)  # docs/guards.md, of full tables
    finding = feed(ledger, rows, start=1000)[-1]
    assert finding.evidence["share"] > 0.9 and "in the same order" in finding.likely_causes[0]


def test_further_passes_take_no_more_memory():
    rows, ledger, taken = blocks(text(0, 20_000)), Ledger(), []
    for number in range(60):
        ledger.begin_pass(None)
        for start in range(0, len(rows), 40):
            some = rows[start : start + 40]
            ledger.observe_train([fingerprint(some, [(number, 0, start, place) for place in range(len(some))])])
        taken.append(ledger.num_bytes)
    assert taken[-1] <= taken[20]


@settings(max_examples=30)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), unique=True, max_size=300), st.integers(0, 299), st.integers(2, 64))
def test_the_table_is_a_dictionary(keys, cut, limit):
    table, expected = SampledTable(limit), {}
    for part in (keys[:cut], keys[cut:]):
        values = np.arange(len(part)) + len(expected)
        kept = table.keeps(np.array(part, np.int64))
        assert (table.add(np.array(part, np.int64)[kept], values[kept]) == values[kept]).all()
        expected |= dict(zip(part, values.tolist(), strict=True))
    found = table.find(np.array(keys, np.int64)).tolist()
    assert table.size <= limit
    assert found == [expected[key] if key % table.every == 0 else -1 for key in keys]


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 2), max_size=60), max_size=6))
def test_entries_of_repeated_keys(parts):
    """In calls of any size: a key has one entry, numbers have no gap, absent keys have entry 0."""
    table, entry_of = HashTable(1 << 10), {}
    for part in parts:
        keys = np.array(part, np.int64)
        known = np.array([entry_of.get(key, 0) for key in part], np.int64)
        assert np.array_equal(table.find(keys), known)
        entries = table.find_or_add(keys).tolist()
        for key, entry in zip(part, entries, strict=True):
            assert entry_of.setdefault(key, entry) == entry
    assert sorted(entry_of.values()) == list(range(1, table.size))


# --- what is found, exactly


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.integers(WINDOW, 400), st.integers(0, 300), st.integers(0, 300))
def test_a_copied_stretch_is_seen_exactly_when_one_of_its_windows_is_kept(seed, length, before, after):
    """Each of its n - 63 windows is kept with probability 1 / EVERY; what is seen spans the kept ones."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 30_000, 700)
    copied = first[100 : 100 + length]
    second = np.concatenate([rng.integers(30_000, 60_000, before), copied, rng.integers(30_000, 60_000, after)])
    kept = hash_rows([copied]).windows(EVERY)[1]
    ledger = Ledger()
    observe(ledger, [first, second], [(1, 0, 0, 0), (1, 0, 0, 1)])
    copies = ledger._copies
    assert len(copies) == (len(kept) > 0)
    if len(kept):
        distance = len(first) + before - 100
        assert copies[0, 3] == distance
        assert 0.98 * (kept[-1] - kept[0] + WINDOW) - 1 <= copies[0, 2] <= kept[-1] - kept[0] + WINDOW


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.lists(st.integers(0, 300), min_size=1, max_size=12))
def test_disjoint_random_rows_have_no_copies(seed, lengths):
    rng = np.random.default_rng(seed)
    ledger = Ledger()
    ledger.observe_eval([rng.integers(0, 50_000, length) for length in lengths])
    for step in range(3):
        rows = [rng.integers(0, 50_000, length) for length in lengths if length > 3]
        observe(ledger, rows, [(step, 0, 0, index) for index in range(len(rows))])
    assert len(ledger._copies) == 0 and not ledger._eval_hits.any()


@settings(max_examples=30)
@given(st.lists(st.integers(0, 200), min_size=1, max_size=6), st.integers(0, 1000))
def test_hashes_depend_on_the_window_and_on_nothing_else(lengths, seed):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, 3, length) for length in lengths if length] or [np.array([1])]
    hashed, keys = hash_rows(rows), {}
    for row, at, key in zip(*hashed.windows(1), strict=True):
        start = at - hashed.start[row]
        keys.setdefault(rows[row][start : start + WINDOW].tobytes(), set()).add(int(key))
    assert len(hashed.windows(1)[2]) == sum(max(0, len(row) - WINDOW + 1) for row in rows)
    assert all(len(found) == 1 for found in keys.values())
    assert len(set.union(set(), *keys.values())) == len(keys)
    assert [int(hash_rows([row]).digest[0]) for row in rows] == hashed.digest.tolist()
