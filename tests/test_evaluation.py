"""Evaluations: on hand-made numbers, on models with and without the bug, and on runs."""

import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from recipe.guards.evaluation import EvalNotRepeatable, EvalTrainMismatch, TrainEvalGap, name_factor
from recipe.guards.guard import CannotJudge, Finding
from recipe.guards.step import Evaluation

IDS = torch.randint(3, 250, (4, 48), generator=torch.Generator().manual_seed(1))


def batch_of(rows: int = 4, **parts) -> dict:
    return {"input_ids": IDS[:rows], "labels": IDS[:rows].clone(), **parts}


def gpt2(dropout: float):
    torch.manual_seed(0)
    rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    config = GPT2Config(vocab_size=257, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1)
    config.update(rates)
    return GPT2LMHeadModel(config)


def loss_of(model):
    return lambda inputs: model(**inputs).loss


def probe(guard, batch) -> Finding | CannotJudge | None:
    try:
        (verdict,) = guard.probe(batch)
    except CannotJudge as reason:
        return reason
    return verdict if isinstance(verdict, Finding) else None


def probe_eval(model, train_loss, eval_loss) -> dict:
    """What the probes of a batch find. `train_loss`, `eval_loss`: of the inputs, in the place of the trainer's."""
    twin = SimpleNamespace(
        compute_loss=lambda model, inputs, num_items_in_batch: train_loss(inputs),
        prediction_step=lambda model, inputs, prediction_loss_only: (eval_loss(inputs), None, None),
        compute_loss_context_manager=nullcontext,
    )
    run = SimpleNamespace(is_exact=False, objective=None, is_evaluated=True)
    batch = SimpleNamespace(model=model, twin=twin, run=run, short_inputs=batch_of(), count_items=lambda inputs: None)
    guards = {"eval_not_repeatable": EvalNotRepeatable(), "eval_train_mismatch": EvalTrainMismatch()}
    return {name: probe(guard, batch) for name, guard in guards.items()}


def test_a_healthy_evaluation_is_silent_and_leaves_no_trace():
    model, generator = gpt2(0.1).train(), torch.get_rng_state()
    results = probe_eval(model, loss_of(model), loss_of(model))
    assert results == {"eval_not_repeatable": None, "eval_train_mismatch": None}
    assert all(module.training for module in model.modules()) and torch.equal(generator, torch.get_rng_state())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("bf16", [False, True])
def test_an_evaluation_in_bf16_is_silent(bf16, tiny_model):
    def evaluated(inputs):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return tiny_model(**inputs).loss

    assert not any(probe_eval(tiny_model, loss_of(tiny_model), evaluated).values())


def test_dropout_that_is_left_on():
    model = gpt2(0.1)

    def evaluated(inputs):
        model.train()
        return model(**inputs).loss

    results = probe_eval(model, lambda inputs: model.eval()(**inputs).loss, evaluated)
    assert results["eval_not_repeatable"].id == "eval_not_repeatable"
    assert "dropout" in results["eval_not_repeatable"].likely_causes[0]


@pytest.mark.parametrize(("factor", "name"), [(8.0, "8 times"), (0.25, "1/4")])
def test_a_factor_is_named(factor, name, tiny_model):
    results = probe_eval(tiny_model, loss_of(tiny_model), lambda inputs: loss_of(tiny_model)(inputs) * factor)
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
    finding = probe_eval(tiny_model, loss_of(tiny_model), unshifted)["eval_train_mismatch"]
    assert finding.id == "eval_train_mismatch" and "labels, shift" in finding.likely_causes[0]


def test_a_loss_that_is_not_finite_is_no_verdict(tiny_model):
    results = probe_eval(tiny_model, loss_of(tiny_model), lambda inputs: torch.tensor(float("nan")))
    assert all(isinstance(result, CannotJudge) for result in results.values())


