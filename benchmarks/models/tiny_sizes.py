"""What configurations call their sizes, and the few that need more than sizes."""

from typing import Any

LAYERS = 2  # of a model whose layers are all alike
LAYERS_OF_KINDS = 4  # of one that has several kinds of layers
MOST_LAYERS = 6
# Later layers of theirs have keys or weights of earlier ones of the same kind.
IN_TURN = ("gemma3n_text", "gemma4_text", "gemma4_unified_text", "zamba")
# What the number of layers is called.
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers")
DEPTHS += ("decoder_layers", "num_decoder_layers", "num_encoder_layers", "layers")
DEPTHS += ("num_blocks",)

# Of a language model. A name counts where a configuration has it.
TEXT: dict[str, Any] = {
    **dict.fromkeys(DEPTHS, LAYERS),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 256),
    **dict.fromkeys(("embed_dim", "emb_dim", "embedding_size", "hidden_size_global"), 256),
    **dict.fromkeys(
        ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff", "dff"), 512
    ),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads"), 4),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim"), 512),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    "head_dim": 64,
    # The same of layers with a window, and of what chooses tokens for the others.
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 64,
    "num_attention_heads_per_layer": 4,
    "index_n_heads": 4,
    "index_head_dim": 64,
    "index_topk": 64,
    # Outputs of attention in groups.
    "o_groups": 2,
    "o_lora_rank": 64,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 512),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "window_size"), 64),
    # Mixtures of experts.
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_num_experts",), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("top_k_experts", "zero_expert_num"), 2),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 256),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 256),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "moe_hidden_size"), 256),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
    "num_expert_group": 1,
    "first_k_dense_replace": 1,
    # Gated delta nets.
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_heads": 4,
    "linear_head_dim": 32,
    # State spaces.
    "mamba_n_heads": 8,
    "mamba_d_head": 64,
    "mamba_d_state": 32,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_d_ssm": 512,
    "mamba_chunk_size": 32,
    "mamba_num_heads": 8,
    "mamba_head_dim": 64,
    "mamba_dt_rank": 32,
    "ssm_state_size": 32,
    "n_groups": 1,
    "chunk_size": 32,
    "state_size": 32,
    "time_step_rank": 32,
    # Inputs of each layer.
    "hidden_size_per_layer_input": 32,
    "laurel_rank": 16,
    "num_kv_shared_layers": 2,
    # Some of these classes are encoders unless they are told otherwise.
    "is_decoder": True,
    **dict.fromkeys(("out_hidden_size", "text_hidden_size"), 256),
    "projector_hidden_size": 128,
}
# Of latent attention, whose keys have a part without positions and one with them.
LATENT: dict[str, Any] = {
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "num_key_value_heads": 4,
}
# Of what sees and hears.
TOWER: dict[str, Any] = {
    **dict.fromkeys(DEPTHS, LAYERS),
    **dict.fromkeys(("hidden_size", "embed_dim", "d_model", "width"), 64),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "ffn_dim"), 128),
    **dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads"), 2),
    "num_key_value_heads": 2,
    "head_dim": 32,
    "image_size": 32,
    "patch_size": 8,
    "num_position_embeddings": 64,
    **dict.fromkeys(("out_hidden_size", "projection_dim", "output_dim"), 256),
}
DROPOUTS = ("dropout", "pdrop", "drop_rate")  # what their names contain
# The standard deviation of a matrix of TEXT's width: each layer keeps the size of its input.
INITIALIZER_RANGE = 256**-0.5

ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
AXES = ROPE | {"mrope_section": [8, 12, 12]}  # of a head of 64: time, height and width
HALF_OF_AXES = ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [4, 6, 6]}
MAMBA_2 = {"num_heads": 8, "head_dim": 64, "expand": 2}
CONVOLUTIONS = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1}
FOUR = {"num_hidden_layers": LAYERS_OF_KINDS}
INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 64,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}

# Configuration's type → what it needs besides. A wrapper's parts are looked up by their own types.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": FOUR | {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 512},
    "chameleon": {"vocabulary_map": {"<image>": 1279}},
    "chameleon_vqgan": CONVOLUTIONS | {"resolution": 32},
    "codegen": {"rotary_dim": 32},
    "cohere_compass_text": {"rope_parameters": {"full_attention": AXES}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {
            "hidden_size": 256,
            "ffn_hidden_size": 256,
            "moe_num_experts": 4,
            "moe_top_k": 2,
        },
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "emu3": {"vocabulary_map": {"<image>": 1279, "<|extra_200|>": 1278}},
    "emu3_vqgan": CONVOLUTIONS | {"hidden_size": 64, "attn_resolutions": [1]},
    "ernie4_5_vl_moe_text": {"rope_parameters": ROPE | {"mrope_section": [11, 11, 10]}},
    "falcon": {"new_decoder_architecture": True, "ffn_hidden_size": 1024, "bias": False},
    "gemma2": {"query_pre_attn_scalar": 64},
    "gemma3_text": {"query_pre_attn_scalar": 64},
    "glm4v_moe_text": {"rope_parameters": HALF_OF_AXES},
    "glm5_next": {"qk_rope_head_dim": 0},
    "glm5_next_text": {"qk_rope_head_dim": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_heads": 4},
    "gptj": {"rotary_dim": 32},
    "granite": {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 2.0},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 1]],
        "downsample_rate": "1/2",
        "spatial_target_layers": [0, 0, 1, 1],
    },
    "granitemoehybrid": FOUR | {"layer_types": ["linear_attention", "full_attention"] * 2},
    "hunyuan_vl_text": {"rope_parameters": AXES},
    "jamba": FOUR | {"attn_layer_period": 4, "attn_layer_offset": 2},
    "janus_vqgan": CONVOLUTIONS,
    "lfm2": FOUR | {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": FOUR | {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "llama4_text": {"intermediate_size_mlp": 512, "interleave_moe_layer_step": 2},
    "llama4_vision_model": {
        "vision_output_dim": 64,
        "projector_input_dim": 64,
        "projector_output_dim": 64,
    },
    "longcat_flash": {"head_dim": 32},
    "mamba2": MAMBA_2,
    "minimax": FOUR | {"layer_types": ["linear_attention", "full_attention"] * 2},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "olmoe": {"num_key_value_heads": 4},
    "paddleocr_vl_text": {"rope_parameters": AXES},
    "qwen2_5_omni_text": {"rope_parameters": AXES},
    "qwen2_5_vl_text": {"rope_parameters": AXES},
    "qwen2_vl_text": {"rope_parameters": AXES},
    "qwen4_exp_text": INDEXER,
    "radio": {"video_temporal_patch_size": 2},
    "recurrent_gemma": FOUR,
    "reformer": {"axial_pos_embds": False},
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_head_dim": 128},
    "zaya": {"num_experts_per_tok": 1},
}
