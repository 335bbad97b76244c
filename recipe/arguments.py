"""One flat JSON, then `--field value` overrides -> a checked `Config`.

TrainingArguments' keys and the recipe's own share one namespace. Nothing passes silently: every key, type, range
and combination is checked before anything is built, and all problems are reported at once. Keys that begin with
"_" are comments.
"""

import difflib
import inspect
import json
import logging
import math
import os
import re
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, Union

import torch
from transformers import TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.training_args import trainer_log_levels
from transformers.utils import is_torch_bf16_gpu_available, is_torch_tf32_available

from recipe.errors import UserError
from recipe.guards.finding import FINDING_IDS

logger = logging.getLogger(__name__)
Problem = tuple[str, str]  # key (`--key` when it came from the command line, "" for the file itself), message


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """What is trained: a new model from `model_config`, or the one at `model_name_or_path`; exactly one of the two."""

    model_config: str | None = field(default=None, metadata={"help": "LlamaConfig JSON of a new model."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "Checkpoint folder or hub name to go on."})
    tokenizer: str = field(metadata={"help": "Tokenizer folder or hub name."})
    attn_implementation: Literal[
        "auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"
    ] = field(default="auto", metadata={"help": "Attention kernel; auto takes the fastest that this machine runs."})


@dataclass(frozen=True, kw_only=True)
class DataArguments:
    """What it is trained on, and which documents belong to eval alone."""

    source: str = field(
        metadata={"help": '"docstrings" (embedded), a path, glob or URL, or "hf://owner/name/config".'}
    )
    text_column: str = field(default="text", metadata={"help": "Column or JSON key that holds the text."})
    block_size: int = field(default=1024, metadata={"help": "Tokens in a row."})
    train_tokens: int | None = field(default=None, metadata={"help": "Tokens of the whole run; or give max_steps."})
    train_skip: int = field(default=0, metadata={"help": "Index of the first document that training may read."})
    train_seed: int = field(default=42, metadata={"help": "Seed of the train stream's order."})
    eval_skip: int = field(default=100_000, metadata={"help": "Index of the first hold-out document."})
    eval_seed: int = field(default=1041, metadata={"help": "Seed of the eval stream's order."})
    eval_documents: int = field(default=1000, metadata={"help": "Hold-out documents; training steps over them."})
    document_masking: bool = field(default=False, metadata={"help": "Keep attention inside each document of a row."})
    num_lanes: int = field(default=32, metadata={"help": "Sub-streams of the canonical order; a power of two."})


@dataclass(frozen=True, kw_only=True)
class GuardArguments:
    """Which guards watch the run, against what, and what an error does."""

    trajectory: str = field(default="auto", metadata={"help": 'Reference curve: "auto", "none" or a JSON\'s path.'})
    on_regression: Literal["warn", "stop"] = field(
        default="warn", metadata={"help": "On an error: warn, or exit (3)."}
    )
    disabled_guards: list[str] = field(default_factory=list, metadata={"help": "Finding ids that are not judged."})


def _per_key(groups: Mapping[Any, str]) -> dict[str, Any]:
    """{value: "key key"} -> {"key": value}, so that a table states a reason once."""
    return {key: value for value, keys in groups.items() for key in keys.split()}


OURS = (ModelArguments, DataArguments, GuardArguments)

