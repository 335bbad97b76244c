"""Trainings with PEFT: adapters that do not train are named, and what PEFT does on purpose is silent."""

import pytest
import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import TrainerCallback

from recipe.guards.frozen import FrozenParameters
from recipe.guards.initial_loss import InitialLoss, drawn_factors
from recipe.guards.ties import UntiedWeights
from tests.test_guards_on_runs import alarms, as_rows, make_model, make_trainer, text, watch

HEAD = {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "v_proj"]}


def config(**changes) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", **{"r": 4, **HEAD, **changes})


def adapted(name_or_path: str = "", tied: bool = False, **changes):
    model = make_model(tie_word_embeddings=tied)
    model.name_or_path = model.config.name_or_path = name_or_path
    return get_peft_model(model, config(**changes))


def findings_of(tmp_path, model, steps=12, **run) -> list[tuple[str, str]]:
    guards = watch(make_trainer(tmp_path, model=model, steps=steps, **run))
    assert guards.failure is None
    return [(finding.id, finding.severity) for finding in guards.findings]


@pytest.mark.parametrize("name", ["", "trained-before"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_frozen_base_and_a_head_that_is_trained_are_silent(tmp_path, name, tied):
    """A copy of a tied head is information: adapter, merged and saved model are what was trained."""
    assert findings_of(tmp_path, adapted(name, tied)) == [("untied_weights", "info")] * tied


def test_layers_that_stay_tied_and_adapters_of_a_known_start_are_silent(tmp_path):
    for name in ("embed_tokens", "lm_head"):
        model = adapted(tied=True, modules_to_save=[name], ensure_weight_tying=True)
        assert UntiedWeights.judge(model) is None and drawn_factors(model) == []
    assert UntiedWeights.judge(adapted(tied=True, modules_to_save=None, trainable_token_indices=[5, 9])) is None


@pytest.mark.parametrize(
    ("changes", "severity"),
    [
        ({"modules_to_save": ["embed_tokens"]}, "warning"),  # the head does not learn what the embedding does
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, "info"),
        ({"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj", "lm_head"]}, "info"),
        ({"modules_to_save": ["lm_head"]}, "info"),
    ],
)
def test_a_copy_of_the_embedding_alone_is_a_warning(changes, severity):
    finding = UntiedWeights.judge(adapted(tied=True, **changes))
    assert finding.severity == severity and "modules_to_save" in finding.likely_causes[0]
    assert UntiedWeights.judge(adapted(tied=False, **changes)) is None


# --- the base under adapters


def of_base(model):
    return FrozenParameters.judge_base(model, {id(p) for p in model.parameters()})


def unfrozen(model):
    return model.requires_grad_(True)


def test_a_base_that_trains_beside_its_adapters_is_named(tmp_path):
    finding = of_base(unfrozen(adapted()))
    assert (finding.severity, finding.evidence["count"]) == ("warning", 4)
    assert all("q_proj" in name or "v_proj" in name for name in finding.evidence["names"])
    assert FrozenParameters.judge_base(unfrozen(adapted()), set()) is None  # in no optimizer
    assert ("frozen_parameters", "warning") in findings_of(tmp_path, unfrozen(adapted()))


def on_norms(**changes):
    return LNTuningConfig(task_type="CAUSAL_LM", **changes)


