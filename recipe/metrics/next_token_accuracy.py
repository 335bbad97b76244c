"""Next-token accuracy, a local `evaluate` module: `evaluate.load("<path to this file>")`, no network."""

# One import per line: evaluate finds a module's requirements with a regex that cannot split `import a, b`.
import datasets
import evaluate
import pyarrow.compute as pc

_DESCRIPTION = "Share of scored tokens whose most likely prediction is the token that followed."

_INPUTS = """
Args:
    predictions: int32, the most likely id at each position, already aligned with its target.
    references: int32, the target id; -100 is not scored. Flat, as predictions: one number a token.
Returns:
    next_token_accuracy: float in 0..1; NaN when no token is scored.
"""

IGNORE_INDEX = -100


class NextTokenAccuracy(evaluate.Metric):
    """Columns stay in the Arrow file they were written to, so memory does not grow with the evaluation set."""

    def _info(self):
        features = {"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(features),
            format="arrow",
        )

    def _compute(self, predictions, references):
        is_scored = pc.not_equal(references, IGNORE_INDEX)
        is_hit = pc.and_(is_scored, pc.equal(predictions, references))
        num_scored = pc.sum(is_scored).as_py()
        return {"next_token_accuracy": pc.sum(is_hit).as_py() / num_scored if num_scored else float("nan")}
