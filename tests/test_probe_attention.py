"""What logits depend on: on hand-made numbers, on tiny models of many families, and with seeded leaks."""

from contextlib import nullcontext
from functools import wraps
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from recipe.guards.attention import (
    PADDING,
    AttentionLeak,
    change_tokens,
    choose_positions,
    find_documents,
    find_scored,
    probe_attention,
)
from recipe.guards.guard import CannotJudge, Finding
from recipe.guards.recording import record

VOCABULARY, LENGTH = 64, 24
IDS_OF_MOVEMENT = ["non_causal_attention", "row_leak"]
COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
GROUPED = COMMON | {"num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES = {
    "llama": GROUPED,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_neox": COMMON,
    "mistral": GROUPED | {"sliding_window": 8},
    "mixtral": GROUPED | {"num_local_experts": 4, "sliding_window": 8},
    "qwen2": GROUPED,
    "qwen2_moe": GROUPED | EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3_moe": GROUPED | EXPERTS | {"head_dim": 8},
    "gemma2": GROUPED | {"head_dim": 8, "sliding_window": 8},
    "gemma3_text": GROUPED | {"head_dim": 8, "sliding_window": 8},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "opt": COMMON | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "falcon": COMMON | {"alibi": True, "new_decoder_architecture": False},
    "bert": COMMON | {"is_decoder": True},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "mamba2": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 8,
        "num_heads": 4,
        "head_dim": 16,
        "n_groups": 2,
    },
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
    "recurrent_gemma": GROUPED | {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "phi": COMMON,
    "ctrl": {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 64},
}


def build(family: str, implementation: str = "sdpa", **changes):
    torch.manual_seed(0)
    values = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
    config = transformers.AutoConfig.for_model(family, **(values | FAMILIES[family] | changes))
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).train()


def rows_of(number: int = 4, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (number, length), generator=torch.Generator().manual_seed(1))


def batch_of(number: int = 4, **parts) -> dict:
    ids = rows_of(number)
    return {"input_ids": ids, "labels": ids.clone(), **parts}


def padded(side: str) -> dict:
    batch, mask = batch_of(), torch.ones(4, LENGTH, dtype=torch.long)
    for row, amount in enumerate((0, 5, 3, 9)):
        mask[row, slice(0, amount) if side == "left" else slice(LENGTH - amount, LENGTH)] = 0
    batch["input_ids"][mask == 0] = 0
    return batch | {"labels": batch["input_ids"].masked_fill(mask == 0, -100), "attention_mask": mask}


BATCHES = {
    "plain": batch_of,
    "mask of ones": lambda: batch_of(attention_mask=torch.ones(4, LENGTH, dtype=torch.long)),
    "left": lambda: padded("left"),
    "right": lambda: padded("right"),
}


def alarms(results: dict) -> dict[str, Finding]:
    return {name: result for name, result in results.items() if isinstance(result, Finding)}


# --- pure


ROWS_OF_6 = torch.zeros(2, 6, dtype=torch.long)
EARLIER_ONLY = torch.tensor([[0.0] * 6, [0.1, 0.2, 1.0, 0.0, 0.0, 0.0]])


def test_a_gradient_from_earlier_tokens_is_silent():
    results = AttentionLeak.judge_gradient(EARLIER_ONLY, {1: 2}, ROWS_OF_6)
    assert results["non_causal_attention"] is None and results["row_leak"] is None
    assert isinstance(results["cross_document_attention"], CannotJudge)


def test_a_later_token_is_named_with_its_numbers():
    sizes = EARLIER_ONLY.clone()
    sizes[1, 3] = 0.004
    finding = AttentionLeak.judge_gradient(sizes, {1: 2}, ROWS_OF_6)["non_causal_attention"]
    assert finding.severity == "error" and finding.found == "position 2 sees 1 of 3 later tokens"
    assert finding.evidence["position"] == 2 and finding.evidence["nearest"] == 1
    assert finding.evidence["relative_gradient"] == pytest.approx(0.004) and finding.evidence["row"] == 1
    assert "i+1" in finding.likely_causes[0]


