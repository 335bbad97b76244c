"""Padding among the targets."""

from collections.abc import Iterator

import numpy as np

from recipe.guards.batches import SeenTokens
from recipe.guards.guard import PROBE, STEP, Finding, Guard, Verdict


class PaddingIsTarget(Guard):
    """Padding is scored, or rows hold one token only.

    When: before step 1 on the first rows, then at every step.
    Measured: 100 scored targets and 1 % of all targets so far have attention mask 0 or, in a batch without a mask, are
        the pad token of the tokenizer or model at a row's end after another one. Or 4 rows and 1 % of all rows of 64
        tokens or more hold one token only and score it, as ends of files that were never written.
    Try: `labels[attention_mask == 0] = -100`; without a mask the same for the padding at the rows' ends.
    Cannot see: padding at the rows' beginnings in batches without a mask, and where no pad token is known.
    """

    ids = {"padding_is_target": "Padding is scored, so the model learns to pad."}
    needs_next_token = True
    taps = ("tokens",)
    # Scored padding, and its share of the scored targets; less does no harm. Chosen, not measured.
    MIN_TARGETS, MIN_SHARE = 100, 0.01
    # Tokens of a row that are all the same and scored: no text has so many, blank stretches of code are shorter. Such
    # rows, and their share of all rows. Chosen, not measured.
    FILLED_TOKENS, FILLED_ROWS, FILLED_SHARE = 64, 4, 0.01

    def setup(self, run) -> None:
        self.state = {"targets": 0, "padding": 0, "rows": 0, "filled": 0}

    def probe(self, batch) -> Iterator[Verdict]:
        yield self.judge(**self.count(batch.seen_tokens()), check=PROBE) or self.clear(check=PROBE)

    def measure_tokens(self, step: int, tokens: list[SeenTokens]) -> dict[str, int]:
        counts = [self.count(seen) for seen in tokens]
        return {name: sum(count[name] for count in counts) for name in self.state}

    def observe(self, step) -> Iterator[Verdict]:
        for counts in step.of_ranks(self):
            self.state = {name: self.state[name] + count for name, count in counts.items()}
        if step.of_ranks(self):
            yield self.judge(**self.state) or self.clear()

    @classmethod
    def count(cls, seen: SeenTokens) -> dict[str, int]:
        filled = 0
        if seen.ids.shape[1] >= cls.FILLED_TOKENS:
            may_be = (seen.ids[:, 0] == seen.ids[:, -1]) & seen.scored[:, 1:].all(axis=1)
            filled = sum(bool((seen.ids[row] == seen.ids[row, 0]).all()) for row in np.flatnonzero(may_be))
        padding = int((seen.scored & ~seen.valid).sum())
        return {"targets": seen.num_scored, "padding": padding, "rows": len(seen.ids), "filled": filled}

    @classmethod
    def judge(cls, targets: int, padding: int, rows: int, filled: int, check: str = STEP) -> Finding | None:
        if filled >= max(cls.FILLED_ROWS, cls.FILLED_SHARE * rows):
            found, expected = f"{filled:,} of {rows:,} rows hold one token", "text"
            causes = ("files not filled to the end", "rows of padding alone")
            action = "leave these rows out, or mask their labels"
        elif padding >= max(cls.MIN_TARGETS, cls.MIN_SHARE * targets):
            found, expected = f"{padding:,} of {targets:,} targets are padding", "none: labels of -100"
            causes = ("labels copy padded input_ids", "the collator masks another token (than the pad token)")
            action = "set the labels of padding to -100, such as labels[attention_mask == 0] = -100"
        else:
            return None
        evidence = {"targets": targets, "padding": padding, "rows": rows, "filled": filled}
        return cls.finding("warning", found, expected, causes, action, evidence, check=check)
