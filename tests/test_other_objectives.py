"""Trainings whose loss is no next-token cross entropy, and some that change how it is computed: silent, with a word on
why, and guards that need none go on."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    BertLMHeadModel,
    Trainer,
    default_data_collator,
)

from recipe.guards import RegressionCallback
from tests.test_any_trainer import prompts, texts, tiny
from tests.test_guards_on_runs import alarms, as_rows, make_model, make_trainer, next_token_loss, shifted, text, watch

STEPS = 12
NEED_NEXT_TOKEN = {"init_loss_off", "loss_below_envelope", "loss_diverged", "eos_never_target", "padding_is_target"}
NEED_NEXT_TOKEN |= {"padding_attended", "lossy_tokenizer"}
GO_ON = {"loss_not_finite", "learning_rate_off", "frozen_parameters", "token_out_of_range"}


def check_silent(guards: RegressionCallback, words: str = "", judged=GO_ON) -> None:
    """`words`: of the objective, where it is none that all guards judge."""
    assert alarms(guards) == [], [finding.log_line() for finding in guards.findings]
    assert guards.failure is None and judged <= guards.judged, judged - guards.judged
    reasons = {**guards.cannot_judge, **guards.not_applicable}
    assert not [reason for reason in reasons.values() if "Error" in reason], reasons
    if words:
        said = {name: reason for name, reason in guards.not_applicable.items() if words in reason}
        assert said.keys() | guards.cannot_judge.keys() >= NEED_NEXT_TOKEN and "loss_diverged" in said, reasons


# --- TRL


def preferences(count: int) -> dict:
    data = prompts(count)
    return {"prompt": data["prompt"], "chosen": data["completion"], "rejected": texts(count, seed=1)}


def unpaired(count: int) -> dict:
    return prompts(count) | {"label": [number % 3 > 0 for number in range(count)]}


def longest(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


TRL = {
    "DPO": ("DPOTrainer", "DPOConfig", preferences, {}, "a preference or policy loss"),
    "DPO, precomputed": (
        *("DPOTrainer", "DPOConfig", preferences),
        *({"precompute_ref_log_probs": True}, "a preference or policy loss"),
    ),
    "KTO": ("KTOTrainer", "KTOConfig", unpaired, {}, "a preference or policy loss"),
    "Reward": ("RewardTrainer", "RewardConfig", preferences, {}, "a score of whole rows"),
    "GRPO": ("GRPOTrainer", "GRPOConfig", lambda count: {"prompt": prompts(count)["prompt"]}, {}, ""),
    "ORPO": ("experimental.orpo.ORPOTrainer", "experimental.orpo.ORPOConfig", preferences, {}, ""),
}
SIZES = {"GRPO": {"num_generations": 4, "max_completion_length": 8}, "Reward": {"max_length": 64}}


def named(trl, path: str):
    """`experimental.orpo.ORPOTrainer` of the package."""
    import importlib

    *modules, name = path.split(".")
    return getattr(importlib.import_module(".".join(["trl", *modules])), name)


@pytest.mark.parametrize("case", TRL)
def test_trl(case, tokenizer, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    trainer_class, config_class, make_data, more, words = TRL[case]
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    values = {"output_dir": str(tmp_path / "run"), "max_steps": STEPS, "per_device_train_batch_size": 4}
    values |= {"learning_rate": 1e-3, "save_strategy": "no", "report_to": [], "use_cpu": True, "bf16": False}
    values |= {"disable_tqdm": True, **more, **SIZES.get(case, {})}
    model = tiny(vocab_size=257, eos_token_id=256)
    if case == "Reward":
        from transformers import LlamaForSequenceClassification

        model.config.num_labels = 1
        model = LlamaForSequenceClassification(model.config)
    given = {"reward_funcs": longest} if case == "GRPO" else {}
    given |= {"ref_model": copy.deepcopy(model)} if case in ("DPO", "KTO") else {}
    trainer = named(trl, trainer_class)(
        model=model,
        args=named(trl, config_class)(**values),
        train_dataset=datasets.Dataset.from_dict(make_data(4 * STEPS)),
        processing_class=tokenizer,
        **given,
    )
    guards = watch(trainer)
    has_tokens = case not in ("GRPO", "ORPO")
    check_silent(guards, words, GO_ON if has_tokens else {"loss_not_finite", "learning_rate_off", "frozen_parameters"})


# --- stock Trainers with losses and steps of their own


class TwoPasses(Trainer):
    """R-Drop."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        first, second = (model(**inputs) for _ in range(2))
        z, other = first.logits.log_softmax(-1), second.logits.log_softmax(-1)
        drawn = F.kl_div(z, other, log_target=True, reduction="none").sum(-1).mean()
        loss = (first.loss + second.loss) / 2 + drawn
        return (loss, first) if return_outputs else loss


