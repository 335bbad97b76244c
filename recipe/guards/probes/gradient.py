"""Is what backward gives the gradient of the loss? A small step along it must change the loss by what it says, and
activation checkpointing must not change it.

The weights are never written to: others are put in their places, in float32, for as long as a loss is computed. What
backward gives goes to these, so hooks on parameters do not run.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

from recipe.guards.finding import CannotJudge, Finding
from recipe.guards.thresholds import (
    CHECKPOINTED,
    GRADIENT_FAR_OFF,
    GRADIENT_OFF,
    GRADIENT_STEP,
    REPEATED_FP32,
    SAME_SLOPE,
    SMALL,
    SMALL_MOVE,
)

DISCRETE = {"round", "sign", "floor", "ceil", "trunc", "heaviside", "topk", "argmax", "argmin", "sort", "argsort"}
Gradients = dict[Parameter, torch.Tensor]


def probe_gradient(
    model: torch.nn.Module, loss_of: Callable[[], torch.Tensor], where: dict, is_alone: bool = True
) -> Finding | None:
    """`loss_of`: a mean loss in train mode, without autocast, that draws the same random numbers at each call.
    `is_alone`: else other ranks are in step, and all call it equally often. Raises `CannotJudge` where it is not
    smooth."""
    if any(parameter.is_complex() for parameter in model.parameters()):
        raise CannotJudge("parameters are complex")
    with _checkpointing_off(model) as is_checkpointing:
        loss, gradients = _backward(model, loss_of)
    if is_checkpointing:
        again, recomputed = _backward(model, loss_of)
        gap = _largest_gap(gradients, recomputed) if _is_close(loss, again) else 0.0
        if gap > CHECKPOINTED:
            return _recomputed_wrongly(gap, where)
        del recomputed
    with _checkpointing_off(model):
        ratios = [_ratio(model, loss_of, gradients, GRADIENT_STEP * abs(loss))]
        if is_alone and abs(ratios[0] - 1) <= GRADIENT_OFF:
            return None
        ratios += [_ratio(model, loss_of, gradients, times * GRADIENT_STEP * abs(loss)) for times in (2, 0.5)]
        del gradients
        with torch.no_grad():
            losses = float(loss_of()), float(loss_of())
        with Watched() as watched:
            loss_of()
    return None if abs(ratios[0] - 1) <= GRADIENT_OFF else judge(ratios, losses, watched, where)


def _backward(model: torch.nn.Module, loss_of: Callable[[], torch.Tensor]) -> tuple[float, Gradients]:
    """By `backward`, since `torch.autograd.grad` refuses reentrant checkpointing."""
    leaves = {p: Parameter(p.detach().float()) for p in model.parameters() if p.requires_grad}
    with _placed(model, leaves):
        loss = loss_of()
        loss.backward()
    return float(loss.detach()), {p: leaf.grad for p, leaf in leaves.items() if leaf.grad is not None}


@contextmanager
def _placed(model: torch.nn.Module, values: dict[Parameter, Parameter]) -> Iterator[None]:
    places = [(m._parameters, name, p) for m in model.modules() for name, p in m._parameters.items() if p in values]
    try:
        for own, name, parameter in places:
            own[name] = values[parameter]
        yield
    finally:
        for own, name, parameter in places:
            own[name] = parameter


@contextmanager
def _checkpointing_off(model: torch.nn.Module) -> Iterator[bool]:
    """Whether it was on. By the flag of transformers' modules, so that its functions and settings stay."""
    flagged = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]
    try:
        for module in flagged:
            module.gradient_checkpointing = False
        yield bool(flagged)
    finally:
        for module in flagged:
            module.gradient_checkpointing = True


def _largest_gap(gradients: Gradients, others: Gradients) -> float:
    """Between two gradients of a parameter, relative to its norm; norms far below the whole's are mostly rounding."""
    floor = SMALL * math.hypot(*(float(gradient.norm()) for gradient in gradients.values())) or math.inf
    return max(
        (float((g - others.get(p, 0.0)).norm()) / max(float(g.norm()), floor) for p, g in gradients.items()),
        default=0.0,
    )


