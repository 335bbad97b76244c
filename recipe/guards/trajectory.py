"""The expected loss against tokens seen: a reference recorded from runs, with its band, for the config it belongs
to."""

import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from recipe.errors import UserError
from recipe.guards.guard import Finding
from recipe.guards.thresholds import TOLERANCES

TRAJECTORIES = Path(__file__).parent.parent / "trajectories"


@dataclass(frozen=True)
class Point:
    tokens: int
    loss: float
    low: float
    high: float


@dataclass(frozen=True)
class Reference:
    """A loss curve with a band, and the facts of the runs that it can judge.

    `window`: steps whose median is held against the band. `above`: severity of a loss over the band. `red_flags`:
    `{"before_step", "loss_below"}`. `grad_norm_phases`: `{"from_step", "to_step", "low", "high"}`, before clipping.
    """

    name: str
    description: str
    belongs_to: dict
    points: tuple[Point, ...]
    window: int = 10
    above: str = "warning"
    red_flags: tuple[dict, ...] = ()
    grad_norm_phases: tuple[dict, ...] = ()
    provenance: dict = field(default_factory=dict)

    def at(self, tokens: int) -> Point | None:
        """The band at `tokens`, linear in log(tokens) between points; None outside of them."""
        if not self.points[0].tokens <= tokens <= self.points[-1].tokens:
            return None
        after = next(i for i, point in enumerate(self.points) if point.tokens >= tokens)
        a, b = self.points[max(0, after - 1)], self.points[after]
        share = 0.0 if a.tokens == b.tokens else math.log(tokens / a.tokens) / math.log(b.tokens / a.tokens)
        mix = [x + share * (y - x) for x, y in ((a.loss, b.loss), (a.low, b.low), (a.high, b.high))]
        return Point(tokens, *mix)

    def can_judge(self, tokens: int) -> bool:
        """Whether its band reaches here; red flags do everywhere."""
        return bool(self.red_flags) or self.at(tokens) is not None

    def mismatch(self, facts: dict) -> str | None:
        """Why this reference cannot judge a run with these facts, or None. Every fact in `belongs_to` must be known
        and agree."""
        for name, wanted in self.belongs_to.items():
            value = facts.get(name)
            near = isinstance(wanted, (int, float)) and isinstance(value, (int, float))
            agrees = abs(value - wanted) <= TOLERANCES.get(name, 0) * abs(wanted) if near else value == wanted
            if not agrees:
                return f"reference {self.name} is for {name} {_show(wanted)}, this run has {_show(value)}"
        return None


def _show(value) -> str:
    return f"{value:,}" if isinstance(value, int) else "an unknown one" if value is None else str(value)


