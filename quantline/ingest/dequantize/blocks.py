"""Scales of blocks: one for a tensor, a row, a group of columns, or a rectangle of both."""

from collections.abc import Sequence

import numpy as np


def spread(
    scales: np.ndarray, shape: tuple[int, int], block: Sequence[int] | None = None
) -> np.ndarray | None:
    """Return scales in a shape that broadcasts to a weight.

    Args:
        scales: One number; [rows]; or a grid [rows / height, columns / width], whose last blocks
            may be cut short.
        shape: Of the weight, [rows, columns].
        block: Height and width of a block, if they are known; otherwise the grid divides the
            weight evenly.

    Returns:
        float32 that broadcasts to [rows, columns]; None if the scales do not fit the weight.
    """
    rows, columns = shape
    if scales.size == 1:
        return scales.reshape(1, 1)
    if scales.shape == (rows,):
        return scales.reshape(rows, 1)
    if scales.ndim != 2:
        return None
    grid_rows, grid_columns = scales.shape
    sizes = None
    if block is not None:
        height, width = (int(side) for side in block)
        if (grid_rows, grid_columns) == grid_of(shape, (height, width)):
            sizes = (height, width)
    if sizes is None:
        if not grid_rows or not grid_columns or rows % grid_rows or columns % grid_columns:
            return None
        sizes = (rows // grid_rows, columns // grid_columns)
    spread_rows = scales if sizes[0] == 1 else np.repeat(scales, sizes[0], axis=0)[:rows]
    if grid_columns == 1:
        return spread_rows
    return np.repeat(spread_rows, sizes[1], axis=1)[:, :columns]


def grid_of(shape: tuple[int, int], block: Sequence[int]) -> tuple[int, int]:
    """Return how many blocks of a height and width a weight [rows, columns] has along each side."""
    rows, columns = shape
    height, width = (int(side) for side in block)
    return -(-rows // height), -(-columns // width)


def is_one_or_rows(scales: np.ndarray, shape: tuple[int, int]) -> bool:
    """Whether scales are one for the whole weight, or one for each of its rows."""
    return scales.size == 1 or scales.shape in (shape[:1], (shape[0], 1))
