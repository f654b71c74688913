"""The output head in a budget over grids: its bits, where safetensors hold it in integers."""

from collections.abc import Collection
from dataclasses import replace
from typing import cast

import torch

from quantline.config.recipes import GroupedRecipe
from quantline.methods.integer.output_error import dequantize_like
from quantline.recipes.budget.costs import Costs
from quantline.recipes.context import QuantizationContext
from quantline.recipes.embedding_and_head import recipe_outside, round_outside

HEAD_BITS = (8, 4)  # that embedding_bits has


class HeadGrids:
    """The grids that a head can have, which is rounded as `embedding_bits` says.

    Attributes:
        module: The head's name.
        own_bits: Those of the recipe.
        group_sizes: Bits → group size, of the recipe's bits and of all that there are to choose.
        offered: The bits to choose from.
    """

    def __init__(self, ctx: QuantizationContext, bits: Collection[int]) -> None:
        """Find what there is to choose from.

        Args:
            ctx: With a recipe whose `safetensors_head` is set.
            bits: That layers can have. If none of them is for a head, it keeps the recipe's.
        """
        self.ctx = ctx
        self.module = ctx.arch.head.removesuffix(".weight")
        self.own_bits = cast(int, cast(GroupedRecipe, ctx.recipe).embedding_bits)
        self.offered = [number for number in HEAD_BITS if number in bits] or [self.own_bits]
        self.group_sizes = {
            number: self._group_size(number) for number in {self.own_bits, *self.offered}
        }

    def _with(self, bits: int) -> QuantizationContext:
        """Return the context in which the head has some bits."""
        return replace(self.ctx, grids={self.module: {"embedding_bits": bits}})

    def _group_size(self, bits: int) -> int:
        recipe = recipe_outside(self._with(bits), self.ctx.arch.head)
        assert recipe is not None, "rounded_head.check_head refuses what no group divides"
        return cast(int, recipe.group_size)

    @torch.no_grad()
    def costs(self, costs: Costs) -> dict[int, float]:
        """Return bits → what rounding the head to them costs."""
        name = self.ctx.arch.head
        weight = self.ctx.weight(self.module)
        cost = costs.of(name, weight)
        rounded = {bits: round_outside(self._with(bits), name) for bits in self.offered}
        return {bits: cost(dequantize_like(one[0], weight)) for bits, one in rounded.items() if one}
