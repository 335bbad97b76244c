"""Optimizer, schedule and precision."""

import math

from torch.optim.lr_scheduler import LambdaLR

from tests.zoo.bug import bug
from tests.zoo.run import Run
from tests.zoo.setting import Setting

ENGLISH = Setting()
LOSS_SCALE = 2.0**16  # the one that torch's GradScaler begins with


@bug("learning_rate_off", "optimizer and schedule", "cosine's length is the warm-up's", "imagen-pytorch#71", ENGLISH)
def cosine_as_long_as_the_warmup(run: Run):
    """The cosine is given the warm-up's steps for its length, and so it rises again, and falls, until the end."""

    class Swings(run.trainer_class):
        def create_scheduler(self, num_training_steps, optimizer=None):
            length = self.args.warmup_steps

            def share(step):
                run.took_effect()
                return min(1.0, (step + 1) / self.args.warmup_steps) * (1 + math.cos(math.pi * step / length)) / 2

            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, share)
            return self.lr_scheduler

    run.trainer_class = Swings


@bug(
    "grad_norm_off lost_updates wrong_gradient accumulation_mismatch",
    "precision",
    "unscaled twice",
    "THUDM/slime PR #1842",
    ENGLISH,
)
def gradients_unscaled_twice(run: Run):
    """Gradients are divided by the loss scale a second time, before they are clipped."""

    class Twice(run.trainer_class):
        def _clip_grad_norm(self, model):
            run.took_effect()
            for parameter in model.parameters():  # the first division has undone the scaling, to the bit
                parameter.grad /= LOSS_SCALE
            return super()._clip_grad_norm(model)

    run.trainer_class = Twice
