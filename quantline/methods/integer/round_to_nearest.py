"""Round to nearest in torch; on min-max grids it is what other roundings are compared with."""

import torch

from quantline.methods.integer.clip_search import fit_grids
from quantline.methods.integer.grid import Grid, grouped_linear, nearest_integers, split_groups
from quantline.quantized.tensors import GroupedLinear


def round_to_nearest(
    weight: torch.Tensor, grid: Grid, importance: torch.Tensor | None = None
) -> GroupedLinear:
    """Round a weight to the nearest points of its groups' grids.

    Args:
        weight: float32 [out, in].
        grid: Its group size divides `in`.
        importance: Of the inputs, float32 [in]; with it ranges are clipped (`fit_grids`).

    Returns:
        The rounded weight.
    """
    scales, zeros = fit_grids(weight, grid, importance)
    groups = split_groups(weight, grid)
    integers = nearest_integers(groups, scales[..., None], zeros[..., None], grid)
    return grouped_linear(integers.reshape(weight.shape), scales, zeros, grid)
