"""The learning rate against the schedule, on numbers."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import get_scheduler

from recipe.guards import schedules
from recipe.guards.guard import CannotJudge
from recipe.guards.learning_rate import LearningRate, ends_of, expected_learning_rates, lambda_of, peak_of

LINEAR = expected_learning_rates("linear", 1e-3, 10, 100)


def rate(step, lr, **kwargs):
    return LearningRate.judge(step, [(lr, 1e-3)], LINEAR, 1e-3, **kwargs)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("cosine", None),
        ("constant", None),
        ("constant_with_warmup", None),
        ("cosine_with_min_lr", {"min_lr": 1e-4}),
        ("warmup_stable_decay", {"num_decay_steps": 20}),
    ],
)
def test_every_schedule_that_is_followed_is_silent(name, arguments):
    multiplier = expected_learning_rates(name, 1e-3, 10, 100, arguments)
    for step in range(100):
        assert LearningRate.judge(step, [(1e-3 * multiplier(step), 1e-3)], multiplier, 1e-3) is None


def test_schedules_that_follow_a_metric_cannot_be_judged():
    for name in ("reduce_lr_on_plateau", "greedy"):
        with pytest.raises(CannotJudge, match=name):
            expected_learning_rates(name, 1e-3, 10, 100)


@pytest.mark.parametrize(
    ("rate", "cause", "severity"),
    [
        (-5e-5, "negative", "error"),
        (float("nan"), "not finite", "error"),
        (float("inf"), "not finite", "error"),
        (1.1e-2, "far above", "warning"),
        (9e-3, None, None),
        (0.0, None, None),
        (-1e-19, None, None),  # the rounding of a cosine
        (None, None, None),  # on a device, or an optimizer without a rate
    ],
)
def test_absolute_bounds(rate, cause, severity):
    finding = LearningRate.judge_bounds([(1e-3, 1e-3), (rate, None)], [1e-3, 1e-3])
    assert (finding and finding.cause, finding and finding.severity) == (cause, severity)
    assert finding is None or ("group 1" in finding.found and finding.to_json())


def peaks(optimizer, scheduler=None, learning_rate=5e-5) -> list[float]:
    inner = SimpleNamespace(lr_scheduler=scheduler)
    run = SimpleNamespace(args=SimpleNamespace(learning_rate=learning_rate), inner_optimizer=optimizer, trainer=inner)
    return [peak_of(group, run) for group in optimizer.param_groups]


def test_healthy_schedules_of_ones_own_stay_within_the_bounds():
    def optimizer(**rate):
        return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], **rate)

    one_cycle = optimizer(lr=1e-3)
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(one_cycle, max_lr=0.5, total_steps=100)]
    cyclic = optimizer(lr=1e-4)
    schedulers.append(torch.optim.lr_scheduler.CyclicLR(cyclic, base_lr=1e-4, max_lr=0.3, step_size_up=20))
    noam = optimizer(lr=1.0)
    schedulers.append(torch.optim.lr_scheduler.LambdaLR(noam, lambda s: 0.06 * min((s + 1) ** -0.5, (s + 1) / 1e3)))
    warm = optimizer(lr=3.0)
    schedulers.append(torch.optim.lr_scheduler.LinearLR(warm, 1e-3, 1.0, 50))
    greedy = optimizer(lr=1e-3)
    schedulers.append(get_scheduler("greedy", greedy, scheduler_specific_kwargs={"max_lr": 0.1}))
    for own, scheduler in zip((one_cycle, cyclic, noam, warm, greedy), schedulers, strict=True):
        limits = peaks(own, scheduler)
        for step in range(100):
            assert LearningRate.judge_bounds([(own.param_groups[0]["lr"], None)], limits) is None
            own.step()
            scheduler.step(*([5.0 - 0.01 * step] if own is greedy else []))


def test_a_group_that_was_added_later_is_held_to_the_largest_peak():
    assert LearningRate.judge_bounds([(1e-3, None), (5e-3, None)], [1e-3]) is None
    assert LearningRate.judge_bounds([(1e-3, None), (5e-2, None)], [1e-3]).cause == "far above"


def test_a_schedule_that_runs_too_fast_is_named():
    findings = [rate(step, 1e-3 * LINEAR(4 * step), world_size=4) for step in range(20)]
    onset = next(i for i, finding in enumerate(findings) if finding)
    assert onset <= 2 and findings[onset].likely_causes[0].startswith("the schedule advances 4 times a step")


def test_one_step_early_or_late_is_no_fault():
    assert all(rate(step, 1e-3 * LINEAR(max(0, step + late))) is None for step in range(100) for late in (-1, 0, 1))


def test_a_schedule_that_started_again_after_a_resume_is_found():
    finding = rate(50, 1e-3 * LINEAR(0))
    assert finding.severity == "warning"
    json.dumps(finding.evidence)


def test_a_checkpoint_that_brought_its_own_rate_is_found_unless_the_optimizer_is_the_users():
    used = [(5e-4 * LINEAR(30), 5e-4), (5e-4 * LINEAR(30), 5e-4)]
    assert "asked for" in LearningRate.judge(30, used, LINEAR, asked_for=1e-3).expected
    assert LearningRate.judge(30, used, LINEAR, asked_for=None) is None


def test_groups_with_rates_of_their_own_are_silent_and_each_is_judged():
    groups = [(initial * LINEAR(40), initial) for initial in (1e-3, 2e-2)]
    assert LearningRate.judge(40, groups, LINEAR, 1e-3) is None
    assert "group 1" in LearningRate.judge(40, [groups[0], (2e-2, 2e-2)], LINEAR, 1e-3).found
    assert LearningRate.judge(40, [(None, None)], LINEAR, 1e-3) is None  # an optimizer without a rate
    assert LearningRate.judge(40, [], LINEAR, 1e-3) is None


# --- before step 1: a schedule of the user's own, rates of layers


def linear(warmup: int, end: int):
    return lambda step: min((step + 1) / warmup, max(0.0, (end - step) / (end - warmup)))


def test_a_schedule_counted_in_micro_batches_is_found():
    finding = LearningRate.judge_length(linear(80, 320), 40, {1: "ranks", 8: "micro-batches of a step"})
    assert finding.severity == "warning" and finding.found == "the schedule ends after 320 steps"
    assert "micro-batches of a step (8)" in finding.likely_causes[0]


@pytest.mark.parametrize(
    "factor",
    [
        linear(10, 40),
        linear(10, 60),
        lambda step: 1.0,
        lambda step: 0.5 ** (step // 10),
        lambda step: 1 / (1 + step) ** 0.5,
        lambda step: 0.1 + 0.9 * abs(1 - step / 20 % 2),
        lambda step: abs(1 - (step + 32) / 32 % 2),  # a cycle, at its lowest after 320 steps
        [1.0 - number / 40 for number in range(41)].__getitem__,  # a table
        None,
    ],
)
def test_other_schedules_are_silent(factor):
    assert LearningRate.judge_length(factor, 40, {8: "micro-batches of a step"}) is None


def own(name: str, length: int = 100, warmup: int = 10, **kwargs):
    """The scheduler that `transformers.get_scheduler` makes for a run of this length."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    return get_scheduler(name, optimizer, warmup, length, kwargs)


