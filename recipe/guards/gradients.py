"""The gradient of one parameter or two: what micro-batches add to it, and what the step is taken with."""

from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor

from recipe.guards.guard import contained
from recipe.guards.run import LOW_PRECISION, Parameters

# Elements of a tensor sampled. Derived: a share of 0.5 is known to 0.01.
PER_TENSOR = 4096
# Elements of a parameter: fewer may all sit still under small gradients. Chosen, not measured.
MOVING_ELEMENTS = 16


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard, so that measuring never waits for another rank."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sample(tensor: torch.Tensor) -> torch.Tensor:
    """Up to PER_TENSOR strided elements, not copied."""
    values = local(tensor).flatten()
    stride = -(-values.numel() // PER_TENSOR) | 1  # odd: does not fall on one column of a matrix again and again
    return values[::stride]


class GradientNorms(NamedTuple):
    """Norms of one followed parameter's gradient: of the `total` that its micro-batches gave; of its difference
    (`error`) from the gradient `before` clipping; of that; of what the step was taken with (`now`); of what the
    parameter `changed` by since the last step (0 of matrices); and of the difference less the last step's gradient
    (`rest`)."""

    name: str
    is_low: bool  # in half precision, which rounds
    total: float
    error: float
    before: float
    now: float
    changed: float
    rest: float
    of_matrices: bool = False  # see `GradientTap`


class GradientTap:
    """A hook at the last of the smallest trainable parameters, mostly the norm before the head: a few hundred numbers,
    which lie outside of layers that are computed again. `of_matrices`: at a sample of the smallest matrix, which other
    code may accumulate (fused kernels, gradients in fp32)."""

    def __init__(self, parameters: Parameters, of_matrices: bool = False):
        usable = [(n, p) for n, p in parameters if p.requires_grad and not isinstance(p, DTensor)]
        usable = [(n, p) for n, p in usable if p.numel() >= MOVING_ELEMENTS and (p.dim() > 1 or not of_matrices)]
        self.of_matrices, self.failure = of_matrices, None
        self.name, self.parameter = min(reversed(usable), key=lambda each: each[1].numel(), default=("", None))
        self.is_low = self.parameter is not None and self.parameter.dtype in LOW_PRECISION
        self.is_listening = False
        self._left: torch.Tensor | None = None  # the parameter as the last step left it ...
        self._next_step = -1  # ... and the step that is to find it so
        self._taken: torch.Tensor | None = None  # the gradient that the last step was taken with
        self._reset()
        self._hook = self.parameter.register_hook(self._on_gradient) if self.parameter is not None else None

    def _reset(self) -> None:
        self._sum: torch.Tensor | None = None
        self._unclipped: torch.Tensor | None = None
        self._count = 0

    def close(self) -> None:
        if self._hook is not None:
            self._hook.remove()

    @contained
    def _on_gradient(self, gradient: torch.Tensor) -> None:
        if self.is_listening:
            gradient = sample(gradient).float()
            self._sum = gradient.clone() if self._sum is None else self._sum + gradient
            self._count += 1

    def before_clip(self) -> None:
        self._unclipped = self._gradient().clone() if self._count else None

    def after_step(self, step: int) -> None:
        if self.parameter is not None and not self.of_matrices:
            self._left, self._next_step = sample(self.parameter).clone(), step + 1

    def take(self, num_micro_batches: int, step: int) -> torch.Tensor | None:
        """The norms of `GradientNorms` on the device, float32 `[6]`. None where backward did not come once in each
        micro-batch."""
        count, total, before, last = self._count, self._sum, self._unclipped, self._taken
        self._reset()
        if self.parameter is None or count != num_micro_batches or total is None:
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

    def save(self) -> dict:
        kept = {"left": self._left, "taken": self._taken}
        arrays = {name: value.float().cpu().numpy() for name, value in kept.items() if value is not None}
        return {"name": self.name, "next_step": self._next_step, **arrays}

    def load(self, state: dict) -> None:
        if state["name"] != self.name or self.parameter is None:
            return
        self._next_step, like = int(state["next_step"]), sample(self.parameter)
        for name, dtype in (("left", like.dtype), ("taken", torch.float32)):
            if name in state and state[name].shape == tuple(like.shape):
                setattr(self, f"_{name}", torch.from_numpy(state[name]).to(like.device, dtype))
