"""What a budget chooses from for grouped integers: bits and group size of the linear layers."""

import re
from dataclasses import replace
from typing import Any, cast

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
from quantline.model.same_bits import same_bits
from quantline.recipes.budget.container_sizes import SIZES, ContainerSizes
from quantline.recipes.budget.costs import Costs
from quantline.recipes.budget.grid_labels import grid_label, parse_grid
from quantline.recipes.budget.outside_grids import OutsideGrids
from quantline.recipes.context import QuantizationContext


class GridPlan:
    """The Plan of a recipe of grouped integers.

    An item is the layers that read one input, since servers fuse those (queries, keys and values;
    gate and up) and want them alike; so are all experts of a block. The embedding and the head are
    one each, where the budget's container holds them in integers.
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
        self.sizes: ContainerSizes = SIZES[budget.format](ctx.source)
        self.rounding = recipe.rounding_name
        self.linears = self._group_linears()
        self.options: dict[str, list[str]] = {}
        self.unbudgeted: dict[str, str] = {}
        offered = self.sizes.worthwhile_bits(budget.bits)
        for item, linears in self.linears.items():
            sizes = self._group_sizes(linears)
            self.options[item] = [grid_label(bits, size) for bits in offered for size in sizes]
            alone = cast(GroupedRecipe, ctx.recipe_of(linears[0]))
            self.unbudgeted[item] = grid_label(recipe.bits, cast(int, alone.group_size))
        self.outside = {
            grids.module: grids
            for grids in (OutsideGrids(ctx, name, budget.bits) for name in self._outside(recipe))
        }
        weights = {f"{name}.weight" for names in self.linears.values() for name in names}
        for module, grids in self.outside.items():
            self.options[module] = grids.options
            self.unbudgeted[module] = grids.unbudgeted
            weights.add(grids.tensor)
        others = [name for name in ctx.source.names if name not in weights]
        self.fixed_bytes = sum(self.sizes.other(name) for name in others)
        self.overhead_bytes = self.sizes.overhead(weights)
        grids_at_most = min(len(offered) * len(budget.group_sizes), len(self.options))
        self.extra_overhead_bytes = self.sizes.extra_overhead(weights, grids_at_most)

    def _outside(self, recipe: GroupedRecipe) -> list[str]:
        """Return the tensors outside of all blocks that the container holds in integers."""
        arch = self.ctx.arch
        if not self.sizes.rounds_outside:
            return [arch.head] if recipe.safetensors_head else []
        tensors = dict.fromkeys((arch.embedding, arch.head))
        return [name for name in tensors if OutsideGrids.is_rounded(self.ctx, name)]

    def _group_linears(self) -> dict[str, list[str]]:
        """Return item → its layers, of which several blocks may share one."""
        linears_of_items: dict[str, dict[str, None]] = {}
        for layer in range(self.ctx.arch.layers):
            for group in self.ctx.arch.input_groups(layer):
                item = re.sub(r"\.experts\..*", ".experts", group.linears[0])
                linears_of_items.setdefault(item, {}).update(dict.fromkeys(group.linears))
        return {item: list(linears) for item, linears in linears_of_items.items()}

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
        if item in self.outside:
            return self.sizes.layer(self.outside[item].tensor, option, symmetric=True)
        total = 0
        for linear in self.linears[item]:
            symmetric = cast(GroupedRecipe, self.ctx.recipe_of(linear)).symmetric is True
            total += self.sizes.layer(f"{linear}.weight", option, symmetric)
        return total

    @same_bits()
    def costs(self, costs: Costs, layer: int | None) -> dict[str, dict[str, float]]:
        """Return item → grid → cost.

        Layers are rounded as the recipe does it, before their inputs are scaled and before
        curvature rounding lowers the cost.
        """
        costs_of_items = {}
        if layer is None:
            for module, grids in self.outside.items():
                costs_of_items[module] = grids.costs(costs)
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
            if item in self.outside:
                grids[item] = self.outside[item].choice(option)
                continue
            bits, group_size = parse_grid(option)
            for name in self.linears[item]:
                grids[name] = {"bits": bits, "group_size": group_size}
        return replace(self.ctx, grids=grids)
