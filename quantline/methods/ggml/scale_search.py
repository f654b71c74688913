"""The searches of ggml's k-quants for the scale of a sub-block (ggml-quants.c).

Each function does for the same sub-block of sixteen blocks at once what ggml does for one: the
choices are ggml's, operation by operation and in its order, so the results are too, bit for bit,
where ggml is compiled without fused multiply-add, as it is by default on x86.

A tile is float32 [rows, VECTOR_WIDTH], with a block in each column. The letters are ggml's: x are
the weights, l the codes; of sums over a sub-block, lx is Σ w l x and ll is Σ w l².
"""

import numpy as np

from quantline.methods.ggml.simd16 import (
    Vector,
    absolute,
    any_less,
    broadcast,
    clip,
    compiled,
    load,
    round_to_even,
    select_equal,
    select_less,
    store,
)

F = np.float32
EPSILON = F(1e-15)  # a sub-block whose weights are all of smaller magnitude is taken for zeros


@compiled
def search_scale_and_minimum(
    x: np.ndarray,
    error_weights: np.ndarray,
    codes: np.ndarray,
    start: int,
    count: int,
    top_code: np.float32,
    first_step: np.float32,
    step: np.float32,
    steps: int,
    absolute_errors: bool,
) -> tuple[Vector, Vector, Vector, Vector]:
    """Search scale and minimum of a sub-block (make_qkx2_quants and make_qkx3_quants).

    Tries inverse scales around top_code / range, fits scale and minimum to each by weighted least
    squares, and takes those with the least weighted error. As in ggml, what is tried next starts
    from the minimum that was taken.

    Args:
        x: Weights, a tile.
        error_weights: What the errors of the sub-block weigh, tile [count, …].
        codes: Scratch, tile [count, …].
        start: The sub-block's first row of x.
        count: Its rows.
        top_code: The greatest code.
        first_step: What the first trial adds to top_code.
        step: By how much every further trial adds more.
        steps: Trials after the first.
        absolute_errors: Whether errors count by their magnitude, or by their square.

    Returns:
        The scale, the minimum, and the inverse scale and origin that the codes were made with.
    """
    zero = broadcast(F(0))
    nan = broadcast(F(np.nan))
    low = load(x, start)
    high = low
    weight_sum = load(error_weights, 0)
    x_sum = weight_sum * low
    for i in range(1, count):
        value = load(x, start + i)
        weight = load(error_weights, i)
        low = select_less(value, low, value, low)
        high = select_less(high, value, value, high)
        weight_sum = weight_sum + weight
        x_sum = x_sum + weight * value
    low = select_less(zero, low, zero, low)
    varies = select_equal(high, low, zero, broadcast(F(1)))
    best_inverse = broadcast(top_code) / (high - low)
    origin = low
    scale = broadcast(F(1)) / best_inverse
    least_error = zero
    for i in range(count):
        value = load(x, start + i)
        code = clip(round_to_even(best_inverse * (value - low)), F(0), top_code)
        error = scale * code + low - value
        size = absolute(error) if absolute_errors else error * error
        least_error = least_error + load(error_weights, i) * size
    for trial in range(steps + 1):
        inverse = broadcast(first_step + step * F(trial) + top_code) / (high - low)
        l_sum = zero
        ll = zero
        lx = zero
        for i in range(count):
            value = load(x, start + i)
            code = clip(round_to_even(inverse * (value - low)), F(0), top_code)
            store(codes, i, code)
            weighted_code = load(error_weights, i) * code
            l_sum = l_sum + weighted_code
            ll = ll + weighted_code * code
            lx = lx + weighted_code * value
        determinant = weight_sum * ll - l_sum * l_sum
        trial_scale = (weight_sum * lx - x_sum * l_sum) / determinant
        trial_low = (ll * x_sum - l_sum * lx) / determinant
        # A minimum above zero is none; then the scale is fitted alone.
        trial_scale = select_less(zero, trial_low, lx / ll, trial_scale)
        trial_low = select_less(zero, trial_low, zero, trial_low)
        trial_error = select_less(zero, determinant, zero, nan)  # NaN is never less
        for i in range(count):
            error = trial_scale * load(codes, i) + trial_low - load(x, start + i)
            size = absolute(error) if absolute_errors else error * error
            trial_error = trial_error + load(error_weights, i) * size
        best_inverse = select_less(trial_error, least_error, inverse, best_inverse)
        scale = select_less(trial_error, least_error, trial_scale, scale)
        origin = select_less(trial_error, least_error, low, origin)
        low = select_less(trial_error, least_error, trial_low, low)
        least_error = select_less(trial_error, least_error, trial_error, least_error)
    scale = select_equal(varies, zero, zero, scale)
    return scale, zero - low, select_equal(varies, zero, zero, best_inverse), origin


