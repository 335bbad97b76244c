"""The reference model that a policy is compared with, and the checkpoint that is kept.

`make`: the guard's `finding`.
"""

import logging
import math
import re
from collections.abc import Callable

import torch
from torch.nn import functional as F

from recipe.guards.batches import IGNORE_INDEX
from recipe.guards.guard import PROBE, Finding
from recipe.guards.sandbox import frozen

logger = logging.getLogger("recipe.guards")

# Steps after which a reference model is compared with the policy. Chosen: those that are synchronized on purpose
# are so every some hundred steps.
FOLLOWED_STEPS = 4
# Nats from ln V of an untrained reference, and below it of a policy that has learned. Chosen, not measured: between
# them lie weights that were trained on other text.
NEAR_GUESS, KNOWS = 0.2, 1.0
# How the names of metrics end of which the smallest is the best.
LOW_IS_BETTER = ("loss", "perplexity", "ppl", "bits_per_byte", "bpb")

Make = Callable[..., Finding]


class ReferenceWatch:
    """In the first steps: whether the model that TRL's trainers hold as a reference has just become the policy."""

    def __init__(self, run):
        self.pair, self._policy, self._moved, self._followed = reference_pair(run), None, 0, 0

    def before_step(self) -> int | None:
        """After FOLLOWED_STEPS steps that moved the policy, in how many of them the reference was it."""
        if self.pair is None:
            return None
        policy, reference = (each.detach().flatten()[:64].clone() for each in self.pair)
        has_moved = self._policy is not None and not torch.equal(policy, self._policy)
        self._followed += has_moved and torch.equal(policy, reference)
        self._moved, self._policy = self._moved + has_moved, policy
        if self._moved < FOLLOWED_STEPS:
            return None
        self.pair = None
        return self._followed


def reference_of(run) -> torch.nn.Module | None:
    reference = getattr(run.trainer, "ref_model", None)
    is_model = isinstance(reference, torch.nn.Module) and not run.is_sharded
    return getattr(reference, "module", reference) if is_model else None


def reference_pair(run) -> tuple[torch.Tensor, torch.Tensor] | None:
    """One trained parameter and its namesake in the reference model that TRL's trainers hold."""
    if (reference := reference_of(run)) is None:
        return None
    others = dict(reference.named_parameters())
    named = [(p, others.get(name)) for name, p in run.model.named_parameters() if p.requires_grad]
    pairs = [(p, other) for p, other in named if other is not None and other.shape == p.shape]
    return pairs[-1] if pairs else None  # the last: rows of an embedding may have no gradient


def losses_of_both(run, inputs: dict) -> tuple[float, float, int] | None:
    """Mean next-token losses of the policy and of its reference on the tokens of this batch, and the size of the
    vocabulary. None where there is no reference."""
    reference, found = reference_of(run), []
    if reference is None:
        return None
    given = {name: inputs[name] for name in ("input_ids", "attention_mask") if inputs.get(name) is not None}
    targets = given["input_ids"][:, 1:]
    if "attention_mask" in given:
        targets = targets.masked_fill(given["attention_mask"][:, 1:] == 0, IGNORE_INDEX)
    for model in (run.model, reference):
        try:
            with frozen(model, training=False), torch.no_grad():
                logits = model(**given).logits[:, :-1].float()
        except Exception as error:  # pictures, sound: it needs more than tokens
            logger.debug("policy or reference cannot be run on tokens alone", exc_info=error)
            return None
        found.append(float(F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORE_INDEX)))
    return (*found, logits.shape[-1])


def judge_untrained(make: Make, policy: float, reference: float, vocab_size: int) -> Finding | None:
    guess = math.log(vocab_size)
    if reference < guess - NEAR_GUESS or policy > guess - KNOWS:
        return None
    return make(
        "warning",
        found=f"the reference model guesses: loss {reference:.2f}, the policy's is {policy:.2f}",
        expected=f"under ln({vocab_size:,}) = {guess:.2f}",
        causes=("its weights were not loaded",),
        action="load the reference from the checkpoint that the policy began from",
        evidence={"policy": policy, "reference": reference},
        check=PROBE,
        cause="reference",
    )


def judge_reference(make: Make, followed: int) -> Finding | None:
    """`followed`: of the first steps that moved the policy, after so many the reference was the policy."""
    if followed < FOLLOWED_STEPS:
        return None
    return make(
        "warning",
        found=f"the reference is the policy (after each of {followed} steps)",
        expected="it stays",
        causes=("synchronized at every step (or the policy's own tensors)",),
        action="copy the policy once, before training; sync_ref_model only every some hundred steps",
        evidence={"steps": followed},
        check="reference",
    )


def judge_best(make: Make, args) -> Finding | None:
    """`args`: TrainingArguments, which take metrics whose names do not end in `loss` for such that should be large."""
    metric = args.metric_for_best_model or "loss"
    is_largest_loaded = args.load_best_model_at_end and args.greater_is_better
    is_negated = "neg" in re.split("[^a-z]+", metric.lower())  # as scikit-learn's neg_log_loss
    if not is_largest_loaded or is_negated or not metric.lower().endswith(LOW_IS_BETTER):
        return None
    return make(
        "warning",
        found=f"the largest {metric} is loaded at the end",
        expected="the smallest",
        causes=("greater_is_better is true (Trainer's default where the name does not end in loss)",),
        action="greater_is_better=False",
        evidence={"metric": metric},
        check=PROBE,
    )
