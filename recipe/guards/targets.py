"""Which token each position is scored on: by the gradient at the logits, and by the labels beside the tokens."""

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from recipe.guards.batches import IGNORE_INDEX, LABEL_IS_NEXT, LABEL_IS_TOKEN
from recipe.guards.guard import PROBE, STEP, CannotJudge, Clear, Finding, Guard, Verdict
from recipe.guards.head import MIN_POSITIONS, LossTargets, count_hits

UNSHIFTED, TWICE, WRONG = "missing_label_shift", "double_label_shift", "wrong_loss_target"
CAUSES = {  # id -> likely causes, what to do
    UNSHIFTED: (
        ("labels passed unshifted to a model that does not shift", "a loss of your own without the shift"),
        "shift once: labels = input_ids for a model that shifts, else compare logits[:, :-1] with labels[:, 1:]",
    ),
    TWICE: (
        ("labels shifted by the collator and again by the model", "labels already shifted in the dataset"),
        "pass labels = input_ids, unshifted: Hugging Face models shift them inside the loss",
    ),
    WRONG: (
        (
            "labels of another row or document",
            "labels remapped or shuffled",
            "logits cut or reordered before the loss",
        ),
        "print one row of input_ids beside its labels as the loss function receives them",
    ),
}


class LossTarget(Guard):
    """A position is scored on another token than the next one.

    When: before step 1, before step 21 and when a symptom is explained; then at every step.
    Measured: before step 1, on up to 4 rows of the first micro-batch, through the trainer's own `compute_loss`: the
        gradient of a cross entropy at the logits is `w (p - onehot(y))`, so its one negative entry is the target that
        is really used. Positions count where their token and the two after it differ, at least 8 in a row. More than
        half of a row's targets at i or at i+2 are an error, and so is a tenth or more at none of i, i+1, i+2. During
        training, in every second step, the same for 18 positions in each of up to 4 rows; and in every step the labels
        of every row beside its tokens, once 64 labels have shown what labels are in this run (over 0.9 of them the
        token itself, or the next).
    Measured (wrong_loss_target): Where the loss follows the labels, and these differ from the tokens in less than half
        of the places, it is information (token dropout). A warning where more than 1 % of the positions whose next
        label is a token get no gradient at all (information where `compute_loss` is your own; not judged where the
        mean loss is under 0.1 nats), and where the last position of most rows is scored.
    Try (missing_label_shift): `labels = input_ids` for a Hugging Face model, which shifts inside. A loss of your own
        must compare `logits[:, :-1]` with `labels[:, 1:]`.
    Try (double_label_shift): removing your own shift: pass labels unshifted.
    Try (wrong_loss_target): printing one row of `input_ids` beside its `labels` where the loss receives them.
    Cannot see: sharded weights (FSDP, DeepSpeed), a model that names no output embeddings, a head that runs several
        times in one loss. A fused loss that makes no logits is judged by the gradient at the last hidden state. A
        compiled model is probed eagerly; during training only its labels are read. A few wrong targets in each row
        after step 1.
    """

    ids = {
        UNSHIFTED: "Each position is scored on the token that it can see, so the model learns to copy.",
        TWICE: "Labels are shifted twice: the model learns the token after the next.",
        WRONG: "The loss is not computed on the next token.",
    }
    taps = ("tokens", "head")
    explains_symptoms = judges_target = True
    rules_out = {UNSHIFTED: "shift", TWICE: "shifted twice"}
    # A row is judged by the shift at which most of its targets lie. By chance a target equals another token of the row
    # in two or three of a hundred positions (measured over forty model classes), so half is far from both sides.
    MAJORITY = 0.5
    # Targets at none of the shifts 0, 1, 2: a few may be chance or special handling, a tenth is not. Chosen, not
    # measured, above the two or three of a hundred. Of the 16 positions sampled in a row: as MAJORITY.
    MAX_ELSEWHERE, MAX_ELSEWHERE_SAMPLED = 0.1, 0.5
    # Of the scored targets, equal to the labels of the next position: the loss follows the labels, so tokens were
    # replaced on purpose. Chosen, not measured: all but ties by chance.
    FOLLOWED = 0.95
    # Of the positions with a label: the loss depends on none of their logits. Chosen, not measured: a mask inside the
    # loss that is wrong takes a large part, one at the ends of four shards 2.4 % of 128 positions (zoo). A model's own
    # loss leaves out none; one that a user wrote may choose its positions.
    MAX_UNSCORED = 0.01
    # Nats, mean over the scored positions. A gradient is zero too where softmax rounds to 1, at a loss of 1e-7.
    # Chosen, not measured: a mean that a model with a tenth of its positions there stays far below.
    SURE = 0.1
    # Scored labels, and the share that says what labels are in this run. Chosen, not measured: of 64 a share of 0.9 is
    # known to 0.04.
    LABELS_TO_LEARN, LABEL_CLEAR = 64, 0.9
    # Of a row's labels. Chosen, not measured: label noise and denoising objectives stay far from it.
    LABEL_MAJORITY = 0.5
    # Losses that a place in the block needs, and standard errors by which the loss must fall from the first place to
    # the last: evidence beside a symptom. Chosen, not measured.
    POSITION_LOSSES, POSITION_ERRORS = 30, 3

    def setup(self, run) -> None:
        # `labels_are`: "own", "next" or "neither", once they are known. `by_position`: [count, sum, sum of squares] of
        # the sampled losses at positions 0, 1, 2-3, 4-7, ...
        self.world_size = run.world_size
        self.state = {"labels_are": None, "by_position": []}

    # --- before step 1

    def probe(self, batch) -> Iterator[Verdict]:
        found, ids, labels = batch.targets(), batch.inputs["input_ids"], batch.inputs["labels"]
        finding = self.judge(ids, found.targets, labels)
        finding = finding or self.judge_unscored(found, labels, batch.has_own_loss)
        finding = finding or self.judge_last_position(ids, found.targets, labels)
        for name in self.ids:
            yield finding if finding is not None and finding.id == name else self.clear(name, PROBE)

    @classmethod
    def judge(cls, input_ids: torch.Tensor, targets: torch.Tensor, labels: torch.Tensor | None = None):
        """Compare the recovered targets with the next token of the input. All `[rows, positions]`. Returns the first
        faulty row's finding. Raises `CannotJudge` with too few clear positions."""
        if input_ids.shape != targets.shape:
            raise CannotJudge(f"logits for {tuple(targets.shape)} positions, input_ids {tuple(input_ids.shape)}")
        counts = count_hits(input_ids, targets).tolist()
        judged = [number for number, row in enumerate(counts) if row[0] >= MIN_POSITIONS]
        if not judged:
            most = max(row[0] for row in counts)
            raise CannotJudge(
                f"{most} scored positions with three different tokens in a row; {MIN_POSITIONS} are needed"
            )
        faulty = [f for n in judged if (f := cls.judge_row(counts[n], n, cls.MAX_ELSEWHERE, PROBE)) is not None]
        if not faulty:
            return None
        finding = in_rows(faulty[0], len(faulty), len(judged))
        elsewhere = max(counts[number][4] / counts[number][0] for number in judged)
        if finding.id == WRONG and elsewhere < cls.MAJORITY and cls._follow(targets, labels):
            causes = ("tokens are replaced on purpose (token dropout, denoising)", "noise in the labels")
            action = "nothing, if it is on purpose; else print one row of input_ids beside its labels"
            return replace(finding, severity="info", likely_causes=causes, action=action)
        return finding

    @classmethod
    def judge_row(cls, hits: list[int], row: int, max_elsewhere: float, check: str = STEP) -> Finding | None:
        """The finding for one row of `count_hits`, None below MIN_POSITIONS."""
        count, own, following, after, elsewhere = hits
        if count < MIN_POSITIONS:
            return None
        if own > cls.MAJORITY * count:
            name, found = UNSHIFTED, f"loss target = token i ({own} of {count} positions)"
        elif after > cls.MAJORITY * count:
            name, found = TWICE, f"loss target = token i+2 ({after} of {count} positions)"
        elif elsewhere > max_elsewhere * count:
            name, found = WRONG, f"loss target is neither token i, i+1 nor i+2 ({elsewhere} of {count} positions)"
        else:
            return None
        evidence = {"row": row, "positions": count, "shift_0": own, "shift_1": following, "shift_2": after}
        evidence["elsewhere"] = elsewhere
        return cls.finding("error", found, "token i+1", *CAUSES[name], evidence, id=name, check=check)

    @classmethod
    def _follow(cls, targets: torch.Tensor, labels: torch.Tensor | None) -> bool:
        """Whether the targets are the labels of the next position nearly everywhere."""
        if labels is None or labels.shape != targets.shape:
            return False
        scored = targets[:, :-1] != IGNORE_INDEX
        return bool(((targets[:, :-1] == labels[:, 1:]) & scored).sum() >= cls.FOLLOWED * scored.sum())

    @classmethod
    def judge_unscored(cls, found: LossTargets, labels: torch.Tensor, is_own_loss: bool = False) -> Finding | None:
        """Positions that the loss does not depend on, though their next label is a token. Positions that are sure of
        their target (softmax rounds to 1) are silent too, so None where the model is. `is_own_loss`: the user's, which
        may leave positions out on purpose."""
        scored = found.targets != IGNORE_INDEX
        if labels.shape != scored.shape or not scored.any() or float(found.losses[scored].mean()) < cls.SURE:
            return None
        meant = labels[:, 1:] != IGNORE_INDEX
        silent, count = int((found.is_silent[:, :-1] & meant).sum()), int(meant.sum())
        if silent <= cls.MAX_UNSCORED * count:
            return None
        return cls.finding(
            "info" if is_own_loss else "warning",
            found=f"{silent} of {count} positions with a label are not scored",
            expected="all of them",
            causes=("a mask inside the loss that is wrong", "logits or labels cut before the loss"),
            action="if it is on purpose, set their labels to -100; else count what your loss averages over",
            evidence={"unscored": silent, "positions": count},
            id=WRONG,
            check=PROBE,
        )

    @classmethod
    def judge_last_position(cls, input_ids, targets, labels) -> Finding | None:
        """A row's last position has no next token in it. With labels that are the tokens themselves nothing says what
        it should be scored on. All `[rows, positions]`."""
        if labels.shape != input_ids.shape:
            return None
        own = (labels == input_ids).float().mean() > cls.MAJORITY
        scored = targets[:, -1] != IGNORE_INDEX
        if not own or int(scored.sum()) <= cls.MAJORITY * len(scored):
            return None
        return cls.finding(
            "warning",
            found=f"the last position of {int(scored.sum())} of {len(scored)} rows is scored, and has no next token",
            expected="no target there",
            causes=("labels are rolled over the batch: a row's last target is the first token of the next",),
            action="shift within each row, and leave its last position out",
            evidence={"rows": int(scored.sum()), "of": len(scored), "targets": targets[:, -1].tolist()},
            id=WRONG,
            check=PROBE,
        )

    # --- during training

    def observe(self, step) -> Iterator[Verdict]:
        found = [*self._judge_samples(step), *self._judge_labels(step)]
        by_id: dict[str, Verdict] = {finding.id: finding for finding in reversed(found)}
        if step.head or step.tokens:
            yield from (by_id.get(name, Clear(name)) for name in self.ids)

    def _judge_samples(self, step) -> Iterator[Finding]:
        for rank, micro_step, head in step.head:
            rows = enumerate(head["hits"], head["first_row"])
            found = [self.judge_row(hits, row, self.MAX_ELSEWHERE_SAMPLED) for row, hits in rows]
            faulty = [finding for finding in found if finding is not None]
            for finding in faulty:
                finding.evidence.update(rank=rank, micro_step=micro_step)
                yield in_rows(finding, len(faulty), len(found))
            place = head["first_position"] + head["positions"] // 2
            for hits, loss in zip(head["hits"], head["losses"], strict=True):
                if hits[0]:
                    add_loss(self.state["by_position"], place, loss)

    def _judge_labels(self, step) -> Iterator[Finding]:
        """Most rows' labels are the tokens themselves (or the next ones, for a model that does not shift): a row where
        they are something else is at fault."""
        for rank, micro_step, seen in step.tokens:
            count = seen.scored.sum(axis=1)
            flags = (LABEL_IS_TOKEN, LABEL_IS_NEXT)
            own, following = (((seen.flags & flag != 0) & seen.scored).sum(axis=1) for flag in flags)
            self._learn_labels(int(count.sum()), int(own.sum()), int(following.sum()))
            kind = self.state["labels_are"]
            if kind not in ("own", "next"):
                continue
            right, other = (own, following) if kind == "own" else (following, own)
            odd = (count >= MIN_POSITIONS) & (right < self.LABEL_MAJORITY * count)
            for row in np.flatnonzero(odd).tolist():
                is_shifted = other[row] > self.LABEL_MAJORITY * count[row]
                name = (TWICE if kind == "own" else UNSHIFTED) if is_shifted else WRONG
                place = f"row {row}{f' of rank {rank}' if self.world_size > 1 else ''}"
                yield self.finding(
                    "error",
                    found=f"labels of {place} are not as in the rows before ({right[row]} of {count[row]} fit)",
                    expected=f"labels that are the {kind} tokens, as in most rows",
                    causes=("some rows' labels are shifted or shuffled in the dataset or collator",),
                    action="print this row's input_ids beside its labels",
                    evidence={"rank": rank, "micro_step": micro_step, "row": row, "fit": int(right[row])},
                    id=name,
                )

    def _learn_labels(self, count: int, own: int, following: int) -> None:
        if self.state["labels_are"] is None and count >= self.LABELS_TO_LEARN:
            kind, most = max((("own", own), ("next", following)), key=lambda each: each[1])
            self.state["labels_are"] = kind if most / count > self.LABEL_CLEAR else "neither"

    def evidence(self) -> dict:
        """Mean loss by position in the block, and whether it falls: it does for a model that learns from context, not
        for one that copies. None while there are not two places with enough losses."""
        enough = [(i, *row) for i, row in enumerate(self.state["by_position"]) if row[0] >= self.POSITION_LOSSES]
        rows = [(i, total / n, max(0.0, squares / n - (total / n) ** 2) / n) for i, n, total, squares in enough]
        means = {("0" if i == 0 else f"{1 << (i - 1)}-{(1 << i) - 1}"): mean for i, mean, _ in rows}
        if len(rows) < 2:
            return {"loss_by_position": means, "falls": None}
        (_, first, first_error), (_, last, last_error) = rows[0], rows[-1]
        falls = first - last > self.POSITION_ERRORS * math.sqrt(first_error + last_error)
        return {"loss_by_position": means, "falls": falls}


def add_loss(totals: list[list[float]], position: int, loss: float) -> None:
    """Add a sampled loss to `[count, sum, sum of squares]` of its place: 0, 1, 2-3, 4-7, ..."""
    bucket = position.bit_length()
    totals.extend([0, 0.0, 0.0] for _ in range(bucket + 1 - len(totals)))
    count, total, squares = totals[bucket]
    totals[bucket] = [count + 1, total + loss, squares + loss * loss]


def in_rows(finding: Finding, num_faulty: int, num_judged: int) -> Finding:
    """Says how many rows it is about, where it is not about all of them."""
    if num_faulty == num_judged:
        return finding
    where = f"{finding.found}, in {num_faulty} of {num_judged} rows (row {finding.evidence['row']})"
    return replace(finding, found=where)
