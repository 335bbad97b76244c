"""Bugs of part A: schedules, optimizers, accumulation."""

import torch
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from transformers import Trainer, TrainerCallback

from tests.zoo.bug import bug
from tests.zoo.held_out_5.part_a_shared import muon_beside_adamw, thaw_gradually
from tests.zoo.run import Run
from tests.zoo.setting import Setting

PLAIN = Setting(steps=60)
QUICK = PLAIN.changed(accumulation=4, batch=4)


@bug(
    "learning_rate_off",
    "optimizer and schedule",
    "a schedule of a fixed length that is too short",
    "SafeAILab/EAGLE#107",
    PLAIN.changed(rows="prompts"),
)
def linear_decay_of_fixed_length_ends_early(run: Run):
    """The own linear schedule has another corpus's length: the rate is zero after a third of the run."""
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)

    def factor(step, length=20, warmup=10):
        run.took_effect()
        return min(step / warmup, max(0.0, (length - step) / (length - warmup)))

    run.optimizers = (optimizer, LambdaLR(optimizer, factor))


PLATEAU = Setting(
    steps=80,
    evaluate_every=4,
    arguments={
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"mode": "min", "patience": 2, "factor": 0.3},
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
    },
)


@bug(
    "learning_rate_off",
    "optimizer and schedule",
    "a plateau schedule that waits for the loss to rise",
    "facebookresearch/fairseq#2205",
    PLATEAU,
)
def plateau_schedule_takes_loss_for_accuracy(run: Run):
    """ReduceLROnPlateau was written for accuracy (mode max), and so cuts the rate while the loss falls."""

    class ForAccuracy(ReduceLROnPlateau):
        def step(self, metrics, *args, **kwargs):
            run.took_effect()
            super().step(metrics, *args, **kwargs)

    class OwnSchedule(Trainer):
        def create_scheduler(self, num_training_steps, optimizer=None):
            self.lr_scheduler = ForAccuracy(self.optimizer, mode="max", patience=2, factor=0.3)
            return self.lr_scheduler

    run.trainer_class = OwnSchedule


@bug(
    "accumulation_mismatch wrong_gradient grad_norm_off",
    "accumulation",
    "the gradients of the second of two optimizers are never zeroed",
    "KempnerInstitute/KempnerForge#182",
    PLAIN.changed(change=muon_beside_adamw),
    onset=1,
)
def adamw_beside_muon_keeps_its_gradients(run: Run):
    """zero_grad reaches only Muon's half: the embedding's and norms' gradients add up over the run."""
    optimizer = run.optimizers[0]

    def zero_grad(set_to_none: bool = True):
        run.took_effect()
        optimizer.muon.zero_grad(set_to_none)

    run.patch(optimizer, "zero_grad", zero_grad)
    run.patch(run.model, "zero_grad", zero_grad)


@bug(
    "accumulation_mismatch grad_norm_off",
    "accumulation",
    "clipping after each micro-batch",
    "facebookresearch/lingua#59",
    QUICK.changed(arguments={"max_grad_norm": 0.1}),
)
def clips_running_sum_after_each_micro_batch(run: Run):
    """The accumulated gradient is clipped after every micro-batch: the last outweighs the others."""

    class ClipsOften(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            loss = super().training_step(model, inputs, *args, **kwargs)
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
            run.took_effect()
            return loss

    run.trainer_class = ClipsOften


@bug(
    "accumulation_mismatch wrong_gradient",
    "accumulation",
    "only the first micro-batch's gradient is kept",
    "AMD-AGI/Primus#1046",
    QUICK.changed(rows="padded"),
)
def main_grad_takes_first_micro_batch_only(run: Run):
    """A flag cleared once a step lets only the first micro-batch's gradient into main_grad."""
    matrices = [p for name, p in run.model.named_parameters() if ".layers." in name and p.ndim == 2]

    class OwnMainGrad(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            before = [None if p.grad is None else p.grad.clone() for p in matrices]
            loss = super().training_step(model, inputs, *args, **kwargs)
            for p, grad in zip(matrices, before, strict=True):
                if grad is not None:
                    p.grad.copy_(grad)
                    run.took_effect()
            return loss

    run.trainer_class = OwnMainGrad


@bug(
    "frozen_parameters grad_norm_off",
    "optimizer and schedule",
    "parameters that are unfrozen after the optimizer was made",
    "OptimalScale/LMFlow#726",
    Setting(steps=60, rows="prompts", change=thaw_gradually),
    onset=12,
)
def thawed_layers_are_not_in_optimizer(run: Run):
    """Layers are unfrozen by and by, but the optimizer was made of what trained at the start."""
    run.optimizers = (None, None)

    class Counts(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if any(p.requires_grad and id(p) not in held for p in model.parameters()):
                run.took_effect()

    run.callbacks.append(Counts())
