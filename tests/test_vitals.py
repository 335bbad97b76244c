"""The vitals on hand-written numbers, and on simulated healthy curves."""

import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest

from recipe.guards.batches import VALID, SeenTokens, TokenCounter
from recipe.guards.facts import bos_token_id_of, tokenizer_sizes_of
from recipe.guards.finding import CannotJudge
from recipe.guards.thresholds import BOS_SHARE, BOS_TEXTS, BUDGET_STEPS, EOS_SEEN, JUMP_WINDOW, NORM_FACTOR, RECENT
from recipe.guards.vitals import (
    TokenCounts,
    add_losses_by_position,
    check_double_bos,
    check_eos_targets,
    check_finite,
    check_grad_norm_level,
    check_learning_rate,
    check_loss_spike,
    check_padding_targets,
    check_token_range,
    check_tokenizer_size,
    check_tokens,
    check_train_eval_gap,
    expected_learning_rates,
    position_evidence,
)

FULL = JUMP_WINDOW + RECENT


def spike(losses, **kwargs):
    steps = list(range(1, len(losses) + 1))
    return check_loss_spike(steps, [100 * step for step in steps], losses, **kwargs)


def norm_level(norms):
    steps = list(range(1, len(norms) + 1))
    return check_grad_norm_level(steps, [100 * step for step in steps], norms)


# --- finite


@pytest.mark.parametrize(
    ("losses", "norm", "scored"),
    [([3.0], 1.0, None), ([1e-6, 12.0], 0.0, None), ([3.0], None, [5]), ([3.0, 0.0], 1.0, [5, 0])],
)
def test_numbers_are_fine(losses, norm, scored):
    assert check_finite(1, 1, losses, norm, scored) is None


@pytest.mark.parametrize(
    ("losses", "norm", "scored", "found"),
    [
        ([math.nan], 1.0, None, "loss nan"),
        ([3.0, math.inf], 1.0, None, "loss inf in micro-batch 2 of 2"),
        ([0.0], 1.0, None, "loss 0.0"),
        ([3.0, 0.0], 1.0, [5, 5], "loss 0.0 in micro-batch 2 of 2"),
        ([0.0, math.nan], 1.0, [5, 0], "loss nan in micro-batch 2 of 2"),
        ([3.0], math.nan, [5], "gradient norm nan"),
    ],
)
def test_what_is_no_number_or_exactly_zero_is_an_error(losses, norm, scored, found):
    finding = check_finite(7, 70, losses, norm, scored)
    assert finding.severity == "error" and finding.found == found
    json.dumps(finding.evidence)


def test_a_zero_loss_asks_for_the_labels_and_not_for_a_checkpoint():
    assert "labels" in check_finite(7, 70, [0.0], 1.0).action
    assert "checkpoint" in check_finite(7, 70, [math.nan], 1.0).action


# --- loss


def test_a_loss_that_stays_up_is_a_spike_even_where_the_window_has_no_spread():
    assert spike([3.0] * JUMP_WINDOW + [4.5] * (RECENT - 1)) is None  # the window is not full
    assert spike([3.0] * FULL) is None
    finding = spike([3.0] * JUMP_WINDOW + [4.5] * RECENT)
    assert finding.severity == "warning" and "4.50" in finding.found and finding.step == FULL
    json.dumps(finding.evidence)


@pytest.mark.parametrize("recent", [[9.0], [9.0] * (RECENT - 1) + [3.0], [3.7] * RECENT])
def test_single_batches_and_small_changes_are_none(recent):
    assert spike([3.0] * FULL + recent) is None


def test_a_spike_must_clear_the_noise():
    noisy = [3.0 + 0.5 * (-1) ** i for i in range(JUMP_WINDOW)]  # robust sd 0.74, margin 5.9
    assert spike(noisy + [8.5] * RECENT) is None
    assert spike(noisy + [9.5] * RECENT) is not None


def test_two_kinds_of_batches_are_no_spike():
    assert spike([0.1] * 40 + [2.0] + [0.1] * 9 + [2.1] * RECENT) is None


def test_the_fall_of_early_training_is_none():
    assert all(spike([10.4 - 0.15 * step for step in range(steps)]) is None for steps in range(1, 66))


def test_a_sudden_fall_is_found_in_the_first_pass_only():
    losses = [3.0] * JUMP_WINDOW + [0.6] * RECENT
    assert "fell to 0.60" in spike(losses).found
    assert spike(losses, is_first_pass=False) is None
    assert spike([3.0] * JUMP_WINDOW + [1.2] * RECENT) is None  # as from web text to code


