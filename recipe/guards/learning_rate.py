"""The learning rate that the optimizer uses, against the schedule."""

import itertools
import math
import re
from collections.abc import Callable, Iterator

import torch
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from recipe.guards import schedules
from recipe.guards.guard import PROBE, CannotJudge, Finding, Guard, Verdict
from recipe.guards.run import Parameters, plain_rate
from recipe.internals import created_scheduler

Rates = list[tuple[float | None, float | None]]
ZERO = 1e-12  # rates are as good as equal to it. Derived: the rounding of a cosine leaves 1e-19


class LearningRate(Guard):
    """The learning rate is not what the schedule says.

    When: before step 1 and at every step.
    Measured: the rate of each parameter group just before the update, against its initial rate times the factor of
        `transformers.get_scheduler` for the arguments; one step early or late is no fault, two steps off in a row are.
        The initial rate must be the one asked for, unless the optimizer is the user's own. With a scheduler of the
        user's own: against what the scheduler says. Whoever's scheduler it is: an error at once where a rate is
        negative or not finite, a warning where it is more than 10 times the peak (the largest of `learning_rate`, the
        optimizer's own rate, the group's initial one, and the `max_lr` of a cycle). Before step 1, a warning where a
        LambdaLR of the user's own ends after exactly the run's steps times the micro-batches of a step, or the ranks,
        at a rate that this run stays 0.05 above; where it, or a CosineAnnealingLR, is lowest after exactly the warm-up
        or as many steps as there are epochs, and half a cosine of transformers after its `num_training_steps`, and
        then rises, with at most 0.4 of the first two steps in one, to over 0.5 of its peak in this run; where it is 0
        in the last tenth of the run; a ReduceLROnPlateau of mode max that is given a loss; and where each layer's rate
        (of 3 or more) is lower than that of the layer below it, all by one factor: layer-wise decay lowers those of
        the first layers.
    Try: printing `optimizer.param_groups` and `scheduler.last_epoch` at this step; building the scheduler from the
        optimizer that the Trainer is given.
    Cannot see: whether a schedule of the user's own is a sensible one; fp16 loss scaling, which skips steps now and
        then; schedules that follow a metric.
    """

    ids = {"learning_rate_off": "The learning rate is not what the schedule says."}
    # Of the rate: learning rates kept as fp32 tensors are within 1e-7, wrong ones are per cents off.
    TOLERANCE = 1e-3
    # Steps off in a row; the first after a resume still has the rate of the schedule as it was when saved.
    MIN_STEPS = 2
    # Times the configured peak. Chosen, not measured: no schedule of transformers or torch goes above its peak.
    FAR_ABOVE = 10.0
    # Of the way from a schedule's middle to its end, that the run's last step is still above it. Layers whose rates
    # show a rule. Chosen, not measured.
    LEFT, MIN_LAYERS = 0.05, 3
    # Of the peak, to which a rate that has fallen rises again. Chosen, not measured: a cosine that ends after two
    # thirds of the run does; one that is somewhat short does not.
    # Of what it rises in two steps, in the first. Derived: a quarter of a cosine of many steps, a third of one of
    # three; half of a straight line; all of a restart.
    RISEN, ROUND = 0.5, 0.4

    def setup(self, run) -> None:
        self.schedule = schedule_of(run.trainer)
        initial = {plain_rate(group.get("initial_lr")) for group in run.optimizer.param_groups}
        self.run, self.peaks = run, [peak_of(group, run) for group in run.optimizer.param_groups]
        self.state = {"off_steps": 0, "is_asked_for": run.args.learning_rate in initial}

    def inspect(self, run) -> Iterator[Verdict]:
        found = [self.judge_layers(run.named_parameters, run.optimizer)]
        if isinstance(self.schedule, CannotJudge):
            speeds = {run.args.gradient_accumulation_steps: "micro-batches of a step", run.world_size: "ranks"}
            speeds |= {run.args.gradient_accumulation_steps * run.world_size: "micro-batches of all ranks"}
            factor = lambda_of(run.trainer.lr_scheduler)
            found.append(self.judge_length(factor, run.max_steps, speeds))
            found.append(self.judge_rise(factor, run.max_steps, ends_of(factor, run.args, run.max_steps)))
            others = schedules.judge_idle(factor, run.max_steps)
            others = others or schedules.judge_plateau(run.trainer.lr_scheduler, run.args.metric_for_best_model)
            found += [self.finding(**others, check=PROBE)] if others else []
        yield from filter(None, found)

    def measure(self, local) -> int:
        """Steps before that were not applied, and did not advance the schedule."""
        skips = getattr(self.run.trainer, "skips", None)
        return skips.num_skipped if skips is not None else 0

    def observe(self, step) -> Iterator[Verdict]:
        if finding := self.judge_bounds(step.learning_rates, self.peaks):
            yield finding
            return
        yield self.clear(check="bounds")
        if isinstance(self.schedule, CannotJudge):
            finding = self.judge_scheduled(step.learning_rates, step.scheduled_rates)
        else:
            asked_for = self.run.args.learning_rate if self.state["is_asked_for"] else None
            speeds = (self.run.world_size, self.run.args.gradient_accumulation_steps)
            updates = step.number - 1 - (step.payload(self) or 0)
            finding = self.judge(updates, step.learning_rates, self.schedule, asked_for, *speeds)
        self.state["off_steps"] = self.state["off_steps"] + 1 if finding else 0
        is_off = self.state["off_steps"] >= self.MIN_STEPS
        if isinstance(self.schedule, CannotJudge):
            if is_off:
                yield finding
            raise self.schedule.without_trace()
        yield finding if is_off else self.clear()

    @classmethod
    def judge_bounds(cls, used: Rates, peaks: list[float]) -> Finding | None:
        """`used`: of each parameter group; groups that were added later are held to the largest of `peaks`."""
        peaks = [*peaks, *[max(peaks, default=0.0)] * (len(used) - len(peaks))]
        for group, ((lr, _), peak) in enumerate(zip(used, peaks, strict=False)):
            if lr is None or -ZERO <= lr <= (cls.FAR_ABOVE * peak or math.inf):
                continue
            is_far = lr > 0 and math.isfinite(lr)
            causes = ("the schedule ran past its end", "the schedule's formula")
            if is_far:
                causes = (
                    "the schedule compounds (it multiplies a rate that is no longer the initial one)",
                    "another unit of steps",
                )
            expected = f"{peak:.4g} at most" if is_far else "0 or above" if lr < 0 else "finite"
            return cls.finding(
                "warning" if is_far else "error",
                found=f"learning rate {lr:.4g} (parameter group {group})",
                expected=expected,
                causes=causes,
                action="print what the scheduler gives for each step of the run before you train on",
                evidence={"used": used, "peaks": peaks},
                check="bounds",
                cause="far above" if is_far else "negative" if lr < 0 else "not finite",
            )
        return None

    @classmethod
    def judge(
        cls,
        step: int,
        used: Rates,
        multiplier: Callable[[int], float],
        asked_for: float | None = None,
        world_size: int = 1,
        gradient_accumulation_steps: int = 1,
    ) -> Finding | None:
        """The learning rate that the optimizer uses is the initial one times the schedule's factor.

        `step`: updates made before this one (from 0), without those that the fp16 loss scaler skipped. `used`: `(lr,
        initial_lr)` of each parameter group, just before the update. `asked_for`: None where the optimizer is the
        user's own. One step early or late is no fault.
        """
        off = [(i, lr, initial) for i, (lr, initial) in enumerate(used) if not _is_on(multiplier, step, lr, initial)]
        factor = multiplier(step)
        if off:
            group, lr, initial = off[0]
            expected = f"{initial * factor:.4g} ({initial:.4g} x {factor:.4g})"
            causes = _causes(multiplier, step, lr, initial, world_size, gradient_accumulation_steps)
        elif asked_for and used and not any(initial is None or is_close(initial, asked_for) for _, initial in used):
            group, (lr, initial) = 0, used[0]
            expected = f"{asked_for * factor:.4g} ({asked_for:.4g} asked for)"
            causes = ("the checkpoint's own rate (not the one asked for)", "the optimizer was built with another one")
        else:
            return None
        return cls.finding(
            "warning",
            found=f"learning rate {lr:.4g} (parameter group {group})",
            expected=expected,
            causes=causes,
            action="print optimizer.param_groups and scheduler.last_epoch at this step",
            evidence={"updates": step, "used": used, "factor": factor, "learning_rate": asked_for},
            cause="schedule",
        )

    @classmethod
    def judge_scheduled(cls, used: Rates, scheduled: list[float | None]) -> Finding | None:
        """A schedule of the user's own: the optimizer uses the rates that the scheduler says. One for each group."""
        pairs = zip(used, scheduled, strict=False)
        pairs = [(lr, says) for (lr, _), says in pairs if lr is not None and says is not None]
        off = [number for number, (lr, says) in enumerate(pairs) if not is_close(lr, says)]
        if not off or len(used) != len(scheduled):
            return None
        lr, says = pairs[off[0]]
        return cls.finding(
            "warning",
            found=f"learning rate {lr:.4g} (parameter group {off[0]})",
            expected=f"{says:.4g} (as the scheduler says)",
            causes=("the scheduler was built for another optimizer", "the rate is set by hand after the scheduler"),
            action="build the scheduler from the optimizer that the Trainer is given",
            evidence={"used": used, "scheduled": scheduled},
        )

    @classmethod
    def judge_length(cls, factor: Callable[[int], float] | None, steps: int, speeds: dict[int, str]) -> Finding | None:
        """`factor`: on the rate, by step. `speeds`: what else than updates its steps may have been counted in."""
        for speed, unit in speeds.items() if factor is not None and steps > 1 else ():
            end = steps * speed
            try:
                last, way = factor(end), [factor(step) for step in range(steps, end, 1 + (end - steps) // 500)]
                is_end = factor(end - 1) > last and last <= min(map(factor, (end + 1, end + end // 7, 2 * end)))
            except Exception:  # a table of the user's own that ends with the run, which is right
                return None
            if speed > 1 and is_end and min(way) > last and way[0] > last + cls.LEFT * (factor(end // 2) - last):
                return cls.finding(
                    "warning",
                    found=f"the schedule ends after {end:,} steps",
                    expected=f"{steps:,} (where it has {way[0]:.3g} of its rate left)",
                    causes=(f"steps counted in {unit} ({speed}): the Trainer steps it once an update",),
                    action="make the scheduler for max_steps, and its warm-up in updates too",
                    evidence={"steps": steps, "end": end, "speed": speed},
                    check=PROBE,
                )
        return None

    @classmethod
    def judge_rise(cls, factor: Callable[[int], float] | None, steps: int, ends: dict[int, str]) -> Finding | None:
        """A schedule that is lowest where it was meant to end, and goes on from there, upwards: as a cosine does.
        `ends`: after how many steps it may have been meant to, which is no length of this run."""
        for end, unit in ends.items():
            if factor is None or not 1 < end < steps:
                continue
            try:
                before, last, *after = (factor(step) for step in range(end - 1, end + 3))
                rates = {step: factor(step) for step in range(0, steps, 1 + steps // 500)}
            except Exception:  # a table of the user's own
                return None
            risen = max((rate for step, rate in rates.items() if step > end), default=last)
            is_lowest = before > last <= min(rate for step, rate in rates.items() if step > end // 2) + ZERO
            is_round = after[0] - last <= cls.ROUND * (after[1] - last)  # unlike restarts and triangles
            if is_lowest and is_round and risen > cls.RISEN * max(rates.values()):
                return cls.finding(
                    "warning",
                    found=f"the rate rises again (from step {end:,} on, to {risen / max(rates.values()):.0%})",
                    expected=f"a fall (until {steps:,})",
                    causes=(f"its length is {unit} (a cosine rises after its end)",),
                    action="make the schedule for max_steps; num_cycles or CosineAnnealingWarmRestarts for restarts",
                    evidence={"steps": steps, "end": end},
                    check=PROBE,
                )
        return None

    @classmethod
    def judge_layers(cls, parameters: Parameters, optimizer: torch.optim.Optimizer) -> Finding | None:
        """Rates by layer that fall with its depth, each by the same factor."""
        rate_of = {
            id(p): plain_rate(g.get("initial_lr", g["lr"])) for g in optimizer.param_groups for p in g["params"]
        }
        layers: dict[int, set] = {}
        for name, p in parameters:
            if (number := re.search(r"\.(?:layers?|h|blocks?)\.(\d+)\.", name)) and id(p) in rate_of:
                layers.setdefault(int(number[1]), set()).add(rate_of[id(p)])
        rates = [next(iter(layers[number])) for number in sorted(layers) if len(layers[number]) == 1]
        if len(rates) < max(cls.MIN_LAYERS, len(layers)) or not all(rates):
            return None
        ratios = [first / second for first, second in itertools.pairwise(rates)]
        if ratios[0] <= 1 + cls.TOLERANCE or not all(is_close(ratio, ratios[0]) for ratio in ratios):
            return None
        return cls.finding(
            "warning",
            found=f"rates {rates[0]:.3g} (first layer) to {rates[-1]:.3g} (last)",
            expected="lowest first",
            causes=(f"layer decay is inverted (it divides by {1 / ratios[0]:.3g}, or counts from the other end)",),
            action="multiply the rate by the factor once for each layer that lies above",
            evidence={"rates": rates},
            check=PROBE,
        )


def lambda_of(scheduler) -> Callable[[int], float] | None:
    """The factor of a LambdaLR, and of a CosineAnnealingLR down to 0; None for other schedulers."""
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate wraps it
    if type(scheduler) is torch.optim.lr_scheduler.CosineAnnealingLR:
        return lambda step: (1 + math.cos(math.pi * step / scheduler.T_max)) / 2
    return scheduler.lr_lambdas[0] if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR) else None


def ends_of(factor, args, steps: int) -> dict[int, str]:
    """After how many steps a schedule may end by mistake: what transformers' own cosine was made for, the warm-up, and
    epochs taken for steps."""
    given = getattr(factor, "keywords", {})
    if "num_training_steps" in given:
        is_half = given.get("num_cycles", 0.5) == 0.5  # else it is to rise again
        return {given["num_training_steps"]: "another run's"} if is_half else {}
    epochs = int(args.num_train_epochs) if args.max_steps <= 0 else 0
    return {epochs: "counted in epochs", args.get_warmup_steps(steps): "the warm-up's"}


def peak_of(group: dict, run) -> float:
    """The largest rate that anyone asked for: the arguments, the optimizer, the group, a cycle or a limit."""
    asked = [run.args.learning_rate, getattr(run.inner_optimizer, "defaults", {}).get("lr")]
    asked += [group.get("initial_lr"), group.get("max_lr"), group.get("lr")]
    limits = getattr(run.trainer.lr_scheduler, "max_lrs", getattr(run.trainer.lr_scheduler, "max_lr", None))
    asked += limits if isinstance(limits, (list, tuple)) else [limits]
    rates = [plain_rate(rate) for rate in asked]
    return max(rate for rate in rates if isinstance(rate, (int, float)) and math.isfinite(rate))


def schedule_of(trainer) -> Callable[[int], float] | CannotJudge:
    """The factor on the initial rate by optimizer step, or why there is none to compare with."""
    if not created_scheduler(trainer):
        return CannotJudge("the scheduler is the user's own, or the optimizer's")
    if trainer.accelerator.scaler is not None:
        return CannotJudge("fp16 loss scaling skips steps now and then, and the schedule with them")
    args, total = trainer.args, trainer.state.max_steps
    warmup = args.get_warmup_steps(total)
    try:
        return expected_learning_rates(
            args.lr_scheduler_type, args.learning_rate, warmup, total, args.lr_scheduler_kwargs
        )
    except CannotJudge as reason:
        return reason.without_trace()


def expected_learning_rates(
    lr_scheduler_type: str,
    learning_rate: float,
    num_warmup_steps: int,
    num_training_steps: int,
    lr_scheduler_kwargs: dict | None = None,
) -> Callable[[int], float]:
    """The schedule as a function of the optimizer step (from 0): the factor on the initial learning rate.

    Built by `transformers.get_scheduler`, as Trainer does. Raises `CannotJudge` for schedules that follow a metric.
    """
    if lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
        raise CannotJudge(f"the schedule {SchedulerType(lr_scheduler_type).value} depends on the losses")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=learning_rate)
    scheduler = get_scheduler(lr_scheduler_type, optimizer, num_warmup_steps, num_training_steps, lr_scheduler_kwargs)
    return scheduler.lr_lambdas[0]


def is_close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=LearningRate.TOLERANCE, abs_tol=ZERO)


def _is_on(multiplier: Callable[[int], float], step: int, lr: float | None, initial: float | None) -> bool:
    """Between the least and the largest rate of the steps around; nothing to say where a group has no rate."""
    if lr is None or initial is None:
        return True
    around = [initial * multiplier(near) for near in (max(0, step - 1), step, step + 1)]
    slack = LearningRate.TOLERANCE * max(around) + ZERO
    return min(around) - slack <= lr <= max(around) + slack


def _causes(multiplier, step, lr, initial, world_size, accumulation) -> tuple[str, ...]:
    """Name the factor by which the schedule runs too fast, where one explains the rate (accelerate#999)."""
    speeds = {
        world_size: "ranks",
        accumulation: "accumulation steps",
        world_size * accumulation: "ranks x accumulation",
    }
    fits = (k for k in dict.fromkeys((*speeds, 2, 3, 4, 8)) if k > 1 and _is_on(multiplier, step * k, lr, initial))
    if (k := next(fits, None)) is not None:
        many = f" (as many as {speeds[k]})" if k in speeds else ""
        return (f"the schedule advances {k} times a step{many}", "warmup or total counted in other steps")
    return ("the schedule was not restored (from the checkpoint)", "warmup or total counted in other steps")
