"""ggml's k-quants, sixteen blocks side by side: Q2_K, Q3_K, Q4_K, Q5_K and Q6_K (ggml-quants.c).

The blocks are ggml's, bit for bit (scale_search.py says when). A tile is float32
[rows, VECTOR_WIDTH], with a block in each column.
"""

import numpy as np

from quantline.methods.ggml.error_weights import (
    BY_MAGNITUDE,
    BY_MAGNITUDE_AND_MEAN,
    BY_SQUARE,
    fill_error_weights,
    scaled_mean_square,
)
from quantline.methods.ggml.positive_scales import scale_to_largest, search_positive_scale
from quantline.methods.ggml.scale_search import (
    EPSILON,
    descend_codes,
    largest_weight,
    search_scale,
    search_scale_and_minimum,
)
from quantline.methods.ggml.simd16 import (
    VECTOR_WIDTH,
    absolute,
    broadcast,
    clip,
    compiled,
    load,
    round_to_even,
    round_to_float16,
    select_equal,
    select_less,
    store,
)

F = np.float32
BLOCK_SIZE = 256


@compiled
def quantize_with_minima(
    x: np.ndarray,
    importance: np.ndarray,
    use_importance: bool,
    sub_block: int,
    top_code: np.float32,
    top_scale: np.float32,
    sigma_factor: np.float32,
    search: tuple[np.float32, np.float32, np.float32],
    absolute_errors: bool,
    error_weights: np.ndarray,
    scratch: np.ndarray,
    codes: np.ndarray,
    scales: np.ndarray,
    minima: np.ndarray,
    d_and_dmin: np.ndarray,
) -> None:
    """Quantize sixteen blocks of Q2_K, Q4_K or Q5_K.

    Args:
        x: Weights, tile [256, …].
        importance: Of their inputs, tile [256, …].
        use_importance: Whether it counts.
        sub_block: Weights in a sub-block.
        top_code: The greatest code.
        top_scale: The greatest integer scale and minimum.
        sigma_factor: Of the mean square in `fill_error_weights`.
        search: First step, step and number of steps of `search_scale_and_minimum`.
        absolute_errors: Whether errors count by their magnitude where there is no importance.
        error_weights: Scratch, tile [32, …].
        scratch: Scratch, tile [32, …].
        codes: Filled, tile [256, …].
        scales: Filled with integer scales, a tile with a row for each sub-block.
        minima: Filled with integer minima, likewise.
        d_and_dmin: Filled, tile [2, …].
    """
    count = BLOCK_SIZE // sub_block
    float_scales = np.empty((16, VECTOR_WIDTH), F)
    float_minima = np.empty((16, VECTOR_WIDTH), F)
    totals = np.empty((16, VECTOR_WIDTH), F)
    inverses = np.empty((16, VECTOR_WIDTH), F)
    origins = np.empty((16, VECTOR_WIDTH), F)
    sigma = scaled_mean_square(x, sigma_factor)
    unweighted_kind = BY_MAGNITUDE if absolute_errors else BY_MAGNITUDE_AND_MEAN
    for j in range(count):
        start = j * sub_block
        total = fill_error_weights(
            x, importance, error_weights, start, sub_block, use_importance, sigma, unweighted_kind
        )
        store(totals, j, total)
        scale, minimum, inverse, origin = search_scale_and_minimum(
            x,
            error_weights,
            scratch,
            start,
            sub_block,
            top_code,
            search[0],
            search[1],
            int(search[2]),
            absolute_errors and not use_importance,
        )
        store(float_scales, j, scale)
        store(float_minima, j, minimum)
        store(inverses, j, inverse)
        store(origins, j, origin)
    if use_importance:
        d = search_positive_scale(float_scales, totals, scales, count, top_scale)
        dmin = search_positive_scale(float_minima, totals, minima, count, top_scale)
    else:
        d = scale_to_largest(float_scales, scales, count, top_scale)
        dmin = scale_to_largest(float_minima, minima, count, top_scale)
    d = round_to_float16(d)
    dmin = round_to_float16(dmin)
    store(d_and_dmin, 0, d)
    store(d_and_dmin, 1, dmin)
    for j in range(count):
        scale = d * load(scales, j)
        minimum = dmin * load(minima, j)
        inverse = load(inverses, j)
        origin = load(origins, j)
        for i in range(j * sub_block, (j + 1) * sub_block):
            value = load(x, i)
            # Where the scale was rounded to zero, ggml leaves the codes of the search.
            searched = clip(round_to_even(inverse * (value - origin)), F(0), top_code)
            code = clip(round_to_even((value + minimum) / scale), F(0), top_code)
            store(codes, i, select_equal(scale, broadcast(F(0)), searched, code))