def test_repeated_and_equal_losses():
    assert EvalNotRepeatable.judge(9.0, 9.0001) is None and EvalNotRepeatable.judge(0.0, 0.0) is None
    assert isinstance(EvalNotRepeatable.judge(9.0, 9.001), Finding)
    assert EvalTrainMismatch.judge(8.32, 8.30) is None and EvalTrainMismatch.judge(0.0, 0.0) is None
    assert (
        EvalTrainMismatch.judge(4.436, 0.5536).found
        == "eval loss 4.4360 (8 times of the training loss of the same rows)"
    )
    assert EvalTrainMismatch.judge(1.0, 0.0).id == "eval_train_mismatch"


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
    finding = EvalTrainMismatch.judge_mean(losses, tokens, reported)
    assert (finding is not None) == fires
    assert finding is None or finding.id == "eval_train_mismatch"


def test_no_batches_no_verdict():
    with pytest.raises(CannotJudge, match="no batch"):
        EvalTrainMismatch.judge_mean([], [], 4.0)


@pytest.mark.parametrize(
    ("ratio", "name"), [(8.01, "8 times"), (0.5, "1/2"), (1.0, ""), (2.5, ""), (0.0, ""), (float("inf"), "")]
)
def test_factors(ratio, name):
    assert name_factor(ratio) == name


# --- other rows, and the run's first ones


def evaluate(guard, rows, loss=4.0, repeated=(), name="eval_loss"):
    """The ids of what one evaluation finds. `rows`: of each rank."""
    ranks = [{"rows": each, "losses": [4.0], "counts": [10]} for each in rows]
    metrics, run = {name: loss}, SimpleNamespace(is_exact=True, objective=None, vocab_size=257)
    verdicts = guard.observe_eval(Evaluation(run, 8, 80, metrics, ranks, [], 1, list(repeated)))
    return [verdict.id for verdict in verdicts if isinstance(verdict, Finding)]


def test_the_same_rows_in_any_order_and_other_rows():
    guard, rows = EvalNotRepeatable(), [np.arange(9), np.arange(3), np.arange(5)]
    guard.setup(None)
    assert evaluate(guard, [rows[:2], rows[2:]]) == evaluate(guard, [rows[::-1], rows[:1]]) == []
    other = EvalNotRepeatable()
    other.setup(None)
    other.load(json.loads(json.dumps(guard.save())))  # as after a resume
    assert evaluate(other, [rows[:2]]) == ["eval_not_repeatable"]
    assert evaluate(other, [rows[:2]], name="eval_other_loss") == []  # another eval set


@pytest.mark.parametrize(
    ("repeated", "found"), [((), 0), ((3.0, 3.0), 0), ((3.0, 3.001), 1), ((math.nan, math.nan), 0)]
)
def test_the_pinned_rows_are_evaluated_twice(repeated, found):
    guard = EvalNotRepeatable()
    guard.setup(None)
    assert len(evaluate(guard, [[np.arange(9)]], repeated=repeated)) == found


def test_the_mean_over_all_ranks():
    assert evaluate(EvalTrainMismatch(), [[], []]) == []
    assert evaluate(EvalTrainMismatch(), [[], []], loss=8.0) == ["eval_train_mismatch"]


# --- train and eval apart


@pytest.mark.parametrize(("eval_loss", "severity"), [(3.4, None), (4.8, "info"), (6.0, "warning"), (1.5, "info")])
def test_train_and_eval_apart(eval_loss, severity):
    finding = TrainEvalGap.judge([3.0] * 20, eval_loss, is_first_pass=True)
    assert (finding.severity if finding else None) == severity
    assert TrainEvalGap.judge([3.0] * 20, eval_loss, is_first_pass=False) is None


def test_the_gap_waits_and_knows_noise_and_falling_losses():
    assert TrainEvalGap.judge([3.0] * 19, 9.0, True) is None
    assert TrainEvalGap.judge([10 - 0.3 * i for i in range(20)], 4.5, True) is None
    assert TrainEvalGap.judge([3.0] * 20, math.nan, True) is None


def test_an_eval_loss_above_a_guess_needs_no_ratio():
    assert TrainEvalGap.judge([5.0] * 20, 6.5, True, vocab_size=257).severity == "info"
    assert TrainEvalGap.judge([5.0] * 20, 6.5, True, vocab_size=1000) is None
