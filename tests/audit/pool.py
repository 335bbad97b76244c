"""A process for each class, so that one that hangs stops no other, and results that outlive a killed run."""

import hashlib
import importlib.metadata
import json
import multiprocessing
import shutil
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path

from tests.audit.classes import Entry
from tests.audit.exceptions import CHANGES

FOLDER = Path(__file__).parent
PROGRESS = FOLDER / "progress"  # not in git; removed once all is done
SECONDS = 300  # for one class. Chosen: the slowest takes a tenth of it on an idle machine
PACKAGES = ("transformers", "torch")


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def audit_all(entries: list[Entry], processes: int, keep: bool) -> tuple[list[dict], float]:
    """Reports in the order of `entries`, and the seconds that they took, those of earlier runs included. `keep`: go on
    where an earlier run of the same code and versions stopped."""
    folder = PROGRESS if keep else PROGRESS.with_name("progress_only")
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    clock = folder / "seconds"
    before, begun = float(clock.read_text()) if clock.exists() else 0.0, time.perf_counter()
    waiting = [entry for entry in entries if not _is_done(folder / f"{entry.name}.json", entry)]
    for entry in waiting:
        (folder / f"{entry.name}.json").unlink(missing_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.audit.one"])
    running: dict = {}
    while waiting or running:
        while waiting and len(running) < processes:
            entry = waiting.pop(0)
            process = context.Process(target=_run, args=(entry, folder))
            process.start()
            running[process.sentinel] = (process, entry, time.perf_counter())
        wait(list(running), timeout=1)
        for sentinel, (process, entry, start) in list(running.items()):
            if process.is_alive() and time.perf_counter() - start < SECONDS:
                continue
            del running[sentinel]
            _finish(process, entry, folder)
            clock.write_text(str(before + time.perf_counter() - begun))
            done = len(entries) - len(waiting) - len(running)
            print(f"{done} of {len(entries)} {entry.name}", file=sys.stderr, flush=True)
    reports = [json.loads((folder / f"{entry.name}.json").read_text()) for entry in entries]
    seconds = before + time.perf_counter() - begun
    if not keep:
        shutil.rmtree(folder)
    return reports, seconds


def stamp_of(entry: Entry) -> str:
    """What a report depends on: versions, the code of the checks, and the exceptions for its class."""
    interpreting = ("__main__", "exceptions", "faults", "page", "pool", "results")
    code = b"".join(path.read_bytes() for path in sorted(FOLDER.glob("*.py")) if path.stem not in interpreting)
    exceptions = json.dumps(CHANGES.get(entry.name), sort_keys=True).encode()
    return hashlib.sha256(code + exceptions + json.dumps(versions()).encode()).hexdigest()


def _is_done(path: Path, entry: Entry) -> bool:
    return path.exists() and json.loads(path.read_text())["stamp"] == stamp_of(entry)


def _run(entry: Entry, folder: Path) -> None:
    from tests.audit.one import audit  # torch and transformers are imported in the fork server only

    _write(folder, entry, audit(entry))


def _write(folder: Path, entry: Entry, report: dict) -> None:
    unfinished = folder / f"{entry.name}.part"
    unfinished.write_text(json.dumps(entry._asdict() | {"stamp": stamp_of(entry)} | report))
    unfinished.rename(unfinished.with_suffix(".json"))


def _finish(process, entry: Entry, folder: Path) -> None:
    problem = f"took more than {SECONDS} s" if process.is_alive() else f"the process ended with {process.exitcode}"
    if process.is_alive():
        process.kill()
    process.join()
    if not (folder / f"{entry.name}.json").exists():
        _write(folder, entry, {"results": {}, "disagreements": [], "problem": problem, "seconds": SECONDS})
