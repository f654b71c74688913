"""Second moments on disk: their diagonal in single precision, a triangular factor in half.

The factor is the Cholesky factor of the correlations, whose rows have length 1, so that float16
neither overflows nor loses small channels beside large ones. What is read back is a product of a
matrix with its transpose: positive semidefinite whatever was rounded, which rounded correlations
would not be.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

COLUMNS = 512  # of the factor that are multiplied at once
FIRST_DAMPING = 1e-7  # of a correlation of 1; about what float32 sums leave of a singular matrix


def pack(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pack positive semidefinite matrices.

    Args:
        matrix: float32 [..., n, n].

    Returns:
        The diagonal float32 [..., n] and the triangle float16 [..., n(n+1)/2].
    """
    import torch

    moments = torch.from_numpy(matrix)
    diagonal = moments.diagonal(dim1=-2, dim2=-1)
    size = diagonal.double().clamp(min=0).sqrt()
    inverse = torch.where(size > 0, 1 / size, 0)
    count = matrix.shape[-1]
    inverses = inverse.reshape(-1, count)
    stack = moments.reshape(-1, count, count)
    triangle = np.empty((len(stack), count * (count + 1) // 2), np.float16)
    damping = FIRST_DAMPING
    while (factors := _factors(stack, inverses, damping)) is None:
        damping *= 10
    for row, span in enumerate(_rows(count)):
        triangle[:, span] = factors[:, row, : row + 1].numpy()
    shape = (*matrix.shape[:-2], triangle.shape[-1])
    return diagonal.numpy().copy(), triangle.reshape(shape)


def _factors(
    stack: "torch.Tensor", inverses: "torch.Tensor", damping: float
) -> "torch.Tensor | None":
    """Return the Cholesky factors of the correlations, in the lower halves of [m, n, n].

    Args:
        stack: Second moments float32 [m, n, n]. They may be large: one copy is held.
        inverses: Of the roots of their diagonals, float64 [m, n].
        damping: Added to each correlation of 1.

    Returns:
        None if one of them is not positive definite.
    """
    import torch

    from quantline.model.triangular import BLOCK, factor_in_place

    correlation = stack.double()
    correlation *= inverses[:, :, None]
    correlation *= inverses[:, None, :]
    correlation.diagonal(dim1=-2, dim2=-1).fill_(1 + damping)
    if stack.shape[-1] <= BLOCK:
        lower, broken = torch.linalg.cholesky_ex(correlation)
        return None if broken.any() else lower
    whole = all(factor_in_place(matrix) is not None for matrix in correlation)
    return correlation if whole else None


def _rows(count: int) -> Iterator[slice]:
    """Yield where the rows of a triangle of so many columns are, one after another."""
    start = 0
    for row in range(count):
        yield slice(start, start + row + 1)
        start += row + 1


def unpack(diagonal: np.ndarray, triangle: np.ndarray) -> np.ndarray:
    """Return the matrices float32 [..., n, n] again, with the diagonal to the bit."""
    import torch

    width = diagonal.shape[-1]
    factor = np.zeros((*diagonal.shape, width), np.float32)
    for row, span in enumerate(_rows(width)):
        factor[..., row, : row + 1] = triangle[..., span]
    lower = torch.from_numpy(factor)
    size = torch.from_numpy(diagonal).clamp(min=0).sqrt()
    lower *= size[..., None] / lower.norm(dim=-1, keepdim=True)
    product = torch.zeros_like(lower)
    for start in range(0, width, COLUMNS):
        # Rows above have zeros in these columns: a third of the whole product's work is left.
        part = lower[..., start:, start : start + COLUMNS]
        product[..., start:, start:] += part @ part.mT
    matrix = product.numpy()
    index = np.arange(width)
    matrix[..., index, index] = diagonal
    return matrix
