"""The independent forward pass against transformers, and the guard that compares a model with it."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.loss import loss_utils
from transformers.models.llama import modeling_llama

from recipe.guards import GUARDS, RegressionCallback, oracle, reference_mismatch
from recipe.guards.guard import CannotJudge, NotApplicable
from recipe.guards.oracle import Oracle, read_architecture
from recipe.guards.reference_mismatch import (
    PADDING_COUNTED,
    ROUNDING,
    Call,
    Gaps,
    ReferenceMismatch,
    count_text,
    measure,
    one_document,
    variants,
)
from recipe.guards.sandbox import undisturbed
from tests.test_guards_on_runs import as_rows, make_trainer, text, watch

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
SIZES |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
SCALED = {"rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", **SCALED}
WINDOW = {"sliding_window": 10, "use_sliding_window": True, "max_window_layers": 1}
CASES = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu", "tie_word_embeddings": True}),
    ("llama", {"rms_norm_eps": 1e-2, "num_key_value_heads": 4, "head_dim": 16}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}}),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 4.0}}),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **SCALED}}),
    ("llama", {"rope_parameters": YARN}),
    ("llama", {"rope_parameters": {**YARN, "truncate": False, "beta_fast": 16, "beta_slow": 2}}),
    ("llama", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.5}}),
    ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.3}}),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    ("mistral", {"sliding_window": 10}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen2", WINDOW),
    ("qwen3", {}),
    ("qwen3", {**WINDOW, "attention_bias": True}),
    ("gpt2", {}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False, "n_inner": 40}),
    ("gpt2", {"activation_function": "relu", "layer_norm_epsilon": 1e-2, "tie_word_embeddings": False}),
    ("gpt_neox", {"rotary_pct": 0.5}),
    ("gpt_neox", {"rotary_pct": 1.0, "use_parallel_residual": False, "tie_word_embeddings": True}),
    ("gpt_neox", {"attention_bias": False, "rope_parameters": {**YARN, "partial_rotary_factor": 0.5}}),
    ("olmo2", {"tie_word_embeddings": True}),
    ("gemma2", {"sliding_window": 10, "query_pre_attn_scalar": 16}),
    ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": False}),
]
IDS = torch.randint(0, 97, (64,), generator=torch.Generator().manual_seed(1))
PLACE = (IDS, torch.arange(64), torch.ones(64, dtype=torch.bool))
of_each_case = pytest.mark.parametrize(("kind", "sizes"), CASES, ids=lambda value: str(value)[:60])


def make_model(kind: str, **sizes):
    """With weights large enough that every part matters."""
    config = AutoConfig.for_model(
        kind, **{**SIZES, **({"n_embd": 32, "n_layer": 3, "n_head": 4} if kind == "gpt2" else {}), **sizes}
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def call_of(model, ids=IDS, rounding=ROUNDING[torch.float32], **inputs) -> Call:
    """As the guard records it."""
    with torch.no_grad():
        outputs = model(input_ids=ids[None], labels=ids[None], **inputs)
    places = torch.arange(len(ids)), torch.ones(len(ids), dtype=torch.bool)
    return Call(ids, *places, outputs.logits[0].float(), rounding, float(outputs.loss), False, ids)


def judge(architecture, model, call):
    return ReferenceMismatch.judge(measure(architecture, model.state_dict(), call), call.rounding)


# --- the forward pass


@of_each_case
def test_it_is_transformers_forward_pass(kind, sizes):
    model = make_model(kind, **sizes)
    expected = Oracle(read_architecture(model), model.state_dict()).logits(*PLACE)
    call = call_of(model)
    assert float((call.logits - expected).abs().max() / expected.std()) < 1e-5
    assert judge(read_architecture(model), model, call) is None


@pytest.mark.parametrize("kind", oracle.NAMES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_with_padding_and_shifted_positions(kind, attention):
    if kind == "gemma2" and attention == "sdpa":
        pytest.skip("transformers has none: SDPA has no soft cap")
    model = make_model(kind, tie_word_embeddings=True, attn_implementation=attention)
    mask = (torch.arange(64) > 5).long()
    with torch.no_grad():
        got = model(input_ids=IDS[None], attention_mask=mask[None], position_ids=torch.arange(3, 67)[None]).logits[0]
    expected = Oracle(read_architecture(model), model.state_dict()).logits(IDS, torch.arange(3, 67), mask != 0)
    assert float((got - expected)[6:].abs().max() / expected.std()) < 1e-5


@pytest.mark.parametrize("kind", oracle.NAMES)
@pytest.mark.parametrize("how", ["bf16 autocast", "bf16 weights", "fp16 weights"])
def test_rounding_is_no_mismatch(kind, how):
    model = make_model(kind)
    architecture, dtype = read_architecture(model), torch.float16 if "fp16" in how else torch.bfloat16
    if how.endswith("weights"):
        model.to(dtype)
    with torch.autocast("cpu", dtype, enabled="autocast" in how):
        call = call_of(model, rounding=ROUNDING[dtype])
    assert judge(architecture, model, call) is None


FAULTS = {
    "theta": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1.1e4}},
    ),
    "scaling factor": ("llama", {"rope_parameters": YARN}, {"rope_parameters": {**YARN, "factor": 4.1}}),
    "scaling ignored": ("llama", {"rope_parameters": YARN}, {}),
    "rotated dimensions": ("gpt_neox", {"rotary_pct": 0.5}, {"rotary_pct": 1.0}),
    "window": ("mistral", {"sliding_window": 10}, {"sliding_window": 11}),
    "windows of other layers": ("qwen3", WINDOW, {**WINDOW, "max_window_layers": 2}),
    "soft cap of scores": ("gemma2", {"attn_logit_softcapping": 5.0}, {"attn_logit_softcapping": None}),
    "soft cap of logits": ("gemma2", {}, {"final_logit_softcapping": None}),
    "scale": ("gemma2", {"query_pre_attn_scalar": 16}, {"query_pre_attn_scalar": 17}),
    "scale by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, {}),
    "eps": ("llama", {"rms_norm_eps": 1e-6}, {"rms_norm_eps": 1e-4}),
    "eps of LayerNorm": ("gpt2", {}, {"layer_norm_epsilon": 1e-3}),
    "activation": ("llama", {}, {"hidden_act": "gelu"}),
    "kind of gelu": ("gpt2", {}, {"activation_function": "gelu"}),
    "parallel residual": ("gpt_neox", {}, {"use_parallel_residual": False}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_ingredient_is_checked(name):
    """A model that was built with another value than its config says."""
    kind, said, built = FAULTS[name]
    model = make_model(kind, **built)
    assert judge(read_architecture(make_model(kind, **said)), model, call_of(model)).id == "reference_mismatch"
    assert judge(read_architecture(model), model, call_of(model)) is None


def test_an_untied_head_is_found():
    model = make_model("llama", tie_word_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 1.001)
    assert judge(read_architecture(model), model, call_of(model)) is not None


@pytest.mark.parametrize("number", range(6))
def test_simple_faults_are_named(number):
    """The reference with a change is the faulty model here; the words belong to the change."""
    model = make_model("gemma2", sliding_window=10, attn_logit_softcapping=5.0)
    healthy = read_architecture(model)
    words, changed = list(variants(healthy))[number]
    logits = Oracle(changed, model.state_dict()).logits(*PLACE)
    call = replace(call_of(model), logits=logits, labels=None)
    assert judge(healthy, model, call) is not None, words
    named = [text for text, other in variants(healthy) if judge(other, model, call) is None]
    assert named == [words]


# --- what cannot be judged


class OwnLlama(LlamaForCausalLM):
    """A class of the user's own."""


