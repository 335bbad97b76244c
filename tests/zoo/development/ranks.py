"""Several ranks: two gloo processes."""

import torch
from torch import distributed
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from tests.zoo.bug import bug
from tests.zoo.models import make_model
from tests.zoo.run import Run
from tests.zoo.setting import Setting

RANKS = Setting(ranks=2, steps=60)
STREAM = RANKS.changed(stream=True)


@bug("repeated_data", "ranks", "ranks read the same data", "transformers PR #11254", STREAM)
def ranks_read_the_same(run: Run):
    """The stream is not dealt to ranks: both read all of it."""

    class Unshared(run.trainer_class):
        def get_train_dataloader(self):
            run.took_effect()
            return DataLoader(self.train_dataset, self.args.train_batch_size, collate_fn=self.data_collator)

    run.trainer_class = Unshared


@bug("rank_divergence", "ranks", "gradients not synchronised", "lingua d1fd421", RANKS)
def gradients_not_synchronised(run: Run):
    """Every backward pass runs under no_sync, the last micro-batch's too: each rank trains alone."""

    class Unsynchronised(run.trainer_class):
        def training_step(self, model, *args, **kwargs):
            run.took_effect()
            with model.no_sync():
                return super().training_step(model, *args, **kwargs)

    run.trainer_class = Unsynchronised


@bug("rank_divergence", "ranks", "clipped by the local norm", "nanochat dev/LOG.md", RANKS)
def clipped_by_local_norm(run: Run):
    """The norm is taken before gradients are synchronised: each rank scales the shared gradient by its own norm."""

    class LocalNorm(run.trainer_class):
        def training_step(self, model, *args, **kwargs):
            with model.no_sync():
                return super().training_step(model, *args, **kwargs)

        def _clip_grad_norm(self, model):
            run.took_effect()
            gradients = [parameter.grad for parameter in model.parameters()]
            norm = torch.nn.utils.get_total_norm(gradients)
            for gradient in gradients:
                distributed.all_reduce(gradient)
                gradient *= min(1.0, self.args.max_grad_norm / float(norm)) / run.setting.ranks
            return norm

    run.trainer_class = LocalNorm


@bug("rank_divergence", "ranks", "ranks begin apart", "OLMo-core#319", RANKS)
def rank_initialised_differently(run: Run):
    """Rank 1 begins from weights of another seed, after the broadcast that would have made them equal."""

    class Initialises(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            if run.rank == 1:
                run.took_effect()
                model.load_state_dict(make_model(run.setting.changed(seed=1)).state_dict())

    run.callbacks.append(Initialises())


@bug("accumulation_mismatch", "ranks", "loss divided by ranks", "transformers#37474", RANKS)
def divided_by_ranks_twice(run: Run):
    """The loss is divided by the number of ranks, and the gradients are averaged over them besides."""

    class Divided(run.trainer_class):
        def compute_loss(self, *args, **kwargs):
            run.took_effect()
            return super().compute_loss(*args, **kwargs) / run.setting.ranks

    run.trainer_class = Divided
