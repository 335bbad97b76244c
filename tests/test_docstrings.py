"""The docstring corpus, on a tiny made-up package tree: never on the real install."""

import errno
import hashlib
import json
import logging
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipe.data import docstrings
from recipe.data.docstrings import (
    WORD,
    Module,
    Package,
    build_corpus,
    corpus_info,
    corpus_key,
    default_cache_dir,
    drop_repeated_paragraphs,
    drop_shared_windows,
    extract_paragraphs,
    find_packages,
    join_short,
    module_files,
)
from recipe.errors import DataError

VOCABULARY = [
    "the",
    "a",
    "model",
    "reads",
    "each",
    "token",
    "of",
    "every",
    "row",
    "and",
    "then",
    "writes",
    "some",
    "value",
]


def sentences(seed: int, num_words: int = 60) -> str:
    return " ".join(random.Random(seed).choices(VOCABULARY, k=num_words)).capitalize() + "."


def write_package(root: Path, modules: dict[str, str], version: str = "1.0") -> Package:
    for name, source in modules.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return Package(root.name, version, root)


@pytest.fixture
def package(tmp_path: Path) -> Package:
    modules = {f"part{i % 3}/module{i}.py": f'"""{sentences(i)}\n\n{sentences(100 + i)}\n"""\n' for i in range(30)}
    modules |= {f"short{i}.py": f'"""{sentences(200 + i, num_words=12)}"""\n' for i in range(9)}
    modules["broken.py"] = "def f(:\n"
    return write_package(tmp_path / "zoo", modules)


def paragraphs_of(*texts: list[str], package: str = "p") -> list[Module]:
    return [Module(package, f"{package}.m{i}", paragraphs) for i, paragraphs in enumerate(texts)]


def windows(modules: list[Module], num_words: int) -> list[set[tuple[str, ...]]]:
    found = []
    for module in modules:
        words = WORD.findall(" ".join(module.paragraphs).lower())
        found.append({tuple(words[i : i + num_words]) for i in range(len(words) - num_words + 1)})
    return found


# ------------------------------------------------------------------------------------------------ extraction, finding


