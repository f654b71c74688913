"""What a budget chooses from in GGUF: ggml's type of each tensor of the file."""

from dataclasses import replace
from re import escape
from typing import Any, Protocol, cast

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from quantline.config.ggml_recipes import CodecTypeBudget, TypeBudget
from quantline.formats.gguf.container import header_bytes, padded_size
from quantline.methods.ggml import mixes
from quantline.methods.ggml.block_types import dequantize_blocks
from quantline.methods.ggml.method import BlockMethod
from quantline.methods.ggml.quantize import NEEDS_IMPORTANCE
from quantline.methods.method import LayerStatistics, load_method
from quantline.model.same_bits import same_bits
from quantline.recipes.budget.costs import Costs, has_cost
from quantline.recipes.context import QuantizationContext
from quantline.recipes.ggml_curvature import layer_statistics
from quantline.recipes.tensor_types import MixRecipe


class BudgetedRecipe(MixRecipe, Protocol):
    """A recipe in ggml's blocks with a budget (see GgmlRecipe)."""

    @property
    def budget(self) -> TypeBudget | CodecTypeBudget:
        """The types that a tensor can have, and the limit."""


class TypePlan:
    """The Plan of a recipe in ggml's blocks.

    An item is a matrix of the file: all experts of a block are one. A tensor without a cost, or
    that an override names, keeps the type that the recipe gives it.
    """

    def __init__(self, ctx: QuantizationContext, requested: dict[str, Any]) -> None:
        """List the options of every matrix, and measure the rest of the file.

        Args:
            ctx: With the recipe and its budget.
            requested: The recipe with its name, as the report says it.
        """
        self.ctx = ctx
        self.recipe = cast(BudgetedRecipe, ctx.recipe)
        self.tensor_types = ctx.tensor_types
        self.method: BlockMethod[Any] = load_method(ctx.recipe)
        self.rounding = self.method.preview_rounding
        self.options: dict[str, list[str]] = {}
        self.unbudgeted: dict[str, str] = {}
        self.fixed_bytes = 0
        for gguf_name, names in self.tensor_types.groups.items():
            _, ggml_type = self.tensor_types.types(names[0])
            if self._is_fixed(gguf_name, names):
                self.fixed_bytes += padded_size(self._bytes(names, ggml_type))
            else:
                self.options[gguf_name] = self._types(names[0])
                self.unbudgeted[gguf_name] = ggml_type
        self.overhead_bytes = self._header_bytes(requested)
        # Whatever a recipe without a budget is called, its file has no shorter name.
        unbudgeted = requested | {"budget": None, "name": "a"}
        self.extra_overhead_bytes = self.overhead_bytes - self._header_bytes(unbudgeted)

    def _is_fixed(self, gguf_name: str, names: list[str]) -> bool:
        """Whether a tensor of the file keeps its type."""
        if not self.tensor_types.is_quantized(gguf_name):
            return True
        if self.tensor_types.is_overridden(gguf_name):
            return True
        return not all(has_cost(self.ctx, name) for name in names)

    def _header_bytes(self, recipe: dict[str, Any]) -> int:
        report = {
            "calibration": self.ctx.calibration.provenance(),
            "importance": self.tensor_types.importance_summary(),
            "recipe": recipe,
        }
        return header_bytes(self.ctx.source, report)

    def _types(self, name: str) -> list[str]:
        """Return the types of the budget that a tensor's rows allow, sorted."""
        width = self.ctx.source.shape(name)[-1]
        types = set()
        for ggml_type in self.recipe.budget.types:
            fitting = mixes.fit_width(ggml_type, width)
            if fitting in NEEDS_IMPORTANCE:
                importance, _ = self.tensor_types.importance(name, fitting)
                if importance is None:
                    continue
            types.add(fitting)
        return sorted(types)

    def _bytes(self, names: list[str], ggml_type: str) -> int:
        """Return the bytes of a tensor of the file that consists of these."""
        block_size, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[ggml_type]]
        weights = len(names) * int(np.prod(self.ctx.source.shape(names[0])))
        return weights // block_size * block_bytes

    def size(self, item: str, option: str) -> int:
        """Return the bytes that a tensor of the file takes as a type."""
        return padded_size(self._bytes(self.tensor_types.groups[item], option))

    @same_bits()
    def costs(self, costs: Costs, layer: int | None) -> dict[str, dict[str, float]]:
        """Return tensor of the file → type → cost, by the method's preview."""
        costs_of_items = {}
        for gguf_name, ggml_types in self.options.items():
            names = self.tensor_types.groups[gguf_name]
            if self.ctx.arch.layer_index(names[0]) != layer:
                continue
            of_tensors = [self._costs_of(costs, name, ggml_types) for name in names]
            costs_of_items[gguf_name] = {
                ggml_type: sum(of_tensor[ggml_type] for of_tensor in of_tensors)
                for ggml_type in ggml_types
            }
        return costs_of_items

    def _costs_of(self, costs: Costs, name: str, ggml_types: list[str]) -> dict[str, float]:
        """Return type → cost of one source tensor."""
        weight = self.ctx.source.tensor(name)
        cost = costs.of(name, self.ctx.on_device(weight))
        statistics = self._statistics(name)
        costs_of_types = {}
        for ggml_type in ggml_types:
            importance, _ = self.tensor_types.importance(name, ggml_type)
            in_floats = ggml_type in mixes.FLOAT_TYPES
            blocks = self.method.preview(
                weight, ggml_type, importance, None if in_floats else statistics
            )
            stored = dequantize_blocks(blocks, ggml_type)
            costs_of_types[ggml_type] = cost(self.ctx.on_device(stored))
        return costs_of_types

    def _statistics(self, name: str) -> LayerStatistics | None:
        """Return what a method that looks at output gradients needs of a calibrated layer."""
        layer = name.removesuffix(".weight")
        if self.ctx.recipe.output_statistics != "full" or layer not in self.ctx.calibration.layers:
            return None
        return layer_statistics(self.ctx, layer)

    def context_for(self, choice: dict[str, str]) -> QuantizationContext:
        """Return the context of the recipe with the chosen types as its first overrides."""
        overrides = {f"^{escape(gguf_name)}$": option for gguf_name, option in choice.items()}
        overrides |= self.recipe.overrides
        recipe = self.ctx.recipe.model_copy(update={"overrides": overrides})
        return replace(self.ctx, recipe=recipe)
