"""A loopback HTTP server with range requests over one folder, which counts what it sends and can be told to fail.

It stands for the web in tests and benchmarks:

    with RangeServer(folder) as server:
        source = open_source(f"{server.url}/part-*.parquet")
"""

import re
import socket
import struct
import threading
from contextlib import suppress
from dataclasses import dataclass, replace
from email.utils import formatdate
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

SEND_BYTES = 1 << 16
FAULTS_OF_THE_BODY = ("reset", "short", "stall", "no range", "page")  # a HEAD request has none


@dataclass
class Request:
    """One request; `status` is 0 where the connection was closed without an answer.

    `start`: offset in the file of the first byte asked for; `bytes_sent`: bytes of the body handed to the socket.
    """

    method: str
    path: str
    status: int = 0
    start: int = 0
    bytes_sent: int = 0


class RangeServer:
    """Serves `folder` at `url` (`http://127.0.0.1:PORT`) as long as the `with` block lasts; folders are listed."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).resolve()
        self._requests: list[Request] = []
        self._failures: list[str | None] = []
        self._lock = threading.Lock()
        self.is_over = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": self}))
        self._server.daemon_threads = True  # a client that keeps its connection open must not hold up the end
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "RangeServer":
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.is_over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def requests(self, path: str | None = None) -> list[Request]:
        """All requests since the last `reset`, as they came in; of one path (`/a.parquet`) if given."""
        with self._lock:
            return [replace(request) for request in self._requests if path in (None, request.path)]

    def bytes_sent(self, path: str | None = None) -> int:
        return sum(request.bytes_sent for request in self.requests(path))

    def reset(self) -> None:
        """Forget the requests so far, and the failures still to come."""
        with self._lock:
            self._requests, self._failures = [], []

    def fail_next(self, count: int, how: str = "503") -> None:
        """Answer the next `count` requests in another way.

        A status ("401", "503"): that status. "close": no answer, a closed connection. "reset": half of the body, then
        a connection reset. "short": half of the body, then the end. "stall": headers, then nothing for as long as the
        server lives. "no range": status 200 and the whole file. "page": status 200 and a page of HTML.
        """
        with self._lock:
            self._failures += [how] * count

    def fail_after(self, begin: int, how: str, count: int) -> None:
        """As `fail_next`, from the `begin`th request on."""
        with self._lock:
            self._failures += [None] * begin + [how] * count

    def _begin(self, request: Request) -> str | None:
        """Notes the request; returns how it is to fail, if it is."""
        with self._lock:
            self._requests.append(request)
            is_due = self._failures and (request.method == "GET" or self._failures[0] not in FAULTS_OF_THE_BODY)
            return self._failures.pop(0) if is_due else None

    def _count(self, request: Request, num_bytes: int) -> None:
        with self._lock:
            request.bytes_sent += num_bytes


class _Handler(BaseHTTPRequestHandler):
    owner: RangeServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a small answer waits 40 ms for the client's acknowledgement

    def handle(self) -> None:
        with suppress(OSError, ValueError):  # the client has what it wanted and hung up, or the test has reset it
            super().handle()

    def do_GET(self) -> None:
        self._request = Request(self.command, unquote(urlsplit(self.path).path))
        self._failure = self.owner._begin(self._request)
        if self._failure == "close":
            self.close_connection = True
        elif self._failure == "page":
            self._send(HTTPStatus.OK, {"Content-Type": "text/html"}, b"<html>Log in to the network</html>")
        elif self._failure and self._failure.isdigit():
            self._send(HTTPStatus(int(self._failure)), {})
        else:
            self._send_path(self.owner.folder / self._request.path.lstrip("/"))

    do_HEAD = do_GET

    def _send_path(self, path: Path) -> None:
        if not path.resolve().is_relative_to(self.owner.folder) or not path.exists():
            self._send(HTTPStatus.NOT_FOUND, {})
        elif path.is_dir():
            names = sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir())
            links = "".join(f'<a href="{quote(name)}">{escape(name)}</a>\n' for name in names)
            self._send(HTTPStatus.OK, {"Content-Type": "text/html; charset=utf-8"}, links.encode())
        else:
            self._send_file(path)

    def _send_file(self, path: Path) -> None:
        facts = path.stat()
        headers = {
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
            "ETag": f'"{facts.st_mtime_ns:x}-{facts.st_size:x}"',
            "Last-Modified": formatdate(facts.st_mtime, usegmt=True),
        }
        asked = parse_range(None if self._failure == "no range" else self.headers.get("Range"), facts.st_size)
        if asked is None:
            self._send(HTTPStatus.OK, headers, path, 0, facts.st_size)
        elif asked[0] >= asked[1]:
            self._send(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, {"Content-Range": f"bytes */{facts.st_size}"})
        else:
            headers["Content-Range"] = f"bytes {asked[0]}-{asked[1] - 1}/{facts.st_size}"
            self._send(HTTPStatus.PARTIAL_CONTENT, headers, path, *asked)

    def _send(self, status: int, headers: dict, body: bytes | Path = b"", start: int = 0, stop: int | None = None):
        stop = len(body) if stop is None else stop
        self._request.status, self._request.start = int(status), start
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(stop - start)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if isinstance(body, bytes):
            self._send_piece(body)
            return
        if self._failure in ("reset", "short", "stall"):
            self._break_off(body.read_bytes()[start : (start + stop) // 2])
            return
        with body.open("rb") as file:
            file.seek(start)
            for place in range(start, stop, SEND_BYTES):
                self._send_piece(file.read(min(SEND_BYTES, stop - place)))

    def _break_off(self, piece: bytes) -> None:
        self.close_connection = True
        if self._failure == "stall":
            self.owner.is_over.wait()
            return
        self._send_piece(piece)
        if self._failure == "reset":  # closing with a linger of 0 s sends RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def _send_piece(self, piece: bytes) -> None:
        self.owner._count(self._request, len(piece))  # before the client can know, so that no test has to wait
        self.wfile.write(piece)

    def log_message(self, *arguments) -> None:
        """Silence: `requests` is the log."""


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """`[start, stop)` of a Range header, empty where it lies behind the end; None for the whole file.

    Of 10 bytes: `bytes=2-4` is (2, 5), `bytes=7-` and `bytes=-3` are (7, 10). Several ranges at once are answered
    with the whole file, as HTTP allows.
    """
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(size, int(last) + 1) if last else size
