"""Combinations of keys that are impossible, in themselves or on this machine."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Set
from types import SimpleNamespace
from typing import Any

from recipe.config_checks import ALTERNATIVES

NO_BF16 = "no GPU here computes in bf16, and on most CPUs it is slower than fp32 (many emulate it)"
NO_FP16 = "needs a GPU; on a CPU use --fp16 false: fp32 is faster there"
# What changes the number of steps.
LENGTH = {"train_tokens", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "block_size"}
EMBEDDING_LR_RATIO = "embedding_lr_ratio"


def find_conflicts(values: Mapping[str, Any], given: Set[str], options: Set[str], unsound: Set[str]) -> dict[str, str]:
    """Key -> what is wrong with its combination with others, on any machine. `given` are the keys that the user set,
    `options` those of the command line. Combinations with an `unsound` key are not checked."""
    return _first_keys(_conflicts(SimpleNamespace(**values), given, options), unsound)


def find_machine_conflicts(values: Mapping[str, Any], unsound: Set[str]) -> dict[str, str]:
    """The same for what torch and transformers have here."""
    v = SimpleNamespace(**values)
    return _first_keys([*_of_machine(v), *_of_schedule(v)], unsound)


def embedding_lr_ratio(optim_args: str | None) -> float:
    """Of `"optim_args": "embedding_lr_ratio=2"`, which is all that muon takes; 1 where it is not given. Raises
    `ValueError`."""
    if not optim_args:
        return 1.0
    name, _, value = optim_args.replace(" ", "").partition("=")
    try:
        ratio = float(value)
    except ValueError:
        ratio = math.nan
    if name != EMBEDDING_LR_RATIO or not 0 < ratio < math.inf:
        raise ValueError(
            "muon takes embedding_lr_ratio=2, or another number above 0, and nothing else; learning_rate, "
            "weight_decay, adam_beta1 and adam_beta2 are keys of their own"
        )
    return ratio


def num_steps(v: SimpleNamespace) -> int:
    """Of the run; -1 where neither tokens nor steps are set."""
    if v.train_tokens is None:
        return v.max_steps
    rows = v.per_device_train_batch_size * v.gradient_accumulation_steps * num_ranks()
    return math.ceil(v.train_tokens / (rows * v.block_size))


def _first_keys(conflicts: Iterable[tuple[str, str]], unsound: Set[str]) -> dict[str, str]:
    found = [(keys.split(), message) for keys, message in conflicts]
    return {keys[0]: message for keys, message in found if unsound.isdisjoint(keys)}


def num_ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _conflicts(v: SimpleNamespace, given: Set[str], options: Set[str]) -> Iterator[tuple[str, str]]:
    """The keys of each impossible combination, the one to report first, and what is wrong."""
    for pair in ALTERNATIVES:
        num_set = sum(getattr(v, name) not in (None, -1) for name in pair)
        if num_set != 1:
            yield " ".join(pair), f"give {' or '.join(pair)}; {'both are' if num_set else 'neither is'} set"

    if v.fp16 and v.use_cpu and not v.bf16:  # `_of_machine` says so where no GPU is found
        yield "fp16 bf16 use_cpu", NO_FP16
    lanes = 32 if v.num_lanes == "auto" else v.num_lanes
    ranks, workers = num_ranks(), max(1, v.dataloader_num_workers)
    if lanes % ranks:
        yield "num_lanes", f"{lanes} lanes cannot be dealt to {ranks} processes; start a divisor of {lanes}"
    elif lanes % (ranks * workers):
        fitting = [str(n) for n in range(lanes // ranks + 1) if lanes % (ranks * max(1, n)) == 0]
        message = f"num_lanes {lanes} cannot be dealt to {ranks} x {workers} (processes x workers)"
        yield "dataloader_num_workers num_lanes", f"{message}; {', '.join(fitting)} would do"

    if v.optim == "muon" and (v.fsdp or v.deepspeed):
        yield "optim fsdp deepspeed", "muon needs whole matrices, and these shard them; use adamw_torch_fused"
    if v.optim == "muon":
        try:
            embedding_lr_ratio(v.optim_args)
        except ValueError as error:
            yield "optim_args optim", str(error)
    elif EMBEDDING_LR_RATIO in (v.optim_args or ""):
        yield "optim_args optim", f"is muon's, and {v.optim} does not read it; --optim_args '' leaves it out"
    if v.optim_target_modules and not v.optim.startswith(("galore", "apollo")):
        yield "optim_target_modules optim", f"is read by galore and apollo, and {v.optim} ignores it; remove it"

    if v.document_masking and v.use_cache:
        yield "use_cache document_masking", "true silently turns document_masking off; remove it"

    if v.eval_strategy == "steps" and v.eval_steps is None:
        yield "eval_steps eval_strategy", 'is required when eval_strategy is "steps"; --eval_steps 200 would do'
    if v.eval_steps is not None and "eval_strategy" not in given:
        yield "eval_steps", "does nothing while eval_strategy is unset; --eval_strategy steps would do"
    if v.save_strategy == "best" and (v.eval_strategy == "no" or v.metric_for_best_model is None):
        needed = "eval_strategy metric_for_best_model"
        yield f"save_strategy {needed}", '"best" needs an eval_strategy and metric_for_best_model, such as "loss"'

    if v.push_to_hub and v.hub_strategy in ("checkpoint", "all_checkpoints"):
        yield "hub_strategy push_to_hub", "would upload file names and positions; use every_save or end"

    yield from _of_warmup(v, options)


def _of_warmup(v: SimpleNamespace, options: Set[str]) -> Iterator[tuple[str, str]]:
    if v.lr_scheduler_type == "constant" and v.warmup_steps:
        yield "warmup_steps lr_scheduler_type", "constant ignores it; use constant_with_warmup, or remove it"
    steps, is_shortened = num_steps(v), options & LENGTH and "warmup_steps" not in options
    if 0 < steps < v.warmup_steps and not is_shortened:  # a trial of few steps is warned when it starts
        message = (
            f"{v.warmup_steps:,.0f} is longer than the run of {steps:,} steps; --warmup_steps 0.1 would do, a share"
        )
        yield "warmup_steps train_tokens max_steps block_size", message


def _of_machine(v: SimpleNamespace) -> Iterator[tuple[str, str]]:
    import torch
    from transformers.utils import is_torch_bf16_gpu_available, is_torch_tf32_available

    on_cpu = v.use_cpu or not torch.accelerator.is_available()
    if v.bf16 and v.fp16:
        yield "bf16 fp16", "bf16 and fp16 are both true; keep one (bf16 where the GPU has it)"
    elif v.bf16 and not v.use_cpu and not is_torch_bf16_gpu_available():
        yield "bf16 fp16 use_cpu", f"{NO_BF16}; use --bf16 false"
    elif v.fp16 and on_cpu:
        yield "fp16 bf16 use_cpu", NO_FP16
    if v.fsdp and on_cpu:
        yield "fsdp use_cpu", "needs GPUs: on a CPU accelerate ignores it without a message, and every rank holds all"
    if v.tf32 and not is_torch_tf32_available():
        yield "tf32", "this machine has no TF32; leave the key out, the recipe turns TF32 on where it exists"
    if v.attn_implementation.startswith(("flash", "flex")) and on_cpu:
        yield "attn_implementation use_cpu", f"{v.attn_implementation} needs a GPU to train; use auto, sdpa or eager"


def _of_schedule(v: SimpleNamespace) -> Iterator[tuple[str, str]]:
    """It is built once on a dummy: transformers would reject a wrong or missing kwarg only after the data has been
    opened."""
    import torch
    from transformers import get_scheduler

    kind = v.lr_scheduler_type
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=v.learning_rate)
    try:
        get_scheduler(kind, optimizer, 0, 100_000, dict(v.lr_scheduler_kwargs or {}))
    except (TypeError, ValueError, ArithmeticError) as error:
        yield "lr_scheduler_kwargs lr_scheduler_type learning_rate", f"do not suit {kind}: {error}"
