"""Labels and loss."""

import torch

from tests.zoo.bug import bug
from tests.zoo.rows import IGNORED
from tests.zoo.run import Run
from tests.zoo.setting import Setting

AREA = "labels and loss"


def padded_on_the_left(run: Run):
    """The rows end together, as with a tokenizer whose `padding_side` is left; labels and mask go along."""
    for row in [*run.train_dataset, *run.eval_dataset]:
        padding = len(row["input_ids"]) - int(row["attention_mask"].sum())
        for name, values in row.items():
            row[name] = values.roll(padding)


PROMPTS = Setting(rows="prompts")
LEFT = PROMPTS.changed(change=padded_on_the_left)


@bug("wrong_loss_target padding_is_target", AREA, "token 0 for ignored positions", "llama-cookbook#101", PROMPTS)
def zero_marks_what_is_not_scored(run: Run):
    """Prompt and padding are labelled 0 instead of -100, and so the model is taught to say token 0 there."""
    for row in [*run.train_dataset, *run.eval_dataset]:
        run.took_effect()
        row["labels"] = row["labels"].masked_fill(row["labels"] == IGNORED, 0)


@bug("wrong_loss_target eos_never_target", AREA, "answer's mask not moved by left padding", "Automodel PR #2314", LEFT)
def mask_of_the_row_before_padding(run: Run):
    """The answer's place is that in the row before it was padded on the left: its end and many rows go unscored."""
    for row in [*run.train_dataset, *run.eval_dataset]:
        run.took_effect()
        length, place = int(row["attention_mask"].sum()), torch.arange(len(row["input_ids"]))
        is_answer = (place >= length // 3) & (place < length) & row["attention_mask"].bool()
        row["labels"] = row["input_ids"].masked_fill(~is_answer, IGNORED)
