"""Our kernel of the k-quants' searches makes ggml's choices, bit for bit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantline.methods.ggml import quantize
from quantline.methods.ggml.quantize import SEARCHED_TYPES, quantize_blocks


def uneven_rows(seed: int, rows: int = 9, width: int = 512) -> np.ndarray:
    """Return rows with groups of zeros, of one value and of one sign, tails and unlike sizes."""
    generator = np.random.default_rng(seed)
    sizes = np.exp(generator.normal(size=(rows, width // 32))).repeat(32, 1)
    weight = generator.standard_t(4, size=(rows, width)) * sizes * 0.03
    weight[0] = 0
    weight[1, :40] = 0
    weight[2] = np.abs(weight[2])
    weight[3] = -np.abs(weight[3])
    weight[4, 16:48] = 0.25
    weight[5] = -1e-3
    weight[6, ::3] = 0
    return weight.astype(np.float32)


@given(st.integers(0, 2**32 - 1), st.sampled_from(SEARCHED_TYPES), st.booleans())
@settings(deadline=None)
def test_numba_kernel_makes_ggmls_blocks(seed, ggml_type, with_importance):
    weight = uneven_rows(seed)
    importance = None
    if with_importance:
        sizes = 2 * np.random.default_rng(seed).normal(size=512)
        importance = np.exp(sizes).astype(np.float32)
    blocks = quantize_blocks(weight, ggml_type, importance, kernel="numba")
    assert np.array_equal(blocks, quantize_blocks(weight, ggml_type, importance))


@pytest.mark.parametrize("ggml_type", SEARCHED_TYPES)
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e3])
def test_numba_kernel_makes_ggmls_blocks_of_small_and_large_weights(ggml_type, size):
    weight = (uneven_rows(1, 16) * size).astype(np.float32)
    for importance in (None, np.geomspace(1e-6, 1e6, 512)):
        blocks = quantize_blocks(weight, ggml_type, importance, kernel="numba")
        assert np.array_equal(blocks, quantize_blocks(weight, ggml_type, importance))


def test_numba_kernel_does_not_depend_on_threads_and_parts(monkeypatch):
    weight = uneven_rows(2, 40)
    importance = np.geomspace(1, 9, 512)
    at_once = quantize_blocks(weight, "Q4_K", importance, 1, "numba")
    monkeypatch.setattr(quantize, "WEIGHTS_AT_ONCE", 512 * 7)
    in_parts = quantize_blocks(weight, "Q4_K", importance, 3, "numba")
    assert np.array_equal(in_parts, at_once)


def test_numba_kernel_leaves_other_types_to_ggml():
    weight = uneven_rows(3)
    blocks = quantize_blocks(weight, "Q5_0", kernel="numba")
    assert np.array_equal(blocks, quantize_blocks(weight, "Q5_0"))