# Any other value breaks the recipe, so it is refused with the reason.
FIXED = {
    "remove_unused_columns": (False, "true strips the rows before the recipe's collator sees them"),
    "ignore_data_skip": (True, "the stream resumes at its own position; Trainer would replay the consumed data"),
    "logging_nan_inf_filter": (False, "true logs a NaN loss as 0.0"),
    "auto_find_batch_size": (False, "true changes the global batch, and with it the run, when memory runs out"),
    "average_tokens_across_devices": (True, "false weighs tokens by the rank that they are on"),
    "batch_eval_metrics": (True, "false gathers the logits of the whole hold-out in memory"),
    "label_smoothing_factor": (0.0, "perplexity, envelope and references are about the plain next-token loss"),
    "enable_jit_checkpoint": (False, "the recipe saves a checkpoint itself when it is interrupted"),
}
DEFAULTS = {name: value for name, (value, _) in FIXED.items()} | {
    "logging_steps": 10,
    "report_to": "none",
    "disable_tqdm": False,
    "prediction_loss_only": False,
    "ddp_find_unused_parameters": False,  # Trainer's own default walks the graph in each step
    "trackio_static_space_id": False,  # unset, a push to the hub also creates a Space
    "seed": 42,
}
ROWS = "the recipe deals rows to ranks itself, in canonical order"
# TrainingArguments would accept these, and they would change nothing, or nothing that is wanted.
MEANINGLESS = _per_key(
    {
        "the stream has no epochs; set train_tokens or max_steps": "num_train_epochs",
        "the command (train, evaluate, ...) says what is done": "do_train do_eval do_predict",
        ROWS: "accelerator_config parallelism_config train_sampling_strategy length_column_name dataloader_in_order",
        "every batch of the endless stream is full": "dataloader_drop_last",
        "the recipe's loader does not use it; set dataloader_num_workers": "dataloader_pin_memory "
        "dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context",
        "the order of the data comes from train_seed and eval_seed": "data_seed",
        "the recipe's batches and metrics are its own": "label_names include_for_metrics eval_do_concat_batches",
        "the launcher sets it": "local_rank",
    }
)
REMOVED = _per_key(
    {
        "renamed eval_strategy": "evaluation_strategy",
        "renamed use_cpu": "no_cuda",
        "renamed activation_checkpointing": "gradient_checkpointing",
        "renamed activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
        "use warmup_steps, which below 1 is a share of all steps": "warmup_ratio",
        "set another output_dir, or empty this one": "overwrite_output_dir",
        "set TENSORBOARD_LOGGING_DIR in the environment": "logging_dir",
        "weights are always safetensors": "save_safetensors",
        "the recipe logs tokens_per_second in every step": "include_tokens_per_second",
        ROWS: "group_by_length split_batches dispatch_batches",
        "use torch_compile": "torchdynamo",
        "use bf16 or fp16 alone": "half_precision_backend fp16_backend fp16_opt_level",
        "use hub_model_id": "push_to_hub_model_id push_to_hub_organization",
        "use hub_token": "push_to_hub_token",
        "delete the key": "past_index ray_scope jit_mode_eval use_mps_device tpu_num_cores use_legacy_prediction_loop",
    }
)
TRAINING_FIELDS = {f.name: f for f in fields(TrainingArguments) if f.name not in MEANINGLESS | REMOVED}
FIELDS = {f.name: f for group in OURS for f in fields(group)} | TRAINING_FIELDS
# transformers' own hints are too wide (a string of kwargs only fails later) or wrong (`fsdp` is a bool in v5).
TYPES = {name: hint for group in (*OURS, TrainingArguments) for name, hint in typing.get_type_hints(group).items()}
TYPES |= {"lr_scheduler_kwargs": dict | None, "activation_checkpointing_kwargs": dict | None}
TYPES |= {"fsdp": bool | str | None, "output_dir": str, "report_to": str | list[str]}
TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    list: "a list of strings",
    dict: "an object",
    NoneType: "null",
}
WORDS = {
    "disabled_guards": FINDING_IDS,
    "report_to": ("none", "all", *get_available_reporting_integrations()),
    "log_level": tuple(trainer_log_levels),
    "log_level_replica": tuple(trainer_log_levels),
    "include_num_input_tokens_seen": ("no", "all", "non_padding"),
}
AT_LEAST = {"block_size": 8} | _per_key(
    {
        0: "train_skip eval_skip train_seed eval_seed seed dataloader_num_workers learning_rate weight_decay "
        "adam_beta1 adam_beta2 max_grad_norm warmup_steps eval_delay neftune_noise_alpha",
        1: "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps train_tokens num_lanes "
        "eval_documents eval_accumulation_steps save_total_limit torch_empty_cache_steps ddp_timeout",
    }
)
# What a value must be beyond that, and the test for it.
RANGES = {
    "max_steps": ("at least 1", lambda v: v == -1 or v >= 1),
    "num_lanes": ("a power of two", lambda v: v & (v - 1) == 0),
    "warmup_steps": ("a whole number of steps, or a share below 1", lambda v: v < 1 or v == int(v)),
    "adam_epsilon": ("above 0", lambda v: v > 0),
}
RANGES |= dict.fromkeys(("adam_beta1", "adam_beta2"), ("below 1", lambda v: v < 1))
RANGES |= dict.fromkeys(("seed", "train_seed", "eval_seed"), ("below 2**32", lambda v: v < 2**32))
RANGES |= dict.fromkeys(
    ("eval_steps", "save_steps", "logging_steps"),
    ("a whole number of steps, or a share between 0 and 1", lambda v: v > 0 and (v < 1 or v == int(v))),
)
# What does nothing, or not what it says, unless the other key is on.
NEEDS = {
    "activation_checkpointing_kwargs": "activation_checkpointing",
    "liger_kernel_config": "use_liger_kernel",
    "fsdp_config": "fsdp",
    **dict.fromkeys(("torch_compile_backend", "torch_compile_mode"), "torch_compile"),
}
FILES, FOLDERS = ("model_config", "trajectory"), ("tokenizer", "model_name_or_path")
ALTERNATIVES = (("train_tokens", "max_steps"), ("model_config", "model_name_or_path"))
HUB_NAME = r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(?<!\.json)(?<!\.model)"


