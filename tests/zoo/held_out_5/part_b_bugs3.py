"""Seeded silent bugs: TRL, adapters, other objectives and own losses."""

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.nn import functional as F
from transformers import PreTrainedModel
from trl.trainer.dpo_trainer import DataCollatorForPreference

from tests.zoo.bug import bug
from tests.zoo.held_out_5.part_b_builds import (
    ATTENTION,
    adapts,
    adapts_with_embedding,
    continues_with_t5,
    distils,
    distils_only,
    fills_gaps,
    prefers,
    scores,
)
from tests.zoo.models import PAD, make_model
from tests.zoo.setting import Setting

PREFERENCES = Setting(vocabulary=4096, steps=40, arguments={"learning_rate": 1e-3})


@bug(
    "wrong_loss_target",
    "labels and loss",
    "kept logits of a teacher are read in another order than the rows",
    "haitongli/knowledge-distillation-pytorch#4",
    Setting(steps=60, change=distils),
)
def teacher_answers_for_other_rows(run):
    """The teacher's logits are read by batch number in the dataset's order, but rows are shuffled."""
    read = 0

    def lookup(places):
        nonlocal read
        run.took_effect()
        wrong = torch.arange(read, read + len(places)) % len(run.cache)
        read += len(places)
        return run.cache[wrong]

    run.lookup = lookup


@bug(
    "wrong_loss_target init_loss_off",
    "labels and loss",
    "kl_div gets probabilities where it takes their logarithms",
    "microsoft/ProDA#43",
    Setting(steps=60, change=distils_only),
)
def kl_div_gets_probabilities(run):
    """The student's softmax goes into `kl_div`: it learns the teacher's likeliest token."""

    def distance(student, teacher):
        run.took_effect()
        return F.kl_div(student.softmax(-1), teacher.softmax(-1), reduction="none").sum(-1)

    run.distance = distance


@bug(
    "missing_label_shift wrong_loss_target",
    "labels and loss",
    "a masked model is scored on what it sees",
    "transformers#20797",
    Setting(steps=80, change=fills_gaps),
)
def masked_model_scores_what_it_sees(run):
    """Labels are the whole text: 85 % of BERT's targets stand at the same place of its input.

    `learned` compares nothing here, a masked model's next-byte loss. The loss falls far below the twin's, of which
    six in seven parts are copying; the gaps are learned from a seventh of the gradient.
    """
    right = run.collator

    def collate(rows):
        run.took_effect()
        labels = torch.stack([row["labels"] for row in rows])
        return {**right(rows), "labels": labels}

    run.collator = collate


@bug(
    "missing_label_shift",
    "labels and loss",
    "a decoder's inputs are its labels, not shifted",
    "transformers#11977",
    Setting(steps=80, rows="prompts", change=continues_with_t5),
)
def decoder_is_fed_its_labels(run):
    """decoder_input_ids are the labels themselves, so T5 learns to copy what it is fed and cannot write."""
    right = run.collator

    def collate(rows):
        run.took_effect()
        batch = right(rows)
        return {**batch, "decoder_input_ids": batch["labels"].clamp(min=PAD)}

    run.collator = collate


@bug(
    "init_loss_off",
    "labels and loss",
    "DPO's reference is another model than the one that training begins with",
    "trl#4723",
    PREFERENCES.changed(change=prefers),
)
def dpo_reference_was_never_tuned(run):
    """DPO's reference is the base model from before SFT, so its margins do not begin at nothing.

    `learned` is not what DPO is for: the policy is pulled towards a model that has not learned the texts, and the
    pairs that SFT tells apart already are taken for learned, with nearly no gradient.
    """
    reference = make_model(run.setting)
    reference.register_forward_hook(lambda *_: run.took_effect())
    run.extra["ref_model"] = reference


@bug(
    "nothing_scored",
    "data",
    "an own collator cuts rows where their prompts have not ended",
    "seen in DPO on retrieved passages, where rewards stayed at zero as in trl#1311",
    PREFERENCES.changed(change=prefers),
)
def dpo_collator_cuts_the_completions_off(run):
    """An own collator cuts rows to 64 tokens: of two pairs in three, only the shared prompt is left.

    The trainer drops prompts that fill its max_length of 128, and these do not. Such pairs have a loss of ln 2 and
    teach nothing: reported margins and accuracies are those of the third that is left.
    """
    passage = "The module has these parts: a reader, a parser, a writer and a set of tools that others may use. " * 3
    rows = run.pairs.to_list()
    for row in rows[::3] + rows[1::3]:
        row["prompt"] = passage + row["prompt"]
    run.pairs = Dataset.from_list(rows)
    right = DataCollatorForPreference(pad_token_id=run.processing.pad_token_id, max_length=64)

    def collate(rows):
        run.took_effect()
        return right(rows)

    run.extra["data_collator"] = collate


@bug(
    "frozen_parameters",
    "checkpoint and resume",
    "a new head under adapters is neither trained nor saved",
    "OpenRLHF#873",
    PREFERENCES.changed(change=scores, arguments={"learning_rate": 3e-3}),
)
def reward_head_stays_random(run):
    """LoRA without modules_to_save freezes the reward model's new head, which no checkpoint holds either.

    The adapters learn to suit one random head; the saved adapter is loaded beside another, and its rewards are noise.
    """
    run.extra["peft_config"] = LoraConfig(r=8, target_modules=ATTENTION)
    run.took_effect()


@bug(
    "untied_weights",
    "checkpoint and resume",
    "an adapter trains a copy of one of two tied matrices",
    "peft#2777",
    Setting(steps=60, vocabulary=1024, change=adapts_with_embedding),
)
def adapter_copies_the_tied_embedding(run):
    """The adapter trains a copy of a tied embedding: the head stays behind, merged weights disagree."""
    run.model = make_model(run.setting)
    adapts_with_embedding(run, ensure_weight_tying=False)
    run.took_effect()


@bug(
    "frozen_parameters wrong_gradient",
    "optimizer and schedule",
    "reentrant checkpointing cuts the gradient where no input requires one",
    "open-unlearning#178",
    Setting(
        family="qwen2",
        steps=60,
        change=adapts,
        arguments={"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ),
)
def checkpointing_cuts_the_adapters_off(run):
    """Reentrant checkpointing over a frozen embedding passes no gradient: only the head trains."""
    run.patch(PreTrainedModel, "enable_input_require_grads", lambda self: run.took_effect())


@bug(
    "double_bos",
    "tokens",
    "template and tokenizer both begin the text",
    "alignment-handbook#127",
    Setting(kind="sft", vocabulary=4096, steps=40, batch=4),
)
def template_and_tokenizer_both_begin_the_text(run):
    """The rendered chat template has a BOS and the tokenizer adds one, so every row begins with two.

    It costs little loss: what is learned is to answer after two, and a server sends one.
    """
    run.train_dataset = run.train_dataset.map(lambda row: {"text": "<s><s>" + row["text"]})
    run.took_effect()
