"""Optimizer, schedule and precision."""

import copy
import math
from collections.abc import Callable

import accelerate
import torch
import transformers.trainer
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, get_scheduler

from recipe import muon
from tests.zoo.bug import bug
from tests.zoo.run import Run
from tests.zoo.setting import Setting

ENGLISH = Setting()
ACCUMULATED = Setting(rows="padded", batch=2, accumulation=4)
LINEAR = ACCUMULATED.changed(arguments={"lr_scheduler_type": "linear"})
SLOW = Setting(arguments={"learning_rate": 3e-5, "lr_scheduler_type": "constant_with_warmup"})
BIASED = Setting(family="gpt2")
SGD = Setting(arguments={"optim": "sgd", "learning_rate": 0.3})
MUON = Setting(kind="recipe", vocabulary=4096, steps=60, arguments={"optim": "muon"})


class After(TrainerCallback):
    """Calls `act(step, **kwargs)` after each optimizer step, before the Trainer counts the step."""

    def __init__(self, act: Callable):
        self.act = act

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.act(state.global_step + 1, **kwargs)


def change_optimizer(run: Run, change: Callable[[torch.optim.Optimizer, PreTrainedModel], None]) -> None:
    """`change` is given the optimizer that the Trainer made, before there is a schedule."""

    class Changed(run.trainer_class):
        def create_optimizer(self, model=None):
            optimizer = super().create_optimizer(model)
            change(optimizer, self.model)
            run.took_effect()
            return optimizer

    run.trainer_class = Changed


def change_schedule(run: Run, change: Callable[[int, int], tuple[int, int]]) -> None:
    """`change` makes the warm-up and the steps that the library's schedule is built from of those asked for."""

    def build(name, optimizer, num_warmup_steps, num_training_steps, **kwargs):
        run.took_effect()
        warmup, total = change(num_warmup_steps, num_training_steps)
        return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total, **kwargs)

    run.patch(transformers.trainer, "get_scheduler", build)


# --- schedule


@bug("learning_rate_off", "optimizer and schedule", "schedule steps too often", "accelerate#999", ACCUMULATED)
def scheduler_steps_with_each_micro_batch(run: Run):
    """The scheduler advances with every micro-batch: the rate falls four times as fast and then comes back up."""

    class Step(TrainerCallback):
        def on_substep_end(self, args, state, control, lr_scheduler, **kwargs):
            lr_scheduler.step()
            run.took_effect()

    run.callbacks.append(Step())


@bug("learning_rate_off", "optimizer and schedule", "schedule steps too often", "accelerate#999", ENGLISH)
def scheduler_stepped_twice(run: Run):
    """A training loop of its own habit steps the scheduler after the Trainer has: the rate falls twice as fast."""

    def act(step, lr_scheduler, **kwargs):
        lr_scheduler.step()
        run.took_effect()

    run.callbacks.append(After(act))


@bug("learning_rate_off", "optimizer and schedule", "rate a few per cent off", "OLMo-core#27", ENGLISH)
def rate_4_percent_low(run: Run):
    """The rate that the optimizer begins with, and so all of the schedule, is 4 % under the one asked for."""

    def change(optimizer, model):
        for group in optimizer.param_groups:
            group["lr"] *= 0.96

    change_optimizer(run, change)


@bug(
    "learning_rate_off", "optimizer and schedule", "warm-up ignored", "SOTA-Face-Recognition-Train-and-Test#6", ENGLISH
)
def warmup_ignored(run: Run):
    """The warm-up that was asked for is not passed on: the first step has the full rate."""
    change_schedule(run, lambda warmup, total: (0, total))


