"""The corpus that needs no download: the English in the docstrings of the packages that the recipe installs.

1. `find_packages`            names -> packages on disk, found without importing them
2. `read_modules`             packages -> one `Module` a file: its paragraphs in source order, read by parallel workers
3. `drop_repeated_paragraphs` every paragraph once in the whole corpus
4. `drop_shared_windows`      no run of `WINDOW_WORDS` words in two documents, so that any hold-out is clean
5. `join_short`               modules -> documents of at least `MIN_CHARS` characters
6. `build_corpus`             documents ordered by their hashes -> `corpus.parquet` + `corpus.json`, cached

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
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, compress, count, cycle, groupby
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock
from tqdm import tqdm

from recipe.errors import DataError

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2  # increase it when the same packages would give other documents

# Dependencies of the recipe, direct or through torch, transformers and datasets, with the most text. An import name is
# also the distribution's. setuptools is left out: its version depends on how the environment was made.
PACKAGES = (
    "accelerate", "aiohttp", "anyio", "click", "datasets", "evaluate", "filelock", "fsspec", "huggingface_hub",
    "jinja2", "mpmath", "networkx", "numpy", "packaging", "pandas", "pyarrow", "pydantic", "pygments", "rich", "sympy",
    "torch", "transformers", "urllib3",
)  # fmt: skip
# Tests have hardly any prose. Linux distributions package the other parts of the standard library separately, so with
# them equal versions would not mean equal documents.
SKIPPED_FOLDERS = {
    "__pycache__", "_vendor", "dist-packages", "ensurepip", "idle_test", "idlelib", "lib2to3", "site-packages", "test",
    "tests", "tkinter", "turtledemo",
}  # fmt: skip

MIN_LETTERS = 0.3  # of a paragraph's visible characters: below, it is a table of numbers or a drawing
MIN_CHARS = 200  # a shorter document is joined with its short neighbours ...
JOINED_CHARS = 400  # ... until they are this long together
# 64 tokens of a 4k BPE hold more words than this: with 18 words, no window of 64 tokens was left in two documents.
# Two words fewer give a margin.
WINDOW_WORDS = 16
ROW_GROUP_DOCUMENTS = 24  # small row groups are what lanes are dealt

PARAGRAPH_BREAK = re.compile(r"\n\s*\n")
LETTER = re.compile(r"[^\W\d_]")
NOT_TEXT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")  # control characters; surrogates are not UTF-8
WORD = re.compile(r"[^\W\d_]+|\d|_|[^\w\s]+")  # digits one by one: BPE may spend a token on each


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

    @property
    def text(self) -> str:
        return "\n\n".join(self.paragraphs)


def build_docstring_corpus(cache_dir: Path | None = None) -> Path:
    """Return the path of corpus.parquet for the installed packages; builds it first if it is not cached.

    Columns `text` and `source` (dotted module name), a document a row, ordered by the text's SHA-256. `cache_dir` is
    `$RECIPE_CACHE`, `$XDG_CACHE_HOME/recipe` or `~/.cache/recipe` by default. Several processes may call it at
    the same time: one builds, the others wait. Raises DataError when the cache cannot be written.
    """
    stdlib = Path(sysconfig.get_paths()["stdlib"]).resolve()
    packages = [*find_packages(PACKAGES), Package("stdlib", platform.python_version(), stdlib, is_stdlib=True)]
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


def find_packages(names: Iterable[str]) -> list[Package]:
    """Locate packages without importing them; names that are not installed are skipped."""
    packages = []
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            with suppress(PackageNotFoundError):
                packages.append(Package(name, version(name), Path(spec.submodule_search_locations[0]).resolve()))
    return packages


def module_files(package: Package) -> list[tuple[str, Path]]:
    """Return (dotted module name, path) for every .py file of the package, sorted by name."""
    prefix = () if package.is_stdlib else (package.name,)
    found = []
    for folder, subfolders, files in os.walk(package.root):
        subfolders[:] = set(subfolders) - SKIPPED_FOLDERS
        for path in (Path(folder, name) for name in files if name.endswith(".py")):
            module = path.parent if path.name == "__init__.py" else path.with_suffix("")
            found.append((".".join(prefix + module.relative_to(package.root).parts), path))
    return sorted(found)


def read_modules(packages: list[Package], num_processes: int) -> tuple[list[Module], int]:
    """Return the modules that have paragraphs, sorted by package and name, and how many files did not parse."""
    files = [(package.name, *file) for package in sorted(packages) for file in module_files(package)]
    paths = [str(path) for *_, path in files]
    modules, num_unparsed = [], 0
    with ExitStack() as stack:
        # File i goes to worker i % num_processes, so that reading the workers in turn gives the order of `files`.
        workers = [stack.enter_context(_start_worker(paths[i::num_processes])) for i in range(num_processes)]
        progress = tqdm(files, desc="reading docstrings", disable=None, unit="file", mininterval=0.5)
        for (package, name, path), worker in zip(progress, cycle(workers), strict=False):
            line = worker.stdout.readline()
            if not line.endswith("\n"):
                raise DataError(f"a docstring worker ended early, near {path} (exit code {worker.wait()})")
            paragraphs = json.loads(line)
            num_unparsed += paragraphs is None
            if paragraphs:
                modules.append(Module(package, name, paragraphs))
    return modules, num_unparsed


def _start_worker(paths: list[str]) -> subprocess.Popen:
    # A plain interpreter: fork would copy a process that may hold CUDA and threads, and multiprocessing's spawn would
    # import the caller's __main__, torch included. It runs in the folder that holds `recipe`, so that no module of the
    # caller shadows it, and in its own session: Ctrl-C reaches only the parent, whose closed pipe ends it.
    command = [sys.executable, "-W", "ignore", "-m", "recipe.data.docstrings"]
    root = Path(__file__).resolve().parents[2]
    with TemporaryFile("w+") as stdin:
        json.dump(paths, stdin)
        stdin.seek(0)
        pipes = {"stdin": stdin, "stdout": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=root, start_new_session=True, **pipes)


def run_worker() -> None:
    """Read a JSON list of paths from stdin; print each file's paragraphs as one line of JSON."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # if the parent is gone, end without a traceback
    gc.disable()  # syntax trees have no cycles, and scanning them repeatedly takes longer than parsing
    for path in json.load(sys.stdin):
        print(json.dumps(extract_paragraphs(Path(path))))


