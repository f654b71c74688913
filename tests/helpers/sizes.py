"""Settings of tiny models of many families, for `make_model(folder, **settings)`."""

from typing import Any

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
COMPLETE_ROPE = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}
# What a model is like → its settings.
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama with scaled rope": {"rope_parameters": LLAMA3_ROPE},
    "llama with biases": {
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    },
    "mistral with a window": {"model_type": "mistral", "sliding_window": 16},
    "qwen2": {"model_type": "qwen2"},
    "qwen2 with windows in some layers": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3"},
    "gemma2": {"model_type": "gemma2", "sliding_window": 16},
    "gemma3": {"model_type": "gemma3_text", "sliding_window": 16},
    "phi3": {"model_type": "phi3", "tie_word_embeddings": False},
    "gpt-neox": {"model_type": "gpt_neox", "tie_word_embeddings": False},
    "gpt-neox one half after the other, all of a head rotated": {
        "model_type": "gpt_neox",
        "use_parallel_residual": False,
        "rope_parameters": COMPLETE_ROPE,
    },
    "gpt2": {"model_type": "gpt2"},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "tie_word_embeddings": False},
    "qwen3-moe": {
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
    },
    "qwen3-moe with a dense block": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
    },
    "gpt2 with a head of its own": {"model_type": "gpt2", "tie_word_embeddings": False},
}
