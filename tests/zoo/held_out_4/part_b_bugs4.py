"""Bugs of own losses and hooks."""

import torch
from torch.nn import functional as F
from transformers import Trainer

from tests.zoo.bug import bug
from tests.zoo.models import make_model
from tests.zoo.rows import IGNORED, make_rows
from tests.zoo.setting import Setting


def pretrain(model, setting: Setting, steps: int = 20) -> None:
    """Trains on source code, so that what follows starts from a model that can do something."""
    rows = make_rows(setting.changed(text="code", rows="packed", steps=steps, batch=8, accumulation=1, passes=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for start in range(0, len(rows), 8):
        ids = torch.stack([row["input_ids"] for row in rows[start : start + 8]])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def make_teacher(run):
    teacher = make_model(run.setting.changed(seed=run.setting.seed + 1))
    pretrain(teacher, run.setting.changed(text="english"), 60)
    return teacher.eval().requires_grad_(False)


class Distilled(Trainer):
    """The student learns the teacher's distribution. `of_student`: what goes into the divergence."""

    teacher, of_student, effect = None, staticmethod(F.log_softmax), None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        with torch.no_grad():
            target = F.softmax(self.teacher(**inputs).logits, dim=-1)
        kept = labels != IGNORED
        loss = F.kl_div(self.of_student(outputs.logits, dim=-1)[kept], target[kept], reduction="sum") / kept.sum()
        if self.effect:
            self.effect()
        return (loss, outputs) if return_outputs else loss


def distilled_b(run) -> None:
    run.trainer_class = type("Distilled", (Distilled,), {"teacher": make_teacher(run)})


@bug(
    "wrong_gradient wrong_loss_target",
    "labels and loss",
    "divergence of probabilities where their logarithms belong",
    "microsoft/ProDA#43",
    Setting(steps=60, block=64, change=distilled_b),
)
def distillation_without_log(run):
    """The distillation loss is given the student's probabilities, and `kl_div` takes their logarithms."""
    changed = {"of_student": staticmethod(F.softmax), "effect": staticmethod(run.took_effect)}
    run.trainer_class = type("Distilled", (run.trainer_class,), changed)


def noisy(run) -> None:
    run.arguments["neftune_noise_alpha"] = 5.0


@bug(
    "",
    "data",
    "embedding noise not scaled by the length",
    "seen in own NEFTune hooks",
    Setting(steps=60, block=64, change=noisy),
)
def noise_without_scale(run):
    """An own NEFTune hook divides the noise by the root of the width and forgets the length of the rows."""
    run.arguments["neftune_noise_alpha"] = None

    def add_noise(module, inputs, output):
        if not module.training:
            return output
        run.took_effect()
        bound = 5.0 / output.shape[-1] ** 0.5
        return output + torch.empty_like(output).uniform_(-bound, bound)

    run.model.get_input_embeddings().register_forward_hook(add_noise)
