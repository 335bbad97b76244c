"""The one way in which the guards reach a Trainer, and what they hear there.

Callbacks are given no trainer. `find_trainer` takes it from the call stack of `on_train_begin`: it is the `self` of
the first calling frame that is a Trainer holding this callback. `Wrapping` then puts a listener before three methods
of that instance: `training_step` and `prediction_step` (every micro-batch) and `accelerator.clip_grad_norm_` (the norm
before clipping). `TargetListener` hears the head of the model.
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import Trainer, TrainerCallback

from recipe.guards.probes.targets import (
    IGNORE_INDEX,
    LossTargets,
    backbone_of,
    count_hits,
    head_of,
    target_of_logits,
    targets_from_hidden,
)
from recipe.guards.thresholds import FUSED_EVERY, MAX_POSITIONS, POSITIONS


def find_trainer(callback: TrainerCallback) -> tuple[Trainer | None, str | None]:
    """The Trainer that is training now, and the checkpoint it goes on from (None: it begins)."""
    frame, trainer, checkpoint = sys._getframe(1), None, None
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, Trainer) and callback in candidate.callback_handler.callbacks:
            named = frame.f_locals.get("resume_from_checkpoint")
            trainer, checkpoint = trainer or candidate, named if isinstance(named, str) else checkpoint
        frame = frame.f_back
    return trainer, checkpoint


def is_compiled(trainer: Trainer) -> bool:
    """Whether any module of the model is compiled: hooks set now would never be called, or split its graph."""
    model = trainer.model_wrapped
    return trainer.args.torch_compile or any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) for module in model.modules()
    )


class Wrapping:
    """Methods of instances that have been replaced; `undo` puts back what was there."""

    def __init__(self):
        self._replaced: list[tuple[object, str, object]] = []

    def replace(self, owner: object, name: str, make: Callable[[Callable], Callable]) -> None:
        own = vars(owner).get(name)  # None: the class's
        self._replaced.append((owner, name, own))
        setattr(owner, name, make(getattr(owner, name)))

    def original(self, owner: object, name: str) -> object | None:
        """What the instance itself held under `name`, None where the class's method is used."""
        return next((own for held, held_name, own in self._replaced if held is owner and held_name == name), None)

    def undo(self) -> None:
        for owner, name, own in reversed(self._replaced):
            if own is None:
                delattr(owner, name)
            else:
                setattr(owner, name, own)
        self._replaced.clear()


class HeardRows(NamedTuple):
    """What the head told of one micro-batch; one row for each sampled row of the batch.

    `hits` `[rows, 5]`: see `count_hits`. `weights` `[rows, 3]`: lowest, mean and highest weight of the positions
    looked at that are scored, zeros where there is none. `losses` `[rows]`: their mean cross entropy, nats.
    """

    first_row: int
    first_position: int
    block_size: int
    hits: torch.Tensor
    weights: torch.Tensor
    losses: torch.Tensor


class TargetListener:
    """Recovers the targets of a few positions in the real forward and backward passes, as they go by.

    Hooks at the head (or, where a fused loss makes no logits, at the backbone) read its output and the gradient there
    and change neither: bit-identical weights with and without were seen in fp32 and bf16, and are tested. The place
    that is looked at moves on with each micro-batch, so that in time every row and position has its turn.
    """

    def __init__(self, model: torch.nn.Module):
        self.head = head_of(model)
        self.ids: torch.Tensor | None = None  # of the micro-batch that is being trained on; None: do not listen
        self.heard: list[HeardRows] = []
        self._turn = 0
        self._logits_seen = False
        self._hooks = [self.head.register_forward_hook(self._hear_logits)]
        backbone = backbone_of(model)
        if backbone is not model:
            self._hooks.append(backbone.register_forward_hook(self._hear_hidden))

    def begin(self, input_ids: torch.Tensor | None) -> None:
        self.ids = input_ids if input_ids is not None and input_ids.dim() == 2 else None
        self._turn += 1

    def take(self) -> list[HeardRows]:
        heard, self.heard, self.ids = self.heard, [], None
        return heard

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hear_hidden(self, module, inputs, output) -> None:
        if (
            self.ids is not None and not self._logits_seen and self._turn % FUSED_EVERY == 1
        ):  # a head that is called makes the logits itself
            self._listen(output[0], is_hidden=True)

    def _hear_logits(self, module, inputs, output) -> None:
        if self.ids is not None:
            self._logits_seen = True
            self._listen(output, is_hidden=False)

    def _listen(self, output: torch.Tensor, is_hidden: bool) -> None:
        ids = self.ids
        if not output.requires_grad or output.shape[:2] != ids.shape or ids.shape[1] < POSITIONS:
            return
        values = output.detach()

        def hear(gradient: torch.Tensor) -> None:
            if is_hidden and self._logits_seen:
                return
            self.heard = [self._look(ids.to(values.device), values, gradient, is_hidden)]

        output.register_hook(hear)

    def _look(self, ids: torch.Tensor, values: torch.Tensor, gradient: torch.Tensor, is_hidden: bool) -> HeardRows:
        num_rows, block_size = ids.shape
        count = min(num_rows, max(1, MAX_POSITIONS // POSITIONS))
        row = self._turn * count % (num_rows - count + 1) if num_rows > count else 0
        # Golden-section steps: successive turns lie far apart and miss no place.
        position = int(self._turn * 0.6180339887 % 1 * (block_size - POSITIONS + 1))
        place = (slice(row, row + count), slice(position, position + POSITIONS))
        ids, values, gradient = ids[place], values[place], gradient[place]
        if is_hidden:
            found = targets_from_hidden(values, gradient, self.head)
        else:
            found = LossTargets(*target_of_logits(values, gradient))
        scored = found.targets != IGNORE_INDEX
        number = scored.sum(dim=1).clamp_min(1)
        weights = [
            torch.where(scored, found.weights, torch.inf).amin(dim=1),
            torch.where(scored, found.weights, 0.0).sum(dim=1) / number,
            torch.where(scored, found.weights, 0.0).amax(dim=1),
        ]
        return HeardRows(
            row,
            position,
            block_size,
            count_hits(ids, found.targets),
            torch.stack(weights, dim=1),
            torch.where(scored, found.losses, 0.0).sum(dim=1) / number,
        )


def as_one(heard: HeardRows) -> torch.Tensor:
    """`[rows, 9]`: one copy to the host instead of three."""
    return torch.cat([heard.hits.float(), heard.weights.float(), heard.losses.float().unsqueeze(1)], dim=1)


def as_plain(heard: HeardRows, values: torch.Tensor) -> dict:
    """`as_one` on the host, with its place."""
    rows = values.tolist()
    return {
        "first_row": heard.first_row,
        "first_position": heard.first_position,
        "positions": POSITIONS,
        "hits": [[int(number) for number in row[:5]] for row in rows],
        "weights": [row[5:8] for row in rows],
        "losses": [row[8] for row in rows],
    }
