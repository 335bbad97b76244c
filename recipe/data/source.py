"""Text -> documents, each with its index: the embedded corpus, the hub, or files.

A `Source` is a plain value: a list of chunks and what is needed to read one. It holds no open file and no position,
so it can be sent to workers, and every iteration opens its files again.
"""

import hashlib
import json
import os
import shlex
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pyarrow as pa

from recipe.data import formats
from recipe.data.arrow import index_arrow, read_arrow_chunk
from recipe.data.convert import convert
from recipe.data.docstrings import build_docstring_corpus, corpus_info, default_cache_dir
from recipe.data.files import FileFacts, facts_of, find_files, first_line, format_of, is_remote, with_retries
from recipe.data.formats import Chunk, Content, FileIndex
from recipe.data.sniff import NotPlain
from recipe.errors import DataError, UserError

INDEX = {
    "parquet": formats.index_parquet,
    "arrow": index_arrow,
    "jsonl": formats.index_jsonl,
    "text": formats.index_text,
}
READ = {
    "parquet": formats.read_parquet_chunk,
    "arrow": read_arrow_chunk,
    "jsonl": formats.read_jsonl_chunk,
    "text": formats.read_text_chunk,
}
INDEX_VERSION = 1  # increase it when an index would differ


@dataclass(frozen=True)
class Source:
    """Documents by index. `fingerprint` changes when the content of the files changes.

    `can_be_cut`: a chunk may be read in parts. `contents`: the documents of a small source, of which `num_divided`
    were in the files (see `fitting.py`). `tokenizer`: hash of the one that made the token ids, for a token
    cache of the recipe.
    """

    name: str
    text_column: str
    chunks: tuple[Chunk, ...]
    files: tuple[FileFacts, ...]
    fingerprint: str
    can_be_cut: bool
    tokenizer: str | None = None
    contents: tuple[Content, ...] = field(default=(), repr=False)
    num_divided: int = 0

    @property
    def num_documents(self) -> int:
        return self.chunks[-1].stop_document

    @property
    def num_bytes(self) -> int:
        return sum(chunk.num_bytes for chunk in self.chunks)

    def read_chunk(self, chunk: Chunk) -> list[Content]:
        """The chunk's documents in file order; null rows are empty strings, so that indices do not shift.

        Network errors are retried for half a minute. Raises `DataError` for chunks that cannot be read.
        """

        if self.contents:
            return list(self.contents[chunk.first_document : chunk.stop_document])

        def read() -> list[Content]:
            try:
                return READ[format_of(chunk.path)](chunk, self.text_column)
            except Exception:
                formats.close_parquet()
                raise

        try:
            documents = with_retries(read, chunk.path)
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{chunk.path}: cannot read documents {chunk.first_document} to {chunk.stop_document - 1} "
                f"({first_line(error)}); replace the file, or leave it out of `source`"
            ) from error
        if len(documents) != chunk.num_documents:
            raise DataError(
                f"{chunk.path}: {len(documents)} documents where {chunk.num_documents} were counted at the start of "
                "the run; the file changed while it was read"
            )
        return documents


def open_source(source: str, text_column: str = "text") -> Source:
    """Find the files behind `source` and count their documents, from metadata where the format has it.

    `source`: `docstrings`; `hf://owner/name[/config]`; or a path, glob or fsspec URL of files.
    Raises `UserError` for an invalid source, `DataError` for one that cannot be reached or read.
    """
    formats.close_parquet()
    if source == "docstrings":
        path = build_docstring_corpus()
        return replace(_index_files(source, [str(path)], "text"), fingerprint=corpus_info(path)["content_hash"])
    return _index_files(source, find_files(source), text_column)


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def cut_chunks(chunks: list[Chunk], at_least: int) -> list[Chunk]:
    """Halve all row groups until there are `at_least` pieces, or none has two documents.

    A file with few large row groups is then read several times, one part each time: costly for huge files, acceptable
    for small ones.
    """
    while len(chunks) < at_least and max(chunk.num_documents for chunk in chunks) > 1:
        chunks = [half for chunk in chunks for half in _halves(chunk)]
    return chunks


