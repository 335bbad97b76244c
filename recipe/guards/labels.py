"""Labels that are changed on the way or hold their prompt, and a softmax over the wrong axis: parts of `LossTarget`.

`make`: its `finding`, with the id.
"""

import logging
from collections.abc import Callable, Iterator, Sized

import torch

from recipe.guards.accumulation import WEIGHTED_LOSS
from recipe.guards.batches import IGNORE_INDEX, SHORTEST_PROMPT, LabelCounts, SeenTokens
from recipe.guards.guard import PROBE, CannotJudge, Finding
from recipe.guards.head import MIN_POSITIONS, LossTargets, head_of
from recipe.guards.recording import record
from recipe.guards.sandbox import places_of, replaced

logger = logging.getLogger("recipe.guards")

# Share of a step's labels that are not the tokens: at most before a change, at least after it; steps before, and
# in a row after it. Derived: of a mixture that changes some batches on purpose, at any share q, the first 20 steps
# look like this in (1 - q)^4 q^16 < 5e-5 of the runs.
CHANGE_BEFORE, CHANGE_AFTER, STEPS_BEFORE, STEPS_AFTER = 0.01, 0.05, 4, 16
# Rows of the first micro-batch, and tokens of each prompt, that its answer repeats. Chosen, not measured.
REPEATED_ROWS, REPEATED_TOKENS = 4, 8
# Rows that are more than a trial. Chosen, not measured.
KTO_ROWS = 64
# Rows of the data that are looked at, and the least. Derived: where all of 64 have a prompt, rows without one are few,
# and a micro-batch of them alone is one in 170 at most (of two such rows, one in 2,500).
DECLARED_ROWS, LEAST_ROWS = 64, 8
# Of the absolute sums over the vocabulary, in their sum over a row; of the gradient's lowest entries, in these.
# Derived: fp32 leaves 1e-6 of either where it should be 0; measured 0.1 of the other (random logits, dim=1).
ZERO_SUM, CLEAR_SUM = 1e-4, 1e-3
# Times that the head's weights are larger, to see how the gradient follows; share of its variance that is left; least
# probability of a token that is looked at. Derived: fp32 leaves 1e-12; a Brier score leaves 1e-4.
SHARPER, LINEAR, LEAST_SHARE = 4.0, 1e-9, 1e-6
# Of the labels, and of the rows of a micro-batch. Chosen, not measured: a majority; and a clear one.
MOST, MOST_ROWS = 0.5, 0.75
# Of the positions with a label. Chosen, not measured: a wrong mask in the loss takes a large part, one at the ends
# of four shards 2.4 % of 128 positions (zoo); a model's own loss leaves out none.
MAX_UNSCORED = 0.01
# Nats, mean over the scored positions. A gradient is zero too where softmax rounds to 1, at a loss of 1e-7.
# Chosen, not measured: a model that is so sure at a tenth of its positions has a mean far below.
SURE = 0.1

Make = Callable[..., Finding]


def judge_answers(make: Make, trainer) -> Finding | None:
    """KTO learns from the difference between good and bad answers: there must be both."""
    rows, names = getattr(trainer, "train_dataset", None), {kind.__name__ for kind in type(trainer).__mro__}
    if "KTOTrainer" not in names or "label" not in (getattr(rows, "column_names", None) or ()):
        return None
    if not isinstance(rows, Sized) or len(rows) < KTO_ROWS or len(kinds := set(rows.unique("label"))) > 1:
        return None
    return make(
        "warning",
        found=f"the label of all {len(rows):,} answers is {kinds.pop()}",
        expected="good and bad ones",
        causes=("labels read as strings (of which bool() makes True)",),
        action="compare the column label with its source: bool('False') is True",
        evidence={"rows": len(rows)},
        check=PROBE,
    )


