"""GPTQ (Frantar et al. 2022, algorithm 1): round column by column, pushing each column's error onto those to come.

With act-order the columns with the largest input come first, while groups stay what they are in the file (static
groups), so no container needs a permutation.
"""

import torch

from stages.checkpoints.canonical import GroupedLinear
from stages.methods.grid import canonical, grid_of
from stages.tracking import Failure, StageError

BLOCK = 128
DAMPING_LIMIT = 1.0


def inverse_factor(moment: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    """(U upper triangular with UᵀU = (H + d·mean(diag H)·I)⁻¹, d). d grows tenfold from `damping` until it factors.

    Raises StageError(hessian_not_positive_definite) if not even d = 1 helps.
    """
    identity = torch.eye(len(moment), dtype=moment.dtype)
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


def quantize(weight: torch.Tensor, moment: torch.Tensor, bits: int, group_size: int, symmetric: bool,
             act_order: bool = True, damping: float = 0.01, weighted: bool = True) -> tuple[GroupedLinear, float]:
    """(a weight [out, in] rounded with H = `moment` [in, in], the damping that was used).

    The grid of a group spans it, or, `weighted`, the part of it with the least diag(H)-weighted error.
    Raises as `inverse_factor` does.
    """
    top = 2**bits - 1
    scales, zeros = grid_of(weight, bits, group_size, symmetric, moment.diagonal() if weighted else None)
    width = weight.shape[1]
    order = torch.argsort(moment.diagonal(), descending=True, stable=True) if act_order else torch.arange(width)
    group = order // group_size
    scale, zero = scales[:, group], zeros[:, group]
    upper, damping = inverse_factor(moment[order][:, order], damping)
    left, integers = weight[:, order].clone(), torch.empty_like(weight)
    for start in range(0, width, BLOCK):
        end = min(start + BLOCK, width)
        block, factor = left[:, start:end].clone(), upper[start:end, start:end]
        errors = torch.empty_like(block)
        for i in range(end - start):
            s, z = scale[:, start + i], zero[:, start + i]
            integers[:, start + i] = ((block[:, i] / s).round() + z).clamp(0, top)
            errors[:, i] = (block[:, i] - (integers[:, start + i] - z) * s) / factor[i, i]
            block[:, i + 1:] -= errors[:, i, None] * factor[i, i + 1:]
        left[:, end:] -= errors @ upper[start:end, end:]
    return canonical(integers[:, torch.argsort(order)], scales, zeros, bits, group_size, symmetric), damping
