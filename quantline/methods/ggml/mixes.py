"""Which ggml type each tensor of a GGUF file gets, as llama.cpp chooses it (llama-quant.cpp).

The rules are in mix_rules.py. Tensors go by their names in the file.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from quantline.errors import Failure, StageError
from quantline.methods.ggml.mix_rules import (
    ANY,
    BASE_TYPES,
    EXPERTS,
    FALCON,
    LOWEST_MIXES,
    PARTS,
    RULES,
    ModelTraits,
)

FLOAT_TYPES = ("F32", "F16", "BF16")
# What takes the place of a type whose blocks do not divide a row; where that does not either, F16.
SUBSTITUTES = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "TQ1_0": "Q4_0",
    "TQ2_0": "Q4_0",
    "IQ1_S": "IQ4_NL",
    "IQ1_M": "IQ4_NL",
    "IQ2_XXS": "IQ4_NL",
    "IQ2_XS": "IQ4_NL",
    "IQ2_S": "IQ4_NL",
    "IQ3_XXS": "IQ4_NL",
    "IQ3_S": "IQ4_NL",
    "IQ4_XS": "IQ4_NL",
}
# Types that are garbage without an importance matrix, so that llama.cpp refuses to make them.
REFUSED_WITHOUT_IMPORTANCE = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")
# Pieces of the names of tensors that stay as they are.
UNQUANTIZED_NAMES = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_tid2eid.weight",
    "position_embd.weight",
    "token_types.weight",
    "attn_rel_b.weight",
    # small ones of Gemma 3n
    "altup",
    "laurel",
    "per_layer_model_proj",
    # convolutions, whose kernels take floats alone
    "ssm_conv1d",
    "shortconv.conv.weight",
    # what chooses tokens
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
    # RWKV's small matrices
    *(f"time_mix_{part}.weight" for part in ("first", "decay_w1", "decay_w2", "lerp_fused")),
    *(f"time_mix_{part}.weight" for part in ("w0", "w1", "w2", "v0", "v1", "v2")),
    *(f"time_mix_{part}.weight" for part in ("a0", "a1", "a2", "g1", "g2")),
)
# The embeddings of tokens; the second has the inputs of each layer.
EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
HEAD = "output.weight"


def part_of(gguf_name: str, model: ModelTraits) -> str:
    """Return the part that the rules know a tensor by; a tied embedding is "output"."""
    if gguf_name == HEAD:
        return "output"
    if gguf_name in EMBEDDINGS:
        return "output" if model.tied else "token_embd"
    return next((part for piece, part in PARTS.items() if piece in gguf_name), "other")


def is_quantized(gguf_name: str, dimensions: int) -> bool:
    """Whether mixes quantize a tensor: matrices, but no norms, positions or routers of experts."""
    if dimensions < 2 or not gguf_name.endswith("weight"):
        return False
    return not any(piece in gguf_name for piece in UNQUANTIZED_NAMES)


def places_of(
    mix: str, gguf_names: Iterable[str], model: ModelTraits
) -> dict[str, tuple[int, int]]:
    """Return for each tensor which of its part it is, and of how many, as the rules count them.

    In models whose blocks are unlike each other that is not the block's number: llama.cpp counts
    values and, but for mixtures, the parts of feed-forward networks as they come.
    """
    ordered = sorted(gguf_names, key=lambda name: (_block_of(name), name))
    quantized = [name for name in ordered if is_quantized(name, 2)]
    values = sum(part_of(name, model) == "attn_v" for name in quantized)
    by_block = model.experts > 1 and mix not in LOWEST_MIXES
    seen: Counter[str] = Counter()
    places = {}
    for name in quantized:
        part = part_of(name, model)
        counted = part == "attn_v" or (part.startswith("ffn_") and not by_block)
        place = seen[part] if counted else _block_of(name)
        places[name] = place, values if part == "attn_v" else model.layers
        seen[part] += 1
    return places


def _block_of(gguf_name: str) -> int:
    numbered = re.match(r"blk\.(\d+)\.", gguf_name)
    return int(numbered[1]) if numbered else 0


def requested_type(
    mix: str,
    gguf_name: str,
    dimensions: int,
    model: ModelTraits,
    place: tuple[int, int] | None = None,
) -> str:
    """Return the type that a mix gives a tensor, whatever its width.

    Args:
        mix: llama.cpp's name, such as "Q4_K_M".
        gguf_name: The tensor's name in the file.
        dimensions: How many dimensions it has there.
        model: What the rules know of the model.
        place: As `places_of` has it; by default the block's number.

    Raises:
        StageError: config_invalid, for an unknown mix.
    """
    if mix not in BASE_TYPES:
        raise StageError(
            Failure.CONFIG_INVALID,
            f"expected a mix among {', '.join(BASE_TYPES)}, found {mix!r}; take one of them",
        )
    if not is_quantized(gguf_name, dimensions):
        return "F32"
    base = BASE_TYPES[mix]
    if mix in FLOAT_TYPES:
        return base
    part = part_of(gguf_name, model)
    layer, layers = place or (_block_of(gguf_name), model.layers)
    ggml_type = _type_by_rule(mix, part, layer, dimensions, replace(model, layers=layers))
    if ggml_type is None:
        ggml_type = "Q6_K" if part == "output" and base != "Q8_0" else base
    if part not in ("attn_v", "attn_k") or mix in (*LOWEST_MIXES, "MXFP4_MOE"):
        return ggml_type
    if model.experts == 8:
        return "Q8_0"
    if part == "attn_v" and model.is_70b and ggml_type in ("Q3_K", "Q4_K"):
        return "Q5_K"
    return ggml_type


def _type_by_rule(
    mix: str, part: str, layer: int, dimensions: int, model: ModelTraits
) -> str | None:
    """Return the type of the first rule of a mix that matches a part; None for the mix's own."""
    if part == "output" and model.architecture == FALCON:
        return "Q8_0"
    parts = [part, ANY]
    if dimensions > 2:
        parts.append(EXPERTS)
    for rule in RULES.get(mix, ()):
        if rule.part in parts and rule.when(layer, model):
            return rule.ggml_type
    return None


