"""Error weights of ggml's k-quant search, sixteen blocks at once (ggml-quants.c).

The letters and tiles are those of scale_search.py.
"""

import numpy as np

from quantline.methods.ggml.simd16 import (
    Vector,
    absolute,
    broadcast,
    compiled,
    load,
    square_root,
    store,
)

F = np.float32
# Kinds of error weights where there is no importance matrix.
BY_SQUARE = 0
BY_MAGNITUDE = 1
BY_MAGNITUDE_AND_MEAN = 2


@compiled
def fill_error_weights(
    x: np.ndarray,
    importance: np.ndarray,
    error_weights: np.ndarray,
    start: int,
    count: int,
    use_importance: bool,
    sigma: Vector,
    unweighted_kind: int,
) -> Vector:
    """Write what the errors of a sub-block weigh.

    Args:
        x: Weights of a block, tile [256, …].
        importance: Of their inputs, tile [256, …].
        error_weights: Filled, tile [count, …].
        start: The sub-block's first row.
        count: Its rows.
        use_importance: Whether an error weighs its importance times √(sigma + x²).
        sigma: Added to x² there.
        unweighted_kind: What an error weighs without importance: x² (BY_SQUARE), |x|
            (BY_MAGNITUDE), or |x| plus the root mean square of the sub-block
            (BY_MAGNITUDE_AND_MEAN).

    Returns:
        The sum of what was written.
    """
    total = broadcast(F(0))
    mean = broadcast(F(0))
    if unweighted_kind == BY_MAGNITUDE_AND_MEAN and not use_importance:
        for i in range(count):
            mean = mean + load(x, start + i) * load(x, start + i)
        mean = square_root(mean / F(count))
    for i in range(count):
        value = load(x, start + i)
        if use_importance:
            weight = load(importance, start + i) * square_root(sigma + value * value)
        else:
            weight = value * value if unweighted_kind == BY_SQUARE else mean + absolute(value)
        store(error_weights, i, weight)
        total = total + weight
    return total


@compiled
def scaled_mean_square(x: np.ndarray, factor: np.float32) -> Vector:
    """Return `factor` times the mean square of a block, tile [256, …]."""
    total = broadcast(F(0))
    for i in range(256):
        total = total + load(x, i) * load(x, i)
    return factor * total / F(256)