def test_the_rounding_of_an_fft_is_silent():
    sizes = EARLIER_ONLY + 2e-6
    assert not alarms(AttentionLeak.judge_gradient(sizes, {1: 2}, ROWS_OF_6))


def test_another_row_is_named():
    sizes = EARLIER_ONLY.clone()
    sizes[0, :2] = 0.5
    found = alarms(AttentionLeak.judge_gradient(sizes, {1: 2}, ROWS_OF_6))
    assert list(found) == ["row_leak"] and found["row_leak"].found == "position 2 sees 2 of 6 tokens of row 0"
    assert (found["row_leak"].evidence["row"], found["row_leak"].evidence["row_seen"]) == (1, 0)


def test_an_earlier_document_is_named():
    documents = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1]])
    found = alarms(AttentionLeak.judge_gradient(EARLIER_ONLY, {1: 2}, documents))
    assert list(found) == ["cross_document_attention"] and found["cross_document_attention"].severity == "warning"
    finding = found["cross_document_attention"]
    assert "sees 2 of 2 earlier tokens (of other documents)" in finding.found and finding.evidence["nearest"] == 1


def test_padding_decides_nothing():
    sizes, documents = EARLIER_ONLY.clone(), ROWS_OF_6.clone()
    sizes[0, 0], sizes[1, 5] = 3.0, float("nan")
    documents[0, 0] = documents[1, 5] = PADDING
    assert not alarms(AttentionLeak.judge_gradient(sizes, {1: 2}, documents))


@pytest.mark.parametrize("size", [0.0, float("nan")])
def test_no_gradient_is_no_verdict(size):
    with pytest.raises(CannotJudge, match="zero or not finite"):
        AttentionLeak.judge_gradient(torch.full((2, 6), size), {1: 2}, ROWS_OF_6)


def test_documents_come_from_positions_sequence_numbers_or_lengths():
    ids = torch.zeros(2, 5, dtype=torch.long)
    positions = torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 0]])
    expected = [[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]]
    assert find_documents({"input_ids": ids, "position_ids": positions}).tolist() == expected
    assert find_documents({"input_ids": ids, "seq_idx": torch.tensor(expected)}).tolist() == expected
    lengths = torch.tensor([0, 2, 5, 9, 10], dtype=torch.int32)
    assert find_documents({"input_ids": ids, "cu_seq_lens_q": lengths}).tolist() == expected


def test_positions_that_begin_after_left_padding_are_one_document():
    parts = {"position_ids": torch.tensor([[1, 1, 0, 1, 2]]), "attention_mask": torch.tensor([[0, 0, 1, 1, 1]])}
    documents = find_documents({"input_ids": torch.zeros(1, 5, dtype=torch.long), **parts})
    assert documents.tolist() == [[PADDING, PADDING, 0, 0, 0]]


def test_probed_positions_are_scored_followed_and_in_a_later_document():
    documents = torch.zeros(2, 12, dtype=torch.long)
    documents[1, 4:], documents[1, 10:] = 1, PADDING
    scored = torch.ones(2, 12, dtype=torch.bool)
    scored[1, :6] = False
    probed, others = choose_positions(documents, scored)
    assert list(probed) == [1] and 6 <= probed[1] <= 8 and list(others) == [0]


def test_a_masked_prompt_is_not_probed():
    batch = batch_of()
    batch["labels"][:, :20] = -100
    probed, others = choose_positions(find_documents(batch), find_scored(batch))
    assert all(19 <= place < 23 for place in [*probed.values(), *others.values()])


def test_changed_tokens_are_others_of_the_batch_and_padding_stays():
    ids, documents = rows_of(), torch.zeros(4, LENGTH, dtype=torch.long)
    documents[2, 20:] = PADDING
    changed = change_tokens(ids, {2: 9}, documents)
    assert ((changed != ids).nonzero() == torch.tensor([[2, place] for place in range(10, 20)])).all()
    assert set(changed.unique().tolist()) <= set(ids.unique().tolist())


