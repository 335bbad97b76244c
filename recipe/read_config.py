"""One flat JSON, then `--field value` overrides -> values of all keys, with every problem that can be found without
torch, in half a second. Keys that begin with "_" are comments.
"""

import copy
import difflib
import glob
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe import checkpoints, rundir
from recipe import config_checks as checks
from recipe.conflicts import find_conflicts
from recipe.errors import DataError, UserError
from recipe.keys import Required, all_keys, source_types
from recipe.model_json import find_problem
from recipe.other_names import refusal
from recipe.redact import remember_urls

FILES, FOLDERS = ("model_config", "trajectory"), ("tokenizer", "model_name_or_path")
HUB_NAME = r"(?!tokenizer/)[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(?<!\.json)(?<!\.model)"
UNKNOWN = (bool, int, float, list, str)  # a word for a key that does not exist, to show what it could mean
# One of these is in a folder that holds the thing.
HOLDS = {
    "tokenizer": (
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
        "spiece.model",
    ),
    "model_name_or_path": ("config.json",),
}


class ConfigError(UserError):
    """The configuration cannot be used; `problems` holds every (key, message) found."""

    def __init__(self, path: str | os.PathLike, problems: Sequence[checks.Problem]):
        self.problems = list(problems)
        lines = [f"  {key}: {message}" if key else f"  {message}" for key, message in self.problems]
        count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
        super().__init__("\n".join([f"{os.fspath(path)}: {count}", *lines]))


@dataclass(frozen=True)
class Reading:
    """`values` of all keys. `given`: those that the user set, `options` those of the command line. `misread`: problems
    of no key; `found`: of a key."""

    path: Path
    values: dict[str, Any]
    given: Set[str]
    options: Set[str]
    misread: list[checks.Problem]
    found: dict[str, str]

    def label(self, key: str) -> str:
        return f"--{key}" if key in self.options else key

    def check_source(self) -> None:
        """Local files that are not there, or an empty folder: for a command that reads the data."""
        source = self.values["source"]
        if not {"source"} & self.found.keys() and (problem := _why_nothing(source)):
            self.found["source"] = problem

    def refuse(self) -> None:
        """Raise `ConfigError` where there is a problem."""
        problems = self.misread + [(self.label(key), message) for key, message in self.found.items()]
        if problems:
            raise ConfigError(self.path, problems)


def read_config(
    path: str | os.PathLike, overrides: Sequence[str] = (), machine_defaults: Mapping[str, Any] | None = None
) -> Reading:
    """The JSON at `path`, then `overrides` (`--field value`, `--field=value`, bare `--flag`), checked.

    `machine_defaults` apply where neither sets a key. Paths are looked up as in `find_path`. An override of
    `train_tokens` or `max_steps` replaces the file's choice of the two; the same holds for `model_config` and
    `model_name_or_path`. Raises `ConfigError` for a file that is no configuration.
    """
    given, misread = _read_json(path)
    path, types = Path(path), known_types()
    options, of_words = _read_overrides(overrides)
    replaced = {name for pair in checks.ALTERNATIVES if options.keys() & pair for name in pair}
    given = {k: v for k, v in given.items() if not k.startswith("_") and k not in replaced} | options
    remember_urls(given)  # before anything is said about them
    values = defaults() | {"output_dir": f"runs/{path.stem}"} | (machine_defaults or {})
    if given.get("fp16") is True and "bf16" not in given:
        values["bf16"] = False  # the user's fp16 overrides the machine's bf16
    found = _check_known(given)
    for name in (given.keys() & types.keys()) - found.keys():
        is_whole = isinstance(given[name], float) and float not in types[name].kinds  # such as 1e9
        values[name] = int(given[name]) if is_whole else given[name]
    found |= _check_others(given, values, path)
    found |= {name: "is required" for name, value in values.items() if value is Required and name not in found}
    found |= find_conflicts(values, given.keys(), options.keys(), {*found}) | _resolve_paths(values, path, {*found})
    if not {"block_size", "model_config", "model_name_or_path"} & found.keys() and (problem := _too_long(values)):
        found["block_size"] = problem
    return Reading(path, values, given.keys(), options.keys(), misread + of_words, found)


def known_types() -> dict[str, checks.FieldType]:
    return {name: key.type for name, key in all_keys().items() if name not in checks.REFUSED}


def defaults() -> dict[str, Any]:
    fresh = {name: key.default for name, key in all_keys().items() if name not in checks.REFUSED} | checks.DEFAULTS
    return copy.deepcopy(fresh)  # some are lists


def _check_known(given: Mapping[str, Any]) -> dict[str, str]:
    types = known_types()
    found = {name: checks.find_problem(name, value, types) for name, value in given.items() if name in types}
    source = given.get("source", "")
    if not isinstance(source, str):
        found["source"] = checks.find_mixture_problem(source, source_types())
    elif source.lstrip().startswith("[{"):
        found["source"] = f"looks like a list of sources, but is no JSON: {checks.show(source)}"
    return {name: message for name, message in found.items() if message}


