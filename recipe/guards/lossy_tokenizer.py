"""Texts that the tokenizer cannot tell from each other."""

from collections.abc import Iterable, Iterator

from transformers import PreTrainedTokenizerBase

from recipe.guards.guard import PROBE, CannotJudge, Finding, Guard, NotApplicable, Verdict
from recipe.guards.run import text_tokenizer_of

# What is lost where the first text has the same tokens as one of the others.
PAIRS = {
    "capitals": ("Two Words", "two words"),
    "line breaks": ("two\nwords", "two words", "twowords"),
    "runs of spaces": ("two  words", "two words", "twowords"),
}


class LossyTokenizer(Guard):
    """The tokenizer loses capitals or line breaks on the way to tokens.

    When: before step 1.
    Measured: the tokens of `Two Words` and `two words`, of two words with a line break and a space between them, and
        with two spaces and one. Where both are the same, nobody can tell the texts apart, and the model never writes
        the first of them. Capitals or line breaks of a model that begins untrained are a warning. A model that was
        trained before belongs to its tokenizer, and some have no runs of spaces on purpose: information.
    Try: another normalizer or pre-tokenizer in `tokenizer.json`. `BertNormalizer` lower-cases by default
        (`do_lower_case=False`); SentencePiece makes one space of several, and of a line break
        (`remove_extra_whitespaces`, `nmt_nfkc`); `Whitespace` drops both. If it is meant, `disabled_guards`.
    Cannot see: text that is changed before it is tokenized; a tokenizer that is not the Trainer's `processing_class`,
        or that has no token for these words.
    """

    ids = {"lossy_tokenizer": "The tokenizer loses capitals or line breaks, so the model can never write them."}
    needs_next_token = True

    def probe(self, batch) -> Iterator[Verdict]:
        tokenizer = text_tokenizer_of(batch.run.tokenizer)
        if tokenizer is None:
            raise NotApplicable("no tokenizer is known (the Trainer's processing_class)")
        yield self.judge(lost(tokenizer), batch.run.is_new_model) or self.clear(check=PROBE)

    @classmethod
    def judge(cls, names: Iterable[str], is_new_model: bool) -> Finding | None:
        """`names`: of `lost`."""
        names = list(names)
        if not names:
            return None
        matters = is_new_model and names != ["runs of spaces"]
        return cls.finding(
            "warning" if matters else "info",
            found=f"the tokenizer loses {' and '.join(names[:2])}",
            expected="other tokens",
            causes=("its normalizer (lower-casing or white space)", "on purpose: an uncased tokenizer"),
            action="if the model shall write them, change the tokenizer's normalizer; else nothing",
            evidence={"lost": names},
            check=PROBE,
        )


def lost(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The keys of PAIRS. Raises `CannotJudge` where the tokenizer has no tokens for such words."""

    def encode(text: str) -> list[int]:
        try:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        except Exception:  # a word that it does not know, arguments of its own
            ids = []
        if not ids or tokenizer.unk_token_id in ids:
            raise CannotJudge("the tokenizer has no tokens for words of Latin letters")
        return ids

    tokens = {name: [encode(text) for text in texts] for name, texts in PAIRS.items()}
    return [name for name, (first, *others) in tokens.items() if first in others]