def extract_paragraphs(path: Path) -> list[str] | None:
    """Return the paragraphs of the file's docstrings in source order, dedented; None if it does not parse."""
    try:
        texts = list(iter_doc_strings(ast.parse(path.read_bytes())))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    cleaned = (NOT_TEXT.sub(" ", inspect.cleandoc(text)) for text in texts)
    paragraphs = (paragraph.strip("\n").rstrip() for text in cleaned for paragraph in PARAGRAPH_BREAK.split(text))
    return [
        paragraph
        for paragraph in paragraphs
        if len(LETTER.findall(paragraph)) >= max(1, MIN_LETTERS * len("".join(paragraph.split())))
    ]


def iter_doc_strings(node: ast.AST) -> Iterator[str]:
    """Yield the strings that document: docstrings, strings below attributes, and those given to `add_docstr(...)`."""
    blocks = (getattr(node, name, ()) for name in ("body", "handlers", "orelse", "finalbody", "cases"))
    for statement in chain.from_iterable(blocks):
        match statement:
            case ast.Expr(ast.Constant(str(text))):
                yield text
            case ast.Expr(ast.Call(ast.Name(name) | ast.Attribute(attr=name)) as call):
                # torch and numpy document what is written in C by add_docstr(function, """...""") and add_newdoc(...).
                if name.startswith(("add_docstr", "add_newdoc")):
                    strings = (child.value for child in ast.walk(call) if isinstance(child, ast.Constant))
                    yield from (text for text in strings if isinstance(text, str) and "\n" in text)
            case _:
                yield from iter_doc_strings(statement)


def drop_repeated_paragraphs(modules: list[Module]) -> list[Module]:
    """Keep the first of all paragraphs that differ only in case and white space; drop modules left empty."""
    first: dict[str, int] = {}
    words = (paragraph.lower().split() for module in modules for paragraph in module.paragraphs)
    return _select(modules, [first.setdefault(" ".join(each), i) == i for i, each in enumerate(words)])


def drop_shared_windows(modules: list[Module], window_words: int = WINDOW_WORDS) -> list[Module]:
    """Drop paragraphs until no `window_words` consecutive words of a module's text occur in an earlier module's.

    Words are runs of letters, single digits and runs of punctuation, without case. Windows cross paragraphs, so a
    removal can create new ones; repeats until there are none.
    """
    ids: dict[str, int] = defaultdict(count().__next__)
    paragraphs = ((i, paragraph) for i, module in enumerate(modules) for paragraph in module.paragraphs)
    numbered = [(i, [ids[word] for word in WORD.findall(paragraph.lower())]) for i, paragraph in paragraphs]
    lengths = np.array([len(found) for _, found in numbered], dtype=np.int64)
    words = np.fromiter(chain.from_iterable(found for _, found in numbered), dtype=np.uint64)
    paragraph_of = np.repeat(np.arange(len(numbered)), lengths)
    module_of = np.repeat([i for i, _ in numbered], lengths)
    is_kept = np.ones(len(numbered), dtype=bool)
    while True:
        left = np.flatnonzero(is_kept[paragraph_of])
        shared = left[_shared_windows(words[left], module_of[left], window_words)]
        if len(shared) == 0:
            return _select(modules, is_kept)
        is_kept[paragraph_of[shared]] = False


