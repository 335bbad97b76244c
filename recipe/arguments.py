"""The recipe's own keys, and a configuration -> a checked `Config`.

TrainingArguments' keys and the recipe's own share one namespace. Nothing passes silently: every key, type, range
and combination is checked before anything is built, and all problems are reported at once. `read_config.py` does what
needs no torch. The comment behind a field, or above it, is its line in `recipe train --help`.
"""

import json
import logging
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from transformers import TrainingArguments

from recipe import config_checks as checks
from recipe.conflicts import find_machine_conflicts
from recipe.read_config import ConfigError, Reading, defaults, read_config
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
    train_seed: int = 42  # seed of the train stream's order
    # Index of the first hold-out document; "auto": 100,000, or the last 1 % of a source that ends before.
    eval_skip: int | Literal["auto"] = "auto"
    eval_seed: int = 1041  # seed of the eval stream's order
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
    """The configuration that `read_config` reads, checked against this machine too, and resolved.

    Raises `ConfigError` with every problem found.
    """
    reading = read_config(path, overrides, machine_defaults)
    values, found = reading.values, reading.found
    found |= find_machine_conflicts(values, {*found})
    reading.refuse()
    remember(values["hub_token"])
    training = _build_training(reading)
    model, data, guards = (group(**{f.name: values[f.name] for f in fields(group)}) for group in OURS)
    return Config(reading.path, model, data, guards, training, tuple(overrides))


def _build_training(reading: Reading) -> TrainingArguments:
    values = reading.values
    for name, tested in (("deepspeed", "not at all"), ("fsdp", "on CPU ranks only, see docs/resume.md")):
        if values[name]:
            logger.warning("%s is passed on to transformers; this recipe has been tested with it %s", name, tested)
    given = {name: values[name] for name in TRAINING_FIELDS if (name, values[name]) != ("optim", "muon")}
    try:
        training = TrainingArguments(**given)
    except (ValueError, TypeError, KeyError, NotImplementedError, ImportError, OSError) as error:
        message = " ".join(str(error).split())
        key = next((word for word in re.findall(r"\w+", message) if word in TRAINING_FIELDS), "TrainingArguments")
        raise ConfigError(reading.path, [(reading.label(key), message)]) from error
    if "optim" not in given:
        training.optim = "muon"  # which transformers has no name for; `PretrainTrainer` makes it
    return training


def format_config(config: Config) -> str:
    """The resolved keys that differ from their defaults, one per line, aligned; then the number of other keys."""
    resolved, usual = config.to_dict(), defaults()
    different = {k: v for k, v in resolved.items() if v != usual[k] and (v or usual[k])}
    width = max(map(len, different))
    lines = [f"{name:<{width}}  {json.dumps(value, ensure_ascii=False)}" for name, value in different.items()]
    return "\n".join([*lines, f"{len(resolved) - len(different)} other keys at their defaults"])
