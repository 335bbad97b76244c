"""What generic shrinking does not get right, by class: fields of the config, those of a part by its name."""

DECODER = {"is_decoder": True}  # as the documentation asks for, before such a class is used alone
ENCODERS = (
    "BertGenerationDecoder BertLMHeadModel BigBirdForCausalLM CamembertForCausalLM Data2VecTextForCausalLM "
    "ElectraForCausalLM ErnieForCausalLM MegatronBertForCausalLM ReformerModelWithLMHead RemBertForCausalLM "
    "RoCBertForCausalLM RoFormerForCausalLM RobertaForCausalLM RobertaPreLayerNormForCausalLM XLMRobertaForCausalLM "
    "XLMRobertaXLForCausalLM XmodForCausalLM"
).split()
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SHARED_4_OF_8 = {
    "num_hidden_layers": 8,
    "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 4,
    "intermediate_size": [64] * 8,
    "activation_sparsity_pattern": [0.5, 0.0] * 4,
}
DOTS3 = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_head_dim": 32,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
    "swa_kv_lora_rank": 16,
    "swa_q_lora_rank": 16,
}
SPEECH = {
    "encoder_config": {
        "hidden_dim": 64,
        "num_layers": 1,
        "num_heads": 4,
        "dim_head": 16,
        "max_pos_emb": 32,
        "context_size": 16,
    },
    "projector_config": {"encoder_hidden_size": 64},
}
BERT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 128,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
CHANGES: dict[str, dict] = {
    **dict.fromkeys(ENCODERS, DECODER),
    "BambaForCausalLM": {"num_hidden_layers": 3, "attn_layer_indices": [1]},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "DeepseekV2ForCausalLM": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "DbrxForCausalLM": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "ChameleonForConditionalGeneration": {"vocabulary_map": {"<image>": 101, "IMGIMGA": 102}},
    "CohereCompassForCausalLM": {"rope_parameters": {"full_attention": ROPE | {"mrope_section": [3, 3, 2]}}},
    "CohereCompassForConditionalGeneration": {
        "text_config": {"rope_parameters": {"full_attention": ROPE | {"mrope_section": [3, 3, 2]}}}
    },
    "DeepseekOcr2ForConditionalGeneration": {
        "text_config": {
            "mlp_layer_types": ["dense", "sparse"],
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
        }
    },
    "DiffusionGemmaForBlockDiffusion": {
        "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
    },
    "Dots1ForCausalLM": {
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "Emu3ForConditionalGeneration": {
        "vocabulary_map": {"<image>": 101, "<|extra_200|>": 102},
        "vq_config": {"base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1, "hidden_size": 64},
    },
    "Ernie4_5_VLMoeForConditionalGeneration": {
        "text_config": {"moe_intermediate_size": [32, 32], "rope_parameters": ROPE | {"mrope_section": [3, 3, 2]}}
    },
    "Gemma3nForCausalLM": SHARED_4_OF_8,
    "Dots3NoteForConditionalGeneration": {
        "text_config": DOTS3,
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64, "mlp_layer_types": ["dense", "sparse"]},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "Glm5NextForConditionalGeneration": {"text_config": {"index_kpool": 2, "index_topk": 8}},
    "GraniteSpeechForConditionalGeneration": SPEECH,
    "GraniteSpeechPlusForConditionalGeneration": SPEECH,
    "Florence2ForConditionalGeneration": {
        "vision_config": {
            "depths": [1, 1],
            "embed_dim": [32, 64],
            "num_heads": [2, 4],
            "num_groups": [2, 4],
            "patch_size": [7, 3],
            "patch_stride": [4, 2],
            "patch_padding": [3, 1],
            "patch_prenorm": [False, True],
            "projection_dim": 64,
        },
    },
    "Granite4VisionForConditionalGeneration": {
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [0, 0, 1, 1],
        "downsample_rate": "4/8",
    },
    "GraniteMoeHybridForCausalLM": {"layer_types": ["linear_attention", "full_attention"]},
    **dict.fromkeys(("HunYuanDenseV1ForCausalLM", "HunYuanMoEV1ForCausalLM"), {"head_dim": 16}),
    "HunYuanVLForConditionalGeneration": {"text_config": {"head_dim": 16}},
    "Dots3NoteForCausalLM": DOTS3,
    "JanusForConditionalGeneration": {"vq_config": {"base_channels": 32, "channel_multiplier": [1, 2]}},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "MinistralForCausalLM": {"head_dim": 16},
    "Molmo2ForConditionalGeneration": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "NemotronForCausalLM": {"head_dim": 16, "num_key_value_heads": 2},
    "NemotronH_Omni_Reasoning_V3": {"vision_config": {"video_temporal_patch_size": 2}},
    "Mistral4ForCausalLM": {"head_dim": 32},
    "Glm4vMoeForConditionalGeneration": {
        "text_config": {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}}
    },
    **dict.fromkeys(
        ("Glm46VForConditionalGeneration", "Glm4vForConditionalGeneration", "GlmOcrForConditionalGeneration"),
        {"text_config": {"rope_parameters": ROPE | {"mrope_section": [3, 3, 2]}}},
    ),
    "XLMWithLMHeadModel": {"causal": True},
    "XmodForCausalLM": DECODER | {"default_language": "en_XX"},
    "ReformerModelWithLMHead": DECODER
    | {
        "axial_pos_embds": False,
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 8,
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "attention_head_size": 16,
    },
    **dict.fromkeys(
        ("ZambaForCausalLM", "Zamba2ForCausalLM"), {"attention_hidden_size": 128, "attention_head_dim": 32}
    ),
    **dict.fromkeys(
        (
            "Qwen2VLForConditionalGeneration",
            "Qwen2_5_VLForConditionalGeneration",
            "PaddleOCRVLForConditionalGeneration",
            "Qwen2_5OmniThinkerForConditionalGeneration",
        ),
        {"text_config": {"rope_parameters": ROPE | {"mrope_section": [2, 3, 3]}}},
    ),
    "RecurrentGemmaForCausalLM": {"num_hidden_layers": 3},
    "UnlimitedOcrForConditionalGeneration": {"text_config": {"num_key_value_heads": 4}},
    "Step3p7ForConditionalGeneration": {"text_config": {"sliding_window": 8}},
    "Qwen4ExpForCausalLM": {
        "indexer_n_heads": 32,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "EncoderDecoderModel": {
        "=encoder": {"model_type": "bert"} | BERT,
        "=decoder": {"model_type": "bert"} | BERT | DECODER | {"add_cross_attention": True},
        "pad_token_id": 0,
    },
}

# Differences that are meant, by class and check.
FIRST_IS_LAST = "the decoder begins with the last label, the language code"
PREFIX = "a prefix language model: every token of a call without spans counts as prompt"
PERMUTED = "a permutation language model: the caller gives perm_mask and target_mapping, and aligned labels"
NGRAMS = "the loss is that of the next two tokens"
CAPACITY = "experts have a capacity, and take tokens of all rows"
BY_DESIGN: dict[tuple[str, str], str] = {
    ("MBartForConditionalGeneration", "label_leak"): FIRST_IS_LAST,
    ("PLBartForConditionalGeneration", "label_leak"): FIRST_IS_LAST,
    (
        "T5GemmaForConditionalGeneration",
        "label_leak",
    ): "only where the decoder's input is padding, which is not scored",
    ("SwitchTransformersForConditionalGeneration", "cache"): CAPACITY,
    ("XLMWithLMHeadModel", "cache"): "generation appends a mask token and reads its logits",
    **{(f"ProphetNetFor{kind}", "loss"): NGRAMS for kind in ("CausalLM", "ConditionalGeneration")},
    **{("XLNetLMHeadModel", check): PERMUTED for check in ("loss", "causal", "cache", "trainer")},
    **{("CpmAntForCausalLM", check): PREFIX for check in ("causal", "cache", "padding")},
}
