"""What recipes in ggml's block types share: the mixes, the types, and budgets over types."""

from typing import ClassVar, Literal, get_args

from pydantic import Field

from quantline.config.recipes import Budget, Recipe

# The mixes of llama.cpp, and the types that one tensor can be asked to have.
Mix = Literal[
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q2_K_S", "Q3_K_S",
    "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "IQ1_S", "IQ1_M",
    "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "IQ4_NL",
    "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4_MOE",
]  # fmt: skip
QuantizedType = Literal[
    "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K",
    "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL",
    "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4",
]  # fmt: skip
GgmlType = Literal["F32", QuantizedType]
# Those that quantline has a codec for, so that it can round within their grids by curvature.
CodecMix = Literal[
    "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q2_K_S", "Q3_K_S", "Q3_K_M", "Q3_K_L",
    "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS",
]  # fmt: skip
QuantizedCodecType = Literal[
    "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K",
    "Q6_K", "IQ4_NL", "IQ4_XS",
]  # fmt: skip
CodecType = Literal["F32", QuantizedCodecType]
MIXES: tuple[Mix, ...] = get_args(Mix)
CODEC_MIXES: tuple[CodecMix, ...] = get_args(CodecMix)
CODEC_TYPES: tuple[CodecType, ...] = get_args(CodecType)
GGML_TYPES: tuple[GgmlType, ...] = get_args(GgmlType)
K_QUANTS: tuple[QuantizedCodecType, ...] = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")


class TypeBudget(Budget):
    """A budget for tensors in ggml's block types."""

    types: tuple[QuantizedType, ...] = Field(
        default=K_QUANTS, min_length=1, description="Types that a tensor can have."
    )


class CodecTypeBudget(Budget):
    """A budget for tensors in those of ggml's types that have a codec here."""

    types: tuple[QuantizedCodecType, ...] = Field(
        default=K_QUANTS, min_length=1, description="Types that a tensor can have."
    )


class GgmlRecipe(Recipe):
    """A recipe whose result is a GGUF file of a mix of ggml's types.

    Subclasses have the fields `mix`, `overrides` and `budget`, each with the names that their
    method can make.
    """

    storage: ClassVar[str] = "ggml"
    container: ClassVar[str] = "gguf"

    @property
    def rounds_outside(self) -> bool:
        """True: every tensor has a type of ggml's."""
        return True

    @property
    def uses_importance(self) -> bool:
        """Whether errors are weighted by an importance matrix."""
        return True

    @property
    def importance_path(self) -> str | None:
        """The file of the importance matrix; None where the calibration provides it."""
        return None

    @property
    def uses_calibration(self) -> bool:
        """Whether the calibration provides importance, or what a budget goes by."""
        own = self.uses_importance and self.importance_path is None
        return own or self.size_budget is not None

    @property
    def search_kernel(self) -> Literal["ggml", "numba"]:
        """Which implementation of ggml's search rounds."""
        return "numba"
