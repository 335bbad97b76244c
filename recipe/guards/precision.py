"""Whether the forward pass computes with the weights as they are now, where an autocast context is around the steps.

Autocast keeps its casts of the weights until the outermost context is left. One that stays open over an optimizer step
serves casts from before it (X-GenGroup/Flow-Factory PR #186), and `with torch.autocast(...): trainer.train()` serves
the first ones to the end.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional as F

from recipe.guards.batches import OnItsWay
from recipe.guards.finding import Finding
from recipe.guards.thresholds import CAST_COLUMNS, STALE_SHARE


class CastWatch:
    """Looks at one linear layer in micro-batches that begin with autocast on, so in none where each enters it anew."""

    def __init__(self, modules: Iterable[torch.nn.Module]):
        self.linear = next((module for module in modules if _is_cast(module)), None)
        self._measured: OnItsWay | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        if self.linear is None or not torch.is_autocast_enabled(self.linear.weight.device.type):
            yield
            return
        hook = self.linear.register_forward_hook(self._compare)
        try:
            yield
        finally:
            hook.remove()

    def _compare(self, module, inputs, output) -> None:
        """The layer has just been computed, so its cast is in the cache if it is kept at all: asking for it again adds
        nothing. A row of the identity gives a column of the weight, exactly."""
        weight = module.weight
        if not torch.is_grad_enabled() or not torch.is_autocast_enabled(weight.device.type):
            return
        identity = torch.eye(min(CAST_COLUMNS, weight.shape[1]), weight.shape[1], device=weight.device)
        used = F.linear(identity, weight).detach()
        now = weight.detach()[:, : len(identity)].t().to(used.dtype)
        self._measured = OnItsWay(((used != now) & used.isfinite()).float().mean())

    def take(self) -> OnItsWay | None:
        """What the last step measured."""
        measured, self._measured = self._measured, None
        return measured


def _is_cast(module: torch.nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    is_plain = type(module) is torch.nn.Linear and type(weight) is torch.nn.Parameter
    return is_plain and weight.requires_grad and weight.dtype == torch.float32


def check_casts(step: int, tokens_seen: int, stale: float) -> Finding | None:
    """`stale`: share of the elements whose cast, as the forward pass used it, is not that of the weight."""
    if stale <= STALE_SHARE:
        return None
    return Finding(
        "lost_updates",
        "error",
        step,
        tokens_seen,
        found=f"{stale:.0%} of a layer's weights are used as they were before the last updates",
        expected="the weights as they are now",
        likely_causes=("an autocast context is around several steps and keeps its casts of the weights",),
        action="leave the autocast context after each step, or use bf16=True; else torch.clear_autocast_cache()",
        evidence={"stale": stale},
    )
