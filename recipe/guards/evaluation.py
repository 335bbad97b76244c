"""Listens to evaluations: which rows they score, and whether the loss they report is that of their batches."""

import hashlib
import time
from collections.abc import Iterator, Sized
from contextlib import suppress

import numpy as np
import torch
from transformers import Trainer

from recipe.guards.batches import SCORED, OnItsWay, TokensOnTheirWay, scored_part, send_tokens
from recipe.guards.finding import CannotJudge, Finding
from recipe.guards.probes.equivalence import check_eval_mean
from recipe.guards.thresholds import EVAL_ROWS_READ, EVAL_SECONDS


class EvaluationWatch:
    """Collects the micro-batches of one evaluation as they pass; `take` hands them over at its end."""

    def __init__(self):
        self._tokens: list[TokensOnTheirWay] = []
        self._losses: list[OnItsWay] = []

    def listening_prediction_step(self, prediction_step):
        def listen(model, inputs, *arguments, **kwargs):
            tokens = send_tokens(inputs, pad_token_id=None)
            outputs = prediction_step(model, inputs, *arguments, **kwargs)
            if tokens is not None and isinstance(outputs[0], torch.Tensor):
                self._tokens.append(tokens)
                self._losses.append(OnItsWay(outputs[0].detach().float().mean()))
            return outputs

        return listen

    def take(self) -> dict[str, list]:
        """Of this rank: `rows` (token ids) and what of them is scored, `learned`; `losses` and `counts` (scored
        tokens) of each micro-batch."""
        seen = [tokens.read() for tokens in self._tokens]
        pieces = [piece for tokens in seen for piece in tokens.rows()]
        rows = [ids.astype(np.int32) for ids, _ in pieces]
        learned = [part.astype(np.int32) for part in (scored_part(*piece) for piece in pieces) if len(part)]
        counts = [int((tokens.flags & SCORED != 0).sum()) for tokens in seen]
        losses = [loss.read().item() for loss in self._losses]
        self._tokens, self._losses = [], []
        return {"rows": rows, "learned": learned, "losses": losses, "counts": counts}


def read_eval_rows(trainer: Trainer) -> list[np.ndarray]:
    """What evaluations will score, so that training data can be held against it from the first step on: the first rows
    of eval sets that can be indexed, through the collator. Streams are left alone: their rows are known when they have
    been evaluated."""
    sets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"eval": trainer.eval_dataset}
    until, rows = time.monotonic() + EVAL_SECONDS, []
    for name, dataset in sets.items():
        if "train" in name or not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
            continue
        for number in range(min(len(dataset), EVAL_ROWS_READ)):
            batch = trainer.data_collator([dataset[number]])
            tokens = send_tokens(batch, getattr(trainer.processing_class, "pad_token_id", None))
            rows += [scored_part(*piece).astype(np.int32) for piece in tokens.read().rows()] if tokens else []
            if time.monotonic() > until:
                return rows
    return rows


def judge_evaluation(
    ranks: list[dict], metrics: dict[str, float], digests: dict[str, int], step: int, tokens_seen: int
) -> Iterator[tuple[str, Finding | None]]:
    """What one evaluation of all ranks shows by itself. `digests`: of the rows of each eval set, from its first
    evaluation on; a new set is entered."""
    name = next((key for key in metrics if key.startswith("eval_") and key.endswith("_loss")), None)
    losses = [loss for rank in ranks for loss in rank["losses"]]
    if name is None or not losses:
        return
    counts = [count for rank in ranks for count in rank["counts"]]
    with suppress(CannotJudge):
        yield "eval_train_mismatch", check_eval_mean(losses, counts, metrics[name], step, tokens_seen)
    rows = [row for rank in ranks for row in rank["rows"]]
    digest = digest_of_rows(rows)
    first = digests.setdefault(name, digest)
    yield "eval_not_repeatable", None if digest == first else _other_rows(name, len(rows), step, tokens_seen)


def digest_of_rows(rows: list[np.ndarray]) -> int:
    """The same for the same rows in any order; JSON-able. Rows that come twice count once: ranks are filled up with
    some of them when they do not divide evenly, and with others at the next evaluation."""
    hashes = {hashlib.blake2b(row.astype(np.int32).tobytes(), digest_size=7).digest() for row in rows}
    return sum(int.from_bytes(value, "little") for value in hashes) % (1 << 53)


def _other_rows(name: str, count: int, step: int, tokens_seen: int) -> Finding:
    return Finding(
        "eval_not_repeatable",
        "warning",
        step,
        tokens_seen,
        found=f"{count:,} rows that are not those of the first evaluation ({name})",
        expected="the same rows each time, in any order",
        likely_causes=(
            "the eval data is a stream that goes on where the last evaluation stopped, or is shuffled anew",
            "the number of workers or ranks changed what they read",
        ),
        action="take a fixed number of rows from a fixed place, and make the iterator begin anew",
        evidence={"rows": count},
    )
