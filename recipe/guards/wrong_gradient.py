"""The gradient that backward gives, against the loss: a small step along it must change the loss by what it says.

The weights are never written to: others take their places, in float32, while a loss is computed. What backward gives
goes to these, so hooks on parameters do not run.
"""

import math
import sys
from collections.abc import Callable, Iterator

import torch
from torch.autograd.function import FunctionCtx
from torch.nn import Module, Parameter
from torch.overrides import TorchFunctionMode

from recipe.guards.evaluation import MAX_DIFFERENCE_FP32
from recipe.guards.guard import PROBE, CannotJudge, Finding, Guard, Verdict
from recipe.guards.sandbox import generators_now, places_of, replaced, restore_generators, without_autocast
from recipe.internals import is_grad_switch

DISCRETE = {"round", "sign", "floor", "ceil", "trunc", "heaviside", "topk", "argmax", "argmin", "sort", "argsort"}
# Of the whole gradient's norm: below, a parameter's gradient is mostly rounding (biases of keys: all of it).
SMALL_NORM = 0.01
EPSILON = torch.finfo(torch.float32).eps
Gradients = dict[Parameter, torch.Tensor]


class WrongGradient(Guard):
    """Backward does not give the gradient of the loss: the model trains, in another direction.

    When: before step 1 and after each resume.
    Measured: on 2 rows of up to 256 positions, in fp32, with the same dropout masks each time. All tensors are moved
        along their gradients, so far that the loss should change by 0.05 % of itself. If the change is off by 2 %,
        steps of twice and half the size must agree. Warning from 5 % on; information below, and where gradients are
        stopped (`detach`, `no_grad` outside of custom functions), perhaps on purpose. A loss that is off by 5 % and is
        a bf16 number (or its sum is) was computed in bf16. With activation checkpointing a parameter must have a
        gradient where it has one without, and it may differ by 10 % of its norm.
    Try: replacing custom autograd functions, fused losses and kernels by plain PyTorch one by one;
        `torch.autograd.gradcheck` on each in float64. With checkpointing: `use_reentrant` False, and leave out
        `preserve_rng_state`. Disable the guard where a gradient is scaled, reversed or clipped inside the model on
        purpose.
    Cannot see: errors at a right angle to the gradient, and small ones (the 5 % are of all gradients together); the
        compiled model; kernels that run in half precision only; hooks on parameters. It cannot judge losses that
        differ each time, losses that round or choose (quantized weights, routing) and look wrong, and gradients near
        zero.
    """

    ids = {"wrong_gradient": "What backward gives is not the gradient of the loss."}
    # Share of the loss by which a step along the gradient should change it. Measured (21 families of the zoo in fp32,
    # new and after 30 steps on one batch, losses of 0.1 to 6.2): curvature and rounding then take 0.23 % at most, 0.9
    # % after 1,000 steps; routing 0.9 and 10 %. Under bf16 autocast rounding takes 13 %, so it is done in fp32.
    STEP = 5e-4
    # From 1, of the change to the one foretold: eight times the 0.23 % above.
    MAX_OFF = 0.02
    # Further off is no auxiliary loss of small weight in backward only. Chosen, not measured; one layer's backward
    # that is wrong for half of its elements is off by 0.06 to 0.2 (3-layer Llama).
    FAR_OFF = 0.05
    # Of that distance, between steps of three sizes: else the loss is not smooth. 30 of 31 bugs that were off had 0.05
    # and less (the other 0.5); routing (Mixtral) and rounded weights had 0.3 to 10.
    SAME_SLOPE = 0.1
    # Share of the weights' norm that a step may move them. Healthy ones need 1e-3 and less. Chosen, not measured.
    MAX_MOVE = 0.02
    # Relative, of a parameter's gradient with and without activation checkpointing. The same operations on the same
    # numbers: equal bit for bit on CPU (Mixtral's routers, reentrant: 0.006). Dropout of 0.1 drawn again: 0.6.
    MAX_RECOMPUTED_GAP = 0.1

    def probe(self, batch) -> Iterator[Verdict]:
        rows, generators = batch.short_inputs, generators_now()
        num_items = batch.count_items(rows)

        def compute_loss() -> torch.Tensor:
            restore_generators(generators)
            return batch.twin.compute_loss(batch.model, dict(rows), num_items_in_batch=num_items).mean()

        batch.model.train()
        with without_autocast(batch.model):
            known = batch.run.world_size == 1, float(1 if num_items is None else num_items)
            yield self.judge_model(batch.model, compute_loss, *known) or self.clear(check=PROBE)

    @classmethod
    def judge_model(
        cls, model: Module, compute_loss: Callable, is_alone: bool = True, num_items: float = 1.0
    ) -> Finding | None:
        """`compute_loss`: a mean loss in train mode, without autocast, that draws the same random numbers each time.
        `is_alone`: else other ranks are in step, and all call it equally often. `num_items`: which it is a mean of."""
        if any(parameter.is_complex() for parameter in model.parameters()):
            raise CannotJudge("parameters are complex")
        # By the flag of transformers' modules, so that its functions and settings stay.
        on = [(vars(m), "gradient_checkpointing") for m in model.modules() if vars(m).get("gradient_checkpointing")]
        off = [(own, name, False) for own, name in on]
        with replaced(off):
            loss, gradients = _backward(model, compute_loss)
        if on:
            again, recomputed = _backward(model, compute_loss)
            gap = _largest_gap(gradients, recomputed) if _is_close(loss, again) else 0.0
            missing = [n for n, p in model.named_parameters() if _has(gradients, p) and not _has(recomputed, p)]
            del recomputed
            if missing:
                return cls._missing(missing, sum(_has(gradients, p) for p in gradients))
            if gap > cls.MAX_RECOMPUTED_GAP:
                return cls._recomputed_wrongly(gap)
        with replaced(off):
            ratios = [cls._ratio(model, compute_loss, gradients, cls.STEP * abs(loss))]
            if is_alone and abs(ratios[0] - 1) <= cls.MAX_OFF:
                return None
            sizes = [times * cls.STEP * abs(loss) for times in (2, 0.5)]
            ratios += [cls._ratio(model, compute_loss, gradients, size) for size in sizes]
            del gradients
            with torch.no_grad():
                losses = float(compute_loss()), float(compute_loss())
            with Watched() as watched:
                compute_loss()
        return None if abs(ratios[0] - 1) <= cls.MAX_OFF else cls.judge(ratios, losses, watched, num_items)

    @classmethod
    def _ratio(cls, model: Module, compute_loss: Callable, gradients: Gradients, change: float) -> float:
        """How far the loss changes along the gradient, as a share of `change`, which the gradient foretells. Each
        tensor moves equally far, so that the largest gradients do not drown the others."""
        norms = {parameter: norm for parameter, gradient in gradients.items() if (norm := float(gradient.norm()))}
        slope, size = sum(norms.values()), math.hypot(*(float(p.detach().float().norm()) for p in model.parameters()))
        if not (math.isfinite(slope) and math.isfinite(change)):
            raise CannotJudge("loss or gradient is not finite")
        if not change or change * math.sqrt(len(norms)) > cls.MAX_MOVE * size * slope:
            raise CannotJudge("the gradient is too small: the weights would have to move far to change the loss")

        def loss_at(far: float) -> float:
            moved = {p: Parameter(torch.add(p.detach(), gradients[p], alpha=far / norm)) for p, norm in norms.items()}
            with torch.no_grad(), replaced(places_of(model, moved)):
                return float(compute_loss())

        return (loss_at(change / slope) - loss_at(-change / slope)) / (2 * change)

    @classmethod
    def judge(
        cls, ratios: list[float], losses: tuple[float, float], watched: "Watched", num_items: float = 1.0
    ) -> Finding:
        """`ratios`: change of the loss to that foretold, for steps of three sizes. `losses`: two of one state, means
        of `num_items`."""
        off = min(abs(ratio - 1) for ratio in ratios)
        if not _is_close(*losses):
            raise CannotJudge("the loss differs each time")
        if watched.is_discrete:
            raise CannotJudge("the loss rounds or chooses (quantization, routing), so it is not smooth")
        is_rounded = _is_rounded(losses[0]) or _is_rounded(losses[0] * num_items)
        if is_rounded and off > cls.FAR_OFF and not watched.is_stopped:
            return cls._rounded(losses[0])
        if not max(ratios) - min(ratios) <= cls.SAME_SLOPE * off:
            raise CannotJudge("the loss is not smooth: steps of different sizes give different slopes")
        found = f"a step changes the loss by {ratios[0]:.3f} (of what the gradient says)"
        causes = ("a wrong custom backward (for its forward)", "a hook or a detach inside the model")
        causes += ("an auxiliary loss that is in backward only",)
        if watched.is_stopped:
            causes = ("gradients are stopped somewhere (perhaps on purpose)", *causes)
        action = "replace fused or custom parts by plain PyTorch one by one; run torch.autograd.gradcheck on each"
        severity = "info" if watched.is_stopped or off <= cls.FAR_OFF else "warning"
        evidence = {"ratios": ratios, "stops_gradients": watched.is_stopped}
        return cls.finding(severity, found, f"1.000 (to {cls.MAX_OFF})", causes, action, evidence, check=PROBE)

    @classmethod
    def _rounded(cls, loss: float) -> Finding:
        found, causes = f"the loss is rounded to bf16 ({loss:.6g})", ("the logits are bf16 (in the loss)",)
        action = "cast the logits before the loss: logits.float()"
        return cls.finding("warning", found, "float32", causes, action, {"loss": loss}, check=PROBE)

    @classmethod
    def _missing(cls, names: list[str], count: int) -> Finding:
        """Reentrant checkpointing gives no gradient to what lies in a layer none of whose inputs wants one."""
        found = f"{len(names)} of {count} parameters get no gradient (with checkpointing)"
        causes = ("inputs require no gradient (of the checkpointed layers)", "a detach() in the checkpointed function")
        action = "use_reentrant False in gradient_checkpointing_kwargs, or model.enable_input_require_grads()"
        return cls.finding("warning", found, "all of them", causes, action, {"names": names[:20]}, check=PROBE)

    @classmethod
    def _recomputed_wrongly(cls, gap: float) -> Finding:
        found = f"checkpointing changes a gradient by {gap:.0%} (of its norm)"
        causes = ("new dropout masks (preserve_rng_state: False)", "a layer that changes its own state")
        action = "take preserve_rng_state out of the checkpointing arguments, or set dropout to 0"
        return cls.finding("warning", found, "rounding only", causes, action, {"gap": gap}, check=PROBE)


