"""Text -> documents, each with its index: the embedded corpus, the hub, parquet, jsonl and text files.

A `Source` is a plain value: a list of chunks and what it takes to read one. It holds no open file and no position, so
it can be sent to workers, and every iteration opens its files afresh.
"""

import difflib
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from recipe.data.docstrings import build_docstring_corpus, corpus_info
from recipe.errors import DataError, UserError

FORMATS = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "text", ".md": "text"}
COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".zip", ".lz4")
# jsonl and text have no row groups of their own; they are cut into 128 pieces, within these lengths.
MIN_TEXT_CHUNK_BYTES, MAX_TEXT_CHUNK_BYTES = 1 << 12, 1 << 18
TEXT_DOCUMENT_BYTES = 1 << 15
END_OF_TEXT = b"<|endoftext|>"
HUB_OFFLINE_HINT = (
    "run on what needs no network, --source docstrings --eval_skip 5000 --eval_documents 100, or on your own files, "
    "--source 'data/*.parquet'"
)


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


@dataclass(frozen=True)
class Source:
    """Documents by index. `fingerprint` changes when files, their sizes or document counts do."""

    name: str
    format: str
    text_column: str
    chunks: tuple[Chunk, ...]
    fingerprint: str

    @property
    def num_documents(self) -> int:
        return self.chunks[-1].stop_document

    @property
    def num_bytes(self) -> int:
        return sum(chunk.num_bytes for chunk in self.chunks)

    def read_chunk(self, chunk: Chunk) -> list[str]:
        """The chunk's documents in file order; null rows are empty strings, so that indices stay."""
        read = {"parquet": _read_row_group, "jsonl": _read_jsonl_chunk, "text": _read_text_chunk}[self.format]
        try:
            documents = read(chunk, self.text_column)
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise DataError(
                f"{chunk.path}: cannot read documents {chunk.first_document} to {chunk.stop_document - 1} "
                f"({_first_line(error)}); replace the file, or leave it out of `source`"
            ) from error
        if len(documents) != chunk.num_documents:
            raise DataError(
                f"{chunk.path}: {len(documents)} documents where {chunk.num_documents} "
                "were counted at the start of the "
                "run; the file changed while it was read"
            )
        return documents


def open_source(source: str, text_column: str = "text") -> Source:
    """Find the files behind `source` and count their documents, from metadata where the format has it.

    `source`: `docstrings`; `hf://owner/name[/config]`; or a path, glob or fsspec URL of parquet, jsonl or text files.
    Raises `UserError` for a source that cannot be meant, `DataError` for one that cannot be reached or read.
    """
    if source == "docstrings":
        path = build_docstring_corpus()
        return _index_files(source, [str(path)], "text", fingerprint=corpus_info(path)["content_hash"])
    paths = _hub_files(source) if source.startswith("hf://") else _list_files(source)
    return _index_files(source, paths, text_column)


def cut_chunks(source: Source, at_least: int) -> Source:
    """Halve the largest chunks until there are `at_least` of them, or none has two documents.

    A file with few large row groups is then read more than once, a part each time: dear for huge files, right for
    small ones.
    """
    chunks = list(source.chunks)
    while len(chunks) < at_least and max(chunk.num_documents for chunk in chunks) > 1 and source.format == "parquet":
        chunks = [half for chunk in chunks for half in _halves(chunk)]
    return replace(source, chunks=tuple(chunks))


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


# --- which files


def _hub_files(source: str) -> list[str]:
    """The train split's files of a hub dataset, as URLs that fsspec opens by range requests."""
    import datasets

    owner, name, *config = [part for part in source.removeprefix("hf://").split("/") if part] + ["", ""][:2]
    config = "/".join(part for part in config if part) or None
    if not owner or not name:
        raise UserError(f"source {source!r}: a hub dataset is hf://OWNER/NAME or hf://OWNER/NAME/CONFIG")
    try:
        builder = datasets.load_dataset_builder(f"{owner}/{name}", config)
        files = builder.config.data_files["train"]
    except ValueError as error:  # an unknown config: datasets lists those that exist
        raise UserError(f"source {source!r}: {_first_line(error)}") from error
    except KeyError as error:
        raise UserError(f"source {source!r}: the dataset has no split named train") from error
    except Exception as error:  # the hub client raises a different class for each way a network can fail
        raise DataError(
            f"source {source!r}: the Hugging Face hub cannot be reached "
            f"({type(error).__name__}: {_first_line(error)}); "
            f"{HUB_OFFLINE_HINT}"
        ) from error
    return [str(file) for file in files]


