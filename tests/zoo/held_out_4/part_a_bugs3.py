"""Bugs and healthy runs of TRL's trainers: a small model that was trained on the texts before."""

import copy

import datasets
import torch
import trl
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast
from trl.trainer.dpo_trainer import DataCollatorForPreference

from tests.zoo.bug import bug
from tests.zoo.models import make_model
from tests.zoo.rows import make_rows
from tests.zoo.setting import Setting
from tests.zoo.texts import EVAL_DOCUMENTS, texts_of

STEPS = 40
BASE = Setting(rows="prompts", block=160, steps=STEPS, batch=4)
RATE = {"learning_rate": 1e-3, "weight_decay": 0.0}
SLOW = {"learning_rate": 2e-4, "weight_decay": 0.0}
COMMON = {"gradient_checkpointing": False, "bf16": False, "max_length": 160}


def byte_tokenizer():
    """The ids are the bytes, and `</s>` is 256; byte 0 pads."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    vocabulary = {chr(byte): byte for byte in printable}
    vocabulary |= {chr(256 + place): byte for place, byte in enumerate(others)}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token=chr(256))


def pretrained(setting):
    """The base model: 40 steps on rows of the same kind of text."""
    rows = make_rows(setting.changed(rows="packed", steps=40, batch=8, change=None))
    model = make_model(setting)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for ids in torch.stack([row["input_ids"] for row in rows]).split(8):
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), optimizer.zero_grad()
    return model


def pairs(setting):
    """A prompt, how its text goes on, and how another text goes on, every second word of it in capitals."""
    texts = [text for text in texts_of(setting.text)[EVAL_DOCUMENTS:] if len(text) > 160][: setting.num_rows + 1]
    starts, ends = [text[:50] for text in texts], [text[50:140] for text in texts]
    return {"prompt": starts[:-1], "chosen": ends[:-1], "rejected": [_shouted(text) for text in ends[1:]]}


def _shouted(text):
    return " ".join(word.upper() if place % 2 else word for place, word in enumerate(text.split(" ")))


def prepared(run, columns, trainer_class, config_class, **values):
    """A bug may change `run.columns`, `run.values` (of the configuration), `run.parts` (of the trainer)."""
    run.model = pretrained(run.setting)
    run.columns, run.values, run.parts = columns, {**COMMON, **values}, {}
    run.build = lambda: trainer_class(
        model=run.model,
        args=config_class(**{**run.arguments, **run.values}),
        train_dataset=datasets.Dataset.from_dict(run.columns),
        processing_class=byte_tokenizer(),
        callbacks=run.callbacks,
        **run.parts,
    )


def dpo(run):
    prepared(run, pairs(run.setting), trl.DPOTrainer, trl.DPOConfig, beta=0.1)
    run.parts["ref_model"] = copy.deepcopy(run.model)


def dpo_precomputed(run):
    dpo(run)
    del run.parts["ref_model"]
    run.values |= {"precompute_ref_log_probs": True}


def kto(run):
    both = pairs(run.setting)
    columns = {"prompt": [], "completion": [], "label": []}
    for place, prompt in enumerate(both["prompt"]):
        is_good = place % 2 == 0
        columns["prompt"].append(prompt)
        columns["completion"].append(both["chosen" if is_good else "rejected"][place])
        columns["label"].append(is_good)
    prepared(run, columns, trl.KTOTrainer, trl.KTOConfig, beta=0.1)
    run.parts["ref_model"] = copy.deepcopy(run.model)


def sft_prompts(run):
    both = pairs(run.setting)
    columns = {"prompt": both["prompt"], "completion": both["chosen"]}
    prepared(run, columns, trl.SFTTrainer, trl.SFTConfig, completion_only_loss=True)


# --- bugs


@bug(
    "wrong_loss_target loss_off_reference",
    "labels and loss",
    "the prompt of the rejected side is scored",
    "OpenRLHF/OpenRLHF#294",
    BASE.changed(arguments=SLOW, change=dpo),
)
def dpo_rejected_prompt_scored(run):
    """Only the chosen half of the mask hides the prompt: the rejected half's log-probability includes it."""
    original = DataCollatorForPreference.torch_call

    def torch_call(self, examples):
        batch = original(self, examples)
        half = len(examples)
        batch["completion_mask"][half:] = batch["attention_mask"][half:]
        run.took_effect()
        return batch

    run.patch(DataCollatorForPreference, "torch_call", torch_call)


