"""Gemma 2 and 3: norms before and after both halves of a block, stored as their weight less one."""

from dataclasses import replace

from quantline.model.families.llama import GATE_UP, MLP
from quantline.model.family import (
    ATTENTION,
    QKV,
    VALUE,
    Block,
    Family,
    GgufFamily,
    InputGroup,
    register_family,
)

GEMMA = Family(
    Block(
        modules={
            "input_layernorm": "attn_norm",
            **ATTENTION,
            "post_attention_layernorm": "attn_post_norm",
            "pre_feedforward_layernorm": "ffn_norm",
            **MLP,
            "post_feedforward_layernorm": "ffn_post_norm",
        },
        inputs=(
            InputGroup(QKV, "input_layernorm"),
            InputGroup(("self_attn.o_proj",), VALUE),
            InputGroup(GATE_UP, "pre_feedforward_layernorm"),
            InputGroup(("mlp.down_proj",), "mlp.up_proj"),
        ),
    ),
    activations=("gelu_pytorch_tanh",),
    norm_offset=1.0,
    scaled_embedding=True,
    tied=True,
    normalized="gemma",
)
GEMMA2_GGUF = GgufFamily(
    "gemma2",
    settings={
        "add_sliding_window": ("sliding_window", 4096),
        "add_attn_logit_softcapping": ("attn_logit_softcapping", 50.0),
        "add_final_logit_softcapping": ("final_logit_softcapping", 30.0),
    },
    biases="none",
    sliding_windows=True,
    window_period=2,
    layers_of_hidden_scale=46,
)
GEMMA3_GGUF = GgufFamily(
    "gemma3",
    settings={
        "add_sliding_window": ("sliding_window", 4096),
        "add_final_logit_softcapping": ("final_logit_softcapping", None),
    },
    required={"attn_logit_softcapping": (None, None)},
    biases="none",
    sliding_windows=True,
    local_rope=True,
    layers_of_hidden_scale=62,
)

register_family("gemma2", replace(GEMMA, gguf=GEMMA2_GGUF))
register_family("gemma3_text", replace(GEMMA, gguf=GEMMA3_GGUF))
