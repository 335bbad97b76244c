"""The chunked loss: transformers' own loss and gradients, without a tensor of the size of all logits."""

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from recipe import loss as recipe_loss
from recipe.loss import IGNORE_INDEX, ChunkedCrossEntropy, with_chunked_loss

VOCAB = 48


def make_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1))


@pytest.fixture
def small_chunks(monkeypatch):
    """Of 5 positions: the last of 64 is shorter."""
    monkeypatch.setitem(recipe_loss.CHUNK, "cpu", 5)


@pytest.fixture
def ids():
    return torch.randint(VOCAB, (4, 16), generator=torch.Generator().manual_seed(0))


def gradients(model) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("is_bf16", [False, True])
def test_loss_and_gradients_are_cross_entropys(small_chunks, is_bf16):
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 16), torch.randn(VOCAB, 16)
    targets = torch.randint(VOCAB, (64,))
    targets[[0, 9, 63]] = IGNORE_INDEX
    found = []
    for compute in (
        ChunkedCrossEntropy.apply,
        lambda h, w, t: F.cross_entropy(F.linear(h, w).float(), t, reduction="sum"),
    ):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            total = compute(*leaves, targets)
        (total / 61).backward()
        found.append([total.detach(), *(leaf.grad for leaf in leaves)])
    limit = 4e-3 if is_bf16 else 1e-5  # bf16 keeps 8 bits
    for ours, wanted in zip(*found, strict=True):
        assert ours.dtype == wanted.dtype == torch.float32
        assert (ours - wanted).norm() <= limit * wanted.norm()


@pytest.mark.parametrize(
    "keys", [{}, {"num_items_in_batch": torch.tensor(100)}, {"num_items_in_batch": 100}, "shifted"]
)
def test_the_models_loss_is_transformers(small_chunks, ids, keys):
    labels = ids.clone()
    labels[1, 5:9] = IGNORE_INDEX
    keys = {"shift_labels": labels.roll(-1, dims=1)} if keys == "shifted" else keys
    own, chunked = make_model().train(), with_chunked_loss(make_model()).train()
    wanted, found = (model(input_ids=ids, labels=labels, use_cache=False, **keys) for model in (own, chunked))
    assert found.logits is None
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-6, atol=0)
    for output in (wanted, found):
        output.loss.backward()
    for ours, theirs in zip(gradients(chunked), gradients(own), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_logits_are_there_where_they_are_asked_for(ids):
    model = with_chunked_loss(make_model())
    assert model.eval()(input_ids=ids, labels=ids).logits.shape == (4, 16, VOCAB)
    assert model.train()(input_ids=ids).logits.shape == (4, 16, VOCAB)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    assert copied(input_ids=ids, labels=ids).loss != model(input_ids=ids, labels=ids).loss


def test_a_loss_function_of_the_users_own_is_given_all_logits(ids, monkeypatch):
    shapes = []
    monkeypatch.setattr(
        LlamaForCausalLM,
        "loss_function",
        lambda self, logits, labels, **_: shapes.append(logits.shape) or logits.sum(),
    )
    with_chunked_loss(make_model()).train()(input_ids=ids, labels=ids)
    assert shapes == [(4, 16, VOCAB)]


class Scaled(torch.nn.Linear):
    def forward(self, hidden):
        return 3 * super().forward(hidden)


def replace_forward(head):
    forward = head.forward
    head.forward = lambda hidden: 3 * forward(hidden)


HEADS = {
    "class": lambda head: setattr(head, "__class__", Scaled),
    "forward": replace_forward,
    "hook": lambda head: head.register_forward_hook(lambda module, args, output: 3 * output),
    "hook before": lambda head: head.register_forward_pre_hook(lambda module, args: (3 * args[0],)),
    "bias": lambda head: setattr(head, "bias", torch.nn.Parameter(torch.ones(VOCAB).cumsum(0))),
    "weight norm": torch.nn.utils.parametrizations.weight_norm,
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_is_more_than_its_weight_is_called(ids, name):
    own, chunked = make_model().train(), with_chunked_loss(make_model()).train()
    for model in (own, chunked):
        HEADS[name](model.lm_head)
    wanted, found = (model(input_ids=ids, labels=ids).loss for model in (own, chunked))
    assert found == wanted and torch.isfinite(found)


def test_another_ignored_label_is_ignored(ids):
    own, chunked = make_model().train(), with_chunked_loss(make_model()).train()
    for model in (own, chunked):
        model(input_ids=ids, labels=ids, ignore_index=int(ids[0, 3])).loss.backward()
    assert all(map(torch.equal, gradients(own), gradients(chunked)))


def test_other_models_stay_as_they_are(ids):
    model = with_chunked_loss(GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=8, n_layer=1, n_head=1)))
    assert model.train()(input_ids=ids, labels=ids).logits is not None