@bug(
    "init_loss_off loss_off_reference reference_mismatch",
    "data",
    "stored reference values of other rows",
    "seen with stored reference log-probabilities that were joined after the rows had been shuffled",
    BASE.changed(arguments=SLOW, change=dpo_precomputed),
)
def dpo_reference_of_other_rows(run):
    """The reference log-probabilities were stored in another order than the rows: each pair has those of others."""

    def shift(trainer):
        rows = trainer.train_dataset
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            values = list(rows[name])
            by = 1 if "chosen" in name else 7
            rows = rows.remove_columns(name).add_column(name, values[by:] + values[:by])
        trainer.train_dataset = rows
        run.took_effect()

    run.on_trainer.append(shift)


@bug(
    "init_loss_off loss_off_reference",
    "checkpoint and resume",
    "the reference model has other weights",
    "seen with a reference model that was made from the configuration and never loaded",
    BASE.changed(arguments=SLOW, change=dpo),
)
def dpo_reference_never_loaded(run):
    """The reference model was made from the configuration and its weights were never loaded."""
    run.parts["ref_model"] = make_model(run.setting.changed(seed=run.setting.seed + 1))
    run.took_effect()


@bug(
    "wrong_loss_target",
    "data",
    "labels that are strings are all true",
    "seen with labels read from CSV: bool('False') is true",
    BASE.changed(arguments=SLOW, change=kto),
)
def kto_labels_all_true(run):
    """The labels were read as the strings 'True' and 'False', and `bool` makes both true."""
    run.columns["label"] = [bool(str(label)) for label in run.columns["label"]]
    run.took_effect()


@bug(
    "wrong_loss_target",
    "data",
    "the completion holds the prompt again",
    "seen with a template that was applied to the whole conversation for the completion column too",
    BASE.changed(arguments=RATE, change=sft_prompts),
)
def sft_completion_repeats_prompt(run):
    """The completion column was made from the whole text: the model learns to repeat its prompt."""
    both = zip(run.columns["prompt"], run.columns["completion"], strict=True)
    run.columns["completion"] = [prompt + completion for prompt, completion in both]
    run.took_effect()


# --- healthy runs


def dpo_ipo(run):
    dpo(run)
    run.values |= {"loss_type": "ipo", "beta": 0.5}


def reward(run):
    prepared(run, pairs(run.setting), trl.RewardTrainer, trl.RewardConfig)
    config = copy.deepcopy(run.model.config)
    config.num_labels, config.pad_token_id = 1, 0
    torch.manual_seed(run.setting.seed)
    model = AutoModelForSequenceClassification.from_config(config)
    model.model.load_state_dict(run.model.model.state_dict())
    run.model = model


def sft_packed(run):
    texts = [text[:600] for text in texts_of(run.setting.text)[EVAL_DOCUMENTS:][:1200]]
    prepared(run, {"text": texts}, trl.SFTTrainer, trl.SFTConfig, packing=True, packing_strategy="wrapped")


def sft_neftune(run):
    sft_prompts(run)
    run.values |= {"neftune_noise_alpha": 5.0}


def sft_all_scored(run):
    sft_prompts(run)
    run.values |= {"completion_only_loss": False}


HEALTHY = {
    "dpo": BASE.changed(arguments=SLOW, change=dpo),
    "dpo_ipo": BASE.changed(arguments=SLOW, accumulation=2, batch=2, change=dpo_ipo),
    "dpo_precomputed": BASE.changed(arguments=SLOW, change=dpo_precomputed),
    "kto": BASE.changed(arguments=SLOW, change=kto),
    "reward": BASE.changed(arguments=SLOW, change=reward),
    "sft_prompts": BASE.changed(arguments=RATE, change=sft_prompts),
    "sft_packed": BASE.changed(rows="packed", arguments=RATE, change=sft_packed),
    "sft_neftune": BASE.changed(arguments=RATE, change=sft_neftune),
    "sft_all_scored": BASE.changed(arguments=RATE, change=sft_all_scored),
}
