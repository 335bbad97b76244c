"""RegressionCallback: feeds the guards from any Trainer, logs what they find, acts on it, keeps their state.

    trainer.add_callback(RegressionCallback())

How it reaches the Trainer is in `listener.py`. A step's numbers leave the device without waiting and are judged when
the next step ends, on rank 0; what other ranks hear is gathered there over the host's network.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Sized
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import distributed
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

from recipe.guards import preflight
from recipe.guards.batches import OnItsWay, TokensOnTheirWay, send_tokens
from recipe.guards.diagnosis import CURVES, explain
from recipe.guards.evaluation import EvaluationWatch
from recipe.guards.finding import FINDING_IDS, CannotJudge, Finding, NotApplicable
from recipe.guards.listener import POSITIONS, HeardRows, TargetListener, Wrapping, find_trainer, is_compiled
from recipe.guards.parameters import Measured, ParameterWatch
from recipe.guards.records import StepRecord, append_line, keep_until, read_lines
from recipe.guards.state import read_state, say_damaged, write_state
from recipe.guards.trajectory import Reference, find_reference
from recipe.guards.updates import (
    check_optimizer_groups,
    check_resume,
    check_tied,
    count_optimizer_states,
    parameter_checksums,
)
from recipe.guards.vitals import expected_learning_rates
from recipe.guards.watch import HISTORY, RunFacts, StepFacts, Watch

logger = logging.getLogger("recipe.guards")

ALARMS = ("warning", "error")
LOG_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
# A finding is over when its guard has been silent for so many judgments: a fault in some rows comes and goes.
PATIENCE = 20
OF_A_RESUME = ("resume_jump", "resume_replay")
# Of the state in a checkpoint
SAVED = ("pinned_loss", "optimizer_states", "learning_rate_agrees", "active", "judged_steps", "watch")
CHECKSUM_STEPS = (1, 10, 100)  # and every 100th after that
NEED_TRAINING = tuple(name for name in FINDING_IDS if name not in preflight.PROBES)


class PreflightDone(Exception):
    """Ends a training that was begun only to have its probes run."""


@dataclass
class PendingStep:
    """A step whose numbers are on their way to the host. `values`: the loss, the gradient norm, then the loss of each
    micro-batch."""

    record: dict
    has_norm: bool
    values: OnItsWay
    learning_rates: list[tuple[float | None, float | None]]
    tokens: list[TokensOnTheirWay] = field(default_factory=list)
    heard: list[tuple[HeardRows, OnItsWay]] = field(default_factory=list)
    checksums: OnItsWay | None = None
    measured: list[Measured] = field(default_factory=list)


class RegressionCallback(TrainerCallback):
    """Watches a run. Works on any `transformers.Trainer`; needs nothing else of the recipe.

    `trajectory`: `auto`, `none` or the path of a reference. `on_regression`: `warn`, or `stop` (save a checkpoint and
    end the training at the first warning or error). `disabled_guards`: finding ids that stay silent. `facts`: what the
    trainer cannot tell about the run and a reference may ask for, such as `{"source": "docstrings"}`. Writes
    `steps.jsonl`, `evals.jsonl` and `findings.jsonl` into `output_dir`, and its state into each checkpoint.

    After training, on the main process: `findings`, `judged` (ids that had enough to judge), `judged_steps` (id -> on
    how many steps), `cannot_judge` and `not_applicable` (id -> reason), `stopped_by`.
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
        self.only_check = False
        self.findings: list[Finding] = []
        self.judged_steps: Counter[str] = Counter()
        self.cannot_judge: dict[str, str] = {}
        self.not_applicable: dict[str, str] = {}
        self.stopped_by: Finding | None = None
        self.reference: Reference | None = None
        self.watch: Watch | None = None
        self.seconds = 0.0  # spent here, hooks in the backward pass apart
        self._history: list[StepRecord] = []
        self._trainer: Trainer | None = None
        self._wrapping = Wrapping()
        self._targets: TargetListener | None = None
        self._host_group = None
        self._parameters: ParameterWatch | None = None
        self.is_main = False  # until `open_files`: an evaluation before training is not written down
        self._reset()

    def _reset(self) -> None:
        self._active: dict[str, Finding] = {}
        self._silent: Counter[str] = Counter()
        self._is_first_micro_step = True
        self._pending: PendingStep | None = None
        self._to_explain: list[Finding] = []
        self._from_elsewhere: list[Finding] = []  # found on another rank than 0, to be told there
        self._stop_asked: str | None = None
        self._pinned: dict = {}
        self._saved: dict | None = None
        self._start_step()

    @property
    def judged(self) -> set[str]:
        return {name for name, count in self.judged_steps.items() if count}

    @property
    def history(self) -> list[StepRecord]:
        return self.watch.history if self.watch is not None else self._history

    def ask_to_stop(self) -> None:
        """Save a checkpoint and end the training after the current step (on several ranks the one after, when all have
        heard of it)."""
        self._stop_asked = self._stop_asked or "asked"

    # --- Trainer's events

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        _make_visible()
        self._let_go()  # of a training that ended with an exception
        self._reset()
        self._trainer, checkpoint = find_trainer(self)
        if self._trainer is not None and _first_callback(self._trainer) is not self:
            self._give_up(FINDING_IDS, "another RegressionCallback watches this Trainer")
            self._trainer, self.is_main = None, False  # two of them would write every line of the files twice
            return
        self.open_files(args, state)
        self._last_time = time.perf_counter()
        if self._trainer is None:
            self._give_up(FINDING_IDS, "no Trainer among the callers of on_train_begin")
            return
        if args.world_size > 1:
            self._host_group = distributed.new_group(backend="gloo")
        if state.global_step:
            self._load(Path(checkpoint or Path(args.output_dir) / f"checkpoint-{state.global_step}"))
        self._listen(optimizer)

    def on_epoch_begin(self, args, state, control, **kwargs):
        """A further epoch is a declared pass where epochs are what was asked for, or are known to be (sized data).
        An iterable that ends and is begun again until `max_steps` is not."""
        is_sized = self._trainer is not None and not isinstance(self._trainer.train_dataset, IterableDataset)
        if self.watch is not None and (is_sized or args.max_steps <= 0):
            self._flush(control)
            while self.watch.passes < int(state.epoch + 1e-6) + 1:
                self.watch.begin_pass(None)

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self._learning_rates = [(_plain(g["lr"]), _plain(g.get("initial_lr"))) for g in optimizer.param_groups]
        if self._parameters is not None:
            self._parameters.before_step(optimizer, self._learning_rates[0][0] or 0.0)

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self._parameters is not None:
            self._parameters.after_step(self._learning_rates[0][0] or 0.0)

    def on_step_end(self, args, state, control, **kwargs):
        start = time.perf_counter()
        self._flush(control)
        if self._losses:
            self._pending = self._record_step(state.global_step)
        if self._stop_asked and args.world_size == 1:
            _stop(control)
        self._start_step()
        self.seconds += time.perf_counter() - start

    def on_save(self, args, state, control, **kwargs):
        self._flush(control)  # a run killed after this checkpoint must find its last step's record
        if self._trainer is not None:
            self._save(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        self._last_time = time.perf_counter()  # saving and evaluating are not the next step's time

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self._last_time = time.perf_counter()
        self._flush(control)
        if metrics and self._trainer is not None:
            ranks = self._gather(self._evaluation.take())
            if self.is_main and self.watch is not None:
                for guard, finding in self.watch.judge_evaluation(ranks, metrics, state.global_step, self.tokens_seen):
                    self._update(guard, finding, control)
        if self.is_main and metrics:
            values = {name: value for name, value in metrics.items() if name.startswith("eval_")}
            append_line(
                self.output_dir / "evals.jsonl", {"step": state.global_step, "tokens_seen": self.tokens_seen, **values}
            )

    def on_train_end(self, args, state, control, **kwargs):
        self._flush(control)
        self._explain_waiting(control, {})
        self._let_go()

    # --- listening

    def _listen(self, optimizer) -> None:
        trainer = self._trainer
        self._model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        self._evaluation = EvaluationWatch()
        self._is_compiled = is_compiled(trainer)
        self._wrapping.replace(trainer, "training_step", self._listening_training_step)
        self._wrapping.replace(trainer, "prediction_step", self._evaluation.listening_prediction_step)
        self._wrapping.replace(trainer.accelerator, "clip_grad_norm_", self._listening_clip)
        try:
            self._targets = None if self._is_compiled else TargetListener(self._model)
        except CannotJudge as reason:
            logger.debug("targets are not listened to in passing: %s", reason)
        # As the optimizer got them: FSDP and DeepSpeed put others into the model.
        named = list(trainer.model_wrapped.named_parameters())
        self._parameters = ParameterWatch(named, type(getattr(optimizer, "optimizer", optimizer)).__name__)
        if not self._parameters.in_low_precision:
            self._give_up(["lost_updates"], NotApplicable("no half-precision weights with steps of known size"))
        if trainer.args.eval_strategy == "no" and not trainer.args.eval_on_start:
            self._give_up(["train_eval_gap", "train_eval_overlap"], NotApplicable("no evaluation during training"))
        where = (trainer.state.global_step, self.tokens_seen)
        is_new = self.facts.get("is_new_model", not getattr(self._model, "name_or_path", ""))
        self._try("frozen_parameters", lambda: check_optimizer_groups(*where, named, optimizer, is_new))
        self._try("untied_weights", lambda: check_tied(*where, self._model))

    def _let_go(self) -> None:
        self._wrapping.undo()
        if self._targets is not None:
            self._targets.close()
        if self._host_group is not None:
            distributed.destroy_process_group(self._host_group)
        self._targets = self._trainer = self._host_group = self._parameters = None

    def _listening_training_step(self, training_step):
        def listen(model, inputs, num_items_in_batch=None, *args, **kwargs):
            start = time.perf_counter()
            eager = self._before_micro_step(inputs, num_items_in_batch)
            tokens = send_tokens(inputs, self._pad_token_id)
            if self._targets is not None:
                self._targets.begin(inputs.get("input_ids"))
            self.seconds += time.perf_counter() - start
            loss = training_step(model, inputs, num_items_in_batch, *args, **kwargs)
            start = time.perf_counter()
            self._losses.append(loss.detach())
            if tokens is not None:
                self._tokens.append(tokens)
                self._step_tokens += inputs["input_ids"].numel()
            if self._targets is not None:
                self._heard += [(heard, OnItsWay(_as_one(heard))) for heard in self._targets.take()]
            if eager is not None:
                self._try(
                    "compiled_mismatch", lambda: preflight.compare_compiled(self._trainer, self._model, eager, loss)
                )
            self.seconds += time.perf_counter() - start
            return loss

        return listen

    def _listening_clip(self, clip):
        def listen(*arguments, **kwargs):
            norm = clip(*arguments, **kwargs)
            self._grad_norm = norm
            return norm

        return listen

    def _before_micro_step(self, inputs: dict, num_items_in_batch):
        """The probes, before the first micro-batch; again, where a curve wants to be explained. Gives back what the
        eager model makes of the first one, where the model is compiled."""
        trainer = self._trainer
        probe = (trainer, inputs, num_items_in_batch, self._wrapping.original(trainer, "training_step"))
        where = (trainer.state.global_step, self.tokens_seen)
        if not self._is_first_micro_step:
            if self._to_explain:
                self._explain_waiting(trainer.control, preflight.run_probes(*probe, *where, only_curve=True))
            return None
        self._is_first_micro_step = False
        self._learn_facts(inputs)
        self._check_resume(inputs)
        results = preflight.run_probes(*probe, *where, is_new_model=self.facts["is_new_model"])
        for guard, result in sorted(results.items(), key=_worst_first):
            self._conclude(guard, result)
        self._tell_main()
        if not self._is_compiled:
            self._give_up(["compiled_mismatch"], NotApplicable("the model is not compiled"))
        if self.only_check:
            raise PreflightDone
        if not self._is_compiled:
            return None
        return self._eager(inputs, num_items_in_batch)

    def _eager(self, inputs: dict, num_items_in_batch):
        try:
            return preflight.measure_eager(self._trainer, self._model, inputs, num_items_in_batch)
        except CannotJudge as reason:
            self._give_up(["compiled_mismatch"], str(reason))
        except Exception as error:  # such as re-entrant checkpointing, which refuses torch.autograd.grad
            self._give_up(["compiled_mismatch"], f"the probe failed with {type(error).__name__}: {error}")
        return None

    def _try(self, guard: str, check) -> None:
        try:
            result = check()
        except CannotJudge as reason:
            result = reason
        self._conclude(guard, result)

    def _conclude(self, guard: str, result: Finding | CannotJudge | None) -> None:
        if isinstance(result, CannotJudge):
            self._give_up([guard], result)
            return
        self.judged_steps[guard] += 1
        if result is not None and self._is_onset(result, self._active.get(guard)):
            self.report(result, self._trainer.control)

    # --- what does not change in a run

    def _learn_facts(self, inputs: dict) -> None:
        trainer, args, model = self._trainer, self._trainer.args, self._model
        rows, block_size = inputs["input_ids"].shape if "input_ids" in inputs else (0, 0)
        embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
        vocab_size = getattr(getattr(model, "config", None), "vocab_size", None)
        embedding_rows = embedding.weight.shape[0] if embedding is not None else vocab_size or 0
        self._embedding_rows = embedding_rows
        self.facts = {
            "vocab_size": vocab_size,
            "block_size": block_size,
            "tokens_per_step": rows * block_size * args.gradient_accumulation_steps * args.world_size,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "learning_rate": args.learning_rate,
            "is_new_model": not getattr(model, "name_or_path", ""),
            **self.facts,
        }
        if not self._history:  # resumed where no records lie: the steps before had the same size
            self.tokens_seen = trainer.state.global_step * self.facts["tokens_per_step"]
        self.reference, reason = find_reference(self.trajectory, self.facts)
        if self.reference is None:
            self._give_up(("loss_off_reference",), reason)
        if args.world_size == 1:
            self._give_up(["rank_divergence"], NotApplicable("one rank"))
        if not self.is_main:
            return
        self.watch = self._restored_watch(self._run_facts(inputs, rows, vocab_size or embedding_rows))
        self.watch.history = self._history

    def _restored_watch(self, facts: RunFacts) -> Watch:
        """With the checkpoint's memory, if there is one."""
        watch, step = Watch(facts, self.reference), self._trainer.state.global_step
        if self._saved is not None:
            numbers, arrays = self._saved
            try:
                watch.restore(numbers["watch"], arrays)
                watch.ledger.mark_resume(step)
                return watch
            except (KeyError, IndexError, ValueError, TypeError) as error:
                say_damaged(self._checkpoint, error)
                self._saved, watch = None, Watch(facts, self.reference)
        if step:
            watch.envelope.stop("the model was trained before on tokens that were not counted")
        return watch

    def _run_facts(self, inputs: dict, rows: int, vocab_size: int) -> RunFacts:
        trainer, args = self._trainer, self._trainer.args
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        initial = {_plain(group.get("initial_lr")) for group in trainer.optimizer.param_groups}
        agrees = self._saved[0]["learning_rate_agrees"] if self._saved else args.learning_rate in initial
        self._learning_rate_agrees = agrees
        batch = trainer._train_batch_size or args.train_batch_size
        is_padding_free = rows == 1 and batch > 1 and "position_ids" in inputs
        return RunFacts(
            vocab_size=vocab_size,
            embedding_rows=self._embedding_rows,
            eos_token_ids=preflight.eos_token_ids_of(self._model, trainer.processing_class),
            world_size=args.world_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            num_workers=args.dataloader_num_workers,
            planned_rows=None if is_padding_free else batch * args.gradient_accumulation_steps * args.world_size,
            rows_in_pass=len(data) if isinstance(data := trainer.train_dataset, Sized) else None,
            learning_rate=args.learning_rate if agrees else None,
            schedule=_schedule_of(trainer),
            is_new_model=self.facts["is_new_model"],
            averages_over_ranks=args.average_tokens_across_devices,
            weights_are_scaled=trainer.accelerator.scaler is not None,
            is_adam="adam" in type(optimizer).__name__.lower(),
            parameter_names=tuple(name for name, _ in self._model.named_parameters()),
        )

    @property
    def _pad_token_id(self) -> int | None:
        return getattr(self._trainer.processing_class, "pad_token_id", None)

    # --- one step

    def _start_step(self) -> None:
        self._losses: list[torch.Tensor] = []
        self._tokens: list[TokensOnTheirWay] = []
        self._heard: list[tuple[HeardRows, OnItsWay]] = []
        self._grad_norm = None
        self._learning_rates: list[tuple[float | None, float | None]] = [(0.0, None)]
        self._step_tokens = 0

    def _record_step(self, step: int) -> PendingStep:
        """The step's numbers, those on the device on their way to the host; they are read at the end of the next
        step."""
        args = self._trainer.args
        losses = [loss.float().reshape(()) for loss in self._losses]
        total = losses[0]
        for loss in losses[1:]:  # in the order and precision in which Trainer adds them
            total = total + loss
        norm = self._grad_norm if self._grad_norm is not None else math.nan
        norm = torch.as_tensor(norm, dtype=torch.float32, device=total.device).reshape(())
        self.tokens_seen += self._step_tokens * args.world_size
        now = time.perf_counter()
        record = {
            "step": step,
            "tokens_seen": self.tokens_seen,
            "learning_rate": self._learning_rates[0][0] or 0.0,
            "tokens_per_second": self._step_tokens * args.world_size / (now - self._last_time),
        }
        self._last_time = now
        values = OnItsWay(torch.stack([total, norm, *losses]))
        return PendingStep(
            record,
            self._grad_norm is not None,
            values,
            self._learning_rates,
            self._tokens,
            self._heard,
            self._checksums(step),
            self._parameters.take(),
        )

    def _checksums(self, step: int) -> OnItsWay | None:
        if self._trainer.args.world_size == 1 or "rank_divergence" in self.cannot_judge:
            return None
        if step not in CHECKSUM_STEPS and step % CHECKSUM_STEPS[-1]:
            return None
        try:
            return OnItsWay(parameter_checksums(self._model))
        except CannotJudge as reason:
            self._give_up(["rank_divergence"], str(reason))
            return None

    def _flush(self, control) -> None:
        """Read the step before, tell rank 0, judge it there, and let every rank know whether to stop."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        loss, norm, *losses = pending.values.read().tolist()
        told = {
            "loss": loss,
            "losses": losses,
            "seen": [tokens.read() for tokens in pending.tokens],
            "heard": [_as_plain(heard, values.read()) for heard, values in pending.heard],
            "checksums": pending.checksums.read().tolist() if pending.checksums is not None else None,
            "findings": self._from_elsewhere,
            "stop": self._stop_asked,
        }
        self._from_elsewhere = []
        ranks = self._gather(told)
        if self.is_main:
            record = {**pending.record, "loss": sum(r["loss"] for r in ranks) / len(ranks)}
            record["grad_norm"] = norm if pending.has_norm else None
            self._judge(pending, record, losses, ranks, control)
        self._stop_together(ranks, control)

    def _judge(self, pending: PendingStep, record: dict, losses: list[float], ranks: list[dict], control) -> None:
        checksums = [rank["checksums"] for rank in ranks]
        step = StepFacts(
            record,
            losses,
            pending.learning_rates,
            seen=[(rank, micro, seen) for rank, told in enumerate(ranks) for micro, seen in enumerate(told["seen"])],
            heard=[
                (rank, micro, heard) for rank, told in enumerate(ranks) for micro, heard in enumerate(told["heard"])
            ],
            checksums=None if None in checksums else checksums,
        )
        for told in ranks[1:]:
            for finding in told["findings"]:
                self.report(finding, control)
        where = (record["step"], record["tokens_seen"])
        judged = [*self.watch.judge(step), *self._parameters.judge(pending.measured, *where)]
        append_line(self.output_dir / "steps.jsonl", record)
        for guard, finding in judged:
            self._update(guard, finding, control)
        self.cannot_judge |= self.watch.cannot_judge

    def _gather(self, told) -> list:
        """What every rank has to tell, on rank 0; elsewhere this rank's alone."""
        if self._host_group is None:
            return [told]
        ranks = [None] * self._trainer.args.world_size if self.is_main else None
        distributed.gather_object(told, ranks, dst=0, group=self._host_group)
        return ranks if self.is_main else [told]

    def _stop_together(self, ranks: list[dict], control) -> None:
        if self._host_group is not None:
            asked = next((told["stop"] for told in ranks if told["stop"]), None) or self._stop_asked
            word = [(asked, self.stopped_by and asdict(self.stopped_by))]
            distributed.broadcast_object_list(word, src=0, group=self._host_group)
            self._stop_asked, stopped_by = word[0]
            self.stopped_by = Finding(**stopped_by) if stopped_by else None
        if self._stop_asked:
            _stop(control)

    def _tell_main(self) -> None:
        """What the probes found on other ranks, before step 1."""
        told, self._from_elsewhere = self._from_elsewhere, []
        ranks = self._gather(told)
        for finding in [finding for findings in ranks[1:] for finding in findings]:
            self.report(finding, self._trainer.control)

    # --- findings

    def _update(self, guard: str, finding: Finding | None, control) -> None:
        """Report at an onset, say once when it is over."""
        self.judged_steps[guard] += 1
        if finding is not None:
            self._silent[guard] = 0
            if self._is_onset(finding, self._active.get(guard)):
                self._active[guard] = finding
                waits = finding.id in CURVES and self._trainer is not None and finding.severity in ALARMS
                self._to_explain.append(finding) if waits else self._say(explain(finding, self.findings), control)
        elif guard in self._active:
            self._silent[guard] += 1
            if self._silent[guard] >= PATIENCE:
                onset = self._active.pop(guard)
                if self.is_main and guard not in self.disabled:
                    now = self.history[-1]["step"] - PATIENCE + 1
                    logger.info("%s | step %d | recovered, since step %d", guard, now, onset.step)

    @staticmethod
    def _is_onset(finding: Finding, active: Finding | None) -> bool:
        """Not active so far, or not as bad: what began as information may become an alarm."""
        return active is None or LOG_LEVELS[finding.severity] > LOG_LEVELS[active.severity]

    def _explain_waiting(self, control, results: dict) -> None:
        """Curve findings are said when the probes have been asked again, at the next micro-batch."""
        waiting, self._to_explain = self._to_explain, []
        for result in results.values():
            if isinstance(result, Finding) and result.id not in self._active:
                self.report(result, control)
        clear = [guard for guard, result in results.items() if result is None]
        for finding in waiting:
            self._say(explain(self.watch.evidence_for(finding), self.findings, clear), control)

    def report(self, finding: Finding, control=None) -> None:
        """Log a finding, write it down, and stop the training if that is asked for. Silent for disabled guards."""
        if finding.id == "source_exhausted":
            sources = [other.evidence.get("source") for other in self.findings if other.id == finding.id]
            if finding.evidence.get("source") in sources:
                return
            if self.watch is not None:
                self.watch.begin_pass(finding.evidence.get("tokens"))
        self._active[finding.id] = finding
        self._silent[finding.id] = 0
        self._say(explain(finding, self.findings), control)

    def _say(self, finding: Finding, control) -> None:
        if finding.id in self.disabled:
            return
        if not self.is_main:
            self._from_elsewhere.append(finding)
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

    def _give_up(self, guards, reason: str | CannotJudge) -> None:
        for guard in guards:
            if isinstance(reason, NotApplicable):
                self.not_applicable[guard] = str(reason)
            else:
                self.cannot_judge[guard] = str(reason)
        if self.is_main and not isinstance(reason, NotApplicable):
            logger.info("cannot judge %s: %s", ", ".join(guards), reason)

    # --- files

    def open_files(self, args, state) -> None:
        """A new run starts new files; a resumed one keeps what was written up to its step, and its history with it."""
        self.output_dir, self.is_main, step = Path(args.output_dir), state.is_world_process_zero, state.global_step
        until = step if step else -1
        records = [record for record in read_lines(self.output_dir / "steps.jsonl") if record["step"] <= until]
        self.watch, self._history = None, records[-HISTORY:]
        self.tokens_seen = self._history[-1]["tokens_seen"] if self._history else 0
        earlier = [record for record in read_lines(self.output_dir / "findings.jsonl") if record["step"] <= until]
        self.findings = [Finding(**record) for record in earlier]  # a verdict is about the whole run
        if not self.is_main:
            return
        self.output_dir.mkdir(parents=True, exist_ok=True)
        for name in ("steps.jsonl", "evals.jsonl", "findings.jsonl"):
            keep_until(self.output_dir / name, until)
        (self.output_dir / "findings.jsonl").touch()

    def _save(self, checkpoint: Path) -> None:
        loss = self._pinned_loss()
        if not self.is_main or self.watch is None or not checkpoint.is_dir():
            return
        numbers, arrays = self.watch.state()
        state = {
            "step": self._trainer.state.global_step,
            "pinned_loss": loss,
            "optimizer_states": count_optimizer_states(self._trainer.optimizer),
            "learning_rate_agrees": self._learning_rate_agrees,
            "active": {guard: asdict(finding) for guard, finding in self._active.items()},
            "judged_steps": dict(self.judged_steps),
            "watch": numbers,
        }
        pinned = {f"pinned.{name}": value.numpy() for name, value in self._pinned.items()}
        write_state(checkpoint, state, arrays | pinned)

    def _load(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint
        self._saved = read_state(checkpoint, SAVED) if self.is_main else None
        if self._saved is not None:
            numbers = self._saved[0]
            self._active = {guard: Finding(**record) for guard, record in numbers["active"].items()}
            for guard in OF_A_RESUME:  # each has its own
                self._active.pop(guard, None)
            self.judged_steps = Counter(numbers["judged_steps"])

    # --- the pinned batch

    def _pinned_loss(self) -> float | None:
        """Loss of the pinned rows in eval mode; every rank takes part, since a `compute_loss` may gather."""
        if not self._pinned:
            return None
        try:
            return preflight.loss_in_eval_mode(self._trainer, self._model, self._pinned)
        except Exception as error:
            self._give_up(["resume_jump"], f"the pinned batch failed with {type(error).__name__}: {error}")
            return None

    def _check_resume(self, inputs: dict) -> None:
        """Pins the first rows of this batch, or, after a resume, takes the saved ones and holds their loss against the
        saved one."""
        trainer = self._trainer
        word = [self._saved and _pinned_of(*self._saved)]
        if self._host_group is not None:
            distributed.broadcast_object_list(word, src=0, group=self._host_group)
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            self._give_up(["resume_jump"], "the weights are sharded over ranks")
            return
        if word[0] is None:
            self._pinned = preflight.pin(inputs)
            is_resumed = bool(trainer.state.global_step)
            reason = CannotJudge("the checkpoint holds no state of the guards")
            self._give_up(["resume_jump", "resume_replay"], reason if is_resumed else NotApplicable("not resumed"))
            return
        self._pinned, before, states = word[0]
        loss = self._pinned_loss()
        dtype = preflight.precision_of(trainer, self._model)
        where = (trainer.state.global_step, self.tokens_seen)
        now = count_optimizer_states(trainer.optimizer)
        self._conclude("resume_jump", check_resume(*where, before, loss, dtype, states, now))


def _first_callback(trainer: Trainer) -> RegressionCallback:
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, RegressionCallback))


