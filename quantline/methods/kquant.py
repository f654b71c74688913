"""The options of llama.cpp's own quantization, with an importance matrix."""

from typing import ClassVar, Literal

from pydantic import Field

from quantline.config.ggml_recipes import GgmlRecipe, GgmlType, Mix, TypeBudget
from quantline.config.recipes import register_method


@register_method("kquant")
class KQuantRecipe(GgmlRecipe):
    """Quantize as llama.cpp does, with the mix's type for each tensor."""

    implementation: ClassVar[str] = "quantline.methods.ggml.quantize:KQuant"

    method: Literal["kquant"]
    mix: Mix = Field(description="llama.cpp's name for the choice of types.")
    importance: bool = Field(
        default=True,
        description="Weight errors by the inputs' second moments (the importance matrix).",
    )
    kernel: Literal["ggml", "numba"] = Field(
        default="numba",
        description="numba makes the same blocks as ggml's own, several times as fast.",
    )
    importance_file: str | None = Field(
        default=None,
        description="An importance matrix that llama-imatrix made, in place of the calibration's. "
        "Where its content changes, give it another name: DVC looks at the path alone.",
    )
    overrides: dict[str, GgmlType] = Field(
        default_factory=dict,
        description="Types that take precedence over the mix: a regular expression that is "
        "searched for in the tensor's name in the GGUF file, and its type. The first that matches "
        "applies, as with llama-quantize's --tensor-type.",
    )
    budget: TypeBudget | None = Field(
        default=None, description="Choose types within a size; what overrides name is kept."
    )

    @property
    def uses_importance(self) -> bool:
        """Whether errors are weighted by an importance matrix."""
        return bool(self.importance or self.importance_file)

    @property
    def importance_path(self) -> str | None:
        """The file of the importance matrix; None where the calibration provides it."""
        return self.importance_file

    @property
    def search_kernel(self) -> Literal["ggml", "numba"]:
        """Which implementation of ggml's search rounds."""
        return self.kernel
