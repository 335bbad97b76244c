"""Bugs of labels, attention, positions, data, tokens and accumulation, in a stock Trainer or in one's own loss."""

import copy

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Trainer

from tests.zoo.bug import bug
from tests.zoo.models import EOS, make_model
from tests.zoo.rows import IGNORED, make_rows
from tests.zoo.setting import Setting

STEPS = 60


def token_losses(logits, ids):
    """`[rows, tokens - 1]`: the loss of each token but the first."""
    return F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), ids[:, 1:], reduction="none")


# --- own losses: the healthy trainers


class MaskedLoss(Trainer):
    """Scores the tokens that have a label; a mean of the micro-batch."""

    loss_is_scaled_for_ga = False

    def scored(self, labels):
        return labels != IGNORED

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        mask = self.scored(inputs["labels"][:, 1:])
        loss = (token_losses(outputs.logits, inputs["input_ids"]) * mask).sum() / mask.sum()
        return (loss, outputs) if return_outputs else loss


class Distilled(Trainer):
    """Mostly the divergence from a teacher's distribution, and the loss of the labels."""

    loss_is_scaled_for_ga = False

    def __init__(self, teacher, **kwargs):
        super().__init__(**kwargs)
        self.teacher = teacher.eval().requires_grad_(False)

    def student_logs(self, logits):
        return F.log_softmax(logits, dim=-1)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        with torch.no_grad():
            probabilities = F.softmax(self.teacher(input_ids=inputs["input_ids"]).logits, dim=-1)
        divergence = F.kl_div(self.student_logs(outputs.logits), probabilities, reduction="sum")
        loss = 0.2 * outputs.loss + 0.8 * divergence / inputs["labels"].numel()
        return (loss, outputs) if return_outputs else loss


class ZLoss(Trainer):
    """PaLM's auxiliary loss: keeps the normalizer of the softmax near 1."""

    loss_is_scaled_for_ga = False

    def reduced(self, squares):
        return squares.mean()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = outputs.loss + 1e-3 * self.reduced(outputs.logits.logsumexp(-1).square())
        return (loss, outputs) if return_outputs else loss


def masked_loss(run):
    run.trainer_class = MaskedLoss


def z_loss(run):
    run.trainer_class = ZLoss


def distilled(run):
    """The teacher is a model that was trained on the same kind of text before."""
    teacher = make_model(run.setting)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
    rows = torch.stack([row["input_ids"] for row in make_rows(run.setting)])[:480]
    for ids in rows.split(8):
        teacher(input_ids=ids, labels=ids).loss.backward()
        optimizer.step(), optimizer.zero_grad()
    run.trainer_class = type("DistilledHere", (Distilled,), {"__init__": _with_teacher(teacher)})


def _with_teacher(teacher):
    return lambda self, **kwargs: Distilled.__init__(self, teacher, **kwargs)


def left_padded(run):
    """Padding before the text, and positions that count from the text's first token."""
    for row in [*run.train_dataset, *run.eval_dataset]:
        shift = int((row["attention_mask"] == 0).sum())
        for name in ("input_ids", "attention_mask", "labels"):
            row[name] = row[name].roll(shift)
        row["position_ids"] = (row["attention_mask"].cumsum(0) - 1).clamp(min=0)


# --- labels and loss


@bug(
    "wrong_loss_target padding_is_target",
    "labels and loss",
    "the mask of an own loss is inverted",
    "QwenAudio/CosyVoice#1449",
    Setting(rows="prompts", steps=STEPS, change=masked_loss),
)
def own_mask_inverted(run):
    """An own loss keeps the tokens that were to be ignored (prompt and padding) and drops the others."""

    class Inverted(MaskedLoss):
        def scored(self, labels):
            run.took_effect()
            return labels == IGNORED

    run.trainer_class = Inverted


