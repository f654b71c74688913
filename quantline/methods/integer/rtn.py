"""Round to nearest; on a min-max grid this is the naive method that the others are held against."""

import torch

from quantline.quantized.store import GroupedLinear
from quantline.methods.integer.grid import canonical, grid_of, round_to


def quantize(weight: torch.Tensor, bits: int, group_size: int, symmetric: bool,
             importance: torch.Tensor | None = None) -> GroupedLinear:
    """A weight [out, in] rounded to its groups' grids; with `importance` [in] their spans are chosen by it."""
    scales, zeros = grid_of(weight, bits, group_size, symmetric, importance)
    grouped = weight.reshape(len(weight), -1, group_size)
    integers = round_to(grouped, scales[..., None], zeros[..., None], bits).reshape(weight.shape)
    return canonical(integers, scales, zeros, bits, group_size, symmetric)
