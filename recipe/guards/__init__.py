"""Guards against silent training bugs, for any `transformers.Trainer`:
`trainer.add_callback(RegressionCallback())`.

    callback.py      RegressionCallback: Trainer's events; attach.py: how it reaches the Trainer
    session.py       the guards on one training; worker.py: the thread beside it; ranks.py: what ranks exchange
    runner.py        calls the guards, each by itself; their state
    reporter.py      onset, recovery and explanations of findings
    guard.py         Guard, Finding, CannotJudge, NotApplicable
    run.py           facts of the run, read from the Trainer
    taps.py          what is recorded on each rank: batches.py, head.py, gradients.py, updates.py, ngrams.py;
                     fingerprints.py and ledger.py find in it what comes twice
    step.py          what guards are given on the main process
    oracle.py        a second implementation of some models, to compare them with
    muon.py          what Muon does to a matrix, for the guard in adam.py
    sandbox.py       running the trainer's own code without leaving a trace
    objective.py     what the loss is, by intervention; recording.py: one computation of it
    labels.py        a part of targets.py; policy.py: what a preference loss is compared with
    records.py       the files of a run; checkpoint.py: the guards' state in checkpoints
    trackers.py      numbers and findings in the trackers of `report_to`

Each other module is one guard, or a family that shares its measurement. A guard is added by a new module and a line in
`GUARDS`; CONTRIBUTING.md shows how.
"""

from recipe.guards.accumulation import AccumulationMismatch
from recipe.guards.adam import OptimizerOff
from recipe.guards.attention import AttentionLeak
from recipe.guards.callback import RegressionCallback
from recipe.guards.compiled import CompiledMismatch
from recipe.guards.diverged import LossDiverged
from recipe.guards.double_bos import DoubleBos
from recipe.guards.envelope import LossBelowEnvelope
from recipe.guards.eos import EosNeverTarget
from recipe.guards.evaluation import EvalNotRepeatable, EvalTrainMismatch, TrainEvalGap
from recipe.guards.finite import LossNotFinite
from recipe.guards.frozen import FrozenParameters
from recipe.guards.grad_norm import GradNorm
from recipe.guards.guard import Finding, Guard
from recipe.guards.initial_loss import InitialLoss
from recipe.guards.learning_rate import LearningRate
from recipe.guards.lossy_tokenizer import LossyTokenizer
from recipe.guards.lost_updates import LostUpdates
from recipe.guards.off_reference import LossOffReference
from recipe.guards.padding import PaddingIsTarget
from recipe.guards.rank_divergence import RankDivergence
from recipe.guards.reference_mismatch import ReferenceMismatch
from recipe.guards.repetition import Repetition
from recipe.guards.resume import ResumeJump
from recipe.guards.slow_path import SlowPath
from recipe.guards.spike import LossSpike
from recipe.guards.targets import LossTarget
from recipe.guards.ties import UntiedWeights
from recipe.guards.token_range import TokenRange
from recipe.guards.wrong_gradient import WrongGradient

# In the order in which they judge: a cause before what it explains.
GUARDS: tuple[type[Guard], ...] = (
    LossNotFinite,
    LossDiverged,
    LossSpike,
    LossOffReference,
    GradNorm,
    LearningRate,
    InitialLoss,
    LossTarget,
    PaddingIsTarget,
    AttentionLeak,
    TokenRange,
    DoubleBos,
    EosNeverTarget,
    LossyTokenizer,
    WrongGradient,
    AccumulationMismatch,
    LossBelowEnvelope,
    Repetition,
    RankDivergence,
    FrozenParameters,
    UntiedWeights,
    LostUpdates,
    OptimizerOff,
    TrainEvalGap,
    EvalTrainMismatch,
    EvalNotRepeatable,
    ReferenceMismatch,
    CompiledMismatch,
    ResumeJump,
    SlowPath,
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
