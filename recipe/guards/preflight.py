"""Every probe on one real micro-batch, through the trainer's own code, leaving the run exactly as it was.

The probes run on the unwrapped, eager model: hooks on a compiled one split its graph, a foreign shape compiles it
anew. They call methods of a twin of the trainer, so that what those keep (metrics, counters) is kept there. They look
at a few rows of the batch, to stay under training's memory and to be done in seconds; rows further on and later steps
are looked at in passing (`listener.py`).
"""

import copy
import math
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass

import numpy as np
import torch
from transformers import Trainer

from recipe.guards.batches import SeenTokens, TokenCounter, flags_of
from recipe.guards.facts import bos_token_id_of, eos_token_ids_of, tokenizer_sizes_of
from recipe.guards.finding import CannotJudge, Finding, NotApplicable
from recipe.guards.journal import Result
from recipe.guards.listener import is_compiled
from recipe.guards.probes.attention import probe_attention
from recipe.guards.probes.equivalence import check_compiled, probe_accumulation, probe_eval
from recipe.guards.probes.gradient import probe_gradient
from recipe.guards.probes.targets import (
    IGNORE_INDEX,
    LossTargets,
    check_all_scored,
    check_last_position,
    check_logits,
    check_loss_targets,
    head_of,
    recover_loss_targets,
)
from recipe.guards.thresholds import (
    EVAL_ROWS,
    PREFLIGHT_MAX_ROWS,
    PREFLIGHT_MAX_TOKENS,
    PREFLIGHT_MIN_ROWS,
    SHORT,
)
from recipe.guards.vitals import (
    check_double_bos,
    check_init_loss,
    check_padding_targets,
    check_token_range,
    check_tokenizer_size,
)

TARGETS = ("missing_label_shift", "double_label_shift", "wrong_loss_target")
ATTENTION = ("non_causal_attention", "row_leak", "cross_document_attention")
EVALUATION = ("eval_not_repeatable", "eval_train_mismatch")
TOKENS = ("token_out_of_range", "padding_is_target")
PROBES = (*TARGETS, "init_loss_off", *ATTENTION, *TOKENS, "wrong_gradient", "accumulation_mismatch", *EVALUATION)
DATASETS = ("train_dataset", "eval_dataset")
MAX_COPIED = 1 << 20  # elements of a tensor that the trainer keeps


