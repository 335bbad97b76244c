"""Signals: which are handled. tests/test_ranks.py has runs that they end."""

import signal

import pytest

from recipe.errors import ENDING, SAME_SECONDS, exit_code_of, handle_endings


def test_each_has_the_shells_code():
    codes = [exit_code_of(KeyboardInterrupt(number)) for number in ENDING]
    assert codes == [143, 130, 129, 138] and exit_code_of(KeyboardInterrupt()) == 130


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
