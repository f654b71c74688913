"""The scales, minima, d and dmin of ggml's blocks, moved for fixed codes to where tr(G Δ H Δᵀ) is least.

A coordinate descent over what the format can store: of one row and one sub-block, the integer scale and minimum
together; of one row and one block, d and dmin together. With directions a and b in the columns, a row's Δ changes by
x a + y b, and the figure by a quadratic form in x and y; the best pair that can be stored is taken if it lowers the
figure.
"""

import numba
import numpy as np
import torch

from quantline.methods.ggml.block_types import BlockType, Blocks
from quantline.methods.threads import in_threads

LARGEST_HALF = 65504.0


@numba.njit(nogil=True, cache=True, fastmath=False)
def half(value):
    """A float32 rounded to what float16 holds, ties to even; infinity beyond its range."""
    if abs(value) < np.float32(2.0**-14):
        return np.rint(value * np.float32(2.0**24)) * np.float32(2.0**-24)
    scale = np.float32(2.0) ** (np.floor(np.log2(np.float64(abs(value)))) - 10)
    rounded = np.float32(np.rint(value / scale) * scale)
    return rounded if abs(rounded) <= LARGEST_HALF else np.float32(np.inf) * np.sign(value)


@numba.njit(nogil=True, cache=True, fastmath=False)
def _fitting(value, whole, low, high):
    """The value that the format holds that is nearest."""
    return min(max(np.rint(value), low), high) if whole else half(value)


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
def _move(first, second, felt_first, felt_second, p, q, whole, p_range, q_range, pull, factor):
    """One pass over the rows of some columns [rows, n]; returns the change of the rounded weight [rows, n].

    first, second [rows, n]: what one unit of p and q [rows] adds to the weight; a second of zeros has no q. `felt_*` are
    these times H. p and q are changed; `pull`, P = G Δ H of these columns, is scratch: it changes only where it is still
    to be read.
    """
    rows, width = first.shape
    change, felt = np.zeros((rows, width), np.float32), np.empty(width, np.float32)
    for i in range(rows):
        a, b, heavy_a, heavy_b = first[i], second[i], felt_first[i], felt_second[i]
        aa, ab, bb, slope_a, slope_b = np.float32(0), np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        for j in range(width):
            aa += a[j] * heavy_a[j]
            ab += a[j] * heavy_b[j]
            bb += b[j] * heavy_b[j]
            slope_a += a[j] * pull[i, j]
            slope_b += b[j] * pull[i, j]
        aa, ab, bb = aa * factor[i, i], ab * factor[i, i], bb * factor[i, i]
        det = aa * bb - ab * ab
        if bb > 0 and det > np.float32(1e-4) * aa * bb:
            wanted = (ab * slope_b - bb * slope_a) / det
        elif aa > 0:
            wanted = -slope_a / aa
        else:
            wanted = np.float32(0)
        least, best_x, best_y = np.float32(0), np.float32(0), np.float32(0)
        for trial in range(4 if whole else 2):
            x = np.float32(0)
            if trial > 0 and aa > 0:  # not moved, the nearest, and its neighbours
                step = np.float32(0) if trial == 1 else np.float32(2 * trial - 5)
                x = _fitting(p[i] + wanted + step, whole, p_range[0], p_range[1]) - p[i]
            y = np.float32(0)
            if bb > 0:
                y = _fitting(q[i] - (slope_b + ab * x) / bb, whole, q_range[0], q_range[1]) - q[i]
            cost = np.float32(2) * (slope_a * x + slope_b * y) + aa * x * x + np.float32(2) * ab * x * y + bb * y * y
            if cost < least:
                least, best_x, best_y = cost, x, y
        if least < 0:
            p[i] += best_x
            q[i] += best_y
            for j in range(width):
                change[i, j] = best_x * a[j] + best_y * b[j]
                felt[j] = best_x * heavy_a[j] + best_y * heavy_b[j]
            for k in range(i + 1, rows):  # the rows before have had their turn
                for j in range(width):
                    pull[k, j] += factor[i, k] * felt[j]
    return change


def refit(weight: torch.Tensor, kind: BlockType, blocks: Blocks, moment: torch.Tensor, factors: torch.Tensor) -> Blocks:
    """The blocks of a weight [out, in] with scales, minima, d and dmin after one pass; the codes stay.

    moment [in, in] and factors [blocks, size, size] as for curvature.descend. The result does not depend on the number
    of threads.
    """
    rows, width = weight.shape
    shaped = [part.reshape(rows, width // kind.size, -1) for part in blocks.parts()]
    levels = kind.levels[shaped[0]]
    scales, minima, d, dmin = (part.astype(np.float32) for part in shaped[1:])
    whole = torch.from_numpy(kind.dequantize(blocks)).reshape(weight.shape) - weight
    size, limit = rows // len(factors), (np.float32(-LARGEST_HALF), np.float32(LARGEST_HALF))
    p_range = limit if kind.scales is None else tuple(np.float32(one) for one in kind.scales)
    q_range = (np.float32(0), np.float32(kind.minima or 0))

    def moved(first: np.ndarray, second: np.ndarray, moment: torch.Tensor, pull: torch.Tensor, factor: torch.Tensor,
              *grid) -> torch.Tensor:
        felt = [(torch.from_numpy(one) @ moment).numpy() for one in (first, second)]
        return torch.from_numpy(_move(first, second, *felt, *grid, pull.clone().numpy(), factor.numpy()))

    def run(number: int) -> None:
        own, factor = slice(number * size, (number + 1) * size), factors[number].contiguous()
        pull = factor @ whole[own] @ moment
        for block in range(width // kind.size):
            span = slice(block * kind.size, (block + 1) * kind.size)
            heavy = moment[span, span]
            wide = scales[own, block].repeat(kind.sub, 1) * levels[own, block]
            low = -minima[own, block].repeat(kind.sub, 1)
            changes = moved(wide, low, heavy, pull[:, span], factor, d[own, block, 0], dmin[own, block, 0], False, limit, limit)
            local = pull[:, span] + factor @ changes @ heavy
            for sub in range(kind.size // kind.sub if kind.scales else 0):
                part = slice(sub * kind.sub, (sub + 1) * kind.sub)
                one = d[own, block] * levels[own, block, part]
                other = np.zeros_like(one)
                if kind.minima:
                    other -= dmin[own, block]
                change = moved(one, other, heavy[part, part], local[:, part], factor, scales[own, block, sub],
                               minima[own, block, sub], True, p_range, q_range)
                changes[:, part] += change
                local += factor @ change @ heavy[part]
            pull += factor @ changes @ moment[span]

    in_threads(range(len(factors)), run)
    return Blocks(blocks.codes, *(part.astype(old.dtype).reshape(old.shape) for part, old in
                                  zip((scales, minima, d, dmin), blocks.parts()[1:], strict=True)))
