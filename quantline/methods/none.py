"""The recipe that quantizes nothing."""

from typing import ClassVar, Literal

from quantline.config.recipes import Recipe, register_method


@register_method("none")
class NoneRecipe(Recipe):
    """Keep the checkpoint's weights as they are."""

    storage: ClassVar[str] = "none"

    method: Literal["none"]
