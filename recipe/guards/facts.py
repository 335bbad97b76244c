"""What a Trainer can say of its run before the first step: the facts that references and guards go by."""

from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass

import torch
from transformers import Trainer

from recipe.guards.finding import CannotJudge
from recipe.guards.gradients import GradientWatch
from recipe.guards.vitals import expected_learning_rates


@dataclass(frozen=True)
class RunFacts:
    """What does not change in a run. `schedule`: factor on the initial learning rate by optimizer step, or why there
    is none to hold the rate against. `planned_rows`: of one step, all ranks; None where batches are not counted in
    rows. `rows_in_pass`: of the data, where it is known. `weights_are_scaled`: gradients carry an unknown factor
    (fp16 loss scaling). `followed`: the parameters whose gradients are followed, and whether they are in
    half precision."""

    vocab_size: int
    embedding_rows: int
    eos_token_ids: tuple[int, ...]
    world_size: int
    gradient_accumulation_steps: int
    num_workers: int
    planned_rows: int | None
    learning_rate: float | None
    schedule: Callable[[int], float] | CannotJudge
    rows_in_pass: int | None = None
    bos_token_id: int | None = None
    averages_over_ranks: bool = True
    weights_are_scaled: bool = False
    is_adam: bool = True
    parameter_names: tuple[str, ...] = ()
    max_grad_norm: float = 0.0
    label_smoothing: float = 0.0
    followed: tuple[tuple[str, bool], ...] = ()


def reference_facts(trainer: Trainer, model: torch.nn.Module, inputs: dict) -> dict:
    """What a reference may ask for (`belongs_to`), as far as the Trainer and its first micro-batch tell."""
    args = trainer.args
    rows, block_size = inputs["input_ids"].shape if "input_ids" in inputs else (0, 0)
    return {
        "vocab_size": getattr(getattr(model, "config", None), "vocab_size", None),
        "block_size": block_size,
        "tokens_per_step": rows * block_size * args.gradient_accumulation_steps * args.world_size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "learning_rate": args.learning_rate,
        "is_new_model": is_new(model),
    }


def run_facts(
    trainer: Trainer,
    model: torch.nn.Module,
    inputs: dict,
    facts: dict,
    rate_agrees: bool,
    gradients: Sequence[GradientWatch] = (),
) -> RunFacts:
    """`facts`: those of `reference_facts`, and what the user gave. `rate_agrees`: the optimizer was built with the
    learning rate of the arguments."""
    args = trainer.args
    embedding_rows = rows_of_embedding(model) or facts["vocab_size"] or 0
    batch, data = trainer._train_batch_size or args.train_batch_size, trainer.train_dataset
    is_padding_free = "position_ids" in inputs and batch > 1 and inputs["input_ids"].shape[0] == 1
    return RunFacts(
        vocab_size=facts["vocab_size"] or embedding_rows,
        embedding_rows=embedding_rows,
        eos_token_ids=eos_token_ids_of(model, trainer.processing_class),
        bos_token_id=bos_token_id_of(model, trainer.processing_class),
        world_size=args.world_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        num_workers=args.dataloader_num_workers,
        planned_rows=None if is_padding_free else batch * args.gradient_accumulation_steps * args.world_size,
        rows_in_pass=len(data) if isinstance(data, Sized) else None,
        learning_rate=args.learning_rate if rate_agrees else None,
        schedule=schedule_of(trainer),
        averages_over_ranks=args.average_tokens_across_devices,
        weights_are_scaled=trainer.accelerator.scaler is not None,
        is_adam="adam" in optimizer_name(trainer.optimizer).lower(),
        parameter_names=tuple(name for name, _ in model.named_parameters()),
        max_grad_norm=args.max_grad_norm or 0.0,
        label_smoothing=args.label_smoothing_factor,
        followed=tuple((each.name, each.is_low) for each in gradients),
    )


def rows_of_embedding(model: torch.nn.Module) -> int | None:
    """None where the model names no embedding of tokens: transformers raises for some, others embed pictures."""
    try:
        return model.get_input_embeddings().weight.shape[0]
    except (AttributeError, NotImplementedError):
        return None


def is_new(model: torch.nn.Module) -> bool:
    return not getattr(model, "name_or_path", "")


def optimizer_name(optimizer) -> str:
    return type(getattr(optimizer, "optimizer", optimizer)).__name__  # accelerate wraps it


def eos_token_ids_of(model, tokenizer) -> tuple[int, ...]:
    """What the model's config and the tokenizer call EOS."""
    return tuple(sorted({*_ids(getattr(model, "config", None), "eos_token_id"), *_ids(tokenizer, "eos_token_id")}))


def bos_token_id_of(model, processor) -> int | None:
    """What the tokenizer calls BOS, else the config. None for one that is EOS or padding too: two in a row are then an
    empty document."""
    config, tokenizer = getattr(model, "config", None), getattr(processor, "tokenizer", processor)
    named = [*_ids(tokenizer, "bos_token_id"), *_ids(config, "bos_token_id")]
    others = [*eos_token_ids_of(model, tokenizer), *_ids(tokenizer, "pad_token_id"), *_ids(config, "pad_token_id")]
    return named[0] if named and named[0] not in others else None


def tokenizer_sizes_of(processor) -> tuple[int, int] | None:
    """Tokens without and with those that were added; None for what is no tokenizer and holds none."""
    try:
        tokenizer = getattr(processor, "tokenizer", processor)
        return int(tokenizer.vocab_size), len(tokenizer)
    except Exception:  # an image processor, a tokenizer of the user's own
        return None


def _ids(owner, name: str) -> list[int]:
    ids = getattr(owner, name, None)
    return [int(i) for i in (ids if isinstance(ids, (list, tuple)) else [ids]) if i is not None]


def schedule_of(trainer: Trainer) -> Callable[[int], float] | CannotJudge:
    if not getattr(trainer, "_created_lr_scheduler", False):
        return CannotJudge("the scheduler is the user's own, or the optimizer's")
    if trainer.accelerator.scaler is not None:
        return CannotJudge("fp16 loss scaling skips steps now and then, and the schedule with them")
    args, total = trainer.args, trainer.state.max_steps
    warmup = args.get_warmup_steps(total)
    try:
        return expected_learning_rates(
            args.lr_scheduler_type, args.learning_rate, warmup, total, args.lr_scheduler_kwargs
        )
    except CannotJudge as reason:
        return reason


def plain_rate(rate) -> float | None:
    """A learning rate as a number; None where it lives on a device, which would have to be waited for."""
    if isinstance(rate, torch.Tensor):
        return None if rate.is_cuda else float(rate)
    return rate


def scheduled_rates(scheduler) -> list[float | None]:
    """What the scheduler says the rate of each parameter group is; empty where it does not say."""
    try:
        return [plain_rate(rate) for rate in scheduler.get_last_lr()]
    except (AttributeError, NotImplementedError):
        return []