class Adversarial(Trainer):
    """FGM: a second backward pass with the embedding moved along its gradient."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        weight = model.get_input_embeddings().weight
        before, gradient = weight.detach().clone(), weight.grad
        with torch.no_grad():
            weight.add_(0.1 * gradient / gradient.norm())
        super().training_step(model, inputs, num_items_in_batch)
        with torch.no_grad():
            weight.copy_(before)
        return loss


class Sharpness(Trainer):
    """SAM: the gradient at the weights moved along the first gradient."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        super().training_step(model, inputs, num_items_in_batch)
        moves = [(p, 0.05 * p.grad / p.grad.norm().clamp_min(1e-12)) for p in model.parameters() if p.grad is not None]
        with torch.no_grad():
            [parameter.add_(move) for parameter, move in moves]
        model.zero_grad()
        loss = super().training_step(model, inputs, num_items_in_batch)
        with torch.no_grad():
            [parameter.sub_(move) for parameter, move in moves]
        return loss


@pytest.mark.parametrize("trainer_class", [TwoPasses, Adversarial, Sharpness])
def test_losses_and_steps_that_run_the_model_twice(trainer_class, tmp_path):
    model = make_model(attention_dropout=0.1)
    guards = watch(make_trainer(tmp_path, model=model, steps=24, trainer_class=trainer_class))
    check_silent(guards, judged=GO_ON | {"missing_label_shift", "non_causal_attention"})


def loss_trainer(compute):
    """A Trainer whose loss is `compute(model, inputs)`."""

    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = compute(model, inputs)
            return (loss, outputs) if return_outputs else loss

    return Own


def distil(sure: float, share: float):
    teacher = make_model(seed=1).eval()

    def compute(model, inputs):
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs.get("attention_mask"))
        with torch.no_grad():
            wanted = (sure * teacher(input_ids=inputs["input_ids"]).logits).softmax(-1)
        loss = F.kl_div(outputs.logits.log_softmax(-1), wanted, reduction="none").sum(-1).mean()
        return share * next_token_loss(outputs.logits, shifted(inputs["labels"])) + (1 - share) * loss, outputs

    return compute


@pytest.mark.parametrize(("sure", "share"), [(100.0, 0.0), (1e5, 0.0), (100.0, 0.5), (1e5, 0.5)])
def test_distillation(sure, share, tmp_path):
    trainer = make_trainer(tmp_path, steps=30, trainer_class=loss_trainer(distil(sure, share)), learning_rate=1e-2)
    check_silent(watch(trainer), "mixed with another loss" if share else "no cross entropy")


def test_gradient_ascent_on_a_trained_model(tmp_path):
    model = make_model()
    make_trainer(tmp_path, model=model, steps=60, learning_rate=1e-2).train()
    model.name_or_path = "trained-before"

    def forget(model, inputs):
        outputs = model(**inputs)
        return -outputs.loss, outputs

    guards = watch(make_trainer(tmp_path, model=model, steps=30, trainer_class=loss_trainer(forget)))
    check_silent(guards, "gradient ascent")


