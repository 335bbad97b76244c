"""The questions, each answered by an exact test on one tiny model."""

import copy
from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import torch
from transformers import GenerationConfig, masking_utils

from tests.audit.subject import (
    FIRST_TOKEN,
    IGNORE,
    LAST_TOKEN,
    LENGTH,
    Batch,
    NoLogits,
    Subject,
    make_batch,
    random_ids,
)

PASS, FAULT, LIMIT, UNCLEAR, NOT_APPLICABLE, ERROR = "pass", "fault", "limit", "unclear", "n/a", "error"
# Of a loss. fp32 losses of 50 positions differ by 1e-7 to 1e-6 with the order of the sum.
LOSS_ERROR = 1e-4
# Times the movement of the logits when every weight moves by its last bit: what rounding can do in another order.
ROUNDINGS, UNCLEAR_ROUNDINGS = 300, 30
SMALLEST = 1e-6  # of the deviation of the logits
NEW_TOKENS = 10


class Result(NamedTuple):
    status: str
    detail: str = ""


def rounding(subject: Subject, batch: Batch) -> float:
    """How far logits move, in their deviation, if each weight moves by 2^-23 of itself."""
    before = subject.logits(batch)
    saved = [parameter.detach().clone() for parameter in subject.model.parameters()]
    generator, moved = torch.Generator().manual_seed(3), []
    for _ in range(2):
        with torch.no_grad():
            for parameter, old in zip(subject.model.parameters(), saved, strict=True):
                if parameter.is_floating_point():
                    sign = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
                    parameter.copy_(old * (1 + sign * 2.0**-23))
        moved.append(distance(subject.logits(batch), before))
    with torch.no_grad():
        for parameter, old in zip(subject.model.parameters(), saved, strict=True):
            parameter.copy_(old)
    return max(*moved, SMALLEST)


def distance(new: torch.Tensor, old: torch.Tensor, where: torch.Tensor | None = None) -> float:
    """The largest difference, in standard deviations of `old`. `where` bool `[rows, positions]`."""
    gap = (new - old).abs().amax(dim=-1)
    gap = gap if where is None else gap[where]
    return float(gap.max() / old.std()) if gap.numel() else 0.0


def judge(size: float, noise: float, what: str) -> Result:
    if size > ROUNDINGS * noise:
        return Result(FAULT, f"{what} by {size:.2g} sd (one rounding: {noise:.1g})")
    if size > UNCLEAR_ROUNDINGS * noise:
        return Result(UNCLEAR, f"{what} by {size:.2g} sd (one rounding: {noise:.1g})")
    return Result(PASS)


