"""Tokens."""

import torch

from tests.zoo.bug import bug
from tests.zoo.development.labels import change_batch
from tests.zoo.models import EOS, eos_of
from tests.zoo.rows import IGNORED, make_rows
from tests.zoo.run import Run
from tests.zoo.setting import Setting

AREA = "tokens"
ENGLISH = Setting()
PROMPTS = Setting(rows="prompts")
DOCUMENTS = Setting(rows="documents", vocabulary=4096, block=256, batch=4)
TOKENS = Setting(rows="padded", vocabulary=4096, batch=4, steps=60)
BOS = 1  # of llama-4k


@bug("eos_never_target", AREA, "another special token ends documents", "LlamaFactory 77bf3d66c", DOCUMENTS)
def another_special_token_ends_documents(run: Run):
    """Another special token than the model's EOS stands between documents."""
    eos = eos_of(run.setting.vocabulary)

    def change(batch):
        for name in ("input_ids", "labels"):
            batch[name] = batch[name].masked_fill(batch[name] == eos, BOS)

    change_batch(run, change)


@bug("eos_never_target", AREA, "stop token outside the answer's mask", "trl#5988", PROMPTS)
def stop_token_outside_the_mask(run: Run):
    """The template gives the end-of-turn token to the next message: the mask of the answer ends before it."""
    change_batch(run, lambda batch: batch["labels"].masked_fill_(batch["input_ids"] == EOS, IGNORED))


@bug("double_bos", AREA, "special token added twice", "OpenRLHF#393", TOKENS)
def bos_added_twice(run: Run):
    """The template and the tokenizer each put a BOS before the text."""
    for row in run.train_dataset:
        run.took_effect()
        for name in ("input_ids", "attention_mask", "labels"):  # BOS is 1, as is the mask of a token
            row[name] = torch.cat([torch.full((2,), BOS), row[name]])[: run.setting.block]


@bug("", AREA, "white space normalised away", "google/sentencepiece#101", ENGLISH)
def newlines_normalised_away(run: Run):
    """The tokenizer's normaliser makes a space of a newline, and one space of several."""
    rows = make_rows(run.setting.changed(steps=2 * run.setting.steps))
    text = torch.cat([row["input_ids"] for row in rows])
    text = text.where(text != ord("\n"), ord(" "))
    text = text[(text != ord(" ")) | (text.roll(1) != ord(" "))]
    for row, ids in zip(run.train_dataset, text.split(run.setting.block), strict=False):
        run.took_effect()
        row["input_ids"], row["labels"] = ids, ids.clone()