class ConfigError(UserError):
    """The configuration cannot be used; `problems` holds every (key, message) found."""

    def __init__(self, path: str | os.PathLike, problems: Sequence[Problem]):
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

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one global batch: over ranks, accumulation and rows."""
        rows = self.training.per_device_train_batch_size * self.training.gradient_accumulation_steps * _world_size()
        return rows * self.data.block_size

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the run: as given, or as many as read `train_tokens`, the last one whole."""
        if self.data.train_tokens is None:
            return self.training.max_steps
        return math.ceil(self.data.train_tokens / self.tokens_per_step)

    def to_dict(self) -> dict[str, Any]:
        """Flat and JSON-able: ours first, then TrainingArguments', each in its declared order; tokens are masked."""
        groups = (self.model, self.data, self.guards)
        resolved = {f.name: _plain(getattr(group, f.name)) for group in groups for f in fields(group)}
        resolved |= {name: _plain(getattr(self.training, name)) for name in TRAINING_FIELDS}
        return resolved | {k: _mask(k) for k, v in resolved.items() if k.endswith("_token") and v is not None}


def parse_config(
    path: str | os.PathLike, overrides: Sequence[str] = (), machine_defaults: Mapping[str, Any] = MappingProxyType({})
) -> Config:
    """The JSON at `path`, then `overrides` (`--field value`, `--field=value`, bare `--flag`), checked and resolved.

    `machine_defaults` stand where both are silent. Paths are looked up as in `find_path`. An override of
    `train_tokens` or `max_steps` replaces the file's choice of the two; so with `model_config` and
    `model_name_or_path`. Raises `ConfigError` with every problem found.
    """
    path = Path(path)
    given, problems = _read_json(path)
    options, misread = _read_overrides(overrides)
    replaced = {name for pair in ALTERNATIVES if options.keys() & pair for name in pair}
    given = {k: v for k, v in given.items() if not k.startswith("_") and k not in replaced} | options

    found = {name: message for name, value in given.items() if (message := _field_problem(name, value))}
    values = _defaults() | {"output_dir": f"runs/{path.stem}"} | machine_defaults
    if given.get("fp16") is True and "bf16" not in given:
        values["bf16"] = False  # the user's fp16 stands against the machine's bf16
    values |= {name: _settled(value, TYPES[name]) for name, value in given.items() if name not in found}
    found |= {name: "is required" for name, value in values.items() if value is MISSING and name not in found}
    found |= _cross_problems(path, values, given.keys(), found.keys())
    labels = {name: f"--{name}" for name in options}
    problems += misread + [(labels.get(name, name), message) for name, message in found.items()]
    if problems:
        raise ConfigError(path, problems)
    return _build(path, values, labels)


