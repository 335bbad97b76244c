"""What Muon does to a matrix in a step, against its definition: Jordan et al. 2024, as torch.optim.Muon has it."""

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from recipe.guards.guard import CannotJudge

PARTS = ("momentum", "step")
LIKELY = {
    "momentum": "another momentum (kept or averaged in another way)",
    "step": "not orthogonalized (or scaled in another way)",
}


class MatrixWatch:
    """One matrix in a group with `momentum`, before and after a step. The group names the constants as
    torch.optim.Muon does; without `adjust_lr_fn` the update is scaled as `match_rms_adamw` says."""

    def __init__(self, parameter: Parameter):
        self.parameter = parameter
        self._before: list[torch.Tensor] | None = None

    def before(self, optimizer: Optimizer) -> None:
        self._before = [self.parameter.detach().clone(), self._momentum(optimizer).clone()]

    def _momentum(self, optimizer: Optimizer) -> torch.Tensor:
        kept = optimizer.state.get(self.parameter, {})
        return kept["momentum_buffer"] if "momentum_buffer" in kept else torch.zeros_like(self.parameter)

    def compare(self, optimizer: Optimizer, group: dict) -> torch.Tensor:
        """float32 `[2, 3]`: for momentum and weight, the norms of the difference from what it should be now, of what
        the step should change it by, and of what it was. Zeros where the step had no gradient.

        The weight's are of products with the update, `change @ update.T`. Where the update has no component, which is
        in most directions of a gradient of low rank, the iteration blows up its rounding: in bf16 the change of a
        matrix of rank 1 is off by more than its size, this product by 0.7 %.
        """
        (weight, momentum), self._before = self._before, None
        gradient = self.parameter.grad
        if gradient is None:
            return torch.zeros(2, 3, device=weight.device)
        wanted = momentum.lerp(gradient, 1 - group["momentum"])
        update = gradient.lerp(wanted, group["momentum"]) if group.get("nesterov", True) else wanted
        change = -group["lr"] * scale_of(group, weight) * orthogonal(update, group)
        change = change - group["lr"] * group["weight_decay"] * weight
        step = self.parameter.detach() - weight
        update = update / torch.linalg.matrix_norm(update).clamp_min(1e-30)
        along = [_product(each, update) for each in (step - change, change, weight)]
        parts = ((self._momentum(optimizer) - wanted, wanted - momentum, momentum), along)
        return torch.stack([torch.stack([torch.linalg.matrix_norm(each) for each in part]) for part in parts])


def _product(matrix: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """On the shorter side."""
    return matrix.T @ update if matrix.shape[0] > matrix.shape[1] else matrix @ update.T


def orthogonal(update: torch.Tensor, group: dict) -> torch.Tensor:
    """By Newton-Schulz in fp32: the polynomial `a x + b x^3 + c x^5` of the singular values, some times."""
    a, b, c = group.get("ns_coefficients", (3.4445, -4.7750, 2.0315))
    x = update.float() / torch.linalg.matrix_norm(update.float()).clamp_min(group.get("eps", 1e-7))
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    for _ in range(group.get("ns_steps", 5)):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if is_tall else x


def scale_of(group: dict, matrix: torch.Tensor) -> float:
    rows, columns = matrix.shape
    way = group.get("adjust_lr_fn", "match_rms_adamw")
    if way in (None, "original"):
        return max(1.0, rows / columns) ** 0.5
    if way != "match_rms_adamw":
        raise CannotJudge(f"adjust_lr_fn {way!r} is not known")
    return 0.2 * max(rows, columns) ** 0.5
