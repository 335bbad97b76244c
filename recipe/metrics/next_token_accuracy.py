"""Share of tokens whose most likely prediction is right, as a local module: `evaluate.load(path of this file)`."""

import math

import datasets
import evaluate
import pyarrow.compute as pc

IGNORE_INDEX = -100


class NextTokenAccuracy(evaluate.Metric):
    """Of flat columns. `next_token_accuracy_of` takes counts instead.

    Args:
        predictions: int32, the most likely id at each position, already aligned with its target.
        references: int32, the target id; -100 is not scored. Flat, as predictions: one number a token.
    Returns:
        next_token_accuracy: float in 0..1; NaN when no token is scored.
    """

    def _info(self):
        features = datasets.Features(predictions=datasets.Value("int32"), references=datasets.Value("int32"))
        return evaluate.MetricInfo(__doc__, "", features, inputs_description=self.__doc__, format="arrow")

    def _compute(self, predictions, references):
        is_scored = pc.not_equal(references, IGNORE_INDEX)
        is_right = pc.and_(pc.equal(predictions, references), is_scored)
        return next_token_accuracy_of(pc.sum(is_right).as_py(), pc.sum(is_scored).as_py())


def next_token_accuracy_of(num_right: int | None, num_scored: int | None) -> dict[str, float]:
    return {"next_token_accuracy": num_right / num_scored if num_scored else math.nan}
