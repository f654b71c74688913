"""Which ggml type each tensor gets in a k-quant mix, as llama.cpp chooses it (llama-quant.cpp, llama_tensor_get_type).

Only the rules for dense models with the usual parts are here; sizes at which llama.cpp makes exceptions (70 B models,
eight experts) are not.
"""

from stages.tracking import Failure, StageError

BLOCK_OF = {"F32": 1, "F16": 1, "BF16": 1, "Q8_0": 32, "Q5_0": 32, "Q5_1": 32, "Q4_0": 32, "Q4_1": 32, "IQ4_NL": 32,
            "Q2_K": 256, "Q3_K": 256, "Q4_K": 256, "Q5_K": 256, "Q6_K": 256}
SUBSTITUTE = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
BASE = {"Q8_0": "Q8_0", "Q6_K": "Q6_K", "Q5_K_M": "Q5_K", "Q4_K_M": "Q4_K", "Q3_K_M": "Q3_K", "Q2_K": "Q2_K"}
MATRICES = ("token_embd", "output", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's choice of the layers that are worth more: the first and last eighth, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def requested_type(mix: str, role: str, layer: int | None, layers: int, tied: bool, heads_per_kv: int = 1) -> str:
    """The type that a mix gives a tensor by its part, before looking at its width.

    Raises StageError(config_invalid) for an unknown mix.
    """
    if mix not in BASE:
        raise StageError(Failure.CONFIG_INVALID, f"expected a mix among {', '.join(BASE)}, found {mix!r}")
    if role not in MATRICES:
        return "F32"
    base = BASE[mix]
    if role == "output" or (role == "token_embd" and tied):
        return "Q8_0" if mix == "Q8_0" else "Q6_K"
    if mix in ("Q8_0", "Q6_K"):
        return base
    if role == "attn_v":
        if mix in ("Q4_K_M", "Q5_K_M"):
            return "Q6_K" if more_bits(layer, layers) else base
        if mix == "Q3_K_M":
            return "Q5_K" if layer < 2 else "Q4_K"
        return "Q4_K" if heads_per_kv >= 4 else "Q3_K"  # Q2_K
    if role == "ffn_down":
        if mix in ("Q4_K_M", "Q5_K_M"):
            return "Q6_K" if more_bits(layer, layers) else base
        if mix == "Q3_K_M":
            if layer < layers // 16:
                return "Q5_K"
            return "Q4_K"
        return "Q3_K"  # Q2_K
    if role == "attn_output":
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K"}.get(mix, base)
    return base


def fit_width(kind: str, width: int) -> str:
    """The type that a row of `width` weights really gets: k-quants need multiples of 256, the others of 32."""
    if width % BLOCK_OF[kind] == 0:
        return kind
    smaller = SUBSTITUTE.get(kind)
    return smaller if smaller and width % BLOCK_OF[smaller] == 0 else "F16"
