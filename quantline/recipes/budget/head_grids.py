"""The output head in a budget over grids: its bits, where safetensors hold it in integers."""

from collections.abc import Collection
from dataclasses import replace
from typing import cast

import torch

from quantline.config.recipes import GroupedRecipe
from quantline.methods.integer.output_error import dequantize_like
from quantline.recipes.budget.costs import Costs
from quantline.recipes.budget.grid_labels import grid_label, packed_bytes, parse_grid
from quantline.recipes.context import QuantizationContext
from quantline.recipes.embedding_and_head import recipe_outside, round_outside

HEAD_BITS = (8, 4)  # that embedding_bits has


class HeadGrids:
    """The grids that a head can have, which is rounded as `embedding_bits` says.

    Attributes:
        module: The head's name.
        options: The grids to choose from.
        unbudgeted: The recipe's own.
    """

    def __init__(self, ctx: QuantizationContext, bits: Collection[int]) -> None:
        """Find what there is to choose from.

        Args:
            ctx: With a recipe whose `safetensors_head` is set.
            bits: That layers can have. If none of them is for a head, it keeps the recipe's.
        """
        self.ctx = ctx
        self.module = ctx.arch.head.removesuffix(".weight")
        own_bits = cast(int, cast(GroupedRecipe, ctx.recipe).embedding_bits)
        self.unbudgeted = self._label(own_bits)
        offered = [number for number in HEAD_BITS if number in bits]
        self.options = [self._label(number) for number in offered or [own_bits]]

    def _label(self, bits: int) -> str:
        choice = {self.module: {"embedding_bits": bits}}
        recipe = recipe_outside(replace(self.ctx, grids=choice), self.ctx.arch.head)
        assert recipe is not None, "rounded_head.check_head refuses what no group divides"
        return grid_label(bits, cast(int, recipe.group_size))

    def choice(self, option: str) -> dict[str, int]:
        """Return what a chosen grid changes in the recipe of the head."""
        return {"embedding_bits": parse_grid(option)[0]}

    def size(self, option: str, scale_bytes: int) -> int:
        """Return the bytes that the head takes on a grid; `scale_bytes` are those of a scale."""
        bits, group_size = parse_grid(option)
        shape = self.ctx.source.shape(self.ctx.arch.head)
        return packed_bytes(shape, bits, group_size, symmetric=True, scale_bytes=scale_bytes)

    @torch.no_grad()
    def costs(self, costs: Costs) -> dict[str, float]:
        """Return grid → what rounding the head to it costs."""
        name = self.ctx.arch.head
        weight = self.ctx.weight(self.module)
        cost = costs.of(name, weight)
        found = {}
        for option in self.options:
            choice = {self.module: self.choice(option)}
            rounded = round_outside(replace(self.ctx, grids=choice), name)
            assert rounded is not None, "rounded_head.check_head refuses other heads"
            found[option] = cost(dequantize_like(rounded[0], weight))
        return found