def test_movement_of_a_few_positions_is_no_proof():
    moved, watched = torch.full((2, 9), 0.02), torch.ones(2, 9, dtype=torch.bool)
    moved[:, :3] = 4.0
    assert not AttentionLeak.judge_movement(moved, watched, {1: 4})
    assert list(AttentionLeak.judge_movement(moved + 0.5, watched, {1: 4})) == IDS_OF_MOVEMENT


def test_in_fp32_a_small_movement_tells_where_rounding_cannot_be_it():
    moved, watched = torch.full((2, 8), 1e-6), torch.ones(2, 8, dtype=torch.bool)
    assert not AttentionLeak.judge_movement(moved, watched, {0: 5, 1: 6}, is_exact=True)
    assert list(AttentionLeak.judge_movement(moved + 2e-3, watched, {0: 5}, is_exact=True)) == IDS_OF_MOVEMENT
    assert not AttentionLeak.judge_movement(moved + 2e-3, watched, {0: 5})


@pytest.mark.parametrize(("second", "found"), [(5, ["non_causal_attention"]), (2, [])])
def test_one_position_moves_at_the_same_distance_in_each_row(second, found):
    """A token that turned to another expert moves one position anywhere: the second row's is elsewhere."""
    moved, watched = torch.full((2, 8), 1e-6), torch.ones(2, 8, dtype=torch.bool)
    moved[0, 4], moved[1, second] = 0.3, 0.1
    assert list(AttentionLeak.judge_movement(moved, watched, {0: 5, 1: 6}, is_exact=True)) == found
    assert not AttentionLeak.judge_movement(moved[:1], watched[:1], {0: 5}, is_exact=True)


def test_a_leak_without_gradient_of_a_hundredth_is_seen(tiny_model):
    """Each position is given a little of the next token's embedding, computed under no_grad."""
    embed = tiny_model.model.embed_tokens

    def look_ahead(module, args, out):
        with torch.no_grad():
            ahead = F.pad(out[:, 1:], (0, 0, 0, 1)).detach()
        return out + 0.05 * ahead

    embed.register_forward_hook(look_ahead)
    ids = torch.randint(257, (4, 32), generator=torch.Generator().manual_seed(0))
    found = probe_attention(tiny_model, {"input_ids": ids, "labels": ids})
    assert (
        isinstance(found["non_causal_attention"], Finding)
        and "without gradient" in found["non_causal_attention"].found
    )


# --- healthy families


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_healthy_models_are_judged_and_silent(family, implementation):
    if implementation == "sdpa" and family in ("gemma2", "bloom", "mpt", "mamba", "mamba2", "rwkv"):
        pytest.skip("transformers has no sdpa for it")
    model = build(family, implementation)
    for make in BATCHES.values():
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                results = probe_attention(model, make())
            assert results["non_causal_attention"] is None and results["row_leak"] is None, results
            assert isinstance(results["cross_document_attention"], CannotJudge)


def packed(number: int = 4, **parts) -> dict:
    return batch_of(
        number, position_ids=torch.cat([torch.arange(9), torch.arange(LENGTH - 9)]).repeat(number, 1), **parts
    )


@pytest.mark.parametrize("number", [1, 4])
@pytest.mark.parametrize("family", ["llama", "mistral", "mixtral", "gemma3_text", "qwen2"])
def test_packed_documents_kept_apart_are_silent(family, number):
    results = probe_attention(build(family), packed(number))
    assert results["cross_document_attention"] is None and results["non_causal_attention"] is None
    assert results["row_leak"] is None if number > 1 else str(results["row_leak"]) == "one row in the batch"


def test_a_masked_prompt_may_see_all_of_itself():
    model = build("llama", "eager")
    spoil(model, lambda mask, module: mask.masked_fill(torch.arange(LENGTH) < 12, 0.0))
    batch = batch_of()
    assert "non_causal_attention" in alarms(probe_attention(model, batch))
    batch["labels"][:, :13] = -100
    assert not alarms(probe_attention(model, batch))


# --- leaks


