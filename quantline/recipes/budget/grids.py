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
    safetensors hold it in integers. Sizes are those of the layout
    compressed-tensors.
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
            sizes_of_head = self.head.group_sizes
            item = self.head.module
            self.options[item] = [
                grid_label(bits, sizes_of_head[bits]) for bits in self.head.offered
            ]
            self.unbudgeted[item] = grid_label(
                self.head.own_bits, sizes_of_head[self.head.own_bits]
            )
            weights.add(f"{item}.weight")
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
        bits, group_size = parse_grid(option)
        if self.head and item == self.head.module:
            name = f"{item}.weight"
            shape = self.ctx.source.shape(name)
            return packed_bytes(shape, bits, group_size, True, self._bytes_per_number(name))
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
            costs_of_items[self.head.module] = {
                grid_label(bits, self.head.group_sizes[bits]): cost
                for bits, cost in self.head.costs(costs).items()
            }
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
            bits, group_size = parse_grid(option)
            if self.head and item == self.head.module:
                grids[item] = {"embedding_bits": bits}
                continue
            for name in self.linears[item]:
                grids[name] = {"bits": bits, "group_size": group_size}
        return replace(self.ctx, grids=grids)


def packed_bytes(
    shape: tuple[int, ...], bits: int, group_size: int, symmetric: bool, scale_bytes: int
) -> int:
    """Return the bytes of a layer in the layout compressed-tensors.

    Those are words along the inputs, words of zero points along the outputs, scales, and the shape
    (quantline/formats/safetensors/layouts/compressed_tensors.py).

    Args:
        shape: (out, in).
        bits: Of a weight.
        group_size: Of the grid; -1 is the whole row.
        symmetric: Whether there are no zero points.
        scale_bytes: Bytes of a scale.
    """
    rows, columns = shape
    groups = 1 if group_size == -1 else columns // group_size
    words = rows * -(-columns * bits // 32)
    if not symmetric:
        words += -(-rows * bits // 32) * groups
    return 4 * words + scale_bytes * rows * groups + 16


def grid_label(bits: int, group_size: int) -> str:
    """Return what the report calls a grid, such as w4g128."""
    return f"w{bits}g{group_size}"


def parse_grid(label: str) -> tuple[int, int]:
    """Return bits and group size of what `grid_label` returned."""
    bits, group_size = label.removeprefix("w").split("g")
    return int(bits), int(group_size)
