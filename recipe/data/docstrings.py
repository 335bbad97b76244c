"""The corpus that needs no download: the English in the docstrings of the packages that the recipe installs anyway.

1. `find_packages`            names -> packages on disk, found without importing them
2. `read_modules`             packages -> one `Module` a file: its paragraphs in source order, read by parallel workers
3. `drop_repeated_paragraphs` every paragraph once in the whole corpus
4. `drop_shared_windows`      no run of `WINDOW_WORDS` words in two documents, so that any hold-out is clean
5. `join_short`               modules -> documents of at least `MIN_CHARS` characters
6. `build_corpus`             documents in the order of their hashes -> `corpus.parquet` + `corpus.json`, once a cache

Run as a program this file is one worker of step 2: paths on stdin, paragraphs on stdout.
"""

import ast
import gc
import hashlib
import importlib.util
import inspect
import json
import logging
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from tqdm import tqdm

from recipe.errors import DataError

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2  # raise it whenever the same packages would give other documents

# Dependencies of the recipe, direct or through torch, transformers and datasets, with the most text. An import name is
# also the distribution's. setuptools is left out: its version follows whatever made the environment.
PACKAGES = (
    "accelerate", "aiohttp", "anyio", "click", "datasets", "evaluate", "filelock", "fsspec", "huggingface_hub",
    "jinja2", "mpmath", "networkx", "numpy", "packaging", "pandas", "pyarrow", "pydantic", "pygments", "rich", "sympy",
    "torch", "transformers", "urllib3",
)  # fmt: skip
# Tests are code with hardly a sentence. The other parts of the standard library are packaged apart by Linux
# distributions: with them, equal versions would not mean equal documents.
SKIPPED_FOLDERS = {
    "__pycache__", "_vendor", "dist-packages", "ensurepip", "idle_test", "idlelib", "lib2to3", "site-packages", "test",
    "tests", "tkinter", "turtledemo",
}  # fmt: skip

MIN_LETTERS = 0.3  # of a paragraph's visible characters: below are tables of numbers and drawings
MIN_CHARS = 200  # a shorter document is joined with its short neighbours ...
JOINED_CHARS = 400  # ... until they are this long together
# So few that 64 tokens of a 4k BPE hold more. Measured, such windows shared between documents: 263,000 of 7.8 million
# before, 16 of 6.5 million with 20 words here, none of 6.3 million with 18. Two words fewer are margin.
WINDOW_WORDS = 16
ROW_GROUP_DOCUMENTS = 24  # small row groups are what lanes are dealt

PARAGRAPH_BREAK = re.compile(r"\n\s*\n")
NOT_LETTERS = re.compile(r"[\W\d_]+")
NOT_TEXT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")  # control characters; surrogates are not UTF-8
WORD = re.compile(r"[^\W\d_]+|\d|_|[^\w\s]+")  # digits one by one: BPE may spend a token on each
BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")


class Package(NamedTuple):
    """A package to read. `root` is its folder; `is_stdlib` modules carry no package prefix in their dotted names."""

    name: str
    version: str
    root: Path
    is_stdlib: bool = False


class Module(NamedTuple):
    """The paragraphs of one .py file; `name` is its dotted module name (several, with commas, once joined)."""

    package: str
    name: str
    paragraphs: list[str]


def build_docstring_corpus(cache_dir: Path | None = None) -> Path:
    """Return the path of corpus.parquet for the installed packages; build it first where the cache has none.

    Columns `text` and `source` (dotted module name), a document a row, ordered by the text's SHA-256. `cache_dir` is
    `$RECIPE_CACHE`, `$XDG_CACHE_HOME/recipe` or `~/.cache/recipe` by default. Any number of processes may call it at
    once: one builds, the others wait. Raises DataError when the cache cannot be written.
    """
    packages = [*find_packages(PACKAGES), standard_library()]
    return build_corpus(packages, cache_dir or default_cache_dir(), num_processes=min(os.cpu_count() or 1, 8))


