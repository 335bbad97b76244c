"""The token ids of a source, written once on request: parquet files that replace the text, in the same order."""

import json
import logging
import time
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from recipe.arguments import Config
from recipe.data.files import first_line
from recipe.data.formats import TEXT_DIGEST, TOKEN_CACHE, BadDocument, Chunk
from recipe.data.hold_out import digest_of
from recipe.data.packing import encode, hash_of_tokenizer, load_tokenizer
from recipe.data.source import Source, log_skipped, open_source
from recipe.errors import DataError, UserError
from recipe.plain_json import dumps

logger = logging.getLogger(__name__)
FILE_BYTES = 1 << 28  # of text in one file


def write_token_caches(config: Config, folder: Path) -> str | list[dict]:
    """Write the token ids of the config's sources; returns the `source` that replaces them in the config."""
    tokenizer, entries = load_tokenizer(config.model.tokenizer), config.data.sources
    folders = [folder] if len(entries) == 1 else [folder / f"source-{number}" for number in range(len(entries))]
    for entry, place in zip(entries, folders, strict=True):
        write_token_cache(open_source(entry.path, entry.text_column, config.data.on_bad_data), tokenizer, place)
    if isinstance(config.data.source, str):
        return str(folder)
    return [{**given, "path": str(place)} for given, place in zip(config.data.source, folders, strict=True)]


def write_token_cache(source: Source, tokenizer, folder: Path) -> int:
    """Write the token ids of every document, without EOS, into `folder/tokens-*.parquet`; returns their number.

    One row group per chunk of the source, in a column of the same name. A config whose `source` is the folder trains
    on the same rows, and can resume checkpoints of one that reads the text. Files completed by an interrupted call are
    kept. Raises `UserError` where the folder holds other files.
    """
    parts = _parts(source)
    wanted = [folder / f"tokens-{number:05}.parquet" for number in range(len(parts))]
    _make_folder(folder, wanted)
    start, total, done = time.perf_counter(), 0, 0
    for number, (path, chunks) in enumerate(zip(wanted, parts, strict=True)):
        about = {
            "tokenizer": hash_of_tokenizer(tokenizer),
            "fingerprint": source.fingerprint,
            "files": [asdict(file) for file in source.files],
            "can_be_cut": source.can_be_cut,
            "part": number,
            "num_parts": len(parts),
            "chunk_bytes": [chunk.num_bytes for chunk in chunks],
        }
        total += _count_tokens(path, about) if path.exists() else _write(source, chunks, tokenizer, path, about)
        done += sum(chunk.num_bytes for chunk in chunks)
        seconds = time.perf_counter() - start
        logger.info(
            f"{path}: {done / source.num_bytes:.0%} | {total / 1e6:,.1f}M tokens | {total / seconds:,.0f} tokens/s"
        )
    return total


def _make_folder(folder: Path, wanted: list[Path]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); name another folder") from error
    strangers = [path.name for path in folder.glob("*") if path not in wanted and path.suffix != ".partial"]
    if strangers:
        raise UserError(f"{folder} holds other files ({strangers[0]}); name an empty folder for the token cache")


def _parts(source: Source) -> list[list[Chunk]]:
    parts, size = [[]], 0
    for chunk in source.chunks:
        if size >= FILE_BYTES:
            parts, size = [*parts, []], 0
        parts[-1].append(chunk)
        size += chunk.num_bytes
    return parts


def _write(source: Source, chunks: list[Chunk], tokenizer, path: Path, about: dict) -> int:
    schema = pa.schema(
        [(source.text_column, pa.list_(pa.int32())), (TEXT_DIGEST, pa.binary())],
        metadata={TOKEN_CACHE: dumps(about)},
    )
    partial, total = path.with_suffix(".partial"), 0
    try:
        with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
            for chunk in chunks:
                contents = source.read_chunk(chunk)
                for bad in (content for content in contents if isinstance(content, BadDocument)):
                    log_skipped(bad.reason)
                ids = encode(contents, tokenizer)
                total += sum(map(len, ids))
                table = pa.table([ids, list(map(digest_of, contents))], schema=schema)
                writer.write_table(table, row_group_size=max(1, len(ids)))
        partial.replace(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be written ({error})") from error
    return total


def _count_tokens(path: Path, about: dict) -> int:
    """The tokens of a file written before. Raises `UserError` where its source or tokenizer differ."""
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read ({first_line(error)}); remove it to write it again") from error
    found = json.loads((table.schema.metadata or {}).get(TOKEN_CACHE.encode(), "{}"))
    if {**found, "files": []} != {**about, "files": []}:  # dates may differ; the fingerprint covers the content
        raise UserError(f"{path} was made of another source or with another tokenizer; name an empty folder")
    return len(table.column(0).combine_chunks().flatten())
