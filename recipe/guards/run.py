"""Facts of a run, read from its Trainer at the first micro-batch."""

from collections.abc import Mapping
from functools import cached_property
from weakref import WeakSet

import torch
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from recipe.guards.batches import input_ids_of
from recipe.guards.trajectory import Reference, find_reference, optimizer_family
from recipe.internals import is_compiled_module

LOW_PRECISION = (torch.bfloat16, torch.float16)
TRAINED: WeakSet[torch.nn.Module] = WeakSet()  # models of which this process has made a step
Parameters = list[tuple[str, torch.nn.Parameter]]


class Run:
    """One training, seen from one rank.

    `model`: the unwrapped, eager module. `optimizer`: as accelerate wrapped it. `inputs`: the first micro-batch, of
    any kind. `step`, `tokens_seen`: at the start, above 0 after
    a resume. `given_facts`: what the user told the callback. `own_step`: a `training_step` that the trainer's
    instance holds itself, None where its class's is used. `pinned`: a `sandbox.PinnedBatch`. `objective`: an
    `objective.Objective`, None where it is not known. `is_restored`: the checkpoint's state of the guards was read.
    `step_size`: tokens and rows of a step of all ranks, padding too, by the main process's first micro-batch, whose
    rows and positions are `micro_batch`.
    """

    def __init__(
        self,
        trainer: Trainer,
        model: torch.nn.Module,
        inputs,
        given_facts: dict,
        tokens_seen: int | None,
        micro_batch: tuple[int, int] = (0, 0),
    ):
        self.trainer, self.args, self.model, self.inputs = trainer, trainer.args, model, inputs
        self.optimizer = trainer.optimizer
        self.step: int = trainer.state.global_step
        self.max_steps: int = trainer.state.max_steps
        self.world_size: int = self.args.world_size
        self.rank: int = self.args.process_index
        self.is_main: bool = trainer.state.is_world_process_zero
        self.own_step = None
        self.pinned = None
        self.objective = None
        self.is_restored = False
        num_rows = micro_batch[0] * self.args.gradient_accumulation_steps * self.world_size
        self.step_size = num_rows * micro_batch[1], num_rows
        self.facts = {**reference_facts(trainer, model, inputs), **given_facts}
        # Resumed where no records lie: the steps before had the same size.
        self.tokens_seen = self.step * self.facts["tokens_per_step"] if tokens_seen is None else tokens_seen
        self.reference: Reference | None = None
        self.no_reference, self.is_reference_named = "", False

    def find_reference(self, trajectory: str) -> None:
        self.reference, self.no_reference = find_reference(trajectory, self.facts)
        self.is_reference_named = trajectory not in ("auto", "none")

    # --- the model

    @property
    def is_new_model(self) -> bool:
        return self.facts["is_new_model"]

    @cached_property
    def embedding_rows(self) -> int:
        """0 where the model names no embedding of tokens and its config no vocabulary."""
        return rows_of_embedding(self.model) or self.facts["vocab_size"] or 0

    @property
    def vocab_size(self) -> int:
        return self.facts["vocab_size"] or self.embedding_rows

    @cached_property
    def named_parameters(self) -> Parameters:
        """Floating point, as the optimizer got them: FSDP and DeepSpeed put others into the model."""
        named = self.trainer.model_wrapped.named_parameters()
        return [(name, p) for name, p in named if p.is_floating_point() and p.numel()]

    @property
    def is_sharded(self) -> bool:
        return self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled

    @cached_property
    def is_compiled(self) -> bool:
        return is_compiled(self.trainer)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the matrix products: autocast's where it is on."""
        if self.args.bf16 or self.args.fp16:
            return torch.bfloat16 if self.args.bf16 else torch.float16
        return next(self.model.parameters()).dtype

    @property
    def is_exact(self) -> bool:
        """Whether it computes in fp32 or finer."""
        return self.dtype.itemsize >= 4

    # --- tokens

    @property
    def is_next_token(self) -> bool:
        """Whether the loss is a next-token cross entropy, as far as is known."""
        return self.objective is None or self.objective.is_next_token

    @property
    def has_tokens(self) -> bool:
        return input_ids_of(self.inputs) is not None

    @property
    def tokenizer(self):
        return self.trainer.processing_class

    @cached_property
    def pad_token_id(self) -> int | None:
        """What the tokenizer calls padding, else the model's config."""
        tokenizer, config = getattr(self.tokenizer, "tokenizer", self.tokenizer), getattr(self.model, "config", None)
        return next(iter([*_ids(tokenizer, "pad_token_id"), *_ids(config, "pad_token_id")]), None)

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """What the model's config and the tokenizer call EOS."""
        return eos_token_ids_of(self.model, self.tokenizer)

    @property
    def bos_token_id(self) -> int | None:
        return bos_token_id_of(self.model, self.tokenizer)

    # --- the optimizer and the schedule

    @property
    def optimizer_name(self) -> str:
        return type(self.inner_optimizer).__name__

    @property
    def inner_optimizer(self):
        return getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it

    @property
    def is_adam(self) -> bool:
        return "adam" in self.optimizer_name.lower()

    @property
    def is_loss_scaled(self) -> bool:
        """fp16: gradients carry an unknown factor, and some steps are skipped."""
        return self.trainer.accelerator.scaler is not None

    @property
    def is_evaluated(self) -> bool:
        return self.args.eval_strategy != "no" or self.args.eval_on_start


