"""The reference guard on hand-written curves, and the table of the original run."""

import itertools
import math

import pytest

from recipe.errors import UserError
from recipe.guards.grad_norm import GradNorm
from recipe.guards.off_reference import LossOffReference
from recipe.guards.trajectory import TRAJECTORIES, Point, Reference, find_reference, load_reference

REFERENCE = Reference(
    name="test",
    description="",
    belongs_to={"vocab_size": 100, "parameters": 1000, "source": "docstrings"},
    points=(Point(1000, 5.0, 4.5, 5.5), Point(100_000, 3.0, 2.5, 3.5)),
    window=5,
    grad_norm_phases=({"from_step": 1, "to_step": 20, "low": 1, "high": 3},),
    red_flags=({"before_step": 50, "loss_below": 2.0},),
)
STEPS = list(range(1, 11))
TOKENS = [1000 * step for step in STEPS]


def check(losses, reference=REFERENCE, tokens=TOKENS, steps=STEPS):
    return LossOffReference.judge(reference, steps[len(losses) - 1], tokens[: len(losses)], losses)


def test_the_band_is_linear_in_log_tokens():
    middle = REFERENCE.at(10_000)
    assert (middle.loss, middle.low, middle.high) == pytest.approx((4.0, 3.5, 4.5))
    assert REFERENCE.at(999) is None and REFERENCE.at(100_001) is None
    assert REFERENCE.at(1000) == REFERENCE.points[0] and REFERENCE.at(100_000) == REFERENCE.points[1]


def test_inside_the_band_is_silent():
    assert check([4.4] * 10) is None


def test_it_waits_for_a_full_window():
    assert check([0.1] * 4) is None
    assert check([0.1] * 5) is not None


def test_under_the_band_is_a_warning_that_names_the_cause():
    finding = check([2.9] * 10)
    assert finding.id == "loss_off_reference" and finding.severity == "warning"
    assert "too good" in finding.found and "labels not shifted" in finding.likely_causes[0]
    assert finding.evidence["low"] == pytest.approx(REFERENCE.at(8000).low)


@pytest.mark.parametrize("severity", ["info", "warning"])
def test_above_the_band_has_the_severity_of_the_reference(severity):
    reference = Reference(**{**REFERENCE.__dict__, "above": severity})
    assert check([5.4] * 10, reference).severity == severity


def test_one_wild_step_moves_no_median():
    assert check([4.4] * 9 + [0.01]) is None
    assert check([4.4] * 9 + [50.0]) is None


def test_constant_losses_have_no_spread_and_are_judged():
    assert check([4.0] * 10) is None


def test_losses_that_are_no_numbers_are_another_guards_business():
    assert check([4.4] * 9 + [math.nan]) is None


def test_a_red_flag_holds_outside_the_points_too():
    finding = check([1.9] * 10, tokens=[10 * step for step in STEPS])
    assert finding is not None and "before step 50" in finding.expected


def test_beyond_its_last_point_it_says_nothing():
    assert check([0.5] * 10, tokens=[10**6 + step for step in STEPS], steps=[100 + step for step in STEPS]) is None


def test_gradient_norms_are_judged_in_their_phase_alone():
    judge = GradNorm.judge_phase
    assert judge(REFERENCE, 10, [2.0] * 10) is None
    assert judge(REFERENCE, 10, [9.0] * 10).severity == "warning"
    assert judge(REFERENCE, 10, [0.1] * 10).severity == "info"
    assert judge(REFERENCE, 40, [9.0] * 10) is None
    assert judge(REFERENCE, 4, [9.0] * 4) is None
    assert judge(REFERENCE, 10, [9.0] * 9 + [None]) is None


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"vocab_size": 101, "parameters": 1000, "source": "docstrings"}, "is for vocab_size 100, this run has 101"),
        ({"vocab_size": 100, "parameters": 1030, "source": "docstrings"}, "parameters 1,000, this run has 1,030"),
        ({"vocab_size": 100, "parameters": 1000}, "source docstrings, this run has an unknown one"),
        ({"vocab_size": 100, "parameters": 1010, "source": "docstrings"}, None),
    ],
)
def test_it_judges_its_own_config_alone(facts, reason):
    found = REFERENCE.mismatch(facts)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a reference"),
        ("[]", "not a reference"),
        ('{"name": "a"}', "KeyError: 'points'"),
        ('{"name": "a", "description": "", "belongs_to": {}, "points": []}', "rising token counts"),
        ('{"nam": "a", "description": "", "belongs_to": {}, "points": []}', "not a reference"),
    ],
)
def test_a_bad_file_is_a_users_error(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=message):
        load_reference(tmp_path / "a.json")


