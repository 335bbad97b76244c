"""Which files are behind a `source`, and how they are opened: local, fsspec URL, or hub dataset."""

import difflib
import logging
import os
import re
import shlex
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import aiohttp
import fsspec

from recipe.errors import DataError, UserError

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

FORMATS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".md": "text",
    ".csv": "csv",
    ".tsv": "csv",
}
COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".lz4")
ARCHIVES = (".zip", ".tar", ".tgz")
# In a folder, these are about the data. What `save_to_disk` of `datasets` writes beside it is JSON too.
ABOUT = re.compile(
    r"(?i)(readme|licen[cs]e|changelog|contributing|citation)\b.*|(dataset_(info|infos|dict)|state)\.json"
)
TRAIN_SPLIT = re.compile(r"(?i)(^|[/._ -])train(ing)?([/._ -]|$)")
OTHER_SPLIT = re.compile(r"(?i)(^|[/._ -])(test(ing)?|valid(ation)?|val|dev|eval(uation)?)([/._ -]|$)")
HUB_OFFLINE_HINT = "train on data that needs no network, --source docstrings, or on your own files"
RETRY_SECONDS = (1, 2, 4, 8, 16)
REFUSED, MISSING = (401, 403), (404, 410)  # HTTP statuses that do not pass at the start of a run
STALL_SECONDS = 60  # an HTTP connection that is silent for so long has failed; aiohttp would wait for 300 s


@dataclass(frozen=True)
class FileFacts:
    """Identifies a version of a file: size in bytes, ETag or modification time, hash of the content.

    `content` hashes the footer of a parquet file, which has size, offset and statistics of each column chunk, and all
    bytes of other files. If only `modified` differs, the file was copied or touched. `stamp`, of a local file: inode
    and time of the last change of any kind, which nobody can set. Another file may have the same size and date.
    """

    path: str
    num_bytes: int
    modified: str
    content: str = ""
    stamp: str = ""


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def find_files(source: str) -> list[str]:
    """Paths or URLs behind `source`, in the order of their documents. Raises `UserError` where there are none."""
    return _hub_files(source) if source.startswith("hf://") else _list_files(source)


def format_of(path: str) -> str:
    suffix = _suffix_of(path)
    if suffix in ARCHIVES:
        folder, file = shlex.quote(path.removesuffix(Path(path).suffix)), shlex.quote(path)
        unpack = f"unzip {file} -d {folder}" if suffix == ".zip" else f"mkdir {folder} && tar -xf {file} -C {folder}"
        raise UserError(f"{path}: is an archive; unpack it: {unpack}, then --source {folder}")
    if suffix not in FORMATS:
        raise UserError(
            f"{path}: unknown format {suffix or '(no suffix)'!r}; known: {', '.join(FORMATS)}, also compressed "
            f"({', '.join(COMPRESSED)}); plain text must be named .txt"
        )
    return FORMATS[suffix]


def _suffix_of(path: str) -> str:
    """The suffix that names the format, without that of a compression."""
    inside = Path(path.partition("?")[0] if is_remote(path) else path)  # "?": a signed URL's query
    return Path(inside.stem if inside.suffix.lower() in COMPRESSED else inside).suffix.lower()


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
        found = os.stat(inside)
        return FileFacts(path, info["size"], str(found.st_mtime_ns), stamp=f"{found.st_ino}:{found.st_ctime_ns}")
    version = next((info[key] for key in ("ETag", "blob_id", "LastModified", "Last-Modified") if info.get(key)), "")
    return FileFacts(path, info["size"] or 0, str(version))


def with_retries(read: Callable[[], Result], path: str, was_read: bool = False) -> Result:
    """`read()`, repeated after a wait where the network fails. Raises `OSError` when all attempts fail: a
    `PermissionError` where the server refuses, a `ConnectionError` where it cannot be reached. Local files are not
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
            if not is_remote(path):
                raise
            failure = _network_failure(error)
            words = _in_words(failure or error)
            if failure is None and not was_read and _status_of(error) is None:
                raise
            if seconds is None or (failure is None and not was_read):
                raise _kind_of(error, failure)(words) from error
            logger.warning("%s: %s; trying again in %g s", path, words, seconds)
            time.sleep(seconds)


def fix_for(error: BaseException, path: str) -> str:
    """What to do where a file cannot be read. `error`: of `with_retries`."""
    if is_remote(path) and isinstance(error, PermissionError):
        return "put a URL that is valid now into `source`, or log in"
    if is_remote(path) and isinstance(error, ConnectionError):
        return "try again when the server answers"
    return "replace the file, or leave it out of `source`"


def _in_words(reason: BaseException) -> str:
    status = _status_of(reason)
    if isinstance(reason, TimeoutError):
        return f"no answer within {STALL_SECONDS:g} s"
    if status in REFUSED:
        return f"the server refuses it ({status}): wrong or expired signature or login"
    return f"not found ({status or 404})" if isinstance(reason, FileNotFoundError) else first_line(reason)


def _status_of(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, of aiohttp, requests or httpx."""
    while error is not None:
        status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__
    return None


def _kind_of(error: BaseException, failure: BaseException | None) -> type[OSError]:
    if _status_of(error) in REFUSED or isinstance(error, PermissionError):
        return PermissionError
    if failure is not None:
        return ConnectionError
    is_missing = _status_of(error) in MISSING or isinstance(error, FileNotFoundError)
    return FileNotFoundError if is_missing else OSError


