"""Checkpoint and resume."""

import torch
from torch.utils.data import Sampler

from tests.zoo.bug import bug
from tests.zoo.run import Run
from tests.zoo.setting import Setting

AREA = "checkpoint and resume"
RESUMED = Setting(save_at=40, steps=80)


@bug("resume_replay repeated_data", AREA, "skips in another permutation", "transgenic#59", RESUMED, onset=40)
def skips_in_another_permutation(run: Run):
    """A resumed pass is shuffled by the generator's state in mid-pass: what it skips is not what was trained on."""
    if not run.is_resumed:
        return

    class Permuted(Sampler):
        def __iter__(self):
            run.took_effect()
            generator = torch.Generator().manual_seed(4711)  # of no relation to the first permutation
            return iter(torch.randperm(len(self), generator=generator).tolist())

        def __len__(self):
            return len(run.train_dataset)

    class Shuffling(run.trainer_class):
        def _get_train_sampler(self, train_dataset=None):
            return Permuted()

    run.trainer_class = Shuffling


@bug("resume_jump", AREA, "buffers that are not saved stay empty", "transformers#34234", RESUMED, onset=40)
def rotary_frequencies_left_empty(run: Run):
    """The resumed model is made on the meta device: its rotary frequencies, in no checkpoint, are empty memory."""
    if run.is_resumed:
        rotary = run.model.model.rotary_emb
        for name in ("inv_freq", "original_inv_freq"):
            setattr(rotary, name, torch.zeros_like(rotary.inv_freq))
        run.took_effect()
