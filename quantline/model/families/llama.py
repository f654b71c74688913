"""Llama and the families built like it: Mistral, Qwen2, Qwen3."""

from dataclasses import replace

from quantline.model.family import (
    ATTENTION,
    QKV,
    VALUE,
    Block,
    Family,
    GgufFamily,
    InputGroup,
    interleave_halves,
    register_family,
)

MLP = {
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
# llama.cpp rotates neighbouring pairs, transformers the two halves of a head.
INTERLEAVED = {
    "attn_q": lambda arch, rows: interleave_halves(rows, arch.heads),
    "attn_k": lambda arch, rows: interleave_halves(rows, arch.kv_heads),
}
LLAMA_GGUF = GgufFamily(
    "llama",
    INTERLEAVED,
    ignores_window=True,
    rope_factors=True,
    counts_as_70b="with shared keys",
)

LLAMA = Family(
    Block(
        modules={
            "input_layernorm": "attn_norm",
            **ATTENTION,
            "post_attention_layernorm": "ffn_norm",
            **MLP,
        },
        inputs=(
            InputGroup(QKV, "input_layernorm"),
            InputGroup(("self_attn.o_proj",), VALUE),
            InputGroup(GATE_UP, "post_attention_layernorm"),
            InputGroup(("mlp.down_proj",), "mlp.up_proj"),
        ),
    ),
    gguf=LLAMA_GGUF,
)
QWEN2_GGUF = GgufFamily(
    "qwen2", ignores_window=True, heads_fill_hidden=True, counts_as_70b="always"
)
QWEN3_GGUF = GgufFamily("qwen3", ignores_window=True, biases="none")

register_family("llama", LLAMA)
register_family("mistral", replace(LLAMA, normalized="mistral"))
register_family("qwen2", replace(LLAMA, gguf=QWEN2_GGUF))
register_family("qwen3", replace(LLAMA, gguf=QWEN3_GGUF))
