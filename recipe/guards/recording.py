"""One computation of the loss: what its model was given, and the gradient at what its head gave out."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import signature

import torch
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook

from recipe.guards.guard import CannotJudge
from recipe.guards.head import (
    LossTargets,
    backbone_of,
    find_head,
    target_of_hidden,
    targets_from_gradient,
    targets_from_hidden,
)

# Of the sum of probabilities from 1: bf16 rounds each to 0.4 %.
SHARES_ERROR = 0.01


def _are_shares(logits: torch.Tensor) -> bool:
    """Whether they are at least 0 and add up to 1 at each position, which logits do by no chance."""
    sums = logits.float().sum(dim=-1)
    return bool((logits >= 0).all()) and bool(((sums - 1).abs() < SHARES_ERROR).all())


@dataclass
class HeadCall:
    """One time that the head ran in a loss. `values`: the logits, or the hidden states where a fused loss makes none;
    `gradient`: of the loss there; both `[rows, positions, width]`. `ids` `[rows, positions]`: the tokens there, None
    where they are not known."""

    values: torch.Tensor
    gradient: torch.Tensor
    ids: torch.Tensor | None
    is_hidden: bool
    head: torch.nn.Module | None

    @property
    def num_classes(self) -> int:
        return self.head.weight.shape[0] if self.is_hidden else self.values.shape[-1]

    def release(self) -> None:
        """Keeps the targets alone: other probes need the memory."""
        assert self.targets is not None
        self.values = self.gradient = self.values.new_empty(len(self.values), 0, self.values.shape[-1])

    @cached_property
    def targets(self) -> LossTargets:
        if self.is_hidden:
            return targets_from_hidden(self.values, self.gradient, self.head)
        found = targets_from_gradient(self.values, self.gradient)
        return replace(found, are_shares=_are_shares(self.values[0]))

    def along(self, delta: torch.Tensor, olds: list[int], news: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """How far the gradient of a position moved in the direction of each change, and the directions' energies."""
        if not self.is_hidden:
            return (delta[olds] - delta[news]) / 2, torch.full((len(olds),), 2.0, device=delta.device)
        directions = (self.head.weight[olds] - self.head.weight[news]).detach().float()
        lengths = directions.square().sum(-1).clamp_min(1e-12)
        return directions @ delta / lengths, lengths

    def logits(self, row: int, position: int) -> torch.Tensor:
        values = self.values[row, position].float()
        if not self.is_hidden:
            return values
        bias = getattr(self.head, "bias", None)
        weight = self.head.weight.detach().float()
        return F.linear(values, weight, None if bias is None else bias.detach().float())

    def is_only(self, row: int, position: int, target: int, weight: float) -> bool:
        """Whether nothing but `target` is pulled up at a position. Label smoothing pulls all others a little."""
        if self.is_hidden:
            at = (row, slice(position, position + 1))  # `targets` may not have looked at it
            return int(target_of_hidden(self.values[at], self.gradient[at], self.head)[0]) == target
        others = self.gradient[row, position].float().clone()
        others[target] = 0.0
        return float(-others.min()) * len(others) <= weight


@dataclass(frozen=True)
class Recording:
    """One computation of a loss. `heads`: each time that the head ran and the loss depends on it. `embedded`: what all
    embeddings gave out, and the tokens that those of the model were given. `calls`: arguments of the model by name,
    each time that it ran with gradients. `shapes`: of the logits that it gave out."""

    loss: torch.Tensor
    heads: list[HeadCall]
    embedded: list[tuple[torch.Tensor | None, torch.Tensor]]
    calls: list[dict]
    shapes: list[tuple[int, ...]]

    def only(self) -> HeadCall:
        if len(self.heads) != 1:
            raise CannotJudge(self.why_no_heads() if not self.heads else f"the head runs {len(self.heads)} times")
        return self.heads[0]

    @property
    def scores_rows(self) -> bool:
        return not self.heads and any(len(shape) == 2 for shape in self.shapes)

    def why_no_heads(self) -> str:
        if not self.shapes:
            return "no logits are seen that the loss depends on"
        return f"the loss is made of other outputs than a token's logits: {self.shapes[0]}"


