"""`recipe report RUN --watch`: the report on loopback, made again as the run goes on."""

import contextlib
import html
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from recipe.errors import UserError
from recipe.report import RUN_FILES, folder_of, make_report

HOST, TRIES = "127.0.0.1", 20
RUNS = 300  # seconds without a new line after which a run without a result is not called running. Chosen.
SECONDS = 3  # between a page's questions whether there is something new
# The page stays where it was scrolled to. A hidden tab asks nothing.
RELOAD = """<script>
setInterval(async () => {
  if (document.hidden) return;
  try {
    const now = await (await fetch("/state")).text();
    if (now !== "%s") location.reload();
  } catch { document.title = "(ended) " + document.title.replace(/^\\(ended\\) /, "") }
}, %d);
</script>
</body>"""


def watch(run_dir: Path, port: int) -> None:
    """Serves the report until Ctrl-C. UserError where there is no run, or no free port."""
    folder = folder_of(run_dir)
    make_report(folder)  # a folder without a run is refused now
    with open_server(folder, port) as server:
        print(f"http://{HOST}:{server.server_port}/  follows {run_dir}; Ctrl-C ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("\nended", flush=True)


class Server(ThreadingHTTPServer):
    def __init__(self, port: int, folder: Path):
        super().__init__((HOST, port), Page)
        self.folder = folder


def open_server(folder: Path, port: int) -> Server:
    """On `port`, or on the next one that is free."""
    for candidate in range(port, min(port + TRIES, 1 << 16)):
        with contextlib.suppress(OSError):
            return Server(candidate, folder)
    raise UserError(f"--watch {port}: no port from there to {port + TRIES - 1} is free; name another one")


class Page(BaseHTTPRequestHandler):
    """`/`: the page, which asks `/state` and loads itself again when that has changed."""

    def do_GET(self) -> None:
        folder, names = self.server.folder, [f"{name}:{self.server.server_port}" for name in (HOST, "localhost")]
        if self.headers.get("Host") not in names:  # a web site whose name resolves to this machine
            self.send_error(HTTPStatus.FORBIDDEN)
        elif self.path == "/state":
            self._send(state_of(folder), "text/plain")
        elif self.path == "/":
            reload = RELOAD % (state_of(folder), 1000 * SECONDS)  # the state of before the files are read
            self._send(_report_of(folder).replace("</body>", reload), "text/html")
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _send(self, text: str, kind: str) -> None:
        data = text.encode("utf-8", errors="replace")
        with contextlib.suppress(ConnectionError):  # the tab was closed
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, *arguments) -> None:
        """No line for each request."""


def _report_of(folder: Path) -> str:
    try:
        return make_report(folder, is_watched=_newest(folder) > time.time() - RUNS)
    except UserError as error:  # deleted in the meantime
        return f"<!doctype html><title>no run</title><body>{html.escape(str(error))}</body>"


def _newest(folder: Path) -> float:
    return max((file.stat().st_mtime for name in RUN_FILES if (file := folder / name).is_file()), default=0.0)


def state_of(folder: Path) -> str:
    """Changes when a file of the run does."""
    files = [folder / name for name in RUN_FILES]
    return "-".join(f"{file.stat().st_size}.{file.stat().st_mtime_ns}" if file.is_file() else "0" for file in files)
