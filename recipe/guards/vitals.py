"""Signs of life that need no expectation but the run's own numbers and settings: loss, gradient norm, learning rate,
tokens. What the parameters do is in `updates.py`.

Windows are lists, one entry a step, oldest first; the last entry is now. They are cut out of the history that the
caller keeps, so a resumed run goes on where it stopped.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from recipe.guards.finding import CannotJudge, Finding
from recipe.guards.thresholds import (
    BOS_SHARE,
    BOS_TEXTS,
    BUDGET_SHARE,
    BUDGET_STEPS,
    EOS_ABSENT_TOKENS,
    EOS_SEEN,
    FALL_NATS,
    FALL_SHARE,
    FILLED_ROWS,
    FILLED_SHARE,
    GAP_NATS,
    GAP_RATIO,
    GAP_STEPS,
    GAP_WARNING,
    INIT_ABOVE,
    INIT_BELOW,
    JUMP_SDS,
    JUMP_WINDOW,
    NORM_CLEAR,
    NORM_FACTOR,
    PADDING_SCORED,
    PADDING_SHARE,
    POSITION_ERRORS,
    POSITION_LOSSES,
    RATE_TOLERANCE,
    RECENT,
    RISE_NATS,
    ZERO_NORMS,
)


def check_finite(
    step: int, tokens_seen: int, losses: list[float], grad_norm: float | None, scored: list[int] | None = None
) -> Finding | None:
    """NaN, infinite or exactly 0.0 loss in any micro-batch of the step, or a gradient norm that is not finite.

    `losses` are the raw ones: Trainer's own log shows NaN as 0.0 (`logging_nan_inf_filter`). `scored`: targets of each
    micro-batch; one without any has a loss of 0. Pass `grad_norm` None for a step that the fp16 loss scaler skipped.
    """
    counts = scored if scored is not None else [1] * len(losses)
    bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss) or (loss == 0.0 and counts[i] > 0)]
    if not bad and (grad_norm is None or math.isfinite(grad_norm)):
        return None
    is_zero = bool(bad) and all(losses[i] == 0.0 for i in bad)
    first = next((i for i in bad if losses[i] != 0.0), bad[0]) if bad else None
    where = f" in micro-batch {first + 1} of {len(losses)}" if bad and len(losses) > 1 else ""
    found = f"loss {losses[first]}{where}" if bad else f"gradient norm {grad_norm}"
    expected = "a finite loss above 0"
    causes = (
        ("every label masked (-100)", "an empty batch")
        if is_zero
        else ("learning rate too high", "overflow in fp16 or bf16", "a broken kernel", "every label masked (-100)")
    )
    action = (
        "look at the labels of this batch"
        if is_zero
        else "the weights are lost from here on: go back to the last checkpoint with a lower learning rate or in fp32"
    )
    evidence = {"losses": losses, "bad_micro_batches": bad, "grad_norm": grad_norm, "scored": scored}
    return Finding("loss_not_finite", "error", step, tokens_seen, found, expected, causes, action, evidence)


# --- jumps


@dataclass(frozen=True)
class _Jump:
    """The last steps, all between `above` and `below`, and the window before them."""

    median: float
    robust_sd: float
    low: float
    high: float
    above: float
    below: float


def _measure_jump(values: list[float]) -> _Jump | None:
    """None until the window is full, and while a value is not finite (another guard's business)."""
    values = values[-(JUMP_WINDOW + RECENT) :]
    if len(values) < JUMP_WINDOW + RECENT or not all(math.isfinite(value) for value in values):
        return None
    window, recent = values[:JUMP_WINDOW], values[JUMP_WINDOW:]
    median = statistics.median(window)
    robust_sd = 1.4826 * statistics.median(abs(value - median) for value in window)
    return _Jump(median, robust_sd, min(window), max(window), above=min(recent), below=max(recent))


def check_loss_spike(
    steps: list[int], tokens: list[int], losses: list[float], is_first_pass: bool = True
) -> Finding | None:
    """The loss has jumped away from its recent level and stays there: up, or down to a fraction of it.

    A fall is judged only in the first pass over the data (at a pass boundary a memorised text is easier), and only
    if it is sudden: a leak that is learned over tens of steps is the envelope's business.
    """
    jump = _measure_jump(losses)
    if jump is None:
        return None
    margin = JUMP_SDS * jump.robust_sd
    rise = max(margin, RISE_NATS)
    # FALL_NATS under the whole window is a jump, and not the slope of early training.
    low_enough = min(jump.low - FALL_NATS, jump.median - margin, jump.median * FALL_SHARE)
    if jump.above > max(jump.high + rise / 2, jump.median + rise):
        found, causes = f"loss at least {jump.above:.2f} in {RECENT} steps", _SPIKE_CAUSES
    elif is_first_pass and jump.below < low_enough:
        found, causes = f"loss fell to {jump.below:.2f} or less within {RECENT} steps", _FALL_CAUSES
    else:
        return None
    expected = f"near {jump.median:.2f}, median of the {JUMP_WINDOW} steps before ({jump.low:.2f} to {jump.high:.2f})"
    action = "look at the gradient norm and the data of these steps"
    evidence = {"median": jump.median, "robust_sd": jump.robust_sd, "recent": losses[-RECENT:]}
    return Finding("loss_spike", "warning", steps[-1], tokens[-1], found, expected, causes, action, evidence)


_SPIKE_CAUSES = ("learning rate too high", "a stretch of broken or very different data", "numerical trouble")
_FALL_CAUSES = (
    "the model is given what it is asked for (repeated data, a leak)",
    "labels of most tokens masked",
    "a stretch of trivial data",
)


def check_grad_norm_level(steps: list[int], tokens: list[int], norms: list[float | None]) -> Finding | None:
    """The gradient norm before clipping is exactly 0, or has jumped by a factor of NORM_FACTOR and stays there.

    Up is a warning: clipping hides it from the loss for a while. Down is information: it harms nothing by itself, and
    a memorised text does the same. Silent where norms are not known.
    """
    window = norms[-(JUMP_WINDOW + RECENT) :]
    if len(window) >= ZERO_NORMS and all(norm == 0.0 for norm in window[-ZERO_NORMS:]):
        causes = ("the loss is detached from the parameters", "every label masked (-100)", "underflow in fp16")
        found = f"gradient norm exactly 0 in {ZERO_NORMS} steps"
        return _grad_norm_finding("warning", steps[-1], tokens[-1], found, "above 0", causes, {"norms": window[-3:]})
    if None in window or 0.0 in window:
        return None
    jump = _measure_jump([math.log(norm) if 0 < norm < math.inf else math.nan for norm in window])
    if jump is None:
        return None
    margin = max(JUMP_SDS * jump.robust_sd, math.log(NORM_FACTOR))
    usual = f"near {math.exp(jump.median):.3g}, the median of the {JUMP_WINDOW} steps before"
    evidence = {"median": math.exp(jump.median), "recent": window[-RECENT:]}
    if jump.above > max(jump.high + NORM_CLEAR, jump.median + margin):
        causes = ("learning rate too high", "a stretch of broken data", "clipping is not effective")
        found = f"gradient norm at least {math.exp(jump.above):.3g} in {RECENT} steps"
        return _grad_norm_finding("warning", steps[-1], tokens[-1], found, usual, causes, evidence)
    if jump.below < min(jump.low - NORM_CLEAR, jump.median - margin):
        causes = ("the data is already known to the model", "most labels are masked", "gradients are scaled twice")
        found = f"gradient norm at most {math.exp(jump.below):.3g} in {RECENT} steps"
        return _grad_norm_finding("info", steps[-1], tokens[-1], found, usual, causes, evidence)
    return None


def _grad_norm_finding(severity, step, tokens_seen, found, expected, causes, evidence) -> Finding:
    action = "look at the loss beside it"
    return Finding("grad_norm_off", severity, step, tokens_seen, found, expected, causes, action, evidence)


def check_init_loss(step: int, tokens_seen: int, loss: float, vocab_size: int, is_new_model: bool) -> Finding | None:
    """A hint, never more than information: an untrained model guesses, so its loss is ln(vocabulary) or above it.

    Raises `CannotJudge` for a model that was trained before.
    """
    if step or not is_new_model:
        raise CannotJudge("the model was trained before, so its first loss may be anything")
    guess = math.log(vocab_size)
    if guess - INIT_BELOW <= loss <= INIT_ABOVE * guess:
        return None
    is_low = loss < guess
    return Finding(
        "init_loss_off",
        "info",
        step,
        tokens_seen,
        found=f"first loss {loss:.2f}",
        expected=f"ln({vocab_size:,}) = {guess:.2f} or somewhat more",
        likely_causes=(
            "the model sees the token it is asked for",
            "the weights are not new",
            "the loss is divided twice",
        )
        if is_low
        else ("weights are drawn from too wide a distribution", "the loss is summed, not averaged"),
        action="read the probes' findings first"
        if is_low
        else "look at initializer_range and at the loss's reduction",
        evidence={"loss": loss, "ln_vocab_size": guess},
    )


# --- learning rate


def expected_learning_rates(
    lr_scheduler_type: str,
    learning_rate: float,
    num_warmup_steps: int,
    num_training_steps: int,
    lr_scheduler_kwargs: dict | None = None,
) -> Callable[[int], float]:
    """The schedule as a function of the optimizer step (from 0): the factor on the initial learning rate.

    Built by `transformers.get_scheduler`, as Trainer does. Raises `CannotJudge` for schedules that follow a metric.
    """
    if lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
        raise CannotJudge(f"the schedule {SchedulerType(lr_scheduler_type).value} depends on the losses")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=learning_rate)
    scheduler = get_scheduler(lr_scheduler_type, optimizer, num_warmup_steps, num_training_steps, lr_scheduler_kwargs)
    return scheduler.lr_lambdas[0]


