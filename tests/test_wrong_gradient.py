"""The gradient against the loss: wrong backwards are caught, healthy models of many kinds are not."""

import random

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
)

from recipe.guards.guard import CannotJudge, Finding
from recipe.guards.sandbox import undisturbed
from recipe.guards.wrong_gradient import Watched, WrongGradient
from tests.test_guards_on_runs import alarms, check_first, check_healthy, make_model, train

IDS = torch.randint(3, 250, (2, 64), generator=torch.Generator().manual_seed(1))
DROPOUT = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
TINY = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": None, "eos_token_id": None}


def model_loss(model) -> torch.Tensor:
    return model(input_ids=IDS, labels=IDS).loss


def probe(model, loss=model_loss, is_alone: bool = True) -> Finding | None:
    def compute_loss():
        torch.manual_seed(5)
        return loss(model)

    return WrongGradient.judge_model(model.train(), compute_loss, is_alone)


def gpt2(dropout: dict = DROPOUT, **checkpointing) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=4, n_positions=64, use_cache=False, **dropout)
    model = GPT2LMHeadModel(config)
    if checkpointing:
        model.activation_checkpointing_enable(checkpointing)
    return model


def mamba() -> MambaForCausalLM:
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(**TINY, state_size=4))


def trained(model, steps: int, loss=model_loss):
    optimizer = torch.optim.AdamW(model.train().parameters(), 3e-3)
    for _ in range(steps):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def after_layer(change, layer: int = 0) -> LlamaForCausalLM:
    model = make_model()
    model.model.layers[layer].register_forward_hook(lambda module, inputs, output: change(output))
    return model


# --- wrong


class HalfTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden):
        return hidden.clone()

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        gradient[..., ::2] *= 2
        return gradient


def reduced(hidden: torch.Tensor) -> torch.Tensor:
    if hidden.requires_grad:
        hidden.register_hook(lambda gradient: gradient / 10)
    return hidden


@pytest.mark.parametrize("steps", [0, 40])
@pytest.mark.parametrize("change", [HalfTwice.apply, reduced], ids=["function", "hook"])
def test_a_wrong_backward_is_caught(change, steps):
    finding = probe(trained(after_layer(change), steps))
    assert (finding.id, finding.severity) == ("wrong_gradient", "warning")
    assert abs(finding.evidence["ratios"][0] - 1) > 0.05 and not finding.evidence["stops_gradients"]


@pytest.mark.parametrize("is_sum", [False, True])
def test_a_loss_that_is_computed_in_bf16_is_named(is_sum):
    """Also where its sum is rounded, and divided in float32."""
    count = IDS[:, 1:].numel()

    def coarse(model):
        logits, reduction = model(input_ids=IDS).logits[:, :-1].bfloat16(), "sum" if is_sum else "mean"
        loss = F.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten(), reduction=reduction).float()
        return loss / count if is_sum else loss

    model = trained(make_model(), 40).train()
    finding = WrongGradient.judge_model(model, lambda: coarse(model), num_items=count)
    assert finding.severity == "warning" and "rounded to bf16" in finding.found


@pytest.mark.parametrize("is_reentrant", [True, False])
def test_dropout_drawn_again_by_checkpointing_is_caught(is_reentrant):
    finding = probe(gpt2(use_reentrant=is_reentrant, preserve_rng_state=False))
    assert finding.severity == "warning" and "checkpointing" in finding.found
    assert finding.evidence["gap"] > 0.3
    no_dropout = dict.fromkeys(DROPOUT, 0.0)
    assert probe(gpt2(no_dropout, use_reentrant=is_reentrant, preserve_rng_state=False)) is None


def test_a_detached_residual_path_is_found():
    """As information: it may be on purpose."""
    model = make_model()
    layer = model.model.layers[1]

    def forward(hidden, **options):
        hidden = hidden.detach() + layer.self_attn(hidden_states=layer.input_layernorm(hidden), **options)[0]
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    layer.forward = forward
    finding = probe(trained(model, 40))
    assert (finding.id, finding.severity) == ("wrong_gradient", "info") and finding.evidence["stops_gradients"]
    assert "perhaps on purpose" in finding.likely_causes[0]


