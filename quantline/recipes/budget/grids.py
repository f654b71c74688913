"""What a budget chooses from for grouped integers: bits and group size of the linear layers."""

import re
from dataclasses import replace
from typing import Any, cast

import numpy as np

from quantline.config.recipes import (
    AUTO,
    WHOLE_ROW,
    GridBudget,
    GroupedRecipe,
    largest_group,
)
from quantline.errors import Failure, StageError
from quantline.methods.integer.output_error import dequantize_like
from quantline.methods.method import LayerStatistics, load_method
from quantline.model.dtypes import NUMPY_DTYPES
from quantline.model.same_bits import same_bits
from quantline.recipes.budget.costs import Costs
from quantline.recipes.budget.grid_labels import grid_label, packed_bytes, parse_grid
from quantline.recipes.budget.head_grids import HeadGrids
from quantline.recipes.context import QuantizationContext

# Bytes at most, besides the name: of a tensor in the header of a safetensors file; of a layer that
# is listed in config.json, with larger numbers in the header; of a grid in config.json.
HEADER_BYTES = 120
LISTED_BYTES = 40
GRID_BYTES = 400


class GridPlan:
    """The Plan of a recipe of grouped integers.

    An item is the layers that read one input, since servers fuse those (queries, keys and values;
    gate and up) and want them alike; so are all experts of a block. A head is one, where
    safetensors hold it in integers. Sizes are those of the layout compressed-tensors.
    """

    def __init__(self, ctx: QuantizationContext, requested: dict[str, Any]) -> None:
        """List the options of every item, and estimate the rest of the files.

        Args:
            ctx: With the recipe and its budget.
            requested: The recipe with its name, which these files do not hold.

        Raises:
            StageError: unsupported_width, if no group size divides the rows of a layer.
        """
        self.ctx = ctx
        recipe = cast(GroupedRecipe, ctx.recipe)
        budget = cast(GridBudget, recipe.budget)
        self.budget = budget
        self.rounding = recipe.rounding_name
        self.linears = self._group_linears()
        self.options: dict[str, list[str]] = {}
        self.unbudgeted: dict[str, str] = {}
        for item, linears in self.linears.items():
            sizes = self._group_sizes(linears)
            self.options[item] = [grid_label(bits, size) for bits in budget.bits for size in sizes]
            alone = cast(GroupedRecipe, ctx.recipe_of(linears[0]))
            self.unbudgeted[item] = grid_label(recipe.bits, cast(int, alone.group_size))
        self.head = HeadGrids(ctx, budget.bits) if recipe.safetensors_head else None
        weights = {f"{name}.weight" for names in self.linears.values() for name in names}
        if self.head:
            self.options[self.head.module] = self.head.options
            self.unbudgeted[self.head.module] = self.head.unbudgeted
            weights.add(ctx.arch.head)
        names = ctx.source.names
        self.fixed_bytes = sum(self._bytes(name) for name in names if name not in weights)
        grids = min(len(budget.bits) * len(budget.group_sizes), len(self.options))
        self.extra_overhead_bytes = GRID_BYTES * grids
        self.extra_overhead_bytes += sum(len(name) + LISTED_BYTES for name in weights)
        self.overhead_bytes = sum(len(name) + HEADER_BYTES for name in names)
        self.overhead_bytes += sum(3 * (len(name) + HEADER_BYTES) for name in weights)

    def _group_linears(self) -> dict[str, list[str]]:
        """Return item → its layers."""
        linears_of_items: dict[str, list[str]] = {}
        for layer in range(self.ctx.arch.layers):
            for group in self.ctx.arch.input_groups(layer):
                item = re.sub(r"\.experts\..*", ".experts", group.linears[0])
                linears_of_items.setdefault(item, []).extend(group.linears)
        return linears_of_items

    def _bytes_per_number(self, name: str) -> int:
        """Return the bytes of a number of a source tensor, which its scales have too."""
        return NUMPY_DTYPES[self.ctx.source.stored_dtype(name)].itemsize

    def _bytes(self, name: str) -> int:
        """Return the bytes of a source tensor."""
        return int(np.prod(self.ctx.source.shape(name))) * self._bytes_per_number(name)

    def _group_sizes(self, linears: list[str]) -> list[int]:
        """Return the group sizes of the budget that fit all of some layers.

        Raises:
            StageError: unsupported_width, if there are none.
        """
        widths = {self.ctx.source.shape(f"{name}.weight")[1] for name in linears}
        sizes: list[int] = []
        for size in self.budget.group_sizes:
            if size == -1 or all(width % size == 0 for width in widths):
                sizes.append(size)
        is_auto = cast(GroupedRecipe, self.ctx.recipe).group_size == AUTO
        if not sizes and is_auto and largest_group(widths) == WHOLE_ROW:
            sizes.append(WHOLE_ROW)
        if not sizes:
            given = ", ".join(map(str, self.budget.group_sizes))
            raise StageError(
                Failure.UNSUPPORTED_WIDTH,
                f"expected group sizes in the budget that divide the rows of {linears[0]}, found "
                f"{given} for {min(widths)} weights; add 32, or -1 for whole rows",
            )
        return sizes

    def size(self, item: str, option: str) -> int:
        """Return the bytes that the layers of an item take on a grid."""
        if self.head and item == self.head.module:
            return self.head.size(option, self._bytes_per_number(self.ctx.arch.head))
        bits, group_size = parse_grid(option)
        total = 0
        for linear in self.linears[item]:
            name = f"{linear}.weight"
            shape = self.ctx.source.shape(name)
            scale_bytes = self._bytes_per_number(name)
            symmetric = cast(GroupedRecipe, self.ctx.recipe_of(linear)).symmetric is True
            total += packed_bytes(shape, bits, group_size, symmetric, scale_bytes)
        return total

    @same_bits()
    def costs(self, costs: Costs, layer: int | None) -> dict[str, dict[str, float]]:
        """Return item → grid → cost.

        Layers are rounded as the recipe does it, before their inputs are scaled and before
        curvature rounding lowers the cost.
        """
        costs_of_items = {}
        if self.head and layer is None:
            costs_of_items[self.head.module] = self.head.costs(costs)
        for item, linears in self.linears.items():
            if self.ctx.arch.layer_index(item) != layer:
                continue
            options = self.options[item]
            of_layers = [self._costs_of(costs, name, options) for name in linears]
            costs_of_items[item] = {
                option: sum(of_layer[option] for of_layer in of_layers) for option in options
            }
        return costs_of_items

    def _costs_of(self, costs: Costs, layer: str, options: list[str]) -> dict[str, float]:
        """Return grid → cost of one layer."""
        weight = self.ctx.weight(layer)
        statistics = LayerStatistics(layer, self.ctx.hessian(layer))
        cost = costs.of(f"{layer}.weight", weight)
        prepared = load_method(self.ctx.recipe).prepare(statistics.hessian)
        costs_of_grids = {}
        for option in options:
            bits, group_size = parse_grid(option)
            grid = {"bits": bits, "group_size": group_size}
            recipe = self.ctx.recipe_of(layer).model_copy(update=grid)
            linear = load_method(recipe).quantize(weight, statistics, prepared)
            costs_of_grids[option] = cost(dequantize_like(linear, weight))
        return costs_of_grids

    def context_for(self, choice: dict[str, str]) -> QuantizationContext:
        """Return the context with the chosen grid for every layer."""
        grids: dict[str, dict[str, Any]] = {}
        for item, option in choice.items():
            if self.head and item == self.head.module:
                grids[item] = self.head.choice(option)
                continue
            bits, group_size = parse_grid(option)
            for name in self.linears[item]:
                grids[name] = {"bits": bits, "group_size": group_size}
        return replace(self.ctx, grids=grids)
