"""What guards are given on the main process: a step of all ranks, an evaluation."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from recipe.guards.batches import LabelCounts
from recipe.guards.gradients import GradientNorms
from recipe.guards.guard import Guard
from recipe.guards.ngrams import NgramTap
from recipe.guards.records import StepRecord
from recipe.guards.run import Run
from recipe.guards.taps import LocalStep, Rates, Taps


def mean_loss(ranks: list[dict]) -> float:
    return sum(payload["loss"] for payload in ranks) / len(ranks)


def payloads_of(ranks: list[dict]) -> dict[str, list[Any]]:
    """By guard, one entry for each rank."""
    names = {name for payload in ranks for name in payload["payloads"]}
    return {name: [payload["payloads"].get(name) for payload in ranks] for name in names}


def norm_of(ranks: list[dict]) -> float | None:
    """The gradient's norm before clipping. Under FSDP2 each rank knows that of its part, and the parts add up.
    `ranks`: what `PendingStep.read` gave on each."""
    norms = [payload["grad_norm"] for payload in ranks]
    if None in norms or not ranks[0]["norm_is_of_part"]:
        return norms[0]
    return math.hypot(*norms)


def largest_rate(rates: Rates) -> float:
    """Of the parameter groups. One that is not known, as it lives on a device, counts as 1."""
    return max((1.0 if rate is None else rate for rate, _ in rates), default=0.0)


def plain_losses(metrics: dict[str, float], ranks: list[dict]) -> dict[str, float]:
    """The losses of an evaluation that lie among those of its batches; a sum over tokens or ranks does not."""
    losses = [loss for rank in ranks for loss in rank["losses"]] or [math.nan]
    named = {name: value for name, value in metrics.items() if name.startswith("eval_") and name.endswith("_loss")}
    return {name: value for name, value in named.items() if 0.95 * min(losses) <= value <= 1.05 * max(losses)}


@dataclass
class Step:
    """One step of all ranks. `head`: `(rank, micro_step, ...)`. `losses`: of each micro-batch, rank after rank.
    `labels`: of those whose tokens are known. `gradients`, `clipped_norm`, `num_items`: of the main process.
    `history`: the last steps' records, this one's the last. `passes`: over the data, 1 in the first. `documents`: of
    micro-batches that are not finite, where the callback can name them. `payloads`: by guard, one for each rank."""

    run: Run
    record: StepRecord
    history: list[StepRecord]
    passes: int
    losses: list[float]
    learning_rates: Rates
    scheduled_rates: list[float | None]
    labels: LabelCounts
    head: list[tuple[int, int, dict]]
    gradients: list[GradientNorms]
    clipped_norm: float | None
    num_items: float | None
    was_saved: bool
    documents: list[str]
    payloads: dict[str, list[Any]]
    ngrams: NgramTap | None

    @classmethod
    def gather(cls, run, taps: Taps, record, history, passes: int, local: LocalStep, ranks: list[dict]) -> "Step":
        """`ranks`: what `worker.read` gave on each. The n-gram models learn its tokens."""
        first = ranks[0]
        if taps.ngrams is not None:
            taps.ngrams.observe([p["ngrams"] for p in ranks if p["ngrams"] is not None], record["loss"])
            record |= taps.ngrams.bounds
        return cls(
            run=run,
            record=record,
            history=history,
            passes=passes,
            losses=[loss for payload in ranks for loss in payload["losses"]],
            learning_rates=local.learning_rates,
            scheduled_rates=local.scheduled_rates,
            labels=LabelCounts.join([payload["labels"] for payload in ranks]),
            head=[(rank, micro, rows) for rank, p in enumerate(ranks) for micro, rows in p["head"]],
            gradients=taps.name_gradients(first["gradients"]),
            clipped_norm=first["clipped_norm"],
            num_items=first["num_items"],
            was_saved=local.was_saved,
            documents=[name for payload in ranks for name in payload.get("documents", [])],
            payloads=payloads_of(ranks),
            ngrams=taps.ngrams,
        )

    @property
    def number(self) -> int:
        return self.record["step"]

    @property
    def tokens_seen(self) -> int:
        return self.record["tokens_seen"]

    def columns(self, count: int, *names: str) -> list[list]:
        """The last `count` records' values, a list for each name."""
        return [[record[name] for record in self.history[-count:]] for name in names]

    def payload(self, guard: Guard) -> Any:
        """What the guard's `measure` gave on the main process; None where it gave nothing."""
        return self.payloads.get(type(guard).__name__, [None])[0]

    def of_ranks(self, guard: Guard) -> list:
        """What its `measure` or `measure_tokens` gave on each rank, where it gave anything."""
        return [payload for payload in self.payloads.get(type(guard).__name__, []) if payload is not None]

    @cached_property
    def targets(self) -> dict[tuple[int, int], int]:
        """Scored ones by rank and micro-step, where the tokens are known."""
        return self.labels.by_micro_batch()

    @property
    def scored(self) -> list[int] | None:
        """Targets of each micro-batch, in the order of `losses`; None where not all tokens are known."""
        return list(self.targets.values()) if len(self.targets) == len(self.losses) else None

    @cached_property
    def num_labels(self) -> tuple[int, int, int]:
        """Scored; of these the token itself; and the next."""
        return tuple(int(each.sum()) for each in (self.labels.scored, self.labels.own, self.labels.following))


@dataclass
class Evaluation:
    """One evaluation. `ranks`: what `EvaluationTap.take` gave on each. `metrics`: what it reported. `repeated`: two
    losses of the pinned batch, empty where none is pinned."""

    run: Run
    step: int
    tokens_seen: int
    metrics: dict[str, float]
    ranks: list[dict]
    history: list[StepRecord]
    passes: int
    repeated: list[float]
