"""GPT-NeoX: the halves of a block side by side, norms with biases, a quarter of a head rotated."""

from quantline.model.family import (
    Block,
    Family,
    GgufFamily,
    InputGroup,
    register_family,
    split_heads,
)

GPT_NEOX = Family(
    Block(
        modules={
            "input_layernorm": "attn_norm",
            "attention.query_key_value": "attn_qkv",
            "attention.dense": "attn_output",
            "post_attention_layernorm": "ffn_norm",
            "mlp.dense_h_to_4h": "ffn_up",
            "mlp.dense_4h_to_h": "ffn_down",
        },
        inputs=(
            InputGroup(("attention.query_key_value",), "input_layernorm"),
            InputGroup(("attention.dense",)),
            InputGroup(("mlp.dense_h_to_4h",), "post_attention_layernorm"),
            InputGroup(("mlp.dense_4h_to_h",)),
        ),
    ),
    outside={
        "token_embd": "gpt_neox.embed_in",
        "output_norm": "gpt_neox.final_layer_norm",
        "output": "embed_out",
    },
    blocks="gpt_neox.layers",
    keys={"norm_eps": "layer_norm_eps", "kv_heads": "num_attention_heads"},
    activations=("gelu", "gelu_fast", "gelu_new"),
    rotary_share=0.25,
    renamed={"lm_head": "embed_out"},
    gguf=GgufFamily(
        "gptneox",
        {"attn_qkv": lambda arch, rows: split_heads(rows, arch.heads)},
        settings={"add_parallel_residual": ("use_parallel_residual", True)},
        heads_fill_hidden=True,
        rms_norm=False,
        biases="all",
        partial_rotary=True,
        own_head=True,
    ),
)

register_family("gpt_neox", GPT_NEOX)
