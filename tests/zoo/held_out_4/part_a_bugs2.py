"""Bugs and healthy runs of PEFT: adapters on a model that was trained before on other text."""

import peft
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from tests.zoo.bug import bug
from tests.zoo.models import make_model
from tests.zoo.rows import make_rows
from tests.zoo.setting import Setting

STEPS = 50
RATE = {"learning_rate": 5e-3, "weight_decay": 0.0}
UNTIED = {"tie_word_embeddings": False}


def pretrained(setting):
    """The base model: 60 steps on source code."""
    rows = make_rows(setting.changed(text="code", rows="packed", steps=60, batch=8, accumulation=1, change=None))
    model = make_model(setting)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for ids in torch.stack([row["input_ids"] for row in rows]).split(8):
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), optimizer.zero_grad()
    return model


def adapted(run, config):
    """Trains an adapter of this configuration; a bug may change `run.model`, `run.peft_config`, `run.prepare`."""
    run.model, run.peft_config, run.prepare = pretrained(run.setting), config, lambda model: None
    run.build = lambda: _make(run)


def _make(run):
    torch.manual_seed(run.setting.seed)
    model = peft.get_peft_model(run.model, run.peft_config)
    run.prepare(model)
    return run.trainer_class(
        model=model,
        args=TrainingArguments(**run.arguments),
        train_dataset=run.train_dataset,
        eval_dataset=run.eval_dataset,
        data_collator=run.collator,
        callbacks=run.callbacks,
        optimizers=run.optimizers,
    )


def lora_config(**changes):
    values = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**{**values, **changes})


def lora(run):
    adapted(run, lora_config())


def lora_and_head(run):
    adapted(run, lora_config(modules_to_save=["lm_head"]))


class KeptNearBase(Trainer):
    """The loss and the divergence from the base model, which is the adapter's model without the adapter."""

    loss_is_scaled_for_ga = False

    def base_logits(self, model, inputs):
        with torch.no_grad(), model.disable_adapter():
            return model(input_ids=inputs["input_ids"]).logits

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        base = F.log_softmax(self.base_logits(model, inputs), dim=-1)
        outputs = model(**inputs)
        own = F.log_softmax(outputs.logits, dim=-1)
        divergence = (own.exp() * (own - base)).sum(-1).mean()
        loss = outputs.loss + 2.0 * divergence
        return (loss, outputs) if return_outputs else loss


def lora_near_base(run):
    lora(run)
    run.trainer_class = KeptNearBase


# --- bugs


@bug(
    "frozen_parameters lost_updates",
    "optimizer and schedule",
    "the optimizer was made before the adapter",
    "huggingface/peft#793 (the tuned model works as the base model does)",
    Setting(steps=STEPS, arguments=RATE, change=lora),
)
def optimizer_before_adapter(run):
    """The optimizer holds the base model's weights, which the adapter froze, and none of the adapter's."""
    run.optimizers = (torch.optim.AdamW(run.model.parameters(), lr=5e-3, weight_decay=0.0), None)
    run.took_effect()


@bug(
    "frozen_parameters wrong_gradient lost_updates",
    "accumulation",
    "reentrant checkpointing of frozen inputs stops the gradients",
    "cloneofsimo/lora#26, huggingface/transformers#42489",
    Setting(
        steps=STEPS,
        sizes=UNTIED,
        arguments={
            **RATE,
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
        },
        change=lora_and_head,
    ),
)
def checkpointing_without_input_gradients(run):
    """Reentrant checkpointing of inputs that need no gradient: the layers' adapters get none, the head learns."""
    run.arguments["gradient_checkpointing_kwargs"] = {"use_reentrant": True}

    def prepare(model):
        model.disable_input_require_grads = lambda: None
        model.enable_input_require_grads = lambda: run.took_effect()
        model.get_base_model().enable_input_require_grads = lambda: run.took_effect()

    run.prepare = prepare


@bug(
    "init_loss_off loss_off_reference",
    "labels and loss",
    "the adapter is not zero at the start",
    "huggingface/peft documentation of init_lora_weights=False (for tests only)",
    Setting(steps=STEPS, arguments=RATE, change=lora),
)
def adapter_starts_at_random(run):
    """Both factors of the adapter are drawn at random with a large scale, which destroys the base model at once."""
    run.peft_config = lora_config(init_lora_weights=False, lora_alpha=128)
    run.took_effect()


