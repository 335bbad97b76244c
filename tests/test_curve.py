"""Guards of the loss and gradient norm, on hand-written numbers and on simulated healthy curves."""

import json
import math
import random

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from recipe.guards.finite import LossNotFinite
from recipe.guards.grad_norm import GradNorm
from recipe.guards.initial_loss import InitialLoss
from recipe.guards.recording import recover_loss_targets
from recipe.guards.spike import LossSpike

NAN = math.nan
WINDOW, RECENT = LossSpike.WINDOW, LossSpike.RECENT
FULL = WINDOW + RECENT
spike = LossSpike.judge


# --- finite


@pytest.mark.parametrize(
    ("losses", "norm", "scored"),
    [([3.0], 1.0, None), ([1e-6, 12.0], 0.0, None), ([3.0], None, [5]), ([3.0, 0.0], 1.0, [5, 0])],
)
def test_numbers_are_fine(losses, norm, scored):
    assert LossNotFinite.judge(losses, norm, scored) is None


@pytest.mark.parametrize(
    ("losses", "norm", "scored", "found"),
    [
        ([math.nan], 1.0, None, "loss nan"),
        ([3.0, math.inf], 1.0, None, "loss inf in micro-batch 2 of 2"),
        ([0.0], 1.0, None, "loss 0.0"),
        ([3.0, 0.0], 1.0, [5, 5], "loss 0.0 in micro-batch 2 of 2"),
        ([3.0], math.nan, [5], "gradient norm nan"),
    ],
)
def test_what_is_no_number_or_exactly_zero_is_an_error(losses, norm, scored, found):
    finding = LossNotFinite.judge(losses, norm, scored)
    assert finding.severity == "error" and finding.found == found
    json.dumps(finding.evidence)


def test_a_zero_loss_asks_for_the_labels_and_not_for_a_checkpoint():
    assert "labels" in LossNotFinite.judge([0.0], 1.0).action


@pytest.mark.parametrize(
    ("norm", "is_kept", "says"),
    [
        (math.nan, None, "weights are lost"),
        (math.nan, False, "weights are lost"),
        (math.nan, True, "weights are intact"),  # the step was skipped
        (1.0, None, "weights are intact"),
        (1.0, False, "weights are lost"),
        (None, None, "lost only if"),
    ],
)
def test_only_a_step_with_a_gradient_that_is_not_finite_loses_the_weights(norm, is_kept, says):
    action = LossNotFinite.judge([math.nan], norm, is_kept=is_kept).action
    assert says in action and ("go back" in action) == ("weights are lost:" in action)


# --- nothing scored


@pytest.mark.parametrize(
    ("losses", "scored", "found"),
    [
        ([math.nan], [0], "nothing was scored in this step (loss nan)"),
        ([0.0, 0.0], [0, 0], "nothing was scored in this step (loss 0.0)"),
        ([3.0, math.nan], [5, 0], "nothing was scored in 1 of 2 micro-batches (loss nan)"),
        ([3.0, 0.0], [5, 0], None),
        ([3.0], [0], None),  # an objective that needs no labels
        ([math.nan], [5], None),
    ],
)
def test_a_step_of_which_nothing_is_scored(losses, scored, found):
    finding = LossNotFinite.judge_scored(losses, scored, 0.0)
    assert (finding and finding.found) == found
    assert finding is None or "weights are intact" in finding.action
    assert LossNotFinite.judge(losses, 0.0, scored) is None or scored == [5]


@pytest.mark.parametrize(
    ("unscored", "severity"), [(0, None), (6, None), (8, "info"), (48, "warning"), (64, "warning")]
)
def test_rows_of_which_nothing_is_scored(unscored, severity):
    finding = LossNotFinite.judge_rows([True] * unscored + [False] * (64 - unscored))
    assert (finding and finding.severity) == severity
    assert LossNotFinite.judge_rows([True] * 40) is None  # too few to say


def test_weights_are_not_called_intact_where_the_norm_is_not_finite():
    assert "intact" not in LossNotFinite.judge_scored([math.nan], [0], math.nan).action


def test_a_loss_of_several_ranks_names_its_own():
    finding = LossNotFinite.judge([3.0, 3.0, 3.0, NAN], 1.0, world_size=2)
    assert finding.found == "loss nan in micro-batch 4 of 4 (rank 1)"
    assert (finding.evidence["rank"], finding.evidence["micro_step"]) == (1, 1)


@pytest.mark.parametrize(
    ("total", "before", "now", "found"), [(NAN, 0.0, 0.0, True), (NAN, NAN, NAN, False), (1.0, 1.0, 1.0, False)]
)
def test_a_gradient_that_is_not_finite_and_dropped(total, before, now, found):
    assert (LossNotFinite.judge_dropped(total, before, now) is not None) is found


# --- jumps


def test_a_loss_that_stays_up_is_a_spike_even_where_the_window_has_no_spread():
    assert spike([3.0] * WINDOW + [4.5] * (RECENT - 1)) is None  # the window is not full
    assert spike([3.0] * FULL) is None
    finding = spike([3.0] * WINDOW + [4.5] * RECENT)
    assert finding.severity == "warning" and "4.50" in finding.found
    json.dumps(finding.evidence)


@pytest.mark.parametrize("recent", [[9.0], [9.0] * (RECENT - 1) + [3.0], [3.7] * RECENT])
def test_single_batches_and_small_changes_are_none(recent):
    assert spike([3.0] * FULL + recent) is None


