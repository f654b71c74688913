"""Coordinate descent on the error of each row: what is left to gain after GPTQ's one pass.

The error Δ H Δᵀ of a row is a quadratic form in its integers given the scales, and in its scales
given the integers. Rounds refit the scale of each group in closed form and then move each of its
integers to its best value, both with all others fixed, so that the error falls with every step. The
descent of curvature rounding (quantline/methods/integer/curvature_descent.py) does the same with G,
through which rows change each other's gradients; here each row is on its own. A move changes the
gradient at once within some neighbouring columns, and in the rest of the row by one product when
these are done.

"Steps" are integers minus zero points: how many scales a weight is from zero.
"""

from dataclasses import replace

import numba
import numpy as np
import torch

from quantline.methods.integer.output_error import replace_rows, row_dots
from quantline.methods.threads import host_copy, run_over_rows
from quantline.quantized.tensors import GroupedLinear

ROUNDS = 2  # more hardly help (benchmarks/small_models.md)
BLOCK_COLUMNS = 128  # whose moves are gathered, if a group is not wider


@numba.njit(nogil=True, cache=True, fastmath=False)
def _as_bfloat16(value: np.float32, cell: np.ndarray) -> np.float32:
    """Return a float32 rounded to what bfloat16 holds, ties to even.

    `cell` is an array of one float32 to work in.
    """
    cell[0] = value
    bits = cell.view(np.int32)
    bits[0] = (bits[0] + 0x7FFF + ((bits[0] >> 16) & 1)) & -0x10000
    return cell[0]


@numba.njit(nogil=True, cache=True, fastmath=False)
def _descend_rows(
    steps: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray,
    gradients: np.ndarray,
    products: np.ndarray,
    hessian: np.ndarray,
    max_int: np.float32,
) -> None:
    """Do `descend_rows` of some rows, one after another; steps, scales and gradients change."""
    groups = products.shape[1]
    width = products.shape[2]
    size = width // groups
    cell = np.empty(1, np.float32)
    rate = np.empty(width, np.float32)
    for k in range(width):
        rate[k] = 1 / hessian[k, k] if hessian[k, k] > 0 else 0
    for row in range(len(steps)):
        gradient = gradients[row]
        for g in range(groups):
            # Loops from 0 over parts become vector instructions.
            span = slice(g * size, (g + 1) * size)
            group_steps = steps[row, span]
            group_gradient = gradient[span]
            group_rate = rate[span]
            group_product = products[row, g, span]
            slope = np.float64(0)
            curvature = np.float64(0)
            for k in range(size):
                slope += group_steps[k] * group_gradient[k]
                curvature += group_steps[k] * group_product[k]
            if curvature > 0:
                new = _as_bfloat16(np.float32(scales[row, g] - slope / curvature), cell)
                if new > 0 and np.isfinite(new):
                    gradient += (new - scales[row, g]) * products[row, g]
                    scales[row, g] = new
            scale = scales[row, g]
            zero = zeros[row, g]
            inverse = 1 / scale
            for k in range(size):
                wanted = np.rint(group_steps[k] - group_gradient[k] * group_rate[k] * inverse)
                wanted = min(max(wanted, -zero), max_int - zero)
                if wanted != group_steps[k] and group_rate[k] > 0:
                    move = (wanted - group_steps[k]) * scale
                    column = hessian[span.start + k]
                    for i in range(width):
                        gradient[i] += move * column[i]
                    group_steps[k] = wanted


def descend_rows(
    steps: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    gradients: torch.Tensor,
    products: torch.Tensor,
    hessian: torch.Tensor,
    max_int: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do one round over some neighbouring columns: each group's scale, then its integers.

    Rows run in threads through a compiled kernel, on the CPU as those of GPTQ.

    Args:
        steps: float32 [rows, n].
        scales: float32 [rows, groups].
        zeros: float32 [rows, groups].
        gradients: Δ H of these columns, float32 [rows, n].
        products: The steps of each group times H, float32 [rows, groups, n].
        hessian: H of these columns, float32 [n, n]. Columns whose diagonal is not positive keep
            their integers.
        max_int: The largest integer.

    Returns:
        Steps and scales.
    """
    device = steps.device
    steps = host_copy(steps)
    scales = host_copy(scales)
    gradients = host_copy(gradients)
    zeros = zeros.cpu().contiguous()
    products = products.cpu().contiguous()
    hessian = hessian.cpu().contiguous()

    def run(rows: slice) -> None:
        _descend_rows(
            steps[rows].numpy(),
            scales[rows].numpy(),
            zeros[rows].numpy(),
            gradients[rows].numpy(),
            products[rows].numpy(),
            hessian.numpy(),
            np.float32(max_int),
        )

    run_over_rows(len(steps), run)
    return steps.to(device), scales.to(device)


def refine_rows(
    linear: GroupedLinear, weight: torch.Tensor, hessian: torch.Tensor, rounds: int = ROUNDS
) -> tuple[GroupedLinear, torch.Tensor]:
    """Move integers and scales of a rounded weight to where Δ H Δᵀ of each row is least.

    Zero points stay, scales are values that bfloat16 holds exactly, and no row is worse than what
    came in.

    Args:
        linear: The rounded weight.
        weight: The unquantized weight, float32 [out, in].
        hessian: H, float32 [in, in]. Where its diagonal is not positive, integers stay.
        rounds: How many.

    Returns:
        The rounded weight, and the error Δ H Δᵀ of each row, float64 [out].
    """
    device = weight.device
    size = linear.group_size
    integers = torch.from_numpy(linear.integers.astype(np.float32)).to(device)
    zeros = torch.from_numpy(linear.zeros.astype(np.float32)).to(device)
    scales = torch.from_numpy(linear.scales.astype(np.float32)).to(device)
    steps = integers - zeros.repeat_interleave(size, 1)
    groups_at_once = max(1, BLOCK_COLUMNS // size)

    def values(steps: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        grouped = steps.reshape(len(steps), -1, size)
        return (grouped * scales[..., None]).reshape(steps.shape)

    difference = values(steps, scales) - weight
    gradients = difference @ hessian
    before = row_dots(gradients, difference)
    for _ in range(rounds):
        for group in range(0, scales.shape[1], groups_at_once):
            groups = slice(group, min(group + groups_at_once, scales.shape[1]))
            span = slice(groups.start * size, groups.stop * size)
            own = hessian[span, span]
            by_group = steps[:, span].reshape(len(steps), -1, size).transpose(0, 1)
            products = (by_group @ own.reshape(-1, size, own.shape[1])).transpose(0, 1)
            new_steps, new_scales = descend_rows(
                steps[:, span],
                scales[:, groups],
                zeros[:, groups],
                gradients[:, span],
                products,
                own,
                2**linear.bits - 1,
            )
            change = values(new_steps, new_scales) - values(steps[:, span], scales[:, groups])
            steps[:, span] = new_steps
            scales[:, groups] = new_scales
            gradients.addmm_(change, hessian[span])
    after = row_dots(gradients, values(steps, scales) - weight)
    moved_integers = (steps + zeros.repeat_interleave(size, 1)).to(torch.uint8).cpu().numpy()
    moved = replace(linear, integers=moved_integers, scales=scales.cpu().numpy())
    return replace_rows(linear, moved, after < before), torch.where(after < before, after, before)