@bug(
    "untied_weights",
    "checkpoint and resume",
    "a tied head is trained apart from its embedding",
    "huggingface/peft#2777",
    Setting(steps=STEPS, arguments=RATE, change=lora),
)
def tied_head_saved_apart(run):
    """`modules_to_save` names the tied head: it is trained as a copy, and merged it overwrites the embedding."""
    run.peft_config = lora_config(modules_to_save=["lm_head"])
    run.took_effect()


@bug(
    "init_loss_off loss_off_reference",
    "tokens",
    "ids of a tokenizer with another offset",
    "seen with fairseq vocabularies (XLM-R, NLLB), whose ids are those of sentencepiece plus an offset",
    Setting(steps=STEPS, arguments=RATE, change=lora),
)
def ids_with_an_offset(run):
    """Texts are encoded by the raw tokenizer, whose ids lie 3 below those that the base model was trained on."""
    for row in [*run.train_dataset, *run.eval_dataset]:
        ids = row["input_ids"]
        row["input_ids"] = row["labels"] = torch.where(ids < 256, (ids - 3) % 256, ids)
        run.took_effect()


@bug(
    "frozen_parameters",
    "optimizer and schedule",
    "the base model is trained too",
    "seen in scripts that set requires_grad on all parameters after get_peft_model",
    Setting(steps=STEPS, arguments=RATE, change=lora),
)
def base_unfrozen(run):
    """A loop over all parameters turns their gradients on after the adapter was made: the base is trained as well."""

    def prepare(model):
        model.requires_grad_(True)
        run.took_effect()

    run.prepare = prepare


@bug(
    "wrong_loss_target loss_off_reference",
    "labels and loss",
    "the reference is the model itself",
    "labmlai/annotated_deep_learning_paper_implementations#66 (both sides of a divergence are the same logits)",
    Setting(steps=STEPS, arguments=RATE, change=lora_near_base),
)
def divergence_from_itself(run):
    """The reference logits are taken with the adapter on, so that the divergence from the base is always 0."""

    class FromItself(KeptNearBase):
        def base_logits(self, model, inputs):
            run.took_effect()
            with torch.no_grad():
                return model(input_ids=inputs["input_ids"]).logits

    run.trainer_class = FromItself


# --- healthy runs


def dora(run):
    adapted(run, lora_config(use_dora=True, use_rslora=True))


def lora_dropout_attention_only(run):
    adapted(run, lora_config(target_modules=["q_proj", "v_proj"], lora_dropout=0.1, r=16))


def ia3(run):
    modules = ["k_proj", "v_proj", "down_proj"]
    adapted(run, peft.IA3Config(target_modules=modules, feedforward_modules=["down_proj"], task_type="CAUSAL_LM"))


def prompt_tuning(run):
    adapted(run, peft.PromptTuningConfig(num_virtual_tokens=8, task_type="CAUSAL_LM"))


def lora_pissa(run):
    adapted(run, lora_config(init_lora_weights="pissa"))


HEALTHY = {
    "lora_other_text": Setting(steps=STEPS, arguments=RATE, change=lora),
    "lora_dora_rslora": Setting(steps=40, arguments=RATE, change=dora),
    "lora_pissa": Setting(steps=STEPS, arguments=RATE | {"learning_rate": 2e-3}, change=lora_pissa),
    "lora_attention_only_prompts": Setting(
        rows="prompts", steps=STEPS, arguments=RATE, change=lora_dropout_attention_only
    ),
    "lora_untied_head_checkpointing": Setting(
        steps=STEPS,
        sizes=UNTIED,
        arguments={**RATE, "gradient_checkpointing": True},
        accumulation=2,
        batch=4,
        change=lora_and_head,
    ),
    "lora_near_base": Setting(steps=STEPS, arguments=RATE, change=lora_near_base),
    "ia3": Setting(steps=STEPS, arguments=RATE | {"learning_rate": 2e-2}, change=ia3),
    "prompt_tuning": Setting(steps=STEPS, arguments=RATE | {"learning_rate": 3e-2}, change=prompt_tuning),
}
