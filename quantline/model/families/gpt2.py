"""GPT-2: learned positions in place of rotated heads, and weights stored as [in, out]."""

from quantline.model.family import Block, Family, GgufFamily, InputGroup, register_family

GPT2 = Family(
    Block(
        modules={
            "ln_1": "attn_norm",
            "attn.c_attn": "attn_qkv",
            "attn.c_proj": "attn_output",
            "ln_2": "ffn_norm",
            "mlp.c_fc": "ffn_up",
            "mlp.c_proj": "ffn_down",
        },
        inputs=(
            InputGroup(("attn.c_attn",), "ln_1"),
            InputGroup(("attn.c_proj",)),
            InputGroup(("mlp.c_fc",), "ln_2"),
            InputGroup(("mlp.c_proj",)),
        ),
    ),
    outside={
        "token_embd": "transformer.wte",
        "position_embd": "transformer.wpe",
        "output_norm": "transformer.ln_f",
        "output": "lm_head",
    },
    blocks="transformer.h",
    keys={
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "layers": "n_layer",
        "heads": "n_head",
        "kv_heads": "n_head",
        "max_positions": "n_positions",
        "norm_eps": "layer_norm_epsilon",
        "activation": "activation_function",
    },
    activations=("gelu_new", "gelu", "gelu_pytorch_tanh"),
    rotary_share=0.0,
    widening=4,
    transposed=True,
    tied=True,
    gguf=GgufFamily(
        "gpt2",
        required={
            "scale_attn_weights": (True, True),
            "scale_attn_by_inverse_layer_idx": (False, False),
        },
        heads_fill_hidden=True,
        rms_norm=False,
        biases="all",
    ),
)

register_family("gpt2", GPT2)
