"""Next-token cross entropy whose logits are made chunk by chunk, so that no tensor has the size of all of them.

    model = with_chunked_loss(model)

Each chunk's logits are turned into their gradient at once, in the forward pass, as Liger and torch.nn.functional's
`linear_cross_entropy` (torch 2.13) do: the same matrix products as usual, a fraction of the memory.
"""

from functools import wraps
from types import MethodType

import torch
from torch.autograd.function import once_differentiable
from torch.nn import Linear
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from recipe.internals import forward_hooks_of

IGNORE_INDEX = -100
MORE = ("logits_to_keep", "output_hidden_states", "output_attentions")
MAX_ARGS = 5  # by position, before the labels
# Positions of a chunk. Each chunk adds to the head's gradient, which costs as much as the products of a few hundred
# positions. Measured on a CPU, chosen for a GPU: docs/model.md.
CHUNK = {"cpu": 512, "cuda": 2048}


class ChunkedCrossEntropy(torch.autograd.Function):
    """The sum over all positions: `hidden` `[positions, hidden_size]`, `weight` `[vocab_size, hidden_size]`, `targets`
    int64 `[positions]`, IGNORE_INDEX where nothing is scored. `size`: positions of a chunk, None: as suits the device.
    Matrix products in autocast's type where it is on, all else in float32. Cannot be differentiated twice."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, size=None):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        rows, head, size = hidden.to(dtype), weight.to(dtype), size or chunk_size(device)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        of_rows, of_head = [], torch.zeros_like(weight)
        for part, target in zip(rows.split(size), targets.split(size), strict=True):
            gradient, loss = _gradient_and_loss((part @ head.T).float(), target)
            total = total + loss
            gradient = gradient.to(dtype)
            of_rows.append(gradient @ head)
            of_head += gradient.T @ part
            del gradient  # before the next chunk's logits are made
        ctx.save_for_backward(torch.cat(of_rows).to(hidden.dtype), of_head)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, scale):
        rows, head = ctx.saved_tensors
        return rows * scale, head * scale, None, None


def chunk_size(device: str) -> int:
    """Positions of a chunk on a type of device."""
    return CHUNK.get(device, CHUNK["cuda"])


def _gradient_and_loss(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the sum of cross entropies, at `logits` `[positions, vocab_size]`, which is overwritten."""
    is_scored = (targets != IGNORE_INDEX).unsqueeze(1)
    chosen = targets.unsqueeze(1).where(is_scored, 0)  # of others that are no token `gather` says so
    logits -= logits.amax(dim=1, keepdim=True)
    at_target = logits.gather(1, chosen)
    sums = logits.exp_().sum(dim=1, keepdim=True)
    loss = torch.where(is_scored, sums.log() - at_target, 0.0).sum()
    return logits.mul_(is_scored / sums).scatter_add_(1, chosen, -is_scored.float()), loss


def _is_only_weight(head: torch.nn.Module) -> bool:
    """Whether calling it does nothing but multiply by its weight. The guards' own hooks only look."""
    is_plain = type(head) is Linear and head.bias is None and "forward" not in vars(head)
    return is_plain and all((hook.__module__ or "").startswith("recipe.guards") for hook in forward_hooks_of(head))


@wraps(LlamaForCausalLM.forward)
def _forward(self: LlamaForCausalLM, *args, labels=None, **kwargs):
    """Without logits where they are made for a loss in training only. A loss function that was put in the place of
    transformers' own is given all logits, as it expects; so is who asks for more than the loss. A head that is more
    than its weight, an adapter's for example, is called."""
    has_own_loss = self.loss_function is not ForCausalLMLoss or not _is_only_weight(self.lm_head)
    asked = {name: getattr(self.config, name, None) for name in MORE} | kwargs
    asks_for_more = len(args) > MAX_ARGS or any(map(asked.get, MORE)) or kwargs.get("return_dict") is False
    asks_for_more |= kwargs.get("ignore_index", IGNORE_INDEX) != IGNORE_INDEX
    if labels is None or not self.training or has_own_loss or asks_for_more:
        given = {} if labels is None else {"labels": labels}
        return LlamaForCausalLM.forward(self, *args, **given, **kwargs)
    hidden = self.model(*args, **kwargs).last_hidden_state
    targets = kwargs.get("shift_labels")
    if targets is None:
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    total = ChunkedCrossEntropy.apply(hidden.flatten(0, 1), self.lm_head.weight, targets.flatten(), self.loss_chunk)
    count = kwargs.get("num_items_in_batch")
    count = (targets != IGNORE_INDEX).sum() if count is None else count
    return CausalLMOutputWithPast(loss=total / count)


def with_chunked_loss(model: PreTrainedModel, chunk: int | None = None) -> PreTrainedModel:
    """A Llama then gives its loss in training and no logits; in evaluation, and without labels, it is as before. Other
    models stay as they are. `chunk`: positions of one; None: as suits the device."""
    if type(model) is LlamaForCausalLM and model.lm_head.bias is None:
        model.loss_chunk = chunk
        model.forward = MethodType(_forward, model)
    return model