@compiled
def quantize_without_minima(
    x: np.ndarray,
    importance: np.ndarray,
    use_importance: bool,
    six_bits: bool,
    error_weights: np.ndarray,
    scratch: np.ndarray,
    codes: np.ndarray,
    scales: np.ndarray,
    d_and_dmin: np.ndarray,
) -> None:
    """Quantize sixteen blocks of Q6_K or Q3_K, whose sub-blocks have 16 weights.

    Args:
        x: Weights, tile [256, …].
        importance: Of their inputs, tile [256, …].
        use_importance: Whether it counts.
        six_bits: Whether the type is Q6_K.
        error_weights: Scratch, tile [32, …].
        scratch: Scratch, tile [32, …].
        codes: Filled, tile [256, …].
        scales: Filled with integer scales, tile [16, …].
        d_and_dmin: Filled with d and 0, tile [2, …].
    """
    zero = broadcast(F(0))
    half = F(32) if six_bits else F(4)
    float_scales = np.empty((16, VECTOR_WIDTH), F)
    totals = np.empty((16, VECTOR_WIDTH), F)
    sigma = scaled_mean_square(x, F(2))
    for j in range(16):
        start = 16 * j
        weigh = use_importance and not six_bits
        total = fill_error_weights(x, importance, error_weights, start, 16, weigh, sigma, BY_SQUARE)
        store(totals, j, total)
        if six_bits and use_importance:
            for i in range(16):
                store(error_weights, i, load(importance, start + i))
        if six_bits or use_importance:
            scale, inverse = search_scale(x, error_weights, start, 16, half)
            for i in range(16):
                code = clip(round_to_even(inverse * load(x, start + i)), -half, half - F(1))
                store(scratch, i, code)
        else:
            largest = largest_weight(x, start, 16)
            inverse = select_less(absolute(largest), EPSILON, zero, broadcast(-half) / largest)
            for i in range(16):
                code = clip(round_to_even(inverse * load(x, start + i)), -half, half - F(1))
                store(scratch, i, code)
            scale = descend_codes(x, error_weights, scratch, start, 16, -half, half - F(1), False)
            scale = select_less(absolute(largest), EPSILON, zero, scale)
        # Codes that stay where the scale is rounded to zero; those of zeros are zero.
        for i in range(16):
            store(codes, start + i, select_equal(inverse, zero, zero, load(scratch, i) + half))
        store(float_scales, j, scale)
    top_scale = F(128) if six_bits else F(32)
    if use_importance and not six_bits:
        d, inverse = search_scale(float_scales, totals, 0, 16, top_scale)
    else:
        largest = largest_weight(float_scales, 0, 16)
        # Below EPSILON there is nothing to scale: for Q3_K only where all scales are zero.
        size = absolute(largest) if six_bits else select_equal(largest, zero, zero, broadcast(F(1)))
        inverse = select_less(size, EPSILON, zero, broadcast(-top_scale) / largest)
        d = select_less(size, EPSILON, zero, broadcast(F(1)) / inverse)
    d = round_to_float16(d)
    store(d_and_dmin, 0, d)
    store(d_and_dmin, 1, zero)
    for j in range(16):
        scaled = round_to_even(inverse * load(float_scales, j))
        integer = clip(scaled, -top_scale, top_scale - F(1))
        empty = zero if six_bits else broadcast(-top_scale)
        store(scales, j, select_equal(inverse, zero, empty, integer))
        scale = d * load(scales, j)
        for i in range(16 * j, 16 * j + 16):
            code = clip(round_to_even(load(x, i) / scale), -half, half - F(1)) + half
            store(codes, i, select_equal(scale, zero, load(codes, i), code))
            if six_bits:
                store(codes, i, select_equal(inverse, zero, zero, load(codes, i)))