def replaced(model):
    model.model.layers[0].mlp.forward = model.model.layers[0].mlp.forward
    return model


def adapted(model):
    class Adapted(torch.nn.Linear):
        pass

    model.model.layers[0].mlp.up_proj.__class__ = Adapted
    return model


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: OwnLlama(LlamaConfig(**SIZES)), "OwnLlama is not transformers' own class for llama"),
        (lambda: make_model("bloom", n_layer=1), "no independent forward pass is written down for bloom"),
        (lambda: torch.nn.Linear(2, 2), "no independent forward pass is written down for Linear"),
        (lambda: replaced(make_model("llama")), "the forward method of model.layers.0.mlp has been replaced"),
        (lambda: adapted(make_model("llama")), "model.layers.0.mlp.up_proj is a Adapted"),
        (lambda: make_model("llama", hidden_act="tanh"), "the activation tanh is not written down"),
        (lambda: make_model("gpt2", add_cross_attention=True), "add_cross_attention is on"),
        (
            lambda: make_model(
                "llama",
                rope_parameters={
                    "rope_type": "longrope",
                    "long_factor": [1.0] * 4,
                    "short_factor": [1.0] * 4,
                    **SCALED,
                },
            ),
            "the rotary scaling longrope is not written down",
        ),
    ],
)
def test_what_is_not_written_down_has_a_reason(make, why):
    with pytest.raises(NotApplicable, match=why):
        read_architecture(make())