def check_learning_rate(
    step: int,
    tokens_seen: int,
    used: list[tuple[float | None, float | None]],
    multiplier: Callable[[int], float],
    learning_rate: float | None = None,
    world_size: int = 1,
    gradient_accumulation_steps: int = 1,
) -> Finding | None:
    """The learning rate that the optimizer uses is the initial one times the schedule's factor.

    `step`: updates made before this one (from 0), without those that the fp16 loss scaler skipped. `used`: `(lr,
    initial_lr)` of each parameter group, just before the update. `learning_rate`: what was asked for, None where the
    optimizer is the user's own. One step early or late is no fault.
    """
    off = [(i, lr, initial) for i, (lr, initial) in enumerate(used) if not _is_on(multiplier, step, lr, initial)]
    if off:
        group, lr, initial = off[0]
        expected = f"{initial * multiplier(step):.4g} ({initial:.4g} x {multiplier(step):.4g}, the schedule)"
        causes = _rate_causes(multiplier, step, lr, initial, world_size, gradient_accumulation_steps)
    elif (
        learning_rate and used and not any(initial is None or _is_close(initial, learning_rate) for _, initial in used)
    ):
        group, (lr, initial) = 0, used[0]
        expected = f"{learning_rate * multiplier(step):.4g} ({learning_rate:.4g} asked for, {initial:.4g} in use)"
        causes = ("the checkpoint brought its own learning rate", "the optimizer was built with another one")
    else:
        return None
    found = f"learning rate {lr:.4g} in parameter group {group}"
    action = "print optimizer.param_groups and scheduler.last_epoch at this step"
    evidence = {"updates": step, "used": used, "factor": multiplier(step), "learning_rate": learning_rate}
    return Finding("learning_rate_off", "warning", step + 1, tokens_seen, found, expected, causes, action, evidence)