KINDS = {
    "LoRA": lambda: adapted(),
    "all linear layers": lambda: adapted(target_modules="all-linear", modules_to_save=None),
    "DoRA": lambda: adapted(use_dora=True),
    "all biases": lambda: adapted(bias="all"),
    "biases of adapted layers": lambda: adapted(bias="lora_only"),
    "tokens": lambda: adapted(modules_to_save=None, trainable_token_indices=[5]),
    "embedding and head": lambda: adapted(modules_to_save=["embed_tokens", "lm_head"]),
    "tied": lambda: adapted(tied=True, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "an adapted embedding": lambda: adapted(modules_to_save=None, target_modules=["embed_tokens", "q_proj"]),
    "norms": lambda: get_peft_model(make_model(), on_norms()),
    "IA3": lambda: get_peft_model(make_model(), IA3Config(task_type="CAUSAL_LM")),
    "LoHa": lambda: get_peft_model(make_model(), LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])),
    "OFT": lambda: get_peft_model(make_model(), OFTConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])),
    "prompts": lambda: get_peft_model(make_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
    "merged, then all of it": lambda: unfrozen(adapted(modules_to_save=None).merge_and_unload()),
    "no adapters": make_model,
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_layers_beside_adapters_are_trained_on_purpose(kind):
    model = KINDS[kind]()
    assert of_base(model) is None
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):  # its checkpoint may hold them
        layer.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if "norm" in name and "base_layer" not in name:
            parameter.requires_grad_(True)
    assert of_base(model) is None


def test_a_base_whose_adapters_are_off_is_trained_on_purpose():
    model = unfrozen(adapted())
    with model.disable_adapter():
        assert of_base(unfrozen(model)) is None


def test_adapters_that_are_drawn_at_random_are_named(tmp_path):
    model = adapted("trained-before", modules_to_save=None, r=16, lora_alpha=128, init_lora_weights=False)
    assert len(drawn_factors(model)) == 4
    assert ("init_loss_off", "warning") in findings_of(tmp_path, model)


def test_a_base_that_is_worse_than_a_guess_is_named():
    """As with the ids of another tokenizer."""
    assert InitialLoss.judge_base(5.5, 3.0, 257).severity == "warning"  # ln 257 = 5.55
    assert InitialLoss.judge_base(5.3, 3.0, 257) is None and InitialLoss.judge_base(5.6, 5.5, 257) is None


@pytest.mark.parametrize("name", ["", "trained-before"])
def test_an_adapter_that_trains_and_is_not_active_is_named(tmp_path, name):
    model = adapted(name)
    model.add_adapter("second", config())
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_("second" in parameter_name or "modules_to_save" in parameter_name)
    assert findings_of(tmp_path, model) == [("frozen_parameters", "warning")]


@pytest.mark.parametrize("reentrant", [True, False])
def test_adapters_without_gradient_under_checkpointing_are_named(tmp_path, reentrant):
    """As where checkpointing is switched on after the adapters were made: no input of a layer wants a gradient."""
    model = adapted()
    model.enable_input_require_grads = model.base_model.model.enable_input_require_grads = lambda: None
    how = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    guards = watch(make_trainer(tmp_path, model=model, steps=12, **how))
    assert [name for name, _ in alarms(guards)] == (["wrong_gradient", "frozen_parameters"] if reentrant else [])
    if reentrant:
        first = guards.findings[0]
        assert "no gradient (with checkpointing)" in first.found and "dropout" not in str(first.likely_causes)
        frozen = next(finding for finding in guards.findings if finding.id == "frozen_parameters")
        assert frozen.likely_causes[0].startswith("reentrant checkpointing")


class Merges(TrainerCallback):
    """ReLoRA: at each save adapters are merged into the base and begin again."""

    @torch.no_grad()
    def on_save(self, args, state, control, model, optimizer, **kwargs):
        for module in model.modules():
            if hasattr(module, "get_delta_weight") and "default" in getattr(module, "lora_A", {}):
                module.base_layer.weight += module.get_delta_weight("default")
                module.reset_lora_parameters("default", True)
        for moments in optimizer.state.values():
            moments["exp_avg"].zero_()
            moments["exp_avg_sq"].zero_()


def test_adapters_that_are_merged_at_a_save_are_silent(tmp_path):
    model = adapted(modules_to_save=None, target_modules="all-linear")
    run = dict(steps=45, save_strategy="steps", save_steps=20, train=as_rows(text(45 * 8)))
    assert findings_of(tmp_path, model, more={"callbacks": [Merges()]}, **run) == []
