"""Finds copies of the held-out documents, which belong to eval only, in the training data."""

import hashlib
import re
from collections.abc import Iterable
from itertools import islice

from recipe.data.formats import Content

HEAD_WORDS, HEAD_CHARS, WORDS_AT_ONCE = 8, 64, 10_000
WORD = re.compile(r"\S+")


class HoldOutFilter:
    """Held-out documents by their content, to keep copies of them out of train.

    Texts that differ only in case and white space count as equal, as do token ids that are the same or whose texts are
    equal according to a token cache. `holds` compares a text's first words, and hashes the whole text only where
    they match those of a held-out one.
    """

    def __init__(self, contents: Iterable[Content] = (), eos_token_id: int | None = None):
        self.eos_token_id = eos_token_id
        contents = [content for content in contents if len(content)]
        self.digests = {digest_of(content, eos_token_id) for content in contents}
        # The words behind token ids are unknown, so every text might match them.
        self.heads = {_head(content) if isinstance(content, str) else None for content in contents}

    def holds(self, content: Content) -> bool:
        is_candidate = not isinstance(content, str) or None in self.heads or _head(content) in self.heads
        return is_candidate and len(content) > 0 and digest_of(content, self.eos_token_id) in self.digests


def digest_of(content: Content, eos_token_id: int | None = None) -> bytes:
    """A hash of the content that ignores case, white space, and an EOS at the end of token ids."""
    if not isinstance(content, str):
        ids = content.ids[:-1] if len(content) and content.ids[-1] == eos_token_id else content.ids
        return content.text_digest or hashlib.blake2b(ids.tobytes(), digest_size=16).digest()
    digest, words, space = hashlib.blake2b(digest_size=16), (match[0] for match in WORD.finditer(content)), ""
    while some := list(islice(words, WORDS_AT_ONCE)):  # a list of all words takes many times the memory of the text
        digest.update((space + " ".join(some)).casefold().encode())
        space = " "
    return digest.digest()


def _head(text: str) -> str:
    return " ".join(text.split(None, HEAD_WORDS)[:HEAD_WORDS]).casefold()[:HEAD_CHARS]
