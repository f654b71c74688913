"""GPTQ (Frantar et al. 2022, algorithm 1): round column by column, pushing each column's error onto those to come.

With act-order the columns with the largest input come first, while groups stay what they are in the file (static
groups), so no container needs a permutation.
"""

from typing import NamedTuple

import numba
import numpy as np
import torch

from quantline.quantized.store import GroupedLinear
from quantline.methods.integer.grid import canonical, choose_rows, grid_of, rows_of
from quantline.methods.integer.coordinate_descent import polish
from quantline.methods.threads import on_host, over_rows
from quantline.errors import Failure, StageError

BLOCK = 128
DAMPING_LIMIT = 1.0


def inverse_factor(moment: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    """(U upper triangular with UᵀU = (H + d·mean(diag H)·I)⁻¹, d). d grows tenfold from `damping` until it factors.

    Raises StageError(hessian_not_positive_definite) if not even d = 1 helps.
    """
    identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    while damping <= DAMPING_LIMIT:
        lower, broken = torch.linalg.cholesky_ex(moment + damping * moment.diagonal().mean() * identity)
        if not broken:
            upper, broken = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not broken and torch.isfinite(upper).all():
                return upper, damping
        damping *= 10
    raise StageError(Failure.HESSIAN_NOT_POSITIVE_DEFINITE,
                     f"expected second moments that can be inverted, found none up to a damping of {DAMPING_LIMIT}; "
                     "calibrate on more text")


class Solved(NamedTuple):
    """What the rounding needs of H: the order of the columns, U of that order, and the damping that it took."""

    order: torch.Tensor
    upper: torch.Tensor
    damping: float


def solve(moment: torch.Tensor, act_order: bool = True, damping: float = 0.01) -> Solved:
    """Of H = `moment` [in, in], once for all layers that read the same inputs. Raises as `inverse_factor` does."""
    order = (torch.argsort(moment.diagonal(), descending=True, stable=True) if act_order else
             torch.arange(len(moment), device=moment.device))
    return Solved(order, *inverse_factor(moment[order][:, order], damping))


@numba.njit(nogil=True, cache=True, fastmath=False)
def _round_rows(left, scale, zero, factor, top, integers, errors):
    """`round_columns` of some rows, one row after another; left, integers and errors are changed."""
    for row in range(len(left)):
        for j in range(len(factor)):
            s, z = scale[row, j], zero[row, j]
            integer = min(max(np.rint(left[row, j] / s) + z, np.float32(0)), top)
            integers[row, j] = integer
            error = (left[row, j] - (integer - z) * s) / factor[j, j]
            errors[row, j] = error
            after, share = left[row, j + 1:], factor[j, j + 1:]  # loops from 0 over these become vector instructions
            for k in range(len(share)):
                after[k] -= error * share[k]


def round_columns(left: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, factor: torch.Tensor,
                  top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(integers, errors) [rows, n] of n neighbouring columns, each error pushed onto the columns after it.

    factor [n, n] is their part of U. Rows run in threads through a compiled kernel, on the CPU also where all else is on a
    GPU, which would need several launches for each column.
    """
    home, (scale, zero, factor) = left.device, (one.cpu().contiguous() for one in (scale, zero, factor))
    left = on_host(left)
    integers, errors = torch.empty_like(left), torch.empty_like(left)

    def run(rows: slice) -> None:
        _round_rows(*(one[rows].numpy() for one in (left, scale, zero)), factor.numpy(), np.float32(top),
                    integers[rows].numpy(), errors[rows].numpy())

    over_rows(len(left), run)
    return integers.to(home), errors.to(home)


def on_grids(weight: torch.Tensor, grids: list[tuple[torch.Tensor, torch.Tensor]], solved: Solved, bits: int, group_size: int,
             symmetric: bool) -> list[GroupedLinear]:
    """A weight [out, in] rounded on each of the grids (scales, zeros [out, groups])."""
    scales, zeros = (torch.cat(parts) for parts in zip(*grids, strict=True))
    order, upper, _ = solved
    group = order // group_size
    scale, zero = scales[:, group], zeros[:, group]
    left = weight[:, order].repeat(len(grids), 1)
    integers = torch.empty_like(left)
    for start in range(0, weight.shape[1], BLOCK):
        span = slice(start, start + BLOCK)
        integers[:, span], errors = round_columns(left[:, span], scale[:, span], zero[:, span], upper[span, span], 2**bits - 1)
        left[:, start + BLOCK:] -= errors @ upper[span, start + BLOCK:]
    integers = integers[:, torch.argsort(order)]
    return [canonical(*parts, bits, group_size, symmetric)
            for parts in zip(integers.chunk(len(grids)), scales.chunk(len(grids)), zeros.chunk(len(grids)), strict=True)]


def quantize(weight: torch.Tensor, moment: torch.Tensor, bits: int, group_size: int, symmetric: bool, solved: Solved,
             weighted: bool = True) -> GroupedLinear:
    """A weight [out, in] rounded with H = `moment` [in, in], of which `solved` is.

    The grid of a group spans it. With `weighted` a row is also rounded on grids that span the part of each group with the
    least diag(H)-weighted error, and keeps what leaves the smaller Δ H Δᵀ.
    """
    grids = [grid_of(weight, bits, group_size, symmetric, importance)
             for importance in ([None, moment.diagonal()] if weighted else [None])]
    made = on_grids(weight, grids, solved, bits, group_size, symmetric)
    return choose_rows(weight, moment, *made) if weighted else made[0]


def improve(linear: GroupedLinear, weight: torch.Tensor, moment: torch.Tensor, solved: Solved) -> GroupedLinear:
    """A weight [out, in] rounded by `quantize`, then by descent on Δ H Δᵀ, and once more from the start on the scales that
    this found, with one round of descent there. Each row keeps what leaves less.
    """
    first, error = polish(linear, weight, moment)
    grid = tuple(torch.from_numpy(part.astype(np.float32)).to(weight.device) for part in (first.scales, first.zeros))
    again, = on_grids(weight, [grid], solved, linear.bits, linear.group_size, linear.symmetric)
    again, other = polish(again, weight, moment, rounds=1)
    return rows_of(first, again, other < error)
