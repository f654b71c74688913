"""Second moments on disk: their size per channel in single precision, and a triangular factor in half precision.

The factor is the Cholesky factor of the correlations, whose rows have length 1, so float16 neither overflows nor loses
small channels beside large ones. What comes back is a product of a matrix with itself: positive semidefinite whatever
was rounded, which rounded correlations would not be.
"""

import numpy as np

FIRST_DAMPING = 1e-7  # of a correlation of 1; about what float32 sums leave of a singular matrix


def pack(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(diagonal float32 [..., n], triangle float16 [..., n(n+1)/2]) of positive semidefinite float32 [..., n, n]."""
    import torch

    whole = torch.from_numpy(matrix).double()
    diagonal = whole.diagonal(dim1=-2, dim2=-1)
    size = diagonal.clamp(min=0).sqrt()
    inverse = torch.where(size > 0, 1 / size, 0)
    correlation = whole * inverse[..., :, None] * inverse[..., None, :]
    damping, broken = FIRST_DAMPING, torch.ones(1)
    while broken.any():
        correlation.diagonal(dim1=-2, dim2=-1).fill_(1 + damping)
        lower, broken = torch.linalg.cholesky_ex(correlation)
        damping *= 10
    rows, columns = np.tril_indices(matrix.shape[-1])
    return diagonal.float().numpy(), lower.numpy()[..., rows, columns].astype(np.float16)


def unpack(diagonal: np.ndarray, triangle: np.ndarray) -> np.ndarray:
    """The matrices float32 [..., n, n] again, with the diagonal to the bit."""
    import torch

    width = diagonal.shape[-1]
    rows, columns = np.tril_indices(width)
    factor = np.zeros((*diagonal.shape, width), np.float32)
    factor[..., rows, columns] = triangle
    lower = torch.from_numpy(factor)
    lower *= torch.from_numpy(diagonal).clamp(min=0).sqrt()[..., None] / lower.norm(dim=-1, keepdim=True)
    matrix = (lower @ lower.mT).numpy()
    index = np.arange(width)
    matrix[..., index, index] = diagonal
    return matrix
