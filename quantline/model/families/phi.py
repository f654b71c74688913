"""Phi-1 to Phi-3."""

from quantline.model.family import (
    LLAMA_OUTSIDE,
    QKV,
    VALUE,
    Block,
    Family,
    GgufFamily,
    InputGroup,
    register_family,
)

# Both halves of a block read one norm, and the head has a bias.
PHI = Family(
    Block(
        modules={
            "input_layernorm": "attn_norm",
            "self_attn.q_proj": "attn_q",
            "self_attn.k_proj": "attn_k",
            "self_attn.v_proj": "attn_v",
            "self_attn.dense": "attn_output",
            "mlp.fc1": "ffn_up",
            "mlp.fc2": "ffn_down",
        },
        inputs=(
            InputGroup((*QKV, "mlp.fc1"), "input_layernorm"),
            InputGroup(("self_attn.dense",), VALUE),
            InputGroup(("mlp.fc2",)),
        ),
    ),
    outside=LLAMA_OUTSIDE | {"output_norm": "model.final_layernorm"},
    keys={"norm_eps": "layer_norm_eps"},
    activations=("gelu_new",),
    rotary_share=0.5,
    gguf=GgufFamily(
        "phi2",
        required={"qk_layernorm": (False, False)},
        heads_fill_hidden=True,
        rms_norm=False,
        biases="all",
        partial_rotary=True,
        own_head=True,
    ),
)
# One matrix for queries, keys and values, and one for gate and up: nothing is folded into a part
# of a matrix.
PHI3 = Family(
    Block(
        modules={
            "input_layernorm": "attn_norm",
            "self_attn.qkv_proj": "attn_qkv",
            "self_attn.o_proj": "attn_output",
            "post_attention_layernorm": "ffn_norm",
            "mlp.gate_up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        },
        inputs=(
            InputGroup(("self_attn.qkv_proj",), "input_layernorm"),
            InputGroup(("self_attn.o_proj",)),
            InputGroup(("mlp.gate_up_proj",), "post_attention_layernorm"),
            InputGroup(("mlp.down_proj",)),
        ),
    ),
    gguf=GgufFamily(
        "phi3",
        settings={"add_sliding_window": ("sliding_window", 0)},
        ignores_window=True,
        longrope=True,
        biases="none",
        partial_rotary=True,
        heads_fill_hidden=True,
    ),
)

register_family("phi", PHI)
register_family("phi3", PHI3)
