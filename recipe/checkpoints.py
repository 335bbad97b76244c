"""Checkpoints on disk: committed whole or not at all, and verified before anything of them is loaded.

    RUN/checkpoint-N                whole; `manifest.json` holds size and sha256 of each of its other files
    RUN/.unfinished/checkpoint-N    being written, or being deleted; the next start removes it
    RUN/abandoned/checkpoint-N      newer than one that the run goes on from

Inside are transformers' plain files, from which a stock Trainer can resume too; it does not look into the other two.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from recipe.errors import UserError

logger = logging.getLogger(__name__)

UNFINISHED, ABANDONED, MANIFEST, STREAM_STATE = ".unfinished", "abandoned", "manifest.json", "stream_state.json"
# What a run cannot be resumed without, by the beginning of the file's name: sharded ones are folders.
NEEDED = ("trainer_state.json", "optimizer", "scheduler.pt", STREAM_STATE)
WEIGHTS = ("model", "pytorch_model")
# What a desktop writes beside the files that it shows. Hidden ones are ignored too: no library loads them by name.
OF_THE_DESKTOP = ("Thumbs.db", "desktop.ini")
# Parts of a run that a manifest names: after so many resumes the first ones have no checkpoints left.
MAX_PARTS = 100
FOREIGN = "the run does not come from it"


def step_of(path: Path) -> int:
    """-1 where it has not the name of a checkpoint: `checkpoint-best-8` is somebody's copy."""
    found = re.fullmatch("checkpoint-(0|[1-9][0-9]*)", path.name)
    return int(found[1]) if found else -1


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Newest first; those that cannot be read, too."""
    found = [path for path in output_dir.glob("checkpoint-*") if step_of(path) >= 0 and not os.path.isfile(path)]
    return sorted(found, key=step_of, reverse=True)


# --- committing


def staging_of(output_dir: Path, step: int) -> Path:
    """The folder to write the files of a checkpoint into."""
    return output_dir / UNFINISHED / f"checkpoint-{step}"


def commit(staged: Path, lineage: list[dict], versions: dict) -> Path:
    """Make what was staged a checkpoint: every file on disk, then the manifest, then the name.

    Raises `OSError`; there is no checkpoint of this name then. One that exists is never written again.
    """
    output_dir = staged.parent.parent
    target = output_dir / staged.name
    if target.exists():
        raise FileExistsError(f"{target} exists already")
    names = _names_of_files(staged)
    with ThreadPoolExecutor() as pool:
        files = dict(zip(names, pool.map(lambda name: _sync_and_hash(staged / name), names), strict=True))
    manifest = {"step": step_of(staged), "versions": versions, "lineage": lineage, "files": files}
    (staged / MANIFEST).write_text(_render(manifest), encoding="utf-8")
    _sync(staged / MANIFEST)
    for folder in sorted((path for path in staged.rglob("*") if path.is_dir()), reverse=True):
        _sync(folder)
    _sync(staged)
    os.rename(staged, target)
    _sync(output_dir)
    return target


def rotate(output_dir: Path, limit: int | None, best: str | None, lineage: list[dict], applied: int) -> bool:
    """Delete the oldest checkpoints over `limit`, but neither the newest, nor the best, nor the newest that a run can
    be resumed from, nor the newest after which a step was finite. To be called when a newer one has been committed.

    `applied`: the last step that was finite. Only whole checkpoints on the lineage of the run are counted; what else
    has such a name is not the run's own. Returns whether more than `limit` are left, of which one may go later.
    """
    own = [path for path in list_checkpoints(output_dir) if limit is not None and _is_own(path, lineage)]
    if limit is None or len(own) <= limit:
        return False
    first_of = (
        own,
        [path for path in own if best is not None and path.name == Path(best).name],
        [path for path in own if not problems_of(path)],
        [path for path in own if step_of(path) < applied],
    )
    kept = list(dict.fromkeys(paths[0] for paths in first_of if paths))
    kept += [path for path in own if path not in kept][: max(0, limit - len(kept))]
    for path in reversed(own):
        if path not in kept:
            discarded = output_dir / UNFINISHED / f"deleted-{path.name}"
            discarded.parent.mkdir(exist_ok=True)
            os.rename(path, discarded)  # killed while it deletes, half a checkpoint must not have its name
            shutil.rmtree(discarded)
    return len(kept) > limit


def _is_own(path: Path, lineage: list[dict]) -> bool:
    """Whether it is a whole one of this run, and no link to another place."""
    if path.is_symlink() or _damages_of(path):
        return False
    return is_on_lineage(read_manifest(path), lineage)


def clean(output_dir: Path) -> list[str]:
    """Remove what a run that was killed while it saved or deleted has left; returns the names."""
    unfinished = output_dir / UNFINISHED
    left = sorted(path.name for path in unfinished.iterdir()) if unfinished.is_dir() else []
    shutil.rmtree(unfinished, ignore_errors=True)
    return left


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_and_hash(path: Path) -> dict:
    _sync(path)
    return {"bytes": path.stat().st_size, "sha256": _hash_of(path)}


def _hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _names_of_files(folder: Path) -> list[str]:
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]
    return sorted(name for name in names if name != MANIFEST)


# --- verifying


def _render(manifest: dict) -> str:
    """With a hash of its own, so that a flipped bit in the manifest is found too."""
    own = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": own}, indent=1) + "\n"


def read_manifest(checkpoint: Path) -> dict | None:
    """None where it is missing, or is not byte for byte what `commit` wrote."""
    try:
        text = (checkpoint / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        del manifest["sha256"]
        files = manifest["files"].values()
        is_whole = _render(manifest) == text and type(manifest["step"]) is int and is_lineage(manifest["lineage"])
        is_whole &= all(type(file["bytes"]) is int and type(file["sha256"]) is str for file in files)
        return manifest if is_whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def problems_of(checkpoint: Path, is_deep: bool = False) -> list[str]:
    """Why a run cannot be resumed from a checkpoint, a phrase a file; empty where it can. `is_deep`: reads every file
    too."""
    if problems := _damages_of(checkpoint, is_deep):
        return problems
    known = read_manifest(checkpoint)["files"]
    begins = [name for name in NEEDED if not any(file.startswith(name) for file in known)]
    begins += [] if any(file.startswith(WEIGHTS) for file in known) else ["weights"]
    return [f"{name} was not saved (save_only_model?)" for name in begins]


def _damages_of(checkpoint: Path, is_deep: bool = False) -> list[str]:
    """In what a checkpoint is not what `commit` wrote."""
    try:
        if not checkpoint.is_dir():
            return ["no such folder"]
        manifest = read_manifest(checkpoint)
        if manifest is None:
            exists = os.path.lexists(checkpoint / MANIFEST)
            return [f"{MANIFEST} is damaged" if exists else f"{MANIFEST} missing: the recipe did not commit it"]
        if manifest["step"] != step_of(checkpoint):
            return [f"{MANIFEST} is of step {manifest['step']}: its name was checkpoint-{manifest['step']}"]
        known, found = manifest["files"], _names_of_files(checkpoint)
    except OSError as error:
        return [f"cannot be read ({error.strerror})"]
    problems = [f"{name} missing" for name in known if name not in found]
    problems += [f"{name} is foreign" for name in found if name not in known and not _is_ignored(name)]
    both = [name for name in found if name in known]
    problems += filter(None, (_damage_of_file(checkpoint, name, known[name], False) for name in both))
    if is_deep and not problems:
        with ThreadPoolExecutor() as pool:
            damages = pool.map(lambda name: _damage_of_file(checkpoint, name, known[name], True), both)
        problems = [*filter(None, damages)]
    return problems


def _damage_of_file(checkpoint: Path, name: str, known: dict, is_deep: bool) -> str | None:
    try:
        if is_deep:
            return f"{name} is damaged (sha256)" if _hash_of(checkpoint / name) != known["sha256"] else None
        size = (checkpoint / name).stat().st_size
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    if size == known["bytes"]:
        return None
    return f"{name} has {size:,} bytes of {known['bytes']:,}" if size else f"{name} is empty"


def _is_ignored(name: str) -> bool:
    return any(part.startswith(".") or part in OF_THE_DESKTOP for part in name.split("/"))


# --- lineage: the parts of a run, each begun from a checkpoint of an earlier one


def begin_part(checkpoint: Path | None) -> list[dict]:
    """The lineage of a part that begins from `checkpoint`: the parts before it, and itself."""
    before = read_manifest(checkpoint)["lineage"] if checkpoint is not None else []
    name, step = (checkpoint.name, step_of(checkpoint)) if checkpoint is not None else (None, 0)
    return [*before, {"part": uuid.uuid4().hex[:16], "began_from": name, "step": step}][-MAX_PARTS:]


def is_lineage(value) -> bool:
    """Whether it is one, of a file that somebody may have written."""
    parts = value if isinstance(value, list) else []
    return bool(parts) and all(
        isinstance(part, dict) and type(part.get("part")) is str and type(part.get("step")) is int for part in parts
    )


def is_on_lineage(manifest: dict, lineage: list[dict]) -> bool:
    """Whether a checkpoint is one that the run went through, up to where a later part of it began."""
    parts, own = [each["part"] for each in lineage], manifest["lineage"][-1]["part"]
    if own not in parts:
        return False
    later = lineage[parts.index(own) + 1 :]
    return not later or manifest["step"] <= later[0]["step"]


def abandon(output_dir: Path, step: int) -> list[str]:
    """Move aside the checkpoints after `step`, from which the run goes on: neither `latest` nor a stock Trainer may
    take them, and the run will write others under their names. Returns where they are."""
    moved = []
    for path in list_checkpoints(output_dir):
        if step_of(path) <= step:
            break
        names = [path.name, *(f"{count}/{path.name}" for count in range(2, 1000))]  # its own name, to be moved back
        name = next(name for name in names if not os.path.lexists(output_dir / ABANDONED / name))
        (output_dir / ABANDONED / name).parent.mkdir(parents=True, exist_ok=True)
        os.rename(path, output_dir / ABANDONED / name)
        moved.append(f"{ABANDONED}/{name}")
    return moved


def abandon_unproven(output_dir: Path, applied: int, lineage: list[dict]) -> tuple[Path | None, list[str]]:
    """After steps that were not finite: move aside the checkpoints after which no step was, so that the run goes on
    from the newest that was good. `applied`: the last step that was finite. Returns that checkpoint, and what
    `abandon` does; without one nothing is moved: a run that has checkpoints never begins from the start by itself."""
    own = [path for path in list_checkpoints(output_dir) if not problems_of(path)]
    own = [path for path in own if step_of(path) < applied and is_on_lineage(read_manifest(path), lineage)]
    return (own[0], abandon(output_dir, step_of(own[0]))) if own else (None, [])


# --- choosing


def choose(resume_from_checkpoint: str | None, output_dir: Path) -> Path | None:
    """The checkpoint to resume from, None for a new run; logs it, those that were passed over, and why.

    `latest`: the newest that verifies, on the lineage of the run. `auto`: the same, and a new run where there is no
    checkpoint at all. Otherwise a path. Raises `UserError`.
    """
    if resume_from_checkpoint is None:
        return None
    if resume_from_checkpoint not in ("latest", "auto"):
        path = Path(resume_from_checkpoint)
        if problems := _verify(path):
            raise UserError(
                f"resume_from_checkpoint {path}: not a whole checkpoint: {_shorten(problems)}; give another, or latest"
            )
        return path
    candidates = list_checkpoints(output_dir)
    lineage, passed = _lineage_of(output_dir, candidates), {}
    for path in candidates:
        manifest = read_manifest(path)
        if manifest is not None and lineage is not None and not is_on_lineage(manifest, lineage):
            passed[path] = [FOREIGN]
        else:
            passed[path] = _verify(path)
        if not passed[path]:
            return path
        logger.warning("passed over %s: %s", path, _shorten(passed[path]))
    if resume_from_checkpoint == "auto" and not candidates:
        logger.info("%s holds no checkpoint to go on from: a new run", output_dir)
        return None
    raise UserError(f"resume_from_checkpoint {resume_from_checkpoint}: {output_dir} holds {_say_none(passed)}")


def _say_none(passed: dict[Path, list[str]]) -> str:
    """`passed`: why each checkpoint was passed over, the newest first."""
    if not passed:
        return "no checkpoint; leave the key out to start a new run"
    foreign = (path for path, problems in passed.items() if problems == [FOREIGN])
    problems = passed[path := next(foreign, next(iter(passed)))]
    if problems == [FOREIGN]:
        fix = f"to go on from it all the same, name it: --resume_from_checkpoint {path}"
    elif "was not saved" in problems[0]:
        fix = f"start a new run from its weights: --model_name_or_path {path}, and another output_dir"
    else:
        fix = "leave the key out to start a new run in another output_dir"
    count = f"{len(passed)} checkpoint{'s' if len(passed) > 1 else ''}"
    return f"{count}, none to resume from ({path.name}: {_shorten(problems)}); {fix}"


def problem_of_path(wanted: str, output_dir: Path) -> str | None:
    """What is wrong with a path to resume from, without reading its files, and what to give instead."""
    path = Path(wanted)
    if wanted.lower() == "true":  # as Trainer takes it
        return "true is no path; did you mean --resume_from_checkpoint latest?"
    if step_of(path) >= 0 and path.is_dir():
        return None
    if path.name == "final" and path.is_dir():
        fix = f"did you mean --model_name_or_path {wanted} (a new run from its weights)?"
        return f"{wanted} is a finished model, without optimizer and position; {fix}"
    inside, beside = (list_checkpoints(place) for place in (path, path.parent))
    near = next((found[0] for found in (inside, beside, list_checkpoints(output_dir)) if found), None)
    what = "a run" if inside else "a folder without a checkpoint's name" if path.is_dir() else "no such folder"
    fix = f"did you mean --resume_from_checkpoint {near}?" if near else "for a new run remove it"
    return f"{wanted} is {what}; {fix}"


def newest_whole(output_dir: Path) -> Path | None:
    """Without reading its files."""
    return next((path for path in list_checkpoints(output_dir) if not problems_of(path)), None)


def _verify(path: Path) -> list[str]:
    start = time.perf_counter()
    problems = problems_of(path, is_deep=True)
    if not problems:
        size = sum(file["bytes"] for file in read_manifest(path)["files"].values())
        seconds = time.perf_counter() - start
        logger.info("resuming from %s, step %d: %.3g GB verified in %.1f s", path, step_of(path), size / 1e9, seconds)
    return problems


def _shorten(problems: list[str], shown: int = 3) -> str:
    more = f", and {len(problems) - shown} more" if len(problems) > shown else ""
    return ", ".join(problems[:shown]) + more


def _lineage_of(output_dir: Path, candidates: list[Path]) -> list[dict] | None:
    """Of run.json; where that is lost, of the newest checkpoint if all others are on it. Raises `UserError`."""
    path = output_dir / "run.json"
    try:
        lineage = json.loads(path.read_text(encoding="utf-8"))["lineage"]
        if is_lineage(lineage):
            return lineage
        problem = "holds no lineage"
    except FileNotFoundError:
        problem = "is missing"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        problem = "cannot be read"
    manifests = {path: manifest for path in candidates if (manifest := read_manifest(path)) is not None}
    if not manifests:
        return None
    (newest, first), *_ = manifests.items()
    if not all(is_on_lineage(manifest, first["lineage"]) for manifest in manifests.values()):
        raise UserError(
            f"{path} {problem}, and the checkpoints beside it are of several branches; name the one to go on from, "
            f"such as --resume_from_checkpoint {newest}"
        )
    logger.warning("%s %s: the lineage is taken from %s", path, problem, newest.name)
    return first["lineage"]