def _backward(model: Module, compute_loss: Callable) -> tuple[float, Gradients]:
    """By `backward`, since `torch.autograd.grad` refuses reentrant checkpointing."""
    leaves = {p: Parameter(p.detach().float()) for p in model.parameters() if p.requires_grad}
    with replaced(places_of(model, leaves)):
        loss = compute_loss()
        loss.backward()
    return float(loss.detach()), {p: leaf.grad for p, leaf in leaves.items() if leaf.grad is not None}


def _is_rounded(value: float) -> bool:
    """To bf16, but for a division in fp32; by chance once in 20,000 times."""
    return abs(float(torch.tensor(value).bfloat16()) - value) <= EPSILON * abs(value)


def _largest_gap(gradients: Gradients, others: Gradients) -> float:
    """Between two gradients of a parameter, relative to its norm; norms far below the whole's are mostly rounding."""
    floor = SMALL_NORM * math.hypot(*(float(gradient.norm()) for gradient in gradients.values())) or math.inf
    gaps = (float((g - others.get(p, 0.0)).norm()) / max(float(g.norm()), floor) for p, g in gradients.items())
    return max(gaps, default=0.0)


def _has(gradients: Gradients, parameter: Parameter) -> bool:
    return parameter in gradients and bool(gradients[parameter].any())


