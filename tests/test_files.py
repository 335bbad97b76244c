"""Files over HTTP, from a loopback server: what moves, and what a failing network costs; and the cache of indices."""

import itertools
import json
import logging
import os
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recipe.data import files, formats
from recipe.data.collator import DataCollatorForPackedRows
from recipe.data.files import RETRY_SECONDS, open_file
from recipe.data.formats import FOOTER_BYTES
from recipe.data.lanes import Split
from recipe.data.loader import BatchLoader
from recipe.data.source import open_source
from recipe.data.stream import Part, RowStream
from recipe.errors import DataError, UserError
from tests.range_server import RangeServer

NUM_DOCUMENTS, DOCUMENTS_PER_GROUP = 240, 12
TEXTS = [f"<{i:03}> " + chr(97 + i % 26) * 994 for i in range(NUM_DOCUMENTS)]  # 1000 bytes each


@pytest.fixture(autouse=True)
def slept(tmp_path, monkeypatch):
    """Caches in a folder of the test; seconds that a retry would have waited."""
    seconds = []
    monkeypatch.setenv("RECIPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("recipe.data.files.time.sleep", seconds.append)
    return seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`a.parquet` with a wide column beside the text, `a.jsonl` with the same documents."""
    folder = tmp_path_factory.mktemp("data")
    table = pa.table({"wide": [bytes(4000)] * NUM_DOCUMENTS, "text": TEXTS})
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}  # equal documents, equal bytes
    pq.write_table(table, folder / "a.parquet", row_group_size=DOCUMENTS_PER_GROUP, **plain)
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return folder


@pytest.fixture(scope="module")
def running_server(folder):
    with RangeServer(folder) as server:
        yield server


@pytest.fixture
def server(running_server):
    running_server.reset()
    formats.close_parquet()
    return running_server


def read_all(source):
    return [text for chunk in source.chunks for text in source.read_chunk(chunk)]


def first_rows(source, tokenizer, num_rows=40, num_workers=0, num_lanes=4, train_skip=0):
    stream = RowStream([Part(source, Split(42, start=train_skip))], tokenizer, 256, num_lanes)
    loader = BatchLoader(stream, DataCollatorForPackedRows(256), 1, num_workers)
    return np.concatenate([batch["input_ids"] for batch in itertools.islice(loader, num_rows)])


# --- what moves


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "*.parquet"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_rows_over_http_are_those_of_the_local_file(server, folder, tokenizer, name, num_workers):
    expected = first_rows(open_source(f"{folder}/{name}"), tokenizer)
    found = first_rows(open_source(f"{server.url}/{name}"), tokenizer, num_workers=num_workers)
    assert np.array_equal(found, expected)


def test_parquet_moves_its_footer_and_the_text_of_the_row_groups_opened(server, folder):
    source = open_source(f"{server.url}/a.parquet")
    assert source.read_chunk(source.chunks[3]) + source.read_chunk(source.chunks[7]) == TEXTS[36:48] + TEXTS[84:96]
    metadata = pq.read_metadata(folder / "a.parquet")
    columns = [metadata.row_group(number).column(1) for number in (3, 7)]
    footer = ((folder / "a.parquet").stat().st_size - FOOTER_BYTES, FOOTER_BYTES)
    moved = [(request.start, request.bytes_sent) for request in server.requests() if request.bytes_sent]
    assert [piece for piece in moved if piece != footer] == [
        (column.data_page_offset, column.total_compressed_size) for column in columns
    ]
    assert moved.count(footer) == 2  # for the index, and by the handle that reads


def test_a_glob_moves_footers_alone(server):
    open_source(f"{server.url}/*.parquet")
    sent = [request.bytes_sent for request in server.requests() if request.path.endswith(".parquet")]
    assert max(sent) == FOOTER_BYTES


def test_a_skip_to_the_far_end_moves_no_more_than_one_to_the_start(server, tokenizer):
    source, moved = open_source(f"{server.url}/a.parquet"), []
    for train_skip in (0, NUM_DOCUMENTS - 3 * DOCUMENTS_PER_GROUP):
        formats.close_parquet()
        server.reset()
        first_rows(source, tokenizer, 1, num_lanes=1, train_skip=train_skip)
        moved.append(server.bytes_sent())
    assert moved[0] == moved[1] < FOOTER_BYTES + 2 * DOCUMENTS_PER_GROUP * 1000


def test_the_index_of_a_jsonl_file_moves_it_once_and_a_chunk_moves_its_own_bytes(server, folder):
    source = open_source(f"{server.url}/a.jsonl")
    assert server.bytes_sent() == (folder / "a.jsonl").stat().st_size
    server.reset()
    chunk = source.chunks[9]
    assert source.read_chunk(chunk) == TEXTS[chunk.first_document : chunk.stop_document]
    assert [(r.start, r.bytes_sent) for r in server.requests() if r.bytes_sent] == [(chunk.position, chunk.num_bytes)]


# --- a network that fails


@pytest.mark.parametrize("how", ["503", "close"])
@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_a_read_goes_on_when_the_server_comes_back(server, slept, caplog, how, name):
    source = open_source(f"{server.url}/{name}")
    server.fail_next(5, how)
    with caplog.at_level(logging.WARNING):
        assert read_all(source) == TEXTS
    assert slept and slept == list(RETRY_SECONDS[: len(slept)])
    assert [record.levelname for record in caplog.records] == ["WARNING"] * len(slept)
    assert all(f"/{name}: " in record.message and "trying again" in record.message for record in caplog.records)


@pytest.mark.parametrize("how", ["503", "close"])
@pytest.mark.parametrize("name", ["a.parquet", "*.jsonl"])
def test_a_source_is_opened_when_the_server_comes_back(server, slept, how, name):
    server.fail_next(5, how)
    assert open_source(f"{server.url}/{name}").num_documents == NUM_DOCUMENTS and slept


@pytest.mark.parametrize("name", ["a.parquet", "*.parquet"])
def test_a_source_that_never_answers_is_one_data_error(server, slept, name):
    server.fail_next(1000)
    with pytest.raises(DataError, match=r"/(a|\*)\.parquet.*503"):
        open_source(f"{server.url}/{name}")
    assert slept == list(RETRY_SECONDS)


def test_a_file_that_fails_for_good_is_one_data_error_with_file_documents_and_reason(server, slept):
    source = open_source(f"{server.url}/a.parquet")
    server.fail_next(1000)
    with pytest.raises(DataError, match=r"a\.parquet: cannot read documents 24 to 35 .*503"):
        source.read_chunk(source.chunks[2])
    assert slept == list(RETRY_SECONDS)


def test_the_last_try_is_a_data_error_too(server, monkeypatch):
    source = open_source(f"{server.url}/a.parquet")
    monkeypatch.setattr(files, "RETRY_SECONDS", ())
    server.fail_next(9)
    with pytest.raises(DataError, match=r"a\.parquet: cannot read documents 0 to 11"):
        source.read_chunk(source.chunks[0])


def test_what_is_not_there_at_the_start_is_not_tried_again(server, slept):
    with pytest.raises(UserError, match="no such file"):
        open_source(f"{server.url}/b.parquet")
    assert slept == []


def test_what_is_gone_later_is(server, folder, slept):
    (folder / "gone.jsonl").write_text('{"text": "a"}')
    source = open_source(f"{server.url}/gone.jsonl")
    (folder / "gone.jsonl").unlink()
    with pytest.raises(DataError, match=r"gone\.jsonl: cannot read documents 0 to 0 \(not found"):
        source.read_chunk(source.chunks[0])
    assert slept == list(RETRY_SECONDS)


def test_a_server_without_ranges_is_refused_in_words(folder, monkeypatch):
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    monkeypatch.setattr(ThreadingHTTPServer, "handle_error", lambda *_: None)  # the client hangs up
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(folder))) as plain:
        threading.Thread(target=plain.serve_forever, daemon=True).start()
        with pytest.raises(DataError, match=r"a\.parquet: .*range requests"):
            open_source(f"http://127.0.0.1:{plain.server_port}/a.parquet")
        plain.shutdown()


# --- the cache of indices


@pytest.fixture
def opened(monkeypatch):
    """The paths that were opened to be read."""
    paths = []
    monkeypatch.setattr(formats, "open_file", lambda path: paths.append(path) or open_file(path))
    return paths


def rewrite(path, text):
    """Another content, and a time of change that a coarse clock could not tell from the first."""
    nanoseconds = path.stat().st_mtime_ns + 1
    path.write_text(text)
    os.utime(path, ns=(nanoseconds, nanoseconds))


def test_a_file_is_read_for_its_index_once(folder, opened):
    first = open_source(f"{folder}/a.jsonl")
    assert opened == [f"{folder}/a.jsonl"]
    assert open_source(f"{folder}/a.jsonl") == first and len(opened) == 1
    assert read_all(first) == TEXTS


def test_a_remote_file_is_read_for_its_index_once(server, opened):
    first = open_source(f"{server.url}/a.jsonl")
    assert open_source(f"{server.url}/a.jsonl") == first and len(opened) == 1


def test_a_changed_file_of_the_same_size_is_indexed_anew(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    first = open_source(str(path))
    rewrite(path, json.dumps({"text": "x" * 19}) + "\n")
    second = open_source(str(path))
    assert second.files[0].num_bytes == first.files[0].num_bytes and second.fingerprint != first.fingerprint
    assert read_all(second) == ["x" * 19]


def test_a_touched_file_keeps_its_fingerprint(tmp_path, opened):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    first = open_source(str(path))
    rewrite(path, path.read_text())
    second = open_source(str(path))
    assert second.fingerprint == first.fingerprint and second.chunks == first.chunks and len(opened) == 2
    assert second.files[0].modified != first.files[0].modified


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"chunks": [[0]], "content": ""}', b'{"chunks": 3}'])
def test_a_corrupt_cache_file_costs_time_alone(folder, tmp_path, opened, content):
    first = open_source(f"{folder}/a.jsonl")
    (cache,) = (tmp_path / "cache/index").iterdir()
    cache.write_bytes(content)
    assert open_source(f"{folder}/a.jsonl") == first and len(opened) == 2
    assert open_source(f"{folder}/a.jsonl") == first and len(opened) == 2  # it has been written again


def test_a_cache_that_cannot_be_written_costs_time_alone(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RECIPE_CACHE", str(tmp_path / "file/cache"))
    assert read_all(open_source(f"{folder}/a.jsonl")) == read_all(open_source(f"{folder}/a.jsonl")) == TEXTS


def test_a_parquet_file_written_anew_is_read_anew(write_parquet):
    for texts in (["first"] * 20, ["and", "the second"] * 300):
        assert read_all(open_source(write_parquet(0, texts=texts))) == texts
