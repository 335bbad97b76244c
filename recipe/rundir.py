"""The run directory: which one, what is written into it, which checkpoint to go on from."""

import contextlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock, Timeout

from recipe.errors import UserError

STREAM_STATE = "stream_state.json"
CONSEQUENCES = (1, 130, 143)  # exit codes that another rank's failure gives to this one
CHECKPOINT_FILES = ("trainer_state.json", "optimizer.pt", "scheduler.pt", STREAM_STATE)
PACKAGES = (
    "torch", "transformers", "datasets", "accelerate", "tokenizers", "sentencepiece", "evaluate", "pyarrow", "numpy",
)  # fmt: skip


def write_json(path: Path, values: dict) -> None:
    """Write whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def update_json(path: Path, values: dict) -> None:
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **values})


def choose_output_dir(output_dir: str, is_default: bool, resume_from_checkpoint: str | None) -> Path:
    """The directory for this run. One that holds a run already is never written into, unless that run is resumed.

    The default name gets a number then; a name of the user's own is refused with `UserError`.
    """
    path = Path(output_dir)
    if not holds_run(path) or resume_from_checkpoint == "latest":
        return path
    if resume_from_checkpoint is not None:
        home = Path(resume_from_checkpoint).resolve().parent
        if home == path.resolve():
            return path
        raise UserError(
            f"output_dir {path} holds another run than {resume_from_checkpoint}; choose an empty one, or {home}"
        )
    if is_default:
        numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
        return next(candidate for candidate in numbered if not holds_run(candidate))
    mend = "choose another one, or go on with it: --resume_from_checkpoint latest"
    raise UserError(f"output_dir {path} holds a run already; {mend}")


def holds_run(path: Path) -> bool:
    return (path / "run.json").exists() or any(step_of(found) >= 0 for found in path.glob("checkpoint-*"))


def find_checkpoint(resume_from_checkpoint: str | None, output_dir: Path) -> Path | None:
    """The checkpoint to resume from, None for a new run.

    `latest` is the newest complete one in `output_dir`; checkpoints are written in place, and a run killed while it
    wrote one leaves it without `stream_state.json`, which comes last. Raises `UserError` where there is none, or where
    files are missing: Trainer would go on without an optimizer's state and say nothing.
    """
    if resume_from_checkpoint is None:
        return None
    if resume_from_checkpoint == "latest":
        if newest := newest_checkpoint(output_dir):
            return newest
        count = len(list(output_dir.glob("checkpoint-*")))
        problem = f"{output_dir} holds {f'{count} checkpoints, none complete' if count else 'no checkpoint'}"
        mend = "leave the key out to start a new run"
    else:
        path = Path(resume_from_checkpoint)
        missing = _missing_files(path)
        if not missing:
            return path
        problem, mend = f"not a complete checkpoint, {', '.join(missing)} missing", "give another, or latest"
    raise UserError(f"resume_from_checkpoint {resume_from_checkpoint}: {problem}; {mend}")


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The complete checkpoint with the highest step."""
    checkpoints = sorted(output_dir.glob("checkpoint-*"), key=step_of, reverse=True)
    return next((path for path in checkpoints if not _missing_files(path)), None)


def read_stream_state(checkpoint: Path) -> dict | None:
    """The stream's state in a checkpoint; None where the file is not whole."""
    try:
        state = json.loads((checkpoint / STREAM_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    parts = ("identity", "settings", "position")
    return state if isinstance(state, dict) and all(isinstance(state.get(part), dict) for part in parts) else None


def step_of(path: Path) -> int:
    number = path.name.rsplit("-", 1)[-1]
    return int(number) if number.isdigit() else -1


def _missing_files(path: Path) -> list[str]:
    missing = [name for name in CHECKPOINT_FILES if not (path / name).is_file()]
    if STREAM_STATE not in missing and read_stream_state(path) is None:
        missing.append(f"{STREAM_STATE} (it is damaged)")
    return missing if any(path.glob("*.safetensors")) else [*missing, "model.safetensors"]


def write_exit(code: int, reason: str, output_dir: Path | None) -> None:
    """`exit.json` in the run directory, and where `run_clm.sh` asks for it: torchrun turns every child's code into 1.

    Rank 0 has the last word, unless it only says that it was ended or lost its peers after another rank had said why.
    """
    rank, asked = int(os.environ.get("RANK", "0")), os.environ.get("RECIPE_EXIT_FILE")
    word = {"code": code, "reason": reason, **({"rank": rank} if rank else {})}
    earlier = json.loads(Path(asked).read_text(encoding="utf-8") or "{}") if asked and Path(asked).exists() else {}
    if earlier and (rank or ("rank" in earlier and code in CONSEQUENCES)):
        word = earlier
    if rank == 0 and output_dir is not None and output_dir.is_dir():
        write_json(output_dir / "exit.json", word)
    if asked and word is not earlier:
        write_json(Path(asked), word)


@contextlib.contextmanager
def claim(output_dir: Path, rank: int) -> Iterator[None]:
    """Make the directory and hold it, by rank 0, for this run alone. Raises `UserError` if that cannot be."""
    if rank != 0:
        yield
        return
    lock = FileLock(output_dir / ".lock")
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"output_dir {output_dir}: another run is writing into it; wait, or choose another") from None
    except OSError as error:
        raise UserError(f"output_dir {output_dir}: cannot be written ({error.strerror}); choose another") from error
    try:
        yield
    finally:
        lock.release()


def write_failure(code: int, reason: str, output_dir: Path) -> None:
    """What ended a run before its result, for `exit.json` and, in the report, `run.json`."""
    write_exit(code, reason, output_dir)
    if os.environ.get("RANK", "0") == "0" and (output_dir / "run.json").exists():
        update_json(output_dir / "run.json", {"failure": reason})


def describe_environment() -> dict:
    """Versions, and the commit of the recipe where it runs from a checkout."""
    versions = {"python": sys.version.split()[0], **{package: version(package) for package in PACKAGES}}
    commit = _git("rev-parse", "HEAD")
    is_dirty = None if commit is None else bool(_git("status", "--porcelain"))
    return {"versions": versions, "commit": commit, "is_dirty": is_dirty}


def _git(*arguments: str) -> str | None:
    root = Path(__file__).resolve().parent.parent
    # The folder is named, so that git does not take a repository around it, such as a project's with the recipe in its
    # environment, for the recipe's own.
    command = ["git", "-C", str(root), "--git-dir=.git", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
