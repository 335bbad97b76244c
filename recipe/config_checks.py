"""The values that the keys of a configuration accept: refused names, types, choices, ranges, combinations.

Each check says what is wrong and how to fix it. `arguments.py` defines which keys exist.
"""

import difflib
import json
import math
import os
from collections.abc import Collection, Iterator, Mapping, Set
from enum import Enum
from types import NoneType, SimpleNamespace, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import torch
from transformers import get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.training_args import trainer_log_levels
from transformers.utils import is_torch_bf16_gpu_available, is_torch_tf32_available

from recipe.key_names import unknown_key

Problem = tuple[str, str]  # key (`--key` when it came from the command line, "" for the file itself), message


class FieldType(NamedTuple):
    kinds: tuple[type, ...]  # plain types; a value must have one of them
    choices: tuple[str, ...]  # the only strings allowed, where a Literal or an Enum limits them


NO_BF16 = "no GPU here computes in bf16, and on most CPUs it is slower than fp32 (many emulate it)"
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
    "evaluation_strategy": "renamed eval_strategy",
    "no_cuda": "renamed use_cpu",
    "gradient_checkpointing": "renamed activation_checkpointing",
    "gradient_checkpointing_kwargs": "renamed activation_checkpointing_kwargs",
    "warmup_ratio": "use warmup_steps, which below 1 is a share of all steps",
    "overwrite_output_dir": "set another output_dir, or empty this one",
    "logging_dir": "set TENSORBOARD_LOGGING_DIR in the environment",
    "save_safetensors": "weights are always safetensors",
}
REFUSED = {name: reason for names, reason in REFUSED.items() for name in names.split()}
# Choices that the type hint does not list.
WORDS = {
    "report_to": ("none", "all", *get_available_reporting_integrations()),
    "log_level": tuple(trainer_log_levels),
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
ALTERNATIVES = (("train_tokens", "max_steps"), ("model_config", "model_name_or_path"))


# One key


def find_problem(name: str, value: Any, types: Mapping[str, FieldType]) -> str | None:
    """What is wrong with `value` for the key `name`; `types` holds every known key."""
    if name in REFUSED:
        return f"is refused: {REFUSED[name]}"
    if name not in types:
        return unknown_key(name, types)
    kinds, choices = types[name]
    if not any(_fits(value, kind) for kind in kinds):
        return _type_problem(value, kinds, choices)
    if name in FIXED and value != FIXED[name][0]:
        return f"must stay {show(FIXED[name][0])}: {FIXED[name][1]}"
    if isinstance(value, (str, list)):
        return _word_problem(name, value, _finding_ids() if name == "disabled_guards" else WORDS.get(name, choices))
    return _number_problem(name, value) if type(value) in (int, float) else None


def _finding_ids() -> tuple[str, ...]:
    from recipe.guards import FINDING_IDS  # with all guards, which takes a second

    return FINDING_IDS


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
            if problem := find_problem(name, value, types):
                return f"entry {number}: {name}: {problem}"
    return None


def split_hint(hint: Any) -> FieldType:
    kinds, choices = [], []
    for member in get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,):
        if get_origin(member) is Literal:
            choices += get_args(member)
        elif isinstance(member, type) and issubclass(member, Enum):
            choices += [item.value for item in member]
        else:
            kinds.append(get_origin(member) or member)
    return FieldType(tuple(dict.fromkeys([str] * bool(choices) + kinds)), tuple(choices))


def convert_word(text: str, kinds: Collection[type]) -> Any:
    """A word of the command line as one of `kinds`; unchanged where none fits, for `find_problem` to refuse."""
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
    """A value as JSON, for a message."""
    return {list: "a list", dict: "an object"}.get(type(value)) or json.dumps(value, ensure_ascii=False)[:80]


def _fits(value: Any, kind: type) -> bool:
    if kind in (int, float):  # accepts 1e9 as a whole number of tokens
        return type(value) in (int, float) and (kind is float or value % 1 == 0)
    return isinstance(value, kind) and (kind is not list or all(isinstance(item, str) for item in value))


def _type_problem(value: Any, kinds: Collection[type], choices: Collection[str]) -> str:
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
    for what, holds, names in RANGES:
        if name in names.split() and not holds(value):
            return f"must be {what}, got {show(value)}"
    return None


