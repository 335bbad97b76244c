"""Metrics against plain torch and plain Python, alone and through a real Trainer."""

import math
import tempfile
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoTokenizer,
    EvalPrediction,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import recipe.metrics as metrics_package
from recipe.errors import UserError
from recipe.metrics import NextTokenMetrics, token_byte_lengths

FOLDER = Path(metrics_package.__file__).parent
SHIPPED_TOKENIZER = Path(__file__).parents[1] / "tokenizer" / "llama-4k"
VOCAB_SIZE = 64
BYTE_LENGTHS = np.arange(VOCAB_SIZE, dtype=np.int32) % 5
TEXTS = [
    "The loss fell from 10.27 to 1.80 in 120 steps.",
    "  two leading spaces, a\ttab and\n\n    an indented line",
    "naïve café, Größe, 你好世界, русский, ﬁ ligature",
    "emoji 🤗👩‍👩‍👧‍👦🇩🇪, é as e + combining accent: e\u0301",
    "<0x41> is not a byte here, and neither is <0xZZ>",
    "",
]


def load_module(name, tmp_path):
    return evaluate.load(str(FOLDER / f"{name}.py"), cache_dir=str(tmp_path), experiment_id=name)


# The three modules, as evaluate.load gives them.


def test_accuracy_ignores_masked_references(tmp_path):
    accuracy = load_module("next_token_accuracy", tmp_path)
    result = accuracy.compute(predictions=[5, 6, 7, 8], references=[5, 9, -100, 8])
    assert result == {"next_token_accuracy": 2 / 3}
    assert math.isnan(accuracy.compute(predictions=[5], references=[-100])["next_token_accuracy"])


def test_a_masked_prediction_of_minus_100_is_not_a_hit(tmp_path):
    accuracy = load_module("next_token_accuracy", tmp_path)
    assert accuracy.compute(predictions=[-100, 3], references=[-100, 4]) == {"next_token_accuracy": 0.0}


def test_perplexity_is_exp_of_the_mean(tmp_path):
    result = load_module("perplexity", tmp_path).compute(predictions=[1.0, 2.0, 6.0])
    assert result == {"loss": 3.0, "perplexity": math.exp(3.0)}


def test_perplexity_overflows_to_infinity_and_keeps_nan(tmp_path):
    perplexity = load_module("perplexity", tmp_path)
    assert perplexity.compute(predictions=[800.0]) == {"loss": 800.0, "perplexity": math.inf}
    assert perplexity.compute(predictions=[math.inf]) == {"loss": math.inf, "perplexity": math.inf}
    result = perplexity.compute(predictions=[1.0, math.nan])
    assert math.isnan(result["loss"]) and math.isnan(result["perplexity"])


def test_bits_per_byte(tmp_path):
    bits_per_byte = load_module("bits_per_byte", tmp_path)
    # 3 x ln 2 nats over 4 bytes; the end of a document costs nats and adds no byte.
    result = bits_per_byte.compute(predictions=[math.log(2)] * 3, references=[1, 3, 0])
    assert result["bits_per_byte"] == pytest.approx(0.75, rel=1e-7)  # log(2) was rounded to float32
    assert math.isnan(bits_per_byte.compute(predictions=[1.0], references=[0])["bits_per_byte"])


def test_sums_are_float64():
    nll = np.random.default_rng(0).gamma(2.0, 2.0, 100_000).astype(np.float32)
    metrics = NextTokenMetrics(BYTE_LENGTHS)
    add(metrics, nll.tolist(), [1] * 100_001, compute_result=False)
    # A float32 sum is off by up to 6e-8, its rounding; a float64 one by 1e-16 times a few.
    assert metrics.compute()["loss"] == pytest.approx(math.fsum(nll.tolist()) / len(nll), rel=1e-13)


def test_sums_give_what_the_modules_give(tmp_path):
    rng, metrics = np.random.default_rng(0), NextTokenMetrics(BYTE_LENGTHS)
    nll = rng.gamma(2.0, 2.0, (3, 1000)).astype(np.float32)
    predicted, labels = rng.integers(0, 4, (3, 1000)).astype(np.int32), rng.integers(0, 4, (3, 1001))
    for row in range(3):
        labels[row, 1:200] = -100
        arrays = [torch.from_numpy(array[row : row + 1]) for array in (nll, predicted, labels)]
        result = metrics(EvalPrediction(tuple(arrays[:2]), arrays[2]), compute_result=row == 2)
    targets = labels[:, 1:]
    is_scored = targets != -100
    columns = {"predictions": predicted.ravel(), "references": targets.ravel()}
    expected = load_module("next_token_accuracy", tmp_path).compute(**columns)
    expected |= load_module("perplexity", tmp_path).compute(predictions=nll[is_scored])
    columns = {"predictions": nll[is_scored], "references": BYTE_LENGTHS[targets[is_scored]]}
    assert result == pytest.approx(expected | load_module("bits_per_byte", tmp_path).compute(**columns), rel=1e-13)