def test_extraction_keeps_source_order_and_dedents(tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    path.write_text(
        '"""Module text.\n\nList:\n\n    indented entry\n"""\n'
        "NOT_A_DOCSTRING = '''Assigned text.'''\n"
        "class A:\n"
        '    """Class text.\n\n        Second paragraph,\n        two lines.\n    """\n'
        "    field: int = 0\n    'Text below an attribute.'\n"
        "    async def method(self):\n        'Method text.'\n        return 'returned text'\n"
        "try:\n    pass\nexcept ValueError:\n    def g():\n        'Text in a handler.'\n"
        "add_docstr(f, '''\nText for a function\nwritten in C.''')\n"
        "print('''Printed\ntext.''')\n"
    )
    assert extract_paragraphs(path) == [
        "Module text.",
        "List:",
        "    indented entry",
        "Class text.",
        "Second paragraph,\ntwo lines.",
        "Text below an attribute.",
        "Method text.",
        "Text in a handler.",
        "Text for a function\nwritten in C.",
    ]


def test_extraction_drops_tables_of_numbers_and_what_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    path.write_text('"""A bell\\x07 and half a\\ud800 pair.\n\n0.1  0.2  0.3\n1.25 1.50 1.75\n\n+-----+----+\n"""\n')
    assert extract_paragraphs(path) == ["A bell  and half a  pair."]


@pytest.mark.parametrize("source", [b"def f(:\n", b"x = '\x00'\n", b"\xff\xfe", b"# coding: no-such\n"])
def test_a_file_that_does_not_parse_is_skipped(tmp_path: Path, source: bytes) -> None:
    (tmp_path / "m.py").write_bytes(source)
    assert extract_paragraphs(tmp_path / "m.py") is None


def test_packages_are_found_but_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package(tmp_path / "never_imported", {"__init__.py": "raise SystemExit('imported')"})
    metadata = tmp_path / "never_imported-2.5.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: never_imported\nVersion: 2.5\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = find_packages(["never_imported", "not_installed_at_all"])
    assert found == [Package("never_imported", "2.5", tmp_path / "never_imported")]
    assert "never_imported" not in sys.modules


def test_module_names_are_dotted_sorted_and_without_tests(tmp_path: Path) -> None:
    names = ["b.py", "__init__.py", "a/__init__.py", "a/z.py", "tests/test_a.py", "a/test/t.py", "data.txt"]
    package = write_package(tmp_path / "pkg", dict.fromkeys(names, ""))
    assert [name for name, _ in module_files(package)] == ["pkg", "pkg.a", "pkg.a.z", "pkg.b"]
    assert [name for name, _ in module_files(package._replace(is_stdlib=True))] == ["", "a", "a.z", "b"]


# ------------------------------------------------------------------------------------------------ removing repetition


def test_a_paragraph_is_kept_once_case_and_spaces_aside() -> None:
    modules = paragraphs_of(["One  thing.", "Two\n  things."], ["one thing.", "Three."], ["TWO things."])
    assert [m.paragraphs for m in drop_repeated_paragraphs(modules)] == [["One  thing.", "Two\n  things."], ["Three."]]


def test_a_paragraph_sharing_a_window_with_an_earlier_document_is_dropped() -> None:
    modules = paragraphs_of(["a b c d e f"], ["x y", "q b c d e r", "z"], ["b c d x y"])
    kept = drop_shared_windows(modules, window_words=4)
    assert [m.paragraphs for m in kept] == [["a b c d e f"], ["x y", "z"], ["b c d x y"]]


def test_repetition_inside_one_document_is_kept() -> None:
    modules = paragraphs_of(["a b c d e", "f a b c d e"])
    assert drop_shared_windows(modules, window_words=4) == modules


def test_windows_do_not_run_from_one_document_into_the_next() -> None:
    modules = paragraphs_of(["a b c d"], ["x a b"], ["c d y"])
    assert drop_shared_windows(modules, window_words=4) == modules


def test_windows_run_across_paragraphs_and_across_the_gaps_that_removal_leaves() -> None:
    # Round 1 drops "k l m n" from document 2, which brings "a b" and "c d" together: round 2 must see it.
    modules = paragraphs_of(["a b", "c d"], ["k l m n"], ["a b", "k l m n", "c d"])
    kept = drop_shared_windows(modules, window_words=4)
    assert [m.paragraphs for m in kept] == [["a b", "c d"], ["k l m n"], ["a b"]]


@settings(max_examples=60)
@given(st.lists(st.lists(st.text("ab1.", min_size=1, max_size=12), min_size=1, max_size=5), max_size=6))
def test_no_window_is_left_in_two_documents(texts: list[list[str]]) -> None:
    modules = paragraphs_of(*[[" ".join(paragraph) for paragraph in text] for text in texts])
    kept = drop_shared_windows(modules, window_words=3)
    found = windows(kept, 3)
    assert sum(len(each) for each in found) == len(set().union(*found))
    assert kept[:1] == modules[:1]  # nothing is earlier than the first document


def test_short_documents_are_joined_within_their_package_or_dropped() -> None:
    long, short = "l" * 200, "s" * 150
    first = paragraphs_of([short], [long], [short], [short], [short], [short], package="a")
    second = paragraphs_of([short], package="b")
    joined = join_short(first + second)
    assert [m.name for m in joined] == ["a.m1", "a.m0,a.m2,a.m3", "a.m4,a.m5"]
    assert joined[1].paragraphs == [short] * 3


# --------------------------------------------------------------------------------------------------- the built corpus


def test_documents_are_in_the_order_of_their_hashes_and_described(package: Package, tmp_path: Path) -> None:
    path = build_corpus([package], tmp_path / "cache", num_processes=1)
    table, info = pq.read_table(path), corpus_info(path)
    texts = table["text"].to_pylist()
    digests = [hashlib.sha256(text.encode()).digest() for text in texts]
    assert digests == sorted(digests) and len(texts) == 31
    assert info["documents"] == len(texts)
    assert info["bytes"] == sum(len(text.encode()) for text in texts)
    assert info["content_hash"] == hashlib.sha256(b"".join(digests)).hexdigest()
    assert info["versions"] == {"zoo": "1.0"} and info["unparsed_files"] == 1
    by_source = dict(zip(table["source"].to_pylist(), texts, strict=True))
    assert by_source["zoo.part2.module5"] == f"{sentences(5)}\n\n{sentences(105)}"
    assert pq.ParquetFile(path).num_row_groups == -(-len(texts) // 24)


def test_the_number_of_processes_changes_nothing(package: Package, tmp_path: Path) -> None:
    one = build_corpus([package], tmp_path / "one", num_processes=1)
    two = build_corpus([package], tmp_path / "two", num_processes=2)
    assert one.read_bytes() == two.read_bytes()


def test_a_built_corpus_is_used_again(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = build_corpus([package], tmp_path, num_processes=1)
    assert [record.getMessage()[:8] for record in caplog.records] == ["building", "built 31"]
    caplog.clear()
    monkeypatch.setattr(docstrings, "read_modules", None)  # a second build would raise TypeError
    assert build_corpus([package], tmp_path, num_processes=1) == path
    assert caplog.records == []


def test_the_key_follows_versions_python_and_format(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Package("other", "3", package.root)
    keys = {corpus_key([package, other])}
    assert corpus_key([other, package]) in keys
    keys.add(corpus_key([package._replace(version="1.1"), other]))
    keys.add(corpus_key([package]))
    with monkeypatch.context() as patch:
        patch.setattr(docstrings.platform, "python_version", lambda: "9.9.9")
        keys.add(corpus_key([package, other]))
    monkeypatch.setattr(docstrings, "FORMAT_VERSION", 999)
    keys.add(corpus_key([package, other]))
    assert len(keys) == 5


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")])
def test_an_interrupted_build_leaves_nothing_half_made(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruption: BaseException
) -> None:
    def write_half(table: object, path: Path, **options: object) -> None:
        path.write_text("half a corpus")
        raise interruption

    cache = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(docstrings.pq, "write_table", write_half)
        expected = DataError if isinstance(interruption, OSError) else KeyboardInterrupt
        with pytest.raises(expected):
            build_corpus([package], cache, num_processes=1)
    assert [path for path in cache.iterdir() if path.suffix != ".lock"] == []
    assert corpus_info(build_corpus([package], cache, num_processes=1))["documents"] == 31


def test_what_a_killed_builder_left_is_removed(package: Package, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (cache / "docstrings-0123456789abcdef.tmp").mkdir(parents=True)
    half = cache / f"docstrings-{corpus_key([package])}"
    half.mkdir()
    (half / "corpus.json").write_text("{}")
    path = build_corpus([package], cache, num_processes=1)
    assert path.parent == half and corpus_info(path)["documents"] == 31
    assert {each.name for each in cache.iterdir()} <= {half.name, "docstrings.lock"}


def test_builders_at_the_same_time_build_once(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, read = [], docstrings.read_modules
    monkeypatch.setattr(docstrings, "read_modules", lambda *given: built.append(1) or read(*given))
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: build_corpus([package], tmp_path / "cache", 1), range(4)))
    assert len(set(paths)) == 1 and built == [1]


def test_an_unwritable_cache_is_explained(package: Package, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    cache = tmp_path / "file" / "cache"
    with pytest.raises(DataError, match=r"Not a directory.*set RECIPE_CACHE") as caught:
        build_corpus([package], cache, num_processes=1)
    assert str(cache) in str(caught.value)


def test_a_worker_that_dies_is_reported(package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docstrings.sys, "executable", "/bin/false")
    with pytest.raises(DataError, match=r"worker ended early, near .*\(exit code 1\)"):
        build_corpus([package], tmp_path / "cache", num_processes=2)


def test_packages_without_docstrings_are_refused(tmp_path: Path) -> None:
    bare = write_package(tmp_path / "bare", {"m.py": "x = 1\n"})
    with pytest.raises(DataError, match="no docstrings found in bare"):
        build_corpus([bare], tmp_path / "cache", num_processes=1)


def test_unreadable_description_is_explained(tmp_path: Path) -> None:
    (tmp_path / "corpus.json").write_text("{")
    with pytest.raises(DataError, match=r"corpus\.json.*Delete the folder"):
        corpus_info(tmp_path / "corpus.parquet")


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("RECIPE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache_dir() == Path("/home/somebody/.cache/recipe")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_cache_dir() == Path("/xdg/recipe")
    monkeypatch.setenv("RECIPE_CACHE", "~/mine")
    assert default_cache_dir() == Path("/home/somebody/mine")


def test_workers_import_neither_torch_nor_transformers() -> None:
    code = "import json, sys, recipe.data.docstrings; print(json.dumps(sorted(sys.modules)))"
    root = Path(docstrings.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert {"torch", "transformers"}.isdisjoint(json.loads(done.stdout))
