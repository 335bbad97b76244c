"""Loss and gradients of a compiled model against those of the eager one."""

import pytest
import torch

from recipe.guards.compiled import CompiledMismatch
from recipe.guards.guard import CannotJudge

IDS = torch.randint(3, 250, (4, 48), generator=torch.Generator().manual_seed(1))


def batch_of(rows: int = 4, **parts) -> dict:
    return {"input_ids": IDS[:rows], "labels": IDS[:rows].clone(), **parts}


def gradients_of(model, bf16: bool = False, scale: float = 1.0) -> tuple[float, dict]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(**batch_of()).loss * scale
    loss.backward()
    table = {name: (float(p.grad.norm()), float(p.grad.sum())) for name, p in model.named_parameters()}
    return float(loss.detach()), table


EAGER = {"a": (1.0, 3.0), "b": (0.5, -0.2), "bias": (1e-6, 1e-7)}


def test_equal_gradients_are_silent_and_so_is_the_rounding_of_a_tiny_one():
    assert CompiledMismatch.judge(EAGER, EAGER, (8.3, 8.3)) is None
    assert CompiledMismatch.judge(EAGER, EAGER | {"bias": (3e-6, -2e-6)}, (8.3, 8.3)) is None
    assert CompiledMismatch.judge({"a": (0.0, 0.0)}, {"a": (0.0, 0.0)}, (8.3, 8.3)) is None


@pytest.mark.parametrize(
    ("other", "losses"),
    [
        (EAGER, (8.3, 8.4)),
        (EAGER | {"b": (0.55, -0.2)}, (8.3, 8.3)),
        (EAGER | {"b": (0.5, 0.2)}, (8.3, 8.3)),
        (EAGER | {"b": (0.0, 0.0)}, (8.3, 8.3)),
        (EAGER | {"b": (float("nan"), 0.0)}, (8.3, 8.3)),
    ],
)
def test_another_loss_or_gradient_is_found(other, losses):
    assert CompiledMismatch.judge(EAGER, other, losses).id == "compiled_mismatch"


def test_the_gradient_that_differs_most_is_named():
    finding = CompiledMismatch.judge(EAGER, EAGER | {"a": (1.1, 3.0), "b": (0.1, -0.2)}, (8.3, 8.3))
    assert finding.found == "2 of 3 gradients differ (b by 80%)"


def test_bf16_against_fp32_is_rounding_and_a_scaled_loss_is_not(tiny_model):
    loss, eager = gradients_of(tiny_model)
    rounded_loss, rounded = gradients_of(tiny_model, bf16=True)
    assert CompiledMismatch.judge(eager, rounded, (loss, rounded_loss), torch.bfloat16) is None
    other_loss, other = gradients_of(tiny_model, scale=0.5)
    assert CompiledMismatch.judge(eager, other, (loss, other_loss), torch.bfloat16) is not None


def test_missing_gradients_are_no_verdict():
    with pytest.raises(CannotJudge, match="3 gradients in eager mode, 1 compiled"):
        CompiledMismatch.judge(EAGER, {"a": (1.0, 3.0)}, (8.3, 8.3))
