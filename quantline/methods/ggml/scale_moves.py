"""Compiled moves of two of a row's numbers at once, by which tr(G Δ H Δᵀ) falls.

With directions a and b in the columns, a row's Δ changes by x a + y b, and tr(G Δ H Δᵀ) by a
quadratic form in x and y; the best pair that can be stored is taken if it lowers that.
"""

import numba
import numpy as np

LARGEST_FLOAT16 = 65504.0

Range = tuple[np.float32, np.float32]


@numba.njit(nogil=True, cache=True, fastmath=False)
def round_to_float16(value: np.float32) -> np.float32:
    """Round a float32 to what float16 holds, ties to even; infinity beyond its range."""
    if abs(value) < np.float32(2.0**-14):
        return np.rint(value * np.float32(2.0**24)) * np.float32(2.0**-24)
    scale = np.float32(2.0) ** (np.floor(np.log2(np.float64(abs(value)))) - 10)
    rounded = np.float32(np.rint(value / scale) * scale)
    return rounded if abs(rounded) <= LARGEST_FLOAT16 else np.float32(np.inf) * np.sign(value)


@numba.njit(nogil=True, cache=True, fastmath=False)
def _nearest_storable(
    value: np.float32, is_integer: bool, low: np.float32, high: np.float32
) -> np.float32:
    """Return the nearest value that the format holds: an integer in a range, or a float16."""
    return min(max(np.rint(value), low), high) if is_integer else round_to_float16(value)


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
def move_rows(
    first: np.ndarray,
    second: np.ndarray,
    first_product: np.ndarray,
    second_product: np.ndarray,
    p: np.ndarray,
    q: np.ndarray,
    is_integer: bool,
    p_range: Range,
    q_range: Range,
    gradient: np.ndarray,
    fisher: np.ndarray,
) -> np.ndarray:
    """Move two numbers of each row, p and q, one row after another.

    Args:
        first: What one unit of p adds to the weight [rows, n].
        second: What one unit of q adds [rows, n]; zeros where there is no q.
        first_product: `first` times H.
        second_product: `second` times H.
        p: [rows]; it changes.
        q: [rows]; it changes.
        is_integer: Whether p and q are integers in their ranges, or float16.
        p_range: The least and greatest p.
        q_range: The least and greatest q.
        gradient: G Δ H of these columns [rows, n]; it changes in rows that are still to be moved.
        fisher: G of these rows [rows, rows].

    Returns:
        The change of the rounded weight [rows, n].
    """
    rows, width = first.shape
    change = np.zeros((rows, width), np.float32)
    change_product = np.empty(width, np.float32)
    for i in range(rows):
        a = first[i]
        b = second[i]
        ha = first_product[i]
        hb = second_product[i]
        aa = np.float32(0)
        ab = np.float32(0)
        bb = np.float32(0)
        slope_a = np.float32(0)
        slope_b = np.float32(0)
        for j in range(width):
            aa += a[j] * ha[j]
            ab += a[j] * hb[j]
            bb += b[j] * hb[j]
            slope_a += a[j] * gradient[i, j]
            slope_b += b[j] * gradient[i, j]
        aa = aa * fisher[i, i]
        ab = ab * fisher[i, i]
        bb = bb * fisher[i, i]
        determinant = aa * bb - ab * ab
        if bb > 0 and determinant > np.float32(1e-4) * aa * bb:
            best_step = (ab * slope_b - bb * slope_a) / determinant
        elif aa > 0:
            best_step = -slope_a / aa
        else:
            best_step = np.float32(0)
        least = np.float32(0)
        best_x = np.float32(0)
        best_y = np.float32(0)
        # p as it is, then the nearest to its best, and for integers that one's neighbours.
        for trial in range(4 if is_integer else 2):
            x = np.float32(0)
            if trial > 0 and aa > 0:
                offset = np.float32(0) if trial == 1 else np.float32(2 * trial - 5)
                target = p[i] + best_step + offset
                x = _nearest_storable(target, is_integer, p_range[0], p_range[1]) - p[i]
            y = np.float32(0)
            if bb > 0:
                target = q[i] - (slope_b + ab * x) / bb
                y = _nearest_storable(target, is_integer, q_range[0], q_range[1]) - q[i]
            cost = (
                np.float32(2) * (slope_a * x + slope_b * y)
                + aa * x * x
                + np.float32(2) * ab * x * y
                + bb * y * y
            )
            if cost < least:
                least = cost
                best_x = x
                best_y = y
        if least < 0:
            p[i] += best_x
            q[i] += best_y
            for j in range(width):
                change[i, j] = best_x * a[j] + best_y * b[j]
                change_product[j] = best_x * ha[j] + best_y * hb[j]
            for k in range(i + 1, rows):
                for j in range(width):
                    gradient[k, j] += fisher[i, k] * change_product[j]
    return change
