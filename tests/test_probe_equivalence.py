"""Two ways to compute one thing, on hand-made numbers and on real models with and without the bug."""

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from recipe.guards.finding import CannotJudge, Finding
from recipe.guards.probes.equivalence import (
    check_accumulation,
    check_compiled,
    check_eval_loss,
    check_eval_mean,
    check_repeated,
    name_factor,
    probe_accumulation,
    probe_eval,
    two_rows,
    uneven_labels,
)
from recipe.guards.probes.targets import IGNORE_INDEX

IDS = torch.randint(3, 250, (4, 48), generator=torch.Generator().manual_seed(1))


def batch_of(rows: int = 4, **parts) -> dict:
    return {"input_ids": IDS[:rows], "labels": IDS[:rows].clone(), **parts}


# --- accumulation, pure


def weights(first: float, second: float) -> torch.Tensor:
    """32 scored positions in the first row, 4 in the second."""
    table = torch.zeros(2, 40)
    table[0, :32], table[1, :4] = first, second
    return table


WHOLE = weights(1 / 36, 1 / 36)


def test_equal_weights_are_silent():
    assert check_accumulation(WHOLE, WHOLE * 1.01) is None
    assert check_accumulation(WHOLE * 8, WHOLE * 8) is None  # a factor of all, such as the number of processes


@pytest.mark.parametrize(
    ("parts", "cause", "ratios"),
    [
        (weights(1 / 64, 1 / 8), "mean of the micro-batches' means", "0.56 and 4.50"),
        (weights(1 / 32, 1 / 4), "summed and not divided", "1.12 and 9.00"),
        (WHOLE / 2, "is 1/2", "0.50 and 0.50"),
        (WHOLE * 2, "is 2 times", "2.00 and 2.00"),
        (weights(1 / 36, 1 / 20), "depends on the micro-batch", "1.00 and 1.80"),
    ],
)
def test_the_ratio_names_the_cause(parts, cause, ratios):
    finding = check_accumulation(WHOLE, parts)
    assert finding.id == "accumulation_mismatch" and finding.severity == "warning"
    assert cause in finding.likely_causes[0] and ratios in finding.found


def test_a_mean_of_means_over_rows_scored_alike_is_only_said():
    assert check_accumulation(WHOLE, weights(1 / 64, 1 / 8), is_even=True).severity == "info"
    assert check_accumulation(WHOLE, WHOLE / 2, is_even=True).severity == "warning"


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
        probe_accumulation(tiny_model, batch, lambda *arguments: None)


# --- accumulation, on a model


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
        finding = probe_accumulation(tiny_model, batch_of(rows), make(tiny_model), step=3)
    assert (finding is None) if cause is None else cause in finding.likely_causes[0], finding
    assert all(parameter.grad is None for parameter in tiny_model.parameters())


def test_a_batch_that_is_uneven_already(tiny_model):
    batch = batch_of(4)
    batch["labels"][0, :30] = IGNORE_INDEX
    assert probe_accumulation(tiny_model, batch, divided_by_the_step(tiny_model)) is None
    assert probe_accumulation(tiny_model, batch, mean_of_means(tiny_model)).severity == "warning"


# --- evaluation


def gpt2(dropout: float):
    torch.manual_seed(0)
    rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    config = GPT2Config(vocab_size=257, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1)
    config.update(rates)
    return GPT2LMHeadModel(config)


def loss_of(model):
    return lambda inputs: model(**inputs).loss


def test_a_healthy_evaluation_is_silent_and_leaves_no_trace():
    model, generator = gpt2(0.1).train(), torch.get_rng_state()
    results = probe_eval(model, batch_of(), loss_of(model), loss_of(model))
    assert results == {"eval_not_repeatable": None, "eval_train_mismatch": None}
    assert all(module.training for module in model.modules()) and torch.equal(generator, torch.get_rng_state())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("bf16", [False, True])
def test_an_evaluation_in_bf16_is_silent(bf16, tiny_model):
    def evaluated(inputs):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return tiny_model(**inputs).loss

    assert not any(probe_eval(tiny_model, batch_of(), loss_of(tiny_model), evaluated).values())


def test_dropout_that_is_left_on():
    model = gpt2(0.1)

    def evaluated(inputs):
        model.train()
        return model(**inputs).loss

    results = probe_eval(model, batch_of(), lambda inputs: model.eval()(**inputs).loss, evaluated)
    assert results["eval_not_repeatable"].id == "eval_not_repeatable"
    assert "dropout" in results["eval_not_repeatable"].likely_causes[0]


@pytest.mark.parametrize(("factor", "name"), [(8.0, "8 times"), (0.25, "1/4")])
def test_a_factor_is_named(factor, name, tiny_model):
    results = probe_eval(
        tiny_model, batch_of(), loss_of(tiny_model), lambda inputs: loss_of(tiny_model)(inputs) * factor
    )
    finding = results["eval_train_mismatch"]
    assert name in finding.found and "number of processes" in finding.likely_causes[0]
    assert results["eval_not_repeatable"] is None


