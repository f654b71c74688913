"""What every driver works with: the recipe, the model, its calibration, and where results go."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from quantline.calibration.store import CalibrationStore
from quantline.config.recipes import GroupedRecipe, Recipe
from quantline.methods.method import LayerStatistics, load_method
from quantline.model.architecture import Architecture
from quantline.model.tensor_source import TensorSource
from quantline.quantized.source_codes import SourceCodes
from quantline.quantized.store import QuantizedWriter

if TYPE_CHECKING:
    import torch

    from quantline.recipes.tensor_types import TensorTypes


@dataclass(frozen=True)
class QuantizationContext:
    """What every driver works with.

    Torch is imported by what returns its tensors alone: k-quants do without it.

    Attributes:
        recipe: The options of the method.
        source: The unquantized model.
        arch: Its sizes and names.
        calibration: Its statistics.
        writer: Takes what was quantized.
        grids: Layer → the options, such as bits and group size, that a budget chose for it.
    """

    recipe: Recipe
    source: TensorSource
    arch: Architecture
    calibration: CalibrationStore
    writer: QuantizedWriter
    grids: dict[str, dict[str, Any]] = field(default_factory=dict)

    def recipe_of(self, layer: str) -> Recipe:
        """Return the recipe with the grid of a layer, in which nothing is `auto`."""
        recipe = self.recipe.model_copy(update=self.grids.get(layer))
        if not isinstance(recipe, GroupedRecipe):
            return recipe
        if layer in self._widths_of_experts:
            return recipe.for_layer(self._widths_of_experts.values(), of_expert=True)
        return recipe.for_layer([self._width(layer)])

    @cached_property
    def _widths_of_experts(self) -> dict[str, int]:
        """Layer → its inputs, of all experts: they share a grid, as servers have one for them."""
        return {name: self._width(name) for name in self.arch.expert_linears()}

    def _width(self, layer: str) -> int:
        """Return the number of a layer's inputs."""
        return self.source.shape(f"{layer}.weight")[1]

    def method_of(self, layer: str) -> Any:
        """Return the method with the grid of a layer."""
        return load_method(self.recipe_of(layer))

    @cached_property
    def source_codes(self) -> SourceCodes:
        """The codes of a quantized source, which are handed on where the type is theirs."""
        return SourceCodes(self.source.folder)

    @cached_property
    def tensor_types(self) -> "TensorTypes":
        """The type and the importance of each tensor, for a recipe in ggml's blocks."""
        from quantline.recipes.tensor_types import TensorTypes

        return TensorTypes(self.recipe, self.source, self.arch, self.calibration)

    def on_device(self, values: np.ndarray) -> "torch.Tensor":
        """Return a tensor on the device that rounds: the GPU, if there is one."""
        import torch

        from quantline.model.device import device

        return torch.from_numpy(values).to(device())

    def weight(self, layer: str) -> "torch.Tensor":
        """Return W float32 [out, in] of a layer."""
        return self.on_device(self.source.tensor(f"{layer}.weight"))

    def moments(self, layer: str) -> np.ndarray:
        """Return H float32 [in, in] of a layer, shrunk as the recipe says.

        Raises as CalibrationStore.hessian does.
        """
        return self.calibration.hessian(layer, self.recipe.hessian_shrinkage)

    def hessian(self, layer: str) -> "torch.Tensor":
        """Return `moments` on the device that rounds."""
        return self.on_device(self.moments(layer))

    def fisher_out(self, layer: str) -> "torch.Tensor | None":
        """Return how much errors of a layer's outputs matter, as far as the recipe looks at it.

        Returns:
            G float32 [blocks, n, n]; its diagonal [out, 1, 1] for a recipe that looks at that
            alone, if the calibration has gradients; otherwise None.

        Raises:
            StageError: calibration_empty, if the recipe needs gradients that were not collected.
        """
        if self.recipe.output_statistics == "full":
            return self.on_device(self.calibration.fisher_out(layer))
        if self.recipe.output_statistics == "diagonal" and self.calibration.has_gradients:
            return self.output_importance(layer)[:, None, None]
        return None

    def output_importance(self, layer: str) -> "torch.Tensor":
        """Return how much each output of a layer matters, float32 [out].

        It is the diagonal of G, or 1 if the calibration has no gradients.
        """
        if not self.calibration.has_gradients:
            outputs = self.source.shape(f"{layer}.weight")[0]
            return self.on_device(np.ones(outputs, np.float32))
        return self.on_device(self.calibration.output_importance(layer))

    def statistics(self, layer: str, hessian: "torch.Tensor") -> LayerStatistics:
        """Return what the calibration knows about a layer.

        Args:
            layer: The module's name.
            hessian: Its H [in, in], which layers that read one input share.
        """
        return replace(
            self.statistics_without_fisher(layer, hessian), fisher_out=self.fisher_out(layer)
        )

    def statistics_without_fisher(self, layer: str, hessian: "torch.Tensor") -> LayerStatistics:
        """Return the same without reading G, for what does not look at it."""
        return LayerStatistics(
            layer,
            hessian,
            read_input_peak=lambda: self.on_device(self.calibration.input_peak(layer)),
            read_input_sample=lambda: self.on_device(self.calibration.input_sample(layer)),
            read_output_importance=lambda: self.output_importance(layer),
        )
