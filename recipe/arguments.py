"""One flat JSON, then `--field value` overrides -> a checked `Config`.

TrainingArguments' keys and the recipe's own share one namespace. Nothing passes silently: every key, type, range
and combination is checked before anything is built (`config_checks.py`), and all problems are reported at once. Keys
that begin with "_" are comments.
"""

import glob
import json
import logging
import math
import os
import re
from collections.abc import Sequence, Set
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

from transformers import TrainingArguments

from recipe import config_checks as checks
from recipe.errors import UserError
from recipe.redact import remember

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """What is trained: a new model from `model_config`, or the one at `model_name_or_path`; exactly one of the two."""

    model_config: str | None = None  # LlamaConfig JSON of a new model
    model_name_or_path: str | None = None  # checkpoint folder or hub name to continue from
    tokenizer: str  # folder or hub name
    attn_implementation: Literal[
        "auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"
    ] = "auto"  # takes the fastest that this machine runs


@dataclass(frozen=True, kw_only=True)
class SourceArguments:
    """One entry of a mixture. Missing keys default to the key of the same name beside `source`."""

    path: str
    text_column: str
    train_skip: int
    eval_skip: int | Literal["auto"]
    weight: float = 1.0  # share of the rows, beside the weights of the other entries

    def __post_init__(self):
        for name in ("train_skip", "eval_skip"):  # accepts 1e6
            if (value := getattr(self, name)) != "auto":
                object.__setattr__(self, name, int(value))


@dataclass(frozen=True, kw_only=True)
class DataArguments:
    """The training data, and which documents belong to eval only."""

    source: str | list  # "docstrings", path, glob, URL, "hf://owner/name/config", or a list of {"path", "weight"}
    text_column: str = "text"  # column or JSON key that holds the text
    block_size: int = 1024  # tokens in a row
    train_tokens: int | None = None  # tokens of the whole run; or give max_steps
    train_skip: int = 0  # index of the first document that training may read
    train_seed: int = 42  # of the train stream's order
    # Index of the first hold-out document; "auto": 100,000, or the last 1 % of a source that ends before.
    eval_skip: int | Literal["auto"] = "auto"
    eval_seed: int = 1041  # of the eval stream's order
    eval_documents: int | Literal["auto"] = "auto"  # hold-out documents; training skips them
    document_masking: bool = False  # keep attention inside each document of a row
    num_lanes: int | Literal["auto"] = "auto"  # sub-streams of the canonical order; 32, or fewer for a small source
    # When a checkpoint was made on another stream: refuse, keep its position, or start again.
    on_changed_stream: Literal["refuse", "continue", "restart"] = "refuse"
    on_bad_data: Literal["stop", "skip"] = "stop"  # at a document that cannot be read: stop, or skip and count it
    allow_change: list[str] = field(default_factory=list)  # settings that may differ from those of the checkpoint

    @property
    def sources(self) -> list[SourceArguments]:
        """The mixture, of one entry where `source` is a string."""
        shared = {name: getattr(self, name) for name in ("text_column", "train_skip", "eval_skip")}
        entries = [{"path": self.source}] if isinstance(self.source, str) else self.source
        return [SourceArguments(**{**shared, **entry}) for entry in entries]


@dataclass(frozen=True, kw_only=True)
class GuardArguments:
    """The reference curve, what a warning or error does, and which guards are disabled."""

    trajectory: str = "auto"  # reference curve: "auto", "none" or a JSON's path
    on_regression: Literal["warn", "stop"] = "warn"  # at a warning or error: go on, or exit
    disabled_guards: list[str] = field(default_factory=list)  # finding ids that are not judged


