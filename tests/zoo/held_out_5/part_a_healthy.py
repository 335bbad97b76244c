"""Healthy runs of part A: unusual, and right."""

import copy

import numpy as np
import torch
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, default_data_collator

from tests.zoo.held_out_5.part_a_shared import (
    OwnLossTrainer,
    evaluate_average,
    freeze_embeddings,
    lora_on_head_too,
    lora_with_trained_head,
    muon_beside_adamw,
    rows_in_order,
    sgd_with_momentum,
    short_rows_first,
    thaw_gradually,
)
from tests.zoo.run import Run
from tests.zoo.setting import Setting

# --- own losses


def z_loss(run: Run) -> None:
    """1e-4 of the squared log of the normalizer is added, as PaLM does."""

    class WithZ(OwnLossTrainer):
        def token_losses(self, model, logits, targets):
            return super().token_losses(model, logits, targets) + 1e-4 * logits.logsumexp(-1).square()

    run.trainer_class = WithZ


def focal_loss(run: Run) -> None:
    """Tokens that are known already weigh less: (1 - p)^1."""

    class Focal(OwnLossTrainer):
        def token_losses(self, model, logits, targets):
            losses = super().token_losses(model, logits, targets)
            return (1 - torch.exp(-losses)) * losses if model.training else losses

    run.trainer_class = Focal


