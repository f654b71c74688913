"""Sums over the vocabulary that next-token distributions are compared by.

Exponentials are numpy's of float32, which err by less than 3 units in the last place and are vector
instructions; sums are float64, so that the divergence of near-equal distributions is not lost among
the rounding of its terms. Rows are taken a few at a time, so that what one step makes is still in
the processor's cache for the next.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

CACHED_VALUES = 1 << 16


class Normalizers(NamedTuple):
    """Of n distributions over the whole vocabulary.

    Attributes:
        log_sum: log Σ e**logits, float64 [n].
        top: The most probable token, int64 [n].
    """

    log_sum: np.ndarray
    top: np.ndarray


class BlockSums(NamedTuple):
    """Of n distributions over a block of the vocabulary, and of a second model's logits.

    Attributes:
        high: The greatest logit, float32 [n].
        top: The first place in the block that has it, int64 [n].
        total: Σ e**(logits - high), float64 [n].
        weighted: Σ e**(logits - high) · (logits - second model's logits), float64 [n].
    """

    high: np.ndarray
    top: np.ndarray
    total: np.ndarray
    weighted: np.ndarray


class MergedSums(NamedTuple):
    """The sums of all blocks.

    Attributes:
        log_sum: log Σ e**logits, float64 [n].
        mean_difference: The mean difference of both models' logits under the first's distribution,
            float64 [n].
        best: The first block that has the greatest logit, int64 [n].
    """

    log_sum: np.ndarray
    mean_difference: np.ndarray
    best: np.ndarray


def _row_slices(logits: np.ndarray) -> Iterator[slice]:
    """Yield the rows of logits [n, m] in parts of some CACHED_VALUES values."""
    step = max(1, CACHED_VALUES // logits.shape[1])
    for start in range(0, len(logits), step):
        yield slice(start, start + step)


def _exponentials(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return e**(logits - greatest) float64 [n, m], the greatest float32 [n], and its place [n]."""
    top = logits.argmax(1)
    high = logits[np.arange(len(logits)), top]
    return np.exp(logits - high[:, None]).astype(np.float64), high, top


def normalizers(logits: np.ndarray) -> Normalizers:
    """Return the normalizer and the most probable token of logits float32 [n, vocabulary]."""
    log_sum = np.empty(len(logits))
    top = np.empty(len(logits), np.int64)
    with np.errstate(invalid="ignore"):  # what is not finite comes out as such
        for rows in _row_slices(logits):
            exponentials, high, top[rows] = _exponentials(logits[rows])
            log_sum[rows] = high + np.log(exponentials.sum(1))
    return Normalizers(log_sum, top)


def block_sums(block: np.ndarray, second: np.ndarray) -> BlockSums:
    """Sum over a block of the vocabulary.

    Args:
        block: Logits float32 [n, m].
        second: The second model's logits of the same tokens, float32 [n, m].
    """
    count = len(block)
    high = np.empty(count, np.float32)
    top = np.empty(count, np.int64)
    total = np.empty(count)
    weighted = np.empty(count)
    with np.errstate(invalid="ignore"):
        for rows in _row_slices(block):
            exponentials, high[rows], top[rows] = _exponentials(block[rows])
            total[rows] = exponentials.sum(1)
            differences = np.subtract(block[rows], second[rows], dtype=np.float64)
            weighted[rows] = np.einsum("ij,ij->i", exponentials, differences)
    return BlockSums(high, top, total, weighted)


def merge_blocks(high: np.ndarray, total: np.ndarray, weighted: np.ndarray) -> MergedSums:
    """Merge the sums of all blocks, each [blocks, n] (see BlockSums)."""
    best = high.argmax(0)
    greatest = high.max(0).astype(np.float64)
    with np.errstate(invalid="ignore"):
        shrink = np.exp(high - greatest)
        total = (shrink * total).sum(0)
        weighted = (shrink * weighted).sum(0)
        return MergedSums(greatest + np.log(total), weighted / total, best)
