"""Updates that do not arrive: on hand-written numbers, and on tiny models under torch's AdamW."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainerControl, TrainingArguments

from recipe.guards.gradients import GradientNorms
from recipe.guards.guard import NotApplicable
from recipe.guards.initial_loss import InitialLoss
from recipe.guards.lost_updates import LostUpdates
from recipe.guards.policy import ReferenceWatch, judge_best, judge_reference, judge_untrained, losses_of_both
from recipe.guards.taps import LocalStep
from recipe.guards.updates import FIRST_STEPS, count_moved, count_small, sample_gradients, sample_once

LOST_STEPS, LOST_ELEMENTS = LostUpdates.LOST_STEPS, LostUpdates.LOST_ELEMENTS


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def named(model):
    return list(model.named_parameters())


def llama(**changes):
    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes)))


# --- low precision


class AdamWOnFloat32Copies(torch.optim.AdamW):
    """AdamW on float32 copies whose result is written to the bf16 weights: as mixed-precision optimizers do."""

    def __init__(self, parameters, **kwargs):
        self.low = list(parameters)
        super().__init__([p.detach().float().requires_grad_() for p in self.low], **kwargs)

    @torch.no_grad()
    def step(self, closure=None):
        copies = self.param_groups[0]["params"]
        for copy, low in zip(copies, self.low, strict=True):
            copy.grad = low.grad.float()
        super().step()
        for copy, low in zip(copies, self.low, strict=True):
            low.copy_(copy)


def lost(dtype, optimizer_class, learning_rate):
    model = llama(initializer_range=0.1).to(dtype)
    parameters = named(model)
    optimizer = optimizer_class(model.parameters(), lr=learning_rate)
    before = sample_once({}, parameters)
    for _ in range(LOST_STEPS):
        backward(model)
        optimizer.step()
    counts = count_moved(before, sample_gradients(parameters), parameters, LOST_STEPS * learning_rate).tolist()
    return LostUpdates.judge_moved(*counts, learning_rate)


def backward(model):
    model.zero_grad()
    ids = torch.randint(0, 64, (2, 16))
    model(input_ids=ids, labels=ids).loss.backward()


def test_pure_bf16_at_a_small_rate_loses_its_updates():
    finding = lost(torch.bfloat16, torch.optim.AdamW, 5e-5)
    assert finding.severity == "warning" and finding.evidence["moved"] < 0.3 * finding.evidence["judged"]
    json.dumps(finding.evidence)


@pytest.mark.parametrize(
    ("dtype", "optimizer", "learning_rate"),
    [
        (torch.bfloat16, AdamWOnFloat32Copies, 5e-5),
        (torch.bfloat16, torch.optim.AdamW, 3e-3),  # large steps are not lost
        (torch.bfloat16, torch.optim.AdamW, 1e-8),  # a warmup's: float32 would not show either
        (torch.float32, torch.optim.AdamW, 5e-5),
    ],
)
def test_updates_that_are_kept_are_silent(dtype, optimizer, learning_rate):
    assert lost(dtype, optimizer, learning_rate) is None


def test_few_elements_are_not_judged():
    assert LostUpdates.judge_moved(0, LOST_ELEMENTS - 1, 1e-5) is None
    assert LostUpdates.judge_moved(0, LOST_ELEMENTS, 1e-5) is not None
    assert count_moved({}, {}, [("w", nn.Parameter(torch.zeros(3)))], 1.0).tolist() == [0, 0]


# --- small updates


def test_adams_first_steps_are_of_the_size_of_the_rate():
    before, gradient = {"w": torch.zeros(100)}, {"w": torch.ones(100)}
    for moved, *counts in ((-1e-3, 0, 0), (-4e-5, 100, 0), (1e-3, 100, 100), (0.0, 100, 0)):  # the third goes uphill
        assert count_small(before, {"w": before["w"] + moved}, gradient, {"w": 1e-3})[[0, 2]].tolist() == counts
    assert count_small(before, before, {"w": torch.zeros(100)}, {"w": 1e-3}).tolist() == [0, 0, 0]


@pytest.mark.parametrize(("small", "found"), [(53, False), (64, True)])
def test_small_updates_are_found(small, found):
    assert (LostUpdates.judge_small(small, 100) is not None) is found
    assert LostUpdates.judge_small(0, 0) is None


@pytest.mark.parametrize(("uphill", "cause"), [(10, "Adam's epsilon"), (66, "maximize=True")])
def test_elements_that_moved_up_the_gradient_are_told_from_those_that_stayed(uphill, cause):
    finding = LostUpdates.judge_small(72, 100, uphill)
    assert finding.likely_causes[0].startswith(cause) and ("up the gradient" in finding.found) is (uphill > 36)


# --- writes


@pytest.mark.parametrize(
    ("changes", "rise", "found"),
    [
        ([0.1], 0.2, True),
        ([0.1], math.nan, False),
        ([0.1], 0.001, False),  # adapters were merged
        ([0.1], -0.3, False),  # an average that is better
        ([0.0], 0.2, False),  # averaged weights were put back
        ([], 0.2, False),
    ],
)
def test_a_write_that_makes_the_model_worse_is_found(changes, rise, found):
    finding = LostUpdates.judge_writes(changes, rise)
    assert (finding is not None) is found
    assert not found or (finding.id, finding.severity) == ("lost_updates", "warning")


@pytest.mark.parametrize("vector", [True, False])
@pytest.mark.parametrize("is_loss_scaled", [True, False])
def test_writes_to_the_small_parameter_alone_are_judged(vector, is_loss_scaled):
    model = llama()
    guard = set_up(model, torch.optim.AdamW(model.parameters()))
    norms = GradientNorms("norm", False, 1.0, 0.0, 1.0, 1.0, 0.3, 0.0, of_matrices=not vector)
    given = dict(gradients=[norms], run=SimpleNamespace(is_loss_scaled=is_loss_scaled), was_saved=True)
    assert len(observed(guard, {"rise": 0.2}, **given)) == (vector and not is_loss_scaled)


def test_the_loss_is_compared_over_a_save_only():
    model, losses = llama(), iter([3.0, 3.5])
    guard = set_up(model, torch.optim.AdamW(model.parameters()))
    guard.run.pinned = SimpleNamespace(losses=lambda times: [next(losses)])
    guard.before_micro_step(guard.run)
    assert guard.measure(LocalStep()) is None
    guard.run.trainer.control.should_save = True
    assert guard.measure(LocalStep()) is None
    guard.run.trainer.control.should_save = False
    guard.before_micro_step(guard.run)
    assert guard.measure(LocalStep()) == {"rise": 0.5}


# --- the guard over steps


def set_up(model, optimizer, step=0, **facts) -> LostUpdates:
    given = dict(
        named_parameters=named(model),
        model=model,
        optimizer=optimizer,
        inner_optimizer=optimizer,
        optimizer_name=type(optimizer).__name__,
        is_adam="Adam" in type(optimizer).__name__,
        is_sharded=False,
        is_compiled=False,
        step=step,
        trainer=SimpleNamespace(
            control=TrainerControl(), args=SimpleNamespace(torch_compile=False), model_wrapped=model
        ),
        pinned=None,
    )
    guard = LostUpdates()
    guard.setup(SimpleNamespace(**{**given, **facts}))
    return guard


def observed(guard, measured, **step) -> list:
    known = {"gradients": [], "was_saved": False, "run": SimpleNamespace(is_loss_scaled=False), **step}
    measured = {name: getattr(value, "tolist", lambda v=value: v)() for name, value in (measured or {}).items()}
    return list(guard.observe(SimpleNamespace(payload=lambda _: measured or None, **known)))


def steps(guard, model, optimizer, rates) -> list:
    """One step for each rate: `(number, check, whether it found something)` of all that it yields."""
    verdicts = []
    for number, rate in enumerate(rates, 1):
        for group in optimizer.param_groups:
            group["lr"] = rate
        backward(model)
        local = LocalStep(learning_rates=[(rate, None)])
        guard.before_step(local)
        optimizer.step()
        guard.after_step(local)
        found = observed(guard, guard.measure(local))
        verdicts += [(number, verdict.check, hasattr(verdict, "found")) for verdict in found]
    return verdicts


def saved(guard, *run, **facts) -> LostUpdates:
    """A new guard with the guard's state, as a checkpoint keeps it."""
    state = {
        name: value if hasattr(value, "dtype") else json.loads(json.dumps(value))
        for name, value in guard.save().items()
    }
    fresh = set_up(*run, **{"step": 5, **facts})
    fresh.load(state)
    return fresh


