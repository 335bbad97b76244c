"""The values that the keys of a configuration accept, one key at a time: refused names, types, choices, ranges.

Each check says what is wrong and how to fix it. `keys.py` knows which keys exist, `conflicts.py` has the combinations.
Nothing here imports torch.
"""

import ast
import difflib
import json
import math
import re
from collections.abc import Collection, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import NoneType
from typing import Any

from recipe.keys import FieldType, unknown_key

Problem = tuple[str, str]  # key (`--key` when it came from the command line, "" for the file itself), message

TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", NoneType: "null"}
TYPE_NAMES |= {list: "a list of strings", dict: "an object"}
# TrainingArguments would accept these without any effect, or with a wrong one; from evaluation_strategy on they are
# names of transformers 4.
REFUSED = {
    "num_train_epochs": "the stream has no epochs; set train_tokens or max_steps",
    "do_train do_eval do_predict": "the command (train, check, ...) decides this",
    "accelerator_config parallelism_config dataloader_in_order": "the recipe deals rows to ranks and workers itself",
    "train_sampling_strategy group_by_length length_column_name": "the recipe's rows have one canonical order",
    "dataloader_drop_last": "every batch of the endless stream is full",
    "dataloader_pin_memory dataloader_persistent_workers": "the recipe's loader does not use it",
    "dataloader_prefetch_factor dataloader_multiprocessing_context": "the recipe's loader does not use it",
    "data_seed": "the order of the data comes from train_seed and eval_seed",
    "label_names include_for_metrics eval_do_concat_batches": "the recipe's batches and metrics are its own",
    "local_rank": "the launcher sets it",
    "evaluation_strategy": "its name is now eval_strategy",
    "no_cuda": "its name is now use_cpu",
    "gradient_checkpointing": "its name is now activation_checkpointing",
    "gradient_checkpointing_kwargs": "its name is now activation_checkpointing_kwargs",
    "warmup_ratio": "use warmup_steps, which below 1 is a share of all steps",
    "overwrite_output_dir": "set another output_dir, or empty this one",
    "logging_dir": "set TENSORBOARD_LOGGING_DIR in the environment",
    "save_safetensors": "weights are always safetensors",
}
REFUSED = {name: reason for names, reason in REFUSED.items() for name in names.split()}
# Trackers of transformers -> the packages of which one is needed.
TRACKERS = {
    "trackio": "trackio",
    "tensorboard": "tensorboard tensorboardX",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "comet_ml": "comet_ml",
    "azure_ml": "azureml-core",
    "clearml": "clearml",
    "codecarbon": "codecarbon",
    "dagshub": "dagshub",
    "dvclive": "dvclive",
    "neptune": "neptune neptune-client",
    "swanlab": "swanlab",
}
# Optimizers -> the package that has them. The first that matches; all others are torch's or transformers' own.
OPTIMIZERS = (
    ("galore_", "galore-torch"),
    ("apollo_", "apollo-torch"),
    ("schedule_free_", "schedulefree"),
    ("lomo|adalomo", "lomo-optim"),
    ("grokadamw", "grokadamw"),
    ("stable_adamw", "torch-optimi"),
    ("adamw_torch_[48]bit", "torchao"),
    ("adamw_anyprecision", "torchdistx"),
    ("adamw_torch_xla", "torch_xla"),
    ("adamw_torch_npu", "torch_npu"),
    (".*(bnb|8bit|paged|lion|ademamix)", "bitsandbytes"),
)
# Choices that the type hint does not list.
WORDS = {
    "report_to": ("none", "all", *TRACKERS, "kubeflow"),
    "log_level": ("detail", "debug", "info", "warning", "error", "critical", "passive"),
    "include_num_input_tokens_seen": ("no", "all", "non_padding"),
}
# A condition on numbers, its test, and the keys that it applies to. The first that fails is reported.
RANGES = (
    ("at least 0", lambda v: v >= 0, "train_skip eval_skip train_seed eval_seed seed dataloader_num_workers"),
    ("at least 0", lambda v: v >= 0, "learning_rate weight_decay adam_beta1 adam_beta2 max_grad_norm warmup_steps"),
    ("at least 1", lambda v: v >= 1, "per_device_train_batch_size per_device_eval_batch_size save_total_limit"),
    ("at least 1", lambda v: v >= 1, "gradient_accumulation_steps train_tokens num_lanes eval_documents"),
    ("at least 1", lambda v: v >= 1 or v == -1, "max_steps"),  # for Trainer, -1 means unset
    ("at least 8", lambda v: v >= 8, "block_size"),
    ("above 0", lambda v: v > 0, "adam_epsilon weight"),
    ("below 1", lambda v: v < 1, "adam_beta1 adam_beta2"),
    ("below 2**32", lambda v: v < 2**32, "seed train_seed eval_seed"),
    ("a power of two", lambda v: math.log2(v).is_integer(), "num_lanes"),
    ("above 0: a whole number of steps, or a share of all", lambda v: v > 0, "eval_steps save_steps logging_steps"),
    ("a whole number of steps, or a share", lambda v: v < 1 or v % 1 == 0, "eval_steps save_steps logging_steps"),
    ("a whole number of steps, or a share below 1", lambda v: v < 1 or v % 1 == 0, "warmup_steps"),
)
# Any other value breaks the recipe, so it is refused with the reason.
FIXED = {
    "remove_unused_columns": (False, "true strips the rows before the recipe's collator sees them"),
    "ignore_data_skip": (True, "the stream resumes at its own position; Trainer would replay the consumed data"),
    "logging_nan_inf_filter": (False, "true logs a NaN loss as 0.0"),
    "auto_find_batch_size": (False, "true changes the global batch, and with it the run, when memory runs out"),
    "average_tokens_across_devices": (True, "false weighs tokens by the rank that they are on"),
    "batch_eval_metrics": (True, "false gathers the logits of the whole hold-out in memory"),
    "label_smoothing_factor": (0.0, "perplexity, n-gram baseline and references need the plain next-token loss"),
    "enable_jit_checkpoint": (False, "the recipe saves a checkpoint itself when it is interrupted"),
}
# The recipe's own defaults for keys of TrainingArguments.
DEFAULTS = {name: value for name, (value, _) in FIXED.items()} | {
    "logging_steps": 10,
    "report_to": [],
    "disable_tqdm": False,
    "prediction_loss_only": False,
    "ddp_find_unused_parameters": False,  # Trainer's default walks the graph in each step
    "trackio_static_space_id": False,  # unset, a push to the hub also creates a Space
    "seed": 42,
}
LIKE = 0.6  # ratio of difflib from which words are alike, as in its `get_close_matches`
ALTERNATIVES = (("train_tokens", "max_steps"), ("model_config", "model_name_or_path"))