def load_reference(path: str | Path) -> Reference:
    """Read a reference JSON. Raises `UserError` naming the file and what is wrong with it."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        points = tuple(Point(p["tokens"], p["loss"], p["low"], p["high"]) for p in values.pop("points"))
        lists = {name: tuple(values.pop(name, ())) for name in ("red_flags", "grad_norm_phases")}
        reference = Reference(points=points, **lists, **values)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"trajectory {path}: not a reference ({type(error).__name__}: {error}); "
            f"shipped ones are in {TRAJECTORIES.name}/"
        ) from error
    tokens = [point.tokens for point in points]
    if not tokens or tokens != sorted(set(tokens)) or tokens[0] < 1:
        raise UserError(f"trajectory {path}: points must have rising token counts from 1 on, found {tokens[:5]}")
    return reference


def find_reference(trajectory: str, facts: dict) -> tuple[Reference | None, str]:
    """The reference that judges a run with these facts, or None and the reason.

    `trajectory`: `none`, `auto` (the shipped reference whose config this is), or the path of a reference.
    """
    if trajectory == "none":
        return None, "switched off by trajectory none"
    if trajectory != "auto":
        reference = load_reference(trajectory)
        reason = reference.mismatch(facts)
        return (None, reason) if reason else (reference, "")
    reasons = []
    for path in sorted(TRAJECTORIES.glob("*.json")):
        reference = load_reference(path)
        reason = reference.mismatch(facts)
        if reason is None:
            return reference, ""
        reasons.append(reason)
    return None, "; ".join(reasons) or "no reference is shipped"


def check_reference(reference: Reference, steps: list[int], tokens: list[int], losses: list[float]) -> Finding | None:
    """Hold the median of the last `window` losses against the band, and the red flags.

    The lists are parallel, one entry a step, oldest first; the last entry is now. Silent until the window is full,
    outside the reference's range, and while losses are not finite (another guard's business). Going under is a
    warning.
    """
    window = reference.window
    recent = losses[-window:]
    if len(recent) < window or not all(math.isfinite(loss) for loss in recent):
        return None
    loss = statistics.median(recent)
    middle_tokens = tokens[-1 - (window - 1) // 2]  # where the median belongs on a falling curve
    evidence = {"window": window, "median_loss": loss, "tokens": middle_tokens, "reference": reference.name}
    flagged = [flag for flag in reference.red_flags if steps[-1] < flag["before_step"] and loss < flag["loss_below"]]
    band = reference.at(middle_tokens)
    if band is not None:
        evidence |= {"low": band.low, "high": band.high, "expected_loss": band.loss}
    if flagged:
        expected = f"not below {flagged[0]['loss_below']} before step {flagged[0]['before_step']}"
        return _too_low(loss, expected, steps[-1], tokens[-1], evidence)
    if band is None or band.low <= loss <= band.high:
        return None
    expected = f"{band.low:.2f} to {band.high:.2f} (reference {reference.name})"
    if loss < band.low:
        return _too_low(loss, expected, steps[-1], tokens[-1], evidence)
    return Finding(
        "loss_off_reference",
        reference.above,
        steps[-1],
        tokens[-1],
        found=f"loss {loss:.2f}, falling slower than its reference",
        expected=expected,
        likely_causes=(
            "learning rate or schedule differs from the reference's",
            "labels shifted twice",
            "harder data",
        ),
        action="compare run.json with the reference's provenance",
        evidence=evidence,
    )


def _too_low(loss: float, expected: str, step: int, tokens_seen: int, evidence: dict) -> Finding:
    return Finding(
        "loss_off_reference",
        "warning",
        step,
        tokens_seen,
        found=f"loss {loss:.2f}, too good to be true",
        expected=expected,
        likely_causes=(
            "the model sees the token it is asked for (labels not shifted, attention not causal)",
            "the same documents come round again",
            "easier data than the reference's",
        ),
        action="do not trust this run; read the probes' findings first",
        evidence=evidence,
    )


def check_grad_norm(
    reference: Reference, steps: list[int], tokens: list[int], grad_norms: list[float]
) -> Finding | None:
    """Hold the median gradient norm (before clipping) of the window against the reference's phase. Above is a warning,
    below information."""
    phase = next((p for p in reference.grad_norm_phases if p["from_step"] <= steps[-1] <= p["to_step"]), None)
    recent = grad_norms[-reference.window :]
    inside = phase is not None and steps[-1] - phase["from_step"] + 1 >= reference.window
    if not inside or len(recent) < reference.window or not all(math.isfinite(norm) for norm in recent):
        return None
    norm = statistics.median(recent)
    if phase["low"] <= norm <= phase["high"]:
        return None
    return Finding(
        "grad_norm_off",
        "warning" if norm > phase["high"] else "info",
        steps[-1],
        tokens[-1],
        found=f"gradient norm {norm:.2f} before clipping",
        expected=f"{phase['low']} to {phase['high']} in steps {phase['from_step']} to "
        f"{phase['to_step']} (reference {reference.name})",
        likely_causes=("learning rate too high", "a bad batch")
        if norm > phase["high"]
        else ("a calmer run than the reference",),
        action="look at the loss beside it"
        if norm > phase["high"]
        else "nothing: this phase is an expectation, not a measurement",
        evidence={"window": reference.window, "median_grad_norm": norm, **phase},
    )
