"""The searches of ggml's k-quants for scales, sixteen blocks side by side (make_qkx3_quants and more of ggml-quants.c).

The choices are ggml's, operation by operation and in its order, so the blocks are too, bit for bit, where ggml is
compiled without fused multiply-add, as it is by default on x86. What is done for each sub-block there is done here for
the same sub-block of sixteen blocks at once. A tile is float32 [rows, LANES], with a block in each column.
"""

import numba
import numpy as np

from quantline.methods.ggml.simd16 import (
    LANES,
    any_less,
    as_half,
    clipped,
    get,
    if_equal,
    if_less,
    nearest_whole,
    put,
    root,
    size,
    spread,
)

F = np.float32
NOTHING = F(1e-15)  # a group whose weights are all smaller is taken for zeros
compiled = numba.njit(nogil=True, cache=True, fastmath=False, error_model="numpy")


@compiled
def affine(x, w, codes, start, count, top, first_step, step, steps, absolute):
    """(scale, minimum, inverse scale and origin of the codes) for rows start … of x with minima.

    Tries inverse scales around top / range, fits scale and minimum to each by weighted least squares, and keeps those
    with the least weighted error, squared or `absolute`. As in ggml, what is tried next starts from the minimum that was
    kept. w and codes [count, LANES]; codes are scratch.
    """
    zero, none = spread(F(0)), spread(F(np.nan))
    low, weights = get(x, start), get(w, 0)
    high, sums = low, weights * low
    for i in range(1, count):
        value, weight = get(x, start + i), get(w, i)
        low, high = if_less(value, low, value, low), if_less(high, value, value, high)
        weights, sums = weights + weight, sums + weight * value
    low = if_less(zero, low, zero, low)
    flat = if_equal(high, low, zero, spread(F(1)))
    chosen, origin = spread(top) / (high - low), low
    scale, best = spread(F(1)) / chosen, zero
    for i in range(count):
        value = get(x, start + i)
        off = scale * clipped(nearest_whole(chosen * (value - low)), F(0), top) + low - value
        best = best + get(w, i) * (size(off) if absolute else off * off)
    for trial in range(steps + 1):
        inverse = spread(first_step + step * F(trial) + top) / (high - low)
        of_l, ll, lx = zero, zero, zero
        for i in range(count):
            value = get(x, start + i)
            code = clipped(nearest_whole(inverse * (value - low)), F(0), top)
            put(codes, i, code)
            heavy = get(w, i) * code
            of_l, ll, lx = of_l + heavy, ll + heavy * code, lx + heavy * value
        det = weights * ll - of_l * of_l
        one, other = (weights * lx - sums * of_l) / det, (ll * sums - of_l * lx) / det
        one, other = if_less(zero, other, lx / ll, one), if_less(zero, other, zero, other)
        found = if_less(zero, det, zero, none)
        for i in range(count):
            off = one * get(codes, i) + other - get(x, start + i)
            found = found + get(w, i) * (size(off) if absolute else off * off)
        chosen, scale, origin = (if_less(found, best, inverse, chosen), if_less(found, best, one, scale),
                                 if_less(found, best, low, origin))
        low, best = if_less(found, best, other, low), if_less(found, best, found, best)
    return if_equal(flat, zero, zero, scale), zero - low, if_equal(flat, zero, zero, chosen), origin


@compiled
def largest(x, start, count):
    """The weight of the greatest size."""
    far, value = spread(F(0)), spread(F(0))
    for i in range(count):
        one = get(x, start + i)
        value, far = if_less(far, size(one), one, value), if_less(far, size(one), size(one), far)
    return value


