"""A tokenizer that loses capitals or line breaks."""

from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, TokenizersBackend

from recipe.guards.guard import CannotJudge
from recipe.guards.lossy_tokenizer import LossyTokenizer, lost

TOKENIZERS = Path(__file__).parents[1] / "tokenizer"


def changed(tokenizer, normalizer) -> TokenizersBackend:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.normalizer = normalizer
    return TokenizersBackend(tokenizer_object=backend, eos_token="</s>")


@pytest.mark.parametrize(
    ("normalizer", "names"),
    [
        (normalizers.NFC(), []),
        (normalizers.Lowercase(), ["capitals"]),
        (normalizers.BertNormalizer(lowercase=False), ["line breaks"]),
        (normalizers.Replace("\n", " "), ["line breaks"]),
        (normalizers.Replace("\n", ""), ["line breaks"]),
        (normalizers.Replace(Regex(r"\s+"), " "), ["line breaks", "runs of spaces"]),
        (normalizers.Replace(Regex(" +"), " "), ["runs of spaces"]),
    ],
)
def test_what_is_lost(tokenizer, normalizer, names):
    assert lost(changed(tokenizer, normalizer)) == names
    severities = [getattr(LossyTokenizer.judge(names, is_new), "severity", None) for is_new in (True, False)]
    assert severities == [None, None] if not names else severities[1] == "info"
    assert (severities[0] == "warning") == bool(set(names) - {"runs of spaces"})


@pytest.mark.parametrize("name", ["llama-4k", "llama-32k"])
def test_real_tokenizers_lose_nothing(name):
    assert lost(AutoTokenizer.from_pretrained(TOKENIZERS / name)) == []


def words(*known: str, **special) -> TokenizersBackend:
    backend = Tokenizer(WordLevel({word: number for number, word in enumerate(known)}, **special))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return TokenizersBackend(tokenizer_object=backend, **special)


def test_words_at_spaces_lose_line_breaks():
    assert lost(words("two", "words", "Two", "Words", "twowords")) == ["line breaks", "runs of spaces"]


@pytest.mark.parametrize("tokenizer", [words("A", "C"), words("A", "[UNK]", "two", unk_token="[UNK]")])
def test_what_has_no_such_words_cannot_be_judged(tokenizer):
    with pytest.raises(CannotJudge, match="Latin letters"):
        lost(tokenizer)
