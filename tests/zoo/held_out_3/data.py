"""Data."""

from itertools import cycle

import torch
from torch.utils.data import Sampler

from tests.zoo.bug import bug
from tests.zoo.rows import RowStream
from tests.zoo.run import Run
from tests.zoo.setting import Setting

AREA = "data"
ENGLISH = Setting()
STREAM = Setting(stream=True)
RESUMED_EVALUATED = Setting(save_at=40, steps=80, evaluate_every=20)


@bug(
    "train_eval_overlap resume_replay",
    AREA,
    "hold-out drawn anew at each start",
    "sleap-nn PR #600",
    RESUMED_EVALUATED,
    onset=40,
)
def hold_out_drawn_anew_on_resume(run: Run):
    """The hold-out is drawn without a seed: the resumed run evaluates on rows that were trained on before."""
    rows, held_out = run.train_dataset + run.eval_dataset, len(run.eval_dataset)
    generator = torch.Generator().manual_seed(1000 + run.is_resumed)  # stands for the clock
    order = torch.randperm(len(rows), generator=generator).tolist()
    run.eval_dataset = [rows[index] for index in order[:held_out]]
    run.train_dataset = [rows[index] for index in order[held_out:]]
    run.took_effect()


@bug("repeated_data", AREA, "shuffled anew for each batch", "sd_dreambooth_extension PR #1058", ENGLISH, onset=1)
def shuffled_for_each_batch(run: Run):
    """The sampler shuffles all rows whenever it is asked for a batch: some rows come several times, others never."""

    class BatchwiseShuffled(Sampler):
        def __iter__(self):
            generator = torch.Generator().manual_seed(run.setting.seed)
            for _ in range(len(self) // run.setting.batch):
                run.took_effect()
                yield from torch.randperm(len(self), generator=generator)[: run.setting.batch].tolist()

        def __len__(self):
            return len(run.train_dataset)

    class Shuffling(run.trainer_class):
        def _get_train_sampler(self, train_dataset=None):
            return BatchwiseShuffled()

    run.trainer_class = Shuffling


@bug("repeated_data", AREA, "small source of a mixture starts over", "ALMA#63", STREAM, onset=25)
def small_source_starts_over(run: Run):
    """Two sources are interleaved until the larger one ends: the smaller one, a quarter its size, is read 4 times."""
    small, large = run.train_dataset.rows[:100], run.train_dataset.rows[100:500]

    class Interleaved(RowStream):
        def __iter__(self):
            for row, again in zip(self.rows, cycle(small), strict=False):
                run.took_effect()
                yield row
                yield again

    run.train_dataset = Interleaved(large)