@compiled
def symmetric(x, w, start, count, half):
    """(scale, inverse scale of the codes -half … half - 1) for rows start … of x without minima; 0 for zeros."""
    zero, far = spread(F(0)), largest(x, start, count)
    scale, best, chosen = zero, zero, zero
    for trial in range(19):
        nudge = F(0) if trial == 0 else F(trial - 10 if trial < 10 else trial - 9)
        inverse = spread(-(half + F(0.1) * nudge)) / far
        lx, ll = zero, zero
        for i in range(count):
            value, weight = get(x, start + i), get(w, i)
            code = clipped(nearest_whole(inverse * value), -half, half - F(1))
            lx, ll = lx + weight * value * code, ll + weight * code * code
        if trial == 0:
            scale, chosen = if_equal(ll, zero, zero, lx / ll), inverse
            best = scale * lx
        else:
            found = if_less(zero, ll, lx / ll, scale)
            gain, bar = if_less(zero, ll, lx * lx, zero), best * ll
            scale, chosen = if_less(bar, gain, found, scale), if_less(bar, gain, inverse, chosen)
            best = if_less(bar, gain, found * lx, best)
    there = size(far)
    return if_less(there, NOTHING, zero, scale), if_less(there, NOTHING, zero, chosen)


@compiled
def relaxed(x, w, codes, start, count, low, high, floor):
    """The scale of rows start … of x once no single one of `codes`, from low to high, is better elsewhere; they change.

    `floor`: whether the sum of the squares of the other codes has to be positive too.
    """
    zero, lx, ll = spread(F(0)), spread(F(0)), spread(F(0))
    for i in range(count):
        value, weight, code = get(x, start + i), get(w, i), get(codes, i)
        lx, ll = lx + weight * value * code, ll + weight * code * code
    for _ in range(5):
        moved = False
        for i in range(count):
            value, weight, code = get(x, start + i), get(w, i), get(codes, i)
            rest_lx, rest_ll = lx - weight * value * code, ll - weight * code * code
            new = clipped(nearest_whole(value * rest_ll / rest_lx), low, high)
            new_lx, new_ll = rest_lx + weight * value * new, rest_ll + weight * new * new
            bar = if_less(zero, rest_lx, lx * lx * new_ll, spread(F(np.inf)))
            bar = if_less(zero, rest_ll if floor else new_ll, bar, spread(F(np.inf)))
            gain = if_equal(new, code, zero, new_lx * new_lx * ll)
            moved |= any_less(bar, gain)
            put(codes, i, if_less(bar, gain, new, code))
            lx, ll = if_less(bar, gain, new_lx, lx), if_less(bar, gain, new_ll, ll)
        if not moved:
            break
    return if_less(zero, ll, lx / ll, zero)


@compiled
def positive(x, w, codes, count, top):
    """The scale of `count` rows of positive x; codes, 0 … top, are written."""
    zero, far = spread(F(0)), spread(F(0))
    for i in range(count):
        far = if_less(far, get(x, i), get(x, i), far)
    chosen, best = spread(top) / far, zero
    for trial in range(9):
        nudge = F(0) if trial == 0 else F(trial - 5 if trial < 5 else trial - 4)
        inverse = spread(F(0.1) * nudge + top) / far
        scale, found = spread(F(1)) / inverse, zero
        for i in range(count):
            off = get(x, i) - scale * clipped(nearest_whole(inverse * get(x, i)), F(0), top)
            found = found + get(w, i) * off * off
        if trial == 0:
            best = found
        chosen, best = if_less(found, best, inverse, chosen), if_less(found, best, found, best)
    for i in range(count):
        put(codes, i, clipped(nearest_whole(chosen * get(x, i)), F(0), top))
    scale = relaxed(x, w, codes, 0, count, F(0), top, True)
    for i in range(count):
        put(codes, i, if_less(far, NOTHING, zero, get(codes, i)))
    return if_less(far, NOTHING, zero, scale)


@compiled
def spanned(x, codes, count, top):
    """The scale of `count` rows of positive x, the greatest over top; codes are written."""
    zero, far = spread(F(0)), spread(F(0))
    for i in range(count):
        far = if_less(far, get(x, i), get(x, i), far)
    inverse = if_less(zero, far, spread(top) / far, zero)
    for i in range(count):
        put(codes, i, clipped(nearest_whole(inverse * get(x, i)), F(0), top))
    return far / top