def spoil(model, change, layer: int = 1) -> None:
    """Pass the additive mask `[rows, 1, positions, positions]` of one layer through `change`."""

    def before(module, args, kwargs):
        return args, kwargs | {"attention_mask": change(kwargs["attention_mask"], module)}

    model.model.layers[layer].self_attn.register_forward_pre_hook(before, with_kwargs=True)


def mix(model, share: float, mixed, layer: int = 1) -> None:
    model.model.layers[layer].register_forward_hook(lambda module, args, output: output + share * mixed(output))


def see_next(mask, module=None):
    positions = torch.arange(mask.shape[-1])
    return mask.masked_fill(positions == positions[:, None] + 1, 0.0)


def in_row_1(mask, module):
    return torch.where(torch.arange(len(mask)).view(-1, 1, 1, 1) == 1, 0.0, mask)


LEAKS = {
    "no mask in one layer": lambda model: spoil(model, lambda mask, module: mask * 0),
    "no mask in the first layer": lambda model: spoil(model, lambda mask, module: mask * 0, layer=0),
    "i sees i+1": lambda model: spoil(model, see_next),
    "in train mode only": lambda model: spoil(model, lambda mask, module: mask * 0 if module.training else mask),
    "in eval mode only": lambda model: spoil(model, lambda mask, module: mask if module.training else mask * 0),
    "in row 1 only": lambda model: spoil(model, in_row_1),
    "a thousandth of the next token": lambda model: mix(model, 1e-3, lambda output: output.roll(-1, dims=1)),
}


@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("leak", LEAKS)
def test_a_position_that_sees_later_tokens_is_found(leak, bf16, number):
    if leak == "in row 1 only" and number == 1:
        return
    model = build("llama", "eager", attention_dropout=0.1)
    LEAKS[leak](model)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        found = alarms(probe_attention(model, batch_of(number)))
    assert list(found) == ["non_causal_attention"], leak
    assert found["non_causal_attention"].evidence["mode"] == ("eval" if "eval" in leak else "train")


def test_a_mask_that_is_lost_when_the_batch_has_none():
    """Attention of one's own that asks for a mask and gets None, or ignores it when one is given."""
    model = build("llama", "eager")
    given = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: given.append("attention_mask" in kwargs), with_kwargs=True
    )
    spoil(model, lambda mask, module: mask * 0 if given[-1] else mask)
    found = alarms(probe_attention(model, batch_of()))
    assert found["non_causal_attention"].evidence["attention_mask"] == "ones"
    found = alarms(probe_attention(model, BATCHES["mask of ones"]()))
    assert found["non_causal_attention"].evidence["mode"] == "train"


def test_an_encoder_that_is_no_decoder():
    assert "non_causal_attention" in alarms(probe_attention(build("bert", is_decoder=False), batch_of()))


@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("share", [1.0, 1e-3])
def test_rows_that_mix_are_found_and_not_taken_for_the_future(share, number):
    model = build("llama")
    mix(model, share, lambda output: output.mean(dim=0, keepdim=True))
    assert list(alarms(probe_attention(model, batch_of(number)))) == ["row_leak"]


@pytest.mark.parametrize("weight", [3.0, 1e-2])
def test_a_leak_without_gradient_is_found(weight):
    model = build("llama")
    mix(model, weight, lambda output: output.detach().mean(dim=(0, 1), keepdim=True))
    found = alarms(probe_attention(model, batch_of(4)))
    assert found and all("movement" in finding.evidence for finding in found.values())


@pytest.mark.parametrize(("weight", "dtype"), [(1e-6, torch.float32), (1e-2, torch.bfloat16)])
def test_movement_without_gradient_of_the_size_of_rounding_is_silent(weight, dtype):
    model = build("llama").to(dtype)
    mix(model, weight, lambda output: output.detach().mean(dim=(0, 1), keepdim=True))
    assert not alarms(probe_attention(model, batch_of(4)))


