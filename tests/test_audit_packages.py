"""The audit of pinned packages fails loudly where it has not audited; no network here."""

import pytest

from tests.audit_packages import CONSTRAINTS, audit, pinned

PINS = {"a": "1", "b": "2", "c": "3"}


def finds(**found):
    return lambda: {"a": [], "b": [], "c": []} | found


def broken():
    raise OSError("no network")


def test_all_pins_are_read_and_a_line_that_is_no_pin_is_refused():
    assert len(pinned(CONSTRAINTS.read_text())) > 60 and pinned("A_b.c==1  # why\n") == {"a-b-c": "1"}
    for text in ("a==1\nb>=2\n", "a @ https://h/a.whl", "# nothing\n"):
        with pytest.raises(ValueError, match="name==version"):
            pinned(text)


def test_exit_codes(capsys):
    assert audit(PINS, (broken, finds()), {}) == 0
    assert "3 of 3 pins audited" in capsys.readouterr().out
    assert audit(PINS, (finds(b=["GHSA-1"]),), {}) == 1
    assert "VULNERABLE b 2: GHSA-1" in capsys.readouterr().out
    assert audit(PINS, (finds(b=["GHSA-1"]),), {"GHSA-1": "not used"}) == 0
    assert audit(PINS, (finds(),), {"GHSA-1": "not used"}) == 1
    assert audit(PINS, (broken, dict), {}) == 2  # the second one skipped every package
    assert "NOT AUDITED: a, b, c" in capsys.readouterr().out
    assert audit(PINS, (lambda: {"a": [], "b": []},), {}) == 2
    assert "NOT AUDITED: c" in capsys.readouterr().out
