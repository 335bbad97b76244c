"""Checkpoints on disk: committed whole or not at all, and verified before anything of them is loaded.

    RUN/checkpoint-N                whole; `manifest.json` holds size and sha256 of each of its other files
    RUN/.unfinished/checkpoint-N    being written, or being deleted; the next start removes it
    RUN/abandoned/checkpoint-N      newer than one that the run was resumed from

Inside are transformers' plain files, from which a stock Trainer can resume too; it does not look into the other two.
"""

import hashlib
import json
import logging
import os
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
# Parts of a run that a manifest names: after so many resumes the first ones have no checkpoints left.
MAX_PARTS = 100


def step_of(path: Path) -> int:
    number = path.name.rsplit("-", 1)[-1]
    return int(number) if number.isdigit() else -1


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Newest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if step_of(path) >= 0 and path.is_dir()]
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


def rotate(output_dir: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest whole checkpoints over `limit`, but neither the newest nor the best. To be called when a newer
    one has been committed; only finite ones are. Those that are not whole are not counted, and left where they are."""
    whole = [path for path in list_checkpoints(output_dir) if not problems_of(path)]
    if limit is None or len(whole) <= limit:
        return
    kept = whole[:1] + [path for path in whole[1:] if best is not None and path.name == Path(best).name]
    kept += [path for path in whole if path not in kept][: max(0, limit - len(kept))]
    for path in reversed(whole):
        if path not in kept:
            discarded = output_dir / UNFINISHED / f"deleted-{path.name}"
            discarded.parent.mkdir(exist_ok=True)
            os.rename(path, discarded)  # killed while it deletes, half a checkpoint must not have its name
            shutil.rmtree(discarded)


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
        return manifest if _render(manifest) == text else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def problems_of(checkpoint: Path, is_deep: bool = False) -> list[str]:
    """What is wrong with a checkpoint, a phrase a file; empty where it is whole. `is_deep`: reads every file too."""
    if not checkpoint.is_dir():
        return ["no such folder"]
    manifest = read_manifest(checkpoint)
    if manifest is None:
        exists = (checkpoint / MANIFEST).exists()
        return [f"{MANIFEST} is damaged" if exists else f"{MANIFEST} missing: the recipe did not commit it"]
    if manifest["step"] != step_of(checkpoint):
        return [f"{MANIFEST} is of step {manifest['step']}"]
    known, found = manifest["files"], _names_of_files(checkpoint)
    begins = [name for name in NEEDED if not any(file.startswith(name) for file in known)]
    begins += [] if any(file.startswith(WEIGHTS) for file in known) else ["weights"]
    problems = [f"{name} was not saved (save_only_model?)" for name in begins]
    problems += [f"{name} missing" for name in known if name not in found]
    problems += [f"{name} is foreign" for name in found if name not in known]
    both = [name for name in found if name in known]
    sizes = {name: (checkpoint / name).stat().st_size for name in both}
    problems += [
        f"{name} is empty" if not sizes[name] else f"{name} has {sizes[name]:,} bytes of {known[name]['bytes']:,}"
        for name in both
        if sizes[name] != known[name]["bytes"]
    ]
    if is_deep and not problems:
        with ThreadPoolExecutor() as pool:
            hashes = pool.map(lambda name: _hash_of(checkpoint / name), both)
        problems = [
            f"{name} is damaged (sha256)"
            for name, found_hash in zip(both, hashes, strict=True)
            if found_hash != known[name]["sha256"]
        ]
    return problems


# --- lineage: the parts of a run, each begun from a checkpoint of an earlier one


def begin_part(checkpoint: Path | None) -> list[dict]:
    """The lineage of a part that begins from `checkpoint`: the parts before it, and itself."""
    before = read_manifest(checkpoint)["lineage"] if checkpoint is not None else []
    name, step = (checkpoint.name, step_of(checkpoint)) if checkpoint is not None else (None, 0)
    return [*before, {"part": uuid.uuid4().hex[:16], "began_from": name, "step": step}][-MAX_PARTS:]


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
        names = [path.name, *(f"{path.name}-again-{count}" for count in range(2, 1000))]
        place = next(place for name in names if not (place := output_dir / ABANDONED / name).exists())
        place.parent.mkdir(exist_ok=True)
        os.rename(path, place)
        moved.append(f"{ABANDONED}/{place.name}")
    return moved


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
    candidates, lineage = list_checkpoints(output_dir), _lineage_of(output_dir)
    for path in candidates:
        manifest = read_manifest(path)
        if manifest is not None and lineage is not None and not is_on_lineage(manifest, lineage):
            problems = ["the run does not come from it"]
        else:
            problems = _verify(path)
        if not problems:
            return path
        logger.warning("passed over %s: %s", path, _shorten(problems))
    if resume_from_checkpoint == "auto" and not candidates:
        logger.info("%s holds no checkpoint to go on from: a new run", output_dir)
        return None
    problem = f"{len(candidates)} checkpoints, none whole" if candidates else "no checkpoint"
    fix = "leave the key out to start a new run" + (" in another output_dir" if candidates else "")
    raise UserError(f"resume_from_checkpoint {resume_from_checkpoint}: {output_dir} holds {problem}; {fix}")


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


def _lineage_of(output_dir: Path) -> list[dict] | None:
    try:
        return json.loads((output_dir / "run.json").read_text(encoding="utf-8"))["lineage"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
