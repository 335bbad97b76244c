"""Private names of transformers, tokenizers, accelerate, torch and evaluate that the recipe needs, in one place.

tests/test_internals.py uses each of them, so that its test names the upgrade that breaks one.
"""

from collections.abc import Callable

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram
from transformers import AutoModelForCausalLM

# --- transformers


def created_scheduler(trainer) -> bool:
    """Whether the Trainer made the learning rate's scheduler itself, from its arguments."""
    return getattr(trainer, "_created_lr_scheduler", False)


def prepare_inputs(trainer, inputs):
    """A micro-batch as the Trainer gives it to the model: on its device."""
    return trainer._prepare_inputs(inputs)


def load_weights(trainer, checkpoint: str) -> None:
    trainer._load_from_checkpoint(checkpoint)


def save_whole_model(trainer, folder: str) -> None:
    """For `from_pretrained`; called on every rank. Of a sharded model Trainer saves nothing in some formats."""
    if trainer.is_fsdp_enabled:
        trainer._save(folder, state_dict=trainer.accelerator.get_state_dict(trainer.model))
    else:
        trainer.save_model(folder, _internal_call=True)


def reset_logged_loss(trainer) -> None:
    """The sum of the losses that are not logged yet. Trainer subtracts it from itself, which leaves NaN a NaN."""
    trainer._tr_loss.zero_()


def attention_of(model) -> str | None:
    """The attention implementation in force: `eager`, `sdpa`, `flash_attention_2`, ..."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None)


def causal_class_of(config) -> type:
    """transformers' own class of causal language models for this config."""
    return AutoModelForCausalLM._model_mapping[type(config)]


def has_own_loss_function(model) -> bool:
    """Whether `model.loss_function` has been set, beside the one that transformers has for the model's kind."""
    return "_loss_function" in vars(model)


# --- tokenizers


def cache_no_texts(tokenizer: Tokenizer) -> None:
    """Where texts are not split into words, its cache of 10,000 entries holds whole texts of up to 255 characters, up
    to 120 MiB of those of 140. They seldom repeat."""
    splitter = tokenizer.pre_tokenizer
    is_split = splitter is not None and len(splitter.pre_tokenize_str("two words")) > 1
    if isinstance(tokenizer.model, (BPE, Unigram)) and not is_split:
        tokenizer.model._resize_cache(0)


# --- accelerate


def original_forward(model: torch.nn.Module) -> Callable | None:
    """The model's own forward, where accelerate has replaced it by one with autocast."""
    return vars(model).get("_original_forward")


def samplers_of(loader) -> list:
    """What draws a DataLoader's rows: its batch sampler, what that wraps (accelerate puts one to three around the
    user's), and the user's sampler last. Empty for a stream's or another kind of loader."""
    names, found = ("batch_sampler", "sampler"), [loader]
    while len(found) < 10:
        inner = [getattr(found[-1], name, None) for name in names]
        inner = [each for each in inner if each is not None]
        if not inner:
            break
        found.append(inner[0])
    return found[1:]


# --- torch


def is_compiled_module(module: torch.nn.Module) -> bool:
    """By `torch.compile(module)` or `module.compile()`."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def has_fast_bf16_cpu() -> bool:
    """Whether this CPU has units for bf16 (AVX512-BF16 or AMX). Others emulate it, 30 to 100 times slower."""
    has_units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and has_units


def takes_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its step does nothing where its attribute `found_inf`, a tensor on the device, is 1."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def set_last_rates(scheduler, rates: list[float]) -> None:
    """What `get_last_lr` returns."""
    scheduler._last_lr = rates


def forward_hooks_of(module: torch.nn.Module) -> list[Callable]:
    """Those before the forward pass, then those after it."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def has_step_post_hooks(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer._optimizer_step_post_hooks)


def count_graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def count_graph_breaks() -> int:
    """Graph breaks, each reason as often as it came."""
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def is_grad_switch(func: Callable) -> bool:
    """Whether a `TorchFunctionMode` is given `torch.no_grad`'s or `torch.enable_grad`'s switch."""
    return func is torch._C._set_grad_enabled
