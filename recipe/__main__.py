"""The commands: `python -m recipe COMMAND ...`. One screen; each command lives in its own module."""

import argparse
import atexit
import json
import logging
import os
import signal
import sys
from pathlib import Path

from recipe.errors import DataError, UserError, exit_code_of, message_of
from recipe.rundir import write_exit

USAGE = """usage: python -m recipe COMMAND ...

  train CONFIG.json [--field value ...] [--json]      the run
  report RUN_DIR                                      findings and curve -> RUN_DIR/report.html
  trajectory record OUT.json RUN_DIR [RUN_DIR ...]    healthy runs of one config -> a reference that later runs are
  held against
"""
GOOD, UNEXPECTED, USER_INPUT = 0, 1, 2


def train(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("recipe train", add_help=False, allow_abbrev=False)
    parser.add_argument("config")
    parser.add_argument("--json", action="store_true")
    options, overrides = parser.parse_known_args(arguments)
    from recipe.arguments import parse_config
    from recipe.model import hardware_defaults
    from recipe.train import run_training

    outcome = run_training(parse_config(options.config, overrides, hardware_defaults()))
    if options.json and outcome.is_main:
        print(json.dumps(outcome.result))
    return outcome.code


def report(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("recipe report")
    parser.add_argument("run_dir", type=Path)
    from recipe.report import write_report

    print(write_report(parser.parse_args(arguments).run_dir))
    return GOOD


def trajectory(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("recipe trajectory")
    parser.add_argument("action", choices=["record"])
    parser.add_argument("out", type=Path)
    parser.add_argument("run_dirs", type=Path, nargs="+")
    options = parser.parse_args(arguments)
    from recipe.record import record_reference

    print(record_reference(options.out, options.run_dirs))
    return GOOD


COMMANDS = {"train": train, "report": report, "trajectory": trajectory}


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code (README lists them). A user's mistake is one message, never a
    traceback."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return GOOD if arguments else USER_INPUT
    if arguments[0] not in COMMANDS:
        return _fail(USER_INPUT, f"no command {arguments[0]!r}; there are {', '.join(COMMANDS)}")
    try:
        return COMMANDS[arguments[0]](arguments[1:])
    except (UserError, DataError) as error:
        return _fail(error.exit_code, message_of(error))
    except SystemExit as stop:  # argparse
        return stop.code or GOOD
    except Exception as error:
        if not _is_disk_error(error):
            raise
        return _fail(DataError.exit_code, f"the disk is full or read-only: {error}")


def _is_disk_error(error: Exception) -> bool:
    """A full or read-only disk, in the words of Python, safetensors or torch."""
    words = ("No space left on device", "Disk quota exceeded", "Read-only file system", "PytorchStreamWriter failed")
    return any(word in str(error) for word in words)


def _fail(code: int, reason: str) -> int:
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {reason}", file=sys.stderr)
    write_exit(code, reason, None)
    return code


def _terminate(number, frame):
    raise KeyboardInterrupt("SIGTERM")


def main() -> None:
    """Entry point of the command line. Leaves by `os._exit`: threads of streaming readers may abort an interpreter
    that is shutting down."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s | %(message)s")
    for name in ("httpx", "filelock", "fsspec", "datasets", "torch", "accelerate"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; what failed in the end is said once
    signal.signal(signal.SIGTERM, _terminate)  # while the training runs, its own handler saves a checkpoint
    try:
        code = run(sys.argv[1:])
    except KeyboardInterrupt as interrupt:
        code = _fail(exit_code_of(interrupt), "interrupted while not training, so no new checkpoint was saved")
    except Exception:
        logging.getLogger("recipe").exception("unexpected error; this is a bug of the recipe or of what it stands on")
        write_exit(UNEXPECTED, "unexpected error", None)
        code = UNEXPECTED
    atexit._run_exitfuncs()  # trackers finish their uploads here
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
