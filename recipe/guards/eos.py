"""The end of a document among the targets."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from recipe.guards.batches import SeenTokens
from recipe.guards.guard import CannotJudge, Finding, Guard, Verdict
from recipe.guards.run import text_tokenizer_of

# What well-known tokenizers call the end of a document or turn; what tokens hold in the place of white space; a byte.
ENDS = r"<(\||｜)?(/s|eos|eot|eot_id|im_end|endoftext|end_of_text|end_of_turn)(\||｜)?>"
SPACES = re.compile(r"[▁ĠĊ\s]|##|</w>")
BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class EosNeverTarget(Guard):
    """EOS is in the text and never scored, or is not in the data at all.

    When: before step 1 on the first micro-batch, then at every step.
    Measured: all tokens so far, of all ids that model and tokenizer call EOS. In the text 32 times, after a row's
        first token, and never a target is a warning. Not in 1,000,000 tokens is information. A warning where it is not
        there and 8 of the first 64 rows on each rank, and 25 % of those seen so far, end with the string of the
        tokenizer's EOS, or another well-known end such as `<|endoftext|>`, in ordinary tokens (32 at most); without a
        tokenizer, where 90 % of 32 texts or more that end before the padding end in the same 3 tokens, not all of them
        equal.
    Try: a pad token of its own for the tokenizer, since collators mask it; appending EOS to every document. Where it
        is spelled out: appending its id, or a tokenizer that knows the string.
    Cannot see: which documents lack it; an end that is spelled inside of packed rows; models and tokenizers that name
        no EOS.
    """

    ids = {"eos_never_target": "The end of a document is never a target, so the model cannot learn to stop."}
    needs_next_token = True
    taps = ("tokens",)
    MIN_SEEN = 32  # documents that ended without EOS as target, before it is reported. Chosen, not measured
    ABSENT_TOKENS = 1_000_000  # longer than one document of any usual corpus, a hundred times over. Not measured
    # Rows that are looked at for the string of an end, and the last tokens of each; rows that end with it, and their
    # share: many of a text about such tokens hold it, and few end there. Chosen, not measured.
    ROWS, ROW_TOKENS, MIN_SPELLED, SPELLED_SHARE = 64, 32, 8, 1 / 4
    # Last tokens of a text, and the share of the texts that end alike. Derived: `</s>` is three tokens or more where
    # no tokenizer knows it; a template's own end token and a newline are two. Chosen, not measured.
    LAST, ALIKE = 3, 0.9

    def setup(self, run) -> None:
        self.eos_token_ids, self.world_size = run.eos_token_ids, run.world_size
        if not self.eos_token_ids:
            raise CannotJudge("neither model nor tokenizer names an EOS token")
        self.tokenizer, self.looked_at = text_tokenizer_of(run.tokenizer), 0
        self.state = {"tokens": 0, "in_text": 0, "scored": 0, "rows": 0, "spelled": 0, "ends": []}

    def probe(self, batch) -> Iterator[Verdict]:
        before = self.looked_at
        yield from filter(None, [self.judge(**self.count(batch.seen_tokens(all_rows=True)))])
        self.looked_at = before  # the steps count these rows, too

    def load(self, state: dict) -> None:
        super().load(state)
        self.looked_at = self.state["rows"] // self.world_size

    def measure_tokens(self, step: int, tokens: list[SeenTokens]) -> dict:
        return self.add(*map(self.count, tokens))

    def add(self, *counts: dict) -> dict:
        return {name: sum((each[name] for each in counts), type(own)()) for name, own in self.state.items()}

    def count(self, seen: SeenTokens) -> dict:
        is_eos = np.zeros_like(seen.valid)
        for token_id in self.eos_token_ids:  # one or two; np.isin takes ten times as long
            is_eos |= (seen.ids == token_id) & seen.valid
        in_text = int(is_eos[:, 1:].sum())  # a row's first token may be a BOS of the same id
        counts = {"tokens": int(seen.valid.sum()), "in_text": in_text, "scored": int((is_eos & seen.scored).sum())}
        first = slice(max(0, self.ROWS - self.looked_at))
        rows = [ids[valid] for ids, valid in zip(seen.ids[first], seen.valid[first], strict=True)]
        self.looked_at += len(rows)
        spelled = sum(map(self.is_spelled, rows)) if self.tokenizer is not None else 0
        ended = [row[-self.LAST :].tolist() for row in rows if len(row) < seen.ids.shape[1] and self.tokenizer is None]
        return counts | {"rows": len(rows), "spelled": spelled, "ends": ended}

    def is_spelled(self, ids: np.ndarray) -> bool:
        """Whether the row ends with the string of an end, in ordinary tokens."""
        tokenizer, end, size = self.tokenizer, self.tokenizer.eos_token or "", len(self.tokenizer)
        known = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        ordinary = [i for i in ids[-self.ROW_TOKENS :].tolist() if 0 <= i < size and i not in known]
        text = "".join(filter(None, tokenizer.convert_ids_to_tokens(ordinary)))
        text = SPACES.sub("", BYTE.sub(lambda match: chr(int(match[1], 16)), text))
        own = f"|{re.escape(end)}" if re.fullmatch(r"[<\[]\S+[>\]]", end) else ""
        return re.search(f"({ENDS}{own})$", text, re.IGNORECASE) is not None

    def observe(self, step) -> Iterator[Verdict]:
        self.state = self.add(self.state, *step.of_ranks(self))
        if step.of_ranks(self):
            yield self.judge(**self.state) or self.clear()

    @classmethod
    def judge(
        cls, tokens: int, in_text: int, scored: int, rows: int = 0, spelled: int = 0, ends: Sequence = ()
    ) -> Finding | None:
        """EOS is among the `scored` targets, and `in_text` after a row's first token. `rows`: that were looked at, of
        which `spelled` end with the string of an end. `ends`: last tokens of texts."""
        causes = ("it is spelled out (in ordinary tokens)",)
        action = "append tokenizer.eos_token_id to each document, or take a tokenizer that knows the string"
        severity, is_absent = "warning", scored == in_text == 0
        last, alike = Counter(map(tuple, ends)).most_common(1)[0] if ends else ((), 0)
        if scored == 0 and in_text >= cls.MIN_SEEN:
            found = f"EOS {in_text:,} times, never a target"
            causes = ("pad_token is eos_token (so EOS is masked)", "EOS is only in masked prompts")
            action = "give the tokenizer a pad token of its own"
        elif is_absent and spelled >= max(cls.MIN_SPELLED, cls.SPELLED_SHARE * rows):
            found = f"no EOS, but its string ends {spelled} of {rows} rows"
        elif is_absent and len(set(last)) > 1 and alike >= cls.ALIKE * len(ends) and len(ends) >= cls.MIN_SEEN:
            found = f"no EOS; {alike} of {len(ends)} texts end alike (in {', '.join(map(str, last))})"
        elif is_absent and tokens >= cls.ABSENT_TOKENS:
            severity, found = "info", f"no EOS in {tokens:,} tokens"
            causes = ("documents joined without EOS", "documents end with another token (than the tokenizer's EOS)")
            action = "append the EOS token to every document, if the model shall learn to stop"
        else:
            return None
        return cls.finding(severity, found, "EOS as target", causes, action, {"tokens": tokens})
