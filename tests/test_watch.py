"""`recipe report RUN --watch`: the page on loopback, and that it follows the run."""

import json
import os
import threading
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import ThreadingHTTPServer

import pytest

from recipe.__main__ import PORT, run
from recipe.watch import HOST, TRIES, open_server


def write_step(folder, step: int) -> None:
    record = {"step": step, "tokens_seen": step * 100, "loss": 5.0, "tokens_per_second": 10.0, "learning_rate": 1e-3}
    with (folder / "steps.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


@pytest.fixture
def folder(tmp_path):
    write_step(tmp_path, 1)
    return tmp_path


@contextmanager
def serving(folder, port: int = 0):
    with open_server(folder, port) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://{HOST}:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def get(url: str, status: int = 200, **headers: str) -> str:
    host, _, path = url.removeprefix("http://").partition("/")
    connection = HTTPConnection(host, timeout=10)
    connection.request("GET", f"/{path}", headers=headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    assert answer.status == status
    return text


def test_the_page_knows_its_state_and_the_state_changes_with_a_step(folder):
    with serving(folder) as url:
        before, page = get(f"{url}/state"), get(url)
        assert f'now !== "{before}"' in page and page.rstrip().endswith("</html>")
        assert get(f"{url}/state") == before
        write_step(folder, 2)
        assert get(f"{url}/state") != before
        assert "in 2 steps" in get(url) and ">Running<" in get(url)
        os.utime(folder / "steps.jsonl", (0, 0))  # nothing has come for a long time
        assert ">Unfinished<" in get(url)
    assert not (folder / "report.html").exists()  # nothing is written beside a run that goes on


def test_only_this_machine_and_only_two_pages(folder):
    with serving(folder) as url:
        assert url.startswith("http://127.0.0.1:")
        get(f"{url}/steps.jsonl", status=404)
        get(url, status=403, Host="attacker.example")  # a site whose name resolves to this machine


def test_a_run_that_is_deleted_meanwhile(folder):
    with serving(folder) as url:
        (folder / "steps.jsonl").unlink()
        assert "no run in" in get(url)


def test_the_next_free_port_is_taken_or_none_is_there(folder, monkeypatch, capsys):
    with open_server(folder, 0) as first, open_server(folder, first.server_port) as second:
        assert first.server_port < second.server_port < first.server_port + TRIES

    def is_taken(*arguments):
        raise OSError("Address already in use")

    monkeypatch.setattr("recipe.watch.Server", is_taken)
    assert run(["report", str(folder), "--watch", "9000"]) == 2
    message = "error: --watch 9000: no port from there to 9019 is free; name another one\n"
    assert capsys.readouterr().err == message


def test_ctrl_c_ends_it(folder, monkeypatch, capsys):
    def interrupted(server):
        raise KeyboardInterrupt

    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", interrupted)
    assert run(["report", str(folder), "--watch"]) == 0
    begin, end = capsys.readouterr().out.splitlines()[::2]
    assert begin.startswith(f"http://{HOST}:") and int(begin.split(":")[2].split("/")[0]) in range(PORT, PORT + TRIES)
    assert end == "ended"


@pytest.mark.parametrize("words", [["--watch", "x"], ["--watch", "80"], ["--watch", "--bundle"]])
def test_wrong_use(folder, words, capsys):
    assert run(["report", str(folder), *words]) == 2
    assert "error: argument --" in capsys.readouterr().err


def test_no_run(tmp_path, capsys):
    assert run(["report", str(tmp_path), "--watch"]) == 2
    assert capsys.readouterr().err.startswith("error: no run in ")
