"""Second moments on disk: their diagonal in single precision, a triangular factor in half.

The factor is the Cholesky factor of the correlations, whose rows have length 1, so that float16
neither overflows nor loses small channels beside large ones. What is read back is a product of a
matrix with its transpose: positive semidefinite whatever was rounded, which rounded correlations
would not be.
"""

import numpy as np

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

    moments = torch.from_numpy(matrix).double()
    diagonal = moments.diagonal(dim1=-2, dim2=-1)
    size = diagonal.clamp(min=0).sqrt()
    inverse = torch.where(size > 0, 1 / size, 0)
    correlation = moments * inverse[..., :, None] * inverse[..., None, :]
    damping = FIRST_DAMPING
    broken = torch.ones(1)
    while broken.any():
        correlation.diagonal(dim1=-2, dim2=-1).fill_(1 + damping)
        lower, broken = torch.linalg.cholesky_ex(correlation)
        damping *= 10
    rows, columns = np.tril_indices(matrix.shape[-1])
    triangle = lower.numpy()[..., rows, columns].astype(np.float16)
    return diagonal.float().numpy(), triangle


def unpack(diagonal: np.ndarray, triangle: np.ndarray) -> np.ndarray:
    """Return the matrices float32 [..., n, n] again, with the diagonal to the bit."""
    import torch

    width = diagonal.shape[-1]
    rows, columns = np.tril_indices(width)
    factor = np.zeros((*diagonal.shape, width), np.float32)
    factor[..., rows, columns] = triangle
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
