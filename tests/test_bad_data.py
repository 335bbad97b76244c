"""Data that cannot be used, each in one message that says what, where and how to fix it; and odd data that can."""

import gzip
import itertools
import json
import multiprocessing

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import document
from recipe.__main__ import run
from recipe.data.formats import TokenIds
from recipe.data.lanes import Split
from recipe.data.packing import Document, pack, tokenize
from recipe.data.source import open_source
from recipe.data.stream import Part, RowStream
from recipe.errors import DataError, UserError

EOS = 256


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("RECIPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("recipe.trainer.SampleCallback.__init__.__defaults__", (4,))  # short samples


def read_all(source):
    return [content for chunk in source.chunks for content in source.read_chunk(chunk)]


def read_column(path, values, rows_per_group=100):
    pq.write_table(pa.table({"text": values}), path, row_group_size=rows_per_group)
    return read_all(open_source(str(path)))


def first_rows(contents, tokenizer, block_size, count):
    documents = [
        Document(i, content, {"pass": 0, "chunk": 0, "document": i, "token": 0}) for i, content in enumerate(contents)
    ]
    return list(itertools.islice(pack(tokenize(documents, tokenizer), block_size), count))


# --- files


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', DataError, r"document 1 is not UTF-8 .* byte 10\); fix or"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b\\ud83d"}\n', DataError, "document 1, line 3, .* surrogates not"),
        ("a.jsonl", b'{"text": "\xed\xa0\x80"}\n', DataError, "document 0 is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n' + b"\0" * 10, DataError, "document 1, line 2, is not JSON .*; fix or remove"),
        ("a.jsonl", b"[" * 100_000, DataError, "is not JSON"),
        ("a.json", b'[{"text": "a"}, {"text": ', DataError, "is not JSON .*; fix or remove that line"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', UserError, "document 1, line 2, has no key 'text'"),
        ("a.jsonl", b'{"txt": "a"}\n', UserError, r"did you mean --text_column txt\?"),
        ("a.jsonl", b'{"text": 1.5}\n', UserError, "document 0: 'text' holds float"),
        ("a.jsonl", b'{"text": [1]}\n{"text": [1, null]}\n', UserError, "document 1: 'text' holds list, neither"),
        ("a.jsonl", b'{"text": [1]}\n{"text": [3000000000]}\n', DataError, "document 1.*3000000000"),
        ("a.jsonl", b"\n" * 9000, UserError, "without a single document"),
        ("a.txt", b"a\n<|endoftext|>\nb\xff\n", DataError, r"document 1 is not UTF-8 .* byte 1\); fix or remove it"),
        ("a.txt", b"", UserError, "without a single document"),
        ("a.parquet", b"", DataError, r": cannot be opened .*; replace the file, or leave it out"),
        (
            "a.txt.gz",
            gzip.compress(b"text " * 99, mtime=0)[:-9],
            DataError,
            "cannot be .*; replace the file, or leave it out",
        ),
        ("a.txt", bytes(range(256)) * 9, UserError, "is binary, not text"),
    ],
)
def test_a_bad_file_is_one_message(tmp_path, name, content, error, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=f"(?s){name}.*{message}"):
        read_all(open_source(str(tmp_path / name)))


def test_an_empty_glob_is_no_such_file(tmp_path):
    with pytest.raises(UserError, match=r"\*\.parquet': no such file; a source is"):
        open_source(f"{tmp_path}/*.parquet")


# --- parquet


def broken_text(kind):
    """Three strings, the second of them no UTF-8, as a careless writer leaves them."""
    size = pa.int32() if kind == pa.string() else pa.int64()
    offsets = pa.array([0, 2, 4, 6], size).buffers()[1]
    return pa.Array.from_buffers(kind, 3, [None, offsets, pa.py_buffer(b"ok\xff\xfeok")])


IDS, LARGE = pa.list_(pa.int32()), pa.list_(pa.int64())


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (broken_text(pa.string()), DataError, "document 1 is not UTF-8"),
        (broken_text(pa.large_string()), DataError, "document 1 is not UTF-8"),
        (pa.array([1.5]), UserError, "column 'text' holds double, neither text nor lists"),
        (pa.array([[1.5]]), UserError, "column 'text' holds list<.*double>, neither text nor lists"),
        (pa.array([], pa.string()), UserError, "without a single document"),
        (pa.array([[5], [1, None]], IDS), DataError, "document 1 has a null among its token ids; remove it"),
        (pa.array([[5], [2**32 + 5]], LARGE), DataError, "4294967301"),
    ],
)
def test_a_bad_column_is_one_message(tmp_path, values, error, message):
    with pytest.raises(error, match=rf"a\.parquet.*{message}"):
        read_column(tmp_path / "a.parquet", values)


