"""Finds misspelt keys of a configuration without importing torch or transformers, which takes seconds.

The names come from the sources of the classes that define them. All other checks are `parse_config`'s.
"""

import ast
import difflib
import importlib.util
import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from recipe.errors import UserError


def check_names(path: str, words: Sequence[str]) -> None:
    """Raise `UserError` that names every key which neither the recipe nor TrainingArguments has.

    `words`: the overrides. A file that cannot be read is left to `parse_config`.
    """
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        names = [name for name in given if not name.startswith("_")]
    except (OSError, ValueError, RecursionError, TypeError, AttributeError):
        return
    options = [word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")]
    problems = [(name, name) for name in names] + [(f"--{name}", name) for name in options]
    lines = [f"  {shown}: {unknown_key(name, known_names())}" for shown, name in problems if name not in known_names()]
    if lines:
        count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
        raise UserError("\n".join([f"{path}: {count}", *lines]))


def unknown_key(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"unknown key; did you mean {nearest[0]}?" if nearest else "unknown key"


@cache
def known_names() -> frozenset[str]:
    here = Path(__file__).parent
    package = Path(importlib.util.find_spec("transformers").origin).parent  # finds it without importing it
    names = (
        _fields(here / "arguments.py") | _fields(package / "training_args.py") | _refused(here / "config_checks.py")
    )
    return frozenset(names)


def _fields(path: Path) -> set[str]:
    """Of all classes in a file: the names with a type hint."""
    classes = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    return {
        node.target.id
        for each in classes
        for node in each.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def _refused(path: Path) -> set[str]:
    """The keys of the first table REFUSED: `parse_config` says why each is refused."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "REFUSED":
            return {name for key in node.value.keys for name in key.value.split()}
    raise AssertionError(f"{path} has no table REFUSED")
