"""What the keys of a configuration may hold: refused names, types, choices, ranges, and what must hold together.

Each check says what is wrong and how to mend it. Which keys exist is `arguments.py`'s business.
"""

import difflib
import inspect
import json
import math
import os
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union

import torch
from transformers import get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.training_args import trainer_log_levels
from transformers.utils import is_torch_bf16_gpu_available, is_torch_tf32_available

from recipe.guards.finding import FINDING_IDS

Problem = tuple[str, str]  # key (`--key` when it came from the command line, "" for the file itself), message


class FieldType(NamedTuple):
    kinds: tuple[type, ...]  # plain types; a value must have one of them
    choices: tuple[str, ...]  # the only strings allowed, where a Literal or an Enum limits them


def _per_key(groups: Mapping[Any, str]) -> dict[str, Any]:
    """{value: "key key"} -> {"key": value}, so that a table states a reason once."""
    return {key: value for value, keys in groups.items() for key in keys.split()}


REFUSED = _per_key(
    {
        # TrainingArguments would accept these, and they would change nothing, or nothing that is wanted.
        "the stream has no epochs; set train_tokens or max_steps": "num_train_epochs",
        "the command (train, evaluate, ...) says what is done": "do_train do_eval do_predict",
        "the recipe deals rows to ranks itself, in canonical order": "accelerator_config parallelism_config "
        "train_sampling_strategy length_column_name dataloader_in_order group_by_length",
        "every batch of the endless stream is full": "dataloader_drop_last",
        "the recipe's loader does not use it; set dataloader_num_workers": "dataloader_pin_memory "
        "dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context",
        "the order of the data comes from train_seed and eval_seed": "data_seed",
        "the recipe's batches and metrics are its own": "label_names include_for_metrics eval_do_concat_batches",
        "the launcher sets it": "local_rank",
        # Names of transformers 4.
        "renamed eval_strategy": "evaluation_strategy",
        "renamed use_cpu": "no_cuda",
        "renamed activation_checkpointing": "gradient_checkpointing",
        "renamed activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
        "use warmup_steps, which below 1 is a share of all steps": "warmup_ratio",
        "set another output_dir, or empty this one": "overwrite_output_dir",
        "set TENSORBOARD_LOGGING_DIR in the environment": "logging_dir",
        "weights are always safetensors": "save_safetensors",
    }
)
TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", NoneType: "null"}
TYPE_NAMES |= {list: "a list of strings", dict: "an object"}
# Choices that the type does not hold.
WORDS = {
    "disabled_guards": FINDING_IDS,
    "report_to": ("none", "all", *get_available_reporting_integrations()),
    "log_level": tuple(trainer_log_levels),
    "include_num_input_tokens_seen": ("no", "all", "non_padding"),
}
AT_LEAST = {"block_size": 8} | _per_key(
    {
        0: "train_skip eval_skip train_seed eval_seed seed dataloader_num_workers learning_rate weight_decay "
        "adam_beta1 adam_beta2 max_grad_norm warmup_steps",
        1: "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps train_tokens num_lanes "
        "eval_documents save_total_limit",
    }
)
# What a number must be beyond that, and the test for it.
RANGES = _per_key(
    {
        ("at least 1", lambda v: v == -1 or v >= 1): "max_steps",
        ("a power of two", lambda v: math.log2(v).is_integer()): "num_lanes",
        ("above 0", lambda v: v > 0): "adam_epsilon",
        ("below 1", lambda v: v < 1): "adam_beta1 adam_beta2",
        ("below 2**32", lambda v: v < 2**32): "seed train_seed eval_seed",
        ("a whole number of steps, or a share below 1", lambda v: v < 1 or v % 1 == 0): "warmup_steps",
        (
            "a whole number of steps, or a share between 0 and 1",
            lambda v: v > 0 and (v < 1 or v % 1 == 0),
        ): "eval_steps save_steps logging_steps",
    }
)
ALTERNATIVES = (("train_tokens", "max_steps"), ("model_config", "model_name_or_path"))


# One key


