"""Optimizer, schedule and precision."""

import contextlib

import accelerate
import torch
from transformers import TrainerCallback

from tests.zoo.bug import bug
from tests.zoo.run import Run
from tests.zoo.setting import Setting

AREA = "optimizer and schedule"
ENGLISH = Setting()
TWO_PASSES = Setting(passes=2, arguments={"warmup_steps": 0})
AUTOCAST = Setting(steps=80, arguments={"bf16": True})
LOSS_SCALE = 2.0**16


@bug("optimizer_off", AREA, "no bias correction", "oneflow PR #5960", ENGLISH)
def adam_without_bias_correction(run: Run):
    """Adam's moments, which start at 0, are not corrected for it."""

    class Uncorrected(run.trainer_class):
        def create_optimizer(self, *args, **kwargs):
            optimizer = super().create_optimizer(*args, **kwargs)
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    run.took_effect()
                    moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                    optimizer.state[parameter] = {"step": torch.tensor(1e6), **moments}  # the correction is 1 there
            return optimizer

    run.trainer_class = Uncorrected


@bug("learning_rate_off", AREA, "schedule steps with each epoch", "CodefyUI#297", TWO_PASSES)
def scheduler_steps_with_each_epoch(run: Run):
    """The schedule is declared in steps and goes on once an epoch: the rate stays at its peak."""

    class Epochs(run.trainer_class):
        def create_scheduler(self, *args, **kwargs):
            scheduler, calls = super().create_scheduler(*args, **kwargs), 0
            step = scheduler.step

            def step_once_an_epoch():
                nonlocal calls
                calls += 1
                run.took_effect()
                if calls % (run.setting.steps // run.setting.passes) == 0:
                    step()

            scheduler.step = step_once_an_epoch
            return scheduler

    run.trainer_class = Epochs


# --- precision


@bug("lost_updates grad_norm_off", "precision", "clipped before unscaling", "Pytorch-UNet#468", ENGLISH)
def clipped_before_unscaling(run: Run):
    """Gradients are clipped while they are multiplied by the scale of the loss, and then divided by it."""
    clip = accelerate.Accelerator.clip_grad_norm_

    def clip_scaled(accelerator, parameters, *args, **kwargs):
        run.took_effect()
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_mul_(gradients, LOSS_SCALE)
        norm = clip(accelerator, [p for p in run.model.parameters() if p.grad is not None], *args, **kwargs)
        torch._foreach_div_(gradients, LOSS_SCALE)
        return norm

    run.patch(accelerate.Accelerator, "clip_grad_norm_", clip_scaled)


@bug("lost_updates", "precision", "stale casts of the weights", "X-GenGroup/Flow-Factory PR #186", AUTOCAST)
def stale_casts_of_the_weights(run: Run):
    """One autocast context is around ten steps: its cache serves the bf16 weights from before their updates."""

    class Outer(TrainerCallback):
        context = contextlib.ExitStack()

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step % 10 == 0:
                run.took_effect()
                self.context.close()
                self.context.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))

        def on_train_end(self, args, state, control, **kwargs):
            self.context.close()

    run.callbacks.append(Outer())
