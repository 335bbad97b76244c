"""The expected loss against tokens seen: a reference recorded from runs, with its band, for the config it belongs
to."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from recipe.errors import UserError

TRAJECTORIES = Path(__file__).parent.parent / "trajectories"
# How far a fact of the run may be from the reference's and still be the same config. Chosen, not measured: a few added
# tokens or another way of counting, and a rate that was rounded. Bands are in the references, with their origin.
TOLERANCES = {"parameters": 0.02, "learning_rate": 0.01}


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
                return f"{self.name} is for {name} {_show(wanted)}, this run has {_show(value)}"
        return None


def optimizer_family(optim) -> str:
    """Of TrainingArguments' `optim`: adamw_torch_fused -> adamw."""
    return str(getattr(optim, "value", optim)).split("_")[0]


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
        return (None, f"reference {reason}") if reason else (reference, "")
    shipped = map(load_reference, sorted(TRAJECTORIES.glob("*.json")))
    reference = next((each for each in shipped if each.mismatch(facts) is None), None)
    return reference, "" if reference is not None else "no reference has been recorded for this config"
