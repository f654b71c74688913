"""The options of SmoothQuant."""

from typing import ClassVar, Literal

from pydantic import Field

from quantline.config.recipes import Recipe, register_method


@register_method("smoothquant")
class SmoothQuantRecipe(Recipe):
    """Eight-bit weights and activations; scales move outliers of activations into the weights."""

    implementation: ClassVar[str] = "quantline.methods.integer.smoothquant:SmoothQuant"
    storage: ClassVar[str] = "grouped"
    activations: ClassVar[bool] = True
    scales_inputs: ClassVar[bool] = True

    method: Literal["smoothquant"]
    smoothing: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="The exponent a of the paper; null searches the best for each input.",
    )
    grid: int = Field(default=20, ge=2, description="Exponents that are tried.")
