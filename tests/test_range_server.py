"""The loopback server answers as web servers do, so that what is tested over it holds for the web."""

import http.client
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from urllib.error import HTTPError

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.range_server import RangeServer, parse_range


@pytest.fixture
def server(tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes(range(100)))
    (tmp_path / "sub").mkdir()
    for name in ("x.parquet", "sub/y z.parquet"):
        pq.write_table(pa.table({"text": [name] * 50}), tmp_path / name, row_group_size=10)
    with RangeServer(tmp_path) as server:
        yield server


def get(url: str, method: str = "GET", **headers) -> tuple[int, dict, bytes]:
    with urllib.request.urlopen(urllib.request.Request(url, method=method, headers=headers)) as answer:
        return answer.status, dict(answer.headers), answer.read()


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, None),
        ("bytes=2-4", (2, 5)),
        ("bytes=7-", (7, 10)),
        ("bytes=-3", (7, 10)),
        ("bytes=-30", (0, 10)),
        ("bytes=8-99", (8, 10)),
        ("bytes=10-", (10, 10)),
        ("bytes=0-1,4-5", None),
        ("bytes=-", None),
    ],
)
def test_ranges(header, expected):
    assert parse_range(header, 10) == expected


def test_a_range_comes_with_the_headers_that_clients_read(server):
    status, headers, body = get(f"{server.url}/a.bin", Range="bytes=10-19")
    assert (status, body, headers["Content-Range"]) == (206, bytes(range(10, 20)), "bytes 10-19/100")
    assert headers["Accept-Ranges"] == "bytes" and headers["Content-Length"] == "10"
    status, whole, body = get(f"{server.url}/a.bin", method="HEAD")
    assert (status, body, whole["Content-Length"]) == (200, b"", "100")
    assert whole["ETag"] == headers["ETag"] and whole["Last-Modified"] == headers["Last-Modified"]


def test_refusals(server):
    for path, status in [("none.bin", 404), ("../", 404), ("a.bin", 416)]:
        with pytest.raises(HTTPError) as error:
            get(f"{server.url}/{path}", Range="bytes=100-")
        assert error.value.code == status


def test_it_counts_requests_and_bytes_of_each_path_and_forgets_them(server):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: get(f"{server.url}/a.bin", Range=f"bytes={i}-{i + 9}"), range(40)))
    get(f"{server.url}/x.parquet", method="HEAD")
    requests = server.requests("/a.bin")
    assert sorted(request.start for request in requests) == list(range(40))
    assert {(request.method, request.status, request.bytes_sent) for request in requests} == {("GET", 206, 10)}
    assert len(server.requests()) == 41 and server.bytes_sent() == server.bytes_sent("/a.bin") == 400
    server.reset()
    assert server.requests() == [] and server.bytes_sent() == 0


def test_fsspec_finds_opens_and_lists(server):
    filesystem, path = fsspec.core.url_to_fs(f"{server.url}/x.parquet")
    assert filesystem.exists(path) and not filesystem.exists(f"{server.url}/none.parquet")
    with filesystem.open(path) as file:
        assert pq.ParquetFile(file).read_row_group(3).num_rows == 10
    assert filesystem.glob(f"{server.url}/*.parquet") == [path]
    assert filesystem.glob(f"{server.url}/sub/*.parquet") == [f"{server.url}/sub/y%20z.parquet"]


def test_it_fails_as_often_as_it_is_told(server):
    server.fail_next(1)
    server.fail_next(1, "close")
    with pytest.raises(HTTPError, match="503"):
        get(f"{server.url}/a.bin")
    with pytest.raises(http.client.RemoteDisconnected):
        get(f"{server.url}/a.bin")
    assert get(f"{server.url}/a.bin")[0] == 200