def _build(path: Path, values: dict[str, Any], labels: Mapping[str, str]) -> Config:
    for name in (*FILES, *FOLDERS):
        if values[name] not in (None, "auto", "none"):
            values[name] = str(find_path(values[name], path) or values[name])
    try:
        training = TrainingArguments(**{name: values[name] for name in TRAINING_FIELDS})
    except (ValueError, TypeError, KeyError, NotImplementedError, ImportError, OSError) as error:
        message = " ".join(str(error).split())
        key = next((word for word in re.findall(r"\w+", message) if word in TRAINING_FIELDS), "TrainingArguments")
        raise ConfigError(path, [(labels.get(key, key), message)]) from error
    for name in ("deepspeed", "fsdp"):
        if values[name]:
            logger.warning("%s is passed on to transformers, but this recipe has not been tested with it", name)
    return Config(path, *(group(**{f.name: values[f.name] for f in fields(group)}) for group in OURS), training)


def format_config(config: Config) -> str:
    """The resolved keys that differ from their defaults, one per line, aligned; then how many others do not."""
    resolved = config.to_dict()
    defaults = {name: _plain(value) for name, value in _defaults().items()}
    different = {k: v for k, v in resolved.items() if v != defaults[k] and not (_is_off(v) and _is_off(defaults[k]))}
    width = max(map(len, different))
    lines = [f"{name:<{width}}  {json.dumps(value, ensure_ascii=False)}" for name, value in different.items()]
    return "\n".join([*lines, f"{len(resolved) - len(different)} other keys at their defaults"])


def find_path(value: str, config_path: str | os.PathLike) -> Path | None:
    """The first place where `value` exists: as it stands, beside the config, in the project, in the package."""
    return next((place for place in _places(value, config_path) if os.path.exists(place)), None)


def _places(value: str, config_path: str | os.PathLike) -> list[Path]:
    path = Path(os.path.expanduser(value))
    if path.is_absolute():
        return [path]
    package = Path(__file__).resolve().parent
    places = [path, Path(config_path).resolve().parent / path, package.parent / path]
    if path.parts[:1] == ("tokenizer",):  # a wheel carries the top-level folder inside the package
        places.append(package / "_tokenizer" / Path(*path.parts[1:]))
    return places


# Reading


def _read_json(path: Path) -> tuple[dict[str, Any], list[Problem]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(path, [("", "no such file")]) from None
    except IsADirectoryError:
        raise ConfigError(path, [("", "is a folder; name the JSON file in it")]) from None
    except UnicodeDecodeError as error:
        raise ConfigError(path, [("", f"is not UTF-8 (byte {error.start}); save it as UTF-8")]) from None
    except OSError as error:
        raise ConfigError(path, [("", f"cannot be read: {error.strerror}")]) from None
    repeated: list[Problem] = []

    def to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs if not name.startswith("_")]
        repeated.extend((name, "is given twice; keep one") for name in dict.fromkeys(names) if names.count(name) > 1)
        return dict(pairs)

    try:
        given = json.loads(text, object_pairs_hook=to_dict)
    except json.JSONDecodeError as error:
        raise ConfigError(path, [("", _syntax_message(error))]) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(path, [("", f"is not usable JSON: {error}")]) from None
    if not isinstance(given, dict):
        raise ConfigError(path, [("", f"must be a JSON object of keys and values, not {_show(given)}")])
    return given, repeated


def _syntax_message(error: json.JSONDecodeError) -> str:
    before, rest = error.doc[: error.pos].rstrip(), error.doc[error.pos :].lstrip()
    where = f"line {error.lineno} column {error.colno}"
    if not error.doc.strip():
        return "is empty"
    if rest.startswith(("//", "/*", "#")):
        return f'{where}: JSON has no comments; use a key that begins with "_", such as "_comment"'
    if re.match(r"(,\s*)?[}\]]", rest) and (before.endswith(",") or rest.startswith(",")):
        return f"{where}: trailing comma before the closing bracket; remove it"
    return f"{where}: invalid JSON: {error.msg}"


def _read_overrides(words: Sequence[str]) -> tuple[dict[str, Any], list[Problem]]:
    """`--field value`, `--field=value` and bare `--flag` -> values of their field's type, and what was wrong."""
    options: dict[str, Any] = {}
    problems: list[Problem] = []
    words = list(words)
    while words:
        word = words.pop(0)
        if not re.match(r"--\w", word):
            problems.append((word, "is not an option; options are --field value"))
            continue
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if not equals and words and not words[0].startswith("--"):
            equals, text = "=", words.pop(0)
        if name in options:
            problems.append((f"--{name}", "is given twice; keep one"))
        elif not equals and name in FIELDS and bool not in _members(TYPES[name]):
            problems.append((f"--{name}", "needs a value"))
        else:
            options[name] = _converted(text, TYPES.get(name, str)) if equals else True
    return options, problems


