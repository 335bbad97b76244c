"""The verdict on a run: one phrase, from what the guards found and from what was learned. Pure functions.

    healthy                                                         no warning or error, and context was learned
    no fault found, but nothing learned from context yet: REASON    too few tokens, learning rate 0, ...
    not judged: REASON                                              another objective, or context does not help
    not to be trusted: IDS / suspicious: IDS                        errors / warnings, root causes first

"Learned from context" means a final loss under the unigram entropy of the run's own tokens: no model that ignores
context gets there.
"""

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from recipe.guards import GUARDS, Finding, RegressionCallback, root_causes
from recipe.guards.diverged import LossDiverged

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
# A sum of learning rates that moves nothing: it is under the rounding of a float32 weight of 1, 6e-8 and more.
NO_RATE = 1e-7
# Nats above a uniform guess, or above the first loss, that more tokens do not explain. Chosen, above a step's noise.
WORSE = 0.5
# Samples of the head in the last steps, before they are used; standard errors by which they may differ from the
# reported loss, which is taken where it agrees, being of more tokens; and the share of it up to which evaluations are
# in the same unit. Chosen.
MIN_SAMPLES, ERRORS, SAME_UNIT = 3, 2.0, 0.1

HEALTHY = "healthy"
NOTHING_LEARNED = "no fault found, but nothing learned from context yet"
NOT_JUDGED = "not judged"
UNTRUSTED = "not to be trusted"
TARGETS = tuple(name for guard in GUARDS if guard.judges_target for name in guard.ids)
Kind = Literal["healthy", "nothing_learned", "not_judged", "findings"]


