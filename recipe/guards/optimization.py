"""What is measured around the optimizer's step on this rank: parameters, gradients, Adam's arithmetic, casts."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import Trainer

from recipe.guards.adam import AdamWatch
from recipe.guards.batches import OnItsWay
from recipe.guards.facts import optimizer_name
from recipe.guards.finding import NotApplicable
from recipe.guards.gradients import GradientWatch
from recipe.guards.parameters import Judgment, Measured, ParameterWatch
from recipe.guards.precision import CastWatch, check_casts
from recipe.guards.thresholds import CHECKSUM_STEPS, LISTEN_EVERY
from recipe.guards.updates import norm_of_gradients


def is_checked(step: int) -> bool:
    """What reads all weights or all gradients is done now and then."""
    return step in CHECKSUM_STEPS or step % CHECKSUM_STEPS[-1] == 0


@dataclass
class MeasuredStep:
    """What a step measured, on its way to the host; judged when the next one ends."""

    parameters: list[Measured]
    adam: OnItsWay | None
    casts: OnItsWay | None


class OptimizationWatch:
    """`parameters`: follows all of them. `gradients`: those of one parameter or two. `adam`: None where `no_adam` says
    why its arithmetic is not looked at."""

    def __init__(self, trainer: Trainer, model: torch.nn.Module, optimizer, is_compiled: bool):
        args, inner = trainer.args, getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        is_first_run = trainer.state.global_step == 0 and not getattr(inner, "state", None)
        is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        # As the optimizer got them: FSDP and DeepSpeed put others into the model.
        named = trainer.model_wrapped.named_parameters()
        self.named = [(name, p) for name, p in named if p.is_floating_point() and p.numel()]
        self.parameters = ParameterWatch(self.named, optimizer_name(optimizer), is_first_run, optimizer.param_groups)
        self.casts = CastWatch(() if is_sharded or is_compiled else model.modules())
        self.gradients: list[GradientWatch] = []
        if not is_sharded and "layerwise" not in args.optim:  # those step within backward
            are_summed = args.gradient_accumulation_steps > 1 and args.world_size == 1
            of_matrices = (False, True) if are_summed else (False,)
            self.gradients = [GradientWatch(self.named, each) for each in of_matrices]
        self.adam, self.no_adam = None, None
        try:
            if trainer.accelerator.scaler is not None:
                raise NotApplicable("fp16 loss scaling, which some optimizers undo themselves")
            self.adam = AdamWatch(inner, self.named)
        except NotApplicable as reason:
            self.no_adam = reason

    def close(self) -> None:
        for held in filter(None, (self.adam, *self.gradients)):
            held.close()

    @contextmanager
    def hearing(self, step: int) -> Iterator[None]:
        """A micro-batch of the training, not those of probes. `step`: optimizer steps before it."""
        for each in self.gradients:
            each.is_listening = not each.of_matrices or step % LISTEN_EVERY == 0
        try:
            with self.casts.listening():
                yield
        finally:
            for each in self.gradients:
                each.is_listening = False

    def before_clip(self) -> None:
        for each in self.gradients:
            each.before_clip()

    def clipped_norm(self, step: int) -> torch.Tensor | None:
        """Of all gradients, after clipping; None where it is not looked at."""
        return norm_of_gradients(self.parameters.training) if self.gradients and is_checked(step + 1) else None

    def before_step(self, num_micro_batches: int, step: int, rate: float) -> list[torch.Tensor | None]:
        """What `GradientWatch.take` gives, of each."""
        self.parameters.before_step(rate)
        return [each.take(num_micro_batches, step) for each in self.gradients]

    def after_step(self, step: int, rate: float) -> None:
        self.parameters.after_step(rate)
        for each in self.gradients:
            each.after_step(step)

    def take(self) -> MeasuredStep:
        return MeasuredStep(self.parameters.take(), self.adam and self.adam.take(), self.casts.take())

    def judge(self, measured: MeasuredStep, *where: int) -> list[Judgment]:
        """`where`: step and tokens seen of what `take` gave."""
        judged = self.parameters.judge(measured.parameters, *where)
        if measured.adam is not None:
            judged.append(("optimizer_off", self.adam.judge(measured.adam, *where)))
        if measured.casts is not None:
            judged.append(("lost_updates", check_casts(*where, float(measured.casts.read()))))
        return judged
