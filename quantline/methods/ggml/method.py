"""The protocol of a method for tensors in ggml's block types."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from quantline.config.ggml_recipes import GgmlRecipe
from quantline.methods.method import LayerStatistics

GgmlRecipeType = TypeVar("GgmlRecipeType", bound=GgmlRecipe)


class BlockMethod(ABC, Generic[GgmlRecipeType]):
    """A method that rounds tensors to ggml's block types, with the options of one recipe.

    It sees one tensor, the type that it is to have, and what the calibration knows. Life cycle, for
    every tensor of a GGUF file:

        method = load_method(recipe)                                        # once
        blocks, extra = method.quantize(weight, type, importance, statistics)

    A recipe that is fitted to a budget first asks, for every type that the tensor could have:

        blocks = method.preview(weight, type, importance, statistics)

    Attributes:
        preview_rounding: How `preview` rounds, in the words of a budget's report.
    """

    preview_rounding: ClassVar[str] = "ggml"

    def __init__(self, recipe: GgmlRecipeType) -> None:
        """Take the options of a recipe."""
        self.recipe = recipe

    @property
    def scales_inputs(self) -> bool:
        """Whether layers that share an input are scaled together before rounding."""
        return False

    @abstractmethod
    def quantize(
        self,
        weight: np.ndarray,
        ggml_type: str,
        importance: np.ndarray | None,
        statistics: LayerStatistics | None,
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Round one tensor.

        Args:
            weight: [rows, width] in float32, float16 or bfloat16.
            ggml_type: The type of the blocks, such as "Q4_K".
            importance: How much each input matters, positive float32 [width]; None for an embedding
                or a head, for tensors in floats, and where the recipe wants none.
            statistics: Of the layer whose weight it is, where the recipe's `output_statistics` is
                "full" and the layer was calibrated; else None.

        Returns:
            The blocks uint8 [rows, bytes per row], and what the layer's report says of the method
            besides.

        Raises:
            StageError: non_finite; importance_missing, for a type that ggml does not make without.
        """

    def preview(
        self,
        weight: np.ndarray,
        ggml_type: str,
        importance: np.ndarray | None,
        statistics: LayerStatistics | None,
    ) -> np.ndarray:
        """Round one tensor as well as a budget needs to predict what it costs.

        A method leaves out what takes long and hardly changes which type a tensor is worth.
        Arguments, errors and blocks are as in `quantize`.
        """
        blocks, _ = self.quantize(weight, ggml_type, importance, statistics)
        return blocks