@pytest.mark.parametrize("column", ["a.b", "text"])
def test_a_column_that_cannot_be_told_from_another_is_read_or_refused(tmp_path, column):
    table = pa.table([pa.array(["x"]), pa.array(["y"])], names=[column, "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    if column == "a.b":
        assert read_all(open_source(str(tmp_path / "a.parquet"), column)) == ["x"]
    else:
        with pytest.raises(UserError, match="two columns named 'text'|'text'.* twice"):
            open_source(str(tmp_path / "a.parquet"), column)


@pytest.mark.parametrize("cut", [slice(None, -4), slice(None, -100), slice(50, None)])
def test_a_truncated_file_is_one_message(tmp_path, write_parquet, cut):
    write_parquet(200)
    path = tmp_path / "part-00.parquet"
    path.write_bytes(path.read_bytes()[cut])
    with pytest.raises(DataError, match=r"part-00\.parquet: cannot .*; replace the file, or leave it out of `source`"):
        read_all(open_source(str(path)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_corrupt_row_groups_end_a_run_with_code_4_and_no_traceback(write_config, tmp_path, capfd, num_workers):
    path = tmp_path / "zstd.parquet"
    table = pa.table({"text": [document(i) for i in range(300)]})
    pq.write_table(table, path, row_group_size=10, compression="zstd", use_dictionary=False)
    data, metadata = bytearray(path.read_bytes()), pq.read_metadata(path)
    for number in range(28):  # those of train; eval reads group 28
        column = metadata.row_group(number).column(0)
        stop = column.data_page_offset + column.total_compressed_size
        data[stop - 40 : stop] = bytes(40)
    path.write_bytes(data)
    assert run(["train", write_config(source=str(path)), "--dataloader_num_workers", str(num_workers)]) == 4
    for (
        worker
    ) in multiprocessing.active_children():  # the traceback's DataLoader would wait 5 s for each, at some time
        worker.terminate()
        worker.join()
    error = capfd.readouterr().err
    assert "Traceback" not in error and error.count("error: ") == 1
    assert "zstd.parquet: cannot read documents " in error and "; replace the file" in error


# --- token ids


def test_token_ids_come_as_they_are_and_null_lists_are_empty(tmp_path):
    expected = [[1], [], [2, 3], []]
    for number, kind in enumerate((IDS, LARGE, pa.large_list(pa.uint16()))):
        found = read_column(tmp_path / f"{number}.parquet", pa.array([[1], None, [2, 3], []], kind), rows_per_group=3)
        assert [content.ids.tolist() for content in found] == expected and {
            content.ids.dtype for content in found
        } == {np.dtype(np.int32)}
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": ids}) for ids in expected))
    assert [content.ids.tolist() for content in read_all(open_source(str(tmp_path / "a.jsonl")))] == expected


def test_ids_that_end_with_eos_get_no_second(tokenizer):
    contents = [TokenIds(np.array(ids, np.int32)) for ids in ([1, 2, EOS], [3], [EOS], [])]
    (row,) = first_rows(contents, tokenizer, block_size=6, count=9)
    assert row.input_ids.tolist() == [1, 2, EOS, 3, EOS, EOS]


@pytest.mark.parametrize("bad", [257, -1])
def test_ids_that_the_tokenizer_has_not_name_file_and_document(tmp_path, tokenizer, bad):
    pq.write_table(pa.table({"text": pa.array([[1], [2], [3, bad]], IDS)}), tmp_path / "a.parquet")
    stream = RowStream([Part(open_source(str(tmp_path / "a.parquet")), Split(42))], tokenizer, 4, 1)
    with pytest.raises(DataError, match=r"document 2 has token ids from .*the tokenizer has 257; name") as caught:
        list(itertools.islice(stream, 3))
    assert "a.parquet" in str(caught.value)


# --- empty and huge documents


@pytest.mark.parametrize("nothing", ["", None])
def test_documents_without_text_leave_the_others_their_index(write_parquet, tokenizer, nothing):
    source = open_source(write_parquet(0, texts=[document(i) if i % 2 else nothing for i in range(60)]))
    rows = list(itertools.islice(RowStream([Part(source, Split(42))], tokenizer, 16, 4), 60))
    assert {index % 2 for row in rows for index in row.documents} == {1}
    piece = next(piece for row in rows for piece in row.pieces if piece.first_token == 0)
    assert read_all(source)[piece.document].startswith(f"<{piece.document}> ")


def test_a_run_on_nothing_but_empty_documents_is_one_message(write_config, tmp_path, capfd):
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n' * 3000)
    assert run(["train", write_config(source=str(tmp_path / "empty.jsonl"))]) == 2
    error = capfd.readouterr().err
    assert error.count("error: ") == 1 and "none of its 10 documents has text" in error


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet"])
def test_a_document_of_10_mb_passes_through(tmp_path, name):
    huge, path = "words and é " * 800_000, tmp_path / name
    texts = ["first", huge + "end", "last"]
    if name == "a.parquet":
        assert read_column(path, texts) == texts
    else:
        is_text = name == "a.txt"
        path.write_text(
            "\n<|endoftext|>\n".join(texts) if is_text else "\n".join(json.dumps({"text": t}) for t in texts)
        )
        assert read_all(open_source(str(path))) == texts


def test_a_huge_document_is_packed_without_loss(tokenizer):
    text = "words and more " * 70_000
    rows = first_rows([text], tokenizer, block_size=1000, count=10_000)
    found = np.concatenate([row.input_ids for row in rows])
    assert len(rows) == len(text) // 1000 and tokenizer.decode(found.tolist()) == text[: len(found)]


def test_white_space_in_a_text_file_costs_no_more_than_words(tmp_path):
    """A pattern that tries each place of a run of blanks anew would take half a minute over this one."""
    (tmp_path / "a.txt").write_text("a" + " " * 100_000 + "b")
    assert len(read_all(open_source(str(tmp_path / "a.txt")))[0]) == 100_002


# --- `source` in the configuration


def test_fewer_chunks_than_lanes_name_a_number_that_would_do(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": document(i)}) + "\n" for i in range(200)))
    source = open_source(str(tmp_path / "a.jsonl"))
    with pytest.raises(
        UserError, match=rf"in {len(source.chunks)} pieces, too few for 32 lanes; --num_lanes auto would"
    ):
        RowStream([Part(source, Split(42))], tokenizer, 16, 32)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "got an empty list"),
        ([{"weight": 1}], "source: entry 0 must be an object with a path"),
        (["a.parquet"], "source: entry 0 must be an object with a path"),
        ([{"path": "a"}, {"path": "b", "wieght": 1}], "source: entry 1: wieght: unknown key; did you mean weight?"),
        ([{"path": "a", "weight": 0}], "source: entry 0: weight: must be"),
        ([{"path": "a", "weight": "0.5"}], "source: entry 0: weight: expected a number"),
        ([{"path": "part-*.parquet"}, {"path": "part-00.parquet"}], "part-00.parquet is named twice, in "),
        ([{"path": "part-00.parquet"}, {"path": "part-01.parquet"}], "part-01.parquet', which has 20 documents; "),
    ],
)
def test_a_list_of_sources_that_cannot_be_meant(write_config, tmp_path, capfd, source, message):
    for number, count in enumerate((300, 20)):
        table = pa.table({"text": [document(i) for i in range(count)]})
        pq.write_table(table, tmp_path / f"part-{number:02}.parquet", row_group_size=10)
    assert run(["train", write_config(source=source)]) == 2
    error = capfd.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_page_with_a_checksum_that_does_not_hold_is_not_trained_on(tmp_path):
    """Flipped bytes that still decode are seen where the file's writer left checksums."""
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"document {number} of plain words" for number in range(200)]})
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    place = data.index(b"document 100")
    data[place : place + 8] = b"DOCUMENT"
    path.write_bytes(data)
    with pytest.raises(DataError, match="cannot read documents 0 to 199"):
        read_all(open_source(str(path)))


def test_a_folder_named_like_a_file_is_read_as_a_folder(tmp_path):
    (tmp_path / "spark.parquet").mkdir()
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "spark.parquet/part-0.parquet")
    assert read_all(open_source(str(tmp_path / "spark.parquet"))) == ["a", "b"]


def test_a_list_that_is_no_json_says_so(write_config, capsys):
    assert run(["verify-data", write_config(), "--source", '[{"path": "a"']) == 2
    assert "looks like a list of sources, but is no JSON" in capsys.readouterr().err
