"""Train against eval loss, and the loss by position, on hand-written numbers."""

import json
import math

import pytest

from recipe.guards.vitals import add_losses_by_position, check_train_eval_gap, position_evidence

# --- evaluation, positions


@pytest.mark.parametrize(("eval_loss", "severity"), [(3.4, None), (4.8, "info"), (6.0, "warning"), (1.5, "info")])
def test_train_and_eval_apart(eval_loss, severity):
    finding = check_train_eval_gap(500, 0, [3.0] * 20, eval_loss, is_first_pass=True)
    assert (finding.severity if finding else None) == severity
    assert check_train_eval_gap(500, 0, [3.0] * 20, eval_loss, is_first_pass=False) is None


def test_the_gap_waits_and_knows_noise_and_falling_losses():
    assert check_train_eval_gap(9, 0, [3.0] * 19, 9.0, True) is None
    assert check_train_eval_gap(20, 0, [10 - 0.3 * i for i in range(20)], 4.5, True) is None
    assert check_train_eval_gap(20, 0, [3.0] * 20, math.nan, True) is None


def test_loss_by_position():
    totals = []
    assert position_evidence(totals) == {"loss_by_position": {}, "falls": None}
    for i in range(40):
        add_losses_by_position(totals, [0, 1, 6, 100], [5.0 + 0.1 * (i % 3), 4.5, 4.0, 3.0 + 0.1 * (i % 3)])
    evidence = position_evidence(json.loads(json.dumps(totals)))  # as after a resume
    assert evidence["falls"] and list(evidence["loss_by_position"]) == ["0", "1-1", "4-7", "64-127"]
    assert evidence["loss_by_position"]["4-7"] == pytest.approx(4.0)
    flat = []
    add_losses_by_position(flat, [0, 100] * 40, [1.0, 1.0] * 40)
    assert position_evidence(flat)["falls"] is False