def judge_softmax(make: Make, batch) -> Iterator[Finding]:
    """Of any loss: over the wrong axis, or without its logarithm. `batch`: a `sandbox.Batch`."""
    sums = (judge_sums(make, head.targets) for head in batch.recording.heads)
    yield from list(filter(None, sums))[:1]
    if batch.objective.follows_nothing:
        yield from filter(None, [judge_linear(make, *probabilities_of(batch))])


def judge_sums(make: Make, found: LossTargets) -> Finding | None:
    """A softmax over the vocabulary leaves gradients whose sum over it is 0 at each position; one over the
    positions, such whose sum is 0 over each row alone."""
    if found.sums is None or found.sums.shape[1] < MIN_POSITIONS:
        return None
    sums, absolute, pulls = found.sums.sum(dim=1).abs(), found.sums.abs().sum(dim=1), found.pulls.sum(dim=1)
    has_loss = pulls > 0
    is_over_positions = (sums <= ZERO_SUM * absolute) & (absolute >= CLEAR_SUM * pulls)
    if not has_loss.any() or not is_over_positions[has_loss].all():
        return None
    return make(
        "error",
        found="the softmax is over the positions (of each row)",
        expected="the vocabulary",
        causes=("softmax with the wrong dim (or log_softmax)",),
        action="use dim=-1, the vocabulary, for student and teacher",
        evidence={"row_sums": sums.tolist(), "absolute": absolute.tolist(), "pulls": pulls.tolist()},
        check="sums",
    )


def judge_prompts(make: Make, seen: SeenTokens) -> Finding | None:
    """Answers that begin with their whole prompt, which is not scored itself. A BOS before it is left out."""
    lengths = []
    for ids, scored, valid in zip(seen.ids, seen.scored, seen.valid, strict=True):
        text, first = ids[valid].tolist(), int(scored[valid].argmax())
        copies = (k for k in (0, 1) if text[k:first] == text[first : 2 * first - k])
        lengths.append(first - next(copies, first))
    if len(lengths) < REPEATED_ROWS or min(lengths) < REPEATED_TOKENS:
        return None
    return make(
        "warning",
        found=f"all {len(lengths)} answers repeat their prompt",
        expected="the answers alone",
        causes=("prompt in the completion (made from the whole text)",),
        action="print a row of the dataset: its completion must begin where its prompt ends",
        evidence={"copied_tokens": lengths},
    )


def judge_declared(make: Make, batch, found: LossTargets) -> Finding | None:
    """The data has prompts that are not scored, and all text of this micro-batch is. `batch`: a `sandbox.Batch`."""
    seen, labels = batch.seen_tokens(all_rows=True), batch.inputs.get("labels")
    if labels is None or labels.shape != found.targets.shape or not (seen.scored | ~seen.valid)[:, 1:].all():
        return None
    weights = found.weights[found.targets != IGNORE_INDEX]
    is_silent = found.is_silent[:, :-1] & (labels[:, 1:] != IGNORE_INDEX)
    if is_silent.any() or not len(weights) or weights.max() > WEIGHTED_LOSS * weights.min():  # by a loss of one's own
        return None
    prompts = prompts_of(batch.run.trainer.train_dataset, batch.run.pad_token_id)
    if len(prompts) < LEAST_ROWS or min(prompts) < SHORTEST_PROMPT:
        return None
    return make(
        "warning",
        found=f"no prompt is masked (in {len(seen.ids)} rows)",
        expected="masked, as in the dataset",
        causes=("labels are made again (by a collator such as DataCollatorForLanguageModeling)",),
        action="use a collator that keeps the dataset's labels, such as DataCollatorForSeq2Seq",
        evidence={"prompts": prompts},
    )


