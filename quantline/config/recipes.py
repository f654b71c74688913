"""The recipes of params.yaml: how weights are rounded, one class for each method."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from quantline.config.section import Section

INTEGER_METHODS = ("rtn", "gptq", "awq", "int8")
ACTIVATION_METHODS = ("smoothquant", "fp8")  # activations are rounded too
# The mixes of llama.cpp, and the types that one tensor can be asked to have (quantline/methods/ggml/mixes.py).
MIXES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q2_K_S", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S",
         "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS",
         "IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4_MOE")
GGML_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S",
              "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4")
# Those of them that have a codec (quantline/methods/ggml/block_types.py), so that curvature can round within their grids.
CURVED_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
CURVED_MIXES = tuple(mix for mix in MIXES[3:] if mix.startswith(("Q", "IQ4")))


BITS, GROUP_SIZES = (2, 3, 4, 8), (32, 64, 128, -1)
K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")


class Budget(Section):
    """A limit of size within which each tensor gets what the calibration says it is worth, instead of what the recipe's
    mix or grid gives it. Without a limit of its own, the file is as large as the recipe would make it without a budget.
    """

    size_mib: float | None = Field(default=None, gt=0, allow_inf_nan=False)  # of the file with the weights
    bits_per_weight: float | None = Field(default=None, gt=0, allow_inf_nan=False)  # over all weights of the file

    @model_validator(mode="after")
    def _one_limit(self) -> "Budget":
        if self.size_mib is not None and self.bits_per_weight is not None:
            raise ValueError("expected one limit, found size_mib and bits_per_weight; leave one of them out")
        return self


class GridBudget(Budget):
    """Of layers of grouped integers: `bits` and `group_sizes` are what a layer can have."""

    bits: tuple[Literal[BITS], ...] = Field(default=BITS, min_length=1)
    group_sizes: tuple[Literal[GROUP_SIZES], ...] = Field(default=GROUP_SIZES[:3], min_length=1)


class Recipe(Section):
    substitution: Literal["report", "fail"] = "report"


class Grouped(Recipe):
    bits: Literal[BITS]
    group_size: Literal[GROUP_SIZES]
    budget: GridBudget | None = None
    symmetric: bool
    scales: Literal["minmax", "weighted"] = "weighted"  # weighted: the span with the least diag(H)-weighted error
    curvature: bool = False  # afterwards move integers and scales to where the KL divergence rises least


class NoneRecipe(Recipe):
    method: Literal["none"]


class Rtn(Grouped):
    method: Literal["rtn"]
    scales: Literal["minmax", "weighted"] = "minmax"


class Gptq(Grouped):
    method: Literal["gptq"]
    act_order: bool = True
    damping: float = Field(default=0.01, gt=0, allow_inf_nan=False)


class Awq(Grouped):
    method: Literal["awq"]
    grid: int = Field(default=20, ge=2)
    rounding: Literal["nearest", "gptq"] = "nearest"  # how the scaled weights are rounded


class Int8(Recipe):
    method: Literal["int8"]


class SmoothQuant(Recipe):
    method: Literal["smoothquant"]
    smoothing: float | None = Field(default=None, ge=0, le=1)  # the exponent a; None searches the best for each input
    grid: int = Field(default=20, ge=2)


class Fp8(Recipe):
    method: Literal["fp8"]


class TypeBudget(Budget):
    """Of tensors in ggml's blocks: `types` are what a tensor can have."""

    types: tuple[Literal[GGML_TYPES[1:]], ...] = Field(default=K_QUANTS, min_length=1)


class CurvedTypeBudget(Budget):
    types: tuple[Literal[CURVED_TYPES[1:]], ...] = Field(default=K_QUANTS, min_length=1)


class KQuant(Recipe):
    method: Literal["kquant"]
    mix: Literal[MIXES]
    importance: bool = True  # weigh errors by the input's second moments (the importance matrix)
    kernel: Literal["ggml", "numba"] = "numba"  # numba: the same blocks as ggml's own, several times as fast
    # An importance matrix that llama.cpp's tool llama-imatrix made, instead of the calibration's. Where its content
    # changes, give it another name: DVC looks at the path alone.
    importance_file: str | None = None
    # Types that take precedence over the mix: regular expression → type. It is searched for in the names that tensors
    # have in the GGUF file (blk.0.attn_v.weight, output.weight), as that of llama-quantize's --tensor-type; the first fits.
    overrides: dict[str, Literal[GGML_TYPES]] = Field(default_factory=dict)
    budget: TypeBudget | None = None  # what the overrides name stays as they say


class KQuantCurvature(Recipe):
    """Rounded within ggml's grids by the curvature, which needs a calibration with gradients."""

    method: Literal["kquant-curvature"]
    mix: Literal[CURVED_MIXES]
    overrides: dict[str, Literal[CURVED_TYPES]] = Field(default_factory=dict)  # as KQuant's
    budget: CurvedTypeBudget | None = None
    damping: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    rounds: int = Field(default=4, ge=0)  # of scales and codes in turn
    # Scale inputs as awq does, which norms make up for; not for a file to which LoRA adapters are to be applied.
    scaling: bool = True
    importance: ClassVar[bool] = True  # ggml's part of the work is weighed by the calibration
    importance_file: ClassVar[None] = None
    kernel: ClassVar[str] = "numba"


RECIPES = {"none": NoneRecipe, "rtn": Rtn, "gptq": Gptq, "awq": Awq, "int8": Int8, "smoothquant": SmoothQuant, "fp8": Fp8,
           "kquant": KQuant, "kquant-curvature": KQuantCurvature}
AnyRecipe = Annotated[NoneRecipe | Rtn | Gptq | Awq | Int8 | SmoothQuant | Fp8 | KQuant | KQuantCurvature,
                      Field(discriminator="method")]