def record(
    model: torch.nn.Module, compute_loss: Callable, base: Recording | None = None, ids: torch.Tensor | None = None
) -> Recording:
    """Computes the loss once, and its gradient at what the head gives out.

    `compute_loss` runs `model` eagerly. With `base` it and any other model (a teacher, a reference) are given the
    embeddings that were recorded there, in the same order, whatever the tokens are. No gradient reaches a parameter,
    and the random generators are put back. `ids`: the batch's, for a model whose embedding is not seen.
    """
    devices = [parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"][:1]
    events = _Events(model, base, ids)
    with torch.random.fork_rng(devices=devices), torch.enable_grad(), events:
        loss = compute_loss()
        if loss.dim():
            loss = loss.mean()
        values, gradients = events.outputs(), []
        if values and loss.requires_grad:
            gradients = torch.autograd.grad(loss, [value for value, _ in values], allow_unused=True)
    pairs = [(value.detach(), g, ids) for (value, ids), g in zip(values, gradients, strict=False) if g is not None]
    head, is_hidden = events.head, events.are_hidden
    heads = [HeadCall(*pair, is_hidden, head) for pair in pairs]
    return Recording(loss.detach(), heads, events.embedded, events.calls, events.shapes)


class _Events:
    """What head, backbone, embedding and model are given and give out while this is open."""

    def __init__(self, model: torch.nn.Module, base: Recording | None, ids: torch.Tensor | None):
        self.model, self.base, self.ids, self.head = model, base, ids, find_head(model)
        self.embedded: list[tuple[torch.Tensor | None, torch.Tensor]] = []
        self.calls: list[dict] = []
        self.shapes: list[tuple[int, ...]] = []
        self._logits: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self._hidden: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self._hooks: list = []
        self._thread = threading.get_ident()

    def __enter__(self) -> "_Events":
        model, backbone = self.model, backbone_of(self.model)
        self._own = embeddings_of(model)
        self._hooks = [register_module_forward_hook(self._on_module)]  # a teacher is no part of the model
        self._hooks.append(model.register_forward_pre_hook(self._on_call, with_kwargs=True))
        self._hooks.append(model.register_forward_hook(self._on_output))
        if self.head is not None:
            self._hooks.append(self.head.register_forward_hook(lambda m, i, output: self._add(self._logits, output)))
        if self.head is not None and backbone is not model:
            self._hooks.append(backbone.register_forward_hook(lambda m, i, output: self._add(self._hidden, output[0])))
        return self

    def __exit__(self, *error) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def are_hidden(self) -> bool:
        return not self._logits

    def outputs(self) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        return self._logits or self._hidden

    def _add(self, kept: list, output) -> None:
        if isinstance(output, torch.Tensor) and output.dim() == 3 and output.requires_grad:
            seen = [self.ids, *(ids for ids, _ in self.embedded)]
            fit = [ids for ids in seen if ids is not None and ids.shape == output.shape[:2]]
            kept.append((output, fit[-1] if fit else None))

    def _on_module(self, module, inputs, output):
        if not isinstance(module, torch.nn.Embedding) or not inputs:
            return None
        if threading.get_ident() != self._thread:  # the hook is the process's: another Trainer's model
            return None
        place, known = len(self.embedded), self.base.embedded if self.base else []
        self.embedded.append((inputs[0].detach() if module in self._own else None, output.detach()))
        if place >= len(known) or known[place][1].shape != output.shape:
            return None
        return known[place][1] + (output - output.detach())  # with its gradient, so that the graph is the same

    def _on_call(self, module, args, kwargs) -> None:
        if torch.is_grad_enabled():
            named = zip(signature(module.forward).parameters, args, strict=False)
            self.calls.append({**dict(named), **kwargs})

    def _on_output(self, module, inputs, output) -> None:
        logits = output.get("logits") if isinstance(output, Mapping) else output
        logits = logits[0] if isinstance(logits, tuple) else logits
        if isinstance(logits, torch.Tensor):
            self.shapes.append(tuple(logits.shape))
            if self.head is None:
                self._add(self._logits, logits)


def embeddings_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that embed tokens: some encoder-decoders have several of one weight."""
    try:
        weight = model.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        return []
    return [module for module in model.modules() if isinstance(module, torch.nn.Embedding) and module.weight is weight]


def recover_loss_targets(model: torch.nn.Module, compute_loss: Callable[[], torch.Tensor]) -> LossTargets:
    """Find the targets from the loss's gradient at the logits.

    For cross entropy that gradient is `w (p - onehot(y))`: its only negative entry is the target y, an all-zero row is
    masked, and `-grad_y / (1 - p_y)` is the weight w. Where a fused loss makes no logits, the gradient at the last
    hidden state is used (`targets_from_hidden`). Raises `CannotJudge` where neither is there, or several are.
    """
    return record(model, compute_loss).only().targets
