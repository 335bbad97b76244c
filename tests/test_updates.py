"""What is lost at a resume: on hand-written numbers, and on a tiny model under torch's AdamW."""

import math

import pytest
import torch
from torch import nn

from recipe.guards.updates import check_resume, count_optimizer_states


def resume(before=3.0, after=3.0, dtype=torch.float32, states=(9, 9)):
    return check_resume(10, 0, before, after, dtype, *states)


@pytest.mark.parametrize(
    ("arguments", "severity"),
    [
        ({}, None),
        ({"after": 3.0009}, None),
        ({"after": 3.002}, "error"),
        ({"after": 3.002, "dtype": torch.bfloat16}, None),
        ({"after": 2.9, "dtype": torch.bfloat16}, "error"),
        ({"after": math.nan}, "error"),
        ({"states": (9, 0)}, "warning"),
        ({"states": (0, 0)}, None),  # plain SGD
        ({"before": None, "after": None, "states": (None, 0)}, None),
    ],
)
def test_the_pinned_batch_and_the_optimizer_after_a_resume(arguments, severity):
    finding = resume(**arguments)
    assert (finding.severity if finding else None) == severity


def test_states_of_an_optimizer_are_counted():
    model = nn.Linear(4, 4)
    adam, sgd = torch.optim.AdamW(model.parameters()), torch.optim.SGD(model.parameters())
    assert count_optimizer_states(adam) == 0
    model(torch.randn(2, 4)).sum().backward()
    adam.step()
    sgd.step()
    assert (count_optimizer_states(adam), count_optimizer_states(sgd)) == (2, 0)
