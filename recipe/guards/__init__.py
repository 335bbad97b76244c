"""Guards against silent training bugs, for any `transformers.Trainer`:
`trainer.add_callback(RegressionCallback())`.

    callback.py      RegressionCallback: Trainer's events, in the order in which they come
    listener.py      how it reaches the Trainer; listens to methods and to the head's gradient
    facts.py         what the Trainer can say of its run before the first step
    preflight.py     every probe on one real micro-batch, leaving no trace
    probes/          the exact tests: targets, attention, gradient, equivalence
    pinned.py        one batch whose loss is computed again after a resume
    optimization.py  what is measured around the optimizer's step:
        parameters.py    do they move; gradients.py  what micro-batches add up to; adam.py  the step's arithmetic
        precision.py     does the forward pass use the weights as they are now
    steps.py         a step as it is heard, its numbers on their way to the host
    batches.py       token ids and flags of what the model was given
    ranks.py         what ranks tell each other
    watch.py         rank 0's memory: makes of each step what the guards below see in it
        vitals.py        loss, gradient norm, learning rate, tokens
        updates.py       parameters: moved, tied, equal over ranks, the same after a resume
        envelope.py      n-gram ceiling and floor of the loss
        trajectory.py    reference curves
        ledger.py        fingerprints: repetition, replay, contamination
        evaluation.py    which rows an evaluation scores, and the loss it reports
    diagnosis.py     findings joined into one story
    journal.py       what is said, once at each onset; records.py the files
    state.py         what is kept in a checkpoint
    finding.py       Finding, and the ids
    thresholds.py    every number that decides, with its origin

A guard is a pure function that returns a `Finding` or None; everything else feeds it.
"""

from recipe.guards.callback import RegressionCallback
from recipe.guards.finding import FINDING_IDS, Finding

__all__ = ["FINDING_IDS", "Finding", "RegressionCallback"]
