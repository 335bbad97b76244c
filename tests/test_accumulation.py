"""Accumulated micro-batches against the whole batch, on hand-made numbers and on real models."""

import json
import math

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer

from recipe.guards.accumulation import AccumulationMismatch, two_rows, uneven_labels, weigh
from recipe.guards.batches import IGNORE_INDEX
from recipe.guards.gradients import GradientNorms, GradientTap
from recipe.guards.guard import CannotJudge
from tests.test_guards_on_runs import alarms, as_rows, check_first, check_healthy, text, train

IDS = torch.randint(3, 250, (4, 48), generator=torch.Generator().manual_seed(1))


def batch_of(rows: int = 4, **parts) -> dict:
    return {"input_ids": IDS[:rows], "labels": IDS[:rows].clone(), **parts}


# --- before step 1, pure


def weights(first: float, second: float) -> torch.Tensor:
    """32 scored positions in the first row, 4 in the second."""
    table = torch.zeros(2, 40)
    table[0, :32], table[1, :4] = first, second
    return table


WHOLE = weights(1 / 36, 1 / 36)


def test_equal_weights_are_silent():
    assert AccumulationMismatch.judge_parts(WHOLE, WHOLE * 1.01) is None
    assert (
        AccumulationMismatch.judge_parts(WHOLE * 8, WHOLE * 8) is None
    )  # a factor of all, such as the number of processes


@pytest.mark.parametrize(
    ("parts", "cause", "ratios"),
    [
        (weights(1 / 64, 1 / 8), "mean of micro-batch means", "0.56 and 4.50"),
        (weights(1 / 32, 1 / 4), "summed (not divided", "1.12 and 9.00"),
        (WHOLE / 2, "is 1/2", "0.50 and 0.50"),
        (WHOLE * 2, "is 2 times", "2.00 and 2.00"),
        (weights(1 / 36, 1 / 20), "uneven micro-batches", "1.00 and 1.80"),
    ],
)
def test_the_ratio_names_the_cause(parts, cause, ratios):
    finding = AccumulationMismatch.judge_parts(WHOLE, parts)
    assert finding.id == "accumulation_mismatch" and finding.severity == "warning"
    assert cause in finding.likely_causes[0] and ratios in finding.found


def test_a_mean_of_means_over_rows_scored_alike_is_information():
    assert AccumulationMismatch.judge_parts(WHOLE, weights(1 / 64, 1 / 8), is_even=True).severity == "info"
    assert AccumulationMismatch.judge_parts(WHOLE, WHOLE / 2, is_even=True).severity == "warning"


@pytest.mark.parametrize(("first", "second", "is_found"), [(2.0, 2.0, True), (0.5, 0.5, True), (1.0, 1.0, False)])
def test_gradients_of_any_loss_are_weighed(first, second, is_found):
    gradient = torch.randn(2, 20, 11, generator=torch.Generator().manual_seed(0))
    gradient[1, 12:] = 0.0
    parts = gradient * torch.tensor([first, second]).reshape(2, 1, 1)
    finding = AccumulationMismatch.judge_parts(*weigh(gradient, parts), is_even=True)
    assert (finding is not None) == is_found and (not is_found or finding.severity == "warning")


def test_a_mean_of_means_of_any_loss_is_information():
    gradient = torch.randn(2, 20, 11, generator=torch.Generator().manual_seed(0))
    gradient[1, 4:] = 0.0  # 20 and 4 positions
    parts = gradient * torch.tensor([24 / 40, 24 / 8]).reshape(2, 1, 1)
    assert AccumulationMismatch.judge_parts(*weigh(gradient, parts), is_even=True).severity == "info"


def test_rows_that_depend_on_each_other_are_not_weighed():
    gradient = torch.randn(2, 20, 11, generator=torch.Generator().manual_seed(0))
    with pytest.raises(CannotJudge, match="other rows"):
        weigh(gradient, gradient + 0.3 * gradient.flip(0))