@bug("learning_rate_off", "optimizer and schedule", "total steps divided", "EasyContext#21", LINEAR, 10)
def total_steps_divided(run: Run):
    """The schedule's total is divided by the accumulation and its warm-up is not: the rate is 0 from step 25 on."""
    change_schedule(run, lambda warmup, total: (warmup, total // run.setting.accumulation))


@bug("learning_rate_off", "optimizer and schedule", "warm-up in other units", "EasyContext#21", ENGLISH)
def warmup_never_ends(run: Run):
    """The warm-up is counted in rows instead of steps, 80 of 100: the peak comes near the end."""
    change_schedule(run, lambda warmup, total: (warmup * run.setting.batch, total))


@bug(
    "learning_rate_off",
    "optimizer and schedule",
    "schedule drives another optimizer",
    "pytorch-lightning#12812",
    ENGLISH,
)
def scheduler_of_another_optimizer(run: Run):
    """The scheduler was made for an optimizer that was then replaced: the log shows its rates, which nobody uses."""
    constants = {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
    old, new = (torch.optim.AdamW(run.model.parameters(), **constants) for _ in range(2))
    schedule = get_scheduler("cosine", old, 10, run.setting.steps)
    new.register_step_pre_hook(lambda *_: run.took_effect())
    run.optimizers = (new, schedule)


@bug("learning_rate_off loss_spike", "optimizer and schedule", "rate jumps in mid-run", "OLMo-core#27", ENGLISH, 40)
def rate_30_times_too_high(run: Run):
    """From step 41 on the rate is 30 times what the schedule says, as from a configuration read again."""

    def act(step, lr_scheduler, optimizer, **kwargs):
        if step == 40:
            lr_scheduler.base_lrs = [30 * rate for rate in lr_scheduler.base_lrs]
            run.took_effect()

    run.callbacks.append(After(act))


# --- which parameters


@bug("frozen_parameters", "optimizer and schedule", "optimizer of other parameters", "accelerate#2665", ENGLISH)
def optimizer_of_a_replaced_model(run: Run):
    """The optimizer was built before the model's parameters were replaced by equal ones: nothing moves."""
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    optimizer.register_step_pre_hook(lambda *_: run.took_effect())
    run.model = copy.deepcopy(run.model)
    run.optimizers = (optimizer, None)


@bug("frozen_parameters", "optimizer and schedule", "layer not in the optimizer", "HVPNeT#5", ENGLISH)
def layer_left_out_of_the_optimizer(run: Run):
    """The groups were made by name and one of three layers is in none of them."""

    def change(optimizer, model):
        left_out = {id(parameter) for parameter in model.model.layers[1].parameters()}
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in left_out]

    change_optimizer(run, change)


@bug("frozen_parameters", "optimizer and schedule", "group with rate 0", "pytorch#78003", ENGLISH)
def group_with_rate_0(run: Run):
    """The MLPs have a group of their own, whose rate is 0; the log shows the rate of the first group."""

    def change(optimizer, model):
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        first = optimizer.param_groups[0]
        mlps = [parameter for parameter in first["params"] if ".mlp." in names[id(parameter)]]
        first["params"] = [parameter for parameter in first["params"] if ".mlp." not in names[id(parameter)]]
        optimizer.add_param_group({**first, "params": mlps, "lr": 0.0})

    change_optimizer(run, change)


@bug("frozen_parameters", "optimizer and schedule", "detach in the model", "lidar-bonnetal#99", ENGLISH)
def embedding_and_first_layer_detached(run: Run):
    """The second layer's input is detached: nothing below it is given a gradient but what the tied head gives."""

    def cut(module, inputs):
        run.took_effect()
        return (inputs[0].detach(), *inputs[1:])

    run.model.model.layers[1].register_forward_pre_hook(cut)


@bug("frozen_parameters", "optimizer and schedule", "detach in the model", "lidar-bonnetal#99", ENGLISH)
def one_mlp_detached(run: Run):
    """The output of one MLP is detached, so that its weights stay random; gradients flow past it."""

    def cut(module, inputs, output):
        run.took_effect()
        return output.detach()

    run.model.model.layers[1].mlp.register_forward_hook(cut)


@bug("frozen_parameters", "optimizer and schedule", "frozen in mid-run", "no public report", ENGLISH, 50)
def layers_frozen_in_mid_run(run: Run):
    """After step 50 two of three layers no longer ask for gradients, as from a staged fine-tuning script."""

    def act(step, model, **kwargs):
        if step == 50:
            model.model.layers[:2].requires_grad_(False)
            run.took_effect()

    run.callbacks.append(After(act))


@bug("untied_weights", "optimizer and schedule", "tied weights came apart", "verl#7834", ENGLISH)
def tied_weights_came_apart(run: Run):
    """The head is a copy of the embedding instead of the embedding: each gets half of the gradient."""
    run.model.lm_head.weight = nn.Parameter(run.model.lm_head.weight.detach().clone())
    run.model.lm_head.register_forward_pre_hook(lambda *_: run.took_effect())


@bug("untied_weights frozen_parameters", "optimizer and schedule", "tied weights came apart", "verl#7834", ENGLISH)
def untied_after_the_optimizer(run: Run):
    """The head is cut from the embedding when the optimizer is already made, which so holds the embedding only."""

    def change(optimizer, model):
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())

    change_optimizer(run, change)


# --- what a step does


@bug("", "optimizer and schedule", "weight decay on norms", "transformers#35927", BIASED)
def weight_decay_on_norms_and_biases(run: Run):
    """All parameters are decayed, norms and biases too."""

    class Changed(run.trainer_class):
        def get_decay_parameter_names(self, model):
            run.took_effect()
            return [name for name, _ in model.named_parameters()]

    run.trainer_class = Changed


@bug("grad_norm_off", "optimizer and schedule", "clipping has no effect", "accelerate#3465", SGD)
def clipping_without_effect(run: Run):
    """The norm is measured and logged, and gradients are not scaled to the limit asked for."""
    measure = accelerate.Accelerator.clip_grad_norm_

    def clip_grad_norm_(self, parameters, max_norm, norm_type=2):
        run.took_effect()
        return measure(self, parameters, math.inf, norm_type)

    run.patch(accelerate.Accelerator, "clip_grad_norm_", clip_grad_norm_)


@bug("accumulation_mismatch grad_norm_off", "optimizer and schedule", "no zero_grad", "torchforge#71", ENGLISH)
def zero_grad_forgotten(run: Run):
    """Gradients are never set to 0: each step goes along the sum of all so far."""
    run.patch(run.model, "zero_grad", lambda *args, **kwargs: run.took_effect())


@bug("loss_not_finite", "optimizer and schedule", "NaN steps skipped in silence", "trl#6702", ENGLISH, 20)
def nan_steps_skipped(run: Run):
    """From step 21 every third loss is NaN: Trainer's filter hides it and NaN gradients are dropped."""

    class Overflows(run.trainer_class):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            if self.state.global_step < 20 or self.state.global_step % 3 or not torch.is_tensor(loss):
                return loss
            run.took_effect()
            return loss * math.nan

        def _clip_grad_norm(self, model):
            if not all(parameter.grad.isfinite().all() for parameter in model.parameters()):
                model.zero_grad()
            return super()._clip_grad_norm(model)

    run.trainer_class = Overflows


@bug("loss_not_finite", "optimizer and schedule", "NaN steps skipped in silence", "trl#6702", ENGLISH, 20)
def nan_steps_reported_as_the_last_loss(run: Run):
    """From step 21 every third loss is NaN: the training step drops it and returns the last finite loss instead."""

    class Skips(run.trainer_class):
        def training_step(self, model, *args, **kwargs):
            loss = super().training_step(model, *args, **kwargs)
            if self.state.global_step < 20 or self.state.global_step % 3:
                self.last_loss = loss
                return loss
            run.took_effect()
            model.zero_grad()
            return self.last_loss

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            is_nan = self.model.training and self.state.global_step >= 20 and self.state.global_step % 3 == 0
            return loss * math.nan if is_nan else loss

    run.trainer_class = Skips


@bug("optimizer_off", "optimizer and schedule", "Adam's constants", "blocks#1159", ENGLISH)
def adam_betas_swapped(run: Run):
    """beta1 is 0.95 and beta2 0.9, each given for the other: momentum outlasts the scale."""
    run.arguments |= {"adam_beta1": 0.95, "adam_beta2": 0.9}
    change_optimizer(run, lambda optimizer, model: None)


@bug("lost_updates", "optimizer and schedule", "Adam's constants", "mlpnlp-nmt#4", ENGLISH)
def adam_epsilon_too_large(run: Run):
    """Epsilon is 1e-2, far over the gradients' size: steps are a fraction of the rate."""
    run.arguments["adam_epsilon"] = 1e-2
    change_optimizer(run, lambda optimizer, model: None)


@bug("optimizer_off", "optimizer and schedule", "Muon's step", "seen with the recipe", MUON)
def muon_without_orthogonalization(run: Run):
    """Muon's momentum is scaled to the size of its update, but not orthogonalized."""

    def scaled(matrices, dtype=None):
        run.took_effect()
        norms = torch.linalg.matrix_norm(matrices, keepdim=True).clamp_min(1e-7)
        return matrices / norms * min(matrices.shape[1:]) ** 0.5

    run.patch(muon, "orthogonalize", scaled)


# --- precision


@bug("lost_updates", "precision", "bf16 weights", "torchtune#2254", SLOW)
def bf16_weights_with_a_small_rate(run: Run):
    """Weights are bf16 with no fp32 copy: at this rate most updates round to 0."""
    run.model = run.model.to(torch.bfloat16)
    run.model.register_forward_pre_hook(lambda *_: run.took_effect())


@bug("lost_updates frozen_parameters", "precision", "weights rounded to 8 bits", "torchtune#2254", SLOW)
def weights_rounded_to_8_bits(run: Run):
    """After each step all weights are rounded to 8 bits, 127 parts of each tensor's largest: most updates are lost."""

    def act(step, model, **kwargs):
        run.took_effect()
        with torch.no_grad():
            for parameter in model.parameters():
                part = parameter.abs().max() / 127
                parameter.copy_((parameter / part).round() * part)

    run.callbacks.append(After(act))


@bug("reference_mismatch", "precision", "coarse logits", "modalities#464", ENGLISH)
def loss_of_fp8_logits(run: Run):
    """Logits are rounded to fp8 (4 bits of exponent, 3 of mantissa) before the loss."""

    def coarsen(module, inputs, output):
        run.took_effect()
        return output + (output.to(torch.float8_e4m3fn).float() - output).detach()

    run.model.lm_head.register_forward_hook(coarsen)


@bug("wrong_gradient", "precision", "coarse logits", "modalities#464", ENGLISH)
def loss_of_bf16_logits(run: Run):
    """Softmax and loss are computed from bf16 logits in bf16, and never cast to fp32."""

    def loss_function(logits, labels, vocab_size, num_items_in_batch=None, **kwargs):
        run.took_effect()
        shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        total = nn.functional.cross_entropy(logits.bfloat16().flatten(0, 1), shifted.flatten(), reduction="sum")
        return (total / (num_items_in_batch or (shifted != -100).sum())).float()

    run.model.loss_function = loss_function
