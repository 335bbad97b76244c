"""What the loss is, found out by intervention.

Some labels, then some tokens of one micro-batch are changed, while all models are given the embeddings of the tokens
as they were: logits stay the same, so what moves in the loss's gradient there is what the loss makes of the change.
For a cross entropy whose target is the changed token a, now b, it moves by `w (onehot(a) - onehot(b))` with w > 0, at
the position that is scored on it, and nowhere else. What an intervention shows beats what a gradient looks like: a
teacher that is sure looks like wrong labels, and follows no label.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from recipe.guards.guard import CannotJudge
from recipe.guards.head import count_hits
from recipe.guards.ngrams import UNTRAINED_SHARE
from recipe.guards.recording import HeadCall, Recording
from recipe.guards.run import is_encoder

# Cells that are changed in a row. Chosen, not measured: with 4 rows 32 of them, so that a few ties do not matter.
CELLS = 8
# Of a position's movement, in one direction. Derived: a weight that changes moves half along `onehot(a) - onehot(b)`.
ALONG = 0.8
# Of the gradient's largest energy at a position. Derived: what does not move is equal bit for bit.
MOVED = 1e-8
# Of the moves: most. Of their signs: all but ties.
MAJORITY, ALIKE = 0.5, 0.9
# Relative, of the loss's change to the one that the moves foretell. Derived: exact in fp32, to 0.4 % in bf16.
FORETOLD = 0.02
# Of the largest weight in a row, or of a row, to the smallest: such that are alike. Derived: equal but for rounding,
# 0.4 % in bf16.
LIKE_WEIGHTS = 1.02
# Integer tensors of a batch that are no targets.
NO_TARGETS = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "decoder_input_ids", "seq_idx")

NEXT_TOKEN = "a next-token cross entropy"
WEIGHTED_ROWS = "a cross entropy whose rows weigh differently (a policy loss)"


class Cell(NamedTuple):
    """What is changed: `old` becomes `new`."""

    row: int
    place: int
    old: int
    new: int


class Move(NamedTuple):
    """A position that was scored on `cell.old` and is now on `cell.new`. `weight`: below 0 if it is pushed away."""

    call: int
    row: int
    position: int
    cell: Cell
    weight: float


@dataclass(frozen=True)
class Objective:
    """`words`: what it is. `is_next_token`: a cross entropy with one target a position, which has to be the next of
    `input_ids`. `has_shift`: at least a part of it scores positions on tokens that should be the next ones.
    `is_denoising`: it restores tokens that are hidden from the model, which may look both ways. `is_negated`: a
    new model is made to unlearn what it does not know. `follows_nothing`: neither labels nor tokens, as where there is
    a teacher. `moves`: of what was changed."""

    words: str
    is_next_token: bool = False
    has_shift: bool = False
    is_denoising: bool = False
    is_negated: bool = False
    scores_rows: bool = False
    follows_nothing: bool = False
    moves: tuple[Move, ...] = ()


def find_objective(record: Callable[[dict], Recording], base: Recording, inputs: dict, run) -> Objective:
    """`base`: the loss of `inputs`. `record`: the loss of other inputs, computed with the embeddings of `base`.

    Several ranks call `record` equally often, as a `compute_loss` may gather. Raises `CannotJudge`.
    """
    labels = inputs.get("labels")
    if run.world_size == 1 and _is_integer(labels) and not (labels >= 0).any():
        raise CannotJudge("no label of the first batch is scored")
    if not base.loss.isfinite().all():
        raise CannotJudge("the first loss is not finite")
    if base.scores_rows:
        return Objective("a score of whole rows (classification, regression or reward)", scores_rows=True)
    if not base.heads:
        raise CannotJudge(base.why_no_heads())
    found, is_mapped = {}, False
    for name in [*target_names(inputs), "input_ids"]:
        if found and run.world_size == 1:
            break
        changed, cells = change(inputs, name, base)
        after = record(changed)
        moves, goes_elsewhere = find_moves(base, after, cells)
        is_mapped |= name != "input_ids" and goes_elsewhere  # a sure teacher goes over to another token too
        if len({move.cell for move in moves}) > MAJORITY * len(cells) and not found:
            found[name] = moves, float(after.loss - base.loss)
    if not found:
        return _without_moves(base, is_mapped)
    ((name, (moves, change_of_loss)),) = found.items()
    return name_objective(name, moves, change_of_loss, base, run)


def target_names(inputs: dict) -> list[str]:
    """Tensors of the batch that may be targets, `labels` first."""
    names = [name for name, value in inputs.items() if name not in NO_TARGETS and _is_integer(value)]
    names = [name for name in names if inputs[name].numel() and int(inputs[name].max()) > 1]
    return sorted(names, key=lambda name: name != "labels")


def _is_integer(value) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 2 and value.dtype in (torch.int64, torch.int32)


# --- the change


def change(inputs: dict, name: str, base: Recording) -> tuple[dict, list[Cell]]:
    """Up to CELLS values of each row of `inputs[name]`, at places that seem to be scored, become other ones of it."""
    values = inputs[name]
    usable, active = values >= 0, torch.zeros_like(values, dtype=torch.bool)
    mask = inputs.get("attention_mask")
    if name == "input_ids" and isinstance(mask, torch.Tensor) and mask.shape == values.shape:
        usable = usable & (mask != 0)
    for call in base.heads:
        if call.gradient.shape[:2] == values.shape:
            active |= call.gradient.abs().amax(dim=-1) > 0
    before = torch.zeros_like(active)
    before[:, 1:] = active[:, :-1]
    choices = [usable & active & before, usable & (active | before), usable]
    pool = values[usable].unique().tolist()
    cells, changed = [], values.clone()
    for row in range(len(values)):
        places = next((p for p in (part[row].nonzero().flatten().tolist() for part in choices) if p), [])
        step = max(1, len(places) / CELLS)
        for number in range(min(CELLS, len(places))):
            place = places[int((number + 0.5) * step) if len(places) > CELLS else number]
            old = int(values[row, place])
            others = [value for value in pool if value != old] or [old + 1 if old == 0 else old - 1]
            new = others[(7 * len(cells) + 3) % len(others)]
            cells.append(Cell(row, place, old, new))
            changed[row, place] = new
    return inputs | {name: changed}, cells


# --- what moves


def find_moves(base: Recording, after: Recording, cells: Sequence[Cell]) -> tuple[tuple[Move, ...], bool]:
    """And whether most of what moves goes from some token to another one, though not to those of the cells: targets
    that are mapped to others."""
    moves, mapped, number = [], 0, 0
    olds, news = [cell.old for cell in cells], [cell.new for cell in cells]
    if len(base.heads) != len(after.heads):
        raise CannotJudge("the head runs another number of times when one token is changed")
    for place, (call, other) in enumerate(zip(base.heads, after.heads, strict=True)):
        if call.gradient.shape != other.gradient.shape or not cells:
            raise CannotJudge("logits have another shape when one token is changed")
        for row in range(len(call.gradient)):
            delta = (other.gradient[row] - call.gradient[row]).float()
            energy, least = delta.square().sum(-1), MOVED * call.gradient.float().square().sum(-1).max()
            for position in ((energy > least) & (energy > 0)).nonzero().flatten().tolist():
                number += 1
                weights, lengths = call.along(delta[position], olds, news)
                best = _nearest(weights.square() * lengths, cells, row, position)
                if weights[best] ** 2 * lengths[best] > ALONG * energy[position]:
                    moves.append(Move(place, row, position, cells[best], float(weights[best])))
                elif not call.is_hidden:
                    high, low = delta[position].max(), delta[position].min()
                    mapped += bool((high - low) ** 2 / 2 > ALONG * energy[position])
    return tuple(moves), mapped > MAJORITY * number


def _nearest(explained: torch.Tensor, cells: Sequence[Cell], row: int, position: int) -> int:
    """Of the changes that explain a movement best; in a small vocabulary several are alike."""
    best = (explained >= (1 - 1e-3) * explained.max()).nonzero().flatten().tolist()
    return min(best, key=lambda number: (cells[number].row != row, abs(cells[number].place - position)))


def relation(move: Move, ids: torch.Tensor) -> int | None:
    """Which token of what the model is given a position was scored on: 0 the one it sees there, 1 the next, 2 the one
    after; None another."""
    row = ids[move.row].tolist()
    for shift in (1, 0, 2):
        if move.position + shift < len(row) and row[move.position + shift] == move.cell.old:
            return shift
    return None


def shifts_of(moves: Sequence[Move], heads: Sequence[HeadCall]) -> list[list[int | None]]:
    """For each time that the head ran, the `relation` of what moved."""
    known = [[move for move in moves if move.call == number] for number in range(len(heads))]
    return [
        [relation(move, head.ids) for move in own if head.ids is not None]
        for own, head in zip(known, heads, strict=True)
    ]


def most(shifts: Sequence[int | None]) -> int | None:
    """What most of them are; None where no shift is that of most."""
    return next((shift for shift in (0, 1, 2) if shifts.count(shift) > MAJORITY * len(shifts)), None)


# --- what it is


def name_objective(name: str, moves: tuple[Move, ...], change_of_loss: float, base: Recording, run) -> Objective:
    """`name`: of what was changed, `change_of_loss`: what that did to the loss."""
    signs = sum(move.weight > 0 for move in moves) / len(moves)
    what = "labels" if name == "labels" else "tokens" if name == "input_ids" else name
    width = base.heads[0].num_classes
    if width <= MAJORITY * run.embedding_rows:
        return Objective(f"classification of tokens ({width} classes)", moves=moves)
    if _is_denoising(moves, base.heads, is_encoder(run.model)):
        return Objective("denoising of masked tokens", is_denoising=True, moves=moves)
    if getattr(getattr(run.model, "config", None), "is_encoder_decoder", False):
        return Objective("that of an encoder-decoder", has_shift=True, moves=moves)
    is_weighted = weighs_rows(moves, base.heads)
    is_minus = (
        signs <= 1 - ALIKE and not is_weighted and float(base.loss) < 0 and _is_foretold(change_of_loss, moves, base)
    )
    if is_minus and _knows_nothing(moves, base, run):
        return Objective(NEXT_TOKEN, is_next_token=True, has_shift=True, is_negated=True, moves=moves)
    if signs <= 1 - ALIKE:
        return Objective(f"gradient ascent on the {what}, or unlikelihood", has_shift=True, moves=moves)
    if signs < ALIKE:
        return Objective(f"a preference or policy loss on the {what}", has_shift=True, moves=moves)
    only = [base.heads[m.call].is_only(m.row, m.position, m.cell.old, m.weight) for m in moves]
    if sum(only) < MAJORITY * len(moves) or len({move.call for move in moves}) < len(base.heads):
        words = f"a cross entropy with the {what}, mixed with another loss (distillation)"
        return Objective(words, has_shift=True, moves=moves)
    if name == "input_ids" and not _is_foretold(change_of_loss, moves, base):
        words = "no cross entropy, but a loss of log-probabilities (a preference)"
        return Objective(words, has_shift=True, moves=moves)
    if is_weighted:
        return Objective(WEIGHTED_ROWS, has_shift=True, moves=moves)
    return Objective(NEXT_TOKEN, is_next_token=True, has_shift=True, moves=moves)


def weighs_rows(moves: Sequence[Move], heads: Sequence[HeadCall]) -> bool:
    """Whether the tokens of one row weigh more than those of another, and rows' lengths do not explain it, as for a
    policy's advantages. Weights that differ inside of a row are those of tokens, and are left alone."""
    call, own = moves[0].call, {}
    for move in moves:
        if move.call == call:
            own.setdefault(move.row, []).append(abs(move.weight))
    if not all(_are_alike(weights) for weights in own.values()):
        return False
    is_scored = heads[call].gradient.abs().amax(dim=-1) > 0
    places = [is_scored[row].nonzero().flatten().tolist() for row in own]
    lengths = [[len(each) + more for each in places] for more in (0, 1)]  # those scored, then the whole text
    lengths += [[each[-1] + more for each in places] for more in (1, 2)]
    means = [statistics.fmean(weights) for weights in own.values()]
    scaled = [[w * n**power for w, n in zip(means, ns, strict=True)] for ns in lengths for power in (0, 0.5, 1)]
    return not any(map(_are_alike, scaled))