OURS = (ModelArguments, DataArguments, GuardArguments)
TRAINING_FIELDS = {f.name: f for f in fields(TrainingArguments) if f.name not in checks.REFUSED}
FIELDS = {f.name: f for group in OURS for f in fields(group)} | TRAINING_FIELDS
# The recipe's own defaults for keys of TrainingArguments.
DEFAULTS = {name: value for name, (value, _) in checks.FIXED.items()} | {
    "logging_steps": 10,
    "report_to": [],
    "disable_tqdm": False,
    "prediction_loss_only": False,
    "ddp_find_unused_parameters": False,  # Trainer's default walks the graph in each step
    "trackio_static_space_id": False,  # unset, a push to the hub also creates a Space
    "seed": 42,
}
HINTS = {name: hint for group in (*OURS, TrainingArguments) for name, hint in get_type_hints(group).items()}
# transformers' own hints are too wide (a string of kwargs only fails later) or wrong (`fsdp` is a bool in v5).
HINTS |= {"lr_scheduler_kwargs": dict | None, "activation_checkpointing_kwargs": dict | None}
HINTS |= {"fsdp": bool | str | None, "output_dir": str, "report_to": str | list[str]}
HINTS |= {"trackio_static_space_id": bool | str | None}
TYPES = {name: checks.split_hint(HINTS[name]) for name in FIELDS}
SOURCE_TYPES = {name: checks.split_hint(hint) for name, hint in get_type_hints(SourceArguments).items()}
FILES, FOLDERS = ("model_config", "trajectory"), ("tokenizer", "model_name_or_path")
HUB_NAME = r"(?!tokenizer/)[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(?<!\.json)(?<!\.model)"


class ConfigError(UserError):
    """The configuration cannot be used; `problems` holds every (key, message) found."""

    def __init__(self, path: str | os.PathLike, problems: Sequence[checks.Problem]):
        self.problems = list(problems)
        lines = [f"  {key}: {message}" if key else f"  {message}" for key, message in self.problems]
        count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
        super().__init__("\n".join([f"{os.fspath(path)}: {count}", *lines]))


@dataclass(frozen=True)
class Config:
    """The resolved configuration of a run."""

    path: Path
    model: ModelArguments
    data: DataArguments
    guards: GuardArguments
    training: TrainingArguments
    overrides: tuple[str, ...] = ()  # the words of the command line, for the command that resumes the run

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one global batch: over ranks, accumulation and rows."""
        rows = self.training.per_device_train_batch_size * self.training.gradient_accumulation_steps
        return rows * self.training.world_size * self.data.block_size

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the run: as given, or as many as `train_tokens` needs, rounded up."""
        if self.data.train_tokens is None:
            return self.training.max_steps
        return math.ceil(self.data.train_tokens / self.tokens_per_step)

    def to_dict(self) -> dict[str, Any]:
        """Flat and JSON-able, for `parse_config` to read again: ours first, then TrainingArguments', each in its
        declared order. The hub token is masked; of `train_tokens` and `max_steps` only the one chosen is set."""
        stored = {**vars(self.model), **vars(self.data), **vars(self.guards)}
        stored |= {name: value for name, value in self.training.to_dict().items() if name in TRAINING_FIELDS}
        if self.training.hub_token is None:  # masked all the same
            stored["hub_token"] = None
        if self.data.train_tokens is not None:  # a run sets max_steps too, once it knows the number of processes
            stored["max_steps"] = -1
        return stored


def parse_config(
    path: str | os.PathLike, overrides: Sequence[str] = (), machine_defaults: dict | None = None
) -> Config:
    """The JSON at `path`, then `overrides` (`--field value`, `--field=value`, bare `--flag`), checked and resolved.

    `machine_defaults` apply where neither sets a key. Paths are looked up as in `find_path`. An override of
    `train_tokens` or `max_steps` replaces the file's choice of the two; the same holds for `model_config` and
    `model_name_or_path`. Raises `ConfigError` with every problem found.
    """
    path = Path(path)
    given, problems = _read_json(path)
    options, misread = _read_overrides(overrides)
    replaced = {name for pair in checks.ALTERNATIVES if options.keys() & pair for name in pair}
    given = {k: v for k, v in given.items() if not k.startswith("_") and k not in replaced} | options

    found = {name: checks.find_problem(name, value, TYPES) for name, value in given.items()}
    if not isinstance(given.get("source", ""), str):
        found["source"] = checks.find_mixture_problem(given["source"], SOURCE_TYPES)
    elif given.get("source", "").lstrip().startswith("[{"):
        found["source"] = f"looks like a list of sources, but is no JSON: {checks.show(given['source'])}"
    found = {name: message for name, message in found.items() if message}
    values = _defaults() | {"output_dir": f"runs/{path.stem}"} | (machine_defaults or {})
    if given.get("fp16") is True and "bf16" not in given:
        values["bf16"] = False  # the user's fp16 overrides the machine's bf16
    for name in given.keys() - found.keys():
        is_whole = isinstance(given[name], float) and float not in TYPES[name].kinds  # such as 1e9
        values[name] = int(given[name]) if is_whole else given[name]
    found |= {name: "is required" for name, value in values.items() if value is MISSING and name not in found}
    found |= checks.find_conflicts(values, given.keys(), {*found}) | _resolve_paths(values, path, {*found})
    labels = {name: f"--{name}" for name in options}
    problems += misread + [(labels.get(name, name), message) for name, message in found.items()]
    if problems:
        raise ConfigError(path, problems)
    remember(values["hub_token"])
    training = _build_training(path, values, labels)
    model, data, guards = (group(**{f.name: values[f.name] for f in fields(group)}) for group in OURS)
    return Config(path, model, data, guards, training, tuple(overrides))


