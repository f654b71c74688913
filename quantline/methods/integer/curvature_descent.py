"""Coordinate descent on tr(G Δ H Δᵀ), one pass over the elements of a weight.

H are the second moments of the layer's inputs, G those of the gradient at its outputs, through
which rows change each other's gradients. "Steps" are integers minus zero points, or the levels of
ggml's codes: how many scales a weight is from zero.
"""

import numba
import numpy as np
import torch

from quantline.methods.threads import in_threads

CHUNK_ROWS = 16  # of a column that are skipped together where none gains from moving
BLOCK_COLUMNS = 128  # whose changes are gathered before the other columns' gradient is renewed


@numba.njit(nogil=True, cache=True, fastmath=False)
def nearest_level(levels: np.ndarray, value: np.float32) -> int:
    """Return the index of the level that is nearest to a value; levels rise."""
    low = 0
    high = len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        if value > (levels[middle] + levels[middle + 1]) * np.float32(0.5):
            low = middle + 1
        else:
            high = middle
    return low


@numba.njit(nogil=True, cache=True, fastmath=False)
def _descend(
    steps: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    scales: np.ndarray,
    gradients: np.ndarray,
    fisher: np.ndarray,
    hessian: np.ndarray,
    levels: np.ndarray,
) -> np.ndarray:
    """Do one pass over some columns, transposed; return the change of the rounded weight.

    The best move of one element is -P / (G_ii H_jj), with P the gradient G Δ H. A column's own
    moves change its gradient at once; those of the columns before it do through H.

    Args:
        steps: float32 [n, rows]; they are changed.
        low: The least steps, float32 [n, rows].
        high: The greatest steps, float32 [n, rows].
        scales: float32 [n, rows].
        gradients: P of these columns at the start, float32 [n, rows]; it is changed.
        fisher: The block of G of these rows, float32 [rows, rows].
        hessian: H of these columns, float32 [n, n].
        levels: Steps are among them, rising; where there are none, they are whole numbers.
    """
    width, rows = steps.shape
    change = np.zeros((width, rows), np.float32)
    moved_products = np.empty((width, rows), np.float32)  # G times the change of a moved column
    moved_columns = np.empty(width, np.int64)
    count = 0
    gradient = np.empty(rows, np.float32)
    diagonal = np.empty(rows, np.float32)
    nearby = np.float32(0.499)  # of a step: from so near nothing moves
    for i in range(rows):
        diagonal[i] = fisher[i, i]
    for k in range(len(levels) - 1):
        nearby = min(nearby, np.float32(0.499) * (levels[k + 1] - levels[k]))
    for j in range(width):
        start = gradients[j]
        own = hessian[j, j]
        unmoved = True
        for k in range(count):
            share = hessian[moved_columns[k], j]
            for i in range(rows):
                start[i] += moved_products[k, i] * share
        gradient[:] = start
        for first in range(0, rows, CHUNK_ROWS):
            last = min(first + CHUNK_ROWS, rows)
            far = 0
            for i in range(first, last):
                far += abs(gradient[i]) > nearby * own * diagonal[i] * abs(scales[j, i])
            if not far:
                continue
            for i in range(first, last):
                scale = scales[j, i]
                curvature = diagonal[i] * own * scale
                # It is 0 where it underflows, or where the output does not matter.
                wanted = steps[j, i] - gradient[i] / curvature if curvature else steps[j, i]
                wanted = levels[nearest_level(levels, wanted)] if len(levels) else np.rint(wanted)
                wanted = min(max(wanted, low[j, i]), high[j, i])
                if wanted != steps[j, i]:
                    move = (wanted - steps[j, i]) * scale
                    unmoved = False
                    steps[j, i] = wanted
                    change[j, i] = move
                    move *= own
                    for k in range(rows):
                        gradient[k] += fisher[i, k] * move
        if not unmoved:  # G times the change follows from what it did to the column's gradient
            moved_products[count] = (gradient - start) / own
            moved_columns[count] = j
            count += 1
    return change


def descend(
    steps: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    scales: torch.Tensor,
    hessian_product: torch.Tensor,
    hessian: torch.Tensor,
    fisher_out: torch.Tensor,
    levels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the steps after one pass of coordinate descent on tr(G Δ H Δᵀ).

    All tensors are on the CPU, where the compiled kernel runs. Rows of different blocks of G do not
    change each other's gradients, and run in threads; the result does not depend on their number.

    Args:
        steps: float32 [out, in].
        low: The least steps, float32 [out, in].
        high: The greatest steps, float32 [out, in].
        scales: float32 [out, in], not zero.
        hessian_product: Δ H, float32 [out, in]; it is changed to that of the new steps.
        hessian: H, float32 [in, in], positive on its diagonal.
        fisher_out: G, float32 [blocks, n, n], positive on the diagonals.
        levels: Steps are among them, float32, rising; among the whole numbers where it is None.

    Returns:
        float32 [out, in].
    """
    steps = steps.clone()
    size = fisher_out.shape[1]
    level_values = np.empty(0, np.float32) if levels is None else levels.numpy()

    def run(number: int) -> None:
        rows = slice(number * size, (number + 1) * size)
        fisher = fisher_out[number].contiguous()
        for start in range(0, steps.shape[1], BLOCK_COLUMNS):
            span = slice(start, start + BLOCK_COLUMNS)
            part = steps[rows, span].T.contiguous()
            change = _descend(
                part.numpy(),
                low[rows, span].T.contiguous().numpy(),
                high[rows, span].T.contiguous().numpy(),
                scales[rows, span].T.contiguous().numpy(),
                (hessian_product[rows, span].T @ fisher).numpy(),
                fisher.numpy(),
                hessian[span, span].contiguous().numpy(),
                level_values,
            )
            steps[rows, span] = part.T
            hessian_product[rows].addmm_(torch.from_numpy(change).T, hessian[span])

    in_threads(range(len(fisher_out)), run)
    return steps