@compiled
def error_weights(x, importance, w, start, count, weighted, sigma, plain):
    """Fill w [count, LANES], what the errors of rows start … of x weigh; returns their sum.

    With importance it is that times the root of sigma + x²; without, x² for plain 0, |x| for 1, and |x| plus the root
    mean square of the rows for 2.
    """
    total, mean = spread(F(0)), spread(F(0))
    if plain == 2 and not weighted:
        for i in range(count):
            mean = mean + get(x, start + i) * get(x, start + i)
        mean = root(mean / F(count))
    for i in range(count):
        value = get(x, start + i)
        if weighted:
            weight = get(importance, start + i) * root(sigma + value * value)
        else:
            weight = value * value if plain == 0 else mean + size(value)
        put(w, i, weight)
        total = total + weight
    return total


@compiled
def variance(x, factor):
    """factor times the mean square of a block."""
    total = spread(F(0))
    for i in range(256):
        total = total + get(x, i) * get(x, i)
    return factor * total / F(256)


@compiled
def with_minima(x, importance, weighted, sub, top, most, factor, plan, absolute, w, scratch, codes, scales, minima,
                halves):
    """Q2_K, Q4_K and Q5_K: codes [256, LANES], scales and minima [256 / sub, LANES] up to `most`, halves (d, dmin)."""
    count = 256 // sub
    found, lows, totals = np.empty((16, LANES), F), np.empty((16, LANES), F), np.empty((16, LANES), F)
    inverse, origins = np.empty((16, LANES), F), np.empty((16, LANES), F)
    sigma = variance(x, factor)
    for j in range(count):
        put(totals, j, error_weights(x, importance, w, j * sub, sub, weighted, sigma, 1 if absolute else 2))
        scale, low, chosen, origin = affine(x, w, scratch, j * sub, sub, top, plan[0], plan[1], int(plan[2]),
                                           absolute and not weighted)
        put(found, j, scale)
        put(lows, j, low)
        put(inverse, j, chosen)
        put(origins, j, origin)
    if weighted:
        d, dmin = positive(found, totals, scales, count, most), positive(lows, totals, minima, count, most)
    else:
        d, dmin = spanned(found, scales, count, most), spanned(lows, minima, count, most)
    d, dmin = as_half(d), as_half(dmin)
    put(halves, 0, d)
    put(halves, 1, dmin)
    for j in range(count):
        scale, low, chosen, origin = d * get(scales, j), dmin * get(minima, j), get(inverse, j), get(origins, j)
        for i in range(j * sub, (j + 1) * sub):
            value = get(x, i)
            kept = clipped(nearest_whole(chosen * (value - origin)), F(0), top)
            put(codes, i, if_equal(scale, spread(F(0)), kept, clipped(nearest_whole((value + low) / scale), F(0), top)))


