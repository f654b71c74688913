"""llama.cpp's mixes as tables: a type for most tensors, and rules for the others.

They are those of llama-quant.cpp, llama_tensor_get_type. Not here: its types that the gguf package
does not know (Q1_0, Q2_0). mixes.py applies the rules.
"""

from collections.abc import Callable
from dataclasses import dataclass

# Mix → the type of most of its tensors.
BASE_TYPES = {
    "F32": "F32",
    "F16": "F16",
    "BF16": "BF16",
    "Q8_0": "Q8_0",
    "Q4_0": "Q4_0",
    "Q4_1": "Q4_1",
    "Q5_0": "Q5_0",
    "Q5_1": "Q5_1",
    "Q2_K": "Q2_K",
    "Q2_K_S": "Q2_K",
    "Q3_K_S": "Q3_K",
    "Q3_K_M": "Q3_K",
    "Q3_K_L": "Q3_K",
    "Q4_K_S": "Q4_K",
    "Q4_K_M": "Q4_K",
    "Q5_K_S": "Q5_K",
    "Q5_K_M": "Q5_K",
    "Q6_K": "Q6_K",
    "IQ1_S": "IQ1_S",
    "IQ1_M": "IQ1_M",
    "IQ2_XXS": "IQ2_XXS",
    "IQ2_XS": "IQ2_XS",
    "IQ2_S": "IQ2_XS",
    "IQ2_M": "IQ2_S",
    "IQ3_XXS": "IQ3_XXS",
    "IQ3_XS": "IQ3_S",
    "IQ3_S": "IQ3_S",
    "IQ3_M": "IQ3_S",
    "IQ4_NL": "IQ4_NL",
    "IQ4_XS": "IQ4_XS",
    "TQ1_0": "TQ1_0",
    "TQ2_0": "TQ2_0",
    "MXFP4_MOE": "MXFP4",
}
# Mixes whose keys and values stay as small as the rules make them.
LOWEST_MIXES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")

# Piece of a tensor's name in the file → the part that the rules know it by; the first that matches.
PARTS = {
    "attn_qkv.weight": "attn_v",
    "attn_kv_b.weight": "attn_v",
    "attn_v.weight": "attn_v",
    "attn_k.weight": "attn_k",
    "attn_q.weight": "attn_q",
    "attn_output.weight": "attn_output",
    "ffn_up": "ffn_up",
    "ffn_gate": "ffn_gate",
    "ffn_down": "ffn_down",
}
EXPERTS = "experts"  # any tensor that holds all experts of a block
ANY = "any"  # any tensor


@dataclass(frozen=True)
class ModelTraits:
    """What the rules know about a model besides the names of its tensors.

    Attributes:
        layers: Decoder blocks; for a rule, of how many tensors of its part `layer` is the place.
        tied: Whether the head is the embedding.
        heads_per_kv: How many heads share a key head; 0 for a model whose first block has none.
        experts: Experts of a block; 0 for a dense model.
        is_70b: Whether llama.cpp takes it for "70B".
        has_importance: Whether there is an importance matrix.
        architecture: What llama.cpp calls it; two have rules of their own.
    """

    layers: int
    tied: bool
    heads_per_kv: int = 1
    experts: int = 0
    is_70b: bool = False
    has_importance: bool = False
    architecture: str = ""


FALCON = "falcon"
Condition = Callable[[int, ModelTraits], bool]


def use_more_bits(layer: int, model: ModelTraits) -> bool:
    """Whether a layer is worth more: the first and last eighth, and every third between."""
    eighth = model.layers // 8
    return layer < eighth or layer >= 7 * model.layers // 8 or (layer - eighth) % 3 == 2


def _always(layer: int, model: ModelTraits) -> bool:
    return True


def _shared_keys(layer: int, model: ModelTraits) -> bool:
    return model.heads_per_kv >= 4


def _shared_keys_or_experts(layer: int, model: ModelTraits) -> bool:
    return model.heads_per_kv >= 4 or model.experts >= 4


def _eight_experts(layer: int, model: ModelTraits) -> bool:
    return model.experts == 8


def _first_eighth(layer: int, model: ModelTraits) -> bool:
    return layer < model.layers // 8


