"""What a budget chooses from for grouped integers: bits and group size of the linear layers of the blocks."""

import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from quantline.formats.safetensors.container import DTYPES
from quantline.recipes.budget.costs import Costs
from quantline.recipes.layerwise import rounded, solve
from quantline.recipes.layer_report import dense
from quantline.recipes.context import Work
from quantline.errors import Failure, StageError

HEADER = 120  # bytes at most that a safetensors file says of a tensor besides its name
LISTED = 40  # bytes at most that it takes to list a layer in config.json, besides its name, and for larger numbers in the header
GROUP = 400  # bytes at most that config.json takes to describe a grid


class Grids:
    """`budget.Plan` of a recipe of grouped integers. An item is the layers that read one input, since servers fuse those
    (queries, keys and values; gate and up) and want them alike; so are all experts of a block.

    Sizes are those of the layout compressed-tensors.
    """

    def __init__(self, work: Work) -> None:
        self.work, self.items, self.before, self.members = work, {}, {}, {}
        recipe, facts = work.recipe, work.facts
        self.rounding = getattr(recipe, "rounding", recipe.method)
        for layer in range(facts.layers):
            for linears, _ in facts.input_groups(layer):
                name = linears[0] if ".experts." not in linears[0] else re.sub(r"\.experts\..*", ".experts", linears[0])
                self.members.setdefault(name, []).extend(linears)
        for name, linears in self.members.items():
            self.items[name] = [_label(bits, size) for bits, size in self._grids(linears)]
            self.before[name] = _label(recipe.bits, recipe.group_size)
        rounded_ = {f"{linear}.weight" for linears in self.members.values() for linear in linears}
        shapes = {name: (work.checkpoint.shape(name), self._itemsize(name)) for name in work.checkpoint.names}
        self.tensors = sum(int(np.prod(shape)) * size for name, (shape, size) in shapes.items() if name not in rounded_)
        grids = min(len(recipe.budget.bits) * len(recipe.budget.group_sizes), len(self.items))
        self.more = sum(len(name) + LISTED for name in rounded_) + GROUP * grids
        self.around = sum(len(name) + HEADER for name in shapes) + sum(3 * (len(name) + HEADER) for name in rounded_)

    def _itemsize(self, name: str) -> int:
        """The bytes of a number of a tensor, which its scales have too."""
        return np.dtype(DTYPES[self.work.checkpoint.stored_dtype(name)]).itemsize

    def _grids(self, linears: list[str]) -> Iterator[tuple[int, int]]:
        """(bits, group size) that fit all of some layers. Raises StageError(unsupported_width) if there are none."""
        widths = {self.work.checkpoint.shape(f"{name}.weight")[1] for name in linears}
        asked = self.work.recipe.budget.group_sizes
        sizes = [size for size in asked if size == -1 or all(width % size == 0 for width in widths)]
        if not sizes:
            raise StageError(Failure.UNSUPPORTED_WIDTH, "expected group sizes in the budget that divide the rows of "
                             f"{linears[0]}, found {', '.join(map(str, asked))} for {min(widths)} weights; add 32, or -1 for "
                             "whole rows")
        return ((bits, size) for bits in self.work.recipe.budget.bits for size in sizes)

    def size(self, item: str, what: str) -> int:
        bits, size = _grid(what)
        checkpoint, symmetric = self.work.checkpoint, self.work.recipe.symmetric
        return sum(packed_bytes(checkpoint.shape(name), bits, size, symmetric, self._itemsize(name))
                   for name in (f"{linear}.weight" for linear in self.members[item]))

    def costs(self, costs: Costs, layer: int | None) -> dict[str, dict[str, float]]:
        """By the recipe's own rounding, before the inputs are scaled and before the curvature takes off its share."""
        found = {}
        for item, linears in self.members.items():
            if self.work.facts.layer_index(item) == layer:
                each = [self._costs_of(costs, name, self.items[item]) for name in linears]
                found[item] = {what: sum(one[what] for one in each) for what in self.items[item]}
        return found

    def _costs_of(self, costs: Costs, name: str, grids: list[str]) -> dict[str, float]:
        weight, moment, found = self.work.weight(name), self.work.moment(name), {}
        cost, solved = costs.of(f"{name}.weight", weight), solve(self.work.recipe, moment)
        for what in grids:
            bits, size = _grid(what)
            recipe = self.work.recipe.model_copy(update={"bits": bits, "group_size": size})
            found[what] = cost(dense(rounded(name, recipe, weight, moment, None, solved), weight))
        return found

    def chosen(self, choice: dict[str, str]) -> Work:
        grids = {}
        for item, what in choice.items():
            bits, size = _grid(what)
            grids |= {name: {"bits": bits, "group_size": size} for name in self.members[item]}
        return replace(self.work, grids=grids)


def packed_bytes(shape: tuple[int, ...], bits: int, group_size: int, symmetric: bool, scale_bytes: int) -> int:
    """The bytes of a layer of that shape (out, in) in quantline/formats/safetensors/layouts/compressed_tensors.py: words along the inputs, words of
    zero points along the outputs, scales, and the shape.
    """
    rows, columns = shape
    groups = 1 if group_size == -1 else columns // group_size
    words = rows * -(-columns * bits // 32) + (0 if symmetric else -(-rows * bits // 32) * groups)
    return 4 * words + scale_bytes * rows * groups + 16


def _label(bits: int, group_size: int) -> str:
    return f"w{bits}g{group_size}"


def _grid(label: str) -> tuple[int, int]:
    bits, size = label[1:].split("g")
    return int(bits), int(size)
