"""Which files are behind a `source`, and how they are opened: local, fsspec URL, or hub dataset."""

import difflib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import aiohttp
import fsspec

from recipe.errors import DataError, UserError

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

FORMATS = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "text", ".md": "text"}
COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".zip", ".lz4")
HUB_OFFLINE_HINT = (
    "train on data that needs no network, --source docstrings --eval_skip 5000 --eval_documents 100, or on your own "
    "files, --source 'data/*.parquet'"
)
RETRY_SECONDS = (1, 2, 4, 8, 16)
STALL_SECONDS = 60  # an HTTP connection that is silent for so long has failed; aiohttp would wait for 300 s


@dataclass(frozen=True)
class FileFacts:
    """Identifies a version of a file: size in bytes, ETag or modification time, hash of the content.

    `content` hashes the footer of a parquet file, which has size, offset and statistics of each column chunk, and all
    bytes of other files. If only `modified` differs, the file was copied or touched.
    """

    path: str
    num_bytes: int
    modified: str
    content: str = ""


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def find_files(source: str) -> list[str]:
    """Paths or URLs behind `source`, in the order of their documents. Raises `UserError` where there are none."""
    return _hub_files(source) if source.startswith("hf://") else _list_files(source)


def format_of(path: str) -> str:
    suffix = _suffix_of(path)
    if suffix in COMPRESSED:
        raise UserError(
            f"{path}: cannot seek in a compressed file, so no run could resume in it; unpack it, or convert it to "
            "parquet, which compresses inside"
        )
    if suffix not in FORMATS:
        raise UserError(f"{path}: unknown format {suffix or '(no suffix)'!r}; known: {', '.join(FORMATS)}")
    return FORMATS[suffix]


def _suffix_of(path: str) -> str:
    return Path(path.partition("?")[0] if is_remote(path) else path).suffix.lower()  # "?": a signed URL's query


def is_remote(path: str) -> bool:
    return "://" in path and not path.startswith("file://")


def _file_system(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path or URL, and the path inside it."""
    if not path.startswith(("http://", "https://")):
        return fsspec.core.url_to_fs(path)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALL_SECONDS, sock_read=STALL_SECONDS)
    return fsspec.core.url_to_fs(path, client_kwargs={"timeout": timeout})


def open_file(path: str):
    """A file object without read-ahead, which would fetch bytes that another reader needs."""
    filesystem, inside = _file_system(path)
    return filesystem.open(inside, "rb", **({"cache_type": "none"} if is_remote(path) else {}))


def size_of(file) -> int:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return size


def facts_of(path: str) -> FileFacts:
    """Size and version of a file, without reading it. `modified` is "" where the server sends none."""
    filesystem, inside = _file_system(path)
    filesystem.invalidate_cache()  # some remember what they have listed
    info = filesystem.info(inside)
    if not is_remote(path):
        return FileFacts(path, info["size"], str(os.stat(inside).st_mtime_ns))
    version = next((info[key] for key in ("ETag", "blob_id", "LastModified", "Last-Modified") if info.get(key)), "")
    return FileFacts(path, info["size"] or 0, str(version))


def with_retries(read: Callable[[], Result], path: str, was_read: bool = False) -> Result:
    """`read()`, repeated after a wait where the network fails; `OSError` when all attempts fail. Local files are not
    retried.

    `was_read`: the file could be read before, so any failure may be temporary: a missing file, a refused login, a
    server that ignores ranges, an error page instead of the data.
    """
    for seconds in (*RETRY_SECONDS, None):
        try:
            return read()
        except (UserError, DataError):
            raise
        except Exception as error:  # each protocol's client has exceptions of its own
            reason = (_network_failure(error) or (error if was_read else None)) if is_remote(path) else None
            if reason is None:
                raise
            words = _in_words(reason)
            if seconds is None:
                raise OSError(words) from error
            logger.warning("%s: %s; trying again in %g s", path, words, seconds)
            time.sleep(seconds)


def _in_words(reason: BaseException) -> str:
    if isinstance(reason, TimeoutError):
        return f"no answer within {STALL_SECONDS:g} s"
    return "not found (404)" if isinstance(reason, FileNotFoundError) else first_line(reason)


def _network_failure(error: BaseException | None) -> BaseException | None:
    """The failure of the network behind `error`, or None. fsspec raises FileNotFoundError for anything that
    hides a file's size, with the reason as its cause; for a missing file the cause is None or one too."""
    if isinstance(error, FileNotFoundError):
        return _network_failure(error.__cause__)
    modules = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
    is_network = isinstance(error, OSError) or bool(modules & {"aiohttp", "httpx", "requests", "botocore"})
    is_final = isinstance(error, PermissionError) or getattr(error, "status", None) in (401, 403, 404, 410)
    return error if is_network and not is_final else None


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
    except ValueError as error:  # an unknown config: datasets lists the existing ones
        raise UserError(f"source {source!r}: {first_line(error)}") from error
    except KeyError as error:
        raise UserError(f"source {source!r}: the dataset has no split named train") from error
    except Exception as error:  # the hub client raises a different class for each way a network can fail
        raise DataError(
            f"source {source!r}: the Hugging Face hub cannot be reached ({type(error).__name__}: "
            f"{first_line(error)}); {HUB_OFFLINE_HINT}"
        ) from error
    return [str(file) for file in files]


def _list_files(source: str) -> list[str]:
    try:
        filesystem, path = _file_system(source)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"source {source!r}: {first_line(error)}; a source is docstrings, hf://OWNER/NAME, or files: "
            "data/*.parquet"
        ) from error
    try:
        found = with_retries(lambda: _files_at(filesystem, path), source)
    except FileNotFoundError:
        found = []
    except OSError as error:
        raise DataError(f"source {source!r}: cannot be listed ({first_line(error)}); {HUB_OFFLINE_HINT}") from error
    if not found:
        raise UserError(
            f"source {source!r}: no such file{_nearby(source)}; a source is docstrings, hf://OWNER/NAME, or a path, "
            "glob or URL of .parquet, .jsonl or .txt files"
        )
    return [filesystem.unstrip_protocol(file) if "://" in source else file for file in sorted(found)]


def _nearby(source: str) -> str:
    folder = Path(source).parent
    names = [entry.name for entry in folder.iterdir() if entry.exists()] if folder.is_dir() else []
    near = difflib.get_close_matches(Path(source).name, [*names, "docstrings"], n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _files_at(filesystem, path: str) -> list[str]:
    is_url = path.startswith("http")  # where "?" starts a query
    if any(mark in path for mark in ("*[" if is_url else "*?[")) and not os.path.exists(path):
        found = filesystem.glob(path, detail=True)  # over HTTP, `isfile` would start to download each file
        return [file for file, info in found.items() if info["type"] != "directory"]
    is_folder = filesystem.isdir(path) if _suffix_of(path) not in FORMATS else os.path.isdir(path)
    if is_folder:
        return [file for file in filesystem.find(path) if _suffix_of(file) in (*FORMATS, *COMPRESSED)]
    filesystem.info(path)  # over HTTP, `exists` would start to download the file
    return [path]
