"""The options of AWQ."""

from typing import ClassVar, Literal

from pydantic import Field

from quantline.config.recipes import GroupedRecipe, OutputStatistics, register_method


@register_method("awq")
class AwqRecipe(GroupedRecipe):
    """Scale up the inputs that matter before rounding, and fold the scales into what precedes."""

    implementation: ClassVar[str] = "quantline.methods.integer.awq:Awq"
    scales_inputs: ClassVar[bool] = True

    method: Literal["awq"]
    grid: int = Field(
        default=20, ge=2, description="Exponents that the search of the scales starts from."
    )
    rounding: Literal["nearest", "gptq"] = Field(
        default="nearest", description="How the scaled weights are rounded."
    )

    @property
    def output_statistics(self) -> OutputStatistics:
        """At least the diagonal: how much each output matters to the model."""
        return "full" if self.curvature else "diagonal"

    @property
    def rounding_name(self) -> str:
        """How the scaled weights are rounded."""
        return self.rounding