def others(ids: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Another token of the texts' range at each place of `where`."""
    span = LAST_TOKEN - FIRST_TOKEN
    steps = torch.randint(1, span, ids.shape, generator=torch.Generator().manual_seed(4))
    return torch.where(where, (ids - FIRST_TOKEN + steps) % span + FIRST_TOKEN, ids)


# --- the loss


def check_loss(subject: Subject, batch: Batch, noise: float) -> Result:
    """Is it the mean cross entropy with the next token, over the scored positions?"""
    loss, logits = subject.loss(batch, batch.labels)
    own = 0 if subject.is_encoder_decoder else 1
    wanted = float(subject.cross_entropy(logits, batch.labels, own).mean())
    if close(loss, wanted):
        return Result(PASS)
    return Result(FAULT, explain_loss(subject, batch, loss, logits, wanted))


def explain_loss(subject: Subject, batch: Batch, loss: float, logits: torch.Tensor, wanted: float) -> str:
    for shift in (0, 1, 2):
        nats = subject.cross_entropy(logits, batch.labels, shift)
        names = {
            "mean over scored labels": nats.mean(),
            "sum": nats.sum(),
            "mean over all": nats.sum() / batch.ids.numel(),
        }
        names["sum over rows"] = nats.sum() / len(batch.ids)
        for name, value in names.items():
            if close(loss, float(value)):
                return f"loss {loss:.4f} is the {name} at shift {shift}; expected {wanted:.4f}"
    other = batch.labels.clone()
    other[other != IGNORE] = other[other != IGNORE].roll(1)
    second, logits_2 = subject.loss(batch, other)
    own = 0 if subject.is_encoder_decoder else 1
    wanted_2 = float(subject.cross_entropy(logits_2, other, own).mean())
    if close(second - wanted_2, loss - wanted):
        return f"loss {loss:.4f} is the expected {wanted:.4f} plus {loss - wanted:.4f}, which no label moves"
    return f"loss {loss:.4f}, cross entropy of its own logits {wanted:.4f}"


def close(one: float, other: float) -> bool:
    return abs(one - other) <= LOSS_ERROR * max(abs(one), abs(other), 1e-3)


def check_num_items(subject: Subject, batch: Batch, noise: float) -> Result:
    """With `num_items_in_batch`, is the sum divided by it?"""
    if not subject.takes_kwargs:
        return Result(NOT_APPLICABLE, "forward takes no loss arguments: Trainer averages means of micro-batches")
    if getattr(type(subject.model), "accepts_loss_kwargs", True) is False:
        return Result(NOT_APPLICABLE, "accepts_loss_kwargs = False: Trainer averages means of micro-batches")
    plain, _ = subject.loss(batch, batch.labels)
    scored = int((batch.labels[:, 0 if subject.is_encoder_decoder else 1 :] != IGNORE).sum())
    divided, _ = subject.loss(batch, batch.labels, num_items_in_batch=torch.tensor(4 * scored))
    if close(divided, plain / 4):
        return Result(PASS)
    return Result(FAULT, f"loss {plain:.4f}; {divided:.4f} with num_items_in_batch 4 times the scored labels")


def check_label_leak(subject: Subject, batch: Batch, noise: float) -> Result:
    """Encoder-decoders make the decoder's input of the labels: does a position see its own label?"""
    if not subject.is_encoder_decoder:
        return Result(NOT_APPLICABLE)
    at = LENGTH // 2
    where = torch.zeros_like(batch.real)
    where[:, at:] = batch.labels[:, at:] != IGNORE
    _, before = subject.loss(batch, batch.labels)
    _, after = subject.loss(batch, others(batch.labels, where))
    seen = torch.zeros_like(batch.real)
    seen[:, : at + 1] = True
    if distance(after, before, ~seen & batch.real) <= ROUNDINGS * noise:
        return Result(FAULT, "logits do not depend on the labels before them: no teacher forcing")
    return judge(distance(after, before, seen), noise, "logits move with their own or later labels")


# --- attention


def check_causal(subject: Subject, batch: Batch, noise: float) -> Result:
    before, worst = subject.logits(batch), 0.0
    for at in (5, 10, 17):
        later = torch.zeros_like(batch.real)
        later[:, at:] = True
        after = subject.logits(batch.with_ids(others(batch.ids, later & batch.real)))
        worst = max(worst, distance(after, before, ~later & batch.real))
    return judge(worst, noise, "logits move with later tokens")


def check_rows(subject: Subject, batch: Batch, noise: float) -> Result:
    """All rows but one are changed; then that one goes alone."""
    before, keep = subject.logits(batch), torch.zeros_like(batch.real)
    keep[1] = True
    after = subject.logits(batch.with_ids(others(batch.ids, ~keep & batch.real)))
    if subject.is_encoder_decoder:
        saved = subject.encoder_ids
        subject.encoder_ids = others(saved, ~keep)
        after_2 = subject.logits(batch)
        subject.encoder_ids = saved
        after = after if distance(after, before, keep) > distance(after_2, before, keep) else after_2
    return judge(distance(after, before, keep & batch.real), noise, "logits move with other rows' tokens")


def check_padding(subject: Subject, batch: Batch, noise: float) -> Result:
    """Each row alone and without padding against the padded batch: logits of real tokens, and the loss."""
    padded, full = subject.logits(batch), subject.encoder_ids
    worst = 0.0
    for row, length in enumerate(batch.real.sum(dim=1).tolist()):
        alone = Batch(
            *(part[row : row + 1, :length] for part in (batch.ids, batch.labels, batch.real, batch.documents))
        )
        subject.encoder_ids = full[row : row + 1, :length]
        worst = max(worst, distance(padded[row : row + 1, :length], subject.logits(alone)))
    subject.encoder_ids = full
    return judge(worst, noise, "logits of real tokens move with right padding")


@contextmanager
def watching_masks():
    """Whether transformers' masks are told of packed documents while this is open: a list that is filled if so."""
    original, seen = masking_utils.find_packed_sequence_indices, []

    def find(position_ids):
        found = original(position_ids)
        seen.extend([True] if found is not None and bool((found[:, -1] != found[:, 0]).any()) else [])
        return found

    masking_utils.find_packed_sequence_indices = find
    try:
        yield seen
    finally:
        masking_utils.find_packed_sequence_indices = original


def check_documents(subject: Subject, batch: Batch, noise: float) -> Result:
    """Does a packed document see the one before it, and is it what it is alone?"""
    with watching_masks() as told:
        before = subject.logits(batch)
    second = batch.documents == 1
    after = subject.logits(batch.with_ids(others(batch.ids, ~second)))
    size = distance(after, before, second)
    if size > UNCLEAR_ROUNDINGS * noise:
        if not told:
            return Result(LIMIT, f"does not separate documents ({size:.2g} sd)")
        return judge(size, noise, "masks are told of the documents, but logits move with the document before")
    worst = 0.0
    for row, first in enumerate((~second).sum(dim=1).tolist()):
        parts = (batch.ids, batch.labels, batch.real, batch.documents)
        alone = Batch(*(part[row : row + 1, first:] for part in parts))
        worst = max(worst, distance(before[row : row + 1, first:], subject.logits(alone)))
    return judge(worst, noise, "a packed document's logits differ from the document's alone")


# --- evaluation


def check_repeatable(subject: Subject, batch: Batch, noise: float) -> Result:
    """Twice the same, with a longer batch in between."""
    first, second = subject.logits(batch), subject.logits(batch)
    longer = random_ids(len(batch.ids), LENGTH + 9, seed=5)
    saved, subject.encoder_ids = subject.encoder_ids, random_ids(len(batch.ids), LENGTH + 9, seed=6)
    ones = torch.ones_like(longer, dtype=torch.bool)
    subject.logits(Batch(longer, longer, ones, torch.zeros_like(longer)))
    subject.encoder_ids = saved
    size = distance(second, first)
    if size:
        return judge(size, noise, "two evaluations differ")
    return judge(distance(subject.logits(batch), first), noise, "logits move after another, longer batch")


def generate(subject: Subject, prompt: torch.Tensor, cache: str | None):
    fixed = GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1, use_cache=True, pad_token_id=0, bos_token_id=1,
        decoder_start_token_id=2 if subject.is_encoder_decoder else None, cache_implementation=cache,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    subject.model.generation_config = copy.deepcopy(fixed)
    inputs = subject.encoder_ids[: len(prompt)] if subject.is_encoder_decoder else prompt
    with torch.no_grad():
        return subject.model.generate(inputs, attention_mask=torch.ones_like(inputs))


def check_cache(subject: Subject, batch: Batch, noise: float, cache: str | None = None) -> Result:
    """Logits of greedy generation with a cache against one forward pass without."""
    prompt = batch.ids[:2, :12]
    output = generate(subject, prompt, cache)
    stepwise = torch.stack(output.logits, dim=1).float()
    ids = output.sequences[:, :-1]
    whole = Batch(ids, ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids))
    full = subject.logits(whole)[:, -stepwise.shape[1] :]
    if full.shape[-1] != stepwise.shape[-1]:
        raise NoLogits(f"generation gives {stepwise.shape[-1]} logits, the forward pass {full.shape[-1]}")
    gaps = (stepwise - full).abs().amax(dim=(0, 2)) / full.std()
    first = next((i for i, gap in enumerate(gaps.tolist()) if gap > UNCLEAR_ROUNDINGS * noise), None)
    return judge(float(gaps.max()), noise, f"logits with a cache differ, from new token {first} on,")


