"""A tiny config of any model type: the default config with its sizes replaced, by the names of the fields."""

from typing import Any

from transformers import PreTrainedConfig

VOCABULARY, HIDDEN, HEADS, HEAD_DIM = 128, 64, 4, 16
FIRST_SPECIAL = 100  # ids from here on are image, audio and other special tokens; texts use lower ones
SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
MAX_LAYERS, MAX_POSITIONS = 8, 8192

# Sizes of text models, by field. A field that a config does not have, or sets to None or 0, stays as it is.
SIZES = {
    **dict.fromkeys("hidden_size d_model n_embd dim embed_dim text_hidden_size emb_dim embedding_dim".split(), HIDDEN),
    **dict.fromkeys(
        "word_embed_proj_dim projection_dim attention_hidden_size lru_width dim_model_base".split(), HIDDEN
    ),
    **dict.fromkeys("input_embedding_size output_embedding_size out_hidden_size encoder_hidden_size".split(), HIDDEN),
    **dict.fromkeys("cross_attention_hidden_size projector_hidden_size backbone_hidden_size".split(), HIDDEN),
    **dict.fromkeys("image_text_hidden_size hidden_size_global embedding_size moe_hidden_size".split(), HIDDEN),
    **dict.fromkeys("output_dim d_ff dff ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner d_inner dim_ff".split(), 64),
    **dict.fromkeys(
        "intermediate_size ffn_hidden_size shared_intermediate_size mlp_dim feed_forward_size".split(), 64
    ),
    **dict.fromkeys("intermediate_size_mlp dense_intermediate_size shared_experts_intermediate_size".split(), 64),
    **dict.fromkeys("expert_ffn_hidden_size share_expert_dim moe_shared_expert_intermediate_size".split(), 32),
    **dict.fromkeys("moe_intermediate_size shared_expert_intermediate_size".split(), 32),
    **dict.fromkeys(
        "num_attention_heads n_head n_heads encoder_attention_heads decoder_attention_heads".split(), HEADS
    ),
    **dict.fromkeys("attention_heads num_encoder_attention_heads num_decoder_attention_heads".split(), HEADS),
    **dict.fromkeys("swa_num_attention_heads num_sliding_attention_heads linear_num_heads".split(), HEADS),
    **dict.fromkeys("linear_num_value_heads num_heads".split(), HEADS),
    **dict.fromkeys("num_key_value_heads swa_num_key_value_heads linear_num_key_heads num_kv_heads".split(), 2),
    **dict.fromkeys("num_query_groups n_groups mamba_n_groups mamba_ngroups".split(), 2),
    **dict.fromkeys(
        "head_dim d_kv kv_channels swa_head_dim d_head linear_head_dim attention_head_dim".split(), HEAD_DIM
    ),
    **dict.fromkeys("linear_key_head_dim linear_value_head_dim index_head_dim v_head_dim".split(), HEAD_DIM),
    **dict.fromkeys("qk_nope_head_dim qk_rope_head_dim rotary_dim query_pre_attn_scalar".split(), HEAD_DIM),
    **dict.fromkeys("kv_lora_rank q_lora_rank o_lora_rank gated_norm_rank laurel_rank adapter_rank".split(), 16),
    **dict.fromkeys("hc_lowrank router_hidden_size time_step_rank mamba_dt_rank prompt_mid_dim d_rel".split(), 16),
    **dict.fromkeys("hidden_size_per_layer_input mamba_d_head mamba_head_dim mamba_headdim".split(), 16),
    **dict.fromkeys("mamba_n_heads mamba_num_heads".split(), 8),
    **dict.fromkeys("state_size ssm_state_size mamba_d_state attention_head_size".split(), 16),
    "qk_head_dim": 2 * HEAD_DIM,
    "index_n_heads": 32,  # a token that no indexer head wants has a score of 0, and ties are broken by chance
    "mamba_d_ssm": 128,
    **dict.fromkeys("num_experts n_routed_experts num_local_experts moe_num_experts".split(), 4),
    **dict.fromkeys("num_experts_per_tok moe_topk moe_k num_experts_per_token moe_top_k expert_top_k".split(), 2),
    **dict.fromkeys("num_shared_experts n_shared_experts moe_num_shared_experts n_group topk_group".split(), 1),
    **dict.fromkeys("num_expert_group zero_expert_num first_k_dense_replace num_dense_layers".split(), 1),
    **dict.fromkeys("attn_layer_period expert_layer_period decoder_sparse_step encoder_sparse_step".split(), 2),
    **dict.fromkeys("attn_layer_offset expert_layer_offset".split(), 1),
    **dict.fromkeys("sliding_window attention_window_size attention_window attention_chunk_size".split(), 8),
    **dict.fromkeys("sliding_window_size local_attention window_size index_topk rel_extent".split(), 8),
    **dict.fromkeys("local_radius global_block_size chunk_size mamba_chunk_size expert_capacity".split(), 8),
    **dict.fromkeys("n_positions n_ctx max_seq_len max_source_positions max_target_positions".split(), 256),
    **dict.fromkeys("encoder_layers decoder_layers num_layers n_layer n_layers num_decoder_layers depth".split(), 2),
    **dict.fromkeys("num_encoder_layers layers num_hidden_layers conf_num_hidden_layers".split(), 2),
}
# Of towers for images and sound, which texts do not run through: only depth, so that their parts still fit.
DEPTHS = (
    "depth layers num_layers num_hidden_layers encoder_layers conf_num_hidden_layers speech_encoder_layers".split()
)
RANDOM = ("drop", "jitter")  # in the name of a probability
TOWERS = ("vision", "audio", "speech", "vq", "tokenizer", "codec", "image", "qformer", "perceiver", "protein")


