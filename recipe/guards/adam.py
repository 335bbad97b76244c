"""Holds what torch's Adam and AdamW do, in a few steps and on sampled weights, against their definition: Kingma & Ba
2015, algorithm 1, and Loshchilov & Hutter 2019, algorithm 2, with the constants that the parameter groups name."""

from collections.abc import Iterable, Iterator, Sequence

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
        if optimizer._optimizer_step_post_hooks:  # they run before the one here, and may change what it looks at
            raise NotApplicable("a hook of somebody else runs after the optimizer's step")
        names = {id(parameter): name for name, parameter in parameters}
        plain = [group for group in optimizer.param_groups if not (group.get("amsgrad") or group.get("maximize"))]
        self._watched = [parameter for group in plain for parameter in _smallest_and_largest(group["params"])]
        if not self._watched:
            raise NotApplicable("no group has float32 weights and an Adam as it was published")
        self._names = [names.get(id(parameter), "a parameter") for parameter in self._watched]
        self._adds_decay_to_gradient = type(optimizer) is Adam
        self._num_steps = 0
        self._before: list[list[torch.Tensor]] = []
        # Of each, steps since its moments were zero, by which Adam corrects them; None: by the optimizer's own count
        self._counts: list[int | None] = [None] * len(self._watched)
        self._left: list[list[torch.Tensor]] = []  # the moments, after the step before
        self._measured: torch.Tensor | None = None
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before_step(self, optimizer: Optimizer, *_) -> None:
        self._num_steps += 1
        is_first = self._num_steps <= ADAM_STEPS
        self._before = []
        if is_first or self._num_steps % ADAM_EVERY == 0:
            for parameter in self._watched:
                moments = _moments(optimizer, parameter)
                self._before.append([each.clone() for each in (sample(parameter).float(), *moments)])
        for number, (_, *moments) in enumerate(self._before):
            if self._num_steps == 1:
                self._counts[number] = None if any(bool(each.any()) for each in moments) else 0
            elif not is_first or not all(map(torch.equal, moments, self._left[number])):
                self._counts[number] = None  # not seen in every step since, or loaded and cleared by somebody

    def _after_step(self, optimizer: Optimizer, *_) -> None:
        if not self._before:
            return
        group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        self._left = [list(_moments(optimizer, parameter)) for parameter in self._watched]
        self._left = [[each.clone() for each in moments] for moments in self._left]
        rows = []
        for number, parameter in enumerate(self._watched):
            if parameter.grad is None or id(parameter) not in group_of or parameter not in optimizer.state:
                rows.append(torch.zeros(3, 3, device=parameter.device))
                continue
            if self._counts[number] is not None:
                self._counts[number] += 1
            rows.append(self._measure(number, group_of[id(parameter)], optimizer.state[parameter]["step"]))
        self._measured = torch.stack([row.to(rows[0].device) for row in rows])

    def _measure(self, number: int, group: dict, own_count: torch.Tensor) -> torch.Tensor:
        """float32 `[3, 3]`: for first moment, second moment and weight, the norms of the difference from what it
        should be now, of what the step should change it by, and of what it was."""
        parameter, count = self._watched[number], self._counts[number]
        weight, *moments = self._before[number]
        now = [*self._left[number], sample(parameter).float()]
        is_coupled = self._adds_decay_to_gradient and not group.get("decoupled_weight_decay")
        gradient = sample(parameter.grad).float()
        gradient = gradient + group["weight_decay"] * weight if is_coupled else gradient
        added = [gradient, gradient.square()]
        wanted = [beta * old + (1 - beta) * new for beta, old, new in zip(group["betas"], moments, added, strict=True)]
        changes = [(1 - beta) * new for beta, new in zip(group["betas"], added, strict=True)]
        count = own_count.to(weight.device) if count is None else count
        first, second = (each / (1 - beta**count) for each, beta in zip(wanted, group["betas"], strict=True))
        change = -group["lr"] * first / (second.sqrt() + group["eps"])
        if not is_coupled:
            change = change - group["lr"] * group["weight_decay"] * weight
        parts = zip(now, [*wanted, weight + change], [*changes, change], [*moments, weight], strict=True)
        norm = torch.linalg.vector_norm
        return torch.stack([torch.stack([norm(n - w), norm(c), norm(b)]) for n, w, c, b in parts])

    def take(self) -> OnItsWay | None:
        """What the last step measured."""
        measured, self._measured = self._measured, None
        return OnItsWay(measured) if measured is not None else None

    def judge(self, measured: OnItsWay, step: int, tokens_seen: int) -> Finding | None:
        return check_adam(step, tokens_seen, self._names, measured.read().tolist())


def _moments(optimizer: Optimizer, parameter: torch.nn.Parameter) -> Iterator[torch.Tensor]:
    """Sampled; zeros where there are none yet."""
    state = optimizer.state.get(parameter, {})
    for name in MOMENTS:
        yield sample(state[name] if name in state else torch.zeros_like(parameter)).float()


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
            off = (
                f"{error / change:.0%} of its change" if change > 0 else f"{error:.2g} where nothing should change it"
            )
            return Finding(
                "optimizer_off",
                "warning",
                step,
                tokens_seen,
                found=f"the {part} of {name} is off from what Adam's definition gives by {off}",
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
