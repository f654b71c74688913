"""Small random models of transformers, without a checkpoint, for each kind of state."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

USUAL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
MAMBA_2 = {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 2, "chunk_size": 8}
GATED_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "layer_types": ["linear_attention", "full_attention"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
LATENT = {
    "head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 2,
    "n_group": 1,
    "topk_group": 1,
}
SIZES: dict[str, dict[str, Any]] = {
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "mamba": {"state_size": 4, "time_step_rank": 4},
    "mamba2": MAMBA_2,
    "qwen3_next": GATED_DELTA,
    "deepseek_v3": LATENT,
    "deepseek_v2": LATENT,
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "block_size": 4}
    | {"num_local_experts": 2},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_inner": 48, "n_positions": 64},
}


def small_model(model_type: str, **sizes: Any) -> PreTrainedModel:
    """Return a model whose weights are large enough that every part of it matters."""
    config = AutoConfig.for_model(model_type, **USUAL | SIZES.get(model_type, {}) | sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)
