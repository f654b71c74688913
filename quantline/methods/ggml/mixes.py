"""Which ggml type each tensor of a file gets, as llama.cpp chooses it (llama-quant.cpp, llama_tensor_get_type).

A mix has a type for most tensors, and rules, the first of which that fits decides. Tensors go by their names in the
file. Not here: llama.cpp's exceptions for Falcon, and its types that the gguf package does not know (Q1_0, Q2_0).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from quantline.errors import Failure, StageError

BASE = {
    "F32": "F32", "F16": "F16", "BF16": "BF16", "Q8_0": "Q8_0", "Q4_0": "Q4_0", "Q4_1": "Q4_1", "Q5_0": "Q5_0",
    "Q5_1": "Q5_1", "Q2_K": "Q2_K", "Q2_K_S": "Q2_K", "Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_L": "Q3_K",
    "Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K", "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K", "Q6_K": "Q6_K", "IQ1_S": "IQ1_S",
    "IQ1_M": "IQ1_M", "IQ2_XXS": "IQ2_XXS", "IQ2_XS": "IQ2_XS", "IQ2_S": "IQ2_XS", "IQ2_M": "IQ2_S", "IQ3_XXS": "IQ3_XXS",
    "IQ3_XS": "IQ3_S", "IQ3_S": "IQ3_S", "IQ3_M": "IQ3_S", "IQ4_NL": "IQ4_NL", "IQ4_XS": "IQ4_XS", "TQ1_0": "TQ1_0",
    "TQ2_0": "TQ2_0", "MXFP4_MOE": "MXFP4"}
FLOATS = ("F32", "F16", "BF16")
LOWEST = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")
# What takes the place of a type whose blocks do not divide a row; where that does not either, F16.
SUBSTITUTE = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "TQ1_0": "Q4_0",
              "TQ2_0": "Q4_0",
              **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL")}
# Types that are garbage without an importance matrix, and that llama.cpp therefore does not make without one.
NEED_IMPORTANCE = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")

# Substring of a tensor's name → the part that the rules know it by; the first that is found.
PARTS = {"attn_qkv.weight": "values", "attn_kv_b.weight": "values", "attn_v.weight": "values", "attn_k.weight": "keys",
         "attn_q.weight": "queries", "attn_output.weight": "attn_output", "ffn_up": "up", "ffn_gate": "gate",
         "ffn_down": "down"}
NEVER = ("_norm.weight", "ffn_gate_inp.weight", "position_embd.weight", "token_types.weight")  # stay as they are


@dataclass(frozen=True)
class Model:
    """What the rules look at besides the name: `layers`, whether the head is the embedding, how many heads share a key
    head, the number of experts (0: dense), llama.cpp's "70B" (80 layers whose keys are shared), and whether there is an
    importance matrix.
    """

    layers: int
    tied: bool
    heads_per_kv: int = 1
    experts: int = 0
    is_70b: bool = False
    importance: bool = False


When = Callable[[int, Model], bool]


def more_bits(layer: int, model: Model) -> bool:
    """llama.cpp's choice of the layers that are worth more: the first and last eighth, and every third between."""
    eighth = model.layers // 8
    return layer < eighth or layer >= 7 * model.layers // 8 or (layer - eighth) % 3 == 2


def _always(layer: int, model: Model) -> bool:
    return True


def _grouped(layer: int, model: Model) -> bool:
    return model.heads_per_kv >= 4


def _grouped_or_experts(layer: int, model: Model) -> bool:
    return model.heads_per_kv >= 4 or model.experts >= 4


def _eight_experts(layer: int, model: Model) -> bool:
    return model.experts == 8


def _first_eighth(layer: int, model: Model) -> bool:
    return layer < model.layers // 8


def _first_eighth_by_importance(layer: int, model: Model) -> bool:
    return model.importance and layer < model.layers // 8


def _first_eighth_without_importance(layer: int, model: Model) -> bool:
    return not model.importance and layer < model.layers // 8


