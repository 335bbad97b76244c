"""Parameters that do not train: on hand-written numbers, and on tiny models under torch's AdamW."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from recipe.guards.frozen import FrozenParameters
from recipe.guards.gradients import PER_TENSOR
from recipe.guards.guard import PROBE, CannotJudge, Clear
from recipe.guards.taps import LocalStep
from recipe.guards.updates import FIRST_STEPS, PLAIN_GRADIENT, largest_gradients, sample_gradients, sample_once

judge_groups, judge_stopped = FrozenParameters.judge_groups, FrozenParameters.judge_stopped


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def named(model):
    return list(model.named_parameters())


def llama(**changes):
    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes)))


def set_up(model, optimizer=None) -> FrozenParameters:
    guard = FrozenParameters()
    optimizer = optimizer or torch.optim.AdamW(model.parameters())
    guard.setup(SimpleNamespace(named_parameters=named(model), optimizer=optimizer))
    return guard


def steps(guard, compute_loss, optimizer, rates) -> list:
    """One step for each learning rate; what the guard yields."""
    verdicts = []
    for rate in rates:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        compute_loss().backward()
        local = LocalStep(learning_rates=[(rate, None)])
        guard.before_step(local)
        optimizer.step()
        guard.after_step(local)
        verdicts += observe(guard, local)
    return verdicts


def observe(guard, local) -> list:
    measured = dict(guard.measure(local) or {})
    if "reached" in measured:
        measured["reached"] = measured["reached"].tolist()
    run = SimpleNamespace(model=torch.nn.Module())  # nothing in it is checkpointed
    return list(guard.observe(SimpleNamespace(run=run, payload=lambda _: measured or None)))


def frozen(model, compute_loss, optimizer=None, rates=(1e-3,) * FIRST_STEPS):
    """It judges in the step after the first ones."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters())
    verdicts = steps(set_up(model), compute_loss, optimizer, [*rates, 1e-3])
    assert len(verdicts) == 1
    return None if isinstance(verdicts[0], Clear) else verdicts[0]


def language_loss(model):
    return lambda: model(input_ids=(ids := torch.randint(0, 20, (2, 16))), labels=ids).loss


# --- measuring


def test_a_sample_is_a_small_copy_taken_once():
    parameter, known = nn.Parameter(torch.arange(40_000.0).view(200, 200)), {}
    sample = sample_once(known, [("w", parameter)])["w"]
    with torch.no_grad():
        parameter.zero_()
    assert PER_TENSOR / 2 < len(sample) <= PER_TENSOR and sample[1] == 11 and not sample.requires_grad
    both = sample_once(known, [("v", nn.Parameter(torch.zeros(2))), ("w", parameter)])
    assert list(both) == ["v", "w"] and both["w"] is sample


def test_gradients_are_measured_over_the_whole_tensor_and_are_0_where_there_are_none():
    embedding = nn.Embedding(10_000, 8)
    embedding(torch.tensor([7778])).sum().backward()
    seen, unseen, other = nn.Linear(4, 4), nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(0))
    seen(torch.full((1, 4), 2.0)).sum().backward()
    parameters = [("e", embedding.weight), ("w", seen.weight), ("none", unseen), ("empty", other)]
    assert largest_gradients(parameters).tolist() == [PLAIN_GRADIENT, 2.0, 0.0, 0.0]
    assert [bool(values.any()) for values in sample_gradients(parameters[1:]).values()] == [True, False, False]


# --- covered


def test_an_optimizer_over_all_parameters_is_silent():
    model = llama()
    assert judge_groups(named(model), torch.optim.AdamW(model.parameters())) is None


def test_parameters_in_no_group_are_an_error():
    model = llama()
    some = [p for name, p in model.named_parameters() if "norm" not in name]
    finding = judge_groups(named(model), torch.optim.AdamW(some))
    assert finding.severity == "error" and finding.evidence["count"] == 5
    json.dumps(finding.evidence)


def test_a_model_of_which_nothing_trains_is_an_error():
    model = llama().requires_grad_(False)
    finding = judge_groups(named(model), torch.optim.AdamW(llama().parameters()))
    assert (finding.severity, finding.found) == ("error", "no parameter trains (…del.embed_tokens.weight)")


