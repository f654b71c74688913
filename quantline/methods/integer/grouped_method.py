"""What the methods of grouped integers have in common."""

from abc import abstractmethod
from typing import TypeVar

import torch

from quantline.config.recipes import GroupedRecipe
from quantline.methods.integer import curvature
from quantline.methods.integer.grid import Grid, grid_for
from quantline.methods.integer.round_to_nearest import round_to_nearest
from quantline.methods.method import LayerStatistics, Method, PreparedType, check_finite
from quantline.quantized.tensors import GroupedLinear

GroupedRecipeType = TypeVar("GroupedRecipeType", bound=GroupedRecipe)


class GroupedMethod(Method[GroupedRecipeType, PreparedType]):
    """A method that rounds to integers in groups.

    `quantize` rounds a weight by `round`, which each method has. If the recipe wants it, curvature
    rounding follows; otherwise the method's own `improve`, if there is one.
    """

    @abstractmethod
    def round(
        self,
        weight: torch.Tensor,
        hessian: torch.Tensor,
        grid: Grid,
        prepared: PreparedType | None,
    ) -> GroupedLinear:
        """Round a weight float32 [out, in] with H [in, in] and what `prepare` made of it."""

    def improve(
        self,
        linear: GroupedLinear,
        weight: torch.Tensor,
        hessian: torch.Tensor,
        prepared: PreparedType | None,
    ) -> GroupedLinear:
        """Return a rounded weight with less Δ H Δᵀ in its rows, or as it is."""
        return linear

    def quantize(
        self, weight: torch.Tensor, statistics: LayerStatistics, prepared: PreparedType | None
    ) -> GroupedLinear:
        """Quantize one linear weight; see Method.quantize."""
        check_finite(statistics.layer, weight)
        grid = grid_for(statistics.layer, self.recipe, weight.shape[1])
        hessian = statistics.hessian
        linear = self.round(weight, hessian, grid, prepared)
        if self.recipe.curvature and statistics.fisher_out is not None:
            return curvature.refine(linear, weight, hessian, statistics.fisher_out)
        return self.improve(linear, weight, hessian, prepared)

    def quantize_baseline(self, layer: str, weight: torch.Tensor) -> GroupedLinear:
        """Round a weight to nearest on the min-max grids of the recipe."""
        return round_to_nearest(weight, grid_for(layer, self.recipe, weight.shape[1]))
