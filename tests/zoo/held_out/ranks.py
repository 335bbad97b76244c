"""Several ranks."""

from accelerate.data_loader import SeedableRandomSampler
from torch import nn
from transformers import TrainerCallback

from tests.zoo.bug import bug
from tests.zoo.run import Run
from tests.zoo.setting import Setting

AREA = "ranks"
RANKS = Setting(ranks=2, batch=4)


@bug("repeated_data", AREA, "ranks shuffle by their own seeds", "accelerate#2694", RANKS)
def samplers_out_of_step(run: Run):
    """Each rank shuffles by a seed of its own and takes its half: some rows are read by both ranks, some by none."""
    iterate = SeedableRandomSampler.__iter__

    def iterate_by_rank(sampler):
        run.took_effect()
        sampler.initial_seed = run.setting.seed + run.rank
        return iterate(sampler)

    run.patch(SeedableRandomSampler, "__iter__", iterate_by_rank)


@bug("rank_divergence", AREA, "parameter replaced after wrapping", "pytorch#12603", RANKS)
def parameter_replaced_after_wrapping(run: Run):
    """One weight is replaced after DDP has taken the parameters: its gradient is not averaged over the ranks."""

    class Replaces(TrainerCallback):
        def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
            run.took_effect()
            projection = model.model.layers[1].mlp.up_proj
            old, projection.weight = projection.weight, nn.Parameter(projection.weight.detach().clone())
            for group in optimizer.param_groups:
                group["params"] = [projection.weight if value is old else value for value in group["params"]]

    run.callbacks.append(Replaces())


@bug("rank_divergence learning_rate_off", AREA, "rate follows the rank's own loss", "disruptcnn#3", RANKS, onset=50)
def plateau_of_one_rank(run: Run):
    """The rate is cut where the rank's own loss has come to a plateau: after step 50, on rank 1 alone, to a tenth."""

    class Plateau(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
            if state.global_step >= 50 and run.rank == 1:
                run.took_effect()
                for group in optimizer.param_groups:
                    group["lr"] *= 0.1

    run.callbacks.append(Plateau())
