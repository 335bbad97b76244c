"""RegressionCallback: feeds the guards from any Trainer, acts on what they find, keeps their state.

    trainer.add_callback(RegressionCallback())

How it reaches the Trainer is in `listener.py`. A step's numbers leave the device without waiting and are judged when
the next step ends, on rank 0 (`watch.py`); what other ranks hear is gathered there over the host's network. What is
said of it is in `journal.py`.
"""

import functools
import logging
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

from recipe.guards import preflight
from recipe.guards.adam import check_betas
from recipe.guards.batches import OnItsWay, send_tokens
from recipe.guards.evaluation import EvaluationWatch, read_eval_rows
from recipe.guards.facts import is_new, optimizer_name, plain_rate, reference_facts, run_facts, scheduled_rates
from recipe.guards.finding import FINDING_IDS, CannotJudge, Finding, NotApplicable
from recipe.guards.journal import Journal
from recipe.guards.listener import TargetListener, Wrapping, find_trainer, is_compiled
from recipe.guards.optimization import OptimizationWatch, is_checked
from recipe.guards.pinned import PinnedBatch
from recipe.guards.probes.equivalence import check_repeated
from recipe.guards.ranks import Ranks
from recipe.guards.records import StepRecord, append_line, as_finding, keep_until, read_steps
from recipe.guards.state import read_state, say_damaged, write_state
from recipe.guards.steps import PendingStep, StepClock, StepInProgress
from recipe.guards.thresholds import (
    ABOVE_MIN_STEPS,
    ASK_AGAIN,
    BUDGET_STEPS,
    GAP_STEPS,
    HISTORY,
    JUMP_WINDOW,
    LEDGER_MIN_TOKENS,
    LISTEN_EVERY,
    RECENT,
)
from recipe.guards.trajectory import Reference, find_reference, load_reference
from recipe.guards.updates import check_optimizer_groups, check_tied, parameter_checksums
from recipe.guards.watch import StepFacts, Watch

logger = logging.getLogger("recipe.guards")

NEED_TRAINING = tuple(name for name in FINDING_IDS if name not in preflight.PROBES)
NEED_STEPS = {
    ("loss_above_envelope",): ABOVE_MIN_STEPS,
    ("loss_spike", "grad_norm_off"): JUMP_WINDOW + RECENT,
    ("token_budget_off",): BUDGET_STEPS,
    ("train_eval_gap",): GAP_STEPS,
}
OF_A_RESUME = ("resume_jump", "resume_replay")  # each resume has its own


class PreflightDone(Exception):
    """Ends a training that was begun only to have its probes run."""


def _survives(event):
    """A fault of the guards does not end a training: they take their hands off it and say so. A full disk and a check
    that is done are no faults. With several ranks the others would wait for this one's word, and a check would train,
    so there it is raised."""

    @functools.wraps(event)
    def survive(self, *arguments, **kwargs):
        try:
            return event(self, *arguments, **kwargs)
        except (OSError, PreflightDone):
            raise
        except Exception as error:
            if self.only_check or (self._ranks is not None and self._ranks.world_size > 1):
                raise
            self._stop_watching(error)

    return survive


