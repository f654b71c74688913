"""GPTQ's error feedback (Frantar et al. 2022, algorithm 1) within ggml's grids.

Columns are rounded in their order. When it reaches a block, ggml's search chooses the block's
scales and minima for the weights as they are by then.
"""

import numba
import numpy as np
import torch

from quantline.methods.ggml.blocks import Blocks, BlockType
from quantline.methods.ggml.quantize import quantize_blocks
from quantline.methods.integer.curvature_descent import nearest_level
from quantline.methods.integer.inverse_factor import inverse_factor
from quantline.methods.threads import run_over_rows


@numba.njit(nogil=True, cache=True, fastmath=False)
def _round_rows(
    remaining: np.ndarray,
    scale: np.ndarray,
    minimum: np.ndarray,
    levels: np.ndarray,
    lowest_code: int,
    factor: np.ndarray,
    codes: np.ndarray,
    errors: np.ndarray,
) -> None:
    """Round columns one by one within their grids, and push each error onto those that follow.

    A code whose scale is zero stands for nothing, and stays.

    Args:
        remaining: The weights with the errors of columns before in them [rows, n]; they change.
        scale: Of each weight [rows, n].
        minimum: Of each weight [rows, n].
        levels: What codes stand for.
        lowest_code: The least code that is used.
        factor: These columns' part of U [n, n].
        codes: [rows, n]; they change.
        errors: Filled [rows, n].
    """
    rows, width = remaining.shape
    for row in range(rows):
        for j in range(width):
            s = scale[row, j]
            m = minimum[row, j]
            if s != 0:
                code = nearest_level(levels, (remaining[row, j] + m) / s)
                codes[row, j] = max(code, lowest_code)
            error = (remaining[row, j] - (s * levels[codes[row, j]] - m)) / factor[j, j]
            errors[row, j] = error
            # Loops that start at 0 over slices become vector instructions.
            after = remaining[row, j + 1 :]
            share = factor[j, j + 1 :]
            for k in range(len(share)):
                after[k] -= error * share[k]


def round_block_columns(
    weight: torch.Tensor, block_type: BlockType, blocks: Blocks, factor: torch.Tensor
) -> tuple[Blocks, torch.Tensor]:
    """Round the columns of one block of each row, in threads.

    Args:
        weight: [rows, block size].
        block_type: The blocks' type.
        blocks: One block for each row, whose scales and minima stay.
        factor: These columns' part of U [block size, block size].

    Returns:
        The blocks with new codes, and what the weight of each column loses, divided by the diagonal
        of the factor, [rows, block size].
    """
    scale, minimum = blocks.grid
    scale = scale.repeat(block_type.sub_block_size, 1)
    minimum = minimum.repeat(block_type.sub_block_size, 1)
    remaining = weight.numpy().copy()
    upper = factor.contiguous().numpy()
    codes = blocks.codes.copy()
    errors = np.empty_like(remaining)

    def run(rows: slice) -> None:
        _round_rows(
            remaining[rows],
            scale[rows],
            minimum[rows],
            block_type.levels,
            block_type.lowest_code,
            upper,
            codes[rows],
            errors[rows],
        )

    run_over_rows(len(remaining), run)
    rounded = Blocks(codes, blocks.scales, blocks.minima, blocks.d, blocks.dmin)
    return rounded, torch.from_numpy(errors)


def quantize_with_feedback(
    weight: torch.Tensor, block_type: BlockType, hessian: torch.Tensor, damping: float
) -> tuple[Blocks, float]:
    """Round a weight block by block with GPTQ's error feedback.

    Args:
        weight: float32 [out, in].
        block_type: The blocks' type.
        hessian: H, float32 [in, in].
        damping: Share of the mean diagonal that is added to H.

    Returns:
        The blocks, row by row, and the damping that was used.

    Raises:
        StageError: As `inverse_factor` does; non_finite.
    """
    upper, damping = inverse_factor(hessian, damping)
    remaining = weight.clone()
    importance = hessian.diagonal().numpy()
    rounded = []
    for start in range(0, weight.shape[1], block_type.block_size):
        span = slice(start, start + block_type.block_size)
        after = slice(start + block_type.block_size, None)
        columns = remaining[:, span]
        searched = quantize_blocks(
            columns.numpy(), block_type.name, importance[span], kernel="numba"
        )
        grid = block_type.unpack(searched)
        blocks, errors = round_block_columns(columns, block_type, grid, upper[span, span])
        remaining[:, after] -= errors @ upper[span, after]
        rounded.append(blocks.fields())
    fields = []
    for parts in zip(*rounded, strict=True):  # one part for each block of a row
        fields.append(np.stack(parts, 1).reshape(-1, parts[0].shape[1]))
    return Blocks(*fields), damping