def check_scheduled_rates(
    step: int, tokens_seen: int, used: list[tuple[float | None, float | None]], scheduled: list[float | None]
) -> Finding | None:
    """A schedule of the user's own: the optimizer uses the rates that the scheduler says. One for each group."""
    pairs = [(lr, says) for (lr, _), says in zip(used, scheduled, strict=False) if lr is not None and says is not None]
    off = [number for number, (lr, says) in enumerate(pairs) if not _is_close(lr, says)]
    if not off or len(used) != len(scheduled):
        return None
    lr, says = pairs[off[0]]
    return Finding(
        "learning_rate_off",
        "warning",
        step,
        tokens_seen,
        found=f"learning rate {lr:.4g} in parameter group {off[0]}",
        expected=f"{says:.4g}, as the scheduler says",
        likely_causes=("the scheduler was built for another optimizer", "the rate is set by hand after the scheduler"),
        action="build the scheduler from the optimizer that the Trainer is given",
        evidence={"used": used, "scheduled": scheduled},
    )


def _is_close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=RATE_TOLERANCE, abs_tol=1e-12)


def _is_on(multiplier: Callable[[int], float], step: int, lr: float | None, initial: float | None) -> bool:
    """Between the least and the largest rate of the steps around; nothing to say where a group has no rate."""
    if lr is None or initial is None:
        return True
    around = [initial * multiplier(near) for near in (max(0, step - 1), step, step + 1)]
    slack = RATE_TOLERANCE * max(around) + 1e-12
    return min(around) - slack <= lr <= max(around) + slack