def test_rows_are_two_and_uneven():
    batch, is_even = two_rows(batch_of(4))
    assert is_even and batch["input_ids"].shape == (2, 48)
    assert (uneven_labels(batch["labels"])[:, 1:] != IGNORE_INDEX).sum(dim=1).tolist() == [47, 5]
    batch, is_even = two_rows(batch_of(1, attention_mask=torch.ones(1, 48)))
    assert is_even and torch.equal(batch["input_ids"].flatten(), IDS[0]) and batch["attention_mask"].shape == (2, 24)


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        ({"input_ids": IDS}, "no input_ids with labels"),
        (batch_of(1, cu_seq_lens_q=torch.tensor([0, 48])), "cu_seq_lens_q cannot be divided"),
        (batch_of(1, attention_mask=torch.ones(1, 1, 48, 48)), "cannot be cut in two"),
        (batch_of() | {"labels": torch.full((4, 48), IGNORE_INDEX)}, "too few"),
    ],
)
def test_what_cannot_be_divided(batch, reason, tiny_model):
    with pytest.raises(CannotJudge, match=reason):
        AccumulationMismatch.judge_model(tiny_model, batch, lambda *arguments: None)


# --- before step 1, on a model


def divided_by_the_step(model):
    return lambda inputs, num_items, number: model(**inputs, num_items_in_batch=num_items).loss


def mean_of_means(model):
    return lambda inputs, num_items, number: model(**inputs).loss / number


def sum_of_means(model):
    return lambda inputs, num_items, number: model(**inputs).loss


def divided_twice(model):
    return lambda inputs, num_items, number: model(**inputs, num_items_in_batch=num_items).loss / number


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (divided_by_the_step, None),
        (mean_of_means, "means"),
        (sum_of_means, "summed"),
        (divided_twice, "1/2"),
    ],
)
def test_accumulation_of_a_real_model(make, cause, bf16, rows, tiny_model):
    tiny_model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        finding = AccumulationMismatch.judge_model(tiny_model, batch_of(rows), make(tiny_model))
    assert (finding is None) if cause is None else cause in finding.likely_causes[0], finding
    assert all(parameter.grad is None for parameter in tiny_model.parameters())


def test_a_batch_that_is_uneven_already(tiny_model):
    batch = batch_of(4)
    batch["labels"][0, :30] = IGNORE_INDEX
    assert AccumulationMismatch.judge_model(tiny_model, batch, divided_by_the_step(tiny_model)) is None
    assert AccumulationMismatch.judge_model(tiny_model, batch, mean_of_means(tiny_model)).severity == "warning"


# --- weights, sampled during training


@pytest.mark.parametrize(
    ("counts", "weights", "found"),
    [
        ((90, 10), (0.01, 0.01), None),
        ((90, 10), (0.0101, 0.0099), None),  # rounding
        ((50, 50), (0.02, 0.02), "weigh 2 together"),  # not divided by 2 steps
        ((50, 50), (0.005, 0.005), "weigh 0.5 together"),  # divided twice
        ((90, 10), (1 / 180, 1 / 20), "9.00 times as much"),  # a mean of means
        ((50, 50), (0.013, 0.013), None),  # a weight of one's own
    ],
)
def test_weights_of_micro_batches(counts, weights, found):
    places = [(0, 0), (0, 1)]
    pairs = dict(zip(places, counts, strict=True)), dict(zip(places, weights, strict=True))
    finding = AccumulationMismatch.judge_weights(*pairs, steps=2, ranks=1)
    assert finding is None if found is None else found in finding.found


def test_weights_divided_by_masked_positions_too_and_by_ranks():
    counts = {(0, 0): 60, (1, 0): 40}
    masked, halved = dict.fromkeys(counts, 2 / 200), dict.fromkeys(counts, 1 / 100)
    assert AccumulationMismatch.judge_weights(counts, masked, 1, 2, num_positions=200) is not None
    assert AccumulationMismatch.judge_weights(counts, halved, 1, 2) is not None
    assert AccumulationMismatch.judge_weights(counts, dict.fromkeys(counts, 2 / 100), 1, 2) is None
    own = {(0, 0): 1 / 60, (1, 0): 1 / 40}  # each rank its own mean, as asked for
    assert AccumulationMismatch.judge_weights(counts, own, 1, 2, is_averaged=False) is None
    assert AccumulationMismatch.judge_weights(counts, own, 1, 2).found.startswith("a token weighs 1.50 times")


# --- the count


def check_count(num_items, scored=6300, unshifted=6400, **known):
    return AccumulationMismatch.judge_count(num_items, scored, unshifted, **{"weight": 1 / num_items, **known})


