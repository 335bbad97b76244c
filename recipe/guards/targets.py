"""Which token each position is really scored on."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from recipe.guards.batches import IGNORE_INDEX, LabelCounts
from recipe.guards.guard import PROBE, CannotJudge, Finding, Guard, NotApplicable, Verdict
from recipe.guards.head import MIN_POSITIONS, POSITIONS, count_hits
from recipe.guards.labels import (
    are_noisy,
    count_changes,
    judge_answers,
    judge_change,
    judge_declared,
    judge_last_position,
    judge_prompts,
    judge_softmax,
    judge_unscored,
    name_labels,
    share_off,
)
from recipe.guards.objective import most, shifts_of
from recipe.guards.recording import HeadCall

COUNTS = ("positions", "shift_0", "shift_1", "shift_2", "elsewhere")  # of `count_hits`
# Of each id: what is found, likely causes, action.
TEXTS = {
    "missing_label_shift": (
        "loss target = token i",
        ("labels passed unshifted (and the model does not shift)", "a loss of your own without the shift"),
        "shift once: labels = input_ids for a model that shifts, else compare logits[:, :-1] with labels[:, 1:]",
    ),
    "double_label_shift": (
        "loss target = token i+2",
        ("shifted by collator and model", "shifted in the dataset and by the model"),
        "pass labels = input_ids, unshifted: Hugging Face models shift them inside the loss",
    ),
    "wrong_loss_target": (
        "loss target is neither token i, i+1 nor i+2",
        ("labels of another row (or remapped, shuffled)", "logits cut or reordered before the loss"),
        "print one row of input_ids beside its labels as the loss function receives them",
    ),
}
NEGATED = (  # found, expected, causes, action
    *("the loss is negated: training makes it worse", "cross entropy", ("a minus sign before the loss",)),
    "return the cross entropy itself, and let the optimizer minimize it",
)


class LossTarget(Guard):
    """The loss is not computed on the next token.

    When: before step 1, at step 20 and when a loss curve has to be explained. During training the labels of all rows
        at every step, and at every second one 18 positions in up to 4 rows of each micro-batch (of more than 8, of one
        by turns, and of all once all have had their turn).
    Measured: what the loss is, by changing up to 8 labels a row, else tokens, at the same logits: the gradient there
        moves where a changed one is the target, and with what sign. Most targets so found at token i or i+2 are an
        error in any loss (preferences, mixtures, several heads). The gradient of a cross entropy is `w (p -
        onehot(y))`, so its one negative entry is the target y that is really used. Positions count whose token and the
        next two all differ, at least 8 in a row. A row is at fault with more than half of its targets at token i or
        i+2, or a tenth elsewhere (half in the samples during training). If the loss follows labels that differ from
        the tokens in less than half of the places, it is information (token dropout). Before step 1 also a warning if
        over 1 % of the positions with a label are not scored (information for a loss of your own, unless it scores 8
        whose label is masked, and at most 1 % of the others), or if the last position of most rows is; an error if the
        loss of an untrained model is minus a cross entropy. Labels: once 64 have shown what they are in this run (90 %
        the token itself, or the next, of a whole micro-batch or of each of 75 % of its rows), a row with less than
        half, unless half of it stands behind one token (a mask). A warning
        where 4 steps or more had at most 1 % other labels, and then 16 in a row have over 5 %: from some step on
        tokens or labels are changed on the way. A warning before step 1 where a loss that follows no label is linear
        in the probabilities, and where the answer of every row of the first micro-batch (4 at least) begins with a
        copy of its masked prompt, of 8 tokens or more; and where the dataset's labels mask a prompt in all of 64 rows
        that are spread over it, and no text of the first micro-batch is masked.
    Try (missing_label_shift): `labels = input_ids` for a Hugging Face model, which shifts inside. A loss of your own
        must compare `logits[:, :-1]` with `labels[:, 1:]`.
    Try (double_label_shift): removing your own shift; pass labels unshifted.
    Try (wrong_loss_target): printing one row of `input_ids` beside its `labels` where the loss function receives them.
    Cannot see: sharded weights, a loss without logits ("cannot judge"); other losses than a next-token cross entropy,
        but for the shift ("not applicable"); a few wrong targets in each row after step 1. A fused loss without logits
        is judged by the gradient at the last hidden state (plain linear heads; every 8th micro-batch during training),
        a compiled model by its labels alone during training.
    """

    ids = {
        "missing_label_shift": "Each position is scored on the token it can already see, so the model learns to copy.",
        "double_label_shift": "Labels are shifted twice: the model learns the token after the next.",
        "wrong_loss_target": "The loss is not computed on the next token.",
    }
    taps = ("tokens", "head")
    explains_symptoms = judges_target = True
    rules_out = {"missing_label_shift": "shift", "double_label_shift": "shifted twice"}
    # Most of a row's targets. By chance a target equals another token of the row in two or three of a hundred
    # positions (measured over forty model classes), so half is far from both sides.
    MAJORITY = 0.5
    # Targets at none of the shifts 0, 1, 2: a few may be chance or special handling, a tenth is not. Chosen, not
    # measured, above the two or three of a hundred; of the 16 positions that are sampled in a row as MAJORITY.
    MAX_ELSEWHERE, MAX_ELSEWHERE_SAMPLED = 0.1, 0.5
    # Of the scored targets, equal to the labels of the next position. Chosen, not measured: all but ties by chance.
    FOLLOWED = 0.95
    # Scored labels, and the share that says what labels are in this run; then the share of a row's labels. Chosen, not
    # measured: of 64 a share of 0.9 is known to 0.04; label noise and denoising objectives stay far from half.
    LABELS_TO_LEARN, LABEL_CLEAR, LABEL_MAJORITY = 64, 0.9, 0.5
    # Changed targets of one head that tell its shift. Derived: no tie by chance, as the next token is asked first.
    MIN_MOVES = 2
    MIN_LOSSES = 30  # at a place of the block, to be evidence. Chosen, not measured.

    def setup(self, run) -> None:
        # "own", "next" or "neither", None so far; count and sum of losses at 0, 1, 2-3, 4-7, ...; of `count_changes`
        self.state = {"labels_are": None, "losses_by_position": [], "changes": [0, 0]}

    def on_resume(self, step: int) -> None:
        self.state["labels_are"] = None  # the data may have been fixed

    def evidence(self) -> dict:
        """Mean loss by position in the block: it falls where a model learns from context."""
        places = enumerate(self.state["losses_by_position"])
        enough = {1 << i >> 1: total / count for i, (count, total) in places if count >= self.MIN_LOSSES}
        return {"loss_by_position": {str(first): mean for first, mean in enough.items()}}

    def inspect(self, run) -> Iterator[Verdict]:
        yield from filter(None, [judge_answers(self.wrong_target, run.trainer)])

    def wrong_target(self, *arguments, **keywords) -> Finding:
        return self.finding(*arguments, id="wrong_loss_target", **keywords)

    # --- the probe

    def probe(self, batch) -> Iterator[Verdict]:
        """The shift of any loss whose targets are tokens, as what was changed shows it. Of a next-token cross entropy
        also the targets of all positions."""
        objective, heads = batch.objective, batch.recording.heads
        yield from judge_softmax(self.wrong_target, batch)
        if not objective.has_shift:
            raise NotApplicable(f"the objective is {objective.words}")
        findings = [self.finding("error", *NEGATED, id="wrong_loss_target")] if objective.is_negated else []
        shifts = shifts_of(objective.moves, heads)
        if objective.is_next_token and not findings:
            # Heads further on predict later tokens: what they showed when one was changed is all that is asked
            told = [head for number, head in enumerate(heads) if len(heads) == 1 or most(shifts[number]) == 1]
            findings = [finding for head in told if (finding := self._judge_head_call(batch, head, bool(shifts[0])))]
        if not findings and (
            finding := self.judge_shifts(shifts) or judge_prompts(self.wrong_target, batch.seen_tokens(all_rows=True))
        ):
            findings = [finding]
        if not findings and objective.is_next_token and len(heads) == 1:
            findings = list(filter(None, [judge_declared(self.wrong_target, batch, heads[0].targets)]))
        yield from self._verdicts(findings, PROBE)
        if objective.is_next_token and batch.is_first:
            labels = LabelCounts.of([batch.seen_tokens(all_rows=True)])
            yield from self._verdicts(self._judge_rows_of(labels), "labels")

    def _judge_head_call(self, batch, head: HeadCall, is_known: bool) -> Finding | None:
        """`is_known`: what was changed has shown the shift, so that too few clear positions are no reason."""
        found, labels = head.targets, batch.inputs.get("labels")
        ids, labels = (batch.inputs["input_ids"] if each is None else each for each in (head.ids, labels))
        try:
            finding = self.judge(ids, found.targets, labels)
        except CannotJudge:
            if not is_known:
                raise
            return None
        finding = finding or judge_unscored(self.wrong_target, found, labels, batch.has_own_loss)
        return finding or judge_last_position(self.wrong_target, ids, found, labels)

    @classmethod
    def judge_shifts(cls, shifts: list[list[int | None]]) -> Finding | None:
        """`shifts`: for each time that the head ran, which token each changed target was: 0 the one that the model
        sees there, 1 the next, 2 the one after, None another. Heads further on may predict later tokens."""
        mostly = {most(each): each for each in shifts if len(each) >= cls.MIN_MOVES}
        shift = next((shift for shift in (0, 1, 2) if shift in mostly), 1)
        if shift == 1:
            return None
        name = "missing_label_shift" if shift == 0 else "double_label_shift"
        what, causes, action = TEXTS[name]
        found = f"{what} ({mostly[shift].count(shift)} of {len(mostly[shift])} changed ones)"
        return cls.finding("error", found, "token i+1", causes, action, {"changed": len(mostly[shift])}, id=name)

    def _verdicts(self, findings: list[Finding], check: str) -> Iterator[Verdict]:
        """Of each id the first finding."""
        for name in self.ids:
            finding = next((finding for finding in findings if finding.id == name), None)
            yield replace(finding, check=check) if finding else self.clear(name, check)

    @classmethod
    def judge(cls, ids: torch.Tensor, targets: torch.Tensor, labels: torch.Tensor) -> Finding | None:
        """The recovered targets against the next token of the input: the first faulty row's finding. All `[rows,
        positions]`. Raises `CannotJudge` with too few clear positions."""
        if ids.shape != targets.shape:
            raise CannotJudge(f"logits for {tuple(targets.shape)} positions, input_ids {tuple(ids.shape)}")
        counts = enumerate(count_hits(ids, targets).tolist())
        hits = {row: each for row, each in counts if each[0] >= MIN_POSITIONS}
        if not hits:
            raise CannotJudge(f"too few scored positions before two other tokens: {MIN_POSITIONS} are needed in a row")
        finding = next(iter(cls.judge_rows(hits, cls.MAX_ELSEWHERE)), None)
        are_few = all(elsewhere < cls.MAJORITY * count for count, *_, elsewhere in hits.values())
        if (
            finding is None
            or finding.id != "wrong_loss_target"
            or not (are_few and following(targets, labels) >= cls.FOLLOWED)
        ):
            return finding
        causes = ("on purpose: tokens are replaced (token dropout, denoising)", "noise in the labels")
        action = "nothing, if it is on purpose; else print one row of input_ids beside its labels"
        return replace(finding, severity="info", likely_causes=causes, action=action)

    @classmethod
    def judge_rows(cls, hits: dict[int, Sequence[int]], max_elsewhere: float) -> list[Finding]:
        """Of the faulty rows. `hits`: of `count_hits`, by row."""
        findings = [cls.judge_row(row, counts, max_elsewhere) for row, counts in hits.items()]
        faulty = [finding for finding in findings if finding is not None]
        where = f", in {len(faulty)} of {len(hits)} rows" if len(faulty) < len(hits) else ""
        return [replace(finding, found=finding.found + where) for finding in faulty]

    @classmethod
    def judge_row(cls, row: int, hits: Sequence[int], max_elsewhere: float) -> Finding | None:
        count, shift_0, _, shift_2, elsewhere = hits
        limits = (cls.MAJORITY, cls.MAJORITY, max_elsewhere)
        for name, number, limit in zip(TEXTS, (shift_0, shift_2, elsewhere), limits, strict=True):
            if count >= MIN_POSITIONS and number > limit * count:
                what, causes, action = TEXTS[name]
                found = f"{what} ({number} of {count} positions)"
                evidence = {"row": row, **dict(zip(COUNTS, hits, strict=True))}
                return cls.finding("error", found, "token i+1", causes, action, evidence, id=name)
        return None

    # --- during training

    def observe(self, step) -> Iterator[Verdict]:
        if not step.run.is_next_token:
            return
        self.max_elsewhere = 1.0 if are_noisy(step) else self.MAX_ELSEWHERE_SAMPLED
        found = [(finding, rank, micro) for rank, micro, each in step.head for finding in self._judge_head(each)]
        for finding, rank, micro_step in found:
            finding.evidence.update(rank=rank, micro_step=micro_step)
        if step.head:
            yield from self._verdicts([finding for finding, *_ in found], "head")
        if step.targets:
            yield from self._verdicts(self._judge_rows_of(step.labels), "labels")
            if self.state["labels_are"] in ("own", "next"):
                yield self._judge_change(step) or self.clear("wrong_loss_target", "change")

    def _judge_rows_of(self, labels: LabelCounts) -> list[Finding]:
        known = self.state["labels_are"] or name_labels(labels, self.LABELS_TO_LEARN, self.LABEL_CLEAR)
        self.state["labels_are"] = known
        return list(self.judge_labels(known, labels))

    def _judge_head(self, sampled: dict) -> list[Finding]:
        place = sampled["first_position"] + POSITIONS // 2
        for hits, loss in zip(sampled["hits"], sampled["losses"], strict=True):
            if hits[0]:
                add_loss(self.state["losses_by_position"], place, loss)
        return self.judge_rows(dict(enumerate(sampled["hits"], sampled["first_row"])), self.max_elsewhere)

    def _judge_change(self, step) -> Finding | None:
        off, labels_are = share_off(step, self.state["labels_are"]), self.state["labels_are"]
        if off is None:
            return None
        self.state["changes"] = count_changes(*self.state["changes"], off)
        return judge_change(self.wrong_target, *self.state["changes"], off, step.number, labels_are)

    @classmethod
    def judge_labels(cls, labels_are: str | None, labels: LabelCounts) -> Iterator[Finding]:
        """Of each row whose labels are not as in most rows."""
        if labels_are in (None, "neither"):
            return
        count, right, other = labels.scored, labels.own, labels.following
        if labels_are == "next":
            right, other = other, right
        shifted = "double_label_shift" if labels_are == "own" else "missing_label_shift"
        is_off = (right < cls.LABEL_MAJORITY * count) & (labels.hidden < cls.LABEL_MAJORITY * count)
        for at in np.flatnonzero((count >= MIN_POSITIONS) & is_off).tolist():
            place = {name: int(getattr(labels, name)[at]) for name in ("row", "rank", "micro_step")}
            fit = f"{right[at]} of {count[at]} fit"
            yield cls.finding(
                "error",
                id=shifted if other[at] > cls.LABEL_MAJORITY * count[at] else "wrong_loss_target",
                found=f"labels of row {place['row']} differ from others ({fit})",
                expected=f"{labels_are} tokens",
                causes=("labels shifted or shuffled",),
                action="print this row's input_ids beside its labels",
                evidence={**place, "fit": int(right[at])},
            )


def following(targets: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of the targets that are the labels of the next position."""
    targets, labels = targets[:, :-1], labels[:, 1:]
    if labels.shape != targets.shape:
        return 0.0
    return float((targets == labels)[targets != IGNORE_INDEX].float().mean())


def add_loss(totals: list[list[float]], position: int, loss: float) -> None:
    """Counts and sums by position: 0, 1, 2-3, 4-7, ..."""
    bucket = position.bit_length()
    totals.extend([0, 0.0] for _ in range(bucket + 1 - len(totals)))
    totals[bucket] = [totals[bucket][0] + 1, totals[bucket][1] + loss]