def test_a_spike_must_clear_the_noise():
    noisy = [3.0 + 0.5 * (-1) ** i for i in range(WINDOW)]  # robust sd 0.74, margin 5.9
    assert spike(noisy + [8.5] * RECENT) is None
    assert spike(noisy + [9.5] * RECENT) is not None


def test_two_kinds_of_batches_are_no_spike():
    assert spike([0.1] * 40 + [2.0] + [0.1] * 9 + [2.1] * RECENT) is None


def test_the_fall_of_early_training_is_none():
    assert all(spike([10.4 - 0.15 * step for step in range(steps)]) is None for steps in range(1, 66))


def test_a_sudden_fall_is_found_in_the_first_pass_only():
    losses = [3.0] * WINDOW + [0.6] * RECENT
    assert "fell to 0.60" in spike(losses).found
    assert spike(losses, is_first_pass=False) is None
    assert spike([3.0] * WINDOW + [1.2] * RECENT) is None  # as from web text to code


def test_a_loss_that_is_no_number_is_another_guards_business():
    assert spike([3.0] * WINDOW + [math.nan] + [9.0] * (RECENT - 1)) is None


def test_a_history_that_was_cut_and_continued_gives_the_same():
    losses = [3.0 + 0.01 * (i % 7) for i in range(300)] + [6.0] * RECENT
    whole, resumed = spike(losses), spike(losses[-FULL:])
    assert whole is not None and whole == resumed


def test_a_jump_of_the_gradient_norm_is_named_with_that_of_the_loss():
    losses = [3.0] * WINDOW + [9.0] * RECENT
    finding = spike(losses, [0.5] * WINDOW + [50.0] * RECENT)
    assert finding.likely_causes[0] == "gradient norm up from 0.5 to 50"
    assert (finding.evidence["grad_norm_before"], finding.evidence["grad_norm_now"]) == (0.5, 50.0)
    calm = [0.5] * WINDOW + [0.4 * LossSpike.NORM_FACTOR] * RECENT
    for norms in (calm, [None] * FULL, [0.5] * WINDOW + [NAN] * RECENT, ()):
        assert "gradient norm" not in spike(losses, norms).likely_causes[0]
    assert spike([3.0] * FULL, [0.5] * WINDOW + [50.0] * RECENT) is None  # the norm alone is no finding


@pytest.mark.parametrize("degrees", [2, 4, 1000])
def test_healthy_noise_raises_nothing(degrees):
    rng = random.Random(degrees)
    losses = []
    for step in range(1, 2001):
        noise = rng.gauss(0, 1) / math.sqrt(rng.gammavariate(degrees / 2, 2 / degrees))
        losses.append(max(0.05, 2.5 + 8 * step**-0.4 + 0.4 * noise))
        assert spike(losses[-FULL:]) is None


# --- gradient norm


@pytest.mark.parametrize(
    ("norm", "max_norm", "before", "now", "found"),
    [
        (4.0, 1.0, 2.0, 0.5, False),
        (4.0, 1.0, 2.0, 2.0, True),
        (0.9, 1.0, 2.0, 2.0, False),  # nothing to clip
        (4.0, 0.0, 2.0, 2.0, False),  # not asked for
        (None, 1.0, 2.0, 2.0, False),
        (NAN, 1.0, NAN, NAN, False),
    ],
)
def test_clipping_scales_as_it_says(norm, max_norm, before, now, found):
    finding = GradNorm.judge_scaling(norm, max_norm, before, now)
    assert (finding is not None) is found
    assert not found or finding.id == "grad_norm_off"


@pytest.mark.parametrize(
    ("norm", "max_norm", "clipped_norm", "found"),
    [
        (4.0, 1.0, 1.0, False),
        (0.5, 1.0, 0.5, False),
        (4.0, 1.0, 0.2, False),  # a limit for each parameter besides
        (4e4, 1.0, 1.5e-5, True),  # divided by a loss scale afterwards
        (4.0, 0.0, 0.0, False),  # not asked for
        (0.0, 1.0, 0.0, False),
        (NAN, 1.0, NAN, False),
        (None, 1.0, 1e-5, False),
    ],
)
def test_clipping_leaves_what_it_says(norm, max_norm, clipped_norm, found):
    finding = GradNorm.judge_left(norm, max_norm, clipped_norm)
    assert (finding is not None) is found
    assert not found or (finding.id, finding.severity) == ("grad_norm_off", "warning")


# --- first loss


@pytest.mark.parametrize(
    ("loss", "found"), [(8.32, None), (8.13, None), (16.6, None), (8.11, "leakage"), (16.7, "too wide")]
)
def test_an_untrained_model_guesses(loss, found):
    finding = InitialLoss.judge(loss, 4096)  # ln 4096 = 8.318
    assert (finding is None) if found is None else (finding.severity == "info" and found in finding.likely_causes[0])


def test_probabilities_are_no_logits():
    torch.manual_seed(0)
    ids = torch.randint(53, (2, 24))
    model = GPT2LMHeadModel(GPT2Config(vocab_size=53, n_embd=16, n_layer=1, n_head=2, n_positions=24))
    compute_loss = lambda: model(input_ids=ids, labels=ids).loss  # noqa: E731
    assert not recover_loss_targets(model, compute_loss).are_shares
    model.lm_head.register_forward_hook(lambda module, args, out: out.softmax(-1))
    assert recover_loss_targets(model, compute_loss).are_shares
    finding = InitialLoss.judge_shares(53)
    assert (finding.id, finding.severity) == ("init_loss_off", "error")
    assert "below 3.00" in finding.found  # ln(1 + 52 / e)
