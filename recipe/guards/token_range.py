"""Token ids against the rows of the embedding."""

from collections.abc import Iterator

from recipe.guards.guard import PROBE, STEP, CannotJudge, Finding, Guard, Verdict
from recipe.guards.ngrams import NO_VOCABULARY
from recipe.guards.run import tokenizer_sizes_of

CAUSES = ("tokenizer of another model", "tokens were added and the embedding not resized")
ACTION = "take the model's own tokenizer, or model.resize_token_embeddings(len(tokenizer))"


class TokenRange(Guard):
    """Token ids lie outside of the embedding, or the tokenizer has more tokens than it has rows.

    When: before step 1 on the first rows, then at every step.
    Measured: lowest and highest id so far. Beyond the embedding is an error, negative a warning, since some models
        take such ids for images. Before step 1, the tokenizer's size: more tokens than rows is a warning, since a
        clamp or a modulo may hide it in the batches; information where only added tokens are beyond.
    Try: the model's own tokenizer, or `model.resize_token_embeddings(len(tokenizer))`.
    Cannot see: ids inside the range that mean another token; a tokenizer that is not the Trainer's `processing_class`.
    """

    ids = {"token_out_of_range": "Token ids lie outside the model's vocabulary."}
    taps = ("tokens",)

    def setup(self, run) -> None:
        self.rows = run.embedding_rows
        if not self.rows:
            raise CannotJudge(NO_VOCABULARY)
        self.state = {"lowest": 0, "highest": 0}

    def probe(self, batch) -> Iterator[Verdict]:
        ids = batch.seen_tokens().ids
        finding = self.judge(int(ids.min()), int(ids.max()), self.rows, check=PROBE)
        if finding is None and (sizes := tokenizer_sizes_of(batch.run.tokenizer)) is not None:
            finding = self.judge_sizes(*sizes, self.rows)
        yield finding or self.clear(check=PROBE)

    def observe(self, step) -> Iterator[Verdict]:
        for _, _, seen in step.tokens:
            self.state["lowest"] = min(self.state["lowest"], int(seen.ids.min()))
            self.state["highest"] = max(self.state["highest"], int(seen.ids.max()))
        if step.tokens:
            yield self.judge(**self.state, rows=self.rows) or self.clear()

    @classmethod
    def judge(cls, lowest: int, highest: int, rows: int, check: str = STEP) -> Finding | None:
        if lowest >= 0 and highest < rows:
            return None
        severity, found = "error" if highest >= rows else "warning", f"token ids from {lowest:,} to {highest:,}"
        expected = f"0 to {rows - 1:,}, the embedding"
        evidence = {"lowest": lowest, "highest": highest, "embedding_rows": rows}
        return cls.finding(severity, found, expected, CAUSES, ACTION, evidence, check=check)

    @classmethod
    def judge_sizes(cls, base: int, total: int, rows: int) -> Finding | None:
        """`base`, `total`: the tokenizer's tokens without and with those that were added, which may never be used."""
        if max(base, total) <= rows:
            return None
        severity, size, of = ("warning", base, "") if base > rows else ("info", total, " with the added ones")
        found = f"tokenizer of {size:,} tokens{of}"
        expected = f"{rows:,} at most, the embedding"
        evidence = {"base": base, "total": total, "embedding_rows": rows}
        return cls.finding(severity, found, expected, CAUSES, ACTION, evidence, check=PROBE)