def _is_close(first: float, second: float) -> bool:
    return abs(first - second) <= REPEATED_FP32 * max(abs(first), abs(second))


def _ratio(model: torch.nn.Module, loss_of: Callable, gradients: Gradients, change: float) -> float:
    """How far the loss changes along the gradient, as a share of `change`, which the gradient foretells. Each tensor
    moves equally far, so that the largest gradients do not drown the others."""
    norms = {parameter: norm for parameter, gradient in gradients.items() if (norm := float(gradient.norm()))}
    slope, size = sum(norms.values()), math.hypot(*(float(p.detach().float().norm()) for p in model.parameters()))
    if not (math.isfinite(slope) and math.isfinite(change)):
        raise CannotJudge("loss or gradient is not finite")
    if not change or change * math.sqrt(len(norms)) > SMALL_MOVE * size * slope:
        raise CannotJudge("the gradient is too small: the weights would have to move far to change the loss")

    def loss_at(far: float) -> float:
        moved = {p: Parameter(torch.add(p.detach(), gradients[p], alpha=far / norm)) for p, norm in norms.items()}
        with torch.no_grad(), _placed(model, moved):
            return float(loss_of())

    return (loss_at(change / slope) - loss_at(-change / slope)) / (2 * change)


class Watched(TorchFunctionMode):
    """Notes what keeps a gradient from being that of the loss on purpose: choices and rounding, stopped gradients."""

    is_discrete = is_stopped = _in_no_grad = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        tensors = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, torch.Tensor)]
        if func is torch._C._set_grad_enabled:
            self._in_no_grad = not args[0] and (torch.is_grad_enabled() or self._in_no_grad)
        elif name.rstrip("_") in DISCRETE or name.startswith("fake_quantize"):
            self.is_discrete |= any(value.is_floating_point() for value in tensors)
        elif any(value.requires_grad for value in tensors):
            is_data = name == "__get__" and func == torch.Tensor.data.__get__
            is_without = name != "__get__" and (self._in_no_grad or torch.is_inference_mode_enabled())
            self.is_stopped |= is_without or is_data or name in ("detach", "detach_")
        return func(*args, **(kwargs or {}))


def judge(ratios: list[float], losses: tuple[float, float], watched: Watched, where: dict) -> Finding:
    """`ratios`: change of the loss to the change foretold, for steps of three sizes. `losses`: two of one state."""
    off = min(abs(ratio - 1) for ratio in ratios)
    if not _is_close(*losses):
        raise CannotJudge("the loss is another one each time")
    if watched.is_discrete:
        raise CannotJudge("the loss rounds or chooses (quantisation, routing), so it is not smooth")
    if not max(ratios) - min(ratios) <= SAME_SLOPE * off:
        raise CannotJudge("the loss is not smooth: steps of different sizes give different slopes")
    return Finding(
        "wrong_gradient",
        "info" if watched.is_stopped or off <= GRADIENT_FAR_OFF else "warning",
        **where,
        found=f"a step along the gradient changes the loss by {ratios[0]:.3f} of what the gradient says"
        + (" (gradients are stopped somewhere, perhaps on purpose)" if watched.is_stopped else ""),
        expected=f"1.000, to {GRADIENT_OFF}",
        likely_causes=(
            "a backward of your own (custom autograd function, fused loss or kernel) that does not fit its forward",
            "a hook or a detach inside the model, perhaps on purpose (scaled, reversed, clipped)",
            "an auxiliary loss that is put into backward only",
        ),
        action="replace fused or custom parts by plain PyTorch one by one, or ask torch.autograd.gradcheck about each",
        evidence={"ratios": ratios, "stops_gradients": watched.is_stopped},
    )


def _recomputed_wrongly(gap: float, where: dict) -> Finding:
    return Finding(
        "wrong_gradient",
        "warning",
        **where,
        found=f"with activation checkpointing a parameter's gradient differs by {gap:.0%} of its norm",
        expected="the gradient without, but for rounding",
        likely_causes=("dropout masks drawn anew (preserve_rng_state: False)", "a layer that changes its own state"),
        action="take preserve_rng_state out of the checkpointing arguments, or set dropout to 0",
        evidence={"gap": gap},
    )