def test_a_loss_that_is_no_number_is_another_guards_business():
    assert spike([3.0] * JUMP_WINDOW + [math.nan] + [9.0] * (RECENT - 1)) is None


def test_a_history_that_was_cut_and_continued_gives_the_same():
    losses = [3.0 + 0.01 * (i % 7) for i in range(300)] + [6.0] * RECENT
    cut = losses[-FULL:]
    steps = list(range(301 - JUMP_WINDOW, 301 + RECENT))
    whole, resumed = spike(losses), check_loss_spike(steps, [100 * step for step in steps], cut)
    assert whole is not None and whole == resumed


@pytest.mark.parametrize("degrees", [2, 4, 1000])
def test_healthy_noise_raises_nothing(degrees):
    rng = random.Random(degrees)
    losses, norms = [], []
    for step in range(1, 2001):
        noise = rng.gauss(0, 1) / math.sqrt(rng.gammavariate(degrees / 2, 2 / degrees))
        losses.append(max(0.05, 2.5 + 8 * step**-0.4 + 0.4 * noise))
        norms.append((0.25 + 15 / step) * math.exp(0.3 * noise))
        steps = list(range(len(losses[-FULL:])))
        assert check_loss_spike(steps, steps, losses[-FULL:]) is None
        assert check_grad_norm_level(steps, steps, norms[-FULL:]) is None


# --- gradient norm


def test_a_gradient_norm_far_over_its_level_is_a_warning_and_far_under_it_information():
    assert norm_level([0.5] * FULL) is None
    assert norm_level([0.5] * JUMP_WINDOW + [50.0] * (RECENT - 1) + [0.5]) is None
    assert norm_level([0.5] * JUMP_WINDOW + [0.4 * NORM_FACTOR] * RECENT) is None
    assert norm_level([0.5] * JUMP_WINDOW + [50.0] * RECENT).severity == "warning"
    assert norm_level([0.5] * JUMP_WINDOW + [0.005] * RECENT).severity == "info"


def test_a_gradient_norm_of_exactly_zero_is_a_warning_without_a_full_window():
    assert norm_level([1.0, 0.0, 0.0]) is None
    assert "exactly 0" in norm_level([1.0, 0.0, 0.0, 0.0]).found


@pytest.mark.parametrize("odd", [None, math.nan, math.inf, 0.0])
def test_a_window_with_an_unknown_norm_is_not_judged(odd):
    assert norm_level([0.5] * (JUMP_WINDOW - 1) + [odd] + [50.0] * RECENT) is None


# --- learning rate

LINEAR = expected_learning_rates("linear", 1e-3, 10, 100)


def rate(step, lr, **kwargs):
    return check_learning_rate(step, 0, [(lr, 1e-3)], LINEAR, 1e-3, **kwargs)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("cosine", None),
        ("constant", None),
        ("constant_with_warmup", None),
        ("cosine_with_min_lr", {"min_lr": 1e-4}),
        ("warmup_stable_decay", {"num_decay_steps": 20}),
    ],
)
def test_every_schedule_that_is_followed_is_silent(name, arguments):
    multiplier = expected_learning_rates(name, 1e-3, 10, 100, arguments)
    for step in range(100):
        assert check_learning_rate(step, 0, [(1e-3 * multiplier(step), 1e-3)], multiplier, 1e-3) is None


def test_schedules_that_follow_a_metric_cannot_be_judged():
    for name in ("reduce_lr_on_plateau", "greedy"):
        with pytest.raises(CannotJudge, match=name):
            expected_learning_rates(name, 1e-3, 10, 100)


def test_a_schedule_that_runs_too_fast_is_named():
    findings = [rate(step, 1e-3 * LINEAR(4 * step), world_size=4) for step in range(20)]
    onset = next(i for i, finding in enumerate(findings) if finding)
    assert onset <= 2 and findings[onset].likely_causes[0].startswith("the schedule advances 4 times a step")


def test_one_step_early_or_late_is_no_fault():
    assert all(rate(step, 1e-3 * LINEAR(max(0, step + late))) is None for step in range(100) for late in (-1, 0, 1))


def test_a_schedule_that_began_anew_after_a_resume_is_found():
    finding = rate(50, 1e-3 * LINEAR(0))
    assert finding.severity == "warning" and finding.step == 51
    json.dumps(finding.evidence)


