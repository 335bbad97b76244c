"""What micro-batches add to a gradient and what the step is taken with: on numbers, and on one small parameter."""

import math

import pytest
import torch
from torch import nn

from recipe.guards.gradients import (
    GradientWatch,
    check_sum,
)

NAN = math.nan


@pytest.mark.parametrize(
    ("norms", "is_low", "found"),
    [
        ([2.0, 0.0, 2.0, 1.0, 0.0, 0.0], False, False),
        ([2.0, 1.8, 0.5, 0.5, 0.0, 1.8], False, True),  # only the last micro-batch
        ([2.0, 2.0, 0.0, 0.0, 0.0, 2.0], False, True),  # nothing is left
        ([2.0, 0.1, 2.0, 1.0, 0.0, 0.1], True, False),  # rounding of half precision
        ([0.0, 0.0, 0.0, 0.0, 0.0, 0.0], False, False),  # every label masked
        ([NAN, NAN, NAN, NAN, 0.0, NAN], False, False),  # others name it
    ],
)
def test_the_sum_of_the_micro_batches(norms, is_low, found):
    finding = check_sum(7, 70, "norm", norms, 4, is_low)
    assert (finding is not None) is found
    assert not found or (finding.id, finding.severity) == ("accumulation_mismatch", "warning")


@pytest.mark.parametrize(
    ("num_micro_batches", "before", "cause"),
    [(4, 0.5, "between the micro-batches"), (1, 3.0, "not set to zero"), (1, 0.0, "dropped")],
)
def test_the_likely_cause_follows_from_the_numbers(num_micro_batches, before, cause):
    finding = check_sum(7, 70, "norm", [2.0, 2.0, before, before, 0.0, 0.0], num_micro_batches, False)
    assert cause in finding.likely_causes[0] and finding.severity == "warning"


@pytest.mark.parametrize(
    ("num_micro_batches", "norms"),
    [
        (1, [2.0, 1.5, 3.0, 1.0, 0.0, 1.2]),  # a filter adds something of its own
        (4, [2.0, 1.0, 1.0, 1.0, 0.0, 1.0]),  # all of it halved
    ],
)
def test_a_gradient_that_is_filtered_or_scaled_may_be_so_on_purpose(num_micro_batches, norms):
    assert check_sum(7, 70, "norm", norms, num_micro_batches, False).severity == "info"


@pytest.fixture
def watched():
    model = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32))
    watch = GradientWatch(list(model.named_parameters()))
    watch.is_listening = True
    yield model, watch
    watch.close()


def backward(model):
    model(torch.randn(3, 32)).square().sum().backward()


def test_the_last_small_parameter_is_followed(watched):
    assert watched[1].name == "1.bias"


def test_a_step_is_the_sum_of_its_micro_batches_bit_for_bit(watched):
    model, watch = watched
    for _ in range(3):
        backward(model)
    watch.before_clip()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    total, error, before, now, changed, _ = watch.take(3, 0).tolist()
    assert error == changed == 0 and total == before > now > 0
    assert watch.take(1, 0) is None  # nothing heard since


def test_what_is_zeroed_in_between_is_missing(watched):
    model, watch = watched
    backward(model)
    model.zero_grad()
    backward(model)
    total, error, before, *_ = watch.take(2, 0).tolist()
    assert error > 0.1 * max(total, before)


def test_probes_and_several_backward_passes_are_not_counted(watched):
    model, watch = watched
    watch.is_listening = False
    backward(model)
    assert watch.take(1, 0) is None
    watch.is_listening = True
    backward(model)
    backward(model)
    assert watch.take(1, 0) is None  # one micro-batch that went back twice


def test_a_model_without_a_usable_parameter_is_not_followed():
    watch = GradientWatch([("w", nn.Parameter(torch.zeros(4), requires_grad=False))])
    watch.before_clip()
    assert watch.take(1, 0) is None
    watch.close()


def test_a_matrix_that_keeps_its_first_micro_batch_is_heard():
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32), nn.LayerNorm(32))
    watch = GradientWatch(list(model.named_parameters()), of_matrices=True)
    assert watch.name == "1.weight"
    watch.is_listening = True
    for keeps, found in ((False, False), (True, True)):
        model.zero_grad()
        backward(model)
        first = model[1].weight.grad.clone()
        backward(model)
        if keeps:
            model[1].weight.grad.copy_(first)
        norms = watch.take(2, 0).tolist()
        assert (check_sum(1, 10, watch.name, norms, 2, False) is not None) is found
    watch.close()


def test_what_somebody_else_writes_between_steps_is_heard(watched):
    model, watch = watched
    for step, heard in ((1, 0.5 * math.sqrt(32)), (9, 0.0)):  # steps 2 to 9 were taken unheard
        watch.after_step(0)
        with torch.no_grad():
            watch.parameter.add_(0.5)
        backward(model)
        assert watch.take(1, step)[4].item() == pytest.approx(heard)