def test_an_evaluation_without_shift_of_a_trained_model(tiny_model):
    def unshifted(inputs):
        logits = tiny_model(input_ids=inputs["input_ids"]).logits
        return F.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten())

    optimizer = torch.optim.AdamW(tiny_model.parameters(), lr=1e-2)
    for _ in range(10):
        loss_of(tiny_model)(batch_of()).backward()
        optimizer.step()
        optimizer.zero_grad()
    finding = probe_eval(tiny_model, batch_of(), loss_of(tiny_model), unshifted)["eval_train_mismatch"]
    assert finding.id == "eval_train_mismatch" and "labels, shift" in finding.likely_causes[0]


def test_a_loss_that_is_not_finite_is_no_verdict(tiny_model):
    results = probe_eval(tiny_model, batch_of(), loss_of(tiny_model), lambda inputs: torch.tensor(float("nan")))
    assert all(isinstance(result, CannotJudge) for result in results.values())


def test_repeated_and_equal_losses():
    assert check_repeated(9.0, 9.0001) is None and check_repeated(0.0, 0.0) is None
    assert isinstance(check_repeated(9.0, 9.001), Finding)
    assert check_eval_loss(8.32, 8.30) is None and check_eval_loss(0.0, 0.0) is None
    assert check_eval_loss(4.436, 0.5536).found == "eval loss 4.4360, 8 times of the training loss of the same rows"
    assert check_eval_loss(1.0, 0.0).id == "eval_train_mismatch"


@pytest.mark.parametrize(
    ("losses", "tokens", "reported", "fires"),
    [
        ([4.0, 4.2, 4.1], [100, 100, 100], 4.1, False),
        ([4.0, 4.2, 4.9], [100, 100, 10], 4.37, False),  # mean of means
        ([4.0, 8.0], [1000, 10], 6.0, False),
        ([4.0, 8.0], [1000, 10], 8.08, True),  # a mean, and twice the right one
        ([4.0, 4.2, 4.1], [100, 100, 100], 32.8, True),
        ([4.0, 4.2, 4.1], [100, 100, 100], 1.03, True),
        ([4.0, 4.2, 4.1], [100, 100, 100], 5.1, True),
        ([4.1], [100], 4.1, False),
    ],
)
def test_the_reported_loss_against_its_batches(losses, tokens, reported, fires):
    finding = check_eval_mean(losses, tokens, reported)
    assert (finding is not None) == fires
    assert finding is None or finding.id == "eval_train_mismatch"


def test_no_batches_no_verdict():
    with pytest.raises(CannotJudge, match="no batch"):
        check_eval_mean([], [], 4.0)


@pytest.mark.parametrize(
    ("ratio", "name"), [(8.01, "8 times"), (0.5, "1/2"), (1.0, ""), (2.5, ""), (0.0, ""), (float("inf"), "")]
)
def test_factors(ratio, name):
    assert name_factor(ratio) == name


# --- compiled


def gradients_of(model, bf16: bool = False, scale: float = 1.0) -> tuple[float, dict]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(**batch_of()).loss * scale
    loss.backward()
    table = {name: (float(p.grad.norm()), float(p.grad.sum())) for name, p in model.named_parameters()}
    return float(loss.detach()), table


EAGER = {"a": (1.0, 3.0), "b": (0.5, -0.2), "bias": (1e-6, 1e-7)}


def test_equal_gradients_are_silent_and_so_is_the_rounding_of_a_tiny_one():
    assert check_compiled(EAGER, EAGER, (8.3, 8.3)) is None
    assert check_compiled(EAGER, EAGER | {"bias": (3e-6, -2e-6)}, (8.3, 8.3)) is None
    assert check_compiled({"a": (0.0, 0.0)}, {"a": (0.0, 0.0)}, (8.3, 8.3)) is None


@pytest.mark.parametrize(
    ("other", "losses"),
    [
        (EAGER, (8.3, 8.4)),
        (EAGER | {"b": (0.55, -0.2)}, (8.3, 8.3)),
        (EAGER | {"b": (0.5, 0.2)}, (8.3, 8.3)),
        (EAGER | {"b": (0.0, 0.0)}, (8.3, 8.3)),
        (EAGER | {"b": (float("nan"), 0.0)}, (8.3, 8.3)),
    ],
)
def test_another_loss_or_gradient_is_found(other, losses):
    assert check_compiled(EAGER, other, losses).id == "compiled_mismatch"


def test_the_gradient_that_differs_most_is_named():
    finding = check_compiled(EAGER, EAGER | {"a": (1.1, 3.0), "b": (0.1, -0.2)}, (8.3, 8.3))
    assert "2 of 3 gradients differ, most b by 80 % of its norm".replace(" %", "%") in finding.found


def test_bf16_against_fp32_is_rounding_and_a_scaled_loss_is_not(tiny_model):
    loss, eager = gradients_of(tiny_model)
    rounded_loss, rounded = gradients_of(tiny_model, bf16=True)
    assert check_compiled(eager, rounded, (loss, rounded_loss), torch.bfloat16) is None
    other_loss, other = gradients_of(tiny_model, scale=0.5)
    assert check_compiled(eager, other, (loss, other_loss), torch.bfloat16) is not None


def test_missing_gradients_are_no_verdict():
    with pytest.raises(CannotJudge, match="3 gradients in eager mode, 1 compiled"):
        check_compiled(EAGER, {"a": (1.0, 3.0)}, (8.3, 8.3))