# Bytes per token.


@pytest.fixture(scope="module")
def byte_level_tokenizer():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<eos>"], initial_alphabet=alphabet)
    backend.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    tokenizer.add_tokens(["größer", "🤗🤗"])
    return tokenizer


@pytest.fixture(scope="module")
def byte_fallback_tokenizer():
    """A SentencePiece-style vocabulary: two words, 256 bytes, a space as U+2581, and nothing else."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a", "é"]
    vocab = {piece: token_id for token_id, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()],
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def bytes_of(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return int(token_byte_lengths(tokenizer)[ids].sum()) if ids else 0


@pytest.mark.parametrize("text", [*TEXTS, "größer 🤗🤗 added"])
def test_byte_level_lengths_sum_to_the_text(byte_level_tokenizer, text):
    assert bytes_of(byte_level_tokenizer, text) == len(text.encode())


@pytest.mark.parametrize("text", [*TEXTS, "a a  é"])
def test_byte_fallback_lengths_sum_to_the_text(byte_fallback_tokenizer, text):
    assert bytes_of(byte_fallback_tokenizer, text) == len(text.encode())


@pytest.mark.parametrize("text", TEXTS)
def test_shipped_tokenizer_lengths_sum_to_the_text(text):
    assert bytes_of(AutoTokenizer.from_pretrained(SHIPPED_TOKENIZER), text) == len(text.encode())


def test_special_tokens_have_no_bytes(byte_level_tokenizer, byte_fallback_tokenizer):
    for tokenizer in (byte_level_tokenizer, byte_fallback_tokenizer):
        lengths = token_byte_lengths(tokenizer)
        assert lengths.shape == (len(tokenizer),) and lengths.dtype == np.int32
        assert lengths[tokenizer.eos_token_id] == 0
        assert (np.delete(lengths, tokenizer.all_special_ids) > 0).all()


def test_tokenizer_without_bytes_is_refused():
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(UserError, match="WordPiece"):
        token_byte_lengths(PreTrainedTokenizerFast(tokenizer_object=backend))


# Through Trainer.


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,  # far from uniform, so that rows differ in loss
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def rows():
    """Seven rows of 12 tokens, with 0 to 6 labels masked: batches of 2, 3 and 5 are uneven at the end."""
    ids = np.random.default_rng(1).integers(0, VOCAB_SIZE, (7, 12))
    labels = ids.copy()
    for row in range(7):
        labels[row, 2 : 2 + row] = -100
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


@pytest.fixture(scope="module")
def reference(model, rows):
    """The four figures from plain torch cross entropy in float64, on all rows at once."""
    ids, labels = torch.tensor(rows["input_ids"][:]), torch.tensor(rows["labels"][:])
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].reshape(-1, VOCAB_SIZE).double()
    targets = labels[:, 1:].reshape(-1)
    is_scored = targets != -100
    nats = torch.nn.functional.cross_entropy(logits[is_scored], targets[is_scored], reduction="sum").item()
    loss = nats / is_scored.sum().item()
    return {
        "eval_loss": loss,
        "eval_perplexity": math.exp(loss),
        "eval_bits_per_byte": nats / math.log(2) / BYTE_LENGTHS[targets[is_scored].numpy()].sum(),
        "eval_next_token_accuracy": (logits.argmax(-1) == targets)[is_scored].double().mean().item(),
    }


def build_trainer(model, rows, tmp_path, batch_size, metrics=None):
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_eval_batch_size=batch_size,
        batch_eval_metrics=True,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    if metrics is None:
        return Trainer(model=model, args=arguments, eval_dataset=rows)
    return Trainer(
        model=model,
        args=arguments,
        eval_dataset=rows,
        compute_metrics=metrics,
        preprocess_logits_for_metrics=metrics.preprocess_logits,
    )


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_trainer_evaluate_equals_plain_torch(model, rows, reference, tmp_path, batch_size):
    result = build_trainer(model, rows, tmp_path, batch_size, NextTokenMetrics(BYTE_LENGTHS)).evaluate()
    for name, expected in reference.items():
        # Logits and the log-softmax of a token are float32 (eps 1.2e-7); the sums are not.
        assert result[name] == pytest.approx(expected, rel=1e-6), name


def test_trainers_own_loss_is_the_one_that_is_replaced(model, rows, reference, tmp_path):
    own = {size: build_trainer(model, rows, tmp_path, size).evaluate()["eval_loss"] for size in (1, 2, 3, 5)}
    assert max(own.values()) - min(own.values()) > 1e-3, "Trainer's eval_loss no longer moves with the batch size"
    assert all(abs(loss - reference["eval_loss"]) > 1e-4 for loss in own.values())


def test_evaluations_do_not_leak_into_each_other(model, rows, reference, tmp_path):
    trainer = build_trainer(model, rows, tmp_path, 3, NextTokenMetrics(BYTE_LENGTHS))
    few = trainer.evaluate(rows.select(range(2)))
    again = trainer.evaluate()
    assert few["eval_loss"] != again["eval_loss"]
    assert again["eval_loss"] == pytest.approx(reference["eval_loss"], rel=1e-6)


def test_tuple_of_outputs_survives(model, rows, reference, tmp_path, monkeypatch):
    monkeypatch.setattr(model.config, "output_hidden_states", True)
    trainer = build_trainer(model, rows, tmp_path, 2, NextTokenMetrics(BYTE_LENGTHS))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(reference["eval_loss"], rel=1e-6)


def test_a_nan_reaches_the_metrics(model, rows, tmp_path):
    broken = LlamaForCausalLM(model.config)
    with torch.no_grad():
        broken.lm_head.weight[3] = math.nan
    result = build_trainer(broken, rows, tmp_path, 3, NextTokenMetrics(BYTE_LENGTHS)).evaluate()
    assert math.isnan(result["eval_loss"]) and math.isnan(result["eval_perplexity"])


class LargestFloat32(TorchDispatchMode):
    """Records the size of the largest float32 tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
            self.numel = max(self.numel, out.numel())
        return out


