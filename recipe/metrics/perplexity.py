"""Mean negative log-likelihood and its exponential, as a local module: `evaluate.load(path of this file)`."""

import math

import datasets
import evaluate
import pyarrow.compute as pc


class Perplexity(evaluate.Metric):
    """Of a flat column. `perplexity_of` takes sums instead.

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
        return perplexity_of(pc.sum(predictions).as_py() or 0.0, len(predictions))  # Arrow sums float32 in float64


def perplexity_of(nats: float, num_tokens: int) -> dict[str, float]:
    loss = nats / num_tokens if num_tokens else math.nan
    try:
        return {"loss": loss, "perplexity": math.exp(loss)}
    except OverflowError:
        return {"loss": loss, "perplexity": math.inf}