@bug(
    "wrong_loss_target loss_off_reference wrong_gradient init_loss_off",
    "labels and loss",
    "a softmax over the wrong dimension",
    "uta-smile/TCL#12",
    Setting(steps=STEPS, change=distilled),
)
def student_softmax_over_positions(run):
    """A distillation loss normalizes the student's logits over the tokens of the row, not over the vocabulary."""

    def student_logs(self, logits):
        run.took_effect()
        return F.log_softmax(logits, dim=1)

    run.trainer_class = type("OverPositions", (run.trainer_class,), {"student_logs": student_logs})


@bug(
    "loss_off_reference init_loss_off",
    "labels and loss",
    "an auxiliary loss is summed where it should be averaged",
    "seen in own z-loss code; neuralmagic/sparseml#592 is the same mistake in a distillation loss",
    Setting(steps=STEPS, change=z_loss),
)
def z_loss_summed(run):
    """The z-loss is a sum over the batch's tokens instead of their mean, and outweighs the loss of the labels."""

    def reduced(self, squares):
        run.took_effect()
        return squares.sum()

    run.trainer_class = type("Summed", (ZLoss,), {"reduced": reduced})


# --- attention and positions


@bug(
    "non_causal_attention",
    "attention and positions",
    "a 4D float mask of ones and zeros",
    "huggingface/transformers#46458",
    Setting(text="templates", steps=100),
)
def float_mask_of_ones(run):
    """The collator's own 4D mask is a float mask of 1 and 0, which is added to the scores and hides nothing."""
    collate = run.collator

    def collator(rows):
        batch = collate(rows)
        count, length = batch["input_ids"].shape
        batch["attention_mask"] = torch.ones(length, length).tril().expand(count, 1, -1, -1)
        run.took_effect()
        return batch

    run.collator = collator


@bug(
    "reference_mismatch row_leak",
    "attention and positions",
    "positions count the padding",
    "huggingface/transformers#33095",
    Setting(family="gpt2", text="templates", rows="padded", steps=120, change=left_padded),
)
def left_padding_without_positions(run):
    """Rows are padded on the left and have no position ids, so that learned positions count the padding."""
    for row in [*run.train_dataset, *run.eval_dataset]:
        del row["position_ids"]
        run.took_effect()


@bug(
    "reference_mismatch padding_attended",
    "attention and positions",
    "padding on the left is attended",
    "NVIDIA-NeMo/Automodel#3704",
    Setting(rows="padded", steps=STEPS, change=left_padded),
)
def padding_attended(run):
    """The mask is made by comparing with `pad_id or eos_id`; the pad id is 0, so all the left padding is attended."""
    for row in [*run.train_dataset, *run.eval_dataset]:
        row["attention_mask"] = (row["input_ids"] != (0 or EOS)).long()
        run.took_effect()


@bug(
    "reference_mismatch",
    "attention and positions",
    "a rotary base that is not the configuration's",
    "sgl-project/SpecForge#265",
    Setting(steps=STEPS, sizes={"rope_parameters": {"rope_type": "default", "rope_theta": 20.0}}),
)
def rotary_base_lost(run):
    """The model's rotary base is read under its old name, is not found, and becomes the default of 10000."""
    config = copy.deepcopy(run.model.config)
    config.rope_parameters = {"rope_type": "default", "rope_theta": getattr(config, "rope_theta", 10000.0)}
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(run.model.state_dict())
    run.model = model
    run.took_effect()


# --- data and tokens


@bug(
    "wrong_loss_target",
    "data",
    "two columns that are not of the same row",
    "seen in a pipeline that filtered one column before it joined them",
    Setting(steps=STEPS),
)
def labels_of_another_row(run):
    """An empty row was dropped from one column only, so that each row has the labels of the next one."""
    labels = [row["labels"] for row in run.train_dataset]
    for row, other in zip(run.train_dataset, labels[1:] + labels[:1], strict=True):
        row["labels"] = other
        run.took_effect()
