"""Cholesky factors and their inverses, block by block.

Nearly all of the work is in products of matrices, which use all threads with the same bits
(same_bits.py); torch's own functions would have one thread.
"""

import torch

BLOCK = 512  # columns that are factored at once


def _spans(size: int) -> list[slice]:
    """Return the blocks of so many columns."""
    return [slice(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK)]


def factor_in_place(matrix: torch.Tensor) -> list[torch.Tensor] | None:
    """Put L, lower triangular with L Lᵀ the matrix, into the lower half of a matrix [n, n].

    Returns:
        The inverses of L's blocks on the diagonal; None if the matrix is not positive definite,
        and is spoilt then.
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
        panel[: len(done)] = corner
        panel[len(done) :] = panel[len(done) :] @ inverse.T
        corners.append(inverse)
    return corners


def inverse_of(lower: torch.Tensor, corners: list[torch.Tensor]) -> torch.Tensor:
    """Return the inverse of a lower triangular matrix [n, n].

    Args:
        lower: The matrix, of which the lower half is read.
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
