"""The file formats that can be read in parts: index the chunks of a file, from its metadata or by reading it once, and
read one chunk.

A document's content is text, or token ids (int32 `[tokens]`) where the column holds lists of integers.
"""

import contextlib
import hashlib
import io
import json
import os
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recipe.data import sniff
from recipe.data.columns import NoKey, no_column
from recipe.data.files import first_line, is_remote, open_file, size_of
from recipe.errors import DataError, UserError

# jsonl and text have no row groups; they are cut into 128 pieces, within these lengths.
MIN_TEXT_CHUNK_BYTES, MAX_TEXT_CHUNK_BYTES = 1 << 12, 1 << 18
TEXT_DOCUMENT_BYTES = 1 << 15
FOOTER_BYTES = 1 << 16
READ_BYTES = 1 << 20
INT32 = np.iinfo(np.int32)
END_OF_TEXT = b"<|endoftext|>"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# A token cache also has metadata in each file, and a column with the hash of each text.
TOKEN_CACHE, TEXT_DIGEST = "recipe_token_cache", "recipe_text_digest"
BAD = "recipe_bad"  # a column of a converted file: why a document could not be read


@dataclass(frozen=True, slots=True)
class TokenIds:
    """A document as token ids, int32 `[tokens]`, with the hash of its text where it is known."""

    ids: np.ndarray
    text_digest: bytes = b""

    def __len__(self) -> int:
        return len(self.ids)


Content = str | TokenIds


class BadDocument(str):
    """Stands for a document that cannot be read and is skipped: an empty text with the reason beside it."""

    reason = ""


def refuse(error: Exception) -> Content:
    raise error


# What stands for a document that cannot be read, given the reason; or it raises the reason.
OnBad = Callable[[DataError | UserError], Content]


@dataclass(frozen=True)
class Chunk:
    """Consecutive documents that are read together: `[first_document, first_document + num_documents)`.

    `position` is the row group of a parquet file, the byte offset of other files; `first_row` counts rows inside the
    row group (0 unless a row group was cut, see `cut_chunks`). `num_bytes` is the size of the text before compression.
    """

    path: str
    position: int
    num_documents: int
    num_bytes: int
    first_document: int = 0
    first_row: int = 0

    @property
    def stop_document(self) -> int:
        return self.first_document + self.num_documents


class FileIndex(NamedTuple):
    """What is known about a file before it is read: its chunks, the hash of its content, and, where it is part of a
    token cache, that cache's metadata."""

    chunks: list[Chunk]
    content: str
    token_cache: str | None = None


# --- parquet


def index_parquet(path: str, column: str) -> FileIndex:
    """A chunk for each row group, and the hash of the footer. Reads only the footer."""
    footer = _read_footer(path)
    metadata = pq.read_metadata(io.BytesIO(footer))
    schema = metadata.schema.to_arrow_schema()
    check_column(path, schema, column)
    leaves = range(metadata.num_columns)
    leaf = next(i for i in leaves if f"{metadata.schema.column(i).path}.".startswith(f"{column}."))
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    sizes = [group.column(leaf).total_uncompressed_size for group in groups]
    chunks = [Chunk(path, i, group.num_rows, size) for i, (group, size) in enumerate(zip(groups, sizes, strict=True))]
    about = (metadata.metadata or {}).get(TOKEN_CACHE.encode())
    return FileIndex(chunks, hashlib.blake2b(footer, digest_size=8).hexdigest(), about.decode() if about else None)


def check_column(path: str, schema: pa.Schema, column: str) -> None:
    """Raise `UserError` unless the column exists and holds text or token ids."""
    usable = [field.name for field in schema if _is_text(field.type) or _is_token_ids(field.type)]
    if column not in schema.names:
        raise no_column(f"{path}: no column", column, schema.names, usable)
    if schema.names.count(column) > 1:
        raise UserError(f"{path}: two columns named {column!r}; rename one")
    if column not in usable:
        raise UserError(
            f"{path}: column {column!r} holds {schema.field(column).type}, neither text nor lists of token ids"
        )


