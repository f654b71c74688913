"""The options of curvature rounding within llama.cpp's block types."""

from typing import ClassVar, Literal

from pydantic import Field

from quantline.config.ggml_recipes import (
    CodecMix,
    CodecType,
    CodecTypeBudget,
    GgmlRecipe,
)
from quantline.config.recipes import (
    SHRINKAGE,
    OutputStatistics,
    Shrinkage,
    register_method,
)


@register_method("kquant-curvature")
class KQuantCurvatureRecipe(GgmlRecipe):
    """Round within ggml's grids to where the KL divergence rises least.

    It needs a calibration with gradients.
    """

    implementation: ClassVar[str] = "quantline.methods.ggml.curvature:KQuantCurvature"
    baseline: ClassVar[str] = "ggml"

    method: Literal["kquant-curvature"]
    mix: CodecMix = Field(description="llama.cpp's name for the choice of types.")
    overrides: dict[str, CodecType] = Field(default_factory=dict, description="As for kquant.")
    budget: CodecTypeBudget | None = Field(
        default=None, description="Choose types within a size; what overrides name is kept."
    )
    damping: float = Field(
        default=0.01,
        gt=0,
        allow_inf_nan=False,
        description="Share of the mean diagonal that is added to the Hessian's diagonal.",
    )
    shrinkage: Shrinkage = SHRINKAGE
    rounds: int = Field(
        default=4, ge=0, description="Rounds of descent over scales and codes in turn."
    )
    scaling: bool = Field(
        default=True,
        description="Scale inputs as AWQ does, which norms make up for. Not for a file that LoRA "
        "adapters are to be applied to.",
    )

    @property
    def output_statistics(self) -> OutputStatistics:
        """All of the output gradient's second moments."""
        return "full"