@compiled
def without_minima(x, importance, weighted, six, w, scratch, codes, scales, halves):
    """Q6_K (`six`) and Q3_K: codes [256, LANES], scales [16, LANES], halves (d, 0)."""
    zero, half = spread(F(0)), F(32) if six else F(4)
    found, totals = np.empty((16, LANES), F), np.empty((16, LANES), F)
    sigma = variance(x, F(2))
    for j in range(16):
        put(totals, j, error_weights(x, importance, w, 16 * j, 16, weighted and not six, sigma, 0))
        if six and weighted:
            for i in range(16):
                put(w, i, get(importance, 16 * j + i))
        if six or weighted:
            scale, chosen = symmetric(x, w, 16 * j, 16, half)
            for i in range(16):
                put(scratch, i, clipped(nearest_whole(chosen * get(x, 16 * j + i)), -half, half - F(1)))
        else:
            far = largest(x, 16 * j, 16)
            chosen = if_less(size(far), NOTHING, zero, spread(-half) / far)
            for i in range(16):
                put(scratch, i, clipped(nearest_whole(chosen * get(x, 16 * j + i)), -half, half - F(1)))
            scale = if_less(size(far), NOTHING, zero, relaxed(x, w, scratch, 16 * j, 16, -half, half - F(1), False))
        for i in range(16):  # codes to be kept where the scale is rounded to zero; those of zeros are zero
            put(codes, 16 * j + i, if_equal(chosen, zero, zero, get(scratch, i) + half))
        put(found, j, scale)
    most = F(128) if six else F(32)
    if weighted and not six:
        d, chosen = symmetric(found, totals, 0, 16, most)
    else:
        far = largest(found, 0, 16)
        empty = size(far) if six else if_equal(far, zero, zero, spread(F(1)))
        chosen = if_less(empty, NOTHING, zero, spread(-most) / far)
        d = if_less(empty, NOTHING, zero, spread(F(1)) / chosen)
    d = as_half(d)
    put(halves, 0, d)
    put(halves, 1, zero)
    for j in range(16):
        wanted = clipped(nearest_whole(chosen * get(found, j)), -most, most - F(1))
        put(scales, j, if_equal(chosen, zero, zero if six else spread(-most), wanted))
        scale = d * get(scales, j)
        for i in range(16 * j, 16 * j + 16):
            code = clipped(nearest_whole(get(x, i) / scale), -half, half - F(1)) + half
            put(codes, i, if_equal(scale, zero, get(codes, i), code))
            if six:
                put(codes, i, if_equal(chosen, zero, zero, get(codes, i)))


@compiled
def search(weights, importance, weighted, kind, codes, scales, minima, halves):
    """Fill codes uint8 [n, 256], scales and minima int16 [n, sub-blocks] and halves float32 [n, 2] for n blocks.

    weights float32 [n, 256]; importance [blocks of a row, 256], of which the first is that of the first block; kind 2 … 6
    as in Q2_K … Q6_K.
    """
    x, q, tile = np.empty((256, LANES), F), np.ones((256, LANES), F), np.empty((256, LANES), F)
    w, scratch, both = np.empty((32, LANES), F), np.empty((32, LANES), F), np.empty((2, LANES), F)
    ours, lows = np.zeros((16, LANES), F), np.zeros((16, LANES), F)
    for start in range(0, len(weights), LANES):
        lanes = min(LANES, len(weights) - start)
        if lanes < LANES:
            x[:] = 0
        for k in range(lanes):
            for i in range(256):
                x[i, k] = weights[start + k, i]
            if weighted:
                for i in range(256):
                    q[i, k] = importance[(start + k) % len(importance), i]
        fine = (F(-0.9), F(0.05), F(36))
        if kind == 2:
            with_minima(x, q, weighted, 16, F(3), F(15), F(1), fine if weighted else (F(-0.5), F(0.1), F(15)), True,
                        w, scratch, tile, ours, lows, both)
        elif kind == 4:
            with_minima(x, q, weighted, 32, F(15), F(63), F(2), fine if weighted else (F(-1), F(0.1), F(20)), False,
                        w, scratch, tile, ours, lows, both)
        elif kind == 5:
            with_minima(x, q, weighted, 32, F(31), F(63), F(2), fine if weighted else (F(-0.5), F(0.1), F(15)), False,
                        w, scratch, tile, ours, lows, both)
        else:
            without_minima(x, q, weighted, kind == 6, w, scratch, tile, ours, both)
        for k in range(lanes):
            for i in range(256):
                codes[start + k, i] = np.uint8(tile[i, k])
            for j in range(scales.shape[1]):
                scales[start + k, j] = np.int16(ours[j, k])
                minima[start + k, j] = np.int16(lows[j, k])
            halves[start + k, 0], halves[start + k, 1] = both[0, k], both[1, k]
