"""Optimizer, schedule and precision."""

import torch
from torch import nn
from transformers import TrainerCallback

from tests.zoo.bug import bug
from tests.zoo.run import Run
from tests.zoo.setting import Setting

AREA = "optimizer and schedule"
ENGLISH = Setting()
LONG_MEMORY = Setting(arguments={"adam_beta2": 0.999})
ACCUMULATED = Setting(rows="padded", batch=2, accumulation=4)


@bug("optimizer_off", AREA, "weight decay through the gradient", "nntrainer PR #3565", ENGLISH)
def decay_not_decoupled(run: Run):
    """AdamW adds its weight decay to the gradient, as Adam with an L2 penalty does."""

    class Couples(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer, **kwargs):
            for group in optimizer.param_groups:
                run.took_effect()
                group["decoupled_weight_decay"] = False

    run.callbacks.append(Couples())


@bug("learning_rate_off", AREA, "schedule reaches the first group only", "pytorch-segmentation-toolbox#12", ENGLISH)
def first_group_scheduled_alone(run: Run):
    """The schedule sets the rate of the first group; that of the norms stays at its peak."""

    class FirstGroup(run.trainer_class):
        def create_scheduler(self, num_training_steps, optimizer=None):
            scheduler = super().create_scheduler(num_training_steps, optimizer)
            scheduler.lr_lambdas[1:] = [lambda step: 1.0 for _ in scheduler.lr_lambdas[1:]]
            for group in scheduler.optimizer.param_groups[1:]:
                run.took_effect()
                group["lr"] = group["initial_lr"]
            return scheduler

    run.trainer_class = FirstGroup


@bug("lost_updates", AREA, "averaged weights left in the model", "waifu-diffusion PR #31", ENGLISH, onset=40)
def averaged_weights_left_in_the_model(run: Run):
    """Each save puts the moving average into the model and does not put the weights back: training goes on from it."""

    average: dict[str, torch.Tensor] = {}

    class Saves(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            for name, value in model.state_dict().items():
                average.setdefault(name, value.clone()).lerp_(value, 0.05)

        def on_save(self, args, state, control, model, **kwargs):
            run.took_effect()
            model.load_state_dict(average)

    run.arguments |= {"save_strategy": "steps", "save_steps": 40}
    run.callbacks.append(Saves())


@bug("optimizer_off", AREA, "shared weight updated twice", "torch7#716", ENGLISH)
def shared_weight_updated_twice(run: Run):
    """The weight that embedding and head share is in the optimizer once for each: it is updated twice a step."""

    class Twice(run.trainer_class):
        def create_optimizer(self, *args, **kwargs):
            run.took_effect()
            optimizer = super().create_optimizer(*args, **kwargs)
            optimizer.param_groups[0]["params"].append(self.model.lm_head.weight)
            return optimizer

    run.trainer_class = Twice


# --- precision


@bug("lost_updates", "precision", "fp16 gradients without a scale", "Open-Rig3R#35", ENGLISH)
def fp16_gradients_without_scaler(run: Run):
    """Backward runs in fp16 and the loss is not scaled: gradients below 6e-8 are 0."""

    def underflow(grad):
        run.took_effect()
        return grad.half().float()

    def watch(module, inputs, output):
        if output.requires_grad:
            output.register_hook(underflow)

    for module in run.model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(watch)


@bug("", "precision", "Adam's moments in bf16", "OpenTau#184", LONG_MEMORY)
def adam_moments_in_bf16(run: Run):
    """Both moments are kept in bf16, in which 0.999 times a number is that number: the second never falls."""

    class Rounds(TrainerCallback):
        def on_optimizer_step(self, args, state, control, optimizer, **kwargs):
            run.took_effect()
            for values in optimizer.state.values():
                for name in ("exp_avg", "exp_avg_sq"):
                    values[name].copy_(values[name].bfloat16())

    run.callbacks.append(Rounds())


@bug("accumulation_mismatch", "precision", "gradients accumulated in bf16", "DeepSpeed#2768", ACCUMULATED)
def gradients_accumulated_in_bf16(run: Run):
    """Each micro-batch's gradient is added in bf16, which keeps 8 bits of the sum."""

    def round_sum(parameter):
        run.took_effect()
        parameter.grad.copy_(parameter.grad.bfloat16())

    for parameter in run.model.parameters():
        parameter.register_post_accumulate_grad_hook(round_sum)