def mean_teacher(run: Run) -> None:
    """A tenth of the loss pulls towards the predictions of an average of the weights, which follows the model."""
    teacher = copy.deepcopy(run.model).eval().requires_grad_(False)

    class Distills(OwnLossTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            with torch.no_grad():
                self.guide = teacher(input_ids=inputs["input_ids"]).logits[:, :-1].log_softmax(-1)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        def token_losses(self, model, logits, targets):
            own = super().token_losses(model, logits, targets)
            pulled = F.kl_div(logits.log_softmax(-1), self.guide, log_target=True, reduction="none").sum(-1)
            return 0.9 * own + 0.1 * pulled

    class Follows(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                for mean, p in zip(teacher.parameters(), model.parameters(), strict=True):
                    mean.lerp_(p, 0.1)

    run.trainer_class = Distills
    run.callbacks.append(Follows())


def second_next_token_head(run: Run) -> None:
    """An auxiliary head of its own predicts the token after the next; its loss is added with weight 0.2."""
    torch.manual_seed(1)
    head = torch.nn.Linear(run.model.config.hidden_size, run.setting.vocabulary, bias=False)
    torch.nn.init.normal_(head.weight, std=0.02)
    parameters = [*run.model.parameters(), *head.parameters()]
    run.optimizers = (torch.optim.AdamW(parameters, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1), None)

    class TwoHeads(OwnLossTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            if not model.training:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            outputs = model(**inputs, num_items_in_batch=num_items_in_batch, output_hidden_states=True)
            logits = head(outputs.hidden_states[-1][:, :-2])
            far = F.cross_entropy(logits.flatten(0, 1), inputs["labels"][:, 2:].flatten())
            loss = outputs.loss + 0.2 * far
            return (loss, outputs) if return_outputs else loss

    class ZeroesHead(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            head.zero_grad()

    run.trainer_class = TwoHeads
    run.callbacks.append(ZeroesHead())


# --- optimizers and schedules


def sign_momentum(run: Run) -> None:
    """Lion."""

    class Lion(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in (p for p in group["params"] if p.grad is not None):
                    mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                    p.mul_(1 - group["lr"] * 0.3).sub_(group["lr"] * (0.9 * mean + 0.1 * p.grad).sign())
                    mean.lerp_(p.grad, 0.01)

    run.optimizers = (Lion(run.model.parameters(), {"lr": 2e-3}), None)


def slower_towards_the_input(run: Run) -> None:
    """Each layer learns at 0.8 of the rate of the one above it; biases and norms have no decay."""
    depth, groups = len(run.model.model.layers), []
    for name, p in run.model.named_parameters():
        place = int(name.split(".")[2]) if ".layers." in name else (-1 if "embed" in name else depth)
        decay = 0.1 if p.ndim == 2 else 0.0
        groups.append({"params": [p], "lr": 3e-3 * 0.8 ** (depth - 1 - min(place, depth - 1)), "weight_decay": decay})
    run.optimizers = (torch.optim.AdamW(groups, betas=(0.9, 0.95)), None)


def inverse_root_with_cooldown(run: Run) -> None:
    """An own schedule: inverse square root, and linear to zero in the last quarter."""
    steps = run.setting.steps
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1)

    def factor(step):
        rate = min(step / 10, (10 / max(step, 1)) ** 0.5)
        return rate * min(1.0, (steps - step) / (steps / 4))

    run.optimizers = (optimizer, LambdaLR(optimizer, factor))


# --- data


def left_padding_with_positions(run: Run) -> None:
    """The own collator pads on the left, masks the padding and counts positions from the first token."""

    def collate(rows):
        moved = []
        for row in rows:
            padding = len(row["input_ids"]) - int(row["attention_mask"].sum())
            row = {name: value.roll(padding) for name, value in row.items()}
            moved.append({**row, "position_ids": (row["attention_mask"].cumsum(-1) - 1).clamp(min=0)})
        return default_data_collator(moved)

    run.collator = collate


def trimmed_to_longest(run: Run) -> None:
    """The own collator cuts each batch to its longest row."""

    def collate(rows):
        batch = default_data_collator(rows)
        longest = int(batch["attention_mask"].sum(-1).max())
        return {name: value[:, :longest] for name, value in batch.items()}

    run.collator = collate


def masks_some_inputs(run: Run) -> None:
    """A tenth of the input tokens is replaced by random ones (the labels are not), which regularizes."""
    generator = torch.Generator().manual_seed(4)

    def collate(rows):
        batch = default_data_collator(rows)
        ids = batch["input_ids"]
        drawn = torch.randint(1, 256, ids.shape, generator=generator)
        replaced = torch.rand(ids.shape, generator=generator) < 0.1
        return {**batch, "input_ids": torch.where(replaced, drawn, ids), "labels": batch["labels"]}

    run.collator = collate


def own_order(run: Run) -> None:
    """Shuffled once, by the user, and then read in that order."""
    rows_in_order(run, np.random.default_rng(3).permutation(len(run.train_dataset)))


CHECKPOINTED = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
WSD = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 15}}
RESTARTS = {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 3}}
S = Setting(steps=60)
PROMPTS = S.changed(rows="prompts")
HEALTHY = {
    "z_loss_of_palm": S.changed(change=z_loss),
    "focal_loss_on_completions": PROMPTS.changed(change=focal_loss, evaluate_every=20),
    "mean_teacher_distillation": S.changed(change=mean_teacher),
    "second_next_token_as_auxiliary": S.changed(change=second_next_token_head),
    "label_smoothing_of_stock_class": S.changed(rows="padded", arguments={"label_smoothing_factor": 0.1}),
    "neftune_on_prompts": PROMPTS.changed(arguments={"neftune_noise_alpha": 5.0}),
    "muon_beside_adamw_on_qwen3": S.changed(family="qwen3", change=muon_beside_adamw),
    "nesterov_without_clipping": S.changed(change=sgd_with_momentum, arguments={"max_grad_norm": 0.0}),
    "sign_momentum_of_lion": S.changed(change=sign_momentum),
    "adafactor_of_trainer": S.changed(arguments={"optim": "adafactor", "learning_rate": 1e-2}),
    "layerwise_learning_rates": S.changed(family="olmo2", change=slower_towards_the_input),
    "inverse_root_and_cooldown": S.changed(change=inverse_root_with_cooldown),
    "stable_rate_then_decay": S.changed(arguments=WSD),
    "cosine_in_three_cycles": S.changed(steps=90, arguments=RESTARTS),
    "hot_start_that_recovers": S.changed(steps=90, arguments={"learning_rate": 2e-2, "warmup_steps": 2}),
    "adapters_and_trained_head": PROMPTS.changed(family="qwen2", change=lora_with_trained_head),
    "adapters_on_head_too": PROMPTS.changed(family="qwen2", change=lora_on_head_too),
    "frozen_embedding_checkpointed": PROMPTS.changed(family="qwen2", change=freeze_embeddings, arguments=CHECKPOINTED),
    "thawed_layer_by_layer": PROMPTS.changed(change=thaw_gradually),
    "average_is_evaluated": S.changed(evaluate_every=10, change=evaluate_average),
    "dropout_checkpointed_resumed": S.changed(family="gpt2", save_at=30, arguments=CHECKPOINTED),
    "resumed_within_accumulation_of_five": S.changed(batch=3, accumulation=5, save_at=25),
    "left_padded_right": S.changed(family="gpt2", rows="padded", change=left_padding_with_positions),
    "batches_cut_to_longest": PROMPTS.changed(change=trimmed_to_longest, accumulation=3, batch=4),
    "random_tokens_in_input": S.changed(change=masks_some_inputs),
    "short_rows_before_long": S.changed(rows="padded", change=short_rows_first),
    "own_shuffled_order": S.changed(change=own_order),
    "french_in_sixteen_passes": S.changed(steps=80, text="french", passes=16),
    "untied_moe_of_code": S.changed(family="qwen3_moe", text="code", rows="documents", passes=2),
    "bf16_autocast_with_two_ranks": S.changed(steps=40, ranks=2, batch=4, arguments={"bf16": True}),
    "prompts_accumulated_on_two_ranks": PROMPTS.changed(steps=40, ranks=2, batch=2, accumulation=3),
    "gemma3_in_documents": S.changed(family="gemma3_text", rows="documents"),
    "mamba2_with_long_warmup": S.changed(family="mamba2", arguments={"warmup_steps": 30, "learning_rate": 5e-3}),
}
