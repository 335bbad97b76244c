"""Gradient accumulation."""

from torch import nn

from tests.zoo.bug import bug
from tests.zoo.run import Run
from tests.zoo.setting import Setting

AREA = "accumulation"
ACCUMULATED = Setting(rows="padded", batch=2, accumulation=4)


@bug("accumulation_mismatch", AREA, "clipping inside the window", "lingua 5455bbc", ACCUMULATED)
def clipped_inside_the_window(run: Run):
    """What has been accumulated is clipped after every micro-batch, not at the end of the window."""

    class Clips(run.trainer_class):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, inputs, num_items_in_batch)
            run.took_effect()
            nn.utils.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
            return loss

    run.trainer_class = Clips


@bug("accumulation_mismatch", AREA, "what is accumulated is scaled again", "torchtitan#1732", ACCUMULATED)
def sum_scaled_with_each_micro_batch(run: Run):
    """After every micro-batch the whole sum is divided by their number: the last counts 64 times the first."""

    class Scales(run.trainer_class):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, inputs, num_items_in_batch)
            run.took_effect()
            for parameter in model.parameters():
                parameter.grad.div_(self.args.gradient_accumulation_steps)
            return loss

    run.trainer_class = Scales
