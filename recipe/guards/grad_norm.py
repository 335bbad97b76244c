"""The gradient norm before and after clipping."""

import math
import statistics
from collections.abc import Iterator

from recipe.guards.guard import CannotJudge, Finding, Guard, Verdict
from recipe.guards.trajectory import Reference


class GradNorm(Guard):
    """Clipping leaves other gradients than it should, or their norm is off its reference.

    When: at every step; the norm that clipping leaves after steps 1, 10, 100 and every 100th.
    Measured: one small parameter's gradient before and after clipping: a warning when in two steps in a row gradients
        above `max_grad_norm` keep 1.1 times what clipping should leave. The norm of all gradients after clipping: a
        warning below 0.01 of what it should be. Where the reference has phases (the original project's table): the
        median norm before clipping of its window of steps; above is a warning, below is information.
    Try: comparing a parameter's gradient before and after `clip_grad_norm_`. Above a reference: a lower learning rate.
    Cannot see: runs without clipping; clipping under fp16 loss scaling, FSDP or DeepSpeed; a jump of the norm alone.
    """

    ids = {"grad_norm_off": "Clipping leaves other gradients than it should, or their norm is off its reference."}
    taps = ("gradients",)
    explained_by = ("accumulation_mismatch", "wrong_gradient", "learning_rate_off")
    # Times what clipping should leave; it is exact to rounding. In MIN_STEPS steps in a row. Chosen, not measured.
    UNCLIPPED, MIN_STEPS = 1.1, 2
    # Of what clipping should leave. Chosen, not measured: loss scales are 2^10 and more, limits of one's own seldom.
    CLIPPED_AWAY = 0.01

    def setup(self, run) -> None:
        self.max_norm = run.args.max_grad_norm or 0.0
        self.reference = run.reference if run.reference is not None and run.reference.grad_norm_phases else None
        self.judges_clipping = not (run.is_loss_scaled or run.is_sharded)
        if not self.judges_clipping and self.reference is None:
            raise CannotJudge("gradients are scaled or sharded, so what clipping leaves is not known")
        self.state = {"unclipped_steps": 0}

    def observe(self, step) -> Iterator[Verdict]:
        if (norm := step.record["grad_norm"]) is None:
            raise CannotJudge("gradients are not clipped, so no norm is measured")
        if self.reference is not None and len(step.history) >= self.reference.window:
            (norms,) = step.columns(self.reference.window, "grad_norm")
            yield self.judge_phase(self.reference, step.number, norms) or self.clear(check="phase")
        if not self.judges_clipping:
            return
        if step.clipped_norm is not None:
            yield self.judge_left(norm, self.max_norm, step.clipped_norm) or self.clear(check="left")
        for gradient in step.gradients[:1]:
            finding = self.judge_scaling(norm, self.max_norm, gradient.before, gradient.now)
            self.state["unclipped_steps"] = self.state["unclipped_steps"] + 1 if finding else 0
            yield finding if self.state["unclipped_steps"] >= self.MIN_STEPS else self.clear(check="scaling")

    @classmethod
    def judge_scaling(cls, norm: float | None, max_norm: float, before: float, now: float) -> Finding | None:
        """`norm`: of all gradients, as clipping measured it; clipping scales each by `max_norm / norm`. `before`,
        `now`: norm of one parameter's gradient before and after it."""
        if norm is None or max_norm <= 0 or not norm > cls.UNCLIPPED * max_norm or not before > 0:
            return None
        wanted, done = max_norm / norm, now / before
        if not done > cls.UNCLIPPED * wanted:
            return None
        found = f"gradient norm {norm:.3g} scaled by {done:.3g}"
        expected = f"by {wanted:.3g} (to {max_norm:g})"
        causes = ("clipping changes nothing", "another limit than the one asked for")
        action = "compare a parameter's gradient before and after clip_grad_norm_"
        evidence = {"grad_norm": norm, "scaled_by": done}
        return cls.finding("warning", found, expected, causes, action, evidence, check="scaling")

    @classmethod
    def judge_left(cls, norm: float | None, max_norm: float, clipped_norm: float) -> Finding | None:
        """`clipped_norm`: of all gradients after clipping, which leaves the smaller of `norm` and `max_norm`. Somewhat
        less may be on purpose (a limit for each parameter besides); next to nothing is no step."""
        if norm is None or max_norm <= 0 or not clipped_norm < cls.CLIPPED_AWAY * min(norm, max_norm):
            return None
        found, expected = f"gradient norm {norm:.3g} clipped to {clipped_norm:.3g}", min(norm, max_norm)
        causes, action = ("gradients unscaled after clipping",), "unscale the gradients before clip_grad_norm_"
        evidence = {"grad_norm": norm, "clipped_norm": clipped_norm}
        return cls.finding("warning", found, f"to {expected:.3g}", causes, action, evidence, check="left")

    @classmethod
    def judge_phase(cls, reference: Reference, step: int, norms: list[float | None]) -> Finding | None:
        """Holds the median norm of the last steps, before clipping, against the reference's phase."""
        phase = next((p for p in reference.grad_norm_phases if p["from_step"] <= step <= p["to_step"]), None)
        recent = norms[-reference.window :]
        is_inside = phase is not None and step - phase["from_step"] + 1 >= reference.window <= len(recent)
        if not is_inside or not all(norm is not None and math.isfinite(norm) for norm in recent):
            return None
        norm = statistics.median(recent)
        if phase["low"] <= norm <= phase["high"]:
            return None
        severity, causes, action = "info", ("a calmer run than the reference",), "nothing: the phase is an expectation"
        if norm > phase["high"]:
            severity, causes, action = (
                "warning",
                ("learning rate too high", "a bad batch"),
                "look at the loss beside it",
            )
        found = f"gradient norm {norm:.2f}"
        expected = f"{phase['low']} to {phase['high']} in steps {phase['from_step']} to {phase['to_step']}"
        evidence = {"reference": reference.name, "window": reference.window, "median_grad_norm": norm, **phase}
        return cls.finding(severity, found, expected, causes, action, evidence, check="phase")
