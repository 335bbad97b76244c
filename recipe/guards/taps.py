"""What is recorded on each rank, without waiting for the device.

TAPS:
    tokens       every micro-batch's tokens, for `Guard.measure_tokens`, and counts of their labels, `Step.labels`
    head         which targets a few positions were scored on, `Step.head`
    gradients    what micro-batches added to the gradient of one parameter or two, `Step.gradients`
    ngrams       n-gram models of the tokens, on the main process, `Step.ngrams`
    evaluation   the micro-batches of evaluations, `Evaluation`
Losses, learning rates, gradient norm and `num_items_in_batch` are always recorded.
"""

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from recipe.guards.batches import (
    AsyncCopy,
    PendingTokens,
    SeenTokens,
    input_ids_of,
    scored_part,
    send_tokens,
)
from recipe.guards.gradients import GradientNorms, GradientTap
from recipe.guards.guard import CannotJudge
from recipe.guards.head import HeadTap, SampledRows
from recipe.guards.ngrams import NgramRows, NgramTap, choose_every, choose_rows
from recipe.guards.run import TRAINED, Run

TAPS = ("tokens", "head", "gradients", "ngrams", "evaluation")
# Steps; sampling the head's gradient costs half a per cent of the demo's step (measured by
# `python -m tests.benchmarks guards`).
SAMPLE_EVERY = 2
# Micro-batches of a step. Of more, one is sampled in its turn, and all of them when all have had theirs. Chosen: each
# takes some 80 operations on the device, whose calls the training waits for.
MAX_SAMPLED = 8
# And every 100th after the last. Chosen, not measured: ranks that begin apart are found at once, later drift in time.
CHECKED_STEPS = (1, 10, 100)
Rates = list[tuple[float | None, float | None]]


def is_sampled(step: int, micro_step: int, num_micro_batches: int) -> bool:
    """Whether a micro-batch is, in the step after `step` of them."""
    turn, rest = divmod(step, SAMPLE_EVERY)
    of_all = num_micro_batches <= MAX_SAMPLED or turn % num_micro_batches == 0
    return not rest and (of_all or micro_step == turn % num_micro_batches)


def is_checked(step: int) -> bool:
    """What reads all weights or all gradients is done now and then."""
    return step in CHECKED_STEPS or step % CHECKED_STEPS[-1] == 0


# --- on the rank that makes the step


@dataclass
class LocalStep:
    """One optimizer step on this rank. `step`: optimizer steps before it; `first_micro_batch`: micro-batches of this
    training. `head`: with the number of its micro-batch. `learning_rates`: `(lr, initial_lr)` of each parameter group;
    `scheduled_rates`: what the scheduler says they are. `grad_norm`: before clipping, None where
    nothing is clipped; `clipped_norm`: of all gradients after clipping, where it was measured. `was_saved`: or
    evaluated, since the step before. `weights_before`, `weights_after`: see `updates.sample_once`."""

    step: int = 0
    first_micro_batch: int = 0
    losses: list[torch.Tensor] = field(default_factory=list)
    tokens: list[PendingTokens] = field(default_factory=list)
    head: list[tuple[int, SampledRows]] = field(default_factory=list)
    num_items: Any = None
    grad_norm: torch.Tensor | float | None = None
    clipped_norm: torch.Tensor | None = None
    learning_rates: Rates = field(default_factory=lambda: [(0.0, None)])
    scheduled_rates: list[float | None] = field(default_factory=list)
    gradients: list[torch.Tensor | None] = field(default_factory=list)
    was_saved: bool = False
    num_tokens: int = 0
    weights_before: dict[str, torch.Tensor] = field(default_factory=dict)
    weights_after: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def learning_rate(self) -> float:
        return self.learning_rates[0][0] or 0.0

    def next(self, step: int, num_micro_batches: int) -> "LocalStep":
        return LocalStep(step=step, first_micro_batch=self.first_micro_batch + num_micro_batches)


