"""Healthy runs with own losses, own masks, own optimizers and unusual data."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback

from tests.zoo.models import EOS, make_model
from tests.zoo.rows import IGNORED, make_rows
from tests.zoo.setting import Setting

STEPS = 50


def token_losses(logits, labels):
    """`[rows, tokens - 1]`: the loss of each token but the first; 0 where it has no label."""
    return F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), labels[:, 1:], reduction="none")


# --- own losses


class FocalLoss(Trainer):
    """Tokens that the model knows weigh less. Divided by the tokens of the whole step, as Trainer's loss is."""

    loss_is_scaled_for_ga = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        losses = token_losses(outputs.logits, inputs["labels"])
        weighted = (1 - (-losses.detach()).exp()) ** 2 * losses
        is_scored = inputs["labels"][:, 1:] != IGNORED
        count = is_scored.sum() if num_items_in_batch is None else num_items_in_batch
        loss = weighted.sum() / count
        return (loss, outputs) if return_outputs else loss


class EachRowTheSame(Trainer):
    """A mean of the rows' means: a short row counts as much as a long one."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        losses, is_scored = token_losses(outputs.logits, inputs["labels"]), inputs["labels"][:, 1:] != IGNORED
        loss = (losses.sum(1) / is_scored.sum(1)).mean()
        return (loss, outputs) if return_outputs else loss


class TwiceWithDropout(Trainer):
    """R-Drop: two passes with other dropout, and the divergence between them."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs, second = model(**inputs), model(**inputs)
        logs = [F.log_softmax(each.logits, dim=-1) for each in (outputs, second)]
        there, back = (F.kl_div(a, b, reduction="sum", log_target=True) for a, b in (logs, logs[::-1]))
        loss = (outputs.loss + second.loss) / 2 + 0.1 * (there + back) / inputs["labels"].numel()
        return (loss, outputs) if return_outputs else loss


class Distilled(Trainer):
    """Half the labels' loss, half the divergence from a frozen teacher at a temperature of 2."""

    loss_is_scaled_for_ga = False
    teacher = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        with torch.no_grad():
            target = F.log_softmax(self.teacher(input_ids=inputs["input_ids"]).logits / 2, dim=-1)
        own = F.log_softmax(outputs.logits / 2, dim=-1)
        divergence = F.kl_div(own, target, reduction="sum", log_target=True) / inputs["labels"].numel()
        loss = 0.5 * outputs.loss + 0.5 * 4 * divergence
        return (loss, outputs) if return_outputs else loss


class TwoTokensAhead(Trainer):
    """An added head predicts the token after the next one; it shares the model's trunk."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, output_hidden_states=True)
        logits = model.second_head(outputs.hidden_states[-1][:, :-2])
        second = F.cross_entropy(logits.flatten(0, 1), inputs["labels"][:, 2:].flatten())
        loss = outputs.loss + 0.3 * second
        return (loss, outputs) if return_outputs else loss


def focal_loss(run):
    run.trainer_class = FocalLoss


def each_row_the_same(run):
    run.trainer_class = EachRowTheSame


def twice_with_dropout(run):
    run.trainer_class = TwiceWithDropout


def distilled_from_a_teacher(run):
    teacher = make_model(run.setting)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
    for ids in torch.stack([row["input_ids"] for row in make_rows(run.setting)]).split(8)[:50]:
        teacher(input_ids=ids, labels=ids).loss.backward()
        optimizer.step(), optimizer.zero_grad()
    run.trainer_class = type("DistilledHere", (Distilled,), {"teacher": teacher.eval().requires_grad_(False)})


def two_tokens_ahead(run):
    torch.manual_seed(run.setting.seed)
    run.model.second_head = nn.Linear(run.model.config.hidden_size, run.setting.vocabulary, bias=False)
    nn.init.normal_(run.model.second_head.weight, std=0.02)
    run.trainer_class = TwoTokensAhead


# --- masks and positions


def left_padded_rows(run):
    """Padding before the text, masked, with positions that count from the text's first token."""
    for row in [*run.train_dataset, *run.eval_dataset]:
        shift = int((row["attention_mask"] == 0).sum())
        for name in ("input_ids", "attention_mask", "labels"):
            row[name] = row[name].roll(shift)
        row["position_ids"] = (row["attention_mask"].cumsum(0) - 1).clamp(min=0)


def prefix_lm(run):
    """Tokens of the prompt see the whole prompt; only what follows it is scored, and is causal."""
    for row in [*run.train_dataset, *run.eval_dataset]:
        length = len(row["input_ids"])
        is_prompt = (row["labels"] == IGNORED) & (row["attention_mask"] == 1)
        may_see = torch.ones(length, length, dtype=torch.bool).tril() | (is_prompt[:, None] & is_prompt[None])
        may_see &= (row["attention_mask"] == 1)[None] | torch.eye(length, dtype=torch.bool)
        row["attention_mask"] = may_see[None]


