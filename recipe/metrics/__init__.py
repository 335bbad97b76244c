"""How well a model predicts text it has not seen: loss, perplexity, bits per byte, next-token accuracy."""

import json
import re

import numpy as np
import torch
from torch.nn import functional as F
from transformers import EvalPrediction, PreTrainedTokenizerBase

from recipe.errors import UserError
from recipe.metrics.bits_per_byte import bits_per_byte_of
from recipe.metrics.next_token_accuracy import IGNORE_INDEX, next_token_accuracy_of
from recipe.metrics.perplexity import perplexity_of


def token_byte_lengths(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """UTF-8 bytes that each id adds to the decoded text: int32 of shape [len(tokenizer)].

    Summed over an encoding this is `len(text.encode())`, where the tokenizer keeps the text unchanged: a normalizer
    changes it, and a Llama-style dummy prefix adds one byte to each document. Special tokens and holes count 0.
    Raises UserError for a tokenizer that is neither byte-level nor SentencePiece.
    """
    is_byte_level = _is_byte_level(tokenizer)
    lengths = np.zeros(len(tokenizer), dtype=np.int32)
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(token_id for token_id, token in added.items() if token.special)}
    for token_id, piece in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
        if piece is None or token_id in special:
            continue
        if token_id in added:
            lengths[token_id] = len(added[token_id].content.encode())
        elif is_byte_level:  # one character per byte
            lengths[token_id] = len(piece)
        elif re.fullmatch("<0x..>", piece):  # <0xE2> is the one byte E2
            lengths[token_id] = 1
        else:  # text, with U+2581 for a space: "▁the" is 4 bytes
            lengths[token_id] = len(piece.replace("\u2581", " ").encode())
    return lengths


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = (json.loads(backend.to_str())["decoder"] or {}) if backend is not None else {}
    kinds = {part["type"] for part in decoder.get("decoders", [decoder]) if "type" in part}
    if "ByteLevel" in kinds:
        return True
    if kinds & {"Metaspace", "ByteFallback", "Replace"}:
        return False
    raise UserError(
        f"tokenizer {tokenizer.name_or_path!r}: cannot tell how many bytes a token stands for (decoder "
        f"{sorted(kinds) or 'unknown'}), so bits per byte cannot be computed. Use a byte-level BPE or a SentencePiece "
        "tokenizer."
    )


class NextTokenMetrics:
    """Trainer's `compute_metrics` under `batch_eval_metrics=True`: scores every token once, in constant memory.

        metrics = NextTokenMetrics(token_byte_lengths(tokenizer))
        Trainer(..., args=TrainingArguments(..., batch_eval_metrics=True), compute_metrics=metrics,
                preprocess_logits_for_metrics=metrics.preprocess_logits)

    Results are `perplexity`, `bits_per_byte`, `next_token_accuracy` and `loss`, NaN where nothing was scored. The last
    replaces Trainer's own `eval_loss`, which averages batch means and so moves with the batch size whenever rows
    differ in scored tokens (transformers#39241). Only sums are kept, and no file is written: a full disk cannot end an
    evaluation. Each rank sees all gathered tokens and computes the same result.

    Trainer passes `compute_result=True` at the last batch only if accelerate prepared the evaluation loader. With
    other loaders call `compute()` after the evaluation loop.
    """

    def __init__(self, byte_lengths: np.ndarray):
        """`byte_lengths`: int32 [vocab_size], from `token_byte_lengths`."""
        self.byte_lengths = byte_lengths
        self._forget()

    @staticmethod
    def preprocess_logits(
        logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Reduces logits [B, T, V] to (nll float32 [B, T-1], predicted id int32 [B, T-1]) on their own device.

        Entry t scores labels[:, t + 1] (labels are unshifted). It is 0 where that label is -100. Trainer passes a
        tuple when the model returns more than logits; the first entry is used.
        """
        logits = logits[0] if isinstance(logits, tuple) else logits
        targets = labels[:, 1:]
        nll = torch.zeros(targets.shape, dtype=torch.float32, device=logits.device)
        predicted = torch.zeros(targets.shape, dtype=torch.int32, device=logits.device)
        # Row by row: with 32k ids, a float32 copy of the whole batch can run out of memory.
        for row in range(logits.shape[0]):
            scores = logits[row, :-1]
            nll[row] = F.cross_entropy(scores.float(), targets[row], ignore_index=IGNORE_INDEX, reduction="none")
            predicted[row] = scores.argmax(dim=-1)
        return nll, predicted

    def __call__(self, prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        """Adds one gathered batch ((nll, predicted), labels [B, T]); returns the results with the last one."""
        nll, predicted = prediction.predictions
        targets = prediction.label_ids[:, 1:]
        is_scored = targets != IGNORE_INDEX
        nll, predicted, targets = (values[is_scored].cpu().numpy() for values in (nll, predicted, targets))
        self._nats += float(nll.sum(dtype=np.float64))
        self._num_tokens += len(targets)
        self._num_right += int((predicted == targets).sum())
        self._num_bytes += int(self.byte_lengths[targets].sum(dtype=np.int64))
        return self.compute() if compute_result else {}

    def compute(self) -> dict[str, float]:
        """Results over all tokens added since the last call, which are then forgotten."""
        results = perplexity_of(self._nats, self._num_tokens)
        results |= bits_per_byte_of(self._nats, self._num_bytes)
        results |= next_token_accuracy_of(self._num_right, self._num_tokens)
        self._forget()
        return results

    def _forget(self) -> None:
        self._nats, self._num_tokens, self._num_right, self._num_bytes = 0.0, 0, 0, 0
