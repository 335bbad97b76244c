"""The loss against n-gram models of the same tokens."""

from collections.abc import Iterator
from statistics import fmean

import numpy as np

from recipe.guards.guard import CannotJudge, Finding, Guard, Verdict
from recipe.guards.labels import are_noisy
from recipe.guards.ngrams import MAX_EVERY, STEP_TOKENS, choose_every


class LossBelowEnvelope(Guard):
    """The loss is below the n-gram baseline early in training, where no healthy model that began untrained gets.

    When: at every step from step 10 until the n-gram models stop.
    Measured: n-gram models of orders 1 to 5 score every token of the global batch, then learn it; the floor is the
        best order's mean, and ln V at most. Of steps of more than 8,192 tokens a part of the rows is counted, and the
        floor is corrected for it. A warning when the mean loss of 10 steps is 0.3 nats below the floor. On natural
        text healthy models stay 0.41 and more above it, on random tokens 0.01 below. `steps.jsonl` has the floor of
        every step.
    Try: the probes' findings first. A model that was trained before, or on this data before, gets there without a bug.
    Cannot see: models whose weights were loaded, and rows of which fewer than 8 tokens are scored, such as a class at
        the end, or whose labels differ from the tokens ("cannot judge"); steps of over 65,536 tokens; anything after
        the n-gram models stop: 1,000 tokens for each entry of the vocabulary or 20M were seen; 2^24 n-grams are kept
        (6.7M tokens of a 32k vocabulary); pass 2 begins; a resume from a checkpoint without the guards' state; a first
        loss under both 0.75 ln V and the unigram's. Leaks that leave the loss above the floor. Synthetic data whose
        rule is learned faster than counts can (bigrams of rank 3: 0.13 to 0.51 below) trips it.
    """

    ids = {"loss_below_envelope": "The loss is lower than a healthy model can reach on this data so early."}
    taps = ("ngrams",)
    explained_by = (
        *("missing_label_shift", "non_causal_attention", "row_leak", "cross_document_attention", "wrong_loss_target"),
        *("resume_replay", "repeated_data", "train_eval_overlap"),
        *("accumulation_mismatch", "wrong_gradient", "eval_train_mismatch", "reference_mismatch"),
    )
    is_symptom = judges_curve = needs_next_token = True
    WINDOW = 10  # steps; that of the measurements in `ngrams.py`
    # Scored tokens of a row, on average. Fewer are classes and short answers, whose frequencies alone may be below all
    # n-grams of the whole text. Chosen, not measured: as many as the probe of the targets needs of a row.
    MIN_SCORED = 8
    MARGIN = 0.3  # nats; on natural text a model stays 0.41 above the floor, on random tokens 0.01 below

    def setup(self, run) -> None:
        # `is_noisy`: labels differ from the tokens here and there.
        self.state = {"losses": [], "floors": [], "is_noisy": False}
        if not run.is_new_model:
            raise CannotJudge("the model was trained before, so it may be below n-grams that begin at zero")
        if choose_every(run.step_size[0]) > MAX_EVERY:
            raise CannotJudge(f"of steps of over {MAX_EVERY * STEP_TOKENS:,} tokens too small a part is counted")

    def observe(self, step) -> Iterator[Verdict]:
        if step.ngrams.stopped:
            raise CannotJudge(step.ngrams.stopped)
        self.state["is_noisy"] = self.state["is_noisy"] or bool(are_noisy(step))
        if self.state["is_noisy"]:
            raise CannotJudge("labels differ from the tokens here and there, and n-grams count tokens")
        losses, floors = self.state["losses"], self.state["floors"]
        if step.ngrams.loss is not None and step.ngrams.floor is not None:
            if step.ngrams.loss.tokens < self.MIN_SCORED * step.ngrams.num_rows:
                raise CannotJudge(
                    f"fewer than {self.MIN_SCORED} tokens of a row are scored (answers to a task, perhaps)"
                )
            losses.append(step.record["loss"])
            floors.append(step.ngrams.floor)
            del losses[: -self.WINDOW], floors[: -self.WINDOW]
        if len(losses) == self.WINDOW:
            yield self.judge(losses, floors) or self.clear()

    @classmethod
    def judge(cls, losses: list[float], floors: list[float]) -> Finding | None:
        """One entry a step, the last one is now. Silent until the window is full, and while values are not finite."""
        losses, floors = losses[-cls.WINDOW :], floors[-cls.WINDOW :]
        if len(losses) < cls.WINDOW or not np.isfinite(np.array([*losses, *floors], float)).all():
            return None
        loss, floor = fmean(losses), fmean(floors)
        if loss >= floor - cls.MARGIN:
            return None
        return cls.finding(
            "warning",
            found=f"loss {loss:.2f}, {floor - loss:.2f} below n-grams",
            expected=f"at least {floor:.2f} - {cls.MARGIN}",
            causes=(
                "labels are not shifted",
                "attention is not causal",
                "model trained before (or on this data)",
                "synthetic data (a model learns its rule faster than counts can)",
            ),
            action="do not trust this loss; read the probes' findings first",
            evidence={"mean_loss": loss, "mean_floor": floor, "margin": cls.MARGIN},
        )
