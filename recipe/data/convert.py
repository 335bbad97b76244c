"""Files that cannot be read in parts -> parquet in the cache, once.

These are compressed files, JSON arrays and objects over several lines, CSV, UTF-16, and lines that end with CR.
"""

import csv
import hashlib
import io
import json
import logging
import lzma
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from recipe.data import sniff
from recipe.data.columns import NoKey, no_column
from recipe.data.docstrings import default_cache_dir
from recipe.data.files import FileFacts, first_line, is_remote, open_file
from recipe.data.formats import (
    BAD,
    READ_BYTES,
    Content,
    FileIndex,
    TokenIds,
    content_in,
    index_parquet,
    text_documents,
    without_mark,
)
from recipe.errors import DataError, UserError, is_disk_error
from recipe.redact import redact

logger = logging.getLogger(__name__)
VERSION = 1  # increase it when the result would differ
CONTENT = b"recipe_content"  # metadata: hash of the documents
GROUP_DOCUMENTS, GROUP_BYTES = 1000, 1 << 20
ANNOUNCED_BYTES = 1 << 26
OTHERS = 1000  # documents that are looked at for an error message
UNDECODED = "surrogateescape"  # the document with such a byte is bad, not the file
csv.field_size_limit(sys.maxsize)


def convert(path: str, kind: str, column: str, facts: FileFacts, skips: bool = False) -> FileIndex:
    """The index of a parquet file with the documents of `path`, which is written unless the cache has it.

    Any number of processes may call it at the same time. Raises `UserError` or `DataError` for content that is no
    `kind` ("jsonl", "text" or "csv"), and for a document that cannot be read; with `skips` that one is empty in the
    copy, with the reason beside it.
    """
    key = hashlib.sha256(json.dumps([VERSION, asdict(facts), kind, column]).encode()).hexdigest()[:24]
    target = default_cache_dir() / "converted" / key / f"{_file_name(path)}.parquet"
    if not target.exists() or not facts.modified:  # the server names no version: it may be another file by now
        if facts.num_bytes > ANNOUNCED_BYTES:
            logger.info("%s: reading it once into %s (%.0f MB)", path, target.parent, facts.num_bytes / 1e6)
        _write(path, kind, column, target, skips)
    content = pq.read_metadata(target).metadata[CONTENT].decode()
    return FileIndex(index_parquet(str(target), column).chunks, content)


def _file_name(path: str) -> str:
    """Without the query and the fragment of a URL, which may hold credentials."""
    return Path(re.split("[?#]", redact(path))[0] if is_remote(path) else path).name


def _write(path: str, kind: str, column: str, target: Path, skips: bool) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _no_room(path, target, error) from error
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    digest, writer = hashlib.blake2b(digest_size=8), None
    try:
        for group in _groups(_read(path, kind, column, skips)):
            bad = pa.array([redact(str(each)) if isinstance(each, Exception) else None for each in group], pa.string())
            values = pa.array([each.ids if isinstance(each, TokenIds) else _text_of(each) for each in group])
            if writer is None:
                values = values.cast(pa.string()) if pa.types.is_null(values.type) else values
                schema = pa.schema([(column, values.type), (BAD, bad.type)])
                writer = pq.ParquetWriter(partial, schema, compression="zstd", use_dictionary=False)
            writer.write_table(pa.table([values.cast(writer.schema.field(0).type), bad], schema=writer.schema))
            for text in group:
                data = text.ids.tobytes() if isinstance(text, TokenIds) else (_text_of(text) or "").encode()
                digest.update(b"%d:" % len(data) + data)
        if writer is None:
            writer = pq.ParquetWriter(partial, pa.schema([(column, pa.string())]))
        writer.add_key_value_metadata({CONTENT.decode(): digest.hexdigest()})
        writer.close()
        partial.replace(target)
    except UserError:
        raise
    except (ValueError, TypeError, pa.ArrowException, csv.Error, EOFError, lzma.LZMAError) as error:
        raise DataError(
            f"{path}: cannot be read ({first_line(error)}); replace the file, or leave it out of `source`"
        ) from error
    except OSError as error:
        if is_disk_error(error):
            raise _no_room(path, target, error) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def _no_room(path: str, target: Path, error: OSError) -> DataError:
    """Of the cache's disk, which must not look like a failure of the file or of the network."""
    return DataError(
        f"{path}: its copy cannot be written into {target.parent} ({first_line(error)}); set RECIPE_CACHE to a folder "
        "on another disk"
    )


