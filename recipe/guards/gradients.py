"""Follows the gradient of one parameter or two: what each micro-batch adds to it, and what the step is taken with."""

import math
from collections.abc import Sequence

import torch
from torch.distributed.tensor import DTensor

from recipe.guards.finding import Finding
from recipe.guards.thresholds import CLIPPED_AWAY, GRADIENT_ERROR, MOVING_ELEMENTS, UNCLIPPED
from recipe.guards.updates import LOW_PRECISION, Parameters, sample


class GradientWatch:
    """Hears a hook at the last of the smallest trainable parameters, mostly the norm before the head: a few hundred
    numbers, which lie outside of layers that are computed again. `of_matrices`: at a sample of the smallest matrix,
    which other code may accumulate (fused kernels, gradients in fp32)."""

    def __init__(self, parameters: Parameters, of_matrices: bool = False):
        usable = [(n, p) for n, p in parameters if p.requires_grad and not isinstance(p, DTensor)]
        usable = [(n, p) for n, p in usable if p.numel() >= MOVING_ELEMENTS and (p.dim() > 1 or not of_matrices)]
        self.of_matrices = of_matrices
        self.name, self.parameter = min(reversed(usable), key=lambda each: each[1].numel(), default=("", None))
        self.is_listening = False
        self._left: torch.Tensor | None = None  # the parameter as the last step left it ...
        self._next_step = -1  # ... and the step that is to find it so
        self._taken: torch.Tensor | None = None  # the gradient that the last step was taken with
        self._reset()
        self._hook = self.parameter.register_hook(self._hear) if self.parameter is not None else None

    @property
    def is_low(self) -> bool:
        return self.parameter is not None and self.parameter.dtype in LOW_PRECISION

    def _reset(self) -> None:
        self._sum: torch.Tensor | None = None
        self._unclipped: torch.Tensor | None = None
        self._heard = 0

    def close(self) -> None:
        if self._hook is not None:
            self._hook.remove()

    def _hear(self, gradient: torch.Tensor) -> None:
        if self.is_listening:
            gradient = sample(gradient).float()
            self._sum = gradient.clone() if self._sum is None else self._sum + gradient
            self._heard += 1

    def before_clip(self) -> None:
        self._unclipped = self._gradient().clone() if self.parameter is not None else None

    def after_step(self, step: int) -> None:
        """`step`: optimizer steps before this one."""
        self._left = sample(self.parameter).clone() if self.parameter is not None else None
        self._next_step = step + 1

    def take(self, num_micro_batches: int, step: int) -> torch.Tensor | None:
        """Norms on the device, float32 `[6]`: of the sum heard, of its difference from the gradient before clipping,
        of that gradient, of the one that the step is taken with, of what the parameter has changed since the last
        step, and of the difference less the gradient of the last step. None where backward did not come once in each
        micro-batch."""
        heard, total, before, last = self._heard, self._sum, self._unclipped, self._taken
        self._reset()
        if self.parameter is None or heard != num_micro_batches or total is None:
            return None
        now = self._gradient()
        before = now if before is None else before
        is_next = self._left is not None and step == self._next_step
        changed = (sample(self.parameter) - self._left).float() if is_next else torch.zeros_like(now)
        self._taken = now.clone()
        rest = before - total if last is None else before - total - last
        parts = (total, before - total, before, now, changed, rest)
        return torch.stack([torch.linalg.vector_norm(part) for part in parts])

    def _gradient(self) -> torch.Tensor:
        gradient = self.parameter.grad
        return sample(self.parameter if gradient is None else gradient).float() * (gradient is not None)


