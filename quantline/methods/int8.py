"""The options of int8."""

from typing import ClassVar, Literal

from quantline.config.recipes import Recipe, register_method


@register_method("int8")
class Int8Recipe(Recipe):
    """Eight bits per weight, with one symmetric scale per output channel."""

    implementation: ClassVar[str] = "quantline.methods.integer.int8:Int8"
    storage: ClassVar[str] = "grouped"

    method: Literal["int8"]

    @property
    def uses_calibration(self) -> bool:
        """False: only the weights decide."""
        return False
