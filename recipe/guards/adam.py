"""What Adam, AdamW and Muon do, in a few steps and on sampled weights, against their definition: Kingma & Ba 2015,
algorithm 1, and Loshchilov & Hutter 2019, algorithm 2, with the constants that the parameter groups name."""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Adam, AdamW, Optimizer

from recipe.guards import muon
from recipe.guards.gradients import sample
from recipe.guards.guard import PROBE, Finding, Guard, NotApplicable, Verdict, contained
from recipe.guards.muon import MatrixWatch
from recipe.guards.run import Parameters, plain_rate
from recipe.guards.sandbox import generators_now, own_containers, restore_generators
from recipe.guards.updates import shorten
from recipe.internals import has_step_post_hooks
from recipe.muon import Muon

MOMENTS = ("exp_avg", "exp_avg_sq")
# What a copy of an optimizer has of its own; a scheduler replaces `step` on the instance.
OWN = ("param_groups", "state", "step")
# Of a share of a weight. Derived: fp32 rounds to 6e-8.
DECAY_ERROR = 1e-6
logger = logging.getLogger("recipe.guards")

PARTS = ("first moment", "second moment", "step")
LIKELY = {
    "first moment": "weight decay in the gradient (instead of in the weights)",
    "second moment": "moments in low precision (lower than the weights')",
    "step": "uncorrected moments (for their start at zero)",
}


