"""Every kind of source, and every kind of bad one."""

import json
from pathlib import Path

import pytest

from recipe.data.formats import TEXT_DOCUMENT_BYTES
from recipe.data.source import cut_chunks, open_source
from recipe.errors import DataError, UserError


def read_all(source):
    return [text for chunk in source.chunks for text in source.read_chunk(chunk)]


def test_parquet_documents_have_the_index_of_their_place_over_all_files(write_parquet):
    texts = [f"document {i}" for i in range(57)]
    source = open_source(write_parquet(0, rows_per_group=4, num_files=3, texts=texts))
    assert read_all(source) == texts and source.num_documents == 57
    assert [chunk.first_document for chunk in source.chunks][:3] == [0, 4, 8]


def test_cut_chunks_reads_the_same_documents(write_parquet):
    source = open_source(write_parquet(50, rows_per_group=50))
    cut = cut_chunks(list(source.chunks), at_least=16)
    pieces = [text for chunk in cut for text in source.read_chunk(chunk)]
    assert len(cut) >= 16 and pieces == read_all(source)


def test_null_rows_keep_their_index(write_parquet):
    assert read_all(open_source(write_parquet(0, texts=["a", None, "c"]))) == ["a", "", "c"]


def test_jsonl(tmp_path):
    texts = [f"line {i} é\n" * (1 + i % 900) for i in range(300)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps({"text": text}) for text in texts) + "\n")
    source = open_source(str(tmp_path / "a.jsonl"))
    assert len(source.chunks) > 1 and read_all(source) == texts


def test_text_is_cut_at_its_end_of_text_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\nstill one\n<|endoftext|>\ntwo\n<|endoftext|>\nthree")
    assert read_all(open_source(str(tmp_path / "a.txt"))) == ["one\n\nstill one", "two", "three"]


def test_long_text_without_marks_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path):
    text = "\n".join("word " * 20 + ("\n" if i % 5 == 0 else "") for i in range(12_000))
    (tmp_path / "book.txt").write_text(text)
    source = open_source(str(tmp_path / "book.txt"))
    documents = read_all(source)
    assert len(source.chunks) > 1
    assert all(TEXT_DOCUMENT_BYTES <= len(document) + 200 < 2 * TEXT_DOCUMENT_BYTES for document in documents[:-1])
    assert "".join(documents).split() == text.split()


def test_a_folder_is_all_its_files_and_a_url_is_a_file(write_parquet, tmp_path):
    write_parquet(20, num_files=2)
    assert open_source(str(tmp_path)).num_documents == 20
    assert open_source(f"file://{tmp_path}/part-00.parquet").num_documents == 10


def test_the_fingerprint_changes_with_the_files(write_parquet):
    first = open_source(write_parquet(20)).fingerprint
    assert first == open_source(write_parquet(20)).fingerprint != open_source(write_parquet(21)).fingerprint


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.docx", "x", "unknown format '.docx'; known: .parquet, .*; plain text must be named .txt"),
        ("a.txt", "%PDF-1.4", "is a PDF, not text"),
        ("a.jsonl", "", "without a single document"),
    ],
)
def test_files_that_cannot_be_meant(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path / name))


@pytest.mark.parametrize("source", ["missing.parquet", "none/*.parquet", "nonsense"])
def test_no_such_file(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        open_source(source)


def test_a_near_name_is_proposed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="did you mean --source docstrings"):
        open_source("docstring")


def test_a_missing_column_names_the_nearest(write_parquet):
    with pytest.raises(UserError, match=r"no column 'text'; it has content; did you mean --text_column content\?"):
        open_source(write_parquet(5, column="content"))


def test_mixed_formats_are_refused(tmp_path, write_parquet):
    write_parquet(5)
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="mixes jsonl and parquet"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ("not json", DataError, "document 1, line 2, is not JSON"),
        ('{"txt": "a"}', UserError, r"no key 'text'; it has txt, where others have it; --on_bad_data skip would do"),
        ('{"text": 5}', UserError, "holds int, neither text nor a list of token ids"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, error, message):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(error, match=message):
        read_all(open_source(str(tmp_path / "a.jsonl")))


def test_a_file_that_is_not_parquet(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match=r"a\.parquet: cannot be opened"):
        open_source(str(tmp_path / "a.parquet"))


def test_flipped_bytes_inside_a_page(tmp_path, write_parquet):
    source = open_source(write_parquet(200, rows_per_group=200))
    path = tmp_path / "part-00.parquet"
    data = bytearray(path.read_bytes())
    data[40:240] = bytes(200)
    path.write_bytes(data)
    with pytest.raises(DataError, match="documents 0 to 199"):
        read_all(source)


def test_a_hub_that_cannot_be_reached_names_the_source_that_needs_none():
    with pytest.raises(DataError, match="hub cannot be reached .*--source docstrings"):
        open_source("hf://HuggingFaceFW/fineweb-edu/sample-10BT")


def test_a_hub_name_needs_an_owner():
    with pytest.raises(UserError, match="hf://OWNER/NAME"):
        open_source("hf://fineweb")


def test_a_hub_dataset_is_read_from_the_files_of_its_train_split(write_parquet, monkeypatch):
    """The hub cannot be reached from a test; what `datasets` answers there is a list of URLs that fsspec opens."""
    from types import SimpleNamespace

    import datasets

    files = [f"file://{path}" for path in sorted(Path(write_parquet(30, num_files=2)).parent.glob("*.parquet"))]
    asked = []

    def load_dataset_builder(path, name):
        asked.append((path, name))
        return SimpleNamespace(config=SimpleNamespace(data_files={"train": files}))

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    source = open_source("hf://HuggingFaceFW/fineweb-edu/sample-10BT")
    assert asked == [("HuggingFaceFW/fineweb-edu", "sample-10BT")]
    assert source.num_documents == 30 and read_all(source) == read_all(open_source(files[0])) + read_all(
        open_source(files[1])
    )
    assert open_source("hf://owner/name").num_documents == 30 and asked[-1] == ("owner/name", None)