def check_static_cache(subject: Subject, batch: Batch, noise: float) -> Result:
    if not getattr(subject.model, "_can_compile_fullgraph", False):
        return Result(NOT_APPLICABLE, "the class names no support")
    return check_cache(subject, batch, noise, "static")


Check = Callable[[Subject, Batch, float], Result]
# In train mode (dropout 0), then in eval mode.
IN_TRAINING: dict[str, dict[str, Check]] = {
    "plain": {"loss": check_loss, "num_items": check_num_items, "label_leak": check_label_leak, "causal": check_causal,
              "rows": check_rows},
    "padded": {"loss": check_loss, "num_items": check_num_items, "causal": check_causal, "rows": check_rows,
               "padding": check_padding},
    "packed": {"loss": check_loss, "causal": check_causal, "rows": check_rows, "documents": check_documents},
}  # fmt: skip
IN_EVALUATION: dict[str, Check] = {"repeatable": check_repeatable, "cache": check_cache, "static": check_static_cache}


def run_checks(subject: Subject, setting: str) -> dict[str, Result]:
    batch = make_batch(setting)
    if setting == "packed" and (subject.is_encoder_decoder or not subject.takes("position_ids")):
        return {"documents": Result(NOT_APPLICABLE, "takes no position_ids")}
    results = {}
    checks = [(True, each) for each in IN_TRAINING[setting].items()]
    checks += [(False, each) for each in IN_EVALUATION.items()] if setting == "plain" else []
    noise = None
    for training, (name, check) in checks:
        subject.model.train(training)
        torch.manual_seed(0)
        try:
            noise = rounding(subject, batch) if noise is None else noise
            results[name] = check(subject, batch, noise)
        except Exception as problem:  # a class's own failure is a result
            results[name] = Result(ERROR, f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}")
    return results
