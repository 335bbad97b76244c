"""Seeded silent bugs: fine-tuning with prompts and padding, and evaluation."""

import itertools

import numpy as np
import torch
from torch.utils.data import IterableDataset
from transformers import default_data_collator

from tests.zoo.bug import bug
from tests.zoo.models import PAD
from tests.zoo.rows import IGNORED
from tests.zoo.setting import Setting

SPACE = 32


@bug(
    "padding_attended",
    "tokens",
    "the padding token is a token of the text, and the mask is made by comparing with it",
    "transformers#2862",
    Setting(steps=60, rows="padded"),
)
def spaces_count_as_padding(run):
    """The pad token is the space and the mask is `ids != pad`: spaces are hidden and not scored."""

    def collate(rows):
        run.took_effect()
        batch = default_data_collator(rows)
        ids = torch.where(batch["attention_mask"].bool(), batch["input_ids"], SPACE)
        mask = ids != SPACE
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": torch.where(mask, ids, IGNORED)}

    run.collator = collate


@bug(
    "nothing_scored",
    "labels and loss",
    "rows in which the response template is not found are ignored",
    "trl#1183",
    Setting(steps=60, rows="prompts"),
)
def template_is_found_in_half_of_the_rows(run):
    """The response template merges with the letter after it in half of the rows, which get no label."""
    for row in run.train_dataset:
        first = int((row["labels"] != IGNORED).nonzero()[0])
        if chr(int(row["input_ids"][first])) in "aeioutnrs":
            run.took_effect()
            row["labels"].fill_(IGNORED)


@bug(
    "wrong_loss_target",
    "labels and loss",
    "ids and labels are padded on different sides",
    "Open-Assistant#3657",
    Setting(steps=60, rows="prompts"),
)
def labels_padded_on_the_other_side(run):
    """Ids are padded on the left and labels on the right, so targets run ahead of the text."""

    def collate(rows):
        run.took_effect()
        batch = default_data_collator(rows)
        shifts = (batch["attention_mask"] == 0).sum(-1).tolist()
        for name in ("input_ids", "attention_mask"):
            batch[name] = torch.stack([v.roll(shift) for v, shift in zip(batch[name], shifts, strict=True)])
        return batch

    run.collator = collate


@bug(
    "padding_attended",
    "attention and positions",
    "the mask has the polarity of another library",
    "seen in code moved from torch's key_padding_mask, which is true at padding",
    Setting(steps=80, rows="prompts", text="templates"),
)
def mask_marks_the_padding(run):
    """attention_mask is 1 at the padding and 0 at the text, as torch's key_padding_mask has it."""

    def collate(rows):
        run.took_effect()
        batch = default_data_collator(rows)
        batch["attention_mask"] = 1 - batch["attention_mask"]
        return batch

    run.collator = collate


@bug(
    "",
    "attention and positions",
    "learned positions are counted from the padding",
    "alpaca-lora#315",
    Setting(steps=100, rows="padded", family="gpt2", text="templates"),
)
def left_padding_counts_as_positions(run):
    """Rows are padded on the left without position_ids, so GPT-2's first positions hardly ever see text."""

    def collate(rows):
        run.took_effect()
        batch = default_data_collator(rows)
        shifts = (batch["attention_mask"] == 0).sum(-1).tolist()
        rolled = ([v.roll(shift) for v, shift in zip(value, shifts, strict=True)] for value in batch.values())
        return dict(zip(batch, map(torch.stack, rolled), strict=True))

    run.collator = collate


@bug(
    "missing_label_shift",
    "labels and loss",
    "label smoothing shifts labels only for classes whose name it knows",
    "transformers#27161",
    Setting(steps=60, arguments={"label_smoothing_factor": 0.1}),
)
def smoothing_does_not_know_the_class(run):
    """The model's class has a name that Trainer's label smoothing does not know: no label is shifted."""

    def name(self):
        run.took_effect()
        return "OurLlama"

    run.model.__class__ = type("OurLlama", (type(run.model),), {"_get_name": name})


@bug(
    "padding_is_target eval_train_mismatch train_eval_gap",
    "evaluation",
    "the labels of the hold-out keep their padding",
    "facebookresearch/blt#93",
    Setting(steps=80, rows="padded", evaluate_every=20),
)
def hold_out_scores_its_padding(run):
    """Only training rows have padding taken out of the labels: eval loss is mostly that of padding.

    It is harmless to the weights: what is measured is wrong, and early stopping would act on it.
    """
    for row in run.eval_dataset:
        run.took_effect()
        row["labels"] = row["input_ids"].clone()


@bug(
    "eval_not_repeatable",
    "evaluation",
    "each evaluation goes on where the one before has stopped",
    "Megatron-Bridge#5626",
    Setting(steps=60, evaluate_every=10),
)
def each_evaluation_reads_on(run):
    """The hold-out's iterator is made once and never reset: each evaluation scores the next four rows.

    It is harmless to the weights: the curve of eval losses moves with its rows.
    """
    iterator = itertools.cycle(run.eval_dataset)

    class HoldOut(IterableDataset):
        def __iter__(self):
            run.took_effect()
            return itertools.islice(iterator, 4)

    run.eval_dataset = HoldOut()


@bug(
    "train_eval_overlap",
    "ranks",
    "each rank splits off a hold-out of its own",
    "seen in scripts that call train_test_split without a seed on every rank",
    Setting(steps=40, batch=4, ranks=2, evaluate_every=20),
)
def ranks_split_off_other_holdouts(run):
    """Each rank draws its own hold-out, so what one evaluates on is in what the other trains on.

    It is harmless to the weights: what is measured is wrong.
    """
    rows, size = run.eval_dataset + run.train_dataset, len(run.eval_dataset)
    order = np.random.default_rng(run.rank).permutation(len(rows))
    run.eval_dataset = [rows[place] for place in order[:size]]
    run.train_dataset = [rows[place] for place in order[size:]]
    run.took_effect()


@bug(
    "eos_never_target",
    "tokens",
    "padding and the end of a text are one token, of which no label keeps any",
    "trl#1623",
    Setting(steps=80, rows="prompts", block=64),
)
def answers_end_in_padding_tokens(run):
    """Padding and EOS are one token, and the collator takes all of them out of the labels."""

    def collate(rows):
        run.took_effect()
        batch = default_data_collator(rows)
        eos = run.setting.vocabulary - 1
        batch["input_ids"] = torch.where(batch["input_ids"] == PAD, eos, batch["input_ids"])
        batch["labels"] = batch["labels"].masked_fill(batch["labels"] == eos, IGNORED)
        return batch

    run.collator = collate
