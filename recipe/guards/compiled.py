"""A compiled model against the eager one, on the first micro-batch."""

import math
from collections.abc import Iterator

import torch

from recipe.guards.guard import PROBE, CannotJudge, Finding, Guard, NotApplicable, Verdict
from recipe.guards.sandbox import scaled_loss_of
from recipe.guards.updates import shorten
from recipe.guards.wrong_gradient import SMALL_NORM

Sizes = dict[str, tuple[float, float]]  # of each parameter's gradient: norm and sum


class CompiledMismatch(Guard):
    """The compiled model computes another loss or gradient than the eager one.

    When: after the first micro-batch of a training, once.
    Measured: both models on this micro-batch, in training's own shape and mode: the loss to 0.1 %, norm and sum of
        each parameter's gradient to 2 % of the norm (bf16: 1 % and 15 %; fp16: 0.5 % and 10 %). Layers that are
        compiled one by one are compared too.
    Try: training without `torch_compile`, or compiling layer by layer, and comparing the first losses.
    Cannot see: models with dropout, for which a compiled model draws other numbers; several ranks, FSDP and DeepSpeed;
        graphs that are compiled later.
    """

    ids = {"compiled_mismatch": "The compiled model computes another loss or gradient than the eager one."}
    # Relative, of loss and of gradients. Inductor sums in another order: on a 2-layer Llama 0 and 1e-6 in fp32, 1e-7
    # and 9e-3 in bf16. TF32, which torch_compile turns on, rounds by 5e-4, and gradients gather rounding over the
    # layers. For fp16 chosen between the two, not measured.
    MAX_GAPS = {torch.float32: (1e-3, 0.02), torch.bfloat16: (1e-2, 0.15), torch.float16: (5e-3, 0.1)}
    # How much further a gradient's sum may be off than its norm. Derived: rounding errors are independent, so their
    # sum is about as large as their norm; three times that is allowed.
    SUM_ROOM = 3

    def setup(self, run) -> None:
        self._eager: tuple[float, Sizes] | None = None
        if not run.is_compiled:
            raise NotApplicable("the model is not compiled")
        if run.world_size > 1 or run.is_sharded:
            raise CannotJudge("gradients are averaged over ranks as they come")
        if dropout := next((name for name, value in dropouts_of(run.model) if value), None):
            raise CannotJudge(f"{dropout} is on, and a compiled model draws other random numbers")

    def probe(self, batch) -> Iterator[Verdict]:
        """Measures only."""
        steps = batch.run.args.gradient_accumulation_steps
        loss = scaled_loss_of(batch.twin, batch.model, batch.all_inputs, batch.num_items_in_batch, steps)
        named = [(name, p) for name, p in batch.model.named_parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
        pairs = zip((name for name, _ in named), gradients, strict=True)
        self._eager = float(loss.detach()), {name: _size(g) for name, g in pairs if g is not None}
        yield from ()

    def after_micro_step(self, run, loss) -> Iterator[Verdict]:
        """The first since the gradients were set to zero."""
        if self._eager is None:
            return
        (eager_loss, eager), self._eager = self._eager, None
        named = [(name, p.grad) for name, p in run.model.named_parameters() if name in eager and p.grad is not None]
        sizes = {name: _size(gradient) for name, gradient in named}
        yield self.judge(eager, sizes, (eager_loss, float(loss)), run.dtype) or self.clear(check=PROBE)

    @classmethod
    def judge(
        cls, eager: Sizes, compiled: Sizes, losses: tuple[float, float], dtype: torch.dtype = torch.float32
    ) -> Finding | None:
        """`losses`: eager and compiled; `dtype`: of the matrix products. On one micro-batch without dropout."""
        if not all(map(math.isfinite, (*losses, *(number for pair in eager.values() for number in pair)))):
            raise CannotJudge("a loss is not finite")
        max_loss_gap, max_gap = cls.MAX_GAPS.get(dtype, cls.MAX_GAPS[torch.float32])
        if eager.keys() != compiled.keys():
            raise CannotJudge(f"{len(eager)} gradients in eager mode, {len(compiled)} compiled")
        floor = SMALL_NORM * math.hypot(*(norm for norm, _ in eager.values()))
        gaps = {name: cls._gap(eager[name], compiled[name], floor) for name in eager}
        off = sorted((name for name, gap in gaps.items() if not gap <= max_gap), key=lambda name: -gaps[name])
        loss_gap = abs(losses[1] - losses[0]) / max(abs(losses[0]), 1e-12)
        if not off and loss_gap <= max_loss_gap:
            return None
        found, expected = f"loss {losses[1]:.4f}, eager {losses[0]:.4f}", f"equal to {max_loss_gap:.1%}"
        if off:
            found = f"{len(off)} of {len(gaps)} gradients differ ({shorten(off[0])} by {gaps[off[0]]:.0%})"
            expected = f"under {max_gap:.0%} of their norms"
        causes = ("a compiler fault (or a fused kernel's)", "code that does something else when it is traced")
        action = "train without torch_compile, or compile layer by layer, and compare the first losses"
        evidence = {"loss_gap": loss_gap, "gradients_off": len(off), "largest_gap": max(gaps.values(), default=0.0)}
        evidence |= {"names": off[:20], "losses": {"eager": losses[0], "compiled": losses[1]}}
        return cls.finding("warning", found, expected, causes, action, evidence, check=PROBE)

    @classmethod
    def _gap(cls, eager: tuple[float, float], compiled: tuple[float, float], floor: float) -> float:
        """Of norm and sum, relative to the norm."""
        scale = max(eager[0], floor, 1e-30)
        gap = max(abs(compiled[0] - eager[0]), abs(compiled[1] - eager[1]) / cls.SUM_ROOM) / scale
        return gap if math.isfinite(gap) else math.inf


def _size(gradient: torch.Tensor) -> tuple[float, float]:
    return float(gradient.float().norm()), float(gradient.float().sum())


def dropouts_of(model: torch.nn.Module) -> Iterator[tuple[str, float]]:
    for name, module in model.named_modules():
        yield name, getattr(module, "p", 0.0) if isinstance(module, torch.nn.Dropout) else 0.0
    for name, value in vars(getattr(model, "config", None) or object).items():
        if isinstance(value, float) and (name.endswith("dropout") or name.endswith("pdrop")):
            yield name, value