def _first_eighth_or_more_bits_of_experts(layer: int, model: Model) -> bool:
    return layer < model.layers // 8 or (model.experts == 8 and more_bits(layer, model))


def _first_sixteenth(layer: int, model: Model) -> bool:
    return layer < model.layers // 16


def _without_importance(layer: int, model: Model) -> bool:
    return not model.importance


def _middle(layer: int, model: Model) -> bool:
    return model.layers // 8 <= layer < 7 * model.layers // 8


def _first_two(layer: int, model: Model) -> bool:
    return layer < 2


def _first_four(layer: int, model: Model) -> bool:
    return layer < 4


@dataclass(frozen=True)
class Rule:
    """The tensors of a part get `kind` in the layers where `when` holds."""

    part: str
    kind: str
    when: When = _always


OUTPUT_OF_EXPERTS = Rule("attn_output", "Q5_K", _eight_experts)
RULES: dict[str, tuple[Rule, ...]] = {
    "Q4_0": (Rule("down", "Q4_1", _first_eighth_by_importance),),
    "Q5_0": (Rule("down", "Q5_1", _first_eighth_by_importance),),
    "Q2_K": (Rule("values", "Q4_K", _grouped), Rule("values", "Q3_K"), Rule("down", "Q3_K"), OUTPUT_OF_EXPERTS,
             Rule("attn_output", "Q3_K")),
    "Q2_K_S": (Rule("values", "Q4_K", _grouped), Rule("down", "Q4_K", _first_eighth)),
    "Q3_K_S": (OUTPUT_OF_EXPERTS,),
    "Q3_K_M": (Rule("values", "Q5_K", _first_two), Rule("values", "Q4_K"), Rule("down", "Q5_K", _first_sixteenth),
               Rule("down", "Q4_K"), OUTPUT_OF_EXPERTS, Rule("attn_output", "Q4_K")),
    "Q3_K_L": (Rule("values", "Q5_K"), Rule("down", "Q5_K"), Rule("attn_output", "Q3_K", _eight_experts),
               Rule("attn_output", "Q5_K")),
    "Q4_K_S": (Rule("values", "Q5_K", _first_four), Rule("down", "Q5_K", _first_eighth), OUTPUT_OF_EXPERTS),
    "Q4_K_M": (Rule("values", "Q6_K", more_bits), Rule("down", "Q6_K", more_bits), OUTPUT_OF_EXPERTS),
    "Q5_K_M": (Rule("values", "Q6_K", more_bits), Rule("down", "Q6_K", more_bits)),
    "IQ3_XXS": (Rule("embedding", "IQ3_S"), Rule("head", "Q5_K"), Rule("values", "Q4_K", _grouped),
                Rule("values", "IQ3_S", _without_importance), Rule("queries", "IQ2_S"), Rule("keys", "IQ2_S"),
                Rule("down", "Q4_K", _first_eighth_without_importance), Rule("down", "Q3_K", _without_importance),
                OUTPUT_OF_EXPERTS, Rule("attn_output", "IQ3_S")),
    "IQ3_XS": (Rule("values", "Q4_K", _grouped), Rule("queries", "IQ3_XXS"), Rule("keys", "IQ3_XXS"),
               Rule("gate", "IQ3_XXS", _middle), Rule("up", "IQ3_XXS", _middle), OUTPUT_OF_EXPERTS),
    "IQ3_S": (Rule("values", "Q4_K", _grouped), OUTPUT_OF_EXPERTS),
    "IQ3_M": (Rule("values", "Q4_K"), Rule("down", "Q4_K", _first_eighth_or_more_bits_of_experts), OUTPUT_OF_EXPERTS,
              Rule("attn_output", "Q4_K")),
    "TQ1_0": (Rule("embedding", "Q4_K"),),
    "TQ2_0": (Rule("embedding", "Q4_K"),),
    "MXFP4_MOE": (Rule("head", "Q8_0"), Rule("experts", "MXFP4"), Rule("any", "Q8_0")),
}
RULES |= dict.fromkeys(("IQ4_NL", "IQ4_XS"), (
    Rule("values", "Q5_K", _grouped), Rule("down", "Q5_K", _first_eighth_without_importance), OUTPUT_OF_EXPERTS))
