"""Bugs of part A: precision, own losses, fine-tuning, gradient checkpointing."""

import torch
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback

from tests.zoo.bug import bug
from tests.zoo.held_out_5.part_a_shared import lora_on_head_too, lora_with_trained_head
from tests.zoo.rows import IGNORED
from tests.zoo.run import Run
from tests.zoo.setting import Setting

PLAIN = Setting(steps=60)


@bug(
    "grad_norm_off lost_updates",
    "precision",
    "clipping before the loss scale is undone",
    "Lightning-AI/pytorch-lightning#9599",
    PLAIN,
)
def clips_while_loss_scale_is_on(run: Run):
    """The gradients are clipped while they still carry the loss scale of 2^20, and are then divided by it."""
    scale = 2.0**20
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)

    class ScaledLoss(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
            self.accelerator.backward(loss * scale)
            return loss.detach()

    def unscale(optimizer, args, kwargs):
        run.took_effect()
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.div_(scale)

    optimizer.register_step_pre_hook(unscale)
    run.optimizers, run.trainer_class = (optimizer, None), ScaledLoss


@bug(
    "wrong_gradient lost_updates",
    "precision",
    "half-precision gradients without a loss scale",
    "engichang1467/Open-Rig3R#35",
    PLAIN.changed(family="qwen3", rows="padded"),
)
def half_precision_backward_without_scaler(run: Run):
    """Gradients between layers pass through fp16 without a loss scale: below 6e-5 they become zero."""

    def flush(grad):
        run.took_effect()
        half = grad.half().float()
        return torch.where(half.abs() < 2.0**-14, 0.0, half)

    def on_output(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(flush)

    for layer in run.model.model.layers:
        layer.register_forward_hook(on_output)


@bug(
    "reference_mismatch lost_updates wrong_gradient",
    "precision",
    "a cached low-precision copy of the weights that is refreshed too seldom",
    "NVIDIA/Megatron-LM#6965",
    PLAIN.changed(family="qwen2"),
)
def cached_low_precision_weights_go_stale(run: Run):
    """The linear layers compute with a bf16 copy of their weights that is made again only every tenth call."""

    def make(linear):
        cache = {"calls": 0, "copy": None}

        def forward(hidden):
            if cache["calls"] % 10 == 0:
                cache["copy"] = linear.weight.detach().bfloat16().float()
            cache["calls"] += linear.training
            run.took_effect()
            return F.linear(hidden, linear.weight + (cache["copy"] - linear.weight).detach(), linear.bias)

        return forward

    for layer in run.model.model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                module.forward = make(module)


class ChunkedLoss(torch.autograd.Function):
    """The sum of cross-entropies over chunks of the tokens, whose gradients are made in forward."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, size):
        total, of_hidden = hidden.new_zeros(()), []
        for part, target in zip(hidden.split(size), targets.split(size), strict=True):
            with torch.enable_grad():
                part, head = part.detach().requires_grad_(), weight.detach().requires_grad_()
                loss = F.cross_entropy(part @ head.T, target, ignore_index=IGNORED, reduction="sum")
                grad, of_weight = torch.autograd.grad(loss, (part, head))
            total += loss.detach()
            of_hidden.append(grad)
        ctx.save_for_backward(torch.cat(of_hidden), of_weight)
        return total

    @staticmethod
    def backward(ctx, grad):
        of_hidden, of_weight = ctx.saved_tensors
        return grad * of_hidden, grad * of_weight, None, None


@bug(
    "wrong_gradient",
    "labels and loss",
    "the head's gradient is that of the last chunk",
    "seen in hand-written chunked losses; a review of linkedin/Liger-Kernel#1222 is about that line",
    PLAIN.changed(family="qwen3", rows="prompts"),
)
def chunked_loss_overwrites_head_gradient(run: Run):
    """The loss is computed in chunks, and each overwrites the head's gradient instead of adding to it."""

    class OwnLoss(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            hidden = model.model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
            targets = inputs["labels"][:, 1:].flatten()
            run.took_effect()
            total = ChunkedLoss.apply(hidden[:, :-1].flatten(0, 1), model.lm_head.weight, targets, 128)
            return total / num_items_in_batch

    run.trainer_class = OwnLoss


@bug(
    "frozen_parameters wrong_loss_target",
    "labels and loss",
    "a loss that goes around the head's adapter",
    "trl#5676",
    Setting(steps=60, family="qwen2", rows="prompts", change=lora_on_head_too),
)
def own_loss_bypasses_adapter_of_head(run: Run):
    """A memory-saving loss multiplies by lm_head.weight, which leaves out the head's LoRA adapter."""

    class OwnLoss(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            base = model.base_model.model
            hidden = base.model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
            logits = F.linear(hidden[:, :-1], base.lm_head.weight)
            targets = inputs["labels"][:, 1:]
            run.took_effect()
            total = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="sum")
            return total / num_items_in_batch

    run.trainer_class = OwnLoss


@bug(
    "frozen_parameters",
    "optimizer and schedule",
    "an adapter that stays merged",
    "seen in export callbacks; trl#2873 moves the unmerging in such a one",
    Setting(steps=80, family="qwen2", rows="prompts", change=lora_with_trained_head),
    onset=15,
)
def export_leaves_adapter_merged(run: Run):
    """A callback merges the LoRA adapter for an export and never unmerges it: only the head trains."""

    class Exports(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 15:
                model.merge_adapter()
            if state.global_step >= 15:
                run.took_effect()

    run.callbacks.append(Exports())
