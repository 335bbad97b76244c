"""What the parameters do: on hand-written numbers, and on tiny models under torch's AdamW."""

import json
import math

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from recipe.guards.finding import CannotJudge
from recipe.guards.thresholds import FROZEN_STEPS, LOST_ELEMENTS, LOST_STEPS, PER_TENSOR, PLAIN_GRADIENT
from recipe.guards.updates import (
    check_frozen,
    check_lost_updates,
    check_optimizer_groups,
    check_ranks,
    check_resume,
    check_small_updates,
    check_stopped,
    check_tied,
    check_undone,
    count_kept,
    count_moved,
    count_optimizer_states,
    count_small,
    have_moved,
    largest_gradients,
    parameter_checksums,
    sample_gradients,
    sample_parameters,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def named(model):
    return list(model.named_parameters())


def llama(**changes):
    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes)))


def watch(model, compute_loss, optimizer, rates):
    """What the caller keeps over the first steps: largest gradients and whether each parameter moved."""
    parameters = named(model)
    largest = torch.zeros(len(parameters))
    moved = torch.zeros(len(parameters), dtype=torch.bool)
    for rate in rates:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        compute_loss().backward()
        before = sample_parameters(parameters)
        largest = torch.maximum(largest, largest_gradients(parameters))
        optimizer.step()
        moved |= have_moved(before, sample_parameters(parameters))
    return parameters, largest.tolist(), moved.tolist(), rates


def frozen(model, compute_loss, optimizer=None, rates=(1e-3,) * FROZEN_STEPS):
    optimizer = optimizer or torch.optim.AdamW(model.parameters())
    return check_frozen(FROZEN_STEPS, 0, *watch(model, compute_loss, optimizer, list(rates)))


def language_loss(model):
    return lambda: model(input_ids=(ids := torch.randint(0, 20, (2, 16))), labels=ids).loss


# --- measuring


def test_a_sample_is_a_small_copy():
    parameter = nn.Parameter(torch.arange(40_000.0).view(200, 200))
    sample = sample_parameters([("w", parameter)])["w"]
    with torch.no_grad():
        parameter.zero_()
    assert PER_TENSOR / 2 < len(sample) <= PER_TENSOR and sample[1] == 11 and not sample.requires_grad


def test_gradients_are_measured_over_the_whole_tensor_and_are_0_where_there_are_none():
    embedding = nn.Embedding(10_000, 8)
    embedding(torch.tensor([7778])).sum().backward()
    seen, unseen, other = nn.Linear(4, 4), nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(0))
    seen(torch.full((1, 4), 2.0)).sum().backward()
    parameters = [("e", embedding.weight), ("w", seen.weight), ("none", unseen), ("empty", other)]
    assert largest_gradients(parameters).tolist() == [PLAIN_GRADIENT, 2.0, 0.0, 0.0]
    assert list(sample_gradients(parameters)) == ["e", "w"]


# --- covered


def test_an_optimizer_over_all_parameters_is_silent():
    model = llama()
    assert check_optimizer_groups(0, 0, named(model), torch.optim.AdamW(model.parameters()), True) is None


def test_parameters_in_no_group_are_an_error():
    model = llama()
    some = [p for name, p in model.named_parameters() if "norm" not in name]
    finding = check_optimizer_groups(0, 0, named(model), torch.optim.AdamW(some), True)
    assert finding.severity == "error" and finding.evidence["num_missing"] == 5
    json.dumps(finding.evidence)


def test_a_stale_optimizer_is_an_error_and_one_with_copies_cannot_be_judged():
    old, model = llama(), llama()
    stale = torch.optim.AdamW(old.parameters())
    assert check_optimizer_groups(0, 0, named(model), stale, True).severity == "error"

    class WithMasterCopies(torch.optim.AdamW):
        pass

    with pytest.raises(CannotJudge, match="WithMasterCopies"):
        check_optimizer_groups(0, 0, named(model), WithMasterCopies(old.parameters()), True)


def test_frozen_on_purpose_is_information_and_much_of_a_new_model_a_warning():
    model = llama()
    model.model.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.lm_head.parameters())
    assert check_optimizer_groups(0, 0, named(model), optimizer, is_new_model=False).severity == "info"
    assert check_optimizer_groups(0, 0, named(model), optimizer, is_new_model=True).severity == "warning"


# --- reached and moved


def test_a_healthy_model_is_silent_also_when_warmup_begins_at_0():
    model = llama()
    assert frozen(model, language_loss(model), rates=[0.0, *[1e-3] * FROZEN_STEPS]) is None


def test_too_few_steps_with_a_learning_rate_are_not_judged():
    model = llama()
    stale = torch.optim.AdamW(llama().parameters())
    assert frozen(model, language_loss(model), stale, rates=[0.0] * 20 + [1e-3] * (FROZEN_STEPS - 1)) is None
    assert frozen(model, language_loss(model), stale, rates=[1e-8] * 20) is None