@pytest.mark.parametrize("number", [1, 4])
def test_a_mask_of_ones_turns_document_masking_off(number):
    results = probe_attention(
        build("llama"), packed(number, attention_mask=torch.ones(number, LENGTH, dtype=torch.long))
    )
    assert list(alarms(results)) == ["cross_document_attention"]


def test_positions_that_restart_isolate_nothing_in_learned_positions():
    assert "cross_document_attention" in alarms(probe_attention(build("bert"), packed()))


# --- what it leaves, what it cannot judge


def refusing_a_mask(model):
    """As Qwen's Omni thinkers, whose forward pass looks for what their config lacks."""
    forward = model.forward

    @wraps(forward)
    def own(*args, attention_mask=None, **kwargs):
        if attention_mask is not None:
            raise AttributeError("the config has no vision_start_token_id")
        return forward(*args, **kwargs)

    model.forward = own
    return model


def test_a_model_that_refuses_another_mask_is_judged_in_its_own_call():
    healthy, leaking = refusing_a_mask(build("llama")), refusing_a_mask(build("llama"))
    mix(leaking, 0.5, lambda hidden: hidden.roll(-1, dims=1))
    results = probe_attention(healthy, batch_of())
    assert results["non_causal_attention"] is None and results["row_leak"] is None
    assert "non_causal_attention" in alarms(probe_attention(leaking, batch_of()))


def test_it_leaves_no_trace():
    model = build("llama", attention_dropout=0.1)
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch, generator = batch_of(), torch.get_rng_state()
    kept = {name: value.clone() for name, value in batch.items()}
    probe_attention(model, batch)
    assert torch.equal(generator, torch.get_rng_state())
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == [
        "model.norm.weight"
    ]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, kept[name]) for name, value in batch.items()) and batch.keys() == kept.keys()
    assert not model.get_input_embeddings()._forward_hooks


def test_gradient_checkpointing_does_not_disturb():
    model = build("llama", "eager")
    model.activation_checkpointing_enable()
    assert not alarms(probe_attention(model, batch_of()))
    LEAKS["no mask in one layer"](model)
    assert list(alarms(probe_attention(model, batch_of()))) == ["non_causal_attention"]


def test_a_position_without_a_later_one_cannot_be_judged():
    with pytest.raises(CannotJudge, match="no scored position has a later one"):
        probe_attention(build("llama"), {"input_ids": rows_of(2, 1)})


def test_one_token_only_is_still_judged_in_train_mode():
    results = probe_attention(build("llama"), {"input_ids": torch.full((2, LENGTH), 5)})
    assert results["non_causal_attention"] is None and results["row_leak"] is None


def test_labels_stay_where_the_model_needs_them():
    class Needs(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build("llama")

        def get_input_embeddings(self):
            return self.inner.get_input_embeddings()

        def forward(self, input_ids, labels):
            return self.inner(input_ids=input_ids, labels=labels).to_tuple()

    assert probe_attention(Needs(), batch_of())["non_causal_attention"] is None


def test_a_mask_that_compute_loss_makes_is_the_one_that_is_probed(tiny_model):
    ids = torch.randint(1, 50, (2, LENGTH))

    def probe(inputs, **given):
        batch = SimpleNamespace(
            run=SimpleNamespace(objective=None, pad_token_id=None),
            twin=SimpleNamespace(compute_loss_context_manager=nullcontext),
            model=tiny_model,
            inputs={"input_ids": ids, "labels": ids} | inputs,
            recording=record(tiny_model, lambda: tiny_model(input_ids=ids, labels=ids, **given).loss),
        )
        return [verdict for verdict in AttentionLeak().probe(batch) if isinstance(verdict, Finding)]

    full = torch.zeros(2, 1, LENGTH, LENGTH)
    causal = full.masked_fill(torch.ones_like(full).triu(1).bool(), float("-inf"))
    ones = {"attention_mask": torch.ones_like(ids)}
    for healthy in ({}, {"attention_mask": causal}, ones):
        assert not probe({}, **healthy) and not probe(ones, **healthy)
    assert [finding.id for finding in probe({}, attention_mask=full)] == ["non_causal_attention"]