@compiled
def search_blocks(
    weights: np.ndarray,
    importance: np.ndarray,
    use_importance: bool,
    bits: int,
    codes: np.ndarray,
    scales: np.ndarray,
    minima: np.ndarray,
    d_and_dmin: np.ndarray,
) -> None:
    """Quantize n blocks.

    Args:
        weights: float32 [n, 256].
        importance: float32 [blocks of a row, 256], of which the first is that of the first block.
        use_importance: Whether it counts.
        bits: 2 … 6 as in Q2_K … Q6_K.
        codes: Filled, uint8 [n, 256].
        scales: Filled with integer scales, int16 [n, sub-blocks].
        minima: Filled with integer minima, int16 [n, sub-blocks].
        d_and_dmin: Filled, float32 [n, 2].
    """
    x = np.empty((BLOCK_SIZE, VECTOR_WIDTH), F)
    inputs = np.ones((BLOCK_SIZE, VECTOR_WIDTH), F)
    code_tile = np.empty((BLOCK_SIZE, VECTOR_WIDTH), F)
    error_weights = np.empty((32, VECTOR_WIDTH), F)
    scratch = np.empty((32, VECTOR_WIDTH), F)
    d_tile = np.empty((2, VECTOR_WIDTH), F)
    scale_tile = np.zeros((16, VECTOR_WIDTH), F)
    minimum_tile = np.zeros((16, VECTOR_WIDTH), F)
    with_importance = (F(-0.9), F(0.05), F(36))
    for start in range(0, len(weights), VECTOR_WIDTH):
        present = min(VECTOR_WIDTH, len(weights) - start)
        if present < VECTOR_WIDTH:
            x[:] = 0
        for k in range(present):
            for i in range(BLOCK_SIZE):
                x[i, k] = weights[start + k, i]
            if use_importance:
                for i in range(BLOCK_SIZE):
                    inputs[i, k] = importance[(start + k) % len(importance), i]
        if bits in (2, 4, 5):
            if bits == 4:
                search = with_importance if use_importance else (F(-1), F(0.1), F(20))
            else:
                search = with_importance if use_importance else (F(-0.5), F(0.1), F(15))
            quantize_with_minima(
                x,
                inputs,
                use_importance,
                16 if bits == 2 else 32,
                F((1 << bits) - 1),
                F(15) if bits == 2 else F(63),
                F(1) if bits == 2 else F(2),
                search,
                bits == 2,
                error_weights,
                scratch,
                code_tile,
                scale_tile,
                minimum_tile,
                d_tile,
            )
        else:
            quantize_without_minima(
                x,
                inputs,
                use_importance,
                bits == 6,
                error_weights,
                scratch,
                code_tile,
                scale_tile,
                d_tile,
            )
        for k in range(present):
            for i in range(BLOCK_SIZE):
                codes[start + k, i] = np.uint8(code_tile[i, k])
            for j in range(scales.shape[1]):
                scales[start + k, j] = np.int16(scale_tile[j, k])
                minima[start + k, j] = np.int16(minimum_tile[j, k])
            d_and_dmin[start + k, 0] = d_tile[0, k]
            d_and_dmin[start + k, 1] = d_tile[1, k]
