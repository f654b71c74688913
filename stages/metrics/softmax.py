"""Sums over the vocabulary that next-token distributions are compared by, in one pass over their logits.

The exponential is Cephes' expf: it errs by 1e-7 of itself at most and, unlike a call of the C library, the compiler makes
vector instructions of it. Sums are float64.
"""

import numba
import numpy as np

FAST = {"reassoc", "contract", "nsz"}  # not nnan and ninf: what is not finite must come out as such
FLOAT = np.float32


@numba.njit(nogil=True, cache=True, fastmath={"contract"})
def exp(x: np.float32) -> np.float32:
    """e**x for x <= 0; below -87 what it is there, 1.6e-38. NaN stays NaN."""
    x = FLOAT(-87) if x < FLOAT(-87) else x  # noqa: FURB136  max would drop NaN
    whole = np.floor(x * FLOAT(1.44269504) + FLOAT(0.5))
    rest = (x - whole * FLOAT(0.693359375)) - whole * FLOAT(-2.12194440e-4)
    y = FLOAT(1.9875691500e-4) * rest + FLOAT(1.3981999507e-3)
    y = y * rest + FLOAT(8.3334519073e-3)
    y = y * rest + FLOAT(4.1665795894e-2)
    y = y * rest + FLOAT(1.6666665459e-1)
    y = y * rest + FLOAT(5.0000001201e-1)
    y = y * (rest * rest) + rest + FLOAT(1)
    return y * np.int32((whole + FLOAT(127)) * FLOAT(8388608)).view(np.float32)  # times two to the `whole`


@numba.njit(nogil=True, cache=True, fastmath=FAST)
def greatest(row: np.ndarray) -> tuple[np.float32, int]:
    """(the greatest value of row [n], the first place that has it)."""
    high = row[0]
    for value in row:
        high = value if value > high else high  # noqa: FURB136
    for place in range(len(row)):
        if row[place] == high:
            return high, place
    return high, 0


@numba.njit(nogil=True, cache=True, fastmath=FAST)
def exp_sum(row: np.ndarray, high: np.float32) -> float:
    """Σ e**(row - high)."""
    total = 0.0
    for value in row:
        total += np.float64(exp(value - high))
    return total


@numba.njit(nogil=True, cache=True, fastmath=FAST)
def exp_sums(row: np.ndarray, other: np.ndarray, high: np.float32) -> tuple[float, float]:
    """(Σ e, Σ e (row - other)) with e = e**(row - high)."""
    total, weighted = 0.0, 0.0
    for place in range(len(row)):
        weight = np.float64(exp(row[place] - high))
        total += weight
        weighted += weight * (np.float64(row[place]) - np.float64(other[place]))
    return total, weighted


@numba.njit(nogil=True, cache=True)
def normalizers(logits: np.ndarray, log_sum: np.ndarray, top: np.ndarray) -> None:
    """Fill log_sum float64 [n] with log Σ e**logits and top int64 [n] with the most probable token, logits [n, V]."""
    for row in range(len(logits)):
        high, top[row] = greatest(logits[row])
        log_sum[row] = high + np.log(exp_sum(logits[row], high))


@numba.njit(nogil=True, cache=True)
def take_block(block: np.ndarray, start: int, other: np.ndarray, following: np.ndarray, high: np.ndarray,
               total: np.ndarray, weighted: np.ndarray, top: np.ndarray, wanted: np.ndarray) -> None:
    """Add to the running sums of n tokens the logits block [n, m] of the tokens from `start` on; `other` [n, V] are the
    logits of another model.

    `high` is the greatest logit so far, which `total` = Σ e**(logit - high) and `weighted`, the same times the difference
    of both models' logits, refer to; `top` has its token, and `wanted` the logit of the token `following`. float64 [n]
    but for the tokens.
    """
    for row in range(len(block)):
        highest, place = greatest(block[row])
        if highest > high[row]:
            shrink = np.exp(high[row] - highest)
            total[row] *= shrink
            weighted[row] *= shrink
            high[row], top[row] = highest, start + place
        sums = exp_sums(block[row], other[row, start:start + block.shape[1]], FLOAT(high[row]))
        total[row] += sums[0]
        weighted[row] += sums[1]
        if start <= following[row] < start + block.shape[1]:
            wanted[row] = block[row, following[row] - start]
