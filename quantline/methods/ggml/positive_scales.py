"""The scale of positive values, sixteen blocks at once (ggml-quants.c).

The scales and minima of a k-quant's sub-blocks are rounded in turn, with d and dmin for scales. The
choices are ggml's, as in scale_search.py, whose letters are used here too.
"""

import numpy as np

from quantline.methods.ggml.scale_search import EPSILON, descend_codes
from quantline.methods.ggml.simd16 import (
    Vector,
    broadcast,
    clip,
    compiled,
    load,
    round_to_even,
    select_less,
    store,
)

F = np.float32


@compiled
def search_positive_scale(
    x: np.ndarray, error_weights: np.ndarray, codes: np.ndarray, count: int, top_code: np.float32
) -> Vector:
    """Search the scale of positive values (make_qp_quants).

    Args:
        x: Values, tile [count, …].
        error_weights: What their errors weigh, tile [count, …].
        codes: Filled with codes from 0 to top_code, tile [count, …].
        count: Rows.
        top_code: The greatest code.

    Returns:
        The scale.
    """
    zero = broadcast(F(0))
    largest = broadcast(F(0))
    for i in range(count):
        value = load(x, i)
        largest = select_less(largest, value, value, largest)
    best_inverse = broadcast(top_code) / largest
    least_error = zero
    for trial in range(9):
        offset = trial - 5 if trial < 5 else trial - 4
        nudge = F(0) if trial == 0 else F(offset)
        inverse = broadcast(F(0.1) * nudge + top_code) / largest
        scale = broadcast(F(1)) / inverse
        trial_error = zero
        for i in range(count):
            code = clip(round_to_even(inverse * load(x, i)), F(0), top_code)
            error = load(x, i) - scale * code
            trial_error = trial_error + load(error_weights, i) * error * error
        if trial == 0:
            least_error = trial_error
        best_inverse = select_less(trial_error, least_error, inverse, best_inverse)
        least_error = select_less(trial_error, least_error, trial_error, least_error)
    for i in range(count):
        store(codes, i, clip(round_to_even(best_inverse * load(x, i)), F(0), top_code))
    scale = descend_codes(x, error_weights, codes, 0, count, F(0), top_code, True)
    for i in range(count):
        store(codes, i, select_less(largest, EPSILON, zero, load(codes, i)))
    return select_less(largest, EPSILON, zero, scale)


@compiled
def scale_to_largest(x: np.ndarray, codes: np.ndarray, count: int, top_code: np.float32) -> Vector:
    """Return the scale of positive values that gives the largest the greatest code.

    Args:
        x: Values, tile [count, …].
        codes: Filled with codes from 0 to top_code, tile [count, …].
        count: Rows.
        top_code: The greatest code.
    """
    zero = broadcast(F(0))
    largest = broadcast(F(0))
    for i in range(count):
        largest = select_less(largest, load(x, i), load(x, i), largest)
    inverse = select_less(zero, largest, broadcast(top_code) / largest, zero)
    for i in range(count):
        store(codes, i, clip(round_to_even(inverse * load(x, i)), F(0), top_code))
    return largest / top_code
