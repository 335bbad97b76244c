"""How torch's OpenMP threads wait, chosen before torch is imported."""

import os

# libgomp's threads spin at each of a step's thousands of barriers. Where another process has one of the cores, they
# spin for as long as it runs. On two cores that five other processes used, a 3M transformer trained at 849 tokens/s
# with this, at 906 without any spin, and at 214 with libgomp's own 300,000 spins (medians of 3, torch 2.13.0).
# `python -m tests.benchmarks load` compares them alone, too.
WAITING = {"GOMP_SPINCOUNT": "1000"}
OWN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def choose_waiting() -> None:
    """Set the variables of OpenMP, unless the user did."""
    if not any(name in os.environ for name in OWN):
        os.environ.update(WAITING)