def test_a_count_that_is_right_is_none():
    assert check_count(6300) is None


def test_the_count_of_labels_before_the_shift_is_information():
    finding = check_count(6400)  # rows of 64: 63 are scored
    assert (finding.id, finding.severity) == ("accumulation_mismatch", "info")
    assert finding.found.startswith("num_items_in_batch 6,400") and "0.984" in finding.found
    assert "counted unshifted" in finding.likely_causes[0] and json.dumps(finding.evidence)


@pytest.mark.parametrize(
    ("num_items", "unshifted", "severity"),
    [
        (6400, 6500, "info"),  # 1.6 %
        (6500, 6600, "warning"),  # 3.2 %
        (6500, 6500, "info"),  # as before the shift
        (6900, 6900, "info"),  # rows of 11
        (9000, 9000, "info"),  # rows of 4, of stock Trainer
        (9800, 9800, "warning"),
        (3150, 6400, "warning"),
        (25200, 6400, "warning"),
    ],
)
def test_how_far_off_it_may_be(num_items, unshifted, severity):
    assert check_count(num_items, unshifted=unshifted).severity == severity


def test_a_loss_that_is_not_divided_by_the_count_is_not_judged_by_it():
    assert check_count(7000, weight=1 / 6300) is None and check_count(6400, weight=1 / 6300) is None
    assert check_count(7000, weight=0.5 / 7000) is None


def test_without_weights_and_for_a_custom_count_it_is_information_at_most():
    assert check_count(12600, weight=None).severity == check_count(100, is_choice=True).severity == "info"


@pytest.mark.parametrize(("num_items", "scored"), [(0, 0), (5, 0), (0, 5)])
def test_nothing_counted_is_nothing_to_say(num_items, scored):
    assert AccumulationMismatch.judge_count(num_items, scored, scored) is None


# --- the sum of the gradients

NAN = math.nan


def check_sum(norms, num_micro_batches, is_low=False):
    return AccumulationMismatch.judge_sum(GradientNorms("norm", is_low, *norms), num_micro_batches)


def test_gradients_unscaled_once_too_often_are_a_warning():
    """Backward was given a mean cross entropy; else a loss scale of the user's own may be undone."""
    norms = GradientNorms("norm", False, 2.0, 2.0 - 2.0**-15, 2.0**-15, 2.0**-15, 0.0, 2.0)
    assert AccumulationMismatch.judge_sum(norms, 1, is_mean=True).severity == "warning"
    assert AccumulationMismatch.judge_sum(norms, 1).severity == "info"
    halved = GradientNorms("norm", False, 2.0, 1.0, 1.0, 1.0, 0.0, 2.0)
    assert AccumulationMismatch.judge_sum(halved, 1, is_mean=True).severity == "info"


@pytest.mark.parametrize(
    ("norms", "is_low", "found"),
    [
        ([2.0, 0.0, 2.0, 1.0, 0.0, 0.0], False, False),
        ([2.0, 1.8, 0.5, 0.5, 0.0, 1.8], False, True),  # only the last micro-batch
        ([2.0, 2.0, 0.0, 0.0, 0.0, 2.0], False, True),  # nothing is left
        ([2.0, 0.1, 2.0, 1.0, 0.0, 0.1], True, False),  # rounding of half precision
        ([0.0, 0.0, 0.0, 0.0, 0.0, 0.0], False, False),  # every label masked
        ([NAN, NAN, NAN, NAN, 0.0, NAN], False, False),  # others name it
    ],
)
def test_the_sum_of_the_micro_batches(norms, is_low, found):
    finding = check_sum(norms, 4, is_low)
    assert (finding is not None) is found
    assert not found or (finding.id, finding.severity) == ("accumulation_mismatch", "warning")


@pytest.mark.parametrize(
    ("num_micro_batches", "before", "cause"),
    [(4, 0.5, "zero_grad within the step"), (1, 3.0, "zero_grad is missing"), (1, 0.0, "dropped")],
)
def test_the_likely_cause_follows_from_the_numbers(num_micro_batches, before, cause):
    finding = check_sum([2.0, 2.0, before, before, 0.0, 0.0], num_micro_batches)
    assert cause in finding.likely_causes[0] and finding.severity == "warning"


