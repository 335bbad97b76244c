"""`loss_diverged` on hand-written losses, and on trainings that diverge."""

import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from recipe.guards.diverged import RISE, LossDiverged, sampled_loss
from recipe.guards.guard import CannotJudge
from tests.test_guards_on_runs import alarms, check_first, make_model, make_trainer, train, watch
from tests.zoo.rows import RowStream, make_rows
from tests.zoo.run import execute
from tests.zoo.setting import Setting

V = 4096
GUESS = math.log(V)  # 8.32


def check(losses, first=GUESS, vocab_size=V):
    return LossDiverged.judge(losses, first, vocab_size)


def last(losses, first=GUESS):
    """The first finding, over all windows."""
    windows = (losses[end - LossDiverged.STEPS : end] for end in range(LossDiverged.STEPS, len(losses) + 1))
    return next(filter(None, (check(window, first) for window in windows)), None)


def test_a_loss_that_stays_above_a_guess_is_an_error():
    finding = check([GUESS + 1.1] * LossDiverged.STEPS)
    assert finding.id == "loss_diverged" and finding.severity == "error"
    assert finding.found == "loss 9.42 in 20 steps, not falling"
    assert finding.expected == "under 9.32 (ln V 8.32)"
    assert json.dumps(finding.evidence)
    assert check([GUESS + 0.9] * LossDiverged.STEPS) is None


def test_it_must_be_above_the_first_loss_too():
    assert check([12.0] * 20, first=12.5) is None and check([14.0] * 20, first=12.5) is not None
    assert check([68.0] * 20, first=64.0) is None and check([71.0] * 20, first=64.0) is not None  # 10 % of it


def test_one_that_falls_is_on_its_way_back_unless_it_is_far_up():
    falling = [12.0 - 0.05 * step for step in range(20)]
    assert check(falling) is None and check(falling[::-1]) is not None
    far = [LossDiverged.FAR * GUESS + 5 - 0.1 * step for step in range(20)]
    assert check(far).found == "loss 20.69 in 20 steps"


def test_the_runs_that_were_seen():
    rate_1 = [8.3, 8.3, 8.4, 10.5, 10.2, 11.0, 9.6, 10.3, 10.0, 18.1, 15.7, 17.2, 21.6, 16.0, 19.7, 16.2, 17.3, 16.3]
    assert last([*rate_1, 18.9, 14.3, 13.6, 12.0, 12.1, 11.6, 9.8, 10.1, 9.9, 9.1, 8.6, 8.6]) is not None
    rate_3 = [5.5, 117, 308, 339, 316, 162, 346, 290, 219, 203, 273, 328, 206, 182, 120, 86, 86, 84, 113, 103, 102, 54]
    assert LossDiverged.judge(rate_3[:20], 5.5, 257) is not None  # falls from the sixth step on
    assert check([GUESS + 0.01 * (-1) ** step for step in range(20)]) is None  # learning rate 0


@pytest.mark.parametrize("steps_up", [1, 5, 9])
def test_a_spike_that_recovers_is_none(steps_up):
    assert last([3.0] * 40 + [30.0] * steps_up + [3.5] * 40) is None
    assert (
        last([3.0] * 40 + [15.0 - 0.4 * step for step in range(30)] + [3.0] * 40) is None
    )  # and one that falls slowly


def test_a_curriculum_to_harder_data_is_none():
    """From templates to random tokens: a model that was sure of its templates costs more than a guess for a while."""
    assert last([0.1] * 60 + [14.0 * 0.8**step + GUESS for step in range(30)] + [GUESS] * 60) is None


@pytest.mark.parametrize("first", [GUESS, 1.5 * GUESS, 64.0, 400.0])
def test_healthy_noise_raises_nothing(first):
    rng = random.Random(0)
    for deviation in (0.02, 0.05):
        flat = [first * (1 + rng.gauss(0, deviation)) for _ in range(500)]
        falling = [(3 + (first - 3) / (1 + step / 30)) * (1 + rng.gauss(0, deviation)) for step in range(500)]
        assert last(flat, first) is None and last(falling, first) is None


def test_what_is_no_number_is_another_guards_business():
    assert check([9e3] * 19 + [math.nan]) is None and check([9e3] * 20, first=math.inf) is None


# --- which loss it is


def fresh(vocab_size=V) -> LossDiverged:
    guard = LossDiverged()
    guard.setup(SimpleNamespace(vocab_size=vocab_size, max_steps=100, pinned=None))
    return guard


def level(reported, sampled, steps=LossDiverged.STEPS) -> LossDiverged:
    """`reported`, `sampled`: of a step, counted from 1."""
    guard = fresh()
    for step in range(1, steps + 1):
        guard.add(step, reported(step), sampled(step))
    return guard