def _first_eighth_with_importance(layer: int, model: ModelTraits) -> bool:
    return model.has_importance and layer < model.layers // 8


def _first_eighth_without_importance(layer: int, model: ModelTraits) -> bool:
    return not model.has_importance and layer < model.layers // 8


def _first_eighth_or_eight_experts(layer: int, model: ModelTraits) -> bool:
    return layer < model.layers // 8 or (model.experts == 8 and use_more_bits(layer, model))


def _first_sixteenth(layer: int, model: ModelTraits) -> bool:
    return layer < model.layers // 16


def _without_importance(layer: int, model: ModelTraits) -> bool:
    return not model.has_importance


def _middle(layer: int, model: ModelTraits) -> bool:
    return model.layers // 8 <= layer < 7 * model.layers // 8


def _falcon(layer: int, model: ModelTraits) -> bool:
    return model.architecture == FALCON


def _first_sixteenth_of_falcon(layer: int, model: ModelTraits) -> bool:
    return _falcon(layer, model) and _first_sixteenth(layer, model)


def _more_bits_of_falcon(layer: int, model: ModelTraits) -> bool:
    return _falcon(layer, model) and use_more_bits(layer, model)


def _first_two(layer: int, model: ModelTraits) -> bool:
    return layer < 2


def _first_four(layer: int, model: ModelTraits) -> bool:
    return layer < 4


@dataclass(frozen=True)
class Rule:
    """The tensors of a part get a type in the layers where a condition holds.

    Attributes:
        part: One of PARTS, "token_embd", "output", EXPERTS, or ANY.
        ggml_type: The type that they get; None for that of most of the mix's tensors.
        when: The condition.
    """

    part: str
    ggml_type: str | None
    when: Condition = _always


ATTN_OUTPUT_OF_EXPERTS = Rule("attn_output", "Q5_K", _eight_experts)
# None is the mix's own type.
ATTN_OUTPUT_OF_FALCON = Rule("attn_output", None, _falcon)


def _low_bit_rules(small: str, better: str, attn_output: str) -> tuple[Rule, ...]:
    """Return the rules that the mixes of less than three bits share.

    Args:
        small: The embedding's type.
        better: The type of values, and of the first layers' ffn_down.
        attn_output: The type of attn_output.
    """
    return (
        Rule("token_embd", small),
        Rule("output", "Q5_K"),
        Rule("attn_v", "Q4_K", _shared_keys_or_experts),
        Rule("attn_v", better),
        Rule("attn_k", "Q4_K", _eight_experts),
        Rule("ffn_down", better, _first_eighth),
        ATTN_OUTPUT_OF_EXPERTS,
        Rule("attn_output", attn_output),
    )