# --- data


def noisy_inputs(run):
    """A tenth of the tokens that the model reads are replaced; the labels are the right ones."""
    generator = torch.Generator().manual_seed(1)
    for row in run.train_dataset:
        ids = row["input_ids"]
        drawn = torch.randint(0, 256, ids.shape, generator=generator)
        row["input_ids"] = torch.where(torch.rand(ids.shape, generator=generator) < 0.1, drawn, ids)


def fill_in_the_middle(run):
    """Half of the rows: beginning, end, then the middle, with separators (bytes that no text has)."""
    generator = torch.Generator().manual_seed(1)
    for row in run.train_dataset[::2]:
        ids = row["input_ids"][:-3]
        first, second = torch.randint(1, len(ids), (2,), generator=generator).sort().values.tolist()
        marks = [torch.tensor([mark]) for mark in (1, 2, 3)]
        parts = (marks[0], ids[:first], marks[1], ids[second:], marks[2], ids[first:second])
        row["input_ids"] = row["labels"] = torch.cat(parts)


def short_rows_first(run):
    """A curriculum: rows in order of their length."""
    run.train_dataset.rows.sort(key=lambda row: int(row["attention_mask"].sum()))


def last_words_only(run):
    """Of every eighth row only the last 16 tokens are scored: an answer after a long prompt."""
    for row in run.train_dataset[::8]:
        end = int(row["attention_mask"].sum())
        row["labels"][: max(1, end - 16)] = IGNORED
        assert row["input_ids"][end - 1] == EOS


# --- optimizers and what is trained


def layer_decay(run):
    """Lower layers learn more slowly; norms without decay."""
    groups = []
    for name, parameter in run.model.named_parameters():
        depth = next((int(part) + 1 for part in name.split(".") if part.isdigit()), 0 if "embed" in name else 4)
        decay = 0.1 if parameter.dim() > 1 else 0.0
        groups.append({"params": [parameter], "lr": 4e-3 * 0.8 ** (4 - depth), "weight_decay": decay})
    run.optimizers = (torch.optim.AdamW(groups, lr=4e-3, betas=(0.9, 0.95)), None)


def only_upper_layers(run):
    """The lowest layer and the embedding stay as they are."""
    run.model.model.embed_tokens.requires_grad_(False)
    run.model.model.layers[0].requires_grad_(False)


class Average(TrainerCallback):
    """Keeps a moving average of the weights, which the run ends with."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        old = getattr(self, "weights", weights)
        self.weights = {name: old[name] * 0.8 + weights[name] * 0.2 for name in weights}

    def on_train_end(self, args, state, control, model=None, **kwargs):
        model.load_state_dict(self.weights)


def averaged(run):
    run.callbacks.append(Average())


SGD = {"optim": "sgd", "learning_rate": 0.5, "weight_decay": 0.0, "max_grad_norm": 0.0}
WSD = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 15}}
HEALTHY = {
    "focal_loss_accumulated": Setting(rows="prompts", steps=40, batch=2, accumulation=4, change=focal_loss),
    "each_row_the_same": Setting(rows="padded", steps=STEPS, batch=4, accumulation=2, change=each_row_the_same),
    "r_drop": Setting(family="gpt2", steps=40, change=twice_with_dropout),
    "distilled_from_a_teacher": Setting(steps=STEPS, change=distilled_from_a_teacher),
    "two_tokens_ahead": Setting(steps=STEPS, change=two_tokens_ahead),
    "label_smoothing": Setting(steps=STEPS, arguments={"label_smoothing_factor": 0.1}),
    "left_padded_gpt2": Setting(family="gpt2", rows="padded", steps=STEPS, change=left_padded_rows),
    "prefix_lm": Setting(rows="prompts", steps=STEPS, change=prefix_lm),
    "noisy_inputs": Setting(steps=STEPS, text="code", change=noisy_inputs),
    "fill_in_the_middle": Setting(steps=STEPS, text="code", change=fill_in_the_middle),
    "short_rows_first": Setting(rows="padded", steps=STEPS, stream=True, change=short_rows_first),
    "last_words_only": Setting(rows="padded", steps=STEPS, family="qwen3", change=last_words_only),
    "layer_decay": Setting(steps=STEPS, arguments={"lr_scheduler_type": "linear"}, change=layer_decay),
    "only_upper_layers": Setting(family="qwen3", steps=STEPS, change=only_upper_layers),
    "averaged_weights": Setting(steps=STEPS, arguments={"lr_scheduler_type": "constant"}, change=averaged),
    "sgd_accumulated": Setting(steps=STEPS, batch=4, accumulation=2, arguments=SGD),
    "wsd_resumed": Setting(steps=STEPS, save_at=25, text="russian", passes=10, arguments=WSD),
}
