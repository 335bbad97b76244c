"""What a guard says, and the names under which it says it."""

import json
from dataclasses import asdict, dataclass, field
from typing import Literal

# Stable: users grep for these and name them in `disabled_guards`. One id is one guard. Each has a section in
# docs/findings.md.
FINDINGS: dict[str, str] = {
    "missing_label_shift": "Each position is scored on the token it can already see, so the model learns to copy.",
    "double_label_shift": "Labels are shifted twice: the model learns the token after the next.",
    "wrong_loss_target": "The loss is not computed on the next token.",
    "non_causal_attention": "A position's logits depend on later tokens.",
    "cross_document_attention": "A document's logits depend on its neighbour in the block.",
    "row_leak": "One row of the batch changes another's logits.",
    "wrong_gradient": "What backward gives is not the gradient of the loss.",
    "accumulation_mismatch": "Accumulated micro-batches do not give the gradient of the whole batch.",
    "init_loss_off": "The first loss is not that of an untrained model.",
    "loss_below_envelope": "The loss is lower than an honest model can reach on this data so early.",
    "loss_above_envelope": "The model has not learned even the token frequencies or the use of context.",
    "loss_off_reference": "The loss has left the band of the reference run.",
    "loss_spike": "The loss jumped far away from its recent level.",
    "loss_not_finite": "The loss is NaN or infinite.",
    "grad_norm_off": "The gradient norm is far from its usual level.",
    "repeated_data": "The model was given blocks that it had already seen.",
    "train_eval_overlap": "Text of the hold-out is in the training data.",
    "source_exhausted": "The source ended and a further pass over it began.",
    "resume_replay": "After resuming, data came round again.",
    "resume_jump": "After resuming, the loss did not go on where it had stopped.",
    "learning_rate_off": "The learning rate is not what the schedule says.",
    "optimizer_off": "The optimizer does not compute what its class and its settings say.",
    "frozen_parameters": "Parameters that should train do not move.",
    "lost_updates": "Updates are rounded away, undone, not used, or far smaller than the learning rate asks for.",
    "untied_weights": "Embedding and head should share their weights and do not.",
    "token_budget_off": "The tokens counted are not the tokens planned.",
    "token_out_of_range": "Token ids lie outside the model's vocabulary.",
    "double_bos": "Texts begin with two BOS tokens.",
    "padding_is_target": "Padding is scored, so the model learns to pad.",
    "eos_never_target": "The end of a document is never a target, so the model cannot learn to stop.",
    "eval_not_repeatable": "Two evaluations of one model differ.",
    "eval_train_mismatch": "Eval and train loss of the same data differ.",
    "train_eval_gap": "Train and eval loss are far apart.",
    "compiled_mismatch": "The compiled model computes another loss or gradient than the eager one.",
    "rank_divergence": "The weights differ between ranks.",
}
FINDING_IDS = tuple(FINDINGS)


class CannotJudge(Exception):
    """A guard has nothing to go by; its message is the reason shown to the user."""


class NotApplicable(CannotJudge):
    """There is nothing in this run for the guard to judge, such as ranks to compare where there is one."""


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