@pytest.mark.parametrize(
    ("num_micro_batches", "norms"),
    [
        (1, [2.0, 1.5, 3.0, 1.0, 0.0, 1.2]),  # a filter adds something of its own
        (4, [2.0, 1.0, 1.0, 1.0, 0.0, 1.0]),  # all of it halved
    ],
)
def test_a_gradient_that_is_filtered_or_scaled_may_be_so_on_purpose(num_micro_batches, norms):
    assert check_sum(norms, num_micro_batches).severity == "info"


def test_a_matrix_that_keeps_its_first_micro_batch_is_found():
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32), nn.LayerNorm(32))
    tap = GradientTap(list(model.named_parameters()), of_matrices=True)
    tap.is_listening = True
    for keeps, found in ((False, False), (True, True)):
        model.zero_grad()
        model(torch.randn(3, 32)).square().sum().backward()
        first = model[1].weight.grad.clone()
        model(torch.randn(3, 32)).square().sum().backward()
        if keeps:
            model[1].weight.grad.copy_(first)
        assert (check_sum(tap.take(2, 0).tolist(), 2) is not None) is found
    tap.close()


# --- on runs


def findings_of(guards):
    return [(each.id, each.severity) for each in guards.findings]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_divided_by_labels_before_the_shift_is_information(tmp_path, accumulation):
    config = GPT2Config(vocab_size=257, n_positions=64, n_embd=32, n_layer=2, n_head=2, eos_token_id=256)
    guards = train(tmp_path, model=GPT2LMHeadModel(config), steps=12, gradient_accumulation_steps=accumulation)
    assert findings_of(guards) == [("accumulation_mismatch", "info")]
    assert "0.984 of the mean per token" in guards.findings[0].found


def test_a_count_that_is_right_says_nothing(tmp_path):
    guards = train(tmp_path, steps=8)
    assert findings_of(guards) == [] and guards.judged_steps["accumulation_mismatch"] >= 3


class CountsPadding(Trainer):
    def _get_num_items_in_batch(self, batch_samples, device):
        return torch.tensor(sum(batch["labels"].numel() for batch in batch_samples))


def test_a_custom_count_that_holds_masked_labels_is_information(tmp_path):
    data = as_rows(text(64))
    for row in data:
        row["labels"] = row["labels"].clone()
        row["labels"][40:] = -100
    guards = train(tmp_path, train=data, steps=8, trainer_class=CountsPadding)
    assert ("accumulation_mismatch", "info") in findings_of(guards)


class ShortAsFull(Trainer):
    """The last window of a pass has three micro-batches and is divided by four."""

    def get_batch_samples(self, *arguments):
        samples, num_items = super().get_batch_samples(*arguments)
        return samples, num_items * self.args.gradient_accumulation_steps / len(samples)


def test_a_short_window_that_is_divided_as_a_full_one(tmp_path):
    """It is always the second of a pass, at which micro-batches are not sampled else."""
    run = dict(train=as_rows(text(7)), steps=22, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    guards = train(tmp_path, trainer_class=ShortAsFull, **run)
    assert alarms(guards) == [("accumulation_mismatch", 20)]
    check_healthy(train(tmp_path, **run), "accumulation_mismatch")


class ZeroGradForgotten(Trainer):
    def create_optimizer(self, *arguments):
        optimizer = super().create_optimizer(*arguments)
        self.model.zero_grad = optimizer.zero_grad = lambda *a, **k: None
        return optimizer


@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradients_that_are_never_zeroed(tmp_path, accumulation):
    run = dict(steps=6, gradient_accumulation_steps=accumulation)
    check_first(train(tmp_path, trainer_class=ZeroGradForgotten, **run), "accumulation_mismatch", 2, 3)
    check_healthy(train(tmp_path, **run), "accumulation_mismatch")


class FromEmbeddings(ZeroGradForgotten):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(inputs_embeds=inputs["embeddings"], labels=inputs["labels"]).loss


def test_batches_without_tokens_are_judged_by_their_gradients(tmp_path):
    data = [{"embeddings": torch.randn(64, 32), "labels": row["labels"]} for row in as_rows(text(24))]
    run = dict(train=data, steps=6, remove_unused_columns=False)
    check_first(train(tmp_path, trainer_class=FromEmbeddings, **run), "accumulation_mismatch", 2, 3)
