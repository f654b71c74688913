"""The options of FP8."""

from typing import ClassVar, Literal

from quantline.config.recipes import Recipe, register_method


@register_method("fp8")
class Fp8Recipe(Recipe):
    """Eight-bit floats (e4m3) for weights and activations, one scale per output channel."""

    implementation: ClassVar[str] = "quantline.methods.integer.fp8:Fp8"
    storage: ClassVar[str] = "float8"
    activations: ClassVar[bool] = True

    method: Literal["fp8"]

    @property
    def uses_calibration(self) -> bool:
        """False: only the weights decide."""
        return False