def test_a_weight_that_is_not_there_is_named():
    model = make_model("llama")
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[1].mlp.up_proj)
    with pytest.raises(CannotJudge, match=r"no weight model\.layers\.1\.mlp\.up_proj\.weight"):
        Oracle(read_architecture(model), model.state_dict()).logits(*PLACE)


def test_logits_that_say_nothing():
    with pytest.raises(CannotJudge, match="not finite"):
        ReferenceMismatch.judge(Gaps(float("nan"), 1e-7, 1.0), 1e-7)
    with pytest.raises(CannotJudge, match="all logits are equal"):
        ReferenceMismatch.judge(Gaps(0.0, 0.0, 0.0), 1e-7)


def test_the_judgement_on_plain_numbers():
    assert ReferenceMismatch.judge(Gaps(7e-7, 1e-7, 1.0, (5.0, 5.0)), 1e-7) is None
    assert "9e-07 sd" in ReferenceMismatch.judge(Gaps(9e-7, 1e-7, 1.0), 1e-7).found
    assert ReferenceMismatch.judge(Gaps(1e-7, 1e-7, 1.0, (5.0, 5.0 + 5e-6), 1e-7), 1e-7) is None
    assert (
        ReferenceMismatch.judge(Gaps(1e-7, 1e-7, 1.0, (5.0, 5.01), 1e-7), 1e-7).found
        == "loss 5 (of logits that are right)"
    )


def test_one_document_is_the_longest_one():
    positions = torch.tensor([[*range(20), *range(12)], [*range(10), *range(22)]])
    ids = torch.arange(64).reshape(2, 32)
    row = one_document({"input_ids": ids, "labels": ids, "position_ids": positions})
    assert row["input_ids"].tolist() == [list(range(42, 64))] and row["position_ids"].tolist() == [list(range(22))]
    mask = (torch.arange(32) >= 4).long().expand(2, -1)
    cut = one_document({"input_ids": ids, "labels": ids, "attention_mask": mask}, longest=9)
    assert cut["input_ids"].tolist() == [list(range(4, 13))]
    ends = {"cu_seq_lens_q": torch.tensor([0, 50, 64]), "max_length_q": 50}
    flat = one_document({"input_ids": ids.reshape(1, 64), "labels": ids.reshape(1, 64), **ends})
    assert flat["input_ids"].tolist() == [list(range(50))] and flat.keys() == {"input_ids", "labels"}
    with pytest.raises(CannotJudge, match="pixels cannot be cut"):
        one_document({"input_ids": ids, "labels": ids, "pixels": torch.zeros(2, 3)})
    with pytest.raises(CannotJudge, match="no document of 8 tokens"):
        one_document({"input_ids": ids, "labels": ids, "attention_mask": torch.zeros_like(ids)})


@pytest.mark.parametrize("with_positions", [False, True])
def test_learned_positions_that_count_the_padding_are_found(tmp_path, with_positions):
    sizes = dict(vocab_size=257, n_embd=32, n_layer=2, n_head=2, n_positions=128, eos_token_id=256)
    torch.manual_seed(0)
    rows = as_rows(text(8))
    for row in rows:
        row["attention_mask"] = (torch.arange(len(row["input_ids"])) >= 9).long()
        row["labels"] = row["input_ids"].where(row["attention_mask"] != 0, -100)
        if with_positions:
            row["position_ids"] = count_text(row["attention_mask"] != 0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes))
    guards = watch(make_trainer(tmp_path, model=model, train=rows, steps=1))
    found = [finding for finding in guards.findings if finding.id == "reference_mismatch"]
    assert "reference_mismatch" in guards.judged and bool(found) != with_positions
    assert with_positions or found[0].likely_causes == (PADDING_COUNTED,)


def test_the_precision_of_products_is_tried():
    assert reference_mismatch.rounding_of_products(torch.device("cpu")) == 2**-24


