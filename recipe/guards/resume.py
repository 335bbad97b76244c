"""Model and optimizer after a resume, against those that were saved."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from recipe.guards.guard import PROBE, CannotJudge, Finding, Guard, NotApplicable, Verdict
from recipe.guards.run import Parameters


class Saved(NamedTuple):
    """`loss`: of the pinned batch. `states`: parameters for which the optimizer keeps a state. `steps`: those that it
    has counted itself, as Adam does. `moments`: `norms_of_moments`. What is None was not kept and is not judged."""

    loss: float | None = None
    states: int | None = None
    steps: int | None = None
    moments: np.ndarray | None = None


class ResumeJump(Guard):
    """After resuming, the model or the optimizer is not the one that was saved.

    When: before the first step after a resume.
    Measured: two pinned rows in eval mode give the saved loss to 1e-3 (bf16 and fp16: 1e-2), else an error. As many
        parameters have an optimizer state, and an optimizer that counts its steps has counted as many, else a warning:
        Trainer starts the optimizer fresh, without a message, where `optimizer.pt` or `scheduler.pt` is missing. The
        norms of each parameter's first moment are those that were saved, to 1 %; a warning where two parameters and
        more have each other's.
    Try: resuming from a complete checkpoint; an optimizer that is given its parameters in one order, no set of them.
    Cannot see: FSDP and DeepSpeed, checkpoints without the guards' state, other changes of the optimizer's state.
    """

    ids = {"resume_jump": "After resuming, the loss did not continue where it had stopped."}
    explained_by = ("resume_replay", "untied_weights", "learning_rate_off")
    on_every_rank = True
    of_one_resume = ("resume_jump",)
    # Of one pinned batch in eval mode, in nats. Rounding alone: fp32 sums in another order move a loss by 1e-6 to
    # 1e-5; bf16 logits are good to 2^-8 of themselves, 1e-3 after the mean over a batch. Ten times that and more is no
    # rounding.
    TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 1e-2, torch.float16: 1e-2}

    # Of a moment's norm. Derived: a state that is kept in bf16 is rounded by 0.4 %.
    MOMENTS = 0.01

    def setup(self, run) -> None:
        self.run, self._saved = run, None

    def save(self) -> dict:
        try:
            return self._now()._asdict()
        except CannotJudge:
            return self._now(has_loss=False)._asdict()

    def load(self, state: dict) -> None:
        if not all(value is None or isinstance(value, (int, float, np.ndarray)) for value in state.values()):
            raise ValueError("no numbers")
        self._saved = Saved(**state)

    def _now(self, has_loss: bool = True) -> Saved:
        loss = next(iter(self.run.pinned.losses(1)), None) if has_loss else None
        optimizer = self.run.optimizer
        moments = None if self.run.is_sharded else norms_of_moments(optimizer, self.run.named_parameters)
        return Saved(loss, count_optimizer_states(optimizer), count_optimizer_steps(optimizer), moments)

    def inspect(self, run) -> Iterator[Verdict]:
        if not run.step:
            raise NotApplicable("not resumed")
        if run.is_sharded:
            raise CannotJudge("the weights are sharded over ranks")
        if not run.is_restored or self._saved is None:
            raise CannotJudge("the checkpoint holds no state of the guards")
        yield self.judge(self._saved, self._now(), run.dtype) or self.clear(check=PROBE)

    @classmethod
    def judge(cls, before: Saved, after: Saved, dtype: torch.dtype) -> Finding | None:
        """`dtype`: in which the losses were computed."""
        evidence = {"loss_before": before.loss, "loss_after": after.loss}
        evidence |= {"states_before": before.states, "states_after": after.states}
        known = {"action": "resume from a complete checkpoint", "evidence": evidence, "check": PROBE}
        are_losses = before.loss is not None and after.loss is not None and math.isfinite(before.loss)
        if are_losses and not abs(after.loss - before.loss) <= cls.TOLERANCES[dtype]:  # a NaN is a jump
            found = f"loss of the pinned batch {after.loss:.4f}, {after.loss - before.loss:+.4f}"
            expected = f"{before.loss:.4f} (to {cls.TOLERANCES[dtype]})"
            causes = ("weights were not loaded (or are missing in the checkpoint)", "weights untied on load")
            return cls.finding("error", found, expected, causes, **known)
        if None not in (before.steps, after.steps) and after.steps != before.steps and after.states:
            found, expected = f"an optimizer that has counted {after.steps} steps", f"{before.steps} (as when saved)"
            causes = ("step count not restored (Adam corrects its averages by it)",)
            return cls.finding("warning", found, expected, causes, **known)
        if moved := cls.moved(before.moments, after.moments):
            found, expected = f"{moved} parameters have others' moments", "none"
            causes = ("its parameters came in another order",)
            return cls.finding("warning", found, expected, causes, **known)
        if before.states is None or after.states is None or after.states >= before.states:
            return None
        found, expected = f"optimizer state for {after.states} parameters", f"{before.states} (as when saved)"
        causes = ("optimizer.pt is missing (or scheduler.pt): Trainer then starts both fresh, without a message",)
        return cls.finding("warning", found, expected, causes, **known)

    @classmethod
    def moved(cls, before: np.ndarray | None, after: np.ndarray | None) -> int:
        """Parameters whose moments have others' norms, where all norms together are as before."""
        if before is None or after is None or before.shape != after.shape or not np.isfinite([before, after]).all():
            return 0
        is_close = np.isclose(np.sort(before), np.sort(after), rtol=cls.MOMENTS, atol=0)
        return int((~np.isclose(before, after, rtol=cls.MOMENTS, atol=0)).sum()) if is_close.all() else 0


def norms_of_moments(optimizer, parameters: Parameters) -> np.ndarray:
    """fp64 `[parameters]`: norms of what the optimizer keeps first of each parameter in the parameter's shape, such as
    Adam's first moment; 0 where it keeps nothing."""
    norms = np.zeros(len(parameters))
    for number, (_, parameter) in enumerate(parameters):
        state = optimizer.state.get(parameter)
        kept = [each for each in state.values() if is_moment(each, parameter)] if isinstance(state, dict) else []
        norms[number] = kept[0].double().norm().item() if kept else 0.0
    return norms


def is_moment(value, parameter: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape == parameter.shape != ()


def count_optimizer_steps(optimizer) -> int | None:
    counts = [state["step"] for state in optimizer.state.values() if isinstance(state, dict) and "step" in state]
    return int(counts[0]) if counts else None


def count_optimizer_states(optimizer) -> int:
    """Plain SGD keeps none."""
    return sum(bool(state) for state in optimizer.state.values())
