"""Updates that do not arrive: rounded away, too small, overwritten, or not used by the forward pass."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch.nn import functional as F

from recipe.guards import sandbox, updates
from recipe.guards.guard import CannotJudge, Finding, Guard, NotApplicable, Verdict, contained
from recipe.guards.policy import ReferenceWatch, judge_best, judge_reference
from recipe.guards.run import LOW_PRECISION, Parameters, plain_rate
from recipe.guards.updates import FIRST_STEPS, MOVING_RATE, SMALL_UPDATE


class LostUpdates(Guard):
    """Updates are rounded away, overwritten, not used, or far smaller than the learning rate asks for.

    When: every 64 steps for half-precision weights; after the first 8 steps of a new run with a rate above 1e-6 for
        fp32 weights under Adam; at every step for casts; after each save and evaluation for writes.
    Measured: half-precision weights under Adam, Lamb, Lion or Adafactor: of at least 1,000 sampled elements that have
        a gradient and that the rates of 64 steps should move by 5 spacings, less than 0.4 moved (plain bf16 moves 6 to
        24 %; Kahan summation, stochastic rounding, fp32 copies 65 to 99 %). Fp32 weights: in the first 8 steps 0.6 of
        the elements with a gradient did not move against it by 0.05 of the rate (it says where half of these moved
        along it: `maximize`). Writes: while the run was saved or evaluated one small parameter changed, and the loss
        of the run's first two rows, in eval mode, rose by 0.05; merging adapters keeps it. Casts, where autocast is on
        before the micro-batch: 8 columns of the first fp32 linear layer as the forward pass used them differ from the
        weight in over 1 % of the elements: an error. A reference model (TRL's `ref_model`) that was the policy itself
        after each of 4 steps. Before step 1: the checkpoint with the largest loss or perplexity is to be loaded at the
        end.
    Try: loading the model in float32 and training with `bf16=True` (autocast). In fp32: `adam_epsilon`, and what
        writes to the weights. Writes: putting the weights back after averaged ones were saved or evaluated. Casts:
        leaving the autocast context after each step, or `torch.clear_autocast_cache()`.
    Cannot see: rates so small that no element should move; fp32 weights after the first steps; writes at other times,
        and weights put back after each step; small steps of SGD and others; stale casts in compiled or sharded models
        and in other layers than `torch.nn.Linear`.
    """

    ids = {"lost_updates": "Updates are rounded away, overwritten, not used, or too small for the learning rate."}
    taps = ("gradients",)
    on_every_rank = True  # a loss of the user's own may gather over ranks
    # Optimizers whose steps are of the size of their rate: how far they should move a weight is known.
    RATE_SIZED = ("adam", "lion", "adafactor", "lamb")
    # Of half-precision weights. Chosen, not measured: long enough for rates of a usual run to add up to spacings of
    # bf16 weights.
    LOST_STEPS = 64
    # Measured (AdamW, rates 1e-6 to 1e-3, weights of sd 0.02 to 1): where rates are under a spacing plain bf16 moves 6
    # to 24 % of the elements judged; Kahan summation, stochastic rounding and fp32 copies 65 to 99 %. Of 1,000
    # elements a share is known to 0.016.
    LOST_SHARE, LOST_ELEMENTS = 0.4, 1000
    # Of the elements with a gradient, in the first steps. Measured: up to 53 % where gradients are noise (a preference
    # between rows that differ by chance); 64 to 76 % with seeded faults.
    SMALL_SHARE = 0.6
    # Nats by which a write raises the loss of the run's first rows. Chosen, not measured: merging adapters rounds.
    WRITTEN_RISE = 0.05
    # Columns of a weight whose casts are compared, and the share of these elements that are not the weight's. Derived:
    # casts are exact but for what a device flushes to zero; in fp16 that is 0.24 % of weights of sd 0.02.
    CAST_COLUMNS, STALE_SHARE = 8, 0.01

    def setup(self, run) -> None:
        is_known = any(name in run.optimizer_name.lower() for name in self.RATE_SIZED)
        training = [(name, p) for name, p in run.named_parameters if p.requires_grad]
        self.low = [(name, p) for name, p in training if p.dtype in LOW_PRECISION and is_known]
        groups = {id(p): group for group in run.optimizer.param_groups for p in group["params"]} if run.is_adam else {}
        self.full = [(name, p) for name, p in training if p.dtype not in LOW_PRECISION and id(p) in groups]
        self.groups = {name: groups[id(p)] for name, p in self.full}
        modules = () if run.is_sharded or run.is_compiled else run.model.modules()
        self.linear = next((module for module in modules if _is_cast(module)), None)
        self._device_type = self.linear.weight.device.type if self.linear is not None else ""
        self._hook = None
        # Samples of weights and gradients: before the step, and at the start of the window
        self._before: tuple[updates.Samples, updates.Samples] | None = None
        self._window: tuple[updates.Samples, updates.Samples] | None = None
        self._payload: dict = {}
        self._loss_before: float | None = None  # of the run's first rows, before a save or an evaluation
        self.run = run
        # Later Adam's steps are smaller, as its averages are of older and larger gradients.
        is_new = run.step == 0 and not getattr(run.inner_optimizer, "state", None)
        self.state = {
            "num_steps": 0 if is_new and self.full else FIRST_STEPS + 1,  # measured; one more when they have been sent
            "small": torch.zeros(3, dtype=torch.int64, device=self.full[0][1].device if self.full else None),
            "rates": [],  # of the window
        }
        self.reference = ReferenceWatch(run)

    def inspect(self, run) -> Iterator[Verdict]:
        if finding := judge_best(self.finding, run.args):
            yield finding
        if not self.low:
            raise NotApplicable("no half-precision weights with steps of known size")

    # --- casts

    def before_micro_step(self, run) -> None:
        if self._loss_before is not None:
            self._payload["rise"] = (self._pinned_loss() or math.nan) - self._loss_before
            self._loss_before = None
        if self._device_type and torch.is_autocast_enabled(self._device_type):
            self._hook = self.linear.register_forward_hook(self._compare_cast)

    def after_micro_step(self, run, loss) -> Iterator[Verdict]:
        self.close()
        return iter(())

    def close(self) -> None:
        if self._hook is not None:
            self._hook.remove()

    @contained
    def _compare_cast(self, module, inputs, output) -> None:
        """The layer has just been computed, so its cast is in autocast's cache if it is kept at all: asking for it
        again adds nothing. A row of the identity gives a column of the weight, exactly."""
        weight = module.weight
        if not torch.is_grad_enabled() or not torch.is_autocast_enabled(weight.device.type):
            return
        identity = torch.eye(min(self.CAST_COLUMNS, weight.shape[1]), weight.shape[1], device=weight.device)
        used = F.linear(identity, weight).detach()
        now = weight.detach()[:, : len(identity)].t().to(used.dtype)
        self._payload["stale"] = ((used != now) & used.isfinite()).float().mean()

    # --- the optimizer's step

    def before_step(self, local) -> None:
        if (followed := self.reference.before_step()) is not None:
            self._payload["followed"] = followed
        if self.state["num_steps"] == FIRST_STEPS:
            self._payload["small"] = self.state["small"]
            self.state["num_steps"] += 1
        elif self.state["num_steps"] < FIRST_STEPS and local.learning_rate > MOVING_RATE:
            self._before = self._sample(local, self.full)
        if self.low:
            self._window = self._window or self._sample(local, self.low)
            self.state["rates"].append(local.learning_rate)

    def _sample(self, local, parameters: Parameters) -> tuple[updates.Samples, updates.Samples]:
        return updates.sample_once(local.weights_before, parameters), updates.sample_gradients(parameters)

    def after_step(self, local) -> None:
        if self._before is not None:
            (before, gradients), after = self._before, updates.sample_once(local.weights_after, self.full)
            rates = {name: plain_rate(group["lr"]) for name, group in self.groups.items()}
            self.state["small"] = self.state["small"] + updates.count_small(before, after, gradients, rates)
            self.state["num_steps"] += 1
            self._before = None
        rates = self.state["rates"]
        if len(rates) == self.LOST_STEPS:
            self._payload["moved"] = updates.count_moved(*self._window, self.low, sum(rates))
            self._payload["rate"] = max(rates)
            self._window, self.state["rates"] = None, []

    def _pinned_loss(self) -> float | None:
        with contextlib.suppress(CannotJudge), sandbox.eagerly(self.run.trainer):
            return next(iter(self.run.pinned.losses(1)), None)
        return None

    def measure(self, local) -> dict | None:
        control = self.run.trainer.control
        self._loss_before = self._pinned_loss() if control.should_save or control.should_evaluate else None
        payload, self._payload = self._payload, {}
        return payload or None

    def observe(self, step) -> Iterator[Verdict]:
        measured = step.payload(self) or {}
        if "rise" in measured and step.was_saved:
            followed = [norms for norms in step.gradients if not norms.of_matrices and not step.run.is_loss_scaled]
            if finding := self.judge_writes([norms.changed for norms in followed], measured["rise"]):
                yield finding
        if "followed" in measured:
            yield judge_reference(self.finding, measured["followed"]) or self.clear(check="reference")
        if "small" in measured:
            yield self.judge_small(*measured["small"]) or self.clear(check="small")
        if "moved" in measured:
            yield self.judge_moved(*measured["moved"], measured["rate"]) or self.clear(check="weights")
        if "stale" in measured:
            yield self.judge_casts(measured["stale"]) or self.clear(check="casts")

    # --- state

    def save(self) -> dict:
        weights, gradients = map(updates.to_flat, self._window or ({}, {}))
        arrays = {"small": self.state["small"], "weights": weights, "gradients": gradients != 0}
        return {**self.state, **{name: values.cpu().numpy() for name, values in arrays.items()}}

    def load(self, state: dict) -> None:
        weights, gradients = (torch.from_numpy(state[name]) for name in ("weights", "gradients"))
        small = torch.from_numpy(state["small"]).to(self.state["small"]).reshape(self.state["small"].shape)
        super().load({**{name: state[name] for name in self.state}, "small": small})
        if state["rates"]:
            self._window = updates.from_flat(weights, self.low), updates.from_flat(gradients, self.low)

    # --- judging

    @classmethod
    def judge_moved(cls, moved: int, judged: int, learning_rate: float) -> Finding | None:
        """`moved`, `judged`: of `count_moved`. Few can be judged at learning rates as small as in a warmup."""
        if judged < cls.LOST_ELEMENTS or moved >= cls.LOST_SHARE * judged:
            return None
        return cls.finding(
            "warning",
            found=f"{moved / judged:.0%} of half-precision weights moved in {cls.LOST_STEPS} steps",
            expected=f"over {cls.LOST_SHARE:.0%}",
            causes=("no fp32 copy of weights (in bf16 or fp16)", "the optimizer holds other tensors (than the model)"),
            action="load the model in float32 and train with bf16=True, or use Kahan summation or stochastic rounding",
            evidence={"moved": moved, "judged": judged, "learning_rate": learning_rate},
            check="weights",
        )

    @classmethod
    def judge_small(cls, small: int, judged: int, uphill: int = 0) -> Finding | None:
        """In a run's first steps Adam moves a weight by about its rate. Counts: of `count_small`."""
        if small <= cls.SMALL_SHARE * judged:
            return None
        found = f"{small / judged:.0%} of elements moved under {SMALL_UPDATE:.0%} of the rate"
        causes = ("Adam's epsilon is too large (larger than the gradients)", "weights are rounded or overwritten")
        action = "compare the size of the gradients with adam_epsilon; look for what writes to the weights"
        if uphill > small / 2:
            found = f"{uphill / judged:.0%} of elements moved up the gradient"
            causes = ("maximize=True in the optimizer", "gradient or update has the wrong sign")
            action = "training makes the loss worse: drop maximize, or look for what turns the sign of gradients"
        return cls.finding(
            "warning",
            found=found,
            expected=f"under {cls.SMALL_SHARE:.0%} (in Adam's first steps)",
            causes=causes,
            action=action,
            evidence={"small": small, "judged": judged, "uphill": uphill},
            check="small",
        )

    @classmethod
    def judge_writes(cls, changes: list[float], rise: float) -> Finding | None:
        """While the run was saved or evaluated: `changes` of the followed parameter, if any, and by what the loss of
        the run's first rows rose. Who averages or merges on purpose does not make it worse."""
        if not any(change > 0 for change in changes) or not rise > cls.WRITTEN_RISE:
            return None
        return cls.finding(
            "warning",
            found=f"weights changed by a save or evaluation (loss {rise:+.2f})",
            expected="weights put back",
            causes=("averaged weights left in (or older ones)",),
            action="look for what writes to the weights when the run is saved or evaluated",
            evidence={"changes": changes, "rise": rise},
            check="writes",
        )

    @classmethod
    def judge_casts(cls, stale: float) -> Finding | None:
        """`stale`: share of the elements whose cast, as the forward pass used it, is not that of the weight."""
        if stale <= cls.STALE_SHARE:
            return None
        return cls.finding(
            "error",
            found=f"{stale:.0%} of a layer's weights are stale (as before the last updates)",
            expected="as they are now",
            causes=("autocast stays open (over several steps)",),
            action="leave the autocast context after each step, or use bf16=True; else torch.clear_autocast_cache()",
            evidence={"stale": stale},
            check="casts",
        )


def _is_cast(module: torch.nn.Module) -> bool:
    is_plain = type(module) is torch.nn.Linear and type(module.weight) is torch.nn.Parameter
    return is_plain and module.weight.requires_grad and module.weight.dtype == torch.float32