# Several keys together


def find_conflicts(values: Mapping[str, Any], given: Set[str], unsound: Set[str]) -> dict[str, str]:
    """Key -> what is wrong with its combination with others; `given` are the keys that the user set. Combinations with
    an `unsound` key are not checked."""
    found = [(keys.split(), message) for keys, message in _conflicts(SimpleNamespace(**values), given)]
    return {keys[0]: message for keys, message in found if unsound.isdisjoint(keys)}


def _conflicts(v: SimpleNamespace, given: Set[str]) -> Iterator[tuple[str, str]]:
    """The keys of each impossible combination, the one to report first, and what is wrong."""
    for pair in ALTERNATIVES:
        num_set = sum(getattr(v, name) not in (None, -1) for name in pair)
        if num_set != 1:
            yield " ".join(pair), f"give {' or '.join(pair)}; {'both are' if num_set else 'neither is'} set"

    lanes = 32 if v.num_lanes == "auto" else v.num_lanes
    ranks, workers = int(os.environ.get("WORLD_SIZE", "1")), max(1, v.dataloader_num_workers)
    if lanes % ranks:
        yield "num_lanes", f"{lanes} lanes cannot be dealt to {ranks} processes; start a divisor of {lanes}"
    elif lanes % (ranks * workers):
        fitting = [str(n) for n in range(lanes // ranks + 1) if lanes % (ranks * max(1, n)) == 0]
        message = f"num_lanes {lanes} cannot be dealt to {ranks} x {workers} (processes x workers)"
        yield "dataloader_num_workers num_lanes", f"{message}; {', '.join(fitting)} would do"

    on_cpu = v.use_cpu or not torch.accelerator.is_available()
    if v.bf16 and v.fp16:
        yield "bf16 fp16", "bf16 and fp16 are both true; keep one (bf16 where the GPU has it)"
    elif v.bf16 and not v.use_cpu and not is_torch_bf16_gpu_available():
        yield "bf16 fp16 use_cpu", f"{NO_BF16}; use --bf16 false"
    elif v.fp16 and on_cpu:
        yield "fp16 bf16 use_cpu", "needs a GPU; on a CPU use --fp16 false: fp32 is faster there"
    if v.fsdp and on_cpu:
        yield "fsdp use_cpu", "needs GPUs: on a CPU accelerate ignores it without a message, and every rank holds all"
    if v.tf32 and not is_torch_tf32_available():
        yield "tf32", "this machine has no TF32; leave the key out, the recipe turns TF32 on where it exists"
    if v.attn_implementation.startswith(("flash", "flex")) and on_cpu:
        yield "attn_implementation use_cpu", f"{v.attn_implementation} needs a GPU to train; use auto, sdpa or eager"
    if v.document_masking and v.use_cache:
        yield "use_cache document_masking", "true silently turns document_masking off; remove it"

    if v.eval_strategy == "steps" and v.eval_steps is None:
        yield "eval_steps eval_strategy", 'is required when eval_strategy is "steps"'
    if v.eval_steps is not None and "eval_strategy" not in given:
        yield "eval_steps", 'does nothing while eval_strategy is unset; add "eval_strategy": "steps"'
    if v.save_strategy == "best" and (v.eval_strategy == "no" or v.metric_for_best_model is None):
        needed = "eval_strategy metric_for_best_model"
        yield f"save_strategy {needed}", '"best" needs an eval_strategy and metric_for_best_model, such as "loss"'

    if v.push_to_hub and v.hub_strategy in ("checkpoint", "all_checkpoints"):
        yield "hub_strategy push_to_hub", "would upload file names and positions; use every_save or end"

    kind = v.lr_scheduler_type
    if kind == "constant" and v.warmup_steps:
        yield "warmup_steps lr_scheduler_type", "constant ignores it; use constant_with_warmup, or remove it"
    # Built once on a dummy: transformers would reject a wrong or missing kwarg only after the data has been opened.
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=v.learning_rate)
    try:
        get_scheduler(kind, optimizer, 0, 100_000, dict(v.lr_scheduler_kwargs or {}))
    except (TypeError, ValueError, ArithmeticError) as error:
        yield "lr_scheduler_kwargs lr_scheduler_type learning_rate", f"do not suit {kind}: {error}"
