"""Jumps of the loss."""

import math
import statistics
from collections.abc import Iterator, Sequence

from recipe.guards.guard import Finding, Guard, NotApplicable, Verdict


class LossSpike(Guard):
    """The loss jumped away from its level and stays there: up, or down to a fraction of it.

    When: from step 55 on.
    Measured: all of the last 5 steps against the 50 before. Up: above their median by 8 robust standard deviations and
        by 1.0 nat, and above their highest by half of that. Down, in the first pass over the data only: 1.0 nat below
        their lowest, 8 robust standard deviations below their median, and below a third of it. A gradient norm that
        went up by a factor of 20 is named as a cause.
    Try: a lower learning rate; the gradient norm and the data of these steps. A sudden fall: repeated data, a leak.
    Cannot see: single batches, on purpose; slow drifts; a leak that is learned over tens of steps.
    """

    ids = {"loss_spike": "The loss jumped far away from its recent level."}
    is_symptom = True
    explained_by = (
        *("loss_not_finite", "learning_rate_off", "grad_norm_off", "resume_jump", "rank_divergence"),
        *("missing_label_shift", "non_causal_attention", "row_leak", "cross_document_attention", "wrong_loss_target"),
        *("token_out_of_range", "reference_mismatch"),
    )
    # One batch is never enough: public 124M runs have single steps 8 sd off. False alarms on simulated healthy
    # curves (power law, student-t noise, two kinds of batches, plateaus, sources that change by 0.7 nats): none in 19M
    # steps; with AR(1) correlation up to 0.95 besides, 21 in 5M, all from shocks that fade over 20 steps.
    WINDOW, RECENT = 50, 5
    MIN_SDS = 8  # robust, of the window; in the simulations above
    RISE_NATS = 1.0  # spikes that cost something are larger; a change of the mixture of sources is smaller (0.7 above)
    FALL_NATS, FALL_SHARE = 1.0, 1 / 3  # web text to code is 3.0 to 1.2 at most; a leak goes towards 0
    NORM_FACTOR = 20  # healthy 124M run: norms fall 18-fold in 300 steps, single batches are 7-fold off (llm.c)

    def setup(self, run) -> None:
        if run.max_steps < self.WINDOW + self.RECENT:
            raise NotApplicable(f"the run has {run.max_steps} steps, it needs {self.WINDOW + self.RECENT}")

    def observe(self, step) -> Iterator[Verdict]:
        losses, norms = step.columns(self.WINDOW + self.RECENT, "loss", "grad_norm")
        if len(losses) == self.WINDOW + self.RECENT:
            yield self.judge(losses, norms, is_first_pass=step.passes == 1) or self.clear()

    @classmethod
    def judge(cls, losses: Sequence[float], norms: Sequence = (), is_first_pass: bool = True) -> Finding | None:
        """`losses`, `norms`: of the last steps, oldest first. Silent while a loss is not finite, which is another
        guard's finding. A fall is judged in the first pass only: at its end a memorised text is easier."""
        losses = losses[-(cls.WINDOW + cls.RECENT) :]
        if len(losses) < cls.WINDOW + cls.RECENT or not all(map(math.isfinite, losses)):
            return None
        window, recent = losses[: cls.WINDOW], losses[cls.WINDOW :]
        median = statistics.median(window)
        robust_sd = 1.4826 * statistics.median(abs(loss - median) for loss in window)
        margin = cls.MIN_SDS * robust_sd
        rise = max(margin, cls.RISE_NATS)
        # FALL_NATS below the whole window is a jump, and not the slope of early training.
        low_enough = min(min(window) - cls.FALL_NATS, median - margin, median * cls.FALL_SHARE)
        before = now = None
        if norms and None not in norms:
            before, now = statistics.median(norms[: -cls.RECENT]), statistics.median(norms[-cls.RECENT :])
        if min(recent) > max(max(window) + rise / 2, median + rise):
            found = f"loss at least {min(recent):.2f} in {cls.RECENT} steps"
            causes = ("learning rate too high", "a stretch of broken or very different data", "numerical trouble")
            if before and now > cls.NORM_FACTOR * before:
                causes = (f"gradient norm up from {before:.3g} to {now:.3g}", *causes)
        elif is_first_pass and max(recent) < low_enough:
            found = f"loss fell to {max(recent):.2f} in {cls.RECENT} steps"
            causes = ("target leakage or repeated data", "labels of most tokens masked", "a stretch of trivial data")
        else:
            return None
        action = "look at the gradient norm and the data of these steps"
        evidence = {"median": median, "robust_sd": robust_sd, "lowest": min(window), "highest": max(window)}
        evidence |= {"recent": list(recent), "grad_norm_before": before, "grad_norm_now": now}
        return cls.finding("warning", found, f"near {median:.2f}, as before", causes, action, evidence)