def _converted(text: str, hint: Any) -> Any:
    """A word of the command line as the field's type; where none fits, as it stands, for the type check to refuse."""
    members = _members(hint)
    kinds = {typing.get_origin(member) or member for member in members}
    lowered = text.lower()
    if NoneType in kinds and lowered in ("null", "none"):
        return None
    if lowered in ("true", "false") and (bool in kinds or False in _choices(hint)):
        return lowered == "true"
    for kind in (int, float):
        if kinds & {int, float}:
            try:
                return kind(text)
            except ValueError:
                pass
    if kinds & {list, dict} and text[:1] in ("[", "{"):
        try:
            return json.loads(text)
        except ValueError:
            return text
    if list in kinds and str not in kinds:
        return [word.strip() for word in text.split(",") if word.strip()]
    return text


# One field


def _field_problem(name: str, value: Any) -> str | None:
    if name in REMOVED:
        return f"was removed in transformers 5: {REMOVED[name]}"
    if name in MEANINGLESS:
        return f"is refused: {MEANINGLESS[name]}"
    if name not in FIELDS:
        nearest = difflib.get_close_matches(name, FIELDS, n=1)
        return f"unknown key; did you mean {nearest[0]}?" if nearest else "unknown key"
    if not _all_finite(value):
        return f"expected a finite number, got {_show(value)}"
    return _type_problem(value, TYPES[name]) or _value_problem(name, _settled(value, TYPES[name]))


def _value_problem(name: str, value: Any) -> str | None:
    if name in FIXED and value != FIXED[name][0]:
        return f"must stay {_show(FIXED[name][0])}: {FIXED[name][1]}"
    if value == "" and name not in ("debug", "optim_args"):
        return "must not be empty"
    if name.endswith("_token") and value == _mask(name):
        return "is the mask of a stored config; remove it and set HF_TOKEN in the environment"
    if isinstance(value, (str, list)):
        return _word_problem(name, [value] if isinstance(value, str) else value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if name in AT_LEAST and value < AT_LEAST[name]:
            return f"must be at least {AT_LEAST[name]}, got {_show(value)}"
        if name in RANGES and not RANGES[name][1](value):
            return f"must be {RANGES[name][0]}, got {_show(value)}"
    return None


def _word_problem(name: str, words: Sequence[str]) -> str | None:
    unknown = [word for word in words if name in WORDS and word not in WORDS[name]]
    if name == "report_to" and unknown and unknown[0] in INTEGRATION_TO_CALLBACK:
        return f"{unknown[0]} is not installed here; install it, or leave it out"
    return _not_a_choice(unknown[0], WORDS[name]) if unknown else None


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, UnionType) else (hint,)


def _choices(hint: Any) -> list[Any]:
    """The values that a Literal or an Enum in the hint allows."""
    return [v for m in _members(hint) if not _is_plain(m) for v in (typing.get_args(m) or [item.value for item in m])]


def _is_plain(member: Any) -> bool:
    return typing.get_origin(member) is not Literal and not (isinstance(member, type) and issubclass(member, Enum))


def _type_problem(value: Any, hint: Any) -> str | None:
    choices = _choices(hint)
    has_words = any(isinstance(choice, str) for choice in choices)  # `IntervalStrategy | str` is no free string
    members = [m for m in _members(hint) if _is_plain(m) and not (m is str and has_words)]
    if any(type(choice) is type(value) and choice == value for choice in choices):
        return None
    if any(_fits(value, member) for member in members):
        return None
    if has_words and isinstance(value, str):
        return _not_a_choice(value, choices)
    kinds = [TYPE_NAMES[typing.get_origin(m) or m] for m in members if (typing.get_origin(m) or m) in TYPE_NAMES]
    expected = " or ".join([f"one of {', '.join(map(str, choices))}"] * has_words + kinds)
    quoted = isinstance(value, str) and any(_fits(_converted(value, m), m) for m in members if m in (bool, int, float))
    return f"expected {expected}, got {_show(value)}" + (": remove the quotes" if quoted else "")


