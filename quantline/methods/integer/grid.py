"""The grid that a group of weights is rounded to: scale and zero point, and the nearest integer.

A group is `group_size` neighbouring inputs of one output. Integer q stands for (q - zero) * scale.
"""

from dataclasses import dataclass

import torch

from quantline.config.recipes import AUTO, WHOLE_ROW, GroupedRecipe
from quantline.errors import Failure, StageError
from quantline.methods.integer.rtn_numpy import SMALLEST_SCALE
from quantline.quantized.tensors import GroupedLinear


@dataclass(frozen=True)
class Grid:
    """What the groups of one layer have in common.

    Attributes:
        bits: Of an integer.
        group_size: Weights that share a scale.
        symmetric: Whether the zero point is fixed in the middle.
    """

    bits: int
    group_size: int
    symmetric: bool

    @property
    def max_int(self) -> int:
        """The largest integer; the smallest is 0."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid."""
        return 2 ** (self.bits - 1)


def grid_for(layer: str, recipe: GroupedRecipe, width: int) -> Grid:
    """Return the grid that a recipe asks for.

    Args:
        layer: The module's name, for messages.
        recipe: Its group size -1 is the whole row; `auto` is that of a layer on its own.
        width: Inputs of the layer.

    Raises:
        StageError: unsupported_width, if the group size does not divide the width.
    """
    on_layer = recipe.for_layer((width,))
    assert on_layer.group_size != AUTO, "for_layer leaves numbers alone"
    assert on_layer.symmetric != AUTO, "for_layer leaves numbers alone"
    size = width if on_layer.group_size == WHOLE_ROW else on_layer.group_size
    if width % size:
        fitting = [str(other) for other in (128, 64, 32) if width % other == 0]
        choices = ", ".join(fitting) if fitting else "-1 (the whole row)"
        raise StageError(
            Failure.UNSUPPORTED_WIDTH,
            f"{layer} has rows of {width} weights, which groups of {size} do not divide; "
            f"group_size can be {choices} here, or auto",
        )
    return Grid(recipe.bits, size, on_layer.symmetric)


def split_groups(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return the groups [out, groups, group size] of a weight [out, in]."""
    return weight.reshape(len(weight), -1, grid.group_size)


def group_range(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the least and the greatest weight of groups [..., group size], each [..., 1].

    A range that does not hold 0 is widened to 0, which is always a point of the grid.
    """
    low = groups.amin(-1, keepdim=True).clamp(max=0)
    high = groups.amax(-1, keepdim=True).clamp(min=0)
    return low, high


def fit_range(
    low: torch.Tensor, high: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales and zero points of grids over ranges.

    Scales are rounded to bfloat16, so that every container can carry them exactly; integers are
    chosen on the rounded scale.

    Args:
        low: Where the ranges begin, at most 0, of any shape.
        high: Where they end, at least 0, of the same shape.
        grid: Bits and symmetry.
    """
    if grid.symmetric:
        half = grid.middle
        scale = torch.maximum(-low / half, high / (half - 1)).clamp(min=SMALLEST_SCALE)
        return scale.bfloat16().float(), torch.full_like(scale, half)
    scale = ((high - low) / grid.max_int).clamp(min=SMALLEST_SCALE).bfloat16().float()
    return scale, (-low / scale).round().clamp(0, grid.max_int)


def nearest_integers(
    weights: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """Return the integers nearest to weights, as floats; the shapes broadcast."""
    return ((weights / scale).round() + zero).clamp(0, grid.max_int)


def grouped_linear(
    integers: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, grid: Grid
) -> GroupedLinear:
    """Return the canonical form of a rounded weight.

    Args:
        integers: [out, in], whole numbers of any dtype.
        scales: float32 [out, groups].
        zeros: [out, groups], whole numbers of any dtype.
        grid: That they are on.
    """
    return GroupedLinear(
        integers.to(torch.uint8).cpu().numpy(),
        scales.contiguous().cpu().numpy(),
        zeros.to(torch.uint8).cpu().numpy(),
        grid.bits,
        grid.group_size,
        grid.symmetric,
    )
