"""Signs of life that need no expectation: a loss that is a number."""

import math

from recipe.guards.finding import Finding


def check_finite(step: int, tokens_seen: int, loss: float, grad_norm: float | None) -> Finding | None:
    """NaN, infinite or exactly 0.0 loss, or a gradient norm that is not finite.

    `loss` is the raw one: Trainer's own log shows NaN as 0.0 (`logging_nan_inf_filter`).
    """
    bad_norm = grad_norm is not None and not math.isfinite(grad_norm)
    if math.isfinite(loss) and loss != 0.0 and not bad_norm:
        return None
    found = f"loss {loss}" if not math.isfinite(loss) or loss == 0.0 else f"gradient norm {grad_norm}"
    return Finding(
        "loss_not_finite",
        "error",
        step,
        tokens_seen,
        found=found,
        expected="a finite loss above 0",
        likely_causes=(
            ("every label masked (-100)", "an empty batch")
            if loss == 0.0
            else ("learning rate too high", "overflow in fp16 or bf16", "a broken kernel")
        ),
        action="the weights are lost from here on: go back to the last checkpoint "
        "with a lower learning rate or in fp32",
        evidence={"loss": loss, "grad_norm": grad_norm},
    )
