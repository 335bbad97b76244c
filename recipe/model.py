"""LlamaConfig JSON -> LlamaForCausalLM, and what the hardware supports: attention kernel, precision, compilation."""

import json
import logging
import os
import pickle
import re
import shutil
import sysconfig
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import ACT2FN
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import is_flash_attn_2_available

from recipe.errors import UserError
from recipe.hub import why_not_loaded, why_unreachable
from recipe.internals import attention_of, has_fast_bf16_cpu
from recipe.loss import with_chunked_loss
from recipe.model_json import find_problem, to_read

logger = logging.getLogger(__name__)

CAUSAL_SDPA = "sdpa_causal"  # of new models whose documents are not kept apart
# Measured with AVX512-BF16 (torch 2.13.0, `python -m tests.benchmarks.throughput`): bf16 takes 0.61 of fp32's time at
# 384, and 0.72 at 192. Smaller models were not measured.
MIN_HIDDEN_BF16 = 192


def causal_sdpa_mask(*args, attention_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor | None:
    """No mask for rows without padding: SDPA's `is_causal` then, for which alone CUDA has flash kernels.

    transformers 5.23 makes the same choice in eager mode. While torch.compile traces, it cannot tell whether positions
    restart, and always makes a mask of block_size x block_size (`find_packed_sequence_indices`).
    """
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(CAUSAL_SDPA, sdpa_attention_forward)
AttentionMaskInterface.register(CAUSAL_SDPA, causal_sdpa_mask)


def hardware_defaults() -> dict:
    """TrainingArguments keys that depend on the machine where the config does not set them, so that one JSON works on
    all machines.

    TF32 and bf16 on a GPU that has them (Ampere and later). Without any accelerator `use_cpu`: otherwise each of
    several ranks would run as if it were the only one. See `bf16_pays_on_cpu` for a CPU's precision.
    """
    if not torch.cuda.is_available():
        return {} if torch.accelerator.is_available() else {"use_cpu": True}
    capability = torch.cuda.get_device_capability()
    return {"bf16": torch.cuda.is_bf16_supported(including_emulation=False), "tf32": capability >= (8, 0)}


def bf16_pays_on_cpu(config: PretrainedConfig) -> bool:
    """Whether a CPU trains this model faster under bf16 autocast than in fp32: it has units for bf16, and the matrices
    are large enough to make up for the casts."""
    return has_fast_bf16_cpu() and config.get_text_config().hidden_size >= MIN_HIDDEN_BF16


def agree_on_tf32() -> None:
    """Give torch's two settings of TF32 one value: that of the newer, which is the only one that transformers sets.

    torch.compile of torch 2.9 and 2.10, and `max-autotune` in later ones, read the older setting and raise where it
    differs (pytorch#166387).
    """
    is_on = torch.backends.cuda.matmul.fp32_precision == "tf32"
    torch.set_float32_matmul_precision("high" if is_on else "highest")
    if torch.backends.fp32_precision != "none":
        torch.backends.cuda.matmul.fp32_precision = "none"  # goes on following that one, which transformers sets


def build_model(
    *,
    model_config: str | None,
    model_name_or_path: str | None,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    attn_implementation: str = "auto",
    document_masking: bool = False,
) -> PreTrainedModel:
    """A new model from a LlamaConfig JSON, or pretrained weights to continue from. Weights are fp32; lower
    precision comes from autocast.

    Uses torch's global generator. Raises `UserError` where config, tokenizer and block size do not fit together.
    """
    attention = choose_attention(attn_implementation, document_masking)
    if model_config is not None:
        config = load_model_config(model_config)
        check_fit(config, tokenizer, block_size, model_config)
        if attn_implementation == "auto" and attention == "sdpa" and not document_masking:
            attention = CAUSAL_SDPA
        try:
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation=attention, dtype=torch.float32, trust_remote_code=False
            )
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"model_config {model_config}: no model can be made of it: {reason_of(error)}") from error
        return with_chunked_loss(model)
    config = read_model_config(None, model_name_or_path)
    check_fit(config, tokenizer, block_size, model_name_or_path)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_name_or_path,
            config=config,
            attn_implementation=attention,
            dtype=torch.float32,
            trust_remote_code=False,
        )
    except (OSError, ValueError, pickle.UnpicklingError) as error:
        raise _cannot_load(model_name_or_path, error) from error
    return with_chunked_loss(model)


def read_model_config(model_config: str | None, model_name_or_path: str | None) -> PretrainedConfig:
    """Of a new model, or of the one to continue from."""
    if model_config is not None:
        return load_model_config(model_config)
    try:
        if not os.path.isdir(model_name_or_path):
            why_unreachable()
        config = AutoConfig.from_pretrained(model_name_or_path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _cannot_load(model_name_or_path, error) from error
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"model_name_or_path {model_name_or_path!r}: a {config.model_type} model has no causal language model in "
            "transformers; name one that has, such as RUN/final"
        )
    return config