@pytest.mark.parametrize(("epsilon", "found"), [(1e-8, False), (1e3, True)])
def test_the_first_steps_of_adam(epsilon, found):
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), eps=epsilon)
    rates = [0.0, *[1e-3] * (FIRST_STEPS + 5)]
    assert steps(set_up(model, optimizer), model, optimizer, rates) == [(FIRST_STEPS + 2, "small", found)]


def test_of_a_resumed_run_without_state_and_of_other_optimizers_they_are_not_judged():
    model = llama()
    for optimizer, step in (
        (torch.optim.AdamW(model.parameters(), eps=1e3), 5),
        (torch.optim.SGD(model.parameters()), 0),
    ):
        guard = set_up(model, optimizer, step=step)
        assert steps(guard, model, optimizer, [1e-3] * (FIRST_STEPS + 5)) == []
        with pytest.raises(NotApplicable, match="half-precision"):
            list(guard.inspect(SimpleNamespace(args=TrainingArguments(use_cpu=True, report_to=[]))))


@pytest.mark.parametrize(("rate", "found"), [(2e-5, True), (3e-3, False)])
def test_low_precision_is_judged_in_windows(rate, found):
    model = llama(initializer_range=0.1).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters())
    verdicts = steps(set_up(model, optimizer), model, optimizer, [rate] * (2 * LOST_STEPS + 3))
    assert verdicts == [(LOST_STEPS, "weights", found), (2 * LOST_STEPS, "weights", found)]


