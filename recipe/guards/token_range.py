"""Token ids against the rows of the embedding."""

from collections.abc import Iterable, Iterator
from types import SimpleNamespace

import numpy as np
from transformers import PreTrainedConfig

from recipe.guards.batches import SeenTokens
from recipe.guards.guard import PROBE, STEP, CannotJudge, Finding, Guard, Verdict
from recipe.guards.ngrams import NO_VOCABULARY
from recipe.guards.run import eos_token_ids_of, tokenizer_sizes_of

CAUSES = ("tokenizer of another model", "tokens were added and the embedding not resized")
ACTION = "take the model's own tokenizer, or model.resize_token_embeddings(len(tokenizer))"


class TokenRange(Guard):
    """Token ids lie outside of the embedding, or the tokenizer has more tokens than it has rows.

    When: before step 1 on the first rows, then at every step.
    Measured: lowest and highest id so far. Beyond the embedding is an error, negative a warning, since some models
        take such ids for images. Before step 1, the tokenizer's size: more tokens than rows is a warning, since a
        clamp or a modulo may hide it in the batches; information where only added tokens are beyond. Which ids occur:
        a warning where 32 different ones above 256 or 2,048 are even without exception, as bf16 or fp16 rounds them,
        and where all 256 bytes occur and nothing else, or 32 different ones of the last 0.0625 before 65,536 and none
        from there on, in a vocabulary of 1.5 times that and more: ids that were stored in too small a type have lost
        their high bits; so they have where 16,384 tokens hold bytes of a text only, EOS is none, and the byte that is
        left of it occurs. A warning too, before step 1: an EOS beyond the embedding that the config names, unless it
        is the default of its class.
    Try: the model's own tokenizer, or `model.resize_token_embeddings(len(tokenizer))`. Rounded or cut ids: int32 or
        int64 from the tokenizer to the batch.
    Cannot see: other ids inside the range that mean another token; a tokenizer that is not the Trainer's
        `processing_class`.
    """

    ids = {"token_out_of_range": "Token ids lie outside the model's vocabulary, or were rounded or cut on the way."}
    taps = ("tokens",)
    # Different ids that are all even, or that lie just under a limit. Derived: by chance once in 2^32 vocabularies.
    MIN_IDS = 32
    # From so many times the limit on, the vocabulary goes well beyond it. Part of the range below a limit that has to
    # be in use up to it: text of a low register that never comes near the limit is no fault. Chosen, not measured.
    BEYOND, NEAR = 1.5, 1 / 16
    # In which an EOS is due. Chosen, not measured: some documents of 1,000 tokens.
    MIN_TOKENS = 16_384

    def setup(self, run) -> None:
        self.rows = run.embedding_rows
        if not self.rows:
            raise CannotJudge(NO_VOCABULARY)
        self.eos_ids = run.eos_token_ids
        self.state = {"lowest": 0, "highest": 0, "tokens": 0, "occur": np.zeros(self.rows, bool)}

    def probe(self, batch) -> Iterator[Verdict]:
        ids = batch.seen_tokens(all_rows=True).ids
        finding = self.judge(int(ids.min()), int(ids.max()), self.rows, check=PROBE)
        if finding is None and (sizes := tokenizer_sizes_of(batch.run.tokenizer)) is not None:
            finding = self.judge_sizes(*sizes, self.rows)
        finding = finding or self.judge_eos(chosen_eos_ids(batch.model), self.rows)
        yield finding or self.clear(check=PROBE)
        if finding is None and (finding := self.judge_kinds(occurring([ids], self.rows))):
            yield finding  # the steps look for more

    def measure_tokens(self, step: int, tokens: list[SeenTokens]) -> tuple[int, int, int, np.ndarray]:
        lowest = min((int(seen.ids.min()) for seen in tokens), default=0)
        highest = max((int(seen.ids.max()) for seen in tokens), default=0)
        text = [seen.ids[seen.valid] for seen in tokens]
        return lowest, highest, sum(map(len, text)), np.packbits(occurring(text, self.rows))

    def observe(self, step) -> Iterator[Verdict]:
        for lowest, highest, count, occur in step.of_ranks(self):
            self.state["tokens"] += count
            self.state["lowest"] = min(self.state["lowest"], lowest)
            self.state["highest"] = max(self.state["highest"], highest)
            self.state["occur"] |= np.unpackbits(occur, count=self.rows).view(bool)
        if step.of_ranks(self):
            finding = self.judge(self.state["lowest"], self.state["highest"], self.rows)
            occur, tokens = self.state["occur"], self.state["tokens"]
            finding = finding or self.judge_kinds(occur) or self.judge_wrapped(occur, tokens, self.eos_ids)
            yield finding or self.clear()

    @classmethod
    def judge(cls, lowest: int, highest: int, rows: int, check: str = STEP) -> Finding | None:
        if lowest >= 0 and highest < rows:
            return None
        severity, found = "error" if highest >= rows else "warning", f"token ids from {lowest:,} to {highest:,}"
        expected = f"0 to {rows - 1:,} (the embedding)"
        evidence = {"lowest": lowest, "highest": highest, "embedding_rows": rows}
        return cls.finding(severity, found, expected, CAUSES, ACTION, evidence, check=check)

    @classmethod
    def judge_kinds(cls, occur: np.ndarray) -> Finding | None:
        """`occur` bool `[rows of the embedding]`: which ids do."""
        number, causes, action = np.flatnonzero(occur), (), "keep token ids in int32 or int64 all the way"
        for limit, kind in ((256, "bfloat16"), (2048, "float16")):
            above, below = number[number > limit], number[number < limit]
            if not causes and len(above) >= cls.MIN_IDS and not (above % 2).any() and (below % 2).sum() >= cls.MIN_IDS:
                found, expected = f"all {len(above)} different ids above {limit:,} are even", "odd ones too"
                causes = (f"ids cast to {kind} (which rounds them)",)
        for limit, kind in ((1 << 8, "uint8"), (1 << 16, "uint16")):
            near = int((number >= limit - limit * cls.NEAR).sum())
            is_full = len(number) == limit if limit == 1 << 8 else near >= cls.MIN_IDS  # no text holds all bytes
            if not causes and len(occur) >= cls.BEYOND * limit and number.max(initial=0) < limit and is_full:
                found = f"{len(number):,} ids, none above {int(number.max()):,}"
                expected, causes = f"ids up to {len(occur) - 1:,}", (f"ids were stored in {kind}",)
        if not causes:
            return None
        evidence = {"different_ids": len(number), "highest": int(number.max())}
        return cls.finding("warning", found, expected, causes, action, evidence)

    @classmethod
    def judge_wrapped(cls, occur: np.ndarray, tokens: int, eos_ids: Iterable[int]) -> Finding | None:
        """EOS is no byte; the ids are bytes of a text (spaces, no control characters), and what a byte has of EOS."""
        highest, ids = int(np.flatnonzero(occur).max(initial=0)), [eos for eos in eos_ids if 256 <= eos < len(occur)]
        if tokens < cls.MIN_TOKENS or not ids or highest >= 256 or not occur[[32, *(eos % 256 for eos in ids)]].all():
            return None
        if any(occur[number] for number in range(9) if number not in [eos % 256 for eos in ids]):
            return None
        found, expected = f"no EOS ({ids[0]:,}), but id {ids[0] % 256}", "ids above 255"
        causes, action = ("ids were stored in uint8",), "keep token ids in int32 or int64 all the way"
        return cls.finding("warning", found, expected, causes, action, {"eos": ids, "highest": highest})

    @classmethod
    def judge_sizes(cls, base: int, total: int, rows: int) -> Finding | None:
        """`base`, `total`: the tokenizer's tokens without and with those that were added, which may never be used."""
        if max(base, total) <= rows:
            return None
        severity, size, of = ("warning", base, "") if base > rows else ("info", total, " (with the added ones)")
        found = f"tokenizer of {size:,} tokens{of}"
        expected = f"{rows:,} at most (the embedding)"
        evidence = {"base": base, "total": total, "embedding_rows": rows}
        return cls.finding(severity, found, expected, CAUSES, ACTION, evidence, check=PROBE)

    @classmethod
    def judge_eos(cls, ids: Iterable[int], rows: int) -> Finding | None:
        """`ids`: of the config, see `chosen_eos_ids`. Without one in the embedding the model cannot stop."""
        ids = list(ids)
        if not ids or min(ids) < rows:
            return None
        found, expected = f"the config's eos_token_id is {ids[0]:,}", f"0 to {rows - 1:,} (the embedding)"
        action = "give the model as many embeddings as the tokenizer has tokens"
        causes = ("the vocabulary was cut (ids taken modulo its size)", *CAUSES)
        return cls.finding(
            "warning", found, expected, causes, action, {"eos": ids, "embedding_rows": rows}, check=PROBE
        )


def chosen_eos_ids(model) -> list[int]:
    """The EOS ids of the model's config, unless they are the default of its class, as of every small GPT-2."""
    if not isinstance(config := getattr(model, "config", None), PreTrainedConfig):
        return []
    given, default = (eos_token_ids_of(SimpleNamespace(config=each), None) for each in (config, type(config)()))
    return list(given) if given != default else []


def occurring(ids: Iterable[np.ndarray], rows: int) -> np.ndarray:
    """Which of the embedding's rows are asked for."""
    occur = np.zeros(rows, bool)
    for each in ids:
        occur[each[(each >= 0) & (each < rows)]] = True
    return occur
