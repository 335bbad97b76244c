"""The end of a document among the targets."""

from collections.abc import Iterator

import numpy as np

from recipe.guards.batches import SeenTokens
from recipe.guards.guard import CannotJudge, Finding, Guard, Verdict


class EosNeverTarget(Guard):
    """EOS is in the text and never scored, or is not in the data at all.

    When: at every step.
    Measured: all tokens so far, of all ids that model and tokenizer call EOS. In the text 32 times, after a row's
        first token, and never a target is a warning. Not in 1,000,000 tokens is information.
    Try: a pad token of its own for the tokenizer, since collators mask it; appending EOS to every document.
    Cannot see: which documents lack it; models and tokenizers that name no EOS.
    """

    ids = {"eos_never_target": "The end of a document is never a target, so the model cannot learn to stop."}
    needs_next_token = True
    taps = ("tokens",)
    MIN_SEEN = 32  # documents that ended without EOS as target, before it is reported. Chosen, not measured
    ABSENT_TOKENS = 1_000_000  # longer than one document of any usual corpus, a hundred times over. Not measured

    def setup(self, run) -> None:
        self.eos_token_ids = run.eos_token_ids
        if not self.eos_token_ids:
            raise CannotJudge("neither model nor tokenizer names an EOS token")
        self.state = {"tokens": 0, "in_text": 0, "scored": 0}

    def measure_tokens(self, step: int, tokens: list[SeenTokens]) -> dict[str, int]:
        counts = [self.count(seen) for seen in tokens]
        return {name: sum(count[name] for count in counts) for name in self.state}

    def count(self, seen: SeenTokens) -> dict[str, int]:
        is_eos = np.zeros_like(seen.valid)
        for token_id in self.eos_token_ids:  # one or two; np.isin takes ten times as long
            is_eos |= (seen.ids == token_id) & seen.valid
        in_text = int(is_eos[:, 1:].sum())  # a row's first token may be a BOS of the same id
        return {"tokens": int(seen.valid.sum()), "in_text": in_text, "scored": int((is_eos & seen.scored).sum())}

    def observe(self, step) -> Iterator[Verdict]:
        for counts in step.of_ranks(self):
            self.state = {name: self.state[name] + count for name, count in counts.items()}
        if step.of_ranks(self):
            yield self.judge(**self.state) or self.clear()

    @classmethod
    def judge(cls, tokens: int, in_text: int, scored: int) -> Finding | None:
        """EOS is among the `scored` targets, and `in_text` after a row's first token."""
        if scored == 0 and in_text >= cls.MIN_SEEN:
            severity, found = "warning", f"EOS {in_text:,} times, never a target"
            causes = ("pad_token is eos_token (so EOS is masked)", "EOS is only in masked prompts")
            action = "give the tokenizer a pad token of its own"
        elif scored == in_text == 0 and tokens >= cls.ABSENT_TOKENS:
            severity, found = "info", f"no EOS in {tokens:,} tokens"
            causes = ("documents joined without EOS", "documents end with another token (than the tokenizer's EOS)")
            action = "append the EOS token to every document, if the model shall learn to stop"
        else:
            return None
        return cls.finding(severity, found, "EOS as target", causes, action, {"tokens": tokens})
