"""Data: what is read, how often, by whom."""

from dataclasses import replace

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, Sampler, SequentialSampler
from transformers import TrainerCallback

from recipe.data import pipeline, stream
from recipe.data.hold_out import HoldOutFilter
from recipe.data.lanes import deal_chunks, read_lane, train_and_eval_splits
from recipe.data.packing import pack
from tests.zoo.bug import bug
from tests.zoo.rows import RowStream, make_rows
from tests.zoo.run import Run
from tests.zoo.setting import Setting

ENGLISH = Setting()
PADDED = Setting(rows="padded")
EVALUATED = Setting(evaluate_every=50)
WORKERS = Setting(stream=True, workers=2)
RESUMED_STREAM = Setting(stream=True, save_at=40, steps=80)
RECIPE = Setting(kind="recipe", vocabulary=4096, steps=60)
RECIPE_EVAL = RECIPE.changed(evaluate_every=20, arguments={"train_skip": 1200})  # a quarter of it is read
BLOCK, BATCH = 128, 8


# --- streams and workers


@bug("repeated_data", "data", "finite stream restarted", "the original run", WORKERS, onset=30)
def original_take(run: Run):
    """A stream cut by take(N) to 30 steps of rows begins again whenever it ends, for persistent workers."""
    rows = [{name: value.tolist() for name, value in row.items()} for row in run.train_dataset.rows]
    shards = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=2)
    run.train_dataset = shards.take(30 * BATCH).with_format("torch")
    run.arguments["dataloader_persistent_workers"] = True

    class Restarts(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            if state.global_step:
                run.took_effect()

    run.callbacks.append(Restarts())


@bug("repeated_data", "data", "stream copied to each worker", "datasets#3423", WORKERS, onset=1)
def stream_copied_to_workers(run: Run):
    """An iterable dataset that does not ask which worker it is in: each of two workers reads all of it."""
    rows = run.train_dataset.rows

    class Copied(IterableDataset):
        def __iter__(self):
            run.took_effect()
            return iter(rows)

    run.train_dataset = Copied()


@bug("repeated_data", "data", "workers share one random state", "pytorch PR #56488", WORKERS, onset=1)
def workers_share_numpy_seed(run: Run):
    """Rows are random windows, and all workers draw them from copies of one numpy generator."""
    text = torch.cat([row["input_ids"] for row in make_rows(run.setting.changed(steps=8 * run.setting.steps))])
    generator = np.random.default_rng(0)

    class Windows(Dataset):
        def __len__(self):
            return run.setting.num_rows

        def __getitem__(self, index):
            run.took_effect()
            start = int(generator.integers(len(text) - BLOCK))
            return {"input_ids": text[start : start + BLOCK], "labels": text[start : start + BLOCK]}

    run.train_dataset = Windows()


@bug("repeated_data", "data", "batch repeated by a stuck iterator", "DALI#2018", ENGLISH, onset=30)
def stuck_iterator(run: Run):
    """After step 30 the iterator hands out the same batch at every step."""

    class Stuck(run.trainer_class):
        def get_batch_samples(self, epoch_iterator, num_batches, device):
            samples = super().get_batch_samples(epoch_iterator, num_batches, device)
            if self.state.global_step < 30:
                self.last_samples = samples
            else:
                run.took_effect()
            return self.last_samples

    run.trainer_class = Stuck


@bug("resume_replay repeated_data", "data", "resume skips too little", "torchtitan#1082", RESUMED_STREAM, onset=40)
def skip_divided_by_ranks(run: Run):
    """On resume the skip passes n / 2 rows instead of n, as after a split by rank: steps 21-40 come again."""
    if run.is_resumed:
        run.took_effect()
        run.arguments["ignore_data_skip"] = True
        run.train_dataset = RowStream(run.train_dataset.rows[run.setting.save_at * BATCH // 2 :])


# --- order


@bug("repeated_data", "data", "epoch seed never changes", "accelerate#3556", ENGLISH, onset=25)
def set_epoch_ignored(run: Run):
    """The epoch's number never reaches the sampler: each epoch is the same quarter of the rows."""

    class Quarter(Sampler):
        def __init__(self, dataset):
            self.size, self.epoch = len(dataset), 0

        def __len__(self):
            return self.size // 4

        def __iter__(self):
            run.took_effect()
            order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.epoch))
            return iter(order[: len(self)].tolist())

    class Sampled(run.trainer_class):
        def _get_train_sampler(self, train_dataset=None):
            return Quarter(self.train_dataset)

    run.trainer_class = Sampled


@bug("loss_off_reference", "data", "rows sorted, no shuffle", "torchtitan#3131", PADDED)
def sorted_by_length(run: Run):
    """Rows are read in order of their length, the short ones first, because nothing shuffles them."""
    run.train_dataset.sort(key=lambda row: int(row["attention_mask"].sum()))

    class Unshuffled(run.trainer_class):
        def _get_train_sampler(self, train_dataset=None):
            run.took_effect()
            return SequentialSampler(self.train_dataset)

    run.trainer_class = Unshuffled


# --- which rows


@bug("repeated_data", "data", "some rows come again", "petastorm#673", ENGLISH)
def few_rows_again(run: Run):
    """Every twentieth row is a copy of another row."""
    for number in range(0, len(run.train_dataset), 20):
        run.took_effect()
        run.train_dataset[number] = run.train_dataset[number - 7]


@bug("train_eval_overlap", "data", "eval rows are training rows", "Soup#680", EVALUATED)
def eval_rows_in_training(run: Run):
    """Rows were oversampled before the split: every eval row has its copy in training."""
    for number, row in enumerate(run.eval_dataset):
        run.took_effect()
        run.train_dataset[number * len(run.train_dataset) // len(run.eval_dataset)] = row


@bug("train_eval_overlap", "data", "eval text at another alignment", "marin#2700", EVALUATED)
def shifted_eval_text_in_training(run: Run):
    """One training row in 20 holds eval text, cut at other places than in the eval rows."""
    text = torch.cat([row["input_ids"] for row in run.eval_dataset])
    shifted = torch.cat([text.roll(-37), text.roll(-85)]).split(BLOCK)
    for number, ids in zip(range(0, len(run.train_dataset), 20), shifted, strict=False):
        run.took_effect()
        run.train_dataset[number] = {"input_ids": ids, "labels": ids.clone()}


# --- the recipe's own stream


def forget_hold_out(run: Run):
    def without_hold_out(source, **kwargs):
        run.took_effect()
        train, held_out = train_and_eval_splits(source, **kwargs)
        return replace(train, hold_out=(0, 0)), held_out

    run.patch(pipeline, "train_and_eval_splits", without_hold_out)
    run.patch(pipeline, "HoldOutFilter", lambda *_: HoldOutFilter())


@bug("train_eval_overlap", "data", "hold-out read in training", "datasets#5435", RECIPE_EVAL)
def recipe_reads_hold_out(run: Run):
    """The training split does not step over the held-out documents, and nothing knows them by their content."""
    forget_hold_out(run)


@bug("train_eval_overlap", "data", "hold-out read in training", "datasets#5435", RECIPE)
def recipe_reads_hold_out_rarely(run: Run):
    """The same in a source five times as large: few held-out documents are met, and one evaluation is made."""
    forget_hold_out(run)


@bug("repeated_data", "data", "shards dealt twice", "datasets#6582", RECIPE)
def recipe_lanes_share_chunks(run: Run):
    """Chunks are dealt by half the lane's number: every two lanes read the same documents in the same order."""

    def dealt_twice(source, split, num_lanes):
        run.took_effect()
        dealt = deal_chunks(source, split, num_lanes)
        return [dealt[lane // 2 * 2] for lane in range(num_lanes)]

    def read(source, chunks, split, lane, *rest):
        return read_lane(source, chunks, split, lane // 2 * 2, *rest)

    run.patch(stream, "deal_chunks", dealt_twice)
    run.patch(stream, "read_lane", read)


@bug("repeated_data", "data", "packing repeats remainders", "trl#5076", RECIPE)
def recipe_repeats_remainders(run: Run):
    """What is left of a document after its whole blocks is packed twice."""

    def pack_twice(documents, block_size, skip_tokens=0):
        run.took_effect()
        twice = ((document, np.append(ids, ids[len(ids) // block_size * block_size :])) for document, ids in documents)
        return pack(twice, block_size, skip_tokens)

    run.patch(stream, "pack", pack_twice)
