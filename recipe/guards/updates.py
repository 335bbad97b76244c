"""Measures gradients and updates on the device, in few small tensors, so that they are copied without waiting."""

import math
from collections.abc import Callable

import torch
from torch.distributed.tensor import DTensor

from recipe.guards.gradients import local, sample
from recipe.guards.run import LOW_PRECISION, Parameters

# The first steps with a rate above MOVING_RATE are measured. Zero-initialised projections and LoRA hide gradients for
# a step or two; routing finds every expert. Chosen, not measured.
FIRST_STEPS = 8
# Derived: below it a step may be too small for a float32 weight of 1.0 (half its spacing is 3e-8).
MOVING_RATE = 1e-6
# Derived: above it a gradient is not damped by Adam's epsilon of 1e-8. A power of two: exact in float32.
PLAIN_GRADIENT = 2.0**-20
# Of the learning rate. Derived: Adam's first step moves each element against its gradient by the rate; an epsilon 20
# times the gradient leaves a twentieth of it.
SMALL_UPDATE = 0.05
# An element is judged where the rates of the window add up to this many of its spacings. Adam's steps are at most the
# rate and change sign now and then, so the exact sum is a fifth of it at worst: one spacing, which stochastic rounding
# and Kahan summation bring to the weights.
LOST_SPACINGS = 5

Samples = dict[str, torch.Tensor]


def is_partial(parameter: torch.Tensor) -> bool:
    """Sharded (FSDP2, tensor parallel), without memory, or emptied by DeepSpeed's ZeRO 3."""
    return isinstance(parameter, DTensor) or parameter.is_meta or parameter.numel() == 0


def shorten(name: str, width: int = 24) -> str:
    """The end of a parameter's name, which tells it from others."""
    return name if len(name) <= width else "…" + name[1 - width :]


def stack(values: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([value.to(values[0].device, non_blocking=True) for value in values])


# --- samples: up to taps.PER_TENSOR elements of each parameter, copied, on its device


def sample_once(known: Samples, parameters: Parameters) -> Samples:
    """`known`: `LocalStep.weights_before` or `weights_after`, with what other guards sampled in this step."""
    for name, parameter in parameters:
        if name not in known:
            known[name] = sample(parameter).clone()
    return {name: known[name] for name, _ in parameters}


def sample_gradients(parameters: Parameters) -> Samples:
    """Of the same elements; zeros where a parameter has none."""
    pairs = [(name, p, p.grad) for name, p in parameters]
    return {name: torch.zeros_like(sample(p)) if g is None else sample(g).clone() for name, p, g in pairs}


def to_flat(samples: Samples) -> torch.Tensor:
    """float32, on the host, exact for half precision."""
    return torch.cat([torch.zeros(0), *(values.float().cpu() for values in samples.values())])


def from_flat(values: torch.Tensor, parameters: Parameters) -> Samples:
    """What `to_flat` was given. Raises where `parameters` have other sizes."""
    like = {name: sample(parameter) for name, parameter in parameters}
    parts = values.split([each.numel() for each in like.values()])
    return {name: part.to(like[name]) for name, part in zip(like, parts, strict=True)}


# --- one number for each parameter


def largest_gradients(parameters: Parameters) -> torch.Tensor:
    """The largest absolute gradient of each parameter's sampled elements; 0 only if no element at all has one.

    Where the sampled ones have none (an embedding of which they are rows not seen) it is that of all elements, cut to
    PLAIN_GRADIENT: reached, but the sample need not move.
    """
    sampled = stack([_largest(parameter, sample) for _, parameter in parameters])
    anywhere = stack([_largest(parameter, local) for _, parameter in parameters])
    return torch.where(sampled > 0, sampled, anywhere.clamp(max=PLAIN_GRADIENT))


def _largest(parameter: torch.nn.Parameter, part: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    if parameter.grad is None or part(parameter.grad).numel() == 0:
        return torch.zeros((), device=parameter.device)
    return torch.linalg.vector_norm(part(parameter.grad), math.inf, dtype=torch.float32)


def have_moved(before: Samples, after: Samples) -> torch.Tensor:
    """Whether any sampled element of each parameter differs."""
    return stack([(after[name] != before[name]).any() for name in before])


# --- two counts over all parameters


def count_small(before: Samples, after: Samples, gradients: Samples, rates: dict[str, float | None]) -> torch.Tensor:
    """`[small, judged, uphill]` elements: `judged` have a gradient; of these a step did not move `small` ones against
    it by SMALL_UPDATE of their learning rate, and moved `uphill` ones along it by as much. `rates`: by parameter; 0
    and None (on a device) are not judged."""
    counts = [torch.zeros(3, dtype=torch.int64, device=next(iter(before.values())).device)]
    for name, gradient in gradients.items():
        if rate := rates[name]:
            judged = (gradient != 0) & gradient.isfinite()  # such a step may not be applied
            descent, least = (before[name] - after[name]) * gradient.sign(), SMALL_UPDATE * rate
            parts = (judged & (descent < least), judged, judged & (descent <= -least))
            counts.append(torch.stack([part.sum() for part in parts]))
    return stack(counts).sum(0)


def count_moved(before: Samples, gradients: Samples, parameters: Parameters, rate_sum: float) -> torch.Tensor:
    """`[moved, judged]` elements of `parameters` in low precision, since `before`.

    Judged are elements with a gradient that `rate_sum` (the learning rates of these steps, added) should have moved,
    by an optimizer whose steps are of the size of its rate (Adam and its kin, Lion, Adafactor; not SGD).
    """
    counts = [torch.zeros(2, dtype=torch.int64, device=parameters[0][1].device)]
    for name, parameter in parameters:
        if parameter.dtype in LOW_PRECISION:
            old = before[name]
            judged = (gradients[name] != 0) & (_spacing(old) * LOST_SPACINGS <= rate_sum)
            counts.append(torch.stack([(judged & (sample(parameter) != old)).sum(), judged.sum()]))
    return stack(counts).sum(0)


def _spacing(values: torch.Tensor) -> torch.Tensor:
    """The distance to the next number in the values' dtype. Too large for zeros: they move in any precision."""
    _, exponent = torch.frexp(values.float())
    return torch.ldexp(torch.full_like(values, torch.finfo(values.dtype).eps, dtype=torch.float32), exponent - 1)