def test_a_checkpoint_that_brought_its_own_rate_is_found_unless_the_optimizer_is_the_users():
    used = [(5e-4 * LINEAR(30), 5e-4), (5e-4 * LINEAR(30), 5e-4)]
    assert "asked for" in check_learning_rate(30, 0, used, LINEAR, learning_rate=1e-3).expected
    assert check_learning_rate(30, 0, used, LINEAR, learning_rate=None) is None


def test_groups_with_rates_of_their_own_are_silent_and_each_is_judged():
    groups = [(initial * LINEAR(40), initial) for initial in (1e-3, 2e-2)]
    assert check_learning_rate(40, 0, groups, LINEAR, 1e-3) is None
    assert "group 1" in check_learning_rate(40, 0, [groups[0], (2e-2, 2e-2)], LINEAR, 1e-3).found
    assert check_learning_rate(40, 0, [(None, None)], LINEAR, 1e-3) is None  # an optimizer without a rate
    assert check_learning_rate(40, 0, [], LINEAR, 1e-3) is None


# --- tokens


def test_steps_of_another_size_are_found():
    assert check_tokens(20, 0, [16] * (BUDGET_STEPS - 1), 32) is None
    assert check_tokens(20, 0, [32] * BUDGET_STEPS, 32) is None
    finding = check_tokens(20, 0, [16] * BUDGET_STEPS, 32)
    assert finding.evidence["ratio"] == 0.5 and "16 rows" in finding.found


