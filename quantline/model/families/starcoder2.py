"""StarCoder2: Llama's attention, norms with biases, and a feed-forward part of two layers."""

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

STARCODER2 = Family(
    Block(
        modules={
            "input_layernorm": "attn_norm",
            **ATTENTION,
            "post_attention_layernorm": "ffn_norm",
            "mlp.c_fc": "ffn_up",
            "mlp.c_proj": "ffn_down",
        },
        inputs=(
            InputGroup(QKV, "input_layernorm"),
            InputGroup(("self_attn.o_proj",), VALUE),
            InputGroup(("mlp.c_fc",), "post_attention_layernorm"),
            InputGroup(("mlp.c_proj",)),
        ),
    ),
    keys={"norm_eps": "norm_epsilon"},
    activations=("gelu_pytorch_tanh",),
    tied=True,
    normalized="llama",
    gguf=GgufFamily(
        "starcoder2", ignores_window=True, heads_fill_hidden=True, rms_norm=False, biases="all"
    ),
)

register_family("starcoder2", STARCODER2)
