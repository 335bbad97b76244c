"""Several ranks."""

import torch

from tests.zoo.bug import bug
from tests.zoo.run import Run
from tests.zoo.setting import Setting

AREA = "ranks"
UNUSED = Setting(ranks=2, batch=2, accumulation=2, arguments={"ddp_find_unused_parameters": True})
PADDED_RANKS = Setting(ranks=2, batch=2, rows="padded")


@bug("rank_divergence", AREA, "unused in the last micro-batch, not synchronised", "pytorch#69031", UNUSED)
def dropped_layer_not_synchronised(run: Run):
    """An MLP is dropped at random; where the last micro-batch drops it, its gradients stay each rank's own."""
    generator = torch.Generator().manual_seed(0)  # the same on all ranks
    mlp, is_dropped = run.model.model.layers[1].mlp, False

    class Drops(run.trainer_class):
        def training_step(self, *args, **kwargs):
            nonlocal is_dropped
            own = {p: p.grad.clone() for p in mlp.parameters() if p.grad is not None}
            is_dropped = bool(torch.rand((), generator=generator) < 0.2)
            loss = super().training_step(*args, **kwargs)
            if is_dropped and self.accelerator.sync_gradients:  # as before PyTorch took note of unsynchronised passes
                for parameter, grad in own.items():
                    parameter.grad.copy_(grad)
            is_dropped = False
            return loss

    def drop(module, inputs, output):
        if is_dropped:
            run.took_effect()
            return torch.zeros_like(output)

    run.trainer_class = Drops
    mlp.register_forward_hook(drop)


@bug("accumulation_mismatch", AREA, "means of ranks averaged", "torchtitan#1842", PADDED_RANKS)
def means_of_ranks_averaged(run: Run):
    """Each rank divides by its own tokens before the ranks' gradients are averaged: tokens weigh unequally."""
    run.took_effect()
    run.arguments["average_tokens_across_devices"] = False
