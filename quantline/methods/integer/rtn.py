"""Round to nearest as a method of its own."""

import torch

from quantline.methods.integer.grid import Grid
from quantline.methods.integer.grouped_method import GroupedMethod
from quantline.methods.integer.round_to_nearest import round_to_nearest
from quantline.methods.method import Prepared
from quantline.methods.rtn import RtnRecipe
from quantline.quantized.tensors import GroupedLinear


class Rtn(GroupedMethod[RtnRecipe, Prepared]):
    """Rounds every weight to the nearest point of its group's grid."""

    def round(
        self,
        weight: torch.Tensor,
        hessian: torch.Tensor,
        grid: Grid,
        prepared: Prepared | None,
    ) -> GroupedLinear:
        """Round a weight; ranges are clipped by diag(H) if the recipe has weighted scales."""
        importance = hessian.diagonal() if self.recipe.scales == "weighted" else None
        return round_to_nearest(weight, grid, importance)