def every_second(value):
    return lambda step: value(step) if step % 2 else None


def test_the_sampled_loss_decides_whatever_is_reported():
    low, high = every_second(lambda step: 5.0), every_second(lambda step: 5.0 + 10 * step)
    assert level(lambda step: 5000.0 * step, low).judge_window() is None  # a sum over tokens, an auxiliary loss
    assert level(lambda step: 5.0, high).judge_window() is not None


@pytest.mark.parametrize(
    ("first", "is_judged"), [(GUESS, True), (GUESS + 0.1, True), (GUESS + 0.3, False), (5e3, False)]
)
def test_without_samples_the_reported_loss_must_have_begun_at_a_guess(first, is_judged):
    held = level(lambda step: first if step == 1 else 40.0, lambda step: None)
    if is_judged:
        assert held.judge_window() is not None
    else:
        with pytest.raises(CannotJudge, match="not known to be a cross entropy"):
            held.judge_window()


def test_a_run_whose_first_step_was_not_seen_is_not_judged_by_what_is_reported():
    held = fresh()
    for step in range(50, 80):
        held.add(step, 30.0, None)
    with pytest.raises(CannotJudge):
        held.judge_window()


def test_a_few_samples_are_not_enough():
    held = level(lambda step: GUESS, lambda step: 50.0 if step < LossDiverged.MIN_SAMPLES else None)
    assert held.judge_window() is None


def test_rows_without_a_scored_position_are_no_samples():
    assert sampled_loss([(3.0, 0.1), (5.0, 0.1), (0.0, 0.0)]) == 4.0 and sampled_loss([(0.0, 0.0)]) is None


# --- far above its own best


def follow(losses, pinned=None, reported=None, floors=None) -> list:
    """Findings of a whole curve. `floors`: of n-gram models. `pinned`: the loss of the first rows, by step; else that
    of the step, as if the data never changed: the least favourable for a healthy curve."""
    guard, found = fresh(), []
    for number, loss in enumerate(losses, 1):
        guard.add(number, (reported or losses)[number - 1], loss if number % 2 else None)
        of_first_rows = (pinned or losses)[number - 1] if number % guard.PINNED_STEPS == 0 else None
        guard.note_pinned(of_first_rows)
        if number % guard.STEPS == 0:
            guard.state["floors"] = [[number, floors[number - 1]]] if floors else []
            guard.add_median(number)
            found += [guard.judge_rise(**{name: guard.state[name] for name in RISE}, step=number)]
    return [finding for finding in found if finding is not None]


def power_law(step: int) -> float:
    return 3.0 + 7.3 / (1 + step / 30) ** 0.6


def noisy(curve, seed: int, sd: float = 0.15) -> list[float]:
    rng = random.Random(seed)
    return [loss + rng.gauss(0, sd) + (rng.random() < 0.01) * rng.uniform(0, 3) for loss in curve]


def test_a_loss_that_rises_slowly_is_found_and_says_where_it_was_best():
    curve = noisy([power_law(step) if step < 400 else power_law(400) + 0.01 * (step - 400) for step in range(900)], 0)
    finding = follow(curve)[0]
    assert finding.severity == "warning" and "lower the rate" in finding.action and json.dumps(finding.evidence)
    assert abs(finding.evidence["best"][2] - 400) <= 60 and finding.slot != "loss_diverged"
    assert follow(curve, reported=[-loss for loss in curve]) == []  # gradient ascent on purpose


def test_a_rise_that_stays_is_found_also_where_it_is_flat():
    assert follow(noisy([3.0 if step < 300 else 4.5 for step in range(700)], 1))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("sd", [0.05, 0.6])
def test_healthy_curves_are_silent(seed, sd):
    rng = random.Random(seed)
    curve = [power_law(step) + 0.2 * math.sin(step / 300) for step in range(3000)]
    for _ in range(6):  # spikes that recover, over tens of steps and more
        at, height, fade = rng.randrange(100, 2700), rng.uniform(0.5, 5), rng.choice((5, 20, 60, 150))
        curve = [loss + height * math.exp(-(step - at) / fade) * (step >= at) for step, loss in enumerate(curve)]
    assert follow(noisy(curve, seed, sd)) == []


@pytest.mark.parametrize("rise", ["jump", "slowly"])
def test_a_curriculum_is_silent(rise):
    """From code to web text: the loss rises by 1.8 nats, and that of the first rows by what is forgotten."""
    share = [float(step > 500) if rise == "jump" else min(1.0, max(0.0, (step - 500) / 500)) for step in range(2000)]
    curve = [1.2 + 1.8 * share[step] + 5 / (1 + step / 20) for step in range(2000)]
    first_rows = [1.2 + 0.6 * share[step] + 5 / (1 + step / 20) for step in range(2000)]
    assert follow(noisy(curve, 2), pinned=first_rows) == []