class PendingStep:
    """A step whose numbers are being copied to the host. `record`: what the host knew of it at once. `payloads`: by
    guard, what its `measure` gave."""

    def __init__(self, record: dict, local: LocalStep, payloads: dict[str, Any]):
        self.record, self.local = record, local
        self._payloads = {name: _send(value) for name, value in payloads.items()}
        self._num_items = _send(local.num_items)
        first = local.losses[0]
        norms = [_on_device(norm, first) for norm in (local.grad_norm, local.clipped_norm) if norm is not None]
        numbers = torch.stack([*norms, *(loss.reshape(()) for loss in local.losses)]).float()
        gradients = [gradient.to(first.device) for gradient in local.gradients if gradient is not None]
        self._values = AsyncCopy(torch.cat([numbers, *gradients]) if gradients else numbers)

    @property
    def step(self) -> int:
        return self.record["step"]

    def read_tokens(self) -> list[SeenTokens]:
        return [tokens.read() for tokens in self.local.tokens]

    def read(self) -> dict:
        """What this rank sends to the main process, as plain values."""
        values = self._values.read()
        numbers = iter(values.tolist())
        grad_norm, clipped_norm = (
            None if norm is None else next(numbers) for norm in (self.local.grad_norm, self.local.clipped_norm)
        )
        losses = [next(numbers) for _ in self.local.losses]
        return {
            # In the order and precision in which Trainer adds them.
            "loss": added(losses),
            "grad_norm": grad_norm,
            "norm_is_of_part": isinstance(self.local.grad_norm, DTensor)
            and self.local.grad_norm.placements[0].is_partial(),
            "clipped_norm": clipped_norm,
            "losses": losses,
            "gradients": [None if g is None else [next(numbers) for _ in g] for g in self.local.gradients],
            "head": [(micro_step, sampled.read()) for micro_step, sampled in self.local.head],
            "num_items": _read(self._num_items),
            "payloads": {name: _read(value) for name, value in self._payloads.items()},
        }


def added(losses: list[float]) -> float:
    """One after another, in fp32."""
    with np.errstate(all="ignore"):  # some may be infinite
        return float(np.cumsum(losses, dtype=np.float32)[-1])


