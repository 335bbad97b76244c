"""Arrow files, as `save_to_disk` of `datasets` writes them: mapped into memory, and read by record batches."""

import hashlib
from functools import lru_cache

import pyarrow as pa

from recipe.data.files import is_remote, open_file
from recipe.data.formats import Chunk, Content, FileIndex, OnBad, check_column, contents_of, refuse
from recipe.errors import UserError


def index_arrow(path: str, column: str) -> FileIndex:
    """A chunk for each record batch, and the hash of the file."""
    if is_remote(path):
        raise UserError(f"{path}: arrow files are mapped into memory, so they must be on a local disk; download it")
    _open_arrow.cache_clear()  # the file may have changed since
    table = _open_arrow(path)
    check_column(path, table.schema, column)
    with open_file(path) as file:
        content = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()
    batches = table.column(column).chunks
    return FileIndex([Chunk(path, i, len(batch), batch.nbytes) for i, batch in enumerate(batches)], content)


@lru_cache(maxsize=64)
def _open_arrow(path: str) -> pa.Table:
    source = pa.memory_map(path.removeprefix("file://"))
    try:
        return pa.ipc.open_stream(source).read_all()
    except pa.ArrowInvalid:  # the file format, as Feather has it
        return pa.ipc.open_file(source).read_all()


def read_arrow_chunk(chunk: Chunk, column: str, on_bad: OnBad = refuse) -> list[Content]:
    batch = _open_arrow(chunk.path).column(column).chunk(chunk.position)
    return contents_of(pa.table({column: batch}), chunk, column, on_bad)
