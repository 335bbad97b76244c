"""What a checkpoint was made with, against what the configuration asks for. docs/resume.md has the table."""

import contextlib
import json
import logging
import pickle
from collections.abc import Collection, Iterator
from dataclasses import fields
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, TrainerState

from recipe.arguments import FIELDS, Config
from recipe.checkpoints import STREAM_STATE, step_of
from recipe.data.files import first_line
from recipe.errors import UserError
from recipe.internals import set_last_rates
from recipe.plain_json import dumps

logger = logging.getLogger(__name__)

# Free, and logged. `ranks` and `rows_per_step` are counted.
_FREE = """
    max_steps per_device_train_batch_size gradient_accumulation_steps dataloader_num_workers on_bad_data
    logging_strategy logging_steps logging_first_step log_on_each_node log_level log_level_replica disable_tqdm
    include_num_input_tokens_seen report_to run_name project
    trackio_space_id trackio_bucket_id trackio_static_space_id
    save_strategy save_steps save_total_limit save_only_model save_on_each_node
    load_best_model_at_end metric_for_best_model greater_is_better restore_callback_states_from_checkpoint
    push_to_hub hub_model_id hub_private_repo hub_strategy hub_always_push hub_revision
    eval_strategy eval_steps eval_delay eval_on_start eval_seed per_device_eval_batch_size prediction_loss_only
    eval_accumulation_steps eval_use_gather_object bf16_full_eval fp16_full_eval
    bf16 fp16 tf32 torch_compile torch_compile_backend torch_compile_mode attn_implementation use_cpu
    activation_checkpointing activation_checkpointing_kwargs torch_empty_cache_steps full_determinism
    ddp_backend ddp_timeout ddp_bucket_cap_mb ddp_broadcast_buffers ddp_find_unused_parameters ddp_static_graph
    debug skip_memory_metrics trajectory on_regression disabled_guards
"""
# What of them has an effect is compared as the stream's identity, as effective values of model and tokenizer, or as
# `max_steps`; the others are about this start only.
_ELSEWHERE = """
    source text_column block_size train_skip train_seed eval_skip eval_documents num_lanes
    model_config model_name_or_path tokenizer train_tokens
    output_dir resume_from_checkpoint on_changed_stream allow_change hub_token
"""
FREE, ELSEWHERE = _FREE.split(), _ELSEWHERE.split()
# Every other key is refused unless named in `allow_change`: the rest of the run would be another one.
SETTINGS = [name for name in FIELDS if name not in {*FREE, *ELSEWHERE}]
# Optimizers that read each other's state, and schedules that are no function of the step: never changed.
ADAMW = {"adamw_torch", "adamw_torch_fused"}
PLATEAU = "reduce_lr_on_plateau"
# Of a model's configuration: no effect on what it computes in training.
NO_EFFECT = ("transformers_version", "_name_or_path", "name_or_path", "architectures", "dtype", "use_cache")
NO_EFFECT += ("return_dict", "output_attentions", "output_hidden_states", "id2label", "label2id", "problem_type")
SHOWN = 8
# Of an optimizer's groups. `fused` and `foreach` choose the code that runs, which must be the one that skips steps.
CONFIGURED = ("initial_lr", "weight_decay", "betas", "eps", "fused", "foreach")
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