def _are_alike(weights: Sequence[float]) -> bool:
    return max(weights) <= LIKE_WEIGHTS * min(weights)


def have_both_signs(moves: Sequence[Move], others: Sequence[Move]) -> bool:
    """Of the moves of two parts of a micro-batch: whether rows are pulled and others pushed away."""
    sums: dict[tuple[bool, int], float] = {}
    for part in (moves, others):
        for move in part:
            sums[part is moves, move.row] = sums.get((part is moves, move.row), 0.0) + move.weight
    return min(sums.values()) < 0 < max(sums.values())


def _is_denoising(moves: Sequence[Move], heads: Sequence[HeadCall], is_encoder: bool) -> bool:
    """Whether the targets are hidden from the model, behind one and the same token; from an encoder, behind any."""
    known = [move for move in moves if heads[move.call].ids is not None]
    hidden = [move for move in known if relation(move, heads[move.call].ids) is None]
    if not known or len(hidden) <= MAJORITY * len(known):
        return False
    if is_encoder:
        return True
    for shift in (0, 1):
        seen = [
            int(heads[move.call].ids[move.row, move.position + shift])
            for move in hidden
            if move.position + shift < heads[move.call].ids.shape[1]
        ]
        if seen and max(map(seen.count, set(seen))) > MAJORITY * len(hidden):
            return True
    return False