def _check_others(given: Mapping[str, Any], values: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Keys that do not exist or are refused; what they could mean depends on the other `values`."""
    others = given.keys() - known_types().keys()
    if not others:
        return {}
    placed = dict(values)
    _resolve_paths(placed, path, {name for name, value in values.items() if value is Required})
    return {name: refusal(name, given[name], known_types(), placed) for name in given if name in others}


# Paths


def find_path(value: str, config_path: str | os.PathLike) -> Path | None:
    """The first place where `value` exists: as given, beside the config, in the project, in the package."""
    return next((place for place in _places(value, config_path) if os.path.exists(place)), None)


def _places(value: str, config_path: str | os.PathLike) -> list[Path]:
    path, package = Path(os.path.expanduser(value)), Path(__file__).resolve().parent
    places = [path, Path(config_path).resolve().parent / path, package.parent / path]
    if path.parts[:1] == ("tokenizer",):  # a wheel has this top-level folder inside the package
        places.append(package / "_tokenizer" / Path(*path.parts[1:]))
    return list(dict.fromkeys(places))  # an absolute path has one


def _resolve_paths(values: dict[str, Any], config_path: Path, unsound: Set[str]) -> dict[str, str]:
    """Put the place where each file and folder lies into `values`; returns key -> message for those that cannot be."""
    problems = {}
    for name in (*FILES, *FOLDERS):
        value, is_folder = values[name], name in FOLDERS
        if name in unsound or value in (None, "auto", "none"):
            continue
        place = find_path(value, config_path)
        values[name] = str(place or value)
        if place is None and not (is_folder and re.fullmatch(HUB_NAME, value)):
            places = ", ".join(map(str, _places(value, config_path)))
            problems[name] = f"{value} not found; looked for {places}{'; nor is it a hub name' if is_folder else ''}"
        elif place is not None and place.is_dir() != is_folder:
            kind, fix = ("file", "folder that holds it") if is_folder else ("folder", "JSON file in it")
            problems[name] = f"{value} is a {kind}; name the {fix}"
        elif name == "model_config" and place is not None and (problem := _why_no_model(place)):
            problems[name] = f"{value}: {problem}"
        elif place is not None and is_folder and not any((place / file).exists() for file in HOLDS[name]):
            problems[name] = _why_empty(name, value, place)
    if "source" not in unsound:
        values["source"] = _locate_source(values["source"], config_path)
    if unsound.isdisjoint({"resume_from_checkpoint", "output_dir"}):
        output_dir, wanted = Path(values["output_dir"]), values["resume_from_checkpoint"]
        if rundir.began_before_restart(wanted, output_dir) and checkpoints.list_checkpoints(output_dir):
            values["resume_from_checkpoint"] = wanted = "latest"
        is_path = wanted not in (None, "latest", "auto")
        problem = checkpoints.problem_of_path(wanted, output_dir) if is_path else None
        problems |= {"resume_from_checkpoint": problem} if problem else {}
    return problems


def _too_long(values: dict[str, Any]) -> str | None:
    """Of a block that the model has no positions for; None where its config is not here to be read."""
    model = values["model_config"] or os.path.join(values["model_name_or_path"] or "", "config.json")
    try:
        longest = json.loads(Path(model).read_text(encoding="utf-8"))["max_position_embeddings"]
        is_over = values["block_size"] > longest
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return (
        f"is over the model's max_position_embeddings {longest}; --block_size {longest} would do" if is_over else None
    )


def _why_empty(name: str, value: str, folder: Path) -> str:
    """Of a folder that holds no tokenizer or model: which folder in it does."""
    what, files = name.removesuffix("_name_or_path"), HOLDS[name]
    below = [*folder.glob("final"), *sorted(folder.glob("*"), key=lambda each: (len(each.name), each.name))]
    inside = next((each for each in below if any((each / file).exists() for file in files)), None)
    fix = f"did you mean --{name} {Path(value) / inside.name}?" if inside else f"it has no {', '.join(files[:3])}"
    if inside is None and name == "tokenizer":
        fix += "; --tokenizer tokenizer/llama-32k would do"
    return f"the folder {value} holds no {what}; {fix}"


def _locate_source(source: str | list, config_path: Path) -> str | list:
    """A path or glob relative to the config's folder is made absolute; everything else stays as it is."""
    if isinstance(source, list):
        return [{**entry, "path": _locate_source(entry["path"], config_path)} for entry in source]
    beside = str(config_path.resolve().parent / source)
    return beside if "://" not in source and not glob.glob(source) and glob.glob(beside) else source


def _why_nothing(source: str | list) -> str | None:
    if isinstance(source, list):
        return next(filter(None, (_why_nothing(entry["path"]) for entry in source)), None)
    if source == "docstrings" or "://" in source or os.path.isfile(source):
        return None
    if any(Path(source).iterdir()) if os.path.isdir(source) else glob.glob(source, recursive=True):
        return None
    from recipe.data.files import find_files  # takes half a second

    try:
        return find_files(source) and None
    except UserError as error:
        return f"{source}: {str(error).removeprefix(f'source {source!r}: ')}"


# Reading


def _read_json(path: str | os.PathLike) -> tuple[dict[str, Any], list[checks.Problem]]:
    if not os.fspath(path).endswith(".json") and (hint := _data_hint(path)):
        raise ConfigError(path, [("", hint)])
    try:
        given, repeated = _load_json(Path(path))
    except (OSError, ValueError, RecursionError) as error:
        is_many = isinstance(error, json.JSONDecodeError) and (error.msg, error.colno) == ("Extra data", 1)  # lines
        hint = _data_hint(path) if is_many else None
        raise ConfigError(path, [("", hint or _why_unreadable(error, Path(path)))]) from error
    if not isinstance(given, dict):
        is_array = isinstance(given, list) and given and isinstance(given[0], (str, dict))
        hint = _data_hint(path) if is_array else None
        raise ConfigError(path, [("", hint or f"must be a JSON object of keys and values, not {checks.show(given)}")])
    if {"hidden_size", "num_hidden_layers"} <= given.keys() and not {"source", "model_config"} & given.keys():
        hint = f'is a model\'s configuration; name that of a training, with "model_config": "{path}" in it'
        raise ConfigError(path, [("", hint)])
    return given, repeated


def _load_json(path: Path) -> tuple[Any, list[checks.Problem]]:
    repeated = []

    def to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs if not name.startswith("_")]
        repeated.extend((name, "is given twice; keep one") for name in dict.fromkeys(names) if names.count(name) > 1)
        return dict(pairs)

    return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=to_dict), repeated