def _network_failure(error: BaseException | None) -> BaseException | None:
    """The failure of the network behind `error`, or None. fsspec raises FileNotFoundError for anything that
    hides a file's size, with the reason as its cause; for a missing file the cause is None or one too."""
    if isinstance(error, FileNotFoundError):
        return _network_failure(error.__cause__)
    modules = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
    is_network = isinstance(error, OSError) or bool(modules & {"aiohttp", "httpx", "requests", "botocore"})
    is_final = isinstance(error, PermissionError) or _status_of(error) in (*REFUSED, *MISSING)
    return error if is_network and not is_final else None


def _hub_files(source: str) -> list[str]:
    """The train split's files of a hub dataset, as URLs that fsspec opens by range requests."""
    import datasets

    from recipe.hub import why_unreachable

    owner, name, *config = [
        part for part in source.removeprefix("hf://").removeprefix("datasets/").split("/") if part
    ] + ["", ""][:2]
    config = "/".join(part for part in config if part) or None
    if not owner or not name:
        raise UserError(f"source {source!r}: a hub dataset is hf://OWNER/NAME or hf://OWNER/NAME/CONFIG")
    offline = why_unreachable()
    try:
        builder = datasets.load_dataset_builder(f"{owner}/{name}", config)
        files = builder.config.data_files["train"]
    except ValueError as error:  # an unknown config: datasets lists the existing ones
        raise UserError(f"source {source!r}: {first_line(error)}") from error
    except KeyError as error:
        raise UserError(f"source {source!r}: the dataset has no split named train") from error
    except Exception as error:  # the hub client raises a different class for each way a network can fail
        raise DataError(
            f"source {source!r}: the Hugging Face hub cannot be reached ("
            f"{offline or f'{type(error).__name__}: {first_line(error)}'}); {HUB_OFFLINE_HINT}"
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
        fix = fix_for(error, source) if isinstance(error, PermissionError) else HUB_OFFLINE_HINT
        raise DataError(f"source {source!r}: cannot be listed ({first_line(error)}); {fix}") from error
    if not found:
        why = _why_nothing(source)
        kinds = f"a source is docstrings, hf://OWNER/NAME, or a path, glob or URL of {', '.join(FORMATS)} files"
        raise UserError(f"source {source!r}: {why}" + ("" if "--source" in why or "matches" in why else f"; {kinds}"))
    return [filesystem.unstrip_protocol(file) if "://" in source else file for file in sorted(found)]


def _why_nothing(source: str) -> str:
    path = Path(source)
    if path.is_dir():
        return _why_no_data_file(path)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and not path.parent.exists():
        return f"no such file; did you mean --source hf://{source} (a dataset of the hub)?"
    folder = path.parent
    names = [entry.name for entry in folder.iterdir() if entry.exists()] if folder.is_dir() else []
    if any(mark in source for mark in "*?["):
        return f"no file matches; the folder has {_some(sorted(names))}" if names else "no such file"
    near = difflib.get_close_matches(path.name, [*names, "docstrings"], n=1)
    where = near and near[0] != "docstrings" and str(folder) != "."
    return "no such file" + (f"; did you mean --source {folder / near[0] if where else near[0]}?" if near else "")


def _why_no_data_file(folder: Path) -> str:
    files = sorted(entry.relative_to(folder) for entry in folder.rglob("*") if entry.is_file())
    seen = [file for file in files if not _is_hidden(str(file))]
    if about := [file for file in seen if _suffix_of(str(file)) in FORMATS]:  # all others would be training text
        fix = shlex.quote(str(folder / about[0]))
        return f"only {_some(map(str, about))}, which is no training text in a folder; to read it, --source {fix}"
    if files and not seen:
        return f"the folder has hidden files only: {_some(map(str, files))}"
    suffixes = sorted({file.suffix or file.name for file in seen})
    return "the folder has no data file" + (f", but {_some(suffixes)}; plain text must be named .txt" if seen else "")


def _some(names: Iterable[str], shown: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def _is_hidden(inside: str) -> bool:
    """Of a path in the folder of a source."""
    return any(part.startswith((".", "__")) for part in inside.split("/"))


def _files_at(filesystem, path: str) -> list[str]:
    is_url = path.startswith("http")  # where "?" starts a query
    if any(mark in path for mark in ("*[" if is_url else "*?[")) and not os.path.exists(path):
        found = filesystem.glob(path, detail=True)  # over HTTP, `isfile` would start to download each file
        return [file for file, info in found.items() if info["type"] != "directory"]
    is_folder = filesystem.isdir(path) if _suffix_of(path) not in FORMATS else os.path.isdir(path)
    if is_folder:
        return _training_files(path, filesystem.find(path))
    filesystem.info(path)  # over HTTP, `exists` would start to download the file
    return [path]


def _training_files(folder: str, files: list[str]) -> list[str]:
    """The files of a folder that hold training text: without hidden ones, descriptions of the data, and other splits
    than train where there is one."""
    inside = {file: os.path.relpath(file, folder) for file in files}
    seen = [file for file in files if not _is_hidden(inside[file])]
    data = [f for f in seen if _suffix_of(f) in (*FORMATS, *ARCHIVES) and not ABOUT.fullmatch(os.path.basename(f))]
    train = [file for file in data if TRAIN_SPLIT.search(inside[file])]
    others = {file for file in data if OTHER_SPLIT.search(inside[file])} - set(train)
    kept = [file for file in data if not train or file not in others]
    left_out = [inside[file] for file in seen if file not in kept]
    if kept and left_out:
        logger.info("%s: reading %d of its files, not %s", folder, len(kept), _some(left_out))
    return kept
