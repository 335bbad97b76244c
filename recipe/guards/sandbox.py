"""Runs the trainer's own code on one real micro-batch, and leaves the run exactly as it was.

Probes run on the unwrapped, eager model: hooks on a compiled one split its graph, and a foreign shape compiles it
again. They call methods of a twin of the trainer, so that what those keep (metrics, counters) stays there. They look
at a few rows of the batch, to stay under training's memory and to be done in seconds.
"""

import copy
import logging
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cached_property

import numpy as np
import torch
from accelerate import Accelerator
from transformers import Trainer

from recipe.guards.batches import IGNORE_INDEX, SeenTokens, input_ids_of, send_tokens
from recipe.guards.guard import CannotJudge, NotApplicable
from recipe.guards.head import LossTargets
from recipe.guards.objective import WEIGHTED_ROWS, Objective, find_objective, have_both_signs
from recipe.guards.recording import Recording, record
from recipe.guards.run import Run, is_compiled
from recipe.internals import original_forward, prepare_inputs

# What the probes look at: rows of the micro-batch (fewer of long ones, but two, so that one can be compared with the
# other), and positions where the length makes no difference. Measured on the 180M: 2,048 tokens and rows of 256 halved
# time and memory against 4 whole rows.
MAX_ROWS, MIN_ROWS, MAX_TOKENS = 4, 2, 2048
EVAL_ROWS, SHORT = 2, 256
# As many rows again, and again, that are asked which sign they have in a loss of the user's own. Derived: signs drawn
# by chance are alike in 16 rows once in 32,768 times.
FURTHER_PARTS = 3

logger = logging.getLogger("recipe.guards")

LOSS_FAILED = "compute_loss cannot be run once more on the first batch (the log at level DEBUG says why)"
BATCH_FAILED = "the trainer cannot prepare the batch once more (the log at level DEBUG says why)"
DATASETS = ("train_dataset", "eval_dataset")
MAX_COPIED = 1 << 20  # elements of a tensor that the trainer keeps
# Generators and some hooks are the process's: of Trainers on several threads one probes at a time.
ALONE = threading.RLock()