class OptimizerOff(Guard):
    """The optimizer does not compute what its class and its settings say.

    When: before step 1 for its settings; then in the first 12 steps of a training, after a resume too, and in
        every 100th.
    Measured: hooks on `optimizer.step` keep sampled elements of the smallest and the largest float32 parameter of each
        group, with their gradient and moments, and compare what the step makes of them with the published definition.
        The difference may be 1 % of the change, plus rounding. Under Muon the smallest matrix is compared whole; its
        step may be off by 5 %, as bf16 rounds. Before step 1: no parameter is in it twice (an error); beta1 must not
        be larger than beta2; a copy of an optimizer that is not torch's makes a step of one small parameter without
        gradient at two rates: it must not take all of `weight_decay` off (from 1e-3 and 10 times its product with the
        rate on).
    Try: comparing one step of this parameter with `torch.optim.AdamW` or `Muon` on a copy of it.
    Cannot see: of other optimizers than torch's own Adam, AdamW and Muon and the recipe's Muon (a subclass may compute
        something else) all but betas and decay; parameters in half precision, amsgrad, fp16 loss scaling, optimizers
        with hooks of other code after the step; how far Muon's weight decay is off.
    """

    ids = {"optimizer_off": "The optimizer does not compute what its class and its settings say."}
    # Steps of a training that are looked at, and then every so many. Chosen, not measured: the first have rates near
    # zero where they warm up, and looking at a few thousand elements takes a fraction of a millisecond.
    FIRST_STEPS, EVERY = 12, 100
    # Of the change. Derived: fp32 leaves 1e-6 of it, and ROUNDING of the size (16 units in the last place of 6e-8);
    # another algorithm (decay in the gradient, no correction of the bias) is off by 5 % and more (zoo).
    MAX_ERROR, ROUNDING = 0.01, 1e-6
    # Share of a weight that a step may take off without the rate, and times the one with it. Chosen: 1e-3 halves all
    # weights in 700 steps; decay that is decoupled from the rate on purpose is 1e-4 and less.
    LARGE_DECAY, FAR_DECAY = 1e-3, 10.0
    # Of Muon's step, see `MatrixWatch`. Measured (ranks 1 to all): bf16 iteration is off by 0.015 at most, a step that
    # is not orthogonalized by 0.4 and more.
    MAX_ERROR_MUON = 0.05

    def setup(self, run) -> None:
        self._hooks, self._is_looking = [], False
        self._no_adam = None
        self._before: list[list[torch.Tensor]] = []
        self._left: list[list[torch.Tensor]] = []  # the moments, after the step before
        self._measured: dict[str, torch.Tensor] | None = None
        self._watched: list[torch.nn.Parameter] = []
        self._matrices: list[MatrixWatch] = []
        try:
            self._choose(run)
        except NotApplicable as reason:
            if not self._judge_settings(run):
                raise
            self._no_adam = reason.without_trace()  # what its settings show is still said
        # Of each, steps since its moments were zero, by which Adam corrects them; None: by the optimizer's own count
        self._counts: list[int | None] = [None] * len(self._watched)
        self._num_seen = 0  # steps in this process
        self.state = {"num_steps": 0}

    def _choose(self, run) -> None:
        optimizer = run.inner_optimizer
        if run.is_sharded:
            raise NotApplicable("the weights are sharded over ranks")
        if run.is_loss_scaled:
            raise NotApplicable("fp16 loss scaling, which some optimizers undo themselves")
        if type(optimizer) not in (Adam, AdamW, Muon, torch.optim.Muon):
            raise NotApplicable(f"{type(optimizer).__name__} is not torch's own Adam or AdamW")
        if has_step_post_hooks(optimizer):  # they run before the one here, and may change what it looks at
            raise NotApplicable("a hook of other code runs after the optimizer's step")
        plain = [group for group in optimizer.param_groups if not (group.get("amsgrad") or group.get("maximize"))]
        chosen = [(group, parameter) for group in plain for parameter in _smallest_and_largest(group["params"])]
        self._watched = [parameter for group, parameter in chosen if "betas" in group]
        self._matrices = [MatrixWatch(parameter) for group, parameter in chosen if "momentum" in group][:1]
        if not chosen:
            raise NotApplicable("no group has float32 weights and an Adam as it was published")
        names = {id(parameter): name for name, parameter in run.named_parameters}
        self._names = [names.get(id(parameter), "a parameter") for parameter in self._watched]
        self._matrix_names = [names.get(id(watch.parameter), "a matrix") for watch in self._matrices]
        self._adds_decay_to_gradient = type(optimizer) is Adam
        if run.is_main:
            self._hooks = [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            ]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def inspect(self, run) -> Iterator[Verdict]:
        finding = self._judge_settings(run)
        if self._watched or self._matrices or finding:
            yield finding or self.clear(check=PROBE)
        if self._no_adam is not None:
            raise self._no_adam.without_trace()

    def _judge_settings(self, run) -> Finding | None:
        finding = self.judge_repeated(run.named_parameters, run.optimizer)
        if finding is None and (run.is_adam or self._watched):
            finding = self.judge_betas(run.optimizer.param_groups)
        if finding is None and run.world_size == 1 and not run.is_sharded:  # a step may wait for other ranks
            finding = self.judge_decay(run.inner_optimizer)
        return finding

    @contained
    def _before_step(self, optimizer: Optimizer, *_) -> None:
        self.state["num_steps"] += 1
        self._num_seen += 1
        is_first = self._num_seen <= self.FIRST_STEPS
        self._before = []
        self._is_looking = is_first or self.state["num_steps"] % self.EVERY == 0
        if self._is_looking:
            for parameter in self._watched:
                moments = _moments(optimizer, parameter)
                self._before.append([each.clone() for each in (sample(parameter).float(), *moments)])
            for watch in self._matrices:
                watch.before(optimizer)
        for index, (_, *moments) in enumerate(self._before):
            if self._num_seen == 1:
                self._counts[index] = None if any(bool(each.any()) for each in moments) else 0
            elif not is_first or not all(map(torch.equal, moments, self._left[index])):
                self._counts[index] = None  # not seen in every step since, or loaded and cleared by other code

    @contained
    def _after_step(self, optimizer: Optimizer, *_) -> None:
        if not self._is_looking:
            return
        group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        self._left = [[each.clone() for each in _moments(optimizer, parameter)] for parameter in self._watched]
        rows, is_applied = [], 1 - getattr(optimizer, "found_inf", torch.zeros(()))  # as loss scaling says it
        for number, parameter in enumerate(self._watched):
            if parameter.grad is None or id(parameter) not in group_of or parameter not in optimizer.state:
                rows.append(torch.zeros(3, 3, device=parameter.device))
                continue
            if self._counts[number] is not None:
                self._counts[number] = self._counts[number] + is_applied
            measured = self._compare(number, group_of[id(parameter)], optimizer.state[parameter]["step"])
            rows.append(torch.where(is_applied.to(measured.device) > 0, measured, 0))
        of_matrices = [watch.compare(optimizer, group_of[id(watch.parameter)]) for watch in self._matrices]
        of_matrices = [torch.where(is_applied.to(each.device) > 0, each, 0) for each in of_matrices]
        parts = {"adam": rows, "muon": of_matrices}
        self._measured = {
            n: torch.stack([row.to(each[0].device) for row in each]) for n, each in parts.items() if each
        }

    def _compare(self, number: int, group: dict, own_count: torch.Tensor) -> torch.Tensor:
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

    def measure(self, local) -> dict[str, torch.Tensor] | None:
        measured, self._measured = self._measured, None
        return measured

    def observe(self, step) -> Iterator[Verdict]:
        if (measured := step.payload(self)) is not None:
            finding = self.judge(self._names, measured["adam"]) if "adam" in measured else None
            if finding is None and "muon" in measured:
                finding = self.judge(self._matrix_names, measured["muon"], is_muon=True)
            yield finding or self.clear()

    @classmethod
    def judge(
        cls, names: Sequence[str], measured: Sequence[Sequence[Sequence[float]]], is_muon: bool = False
    ) -> Finding | None:
        """`measured`: of `_compare` or `MatrixWatch.compare`, one for each of `names`. What is not finite is another
        guard's finding."""
        all_parts, likely = (muon.PARTS, muon.LIKELY) if is_muon else (PARTS, LIKELY)
        whose, reference = ("Muon", "Muon") if is_muon else ("Adam", "AdamW")
        for name, parts in zip(names, measured, strict=True):
            for part, (error, change, size) in zip(all_parts, parts, strict=True):
                limit = cls.MAX_ERROR_MUON if is_muon and part == "step" else cls.MAX_ERROR
                if not error > limit * change + cls.ROUNDING * size:
                    continue
                off = f"{error / change:.0%} of its change" if change > 0 else f"{error:.2g}, where none is due,"
                return cls.finding(
                    "warning",
                    found=f"{part} {off} off {whose}'s ({shorten(name)})",
                    expected=f"within {limit:.0%}",
                    causes=(likely[part], "the optimizer's step was replaced, or its state was overwritten"),
                    action=f"compare one step of this parameter with torch.optim.{reference} on a copy of it",
                    evidence={"parameter": name, "part": part, "error": error, "change": change, "size": size},
                )
        return None

    @classmethod
    def judge_repeated(cls, parameters: Parameters, optimizer: torch.optim.Optimizer) -> Finding | None:
        """A parameter that is in the optimizer more than once is updated as often. Silent where parameters are
        missing, which is a finding of another guard."""
        counts = Counter(id(parameter) for group in optimizer.param_groups for parameter in group["params"])
        names = [name for name, parameter in parameters if counts[id(parameter)] > 1]
        if not names or any(p.requires_grad and id(p) not in counts for _, p in parameters):
            return None
        return cls.finding(
            "error",
            found=f"{len(names)} parameters repeated in the optimizer ({shorten(names[0])})",
            expected="once each",
            causes=("a shared weight given twice (for each module that holds it)",),
            action="each time it is there it is updated: give each parameter once, as model.parameters() does",
            evidence={"names": names[:20]},
            check=PROBE,
        )

    @classmethod
    def judge_decay(cls, optimizer: Optimizer) -> Finding | None:
        """Of an optimizer that is not torch's: what it takes off weights without gradient, at two rates. Some decay by
        design without the rate, with numbers that are as small as its product with it."""
        for group in optimizer.param_groups:
            decay, rate = group.get("weight_decay"), plain_rate(group.get("initial_lr", group.get("lr")))
            if type(optimizer).__module__.startswith("torch.optim") or not (decay and rate and group["params"]):
                continue
            taken = [decay_of(optimizer, group, each) for each in (rate, rate / 2)]
            if any(share is None or abs(share / decay - 1) > cls.MAX_ERROR for share in taken):
                continue
            if decay >= max(cls.LARGE_DECAY, cls.FAR_DECAY * rate * decay):
                return cls.finding(
                    "warning",
                    found=f"each step takes {decay:.2g} off each weight (at any rate)",
                    expected=f"{rate * decay:.2g} (the rate times it)",
                    causes=("weight decay without the learning rate (as a factor)",),
                    action="p.mul_(1 - lr * weight_decay), as AdamW does, or a far smaller weight_decay",
                    evidence={"weight_decay": decay, "learning_rate": rate},
                    check=PROBE,
                )
        return None

    @classmethod
    def judge_betas(cls, groups: Iterable[dict]) -> Finding | None:
        """The gradient's average is of fewer steps than that of its square."""
        swapped = [group["betas"] for group in groups if "betas" in group and group["betas"][0] > group["betas"][1]]
        if not swapped:
            return None
        return cls.finding(
            "warning",
            found=f"beta1 {swapped[0][0]:g} is larger than beta2 {swapped[0][1]:g}",
            expected="smaller",
            causes=("the betas were swapped (adam_beta1, adam_beta2)",),
            action="check adam_beta1 and adam_beta2; usual are 0.9 and 0.95 to 0.999",
            evidence={"beta1": swapped[0][0], "beta2": swapped[0][1]},
            check=PROBE,
        )