def test_a_stale_optimizer_moves_nothing():
    model = llama()
    stale = torch.optim.AdamW([p.detach().clone().requires_grad_() for p in model.parameters()])
    finding = frozen(model, language_loss(model), stale)
    assert finding.severity == "error" and finding.evidence["count"] == len(named(model))


def test_a_layer_without_gradient_is_a_warning():
    model = llama()
    model.model.layers[1].register_forward_hook(lambda module, args, output: output.detach() + 0 * args[0])
    finding = frozen(model, language_loss(model))
    assert finding.severity == "warning" and finding.evidence["names"][0].startswith("model.layers.1.")
    json.dumps(finding.evidence)


def test_rows_of_an_embedding_that_no_token_asked_for_are_no_fault():
    model = nn.Sequential(nn.Embedding(30_001, 16), nn.Linear(16, 1))
    one_token = torch.tensor([12_345])  # in no sampled row
    parameters = named(model)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    assert frozen(model, lambda: model(one_token).sum(), optimizer) is None
    assert 0 < largest_gradients(parameters)[0] <= PLAIN_GRADIENT < largest_gradients(parameters)[1]


class Lora(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = nn.Linear(8, 8).requires_grad_(False)
        self.a, self.b = nn.Linear(8, 4, bias=False), nn.Linear(4, 8, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


class ZeroInitialised(nn.Module):
    """Two residual blocks with zero output projections, and a zero gate: gradients reach the inside step by step."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.outer = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.gate = nn.Parameter(torch.zeros(1))
        for layer in self.outer:
            nn.init.zeros_(layer.weight)

    def forward(self, x):
        for inner, outer in zip(self.inner, self.outer, strict=True):
            x = x + outer(torch.relu(inner(x)))
        return x + self.gate * x


@pytest.mark.parametrize("kind", [Lora, ZeroInitialised])
def test_zero_initialised_parts_are_no_fault(kind):
    model = kind()
    compute_loss = lambda: (model(torch.randn(16, 8)) - 1).pow(2).mean()  # noqa: E731
    assert frozen(model, compute_loss, rates=[0.0, *[1e-3] * FROZEN_STEPS]) is None


class Experts(nn.Module):
    """Two layers of four experts; `used` are the experts that a token reaches."""

    def __init__(self, used):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"experts": nn.ModuleList(self.four())}) for _ in range(2))
        self.used = used

    def four(self):
        return [nn.Linear(8, 8) for _ in range(4)]

    def forward(self, x):
        for layer in self.layers:
            x = x + sum(layer["experts"][i](x) for i in self.used)
        return x


def test_an_expert_without_tokens_is_information_and_experts_that_are_all_idle_a_warning():
    for used, severity in ([0, 1, 2, 3], None), ([0, 1, 2], "info"), ([0], "info"), ([], "warning"):
        model = Experts(used)
        head = nn.Linear(8, 1)
        model.add_module("head", head)
        finding = frozen(model, lambda m=model, h=head: h(m(torch.randn(16, 8))).pow(2).mean())
        assert (finding.severity if finding else None) == severity


# --- low precision


class AdamWOnFloat32Copies(torch.optim.AdamW):
    """AdamW on float32 copies whose result is written to the bf16 weights: as mixed-precision optimizers do."""

    def __init__(self, parameters, **kwargs):
        self.low = list(parameters)
        super().__init__([p.detach().float().requires_grad_() for p in self.low], **kwargs)

    @torch.no_grad()
    def step(self, closure=None):
        copies = self.param_groups[0]["params"]
        for copy, low in zip(copies, self.low, strict=True):
            copy.grad = low.grad.float()
        super().step()
        for copy, low in zip(copies, self.low, strict=True):
            low.copy_(copy)


def lost(dtype, optimizer_class, learning_rate):
    model = llama(initializer_range=0.1).to(dtype)
    parameters = named(model)
    optimizer = optimizer_class(model.parameters(), lr=learning_rate)
    before = sample_parameters(parameters)
    for _ in range(LOST_STEPS):
        model.zero_grad()
        ids = torch.randint(0, 64, (2, 16))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    counts = count_moved(before, sample_gradients(parameters), parameters, LOST_STEPS * learning_rate).tolist()
    return check_lost_updates(LOST_STEPS, 0, *counts, learning_rate)


def test_pure_bf16_at_a_small_rate_loses_its_updates():
    finding = lost(torch.bfloat16, torch.optim.AdamW, 5e-5)
    assert finding.severity == "warning" and finding.evidence["moved"] < 0.3 * finding.evidence["judged"]
    json.dumps(finding.evidence)


@pytest.mark.parametrize(
    ("dtype", "optimizer", "learning_rate"),
    [
        (torch.bfloat16, AdamWOnFloat32Copies, 5e-5),
        (torch.bfloat16, torch.optim.AdamW, 3e-3),  # large steps are not lost
        (torch.bfloat16, torch.optim.AdamW, 1e-8),  # a warmup's: float32 would not show either
        (torch.float32, torch.optim.AdamW, 5e-5),
    ],
)
def test_updates_that_are_kept_are_silent(dtype, optimizer, learning_rate):
    assert lost(dtype, optimizer, learning_rate) is None


def test_few_elements_are_not_judged():
    assert check_lost_updates(64, 0, 0, LOST_ELEMENTS - 1, 1e-5) is None
    assert check_lost_updates(64, 0, 0, LOST_ELEMENTS, 1e-5) is not None
    assert count_moved({}, {}, [("w", nn.Parameter(torch.zeros(3)))], 1.0).tolist() == [0, 0]


# --- tied


def test_tied_and_untied_weights():
    tied, untied = llama(tie_word_embeddings=True), llama()
    assert check_tied(0, 0, tied) is None and check_tied(0, 0, untied) is None
    tied.lm_head.weight = nn.Parameter(tied.lm_head.weight.detach().clone())
    finding = check_tied(0, 0, tied)
    assert finding.severity == "warning" and "equal so far" in finding.found
    json.dumps(finding.evidence)


def test_what_has_no_head_or_no_memory_cannot_be_judged():
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True
    )
    with pytest.raises(CannotJudge, match="no output embedding"):
        check_tied(0, 0, LlamaForCausalLM(config).model)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    with pytest.raises(CannotJudge, match="no memory"):
        check_tied(0, 0, model)
    with pytest.raises(CannotJudge, match="sharded"):
        parameter_checksums(model)


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
    finding = check_ranks(10, 0, names, [before.tolist(), after.tolist(), before.tolist()])
    assert (
        finding.severity == "error" and "model.norm.weight" in finding.found and finding.evidence["odd_ranks"] == [1]
    )
    assert check_ranks(10, 0, names, [before.tolist()] * 4) is None


# --- resume


def resume(before=3.0, after=3.0, dtype=torch.float32, states=(9, 9)):
    return check_resume(10, 0, before, after, dtype, *states)


@pytest.mark.parametrize(
    ("arguments", "severity"),
    [
        ({}, None),
        ({"after": 3.0009}, None),
        ({"after": 3.002}, "error"),
        ({"after": 3.002, "dtype": torch.bfloat16}, None),
        ({"after": 2.9, "dtype": torch.bfloat16}, "error"),
        ({"after": math.nan}, "error"),
        ({"states": (9, 0)}, "warning"),
        ({"states": (0, 0)}, None),  # plain SGD
        ({"before": None, "after": None, "states": (None, 0)}, None),
    ],
)
def test_the_pinned_batch_and_the_optimizer_after_a_resume(arguments, severity):
    finding = resume(**arguments)
    assert (finding.severity if finding else None) == severity


def test_states_of_an_optimizer_are_counted():
    model = nn.Linear(4, 4)
    adam, sgd = torch.optim.AdamW(model.parameters()), torch.optim.SGD(model.parameters())
    assert count_optimizer_states(adam) == 0
    model(torch.randn(2, 4)).sum().backward()
    adam.step()
    sgd.step()
    assert (count_optimizer_states(adam), count_optimizer_states(sgd)) == (2, 0)


# --- small, undone and stopped


def test_adams_first_steps_are_of_the_size_of_the_rate():
    before, gradient = {"w": torch.zeros(100)}, {"w": torch.ones(100)}
    for moved, small in ((-1e-3, 0), (-4e-5, 100), (1e-3, 100), (0.0, 100)):  # the third goes uphill
        assert count_small(before, {"w": before["w"] + moved}, gradient, {"w": 1e-3}).tolist() == [small, 100]
    assert count_small(before, before, {"w": torch.zeros(100)}, {"w": 1e-3}).tolist() == [0, 0]


@pytest.mark.parametrize(("small", "found"), [(40, False), (60, True)])
def test_small_updates_are_found(small, found):
    assert (check_small_updates(9, 90, small, 100) is not None) is found
    assert check_small_updates(9, 90, 0, 0) is None


@pytest.mark.parametrize(("now", "kept"), [(1.0, 100), (0.6, 100), (0.4, 0), (0.0, 0)])
def test_what_is_put_back_after_a_step_is_not_kept(now, kept):
    parameter = nn.Parameter(torch.full((100,), now))
    before, after = {"w": torch.zeros(100)}, {"w": torch.ones(100)}
    counts = count_kept(before, after, [("w", parameter)]).tolist()
    assert counts == [kept, 100] and (check_undone(9, 90, *counts) is None) is (kept == 100)


def test_parameters_that_no_longer_get_a_gradient():
    model = llama()
    names = [name for name, _ in named(model)]
    for stopped, severity in ((names, "warning"), (["model.layers.0.mlp.up_proj.weight"], "info")):
        finding = check_stopped(50, 500, named(model), stopped)
        assert (finding.id, finding.severity) == ("frozen_parameters", severity)


def test_experts_that_get_no_token_any_more_are_information():
    experts = [(f"layers.0.experts.{n}.w", nn.Parameter(torch.zeros(2, 2))) for n in range(4)]
    assert check_stopped(50, 500, experts, ["layers.0.experts.3.w"]).severity == "info"
