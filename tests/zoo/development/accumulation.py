"""Gradient accumulation."""

import accelerate
from transformers import TrainerCallback

from tests.zoo.bug import bug
from tests.zoo.run import Run
from tests.zoo.setting import Setting

ACCUMULATED = Setting(rows="padded", batch=2, accumulation=4)
PASSES = ACCUMULATED.changed(passes=9)  # 89 rows a pass: windows of 4 micro-batches, the 12th of one row


@bug("accumulation_mismatch", "accumulation", "means of micro-batches averaged", "trl#2175", ACCUMULATED)
def micro_batch_means_averaged(run: Run):
    """Each micro-batch's mean counts the same however many tokens it has."""

    class Averages(run.trainer_class):
        def get_batch_samples(self, *args):
            run.took_effect()
            return super().get_batch_samples(*args)[0], None

    run.trainer_class = Averages


@bug("accumulation_mismatch", "accumulation", "not divided by the micro-batches", "nanoGPT#206", ACCUMULATED)
def loss_not_divided(run: Run):
    """The loss is not divided by the number of micro-batches, except in the log: gradients are 4 times too large."""

    class Undivided(run.trainer_class):
        def training_step(self, model, inputs, num_items_in_batch=None):
            run.took_effect()
            parts = self.current_gradient_accumulation_steps
            return super().training_step(model, inputs, num_items_in_batch / parts) / parts

    run.trainer_class = Undivided


@bug("accumulation_mismatch", "accumulation", "divided twice", "transformers#35808", ACCUMULATED)
def loss_divided_twice(run: Run):
    """The loss is a share of the whole window's already and `backward` divides it by the micro-batches once more."""
    backward = accelerate.Accelerator.backward

    def divided(self, loss, **kwargs):
        run.took_effect()
        return backward(self, loss / run.setting.accumulation, **kwargs)

    run.patch(accelerate.Accelerator, "backward", divided)


@bug("accumulation_mismatch", "accumulation", "zero_grad inside the window", "RAE#67", ACCUMULATED)
def only_the_last_micro_batch_counts(run: Run):
    """`zero_grad` is called before each micro-batch, so that a step has the last one's gradient only."""

    class Forgets(run.trainer_class):
        def training_step(self, model, *args, **kwargs):
            run.took_effect()
            model.zero_grad()
            return super().training_step(model, *args, **kwargs)

    run.trainer_class = Forgets


@bug("accumulation_mismatch", "accumulation", "optimizer step each micro-batch", "litgpt#1947", ACCUMULATED)
def step_with_each_micro_batch(run: Run):
    """Accumulation is ignored: the optimizer steps after every micro-batch, and one step is counted of four."""

    class Step(TrainerCallback):
        def on_substep_end(self, args, state, control, model, optimizer, **kwargs):
            run.took_effect()
            optimizer.optimizer.step()
            model.zero_grad()

    run.callbacks.append(Step())


@bug("accumulation_mismatch", "accumulation", "short window scaled as a full one", "LlamaFactory#10705", PASSES)
def short_window_scaled_as_a_full_one(run: Run):
    """The last window of a pass has one micro-batch and is divided by four: its gradient is a quarter."""

    class Tail(run.trainer_class):
        def get_batch_samples(self, *args):
            samples, num_items = super().get_batch_samples(*args)
            missing = self.args.gradient_accumulation_steps / len(samples)
            if missing > 1:
                run.took_effect()
            return samples, num_items * missing

    run.trainer_class = Tail
