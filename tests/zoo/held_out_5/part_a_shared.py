"""What users of part A do on purpose and right: changes that settings share, and what bugs then spoil."""

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback

from tests.zoo.rows import IGNORED
from tests.zoo.run import Run

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def pretrain(model, run: Run, steps: int = 40) -> None:
    """A short training of the base before it is fine-tuned, on rows that the run reads later in another shape."""
    state = torch.get_rng_state()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    rows = run.train_dataset
    for step in range(steps):
        chosen = [rows[(step * 8 + i) % len(rows)]["input_ids"] for i in range(8)]
        ids = torch.stack(chosen)
        logits = model(input_ids=ids).logits[:, :-1]
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=0).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), optimizer.zero_grad()
    torch.set_rng_state(state)


def lora(run: Run, targets: list[str], whole: list[str] | None = None, rank: int = 8) -> None:
    """PEFT's adapters on a base that has been trained a little."""
    pretrain(run.model, run)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, modules_to_save=whole)
    run.model = get_peft_model(run.model, config)


def lora_with_trained_head(run: Run) -> None:
    lora(run, ATTENTION + MLP, ["lm_head"])


def lora_on_head_too(run: Run) -> None:
    lora(run, [*ATTENTION, *MLP, "lm_head"])


def freeze_embeddings(run: Run) -> None:
    pretrain(run.model, run)
    run.model.get_input_embeddings().requires_grad_(False)


class ThawsFromTheTop(TrainerCallback):
    """Unfreezes one more layer every `every` steps, the last first."""

    def __init__(self, every: int):
        self.every = every

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        layers = model.model.layers
        for place in range(min(len(layers), 1 + state.global_step // self.every)):
            layers[len(layers) - 1 - place].requires_grad_(True)


def thaw_gradually(run: Run) -> None:
    """The optimizer is given every parameter before any is frozen; those without gradients it skips."""
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    run.optimizers = (optimizer, None)
    run.model.model.layers[:-1].requires_grad_(False)
    run.callbacks.append(ThawsFromTheTop(12))


class EvaluatesAverage(TrainerCallback):
    """An average of the weights: put into the model before each evaluation, and taken out after it."""

    def __init__(self, every: int, decay: float = 0.95):
        self.every, self.decay, self.average, self.kept = every, decay, None, None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            if self.average is None:
                self.average = [p.detach().clone() for p in model.parameters()]
            for mean, p in zip(self.average, model.parameters(), strict=True):
                mean.lerp_(p, 1 - self.decay)
            if state.global_step % self.every == 0:
                self.kept = [p.detach().clone() for p in model.parameters()]
                _copy(self.average, model)

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        if self.kept is not None:
            self.restore(model)

    def restore(self, model) -> None:
        _copy(self.kept, model)
        self.kept = None


def _copy(values, model) -> None:
    with torch.no_grad():
        for value, p in zip(values, model.parameters(), strict=True):
            p.copy_(value)


def evaluate_average(run: Run) -> None:
    run.callbacks.append(EvaluatesAverage(run.setting.evaluate_every))


class MuonBesideAdamW(torch.optim.Optimizer):
    """Muon for the layers' matrices, AdamW for all else, as one optimizer."""

    def __init__(self, model, lr: float):
        named = list(model.named_parameters())
        matrices = [p for name, p in named if p.ndim == 2 and ".layers." in name]
        others = [p for name, p in named if not (p.ndim == 2 and ".layers." in name)]
        self.muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
        super().__init__(self.muon.param_groups + self.adamw.param_groups, {})
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:1], self.param_groups[1:]

    def step(self, closure=None):
        self.muon.step()
        self.adamw.step()


def muon_beside_adamw(run: Run) -> None:
    run.optimizers = (MuonBesideAdamW(run.model, lr=3e-3), None)


def sgd_with_momentum(run: Run, lr: float = 0.1) -> None:
    run.optimizers = (torch.optim.SGD(run.model.parameters(), lr=lr, momentum=0.9, nesterov=True), None)


class OwnLossTrainer(Trainer):
    """Base of the trainers with a loss of their own: `token_losses` `[batch, place]` and a mask of what is scored.

    Divided by the labels of all micro-batches of the step, as the stock one is.
    """

    def token_losses(self, model, logits, targets):
        return F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        targets = inputs["labels"][:, 1:]
        scored = targets != IGNORED
        total = (self.token_losses(model, outputs.logits[:, :-1].float(), targets) * scored).sum()
        count = scored.sum() if num_items_in_batch is None else num_items_in_batch
        loss = total / count
        outputs["loss"] = loss
        return (loss, outputs) if return_outputs else loss


def rows_in_order(run: Run, order) -> None:
    """Reads the rows in this order, without shuffling them again."""

    class InOrder(Trainer):
        def _get_train_sampler(self, train_dataset=None):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    run.train_dataset = [run.train_dataset[int(i)] for i in order]
    run.trainer_class = InOrder


def short_rows_first(run: Run) -> None:
    """A curriculum by length."""
    lengths = [int(row["attention_mask"].sum()) for row in run.train_dataset]
    rows_in_order(run, np.argsort(lengths, kind="stable"))