def corpus_info(path: Path) -> dict:
    """Read the corpus.json beside corpus.parquet `path`: documents, bytes, content_hash, versions, build_seconds, ...

    `content_hash` covers the text of all documents in order; `bytes` counts UTF-8. Raises DataError if unreadable.
    """
    info_path = Path(path).with_name("corpus.json")
    try:
        return json.loads(info_path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {info_path}: {error}. Delete the folder and it is built again.") from error


def default_cache_dir() -> Path:
    """The recipe's cache folder; it may not exist yet."""
    if os.environ.get("RECIPE_CACHE"):
        return Path(os.environ["RECIPE_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "recipe"


# ---------------------------------------------------------------------------------------------------- finding modules


def find_packages(names: Iterable[str]) -> list[Package]:
    """Locate packages without importing them; names that are not installed are passed over."""
    packages = []
    for name in names:
        spec = importlib.util.find_spec(name)
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
        if spec is not None and spec.submodule_search_locations:
            packages.append(Package(name, installed, Path(spec.submodule_search_locations[0]).resolve()))
    return packages


def standard_library() -> Package:
    """The running interpreter's own modules."""
    root = Path(sysconfig.get_paths()["stdlib"]).resolve()
    return Package("stdlib", platform.python_version(), root, is_stdlib=True)


def module_files(package: Package) -> list[tuple[str, Path]]:
    """Return (dotted module name, path) for every .py file of the package, sorted by name."""
    found = []
    for folder, subfolders, files in os.walk(package.root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        for path in (Path(folder, name) for name in files if name.endswith(".py")):
            parts = path.relative_to(package.root).with_suffix("").parts
            parts = (() if package.is_stdlib else (package.name,)) + (parts[:-1] if parts[-1] == "__init__" else parts)
            found.append((".".join(parts), path))
    return sorted(found)


# ---------------------------------------------------------------------------------------------------- reading modules


def extract_paragraphs(path: Path) -> list[str] | None:
    """Return the paragraphs of the file's docstrings in source order, dedented; None if it does not parse."""
    try:
        texts = list(iter_doc_strings(ast.parse(path.read_bytes())))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    cleaned = (NOT_TEXT.sub(" ", inspect.cleandoc(text)) for text in texts)
    paragraphs = (paragraph.strip("\n").rstrip() for text in cleaned for paragraph in PARAGRAPH_BREAK.split(text))
    return [paragraph for paragraph in paragraphs if _is_prose(paragraph)]


def iter_doc_strings(node: ast.AST) -> Iterator[str]:
    """Yield the strings that document: docstrings, strings below attributes, and those given to `add_docstr(...)`."""
    for statement in (child for block in BLOCKS for child in getattr(node, block, ())):
        if not isinstance(statement, ast.Expr):
            yield from iter_doc_strings(statement)
        elif isinstance(statement.value, ast.Constant) and isinstance(statement.value.value, str):
            yield statement.value.value
        elif isinstance(statement.value, ast.Call):
            yield from _added_doc_strings(statement.value)


def _added_doc_strings(call: ast.Call) -> Iterator[str]:
    # torch and numpy document what is written in C by add_docstr(function, """...""") and add_newdoc(...).
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name.startswith(("add_docstr", "add_newdoc")):
        for node in ast.walk(call):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" in node.value:
                yield node.value


def _is_prose(paragraph: str) -> bool:
    visible = len("".join(paragraph.split()))
    return visible > 0 and len(NOT_LETTERS.sub("", paragraph)) >= MIN_LETTERS * visible


def read_modules(packages: list[Package], num_processes: int) -> tuple[list[Module], int]:
    """Return the modules that have paragraphs, sorted by package and name, and how many files did not parse."""
    files = [(package.name, *file) for package in sorted(packages) for file in module_files(package)]
    paragraphs = _extract_in_workers([path for _, _, path in files], num_processes)
    modules = [
        Module(package, name, found) for (package, name, _), found in zip(files, paragraphs, strict=True) if found
    ]
    return modules, sum(found is None for found in paragraphs)


def _extract_in_workers(paths: list[Path], num_processes: int) -> list[list[str] | None]:
    # Plain child interpreters: fork would copy a process that may hold CUDA and threads, and multiprocessing's spawn
    # would import the caller's __main__, torch included, in each worker. File i goes to worker i % num_processes,
    # so that reading the workers in turn gives the order of `paths`.
    workers = [_start_worker() for _ in range(num_processes)]
    try:
        for i, worker in enumerate(workers):
            _send_paths(worker, paths[i::num_processes])
        numbered = enumerate(tqdm(paths, desc="reading docstrings", disable=None, unit="file", mininterval=0.5))
        return [_read_result(workers[i % num_processes], path) for i, path in numbered]
    finally:
        for worker in workers:
            worker.kill()
            worker.stdout.close()
            worker.wait()


def _start_worker() -> subprocess.Popen:
    # The folder that holds `recipe` is the working directory: `-m` finds it there, and nothing of the caller's shadows
    # it. A session of its own: Ctrl-C reaches the parent alone, which then ends its workers.
    command = [sys.executable, "-m", "recipe.data.docstrings"]
    root = Path(__file__).resolve().parents[2]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=root, start_new_session=True, **pipes)


def _send_paths(worker: subprocess.Popen, paths: list[Path]) -> None:
    with suppress(BrokenPipeError), worker.stdin:  # a dead worker is reported by _read_result
        worker.stdin.write(json.dumps([str(path) for path in paths]))


def _read_result(worker: subprocess.Popen, path: Path) -> list[str] | None:
    line = worker.stdout.readline()
    if not line.endswith("\n"):
        raise DataError(f"a worker of the docstring corpus ended early, near {path} (exit code {worker.wait()})")
    return json.loads(line)


def run_worker() -> None:
    """Read a JSON list of paths from stdin; print each file's paragraphs as one line of JSON."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the parent is gone: end without a traceback
    gc.disable()  # syntax trees hold no cycles, and scanning them again and again takes longer than parsing
    warnings.simplefilter("ignore")  # other people's invalid escape sequences
    for path in json.load(sys.stdin):
        print(json.dumps(extract_paragraphs(Path(path))))


# ------------------------------------------------------------------------------------------------ removing repetition


def drop_repeated_paragraphs(modules: list[Module]) -> list[Module]:
    """Keep the first of all paragraphs that are equal but for case and white space; modules left empty are dropped."""
    first_of: dict[str, tuple[int, int]] = {}
    for i, module in enumerate(modules):
        for j, paragraph in enumerate(module.paragraphs):
            first_of.setdefault(" ".join(paragraph.lower().split()), (i, j))
    return _select(modules, set(first_of.values()))


def drop_shared_windows(modules: list[Module], window_words: int = WINDOW_WORDS) -> list[Module]:
    """Drop paragraphs until no `window_words` consecutive words of a module's text occur in an earlier module's.

    Words are runs of letters, single digits and runs of punctuation, without case. Windows run across paragraphs, so a
    removal can bring new ones about: repeated until there are none.
    """
    places = [(i, j) for i, module in enumerate(modules) for j in range(len(module.paragraphs))]
    words, lengths = _number_words(modules[i].paragraphs[j] for i, j in places)
    paragraph_of = np.repeat(np.arange(len(places)), lengths)
    module_of = np.repeat(np.array([i for i, _ in places], dtype=np.int64), lengths)
    kept = np.ones(len(places), dtype=bool)
    while True:
        in_text = kept[paragraph_of]
        shared = _shared_windows(words[in_text], module_of[in_text], window_words)
        if len(shared) == 0:
            return _select(modules, {place for place, is_kept in zip(places, kept, strict=True) if is_kept})
        kept[paragraph_of[in_text][shared + window_words - 1]] = False


def _number_words(paragraphs: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the word ids of all paragraphs, one after another, and the number of words of each."""
    ids: dict[str, int] = {}
    numbered, lengths = [], []
    for paragraph in paragraphs:
        found = [ids.setdefault(word, len(ids)) for word in WORD.findall(paragraph.lower())]
        numbered.append(np.array(found, dtype=np.int32))
        lengths.append(len(found))
    return np.concatenate([np.zeros(0, np.int32), *numbered]), np.array(lengths, dtype=np.int64)


def _shared_windows(words: np.ndarray, module_of: np.ndarray, window_words: int) -> np.ndarray:
    """Return the starts of windows, each inside one module, whose words occur in an earlier module as well."""
    num_windows = max(0, len(words) - window_words + 1)
    inside = np.flatnonzero(module_of[:num_windows] == module_of[window_words - 1 :])
    hashes = _window_hashes(words, window_words)[inside]
    ordered = np.sort(hashes)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    # A table of low bits picks the few candidates; sorting every window with its place takes longer.
    table = np.zeros(1 << 24, dtype=bool)
    table[repeated & np.uint64(len(table) - 1)] = True
    candidates = np.flatnonzero(table[hashes & np.uint64(len(table) - 1)])
    _, first, which = np.unique(hashes[candidates], return_index=True, return_inverse=True)
    modules = module_of[inside[candidates]]
    return inside[candidates[modules != modules[first[which]]]]


def _window_hashes(words: np.ndarray, window_words: int) -> np.ndarray:
    # Polynomial hash modulo 2**64 over a random code for each word id.
    codes = np.random.default_rng(0).integers(1, 2**63, int(words.max(initial=0)) + 1, dtype=np.uint64)[words]
    num_windows = max(0, len(words) - window_words + 1)
    hashes = np.zeros(num_windows, dtype=np.uint64)
    for offset in range(window_words):
        hashes *= np.uint64(0x9E3779B97F4A7C15)
        hashes += codes[offset : offset + num_windows]
    return hashes


def _select(modules: list[Module], places: set[tuple[int, int]]) -> list[Module]:
    selected = (
        module._replace(paragraphs=[paragraph for j, paragraph in enumerate(module.paragraphs) if (i, j) in places])
        for i, module in enumerate(modules)
    )
    return [module for module in selected if module.paragraphs]


def join_short(modules: list[Module]) -> list[Module]:
    """Join modules under `MIN_CHARS` characters with the next short ones of their package, to `JOINED_CHARS` or more.

    What is still under `MIN_CHARS` at the package's end is dropped. The names of joined modules are joined by commas.
    """
    documents = []
    for _, group in groupby(modules, key=lambda module: module.package):
        waiting = None
        for module in group:
            if len(document_text(module)) >= MIN_CHARS:
                documents.append(module)
                continue
            waiting = module if waiting is None else _join(waiting, module)
            if len(document_text(waiting)) >= JOINED_CHARS:
                documents.append(waiting)
                waiting = None
        if waiting is not None and len(document_text(waiting)) >= MIN_CHARS:
            documents.append(waiting)
    return documents


def _join(first: Module, second: Module) -> Module:
    return Module(first.package, f"{first.name},{second.name}", first.paragraphs + second.paragraphs)


def document_text(module: Module) -> str:
    """The text of a document: paragraphs with a blank line between them."""
    return "\n\n".join(module.paragraphs)


# --------------------------------------------------------------------------------------------------- building, writing


def build_corpus(packages: list[Package], cache_dir: Path, num_processes: int) -> Path:
    """Return `cache_dir/docstrings-<key>/corpus.parquet`, built first if it is absent; whole or not there at all."""
    folder = cache_dir / f"docstrings-{corpus_key(packages)}"
    path = folder / "corpus.parquet"
    if path.exists():
        return path
    with _locked(cache_dir):
        if not path.exists():
            started = time.monotonic()
            logger.info("building the docstring corpus in %s, once: about half a minute on 2 cores", folder)
            documents, num_unparsed = collect_documents(packages, num_processes)
            info = {
                "versions": {package.name: package.version for package in packages},
                "python": platform.python_version(),
                "format_version": FORMAT_VERSION,
                "unparsed_files": num_unparsed,
                "build_seconds": round(time.monotonic() - started, 1),
            }
            _write_whole(documents, info, folder)
            logger.info("built %d documents in %.1f s", len(documents), time.monotonic() - started)
    return path


def corpus_key(packages: list[Package]) -> str:
    """Name the corpus by what decides its content: versions of packages and Python, and the builder's format."""
    versions = sorted((package.name, package.version) for package in packages)
    described = json.dumps([FORMAT_VERSION, platform.python_version(), versions])
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def collect_documents(packages: list[Package], num_processes: int) -> tuple[list[Module], int]:
    """Return the corpus's documents in package order and the number of files that did not parse."""
    modules, num_unparsed = read_modules(packages, num_processes)
    documents = join_short(drop_shared_windows(drop_repeated_paragraphs(modules)))
    if not documents:
        names = ", ".join(package.name for package in packages)
        raise DataError(f"no docstrings found in {names}: is Python installed without its sources?")
    return documents, num_unparsed


def _write_whole(documents: list[Module], info: dict, folder: Path) -> None:
    temporary = folder.with_name(folder.name + ".tmp")
    with _disk_errors_explained(folder.parent):
        # All builders hold the lock: another temporary folder is a killed builder's, and `folder` lacks its corpus.
        for abandoned in [*folder.parent.glob("docstrings-*.tmp"), folder]:
            shutil.rmtree(abandoned, ignore_errors=True)
        try:
            temporary.mkdir()
            _write_corpus(documents, info, temporary)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _write_corpus(documents: list[Module], info: dict, folder: Path) -> None:
    texts = ((document_text(document), document.name) for document in documents)
    ordered = sorted((hashlib.sha256(text.encode()).digest(), text, name) for text, name in texts)
    table = pa.table({"text": [text for _, text, _ in ordered], "source": [name for _, _, name in ordered]})
    options = {"row_group_size": ROW_GROUP_DOCUMENTS, "compression": "zstd", "write_statistics": False}
    pq.write_table(table, folder / "corpus.parquet", **options)
    counted = {
        "documents": len(ordered),
        "bytes": sum(len(text.encode()) for _, text, _ in ordered),
        "content_hash": hashlib.sha256(b"".join(digest for digest, _, _ in ordered)).hexdigest(),
    }
    (folder / "corpus.json").write_text(json.dumps(counted | info, indent=2) + "\n")


@contextmanager
def _locked(cache_dir: Path) -> Iterator[None]:
    with _disk_errors_explained(cache_dir):
        cache_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache_dir / "docstrings.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("waiting for another process that builds the docstring corpus in %s", cache_dir)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _disk_errors_explained(cache_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write the docstring corpus to {cache_dir}: {error.strerror or error}. "
            "Free 50 MB there, or set RECIPE_CACHE to a folder that can be written."
        ) from error


if __name__ == "__main__":
    run_worker()
