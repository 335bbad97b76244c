"""The guards of the curve on public runs, which were healthy: no alarm. `tests/public_curves.csv` has points of each;
between them the curve is interpolated, and each step has the noise of a small batch.

`-m slow` runs whole curves; else their first 1,000 steps. Without a reference of their own `loss_off_reference` does
not judge them. Final losses alone, such as those of Step Law's 1,911 runs, are no curves.
"""

import csv
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from recipe.guards.spike import LossSpike
from tests.test_diverged import follow

NOISE = 0.043  # nats, of a step of 524,288 tokens; ten times that is a step of 5,000


def read_curves() -> dict[str, list[tuple[int, float, float | None]]]:
    lines = Path(__file__).with_name("public_curves.csv").read_text().splitlines()
    curves = defaultdict(list)
    for row in csv.DictReader(line for line in lines if not line.startswith("#")):
        norm = float(row["grad_norm"]) if row["grad_norm"] else None
        curves[row["run"]].append((int(row["step"]), float(row["loss"]), norm))
    return dict(curves)


CURVES = read_curves()


def alarms_on(name: str, noise: float, steps: int | None = None, seed: int = 0) -> list:
    """Of `loss_diverged`, as if all rows were the first ones, and of `loss_spike`."""
    known, losses, norms = zip(*CURVES[name], strict=True)
    rng, number = np.random.default_rng(seed), range(min(known[-1], steps or known[-1]))
    curve = (np.interp(number, known, losses) + rng.normal(0, noise, len(number))).tolist()
    found, width = follow(curve), LossSpike.WINDOW + LossSpike.RECENT
    clipped = [(step, norm) for step, norm in zip(known, norms, strict=True) if norm is not None]
    of_steps = np.interp(number, *zip(*clipped, strict=True)).tolist() if clipped else []
    for end in range(width, len(curve) + 1):
        finding = LossSpike.judge(curve[end - width : end], of_steps[end - width : end])
        found += [finding] if finding is not None else []
    return found


def test_the_points_are_curves():
    assert len(CURVES) >= 9 and all(a[0] < b[0] for points in CURVES.values() for a, b in pairwise(points))


@pytest.mark.parametrize("name", CURVES)
def test_the_beginning_of_a_public_run_is_silent(name):
    assert alarms_on(name, 5 * NOISE, steps=1000) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", CURVES)
def test_a_public_run_is_silent(name):
    assert [finding for noise in (NOISE, 10 * NOISE) for finding in alarms_on(name, noise)] == []
