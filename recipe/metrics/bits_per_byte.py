"""Bits per byte, a local `evaluate` module: `evaluate.load("<path to this file>")`, no network."""

# One import per line: evaluate finds a module's requirements with a regex that cannot split `import a, b`.
import math

import datasets
import evaluate
import pyarrow.compute as pc

_DESCRIPTION = "Bits the model needs per UTF-8 byte of text: comparable across tokenizers, unlike loss per token."

_INPUTS = """
Args:
    predictions: float32, negative log-likelihood in nats of each scored token. Flat: one number a token.
    references: int32, UTF-8 bytes of that target token; 0 for a special token, whose nats still count, because a
        model must also say where a document ends.
Returns:
    bits_per_byte: float, sum(nats) / (ln 2 x sum(bytes)), both summed in float64 or int64. NaN when the targets
        hold no bytes at all: there is then no text to spread the bits over, and 0 or infinity would read as a score.
"""


class BitsPerByte(evaluate.Metric):
    """Columns stay in the Arrow file they were written to, so memory does not grow with the evaluation set."""

    def _info(self):
        features = {"predictions": datasets.Value("float32"), "references": datasets.Value("int32")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(features),
            format="arrow",
        )

    def _compute(self, predictions, references):
        num_bytes = pc.sum(references).as_py()
        if not num_bytes:  # None for no tokens, 0 for special tokens only
            return {"bits_per_byte": math.nan}
        nats = pc.sum(predictions).as_py()  # Arrow sums float32 in float64
        return {"bits_per_byte": nats / (math.log(2) * num_bytes)}