@pytest.mark.parametrize(
    ("dtype", "saved_at"),
    [(torch.float32, 3), (torch.float32, FIRST_STEPS), (torch.float32, 12), (torch.bfloat16, 3), (torch.float16, 9)],
)
def test_what_is_measured_goes_on_after_a_resume(dtype, saved_at):
    def run(is_saved):
        torch.manual_seed(1)
        model = llama(initializer_range=0.1).to(dtype)
        optimizer = torch.optim.AdamW(model.parameters(), eps=1e2 if dtype == torch.float32 else 1e-4)
        guard = set_up(model, optimizer)
        verdicts = steps(guard, model, optimizer, [1e-4] * saved_at)
        guard = saved(guard, model, optimizer) if is_saved else guard
        verdicts += steps(guard, model, optimizer, [1e-4] * (LOST_STEPS + 2 - saved_at))
        return [verdict[1:] for verdict in verdicts], guard.save()

    (verdicts, state), (expected, kept) = run(is_saved=True), run(is_saved=False)
    assert verdicts == expected and len(verdicts) == 1
    assert all(torch.equal(*map(torch.as_tensor, (state[name], kept[name]))) for name in state)


def test_a_window_of_other_weights_does_not_fit():
    model, other = (llama(num_hidden_layers=layers).bfloat16() for layers in (2, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    guard = set_up(model, optimizer)
    steps(guard, model, optimizer, [1e-4])
    with pytest.raises(RuntimeError):
        saved(guard, other, torch.optim.AdamW(other.parameters()))


# --- casts


@pytest.mark.parametrize("is_stale", [False, True])
def test_the_casts_of_an_open_autocast_context(is_stale):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    guard, found = set_up(model, optimizer), []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(3):
            guard.before_micro_step(None)
            model(torch.randn(2, 16)).sum().backward()
            assert list(guard.after_micro_step(None, None)) == []
            optimizer.step()
            found += observed(guard, guard.measure(None))
            if not is_stale:
                torch.clear_autocast_cache()
    assert [hasattr(verdict, "found") for verdict in found] == [False, is_stale, is_stale]
    assert not model[0]._forward_hooks and guard.failure is None


@pytest.mark.parametrize("facts", [{"is_sharded": True}, {"is_compiled": True}, {}])
def test_without_autocast_or_a_plain_layer_no_hook_is_set(facts):
    model = nn.Sequential(nn.Linear(16, 16))
    guard = set_up(model, torch.optim.AdamW(model.parameters()), **facts)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bool(facts)):
        guard.before_micro_step(None)
    assert not model[0]._forward_hooks


# --- what is loaded at the end, what the policy is compared with


@pytest.mark.parametrize(
    ("is_loaded", "metric", "is_greater_better", "is_found"),
    [
        (True, "eval_loss", True, True),
        (True, "perplexity", True, True),  # as Trainer sets it by itself
        (True, "loss", False, False),
        (True, "accuracy", True, False),
        (True, "eval_neg_log_loss", True, False),  # of scikit-learn
        (False, "loss", True, False),
        (True, "loss", None, False),
    ],
)
def test_the_worst_checkpoint_as_the_best(is_loaded, metric, is_greater_better, is_found):
    facts = dict(load_best_model_at_end=is_loaded, metric_for_best_model=metric, greater_is_better=is_greater_better)
    finding = judge_best(LostUpdates.finding, SimpleNamespace(**facts))
    assert (finding is not None) == is_found and (not is_found or finding.severity == "warning")


@pytest.mark.parametrize(("every", "found"), [(1, 4), (2, 2), (1000, 0)])
def test_a_reference_that_is_synchronized(every, found):
    policy, reference = llama(), llama()
    run = SimpleNamespace(trainer=SimpleNamespace(ref_model=reference), model=policy, is_sharded=False)
    watch, said = ReferenceWatch(run), []
    for number in range(6):
        said.append(watch.before_step())
        with torch.no_grad():
            for weight, other in zip(policy.parameters(), reference.parameters(), strict=True):
                weight.add_(0.01)
                if (number + 1) % every == 0:
                    other.copy_(weight)
    assert said == [None] * 4 + [found, None]
    assert (judge_reference(LostUpdates.finding, found) is not None) == (every == 1)


@pytest.mark.parametrize(("policy", "reference", "is_found"), [(2.5, 4.2, True), (2.5, 3.8, False), (3.9, 4.2, False)])
def test_a_reference_that_was_never_loaded(policy, reference, is_found):
    assert (judge_untrained(InitialLoss.finding, policy, reference, 64) is not None) == is_found


def test_both_are_asked_for_the_same_tokens():
    model, reference = llama(), llama()
    run = SimpleNamespace(trainer=SimpleNamespace(ref_model=reference.train()), model=model, is_sharded=False)
    ids, mask = torch.randint(0, 64, (2, 8)), torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    policy, other, vocab_size = losses_of_both(run, {"input_ids": ids, "attention_mask": mask})
    expected = reference(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    assert abs(other - expected.item()) < 1e-5 and policy != other and vocab_size == 64 and reference.training
    run.trainer.ref_model = None
    assert losses_of_both(run, {"input_ids": ids}) is None
