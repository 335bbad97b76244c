"""Model and optimizer after a resume: on hand-made numbers and on a run."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from recipe.guards.resume import ResumeJump, Saved, count_optimizer_states
from tests.test_guards_on_runs import check_first, check_healthy, make_trainer, watch


def resume(before=3.0, after=3.0, dtype=torch.float32, states=(9, 9), steps=(None, None)):
    return ResumeJump.judge(Saved(before, states[0], steps[0]), Saved(after, states[1], steps[1]), dtype)


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
        ({"steps": (40, 40)}, None),
        ({"steps": (40, 1)}, "warning"),
        ({"steps": (40, None)}, None),
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


def test_moments_that_are_those_of_other_parameters():
    before = np.array([1.0, 2.0, 3.0, 0.0])
    assert ResumeJump.moved(before, np.array([2.0, 1.0, 3.0, 0.0])) == 2
    others = (
        before,
        before * 1.005,
        np.array([1.0, 2.0, 3.5, 0.0]),
        before[:3],
        np.array([1.0, 2.0, np.nan, 0.0]),
        None,
    )
    assert not any(ResumeJump.moved(before, other) for other in others)


def reorder(path) -> None:
    """Each parameter gets the moments of the next one of its shape."""
    saved, alike = torch.load(path, weights_only=False), {}
    for number, state in saved["state"].items():
        alike.setdefault(state["exp_avg"].shape, []).append(number)
    for numbers in alike.values():
        states = [saved["state"][number] for number in numbers]
        saved["state"].update(zip(numbers, states[1:] + states[:1], strict=True))
    torch.save(saved, path)


def test_on_a_run(tmp_path):
    def make(steps=6):
        return make_trainer(tmp_path, steps=steps, save_strategy="steps", save_steps=4)

    first = watch(make())
    assert "not resumed" in first.not_applicable["resume_jump"]
    checkpoint = tmp_path / "run" / "checkpoint-4"
    check_healthy(watch(make(), checkpoint), "resume_jump")
    reorder(checkpoint / "optimizer.pt")
    guards = watch(make(), checkpoint)
    check_first(guards, "resume_jump", 4)
    assert "others' moments" in guards.findings[0].found
    (checkpoint / "optimizer.pt").unlink()
    check_first(watch(make(), checkpoint), "resume_jump", 4)
    (checkpoint / "guards.json").unlink()
    assert "no state of the guards" in watch(make(), checkpoint).cannot_judge["resume_jump"]
