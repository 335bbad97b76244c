"""Findings joined into one story: what a curve or a count shows is explained by what a probe has found."""

from collections.abc import Iterable
from dataclasses import replace

from recipe.guards.finding import Finding

LEAKS = (
    "missing_label_shift",
    "non_causal_attention",
    "row_leak",
    "cross_document_attention",
    "wrong_loss_target",
)
REPETITION = ("resume_replay", "repeated_data", "train_eval_overlap", "source_exhausted")
SCALE = ("accumulation_mismatch", "wrong_gradient", "eval_train_mismatch", "token_budget_off")
OPTIMIZATION = (
    "frozen_parameters",
    "lost_updates",
    "optimizer_off",
    "learning_rate_off",
    "untied_weights",
    "rank_divergence",
)
BREAKDOWN = ("loss_not_finite", "learning_rate_off", "grad_norm_off", "resume_jump", "rank_divergence")

# Symptom -> what can cause it, the most telling first. The guards of a symptom ask the probes again when they fire.
CAUSES: dict[str, tuple[str, ...]] = {
    "loss_below_envelope": (*LEAKS, *REPETITION, *SCALE),
    "loss_off_reference": (*LEAKS, *REPETITION, "double_label_shift", *SCALE, *OPTIMIZATION),
    "loss_above_envelope": ("double_label_shift", "wrong_loss_target", *OPTIMIZATION, *SCALE, "compiled_mismatch"),
    "loss_spike": (*BREAKDOWN, *LEAKS, "wrong_loss_target", "token_out_of_range"),
    "loss_not_finite": (
        "learning_rate_off",
        "grad_norm_off",
        "wrong_gradient",
        "lost_updates",
        "accumulation_mismatch",
    ),
    "init_loss_off": ("missing_label_shift", "non_causal_attention", "accumulation_mismatch"),
    "grad_norm_off": (
        "accumulation_mismatch",
        "wrong_gradient",
        "learning_rate_off",
        "loss_not_finite",
        "frozen_parameters",
    ),
    "train_eval_gap": (*LEAKS, *REPETITION, "eval_train_mismatch", "eval_not_repeatable"),
    "eval_train_mismatch": ("missing_label_shift", "double_label_shift", "wrong_loss_target", "accumulation_mismatch"),
    "resume_jump": ("resume_replay", "untied_weights", "learning_rate_off"),
}
CURVES = ("loss_below_envelope", "loss_above_envelope", "loss_off_reference", "loss_spike", "train_eval_gap")


# What the texts of a symptom's likely causes say of each probe, so that a cause that was just ruled out is not named.
SAID_OF = {
    "missing_label_shift": "shift",
    "double_label_shift": "shifted twice",
    "non_causal_attention": "causal",
    "row_leak": "row",
}
UNSEEN = "a leak that no probe can see (without gradient, outside of the model), or data that is known already"


def explain(finding: Finding, others: Iterable[Finding], asked_again: Iterable[str] = ()) -> Finding:
    """The finding with its causes among `others` named first, the most telling of them at the front.

    `asked_again`: ids of probes that were run again when this finding came up and saw nothing: what they rule out is
    not named.
    """
    known = {other.id: other for other in reversed(list(others)) if other.id != finding.id}
    causes = [known[name] for name in CAUSES.get(finding.id, ()) if name in known]
    cleared = [name for name in asked_again if name not in known]
    evidence = dict(finding.evidence)
    likely, action = finding.likely_causes, finding.action
    if cleared:
        evidence["asked_again_and_clear"] = cleared
        words = [SAID_OF[name] for name in cleared if name in SAID_OF]
        likely = tuple(cause for cause in likely if not any(word in cause for word in words))
    if len(likely) < len(finding.likely_causes):
        likely = (*likely, UNSEEN)
        action = "labels and attention were looked at again at this step and are clear; look at data and loss instead"
    if causes:
        evidence["causes"] = [cause.id for cause in causes]
        action = f"mend {causes[0].id} first: {causes[0].action}"
    named = tuple(f"{cause.id} (step {cause.step}: {cause.found})" for cause in causes)
    return replace(finding, likely_causes=(*named, *likely), action=action, evidence=evidence)


def root_causes(findings: Iterable[Finding]) -> list[Finding]:
    """The warnings and errors that no other one explains, the first onset of each id, errors first."""
    alarms: dict[str, Finding] = {}
    for finding in findings:
        if finding.severity != "info":
            alarms.setdefault(finding.id, finding)
    roots = [a for a in alarms.values() if not any(name in alarms for name in CAUSES.get(a.id, ()))]
    return sorted(roots or alarms.values(), key=lambda finding: finding.severity != "error")