def run_probes(
    trainer: Trainer,
    inputs: dict,
    num_items_in_batch,
    own_step: object | None,
    step: int,
    tokens_seen: int,
    is_new_model: bool = False,
    only_curve: bool = False,
) -> dict[str, Result]:
    """What each probe says of this micro-batch: `{finding id: Finding, None or the CannotJudge that says why not}`.

    `own_step`: a `training_step` that the trainer's instance holds itself, None where its class's is used.
    `only_curve`: the probes that can explain a loss curve, targets and attention.
    """
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        reason = CannotJudge("the weights are sharded over ranks, so the unwrapped model cannot run by itself")
        return dict.fromkeys(PROBES, reason)
    where = {"step": step, "tokens_seen": tokens_seen}
    results: dict[str, Result] = {}
    with undisturbed(model), eagerly(trainer):
        twin = twin_of(trainer)
        prepared = twin._prepare_inputs(dict(inputs))
        if missing := [name for name in ("input_ids", "labels") if not isinstance(prepared.get(name), torch.Tensor)]:
            return dict.fromkeys(PROBES, CannotJudge(f"the batch has no {' and no '.join(missing)}"))
        most = min(PREFLIGHT_MAX_ROWS, PREFLIGHT_MAX_TOKENS // prepared["input_ids"].shape[-1])
        prepared = first_rows(prepared, max(PREFLIGHT_MIN_ROWS, most))
        results |= _guarded(
            TARGETS, lambda: _probe_targets(twin, model, prepared, num_items_in_batch, is_new_model, where)
        )
        results |= _guarded(ATTENTION, lambda: _probe_attention(twin, model, prepared, num_items_in_batch, where))
        if only_curve:
            results.pop("init_loss_off", None)
            return results
        results |= _guarded(TOKENS, lambda: _probe_tokens(twin, model, prepared, where))
        results |= _guarded(("wrong_gradient",), lambda: _probe_gradient(twin, model, prepared, where))
        results |= _guarded(
            ("accumulation_mismatch",), lambda: _probe_accumulation(twin, model, prepared, own_step, where)
        )
        results |= _guarded(EVALUATION, lambda: _probe_eval(twin, model, prepared, where))
    return results


def _guarded(ids: tuple[str, ...], probe: Callable[[], dict[str, Result]]) -> dict[str, Result]:
    """A probe never ends a run: what is wrong with the loss itself, the step that follows will say."""
    try:
        return probe()
    except CannotJudge as reason:
        return dict.fromkeys(ids, reason)
    except Exception as error:
        return dict.fromkeys(ids, CannotJudge(f"the probe failed with {type(error).__name__}: {error}"))


def _probe_targets(twin, model, inputs, num_items_in_batch, is_new_model, where) -> dict[str, Result]:
    model.train()
    found = recover_loss_targets(model, _loss_of(twin, model, inputs, num_items_in_batch))
    results: dict[str, Result] = {"init_loss_off": _check_init_loss(found, model, is_new_model, where)}
    finding = check_loss_targets(inputs["input_ids"], found.targets, inputs["labels"], **where)
    labels = inputs["labels"]
    for check in (
        lambda: check_all_scored(found, labels, **where, is_own_loss=_has_own_loss(twin)),
        lambda: check_last_position(inputs["input_ids"], found, labels, **where),
    ):
        if finding is None:
            with suppress(CannotJudge):  # the targets have been judged
                finding = check()
    if (bounded := check_logits(found, head_of(model).weight.shape[0], **where)) is not None:
        results["loss_above_envelope"] = bounded
    return results | {name: finding if finding is not None and finding.id == name else None for name in TARGETS}


def _has_own_loss(trainer: Trainer) -> bool:
    """A loss of the user's own beside the model's: it may choose its positions."""
    is_own = type(trainer).compute_loss is not Trainer.compute_loss or "compute_loss" in vars(trainer)
    return is_own or trainer.compute_loss_func is not None


def _check_init_loss(found: LossTargets, model, is_new_model: bool, where: dict) -> Result:
    scored = found.targets != IGNORE_INDEX
    loss = float(found.losses[scored].mean()) if scored.any() else math.nan
    try:
        return check_init_loss(
            **where, loss=loss, vocab_size=head_of(model).weight.shape[0], is_new_model=is_new_model
        )
    except CannotJudge as reason:
        return NotApplicable(str(reason))


def _probe_tokens(twin, model, inputs, where) -> dict[str, Result]:
    """Of this batch alone; over the run they are counted on."""
    rows = model.get_input_embeddings().weight.shape[0]
    tokenizer, sizes = twin.processing_class, tokenizer_sizes_of(twin.processing_class)
    counter = TokenCounter(eos_token_ids_of(model, tokenizer), rows, bos_token_id_of(model, tokenizer))
    names = ("input_ids", "labels", "attention_mask", "position_ids")
    flags = flags_of(*map(inputs.get, names), getattr(tokenizer, "pad_token_id", None))
    counter.add(SeenTokens(inputs["input_ids"].cpu().numpy(), flags.cpu().numpy()))
    out_of_range = check_token_range(**where, counts=counter.counts)
    if out_of_range is None and sizes is not None:
        out_of_range = check_tokenizer_size(**where, sizes=sizes, embedding_rows=rows)
    results = {
        "token_out_of_range": out_of_range,
        "padding_is_target": check_padding_targets(**where, counts=counter.counts),
    }
    double_bos = check_double_bos(**where, counts=counter.counts)  # these rows hold enough texts only if packed
    return results if double_bos is None else results | {"double_bos": double_bos}


def _probe_attention(twin, model, inputs, num_items_in_batch, where) -> dict[str, Result]:
    if type(twin).compute_loss is not Trainer.compute_loss or "compute_loss" in vars(twin):
        _check_model_inputs(model, inputs, _loss_of(twin, model, inputs, num_items_in_batch))
    with twin.compute_loss_context_manager():
        return probe_attention(model, inputs, **where)


def _check_model_inputs(model, inputs: dict, compute_loss: Callable[[], torch.Tensor]) -> None:
    """The probe asks the model, so a `compute_loss` of the user's own must give it the batch's tokens, once. Raises
    `CannotJudge` where it gives it others, or embeddings."""
    seen = []
    hook = model.register_forward_pre_hook(lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    embedded = []
    embedding = model.get_input_embeddings().register_forward_hook(lambda *call: embedded.append(1))
    try:
        with torch.no_grad():
            compute_loss()
    finally:
        hook.remove()
        embedding.remove()
    given = [kwargs.get("input_ids", args[0] if args else None) for args, kwargs in seen]
    if len(given) != 1 or len(embedded) != 1 or not _is_same(given[0], inputs["input_ids"]):
        raise CannotJudge("compute_loss gives the model something else than the batch's tokens, or more than once")


def _is_same(given, ids: torch.Tensor) -> bool:
    return isinstance(given, torch.Tensor) and given.shape == ids.shape and torch.equal(given, ids)


def _probe_accumulation(twin, model, inputs, own_step, where) -> dict[str, Result]:
    if twin.args.gradient_accumulation_steps * twin.args.world_size == 1:
        raise NotApplicable("one micro-batch a step: nothing is accumulated")
    if own_step is not None:
        raise CannotJudge("training_step was replaced on the trainer itself, so it cannot be run without a step")

    def scaled_loss(inputs, num_items_in_batch, num_micro_batches):
        return scaled_loss_of(twin, model, inputs, num_items_in_batch, num_micro_batches)

    return {"accumulation_mismatch": probe_accumulation(model, first_positions(inputs), scaled_loss, **where)}


def _probe_gradient(twin, model, inputs, where) -> dict[str, Result]:
    rows, generators = first_positions(first_rows(inputs, EVAL_ROWS)), _generators()
    _, num_items_in_batch = twin.get_batch_samples(iter([rows]), 1, twin.args.device)

    def loss_of() -> torch.Tensor:
        _restore_generators(generators)
        return twin.compute_loss(model, dict(rows), num_items_in_batch=num_items_in_batch).mean()

    model.train()
    with _without_autocast(model):
        return {"wrong_gradient": probe_gradient(model, loss_of, where, is_alone=twin.args.world_size == 1)}


@contextmanager
def _without_autocast(model: torch.nn.Module) -> Iterator[None]:
    """accelerate puts a forward with autocast in the place of the model's own, and keeps that."""
    wrapped, original = vars(model).get("forward"), vars(model).get("_original_forward")
    try:
        if original is not None:
            model.forward = original
        yield
    finally:
        if original is not None:
            model.forward = wrapped


def _probe_eval(twin, model, inputs, where) -> dict[str, Result]:
    def train_loss(rows: dict) -> torch.Tensor:
        # The trainer's own count: for GPT2LMHeadModel and some others it counts the first label too, here and there.
        _, num_items_in_batch = twin.get_batch_samples(iter([rows]), 1, twin.args.device)
        return _loss_of(twin, model, rows, num_items_in_batch)()

    def eval_loss(rows: dict) -> torch.Tensor:
        return twin.prediction_step(model, dict(rows), prediction_loss_only=True)[0]

    rows, exact = first_positions(first_rows(inputs, EVAL_ROWS)), precision_of(twin, model).itemsize >= 4
    return probe_eval(model, rows, train_loss, eval_loss, **where, exact=exact)


def _loss_of(twin: Trainer, model, inputs: dict, num_items_in_batch) -> Callable[[], torch.Tensor]:
    def compute_loss():
        with twin.compute_loss_context_manager():
            return twin.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch)

    return compute_loss


def scaled_loss_of(twin: Trainer, model, inputs: dict, num_items_in_batch, num_micro_batches: int) -> torch.Tensor:
    """The loss as `training_step` sends it to backward, for one micro-batch of a step of `num_micro_batches`."""
    sent = []
    accelerator = copy.copy(twin.accelerator)
    accelerator.backward = lambda loss, **kwargs: sent.append(loss / accelerator.gradient_accumulation_steps)
    twin.accelerator, twin.current_gradient_accumulation_steps = accelerator, num_micro_batches
    twin.args = copy.copy(twin.args)
    twin.args.gradient_accumulation_steps = num_micro_batches
    type(twin).training_step(twin, model, dict(inputs), num_items_in_batch)
    if len(sent) != 1:
        raise CannotJudge(f"training_step calls backward {len(sent)} times in a micro-batch")
    return sent[0]


def first_rows(inputs: dict, count: int) -> dict:
    """The batch's first rows: every tensor with as many rows as `input_ids` is cut."""
    num_rows = inputs["input_ids"].shape[0]
    return {
        name: value[:count]
        if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == num_rows
        else value
        for name, value in inputs.items()
    }


def first_positions(inputs: dict) -> dict:
    """The rows' first positions with enough scored ones; the rows as they are where a tensor has another shape."""
    shape, labels = inputs["input_ids"].shape, inputs["labels"]
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    if len(tensors) < len(inputs) or any(value.shape != shape for value in tensors.values()):
        return inputs
    if ((labels[:, 1:SHORT] != IGNORE_INDEX).sum(dim=1) < SHORT // 8).any():  # a masked prompt
        return inputs
    return {name: value[:, :SHORT] for name, value in tensors.items()}


# --- a compiled model beside the eager one


@dataclass(frozen=True)
class Eager:
    """What the eager model makes of a micro-batch: its loss, and norm and sum of each parameter's gradient."""

    loss: float
    gradients: dict[str, tuple[float, float]]
    dtype: torch.dtype


def measure_eager(trainer: Trainer, model: torch.nn.Module, inputs: dict, num_items_in_batch) -> Eager:
    """Before the real step. Raises `CannotJudge` where the compiled model draws other random numbers."""
    if trainer.args.world_size > 1 or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise CannotJudge("gradients are averaged over ranks as they come")
    if dropout := next((name for name, value in _dropouts(model) if value), None):
        raise CannotJudge(f"{dropout} is on, and a compiled model draws other random numbers")
    with undisturbed(model), eagerly(trainer):
        twin = twin_of(trainer)
        prepared = twin._prepare_inputs(dict(inputs))
        steps = trainer.current_gradient_accumulation_steps
        loss = scaled_loss_of(twin, model, prepared, num_items_in_batch, steps)
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
        pairs = zip((name for name, _ in named), gradients, strict=True)
        return Eager(
            float(loss.detach()), {name: _size(g) for name, g in pairs if g is not None}, precision_of(trainer, model)
        )


def compare_compiled(trainer: Trainer, model: torch.nn.Module, eager: Eager, loss: torch.Tensor) -> Finding | None:
    """After the real micro-batch, the first since the gradients were zeroed."""
    gradients = {name: _size(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    shared = {name: size for name, size in gradients.items() if name in eager.gradients}
    return check_compiled(eager.gradients, shared, (eager.loss, float(loss)), eager.dtype, trainer.state.global_step)


def _size(gradient: torch.Tensor) -> tuple[float, float]:
    return float(gradient.float().norm()), float(gradient.float().sum())


def _dropouts(model: torch.nn.Module) -> Iterator[tuple[str, float]]:
    for name, module in model.named_modules():
        yield name, getattr(module, "p", 0.0) if isinstance(module, torch.nn.Dropout) else 0.0
    for name, value in vars(getattr(model, "config", None) or object).items():
        if isinstance(value, float) and (name.endswith("dropout") or name.endswith("pdrop")):
            yield name, value


def precision_of(trainer: Trainer, model: torch.nn.Module) -> torch.dtype:
    """Of the matrix products: autocast's where it is on."""
    if trainer.args.bf16 or trainer.args.fp16:
        return torch.bfloat16 if trainer.args.bf16 else torch.float16
    return next(model.parameters()).dtype


# --- one pinned batch


def pin(inputs: dict) -> dict:
    """The first rows, on the host: what can be stored."""
    rows = first_rows(inputs, EVAL_ROWS) if isinstance(inputs.get("input_ids"), torch.Tensor) else {}
    tensors = {name: value.detach().cpu().clone() for name, value in rows.items() if isinstance(value, torch.Tensor)}
    return tensors if len(tensors) == len(rows) and "labels" in tensors else {}


def losses_in_eval_mode(trainer: Trainer, model: torch.nn.Module, inputs: dict, times: int) -> list[float]:
    """One after the other: what draws random numbers draws others each time."""
    with undisturbed(model), torch.no_grad():
        model.eval()
        twin = twin_of(trainer)
        compute_loss = _loss_of(twin, model, twin._prepare_inputs(dict(inputs)), None)
        return [float(compute_loss().mean()) for _ in range(times)]


# --- leaving no trace


def eagerly(trainer: Trainer):
    """Layers compiled one by one or in place run eagerly while this is open: unwrapping the model leaves them as
    they are."""
    return torch.compiler.set_stance("force_eager") if is_compiled(trainer) else nullcontext()


def twin_of(trainer: Trainer) -> Trainer:
    """A shallow copy with containers, state and control of its own. The class's `training_step` is in force on it."""
    twin = copy.copy(trainer)
    for name, value in vars(trainer).items():
        if name not in DATASETS:
            setattr(twin, name, _own_containers(value))
    twin.state, twin.control = copy.copy(trainer.state), copy.copy(trainer.control)
    vars(twin).pop("training_step", None)
    vars(twin).pop("prediction_step", None)
    return twin


def _own_containers(value):
    """A copy of what methods may change in place: containers, small tensors, generators. Other objects are shared."""
    if isinstance(value, dict):
        own = copy.copy(value)
        for key, inner in value.items():
            own[key] = _own_containers(inner)
        return own
    if isinstance(value, (list, set, deque)):
        return copy.copy(value)
    if isinstance(value, torch.Tensor) and not value.requires_grad and value.numel() <= MAX_COPIED:
        return value.clone()
    if isinstance(value, torch.Generator):
        return value.clone_state()
    return copy.deepcopy(value) if isinstance(value, (random.Random, np.random.Generator)) else value


@contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Whatever happens inside, the random generators, the modes of all modules, their buffers and plain attributes and
    the gradients are afterwards what they were before."""
    modules = [(module, _plain_attributes(module), dict(module._buffers)) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    generators = _generators()
    try:
        yield
    finally:
        _restore_generators(generators)
        for module, plain, own_buffers in modules:
            vars(module).update(plain)
            module._buffers.update(own_buffers)  # `self.mean = ...` puts another tensor in a buffer's place
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _plain_attributes(module: torch.nn.Module) -> dict:
    """Its mode, and what it may count in its forward pass."""
    return {name: value for name, value in vars(module).items() if isinstance(value, (bool, int, float, str))}


def _generators():
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), on_devices


def _restore_generators(generators) -> None:
    in_python, in_numpy, in_torch, on_devices = generators
    random.setstate(in_python)
    np.random.set_state(in_numpy)
    torch.set_rng_state(in_torch)
    if on_devices:
        torch.cuda.set_rng_state_all(on_devices)
