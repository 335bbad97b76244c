"""Signals, and how a process ends. tests/test_ranks.py has runs that signals end."""

import contextlib
import json
import signal
import sys

import pytest

from recipe import __main__ as command_line
from recipe.errors import ENDING, SAME_SECONDS, exit_code_of, handle_endings, message_of
from recipe.results import Outcome


def test_each_has_the_shells_code():
    codes = [exit_code_of(KeyboardInterrupt(number)) for number in ENDING]
    assert codes == [143, 130, 129, 138] and exit_code_of(KeyboardInterrupt()) == 130
    assert message_of(KeyboardInterrupt(15)) == "ended by SIGTERM while not training, so no new checkpoint was saved"
    assert message_of(KeyboardInterrupt()).startswith("ended by SIGINT ")


@pytest.fixture
def handlers_come_back():
    before = {number: signal.getsignal(number) for number in ENDING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_what_nohup_ignores_stays_ignored(handlers_come_back):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert signal.SIGHUP not in handle_endings(lambda *arguments: None)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_one_that_comes_twice_at_once_is_one(handlers_come_back, monkeypatch):
    """A scheduler signals all processes and torchrun passes it on: where it was signalled twice, by SIGTERM."""
    seen, now = [], [50.0]
    monkeypatch.setattr("recipe.errors.time.monotonic", lambda: now[0])
    handle_endings(lambda number, frame: seen.append(("outer", number)))
    inner = handle_endings(lambda number, frame: seen.append(("inner", number)))
    signal.raise_signal(signal.SIGUSR1)
    now[0] += 0.6 * SAME_SECONDS
    signal.raise_signal(signal.SIGUSR1)
    for number, handler in inner.items():  # the training has ended meanwhile
        signal.signal(number, handler)
    signal.raise_signal(signal.SIGTERM)
    assert seen == [("inner", signal.SIGUSR1)]
    now[0] += 0.6 * SAME_SECONDS  # a person's second one
    signal.raise_signal(signal.SIGUSR1)
    assert seen == [("inner", signal.SIGUSR1), ("outer", signal.SIGUSR1)]


# --- the exit code, where nothing can be printed


class Left(BaseException):
    """In place of `os._exit`."""


@pytest.fixture
def leave(monkeypatch, tmp_path):
    """Calls `main` with the words of a command line; the exit code, and the one that is reported."""

    def main(*words: str) -> tuple[int, int | None]:
        monkeypatch.setattr("sys.argv", ["recipe", *words])
        with pytest.raises(Left) as left:
            command_line.main()
        written = tmp_path / "exit"
        return left.value.args[0], json.loads(written.read_text())["code"] if written.exists() else None

    def end(code: int):
        raise Left(code)

    monkeypatch.setenv("RECIPE_EXIT_FILE", str(tmp_path / "exit"))
    monkeypatch.setattr("os._exit", end)
    for name in ("choose_waiting", "configure_logging", "atexit._run_exitfuncs"):
        monkeypatch.setattr(f"recipe.__main__.{name}", lambda *_: None)
    monkeypatch.setattr("recipe.__main__.handle_endings", lambda _: None)
    return main


@pytest.mark.parametrize("code", [0, 3])
def test_a_result_that_cannot_be_printed_changes_no_exit_code(write_config, monkeypatch, leave, code):
    """exit.json has been written by then."""
    outcome = Outcome(code, {"verdict": "x" * 10_000}, is_main=True)
    monkeypatch.setattr("recipe.train.run_training", lambda config: outcome)
    with contextlib.suppress(OSError), open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert leave("train", write_config(), "--json")[0] == code
        monkeypatch.undo()


def test_an_error_that_cannot_be_printed_keeps_its_code(monkeypatch, leave):
    with contextlib.suppress(OSError), open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert leave("no-command") == (2, 2)
        monkeypatch.undo()


def test_text_that_cannot_be_printed_is_a_disk_error(monkeypatch, leave, capsys):
    with contextlib.suppress(OSError), open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert leave("explain", "loss_spike") == (4, 4)
        monkeypatch.undo()
    assert "error: the disk is full" in capsys.readouterr().err
