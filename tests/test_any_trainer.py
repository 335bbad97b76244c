"""RegressionCallback on Trainers that know nothing of it: it changes nothing, and healthy runs of any kind are silent
and judged."""

import random

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from recipe.guards import RegressionCallback

VOCABULARY, EOS = 200, 3
ALARMS = ("warning", "error")


# --- data: text of a Markov chain, which a model can learn in a hundred steps


def markov_text(count: int, length: int, seed: int = 0, vocabulary: int = VOCABULARY) -> torch.Tensor:
    """`[count, length]` token ids. The chain is always the same, `seed` draws the texts; the ids below 4 are kept for
    special tokens, of which EOS comes now and then."""
    chances = np.random.default_rng(0).dirichlet(np.full(vocabulary, 0.03), size=vocabulary)
    chances[:, :EOS] = 0
    chances[:, EOS] = 0.02
    steps = (chances / chances.sum(axis=1, keepdims=True)).cumsum(axis=1)
    generator = np.random.default_rng(seed + 1)
    ids = np.empty((count, length), dtype=np.int64)
    ids[:, 0] = generator.integers(EOS + 1, vocabulary, count)
    for position in range(1, length):
        drawn = generator.random((count, 1))
        ids[:, position] = (steps[ids[:, position - 1]] < drawn).sum(axis=1).clip(max=vocabulary - 1)
    return torch.from_numpy(ids)


def rows(count: int, length: int = 64, seed: int = 0) -> list[dict]:
    return [{"input_ids": row, "labels": row.clone()} for row in markov_text(count, length, seed)]


def uneven_rows(count: int, length: int = 64, seed: int = 0) -> list[dict]:
    """Texts of different lengths, without labels: the collator makes them."""
    lengths = np.random.default_rng(seed).integers(length // 3, length + 1, count)
    texts = markov_text(count, length, seed)
    return [{"input_ids": text[:end].tolist()} for text, end in zip(texts, lengths, strict=True)]


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows: list[dict]):
        self.rows = rows

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        return iter(self.rows[worker.id :: worker.num_workers] if worker else self.rows)


# --- models: one tiny one of each family


TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": 0,
}
OLD = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0}
GPT2 = OLD | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FAMILIES = {
    "llama": TINY,
    "llama_tied": TINY | {"tie_word_embeddings": True},
    "gpt2": GPT2,
    "gpt_neox": TINY | {"rotary_pct": 0.25},
    "mistral": TINY | {"sliding_window": 16},
    "mixtral": TINY | EXPERTS | {"output_router_logits": True},
    "qwen2": TINY,
    "qwen3_moe": TINY | EXPERTS,
    "gemma2": TINY | {"sliding_window": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": TINY | {"sliding_window": 16, "query_pre_attn_scalar": 16},
    "bloom": OLD | {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "opt": TINY | {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "mpt": OLD | {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
    "falcon": OLD | {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
    "bert": TINY | {"is_decoder": True},
    "mamba": TINY | {"state_size": 8},
    "mamba2": TINY | {"state_size": 8, "num_heads": 8, "n_groups": 1, "chunk_size": 16},
    "rwkv": TINY | {"attention_hidden_size": 64, "context_length": 128},
    "recurrent_gemma": TINY | {"lru_width": 64, "attention_window_size": 16, "num_hidden_layers": 3},
    "gpt_bigcode": GPT2,
    "phi": TINY,
}


def tiny(family: str = "llama", **changes):
    values = {"tie_word_embeddings": False} if family == "llama" else {}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.removesuffix("_tied"), **{**values, **FAMILIES[family], **changes})
    return AutoModelForCausalLM.from_config(config)