def _is_close(first: float, second: float) -> bool:
    return abs(first - second) <= MAX_DIFFERENCE_FP32 * max(abs(first), abs(second))


def _in_custom_function() -> bool:
    """Whether the caller is in the forward of an `autograd.Function`, whose gradient is its backward's."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == "forward" and any(isinstance(v, FunctionCtx) for v in frame.f_locals.values()):
            return True
        frame = frame.f_back
    return False


class Watched(TorchFunctionMode):
    """Notes what keeps a gradient from being that of the loss on purpose: choices and rounding, stopped gradients."""

    is_discrete = is_stopped = _in_no_grad = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        tensors = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, torch.Tensor)]
        if is_grad_switch(func):
            self._in_no_grad = not args[0] and (torch.is_grad_enabled() or self._in_no_grad)
        elif name.rstrip("_") in DISCRETE or name.startswith("fake_quantize"):
            self.is_discrete |= any(value.is_floating_point() for value in tensors)
        elif any(value.requires_grad for value in tensors):
            is_data = name == "__get__" and func == torch.Tensor.data.__get__
            is_without = name != "__get__" and (self._in_no_grad or torch.is_inference_mode_enabled())
            is_stopped = is_without or is_data or name in ("detach", "detach_")
            self.is_stopped |= is_stopped and not _in_custom_function()
        return func(*args, **(kwargs or {}))
