"""Sums over the vocabulary that next-token distributions are compared by.

Exponentials are numpy's of float32, which err by less than 3 units in the last place and are vector instructions; sums are
float64, so that the divergence of near-equal distributions is not lost among the rounding of its terms. Rows are taken a
few at a time, so that what one step makes is still in the processor's cache for the next.
"""

from collections.abc import Iterator

import numpy as np

CACHED_VALUES = 1 << 16


def _few(logits: np.ndarray) -> Iterator[slice]:
    """The rows of logits [n, m] in parts of some CACHED_VALUES values."""
    step = max(1, CACHED_VALUES // logits.shape[1])
    yield from (slice(start, start + step) for start in range(0, len(logits), step))


def _exponentials(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(e**(logits - greatest) float64 [n, m], the greatest float32 [n], the first place that has it) of logits [n, m]."""
    top = logits.argmax(1)
    high = logits[np.arange(len(logits)), top]
    return np.exp(logits - high[:, None]).astype(np.float64), high, top


def normalizers(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(log Σ e**logits float64 [n], the most probable token int64 [n]) of logits float32 [n, V]."""
    log_sum, top = np.empty(len(logits)), np.empty(len(logits), np.int64)
    with np.errstate(invalid="ignore"):  # what is not finite comes out as such
        for rows in _few(logits):
            exponentials, high, top[rows] = _exponentials(logits[rows])
            log_sum[rows] = high + np.log(exponentials.sum(1))
    return log_sum, top


def block_sums(block: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of the logits float32 [n, m] of a block of the vocabulary, and `other` [n, m], another model's: the greatest, h
    float32, the place of the first that has it int64, Σ e**(block - h) and Σ e**(block - h) (block - other) float64, all [n].
    """
    n = len(block)
    high, top, total, weighted = np.empty(n, np.float32), np.empty(n, np.int64), np.empty(n), np.empty(n)
    with np.errstate(invalid="ignore"):
        for rows in _few(block):
            exponentials, high[rows], top[rows] = _exponentials(block[rows])
            total[rows] = exponentials.sum(1)
            weighted[rows] = np.einsum("ij,ij->i", exponentials, np.subtract(block[rows], other[rows], dtype=np.float64))
    return high, top, total, weighted


def merged(high: np.ndarray, total: np.ndarray, weighted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(log Σ e**logits float64 [n], mean difference of both models' logits under the first's distribution float64 [n], the
    first block that has the greatest logit int64 [n]) from the sums of each block, `block_sums`' first, third and fourth, all
    [blocks, n].
    """
    best = high.argmax(0)
    greatest = high.max(0).astype(np.float64)
    with np.errstate(invalid="ignore"):
        shrink = np.exp(high - greatest)
        total, weighted = (shrink * total).sum(0), (shrink * weighted).sum(0)
        return greatest + np.log(total), weighted / total, best