def test_none_and_unknown_runs_are_declined_with_a_reason():
    assert find_reference("none", {}) == (None, "switched off by trajectory none")
    unknown = find_reference("auto", {"parameters": 7})
    assert unknown == (None, "no reference has been recorded for this config")  # and none of others


@pytest.mark.parametrize("path", sorted(TRAJECTORIES.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_references_are_whole(path):
    reference = load_reference(path)
    assert reference.name == path.stem and reference.description and reference.belongs_to and reference.provenance
    assert all(point.low < point.loss < point.high for point in reference.points)
    assert reference.mismatch(reference.belongs_to) is None


# --- the original run

BROKEN = {10: 10.27, 20: 9.52, 30: 8.67, 40: 7.29, 50: 6.29, 100: 2.81, 120: 1.80}
HEALTHY = {10: 10.50, 100: 8.50, 500: 5.50, 1000: 4.00, 2000: 3.50, 5000: 3.00, 10000: 2.70}


@pytest.fixture
def original():
    return load_reference(TRAJECTORIES / "original_180m.json")


def curve(table, last):
    """The table's losses at each step, straight in log(step) between its rows."""
    losses, rows = [], sorted(table.items())
    for step in range(rows[0][0], last + 1):
        (a, x), (b, y) = next(pair for pair in itertools.pairwise(rows) if pair[0][0] <= step <= pair[1][0])
        losses.append(x + (y - x) * math.log(step / a) / math.log(b / a))
    return list(range(rows[0][0], last + 1)), losses


def first_finding(reference, steps, losses):
    """The step of the first finding, and the finding."""
    for now, step in enumerate(steps, 1):
        tokens = [each * 4 * 12 * 1024 for each in steps[:now]]
        finding = LossOffReference.judge(reference, step, tokens, losses[:now])
        if finding is not None:
            return step, finding
    return None, None


def test_the_table_is_the_original_one(original):
    assert {point.tokens // (4 * 12 * 1024): point.loss for point in original.points} == HEALTHY
    assert original.belongs_to["tokens_per_step"] == 4 * 12 * 1024
    assert original.red_flags == ({"before_step": 1000, "loss_below": 3.0},)
    phases = [(p["from_step"], p["to_step"], p["low"], p["high"]) for p in original.grad_norm_phases]
    assert phases == [(1, 100, 5, 30), (101, 1000, 2, 5), (1001, 10000, 1, 3)]


def test_the_broken_run_is_called_before_half_of_its_120_steps(original):
    step, finding = first_finding(original, *curve(BROKEN, 120))
    assert finding.severity == "warning" and step < 60


def test_the_expected_run_is_silent(original):
    assert first_finding(original, *curve(HEALTHY, 10_000)) == (None, None)


def test_the_red_flag_alone_catches_the_end_of_the_broken_run(original):
    bandless = Reference(**{**original.__dict__, "points": (Point(10**12, 1.0, 0.5, 1.5),)})
    step, finding = first_finding(bandless, *curve(BROKEN, 120))
    assert "3.0 or more (before step 1000)" in finding.expected and 90 < step <= 120


def test_slower_than_the_table_is_information(original):
    steps, losses = curve(HEALTHY, 600)
    _, finding = first_finding(original, steps, [loss + 2 for loss in losses])
    assert finding.severity == "info"
