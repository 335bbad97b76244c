"""Embeddings that should be one, and weights that should be the same on all ranks."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from recipe.guards.guard import CannotJudge, NotApplicable
from recipe.guards.rank_divergence import RankDivergence, parameter_checksums
from recipe.guards.taps import LocalStep
from recipe.guards.ties import UntiedWeights


def llama(**changes):
    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes)))


def test_tied_and_untied_weights():
    tied, untied = llama(tie_word_embeddings=True), llama()
    assert UntiedWeights.judge(tied) is None and UntiedWeights.judge(untied) is None
    tied.lm_head.weight = nn.Parameter(tied.lm_head.weight.detach().clone())
    finding = UntiedWeights.judge(tied)
    assert finding.severity == "warning" and "equal so far" in finding.found
    json.dumps(finding.evidence)


def test_what_has_no_head_or_no_memory_cannot_be_judged():
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True
    )
    with pytest.raises(CannotJudge, match="no output embedding"):
        UntiedWeights.judge(LlamaForCausalLM(config).model)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    with pytest.raises(CannotJudge, match="no memory"):
        UntiedWeights.judge(model)
    with pytest.raises(CannotJudge, match="sharded"):
        RankDivergence().setup(SimpleNamespace(world_size=2, model=model))


# --- ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_bit_changes_one_checksum(dtype):
    model = llama().to(dtype)
    names = [name for name, _ in model.named_parameters()]
    before = parameter_checksums(model)
    with torch.no_grad():
        weight = model.model.norm.weight
        weight[3] = torch.nextafter(weight[3].double(), torch.tensor(2.0).double()) if dtype == torch.float64 else 1.01
    after = parameter_checksums(model)
    assert before.dtype == torch.int64 and (before != after).sum() == 1
    finding = RankDivergence.judge(names, [before.tolist(), after.tolist(), before.tolist()])
    assert finding.severity == "error" and finding.evidence["odd_ranks"] == [1]
    assert "model.norm.weight" in finding.found
    assert RankDivergence.judge(names, [before.tolist()] * 4) is None


def test_ranks_are_compared_now_and_then():
    guard, model = RankDivergence(), llama()
    with pytest.raises(NotApplicable, match="one rank"):
        guard.setup(SimpleNamespace(world_size=1, model=model))
    guard.setup(SimpleNamespace(world_size=2, model=model))
    measured = [step for step in range(1, 301) if guard.measure(LocalStep(step=step - 1)) is not None]
    assert measured == [1, 10, 100, 200, 300]
    sums = parameter_checksums(model).tolist()
    other = [sums[0] + 1, *sums[1:]]
    for ranks, found in (([sums, sums], [False]), ([sums, other], [True]), ([None, None], [])):
        step = SimpleNamespace(payloads={"RankDivergence": ranks})
        assert [hasattr(verdict, "found") for verdict in guard.observe(step)] == found
