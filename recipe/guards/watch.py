"""What rank 0 holds in mind over a run, and what it makes of each step: the guards that need a history.

`Watch.judge` is given the plain facts of one step, of all ranks, and says for each guard that could judge what it
found. It knows no Trainer.
"""

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, TypedDict

import numpy as np

from recipe.guards import vitals
from recipe.guards.batches import LABEL_IS_NEXT, LABEL_IS_TOKEN, SCORED, SeenTokens, TokenCounter, scored_part
from recipe.guards.envelope import (
    Envelope,
    check_above_envelope,
    check_below_envelope,
    starts_untrained,
)
from recipe.guards.evaluation import judge_evaluation
from recipe.guards.facts import RunFacts
from recipe.guards.finding import CannotJudge, Finding
from recipe.guards.gradients import check_clipped, check_clipped_norm, check_dropped, check_sum, check_written
from recipe.guards.ledger import Ledger, Place, check_overlap, check_repetition
from recipe.guards.probes.targets import in_rows, judge_row
from recipe.guards.records import StepRecord, unfit
from recipe.guards.thresholds import (
    ABOVE_MIN_STEPS,
    ABOVE_WINDOW,
    BELOW_WINDOW,
    BUDGET_STEPS,
    GRADIENT_STEPS,
    GRADIENT_WINDOW,
    HISTORY,
    JUMP_WINDOW,
    LABEL_CLEAR,
    LABEL_MAJORITY,
    LABELS_TO_LEARN,
    MIN_POSITIONS,
    PASSING_MAJORITY,
    RATE_STEPS,
    RECENT,
    UNEVEN,
    WEIGHT_STEPS,
    WEIGHTED_LOSS,
    ZERO_NORMS,
)
from recipe.guards.trajectory import Reference, check_grad_norm, check_reference
from recipe.guards.updates import check_ranks

NO_VOCABULARY = "the model names no embedding, so the size of its vocabulary is not known"


@dataclass
class StepFacts:
    """One step. `micro_losses`: of each micro-batch, rank after rank. `seen`, `heard`: `(rank, micro_step, ...)`.
    `learning_rates`: `(lr, initial_lr)` of each parameter group; `scheduled_rates`: the scheduler's word for them.
    `gradients`: of `GradientWatch.take`, and `clipped_norm`, on rank 0. `was_saved`: or evaluated, since the step
    before. `checksums`: of each parameter, by rank."""

    record: StepRecord
    micro_losses: list[float]
    learning_rates: list[tuple[float | None, float | None]]
    seen: list[tuple[int, int, SeenTokens]] = field(default_factory=list)
    heard: list[tuple[int, int, dict]] = field(default_factory=list)
    scheduled_rates: list[float | None] = field(default_factory=list)
    gradients: list[list[float] | None] = field(default_factory=list)
    clipped_norm: float | None = None
    was_saved: bool = False
    checksums: list[list[int]] | None = None