def _fits(value: Any, member: Any) -> bool:
    kind, inner = typing.get_origin(member) or member, typing.get_args(member)
    if kind is Any:
        return True
    if kind in (int, float):  # 1e9 is how a person writes a whole number of tokens
        return type(value) in (int, float) and (kind is float or value == int(value))
    if not isinstance(value, kind):
        return False
    inside = value if kind is list else value.values() if kind is dict else ()
    return not inner or all(_type_problem(item, inner[-1]) is None for item in inside)


def _not_a_choice(word: str, choices: Sequence[str]) -> str:
    nearest = sorted(choices, key=lambda choice: -difflib.SequenceMatcher(None, word.lower(), choice).ratio())
    more = f", ... ({len(nearest)} in all)" if len(nearest) > 8 else ""
    return f"{_show(word)} is not one of {', '.join(nearest[:8])}{more}"


def _all_finite(value: Any) -> bool:
    if isinstance(value, (int, float)):
        return abs(value) < 1e300
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return all(map(_all_finite, inside))


# Several fields together: a check's parameters are the fields it needs, and it runs only where those are sound.


def _cross_problems(path: Path, values: Mapping[str, Any], given: Collection, unsound: Collection) -> dict[str, str]:
    found = {}
    for name in (*FILES, *FOLDERS):
        if name not in unsound and values[name] not in (None, "auto", "none"):
            found |= {name: message} if (message := _path_problem(name, values[name], path)) else {}
    for name, switch in NEEDS.items():
        if not {name, switch} & set(unsound) and values[name] and not values[switch]:
            found[name] = f"needs {switch}, which is off"
    for check in CROSS_CHECKS:
        needed = inspect.signature(check).parameters
        if not any(name in unsound for name in needed):
            problems = check(**{name: given if name == "given" else values[name] for name in needed})
            found |= {name: message for name, message in problems if name not in found}
    return found


def _path_problem(name: str, value: str, config_path: Path) -> str | None:
    found = find_path(value, config_path)
    if found is not None and name in FILES:
        return None if found.is_file() else f"{value} is a folder; name the JSON file in it"
    if found is not None:
        return None if found.is_dir() else f"{value} is a file; name the folder that holds it"
    if name in FOLDERS and not value.startswith("tokenizer/") and re.fullmatch(HUB_NAME, value):
        return None
    places = ", ".join(str(place) for place in _places(value, config_path))
    return f"{value} not found; looked for {places}" + ("; nor is it a hub name" if name in FOLDERS else "")


def _check_length(train_tokens, max_steps) -> Iterator[Problem]:
    if (train_tokens is None) == (max_steps == -1):
        found = "neither is set" if train_tokens is None else "both are set"
        yield "train_tokens", f"give train_tokens or max_steps; {found}"


def _check_model(model_config, model_name_or_path) -> Iterator[Problem]:
    if (model_config is None) == (model_name_or_path is None):
        found = "neither is set" if model_config is None else "both are set"
        yield "model_config", f"give model_config or model_name_or_path; {found}"


