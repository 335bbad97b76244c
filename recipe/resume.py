"""What a checkpoint was made with, against what the configuration asks for. docs/resume.md has the table."""

import json
import logging
from collections.abc import Collection
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from recipe.arguments import Config
from recipe.checkpoints import STREAM_STATE
from recipe.errors import UserError
from recipe.internals import set_last_rates
from recipe.plain_json import dumps

logger = logging.getLogger(__name__)

# Refused unless named in `allow_change`: the rest of the run would be another one.
OPTIMIZER = ("optim", "optim_args", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
SETTINGS = (*OPTIMIZER, "max_grad_norm", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "seed")
SETTINGS += ("document_masking",)
# Free, and logged. `ranks` and `rows_per_step` are counted.
FREE = ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "dataloader_num_workers")
FREE += ("logging_steps", "save_steps", "save_total_limit", "eval_strategy", "eval_steps", "eval_seed")
FREE += ("per_device_eval_batch_size", "bf16", "fp16", "tf32", "torch_compile", "attn_implementation")
FREE += ("trajectory", "on_regression", "disabled_guards")
# Of a model's configuration: no effect on what it computes in training.
NO_EFFECT = ("transformers_version", "_name_or_path", "name_or_path", "architectures", "dtype", "use_cache")
NO_EFFECT += ("return_dict", "output_attentions", "output_hidden_states", "id2label", "label2id", "problem_type")
SHOWN = 8
CHANGED = {
    "continue": "continuing at its position anyway: documents may be missed or read twice",
    "restart": "reading the new stream from its start",
}


def settings_of(config: Config, model, tokenizer: PreTrainedTokenizerBase) -> dict:
    """`settings` and `free`: the effective values, JSON-able."""
    resolved = config.to_dict()
    effective = {name: value for name, value in model.config.to_dict().items() if name not in NO_EFFECT}
    added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
    names = ("eos_token", "bos_token", "pad_token", "unk_token", "eos_token_id")
    settings = {
        **{name: resolved[name] for name in SETTINGS},
        "model": {**effective, "parameters": model.num_parameters()},
        "tokenizer": {**{name: getattr(tokenizer, name) for name in names}, "added_tokens": added},
    }
    training = config.training
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    free = {name: resolved[name] for name in FREE}
    free |= {"max_steps": config.max_steps, "ranks": training.world_size, "rows_per_step": rows}
    return json.loads(dumps({"settings": settings, "free": free}))


def read_stream_state(checkpoint: Path) -> dict:
    return json.loads((checkpoint / STREAM_STATE).read_text(encoding="utf-8"))


def check_settings(checkpoint: Path, wanted: dict, allow_change: Collection[str]) -> None:
    """Raises `UserError` with the differences that `allow_change` does not name. `wanted`: of `settings_of`. Logs the
    others. Compared is what both versions know."""
    saved = read_stream_state(checkpoint)
    differences = find_differences(saved["settings"], wanted["settings"], of_both=True)
    refused = {name: text for name, text in differences.items() if not is_named(name, allow_change)}
    if "model.parameters" in differences:  # weights and moments do not fit
        refused["model.parameters"] = differences["model.parameters"]
    if "muon" in (saved["settings"].get("optim"), wanted["settings"]["optim"]) and "optim" in differences:
        refused["optim"] = differences["optim"]  # other groups and states
    if refused:
        raise UserError(
            f"{checkpoint} was made with other settings:{say(refused)}\n  restore them, name those that shall change "
            f"(--allow_change KEY,...), or start a new run from its weights: --model_name_or_path {checkpoint}"
        )
    for kind, changes in (("allowed", differences), ("free", find_differences(saved["free"], wanted["free"], True))):
        if changes:
            logger.info("changed since %s (%s):%s", checkpoint.name, kind, say(changes))


def load_position(
    checkpoint: Path, identity: dict, start: dict, on_changed_stream: str, allow_change: Collection[str] = ()
) -> dict:
    """The position to resume from: the one saved in a checkpoint, or `start` for `on_changed_stream` "restart".

    Raises `UserError` with the differences where it belongs to another stream and `on_changed_stream` is "refuse",
    unless `allow_change` names all of them: it is continued then.
    """
    saved = read_stream_state(checkpoint)
    position, differences = saved["position"], find_differences(saved["identity"], identity)
    if differences and all(name.endswith(".modified") for name in differences):  # copied, or touched
        logger.warning("files have another date than in %s; size and what was hashed are the same", checkpoint)
        return position
    if not differences:
        return position
    if on_changed_stream == "refuse":
        if not all(is_named(name, allow_change) for name in differences):
            raise UserError(
                f"{checkpoint} was made on another stream, so its position is not valid here:{say(differences)}\n  "
                "undo the change; or add --on_changed_stream continue (keep the position) or restart (from the new "
                "stream's start)"
            )
        on_changed_stream = "continue"
    logger.warning("%s was made on another stream:%s\n  %s", checkpoint, say(differences), CHANGED[on_changed_stream])
    if on_changed_stream == "restart":
        return start
    shapes = [[len(lanes) for lanes in where["lanes"]] for where in (position, start)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"{checkpoint} has {shapes[0]} lanes by source, the config {shapes[1]}: no position can be kept; use "
            "--on_changed_stream restart"
        )
    return position


def keep_configured(optimizer, scheduler, configured: list[dict], step: int) -> None:
    """Trainer has loaded a checkpoint's optimizer and schedule: put back the configuration's own values, which differ
    where `allow_change` lets them, and say by how much the learning rate jumps. `configured`: the groups before."""
    before = optimizer.param_groups[0]["lr"]
    for group, own in zip(optimizer.param_groups, configured, strict=True):
        group.update({name: own[name] for name in ("initial_lr", "weight_decay", "betas", "eps") if name in own})
    factors = getattr(scheduler, "lr_lambdas", None)
    if factors is None:  # it follows the losses, and is not a function of the step
        return
    scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    for group, factor in zip(optimizer.param_groups, factors, strict=True):
        group["lr"] = group["initial_lr"] * factor(scheduler.last_epoch)
    set_last_rates(scheduler, [group["lr"] for group in optimizer.param_groups])
    if abs(optimizer.param_groups[0]["lr"] - before) > 1e-6 * before:
        now = optimizer.param_groups[0]["lr"]
        logger.warning("learning rate of step %d: %.6g in the checkpoint, %.6g now", step + 1, before, now)


# --- differences


def find_differences(saved: dict, wanted: dict, of_both: bool = False, inside: str = "") -> dict[str, str]:
    """What differs, by the keys that lead to it. `of_both`: only what both know."""
    found = {}
    for name in dict.fromkeys([*saved, *wanted]):
        if of_both and not (name in saved and name in wanted):
            continue
        before, after = saved.get(name), wanted.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            is_open = of_both and name != "added_tokens"
            found |= find_differences(before, after, is_open, f"{inside}{name}.")
        elif before != after:
            found[inside + name] = f"checkpoint {_shown(before)}, config {_shown(after)}"
    return found


def is_named(name: str, allowed: Collection[str]) -> bool:
    """By itself, by a key that leads to it, or by its last key: `model.rope_parameters.rope_theta`, `model`,
    `rope_theta`."""
    parts = name.split(".")
    leading = {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
    return not (leading | {parts[-1]}).isdisjoint(allowed)


def say(differences: dict[str, str]) -> str:
    lines = [f"{name}: {text}" for name, text in differences.items()]
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n  " + "; ".join(lines[:SHOWN] + more)


def _shown(value) -> str:
    return "none" if value is None else json.dumps(value) if isinstance(value, (dict, list)) else str(value)