class Batch:
    """A micro-batch for probes. `inputs`: its first rows, prepared by the trainer; `all_inputs`: all of them.
    `is_first`: before the first step; else the probes run again to explain a finding. `twin`: of the trainer."""

    def __init__(self, run: Run, inputs, num_items_in_batch, is_first: bool):
        self.run, self.model, self.is_first = run, run.model, is_first
        self.num_items_in_batch = num_items_in_batch
        self.twin = twin_of(run.trainer)
        if not isinstance(inputs, Mapping):  # it may generate text before the model sees any
            raise NotApplicable(f"the micro-batch is a {type(inputs).__name__}, not a dict of tensors")
        try:
            self.all_inputs = prepare_inputs(self.twin, dict(inputs))
        except Exception as error:
            logger.debug("the trainer cannot prepare the batch in a probe", exc_info=error)
            raise CannotJudge(BATCH_FAILED) from error
        if input_ids_of(self.all_inputs) is None:
            raise NotApplicable("the batch has no input_ids")
        most = min(MAX_ROWS, MAX_TOKENS // self.all_inputs["input_ids"].shape[-1])
        self.inputs = first_rows(self.all_inputs, max(MIN_ROWS, most))

    @property
    def short_inputs(self) -> dict:
        """Two rows, and their first positions where that is possible."""
        return first_positions(first_rows(self.inputs, EVAL_ROWS))

    def seen_tokens(self, all_rows: bool = False) -> SeenTokens:
        """`inputs`, or the whole micro-batch, as the tokens tap gives them."""
        return send_tokens(self.all_inputs if all_rows else self.inputs, self.run.pad_token_id).read()

    def loss_of(self, inputs: dict | None = None) -> Callable[[], torch.Tensor]:
        """The trainer's own loss of these inputs, in the trainer's precision."""
        return loss_of(self.twin, self.model, inputs or self.inputs, self.num_items_in_batch)

    @cached_property
    def _recorded(self) -> Recording | CannotJudge:
        self.model.train()
        for inputs in (self.inputs, self.all_inputs):  # some losses need what cannot be cut
            try:
                self.inputs = inputs
                return record(self.model, self.loss_of(), ids=inputs["input_ids"])
            except CannotJudge as reason:
                return reason.without_trace()
            except Exception as error:
                logger.debug("compute_loss failed in a probe", exc_info=error)
        return CannotJudge(LOSS_FAILED)

    @property
    def recording(self) -> Recording:
        """Of the trainer's own loss of `inputs` in train mode. Raises `CannotJudge`."""
        if isinstance(self._recorded, CannotJudge):
            raise self._recorded.without_trace()
        return self._recorded

    @cached_property
    def objective(self) -> Objective:
        """What the loss is. Raises `CannotJudge`."""
        recorded = self.recording  # which may change `inputs`
        found = self._objective_of(self.inputs, recorded)
        if not found.is_next_token or not self.has_own_loss or self.run.world_size > 1:
            return found
        for inputs in self._further_rows():  # which a loss of the user's own may push away
            try:
                base = record(self.model, self.loss_of(inputs), ids=inputs["input_ids"])
                other = self._objective_of(inputs, base)
            except Exception as error:
                logger.debug("the objective of further rows is not known", exc_info=error)
                break
            if other.words == WEIGHTED_ROWS or have_both_signs(found.moves, other.moves):
                return Objective(WEIGHTED_ROWS, has_shift=True, moves=found.moves)
        return found

    def _objective_of(self, inputs: dict, base: Recording) -> Objective:
        def record_again(changed: dict) -> Recording:
            return record(self.model, self.loss_of(changed), base, changed["input_ids"])

        try:
            return find_objective(record_again, base, inputs, self.run)
        finally:
            for head in base.heads:
                head.release()

    def _further_rows(self) -> Iterator[dict]:
        """Rows of the micro-batch behind `inputs`, as many at a time, up to FURTHER_PARTS times."""
        count, number = (len(inputs["input_ids"]) for inputs in (self.inputs, self.all_inputs))
        for begin in range(count, min(number, (1 + FURTHER_PARTS) * count), count):
            yield some_rows(self.all_inputs, slice(begin, begin + count))

    def targets(self) -> LossTargets:
        """What the positions of `inputs` are really scored on, in train mode. Raises `CannotJudge`."""
        return self.recording.only().targets

    def count_items(self, inputs: dict):
        """`num_items_in_batch` as the trainer counts it for these rows, their share of a full step of them: for some
        models it counts the first label too."""
        args, steps = self.twin.args, self.twin.args.gradient_accumulation_steps
        _, items = self.twin.get_batch_samples(iter([dict(inputs) for _ in range(steps)]), steps, args.device)
        return items if items is None or steps == 1 else items / steps

    @property
    def has_own_loss(self) -> bool:
        """A loss of the user's own: it may choose its positions."""
        is_own = type(self.twin).compute_loss is not Trainer.compute_loss or "compute_loss" in vars(self.twin)
        return is_own or self.twin.compute_loss_func is not None


@contextmanager
def opened(run: Run, inputs, num_items_in_batch, is_first: bool) -> Iterator[Batch]:
    """Raises `CannotJudge` where no probe can run on this micro-batch."""
    if run.is_sharded:
        raise CannotJudge("the weights are sharded over ranks, so the unwrapped model cannot run by itself")
    with ALONE, undisturbed(run.model), eagerly(run.trainer):
        yield Batch(run, inputs, num_items_in_batch, is_first)


def loss_of(twin: Trainer, model, inputs: dict, num_items_in_batch) -> Callable[[], torch.Tensor]:
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
    """The batch's first rows."""
    return some_rows(inputs, slice(count))


def some_rows(inputs: dict, rows: slice) -> dict:
    """These rows of the batch: every tensor with as many rows as `input_ids` is cut."""
    num_rows = inputs["input_ids"].shape[0]
    return {
        name: value[rows] if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == num_rows else value
        for name, value in inputs.items()
    }


def first_positions(inputs: dict) -> dict:
    """The rows' first positions with enough scored ones; the rows as they are where a tensor has another shape."""
    shape, labels = inputs["input_ids"].shape, inputs.get("labels")
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    if labels is None or len(tensors) < len(inputs) or any(value.shape != shape for value in tensors.values()):
        return inputs
    if ((labels[:, 1:SHORT] != IGNORE_INDEX).sum(dim=1) < SHORT // 8).any():  # a masked prompt
        return inputs
    return {name: value[:, :SHORT] for name, value in tensors.items()}


# --- one pinned batch


class PinnedBatch:
    """The first rows of the run's first batch, on the host, so that a checkpoint can hold them. Their loss in eval
    mode is computed again after a resume and at evaluations, on every rank, since a `compute_loss` may gather."""

    def __init__(self, run: Run):
        self.run = run
        self.rows: dict[str, torch.Tensor] = {}

    def pin(self, inputs) -> None:
        rows = first_rows(inputs, EVAL_ROWS) if input_ids_of(inputs) is not None else {}
        rows = {name: value.detach().cpu().clone() for name, value in rows.items() if isinstance(value, torch.Tensor)}
        can_be_stored = input_ids_of(inputs) is not None and len(rows) == len(inputs) and "labels" in rows
        self.rows = rows if can_be_stored and not self.run.is_sharded else {}

    def losses(self, times: int) -> list[float]:
        """Of the present weights, in eval mode, one after the other: what draws random numbers draws others each time.
        Empty where no rows could be pinned. Raises `CannotJudge`."""
        if not self.rows or self.run.is_sharded:
            return []
        try:
            with ALONE, undisturbed(self.run.model), torch.no_grad():
                self.run.model.eval()
                twin = twin_of(self.run.trainer)
                compute_loss = loss_of(twin, self.run.model, prepare_inputs(twin, dict(self.rows)), None)
                return [float(compute_loss().mean()) for _ in range(times)]
        except Exception as error:  # a probe never ends a run
            logger.debug("the loss of the pinned rows failed", exc_info=error)
            raise CannotJudge("the pinned batch failed (the log at level DEBUG says why)") from error

    def save(self) -> dict[str, np.ndarray]:
        return {name: value.numpy() for name, value in self.rows.items() if value.dtype != torch.bfloat16}

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Rows that are no numbers were not pinned; without them the loss cannot be computed, which `losses` says."""
        self.rows = {name: torch.from_numpy(array) for name, array in arrays.items() if array.dtype.kind in "biuf"}


# --- leaving no trace


def eagerly(trainer: Trainer):
    """Layers compiled one by one or in place run eagerly while this is open: unwrapping the model leaves them as
    they are."""
    return torch.compiler.set_stance("force_eager") if is_compiled(trainer) else nullcontext()


def places_of(model: torch.nn.Module, values: Mapping) -> list[tuple[dict, str, torch.nn.Parameter]]:
    """Where modules hold the parameters that are keys of `values`, and what is to stand there."""
    tables = [module._parameters for module in model.modules()]
    return [(own, name, values[p]) for own in tables for name, p in own.items() if p in values]


@contextmanager
def replaced(places: list[tuple[dict, str, object]]) -> Iterator[None]:
    """Dictionaries hold other values, for as long as this is open."""
    before = [own[name] for own, name, _ in places]
    try:
        for own, name, value in places:
            own[name] = value
        yield
    finally:
        for (own, name, _), value in zip(places, before, strict=True):
            own[name] = value


@contextmanager
def without_autocast(model: torch.nn.Module) -> Iterator[None]:
    """accelerate replaces the model's forward by one with autocast, and keeps the original."""
    wrapped, original = vars(model).get("forward"), original_forward(model)
    try:
        if original is not None:
            model.forward = original
        yield
    finally:
        if original is not None:
            model.forward = wrapped


def twin_of(trainer: Trainer) -> Trainer:
    """A shallow copy with containers, state and control of its own. The class's `training_step` is in force on it."""
    twin = copy.copy(trainer)
    for name, value in vars(trainer).items():
        if name not in DATASETS:
            setattr(twin, name, own_containers(value))
    twin.state, twin.control = copy.copy(trainer.state), copy.copy(trainer.control)
    twin.accelerator = _alone(trainer.accelerator)
    vars(twin).pop("training_step", None)
    vars(twin).pop("prediction_step", None)
    return twin


def _alone(accelerator: Accelerator) -> Accelerator:
    """A copy that waits for no other rank: what it gathers is this rank's value for each of them. A probe may fail on
    one rank alone, and the others must not wait for it."""
    alone, count = copy.copy(accelerator), accelerator.num_processes
    if count > 1:
        alone.gather = lambda tensor: torch.cat([tensor.reshape(-1, *tensor.shape[1:])] * count)
    return alone


def own_containers(value):
    """A copy of what methods may change in place: containers, small tensors, generators. Other objects are shared."""
    if isinstance(value, dict):
        own = copy.copy(value)
        for key, inner in value.items():
            own[key] = own_containers(inner)
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
    """Afterwards the random generators, the modes of all modules, their buffers and plain attributes and the gradients
    are what they were before."""
    modules = [(module, _plain_attributes(module), dict(module._buffers)) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    generators = generators_now()
    try:
        yield
    finally:
        restore_generators(generators)
        for module, plain, own_buffers in modules:
            vars(module).update(plain)
            module._buffers.update(own_buffers)  # `self.mean = ...` puts another tensor in a buffer's place
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
        for parameter, gradient in gradients:
            parameter.grad = gradient


@contextmanager
def frozen(model: torch.nn.Module, training: bool) -> Iterator[None]:
    """In one mode, with frozen weights: no memory for their gradients, no casts left in autocast's cache. Afterwards
    modes, weights and generators are as they were."""
    modes = {module: module.training for module in model.modules()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    devices = {parameter.device for parameter in trainable if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            model.train(training).requires_grad_(False)
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for parameter in trainable:
                parameter.requires_grad_(True)


def _plain_attributes(module: torch.nn.Module) -> dict:
    """Its mode, and what it may count in its forward pass. A tensor: the longest row that dynamic RoPE has seen."""
    kinds = (bool, int, float, str, torch.Tensor)
    return {name: value for name, value in vars(module).items() if isinstance(value, kinds)}


def generators_now():
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), on_devices


def restore_generators(generators) -> None:
    in_python, in_numpy, in_torch, on_devices = generators
    random.setstate(in_python)
    np.random.set_state(in_numpy)
    torch.set_rng_state(in_torch)
    if on_devices:
        torch.cuda.set_rng_state_all(on_devices)