@pytest.mark.parametrize("signs", [(-1.0, 1.0), (1.0, -1.0), (-1.0, -1.0)])
def test_rows_that_are_pushed_away_behind_the_ones_that_are_looked_at_first(signs, tmp_path):
    """8 rows, of which the first 4 share a sign. All of them pushed away by a new model: the loss is negated."""

    def compute(model, inputs):
        outputs, labels = model(input_ids=inputs["input_ids"]), shifted(inputs["labels"])
        losses = F.cross_entropy(outputs.logits.transpose(1, 2), labels, reduction="none").mean(1)
        return (losses * inputs["advantages"]).mean(), outputs

    def collate(rows):
        return {**default_data_collator(rows), "advantages": torch.tensor(signs).repeat_interleave(4)}

    own = {"per_device_train_batch_size": 8, "remove_unused_columns": False, "more": {"data_collator": collate}}
    guards = watch(make_trainer(tmp_path, steps=2, trainer_class=loss_trainer(compute), **own))
    if signs[0] == signs[1]:
        assert alarms(guards) == [("wrong_loss_target", 0)]
    else:
        check_silent(guards, "a policy loss")


def bidirectional(model, ids):
    rows, length = ids.shape
    return model(input_ids=ids, attention_mask=torch.zeros(rows, 1, length, length))


def diffuse(model, inputs):
    """Masked diffusion: a random share of each row is hidden, and restored by a model that looks both ways."""
    ids = inputs["input_ids"]
    share = torch.rand(len(ids), 1) * 0.8 + 0.2
    hidden = torch.rand(ids.shape) < share
    outputs = bidirectional(model, torch.where(hidden, 250, ids))
    losses = F.cross_entropy(outputs.logits.transpose(1, 2), inputs["labels"], reduction="none")
    return (losses * hidden / share).mean(), outputs


def test_masked_diffusion(tmp_path):
    evaluated = {"eval_strategy": "steps", "eval_steps": 10, "more": {"eval_dataset": as_rows(text(8, seed=2))}}
    guards = watch(make_trainer(tmp_path, steps=30, trainer_class=loss_trainer(diffuse), **evaluated))
    check_silent(guards, "denoising of masked tokens")
    assert "denoising" in guards.not_applicable["non_causal_attention"]


def test_a_mask_that_leaks_inside_of_compute_loss(tmp_path):
    def leaks(model, inputs):
        outputs = bidirectional(model, inputs["input_ids"])
        return next_token_loss(outputs.logits, shifted(inputs["labels"])), outputs

    guards = watch(make_trainer(tmp_path, trainer_class=loss_trainer(leaks)))
    assert ("non_causal_attention", 0) in alarms(guards)


# --- encoders, which see all of their tokens


def encoder(model_class):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    return model_class(BertConfig(vocab_size=257, max_position_embeddings=64, num_labels=5, **sizes))


def test_an_encoder_may_look_both_ways(tmp_path):
    ids = text(4 * STEPS)
    run = {"train": as_rows(ids, ids % 5), "steps": STEPS, "model": encoder(BertForTokenClassification)}
    check_silent(watch(make_trainer(tmp_path, **run)), "classification of tokens")


def test_words_that_are_replaced_are_hidden_from_an_encoder(tmp_path):
    """As a masked model's, but behind random words."""
    ids, generator = text(4 * STEPS), torch.Generator().manual_seed(0)
    drawn = torch.rand(ids.shape, generator=generator) < 0.15
    given = torch.where(drawn, torch.randint(64, 128, ids.shape, generator=generator), ids)
    rows = as_rows(given, ids.where(drawn, -100))
    guards = watch(make_trainer(tmp_path, train=rows, steps=STEPS, model=encoder(BertForMaskedLM)))
    check_silent(guards, "denoising of masked tokens")


def test_a_causal_model_of_that_family_is_judged(tmp_path):
    config = encoder(BertForMaskedLM).config
    guards = watch(make_trainer(tmp_path, steps=4, model=BertLMHeadModel(config)))  # is_decoder is missing
    assert alarms(guards)[0] == ("non_causal_attention", 0)