def find_problem(name: str, value: Any, types: Mapping[str, FieldType]) -> str | None:
    """What is wrong with `value` for the key `name`; `types` holds every known key."""
    if name in REFUSED:
        return f"is refused: {REFUSED[name]}"
    if name not in types:
        nearest = difflib.get_close_matches(name, types, n=1)
        return f"unknown key; did you mean {nearest[0]}?" if nearest else "unknown key"
    kinds, choices = types[name]
    if not any(_fits(value, kind) for kind in kinds):
        return _type_problem(value, kinds, choices)
    if isinstance(value, (str, list)):
        return _word_problem(name, value, WORDS.get(name, choices))
    return None if isinstance(value, (bool, dict, NoneType)) else _number_problem(name, value)


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
            problem = find_problem(name, value, types)
            if name == "weight" and problem is None and value <= 0:
                problem = f"must be above 0, got {show(value)}"
            if problem:
                return f"entry {number}: {name}: {problem}"
    return None


def split_hint(hint: Any) -> FieldType:
    kinds, choices = [], []
    for member in typing.get_args(hint) if typing.get_origin(hint) in (Union, UnionType) else (hint,):
        if typing.get_origin(member) is Literal:
            choices += typing.get_args(member)
        elif isinstance(member, type) and issubclass(member, Enum):
            choices += [item.value for item in member]
        else:
            kinds.append(typing.get_origin(member) or member)
    return FieldType(tuple(dict.fromkeys([str] * bool(choices) + kinds)), tuple(choices))


def convert_word(text: str, kinds: Collection[type]) -> Any:
    """A word of the command line as one of `kinds`; where none fits, as it stands, for `find_problem` to refuse."""
    lowered = text.lower()
    if NoneType in kinds and lowered in ("null", "none"):
        return None
    if bool in kinds and lowered in ("true", "false"):
        return lowered == "true"
    try:
        if int in kinds or float in kinds:
            return int(text) if text.lstrip("-").isdigit() else float(text)
        if (list in kinds or dict in kinds) and text[:1] in ("[", "{"):
            return json.loads(text)
    except ValueError:
        return text
    if list in kinds and str not in kinds:
        return [word.strip() for word in text.split(",") if word.strip()]
    return text


def show(value: Any) -> str:
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "an object"
    return json.dumps(value, ensure_ascii=False)[:80]


def _fits(value: Any, kind: type) -> bool:
    if kind in (int, float):  # 1e9 is how a person writes a whole number of tokens
        return type(value) in (int, float) and (kind is float or value % 1 == 0)
    return isinstance(value, kind) and (kind is not list or all(isinstance(item, str) for item in value))


def _type_problem(value: Any, kinds: Sequence[type], choices: Sequence[str]) -> str:
    names = TYPE_NAMES | ({str: f"one of {', '.join(choices)}"} if choices else {})
    bare = {bool, int, float}.intersection(kinds) if isinstance(value, str) else ()
    mend = ": remove the quotes" if any(_fits(convert_word(value, [kind]), kind) for kind in bare) else ""
    return f"expected {' or '.join(names[kind] for kind in kinds)}, got {show(value)}{mend}"


def _word_problem(name: str, value: str | list[str], choices: Sequence[str]) -> str | None:
    if value == "" and not choices and name not in ("debug", "optim_args"):
        return "must not be empty"
    if name == "hub_token" and value == "<HUB_TOKEN>":
        return "is the mask of a stored config; remove it and set HF_TOKEN in the environment"
    if name in ("eval_strategy", "save_strategy", "logging_strategy") and value == "epoch":
        return 'the stream has no epochs; use "steps"'
    words = [value] if isinstance(value, str) else value
    unknown = next((word for word in words if choices and word not in choices), None)
    if unknown is None:
        return None
    if name == "report_to" and unknown in INTEGRATION_TO_CALLBACK:
        return f"{unknown} is not installed here; install it, or leave it out"
    nearest = sorted(choices, key=lambda choice: -difflib.SequenceMatcher(None, unknown.lower(), choice).ratio())
    more = f", ... ({len(nearest)} in all)" if len(nearest) > 8 else ""
    return f"{show(unknown)} is not one of {', '.join(nearest[:8])}{more}"


def _number_problem(name: str, value: float) -> str | None:
    if not abs(value) < 1e300:
        return f"expected a finite number, got {show(value)}"
    if name in AT_LEAST and value < AT_LEAST[name]:
        return f"must be at least {AT_LEAST[name]}, got {show(value)}"
    if name in RANGES and not RANGES[name][1](value):
        return f"must be {RANGES[name][0]}, got {show(value)}"
    return None


