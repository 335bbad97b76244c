"""Tokens."""

import torch

from tests.zoo.bug import bug
from tests.zoo.models import EOS
from tests.zoo.run import Run
from tests.zoo.setting import Setting

PADDED = Setting(rows="padded")
SPELLED = torch.tensor(list(b"<|endoftext|>"))


@bug("eos_never_target", "tokens", "EOS spelled in ordinary tokens", "DeepSpeedExamples PR #819", PADDED)
def end_of_text_spelled_out(run: Run):
    """The tokenizer does not know the string `<|endoftext|>` and spells it: no text ends with EOS."""
    for row in [*run.train_dataset, *run.eval_dataset]:
        end = int(row["attention_mask"].sum()) - 1
        assert row["input_ids"][end] == EOS
        run.took_effect()
        spelled = SPELLED[: len(row["input_ids"]) - end]
        for name, values in (("input_ids", spelled), ("labels", spelled), ("attention_mask", 1)):
            row[name][end : end + len(spelled)] = values
