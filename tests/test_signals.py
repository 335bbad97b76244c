"""Signals: which are handled, and a second one."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from recipe.checkpoints import list_checkpoints, problems_of
from recipe.errors import ENDING, exit_code_of, handle_endings

ROOT = Path(__file__).resolve().parent.parent


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


@pytest.mark.parametrize("place", ["on_step_end", "on_prediction_step"])
def test_a_second_one_ends_at_once_and_leaves_what_was_committed(write_config, tmp_path, place):
    script = f"""
import signal
from recipe.__main__ import run
from recipe.signals import SignalCallback
whole = SignalCallback.{place}
def twice(self, args, state, control, **kwargs):
    if state.global_step >= 5:
        for _ in range(2): signal.raise_signal(signal.SIGTERM)
    return whole(self, args, state, control, **kwargs)
SignalCallback.{place} = twice
run(["train", {write_config(eval_steps=5, save_steps=2)!r}])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM, done.stderr[-2000:]
    assert done.stderr.count("saving a checkpoint after this step") == 1
    saved = list_checkpoints(tmp_path / "run")
    assert [path.name for path in saved] == ["checkpoint-4", "checkpoint-2"]
    assert all(problems_of(path, is_deep=True) == [] for path in saved)
