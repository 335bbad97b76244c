"""A loss that is worse than a uniform guess, and stays there."""

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence

from recipe.guards.guard import CannotJudge, Finding, Guard, NotApplicable, Skip, Verdict
from recipe.guards.ngrams import NO_VOCABULARY


class LossDiverged(Guard):
    """The model is worse than a uniform guess, and worse than when it began.

    When: from step 20 on.
    Measured: the median loss of the last 20 steps is above both ln V and the run's first loss, by 1.0 nat and by 10 %
        of the larger one, and does not fall (of the losses above that limit, the later half is not lower than the
        earlier). From 2 times the larger one on, a loss that falls is reported too. What is judged is the cross
        entropy per token that the head itself gives, sampled at its gradient in every second step (8 samples at
        least): a sum over tokens, router losses, label smoothing and z-loss are not in it. Compiled models and fused
        losses have no samples; there the reported loss is judged, if the run's first one was within 0.2 of ln V, as a
        mean cross entropy of an untrained model is.
    Try: the last checkpoint before it with a tenth of the learning rate; warm-up; clipping.
    Cannot see: losses that are not known to be a cross entropy per token, such as of a compiled model that was trained
        before; a run of fewer than 20 steps; a loss that rose and is not above ln V.
    """

    ids = {"loss_diverged": "The loss is above that of a uniform guess and of the run's start, and stays there."}
    taps = ("head",)
    explained_by = (
        *("wrong_loss_target", "reference_mismatch", "wrong_gradient", "frozen_parameters", "lost_updates"),
        *("optimizer_off", "learning_rate_off", "untied_weights", "rank_divergence"),
        *("accumulation_mismatch", "resume_jump"),
    )
    # Steps of which the median is judged. Chosen: runs of 30 steps must be judged (the shortest that was seen to
    # diverge), and spikes from which a training recovers last for a few steps.
    STEPS = 20
    # Nats above ln V and above the first loss. Chosen, not measured: a uniform guess costs ln V, and no healthy run of
    # the zoo alarms (156 settings, all judged).
    NATS = 1.0
    # The same as a share of them. Derived: tied heads of N(0, 1) weights begin at the squared norm of an embedding,
    # which has a relative deviation of sqrt(2 / width) a token: 18 % at width 64, 2 % in the mean of 72 positions.
    SHARE = 0.1
    # From so many times ln V and the first loss on, a loss that falls again has diverged too. Measured: at learning
    # rate 3 losses of 200 to 340 fall to 60 within 50 steps. Twice a uniform guess is chosen.
    FAR = 2.0
    # Of the window's steps, with a sample of the head. Derived: every second step is sampled, so ten are expected.
    MIN_SAMPLES = 8
    # Nats from ln V of the first reported loss of an untrained model. Measured on public runs: 0.01 below it at most;
    # wider heads begin further above and are left alone.
    FIRST_NEAR = 0.2
    UNKNOWN = "the loss is not known to be a cross entropy per token: no samples, and it did not begin at ln V"

    def setup(self, run) -> None:
        if not run.vocab_size:
            raise CannotJudge(NO_VOCABULARY)
        self.vocab_size = run.vocab_size
        # `window`: the reported loss and the sampled one (None in steps without a sample) of the last steps.
        self.state = {"first_reported": None, "first_sampled": None, "window": []}

    def inspect(self, run) -> Iterator[Verdict]:
        if run.max_steps < self.STEPS:  # it is followed all the same: a longer run may resume from it
            yield Skip(self._only_id(), NotApplicable(f"the run has {run.max_steps} steps, it needs {self.STEPS}"))

    def observe(self, step) -> Iterator[Verdict]:
        rows = [row for *_, head in step.head for row in zip(head["losses"], head["weights"], strict=True)]
        self.add(step.number, step.record["loss"], sampled_loss((loss, mean) for loss, (_, mean, _) in rows))
        if len(self.state["window"]) == self.STEPS:
            yield self.judge_window() or self.clear()

    def add(self, step: int, reported: float, sampled: float | None) -> None:
        state = self.state
        if step == 1:
            state["first_reported"] = reported
        if state["first_sampled"] is None:
            state["first_sampled"] = sampled
        state["window"] = [*state["window"][1 - self.STEPS :], [reported, sampled]]

    def judge_window(self) -> Finding | None:
        """Raises `CannotJudge` where the loss is not known to be a cross entropy."""
        first, sampled = self.state["first_sampled"], [row[1] for row in self.state["window"] if row[1] is not None]
        if len(sampled) >= self.MIN_SAMPLES and first is not None:
            return self.judge(sampled, first, self.vocab_size)
        first = self.state["first_reported"]
        if first is None or not abs(first - math.log(self.vocab_size)) <= self.FIRST_NEAR:
            raise CannotJudge(self.UNKNOWN)
        return self.judge([row[0] for row in self.state["window"]], first, self.vocab_size)

    @classmethod
    def judge(cls, losses: Sequence[float], first_loss: float, vocab_size: int) -> Finding | None:
        """`losses`: cross entropies per token of the last STEPS steps, oldest first, or of those that were sampled.
        `first_loss`: of the run's first step. Silent while a loss is not finite, which is another guard's finding."""
        if not all(map(math.isfinite, (*losses, first_loss))):
            return None
        guess, level = math.log(vocab_size), statistics.median(losses)
        usual = max(guess, first_loss)
        limit = usual + max(cls.NATS, cls.SHARE * usual)
        if level <= limit or ((is_falling := falls(losses, limit)) and level <= cls.FAR * usual):
            return None
        return cls.finding(
            "error",
            found=f"loss {level:.2f}, median of {cls.STEPS} steps{'' if is_falling else ', and not falling'}",
            expected=f"under {limit:.2f} (ln V {guess:.2f}, first loss {first_loss:.2f})",
            causes=(
                "the learning rate is too high, or without warm-up",
                "gradients are not clipped, or scaled up",
                "the sign of the loss or of the update is wrong",
            ),
            action="start again from the last checkpoint before it with a tenth of the learning rate",
            evidence={"median": level, "first_loss": first_loss, "ln_vocab_size": guess, "losses": list(losses)},
        )


def falls(losses: Sequence[float], limit: float) -> bool:
    """Of those above the limit (a window may begin before the rise): whether the later ones are lower."""
    high = [loss for loss in losses if loss > limit]
    half = len(high) // 2
    return statistics.fmean(high[-half:]) < statistics.fmean(high[:half])


def sampled_loss(rows: Iterable[tuple[float, float]]) -> float | None:
    """Mean of the sampled rows' cross entropies; `rows`: `(loss, weight in the gradient)` of each. A row without a
    scored position weighs nothing. None without rows."""
    losses = [loss for loss, weight in rows if weight > 0]
    return statistics.fmean(losses) if losses else None
