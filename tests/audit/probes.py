"""The guards' own probes on the same model and batch: they must say what the direct tests say."""

from recipe.guards.attention import find_documents, probe_attention
from recipe.guards.guard import CannotJudge, Finding
from recipe.guards.labels import judge_last_position, judge_unscored
from recipe.guards.recording import recover_loss_targets
from recipe.guards.targets import LossTarget
from tests.audit.checks import FAULT, LIMIT, PASS, Result
from tests.audit.subject import Subject, make_batch

ATTENTION = {"causal": "non_causal_attention", "rows": "row_leak", "documents": "cross_document_attention"}


def run_probes(subject: Subject, setting: str) -> dict[str, str]:
    """By check: `silent`, the id and what was found, or why it cannot judge."""
    batch = make_batch(setting)
    inputs = subject.inputs(batch, batch.labels)
    said = {}
    try:
        found = recover_loss_targets(subject.model.train(), lambda: subject.model(**inputs).loss)
        finding = LossTarget.judge(batch.ids, found.targets, batch.labels)
        finding = finding or judge_unscored(LossTarget().wrong_target, found, batch.labels)
        finding = finding or judge_last_position(LossTarget().wrong_target, batch.ids, found, batch.labels)
        said["loss"] = f"{finding.id}: {finding.found}" if finding else "silent"
    except Exception as problem:
        said["loss"] = reason(problem)
    try:
        results = probe_attention(subject.model, inputs, find_documents(inputs))
        for check, name in ATTENTION.items():
            result = results.get(name)
            if isinstance(result, CannotJudge):
                said[check] = reason(result)
            else:
                said[check] = f"{result.id}: {result.found}" if isinstance(result, Finding) else "silent"
    except Exception as problem:
        said |= {check: reason(problem) for check in ATTENTION}
    return said


def reason(problem: Exception) -> str:
    kind = "cannot judge" if isinstance(problem, CannotJudge) else type(problem).__name__
    return f"{kind}: {' '.join(str(problem).split())[:160]}"


def disagreements(direct: dict[str, Result], said: dict[str, str]) -> list[str]:
    """Where a probe accuses what a direct test passes, or is silent on a fault."""
    found = []
    for check, words in said.items():
        result = direct.get(check)
        if result is None or words.startswith("cannot judge"):
            continue
        is_bad = result.status in (FAULT, LIMIT)
        if (result.status == PASS or is_bad) and is_bad != (words != "silent"):
            found.append(f"{check}: direct test {result.status} {result.detail}; probe {words}".replace("  ", " "))
    return found
