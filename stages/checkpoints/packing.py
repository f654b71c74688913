"""Symmetric matrices on disk: the upper triangle as correlations in half precision, the diagonal in single.

A correlation is at most 1, so float16 neither overflows nor loses small channels beside large ones, and each entry is
off by at most 2^-12 of its two channels' sizes: far below the damping under which every method uses the matrices.
"""

import numpy as np


def pack(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(diagonal float32 [..., n], triangle float16 [..., n(n-1)/2]) of symmetric matrices float32 [..., n, n]."""
    diagonal = np.ascontiguousarray(np.diagonal(matrix, axis1=-2, axis2=-1))
    size = np.sqrt(np.maximum(diagonal, 0))
    inverse = np.divide(1, size, out=np.zeros_like(size), where=size > 0)
    rows, columns = np.triu_indices(matrix.shape[-1], 1)
    correlation = matrix[..., rows, columns] * inverse[..., rows] * inverse[..., columns]
    return diagonal, np.clip(correlation, -1, 1).astype(np.float16)


def unpack(diagonal: np.ndarray, triangle: np.ndarray) -> np.ndarray:
    """The matrices float32 [..., n, n] again."""
    width = diagonal.shape[-1]
    size = np.sqrt(np.maximum(diagonal, 0))
    rows, columns = np.triu_indices(width, 1)
    matrix = np.zeros((*diagonal.shape, width), np.float32)
    matrix[..., rows, columns] = triangle.astype(np.float32) * size[..., rows] * size[..., columns]
    matrix += np.swapaxes(matrix, -1, -2)
    index = np.arange(width)
    matrix[..., index, index] = diagonal
    return matrix
