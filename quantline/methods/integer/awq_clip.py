"""The clipping search of AWQ (Lin et al. 2023, section 3.3), judged by the layer's output error.

The authors clip each group by the error of that group's own product. Groups change each other's
errors through the correlations of their inputs, so here one group after another takes the range
that leaves the least Δ H Δᵀ given all others as they stand.
"""

import numba
import numpy as np
import torch

from quantline.methods.integer.clip_search import best_grid
from quantline.methods.integer.grid import (
    Grid,
    fit_range,
    group_range,
    grouped_linear,
    nearest_integers,
    split_groups,
)
from quantline.methods.integer.output_error import replace_rows
from quantline.methods.threads import run_over_rows
from quantline.quantized.tensors import GroupedLinear

# Shares of a group's least and of its greatest weight that a range may be clipped to.
CLIP_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
SWEEPS = 2  # over the groups


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
def _choose_clips(
    weights: np.ndarray,
    current: np.ndarray,
    gradients: np.ndarray,
    hessian: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray,
    max_int: np.float32,
    chosen: np.ndarray,
) -> None:
    """Choose for each row the grid that lowers 2 · gradient · m + m · H · m most, m its move.

    Grids are ranked by the diagonal of H, and the first is judged by all of it: judging four of
    them gave the same divergence (benchmarks/small_models.md).

    Args:
        weights: What is to be rounded, float32 [rows, group size].
        current: What stands there now, float32 [rows, group size].
        gradients: Δ H, float32 [rows, group size].
        hessian: H of the group's inputs, float32 [group size, group size].
        scales: Of the grids, float32 [rows, grids].
        zeros: Of the grids, float32 [rows, grids].
        max_int: The largest integer, float32.
        chosen: Takes the number of each row's grid, or -1 where none lowers the error, int64.
    """
    rows, width = weights.shape
    move = np.empty(width, np.float32)
    diagonal = np.empty(width, np.float32)
    for j in range(width):
        diagonal[j] = hessian[j, j]
    for row in range(rows):
        best = best_grid(
            weights[row], current[row], gradients[row], diagonal, scales[row], zeros[row], max_int
        )
        scale = scales[row, best]
        zero = zeros[row, best]
        cost = np.float32(0)
        for j in range(width):
            integer = min(max(np.rint(weights[row, j] / scale) + zero, np.float32(0)), max_int)
            move[j] = (integer - zero) * scale - current[row, j]
        for j in range(width):
            product = np.float32(0)
            for k in range(width):
                product += hessian[j, k] * move[k]
            cost += (2 * gradients[row, j] + product) * move[j]
        chosen[row] = best if cost < 0 else -1


def choose_clips(
    weights: torch.Tensor,
    current: torch.Tensor,
    gradients: torch.Tensor,
    hessian: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    max_int: int,
) -> torch.Tensor:
    """Choose for each row the grid that lowers the output error most, in threads.

    Args:
        weights: What is to be rounded, float32 [rows, group size].
        current: What stands there now, float32 [rows, group size].
        gradients: Δ H, float32 [rows, group size].
        hessian: H of the group's inputs, float32 [group size, group size].
        scales: Of the grids, float32 [rows, grids].
        zeros: Of the grids, float32 [rows, grids].
        max_int: The largest integer.

    Returns:
        The number of each row's grid, or -1 where none lowers the error, int64 [rows].
    """
    chosen = np.empty(len(weights), np.int64)
    weight_values = weights.contiguous().cpu().numpy()
    current_values = current.contiguous().cpu().numpy()
    gradient_values = gradients.contiguous().cpu().numpy()
    hessian_values = hessian.contiguous().cpu().numpy()
    scale_values = scales.contiguous().cpu().numpy()
    zero_values = zeros.contiguous().cpu().numpy()

    def run(rows: slice) -> None:
        _choose_clips(
            weight_values[rows],
            current_values[rows],
            gradient_values[rows],
            hessian_values,
            scale_values[rows],
            zero_values[rows],
            np.float32(max_int),
            chosen[rows],
        )

    run_over_rows(len(weights), run)
    return torch.from_numpy(chosen).to(weights.device)


def clip_ratio_pairs(grid: Grid, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ratios of the low and of the high end that are tried, float32 [pairs] each.

    A symmetric grid has one scale for both ends, which are clipped alike.
    """
    pairs = []
    for low in CLIP_RATIOS:
        for high in CLIP_RATIOS:
            if low == high or not grid.symmetric:
                pairs.append((low, high))
    lows, highs = torch.tensor(pairs, device=device).T
    return lows, highs


def quantize_clipped(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid) -> GroupedLinear:
    """Round a weight to nearest on clipped ranges.

    Each row starts on its min-max grids, and goes back to them in the end if they leave the smaller
    Δ H Δᵀ.

    Args:
        weight: float32 [out, in].
        hessian: H, float32 [in, in].
        grid: Its group size divides `in`.

    Returns:
        The rounded weight.
    """
    groups = split_groups(weight, grid)
    low, high = group_range(groups)
    scales, zeros = fit_range(low, high, grid)
    integers = nearest_integers(groups, scales, zeros, grid)

    def linear() -> GroupedLinear:
        # The search changes the scales where they lie.
        own_scales = scales[..., 0].clone()
        return grouped_linear(integers.reshape(weight.shape), own_scales, zeros[..., 0], grid)

    def difference() -> torch.Tensor:
        return ((integers - zeros) * scales - groups).reshape(weight.shape)

    def errors() -> torch.Tensor:
        return (gradients * difference()).sum(1, dtype=torch.float64)

    unclipped = linear()
    gradients = difference() @ hessian
    unclipped_errors = errors()
    low_ratios, high_ratios = clip_ratio_pairs(grid, weight.device)
    for _ in range(SWEEPS):
        for group in range(groups.shape[1]):
            span = slice(group * grid.group_size, (group + 1) * grid.group_size)
            weights = groups[:, group]
            current = (integers[:, group] - zeros[:, group]) * scales[:, group]
            candidate_scales, candidate_zeros = fit_range(
                low[:, group] * low_ratios, high[:, group] * high_ratios, grid
            )
            chosen = choose_clips(
                weights,
                current,
                gradients[:, span],
                hessian[span, span],
                candidate_scales,
                candidate_zeros,
                grid.max_int,
            )[:, None]
            stays = chosen < 0
            scale = candidate_scales.gather(1, chosen.clamp(min=0))
            zero = candidate_zeros.gather(1, chosen.clamp(min=0))
            rounded = nearest_integers(weights, scale, zero, grid)
            change = torch.where(stays, 0, (rounded - zero) * scale - current)
            gradients += change @ hessian[span]
            scales[:, group] = torch.where(stays, scales[:, group], scale)
            zeros[:, group] = torch.where(stays, zeros[:, group], zero)
            integers[:, group] = torch.where(stays, integers[:, group], rounded)
    return replace_rows(unclipped, linear(), errors() < unclipped_errors)
