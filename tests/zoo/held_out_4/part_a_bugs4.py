"""Bugs of data, tokens and accumulation that need no PEFT or TRL."""

import numpy as np
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback

from tests.zoo.bug import bug
from tests.zoo.models import EOS
from tests.zoo.setting import Setting

STEPS = 60
SGD = {"optim": "sgd", "learning_rate": 0.05, "weight_decay": 0.0, "max_grad_norm": 0.0}


class OwnLoss(Trainer):
    """Mean loss of the micro-batch's tokens: Trainer divides it by the number of micro-batches."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"])
        logits, targets = outputs.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
        loss = F.cross_entropy(logits.float(), targets)
        return (loss, outputs) if return_outputs else loss


def own_loss(run):
    run.trainer_class = OwnLoss


@bug(
    "repeated_data",
    "data",
    "rows are views of a buffer that is filled again",
    "seen in a reader that fills a preallocated array and does not copy (torch.from_numpy shares its memory)",
    Setting(steps=120),
)
def rows_share_a_buffer(run):
    """The reader fills a ring of 8 rows again and again and hands out views of it: all rows are the last 8."""
    buffer = np.empty((8, run.setting.block), dtype=np.int64)
    for place, row in enumerate(run.train_dataset):
        buffer[place % 8] = row["input_ids"].numpy()
        row["input_ids"] = row["labels"] = torch.from_numpy(buffer[place % 8])
        run.took_effect()


@bug(
    "token_out_of_range loss_below_envelope",
    "tokens",
    "ids are stored in a type that is too small",
    "huggingface/transformers#2825",
    Setting(vocabulary=1024, steps=STEPS),
)
def ids_cut_to_a_byte(run):
    """The tokenized corpus is stored as uint8, chosen for an older vocabulary: ids wrap around at 256."""
    for row in run.train_dataset:
        row["input_ids"] = row["labels"] = row["input_ids"].to(torch.uint8).long()
        run.took_effect()


@bug(
    "eos_never_target",
    "tokens",
    "special tokens are encoded as plain text",
    "huggingface/transformers#31362 (several ways to write the end token); split_special_tokens",
    Setting(text="templates", rows="padded", steps=150),
)
def eos_encoded_as_text(run):
    """`</s>` is encoded as its four characters, so that no row holds the end token's id."""
    text = torch.tensor(list(b"</s>"))
    for row in run.train_dataset:
        end = int(row["attention_mask"].sum()) - 1
        assert row["input_ids"][end] == EOS
        room = min(len(text), run.setting.block - end)
        for name in ("input_ids", "labels"):
            row[name][end : end + room] = text[:room]
        row["attention_mask"][end : end + room] = 1
        run.took_effect()


class ClearEachTime(TrainerCallback):
    def __init__(self, run):
        self.run = run

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        model.zero_grad()
        self.run.took_effect()


@bug(
    "accumulation_mismatch wrong_gradient",
    "accumulation",
    "gradients are cleared after each micro-batch",
    "bytetriper/RAE#67",
    Setting(batch=1, accumulation=8, steps=STEPS),
)
def gradients_cleared_each_micro_batch(run):
    """A hook frees memory after each micro-batch and clears the gradients: only the last micro-batch counts."""
    run.callbacks.append(ClearEachTime(run))


@bug(
    "accumulation_mismatch wrong_gradient loss_off_reference",
    "accumulation",
    "an own loss is not divided by the number of micro-batches",
    "MakazhanAlpamys/Soup#720",
    Setting(batch=2, accumulation=4, steps=STEPS, arguments=SGD, change=own_loss),
)
def own_loss_undivided(run):
    """An own loss takes `num_items_in_batch` and ignores it, so that nothing divides by the micro-batches."""

    class Undivided(OwnLoss):
        loss_is_scaled_for_ga = None

        def compute_loss(self, *args, **kwargs):
            run.took_effect()
            return super().compute_loss(*args, **kwargs)

    run.trainer_class = Undivided
