"""Our kernel of the k-quants' searches makes ggml's choices, bit for bit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantline.methods.ggml import quantize as kquant, simd16 as lanes
from quantline.methods.ggml.kquant_search import compiled
from quantline.methods.ggml.simd16 import LANES


def weights(seed: int, rows: int = 9, width: int = 512) -> np.ndarray:
    """Rows with groups of zeros, of one value and of one sign, heavy tails and very different sizes."""
    draw = np.random.default_rng(seed)
    made = draw.standard_t(4, size=(rows, width)) * np.exp(draw.normal(size=(rows, width // 32))).repeat(32, 1) * 0.03
    made[0], made[1, :40], made[2], made[3] = 0, 0, np.abs(made[2]), -np.abs(made[3])
    made[4, 16:48], made[5], made[6, ::3] = 0.25, -1e-3, 0
    return made.astype(np.float32)


@given(st.integers(0, 2**32 - 1), st.sampled_from(kquant.SEARCHED), st.booleans())
@settings(deadline=None)
def test_the_blocks_are_ggmls(seed, kind, weighted):
    weight = weights(seed)
    importance = np.exp(2 * np.random.default_rng(seed).normal(size=512)).astype(np.float32) if weighted else None
    ours = kquant.quantize(weight, kind, importance, kernel="numba")
    assert np.array_equal(ours, kquant.quantize(weight, kind, importance))


@pytest.mark.parametrize("kind", kquant.SEARCHED)
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e3])
def test_the_blocks_are_ggmls_for_small_and_large_weights(kind, size):
    weight = (weights(1, 16) * size).astype(np.float32)
    for importance in (None, np.geomspace(1e-6, 1e6, 512)):
        ours, theirs = (kquant.quantize(weight, kind, importance, kernel=kernel) for kernel in ("numba", "ggml"))
        assert np.array_equal(ours, theirs)


def test_threads_and_parts_do_not_show_in_the_bytes(monkeypatch):
    weight, importance = weights(2, 40), np.geomspace(1, 9, 512)
    whole = kquant.quantize(weight, "Q4_K", importance, 1, "numba")
    monkeypatch.setattr(kquant, "WEIGHTS_AT_ONCE", 512 * 7)
    assert np.array_equal(kquant.quantize(weight, "Q4_K", importance, 3, "numba"), whole)


def test_types_that_the_kernel_does_not_have_are_ggmls():
    assert np.array_equal(kquant.quantize(weights(3), "Q5_0", kernel="numba"), kquant.quantize(weights(3), "Q5_0"))


@compiled
def _each(a, b, out):
    left, right = lanes.get(a, 0), lanes.get(b, 0)
    lanes.put(out, 0, left + right)
    lanes.put(out, 1, left - right)
    lanes.put(out, 2, left * right)
    lanes.put(out, 3, left / right)
    lanes.put(out, 4, lanes.nearest_whole(left))
    lanes.put(out, 5, lanes.size(left))
    lanes.put(out, 6, lanes.root(lanes.size(left)))
    lanes.put(out, 7, lanes.if_less(left, right, left, right))
    lanes.put(out, 8, lanes.if_equal(left, right, left, np.float32(0) - right))
    lanes.put(out, 9, lanes.clipped(left, np.float32(-2), np.float32(3)))
    lanes.put(out, 10, lanes.as_half(left))
    return lanes.any_less(left, right)


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2 * LANES, max_size=2 * LANES))
@settings(deadline=None)
def test_lanes_are_numpys(values):
    a, b = np.array(values, np.float32).reshape(2, 1, LANES)
    out = np.empty((11, LANES), np.float32)
    less = _each(a, b, out)
    with np.errstate(all="ignore"):
        wanted = [a + b, a - b, a * b, a / b, np.rint(a), np.abs(a), np.sqrt(np.abs(a)), np.where(a < b, a, b),
                  np.where(a == b, a, 0 - b), np.clip(a, -2, 3), a.astype(np.float16).astype(np.float32)]
    assert np.array_equal(out, np.concatenate(wanted), equal_nan=True) and less == (a < b).any()