def decay_of(optimizer: Optimizer, group: dict, rate: float) -> float | None:
    """Share of a weight that a step without gradient takes off it, None where that depends on the weight. `rate`: the
    group's. The step is made by a copy that holds one small parameter; the optimizer itself is left as it is."""
    weights = torch.tensor([1.0, -2.0, 4.0, 8.0])
    parameter = torch.nn.Parameter(weights.clone().reshape(2, 2).to(group["params"][0].device))
    parameter.grad = torch.zeros_like(parameter)
    twin = object.__new__(type(optimizer))
    kept = {name: own_containers(value) for name, value in vars(optimizer).items() if name not in OWN}
    hooks = {name: type(value)() for name, value in kept.items() if "_hooks" in name}
    vars(twin).update(kept | hooks, param_groups=[{**group, "params": [parameter], "lr": rate}])
    twin.state = defaultdict(dict)
    generators = generators_now()
    try:
        type(optimizer).step(twin)
    except Exception as error:  # it may need more than its groups
        logger.debug("a copy of the optimizer cannot make a step", exc_info=error)
        return None
    finally:
        restore_generators(generators)
    shares = 1 - parameter.detach().cpu().flatten() / weights
    return float(shares[0]) if bool(((shares - shares[0]).abs() <= DECAY_ERROR).all()) else None


def _moments(optimizer: Optimizer, parameter: torch.nn.Parameter) -> Iterator[torch.Tensor]:
    """Sampled; zeros where there are none yet."""
    state = optimizer.state.get(parameter, {})
    for name in MOMENTS:
        yield sample(state[name] if name in state else torch.zeros_like(parameter)).float()


def _smallest_and_largest(parameters: Iterable[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    usable = [p for p in parameters if p.requires_grad and p.dtype == torch.float32 and not isinstance(p, DTensor)]
    usable.sort(key=torch.Tensor.numel)
    return usable[:1] + usable[1:][-1:]
