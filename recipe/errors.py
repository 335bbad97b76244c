"""The two ways a run can fail that are not bugs; `__main__` turns each into one line and its exit code."""

import signal
from collections.abc import Callable

# Signals that end a run: of a scheduler, the keyboard, a terminal that closes, Slurm before the time is over.
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class UserError(ValueError):
    """The user's input cannot be used (exit code 2). The message says what, where and how to fix it."""

    exit_code = 2


class DataError(RuntimeError):
    """Data or disk failed under a good configuration (exit code 4): unreachable, corrupt, changed, full."""

    exit_code = 4


def exit_code_of(error: BaseException) -> int:
    """The exit code of an exception; `__main__` turns signals into a KeyboardInterrupt with the number."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + (error.args[0] if error.args else signal.SIGINT)
    return getattr(error, "exit_code", 1)


def handle_endings(handler: Callable) -> dict:
    """Install a handler for each signal of ENDING that is not ignored, as nohup has SIGHUP; returns those before."""
    numbers = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in numbers}


def message_of(error: BaseException) -> str:
    """The error's own message, without the traceback in which a DataLoader worker wraps it."""
    text = str(error).strip()
    return text.splitlines()[-1].split(": ", 1)[-1] if "Original Traceback" in text else text or type(error).__name__


def is_disk_error(error: BaseException) -> bool:
    """A full or read-only disk, as Python, safetensors or torch report it."""
    words = ("No space left on device", "Disk quota exceeded", "Read-only file system", "PytorchStreamWriter failed")
    return any(word in str(error) for word in words)
