"""The texts: documents of token ids, from the same start on every machine with the same packages.

`english` is the docstring corpus, in which no 64 tokens stand in two documents; `stored` a part of it, the texts of
tests/gpu/token_ids.npy, for machines without these packages; `code` the standard library's source; `german`,
`french`, ... the files in `texts/`, short ones that are read in several passes; `templates` sentences that repeat
nearly word for word; `random` and `markov-N` (N: how many tokens may follow one) are drawn.
"""

import functools
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from recipe.data.docstrings import build_docstring_corpus
from tests.gpu import tokens
from tests.zoo.setting import Setting

FOLDER = Path(__file__).with_name("texts")
TOKENIZERS = {4096: "llama-4k", 32768: "llama-32k"}
EVAL_DOCUMENTS = 40  # the first; training reads what comes after them


def token_documents(setting: Setting, is_eval: bool) -> Iterator[np.ndarray]:
    """Documents of token ids, without EOS; endless where they are drawn."""
    if setting.text == "random" or setting.text.startswith("markov"):
        yield from _drawn(setting, is_eval)
        return
    encode, texts = _encoder(setting.vocabulary), texts_of(setting.text)
    for text in texts[:EVAL_DOCUMENTS] if is_eval else texts[EVAL_DOCUMENTS:]:
        yield encode(text)


# --- natural


@functools.cache
def texts_of(name: str) -> list[str]:
    if name == "english":
        return pq.read_table(build_docstring_corpus(), columns=["text"]).column("text").to_pylist()
    if name == "stored":
        return tokens.texts()
    if name == "code":
        stdlib = Path(sysconfig.get_paths()["stdlib"])
        return [path.read_text(encoding="utf-8", errors="replace")[:4000] for path in sorted(stdlib.glob("*.py"))]
    if name == "templates":
        return list(_templates())
    paragraphs = (FOLDER / f"{name}.txt").read_text(encoding="utf-8").split("\n\n")
    return paragraphs[-EVAL_DOCUMENTS // 8 :] * 8 + paragraphs[: -EVAL_DOCUMENTS // 8]


def _templates() -> Iterator[str]:
    """Log lines: all but a number and two names are the same."""
    generator = np.random.default_rng(0)
    hosts, states = ("alpha", "beta", "gamma", "delta"), ("ready", "busy", "stopped", "waiting for input")
    for number in range(4000):
        drawn = generator.integers(0, 4, size=(8, 2))
        lines = [f"host {hosts[a]} reported the state {states[b]} in interval {number % 97}." for a, b in drawn]
        yield "\n".join(lines)


@functools.cache
def _encoder(vocabulary: int):
    """Text -> ids `[tokens]`. 257: bytes; other sizes: a tokenizer of the recipe, or BPE trained on the first MB."""
    if vocabulary == 257:
        return lambda text: np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)
    if vocabulary in TOKENIZERS:
        path = Path(__file__).resolve().parents[2] / "tokenizer" / TOKENIZERS[vocabulary] / "tokenizer.json"
        tokenizer = Tokenizer.from_file(str(path))
    else:
        tokenizer = Tokenizer(BPE())
        tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
        alphabet = ByteLevel.alphabet()
        trainer = BpeTrainer(vocab_size=vocabulary - 1, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(texts_of("english")[:500], trainer)
    return lambda text: np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)


# --- drawn


def _drawn(setting: Setting, is_eval: bool) -> Iterator[np.ndarray]:
    """`random`: every token as likely as any other. `markov-N`: one of N tokens follows each, by chances that fall
    geometrically; the chain is the same for every seed, of entropy about 1.4 nats where N is large."""
    generator = np.random.default_rng([setting.seed, int(is_eval)])
    vocabulary = setting.vocabulary - 1
    if setting.text == "random":
        while True:
            yield generator.integers(0, vocabulary, size=int(generator.integers(100, 400)))
    num_next = int(setting.text.removeprefix("markov-"))
    followers = np.random.default_rng(0).integers(0, vocabulary, size=(vocabulary, num_next))
    chances = 0.5 ** np.arange(1, num_next + 1)
    while True:
        drawn = generator.choice(num_next, p=chances / chances.sum(), size=int(generator.integers(100, 400)))
        ids = np.empty(len(drawn), dtype=np.int64)
        token = int(generator.integers(vocabulary))
        for place, choice in enumerate(drawn):
            ids[place] = token = followers[token, choice]
        yield ids
