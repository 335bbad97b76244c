"""Mean negative log-likelihood and its exponential, as a local module: `evaluate.load(path of this file)`."""

import math

import datasets
import evaluate
import pyarrow.compute as pc


class Perplexity(evaluate.Metric):
    """The column stays in the Arrow file it was written to, so memory does not grow with the evaluation set.

    Args:
        predictions: float32, negative log-likelihood in nats of each scored token. Flat: one number a token.
    Returns:
        loss: float, mean nats per token, summed in float64 over all tokens, so that it does not depend on the
            batches. NaN when there is no token or one of them is NaN.
        perplexity: float, exp(loss); infinite where that overflows a float (loss above 709), NaN where loss is.
    """

    def _info(self):
        features = datasets.Features(predictions=datasets.Value("float32"))
        return evaluate.MetricInfo(__doc__, "", features, inputs_description=self.__doc__, format="arrow")

    def _compute(self, predictions):
        loss = pc.fill_null(pc.mean(predictions), math.nan)  # Arrow sums float32 in float64
        return {"loss": loss.as_py(), "perplexity": pc.exp(loss).as_py()}
