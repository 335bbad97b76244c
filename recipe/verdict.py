"""The verdict on a run: one phrase, from what the guards found and from what was learned. Pure functions.

    healthy                                                         no warning or error, and context was learned
    no fault found, but nothing learned from context yet: REASON    too few tokens, learning rate 0, ...
    not judged: REASON                                              another objective, or context does not help
    not to be trusted: IDS / suspicious: IDS                        errors / warnings, root causes first

"Learned from context" means a final loss under the unigram entropy of the run's own tokens: no model that ignores
context gets there.
"""

import math
import signal
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from recipe.guards import GUARDS, Finding, RegressionCallback, root_causes

# The final loss is the mean of so many last steps where there was no evaluation. Chosen: one step alone is noise.
LAST_STEPS = 20
# Nats under the prequential unigram that need no context: knowing the frequencies beforehand saves about V ln(N) / 2N,
# 0.05 for V = 4096 and N = 600k. Nothing under the entropy of the very tokens that are scored.
PREQUENTIAL_MARGIN = 0.05
# Nats that a bigram must be under the unigram for context to help; 0 on random tokens. Chosen, not measured.
CONTEXT_HELPS = 0.3
# Tokens for each entry of the vocabulary before the bigram has learned enough to say that context does not help.
# Chosen. Measured: English and Python code of a 4k vocabulary gain 1.2 nats and more from 2 tokens an entry on,
# English in bytes 0.4 to 0.8.
TOKENS_PER_ENTRY = 30
# A run of fewer steps, or of a smaller sum of learning rates, is short: the demo leaves its plateau at the unigram
# near step 65, at a sum of 0.1. With room for other optimizers and sizes.
ENOUGH_STEPS, ENOUGH_RATE = 300, 0.5

HEALTHY = "healthy"
NOTHING_LEARNED = "no fault found, but nothing learned from context yet"
NOT_JUDGED = "not judged"
UNTRUSTED = "not to be trusted"
TARGETS = tuple(name for guard in GUARDS if guard.judges_target for name in guard.ids)
Kind = Literal["healthy", "nothing_learned", "not_judged", "findings"]


@dataclass(frozen=True)
class Learned:
    """What a run learned. `final_loss`: see `final_loss`. `unigram`: nats, the entropy of the tokens that it scores,
    or the prequential loss of their frequencies (`is_prequential`); `unigram_of_run`, `bigram_of_run`: prequential
    losses of the training tokens, last known. `learning_rate_sum`: over all steps. None: not known."""

    final_loss: float | None
    unigram: float | None
    steps: int
    tokens_seen: int
    learning_rate_sum: float | None = None
    vocab_size: int | None = None
    unigram_of_run: float | None = None
    bigram_of_run: float | None = None
    is_prequential: bool = False


@dataclass(frozen=True)
class Verdict:
    kind: Kind
    text: str

    @property
    def colour(self) -> str:
        """On a terminal: a key of `console.COLOURS`."""
        if self.kind == "findings":
            return "error" if self.text.startswith(UNTRUSTED) else "warning"
        return "good" if self.kind == "healthy" else "warning"


def judge_run(
    findings: Sequence[Finding],
    learned: Learned,
    judged: Collection[str],
    reasons: Mapping[str, str] = {},
    failure: str | None = None,
    interrupted_by: str | None = None,
) -> Verdict:
    """`judged`: ids that could judge; `reasons`: id -> why it could not, or did not apply; `failure`: why the guards
    were not in force to the end. `interrupted_by`: the name of the signal that ended the run."""
    if words := say_findings(findings):
        return Verdict("findings", words)
    verdict = (
        _not_judged(judged, reasons, failure, learned.steps) or _judge_learning(learned) or Verdict("healthy", HEALTHY)
    )
    if interrupted_by is None:
        return verdict
    if verdict.kind == "healthy":
        return Verdict("healthy", f"interrupted by {interrupted_by}, {HEALTHY} so far")
    return Verdict(verdict.kind, f"interrupted by {interrupted_by}, so far {verdict.text}")


def say_findings(findings: Sequence[Finding]) -> str:
    """An error says that the loss is not what it seems, a warning that it does not look right; what explains the
    others comes first. Empty where there is neither."""
    roots = [finding.id for finding in root_causes(findings)]
    for severity, words in (("error", UNTRUSTED), ("warning", "suspicious")):
        ids = dict.fromkeys(finding.id for finding in findings if finding.severity == severity)
        if ids:
            return f"{words}: {', '.join(sorted(ids, key=lambda name: name not in roots))}"
    return ""


def final_loss(eval_loss: float | None, losses: Sequence[float]) -> float | None:
    """The last evaluation's loss, else the mean of the last LAST_STEPS reported training losses."""
    if eval_loss is not None:
        return eval_loss
    return statistics.fmean(losses[-LAST_STEPS:]) if losses else None


