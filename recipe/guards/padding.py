"""Padding among the targets, and in what the text attends to."""

from collections.abc import Iterator

import numpy as np

from recipe.guards.attention import AttentionLeak, input_gradient, model_inputs
from recipe.guards.batches import SeenTokens, leading_padding
from recipe.guards.guard import PROBE, STEP, CannotJudge, Finding, Guard, NotApplicable, Verdict

EVAL = "evaluation"


class PaddingIsTarget(Guard):
    """Padding is scored or attended, or rows hold one token only.

    When: before step 1 on the first rows, then at every step; at each evaluation, by the attention mask.
    Measured: 100 scored targets and 1 % of all targets so far have attention mask 0 or, in a batch without a mask, are
        the pad token of the tokenizer or model at a row's end after another one. Or 4 rows and 1 % of all rows of 64
        tokens or more hold one token only and score it, as ends of files that were never written. Where the mask is 0
        on half of the targets and 100 of them, and these are no more than half one token, it is the text that is
        masked. So is some of it where a row has 4 stretches of mask 0 inside its text, in the mean, all of one token.
        Before step 1, where rows begin with padding (mask 0, or 8 unscored tokens of the pad token or, where none is
        known, of one token in rows of different lengths whose text is all scored): whether the gradient of the logits
        at the first token of the text reaches it, as in the call that training makes.
    Try: `labels[attention_mask == 0] = -100`; without a mask the same for the padding at the rows' ends.
    Try (padding_attended): `attention_mask = (input_ids != pad_token_id).long()`, handed to the model.
    Cannot see: padding at the rows' beginnings that is scored, and where no pad token is known.
    """

    ids = {
        "padding_is_target": "Padding is scored, so the model learns to pad.",
        "padding_attended": "The text attends to padding before it, or is itself masked as padding.",
    }
    needs_next_token = True
    taps = ("tokens", "evaluation")
    # Scored padding, and its share of the scored targets; less does no harm. Chosen, not measured.
    MIN_TARGETS, MIN_SHARE = 100, 0.01
    # Tokens of a row that are all the same and scored: no text has so many, blank stretches of code are shorter. Such
    # rows, and their share of all rows. Chosen, not measured.
    FILLED_TOKENS, FILLED_ROWS, FILLED_SHARE = 64, 4, 0.01
    # Stretches of mask 0 inside the text of a row, in the mean. Chosen, not measured: padded turns leave one each.
    HOLES = 4
    # Of the masked targets, the most frequent token: padding is one, text is many. Of all targets. A majority.
    MOST = 0.5

    def setup(self, run) -> None:
        self.state = {"targets": 0, "padding": 0, "hidden": 0, "rows": 0, "filled": 0, "holes": 0}

    def probe(self, batch) -> Iterator[Verdict]:
        counts = self.count(batch.seen_tokens())
        yield from self.verdicts(counts, PROBE)
        if counts["hidden"]:
            return
        leading = leading_padding(batch.inputs, batch.run.pad_token_id)
        if not leading.any():
            raise NotApplicable("no padding before the rows' texts")
        yield self.judge_attended(*self._gradient_at(batch, leading)) or self.clear("padding_attended", PROBE)

    def _gradient_at(self, batch, leading) -> tuple[np.ndarray, np.ndarray]:
        """`leading`, and of the first token after it in each row the logits' gradient at all tokens."""
        inputs = model_inputs(batch)
        if inputs["input_ids"].shape != leading.shape:
            raise CannotJudge("the model is given other rows than those of the batch")
        first = leading.sum(dim=1)
        probed = {row: place for row, place in enumerate(first.tolist()) if 0 < place < leading.shape[1]}
        with batch.twin.compute_loss_context_manager():
            return leading.cpu().numpy(), input_gradient(batch.model, inputs, probed, training=True).cpu().numpy()

    def measure_tokens(self, step: int, tokens: list[SeenTokens]) -> dict[str, int]:
        counts = [self.count(seen) for seen in tokens]
        return {name: sum(count[name] for count in counts) for name in self.state}

    def observe(self, step) -> Iterator[Verdict]:
        for counts in step.of_ranks(self):
            self.state = {name: self.state[name] + count for name, count in counts.items()}
        if step.of_ranks(self):
            yield from self.verdicts(self.state, STEP)

    def observe_eval(self, evaluation) -> Iterator[Verdict]:
        targets = sum(sum(rank["counts"]) for rank in evaluation.ranks)
        padding = sum(rank["padding"] for rank in evaluation.ranks)
        yield self.judge_eval(targets, padding) or self.clear("padding_is_target", EVAL)

    def verdicts(self, counts: dict[str, int], check: str) -> Iterator[Verdict]:
        yield self.judge(**counts, check=check) or self.clear("padding_is_target", check)
        if counts["hidden"] and (finding := self.judge_mask(**counts, check=check)):
            yield finding
        if finding := self.judge_holes(counts["rows"], counts["holes"], check):
            yield finding

    @classmethod
    def count(cls, seen: SeenTokens) -> dict[str, int]:
        filled = 0
        if seen.ids.shape[1] >= cls.FILLED_TOKENS:
            may_be = (seen.ids[:, 0] == seen.ids[:, -1]) & seen.scored[:, 1:].all(axis=1)
            filled = sum(bool((seen.ids[row] == seen.ids[row, 0]).all()) for row in np.flatnonzero(may_be))
        masked = seen.ids[seen.scored & ~seen.valid]
        is_text = len(masked) and np.unique(masked, return_counts=True)[1].max() < cls.MOST * len(masked)
        counts = {"padding": 0, "hidden": len(masked)} if is_text else {"padding": len(masked), "hidden": 0}
        return {"targets": seen.num_scored, **counts, "rows": len(seen.ids), "filled": filled, "holes": holes(seen)}

    @classmethod
    def judge(
        cls, targets: int, padding: int, hidden: int, rows: int, filled: int, holes: int, check: str = STEP
    ) -> Finding | None:
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
        return cls.finding("warning", found, expected, causes, action, evidence, "padding_is_target", check)

    @classmethod
    def judge_eval(cls, targets: int, padding: int) -> Finding | None:
        """Of one evaluation."""
        if padding < max(cls.MIN_TARGETS, cls.MIN_SHARE * targets):
            return None
        found, expected = f"{padding:,} of {targets:,} eval targets are padding", "none: labels of -100"
        causes = ("eval labels copy padded input_ids",)
        action = "mask the padding of the eval set as that of the training set"
        evidence = {"targets": targets, "padding": padding}
        return cls.finding("warning", found, expected, causes, action, evidence, "padding_is_target", EVAL)

    @classmethod
    def judge_mask(cls, targets: int, hidden: int, check: str = STEP, **others: int) -> Finding | None:
        if hidden < max(cls.MIN_TARGETS, cls.MOST * targets):
            return None
        found, expected = f"attention mask 0 at {hidden:,} of {targets:,} targets", "1: they are text"
        causes = ("the mask is inverted (1 means: attend)",)
        action = "make the mask 1 on text and 0 on padding"
        evidence = {"targets": targets, "masked": hidden}
        return cls.finding("warning", found, expected, causes, action, evidence, "padding_attended", check)

    @classmethod
    def judge_holes(cls, rows: int, holes: int, check: str = STEP) -> Finding | None:
        """`holes`: stretches of mask 0 between text."""
        if rows < cls.FILLED_ROWS or holes < cls.HOLES * rows:
            return None
        found, expected = f"{holes / rows:.0f} stretches of mask 0 in a text", "none"
        causes = ("the pad token is in the text",)
        action = "make the mask by each text's length, or take a pad token that no text has"
        evidence = {"rows": rows, "holes": holes}
        return cls.finding("warning", found, expected, causes, action, evidence, "padding_attended", check, "holes")

    @classmethod
    def judge_attended(cls, leading: np.ndarray, sizes: np.ndarray) -> Finding | None:
        """Both `[rows, positions]`: padding before the text, and of `_gradient_at`."""
        seen = (sizes * leading).max(axis=1) > AttentionLeak.ROUNDING * sizes.max(axis=1)
        if not seen.any():
            return None
        found = f"{int(seen.sum())} of {len(leading)} rows attend to padding (before their text)"
        causes = ("attention mask 1 on padding", "the mask is not handed to the model")
        action = "make the mask 0 on padding, and hand it to the model"
        evidence = {"padding": leading.sum(axis=1).tolist(), "seen": seen.tolist()}
        return cls.finding("warning", found, "none", causes, action, evidence, "padding_attended", PROBE)


def holes(seen: SeenTokens) -> int:
    """Stretches of mask 0 that have text before and after them in their row, where one token is all that they hide."""
    text = seen.valid
    inside = ~text & np.logical_or.accumulate(text, axis=1) & np.logical_or.accumulate(text[:, ::-1], axis=1)[:, ::-1]
    hidden = seen.ids[inside]
    return int((text[:, :-1] & inside[:, 1:]).sum()) if len(hidden) and (hidden == hidden[0]).all() else 0
