"""RegressionCallback: feeds the guards from any Trainer, logs what they find, acts on it, keeps their history.

    trainer.add_callback(RegressionCallback())

Callbacks are given no trainer. This one finds it once, in `on_train_begin`: it is the `self` of the first calling
frame that is a Trainer holding this callback. It then listens at two of that instance's methods, `training_step` (the
loss of every micro-batch, and the first micro-batch for the probes) and `accelerator.clip_grad_norm_` (the norm before
clipping), and lets go of both at the end.
"""

import logging
import sys
import time
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback

from recipe.guards.finding import FINDING_IDS, Finding
from recipe.guards.probes import CannotJudge, check_loss_targets, recover_loss_targets
from recipe.guards.records import StepRecord, append_line, keep_until, read_lines
from recipe.guards.trajectory import Reference, check_grad_norm, check_reference, find_reference
from recipe.guards.vitals import check_finite

logger = logging.getLogger("recipe.guards")

PROBE_IDS = ("missing_label_shift", "double_label_shift", "wrong_loss_target")
ALARMS = ("warning", "error")
LOG_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
HISTORY = 1000  # steps kept for windows


class RegressionCallback(TrainerCallback):
    """Watches a run. Works on any `transformers.Trainer`; needs nothing else of the recipe.

    `trajectory`: `auto`, `none` or the path of a reference. `on_regression`: `warn`, or `stop` (save a checkpoint and
    end the training at the first warning or error). `disabled_guards`: finding ids that stay silent. `facts`: what the
    trainer cannot tell about the run and a reference may ask for, such as `{"source": "docstrings"}`. Writes
    `steps.jsonl`, `evals.jsonl` and `findings.jsonl` into `output_dir`.

    After training: `findings`, `judged` (ids that had enough to judge), `cannot_judge` (id -> reason), `stopped_by`.
    """

    def __init__(
        self, trajectory: str = "auto", on_regression: str = "warn", disabled_guards=(), facts: dict | None = None
    ):
        unknown = sorted(set(disabled_guards) - set(FINDING_IDS))
        if unknown:
            raise ValueError(
                f"disabled_guards: no guard is called {', '.join(unknown)}; known: {', '.join(FINDING_IDS)}"
            )
        if on_regression not in ("warn", "stop"):
            raise ValueError(f"on_regression is warn or stop, not {on_regression!r}")
        self.trajectory = trajectory
        self.on_regression = on_regression
        self.disabled = frozenset(disabled_guards)
        self.facts = dict(facts or {})
        self.findings: list[Finding] = []
        self.judged: set[str] = set()
        self.cannot_judge: dict[str, str] = {}
        self.stopped_by: Finding | None = None
        self.reference: Reference | None = None
        self.history: list[StepRecord] = []
        self._active: dict[str, Finding] = {}
        self._trainer: Trainer | None = None
        self._is_first_micro_step = True
        self._pending: tuple[dict, torch.Tensor, torch.cuda.Event | None] | None = None
        self._is_stop_asked = False
        self._start_step()

    def ask_to_stop(self) -> None:
        """Save a checkpoint and end the training after the current step (on several ranks the one after, when all have
        heard of it)."""
        self._is_stop_asked = True

    # --- Trainer's events

    def on_train_begin(self, args, state, control, **kwargs):
        _make_visible()
        self._let_go()  # of a training that ended with an exception
        self._is_first_micro_step = True
        self.open_files(args, state)
        self._last_time = time.perf_counter()
        self._trainer = _find_trainer(self)
        if self._trainer is None:
            self._give_up(
                (*PROBE_IDS, "loss_off_reference", "loss_not_finite"), "no Trainer among the callers of on_train_begin"
            )
            return
        self._listen()

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self._learning_rate = optimizer.param_groups[0]["lr"]

    def on_step_end(self, args, state, control, **kwargs):
        self._flush(control)
        if self._loss is not None:
            self._pending = self._record_step(state.global_step)
        if self._is_stop_asked and args.world_size == 1:
            _stop(control)
        self._start_step()

    def on_save(self, args, state, control, **kwargs):
        self._flush(control)  # a run killed after this checkpoint must find its last step's record
        self._last_time = time.perf_counter()  # saving and evaluating are not the next step's time

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self._last_time = time.perf_counter()
        if self.is_main and metrics:
            values = {name: value for name, value in metrics.items() if name.startswith("eval_")}
            append_line(
                self.output_dir / "evals.jsonl", {"step": state.global_step, "tokens_seen": self.tokens_seen, **values}
            )

    def on_train_end(self, args, state, control, **kwargs):
        self._flush(control)
        self._let_go()

    # --- listening

    def _listen(self) -> None:
        trainer = self._trainer
        training_step, clip = trainer.training_step, trainer.accelerator.clip_grad_norm_

        def listening_training_step(model, inputs, num_items_in_batch=None, **kwargs):
            if self._is_first_micro_step:
                self._is_first_micro_step = False
                self._learn_facts(inputs)
                self._probe(inputs, num_items_in_batch)
            loss = training_step(model, inputs, num_items_in_batch, **kwargs)
            self._loss = loss if self._loss is None else self._loss + loss
            self._step_tokens += inputs["input_ids"].numel() if "input_ids" in inputs else 0
            return loss

        def listening_clip(*arguments, **kwargs):
            norm = clip(*arguments, **kwargs)
            self._grad_norm = norm
            return norm

        trainer.training_step = listening_training_step
        trainer.accelerator.clip_grad_norm_ = listening_clip

    def _let_go(self) -> None:
        if self._trainer is not None:
            del self._trainer.training_step, self._trainer.accelerator.clip_grad_norm_
            self._trainer = None

    def _learn_facts(self, inputs: dict) -> None:
        trainer, args = self._trainer, self._trainer.args
        rows, block_size = inputs["input_ids"].shape if "input_ids" in inputs else (0, 0)
        model = trainer.accelerator.unwrap_model(trainer.model)
        self.facts = {
            "vocab_size": getattr(model.config, "vocab_size", None),
            "block_size": block_size,
            "tokens_per_step": rows * block_size * args.gradient_accumulation_steps * args.world_size,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "learning_rate": args.learning_rate,
            **self.facts,
        }
        if not self.history:  # resumed where no records lie: the steps before had the same size
            self.tokens_seen = trainer.state.global_step * self.facts["tokens_per_step"]
        self.reference, reason = find_reference(self.trajectory, self.facts)
        if self.reference is None:
            self._give_up(("loss_off_reference",), reason)

    def _probe(self, inputs: dict, num_items_in_batch) -> None:
        """Before the first optimizer step, on its first micro-batch, through the trainer's own `compute_loss` and the
        eager model."""
        try:
            finding = self._recover_and_check(inputs, num_items_in_batch)
        except CannotJudge as reason:
            self._give_up(PROBE_IDS, str(reason))
        except (
            Exception
        ) as error:  # a probe never ends a run: what is wrong with the loss itself, the step that follows will say
            self._give_up(PROBE_IDS, f"the probe failed with {type(error).__name__}: {error}")
        else:
            self.judged.update(PROBE_IDS)
            if finding is not None:
                self.report(finding, self._trainer.control)

    def _recover_and_check(self, inputs: dict, num_items_in_batch) -> Finding | None:
        trainer, model = (
            self._trainer,
            self._trainer.accelerator.unwrap_model(self._trainer.model, keep_torch_compile=False),
        )
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise CannotJudge("the weights are sharded over ranks, so the unwrapped model cannot run by itself")
        prepared = trainer._prepare_inputs(dict(inputs))
        if "input_ids" not in prepared:
            raise CannotJudge("the batch has no input_ids")

        def compute_loss():
            model.train()
            with trainer.compute_loss_context_manager():
                return trainer.compute_loss(model, dict(prepared), num_items_in_batch=num_items_in_batch)

        targets = recover_loss_targets(model, compute_loss).targets
        return check_loss_targets(prepared["input_ids"], targets, trainer.state.global_step, self.tokens_seen)

    # --- one step

    def _start_step(self) -> None:
        self._loss: torch.Tensor | None = None
        self._grad_norm = None
        self._learning_rate = 0.0
        self._step_tokens = 0

    def _record_step(self, step: int) -> tuple[dict, torch.Tensor, torch.cuda.Event | None]:
        """The step's numbers, those on the device on their way to the host; they are read at the end of the next
        step."""
        world_size = self._trainer.args.world_size
        norm = self._grad_norm if self._grad_norm is not None else float("nan")
        loss = self._loss.detach().float().reshape(())
        norm = torch.as_tensor(norm, dtype=torch.float32, device=loss.device).reshape(())
        values = torch.stack([loss, norm, torch.full_like(loss, float(self._is_stop_asked))])
        if world_size > 1:
            torch.distributed.all_reduce(values)  # the norm is equal on all ranks, so its mean is itself
            values /= world_size
        self.tokens_seen += self._step_tokens * world_size
        now = time.perf_counter()
        record = {
            "step": step,
            "tokens_seen": self.tokens_seen,
            "learning_rate": self._learning_rate,
            "tokens_per_second": self._step_tokens * world_size / (now - self._last_time),
            "has_norm": self._grad_norm is not None,
        }
        self._last_time = now
        if not values.is_cuda:
            return record, values, None
        on_host = torch.empty(3, pin_memory=True).copy_(values, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return record, on_host, copied

    def _flush(self, control) -> None:
        if self._pending is None:
            return
        facts, values, copied = self._pending
        self._pending = None
        if copied is not None:
            copied.synchronize()  # a step old: done long ago
        loss, norm, stop_asked = values.tolist()
        if stop_asked:
            _stop(control)
        has_norm = facts.pop("has_norm")
        record: StepRecord = {**facts, "loss": loss, "grad_norm": norm if has_norm else None}
        self.history = [*self.history[1 - HISTORY :], record]
        if self.is_main:
            append_line(self.output_dir / "steps.jsonl", record)
        self._judge(control)

    def _judge(self, control) -> None:
        now = self.history[-1]
        self._update(
            "loss_not_finite", check_finite(now["step"], now["tokens_seen"], now["loss"], now["grad_norm"]), control
        )
        if self.reference is None:
            return
        window = self.history[-self.reference.window :]
        steps, tokens, losses = ([record[key] for record in window] for key in ("step", "tokens_seen", "loss"))
        if len(window) == self.reference.window:
            self._update("loss_off_reference", check_reference(self.reference, steps, tokens, losses), control)
        norms = [record["grad_norm"] for record in window]
        if self.reference.grad_norm_phases and None not in norms:
            self._update("grad_norm_off", check_grad_norm(self.reference, steps, tokens, norms), control)

    # --- findings

    def _update(self, guard: str, finding: Finding | None, control) -> None:
        """Report at an onset, say once when it is over."""
        self.judged.add(guard)
        if finding is not None and guard not in self._active:
            self.report(finding, control)
        elif finding is None and guard in self._active:
            onset = self._active.pop(guard)
            if self.is_main:
                logger.info("%s | step %d | recovered, since step %d", guard, self.history[-1]["step"], onset.step)

    def report(self, finding: Finding, control=None) -> None:
        """Log a finding, write it down, and stop the training if that is asked for. Silent for disabled guards."""
        if finding.id in self.disabled:
            return
        self._active[finding.id] = finding
        self.findings.append(finding)
        if self.is_main:
            logger.log(LOG_LEVELS[finding.severity], finding.log_line())
            with (self.output_dir / "findings.jsonl").open("a", encoding="utf-8") as file:
                file.write(finding.to_json() + "\n")
        if self.on_regression == "stop" and finding.severity in ALARMS and self.stopped_by is None:
            self.stopped_by = finding
            self.ask_to_stop()
            if control is not None and self._trainer is not None and self._trainer.args.world_size == 1:
                _stop(control)

    def _give_up(self, guards, reason: str) -> None:
        for guard in guards:
            self.cannot_judge[guard] = reason
        if self.is_main:
            logger.info("cannot judge %s: %s", ", ".join(guards), reason)

    def open_files(self, args, state) -> None:
        """A new run starts new files; a resumed one keeps what was written up to its step, and its history with it."""
        self.output_dir, self.is_main, step = Path(args.output_dir), state.is_world_process_zero, state.global_step
        until = step if step else -1
        self.history = [record for record in read_lines(self.output_dir / "steps.jsonl") if record["step"] <= until][
            -HISTORY:
        ]
        self.tokens_seen = self.history[-1]["tokens_seen"] if self.history else 0
        earlier = [record for record in read_lines(self.output_dir / "findings.jsonl") if record["step"] <= until]
        self.findings = [Finding(**record) for record in earlier]  # a verdict is about the whole run
        if not self.is_main:
            return
        self.output_dir.mkdir(parents=True, exist_ok=True)
        for name in ("steps.jsonl", "evals.jsonl", "findings.jsonl"):
            keep_until(self.output_dir / name, until)
        (self.output_dir / "findings.jsonl").touch()


def _stop(control) -> None:
    control.should_save = True
    control.should_training_stop = True


def _find_trainer(callback: TrainerCallback) -> Trainer | None:
    frame = sys._getframe(1)
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, Trainer) and callback in candidate.callback_handler.callbacks:
            return candidate
        frame = frame.f_back
    return None


def _make_visible() -> None:
    """In a script that has not configured logging, print the guards' lines to stderr in the documented form."""
    if logging.getLogger().handlers or logger.handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s | %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