def check_sum(
    step: int, tokens_seen: int, name: str, norms: Sequence[float], num_micro_batches: int, is_low: bool
) -> Finding | None:
    """`norms`: of `GradientWatch.take`. The gradient at the step is the sum of what its micro-batches gave, in fp32
    bit for bit. `is_low`: summed in half precision, which rounds.

    Information where it may be on purpose: one micro-batch's gradient, changed into something else than nothing or
    its sum with the last step's (a filter); or all of it scaled.
    """
    total, error, before, _, _, rest = norms
    largest = max(total, before)
    limit = GRADIENT_ERROR[is_low]
    if not math.isfinite(largest + error) or error <= limit * largest:  # other guards name what is not finite
        return None
    is_scaled = before > 0 and abs(error - abs(before - total)) <= limit * largest
    is_filtered = num_micro_batches == 1 and before > 0 and rest > limit * largest
    if num_micro_batches > 1:
        cause = "zero_grad or an optimizer step between the micro-batches of one step"
    else:
        cause = "gradients of the step before were not set to zero" if before else "the gradient was dropped"
    return Finding(
        "accumulation_mismatch",
        "info" if is_scaled or is_filtered else "warning",
        step,
        tokens_seen,
        found=f"the gradient of {name} at the step differs from the sum of its {num_micro_batches} micro-batches by "
        f"{error / largest:.0%}",
        expected="the same",
        likely_causes=(cause, "gradients are changed or dropped after backward"),
        action="zero the gradients once, after each optimizer step, and step once in a window",
        evidence={"sum": total, "difference": error, "at_step": before, "micro_batches": num_micro_batches},
    )


def check_dropped(step: int, tokens_seen: int, norms: Sequence[float]) -> Finding | None:
    """A gradient that is not finite, and the step is taken without it."""
    total, _, before, now, *_ = norms
    if math.isfinite(total) or not (math.isfinite(before) and math.isfinite(now)):
        return None
    return Finding(
        "loss_not_finite",
        "error",
        step,
        tokens_seen,
        found="a micro-batch's gradient is not finite, and it was dropped before the step",
        expected="finite",
        likely_causes=("a loss that is not finite, hidden by the training step",),
        action="look at the batches of this step; the loss that is logged is not theirs",
        evidence={"at_step": before},
    )


def check_clipped(
    step: int, tokens_seen: int, norm: float | None, max_norm: float, norms: Sequence[float]
) -> Finding | None:
    """`norm`: of all gradients, as clipping measured it. Clipping scales every gradient by `max_norm / norm`."""
    before, now = norms[2], norms[3]
    if norm is None or max_norm <= 0 or not norm > UNCLIPPED * max_norm or not before > 0:
        return None
    wanted, done = max_norm / norm, now / before
    if not done > UNCLIPPED * wanted:
        return None
    return Finding(
        "grad_norm_off",
        "warning",
        step,
        tokens_seen,
        found=f"gradients of norm {norm:.3g} were scaled by {done:.3g}",
        expected=f"by {wanted:.3g}, to max_grad_norm {max_norm:g}",
        likely_causes=("clipping measures the norm and changes nothing", "another limit than the one asked for"),
        action="compare a parameter's gradient before and after clip_grad_norm_",
        evidence={"grad_norm": norm, "max_grad_norm": max_norm, "scaled_by": done},
    )


def check_clipped_norm(
    step: int, tokens_seen: int, norm: float | None, max_norm: float, clipped_norm: float
) -> Finding | None:
    """`clipped_norm`: of all gradients after clipping, which leaves the smaller of `norm` and `max_norm`. Somewhat
    less may be on purpose (a limit for each parameter besides); next to nothing is no step."""
    if norm is None or max_norm <= 0 or not clipped_norm < CLIPPED_AWAY * min(norm, max_norm):
        return None
    return Finding(
        "grad_norm_off",
        "warning",
        step,
        tokens_seen,
        found=f"gradients of norm {norm:.3g} were clipped to {clipped_norm:.3g}",
        expected=f"to {min(norm, max_norm):.3g}",
        likely_causes=("gradients were clipped while they were multiplied by a loss scale, and divided by it after",),
        action="unscale the gradients before clip_grad_norm_",
        evidence={"grad_norm": norm, "max_grad_norm": max_norm, "clipped_norm": clipped_norm},
    )
