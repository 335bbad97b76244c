"""Two BOS tokens at the start of a text."""

from collections.abc import Iterator

import numpy as np

from recipe.guards.batches import SeenTokens
from recipe.guards.guard import PROBE, Finding, Guard, NotApplicable, Skip, Verdict


class DoubleBos(Guard):
    """Texts begin with two BOS tokens.

    When: before step 1 on the first micro-batch, then at every step.
    Measured: runs of BOS in the rows (padding apart); once 16 were seen, 80 % of them or more hold exactly two. Empty
        documents are a few per cent. Where the BOS id is an ordinary token, runs of two are a quarter at most. Where
        no BOS is known: 80 % of 16 rows or more begin with exactly two of the token that the first row began with.
    Try: `add_special_tokens=False` where a chat template already adds BOS.
    Cannot see: texts inside of rows where the BOS is also EOS or padding, or not known.
    """

    ids = {"double_bos": "Texts begin with two BOS tokens."}
    taps = ("tokens",)
    # Texts that begin with BOS, and the share of them that begin with exactly two. Derived: where the id is an
    # ordinary token of share p, runs of two are p(1 - p) of all, a quarter at most: 13 of 16 by chance once in 260,000
    # times. Empty documents are a few per cent.
    MIN_TEXTS, MIN_SHARE = 16, 0.8

    def setup(self, run) -> None:
        self.bos = run.bos_token_id
        self.state = {"texts": 0, "doubled": 0} | ({"first": None} if self.bos is None else {})

    def inspect(self, run) -> Iterator[Verdict]:
        if self.bos is None:  # the rows' beginnings are looked at all the same
            yield Skip(self._only_id(), NotApplicable("no BOS token, or one that is EOS or padding too"))

    def probe(self, batch) -> Iterator[Verdict]:
        """The rows of one micro-batch hold enough texts only if they are packed."""
        if self.bos is not None and (finding := self.judge(*self.count(batch.seen_tokens()), check=PROBE)):
            yield finding

    def measure_tokens(self, step: int, tokens: list[SeenTokens]) -> list[int]:
        count = self.count if self.bos is not None else self.count_beginnings
        return np.sum([count(seen) for seen in tokens], axis=0).tolist()

    def observe(self, step) -> Iterator[Verdict]:
        for texts, doubled in step.of_ranks(self):
            self.state["texts"] += texts
            self.state["doubled"] += doubled
        finding = self.judge(self.state["texts"], self.state["doubled"])
        if finding or (step.of_ranks(self) and self.bos is not None):
            yield finding or self.clear()

    def count(self, seen: SeenTokens) -> tuple[int, int]:
        return count_bos((seen.ids == self.bos) & seen.valid)

    def count_beginnings(self, seen: SeenTokens) -> tuple[int, int]:
        """Rows, and those that begin with exactly two of the token that the first row of all began with."""
        texts = [ids[:3].tolist() for ids, _ in seen.pieces if len(ids) > 2]
        if texts and self.state["first"] is None:
            self.state["first"] = texts[0][0]
        doubled = [[token == self.state["first"] for token in text] == [True, True, False] for text in texts]
        return len(texts), sum(doubled)

    @classmethod
    def judge(cls, texts: int, doubled: int, check: str = "step") -> Finding | None:
        """`doubled` of the `texts` that begin with BOS begin with exactly two."""
        if texts < cls.MIN_TEXTS or doubled < cls.MIN_SHARE * texts:
            return None
        return cls.finding(
            "warning",
            found=f"{doubled:,} of {texts:,} texts begin with two BOS",
            expected="one",
            causes=("BOS added by template and tokenizer", "BOS is in the text and added again"),
            action="tokenize the template's text with add_special_tokens=False",
            evidence={"texts": texts, "doubled": doubled},
            check=check,
        )


def count_bos(is_bos: np.ndarray) -> tuple[int, int]:
    """Texts that begin with BOS, in mid-row too, and those that begin with exactly two. `is_bos`: bool `[rows,
    positions]`. The last two positions of a row do not tell."""
    begins = is_bos[:, :-2].copy()
    begins[:, 1:] &= ~is_bos[:, :-3]
    return int(begins.sum()), int((begins & is_bos[:, 1:-1] & ~is_bos[:, 2:]).sum())
