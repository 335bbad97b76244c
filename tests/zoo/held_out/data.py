"""Data."""

from dataclasses import replace

import torch

from recipe.data import stream
from tests.zoo.bug import bug
from tests.zoo.rows import RowStream
from tests.zoo.run import Run
from tests.zoo.setting import Setting

AREA = "data"
ENGLISH = Setting()
WORKERS = Setting(stream=True, workers=2)
RECIPE = Setting(kind="recipe", vocabulary=4096, steps=60)
BOS = 1


@bug("eos_never_target token_out_of_range", AREA, "ids stored in too narrow a type", "knnlm#6", ENGLISH)
def ids_stored_in_a_byte(run: Run):
    """Ids are stored in uint8, into which 256 does not fit: every EOS becomes 0."""
    for row in run.train_dataset:
        run.took_effect()
        for name, ids in row.items():
            row[name] = ids.to(torch.uint8).long()


@bug("padding_is_target", AREA, "token files end in filling", "TinyLlama#83", ENGLISH)
def file_tails_filled_with_bos(run: Run):
    """Files of 100 rows are made at full length beforehand: the last 5 and a half rows of each hold BOS alone."""
    for last in range(99, len(run.train_dataset), 100):
        for row in run.train_dataset[last - 4 : last + 1]:
            run.took_effect()
            row["input_ids"].fill_(BOS), row["labels"].fill_(BOS)
        partly = run.train_dataset[last - 5]
        partly["input_ids"][64:] = partly["labels"][64:] = BOS


@bug("repeated_data", AREA, "rows of a batch share a buffer", "AtacWorks#207", WORKERS)
def one_buffer_for_a_batch(run: Run):
    """The stream fills one buffer again and again: all rows of a batch are the last one."""

    class Reused(RowStream):
        def __iter__(self):
            buffer = {name: torch.empty_like(value) for name, value in self.rows[0].items()}
            for row in super().__iter__():
                run.took_effect()
                for name, value in row.items():
                    buffer[name].copy_(value)
                yield buffer

    run.train_dataset = Reused(run.train_dataset.rows)


@bug("repeated_data", AREA, "a file is listed twice", "datasets#3309", ENGLISH)
def one_file_listed_twice(run: Run):
    """One file of ten matches two patterns and is read twice; its second copy is cut at other places."""
    text = torch.cat([row["input_ids"] for row in run.train_dataset])
    file = text[: len(text) // 10 + 37]
    twice = torch.cat([file, text])[: len(text)].split(run.setting.block)
    for row, ids in zip(run.train_dataset, twice, strict=True):
        run.took_effect()
        row.update(input_ids=ids.clone(), labels=ids.clone())


@bug("eos_never_target", AREA, "another token between documents", "LLaMA-Factory 77bf3d66c", RECIPE)
def recipe_separates_by_another_token(run: Run):
    """Documents end with `<s>`, where the model is to be stopped by `</s>`."""
    tokenize = stream.tokenize

    def tokenize_otherwise(documents, tokenizer, source_name=""):
        for document, ids in tokenize(documents, tokenizer, source_name):
            run.took_effect()
            ids[-1] = BOS
            yield document, ids

    run.patch(stream, "tokenize", tokenize_otherwise)


@bug("repeated_data", AREA, "most of the source is lost", "datasets#8044", RECIPE)
def recipe_loses_most_shards(run: Run):
    """Of 32 row groups one is kept, so that lanes go through their few documents again and again."""
    deal_chunks = stream.deal_chunks

    def deal_few(source, split, num_lanes):
        if num_lanes == 1:  # the hold-out
            return deal_chunks(source, split, num_lanes)
        run.took_effect()
        return deal_chunks(replace(source, chunks=source.chunks[::32]), split, num_lanes)

    run.patch(stream, "deal_chunks", deal_few)
