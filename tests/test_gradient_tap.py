"""What micro-batches add to a gradient and what the step is taken with, on one small parameter."""

import math

import pytest
import torch
from torch import nn

from recipe.guards.taps import GradientTap


@pytest.fixture
def tapped():
    model = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32))
    tap = GradientTap(list(model.named_parameters()))
    tap.is_listening = True
    yield model, tap
    tap.close()


def backward(model):
    model(torch.randn(3, 32)).square().sum().backward()


def test_the_last_small_parameter_is_followed(tapped):
    assert tapped[1].name == "1.bias"


def test_a_step_is_the_sum_of_its_micro_batches_bit_for_bit(tapped):
    model, tap = tapped
    for _ in range(3):
        backward(model)
    tap.before_clip()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    total, error, before, now, changed, _ = tap.take(3, 0).tolist()
    assert error == changed == 0 and total == before > now > 0
    assert tap.take(1, 0) is None  # nothing recorded since


def test_what_is_zeroed_in_between_is_missing(tapped):
    model, tap = tapped
    backward(model)
    model.zero_grad()
    backward(model)
    total, error, before, *_ = tap.take(2, 0).tolist()
    assert error > 0.1 * max(total, before)


def test_probes_and_several_backward_passes_are_not_counted(tapped):
    model, tap = tapped
    tap.is_listening = False
    backward(model)
    assert tap.take(1, 0) is None
    tap.is_listening = True
    backward(model)
    backward(model)
    assert tap.take(1, 0) is None  # one micro-batch that went back twice


def test_a_model_without_a_usable_parameter_is_not_followed():
    tap = GradientTap([("w", nn.Parameter(torch.zeros(4), requires_grad=False))])
    tap.before_clip()
    assert tap.take(1, 0) is None
    tap.close()


def test_what_somebody_else_writes_between_steps_is_recorded(tapped):
    model, tap = tapped
    for step, recorded in ((1, 0.5 * math.sqrt(32)), (9, 0.0)):  # steps 2 to 9 were taken unrecorded
        tap.after_step(0)
        with torch.no_grad():
            tap.parameter.add_(0.5)
        backward(model)
        assert tap.take(1, step)[4].item() == pytest.approx(recorded)
