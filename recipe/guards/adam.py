"""Holds what torch's Adam and AdamW do, in a few steps and on sampled weights, against their definition: Kingma & Ba
2015, algorithm 1, and Loshchilov & Hutter 2019, algorithm 2, with the constants that the parameter groups name."""

from collections.abc import Iterable, Sequence

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Adam, AdamW, Optimizer

from recipe.guards.batches import OnItsWay
from recipe.guards.finding import Finding, NotApplicable
from recipe.guards.thresholds import ADAM_ERROR, ADAM_EVERY, ADAM_ROUNDING, ADAM_STEPS
from recipe.guards.updates import Parameters, sample

MOMENTS = ("exp_avg", "exp_avg_sq")
PARTS = ("first moment", "second moment", "step")
LIKELY = {
    "first moment": "weight decay is added to the gradient instead of to the weights",
    "second moment": "the moments are kept in lower precision than the weights",
    "step": "the moments are not corrected for their start at zero",
}


class AdamWatch:
    """Hooks on `optimizer.step` itself: what others do to weights and gradients before and after it is not judged.

    Looks at the smallest and the largest float32 parameter of each group, in the first ADAM_STEPS steps of a training
    and in every ADAM_EVERY-th. Raises `NotApplicable` for another class: a subclass may compute something else.
    """

    def __init__(self, optimizer: Optimizer, parameters: Parameters):
        if type(optimizer) not in (Adam, AdamW):
            raise NotApplicable(f"{type(optimizer).__name__} is not torch's own Adam or AdamW")
        names = {id(parameter): name for name, parameter in parameters}
        self._watched = [
            (parameter, group)
            for group in optimizer.param_groups
            if not (group.get("amsgrad") or group.get("maximize"))
            for parameter in _smallest_and_largest(group["params"])
        ]
        if not self._watched:
            raise NotApplicable("no group has float32 weights and an Adam as it was published")
        self._names = [names.get(id(parameter), "a parameter") for parameter, _ in self._watched]
        self._adds_decay_to_gradient = type(optimizer) is Adam
        self._num_steps = 0
        self._counts: list[int] | None = None  # steps of each since its moments were zero; None: they never were
        self._before: list[list[torch.Tensor]] = []
        self._measured: torch.Tensor | None = None
        self._is_hooked = bool(optimizer._optimizer_step_post_hooks)  # by others: what they do to the weights is meant
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before_step(self, optimizer: Optimizer, *_) -> None:
        self._num_steps += 1
        self._before = []
        if self._num_steps <= ADAM_STEPS or self._num_steps % ADAM_EVERY == 0:
            for parameter, _ in self._watched:
                state = optimizer.state.get(parameter, {})
                moments = [state.get(name, torch.zeros_like(parameter)) for name in MOMENTS]
                self._before.append([sample(each).float().clone() for each in (parameter, *moments)])
        if self._num_steps == 1 and not any(bool(moment.any()) for _, *each in self._before for moment in each):
            self._counts = [0] * len(self._watched)

    def _after_step(self, optimizer: Optimizer, *_) -> None:
        if self._counts is not None:
            self._counts = [n + (p.grad is not None) for n, (p, _) in zip(self._counts, self._watched, strict=True)]
        if self._before:
            rows = [self._measure(number, optimizer.state) for number in range(len(self._watched))]
            self._measured = torch.stack([row.to(rows[0].device) for row in rows])

    def _measure(self, number: int, states: dict) -> torch.Tensor:
        """float32 `[3, 3]`: for first moment, second moment and weight, the norms of the difference from what it
        should be now, of what the step should change it by, and of what it was."""
        parameter, group = self._watched[number]
        if parameter.grad is None:
            return torch.zeros(3, 3, device=parameter.device)
        weight, *moments = self._before[number]
        state = states[parameter]
        now = [sample(each).float() for each in (state["exp_avg"], state["exp_avg_sq"], parameter)]
        is_coupled = self._adds_decay_to_gradient and not group.get("decoupled_weight_decay")
        gradient = sample(parameter.grad).float()
        gradient = gradient + group["weight_decay"] * weight if is_coupled else gradient
        added = [gradient, gradient.square()]
        wanted = [beta * old + (1 - beta) * new for beta, old, new in zip(group["betas"], moments, added, strict=True)]
        changes = [(1 - beta) * new for beta, new in zip(group["betas"], added, strict=True)]
        count = self._counts[number] if self._counts is not None else state["step"].to(weight.device)
        first, second = (each / (1 - beta**count) for each, beta in zip(wanted, group["betas"], strict=True))
        change = -group["lr"] * first / (second.sqrt() + group["eps"])
        if not is_coupled:
            change = change - group["lr"] * group["weight_decay"] * weight
        if self._is_hooked:
            now[2] = weight + change
        parts = zip(now, [*wanted, weight + change], [*changes, change], [*moments, weight], strict=True)
        norm = torch.linalg.vector_norm
        return torch.stack([torch.stack([norm(n - w), norm(c), norm(b)]) for n, w, c, b in parts])

    def take(self) -> OnItsWay | None:
        """What the last step measured."""
        measured, self._measured = self._measured, None
        return OnItsWay(measured) if measured is not None else None

    def judge(self, measured: OnItsWay, step: int, tokens_seen: int) -> Finding | None:
        return check_adam(step, tokens_seen, self._names, measured.read().tolist())


def _smallest_and_largest(parameters: Iterable[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    usable = [p for p in parameters if p.requires_grad and p.dtype == torch.float32 and not isinstance(p, DTensor)]
    usable.sort(key=torch.Tensor.numel)
    return usable[:1] + usable[1:][-1:]


def check_adam(
    step: int, tokens_seen: int, names: Sequence[str], measured: Sequence[Sequence[Sequence[float]]]
) -> Finding | None:
    """`measured`: of `AdamWatch._measure`, a row for each of `names`. What is not finite others name."""
    for name, parts in zip(names, measured, strict=True):
        for part, (error, change, size) in zip(PARTS, parts, strict=True):
            if not error > ADAM_ERROR * change + ADAM_ROUNDING * size:
                continue
            share = f"{error / change:.0%}" if change > 0 else "infinitely far"
            return Finding(
                "optimizer_off",
                "warning",
                step,
                tokens_seen,
                found=f"the {part} of {name} is {share} of its change away from what Adam's definition gives",
                expected=f"within {ADAM_ERROR:.0%}, for the betas, epsilon, decay and rate of its group",
                likely_causes=(LIKELY[part], "the optimizer's step was replaced, or its state was written over"),
                action="compare one step of this parameter with torch.optim.AdamW on a copy of it",
                evidence={"parameter": name, "part": part, "error": error, "change": change, "size": size},
            )
    return None


def check_betas(step: int, tokens_seen: int, groups: Iterable[dict]) -> Finding | None:
    """Of an optimizer that is a kind of Adam: the gradient's average is of fewer steps than that of its square."""
    swapped = [group["betas"] for group in groups if "betas" in group and group["betas"][0] > group["betas"][1]]
    if not swapped:
        return None
    return Finding(
        "optimizer_off",
        "warning",
        step,
        tokens_seen,
        found=f"beta1 {swapped[0][0]:g} is larger than beta2 {swapped[0][1]:g}",
        expected="smaller: the momentum is of fewer steps than the scale that divides it",
        likely_causes=("adam_beta1 and adam_beta2 were given for each other",),
        action="look at adam_beta1 and adam_beta2; usual are 0.9 and 0.95 to 0.999",
        evidence={"beta1": swapped[0][0], "beta2": swapped[0][1]},
    )