@contextlib.contextmanager
def loading(checkpoint: Path | str | None, what: str) -> Iterator[None]:
    """What fails inside is the fault of a file whose hash is right: a `UserError`. `what`: the file."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if hasattr(error, "exit_code"):
            raise
        logger.debug("%s: %s", checkpoint, what, exc_info=error)
        reason = f"{type(error).__name__}: {first_line(error)}"
        if isinstance(error, pickle.UnpicklingError):  # whose text advises to execute it
            reason = "it holds more than tensors and numbers, and is not executed"
        raise UserError(f"{checkpoint}: {what} cannot be loaded ({reason}); resume from another checkpoint") from error


def check_readable(checkpoint: Path, max_steps: int) -> None:
    """Raises `UserError` where the JSON files of a checkpoint have another form, or its step is after `max_steps`."""
    step = step_of(checkpoint)
    if step > max_steps:
        raise UserError(f"{checkpoint} is after max_steps {max_steps}; give more steps, or name an older checkpoint")
    with loading(checkpoint, "trainer_state.json"):
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        numbers = [field.name for field in fields(state) if type(field.default) in (int, float)]
        if state.global_step != step or not all(isinstance(getattr(state, name), (int, float)) for name in numbers):
            raise ValueError(f"no state of step {step}")
        if not is_like(state.log_history, [{}]) or not isinstance(state.stateful_callbacks, dict):
            raise ValueError("no log_history")
    with loading(checkpoint, STREAM_STATE):
        form = {"settings": {}, "free": {}, "identity": {}, "position": {}, "skipped_steps": 0}
        if not is_like(read_stream_state(checkpoint), form):
            raise ValueError(f"not with {', '.join(form)}")


def is_like(value, form) -> bool:
    """Whether a value of JSON has the keys and types of `form`, whose lists hold one form for all elements."""
    if isinstance(form, dict):
        return isinstance(value, dict) and all(name in value and is_like(value[name], form[name]) for name in form)
    if isinstance(form, list):
        return isinstance(value, list) and all(is_like(each, form[0]) for each in value)
    return type(value) is type(form)


def check_settings(checkpoint: Path, wanted: dict, allow_change: Collection[str]) -> None:
    """Raises `UserError` with the differences that `allow_change` does not name. `wanted`: of `settings_of`. Logs the
    others. Compared is what both versions know."""
    saved = read_stream_state(checkpoint)
    differences = find_differences(saved["settings"], wanted["settings"], of_both=True)
    refused = {name: text for name, text in differences.items() if not is_named(name, allow_change)}
    if "model.parameters" in differences:  # weights and moments do not fit
        refused["model.parameters"] = differences["model.parameters"]
    both = [{name: each["settings"].get(name) for name in ("optim", "lr_scheduler_type")} for each in (saved, wanted)]
    if "optim" in differences and not {each["optim"] for each in both} <= ADAMW:
        refused["optim"] = f"{differences['optim']} (never: it cannot read the other's state)"
    if "lr_scheduler_type" in differences and PLATEAU in {each["lr_scheduler_type"] for each in both}:
        refused["lr_scheduler_type"] = f"{differences['lr_scheduler_type']} (never: one of them follows the losses)"
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
    unless `allow_change` names all of them: it is continued then. Raises `ValueError` where it is no position, such as
    `start` is one.
    """
    saved = read_stream_state(checkpoint)
    position, differences = saved["position"], find_differences(saved["identity"], identity)
    if not is_like(position, start):
        raise ValueError("no position")
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
    before = [group["lr"] for group in optimizer.param_groups]
    for group, own in zip(optimizer.param_groups, configured, strict=True):
        group.update({name: own[name] for name in CONFIGURED if name in own})
        if group.get("fused"):  # it counts steps on the device
            for weight in group["params"]:
                if "step" in (state := optimizer.state.get(weight, {})):
                    state["step"] = state["step"].to(weight.device, torch.float32)
    factors = getattr(scheduler, "lr_lambdas", None)
    if factors is None:  # it follows the losses, and is not a function of the step
        return
    scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    for group, factor in zip(optimizer.param_groups, factors, strict=True):
        group["lr"] = group["initial_lr"] * factor(scheduler.last_epoch)
    set_last_rates(scheduler, [group["lr"] for group in optimizer.param_groups])
    now = [group["lr"] for group in optimizer.param_groups]
    for saved, own in dict.fromkeys(zip(before, now, strict=True)):
        if abs(own - saved) > 1e-6 * saved:
            logger.warning("learning rate of step %d: %.6g in the checkpoint, %.6g now", step + 1, saved, own)


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