def torchs(name: str, *lengths, **kwargs):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3, momentum=0.9)
    return getattr(torch.optim.lr_scheduler, name)(optimizer, *lengths, **kwargs)


def on_its_own(factor):
    return torchs("LambdaLR", factor)


def rises(scheduler, steps=100, **given):
    """`steps`: of the run, whose arguments have a warm-up of 10 and, unless `given`, as many epochs as are usual."""
    args = SimpleNamespace(**{"num_train_epochs": 3.0, "max_steps": -1, **given}, get_warmup_steps=lambda steps: 10)
    factor = lambda_of(scheduler)
    return LearningRate.judge_rise(factor, steps, ends_of(factor, args, steps))


def swinging(length: int):
    return lambda step: min(1.0, (step + 1) / 10) * (1 + math.cos(math.pi * step / length)) / 2


@pytest.mark.parametrize(
    ("scheduler", "cause"),
    [
        (on_its_own(swinging(10)), "the warm-up's"),
        (on_its_own(lambda step: 0.1 + 0.9 * swinging(10)(step)), "the warm-up's"),
        (torchs("CosineAnnealingLR", 10), "the warm-up's"),
        (torchs("CosineAnnealingLR", 3), "counted in epochs"),
        (own("cosine", 50), "another run's"),
        (own("cosine", 25, warmup=5), "another run's"),
        (own("cosine_with_min_lr", 40, min_lr=1e-4), "another run's"),
    ],
)
def test_a_cosine_that_rises_after_its_end_is_found(scheduler, cause):
    finding = rises(scheduler)
    assert finding.severity == "warning" and cause in finding.likely_causes[0]