def _not_judged(
    judged: Collection[str], reasons: Mapping[str, str], failure: str | None, steps: int
) -> Verdict | None:
    if failure is not None:
        return Verdict("not_judged", f"{NOT_JUDGED}: {failure}")
    if not steps:
        return Verdict("not_judged", f"{NOT_JUDGED}: no step was trained")
    if not set(TARGETS) & set(judged):
        reason = next((reasons[name] for name in TARGETS if name in reasons), "no guard could read it")
        if reason.startswith("the objective is"):
            return Verdict("not_judged", f"{NOT_JUDGED}: {reason}")
        return Verdict("not_judged", f"{NOT_JUDGED}: what the loss is computed on is not known ({reason})")
    return None


def _judge_learning(learned: Learned) -> Verdict | None:
    """None where the final loss is under the unigram entropy."""
    loss, unigram = learned.final_loss, learned.unigram
    if loss is None or unigram is None:
        missing = "final loss" if loss is None else "unigram entropy"
        return Verdict("not_judged", f"{NOT_JUDGED}: no {missing} is known")
    if loss < unigram - (PREQUENTIAL_MARGIN if learned.is_prequential else 0.0):  # false for NaN
        return None
    compared = f"final loss {loss:.2f}, unigram entropy {unigram:.2f}"
    if learned.learning_rate_sum == 0:
        return Verdict("nothing_learned", f"{NOTHING_LEARNED}: the learning rate was 0 ({compared})")
    if _context_does_not_help(learned):
        gain = learned.unigram_of_run - learned.bigram_of_run
        return Verdict(
            "not_judged",
            f"{NOT_JUDGED}: context does not help on this data (one token of it saves {gain:.2f} nats; {compared})",
        )
    return Verdict("nothing_learned", f"{NOTHING_LEARNED}: {_why_nothing(learned)} ({compared})")


def _context_does_not_help(learned: Learned) -> bool:
    known = (learned.unigram_of_run, learned.bigram_of_run, learned.vocab_size)
    if None in known or not all(map(math.isfinite, known)):
        return False
    has_seen_enough = learned.tokens_seen >= TOKENS_PER_ENTRY * learned.vocab_size
    return has_seen_enough and learned.unigram_of_run - learned.bigram_of_run < CONTEXT_HELPS


def _why_nothing(learned: Learned) -> str:
    if learned.steps < ENOUGH_STEPS:
        return f"too few tokens, {learned.tokens_seen:,} in {learned.steps:,} steps"
    if learned.learning_rate_sum is not None and learned.learning_rate_sum < ENOUGH_RATE:
        return f"the learning rates of all steps add up to {learned.learning_rate_sum:.2g} only"
    return f"after {learned.tokens_seen:,} tokens in {learned.steps:,} steps, for no reason that a guard knows"


# --- after a training, from its callback


def context_of(guards: RegressionCallback) -> dict[str, float | int | None]:
    """Prequential nats of unigram and bigram in the last steps that were scored, the sum of the learning rates, and
    the vocabulary; None where they are not known."""
    names, session = ("unigram_of_run", "bigram_of_run", "learning_rate_sum", "vocab_size"), guards.session
    if session is None or session.taps is None:
        return dict.fromkeys(names)
    recent = session.taps.ngrams.recent if session.taps.ngrams is not None else []
    means = map(statistics.fmean, zip(*recent, strict=True)) if recent else (None, None)
    return dict(zip(names, (*means, session.learning_rate_sum, session.run.vocab_size or None), strict=True))


def verdict(
    guards: RegressionCallback, received: int | None, eval_loss: float | None = None, entropy: float | None = None
) -> Verdict:
    """`entropy`: of the tokens that `eval_loss` is about. Without it, or without an evaluation (an interrupted run, a
    Trainer of one's own), the loss is compared with what the frequencies of the training tokens give, scored before
    they are learned. For any `RegressionCallback`, after training."""
    context = context_of(guards)
    is_prequential = (eval_loss is None or entropy is None) and context["unigram_of_run"] is not None
    learned = Learned(
        final_loss=final_loss(eval_loss, [record["loss"] for record in guards.history]),
        unigram=context["unigram_of_run"] if is_prequential else entropy,
        steps=guards.history[-1]["step"] if guards.history else 0,
        tokens_seen=guards.tokens_seen,
        is_prequential=is_prequential,
        **context,
    )
    name = signal.Signals(received).name if received else None
    reasons = guards.not_applicable | guards.cannot_judge
    return judge_run(guards.findings, learned, guards.judged, reasons, guards.failure, name)


def describe_guards(guards: RegressionCallback) -> dict:
    return {
        "judged": sorted(guards.judged - guards.disabled),
        "judged_steps": dict(guards.judged_steps),
        "cannot_judge": guards.cannot_judge,
        "not_applicable": guards.not_applicable,
        "disabled": sorted(guards.disabled),
    }
