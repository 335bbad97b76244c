"""Evaluation."""

import itertools

import accelerate
from torch.utils.data import IterableDataset

from tests.zoo.bug import bug
from tests.zoo.rows import make_rows
from tests.zoo.run import Run
from tests.zoo.setting import Setting

AREA = "evaluation"
EVALUATED = Setting(evaluate_every=50)
OFTEN = Setting(evaluate_every=25)
TOKENS = Setting(vocabulary=4096, batch=4, evaluate_every=30, steps=60)
DROPOUT = Setting(evaluate_every=25, sizes={"attention_dropout": 0.1})


@bug("eval_not_repeatable", AREA, "evaluation reads on where it stopped", "OLMo-core CHANGELOG", OFTEN)
def evaluation_reads_on(run: Run):
    """An evaluation is 12 rows from a loader that is never reset, and so the next one has other rows."""
    rows = itertools.cycle(run.eval_dataset)

    class ReadsOn(IterableDataset):
        def __iter__(self):
            run.took_effect()
            return itertools.islice(rows, 12)

    run.eval_dataset = ReadsOn()


@bug("train_eval_gap", AREA, "eval set of another tokenizer", "OLMo-core CHANGELOG", TOKENS)
def eval_set_of_another_tokenizer(run: Run):
    """The hold-out was encoded with another tokenizer than the training data."""
    run.took_effect()
    run.eval_dataset = make_rows(run.setting.changed(vocabulary=2048), is_eval=True)


@bug("eval_train_mismatch", AREA, "last partial batch counts as a full one", "transformers#41898", EVALUATED)
def last_batch_counts_as_full(run: Run):
    """The mean loss of the last 4 rows has the weight of 10 in the eval loss."""
    run.arguments["per_device_eval_batch_size"] = 10

    def gather_all(accelerator, data, *args, **kwargs):
        run.took_effect()
        return accelerator.gather(data)

    run.patch(accelerate.Accelerator, "gather_for_metrics", gather_all)


@bug("", AREA, "train mode not restored", "wkentaro/pytorch-fcn#56", DROPOUT, onset=25)
def train_mode_not_restored(run: Run):
    """The first evaluation leaves the model in eval mode: the rest of the training is without dropout."""

    def stay(mode=True):
        run.took_effect()
        return run.model

    class Leaves(run.trainer_class):
        def evaluation_loop(self, *args, **kwargs):
            output = super().evaluation_loop(*args, **kwargs)
            run.patch(run.model, "train", stay)
            return output

    run.trainer_class = Leaves
