"""The documents that belong to eval alone: known again wherever else they stand."""

import hashlib
from collections.abc import Iterable

from recipe.data.formats import Content

HEAD_WORDS, HEAD_CHARS = 8, 64


class KeptOut:
    """Held-out documents by their content, to keep copies of them out of train.

    Texts are equal that differ in case and white space alone; token ids where they are the same, or where a token
    cache knows that their texts are equal. `holds` looks at a text's first words, and hashes the whole of those few
    that begin like a held-out one.
    """

    def __init__(self, contents: Iterable[Content] = (), eos_token_id: int | None = None):
        self.eos_token_id = eos_token_id
        contents = [content for content in contents if len(content)]
        self.digests = {digest_of(content, eos_token_id) for content in contents}
        # Of ids alone the words are not known: every text might begin like them.
        self.heads = {_head(content) if isinstance(content, str) else None for content in contents}

    def holds(self, content: Content) -> bool:
        is_candidate = not isinstance(content, str) or None in self.heads or _head(content) in self.heads
        return is_candidate and len(content) > 0 and digest_of(content, self.eos_token_id) in self.digests


def digest_of(content: Content, eos_token_id: int | None = None) -> bytes:
    """A hash of the content that owes nothing to case and white space, nor to an EOS at the end of token ids."""
    if not isinstance(content, str):
        ids = content.ids[:-1] if len(content) and content.ids[-1] == eos_token_id else content.ids
        return content.text_digest or hashlib.blake2b(ids.tobytes(), digest_size=16).digest()
    return hashlib.blake2b(" ".join(content.split()).casefold().encode(), digest_size=16).digest()


def _head(text: str) -> str:
    return " ".join(text.split(None, HEAD_WORDS)[:HEAD_WORDS]).casefold()[:HEAD_CHARS]
