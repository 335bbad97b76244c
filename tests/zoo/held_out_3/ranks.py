"""Several ranks."""

import torch

from tests.zoo.bug import bug
from tests.zoo.run import Run
from tests.zoo.setting import Setting

AREA = "ranks"


def wait_for_the_checkpoint(run: Run):
    """No rank goes on to resume before the first has written all of the checkpoint."""
    run.on_checkpoint.append(lambda path: torch.distributed.barrier())


EVALUATED = Setting(ranks=2, batch=4, steps=80, evaluate_every=20)
RESUMED = Setting(ranks=2, batch=4, save_at=40, steps=80, change=wait_for_the_checkpoint)


@bug("train_eval_overlap repeated_data", AREA, "each rank splits by its own seed", "OpenTau PR #498", EVALUATED)
def each_rank_splits_by_its_own_seed(run: Run):
    """The hold-out is drawn by the rank's own seed: each rank evaluates on what the other trains on."""
    rows, held_out = run.train_dataset + run.eval_dataset, len(run.eval_dataset)
    generator = torch.Generator().manual_seed(run.setting.seed + 12345 * run.rank)
    order = torch.randperm(len(rows), generator=generator).tolist()
    run.eval_dataset = [rows[index] for index in order[:held_out]]
    run.train_dataset = [rows[index] for index in order[held_out:]]
    run.took_effect()


@bug(
    "rank_divergence resume_jump",
    AREA,
    "optimizer state loaded on rank 0 only",
    "speculators PR #926",
    RESUMED,
    onset=40,
)
def optimizer_state_on_rank_0_only(run: Run):
    """Only rank 0 loads the optimizer's state: weights are broadcast when DDP wraps them, Adam's moments are not."""

    class LoadedOnRank0(run.trainer_class):
        def _load_optimizer_and_scheduler(self, checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint and run.rank:
                self.optimizer.state.clear()
                run.took_effect()

    run.trainer_class = LoadedOnRank0
