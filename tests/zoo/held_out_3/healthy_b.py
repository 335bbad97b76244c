"""Runs without a bug that no threshold was chosen on: any warning or error on one of them is a false alarm."""

import torch
from transformers import default_data_collator

from tests.zoo.rows import make_rows
from tests.zoo.run import Run
from tests.zoo.setting import Setting

PREFIX, SUFFIX, MIDDLE = 1, 2, 3  # bytes that no text has
SHORT = Setting(steps=60)


def rows_grow(run: Run):
    """A warm-up of the length: rows are cut to 32 tokens at first, and to 32 more after every 10 batches."""
    calls = 0

    def collate(rows):
        nonlocal calls
        length = min(run.setting.block, 32 * (1 + calls // 10))
        calls += 1
        return {name: value[:, :length] for name, value in default_data_collator(rows).items()}

    run.collator = collate


def fill_in_the_middle(run: Run):
    """Half of the training rows are prefix, suffix and then the middle, each behind a token of its own."""
    generator = torch.Generator().manual_seed(run.setting.seed)

    def rearranged(row):
        ids = row["input_ids"][:-3]
        first, second = sorted(torch.randint(1, len(ids), (2,), generator=generator).tolist())
        pieces = ((PREFIX, ids[:first]), (SUFFIX, ids[second:]), (MIDDLE, ids[first:second]))
        changed = torch.cat([torch.cat([torch.tensor([token]), piece]) for token, piece in pieces])
        return {"input_ids": changed, "labels": changed.clone()}

    chosen = torch.rand(len(run.train_dataset), generator=generator) < 0.5
    pairs = zip(run.train_dataset, chosen, strict=True)
    run.train_dataset = [rearranged(row) if is_chosen else row for row, is_chosen in pairs]


def two_hold_outs(run: Run):
    """Evaluated on two sets by name, one of them of another language."""
    german = make_rows(run.setting.changed(text="german"), is_eval=True)
    run.eval_dataset = {"english": run.eval_dataset, "german": german}


def wait_for_the_checkpoint(run: Run):
    """No rank goes on to resume before the first has written all of the checkpoint."""
    run.on_checkpoint.append(lambda path: torch.distributed.barrier())


HEALTHY = {
    "rows that grow from 32 to 128 tokens": SHORT.changed(change=rows_grow),
    "fill in the middle, source code, evaluated": SHORT.changed(
        text="code", change=fill_in_the_middle, evaluate_every=20
    ),
    "two hold-outs by name, English and German": SHORT.changed(change=two_hold_outs, evaluate_every=15),
    "best checkpoint loaded at the end": SHORT.changed(
        evaluate_every=15, arguments={"save_strategy": "steps", "save_steps": 15, "load_best_model_at_end": True}
    ),
    "2 ranks, resumed, evaluated": SHORT.changed(
        ranks=2, batch=4, save_at=30, evaluate_every=20, change=wait_for_the_checkpoint
    ),
}