def shrink(config_class: type, changes: dict[str, Any], only_texts: bool = False) -> PreTrainedConfig:
    """`changes`: fields of the config; those of a part by its name, `{"text_config": {...}}`; with a name that begins
    with `=`, a field without which there is no default config. `only_texts`: towers lose depth alone."""
    return without_cache(_shrunk(config_class, changes, dict(SPECIAL_TOKENS), only_texts, False))


def without_cache(config: PreTrainedConfig) -> PreTrainedConfig:
    """As stock Trainer sets it: with a cache, masks are not told of packed documents."""
    for part in [config, *(value for value in vars(config).values() if isinstance(value, PreTrainedConfig))]:
        if hasattr(part, "use_cache"):
            part.use_cache = False
    return config


def _shrunk(config_class, changes: dict, specials: dict, only_texts: bool, is_tower: bool):
    required = {name: value for name, value in changes.items() if name.startswith("=")}
    changes = {name: value for name, value in changes.items() if name not in required}
    default = config_class(**{name[1:]: value for name, value in required.items()})
    parts = {name: value for name, value in vars(default).items() if isinstance(value, PreTrainedConfig)}
    values = {name: value for name, value in vars(default).items() if name not in parts and name[0] != "_"}
    new = shrink_fields(values, specials, only_texts and is_tower)
    for name, part in parts.items():
        tower = is_tower or name.startswith(TOWERS) or "vision" in type(part).__name__.lower()
        kept = {"model_type": part.model_type}
        new[name] = _shrunk(type(part), changes.get(name, {}), specials, only_texts, tower).to_dict() | kept
    new |= {name: value for name, value in changes.items() if name not in parts}
    return config_class(**{name[1:]: value for name, value in required.items()} | new)


def shrink_fields(values: dict, specials: dict[str, int], only_depth: bool) -> dict:
    """The fields to be changed. `specials`: ids of special tokens, of all parts; new ones are added."""
    sizes = dict.fromkeys(DEPTHS, 2) if only_depth else SIZES
    new = {name: size for name, size in sizes.items() if is_number(values.get(name)) and values[name] > size}
    if is_number(values.get("state_size")) and "num_heads" in new:
        new["num_heads"] = 8  # Mamba 2: heads of 16 fill twice the hidden size
    for name, value in values.items():
        if name.endswith(("_token_id", "_token_index")) and (name in specials or (value or 0) >= FIRST_SPECIAL):
            new[name] = specials.setdefault(name, FIRST_SPECIAL + len(specials)) if value is not None else None
        elif is_number(value) and "vocab" in name and "offset" not in name and value > VOCABULARY:
            new[name] = VOCABULARY
        elif isinstance(value, float) and any(word in name for word in RANDOM):
            new[name] = 0.0
    if "kv_lora_rank" in new and "num_key_value_heads" in new:
        new["num_key_value_heads"] = HEADS  # latent attention has as many keys as queries
    positions = values.get("max_position_embeddings")
    if is_number(positions) and positions > MAX_POSITIONS and not values.get("rope_parameters"):
        new["max_position_embeddings"] = 512
    if values.get("is_encoder_decoder"):
        new["decoder_start_token_id"] = specials["decoder_start_token_id"]
    new |= shrink_layers(values, new) | shrink_rope(values, new)
    return new


def shrink_layers(values: dict, new: dict) -> dict:
    """Lists with an entry for each layer keep the first layer of each kind."""
    depth = values.get("num_hidden_layers")
    lists = {n: v for n, v in values.items() if isinstance(v, list | tuple) and is_number(depth) and len(v) == depth}
    if not lists or depth < 2:
        return {}
    kinds = [str(kind) for kind in zip(*lists.values(), strict=True)]
    kept = sorted({kinds.index(kind) for kind in kinds})[:MAX_LAYERS]
    while len(kept) < 2:
        kept.append(kept[-1] + 1)
    short = {name: [value[index] for index in kept] for name, value in lists.items()}
    return {"num_hidden_layers": len(kept)} | short


def shrink_rope(values: dict, new: dict) -> dict:
    """Sections of rotary angles by axis are a share of the rotated half of a head."""
    rope = values.get("rope_parameters")
    if not isinstance(rope, dict):
        return {}
    old = values.get("head_dim") or values.get("hidden_size", 0) // max(values.get("num_attention_heads") or 1, 1)
    nested = {key: part for key, part in rope.items() if isinstance(part, dict)}
    if nested:
        return {"rope_parameters": rope | {key: _sections(part, old) for key, part in nested.items()}}
    return {"rope_parameters": _sections(rope, old)}


def _sections(rope: dict, old_head_dim: int) -> dict:
    sections = rope.get("mrope_section")
    if not sections or not old_head_dim:
        return rope
    total = int(HEAD_DIM * sum(sections) / old_head_dim)
    scaled = [total * section // sum(sections) for section in sections]
    scaled[0] += total - sum(scaled)
    return rope | {"mrope_section": scaled}


def is_number(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