def _halves(chunk: Chunk) -> list[Chunk]:
    if chunk.num_documents < 2:
        return [chunk]
    count = chunk.num_documents // 2
    left = replace(chunk, num_documents=count, num_bytes=chunk.num_bytes // 2)
    right = replace(
        chunk,
        num_documents=chunk.num_documents - count,
        num_bytes=chunk.num_bytes - left.num_bytes,
        first_document=chunk.first_document + count,
        first_row=chunk.first_row + count,
    )
    return [left, right]


# --- the index


def _index_files(name: str, paths: list[str], text_column: str) -> Source:
    _refuse_mixture(name, paths)
    with ThreadPoolExecutor(16) as pool:  # a remote dataset has many footers, each a short wait
        found = list(pool.map(lambda path: _index_one(path, text_column), paths))
    chunks, first = [], 0
    for chunk in (chunk for _, index in found for chunk in index.chunks if chunk.num_documents):
        chunks.append(replace(chunk, first_document=first))
        first += chunk.num_documents
    if not chunks:
        raise UserError(f"source {name!r}: {len(paths)} files without a single document")
    files = tuple(replace(facts, content=index.content) for facts, index in found)
    fingerprint = _fingerprint(text_column, files)
    can_be_cut = all(format_of(chunk.path) in ("parquet", "arrow") for chunk in chunks)
    source = Source(name, text_column, tuple(chunks), files, fingerprint, can_be_cut)
    return _as_the_text_was(source, [index.token_cache for _, index in found])


def _refuse_mixture(name: str, paths: list[str]) -> None:
    by_kind: dict[str, list[str]] = {}
    for path in paths:
        by_kind.setdefault(format_of(path), []).append(path)
    if len(by_kind) > 1:
        most = max(by_kind.values(), key=len)
        suffix, folder = Path(most[0]).suffix, os.path.commonpath([os.path.dirname(path) for path in paths])
        glob = os.path.join(folder, "*" if all(os.path.dirname(path) == folder for path in most) else "**/*") + suffix
        raise UserError(
            f"source {name!r}: mixes {' and '.join(sorted(by_kind))} files; give a glob of one kind, such as "
            f"--source {shlex.quote(glob)}"
        )


def _as_the_text_was(source: Source, token_caches: list[str | None]) -> Source:
    """A token cache with the sizes, files and fingerprint of the source that it was made from, which gives the same
    order and positions. Any other source is unchanged."""
    if not any(token_caches):
        return source
    parts = [json.loads(about) for about in token_caches if about]
    first = parts[0]
    if len(parts) < len(token_caches):
        raise UserError(f"source {source.name!r}: files of a token cache and others; name those of one kind")
    if [part["part"] for part in parts] != list(range(first["num_parts"])):
        raise UserError(
            f"source {source.name!r}: {len(parts)} files of a token cache that has {first['num_parts']}; name its "
            "folder, or write it again"
        )
    sizes = [num_bytes for part in parts for num_bytes in part["chunk_bytes"]]
    chunks = tuple(replace(chunk, num_bytes=size) for chunk, size in zip(source.chunks, sizes, strict=True))
    files = tuple(FileFacts(**file) for file in first["files"])
    facts = {name: first[name] for name in ("fingerprint", "can_be_cut", "tokenizer")}
    return replace(source, chunks=chunks, files=files, **facts)


def _fingerprint(text_column: str, files: tuple[FileFacts, ...]) -> str:
    facts = [(Path(file.path).name, file.num_bytes, file.content) for file in files]
    return hashlib.sha256(json.dumps([text_column, facts]).encode()).hexdigest()[:16]


def _index_one(path: str, text_column: str) -> tuple[FileFacts, FileIndex]:
    try:
        return with_retries(lambda: _cached_index(path, text_column), path)
    except UserError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(
            f"{path}: cannot be opened ({first_line(error)}); replace the file, or leave it out of `source`"
        ) from error


def _cached_index(path: str, text_column: str) -> tuple[FileFacts, FileIndex]:
    """The file's index, from the cache if there is one of this version of the file.

    Local parquet is not cached, since its footer is as fast to read, nor files whose server sends no version.
    """
    facts, kind = facts_of(path), format_of(path)
    if (kind == "parquet" and not is_remote(path)) or not facts.modified:
        return facts, _index(path, kind, text_column, facts)
    key = hashlib.sha256(json.dumps([INDEX_VERSION, asdict(facts), text_column]).encode()).hexdigest()[:24]
    cache = default_cache_dir() / "index" / f"{key}.json"
    try:
        chunks, *rest = json.loads(cache.read_text(encoding="utf-8"))
        return facts, FileIndex([Chunk(path, *chunk) for chunk in chunks], *rest)
    except (OSError, ValueError, TypeError):
        index = _index(path, kind, text_column, facts)
    if any(chunk.path != path for chunk in index.chunks):
        return facts, index
    with suppress(OSError):  # without a cache, the next start indexes again
        chunks = [(chunk.position, chunk.num_documents, chunk.num_bytes) for chunk in index.chunks]
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_name(f"{cache.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps([chunks, *index[1:]]), encoding="utf-8")
        partial.replace(cache)
    return facts, index


def _index(path: str, kind: str, text_column: str, facts: FileFacts) -> FileIndex:
    try:
        if kind in INDEX:
            return INDEX[kind](path, text_column)
    except NotPlain:
        pass
    return convert(path, kind, text_column, facts)