def test_short_last_batches_varying_batches_and_small_data_sets_are_silent():
    assert check_tokens(20, 0, [32, 32, 32, 8] * (BUDGET_STEPS // 4), 32) is None
    assert check_tokens(20, 0, [20 + i % 9 for i in range(BUDGET_STEPS)], 32) is None
    assert check_tokens(20, 0, [10] * BUDGET_STEPS, 32, in_pass=10) is None


def counts(**changes):
    plain = dict(tokens=10_000, targets=9_000, eos_inputs=100, eos_targets=100, padding_targets=0)
    return TokenCounts(**(plain | dict(rows=0, filled_rows=0, min_id=0, max_id=99, embedding_rows=100) | changes))


@pytest.mark.parametrize("check", [check_token_range, check_padding_targets, check_eos_targets, check_double_bos])
def test_healthy_counts_are_silent(check):
    nothing = counts(tokens=0, targets=0, eos_inputs=0, eos_targets=0)
    prompts_masked = counts(targets=2_000, eos_inputs=200, eos_targets=100)
    assert [check(9, 9, case) for case in (counts(), nothing, prompts_masked)] == [None] * 3


def test_special_tokens():
    assert check_token_range(9, 9, counts(max_id=100)).severity == "error"
    assert check_token_range(9, 9, counts(min_id=-200)).severity == "warning"
    assert check_padding_targets(9, 9, counts(padding_targets=99)) is None
    assert check_padding_targets(9, 9, counts(targets=10**6, padding_targets=101)) is None
    assert check_padding_targets(9, 9, counts(padding_targets=101)).severity == "warning"
    assert check_eos_targets(9, 9, counts(eos_inputs=EOS_SEEN - 1, eos_targets=0)) is None
    assert check_eos_targets(9, 9, counts(eos_inputs=EOS_SEEN, eos_targets=0)).severity == "warning"
    assert check_eos_targets(9, 9, counts(eos_inputs=0, eos_targets=0)) is None
    assert check_eos_targets(9, 9, counts(eos_inputs=0, eos_targets=0, tokens=2_000_000)).severity == "info"


@pytest.mark.parametrize(
    ("row", "texts", "doubled"),
    [
        ([1, 1, 7, 8, 9], 1, 1),
        ([7, 1, 1, 8, 1, 1, 9], 2, 2),  # packed
        ([1, 7, 8, 1, 9, 9], 2, 0),
        ([1, 1, 1, 7, 7, 7], 1, 0),  # no template does this; an ordinary token may
        ([7, 7, 7, 1, 1], 0, 0),  # the row ends too soon to tell
        ([7, 7], 0, 0),
    ],
)
def test_texts_that_begin_with_bos_are_counted(row, texts, doubled):
    counter = TokenCounter((), 10, bos_token_id=1)
    counter.add(SeenTokens(np.array([row]), np.full((1, len(row)), VALID)))
    assert (counter.counts.bos_texts, counter.counts.double_bos) == (texts, doubled)
    padded = SeenTokens(np.array([[1, 1, 1, 1, 5, 6]]), VALID * np.array([[0, 0, 1, 1, 1, 1]]))  # on the left, by BOS
    counter.add(padded)
    assert (counter.counts.bos_texts, counter.counts.double_bos) == (texts + 1, doubled + 1)


def test_most_texts_begin_with_two_bos():
    enough = dict(bos_texts=BOS_TEXTS, double_bos=BOS_TEXTS)
    assert check_double_bos(9, 9, counts(**enough)).severity == "warning"
    for few in ({"bos_texts": BOS_TEXTS - 1, "double_bos": BOS_TEXTS - 1}, {"double_bos": int(BOS_SHARE * BOS_TEXTS)}):
        assert check_double_bos(9, 9, counts(**{**enough, **few})) is None


@pytest.mark.parametrize("tokens", [3, 64])
def test_an_ordinary_token_taken_for_bos_is_silent(tokens):
    counter, ids = TokenCounter((), 64, bos_token_id=1), np.random.default_rng(0).integers(tokens, size=(500, 8, 32))
    for rows in ids:
        counter.add(SeenTokens(rows, np.full(rows.shape, VALID)))
        assert check_double_bos(9, 9, counter.counts) is None


def test_bos_is_the_tokenizers_or_the_configs_unless_it_ends_documents_or_pads():
    def bos(tokenizer, **config):
        return bos_token_id_of(SimpleNamespace(config=SimpleNamespace(**config)), tokenizer)

    tokenizer = SimpleNamespace(bos_token_id=5, eos_token_id=6, pad_token_id=None)
    assert bos(tokenizer, bos_token_id=1) == bos(SimpleNamespace(tokenizer=tokenizer)) == 5
    assert bos(None, bos_token_id=1) == bos(SimpleNamespace(bos_token_id=None), bos_token_id=1) == 1
    for config in ({"eos_token_id": [5, 7]}, {"pad_token_id": 5}):
        assert bos(tokenizer, **config) is None
    assert bos(None) is bos(object(), bos_token_id=None) is bos_token_id_of(object(), None) is None


class Vocabulary:
    vocab_size = 100

    def __len__(self):
        return 104


@pytest.mark.parametrize(
    ("rows", "severity"), [(99, "warning"), (100, "info"), (103, "info"), (104, None), (128, None)]
)
def test_a_tokenizer_larger_than_the_embedding(rows, severity):
    for processor in (Vocabulary(), SimpleNamespace(tokenizer=Vocabulary())):
        finding = check_tokenizer_size(9, 9, tokenizer_sizes_of(processor), rows)
        assert (finding and finding.severity) == severity


def test_what_is_no_tokenizer_has_no_size():
    others = (
        None,
        object(),
        SimpleNamespace(vocab_size=3),
        SimpleNamespace(vocab_size="all"),
        SimpleNamespace(size=3),
    )
    assert [tokenizer_sizes_of(other) for other in others] == [None] * len(others)


# --- evaluation, positions


@pytest.mark.parametrize(("eval_loss", "severity"), [(3.4, None), (4.8, "info"), (6.0, "warning"), (1.5, "info")])
def test_train_and_eval_apart(eval_loss, severity):
    finding = check_train_eval_gap(500, 0, [3.0] * 20, eval_loss, is_first_pass=True)
    assert (finding.severity if finding else None) == severity
    assert check_train_eval_gap(500, 0, [3.0] * 20, eval_loss, is_first_pass=False) is None


def test_the_gap_waits_and_knows_noise_and_falling_losses():
    assert check_train_eval_gap(9, 0, [3.0] * 19, 9.0, True) is None
    assert check_train_eval_gap(20, 0, [10 - 0.3 * i for i in range(20)], 4.5, True) is None
    assert check_train_eval_gap(20, 0, [3.0] * 20, math.nan, True) is None


def test_loss_by_position():
    totals = []
    assert position_evidence(totals) == {"loss_by_position": {}, "falls": None}
    for i in range(40):
        add_losses_by_position(totals, [0, 1, 6, 100], [5.0 + 0.1 * (i % 3), 4.5, 4.0, 3.0 + 0.1 * (i % 3)])
    evidence = position_evidence(json.loads(json.dumps(totals)))  # as after a resume
    assert evidence["falls"] and list(evidence["loss_by_position"]) == ["0", "1-1", "4-7", "64-127"]
    assert evidence["loss_by_position"]["4-7"] == pytest.approx(4.0)
    flat = []
    add_losses_by_position(flat, [0, 100] * 40, [1.0, 1.0] * 40)
    assert position_evidence(flat)["falls"] is False
