"""`slow_path`: the judgement on plain numbers, and what the dispatcher tells on real calls. No time is asserted."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from recipe.guards import RegressionCallback
from recipe.guards import slow_path as module
from recipe.guards.slow_path import CalledAttention, RanAttention, SlowPath

LARGE = dict(vocab_size=257, hidden_size=256, intermediate_size=768, num_hidden_layers=2, num_attention_heads=4)


def train(tmp_path, steps=2, **arguments) -> RegressionCallback:
    torch.manual_seed(0)
    ids = torch.randint(0, 257, (8 * steps, 32))
    values = dict(output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=2, use_cpu=True)
    values |= dict(disable_tqdm=True, report_to=[], save_strategy="no")
    guards = RegressionCallback()
    Trainer(
        LlamaForCausalLM(LlamaConfig(**LARGE)),
        TrainingArguments(**{**values, **arguments}),
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        callbacks=[guards],
    ).train()
    return guards


def found(guards) -> list[tuple[str, str]]:
    return [(each.severity, each.found) for each in guards.findings if each.id == "slow_path"]


def test_half_precision_must_not_be_slower():
    finding = SlowPath.judge_precision(torch.bfloat16, seconds=0.036, seconds_fp32=0.004)
    assert (
        finding.severity == "warning"
        and finding.found == "matrix products in bfloat16 take 9.0 times as long (as in fp32)"
    )
    assert "bf16 false" in finding.action and finding.evidence["ratio"] == pytest.approx(9.0)
    assert SlowPath.judge_precision(torch.bfloat16, 0.0079, 0.004) is None
    assert SlowPath.judge_precision(torch.float16, 0.001, 0.004) is None


def test_tf32_that_was_asked_for_is_a_warning():
    assert SlowPath.judge_tf32(0.08, 0.01, is_asked_for=True).severity == "warning"
    assert SlowPath.judge_tf32(0.08, 0.01, is_asked_for=False).severity == "info"
    assert SlowPath.judge_tf32(0.015, 0.01, is_asked_for=True) is None


def test_a_plain_kernel_is_judged_where_there_is_a_choice():
    assert SlowPath.judge_attention(0.065, 0.014).severity == "warning"
    assert SlowPath.judge_attention(0.065, 0.014, has_choice=False).severity == "info"
    assert SlowPath.judge_attention(0.015, 0.014) is None


def test_a_model_that_is_compiled_again_is_a_warning():
    assert SlowPath.judge_compiled(recompiled=2, breaks=0).severity == "warning"
    assert SlowPath.judge_compiled(recompiled=1, breaks=3).severity == "info"
    assert SlowPath.judge_compiled(recompiled=1, breaks=0) is None


@pytest.mark.parametrize(("ratio", "severities"), [(0.3, []), (9.0, ["warning"])])
def test_bf16_is_compared_with_fp32_before_step_1(ratio, severities, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "compare_products", lambda weight, dtype: (ratio, 1.0))
    guards = train(tmp_path, bf16=True)
    assert [severity for severity, _ in found(guards)] == severities and "slow_path" in guards.judged
    assert all(each.step == 0 for each in guards.findings if each.id == "slow_path")


def test_fp32_on_a_cpu_and_a_fused_kernel_are_silent(tmp_path):
    guards = train(tmp_path)
    assert found(guards) == [] and "slow_path" in guards.judged


def test_a_kernel_that_was_left_switched_to_the_plain_one(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "time_attention", lambda *arguments: (5.0, 1.0))
    with sdpa_kernel(SDPBackend.MATH):
        guards = train(tmp_path)
    assert found(guards) == [("warning", "attention ran the plain kernel (5.0 times slower than a fused one)")]


def test_the_dispatcher_tells_which_kernel_ran():
    query = torch.ones(1, 2, 16, 8)
    for context, fused in ((sdpa_kernel(SDPBackend.MATH), 0), (sdpa_kernel(SDPBackend.FLASH_ATTENTION), 1)):
        with context, CalledAttention() as called, RanAttention() as ran, torch.no_grad():
            F.scaled_dot_product_attention(query, query, query, dropout_p=0.0, is_causal=True)
        assert called.shapes == [[query.shape] * 3] and len(ran.kernels) == fused


def test_what_is_measured_is_left_as_it_was():
    threads, weight = torch.get_num_threads(), torch.randn(64, 32)
    before = weight.clone()
    assert all(seconds > 0 for seconds in module.compare_products(weight, torch.bfloat16, budget=0.0))
    assert all(
        seconds > 0 for seconds in module.time_attention([torch.Size((1, 2, 16, 8))] * 3, torch.float32, weight.device)
    )
    assert torch.get_num_threads() == threads and torch.equal(weight, before)


def test_small_models_are_not_measured(tiny_model):
    weights = module.linear_weights(tiny_model)
    assert 0 < sum(weight.numel() for weight in weights) < SlowPath.MIN_WEIGHTS


def test_the_head_is_not_counted(tiny_model):
    """A large vocabulary does not make the model's own products large."""
    head = tiny_model.get_output_embeddings().weight
    assert all(weight is not head for weight in module.linear_weights(tiny_model))


def test_recompilations_are_counted_from_step_10(monkeypatch):
    guard, graphs = SlowPath(), iter([3, 3, 4, 5])
    guard.setup(SimpleNamespace(is_compiled=True))
    monkeypatch.setattr(module, "count_graphs", lambda: next(graphs))
    monkeypatch.setattr(module, "count_graph_breaks", lambda: 0)

    measured = [guard.measure(SimpleNamespace(step=number - 1)) for number in (9, 10, 11, 12, 13)]
    steps = [SimpleNamespace(payload=lambda _, counts=counts: counts) for counts in measured]
    verdicts = [list(guard.observe(step)) for step in steps]
    assert verdicts[0] == [] and [type(v[0]).__name__ for v in verdicts[1:]] == ["Clear", "Clear", "Clear", "Finding"]
    assert verdicts[4][0].found == "2 graphs were compiled since step 10"