def block_size(ggml_type: str) -> int:
    """Return how many weights a block of a type holds."""
    return GGML_QUANT_SIZES[GGMLQuantizationType[ggml_type]][0]


def fit_width(ggml_type: str, width: int) -> str:
    """Return the type that rows of `width` weights really get: one whose blocks divide them."""
    if width % block_size(ggml_type) == 0:
        return ggml_type
    substitute = SUBSTITUTES.get(ggml_type)
    if substitute is not None and width % block_size(substitute) == 0:
        return substitute
    return "F16"


def actual_type(mix: str, gguf_name: str, ggml_type: str, width: int, model: ModelTraits) -> str:
    """Return the type in place of the requested one, for rows of `width` weights.

    A head that the mix's own type does not fit is Q8_0.

    Args:
        mix: llama.cpp's name of the mix.
        gguf_name: The tensor's name in the file.
        ggml_type: What `requested_type` returned.
        width: Weights in a row.
        model: What the rules know of the model.
    """
    is_head = part_of(gguf_name, model) == "output"
    if is_head and mix not in FLOAT_TYPES and width % block_size(BASE_TYPES[mix]):
        ggml_type = "Q8_0"
    return fit_width(ggml_type, width)


def needs_importance(mix: str, gguf_name: str, ggml_type: str) -> bool:
    """Whether llama.cpp refuses a tensor of a type in a mix without an importance matrix."""
    if gguf_name in (*EMBEDDINGS, HEAD):
        return False
    if mix == "Q2_K_S" and ggml_type == "Q2_K":
        return True
    return ggml_type in REFUSED_WITHOUT_IMPORTANCE
