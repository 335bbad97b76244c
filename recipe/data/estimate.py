"""How many tokens one pass over a source is, about: for a message, without torch and without reading all of it."""

from pathlib import Path

from recipe.data.docstrings import default_cache_dir
from recipe.data.files import find_files, is_remote
from recipe.data.formats import Content
from recipe.data.source import open_source
from recipe.errors import DataError, UserError

SAMPLE_CHARS = 500_000
MAX_BYTES = 1 << 30  # of the file that is indexed: its documents are counted first


def tokens_of_a_pass(source: object, text_column: str, tokenizer: object) -> int | None:
    """To two digits: tokens for each byte of the first file's first documents, times the size of all files. None for
    a mixture, a remote source, or where source or tokenizer cannot be read."""
    from tokenizers import Tokenizer

    try:
        if not isinstance(source, str) or not isinstance(tokenizer, str) or is_remote(source):
            return None
        built = [str(path) for path in default_cache_dir().glob("docstrings-*/corpus.parquet")]
        files = built[-1:] if source == "docstrings" else find_files(source)
        sizes = [Path(file).stat().st_size for file in files]
        if not files or sizes[0] > MAX_BYTES:
            return None
        encoder = Tokenizer.from_file(str(Path(tokenizer) / "tokenizer.json"))
        opened = open_source(files[0], "text" if source == "docstrings" else text_column)
        tokens = num_bytes = 0
        for chunk in opened.chunks:
            tokens, num_bytes = tokens + _count(opened.read_chunk(chunk), encoder), num_bytes + chunk.num_bytes
            if num_bytes > SAMPLE_CHARS:
                break
        return _two_digits(tokens / num_bytes * opened.num_bytes * sum(sizes) / sizes[0])
    except (UserError, DataError, OSError, ArithmeticError):
        return None
    except Exception:  # tokenizers raises no narrower class for a file that it cannot read
        return None


def _count(contents: list[Content], encoder) -> float:
    """Tokens of a chunk's documents, EOS included; from their first half million characters."""
    texts, chars, tokens, length = [], 0, len(contents), sum(map(len, contents))
    for content in contents:
        if not isinstance(content, str):
            return length + len(contents)  # they are token ids
        texts.append(content[: SAMPLE_CHARS - chars])
        chars += len(texts[-1])
        if chars >= SAMPLE_CHARS:
            break
    ids = sum(len(each.ids) for each in encoder.encode_batch_fast(texts, add_special_tokens=False))
    return tokens + ids * length / max(1, chars)


def _two_digits(count: float) -> int | None:
    return int(float(f"{count:.2g}")) or None