def test_a_stale_optimizer_is_an_error_and_one_with_copies_cannot_be_judged():
    old, model = llama(), llama()
    stale = torch.optim.AdamW(old.parameters())
    assert judge_groups(named(model), stale).severity == "error"

    class WithMasterCopies(torch.optim.AdamW):
        pass

    with pytest.raises(CannotJudge, match="WithMasterCopies"):
        judge_groups(named(model), WithMasterCopies(old.parameters()))


def test_frozen_on_purpose_is_information_and_much_of_a_new_model_a_warning():
    model = llama()
    model.model.requires_grad_(False)
    assert judge_groups(named(model), torch.optim.AdamW(model.lm_head.parameters())) is None
    assert FrozenParameters._judge_on_purpose(named(model), False, set()).severity == "info"
    assert FrozenParameters._judge_on_purpose(named(model), True, set()).severity == "warning"
    held = {id(parameter) for parameter in model.parameters()}  # they may be unfrozen later
    assert FrozenParameters._judge_on_purpose(named(model), True, held).severity == "info"


def test_the_base_of_adapters_is_frozen_on_purpose_also_where_it_is_new():
    model = llama()
    model.model.requires_grad_(False)
    run = SimpleNamespace(
        model=model,
        named_parameters=named(model),
        optimizer=torch.optim.AdamW(model.lm_head.parameters()),
        is_new_model=True,
    )
    assert [found.severity for found in FrozenParameters().inspect(run)] == ["warning"]
    model.peft_config = {}
    assert list(FrozenParameters().inspect(run)) == [Clear("frozen_parameters", PROBE)]
    del model.peft_config
    model.add_module("lora_A", nn.Linear(2, 2))  # adapters of one's own
    assert list(FrozenParameters().inspect(run)) == [Clear("frozen_parameters", PROBE)]


# --- reached and moved


def test_a_healthy_model_is_silent_also_when_warmup_begins_at_0():
    model = llama()
    assert frozen(model, language_loss(model), rates=[0.0, *[1e-3] * FIRST_STEPS]) is None


def test_too_few_steps_with_a_learning_rate_are_not_judged():
    model = llama()
    stale = torch.optim.AdamW(llama().parameters())
    for rates in ([0.0] * 20 + [1e-3] * (FIRST_STEPS - 1), [1e-8] * 20):
        assert steps(set_up(model), language_loss(model), stale, [*rates, 0.0]) == []


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
    assert frozen(model, compute_loss, rates=[0.0, *[1e-3] * FIRST_STEPS]) is None


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


# --- stopped


def test_parameters_that_no_longer_get_a_gradient():
    model = llama()
    names = [name for name, _ in named(model)]
    for stopped, severity in ((names, "warning"), (["model.layers.0.mlp.up_proj.weight"], "info")):
        finding = judge_stopped(named(model), stopped)
        assert (finding.id, finding.severity) == ("frozen_parameters", severity)


def test_experts_that_get_no_token_any_more_are_information():
    experts = [(f"layers.0.experts.{n}.w", nn.Parameter(torch.zeros(2, 2))) for n in range(4)]
    assert judge_stopped(experts, ["layers.0.experts.3.w"]).severity == "info"


@pytest.mark.parametrize("num_frozen, severity", [(None, "warning"), (1, "info")])
def test_they_are_counted_from_their_last_gradient_on(num_frozen, severity):
    model = llama()
    guard = set_up(model)
    optimizer = torch.optim.AdamW(model.parameters())
    for _, parameter in named(model)[:num_frozen]:
        parameter.grad = torch.zeros_like(parameter)
    found = []
    for number in range(1, 40):
        guard.before_step(local := LocalStep(step=number))
        found += [(number, finding.severity) for finding in observe(guard, local)]
        optimizer.zero_grad()
    first_without = 4 if num_frozen is None else 2  # while all have a gradient, every 4th step is looked at
    assert found == [(first_without - 1 + FrozenParameters.STOPPED_STEPS, severity)]


# --- unfrozen during training


