"""What a guard says, and the names under which it says it."""

import json
from dataclasses import asdict, dataclass, field
from typing import Literal

# Stable: users grep for these and name them in `disabled_guards`. One id is one guard. Each has a section in
# docs/findings.md, which also says which of them this version can judge.
FINDING_IDS = (
    "missing_label_shift",
    "double_label_shift",
    "wrong_loss_target",
    "non_causal_attention",
    "cross_document_attention",
    "row_leak",
    "accumulation_mismatch",
    "init_loss_off",
    "loss_below_envelope",
    "loss_above_envelope",
    "loss_off_reference",
    "loss_spike",
    "loss_not_finite",
    "grad_norm_off",
    "repeated_data",
    "train_eval_overlap",
    "source_exhausted",
    "resume_replay",
    "resume_jump",
    "learning_rate_off",
    "frozen_parameters",
    "lost_updates",
    "untied_weights",
    "token_budget_off",
    "token_out_of_range",
    "eos_never_target",
    "eval_not_repeatable",
    "eval_train_mismatch",
    "rank_divergence",
)

Severity = Literal["info", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One thing a guard found, once per onset.

    `found` and `expected` are short phrases with numbers; `likely_causes` is ordered, most likely first;
    `evidence` holds the plain numbers behind it, JSON-able.
    """

    id: str
    severity: Severity
    step: int
    tokens_seen: int
    found: str
    expected: str
    likely_causes: tuple[str, ...] = ()
    action: str = ""
    evidence: dict = field(default_factory=dict)

    def __post_init__(self):
        assert self.id in FINDING_IDS, f"unknown finding id {self.id}"

    def log_line(self) -> str:
        """The message part of the log line; the prefix `WARNING recipe.guards |` comes from the log format."""
        parts = [self.id, f"step {self.step}", f"found {self.found}", f"expected {self.expected}"]
        if self.likely_causes:
            parts.append(f"likely: {self.likely_causes[0]}")
        if self.action:
            parts.append(f"do: {self.action}")
        return " | ".join([*parts, f"docs/findings.md#{self.id}"])

    def to_json(self) -> str:
        return json.dumps(asdict(self))
