"""Healthy trainings with own losses, callbacks, precision, data order and checkpoints."""

import torch
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback

from tests.zoo.models import make_model
from tests.zoo.rows import IGNORED, make_rows
from tests.zoo.setting import Setting


def shifted(model, inputs):
    """Logits and targets of the scored places, `[n, vocabulary]` and `[n]`."""
    labels = inputs.pop("labels")
    outputs = model(**inputs)
    targets = labels[:, 1:]
    kept = targets != IGNORED
    return outputs, outputs.logits[:, :-1][kept].float(), targets[kept]


class FocalTrainer(Trainer):
    """Likely tokens count less, by the square of the chance that is left."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs, logits, targets = shifted(model, inputs)
        losses = F.cross_entropy(logits, targets, reduction="none")
        loss = ((1 - torch.exp(-losses)) ** 2 * losses).mean()
        return (loss, outputs) if return_outputs else loss


class ZLossTrainer(Trainer):
    """Cross entropy and a small penalty on the logarithm of the partition function."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs, logits, targets = shifted(model, inputs)
        loss = F.cross_entropy(logits, targets) + 1e-3 * logits.logsumexp(-1).square().mean()
        return (loss, outputs) if return_outputs else loss


class DistilledTrainer(Trainer):
    """Half cross entropy, half divergence from a teacher at temperature 2."""

    teacher = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with torch.no_grad():
            labels = inputs["labels"][:, 1:]
            target = self.teacher(inputs["input_ids"]).logits[:, :-1][labels != IGNORED] / 2
        outputs, logits, targets = shifted(model, inputs)
        student = F.log_softmax(logits / 2, dim=-1)
        apart = F.kl_div(student, F.log_softmax(target, dim=-1), reduction="batchmean", log_target=True)
        loss = 0.5 * F.cross_entropy(logits, targets) + 0.5 * 4 * apart
        return (loss, outputs) if return_outputs else loss


def focal(run) -> None:
    run.trainer_class = FocalTrainer


def z_loss_b(run) -> None:
    run.trainer_class = ZLossTrainer


def distilled_b(run) -> None:
    setting = run.setting
    teacher = make_model(setting.changed(seed=setting.seed + 1))
    rows = make_rows(setting.changed(steps=80, batch=8))
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
    for start in range(0, len(rows), 8):
        ids = torch.stack([row["input_ids"] for row in rows[start : start + 8]])
        teacher(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    teacher.eval().requires_grad_(False)
    run.trainer_class = type("DistilledTrainer", (DistilledTrainer,), {"teacher": teacher})


# --- callbacks


class Unfreeze(TrainerCallback):
    """The lower layers are trained from step 30 on."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 30:
            model.model.layers[:2].requires_grad_(True)


def gradual_unfreezing(run) -> None:
    """As in ULMFiT: the last layer, the norm and the embedding first. The optimizer holds all parameters."""
    parameters = list(run.model.parameters())
    run.optimizers = (torch.optim.AdamW(parameters, lr=3e-3, betas=(0.9, 0.95)), None)
    run.model.model.layers[:2].requires_grad_(False)
    run.callbacks.append(Unfreeze())


class AveragedEvaluation(Trainer):
    """Evaluates a moving average of the weights, then puts the trained weights back."""

    average = None

    def training_step(self, model, *args, **kwargs):
        with torch.no_grad():
            if self.average is None:
                self.average = [p.detach().clone() for p in model.parameters()]
            for value, p in zip(self.average, model.parameters(), strict=True):
                value.lerp_(p, 0.1)
        return super().training_step(model, *args, **kwargs)

    def evaluate(self, *args, **kwargs):
        trained = [p.detach().clone() for p in self.model.parameters()]
        self._put(self.average or trained)
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._put(trained)

    @torch.no_grad()
    def _put(self, values) -> None:
        for value, p in zip(values, self.model.parameters(), strict=True):
            p.copy_(value)


def averaged_evaluation(run) -> None:
    run.trainer_class = AveragedEvaluation


class DecayRises(TrainerCallback):
    """Weight decay and beta2 on a plan of their own."""

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        part = state.global_step / args.max_steps
        for group in optimizer.param_groups:
            if group["weight_decay"]:
                group["weight_decay"] = 0.02 + 0.2 * part
            group["betas"] = (0.9, 0.95 + 0.04 * part)


def decay_rises(run) -> None:
    run.callbacks.append(DecayRises())


# --- data order, precision, checkpoints


class Rows(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def short_rows_first_b(run) -> None:
    """A curriculum: sorted by length and read in that order."""
    ordered = sorted(run.train_dataset, key=lambda row: int(row["attention_mask"].sum()))
    run.train_dataset = Rows(ordered)
    run.arguments["train_sampling_strategy"] = "sequential"


def fused_bf16(run) -> None:
    """Autocast to bf16, with weights, gradients and optimizer state in fp32."""
    run.arguments.update(bf16=True, optim="adamw_torch_fused")


def best_at_end(run) -> None:
    run.arguments.update(save_strategy="steps", save_steps=run.setting.evaluate_every, load_best_model_at_end=True)
    run.arguments.update(metric_for_best_model="eval_loss", greater_is_better=False)


PLAN = {"num_decay_steps": 20, "min_lr_ratio": 0.1}
WARM_STABLE = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": PLAN}
HEALTHY = {
    "focal": Setting(rows="padded", steps=80, change=focal),
    "z_loss": Setting("qwen3", steps=80, change=z_loss_b),
    "distilled_b": Setting(block=64, steps=80, change=distilled_b),
    "gradual_unfreezing": Setting(steps=90, change=gradual_unfreezing),
    "averaged_evaluation": Setting(steps=80, evaluate_every=20, change=averaged_evaluation),
    "decay_rises": Setting("gpt2", steps=80, change=decay_rises),
    "short_rows_first_b": Setting(rows="padded", steps=80, change=short_rows_first_b),
    "fused_bf16": Setting("mistral", steps=60, change=fused_bf16),
    "best_at_end": Setting(steps=80, evaluate_every=20, change=best_at_end),
    "warm_stable_resumed": Setting(steps=80, save_at=50, arguments=WARM_STABLE),
    "adafactor_inverse_root": Setting(
        steps=100, arguments={"optim": "adafactor", "lr_scheduler_type": "inverse_sqrt", "learning_rate": 1e-2}
    ),
    "smoothed_noisy": Setting(steps=80, arguments={"label_smoothing_factor": 0.1, "neftune_noise_alpha": 5}),
    "two_ranks_uneven": Setting(steps=40, batch=4, accumulation=2, rows="padded", ranks=2),
}