def test_preprocess_makes_no_float32_copy_of_the_batch():
    logits = torch.randn(6, 10, VOCAB_SIZE).bfloat16()
    labels = torch.randint(0, VOCAB_SIZE, (6, 10))
    with LargestFloat32() as largest:
        nll, predicted = NextTokenMetrics.preprocess_logits(logits, labels)
    assert largest.numel == 9 * VOCAB_SIZE  # one row
    assert nll.shape == predicted.shape == (6, 9)


def test_preprocess_scores_the_next_token_and_zeroes_masked_ones():
    labels = torch.tensor([[4, 2, -100, 3]])
    logits = torch.full((1, 4, 5), -100.0)
    logits[0, 0, 2] = logits[0, 1, 1] = logits[0, 2, 3] = 100.0  # says 2, then anything, then 3
    nll, predicted = NextTokenMetrics.preprocess_logits(logits, labels)
    assert nll.tolist() == [[0.0, 0.0, 0.0]]
    assert predicted.tolist() == [[2, 1, 3]]


def add(metrics, nll, labels, compute_result):
    nll = torch.tensor([nll])
    prediction = EvalPrediction((nll, torch.zeros_like(nll, dtype=torch.int32)), torch.tensor([labels]))
    return metrics(prediction, compute_result=compute_result)


def test_masked_positions_are_excluded_and_results_come_last():
    metrics = NextTokenMetrics(BYTE_LENGTHS)
    assert add(metrics, [2.0, 0.0], [9, 1, -100], compute_result=False) == {}
    assert add(metrics, [4.0, 6.0], [9, 1, 2], compute_result=True)["loss"] == 4.0


def test_loader_that_never_says_last_can_still_be_closed():
    metrics = NextTokenMetrics(BYTE_LENGTHS)
    add(metrics, [2.0, 4.0], [9, 1, 2], compute_result=False)
    assert metrics.compute()["loss"] == 3.0


def test_nothing_scored_is_nan():
    result = add(NextTokenMetrics(BYTE_LENGTHS), [0.0], [9, -100], compute_result=True)
    assert set(result) == {"loss", "perplexity", "bits_per_byte", "next_token_accuracy"}
    assert all(math.isnan(value) for value in result.values())


def test_no_file_is_written(monkeypatch):
    """A full disk, TMPDIR's too, must not end an evaluation."""
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", "/dev/null/nonexistent")
    metrics = NextTokenMetrics(BYTE_LENGTHS)
    add(metrics, [1.0] * 5000, [1] * 5001, compute_result=False)
    assert metrics.compute()["loss"] == 1.0
