"""GPTQ (Frantar et al. 2022, algorithm 1): push each column's error onto the columns to come.

With act-order the columns with the largest input come first, while groups stay what they are in the
file (static groups), so that no container needs a permutation.
"""

from typing import NamedTuple

import numba
import numpy as np
import torch

from quantline.methods.gptq import GptqRecipe
from quantline.methods.integer.clip_search import fit_grids
from quantline.methods.integer.coordinate_descent import refine_rows
from quantline.methods.integer.grid import Grid, grouped_linear
from quantline.methods.integer.grouped_method import GroupedMethod
from quantline.methods.integer.inverse_factor import inverse_factor
from quantline.methods.integer.output_error import replace_rows, row_dots
from quantline.methods.threads import host_copy, run_over_rows
from quantline.quantized.tensors import GroupedLinear

BLOCK_COLUMNS = 128
DAMPING = 0.01  # of recipes that do not say


class GptqFactor(NamedTuple):
    """What the rounding needs of a Hessian.

    Attributes:
        order: The order of the columns, int64 [in].
        upper: U, upper triangular, with UᵀU the inverse of H in that order, float32 [in, in].
        damping: The share of H's mean diagonal that was added to its diagonal.
    """

    order: torch.Tensor
    upper: torch.Tensor
    damping: float


def factorize(
    hessian: torch.Tensor, act_order: bool = True, damping: float = DAMPING
) -> GptqFactor:
    """Factorize H, once for all layers that read one input.

    Args:
        hessian: H, float32 [in, in].
        act_order: Whether the columns with the largest inputs come first.
        damping: As for `inverse_factor`.

    Returns:
        The order of the columns, U, and the damping that was used.

    Raises:
        StageError: As `inverse_factor` does.
    """
    if act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    else:
        order = torch.arange(len(hessian), device=hessian.device)
    upper, damping = inverse_factor(hessian[order][:, order], damping)
    return GptqFactor(order, upper, damping)


@numba.njit(nogil=True, cache=True, fastmath=False)
def _round_rows(
    weights: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    factor: np.ndarray,
    max_int: np.float32,
    integers: np.ndarray,
    errors: np.ndarray,
) -> None:
    """Do `round_columns` of some rows, one after another; weights, integers and errors change."""
    for row in range(len(weights)):
        for j in range(len(factor)):
            s = scale[row, j]
            z = zero[row, j]
            integer = min(max(np.rint(weights[row, j] / s) + z, np.float32(0)), max_int)
            integers[row, j] = integer
            error = (weights[row, j] - (integer - z) * s) / factor[j, j]
            errors[row, j] = error
            # Loops from 0 over these become vector instructions.
            after = weights[row, j + 1 :]
            factor_row = factor[j, j + 1 :]
            for k in range(len(factor_row)):
                after[k] -= error * factor_row[k]


