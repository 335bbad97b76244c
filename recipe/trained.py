"""A path that the user names -> the model behind it: of a run, its `final`, a checkpoint, or any model folder.

Nothing here writes: what is evaluated or compared stays as it is.
"""

import logging
import pickle
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from recipe.checkpoints import list_checkpoints
from recipe.data.files import first_line
from recipe.data.packing import load_tokenizer
from recipe.errors import UserError
from recipe.guards.records import parse_object
from recipe.model import check_fit, read_model_config

logger = logging.getLogger(__name__)
EXPECTED = "expected a run, its final/ or checkpoint-N, or a folder with config.json and model.safetensors"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
VOCABULARY = ("tokenizer.json", "*.model", "vocab.*")
SHOWN = 4  # names of files, in an error


@dataclass(frozen=True)
class Trained:
    """`folder`: of the model's files. `run_dir`: of the run that made it, None where there is none."""

    folder: Path
    run_dir: Path | None

    @cached_property
    def info(self) -> dict:
        """`run.json` of the run, empty where it cannot be read."""
        return read_info(self.run_dir) if self.run_dir else {}

    @property
    def arguments(self) -> dict:
        return self.info.get("arguments") or {}

    @property
    def is_new(self) -> bool:
        """Whether a run of the recipe has trained it from random weights."""
        return bool(self.arguments.get("model_config"))


def read_info(run_dir: Path) -> dict:
    file = run_dir / "run.json"
    return (parse_object(file.read_text(encoding="utf-8", errors="replace")) if file.is_file() else None) or {}


def find_trained(path: Path) -> Trained:
    """The model at `path`; of a run, its final one, or the newest checkpoint where it has not finished.

    Raises `UserError` that says what is there and what was expected.
    """
    if not path.is_dir():
        raise UserError(f"{path}: {'is a file' if path.exists() else 'no such folder'}; {EXPECTED}")
    run_dir = next((place for place in (path, path.absolute().parent) if (place / "run.json").is_file()), None)
    if is_model(path):
        return Trained(path, run_dir)
    if is_model(path / "final"):
        return Trained(path / "final", run_dir)
    if checkpoint := next(filter(is_model, list_checkpoints(path)), None):
        logger.warning("%s has no final model, since it did not finish: taking %s", path, checkpoint.name)
        return Trained(checkpoint, run_dir)
    if (path / "adapter_config.json").is_file():
        fix = "merge it first: model.merge_and_unload().save_pretrained(FOLDER), and save the tokenizer there too"
        raise UserError(f"{path}: holds a PEFT adapter, not a whole model; {fix}")
    raise UserError(f"{path}: {say_what_is_in(path)}; {EXPECTED}")


def is_model(folder: Path) -> bool:
    has_weights = any(any(folder.glob(pattern)) for pattern in WEIGHTS)
    return has_weights and (folder / "config.json").is_file()


def say_what_is_in(folder: Path) -> str:
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir() if not entry.name.startswith("."))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"holds {', '.join(names[:SHOWN])}{more}" if names else "is empty"


def load_model(trained: Trained) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in eval mode, on the accelerator if there is one, in the precision of its weights, and its
    tokenizer. Raises `UserError` unless both are whole and fit together."""
    name = str(trained.folder)
    disable_progress_bar()
    if not any(any(trained.folder.glob(pattern)) for pattern in VOCABULARY):
        # transformers would make a tokenizer of three tokens
        raise UserError(f"{name}: no tokenizer in it; save the one that the model was trained with there")
    config, tokenizer = read_model_config(None, name), load_tokenizer(name)
    check_fit(config, tokenizer, block_size=1, name=name)
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype="auto",
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, pickle.UnpicklingError, SafetensorError) as error:
        raise UserError(f"{name}: the model cannot be loaded ({first_line(error)})") from error
    if missing := sorted(loaded["missing_keys"]):  # they would be random numbers
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{name}: the weights lack {missing[0]}{more}; restore the folder, or take another checkpoint")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    return model.to(device).eval(), tokenizer


def longest_input(trained: Trained, config) -> int | None:
    """Tokens up to which the model was trained, or has positions; None where neither is known."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    trained_on = trained.arguments.get("block_size") if trained.is_new else None
    return min(filter(None, (limit, trained_on)), default=None)