def find_problem(name: str, value: Any, types: Mapping[str, FieldType]) -> str | None:
    """What is wrong with `value` for the known key `name`."""
    if problem := type_problem(value, types[name]):
        return problem
    choices = types[name].choices
    if name in FIXED and value != FIXED[name][0]:
        return f"must stay {show(FIXED[name][0])}: {FIXED[name][1]}"
    if problem := _missing_package(name, value):
        return problem
    if isinstance(value, (str, list)):
        return _word_problem(name, value, finding_ids() if name == "disabled_guards" else WORDS.get(name, choices))
    return _number_problem(name, value) if type(value) in (int, float) else None


@cache
def finding_ids() -> tuple[str, ...]:
    """From the sources of the guards, which take seconds to import: `FINDING_IDS` in another order."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (Path(__file__).parent / "guards").glob("*.py")]
    constants = {name: value for tree in trees for node in tree.body for name, value in _assigned(node)}
    in_classes = (node for tree in trees for each in tree.body if isinstance(each, ast.ClassDef) for node in each.body)
    tables = [value for node in in_classes for name, value in _assigned(node) if name == "ids"]
    keys = [key for table in tables if isinstance(table, ast.Dict) for key in table.keys]
    return tuple((constants[key.id] if isinstance(key, ast.Name) else key).value for key in keys)


def _assigned(node: ast.stmt) -> list[tuple[str, ast.expr]]:
    """Names and values of an assignment, also of `A, B = "a", "b"`."""
    if not isinstance(node, ast.Assign):
        return []
    sides = (getattr(side, "elts", [side]) for side in (node.targets[0], node.value))
    return [(name.id, value) for name, value in zip(*sides, strict=False) if isinstance(name, ast.Name)]


def is_installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def _missing_package(name: str, value: Any) -> str | None:
    if name == "optim" and isinstance(value, str) and (package := _package_of(value)):
        return f"{value} needs the package {package}, which is not installed; --optim adamw_torch would do"
    if name == "deepspeed" and value and not is_installed("deepspeed"):
        return "needs the package deepspeed, which is not installed; install it, or remove it"
    if name == "use_liger_kernel" and value is True and not is_installed("liger-kernel"):
        return "needs the package liger-kernel, which is not installed; --use_liger_kernel false would do"
    for word in ([value] if isinstance(value, str) else value) if name == "report_to" else ():
        if word in TRACKERS and not any(map(is_installed, TRACKERS[word].split())):
            package = TRACKERS[word].split()[0]
            return f"{word} needs the package {package}, which is not installed; --report_to none would do"
    return None


def _package_of(optimizer: str) -> str | None:
    """The package that an optimizer needs and that is not installed."""
    package = next((package for pattern, package in OPTIMIZERS if re.match(pattern, optimizer)), None)
    return package if package and not is_installed(package) else None


def find_mixture_problem(entries: Any, types: Mapping[str, FieldType]) -> str | None:
    """What is wrong with a `source` that is not a string; `types` holds the keys that an entry may have."""
    example = '{"path": "data/*.parquet", "weight": 0.7}'
    if not isinstance(entries, list) or not entries:
        found = "an empty list" if entries == [] else show(entries)
        return f"expected a string, or a list of entries like {example}; got {found}"
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or "path" not in entry:
            return f"entry {number} must be an object with a path, such as {example}"
        for name, value in entry.items():
            problem = find_problem(name, value, types) if name in types else unknown_key(name, types)
            if problem:
                return f"entry {number}: {name}: {problem}"
    return None


def convert_word(text: str, kinds: Collection[type]) -> Any:
    """A word of the command line as one of `kinds`; unchanged where none fits, for `find_problem` to refuse."""
    lowered = text.lower()
    if NoneType in kinds and lowered in ("null", "none"):
        return None
    if bool in kinds and lowered in ("true", "false"):
        return lowered == "true"
    try:
        if (list in kinds or dict in kinds) and text[:1] in ("[", "{"):
            return json.loads(text)
        if int in kinds or float in kinds:
            return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        return text
    if list in kinds and str not in kinds:
        return [word.strip() for word in text.split(",") if word.strip()]
    return text


def show(value: Any) -> str:
    """A value as JSON, for a message."""
    return {list: "a list", dict: "an object"}.get(type(value)) or json.dumps(value, ensure_ascii=False)[:80]


def _fits(value: Any, kind: type) -> bool:
    if kind in (int, float):  # accepts 1e9 as a whole number of tokens
        return type(value) in (int, float) and (kind is float or value % 1 == 0)
    return isinstance(value, kind) and (kind is not list or all(isinstance(item, str) for item in value))


def type_problem(value: Any, expected: FieldType) -> str | None:
    kinds, choices = expected
    if any(_fits(value, kind) for kind in kinds):
        return None
    names = TYPE_NAMES | ({str: f"one of {', '.join(choices)}"} if choices else {})
    bare = {bool, int, float}.intersection(kinds) if isinstance(value, str) else ()
    fix = ": remove the quotes" if any(_fits(convert_word(value, [kind]), kind) for kind in bare) else ""
    return f"expected {' or '.join(names[kind] for kind in kinds)}, got {show(value)}{fix}"


def _word_problem(name: str, value: str | list[str], choices: Collection[str]) -> str | None:
    if value == "" and not choices and name not in ("debug", "optim_args"):
        return "must not be empty"
    if name == "hub_token" and value == "<HUB_TOKEN>":
        return "is the mask of a stored config; remove it and set HF_TOKEN in the environment"
    if name in ("eval_strategy", "save_strategy", "logging_strategy") and value == "epoch":
        return f"the stream has no epochs; --{name} steps would do"
    words = [value] if isinstance(value, str) else value
    unknown = next((word for word in words if choices and word not in choices), None)
    if unknown is None:
        return None
    nearest = _nearest(name, unknown, choices)
    more = f", ... ({len(nearest)} in all)" if len(nearest) > 8 else ""
    return f"{show(unknown)} is not one of {', '.join(nearest[:8])}{more}"


def _nearest(name: str, unknown: str, choices: Collection[str]) -> list[str]:
    """The choices that work here, the likeliest first."""
    usable = [choice for choice in choices if name != "optim" or not _package_of(choice)]
    return sorted(usable, key=lambda choice: _likeness(unknown, choice), reverse=True)


def _likeness(unknown: str, choice: str) -> float:
    """Most of choices that begin with the word, as adamw_torch with adam; of unlike optimizers, of the usual one."""
    word = re.sub(r"\W+", "_", unknown.lower())
    alike = difflib.SequenceMatcher(None, word, choice).ratio() + 0.1 * word.startswith(choice)
    return 2 * choice.startswith(word) + max(alike, LIKE * (choice == "adamw_torch"))


def nearest_choice(name: str, value: Any, types: Mapping[str, FieldType]) -> str | None:
    """The likeliest choice where `value` is none of those that the known key has, and like one."""
    choices = WORDS.get(name, types[name].choices)
    if not isinstance(value, str) or not choices or value in choices:
        return None
    nearest = _nearest(name, value, choices)[0]
    return nearest if _likeness(value, nearest) >= LIKE else None


def _number_problem(name: str, value: float) -> str | None:
    if not abs(value) < 1e300:
        return f"expected a finite number, got {show(value)}"
    for what, holds, names in RANGES:
        if name in names.split() and not holds(value):
            return f"must be {what}, got {show(value)}"
    return None
