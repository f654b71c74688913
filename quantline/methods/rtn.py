"""The options of round-to-nearest."""

from typing import ClassVar, Literal

from pydantic import Field

from quantline.config.recipes import GroupedRecipe, register_method


@register_method("rtn")
class RtnRecipe(GroupedRecipe):
    """Round every weight to the nearest point of its group's grid."""

    implementation: ClassVar[str] = "quantline.methods.integer.rtn:Rtn"

    method: Literal["rtn"]
    scales: Literal["minmax", "weighted"] = Field(
        default="minmax",
        description="minmax: a scale spans its group. weighted: the span is clipped to where the "
        "error weighted by diag(H) is least.",
    )

    @property
    def uses_calibration(self) -> bool:
        """Whether spans, moves, a budget or refinement go by the text; plain rounding does not."""
        by_statistics = self.scales == "weighted" or self.curvature or self.budget is not None
        return by_statistics or self.refine.steps > 0
