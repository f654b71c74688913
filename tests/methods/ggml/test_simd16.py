"""Vectors of sixteen float32 in compiled code: every operation is numpy's."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from quantline.methods.ggml import simd16
from quantline.methods.ggml.simd16 import VECTOR_WIDTH, compiled

COUNT = 12  # results of `every_operation`


@compiled
def every_operation(a, b, out):
    """Write the results of all operations on a row of a and of b; return whether any a < b."""
    left = simd16.load(a, 0)
    right = simd16.load(b, 0)
    simd16.store(out, 0, left + right)
    simd16.store(out, 1, left - right)
    simd16.store(out, 2, left * right)
    simd16.store(out, 3, left / right)
    simd16.store(out, 4, simd16.round_to_even(left))
    simd16.store(out, 5, simd16.absolute(left))
    simd16.store(out, 6, simd16.square_root(simd16.absolute(left)))
    simd16.store(out, 7, simd16.select_less(left, right, left, right))
    simd16.store(out, 8, simd16.select_equal(left, right, left, np.float32(0) - right))
    simd16.store(out, 9, simd16.clip(left, np.float32(-2), np.float32(3)))
    simd16.store(out, 10, simd16.round_to_float16(left))
    simd16.store(out, 11, simd16.broadcast(np.float32(7)))
    return simd16.any_less(left, right)


FLOATS = st.floats(width=32, allow_nan=False)


@given(st.lists(FLOATS, min_size=2 * VECTOR_WIDTH, max_size=2 * VECTOR_WIDTH))
@settings(deadline=None)
def test_simd16_operations_are_numpys(values):
    a, b = np.array(values, np.float32).reshape(2, 1, VECTOR_WIDTH)
    out = np.empty((COUNT, VECTOR_WIDTH), np.float32)
    any_less = every_operation(a, b, out)
    with np.errstate(all="ignore"):
        expected = [
            a + b,
            a - b,
            a * b,
            a / b,
            np.rint(a),
            np.abs(a),
            np.sqrt(np.abs(a)),
            np.where(a < b, a, b),
            np.where(a == b, a, 0 - b),
            np.clip(a, -2, 3),
            a.astype(np.float16).astype(np.float32),
            np.full_like(a, 7),
        ]
    assert np.array_equal(out, np.concatenate(expected), equal_nan=True)
    assert any_less == (a < b).any()