def _list_files(source: str) -> list[str]:
    try:
        filesystem, path = fsspec.core.url_to_fs(source)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"source {source!r}: {_first_line(error)}; a source is docstrings, "
            "hf://OWNER/NAME, or files: data/*.parquet"
        ) from error
    try:
        if filesystem.isdir(path):
            found = [file for file in filesystem.find(path) if Path(file).suffix in FORMATS]
        elif any(mark in path for mark in "*?["):
            found = [file for file in filesystem.glob(path) if filesystem.isfile(file)]
        else:
            found = [path] if filesystem.exists(path) else []
    except OSError as error:
        raise DataError(f"source {source!r}: cannot be listed ({_first_line(error)}); {HUB_OFFLINE_HINT}") from error
    if not found:
        raise UserError(
            f"source {source!r}: no such file{_nearby(source)}; a source is docstrings, hf://OWNER/NAME, or a path, "
            "glob or URL of .parquet, .jsonl or .txt files"
        )
    return [filesystem.unstrip_protocol(file) if "://" in source else file for file in sorted(found)]


def _nearby(source: str) -> str:
    folder = Path(source).parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(Path(source).name, [*names, "docstrings"], n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _format_of(path: str) -> str:
    suffix = Path(path).suffix.lower()
    if suffix in COMPRESSED:
        raise UserError(
            f"{path}: a compressed file cannot be sought, so no run could resume in "
            "it; unpack it, or convert it to parquet "
            "(which compresses inside)"
        )
    if suffix not in FORMATS:
        raise UserError(f"{path}: unknown format {suffix or '(no suffix)'!r}; known: {', '.join(FORMATS)}")
    return FORMATS[suffix]


# --- how many documents, and where


def _index_files(name: str, paths: list[str], text_column: str, fingerprint: str | None = None) -> Source:
    formats = {_format_of(path) for path in paths}
    if len(formats) > 1:
        raise UserError(
            f"source {name!r}: mixes {' and '.join(sorted(formats))} files; give a glob "
            f"of one kind, such as '{name}/*.parquet'"
        )
    file_format = formats.pop()
    index = {"parquet": _index_parquet, "jsonl": _index_jsonl, "text": _index_text}[file_format]
    with ThreadPoolExecutor(16) as pool:  # footers of a remote dataset are many small waits
        found = list(pool.map(lambda path: _index_one(index, path, text_column), paths))
    chunks, first = [], 0
    for chunk in (chunk for file_chunks in found for chunk in file_chunks if chunk.num_documents):
        chunks.append(replace(chunk, first_document=first))
        first += chunk.num_documents
    if not chunks:
        raise UserError(f"source {name!r}: {len(paths)} files without a single document")
    if fingerprint is None:
        facts = [(Path(chunk.path).name, chunk.position, chunk.num_documents, chunk.num_bytes) for chunk in chunks]
        fingerprint = hashlib.sha256(json.dumps([text_column, facts]).encode()).hexdigest()[:16]
    return Source(name, file_format, text_column, tuple(chunks), fingerprint)


def _index_one(index, path: str, text_column: str) -> list[Chunk]:
    try:
        return index(path, text_column)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{path}: cannot be opened ({_first_line(error)}); replace the file, or leave it out of `source`"
        ) from error