def prompts_of(data, pad_token_id: int | None) -> list[int]:
    """Tokens of some rows, spread over the data, that their labels leave out before the last one that they score.
    Padding is no prompt. Empty where there are no such rows."""
    is_known = isinstance(data, (list, tuple)) or "labels" in (getattr(data, "column_names", None) or ())
    if not is_known or not isinstance(data, Sized) or not len(data):
        return []
    counts = []
    try:
        for number in range(0, len(data), -(-len(data) // DECLARED_ROWS)):
            row = data[number]
            ids, labels = (torch.as_tensor(row[name]) for name in ("input_ids", "labels"))
            text = (ids != pad_token_id) & (torch.as_tensor(row.get("attention_mask", torch.ones_like(ids))) != 0)
            is_left_out, scored = text & (labels == IGNORE_INDEX), (labels != IGNORE_INDEX).nonzero().flatten()
            counts.append(int(is_left_out[1 : scored[-1]].sum()) if len(scored) else 0)
    except Exception as error:  # rows of another kind
        logger.debug("rows of the dataset cannot be read", exc_info=error)
        return []
    return counts


def judge_change(
    make: Make, before: int, after: int, off: float, step: int, labels_are: str = "own"
) -> Finding | None:
    """`before`: steps in which labels were what they should be; `after`: steps since, all with others, of which
    the last has the share `off`."""
    if before < STEPS_BEFORE or after < STEPS_AFTER:
        return None
    return make(
        "warning",
        found=f"{off:.0%} of labels are not the {labels_are} tokens (from step {step - after + 1} on)",
        expected=f"none (as in the {before} steps before)",
        causes=("input_ids overwritten (after the labels were made)", "labels are changed from some step on"),
        action="compare a row of the dataset with what the model is given, at this step and at the first",
        evidence={"share": off, "steps_before": before, "steps_after": after},
        check="change",
    )


def name_labels(labels: LabelCounts, least: int, clear: float) -> str | None:
    """What the labels are, the `own` tokens, the `next` or `neither`, by the first micro-batch with `least` of them:
    by the share `clear` of all, or of those of each row in MOST_ROWS. None where there is none."""
    place = next((place for place, count in labels.by_micro_batch().items() if count >= least), None)
    if place is None:
        return None
    here = (labels.rank == place[0]) & (labels.micro_step == place[1])
    for name, fit in (("own", labels.own[here]), ("next", labels.following[here])):
        scored = labels.scored[here]
        if fit.sum() > clear * scored.sum() or (fit > clear * scored).sum() >= MOST_ROWS * (scored > 0).sum():
            return name
    return "neither"


def share_off(step, labels_are: str) -> float | None:
    """Of the scored labels of a `step.Step`, that are not the token itself (`own`), or the next."""
    count, own, following = step.num_labels
    return 1 - (own if labels_are == "own" else following) / count if count else None


def are_noisy(step) -> bool:
    """Whether labels differ from the tokens here and there: targets that are no token of the row are theirs."""
    shares = [share_off(step, labels_are) for labels_are in ("own", "next")]
    return None not in shares and CHANGE_AFTER < min(shares) < MOST


def count_changes(before: int, after: int, off: float) -> list[int]:
    """Steps whose labels fitted, and after them steps in a row whose labels did not, with one more of which the share
    `off` does not fit. Below 0 for good where some fit again: what comes back belongs to a mixture of objectives."""
    if before < 0 or CHANGE_BEFORE < off <= CHANGE_AFTER:
        return [before, after]
    if off > CHANGE_AFTER:
        return [before, after + 1]
    return [-1 if after else before + 1, 0]


def judge_last_position(make: Make, ids: torch.Tensor, found: LossTargets, labels: torch.Tensor) -> Finding | None:
    """A row's last position has no next token in it. With labels that are the tokens themselves nothing says what
    it should be scored on."""
    are_own = labels.shape == ids.shape and (labels == ids).float().mean() > MOST
    last = found.targets[:, -1].tolist()
    number = sum(target != IGNORE_INDEX for target in last)
    if not are_own or number <= MOST * len(last):
        return None
    return make(
        "warning",
        found=f"last position of {number} of {len(last)} rows scored",
        expected="no target (no next token)",
        causes=("labels rolled over the batch (not within each row)",),
        action="shift within each row, and leave its last position out",
        evidence={"rows": number, "targets": last},
    )


def judge_unscored(make: Make, found: LossTargets, labels: torch.Tensor, is_own_loss: bool = False) -> Finding | None:
    """Positions whose next label is a token are meant to be scored; a loss of the user's own may leave some out.
    Positions that are sure of their target are silent too, so None where the model is."""
    scored = found.targets != IGNORE_INDEX
    if labels.shape != scored.shape or not scored.any() or float(found.losses[scored].mean()) < SURE:
        return None
    meant, silent, scored = labels[:, 1:] != IGNORE_INDEX, found.is_silent[:, :-1], scored[:, :-1]
    dropped, count, others = (int(each.sum()) for each in (silent & meant, meant, scored & ~meant))
    if dropped <= MAX_UNSCORED * count:
        return None
    is_inverted = others >= MIN_POSITIONS and count - dropped <= MAX_UNSCORED * count
    what = f"{dropped} of {count} labels dropped (and {others} masked ones scored)"
    causes = ("a wrong mask (inside the loss)", "logits or labels cut before the loss")
    return make(
        "info" if is_own_loss and not is_inverted else "warning",
        found=what if is_inverted else f"{dropped} of {count} positions with a label are not scored",
        expected="the labels" if is_inverted else "all of them",
        causes=("the loss has its mask inverted", *causes) if is_inverted else causes,
        action="if it is on purpose, set their labels to -100; else count what your loss function averages over",
        evidence={"unscored": dropped, "positions": count, "masked_but_scored": others},
    )


def probabilities_of(batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Probabilities and gradient at the logits, `[rows, positions, vocab_size]`, of the batch's loss as it is and with
    a sharper head, of the same embeddings. Empty where the loss cannot be computed so."""
    model, compute_loss, ids = batch.model, batch.loss_of(), batch.inputs["input_ids"]
    try:
        base = record(model, compute_loss, ids=ids)
        weight = getattr(head_of(model), "weight", None)
        if not isinstance(weight, torch.nn.Parameter):
            return []
        sharper = {weight: torch.nn.Parameter(SHARPER * weight.detach())}
        with replaced(places_of(model, sharper)):
            calls = base.only(), record(model, compute_loss, base, ids).only()
    except CannotJudge:
        return []
    if any(call.is_hidden for call in calls) or calls[0].values.shape != calls[1].values.shape:
        return []
    return [(call.values.float().softmax(-1), call.gradient.float()) for call in calls]


def judge_linear(make: Make, *pairs: tuple[torch.Tensor, torch.Tensor]) -> Finding | None:
    """`pairs`: of `probabilities_of`. For a loss `-sum q p` the gradient is `p (c - q)`: divided by p it moves by the
    same for all tokens when p does. A cross entropy has `1 - q / p` there."""
    if not pairs:
        return None
    usable = (pairs[0][0] > LEAST_SHARE) & (pairs[1][0] > LEAST_SHARE)
    first, second = (torch.where(usable, g / p.clamp_min(LEAST_SHARE), 0.0) for p, g in pairs)
    count = usable.sum(-1).clamp_min(1)

    def variance(values: torch.Tensor) -> torch.Tensor:
        mean = values.sum(-1) / count
        return torch.where(usable, (values - mean.unsqueeze(-1)).square(), 0.0).sum(-1) / count

    spread, left = variance(first), variance(second - first)
    scored = (count >= MIN_POSITIONS) & (spread > 0)
    if not scored.any() or bool((left > LINEAR * spread)[scored].any()):
        return None
    return make(
        "warning",
        found="the loss is linear in probabilities",
        expected="log of them",
        causes=("kl_div of probabilities", "an expected value over the vocabulary, on purpose"),
        action="kl_div takes log_softmax(logits) first, and the teacher's probabilities second",
        evidence={"positions": int(scored.sum()), "left": float((left / spread.clamp_min(1e-30))[scored].max())},
        check="linear",
    )
