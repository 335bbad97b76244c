"""Exact tests of the loss and the attention, before step 1 and again when a curve looks wrong.

    targets.py       which token each position is really scored on, with what weight
    attention.py     what each position's logits depend on: later tokens, other rows, other documents
    gradient.py      whether what backward gives is the gradient of the loss
    equivalence.py   two ways to compute one thing: accumulated or whole, evaluated twice, evaluation or training

A probe knows no model class. It leaves the model as it was: no gradient, no change of mode, generators put back by
the caller (`preflight.py`). It returns a `Finding` or None and raises `CannotJudge` with the reason.
"""
