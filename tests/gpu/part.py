"""One part of the suite: a process of its own, since a CUDA error leaves its process unusable, with a time limit. What
it measured is on disk at once, so that a crash or the limit costs only what was to come."""

import ctypes
import importlib
import json
import logging
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.gpu.tokens import ROOT

PR_SET_PDEATHSIG = 1  # prctl(2)
LOG_LINES = 12  # of a failed part's log, kept with its results
DONE, FAILED, TIMED_OUT, NOT_RUN = "done", "failed", "time limit", "not run"
# A child that inherits CUDA from the fork server says so; the same part then runs in a fresh interpreter.
OF_A_FORK = ("Cannot re-initialize CUDA in forked subprocess", "initialization error")


@dataclass
class Outcome:
    """`values`: what the part measured, by name, also where it did not end well."""

    status: str
    seconds: float = 0.0
    values: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    log: list[str] = field(default_factory=list)


class Report:
    """A part's figures; `put` writes them all."""

    def __init__(self, path: Path, seconds: float):
        self.path, self.deadline, self.values = path, time.monotonic() + seconds, {}

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def put(self, name: str, value) -> None:
        self.values[name] = value
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(finite(self.values)), encoding="utf-8")
        partial.replace(self.path)

    def section(self, name: str, function, least: float = 0.0) -> None:
        """Put what `function()` returns; a section that fails, or that no time is left for, does not stop the
        others."""
        if self.left < least:
            self.put(name, {"not run": f"{self.left:.0f} s left, it takes about {least:.0f}"})
            return
        started = time.monotonic()
        try:
            value = function()
        except Exception as error:
            traceback.print_exc()
            value = {**self.values.get(name, {}), "error": first_line(error)}
        self.put(name, value)
        self.put("seconds", {**self.values.get("seconds", {}), name: time.monotonic() - started})


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def finite(value):
    """JSON has no NaN and no infinity: they are written as text."""
    if isinstance(value, dict):
        return {str(key): finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# --- the parent's side


def run_part(context, name: str, scale, folder: Path, seconds: float) -> Outcome:
    """Run `tests.gpu.<name>.run(scale, report, folder)`; after `seconds` all of its processes are killed."""
    folder.mkdir(parents=True, exist_ok=True)
    log, started = folder / "log.txt", time.monotonic()
    process = context.Process(target=_child, args=(name, scale, folder, seconds))
    is_late = False
    try:
        process.start()
        process.join(seconds)
        is_late = process.is_alive()
    finally:  # Ctrl-C too
        _kill_group(process)
    took = time.monotonic() - started
    values = measured(folder)
    status = TIMED_OUT if is_late else DONE if process.exitcode == 0 else FAILED
    error = values.pop("failure", None)
    if status == FAILED and error is None:
        error = f"the process died with exit code {process.exitcode}"
    return Outcome(status, took, values, error, _last_lines(log) if status != DONE else [])


def is_of_a_fork(outcome: Outcome) -> bool:
    return any(words in text for text in (str(outcome.error), str(outcome.values)) for words in OF_A_FORK)


def measured(folder: Path) -> dict:
    """The figures that the part in this folder has put, up to now."""
    try:
        return json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _last_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
    except OSError:
        return []


def _kill_group(process: multiprocessing.Process) -> None:
    """The part and all that it started and that did not begin a session of its own."""
    if process.pid is None:  # interrupted before it had begun
        return
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


# --- the child's side


def _child(name: str, scale, folder: Path, seconds: float) -> None:
    os.setpgid(0, 0)  # Ctrl-C reaches the parent alone, which ends this group
    if not folder.is_dir():  # interrupted while this was started
        os._exit(1)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    os.chdir(ROOT)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s | %(message)s", force=True)
    report = Report(folder / "report.json", seconds)
    code = 0
    try:
        importlib.import_module(f"tests.gpu.{name}").run(scale, report, folder)
    except BaseException as error:
        traceback.print_exc()
        report.put("failure", first_line(error))
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)  # threads of pyarrow may abort the interpreter when it ends
