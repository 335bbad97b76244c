"""Loss and perplexity, a local `evaluate` module: `evaluate.load("<path to this file>")`, no network."""

# One import per line: evaluate finds a module's requirements with a regex that cannot split `import a, b`.
import math

import datasets
import evaluate
import pyarrow.compute as pc

_DESCRIPTION = "Mean negative log-likelihood of the scored tokens, and its exponential."

_INPUTS = """
Args:
    predictions: float32, negative log-likelihood in nats of each scored token. Flat: one number a token.
Returns:
    loss: float, mean nats per token, summed in float64 over all tokens at once, so that the way the tokens were
        batched cannot change it. NaN when there is no token or one of them is NaN.
    perplexity: float, exp(loss); infinite where that overflows a float (loss above 709), NaN where loss is.
"""


class Perplexity(evaluate.Metric):
    """The column stays in the Arrow file it was written to, so memory does not grow with the evaluation set."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("float32")}),
            format="arrow",
        )

    def _compute(self, predictions):
        if not len(predictions):
            return {"loss": math.nan, "perplexity": math.nan}
        loss = pc.sum(predictions).as_py() / len(predictions)  # Arrow sums float32 in float64
        return {"loss": loss, "perplexity": _exp(loss)}


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