class RegressionCallback(TrainerCallback):
    """Watches the training of a causal language model by any `transformers.Trainer`; needs nothing else of the recipe.

    `trajectory`: `auto`, `none` or the path of a reference. `on_regression`: `warn`, or `stop` (save a checkpoint and
    end the training at the first warning or error). `disabled_guards`: finding ids that stay silent. `facts`: what the
    trainer cannot tell about the run and a reference may ask for, such as `{"source": "docstrings"}`. Writes
    `steps.jsonl`, `evals.jsonl` and `findings.jsonl` into `output_dir`, and its state into each checkpoint.

    After training, on the main process: `findings`, `judged` (ids that had enough to judge), `judged_steps` (id -> on
    how many steps), `cannot_judge` and `not_applicable` (id -> reason), `stopped_by`,
    `failure`: why they were not in force to the end, None if they were.
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
        if trajectory not in ("auto", "none"):
            load_reference(trajectory)  # a bad file is to be known now
        self._given_facts = dict(facts or {})
        self.facts = dict(self._given_facts)  # from the first micro-batch on with what the Trainer tells
        self.only_check = False
        self.journal = Journal(self.disabled, self._act)
        self.stopped_by: Finding | None = None
        self.failure: str | None = None
        self.reference: Reference | None = None
        self.watch: Watch | None = None  # on rank 0, from the first micro-batch on
        self.tokens_seen = 0
        self._history: list[StepRecord] = []
        self._trainer: Trainer | None = None
        self._wrapping = Wrapping()
        self._targets: TargetListener | None = None
        self._optimization: OptimizationWatch | None = None
        self._ranks: Ranks | None = None
        self._reset()

    def _reset(self) -> None:
        self._is_first_micro_step = True
        self._asked_at = 0  # the step at which the probes were last asked
        self._pending: PendingStep | None = None
        self._stop_asked = False
        self._saved: tuple[dict, dict] | None = None
        self._step = StepInProgress()
        self._clock = StepClock()

    # --- what can be asked of it

    @property
    def findings(self) -> list[Finding]:
        return self.journal.findings

    @property
    def judged_steps(self) -> Counter[str]:
        return self.journal.judged_steps

    @property
    def judged(self) -> set[str]:
        return {name for name, count in self.judged_steps.items() if count}

    @property
    def cannot_judge(self) -> dict[str, str]:
        return self.journal.cannot_judge

    @property
    def not_applicable(self) -> dict[str, str]:
        return self.journal.not_applicable

    @property
    def history(self) -> list[StepRecord]:
        return self.watch.history if self.watch is not None else self._history

    @property
    def is_main(self) -> bool:
        return self.journal.is_main

    def ask_to_stop(self) -> None:
        """Save a checkpoint and end the training after the current step (on several ranks the one after, when all have
        heard of it)."""
        self._stop_asked = True

    def report(self, finding: Finding) -> None:
        """Say what something else found, such as the stream that a source has ended (once for each source)."""
        if finding.id == "source_exhausted":
            sources = [other.evidence.get("source") for other in self.findings if other.id == finding.id]
            if finding.evidence.get("source") in sources:
                return
            if self.watch is not None:
                self.watch.begin_pass(finding.evidence.get("tokens"))
        self.journal.report(finding)

    # --- Trainer's events

    @_survives
    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        _make_visible()
        self._let_go()  # of a training that ended with an exception
        self._reset()
        self._trainer, checkpoint = find_trainer(self)
        if self._trainer is not None and _first_callback(self._trainer) is not self:
            self.journal.give_up(FINDING_IDS, "another RegressionCallback watches this Trainer")
            self._trainer, self.journal.is_main = None, False  # two would write every line of the files twice
            return
        self.open_files(args, state)
        if self._trainer is None:
            self.journal.give_up(FINDING_IDS, "no Trainer among the callers of on_train_begin")
            return
        self._ranks = Ranks(args.world_size, self.is_main)
        if state.global_step:
            self._load(Path(checkpoint or Path(args.output_dir) / f"checkpoint-{state.global_step}"))
        self._listen()
        self._look_at_parameters(optimizer)

    @_survives
    def on_epoch_begin(self, args, state, control, **kwargs):
        """A further epoch is a declared pass where epochs are what was asked for, or are known to be (sized data).
        An iterable that ends and is begun again until `max_steps` is not."""
        is_sized = self._trainer is not None and not isinstance(self._trainer.train_dataset, IterableDataset)
        if is_sized or args.max_steps <= 0:
            self._flush(control)
            while self.watch is not None and self.watch.passes < int(state.epoch + 1e-6) + 1:
                self.watch.begin_pass(None)

    @_survives
    def on_pre_optimizer_step(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        rates = [(plain_rate(group["lr"]), plain_rate(group.get("initial_lr"))) for group in optimizer.param_groups]
        self._step.learning_rates = rates
        self._step.scheduled_rates = scheduled_rates(lr_scheduler)
        if self._optimization is not None:
            asked = len(self._step.losses), state.global_step, self._step.learning_rate
            self._step.gradients = self._optimization.before_step(*asked)

    @_survives
    def on_optimizer_step(self, args, state, control, **kwargs):
        if self._optimization is not None:
            self._optimization.after_step(state.global_step, self._step.learning_rate)

    @_survives
    def on_step_end(self, args, state, control, **kwargs):
        self._flush(control)
        if self._step.losses:
            self._pending = self._send_step(state.global_step)
        if self._stop_asked and args.world_size == 1:
            _stop(control)
        self._step = StepInProgress()

    @_survives
    def on_save(self, args, state, control, **kwargs):
        self._step.was_saved = True
        self._flush(control)  # a run killed after this checkpoint must find its last step's record
        if self._trainer is not None:
            self._save(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        self._clock.restart()

    @_survives
    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self._step.was_saved = True
        self._flush(control)
        if metrics and self._trainer is not None:
            self._judge_evaluation(metrics, state.global_step)
        if self.is_main and metrics:
            values = {name: value for name, value in metrics.items() if name.startswith("eval_")}
            record = {"step": state.global_step, "tokens_seen": self.tokens_seen, **values}
            append_line(self.output_dir / "evals.jsonl", record)
        self._clock.restart()

    def on_predict(self, args, state, control, **kwargs):
        if self._trainer is not None:
            self._evaluation.take()  # a prediction's rows are no evaluation's

    @_survives
    def on_train_end(self, args, state, control, **kwargs):
        self._flush(control)
        self._explain_waiting({})
        self._let_go()

    # --- listening

    def _listen(self) -> None:
        trainer = self._trainer
        self._model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        self._evaluation = EvaluationWatch()
        self._pinned = PinnedBatch(trainer, self._model, self._ranks)
        self._is_compiled = is_compiled(trainer)
        self._wrapping.replace(trainer, "training_step", self._listening_training_step)
        self._wrapping.replace(trainer, "prediction_step", self._evaluation.listening_prediction_step)
        self._wrapping.replace(trainer.accelerator, "clip_grad_norm_", self._listening_clip)
        try:
            self._targets = None if self._is_compiled else TargetListener(self._model)
        except CannotJudge as reason:
            logger.debug("targets are not listened to in passing: %s", reason)

    def _stop_watching(self, error: Exception) -> None:
        logger.error("the guards failed and are off; the training goes on without them", exc_info=error)
        self.failure = f"the guards failed with {type(error).__name__}: {error}"
        self.journal.give_up(FINDING_IDS, self.failure)
        self._pending, self._step = None, StepInProgress()
        self._let_go()

    def _let_go(self) -> None:
        self._wrapping.undo()
        for held in (self._targets, self._ranks, self._optimization):
            if held is not None:
                held.close()
        self._targets = self._trainer = self._ranks = self._optimization = None

    def _listening_training_step(self, training_step):
        def listen(model, inputs, num_items_in_batch=None, *args, **kwargs):
            eager, tokens = self._begin_micro_step(inputs, num_items_in_batch) or (None, None)
            if self._trainer is None:  # the guards are off
                return training_step(model, inputs, num_items_in_batch, *args, **kwargs)
            with self._optimization.hearing(self._trainer.state.global_step):
                loss = training_step(model, inputs, num_items_in_batch, *args, **kwargs)
            self._end_micro_step(loss, inputs, eager, tokens)
            return loss

        return listen

    @_survives
    def _begin_micro_step(self, inputs: dict, num_items_in_batch):
        eager = self._before_micro_step(inputs, num_items_in_batch)
        if self._targets is not None and self._trainer.state.global_step % LISTEN_EVERY == 0:
            self._targets.begin(inputs.get("input_ids"))
        return eager, send_tokens(inputs, getattr(self._trainer.processing_class, "pad_token_id", None))

    @_survives
    def _end_micro_step(self, loss: torch.Tensor, inputs: dict, eager: preflight.Eager | None, tokens) -> None:
        self._step.losses.append(loss.detach())
        if tokens is not None:
            self._step.tokens.append(tokens)
            self._step.num_tokens += inputs["input_ids"].numel()
        if self._targets is not None:
            self._step.add_heard(self._targets.take())
        if eager is not None:
            compare = preflight.compare_compiled
            self._conclude("compiled_mismatch", lambda: compare(self._trainer, self._model, eager, loss))

    def _listening_clip(self, clip):
        def listen(*arguments, **kwargs):
            if self._optimization is None:  # the guards are off
                return clip(*arguments, **kwargs)
            self._optimization.before_clip()
            self._step.grad_norm = norm = clip(*arguments, **kwargs)
            self._step.clipped_norm = self._optimization.clipped_norm(self._trainer.state.global_step)
            return norm

        return listen

    def _before_micro_step(self, inputs: dict, num_items_in_batch) -> preflight.Eager | None:
        """The probes, before the first micro-batch; again, where a curve wants to be explained. Gives back what the
        eager model makes of the first one, where the model is compiled."""
        own_step = self._wrapping.original(self._trainer, "training_step")
        probe = (
            self._trainer,
            inputs,
            num_items_in_batch,
            own_step,
            self._trainer.state.global_step,
            self.tokens_seen,
        )
        if not self._is_first_micro_step:
            if self._trainer.state.global_step == ASK_AGAIN and self._trainer.state.global_step != self._asked_at:
                self._ask_again(preflight.run_probes(*probe, only_curve=True))
            elif self.journal.to_explain:
                self._explain_waiting(preflight.run_probes(*probe, only_curve=True))
            return None
        self._is_first_micro_step = False
        self._asked_at = self._trainer.state.global_step
        self._learn_facts(inputs)
        self._check_resume(inputs)
        results = preflight.run_probes(*probe, is_new_model=self.facts["is_new_model"])
        for guard, result in sorted(results.items(), key=_worst_first):
            self.journal.conclude(guard, result)
        self._hear_other_ranks()
        if not self._is_compiled:
            self.journal.give_up(["compiled_mismatch"], NotApplicable("the model is not compiled"))
        if self.only_check:
            raise PreflightDone
        return self._measure_eager(inputs, num_items_in_batch) if self._is_compiled else None

    def _ask_again(self, results: dict[str, preflight.Result]) -> None:
        """What begins at zero, such as an adapter, shows once it has been trained for a few steps."""
        self._asked_at = self._trainer.state.global_step
        for guard, result in sorted(results.items(), key=_worst_first):
            if not isinstance(result, CannotJudge):
                self.journal.conclude(guard, result)
        self._explain_waiting(results)

    def _measure_eager(self, inputs: dict, num_items_in_batch) -> preflight.Eager | None:
        try:
            return preflight.measure_eager(self._trainer, self._model, inputs, num_items_in_batch)
        except CannotJudge as reason:
            self.journal.give_up(["compiled_mismatch"], reason)
        except Exception as error:  # such as re-entrant checkpointing, which refuses torch.autograd.grad
            reason = f"the probe failed with {type(error).__name__}: {error}"
            self.journal.give_up(["compiled_mismatch"], reason)
        return None

    def _conclude(self, guard: str, check) -> None:
        try:
            result = check()
        except CannotJudge as reason:
            result = reason
        self.journal.conclude(guard, result)

    # --- before the first step

    def _look_at_parameters(self, optimizer) -> None:
        watched = OptimizationWatch(self._trainer, self._model, optimizer, self._is_compiled)
        self._optimization, named, groups = watched, watched.named, optimizer.param_groups
        where = (self._trainer.state.global_step, self.tokens_seen)
        swapped = check_betas(*where, groups) if "adam" in optimizer_name(optimizer).lower() else None
        if watched.adam is not None or swapped is not None:
            self.journal.conclude("optimizer_off", swapped)
        if watched.no_adam is not None:
            self.journal.give_up(["optimizer_off"], watched.no_adam)
        is_new_model = self._given_facts.get("is_new_model", is_new(self._model))
        self._conclude("frozen_parameters", lambda: check_optimizer_groups(*where, named, optimizer, is_new_model))
        self._conclude("untied_weights", lambda: check_tied(*where, self._model))
        if not watched.parameters.in_low_precision:
            self.journal.give_up(["lost_updates"], NotApplicable("no half-precision weights with steps of known size"))

    def _learn_facts(self, inputs: dict) -> None:
        trainer, args = self._trainer, self._trainer.args
        self.facts = {**reference_facts(trainer, self._model, inputs), **self._given_facts}
        if not self._history:  # resumed where no records lie: the steps before had the same size
            self.tokens_seen = trainer.state.global_step * self.facts["tokens_per_step"]
        self.reference, reason = find_reference(self.trajectory, self.facts)
        if self.reference is None:
            self.journal.give_up(["loss_off_reference"], reason)
        if args.world_size == 1:
            self.journal.give_up(["rank_divergence"], NotApplicable("one rank"))
        is_evaluated = args.eval_strategy != "no" or args.eval_on_start
        if not is_evaluated:
            evaluating = ("train_eval_gap", "train_eval_overlap")
            self.journal.give_up(evaluating, NotApplicable("no evaluation during training"))
        steps = trainer.state.max_steps
        for guards, least in NEED_STEPS.items():
            if steps < least:
                self.journal.give_up(guards, NotApplicable(f"the run has {steps} steps, it needs {least}"))
        if steps * self.facts["tokens_per_step"] < LEDGER_MIN_TOKENS:
            few = NotApplicable(f"the run has fewer than {LEDGER_MIN_TOKENS:,} tokens")
            self.journal.give_up(["repeated_data"], few)
        if self.is_main:
            initial = {plain_rate(group.get("initial_lr")) for group in trainer.optimizer.param_groups}
            agrees = self._saved[0]["learning_rate_agrees"] if self._saved else args.learning_rate in initial
            self._learning_rate_agrees = agrees
            followed = self._optimization.gradients
            self.watch = self._build_watch(run_facts(trainer, self._model, inputs, self.facts, agrees, followed))
            self.watch.history = self._history
            if self.watch.facts.bos_token_id is None:
                self.journal.give_up(["double_bos"], NotApplicable("no BOS token, or one that is EOS or padding too"))
            if is_evaluated:
                self._read_eval_rows()

    def _read_eval_rows(self) -> None:
        with preflight.undisturbed(self._model):  # a collator or dataset may draw random numbers
            try:
                self.watch.ledger.observe_eval(read_eval_rows(self._trainer))
            except Exception as error:  # such as columns that Trainer would have dropped
                logger.debug("eval rows are known when they are evaluated: %s: %s", type(error).__name__, error)

    @property
    def _is_exact(self) -> bool:
        return preflight.precision_of(self._trainer, self._model).itemsize >= 4

    def _build_watch(self, facts) -> Watch:
        """With the checkpoint's memory, if there is one."""
        watch, step = Watch(facts, self.reference), self._trainer.state.global_step
        if self._saved is not None:
            numbers, arrays = self._saved
            try:
                watch.restore(numbers["watch"], arrays)
                watch.ledger.mark_resume(step)
                return watch
            except Exception as error:
                say_damaged(self._checkpoint, error)
                self._saved, watch = None, Watch(facts, self.reference)
        if step:
            watch.envelope.stop("the model was trained before on tokens that were not counted")
        return watch

    def _check_resume(self, inputs: dict) -> None:
        if not self._trainer.state.global_step:
            self.journal.give_up(OF_A_RESUME, NotApplicable("not resumed"))
            self._pinned.pin(inputs)
            return
        where = (self._trainer.state.global_step, self.tokens_seen)
        self._conclude("resume_jump", lambda: self._pinned.check(self._saved, *where))
        if self.is_main and self._saved is None:
            self.journal.give_up(["resume_replay"], "the checkpoint holds no state of the guards")
            self._pinned.pin(inputs)

    # --- one step

    def _send_step(self, step: int) -> PendingStep:
        """Its numbers, on their way to the host; they are read at the end of the next step."""
        num_tokens = self._step.num_tokens * self._trainer.args.world_size
        self.tokens_seen += num_tokens
        record = {
            "step": step,
            "tokens_seen": self.tokens_seen,
            "learning_rate": self._step.learning_rate,
            "tokens_per_second": num_tokens / self._clock.lap(),
        }
        measured = self._optimization.take()
        return PendingStep(record, self._step, self._step.values(), self._checksums(step), measured)

    def _checksums(self, step: int) -> OnItsWay | None:
        if self._trainer.args.world_size == 1 or "rank_divergence" in self.cannot_judge:
            return None
        if not is_checked(step):
            return None
        try:
            return OnItsWay(parameter_checksums(self._model))
        except CannotJudge as reason:
            self.journal.give_up(["rank_divergence"], reason)
            return None

    def _flush(self, control) -> None:
        """Read the step before, tell rank 0, judge it there, and let every rank know whether to stop."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        untold, self.journal.untold = self.journal.untold, []
        told = {**pending.read(), "findings": untold, "is_stop_asked": self._stop_asked}
        ranks = self._ranks.gather(told)
        if self.is_main:
            self._judge(pending, ranks)
            self._stop_asked |= any(told["is_stop_asked"] for told in ranks)
        self._stop_asked, stopped_by = self._ranks.share(
            (self._stop_asked, self.stopped_by and asdict(self.stopped_by))
        )
        self.stopped_by = Finding(**stopped_by) if stopped_by else None
        if self._stop_asked:
            _stop(control)

    def _judge(self, pending: PendingStep, ranks: list[dict]) -> None:
        self._report_others([told["findings"] for told in ranks])
        loss = sum(told["loss"] for told in ranks) / len(ranks)
        record: StepRecord = {**pending.record, "loss": loss, "grad_norm": ranks[0]["grad_norm"]}
        checksums = [told["checksums"] for told in ranks]
        step = StepFacts(
            record,
            [loss for told in ranks for loss in told["losses"]],
            pending.heard_of.learning_rates,
            scheduled_rates=pending.heard_of.scheduled_rates,
            gradients=ranks[0]["gradients"],
            clipped_norm=ranks[0]["clipped_norm"],
            was_saved=pending.heard_of.was_saved,
            seen=[(rank, micro, seen) for rank, told in enumerate(ranks) for micro, seen in enumerate(told["seen"])],
            heard=[(rank, micro, rows) for rank, told in enumerate(ranks) for micro, rows in enumerate(told["heard"])],
            checksums=None if None in checksums else checksums,
        )
        where = (record["step"], record["tokens_seen"])
        judged = [*self.watch.judge(step), *self._optimization.judge(pending.measured, *where)]
        append_line(self.output_dir / "steps.jsonl", record)
        for guard, finding in judged:
            self.journal.judge(guard, finding, record["step"])
        self._note_what_cannot_be_judged()

    def _judge_evaluation(self, metrics: dict, step: int) -> None:
        ranks = self._ranks.gather(self._evaluation.take())
        if self.watch is not None:
            for guard, finding in self.watch.judge_evaluation(ranks, metrics, step, self.tokens_seen):
                self.journal.judge(guard, finding, step)
            self._note_what_cannot_be_judged()
        with suppress(CannotJudge):  # said where it is pinned
            if (pair := self._pinned.losses(2)) and self.watch is not None:
                self.journal.judge(
                    "eval_not_repeatable", check_repeated(*pair, step, self.tokens_seen, self._is_exact), step
                )

    def _note_what_cannot_be_judged(self) -> None:
        for guard, reason in self.watch.cannot_judge.items():
            self.journal.give_up([guard], reason)

    def _explain_waiting(self, results: dict) -> None:
        if self.journal.to_explain:
            self.journal.explain_waiting(results, self.watch.position_evidence())

    def _hear_other_ranks(self) -> None:
        """What the probes found there, before step 1."""
        untold, self.journal.untold = self.journal.untold, []
        self._report_others(self._ranks.gather(untold))

    def _report_others(self, findings_by_rank: list[list[Finding]]) -> None:
        """Rank 0's own are said already. What several ranks found is said once."""
        for rank, findings in enumerate(findings_by_rank[1:], 1):
            for finding in findings:
                if finding.id not in self.journal.active or finding.id == "source_exhausted":
                    where = {"found": f"{finding.found} (rank {rank})", "evidence": {**finding.evidence, "rank": rank}}
                    self.report(replace(finding, **where))

    def _act(self, finding: Finding) -> None:
        """On a warning or an error."""
        if self.on_regression == "stop" and self.stopped_by is None:
            self.stopped_by = finding
            self.ask_to_stop()
            if self._trainer is not None and self._trainer.args.world_size == 1:
                _stop(self._trainer.control)

    # --- files

    def open_files(self, args, state) -> None:
        """A new run starts new files; a resumed one keeps what was written up to its step, and its history with it."""
        self.output_dir, is_main = Path(args.output_dir), state.is_world_process_zero
        until = state.global_step or -1
        self.watch, self._history = None, read_steps(self.output_dir / "steps.jsonl", until)[-HISTORY:]
        self.tokens_seen = self._history[-1]["tokens_seen"] if self._history else 0
        self.journal.open(self.output_dir / "findings.jsonl", is_main, until)
        if not is_main:
            return
        self.output_dir.mkdir(parents=True, exist_ok=True)
        for name in ("steps.jsonl", "evals.jsonl", "findings.jsonl"):
            keep_until(self.output_dir / name, until)
        (self.output_dir / "findings.jsonl").touch()

    def _save(self, checkpoint: Path) -> None:
        pinned, pinned_arrays = self._pinned.state()
        if self.watch is None or not checkpoint.is_dir():
            return
        watched, arrays = self.watch.state()
        numbers = {
            **pinned,
            "step": self._trainer.state.global_step,
            "learning_rate_agrees": self._learning_rate_agrees,
            "active": {guard: asdict(finding) for guard, finding in self.journal.active.items()},
            "judged_steps": dict(self.judged_steps),
            "watch": watched,
        }
        write_state(checkpoint, numbers, arrays | pinned_arrays)

    def _load(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint
        self._saved = read_state(checkpoint) if self.is_main else None
        if self._saved is not None:
            active = {guard: as_finding(record) for guard, record in self._saved[0]["active"].items()}
            self.journal.active = {g: finding for g, finding in active.items() if finding and g not in OF_A_RESUME}
            self.judged_steps.update(self._saved[0]["judged_steps"])


def _first_callback(trainer: Trainer) -> RegressionCallback:
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, RegressionCallback))


def _worst_first(result: tuple[str, preflight.Result]) -> int:
    """So that what is a consequence can name its cause."""
    severity = getattr(result[1], "severity", None)
    return ("error", "warning", "info", None).index(severity)


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
