"""The run directory: which one, and what is written into it."""

import contextlib
import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from filelock import FileLock, Timeout

from recipe.checkpoints import ABANDONED, list_checkpoints
from recipe.errors import DataError, UserError
from recipe.plain_json import dumps

logger = logging.getLogger(__name__)
EXIT = "exit.json"
ROOT = Path(__file__).resolve().parent.parent  # of the checkout, or of the environment's packages
CONSEQUENCES = (1, 129, 130, 138, 143)  # exit codes that another rank's failure causes in this one
PACKAGES = (
    "torch", "transformers", "datasets", "accelerate", "tokenizers", "sentencepiece", "evaluate", "pyarrow", "numpy",
)  # fmt: skip


def write_json(path: Path, values: dict) -> None:
    """Write atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(dumps(values, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def update_json(path: Path, values: dict) -> None:
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}  # the folder was deleted
    write_json(path, {**known, **values})


def choose_output_dir(output_dir: str, is_default: bool, resume_from_checkpoint: str | None) -> Path:
    """The directory for this run. A directory that holds a run is only reused to resume that run.

    Otherwise the default name gets a number; a name that the user chose is refused with `UserError`.
    """
    path = Path(output_dir)
    goes_on = resume_from_checkpoint in ("latest", "auto") or began_before_restart(resume_from_checkpoint, path)
    if goes_on or not holds_run(path):
        return path
    if resume_from_checkpoint is not None:
        if not Path(resume_from_checkpoint).is_dir():
            return path  # which `checkpoints.choose` refuses
        wanted = Path(resume_from_checkpoint).resolve()
        home = wanted.parent
        if home == path.resolve():
            return path
        if ABANDONED in (home.name, home.parent.name):
            run = home.parent if home.name == ABANDONED else home.parent.parent
            back = run / wanted.name
            raise UserError(
                f"{resume_from_checkpoint} was moved aside; to return to it: mv {wanted} {back} (where that exists, "
                f"move it away first), then --output_dir {run} --resume_from_checkpoint {back}"
            )
        raise UserError(
            f"output_dir {path} holds another run than {resume_from_checkpoint}; choose an empty one, or {home}"
        )
    if is_default:
        numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
        return next(candidate for candidate in numbered if not holds_run(candidate))
    fix = "choose another one, or resume it: --resume_from_checkpoint latest"
    raise UserError(f"output_dir {path} holds a run already; {fix}")


def began_before_restart(resume_from_checkpoint: str | None, output_dir: Path) -> bool:
    """Whether torchrun has started this process again, and an earlier start has begun the run in `output_dir` from
    this path: then it has gone on since, and must not go back to where it began."""
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if not restarts or resume_from_checkpoint in (None, "latest", "auto"):
        return False
    try:
        lineage = json.loads((output_dir / "run.json").read_text(encoding="utf-8"))["lineage"][-restarts:]
        return Path(resume_from_checkpoint).name in [part["began_from"] for part in lineage]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def holds_run(path: Path) -> bool:
    return (path / "run.json").exists() or bool(list_checkpoints(path))


def write_exit(code: int, reason: str, output_dir: Path | None) -> None:
    """`exit.json` in the run directory, and where `run_clm.sh` asks for it: torchrun turns every child's code into 1.

    Rank 0 decides, unless it was only ended or lost its peers after another rank had reported the reason.
    """
    rank, asked = int(os.environ.get("RANK", "0")), os.environ.get("RECIPE_EXIT_FILE")
    entry = {"code": code, "reason": reason, **({"rank": rank} if rank else {})}
    earlier = json.loads(Path(asked).read_text(encoding="utf-8") or "{}") if asked and Path(asked).exists() else {}
    if earlier and (rank or ("rank" in earlier and code in CONSEQUENCES)):
        entry = earlier
    if rank == 0 and output_dir is not None and output_dir.is_dir():
        _try(write_json, output_dir / EXIT, entry)
    if asked and entry is not earlier:
        _try(write_json, Path(asked), entry)


def _try(write: Callable, path: Path, values: dict) -> None:
    """A disk that fails must not hide why the run ended."""
    try:
        write(path, values)
    except OSError as error:
        logger.warning("%s cannot be written: %s", path, error)


def ended_on_purpose_before() -> bool:
    """Whether torchrun starts this process again although the run has ended with a code that asks for no restart: only
    1, and ranks that were lost, do. Forgets what was reported otherwise."""
    asked = os.environ.get("RECIPE_EXIT_FILE")
    if not asked or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" or not Path(asked).exists():
        return False
    if json.loads(Path(asked).read_text(encoding="utf-8") or "{}").get("code", 1) != 1:
        return True
    if os.environ.get("LOCAL_RANK", "0") == "0":
        Path(asked).write_text("", encoding="utf-8")
    return False


@contextlib.contextmanager
def claim(output_dir: Path, rank: int) -> Iterator[None]:
    """Make the directory and lock it for this run, on rank 0. Raises `UserError` if that fails."""
    if rank != 0:
        yield
        return
    lock, is_new = FileLock(output_dir / ".lock"), not output_dir.exists()
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        (output_dir / EXIT).unlink(
            missing_ok=True
        )  # of the run before: if this one cannot write its own, none is right
    except Timeout:
        raise UserError(f"output_dir {output_dir}: another run is writing into it; wait, or choose another") from None
    except OSError as error:
        raise UserError(f"output_dir {output_dir}: cannot be written ({error.strerror}); choose another") from error
    try:
        yield
    except (UserError, DataError):
        if is_new and {path.name for path in output_dir.iterdir()} <= {".lock", EXIT}:  # it has not begun
            shutil.rmtree(output_dir)
        raise
    finally:
        lock.release()


def write_failure(code: int, reason: str, output_dir: Path) -> None:
    """Record in `exit.json` and `run.json` why a run ended without a result."""
    write_exit(code, reason, output_dir)
    if os.environ.get("RANK", "0") == "0" and (output_dir / "run.json").exists():
        _try(update_json, output_dir / "run.json", {"failure": reason})


def describe_environment() -> dict:
    """Versions, and the commit of the recipe where it runs from a checkout. `is_dirty`: whether other code than that
    of the commit may have made the run."""
    commit = _git("rev-parse", "HEAD")
    return {"versions": versions(), "commit": commit, "is_dirty": None if commit is None else bool(changed_code())}


def changed_code() -> list[str]:
    """Files of the checkout that differ from its commit, and those that git does not know and Python can import: code
    in the top folder, in `recipe/` or in another package. Data, configs and runs of the user are not among them."""
    changed = (_git("diff", "--name-only", "HEAD") or "").splitlines()
    others = map(Path, (_git("ls-files", "--others", "--exclude-standard") or "").splitlines())
    code = [path for path in others if path.suffix in (".py", ".so", ".pyd")]
    packages = {path.parts[0] for path in code if path.name == "__init__.py" and len(path.parts) == 2} | {"recipe"}
    return changed + [str(path) for path in code if len(path.parts) == 1 or path.parts[0] in packages]


@cache
def versions() -> dict[str, str]:
    """Of Python and of those of PACKAGES that are installed: the guards alone run without some."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _git(*arguments: str) -> str | None:
    # An explicit --git-dir keeps git from using a surrounding repository, such as that of a project with the recipe in
    # its environment.
    command = ["git", "-C", str(ROOT), "--git-dir=.git", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
