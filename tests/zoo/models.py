"""One tiny model of each family."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.zoo.setting import Setting

EOS, PAD = 256, 0  # of every vocabulary of 257 and more; PAD is a byte that no text has

TINY = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4}
WINDOW = {"sliding_window": 48}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FAMILIES = {
    "llama": TINY | {"tie_word_embeddings": True},
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neox": TINY | {"rotary_pct": 0.25},
    "mistral": TINY | WINDOW,
    "mixtral": TINY | EXPERTS | {"output_router_logits": True},
    "qwen2": TINY,
    "qwen3": TINY,
    "qwen3_moe": TINY | EXPERTS,
    "olmo2": TINY,
    "gemma2": TINY | WINDOW | {"query_pre_attn_scalar": 16},
    "gemma3_text": TINY | WINDOW | {"query_pre_attn_scalar": 16},
    "phi": TINY,
    "bloom": {"hidden_size": 64, "n_layer": 3, "n_head": 4},
    "opt": TINY | {"ffn_dim": 176, "word_embed_proj_dim": 64},
    "mpt": {"d_model": 64, "n_layers": 3, "n_heads": 4},
    "falcon": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "alibi": True},
    "bert": TINY | {"is_decoder": True},
    "mamba": TINY | {"state_size": 8},
    "mamba2": TINY | {"state_size": 8, "num_heads": 8, "n_groups": 1, "chunk_size": 16},
    "rwkv": TINY | {"attention_hidden_size": 64},
    "recurrent_gemma": TINY | {"lru_width": 64, "attention_window_size": 48},
}
LENGTHS = {"gpt2": "n_positions", "gpt_bigcode": "n_positions", "mpt": "max_seq_len", "rwkv": "context_length"}


def make_model(setting: Setting) -> PreTrainedModel:
    """With weights drawn from the setting's seed: a twin begins where the bug begins."""
    sizes = {**FAMILIES[setting.family], LENGTHS.get(setting.family, "max_position_embeddings"): 2 * setting.block}
    special = {"vocab_size": setting.vocabulary, "bos_token_id": None, "eos_token_id": eos_of(setting.vocabulary)}
    torch.manual_seed(setting.seed)
    config = AutoConfig.for_model(setting.family, **{**sizes, **special, "pad_token_id": None, **setting.sizes})
    return AutoModelForCausalLM.from_config(config)


def eos_of(vocabulary: int) -> int:
    """257: bytes and EOS. llama-4k: `</s>` is 2. Others are synthetic: the last id."""
    return {257: 256, 4096: 2}.get(vocabulary, vocabulary - 1)
