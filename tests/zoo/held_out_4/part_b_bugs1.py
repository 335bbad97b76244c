"""Bugs of optimizers, schedules, precision and moving averages, of a stock Trainer or with an own optimizer."""

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback

from tests.zoo.bug import bug
from tests.zoo.setting import Setting

# --- moving averages of the weights


class Average:
    """Exponential moving average of a model's parameters."""

    def __init__(self, model, decay: float, dtype=torch.float32):
        self.decay = decay
        self.values = [p.detach().to(dtype, copy=True) for p in model.parameters()]

    @torch.no_grad()
    def update(self, model) -> None:
        for value, p in zip(self.values, model.parameters(), strict=True):
            value.lerp_(p.to(value.dtype), 1 - self.decay)

    @torch.no_grad()
    def swap(self, model) -> list[torch.Tensor]:
        """Puts the average into the model and returns what was there."""
        old = [p.detach().clone() for p in model.parameters()]
        self.put(model, self.values)
        return old

    @staticmethod
    @torch.no_grad()
    def put(model, values) -> None:
        for value, p in zip(values, model.parameters(), strict=True):
            p.copy_(value)


class Averaging(TrainerCallback):
    """Keeps an average; with `finish` it becomes the model when training ends."""

    def __init__(self, decay: float, dtype=torch.float32, finish: bool = False):
        self.decay, self.dtype, self.finish, self.average = decay, dtype, finish, None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.average = Average(model, self.decay, self.dtype)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.average.update(model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self.finish:
            self.average.swap(model)


def evaluate_average(run, restores: bool) -> None:
    keeper = Averaging(0.95)
    run.callbacks.append(keeper)

    class AveragedTrainer(Trainer):
        def evaluate(self, *args, **kwargs):
            if keeper.average is None:
                return super().evaluate(*args, **kwargs)
            old = keeper.average.swap(self.model)
            try:
                return super().evaluate(*args, **kwargs)
            finally:
                if restores:
                    keeper.average.put(self.model, old)
                else:
                    run.took_effect()

    run.trainer_class = AveragedTrainer


def with_average(run) -> None:
    evaluate_average(run, restores=True)


@bug(
    "optimizer_off lost_updates",
    "evaluation",
    "weights swapped for evaluation are not put back",
    "PKU-YuanGroup/Open-Sora-Plan#186",
    Setting(steps=80, evaluate_every=10, change=with_average),
)
def average_stays_after_evaluation(run):
    """The moving average is copied into the model for each evaluation, and the trained weights never come back."""
    run.callbacks.clear()
    evaluate_average(run, restores=False)


def ends_with_average(run) -> None:
    run.callbacks.append(Averaging(0.95, finish=True))


@bug(
    "lost_updates",
    "precision",
    "running average kept in bf16",
    "kyegomez/SingLoRA#6 (updates below a bf16 step vanish)",
    Setting(steps=100, change=ends_with_average),
)
def average_in_bf16(run):
    """The moving average that becomes the final model is kept in bf16, where most of its small steps round to none."""
    run.callbacks[:] = [Averaging(0.95, torch.bfloat16, finish=True)]
    run.took_effect()


# --- own optimizers and schedules


class OwnAdamW(torch.optim.Optimizer):
    """AdamW in a few lines. `scaled_decay`: the decay is multiplied by the learning rate."""

    def __init__(self, params, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01, scaled_decay=True, effect=None):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self.scaled_decay, self.effect = scaled_decay, effect

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            (b1, b2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                state["step"] += 1
                state["m"].lerp_(p.grad, 1 - b1)
                state["v"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                p.mul_(1 - group["weight_decay"] * (lr if self.scaled_decay else 1.0))
                m, v = state["m"] / (1 - b1 ** state["step"]), state["v"] / (1 - b2 ** state["step"])
                p.addcdiv_(m, v.sqrt().add_(1e-8), value=-lr)
        if self.effect:
            self.effect()


def warm_and_linear(optimizer, warmup: int, steps: int) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: min((step + 1) / warmup, max(0.0, (steps - step) / (steps - warmup))))


def own_adamw(run) -> None:
    optimizer = OwnAdamW(run.model.parameters())
    run.optimizers = (optimizer, warm_and_linear(optimizer, 10, run.setting.steps))


@bug(
    "optimizer_off",
    "optimizer and schedule",
    "weight decay not scaled by the learning rate",
    "tensorflow/addons#2282",
    Setting(steps=100, change=own_adamw),
)
def decay_without_learning_rate(run):
    """An own AdamW takes the whole weight decay off the weights each step, not the decay times the learning rate."""
    optimizer = OwnAdamW(run.model.parameters(), scaled_decay=False, effect=run.took_effect)
    run.optimizers = (optimizer, warm_and_linear(optimizer, 10, run.setting.steps))


def own_schedule(run) -> None:
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    run.optimizers = (optimizer, warm_and_linear(optimizer, 10, run.setting.steps))


@bug(
    "learning_rate_off",
    "optimizer and schedule",
    "schedule counted in micro-batches, stepped in updates",
    "huggingface/accelerate#225",
    Setting(steps=40, batch=2, accumulation=8, change=own_schedule),
)
def schedule_in_micro_batches(run):
    """Warm-up and length of the own schedule are counted in micro-batches, but the Trainer steps it once an update."""
    optimizer, accumulation = run.optimizers[0], run.setting.accumulation
    run.optimizers = (optimizer, warm_and_linear(optimizer, 10 * accumulation, run.setting.steps * accumulation))
    run.took_effect()


def layered_groups(model, decay: float) -> list[dict]:
    """The learning rate falls by `decay` a layer from the last to the first, and once more for the embedding."""
    layers = model.model.layers
    groups = [{"params": list(model.model.norm.parameters()), "lr": 3e-3}]
    for number, layer in enumerate(layers):
        groups.append({"params": list(layer.parameters()), "lr": 3e-3 * decay ** (len(layers) - 1 - number)})
    groups.append({"params": list(model.model.embed_tokens.parameters()), "lr": 3e-3 * decay ** len(layers)})
    return groups


def layered_rates(run) -> None:
    optimizer = torch.optim.AdamW(layered_groups(run.model, 0.5), betas=(0.9, 0.95), weight_decay=0.1)
    run.optimizers = (optimizer, warm_and_linear(optimizer, 10, run.setting.steps))


@bug(
    "learning_rate_off optimizer_off",
    "optimizer and schedule",
    "learning rates of the groups from a factor applied the wrong way",
    "seen in layer-wise decay scripts that count the layers from the wrong end",
    Setting(steps=100, change=layered_rates),
)
def layered_rates_grow(run):
    """Layer-wise decay divides by the factor where it should multiply: the embedding has the largest rate by far."""
    optimizer = torch.optim.AdamW(layered_groups(run.model, 1 / 0.5), betas=(0.9, 0.95), weight_decay=0.1)
    run.optimizers = (optimizer, warm_and_linear(optimizer, 10, run.setting.steps))
    run.took_effect()


# --- precision of ids


@bug(
    "token_out_of_range",
    "precision",
    "integer ids through a half-precision cast",
    "seen in collators that cast a whole batch to the model's dtype and back",
    Setting(steps=60, vocabulary=4001),
)
def ids_through_half(run):
    """The collator casts the whole batch to fp16 and back to integers: ids above 2048 become even ones."""
    healthy = run.collator

    def collate(rows):
        run.took_effect()
        return {name: value.half().long() for name, value in healthy(rows).items()}

    run.collator = collate