def _cannot_load(name: str, error: Exception) -> UserError:
    fix = "name a folder of a transformers model, such as RUN/final"
    return UserError(f"model_name_or_path {name!r}: {why_not_loaded(name, error)}; {fix}")


def load_model_config(path: str) -> LlamaConfig:
    """Read a LlamaConfig JSON; raise `UserError` for what LlamaConfig or the model could not use."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"model_config {path}: {error}") from error
    if problem := find_problem(values):
        raise UserError(f"model_config {path}: {problem}")
    try:
        config = LlamaConfig(**to_read(values))
    except (TypeError, ValueError, KeyError, StrictDataclassError) as error:
        raise UserError(f"model_config {path}: {reason_of(error)}") from error
    rope = config.rope_parameters["rope_type"]
    if rope != "default" and rope not in ROPE_INIT_FUNCTIONS:
        known = ", ".join(["default", *ROPE_INIT_FUNCTIONS])
        raise UserError(f"model_config {path}: rope_type {rope!r} of rope_parameters is not one of {known}")
    if config.hidden_act not in ACT2FN:
        raise UserError(f"model_config {path}: hidden_act {config.hidden_act!r} is unknown; llama's is silu")
    return config


def reason_of(error: Exception) -> str:
    """The last line, without the name of an exception, which huggingface_hub writes before it, but with its field."""
    text = str(error.args[0] if error.args else "").strip() or type(error).__name__
    reason = re.sub(r"^\w+Error: ", "", text.splitlines()[-1].strip())
    field = re.search(r"for field '(\w+)'", text)
    return f"{field[1]}: {reason}" if field and field[1] not in reason else reason


def check_fit(config, tokenizer: PreTrainedTokenizerBase, block_size: int, name: str) -> None:
    """Raise `UserError` unless every token id has an embedding and the block fits into the model's positions."""
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{name}: vocab_size {config.vocab_size:,} is smaller than the tokenizer's {len(tokenizer):,} tokens"
        )
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and block_size > longest:
        raise UserError(f"block_size {block_size:,} is over the model's max_position_embeddings {longest:,} ({name})")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token, which separates documents; use one that has it")


def choose_attention(attn_implementation: str, document_masking: bool) -> str:
    """`auto` is SDPA, which takes a flash kernel by itself on CUDA where it is given no mask (see `causal_sdpa_mask`);
    with document masking on CUDA it is flash attention's varlen kernel if installed, since SDPA then needs a mask of
    block_size x block_size (not run on a GPU yet)."""
    if attn_implementation != "auto":
        return attn_implementation
    if document_masking and torch.cuda.is_available() and is_flash_attn_2_available():
        return "flash_attention_2"
    return "sdpa"


def why_not_compile() -> str | None:
    """What `torch.compile` is missing here, or None. Inductor needs a C++ compiler and Python's headers even for GPU
    code."""
    if not any(shutil.which(compiler) for compiler in ("g++", "c++", "clang++", "cl")):
        return "no C++ compiler found (on Debian: apt install g++)"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python's C headers are not installed (on Debian: apt install python3-dev)"
    return None


def describe_kernels(model: PreTrainedModel, training_args) -> str:
    """One line: the attention kernel, precision and compile mode in use."""
    precision = "bf16 autocast" if training_args.bf16 else "fp16 autocast" if training_args.fp16 else "fp32"
    device = training_args.device.type
    matmul = torch.backends.cuda.matmul.fp32_precision if device == "cuda" else None
    compiled = f"torch.compile ({training_args.torch_compile_backend})" if training_args.torch_compile else "eager"
    parts = [f"attention {attention_of(model)}", f"precision {precision}", compiled, f"device {device}"]
    if matmul is not None:
        parts.insert(2, f"fp32 matrix products in {matmul}")
    return " | ".join(parts)


def describe_device(training_args, kernels: str) -> dict:
    is_cuda = training_args.device.type == "cuda"
    return {
        "name": torch.cuda.get_device_name() if is_cuda else f"CPU, {torch.get_num_threads()} threads",
        "type": training_args.device.type,
        "count": training_args.world_size,
        "kernels": kernels,
    }


def count_flops_per_token(model: PreTrainedModel, block_size: int) -> int:
    return flops_per_token(model.config, model.num_parameters(), block_size)


def flops_per_token(config: PretrainedConfig, num_parameters: int, block_size: int) -> int:
    """Training FLOPs for one token: 6 per weight in a matrix product, plus attention, as in PaLM's appendix B (arXiv
    2204.02311).

    The embedding table counts only where it is also the head (tied).
    """
    config = config.get_text_config()
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    attention = 12 * config.num_hidden_layers * config.hidden_size * block_size
    return 6 * (num_parameters - embedding) + attention
