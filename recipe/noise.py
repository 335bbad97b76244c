"""Is the end of two loss curves different by more than noise? Pure functions on the records of the steps.

Two kinds of noise, the better one first:

1. Seeds: runs that differ only in their seeds show how far the end scatters. Needs two of them.
2. Batches: within the last steps, how far the mean of a few of them scatters. One run has this, but it knows nothing
   of other seeds, whose ends scatter by more.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# The end: this last share of the tokens that both runs have seen, of at least MIN_STEPS steps. It is cut into PARTS,
# whose means are nearly independent where single steps are not (batch means). Chosen, as usual for simulations. On
# made-up curves with one end, 5 % are found to differ, as they should; 9 % where each of 120 losses resembles the one
# before (correlation 0.3). Between two runs of the demo on the same batches that correlation was 0.15.
END_SHARE, MIN_STEPS, PARTS = 0.2, 20, 10
# 97.5 % quantiles of Student's t by degrees of freedom; from the last one on, that of the normal distribution.
T_975 = (math.nan, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
Z_975 = 1.96


@dataclass(frozen=True)
class EndDifference:
    """How much higher the end of a curve is than that of the baseline, in nats per token, and `what` is compared;
    `noise` is half of the 95 % interval, `measured_by` says what it comes from, `of_seeds` whether from runs with
    other seeds. JSON-able."""

    difference: float
    noise: float
    what: str
    measured_by: str
    of_seeds: bool = False

    @property
    def is_more_than_noise(self) -> bool:
        return abs(self.difference) > self.noise


def t_quantile(degrees: int) -> float:
    return T_975[degrees] if degrees < len(T_975) else Z_975


def compare_ends(
    baseline: dict[str, np.ndarray], other: dict[str, np.ndarray], same_batches: bool
) -> EndDifference | None:
    """By the noise of batches. Each run is `tokens_seen` and `loss`, float64 [steps]; None with too few steps or a
    loss that is not finite. Step by step where both have the same steps: what the batches have in common then cancels.
    """
    if not (len(baseline["loss"]) and len(other["loss"])):
        return None
    last = min(baseline["tokens_seen"][-1], other["tokens_seen"][-1])
    left, right = (_end_of(run, last) for run in (baseline, other))
    if min(len(left), len(right)) < MIN_STEPS or not np.isfinite([left[:, 1].sum(), right[:, 1].sum()]).all():
        return None
    factor = t_quantile(PARTS - 1)
    if np.array_equal(left[:, 0], right[:, 0]):
        gaps = right[:, 1] - left[:, 1]
        batches = "the same batches in both" if same_batches else "other batches in each"
        what, words = f"train loss of the last {len(gaps)} common steps", f"how their differences scatter ({batches})"
        return EndDifference(float(gaps.mean()), factor * _error_of_mean(gaps), what, words)
    noise = factor * math.hypot(_error_of_mean(left[:, 1]), _error_of_mean(right[:, 1]))
    what = f"train loss of the last {END_SHARE:.0%} of the common tokens"
    return EndDifference(float(right[:, 1].mean() - left[:, 1].mean()), noise, what, "how the losses of each scatter")


def _end_of(run: dict[str, np.ndarray], last: float) -> np.ndarray:
    """Tokens seen and loss of the steps in the last END_SHARE of `last` tokens: float64 [steps, 2]."""
    tokens = run["tokens_seen"]
    chosen = (tokens > (1 - END_SHARE) * last) & (tokens <= last)
    return np.stack([tokens[chosen], run["loss"][chosen]], axis=1)


def _error_of_mean(values: np.ndarray) -> float:
    """Standard error of the mean of values that follow each other, from the means of PARTS equal stretches."""
    means = [float(part.mean()) for part in np.array_split(values, PARTS)]
    return statistics.stdev(means) / math.sqrt(PARTS)


def scatter_of_seeds(groups: Sequence[Sequence[float]]) -> tuple[float, int] | None:
    """Pooled standard deviation of the ends of runs that differ only in their seeds, and its degrees of freedom; None
    without two such runs. `groups`: the ends of the runs of each configuration."""
    degrees = sum(len(group) - 1 for group in groups)
    if degrees < 1:
        return None
    squares = sum((end - statistics.fmean(group)) ** 2 for group in groups for end in group)
    return math.sqrt(squares / degrees), degrees


def compare_with_seeds(
    baseline: Sequence[float], other: Sequence[float], scatter: tuple[float, int], loss: str
) -> EndDifference:
    """By the noise of seeds: the means of two groups of runs, each of one configuration. `loss`: which."""
    deviation, degrees = scatter
    noise = t_quantile(degrees) * deviation * math.sqrt(1 / len(baseline) + 1 / len(other))
    counted = f"{degrees} degree{'s' if degrees > 1 else ''} of freedom"
    words = f"runs that differ only in their seeds (standard deviation {deviation:.4f}, {counted})"
    what = f"{loss}, runs with these settings: {len(other)} against {len(baseline)}"
    return EndDifference(statistics.fmean(other) - statistics.fmean(baseline), noise, what, words, of_seeds=True)
