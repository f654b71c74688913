"""Choosing the range of a group: clipped to the one whose grid has the least weighted error.

A clipped range makes the largest weights worse and the steps of all others finer.
"""

import numba
import numpy as np
import torch

from quantline.methods.integer.grid import Grid, fit_range, group_range, split_groups
from quantline.methods.threads import run_over_rows

CLIP_RATIOS = [1 - 0.02 * step for step in range(21)]  # shares of the range that are tried


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
def best_grid(
    weights: np.ndarray,
    current: np.ndarray,
    gradient: np.ndarray,
    diagonal: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray,
    max_int: np.float32,
) -> int:
    """Return which grid moves a group to the least Σ (2 · gradient + diagonal · m) · m.

    m is the move of a weight from where it stands to the nearest point of the grid. Of equals the
    first counts.

    Args:
        weights: What is to be rounded, float32 [group size].
        current: What stands there now, float32 [group size].
        gradient: Half the slope of the error where it stands, float32 [group size].
        diagonal: Half the error's second derivatives, float32 [group size].
        scales: Of the grids, float32 [grids].
        zeros: Of the grids, float32 [grids].
        max_int: The largest integer, float32.
    """
    least = np.float32(np.inf)
    best = 0
    for number in range(len(scales)):
        scale = scales[number]
        zero = zeros[number]
        cost = np.float32(0)
        for j in range(len(weights)):
            integer = min(max(np.rint(weights[j] / scale) + zero, np.float32(0)), max_int)
            move = (integer - zero) * scale - current[j]
            cost += (2 * gradient[j] + diagonal[j] * move) * move
        if cost < least:
            least = cost
            best = number
    return best


@numba.njit(nogil=True, cache=True, fastmath=False)
def _best_grids(
    groups: np.ndarray,
    importance: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray,
    max_int: np.float32,
    best: np.ndarray,
) -> None:
    """Write `best_grid` of groups [rows, groups, group size] into best [rows, groups]."""
    no_gradient = np.zeros(groups.shape[2], np.float32)
    for row in range(len(groups)):
        for group in range(groups.shape[1]):
            weights = groups[row, group]
            best[row, group] = best_grid(
                weights,
                weights,
                no_gradient,
                importance[group],
                scales[row, group],
                zeros[row, group],
                max_int,
            )


def best_grids(
    groups: torch.Tensor,
    importance: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    max_int: int,
) -> torch.Tensor:
    """Return which grid rounds each group with the least weighted squared error.

    On the CPU rows run in threads through a compiled kernel.

    Args:
        groups: Weights float32 [rows, groups, group size].
        importance: Of each input, float32 [groups, group size].
        scales: float32 [rows, groups, grids].
        zeros: float32 [rows, groups, grids].
        max_int: The largest integer.

    Returns:
        Numbers of grids, int64 [rows, groups].
    """
    if groups.device.type != "cpu":
        return best_grids_at_once(groups, importance, scales, zeros, max_int)
    best = torch.empty(groups.shape[:2], dtype=torch.int64)
    groups = groups.contiguous()
    importance = importance.contiguous()
    scales = scales.contiguous()
    zeros = zeros.contiguous()

    def run(rows: slice) -> None:
        _best_grids(
            groups[rows].numpy(),
            importance.numpy(),
            scales[rows].numpy(),
            zeros[rows].numpy(),
            np.float32(max_int),
            best[rows].numpy(),
        )

    run_over_rows(len(groups), run)
    return best


def best_grids_at_once(
    groups: torch.Tensor,
    importance: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    max_int: int,
) -> torch.Tensor:
    """Return what `best_grids` does, with all groups in one tensor operation, for GPUs."""
    errors = []
    for scale, zero in zip(scales.split(1, -1), zeros.split(1, -1), strict=True):
        integers = ((groups / scale).round() + zero).clamp(0, max_int)
        errors.append((((integers - zero) * scale - groups) ** 2 * importance).sum(-1))
    return torch.stack(errors).argmin(0)


def fit_grids(
    weight: torch.Tensor, grid: Grid, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales and zero points, float32 [out, groups] each, for the groups of a weight.

    Args:
        weight: float32 [out, in].
        grid: Its group size divides `in`.
        importance: Positive weights of the inputs, float32 [in], such as diag(H). With them each
            range is clipped to where the weighted squared error is least; without them grids span
            their groups (min-max).
    """
    groups = split_groups(weight, grid)
    low, high = group_range(groups)
    if importance is None:
        scales, zeros = fit_range(low, high, grid)
        return scales[..., 0], zeros[..., 0]
    ratios = torch.tensor(CLIP_RATIOS, device=weight.device)
    scales, zeros = fit_range(low * ratios, high * ratios, grid)
    by_group = importance.reshape(-1, grid.group_size)
    best = best_grids(groups, by_group, scales, zeros, grid.max_int)[..., None]
    return scales.gather(-1, best)[..., 0], zeros.gather(-1, best)[..., 0]