def test_what_dynamic_scaling_keeps_is_put_back():
    """It keeps the longest row as a tensor: a probe of a short row would begin it again."""
    model = make_model("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 4.0})
    rotary = model.model.rotary_emb
    model(input_ids=IDS.repeat(3)[None])
    before = rotary.inv_freq.clone(), int(rotary.max_seq_len_cached)
    with undisturbed(model):
        model(input_ids=IDS[None])
        assert int(rotary.max_seq_len_cached) == 128
    assert torch.equal(rotary.inv_freq, before[0]) and int(rotary.max_seq_len_cached) == before[1] == 192


# --- on a training


@pytest.fixture
def train(tmp_path):
    def run(model, change=None, guards=None, callbacks=(), checkpoint=None, only=True, **arguments):
        rows = torch.randint(0, 97, (64, 40), generator=torch.Generator().manual_seed(1))
        values = dict(output_dir=str(tmp_path / "run"), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2)
        values |= dict(use_cpu=True, disable_tqdm=True, report_to=[], save_strategy="no", bf16=False)
        rows = [{"input_ids": row, "labels": row} for row in rows]
        trainer = Trainer(
            model, TrainingArguments(**values | arguments), train_dataset=rows, callbacks=list(callbacks)
        )
        if change:
            change(trainer)
        guards = RegressionCallback() if guards is None else guards
        if guards:
            trainer.add_callback(guards)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer, guards

    return run


@pytest.fixture
def alone(monkeypatch):
    """The guard without others: fast, and what it says is all that is said."""
    monkeypatch.setattr(RegressionCallback, "guards", (ReferenceMismatch,))


def said(guards) -> list[tuple[str, int]]:
    assert guards.failure is None and guards.cannot_judge == {}, guards.cannot_judge
    return [(finding.severity, finding.step) for finding in guards.findings]


HEALTHY = {
    "llama": ("llama", {}, {}),
    "bf16": ("llama", {}, {"bf16": True}),
    "bf16, gemma2": ("gemma2", {}, {"bf16": True}),
    "dropout": ("gpt2", {"resid_pdrop": 0.3, "attn_pdrop": 0.3, "embd_pdrop": 0.3}, {}),
    "gradient checkpointing": ("qwen3", {}, {"gradient_checkpointing": True}),
    "eager": ("mistral", {"attn_implementation": "eager", "sliding_window": 10}, {}),
    "label smoothing": ("olmo2", {}, {"label_smoothing_factor": 0.1}),
    "accumulation": ("gpt_neox", {}, {"gradient_accumulation_steps": 2}),
    "NEFTune": ("llama", {}, {"neftune_noise_alpha": 5.0}),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_trainings_are_silent(name, train, alone):
    kind, sizes, arguments = HEALTHY[name]
    _, guards = train(make_model(kind, **sizes), **arguments)
    assert said(guards) == [] and guards.judged_steps["reference_mismatch"] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_silent(dtype, train, alone):
    _, guards = train(make_model("llama").to(dtype), learning_rate=1e-4)
    assert said(guards) == [] and guards.judged


def test_a_compiled_model_is_silent(train, alone):
    arguments = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2}
    _, guards = train(make_model("llama"), **arguments)
    assert said(guards) == [] and guards.judged


def test_layers_compiled_in_place_are_silent(train, alone):
    model = make_model("llama")
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    _, guards = train(model, max_steps=2)
    assert said(guards) == [] and guards.judged


def test_the_training_is_not_changed_by_a_bit(train, alone, monkeypatch):
    """With dropout, in bf16, and with probes at every step."""
    monkeypatch.setattr("recipe.guards.session.PROBE_EVERY", 1)

    def weights(guards):
        model = make_model("gpt2", resid_pdrop=0.2)
        _, guards = train(model, guards=guards, bf16=True, max_steps=5)
        return model.state_dict(), guards

    (without, _), (watched, guards) = weights(False), weights(None)
    assert guards.judged_steps["reference_mismatch"] == 5
    assert all(torch.equal(value, without[name]) for name, value in watched.items())


def interleave(module, inputs, output):
    return tuple(x[..., : x.shape[-1] // 2].repeat_interleave(2, dim=-1) for x in output)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_fault_in_the_angles_is_found_before_step_1(bf16, train, alone):
    model = make_model("llama")
    model.model.rotary_emb.register_forward_hook(interleave)
    _, guards = train(model, bf16=bf16)
    assert said(guards) == [("warning", 0)]


def test_a_window_that_is_too_wide_is_named(train, alone, monkeypatch):
    from transformers import masking_utils

    overlay = masking_utils.sliding_window_overlay
    monkeypatch.setattr(masking_utils, "sliding_window_overlay", lambda window: overlay(window + 1))
    _, guards = train(make_model("mistral", sliding_window=10))
    assert said(guards) == [("warning", 0)] and guards.findings[0].likely_causes[0] == "the window is a token wider"


def test_the_cap_is_that_of_the_config_before_the_first_call(train, alone):
    """As the patched forward of apple/ml-cross-entropy#48, which leaves the cap out where there are labels."""
    model = make_model("gemma2")

    def leave_out(module, args, kwargs):
        module.config.final_logit_softcapping = None if kwargs.get("labels") is not None else 30.0

    model.register_forward_pre_hook(leave_out, with_kwargs=True)
    _, guards = train(model)
    assert said(guards) == [("warning", 0)] and "logits are not soft-capped" in guards.findings[0].likely_causes


def test_positions_left_out_on_purpose_are_information(train, alone):
    model = make_model("llama")
    model.model.rotary_emb.register_forward_hook(lambda m, i, o: (torch.ones_like(o[0]), torch.zeros_like(o[1])))
    _, guards = train(model)
    assert said(guards) == [("info", 0)] and "no positions" in guards.findings[0].likely_causes[0]


def test_what_differs_in_eval_mode_only_is_information(train, alone):
    """Another guard judges that."""
    model = make_model("llama")
    model.lm_head.register_forward_hook(lambda module, i, output: output if module.training else output.softmax(-1))
    _, guards = train(model)
    assert said(guards) == [("info", 0)]


def test_a_loss_of_rounded_logits_is_found(train, alone, monkeypatch):
    """In transformers' own function, patched."""

    def rounded(source, target, num_items_in_batch=None, ignore_index=-100, **kwargs):
        reduction = "mean" if num_items_in_batch is None else "sum"
        loss = F.cross_entropy(source.bfloat16(), target, ignore_index=ignore_index, reduction=reduction).float()
        return loss if num_items_in_batch is None else loss / num_items_in_batch

    monkeypatch.setattr(loss_utils, "fixed_cross_entropy", rounded)
    _, guards = train(make_model("llama"))
    assert said(guards) == [("warning", 0)] and "of logits that are right" in guards.findings[0].found


def test_a_loss_of_ones_own_is_not_compared(train, alone):
    def change(trainer):
        trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: (
            3 * F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        )

    _, guards = train(make_model("llama"), change)
    assert said(guards) == [] and guards.judged


def test_a_fused_loss_without_logits(train, alone):
    """The model is called once more, without labels. As TRL's SFTTrainer, whose forward is asked for a fused head."""

    def change(trainer):
        forward = trainer.model.forward

        def fused(labels=None, **kwargs):
            return forward(**kwargs) if labels is None else {"loss": forward(labels=labels, **kwargs).loss}

        trainer.model.forward = fused

    _, guards = train(make_model("llama"), change, remove_unused_columns=False)
    assert said(guards) == [] and guards.judged


class Begins(TrainerCallback):
    """A fault from a step on: the frequencies are scaled."""

    def __init__(self, model, step):
        self.model, self.step = model, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.model.model.rotary_emb.inv_freq.mul_(0.5)


def test_a_fault_that_begins_later_is_found_at_the_next_save(train, alone):
    model = make_model("llama")
    _, guards = train(model, callbacks=[Begins(model, 2)], save_strategy="steps", save_steps=2)
    assert said(guards) == [("warning", 4)] and guards.judged_steps["reference_mismatch"] == 3


def test_or_after_some_steps(train, alone, monkeypatch):
    monkeypatch.setattr("recipe.guards.session.PROBE_EVERY", 3)
    model = make_model("llama")
    _, guards = train(model, callbacks=[Begins(model, 2)])
    assert said(guards) == [("warning", 3)]


def test_it_is_compared_again_after_a_resume(train, alone, tmp_path):
    train(make_model("llama"), save_strategy="steps", save_steps=2)
    model = make_model("llama")
    model.model.rotary_emb.register_forward_hook(interleave)
    _, guards = train(model, checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert said(guards) == [("warning", 2)]


def test_a_leak_explains_it(train):
    model = make_model("llama")
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda m, args, kwargs: (args, {**kwargs, "is_causal": False, "attention_mask": None}), with_kwargs=True
        )
    _, guards = train(model, max_steps=2)
    assert guards.findings[0].id == "non_causal_attention"
    mismatch = next(finding for finding in guards.findings if finding.id == "reference_mismatch")
    assert mismatch.evidence["causes"][0] == "non_causal_attention"


def test_symptoms_of_the_curve_name_it():
    symptoms = [guard for guard in GUARDS if guard.judges_curve]
    assert symptoms and all("reference_mismatch" in guard.explained_by for guard in symptoms)


def test_rotated_by_the_head_is_found(train, alone, monkeypatch):
    """mlfoundations/open_lm#4."""

    def rotated(states, cos, sin):
        cos, sin = (table[:, : states.shape[1], None] for table in (cos, sin))
        return states * cos + modeling_llama.rotate_half(states) * sin

    def apply(q, k, cos, sin, *args, **kwargs):
        return rotated(q, cos, sin), rotated(k, cos, sin)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", apply)
    _, guards = train(make_model("llama"))
    assert said(guards) == [("warning", 0)]