def _read_footer(path: str) -> bytes:
    """The end of a parquet file, with the whole footer in it: one read, or two where the footer is long."""
    with open_file(path) as file:
        size = size_of(file)
        length = min(size, FOOTER_BYTES)
        while True:
            file.seek(size - length)
            tail = file.read(length)
            needed = int.from_bytes(tail[-8:-4], "little") + 8
            if needed <= length or needed > size:  # the latter is not parquet; pyarrow will report it
                return tail[-needed:] if needed <= length else tail
            length = needed


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_token_ids(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return is_list and pa.types.is_integer(kind.value_type)


def open_parquet(path: str) -> pq.ParquetFile:
    return _open_parquet(path, os.getpid())


def close_parquet() -> None:
    """Forget the open files, which are unusable after a broken connection."""
    _open_parquet.cache_clear()


@lru_cache(maxsize=64)
def _open_parquet(path: str, process_id: int) -> pq.ParquetFile:
    # One handle per process: a worker must not share a position or a connection with the process it was forked from.
    # No pre-buffering and no pyarrow threads: they outlive the read and abort the interpreter at exit.
    file = open_file(path) if is_remote(path) else path.removeprefix("file://")
    return pq.ParquetFile(file, pre_buffer=False, page_checksum_verification=True)


def read_parquet_chunk(chunk: Chunk, column: str, on_bad: OnBad = refuse) -> list[Content]:
    """The chunk's documents in file order; null rows are empty."""
    file = open_parquet(chunk.path)
    columns = [name for name in (column, TEXT_DIGEST, BAD) if name in file.schema_arrow.names]
    table = file.read_row_group(chunk.position, columns=columns, use_threads=False)
    contents = contents_of(table, chunk, column, on_bad)
    if BAD not in columns:
        return contents
    reasons = table.column(BAD).slice(chunk.first_row, chunk.num_documents).to_pylist()
    pairs = zip(contents, reasons, strict=True)
    return [content if reason is None else on_bad(DataError(reason)) for content, reason in pairs]


def contents_of(table: pa.Table, chunk: Chunk, column: str, on_bad: OnBad) -> list[Content]:
    table = table.slice(chunk.first_row, chunk.num_documents).combine_chunks()
    values = table.column(column).combine_chunks()
    if _is_token_ids(values.type):
        known = TEXT_DIGEST in table.column_names
        digests = table.column(TEXT_DIGEST).to_pylist() if known else [b""] * len(values)
        try:
            return [TokenIds(*pair) for pair in zip(_lists_of(values, "", 0), digests, strict=True)]
        except DataError:  # some document; find which
            first = chunk.first_document

            def read(digest: bytes, row: int) -> TokenIds:
                return TokenIds(*_lists_of(values.slice(row, 1), chunk.path, first + row), digest)

            return _one_by_one(digests, read, on_bad)
    try:
        return [text or "" for text in values.to_pylist()]
    except UnicodeDecodeError:
        pieces = values.cast(pa.binary()).to_pylist()
        return _one_by_one(pieces, lambda text, i: _decode(text, chunk, i), on_bad)


def _one_by_one(items: Iterable, read: Callable[..., Content], on_bad: OnBad) -> list[Content]:
    """`read(item, row)` of each item, or what stands for a document that cannot be read."""
    documents: list[Content] = []
    for row, item in enumerate(items):
        try:
            documents.append(read(item, row))
        except (DataError, UserError) as error:
            documents.append(on_bad(error))
    return documents


def _lists_of(values: pa.Array, path: str, document: int) -> list[np.ndarray]:
    flat = values.flatten()  # without null lists
    if flat.null_count:
        raise DataError(f"{path}: document {document} has a null among its token ids; remove it")
    ids = _as_int32(flat.to_numpy(zero_copy_only=False), f"{path}: document {document}")
    lengths = values.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    return np.split(ids, np.cumsum(lengths)[:-1])


def _as_int32(ids: np.ndarray, where: str) -> np.ndarray:
    if len(ids) and not INT32.min <= ids.min() <= ids.max() <= INT32.max:
        raise DataError(f"{where}: token ids from {ids.min()} to {ids.max()} are invalid; fix or remove them")
    return ids.astype(np.int32)


def _decode(text: bytes | None, chunk: Chunk, row: int) -> str:
    try:
        return (text or b"").decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{chunk.path}: document {chunk.first_document + row} is not UTF-8 ({error.reason} at its byte "
            f"{error.start}); fix or remove it" + _as_utf8(chunk.path)
        ) from error


def _as_utf8(path: str) -> str:
    """How to convert a text file from the most frequent other encoding."""
    if is_remote(path) or path.endswith((".parquet", ".arrow")):
        return ""
    target = shlex.quote(str(Path(path).with_suffix(f".utf8{Path(path).suffix}")))
    return f"; if the whole file is Windows-1252: iconv -f WINDOWS-1252 -t UTF-8 {shlex.quote(path)} > {target}"


# --- jsonl and text


def index_jsonl(path: str, column: str) -> FileIndex:
    """Chunks of whole lines, and the hash of the file. Reads it once, without parsing it."""
    with open_file(path) as file:
        size, lines = size_of(file), _plain(file, "jsonl", path)
        return _cut(path, size, ((line, 1 if line.strip() else 0) for line in lines))


def index_text(path: str, column: str) -> FileIndex:
    """Chunks of whole documents, and the hash of the file. Reads it once."""
    with open_file(path) as file:
        size, pieces = size_of(file), text_documents(_plain(file, "text", path))
        return _cut(path, size, ((piece, 1) for piece in pieces))


def _plain(file, kind: str, path: str) -> io.BufferedReader:
    """The file, buffered: reading it by lines would send a request per line. Raises `NotPlain`."""
    lines = io.BufferedReader(file, READ_BYTES)
    head = lines.peek()[: sniff.HEAD_BYTES]
    if not sniff.is_plain(head, kind):
        raise sniff.NotPlain
    sniff.refuse_binary(head, path)
    return lines


def _cut(path: str, file_size: int, pieces: Iterator[tuple[bytes, int]]) -> FileIndex:
    """`pieces` are the file's bytes in order, each with the number of documents in it."""
    limit = min(max(file_size // 128, MIN_TEXT_CHUNK_BYTES), MAX_TEXT_CHUNK_BYTES)
    chunks, start, size, count, digest = [], 0, 0, 0, hashlib.blake2b(digest_size=8)
    for piece, documents in pieces:
        digest.update(piece)
        size += len(piece)
        count += documents
        if size >= limit:
            chunks.append(Chunk(path, start, count, size))
            start, size, count = start + size, 0, 0
    return FileIndex([*chunks, Chunk(path, start, count, size)], digest.hexdigest())


def _read_bytes(chunk: Chunk) -> bytes:
    with open_file(chunk.path) as file:
        file.seek(chunk.position)
        found = file.read(chunk.num_bytes)
    if len(found) != chunk.num_bytes:  # a connection that broke off, or a server's error page
        raise ConnectionError(f"{len(found):,} bytes came of {chunk.num_bytes:,}")
    return found.removeprefix(b"" if chunk.position else BYTE_ORDER_MARK)


def read_jsonl_chunk(chunk: Chunk, column: str, on_bad: OnBad = refuse) -> list[Content]:
    lines = (line for line in io.BytesIO(_read_bytes(chunk)) if line.strip())
    try:
        return _one_by_one(lines, lambda line, i: _content_of(line, chunk, i, column), on_bad)
    except NoKey as error:
        raise error.with_fix(_first_values(chunk.path)) from error


def _first_values(path: str) -> Iterator[object]:
    """Of the lines of a file's first megabyte, for an error message."""
    with open_file(path) as file:
        whole, _, _ = file.read(READ_BYTES).rpartition(b"\n")
    for line in whole.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            yield json.loads(line)


def _content_of(line: bytes, chunk: Chunk, row: int, column: str) -> Content:
    here = f"{chunk.path}: document {chunk.first_document + row}"
    try:
        values = json.loads(_decode(line, chunk, row))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{here}, line {_line_number(chunk, row)}, is not JSON ({first_line(error)}); fix or remove that line"
        ) from error
    content = content_in(values, column, here, lambda: f", line {_line_number(chunk, row)},")
    if rb"\u" in line:
        try:
            content.encode()
        except UnicodeEncodeError as error:  # half of an escaped surrogate pair, such as at the end of a cut text
            raise DataError(
                f"{here}, line {_line_number(chunk, row)}, is no text: {error.reason} at its character {error.start}; "
                "fix or remove that line"
            ) from error
    return content


def content_in(values: object, column: str, here: str, line: Callable[[], str] = str) -> Content:
    """The content in what a line or item of JSON holds. `here`, `line`: where it is, for error messages."""
    if isinstance(values, str):
        return values
    if not isinstance(values, dict) or column not in values:
        raise NoKey(f"{here}{line()}", column, values)
    content = "" if values[column] is None else values[column]
    if isinstance(content, list) and all(type(token) is int for token in content):
        return TokenIds(_as_int32(np.array(content, dtype=object), here))
    if not isinstance(content, str):
        raise UserError(f"{here}: {column!r} holds {type(content).__name__}, neither text nor a list of token ids")
    return content


def _line_number(chunk: Chunk, row: int) -> int:
    """From 1, as editors count. Reads the file from its start, so it is for error messages only."""
    with open_file(chunk.path) as file:
        before = file.read(chunk.position).count(b"\n")
        filled = [number for number, line in enumerate(file, start=before + 1) if line.strip()]
    return filled[row]


def text_documents(file) -> Iterator[bytes]:
    """Documents of a text file as raw bytes, including separators, so that their lengths add up to the file's.

    A line `<|endoftext|>` ends a document. Without one, a document ends at the first blank line after 32 KiB: a book
    becomes a few dozen documents, a short file one.
    """
    lines, size = [], 0
    for line in file:
        lines.append(line)
        size += len(line)
        blank = not line.strip()
        if line.strip() == END_OF_TEXT or (blank and size >= TEXT_DOCUMENT_BYTES):
            yield b"".join(lines)
            lines, size = [], 0
    if lines:
        yield b"".join(lines)


def read_text_chunk(chunk: Chunk, column: str, on_bad: OnBad = refuse) -> list[Content]:
    pieces = text_documents(io.BytesIO(_read_bytes(chunk)))
    return _one_by_one(pieces, lambda piece, i: without_mark(_decode(piece, chunk, i)).strip("\r\n"), on_bad)


def without_mark(text: str) -> str:
    body, mark = text.rstrip(), END_OF_TEXT.decode()
    return body.removesuffix(mark).rstrip() if body.endswith(mark) else text