# --- healthy


def frozen(**changes) -> LlamaForCausalLM:
    model = make_model(**changes)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("down_proj" in name)
    return model


HEALTHY = {
    "new": make_model,
    "trained": lambda: trained(make_model(), 40),
    "learned by heart": lambda: trained(make_model(), 300),
    "untied, 4096 tokens": lambda: make_model(tie_word_embeddings=False, vocab_size=4096),
    "bf16 weights": lambda: make_model().bfloat16(),
    "one part trains": frozen,
    "dropout 0.1": gpt2,
    "dropout 0.5": lambda: gpt2(dict.fromkeys(DROPOUT, 0.5)),
    "dropout, trained": lambda: trained(gpt2(), 40),
    "checkpointing": lambda: gpt2(use_reentrant=False),
    "reentrant checkpointing": lambda: gpt2(use_reentrant=True),
    "Mamba": mamba,
    "Mamba, trained": lambda: trained(mamba(), 20),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_models_are_judged_and_silent(name):
    assert probe(HEALTHY[name]()) is None


def smoothed(model):
    return F.cross_entropy(model(input_ids=IDS).logits[:, :-1].mT, IDS[:, 1:], label_smoothing=0.1)


def with_z_loss(model):
    outputs = model(input_ids=IDS, labels=IDS)
    return outputs.loss + 1e-3 * outputs.logits.logsumexp(-1).square().mean()


def noisy(model):
    embeddings = model.get_input_embeddings()(IDS)
    return model(inputs_embeds=embeddings + 0.1 * torch.randn_like(embeddings), labels=IDS).loss


def summed(model):
    return 5000 * model_loss(model)


@pytest.mark.parametrize("loss", [smoothed, with_z_loss, noisy, summed])
def test_custom_losses_are_judged_and_silent(loss):
    assert probe(make_model(), loss) is None
    assert probe(trained(make_model(), 20), loss) is None


def towards_itself(model):
    outputs = model(input_ids=IDS, labels=IDS, output_hidden_states=True)
    lower, upper = outputs.hidden_states[1:3]
    return outputs.loss + F.mse_loss(lower, upper.detach()) / 10


def from_a_teacher(model):
    with torch.no_grad():
        teacher = model(input_ids=IDS).logits.softmax(-1)
    student = (model(input_ids=IDS).logits / 2).log_softmax(-1)
    return model_loss(model) + F.kl_div(student, teacher, reduction="batchmean") / 100


def weighted_by_itself(model):
    chosen = model(input_ids=IDS).logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None])
    return -(chosen.exp().detach() * chosen).mean()


@pytest.mark.parametrize("loss", [towards_itself, from_a_teacher, weighted_by_itself])
@pytest.mark.parametrize("steps", [0, 40])
def test_gradients_stopped_on_purpose_are_no_alarm(loss, steps):
    finding = probe(trained(make_model(), steps, loss), loss)
    assert finding is None or finding.severity == "info"


# --- no verdict


def quantized(steps: int, levels: int) -> LlamaForCausalLM:
    model = make_model()

    class Rounded(torch.nn.Module):
        def forward(self, weight):
            scale = weight.abs().mean() if levels == 1 else weight.abs().max() / levels
            return weight + ((weight / scale).clamp(-levels, levels).round() * scale - weight).detach()

    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.utils.parametrize.register_parametrization(module, "weight", Rounded())
    return trained(model, steps)


def mixtral(steps: int) -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32, "num_local_experts": 4}
    return trained(MixtralForCausalLM(MixtralConfig(**TINY, **sizes, output_router_logits=True)), steps)


@pytest.mark.parametrize("steps", [0, 20, 40])
@pytest.mark.parametrize("make", [lambda n: quantized(n, 127), lambda n: quantized(n, 1), mixtral])
def test_rounded_weights_and_routing_are_no_alarm(make, steps):
    try:
        assert probe(make(steps)) is None
    except CannotJudge as reason:
        assert "not smooth" in str(reason)


