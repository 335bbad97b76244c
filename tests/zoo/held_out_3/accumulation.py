"""Gradient accumulation."""

from transformers import TrainerCallback

from tests.zoo.bug import bug
from tests.zoo.run import Run
from tests.zoo.setting import Setting

UNEVEN = Setting(batch=4, accumulation=4, passes=4, steps=62)  # 62 micro-batches a pass: 15 windows and 2 left over


@bug("accumulation_mismatch", "accumulation", "window runs on into the next pass", "transformers PR #22098", UNEVEN)
def left_over_micro_batches_carried(run: Run):
    """No step ends a pass: what is left over there is added to the first window of the next, which is too long."""
    batch, is_first = run.setting.batch, False
    num_left = len(run.train_dataset) % run.setting.rows_a_step
    left = run.train_dataset[-num_left:]
    run.train_dataset = run.train_dataset[:-num_left]

    class Pass(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            nonlocal is_first
            is_first = state.global_step > 0

    class RunsOn(run.trainer_class):
        def training_step(self, model, inputs, *args, **kwargs):
            nonlocal is_first
            loss = 0.0
            if is_first:
                run.took_effect()
                is_first = False
                for place in range(0, num_left, batch):
                    loss += super().training_step(model, run.collator(left[place : place + batch]), *args, **kwargs)
            return loss + super().training_step(model, inputs, *args, **kwargs)

    run.callbacks.append(Pass())
    run.trainer_class = RunsOn