def _text_of(document: str | Exception) -> str | None:
    return None if isinstance(document, Exception) else document


def _groups(documents: Iterator[Content | Exception]) -> Iterator[list[Content | Exception]]:
    group, size = [], 0
    for document in documents:
        group.append(document)
        size += 0 if isinstance(document, Exception) else len(document)
        if len(group) == GROUP_DOCUMENTS or size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _read(path: str, kind: str, column: str, skips: bool) -> Iterator[Content | Exception]:
    """The documents; with `skips`, the error in place of one that cannot be read."""
    with _open_text(path, newline="" if kind == "csv" else None) as text:
        found = (
            _pieces(text) if kind == "text" else (_csv_fields if kind == "csv" else _json_values)(text, path, column)
        )
        first = None
        for number, value in enumerate(found):
            first = value if number == 0 else first
            try:
                yield _content_of(value, column, f"{path}: document {number}")
            except (DataError, UserError) as error:
                if skips:
                    yield error
                elif isinstance(error, NoKey):
                    raise error.with_fix([first, *islice(found, OTHERS)]) from error
                else:
                    raise


def _content_of(value: Any, column: str, here: str) -> Content:
    if isinstance(value, Exception):
        raise DataError(f"{here} is not JSON ({first_line(value)}); fix or remove that line") from value
    content = content_in(value, column, here)
    try:
        if isinstance(content, str):
            content.encode()
        return content
    except UnicodeEncodeError as error:  # a byte that was not decoded, or half of an escaped surrogate pair
        raise DataError(
            f"{here} is no text: {error.reason} at its character {error.start}; fix or remove it"
        ) from error


def _pieces(text: TextIO) -> Iterator[str]:
    for piece in text_documents(line.encode(errors=UNDECODED) for line in text):
        yield without_mark(piece.decode(errors=UNDECODED)).strip("\n")


@contextmanager
def _open_text(path: str, newline: str | None) -> Iterator[TextIO]:
    """The file as text: unpacked if it is compressed, decoded from UTF-8, UTF-16 or UTF-32."""
    with open_file(path) as file:
        raw = io.BufferedReader(file, READ_BYTES)
        compression = sniff.compression_of(raw.peek())
        if compression == "xz":
            raw = io.BufferedReader(lzma.LZMAFile(raw), READ_BYTES)  # noqa: SIM115
        elif compression:
            raw = io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, "r"), compression), READ_BYTES)
        head = raw.peek()[: sniff.HEAD_BYTES]
        sniff.refuse_binary(head, path)
        yield io.TextIOWrapper(raw, sniff.encoding_of(head), UNDECODED, newline)


def _csv_fields(text: TextIO, path: str, column: str) -> Iterator[str]:
    first = text.readline()
    delimiters = [mark for mark in ",\t;|" if column in next(csv.reader([first], delimiter=mark), [])]
    delimiter = delimiters[0] if delimiters else max(",\t;|", key=first.count)
    names = next(csv.reader([first], delimiter=delimiter), [])
    rows = csv.reader(text, delimiter=delimiter)
    if column not in names:
        sample = next(rows, [])
        texts = sorted(zip(sample, names, strict=False), key=lambda pair: -len(pair[0]))
        raise no_column(f"{path}: the first line names no column", column, names, [name for _, name in texts])
    place = names.index(column)
    yield from (row[place] if place < len(row) else "" for row in rows if row)


def _json_values(text: TextIO, path: str, column: str) -> Iterator[Any]:
    """The lines' values, or why a line has none; or the items of an array; or objects one after the other, over any
    number of lines."""
    start = text.readline()
    while start and not start.strip():
        start = text.readline()
    place = 0
    try:
        if sniff.holds_json_lines(start):
            yield from (_value_of(line) for line in chain([start], text) if line.strip())
            return
        whole, decoder = (start + text.read()).strip(), json.JSONDecoder()
        while place < len(whole):
            value, place = decoder.raw_decode(whole, place)
            yield from value if isinstance(value, list) else [value]
            while place < len(whole) and (whole[place].isspace() or whole[place] == ","):
                place += 1
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path}: is not JSON ({first_line(error)}); fix or remove that line") from error


def _value_of(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return error
