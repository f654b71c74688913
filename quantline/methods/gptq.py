"""The options of GPTQ."""

from typing import ClassVar, Literal

from pydantic import Field

from quantline.config.recipes import GroupedRecipe, register_method


@register_method("gptq")
class GptqRecipe(GroupedRecipe):
    """Round column by column, and push each column's error onto the columns that follow."""

    implementation: ClassVar[str] = "quantline.methods.integer.gptq:Gptq"

    method: Literal["gptq"]
    act_order: bool = Field(
        default=True, description="Round the columns with the largest inputs first."
    )
    damping: float = Field(
        default=0.01,
        gt=0,
        allow_inf_nan=False,
        description="Share of the mean diagonal that is added to the Hessian's diagonal.",
    )
