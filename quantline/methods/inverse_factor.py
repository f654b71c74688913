"""The triangular factor of the inverse of second moments, which GPTQ's error feedback needs.

Frantar et al. 2022 factor H, invert it, and factor the inverse. Here H is factored from its last
column to its first, and the factor itself is inverted: half the operations, and no rounding of an
inverse. Both go block by block, so that nearly all of the work is in products of matrices, which
use all threads with the same bits (quantline/model/same_bits.py).
"""

import torch

from quantline.errors import Failure, StageError

BLOCK = 512  # columns that are factored at once
DAMPING_LIMIT = 1.0


def inverse_factor(hessian: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    """Return U, upper triangular, with UᵀU = (H + d · mean(diag H) · I)⁻¹, and d.

    Args:
        hessian: H, float32 [in, in].
        damping: The first d; while the matrix cannot be factored, d grows tenfold, up to
            DAMPING_LIMIT. From 0.02 it is 0.02 and 0.2.

    Raises:
        StageError: hessian_not_positive_definite, if no d helps that is at most DAMPING_LIMIT.
    """
    tried = []
    while damping <= DAMPING_LIMIT:
        tried.append(f"{damping:g}")
        # With the order of rows and columns turned round, H = L Lᵀ, and U is the inverse of L
        # turned back.
        turned = hessian.flip(0, 1)
        turned.diagonal().add_(damping * hessian.diagonal().mean())
        corners = _factor(turned)
        if corners is not None:
            upper = _inverse(turned, corners).flip(0, 1)
            if torch.isfinite(upper).all():
                return upper, damping
        damping *= 10
    raise StageError(
        Failure.HESSIAN_NOT_POSITIVE_DEFINITE,
        "expected second moments that can be inverted with a damping of at most "
        f"{DAMPING_LIMIT:g}, found none (tried {', '.join(tried) or 'none'}); calibrate on more "
        "text",
    )


def _spans(size: int) -> list[slice]:
    """Return the blocks of so many columns."""
    return [slice(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK)]


def _factor(matrix: torch.Tensor) -> list[torch.Tensor] | None:
    """Put L, lower triangular with L Lᵀ the matrix, into the lower half of a matrix [n, n].

    Returns:
        The inverses of L's blocks on the diagonal; None if the matrix is not positive definite.
    """
    corners = []
    for span in _spans(len(matrix)):
        done = matrix[span, : span.start]
        panel = matrix[span.start :, span]
        panel -= matrix[span.start :, : span.start] @ done.T
        corner, broken = torch.linalg.cholesky_ex(panel[: len(done)])
        if broken:
            return None
        identity = torch.eye(len(corner), dtype=matrix.dtype, device=matrix.device)
        inverse = torch.linalg.solve_triangular(corner, identity, upper=False)
        panel[len(done) :] = panel[len(done) :] @ inverse.T
        corners.append(inverse)
    return corners


def _inverse(lower: torch.Tensor, corners: list[torch.Tensor]) -> torch.Tensor:
    """Return the inverse of a lower triangular matrix [n, n].

    Args:
        lower: The matrix; of its blocks on the diagonal only `corners` are read.
        corners: The inverses of those blocks.
    """
    inverse = torch.zeros_like(lower)
    spans = _spans(len(lower))
    for span, corner in zip(spans, corners, strict=True):
        inverse[span, span] = corner
        for column in spans:
            if column.start >= span.start:
                break
            known = slice(column.start, span.start)  # above it the inverse is zero
            product = lower[span, known] @ inverse[known, column]
            inverse[span, column] = -(corner @ product)
    return inverse
