"""The embedding or the output head in a budget over grids, where a container rounds it."""

from collections.abc import Collection
from dataclasses import replace
from typing import cast

import torch

from quantline.config.recipes import GroupedRecipe
from quantline.methods.integer.output_error import dequantize_like
from quantline.recipes.budget.costs import Costs
from quantline.recipes.budget.grid_labels import grid_label, parse_grid
from quantline.recipes.context import QuantizationContext
from quantline.recipes.embedding_and_head import WEIGHT, recipe_outside, round_outside

OUTSIDE_BITS = (8, 4)  # that embedding_bits has


class OutsideGrids:
    """The grids that one tensor outside of all blocks can have, rounded as `embedding_bits` says.

    Attributes:
        tensor: Its name in the source.
        module: The same without its ending.
        options: The grids to choose from.
        unbudgeted: The recipe's own.
    """

    def __init__(self, ctx: QuantizationContext, tensor: str, bits: Collection[int]) -> None:
        """Find what there is to choose from.

        Args:
            ctx: With a recipe that rounds the tensor (`is_rounded`).
            tensor: The embedding or the head.
            bits: That layers can have. Beside those among OUTSIDE_BITS there are the recipe's own.
        """
        self.ctx = ctx
        self.tensor = tensor
        self.module = tensor.removesuffix(WEIGHT)
        own_bits = cast(int, cast(GroupedRecipe, ctx.recipe).embedding_bits)
        self.unbudgeted = self._label(own_bits)
        offered = [number for number in OUTSIDE_BITS if number in bits or number == own_bits]
        self.options = [self._label(number) for number in offered]

    @staticmethod
    def is_rounded(ctx: QuantizationContext, tensor: str) -> bool:
        """Whether the recipe rounds a tensor outside of all blocks."""
        return recipe_outside(ctx, tensor) is not None

    def _label(self, bits: int) -> str:
        choice = {self.module: {"embedding_bits": bits}}
        recipe = recipe_outside(replace(self.ctx, grids=choice), self.tensor)
        assert recipe is not None, "is_rounded says so"
        return grid_label(bits, cast(int, recipe.group_size))

    def choice(self, option: str) -> dict[str, int]:
        """Return what a chosen grid changes in the recipe of the tensor."""
        return {"embedding_bits": parse_grid(option)[0]}

    @torch.no_grad()
    def costs(self, costs: Costs) -> dict[str, float]:
        """Return grid → what rounding the tensor to it costs."""
        weight = self.ctx.weight(self.module)
        cost = costs.of(self.tensor, weight)
        found = {}
        for option in self.options:
            choice = {self.module: self.choice(option)}
            rounded = round_outside(replace(self.ctx, grids=choice), self.tensor)
            assert rounded is not None, "is_rounded says so"
            found[option] = cost(dequantize_like(rounded[0], weight))
        return found
