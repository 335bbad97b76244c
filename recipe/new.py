"""`recipe new`: a starting configuration for a model size, with the reason for each choice beside it."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from recipe.errors import UserError

if TYPE_CHECKING:
    from recipe.arguments import Config

CONFIGS = Path(__file__).parent / "configs"
TOKENS_PER_PARAMETER = 20  # compute-optimal, Chinchilla (arXiv 2203.15556)
WARMUP_STEPS, WARMUP_SHARE = 2000, 0.1  # of Step Law's runs; at most this share of a shorter run
MICRO_BATCH = 8
CPU_SIZE, LONG_HOURS = "3m", 2  # what to train on a CPU; above so many hours there, it is proposed
ABOUT_DOCSTRINGS = "; docstrings is the English of the installed packages, 6M tokens, so it is read several times"
FINEWEB = "hf://HuggingFaceFW/fineweb-edu/sample-10BT"


class Size(NamedTuple):
    tokenizer: str
    source: str
    block_size: int


SIZES = {
    "3m": Size("tokenizer/llama-4k", "docstrings", 256),
    "15m": Size("tokenizer/llama-4k", FINEWEB, 512),
    "60m": Size("tokenizer/llama-32k", FINEWEB, 1024),
    "180m": Size("tokenizer/llama-32k", FINEWEB, 1024),
}


def step_law(parameters: float, tokens: float) -> tuple[float, float]:
    """Peak learning rate, and tokens of a step, with the lowest final loss.

    Step Law (Li et al., arXiv 2503.04715); `parameters` without the embedding. Runs of 215M to 1.07B end at most 0.008
    nats above the best near it (docs/model.md); smaller ones are an extrapolation.
    """
    return 1.79 * parameters**-0.713 * tokens**0.307, 0.58 * tokens**0.571


def write_config(path: Path, size: str, tokens: float | None = None) -> str:
    """Write the configuration; returns what to tell. `tokens`: of the run; None: compute-optimal.
    Raises `UserError` where the file exists or cannot be written."""
    text = json.dumps(starting_config(size, tokens), indent=2) + "\n"
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"{path} exists already; name another file, or remove it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); name another file") from error
    return f"wrote {path}\nnext: python -m recipe plan {path}    then: python -m recipe train {path}"


def how_long(config: "Config") -> str:
    """Hours of the run here, as `recipe plan` estimates them; on a CPU that would take long, what suits it."""
    from recipe.model import bf16_pays_on_cpu, read_model_config
    from recipe.plan import tokens_per_second

    training, total = config.training, config.max_steps * config.tokens_per_step
    model, precision = read_model_config(config.model.model_config, None), "bf16" if training.bf16 else "fp32"
    hours = total / tokens_per_second(model, config.data.block_size, precision, training.device) / 3600
    shown = f"{hours:,.0f}" if hours >= 10 else f"{max(hours, 0.1):.1f}"
    text = f"on this {training.device.type} it takes about {shown} hours (estimate of `recipe plan`)"
    if training.device.type != "cpu" or hours <= LONG_HOURS:
        return text
    small = read_model_config(str(CONFIGS / f"llama_{CPU_SIZE}_model.json"), None)
    precision = "bf16" if bf16_pays_on_cpu(small) else "fp32"
    tokens = 3600 * tokens_per_second(small, SIZES[CPU_SIZE].block_size, precision, training.device)
    other = config.path.with_name(f"{config.path.stem}-1h.json")
    words = f"{other} --size {CPU_SIZE} --train_tokens {float(f'{tokens:.2g}'):.0f}"
    return f"{text}; a run of about one hour: python -m recipe new {words}"


def starting_config(size: str, tokens: float | None = None) -> dict:
    tokenizer, source, block_size = SIZES[size]
    model = json.loads((CONFIGS / f"llama_{size}_model.json").read_text(encoding="utf-8"))
    embedding, rest = count_parameters(model)
    optimal = round(TOKENS_PER_PARAMETER * (embedding + rest), -5)
    tokens = round(tokens or optimal)
    rate, batch = step_law(rest, tokens)
    accumulation = max(1, round(batch / (MICRO_BATCH * block_size)))
    steps = math.ceil(tokens / (MICRO_BATCH * accumulation * block_size))
    every = max(50, 10 * round(steps / 200))
    return {
        "_comment": f"Written by `recipe new --size {size}`. `recipe train --help` lists all keys",
        "_comment_model": f"{(embedding + rest) / 1e6:.1f}M parameters, {rest / 1e6:.1f}M without the embedding",
        "model_config": f"recipe/configs/llama_{size}_model.json",
        "tokenizer": tokenizer,
        "_comment_source": "or your own text: a file, folder, glob or URL"
        + ABOUT_DOCSTRINGS * (source == "docstrings"),
        "source": source,
        "block_size": block_size,
        "_comment_length": f"{tokens / (embedding + rest):.2g} tokens a parameter; compute-optimal are "
        f"{TOKENS_PER_PARAMETER}, {optimal:,} in all (arXiv 2203.15556)",
        "train_tokens": tokens,
        "_comment_batch": f"Step Law (arXiv 2503.04715): 0.58 D^0.571 = {batch:,.0f} tokens a step, D: train_tokens. "
        "`recipe plan` says which rows x accumulation fit; divide the accumulation by the number of GPUs",
        "per_device_train_batch_size": MICRO_BATCH,
        "gradient_accumulation_steps": accumulation,
        "per_device_eval_batch_size": MICRO_BATCH,
        "_comment_rate": "Step Law: 1.79 N^-0.713 D^0.307, N: parameters without the embedding; seen to hold for 215M "
        "to 1.07B, so this is an extrapolation (docs/model.md)",
        "learning_rate": float(f"{rate:.2g}"),
        "_comment_schedule": f"as in Step Law's runs: cosine to 1e-5 after a warm-up of {WARMUP_STEPS:,} steps, "
        f"here at most {WARMUP_SHARE:.0%} of the run; AdamW with weight decay 0.1 and beta2 0.95",
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 1e-5},
        "warmup_steps": min(WARMUP_STEPS, round(WARMUP_SHARE * steps)),
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "_comment_often": f"{steps:,} steps in all",
        "eval_strategy": "steps",
        "eval_steps": every,
        "save_steps": every,
        "save_total_limit": 2,
    }


def count_parameters(model: dict) -> tuple[int, int]:
    """Of a llama with a tied head: the embedding's, and all others."""
    hidden, heads, groups = (model[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    attention = 2 * hidden * hidden + 2 * hidden * (hidden // heads) * groups
    layer = attention + 3 * hidden * model["intermediate_size"] + 2 * hidden
    return model["vocab_size"] * hidden, model["num_hidden_layers"] * layer + hidden