def _rate_causes(multiplier, step, lr, initial, world_size, accumulation) -> tuple[str, ...]:
    """Name the factor by which the schedule runs too fast, where one explains the rate (accelerate#999)."""
    speeds = {
        world_size: "ranks",
        accumulation: "accumulation steps",
        world_size * accumulation: "ranks x accumulation",
    }
    fits = (k for k in dict.fromkeys((*speeds, 2, 3, 4, 8)) if k > 1 and _is_on(multiplier, step * k, lr, initial))
    if (k := next(fits, None)) is not None:
        many = f", as many as {speeds[k]}" if k in speeds else ""
        return (f"the schedule advances {k} times a step{many}", "warmup or total counted in other steps")
    return ("the schedule did not come back with the checkpoint", "warmup or total counted in other steps")


# --- tokens


def check_tokens(
    step: int, tokens_seen: int, counted: list[int], planned: int, unit: str = "rows", in_pass: int | None = None
) -> Finding | None:
    """Every step counts one number of rows (or scored tokens) that is not the planned one.

    `planned`: batch x accumulation x world size. `in_pass`: how many there are in one pass over the data, where that
    is known: less than a step needs is no fault. Batches of varying size (padding-free, by token budget) are silent.
    """
    recent = counted[-BUDGET_STEPS:]
    if len(recent) < BUDGET_STEPS or (in_pass is not None and in_pass < planned):
        return None
    usual = statistics.mode(recent)
    if usual == planned or recent.count(usual) < BUDGET_SHARE * BUDGET_STEPS:
        return None
    found = f"{usual:,} {unit} a step in {recent.count(usual)} of {BUDGET_STEPS} steps"
    expected = f"{planned:,} (batch size x accumulation x ranks)"
    causes = (
        "the batch is divided among the ranks (split_batches)",
        "a collator that drops or joins rows",
        "the batch size changed at a resume",
    )
    action = "compare tokens_seen with what the data gave; learning rate and steps were chosen for the planned size"
    evidence = {"counted": recent, "planned": planned, "ratio": usual / planned}
    return Finding("token_budget_off", "warning", step, tokens_seen, found, expected, causes, action, evidence)


@dataclass(frozen=True)
class TokenCounts:
    """What was counted over the run so far. Padding is where the attention mask is 0, whatever its id.

    `eos_inputs`: EOS in the text of a row (padding apart) after the row's first token, which may be a BOS of the same
    id. `eos_targets`: scored targets that are EOS. `padding_targets`: scored targets that are padding. `filled_rows`:
    of the `rows`, those of FILLED_TOKENS tokens or more that hold one token only and score it. `bos_texts`: runs of
    BOS, as texts begin with; `double_bos`: those of exactly two.
    """

    tokens: int
    targets: int
    eos_inputs: int
    eos_targets: int
    padding_targets: int
    rows: int
    filled_rows: int
    min_id: int
    max_id: int
    embedding_rows: int
    bos_texts: int = 0
    double_bos: int = 0


