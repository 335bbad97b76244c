"""Text -> documents, each with its index: the embedded corpus, the hub, or files.

A `Source` is a plain value: a list of chunks and what is needed to read one. It holds no open file and no position,
so it can be sent to workers, and every iteration opens its files again.
"""

import hashlib
import itertools
import json
import logging
import os
import shlex
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import pyarrow as pa

from recipe.data import formats
from recipe.data.arrow import index_arrow, read_arrow_chunk
from recipe.data.convert import convert
from recipe.data.docstrings import build_docstring_corpus, corpus_info, default_cache_dir
from recipe.data.files import FileFacts, facts_of, find_files, first_line, fix_for, format_of, is_remote, with_retries
from recipe.data.formats import BadDocument, Chunk, Content, FileIndex, refuse
from recipe.data.sniff import NotPlain
from recipe.errors import DataError, UserError
from recipe.redact import redact

logger = logging.getLogger(__name__)
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
LOGGED = 20  # bad documents that a process logs one by one; later ones at each power of two

_num_bad, _logged = itertools.count(1), set()
# Of files that were touched or replaced: date and stamp, by the facts at the start of the run.
_other_dates: dict[FileFacts, set[tuple[str, str]]] = {}


@dataclass(frozen=True)
class Source:
    """Documents by index. `fingerprint` changes when the content of the files changes.

    `can_be_cut`: a chunk may be read in parts. `contents`: the documents of a small source, of which `num_divided`
    were in the files (see `fitting.py`). `tokenizer`: hash of the one that made the token ids, for a token
    cache of the recipe. `files` are those that identify the source, `opened` those that are read: a token cache, or
    the copy of a file that cannot be read in parts. `on_bad_data`: `stop` or `skip`.
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
    opened: tuple[FileFacts, ...] = ()
    on_bad_data: str = "stop"

    @property
    def num_documents(self) -> int:
        return self.chunks[-1].stop_document

    @property
    def num_bytes(self) -> int:
        return sum(chunk.num_bytes for chunk in self.chunks)

    def read_chunk(self, chunk: Chunk) -> list[Content]:
        """The chunk's documents in file order; null rows are empty strings, so that indices do not shift.

        Any failure of a network is retried for half a minute. Raises `DataError` where the chunk cannot be read, or
        the file has changed since it was opened. With `on_bad_data` "skip" a `BadDocument` stands for each document
        whose bytes came but cannot be decoded.
        """
        if self.contents:
            return list(self.contents[chunk.first_document : chunk.stop_document])
        skips = self.on_bad_data == "skip"

        def read() -> list[Content]:
            if format_of(chunk.path) == "arrow":  # to read on where a mapped file was cut would kill the process
                self._check_unchanged(chunk.path)
            try:
                documents = READ[format_of(chunk.path)](chunk, self.text_column, _skip if skips else refuse)
            except Exception:
                formats.close_parquet()
                if not is_remote(chunk.path):
                    self._check_unchanged(chunk.path)
                raise
            self._check_unchanged(chunk.path)
            return documents

        try:
            documents = with_retries(read, chunk.path, was_read=True)
        except (OSError, pa.ArrowException) as error:
            failure = DataError(
                f"{chunk.path}: cannot read documents {chunk.first_document} to {chunk.stop_document - 1} "
                f"({first_line(error)}); {fix_for(error, chunk.path)}"
            )
            if not (skips and self._is_corrupt(chunk.path, error)):
                raise failure from error
            return [_skip(failure)] * chunk.num_documents
        if len(documents) != chunk.num_documents:
            raise DataError(
                f"{chunk.path}: {len(documents)} documents where {chunk.num_documents} were counted at the start of "
                "the run; the file changed while it was read"
            )
        return documents

    @cached_property
    def _facts(self) -> dict[str, FileFacts]:
        return {facts.path: facts for facts in self.opened}

    def _is_corrupt(self, path: str, error: BaseException) -> bool:
        """Whether the bytes came but pyarrow cannot decode them, in a file whose footer is the one that was opened. A
        failing disk or network has an error number or a class of its own, or gives another footer or none."""
        error = error.__cause__ or error
        if not (isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None)):
            return False
        try:
            return self._content_of(path) == self._facts[path].content
        except Exception:
            return False

    def _content_of(self, path: str) -> str | None:
        try:
            return INDEX[format_of(path)](path, self.text_column).content
        except NotPlain:
            return None

    def _check_unchanged(self, path: str) -> None:
        """Raise `DataError` if the file is not the one that was opened. Another date alone costs a second look at what
        identifies its content."""
        then, now = self._facts[path], facts_of(path)
        dates = _other_dates.setdefault(then, {(then.modified, then.stamp)})
        if now.num_bytes == then.num_bytes and (now.modified, now.stamp) in dates:
            return
        if now.num_bytes != then.num_bytes or self._content_of(path) != then.content:
            raise DataError(
                f"{path}: the file changed while it was read ({then.num_bytes:,} bytes at the start of the run, now "
                f"{now.num_bytes:,}); restore it, or resume with --on_changed_stream continue or restart"
            )
        if now.modified not in [modified for modified, _ in dates]:
            logger.warning("%s has another date than at the start of the run, and the same content", path)
        dates.add((now.modified, now.stamp))


def _skip(error: Exception) -> BadDocument:
    document = BadDocument()
    document.reason = str(error)
    return document


def log_skipped(reason: str) -> None:
    """Of a document that was passed. One that was only read, ahead or for another purpose, is not logged, so that the
    lines are those that `bad_documents_skipped` counts."""
    number = next(_num_bad)
    if reason not in _logged and (number <= LOGGED or number & (number - 1) == 0):
        _logged.add(reason)
        logger.warning("skipped, as on_bad_data says: %s (skip %d of this process)", reason, number)


def open_source(source: str, text_column: str = "text", on_bad_data: str = "stop") -> Source:
    """Find the files behind `source` and count their documents, from metadata where the format has it.

    `source`: `docstrings`; `hf://owner/name[/config]`; or a path, glob or fsspec URL of files.
    Raises `UserError` for an invalid source, `DataError` for one that cannot be reached or read.
    """
    formats.close_parquet()
    if source == "docstrings":
        path = build_docstring_corpus()
        return replace(_index_files(source, [str(path)], "text"), fingerprint=corpus_info(path)["content_hash"])
    return _index_files(source, find_files(source), text_column, on_bad_data)


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


def _index_files(name: str, paths: list[str], text_column: str, on_bad_data: str = "stop") -> Source:
    _refuse_mixture(name, paths)
    with ThreadPoolExecutor(16) as pool:  # a remote dataset has many footers, each a short wait
        found = list(pool.map(lambda path: _index_one(path, text_column, on_bad_data == "skip"), paths))
    chunks, first = [], 0
    for chunk in (chunk for _, index in found for chunk in index.chunks if chunk.num_documents):
        chunks.append(replace(chunk, first_document=first))
        first += chunk.num_documents
    if not chunks:
        raise UserError(f"source {name!r}: {counted(len(paths), 'file')} without a single document")
    files = tuple(replace(facts, content=index.content) for facts, index in found)
    fingerprint = _fingerprint(text_column, files)
    can_be_cut = all(format_of(chunk.path) in ("parquet", "arrow") for chunk in chunks)
    opened = tuple(_opened(facts, index, text_column) for facts, index in found)
    source = Source(
        redact(name),
        text_column,
        tuple(chunks),
        files,
        fingerprint,
        can_be_cut,
        opened=opened,
        on_bad_data=on_bad_data,
    )
    return _as_the_text_was(source, [index.token_cache for _, index in found])


def _opened(facts: FileFacts, index: FileIndex, text_column: str) -> FileFacts:
    """The file that is read for `facts`: itself, or its copy."""
    path = index.chunks[0].path if index.chunks else facts.path
    if path == facts.path:
        return replace(facts, content=index.content)
    return replace(facts_of(path), content=formats.index_parquet(path, text_column).content)


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
    # A signed URL has another query each time.
    paths = [file.path.partition("?")[0] if is_remote(file.path) else file.path for file in files]
    facts = [(Path(path).name, file.num_bytes, file.content) for path, file in zip(paths, files, strict=True)]
    return hashlib.sha256(json.dumps([text_column, facts]).encode()).hexdigest()[:16]


def _index_one(path: str, text_column: str, skips: bool) -> tuple[FileFacts, FileIndex]:
    try:
        return with_retries(lambda: _cached_index(path, text_column, skips), path)
    except UserError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be opened ({first_line(error)}); {fix_for(error, path)}") from error


def _cached_index(path: str, text_column: str, skips: bool) -> tuple[FileFacts, FileIndex]:
    """The file's index, from the cache if there is one of this version of the file.

    Local parquet is not cached, since its footer is as fast to read, nor files whose server sends no version.
    """
    facts, kind = facts_of(path), format_of(path)
    if (kind == "parquet" and not is_remote(path)) or not facts.modified:
        return facts, _index(path, kind, text_column, facts, skips)
    key = hashlib.sha256(json.dumps([INDEX_VERSION, asdict(facts), text_column]).encode()).hexdigest()[:24]
    cache = default_cache_dir() / "index" / f"{key}.json"
    try:
        chunks, *rest = json.loads(cache.read_text(encoding="utf-8"))
        return facts, FileIndex([Chunk(path, *chunk) for chunk in chunks], *rest)
    except (OSError, ValueError, TypeError):
        index = _index(path, kind, text_column, facts, skips)
    if any(chunk.path != path for chunk in index.chunks):
        return facts, index
    with suppress(OSError):  # without a cache, the next start indexes again
        chunks = [(chunk.position, chunk.num_documents, chunk.num_bytes) for chunk in index.chunks]
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_name(f"{cache.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps([chunks, *index[1:]]), encoding="utf-8")
        partial.replace(cache)
    return facts, index


def _index(path: str, kind: str, text_column: str, facts: FileFacts, skips: bool) -> FileIndex:
    try:
        if kind in INDEX:
            return INDEX[kind](path, text_column)
    except NotPlain:
        pass
    return convert(path, kind, text_column, facts, skips)