def _data_hint(path: str | os.PathLike) -> str | None:
    """What to say of a source in the place of the config, None for anything else."""
    from recipe.data.files import find_files, format_of  # takes half a second

    name = os.fspath(path)
    try:
        if os.path.isdir(name):
            is_data = not all(file.endswith(".json") for file in find_files(name))
        elif os.path.exists(name):
            is_data = bool(format_of(name))
        else:
            is_data = name == "docstrings" or "://" in name or bool(glob.glob(name))
    except (UserError, DataError):
        return None
    return f"is no configuration, but data; did you mean --source {shlex.quote(name)}?" if is_data else None


def _why_no_model(path: Path) -> str | None:
    try:
        values, repeated = _load_json(path)
        return next((f"{name} {problem}" for name, problem in repeated), None) or find_problem(values)
    except (OSError, ValueError, RecursionError) as error:
        return _why_unreadable(error, path)


def _why_unreadable(error: Exception, path: Path) -> str:
    if isinstance(error, FileNotFoundError):
        near = difflib.get_close_matches(path.name, [each.name for each in path.parent.glob("*.json")], n=1)
        return f"no such file; did you mean {path.parent / near[0]}?" if near else "no such file"
    if isinstance(error, IsADirectoryError):
        return "is a folder; name the JSON file in it"
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8 (byte {error.start}); save it as UTF-8"
    if not isinstance(error, json.JSONDecodeError):
        return f"cannot be read: {error}"
    if not error.doc.strip():
        return "is empty"
    before, rest = error.doc[: error.pos].rstrip(), error.doc[error.pos :].lstrip()
    where = f"line {error.lineno} column {error.colno}"
    if rest.startswith(("//", "/*", "#")):
        return f'{where}: JSON has no comments; use a key that begins with "_", such as "_comment"'
    if re.match(r"(,\s*)?[}\]]", rest) and (before.endswith(",") or rest.startswith(",")):
        return f"{where}: trailing comma before the closing bracket; remove it"
    return f"{where}: invalid JSON: {error.msg}"


def _read_overrides(words: Sequence[str]) -> tuple[dict[str, Any], list[checks.Problem]]:
    """`--field value`, `--field=value` and bare `--flag` -> values of their field's type, and what was wrong."""
    options, problems, words, types = {}, [], list(words), known_types()
    while words:
        word = words.pop(0)
        if not re.match(r"--\w", word):
            problems.append((word, "is not an option; options are --field value"))
            continue
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if not equals and words and not words[0].startswith("--"):
            equals, text = "=", words.pop(0)
        kinds = types[name].kinds if name in types else UNKNOWN
        if name in options:
            problems.append((f"--{name}", "is given twice; keep one"))
        elif not equals and bool not in kinds:
            problems.append((f"--{name}", "needs a value"))
        else:
            options[name] = checks.convert_word(text, kinds) if equals else True
    return options, problems
