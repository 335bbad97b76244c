"""The first loss, and whether what the loss is given are logits."""

import math
from collections.abc import Iterator

from recipe.guards.batches import IGNORE_INDEX
from recipe.guards.guard import PROBE, CannotJudge, Finding, Guard, NotApplicable, Verdict


class InitialLoss(Guard):
    """The first loss is not that of an untrained model, or the model's logits are probabilities.

    When: before step 1.
    Measured: the mean cross entropy of the recovered targets. An untrained model guesses, so it is ln(V) for a
        vocabulary of V tokens; more than 0.2 below that or above 2 times that is information. An error: the logits are
        at least 0 and sum to 1 (to 1 %): the loss, which applies softmax too, cannot fall below ln(1 + (V - 1) / e).
    Try: the probes' findings first. Too high: `initializer_range`, or a loss that is summed. An error: no softmax.
    Cannot see: the first loss of models with trained weights, and of resumed runs.
    """

    ids = {"init_loss_off": "The first loss is not that of an untrained model."}
    needs_next_token = True
    explained_by = ("missing_label_shift", "non_causal_attention", "accumulation_mismatch")
    # Copying with tied embeddings starts 0.47 below (7.85 of ln 4096); healthy public runs at most 0.01, and up to 1.5
    # times the guess where the head is not scaled down. Chosen between these.
    MAX_BELOW, MAX_ABOVE = 0.2, 2.0

    def probe(self, batch) -> Iterator[Verdict]:
        found, vocab_size = batch.targets(), batch.recording.only().num_classes
        if found.are_shares:
            yield self.judge_shares(vocab_size)
        elif batch.run.step or not batch.run.is_new_model:
            raise NotApplicable("the model was trained before, so its first loss may be anything")
        else:
            scored = found.targets != IGNORE_INDEX
            if not scored.any():
                raise CannotJudge("no target could be recovered")
            yield self.judge(float(found.losses[scored].mean()), vocab_size) or self.clear(check=PROBE)

    @classmethod
    def judge(cls, loss: float, vocab_size: int) -> Finding | None:
        """A hint, never more than information: an untrained model guesses, so its loss is ln(vocabulary) or above."""
        guess = math.log(vocab_size)
        if guess - cls.MAX_BELOW <= loss <= cls.MAX_ABOVE * guess:
            return None
        if loss < guess:
            causes = ("target leakage", "the weights are not new", "the loss is divided twice")
            action = "read the probes' findings first"
        else:
            causes = ("initial weights too wide", "the loss is summed, not averaged")
            action = "look at initializer_range and at the loss's reduction"
        found, expected = f"first loss {loss:.2f}", f"ln({vocab_size:,}) = {guess:.2f} or more"
        return cls.finding("info", found, expected, causes, action, {"loss": loss}, check=PROBE)

    @classmethod
    def judge_shares(cls, vocab_size: int) -> Finding:
        lowest = math.log(1 + (vocab_size - 1) / math.e)  # cross entropy of a 1 among zeros
        found = f"logits are probabilities: no loss below {lowest:.2f}"
        causes, action = ("softmax in the model's head",), "return what the head gives: the loss applies softmax"
        return cls.finding("error", found, "logits", causes, action, {"lowest": lowest}, check=PROBE)