# Several keys together


def find_conflicts(values: Mapping[str, Any], given: Collection[str], unsound: Collection[str]) -> dict[str, str]:
    """Key -> what is wrong with it beside the others; `given` are the keys that the user set.

    A check's parameters are the keys that it needs; it runs where none of them is `unsound`.
    """
    found = {}
    for first, second in ALTERNATIVES:
        are_set = [values[name] not in (None, -1) for name in (first, second)]
        if are_set[0] == are_set[1] and first not in unsound and second not in unsound:
            found[first] = f"give {first} or {second}; {'both are' if all(are_set) else 'neither is'} set"
    for check in (_check_lanes, _check_precision, _check_attention, _check_intervals, _check_schedule):
        needed = inspect.signature(check).parameters
        if not any(name in unsound for name in needed):
            found |= dict(check(**{name: given if name == "given" else values[name] for name in needed}))
    return found


def _check_lanes(num_lanes, dataloader_num_workers) -> Iterator[Problem]:
    ranks, workers = int(os.environ.get("WORLD_SIZE", "1")), max(1, dataloader_num_workers)
    if num_lanes % ranks:
        yield "num_lanes", f"{num_lanes} lanes cannot be dealt to {ranks} processes; start a divisor of {num_lanes}"
    elif num_lanes % (ranks * workers):
        fitting = [str(n) for n in range(num_lanes // ranks + 1) if num_lanes % (ranks * max(1, n)) == 0]
        message = f"num_lanes {num_lanes} cannot be dealt to {ranks} x {workers} (processes x workers)"
        yield "dataloader_num_workers", f"{message}; {', '.join(fitting)} would do"


def _check_precision(bf16, fp16, tf32, use_cpu) -> Iterator[Problem]:
    if bf16 and fp16:
        yield "bf16", "bf16 and fp16 are both true; keep one (bf16 where the GPU has it)"
    elif bf16 and not use_cpu and not is_torch_bf16_gpu_available():
        yield "bf16", "this machine has no GPU that computes in bf16; add --use_cpu true, or --bf16 false"
    elif fp16 and _is_on_cpu(use_cpu):
        yield "fp16", "needs a GPU; on a CPU use bf16, or neither"
    if tf32 and not is_torch_tf32_available():
        yield "tf32", "this machine has no TF32; leave the key out, the recipe turns TF32 on where it exists"


def _check_attention(attn_implementation, use_cpu, document_masking, use_cache) -> Iterator[Problem]:
    if attn_implementation.startswith(("flash", "flex")) and _is_on_cpu(use_cpu):
        yield "attn_implementation", f"{attn_implementation} needs a GPU to train; use auto, sdpa or eager"
    if document_masking and use_cache:
        yield "use_cache", "true turns document_masking off without a word; remove it"


def _check_intervals(given, eval_strategy, eval_steps, save_strategy, metric_for_best_model) -> Iterator[Problem]:
    if eval_strategy == "steps" and eval_steps is None:
        yield "eval_steps", 'is required when eval_strategy is "steps"'
    if eval_steps is not None and "eval_strategy" not in given:
        yield "eval_steps", 'does nothing while eval_strategy is unset; add "eval_strategy": "steps"'
    if save_strategy == "best" and (eval_strategy == "no" or metric_for_best_model is None):
        yield "save_strategy", '"best" needs an eval_strategy and metric_for_best_model, such as "loss"'


def _check_schedule(lr_scheduler_type, lr_scheduler_kwargs, learning_rate, warmup_steps) -> Iterator[Problem]:
    if lr_scheduler_type == "constant" and warmup_steps:
        yield "warmup_steps", "constant ignores it; use constant_with_warmup, or remove it"
    # Built once on nothing: transformers would refuse a wrong or missing kwarg only after the data has been opened.
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=learning_rate)
    try:
        get_scheduler(lr_scheduler_type, optimizer, 0, 100_000, dict(lr_scheduler_kwargs or {}))
    except (TypeError, ValueError, ArithmeticError) as error:
        yield "lr_scheduler_kwargs", f"do not suit {lr_scheduler_type}: {error}"


def _is_on_cpu(use_cpu: bool) -> bool:
    return use_cpu or not torch.accelerator.is_available()