def _pinned_of(numbers: dict, arrays: dict[str, np.ndarray]) -> tuple[dict, float | None, int]:
    pinned = {
        name.removeprefix("pinned."): torch.from_numpy(value)
        for name, value in arrays.items()
        if name.startswith("pinned.")
    }
    return pinned, numbers["pinned_loss"], numbers["optimizer_states"]


def _as_one(heard: HeardRows) -> torch.Tensor:
    return torch.cat([heard.hits.float(), heard.weights.float(), heard.losses.float().unsqueeze(1)], dim=1)


def _as_plain(heard: HeardRows, values: torch.Tensor) -> dict:
    rows = values.tolist()
    return {
        "first_row": heard.first_row,
        "first_position": heard.first_position,
        "positions": POSITIONS,
        "hits": [[int(number) for number in row[:5]] for row in rows],
        "weights": [row[5:8] for row in rows],
        "losses": [row[8] for row in rows],
    }


def _worst_first(result: tuple[str, preflight.Result]) -> int:
    """So that what is a consequence can name its cause."""
    severity = getattr(result[1], "severity", None)
    return ("error", "warning", "info", None).index(severity)


def _plain(rate) -> float | None:
    """A learning rate as a number; None where it lives on a device, which would have to be waited for."""
    if isinstance(rate, torch.Tensor):
        return None if rate.is_cuda else float(rate)
    return rate


def _schedule_of(trainer: Trainer):
    if not getattr(trainer, "_created_lr_scheduler", False):
        return CannotJudge("the scheduler is the user's own, or the optimizer's")
    if trainer.accelerator.scaler is not None:
        return CannotJudge("fp16 loss scaling skips steps now and then, and the schedule with them")
    args, total = trainer.args, trainer.state.max_steps
    try:
        return expected_learning_rates(
            args.lr_scheduler_type,
            args.learning_rate,
            args.get_warmup_steps(total),
            total,
            args.lr_scheduler_kwargs,
        )
    except CannotJudge as reason:
        return reason


def _stop(control) -> None:
    control.should_save = True
    control.should_training_stop = True


def _make_visible() -> None:
    """In a script that has not configured logging, print the guards' lines to stderr in the documented form."""
    if logging.getLogger().handlers or logger.handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s | %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