def test_data_that_count_as_harder_too_are_no_divergence():
    """The model forgets the first rows for other text: their loss rises as that of the steps does."""
    curve = noisy([0.3 + 3.0 * (step > 400) + 5 / (1 + step / 20) for step in range(800)], 3)
    assert follow(curve) and follow(curve, floors=[1.0 - 0.001 * step for step in range(800)])
    assert follow(curve, floors=[0.8 + 2.5 * (step > 400) for step in range(800)]) == []


# --- trainings


def uphill(trainer):
    """From step 60 on the rate of the optimizer is negative, and so small that the loss rises slowly."""

    class Uphill(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
            for group in optimizer.param_groups:
                group["lr"] = abs(group["lr"]) * (1 if state.global_step < 60 else -0.3)

    trainer.add_callback(Uphill())
    return trainer


def test_a_training_that_goes_uphill_slowly(tmp_path):
    trainer = uphill(make_trainer(tmp_path, steps=260, learning_rate=3e-3, lr_scheduler_type="constant"))
    guards = watch(trainer)
    rises = [finding for finding in guards.findings if finding.id == "loss_diverged" and finding.cause == "rise"]
    assert rises or ("loss_diverged", "error") in {(f.id, f.severity) for f in guards.findings}
    assert ("learning_rate_off", "negative") in {(f.id, f.cause) for f in guards.findings}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["grows", "spike", "curriculum"])
def test_a_rate_that_grows_without_end_a_spike_and_a_curriculum(how):
    """A warm-up that never ends, at rates that no bound calls absurd: the loss rises slowly and stays far above its
    best, of 0.4, and far below a guess. A spike of that size that takes 30 steps to fade is none, nor English after
    templates, which are forgotten."""
    change = {"grows": rate_grows, "spike": spike, "curriculum": harder_text}[how]
    record = execute(
        Setting(text="templates", steps=440, batch=4, block=64, stream=True, change=change), with_others=False
    )
    rises = [each for each in record["findings"] if each["id"] == "loss_diverged"]
    medians = [round(sorted(record["losses"][at : at + 20])[10], 2) for at in range(0, 440, 20)]
    assert [each["severity"] for each in rises] == ["warning"] * (how == "grows"), medians
    assert "loss_diverged" in record["judged_steps"]


def harder_text(run):
    half = len(run.train_dataset.rows) // 2
    run.train_dataset = RowStream(
        run.train_dataset.rows[:half] + make_rows(run.setting.changed(text="english"))[half:]
    )


def rate_grows(run):
    """From step 120 on the rate doubles every 60 steps, up to 9 times what it was."""
    own_rate(run, 8e-3, lambda step: min(9.0, 2 ** max(0.0, (step - 120) / 60)))


def spike(run):
    """A rate 9 times as high for 4 steps."""
    own_rate(run, 3e-3, lambda step: 9.0 if 160 <= step < 164 else 1.0)


def own_rate(run, rate: float, factor) -> None:
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=rate)
    run.optimizers = optimizer, LambdaLR(optimizer, factor)


@pytest.mark.parametrize("rate", [1.0, 3.0])
def test_a_learning_rate_far_too_high(tmp_path, rate):
    guards = train(tmp_path, steps=30, learning_rate=rate)
    check_first(guards, "loss_diverged", 20, 24)


def test_it_is_seen_after_a_resume_too(tmp_path):
    trainer = make_trainer(tmp_path, steps=16, learning_rate=1.0, save_strategy="steps", save_steps=8)
    assert "loss_diverged" not in dict(alarms(watch(trainer)))
    guards = watch(make_trainer(tmp_path, steps=30, learning_rate=1.0), tmp_path / "run/checkpoint-8")
    assert ("loss_diverged", 20) in alarms(guards)


@pytest.mark.parametrize("changes", [{"initializer_range": 1.0}, {"initializer_range": 0.3}])
def test_wide_weights_are_judged_and_silent(tmp_path, changes):
    guards = train(tmp_path, model=make_model(**changes), steps=30)
    assert alarms(guards) == [] and "loss_diverged" in guards.judged


def test_a_sum_over_tokens_is_judged_and_silent(tmp_path):
    model = make_model()
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    guards = train(tmp_path, model=model, train=None, steps=30)
    assert "loss_diverged" not in dict(alarms(guards)) and "loss_diverged" in guards.judged


def test_a_run_of_a_few_steps_says_that_it_is_too_short(tmp_path):
    guards = train(tmp_path, steps=6)
    assert guards.not_applicable["loss_diverged"] == "the run has 6 steps, it needs 20"