def _index_parquet(path: str, text_column: str) -> list[Chunk]:
    with _open(path) as file:
        metadata = pq.read_metadata(file)
    schema = metadata.schema.to_arrow_schema()
    if text_column not in schema.names:
        near = difflib.get_close_matches(text_column, schema.names, n=1) or [
            name for name in schema.names if name in ("text", "content")
        ]
        hint = f"; did you mean --text_column {near[0]}?" if near else ""
        raise UserError(f"{path}: no column {text_column!r}; it has {', '.join(schema.names)}{hint}")
    if not (
        pa.types.is_string(schema.field(text_column).type) or pa.types.is_large_string(schema.field(text_column).type)
    ):
        raise UserError(f"{path}: column {text_column!r} holds {schema.field(text_column).type}, not text")
    column = schema.names.index(text_column) if len(schema.names) == metadata.num_columns else None
    chunks = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        size = group.total_byte_size if column is None else group.column(column).total_uncompressed_size
        chunks.append(Chunk(path, number, group.num_rows, size))
    return chunks


def _index_jsonl(path: str, text_column: str) -> list[Chunk]:
    chunks, start, size, count = [], 0, 0, 0
    with _open(path) as file:
        limit = min(max(_size(file) // 128, MIN_TEXT_CHUNK_BYTES), MAX_TEXT_CHUNK_BYTES)
        for line in file:
            size += len(line)
            count += bool(line.strip())
            if size >= limit:
                chunks.append(Chunk(path, start, count, size))
                start, size, count = start + size, 0, 0
    return [*chunks, Chunk(path, start, count, size)]


def _index_text(path: str, text_column: str) -> list[Chunk]:
    chunks, start, size, count = [], 0, 0, 0
    with _open(path) as file:
        limit = min(max(_size(file) // 128, MIN_TEXT_CHUNK_BYTES), MAX_TEXT_CHUNK_BYTES)
        for piece in _text_documents(file):
            size += len(piece)
            count += 1
            if size >= limit:
                chunks.append(Chunk(path, start, count, size))
                start, size, count = start + size, 0, 0
    return [*chunks, Chunk(path, start, count, size)]


# --- reading one chunk


def _open(path: str):
    return fsspec.open(path, "rb").open()


def _size(file) -> int:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return size


@lru_cache(maxsize=64)
def _parquet_file(path: str, process_id: int) -> pq.ParquetFile:
    # One handle for each process: a worker must not share a position or a connection with the process it was forked
    # from. No pre-buffering and no threads of pyarrow's own: they outlive the read and abort the interpreter at exit.
    return pq.ParquetFile(path if "://" not in path else _open(path), pre_buffer=False)


def _read_row_group(chunk: Chunk, text_column: str) -> list[str]:
    table = _parquet_file(chunk.path, os.getpid()).read_row_group(
        chunk.position, columns=[text_column], use_threads=False
    )
    column = table.column(text_column).slice(chunk.first_row, chunk.num_documents)
    return [text or "" for text in column.to_pylist()]


def _read_bytes(chunk: Chunk) -> bytes:
    with _open(chunk.path) as file:
        file.seek(chunk.position)
        return file.read(chunk.num_bytes)


def _read_jsonl_chunk(chunk: Chunk, text_column: str) -> list[str]:
    lines = [line for line in _read_bytes(chunk).split(b"\n") if line.strip()]
    return [_text_of(line, chunk.path, chunk.first_document + i, text_column) for i, line in enumerate(lines)]


def _text_of(line: bytes, path: str, document: int, text_column: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(
            f"{path}: document {document} is not JSON ({_first_line(error)}); mend or remove that line"
        ) from error
    if not isinstance(row, dict) or text_column not in row:
        names = list(row) if isinstance(row, dict) else []
        near = difflib.get_close_matches(text_column, names, n=1) or names[:1]
        raise UserError(
            f"{path}: document {document} has no key {text_column!r}"
            + (f"; did you mean --text_column {near[0]}?" if near else "")
        )
    if not isinstance(row[text_column] or "", str):
        raise UserError(
            f"{path}: document {document}: {text_column!r} holds {type(row[text_column]).__name__}, not text"
        )
    return row[text_column] or ""


def _text_documents(file) -> Iterator[bytes]:
    """Documents of a text file as raw bytes, separators included, so that their lengths add up to the file's.

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


def _read_text_chunk(chunk: Chunk, text_column: str) -> list[str]:
    pieces = _text_documents(io.BytesIO(_read_bytes(chunk)))
    return [re.sub(r"\s*<\|endoftext\|>\s*$", "", piece.decode("utf-8")).strip("\r\n") for piece in pieces]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