def test_a_loss_that_differs_each_time_is_no_verdict():
    draws = random.Random(1)
    with pytest.raises(CannotJudge, match="differs each time"):
        probe(make_model(), lambda model: model_loss(model) * (1 + draws.random() / 100))


def test_a_gradient_near_zero_is_no_verdict():
    with pytest.raises(CannotJudge, match="too small"):
        probe(make_model(), lambda model: model_loss(model) * 1e-6 + 1.0)
    with pytest.raises(CannotJudge, match="too small"):
        probe(make_model(), lambda model: model_loss(model) * 0)


def test_a_loss_that_is_not_finite_is_no_verdict():
    with pytest.raises(CannotJudge, match="not finite"):
        probe(make_model(), lambda model: model_loss(model) * torch.inf)


def test_steps_that_disagree_are_no_verdict():
    with pytest.raises(CannotJudge, match="steps of different sizes"):
        WrongGradient.judge([1.5, 1.3, 1.6], (2.1, 2.1), Watched())
    assert WrongGradient.judge([1.5, 1.5, 1.5], (2.1, 2.1), Watched()).severity == "warning"
    assert WrongGradient.judge([1.04, 1.04, 1.04], (2.1, 2.1), Watched()).severity == "info"


@pytest.mark.parametrize("is_wrong", [False, True])
def test_ranks_call_the_loss_equally_often(is_wrong):
    calls = []
    finding = probe(
        after_layer(HalfTwice.apply) if is_wrong else make_model(), lambda m: calls.append(1) or model_loss(m), False
    )
    assert (finding is not None) == is_wrong and len(calls) == 10


# --- leaving no trace


def test_nothing_is_changed():
    model = gpt2(use_reentrant=False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    ran = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(ran.append)
        parameter.register_hook(ran.append)
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    functions = [getattr(module, "_gradient_checkpointing_func", None) for module in model.modules()]
    before = [(p, p.data_ptr(), p.detach().clone()) for p in model.parameters()]
    generator = torch.get_rng_state()
    with undisturbed(model):
        assert probe(model) is None
    assert all(p.data_ptr() == place and torch.equal(p, value) for p, place, value in before)
    assert [p for p, *_ in before] == list(model.parameters())
    assert all(
        torch.equal(p.grad, torch.ones_like(p)) if p is model.lm_head.weight else p.grad is None for p, *_ in before
    )
    assert modes == [module.training for module in model.modules()] and model.is_activation_checkpointing
    assert functions == [getattr(module, "_gradient_checkpointing_func", None) for module in model.modules()]
    assert torch.equal(generator, torch.get_rng_state()) and not ran


def test_weights_are_back_after_an_error():
    model, calls = make_model(), []
    before = list(model.parameters())

    def loss(model):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return model_loss(model)

    with pytest.raises(RuntimeError):
        probe(model, loss)
    assert [id(parameter) for parameter in model.parameters()] == [id(parameter) for parameter in before]


# --- on runs


@pytest.mark.parametrize("arguments", [{}, {"bf16": True}])
def test_on_a_run(tmp_path, arguments):
    check_first(train(tmp_path, model=after_layer(HalfTwice.apply), **arguments), "wrong_gradient", 0)
    check_healthy(train(tmp_path, **arguments), "wrong_gradient")


def test_on_a_run_with_checkpointing(tmp_path):
    run = {"activation_checkpointing": True}
    wrong = run | {"activation_checkpointing_kwargs": {"use_reentrant": False, "preserve_rng_state": False}}
    check_first(train(tmp_path, model=gpt2(), **wrong), "wrong_gradient", 0)
    check_healthy(train(tmp_path, model=gpt2(), **run), "wrong_gradient")


class OwnLoss(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return towards_itself(model)


def test_a_custom_loss_on_a_run(tmp_path):
    guards = train(tmp_path, trainer_class=OwnLoss)
    assert "wrong_gradient" not in dict(alarms(guards))