def round_columns(
    weights: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    factor: torch.Tensor,
    max_int: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round some neighbouring columns, pushing each one's error onto those after it.

    Rows run in threads through a compiled kernel, on the CPU also where all else is on a GPU, which
    would need several launches for each column.

    Args:
        weights: float32 [rows, n].
        scale: Of each weight, float32 [rows, n].
        zero: Of each weight, float32 [rows, n].
        factor: These columns' part of U, float32 [n, n].
        max_int: The largest integer.

    Returns:
        Integers and errors, float32 [rows, n] each.
    """
    device = weights.device
    scale = scale.cpu().contiguous()
    zero = zero.cpu().contiguous()
    factor = factor.cpu().contiguous()
    weights = host_copy(weights)
    integers = torch.empty_like(weights)
    errors = torch.empty_like(weights)

    def run(rows: slice) -> None:
        _round_rows(
            weights[rows].numpy(),
            scale[rows].numpy(),
            zero[rows].numpy(),
            factor.numpy(),
            np.float32(max_int),
            integers[rows].numpy(),
            errors[rows].numpy(),
        )

    run_over_rows(len(weights), run)
    return integers.to(device), errors.to(device)


def round_on_grids(
    weight: torch.Tensor,
    scales_and_zeros: list[tuple[torch.Tensor, torch.Tensor]],
    grid: Grid,
    factor: GptqFactor,
) -> list[tuple[GroupedLinear, torch.Tensor]]:
    """Round a weight once for each choice of scales and zero points, all in one pass.

    Args:
        weight: float32 [out, in].
        scales_and_zeros: The choices, float32 [out, groups] each.
        grid: Bits, group size and symmetry, which are the same for all choices.
        factor: Of H.

    Returns:
        The rounded weight of each choice, and the Δ H Δᵀ of each of its rows, float64 [out], where
        H is damped as its factor. That is the sum of the squares of what is pushed on.
    """
    scales = torch.cat([scales for scales, _ in scales_and_zeros])
    zeros = torch.cat([zeros for _, zeros in scales_and_zeros])
    order, upper, _ = factor
    group = order // grid.group_size
    scale = scales[:, group]
    zero = zeros[:, group]
    remaining = weight[:, order].repeat(len(scales_and_zeros), 1)
    integers = torch.empty_like(remaining)
    row_errors = torch.zeros(len(remaining), dtype=torch.float64, device=weight.device)
    for start in range(0, weight.shape[1], BLOCK_COLUMNS):
        span = slice(start, start + BLOCK_COLUMNS)
        after = slice(start + BLOCK_COLUMNS, None)
        integers[:, span], errors = round_columns(
            remaining[:, span], scale[:, span], zero[:, span], upper[span, span], grid.max_int
        )
        row_errors += row_dots(errors, errors)
        remaining[:, after].addmm_(errors, upper[span, after], alpha=-1)
    integers = integers[:, torch.argsort(order)]
    count = len(scales_and_zeros)
    parts = zip(integers.chunk(count), scales.chunk(count), zeros.chunk(count), strict=True)
    linears = [grouped_linear(*of_one_choice, grid) for of_one_choice in parts]
    return list(zip(linears, row_errors.chunk(count), strict=True))


def quantize(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid,
    factor: GptqFactor,
    weighted: bool = True,
) -> GroupedLinear:
    """Round a weight by GPTQ.

    Args:
        weight: float32 [out, in].
        hessian: H, float32 [in, in].
        grid: Its group size divides `in`.
        factor: Of H.
        weighted: Whether to also try grids clipped to the least diag(H)-weighted error; each row
            keeps the rounding with the smaller Δ H Δᵀ of the damped H. Without it, only min-max
            grids.

    Returns:
        The rounded weight.
    """
    scales_and_zeros = [fit_grids(weight, grid)]
    if weighted:
        scales_and_zeros.append(fit_grids(weight, grid, hessian.diagonal()))
    (linear, errors), *others = round_on_grids(weight, scales_and_zeros, grid, factor)
    for other, other_errors in others:
        linear = replace_rows(linear, other, other_errors < errors)
        errors = torch.minimum(errors, other_errors)
    return linear


def improve(
    linear: GroupedLinear, weight: torch.Tensor, hessian: torch.Tensor, factor: GptqFactor
) -> GroupedLinear:
    """Lower Δ H Δᵀ of what `quantize` rounded.

    Coordinate descent comes first. Then the weight is rounded once more from the start, on the
    scales that the descent ended with, and one round of descent follows there. Each row keeps the
    result with the smaller error.

    Args:
        linear: The rounded weight.
        weight: The unquantized weight, float32 [out, in].
        hessian: H, float32 [in, in].
        factor: Of H.

    Returns:
        The rounded weight; no row has a larger Δ H Δᵀ than in `linear`.
    """
    first, first_errors = refine_rows(linear, weight, hessian)
    scales = torch.from_numpy(first.scales.astype(np.float32)).to(weight.device)
    zeros = torch.from_numpy(first.zeros.astype(np.float32)).to(weight.device)
    grid = Grid(linear.bits, linear.group_size, linear.symmetric)
    [(rounded_again, _)] = round_on_grids(weight, [(scales, zeros)], grid, factor)
    second, second_errors = refine_rows(rounded_again, weight, hessian, rounds=1)
    return replace_rows(first, second, second_errors < first_errors)


class Gptq(GroupedMethod[GptqRecipe, GptqFactor]):
    """Rounds column by column with error feedback, then by coordinate descent."""

    def prepare(self, hessian: torch.Tensor) -> GptqFactor:
        """Factorize the Hessian."""
        return factorize(hessian, self.recipe.act_order, self.recipe.damping)

    def round(
        self,
        weight: torch.Tensor,
        hessian: torch.Tensor,
        grid: Grid,
        prepared: GptqFactor | None,
    ) -> GroupedLinear:
        """Round a weight by GPTQ."""
        assert prepared is not None, "GPTQ needs the factor of the Hessian"
        return quantize(weight, hessian, grid, prepared, self.recipe.scales == "weighted")

    def improve(
        self,
        linear: GroupedLinear,
        weight: torch.Tensor,
        hessian: torch.Tensor,
        prepared: GptqFactor | None,
    ) -> GroupedLinear:
        """Lower the error Δ H Δᵀ of each row by coordinate descent."""
        assert prepared is not None, "GPTQ needs the factor of the Hessian"
        return improve(linear, weight, hessian, prepared)