def _on_device(norm: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    """A scalar beside `like`, without waiting for the device or for other ranks."""
    if isinstance(norm, torch.Tensor):
        norm = norm.to_local() if isinstance(norm, DTensor) else norm
        return norm.to(like.device, torch.float32).reshape(())
    return torch.full((), norm, dtype=torch.float32, device=like.device)


def _send(value):
    """Starts copying the tensors inside lists and dicts to the host."""
    if isinstance(value, torch.Tensor):
        return AsyncCopy(value)
    if isinstance(value, dict):
        return {key: _send(each) for key, each in value.items()}
    return [_send(each) for each in value] if isinstance(value, list) else value


def _read(value):
    if isinstance(value, AsyncCopy):
        return value.read().tolist()
    if isinstance(value, dict):
        return {key: _read(each) for key, each in value.items()}
    return [_read(each) for each in value] if isinstance(value, list) else value


# --- the taps


class EvaluationTap:
    """Collects the micro-batches of one evaluation; `take` hands them over at its end."""

    def __init__(self):
        self._tokens: list[PendingTokens] = []
        self._losses: list[AsyncCopy] = []

    def begin(self, inputs) -> PendingTokens | None:
        return send_tokens(inputs, pad_token_id=None)

    def end(self, tokens: PendingTokens | None, outputs) -> None:
        """`tokens`: what `begin` gave. `outputs`: of `prediction_step`, the loss first."""
        if tokens is not None and isinstance(outputs[0], torch.Tensor):
            self._tokens.append(tokens)
            self._losses.append(AsyncCopy(outputs[0].detach().float().mean()))

    def take(self) -> dict[str, list]:
        """Of this rank: `rows` (token ids) and what of them is scored, `learned`; `losses` and `counts` (scored
        tokens) of each micro-batch; `padding`: of them, where the batch has labels."""
        seen = [tokens.read() for tokens in self._tokens]
        labelled = [each for tokens, each in zip(self._tokens, seen, strict=True) if "labels" in tokens.names]
        padding = sum(int((each.scored & ~each.valid).sum()) for each in labelled)
        pieces = [piece for tokens in seen for piece in tokens.pieces]
        rows = [ids.astype(np.int32) for ids, _ in pieces]
        learned = [part.astype(np.int32) for part in (scored_part(*piece) for piece in pieces) if len(part)]
        losses = [loss.read().item() for loss in self._losses]
        self._tokens, self._losses = [], []
        counts = [each.num_scored for each in seen]
        return {"rows": rows, "learned": learned, "losses": losses, "counts": counts, "padding": padding}


class Taps:
    """The taps of one training on this rank. `names`: those that an active guard reads."""

    def __init__(self, run: Run, names: set[str]):
        assert names <= set(TAPS), f"unknown taps {names - set(TAPS)}"
        self.run = run
        self.reads_tokens = run.has_tokens and bool(names & {"tokens", "head", "ngrams"})
        self.head: HeadTap | None = None
        self.gradients: list[GradientTap] = []
        self.evaluation = EvaluationTap() if "evaluation" in names else None
        self.has_ngrams = "ngrams" in names and run.has_tokens
        self.ngrams = NgramTap(run.vocab_size) if self.has_ngrams and run.is_main else None
        if "head" in names and run.has_tokens and not run.is_compiled:
            with suppress(CannotJudge):  # the probe of the targets says so
                self.head = HeadTap(run.model)
        if "gradients" in names and not run.is_sharded and "layerwise" not in run.args.optim:  # steps within backward
            are_summed = run.args.gradient_accumulation_steps > 1 and run.world_size == 1
            kinds = (False, True) if are_summed else (False,)
            self.gradients = [GradientTap(run.named_parameters, of_matrices) for of_matrices in kinds]

    def begin_micro_step(self, local: LocalStep, inputs) -> PendingTokens | None:
        """Before the forward pass of a micro-batch of the training, not of those of probes."""
        trainer, steps = self.run.trainer, self.run.args.gradient_accumulation_steps
        is_short = getattr(trainer, "current_gradient_accumulation_steps", steps) < steps  # the last of a pass
        is_chosen = is_short or is_sampled(local.step, len(local.losses), steps)
        if self.head is not None and is_chosen:
            self.head.begin(input_ids_of(inputs))
        for tap in self.gradients:
            tap.is_listening = is_chosen or not tap.of_matrices
        return send_tokens(inputs, self.run.pad_token_id) if self.reads_tokens else None

    def end_micro_step(self, local: LocalStep, inputs, tokens: PendingTokens | None) -> None:
        """After its backward pass. `tokens`: what `begin_micro_step` gave."""
        for tap in self.gradients:
            tap.is_listening = False
        if (ids := input_ids_of(inputs)) is not None:
            local.num_tokens += ids.numel()
        if tokens is not None:
            local.tokens.append(tokens)
        if self.head is not None and (sampled := self.head.take()) is not None:
            local.head.append((len(local.losses) - 1, sampled))

    def drop_micro_step(self) -> None:
        for tap in self.gradients:
            tap.is_listening = False
        if self.head is not None:
            self.head.take()

    def choose_rows(self, step: int, tokens: list[SeenTokens]) -> NgramRows | None:
        """What the n-gram model on the main process is given of this rank's step."""
        every, ranks = choose_every(self.run.step_size[0]), (self.run.rank, self.run.world_size)
        return choose_rows(tokens, every, step, *ranks) if self.has_ngrams else None

    def begin_prediction(self, inputs) -> PendingTokens | None:
        return self.evaluation.begin(inputs) if self.evaluation is not None else None

    def end_prediction(self, tokens: PendingTokens | None, outputs) -> None:
        if self.evaluation is not None:
            self.evaluation.end(tokens, outputs)

    def take_evaluation(self) -> dict | None:
        return self.evaluation.take() if self.evaluation is not None else None

    def before_clip(self) -> None:
        for tap in self.gradients:
            tap.before_clip()

    def after_clip(self, local: LocalStep, norm) -> None:
        # Over a mesh of two dimensions, which parts are the same is not known here.
        local.grad_norm = None if isinstance(norm, DTensor) and norm.device_mesh.ndim > 1 else norm
        if self.gradients and is_checked(local.step + 1):
            gradients = [p.grad for _, p in self.run.named_parameters if p.requires_grad and p.grad is not None]
            local.clipped_norm = torch.nn.utils.get_total_norm(gradients).float()

    def before_step(self, local: LocalStep) -> None:
        local.gradients = [tap.take(len(local.losses), local.step) for tap in self.gradients]

    def after_step(self, local: LocalStep) -> None:
        TRAINED.add(self.run.model)
        for tap in self.gradients:
            tap.after_step(local.step)

    def name_gradients(self, norms: list[list[float] | None]) -> list[GradientNorms]:
        pairs = zip(self.gradients, norms, strict=True)
        return [GradientNorms(tap.name, tap.is_low, *each, tap.of_matrices) for tap, each in pairs if each is not None]

    def save(self) -> dict[str, dict]:
        """By tap. The n-gram model's is the main process's."""
        state = {f"gradients{number}": tap.save() for number, tap in enumerate(self.gradients)}
        named = {"head": self.head, "ngrams": self.ngrams}
        return state | {name: tap.save() for name, tap in named.items() if tap is not None}

    def load(self, state: dict[str, dict]) -> None:
        named = {f"gradients{number}": tap for number, tap in enumerate(self.gradients)}
        named |= {"head": self.head, "ngrams": self.ngrams}
        for name, tap in named.items():
            if tap is not None and name in state:
                tap.load(state[name])

    def close(self) -> None:
        for tap in filter(None, (self.head, *self.gradients)):
            tap.close()