class LargestLogits(TorchDispatchMode):
    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dim() > 1 and result.shape[-1] == VOCAB:
            self.rows = max(self.rows, result.numel() // VOCAB)
        return result


def test_no_tensor_has_the_size_of_all_logits(small_chunks, ids):
    model = with_chunked_loss(make_model()).train()
    with LargestLogits() as seen:
        model(input_ids=ids, labels=ids).loss.backward()
    assert 0 < seen.rows <= 16  # the head's gradient, transposed, has as many rows as the model is wide


def test_it_compiles_into_one_graph(small_chunks, ids):
    own, chunked = make_model().train(), with_chunked_loss(make_model()).train()
    compiled = torch.compile(chunked, backend="aot_eager", fullgraph=True)
    found, wanted = (model(input_ids=ids, labels=ids, use_cache=False).loss for model in (compiled, own))
    torch.testing.assert_close(found, wanted)
    found.backward(), wanted.backward()
    for ours, theirs in zip(gradients(chunked), gradients(own), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def curve_of(model, seed: int, steps: int = 200) -> torch.Tensor:
    """Losses on a Markov chain of tokens, by the recipe's default optimizer."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    losses = []
    for _ in range(steps):
        jumps = torch.randint(1, 4, (4, 16), generator=generator)
        rows = jumps.cumsum(1) % VOCAB
        loss = model.train()(input_ids=rows, labels=rows, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_the_curve_is_eagers_within_the_noise_of_two_seeds(small_chunks):
    eager, other = curve_of(make_model(), seed=1), curve_of(make_model(seed=2), seed=2)
    chunked = curve_of(with_chunked_loss(make_model()), seed=1)
    assert eager[-20:].mean() < 0.5 * eager[0]
    noise, gap = (eager - other).abs().mean(), (eager - chunked).abs().mean()
    assert gap < 0.1 * noise, (gap, noise)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, ids: model(input_ids=ids, labels=ids, output_hidden_states=True).hidden_states[-1],
        lambda model, ids: model(input_ids=ids, labels=ids, return_dict=False)[1],
        lambda model, ids: model(ids, None, None, None, None, ids).logits,
    ],
)
def test_who_asks_for_more_than_the_loss_gets_it(ids, call):
    plain, own = make_model(), with_chunked_loss(make_model())
    assert torch.equal(call(own.train(), ids), call(plain.train(), ids))


def test_and_so_does_who_asks_in_the_models_config(ids):
    plain, own = make_model(), with_chunked_loss(make_model())
    for model in (plain, own):
        model.train().config.output_hidden_states = True
    first, second = (model(input_ids=ids, labels=ids).hidden_states for model in (plain, own))
    assert len(first) == len(second) > 1 and torch.equal(first[-1], second[-1])


def test_a_label_that_is_no_token_is_refused_as_by_transformers(ids):
    labels = ids.clone()
    labels[1, 3] = -1
    for model in (make_model(), with_chunked_loss(make_model())):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            model.train()(input_ids=ids, labels=labels)


def test_a_second_gradient_is_refused(ids):
    hidden, weight = torch.randn(8, 16, requires_grad=True), torch.randn(VOCAB, 16, requires_grad=True)
    total = ChunkedCrossEntropy.apply(hidden, weight, ids.flatten()[:8])
    (first,) = torch.autograd.grad(total, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        first.sum().backward()