class Watch:
    """`history`: a record a step, oldest first. `cannot_judge`: what the guards cannot judge from here on, and why."""

    def __init__(self, facts: RunFacts, reference: Reference | None):
        self.facts, self.reference = facts, reference
        self.history: list[StepRecord] = []
        self.cannot_judge: dict[str, str] = {}
        self.ledger = Ledger()
        self.envelope = Envelope(facts.vocab_size)
        if not facts.vocab_size:
            self.envelope.stop(NO_VOCABULARY)
        self.counter = TokenCounter(facts.eos_token_ids, facts.embedding_rows, facts.bos_token_id)
        self.losses_by_position: list[list[float]] = []
        self.envelope_losses: list[dict] = []
        self.rows_by_step: list[int] = []
        self.passes = 1
        self.labels_are: str | None = None
        self.eval_digests: dict[str, int] = {}
        self._uneven_steps = self._off_rate_steps = self._unclipped_steps = 0
        self._off_gradients: dict[str, list[bool]] = {}  # by parameter, of the last steps
        self._changes: list[float] = []
        self._floor_sums = [0, 0.0]
        self._rates = [0, 0.0]  # steps, and the sum of their learning rates

    # --- a step

    def judge(self, step: StepFacts) -> Iterator[tuple[str, Finding | None]]:
        """What each guard that can judge makes of this step. Reads the tokens first, so that the record has its
        envelope."""
        record = step.record
        self._read_tokens(step)
        self.history = [*self.history[1 - HISTORY :], record]
        where = (record["step"], record["tokens_seen"])
        yield "loss_not_finite", self._check_finite(step, *where)
        yield from self._judge_curve()
        yield from self._judge_learning_rate(step, *where)
        yield from self._judge_tokens(*where)
        yield from self._judge_targets(step, *where)
        yield from self._judge_weights(step, *where)
        yield from self._judge_gradient(step, *where)
        yield from self._judge_envelope()
        if step.seen:
            nats = self._nats_per_token()
            finding = check_repetition(self.ledger, *where, nats, num_workers=self.facts.num_workers)
            if finding is not None or self.ledger.has_enough:
                yield "repeated_data", finding if finding is not None and finding.id == "repeated_data" else None
            if self.ledger.can_see_replay:
                yield "resume_replay", finding if finding is not None and finding.id == "resume_replay" else None
            if len(self.ledger.eval_rows):
                yield "train_eval_overlap", check_overlap(self.ledger, *where, nats)
        if step.checksums is not None:
            yield "rank_divergence", check_ranks(*where, self.facts.parameter_names, step.checksums)

    def _check_finite(self, step: StepFacts, *where: int) -> Finding | None:
        scored = [int((seen.flags & SCORED != 0).sum()) for _, _, seen in step.seen]
        scored = scored if len(scored) == len(step.micro_losses) else None
        norm = step.record["grad_norm"]
        if self.facts.weights_are_scaled and norm is not None and not math.isfinite(norm):
            norm = None  # a step that the loss scaler skips, as it does now and then
        finding = vitals.check_finite(*where, step.micro_losses, norm, scored)
        if finding is None and not self.facts.weights_are_scaled:
            for norms in filter(None, step.gradients):
                finding = finding or check_dropped(*where, norms)
        if finding is not None and self.facts.world_size > 1 and (bad := finding.evidence["bad_micro_batches"]):
            rank, micro_step = divmod(bad[0], len(step.micro_losses) // self.facts.world_size)
            finding.evidence.update(rank=rank, micro_step=micro_step)
            return replace(finding, found=f"{finding.found} (rank {rank})")
        return finding

    def _read_tokens(self, step: StepFacts) -> None:
        rows, flags, learned, places = [], [], [], []
        for rank, micro_step, seen in step.seen:
            self.counter.add(seen)
            for number, (ids, what) in enumerate(seen.rows()):
                rows.append(ids)
                flags.append(what & SCORED != 0)
                if len(part := scored_part(ids, what)):
                    learned.append(part)
                    places.append(Place(step.record["step"], rank, micro_step, number))
        self.rows_by_step = [*self.rows_by_step[-HISTORY:], sum(len(seen.ids) for _, _, seen in step.seen)]
        self._rates = [self._rates[0] + 1, self._rates[1] + step.record["learning_rate"]]
        if not rows:
            return
        self.ledger.observe_train(learned, places)
        found = self.envelope.observe(rows, flags)
        if self.envelope.stopped:
            self.cannot_judge.setdefault("loss_below_envelope", self.envelope.stopped)
            self.cannot_judge.setdefault("loss_above_envelope", self.envelope.stopped)
        if found is None:
            return
        if not self.envelope_losses and not starts_untrained(step.record["loss"], found, self.facts.vocab_size):
            self.envelope.stop("the first loss is not that of an untrained model, so a floor for those says nothing")
        self._floor_sums = [self._floor_sums[0] + found.tokens, self._floor_sums[1] + found.tokens * found.floor]
        step.record["floor"], step.record["ceiling"] = found.floor, found.unigram
        kept = ("step", "tokens_seen", "loss", "floor", "ceiling")
        record = {name: step.record[name] for name in kept} | {"bigram": found.bigram}
        self.envelope_losses = [*self.envelope_losses[-2 * ABOVE_WINDOW :], record]

    # --- guards, one after another

    def _columns(self, count: int, *names: str) -> list[list]:
        return [[record[name] for record in self.history[-count:]] for name in names]

    def _judge_curve(self) -> Iterator[tuple[str, Finding | None]]:
        count = JUMP_WINDOW + RECENT
        steps, tokens, losses, norms = self._columns(count, "step", "tokens_seen", "loss", "grad_norm")
        if len(steps) == count:
            yield "loss_spike", vitals.check_loss_spike(steps, tokens, losses, is_first_pass=self.passes == 1)
        reference = self.reference
        if reference is not None and len(self.history) >= reference.window and reference.can_judge(tokens[-1]):
            own = [column[-reference.window :] for column in (steps, tokens, losses)]
            yield "loss_off_reference", check_reference(reference, *own)
        if None in norms:
            self.cannot_judge.setdefault("grad_norm_off", "gradients are not clipped, so no norm is measured")
        elif reference is not None and reference.grad_norm_phases:
            if len(norms) >= reference.window:
                own = [column[-reference.window :] for column in (steps, tokens, norms)]
                yield "grad_norm_off", check_grad_norm(reference, *own)
        elif len(norms) == count or norms[-ZERO_NORMS:] == [0.0] * ZERO_NORMS:
            yield "grad_norm_off", vitals.check_grad_norm_level(steps, tokens, norms)

    def _judge_learning_rate(self, step: StepFacts, number: int, tokens: int) -> Iterator[tuple[str, Finding | None]]:
        if isinstance(self.facts.schedule, CannotJudge):
            finding = vitals.check_scheduled_rates(number, tokens, step.learning_rates, step.scheduled_rates)
            self._off_rate_steps = self._off_rate_steps + 1 if finding else 0
            if self._off_rate_steps >= RATE_STEPS:
                yield "learning_rate_off", finding
            self.cannot_judge.setdefault("learning_rate_off", str(self.facts.schedule))
            return
        finding = vitals.check_learning_rate(
            number - 1,
            tokens,
            step.learning_rates,
            self.facts.schedule,
            self.facts.learning_rate,
            self.facts.world_size,
            self.facts.gradient_accumulation_steps,
        )
        self._off_rate_steps = self._off_rate_steps + 1 if finding else 0
        yield "learning_rate_off", finding if self._off_rate_steps >= RATE_STEPS else None

    def _judge_tokens(self, *where: int) -> Iterator[tuple[str, Finding | None]]:
        counts = self.counter.counts
        if counts.tokens == 0:
            return
        if self.facts.embedding_rows:
            yield "token_out_of_range", vitals.check_token_range(*where, counts)
        else:
            self.cannot_judge.setdefault("token_out_of_range", NO_VOCABULARY)
        if self.facts.bos_token_id is not None:
            yield "double_bos", vitals.check_double_bos(*where, counts)
        yield "padding_is_target", vitals.check_padding_targets(*where, counts)
        if self.facts.eos_token_ids:
            yield "eos_never_target", vitals.check_eos_targets(*where, counts)
        else:
            self.cannot_judge.setdefault("eos_never_target", "neither model nor tokenizer names an EOS token")
        if self.facts.planned_rows is None:
            self.cannot_judge.setdefault("token_budget_off", "padding-free batches are not counted in rows")
        elif len(self.rows_by_step) >= BUDGET_STEPS:
            planned, in_pass = self.facts.planned_rows, self.facts.rows_in_pass
            yield "token_budget_off", vitals.check_tokens(*where, self.rows_by_step, planned, in_pass=in_pass)

    def _judge_targets(self, step: StepFacts, *where: int) -> Iterator[tuple[str, Finding | None]]:
        """In passing: what the head's gradient told of a few positions, and the labels of every row beside its
        tokens."""
        found = [*self._targets_heard(step, *where), *self._labels_seen(step, *where)]
        by_id = {finding.id: finding for finding in reversed(found)}
        if not step.heard and not step.seen:
            return
        for guard in ("missing_label_shift", "double_label_shift", "wrong_loss_target"):
            yield guard, by_id.get(guard)

    def _targets_heard(self, step: StepFacts, *where: int) -> Iterator[Finding]:
        for rank, micro_step, heard in step.heard:
            for number, hits in enumerate(heard["hits"]):
                row = heard["first_row"] + number
                finding = judge_row(*map(int, hits), row, *where, max_elsewhere=PASSING_MAJORITY)
                if finding is not None:
                    finding.evidence.update(rank=rank, micro_step=micro_step)
                    faulty = sum(
                        judge_row(*map(int, h), 0, *where, PASSING_MAJORITY) is not None for h in heard["hits"]
                    )
                    yield in_rows(finding, faulty, len(heard["hits"]))
                if hits[0]:
                    place = heard["first_position"] + heard["positions"] // 2
                    vitals.add_losses_by_position(self.losses_by_position, [place], [heard["losses"][number]])

    def _labels_seen(self, step: StepFacts, *where: int) -> Iterator[Finding]:
        """Most rows' labels are the tokens themselves (or the next ones, for a model that does not shift): a row where
        they are something else is at fault."""
        for rank, micro_step, seen in step.seen:
            scored = seen.flags & SCORED != 0
            count = scored.sum(axis=1)
            own, following = (
                ((seen.flags & flag != 0) & scored).sum(axis=1) for flag in (LABEL_IS_TOKEN, LABEL_IS_NEXT)
            )
            if self.labels_are is None and count.sum() >= LABELS_TO_LEARN:
                shares = {"own": own.sum() / count.sum(), "next": following.sum() / count.sum()}
                self.labels_are = max(shares, key=shares.get) if max(shares.values()) > LABEL_CLEAR else "neither"
            if self.labels_are in (None, "neither"):
                continue
            on_rank = f" of rank {rank}" if self.facts.world_size > 1 else ""
            right, other = (own, following) if self.labels_are == "own" else (following, own)
            for row in np.flatnonzero((count >= MIN_POSITIONS) & (right < LABEL_MAJORITY * count)).tolist():
                fits = f"{right[row]} of {count[row]} fit"
                shifted = "double_label_shift" if self.labels_are == "own" else "missing_label_shift"
                yield Finding(
                    shifted if other[row] > LABEL_MAJORITY * count[row] else "wrong_loss_target",
                    "error",
                    *where,
                    found=f"labels of row {row}{on_rank} are not as in the rows before ({fits})",
                    expected=f"labels that are the {self.labels_are} tokens, as in most rows",
                    likely_causes=("some rows' labels are shifted or shuffled in the dataset or collator",),
                    action="print this row's input_ids beside its labels",
                    evidence={"rank": rank, "micro_step": micro_step, "row": row, "fit": int(right[row])},
                )

    def _judge_weights(self, step: StepFacts, *where: int) -> Iterator[tuple[str, Finding | None]]:
        """In passing: what a scored position weighs in the gradient is the same in every micro-batch of a step, and
        all of them together weigh 1."""
        if self.facts.weights_are_scaled:
            return
        counts = {(rank, micro): int((seen.flags & SCORED != 0).sum()) for rank, micro, seen in step.seen}
        weights = {(rank, micro): _mean_weight(heard["weights"]) for rank, micro, heard in step.heard}
        if not counts or counts.keys() != weights.keys() or None in weights.values() or not all(counts.values()):
            return
        num_positions = sum(seen.ids[:, 1:].size for _, _, seen in step.seen)
        finding = check_weights(*where, counts, weights, self.facts, num_positions)
        self._uneven_steps = self._uneven_steps + 1 if finding else 0
        yield "accumulation_mismatch", finding if self._uneven_steps >= WEIGHT_STEPS else None

    def _judge_gradient(self, step: StepFacts, *where: int) -> Iterator[tuple[str, Finding | None]]:
        """In passing: the step is taken with the sum of what its micro-batches gave, clipped as asked."""
        facts = self.facts
        if facts.weights_are_scaled:
            return
        if step.clipped_norm is not None:
            limits = step.record["grad_norm"], facts.max_grad_norm, step.clipped_norm
            yield "grad_norm_off", check_clipped_norm(*where, *limits)
        heard = [(*each, norms) for each, norms in zip(facts.followed, step.gradients, strict=True) if norms]
        for name, is_low, norms in heard if facts.world_size == 1 else []:  # several ranks have averaged it
            finding = check_sum(*where, name, norms, len(step.micro_losses), is_low)
            off = [*self._off_gradients.get(name, [])[1 - GRADIENT_WINDOW :], finding is not None]
            self._off_gradients[name] = off
            yield "accumulation_mismatch", finding if sum(off) >= GRADIENT_STEPS else None
        if not heard or heard[0][0] != facts.followed[0][0]:
            return
        name, _, norms = heard[0]
        self._changes = [*self._changes[-GRADIENT_WINDOW:], norms[4]]
        if (written := check_written(*where, name, self._changes, step.was_saved)) is not None:
            yield "lost_updates", written
        finding = check_clipped(*where, step.record["grad_norm"], facts.max_grad_norm, norms)
        self._unclipped_steps = self._unclipped_steps + 1 if finding else 0
        if self._unclipped_steps >= GRADIENT_STEPS:
            yield "grad_norm_off", finding

    def _judge_envelope(self) -> Iterator[tuple[str, Finding | None]]:
        if self.envelope.stopped or not self.envelope_losses:
            return
        names = ("step", "tokens_seen", "loss", "floor", "ceiling", "bigram")
        steps, tokens, losses, floors, unigrams, bigrams = (
            [record[name] for record in self.envelope_losses[-2 * ABOVE_WINDOW :]] for name in names
        )
        if len(steps) >= BELOW_WINDOW:
            yield "loss_below_envelope", check_below_envelope(steps, tokens, losses, floors)
        if not self.facts.is_adam:
            self.cannot_judge.setdefault(
                "loss_above_envelope", "how far the weights have moved is known for Adam only"
            )
        elif len(steps) >= 2 * ABOVE_WINDOW and self._rates[0] >= ABOVE_MIN_STEPS:
            finding = check_above_envelope(steps, tokens, losses, unigrams, bigrams, *self._rates)
            yield "loss_above_envelope", finding

    def _nats_per_token(self) -> float:
        """What a token of this text tells: the mean of the n-gram model over all tokens it has scored."""
        tokens, nats = self._floor_sums
        return nats / tokens if tokens else math.log(self.facts.vocab_size or 256)

    # --- from outside

    def judge_evaluation(
        self, ranks: list[dict], metrics: dict[str, float], step: int, tokens_seen: int
    ) -> Iterator[tuple[str, Finding | None]]:
        """`ranks`: what `EvaluationWatch.take` gave on each; `metrics`: what the evaluation reported."""
        names = [key for key in metrics if key.startswith("eval_") and key.endswith("_loss")]
        if names and "train" not in names[0]:  # rows of the training data may be evaluated on purpose
            self.ledger.observe_eval([row for rank in ranks for row in rank["learned"]])
        yield from judge_evaluation(ranks, metrics, self.eval_digests, step, tokens_seen)
        if "eval_loss" in metrics:
            losses = [record["loss"] for record in self.history]
            is_first = self.passes == 1
            known = (losses, metrics["eval_loss"], is_first, self.facts.vocab_size)
            gap = vitals.check_train_eval_gap(step, tokens_seen, *known)
            yield "train_eval_gap", gap
        else:
            self.cannot_judge.setdefault("train_eval_gap", "several eval sets, which may be of other kinds of text")

    def begin_pass(self, tokens_in_pass: int | None) -> None:
        """A declared further pass: repetition of the passes before is no fault, and counts say nothing any more of
        what a model may know."""
        self.passes += 1
        self.ledger.begin_pass(tokens_in_pass)
        self.envelope.stop("a second pass over the data has begun")

    def position_evidence(self) -> dict:
        """Beside a curve finding: does the loss fall with the position in the block, as it does for who learns from
        context?"""
        return vitals.position_evidence(self.losses_by_position)

    def state(self) -> tuple[dict, dict[str, np.ndarray]]:
        """For the checkpoint: JSON-able numbers, and arrays."""
        numbers = {name: getattr(self, name) for name in KEPT} | {"counts": self.counter.state()}
        arrays = {f"ledger.{name}": value for name, value in self.ledger.state().items()}
        arrays |= {f"envelope.{name}": value for name, value in self.envelope.state().items()}
        return numbers, arrays

    def restore(self, numbers: dict, arrays: dict[str, np.ndarray]) -> None:
        """Raises where they are not such as `state` gives."""
        fresh, like = self.state()
        wrong = unfit(numbers, {**KEPT, "counts": dict[str, int]})
        wrong += [name for name, value in like.items() if name not in arrays or not _is_alike(arrays[name], value)]
        counts = {**dict.fromkeys(LATER_COUNTS, 0), **numbers["counts"]} if not wrong else {}
        if wrong or counts.keys() != fresh["counts"].keys():
            raise ValueError(f"missing, or of another type: {', '.join(wrong or ['counts'])}")
        for name in KEPT:
            setattr(self, name, numbers[name])
        facts = self.facts
        self.counter = TokenCounter(facts.eos_token_ids, facts.embedding_rows, facts.bos_token_id, counts)
        self.ledger = Ledger.from_state(_part_of(arrays, "ledger."))
        self.envelope = Envelope.from_state(_part_of(arrays, "envelope."))


class _EnvelopeRecord(TypedDict):
    step: int
    tokens_seen: int
    loss: float
    floor: float
    ceiling: float
    bigram: float


KEPT = {
    "passes": int,
    "labels_are": Literal["own", "next", "neither"] | None,
    "eval_digests": dict[str, int],
    "losses_by_position": list[tuple[int, float, float]],
    "envelope_losses": list[_EnvelopeRecord],
    "rows_by_step": list[int],
    "cannot_judge": dict[str, str],
    "_uneven_steps": int,
    "_floor_sums": tuple[int, float],
    "_rates": tuple[int, float],
}
LATER_COUNTS = ("bos_texts", "double_bos")  # older checkpoints lack them


def _is_alike(array: np.ndarray, other: np.ndarray) -> bool:
    """Of one kind and shape, but for the length and the bytes of a number."""
    return array.dtype.kind == other.dtype.kind and array.ndim == other.ndim and array.shape[1:] == other.shape[1:]


def _part_of(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def _mean_weight(weights: list[list[float]]) -> float | None:
    """Of the rows' `[lowest, mean, highest]`: None where nothing was scored, or positions weigh differently."""
    scored = [row for row in weights if row[2] > 0]
    if not scored or max(row[2] for row in scored) > WEIGHTED_LOSS * min(row[0] for row in scored):
        return None
    return statistics.fmean(row[1] for row in scored)


def check_weights(
    step: int,
    tokens_seen: int,
    counts: dict[tuple, int],
    weights: dict[tuple, float],
    facts: RunFacts,
    num_positions: int = 0,
) -> Finding | None:
    """`counts`: scored positions of each micro-batch `(rank, micro_step)` of one step; `weights`: what one of them
    weighs in the gradient of its rank; `num_positions`: all of the step, masked or not.

    Gradients are averaged over ranks, so a position should weigh world_size / (scored positions of the step).
    """
    total = sum(counts.values())
    sums = {place: weights[place] * counts[place] for place in counts}
    factor = sum(sums.values()) / facts.world_size
    evidence = {"scored": list(counts.values()), "weights": list(weights.values()), "factor": factor}
    steps, ranks = facts.gradient_accumulation_steps, facts.world_size
    wrong = {number for k in (steps, ranks, steps * ranks) for number in (k, 1 / k)}
    if num_positions and not facts.label_smoothing:  # divided by masked positions too
        wrong.add(total / num_positions)
    ratio = next((r for r in wrong if abs(r - 1) > 2 * UNEVEN and abs(factor / r - 1) < UNEVEN), None)
    groups = [counts] if facts.averages_over_ranks else [{p: n for p, n in counts.items() if p[0] == 0}]
    uneven = max(groups[0].values()) > (1 + 2 * UNEVEN) * min(groups[0].values())
    spread = max(weights[place] for place in groups[0]) / min(weights[place] for place in groups[0])
    if ratio is None and not (uneven and spread > 1 + UNEVEN):
        return None
    return Finding(
        "accumulation_mismatch",
        "warning",
        step,
        tokens_seen,
        found=f"the micro-batches of a step weigh {factor:.3g} together"
        if ratio is not None
        else f"a token weighs {spread:.2f} times as much in one micro-batch as in another",
        expected="1" if ratio is not None else f"the same in all: 1 of {total:,} scored tokens",
        likely_causes=(
            "the loss is not divided by the accumulation steps or ranks",
            "it is divided twice",
            "it is divided by all positions, masked ones too",
        )
        if ratio is not None
        else ("means of micro-batches are averaged, and they hold different numbers of scored tokens",),
        action="divide the sum of the losses by num_items_in_batch, the scored tokens of the whole step",
        evidence=evidence,
    )