def reference_facts(trainer: Trainer, model: torch.nn.Module, inputs) -> dict:
    """What a reference may ask for (`belongs_to`), as far as the Trainer and its first micro-batch tell."""
    args, ids = trainer.args, input_ids_of(inputs)
    rows, block_size = ids.shape if ids is not None else (0, 0)
    begins, is_whole = not trainer.state.global_step, not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
    return {
        "vocab_size": getattr(getattr(model, "config", None), "vocab_size", None),
        "block_size": block_size,
        "tokens_per_step": rows * block_size * args.gradient_accumulation_steps * args.world_size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "learning_rate": args.learning_rate,
        "optimizer": optimizer_family(args.optim),
        "is_new_model": not getattr(model, "name_or_path", "") and not (begins and was_trained(model, is_whole)),
    }


def was_trained(model: torch.nn.Module, is_whole: bool = True) -> bool:
    """Whether this process has trained it, or elements of a norm's weight differ, which every family begins with one
    number. Of sharded weights (not `is_whole`) the second is not asked."""
    norms = [module for module in model.modules() if is_whole and "norm" in type(module).__name__.lower()]
    weights = [p.detach() for norm in norms for p in norm.parameters(recurse=False) if p.dim() == 1 and p.numel()]
    return model in TRAINED or any(bool((weight != weight[0]).any()) for weight in weights)


def is_compiled(trainer: Trainer) -> bool:
    """Whether any module of the model is compiled: hooks set now would never be called, or split its graph."""
    return trainer.args.torch_compile or any(map(is_compiled_module, trainer.model_wrapped.modules()))


def is_encoder(model: torch.nn.Module) -> bool:
    """Whether it, or what its adapters are for, is a class of transformers that sees all tokens, such as
    BertForTokenClassification."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT
    config, name = getattr(model, "config", None), type(model).__name__
    is_known = getattr(config, "model_type", None) in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    has_decoder = getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
    is_own = type(model).__module__.startswith("transformers.")
    return is_known and is_own and not has_decoder and name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def rows_of_embedding(model: torch.nn.Module) -> int | None:
    """None where the model names no embedding of tokens: transformers raises for some, others embed pictures."""
    try:
        return model.get_input_embeddings().weight.shape[0]
    except (AttributeError, NotImplementedError):
        return None


def eos_token_ids_of(model, tokenizer) -> tuple[int, ...]:
    return tuple(sorted({*_ids(getattr(model, "config", None), "eos_token_id"), *_ids(tokenizer, "eos_token_id")}))


def bos_token_id_of(model, processor) -> int | None:
    """What the tokenizer calls BOS, else the config. None for one that is EOS or padding too: two in a row are then an
    empty document."""
    config, tokenizer = getattr(model, "config", None), getattr(processor, "tokenizer", processor)
    named = [*_ids(tokenizer, "bos_token_id"), *_ids(config, "bos_token_id")]
    others = [*eos_token_ids_of(model, tokenizer), *_ids(tokenizer, "pad_token_id"), *_ids(config, "pad_token_id")]
    return named[0] if named and named[0] not in others else None


def text_tokenizer_of(processor) -> PreTrainedTokenizerBase | None:
    """The tokenizer of text that it is or holds."""
    tokenizer = getattr(processor, "tokenizer", processor)
    return tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None


def tokenizer_sizes_of(processor) -> tuple[int, int] | None:
    """Tokens without and with those that were added; None for what is no tokenizer and holds none."""
    try:
        tokenizer = getattr(processor, "tokenizer", processor)
        return int(tokenizer.vocab_size), len(tokenizer)
    except Exception:  # an image processor, a tokenizer of the user's own
        return None


def _ids(owner, name: str) -> list[int]:
    ids = owner.get(name) if isinstance(owner, Mapping) else getattr(owner, name, None)
    return [int(i) for i in (ids if isinstance(ids, (list, tuple)) else [ids]) if i is not None]


def plain_rate(rate) -> float | None:
    """A learning rate as a number; None where it lives on a device, which would have to be waited for."""
    if isinstance(rate, torch.Tensor):
        return None if rate.is_cuda else float(rate)
    return rate