def check_token_range(step: int, tokens_seen: int, counts: TokenCounts) -> Finding | None:
    """Ids are rows of the embedding. Negative ones are a warning: some models take them for images."""
    if counts.tokens == 0 or (counts.min_id >= 0 and counts.max_id < counts.embedding_rows):
        return None
    severity = "error" if counts.max_id >= counts.embedding_rows else "warning"
    found = f"token ids from {counts.min_id:,} to {counts.max_id:,}"
    expected = f"0 to {counts.embedding_rows - 1:,}, the rows of the embedding"
    causes = ("the tokenizer belongs to another model", "tokens were added and the embedding not resized")
    action = "take the model's own tokenizer, or model.resize_token_embeddings(len(tokenizer))"
    evidence = vars(counts).copy()
    return Finding("token_out_of_range", severity, step, tokens_seen, found, expected, causes, action, evidence)


def check_tokenizer_size(step: int, tokens_seen: int, sizes: tuple[int, int], embedding_rows: int) -> Finding | None:
    """Ids that the tokenizer can give have a row in the embedding. A clamp or a modulo hides them in the batches.

    `sizes`: tokens without and with those that were added, which may never be used. More rows than tokens is usual.
    """
    base, total = sizes
    if max(sizes) <= embedding_rows:
        return None
    severity, size = ("warning", base) if base > embedding_rows else ("info", total)
    found = f"a tokenizer of {size:,} tokens{' with the added ones' if severity == 'info' else ''}"
    expected = f"{embedding_rows:,} at most, the rows of the embedding"
    causes = ("the tokenizer belongs to another model", "tokens were added and the embedding not resized")
    action = "take the model's own tokenizer, or model.resize_token_embeddings(len(tokenizer))"
    evidence = {"base": base, "total": total, "embedding_rows": embedding_rows}
    return Finding("token_out_of_range", severity, step, tokens_seen, found, expected, causes, action, evidence)


def check_double_bos(step: int, tokens_seen: int, counts: TokenCounts) -> Finding | None:
    if counts.bos_texts < BOS_TEXTS or counts.double_bos < BOS_SHARE * counts.bos_texts:
        return None
    found = f"{counts.double_bos:,} of {counts.bos_texts:,} texts begin with two BOS"
    causes = ("the chat template writes BOS and the tokenizer adds another", "BOS is in the text and added again")
    action, evidence = "tokenize the template's text with add_special_tokens=False", vars(counts).copy()
    return Finding("double_bos", "warning", step, tokens_seen, found, "one", causes, action, evidence)


def check_padding_targets(step: int, tokens_seen: int, counts: TokenCounts) -> Finding | None:
    if counts.filled_rows >= max(FILLED_ROWS, FILLED_SHARE * counts.rows):
        found, expected = f"{counts.filled_rows:,} of {counts.rows:,} rows hold one token only", "rows of text"
        causes = ("files made at full length beforehand, whose ends were never written", "rows of padding alone")
        action, evidence = "leave these rows out, or mask their labels", vars(counts).copy()
        return Finding("padding_is_target", "warning", step, tokens_seen, found, expected, causes, action, evidence)
    if counts.padding_targets < max(PADDING_SCORED, PADDING_SHARE * counts.targets):
        return None
    found = f"{counts.padding_targets:,} of {counts.targets:,} scored targets are padding"
    expected = "none: labels of padding are -100"
    causes = ("labels are a copy of padded input_ids", "the pad token is not the one that the collator masks")
    action = "labels[attention_mask == 0] = -100"
    evidence = vars(counts).copy()
    return Finding("padding_is_target", "warning", step, tokens_seen, found, expected, causes, action, evidence)