IQ4_RULES = (
    Rule("attn_v", "Q5_K", _shared_keys),
    Rule("ffn_down", "Q5_K", _first_eighth_without_importance),
    ATTN_OUTPUT_OF_EXPERTS,
)
# Mix → its rules, of which the first that matches decides.
RULES: dict[str, tuple[Rule, ...]] = {
    "Q4_0": (Rule("ffn_down", "Q4_1", _first_eighth_with_importance),),
    "Q5_0": (Rule("ffn_down", "Q5_1", _first_eighth_with_importance),),
    "Q2_K": (
        Rule("attn_v", "Q4_K", _shared_keys),
        Rule("attn_v", "Q3_K"),
        Rule("ffn_down", "Q3_K"),
        ATTN_OUTPUT_OF_FALCON,
        ATTN_OUTPUT_OF_EXPERTS,
        Rule("attn_output", "Q3_K"),
    ),
    "Q2_K_S": (
        Rule("attn_v", "Q4_K", _shared_keys),
        Rule("ffn_down", "Q4_K", _first_eighth),
    ),
    "Q3_K_S": (ATTN_OUTPUT_OF_EXPERTS,),
    "Q3_K_M": (
        Rule("attn_v", "Q5_K", _first_two),
        Rule("attn_v", "Q4_K"),
        Rule("ffn_down", "Q5_K", _first_sixteenth),
        Rule("ffn_down", "Q4_K", _more_bits_of_falcon),
        Rule("ffn_down", None, _falcon),
        Rule("ffn_down", "Q4_K"),
        ATTN_OUTPUT_OF_FALCON,
        ATTN_OUTPUT_OF_EXPERTS,
        Rule("attn_output", "Q4_K"),
    ),
    "Q3_K_L": (
        Rule("attn_v", "Q5_K"),
        Rule("ffn_down", "Q4_K", _falcon),
        Rule("ffn_down", "Q5_K"),
        Rule("attn_output", "Q4_K", _falcon),
        Rule("attn_output", "Q3_K", _eight_experts),
        Rule("attn_output", "Q5_K"),
    ),
    "Q4_K_S": (
        Rule("attn_v", "Q5_K", _first_four),
        Rule("ffn_down", None, _falcon),
        Rule("ffn_down", "Q5_K", _first_eighth),
        ATTN_OUTPUT_OF_EXPERTS,
    ),
    "Q4_K_M": (
        Rule("attn_v", "Q6_K", use_more_bits),
        Rule("ffn_down", "Q6_K", _first_sixteenth_of_falcon),
        Rule("ffn_down", "Q5_K", _more_bits_of_falcon),
        Rule("ffn_down", None, _falcon),
        Rule("ffn_down", "Q6_K", use_more_bits),
        ATTN_OUTPUT_OF_EXPERTS,
    ),
    "Q5_K_M": (
        Rule("attn_v", "Q6_K", use_more_bits),
        Rule("ffn_down", "Q6_K", use_more_bits),
    ),
    "IQ1_S": _low_bit_rules("Q2_K", "Q2_K", "IQ2_XXS"),
    "IQ1_M": _low_bit_rules("Q2_K", "Q2_K", "IQ2_XXS"),
    "IQ2_XXS": _low_bit_rules("Q2_K", "Q2_K", "IQ2_XXS"),
    "IQ2_XS": _low_bit_rules("Q2_K", "Q2_K", "IQ2_XS"),
    "IQ2_S": _low_bit_rules("IQ3_S", "IQ3_S", "IQ3_S"),
    "IQ2_M": _low_bit_rules("IQ3_S", "IQ3_S", "IQ3_S"),
    "IQ3_XXS": (
        Rule("token_embd", "IQ3_S"),
        Rule("output", "Q5_K"),
        Rule("attn_v", "Q4_K", _shared_keys),
        Rule("attn_v", "IQ3_S", _without_importance),
        Rule("attn_q", "IQ2_S"),
        Rule("attn_k", "IQ2_S"),
        Rule("ffn_down", "Q4_K", _first_eighth_without_importance),
        Rule("ffn_down", "Q3_K", _without_importance),
        ATTN_OUTPUT_OF_FALCON,
        ATTN_OUTPUT_OF_EXPERTS,
        Rule("attn_output", "IQ3_S"),
    ),
    "IQ3_XS": (
        Rule("attn_v", "Q4_K", _shared_keys),
        Rule("attn_q", "IQ3_XXS"),
        Rule("attn_k", "IQ3_XXS"),
        Rule("ffn_gate", "IQ3_XXS", _middle),
        Rule("ffn_up", "IQ3_XXS", _middle),
        ATTN_OUTPUT_OF_EXPERTS,
    ),
    "IQ3_S": (
        Rule("attn_v", "Q4_K", _shared_keys),
        ATTN_OUTPUT_OF_EXPERTS,
    ),
    "IQ3_M": (
        Rule("attn_v", "Q4_K"),
        Rule("ffn_down", "Q4_K", _first_eighth_or_eight_experts),
        ATTN_OUTPUT_OF_FALCON,
        ATTN_OUTPUT_OF_EXPERTS,
        Rule("attn_output", "Q4_K"),
    ),
    "IQ4_NL": IQ4_RULES,
    "IQ4_XS": IQ4_RULES,
    "TQ1_0": (Rule("token_embd", "Q4_K"),),
    "TQ2_0": (Rule("token_embd", "Q4_K"),),
    "MXFP4_MOE": (
        Rule("output", "Q8_0"),
        Rule(EXPERTS, "MXFP4"),
        Rule(ANY, "Q8_0"),
    ),
}
