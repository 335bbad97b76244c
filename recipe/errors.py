"""The two ways a run can fail that are not bugs; `__main__` turns each into one line and its exit code."""

import math
import signal
import time
from collections.abc import Callable

from recipe.redact import redact

# Signals that end a run: of a scheduler, the keyboard, a terminal that closes, Slurm before the time is over.
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# A scheduler, run_clm.sh and torchrun may each send the same signal to a process. Chosen: torchrun passed one on
# in 2 ms, and a person who repeats it has read a line before.
SAME_SECONDS = 1.0
_last_ending = -math.inf
# A full or read-only disk, as Python, safetensors or torch report it.
DISK_WORDS = (
    "No space left on device",
    "Disk quota exceeded",
    "Read-only file system",
    "File too large",
    "PytorchStreamWriter failed",
    "unexpected pos",
)
# Of gloo and NCCL where a peer is killed.
LOST_PEER_WORDS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "ncclRemoteError")
LOST_PEER = (
    "another process of the run was lost: killed, or out of memory (torchrun's report names it); "
    "--resume_from_checkpoint auto goes on from the last checkpoint"
)


class UserError(ValueError):
    """The user's input cannot be used (exit code 2). The message says what, where and how to fix it."""

    exit_code = 2


class DataError(RuntimeError):
    """Data or disk failed under a good configuration (exit code 4): unreachable, corrupt, changed, full."""

    exit_code = 4


def is_disk_error(error: BaseException) -> bool:
    """Whether the disk is full, read-only or over its quota."""
    return not hasattr(error, "exit_code") and any(word in str(error) for word in DISK_WORDS)


def exit_code_of(error: BaseException) -> int:
    """The exit code of an exception; `__main__` turns signals into a KeyboardInterrupt with the number."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + (error.args[0] if error.args else signal.SIGINT)
    return getattr(error, "exit_code", DataError.exit_code if is_disk_error(error) else 1)


def handle_endings(handler: Callable) -> dict:
    """Install a handler for each signal of ENDING that is not ignored, as nohup has SIGHUP; returns those before.

    What follows a signal within SAME_SECONDS is the same one and has no effect, also where the handler before is back
    by then."""
    global _last_ending
    _last_ending = -math.inf

    def handle(number, frame):
        global _last_ending
        if (now := time.monotonic()) - _last_ending >= SAME_SECONDS:
            _last_ending = now
            handler(number, frame)

    numbers = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handle) for number in numbers}


def is_lost_peer(error: BaseException) -> bool:
    """Whether another process of the run is gone, in the middle of a collective call of torch."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in LOST_PEER_WORDS)


def message_of(error: BaseException) -> str:
    """The error's own message, without the traceback in which a DataLoader worker wraps it, nor credentials; in other
    words where those would mislead."""
    if isinstance(error, KeyboardInterrupt):
        name = signal.Signals(error.args[0] if error.args else signal.SIGINT).name
        return f"ended by {name} while not training, so no new checkpoint was saved"
    if is_lost_peer(error):
        return LOST_PEER
    text = str(error).strip()
    text = text.splitlines()[-1].split(": ", 1)[-1] if "Original Traceback" in text else text or type(error).__name__
    return redact(f"the disk is full or read-only: {text}" if is_disk_error(error) else text)
