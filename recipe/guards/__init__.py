"""Guards against silent training bugs, for any `transformers.Trainer`:
`trainer.add_callback(RegressionCallback())`.

    callback.py      RegressionCallback: Trainer's events; attach.py: how it reaches the Trainer
    session.py       the guards on one training; ranks.py: what ranks exchange
    runner.py        calls the guards; onset, recovery, explanations, state
    guard.py         Guard, Finding, CannotJudge, NotApplicable
    run.py           what the Trainer tells of its run
    taps.py          what is recorded on each rank: batches.py, head.py, ngrams.py
    sandbox.py       running the trainer's own code without leaving a trace
    records.py       the files of a run, and the guards' state in checkpoints

Each other module is one guard, or a family that shares its measurement. A guard is added by a new module and a line in
`GUARDS`; CONTRIBUTING.md shows how.
"""

from recipe.guards.adam import OptimizerOff
from recipe.guards.callback import RegressionCallback
from recipe.guards.double_bos import DoubleBos
from recipe.guards.guard import Finding, Guard
from recipe.guards.learning_rate import LearningRate

# In the order in which they judge a step: a cause before what it explains.
GUARDS: tuple[type[Guard], ...] = (
    LearningRate,
    DoubleBos,
    OptimizerOff,
)
RegressionCallback.guards = GUARDS

MEANINGS: dict[str, str] = {name: meaning for guard in GUARDS for name, meaning in guard.ids.items()}
FINDING_IDS = tuple(MEANINGS)

__all__ = ["FINDING_IDS", "GUARDS", "MEANINGS", "Finding", "Guard", "RegressionCallback", "root_causes"]


def root_causes(findings: list[Finding]) -> list[Finding]:
    """The warnings and errors that no other one explains, the first onset of each id, errors first."""
    explained_by = {name: guard.explained_by for guard in GUARDS for name in guard.ids}
    alarms: dict[str, Finding] = {}
    for finding in findings:
        if finding.severity != "info":
            alarms.setdefault(finding.id, finding)
    roots = [a for a in alarms.values() if not any(name in alarms for name in explained_by.get(a.id, ()))]
    return sorted(roots or alarms.values(), key=lambda finding: finding.severity != "error")