def test_layers_that_are_unfrozen_in_turn_and_are_in_no_group():
    """As LISA under a Trainer, whose optimizer is made of what trains at the start. Each is reported once."""
    model = llama()
    layers = model.model.layers
    layers.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    guard, found = set_up(model, optimizer), []
    for layer in (None, layers[0], layers[1], layers[0]):
        layers.requires_grad_(False)
        if layer is not None:
            layer.requires_grad_(True)
        guard.before_step(LocalStep())
        found.append([finding.found for finding in observe(guard, LocalStep())])
    assert [len(each) for each in found] == [0, 1, 1, 0] and "9 parameters that were unfrozen" in found[1][0]


@pytest.mark.parametrize("are_added", [True, False])
def test_layers_that_are_unfrozen_and_in_the_optimizer_are_silent(are_added):
    model = llama()
    model.model.layers.requires_grad_(False)
    first = [p for p in model.parameters() if p.requires_grad or not are_added]
    optimizer = torch.optim.AdamW(first)
    guard = set_up(model, optimizer)
    model.model.layers.requires_grad_(True)
    if are_added:
        optimizer.add_param_group({"params": list(model.model.layers.parameters())})
    guard.before_step(LocalStep())
    assert observe(guard, LocalStep()) == []


def test_an_optimizer_that_keeps_copies_is_not_judged_by_what_is_unfrozen():
    model = llama()
    model.model.layers.requires_grad_(False)
    guard = set_up(model, torch.optim.AdamW(llama().parameters()))
    model.model.layers.requires_grad_(True)
    guard.before_step(LocalStep())
    assert observe(guard, LocalStep()) == []


def test_layers_that_are_trained_in_turn_are_frozen_on_purpose():
    model = llama()
    names = [name for name, _ in named(model) if "embed" not in name]
    assert judge_stopped(named(model), names).severity == "warning"
    assert judge_stopped(named(model), names, takes_turns=True).severity == "info"


def test_other_parameters_are_another_fault():
    model = llama()
    first, second = (judge_stopped(named(model), [name]) for name, _ in named(model)[:2])
    assert first.cause != second.cause and first.cause == judge_stopped(named(model), first.evidence["names"]).cause


# --- state


def saved(guard, model) -> FrozenParameters:
    """A new guard with the guard's state, as a checkpoint keeps it."""
    state = {
        name: value if hasattr(value, "dtype") else json.loads(json.dumps(value))
        for name, value in guard.save().items()
    }
    fresh = set_up(model)
    fresh.load(state)
    return fresh


@pytest.mark.parametrize("saved_at", [1, 4, FIRST_STEPS])
def test_the_first_steps_go_on_after_a_resume(saved_at):
    model = llama()
    first_part = [p for name, p in named(model) if "layers.1" not in name]
    optimizer = torch.optim.AdamW(first_part)
    guard = set_up(model)
    assert steps(guard, language_loss(model), optimizer, [1e-3] * saved_at) == []
    resumed = saved(guard, model)
    rates = [1e-3] * (FIRST_STEPS - saved_at + 1)
    (finding,) = steps(resumed, language_loss(model), optimizer, rates)
    assert finding.severity == "error" and finding.evidence["count"] == len(named(model)) - len(first_part)


def test_they_are_measured_again_once_they_were_judged():
    model = llama()
    guard = set_up(model)
    steps(guard, language_loss(model), torch.optim.AdamW(model.parameters()), [1e-3] * (FIRST_STEPS + 3))
    stale = torch.optim.AdamW(llama().parameters())
    assert len(steps(saved(guard, model), language_loss(model), stale, [1e-3] * (FIRST_STEPS + 3))) == 1
    other = llama(num_hidden_layers=1)
    assert saved(guard, other).state["reached"].shape == (2, len(named(other)))


def test_steps_without_gradient_go_on_after_a_resume():
    model = llama()
    guard = set_up(model)
    steps(guard, language_loss(model), torch.optim.AdamW(model.parameters()), [1e-3])
    model.zero_grad()
    for _ in range(10):
        guard.before_step(LocalStep())
    resumed, num_steps = saved(guard, model), 0
    while not observe(resumed, LocalStep()):
        resumed.before_step(LocalStep())
        num_steps += 1
    assert num_steps == FrozenParameters.STOPPED_STEPS - 10