@pytest.mark.parametrize(
    "scheduler",
    [
        own("cosine"),
        own("cosine", 90),
        own("cosine", 75),
        own("cosine", 200),
        own("cosine", 50, num_cycles=1.5),
        own("cosine_with_restarts", 50, num_cycles=4),
        own("cosine_with_restarts", num_cycles=9),
        own("cosine_with_min_lr", 80, min_lr=1e-4),
        own("linear", 50),
        own("polynomial", 50, power=2.0),
        own("inverse_sqrt"),
        own("constant_with_warmup"),
        own("warmup_stable_decay", num_decay_steps=20),
        torchs("CosineAnnealingLR", 100),
        torchs("CosineAnnealingLR", 20),  # a length that nothing says is wrong
        torchs("CosineAnnealingWarmRestarts", 10),
        torchs("CyclicLR", 1e-4, 1e-3, 10),
        torchs("OneCycleLR", 1e-3, 10),
        torchs("StepLR", 10),
        on_its_own(lambda step: (1 + math.cos(math.pi * (step % 10) / 10)) / 2),  # restarts after 10 steps
        on_its_own(lambda step: 1 - (step % 11) / 11),
        on_its_own(lambda step: abs(1 - step / 10 % 2)),  # straight down and up
        on_its_own(lambda step: min((step + 1) / 10, 10 / (step + 1)) ** 0.5),
        on_its_own([1.0 - number / 100 for number in range(100)].__getitem__),
    ],
)
def test_schedules_that_rise_on_purpose_or_not_at_all_are_silent(scheduler):
    assert rises(scheduler) is None
    assert rises(scheduler, max_steps=100) is None


def test_epochs_that_were_not_asked_for_are_no_length():
    assert rises(torchs("CosineAnnealingLR", 3), max_steps=100) is None


def layered(*rates) -> tuple[list, SimpleNamespace]:
    names = [f"model.layers.{number}.{part}.weight" for number in range(len(rates)) for part in ("attn", "mlp")]
    named = [(name, torch.nn.Parameter(torch.zeros(1))) for name in [*names, "model.norm.weight"]]
    rate_of = [rate for rate in rates for _ in range(2)] + [1e-3]
    groups = [{"params": [p], "lr": rate} for (_, p), rate in zip(named, rate_of, strict=True)]
    return named, SimpleNamespace(param_groups=groups)


def test_rates_that_grow_towards_the_first_layer_are_found():
    finding = LearningRate.judge_layers(*layered(4e-3, 2e-3, 1e-3))
    assert finding.severity == "warning" and "it divides by 0.5" in finding.likely_causes[0]


@pytest.mark.parametrize("rates", [(1e-3, 2e-3, 4e-3), (1e-3,) * 3, (4e-3, 1e-3, 1e-3), (2e-3, 1e-3), ()])
def test_other_rates_of_layers_are_silent(rates):
    assert LearningRate.judge_layers(*layered(*rates)) is None


def test_a_rate_of_0_long_before_the_end():
    def judge(factor, steps=100):
        return schedules.judge_idle(factor, steps)

    assert "from step 35 on" in judge(lambda step: max(0.0, 1 - step / 34))["found"]
    assert judge(lambda step: max(0.0, 1 - step / 95)) is judge(lambda step: 1.0) is judge(None) is None
    assert judge(lambda step: 0.0) is judge(lambda step: float(step % 30 > 0)) is judge([1.0, 0.0].__getitem__) is None


def test_a_plateau_that_waits_for_the_loss_to_rise():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    wrong, right = (torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode=mode) for mode in ("max", "min"))
    assert schedules.judge_plateau(wrong, None)["severity"] == "warning"
    assert schedules.judge_plateau(wrong, "eval_accuracy") is schedules.judge_plateau(right, None) is None
    assert schedules.judge_plateau(torch.optim.lr_scheduler.ConstantLR(optimizer), None) is None