def _is_foretold(change_of_loss: float, moves: Sequence[Move], base: Recording) -> bool:
    """At the same logits a cross entropy changes by `w (z_a - z_b)`; a preference loss has a reference beside it."""
    logits = [base.heads[move.call].logits(move.row, move.position) for move in moves]
    parts = [m.weight * float(z[m.cell.old] - z[m.cell.new]) for m, z in zip(moves, logits, strict=True)]
    rounding = 4 * torch.finfo(base.loss.dtype).eps * abs(float(base.loss))
    return abs(change_of_loss - sum(parts)) <= FORETOLD * sum(map(abs, parts)) + rounding


def _knows_nothing(moves: Sequence[Move], base: Recording, run) -> bool:
    """A model that was trained may be made to forget on purpose."""
    logits = [base.heads[move.call].logits(move.row, move.position) for move in moves]
    losses = [float(z.logsumexp(0) - z[m.cell.old]) for m, z in zip(moves, logits, strict=True)]
    guess = math.log(base.heads[0].num_classes)
    return run.is_new_model and not run.step and statistics.fmean(losses) >= UNTRAINED_SHARE * guess


def _without_moves(base: Recording, is_mapped: bool) -> Objective:
    """What was changed is no target. Labels that reach the loss as other tokens are a cross entropy all the same.
    Where no embedding was seen, the model's logits followed the tokens: then the gradient has to tell."""
    hits = [0, 0, 0, 0, 0]
    for call in base.heads:
        if not base.embedded and call.ids is not None:
            hits = count_hits(call.ids, call.targets.targets).sum(dim=0).tolist()
    if is_mapped or max(hits[1:4]) > MAJORITY * hits[0]:
        return Objective(NEXT_TOKEN, is_next_token=True, has_shift=True)
    return Objective("no cross entropy with labels or tokens (distillation, a score)", follows_nothing=True)
