"""What the blocks of a model family consist of: a table per family, read by stages/checkpoints/architecture.py.

All have the usual names around the blocks (model.embed_tokens, model.layers, model.norm, lm_head).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """`modules`: module inside a block → the part it plays, in the order of use. `inputs`: the linear layers that read
    one tensor, and the module before them that a scale of that tensor can be folded into, if there is one.
    """

    modules: dict[str, str]
    inputs: tuple[tuple[tuple[str, ...], str | None], ...]
    activation: str = "silu"
    norm_offset: float = 0.0  # a norm multiplies by its weight plus this
    normalized: str | None = None  # optimum's name for the configuration, where it is not the family's

    @property
    def linears(self) -> tuple[str, ...]:
        """The linear layers, in the order of use."""
        return tuple(module for module in self.modules if module.endswith("_proj"))


ATTENTION = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "self_attn.o_proj": "attn_output"}
MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
QKV, GATE_UP = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")

LLAMA = Family(
    {"input_layernorm": "attn_norm", **ATTENTION, "post_attention_layernorm": "ffn_norm", **MLP},
    ((QKV, "input_layernorm"), (("self_attn.o_proj",), "self_attn.v_proj"), (GATE_UP, "post_attention_layernorm"),
     (("mlp.down_proj",), "mlp.up_proj")))
# Norms before and after both halves of a block, and weights of norms that are stored less one.
GEMMA = Family(
    {"input_layernorm": "attn_norm", **ATTENTION, "post_attention_layernorm": "attn_post_norm",
     "pre_feedforward_layernorm": "ffn_norm", **MLP, "post_feedforward_layernorm": "ffn_post_norm"},
    ((QKV, "input_layernorm"), (("self_attn.o_proj",), "self_attn.v_proj"), (GATE_UP, "pre_feedforward_layernorm"),
     (("mlp.down_proj",), "mlp.up_proj")),
    activation="gelu_pytorch_tanh", norm_offset=1.0, normalized="gemma")
# One matrix for queries, keys and values, and one for gate and up: nothing is folded into a part of a matrix.
PHI3 = Family(
    {"input_layernorm": "attn_norm", "self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output",
     "post_attention_layernorm": "ffn_norm", "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down"},
    ((("self_attn.qkv_proj",), "input_layernorm"), (("self_attn.o_proj",), None),
     (("mlp.gate_up_proj",), "post_attention_layernorm"), (("mlp.down_proj",), None)))

FAMILIES = {"gemma2": GEMMA, "gemma3_text": GEMMA, "llama": LLAMA, "mistral": LLAMA, "phi3": PHI3, "qwen2": LLAMA,
            "qwen3": LLAMA}


def tied(config: dict) -> bool:
    """Whether the head is the embedding; where config.json does not say, what transformers takes for the family."""
    return bool(config.get("tie_word_embeddings", FAMILIES.get(config.get("model_type")) is GEMMA))