def _shared_windows(words: np.ndarray, module_of: np.ndarray, window_words: int) -> np.ndarray:
    """Return the places of the last words of windows that lie in one module and occur in an earlier one as well."""
    if len(words) < window_words:
        return np.zeros(0, dtype=np.int64)
    multipliers = np.random.default_rng(0).integers(2**64, size=window_words, dtype=np.uint64)
    hashes = np.convolve(words, multipliers, mode="valid")  # modulo 2**64
    is_inside = module_of[: len(hashes)] == module_of[window_words - 1 :]
    # Few windows occur twice: selecting them first is faster than `np.unique` of all.
    ordered = np.sort(hashes)
    repeated = pa.array(ordered[1:][ordered[1:] == ordered[:-1]])
    starts = np.flatnonzero(is_inside & np.asarray(pc.is_in(pa.array(hashes), value_set=repeated)))
    _, first, which = np.unique(hashes[starts], return_index=True, return_inverse=True)
    modules = module_of[starts]
    return starts[modules != modules[first[which]]] + window_words - 1


def _select(modules: list[Module], is_kept: Iterable[bool]) -> list[Module]:
    """Keep paragraphs by one flag for each, in order; modules left empty are dropped."""
    flags = iter(is_kept)
    selected = (module._replace(paragraphs=list(compress(module.paragraphs, flags))) for module in modules)
    return [module for module in selected if module.paragraphs]


def join_short(modules: list[Module]) -> list[Module]:
    """Join modules under `MIN_CHARS` characters with the next short ones of their package, to `JOINED_CHARS` or more.

    What is still under `MIN_CHARS` at the package's end is dropped. The names of joined modules are joined by commas.
    """
    documents = []
    for package, group in groupby(modules, key=lambda module: module.package):
        waiting = None
        for module in group:
            is_short = len(module.text) < MIN_CHARS
            if is_short and waiting is not None:
                module = Module(package, f"{waiting.name},{module.name}", waiting.paragraphs + module.paragraphs)
                waiting = None
            if is_short and len(module.text) < JOINED_CHARS:
                waiting = module
            else:
                documents.append(module)
        if waiting is not None and len(waiting.text) >= MIN_CHARS:
            documents.append(waiting)
    return documents


def build_corpus(packages: list[Package], cache_dir: Path, num_processes: int) -> Path:
    """Return `cache_dir/docstrings-<key>/corpus.parquet`, built first if it is absent; atomically."""
    folder = cache_dir / f"docstrings-{corpus_key(packages)}"
    path = folder / "corpus.parquet"
    if path.exists():
        return path
    # Logged before the lock is taken, so that a process that waits for the builder logs it too.
    logger.info("building the docstring corpus in %s, once: about half a minute on 2 cores", folder)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(cache_dir / "docstrings.lock"):
            if not path.exists():
                _build(packages, folder, num_processes)
    except OSError as error:
        raise DataError(
            f"cannot build the docstring corpus in {cache_dir}: {error.strerror or error}. "
            "Free 50 MB there, or set RECIPE_CACHE to a writable folder."
        ) from error
    return path


def corpus_key(packages: list[Package]) -> str:
    """A name from all that determines the content: versions of packages and Python, and the builder's format."""
    versions = sorted((package.name, package.version) for package in packages)
    described = json.dumps([FORMAT_VERSION, platform.python_version(), versions])
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def _build(packages: list[Package], folder: Path, num_processes: int) -> None:
    started = time.monotonic()
    modules, num_unparsed = read_modules(packages, num_processes)
    documents = join_short(drop_shared_windows(drop_repeated_paragraphs(modules)))
    if not documents:
        names = ", ".join(package.name for package in packages)
        raise DataError(f"no docstrings found in {names}: is Python installed without its sources?")
    encoded = ((document.text.encode(), document.name) for document in documents)
    ordered = sorted((hashlib.sha256(text).digest(), text, name) for text, name in encoded)
    digests, texts, names = zip(*ordered, strict=True)
    info = {
        "documents": len(texts),
        "bytes": sum(len(text) for text in texts),
        "content_hash": hashlib.sha256(b"".join(digests)).hexdigest(),
        "versions": {package.name: package.version for package in packages},
        "python": platform.python_version(),
        "format_version": FORMAT_VERSION,
        "unparsed_files": num_unparsed,
        "build_seconds": round(time.monotonic() - started, 1),
    }
    table = pa.table({"text": pa.array(texts, pa.string()), "source": names})
    # Only one builder holds the lock: other temporary folders are from killed builders, and `folder` has no corpus.
    for abandoned in [*folder.parent.glob("docstrings-*.tmp"), folder]:
        shutil.rmtree(abandoned, ignore_errors=True)
    with TemporaryDirectory(prefix="docstrings-", suffix=".tmp", dir=folder.parent) as temporary:
        whole = Path(temporary, "whole")
        whole.mkdir()
        options = {"row_group_size": ROW_GROUP_DOCUMENTS, "compression": "zstd", "write_statistics": False}
        pq.write_table(table, whole / "corpus.parquet", **options)
        (whole / "corpus.json").write_text(json.dumps(info, indent=2) + "\n")
        whole.rename(folder)
    logger.info("built %d documents in %.1f s", len(texts), time.monotonic() - started)


if __name__ == "__main__":
    run_worker()
