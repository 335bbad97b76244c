"""Signals: which are handled. tests/test_ranks.py has runs that they end."""

import signal

from recipe.errors import ENDING, exit_code_of, handle_endings


def test_each_has_the_shells_code():
    codes = [exit_code_of(KeyboardInterrupt(number)) for number in ENDING]
    assert codes == [143, 130, 129, 138] and exit_code_of(KeyboardInterrupt()) == 130


def test_what_nohup_ignores_stays_ignored():
    before = {number: signal.getsignal(number) for number in ENDING}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in handle_endings(lambda *arguments: None)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
