"""Curvature rounding inside ggml's grids: the file and its size are those of a k-quant, the divergence is not.

First GPTQ's error feedback (Frantar et al. 2022, algorithm 1) in the order of the columns: when the solve reaches a
block, ggml's search chooses its scales and minima on the weights as they are by then. Then rounds over everything that
the blocks store, first scales, minima, d and dmin (kquant_scales.py), then codes, down tr(G Δ H Δᵀ), which the
divergence follows (curvature.py).
"""

import numba
import numpy as np
import torch

from quantline.methods.ggml import quantize as kquant
from quantline.methods.integer.curvature import DAMPING_OUT, damped, descend, divergence, nearest
from quantline.methods.ggml.block_types import BlockType, Blocks, block_type
from quantline.methods.integer.gptq import inverse_factor
from quantline.methods.ggml.scale_refit import refit
from quantline.methods.threads import over_rows

ROUNDS = 4  # scales and codes in turn; by then the figure hardly falls any more
DAMPING_IN = 0.1  # share of the mean diagonal that the rounds add to H; on unseen text better than curvature.py's


@numba.njit(nogil=True, cache=True, fastmath=False)
def _round_rows(left, scale, minimum, levels, lowest, factor, codes, errors):
    """Round columns [rows, n] one by one within their grids, pushing each error onto the columns after it.

    left, codes and errors are changed. A code whose scale is zero says nothing and stays.
    """
    rows, width = left.shape
    for row in range(rows):
        for j in range(width):
            s, m = scale[row, j], minimum[row, j]
            if s != 0:
                codes[row, j] = max(nearest(levels, (left[row, j] + m) / s), lowest)
            error = (left[row, j] - (s * levels[codes[row, j]] - m)) / factor[j, j]
            errors[row, j] = error
            after, share = left[row, j + 1:], factor[j, j + 1:]  # loops from 0 over these become vector instructions
            for k in range(len(share)):
                after[k] -= error * share[k]


def round_block(left: torch.Tensor, kind: BlockType, blocks: Blocks,
                factor: torch.Tensor) -> tuple[Blocks, torch.Tensor]:
    """(one block of each row with new codes, their errors [rows, size]) for the weights `left` [rows, size].

    factor [size, size] is these columns' part of U. Rows run in threads.
    """
    scale, minimum = (part.repeat(kind.sub, 1) for part in blocks.grid)
    left, factor, codes = left.numpy().copy(), factor.contiguous().numpy(), blocks.codes.copy()
    errors = np.empty_like(left)

    def run(rows: slice) -> None:
        _round_rows(left[rows], scale[rows], minimum[rows], kind.levels, kind.lowest, factor, codes[rows], errors[rows])

    over_rows(len(left), run)
    return Blocks(codes, *blocks.parts()[1:]), torch.from_numpy(errors)


def feed_back(weight: torch.Tensor, kind: BlockType, moment: torch.Tensor, damping: float) -> tuple[Blocks, float]:
    """(the blocks of a weight [out, in] with error feedback, row by row, the damping that was used).

    Raises as gptq.inverse_factor does.
    """
    upper, damping = inverse_factor(moment, damping)
    left, importance, made = weight.clone(), moment.diagonal().numpy(), []
    for start in range(0, weight.shape[1], kind.size):
        span, after = slice(start, start + kind.size), slice(start + kind.size, None)
        grid = kind.unpack(kquant.quantize(left[:, span].numpy(), kind.name, importance[span], kernel="numba"))
        blocks, errors = round_block(left[:, span], kind, grid, upper[span, span])
        left[:, after] -= errors @ upper[span, after]
        made.append(blocks.parts())
    return Blocks(*(np.stack(parts, 1).reshape(-1, parts[0].shape[1]) for parts in zip(*made, strict=True))), damping


def descend_codes(weight: torch.Tensor, kind: BlockType, blocks: Blocks, moment: torch.Tensor,
                  factors: torch.Tensor) -> Blocks:
    """The blocks with codes after one pass of curvature.descend; scales and minima stay, and codes without a scale."""
    scale, minimum = (torch.from_numpy(part.repeat(kind.sub, 1)).reshape(weight.shape) for part in blocks.grid)
    levels, codes = torch.from_numpy(kind.levels), torch.from_numpy(blocks.codes).reshape(weight.shape)
    mute = scale == 0
    steps, low, high = (torch.where(mute, 0, one) for one in
                        (levels[codes.long()], levels[kind.lowest].expand_as(scale), levels[-1].expand_as(scale)))
    spread = torch.where(mute, 1, scale)
    found = descend(steps, low, high, spread, (steps * spread - minimum - weight) @ moment, moment, factors,
                    None if kind.uniform else levels)
    codes = torch.where(mute, codes, torch.searchsorted(levels, found).to(torch.uint8))
    return Blocks(codes.numpy().reshape(blocks.codes.shape), *blocks.parts()[1:])


def quantize(weight: np.ndarray, kind: str, moment: np.ndarray, factors: np.ndarray, damping: float = 0.01,
             rounds: int = ROUNDS) -> tuple[np.ndarray, float]:
    """(ggml blocks uint8 [out, bytes per row] of a weight float32 [out, in], the damping that was used).

    `moment` H [in, in]; `factors` [blocks, size, size], the diagonal blocks of G. `kind` is a type of ggml_blocks.
    Raises StageError: non_finite if a weight is not finite, and as gptq.inverse_factor does.
    """
    one = block_type(kind)
    weight, moment, factors = (torch.from_numpy(np.ascontiguousarray(part)) for part in (weight, moment, factors))
    inner, outer = damped(moment, DAMPING_IN), damped(factors, DAMPING_OUT)

    def cost(blocks: Blocks) -> float:
        return divergence(torch.from_numpy(one.dequantize(blocks)).reshape(weight.shape) - weight, inner, outer)

    blocks, damping = feed_back(weight, one, moment, damping)
    best = cost(blocks), blocks
    for _ in range(rounds):
        blocks = descend_codes(weight, one, refit(weight, one, blocks, inner, outer), inner, outer)
        best = min(best, (cost(blocks), blocks), key=lambda found: found[0])
    return one.pack(best[1]).reshape(len(weight), -1), damping