def _check_lanes(num_lanes, dataloader_num_workers) -> Iterator[Problem]:
    ranks, workers = _world_size(), max(1, dataloader_num_workers)
    if num_lanes % ranks:
        yield "num_lanes", f"{num_lanes} lanes cannot be dealt to {ranks} processes; start a divisor of {num_lanes}"
    elif num_lanes % (ranks * workers):
        fitting = [str(n) for n in range(num_lanes // ranks + 1) if num_lanes % (ranks * max(1, n)) == 0]
        message = f"num_lanes {num_lanes} cannot be dealt to {ranks} x {workers} (processes x workers)"
        yield "dataloader_num_workers", f"{message}; {', '.join(fitting)} would do"


def _check_precision(bf16, fp16, bf16_full_eval, fp16_full_eval, tf32, use_cpu) -> Iterator[Problem]:
    for bf16_on, fp16_on, suffix in ((bf16, fp16, ""), (bf16_full_eval, fp16_full_eval, "_full_eval")):
        key = f"bf16{suffix}"
        if bf16_on and fp16_on:
            yield key, f"{key} and fp16{suffix} are both true; keep one (bf16 where the GPU has it)"
        elif bf16_on and not use_cpu and not is_torch_bf16_gpu_available():
            yield key, f"this machine has no GPU that computes in bf16; add --use_cpu true, or --{key} false"
        elif fp16_on and _on_cpu(use_cpu):
            yield f"fp16{suffix}", "needs a GPU; on a CPU use bf16, or neither"
    if tf32 and not is_torch_tf32_available():
        yield "tf32", "this machine has no TF32; leave the key out, the recipe turns TF32 on where it exists"


def _check_attention(attn_implementation, bf16, fp16, use_cpu, document_masking, use_cache) -> Iterator[Problem]:
    is_flash = attn_implementation.startswith("flash")
    if (is_flash or attn_implementation == "flex_attention") and _on_cpu(use_cpu):
        yield "attn_implementation", f"{attn_implementation} needs a GPU to train; use auto, sdpa or eager"
    elif is_flash and not (bf16 or fp16):
        yield "attn_implementation", f"{attn_implementation} computes in half precision only; set bf16, or use sdpa"
    if document_masking and use_cache:
        yield "use_cache", "true turns document_masking off without a word; remove it"


def _check_intervals(given, eval_strategy, eval_steps, save_strategy, logging_strategy) -> Iterator[Problem]:
    strategies = {"eval_strategy": eval_strategy, "save_strategy": save_strategy, "logging_strategy": logging_strategy}
    for name, strategy in strategies.items():
        if strategy == "epoch":
            yield name, 'the stream has no epochs; use "steps"'
    if eval_strategy == "steps" and eval_steps is None:
        yield "eval_steps", 'is required when eval_strategy is "steps"'
    if eval_steps is not None and "eval_strategy" not in given:
        yield "eval_steps", 'does nothing while eval_strategy is unset; add "eval_strategy": "steps"'


def _check_best(save_strategy, eval_strategy, load_best_model_at_end, metric_for_best_model) -> Iterator[Problem]:
    if save_strategy == "best" and (eval_strategy == "no" or metric_for_best_model is None):
        yield "save_strategy", '"best" needs an eval_strategy and metric_for_best_model, such as "loss"'
    if load_best_model_at_end and "no" in (eval_strategy, save_strategy):
        yield "load_best_model_at_end", "needs both an eval_strategy and a save_strategy"


def _check_schedule(lr_scheduler_type, lr_scheduler_kwargs, learning_rate, warmup_steps) -> Iterator[Problem]:
    if lr_scheduler_type in ("constant", "reduce_lr_on_plateau", "greedy") and warmup_steps:
        yield "warmup_steps", f"{lr_scheduler_type} ignores it; use constant_with_warmup, or remove it"
    if lr_scheduler_type in ("constant", "constant_with_warmup") and lr_scheduler_kwargs:
        yield "lr_scheduler_kwargs", f"{lr_scheduler_type} ignores them; remove them"
    # Built once on nothing: transformers would refuse a wrong or missing kwarg only after the data has been opened.
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=learning_rate)
    try:
        get_scheduler(lr_scheduler_type, optimizer, 0, 100_000, dict(lr_scheduler_kwargs or {}))
    except (TypeError, ValueError, ArithmeticError) as error:
        yield "lr_scheduler_kwargs", f"do not suit {lr_scheduler_type}: {error}"


CROSS_CHECKS = (
    *(_check_length, _check_model, _check_lanes, _check_precision, _check_attention),
    *(_check_intervals, _check_best, _check_schedule),
)


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _on_cpu(use_cpu: bool) -> bool:
    return use_cpu or not torch.accelerator.is_available()


# Values


def _defaults() -> dict[str, Any]:
    fresh = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in FIELDS.values()}
    return fresh | DEFAULTS


def _settled(value: Any, hint: Any) -> Any:
    """1e9 as int where the field is one."""
    return int(value) if isinstance(value, float) and int in _members(hint) and float not in _members(hint) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def _is_off(value: Any) -> bool:
    return value in (None, False, "", "none", [])


def _mask(name: str) -> str:
    return f"<{name.upper()}>"


def _show(value: Any) -> str:
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "an object"
    return json.dumps(value, ensure_ascii=False)[:80]