@dataclass(frozen=True)
class Learned:
    """What a run learned. `final_loss`: nats per token, see `final_loss`; `why_unknown`: where it is None;
    `first_loss`: of its first step; `eval_loss`: the least of the last evaluations of a run that repeats its rows.
    `unigram`: nats, the entropy of the tokens that it scores, or the prequential loss of their frequencies
    (`is_prequential`); `unigram_of_run`, `bigram_of_run`: prequential losses of the training tokens, last known.
    `learning_rate_sum`: over all steps, of the largest rate. None: not known."""

    final_loss: float | None
    unigram: float | None
    steps: int
    tokens_seen: int
    learning_rate_sum: float | None = None
    vocab_size: int | None = None
    unigram_of_run: float | None = None
    bigram_of_run: float | None = None
    is_prequential: bool = False
    first_loss: float | None = None
    eval_loss: float | None = None
    why_unknown: str | None = None


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
    were not in force to the end. `interrupted_by`: the name of the signal or exception that ended the run."""
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
    """None where the final loss is under the unigram entropy, and no evaluation says that only rows were learned."""
    loss, unigram, rate_sum = learned.final_loss, learned.unigram, learned.learning_rate_sum
    if rate_sum is not None and rate_sum < NO_RATE:
        rate = "the learning rate was 0" if rate_sum == 0 else f"the learning rates add up to {rate_sum:.2g} only"
        compared = f" (final loss {loss:.2f}, unigram entropy {unigram:.2f})" if None not in (loss, unigram) else ""
        return Verdict("nothing_learned", f"{NOTHING_LEARNED}: {rate}{compared}")
    if loss is None or unigram is None:
        missing = "final loss" if loss is None else "unigram entropy"
        return Verdict("not_judged", f"{NOT_JUDGED}: {learned.why_unknown or f'no {missing} is known'}")
    if loss < unigram - (PREQUENTIAL_MARGIN if learned.is_prequential else 0.0):  # false for NaN
        return _judge_evaluation(learned)
    compared = f"final loss {loss:.2f}, unigram entropy {unigram:.2f}"
    if reason := _has_diverged(learned):
        return Verdict("nothing_learned", f"{NOTHING_LEARNED}: {reason} ({compared})")
    if _context_does_not_help(learned):
        gain = learned.unigram_of_run - learned.bigram_of_run
        return Verdict(
            "not_judged",
            f"{NOT_JUDGED}: context does not help on this data (one token of it saves {gain:.2f} nats; {compared})",
        )
    return Verdict("nothing_learned", f"{NOTHING_LEARNED}: {_why_nothing(learned)} ({compared})")


def _judge_evaluation(learned: Learned) -> Verdict | None:
    """Where rows come again, a low loss may be that of rows known by heart. No model that learned more than these is
    worse than a uniform guess on others of their kind."""
    if learned.eval_loss is None or not learned.vocab_size or not learned.unigram:
        return None
    guess = math.log(learned.vocab_size)
    if learned.eval_loss < max(guess, learned.unigram):
        return None
    words = f"its rows were learned by heart, or evaluated on another kind of text (eval loss {learned.eval_loss:.2f}"
    compared = f"{words}, a uniform guess {guess:.2f}, final loss {learned.final_loss:.2f})"
    return Verdict("nothing_learned", f"{NOTHING_LEARNED}: {compared}")


def _has_diverged(learned: Learned) -> str | None:
    """Why more tokens would not help; None where they may."""
    guess, loss = math.log(learned.vocab_size) if learned.vocab_size else math.inf, learned.final_loss
    first = learned.first_loss
    if not math.isfinite(loss):
        return "the loss is not finite"
    if loss > max(guess, first or 0.0) + WORSE:
        return f"the loss has diverged, above a uniform guess, {guess:.2f}"
    if first is not None and loss > first + WORSE:
        return f"the loss rose, from {first:.2f} in the first step"
    return None


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


@dataclass(frozen=True)
class Measured:
    """Nats per token. `loss`: of the last steps; `first_loss`: of the first; `why_unknown`: what the Trainer reports
    may be of another unit, and nothing else is known; `is_same_unit`: evaluations are per token, too. None: not
    known."""

    loss: float | None
    first_loss: float | None = None
    why_unknown: str | None = None
    is_same_unit: bool = False


def measure(guards: RegressionCallback) -> Measured:
    """The cross entropy that was sampled at the head, where the reported loss does not agree with it."""
    counts = [f.evidence for f in guards.findings if f.evidence.get("weight") and f.evidence.get("scored")]
    factor = counts[-1]["num_items"] / counts[-1]["scored"] if counts else 1.0  # divided by another count
    loss = final_loss(None, [factor * record["loss"] for record in guards.history])
    runner = guards.session.runner if guards.session is not None else None
    guard = next((g for g in runner.guards if isinstance(g, LossDiverged)), None) if runner is not None else None
    if loss is None or guard is None:
        return Measured(loss)
    first = guard.state["first_reported"]
    first = None if first is None else factor * first
    pairs = [(factor * reported, sampled) for reported, sampled in guard.state["window"] if sampled is not None]
    if len(pairs) < MIN_SAMPLES or not all(math.isfinite(value) for pair in pairs for value in pair):
        return _measured_without_samples(loss, first, guards.session.run)
    sampled, off = statistics.fmean(s for _, s in pairs), [s - r for r, s in pairs]
    is_same_unit = abs(statistics.fmean(off)) <= SAME_UNIT * sampled
    if abs(statistics.fmean(off)) <= ERRORS * statistics.stdev(off) / math.sqrt(len(off)):
        return Measured(loss, first, is_same_unit=is_same_unit)
    return Measured(sampled, guard.state["first_sampled"], is_same_unit=is_same_unit)


def _measured_without_samples(loss: float, first: float | None, run) -> Measured:
    """A new model begins near ln V, or above it where its head is wide."""
    guess = math.log(run.vocab_size) if run.vocab_size else math.nan
    if first is None or not run.is_new_model or first >= guess - LossDiverged.FIRST_NEAR:
        return Measured(loss, first, is_same_unit=first is not None and abs(first - guess) < LossDiverged.FIRST_NEAR)
    why = f"the reported loss is not known to be per token (it began at {first:.2f}, ln V is {guess:.2f})"
    return Measured(None, None, why if math.isfinite(guess) else None)


def verdict(
    guards: RegressionCallback,
    interrupted_by: str | None = None,
    eval_loss: float | None = None,
    entropy: float | None = None,
) -> Verdict:
    """For any `RegressionCallback`, after training. `interrupted_by`: the name of a signal or an exception. `entropy`:
    of the tokens that `eval_loss` is about. Without it, or without an evaluation (an interrupted run, a Trainer of
    one's own), the loss is compared with what the frequencies of the training tokens give, scored before they are
    learned."""
    context = context_of(guards)
    measured, session = measure(guards), guards.session
    is_repeated = session is not None and session.passes > 1 and measured.is_same_unit
    is_prequential = (eval_loss is None or entropy is None) and context["unigram_of_run"] is not None
    learned = Learned(
        final_loss=measured.loss if eval_loss is None else eval_loss,
        first_loss=measured.first_loss,
        why_unknown=measured.why_unknown,
        eval_loss=min(session.eval_losses.values(), default=None) if is_repeated else None,
        unigram=context["unigram_of_run"] if is_prequential else entropy,
        steps=guards.history[-1]["step"] if guards.history else 0,
        tokens_seen=guards.tokens_seen,
        is_prequential=is_prequential,
        **context,
    )
    reasons = guards.not_applicable | guards.cannot_judge
    return judge_run(guards.findings, learned, guards.judged, reasons, guards.failure, interrupted_by)


def describe_guards(guards: RegressionCallback) -> dict:
    return {
        "judged": sorted(guards.judged - guards.disabled),
        "judged_steps": dict(guards.judged_steps),
        "cannot_judge": guards.cannot_judge,
        "not_applicable": guards.not_applicable,
        "disabled": sorted(guards.disabled),
    }