def check_eos_targets(step: int, tokens_seen: int, counts: TokenCounts) -> Finding | None:
    """EOS stands in the text and is never scored (warning), or is not in the data at all (information)."""
    if counts.eos_targets == 0 and counts.eos_inputs >= EOS_SEEN:
        severity, found = "warning", f"EOS {counts.eos_inputs:,} times in the text and never a target"
        causes = ("pad_token is eos_token, so the collator masks the real EOS too", "EOS is only in masked prompts")
        action = "give the tokenizer a pad token of its own"
    elif counts.eos_targets == counts.eos_inputs == 0 and counts.tokens >= EOS_ABSENT_TOKENS:
        severity, found = "info", f"no EOS in {counts.tokens:,} tokens"
        causes = ("documents are joined without EOS", "documents end with another token than the tokenizer's EOS")
        action = "append the EOS token to every document, if the model shall learn to stop"
    else:
        return None
    expected, evidence = "EOS among the targets, once a document", vars(counts).copy()
    return Finding("eos_never_target", severity, step, tokens_seen, found, expected, causes, action, evidence)


# --- evaluation, and evidence for a diagnosis


def check_train_eval_gap(
    step: int,
    tokens_seen: int,
    train_losses: list[float],
    eval_loss: float,
    is_first_pass: bool,
    vocab_size: int = 0,
) -> Finding | None:
    """In the first pass nothing was memorised, so eval and train loss are close, unless the texts differ.

    `train_losses`: those of the last steps. Silent while the eval loss lies within them, which leaves out noisy
    batches and the slope of early training. An eval loss above that of a uniform guess over `vocab_size` needs no
    ratio.
    """
    recent = train_losses[-GAP_STEPS:]
    if not is_first_pass or len(recent) < GAP_STEPS or not all(map(math.isfinite, [*recent, eval_loss])):
        return None
    train_loss = statistics.median(recent)
    low, high = sorted((train_loss, eval_loss))
    over_uniform = 0 < math.log(max(1, vocab_size)) < eval_loss
    is_far = high >= GAP_RATIO * low or over_uniform
    if min(recent) <= eval_loss <= max(recent) or high - low < GAP_NATS or not is_far:
        return None
    is_higher = eval_loss > train_loss
    severity = "warning" if high - low >= GAP_WARNING else "info"
    found = f"eval loss {eval_loss:.2f}, train loss {train_loss:.2f}"
    expected = f"less than {GAP_NATS} nats apart in the first pass"
    causes = (
        (
            "in training the model sees what it is asked for (a leak that eval does not have)",
            "training data repeats, so it is memorised",
            "eval sums over ranks or batches what it should average",
            "the eval text is of another kind",
        )
        if is_higher
        else (
            "the hold-out is in the training data or far easier",
            "eval divides by the accumulation steps again",
            "dropout is strong",
        )
    )
    action = "evaluate on rows of the training data: the two losses should agree"
    evidence = {"train_loss": train_loss, "eval_loss": eval_loss, "ratio": eval_loss / max(train_loss, 1e-9)}
    return Finding("train_eval_gap", severity, step, tokens_seen, found, expected, causes, action, evidence)


def add_losses_by_position(totals: list[list[float]], positions: list[int], losses: list[float]) -> None:
    """Add sampled losses to `totals`: `[count, sum, sum of squares]` for positions 0, 1, 2-3, 4-7, ... (JSON-able)."""
    for position, loss in zip(positions, losses, strict=True):
        bucket = position.bit_length()
        totals.extend([0, 0.0, 0.0] for _ in range(bucket + 1 - len(totals)))
        count, total, squares = totals[bucket]
        totals[bucket] = [count + 1, total + loss, squares + loss * loss]


def position_evidence(totals: list[list[float]], min_count: int = POSITION_LOSSES) -> dict:
    """Mean loss by position in the block, and whether it falls: who learns from context falls, who copies does not.

    `falls` compares the first and the last position bucket with `min_count` losses at POSITION_ERRORS standard errors;
    None while there are not two such buckets.
    """
    rows = [(i, n, s / n, max(0.0, q / n - (s / n) ** 2) / n) for i, (n, s, q) in enumerate(totals) if n >= min_count]
    means = {("0" if i == 0 else f"{1 << (i - 1)}-{(1 << i) - 1}"): mean for i, _, mean, _ in rows}
    if len(rows) < 2:
        return {"loss_by_position": means, "falls": None}
    (_, _, first, first_error), (_, _, last, last_error) = rows[0], rows[-1]
    return {"loss_by_position": means, "falls": first - last > POSITION_ERRORS * math.sqrt(first_error + last_error)}