def _build_training(path: Path, values: dict[str, Any], labels: dict[str, str]) -> TrainingArguments:
    for name, tested in (("deepspeed", "not at all"), ("fsdp", "on CPU ranks only, see docs/resume.md")):
        if values[name]:
            logger.warning("%s is passed on to transformers; this recipe has been tested with it %s", name, tested)
    try:
        return TrainingArguments(**{name: values[name] for name in TRAINING_FIELDS})
    except (ValueError, TypeError, KeyError, NotImplementedError, ImportError, OSError) as error:
        message = " ".join(str(error).split())
        key = next((word for word in re.findall(r"\w+", message) if word in TRAINING_FIELDS), "TrainingArguments")
        raise ConfigError(path, [(labels.get(key, key), message)]) from error


def _defaults() -> dict[str, Any]:
    fresh = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in FIELDS.values()}
    return fresh | DEFAULTS


def format_config(config: Config) -> str:
    """The resolved keys that differ from their defaults, one per line, aligned; then the number of other keys."""
    resolved, defaults = config.to_dict(), _defaults()
    different = {k: v for k, v in resolved.items() if v != defaults[k] and (v or defaults[k])}
    width = max(map(len, different))
    lines = [f"{name:<{width}}  {json.dumps(value, ensure_ascii=False)}" for name, value in different.items()]
    return "\n".join([*lines, f"{len(resolved) - len(different)} other keys at their defaults"])


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
    if "source" not in unsound:
        values["source"] = _locate_source(values["source"], config_path)
    return problems


def _locate_source(source: str | list, config_path: Path) -> str | list:
    """A path or glob relative to the config's folder is made absolute; everything else stays as it is."""
    if isinstance(source, list):
        return [{**entry, "path": _locate_source(entry["path"], config_path)} for entry in source]
    beside = str(config_path.resolve().parent / source)
    return beside if "://" not in source and not glob.glob(source) and glob.glob(beside) else source


# Reading


def _read_json(path: Path) -> tuple[dict[str, Any], list[checks.Problem]]:
    repeated = []

    def to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs if not name.startswith("_")]
        repeated.extend((name, "is given twice; keep one") for name in dict.fromkeys(names) if names.count(name) > 1)
        return dict(pairs)

    try:
        given = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=to_dict)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(path, [("", _why_unreadable(error))]) from error
    if not isinstance(given, dict):
        raise ConfigError(path, [("", f"must be a JSON object of keys and values, not {checks.show(given)}")])
    return given, repeated


def _why_unreadable(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
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
    options, problems, words = {}, [], list(words)
    while words:
        word = words.pop(0)
        if not re.match(r"--\w", word):
            problems.append((word, "is not an option; options are --field value"))
            continue
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if not equals and words and not words[0].startswith("--"):
            equals, text = "=", words.pop(0)
        kinds = TYPES[name].kinds if name in TYPES else (bool, str)
        if name in options:
            problems.append((f"--{name}", "is given twice; keep one"))
        elif not equals and bool not in kinds:
            problems.append((f"--{name}", "needs a value"))
        else:
            options[name] = checks.convert_word(text, kinds) if equals else True
    return options, problems
