"""What can be done with a run that is over, as commands that work where the user stands."""

import os
import shlex
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from recipe.guards.records import parse_object, read_lines

PROMPT_WORDS = 5


def next_commands(run_dir: Path) -> list[str]:
    """To generate, to evaluate, and to compare with the newest other run on the same text beside it, where there is
    one."""
    recipe, run = own_command(), from_here(run_dir)
    samples = read_lines(run_dir / "samples.jsonl")
    prompt = " ".join(samples[-1]["prompt"].split()[:PROMPT_WORDS]) if samples else "The"
    commands = [f"{recipe} generate {run} {shlex.quote(prompt)}", f"{recipe} evaluate {run}"]
    others = [
        file.parent
        for file in run_dir.absolute().parent.glob("*/steps.jsonl")
        if file.parent.name != run_dir.name and _text_of(file.parent) == _text_of(run_dir)
    ]
    if others:
        newest = max(others, key=lambda folder: (folder / "steps.jsonl").stat().st_mtime)
        commands.append(f"{recipe} compare {from_here(newest)} {run}")
    return commands


def _text_of(run_dir: Path) -> str | None:
    """The hash of what it was trained on, as far as its run.json tells."""
    file = run_dir / "run.json"
    info = parse_object(file.read_text(encoding="utf-8", errors="replace")) if file.is_file() else None
    return ((info or {}).get("source") or {}).get("content_hash")


def own_command() -> str:
    """What starts this program from the current directory: the `recipe` script of its environment, or `python -m`."""
    script, python = Path(sys.executable).with_name("recipe"), Path(sys.executable)
    if script.is_file():
        return _program(script)
    root = Path(find_spec("recipe").origin).parent.parent
    is_found = root == Path.cwd() or "site-packages" in root.parts
    return f"{'' if is_found else f'PYTHONPATH={from_here(root)} '}{_program(python)} -m recipe"


def _program(path: Path) -> str:
    """Its name where the shell finds this very file by it."""
    found = shutil.which(path.name)
    if found and os.path.samefile(found, path) and os.path.dirname(found) == str(path.parent):
        return path.name
    shown = from_here(path)
    return shown if "/" in shown else f"./{shown}"


def from_here(path: Path) -> str:
    """The path as the shell takes it, relative to the current directory where that is shorter."""
    return shlex.quote(min(os.path.relpath(path), str(path.absolute()), key=len))
