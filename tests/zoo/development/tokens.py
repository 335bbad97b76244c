"""Token ids, EOS and padding."""

import torch

from tests.zoo.bug import bug
from tests.zoo.development.labels import PADDED, change_batch
from tests.zoo.models import EOS, eos_of, make_model
from tests.zoo.rows import IGNORED, make_rows
from tests.zoo.run import Run
from tests.zoo.setting import Setting

AREA = "tokens"
DOCUMENTS = Setting(vocabulary=4096, block=256, batch=4)  # about one end of a document in each second row
SMALL_VOCABULARY = Setting(vocabulary=512)


@bug("eos_never_target", AREA, "pad token is EOS", "transformers#23530", DOCUMENTS)
def pad_is_eos(run: Run):
    """The pad token is EOS, and the collator masks every label that equals it."""
    eos = eos_of(run.setting.vocabulary)
    change_batch(run, lambda batch: batch["labels"].masked_fill_(batch["labels"] == eos, IGNORED))


@bug("eos_never_target", AREA, "no EOS between documents", "torchtitan#3279", DOCUMENTS)
def eos_never_added(run: Run):
    """Documents are packed one after another without EOS."""
    rows = make_rows(run.setting.changed(steps=run.setting.steps + 10))
    ids = torch.cat([row["input_ids"] for row in rows])
    ids = ids[ids != eos_of(run.setting.vocabulary)]
    blocks = ids[: run.setting.num_rows * run.setting.block].reshape(-1, run.setting.block)
    run.train_dataset = [{"input_ids": block, "labels": block.clone()} for block in blocks]
    run.took_effect()


@bug("token_out_of_range", AREA, "ids taken modulo the vocabulary", "mlfoundations/open_lm#77", SMALL_VOCABULARY)
def ids_modulo_vocabulary(run: Run):
    """The model has 480 embeddings for a tokenizer of 512; ids beyond them come round to others by a modulo."""
    run.model = make_model(run.setting.changed(vocabulary=480))
    run.model.config.eos_token_id = eos_of(run.setting.vocabulary)
    change_batch(run, lambda batch: batch.update({name: batch[name] % 480 for name in ("input_ids", "labels")}))


@bug("padding_is_target eos_never_target", AREA, "wrong id taken for padding", "open_clip PR #316", PADDED)
def wrong_pad_id(run: Run):
    """Labels are masked where they equal EOS, which is not what rows are padded with."""
    change_batch(run, lambda b: b.update(labels=b["input_ids"].masked_fill(b["input_ids"] == EOS, IGNORED)))
