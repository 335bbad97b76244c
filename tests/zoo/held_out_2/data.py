"""Data."""

import torch

from tests.zoo.bug import bug
from tests.zoo.rows import RowStream, make_rows
from tests.zoo.run import Run
from tests.zoo.setting import Setting

AREA = "data"
ENGLISH = Setting()
STREAM = Setting(stream=True)


@bug("repeated_data", AREA, "windows overlap", "rasbt/LLMs-from-scratch#46", ENGLISH)
def windows_overlap_by_half(run: Run):
    """Rows are windows at a stride of half a block: every token is in two rows."""
    text = torch.cat([row["input_ids"] for row in run.train_dataset])
    stride = run.setting.block // 2
    for number, row in enumerate(run.train_dataset):
        run.took_effect()
        window = text[number * stride :][: run.setting.block]
        row.update(input_ids=window.clone(), labels=window.clone())


@bug("loss_off_reference", AREA, "sources one after another", "LlamaFactory#2856", STREAM, onset=50)
def sources_not_mixed(run: Run):
    """A stream of English and of code is not mixed: after step 50 there is only code."""
    run.took_effect()
    half = len(run.train_dataset.rows) // 2
    run.train_dataset = RowStream(run.train_dataset.rows[:half] + make_rows(run.setting.changed(text="code"))[:half])
