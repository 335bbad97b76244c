"""A loss that is worse than a uniform guess, or far above its own best, and stays there."""

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence

from recipe.guards import sandbox
from recipe.guards.guard import CannotJudge, Finding, Guard, NotApplicable, Skip, Verdict
from recipe.guards.ngrams import NO_VOCABULARY


class LossDiverged(Guard):
    """The model is worse than a uniform guess and than when it began, or far worse than it was.

    When: from step 20 on; against its own best from step 120 on.
    Measured: the median loss of the last 20 steps is above both ln V and the run's first loss, by 1.0 nat and by 10 %
        of the larger one, and does not fall (of the losses above that limit, the later half is not lower than the
        earlier). From 2 times the larger one on, a loss that falls is reported too. What is judged is the cross
        entropy per token that the head itself gives, sampled at its gradient in every second step (8 samples at
        least): a sum over tokens, router losses, label smoothing and z-loss are not in it. Compiled models and fused
        losses have no samples; there the reported loss is judged, if the run's first one was within 0.2 of ln V, as a
        mean cross entropy of an untrained model is.
    Measured (its own best): medians of 20 steps. A warning when the last 5 of them or more (0.2 of the run so far,
        50 at most) are above the best one by 1.0 nat and 10 % and do not fall, the reported loss is above its own best
        by 10 %, and the run's first two rows, whose loss in eval mode is computed every 50 steps, are as far above
        their best. Those rows stay the same where the data become harder on purpose. None where n-gram models of the
        data lose as well, by 0.5 of the rise: a model that forgets the first rows for other text.
    Try: a lower learning rate, warm-up, clipping; a checkpoint from before the rise.
    Cannot see: losses that are not known to be a cross entropy per token, such as of a compiled model that was trained
        before; rows of 1 or 2 tokens; a run of fewer than 20 steps; a rise of less than 1.0 nat, or of a run whose
        first rows cannot be kept.
    """

    ids = {"loss_diverged": "The loss is far above a uniform guess or above its own best, and stays there."}
    needs_next_token = True
    taps = ("head",)
    on_every_rank = True  # a loss of the user's own may gather over ranks
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
    # Medians above the best one: at least, share of all steps, at most. Chosen: spikes from which public runs recover
    # take tens of steps, more where the run is long; with 5 the simulated and public curves of the tests are silent.
    MIN_ABOVE, SHARE_ABOVE, MAX_ABOVE = 5, 0.2, 50
    # Of the rise, in what n-gram models of the data lose as well. Chosen: a curriculum takes both up alike, and of the
    # same data counts know more and more.
    HARDER = 0.5
    # Steps between two losses of the first rows. Derived: two rows in eval mode then cost 0.2 % of steps of 8 rows.
    PINNED_STEPS = 50
    UNKNOWN = "the loss is not known to be a cross entropy per token: no samples, and it did not begin at ln V"

    def setup(self, run) -> None:
        if not run.vocab_size:
            raise CannotJudge(NO_VOCABULARY)
        self.vocab_size, self.run = run.vocab_size, run
        # `window`: the reported loss and the sampled one (None in steps without a sample) of the last steps.
        # `medians`: loss, reported loss and step of the last windows; `best` and `pinned_best`: the least so far.
        self.state = {"first_reported": None, "first_sampled": None, "window": []}
        # `floors`: of the n-gram model, by step; a median of the last steps is the fourth number of `medians`.
        self.state |= {"medians": [], "best": None, "pinned": None, "pinned_best": None, "floors": []}

    def inspect(self, run) -> Iterator[Verdict]:
        if run.max_steps < self.STEPS:  # it is followed all the same: a longer run may resume from it
            yield Skip(self._only_id(), NotApplicable(f"the run has {run.max_steps} steps, it needs {self.STEPS}"))

    def measure(self, local) -> float | None:
        """The loss of the run's first rows, now and then."""
        if (local.step + 1) % self.PINNED_STEPS or self.run.pinned is None:
            return None
        try:
            with sandbox.eagerly(self.run.trainer):
                return next(iter(self.run.pinned.losses(1)), None)
        except CannotJudge:
            return None

    def observe(self, step) -> Iterator[Verdict]:
        rows = [row for *_, head in step.head for row in zip(head["losses"], head["weights"], strict=True)]
        self.add(step.number, step.record["loss"], sampled_loss((loss, mean) for loss, (_, mean, _) in rows))
        if "floor" in step.record:
            self.state["floors"] = [*self.state["floors"][1 - self.STEPS :], [step.number, step.record["floor"]]]
        self.note_pinned(step.payload(self))
        if len(self.state["window"]) == self.STEPS:
            yield self.judge_window() or self.clear()
            if step.number % self.STEPS == 0:
                self.add_median(step.number)
                yield self.judge_rise(**{k: self.state[k] for k in RISE}, step=step.number) or self.clear(check="rise")

    def add(self, step: int, reported: float, sampled: float | None) -> None:
        state = self.state
        if step == 1:
            state["first_reported"] = reported
        if state["first_sampled"] is None:
            state["first_sampled"] = sampled
        state["window"] = [*state["window"][1 - self.STEPS :], [reported, sampled]]

    def note_pinned(self, loss: float | None) -> None:
        if loss is not None and math.isfinite(loss):
            best = self.state["pinned_best"]
            self.state |= {"pinned": loss, "pinned_best": loss if best is None else min(best, loss)}

    def add_median(self, step: int) -> None:
        """Of the window, the sampled losses where there are enough."""
        reported, sampled = (
            [x for x in column if x is not None] for column in zip(*self.state["window"], strict=True)
        )
        losses = sampled if len(sampled) >= self.MIN_SAMPLES else reported
        floors = [floor for number, floor in self.state["floors"] if number > step - self.STEPS]
        new = [statistics.median(losses), statistics.median(reported), step, statistics.median(floors or [0.0])]
        if all(map(math.isfinite, new)):
            best = self.state["best"] or new
            self.state["best"] = new if new[0] < best[0] else [best[0], min(best[1], new[1]), *best[2:]]
            self.state["medians"] = [*self.state["medians"][1 - self.MAX_ABOVE :], new]

    @classmethod
    def judge_rise(cls, medians, best, pinned, pinned_best, step: int) -> Finding | None:
        """`medians`: loss, reported loss, step and n-gram floor (0 where there is none) of the last windows; `best`:
        the least so far. `pinned`, `pinned_best`: loss of the run's first rows."""
        count = min(cls.MAX_ABOVE, max(cls.MIN_ABOVE, round(cls.SHARE_ABOVE * step / cls.STEPS)))
        if len(medians) < count or pinned is None:
            return None
        losses, limit = [loss for loss, *_ in medians[-count:]], best[0] + max(cls.NATS, cls.SHARE * best[0])
        is_above = min(losses) > limit and not falls(losses, limit) and losses[-1] >= statistics.median(losses)
        is_objective = medians[-1][1] > best[1] + cls.SHARE * abs(best[1])  # else it rises on purpose
        harder = min(floor for *_, floor in medians[-count:]) - best[3]  # for counts too: other data
        if harder > cls.HARDER * (losses[-1] - best[0]):
            return None
        if not (is_above and is_objective and pinned > pinned_best + max(cls.NATS, cls.SHARE * pinned_best)):
            return None
        return cls.finding(
            "warning",
            found=f"loss {losses[-1]:.2f}, over {limit:.2f} for {count * cls.STEPS} steps",
            expected=f"near its best {best[0]:.2f} (of step {best[2]})",
            causes=("learning rate too high (for this stage)", "the update goes up the gradient"),
            action=f"lower the rate; if the loss does not come back, go on from a checkpoint near step {best[2]}",
            evidence={"medians": losses, "best": best, "pinned_loss": pinned, "pinned_best": pinned_best},
            check="rise",
            cause="rise",
        )

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
            found=f"loss {level:.2f} in {cls.STEPS} steps{'' if is_falling else ', not falling'}",
            expected=f"under {limit:.2f} ({'ln V' if guess >= first_loss else 'first loss'} {usual:.2f})",
            causes=(
                "learning rate too high (or no warm-up)",
                "gradients are not clipped, or scaled up",
                "the sign of the loss or of the update is wrong",
            ),
            action="the model is worse than untrained: train again with a tenth of the rate, from before the rise",
            evidence={"median": level, "first_loss": first_loss, "ln_vocab_size": guess, "losses": list(losses)},
        )


RISE = ("medians", "best", "pinned", "pinned_best")  # of the state, for `judge_rise`


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