RULES |= {mix: (Rule("embedding", small), Rule("head", "Q5_K"), Rule("values", "Q4_K", _grouped_or_experts),
                Rule("values", better), Rule("keys", "Q4_K", _eight_experts), Rule("down", better, _first_eighth),
                OUTPUT_OF_EXPERTS, Rule("attn_output", output))
          for mix, small, better, output in (
              ("IQ1_S", "Q2_K", "Q2_K", "IQ2_XXS"), ("IQ1_M", "Q2_K", "Q2_K", "IQ2_XXS"),
              ("IQ2_XXS", "Q2_K", "Q2_K", "IQ2_XXS"), ("IQ2_XS", "Q2_K", "Q2_K", "IQ2_XS"),
              ("IQ2_S", "IQ3_S", "IQ3_S", "IQ3_S"), ("IQ2_M", "IQ3_S", "IQ3_S", "IQ3_S"))}


def part_of(place: str, model: Model) -> str:
    """The part that a tensor of the file plays in the rules; a tied embedding is the head."""
    if place in ("output.weight", "token_embd.weight"):
        return "head" if place == "output.weight" or model.tied else "embedding"
    return next((part for piece, part in PARTS.items() if piece in place), "other")


def is_quantized(place: str, dimensions: int) -> bool:
    """Whether a mix touches a tensor of the file: matrices, but no norms, positions or routers of experts."""
    return dimensions > 1 and place.endswith("weight") and not any(piece in place for piece in NEVER)


def requested_type(mix: str, place: str, dimensions: int, model: Model) -> str:
    """The type that a mix gives the tensor `place` of a file, before looking at its width.

    Raises StageError(config_invalid) for an unknown mix.
    """
    if mix not in BASE:
        raise StageError(Failure.CONFIG_INVALID, f"expected a mix among {', '.join(BASE)}, found {mix!r}")
    if not is_quantized(place, dimensions):
        return "F32"
    base, part = BASE[mix], part_of(place, model)
    if mix in FLOATS:
        return base
    found = re.match(r"blk\.(\d+)\.", place)
    layer = int(found[1]) if found else 0
    parts = (part, "any", *(["experts"] if dimensions > 2 else []))
    kind = next((rule.kind for rule in RULES.get(mix, ()) if rule.part in parts and rule.when(layer, model)), None)
    if kind is None:
        kind = "Q6_K" if part == "head" and base != "Q8_0" else base
    if part == "values" and mix not in (*LOWEST, "MXFP4_MOE"):
        kind = "Q5_K" if model.is_70b and kind in ("Q3_K", "Q4_K") else kind
        return "Q8_0" if model.experts == 8 else kind
    return "Q8_0" if part == "keys" and model.experts == 8 and mix not in (*LOWEST, "MXFP4_MOE") else kind


def block_of(kind: str) -> int:
    """How many weights a block of a type holds."""
    return GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]


def fit_width(kind: str, width: int) -> str:
    """The type that a row of `width` weights really gets: one whose blocks divide it."""
    if width % block_of(kind) == 0:
        return kind
    smaller = SUBSTITUTE.get(kind)
    return smaller if smaller and width % block_of(smaller) == 0 else "F16"


def actual_type(mix: str, place: str, kind: str, width: int, model: Model) -> str:
    """The type in place of the requested one, for rows of `width`: a head that the mix's own type does not fit is Q8_0.
    """
    if part_of(place, model) == "head" and mix not in FLOATS and width % block_of(BASE[mix]):
        kind = "Q8_0"
    return fit_width(kind, width)


def needs_importance(mix: str, place: str, kind: str) -> bool:
    """Whether llama.cpp refuses to make this tensor of this type without an importance matrix."""
    if place in ("token_embd.weight", "output.weight"):
        return False
    return kind in NEED_IMPORTANCE or (kind == "Q2_K" and mix == "Q2_K_S")