@compiled
def largest_weight(x: np.ndarray, start: int, count: int) -> Vector:
    """Return the weight of the greatest magnitude in rows start … of x, with its sign."""
    magnitude = broadcast(F(0))
    largest = broadcast(F(0))
    for i in range(count):
        value = load(x, start + i)
        largest = select_less(magnitude, absolute(value), value, largest)
        magnitude = select_less(magnitude, absolute(value), absolute(value), magnitude)
    return largest


@compiled
def search_scale(
    x: np.ndarray, error_weights: np.ndarray, start: int, count: int, half: np.float32
) -> tuple[Vector, Vector]:
    """Search the scale of a sub-block without a minimum (make_qx_quants).

    Args:
        x: Weights, a tile.
        error_weights: What the errors of the sub-block weigh, tile [count, …].
        start: The sub-block's first row of x.
        count: Its rows.
        half: Codes go from -half to half - 1.

    Returns:
        The scale, and the inverse scale that the codes are made with; both 0 for zeros.
    """
    zero = broadcast(F(0))
    largest = largest_weight(x, start, count)
    scale = zero
    most = zero
    best_inverse = zero
    for trial in range(19):
        offset = trial - 10 if trial < 10 else trial - 9
        nudge = F(0) if trial == 0 else F(offset)
        inverse = broadcast(-(half + F(0.1) * nudge)) / largest
        lx = zero
        ll = zero
        for i in range(count):
            value = load(x, start + i)
            weight = load(error_weights, i)
            code = clip(round_to_even(inverse * value), -half, half - F(1))
            lx = lx + weight * value * code
            ll = ll + weight * code * code
        if trial == 0:
            scale = select_equal(ll, zero, zero, lx / ll)
            best_inverse = inverse
            most = scale * lx
        else:
            # The error falls by lx² / ll.
            trial_scale = select_less(zero, ll, lx / ll, scale)
            gain = select_less(zero, ll, lx * lx, zero)
            bar = most * ll
            scale = select_less(bar, gain, trial_scale, scale)
            best_inverse = select_less(bar, gain, inverse, best_inverse)
            most = select_less(bar, gain, trial_scale * lx, most)
    magnitude = absolute(largest)
    scale = select_less(magnitude, EPSILON, zero, scale)
    return scale, select_less(magnitude, EPSILON, zero, best_inverse)


@compiled
def descend_codes(
    x: np.ndarray,
    error_weights: np.ndarray,
    codes: np.ndarray,
    start: int,
    count: int,
    low: np.float32,
    high: np.float32,
    needs_others: bool,
) -> Vector:
    """Move codes one by one to where the best scale leaves less (make_q3_quants, make_qp_quants).

    Args:
        x: Weights, a tile.
        error_weights: What the errors of the sub-block weigh, tile [count, …].
        codes: From low to high, tile [count, …]; they change.
        start: The sub-block's first row of x.
        count: Its rows.
        low: The least code.
        high: The greatest code.
        needs_others: Whether the squares of the other codes have to sum to more than 0.

    Returns:
        The scale that fits the codes.
    """
    zero = broadcast(F(0))
    lx = broadcast(F(0))
    ll = broadcast(F(0))
    for i in range(count):
        value = load(x, start + i)
        weight = load(error_weights, i)
        code = load(codes, i)
        lx = lx + weight * value * code
        ll = ll + weight * code * code
    for _ in range(5):
        moved = False
        for i in range(count):
            value = load(x, start + i)
            weight = load(error_weights, i)
            code = load(codes, i)
            other_lx = lx - weight * value * code
            other_ll = ll - weight * code * code
            new = clip(round_to_even(value * other_ll / other_lx), low, high)
            new_lx = other_lx + weight * value * new
            new_ll = other_ll + weight * new * new
            # new_lx² / new_ll has to be more than lx² / ll.
            bar = select_less(zero, other_lx, lx * lx * new_ll, broadcast(F(np.inf)))
            positive = other_ll if needs_others else new_ll
            bar = select_less(zero, positive, bar, broadcast(F(np.inf)))
            gain = select_equal(new, code, zero, new_lx * new_lx * ll)
            moved |= any_less(bar, gain)
            store(codes, i, select_less(bar, gain, new, code))
            lx = select_less(bar, gain, new_lx, lx)
            ll = select_less(bar, gain, new_ll, ll)
        if not moved:
            break
    return select_less(zero, ll, lx / ll, zero)
