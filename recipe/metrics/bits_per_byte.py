"""Bits per UTF-8 byte of text, comparable across tokenizers, as a local module: `evaluate.load(path of this file)`."""

import math

import datasets
import evaluate
import pyarrow.compute as pc


class BitsPerByte(evaluate.Metric):
    """Of flat columns. `bits_per_byte_of` takes sums instead.

    Args:
        predictions: float32, negative log-likelihood in nats of each scored token. Flat: one number a token.
        references: int32, UTF-8 bytes of that target token; 0 for a special token, whose nats still count, because a
            model must also predict where a document ends.
    Returns:
        bits_per_byte: float, sum(nats) / (ln 2 x sum(bytes)), both summed in float64 or int64. NaN when the targets
            have no bytes: 0 or infinity would look like a score.
    """

    def _info(self):
        features = datasets.Features(predictions=datasets.Value("float32"), references=datasets.Value("int32"))
        return evaluate.MetricInfo(__doc__, "", features, inputs_description=self.__doc__, format="arrow")

    def _compute(self, predictions, references):
        return bits_per_byte_of(pc.sum(predictions).as_py(), pc.sum(references).as_py())  # float32 summed in float64


def bits_per_byte_of(nats: float | None, num_bytes: int | None) -> dict[str, float]:
    if not num_bytes:  # None for no tokens, 0 for special tokens only
        return {"bits_per_byte": math.nan}
    return {"bits_per_byte": nats / (math.log(2) * num_bytes)}
